import math
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from diffusion.circle import FROM_X0
from diffusion.console import UserError
from diffusion.denoiser import Denoiser, DenoiserConfig, Inward, check_prediction, guide
from diffusion.networks import UNet, UNetConfig
from diffusion.networks.unet import Attention
from diffusion.schedules import SCHEDULES
from teachers.presets import PRESETS
from tests.analytic import BIMODAL, SKEWED, normal, random_denoiser, random_unet

close = torch.testing.assert_close
ANGLES = torch.tensor([1e-4, 0.3, 0.8, math.pi / 2], dtype=torch.float64)


def test_an_untrained_denoiser_is_the_exact_one_of_unit_variance_data():
    x_t = normal(0, 4, 1, 8, 8)
    expected = ANGLES.cos().float()[:, None, None, None] * x_t
    assert torch.equal(Denoiser(UNet(UNetConfig()))(x_t, ANGLES), expected)


def test_at_angle_0_the_denoiser_is_the_identity_whatever_its_weights():
    x, denoiser = normal(0, 4, 1, 8, 8), Denoiser(random_unet())
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(denoiser(x, zero), x)
    assert not torch.equal(denoiser(x, zero + 0.1), x)


def test_at_a_right_angle_the_denoiser_is_minus_its_velocity():
    x, denoiser = normal(0, 4, 1, 8, 8), Denoiser(random_unet())
    t = torch.full((4,), math.pi / 2, dtype=torch.float64)
    close(denoiser(x, t), -denoiser.net(x, t.float()))


def test_an_angle_for_all_images_is_that_angle_for_each():
    x_t, denoiser = normal(0, 4, 1, 8, 8), Denoiser(random_unet())
    assert torch.equal(denoiser(x_t, ANGLES[1]), denoiser(x_t, ANGLES[1].expand(4)))


class Predicting(torch.nn.Module):
    """The exact denoiser of some data, as a network that predicts v, x0 or eps."""

    def __init__(self, data, prediction: str):
        super().__init__()
        self.data, self.prediction = data, prediction

    def forward(self, x_t, t, condition=None):
        x0 = self.data(x_t.double(), t)
        return FROM_X0[self.prediction](x_t.double(), x0, t).float()


