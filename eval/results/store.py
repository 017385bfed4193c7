"""A comparison's folder: whole records in results.jsonl, begun ones in partial.jsonl, images."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from diffusion.console import UserError
from diffusion.files import Damaged, load_tensors, save_tensors, write_atomic
from eval.results import jsonl
from eval.results.records import Record


@dataclass
class Store:
    """Records by key and sample images by tag; every `put` is on disk before it returns."""

    folder: Path
    records: dict[tuple, Record]
    samples: dict[str, Tensor]

    @staticmethod
    def open(folder: Path) -> "Store":
        begun, whole = (jsonl.read(folder / name) for name in ("partial.jsonl", "results.jsonl"))
        store = Store(folder, {r.key: r for r in [*begun, *whole]}, samples_of(folder))
        PartialState().wait_for_everyone()  # all have read before the first writes
        return store

    def put(self, *changed: Record, images: dict[str, Tensor] | None = None) -> None:
        self.records |= {record.key: record for record in changed}
        self.samples |= images or {}
        if not PartialState().is_main_process:
            return
        records = self.records.values()
        whole = [record for record in records if len(record.quality) == len(record.seeds)]
        begun = [record for record in records if len(record.quality) < len(record.seeds)]
        # whole ones first: no record is ever in neither file
        texts = {"results.jsonl": jsonl.lines(whole), "partial.jsonl": jsonl.lines(begun)}
        if images:
            save_tensors(self.folder / "samples.safetensors", self.samples, {})
        for name, text in texts.items():
            write_atomic(self.folder / name, text)
        if not begun:
            (self.folder / "partial.jsonl").unlink()


def samples_of(folder: Path) -> dict[str, Tensor]:
    path = folder / "samples.safetensors"
    try:
        return load_tensors(path)[0] if path.exists() else {}
    except Damaged as error:
        raise UserError(
            f"{error}: delete it; pictures then lack the rows measured so far, and no figure "
            "is lost"
        ) from error
