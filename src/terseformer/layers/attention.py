"""Attention is a projection times a pattern; the pattern here is the softmax over all earlier tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer.layers.position import rotate
from terseformer.layers.qkv import SeparateProjection, SparseProjection
from terseformer.state import Chunk, KeyValueCache, LayerState


class CausalSoftmax(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the tokens up to the present one; dropout on the weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B H T K"]:
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        k, v = cache.append(k, v, chunk)
        mask = torch.arange(chunk.end, device=q.device) <= chunk.positions[:, None, :, None]  # [B, 1, T, C]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        projection: makes q, k, v and the output.
        num_heads: heads H.
        dropout: rate of the dropout on the attention weights.
        rope_theta: base of the rotary positions, or None for none.
    """

    def __init__(
        self,
        projection: SeparateProjection | SparseProjection,
        num_heads: int,
        dropout: float = 0.0,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        self.projection, self.num_heads, self.rope_theta = projection, num_heads, rope_theta
        self.pattern = CausalSoftmax(dropout)

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        memories = state.memories if state is not None else None
        heads = [h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for h in self.projection.qkv(x, chunk, memories)]
        q, k, v = heads
        if self.rope_theta is not None:
            q, k = (rotate(h, chunk.positions, self.rope_theta) for h in (q, k))
        y = self.pattern(q, k, v, chunk, state.cache if state is not None else None)
        return self.projection.output(y.transpose(1, 2).flatten(-2), chunk, memories)
