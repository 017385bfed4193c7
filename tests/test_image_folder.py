"""A folder of images: every kind comes out as it looks, what is left out is named, quickly."""

import io
import json
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from diffusion import data, decoding, folders, image_file, image_folder
from diffusion.console import UserError
from diffusion.image_file import Form


def plain(value: object, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, value)


def noise(seed: int = 0, size: int = 32) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def said_by(capsys) -> str:
    """What was printed, without the columns of the table."""
    return " ".join(capsys.readouterr().out.split())


def read(path: Path, size: int = 8, channels: int = 3, background: str = "white") -> torch.Tensor:
    with image_file.unlimited():
        return image_file.read(path, Form(size, channels, background)).pixels


def flat(colour: tuple[int, ...], size: int = 8) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(-1, size, size)


# Colours


def grey(levels: np.ndarray | float, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((16, 16), levels).astype(dtype))


def pgm(level: int, top: int) -> bytes:
    kind = ">u2" if top > 255 else "u1"
    return f"P5 16 16 {top}\n".encode() + np.full((16, 16), level).astype(kind).tobytes()


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (plain(60, "L"), (60, 60, 60)),
        (plain((9, 80, 200)), (9, 80, 200)),
        (plain((9, 80, 200, 255), "RGBA"), (9, 80, 200)),
        (plain((9, 80, 200)).quantize(4), (9, 80, 200)),
        (plain(1, "1"), (255, 255, 255)),
        (grey(60 * 257, np.uint16), (60, 60, 60)),
    ],
    ids=["grey", "colour", "alpha", "palette", "bits", "16-bit grey"],
)
def test_every_kind_of_png_keeps_its_colour(tmp_path, image, colour):
    image.save(tmp_path / "a.png")
    assert torch.equal(read(tmp_path / "a.png"), flat(colour))


@pytest.mark.parametrize(
    ("levels", "dtype", "expected"),
    [
        (np.linspace(0, 1, 16), np.float32, "all"),
        (np.linspace(-0.05, 1.05, 16), np.float32, "all"),
        (np.linspace(0, 255, 16), np.float32, "all"),
        (np.linspace(-500, 900, 16), np.float32, "all"),
        (np.linspace(0, 255, 16), np.int32, "all"),
        (np.linspace(0, 65535, 16), np.int32, "all"),
        (np.linspace(0, 65535, 16), np.uint16, "all"),
        (np.linspace(0, 2**31 - 1, 16), np.int32, "all"),
        (np.linspace(0, 2**32 - 1, 16), np.uint32, "all"),
        (np.linspace(-900, 70_000, 16), np.int32, "all"),
        (np.full(16, 0.5), np.float32, 128),
        (np.full(16, 60 * 257), np.int32, 60),
        (np.full(16, 100), np.uint16, 0),
    ],
)
def test_deep_grey_levels_are_scaled_by_the_range_that_holds_them(
    tmp_path, levels, dtype, expected
):
    rows = np.broadcast_to(levels[:, None], (16, 16)).astype(dtype)
    if dtype is np.uint32:
        write_uint32(tmp_path / "a.tif", rows)
    else:
        Image.fromarray(rows).save(tmp_path / "a.tif")
    seen = read(tmp_path / "a.tif", size=16, channels=1)[0, :, 0]
    ramp = torch.linspace(0, 255, 16)
    assert ((seen - (ramp if expected == "all" else expected)).abs() <= 13).all()
    if expected == "all":
        assert seen[[0, -1]].tolist() == [0, 255]


def write_uint32(path: Path, rows: np.ndarray) -> None:
    """A little-endian TIFF of unsigned 32-bit levels, which Pillow does not write."""
    height, width = rows.shape
    tags = [(256, width), (257, height), (258, 32), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4)]
    tags += [(277, 1), (278, height), (279, rows.nbytes)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + rows.astype("<u4").tobytes())


@pytest.mark.parametrize(("level", "top"), [(60 * 257, 65535), (241, 1023), (60, 255)])
def test_a_pgm_is_as_bright_as_its_own_white_says(tmp_path, level, top):
    (tmp_path / "a.pgm").write_bytes(pgm(level, top))
    assert torch.equal(read(tmp_path / "a.pgm"), flat((60, 60, 60)))


