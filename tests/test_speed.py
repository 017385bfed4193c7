"""What benchmarks time is the same work, in turns; and a CUDA graph's memory may be reused."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from benchmarks import parts, speed
from benchmarks.speed import ALL, SAMPLING, TRAINING, absent, sampling_models, training, variants
from benchmarks.subjects import endless, made_up, objectives, untrained
from benchmarks.turns import Comparison, Times, interval, summary, take_turns
from diffusion.denoiser import Denoiser, DenoiserConfig
from diffusion.model import load
from diffusion.noise import Noise
from diffusion.samplers import SOLVERS, sample
from diffusion.schedules import linear_beta, respace
from diffusion.training import Average
from eval.measure import stream
from tests.analytic import grid_batch

CPU = torch.device("cpu")
# the parts that leave the rounding of the network's passes as it is
EXACT = frozenset(TRAINING) - {"bf16", "channels_last", "torch.compile"}


@pytest.fixture
def model(tiny, digits):
    return untrained(tiny, digits, "fp32")


def weights(model, objective: str, dataset, config, on, path) -> Tensor:
    """All of a student's after 10 steps."""
    student, loop = training(model, objective, dataset, config, on, path / "state")
    *_, last = islice(loop, 2 if "one wait a line" in on else 10)
    loop.close()
    assert last.iteration == 10
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("objective", ["denoising", "cd, heun"])
def test_a_training_with_any_part_off_makes_the_same_weights(
    model, digits, quick, tmp_path, objective
):
    begun = torch.cat([parameter.flatten() for parameter in model.denoiser.parameters()])
    arguments = (model, objective, digits, endless(quick))
    expected = weights(*arguments, EXACT, tmp_path)
    assert (expected - begun).abs().max() > 0.01
    # elsewhere than on a CPU a DataLoader's images are others
    elsewhere = frozenset() if model.device == CPU else {"resident data"}
    for part in EXACT - elsewhere:
        other = weights(*arguments, EXACT - {part}, tmp_path)
        torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-4, msg=part)


def test_a_looped_average_is_the_fused_one(tiny, digits):
    student = untrained(tiny, digits).denoiser
    for parameter in student.parameters():
        parameter.copy_(torch.randn_like(parameter))
    kept = [untrained(tiny, digits).denoiser for _ in range(2)]
    for module, fused in zip(kept, (True, False), strict=True):
        Average(module, lambda done, progress: 0.9, fused).follow({"student": student}, 1)
    for a, b in zip(*(module.parameters() for module in kept), strict=True):
        torch.testing.assert_close(a, b)


def test_images_are_the_same_whatever_is_on(model):
    """But for rounding, of which bf16 has more: each is near the whole's."""
    models = sampling_models(model, variants(SAMPLING, absent(CPU, compiled=False)))
    plan = model.plan(4, "ddim")
    images = {name: m.x0(plan, 0, stream.indices(m, 0, 8)) for name, m in models.items()}
    assert images.keys() == {ALL, "without bf16"}
    error = (images[ALL] - images["without bf16"]).abs().max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("switches", [TRAINING, SAMPLING])
def test_a_variant_lacks_the_part_that_it_names_and_those_that_go_with_it(switches):
    chosen = dict(variants(switches, off={}))
    assert chosen.pop(ALL) == frozenset(switches)
    missing = {name: frozenset(switches) - on for name, on in chosen.items()}
    assert missing == {f"without {part}": {part, *more} for part, more in switches.items()}


def test_the_parts_that_a_cpu_has_not_are_named_and_not_timed(command, tmp_path, monkeypatch, tiny):
    preset = replace(speed.preset("digits"), net=tiny)
    monkeypatch.setattr(speed, "preset", lambda data: preset)
    sizes = ("--batch-size", 4, "--training-steps", 1, "--repeats", 1, "--steps", 1)
    file = tmp_path / "speed.json"
    outcome = command(speed.main, "--data", "digits", *sizes, "--out", file)
    assert outcome.code == 0, outcome
    assert all(f"not timed: {part}: {why}" in outcome.out for part, why in speed.OFF_ON_CPU.items())
    comparisons = {c["title"]: c for c in json.loads(file.read_text())["comparisons"]}
    assert comparisons.keys() == {
        *(f"training, {name}" for name in speed.OBJECTIVES),
        *(
            f"{sampler}, steps: 1, batch: {n}"
            for sampler in ("ddim", "consistency")
            for n in (1, 4)
        ),
    }
    timed = comparisons["ddim, steps: 1, batch: 4"]["seconds"]
    assert {name: len(seconds) for name, seconds in timed.items()} == {ALL: 1, "without bf16": 1}


def test_turns_reverse_their_order_and_leave_the_first_round_out():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = take_turns(calls, 3, CPU)
    assert "".join(order) == "abccbaabccba"
    assert {name: len(rounds) for name, rounds in times.seconds.items()} == dict.fromkeys("abc", 3)


