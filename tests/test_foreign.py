"""Teachers of diffusers: their images, their weights' names, their students."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import text_encoder
from diffusion.condition import Condition
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.model import Model, load
from diffusion.samplers import sample
from distill import cd, ect, progressive, scm
from eval import compare
from students import export, generate
from students import load as load_model
from students.to_diffusers import to_diffusers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

BLOCKS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
}
UNET = BLOCKS | {
    "in_channels": 1,
    "out_channels": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_num_groups": 1,
}
LEADING = {"timestep_spacing": "leading"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet(**changes) -> torch.nn.Module:
    """A random UNet2DModel."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET | changes).eval()


def dit(**changes) -> torch.nn.Module:
    """A random DiTTransformer2DModel."""
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(**DIT | changes).eval()
    for parameter in network.parameters():  # its zeros would hide the labels
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def saved(folder: Path, network: torch.nn.Module, scheduler) -> Path:
    """As a pipeline's folder; the path by which a command reads it."""
    part = "transformer" if isinstance(network, diffusers.DiTTransformer2DModel) else "unet"
    network.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    return Path(f"diffusers:{folder}")


def drawn(seed: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The same noise for both: the first is where sampling starts."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)


@torch.no_grad()
def theirs(network, scheduler, num_steps: int, shape: tuple, given: dict, **step) -> Tensor:
    """Images by a scheduler's own loop, as its pipelines have it."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(num_steps)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    if "generator" in step:
        step["generator"] = generator
    for k in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, k), k.expand(len(x)), **given).sample
        x = scheduler.step(output, k, x, **step).prev_sample
    return x


def at(model: Model, timesteps: Tensor) -> Tensor:
    """The model's angles at these timesteps, ascending from 0."""
    angles = model.schedule[1:][timesteps.long().flip(0)]
    return torch.cat([angles.new_zeros(1), angles])


def ours(model: Model, sampler: str, angles: Tensor, condition: Condition | None = None) -> Tensor:
    noise = drawn(0, (4, *model.shape))
    return sample(model.denoiser, noise, sampler, angles, condition)


# Their scheduler, what it does not do by default, our sampler, what their step is told.
CLIPPED = {"use_clipped_model_output": True}
PEERS = {
    "ddim": ("DDIMScheduler", {}, "ddim", CLIPPED),
    "ddpm": ("DDPMScheduler", {}, "ancestral", {"generator": None}),
    "ddpm-large": (
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        "ancestral-learned",
        {"generator": None},
    ),
    "dpm-solver++": ("DPMSolverMultistepScheduler", SCALED, "dpm-solver++", {}),
    "unipc": ("UniPCMultistepScheduler", SCALED, "unipc", {}),
    "euler": ("EulerDiscreteScheduler", SCALED | LEADING, "ddim", {}),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("peer", PEERS)
def test_images_are_those_of_diffusers_own_scheduler(tmp_path, peer, prediction):
    name, changes, sampler, step = PEERS[peer]
    scheduler = getattr(diffusers, name)(**changes, prediction_type=prediction)
    network = unet()
    model = load(saved(tmp_path, network, scheduler))
    their_images = theirs(network, scheduler, 8, (4, 1, 8, 8), {}, **dict(step))
    angles = at(model, scheduler.timesteps)
    torch.testing.assert_close(ours(model, sampler, angles), their_images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.001 * 1.15**k for k in range(40)], "num_train_timesteps": 40},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    ],
)
def test_any_schedule_of_betas_is_read_and_a_zero_snr_one_begins_at_pure_noise(tmp_path, changes):
    scheduler = diffusers.DDIMScheduler(**changes, timestep_spacing="trailing")
    network = unet()
    model = load(saved(tmp_path, network, scheduler))
    their_images = theirs(network, scheduler, 8, (4, 1, 8, 8), {}, **CLIPPED)
    angles = at(model, scheduler.timesteps)
    assert torch.equal(angles, model.plan(8, "ddim").on(torch.device("cpu")))
    torch.testing.assert_close(ours(model, "ddim", angles), their_images, atol=1e-4, rtol=1e-4)
    pure = float(model.schedule[-1]) == math.pi / 2
    assert pure == ("rescale_betas_zero_snr" in changes)