def test_what_is_no_number_is_black_and_a_file_of_nothing_else_is_refused(tmp_path):
    levels = np.full((16, 16), 0.5, dtype=np.float32)
    levels[:8] = np.nan
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif", channels=1)[0, :, 0].tolist()[::7] == [0, 128]
    Image.fromarray(levels * np.nan).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="finite"):
        read(tmp_path / "b.tif")


# Transparency


def logo(mode: str, hidden: object, disc: object) -> Image.Image:
    image = plain(hidden, mode, (16, 16))
    image.paste(disc, (4, 4, 12, 12))
    return image


HALF_CLEAR = {  # ways to be transparent but for the middle, which is black
    "RGBA": (logo("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), {}),
    "hidden red": (logo("RGBA", (255, 0, 0, 0), (0, 0, 0, 255)), {}),
    "grey and alpha": (logo("LA", (90, 0), (0, 255)), {}),
    "palette": (logo("RGBA", (255, 0, 0, 0), (0, 0, 0, 255)).quantize(4), {}),
    "one colour": (logo("RGB", (255, 0, 255), (0, 0, 0)), {"transparency": (255, 0, 255)}),
    "one level": (logo("L", 77, 0), {"transparency": 77}),
    "one of 16 bits": (
        Image.fromarray(np.asarray(logo("L", 77, 0)).astype(np.uint16) * 257),
        {"transparency": 77 * 257},
    ),
}


@pytest.mark.parametrize("kind", HALF_CLEAR)
@pytest.mark.parametrize(
    ("background", "colour"),
    [("white", (255, 255, 255)), ("#ff8000", (255, 128, 0)), ("black", (0, 0, 0))],
)
def test_behind_what_is_transparent_lies_the_background(tmp_path, kind, background, colour):
    image, options = HALF_CLEAR[kind]
    image.save(tmp_path / "a.png", **options)
    seen = read(tmp_path / "a.png", 16, background=background)
    expected = flat(colour, 16).clone()
    expected[:, 4:12, 4:12] = 0
    assert torch.equal(seen, expected)


def test_a_half_transparent_colour_is_mixed_with_the_background(tmp_path):
    plain((200, 0, 0, 128), "RGBA").save(tmp_path / "a.png")
    seen = read(tmp_path / "a.png", background="black")
    assert (seen - flat((100, 0, 0)).float()).abs().max() <= 1


@pytest.mark.parametrize("colour", ["no colour", "#ff80", "rgba(0,0,0,0)", ""])
def test_a_background_that_is_no_opaque_colour_is_refused(tmp_path, colour):
    if colour == "#ff80":  # red, green, blue and alpha
        Image.new("RGBA", (1, 1), colour)
    with pytest.raises(UserError, match="--background"):
        data.load(str(tmp_path), form=Form(background=colour))


# Shapes


def test_a_fine_checkerboard_becomes_grey_and_no_moire(tmp_path):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png", channels=1).float() - 127.5).abs().max() < 2


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("width", "height"), [(900, 600), (301, 700), (64, 64)])
def test_a_large_image_is_its_middle_square_reduced(tmp_path, suffix, width, height):
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 40), np.cos(y / 60), np.sin((x + y) / 90)], -1)
    image = Image.fromarray((127.5 + 120 * waves).astype(np.uint8))
    image.save(tmp_path / f"a.{suffix}", quality=98)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    exact = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS, box)).astype(float)
    seen = read(tmp_path / f"a.{suffix}", 16).permute(1, 2, 0).numpy()
    assert np.abs(seen - exact).max() <= 4
    assert np.abs(seen - exact).mean() < 0.6


def test_a_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    noise(size=1024).save(tmp_path / "a.jpg")
    sizes, formed = [], image_file._formed

    def noted(image: Image.Image, *rest) -> torch.Tensor:
        sizes.append(image.size)
        return formed(image, *rest)

    monkeypatch.setattr(image_file, "_formed", noted)
    read(tmp_path / "a.jpg", 16)
    assert sizes == [(128, 128)]


# Upright


