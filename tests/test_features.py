"""Extractors by name or by file: each does what it says, under a name that says what was used."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import data
from diffusion.console import UserError
from eval.measure import custom, features
from eval.measure.features import extractor
from eval.measure.inception import file_sha256
from eval.measure.real import Real


@pytest.fixture(scope="module")
def digits() -> Real:
    """The digits as the harness has them."""
    return Real.sample(data.load("digits"))


CPU = torch.device("cpu")


class Small(nn.Module):
    """A network of the user's own: 5 numbers of each grey 8 x 8 image, of which it wants two."""

    def __init__(self, normed: bool = False):
        super().__init__()
        self.project = nn.Linear(64, 5)
        self.norm = nn.BatchNorm1d(5) if normed else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[0] > 1
        return self.norm(self.project(images.float().flatten(1) / 255))


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that TorchScript is deprecated
        torch.jit.script(module.eval()).save(str(path))
    return path


def export(module: nn.Module, path: Path, batch: int | None = None) -> Path:
    images = torch.zeros(batch or 2, 1, 8, 8, dtype=torch.uint8)
    shapes = None if batch else {"images": {0: torch.export.Dim("batch", min=2)}}
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("save", [script, export])
def test_a_network_of_ones_own_gives_its_features_under_its_files_sha256(digits, tmp_path, save):
    torch.manual_seed(0)
    module = Small().eval()
    path = save(module, tmp_path / {script: "my net.pt", export: "my net.pt2"}[save])
    network = extractor(str(path), digits, CPU, trust=True)
    assert network.sha256 == file_sha256(path)
    assert network.name == f"fd-my-net-digits-{network.sha256[:8]}"
    assert network.dim == 5
    with torch.no_grad():
        for count in (1, 2, 100, 2 * custom.BATCH + 1):  # one batch and a single image beyond two
            images = digits.train[:count]
            expected = module(digits.train[: max(2, count)])[:count]
            torch.testing.assert_close(network.extract(images), expected)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_file_that_can_run_code_is_not_opened_unless_it_is_trusted(
    digits, tmp_path, suffix, monkeypatch
):
    path = tmp_path / f"net{suffix}"
    path.write_text("whatever it may do")
    monkeypatch.setattr(custom, "LOADERS", {".pt": None, ".pt2": None})
    with pytest.raises(UserError, match=r"can run code .*\.onnx .*module:.*--trust"):
        extractor(str(path), digits, CPU)


def write_onnx(module: Small, path: Path) -> Path:
    """The same network as an ONNX file, node by node."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = (p.detach().numpy() for p in module.project.parameters())
    values = {"weight": weight.T.copy() / 255, "bias": bias}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["rows"]),
            helper.make_node("Gemm", ["rows", "weight", "bias"], ["features"]),
        ],
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, 8, 8])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 5])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def test_an_onnx_file_needs_no_trust(digits, tmp_path):
    module = Small().eval()
    path = write_onnx(module, tmp_path / "net.onnx")
    network = extractor(str(path), digits, CPU)
    assert network.name == f"fd-net-digits-{file_sha256(path)[:8]}"
    with torch.no_grad():
        for count in (1, 2, 300):
            expected = module(digits.train[: max(2, count)])[:count]
            torch.testing.assert_close(network.extract(digits.train[:count]), expected)


def test_where_onnxruntime_is_missing_the_line_says_how_to_get_it(digits, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_text("")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        extractor(str(tmp_path / "net.onnx"), digits, CPU)


def test_an_onnx_file_that_is_none_is_refused_in_one_line(digits, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_text("not a network")
    with pytest.raises(UserError, match=r"net\.onnx does not load") as refused:
        extractor(str(tmp_path / "net.onnx"), digits, CPU)
    assert "\n" not in str(refused.value)


def test_a_function_of_ones_own_is_known_by_its_file_and_a_network_by_its_weights_too(
    digits, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ours_to_judge.py").write_text(
        "import torch\n"
        "def means(images):\n    return images.float().mean((2, 3)).repeat(1, 3)\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))\n"
        "net[1].cast = net(torch.zeros(1, 1, 8, 8))\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = net\n"
        "    def forward(self, images):\n"
        "        return self.inner(images.float())\n"
        "whole = Net()\n"
    )
    place = "module:ours_to_judge"
    means = extractor(f"{place}:means", digits, CPU)
    assert means.dim == 3
    assert means.name == f"fd-means-digits-{means.sha256[:8]}"
    before = extractor(f"{place}:whole", digits, CPU).sha256
    with torch.no_grad():
        sys.modules["ours_to_judge"].net[1].bias += 1
    assert len({means.sha256, before, extractor(f"{place}:whole", digits, CPU).sha256}) == 3


@pytest.mark.parametrize("name", ["", "ours", "no.such.module:f", "json:nothing", "json:decoder"])
def test_a_name_that_is_no_function_is_refused_in_one_line(digits, name):
    with pytest.raises(UserError, match=f"--features module:{name}: ") as refused:
        extractor(f"module:{name}", digits, CPU)
    assert "\n" not in str(refused.value)


class Broken(nn.Module):
    """What a network may do wrong."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.fault == "not finite":
            return x.flatten(1).log()
        if self.fault == "four dimensions":
            return x
        if self.fault == "one row":
            return x.flatten(1)[:1]
        return x.view(2, -1)  # fixed batch


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("not finite", "not finite numbers"),
        ("four dimensions", r"made \(2, 1, 8, 8\) of 2 images: expected uint8 \(B, C, H, W\)"),
        ("one row", r"made \(1, 64\) of 2 images"),
        ("fixed batch", r"made \(2, 96\) of 3 images"),
    ],
)
def test_a_network_that_returns_something_else_is_refused(digits, tmp_path, fault, said):
    path = script(Broken(fault), tmp_path / "net.pt")
    with pytest.raises(UserError, match=said):
        extractor(str(path), digits, CPU, trust=True)


