"""Records changed by rule: each is refused in one line that names the field, or makes a table."""

import json
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import record

from benchmarks.changes import VALUES, changed, places
from diffusion.console import UserError
from diffusion.files import CHECKSUM
from eval.results import jsonl
from eval.show import closing, provenance, table, verdict
from eval.show.lines import comparison
from tests.faults.test_cards import JSON

ROWS = [
    record("teacher", 8, others={"kid": [0.5, 0.1]}, held_out={"kid": 0.1},
           likelihood={"variational-bound": 3.5, "variational-bound-error": 0.1, "images": 90}),
    record("student", 2, parent="0" * 64, others={"kid": [0.7, 0.2]}, held_out={"kid": 0.1}),
]  # fmt: skip
HEAD, TEACHER, STUDENT = (
    {name: value for name, value in json.loads(line).items() if name != CHECKSUM}
    for line in jsonl.lines(ROWS).splitlines()
)  # without a checksum, as a program of someone else's writes them
PLACES = [("head", path) for path in places(HEAD)] + [("row", path) for path in places(STUDENT)]


def show(text: str, path) -> None:
    """Read the lines and show them in every way."""
    path.write_text(text, "utf-8", "surrogatepass")
    records = jsonl.read(path)
    if not records:
        return
    compared = comparison(records, True)
    for form in table.FORMATS.values():
        form(compared)
    verdict.sentences(compared.lines)
    verdict.best_by_calls(compared.lines)
    closing.take(compared.lines)
    provenance.facts(compared.lines, records, [])
    provenance.measured(compared.lines)
    provenance.checkpoints(compared.lines)


def text_of(which: str, path: tuple, value: object) -> str:
    head = changed(HEAD, path, value) if which == "head" else HEAD
    student = changed(STUDENT, path, value) if which == "row" else STUDENT
    return "".join(json.dumps(line) + "\n" for line in (head, TEACHER, student))


def test_there_are_more_than_a_thousand_changes(tmp_path):
    assert len(PLACES) * len(VALUES) > 1000
    show(text_of("head", ("num_images",), 100), tmp_path / "r.jsonl")


def refusal(text: str, file: Path) -> str:
    """What is said where that is no record; nothing where a table is made of it."""
    try:
        show(text, file)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("which", "path"), PLACES, ids=lambda x: x if isinstance(x, str) else ".".join(map(str, x))
)
def test_a_changed_record_is_refused_in_one_line_or_makes_a_table(tmp_path, which, path):
    file = tmp_path / "r.jsonl"
    for value in VALUES:
        message = refusal(text_of(which, path, value), file)
        assert "\n" not in message
        assert len(message) < 400


@given(
    which=st.sampled_from(PLACES), value=JSON, cut=st.integers(0, 4000), noise=st.text(max_size=4)
)
def test_any_text_is_records_or_one_line(which, value, cut, noise):
    text = text_of(*which, value)
    for each in (text, text[:cut] + noise + text[cut:], "[" * cut):
        with NamedTemporaryFile() as file:
            assert "\n" not in refusal(each, Path(file.name))
