"""Span corruption: what is taken out of a window can be put back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from terseformer.data import DataError, PairBatch, SpanCorruption, batch, train_tokenizer, validation_windows

NUM_SENTINELS = 12
SENTINELS = range(1, 1 + NUM_SENTINELS)
END = 0
FIRST = 1 + NUM_SENTINELS
"""The first token of which windows are made here."""


def words(ending: str = "<|endoftext|>") -> Tokenizer:
    """A tokenizer without text: an end, sentinels, and nothing else that matters."""
    tokenizer = Tokenizer(models.WordLevel({"?": 999}, unk_token="?"))
    for number, name in enumerate([ending, *(f"<extra_id_{i}>" for i in range(NUM_SENTINELS))]):
        tokenizer.add_special_tokens([AddedToken(name)])
        assert tokenizer.token_to_id(name) is not None, number
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], 257 + NUM_SENTINELS, NUM_SENTINELS)


def make(tokenizer: Tokenizer, length: int, rate: float = 0.15, mean: float = 3.0, **changes: Any) -> SpanCorruption:
    return SpanCorruption(tokenizer, length, rate, mean, **({"target": "spans", "pad_token_id": END} | changes))


def pieces(row: np.ndarray, start: int) -> dict[int, list[int]]:
    """What follows each sentinel; under 0, what comes before the first."""
    found: dict[int, list[int]] = {0: []}
    for token in row[start:].tolist():
        if token in SENTINELS:
            assert token not in found
            found[token] = []
        else:
            found[list(found)[-1]].append(token)
    return found


def put_back(source: list[int], spans: dict[int, list[int]]) -> list[int]:
    return [token for mark in source for token in (spans[mark] if mark in SENTINELS else [mark])]


cases = st.tuples(st.integers(2, 70), st.floats(0, 0.5), st.floats(1, 9)).filter(
    lambda case: case[0] * case[1] / case[2] < NUM_SENTINELS - 1
)
"""Length, rate and mean length of spans."""


@settings(max_examples=50)
@given(case=cases, seed=st.integers(0, 2**64), pad=st.sampled_from([END, FIRST]))
def test_spans_in_place_of_sentinels_give_the_window(tokenizer, case, seed, pad) -> None:
    length, rate, mean = case
    corruption = make(tokenizer, length, rate, mean, pad_token_id=pad)
    windows = np.random.default_rng(0).integers(FIRST + 1, 250, size=(3, length))
    found = corruption.corrupted(windows, [[seed, row] for row in range(3)])
    ending = [] if pad == END else [END]
    num_noise = min(max(round(length * rate), 1), length - 1)
    num_spans = min(max(round(num_noise / mean), 1), length - num_noise)
    for row, window in enumerate(windows):
        source = found.source[row, : found.num_source[row]].tolist()
        target = found.target[row, : found.num_target[row] + 1]
        assert target[0] == pad
        assert target[-1] == END
        assert source[len(source) - len(ending) :] == ending
        source = source[: len(source) - len(ending)]
        spans = pieces(target[:-1], 1)
        assert spans.pop(0) == []
        assert put_back(source, spans) == window.tolist()
        # Sentinels count up from the first, in both; none stands beside another, nor first.
        assert list(spans) == [token for token in source if token in SENTINELS] == list(SENTINELS[:num_spans])
        assert all(spans.values())
        assert source[0] not in SENTINELS
        assert not any(a in SENTINELS and b in SENTINELS for a, b in itertools.pairwise(source))
        # As many tokens are taken out as the rate says.
        assert sum(map(len, spans.values())) == num_noise
        assert len(source) == length - num_noise + num_spans
        assert found.num_target[row] == num_noise + num_spans + 1


@settings(max_examples=50)
@given(case=cases, seed=st.integers(0, 2**64))
def test_the_text_as_target(tokenizer, case, seed) -> None:
    length, rate, mean = case
    windows = np.random.default_rng(0).integers(FIRST, 250, size=(2, length))
    spans, text = (
        make(tokenizer, length, rate, mean, target=target).corrupted(windows, [[seed], [seed, 1]])
        for target in ("spans", "text")
    )
    np.testing.assert_array_equal(text.source, spans.source)
    np.testing.assert_array_equal(text.target, np.pad(windows, ((0, 0), (1, 1)), constant_values=END))
    assert text.num_target.tolist() == [length + 1] * 2


def test_spans_of_all_lengths_are_drawn(tokenizer) -> None:
    """Ten tokens in three spans: each of the 36 divisions about equally often."""
    corruption = make(tokenizer, length=40, rate=0.25, mean=3.0)
    seen: dict[tuple[int, ...], int] = {}
    places = []
    for seed in range(3600):
        lengths = corruption.spans(np.random.default_rng(seed))
        assert lengths.sum() == 40
        assert lengths[1::2].sum() == 10
        assert lengths.min() >= 1
        key = tuple(lengths[1::2].tolist())
        seen[key] = seen.get(key, 0) + 1
        places.append(int(lengths[0]))
    assert len(seen) == 36
    assert min(seen.values()) > 60
    assert max(seen.values()) < 150
    assert min(places) == 1
    assert max(places) == 28


@pytest.mark.parametrize(
    ("length", "rate", "mean", "num_noise", "num_spans"),
    [
        (128, 0.15, 3.0, 19, 6),
        (20, 0.15, 3.0, 3, 1),
        (2, 0.0, 3.0, 1, 1),
        (2, 1.0, 1.0, 1, 1),
        (9, 1.0, 1.0, 8, 1),
        (10, 0.5, 1.0, 5, 5),
        (11, 0.6, 1.0, 7, 4),
        (50, 0.2, 99.0, 10, 1),
    ],
)
def test_numbers_of_tokens_and_spans(tokenizer, length, rate, mean, num_noise, num_spans) -> None:
    corruption = make(tokenizer, length, rate, mean)
    assert corruption.num_noise == num_noise
    assert len(corruption.spans(np.random.default_rng(0))) == 2 * num_spans


def test_too_few_sentinels(tokenizer) -> None:
    with pytest.raises(
        DataError,
        match=r"windows of 27 tokens lose 13 spans, but the tokenizer has only 12 sentinels \(<extra_id_0>, ...\); "
        r"raise data.num_sentinels or lower train.sequence_length",
    ):
        make(tokenizer, 27, 0.5, 1.0)
    with pytest.raises(DataError, match="lose 6 spans, but the tokenizer has only 0 sentinels"):
        make(train_tokenizer(["some text"], 257), 128)


def test_a_foreign_tokenizer() -> None:
    """Sentinels and the end wherever they stand in the vocabulary; the end is no padding there."""
    tokenizer = words("</s>")
    ids = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(2)]
    end = tokenizer.token_to_id("</s>")
    corruption = make(tokenizer, 9, 0.5, 2.0, pad_token_id=77)
    found = corruption.corrupted(np.full((1, 9), 500), [[3]])
    assert [token for token in found.source[0] if token != 500] == [*ids, end]
    assert [token for token in found.target[0] if token != 500] == [77, *ids, end]


# Steps.

TOKENS = np.arange(FIRST, 250, dtype=np.uint16)


def rows(batches: list[PairBatch]) -> list[tuple[list[int], list[int]]]:
    return [
        (source[:n].tolist(), target[: m + 1].tolist())
        for found in batches
        for source, n, target, m in zip(found.source, found.num_source, found.target, found.num_target, strict=True)
    ]


@settings(max_examples=30)
@given(
    seed=st.integers(-3, 2**70),
    step=st.integers(0, 10**9),
    world_size=st.sampled_from([1, 2, 3]),
    num_parts=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 2),
)
def test_ranks_and_parts_share_the_global_batch(tokenizer, seed, step, world_size, num_parts, share) -> None:
    corruption = make(tokenizer, 21, rate=0.4, mean=2.0)
    step_of = {"seed": seed, "step": step, "batch_size": world_size * num_parts * share}
    whole = rows(corruption.batch(TOKENS, **step_of))
    found = []
    for rank in range(world_size):
        parts = corruption.batch(TOKENS, rank=rank, world_size=world_size, num_parts=num_parts, **step_of)
        assert [len(part.source) for part in parts] == [share] * num_parts
        found += rows(parts)
    assert found == whole
    windows = batch(TOKENS, sequence_length=21, **step_of)[:, :-1]
    for (source, target), window in zip(whole, windows, strict=True):
        assert put_back(source, pieces(np.array(target[:-1]), 1)) == window.tolist()


def test_is_pure_and_recorded(tokenizer) -> None:
    """The spans are part of what a seed means: they must stay the same in later versions."""
    corruption = make(tokenizer, 13, rate=0.3, mean=2.0)
    first = corruption.batch(TOKENS, seed=7, step=3, batch_size=2)
    for step in (5, 0, 10**6):
        corruption.batch(TOKENS, seed=8, step=step, batch_size=4)
    assert rows(make(tokenizer, 13, rate=0.3, mean=2.0).batch(TOKENS.copy(), seed=7, step=3, batch_size=2)) == rows(
        first
    )
    assert [target for _, target in rows(first)] == [
        [0, 1, 104, 2, 110, 111, 112, 0],
        [0, 1, 28, 29, 30, 2, 34, 0],
    ]


def test_steps_seeds_and_rows_have_spans_of_their_own(tokenizer) -> None:
    corruption = make(tokenizer, 100)
    text = np.arange(1000, 1101, dtype=np.uint16)  # one window only
    shapes = [
        tuple(target)
        for seed in range(3)
        for step in range(3)
        for _, target in rows(corruption.batch(text, seed=seed, step=step, batch_size=3))
    ]
    assert len(set(shapes)) == len(shapes) == 27


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(3, 120), st.integers(0, 20), st.integers(1, 5))
def test_validation_takes_whole_windows_each_time_alike(tokenizer, length, count, limit, batch_size) -> None:
    corruption, tokens = make(tokenizer, length, rate=0.4, mean=1.0), np.arange(FIRST, FIRST + count, dtype=np.uint16)
    if count < length + 1:
        with pytest.raises(
            DataError, match=rf"has {count} tokens, but a window needs .* = {length + 1}; raise data.va"
        ):
            list(corruption.validation_batches(tokens, limit, batch_size))
        return
    batches = list(corruption.validation_batches(tokens, limit, batch_size))
    found = rows(batches)
    assert found == rows(list(corruption.validation_batches(tokens, limit, batch_size)))
    assert all(1 <= len(each.source) <= batch_size for each in batches)
    windows = [w for some in validation_windows(tokens, length, limit) for w in some if len(w) == length + 1]
    assert len(found) == len(windows) == min(limit or count, (count - 1) // length)
    for (source, target), window in zip(found, windows, strict=True):
        assert put_back(source, pieces(np.array(target[:-1]), 1)) == window[:-1].tolist()