@pytest.mark.parametrize("data", [SKEWED, BIMODAL], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_networks_of_one_function_give_one_x0_whatever_they_predict(data, prediction):
    t = torch.tensor([0.1, 0.3, 0.8, 1.5], dtype=torch.float64)
    x_t = normal(0, 4, 1, 8, 8)
    exact = data(x_t.double(), t.float()).float()
    denoiser = Denoiser(Predicting(data, prediction), config=DenoiserConfig(prediction))
    close(denoiser(x_t, t), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("t", [0.5, 1.2, 1.5])
def test_an_error_of_eps_counts_tan_t_times_in_x0_and_one_of_v_at_most_once(t):
    x_t, t = normal(0, 4, 1, 8, 8), torch.tensor(t, dtype=torch.float64)
    for prediction, expected in (("eps", t.tan()), ("v", t.sin()), ("x0", torch.tensor(1.0))):
        denoiser = random_denoiser(prediction=prediction)
        before = denoiser(x_t, t)
        denoiser.net.head.bias.data += 0.1
        moved = (denoiser(x_t, t) - before).abs()
        close(moved.double(), (0.1 * expected.double()).expand_as(moved), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_eps_is_refused_and_only_schedules_that_end_at_pure_noise(schedule, prediction):
    angles = SCHEDULES[schedule]()
    if prediction == "eps" and schedule in ("cosine", "sigmoid"):
        with pytest.raises(UserError, match="--prediction eps needs a schedule that ends before"):
            check_prediction(prediction, angles)
    else:
        check_prediction(prediction, angles)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "multipliers"),
    [(8, (1, 2)), (16, (1,)), (28, (1, 2, 2)), (32, (1, 1, 2)), (64, (1, 1, 1, 2))],
)  # fmt: skip
def test_a_denoiser_keeps_the_shape_and_type_of_images_of_every_size(size, channels, multipliers):
    config = {"width": 8, "blocks": 1, "attention": (8, 7)}
    net = random_unet(size=size, channels=channels, multipliers=multipliers, **config)
    x_t = normal(0, 2, channels, size, size)
    x0 = Denoiser(net)(x_t, ANGLES[:2])
    assert (x0.shape, x0.dtype) == (x_t.shape, torch.float32)
    assert x0.isfinite().all()


def test_an_images_x0_does_not_depend_on_the_rest_of_its_batch():
    denoiser = random_denoiser(num_classes=3)
    x_t, label = normal(0, 4, 1, 8, 8), torch.tensor([0, 2, 3, 1])
    together = denoiser(x_t, ANGLES, {"label": label})
    for i in range(4):
        alone = denoiser(x_t[i : i + 1], ANGLES[i : i + 1], {"label": label[i : i + 1]})
        close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_no_label_is_the_class_beyond_the_last_and_every_class_is_another_image():
    denoiser = random_denoiser(num_classes=3)
    x_t = normal(0, 1, 1, 8, 8).expand(4, -1, -1, -1)
    by_class = denoiser(x_t, ANGLES[2], {"label": torch.arange(4)})
    close(denoiser(x_t, ANGLES[2]), by_class[3:].expand(4, -1, -1, -1), rtol=1e-4, atol=1e-5)
    assert torch.pdist(by_class.flatten(1)).min() > 0.01


def test_bf16_passes_give_float32_images_near_those_of_fp32():
    x_t, net = normal(0, 4, 1, 8, 8), random_unet()
    exact, rounded = (Denoiser(net, precision)(x_t, ANGLES) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_the_weights_layout_changes_no_image():
    x_t, layouts = normal(0, 4, 1, 8, 8), (torch.contiguous_format, torch.channels_last)
    rows, pixels = (Denoiser(random_unet(), layout=layout)(x_t, ANGLES) for layout in layouts)
    close(rows, pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [24, 64, 128])
def test_attention_is_torchs_multi_head_attention_over_pixels(channels):
    attention, x = Attention(channels), normal(0, 2, channels, 4, 4)
    for seed, parameter in enumerate(attention.parameters()):
        parameter.data = normal(seed, *parameter.shape) / 8
    pixels = attention.norm(x).flatten(2).permute(2, 0, 1)
    mixed, _ = F.multi_head_attention_forward(
        pixels, pixels, pixels, channels, max(1, channels // 64),
        attention.qkv.weight[..., 0, 0], attention.qkv.bias, None, None, False, 0.0,
        attention.out.weight[..., 0, 0], attention.out.bias,
    )  # fmt: skip
    close(attention(x), x + mixed.permute(1, 2, 0).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_attention_is_at_the_chosen_resolutions_on_the_way_down_and_up():
    net, seen = UNet(UNetConfig(size=16, multipliers=(1, 2, 2), attention=(16, 4))), []
    for layer in net.modules():
        if isinstance(layer, Attention):
            layer.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-1]))
    net(normal(0, 1, 1, 16, 16), torch.ones(1))
    assert seen == [16] * 2 + [4] * 2 + [4] * 2 + [4] * 3 + [16] * 3


@pytest.mark.parametrize(
    ("millions", "config"),
    [
        (0.3, UNetConfig(width=16)),
        (7, UNetConfig(size=28, width=64, multipliers=(1, 2, 2), attention=(7,))),
        (38, UNetConfig(3, 32, 128, (1, 2, 2, 2), attention=(16,))),
        (60, UNetConfig(3, 64, 160, (1, 2, 2, 2), attention=(16, 8))),
    ],
)
def test_a_network_has_0_3_to_60_million_weights_by_configuration_alone(millions, config):
    with torch.device("meta"):
        net = UNet(config)
        velocity = net(torch.empty(2, config.channels, config.size, config.size), torch.ones(2))
    assert velocity.shape == (2, config.channels, config.size, config.size)
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert weights / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize("width", [8, 24, 40, 72, 88, 136, 200])
def test_every_width_that_is_a_multiple_of_8_makes_a_network(width):
    with torch.device("meta"):
        net = UNet(UNetConfig(width=width, multipliers=(1, 2, 4), attention=(8, 4)))
        assert net(torch.empty(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)


def with_variance(denoiser: Denoiser, seed: int = 5) -> Denoiser:
    """The denoiser with a head that puts out a share as well, of random weights."""
    net, kinds = denoiser.net, denoiser.kinds
    channels = net.config.channels
    wider = UNet(net.config, 2 * channels, kinds)
    wider.load_state_dict(net.state_dict() | dict(wider.head.named_parameters(prefix="head")))
    for mine, theirs in zip(wider.head.parameters(), net.head.parameters(), strict=True):
        mine.data = torch.cat([theirs, normal(seed, *mine[channels:].shape)]).detach()
    config = replace(denoiser.config, learned_variance=True)
    return Denoiser(wider, config=config, kinds=kinds)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_a_network_that_learns_its_variance_says_of_x0_what_its_first_channels_say(
    prediction, channels
):
    x_t, plain = (
        normal(0, 4, channels, 8, 8),
        random_denoiser(prediction=prediction, channels=channels),
    )
    angles = ANGLES.clamp(max=1.5)  # where eps too says something of x0
    denoiser = with_variance(plain)
    x0, share = denoiser(x_t, angles, variance=True)
    assert torch.equal(denoiser(x_t, angles), x0)
    close(x0, plain(x_t, angles))
    output = denoiser.net(x_t, angles.float())
    assert torch.equal(share, output[:, channels:])
    assert not torch.equal(share, output[:, :channels])


def test_an_untrained_network_that_learns_its_variance_is_the_other_with_a_share_of_0():
    denoisers = []
    for learns in (False, True):
        torch.manual_seed(0)
        net = UNet(UNetConfig(), outputs=1 + learns)
        denoisers.append(Denoiser(net, config=DenoiserConfig(learned_variance=learns)))
    plain, learning = (denoiser.net.state_dict() for denoiser in denoisers)
    for name in plain.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(plain[name], learning[name])
    x_t = normal(0, 4, 1, 8, 8)
    x0, share = denoisers[1](x_t, ANGLES, variance=True)
    assert torch.equal(x0, denoisers[0](x_t, ANGLES))
    assert torch.equal(share, torch.zeros_like(x_t))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance_moves_x0_and_leaves_the_share_of_the_class(weight):
    denoiser = with_variance(random_denoiser(num_classes=3))
    x_t, condition = normal(0, 4, 1, 8, 8), {"label": torch.tensor([0, 2, 3, 1])}
    weights = torch.full((4,), weight)
    guided, share = denoiser(x_t, ANGLES, condition | {"guidance": weights}, variance=True)
    plain, expected = denoiser(x_t, ANGLES, condition, variance=True)
    close(share, expected)
    close(guided, guide(plain, denoiser(x_t, ANGLES), weights))


def test_a_network_that_learns_no_variance_says_so():
    with pytest.raises(UserError, match="--learned-variance"):
        Denoiser(random_unet())(normal(0, 4, 1, 8, 8), ANGLES, variance=True)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_network_on_patches_is_one_on_the_channels_that_they_unfold_to(learned_variance):
    times = 1 + learned_variance
    whole = random_unet(3 * times, size=16, channels=3, patch=2)
    plain = UNet(UNetConfig(size=8, channels=12), 12 * times)
    plain.load_state_dict(whole.state_dict())
    x, t = normal(0, 2, 3, 16, 16), ANGLES[1:3].float()
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t), 2)
    close(whole(x, t), expected)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("patch", [0, 3, 8])
