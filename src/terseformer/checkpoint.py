"""Checkpoint folders in Hugging Face's layout, written whole or not at all, without pickle.

    step-00001000/
      config.json  generation_config.json  model.safetensors  tokenizer.json
      training/    recipe.toml  optimizer.safetensors  state.json (step, text, sizes and SHA-256 of all files)

A run's folder holds such folders; where one is asked for, the run's folder stands for its newest.

However many processes train, and whether each holds the model or a part of it, the folder is the same. Tensors are
written and read one at a time: a process that holds a part never holds more than that and one whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from terseformer import tensorfile
from terseformer.config import ConfigError, DataConfig, Recipe
from terseformer.configfile import from_toml, read_text, to_dict, to_toml
from terseformer.data import PreparedData
from terseformer.folder import (
    MODEL_TYPE,
    CheckpointError,
    checkpoints,
    find,
    folder_of,
    instead,
    last_good,
    load_config,
    load_language_model_config,
)
from terseformer.model import CausalLM
from terseformer.models import make_model
from terseformer.seq2seq import Seq2Seq
from terseformer.sharding import empty_state, own_part, whole
from terseformer.tensorfile import Declared, TensorFileError, Unwritten
from terseformer.terraformer import Terraformer

_UNFINISHED = ".saving"
_FREE_KEYS = {
    "data.tokenizer",  # its fingerprint is compared
    "train.parallelism",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluate_sequences",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_prompt",
}


@dataclass(frozen=True)
class TrainingState:
    """What a resumed training needs beside the model."""

    step: int
    """Steps that are done."""
    recipe: Recipe
    text: dict[str, Any]
    """What the training text was."""


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM | Seq2Seq | Terraformer:
    """The model of a checkpoint folder, or of the newest checkpoint of a run's folder, in eval mode.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = find(folder)
    model = make_model(load_config(path))
    load_weights(model, path)
    return model.to(device).eval()


def load_language_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM:
    """The same, where only a causal language model will do. Raises CheckpointError."""
    path = find(folder)
    load_language_model_config(path)
    model = load(path, device)
    assert isinstance(model, CausalLM)
    return model


def load_weights(model: nn.Module, path: Path, whose: str = "its config.json", advice: str = "") -> None:
    """Fills a model from a checkpoint folder; names all missing and misshapen tensors at once.

    Args:
        model: the model.
        path: the folder.
        whose: where the model comes from, for the error message.
        advice: what to do where the weights do not fit; empty: take the checkpoint before it.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit.
    """
    own, aliases = model.state_dict(), _aliases(model)
    with _opened(path / "model.safetensors") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        problems = [
            f"{name} is missing" for name in own if name not in shapes and aliases.get(name, name) not in shapes
        ]
        problems += [f"{name} is not part of the model" for name in shapes if name not in own]
        problems += [
            f"{name} has shape {shape} instead of {list(own[name].shape)}"
            for name, shape in shapes.items()
            if name in own and shape != list(own[name].shape)
        ]
        if problems:
            raise CheckpointError(
                f"{path / 'model.safetensors'} does not fit {whose}: {'; '.join(problems)}; {advice or instead(path)}"
            )
        for name in shapes:
            _fill(own[name], file, name)


