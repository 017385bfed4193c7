"""results.jsonl: JSON lines, a head wherever what rows share changes, and its rows below it."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from pydantic import TypeAdapter

from diffusion.console import UserError
from diffusion.files import CHECKSUM, Damaged, parse_object, sealed, verified, write_atomic
from diffusion.typed import checked
from eval.results.records import FORMAT, Head, Record, Row

HEAD, ROW = TypeAdapter(Head), TypeAdapter(Row)
SHARED = {each.name for each in fields(Head)}


def read(path: Path) -> list[Record]:
    """The records of a results file; none where there is no file. UserError names a bad line."""
    records: list[Record] = []
    head = None
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        place = f"{path}, line {number}"
        sealed_values = parse_object(line, place)
        values = {name: value for name, value in sealed_values.items() if name != CHECKSUM}
        version = values.get("format")
        if version == 2:
            shared, row = _split(upgraded(values))
            head = checked(HEAD, shared, place)
            records.append(_record(head, row, place))
        elif version is not None:
            if version not in (3, FORMAT):
                raise UserError(
                    f"{place}: format {version!r:.40}, expected {FORMAT}: measure again"
                )
            head = checked(HEAD, values | {"format": FORMAT}, place)  # 3 has no uncertainties
        elif head is None:
            raise UserError(f'{place}: expected a head line, with "format": {FORMAT}, before rows')
        else:
            records.append(_record(head, values, place))
        try:
            verified(sealed_values, place)  # last: a line that is wrong has its field named
        except Damaged as error:
            raise UserError(f"{error}; delete the line, and its rows are measured again") from error
    return records


def write(path: Path, records: list[Record]) -> None:
    write_atomic(path, lines(records))


def lines(records: list[Record]) -> str:
    """JSON lines, as `read` takes them. UserError names a figure that is not finite."""
    made: list[dict] = []
    head = None
    for record in records:
        place = f"the record of {record.run}, {record.sampler} in {record.steps} steps"
        shared, row = _split(_filled(record))
        # what is read has its fields in the schema's order, and so has what is written
        shared, row = _split(_filled(_record(checked(HEAD, shared, place), row, place)))
        made += [row] if shared == head else [shared, row]
        head = shared
    return "".join(json.dumps(sealed(line)) + "\n" for line in made)


def upgraded(values: dict) -> dict:
    """The fields of a line of format 2, head and row in one, under their names of today."""

    def renamed(node: dict) -> dict:
        return {"own_plan" if k == "own" else k: v for k, v in node.items() if k != "joules"}

    values = json.loads(json.dumps(values | {"format": FORMAT}), object_hook=renamed)
    noted = re.fullmatch(r"(.+) (searched|shift [\d.e+-]+)", str(values.get("method")))
    return values | {"method": noted[1], "note": noted[2]} if noted else values


def _split(values: dict) -> tuple[dict, dict]:
    """The head's fields, and the row's."""
    shared = {name: value for name, value in values.items() if name in SHARED}
    return shared, {name: value for name, value in values.items() if name not in SHARED}


def _filled(record: Record) -> dict:
    """Its fields without what is empty."""

    def filled(pairs: list[tuple[str, object]]) -> dict:
        return {name: value for name, value in pairs if value not in (None, "", (), [], {})}

    return asdict(record, dict_factory=filled)


def _record(head: Head, values: dict, place: str) -> Record:
    row = checked(ROW, values, place)
    if len(row.angles) != (row.steps + 1 if row.steps else 0):
        raise UserError(
            f"{place}: angles: expected one more than the {row.steps} steps, got {len(row.angles)}"
        )
    if bool(row.nfe) != bool(row.steps):
        known = "at least 1" if row.steps else "0, for its steps are not known"
        raise UserError(f"{place}: nfe: expected {known}, got {row.nfe}")
    each = {"quality": row.quality, "uncertainty": row.uncertainty, **row.others, **row.errors}
    for name, figures in each.items():
        if len(figures) > len(head.seeds):
            raise UserError(f"{place}: {name}: expected one a seed, got {len(figures)}")
    return Record(**vars(head), **vars(row))
