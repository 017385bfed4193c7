"""Networks that several processes hold together, each a share of the rows of every weight.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. accelerate's plugin lets CPUs be, and
takes one network with one optimizer. So torch's `fully_shard`, which the plugin calls, is called
here for each network, on GPUs and CPUs alike.
"""

import os
import warnings
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.console import UserError

# What a launch may ask for beside shares and does not get, by its variable.
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing",
}


def asked() -> bool:
    """Whether this launch asks for shares; UserError where it asks for what we have not."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"--use_fsdp needs --fsdp_version 2 beside it, got {version}: give 2")
    for variable, flag in REFUSED.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(f"{flag} is not supported: leave it out of accelerate launch")
    return True


def _is_shared(value: Any) -> bool:
    return hasattr(value, "device_mesh")  # a DTensor, whose module takes a second to import


def portion(value: Any) -> Tensor:
    """What this process holds of it; all of what is whole."""
    return value.to_local() if _is_shared(value) else value


def gathered(value: Any) -> Tensor:
    """The whole of it, which all processes must ask for together."""
    return value.full_tensor() if _is_shared(value) else value


def shared_as(value: Tensor, other: Any) -> Tensor:
    """A whole tensor, held as the other is."""
    if not _is_shared(other):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements
    return distribute_tensor(value.to(other.device), mesh, placements, src_data_rank=None)


class Held:
    """How a training's networks lie: whole on this process's device, or shared out over all."""

    def __init__(self, networks: Iterable[nn.Module], worker: Accelerator):
        self.worker = worker
        self.forms: dict[nn.Module, nn.Module] = {}  # of those that are shared out
        shared = asked() and worker.num_processes > 1
        for network in networks:
            if shared:
                self.forms[network] = _form(network)
                _share_out(network, worker)
            else:
                network.to(worker.device)

    def synchronised(self, network: nn.Module) -> nn.Module:
        """What a loss calls, so that gradients are the processes' mean."""
        alone = network in self.forms or self.worker.num_processes == 1
        return network if alone else self.worker.prepare(network)

    def whole(self, network: nn.Module) -> nn.Module:
        """The network, or of one that is shared out a whole copy, for which all must ask."""
        if network not in self.forms:
            return network
        copy = _form(self.forms[network])
        weights = {name: gathered(value) for name, value in network.state_dict().items()}
        copy.load_state_dict(weights, assign=True)
        return copy

    def gather(self) -> None:
        """Make all networks whole, for whoever holds them."""
        for network in [*self.forms]:
            copy = self.whole(network).train(network.training)
            del self.forms[network]
            network.__class__, network.__dict__ = type(copy), vars(copy)


def _form(network: nn.Module) -> nn.Module:
    """A copy with the same buffers, whose weights hold nothing."""
    kept = {id(buffer): buffer for buffer in network.buffers()}
    empty = {
        id(weight): nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
        for weight in network.parameters()
    }
    return deepcopy(network, kept | empty)


def _share_out(network: nn.Module, worker: Accelerator) -> None:
    """Each block of a list of blocks by itself, so that only one is whole at a time; then the rest.

    UserError for a network that torch cannot share out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # it means an x0 beside its variance, into which no loss writes
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(worker.device.type, (worker.num_processes,))
    network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    blocks = [
        block
        for blocks in reversed([*network.modules()])  # the inner ones first
        if isinstance(blocks, nn.ModuleList)
        for block in blocks
        if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters())
    ]
    try:
        for module in (*blocks, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    except (NotImplementedError, ValueError) as error:
        name = type(getattr(network, "net", network)).__name__
        raise UserError(
            f"the network {name} cannot be shared out ({error}): leave --use_fsdp out of "
            "accelerate launch"
        ) from error
