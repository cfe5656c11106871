"""Memory that this process has in use, pages of mapped files included. It needs Linux with glibc."""

from __future__ import annotations

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")


def in_use() -> int:
    """Bytes now."""
    return _status("VmRSS")


def peak_in_use() -> int:
    """The most bytes so far, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """The peak begins anew, and what was freed is no longer in use."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int:
    (line,) = (line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
