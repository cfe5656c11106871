"""A small corpus, and a package index in a folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

TEXTS = [
    f"Text {i}: the {'cat' if i % 3 else 'dog'} sat on mat {i * i}, and said nothing.\n" * (1 + i % 4)
    for i in range(60)
]


def make_tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def make_zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


class Index:
    """A package index in a folder, and what was asked of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self._links: dict[str, list[str]] = {}

    def publish(self, project: str, filename: str, content: bytes, listed: bool = True) -> str:
        """Adds an archive; returns its digest, which the index lists too if `listed`."""
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "files").mkdir(exist_ok=True)
        (self.folder / "files" / filename).write_bytes(content)
        fragment = f"#sha256={digest}" if listed else ""
        self._links.setdefault(project, []).append(f'<a href="../../files/{filename}{fragment}">{filename}</a>')
        page = self.folder / "simple" / project / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("<!DOCTYPE html><html><body>" + "".join(self._links[project]) + "</body></html>")
        return digest
