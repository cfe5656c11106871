"""Several processes that share a model (FSDP2), for real: what they learn, what they save, and what a death leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import terseformer
from runs import DENSE, MIXED, SEQ2SEQ, SPARSE, TERRAFORMER, make_recipe, tensors, train_losses
from terseformer import checkpoint
from terseformer.config import ConfigError, DenseHeadConfig, Recipe, TrainConfig
from terseformer.configfile import to_toml
from terseformer.training import train
from terseformer.training_log import METRICS, read_metrics

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FSDP = {"parallelism": "fsdp"}
TIED = replace(DENSE, head=DenseHeadConfig(tied=True))
ADAFACTOR = {"optimizer": "adafactor", "schedule": "rsqrt", "learning_rate": 0.1}


@contextmanager
def started(*command: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(f).parents[1]) for f in (terseformer.__file__,))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def run(recipe: Recipe, folder: Path, name: str, *flags: str) -> Path:
    """Trains in two processes; gives the run's folder."""
    (folder / f"{name}.toml").write_text(to_toml(recipe))
    command = (*TORCHRUN, "-m", "terseformer", "train", f"{name}.toml", "--out", name, *flags)
    with started(*command, cwd=folder) as process:
        out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert out.count(f"trained: {name}/step-") == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    return folder / name


def losses_and_validations(run: Path) -> list[float]:
    lines = read_metrics(run / METRICS)
    return train_losses(run) + [line["validation/loss"] for line in lines if "validation/loss" in line]


# What is learned, and what is saved.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [(TIED, {}), (SEQ2SEQ, ADAFACTOR), (replace(TERRAFORMER, reversible_encoder=True), {})],
    ids=["causal_lm", "seq2seq-adafactor", "terraformer"],
)
def test_sharded_training_is_that_of_one_process(model, optimizer, text, tmp_path):
    """And it goes on in one process from a sharded checkpoint, and sharded from one process's."""
    often = {"evaluate_every": 4, "checkpoint_every": 4, "keep_checkpoints": 9}
    recipe = make_recipe(text, model, gradient_accumulation_steps=2, **often, **optimizer)
    sharded = replace(recipe, train=replace(recipe.train, parallelism="fsdp"))
    one, two = tmp_path / "one", run(sharded, tmp_path, "two")
    train(recipe, one, quiet=True)
    expected = losses_and_validations(one)
    assert len(expected) == 10
    assert losses_and_validations(two) == pytest.approx(expected, abs=1e-5)
    for step in ("step-00000004", "step-00000008"):
        ours, theirs = tensors(two / step), tensors(one / step)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].shape == tensor.shape for name, tensor in theirs.items())

    train(recipe, tmp_path / "less", resume=two / "step-00000004", quiet=True)
    assert train_losses(tmp_path / "less") == pytest.approx(expected[4:8], abs=1e-5)
    more = run(sharded, tmp_path, "more", "--resume", "one/step-00000004")
    assert train_losses(more) == pytest.approx(expected[4:8], abs=1e-5)
    terseformer.load(more)
