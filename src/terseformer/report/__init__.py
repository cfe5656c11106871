"""One self-contained HTML file about one or several runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from terseformer.data.files import atomic_write
from terseformer.report.page import render
from terseformer.report.runs import ReportError, read_runs
from terseformer.report.speed import measure_decoding

REPORT = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None, speed: bool = True) -> Path:
    """Writes the report of some runs: costs, quality, speed, curves, controllers, samples and recipes.

    Args:
        folders: runs' or checkpoints' folders; the first one is what the others are compared with.
        out: the file, written whole or not at all; default: `report.html` in the folder of the only run.
        speed: measure the engine's decoding on this machine.

    Returns:
        The file.

    Raises:
        ReportError: no folder or the same one twice, no place for the report, or a log of a training that cannot be
            read.
        CheckpointError: a folder without a checkpoint, or a damaged one.
    """
    if not folders:
        raise ReportError("terse report needs a run's folder, such as: terse report runs/small-1m")
    if out is None:
        if len(folders) > 1:
            raise ReportError("a report of several runs needs a place; give --out FILE.html")
        out = folders[0] / REPORT
    if out.is_dir():
        raise ReportError(f"{out} is a folder; name the report's file with --out FILE.html")
    runs = read_runs(folders)
    html = render(runs, measure_decoding(runs) if speed else None)
    with atomic_write(out) as file:
        file.write(html.encode("utf-8", "replace"))
    return out
