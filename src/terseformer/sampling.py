"""How text is drawn from a model: what a user may set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from terseformer.config import ConfigError
from terseformer.errors import UserError


class GenerationError(UserError, ValueError):
    """Text that cannot be generated: the message says what was given and what to change."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is drawn from a model."""

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
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("stop", stops, "a tuple of strings, none of them empty"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}")


DEFAULT_SAMPLING = SamplingConfig()
