"""Engines of small models, how near their logits come to PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from quantised import as_numpy
from terseformer.config import DenseFeedForwardConfig, TerraformerConfig
from terseformer.engine import Engine
from terseformer.layout import AnyConfig, Dtype
from terseformer.models import AnyModel
from terseformer.pack import Packed, load_packed, write_packed

TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
INT8_ERROR, LARGER_INT8_ERROR = 0.03, 0.1
"""Bounds of int8's root mean square error over the logits' deviation, where the weights are the same: what rounding the
inputs of each matrix to 8 bits makes of untrained models; more where it turns a controller's choice, or goes through
a Terraformer's many layers of attention."""


def check_logits(got: np.ndarray, expected: np.ndarray, config: AnyConfig, dtype: Dtype) -> None:
    if dtype == "int8":
        calm = isinstance(config.feed_forward, DenseFeedForwardConfig) and not isinstance(config, TerraformerConfig)
        bound = INT8_ERROR if calm else LARGER_INT8_ERROR
        assert np.sqrt(np.mean((got - expected) ** 2)) < bound * expected.std()
    else:
        assert_close(got, expected, **TOLERANCE)


def pack_model(model: AnyModel, path: Path, dtype: Dtype = "f32") -> Packed:
    write_packed(path, model.config, dtype, as_numpy(model.state_dict()))
    return load_packed(path)


def make_engine(model: AnyModel, path: Path, dtype: Dtype = "f32", threads: int = 2, **more) -> Engine:
    return Engine(pack_model(model, path / f"{dtype}.safetensors", dtype), threads=threads, poison=True, **more)


def draw_tokens(config: AnyConfig, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()
