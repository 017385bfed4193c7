"""The networks beside the U-Net: the DiT, and a torch module of the user's own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion import networks
from diffusion.condition import Guidance, Kinds, Label, Text
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.denoiser import Denoiser
from diffusion.dry import check_output
from diffusion.model import load
from diffusion.networks import DiT, DiTConfig, ModuleConfig, UNetConfig, module
from diffusion.networks.dit import Attention, positions
from distill import cd, ect, progressive, scm
from distill import guidance as guided
from distill.scm import derivative
from eval import compare
from students import generate
from teachers import ddpm
from teachers.presets import DITS, PRESETS
from tests.analytic import normal, random_unet

close = torch.testing.assert_close
SHAPE = DiTConfig(channels=3, size=8, width=16, depth=3, heads=2, patch=2)
KINDS = {"label": Label(3), "guidance": Guidance(1, 4), "text": Text(5, 6, "a encoder", "0" * 64)}
TEXT = normal(7, 3, 5, 6)
CONDITION = {"label": torch.tensor([0, 1, 2]), "guidance": torch.tensor([1.5, 2, 4]), "text": TEXT}
X, T = normal(0, 3, 3, 8, 8), torch.tensor([1e-3, 0.8, 1.57])


def random_dit(kinds: Kinds | None = None, shape: DiTConfig = SHAPE, outputs: int = 3) -> DiT:
    """A DiT without the zeros that it starts with."""
    net = DiT(shape, outputs, kinds)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net.eval()


# The DiT


def test_a_new_dit_predicts_0_and_its_blocks_leave_the_tokens_as_they_are():
    net = DiT(SHAPE, kinds=KINDS)
    assert not net(X, T, CONDITION).any()
    tokens, embedding = normal(1, 3, 16, 16), normal(2, 3, 16)
    for block in net.blocks:
        assert torch.equal(block(tokens, embedding, net.text(TEXT, 3)), tokens)
    random = random_dit(KINDS).blocks[0]
    assert (random(tokens, embedding, net.text(TEXT, 3)) - tokens).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attention_is_its_formula_head_by_head(dtype):
    """Vaswani et al. 2017, eq. 1, token by token; bfloat16 takes plain products on a CPU."""
    torch.manual_seed(0)
    layer, error = Attention(6, heads=2).to(dtype), {torch.float64: 1e-12, torch.bfloat16: 0.03}
    tokens = 3 * normal(1, 2, 4, 6, dtype=dtype)
    queries, keys, values = layer.qkv(tokens).double().chunk(3, dim=-1)
    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for b, n, head in torch.cartesian_prod(*map(torch.arange, (2, 4, 2))).tolist():
        part = slice(3 * head, 3 * head + 3)
        weights = torch.stack([queries[b, n, part] @ key / 3**0.5 for key in keys[b, :, part]])
        expected[b, n, part] = weights.exp() / weights.exp().sum() @ values[b, :, part]
    expected = F.linear(expected, layer.out.weight.double(), layer.out.bias.double())
    close(layer(tokens).double(), expected, rtol=0, atol=error[dtype])


def test_positions_are_sines_and_cosines_of_row_and_column():
    made = positions(side=3, width=8).reshape(3, 3, 8)
    for row in range(3):
        for column in range(3):
            angles = torch.tensor([row, row / 100, column, column / 100])
            sines, cosines = angles.sin().chunk(2), angles.cos().chunk(2)
            expected = torch.cat([sines[0], cosines[0], sines[1], cosines[1]])
            close(made[row, column], expected)


def test_a_patchs_prediction_depends_on_the_patches_around_it_and_on_where_it_is():
    net = random_dit()
    moved = X.roll((2, 2), (2, 3))
    assert (net(moved, T) - net(X, T).roll((2, 2), (2, 3))).abs().max() > 0.01
    other = X.clone()
    other[:, :, :2, :2] += 1
    assert (net(other, T) - net(X, T))[:, :, 2:, 2:].abs().amax((1, 2, 3)).min() > 1e-3
    net.positions.zero_()  # without them it sees a set of patches
    close(net(moved, T), net(X, T).roll((2, 2), (2, 3)))


def test_every_condition_changes_the_output_and_one_that_is_absent_is_as_its_null():
    net = random_dit(KINDS)
    nothing = net(X, T)
    null = {name: kind.null(CONDITION[name]) for name, kind in KINDS.items()}
    close(net(X, T, null), nothing)
    for name in KINDS:
        only = net(X, T, {name: CONDITION[name]})
        close(net(X, T, null | {name: CONDITION[name]}), only)
        assert (only - nothing).abs().amax((1, 2, 3)).min() > 1e-3
    assert (net(X, T + 0.1) - nothing).abs().amax((1, 2, 3)).min() > 1e-3


def test_padding_and_the_order_of_padding_change_nothing_but_a_word_does():
    net = random_dit(KINDS)
    padded = torch.cat([TEXT, torch.zeros(3, 4, 6)], 1)
    between = padded[:, [0, 5, 1, 6, 2, 3, 7, 4, 8]]
    made = net(X, T, {"text": TEXT})
    close(net(X, T, {"text": padded}), made)
    close(net(X, T, {"text": between}), made)
    fewer = TEXT.clone()
    fewer[0, 3] = 0
    changed = (net(X, T, {"text": fewer}) - made).abs().amax((1, 2, 3))
    assert changed[0] > 1e-4 > 1e-6 > changed[1:].max()


@pytest.mark.parametrize("names", [(), ("label", "guidance"), ("text",)], ids=str)
def test_its_derivative_is_its_central_difference(names):
    kinds = {name: KINDS[name] for name in names}
    net = random_dit(kinds, replace(SHAPE, dropout=0.3)).double().train()
    condition = {name: CONDITION[name] for name in names}
    if "text" in condition:
        condition["text"] = TEXT.double() * torch.tensor([0, 1, 1])[:, None, None]
    x, t = X.double(), T.double()
    dx, dt = normal(1, *X.shape, dtype=torch.float64), torch.tensor([1.0, -0.5, 2.0]).double()

    def call(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same masks every time
        return net(x, t, condition)

    value, change = derivative(call, (x, t), (dx, dt))
    h = 2e-6
    with torch.no_grad():
        difference = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
        close(value, call(x, t))
    close(change, difference, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_makes_and_derives_about_the_same():
    half, full = (Denoiser(random_dit(KINDS), each, kinds=KINDS) for each in ("bf16", "fp32"))
    close(half(X, T, CONDITION), full(X, T, CONDITION), rtol=0, atol=0.1)
    made = [
        derivative(lambda x, t, f=f: f(x, t, CONDITION), (X, T), (X, torch.ones(3)))[1]
        for f in (half, full)
    ]
    error = (made[0] - made[1]).square().mean() / made[1].square().mean()
    assert error.sqrt() < 0.1


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"patch": 3}, "size must be divisible by --patch 3 in a DiT, got 8"),
        ({"heads": 3}, "--width must be divisible by --heads 3 in a DiT, got 16"),
        ({"width": 18, "heads": 1}, "--width must be a multiple of 4, from 4 to 65536, got 18"),
        ({"depth": 0}, "--depth must be from 1 to 1000, got 0"),
    ],
    ids=str,
)
def test_a_shape_that_no_dit_has_is_refused(shape, words):
    with pytest.raises(UserError, match=words):
        replace(SHAPE, **shape).check()


def test_a_dits_shape_goes_through_json_and_back():
    described = json.loads(json.dumps(networks.to_json(SHAPE)))
    assert described["name"] == "dit"
    assert networks.from_json(described) == SHAPE


FOLDERS = [("some/folder", size, channels) for size in (None, 17, 64) for channels in (1, 3)]


@pytest.mark.parametrize(
    ("data", "size", "channels"),
    [*((data, None, 3) for data in PRESETS), ("emoji", 64, 3), *FOLDERS],
)
def test_every_dataset_has_a_dit_of_its_images_in_no_more_patches_than_usual(data, size, channels):
    unet, dit = (ddpm.Options.default(data, size, channels, net).net for net in ("unet", "dit"))
    assert (dit.channels, dit.size) == (unet.channels, unet.size)
    dit.check()
    usual = DITS.get(data, DITS["folder"])
    assert dit.size // dit.patch <= usual.size // usual.patch
    assert unet == ddpm.preset(data, size, channels).net


QUICK = FitConfig(iterations=20, batch_size=32, learning_rate=2e-3, warmup=5, precision="fp32")
COMPARE = "--no-long --no-times --num-images 80 --features random --likelihood 0 --steps 2"
TINY = DiTConfig(width=16, depth=2, heads=2)


def compared(run: Path, command, *arguments) -> set[str]:
    """The methods in the table of a folder of runs."""
    done = command(compare.main, run, *COMPARE.split(), *arguments)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (run / "compare" / "results.jsonl").open()]
    return {line["method"] for line in lines if "method" in line}


def test_a_dit_is_taught_halved_and_distilled_by_every_method_and_compared(tmp_path, command):
    teacher = tmp_path / "teacher"
    options = ddpm.Options(net=TINY, fit=QUICK, num_classes=10, out=teacher)
    ddpm.train_teacher(replace(options, denoiser=replace(options.denoiser, learned_variance=True)))
    progressive.distill(progressive.Options(teacher, start_steps=4, rounds=(2,), fit=QUICK))
    loss = cd.Loss(num_angles=4, frechet=0.1)
    cd.distill(cd.Options(teacher, loss=loss, out=tmp_path / "cd", fit=QUICK))
    ect.distill(ect.Options(teacher, out=tmp_path / "ect", fit=QUICK))
    scm.distill(scm.Options(teacher, out=tmp_path / "scm", fit=QUICK))
    guided.distill(guided.Options(teacher, out=tmp_path / "guided", fit=QUICK))
    for run in ("teacher", "progressive/0002", "cd", "ect", "scm", "guided"):
        assert isinstance(load(tmp_path / run).denoiser.net, DiT)
    done = command(generate.main, tmp_path / "cd", "--num", 4, "--out", tmp_path / "grid.png")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    assert len(compared(tmp_path, command)) == 6


def test_the_command_offers_the_options_of_the_network_that_it_names(command, tmp_path):
    asked = {"--net dit": "--depth", "": "--multipliers", "--net module:a.b:C": "--arguments"}
    for words, flag in asked.items():
        text = command(ddpm.main, *words.split(), "--help").out
        assert [each for each in asked.values() if each in text] == [flag]
        assert "--net NAME" in text
    shape, quick = ["--width", 16, "--depth", 1], ["--iterations", 2, "--precision", "fp32"]
    arguments = ["--net", "dit", *shape, *quick]
    done = command(ddpm.main, *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    expected = replace(DITS["digits"], width=16, depth=1)
    assert load(tmp_path / "run").card.net == networks.to_json(expected)
    done = command(ddpm.main, "--net", "resnet")
    assert done.code == 2
    assert done.err.startswith("error: --net must be unet, dit")
    assert done.err.endswith(" or module:PACKAGE.MODULE:CLASS, got 'resnet'\n")


# A module of the user's own

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
DOCUMENTED = PAGE.read_text().split("```python")[1].split("```")[0]
MYNETS = (
    DOCUMENTED
    + """
