"""What was found at a place of images, in one short table: numbers, and what becomes of them."""

import math
from collections import Counter

from rich.table import Table

from diffusion.console import UserError, plain, present, say
from diffusion.decoding import Decoded, Labels, Listing, listed
from diffusion.image_file import Form
from diffusion.images import InMemory
from diffusion.machine import in_bytes

MODES = {  # Pillow's words in ours
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "of a palette",
    "RGB": "colour",
    "RGBA": "colour with alpha",
    "I": "grey of 32 bits",
    "F": "grey of floats",
    "I;16": "grey of 16 bits",
}


def show(
    listing: Listing, decoded: Decoded, form: Form, labels: Labels | None, held_out: int
) -> None:
    """Print the table. labels: of the images that were taken, where they were asked for."""
    skipped, total = sum(map(len, decoded.skipped.values())), len(listing.names)
    again = decoded.repeated
    rows = {
        "images": f"{total:,} image{'s' * (total > 1)} found, {total - skipped:,} taken, "
        f"{skipped:,} skipped" + (f": {listed(decoded.skipped)}" if skipped else ""),
        "passed over": listed(listing.passed),
        "sizes": _sizes(decoded, form),
        "kinds": _kinds(decoded, form),
        "classes": _classes(listing, decoded, labels),
        "captions": _captions(listing, decoded),
        "repeated": f"{again:,} have the same pixels as another" * bool(again),
        "held out": _held_out(listing, held_out),
        "kept": _kept(decoded),
    }
    table = Table.grid(padding=(0, 2))
    for name, words in rows.items():
        if words:
            table.add_row("", name, plain(words))
    say(f"{listing.place}:")
    present(table)


def _sizes(decoded: Decoded, form: Form) -> str:
    (usual, count), *others = decoded.tally.sizes.most_common()
    words = f"all {usual}"
    if others:
        areas = {size: math.prod(map(int, size.split("x"))) for size in decoded.tally.sizes}
        least, most = min(areas, key=areas.__getitem__), max(areas, key=areas.__getitem__)
        words = f"{least} to {most}, most often {usual} ({count:,})"
    odd = sum(n for size, n in decoded.tally.sizes.items() if len({*size.split("x")}) > 1)
    becomes = {"crop": "the middle is taken", "pad": f"padded with {form.background}"}[form.aspect]
    squares = f"; {odd:,} not square: {becomes}" if odd else ""
    return f"{words}; brought to {form.size}x{form.size}{squares}"


def _kinds(decoded: Decoded, form: Form) -> str:
    """Such as: 100 colour, 8 colour with alpha (on white), 4 turned upright."""
    counts: Counter[str] = Counter()
    for mode, count in decoded.tally.modes.items():
        counts[MODES.get(mode.partition(";")[0] if mode not in MODES else mode, mode)] += count
    words = [
        f"{count:,} {name}" + f" (on {form.background})" * name.endswith("alpha")
        for name, count in counts.most_common()
    ]
    turned = decoded.tally.turned
    return ", ".join(words + [f"{turned:,} turned upright by their EXIF tag"] * bool(turned))


def _classes(listing: Listing, decoded: Decoded, labels: Labels | None) -> str:
    if labels is None:
        try:
            count = len(listing.labels(decoded.taken).names)
        except UserError:
            return ""
        return f"{count:,}, not used without --num-classes {count}" if count > 1 else ""
    counts = Counter(labels.numbers)
    words = [f"{i} {name} ({counts[i]:,})" for i, name in enumerate(labels.names)]
    return f"{len(words):,} classes: {', '.join(words)}"


def _captions(listing: Listing, decoded: Decoded) -> str:
    try:
        words = [len(text.split()) for text in listing.captions(decoded.taken) if text]
    except UserError as error:
        return f"none that can be read: {error}"
    if not words:
        return ""
    few, many = min(words), max(words)
    return f"{len(words):,} of {len(decoded.taken):,} images, of {few} to {many} words"


def _held_out(listing: Listing, count: int) -> str:
    if listing.held_out is None:
        return f"{count:,}, every tenth" if count else "none, as there are fewer than 100"
    return f"{count:,}, of a split of their own"


def _kept(decoded: Decoded) -> str:
    size = in_bytes(len(decoded.images) * math.prod(decoded.images.shape))
    if isinstance(decoded.images, InMemory):
        return f"{size} of memory"
    return f"{size} on disk, as they are more than a quarter of the free memory"
