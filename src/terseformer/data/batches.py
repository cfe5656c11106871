"""Which tokens a step sees: a pure function of (seed, step, rank), without state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from terseformer.data.errors import DataError

_ROUNDS = 6
_WORD = 2**64 - 1


def batch(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int,
    sequence_length: int,
) -> np.ndarray:
    """The sequences of one step, or the share of them that falls to one rank.

    With T = `sequence_length`, an epoch has num_windows(...) windows of T inputs and T targets (T + 1 tokens; a
    window's last target is the next one's first input). They start at a random offset below T and come in a random
    order, both drawn from (seed, epoch). Each is seen once an epoch; fewer than 2T tokens at the ends are left to
    other epochs. Ranks hold consecutive rows of the same global batch.

    Args:
        tokens: all tokens, on end.
        seed: seed of the order.
        step: number of the step, from 0.
        rank: this process.
        world_size: processes that share the batch.
        batch_size: sequences in a step, over all ranks.
        sequence_length: T.

    Returns:
        int64 of shape [batch_size // world_size, T + 1].

    Raises:
        DataError: there are too few tokens for one sequence, or the ranks cannot share the batch evenly.
    """
    assert step >= 0
    assert 0 <= rank < world_size
    if batch_size % world_size:
        raise DataError(
            f"train.batch_size = {batch_size} is not a multiple of the {world_size} processes; change one of them"
        )
    count = num_windows(len(tokens), sequence_length)
    share = batch_size // world_size
    order, keys = shuffled(step * batch_size + rank * share, share, count, seed)
    room = min(sequence_length - 1, len(tokens) - 1 - count * sequence_length)
    starts = order * np.uint64(sequence_length) + _mix(~keys) % np.uint64(room + 1)
    return _gather(tokens, starts.tolist(), sequence_length)


def shuffled(first: int, number: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places first, first + 1, ... of an endless sequence in which each epoch is range(count) in an order of its own.

    Returns:
        What stands at `number` places, and a random number for the epoch of each; both uint64.
    """
    epochs, indices = np.divmod(np.arange(first, first + number, dtype=np.uint64), np.uint64(count))
    keys = _mix(epochs + _mix(np.array([seed & _WORD], dtype=np.uint64)))
    return _permute(indices, count, keys), keys


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows in an epoch: as many as fit at every offset, and at least one.

    Raises:
        DataError: there are too few tokens for one sequence and its targets.
    """
    if num_tokens < sequence_length + 1:
        raise DataError(
            f"the training text has {num_tokens} tokens, but a sequence needs train.sequence_length + 1 = "
            f"{sequence_length + 1}; give more text in data.sources or a smaller train.sequence_length"
        )
    return max(1, (num_tokens - 1) // sequence_length - 1)


def validation_windows(
    tokens: np.ndarray, sequence_length: int, limit: int = 0, batch_size: int = 16
) -> Iterator[np.ndarray]:
    """Windows that cover `tokens`, so that each token but the first is a target exactly once.

    The rest that fills no window comes last, alone, as a shorter array [1, t + 1]: weight a batch's mean loss by its
    number of targets. With a `limit` below the number of windows, that many full ones are taken, evenly spaced.

    Args:
        tokens: all tokens, on end.
        sequence_length: T, inputs and targets in a window.
        limit: windows at most; 0 takes all.
        batch_size: windows in an array.

    Yields:
        int64 of shape [b, T + 1] with b <= batch_size.

    Raises:
        DataError: there are fewer than two tokens, so nothing can be predicted.
    """
    if len(tokens) < 2:
        raise DataError(
            f"the validation text has {len(tokens)} tokens and needs at least 2; raise data.validation_fraction"
        )
    full, rest = divmod(len(tokens) - 1, sequence_length)
    total = full + (rest > 0)
    count = min(limit, total) if limit else total
    chosen = [index * total // count for index in range(count)]
    whole = [index for index in chosen if index < full]
    for at in range(0, len(whole), batch_size):
        starts = [index * sequence_length for index in whole[at : at + batch_size]]
        yield _gather(tokens, starts, sequence_length)
    if len(whole) < len(chosen):
        yield _gather(tokens, [full * sequence_length], rest)


def _gather(tokens: np.ndarray, starts: list[int], length: int) -> np.ndarray:
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)


def _permute(indices: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(count) for each key: a Feistel network on the next power of 4, repeated until in range."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.copy()
    pending = np.arange(len(values))
    while len(pending):
        left, right = values[pending] >> half, values[pending] & mask
        key = keys[pending]
        for _ in range(_ROUNDS):
            key = _mix(key)
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[pending] = left << half | right
        pending = pending[values[pending] >= count]
    return values


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): the output for each state."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