def test_a_drift_that_slows_all_alike_moves_no_ratio():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    times = Times({"a": drift, "b": [3 * seconds for seconds in drift]})
    assert times.ratio("b", "a") == (3, 3, 3)
    text = summary(Comparison("both", dict.fromkeys("ab"), images=8), times)
    assert "0.333 (0.333–0.333) times as many" in text
    assert "2 images/s" in text


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples():
    random = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 30, generator=random).pow(2).tolist()  # whose median is 1/4
    bounds = [interval(sample)[1:] for sample in samples]
    assert 0.94 < sum(low <= 0.25 <= high for low, high in bounds) / 2000 < 0.98
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    "name", ["samplers", "training-step", "evaluation", "frechet-distance", "checksums"]
)
def test_each_part_is_timed_beside_the_bare_work_in_it(name, command, teacher, monkeypatch):
    sizes = {
        "samplers": (teacher, "--steps", 2, "--batch-size", 4),
        "training-step": (teacher, "--batch-size", 4),
        "evaluation": (
            *(teacher, "--steps", 2, "--num-images", 40, "--batch-size", 20),
            *("--features", "random"),
        ),
        "frechet-distance": ("--dims", 4),
        "checksums": (teacher, "--megabytes", 1, "--num-images", 40),
    }
    comparisons = {"training-step": 10, "checksums": 3}.get(name, 1)
    calls = []
    monkeypatch.setattr("benchmarks.turns.timed", lambda call, device: (calls.append(call()), 1.0))
    outcome = command(parts.main, name, *sizes[name], "--repeats", 1)
    assert outcome.code == 0, outcome
    assert outcome.out.count("1.000 (1.000–1.000) times as long") == len(calls) / 2 - comparisons
    if name == "frechet-distance":
        theirs, ours, known = calls[:3]
        assert ours == known == pytest.approx(theirs, rel=1e-6)


def test_the_bare_passes_of_a_step_are_those_that_the_step_makes(teacher):
    model = load(teacher)
    student = deepcopy(model.denoiser).requires_grad_(True).train()
    batch = grid_batch(4, *model.shape)
    runs = []
    for net in (model.denoiser.net, student.net):
        net.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for subject in objectives(model, student):
        both = {}
        for name, call in parts.step_calls(subject, model, student, batch).items():
            runs.clear()
            call()
            both[name] = sorted(runs)
        assert both["step"] == both["passes"], subject.name


def test_made_up_images_are_of_many_levels_and_all_different():
    images = made_up(3, 16, 44)
    train, test = images.train.images, images.test.images
    assert (train.shape, test.shape) == ((40, 3, 16, 16), (4, 3, 16, 16))
    assert len(train.flatten(1).unique(dim=0)) == 40
    assert len(train.unique()) > 200


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
        networks = build(net, DenoiserConfig(), {}, "fp32"), peer.peer_network(net)
    ours, theirs = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert theirs == pytest.approx(ours, rel=0.1)


def test_the_peers_loop_learns_in_the_precision_of_the_config(peer, tiny, digits, quick):
    seen = {}
    for precision in ("bf16", "fp32"):
        torch.manual_seed(0)
        unet, dtypes = peer.peer_network(tiny), set()
        unet.conv_in.register_forward_hook(
            lambda layer, inputs, output, dtypes=dtypes: dtypes.add(output.dtype)
        )
        pictures = peer.Pictures(digits.train.images, flip=True)
        config = replace(endless(quick), precision=precision)
        losses = [*islice(peer.peer_training(unet, pictures, config, workers=0), 40)]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        seen[precision] = dtypes
    assert seen == {"bf16": {torch.bfloat16}, "fp32": {torch.float32}}


def test_both_loops_train_as_many_steps_a_call(peer, tiny, quick):
    config = replace(endless(quick), batch_size=4, log_every=3)
    for comparison in peer.training(tiny, config):
        theirs, ours = (comparison.calls[name] for name in ("diffusers", "ours"))
        for done in (3, 6):
            assert len(theirs()) == 3
            assert ours().iteration == done
        assert comparison.images == 12


def test_the_peer_is_timed_by_its_command(peer, command, tmp_path):
    sizes = ("--width", 16, "--blocks", 1, "--batch-size", 4, "--training-steps", 1)
    steps = ("--ancestral-steps", 2, "--ddim-steps", 2, "--repeats", 1, "--precision", "fp32")
    file = tmp_path / "peer.json"
    outcome = command(peer.main, "--data", "digits", *sizes, *steps, "--out", file)
    assert outcome.code == 0, outcome
    titles = [comparison["title"] for comparison in json.loads(file.read_text())["comparisons"]]
    assert titles == ["training", "ancestral, steps: 2", "ddim, steps: 2"]
    assert outcome.out.count("times as many") == 3
