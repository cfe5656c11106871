"""Several processes that share a model (FSDP2), for real: what they learn, what they save, and what a death leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import terseformer
from runs import DENSE, SEQ2SEQ, SPARSE, TERRAFORMER, make_recipe, tensors, train_losses
from terseformer import checkpoint
from terseformer.config import ConfigError, DenseHeadConfig, Recipe, TrainConfig
from terseformer.configfile import to_toml
from terseformer.training import train
from terseformer.training_log import METRICS, read_metrics
from variants import DISTINCT, DISTINCT_ENCODER_DECODERS

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WITHOUT_NOISE = replace(SPARSE.feed_forward, quant_prob=1.0, temperature=0.0)
REVERSIBLE = replace(TERRAFORMER, reversible_encoder=True, head=DenseHeadConfig(tied=True), feed_forward=WITHOUT_NOISE)
ADAFACTOR = {"optimizer": "adafactor", "schedule": "rsqrt", "learning_rate": 0.1}


@contextmanager
def started(*command: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, Path(terseformer.__file__).parents[1])))},
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
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert out.count(f"trained: {name}/step-") == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    return folder / name


def losses_and_validations(run: Path) -> list[float]:
    lines = read_metrics(run / METRICS)
    return train_losses(run) + [line["validation/loss"] for line in lines if "validation/loss" in line]


def controllers(run: Path) -> dict[str, float]:
    """What they did in the last validation."""
    last = next(line for line in reversed(read_metrics(run / METRICS)) if "validation/loss" in line)
    return {name: value for name, value in last.items() if name.startswith("controller/")}


# What is learned, and what is saved.


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [(SEQ2SEQ, ADAFACTOR), (REVERSIBLE, {})],
    ids=["seq2seq-adafactor", "terraformer"],
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
    assert controllers(two) == pytest.approx(controllers(one), abs=1e-3)
    assert bool(controllers(two)) == (model is REVERSIBLE)
    for step in ("step-00000004", "step-00000008"):
        ours, theirs = tensors(two / step), tensors(one / step)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].shape == tensor.shape for name, tensor in theirs.items())

    train(recipe, tmp_path / "less", resume=two / "step-00000004", quiet=True)
    assert train_losses(tmp_path / "less") == pytest.approx(expected[4:8], abs=1e-5)
    if optimizer:
        more = run(sharded, tmp_path, "more", "--resume", "one/step-00000004")
        assert train_losses(more) == pytest.approx(expected[4:8], abs=1e-5)


@pytest.mark.slow
def test_units_that_are_sharded_have_the_gradients_of_whole_ones(tmp_path):
    """Also where a process leaves a part of the model out, and where a layer is computed again backward."""
    names = [*DISTINCT, *DISTINCT_ENCODER_DECODERS, "head-tied", "head-mixed", "seq2seq-chunked", "terraformer-chunked"]
    with started(*TORCHRUN, str(TESTS / "sharded.py"), *names, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert out.split() == names


# Death.


def kill_a_worker(rank: int, in_a_save: bool, folder: Path, *flags: str) -> None:
    """Trains until there is a checkpoint that is new, and kills one of the two processes; the other one says so."""
    run, before = folder / "run", checkpoint.checkpoints(folder / "run")
    command = (*TORCHRUN, "-m", "terseformer", "train", "mine.toml", "--quiet", "--out", "run", *flags)
    with started(*command, cwd=folder) as process:
        while checkpoint.checkpoints(run)[-1:] <= before[-1:] or (in_a_save and not (run / ".saving").exists()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children()
        next(worker for worker in workers if worker.environ()["RANK"] == str(rank)).kill()
        _, err = process.communicate(timeout=250)
    assert process.returncode not in (0, None)
    last = checkpoint.find(run)
    assert f"another process has ended or cannot be reached; the last good checkpoint is run/{last.name};" in err
    assert "terseformer/cli/" not in err  # a traceback's
    assert checkpoint.load_training(last).step < 60


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_workers(text, tmp_path):
    """`kill -9` of one process in a step, then of the one that writes, in a checkpoint: what was saved is whole."""
    recipe = make_recipe(text, DENSE, steps=60, checkpoint_every=1, parallelism="fsdp", learning_rate=1e-3)
    (tmp_path / "mine.toml").write_text(to_toml(recipe))
    folder = tmp_path / "run"
    kill_a_worker(1, False, tmp_path)
    kill_a_worker(0, True, tmp_path, "--resume")
    train(recipe, folder, resume=folder, quiet=True)
    assert not (folder / ".saving").exists()
    train(recipe, tmp_path / "undisturbed", quiet=True)
    assert train_losses(folder) == pytest.approx(train_losses(tmp_path / "undisturbed"), abs=1e-5)


# What is refused.


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match="train.compile = true does not go with train.parallelism = 'fsdp'"):
        TrainConfig(compile=True, parallelism="fsdp")


def test_in_one_process_there_is_nothing_to_share(text, tmp_path):
    losses = []
    for parallelism in ("ddp", "fsdp"):
        train(make_recipe(text, parallelism=parallelism), tmp_path / parallelism, quiet=True)
        losses.append(train_losses(tmp_path / parallelism))
    assert losses[0] == losses[1]
