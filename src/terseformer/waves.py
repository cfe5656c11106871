"""The fixed part of infinite positions: waves of many lengths whose phases drift, so that no two places are alike.

Source: `InfinitePositionalEncoding` of the reference, with its origin at 0. Its phases come from JAX's random numbers,
which are computed here: Threefry-2x32, "Parallel Random Numbers: As Easy as 1, 2, 3", Salmon et al., 2011.
"""

from __future__ import annotations

import numpy as np

_KEY = (0, 234234535)
"""The reference's seed."""
_DRIFT = 0.03
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_WORD = np.uint64(0xFFFFFFFF)


def waves(length: int, width: int) -> np.ndarray:
    """Of the positions from 0: float32, [length, width].

    Features come in pairs of a cosine and a sine. A pair's frequency is one of a geometric row from 1/2 to a wave that
    takes some thousand positions, and its phase is a sum of random steps, one for each position.
    """
    pairs = (width + 1) // 2
    steps = _threefry(_first_of_split(_KEY), np.arange(length * pairs), np.zeros(length * pairs, np.uint64))[0]
    phases = (steps.reshape(length, pairs) / (2.0**31 - 1) * 3**0.5).cumsum(axis=0) * _DRIFT**0.5 / 4
    drift = _DRIFT ** (pairs / (width // 2)) if width > 2 else _DRIFT
    cycles = np.geomspace(0.5, 0.5 * drift**2, pairs) * np.arange(length)[:, None] + phases
    both = np.stack([cycles, cycles + 0.25], axis=-1).reshape(length, -1)[:, :width]
    return np.cos(2 * np.pi * both).astype(np.float32)


def _first_of_split(key: tuple[int, int]) -> tuple[int, int]:
    """The first key of two that JAX makes of one."""
    first, _ = _threefry(key, np.array([0, 1]), np.array([2, 3]))
    return int(first[0]), int(first[1])


def _threefry(key: tuple[int, int], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of 32-bit words, held in 64, scrambled by 20 rounds."""
    keys = [np.uint64(word) for word in (*key, key[0] ^ key[1] ^ 0x1BD11BDA)]
    x, y = ((part.astype(np.uint64) + word) & _WORD for part, word in zip((x, y), keys, strict=False))
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = (x + y) & _WORD
            y = ((y << np.uint64(rotation)) | (y >> np.uint64(32 - rotation))) & _WORD ^ x
        x = (x + keys[(group + 1) % 3]) & _WORD
        y = (y + keys[(group + 2) % 3] + np.uint64(group + 1)) & _WORD
    return x, y
