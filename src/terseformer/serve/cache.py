"""The prefix cache: what a model remembers of prompts and texts, so that what goes on from there is not read again.

Sessions cannot be cut back: convolutions, recurrent units and local attention remember the last tokens alone. So
snapshots are taken where others are likely to go on: at the end of a prompt and of a text, at places that a request
marks, and where a prompt parts from one that came before, which is how a common beginning is found. A snapshot is
known by a digest of its tokens and of its owner's key, so that nobody learns what another one has asked; the digests
of all of a prompt's beginnings take one pass.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from terseformer.data import default_cache
from terseformer.errors import UserError
from terseformer.serve.disk import DiskCache, Key
from terseformer.serve.limits import Caching
from terseformer.session import Session, Snapshot

_RECENT = 64
"""Prompts that a new one is compared with."""
_MB = 1 << 20


class PrefixCache:
    """Snapshots of several models, the latest used in memory, and all that fits on disk.

    One thread may use it.

    Args:
        max_bytes: of snapshots in memory.
        disk: where they go, too; None: nowhere.
        min_tokens: shorter ones are not worth it.
    """

    def __init__(self, max_bytes: int, disk: DiskCache | None = None, min_tokens: int = 16) -> None:
        self._max_bytes, self._disk, self._min_tokens = max_bytes, disk, min_tokens
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        self._recent: dict[tuple[str, bytes], deque[np.ndarray]] = {}
        self.num_bytes = 0
        """Of the snapshots in memory."""

    @property
    def disk_bytes(self) -> int:
        """Of the snapshots on disk."""
        return self._disk.num_bytes if self._disk else 0

    def close(self) -> None:
        """Writes what is still to be written to disk."""
        if self._disk:
            self._disk.close()

    def find(self, model: str, tokens: Sequence[int], owner: bytes = b"") -> Snapshot | None:
        """The snapshot of the longest beginning of a prompt that is known, the whole included.

        Args:
            model: its fingerprint.
            tokens: of the prompt.
            owner: a digest of the key with which it came; another's snapshots are not found.
        """
        lengths = {key.length for key in self._snapshots if key.model == model}
        lengths |= self._disk.lengths(model) if self._disk else set()
        keys = _keys(model, owner, tokens, sorted(length for length in lengths if length <= len(tokens)))
        for key in reversed(keys):
            if key in self._snapshots:
                self._snapshots.move_to_end(key)
                return self._snapshots[key]
            snapshot = self._disk.load(key) if self._disk else None
            if snapshot is not None and snapshot.tokens == tuple(tokens[: key.length]):
                self._keep(key, snapshot)
                return snapshot
        return None

    def remember(self, model: str, session: Session, owner: bytes = b"") -> None:
        """Keeps a snapshot of what a session has read; those that were not used for the longest time make room."""
        tokens = session.tokens[: session.length]
        if len(tokens) < self._min_tokens:
            return
        (key,) = _keys(model, owner, tokens, [len(tokens)])
        if key not in self._snapshots:
            snapshot = session.snapshot()
            self._keep(key, snapshot)
            if self._disk:
                self._disk.store(key, snapshot)

    def parting(self, model: str, tokens: Sequence[int], owner: bytes = b"") -> int:
        """Remembers a prompt; gives the length of the longest beginning that it shares with its owner's recent ones."""
        recent = self._recent.setdefault((model, owner), deque(maxlen=_RECENT))
        prompt = np.array(tokens, np.int32)
        shared = max((_common(prompt, other) for other in recent), default=0)
        recent.append(prompt)
        return shared if shared >= self._min_tokens else 0

    def _keep(self, key: Key, snapshot: Snapshot) -> None:
        size = _size(snapshot)
        if size > self._max_bytes:
            return
        self._snapshots[key] = snapshot
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            _, gone = self._snapshots.popitem(last=False)
            self.num_bytes -= _size(gone)


def _size(snapshot: Snapshot) -> int:
    return snapshot.state.nbytes + 8 * len(snapshot.tokens)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens at which two sequences begin alike."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _keys(model: str, owner: bytes, tokens: Sequence[int], lengths: Iterable[int]) -> list[Key]:
    """The keys of some beginnings of a sequence, the shortest first."""
    data = np.array(tokens, "<i4").tobytes()
    digest, done, keys = hashlib.blake2b(model.encode(), digest_size=16, key=owner), 0, []
    for length in lengths:
        digest.update(data[4 * done : 4 * length])
        done = length
        keys.append(Key(model, length, digest.copy().hexdigest()))
    return keys


def open_cache(caching: Caching) -> PrefixCache | None:
    """A prefix cache with what its folder holds; none, where nothing is to be kept.

    Raises:
        UserError: the folder cannot be used.
    """
    memory, disk = caching.cache_memory * _MB, caching.cache_disk * _MB
    if not memory:
        return None
    if not disk:
        return PrefixCache(memory)
    folder = caching.cache_folder or default_cache() / "prefixes"
    try:
        return PrefixCache(memory, DiskCache(folder, disk))
    except OSError as error:
        raise UserError(
            f"the prefix cache cannot be kept in {folder}: {error.strerror or error}; give another --cache-folder, or "
            "--cache-disk 0"
        ) from None
