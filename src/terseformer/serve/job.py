"""A request as the scheduler sees it: prompts, and how many texts of each are drawn in which way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from terseformer.sampling import SamplingConfig
from terseformer.serve.delivery import Delivery, Token, Usage
from terseformer.serve.guided import Grammar
from terseformer.session import Session


class Client(NamedTuple):
    """Who asks."""

    name: str
    """Whose turn a request takes in the queue."""
    secret: bytes = b""
    """A digest of the client's key: what the prefix cache keeps for it is found with this alone."""


@dataclass(kw_only=True)
class Prompt:
    """What is read once for all texts that are made of it."""

    tokens: list[int]
    text: str = ""
    """To be given back before each text, where that is asked for."""
    marks: Sequence[int] = ()
    """Places, counted in tokens, from which other prompts are likely to go on."""
    cached: int = 0
    """Tokens that the prefix cache knew."""
    texts_left: int = 1
    """Texts that have not begun."""
    being_read: bool = False
    session: Session | None = None
    """What has read it."""
    scores: list[Token] = field(default_factory=list)
    """Its tokens with their log-probabilities, where these are asked for."""


@dataclass(kw_only=True, eq=False)
class Job:
    """A request. The event loop makes it and may cancel it; all else is the engine thread's."""

    model: str
    client: Client
    prompts: list[Prompt]
    num_texts: int
    """Of each prompt."""
    sampling: SamplingConfig
    max_tokens: int
    """Of each text; 0 only reads the prompts."""
    seed: int
    delivery: Delivery
    echo: bool = False
    num_top: int | None = None
    """Likeliest tokens whose log-probabilities are given; None gives none at all."""
    grammar: Grammar | None = None
    trace: bool = False
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    started: bool = False
    first_token: float | None = None
    """When the first token of the first text was drawn."""
    completion_tokens: int = 0
    texts_left: int = 0
    """Texts that have not come to their end."""

    def __post_init__(self) -> None:
        self.texts_left = self.num_texts * len(self.prompts)
        for prompt in self.prompts:
            prompt.texts_left = self.num_texts

    @property
    def scored(self) -> bool:
        """Whether the prompts' tokens need log-probabilities, for which all of them must be read."""
        return self.echo and self.num_top is not None

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            sum(len(prompt.tokens) for prompt in self.prompts),
            sum(prompt.cached for prompt in self.prompts),
            self.completion_tokens,
        )
