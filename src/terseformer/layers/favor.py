"""Attention by positive features instead of a softmax: weights that are products, so that sums can be shared.

Source: "Rethinking Attention with Performers", arXiv 2009.14794.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from terseformer.layers.local import to_chunks

_RELU_FLOOR = 1e-3
_SOFTMAX_FLOOR = 1e-4


def linear_attention(
    q: Float[Tensor, "B H T M"], k: Float[Tensor, "B H T M"], v: Float[Tensor, "B H T K"]
) -> Float[Tensor, "B H T K"]:
    """sum_s (q_t . k_s) v_s / sum_s (q_t . k_s) over all tokens s; q and k are not negative."""
    return _ratio(q @ feature_sums(k, v))


def feature_sums(k: Float[Tensor, "B H T M"], v: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H M P"]:
    """sum_s k_s v_s^T and, as one more column, sum_s k_s: P = K + 1."""
    return k.transpose(-1, -2) @ _with_ones(v)


def causal_linear_attention(
    q: Float[Tensor, "B H T M"],
    k: Float[Tensor, "B H T M"],
    v: Float[Tensor, "B H T K"],
    before: Float[Tensor, "B H M P"] | None = None,
) -> Float[Tensor, "B H T K"]:
    """sum_s (q_t . k_s) v_s / sum_s (q_t . k_s) over the tokens s up to t; q and k are not negative.

    Pairs within a chunk of K tokens are weighed one by one; all earlier chunks enter as the sum of their k v^T, as do
    the tokens before these, whose `feature_sums` are given. Memory is T * M, like that of the features.
    """
    length, chunk_length = v.shape[2], min(v.shape[2:])
    q, k, v = (to_chunks(x, chunk_length) for x in (q, k, _with_ones(v)))
    if before is None:
        before = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    sums = k[:, :, :-1].transpose(-1, -2) @ v[:, :, :-1]  # of all chunks but the last: [B, H, chunks - 1, M, K + 1]
    earlier = torch.cat([before[:, :, None], sums], dim=2).cumsum(2)
    y = (q @ k.transpose(-1, -2)).tril() @ v + q @ earlier
    return _ratio(y.flatten(2, 3)[:, :, :length])


def _with_ones(v: Tensor) -> Tensor:
    """Values with a 1 behind them, whose weighted sum is the sum of the weights."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def _ratio(sums: Tensor) -> Tensor:
    """Weighted sums of values over sums of weights; 0 where there was nothing to weigh."""
    return sums[..., :-1] / sums[..., -1:].clamp_min(torch.finfo(sums.dtype).tiny)


def padding_mask(num_real: Int[Tensor, " B"] | None, length: int) -> Bool[Tensor, "B 1 T 1"] | None:
    """Which of `length` tokens are padding; None if no row has any."""
    if num_real is None:
        return None
    return torch.arange(length, device=num_real.device)[:, None] >= num_real[:, None, None, None]


def orthogonal_gaussian(num_features: int, width: int, generator: torch.Generator) -> Float[Tensor, "M K"]:
    """Rows distributed like Gaussian vectors, but orthogonal within each block of K."""
    blocks = -(-num_features // width)
    rotations, triangles = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator))
    # Without these signs the rotations are not uniform, and the kernel that they estimate is biased.
    rotations = rotations * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = torch.randn(num_features, width, generator=generator).norm(dim=-1, keepdim=True)
    return rotations.flatten(0, 1)[:num_features] * lengths


class FavorAttention(nn.Module):
    """Linear attention over features of queries and keys.

    The kernel `relu` has the features relu(x) + 1e-3. The kernel `softmax` has random ones, such that the products'
    mean is exp(q . k / sqrt(K)): with x divided by K^(1/4), exp(w . x - |x|^2 / 2 - c) + 1e-4, for each row w of
    `projection`. The largest exponent of a query is its c. The largest of a sequence's keys is theirs, or 0 if the
    pattern is causal, because a later token may hold the largest.

    Args:
        head_width: features K of a head.
        kernel: `relu` or `softmax`.
        causal: a token sees itself and earlier tokens only.
        num_features: random features M.

    Raises:
        ValueError: another kernel.
    """

    projection: Tensor | None

    def __init__(
        self,
        head_width: int,
        kernel: Literal["relu", "softmax"] = "relu",
        causal: bool = True,
        num_features: int = 256,
    ) -> None:
        super().__init__()
        if kernel not in ("relu", "softmax"):
            raise ValueError(f"kernel is {kernel!r}: it must be 'relu' or 'softmax'")
        self.causal = causal
        projection = None
        if kernel == "softmax":
            projection = orthogonal_gaussian(num_features, head_width, torch.Generator().manual_seed(0))
        self.register_buffer("projection", projection)

    def features(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        padding: Bool[Tensor, "B 1 T 1"] | None = None,
    ) -> tuple[Float[Tensor, "B H T M"], Float[Tensor, "B H T M"]]:
        """Features of queries and keys; those of padding's keys are 0."""
        if self.projection is None:
            q, k = q.relu() + _RELU_FLOOR, k.relu() + _RELU_FLOOR
        else:
            q, k = self._exponents(q), self._exponents(k)
            if padding is not None:
                k = k.masked_fill(padding, torch.finfo(k.dtype).min)
            largest = 0.0 if self.causal else k.amax((-2, -1), keepdim=True)
            q, k = (x.exp() + _SOFTMAX_FLOOR for x in (q - q.amax(-1, keepdim=True), k - largest))
        return q, k if padding is None else k.masked_fill(padding, 0.0)

    def _exponents(self, x: Tensor) -> Tensor:
        assert self.projection is not None
        x = x * x.shape[-1] ** -0.25
        return x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        num_real: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H T K"]:
        q, k = self.features(q, k, padding_mask(num_real, q.shape[2]))
        return (causal_linear_attention if self.causal else linear_attention)(q, k, v)
