"""Snapshots on disk: they survive a restart, and a damaged or foreign file is as good as none.

A model's folder has a file for each snapshot, whose name tells its length and digest. Files are written whole or not
at all, by a thread of their own, and checked against a digest of what is in them when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from terseformer import tensorfile
from terseformer.session import SESSION_FORMAT, Snapshot
from terseformer.tensorfile import Declared, TensorFileError

_FORMAT = f"terseformer-prefix-1 of {SESSION_FORMAT}"
_NAME = re.compile(r"(\d+)-([0-9a-f]{32})\.safetensors")
_STALE_SECONDS = 3600
_MAX_UNWRITTEN = 8
_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What a snapshot is known by."""

    model: str
    """The model's fingerprint."""
    length: int
    """In tokens."""
    digest: str
    """Of model, owner and tokens."""


class DiskCache:
    """Snapshots of several models in a folder; those that were not used for the longest time make room.

    Args:
        folder: only its owner may look into it, since prompts are in it.
        max_bytes: of all files.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Key, int] = OrderedDict()
        self._scan()
        self._unwritten: queue.Queue[tuple[Key, Snapshot] | None] = queue.Queue(_MAX_UNWRITTEN)
        self._thread = threading.Thread(target=self._write_all, name="prefix-cache", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def lengths(self, model: str) -> set[int]:
        """The lengths of a model's snapshots, in tokens."""
        with self._lock:
            return {key.length for key in self._sizes if key.model == model}

    def load(self, key: Key) -> Snapshot | None:
        """A snapshot, if it is there and whole."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
        path = self._path(key)
        try:
            file = tensorfile.read(path)
            tokens, state = (np.array(file.arrays[name]) for name in ("tokens", "state"))
            if file.metadata != {"format": _FORMAT, "model": key.model, "check": _check(tokens, state)}:
                raise ValueError("it is damaged, or of another model")
            os.utime(path)
        except (TensorFileError, KeyError, ValueError, TypeError, OSError) as error:
            _log.warning("%s is left out of the prefix cache: %s", path, error)
            self._forget(key)
            return None
        return Snapshot(tuple(tokens.astype(np.int64).tolist()), state)

    def store(self, key: Key, snapshot: Snapshot) -> None:
        """Writes a snapshot, soon; where too many wait to be written, it is dropped."""
        with self._lock:
            known = key in self._sizes
        if not known:
            with contextlib.suppress(queue.Full):
                self._unwritten.put_nowait((key, snapshot))

    def close(self) -> None:
        """Writes what waits to be written."""
        self._unwritten.put(None)
        self._thread.join()

    def _path(self, key: Key) -> Path:
        return self._folder / key.model / f"{key.length}-{key.digest}.safetensors"

    def _scan(self) -> None:
        """Finds what is there, the oldest first; takes away what a process that was killed has left half written."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process has taken it away
                status = path.stat()
                if name := _NAME.fullmatch(path.name):
                    key = Key(path.parent.name, int(name[1]), name[2])
                    found.append((status.st_mtime, key, status.st_size))
                elif path.name.startswith(".") and status.st_mtime < time.time() - _STALE_SECONDS:
                    path.unlink()
        self._sizes.update((key, size) for _, key, size in sorted(found))

    def _forget(self, key: Key) -> None:
        with self._lock:
            self._sizes.pop(key, None)
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _write_all(self) -> None:
        while (item := self._unwritten.get()) is not None:
            key, snapshot = item
            path = self._path(key)
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                _write(path, key, snapshot)
                size = path.stat().st_size
            except (TensorFileError, OSError, MemoryError) as error:
                _log.warning("the prefix cache cannot be written: %s", error)
                continue
            with self._lock:
                self._sizes[key] = size
            while oldest := self._one_too_many():
                self._forget(oldest)

    def _one_too_many(self) -> Key | None:
        """The oldest snapshot, if there is no room for all."""
        with self._lock:
            return next(iter(self._sizes)) if sum(self._sizes.values()) > self._max_bytes else None


def _write(path: Path, key: Key, snapshot: Snapshot) -> None:
    tokens = np.array(snapshot.tokens, np.float32)  # ids below 2^24 are exact
    arrays = {"tokens": tokens, "state": snapshot.state}
    tensors = [(name, Declared("F32", array.shape), lambda array=array: array) for name, array in arrays.items()]
    metadata = {"format": _FORMAT, "model": key.model, "check": _check(tokens, snapshot.state)}
    tensorfile.write(path, tensors, metadata)


def _check(tokens: np.ndarray, state: np.ndarray) -> str:
    """A digest of a file's contents."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (tokens, state):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
