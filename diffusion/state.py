"""What a stopped training resumes from: a file of parts that save and restore themselves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from diffusion import older
from diffusion.checkpoint import Settings
from diffusion.console import UserError
from diffusion.files import load_tensors, metadata, read_json, read_object, save_tensors, sealed
from diffusion.sharded import gathered, shared_as
from diffusion.typed import checked, parse

SETTINGS = TypeAdapter(Settings)
# The mend for a state that cannot be read, and what it costs.
DELETE = "delete it, and the training begins anew; no finished model is touched"
T = TypeVar("T")


class Part(Protocol):
    """What saves and restores itself: a network, a follower, an optimizer's moments."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed training needs of it, the same in every process."""

    def load_state_dict(self, state: dict[str, Tensor], /) -> Any: ...


Parts = Mapping[str, Part]  # by name: a player's, "follower." or "optimizer." and one's name


@dataclass(frozen=True)
class Moments:
    """An optimizer as a part of a state: by "i.slot", what it keeps of its parameter number i."""

    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[Tensor]:
        return self.optimizer.param_groups[0]["params"]

    def state_dict(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{slot}": v for i, slots in state.items() for slot, v in slots.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            i, slot = key.split(".")
            like = self.parameters[int(i)]
            if value.shape == like.shape:  # a moment: in memory it must lie as its parameter does
                value = torch.empty_like(like).copy_(shared_as(value, like))
            slots.setdefault(int(i), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})


def save(
    path: Path, parts: Parts, line: dict, settings: Mapping[str, Any], writes: bool = True
) -> None:
    """Write the state at that line of the log, of the run of those settings.

    All processes call this, for what they hold in shares is gathered; the one that `writes` writes.
    """
    tensors = {}
    for name, part in parts.items():
        for k, v in part.state_dict().items():
            whole = gathered(v)
            if writes:  # the others let go of it at once
                tensors[f"{name}.{k}"] = whole if whole is v else whole.cpu()
    if not writes:
        return
    described = {"line": line, "settings": sealed(dict(settings))}
    save_tensors(path, tensors, {name: json.dumps(each) for name, each in described.items()})


def restore(path: Path, parts: Parts, kind: TypeAdapter[T]) -> T | None:
    """The line of the log, of that type, at which the state was saved; None where there is none."""
    if not path.exists():
        return None
    sizes = {
        name.removeprefix("optimizer."): len(part.parameters)
        for name, part in parts.items()
        if isinstance(part, Moments)
    }
    followers = [k.removeprefix("follower.") for k in parts if k.startswith("follower.")]
    try:
        tensors, described = load_tensors(path)
        tensors = older.state(tensors, sizes, followers)
        for name, part in parts.items():
            prefix, now = f"{name}.", part.state_dict()
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            part.load_state_dict({k: shared_as(v, now.get(k)) for k, v in own.items()})
        return checked(kind, parse(described["line"]), f"{path}: its line")
    except (UserError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "state_dict" not in str(error):  # out of memory
            raise
        reason = str(error) if isinstance(error, UserError) else f"{path} is of another training"
        raise UserError(f"{reason}: {DELETE}") from error


def settings_of(path: Path) -> dict:
    """The settings of the run whose state that is; none where there is none."""
    if not path.exists():
        return {}
    try:
        text, beside = metadata(path).get("settings"), path.with_name("settings.json")
        if text is None and beside.exists():  # of a version that kept them beside the state
            settings = read_json(beside)
        else:
            settings = read_object(text or "", path)
        return dict(checked(SETTINGS, settings, f"{path}: its settings"))
    except UserError as error:
        raise UserError(f"{error}: {DELETE}") from error
