"""Imports point one way, and nothing unpickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "diffusion": {"diffusion"},
    "teachers": {"diffusion", "teachers"},
    "students": {"diffusion", "teachers", "students"},
    "distill": {"diffusion", "teachers", "students", "distill"},
    "eval": {"diffusion", "students", "eval"},
}
ROOMS = set(MAY_IMPORT)
MAY_IMPORT |= {
    "experiments": {*ROOMS, "experiments"},
    "benchmarks": {*ROOMS, "benchmarks"},
}
OURS = {*MAY_IMPORT, "tests"}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it points"
            yield node.module.split(".")[0]


RUN_CODE = {  # calls that can run code which a file holds, or which a text names
    "eval", "exec", "compile", "__import__", "import_module", "run_path", "run_module",
    "jit.load", "export.load", "package.PackageImporter", "hub.load", "yaml.load",
    "InceptionV3W", "register_custom_ops_library", "get_source_loader",
}  # fmt: skip
ALLOWED = {
    # --trust alone comes there, and the user's own function by its name
    "eval/measure/custom.py": {"jit.load", "export.load", "import_module"},
    "students/exported.py": {"export.load"},  # for load(..., trust=True) alone
    "students/formats.py": {"export.load"},  # of the file that it wrote itself
    "diffusion/networks/edm.py": {"export.load"},  # --trust alone comes there
    "diffusion/networks/module.py": {"import_module"},  # of a network that the user allowed
    "students/filters.py": {"import_module"},  # the user's own function by its name
    "benchmarks/gpu_stages.py": {"import_module"},  # of the suite's own commands
    "eval/measure/inception.py": {"InceptionV3W"},  # of a file whose sha256 is the published one
}


def code_from_files(tree: ast.AST) -> set[str]:
    """The names of RUN_CODE that a module calls, or imports under another name."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name(name)):
                names.add(name)
            case ast.Attribute(ast.Name(module) | ast.Attribute(_, module), name):
                names |= {name, f"{module}.{name}"} - {"compile", "eval"}  # torch's
            case ast.ImportFrom(module, aliases):
                names |= {f"{(module or '').split('.')[-1]}.{alias.name}" for alias in aliases}
                names |= {alias.name for alias in aliases if alias.asname}
    return names & RUN_CODE


def unsafe_loads(tree: ast.AST) -> list[int]:
    """Lines that call torch.load, or numpy's load, in a way that may unpickle."""
    safe = {"torch": ("weights_only", True), "np": ("allow_pickle", False)}
    lines = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("torch" | "np" as library), "load")):
                word, value = safe[library]
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if given.get(word) is not value:
                    lines.append(node.lineno)
    return lines


def test_every_package_has_modules_to_walk():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_and_nothing_unpickles(path):
    tree = ast.parse(path.read_text())
    packages = set(imported(tree))
    assert packages & OURS <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    assert not packages & PICKLES
    assert unsafe_loads(tree) == []
    assert code_from_files(tree) <= ALLOWED.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path)", [1]),
        ("torch.load(path, weights_only=False)", [1]),
        ("torch.load(path, weights_only=True)", []),
        ("np.load(path, allow_pickle=True)", [1]),
    ],
)
def test_the_walk_sees_an_unsafe_load(source, unsafe):
    assert unsafe_loads(ast.parse(source)) == unsafe


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("torch.jit.load(path)", {"jit.load"}),
        ("from torch.jit import load", {"jit.load"}),
        ("loader = torch.export.load", {"export.load"}),
        ("exec(text)", {"exec"}),
        ("importlib.import_module(name)", {"import_module"}),
        ("network.eval(); torch.compile(network); re.compile(text)", set()),
    ],
)
def test_the_walk_sees_what_runs_code(source, names):
    assert code_from_files(ast.parse(source)) == names
