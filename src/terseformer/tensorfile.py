"""Safetensors files as memory maps: read without copying, written one tensor at a time.

The safetensors library copies what it reads and holds in memory all that it writes; a packed model may be larger than
the memory is. The format is the library's: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from terseformer.errors import UserError

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}  # NumPy has no bfloat16
_MAX_HEADER = 100 << 20
_ALIGNMENT = 64


class TensorFileError(UserError):
    """A tensor file that cannot be read or written: the message says which and why."""


@dataclass(frozen=True)
class Declared:
    """A tensor that a file holds."""

    dtype: str
    """`F32`, `F16`, `BF16` or `I8`."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(_NUMPY[self.dtype]).itemsize


Unwritten = tuple[str, Declared, Callable[[], np.ndarray]]
"""A tensor's name, declaration, and what makes it."""


@dataclass(frozen=True)
class TensorFile:
    """A file that was opened; the arrays are views of its memory map and keep it open."""

    metadata: dict[str, str]
    declared: dict[str, Declared]
    arrays: dict[str, np.ndarray]
    """By name; those of `BF16` are uint16."""


def read(path: Path) -> TensorFile:
    """Opens a file.

    Raises:
        TensorFileError: it is missing, truncated, damaged or holds other types of numbers.
    """
    try:
        data = _map(path)
        length = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
            raise ValueError("it is truncated or no safetensors file")
        header = json.loads(data[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        declared, arrays = {}, {}
        for name, entry in header.items():
            declared[name] = Declared(entry["dtype"], tuple(entry["shape"]))
            arrays[name] = _view(data[8 + length :], declared[name], *entry["data_offsets"])
    except OSError as error:
        raise TensorFileError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"{path} is damaged: {error}") from None
    return TensorFile(metadata, declared, arrays)


def _map(path: Path) -> np.ndarray:
    """A file's bytes; in pages of 2 MB where the kernel has them, so that few addresses need to be looked up."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, np.uint8)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def _view(data: np.ndarray, declared: Declared, begin: int, end: int) -> np.ndarray:
    if declared.dtype not in _NUMPY:
        raise ValueError(f"it holds numbers of type {declared.dtype}; allowed are {', '.join(_NUMPY)}")
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *declared.shape)):
        raise ValueError("a shape or an offset is no size")
    if end - begin != declared.num_bytes or end > len(data):
        raise ValueError("it is truncated, or a tensor's size differs from its shape")
    return data[begin:end].view(_NUMPY[declared.dtype]).reshape(declared.shape)


def in_order(tensors: Iterable[Unwritten]) -> list[Unwritten]:
    """The order in which `write` makes and writes tensors."""
    # Those of whole cache lines come first, so that all of them begin at one; of the others the wide numbers, so that
    # each begins at a multiple of its numbers' size.
    return sorted(tensors, key=lambda t: (t[1].num_bytes % _ALIGNMENT != 0, -np.dtype(_NUMPY[t[1].dtype]).itemsize))


def write(
    path: Path,
    tensors: Iterable[Unwritten],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: replaced if it exists.
        tensors: name, declaration and a function without arguments that makes the array, called when its turn comes.
        metadata: strings to keep with the tensors.

    Raises:
        TensorFileError: the disk is full, or the folder cannot be written to.
    """
    ordered = in_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, declared, _ in ordered:
        begin, end = end, end + declared.num_bytes
        header[name] = {"dtype": declared.dtype, "shape": declared.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with building.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name, declared, make in ordered:
                    array = np.asarray(make(), order="C")
                    assert (array.dtype, array.shape) == (_NUMPY[declared.dtype], declared.shape), name
                    file.write(array.data.cast("B") if array.size else b"")
                file.flush()
                os.fsync(file.fileno())
            os.replace(building, path)
        finally:
            building.unlink(missing_ok=True)
    except OSError as error:
        raise TensorFileError(f"cannot write {path}: {error.strerror or error}") from None
