"""How a token knows its place. Positions are data that the caller hands down."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.layers.dropout import SequenceDropout
from terseformer.waves import waves


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
        self.weight = nn.Parameter(sinusoids(torch.arange(max_positions), width).to(torch.get_default_dtype()))
        self.dropout = SequenceDropout(dropout)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.dropout(nn.functional.embedding(positions.clamp(max=len(self.weight) - 1), self.weight))


class SinusoidalPositions(nn.Module):
    """The sinusoids themselves, without parameters; dropout on them.

    With `halves`, all sines come before all cosines, as in the reference's `SinCosPositionalEncoding`.
    """

    def __init__(self, width: int, dropout: float = 0.0, halves: bool = False) -> None:
        super().__init__()
        self.width, self.halves = width, halves
        self.dropout = SequenceDropout(dropout)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = sinusoids(positions, self.width)
        return self.dropout(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1) if self.halves else x)


class FixedBasePositions(nn.Module):
    """The digits of a position in some bases, each times a learned vector of its own.

    With d_{b,i} the i-th digit from the right in base b, feature block i is sum_b d_{b,i} w_{b,i}; the first position
    has a learned vector added. In training half of the rows start somewhere else than at 0, anywhere that 8 digits of
    the smallest base can tell, and one row in 100 has no digits.

    Source: `FixedBasePositionalEncoding` of the reference.

    Raises:
        ValueError: the width is not a multiple of the number of digits.
    """

    BASES = (11, 13, 14, 15)
    NUM_DIGITS = 8
    _START_ELSEWHERE = 0.5
    _NO_DIGITS = 0.01

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % self.NUM_DIGITS:
            raise ValueError(f"width is {width}: it must be a multiple of {self.NUM_DIGITS}")
        rows = len(self.BASES) * self.NUM_DIGITS
        self.digits = nn.Parameter(torch.empty(rows, width // self.NUM_DIGITS).uniform_(-1e-4, 1e-4))
        self.start = nn.Parameter(torch.empty(width).uniform_(-1e-4, 1e-4))

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        moved, kept = positions, None
        if self.training:
            rows = (len(positions), 1)
            room = min(self.BASES) ** self.NUM_DIGITS - positions.shape[1]
            start = torch.randint(room, rows, device=positions.device)
            moved = positions + start * (torch.rand(rows, device=positions.device) < self._START_ELSEWHERE)
            kept = torch.rand((*rows, 1), device=positions.device) >= self._NO_DIGITS
        bases = torch.tensor(self.BASES, device=positions.device)[:, None]
        powers = bases ** torch.arange(self.NUM_DIGITS, device=positions.device)  # [bases, digits]
        digits = (moved[..., None, None] // powers % bases).to(self.digits.dtype)  # [B, T, bases, digits]
        x = torch.einsum("btni,niw->btiw", digits, self.digits.unflatten(0, powers.shape)).flatten(-2)
        if kept is not None:
            x = x * kept
        return x + (positions == 0)[..., None] * self.start


class InfinitePositions(nn.Module):
    """Waves whose phases drift, so that no two places are alike, times a learned matrix that starts orthogonal.

    The waves are computed when they are first asked for, and are no part of a state dict. Padding beyond the last
    position gets its vector.

    Source: `InfinitePositionalEncoding` of the reference, with its origin at 0.
    """

    waves: Tensor

    def __init__(self, max_positions: int, width: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))
        self.register_buffer("waves", torch.empty(0, width), persistent=False)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        if not len(self.waves):
            table = waves(self.max_positions, len(self.weight))
            self.waves = torch.from_numpy(table).to(self.weight)
        return nn.functional.embedding(positions.clamp(max=self.max_positions - 1), self.waves) @ self.weight


class AxialPositions(nn.Module):
    """Positions as coordinates in a box, the last one running fastest: a learned vector for each, side by side.

    Dropout leaves out features for all tokens of a sequence. Positions beyond the box, which only padding may have,
    get its last coordinates.

    Source: `AxialPositionalEncoding` of the reference, for sequences of any length.

    Args:
        shape: lengths of the box's sides.
        sizes: features of each coordinate's vector, which sum up to D.
        dropout: its rate.
    """

    def __init__(self, shape: tuple[int, ...], sizes: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        sides = zip(shape, sizes, strict=True)
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(side, size)) for side, size in sides)
        self.dropout = SequenceDropout(dropout)

    def forward(self, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        left = positions.clamp(max=math.prod(len(table) for table in self.tables) - 1)
        vectors = []
        for table in reversed(self.tables):
            vectors.append(nn.functional.embedding(left % len(table), table))
            left = left // len(table)
        return self.dropout(torch.cat(vectors[::-1], dim=-1))


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
