"""Attention is a projection times a pattern; the patterns here are softmaxes over all tokens that may be seen.

Others stand in pattern.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer.layers.position import rotate
from terseformer.layers.qkv import CrossProjection, SeparateProjection, SparseProjection
from terseformer.state import Chunk, FeatureSums, KeyValueCache, LayerState, Source


def heads_of(x: Float[Tensor, "B T D"], num_heads: int) -> Float[Tensor, "B H T K"]:
    """A vector's heads apart."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T K"]) -> Float[Tensor, "B T D"]:
    """A token's heads side by side."""
    return x.transpose(1, 2).flatten(-2)


def real_mask(num_real: Int[Tensor, " B"], length: int) -> Tensor:
    """Which of `length` keys all queries of a row may see: [B, 1, 1, length]."""
    return (torch.arange(length, device=num_real.device) < num_real[:, None])[:, None, None]


class Pattern(nn.Module):
    """What a token sees, and how: q, k, v [B, H, T, K] to [B, H, T, K]."""

    def new_cache(
        self, batch: int, num_heads: int, capacity: int, width: int, like: Tensor
    ) -> KeyValueCache | FeatureSums:
        """What the pattern remembers before the first token, with the dtype and device of `like`."""
        return KeyValueCache.new(batch, num_heads, capacity, width, like)


class _Softmax(Pattern):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    @property
    def rate(self) -> float:
        """Of the dropout now."""
        return self.dropout if self.training else 0.0


class CausalSoftmax(_Softmax):
    """softmax(q k^T / sqrt(K)) v over the tokens up to the present one; dropout on the weights."""

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B H T K"]:
        if cache is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate, is_causal=True)
        k, v = cache.append(k, v, chunk)
        mask = torch.arange(chunk.end, device=q.device) <= chunk.positions[:, None, :, None]  # [B, 1, T, C]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class BidirectionalSoftmax(_Softmax):
    """softmax(q k^T / sqrt(K)) v over all real tokens of a sequence; dropout on the weights."""

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B H T K"]:
        assert cache is None, "what sees the tokens after it cannot read them one by one"
        mask = real_mask(chunk.num_real, k.shape[2]) if chunk.num_real is not None else None
        return F.scaled_dot_product_attention(q, k, v, mask, self.rate)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        projection: makes q, k, v and the output.
        num_heads: heads H.
        pattern: what a token sees.
        rope_theta: base of the rotary positions, or None for none.
    """

    def __init__(
        self,
        projection: SeparateProjection | SparseProjection,
        num_heads: int,
        pattern: Pattern,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        self.projection, self.num_heads, self.rope_theta = projection, num_heads, rope_theta
        self.pattern = pattern

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        memories = state.memories if state is not None else None
        q, k, v = (heads_of(h, self.num_heads) for h in self.projection.qkv(x, chunk, memories))
        if self.rope_theta is not None:
            q, k = (rotate(h, chunk.positions, self.rope_theta) for h in (q, k))
        y = self.pattern(q, k, v, chunk, state.cache if state is not None else None)
        return self.projection.output(merge_heads(y), chunk, memories)


class CrossAttention(nn.Module):
    """Multi-head attention of a target's tokens to all real tokens of its source.

    Args:
        projection: makes q of the target, k and v of the source, and the output.
        num_heads: heads H.
        dropout: rate of the dropout on the attention weights.
    """

    def __init__(self, projection: CrossProjection, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.projection, self.num_heads, self.dropout = projection, num_heads, dropout

    def source(self, encoded: Float[Tensor, "B N D"], num_real: Int[Tensor, " B"]) -> Source:
        """The keys and values of an encoded source, which serve all tokens of the target."""
        keys, values = self.projection.key(encoded), self.projection.value(encoded)
        return Source(heads_of(keys, self.num_heads), heads_of(values, self.num_heads), num_real)

    def forward(
        self, x: Float[Tensor, "B T D"], source: Source, chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        q = heads_of(self.projection.q(x, chunk, state.memories if state is not None else None), self.num_heads)
        mask = real_mask(source.num_real, source.keys.shape[2])
        dropout = self.dropout if self.training else 0.0
        return self.projection.output(
            merge_heads(F.scaled_dot_product_attention(q, source.keys, source.values, mask, dropout))
        )
