"""Self-contained web pages: templates filled here, with style, script and pictures inside."""

import base64
from pathlib import Path
from string import Template

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
