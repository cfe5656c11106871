"""Reversible residual layers: their inputs are computed back from their outputs, so that no layer's need be kept.

A stack carries two streams. A layer adds f(x2) to x1, and then the streams may change places. Backward, f(x2) is
computed once more, with its gradient, and subtracted: memory for activations does not grow with depth.

Source: "The Reversible Residual Network", arXiv 1707.04585; `ReversibleHalfResidual` and `ReversibleSwap` of the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from terseformer.layers.replay import Tape

Pair = tuple[Float[Tensor, "B P D"], Float[Tensor, "B P D"]]


@dataclass
class _Trail:
    """The streams where the backward pass stands: first the stack's outputs, at last its inputs."""

    pair: tuple[Tensor, Tensor] | None = None


@dataclass
class _Call:
    """One layer's call."""

    function: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    swap: bool
    trail: _Trail
    tape: Tape = field(init=False)
    autocast: dict[str, Any] = field(init=False)

    def first(self, x: Tensor) -> Tensor:
        self.tape = Tape(x.device)
        kind = x.device.type
        enabled = torch.is_autocast_enabled(kind)
        self.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": enabled}
        with self.tape.recording():
            return self.function(x)

    def again(self, x: Tensor) -> Tensor:
        with self.tape.replaying(), torch.autocast(**self.autocast):
            return self.function(x)


class _HalfResidual(torch.autograd.Function):
    """x1 + f(x2). Nothing is saved: the backward pass finds its outputs in the trail."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call = call
        return x1 + call.first(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, (grad,) = ctx.call, grads
        if call.trail.pair is None:
            raise RuntimeError("a reversible stack has been taken back already: run the forward pass again")
        x2, y = call.trail.pair if call.swap else reversed(call.trail.pair)
        with torch.enable_grad():
            x2 = x2.detach().requires_grad_()
            added = call.again(x2)
        learning = [p for p in call.parameters if p.requires_grad]
        gradients = torch.autograd.grad(added, [x2, *learning], grad.to(added.dtype), allow_unused=True)
        by_parameter = dict(zip(map(id, learning), gradients[1:], strict=True))
        call.trail.pair = y - added.detach(), x2.detach()
        return None, grad, gradients[0], *(by_parameter.get(id(p)) for p in call.parameters)


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
    """

    def __init__(self, layers: list[nn.Module], swaps: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.swaps = swaps
        self.keeps_activations = False
        """Let autograd keep all activations, for comparison."""

    @torch.compiler.disable
    def forward(self, pair: Pair, *arguments: Any, each: list[tuple[Any, ...]] | None = None) -> Pair:
        """Passes the streams through all layers.

        Args:
            pair: the two streams.
            arguments: handed to every layer.
            each: further arguments of each layer, such as its state.
        """
        x1, x2 = pair
        further = each or [()] * len(self.layers)
        if self.keeps_activations or not (torch.is_grad_enabled() and self.training):
            for layer, swap, more in zip(self.layers, self.swaps, further, strict=True):
                y = x1 + layer(x2, *arguments, *more)
                x1, x2 = (x2, y) if swap else (y, x2)
            return x1, x2
        trail = _Trail()
        x1, x2 = _Begin.apply(trail, x1, x2)
        for layer, swap, more in zip(self.layers, self.swaps, further, strict=True):
            parameters = list(layer.parameters())
            call = _Call(lambda x, f=layer, m=more: f(x, *arguments, *m), parameters, swap, trail)
            y = _HalfResidual.apply(call, x1, x2, *parameters)
            x1, x2 = (x2, y) if swap else (y, x2)
        trail.pair = x1.detach(), x2.detach()
        return x1, x2
