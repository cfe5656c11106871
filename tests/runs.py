"""A small text and recipe for tests of training, and what a run leaves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from terseformer.config import (
    DataConfig,
    DenseFeedForwardConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    Recipe,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    TrainConfig,
)
from terseformer.training_log import METRICS, read_metrics

DENSE = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    feed_forward=DenseFeedForwardConfig(intermediate_size=32),
)
SPARSE = replace(
    DENSE,
    dropout=0.1,
    attention_dropout=0.1,
    attention=SparseProjectionConfig(qkv_modules=4),
    feed_forward=SparseFeedForwardConfig(intermediate_size=32, ff_block_size=8, controller_rank=4, quant_prob=0.5),
)
MIXED = replace(SPARSE, head=MultiplicativeHeadConfig(head_modules=4, sparse_prob=0.5))


def write_text(path: Path, num_documents: int = 40) -> Path:
    """JSON lines of nonsense, some words likelier than others."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = [" ".join(draw.choices(words, weights, k=60)) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_recipe(text: Path, model: ModelConfig = SPARSE, **train: Any) -> Recipe:
    small = {"steps": 8, "batch_size": 4, "sequence_length": 12, "warmup_steps": 3, "log_every": 1}
    quiet = {"evaluate_every": 0, "evaluate_sequences": 4, "checkpoint_every": 0}
    return Recipe(
        model=model,
        data=DataConfig(sources=(str(text),), vocab_size=300, validation_fraction=0.2),
        train=TrainConfig(**(small | quiet | train)),
    )


def train_losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / METRICS) if "train/loss" in line]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and optimiser state."""
    files = (checkpoint / "model.safetensors", checkpoint / "training" / "optimizer.safetensors")
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}