def oriented(value: int) -> bytes:
    """EXIF of that orientation, with XResolution stored as text, which Pillow cannot write back."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, value, 0)
    entries += struct.pack(">HHI4s", 0x011A, 2, 4, b"72\0\0")
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + struct.pack(">I", 0)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "odd"])
@pytest.mark.parametrize("value", range(1, 9))
def test_an_image_is_turned_the_way_its_camera_was_held(tmp_path, value, kind):
    upright = plain(0, "L", (16, 32))  # white above, and a white spot in the lower left
    upright.paste(255, (0, 0, 16, 8))
    upright.paste(255, (0, 24, 4, 32))
    back = image_file.TURNS | {6: image_file.TURNS[8], 8: image_file.TURNS[6]}
    stored = upright.convert("RGB")
    if value > 1:
        stored = stored.transpose(back[value])
    exif = Image.Exif()
    exif[0x0112] = value
    path = tmp_path / f"a.{'jpg' if kind == 'odd' else kind}"
    kept = {"lossless": True} if kind == "webp" else {"quality": 95}
    stored.save(path, exif=oriented(value) if kind == "odd" else exif, **kept)
    seen = read(path, 16, channels=1)[0].float()
    expected = np.asarray(upright.crop((0, 8, 16, 24))).astype(float)
    assert np.abs(seen.numpy() - expected).mean() < 8


# What is an image


def test_images_of_all_sizes_below_a_folder_become_one_size(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    plain((250, 0, 0), size=(40, 12)).save(tmp_path / "inner" / "wide.PNG")
    plain((0, 250, 0), size=(5, 9)).save(tmp_path / "small.jpg")
    plain((0, 0, 250), size=(16, 16)).save(tmp_path / "whole.webp", lossless=True)
    dataset = data.load(str(tmp_path), form=Form(16))
    images = dataset.train.images
    assert images.shape == (3, 3, 16, 16)
    assert images.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    assert (dataset.train.condition, dataset.kinds) == ({}, {})
    said = said_by(capsys)
    assert said.startswith(f"{tmp_path}: images 3 images found, 3 taken, 0 skipped sizes 5x9 to ")


def test_a_folder_can_be_read_in_grey(tmp_path):
    plain((255, 255, 255)).save(tmp_path / "a.png")
    plain((0, 0, 0)).save(tmp_path / "b.png")
    images = data.load(str(tmp_path), form=Form(8, 1)).train.images
    assert images[:, 0, 0, 0].tolist() == [255, 0]
    assert images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "suffix",
    ["apng", "avif", "bmp", "gif", "ico", "jfif", "jp2", "jpe", "pcx", "pgm", "pnm", "tga", "tiff"],
)
def test_files_of_every_kind_that_pillow_opens_are_taken(tmp_path, suffix):
    try:
        noise().convert("L" if suffix == "pgm" else "RGB").save(tmp_path / f"a.{suffix}")
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow writes no .{suffix}")
    assert len(image_folder.look(tmp_path).files) == 1
    assert len(data.load(str(tmp_path)).train) == 1


@pytest.mark.parametrize("suffix", ["pdf", "eps", "ps", "mpg", "h5", "wmf", "txt", "heic", ""])
def test_what_pillow_does_not_open_as_a_picture_is_not_taken_but_counted(tmp_path, suffix, capsys):
    noise().save(tmp_path / "a.png")
    (tmp_path / f"b.{suffix}".strip(".")).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    data.load(str(tmp_path))
    name = f".{suffix}" if suffix else "none"
    assert f"passed over 1 with other suffixes ({name} 1)" in said_by(capsys)


def test_a_program_for_a_printer_is_not_run_for_being_named_png(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(image_file.UnidentifiedImageError):
        read(tmp_path / "b.png")


def test_hidden_files_and_folders_are_no_data(tmp_path, capsys):
    (tmp_path / ".thumbnails").mkdir()
    for name in ("a.png", "._a.png", ".thumbnails/b.png"):
        noise().save(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    assert len(data.load(str(tmp_path)).train) == 1
    said = said_by(capsys)
    assert "1 images found" not in said
    assert "1 image found, 1 taken, 0 skipped passed over 2 hidden (._a.png, .thumbnails)" in said
    assert len(data.load(str(tmp_path / ".thumbnails")).train) == 1  # where it is named


def test_linked_folders_are_followed_once_and_never_in_a_circle(tmp_path, capsys):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder, seed in ((photos / "inner", 0), (elsewhere / "deep", 1)):
        folder.mkdir(parents=True)
        noise(seed).save(folder / "x.png")
    for name, target in (
        ("a", photos / "inner"),  # counted already
        ("b", elsewhere),
        ("c", elsewhere / "deep"),  # within b
        ("d", photos),
        ("e", tmp_path),
        ("f", "f"),
        ("gone", "nothing"),
        ("gone.png", "nothing"),
    ):
        (photos / name).symlink_to(target)
    (elsewhere / "back").symlink_to(photos)
    names = [file.name for file in image_folder.look(photos).files]
    assert names == ["b/deep/x.png", "inner/x.png"]
    assert len(data.load(str(photos)).train) == 2
    said = said_by(capsys)
    assert "1 linked to a folder around this one (e)" in said
    assert "1 linked to nothing (gone.png)" in said


def test_folders_that_cannot_be_listed_are_named(tmp_path, capsys, monkeypatch):
    for name in ("a", "private"):
        (tmp_path / name).mkdir()
        noise().save(tmp_path / name / "x.png")
    scandir = os.scandir

    def refuse(place: Path | int):  # or an open folder, as shutil's rmtree gives it
        if not isinstance(place, int) and Path(place).name == "private":
            # raised here, since root may read what others may not
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(data.load(str(tmp_path)).train) == 1
    assert "1 that could not be listed (private)" in said_by(capsys)


def test_a_pipe_named_png_is_never_opened(tmp_path, capsys, monkeypatch):
    noise().save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    opened, before = [], image_file.read
    monkeypatch.setattr(
        image_file, "read", lambda path, form: opened.append(path.name) or before(path, form)
    )
    assert len(data.load(str(tmp_path)).train) == 1
    assert opened == ["a.png"]
    assert "2 other than plain files (link.png, pipe.png)" in said_by(capsys)


def test_pictures_of_the_suites_own_are_no_training_images(tmp_path, monkeypatch, capsys):
    noise().save(tmp_path / "a.png")
    (tmp_path / "runs").mkdir()  # a name that a user may have given, too
    noise(1).save(tmp_path / "runs" / "marathon.png")
    folders.claim(tmp_path / "runs" / "photos" / "teacher")
    noise(2).save(tmp_path / "runs" / "photos" / "teacher" / "samples.png")
    old = tmp_path / "runs" / "photos" / "compare" / "deep"  # from before there were marks
    old.mkdir(parents=True)
    record = {"run": "r", "sha256": "0", "sampler": "ddim"}
    (old.parent / "results.jsonl").write_text(json.dumps(record) + "\n")
    noise(3).save(old / "x.png")
    monkeypatch.chdir(tmp_path)
    assert len(data.load(".").train) == 2
    said = said_by(capsys)
    assert "2 made by fewstep (runs/photos/compare, runs/photos/teacher)" in said
    with pytest.raises(UserError, match="was made by a command of fewstep"):
        data.load("runs/photos/teacher")


# What is skipped


def cut(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def test_broken_files_are_named_counted_and_skipped_with_their_reason(tmp_path, capsys):
    noise().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes(cut(noise(), "PNG"))
    (tmp_path / "cut.jpg").write_bytes(cut(noise(), "JPEG"))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.gif").touch()
    assert len(data.load(str(tmp_path), form=Form(8)).train) == 1
    assert (
        "5 images found, 1 taken, 4 skipped: 2 cut short (cut.jpg, cut.png), "
        "1 empty (empty.gif), 1 not recognised as images (text.png) sizes"
    ) in said_by(capsys)


def damaged_dds() -> bytes:
    buffer = io.BytesIO()
    noise().save(buffer, "DDS")
    raw = bytearray(buffer.getvalue())
    raw[80:100] = b"\xff" * 20  # its pixel format
    return bytes(raw)


@pytest.mark.parametrize("kind", ["AVIF", "DDS"])
def test_what_a_decoder_makes_of_damaged_content_does_not_end_the_loading(tmp_path, kind, capsys):
    noise().save(tmp_path / "a.png")
    if kind == "DDS":
        (tmp_path / "b.png").write_bytes(damaged_dds())
    else:
        buffer = io.BytesIO()
        noise().save(buffer, "AVIF")
        raw = bytearray(buffer.getvalue())
        raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
        (tmp_path / "b.png").write_bytes(raw[:-200])
    assert len(data.load(str(tmp_path)).train) == 1
    assert "1 skipped: 1 " in (said := said_by(capsys))
    assert "(b.png)" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("'<' not supported"), "with the error \"'<' not supported\""),
        (NotImplementedError("Unimplemented pixel format 7"), '"Unimplemented pixel format ..."'),
        (ZeroDivisionError(), 'with the error "ZeroDivisionError"'),
        (struct.error("unpack requires 4 bytes"), '"unpack requires ... bytes"'),
        (PermissionError(13, "Permission denied", "b.png"), "without permission to read"),
        (OSError(5, "Input/output error", "b.png"), 'with the error "Input/output error"'),
        (MemoryError(), "too large for the memory"),
        (KeyError("a\nb"), "with the error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_decoder_raises_names_the_file_and_the_reason(
    tmp_path, capsys, monkeypatch, error, words
):
    for name in ("a.png", "b.png"):
        noise().save(tmp_path / name)
    before = Image.open

    def broken(path: Path, *arguments, **options):
        if path.name == "b.png":
            raise error
        return before(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", broken)
    assert len(data.load(str(tmp_path)).train) == 1
    said = said_by(capsys)
    assert "2 images found, 1 taken, 1 skipped: 1 " + words.split('"')[0] in said
    assert words in said
    assert "(b.png)" in said
    assert said.count("images found") == 1


def test_a_png_with_long_texts_is_read(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 3_000_000, zip=True)
    noise().save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(ValueError, match="too large"):
        Image.open(tmp_path / "a.png").load()
    assert data.load(str(tmp_path), form=Form(32)).train.images.equal(
        torch.from_numpy(np.array(noise())).permute(2, 0, 1)[None]
    )


def test_a_picture_of_many_megapixels_is_read_up_to_a_limit_that_is_told(
    tmp_path, monkeypatch, capsys
):
    noise(size=64).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it refuses twice as many
    assert len(data.load(str(tmp_path)).train) == 1
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(image_file, "MOST_PIXELS", 3_000_000)
    plain(0, "L", (2000, 2000)).save(tmp_path / "b.png")
    plain(0, "L", (2000, 2000)).save(tmp_path / "c.jpg")  # which is decoded smaller
    assert len(data.load(str(tmp_path)).train) == 2
    assert "3 images found, 2 taken, 1 skipped: 1 of more than 3 megapixels (b.png)" in (
        said_by(capsys)
    )


def test_a_name_that_no_terminal_shows_is_written_out(tmp_path, capsys):
    noise().save(tmp_path / "a.png")
    (tmp_path / os.fsdecode(b"\xff\n.png")).write_text("no image")
    data.load(str(tmp_path))
    assert r"(\udcff\n.png)" in said_by(capsys)


def test_a_folder_without_a_whole_image_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        data.load(str(tmp_path))
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match=r"holds no images.*1 with other suffixes \(\.heic 1\)"):
        data.load(str(tmp_path))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"could be read: 1 not recognised as images \(text.png\)"):
        data.load(str(tmp_path))


def test_images_of_one_colour_throughout_are_refused(tmp_path):
    plain(7, "L").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="same value"):
        data.load(str(tmp_path))


def test_every_tenth_image_of_a_large_folder_is_held_out(tmp_path):
    for i in range(100):
        plain(i, "L", (8, 8)).save(tmp_path / f"{i:03d}.png")
    dataset = data.load(str(tmp_path), form=Form(8, 1))
    assert dataset.test.images[:, 0, 0, 0].tolist() == list(range(9, 100, 10))
    assert len(dataset.train) == 90


# The cache


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded, as they are."""
    names, before = [], image_file.read
    monkeypatch.setattr(
        image_file, "read", lambda path, form: names.append(path.name) or before(path, form)
    )
    return names


