"""The waves of infinite positions against numbers of the original, run with JAX 0.4.30."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from terseformer.layers.position import InfinitePositions
from terseformer.waves import waves

PLACES = [0, 1, 2, 63, 1000]
RECORDED = {
    7: [
        [0.6891, -0.7247, 0.8998, -0.4364, 0.6196, -0.7849, 0.8769],
        [0.0075, 1.0, 0.1852, -0.9827, 0.5751, -0.8181, 0.778],
        [-0.6094, -0.7929, -0.1994, -0.98, -0.1085, -0.9941, 0.6537],
        [-0.8708, 0.4917, -0.8837, -0.4681, -0.3238, 0.9461, 0.6972],
        [-0.8551, 0.5185, -0.1678, -0.9858, -0.9895, 0.1444, -0.7434],
    ],
    8: [
        [0.6891, -0.7247, 0.8998, -0.4364, 0.6196, -0.7849, 0.8769, -0.4807],
        [0.0075, 1.0, 0.0221, -0.9998, 0.556, -0.8312, 0.7764, -0.6302],
        [-0.6094, -0.7929, -0.5048, -0.8632, -0.1544, -0.988, 0.6498, -0.7601],
        [-0.8708, 0.4917, 0.9087, -0.4176, 0.9031, 0.4295, 0.5733, -0.8194],
        [-0.8551, 0.5185, -0.8273, -0.5618, 0.291, -0.9567, 0.2484, 0.9687],
    ],
}


@pytest.mark.parametrize("width", RECORDED)
def test_waves_are_those_of_the_original(width: int) -> None:
    """Up to its rounding, which grows with the position."""
    np.testing.assert_allclose(waves(1001, width)[PLACES], RECORDED[width], atol=5e-4)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_longer_tables_begin_alike(width: int) -> None:
    assert waves(9, width).shape == (9, width)
    np.testing.assert_array_equal(waves(9, width)[:4], waves(4, width))


def test_positions_are_waves_times_a_matrix() -> None:
    layer = InfinitePositions(20, 6)
    assert_close(layer.weight @ layer.weight.T, torch.eye(6), atol=1e-5, rtol=0)
    assert set(layer.state_dict()) == {"weight"}
    y = layer(torch.tensor([[0, 3, 19, 40]]))
    assert_close(y[0], torch.from_numpy(waves(20, 6)[[0, 3, 19, 19]]) @ layer.weight)
    y.sum().backward()
    assert layer.weight.grad is not None
