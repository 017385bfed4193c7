"""Images of other places than folders, and the table of what was found at each."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Features, Value
from PIL import Image

from diffusion import data
from diffusion.condition import Label
from diffusion.console import UserError
from diffusion.image_file import Form
from teachers import ddpm

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def drawing(i: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Of one of three colours, a little darker from one to the next of its colour."""
    return Image.new("RGB", size, tuple(max(0, level - i) for level in COLOURS[i % 3]))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def table(text: str) -> str:
    """A table without its columns."""
    return " ".join(text.split())


# Hugging Face


def write_hf(path: Path, rows: int, splits: dict[str, int] | None = None, **names: str) -> Path:
    """image, label and text under names of one's own."""
    image, label, text = (names.get(name, name) for name in ("image", "label", "text"))
    features = Features(
        {
            image: datasets.Image(),
            label: ClassLabel(names=["red", "green", "blue"]),
            text: Value("string"),
        }
    )

    def part(first: int, count: int) -> datasets.Dataset:
        numbers = range(first, first + count)
        return datasets.Dataset.from_dict(
            {
                image: [{"bytes": png(drawing(i)), "path": None} for i in numbers],
                label: [i % 3 for i in numbers],
                text: [f"drawing  {i}" for i in numbers],
            },
            features=features,
        )

    if splits:
        whole = {name: part(10 * i, count) for i, (name, count) in enumerate(splits.items())}
        datasets.DatasetDict(whole).save_to_disk(path)
    else:
        part(0, rows).save_to_disk(path)
    return path


def test_a_dataset_of_hugging_face_has_its_images_and_classes(tmp_path, capsys):
    write_hf(tmp_path / "colours", 12)
    loaded = data.load(f"hf:{tmp_path}/colours", form=Form(4), classes=True)
    said = table(capsys.readouterr().out)
    rows = loaded.train.take(torch.arange(12))
    for i in range(12):
        expected = drawing(i).getpixel((0, 0))
        assert rows.images[i, :, 0, 0].tolist() == list(expected)
    assert rows.condition["label"].tolist() == [i % 3 for i in range(12)]
    assert loaded.kinds == {"label": Label(3)}
    for words in (
        "12 images found, 12 taken, 0 skipped",
        "all 16x16; brought to 4x4",
        "12 colour",
        "3 classes: 0 red (4), 1 green (4), 2 blue (4)",
        "12 of 12 images, of 2 to 2 words",
    ):
        assert words in said


def test_its_split_test_is_held_out_and_its_columns_may_have_any_name(tmp_path):
    names = {"image": "photo", "label": "kind", "text": "words"}
    write_hf(tmp_path / "colours", 0, {"train": 9, "test": 6, "more": 3}, **names)
    place = f"hf:{tmp_path}/colours,image=photo,label=kind"
    loaded = data.load(place, form=Form(4), classes=True)
    assert (len(loaded.train), len(loaded.test)) == (9, 6)
    assert loaded.test.take(torch.arange(6)).condition["label"].tolist() == [1, 2, 0, 1, 2, 0]
    again = data.reload(loaded.spec)
    assert again.spec == loaded.spec
    assert data.title(place) == data.title(loaded.spec.name) == "colours"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (",image=label", "holds no images"),
        (",image=pixels", "no column pixels for image: it has image, label, text"),
        (",picture=image", "names picture: expected hf:PATH"),
    ],
)
def test_a_column_that_is_none_is_answered_with_those_there_are(tmp_path, columns, words):
    write_hf(tmp_path / "colours", 3)
    with pytest.raises(UserError, match=words):
        data.load(f"hf:{tmp_path}/colours{columns}", form=Form(4))


def test_a_folder_that_is_no_such_dataset_is_a_users_mistake(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no dataset as save_to_disk"):
            data.load(f"hf:{place}", form=Form(4))


# WebDataset


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, of: dict[str, bytes] | None = None) -> Path:
    """12 drawings in two shards, each with a class; captions of every second in a .json."""
    for shard in range(2):
        files = {}
        for i in range(6 * shard, 6 * shard + 6):
            files[f"{i:04d}.png"] = png(drawing(i))
            if i % 2:
                files[f"{i:04d}.cls"] = f"{i % 3}\n".encode()
                files[f"{i:04d}.txt"] = f"drawing\n{i}".encode()
            else:
                told = {"label": i % 3, "caption": f"drawing {i}"}
                files[f"{i:04d}.json"] = json.dumps(told).encode()
        write_shard(folder / f"{shard:03d}.tar", files | (of or {}))
    return folder


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{}00*.tar"])
def test_shards_have_their_images_classes_and_captions(tmp_path, pattern, capsys):
    write_shards(tmp_path / "colours")
    place = f"wds:{tmp_path}/colours{pattern.format('')}"
    loaded = data.load(place, form=Form(4), classes=True)
    said = table(capsys.readouterr().out)
    rows = loaded.train.take(torch.arange(12))
    for i in range(12):
        assert rows.images[i, :, 0, 0].tolist() == list(drawing(i).getpixel((0, 0)))
    assert rows.condition["label"].tolist() == [i % 3 for i in range(12)]
    assert "12 of 12 images, of 2 to 2 words" in said
    assert data.reload(loaded.spec).spec == loaded.spec
    assert data.title(place) == "colours"