def test_patches_that_do_not_tile_the_image_are_refused(patch):
    with pytest.raises(UserError, match="patch"):
        UNetConfig(size=8, patch=patch).check()


@pytest.mark.parametrize(
    ("net", "levels"),
    [
        ({"size": 8, "multipliers": (1,), "attention": (16,)}, "8"),
        ({"size": 48, "multipliers": (1, 2, 2, 2), "attention": (12, 16)}, "48, 24, 12, 6"),
        ({"size": 28, "patch": 2, "multipliers": (1, 2), "attention": (28,)}, "14, 7"),
    ],
)
def test_attention_that_no_level_would_have_is_refused_with_the_resolutions_there_are(net, levels):
    config = UNetConfig(**net)
    missing = next(size for size in config.attention if str(size) not in levels.split(", "))
    with pytest.raises(UserError, match=f"--attention {missing} .* have {levels};"):
        config.check()


@pytest.mark.parametrize("size", [4, 8])
def test_attention_that_is_let_pass_is_built(size):
    config = UNetConfig(size=8, width=8, multipliers=(1, 2), attention=(size,))
    config.check()
    assert any(isinstance(module, Attention) for module in UNet(config).modules())


@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 2)])
def test_without_blocks_on_the_way_down_a_network_still_makes_images(multipliers):
    config = UNetConfig(size=8, width=8, multipliers=multipliers, blocks=0, attention=())
    config.check()
    assert UNet(config)(normal(0, 3, 1, 8, 8), ANGLES[:3].float()).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("data", PRESETS)
