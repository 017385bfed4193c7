"""A page in a real browser without a window: its DOM after a script, and its console's lines."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OFF = ("gpu", "quic", "sync", "background-networking", "component-update", "dev-shm-usage")
FLAGS = [f"--disable-{name}" for name in OFF]
FLAGS += ["--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
FLAGS += ["--dump-dom", "--virtual-time-budget=5000"]


class Opened(NamedTuple):
    dom: str
    console: list[str]


def browser(folder: Path) -> Callable[..., Opened]:
    """Open a page, run a script at its end: (path, script, address, width) -> what came of it.
    A page of a service is opened by its http address in the path's place, as it is.

    folder: for the browser's profile, kept from one page to the next. Skips the test where there
    is no browser.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")

    def open_page(
        path: Path | str, script: str = "", address: str = "", width: int = 800
    ) -> Opened:
        where = path
        if isinstance(path, Path):
            copy = folder / "copy.html"
            text = path.read_text().replace("</body>", f"<script>{script}</script></body>")
            copy.write_text(text)
            where = f"file://{copy}{address}"
        place = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
        command = [program, *FLAGS, *place, where]
        home = os.environ | {"HOME": str(folder)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=home)
        return Opened(done.stdout, [x for x in done.stderr.splitlines() if ":CONSOLE" in x])

    return open_page