print("imported", end="")

class Flat(MLP):
    def forward(self, x, t, condition=None):
        return super().forward(x, t, condition).flatten(1)

class Broken(MLP):
    def forward(self, x, t, condition=None):
        return self.first(x.flatten(1))

class Picky(MLP):
    def __init__(self, channels, size, outputs, act):
        super().__init__(channels, size, outputs)
        self.act = {"relu": nn.ReLU()}[act]

class Choosy(MLP):  # sees values, which no network has while it is built dry
    def forward(self, x, t, condition=None):
        return super().forward(x, t) if t.min().item() >= 0 else None

class Told(MLP):
    def __init__(self, channels, size, outputs, kinds):
        super().__init__(channels, size, outputs)
        self.shift = nn.ParameterDict({name: torch.zeros(1) for name in kinds})
    def forward(self, x, t, condition=None):
        shift = sum(self.shift[k] * v.float()[:, None, None, None] for k, v in condition.items())
        return super().forward(x, t) + shift

def function():
    pass
"""
)


@pytest.fixture
def mynets(tmp_path, monkeypatch):
    """A module that python can import, as from the folder that a command is started in."""
    (tmp_path / "code" / "pack").mkdir(parents=True)
    (tmp_path / "code" / "mynets.py").write_text(MYNETS)
    (tmp_path / "code" / "pack" / "age.py").write_text(MYNETS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(module, "_named", set())
    for name in ("mynets", "pack", "pack.age"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_documented_module_takes_less_than_ten_lines():
    lines = [line for line in DOCUMENTED.splitlines() if line and "import" not in line]
    assert 5 < len(lines) < 10


def test_it_is_taught_halved_distilled_generated_and_compared(mynets, command, monkeypatch):
    run = mynets / "run"
    quick = ["--iterations", "20", "--batch-size", "32", "--warmup", "5", "--precision", "fp32"]
    words = ["--net", "module:mynets:MLP", "--arguments", "width=16"]
    done = command(ddpm.main, *words, *quick, "--out", run / "teacher")
    assert done.code == 0, done.err
    shape = {"channels": 1, "size": 8, "arguments": ["width=16"]}
    model = load(run / "teacher")
    assert model.card.net == {"name": "module", "place": "mynets:MLP", **shape}
    assert model.denoiser.net.first.weight.shape == (16, 65)
    monkeypatch.setattr(module, "_named", set())  # as in the next command's process
    monkeypatch.setenv(module.VARIABLE, "other, mynets")
    teacher = ["--teacher", run / "teacher"]
    halving = ["--start-steps", "4", "--rounds", "2"]
    assert command(progressive.main, *teacher, *halving, *quick).code == 0
    from distill import consistency

    assert command(consistency.main, *teacher, "--num-angles", 4, *quick).code == 0
    arguments = [run / "progressive" / "0002", "--num", 4, "--out", mynets / "grid.png"]
    assert command(generate.main, *arguments).code == 0
    assert compared(run, command) == {"teacher", "progressive", "consistency-cd"}


def test_a_cards_module_is_not_imported_unless_the_user_allows_it(mynets, command, monkeypatch):
    fit = replace(QUICK, iterations=2)
    networks.trust("pack.age:MLP")
    options = ddpm.Options(net=ModuleConfig("pack.age:MLP"), fit=fit, out=mynets / "run")
    ddpm.train_teacher(options)
    monkeypatch.setattr(module, "_named", set())
    for name in ("pack", "pack.age"):
        monkeypatch.delitem(sys.modules, name)
    arguments = [mynets / "run", "--num", 1, "--steps", 1, "--sampler", "ddim", "--out"]
    arguments.append(mynets / "one.png")
    for allowed in ("", "age", "pac", "pack.age.more", "mynets,,torch"):
        monkeypatch.setenv(module.VARIABLE, allowed)
        done = command(generate.main, *arguments)
        assert done.code == 2
        assert "allow it by FEWSTEP_TRUST=pack.age in the environment" in done.err
        assert done.err.count("\n") == 1
        assert "imported" not in done.out
        assert not {"pack", "pack.age"} & sys.modules.keys()
    monkeypatch.setenv(module.VARIABLE, "pack")
    done = command(generate.main, *arguments)
    assert done.code == 0, done.err
    assert "imported" in done.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nowhere:MLP", "does not import from here \\(No module named 'nowhere'\\)"),
        ("mynets:ResNet", "does not import from here \\(module 'mynets' has no attribute 'ResNet'"),
        ("mynets", "expected --net module:PACKAGE.MODULE:CLASS, got module:mynets\n"),
        ("mynets:function", "is no subclass of torch.nn.Module"),
        ("mynets:MLP --arguments depth=3", "--arguments depth: mynets:MLP takes channels, size, "),
        ("mynets:MLP --arguments width", "NAME=VALUE, such as width=64, got 'width'"),
        ("mynets:Picky --arguments act=tanh", "the network fails on .*KeyError: 'tanh'"),
        ("mynets:Flat", "made \\(2, 64\\) of x \\(2, 1, 8, 8\\), t \\(2,\\), expected"),
        ("mynets:Broken", "fails on x \\(2, 1, 8, 8\\), t \\(2,\\) \\(RuntimeError: mat1 and mat2"),
    ],
)
def test_a_mistake_with_a_module_is_one_line(mynets, command, words, expected):
    done = command(ddpm.main, "--net", *f"module:{words}".split(), "--out", mynets / "run")
    assert done.code == 2
    assert done.err.count("\n") == 1
    with pytest.raises(UserError, match=expected):
        raise UserError(done.err)
    assert not (mynets / "run").exists()


def test_a_network_that_must_see_values_is_tried_in_earnest(mynets):
    networks.trust("mynets")
    config = ModuleConfig("mynets:Choosy")
    check_output(lambda: config.build(1, {}), (1, 8, 8), 1, {})
    with pytest.raises(UserError, match="expected \\(2, 2, 8, 8\\)"):
        check_output(lambda: config.build(1, {}), (1, 8, 8), 2, {})


def test_a_module_that_names_kinds_is_told_of_its_conditions_and_can_be_guided(mynets):
    networks.trust("mynets")
    out, fit = mynets / "run", replace(QUICK, iterations=2)
    options = {"fit": fit, "num_classes": 10}
    ddpm.train_teacher(ddpm.Options(net=ModuleConfig("mynets:Told"), out=out / "told", **options))
    assert {*load(out / "told").denoiser.net.shift} == {"label"}
    model = guided.distill(guided.Options(out / "told", out=out / "guided", fit=fit))
    assert {*model.denoiser.net.shift} == {"label", "guidance"}
    ddpm.train_teacher(ddpm.Options(net=ModuleConfig("mynets:MLP"), out=out / "mlp", **options))
    with pytest.raises(UserError, match="takes no guidance weight"):
        guided.distill(guided.Options(out / "mlp", out=out / "none", fit=fit))


@pytest.mark.parametrize(("width", "narrow"), [(8, True), (32, False)])
def test_a_network_passes_on_as_many_numbers_of_a_patch_as_it_is_wide(width, narrow):
    shape = {"size": 8, "width": width, "multipliers": (1,), "attention": (), "patch": 4}
    net = random_unet(**shape).double()
    x, t = normal(0, 1, 1, 8, 8, dtype=torch.float64), torch.ones(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, t).flatten(), x)
    rank = int(torch.linalg.matrix_rank(jacobian.flatten(1)))
    assert (rank <= 4 * 8) == narrow  # of four patches
    words = ddpm.grain(UNetConfig(**shape), "v")
    assert ("holds 16 numbers, and the network is only 8 wide" in words) == narrow
    assert bool(words) == narrow
    assert not ddpm.grain(UNetConfig(**shape), "x0")


def test_a_narrow_network_is_told_of_before_it_trains(tmp_path, capsys):
    net = UNetConfig(size=8, width=8, multipliers=(1,), blocks=1, attention=(), patch=4)
    fit = FitConfig(iterations=1, batch_size=4, precision="fp32")
    ddpm.train_teacher(ddpm.Options(out=tmp_path / "run", net=net, fit=fit))
    assert "as grain; give a smaller --patch or a larger --width" in capsys.readouterr().out
