from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples import TEXTS
from terseformer.config import ConfigError, DataConfig
from terseformer.data import DataError, fingerprint, prepare, prepare_in_cache, tokens, train_tokenizer
from terseformer.data.documents import Document
from terseformer.data.files import atomic_write
from terseformer.data.prepare import _divide, _split
from terseformer.errors import UserError

MODULE = sys.modules[prepare.__module__]
FILES = ["data.json", "tokenizer.json", "train.bin", "train.json", "validation.bin", "validation.json"]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    return DataConfig(sources=(str(folder),), vocab_size=290, validation_fraction=0.2)


def documents(file, tokenizer) -> list[str]:
    parts = np.split(file.tokens, np.flatnonzero(file.tokens == 0) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_splits_by_document(config, tmp_path):
    data = prepare(config, tmp_path / "out")
    train, validation = (documents(file, data.tokenizer) for file in (data.train, data.validation))
    assert sorted(train + validation) == sorted(TEXTS)
    assert 4 <= len(validation) <= 20
    assert [text for text in TEXTS if text in set(train)] == train
    assert fingerprint(data.tokenizer) == fingerprint(train_tokenizer(train, 290))
    assert data.tokenizer_path == tmp_path / "out" / "tokenizer.json"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", *FILES]


def contents(folder) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "read_documents", None)


def test_second_call_reads_nothing(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare(config, out)
    before = contents(out)
    forbid_reading(monkeypatch)
    second = prepare(config, out)
    assert contents(out) == before
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)


def test_same_result_in_another_folder(config, tmp_path):
    for name in ("one", "two"):
        prepare(config, tmp_path / name)
    one, two = ({k: v[1] for k, v in contents(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "change", [{"vocab_size": 280}, {"validation_fraction": 0.5}, {"text_field": "body"}], ids=lambda c: next(iter(c))
)
def test_other_configuration_rebuilds(config, tmp_path, change):
    out = tmp_path / "out"
    prepare(config, out)
    before = contents(out)
    changed = dataclasses.replace(config, **change)
    prepare(changed, out)
    assert contents(out)["data.json"] != before["data.json"]
    assert contents(out)["train.bin"][0] != before["train.bin"][0]
    after = contents(out)
    prepare(changed, out)
    assert contents(out) == after


def test_changed_text_rebuilds(config, tmp_path):
    out = tmp_path / "out"
    old = prepare(config, out)
    (tmp_path / "texts" / "00.txt").write_text("Now it says something else.")
    new = prepare(config, out)
    both = documents(new.train, new.tokenizer) + documents(new.validation, new.tokenizer)
    assert "Now it says something else." in both
    assert TEXTS[0] not in both
    # What was open before stays what it was.
    assert documents(old.train, old.tokenizer)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_damaged_folder_is_rebuilt(config, tmp_path, name, damage):
    out = tmp_path / "out"
    prepare(config, out)
    whole = {key: value[1] for key, value in contents(out).items()}
    if damage == "remove":
        (out / name).unlink()
    else:
        (out / name).write_bytes(whole[name][:-2])
    prepare(config, out)
    assert {key: value[1] for key, value in contents(out).items()} == whole


def test_existing_tokenizer(config, tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given_one = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    data = prepare(given_one, tmp_path / "out")
    assert fingerprint(data.tokenizer) == data.train.tokenizer_sha256 == fingerprint(tokenizer)
    assert data.train.vocab_size == 300
    # Another tokenizer of that name makes other token files.
    train_tokenizer(TEXTS, 280).save(str(tmp_path / "tokenizer.json"))
    assert prepare(given_one, tmp_path / "out").train.vocab_size == 280
    with pytest.raises(DataError, match="there is no tokenizer"):
        prepare(dataclasses.replace(config, tokenizer="absent.json"), tmp_path / "out")


def test_failure_leaves_the_old_files(config, tmp_path):
    out = tmp_path / "out"
    prepare(config, out)
    before = contents(out)
    (tmp_path / "texts" / "zz.txt").write_bytes(b"late \xff")
    with pytest.raises(DataError, match=r"zz\.txt is not UTF-8"):
        prepare(config, out)
    assert contents(out) == before

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "texts" / "zz.txt").write_bytes(b"good")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out, on_progress=interrupt)
    assert contents(out) == before


def test_progress(config, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "_REPORT_EVERY", 1000)
    calls: list[tuple[str, int, int]] = []
    prepare(config, tmp_path / "out", on_progress=lambda stage, number, seen: calls.append((stage, number, seen)))
    size = sum(map(len, TEXTS))
    for stage in ("tokenizer", "tokens"):
        counts = [(number, seen) for name, number, seen in calls if name == stage]
        assert counts == sorted(counts)
        assert len(counts) > 3
        assert counts[-1] == (60, size)


# Text as read_documents gives it: not blank, and possible in UTF-8.
texts_of_any_kind = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.lists(texts_of_any_kind, min_size=2, max_size=8, unique=True), fractions)
def test_each_side_has_a_document(texts, fraction):
    documents = list(map(Document, texts))
    parts = [_split(documents, fraction)(document) for document in documents]
    train, validation = ([part.text for part in side if part] for side in zip(*parts, strict=True))
    assert train
    assert validation
    assert sorted(train + validation) == sorted(texts)
    assert parts == [_split(documents[::-1] + documents, fraction)(document) for document in documents]


