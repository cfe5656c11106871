"""What an engine remembers of a sequence: kept, forked, and written to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from terseformer import tensorfile
from terseformer.sampling import GenerationError
from terseformer.tensorfile import Declared

SESSION_FORMAT = "terseformer-session-3"
"""Changes with what sessions remember."""


@dataclass(frozen=True)
class Snapshot:
    """All that a session without a source remembers, in as few numbers as its tokens need."""

    tokens: tuple[int, ...]
    """Those that were read."""
    state: Float32[np.ndarray, " N"]


class Session:
    """What an engine remembers of one sequence: its tokens, keys, values and past frames.

    Made by `Engine.new_session`. One thread at a time may use it.
    """

    def __init__(self, state: Any, tokens: Sequence[int] = (), source: Sequence[int] = ()) -> None:
        self._state = state
        self._reading: Any = None  # a source, before it is read to its end
        self.source = tuple(source)
        """Tokens of the source that an encoder-decoder has read, before those of the sequence."""
        self.tokens = list(tokens)
        """Tokens of the sequence; the last one that was drawn is read when the sequence goes on."""

    @property
    def length(self) -> int:
        """Tokens read."""
        return self._state.length

    @property
    def capacity(self) -> int:
        """Longest sequence that fits, in tokens."""
        return self._state.capacity

    @property
    def unread(self) -> list[int]:
        """Tokens that were drawn and are read when the sequence goes on."""
        return self.tokens[self.length :]

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - len(self.tokens)

    @property
    def logits(self) -> Float32[np.ndarray, " V"]:
        """Logits of the next token; zeros before the first was read."""
        return self._state.logits

    def fork(self) -> Session:
        """A copy that goes its own way: several texts from one prompt that was read once.

        Raises:
            GenerationError: the source is not read to its end.
        """
        self._check_source_is_read()
        return Session(self._state.fork(), self.tokens, self.source)

    def snapshot(self) -> Snapshot:
        """What was read so far, for `Engine.restore`; a token that was drawn last and not read is not part of it."""
        return Snapshot(tuple(self.tokens[: self.length]), self._state.save())

    def save(self, path: Path | str) -> None:
        """Writes the session to a file, to go on from it later with the same model.

        Raises:
            TensorFileError: the file cannot be written.
            GenerationError: the source is not read to its end.
        """
        self._check_source_is_read()
        state = self._state.save()
        arrays = {"state": state, "tokens": self.tokens, "source": self.source}
        tensors = []
        for name, values in arrays.items():
            array = np.array(values, np.float32)  # ids below 2^24 are exact
            tensors.append((name, Declared("F32", array.shape), lambda array=array: array))
        metadata = {"format": SESSION_FORMAT, "capacity": str(self.capacity), "length": str(self.length)}
        tensorfile.write(Path(path), tensors, metadata)

    def _check_source_is_read(self) -> None:
        if self._reading is not None:
            raise GenerationError("the session's source is not read to its end; call Engine.read_source first")
