"""Training: resumed equals uninterrupted, to the bit; and what ends a training, for real."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from runs import (
    DENSE,
    MIXED,
    PAIRS,
    PAIRS_FILE,
    SEQ2SEQ,
    SPANS,
    SPARSE,
    SPARSE_SEQ2SEQ,
    SPARSE_TERRAFORMER,
    TERRAFORMER,
    make_recipe,
    tensors,
    train_losses,
)
from terseformer import checkpoint, data
from terseformer.checkpoint import CheckpointError
from terseformer.config import (
    BlockFeedForwardConfig,
    ConfigError,
    DenseHeadConfig,
    Recipe,
    SRUConfig,
    SwitchFeedForwardConfig,
)
from terseformer.configfile import to_toml
from terseformer.data import DataError
from terseformer.evaluation import evaluate
from terseformer.training import Interrupted, Trainer, TrainingError, make_accelerator, train
from terseformer.training_log import METRICS, Step, TrainingLog, read_metrics


def make_trainer(recipe: Recipe, run: Path) -> Trainer:
    trainer = Trainer(recipe, run, data.prepare_in_cache(recipe.data), make_accelerator(recipe))
    trainer.start()
    return trainer


def at_step(number: int, action: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Does something once that step is done."""
    original = TrainingLog.step

    def step(log: TrainingLog, step: Step) -> None:
        original(log, step)
        if step.step == number:
            action()

    patch.setattr(TrainingLog, "step", step)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# Resuming.

ENCODER_DECODER_RUNS = [
    f"{model}-{objective}" for model in ("seq2seq", "terraformer") for objective in ("pairs", "spans")
]
TIED = replace(SPARSE, head=DenseHeadConfig(tied=True), sru=SRUConfig(num_layers=1, size=8))


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (SPARSE, {}),
        (SPARSE, {"optimizer": "adafactor", "schedule": "rsqrt", "learning_rate": 0.1}),
        (MIXED, {"gradient_accumulation_steps": 2, "final_quant_prob": 1.0}),
        (SPARSE, {"precision": "bf16"}),
        (TIED, {"optimizer": "adafactor", "precision": "bf16", "gradient_accumulation_steps": 4}),
        (SPARSE_SEQ2SEQ, {"objective": PAIRS, "gradient_accumulation_steps": 2}),
        (SPARSE_SEQ2SEQ, {"objective": SPANS, "precision": "bf16"}),
        (SPARSE_TERRAFORMER, {"objective": PAIRS, "precision": "bf16", "final_quant_prob": 1.0}),
        (SPARSE_TERRAFORMER, {"objective": SPANS, "optimizer": "adafactor", "gradient_accumulation_steps": 2}),
    ],
    ids=["adamw", "adafactor", "mixed", "bf16", "tied", *ENCODER_DECODER_RUNS],
)
def test_resumed_equals_uninterrupted_to_the_bit(model, config, text, tmp_path, monkeypatch):
    recipe = make_recipe(text, model, **config)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(5, interrupt, patch)
        with pytest.raises(Interrupted) as stop:
            train(recipe, run, quiet=True)
    assert stop.value.checkpoint == run / "step-00000005"
    assert str(stop.value.checkpoint) in str(stop.value)
    resumed = train(recipe, run, resume=run, quiet=True)
    assert resumed == run / "step-00000008"
    assert len(train_losses(run)) == 8
    assert train_losses(run) == train_losses(tmp_path / "whole")
    assert read_metrics(run / METRICS)[-1]["sample"] == read_metrics(tmp_path / "whole" / METRICS)[-1]["sample"]
    expected, reached = tensors(whole), tensors(resumed)
    assert expected.keys() == reached.keys()
    assert all(torch.equal(expected[name], reached[name]) for name in expected)


def test_different_seeds_differ(text, tmp_path):
    runs = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        train(make_recipe(text, steps=2, seed=seed), run, quiet=True)
    assert train_losses(runs[0]) != train_losses(runs[1])


def test_finished_run_has_nothing_left_to_do(text, tmp_path):
    recipe = make_recipe(text, steps=2)
    last = train(recipe, tmp_path / "run", quiet=True)
    before = (last / "training" / "state.json").stat().st_mtime_ns
    assert train(recipe, tmp_path / "run", resume=last, quiet=True) == last
    assert (last / "training" / "state.json").stat().st_mtime_ns == before
    assert len(train_losses(tmp_path / "run")) == 2


