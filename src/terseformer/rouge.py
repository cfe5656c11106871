"""ROUGE of summaries, and what summaries that need no model reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_RESAMPLES = 1000
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n")


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds 95 % of the means of resampled pairs; in hundredths."""

    low: float
    mid: float
    high: float


def rouge(references: Sequence[str], summaries: Sequence[str]) -> dict[str, Interval]:
    """F-measures, with stemming, over all pairs, each with its bootstrap interval.

    The scores are those of the library rouge-score, which the papers' figures come from.

    Args:
        references: what should have been written.
        summaries: what was written; a newline ends a sentence for `rougeLsum`.

    Returns:
        For each of `TYPES`, its interval.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([*TYPES], use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, summaries, strict=True)]
    values = 100 * np.array([[score[name].fmeasure for name in TYPES] for score in scores])
    random = np.random.default_rng(0)
    means = np.array([values[random.integers(len(values), size=len(values))].mean(0) for _ in range(_RESAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    rows = zip(TYPES, low.tolist(), values.mean(0).tolist(), high.tolist(), strict=True)
    return {name: Interval(*bounds) for name, *bounds in rows}


def baselines(num_words: float) -> dict[str, Callable[[str], str]]:
    """Summaries without a model: the first sentence, the first words, the whole source.

    Args:
        num_words: mean number of words of the references, which the second takes.
    """
    return {
        "first sentence": lambda source: _SENTENCE_END.split(source.strip(), maxsplit=1)[0],
        "first words": lambda source: " ".join(source.split()[: round(num_words)]),
        "whole source": lambda source: source,
    }
