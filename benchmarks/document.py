"""Where benchmarks put their tables."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def replace_between(page: str, name: str, body: str) -> None:
    """Replaces what stands between a pair of markers of a page of docs/."""
    document = ROOT / "docs" / page
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    head, _, rest = document.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    document.write_text(f"{head}{begin}\n{body}\n{end}{tail}", encoding="utf-8")