def test_resume_from_an_earlier_checkpoint_and_into_another_folder(text, tmp_path):
    recipe = make_recipe(text, steps=6, checkpoint_every=2, keep_checkpoints=9)
    run, other = tmp_path / "run", tmp_path / "other"
    whole = tensors(train(recipe, run, quiet=True))
    losses = train_losses(run)
    train(recipe, other, resume=run / "step-00000002", quiet=True)
    assert train_losses(other) == losses[2:]
    (run / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"the checkpoint before it is {run / 'step-00000004'}"):
        train(recipe, run, resume=run, quiet=True)
    again = train(recipe, run, resume=run / "step-00000004", quiet=True)
    assert train_losses(run) == losses
    assert all(torch.equal(whole[name], value) for name, value in tensors(again).items())


def test_folder_with_checkpoints_is_not_overwritten(text, tmp_path):
    recipe = make_recipe(text, steps=1)
    one, other = (train(recipe, tmp_path / name, quiet=True) for name in ("one", "other"))
    for resume in (None, other):
        with pytest.raises(ConfigError, match="holds checkpoints already; go on with --resume, or .* --out"):
            train(recipe, tmp_path / "one", resume=resume, quiet=True)
    assert one.exists()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        train(recipe, tmp_path / "new", resume=tmp_path / "new", quiet=True)


def test_another_recipe_cannot_resume(text, tmp_path):
    train(make_recipe(text, steps=1), tmp_path, quiet=True)
    with pytest.raises(CheckpointError, match=r"train.batch_size = 8, but .*step-00000001 was trained with 4"):
        train(make_recipe(text, steps=1, batch_size=8), tmp_path, resume=tmp_path, quiet=True)


# The loop.


encoder_decoders = pytest.mark.parametrize(
    ("model", "objective"),
    [(SEQ2SEQ, PAIRS), (SEQ2SEQ, SPANS), (TERRAFORMER, PAIRS), (TERRAFORMER, SPANS)],
    ids=ENCODER_DECODER_RUNS,
)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (DENSE, {}),
        (SEQ2SEQ, {"objective": PAIRS}),
        (TERRAFORMER, {"objective": PAIRS}),
        (SEQ2SEQ, {"objective": SPANS}),
    ],
    ids=["causal_lm", "seq2seq", "terraformer", "spans"],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(model, config, text, tmp_path):
    for parts in (1, 4):
        recipe = make_recipe(text, model, gradient_accumulation_steps=parts, **config)
        train(recipe, tmp_path / str(parts), quiet=True)
    assert train_losses(tmp_path / "4") == pytest.approx(train_losses(tmp_path / "1"), rel=1e-5)
    norms = [[line.get("train/grad_norm", 0.0) for line in read_metrics(tmp_path / n / METRICS)] for n in ("1", "4")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_it_is_plain_training(text, tmp_path):
    """Against the same steps, written out."""
    recipe = make_recipe(text, DENSE, schedule="constant", warmup_steps=0, max_grad_norm=0.1, steps=5)
    train(recipe, tmp_path, quiet=True)
    prepared = data.prepare_in_cache(recipe.data)
    model = make_trainer(recipe, tmp_path / "fresh").model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.add_param_group({"params": [], "weight_decay": 0.0})
    matrices, vectors = optimizer.param_groups
    vectors["params"] = [p for p in matrices["params"] if p.dim() < 2]
    matrices["params"] = [p for p in matrices["params"] if p.dim() >= 2]
    losses = []
    for step in range(5):
        windows = torch.tensor(
            data.batch(prepared.train.tokens, seed=0, step=step, batch_size=4, sequence_length=12), dtype=torch.long
        )
        loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert train_losses(tmp_path) == pytest.approx(losses, rel=1e-5)


@encoder_decoders
def test_it_is_plain_training_of_an_encoder_decoder(model, objective, text, tmp_path):
    """Against the same steps, written out: the mean over all real targets."""
    recipe = make_recipe(
        text, model, objective=objective, schedule="constant", warmup_steps=0, max_grad_norm=0.0, steps=4
    )
    train(recipe, tmp_path, quiet=True)
    trainer = make_trainer(recipe, tmp_path / "fresh")
    model, losses = trainer.model, []
    for step in range(4):
        ((source, num_source, target, num_target),) = trainer.objective.parts(step, 0, 1)
        logits = [
            model(s[None, :n], t[None, :m])[0]
            for s, n, t, m in zip(source, num_source, target, num_target, strict=True)
        ]
        wanted = [t[1 : m + 1] for t, m in zip(target, num_target, strict=True)]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(wanted))
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        losses.append(loss.item())
    assert train_losses(tmp_path) == pytest.approx(losses, rel=1e-4)


