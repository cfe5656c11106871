"""From a `DataConfig` to a folder with a tokenizer and two token files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from terseformer.config import DataConfig
from terseformer.data.corpus import local_files, read_documents
from terseformer.data.documents import Document
from terseformer.data.errors import DataError
from terseformer.data.files import atomic_write, default_cache
from terseformer.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from terseformer.data.tokens import TokenFile, token_writer

VERSION = 2
_MANIFEST = "data.json"
_LOCK = ".lock"
_BUILDING = ".building"
_FILES = ("tokenizer.json", "train.bin", "train.json", "validation.bin", "validation.json")
_REPORT_EVERY = 2**20
_BOUNDARIES = (
    re.compile(r"[\r\n]+"),
    re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”’）]*"),
    re.compile(r"\s+"),
)
"""What the cut through a single document comes after, best first: lines, sentences, words."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, the documents and the UTF-8 bytes that it has seen."""

Split = Callable[[Document], tuple[Document | None, Document | None]]
"""A document's part for training and its part for validation."""


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the data."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    tokenizer_path: Path


def prepare(
    config: DataConfig, folder: Path, cache: Path | None = None, on_progress: Progress | None = None
) -> PreparedData:
    """Reads and splits the corpus, trains or loads the tokenizer and writes both token files into `folder`.

    Validation gets whole documents: those whose group, or else text, has a hash in the lowest `validation_fraction`,
    and at least one.
    A corpus of a single document, such as one book in a `.txt` file, is cut instead: validation gets its end, between
    half and one and a half times that share of its characters. The cut is the line end nearest to the share, else the
    end of a sentence or of a word, and in a text without any of these it falls between two characters.

    If `folder` already holds the result of the same configuration and the same local files (size and time), it is
    opened as it is. Else the new files replace the old ones when all are complete. Processes that call it at once take
    turns, so that one builds and the others open what it built. The sources are read twice (once if the tokenizer
    exists) after a look at their beginning, one document at a time.

    Args:
        config: sources, tokenizer and split.
        folder: where the files go; made when missing.
        cache: folder for fetched archives, `default_cache()` if not given.
        on_progress: told the stage (`tokenizer`, then `tokens`), documents and bytes, about each MiB.

    Raises:
        DataError: a source, the tokenizer or the split is at fault.
        ConfigError: a setting is.
    """
    cache = cache or default_cache()
    return _prepare(config, _manifest(config, cache), Path(folder), cache, on_progress)


def prepare_in_cache(config: DataConfig, on_progress: Progress | None = None) -> PreparedData:
    """Calls `prepare` with a folder of the cache that belongs to this configuration and these local files alone.

    So nobody replaces the files of a run: texts that change, and other texts under the same name, get another folder.
    """
    cache = default_cache()
    manifest = _manifest(config, cache)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    return _prepare(config, manifest, cache / "tokens" / digest, cache, on_progress)


def _prepare(
    config: DataConfig, manifest: dict[str, Any], folder: Path, cache: Path, on_progress: Progress | None
) -> PreparedData:
    prepared = _open(folder, manifest)
    if prepared is not None:
        return prepared

    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        prepared = _open(folder, manifest)
        if prepared is not None:
            return prepared
        building = folder / _BUILDING
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            _build(config, building, cache, on_progress)
            (folder / _MANIFEST).unlink(missing_ok=True)
            for name in _FILES:
                os.replace(building / name, folder / name)
            with atomic_write(folder / _MANIFEST) as file:
                file.write((json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
        finally:
            shutil.rmtree(building, ignore_errors=True)
        prepared = _open(folder, manifest)
        assert prepared is not None
        return prepared


def _build(config: DataConfig, folder: Path, cache: Path, on_progress: Progress | None) -> None:
    split = _split(read_documents(config, cache), config.validation_fraction)

    def parts(stage: str) -> Iterator[tuple[Document | None, Document | None]]:
        return map(split, _reporting(read_documents(config, cache), stage, on_progress))

    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        known = (train for train, _ in parts("tokenizer") if train is not None)
        texts = (text for document in known for text in (document.text, document.target) if text)
        tokenizer = train_tokenizer(texts, config.vocab_size, config.num_sentinels)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))
    with (
        token_writer(folder / "train.bin", tokenizer) as add_to_train,
        token_writer(folder / "validation.bin", tokenizer) as add_to_validation,
    ):
        for sides in parts("tokens"):
            for document, add in zip(sides, (add_to_train, add_to_validation), strict=True):
                if document is not None:
                    add(document.text)
                    if config.target_field:
                        add(document.target)