def test_files_that_stay_as_they_are_are_decoded_once(tmp_path, decoded, capsys):
    noise().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    load = partial(data.load, str(tmp_path))
    first, said = load().train.images, said_by(capsys)
    assert sorted(decoded) == ["a.png", "b.png"]
    assert load().train.images.equal(first)
    assert (sorted(decoded), said_by(capsys)) == (["a.png", "b.png"], said)
    for form in (Form(16), Form(channels=1), Form(background="black")):
        decoded.clear()
        load(form=form)
        assert len(decoded) == 2


@pytest.mark.parametrize("change", ["content", "same size and time", "new", "gone", "name"])
def test_a_folder_that_changed_is_decoded_anew(tmp_path, decoded, change):
    for i, name in enumerate(("a.bmp", "b.bmp")):
        noise(i).save(tmp_path / name)
    before = data.load(str(tmp_path)).train.images
    decoded.clear()
    file = tmp_path / "a.bmp"
    times = file.stat()
    if change == "gone":
        file.unlink()
    elif change == "name":
        file.rename(tmp_path / "c.bmp")
    elif change == "new":
        noise(2).save(tmp_path / "c.bmp")
    else:
        noise().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
        if change == "same size and time":
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert (file.stat().st_size, file.stat().st_mtime_ns) == (
                times.st_size,
                times.st_mtime_ns,
            )
    after = data.load(str(tmp_path)).train.images
    assert decoded
    assert not (before.shape == after.shape and before.equal(after))