def test_a_group_stays_together():
    documents = [Document(str(number), group=str(number % 500)) for number in range(5000)]
    sides = {}
    for document in documents:
        train, _ = _split(documents, 0.1)(document)
        sides.setdefault(document.group, set()).add(train is not None)
    assert all(len(side) == 1 for side in sides.values())
    assert 30 < sum(side == {False} for side in sides.values()) < 70


def test_share_of_validation():
    documents = [Document(str(number)) for number in range(5000)]
    split = _split(documents, 0.1)
    assert 400 < sum(validation is not None for _, validation in map(split, documents)) < 600
    # A longer corpus leaves each document on its side.
    assert list(map(_split([*documents, Document("more")], 0.1), documents)) == list(map(split, documents))


def test_split_reads_no_more_than_it_needs():
    def documents():
        yield from (Document(str(number)) for number in range(500))
        raise AssertionError("read too far")

    assert _split(documents(), 0.5)


@given(st.lists(texts_of_any_kind, min_size=2).map("".join), fractions)
def test_any_single_document_is_divided(text, fraction):
    head, tail = _divide(text, fraction)
    assert head + tail == text
    assert head.strip()
    assert tail.strip()
    size = len(text.strip())
    wanted = min(max(size * fraction, 1), size - 1)
    assert abs(len(tail.rstrip()) - wanted) <= min(wanted, size - wanted) / 2 + 1
    whole = Document(text)
    assert _split([whole], fraction)(whole) == (Document(head), Document(tail))


LINES = [f"Line {i} of the book. It ends so." for i in range(100)]


def joined(lines: list[str], end: str = "\n") -> str:
    return "".join(line + end for line in lines)


