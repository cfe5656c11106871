"""Sinusoids, learned positions and rotation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from terseformer.layers.position import LearnedPositions, SinusoidalPositions, rotate, sinusoids


@pytest.mark.parametrize("width", [1, 2, 7, 10])
def test_sinusoids(width: int) -> None:
    places = [0, 1, 5, 3, 200]
    table = sinusoids(torch.tensor(places), width)
    for row, place in zip(table, places, strict=True):
        for feature in range(width):
            angle = place / 10000 ** ((feature - feature % 2) / width)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert_close(row[feature].item(), expected, atol=2e-5, rtol=0)


def test_learned_positions_start_from_the_sinusoids_and_learn() -> None:
    layer = LearnedPositions(9, 5)
    positions = torch.tensor([[0, 8, 3], [2, 2, 7]])
    assert_close(layer(positions), SinusoidalPositions(5)(positions), atol=0, rtol=0)
    layer(positions).sum().backward()
    assert layer.weight.grad.abs().sum(1).tolist() == [5.0, 0.0, 10.0, 5.0, 0.0, 0.0, 0.0, 5.0, 5.0]


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_rotation_turns_each_pair_by_its_angle(theta: float) -> None:
    x, positions = torch.randn(2, 3, 4, 6), torch.tensor([[0, 1, 2, 3], [7, 3, 50, 9]])
    y = rotate(x, positions, theta)
    for b in range(2):
        for h in range(3):
            for t in range(4):
                for i in range(3):
                    turn = complex(0, float(positions[b, t]) * theta ** (-2 * i / 6))
                    pair = complex(x[b, h, t, i], x[b, h, t, i + 3]) * math.e**turn
                    assert_close(y[b, h, t, i].item(), pair.real, atol=1e-5, rtol=1e-5)
                    assert_close(y[b, h, t, i + 3].item(), pair.imag, atol=1e-5, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def product(at_q: int, at_k: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([[at_q]]), 1e4) * rotate(k, torch.tensor([[at_k]]), 1e4)).sum()

    assert_close(product(5, 2), product(105, 102), atol=1e-4, rtol=1e-4)
    assert (product(5, 2) - product(5, 3)).abs() > 1e-2
