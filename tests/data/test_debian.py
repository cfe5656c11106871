"""Debian's descriptions and manual pages: real packages and groff; of apt-get only the network is played."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from terseformer.config import ConfigError, DataConfig
from terseformer.data import DataError, prepare, read_documents
from terseformer.data.debian import _rendered, _stanzas, debian_file, page_parts, unfolded
from terseformer.data.documents import Document

MODULE = sys.modules[debian_file.__module__]
needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def words(count: int, first: str = "word") -> str:
    return " ".join([first, *(f"word{number}" for number in range(1, count))])


# Texts.


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("", ""),
        (" one line", "one line"),
        (" two\n lines", "two lines"),
        (" first\n paragraph\n .\n second", "first paragraph\n\nsecond"),
        (" first\n .\n .\n second", "first\n\n\nsecond"),
        (" a list:\n  one\n  two words\n .\n end", "a list:\none\ntwo words\n\nend"),
        (" a list:\n * one\n   goes on\n * two\n - three\n + four", "a list:\n* one\ngoes on\n* two\n- three\n+ four"),
        (" a list:\n * one that\n goes on\n * two", "a list:\n* one that goes on\n* two"),
        (" .\n text\n .", "text"),
        (" a -dash and a *star", "a -dash and a *star"),
        (" naïve — 你好", "naïve — 你好"),
    ],
)
def test_unfolded(body: str, text: str) -> None:
    assert unfolded(body) == text


def test_stanzas(tmp_path: Path) -> None:
    text = "\n\nPackage: a\nVersion: 1:2.0\nDescription-en: short\n long\n  indented\n .\n\n \nPackage: b\nEmpty:\n"
    (tmp_path / "list").write_text(text)
    assert list(_stanzas(tmp_path / "list")) == [
        {"Package": "a", "Version": "1:2.0", "Description-en": "short\n long\n  indented\n ."},
        {"Package": "b", "Empty": ""},
    ]
    (tmp_path / "list").write_text("")
    assert list(_stanzas(tmp_path / "list")) == []


HEAD, FOOT = "CAT(1)       Commands       CAT(1)", "1.0          2020-02-02     CAT(1)"


def page(*lines: str) -> str:
    return "\n".join((HEAD, "", *lines, "", FOOT)) + "\n\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (page("NAME", "    cat - says miaow", "", "TEXT", "    It is  a cat.", "", "    Two."), "It is a cat.\n\nTwo."),
        (page("Name", "    cat, dog – says", "    miaow", "TEXT", "    One."), "One."),
        (page("NAME", "    cat-dog -- says miaow", "", "TEXT", "", "", "", "    One."), "One."),
        (
            page("NAME", "    cat − says miaow", "TEXT", "┌──┬──┐", "    │a │ b│", "└──┴──┘", "+-----+", "One."),
            "a b\n\nOne.",
        ),
    ],
)
def test_parts_of_a_page(given: str, expected: str) -> None:
    synopsis, text = page_parts(given)
    assert synopsis == "says miaow"
    assert text == f"TEXT\n{expected}" or text == f"TEXT\n\n{expected}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ("", "")),
        ("\n\n", ("", "")),
        (HEAD, ("", "")),
        (page("TEXT", "    One."), ("", "")),
        (page("    NAME", "    cat - indented", "TEXT", "    One."), ("", "")),
        (page("NAME", "    cat without a dash", "TEXT", "    One."), ("", "TEXT\nOne.")),
        (page("NAME", "    cat - says miaow"), ("says miaow", "")),
    ],
)
def test_pages_that_lack_a_part(given: str, expected: tuple[str, str]) -> None:
    assert page_parts(given) == expected


MAN = r"""
.\" a comment
.TH CAT 1 "2020-02-02" "1.0" "Commands"
.SH NAME
cat, dog \- says \(lqmiaow\(rq \(em naïve 你好
.SH DESCRIPTION
The
.B bold
and the
.I italic
word of a long line that an ordinary terminal would have divided at eighty columns, in several places, with hyphens.
.PP
A second paragraph.
.SS "Of tables"
.TS
allbox tab(@);
l l.
key@value
\fB\-a\fR@all of them
.TE
"""


@needs_groff
def test_rendered_page() -> None:
    synopsis, text = page_parts(_rendered(MAN.encode()))
    assert synopsis == "says “miaow” — naïve 你好"
    lines = text.splitlines()
    assert lines[0] == "DESCRIPTION"
    assert lines[1] == (
        "The bold and the italic word of a long line that an ordinary terminal would have divided at eighty columns, "
        "in several places, with hyphens."
    )
    assert "A second paragraph." in lines
    assert [line for line in lines if line][3:] == ["Of tables", "key value", "-a all of them"]
    assert not any(ord(letter) < 32 or 0x2500 <= ord(letter) < 0x2580 for line in lines for letter in line)


@needs_groff
def test_rendered_mdoc_page() -> None:
    roff = ".Dd February 2, 2020\n.Dt CAT 1\n.Os\n.Sh NAME\n.Nm cat\n.Nd says miaow\n.Sh DESCRIPTION\n.Nm\nis a cat.\n"
    assert page_parts(_rendered(roff.encode())) == ("says miaow", "DESCRIPTION\ncat is a cat.")


@needs_groff
@pytest.mark.parametrize("roff", [b"", b".nonsense\n", b"\xff\xfe\x00", b".SH\n.TS\nno table"])
def test_pages_that_groff_complains_about(roff: bytes) -> None:
    assert page_parts(_rendered(roff))[0] == ""


# Sources.

APT_GET = """
    #!{python}
    import os, shutil, sys
    from pathlib import Path

    archive, words = Path({archive!r}), sys.argv[1:]
    options = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-o")
    command, *names = [w for i, w in enumerate(words) if w != "-o" and (i == 0 or words[i - 1] != "-o")]
    lists = Path(options["Dir::State::Lists"])
    assert lists.is_absolute() and Path(options["Dir::Cache"]).is_absolute(), "apt looks elsewhere"
    with (archive / "calls").open("a") as log:
        print(command, *names, file=log)
    if (archive / ("no-" + command)).exists():
        print("E: Could not resolve 'deb.example.org'\\nE: More", file=sys.stderr)
        sys.exit(100)
    for name in names:
        (found,) = archive.glob(name.replace("=", "_").replace(":", "%3a") + "_*.deb")
        shutil.copy(found, os.getcwd())
    if command == "update":
        assert (lists / "partial").is_dir()
        for path in (archive / "lists").iterdir():
            shutil.copy(path, lists)
"""


class Archive:
    """A Debian archive in a folder, and what apt-get was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "lists").mkdir(parents=True)
        for name in ("a_Packages", "a_i18n_Translation-en"):
            (folder / "lists" / name).touch()

    def describe(self, package: str, synopsis: str, text: str, source: str = "", version: str = "1.0") -> None:
        """Adds a package to the lists."""
        about = f"Package: {package}\nVersion: {version}\n" + (f"Source: {source}\n" if source else "")
        with (self.folder / "lists" / "a_Packages").open("a") as file:
            file.write(f"{about}Description: {synopsis}\n\n")
        with (self.folder / "lists" / "a_i18n_Translation-en").open("a") as file:
            file.write(f"Package: {package}\nDescription-md5: 0\nDescription-en: {synopsis}\n {text}\n\n")

    def add(self, package: str, pages: dict[str, bytes], source: str = "", version: str = "1.0") -> Path:
        """Adds a package with files of these contents below /usr/share; gives the archive's path."""
        self.describe(package, "a package", "short", source, version)
        tree = self.folder / "trees" / package
        for name, content in pages.items():
            path = tree / "usr" / "share" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {package}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b.cd>\nDescription: d\n"
        (tree / "DEBIAN" / "control").write_text(control)
        path = self.folder / f"{package}_{version.replace(':', '%3a')}_all.deb"
        subprocess.run(["dpkg-deb", "-Zgzip", "-b", tree, path], check=True, capture_output=True)
        return path

    @property
    def calls(self) -> list[str]:
        """What apt-get was called with."""
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    archive = Archive(tmp_path / "archive")
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(dedent(APT_GET.format(python=sys.executable, archive=str(archive.folder))).lstrip())
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return archive


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def rows(source: str, cache: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in debian_file(source, cache).read_text(encoding="utf-8").splitlines()]


def man(name: str, synopsis: str, text: str) -> bytes:
    roff = f'.TH {name.upper()} 1 "" "" ""\n.SH NAME\n{name} \\- {synopsis}\n.SH TEXT\n{text}\n'
    return gzip.compress(roff.encode())


def made(cache: Path) -> list[str]:
    """Files of the cache that a later call would take for a source's rows, or that a call left half-written."""
    return sorted(path.name for path in (cache / "debian").iterdir() if path.is_file())


def test_descriptions(archive: Archive, cache: Path) -> None:
    archive.describe("long", "a synopsis — naïve", words(20, "first") + "\n .\n " + words(20, "second"), "origin (2.0)")
    archive.describe("exact", "forty words", words(40, "exactly"))
    archive.describe("short", "too short", words(39, "almost"))
    # Alike in their first 300 characters.
    archive.describe("first", "one of two", words(80, "alike") + " end")
    archive.describe("second", "two of two", words(80, "alike") + " other end")
    found = rows("debian:descriptions", cache)
    assert [row["package"] for row in found] == ["long", "exact", "first"]
    assert found[0] == {
        "package": "long",
        "source": "origin",
        "synopsis": "a synopsis — naïve",
        "text": words(20, "first") + "\n\n" + words(20, "second"),
    }
    assert found[1]["source"] == "exact"
    assert found[2]["text"].endswith("word79 end")
    assert made(cache) == ["debian%3adescriptions.jsonl"]


def test_second_call_needs_no_apt_get(archive: Archive, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.describe("long", "a synopsis", words(40))
    first = debian_file("debian:descriptions", cache)
    content = first.read_bytes()
    assert archive.calls == ["update"]
    monkeypatch.setenv("PATH", "")
    assert debian_file("debian:descriptions", cache) == first
    assert first.read_bytes() == content
    # The lists are there already: only what makes the rows is missing.
    first.unlink()
    assert debian_file("debian:descriptions", cache).read_bytes() == content


@needs_dpkg
@needs_groff
def test_manual_pages(archive: Archive, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_PACKAGES_AT_ONCE", 2)
    pages = {
        "man/man1/cat.1.gz": man("cat", "says miaow", words(39, "Cats")),  # TEXT is a word too
        "man/man8/few.8.gz": man("few", "has few words", words(38, "Few")),
        "man/man1/none.1.gz": man("none", "", words(60)),
        "man/man1/alias.1.gz": gzip.compress(b".so man1/cat.1\n"),
        "man/man1/twin.1.gz": man("twin", "is a twin", words(39, "Cats")),
        "man/fr/man1/chat.1.gz": man("chat", "dit miaou", words(60, "Chats")),
        "man/man1/plain.1": b"not compressed",
        "doc/man1/other.1.gz": man("other", "is elsewhere", words(60, "Other")),
        "man/man3/dog.3.gz": man("dog", "says “woof”", words(60, "Dogs")),
    }
    archive.add("tool-cat", pages, "animals (9)", "1:2.0-1")
    archive.add("tool-empty", {})
    archive.add("tool-owl", {"man/man1/owl.1.gz": man("owl", "says hu", words(45, "Owls"))})
    archive.add("untold", {"man/man1/bat.1.gz": man("bat", "says nothing", words(45, "Bats"))})
    found = rows("debian:man/tool-*", cache)
    assert [(row["package"], row["source"], row["page"], row["synopsis"]) for row in found] == [
        ("tool-cat", "animals", "cat.1", "says miaow"),
        ("tool-cat", "animals", "dog.3", "says “woof”"),
        ("tool-owl", "tool-owl", "owl.1", "says hu"),
    ]
    assert found[0]["text"] == "TEXT\n" + words(39, "Cats")
    assert archive.calls == ["update", "download tool-cat=1:2.0-1 tool-empty=1.0", "download tool-owl=1.0"]
    assert made(cache) == ["debian%3aman%2ftool-%2a.jsonl"]
    # Another source finds the lists, and no archive has stayed.
    assert [row["page"] for row in rows("debian:man/untold", cache)] == ["bat.1"]
    assert archive.calls[3:] == ["download untold=1.0"]
    assert list(cache.rglob("*.deb")) == []


@needs_dpkg
@needs_groff
def test_large_pages_are_left_out(archive: Archive, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "MAX_PAGE_BYTES", 4000)
    bomb = man("bomb", "grows", "word " * 2000)
    noise = man("noise", "does not shrink", os.urandom(5000).hex())
    assert len(bomb) < 4000 < len(noise)
    pages = {"bomb": bomb, "noise": noise, "cat": man("cat", "says miaow", words(60))}
    archive.add("tool", {f"man/man1/{name}.1.gz": page for name, page in pages.items()})
    assert [row["page"] for row in rows("debian:man/tool", cache)] == ["cat.1"]


@needs_dpkg
@needs_groff
def test_packages_without_text_are_refused(archive: Archive, cache: Path) -> None:
    archive.add("tool", {"man/man1/cat.1.gz": man("cat", "says miaow", "too short")})
    with pytest.raises(DataError, match=r"^debian:man/tool gives no text of at least 40 words; leave it out of data"):
        debian_file("debian:man/tool", cache)
    assert made(cache) == []


@needs_dpkg
@needs_groff
@pytest.mark.parametrize("request_name", ["so", "cf", "trf"])
def test_a_page_shows_no_other_file(request_name: str, archive: Archive, cache: Path) -> None:
    secret = archive.folder / "secret"
    secret.write_text("the secret is out\n")
    page = man("cat", "says miaow", f"{words(60)}\n.{request_name} {secret}\n{words(5)}")
    archive.add("tool", {"man/man1/cat.1.gz": page})
    (row,) = rows("debian:man/tool", cache)
    assert "secret" not in row["text"]


@pytest.mark.parametrize(
    "source",
    ["debian:", "debian:man", "debian:man/", "debian:description", "debian:man/*", "debian:man/a/b", "debian:man/A",
     "debian:man/../x", "debian:man/a b", "debian:man/-o", "debian:descriptions "],
)  # fmt: skip
def test_misspelt_sources(source: str, archive: Archive, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be spelled debian:descriptions or debian:man/PACKAGES$"):
        debian_file(source, cache)
    assert archive.calls == []
    assert not cache.exists()


def test_no_such_package(archive: Archive, cache: Path) -> None:
    archive.describe("cat", "a synopsis", words(40))
    with pytest.raises(
        DataError, match=r"knows no package that matches 'dog\*'; change debian:man/dog\* in data.sources"
    ):
        debian_file("debian:man/dog*", cache)
    assert archive.calls == ["update"]
    assert made(cache) == []


def test_lists_that_came_in_part_are_fetched_again(archive: Archive, cache: Path) -> None:
    archive.describe("cat", "a synopsis", words(40))
    (cache / "debian" / "lists").mkdir(parents=True)
    shutil.copy(archive.folder / "lists" / "a_i18n_Translation-en", cache / "debian" / "lists")
    (row,) = rows("debian:descriptions", cache)
    assert row["source"] == "cat"
    assert archive.calls == ["update"]


def test_archive_without_descriptions(archive: Archive, cache: Path) -> None:
    for path in (archive.folder / "lists").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="update brought no descriptions; debian: sources need a Debian system with a"):
        debian_file("debian:descriptions", cache)
    assert made(cache) == []


@pytest.mark.parametrize(("command", "source"), [("update", "debian:descriptions"), ("download", "debian:man/cat")])
def test_apt_get_fails(command: str, source: str, archive: Archive, cache: Path) -> None:
    archive.describe("cat", "a synopsis", words(40))
    (archive.folder / f"no-{command}").touch()
    with pytest.raises(DataError, match=r"^apt-get failed: E: Could not resolve 'deb.example.org'; see whether it"):
        debian_file(source, cache)
    assert made(cache) == []
    # Nothing keeps a later call from succeeding.
    (archive.folder / f"no-{command}").unlink()
    if command == "update":
        assert len(rows(source, cache)) == 1


def without(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves all programs but one on the path."""
    folder.mkdir()
    for name in ("apt-get", "dpkg-deb", "groff", "tar", "gzip", "preconv", "tbl", "troff", "grotty"):
        if name != program and (found := shutil.which(name)):
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


@needs_dpkg
@needs_groff
@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb", "groff"])
def test_missing_program(
    program: str, archive: Archive, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add("tool", {"man/man1/cat.1.gz": man("cat", "says miaow", words(60))})
    without(program, tmp_path / "programs", monkeypatch)
    with pytest.raises(DataError, match=f"source needs the program {program}, which is not installed; use a Debian"):
        debian_file("debian:man/tool", cache)
    assert made(cache) == []


@needs_dpkg
@needs_groff
@pytest.mark.parametrize("left", [0, 100])
def test_damaged_package(left: int, archive: Archive, cache: Path) -> None:
    path = archive.add("tool", {"man/man1/cat.1.gz": man("cat", "says miaow", words(60))})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=r"dpkg-deb failed: .*tool_1.0_all.deb.*; see whether it works by itself"):
        debian_file("debian:man/tool", cache)
    assert made(cache) == []


@needs_dpkg
@needs_groff
def test_page_that_is_not_what_its_name_says_is_left_out(archive: Archive, cache: Path) -> None:
    whole = man("cat", "says miaow", words(60))
    pages = {"a.1.gz": b"plain", "b.1.gz": whole[:-20], "c.1.gz": b"", "d.1.gz": whole}
    archive.add("tool", {f"man/man1/{name}": content for name, content in pages.items()})
    assert [row["page"] for row in rows("debian:man/tool", cache)] == ["d.1"]


def test_cache_may_be_relative(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apt takes relative places for its own."""
    archive.describe("cat", "a synopsis", words(40))
    monkeypatch.chdir(tmp_path)
    assert len(rows("debian:descriptions", Path("cache"))) == 1


# As data.


def described(archive: Archive) -> DataConfig:
    """Sixty packages of twenty sources."""
    for number in range(60):
        archive.describe(f"p{number}", f"package {number}", words(40 + number, f"text{number}"), f"s{number % 20}")
    return DataConfig(
        sources=("debian:descriptions",),
        target_field="synopsis",
        group_field="source",
        vocab_size=300,
        validation_fraction=0.3,
    )


def test_documents(archive: Archive, cache: Path) -> None:
    config = described(archive)
    documents = list(read_documents(config, cache))
    assert documents[3] == Document(words(43, "text3"), "package 3", "s3")
    assert len(documents) == 60
    alone = DataConfig(sources=config.sources)
    assert list(read_documents(alone, cache))[3] == Document(words(43, "text3"))
    with pytest.raises(DataError, match=r"descriptions\.jsonl line 1 has no field 'title', only 'package', 'source', "):
        next(read_documents(DataConfig(sources=config.sources, target_field="title"), cache))


def test_prepared(archive: Archive, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = described(archive)
    first = prepare(config, tmp_path / "out", cache)
    assert archive.calls == ["update"]
    sides = []
    for file in (first.train, first.validation):
        tokens = file.tokens.tolist()
        texts: list[list[int]] = [[]]
        for token in tokens[:-1]:
            texts.append([]) if token == file.end_of_text_id else texts[-1].append(token)
        decoded = [first.tokenizer.decode(text) for text in texts]
        numbers = [int(target.removeprefix("package ")) for target in decoded[1::2]]
        assert decoded[::2] == [words(40 + number, f"text{number}") for number in numbers]
        sides.append({number % 20 for number in numbers})
        assert len(numbers) == 3 * len(sides[-1])  # all of a source's packages
    assert sides[0] | sides[1] == set(range(20))
    assert not sides[0] & sides[1]
    # Nothing is fetched or built again.
    monkeypatch.setattr(sys.modules[prepare.__module__], "read_documents", None)
    monkeypatch.setenv("PATH", "")
    assert prepare(config, tmp_path / "out", cache).train.num_tokens == first.train.num_tokens
