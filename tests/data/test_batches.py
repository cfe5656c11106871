from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from terseformer.data import DataError, batch, num_windows, validation_windows


def starts(windows: np.ndarray) -> list[int]:
    """Where windows of np.arange stand; each must be consecutive tokens."""
    assert (np.diff(windows, axis=1) == 1).all()
    return windows[:, 0].tolist()


corpora = st.tuples(st.integers(1, 9), st.integers(0, 200)).map(lambda v: (v[0], v[0] + 1 + v[1]))
"""(sequence_length, number of tokens)"""


@given(corpora, st.integers(1, 7), st.integers(-3, 2**70), st.integers(0, 3))
def test_each_epoch_visits_each_window_once(corpus, batch_size, seed, epoch):
    length, num_tokens = corpus
    count = num_windows(num_tokens, length)
    tokens = np.arange(num_tokens, dtype=np.uint16)
    steps = range(epoch * count // batch_size, -(-(epoch + 1) * count // batch_size))
    drawn = [
        start
        for step in steps
        for start in starts(batch(tokens, seed=seed, step=step, batch_size=batch_size, sequence_length=length))
    ]
    skipped = epoch * count - steps[0] * batch_size
    visited = drawn[skipped : skipped + count]
    offset = min(visited)
    assert sorted(visited) == [offset + length * i for i in range(count)]
    assert 0 <= offset < length or count == 1
    assert max(visited) + length + 1 <= num_tokens
    # What no window of the epoch holds is less than two sequences, so later offsets reach it.
    assert num_tokens - 1 - count * length < 2 * length


@given(corpora, st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3), st.integers(0, 2**32), st.integers(0, 10**9))
def test_ranks_share_the_global_batch(corpus, world_size, share, seed, step):
    length, num_tokens = corpus
    tokens = np.arange(num_tokens, dtype=np.uint32)
    settings = {"seed": seed, "step": step, "batch_size": world_size * share, "sequence_length": length}
    parts = [batch(tokens, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    assert all(part.shape == (share, length + 1) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), batch(tokens, **settings))


def test_is_pure_and_recorded():
    """The order is part of what a seed means: it must stay the same in later versions."""
    tokens = np.arange(1000, dtype=np.uint16)
    first = batch(tokens, seed=7, step=3, batch_size=4, sequence_length=31)
    for step in (5, 0, 10**6):
        batch(tokens, seed=8, step=step, batch_size=4, sequence_length=31)
    again = batch(tokens.copy(), seed=7, step=3, batch_size=4, sequence_length=31)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.int64
    assert type(first) is np.ndarray
    assert first[:, 0].tolist() == [852, 635, 914, 480]


def test_seeds_and_epochs_have_orders_of_their_own():
    tokens = np.arange(10_001, dtype=np.uint16)
    count = num_windows(len(tokens), 10)

    def epoch(seed: int, number: int) -> list[int]:
        return starts(batch(tokens, seed=seed, step=number, batch_size=count, sequence_length=10))

    orders = [epoch(seed, number) for seed in (0, 1) for number in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert len({min(order) for order in orders}) > 1
    # No order resembles sorting: neighbours in time are far apart in the text on average, a third of its length.
    for order in orders:
        assert 3000 < np.abs(np.diff(order)).mean() < 3700


def test_every_permutation_of_few_windows_occurs_about_equally_often():
    tokens = np.arange(1 + 5, dtype=np.uint16)
    assert num_windows(len(tokens), 1) == 4
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(starts(batch(tokens, seed=seed, step=0, batch_size=4, sequence_length=1)))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert min(seen.values()) > 60
    assert max(seen.values()) < 140


@pytest.mark.parametrize("length", [1, 63, 1000])
def test_shortest_corpus(length):
    tokens = np.arange(length + 1, dtype=np.uint16)
    found = batch(tokens, seed=0, step=5, batch_size=3, sequence_length=length)
    np.testing.assert_array_equal(found, np.tile(tokens, (3, 1)))
    with pytest.raises(DataError, match=rf"has {length} tokens.*sequence_length \+ 1 = {length + 1}"):
        batch(tokens[1:], seed=0, step=0, batch_size=3, sequence_length=length)


def test_batch_that_the_ranks_cannot_share():
    with pytest.raises(DataError, match=r"batch_size = 7 is not a multiple of the 2 processes"):
        batch(np.arange(100), seed=0, step=0, rank=1, world_size=2, batch_size=7, sequence_length=3)


@given(st.integers(1, 9), st.integers(2, 200), st.integers(1, 5))
def test_validation_scores_each_token_once(length, num_tokens, batch_size):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    found = list(validation_windows(tokens, length, batch_size=batch_size))
    targets = np.concatenate([windows[:, 1:].ravel() for windows in found])
    inputs = np.concatenate([windows[:, :-1].ravel() for windows in found])
    np.testing.assert_array_equal(targets, tokens[1:])
    np.testing.assert_array_equal(inputs, tokens[:-1])
    for windows in found:
        assert windows.dtype == np.int64
        assert 1 <= len(windows) <= batch_size
    assert all(windows.shape[1] == length + 1 for windows in found[:-1])


@given(st.integers(1, 9), st.integers(2, 200), st.integers(1, 40))
def test_validation_limit_takes_whole_windows_evenly_spaced(length, num_tokens, limit):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    total = -(-(num_tokens - 1) // length)
    found = [start for windows in validation_windows(tokens, length, limit) for start in starts(windows)]
    assert len(found) == min(limit, total)
    assert all(start % length == 0 for start in found)
    gaps = np.diff([*found, total * length]) // length
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    if limit < total:
        assert all(windows.shape[1] == length + 1 for windows in validation_windows(tokens, length, limit))


def test_validation_of_nothing():
    with pytest.raises(DataError, match=r"has 1 tokens and needs at least 2"):
        next(validation_windows(np.arange(1), 4))
