"""Networks built dry, on the meta device: shapes of what they hold and make, without memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from diffusion.condition import Kinds
from diffusion.console import UserError
from diffusion.machine import free_memory, in_bytes

COPIES = 4  # of a network's weights that a training holds: they, their gradients, Adam's moments


class Unfilled(TorchFunctionMode):
    """Networks that are built meanwhile get no random weights, which take most of the time."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def check_fit(make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """UserError where the network's tensors are not those: by name, shape and type."""
    most = 2 * len(weights) + 100  # some networks register what they then replace
    words = f"the card's network has more tensors than the file's {len(weights)}"
    network = _dry(make, lambda count, size: words if count > most else "")
    if network is None:
        return
    expected = network.state_dict()
    if lacking := expected.keys() - weights.keys():
        raise UserError(f"the card's network has {min(lacking)}, which the file does not hold")
    for name, value in weights.items():
        if name not in expected:
            raise UserError(f"the file holds {name:.80}, which the card's network has not")
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            here, there = (f"{each.dtype} {tuple(each.shape)}" for each in (value, expected[name]))
            raise UserError(f"{name} is {here}, but {there} in the card's network")


def check_memory(make: Callable[[], nn.Module]) -> None:
    """UserError for a network that cannot be trained in this machine's memory."""
    free = free_memory()
    words = f"a smaller network is needed: this one's training takes more than {in_bytes(free)}"
    words += ", which are free; give a lower --width"
    _dry(make, lambda count, size: words if COPIES * size > free else "")


def check_output(
    make: Callable[[], nn.Module], image: tuple[int, int, int], outputs: int, kinds: Kinds
) -> None:
    """UserError for a network that does not make (B, outputs, H, W) of B images (C, H, W)."""
    shapes = f"x {(2, *image)}, t (2,)" + "".join(f", {name}" for name in kinds)
    try:
        with torch.device("meta"), Unfilled():
            made = _output(make, image, kinds)
    except UserError:
        raise
    except Exception:  # it may have to see its tensors' values: once more in earnest
        try:
            made = _output(make, image, kinds)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"the network fails on {shapes} ({reason})") from error
    shape, expected = getattr(made, "shape", type(made).__name__), (2, outputs, *image[1:])
    if shape != expected:
        came = shape if isinstance(shape, str) else tuple(shape)
        raise UserError(f"the network made {came} of {shapes}, expected {expected}")


@torch.no_grad()
def _output(make: Callable[[], nn.Module], image: tuple[int, int, int], kinds: Kinds) -> Any:
    """What the network makes of two images on the default device, and of usual conditions."""
    condition = {name: kind.rows(torch.arange(2)) for name, kind in kinds.items()}
    return make().eval()(torch.zeros(2, *image), torch.full((2,), 0.5), condition or None)


def _dry(make: Callable[[], nn.Module], refusal: Callable[[int, int], str]) -> nn.Module | None:
    """The network on the meta device; None for one that must see its tensors' values to be built.

    refusal: (tensors so far, their bytes so far) -> why so many are refused, as a UserError, or "".
    """
    count = size = 0

    def add(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal count, size
        count, size = count + 1, size + (0 if parameter is None else parameter.nbytes)
        if words := refusal(count, size):
            raise UserError(words)

    handle = register_module_parameter_registration_hook(add)
    try:
        with torch.device("meta"), Unfilled():
            return make()
    except UserError:
        raise
    except Exception:  # what is wrong with it is said where it is built in earnest
        return None
    finally:
        handle.remove()