def test_kept_activations_change_nothing_but_memory(text, tmp_path):
    """With dropout and sampled controllers: the losses are the same, and autograd holds more."""
    held = {}
    for keeps in (False, True):
        recipe = make_recipe(text, SPARSE_TERRAFORMER, keep_activations=keeps)
        train(recipe, tmp_path / str(keeps), quiet=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: (to.append(x.numel()), x)[1], lambda x: x):
            trainer = make_trainer(recipe, tmp_path / f"{keeps}-fresh")
            trainer.model(torch.ones(1, 12, dtype=torch.long), torch.ones(1, 12, dtype=torch.long))
        held[keeps] = sum(sizes)
    assert train_losses(tmp_path / "True") == pytest.approx(train_losses(tmp_path / "False"), rel=1e-5)
    assert held[False] < held[True] / 2


def test_evaluation_does_not_disturb_training(text, tmp_path):
    for every in (0, 2):
        train(make_recipe(text, evaluate_every=every), tmp_path / str(every), quiet=True)
    assert train_losses(tmp_path / "2") == train_losses(tmp_path / "0")
    evaluated = [line["step"] for line in read_metrics(tmp_path / "2" / METRICS) if "validation/loss" in line]
    assert evaluated == [2, 4, 6, 8]


def test_last_validation_takes_all(text, tmp_path):
    recipe = make_recipe(text, steps=2, evaluate_every=1)
    path = train(recipe, tmp_path, quiet=True)
    first, last = (line for line in read_metrics(tmp_path / METRICS) if "validation/loss" in line)
    prepared = data.prepare_in_cache(recipe.data)
    assert last["validation/loss"] == evaluate(checkpoint.load(path), prepared.validation, 12).loss
    assert first["validation/loss"] != last["validation/loss"]


def test_learning_rate_reaches_the_optimiser(text, tmp_path):
    trainer = make_trainer(make_recipe(text, schedule="constant", warmup_steps=2, learning_rate=0.5), tmp_path)
    for expected in (0.25, 0.5, 0.5):
        assert trainer.advance().learning_rate == expected
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {expected}


@pytest.mark.parametrize(
    ("feed_forward", "moves"),
    [
        (SPARSE.feed_forward, True),
        (BlockFeedForwardConfig(intermediate_size=32, num_experts=4), True),
        (SwitchFeedForwardConfig(intermediate_size=32, num_experts=4), False),
    ],
)
def test_quant_prob_moves_linearly(feed_forward, moves, text, tmp_path):
    recipe = make_recipe(text, replace(SPARSE, feed_forward=feed_forward), steps=5, final_quant_prob=0.9)
    trainer = make_trainer(recipe, tmp_path)
    for expected in (0.5, 0.6, 0.7, 0.8, 0.9):
        trainer.advance()
        used = [block.feed_forward.quant_prob for block in trainer.model.blocks]
        assert used == pytest.approx([expected if moves else 1.0] * 2)


@pytest.mark.parametrize("model", [DENSE, SEQ2SEQ, TERRAFORMER], ids=lambda model: model.kind)
def test_bf16_keeps_weights_and_state_in_fp32(model, text, tmp_path):
    recipe = make_recipe(text, model, evaluate_every=1, steps=2)
    path = train(replace(recipe, train=replace(recipe.train, precision="bf16")), tmp_path / "bf16", quiet=True)
    train(recipe, tmp_path / "fp32", quiet=True)
    assert {value.dtype for value in tensors(path).values()} == {torch.float32}
    low, high = train_losses(tmp_path / "bf16"), train_losses(tmp_path / "fp32")
    assert low != high
    assert low == pytest.approx(high, rel=1e-2)