def save(
    run: Path,
    step: int,
    model: CausalLM | Seq2Seq | Terraformer,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    prepared: PreparedData,
    is_writer: bool = True,
) -> Path:
    """Writes a checkpoint: all of it, or nothing.

    Of the run's others, `train.keep_checkpoints` stay; later ones, from which the run was taken back, go.

    Args:
        run: the run's folder.
        step: steps that are done.
        model: the weights.
        optimizer: its state.
        recipe: what is trained.
        prepared: the text.
        is_writer: of several processes that hold parts of the model, one writes; the others call this too, for
            their parts.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are whole.
    """
    final, building = folder_of(run, step), run / _UNFINISHED
    training = building / "training"
    if not is_writer:
        for tensors in (_weights(model), optimizer_tensors(model, optimizer)):
            for _, _, make in tensorfile.in_order(_unwritten(tensors)):
                make()
        return final
    try:
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        training.mkdir(parents=True)
        _write_model(building, model)
        end = prepared.train.end_of_text_id
        _write_json(building / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
        shutil.copyfile(prepared.tokenizer_path, building / "tokenizer.json")
        _write_tensors(training / "optimizer.safetensors", optimizer_tensors(model, optimizer))
        (training / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        files = sorted(p for p in building.rglob("*") if p.is_file())
        sums = {p.relative_to(building).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write_json(training / "state.json", {"step": step, "text": _text(prepared), "files": sums})
        for path in (*files, training / "state.json", training, building):
            _sync(path)
        if final.exists():
            remove(final)
        os.replace(building, final)
        _sync(run)
        kept = checkpoints(run)
        place = kept.index(final) + 1
        for old in (*kept[: max(0, place - recipe.train.keep_checkpoints)], *kept[place:]):
            remove(old)
    except (OSError, TensorFileError) as error:
        raise CheckpointError(
            f"cannot write {final}: {error}; {last_good(run)}; mend this and go on with --resume"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def save_model(folder: Path, model: CausalLM | Seq2Seq | Terraformer) -> None:
    """Writes a folder with a model alone, all of it or nothing: without tokenizer, not to be resumed from.

    Raises:
        CheckpointError: there is something at that place, or the disk is full or not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another folder")
    building = folder.with_name(f".{folder.name}{_UNFINISHED}")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write_model(building, model)
        for path in (*building.iterdir(), building):
            _sync(path)
        os.replace(building, folder)
        _sync(folder.parent)
    except (OSError, TensorFileError) as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_model(folder: Path, model: CausalLM | Seq2Seq | Terraformer) -> None:
    names = {"architectures": [type(model).__name__], "dtype": "float32"}
    _write_json(folder / "config.json", {"model_type": MODEL_TYPE, **names, **to_dict(model.config)})
    _write_tensors(folder / "model.safetensors", _weights(model))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model: tensors that are shared, once."""
    aliases = _aliases(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}


def _unwritten(tensors: Mapping[str, Tensor]) -> list[Unwritten]:
    def declared(name: str, tensor: Tensor) -> Unwritten:
        return name, Declared("F32", tuple(tensor.shape)), lambda: whole(tensor).detach().cpu().numpy()

    return [declared(name, tensor) for name, tensor in tensors.items()]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    tensorfile.write(path, _unwritten(tensors), {"format": "pt"})


def remove(path: Path) -> None:
    """Deletes a checkpoint; one that is deleted in part is no checkpoint any more."""
    (path / "config.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def load_training(path: Path, check: bool = True) -> TrainingState:
    """The training state of a checkpoint, after all of its files have been checked; its tensors are still to be read.

    Args:
        path: the checkpoint.
        check: read the files and compare their sums; of several processes, one may do so for all.

    Raises:
        CheckpointError: it was made without one, or a file is missing or damaged; names the one before it.
    """
    if not (path / "training").is_dir():
        raise CheckpointError(f"{path} has no training state, so that training cannot go on from it; {instead(path)}")
    try:
        state = json.loads(read_text(path / "training" / "state.json"))
        for name, expected in state["files"].items() if check else ():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing; {instead(path)}")
            if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written; {instead(path)}")
        return TrainingState(int(state["step"]), load_recipe(path), state["text"])
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: training/state.json cannot be used: {error}; {instead(path)}"
        ) from None


def load_recipe(path: Path) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises CheckpointError."""
    file = path / "training" / "recipe.toml"
    try:
        return from_toml(Recipe, read_text(file))
    except ConfigError as error:
        raise CheckpointError(f"{file} cannot be used: {error}") from None


def data_config(path: Path, recipe: Recipe) -> DataConfig:
    """The data of a checkpoint's recipe; a tokenizer that it was given is the checkpoint's own copy."""
    given = recipe.data.tokenizer
    return replace(recipe.data, tokenizer=str(path / "tokenizer.json")) if given else recipe.data


def check_same_run(state: TrainingState, path: Path, recipe: Recipe, prepared: PreparedData) -> None:
    """Raises CheckpointError where recipe or text differ from a checkpoint's in what changes the result."""
    given, saved = to_dict(recipe), to_dict(state.recipe)
    given["text"], saved["text"] = _text(prepared), state.text
    new, old = _flat(given), _flat(saved)
    for key in sorted(new.keys() | old.keys()):
        if key not in _FREE_KEYS and new.get(key) != old.get(key):
            raise CheckpointError(
                f"{key} = {new.get(key)!r}, but {path} was trained with {old.get(key)!r}; give the same recipe and "
                "text, or train into another folder with --out"
            )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors by `parameter name/state name`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is not None:
                tensors[f"{names[parameter]}/{key}"] = torch.as_tensor(value).detach()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Gives an optimiser the state that a checkpoint has, on the parameters' device.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    parameters, states = dict(model.named_parameters()), {}
    with _opened(path / "training" / "optimizer.safetensors") as file:
        for full_name in file.keys():  # noqa: SIM118
            name, _, key = full_name.rpartition("/")
            state = empty_state(parameters[name], key, file.get_slice(full_name).get_shape())
            _fill(state, file, full_name)
            states.setdefault(name, {})[key] = state
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: states[name] for number, name in enumerate(order) if name in states}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of tensors that share another's storage, with the name that it is saved under."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            shared[name] = kept
    return shared


def _text(prepared: PreparedData) -> dict[str, Any]:
    """By what a training text is known again."""
    file = prepared.train
    return {"tokenizer_sha256": file.tokenizer_sha256, "num_tokens": file.num_tokens, "num_bytes": file.num_bytes}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A checkpoint's tensor file, opened by the library. Raises CheckpointError, in the block too."""
    folder = path.parent.parent if path.parent.name == "training" else path.parent
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {instead(folder)}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {instead(folder)}") from None


@torch.no_grad()
def _fill(tensor: Tensor, file: Any, name: str) -> None:
    """Reads what this process holds of a tensor."""
    part, rows = own_part(tensor)
    if part.dim() == 0:
        part.copy_(file.get_tensor(name))
    elif part.numel():
        part.copy_(file.get_slice(name)[rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
