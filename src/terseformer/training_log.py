"""What a training shows and keeps: progress bar, curves (JSON lines and TensorBoard) and samples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from terseformer.config import Recipe
from terseformer.controller_stats import ControllerUse
from terseformer.evaluate import Evaluation

if TYPE_CHECKING:
    from terseformer.train import Step

METRICS = "metrics.jsonl"
_STEPS_TO_ESTIMATE = 20


class TrainingLog:
    """Curves in `run/metrics.jsonl` and `run/tensorboard`, progress on the terminal.

    Args:
        run: the run's folder; None keeps nothing.
        recipe: what is trained.
        start: steps that are done; later points of an earlier run are dropped.
        quiet: nothing on the terminal.
    """

    def __init__(self, run: Path | None, recipe: Recipe, start: int, quiet: bool) -> None:
        self._run, self._config, self._start = run, recipe.train, start
        self._console = Console(quiet=quiet, stderr=True)
        self._seconds, self._tokens = 0.0, 0
        self._recent: list[Step] = []
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=recipe.train.steps, completed=start, status="")
        self._began = time.time()

    def __enter__(self) -> TrainingLog:
        self._file = self._board = None
        if self._run is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._run.mkdir(parents=True, exist_ok=True)
            path = self._run / METRICS
            kept = [line for line in read_metrics(path) if line["step"] <= self._start] if path.exists() else []
            self._file = path.open("w", encoding="utf-8", buffering=1)
            for line in kept:
                self._file.write(json.dumps(line) + "\n")
            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._start + 1)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, step: Step) -> None:
        """Notes a step."""
        self._seconds += step.seconds
        self._tokens += step.tokens
        self._recent.append(step)
        done = step.step - self._start
        left = (self._config.steps - step.step) * self._seconds / done
        status = f"loss {step.loss:.3f} · {self._tokens / self._seconds:,.0f} tokens/s"
        if done >= _STEPS_TO_ESTIMATE:
            status += f" · {duration(left)} left"
        self._progress.update(self._task, completed=step.step, status=status)
        if done == _STEPS_TO_ESTIMATE and not self._console.is_terminal:
            self._console.print(f"step {step.step}/{self._config.steps} · {status}", highlight=False)
        if step.step % self._config.log_every == 0 or step.step == self._config.steps:
            recent, self._recent = self._recent, []
            seconds = sum(s.seconds for s in recent)
            self._keep(
                step.step,
                {
                    "train/loss": sum(s.loss for s in recent) / len(recent),
                    "train/learning_rate": step.learning_rate,
                    "train/grad_norm": step.grad_norm,
                    "train/tokens_per_second": sum(s.tokens for s in recent) / seconds,
                    "train/seconds": self._seconds,
                },
            )

    def evaluation(self, step: int, result: Evaluation, use: Mapping[str, ControllerUse], sample: str) -> None:
        """Notes a validation, what the controllers did in it, and a sample of text."""
        values = {"validation/loss": result.loss, "validation/perplexity": result.perplexity}
        if result.bits_per_byte is not None:
            values["validation/bits_per_byte"] = result.bits_per_byte
        for name, one in use.items():
            values |= {
                f"controller/{name}/entropy_bits": one.entropy,
                f"controller/{name}/share_used": one.share_used,
                f"controller/{name}/dead_units": one.dead_units,
                f"controller/{name}/imbalance": one.imbalance,
            }
        self._keep(step, values, sample)
        bits = "" if result.bits_per_byte is None else f" · {result.bits_per_byte:.3f} bits/byte"
        used = "" if not use else f" · {sum(u.share_used for u in use.values()) / len(use):.0%} of units used"
        self._console.print(
            f"step {step}/{self._config.steps} · validation loss {result.loss:.4f}{bits}{used}", highlight=False
        )
        self._console.print(f"  {' '.join(sample.split())}", style="dim", markup=False, highlight=False)

    def _keep(self, step: int, values: Mapping[str, float], sample: str | None = None) -> None:
        if self._file is None or self._board is None:
            return
        line: dict[str, Any] = {"step": step, **values}
        if sample is not None:
            line["sample"] = sample
            self._board.add_text("sample", sample, step)
        self._file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The points of a run's curves; a last line that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def duration(seconds: float) -> str:
    """A time span for people: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
