"""How text is drawn from a model, or searched for: what a user may set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from terseformer.config import ConfigError
from terseformer.errors import UserError

MAX_BEAMS = 1024
"""Beginnings that are followed side by side, at most."""


class GenerationError(UserError, ValueError):
    """Text that cannot be generated: the message says what was given and what to change."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is drawn from a model, or searched for."""

    max_new_tokens: int = 128
    """Tokens to generate at most; the end of the model's context ends a text as well."""
    temperature: float = 0.8
    """Below 1 likely tokens become likelier, above 1 less so; 0 always takes the likeliest."""
    top_k: int = 0
    """Draw only from the k likeliest tokens (and those as likely as the last of them); 0: from all."""
    top_p: float = 1.0
    """Draw only from the fewest tokens that have this probability together; 1: from all."""
    min_p: float = 0.0
    """Draw only from tokens with at least this share of the likeliest token's probability; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely; 1 changes nothing."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens stands twice in prompt and text; 0: it may."""
    num_beams: int = 1
    """Above 1, so many beginnings are followed side by side for the likeliest text, up to 1024. Nothing is drawn then:
    the temperature changes nothing, and the text comes all at once."""
    length_penalty: float = 1.0
    """With beams: a text's score is the sum of its tokens' log-probabilities over its length to this power; above 0,
    longer texts gain."""
    early_stopping: bool = False
    """With beams: end as soon as `num_beams` texts have ended; else, when moreover the likeliest of those that go on
    would score no better than the worst of them if it ended at its present length."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""

    def __post_init__(self) -> None:
        stops = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        for name, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]"),
            ("no_repeat_ngram_size", 0 <= self.no_repeat_ngram_size < 2**31, "in [0, 2^31)"),
            ("num_beams", 1 <= self.num_beams <= MAX_BEAMS, f"in [1, {MAX_BEAMS}]"),
            ("length_penalty", -10 <= self.length_penalty <= 10, "in [-10, 10]"),
            ("stop", stops, "a tuple of strings, none of them empty"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}")
        if self.num_beams == 1:
            return
        if self.stop:
            raise ConfigError("beams know no stop strings; leave out stop, or make num_beams 1")
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(self, name)
            if value not in (getattr(SamplingConfig, name), 0):
                raise ConfigError(
                    f"beams draw nothing, so that {name} ({value}) is in vain; leave it out, or make num_beams 1"
                )


def nothing_left(config: SamplingConfig) -> GenerationError:
    """The error of a text that cannot go on, because every token would repeat something."""
    return GenerationError(
        f"every token would repeat a sequence of {config.no_repeat_ngram_size} (no_repeat_ngram_size); make that "
        "larger, or max_new_tokens smaller"
    )


DEFAULT_SAMPLING = SamplingConfig()
DEFAULT_SUMMARY = SamplingConfig(temperature=0.0, num_beams=4, max_new_tokens=64)
"""The likeliest text that four beams find."""
