"""Fully sharded data parallelism (FSDP2): of each tensor, a process keeps some rows of the first dimension.

A unit, a block or a layer of a reversible stack, is whole in a process only while it is computed there. What is in no
unit, such as the embedding and the head, is whole from a step's forward pass to the end of its backward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as dtensor_empty
from torch.nn.modules.module import register_module_module_registration_hook

from terseformer.blocks import Block, FeedForwardLayer
from terseformer.config import EncoderDecoderConfig, ModelConfig
from terseformer.errors import UserError
from terseformer.layers.head import MixedHead
from terseformer.layers.reversible import Forget
from terseformer.models import make_model
from terseformer.terraformer import AttentionLayer

UNITS = (AttentionLayer, FeedForwardLayer, Forget)
"""Kinds of modules that are gathered one by one; a `Block` is a `FeedForwardLayer`."""


@contextmanager
def sharding_units(mesh: DeviceMesh | None) -> Iterator[None]:
    """Every unit that is made in the block is sharded before the next one is: no process ever holds the whole model.

    Args:
        mesh: the processes; None shards nothing.

    Raises:
        UserError: PyTorch is too old.
    """
    if mesh is None:
        yield
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(
            f"train.parallelism = 'fsdp' needs PyTorch 2.13 or newer, not {torch.__version__}; "
            "install it, or take train.parallelism = 'ddp'"
        )

    def shard(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, UNITS) and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh)
            if isinstance(module, Block) and module.cross is not None:
                register_fsdp_forward_method(module, "source")

    handle = register_module_module_registration_hook(shard)
    try:
        yield
    finally:
        handle.remove()


def shard_rest(root: nn.Module, mesh: DeviceMesh) -> None:
    """Shards what is in no unit. Forward passes in training go through `root`."""
    # Nothing here changes a layer's output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    fully_shard(root, mesh=mesh)
    assert isinstance(root, FSDPModule)
    if any(isinstance(module, MixedHead) for module in root.modules()):
        root.set_reduce_scatter_unused_params(True)  # a call leaves one of its two parts out


@contextmanager
def gathered_rest(root: nn.Module) -> Iterator[None]:
    """What is in no unit is whole in the block, so that parts of the model can be called."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of it."""
    return isinstance(tensor, DTensor)


def summed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The sum of a tensor over the processes that share a parameter."""
    if isinstance(parameter, DTensor):
        dist.all_reduce(tensor, group=parameter.device_mesh.get_group())
    return tensor


def empty_state(parameter: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """Room for an optimiser's state: shared out as the parameter is, where it has the parameter's rows."""
    has_rows = tuple(shape[:1]) == tuple(parameter.shape[:1]) and not (name == "col_var" and len(shape) == 2)
    if isinstance(parameter, DTensor) and has_rows:
        return dtensor_empty(shape, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.empty(shape, device=parameter.device)


def own_part(tensor: Tensor) -> tuple[Tensor, slice]:
    """What this process holds of a tensor, and which rows of it these are."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    num_rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    begin = min(tensor.device_mesh.get_local_rank() * num_rows, tensor.shape[0])
    return tensor.to_local(), slice(begin, min(begin + num_rows, tensor.shape[0]))


def training_memory(
    config: ModelConfig | EncoderDecoderConfig,
    optimizer: Literal["adamw", "adafactor"],
    parallelism: Literal["ddp", "fsdp"],
    num_processes: int,
) -> dict[str, int]:
    """Bytes that a process needs to train a model in float32, by what they are for; activations come on top.

    Of the processes, which may differ by a row of each tensor, the one with the most.

    Returns:
        `parameters`, `gradients`, `optimizer`, and `gathered`: what FSDP has whole for a while. These are weights and
        gradients of what is in no unit, and four times the largest unit: its weights, its gradients, the weights of
        the next one, fetched ahead, and the gradients of the one before, on their way to the others.
    """
    with torch.device("meta"):
        model = make_model(config)
    num_shares = num_processes if parallelism == "fsdp" else 1
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    share = sum(_share(shape, num_shares) for shape in shapes)
    states = 2 * share if optimizer == "adamw" else sum(_factors(shape, num_shares) for shape in shapes)
    gathered = 0
    if num_shares > 1:
        units = [sum(p.numel() for p in module.parameters()) for module in model.modules() if isinstance(module, UNITS)]
        rest = sum(map(math.prod, shapes)) - sum(units)
        gathered = 2 * rest + 4 * max(units, default=0)
    numbers = {"parameters": share, "gradients": share, "optimizer": states, "gathered": gathered}
    return {name: 4 * number for name, number in numbers.items()}


def _share(shape: tuple[int, ...], num_shares: int) -> int:
    """Numbers of a tensor that the first process has."""
    return -(-shape[0] // num_shares) * math.prod(shape[1:])


def _factors(shape: tuple[int, ...], num_shares: int) -> int:
    """Numbers of Adafactor's state of a tensor that the first process has: sums over its columns and over its rows."""
    if len(shape) == 1:
        return _share(shape, num_shares)
    rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    return _share(rows, num_shares) + (_share(columns, num_shares) if len(shape) > 2 else shape[-1])
