"""Attention within a window of chunks: a sequence in pieces, each of which sees only its neighbours."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F


def to_chunks(
    x: Shaped[Tensor, "B H T *rest"], chunk_length: int, fill: int = 0
) -> Shaped[Tensor, "B H chunks chunk_length *rest"]:
    """Cuts the tokens into chunks; the last one is filled up with `fill`."""
    missing = -x.shape[2] % chunk_length
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing), value=fill).unflatten(2, (-1, chunk_length))


def neighbours(
    chunks: Shaped[Tensor, "B H chunks chunk_length *rest"], before: int, after: int
) -> Shaped[Tensor, "B H chunks window *rest"]:
    """Joins each chunk to those before and after it.

    The first chunk follows the last. Where there are fewer chunks than a window holds, the window holds each once.
    """
    others = chunks.shape[2] - 1
    before = min(before, others)
    after = min(after, others - before)
    return torch.cat([chunks.roll(-offset, 2) for offset in range(-before, after + 1)], dim=3)


class LocalAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the tokens of the present chunk and of the chunks around it.

    Time and memory are linear in the number of tokens, which need not fill whole chunks.

    Args:
        chunk_length: tokens in a chunk.
        chunks_before: earlier chunks that a token sees besides its own.
        chunks_after: later chunks that a token sees; none if causal.
        causal: a token sees itself and earlier tokens only.
        dropout: rate of the dropout on the attention weights.

    Raises:
        ValueError: chunks without tokens, windows of less than a chunk, or later chunks in a causal pattern.
    """

    def __init__(
        self,
        chunk_length: int = 128,
        chunks_before: int = 1,
        chunks_after: int = 0,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_window(chunk_length, chunks_before, chunks_after)
        if causal and chunks_after:
            raise ValueError(f"chunks_after is {chunks_after}, but a causal token sees no later chunk: make it 0")
        self.chunk_length, self.chunks_before, self.chunks_after = chunk_length, chunks_before, chunks_after
        self.causal, self.dropout = causal, dropout

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        num_real: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H T K"]:
        batch, length = q.shape[0], q.shape[2]
        q, k, v = (to_chunks(x, self.chunk_length) for x in (q, k, v))
        k, v = (neighbours(x, self.chunks_before, self.chunks_after) for x in (k, v))
        mask = self._mask(length, q.device, num_real).expand(batch, -1, -1, -1)
        # Chunks join the batch, so that one mask serves all heads.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * chunks, H, chunk_length or window, K]
        mask = mask.flatten(0, 1)[:, None]  # [B * chunks, 1, chunk_length, window]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def _mask(self, length: int, device: torch.device, num_real: Tensor | None) -> Tensor:
        """Whether a token sees another: [B, chunks, chunk_length, window], or 1 for B if all tokens are real."""
        positions = torch.arange(length + -length % self.chunk_length, device=device)
        chunks = to_chunks(positions[None, None], self.chunk_length)
        at_k = neighbours(chunks, self.chunks_before, self.chunks_after)[0, :, :, None]  # [1, chunks, 1, window]
        at_q = chunks[0, :, :, :, None]  # [1, chunks, chunk_length, 1]
        distance = at_k // self.chunk_length - at_q // self.chunk_length
        seen = (distance >= -self.chunks_before) & (distance <= self.chunks_after)
        if self.causal:
            seen = seen & (at_k <= at_q)
        seen = seen & (at_k < (length if num_real is None else num_real[:, None, None, None]))
        return seen | (at_k == at_q)  # padding sees itself, for want of anything else


def check_window(chunk_length: int, chunks_before: int, chunks_after: int) -> None:
    """Raises ValueError for a window that cannot be."""
    if chunk_length < 1:
        raise ValueError(f"chunk_length is {chunk_length}: it must be at least 1")
    if chunks_before < 0 or chunks_after < 0:
        raise ValueError(f"chunks_before is {chunks_before}, chunks_after is {chunks_after}: both must be at least 0")