@pytest.mark.parametrize("part", ["rows", "safetensors"])
@pytest.mark.parametrize("harm", [b"", b"damaged", None], ids=["empty", "text", "a flipped bit"])
def test_a_damaged_cache_is_made_anew(tmp_path, decoded, monkeypatch, harm, part):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (tmp_path / "photos").mkdir()
    noise().save(tmp_path / "photos" / "a.png")
    first = data.load(str(tmp_path / "photos")).train.images
    (path,) = (tmp_path / "cache" / "images").glob(f"*.{part}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if harm is None else harm)
    assert data.load(str(tmp_path / "photos")).train.images.equal(first)
    assert decoded == ["a.png"] * 2
    assert data.load(str(tmp_path / "photos")).train.images.equal(first)
    assert decoded == ["a.png"] * 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "cache")
    (tmp_path / "photos").mkdir()
    noise().save(tmp_path / "photos" / "a.png")
    assert len(data.load(str(tmp_path / "photos")).train) == 1


def test_a_file_that_may_be_read_another_time_is_tried_again(tmp_path, monkeypatch):
    for i, name in enumerate(("a.png", "b.png")):
        noise(i).save(tmp_path / name)
    with monkeypatch.context() as patch:
        before = image_file.read

        def refuse(path: Path, form: Form) -> torch.Tensor:
            if path.name == "b.png":
                raise PermissionError(13, "Permission denied", str(path))
            return before(path, form)

        patch.setattr(image_file, "read", refuse)
        assert len(data.load(str(tmp_path)).train) == 1
    assert len(data.load(str(tmp_path)).train) == 2


