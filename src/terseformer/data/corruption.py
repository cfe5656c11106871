"""Span corruption: a text in which spans are replaced by sentinels, and what was there.

Source: Raffel et al. 2020 (T5), sections 3.1.4 and 3.3.2; `random_spans_noise_mask` of its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from terseformer.data.batches import batch, validation_windows
from terseformer.data.errors import DataError
from terseformer.data.pairs import PairBatch, collate
from terseformer.data.tokenizer import end_of_text_id, sentinel


class SpanCorruption:
    """Takes spans out of windows of text.

    Args:
        tokenizer: it has a sentinel for each span.
        length: tokens in a window.
        rate: share of the tokens that are taken out.
        mean_span_length: mean number of tokens in a span.
        target: `spans` (each sentinel with its span) or `text` (all of the window).
        pad_token_id: what fills up and starts a target. If it is not the tokenizer's end-of-text token, that ends each
            source.

    Raises:
        DataError: the tokenizer has too few sentinels.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        rate: float,
        mean_span_length: float,
        target: Literal["spans", "text"],
        pad_token_id: int,
    ) -> None:
        self.length, self.target, self.pad_token_id = length, target, pad_token_id
        self.num_noise = min(max(round(length * rate), 1), length - 1)
        num_spans = min(max(round(self.num_noise / mean_span_length), 1), length - self.num_noise)
        ids = [tokenizer.token_to_id(sentinel(number)) for number in range(num_spans)]
        if None in ids:
            raise DataError(
                f"windows of {length} tokens lose {num_spans} spans, but the tokenizer has only {ids.index(None)} "
                f"sentinels ({sentinel(0)}, ...); raise data.num_sentinels or lower train.sequence_length"
            )
        self._sentinels = np.array(ids)
        self._end = end_of_text_id(tokenizer)

    def spans(self, random: np.random.Generator) -> np.ndarray:
        """Lengths of what is kept and what is taken out in turn, at least 1 each; they sum to the window's length."""
        count = len(self._sentinels)
        kept = _random_parts(self.length - self.num_noise, count, random)
        return np.stack([kept, _random_parts(self.num_noise, count, random)], axis=1).ravel()

    def corrupted(self, windows: np.ndarray, seeds: list[list[int]]) -> PairBatch:
        """A batch: texts with sentinels in place of spans, and each sentinel with the span that it stands for.

        Args:
            windows: token ids, [B, length].
            seeds: for each row, what its spans are drawn from.
        """
        sources, targets = [], []
        for window, seed in zip(windows, seeds, strict=True):
            pieces = np.split(window, np.cumsum(self.spans(np.random.default_rng(seed)))[:-1])
            source, target = [], []
            for mark, kept, taken in zip(self._sentinels, pieces[::2], pieces[1::2], strict=True):
                source += [kept, [mark]]
                target += [[mark], taken]
            sources.append(np.concatenate(source + ([[self._end]] if self._end != self.pad_token_id else [])))
            targets.append(np.concatenate([*(target if self.target == "spans" else [window]), [self._end]]))
        return collate(sources, targets, self.pad_token_id)

    def batch(
        self,
        tokens: np.ndarray,
        *,
        seed: int,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int,
        num_parts: int = 1,
    ) -> list[PairBatch]:
        """The windows of one step, or the share of them that falls to one rank; a pure function, as `batches.batch` is.

        Args:
            tokens: all tokens, on end.
            seed: seed of the order and of the spans.
            step: number of the step, from 0.
            rank: this process.
            world_size: processes that share the batch.
            batch_size: windows in a step, over all ranks; a multiple of world_size * num_parts.
            num_parts: batches to divide the rank's share into.
        """
        windows = batch(
            tokens,
            seed=seed,
            step=step,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            sequence_length=self.length,
        )
        first = rank * len(windows)  # of the step's rows
        seeds = [[seed % 2**64, step, first + row] for row in range(len(windows))]
        size = len(windows) // num_parts
        starts = range(0, len(windows), size)
        return [self.corrupted(windows[i : i + size, :-1], seeds[i : i + size]) for i in starts]

    def validation_batches(self, tokens: np.ndarray, limit: int = 0, batch_size: int = 16) -> Iterator[PairBatch]:
        """Windows of a text, the same spans each time; a rest that fills no window is left out.

        Args:
            tokens: all tokens, on end.
            limit: windows at most; 0 takes all.
            batch_size: windows in a batch.

        Raises:
            DataError: there is no whole window.
        """
        number = 0
        for windows in validation_windows(tokens, self.length, limit, batch_size):
            if windows.shape[1] == self.length + 1:
                seeds = [[number + row] for row in range(len(windows))]
                yield self.corrupted(windows[:, :-1], seeds)
                number += len(windows)
        if not number:
            raise DataError(
                f"the validation text has {len(tokens)} tokens, but a window needs train.sequence_length + 1 = "
                f"{self.length + 1}; raise data.validation_fraction"
            )


def _random_parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of `count` parts of a whole, at least 1 each; all divisions are equally likely."""
    cuts = np.sort(random.permutation(total - 1)[: count - 1] + 1)
    return np.diff(np.concatenate([[0], cuts, [total]]))
