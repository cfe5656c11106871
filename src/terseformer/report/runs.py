"""What a run has left: its model, its recipe, and the log of its training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terseformer.checkpoint import load_recipe
from terseformer.config import Recipe
from terseformer.errors import UserError
from terseformer.folder import find, folder_of, load_config
from terseformer.layout import AnyConfig
from terseformer.training_log import METRICS, read_metrics

Points = list[tuple[int, float]]
"""Steps and values."""


class ReportError(UserError):
    """A report that cannot be made: the message says why, and what to do."""


@dataclass(frozen=True)
class Run:
    """A run as a report sees it."""

    name: str
    checkpoint: Path
    """Its newest one."""
    config: AnyConfig
    recipe: Recipe | None
    """None where the checkpoint was made without a training."""
    log: list[dict[str, Any]]
    """The lines of its `metrics.jsonl`; none where there is no such file."""

    def curve(self, key: str) -> Points:
        """The points of a curve, such as `train/loss`."""
        return [(line["step"], float(line[key])) for line in self.log if key in line]

    def last(self, key: str) -> float | None:
        """The last value of a curve."""
        points = self.curve(key)
        return points[-1][1] if points else None

    def samples(self) -> list[tuple[int, str]]:
        """The steps of the validations, and what the model wrote."""
        return [(line["step"], line["sample"]) for line in self.log if "sample" in line]

    def machines(self) -> list[dict[str, Any]]:
        """What computed the run, as it began and each time that it was resumed."""
        return [line["machine"] for line in self.log if "machine" in line]

    def controlled_layers(self) -> list[str]:
        """The names of the layers whose controllers were watched."""
        keys = (key.split("/") for line in self.log for key in line if key.startswith("controller/"))
        return list(dict.fromkeys(layer for _, layer, _ in keys))

    def step_seconds(self) -> float | None:
        """The time of a training step: the median over the points of the log."""
        seconds = self.curve("train/seconds")
        pairs = zip([(0, 0.0), *seconds], seconds, strict=False)
        times = [(late - early) / (step - before) for (before, early), (step, late) in pairs if step > before]
        return statistics.median(times) if times else None

    def is_done(self) -> bool:
        """Whether its last validation was the one that ends a training, on the whole validation text."""
        points = self.curve("validation/loss")
        return bool(points and self.recipe and points[-1][0] == self.recipe.train.steps)

    def validated_on(self) -> Any:
        """What two runs must have in common for their validation losses to be compared."""
        if self.recipe is None:
            return None
        train = self.recipe.train
        num_sequences = 0 if self.is_done() else train.evaluate_sequences
        return self.recipe.data, train.objective, train.sequence_length, num_sequences


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs' or checkpoints' folders, which are named by their last part where these differ.

    Raises:
        ReportError: one is named twice, or the log of one cannot be read.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ReportError("a run is named twice; name each once")
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    path = find(folder)
    run, last = path.resolve().parent, path.resolve().name
    has_recipe = (path / "training" / "recipe.toml").is_file()
    log = _read_log(run / METRICS) if has_recipe and (run / METRICS).is_file() else []
    if path == folder:  # a checkpoint, perhaps not the run's newest
        log = [line for line in log if folder_of(run, line["step"]).name <= last]
    return Run(name, path, load_config(path), load_recipe(path) if has_recipe else None, log)


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_metrics(path)
    except ValueError as error:  # not UTF-8
        raise ReportError(f"{path} cannot be read: {error}; move it away for a report without curves") from None
    for number, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and "step" in line and all(_is_valid(*item) for item in line.items())):
            raise ReportError(
                f"{path}, line {number}: not what a training writes; move the file away for a report without curves"
            )
    return lines


def _is_valid(key: str, value: Any) -> bool:
    match key:
        case "step":
            return isinstance(value, int)
        case "sample":
            return isinstance(value, str)
        case "machine":
            return isinstance(value, dict)
        case _:
            return isinstance(value, int | float) and (not key.startswith("controller/") or key.count("/") == 2)
