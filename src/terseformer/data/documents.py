"""From bytes or rows to documents: strict UTF-8, one error for each thing that can be wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from terseformer.config import DataConfig
from terseformer.data.errors import DataError


@dataclass(frozen=True)
class Document:
    """A text to learn from."""

    text: str
    target: str = ""
    """What a model shall write for it; none without `data.target_field`."""
    group: str = ""
    """Documents of one group stay on one side of the split; none: those of equal text."""


Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for error messages, and its fields."""


def documents_in(name: str, file: BufferedIOBase, config: DataConfig) -> Iterator[Document]:
    """The documents of one file: the rows of a `.jsonl`, else the whole text.

    Raises:
        DataError: the file is empty, or a byte is not UTF-8, or a row does not hold what `config` names.
    """
    if name.endswith(".jsonl"):
        yield from _not_empty(name, documents_from_rows(_json_rows(name, file), config))
        return
    if config.target_field or config.group_field:
        raise DataError(f"{name} has no fields, as data.target_field and data.group_field need them; use .jsonl files")
    text = _decode(name, 0, file.read()).removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{name} is empty; remove it or leave it out of data.sources")
    yield Document(text)


def documents_from_rows(rows: Iterable[Row], config: DataConfig) -> Iterator[Document]:
    """A document for each of `rows`, or, with `document_fields`, for each run of rows that belong to one.

    The texts of such rows are joined by newlines. Rows without text are skipped, with `target_field` those without
    target too. One key per document is kept in memory.

    Raises:
        DataError: a field is missing or no string, or the rows of a document are not adjacent.
    """
    if not config.document_fields:
        for row in rows:
            text = _text(row, config.text_field, "text_field")
            target = _text(row, config.target_field, "target_field") if config.target_field else ""
            if text and (target or not config.target_field):
                yield Document(
                    text, target, str(_field(row, config.group_field, "group_field")) if config.group_field else ""
                )
        return
    seen: set[tuple[Any, ...]] = set()
    keyed = ((tuple(_field(row, name, "document_fields") for name in config.document_fields), row) for row in rows)
    for key, group in itertools.groupby(keyed, key=lambda item: item[0]):
        where, _ = first = next(group)[1]
        if key in seen:
            raise DataError(f"{where}: the rows of document {key} are not adjacent; sort them by data.document_fields")
        seen.add(key)
        texts = (
            _text(row, config.text_field, "text_field") for row in itertools.chain([first], (row for _, row in group))
        )
        if document := "\n".join(text for text in texts if text):
            yield Document(document)


def _not_empty(name: str, documents: Iterator[Document]) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise DataError(f"{name} is empty; remove it or leave it out of data.sources")
    yield first
    yield from documents


def _json_rows(name: str, file: BufferedIOBase) -> Iterator[Row]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"{name} line {number}"
        text = _decode(name, offset, line)
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from None
        except RecursionError as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object but {type(row).__name__}; each row needs named fields")
        yield where, row


def _decode(name: str, offset: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise DataError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {position} cannot be decoded; "
            "convert the file to UTF-8 or leave it out of data.sources"
        ) from None


def _field(row: Row, name: str, key: str) -> Any:
    where, fields = row
    if name not in fields:
        raise DataError(
            f"{where} has no field {name!r}, only {', '.join(map(repr, fields)) or 'none'}; "
            f"change data.{key}{'' if key == 'text_field' else ' or leave it empty'}"
        )
    value = fields[name]
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _text(row: Row, name: str, key: str) -> str:
    text = _field(row, name, key)
    where, fields = row
    if not isinstance(fields[name], str):
        raise DataError(
            f"{where}: field {name!r} holds {type(fields[name]).__name__} where text is needed; change data.{key}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} holds half of a surrogate pair, {error.object[error.start]!a}; correct the row"
        ) from None
    return text if text.strip() else ""
