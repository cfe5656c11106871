"""Text that Debian's packages carry, fetched by apt: descriptions with synopses, manual pages with their names.

apt checks what it fetches against Debian's signatures. No package is installed, and nothing in one is run.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from terseformer.config import ConfigError
from terseformer.data.errors import DataError
from terseformer.data.files import atomic_write

MIN_WORDS = 40
"""Words of a description or a page below which it is left out."""
MAX_PAGE_BYTES = 2**22
_HEAD = 300
_APT = "apt"
_PACKAGES_AT_ONCE = 100
_SPELLING = re.compile(r"debian:(descriptions|man/(?P<packages>[a-z0-9][a-z0-9+.*?\[\]-]*))")
_LISTS = (
    "Acquire::GzipIndexes=false",
    "Acquire::Languages=en",
    "APT::Sandbox::User=root",
    "APT::Update::Error-Mode=any",
    "Debug::NoLocking=true",
)
_NO_FILES = b".rm so\n.rm cf\n.rm trf\n"
"""Takes the requests away by which a page could show other files."""


def debian_file(source: str, cache: Path) -> Path:
    """A `.jsonl` file with the rows of a source, made when it is not in the cache.

    `debian:descriptions` gives a row for each package of the distribution whose description has at least 40 words, and
    other first 300 characters than those before it: `package`, `source`, `synopsis`, `text`. `debian:man/PACKAGES`,
    with a name or a glob, gives a row for each manual page in these packages, of as many words: `package`, `source`,
    `page`, `synopsis` (of its NAME section), `text` (what follows that section).

    Args:
        source: its spelling in `data.sources`.
        cache: folder for fetched files.

    Raises:
        ConfigError: the source is misspelled.
        DataError: a program is missing, there are no such packages, they cannot be fetched, or have no such text.
    """
    from filelock import FileLock

    match = _SPELLING.fullmatch(source)
    if match is None:
        raise ConfigError(f"data.sources: {source!r} must be spelled debian:descriptions or debian:man/PACKAGES")
    path = cache / "debian" / f"{re.sub(r'[^a-z0-9.+-]', lambda m: f'%{ord(m[0]):02x}', source)}.jsonl"
    if not path.is_file():
        folder = path.parent.resolve()  # apt takes a relative path for one of its own
        (folder / _APT).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _APT / ".lock"):
            if not path.is_file():
                rows = _pages(match["packages"], folder) if match["packages"] else _descriptions(folder)
                _write(path, source, rows)
    return path


def _write(path: Path, source: str, rows: Iterator[dict[str, str]]) -> None:
    with atomic_write(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
        if not file.tell():
            raise DataError(f"{source} gives no text of at least {MIN_WORDS} words; leave it out of data.sources")


def _descriptions(folder: Path) -> Iterator[dict[str, str]]:
    lists = _lists(folder)
    sources = {package: fields["source"] for package, fields in _packages(lists).items()}
    seen: set[str] = set()
    for path in sorted(lists.glob("*_i18n_Translation-en")):
        for fields in _stanzas(path):
            synopsis, _, body = fields.get("Description-en", "").partition("\n")
            text = unfolded(body)
            if len(text.split()) >= MIN_WORDS and text[:_HEAD] not in seen:
                seen.add(text[:_HEAD])
                package = fields["Package"]
                source = sources.get(package, package)
                yield {"package": package, "source": source, "synopsis": synopsis.strip(), "text": text}


def unfolded(body: str) -> str:
    """The text of a description: lines of a paragraph joined; one that is indented or an item begins anew."""
    text = ""
    for line in body.splitlines():
        is_verbatim = line.startswith("  ") or line[1:2] in ("*", "-", "+")
        if line.strip() == ".":
            text += "\n"
        else:
            text += ("\n" if is_verbatim or not text or text.endswith("\n") else " ") + line.strip()
    return text.strip()


def _pages(packages: str, folder: Path) -> Iterator[dict[str, str]]:
    if shutil.which("groff") is None:  # before anything is fetched
        raise _missing("groff")
    known = _packages(_lists(folder))
    wanted = sorted(fnmatch.filter(known, packages))
    if not wanted:
        raise DataError(f"apt knows no package that matches {packages!r}; change debian:man/{packages} in data.sources")
    seen: set[str] = set()
    for start in range(0, len(wanted), _PACKAGES_AT_ONCE):
        with tempfile.TemporaryDirectory() as downloads:
            some = [f"{name}={known[name]['version']}" for name in wanted[start : start + _PACKAGES_AT_ONCE]]
            _run("apt-get", *_options(folder), "download", *some, cwd=downloads)
            for archive in sorted(Path(downloads).glob("*.deb")):
                package = archive.name.partition("_")[0]
                for name, roff in _roff(archive):
                    synopsis, text = page_parts(_rendered(roff))
                    if synopsis and len(text.split()) >= MIN_WORDS and text[:_HEAD] not in seen:
                        seen.add(text[:_HEAD])
                        about = {"package": package, "source": known[package]["source"], "page": name}
                        yield {**about, "synopsis": synopsis, "text": text}


def _roff(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The English manual pages in a package, none of which is written to disk; damaged ones are left out."""
    try:
        process = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise _missing("dpkg-deb") from None
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if member.isfile() and path.match("usr/share/man/man*/*.gz") and member.size <= MAX_PAGE_BYTES:
                        content = _unzipped(tar, member)
                        if len(content) <= MAX_PAGE_BYTES and not content.startswith(b".so "):
                            yield path.stem, content
            process.stdout.read()  # dpkg-deb may still be writing
            is_whole = process.wait() == 0
        except tarfile.TarError:
            is_whole = False
        if not is_whole:
            raise _failed("dpkg-deb", process.stderr.read())