def write_copies(path: Path) -> Path:
    """One to three words, to be written again."""
    words, draw = ["ab", "cd", "ef", "gh", "ij"], random.Random(0)
    texts = {" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(400)}
    path.write_text("".join(json.dumps({"text": text, "title": text}) + "\n" for text in sorted(texts)))
    return path


@pytest.mark.parametrize(
    "model", [SEQ2SEQ, replace(TERRAFORMER, pad_token_id=299)], ids=["seq2seq", "terraformer-other_padding"]
)
def test_copying_is_learned(model, tmp_path, monkeypatch):
    """Texts of the validation, which training never saw; `sample` writes the first of them."""
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    write_copies(tmp_path / PAIRS_FILE)
    model = replace(model, hidden_size=32, num_decoder_layers=1)
    recipe = make_recipe(tmp_path / "text", model, steps=150, batch_size=16, learning_rate=8e-3, warmup_steps=20)
    recipe = replace(recipe, data=replace(recipe.data, vocab_size=270))
    trainer = make_trainer(recipe, tmp_path)
    before, _ = trainer.evaluate(0)
    for _ in range(recipe.train.steps):
        trainer.advance()
    after, _ = trainer.evaluate(0)
    assert before.loss > 4
    assert after.loss < 0.3
    assert trainer.sample() == trainer.objective.prompt()


# Beginning from a checkpoint.


@pytest.mark.parametrize("model", [SPARSE, SPARSE_SEQ2SEQ, SPARSE_TERRAFORMER], ids=lambda model: model.kind)
def test_weights_and_tokenizer_of_an_initial_checkpoint(model, text, tmp_path):
    """As pre-training by span corruption goes before the pairs."""
    objective = {} if model is SPARSE else {"objective": SPANS}
    first = train(make_recipe(text, model, steps=3, **objective), tmp_path / "first", quiet=True)
    recipe = make_recipe(text, model, initial_checkpoint=str(tmp_path / "first"), learning_rate=1e-30, steps=2)
    other = train(recipe, tmp_path / "other", quiet=True)
    before, after = (load_file(path / "model.safetensors") for path in (first, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizers = [data.fingerprint(data.load_tokenizer(path)) for path in (first, other)]
    assert tokenizers[0] == tokenizers[1]
    if model is not SPARSE:
        assert data.load_tokenizer(other).token_to_id("<extra_id_0>") == 1
    # Steps are counted anew, and the run goes on like any other.
    assert checkpoint.load_training(other).step == 2
    assert checkpoint.load_recipe(other).data.tokenizer == str(first / "tokenizer.json")
    assert train(recipe, tmp_path / "other", resume=other, quiet=True) == other


def test_an_initial_checkpoint_is_resumed_to_the_bit(text, tmp_path, monkeypatch):
    """Its weights are not taken again: it may be gone."""
    first = train(make_recipe(text, SEQ2SEQ, objective=SPANS, steps=3), tmp_path / "first", quiet=True)
    recipe = make_recipe(text, SEQ2SEQ, initial_checkpoint=str(first), steps=4)
    whole = tensors(train(recipe, tmp_path / "whole", quiet=True))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(2, interrupt, patch)
        with pytest.raises(Interrupted):
            train(recipe, run, quiet=True)
    checkpoint.remove(first)
    resumed = tensors(train(recipe, run, resume=run, quiet=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 32}, CheckpointError, r"embedding.weight has shape \[300, 16\] instead of \[300, 32\]"),
        ({"num_decoder_layers": 3}, CheckpointError, r"blocks\.2\..* is missing"),
        ({}, ConfigError, "has another tokenizer than the text; leave data.tokenizer empty"),
        (None, CheckpointError, "no checkpoint at .*absent: it is no folder; give a checkpoint's or a run's folder"),
        ("terraformer", CheckpointError, "holds a model of kind 'seq2seq', the recipe's is 'terraformer'"),
    ],
    ids=["width", "depth", "tokenizer", "absent", "kind"],
)
def test_initial_checkpoints_that_do_not_fit(changes, error, message, text, tmp_path):
    first = train(make_recipe(text, SEQ2SEQ, steps=1), tmp_path / "first", quiet=True)
    if changes is None:
        recipe = make_recipe(text, SEQ2SEQ, initial_checkpoint=str(tmp_path / "absent"))
    elif changes == "terraformer":
        recipe = make_recipe(text, TERRAFORMER, initial_checkpoint=str(first))
    else:
        recipe = make_recipe(text, replace(SEQ2SEQ, **changes), initial_checkpoint=str(first))
    if changes == {}:
        data.train_tokenizer(["another text"], 280).save(str(tmp_path / "tokenizer.json"))
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(error, match=message) as found:
        train(recipe, tmp_path / "run", quiet=True)
    if changes:
        assert "train.initial_checkpoint" in str(found.value)
        assert "config.json" not in str(found.value)
    assert not (tmp_path / "run").exists()


# What ends a training.


def poison_weight(trainer: Trainer) -> None:
    trainer.model.blocks[1].attention_norm.weight.data[3] = math.nan


def poison_layer(trainer: Trainer) -> None:
    trainer.model.blocks[1].feed_forward.register_forward_hook(lambda _, __, y: y / torch.zeros(()))


def poison_gradient(trainer: Trainer) -> None:
    trainer.model.blocks[1].feed_forward.bias.register_hook(lambda grad: grad * math.inf)


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        (poison_weight, "the weight blocks.1.attention_norm.weight"),
        (poison_layer, "the output of blocks.1.feed_forward"),
        (poison_gradient, "the gradient of blocks.1.feed_forward.bias"),
    ],
)
def test_not_finite(poison, where, text, tmp_path):
    trainer = make_trainer(make_recipe(text, gradient_accumulation_steps=2), tmp_path)
    trainer.advance()
    poison(trainer)
    with pytest.raises(TrainingError) as error:
        trainer.advance()
    for part in ("step 2: the loss is", f"not finite is in {where};", "there is no checkpoint yet"):
        assert part in str(error.value)
    assert trainer.step == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (SEQ2SEQ, "blocks.1.cross"),
        (SEQ2SEQ, "encoder_blocks.0"),
        (TERRAFORMER, "decoder.layers.1.attention"),
    ],
)
def test_not_finite_in_an_encoder_decoder(model, name, text, tmp_path):
    trainer = make_trainer(make_recipe(text, model), tmp_path)
    trainer.advance()
    layer = trainer.model.get_submodule(name)
    layer.register_forward_hook(lambda _, __, y: y / torch.zeros(()))
    with pytest.raises(TrainingError, match=f"the first value that is not finite is in the output of {name};"):
        trainer.advance()


