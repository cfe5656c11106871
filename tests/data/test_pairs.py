"""Pairs in a token file, their order, and how they are padded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terseformer.data import DataError, PairBatch, PairFile, TokenFile, pair_batch, pair_validation_batches
from terseformer.data.pairs import collate, evenly_spaced

END = 0
POOL = 16
"""Steps whose pairs are sorted by length."""
Pair = tuple[list[int], list[int]]


def token_file(pairs: list[Pair], end: int = END) -> TokenFile:
    """The file that these texts would give; of which only the tokens matter here."""
    tokens = [token for pair in pairs for text in pair for token in (*text, end)]
    about = {"num_documents": 2 * len(pairs), "num_bytes": 1, "vocab_size": 999, "tokenizer_sha256": ""}
    return TokenFile(Path("train.bin"), np.array(tokens, dtype=np.uint16), end_of_text_id=end, **about)


def numbered(count: int) -> list[Pair]:
    """Pairs of 1 to 7 and 0 to 4 tokens; the first of each source tells which it is."""
    return [([100 + number] + [1] * (number * 5 % 7), [2] * (number * 3 % 5)) for number in range(count)]


def members(batch: PairBatch) -> list[int]:
    return (batch.source[:, 0] - 100).tolist()


texts = st.lists(st.integers(2, 20), max_size=6)
pair_lists = st.lists(st.tuples(texts, texts), min_size=1, max_size=12)


@settings(max_examples=50)
@given(pair_lists, st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 1]))
def test_pairs_within_the_limits(pairs: list[Pair], max_source: int, max_target: int, pad: int) -> None:
    """The padding is the end of text (0), or another token (1)."""
    ending = [] if pad == END else [END]
    expected = [(source + ending, [*target, END]) for source, target in pairs]
    expected = [(s, t) for s, t in expected if 1 <= len(s) <= max_source and len(t) <= max_target]
    if not expected:
        with pytest.raises(
            DataError, match=f"none of the {len(pairs)} pairs in train.bin has at most {max_source} tok"
        ):
            PairFile(token_file(pairs), max_source, max_target, pad)
        return
    file = PairFile(token_file(pairs), max_source, max_target, pad)
    assert len(file) == len(expected)
    assert file.num_left_out == len(pairs) - len(expected)
    assert [(file.source(i).tolist(), file.target(i).tolist()) for i in range(len(file))] == expected
    assert file.num_source.tolist() == [len(source) for source, _ in expected]
    assert file.num_target.tolist() == [len(target) for _, target in expected]


def test_message_names_the_settings_to_change() -> None:
    with pytest.raises(
        DataError, match=r"at most 2 tokens in its source and 3 in its target; raise train.sequence_len"
    ):
        PairFile(token_file([([5] * 3, [6]), ([5], [6] * 3)]), 2, 3, END)
    assert len(PairFile(token_file([([5] * 3, [6]), ([5], [6] * 3)]), 3, 4, END)) == 2


@settings(max_examples=30)
@given(pair_lists.filter(lambda pairs: all(source for source, _ in pairs)), st.sampled_from([0, 1]))
def test_collated(pairs: list[Pair], pad: int) -> None:
    file = PairFile(token_file(pairs), 9, 9, pad)
    order = list(range(len(pairs)))[::-1]
    batch = file.collated(order)
    for array in (batch.source, batch.num_source, batch.target, batch.num_target):
        assert array.dtype == np.int64
    ending = [] if pad == END else [END]
    for row, index in enumerate(order):
        source, target = pairs[index]
        num_source, num_target = batch.num_source[row], batch.num_target[row]
        assert batch.source[row, :num_source].tolist() == source + ending
        assert batch.target[row, : num_target + 1].tolist() == [pad, *target, END]
        assert (batch.source[row, num_source:] == pad).all()
        assert (batch.target[row, num_target + 1 :] == pad).all()
    assert batch.source.shape[1] == batch.num_source.max()
    assert batch.target.shape[1] == batch.num_target.max() + 1


def test_collate_takes_what_it_is_given() -> None:
    batch = collate([np.array([7]), np.array([8, 9, 8])], [np.array([5, 6, 0]), np.array([0])], pad_token_id=3)
    assert batch.source.tolist() == [[7, 3, 3], [8, 9, 8]]
    assert batch.target.tolist() == [[3, 5, 6, 0], [3, 0, 3, 3]]
    assert (batch.num_source.tolist(), batch.num_target.tolist()) == ([1, 3], [3, 1])


# The order.


@pytest.mark.parametrize("count", [1, 7, 63, 200])
@settings(max_examples=8)
@given(seed=st.integers(-3, 2**70), batch_size=st.integers(1, 5), pools=st.integers(1, 3))
def test_each_pair_is_seen_once_an_epoch(count: int, seed: int, batch_size: int, pools: int) -> None:
    """After each pool of steps, that is: no pair is then ahead of another by more than one time."""
    file = PairFile(token_file(numbered(count)), 99, 99, END)
    times = np.zeros(count, dtype=int)
    for step in range(pools * POOL):
        (batch,) = pair_batch(file, seed=seed, step=step, batch_size=batch_size)
        assert len(members(batch)) == batch_size
        np.add.at(times, members(batch), 1)
        if (step + 1) % POOL == 0:
            assert times.max() - times.min() <= 1
    assert times.sum() == pools * POOL * batch_size


@settings(max_examples=30)
@given(
    count=st.integers(1, 90),
    seed=st.integers(0, 2**32),
    step=st.integers(0, 10**6),
    world_size=st.sampled_from([1, 2, 3]),
    num_parts=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 3),
)
def test_ranks_and_parts_share_the_global_batch(
    count: int, seed: int, step: int, world_size: int, num_parts: int, share: int
) -> None:
    file = PairFile(token_file(numbered(count)), 99, 99, END)
    step_of = {"seed": seed, "step": step, "batch_size": world_size * num_parts * share}
    (whole,) = pair_batch(file, **step_of)
    found = []
    for rank in range(world_size):
        parts = pair_batch(file, rank=rank, world_size=world_size, num_parts=num_parts, **step_of)
        assert [len(part.source) for part in parts] == [share] * num_parts
        for part in parts:
            # Each part is padded for itself, and holds the pairs that it names.
            expected = file.collated(members(part))
            np.testing.assert_array_equal(part.source, expected.source)
            np.testing.assert_array_equal(part.target, expected.target)
            found += members(part)
    assert sorted(found) == sorted(members(whole))


def test_order_is_pure_and_recorded() -> None:
    """The order is part of what a seed means: it must stay the same in later versions."""
    file = PairFile(token_file(numbered(50)), 99, 99, END)
    (first,) = pair_batch(file, seed=7, step=20, batch_size=4)
    for step in (5, 0, 10**6):
        pair_batch(file, seed=8, step=step, batch_size=4)
    (again,) = pair_batch(PairFile(token_file(numbered(50)), 99, 99, END), seed=7, step=20, batch_size=4)
    np.testing.assert_array_equal(first.source, again.source)
    np.testing.assert_array_equal(first.target, again.target)
    assert members(first) == [30, 24, 28, 40]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    file = PairFile(token_file(numbered(POOL * 4)), 99, 99, END)

    def epoch(seed: int, number: int) -> tuple[int, ...]:
        steps = range(number * POOL, (number + 1) * POOL)
        return tuple(i for step in steps for i in members(pair_batch(file, seed=seed, step=step, batch_size=4)[0]))

    orders = {epoch(seed, number) for seed in (0, 1) for number in (0, 1, 2)}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(POOL * 4)) for order in orders)


def test_pairs_of_a_step_are_about_equally_long() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 100, size=(400, 2))
    pairs = [([9] * int(source), [9] * int(target)) for source, target in sizes]
    file = PairFile(token_file(pairs), 100, 101, END)
    lengths = []
    for step in range(2 * POOL):
        (batch,) = pair_batch(file, seed=0, step=step, batch_size=8)
        lengths.append(batch.num_source + batch.num_target)
    spread = np.mean([np.ptp(row) for row in lengths])
    assert spread < 20 < np.ptp(np.concatenate(lengths)) / 5
    # But steps do not go from short to long.
    means = np.array([row.mean() for row in lengths])
    assert abs(np.corrcoef(np.arange(POOL), means[:POOL])[0, 1]) < 0.8
    # Nor does one process get the long ones.
    halves = [
        pair_batch(file, seed=0, step=s, rank=r, world_size=2, batch_size=8)[0] for s in range(2 * POOL) for r in (0, 1)
    ]
    totals = [sum(int((b.num_source + b.num_target).sum()) for b in halves[rank::2]) for rank in (0, 1)]
    assert totals[0] == pytest.approx(totals[1], rel=0.025)


# Validation.


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 20))
def test_validation_takes_each_pair_once(count: int, limit: int, batch_size: int) -> None:
    file = PairFile(token_file(numbered(count)), 99, 99, END)
    batches = list(pair_validation_batches(file, limit, batch_size))
    assert all(len(batch.source) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1].source) <= batch_size
    assert sorted(i for batch in batches for i in members(batch)) == evenly_spaced(count, limit).tolist()
    lengths = np.concatenate([batch.num_source for batch in batches])
    assert (np.diff(lengths) >= 0).all()


@given(st.integers(1, 200), st.integers(0, 250))
def test_evenly_spaced(total: int, limit: int) -> None:
    found = evenly_spaced(total, limit)
    assert len(found) == (min(limit, total) if limit else total)
    gaps = np.diff([*found, total])
    assert found[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
