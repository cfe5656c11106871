"""Checkpoint folders in Hugging Face's layout, written whole or not at all, without pickle.

    step-00001000/
      config.json  generation_config.json  model.safetensors  tokenizer.json
      training/    recipe.toml  optimizer.safetensors  state.json (step, sizes and SHA-256 of all files)

A run's folder holds such folders; where one is asked for, the run's folder stands for its newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from terseformer.config import ConfigError, ModelConfig, Recipe
from terseformer.configfile import from_json, from_toml, read_text, to_dict, to_toml
from terseformer.errors import UserError
from terseformer.model import CausalLM

MODEL_TYPE = "terseformer"
_PREFIX = "step-"
_FREE_KEYS = {
    "train.log_every",
    "train.evaluate_every",
    "train.evaluate_sequences",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_prompt",
}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written: the message says which, why, and what to do."""


@dataclass(frozen=True)
class TrainingState:
    """What a resumed training needs beside the model."""

    recipe: Recipe
    step: int
    """Steps that are done."""
    optimizer: dict[str, Tensor]
    """The optimiser's tensors by `parameter name/state name`."""


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM:
    """The model of a checkpoint folder, or of the newest checkpoint of a run's folder, in eval mode.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = find(folder)
    model = CausalLM(load_config(path))
    load_weights(model, path)
    return model.to(device).eval()


def load_config(path: Path) -> ModelConfig:
    """The configuration of a checkpoint folder. Raises CheckpointError."""
    try:
        values = json.loads(read_text(path / "config.json"))
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f'{path / "config.json"} is not of a terseformer model ("model_type": "{MODEL_TYPE}")')
        values = {name: value for name, value in values.items() if name not in ("architectures", "dtype")}
        return from_json(ModelConfig, json.dumps(values))
    except (ConfigError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {error}") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model from a checkpoint folder; names all missing and misshapen tensors at once."""
    tensors = _read_tensors(path / "model.safetensors")
    own = model.state_dict()
    aliases = _aliases(model)
    problems = [f"{name} is missing" for name in own if name not in tensors and aliases.get(name, name) not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{path / 'model.safetensors'} does not fit its config.json: {'; '.join(problems)}")
    model.load_state_dict(tensors, strict=False)


def find(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that a path stands for. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    steps = checkpoints(folder)
    if steps:
        return steps[-1]
    what = "holds neither config.json nor step-* folders" if folder.is_dir() else "does not exist"
    raise CheckpointError(f"no checkpoint at {folder}: it {what}; give a checkpoint folder or a run's folder")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(p for p in run.glob(f"{_PREFIX}*") if (p / "config.json").is_file())


def save(
    run: Path,
    step: int,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    tokenizer: Path,
    end_of_text_id: int,
    keep: int,
) -> Path:
    """Writes a checkpoint: all of it, or nothing; then deletes the oldest beyond `keep`.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are whole.
    """
    final = run / f"{_PREFIX}{step:08d}"
    building = None
    try:
        run.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=run, prefix=".saving-"))
        training = building / "training"
        training.mkdir()
        config = {"model_type": MODEL_TYPE, "architectures": ["CausalLM"], "dtype": "float32", **to_dict(model.config)}
        _write(building / "config.json", json.dumps(config, indent=2) + "\n")
        generation = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
        _write(building / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        shutil.copyfile(tokenizer, building / "tokenizer.json")
        aliases = _aliases(model)
        weights = {name: t.detach().contiguous() for name, t in model.state_dict().items() if name not in aliases}
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        save_file(optimizer_tensors(model, optimizer), training / "optimizer.safetensors")
        _write(training / "recipe.toml", to_toml(recipe))
        files = sorted(p for p in building.rglob("*") if p.is_file())
        sums = {str(p.relative_to(building)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write(training / "state.json", json.dumps({"step": step, "files": sums}, indent=2) + "\n")
        for path in (*files, training / "state.json", training, building):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(building, final)
        _sync(run)
    except (OSError, SafetensorError) as error:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        whole = checkpoints(run)
        last = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
        raise CheckpointError(f"could not write {final}: {error}; {last}; free some space, then --resume") from None
    for old in checkpoints(run)[:-keep]:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Deletes a checkpoint; one that is deleted in part is no checkpoint any more."""
    (path / "config.json").unlink()
    shutil.rmtree(path)


def load_training(path: Path) -> TrainingState:
    """The training state of a checkpoint, after all of its files have been checked.

    Raises:
        CheckpointError: it was made without one, or a file is missing or damaged; names the one before it.
    """
    earlier = [p for p in checkpoints(path.parent) if p.name < path.name]
    advice = f"resume from the one before it: --resume {earlier[-1]}" if earlier else "there is none before it"
    if not (path / "training").is_dir():
        raise CheckpointError(f"{path} has no training state, so that training cannot go on from it; {advice}")
    try:
        state = json.loads(read_text(path / "training" / "state.json"))
        for name, expected in state["files"].items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing; {advice}")
            if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written; {advice}")
        recipe = from_toml(Recipe, read_text(path / "training" / "recipe.toml"))
        return TrainingState(recipe, int(state["step"]), _read_tensors(path / "training" / "optimizer.safetensors"))
    except (ConfigError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: its training state cannot be read: {error}; {advice}") from None


def check_same_recipe(given: Recipe, saved: Recipe, path: Path) -> None:
    """Raises CheckpointError where a recipe differs from a checkpoint's in what changes the result."""
    new, old = _flat(to_dict(given)), _flat(to_dict(saved))
    for key in sorted(new.keys() | old.keys()):
        if key not in _FREE_KEYS and new.get(key) != old.get(key):
            raise CheckpointError(
                f"{key} = {new.get(key)!r}, but {path} was trained with {old.get(key)!r}; give the same recipe, "
                "or train into another folder with --out"
            )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors by `parameter name/state name`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is not None:
                tensors[f"{names[parameter]}/{key}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimiser the state that `optimizer_tensors` took."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        optimizer.state[parameters[name]][key] = tensor.clone()


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of tensors that share another's storage, with the name that it is saved under."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            shared[name] = kept
    return shared


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
