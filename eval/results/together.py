"""Records side by side: which may share a table, what each is called there, and merged files."""

from collections.abc import Iterable
from pathlib import Path

from diffusion.console import UserError
from eval.results.records import Record


def setting(record: Record, times: bool = True, most: int = 0) -> dict[str, str]:
    """What two rows of one table must have in common, by name. times: whether it shows times.

    most: images of the table's other rows; a long plan of fewer counts as one of as many.
    """
    images = max(record.num_images, most) if record.long else record.num_images
    extractor, real = record.extractor["sha256"][:8], record.data
    identities = (real.get(name, "")[:8] for name in ("sha256", "statistics"))
    pixels = "".join(f" {identity}" for identity in identities if identity)
    common = {
        "metric": record.metric if extractor in record.metric else f"{record.metric} {extractor}",
        "real images": f"{real['images']} of {Path(real['name']).name} {real['split']}{pixels}",
        "num images": str(images),
        "seeds": " ".join(map(str, record.seeds)),
    }
    if times:
        common["batch size"] = str(record.batch_size)
        common |= {name: str(value) for name, value in sorted(record.environment.items())}
    return common


def most_images(records: list[Record]) -> int:
    """The most images that a row is judged on, long plans apart; 0 where all are long."""
    return max((record.num_images for record in records if not record.long), default=0)


def fullest(records: list[Record]) -> Record:
    """The first row that is judged on as many images as any."""
    return max(records, key=lambda record: record.num_images)


def require_comparable(records: list[Record], times: bool = True) -> None:
    """UserError where rows cannot share a table, with the rows and what they differ in."""
    names = [f"{title} {r.steps}" for title, r in zip(titles(records), records, strict=True)]
    settings = [setting(record, times, most_images(records)) for record in records]
    differ = [name for name in _names(settings) if len({each.get(name) for each in settings}) > 1]
    if not differ:
        return
    groups: dict[str, list[str]] = {}
    for name, each in zip(names, settings, strict=True):
        kind = _few([f"{key} {each.get(key, 'unknown')}" for key in differ])
        groups.setdefault(kind, []).append(name)
    kinds = [f"{kind} in {_few(rows)}" for kind, rows in groups.items()]
    mend = "measure them alike"
    if times and not {*differ} & {*setting(records[0], times=False)}:
        mend += ", or leave the times out with --no-times"
    raise UserError(f"these rows cannot share a table: {_few(kinds, '; ')}: {mend}")


def titles(records: list[Record]) -> list[str]:
    """A name for each row's method; where two of one title and steps would be mixed up, with what
    tells them apart in brackets: guidance, a folder, the machine, or in the end the weights."""
    places = [_place(record) for record in records]
    apart: dict[str, list[str]] = {}
    for title in {record.title for record in records}:
        alike = [i for i, record in enumerate(records) if record.title == title]

        def kinds(keys: list[str], alike: list[int] = alike) -> int:
            return len({(records[i].steps, *(places[i].get(k) for k in keys)) for i in alike})

        keys: list[str] = []
        for key in _names([places[i] for i in alike]):
            if kinds([*keys, key]) > kinds(keys):
                keys.append(key)
        apart[title] = keys
    named = []
    for record, place in zip(records, places, strict=True):
        words = [place[key] for key in apart[record.title] if key in place]
        named.append(record.title + (f" [{', '.join(words)}]" if words else ""))
    return named


def _place(record: Record) -> dict[str, str]:
    """What may tell a row from one of its title: its guidance, the parts of its path from the last
    to the first, its machine, its batch size, its weights."""
    guided = "unguided" if record.guidance is None else f"guidance {record.guidance:g}"
    place = {"guidance": guided}
    place |= {f"part {i}": part for i, part in enumerate(reversed(Path(record.run).parts))}
    place |= {key: record.environment[key] for key in ("device", "precision")}
    place |= {k: f"{k} {v}" for k, v in record.environment.items() if k not in place}
    return place | {"batch": f"batch {record.batch_size}", "sha256": record.sha256[:8]}


def _names(groups: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for each in groups for name in each))


def _few(words: list[str], between: str = ", ", most: int = 3) -> str:
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return between.join(words[:most]) + "".join(f" {word}" for word in more)


def merge(lists: Iterable[list[Record]]) -> list[Record]:
    """Every measurement once, of equals the latest; teachers first, else in their order."""
    kept: dict[tuple, Record] = {}
    for record in (record for records in lists for record in records):
        if record.date > kept.setdefault(record.key, record).date:
            kept[record.key] = record
    return sorted(kept.values(), key=lambda record: record.parent is not None)
