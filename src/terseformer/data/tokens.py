"""The token file: a plain array of token ids (`.bin`) and what it is (`.json` beside it)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from terseformer.data.errors import DataError
from terseformer.data.files import atomic_write
from terseformer.data.tokenizer import end_of_text_id, fingerprint, vocab_size_of

FORMAT_VERSION = 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_ENCODE_CHARACTERS = 2**20
_REMEDY = "run terse data again"
_FIELDS = {
    "format_version": int,
    "dtype": str,
    "num_tokens": int,
    "num_documents": int,
    "num_bytes": int,
    "vocab_size": int,
    "end_of_text_id": int,
    "tokenizer_sha256": str,
}


@dataclass(frozen=True)
class TokenFile:
    """A token file that is mapped into memory, read-only."""

    path: Path
    tokens: np.ndarray
    """All documents on end, an end-of-text token after each; uint16 or uint32."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents; the end-of-text tokens count as none."""
    vocab_size: int
    """Rows that an embedding needs: the tokenizer's largest id + 1."""
    end_of_text_id: int
    tokenizer_sha256: str
    """Fingerprint of the tokenizer that made it."""

    @classmethod
    def open(cls, path: Path, tokenizer_fingerprint: str | None = None) -> TokenFile:
        """Maps the token file `path`.

        Args:
            path: the `.bin` file; its `.json` stands beside it.
            tokenizer_fingerprint: if given, the file must have been made by this tokenizer.

        Raises:
            DataError: the file is missing, truncated, damaged, or made by another tokenizer.
        """
        path = Path(path)
        about = _read_about(path)
        dtype = _DTYPES[about["dtype"]]
        expected = about["num_tokens"] * dtype.itemsize
        if not path.is_file():
            raise DataError(f"there is no token file {path}; {_REMEDY}")
        if (size := path.stat().st_size) != expected:
            raise DataError(f"{path} is damaged: it has {size} bytes instead of {expected}; {_REMEDY}")
        if tokenizer_fingerprint is not None and about["tokenizer_sha256"] != tokenizer_fingerprint:
            raise DataError(
                f"{path} was made by another tokenizer (SHA-256 {about['tokenizer_sha256'][:12]}…, "
                f"not {tokenizer_fingerprint[:12]}…); use that one, or {_REMEDY}"
            )
        tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        if tokens[-1] != about["end_of_text_id"]:
            raise DataError(f"{path} is damaged: it does not end with the end of a document; {_REMEDY}")
        kept = ("num_documents", "num_bytes", "vocab_size", "end_of_text_id", "tokenizer_sha256")
        return cls(path, tokens, **{name: about[name] for name in kept})

    @property
    def num_tokens(self) -> int:
        """Tokens, the end-of-text tokens included."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes for a token on average: bits per byte = nats per token / (ln 2 · bytes_per_token)."""
        return self.num_bytes / self.num_tokens


@contextmanager
def token_writer(path: Path, tokenizer: Tokenizer) -> Iterator[Callable[[str], None]]:
    """Gives a function that appends a document to the token file `path`, which is there whole or not at all.

    Names of special tokens inside a document are encoded as the text that they are.

    Args:
        path: the `.bin` file; a `.json` of the same name is written beside it.
        tokenizer: how to encode the documents.

    Raises:
        DataError: there were no documents, or the tokenizer has no end-of-text token.
    """
    end, vocab_size = end_of_text_id(tokenizer), vocab_size_of(tokenizer)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    about = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "num_tokens": 0,
        "num_documents": 0,
        "num_bytes": 0,
        "vocab_size": vocab_size,
        "end_of_text_id": end,
        "tokenizer_sha256": fingerprint(tokenizer),
    }
    waiting: list[str] = []
    num_waiting = 0
    with atomic_write(path) as file:

        def encode() -> None:
            nonlocal num_waiting
            for encoding in encoder.encode_batch_fast(waiting, add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype=_DTYPES[dtype])
                file.write(ids.tobytes())
                about["num_tokens"] += len(ids)
            waiting.clear()
            num_waiting = 0

        def add(document: str) -> None:
            nonlocal num_waiting
            waiting.append(document)
            num_waiting += len(document)
            about["num_documents"] += 1
            about["num_bytes"] += len(document.encode("utf-8"))
            if num_waiting >= _ENCODE_CHARACTERS:
                encode()

        yield add
        encode()
        if about["num_documents"] == 0:
            raise DataError(f"there are no documents for {path}; change data.sources")
        path.with_suffix(".json").unlink(missing_ok=True)
    with atomic_write(path.with_suffix(".json")) as file:
        file.write((json.dumps(about, indent=2) + "\n").encode("ascii"))


def write_token_file(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Writes `documents` as the token file `path`, streaming; see `token_writer`."""
    with token_writer(path, tokenizer) as add:
        for document in documents:
            add(document)


def _read_about(path: Path) -> dict[str, Any]:
    about_path = path.with_suffix(".json")
    try:
        about = json.loads(about_path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {about_path}: {error.strerror}; {_REMEDY}") from None
    except ValueError:
        about = None
    if (
        not isinstance(about, dict)
        or any(type(about.get(name)) is not kind for name, kind in _FIELDS.items())
        or about["dtype"] not in _DTYPES
        or about["num_tokens"] < 1
    ):
        raise DataError(f"{about_path} is damaged; {_REMEDY}")
    if about["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {about['format_version']}, and this program reads {FORMAT_VERSION}; {_REMEDY}"
        )
    return about
