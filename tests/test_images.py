"""Sources of images: rows on demand train as rows in memory do, and each batch is fetched once."""

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion import checkpoint
from diffusion.batches import Batches
from diffusion.condition import Guidance, Label
from diffusion.console import UserError
from diffusion.data import Dataset
from diffusion.denoiser import DenoiserConfig
from diffusion.images import Ahead, Images, InMemory, Rows, some
from diffusion.machine import this_device
from diffusion.model import build
from diffusion.networks.unet import ResidualBlock
from diffusion.schedules import cosine
from diffusion.training import fit, one_network
from teachers.ddpm import Denoising

KINDS = {"label": Label(10)}


def numbered(count: int) -> InMemory:
    """Images of one pixel, image i of grey level i, with two things known of each."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).reshape(-1, 1, 1, 1)
    return InMemory(images, {"label": numbers % 3, "place": numbers[:, None] * torch.ones(1, 2)})


@dataclass(eq=False)
class OnDemand:
    """A source that makes each row when it is asked for it, and counts how often it is asked."""

    rows: InMemory
    asked: list[list[int]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    device = torch.device("cpu")
    slow = True

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Tensor) -> Rows:
        self.asked.append(indices.tolist())
        self.threads.add(threading.current_thread().name)
        made = [self.rows.take(index[None]) for index in indices]
        images = torch.cat([row.images for row in made])
        names = self.rows.condition
        return Rows(
            images, {name: torch.cat([row.condition[name] for row in made]) for name in names}
        )

    def near(self, device: torch.device) -> Images:
        return self

    def fingerprint(self) -> str:
        return self.rows.fingerprint()


# In memory


def test_rows_come_in_the_order_asked_for_with_all_that_is_known_of_each():
    images, condition = numbered(9).take(torch.tensor([7, 0, 7]))
    assert images.flatten().tolist() == [7, 0, 7]
    assert condition["label"].tolist() == [1, 0, 1]
    assert condition["place"].tolist() == [[7, 7], [0, 0], [7, 7]]


def test_a_source_knows_its_shape_and_number():
    source = InMemory(torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    assert (len(source), source.shape, source.slow) == (5, (3, 4, 4), False)
    assert source.take(torch.tensor([1])).condition == {}


def test_near_a_cpu_it_is_the_same_images():
    source = numbered(4)
    near = source.near(torch.device("cpu"))
    assert near.fingerprint() == source.fingerprint()
    assert torch.equal(near.take(torch.arange(4)).images, source.images)


@pytest.mark.parametrize("count", [1, 7, 10, 11, 39, 40])
def test_some_rows_are_all_of_a_small_source_and_evenly_spread_over_a_large_one(count):
    places = some(numbered(count), most=10).images.flatten().long()
    assert len(places) == min(count, 10)
    assert places[0] == 0
    if count <= 10:
        assert places.tolist() == list(range(count))
    else:
        even = torch.arange(10) * count / 10
        assert (places - even).abs().max() < 1
        assert places.diff().min() >= 1


def test_some_of_nothing_is_nothing():
    assert len(some(numbered(0)).images) == 0


def test_a_fingerprint_is_of_every_pixel_their_order_and_all_that_is_known():
    source = numbered(6)
    first, place = source.images, source.condition["place"]
    label = source.condition["label"]
    darker, farther = first.clone(), place.clone()
    darker[3] = 0
    farther[5, 1] = 0
    others = [
        source,
        InMemory(darker, source.condition),
        InMemory(first.flip(0), source.condition),
        InMemory(first[:5], {"label": label[:5], "place": place[:5]}),
        InMemory(first),
        InMemory(first, {"label": label}),
        InMemory(first, {"label": label.flip(0), "place": place}),
        InMemory(first, {"label": label, "place": farther}),
    ]
    assert len({other.fingerprint() for other in others}) == len(others)
    same = InMemory(first.clone(), dict(reversed(source.condition.items())))
    assert same.fingerprint() == source.fingerprint()
    strided = torch.cat([first, first], dim=1)[:, :1]  # the same pixels, farther apart in memory
    assert InMemory(strided, source.condition).fingerprint() == source.fingerprint()


# On demand


def in_turn(i: int) -> Tensor:
    return torch.arange(4 * i, 4 * i + 4) % 20


def test_ahead_fetches_each_batch_once_and_by_another_thread():
    source = OnDemand(numbered(20))
    ahead = Ahead(source, in_turn, batches=5)
    for i in range(5):
        assert ahead.take(i).images.flatten().tolist() == in_turn(i).tolist()
    ahead.close()
    assert source.asked == [in_turn(i).tolist() for i in range(5)]  # none that does not come
    assert source.threads == {"MainThread", "images_0"}


def test_ahead_gives_the_batch_that_is_asked_for_in_any_order():
    ahead = Ahead(OnDemand(numbered(20)), in_turn, batches=10)
    for i in (3, 0, 1, 1, 7, 2):
        assert ahead.take(i).images.flatten().tolist() == in_turn(i).tolist()


def test_an_error_of_a_source_is_raised_at_the_batch_that_it_is_of():
    source = OnDemand(numbered(20))

    def which(i: int) -> Tensor:
        return in_turn(i) + (100 if i == 2 else 0)

    ahead = Ahead(source, which, batches=5)
    assert [len(ahead.take(i).images) for i in (0, 1)] == [4, 4]
    with pytest.raises(IndexError):
        ahead.take(2)


@pytest.fixture
def train(tmp_path, tiny, quick, digits):
    """(source of the digits, name) -> the sha256 of the weights that it trains."""

    def trained(source: Images, name: str, stops: tuple[int, ...] = ()) -> str:
        config = replace(quick, save_every=0.0, flip=True, label_dropout=0.3)
        dataset = replace(digits, train=source)
        for stop in (*stops, config.iterations):
            torch.manual_seed(0)
            denoiser = build(replace(tiny, dropout=0.1), DenoiserConfig(), KINDS, "fp32")
            method = one_network(denoiser, Denoising(cosine(8).to(this_device())))
            loop = fit(method, dataset, config, tmp_path / name)
            for line in loop:
                if stop < config.iterations and line.iteration >= stop:
                    break
            loop.close()
        return checkpoint.weights_sha256(denoiser.state_dict())

    return trained


def test_images_made_on_demand_train_to_the_same_bits_as_the_same_images_in_memory(train, digits):
    source = OnDemand(digits.train)
    expected = train(digits.train, "memory")
    assert train(source, "demand") == expected
    assert "images_0" in source.threads
    fetched = Counter(map(tuple, source.asked))
    assert max(fetched.values()) == 1
    assert len(fetched) == 30
    assert train(OnDemand(digits.train), "stopped", stops=(10, 20)) == expected


def drawn(dataset: Dataset, config, kinds=None) -> list:
    batches = Batches(dataset, config, Accelerator(cpu=True), kinds)
    return [batches.draw(i) for i in (0, 1, 2, 9, 4)]


def test_batches_are_the_same_from_memory_and_on_demand(digits, quick):
    kinds = KINDS | {"guidance": Guidance(0.5, 3.0)}
    config = replace(quick, flip=True)
    memory = drawn(digits, config, kinds)
    demand = drawn(replace(digits, train=OnDemand(digits.train)), config, kinds)
    for mine, other in zip(memory, demand, strict=True):
        for part in ("x0", "eps", "level"):
            assert torch.equal(getattr(mine, part), getattr(other, part))
        assert mine.condition.keys() == other.condition.keys() == {"label", "guidance"}
        assert all(torch.equal(mine.condition[k], other.condition[k]) for k in mine.condition)
        assert mine.seed == other.seed


# What a batch tells the network


def test_a_batch_tells_what_is_known_of_its_own_images_but_for_the_share_that_is_dropped(
    digits, quick
):
    config = replace(quick, batch_size=512, label_dropout=0.25)
    by_image = {}
    for image, label in zip(digits.train.images, digits.train.condition["label"], strict=True):
        by_image.setdefault(image.numpy().tobytes(), set()).add(int(label))
    dropped = 0
    for batch in drawn(digits, config, KINDS):
        images = digits.codec.decode(batch.x0)
        for image, label in zip(images, batch.condition["label"].tolist(), strict=True):
            dropped += label == 10
            assert label == 10 or label in by_image[image.numpy().tobytes()]
    assert dropped / (5 * 512) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2560) ** 0.5)


def test_a_network_without_conditions_is_told_nothing_and_sees_the_same_images(digits, quick):
    plain, labelled = drawn(digits, quick), drawn(digits, quick, KINDS)
    assert [batch.condition for batch in plain] == [None] * 5
    for mine, other in zip(plain, labelled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:3], other[:3], strict=True))


def test_guidance_weights_are_drawn_over_their_range(digits, quick):
    kinds = KINDS | {"guidance": Guidance(0.5, 3.0)}
    batches = drawn(digits, replace(quick, batch_size=512), kinds)
    weights = torch.cat([batch.condition["guidance"] for batch in batches])
    assert weights.min() >= 0.5
    assert weights.max() <= 3
    assert weights.mean().item() == pytest.approx(1.75, abs=5 * 2.5 / (12 * 2560) ** 0.5)


@pytest.mark.parametrize(
    ("kinds", "name"),
    [(KINDS, "label"), ({"guidance": Guidance(1, 2)}, "label"), ({"colour": Label(2)}, "colour")],
)
def test_data_without_what_the_network_takes_are_refused_by_name(digits, quick, kinds, name):
    plain = replace(digits, train=InMemory(digits.train.images), kinds={})
    with pytest.raises(UserError, match=f"takes a {name} for each image, but digits has none"):
        drawn(plain, quick, kinds)


# Dropout


def test_two_passes_of_one_batch_have_the_same_dropout_masks_and_another_batchs_differ(
    tiny, quick, digits
):
    denoiser = build(replace(tiny, dropout=0.5), DenoiserConfig(), {}, "fp32").train()
    for parameter in denoiser.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    first, second, *_ = drawn(digits, quick)
    t = torch.full((len(first.x0),), 0.8, dtype=torch.float64)

    def passed(batch) -> Tensor:
        torch.rand(7)  # whatever else draws random numbers meanwhile
        return denoiser(first.x0, t, dropout=batch.dropout())

    assert torch.equal(passed(first), passed(first))
    assert not torch.allclose(passed(first), passed(second))
    denoiser.eval()
    assert torch.equal(passed(first), passed(second))


def test_every_part_of_the_network_drops_by_the_batchs_own_generator(tiny, quick, digits):
    """What else was drawn of torch's generator decides nothing."""
    denoiser = build(replace(tiny, dropout=0.5), DenoiserConfig(), {}, "fp32").train()
    for parameter in denoiser.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    batch, t = drawn(digits, quick)[0], torch.tensor(0.8, dtype=torch.float64)
    torch.manual_seed(1)
    first = denoiser(batch.x0, t, dropout=batch.dropout())
    torch.manual_seed(2)
    assert torch.equal(denoiser(batch.x0, t, dropout=batch.dropout()), first)


def test_a_dropped_share_is_zero_and_the_rest_keeps_the_mean():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, 4, 0.25).train()
    seen = []
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, embedding = torch.randn(64, 8, 8, 8), torch.randn(64, 4)
    block(x, embedding)
    block.eval()(x, embedding)
    dropped, kept = seen[0] == 0, seen[0] != 0
    share = dropped.double().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / x.numel()) ** 0.5)
    torch.testing.assert_close(seen[0][kept], seen[1][kept] / 0.75)
