"""The samples of a report: the same noise through every row, and the nearest training images."""

from html import escape
from pathlib import Path

from torch import Tensor

from diffusion import data as datasets
from diffusion.console import UserError, say
from diffusion.data import Dataset
from diffusion.image_file import Form
from eval.measure import sets
from eval.show import pages
from eval.show.lines import Line
from eval.show.pages.verdict import calls, named


def same_noise(found: list[Line], images: dict[str, Tensor]) -> str:
    """A strip per row, a group per method, with falling numbers of steps; images: by tag."""
    shown = [line for line in found if line.record.tag in images]
    if not shown:
        return ""
    groups = []
    for title in dict.fromkeys(line.title for line in shown):
        own = [line for line in shown if line.title == title]
        own.sort(key=lambda line: -line.record.steps)
        groups.append([(_label(line), images[line.record.tag]) for line in own])
    if "real" in images:
        groups.append([("real images", images["real"])])
    return (
        "<section><h2>The same noise through every row</h2>"
        '<p class="note">A column begins from one noise; the last figure is the quality. A sampler that draws '
        f"more noise on its way may end elsewhere.</p>{pages.strips(groups)}</section>"
    )


def _label(line: Line) -> str:
    figures = f"{calls(line.record.nfe)}, {line.record.score:.3g}"
    return f"{escape(line.title)} <span>{figures}</span>"


def nearest(line: Line, made: Tensor, data: str | None, data_dir: Path | None) -> str:
    """Its images, and below each the training image nearest to it; "" where those are not at hand."""
    dataset = _dataset(line.record.data, made, data, data_dir)
    if dataset is None or dataset.train.shape[1:] != made.shape[1:]:
        return ""
    distance, which = sets.nearest(made, dataset.train)
    usual = ""
    if len(dataset.test):
        held_out, _ = sets.nearest(dataset.test[:256], dataset.train)
        usual = f"; held-out real images lie {held_out.median():.0f} away"
    return (
        "<section><h2>Nearest training images</h2>"
        f'<p class="note">Below each image of {named(line)}, the training image nearest to it in root mean '
        f"square of the pixels' differences: {distance.median():.0f} of 255 in the median, at least "
        f"{distance.min():.0f}{usual}. A copy would be 0 away.</p>"
        f"{pages.strips([[('made', made), ('nearest', dataset.train[which])]])}</section>"
    )


def _dataset(real: dict, like: Tensor, data: str | None, data_dir: Path | None) -> Dataset | None:
    """The training images of a record, in the shape of others, or None with a line that says why.

    A report downloads nothing.
    """
    form = Form(like.shape[-1], like.shape[1], real.get("background", Form.background))
    try:
        name = data or datasets.at_hand(real["name"])
        dataset = datasets.load(name, data_dir, form, download=False)
        if real.get("sha256", "") not in ("", datasets.fingerprint(dataset.train)):
            raise UserError(f"{name} does not hold the images that were measured against")
    except UserError as error:
        say(f"the nearest training images are left out: {error}")
        return None
    return dataset
