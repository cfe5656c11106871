"""Small models as Hugging Face's libraries load them from our folders, and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from terseformer.checkpoint import save_model
from terseformer.config import EncoderDecoderConfig, ModelConfig
from terseformer.generation import generate_tokens
from terseformer.models import AnyModel
from terseformer.sampling import SamplingConfig
from variants import make_model

NEW = 6
END = 5


def pair(config: ModelConfig | EncoderDecoderConfig, folder: Path, seed: int = 0) -> tuple[AnyModel, Any]:
    """A model, and the same as Hugging Face's libraries load it."""
    own = make_model(config, seed)
    save_model(folder, own)
    auto = AutoModelForCausalLM if isinstance(config, ModelConfig) else AutoModelForSeq2SeqLM
    return own, auto.from_pretrained(folder)


def draw(config: ModelConfig | EncoderDecoderConfig, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, none of them 0."""
    return torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def rows_of(config: ModelConfig | EncoderDecoderConfig) -> list[list[int]]:
    """Prompts or sources of different lengths."""
    return [draw(config, n, seed=n).tolist() for n in (5, 2, 4)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """On the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}


def expected(own: AnyModel, rows: list[list[int]], **sampling: Any) -> list[list[int]]:
    """What this package's own generation writes."""
    config = SamplingConfig(**({"temperature": 0.0, "max_new_tokens": NEW} | sampling))
    written: list[list[int]] = [[] for _ in rows]
    for step in generate_tokens(own, rows, config, [END]):
        for drawn in step:
            written[drawn.row].append(drawn.token)
    return written


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> list[list[int]]:
    """What Hugging Face's generation writes, without prompt or start, and without padding."""
    settings = {"max_new_tokens": NEW, "eos_token_id": END, "pad_token_id": 0, "do_sample": False} | settings
    before = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    written = model.generate(**inputs, **settings)[:, before:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in written]
