"""A user's mistake is one line that says what to mend, exit code 2, and nothing written."""

import gzip
import shutil
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import parts
from diffusion import checkpoint
from diffusion.plan import Plan
from distill import consistency, midtraining, progressive
from eval import compare, human, report
from experiments import mixture
from students import generate, soup
from teachers import ddpm

BASE = {
    ddpm: "--width 8 --multipliers 1 --blocks 1 --attention --iterations 2 --batch-size 8",
    progressive: "--teacher runs/teacher --start-steps 4 --iterations 2 --batch-size 8",
    midtraining: "--teacher runs/teacher --iterations 2 --batch-size 8",
    consistency: "--teacher runs/teacher --iterations 2 --batch-size 8",
    generate: "--num 2 --batch-size 2",
    soup: "",
    report: "",
    human: "",
    parts: "",
    mixture: "",
    compare: "--num-images 80 --features random --precision fp32 --steps 1",
}

# (command, the mistake after its usual arguments, words of the message: what came, what was
# expected)
MISTAKES = [
    (ddpm, "--data no-such-data", ["no-such-data", "digits"]),
    (ddpm, "--data empty", ["empty", ".png"]),
    (ddpm, "--data pictures --channels 2", ["channels", "2"]),
    (ddpm, "--data pictures --background greenish", ["--background", "#rrggbb", "greenish"]),
    (ddpm, "--data runs/teacher", ["runs/teacher", "no training images"]),
    (ddpm, "--data fashion-mnist --data-dir typo", ["typo", "--data-dir"]),
    (
        ddpm,
        "--data fashion-mnist --data-dir empty",
        ["empty", "lacks", "t10k-labels-idx1-ubyte.gz"],
    ),
    (ddpm, "--data cifar10 --data-dir empty", ["empty", "lacks", "data_batch_1", "--data-dir"]),
    (ddpm, "--out file/run", ["file"]),
    (ddpm, "--iterations 0", ["--iterations", "0"]),
    (ddpm, "--batch-size 0", ["--batch-size", "0"]),
    (ddpm, "--log-every 0", ["--log-every", "0"]),
    (ddpm, "--learning-rate -1", ["--learning-rate", "-1"]),
    (ddpm, "--weight-decay -1", ["--weight-decay", "-1"]),
    (ddpm, "--ema 1.5", ["--ema", "1.5"]),
    (ddpm, "--dropout 2", ["--dropout", "2"]),
    (ddpm, "--width 12", ["width", "12"]),
    (ddpm, "--width 0", ["width", "0"]),
    (ddpm, "--width 65536", ["smaller network", "--width"]),
    (ddpm, "--width 1000000000000", ["--width", "65536"]),
    (ddpm, "--blocks 1000000000", ["--blocks", "1000"]),
    (ddpm, f"--iterations {10**30}", ["--iterations", "at most"]),
    (ddpm, f"--batch-size {10**30}", ["--batch-size", "at most"]),
    (ddpm, "--batch-size 900000000", ["--batch-size 900000000", "memory", "lower"]),
    (ddpm, "--learning-rate 1e39", ["--learning-rate", "at most"]),
    (ddpm, "--weight-decay 1e308", ["--weight-decay", "at most"]),
    (ddpm, "--shift 1e308", ["--shift", "at most"]),
    (ddpm, "--clip nan", ["--clip", "nan"]),
    (ddpm, "--data pictures --num-classes 3", ["none of its folders", "leave --num-classes out"]),
    (ddpm, "--multipliers 0", ["multipliers", "0"]),
    (ddpm, "--blocks -1", ["--blocks", "-1"]),
    (ddpm, "--attention 16", ["--attention 16", "8"]),
    (ddpm, "--patch 0", ["--patch", "0"]),
    (ddpm, "--num-classes -1", ["--num-classes", "-1"]),
    (ddpm, "--learning-rate inf", ["--learning-rate", "inf"]),
    (ddpm, "--warmup -1", ["--warmup", "-1"]),
    (ddpm, "--save-every nan", ["--save-every", "nan"]),
    (ddpm, "--seed -1", ["--seed", "2^63", "-1"]),
    (ddpm, f"--seed {2**63}", ["--seed", "2^63", str(2**63)]),
    (progressive, "--seed -1", ["--seed", "-1"]),
    (consistency, "--seed -1", ["--seed", "-1"]),
    (ddpm, "--size 16", ["--size", "16", "8"]),
    (ddpm, "--num-classes 3", ["--num-classes", "3", "10"]),
    (ddpm, "--flip", ["--flip"]),
    (ddpm, "--shift 0", ["--shift", "0"]),
    (progressive, "--shift nan", ["--shift", "nan"]),
    (consistency, "--segments 0", ["--segments", "0"]),
    (consistency, "--num-angles 4 --segments 3", ["--num-angles", "--segments 3", "4"]),
    (consistency, "--frechet nan", ["--frechet", "nan"]),
    (consistency, "--frechet 1 --segments 2", ["--frechet", "--segments 1", "2"]),
    (consistency, "--mode scm --frechet 1", ["--frechet", "scm"]),
    (progressive, "--teacher missing", ["missing"]),
    (progressive, "--teacher runs", ["runs/model.safetensors"]),
    (progressive, "--teacher cut.safetensors", ["cut.safetensors"]),
    (progressive, "--teacher file", ["file"]),
    (progressive, "--data no-such-data", ["no-such-data"]),
    (progressive, "--data fashion-mnist --data-dir idx", ["(1, 8, 8)", "(1, 28, 28)"]),
    (progressive, "--out file/run", ["file"]),
    (progressive, "--factor 1", ["--factor", "1"]),
    (progressive, "--start-steps 9", ["steps", "8", "9"]),
    (progressive, "--end-steps 0", ["--end-steps", "0"]),
    (progressive, "--end-steps 4", ["--start-steps 4", "--end-steps 4"]),
    (progressive, "--end-steps 2 --last-rounds 0", ["--last-rounds", "0"]),
    (progressive, "--end-steps 2 --last-rounds nan", ["--last-rounds", "nan"]),
    (progressive, f"--round-iterations {10**30} 1", ["--round-iterations", "10^12"]),
    (progressive, "--rounds 4 1", ["--rounds", "--start-steps 4", "4 1"]),
    (progressive, "--rounds 2 0", ["--rounds", "2 0"]),
    (progressive, "--rounds 1 --factor 4", ["--rounds", "--factor"]),
    (progressive, "--round-iterations 2", ["--round-iterations", "2 rounds", "2 1"]),
    (progressive, "--round-iterations 2 0", ["--round-iterations", "2 0"]),
    (midtraining, "--teacher missing", ["missing"]),
    (midtraining, "--solver-steps 1", ["--solver-steps", "1"]),
    (midtraining, "--solver-steps 100000000", ["--solver-steps", "at most 10000"]),
    (consistency, "--num-angles 1000000000", ["--num-angles", "at most 100000"]),
    (consistency, "--mode ect --stages 100000", ["--stages", "at most 100"]),
    (consistency, "--segments 100000000 --num-angles 100000", ["--segments", "at most"]),
    (consistency, "--frechet 1e308", ["--frechet", "at most"]),
    (consistency, "--teacher missing", ["missing"]),
    (consistency, "--teacher cut.safetensors", ["cut.safetensors"]),
    (consistency, "--num-angles 1", ["--num-angles", "1"]),
    (consistency, "--target-ema 1", ["--target-ema", "1"]),
    (generate, "missing", ["missing"]),
    (generate, "cut.safetensors", ["cut.safetensors"]),
    (generate, "runs/student --steps 3", ["3", "4"]),
    (generate, "runs/student --steps 0", ["--steps", "0"]),
    (generate, "runs/student --sampler heun", ["heun", "ddim"]),
    (generate, "runs/student --angles 1.5", ["--angles"]),
    (generate, "runs/student --shift 2", ["--shift", "4 steps", "own"]),
    (generate, "runs/teacher --steps 4 --shift 0", ["--shift", "0"]),
    (generate, "runs/teacher --steps 9", ["8", "9"]),
    (generate, "runs/teacher --angles 0.5 1.0 --sampler ddim", ["--angles", "0.5"]),
    (generate, "learned.safetensors --angles", ["--angles", "one or more"]),
    (generate, "runs/teacher --label 1", ["--label", "1"]),
    (generate, "runs/student --num 0", ["--num", "0"]),
    (generate, "runs/student --num 1000000000000", ["--num", "at most"]),
    (generate, "runs/student --num 900000000", ["--num 900000000", "memory", "lower"]),
    (generate, f"runs/teacher --steps {10**20}", ["--steps", "at most"]),
    (generate, "/dev/null", ["reading /dev/null"]),
    (generate, "/proc/self/mem", ["/proc/self/mem"]),
    (generate, "runs/student --seed -1", ["--seed", "-1"]),
    (generate, f"runs/student --seed {2**64}", ["--seed", str(2**64)]),
    (generate, "nan.safetensors", ["nan.safetensors", "not finite"]),
    (progressive, "--teacher nan.safetensors", ["nan.safetensors", "not finite"]),
    (soup, "runs/student nan.safetensors", ["nan.safetensors", "not finite"]),
    (generate, "runs/student --batch-size 0", ["--batch-size", "0"]),
    (generate, "runs/student --out a.jpg", [".png", "a.jpg"]),
    (generate, "runs/student --out file/a.png", ["file"]),
    (soup, "", ["two or more"]),
    (soup, "runs/student", ["two or more", "runs/student"]),
    (soup, "runs/student runs/student", ["two or more", "different"]),
    (soup, "runs/student missing", ["missing"]),
    (soup, "runs/student runs/teacher", ["sampler", "runs/teacher", "ddim"]),
    (compare, "missing", ["missing"]),
    (compare, "moved.safetensors", ["/gone/photos", "--data"]),
    (compare, "runs --data pictures", ["pictures", "trained on", "--data"]),
    (progressive, "--teacher moved.safetensors", ["/gone/photos", "--data"]),
    (
        progressive,
        "--teacher moved.safetensors --data pictures",
        ["pictures", "trained on", "--data"],
    ),
    (compare, "empty", ["empty"]),
    (compare, "cut.safetensors", ["cut.safetensors"]),
    (compare, "runs other.safetensors", ["other.safetensors", "digits", "elsewhere"]),
    (compare, "runs --steps 0", ["--steps", "0"]),
    (compare, "runs --steps some", ["--steps", "some"]),
    (compare, "runs --steps 9", ["8", "9"]),
    (compare, "runs --num-images 64", ["--num-images", "64"]),
    (compare, "runs --num-images 1000000000", ["--num-images 1000000000", "memory", "lower"]),
    (compare, f"runs --num-images {10**30}", ["--num-images", "at most"]),
    (compare, f"runs --steps 1,{10**30}", ["--steps", "at most"]),
    (compare, f"runs --likelihood {10**30}", ["--likelihood", "at most"]),
    (compare, "runs --search-steps 100000000", ["--search-steps", "at most"]),
    (compare, "runs --long-images 64", ["--long-images", "64"]),
    (compare, "runs --long-images 81", ["--long-images", "--num-images 80", "81"]),
    (compare, "runs --batch-size 0", ["--batch-size", "0"]),
    (compare, "runs --solvers euler", ["--solvers", "ddim", "euler"]),
    (compare, "runs --search-steps 1", ["--search-steps", "1"]),
    (compare, "runs --search-steps 2", ["--search-steps", "consistency"]),
    (compare, "runs --seeds -1", ["--seeds", "-1"]),
    (compare, "runs --tried cd", ["--tried", "METHOD=N", "'cd'"]),
    (compare, "runs --tried cd=0", ["--tried", "METHOD=N"]),
    (compare, "runs --seeds 1 0 1", ["--seeds", "once", "1 0 1"]),
    (compare, "runs --shifts 2 -1", ["--shift", "-1"]),
    (compare, "runs --features mine.pt", ["mine.pt"]),
    (compare, "runs --features pixels", ["pixels", "classifier", "random", "inception"]),
    (compare, "runs --features inception --inception file", ["--inception", "f58cb9b6"]),
    (compare, "missing.jsonl", ["missing.jsonl"]),
    (compare, "cut.jsonl --out new", ["cut.jsonl, line 1"]),
    (parts, "samplers runs/teacher --steps 1 0", ["--steps", "1", "1 0"]),
    (parts, "evaluation runs/teacher --repeats 0", ["--repeats", "0"]),
    (parts, "training-step runs/missing", ["runs/missing"]),
    (parts, "frechet-distance --dims 0", ["--dims", "0"]),
    (parts, "frechet-distance --out file/new.json", ["file"]),
    (mixture, "--methods cd dc", ["--methods", "dc", "cd"]),
    (mixture, "--share 0", ["--share", "0"]),
    (report, "empty", ["results.jsonl", "eval.compare"]),
    (human, "make runs/student missing", ["missing"]),
    (human, "make runs/student empty --pairs 0", ["--pairs", "0"]),
    (human, "make runs/student runs/teacher --pairs 900000000", ["--pairs", "memory"]),
    (human, "read deep.json", ["deep.json", "recursion"]),
    (human, "make bomb.npz runs/teacher", ["bomb.npz", "unpacked", "memory"]),
    (human, "make large runs/teacher", ["large/0.png", "megapixels"]),
    (compare, "deep.json --out new", ["deep.json"]),
    (compare, "deep.jsonl --out new", ["deep.jsonl, line 1", "recursion"]),
    (human, "make runs/student runs/teacher --seed -1", ["--seed", "-1"]),
    (human, "read cut.jsonl", ["cut.jsonl"]),
    (compare, "--seeds --out new runs", ["--seeds"]),
    (compare, "runs --out file/new", ["file"]),
    (compare, "learned.safetensors --steps 3 --out new", ["--steps", "3"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, student) -> Path:
    """A folder with a teacher, a student, and all sorts of things that are no good."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(teacher, folder / "runs" / "teacher")
    shutil.copytree(student, folder / "runs" / "student")
    whole = teacher / "model.safetensors"
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    weights, card, _ = checkpoint.load(whole)
    broken = {
        name: value * torch.nan if "head" in name else value for name, value in weights.items()
    }
    checkpoint.save(folder / "nan.safetensors", broken, card)
    other = replace(card, data=card.data | {"name": "elsewhere", "sha256": "0" * 64})
    checkpoint.save(folder / "other.safetensors", weights, other)
    moved = replace(card, data=card.data | {"name": "/gone/photos"})
    checkpoint.save(folder / "moved.safetensors", weights, moved)
    plans = tuple(Plan("consistency", angles) for angles in ((0.0, 1.5), (0.0, 1.0, 1.5)))
    learned = replace(card, plans=plans, abilities=("jump",))
    checkpoint.save(folder / "learned.safetensors", weights, learned)
    for name in ("empty", "pictures", "idx"):
        (folder / name).mkdir()
    (folder / "cut.jsonl").write_text('{"format": 2, "run": "runs/te')
    for name in ("deep.json", "deep.jsonl"):
        (folder / name).write_text("[" * 100_000)
    with zipfile.ZipFile(folder / "bomb.npz", "w") as archive:
        archive.writestr("images.npy", b"")
        archive.infolist()[0].file_size = 2**60  # as its header will claim
    (folder / "large").mkdir()
    header = struct.pack(">2I5B", 60_000, 60_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (folder / "large" / "0.png").write_bytes(png + chunk(b"IEND", b""))
    (folder / "file").write_text("a file where a folder should be")
    for grey in (0, 255):
        Image.new("L", (8, 8), grey).save(folder / "pictures" / f"{grey}.png")
    for stem in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, 2, 28, 28) + bytes(range(196)) * 8
        (folder / "idx" / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">2I", 0x801, 2) + bytes([0, 9])
        (folder / "idx" / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    MISTAKES,
    ids=[f"{module.__name__.split('.')[1]} {arguments}" for module, arguments, _ in MISTAKES],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    place, command, monkeypatch, module, arguments, words
):
    monkeypatch.chdir(place)
    before = files(place)
    outcome = command(module.main, *BASE[module].split(), *arguments.split())
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert [word for word in words if word not in outcome.err] == []
    assert files(place) - before == set()


@pytest.mark.parametrize("module", [ddpm, compare])
def test_compiling_without_a_compiler_is_a_mistake_too(place, command, monkeypatch, module):
    monkeypatch.chdir(place)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = command(module.main, *BASE[module].split(), "--compile")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "no-such-compiler" in outcome.err


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