def test_the_networks_of_the_presets_have_the_attention_that_they_name(data):
    PRESETS[data].net.check()


BOUNDS = (-0.5, 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_with_bounds_x0_is_the_same_but_clamped(training):
    free = Denoiser(random_unet())
    held = random_denoiser(bounds=BOUNDS).train(training)
    held.load_state_dict(free.state_dict())
    x_t = normal(0, 4, 1, 8, 8)
    x0 = free(x_t, ANGLES)
    assert x0.min() < BOUNDS[0] < BOUNDS[1] < x0.max()
    assert torch.equal(held(x_t, ANGLES), x0.clamp(*BOUNDS))


def test_a_gradient_passes_a_bound_inwards_alone_and_a_derivative_not_at_all():
    x = torch.tensor([-2.0, -2.0, 0.3, 2.0, 2.0], requires_grad=True)
    pull = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0])
    (Inward.apply(x, *BOUNDS) * pull).sum().backward()
    assert x.grad.tolist() == [-1, 0, 1, 0, 1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones(5))
        change = forward_ad.unpack_dual(Inward.apply(dual, *BOUNDS)).tangent
    assert change.tolist() == [0, 0, 1, 0, 0]


class Constant(torch.nn.Module):
    """Predicts the x0 that it is, whatever it sees."""

    def __init__(self, x0: torch.Tensor):
        super().__init__()
        self.x0 = torch.nn.Parameter(x0)

    def forward(self, x_t, t, condition=None):
        return self.x0.expand(x_t.shape)


def constant(x0: float) -> Denoiser:
    return Denoiser(Constant(torch.tensor(x0)), config=DenoiserConfig("x0", bounds=BOUNDS))


@pytest.mark.parametrize("start", [-3.0, 0.2, 3.0])
def test_the_least_squares_of_a_clamped_x0_are_at_the_mean_from_wherever_they_start(start):
    data = torch.tensor([BOUNDS[0], BOUNDS[0], BOUNDS[1]])[:, None, None, None]
    denoiser = constant(start)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        x0 = denoiser(torch.zeros(3, 1, 1, 1), torch.tensor(1.0))
        (x0 - data).square().mean().backward()
        optimizer.step()
    close(x0.mean(), data.mean())


def test_what_is_beyond_a_bound_where_the_image_is_at_it_is_left_there():
    denoiser = constant(-0.7)
    x0 = denoiser(torch.zeros(3, 1, 1, 1), torch.tensor(1.0))
    (x0 - BOUNDS[0]).square().mean().backward()
    assert denoiser.net.x0.grad == 0
