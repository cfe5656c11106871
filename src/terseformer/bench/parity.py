"""Before speed is spoken of: the engine gives the PyTorch path's logits."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from terseformer.engine import Engine
from terseformer.errors import UserError
from terseformer.layout import AnyConfig
from terseformer.model import CausalLM
from terseformer.models import make_model
from terseformer.pack import load_packed, write_packed
from terseformer.presets import preset

_PRESETS = (
    "small-1m-dense",
    "small-1m-ff64",
    "small-1m-qkv-faithful",
    "small-1m-ff-qkv-loss",
    "summarize-1m-dense",
    "summarize-1m-scaling",
    "summarize-1m-terraformer",
)
_TOKENS = 40
_TOLERANCE = 1e-4


class ParityError(UserError):
    """The engine's logits are not those of the PyTorch path."""


def check_parity(threads: int) -> float:
    """The largest difference of float32 logits over models like those that are timed.

    Raises:
        ParityError: it is more than 1e-4.
    """
    largest = max(_difference(replace(preset(name), max_position_embeddings=_TOKENS), threads) for name in _PRESETS)
    if not largest <= _TOLERANCE:
        raise ParityError(
            f"the engine's logits differ from PyTorch's by {largest:.1e}, more than {_TOLERANCE:.0e}: a fast wrong "
            "answer is worth nothing; please report it with the output of terse info"
        )
    return largest


@torch.inference_mode()
def _difference(config: AnyConfig, threads: int) -> float:
    torch.manual_seed(0)
    model = make_model(config).eval()
    tokens, source = torch.randint(config.vocab_size, (2, 1, _TOKENS))
    expected = model(tokens) if isinstance(model, CausalLM) else model(source, tokens, torch.tensor([_TOKENS]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        write_packed(path, config, "f32", {name: tensor.numpy() for name, tensor in model.state_dict().items()})
        engine = Engine(load_packed(path), threads=threads)
        half = _TOKENS // 2  # read together, then token by token
        session = engine.new_session(source=None if isinstance(model, CausalLM) else source[0].tolist())
        parts = [engine.logits(tokens[0, :half].tolist(), session)]
        parts += [engine.logits([token], session) for token in tokens[0, half:].tolist()]
    return float(np.abs(np.concatenate(parts) - expected[0].numpy()).max())