def test_what_is_broken_or_without_an_image_in_a_shard_is_counted(tmp_path, capsys):
    more = {"a.jpg": b"broken", "b.cls": b"1", "c.mp3": b"", "d/.e.png": b""}
    write_shards(tmp_path / "colours", more)
    loaded = data.load(f"wds:{tmp_path}/colours", form=Form(4))
    assert len(loaded.train) == 12
    said = table(capsys.readouterr().out)
    assert "14 images found, 12 taken, 2 skipped: 2 not recognised as images" in said
    assert "2 with other suffixes (.mp3 2), 2 without an image (000.tar/b, 001.tar/b)" in said
    write_shard(tmp_path / "one" / "0.tar", {"a.png": png(drawing(0))})
    with pytest.raises(UserError, match=r"no class: expected a \.cls"):
        data.load(f"wds:{tmp_path}/one", form=Form(4), classes=True)


def test_a_shard_that_is_compressed_or_none_is_a_users_mistake(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as file:
        file.add(__file__)
    with pytest.raises(UserError, match=r"a\.tar is no whole plain tar file"):
        data.load(f"wds:{tmp_path}", form=Form(4))
    with pytest.raises(UserError, match="found 0 tar files"):
        data.load(f"wds:{tmp_path}/*.tgz", form=Form(4))


# Squares, and what is said of them


def test_an_image_that_is_no_square_is_cropped_or_padded_as_is_asked(tmp_path, capsys):
    wide = Image.new("RGB", (32, 16), (0, 0, 200))
    wide.paste((200, 0, 0), (0, 0, 8, 16))  # its left quarter; Lanczos overshoots a little
    wide.save(tmp_path / "a.png")
    drawing(1).save(tmp_path / "b.png")
    cropped = data.load(str(tmp_path), form=Form(8))
    assert "1 not square: the middle is taken" in table(capsys.readouterr().out)
    assert cropped.train.images[0, 0].max() < 20
    form = Form(8, background="#00ff00", aspect="pad")
    padded = data.load(str(tmp_path), form=form)
    assert "1 not square: padded with #00ff00" in table(capsys.readouterr().out)
    column = padded.train.images[0, :, :, 0].T.tolist()
    assert column[0] == column[1] == column[6] == column[7] == [0, 255, 0]
    assert column[3] == pytest.approx([200, 0, 0], abs=6)
    assert padded.train.images[0, :, 3, 7].tolist() == pytest.approx([0, 0, 200], abs=6)
    assert torch.equal(padded.train.images[1], cropped.train.images[1])
    assert data.reload(padded.spec).spec == padded.spec
    assert padded.spec.form == form


def test_the_same_pixels_twice_are_counted(tmp_path, capsys):
    for name in ("a", "b", "c"):
        drawing(0).save(tmp_path / f"{name}.png")
    drawing(1).save(tmp_path / "d.png")
    data.load(str(tmp_path), form=Form(8))
    assert "2 have the same pixels as another" in table(capsys.readouterr().out)


def test_what_files_held_is_told(tmp_path, capsys):
    drawing(0, (40, 20)).save(tmp_path / "a.png")
    drawing(1).convert("L").save(tmp_path / "b.png")
    drawing(2).convert("RGBA").save(tmp_path / "c.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(3, (20, 30)).save(tmp_path / "d.jpg", exif=exif)
    Image.new("I;16", (16, 16)).save(tmp_path / "e.png")
    data.load(str(tmp_path), form=Form(8))
    said = table(capsys.readouterr().out)
    assert "16x16 to 40x20, most often 16x16 (3)" in said
    for words in ("2 colour", "1 grey", "1 colour with alpha (on white)", "1 grey of 16 bits"):
        assert words in said
    assert "1 turned upright by their EXIF tag" in said


def test_a_teacher_is_trained_on_a_place_by_its_command(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "colours")
    net = "--size 8 --width 8 --multipliers 1 --blocks 1 --attention --fit pad"
    fit = "--iterations 3 --batch-size 4 --precision fp32"
    done = command(ddpm.main, "--data", "wds:colours", *net.split(), *fit.split())
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "colours" / "teacher" / "model.safetensors").exists()
