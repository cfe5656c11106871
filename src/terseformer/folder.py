"""Where a run's checkpoints stand, and what a checkpoint's folder says of its model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from terseformer.config import ConfigError, EncoderDecoderConfig, ModelConfig
from terseformer.configfile import model_from_dict, read_text
from terseformer.errors import UserError

MODEL_TYPE = "terseformer"
FOREIGN_KEYS = ("model_type", "architectures", "dtype", "transformers_version")
"""Keys of a config.json that are not the model's, but of its layout."""
_PREFIX = "step-"


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written: the message says which, why, and what to do."""


def find(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that a path stands for. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    steps = checkpoints(folder)
    if steps:
        return steps[-1]
    what = "holds neither config.json nor step-* folders" if folder.is_dir() else "is no folder"
    raise CheckpointError(f"no checkpoint at {folder}: it {what}; give a checkpoint's or a run's folder")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(p for p in run.glob(f"{_PREFIX}*") if (p / "config.json").is_file())


def last_good(run: Path) -> str:
    """Says which checkpoint of a run is the last, for messages."""
    whole = checkpoints(run)
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"


def folder_of(run: Path, step: int) -> Path:
    """Where a run's checkpoint after a step stands."""
    return run / f"{_PREFIX}{step:08d}"


def load_config(path: Path) -> ModelConfig | EncoderDecoderConfig:
    """The configuration of a checkpoint folder. Raises CheckpointError."""
    file = path / "config.json"
    try:
        values = json.loads(read_text(file))
        if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
            raise ConfigError(f'it is not of a terseformer model ("model_type": "{MODEL_TYPE}")')
        return model_from_dict({name: value for name, value in values.items() if name not in FOREIGN_KEYS})
    except (ConfigError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}; {instead(path)}") from None


def load_language_model_config(path: Path) -> ModelConfig:
    """The configuration of a causal language model's checkpoint folder. Raises CheckpointError."""
    config = load_config(path)
    if not isinstance(config, ModelConfig):
        raise CheckpointError(f"{path} holds a model of kind {config.kind!r}; here a 'causal_lm' is needed")
    return config


def instead(path: Path) -> str:
    """Advice to somebody whose checkpoint cannot be used."""
    earlier = [p for p in checkpoints(path.parent) if p.name < path.name]
    return f"the checkpoint before it is {earlier[-1]}" if earlier else "there is no checkpoint before it"
