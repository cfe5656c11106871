"""ROUGE against sums by hand, and the summaries that need no model."""

from __future__ import annotations

import pytest

from terseformer.rouge import TYPES, baselines, rouge

REFERENCES = ["the cat sat on the mat", "a dog barked", "nothing"]
SUMMARIES = ["the cat sat on a mat", "dogs barking", "something else"]


def test_scores_by_hand() -> None:
    """F = 2 P R / (P + R) of words, of pairs of words, and of the longest common subsequence; stems are compared."""
    scores = rouge(REFERENCES, SUMMARIES)
    words = [2 * (5 / 6) * (5 / 6) / (10 / 6), 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3), 0]
    pairs = [2 * (3 / 5) * (3 / 5) / (6 / 5), 2 * 1 * (1 / 2) / (1 + 1 / 2), 0]
    assert scores["rouge1"].mid == pytest.approx(100 * sum(words) / 3)
    assert scores["rouge2"].mid == pytest.approx(100 * sum(pairs) / 3)
    assert scores["rougeL"].mid == pytest.approx(100 * sum(words) / 3)


def test_intervals_hold_the_mean_and_shrink() -> None:
    few = rouge(REFERENCES * 3, SUMMARIES * 3)
    many = rouge(REFERENCES * 100, SUMMARIES * 100)
    for name in TYPES:
        assert 0 <= few[name].low <= few[name].mid <= few[name].high <= 100
        assert many[name].high - many[name].low < few[name].high - few[name].low
        assert many[name].mid == pytest.approx(few[name].mid)
    assert few == rouge(REFERENCES * 3, SUMMARIES * 3)


def test_baselines() -> None:
    source = "It reads images. It writes e.g. PNG\nand more."
    shortened = {name: short(source) for name, short in baselines(4.4).items()}
    assert shortened == {
        "first sentence": "It reads images.",
        "first words": "It reads images. It",
        "whole source": source,
    }
    assert baselines(3.0)["first sentence"]("no end") == "no end"