def _split(documents: Iterable[Document], fraction: float) -> Split:
    """Gives validation the documents with a hash below `fraction`, or the end of a single one; both sides get some.

    Reads until it has seen a document for each side. Where there is none below (or above), the one with the lowest
    (highest) hash changes sides. Equal texts stay together.
    """
    count, only, lowest, highest = 0, Document(""), 1.0, 0.0
    for document in documents:
        count, only = count + 1, document
        place = _place(document)
        lowest, highest = min(lowest, place), max(highest, place)
        if lowest < fraction <= highest:
            return _split_by_hash(fraction)
    if count == 0:
        raise DataError("data.sources hold no text; give others")
    if count == 1 and not only.target:
        _divide(only.text, fraction)  # whether it can be
        return lambda document: _cut(document, fraction)
    if lowest == highest:
        raise DataError(
            f"data.sources hold {count} documents with the same {'group' if only.group else 'text'}, but training and "
            "validation may not share any; give others too"
        )
    return _split_by_hash(highest if highest < fraction else math.nextafter(lowest, 1))


def _split_by_hash(bound: float) -> Split:
    return lambda document: (None, document) if _place(document) < bound else (document, None)


def _cut(document: Document, fraction: float) -> tuple[Document | None, Document | None]:
    train, validation = _divide(document.text, fraction)
    return Document(train), Document(validation)


def _divide(text: str, fraction: float) -> tuple[str, str]:
    """Cuts a text in two; the second part has about `fraction` of its characters."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    size = end - start
    if size < 2:
        raise DataError(
            f"data.sources hold one document of {size} character, too short to divide into training and validation; "
            "give more text"
        )
    wanted = start + min(max(round(size * (1 - fraction)), 1), size - 1)
    slack = min(wanted - start, end - wanted) // 2
    for boundary in _BOUNDARIES:
        cuts = (match.end() for match in boundary.finditer(text, wanted - slack, wanted + slack))
        cut = min(cuts, key=lambda cut: abs(cut - wanted), default=None)
        if cut is not None:
            return text[:cut], text[cut:]
    return text[:wanted], text[wanted:]


def _place(document: Document) -> float:
    """A number in [0, 1) from the SHA-256 of the group, or else of the text."""
    key = document.group or document.text
    return (int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def _reporting(documents: Iterable[Document], stage: str, on_progress: Progress | None) -> Iterator[Document]:
    count = size = reported = 0
    for document in documents:
        yield document
        count += 1
        size += len(document.text.encode("utf-8"))
        if on_progress is not None and size - reported >= _REPORT_EVERY:
            on_progress(stage, count, size)
            reported = size
    if on_progress is not None:
        on_progress(stage, count, size)


def _manifest(config: DataConfig, cache: Path) -> dict[str, Any]:
    local = [source for source in config.sources if not source.startswith(("hf:", "pypi:"))]
    files = [path for source in local for path in local_files(source, cache)]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    manifest = {
        "version": VERSION,
        "config": dataclasses.asdict(dataclasses.replace(config, tokenizer="")),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "tokenizer_sha256": fingerprint(load_tokenizer(config.tokenizer)) if config.tokenizer else "",
    }
    return json.loads(json.dumps(manifest))


def _open(folder: Path, manifest: dict[str, Any]) -> PreparedData | None:
    """What `folder` holds, if it is whole and was made for `manifest`."""

    def is_made() -> bool:
        return json.loads((folder / _MANIFEST).read_bytes()) == manifest

    try:
        if not is_made():
            return None
        path = folder / "tokenizer.json"
        tokenizer = load_tokenizer(path)
        made_by = fingerprint(tokenizer)
        train, validation = (TokenFile.open(folder / f"{side}.bin", made_by) for side in ("train", "validation"))
        if not is_made():  # another process has begun to replace the files
            return None
    except (OSError, ValueError):
        return None
    return PreparedData(train, validation, tokenizer, path)
