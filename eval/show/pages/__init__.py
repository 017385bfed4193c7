"""Self-contained web pages: templates filled here, with style, script and pictures inside."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import torch
from torch import Tensor

from diffusion.pictures import png

HERE = Path(__file__).parent


def fill(name: str, **values: str) -> str:
    """name.html with its $words replaced, and $style and $script by base.css, name.css and name.js.

    The values are put in as they are: whoever makes them escapes what came from outside.
    """
    style = "".join((HERE / file).read_text() for file in ("base.css", f"{name}.css"))
    script = (HERE / f"{name}.js").read_text()
    page = Template((HERE / f"{name}.html").read_text())
    return page.substitute(values, style=style, script=script)


def data_uri(image: Tensor) -> str:
    """(C, H, W) uint8, one, three or four channels (RGBA), as a PNG that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def strips(groups: Iterable[Sequence[tuple[str, Tensor]]]) -> str:
    """Groups of (label, images (N, C, H, W) uint8), each a picture with a clear pixel between two images."""
    parts = []
    for group in groups:
        for i, (label, images) in enumerate(group):
            n, _, height, width = images.shape
            film = torch.zeros(n, 4, height, width + 1, dtype=torch.uint8)
            film[:, :3, :, :-1] = images
            film[:, 3, :, :-1] = 255
            picture = data_uri(film.permute(1, 2, 0, 3).flatten(2))
            parts.append(
                f'<div class="who{"" if i else " first"}">{label}</div><div class="strip" '
                f'style="--n:{n}"><img alt="{n} images" src="{picture}"></div>'
            )
    return f'<div class="scroll"><div class="strips">{"".join(parts)}</div></div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """rows: the row's class, or "", and then its cells."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for kind, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