def test_diverging(text, tmp_path):
    recipe = make_recipe(text, learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step 2: .* in the output of .*; lower train.learning_rate") as error:
        train(recipe, tmp_path, quiet=True)
    last = tmp_path / "step-00000001"
    assert f"the last good checkpoint is {last};" in str(error.value)
    checkpoint.load_training(last)


def test_full_disk_while_a_checkpoint_is_written(text, tmp_path, monkeypatch):
    recipe = make_recipe(text, checkpoint_every=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard)), monkeypatch)
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000008: .*File too large.*; the last good"):
            train(recipe, tmp_path, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, "step-00000004", "tensorboard"]
    monkeypatch.undo()


def test_full_disk_while_the_curves_are_written(text, tmp_path, monkeypatch):
    recipe = make_recipe(text, checkpoint_every=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        time.sleep(0.5)  # TensorBoard's thread writes what it has
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    at_step(6, fill, monkeypatch)
    try:
        with pytest.raises(TrainingError, match=r"step 7: the curves .*File too large.*step-00000004; mend"):
            train(recipe, tmp_path, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoint.load_training(tmp_path / "step-00000004")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"vocab_size": 280}}, ConfigError, "the tokenizer has 300 tokens, but model.vocab_size = 280"),
        (
            {"model": {"max_position_embeddings": 9999}, "train": {"sequence_length": 9000}},
            DataError,
            "a sequence needs",
        ),
        ({"train": {"sample_prompt": "!" * 40}}, ConfigError, "train.sample_prompt has 40 tokens"),
        ({"data": {"sources": ("nowhere.txt",)}}, DataError, "no file or folder 'nowhere.txt'"),
        ({"data": {"sources": ()}}, ConfigError, "data.sources is empty"),
    ],
)
def test_mistakes_are_told_before_the_first_step(changes, error, message, text, tmp_path):
    recipe = make_recipe(text, DENSE)
    for part, values in changes.items():
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), **values)})
    with pytest.raises(error, match=message):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_batch_must_divide_among_processes_and_parts(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match=r"train.batch_size = 4 cannot be divided among 3 processes and .* of 6"):
        make_trainer(make_recipe(text, gradient_accumulation_steps=2), tmp_path)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell's background jobs begin with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_second_signal_acts_at_once(text, tmp_path, monkeypatch):
    def twice() -> None:
        interrupt()
        interrupt()

    at_step(2, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(text), tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint.checkpoints(tmp_path) == []


def test_in_another_thread(text, tmp_path):
    recipe = make_recipe(text, steps=1)
    thread = threading.Thread(target=train, args=(recipe, tmp_path, None, True))
    thread.start()
    thread.join()
    assert checkpoint.find(tmp_path).name == "step-00000001"


# Real processes.


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(to_toml(recipe))
    return path


def start(*command: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_resumed_interrupted(text, tmp_path):
    """`kill -9` at whatever moment, `--resume`, Ctrl-C: the losses are those of a run that nothing befell."""
    recipe = make_recipe(text, steps=100_000, checkpoint_every=1)
    command = ("-m", "terseformer", "train", str(write_recipe(recipe, tmp_path / "mine.toml")), "--quiet")
    run = tmp_path / "runs" / "mine"
    process = start(*command, cwd=tmp_path)
    wait_for(lambda: len(checkpoint.checkpoints(run)) > 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survived = checkpoint.find(run)
    checkpoint.load_training(survived)

    process = start(*command, "--resume", cwd=tmp_path)
    wait_for(lambda: (last := checkpoint.checkpoints(run)) != [] and last[-1].name > survived.name, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    last = checkpoint.find(run)
    assert process.returncode == 130
    assert out == ""
    assert err == f"terse: interrupted; everything is saved in {last.relative_to(tmp_path)}; go on with --resume\n"
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []

    steps = checkpoint.load_training(last).step
    logged = [line["step"] for line in read_metrics(run / METRICS) if "train/loss" in line]
    assert logged == list(range(1, steps + 1))
    trainer = make_trainer(recipe, tmp_path / "undisturbed")
    assert train_losses(run) == [trainer.advance().loss for _ in range(steps)]
    assert all(
        torch.equal(parameter, saved)
        for parameter, saved in zip(trainer.model.parameters(), checkpoint.load(last).parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "model", [replace(DENSE, num_hidden_layers=1), replace(SEQ2SEQ, num_decoder_layers=1)], ids=lambda model: model.kind
)
def test_compiled(model, text, tmp_path):
    """In a process of its own: torch.compile does not know the tests' type checks."""
    without_noise = replace(SPARSE.feed_forward, quant_prob=1.0, temperature=0.0)
    model = replace(model, feed_forward=without_noise)
    recipe = make_recipe(text, model, compile=True, evaluate_every=4)
    path = write_recipe(recipe, tmp_path / "mine.toml")
    process = start("-m", "terseformer", "train", str(path), "--quiet", "--out", "compiled", cwd=tmp_path)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    train(replace(recipe, train=replace(recipe.train, compile=False)), tmp_path / "plain", quiet=True)
    assert train_losses(tmp_path / "compiled") == pytest.approx(train_losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [DENSE, MIXED, SEQ2SEQ, pytest.param(TERRAFORMER, marks=pytest.mark.slow)],
    ids=["dense", "mixed", "seq2seq", "terraformer"],
)
def test_two_processes(model, text, tmp_path):
    """Of pairs, each process and part has another number of targets."""
    recipe = make_recipe(text, model, gradient_accumulation_steps=2, evaluate_every=4)
    command = ("-m", "terseformer", "train", str(write_recipe(recipe, tmp_path / "mine.toml")))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, "--out", "two")
    process = start(*torchrun, cwd=tmp_path)
    try:
        out, err = process.communicate(timeout=250)
    finally:
        process.terminate()
    assert process.returncode == 0, err
    assert out.count("trained: two/step-00000008") == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    losses = train_losses(tmp_path / "two")
    assert len(losses) == 8
    if model is not MIXED:
        last = train(recipe, tmp_path / "one", quiet=True)
        assert losses == pytest.approx(train_losses(tmp_path / "one"), abs=1e-5)
        one, two = (read_metrics(tmp_path / name / METRICS)[-1]["validation/loss"] for name in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-5)
        assert tensors(last).keys() == tensors(checkpoint.find(tmp_path / "two")).keys()
    else:
        assert losses[-1] < losses[0]
