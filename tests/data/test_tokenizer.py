from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from samples import TEXTS
from terseformer.config import ConfigError
from terseformer.data import DataError, end_of_text_id, fingerprint, load_tokenizer, train_tokenizer


@given(st.text())
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if "<|endoftext|>" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert 0 not in ids


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == end_of_text_id(tokenizer) == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert train_tokenizer(["ab"], 400).get_vocab_size() == 258
    assert train_tokenizer([], 257).get_vocab_size() == 257
    with pytest.raises(ConfigError, match=r"data\.vocab_size must be at least 257 .* not 256"):
        train_tokenizer(TEXTS, 256)


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "import json, sys; from terseformer.data import fingerprint, train_tokenizer;"
        "print(fingerprint(train_tokenizer(json.load(sys.stdin), 300)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""},
    ).stdout.strip()
    assert found == fingerprint(tokenizer)
    assert fingerprint(train_tokenizer(["another text"], 300)) != found


def test_error_while_training_is_passed_on():
    def documents():
        yield "text"
        raise DataError("broken file")

    with pytest.raises(DataError, match="broken file"):
        train_tokenizer(documents(), 300)


def test_load(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert fingerprint(load_tokenizer(path)) == fingerprint(tokenizer)


def test_load_leaves_out_truncation_and_padding(tokenizer, tmp_path):
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=9)
    limited.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids
    assert fingerprint(limited) == fingerprint(loaded) == fingerprint(tokenizer)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1}', b"\xff\x00"])
def test_no_tokenizer(tmp_path, content):
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"there is no tokenizer '.*a\.json'; check the path in data\.tokenizer"):
        load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json' is no tokenizer\.json of the library tokenizers"):
        load_tokenizer(path)


def foreign(*names: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name) for name in names])
    return tokenizer


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["</s>"], "</s>"),
        (["<eos>"], "<eos>"),
        (["[CLS]", "[SEP]"], "[SEP]"),
        (["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),
        (["<|end_of_text|>"], "<|end_of_text|>"),
    ],
)
def test_end_of_text_of_a_foreign_tokenizer(names, chosen):
    tokenizer = foreign(*names)
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(chosen)


def test_tokenizer_without_end_of_text():
    with pytest.raises(DataError, match=r"has no end-of-text token; add one of <\|endoftext\|>, </s>"):
        end_of_text_id(foreign("[CLS]"))
