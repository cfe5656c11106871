"""Reversible residual layers: their inputs are computed back from their outputs, so that no layer's need be kept.

A stack carries two streams. A layer adds f(x2) to x1, and then the streams may change places. Backward, f(x2) is
computed once more, with its gradient, and subtracted: memory for activations does not grow with depth.

Source: "The Reversible Residual Network", arXiv 1707.04585; `ReversibleHalfResidual` and `ReversibleSwap` of the
reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from terseformer.layers.initializers import dense
from terseformer.layers.replay import Function, Replayed

Pair = tuple[Float[Tensor, "B P D"], Float[Tensor, "B P D"]]
Joined = tuple[Float[Tensor, "B P E"], Float[Tensor, "B P E"]]
"""Two streams, perhaps of another width."""


@dataclass
class _Trail:
    """The streams where the backward pass stands: first the stack's outputs, at last its inputs."""

    pair: tuple[Tensor, Tensor] | None = None


@dataclass
class _Call:
    """One layer's call."""

    layer: Replayed
    swap: bool
    trail: _Trail


class _HalfResidual(torch.autograd.Function):
    """x1 + f(x2). Nothing is saved: the backward pass finds its outputs in the trail."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call = call
        return x1 + call.layer.first(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, (grad,) = ctx.call, grads
        if call.trail.pair is None:
            raise RuntimeError("a reversible stack has been taken back already: run the forward pass again")
        x2, y = call.trail.pair if call.swap else reversed(call.trail.pair)
        added, gradients = call.layer.again(x2, grad)
        call.trail.pair = y - added, x2.detach()
        return None, grad, *gradients


class _Begin(torch.autograd.Function):
    """Nothing, but that its backward pass, the last one, lets go of the trail."""

    @staticmethod
    def forward(ctx: Any, trail: _Trail, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.trail = trail
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trail.pair = None
        return None, *grads


class ReversibleStack(nn.Module):
    """Layers between two streams: each adds f(x2) to x1; then, where `swaps` says so, the streams change places.

    Args:
        layers: modules that take x2 [B, T, D] first, and what else `forward` is given for them.
        swaps: for each layer, whether the streams change places after it.
        joints: modules from two streams to two others, each behind as many layers as its key says. What they are given
            is kept, and the layers up to the next one are taken back from there.
    """

    def __init__(
        self, layers: Iterable[nn.Module], swaps: list[bool], joints: Mapping[int, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.swaps = swaps
        self.joints = nn.ModuleDict({str(place): joint for place, joint in sorted((joints or {}).items())})
        self.keeps_activations = False
        """Let autograd keep all activations: faster, with memory that grows with the depth."""

    @torch.compiler.disable
    def forward(self, pair: Pair, *arguments: Any, each: list[tuple[Any, ...]] | None = None) -> Joined:
        """Passes the streams through all layers.

        Args:
            pair: the two streams.
            arguments: handed to every layer.
            each: further arguments of each layer, such as its state.
        """
        further = each or [()] * len(self.layers)
        is_plain = self.keeps_activations or not (torch.is_grad_enabled() and self.training)
        start = 0
        for end in sorted({*map(int, self.joints), len(self.layers)}):
            functions = [_given(self.layers[index], *arguments, *further[index]) for index in range(start, end)]
            pair = (self._plain if is_plain else self._reversible)(pair, functions, start)
            if str(end) in self.joints:
                pair = self.joints[str(end)](pair)
            start = end
        return pair

    def _plain(self, pair: Pair, functions: list[Function], start: int) -> Pair:
        x1, x2 = pair
        for function, swap in zip(functions, self.swaps[start:], strict=False):
            y = x1 + function(x2)
            x1, x2 = (x2, y) if swap else (y, x2)
        return x1, x2

    def _reversible(self, pair: Pair, functions: list[Function], start: int) -> Pair:
        trail = _Trail()
        x1, x2 = _Begin.apply(trail, *pair)
        for index, function in enumerate(functions, start):
            parameters, swap = list(self.layers[index].parameters()), self.swaps[index]
            # FSDP gathers a sharded layer within its call, and takes the gradients there.
            is_sharded = any(hasattr(parameter, "placements") for parameter in parameters)
            call = _Call(Replayed(function, None if is_sharded else parameters), swap, trail)
            y = _HalfResidual.apply(call, x1, x2, *([] if is_sharded else parameters))
            x1, x2 = (x2, y) if swap else (y, x2)
        trail.pair = x1.detach(), x2.detach()
        return x1, x2


def _given(layer: nn.Module, *arguments: Any) -> Function:
    """A layer as a function of its first argument."""
    return lambda x: layer(x, *arguments)


class Forget(nn.Module):
    """A dense layer of the streams' mean, as both streams.

    Source: `_ReversibleSerialForget` of the reference.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = dense(size, size)

    def forward(self, pair: Pair) -> Pair:
        x = self.dense(mean(pair))
        return x, x


class Join(nn.Module):
    """The streams side by side, as both streams, which are then twice as wide.

    Source: `ReversibleConcatenatePair` of the reference.
    """

    def forward(self, pair: Pair) -> Joined:
        x = torch.cat(pair, dim=-1)
        return x, x


def mean(streams: Pair) -> Float[Tensor, "B P D"]:
    """The mean of two streams."""
    return (streams[0] + streams[1]) / 2
