"""Sampling against slow, obvious twins."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from terseformer.config import ConfigError
from terseformer.configfile import from_json, to_json
from terseformer.drawing import new_generator, probabilities, sample
from terseformer.sampling import GenerationError, SamplingConfig

# Integers give many ties.
number = st.one_of(st.integers(-4, 4).map(float), st.floats(-50, 50, width=32), st.just(-math.inf))
tables = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(number, min_size=size, max_size=size), min_size=1, max_size=4)
)
settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.integers(0, 14),
        "top_p": st.sampled_from([0.001, 0.3, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.5]),
    }
)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def twin(logits: list[float], seen: list[bool], config: SamplingConfig) -> np.ndarray:
    """One row's distribution, token by token."""
    scores = np.array(logits, dtype=np.float64)
    for token in range(len(scores)):
        if seen[token]:
            scores[token] *= 1 / config.repetition_penalty if scores[token] > 0 else config.repetition_penalty
    if config.temperature == 0:
        return np.eye(len(scores))[int(np.argmax(scores))]
    scores /= config.temperature
    if config.top_k:
        kth = sorted(scores, reverse=True)[min(config.top_k, len(scores)) - 1]
        scores = np.array([score if score >= kth else -math.inf for score in scores])
    p = softmax(scores)
    kept, mass = [], 0.0
    for token in sorted(range(len(scores)), key=lambda token: (-p[token], token)):
        if mass < config.top_p or config.top_p == 1:
            kept.append(token)
            mass += p[token]
    scores = np.array([score if token in kept else -math.inf for token, score in enumerate(scores)])
    p = softmax(scores)
    return softmax(np.where(p >= config.min_p * p.max(), scores, -math.inf))


def on_the_edge(logits: list[float], seen: list[bool], config: SamplingConfig, width: float = 1e-9) -> bool:
    """Whether rounding alone decides what stays."""
    first, second = (
        dataclasses.replace(
            config, top_p=min(1.0, config.top_p + up), min_p=min(1.0, max(0.0, config.min_p * (1 + down)))
        )
        for up, down in ((width, width), (-min(width, config.top_p / 2) * (config.top_p < 1), -width))
    )
    return not np.array_equal(twin(logits, seen, first) > 0, twin(logits, seen, second) > 0)


@given(tables, settings, st.randoms(use_true_random=False))
def test_probabilities_are_the_twins(table, changes, random):
    config = SamplingConfig(**changes)
    assume(all(max(row) > -math.inf for row in table))
    seen = [[random.random() < 0.5 for _ in row] for row in table]
    assume(not any(on_the_edge(row, s, config) for row, s in zip(table, seen, strict=True)))
    got = probabilities(torch.tensor(table), torch.tensor(seen), config)
    assert got.dtype == torch.float64
    expected = np.stack([twin(row, s, config) for row, s in zip(table, seen, strict=True)])
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(tables, settings, st.integers(0, 2**63 - 1))
def test_a_drawn_token_has_a_probability_and_ignores_its_neighbours(table, changes, seed):
    config = SamplingConfig(**changes)
    assume(all(max(row) > -math.inf for row in table))
    logits = torch.tensor(table)
    tokens = sample(logits, None, config, [new_generator(seed) for _ in table])
    assert (probabilities(logits, None, config).gather(1, tokens[:, None]) > 0).all()
    for row, token in enumerate(tokens.tolist()):
        assert sample(logits[row : row + 1], None, config, [new_generator(seed)]).tolist() == [token]


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=1.3, top_k=4)
    logits = torch.tensor([[1.0, -1.0, 0.5, 2.0, 0.0, -math.inf]])
    generator = new_generator(3)
    tokens = sample(logits.expand(20_000, -1), None, config, [generator] * 20_000)
    share = tokens.bincount(minlength=6) / len(tokens)
    assert_close(share.double(), probabilities(logits, None, config)[0], atol=0.01, rtol=0)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_extreme_draws_stay_among_the_possible(draw, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([draw], dtype=torch.float64))
    logits = torch.tensor([[-math.inf, 0.1, -800.0, 0.3, 0.2, -800.0, -math.inf]] * 3) * torch.tensor([[1], [1.7], [3]])
    tokens = sample(logits, None, SamplingConfig(temperature=1.0), [new_generator(0)] * 3)
    assert tokens.tolist() == [1 if draw == 0 else 4] * 3


def test_ties():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    generator = new_generator(0)
    assert sample(logits, None, SamplingConfig(temperature=0.0), [generator]).tolist() == [1]
    support = {
        "top_k": (probabilities(logits, None, SamplingConfig(top_k=1)) > 0).tolist(),
        "top_p": (probabilities(logits, None, SamplingConfig(top_p=0.1)) > 0).tolist(),
        "min_p": (probabilities(logits, None, SamplingConfig(min_p=1.0)) > 0).tolist(),
    }
    equal = [[False, True, True, True]]
    assert support == {"top_k": equal, "top_p": [[False, True, False, False]], "min_p": equal}


def test_top_p_takes_the_first_of_many_equals():
    logits = torch.zeros(1, 1024)  # their probabilities and sums are exact
    assert (probabilities(logits, None, SamplingConfig(top_p=0.5)) > 0)[0].nonzero()[:, 0].tolist() == list(range(512))


def test_extreme_numbers():
    logits = torch.tensor([[3e38, -3e38, 2.9e38]])
    for temperature in (5e-324, 1e-30, 1.0, 1e300):
        p = probabilities(logits, torch.ones(1, 3, dtype=torch.bool), SamplingConfig(temperature=temperature))
        assert p.isfinite().all()
        assert p.argmax() == 0
    assert_close(p, torch.full((1, 3), 1 / 3, dtype=torch.float64))


def test_half_precision_logits():
    logits = torch.tensor([[0.5, 1.5]], dtype=torch.bfloat16)
    p = probabilities(logits, None, SamplingConfig(temperature=1.0))
    assert_close(p, torch.tensor([[0.5, 1.5]]).double().softmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, math.nan], "1 of 2 are NaN and the largest is nan in row 1"),
        ([math.inf, 0.0], "0 of 2 are NaN and the largest is inf in row 1"),
        ([-math.inf, -math.inf], "the largest is -inf in row 1"),
    ],
)
def test_unusable_logits(bad, message, temperature):
    with pytest.raises(GenerationError, match=message):
        sample(torch.tensor([[0.0, 1.0], bad]), None, SamplingConfig(temperature=temperature), [new_generator(0)] * 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_wrong_configurations(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name} must be .*, not "):
        SamplingConfig(**wrong)


def test_configuration_round_trip():
    config = SamplingConfig(max_new_tokens=3, temperature=0.0, stop=("\n", "é"), seed=5)
    assert from_json(SamplingConfig, to_json(config)) == config
