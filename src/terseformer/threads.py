"""How many threads decoding uses: what the user says, what was measured to be the fastest, or the physical cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

from terseformer import native
from terseformer.config import ConfigError
from terseformer.data import default_cache

MAX_THREADS = 1024


def default_threads() -> int:
    """`TERSE_THREADS`, else what `terse bench --tune` has remembered, else the physical cores of this process.

    Raises:
        ConfigError: `TERSE_THREADS` is no number of threads.
    """
    given = os.environ.get("TERSE_THREADS", "")
    if not given:
        return remembered() or native.physical_cores()
    if not given.isdecimal() or not 1 <= int(given) <= MAX_THREADS:
        raise ConfigError(f"TERSE_THREADS must be a number in [1, {MAX_THREADS}], not {given!r}")
    return int(given)


def remember(threads: int) -> Path:
    """Keeps a number of threads for processes that may use as many cores as this one; gives the file."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cores": native.physical_cores(), "threads": threads}) + "\n", encoding="utf-8")
    return path


def remembered() -> int | None:
    """The number of threads that was kept, unless the cores are others now."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        threads = kept["threads"] if kept["cores"] == native.physical_cores() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if isinstance(threads, int) and 1 <= threads <= MAX_THREADS else None


def _file() -> Path:
    return default_cache() / "threads.json"