@pytest.mark.parametrize("batch", [2, 16])
def test_an_export_of_one_batch_size_is_refused_with_the_mend(digits, tmp_path, batch):
    path = export(Small().eval(), tmp_path / "net.pt2", batch)
    with pytest.raises(UserError, match="for any B; export with a dynamic batch dimension"):
        extractor(str(path), digits, CPU, trust=True)


def test_a_network_whose_images_see_each_other_is_refused_with_the_mend(digits, tmp_path):
    path = export(Small(normed=True).train(), tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"another batch: save the network after network\.eval"):
        extractor(str(path), digits, CPU, trust=True)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
@pytest.mark.parametrize("content", ["words", "weights"])
def test_a_file_that_is_no_network_is_refused_in_one_line(digits, tmp_path, suffix, content, capfd):
    path = tmp_path / f"net{suffix}"
    path.write_text("not a network")
    if content == "weights":
        torch.save(Small().state_dict(), path)
    with pytest.raises(UserError, match=r"net\.pt.? does not load: expected") as refused:
        extractor(str(path), digits, CPU, trust=True)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("choice", ["Inception", "cnn", "weights.pth", ""])
def test_an_unknown_choice_is_answered_with_all_choices(digits, choice):
    with pytest.raises(UserError, match=r"classifier, random, inception.*\.pt .*\.pt2 "):
        extractor(choice, digits, CPU)


def test_a_path_that_does_not_exist_is_named(digits, tmp_path):
    with pytest.raises(UserError, match=r"no file .*net\.pt2"):
        extractor(str(tmp_path / "net.pt2"), digits, CPU)


def test_weights_of_inception_for_another_extractor_are_refused(digits, tmp_path):
    with pytest.raises(UserError, match="--inception goes with --features inception"):
        extractor("random", digits, CPU, tmp_path)


def test_a_folders_metric_is_named_by_its_last_part_without_spaces(digits):
    spec = replace(digits.spec, name="/data/My pictures, 2024")
    network = extractor("random", replace(digits, spec=spec), CPU)
    assert network.name == f"fd-random-My-pictures-2024-{network.sha256[:8]}"


@pytest.fixture
def train(digits, monkeypatch, tmp_path) -> Callable[..., features.Extractor]:
    """(cache, dataset) -> the classifier after few steps."""
    monkeypatch.setattr(features, "STEPS", 40)
    return lambda cache="cache", dataset=digits: extractor(
        "classifier", dataset, CPU, cache=tmp_path / cache
    )


@pytest.fixture
def threads():
    """As many as before, after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_classifier_is_the_same_to_the_bit_whatever_the_random_numbers_and_the_threads(
    train, digits, threads
):
    networks = []
    for number in (1, 2):
        torch.manual_seed(number)
        torch.set_num_threads(number)
        before = torch.get_rng_state()
        networks.append(train(f"cache-{number}"))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == number
    first, second = networks
    assert first.name == second.name == f"fd-cnn-digits-{first.sha256[:8]}"
    assert first.accuracy == second.accuracy > 0.5
    images = digits.test[:50]
    assert torch.equal(first.extract(images), second.extract(images))
    assert first.extract(images).shape == (50, first.dim)
    assert first.dim <= 128


def test_the_classifier_is_trained_once_for_one_set_of_images_and_says_so(
    train, digits, monkeypatch, capsys
):
    first = train()
    assert "training the classifier of digits" in capsys.readouterr().out
    mirrored = train(dataset=replace(digits, train=digits.train.flip(-1)))  # under the same name
    assert mirrored.sha256 != first.sha256
    capsys.readouterr()
    monkeypatch.setattr(features, "_train", lambda *args: pytest.fail("trained again"))
    again = train()
    assert again.sha256 == first.sha256
    assert torch.equal(again.extract(digits.test), first.extract(digits.test))
    assert "training" not in capsys.readouterr().out


def test_the_classifiers_probabilities_agree_with_its_accuracy(train, digits):
    network = train()
    shares = network.probabilities(network.extract(digits.test))
    torch.testing.assert_close(shares.sum(1), torch.ones(len(digits.test)))
    right = (shares.argmax(1) == digits.test_labels).double().mean()
    assert float(right) == pytest.approx(network.accuracy)


def test_a_dataset_without_classes_has_no_classifier(train, digits):
    with pytest.raises(UserError, match="no classes to train a classifier on"):
        train(dataset=replace(digits, train_condition={}))


@pytest.mark.parametrize(("height", "size"), [(14, 4), (9, 4), (8, 4), (5, 3)])
def test_pooling_and_its_gradient_are_torchs(height, size):
    x = torch.randn(2, 3, height, height, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, size, size, dtype=torch.float64)
    pooled = [features._pool(x.float(), size), F.adaptive_avg_pool2d(x.float(), size)]
    gradients = [torch.autograd.grad((p * weights).sum(), x)[0] for p in pooled]
    torch.testing.assert_close(*pooled)
    torch.testing.assert_close(*gradients)
