"""Patterns for long inputs within a model: a whole sequence by their own forms, a continuation by what is remembered.

A pattern's parameters, such as the number of buckets, are those of layers/local.py, lsh.py and favor.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from terseformer import config as c
from terseformer.layers.attention import BidirectionalSoftmax, CausalSoftmax, Pattern
from terseformer.layers.favor import FavorAttention, causal_linear_attention, feature_sums, padding_mask
from terseformer.layers.local import LocalAttention
from terseformer.layers.lsh import LSHAttention, MixedLSHAttention, unit_keys
from terseformer.layers.replay import remember
from terseformer.state import Chunk, FeatureSums, KeyValueCache


class LocalPattern(Pattern):
    """Local attention; a continuation reads the chunks of the cache that its tokens see."""

    def __init__(self, local: LocalAttention) -> None:
        super().__init__()
        self.local = local

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B H T K"]:
        if cache is None:
            return self.local(q, k, v, chunk.num_real)
        past_k, past_v = cache.append(k, v, chunk)
        if not chunk.positions[:, 0].any():  # all begin: the cache holds nothing else
            return self.local(q, k, v, chunk.num_real)
        k, v = past_k, past_v
        at_q = chunk.positions[:, None, :, None]  # [B, 1, T, 1]
        first = (at_q // self.local.chunk_length - self.local.chunks_before) * self.local.chunk_length
        start = max(0, int(first.min()))
        at_k = torch.arange(start, chunk.end, device=q.device)
        return F.scaled_dot_product_attention(
            q, k[:, :, start:], v[:, :, start:], attn_mask=(at_k >= first) & (at_k <= at_q)
        )


class LSHPattern(Pattern):
    """LSH attention, alone or mixed with an exact one, whose shared vector is the mean of query and key.

    Outside training each row of a batch is attended to without its padding, and so as it would be alone: its own length
    decides how many buckets there are and whether it is hashed at all. In training the longest row's does, and buckets
    are remembered where a call is computed again. A continuation sees all earlier tokens: a token below
    `exact_length` by a softmax like the mixed form's, a later one as `shared_qk_attention` does, which is what LSH
    attention approximates. The reference, too, hashes anew from call to call, and what its decoder sees, the tokens of
    the same bucket and the latest, is not what its training form sees.

    Source: `PureLSHSelfAttentionWrapper` of the reference, with three weights.
    """

    def __init__(self, attention: LSHAttention | MixedLSHAttention) -> None:
        super().__init__()
        self.attention = attention
        self.exact_length = attention.exact_length if isinstance(attention, MixedLSHAttention) else 0

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B H T K"]:
        qk = (q + k) / 2
        if cache is None and chunk.num_real is not None and not self.training:
            return self._row_by_row(qk, v, chunk.num_real)
        if cache is None:
            buckets = remember(lambda: self.attention.hash(qk, chunk.num_real))
            return self.attention(qk, v, chunk.num_real, buckets)
        at_q = chunk.positions[:, None, :, None]
        at_k = torch.arange(chunk.end, device=q.device)
        earlier, itself = at_k < at_q, at_k == at_q
        is_first = itself & (at_q == 0)
        if self.exact_length == 0:
            keys, v = cache.append(unit_keys(qk), v, chunk)
            return F.scaled_dot_product_attention(qk, keys, v, attn_mask=earlier | is_first, scale=1.0)
        keys, v = cache.append(qk, v, chunk)
        if chunk.end <= self.exact_length:
            return F.scaled_dot_product_attention(qk, keys, v, attn_mask=earlier | itself)
        y = F.scaled_dot_product_attention(qk, unit_keys(keys), v, attn_mask=earlier | is_first, scale=1.0)
        short = at_q < self.exact_length
        if short.any():
            exact = F.scaled_dot_product_attention(qk, keys, v, attn_mask=earlier | itself)
            y = torch.where(short, exact, y)
        return y

    def _row_by_row(
        self, qk: Float[Tensor, "B H T K"], v: Float[Tensor, "B H T K"], num_real: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H T K"]:
        rows = []
        for index, length in enumerate(num_real.clamp(min=1).tolist()):
            row = slice(index, index + 1), slice(None), slice(length)
            rows.append(F.pad(self.attention(qk[row], v[row]), (0, 0, 0, qk.shape[2] - length)))
        return torch.cat(rows)


class FavorPattern(Pattern):
    """Linear attention; a continuation starts from sums over the tokens before it."""

    def __init__(self, favor: FavorAttention) -> None:
        super().__init__()
        self.favor = favor

    def new_cache(self, batch: int, num_heads: int, capacity: int, width: int, like: Tensor) -> FeatureSums:
        """Sums of nothing."""
        num_features = width if self.favor.projection is None else len(self.favor.projection)
        return FeatureSums(like.new_zeros(batch, num_heads, num_features, width + 1))

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        chunk: Chunk,
        cache: FeatureSums | None = None,
    ) -> Float[Tensor, "B H T K"]:
        if cache is None:
            return self.favor(q, k, v, chunk.num_real)
        q, k = self.favor.features(q, k, padding_mask(chunk.num_real, q.shape[2]))
        y = causal_linear_attention(q, k, v, cache.sums)
        cache.add(feature_sums(k, v))
        return y


def attention_pattern(config: c.AttentionPatternConfig, head_width: int, causal: bool, dropout: float) -> Pattern:
    """The pattern that a configuration names.

    Args:
        config: the pattern.
        head_width: features K of a head.
        causal: a token sees itself and earlier tokens only.
        dropout: rate of the dropout on the attention weights, where there are any.
    """
    match config:
        case c.SoftmaxPatternConfig():
            return CausalSoftmax(dropout) if causal else BidirectionalSoftmax(dropout)
        case c.LocalPatternConfig():
            window = (config.chunk_length, config.chunks_before, config.chunks_after)
            return LocalPattern(LocalAttention(*window, causal=causal, dropout=dropout))
        case c.LSHPatternConfig():
            return LSHPattern(_lsh(config, causal, dropout))
        case c.MixedPatternConfig():
            return LSHPattern(MixedLSHAttention(config.exact_length, _lsh(config, causal, dropout)))
        case c.FavorPatternConfig():
            return FavorPattern(FavorAttention(head_width, "relu", causal))
        case c.FavorSoftmaxPatternConfig():
            return FavorPattern(FavorAttention(head_width, "softmax", causal, config.num_features))


def _lsh(config: c.LSHPatternConfig | c.MixedPatternConfig, causal: bool, dropout: float) -> LSHAttention:
    return LSHAttention(
        config.chunk_length,
        config.num_hashes,
        config.chunks_before,
        config.chunks_after,
        config.num_buckets or None,
        causal,
        dropout,
    )
