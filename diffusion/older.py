"""What files of earlier versions hold, brought to today's form at the door."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired

from pydantic import TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict

from diffusion.typed import OPEN, Count

OUTPUT = ("prediction", "learned_variance", "bounds")  # once part of the network's shape
INPUT = ("num_classes", "guidance")
SCALE = ("mean", "std")


@with_config(OPEN)
class Net(TypedDict, extra_items=Any):
    """A card's network, of format 1, as far as it is moved elsewhere."""

    num_classes: NotRequired[Count]
    guidance: NotRequired[tuple[float, float] | None]


@with_config(OPEN)
class Data(TypedDict, extra_items=Any):
    """A card's images, of format 1, likewise."""

    mean: float
    std: float


@with_config(OPEN)
class CardOfFormat1(TypedDict, extra_items=Any):
    """A card of format 1, as far as it is rebuilt: what it becomes is checked as today's."""

    method: str
    sampler: str
    plans: dict[str, list[float]]
    solvers: list[str]
    net: Net
    data: Data
    parent: NotRequired[str | None]


CARD = TypeAdapter(CardOfFormat1)


def card(old: Mapping[str, Any]) -> dict:
    """A card of format 1 as one of format 2."""
    net, data, solvers = dict(old["net"]), dict(old["data"]), old["solvers"]
    outputs = {name: net.pop(name) for name in OUTPUT if name in net}
    num_classes, guidance = (net.pop(name, None) for name in INPUT)
    condition = {}
    if num_classes:
        condition["label"] = {"kind": "label", "num_classes": num_classes}
    if guidance:
        condition["guidance"] = {"kind": "guidance", "low": guidance[0], "high": guidance[1]}
    scale = {name: data.pop(name) for name in SCALE}
    data.pop("num_classes", None)
    weight = old.get("guidance")
    plans = [
        {"sampler": old["sampler"], "angles": angles, "guidance": weight, "note": ""}
        for angles in old["plans"].values()
    ]
    abilities = {"ddim": "denoise", "ancestral-learned": "variance", "consistency": "jump"}
    # Before there was `shifted`: students' plans were, but not a guided one's, which are its
    # teacher's, as are the solvers that take their angles from them.
    shifted = old.get("parent") is not None and "ddim" not in solvers
    kept = ("method", "shift", "parent", "origin", "training")
    return {name: old[name] for name in kept if name in old} | {
        "plans": plans,
        "abilities": [ability for solver, ability in abilities.items() if solver in solvers],
        "net": {"name": "unet", **net},
        "denoiser": outputs,
        "condition": condition,
        "codec": {"name": "scale", **scale},
        "data": data,
        "shifted": old.get("shifted", shifted),
        "format": 2,
    }


def net_settings(net: dict, denoiser: dict, condition: dict) -> dict:
    """A network in a run's settings: as one flat dictionary, as it was before it was three parts,
    so that runs of before and after are known as the same."""
    if net["name"] != "unet":
        return {"net": net, "denoiser": denoiser, "condition": condition}
    shape = {name: value for name, value in net.items() if name != "name"}
    flat = {**shape, "num_classes": 0, **denoiser, "guidance": None}
    for name, kind in condition.items():
        if name == "label":
            flat["num_classes"] = kind["num_classes"]
        elif name == "guidance":
            flat["guidance"] = [kind["low"], kind["high"]]
        else:
            flat[name] = kind
    return flat


def state(
    tensors: dict[str, Tensor], sizes: Mapping[str, int], followers: Sequence[str]
) -> dict[str, Tensor]:
    """A training's state from before there were players, as today's; today's as it is.

    sizes: each player's number of parameters, in their order, which was the one optimizer's.
    """
    if not any(name.startswith("average0.") for name in tensors):
        return tensors
    owners = [(player, i) for player, count in sizes.items() for i in range(count)]
    new = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part.startswith("average") and rest.startswith("log_weight."):
            continue  # was averaged with the student, and never read
        if part == "optimizer":
            i, slot = rest.split(".")
            player, j = owners[int(i)]
            name = f"optimizer.{player}.{j}.{slot}"
        elif part.startswith("average"):
            name = f"follower.{followers[int(part.removeprefix('average'))]}.{rest}"
        elif rest.startswith("log_weight."):
            name = rest
        new[name] = value
    return new
