"""From a checkpoint to the packed file that the engine maps into memory.

The file lies beside the checkpoint's weights, `packed-DTYPE.safetensors`, and is made when it is first needed and when
the weights or the configuration have changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from terseformer import tensorfile
from terseformer.config import ConfigError
from terseformer.configfile import model_from_dict, to_dict
from terseformer.folder import CheckpointError, find, instead, load_config
from terseformer.layout import DTYPES, AnyConfig, Array, Dtype, Entry, Weights, declare, from_bf16
from terseformer.tensorfile import TensorFileError

FORMAT = "terseformer-packed-2"


class PackError(CheckpointError):
    """Weights that cannot be packed, or a packed file that cannot be used."""


@dataclass(frozen=True)
class Packed:
    """A packed model; its arrays are views of a memory map."""

    config: AnyConfig
    dtype: Dtype
    arrays: dict[str, Array]


def pack(checkpoint: Path | str, dtype: Dtype = "f32") -> Path:
    """Packs a checkpoint unless its packed file is there already, and gives the file.

    Args:
        checkpoint: a checkpoint's or a run's folder.
        dtype: of the matrices; vectors stay float32.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or the packed file cannot be written.
    """
    check_dtype(dtype)
    folder = find(checkpoint)
    source, path = folder / "model.safetensors", folder / f"packed-{dtype}.safetensors"
    config = load_config(folder)
    if not source.is_file():
        raise PackError(f"{source} is missing; {instead(folder)}")
    described = hashlib.sha256(json.dumps(to_dict(config)).encode("utf-8")).hexdigest()
    stamp = f"{source.stat().st_size}:{source.stat().st_mtime_ns}:{described}"
    if _stamp(path) != stamp:
        try:
            weights = _StateDict(source)
        except TensorFileError as error:
            raise PackError(f"{error}; {instead(folder)}") from None
        try:
            write_packed(path, config, dtype, weights, stamp)
        except TensorFileError as error:
            raise PackError(f"{error}; make room or the folder writable, or decode with --backend torch") from None
    return path


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for a type that weights cannot have."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def write_packed(path: Path, config: AnyConfig, dtype: Dtype, weights: Weights, stamp: str = "") -> None:
    """Packs a state dict, one tensor at a time.

    Args:
        path: the file, written whole or not at all.
        config: the model that the weights belong to.
        dtype: of the matrices.
        weights: float32 arrays by name; each is asked for when its turn comes.
        stamp: what the file is known by, to be found again.

    Raises:
        PackError: weights are missing or misshapen; all of them are named.
        TensorFileError: the file cannot be written.
    """
    entries = declare(config, dtype)
    _check_sources(entries, weights)
    metadata = {
        "format": FORMAT,
        "dtype": dtype,
        "config": json.dumps(to_dict(config)),
        "source": stamp,
    }
    tensors = [(entry.name, entry.declared, lambda entry=entry: entry.fill(weights)) for entry in entries]
    tensorfile.write(path, tensors, metadata)


def _check_sources(entries: list[Entry], weights: Weights) -> None:
    needed = {name: shape for entry in entries for name, shape in entry.sources.items()}
    problems = [f"{name} is missing" for name in needed if name not in weights]
    shapes = weights.shapes if isinstance(weights, _StateDict) else {name: weights[name].shape for name in weights}
    problems += [
        f"{name} has shape {list(shapes[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if name in weights and tuple(shapes[name]) != shape
    ]
    if problems:
        raise PackError(f"the weights do not fit the configuration: {'; '.join(problems)}")


def load_packed(path: Path) -> Packed:
    """Opens and checks a packed file.

    Raises:
        PackError: it is missing, damaged, of another version, or not what its own configuration declares; all missing
            and misshapen tensors are named.
    """
    try:
        file = tensorfile.read(path)
        if file.metadata.get("format") != FORMAT:
            raise PackError(f"{path} is no packed file of this version; delete it, and it is made anew")
        dtype: Any = file.metadata["dtype"]
        check_dtype(dtype)
        config = model_from_dict(json.loads(file.metadata["config"]))
        declared = {entry.name: entry.declared for entry in declare(config, dtype)}
    except TensorFileError as error:
        raise PackError(f"{error}; delete it, and it is made anew") from None
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{path} is damaged: {error}; delete it, and it is made anew") from None
    problems = [f"{name} is missing" for name in declared if name not in file.declared]
    problems += [f"{name} is not part of the model" for name in file.declared if name not in declared]
    problems += [
        f"{name} is {file.declared[name]} instead of {expected}"
        for name, expected in declared.items()
        if name in file.declared and file.declared[name] != expected
    ]
    if problems:
        raise PackError(f"{path} is damaged: {'; '.join(problems)}; delete it, and it is made anew")
    return Packed(config, dtype, file.arrays)


def _stamp(path: Path) -> str | None:
    """Of which weights and configuration a packed file was made; None if there is none that can be read."""
    try:
        metadata = tensorfile.read(path).metadata
        return metadata["source"] if metadata["format"] == FORMAT else None
    except (TensorFileError, KeyError, TypeError):
        return None


class _StateDict(Mapping[str, Array]):
    """A checkpoint's tensors, read when they are asked for, as float32."""

    def __init__(self, path: Path) -> None:
        self._file = tensorfile.read(path)
        self.shapes = {name: declared.shape for name, declared in self._file.declared.items()}

    def __getitem__(self, name: str) -> Array:
        array = self._file.arrays[name]
        if self._file.declared[name].dtype == "BF16":
            return from_bf16(array)
        return np.asarray(array, np.float32)

    def __iter__(self) -> Any:
        return iter(self._file.arrays)

    def __len__(self) -> int:
        return len(self._file.arrays)
