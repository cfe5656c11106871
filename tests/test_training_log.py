"""What a training shows and keeps."""

from __future__ import annotations

import io
import re
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import SPARSE, make_recipe, write_text
from terseformer import __version__, training_log
from terseformer.config import TrainConfig
from terseformer.controller_stats import ControllerUse
from terseformer.evaluation import Evaluation
from terseformer.training import train
from terseformer.training_log import METRICS, Step, TrainingLog, duration, read_metrics

RESULT = Evaluation(2.5, 12.18, 1.25, 100, 288, 0.1, 1000.0)
USE = ControllerUse(entropy=1.5, share_used=0.75, dead_units=8, imbalance=1.25, tokens=100)


def make_step(number: int, loss: float = 3.0) -> Step:
    return Step(number, loss, 0.5, 1.5, tokens=100, seconds=0.2)


def logged_steps(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / METRICS) if "train/loss" in line]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now[0])
    return now


def test_estimate_after_20_steps_without_a_terminal(clock, capsys):
    with TrainingLog(None, TrainConfig(steps=1000), 0, quiet=False) as log:
        for number in range(1, 41):
            clock[0] += 3
            log.step(make_step(number))
            assert capsys.readouterr().err == (
                "step 20/1000 · loss 3.000 · 500 tokens/s · 49 min left\n" if number == 20 else ""
            )
        clock[0] += 80  # validations and checkpoints take time too
        log.step(make_step(41))
        log.evaluation(41, RESULT, {"a": USE, "b": USE}, "some\n [text]")
        assert capsys.readouterr().err == (
            "step 41/1000 · loss 3.000 · 500 tokens/s · 78 min left · validation loss 2.5000 · 1.250 bits/byte"
            " · 75% of units used\n  some [text]\n"
        )


def test_estimate_counts_this_process_alone(clock, capsys):
    with TrainingLog(None, TrainConfig(steps=1000), 900, quiet=False) as log:
        for number in range(901, 921):
            clock[0] += 1
            log.step(make_step(number))
    assert capsys.readouterr().err == "step 920/1000 · loss 3.000 · 500 tokens/s · 80 s left\n"


def test_terminal_has_a_bar(clock, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(training_log, "Console", lambda **_: console)
    with TrainingLog(None, TrainConfig(steps=50), 0, quiet=False) as log:
        for number in range(1, 31):
            clock[0] += 1
            log.step(make_step(number))
        log.evaluation(30, RESULT, {}, "")
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"step 30/50 ━+ +loss 3.000 · 500 tokens/s · 20 s left", shown)
    assert "step 30/50 · validation loss 2.5000 · 1.250 bits/byte\n" in shown


def test_quiet(capfd):
    with TrainingLog(None, TrainConfig(steps=30), 0, quiet=True) as log:
        for number in range(1, 31):
            log.step(make_step(number))
        log.evaluation(30, RESULT, {}, "text")
    assert capfd.readouterr() == ("", "")


def test_points_are_means_since_the_last(tmp_path):
    with TrainingLog(tmp_path, TrainConfig(steps=5, log_every=2), 0, quiet=True) as log:
        for number in range(1, 6):
            log.step(make_step(number, loss=float(number)))
    points = [(line["step"], line["train/loss"], line["train/seconds"]) for line in logged_steps(tmp_path)]
    assert points == [(2, 1.5, pytest.approx(0.4)), (4, 3.5, pytest.approx(0.8)), (5, 5.0, pytest.approx(1.0))]


def test_the_machine_of_each_part(tmp_path, monkeypatch):
    config = TrainConfig(steps=6, log_every=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for start in (0, 0, 4, 4):  # begun anew and resumed twice
        with TrainingLog(tmp_path, config, start, quiet=True) as log:
            for number in range(start + 1, 7):
                log.step(make_step(number))
    lines = [line for line in read_metrics(tmp_path / METRICS) if "machine" in line]
    assert [line["step"] for line in lines] == [1, 5]
    machine = lines[0]["machine"]
    assert datetime.fromisoformat(machine["date"]).tzinfo == timezone.utc
    assert machine["processes"] == 2
    assert machine["threads"] == torch.get_num_threads()
    assert machine["version"] == __version__
    assert machine["processor"]


def test_resumed_curves_go_on_where_they_were(tmp_path):
    config = TrainConfig(steps=6, log_every=1)
    with TrainingLog(tmp_path, config, 0, quiet=True) as log:
        for number in range(1, 5):
            log.step(make_step(number, loss=10.0))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "train/lo')  # the process was killed
    with TrainingLog(tmp_path, config, 2, quiet=True) as log:
        log.step(make_step(3, loss=20.0))
    lines = logged_steps(tmp_path)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 10.0), (2, 10.0), (3, 20.0)]
    assert lines[-1]["train/seconds"] == pytest.approx(0.6)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 10.0), (2, 10.0), (3, 20.0)]


def test_a_run_keeps_curves_statistics_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    train(make_recipe(write_text(tmp_path / "text.jsonl"), SPARSE, evaluate_every=4), run, quiet=True)
    keys = {
        *(f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")),
        *(f"validation/{name}" for name in ("loss", "perplexity", "bits_per_byte")),
        *(
            f"controller/blocks.{layer}.feed_forward/{name}"
            for layer in (0, 1)
            for name in ("entropy_bits", "share_used", "dead_units", "imbalance")
        ),
    }
    lines = read_metrics(run / METRICS)
    assert set().union(*lines) == keys | {"step", "machine", "sample"}
    validations = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert all(line["sample"] for line in validations)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == keys
    assert board.Tags()["tensors"] == ["sample/text_summary"]
    for key in keys:
        kept = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line]
        assert [(event.step, event.value) for event in board.Scalars(key)] == kept


def test_duration():
    assert [duration(s) for s in (0.2, 89.5, 90.0, 3000.0, 5399.0, 5401.0, 12000.0)] == [
        *("1 s", "90 s", "2 min", "50 min", "1 h 30 min", "1 h 30 min", "3 h 20 min")
    ]


def test_read_metrics(tmp_path):
    path: Path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
