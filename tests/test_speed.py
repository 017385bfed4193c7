"""What benchmarks.speed and .peer time is the same work, and a CUDA graph's memory may be reused."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parts import (
    ALL,
    SAMPLING,
    TRAINING,
    absent,
    endless,
    sampling_models,
    training,
    untrained,
    variants,
)
from benchmarks.rounds import rounds
from benchmarks.speed import table
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.images import InMemory
from diffusion.noise import Noise
from diffusion.samplers import SOLVERS, sample
from diffusion.schedules import linear_beta, respace
from diffusion.training import Average
from eval.measure import stream

CPU = torch.device("cpu")
# the parts that leave the rounding of the network's passes as it is
EXACT = frozenset(TRAINING) - {"bf16", "channels_last", "torch.compile"}


@pytest.fixture(scope="session")
def unlabelled(digits):
    return replace(digits, train=InMemory(digits.train.images), kinds={})


@pytest.fixture
def model(tiny, unlabelled):
    return untrained(tiny, unlabelled, "fp32")


def weights(model, objective: str, dataset, config, on, path) -> Tensor:
    """All of a student's after 10 steps."""
    student, loop = training(model, objective, dataset, config, on, path / "state")
    *_, last = islice(loop, 2 if "one wait a line" in on else 10)
    loop.close()
    assert last.iteration == 10
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("objective", ["denoising", "cd, heun"])
def test_a_training_with_any_part_off_makes_the_same_weights(
    model, unlabelled, quick, tmp_path, objective
):
    begun = torch.cat([parameter.flatten() for parameter in model.denoiser.parameters()])
    arguments = (model, objective, unlabelled, endless(quick))
    expected = weights(*arguments, EXACT, tmp_path)
    assert (expected - begun).abs().max() > 0.01
    # elsewhere than on a CPU a DataLoader's images are others
    elsewhere = frozenset() if model.device == CPU else {"resident data"}
    for part in EXACT - elsewhere:
        found = weights(*arguments, EXACT - {part}, tmp_path)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=part)


def test_a_looped_average_is_the_fused_one(tiny, unlabelled):
    student = untrained(tiny, unlabelled).denoiser
    for parameter in student.parameters():
        parameter.copy_(torch.randn_like(parameter))
    kept = [untrained(tiny, unlabelled).denoiser for _ in range(2)]
    for module, fused in zip(kept, (True, False), strict=True):
        Average(module, lambda done, progress: 0.9, fused).follow(student, 1)
    for a, b in zip(*(module.parameters() for module in kept), strict=True):
        torch.testing.assert_close(a, b)


def test_images_are_the_same_whatever_is_on(model):
    """But for rounding, of which bf16 has more: each is near the whole's."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random).to(parameter.device))
    models = sampling_models(model, variants(SAMPLING, absent(CPU, compiled=False)))
    plan = model.plan(4, "ddim")
    images = {name: m.x0(plan, 0, stream.indices(m, 0, 8)[0]) for name, m in models.items()}
    assert images.keys() == {ALL, "without bf16"}
    error = (images[ALL] - images["without bf16"]).abs().max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("parts", [TRAINING, SAMPLING])
def test_a_variant_lacks_what_it_names_and_what_that_carries(parts):
    found = variants(parts, off={})
    assert found.pop(ALL) == frozenset(parts)
    missing = {name: frozenset(parts) - on for name, on in found.items()}
    assert missing == {f"without {part}": {part, *more} for part, more in parts.items()}


def test_what_a_cpu_has_not_is_neither_timed_nor_shown_as_a_figure():
    off = absent(CPU, compiled=False)
    timed = variants(SAMPLING, off)
    assert timed.keys() == {ALL, "without bf16"}
    cell = {"images_per_second": 5.0, "ratio": 1.0}
    shown = table("sampling", SAMPLING, off, {"1 step": dict.fromkeys(timed, cell)})
    rows = dict(zip(*(list(column.cells) for column in shown.columns), strict=True))
    assert {name for name, text in rows.items() if text == "-"} == {f"without {p}" for p in off}
    assert all(reason in shown.caption for reason in off.values())


def test_rounds_reverse_their_order_and_leave_the_first_out():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = rounds(calls, 3, CPU)
    assert "".join(order) == "abccbaabccba"
    assert {name: len(took) for name, took in seconds.items()} == dict.fromkeys("abc", 3)


class Overwriting(nn.Module):
    """A network whose output lies where its last one lay, as a CUDA graph's does."""

    def __init__(self, learned_variance: bool, reused: bool):
        super().__init__()
        self.learned_variance, self.reused, self.output = learned_variance, reused, None
        self.weight = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, condition=None) -> Tensor:
        output = (self.weight * x + t[:, None, None, None]).tanh()
        if self.learned_variance:
            output = torch.cat([output, output.sigmoid()], dim=1)
        if self.reused and self.output is not None:
            return self.output.copy_(output)
        self.output = output
        return output


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_sampler_reads_nothing_that_the_next_call_overwrites(sampler, prediction):
    learned = sampler == "ancestral-learned"
    config = DenoiserConfig(prediction, learned)
    angles = respace(linear_beta(), 6)

    def images(reused: bool) -> Tensor:
        noise = Noise(0, torch.arange(4), (1, 8, 8))
        denoiser = Denoiser(Overwriting(learned, reused), config=config)
        return sample(denoiser, noise, sampler, angles)

    assert torch.equal(images(reused=True), images(reused=False))


# The peer


@pytest.fixture
def peer():
    pytest.importorskip("diffusers")
    from benchmarks import peer

    return peer


@pytest.mark.parametrize("data", ["digits", "fashion-mnist", "cifar10"])
@pytest.mark.parametrize("small", [False, True])
def test_the_peers_network_has_our_number_of_parameters(peer, data, small):
    from diffusion.model import build
    from teachers.presets import preset

    net = preset(data).net
    net = replace(net, width=32, blocks=1) if small else net
    with torch.device("meta"):
        networks = build(net, "fp32"), peer.peer_network(net)
    ours, theirs = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert theirs == pytest.approx(ours, rel=0.1)


def test_the_peers_loop_learns_in_the_precision_that_is_told(peer, tiny, unlabelled, quick):
    found = {}
    for precision in ("bf16", "fp32"):
        torch.manual_seed(0)
        unet, dtypes = peer.peer_network(tiny), set()
        unet.conv_in.register_forward_hook(
            lambda layer, inputs, output, dtypes=dtypes: dtypes.add(output.dtype)
        )
        pictures = peer.Pictures(unlabelled.train, flip=True)
        config = replace(endless(quick), precision=precision)
        losses = [*islice(peer.peer_training(unet, pictures, config, workers=0), 40)]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        found[precision] = dtypes
    assert found == {"bf16": {torch.bfloat16}, "fp32": {torch.float32}}
