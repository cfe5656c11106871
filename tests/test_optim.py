"""Schedules as closed forms; the optimisers against slow twins of their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from terseformer.config import TrainConfig
from terseformer.optim import learning_rate, make_optimizer, set_learning_rate


def rates(steps: int, **config) -> list[float]:
    return [learning_rate(TrainConfig(steps=steps, learning_rate=0.5, **config), step) for step in range(steps)]


def test_constant():
    assert rates(6, schedule="constant", warmup_steps=4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates(3, schedule="constant", warmup_steps=0) == [0.5, 0.5, 0.5]


def test_cosine():
    warm_up = [0.25, 0.5]
    rest = [0.5 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 7))) for k in range(1, 8)]
    config = {"schedule": "cosine", "warmup_steps": 2, "final_learning_rate": 0.2}
    assert rates(9, **config) == pytest.approx(warm_up + rest)
    assert rates(9, **config)[-1] == pytest.approx(0.1)
    assert rates(4, schedule="cosine", warmup_steps=9) == pytest.approx([0.5 * n / 9 for n in (1, 2, 3, 4)])
    assert rates(1, schedule="cosine", warmup_steps=0) == pytest.approx([0.05])


@pytest.mark.parametrize(
    ("optimizer", "warm_up"), [("adafactor", [0.25] * 4), ("adamw", [0.0625, 0.125, 0.1875, 0.25])]
)
def test_rsqrt(optimizer, warm_up):
    rest = [0.5 / math.sqrt(n) for n in range(5, 10)]
    assert rates(9, schedule="rsqrt", warmup_steps=4, optimizer=optimizer) == pytest.approx(warm_up + rest)
    assert learning_rate(TrainConfig(schedule="rsqrt", warmup_steps=0, learning_rate=0.5), 0) == 0.5


def slow_adafactor(w: np.ndarray, grads: list[np.ndarray], rates: list[float]) -> np.ndarray:
    """The reference's: squares raised by 1e-16, no limit to the rate."""
    w, row, column, full = w.astype(np.float64), 0.0, 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g = g.astype(np.float64)
        beta, square = 1 - t**-0.8, g * g + 1e-16
        if w.ndim >= 2:
            row = beta * row + (1 - beta) * square.mean(-1, keepdims=True)
            column = beta * column + (1 - beta) * square.mean(-2, keepdims=True)
            moment = row * column / row.mean(-2, keepdims=True)
        else:
            full = moment = beta * full + (1 - beta) * square
        update = g / np.sqrt(moment)
        update /= max(1, np.sqrt((update**2).mean()))
        w = w - rate * max(np.sqrt((w**2).mean()), 1e-3) * update
    return w


def slow_adamw(w: np.ndarray, grads: list[np.ndarray], rates: list[float], decay: float) -> np.ndarray:
    w, first, second = w.astype(np.float64), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g.astype(np.float64) ** 2
        w = w * (1 - rate * decay)
        w = w - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
    return w


def run(config: TrainConfig, w: np.ndarray, grads: list[np.ndarray], rates: list[float]) -> np.ndarray:
    weight = nn.Parameter(torch.tensor(w))
    optimizer = make_optimizer(nn.ParameterList([weight]), config)
    for g, rate in zip(grads, rates, strict=True):
        set_learning_rate(optimizer, rate)
        weight.grad = torch.tensor(g)
        optimizer.step()
    return weight.detach().numpy()


def draws(shape: tuple[int, ...], size: float, steps: int = 6) -> tuple[np.ndarray, list[np.ndarray]]:
    random = np.random.default_rng(0)
    grads = [size * random.normal(size=shape).astype(np.float32) for _ in range(steps)]
    return random.normal(size=shape).astype(np.float32), grads


def distance(reached: np.ndarray, expected: np.ndarray, start: np.ndarray) -> float:
    return float(np.abs(reached - expected).max() / np.abs(expected - start).max())


@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (3, 5, 7), (11,)], ids=str)
@pytest.mark.parametrize(("size", "tolerance"), [(1.0, 1e-5), (1e-3, 1e-5), (1e-5, 1e-4), (1e-6, 0.05)])
def test_adafactor(shape, size, tolerance):
    w, grads = draws(shape, size)
    rates = [0.3, 0.2, 0.1, 0.1, 0.05, 0.4]  # the last is just below 1 / sqrt(6)
    reached = run(TrainConfig(optimizer="adafactor", weight_decay=0.0), w, grads, rates)
    assert distance(reached, slow_adafactor(w, grads, rates), w) < tolerance


def test_adafactor_small_weights_move():
    w, grads = draws((5, 7), 1.0, steps=1)
    reached = run(TrainConfig(optimizer="adafactor", weight_decay=0.0), 0 * w, grads, [0.1])
    assert np.sqrt((reached**2).mean()) == pytest.approx(0.1 * 1e-3, rel=0.1)


def test_adafactor_rate_counts_as_at_most_one_over_root_of_step():
    w, grads = draws((5, 7), 1.0, steps=3)
    config = TrainConfig(optimizer="adafactor", weight_decay=0.0)
    assert (run(config, w, grads, [9.0] * 3) == run(config, w, grads, [n**-0.5 for n in (1, 2, 3)])).all()


@pytest.mark.parametrize(("shape", "decay"), [((5, 7), 0.2), ((11,), 0.0)])
def test_adamw_decays_matrices_alone(shape, decay):
    w, grads = draws(shape, 1e-2)
    rates = [0.01, 0.02, 0.03, 0.02, 0.01, 0.005]
    reached = run(TrainConfig(weight_decay=0.2), w, grads, rates)
    assert distance(reached, slow_adamw(w, grads, rates, decay), w) < 1e-4
