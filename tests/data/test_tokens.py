from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from samples import TEXTS
from terseformer.data import DataError, TokenFile, fingerprint, train_tokenizer, write_token_file
from terseformer.data import tokens as tokens_module

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.just("x <|endoftext|> y")


@given(st.lists(words, min_size=1, max_size=9), st.integers(1, 20))
def test_documents_come_back(tokenizer, tmp_path_factory, documents, encode_characters):
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_ENCODE_CHARACTERS", encode_characters)
        write_token_file(path, documents, tokenizer)
    file = TokenFile.open(path, fingerprint(tokenizer))
    ends = np.flatnonzero(file.tokens == 0)
    parts = np.split(file.tokens, ends + 1)
    assert parts.pop().size == 0
    assert [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts] == documents
    assert file.num_documents == len(documents) == len(ends)
    assert file.num_bytes == sum(len(document.encode()) for document in documents)
    assert file.num_tokens == path.stat().st_size // 2
    assert file.bytes_per_token == file.num_bytes / file.num_tokens
    assert file.vocab_size == 300
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["a.bin", "a.json"]


@pytest.fixture
def path(tokenizer, tmp_path) -> Path:
    write_token_file(tmp_path / "a.bin", TEXTS, tokenizer)
    return tmp_path / "a.bin"


def test_layout(path, tokenizer):
    raw = path.read_bytes()
    first = tokenizer.encode(TEXTS[0]).ids
    assert raw[: 2 * len(first) + 2] == b"".join(i.to_bytes(2, "little") for i in [*first, 0])
    file = TokenFile.open(path)
    assert not file.tokens.flags.writeable
    assert file.tokens.dtype == np.uint16
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format_version": 1,
        "dtype": "uint16",
        "num_tokens": len(raw) // 2,
        "num_documents": len(TEXTS),
        "num_bytes": sum(map(len, TEXTS)),
        "vocab_size": 300,
        "end_of_text_id": 0,
        "tokenizer_sha256": fingerprint(tokenizer),
    }


@pytest.mark.parametrize(("extra", "dtype"), [(2**16 - 300, np.uint16), (2**16 - 299, np.uint32)])
def test_dtype_follows_the_vocabulary(tokenizer, tmp_path, extra, dtype):
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([f"Q{i}Q" for i in range(extra)])
    last = f"Q{extra - 1}Q"
    write_token_file(tmp_path / "a.bin", [f"the {last}"], large)
    file = TokenFile.open(tmp_path / "a.bin", fingerprint(large))
    assert file.tokens.dtype == dtype
    assert file.vocab_size == 300 + extra
    assert file.tokens[-2] == 299 + extra
    assert large.decode(file.tokens[:-1].tolist()) == f"the {last}"


def test_settings_of_the_tokenizer_are_not_obeyed_nor_changed(tokenizer, tmp_path, path):
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=50)
    write_token_file(tmp_path / "b.bin", TEXTS, limited)
    assert (tmp_path / "b.bin").read_bytes() == path.read_bytes()
    assert len(limited.encode(TEXTS[0]).ids) == 50
    assert limited.truncation is not None
    assert not limited.encode_special_tokens


def test_failure_leaves_the_old_file(tokenizer, path):
    before = [path.read_bytes(), path.with_suffix(".json").read_bytes()]

    def documents():
        yield from TEXTS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(path, documents(), tokenizer)
    assert [path.read_bytes(), path.with_suffix(".json").read_bytes()] == before
    assert len(list(path.parent.iterdir())) == 2


def test_no_documents(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"there are no documents for .*a\.bin; change data\.sources"):
        write_token_file(tmp_path / "a.bin", [], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizer(path):
    other = train_tokenizer(["another text"], 260)
    with pytest.raises(
        DataError, match=r"a\.bin was made by another tokenizer .*; use that one, or run terse data again"
    ):
        TokenFile.open(path, fingerprint(other))


def test_truncated(path):
    size = path.stat().st_size
    for wrong in (path.read_bytes()[:-2], path.read_bytes()[:-1], b"", path.read_bytes() + b"\0\0"):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"a\.bin is damaged: it has {len(wrong)} bytes instead of {size}"):
            TokenFile.open(path)


def test_overwritten(path):
    path.write_bytes(b"\x05" * path.stat().st_size)
    with pytest.raises(DataError, match=r"a\.bin is damaged: it does not end with the end of a document"):
        TokenFile.open(path)


def test_missing(path):
    bytes_, about = path.read_bytes(), path.with_suffix(".json")
    path.unlink()
    with pytest.raises(DataError, match=r"there is no token file .*a\.bin; run terse data again"):
        TokenFile.open(path)
    path.write_bytes(bytes_)
    about.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.json: No such file or directory; run terse data again"):
        TokenFile.open(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"dtype": None},
        {"num_tokens": "9"},
        {"num_tokens": 0},
        {"num_bytes": True},
        {"vocab_size": None},
    ],
)
def test_damaged_description(path, change):
    about = path.with_suffix(".json")
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(DataError, match=r"a\.json is damaged; run terse data again"):
        TokenFile.open(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_description_that_is_none(path, content):
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is damaged"):
        TokenFile.open(path)


def test_other_format_version(path):
    about = path.with_suffix(".json")
    about.write_text(about.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match="has format version 2, and this program reads 1"):
        TokenFile.open(path)
