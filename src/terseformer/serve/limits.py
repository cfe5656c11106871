"""How much a server takes on, and how much it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from terseformer.config import ConfigError
from terseformer.engine import MAX_RUNS

MAX_CONNECTIONS = 256
"""Of a server; and requests that it answers at a time, from a header's end to the answer's."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on; what goes beyond is refused or ended."""

    max_queue: int = 64
    """Requests that wait at most; one more is refused with 429 and a time after which to try again."""
    max_batch: int = MAX_RUNS
    """Texts of one model that are written together."""
    max_texts: int = 128
    """Texts that one request may ask for: its prompts times `n`."""
    max_new_tokens: int = 0
    """Tokens of one text at most; 0: as many as the model's context holds."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    timeout: float = 600.0
    """Seconds from a request's arrival to its end."""
    stall: float = 30.0
    """Seconds that a client may take to send its request, or to read what is ready for it."""
    grace: float = 10.0
    """Seconds that requests may take to finish when the server is stopped."""

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("max_queue", self.max_queue >= 1, "at least 1"),
            ("max_batch", 1 <= self.max_batch <= MAX_RUNS, f"in [1, {MAX_RUNS}]"),
            ("max_texts", self.max_texts >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 0, "at least 0"),
            ("max_body", self.max_body >= 1, "at least 1"),
            ("timeout", self.timeout > 0, "positive"),
            ("stall", self.stall > 0, "positive"),
            ("grace", self.grace >= 0, "at least 0"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Caching:
    """How much a server keeps of the prompts and texts that it has read, for those that begin alike."""

    cache_memory: int = 1024
    """Megabytes of the prefix cache in memory; 0: no prefix cache."""
    cache_disk: int = 4096
    """Megabytes of the prefix cache on disk; 0: none."""
    cache_folder: Path | None = None
    """Where it lies; without one, in the folder for fetched files."""

    def __post_init__(self) -> None:
        for name in ("cache_memory", "cache_disk"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)!r}")
