"""What goes from the engine's thread to a request on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from terseformer.engine import Touched
from terseformer.serve.errors import ApiError, timed_out

MAX_PENDING = 1 << 14
"""Pieces that wait for a client; one that reads more slowly loses its stream."""


@dataclass(frozen=True)
class Token:
    """A token with its log-probability and those of the likeliest ones, by their ids."""

    id: int
    logprob: float | None
    """None of the first token of all, which nothing precedes."""
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Trace:
    """What the model did since the last piece. It reads a token when it draws the next one, and a text's last never."""

    pieces: tuple[str, ...]
    """For each token that was drawn, the part of the piece's text that became certain with it."""
    touched: Touched
    """The units that it touched when it read tokens that it had drawn."""


@dataclass(frozen=True)
class Piece:
    """A part of a text, in the order in which parts are certain."""

    index: int
    """Of the text among those of the request."""
    text: str
    tokens: tuple[Token, ...] = ()
    """Where log-probabilities are asked for: the tokens read or drawn since the last piece."""
    finish: str | None = None
    """`stop` or `length` if it is the last."""
    trace: Trace | None = None
    """Where it is asked for."""

    def own_fields(self) -> dict[str, Any]:
        """What a chunk has beside OpenAI's fields."""
        if self.trace is None:
            return {}
        touched = self.trace.touched
        return {
            "terse": {
                "pieces": self.trace.pieces,
                "units": touched.chosen.tolist(),
                "active": touched.active.tolist(),
            }
        }


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; sent when all texts have come to their end."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Item = Piece | Usage | ApiError


class Delivery:
    """A queue with two ends: any thread puts in, one coroutine of the event loop takes out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """Sends something; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    @property
    def pending(self) -> int:
        """Things that wait to be taken out."""
        return self._items.qsize()

    async def items(self, deadline: float) -> AsyncIterator[Piece | Usage]:
        """All that is sent; the usage is the last.

        Args:
            deadline: by `time.monotonic`.

        Raises:
            ApiError: it was sent, or it is too late.
        """
        while True:
            try:
                item = await asyncio.wait_for(self._items.get(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise timed_out() from None
            if isinstance(item, ApiError):
                raise item
            yield item
            if isinstance(item, Usage):
                return
