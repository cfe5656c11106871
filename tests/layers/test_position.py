"""Sinusoids, learned positions and rotation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from terseformer.layers.position import (
    AxialPositions,
    FixedBasePositions,
    LearnedPositions,
    SinusoidalPositions,
    rotate,
    sinusoids,
)


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


@pytest.mark.parametrize("width", [1, 7, 10])
def test_sines_before_cosines(width: int) -> None:
    positions = torch.tensor([[3, 0, 40]])
    features = sorted(range(width), key=lambda feature: feature % 2)
    assert_close(SinusoidalPositions(width, halves=True)(positions), sinusoids(positions, width)[..., features])


def fixed_base(layer: FixedBasePositions, position: int, is_start: bool) -> torch.Tensor:
    """Digit by digit."""
    blocks = []
    for index in range(8):
        block = torch.zeros(layer.digits.shape[-1])
        for base, weights in zip((11, 13, 14, 15), layer.digits.view(4, 8, -1), strict=True):
            block = block + position // base**index % base * weights[index]
        blocks.append(block)
    return torch.cat(blocks) + layer.start * is_start


def test_fixed_base_positions() -> None:
    layer = FixedBasePositions(16).eval()
    assert layer.digits.abs().max() <= 1e-4
    positions = torch.tensor([[0, 1, 10, 11, 12], [168, 2744, 99_999, 11**8 - 1, 0]])
    y = layer(positions)
    for row, places in zip(y, positions.tolist(), strict=True):
        for vector, place in zip(row, places, strict=True):
            assert_close(vector, fixed_base(layer, place, place == 0))


def test_fixed_base_positions_start_elsewhere_in_training() -> None:
    layer, positions = FixedBasePositions(8).train(), torch.arange(3).expand(4000, 3)
    with torch.no_grad():
        layer.digits.zero_()
        layer.digits[0] = 1.0  # the last digit in base 11, as the first feature
        layer.start.fill_(100.0)
    y = layer(positions)[..., 0]
    first = y[:, 0] - 100
    assert 0.45 < (first == 0).float().mean() < 0.65  # half of the rows, and one in 11 of the others
    whole = (first >= 0) & (first <= 10) & ((y[:, 1] == (first + 1) % 11) | (y[:, 1:] == 0).all(1))
    assert whole.all()
    assert 0.002 < (y[:, 1:] == 0).all(1).float().mean() < 0.03
    assert len(first.unique()) == 11


def test_axial_positions() -> None:
    layer = AxialPositions((3, 2, 4), (5, 1, 2))
    a, b, c = layer.tables
    positions = torch.tensor([[0, 5, 23, 99], [8, 1, 4, 13]])
    for row, places in zip(layer(positions), positions.tolist(), strict=True):
        for vector, place in zip(row, places, strict=True):
            place = min(place, 23)  # beyond the box
            assert_close(vector, torch.cat([a[place // 8], b[place // 4 % 2], c[place % 4]]))


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
