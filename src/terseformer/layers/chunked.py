"""A layer on some tokens at a time, so that what it makes in between is never held for all of them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from terseformer.layers.replay import Replayed


def in_chunks(layer: nn.Module, x: Float[Tensor, "B T D"], chunk_size: int) -> Float[Tensor, "B T D"]:
    """`layer(x)` of a layer that acts on each token alone, computed for `chunk_size` tokens of each row at a time.

    For its gradient a chunk is computed again, with what chance decided in it. Chance decides for each chunk anew.

    Source: `Chunk` of the reference, which counts the tokens of all rows.
    """
    if x.shape[1] <= chunk_size:
        return layer(x)
    chunks = x.split(chunk_size, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([layer(chunk) for chunk in chunks], dim=1)
    parameters = list(layer.parameters())
    return torch.cat([_Again.apply(Replayed(layer, parameters), chunk, *parameters) for chunk in chunks], dim=1)


class _Again(torch.autograd.Function):
    """A layer of which only the input is kept."""

    @staticmethod
    def forward(ctx: Any, layer: Replayed, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.first(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        _, gradients = ctx.layer.again(x, grads[0])
        return None, *gradients
