"""A model that is served: its engine, its name, and what else its checkpoint says."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from terseformer.accounting import feed_forward_units
from terseformer.config import ModelConfig
from terseformer.data import load_tokenizer
from terseformer.engine import Engine
from terseformer.errors import UserError
from terseformer.folder import find
from terseformer.layout import Dtype
from terseformer.pack import load_packed, pack
from terseformer.serve.guided import Grammars
from terseformer.serve.shape import describe_shape
from terseformer.serve.template import ChatTemplate, load_template
from terseformer.serve.vocabulary import Vocabulary
from terseformer.text import prompt_ids

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class ServedModel:
    """A model that is served.

    Args:
        name: that clients know it by.
        engine: one with a tokenizer, which the scheduler's thread uses alone.
        template: how a conversation becomes a prompt; None where the model takes no turns.
        fingerprint: changes with the model's weights.
    """

    def __init__(self, name: str, engine: Engine, template: ChatTemplate | None, fingerprint: str) -> None:
        assert engine.tokenizer is not None
        self.name, self.engine, self.template, self.fingerprint = name, engine, template, fingerprint
        self.tokenizer = engine.tokenizer
        self.created = int(time.time())
        self.context = engine.config.max_position_embeddings
        """Tokens of a prompt and its text together; of a source, and of its text."""
        self.pad_token_id = None if isinstance(engine.config, ModelConfig) else engine.config.pad_token_id
        """The token that a source's text begins with; None of a causal language model."""
        self.vocabulary = Vocabulary(self.tokenizer, engine.token_bytes, engine.config.vocab_size)
        self.units_read, self.units_stored = feed_forward_units(engine.config)
        """Feed-forward units that decoding reads for a token, and that there are."""

    @cached_property
    def shape(self) -> dict[str, Any]:
        """What the page shows of it."""
        return describe_shape(self.engine.config, self.engine.dtype, takes_turns=self.template is not None)

    @cached_property
    def grammars(self) -> Grammars:
        """Makes grammars for this model's tokens."""
        return Grammars(self.tokenizer, self.engine.config.vocab_size, self.engine.stop_ids)

    def encode(self, text: str) -> list[int]:
        """A prompt or source as the model reads it."""
        return prompt_ids(self.tokenizer, text, self.pad_token_id)


def named_folders(checkpoints: Sequence[str]) -> dict[str, Path]:
    """The folders of models by their names.

    Args:
        checkpoints: a folder each, of a checkpoint or run, whose name is the model's; or NAME=FOLDER.

    Raises:
        UserError: two have one name.
    """
    folders: dict[str, Path] = {}
    for given in checkpoints:
        name, _, folder = given.rpartition("=") if "=" in given and not os.path.exists(given) else ("", "", given)
        name = name or Path(os.path.abspath(folder)).name
        if name in folders:
            raise UserError(f"there are two models {name!r}; give one of them another name: NAME={folder}")
        folders[name] = Path(folder)
    return folders


def load_models(folders: Mapping[str, Path], dtype: Dtype, threads: int | None) -> list[ServedModel]:
    """Loads models, each of which is packed first if it has to be.

    Args:
        folders: of a checkpoint or run each, by the model's name.
        dtype: of the weights.
        threads: of each engine.

    Raises:
        UserError: a checkpoint cannot be used.
    """
    return [load_model(name, folder, dtype, threads) for name, folder in folders.items()]


def load_model(name: str, folder: Path, dtype: Dtype = "f32", threads: int | None = None) -> ServedModel:
    """Loads a checkpoint's or run's folder.

    Raises:
        UserError: it cannot be used.
    """
    checkpoint = find(folder)
    path = pack(checkpoint, dtype)
    tokenizer = load_tokenizer(checkpoint)
    engine = Engine(load_packed(path), tokenizer, threads)
    template = load_template(checkpoint, tokenizer, plain=isinstance(engine.config, ModelConfig))
    return ServedModel(name, engine, template, fingerprint(path))


def fingerprint(path: Path) -> str:
    """A digest of a packed file: of its size, its header, which names the weights it was made of, and of samples.

    A file of many gigabytes is not read whole.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        header = file.read(8)
        digest.update(header + file.read(int.from_bytes(header, "little")))
        for i in range(_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
