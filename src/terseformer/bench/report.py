"""The measured rows as a table, a plot, and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def show(result: dict[str, Any], plot: Path | None = None) -> None:
    """Prints tables, and as the last line the whole result as JSON.

    Args:
        result: of `bench`.
        plot: an image to write, its type by its suffix.
    """
    machine, floors = result["machine"], result["floors"]
    console = Console(highlight=False)
    console.width = max(console.width, 130)  # rather a broken line than a broken number
    console.print(
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads; "
        f"reads {floors['read_bytes_per_second'] / 1e9:.1f} GB/s (spread {floors['read_spread']:.0%}), "
        + "".join(
            f"records of {int(size) / 1e3:.0f} kB {rate / 1e9:.1f} GB/s, "
            for size, rate in floors["record_bytes_per_second"].items()
        )
        + f"{floors['multiply_adds_per_second'] / 1e9:.1f} G multiply-adds/s",
        soft_wrap=True,
    )
    if machine["missing"]:
        console.print(f"not compared with what is not installed: pip install {' '.join(machine['missing'].values())}")
    numbers = ("ms/token", "spread", "ms/block", "first token", "read", "multiply-adds", "floor", "reached")
    table = Table("model", *(Column(name, justify="right") for name in numbers))
    for row in result["rows"]:
        table.add_row(f"{row['group']} {row['name']}", *_cells(row))
    if result["rows"]:
        console.print(table)
    for reading in result["sources"]:
        console.print(
            f"a source of {reading['tokens']:,} tokens, {reading['pattern']} attention: {reading['seconds']:.1f} s, "
            f"{reading['peak_gigabytes']:.2f} GB"
        )
    for row in result["rows"]:
        if row["resident_gigabytes"] is not None:
            console.print(f"{row['group']} {row['name']}: {row['resident_gigabytes']:.1f} GB of memory in use")
    for name, value in result["ratios"].items():
        console.print(f"{name}: {value:.2f}")
    if plot is not None:
        draw(result, plot)
    print(json.dumps(result))


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str, unit: str = "") -> str:
        return "" if row[key] is None else f"{row[key]:{form}}{unit}"

    return [
        number("milliseconds", ".3f"),
        number("spread", ".0%"),
        number("block_milliseconds", ".3f"),
        number("first_token_milliseconds", ".1f", " ms"),
        number("megabytes", ",.1f", " MB"),
        number("million_multiply_adds", ",.1f", " M"),
        number("floor_milliseconds", ".3f", " ms"),
        number("floor_fraction", ".0%"),
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a bar for each row, on a logarithmic axis, with its floor."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    rows = list(reversed(result["rows"]))
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["milliseconds"] for row in rows], color="#4878a8")
    for place, row in zip(places, rows, strict=True):
        if row["floor_milliseconds"] is not None:
            axes.plot([row["floor_milliseconds"]] * 2, [place - 0.4, place + 0.4], color="#c04030", linewidth=2)
    axes.set_yticks(list(places), [f"{row['group']} {row['name']}" for row in rows])
    axes.set(xscale="log", xlabel="milliseconds a token (the line: the floor)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)
