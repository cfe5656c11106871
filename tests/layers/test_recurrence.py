"""Simple recurrent units: the parallel scan against a loop, and the carry from call to call."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracles
from terseformer.layers.recurrence import SRU, RecurrentBranch, linear_recurrence
from terseformer.state import Chunk, RecurrentCarry
from variants import make_visible

LENGTHS = [1, 2, 3, 4, 7, 8, 9, 33]


def chunk(batch: int, start: int, end: int) -> Chunk:
    return Chunk(torch.arange(start, end).expand(batch, -1), end=end)


@pytest.mark.parametrize("length", LENGTHS)
def test_linear_recurrence_equals_a_loop(length: int) -> None:
    forget = torch.rand(2, length, 3, dtype=torch.float64)
    update, start = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    expected, state = [], start
    for t in range(length):
        state = forget[:, t] * state + update[:, t]
        expected.append(state)
    assert_close(linear_recurrence(forget, update, start), torch.stack(expected, dim=1))


def test_linear_recurrence_has_the_right_gradients() -> None:
    sizes = ((2, 5, 2), (2, 5, 2), (2, 2))
    inputs = [torch.rand(*size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(linear_recurrence, inputs)


@pytest.mark.parametrize("length", LENGTHS)
def test_sru_equals_a_loop(length: int) -> None:
    layer = make_visible(SRU(3).double())
    x = torch.randn(2, length, 3, dtype=torch.float64)
    expected = torch.stack([oracles.sru(row, layer.gates.weight, layer.gates.bias)[0] for row in x])
    assert_close(layer(x, chunk(2, 0, length)), expected)


def test_sru_carries_its_state_from_call_to_call() -> None:
    layer = make_visible(SRU(3).double())
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    carry, parts = RecurrentCarry(torch.zeros(2, 3, dtype=torch.float64)), []
    for start, end in ((0, 1), (1, 4), (4, 7)):
        parts.append(layer(x[:, start:end], chunk(2, start, end), carry))
        for row in range(2):
            state = oracles.sru(x[row, :end], layer.gates.weight, layer.gates.bias)[1]
            assert_close(carry.carry[row], state)
    assert_close(torch.cat(parts, dim=1), layer(x, chunk(2, 0, 7)))


def test_branch_is_dense_recurrent_layers_dense() -> None:
    branch = make_visible(RecurrentBranch(5, 3, 2).double())
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    inner = branch.down(x)[0]
    for layer in branch.layers:
        inner = oracles.sru(inner, layer.gates.weight, layer.gates.bias)[0]
    assert_close(branch(x, chunk(1, 0, 6))[0], branch.up(inner))
    assert [c.carry.shape for c in branch.new_carries(4)] == [(4, 3), (4, 3)]
