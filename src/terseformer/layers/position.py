"""How a token knows its place. Positions are data that the caller hands down."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.layers.dropout import SequenceDropout


def sinusoids(positions: Int[Tensor, "*P"], width: int) -> Float[Tensor, "*P D"]:
    """Sines at even and cosines at odd features, wavelengths from 2 pi to 10000 * 2 pi.

    Source: "Attention is All You Need", section 3.5.
    """
    steps = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(steps * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


class LearnedPositions(nn.Module):
    """A learned vector for each position, initialised with the sinusoids; dropout on it.

    Positions beyond the table, which only padding may have, get its last vector.
    """

    def __init__(self, max_positions: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(sinusoids(torch.arange(max_positions), width))
        self.dropout = SequenceDropout(dropout)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.dropout(nn.functional.embedding(positions.clamp(max=len(self.weight) - 1), self.weight))


class SinusoidalPositions(nn.Module):
    """The sinusoids themselves, without parameters; dropout on them."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.dropout = SequenceDropout(dropout)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.dropout(sinusoids(positions, self.width))


def rotate(x: Float[Tensor, "B H T K"], positions: Int[Tensor, "B T"], theta: float) -> Float[Tensor, "B H T K"]:
    """Rotary positions, half-split form: the pair (i, i + K/2) turns by position * theta^(-2i/K).

    Source: "RoFormer", arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, K/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