def test_eps_says_nothing_at_pure_noise_and_the_plan_begins_before_it(tmp_path, capsys):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    model = load(saved(tmp_path, unet(), scheduler))
    assert "its last 15 noise levels are left out" in capsys.readouterr().out
    assert len(model.schedule) == 986
    assert 1e-3 < float(model.schedule[-1].cos()) < 0.02


def test_a_learned_range_of_variances_is_sampled_as_diffusers_does(tmp_path):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    network = unet(out_channels=2)
    model = load(saved(tmp_path, network, scheduler))
    their_images = theirs(network, scheduler, 8, (4, 1, 8, 8), {}, generator=None)
    angles = at(model, scheduler.timesteps)
    made = ours(model, "ancestral-learned", angles)
    torch.testing.assert_close(made, their_images, atol=1e-4, rtol=0)


def test_flow_matching_is_the_circle_seen_from_a_line(tmp_path):
    """Their Euler steps in s are rotations; any angles will do."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    network = dit()
    model = load(saved(tmp_path, network, scheduler))
    s = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1], dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 4])
    x = next(drawn(0, (4, 3, 8, 8)))
    with torch.no_grad():
        for now, then in zip(s.tolist(), [*s[1:].tolist(), 0.0]):
            u = network(x, torch.full((4,), 1000 * now), class_labels=label).sample
            x = x + (then - now) * u
    angles = torch.cat([torch.zeros(1), torch.atan2(s, 1 - s).flip(0)]).double()
    made = ours(model, "ddim", angles, {"label": label})
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)
    assert float(model.schedule[-1]) == math.pi / 2
    first = torch.atan2(torch.tensor(2 / 1001), torch.tensor(1 - 2 / 1001))  # shifted 1 / 1000
    assert float(model.schedule[1]) == pytest.approx(float(first))


def test_a_transformer_is_guided_by_its_classes_as_by_its_own_pipeline(tmp_path):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **LEADING)
    network = dit()
    model = load(saved(tmp_path, network, scheduler))
    label, weight = torch.tensor([0, 1, 2, 4]), 3.0

    def guided(x, k):
        both = network(
            torch.cat([x, x]), k.repeat(2), class_labels=torch.cat([label, label * 0 + 5])
        )
        given, unknown = both.sample.chunk(2)
        return unknown + weight * (given - unknown)

    scheduler.set_timesteps(8)
    x = next(drawn(0, (4, 3, 8, 8)))
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(guided(x, k.expand(4)), k, x).prev_sample
    condition = {"label": label, "guidance": torch.full((4,), weight)}
    made = ours(model, "ddim", at(model, scheduler.timesteps), condition)
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)


def test_timesteps_between_two_of_the_table_go_straight_with_the_angle(tmp_path):
    model = load(saved(tmp_path, unet(), diffusers.DDPMScheduler()))
    table, timestep = model.schedule[1:].float(), model.denoiser.net.timestep
    assert timestep(table).tolist() == list(range(1000))
    middle = (table[1:] + table[:-1]) / 2
    torch.testing.assert_close(timestep(middle), torch.arange(999) + 0.5, atol=2e-3, rtol=0)
    assert timestep(torch.tensor([0.0, 0.005])).tolist() == [0, 0]


def test_forward_mode_goes_through_blocks_with_attention(tmp_path):
    model = load(saved(tmp_path, unet(), diffusers.DDPMScheduler(**SCALED)))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.7, 1.2], dtype=torch.float64)
    along = torch.randn(2, 1, 8, 8), torch.tensor([1.0, -1.0], dtype=torch.float64)
    exact = scm.derivative(model.denoiser.net, (x, t.float()), (along[0], along[1].float()))[1]
    net = model.denoiser.net.double()
    h = 5e-5  # a twentieth of a step of the table; their embedding is float32
    with torch.no_grad():
        ends = [net(x.double() + d * along[0], t + d * along[1]) for d in (-h, h)]
    torch.testing.assert_close(exact.double(), (ends[1] - ends[0]) / (2 * h), atol=0.05, rtol=0.01)


QUICK = FitConfig(iterations=3, batch_size=16, warmup=1, precision="fp32")


def test_students_keep_the_architecture_and_go_back(tmp_path, monkeypatch, command):
    """Halved to 4 steps, which diffusers reads, and one call by cd, ect and scm."""
    monkeypatch.chdir(tmp_path)
    teacher = saved(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    with pytest.raises(UserError, match="names no training images: name them with --data"):
        progressive.distill(progressive.Options(teacher=teacher, fit=QUICK))
    given = {"teacher": teacher, "data": "digits", "fit": QUICK}
    halved = progressive.distill(progressive.Options(**given, start_steps=8, rounds=(4,)))[0]
    for mode in (cd, ect, scm):
        out = Path("runs", "theirs", mode.__name__.split(".")[-1])
        student = mode.distill(mode.Options(**given, out=out))
        assert student.card.data["name"] == "digits"
    few = "--no-long --no-times --num-images 80 --features random --likelihood 0 --steps 4"
    runs = "runs/theirs/progressive", "runs/theirs/scm", teacher
    done = command(compare.main, *runs, *few.split(), "--solvers", "unipc", "--out", "table")
    assert done.code == 0, done.err
    table = Path("table/table.md").read_text()
    assert all(row in table for row in ("teacher, unipc", "progressive", "consistency-scm"))

    assert to_diffusers(halved, tmp_path / "back") == [999, 749, 499, 249]
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "back", local_files_only=True)
    their_images = theirs(pipeline.unet, pipeline.scheduler, 4, (4, 1, 8, 8), {}, **CLIPPED)
    made = ours(halved, "ddim", halved.plan(4).on(halved.device))
    torch.testing.assert_close(made, their_images, atol=1e-4, rtol=0)
    again = load(Path(f"diffusers:{tmp_path / 'back'}"))
    assert again.sha256 == halved.sha256


def test_a_command_makes_images_with_such_a_teacher(tmp_path, command):
    teacher = saved(tmp_path, unet(), diffusers.DDIMScheduler())
    out = tmp_path / "grid.png"
    asked = ["--num", 4, "--steps", 2, "--sampler", "dpm-solver++", "--out", out]
    done = command(generate.main, teacher, *asked)
    assert done.code == 0, done.err
    assert out.exists()


@pytest.mark.parametrize("network", [unet, dit])
def test_one_is_exported_for_any_number_of_images(tmp_path, network):
    # of x0, which no division by cos t makes large at pure noise
    scheduler = diffusers.DDIMScheduler(prediction_type="sample")
    teacher = saved(tmp_path / "theirs", network(), scheduler)
    chosen = export.Options(teacher, "onnx", steps=1, sampler="ddim", out=tmp_path / "out")
    folder, _ = export.export(chosen)  # which compares 1, 7 and 64 images with the model's own
    assert len(load_model(folder)(65)) == 65


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"_class_name": "UNet1DModel"}, "its network is 'UNet1DModel', expected one of"),
        ("unet", {"_class_name": "os.system"}, "its network is 'os.system', expected one of"),
        ("unet", {"sample_size": [8, 16]}, r"its sample_size is \[8, 16\]"),
        ("unet", {"time_embedding_type": "fourier"}, "its time_embedding_type is 'fourier'"),
        ("unet", {"down_block_types": ["None"]}, "diffusers cannot read the network"),
        ("unet", {"block_out_channels": [16, 24]}, "diffusers cannot read the network"),
        ("scheduler", {"_class_name": "ScoreSdeVeScheduler"}, "its scheduler is 'ScoreSdeVe"),
        ("scheduler", {"prediction_type": "w"}, "its network predicts 'w', expected"),
        ("scheduler", {"variance_type": "learned"}, "its variance_type is 'learned'"),
        ("scheduler", {"trained_betas": [0.1, 0.0]}, "noise levels do not ascend"),
        ("scheduler", {"beta_schedule": "none"}, "config is refused by diffusers"),
        (
            "scheduler",
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type is 'continuous'",
        ),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(tmp_path, part, changes, words):
    teacher = saved(tmp_path, unet(), diffusers.DDPMScheduler())
    name = "config.json" if part == "unet" else "scheduler_config.json"
    file = tmp_path / part / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        load(teacher)


@pytest.mark.parametrize("place", ["/nowhere/at/all", "nowhere"])
def test_a_folder_that_is_not_there_is_said(place):
    with pytest.raises(UserError, match=f"there is no folder {place}"):
        load(Path(f"diffusers:{place}"))


CONDITIONED = BLOCKS | {
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def conditioned(**changes) -> torch.nn.Module:
    """A random UNet2DConditionModel."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**CONDITIONED | changes).eval()