def test_the_loading_of_many_bytes_shows_its_progress(tmp_path, monkeypatch, capsys):
    for i in range(3):
        noise(i).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(decoding, "SLOW", 1000)
    data.load(str(tmp_path))
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path.name}  3/3  images read")
    assert "3 images found" in "".join(others)


# Classes


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    """Folders of images; every image of one class has its own grey level."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            plain((10 + 50 * number,) * 3).save(folder / name / f"{i:03d}.png")


def test_a_folders_own_folders_are_its_classes_where_that_is_asked_for(tmp_path, capsys):
    write_classes(tmp_path, {"apples": 60, "cars/red": 30, "trees": 30})
    dataset = data.load(str(tmp_path), form=Form(8), classes=True)
    assert dataset.num_classes == 3
    assert "3 classes: 0 apples (60), 1 cars (30), 2 trees (30)" in said_by(capsys)
    for part in (dataset.train, dataset.test):
        levels = part.images[:, 0, 0, 0].long()
        assert torch.equal(part.condition["label"], (levels - 10) // 50)
    assert dataset.test.condition["label"].bincount().tolist() == [6, 3, 3]


def test_a_file_that_is_skipped_takes_no_other_files_class(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 2})
    (tmp_path / "a" / "000.png").write_bytes(b"no image")
    dataset = data.load(str(tmp_path), form=Form(8), classes=True)
    assert dataset.train.condition["label"].tolist() == [0, 0, 1, 1]


def test_classes_are_another_dataset_than_the_same_images_without(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    with_classes = data.load(str(tmp_path), form=Form(8), classes=True)
    without = data.load(str(tmp_path), form=Form(8))
    assert with_classes.spec.sha256 != without.spec.sha256
    assert without.num_classes == 0
    again = data.reload(with_classes.spec)
    assert again.spec == with_classes.spec
    assert again.num_classes == 2


def test_an_image_without_a_class_is_named(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    plain((5, 5, 5)).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"1 images .*\(loose.png\).*--num-classes"):
        data.load(str(tmp_path), form=Form(8), classes=True)
