"""Makes the data of recipes/copy.toml: random words, to be written again as they are.

    python examples/copying.py data/copy.jsonl

The paper's copying task, in words. Nothing can be learned by heart: who writes a row well has looked at its source.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from terseformer.data.files import atomic_write

NUM_ROWS = 20_000
MAX_WORDS = 12
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")


def main(path: Path) -> None:
    """Writes the rows, the same each time."""
    chance = random.Random(0)
    with atomic_write(path) as file:
        for _ in range(NUM_ROWS):
            words = ("".join(chance.choices(SYLLABLES, k=2)) for _ in range(chance.randint(1, MAX_WORDS)))
            text = " ".join(words)
            file.write((json.dumps({"text": text, "target": text}) + "\n").encode("utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
