"""What others made is scored as our own rows are: a folder, an .npz, an ONNX generator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import data
from diffusion.console import UserError
from diffusion.data import ImageSpec
from diffusion.noise import Noise
from eval import compare
from eval.compare import Options
from eval.measure import outside
from eval.measure.real import Real
from eval.show.lines import lines

CPU = torch.device("cpu")
GREY = ImageSpec("digits", 1, 8)


@pytest.fixture(scope="module")
def real() -> Real:
    return Real.sample(data.load("digits"))


def save(path: Path, images: torch.Tensor, name: str = "images") -> Path:
    np.savez(path, **{name: images.permute(0, 2, 3, 1).numpy()})
    return path


def save_folder(path: Path, images: torch.Tensor) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(path / f"{i:05d}.png")
    return path


def options(tmp_path: Path, *runs: Path, **others) -> Options:
    usual = {"data": "digits", "features": "random", "num_images": 300, "times": False}
    return Options(runs, **(usual | {"out": tmp_path / "compare"} | others))


def test_real_images_meet_the_floor_and_copies_and_collapse_are_marked(tmp_path, real):
    test, train = real.test, real.train
    made = [
        save_folder(tmp_path / "real", test),
        save(tmp_path / "copies.npz", train[:400]),
        save(tmp_path / "collapsed.npz", test[:2].repeat(200, 1, 1, 1), "arr_0"),
    ]
    records = compare.compare(options(tmp_path, *made, num_images=len(test)))
    fresh, copies, collapsed = lines(records)
    # the only draw of all held-out images: the floor is their distance, whatever their order
    assert fresh.record.score == pytest.approx(fresh.floor, rel=1e-6)
    assert fresh.warnings == ()
    assert copies.warnings == ("copies",)
    assert "collapsed" in collapsed.warnings
    assert collapsed.record.score > 10 * fresh.floor
    assert all(line.record.floor == fresh.record.floor for line in (copies, collapsed))


def test_what_was_scored_is_read_back_and_not_scored_again(tmp_path, real, monkeypatch):
    path = save(tmp_path / "theirs.npz", real.test)
    asked = options(tmp_path, path)
    (first,) = compare.compare(asked)
    monkeypatch.setattr(compare.Judge, "see", None)
    assert compare.compare(asked) == [first]
    assert (first.method, first.sampler, first.steps, first.nfe) == ("theirs", "npz", 0, 0)


def test_a_row_of_ours_and_one_of_others_share_a_table_and_the_yardstick(tmp_path, teacher, real):
    path = save(tmp_path / "theirs.npz", real.test)
    asked = options(tmp_path, teacher, path, data=None, steps="8", solvers=(), likelihood=0)
    ours, theirs = lines(compare.compare(asked))
    assert (ours.title, theirs.title) == ("teacher", "theirs")
    assert theirs.yardstick is ours.record
    assert theirs.ratio == theirs.record.score / max(ours.record.score, ours.floor)


def test_a_file_and_a_folder_of_the_same_images_are_the_same_images(tmp_path, real):
    path, folder = save(tmp_path / "x.npz", real.test), save_folder(tmp_path / "x", real.test)
    a, b = (outside.row(x, GREY, 20, (0, 1), (-1, 1), CPU) for x in (path, folder))
    assert a.sha256 == b.sha256
    rows = [a.codec.decode(a.x0(None, seed, torch.arange(20))) for seed in (0, 1)]
    for seed in (0, 1):
        assert torch.equal(rows[seed], b.codec.decode(b.x0(None, seed, torch.arange(20))))
    both = torch.cat(rows).flatten(1)
    assert len(both.unique(dim=0)) == 40  # no image is two seeds'
    where = (both[:, None] == real.test.flatten(1)[None]).all(2).int().argmax(1)
    assert not torch.equal(where.sort().values, where)  # nor are they the first, in their order


def write_generator(path: Path, whole: bool = False, batch: int | str = "B") -> Path:
    """noise -> itself, or as grey levels (noise + 1) * 127.5, clipped, channels last."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Identity", ["noise"], ["images"])]
    shape, kind = [batch, 1, 8, 8], TensorProto.FLOAT
    values = {"one": 1, "half": 127.5, "black": 0, "white": 255}
    if whole:
        nodes = [
            helper.make_node("Add", ["noise", "one"], ["a"]),
            helper.make_node("Mul", ["a", "half"], ["b"]),
            helper.make_node("Round", ["b"], ["c"]),
            helper.make_node("Clip", ["c", "black", "white"], ["d"]),
            helper.make_node("Cast", ["d"], ["e"], to=TensorProto.UINT8),
            helper.make_node("Transpose", ["e"], ["images"], perm=[0, 2, 3, 1]),
        ]
        shape, kind = [batch, 8, 8, 1], TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("images", kind, shape)],
        [numpy_helper.from_array(np.float32(value), name) for name, value in values.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("batch", ["B", 4])
def test_a_generator_makes_its_images_of_the_suites_noise(tmp_path, whole, batch):
    pytest.importorskip("onnxruntime")
    path = write_generator(tmp_path / "net.onnx", whole, batch)
    row = outside.row(path, GREY, 10, (3,), (-1, 1), CPU)
    numbers = torch.arange(5, 15)
    noise = next(iter(Noise(3, numbers, (1, 8, 8))))
    expected = ((noise + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    difference = row.codec.decode(row.x0(None, 3, numbers)).int() - expected.int()
    assert difference.abs().max() <= 1  # halves round either way
    assert difference.abs().double().mean() < 0.01


def test_a_generator_far_out_of_its_range_is_left_out_with_the_reason(tmp_path):
    pytest.importorskip("onnxruntime")
    path = write_generator(tmp_path / "net.onnx")
    asked = options(tmp_path, path, onnx_range=(-0.1, 0.1), num_images=100)
    with pytest.raises(UserError, match=r"net, onnx .*below black or above white"):
        compare.compare(asked)


def refused(asked: Options, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        compare.compare(asked)
    assert "\n" not in str(error.value)


def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path, real):
    few = save(tmp_path / "few.npz", real.test[:299])
    refused(options(tmp_path, few), r"holds 299 .*have 300: give --num-images 299")
    twice = options(tmp_path, few, num_images=200, seeds=(0, 1))
    refused(twice, "200 for each of 2 seeds: give --num-images 149")
    refused(options(tmp_path, few, data=None), "name with --data")
    large = save(tmp_path / "large.npz", torch.zeros(300, 1, 9, 9, dtype=torch.uint8))
    refused(options(tmp_path, large), r"\(1, 9, 9\).*\(1, 8, 8\)")
    refused(options(tmp_path, few, onnx_range=(1, 1)), "--onnx-range takes black and white")
    (tmp_path / "other.npz").write_bytes(few.read_bytes()[:-30])
    refused(options(tmp_path, tmp_path / "other.npz"), r"other\.npz: expected an \.npz")
    np.savez(tmp_path / "names.npz", samples=np.zeros((300, 8, 8, 1), np.uint8))
    refused(options(tmp_path, tmp_path / "names.npz"), "`images` or `arr_0`")
    refused(options(tmp_path, tmp_path / "none.onnx"), "no file .*generator")
