"""Checkpoints: what is written comes back bit for bit, what is damaged is refused by name."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint, files
from diffusion.checkpoint import Card
from diffusion.console import UserError
from diffusion.files import atomic_path, write_atomic
from diffusion.plan import Plan, plan
from diffusion.schedules import cosine

CARD = Card(
    method="halved",
    plans=(Plan("ddim", (0.0, 1.5), guidance=1.5, note="its own"), plan("ddim", cosine(8))),
    abilities=("denoise",),
    net={"name": "unet", "width": 8, "attention": [4]},
    denoiser={"prediction": "v", "bounds": [-1.0, 2.0]},
    condition={"label": {"kind": "label", "num_classes": 3}},
    codec={"name": "scale", "mean": 0.1 + 0.2, "std": 1.0},
    data={"name": "digits"},
    parent="0" * 64,
    training={"settings": {"seed": 3}},
)
WEIGHTS = {
    "conv.weight": torch.linspace(-3, 3, 24).reshape(2, 3, 2, 2) ** 3,
    "bias": torch.tensor([1e-40, -0.0, float("inf")]),  # a subnormal, a signed zero
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, WEIGHTS, CARD)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("by", ["file", "folder"])
def test_weights_and_card_come_back_bit_for_bit(file, by):
    weights, card, sha256 = checkpoint.load(file if by == "file" else file.parent)
    assert card == CARD
    assert [own.note for own in card.plans] == ["its own", ""]
    assert checkpoint.weights_sha256(weights) == checkpoint.weights_sha256(WEIGHTS) == sha256


def test_the_sha256_tells_apart_names_shapes_and_single_bits():
    bias = WEIGHTS["bias"]
    others = [
        WEIGHTS,
        {"bias": bias},
        {"offset": bias},
        {"bias": bias[:, None]},
        {"bias": bias.view(torch.int32)},
        {"bias": bias.abs()},  # differs in the sign of a zero
    ]
    assert len({checkpoint.weights_sha256(weights) for weights in others}) == len(others)


def complaint(file: Path) -> str:
    """What is said of a file that is refused; nothing of one that is taken."""
    try:
        checkpoint.load(file)
    except UserError as error:
        return str(error)
    return ""


def test_a_flipped_bit_in_any_byte_is_noticed_and_the_file_named(file):
    whole, unnoticed = file.read_bytes(), []
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        if str(file) not in complaint(file):
            unnoticed.append(position)
    assert unnoticed == []


def test_a_file_cut_short_anywhere_is_refused_by_name(file):
    whole = file.read_bytes()
    for length in (*range(0, len(whole), 9), len(whole) - 1):
        file.write_bytes(whole[:length])
        assert str(file) in complaint(file)


@pytest.mark.parametrize("text", [None, "no JSON", "{}", "[]", '{"format": 1}', '{"format": 2}'])
def test_a_file_without_a_usable_card_is_refused_by_name(file, text):
    metadata = {"weights_sha256": checkpoint.weights_sha256(WEIGHTS)}
    files.save_tensors(file, WEIGHTS, metadata | ({} if text is None else {"card": text}))
    with pytest.raises(UserError, match=str(file)):
        checkpoint.load(file)


def test_a_card_of_another_format_is_refused_with_both_numbers(file):
    checkpoint.save(file, WEIGHTS, replace(CARD, format=3))
    with pytest.raises(UserError, match=f"{file}.* 3, expected 2"):
        checkpoint.load(file)


@pytest.mark.parametrize("name", ["missing.safetensors", ".", "model.safetensors/below-a-file"])
def test_a_missing_checkpoint_is_refused_by_name(file, name):
    path = file.parent / name
    if name == ".":
        file.unlink()
    with pytest.raises(UserError, match=str(path)):
        checkpoint.load(path)


def test_a_writer_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as part:
            part.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_whole(file, call, command, monkeypatch):
    before = file.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    outcome = command(lambda: checkpoint.save(file, {"other": torch.ones(3)}, CARD))
    monkeypatch.undo()
    assert outcome.code == 2
    problem = "could not be written (No space left on device): it is as it was before"
    assert outcome.err == f"error: {file} {problem}\n"
    assert file.read_bytes() == before
    assert names(file.parent) == ["model.safetensors"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (events.append(n), r(*a)))
    write_atomic(tmp_path / "new" / "file", "text")
    assert events == ["fsync", "replace"]
    assert (tmp_path / "new" / "file").read_text() == "text"
