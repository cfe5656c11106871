"""The compiled module, behind Python types: the only file that imports it."""

from __future__ import annotations

import os

try:
    from terseformer import _native
    from terseformer._native import Engine, Floors, Model, Pieces, Sampler, Sampling, Search, Session, Writer
except ImportError as error:
    raise ImportError(f"terseformer's compiled module cannot be loaded ({error}); run `make setup`") from error

__all__ = [
    "Engine",
    "Floors",
    "Model",
    "Pieces",
    "Sampler",
    "Sampling",
    "Search",
    "Session",
    "Writer",
    "isa",
    "physical_cores",
    "supported_isas",
]


def isa() -> str:
    """Names the instruction set that kernels use: the fastest that is supported, or the one in `TERSE_ISA`.

    It is chosen at the first call in a process.

    Raises:
        ValueError: `TERSE_ISA` names one that is unknown or that this CPU lacks.
    """
    return _native.isa()


def supported_isas() -> tuple[str, ...]:
    """Names the instruction sets that this CPU and this build have, the slowest first."""
    return tuple(_native.supported_isas())


def physical_cores(root: str | os.PathLike[str] = "/") -> int:
    """Counts the physical cores that the affinity mask and the cgroup's CPU quota allow; at least 1.

    Args:
        root: where `/proc` and `/sys` are looked for.
    """
    return _native.physical_cores(root)
