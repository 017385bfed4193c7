"""What lies beside an exported model: README.md, MODEL_CARD.md and example.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch

from diffusion.condition import Guidance, Label
from diffusion.files import write_atomic
from diffusion.model import Model
from students.exported import FILES, About
from students.formats import Parity
from students.graph import Sampling
from students.judging import Row, interval

PAGES = Path(__file__).parent / "pages"
TYPES = {torch.int64: "int64", torch.float32: "float32"}


@dataclass(frozen=True)
class Written:
    """A model that was exported, and what was found of it."""

    about: About
    model: Model
    license: str
    holds: dict[str, str]
    """What is in each file, by its name."""
    parity: Sequence[Parity]
    judged: str
    """What fewer bits cost in quality, in words."""
    figures: Sequence[Row]
    """What eval.compare measured of these weights."""

    @property
    def file(self) -> str:
        """The file of the model; of a folder of several, the folder."""
        return FILES.get(self.about.format, ".")

    @property
    def calls(self) -> int:
        """Network calls for each image."""
        return self.model.calls(self.about.plan)

    @property
    def noise(self) -> tuple[int, ...]:
        """(draws C, H, W)."""
        channels, height, width = self.model.shape
        return self.about.draws * channels, height, width

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.model.denoiser.parameters())

    def inputs(self) -> list[tuple[str, str, str, str]]:
        """The name, shape, type and meaning of each of a graph's inputs."""
        example = Sampling(self.model, self.about.plan).inputs(
            self.model, 0, torch.arange(2, device=self.model.device)
        )
        return [
            (
                name,
                " x ".join(["B", *map(str, each.shape[1:])]),
                TYPES[each.dtype],
                self._says(name),
            )
            for name, each in zip(self.about.inputs, example, strict=True)
        ]

    def _says(self, name: str) -> str:
        kind = self.model.kinds.get(name)
        if name == "noise":
            return "standard normal noise"
        if name == "guidance":
            return f"the guidance weight, such as {self.about.plan.guidance:g}"
        return f"a class, from 0 to {kind.num_classes - 1}" if isinstance(kind, Label) else name

    def lines(self, library: str) -> list[str]:
        """The lines of an example that give the inputs beside the noise of n images."""
        lines = []
        for name, kind in self.model.kinds.items():
            if isinstance(kind, Label):
                lines.append(f'inputs["{name}"] = {library}.arange(n) % {kind.num_classes}')
            elif not isinstance(kind, Guidance):
                size = ", ".join(map(str, ("n", *kind.rows(torch.arange(1)).shape[1:])))
                given = f"{library}.zeros(({size}), dtype={library}.float32)"
                lines.append(f'inputs["{name}"] = {given}')
        if "guidance" in self.about.inputs:
            given = f"{library}.full((n,), {self.about.plan.guidance}, dtype={library}.float32)"
            lines.append(f'inputs["guidance"] = {given}')
        return lines


def write_pages(written: Written, folder: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    values = {
        "written": written,
        "about": written.about,
        "plan": written.about.plan,
        "card": written.about.card,
        "data": written.model.spec,
        "latent": written.model.shape,
        "interval": interval,
        "threads": torch.get_num_threads(),
    }
    pages = {"README.md": "README.md", "MODEL_CARD.md": "MODEL_CARD.md"}
    for name, page in (pages | {"example.py": f"example_{written.about.format}.py"}).items():
        write_atomic(folder / name, environment.get_template(f"{page}.jinja").render(values))
