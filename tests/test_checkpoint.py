"""Checkpoints: round trips, whole or not at all, and what is said of damage."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import terseformer
from runs import DENSE, MIXED, SPARSE, make_recipe, tensors, write_text
from terseformer import checkpoint, data
from terseformer.checkpoint import CheckpointError
from terseformer.config import DenseHeadConfig, Recipe, SRUConfig
from terseformer.model import CausalLM
from terseformer.optim import make_optimizer
from variants import VARIANTS

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "training/optimizer.safetensors",
    "training/recipe.toml",
)


def trained(recipe: Recipe) -> tuple[CausalLM, torch.optim.Optimizer]:
    """A model and optimiser after one step, in evaluation mode."""
    torch.manual_seed(0)
    model = CausalLM(recipe.model)
    optimizer = make_optimizer(model, recipe.train)
    model(torch.arange(10)[None]).square().sum().backward()
    optimizer.step()
    return model.eval(), optimizer


def save(run: Path, step: int, recipe: Recipe) -> Path:
    return checkpoint.save(run, step, *trained(recipe), recipe, data.prepare_in_cache(recipe.data))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The kernel lets no file grow beyond it: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("whole", "head", "feed_forward"))])
def test_load_gives_the_same_logits(name, text, tmp_path):
    recipe = make_recipe(text, replace(VARIANTS[name], vocab_size=21 * 15, max_position_embeddings=32))
    model, optimizer = trained(recipe)
    path = checkpoint.save(tmp_path / "run", 1, model, optimizer, recipe, data.prepare_in_cache(recipe.data))
    tokens = torch.randint(300, (2, 9))
    with torch.no_grad():
        for folder in (path, str(path), tmp_path / "run"):
            loaded = terseformer.load(folder)
            assert not loaded.training
            assert loaded.config == recipe.model
            assert torch.equal(loaded(tokens), model(tokens))


def test_tied_embedding_is_saved_once_and_stays_tied(text, tmp_path):
    recipe = make_recipe(text, replace(DENSE, head=DenseHeadConfig(tied=True)))
    path = save(tmp_path, 1, recipe)
    assert "head.weight" not in tensors(path)
    model = terseformer.load(path)
    assert model.head.weight is model.embedding.weight


def test_folder_is_in_hugging_faces_layout(text, tmp_path):
    path = save(tmp_path, 12, make_recipe(text))
    assert path == tmp_path / "step-00000012"
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == {*FILES, "training/state.json"}
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "terseformer"
    assert config["architectures"] == ["CausalLM"]
    assert config["hidden_size"] == 16
    end = data.end_of_text_id(data.load_tokenizer(path))
    assert json.loads((path / "generation_config.json").read_text()) == {"bos_token_id": end, "eos_token_id": end}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("model", [MIXED, replace(DENSE, sru=SRUConfig(num_layers=1, size=8))], ids=["mixed", "sru"])
def test_training_state_round_trip(model, optimizer, text, tmp_path):
    recipe = make_recipe(text, model, optimizer=optimizer)
    old, old_optimizer = trained(recipe)
    prepared = data.prepare_in_cache(recipe.data)
    path = checkpoint.save(tmp_path, 3, old, old_optimizer, recipe, prepared)
    state = checkpoint.load_training(path)
    assert (state.step, state.recipe) == (3, recipe)
    checkpoint.check_same_run(state, path, recipe, prepared)
    new = CausalLM(recipe.model)
    new_optimizer = make_optimizer(new, recipe.train)
    checkpoint.load_weights(new, path)
    checkpoint.restore_optimizer(new, new_optimizer, path)
    saved = checkpoint.optimizer_tensors(old, old_optimizer)
    restored = checkpoint.optimizer_tensors(new, new_optimizer)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    for one, optim in ((old, old_optimizer), (new, new_optimizer)):
        optim.zero_grad()
        torch.manual_seed(5)
        one.train()(torch.arange(10)[None]).square().sum().backward()
        optim.step()
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_keeps_the_newest(text, tmp_path):
    recipe = make_recipe(text, keep_checkpoints=2)
    (tmp_path / "step-notes").mkdir()
    for step in (1, 2, 10):
        save(tmp_path, step, recipe)
    assert names(tmp_path) == ["step-00000002", "step-00000010", "step-notes"]
    assert checkpoint.find(tmp_path).name == "step-00000010"


def test_taken_back_drops_what_came_later(text, tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, make_recipe(text, keep_checkpoints=9))
    save(tmp_path, 2, make_recipe(text, keep_checkpoints=1))
    assert names(tmp_path) == ["step-00000002"]


def test_same_step_again_replaces(text, tmp_path):
    save(tmp_path, 1, make_recipe(text))
    path = save(tmp_path, 1, make_recipe(text, DENSE))
    assert terseformer.load(path).config == DENSE
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_killed_process_left_is_cleared(text, tmp_path):
    left = tmp_path / ".saving" / "training"
    left.mkdir(parents=True)
    (left / "junk").write_text("junk")
    half_deleted = tmp_path / "step-00000001"
    half_deleted.mkdir()
    (half_deleted / "model.safetensors").write_text("junk")
    assert checkpoint.checkpoints(tmp_path) == []
    path = save(tmp_path, 1, make_recipe(text))
    assert names(tmp_path) == [path.name]
    assert not list(tmp_path.rglob("junk"))
    checkpoint.load_training(path)


@pytest.mark.parametrize("limit", [0, 500, 20_000], ids=["at config.json", "at tokenizer.json", "at weights"])
def test_full_disk_leaves_the_previous_checkpoint_whole(limit, text, tmp_path):
    recipe = make_recipe(text)
    first = save(tmp_path, 1, recipe)
    state = trained(recipe)
    prepared = data.prepare_in_cache(recipe.data)
    with file_size_limit(limit), pytest.raises(CheckpointError) as error:
        checkpoint.save(tmp_path, 2, *state, recipe, prepared)
    for part in ("step-00000002", "File too large", f"the last good checkpoint is {first}", "--resume"):
        assert part in str(error.value)
    assert names(tmp_path) == [first.name]
    checkpoint.load_training(first)


def test_not_writable(text, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="Not a directory.*there is no checkpoint yet"):
        save(tmp_path / "run", 1, make_recipe(text))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_with_the_checkpoint_before(name, damage, text, tmp_path):
    first, second = (save(tmp_path, step, make_recipe(text)) for step in (1, 2))
    damage(second / name)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_training(second)
    assert name in str(error.value)
    assert f"the checkpoint before it is {first}" in str(error.value)
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="there is no checkpoint before it"):
        checkpoint.load_training(second)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"step": 1, "files": 3}', '{"step": 1, "files": {"a": 1}}'])
def test_damaged_state(content, text, tmp_path):
    path = save(tmp_path, 1, make_recipe(text))
    (path / "training" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_training(path)


def test_without_training_state(text, tmp_path):
    path = save(tmp_path, 1, make_recipe(text))
    shutil.rmtree(path / "training")
    with pytest.raises(CheckpointError, match="has no training state"):
        checkpoint.load_training(path)
    terseformer.load(path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", truncate, "model.safetensors is damaged"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("config.json", truncate, "config.json cannot be used"),
    ],
)
def test_loading_a_damaged_model(name, damage, message, text, tmp_path):
    first, second = (save(tmp_path, step, make_recipe(text)) for step in (1, 2))
    damage(second / name)
    with pytest.raises(CheckpointError, match=message) as error:
        terseformer.load(tmp_path)
    assert f"the checkpoint before it is {first}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 16}, "hiden_size: no such key; the nearest is 'hidden_size'"),
        ({"model_type": "gpt2"}, '"model_type": "terseformer"'),
        ({"norm": "batch"}, "norm: needs one of 'layer_norm', 'rms_norm', not 'batch'"),
        ({"hidden_size": 18}, r"embedding.weight has shape \[300, 16\] instead of \[300, 18\]"),
        ({"num_hidden_layers": 1}, "blocks.1.attention_norm.weight is not part of the model"),
        ({"num_hidden_layers": 3}, "blocks.2.attention_norm.weight is missing"),
    ],
)
def test_config_that_does_not_fit(change, message, text, tmp_path):
    path = save(tmp_path, 1, make_recipe(text, DENSE))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        terseformer.load(path)


def test_nowhere(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: it is no folder"):
        terseformer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither config.json nor step-"):
        terseformer.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda r: replace(r, train=replace(r.train, learning_rate=0.5)), r"train.learning_rate = 0.5, but .* 0.002;"),
        (lambda r: replace(r, model=replace(r.model, dropout=0.3)), r"model.dropout = 0.3, but .* trained with 0.1;"),
        (
            lambda r: replace(r, model=replace(SPARSE, feed_forward=DENSE.feed_forward)),
            r"model.feed_forward.activation",
        ),
        (lambda r: replace(r, train=replace(r.train, final_quant_prob=1.0)), r"final_quant_prob = 1.0, but .* None;"),
    ],
)
def test_another_recipe(changed, message, text, tmp_path):
    recipe = make_recipe(text)
    path = save(tmp_path, 1, recipe)
    state, prepared = checkpoint.load_training(path), data.prepare_in_cache(recipe.data)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_same_run(state, path, changed(recipe), prepared)
    free = replace(recipe.train, checkpoint_every=7, evaluate_every=7, log_every=7, sample_prompt="x")
    checkpoint.check_same_run(state, path, replace(recipe, train=free), prepared)


def test_another_text(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(write_text(tmp_path / "text.jsonl"))
    path = save(tmp_path / "run", 1, recipe)
    write_text(tmp_path / "text.jsonl", num_documents=50)
    state, prepared = checkpoint.load_training(path), data.prepare_in_cache(recipe.data)
    with pytest.raises(CheckpointError, match=r"text\.num_bytes = \d+, but .* give the same recipe and text"):
        checkpoint.check_same_run(state, path, recipe, prepared)
