"""Packed models with random weights, for timing alone, and what decoding a token must multiply."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from terseformer.accounting import account
from terseformer.configfile import to_dict
from terseformer.layout import AnyConfig, Array, Dtype, declare
from terseformer.pack import FORMAT, Packed, load_packed, write_packed

_BLOCK = 1 << 20


class RandomWeights(Mapping[str, Array]):
    """A state dict of numbers that are made when they are asked for: one block of normal ones, over and over.

    Args:
        shapes: by name.
        seed: of the block.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        self.shapes = dict(shapes)
        self._block = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)

    def __getitem__(self, name: str) -> Array:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32) if name.endswith("norm.weight") else np.zeros(shape, np.float32)
        size = math.prod(shape)
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % _BLOCK
        numbers = np.resize(np.roll(self._block, start), size).reshape(shape)
        numbers *= np.float32(0.5 if name.endswith("modules_weight") else shape[-1] ** -0.5)
        return numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_model(config: AnyConfig, dtype: Dtype, folder: Path) -> Packed:
    """A packed model of random weights; its file stays in `folder` and is used again."""
    key = hashlib.sha256((FORMAT + json.dumps(to_dict(config), sort_keys=True)).encode()).hexdigest()[:16]
    path = folder / f"{key}-{dtype}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: shape for entry in declare(config, dtype) for name, shape in entry.sources.items()}
        write_packed(path, config, dtype, RandomWeights(shapes))
    return load_packed(path)


def multiply_adds(config: AnyConfig, context: int, num_source: int = 0) -> int:
    """Multiply-adds of decoding one token."""
    return account(config, context, num_source).total.macs
