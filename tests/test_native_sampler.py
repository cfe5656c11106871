"""The native sampler against the PyTorch path's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from terseformer import native
from terseformer.drawing import probabilities
from terseformer.sampling import GenerationError, SamplingConfig
from test_drawing import on_the_edge, settings

number = st.one_of(st.integers(-4, 4).map(float), st.floats(-50, 50, width=32), st.just(-np.inf))
logits_of_a_row = st.lists(number, min_size=1, max_size=40)


def make_sampler(size: int, seed: int = 0, **changes: float) -> native.Sampler:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    defaults |= {"no_repeat_ngram_size": 0}
    return native.Sampler(native.Sampling(**(defaults | changes), seed=seed), size)


@given(logits_of_a_row, settings, st.randoms(use_true_random=False))
def test_distribution_is_the_pytorch_paths(logits, changes, random) -> None:
    assume(max(logits) > -np.inf)
    seen = [random.random() < 0.5 for _ in logits]
    config = SamplingConfig(**changes)
    assume(not near_the_edge(logits, seen, config))
    sampler = make_sampler(len(logits), **changes)
    for token in np.flatnonzero(seen):
        sampler.see(int(token))
    expected = probabilities(torch.tensor([logits]), torch.tensor([seen]), config)[0]
    got = sampler.distribution(np.array(logits, np.float32))
    assert_close(torch.tensor(got).double(), expected, rtol=2e-4, atol=1e-6)
    drawn = {sampler.next(np.array(logits, np.float32)) for _ in range(20)}
    assert all(expected[token] > 0 for token in drawn)


def near_the_edge(logits: list[float], seen: list[bool], config: SamplingConfig) -> bool:
    """Whether single precision may decide what stays."""
    return on_the_edge(logits, seen, config, 1e-4)


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4), st.sampled_from([1.0, 1.5]))
def test_what_would_repeat_an_ngram_is_never_drawn(text: list[int], size: int, penalty: float) -> None:
    logits = [0.5, 0.0, -0.5, 1.0]
    changes = {"no_repeat_ngram_size": size, "repetition_penalty": penalty}
    sampler = make_sampler(4, **changes)
    for token in text:
        sampler.see(token)
    got = sampler.distribution(np.array(logits, np.float32))
    seen = torch.tensor([[token in text for token in range(4)]])
    try:
        expected = probabilities(torch.tensor([logits]), seen, SamplingConfig(temperature=1.0, **changes), [text])[0]
    except GenerationError:
        assert got is None
        assert sampler.next(np.array(logits, np.float32)) == -1
    else:
        assert_close(torch.tensor(got).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(value: float) -> None:
    logits = np.array([0, value, 1], np.float32)
    assert make_sampler(3).next(logits) == -1
    assert make_sampler(3, temperature=0.0).next(logits) == -1
    assert make_sampler(3).next(np.full(3, -np.inf, np.float32)) == -1
    assert make_sampler(3).distribution(logits) is None


def test_sizes_and_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="there must be 3 logits, not 2"):
        make_sampler(3).next(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="there must be 3 logits, not 4"):
        make_sampler(3).distribution(np.zeros(4, np.float32))
    for token in (-1, 3):
        with pytest.raises(ValueError, match=rf"the token {token} is not in \[0, 3\)"):
            make_sampler(3, repetition_penalty=2.0).see(token)


def test_the_likeliest_token_stays_whatever_top_p_is() -> None:
    """Even one that is 0 in 32 bits."""
    logits = [0.0, 2.0, 1.0]
    assert make_sampler(3, top_p=1e-50).distribution(np.array(logits, np.float32)) == pytest.approx([0, 1, 0])
    expected = probabilities(torch.tensor([logits]), None, SamplingConfig(temperature=1.0, top_p=1e-50))
    assert expected.tolist() == [[0, 1, 0]]


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = make_sampler(4, seed=3)
    counts = np.bincount([sampler.next(logits) for _ in range(40_000)], minlength=4) / 40_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.01)


def test_a_seed_gives_its_own_draws() -> None:
    logits = np.zeros(100, np.float32)

    def draws(seed: int) -> list[int]:
        sampler = make_sampler(100, seed)
        return [sampler.next(logits) for _ in range(10)]

    assert draws(1) == draws(1) != draws(2)
