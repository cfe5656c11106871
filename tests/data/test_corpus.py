from __future__ import annotations

import json
from pathlib import Path

import pytest

from terseformer.config import ConfigError, DataConfig
from terseformer.data import DataError, read_documents


def read(*sources: str | Path, **settings) -> list[str]:
    config = DataConfig(sources=tuple(map(str, sources)), **settings)
    return [document.text for document in read_documents(config, Path("no cache is used"))]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_folders_and_globs_come_in_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/deep/d.rst", ".hidden/e.txt", "f.py", "sub/.g.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name} — ünïcode\n", encoding="utf-8")
    jsonl(tmp_path / "z.jsonl", {"text": "one"}, {"text": "two"})

    def texts(*names: str) -> list[str]:
        return [f"text of {name} — ünïcode\n" for name in names]

    assert read(tmp_path) == texts("a.md", "b.txt", "sub/c.TXT", "sub/deep/d.rst")[:2] + texts(
        "sub/c.TXT", "sub/deep/d.rst"
    ) + ["one", "two"]
    assert read(tmp_path / "*.txt", tmp_path / "f.py") == texts("b.txt", "f.py")
    assert read(tmp_path / "**" / "*.[rT]*") == texts("sub/c.TXT", "sub/deep/d.rst")


def test_name_that_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracket")
    (tmp_path / "a1.txt").write_text("no bracket")
    assert read(tmp_path / "a[1].txt") == ["bracket"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("mine")
    assert read("~/a.txt") == read("~/*.txt") == ["mine"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    assert read(tmp_path) == ["row", "marked"]


def test_rows_of_a_document_are_joined(tmp_path):
    rows = [("A", 1, "x"), ("A", 1, "y"), ("A", 2, "z"), ("B", 2, ""), ("B", 2, "w"), ("C", 1, " ")]
    path = jsonl(tmp_path / "a.jsonl", *({"book": b, "chapter": c, "verse": v} for b, c, v in rows))
    assert read(path, text_field="verse", document_fields=("book", "chapter")) == ["x\ny", "z", "w"]
    assert read(path, text_field="verse", document_fields=("chapter", "book")) == ["x\ny", "z", "w"]
    assert read(path, text_field="verse") == ["x", "y", "z", "w"]
    assert read(path, text_field="verse", document_fields=("book",)) == ["x\ny\nz", "w"]


def test_document_field_may_hold_anything(tmp_path):
    rows = [{"id": value, "text": text} for value, text in (([1], "a"), ([1], "b"), ({"k": 1}, "c"), (None, "d"))]
    assert read(jsonl(tmp_path / "a.jsonl", *rows), document_fields=("id",)) == ["a\nb", "c", "d"]


def test_rows_of_a_document_that_are_not_adjacent(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"id": i, "text": "t"} for i in (1, 2, 1)))
    with pytest.raises(DataError, match=r"a\.jsonl line 3: the rows of document \(1,\) are not adjacent"):
        read(path, document_fields=("id",))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is empty; remove it"):
        read(tmp_path / name)


def test_rows_without_text_are_an_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl is empty"):
        read(jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": "\n"}))


def test_undecodable_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 latin")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 3"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl is not UTF-8: byte 0xff at offset 24"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_bytes("cut é".encode()[:-1])
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8: byte 0xc3 at offset 4"):
        read(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl line 2 is not JSON"),
        ("[" * 100_000, r"a\.jsonl line 2 is not JSON"),
        ("[1]", r"line 2 is not a JSON object but list"),
        ('{"txt": "b", "id": 1}', r"line 2 has no field 'text', only 'txt', 'id'; change data\.text_field"),
        ("{}", r"line 2 has no field 'text', only none"),
        ('{"text": 3}', r"line 2: field 'text' holds int where text is needed"),
        ('{"text": null}', r"line 2: field 'text' holds NoneType"),
        ('{"text": "\\ud800"}', r"line 2: field 'text' holds half of a surrogate pair, '\\ud800'"),
    ],
)
def test_bad_row(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_sources_that_match_nothing(tmp_path):
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(DataError, match=r"no file matches the glob '.*/\*\.txt'"):
        read(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"no file or folder '.*/absent\.txt'"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"the folder '.*' holds no file with \.jsonl, \.md, .*use a glob"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        read()


def test_documents_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbroken\n')
    documents = read_documents(DataConfig(sources=(str(tmp_path / "a.jsonl"),)), tmp_path)
    assert next(documents).text == "first"
    with pytest.raises(DataError, match="line 2"):
        next(documents)