def save_reader(folder: Path) -> tuple:
    """A random CLIP text encoder of 16 tokens and its tokenizer, of letters, as a pipeline has
    them."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder / "vocab.json", folder / "merges.txt"
    folder.mkdir(exist_ok=True)
    files[0].write_text(json.dumps({word: i for i, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(*map(str, files), model_max_length=16)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    torch.manual_seed(1)
    encoder = transformers.CLIPTextModel(config).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return encoder, tokenizer


def test_texts_guide_as_in_a_pipeline_and_the_empty_one_is_the_encoders_own(tmp_path):
    encoder, tokenizer = save_reader(tmp_path)
    scheduler = diffusers.DDIMScheduler(**SCALED, clip_sample=False, **LEADING)
    network = conditioned()
    model = load(saved(tmp_path, network, scheduler))
    prompts, weight = ["a red cat", "dog", "", "the moon and a star"], 3.0

    def read(texts):
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return encoder(tokenizer(texts, **padded).input_ids)[0]

    scheduler.set_timesteps(8)
    x = next(drawn(0, (4, 3, 8, 8)))
    with torch.no_grad():
        texts, silence = read(prompts), read([""] * 4)
        for k in scheduler.timesteps:
            given = network(x, k, encoder_hidden_states=texts).sample
            unknown = network(x, k, encoder_hidden_states=silence).sample
            x = scheduler.step(unknown + weight * (given - unknown), k, x).prev_sample
    ours_read = text_encoder.load(tmp_path / "text_encoder")
    condition = {
        "text": ours_read.prompts(prompts, model.kinds["text"]),
        "guidance": torch.full((4,), weight),
    }
    assert not condition["text"][2].any()  # says nothing: the network has its own null for it
    made = ours(model, "ddim", at(model, scheduler.timesteps), condition)
    torch.testing.assert_close(made, x, atol=1e-3, rtol=1e-3)


def test_a_class_more_than_the_images_have_is_for_an_unknown_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teachers = {
        number: saved(
            tmp_path / str(number), unet(num_class_embeds=number), diffusers.DDPMScheduler()
        )
        for number in (5, 10, 11)
    }
    given = {"data": "digits", "fit": QUICK, "start_steps": 2, "rounds": (1,)}
    students = {
        number: progressive.distill(progressive.Options(teachers[number], **given))[0].denoiser.net
        for number in (10, 11)
    }
    rows = {number: net.class_embedding.weight for number, net in students.items()}
    nulls = {n: net.class_embedding(torch.tensor(net.unknown)) for n, net in students.items()}
    torch.testing.assert_close(nulls[10], rows[10].mean(0))  # no row is for it
    assert torch.equal(nulls[11], rows[11][10])
    with pytest.raises(UserError, match="knows 5 classes, and the images have 10"):
        progressive.distill(progressive.Options(teachers[5], **given))
