"""Attention among tokens that hash to the same bucket. Queries and keys are one projection, qk.

Source: "Reformer: The Efficient Transformer", arXiv 2001.04451.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer.layers.attention import real_mask
from terseformer.layers.local import check_window, neighbours, to_chunks

_HIDDEN = -1e9
"""Score of later tokens and of padding."""
_SELF = -1e5
"""Score of the token itself, which it attends to only where it sees nothing else."""


def unit_keys(qk: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """Keys of length 1: qk / sqrt(mean(qk^2) + 1e-6) / sqrt(K)."""
    return qk * (qk.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / math.sqrt(qk.shape[-1])


def shared_qk_attention(
    qk: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T K"],
    causal: bool,
    num_real: Int[Tensor, " B"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """softmax(qk keys^T) v over all tokens but the present one, which is seen only where there is no other.

    This is what LSH attention approximates; its time and memory grow with the square of T.

    Args:
        qk: queries, and keys before their normalisation.
        v: values.
        causal: a token sees earlier tokens only.
        num_real: real tokens at the head of each row, None for all. What follows them is not seen, and its own
            output means nothing.
        dropout: rate of the dropout on the attention weights.
    """
    positions = torch.arange(qk.shape[2], device=qk.device)
    self_mask = positions[:, None] == positions
    seen = positions <= positions[:, None] if causal else torch.ones_like(self_mask)
    if num_real is not None:
        seen = seen & (positions < num_real[:, None, None, None])  # [B, 1, T, T]
    seen = seen & ~self_mask
    seen = seen | self_mask & ~seen.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(qk, unit_keys(qk), v, attn_mask=seen, dropout_p=dropout, scale=1.0)


def fixed_normals(*shape: int) -> Float[Tensor, "..."]:
    """Normal numbers, float32, that are the same each time and in the native engine: Box-Muller on SplitMix64."""
    count = math.prod(shape)
    counter = np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        counter = (counter ^ (counter >> np.uint64(shift))) * np.uint64(factor)
    radius, angle = (((counter >> np.uint64(11)) + 1) * 2.0**-53).reshape(count, 2).T
    normals = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return torch.from_numpy(normals.astype(np.float32)).reshape(shape)


def bucket_factors(num_buckets: int) -> list[int]:
    """Even numbers whose product is about `num_buckets`: one up to 128, beyond that two, which cost less to hash."""
    if num_buckets <= 128:
        return [num_buckets]
    first = 2 ** math.ceil(math.log2(num_buckets) / 2)
    return [first, 2 * (num_buckets // (2 * first))]


@torch.no_grad()
def hash_buckets(
    qk: Float[Tensor, "B H T K"],
    num_hashes: int,
    num_buckets: int,
    num_real: Int[Tensor, " B"] | None = None,
    fixed: bool = False,
) -> Int[Tensor, "rounds B H T"]:
    """Draws random rotations R, one for each round and head, and hashes each token to argmax([R x; -R x]).

    Vectors at a small angle often share a bucket, whatever their lengths. More than 128 buckets are pairs of two
    hashes. Padding has a bucket of its own, after all others. Rotations that are `fixed` are the same each time.
    """
    factors = bucket_factors(num_buckets)
    halves = [factor // 2 for factor in factors]
    shape = (num_hashes, *qk.shape[1::2], sum(halves))  # [rounds, H, K, rotated]
    rotations = fixed_normals(*shape).to(qk) if fixed else torch.randn(shape, device=qk.device, dtype=qk.dtype)
    rounds = []
    for rotation in rotations:  # one at a time, to hold the rotated vectors of a single round
        bucket, step = torch.zeros(qk.shape[:3], dtype=torch.int32, device=qk.device), 1
        for factor, part in zip(factors, rotation.split(halves, dim=-1), strict=True):
            rotated = qk @ part
            bucket += step * torch.cat([rotated, -rotated], dim=-1).argmax(-1).int()
            step *= factor
        rounds.append(bucket)
    buckets = torch.stack(rounds)
    if num_real is None:
        return buckets
    padding = torch.arange(qk.shape[2], device=qk.device) >= num_real[:, None, None]  # [B, 1, T]
    return buckets.masked_fill(padding, math.prod(factors))


class LSHAttention(nn.Module):
    """Shared-QK attention among tokens that hash alike.

    Each round sorts the tokens by bucket and position and cuts them into chunks; a token attends to its chunk and to
    the chunks around it, the first following the last. The rounds' outputs are averaged with weights
    softmax(logsumexp of the round's scores). Time and memory are linear in the number of tokens, which need not fill
    whole chunks; a round's memory is T * chunk_length * (1 + chunks_before + chunks_after).

    No value or key of a later token reaches an earlier one if the pattern is causal. Which earlier tokens share its
    chunk does depend on the buckets of all.

    Args:
        chunk_length: tokens in a chunk.
        num_hashes: rounds.
        chunks_before: chunks before its own that a token sees, in sorted order.
        chunks_after: chunks after its own that a token sees, in sorted order.
        num_buckets: an even number, or None for 2 * max(1, T // chunk_length).
        causal: a token sees earlier tokens only.
        dropout: rate of the dropout on the attention weights; the mask is shared by all chunks of a round.

    Raises:
        ValueError: chunks without tokens, windows of less than a chunk, no rounds, or an odd number of buckets.
    """

    def __init__(
        self,
        chunk_length: int = 128,
        num_hashes: int = 2,
        chunks_before: int = 1,
        chunks_after: int = 0,
        num_buckets: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_window(chunk_length, chunks_before, chunks_after)
        if num_hashes < 1:
            raise ValueError(f"num_hashes is {num_hashes}: it must be at least 1")
        if num_buckets is not None and (num_buckets < 2 or num_buckets % 2):
            raise ValueError(f"num_buckets is {num_buckets}: it must be even and at least 2")
        self.chunk_length, self.chunks_before, self.chunks_after = chunk_length, chunks_before, chunks_after
        self.num_hashes, self.num_buckets = num_hashes, num_buckets
        self.causal, self.dropout = causal, dropout

    def hash(
        self, qk: Float[Tensor, "B H T K"], num_real: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "rounds B H T"]:
        """Draws buckets, for a caller that needs the same ones again; outside training by the same rotations always."""
        num_buckets = self.num_buckets or 2 * max(1, qk.shape[2] // self.chunk_length)
        return hash_buckets(qk, self.num_hashes, num_buckets, num_real, fixed=not self.training)

    def forward(
        self,
        qk: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        num_real: Int[Tensor, " B"] | None = None,
        buckets: Int[Tensor, "rounds B H T"] | None = None,
    ) -> Float[Tensor, "B H T K"]:
        if buckets is None:
            buckets = self.hash(qk, num_real)
        outputs, logsumexps = zip(*(self._round(qk, v, num_real, bucket) for bucket in buckets), strict=True)
        weights = torch.stack(logsumexps).softmax(0).to(v.dtype)  # [rounds, B, H, T, 1]
        return (torch.stack(outputs) * weights).sum(0)

    def _round(self, qk: Tensor, v: Tensor, num_real: Tensor | None, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, H, T, K] and logsumexp of the scores [B, H, T, 1] of one round."""
        length, window = qk.shape[2], (self.chunks_before, self.chunks_after)
        order = torch.argsort(bucket, dim=-1, stable=True)  # [B, H, T]: the position of each token in sorted order
        take = order[..., None]
        at_q = order if num_real is None else order.where(order < num_real[:, None, None], -1)
        at_q = to_chunks(at_q, self.chunk_length, fill=-1)  # padding is at -1
        q, v = (to_chunks(x.gather(2, take.expand_as(x)), self.chunk_length) for x in (qk, v))
        k, v, at_k = (neighbours(x, *window) for x in (unit_keys(q), v, at_q))
        at_q, at_k = at_q[..., :, None], at_k[..., None, :]
        hidden = at_k < 0
        if self.causal:
            hidden = hidden | (at_k > at_q)
        scores = q @ k.transpose(-1, -2)  # [B, H, chunks, chunk_length, window]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill_(at_k == at_q, _SELF).masked_fill_(hidden, _HIDDEN)
        weights, logsumexp = scores.softmax(-1).to(v.dtype), scores.logsumexp(-1, keepdim=True)
        if self.training and self.dropout:
            weights = weights * F.dropout(torch.ones_like(weights[:, :, :1]), self.dropout)
        sorted_rows = [x.flatten(2, 3)[:, :, :length] for x in (weights @ v, logsumexp)]
        y, logsumexp = (torch.empty_like(x).scatter(2, take.expand_as(x), x) for x in sorted_rows)
        return y, logsumexp


class MixedLSHAttention(nn.Module):
    """A softmax over all tokens, qk both query and key, up to `exact_length` tokens; LSH attention beyond.

    Up to there, a token sees itself like any other, and keys keep their lengths.

    Source: `MixedLSHSelfAttention` of the reference.
    """

    def __init__(self, exact_length: int, lsh: LSHAttention) -> None:
        super().__init__()
        self.exact_length, self.lsh = exact_length, lsh

    def hash(
        self, qk: Float[Tensor, "B H T K"], num_real: Int[Tensor, " B"] | None = None
    ) -> Int[Tensor, "rounds B H T"] | None:
        """Draws buckets, or None where the attention is exact."""
        return None if qk.shape[2] <= self.exact_length else self.lsh.hash(qk, num_real)

    def forward(
        self,
        qk: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        num_real: Int[Tensor, " B"] | None = None,
        buckets: Int[Tensor, "rounds B H T"] | None = None,
    ) -> Float[Tensor, "B H T K"]:
        if qk.shape[2] > self.exact_length:
            return self.lsh(qk, v, num_real, buckets)
        dropout = self.lsh.dropout if self.training else 0.0
        if self.lsh.causal:
            return F.scaled_dot_product_attention(qk, qk, v, dropout_p=dropout, is_causal=True)
        mask = real_mask(num_real, qk.shape[2]) if num_real is not None else None
        return F.scaled_dot_product_attention(qk, qk, v, mask, dropout)