def _unzipped(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a file holds, or a little more of it than a page may have; nothing if it is damaged."""
    file = tar.extractfile(member)
    assert file is not None
    try:
        with gzip.open(file) as content:
            return content.read(MAX_PAGE_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        return b""


def _rendered(roff: bytes) -> str:
    """A manual page as text, a line for each paragraph."""
    arguments = ["-mandoc", "-Tutf8", "-Kutf8", "-P-cbou", "-rLL=10000n", "-rHY=0", "-rIN=4n", "-t"]
    return _run("groff", *arguments, data=_NO_FILES + b".ad l\n.nh\n" + roff, may_complain=True)


_RULES = re.compile(r"[\u2500-\u257f]+|[-=_+]{5,}")
"""Lines of tables."""


def page_parts(page: str) -> tuple[str, str]:
    """The description in a page's NAME section, and the sections that follow it; "" where there is no such section."""
    raw = [_RULES.sub(" ", line) for line in page.rstrip().splitlines()]
    lines = [" ".join(line.split()) for line in raw]
    sections = [number for number, line in enumerate(raw) if line[:1].strip()]
    start = next((number for number in sections if lines[number].upper() == "NAME"), None)
    if start is None:
        return "", ""
    end = next((number for number in sections if number > start), len(lines) - 1)
    name = " ".join(filter(None, lines[start + 1 : end]))
    _, _, synopsis = re.sub(r"\s+[-–—−]+\s+", "\0", name, count=1).partition("\0")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines[end:-1])).strip()  # the last line is the page's foot
    return synopsis.strip(), text


def _options(folder: Path) -> list[str]:
    places = (f"Dir::State::Lists={folder / 'lists'}", f"Dir::Cache={folder / _APT}")
    return [word for option in (*_LISTS, *places) for word in ("-o", option)]


def _lists(folder: Path) -> Path:
    """The folder with apt's lists, fetched once."""
    lists, fetched = folder / "lists", folder / _APT / "fetched"
    if not fetched.is_file():
        for place in (lists, folder / _APT / "archives"):
            (place / "partial").mkdir(parents=True, exist_ok=True)
        _run("apt-get", *_options(folder), "update")
        if not any(lists.glob("*_Translation-en")):
            raise DataError(
                "apt-get update brought no descriptions; debian: sources need a Debian system with a network"
            )
        fetched.touch()
    return lists


def _packages(lists: Path) -> dict[str, dict[str, str]]:
    """Version and source package of each package."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(lists.glob("*_Packages")):
        for fields in _stanzas(path):
            name = fields["Package"]
            source = fields.get("Source", name).split()[0]
            found.setdefault(name, {"version": fields["Version"], "source": source})
    return found


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The stanzas of a control file; the lines of a field that go on keep their first space."""
    fields: dict[str, str] = {}
    key = ""
    with path.open(encoding="utf-8") as lines:
        for line in _ending_empty(lines):
            if not line.strip():
                if fields:
                    yield fields
                fields = {}
            elif line[0] == " ":
                fields[key] += "\n" + line.rstrip("\n")
            else:
                key, _, value = line.partition(":")
                fields[key] = value.strip()


def _ending_empty(lines: Iterable[str]) -> Iterator[str]:
    yield from lines
    yield ""


def _run(program: str, *arguments: str, cwd: str | None = None, data: bytes = b"", may_complain: bool = False) -> str:
    command: Sequence[str] = (program, *arguments)
    try:
        done = subprocess.run(command, cwd=cwd, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise _missing(program) from None
    if done.returncode and not may_complain:
        raise _failed(program, done.stderr)
    return done.stdout.decode("utf-8", "replace")


def _missing(program: str) -> DataError:
    return DataError(
        f"a debian: source needs the program {program}, which is not installed; use a Debian system that has it, "
        "or other data.sources"
    )


def _failed(program: str, complaints: bytes) -> DataError:
    reason = (complaints.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[0]
    return DataError(f"{program} failed: {reason}; see whether it works by itself")
