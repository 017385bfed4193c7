"""Any bytes in a file that is read: what they say is taken, or one line says what is wrong.

Each reader has a whole file, which is changed at a few places. More of it, for half an hour:
`python -m pytest tests/faults --hypothesis-profile long -k any`.
"""

import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up import record
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import decoding, files, folders, image_folder, model, runs
from diffusion.console import UserError
from diffusion.image_file import Form
from eval import human
from eval.measure import outside
from eval.measure.metrics import Moments, frechet_distance
from eval.results import jsonl
from eval.results.store import samples_of
from tests.faults.test_cards import NOW, TEACHER, written

PIXELS = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1)
REAL = Moments.of(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))


def checkpoint(path: Path) -> None:
    loaded = model.load(path)
    images = loaded.sample(loaded.plan(2, "ddim"), 0, torch.arange(2))
    assert images.shape == (2, *loaded.spec.shape)


def state(path: Path) -> None:
    settings = runs.settings_before(path.parents[1])
    assert isinstance(settings.get("iterations", 9), int)


def log(path: Path) -> None:
    lines = [*runs._lines_before(path, 2)]
    assert all(json.loads(line)["iteration"] < 2 for line in lines)


def results(path: Path) -> None:
    for each in jsonl.read(path):
        assert math.isfinite(each.score)


def samples(path: Path) -> None:
    assert {*samples_of(path.parent)} == {"a"}


def mark(path: Path) -> None:
    folders.check_claim(path.parent)
    assert folders.read_mark(path.parent).get("pictures", 0) >= 0


def images(path: Path) -> None:
    form = outside.form_of(path)
    assert outside.npz(path).shape[1:] == (form.channels, form.size, form.size)


def statistics(path: Path) -> None:
    distance = frechet_distance(Moments.saved(path, 2, "e"), REAL)
    assert math.isfinite(distance)


def picture(path: Path) -> None:
    listing = image_folder.listing(path.parent)
    read = decoding.decode(listing, Form(8, 1), path.parent.parent / "cache")
    assert (read.images.shape, read.taken) == ((1, 8, 8), [0])


def judged(path: Path) -> None:
    tally = human.tally(path)
    assert tally.decided + tally.neither == 3


def signed(path: Path) -> None:
    folders.check_file(path)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png() -> bytes:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", folders.SIGN)
    info.add_itxt("Title", "a picture", "en", "ein Bild", zip=True)
    info.add_text("Comment", "words", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0, :, :, 0]).save(buffer, "PNG", pnginfo=info, exif=exif)
    return buffer.getvalue()


class Files(dict):
    """By a file's name: its content."""

    def __repr__(self) -> str:  # for hypothesis to print
        return "files"


def made(tmp_path: Path) -> Files:
    """A whole file of each kind."""
    torch.manual_seed(0)
    weights = model.of_card(TEACHER, "fp32").net.state_dict()
    written(tmp_path / "m", weights, json.dumps(NOW))
    settings = json.dumps(files.sealed({"seed": 1, "precision": "fp32", "iterations": 9}))
    line = json.dumps({"iteration": 1, "iterations": 9})
    files.save_tensors(tmp_path / "s", {"w": torch.ones(3)}, {"settings": settings, "line": line})
    files.save_tensors(tmp_path / "a", {"a": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, {})
    lines = [files.sealed({"iteration": i, "loss": 0.5}) for i in range(3)]
    answers = {"format": human.FORMAT, "a": "x", "b": "y", "session": "1"}
    folders.write_mark(tmp_path, "run", {"pictures": 3})
    return Files({
        "run/model.safetensors": (tmp_path / "m").read_bytes(),
        "run/state/state.safetensors": (tmp_path / "s").read_bytes(),
        "run/log.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "table/results.jsonl": jsonl.lines([record(), record("student", 2)]).encode(),
        "table/samples.safetensors": (tmp_path / "a").read_bytes(),
        "marked/.fewstep": (tmp_path / folders.MARK).read_bytes(),
        "images.npz": npz(images=PIXELS),
        "images.npy": npy(PIXELS),
        "statistics.npz": npz(mu=np.zeros(2), sigma=np.eye(2)),
        "statistics.npy": npy(np.eye(2)),
        "pictures/a.png": png(),
        "answers.json": json.dumps(answers | {"answers": ["a", "b", "neither"]}).encode(),
        "grid.png": png(),
    })  # fmt: skip


READERS: dict[str, Callable[[Path], None]] = {
    "run/model.safetensors": checkpoint,
    "run/state/state.safetensors": state,
    "run/log.jsonl": log,
    "table/results.jsonl": results,
    "table/samples.safetensors": samples,
    "marked/.fewstep": mark,
    "images.npz": images,
    "images.npy": images,
    "statistics.npz": statistics,
    "statistics.npy": statistics,
    "pictures/a.png": picture,
    "answers.json": judged,
    "grid.png": signed,
}
CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "replace", "repeat", "length"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"null", b"-1", b"1e400", b"[]", b"{}", b'""', b"NaN", b"\\ud800", b"(9999999999,)",
         b"<U9", b"|O", b"<c16", b"<f8", b"True"]
    ),
)  # fmt: skip


def changed(content: bytes, kind: str, share: float, more: bytes) -> bytes:
    """The content changed at a place."""
    at = int(share * len(content))
    flipped = bytes([content[at] ^ (more[0] or 1)]) if content else b""
    return {
        "flip": content[:at] + flipped + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + more + content[at:],
        "replace": content[:at] + more + content[at + len(more) :],
        "repeat": content[:at] + content[at : at + 200] + content[at:],
        "length": content[:at] + len(content).to_bytes(8, "little") + content[at + 8 :],
    }[kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("whole"))


def read(folder: Path, name: str, content: bytes) -> str:
    """Why the file is not taken; "" where it is."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npy"):  # as one of an archive, whose own checksums are right
        path = path.with_suffix(".npz")
        arrays = {"images.npy": {"images": content},
                  "statistics.npy": {"mu": npy(np.zeros(2)), "sigma": content}}  # fmt: skip
        with zipfile.ZipFile(path, "w") as archive:
            for each, bytes_of_it in arrays[name].items():
                archive.writestr(f"{each}.npy", bytes_of_it)
    else:
        path.write_bytes(content)
    if name.startswith("run/"):
        folders.write_mark(folder / "run", "run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            READERS[name](path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(tmp_path, whole, name):
    assert read(tmp_path, name, whole[name]) == ""


@pytest.mark.parametrize("sigma", [[1, 0, 0, math.nan], [1, 2, 3, 4], [1, 0, 0, -1], [1e31] * 4])
def test_statistics_that_no_images_have_are_refused(tmp_path, sigma):
    content = npz(mu=np.zeros(2), sigma=np.reshape(sigma, (2, 2)).astype(float))
    assert "symmetric" in read(tmp_path, "statistics.npz", content)


@pytest.mark.parametrize("name", READERS)
@given(changes=st.lists(CHANGE, min_size=1, max_size=4))
def test_any_bytes_are_what_they_say_or_one_line(whole, name, changes):
    content = whole[name]
    for change in changes:
        content = changed(content, *change)
    with TemporaryDirectory() as folder:
        problem = read(Path(folder), name, content)
    assert "\n" not in problem
    assert len(problem) < 1000
