"""Sources and targets: what an encoder-decoder learns from, padded to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from terseformer.data.batches import shuffled
from terseformer.data.errors import DataError
from terseformer.data.tokens import TokenFile

_POOL = 16
"""Batches among which pairs are sorted by length, so that those of a batch need little padding."""


@dataclass(frozen=True)
class PairBatch:
    """Some sources and their targets; int64, right-padded."""

    source: np.ndarray
    """Of shape [B, N]."""
    num_source: np.ndarray
    """Real tokens of each source, [B]."""
    target: np.ndarray
    """Of shape [B, T + 1]: what starts a target, its tokens, the end-of-text token."""
    num_target: np.ndarray
    """Tokens of each target that are to be predicted, its end included, [B]."""


class PairFile:
    """The pairs of a token file whose documents are sources and targets in turn.

    Args:
        file: the token file.
        max_source: longest source, in tokens.
        max_target: longest target, in tokens, its end included. Longer pairs are left out.
        pad_token_id: what fills up and starts a target. If it is not the tokenizer's end-of-text token, that ends each
            source.

    Raises:
        DataError: the file holds no pair that is short enough.
    """

    def __init__(self, file: TokenFile, max_source: int, max_target: int, pad_token_id: int) -> None:
        ends = np.flatnonzero(file.tokens == file.end_of_text_id)
        assert len(ends) % 2 == 0, "a source has no target"
        starts = np.concatenate([[0], ends[:-1] + 1])
        self.file, self.pad_token_id = file, pad_token_id
        self._ends_source = file.end_of_text_id != pad_token_id
        num_source, num_target = (ends - starts)[::2] + self._ends_source, (ends - starts)[1::2] + 1
        kept = (num_source >= 1) & (num_source <= max_source) & (num_target <= max_target)
        self.num_source, self.num_target = num_source[kept], num_target[kept]
        self._sources, self._targets = starts[::2][kept], starts[1::2][kept]
        self.num_left_out = int((~kept).sum())
        if not len(self):
            raise DataError(
                f"none of the {len(kept)} pairs in {file.path} has at most {max_source} tokens in its source and "
                f"{max_target} in its target; raise train.sequence_length or train.objective.max_target_length"
            )

    def __len__(self) -> int:
        """Pairs that are short enough."""
        return len(self.num_source)

    def source(self, index: int) -> np.ndarray:
        """The tokens of a source."""
        start = self._sources[index]
        return self.file.tokens[start : start + self.num_source[index]]

    def target(self, index: int) -> np.ndarray:
        """The tokens of a target, with its end."""
        start = self._targets[index]
        return self.file.tokens[start : start + self.num_target[index]]

    def collated(self, indices: Sequence[int] | np.ndarray) -> PairBatch:
        """These pairs as a batch."""
        numbers = np.asarray(indices).tolist()
        return collate(list(map(self.source, numbers)), list(map(self.target, numbers)), self.pad_token_id)


def collate(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], pad_token_id: int) -> PairBatch:
    """Pads sources and targets; each target gets its start.

    Args:
        sources: token ids of each.
        targets: token ids of each, with its end.
        pad_token_id: the padding, which starts a target too.
    """
    starts = [np.concatenate([[pad_token_id], target]) for target in targets]
    return PairBatch(
        _padded(sources, pad_token_id),
        np.array([len(source) for source in sources], dtype=np.int64),
        _padded(starts, pad_token_id),
        np.array([len(target) for target in targets], dtype=np.int64),
    )


def _padded(rows: Sequence[np.ndarray], filler: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def pair_batch(
    pairs: PairFile, *, seed: int, step: int, rank: int = 0, world_size: int = 1, batch_size: int, num_parts: int = 1
) -> list[PairBatch]:
    """The pairs of one step, or the share of them that falls to one rank; a pure function, as `batch` is.

    Each pair is seen once an epoch. Pairs of similar length come together: those of 16 steps are sorted.

    Args:
        pairs: all pairs.
        seed: seed of the order.
        step: number of the step, from 0.
        rank: this process.
        world_size: processes that share the batch.
        batch_size: pairs in a step, over all ranks; a multiple of world_size * num_parts.
        num_parts: batches to divide the rank's share into.
    """
    pool, within = divmod(step, _POOL)
    number = _POOL * batch_size
    members, _ = shuffled(pool * number, number, len(pairs), seed)
    by_length = members[np.argsort(pairs.num_source[members] + pairs.num_target[members], kind="stable")]
    place, _ = shuffled(within, 1, _POOL, seed + pool)
    mine = by_length[int(place[0]) * batch_size :][:batch_size][rank::world_size]
    return [pairs.collated(part) for part in np.split(mine, num_parts)]


def pair_validation_batches(pairs: PairFile, limit: int = 0, batch_size: int = 16) -> Iterator[PairBatch]:
    """All pairs, or a number of them, evenly spaced; those of similar length together.

    Args:
        pairs: all pairs.
        limit: pairs at most; 0 takes all.
        batch_size: pairs in a batch.
    """
    chosen = evenly_spaced(len(pairs), limit)
    by_length = chosen[np.argsort(pairs.num_source[chosen], kind="stable")]
    for start in range(0, len(by_length), batch_size):
        yield pairs.collated(by_length[start : start + batch_size])


def evenly_spaced(total: int, limit: int) -> np.ndarray:
    """Indices below `total`, at most `limit` of them; 0 takes all."""
    count = min(limit, total) if limit else total
    return np.arange(count) * total // count
