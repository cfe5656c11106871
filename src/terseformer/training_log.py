"""What a training shows and keeps: progress bar, curves (JSON lines and TensorBoard) and samples."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from terseformer import __version__
from terseformer.config import TrainConfig
from terseformer.controller_stats import ControllerUse
from terseformer.data.files import atomic_write
from terseformer.evaluation import Evaluation
from terseformer.machine import commit, processor

METRICS = "metrics.jsonl"
_STEPS_TO_ESTIMATE = 20


@dataclass(frozen=True)
class Step:
    """What one step did."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean training loss over all processes, nats per token."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the step, over all processes."""
    seconds: float


class TrainingLog:
    """Curves in `run/metrics.jsonl` and `run/tensorboard`, progress on the terminal, while its block runs.

    Args:
        run: the run's folder; None keeps nothing.
        config: the training.
        start: steps that are done; later points of an earlier run are dropped.
        quiet: nothing on the terminal.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, run: Path | None, config: TrainConfig, start: int, quiet: bool) -> None:
        self._run, self._config, self._start = run, config, start
        self._console = Console(quiet=quiet, stderr=True, highlight=False, soft_wrap=True)
        self._recent: list[Step] = []
        self._seconds, self._status = 0.0, ""
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start, status="")

    def __enter__(self) -> TrainingLog:
        """Opens the files and takes up the curves of an earlier run where it is resumed."""
        self._file = self._board = None
        if self._run is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = self._run / METRICS
            kept = [line for line in read_metrics(path) if line["step"] <= self._start] if path.exists() else []
            self._seconds = max((line.get("train/seconds", 0.0) for line in kept), default=0.0)
            with atomic_write(path) as file:
                file.writelines(_json_line(line).encode("utf-8") for line in kept)
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._file.write(_json_line({"step": self._start + 1, "machine": _machine()}))
            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._start + 1)
        self._began = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        with contextlib.suppress(OSError):  # a full disk has been told of
            for file in (self._file, self._board):
                if file is not None:
                    file.close()

    def note(self, text: str) -> None:
        """Shows a line."""
        self._console.print(text, markup=False)

    def step(self, step: Step) -> None:
        """Notes a step."""
        self._recent.append(step)
        self._seconds += step.seconds
        done = step.step - self._start
        tokens_per_second = sum(s.tokens for s in self._recent) / sum(s.seconds for s in self._recent)
        self._status = f"loss {step.loss:.3f} · {tokens_per_second:,.0f} tokens/s"
        if done >= _STEPS_TO_ESTIMATE and step.step < self._config.steps:
            left = (self._config.steps - step.step) * (time.perf_counter() - self._began) / done
            self._status += f" · {duration(left)} left"
        self._progress.update(self._task, completed=step.step, status=self._status)
        if done == _STEPS_TO_ESTIMATE and not self._console.is_terminal:
            self._console.print(f"step {step.step}/{self._config.steps} · {self._status}")
        if step.step % self._config.log_every == 0 or step.step == self._config.steps:
            self._keep(
                step.step,
                {
                    "train/loss": sum(s.loss for s in self._recent) / len(self._recent),
                    "train/learning_rate": step.learning_rate,
                    "train/grad_norm": step.grad_norm,
                    "train/tokens_per_second": tokens_per_second,
                    "train/seconds": self._seconds,
                },
            )
            self._recent = []

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
        status = "" if self._console.is_terminal else f" · {self._status}"
        self._console.print(f"step {step}/{self._config.steps}{status} · validation loss {result.loss:.4f}{bits}{used}")
        self._console.print(f"  {' '.join(sample.split())}", style="dim", markup=False)

    def _keep(self, step: int, values: Mapping[str, float], sample: str | None = None) -> None:
        if self._file is None or self._board is None:
            return
        line: dict[str, Any] = {"step": step, **values}
        if sample is not None:
            line["sample"] = sample
            self._board.add_text("sample", sample, step)
        self._file.write(_json_line(line))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def _machine() -> dict[str, Any]:
    """What computes the steps that follow."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # of torchrun
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
        "commit": commit(),
    }


def _json_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The points of a run's curves, its samples, and from which step on which machine computed it.

    A last line that was cut short is left out.
    """
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