@pytest.mark.parametrize(
    ("text", "fraction", "tail"),
    [
        (joined(LINES), 0.05, joined(LINES[95:])),
        (joined(LINES, "\r\n\r\n"), 0.05, joined(LINES[95:], "\r\n\r\n")),
        (f"\n\n{joined(LINES)}\n\n\n", 0.5, joined(LINES[50:]) + "\n\n\n"),
        ("Ay. Bee\n" * 100, 0.055, "Ay. Bee\n" * 6),  # the end of a sentence is nearer
        # No line ends near: sentences, with what closes them.
        (
            "First.\n" + "He said “no.” Then 3.5 more. " * 50,
            0.09,
            "Then 3.5 more. " + "He said “no.” Then 3.5 more. " * 4,
        ),
        ("天地玄黄。宇宙洪荒。" * 20, 0.1, "天地玄黄。宇宙洪荒。" * 2),
        # Words.
        ("word " * 100, 0.1, "word " * 10),
        # Characters.
        ("abcdefghij" * 10, 0.07, "defghij"),
        ("  ab\n", 0.05, "b\n"),
    ],
    ids=["lines", "blank lines", "margins", "verses", "sentences", "full stops", "words", "characters", "two"],
)
def test_where_a_single_document_is_divided(text, fraction, tail):
    assert _divide(text, fraction) == (text[: -len(tail)], tail)


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_a_single_document(tmp_path, name):
    text = "".join(TEXTS)
    (tmp_path / name).write_text(text if name.endswith(".txt") else json.dumps({"text": text}) + "\n")
    config = DataConfig(sources=(str(tmp_path / name),), vocab_size=290, validation_fraction=0.1)
    data = prepare(config, tmp_path / "out")
    (head,), (tail,) = (documents(file, data.tokenizer) for file in (data.train, data.validation))
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.09 < len(tail) / len(text) < 0.11
    assert fingerprint(data.tokenizer) == fingerprint(train_tokenizer([head], 290))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([" x\n"], "hold one document of 1 character, too short to divide into training and validation; give more"),
        (["same"] * 3, "hold 3 documents with the same text, but training and validation may not share any"),
    ],
)
def test_text_that_cannot_be_split(tmp_path, texts, message):
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(DataConfig(sources=(str(tmp_path),)), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_source_without_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(MODULE, "read_documents", lambda *_: iter(()))
    with pytest.raises(DataError, match=r"data\.sources hold no text; give others"):
        prepare(DataConfig(sources=(str(tmp_path),)), tmp_path / "out")


def test_errors_are_the_users():
    assert issubclass(DataError, UserError)
    assert issubclass(DataError, ValueError)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", ["texts", "texts/*.txt", "texts/00.txt"])
def test_folder_glob_or_file_into_the_cache(config, tmp_path, cache, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, sources=(source,))
    first = prepare_in_cache(config)
    forbid_reading(monkeypatch)
    second = prepare_in_cache(config)
    assert first.tokenizer_path == second.tokenizer_path
    assert first.tokenizer_path.parent.parent == cache / "tokens"
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    both = documents(second.train, second.tokenizer) + documents(second.validation, second.tokenizer)
    if source == "texts/00.txt":
        assert "".join(both) == TEXTS[0]
    else:
        assert sorted(both) == sorted(TEXTS)


def test_whatever_differs_has_its_own_folder_in_the_cache(config, tmp_path, cache, monkeypatch, tokenizer):
    def folder(config: DataConfig):
        return prepare_in_cache(config).tokenizer_path.parent

    first = folder(config)
    before = contents(first)
    found = {first, folder(dataclasses.replace(config, vocab_size=280))}
    for place in ("here", "there"):  # the same name in two folders
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(f"Some text: {place}.\n" * 9)
        monkeypatch.chdir(tmp_path / place)
        found.add(folder(DataConfig(sources=("a.txt",), vocab_size=257)))
    (tmp_path / "texts" / "00.txt").write_text("Now it says something else.")
    found.add(folder(config))
    own = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    for size in (260, 300):
        train_tokenizer(TEXTS, size).save(own.tokenizer)
        found.add(folder(own))
    assert len(found) == 7
    assert contents(first) == before


CHILD = """
import json, sys
from terseformer.config import DataConfig
from terseformer.data import prepare_in_cache
config = DataConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.load(sys.stdin).items()})
print("ready", flush=True)
data = prepare_in_cache(config, lambda *_: print("builds", flush=True))
print(data.train.num_tokens, data.tokenizer_path)
"""


def test_processes_take_turns(config, cache):
    env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    children: list[subprocess.Popen[str]] = []

    def start_children(*_: object) -> None:
        """In the middle of the work here, two others want the same."""
        if children:
            return
        for _ in range(2):
            pipe = subprocess.PIPE
            child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe, text=True, env=env)
            children.append(child)
            child.stdin.write(json.dumps(dataclasses.asdict(config)))
            child.stdin.close()
            child.stdin = None
        for child in children:
            assert child.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            children[0].wait(0.5)

    try:
        data = prepare_in_cache(config, start_children)
        assert len(children) == 2
        for child in children:
            assert child.communicate(timeout=60)[0] == f"{data.train.num_tokens} {data.tokenizer_path}\n"
            assert child.returncode == 0
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert sorted(path.name for path in data.tokenizer_path.parent.iterdir()) == [".lock", *FILES]


def test_configurations_that_share_a_folder_take_turns(config, tmp_path):
    """The last one wins; each is given what it asked for."""
    sizes = [260 + 10 * i for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda size: prepare(dataclasses.replace(config, vocab_size=size), tmp_path / "out"), sizes)
        )
    assert [data.train.vocab_size for data in found] == sizes
    for data in found:
        both = documents(data.train, data.tokenizer) + documents(data.validation, data.tokenizer)
        assert sorted(both) == sorted(TEXTS)


def test_files_that_are_replaced_while_they_are_opened(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(config, out)
    calls = []
    load = MODULE.load_tokenizer

    def load_and_lose(path):
        if not calls:
            (out / "data.json").unlink()
        calls.append(path)
        return load(path)

    monkeypatch.setattr(MODULE, "load_tokenizer", load_and_lose)
    built = []
    prepare(config, out, on_progress=lambda *_: built.append(1))
    assert built


def test_leftovers_of_a_killed_process_are_removed(config, tmp_path):
    (tmp_path / "out" / ".building").mkdir(parents=True)
    (tmp_path / "out" / ".building" / "train.bin").write_bytes(b"half")
    prepare(config, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", *FILES]


def test_prepared_folder_may_be_read_only(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare(config, out)
    monkeypatch.setitem(sys.modules, "filelock", None)  # permissions do not bind root
    assert prepare(config, out).train.num_tokens == first.train.num_tokens


def test_two_may_write_the_same_file(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as one, atomic_write(path) as two:
        one.write(b"one")
        two.write(b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_at_fault(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        prepare(DataConfig(), tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"data\.vocab_size must be at least 257"):
        prepare(DataConfig(sources=(str(tmp_path),), vocab_size=9), tmp_path / "out")


def test_needs_no_torch():
    code = "import sys, terseformer.data; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pypi_simple')))"
    env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0


def test_memory_does_not_grow_with_the_corpus(config, tmp_path, monkeypatch):
    class Text(str):
        """Counts how many of itself are held at a time."""

        alive = peak = 0

        def __init__(self, _: int):
            Text.alive += 1
            Text.peak = max(Text.peak, Text.alive)

        def __del__(self):
            Text.alive -= 1

    monkeypatch.setattr(MODULE, "read_documents", lambda *_: (Document(Text(number)) for number in range(5000)))
    monkeypatch.setattr(tokens, "_ENCODE_CHARACTERS", 400)
    data = prepare(config, tmp_path / "out")
    assert data.train.num_documents + data.validation.num_documents == 5000
    assert 100 < Text.peak < 1000
