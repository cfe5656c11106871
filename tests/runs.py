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
    EncoderDecoderConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    PairsConfig,
    Recipe,
    Seq2SeqConfig,
    SpanCorruptionConfig,
    SparseCrossProjectionConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    TerraformerConfig,
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

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "feed_forward": DENSE.feed_forward,
}
_SPARSE = {name: getattr(SPARSE, name) for name in ("dropout", "attention_dropout", "attention", "feed_forward")}
SEQ2SEQ = Seq2SeqConfig(**_SIZES)
TERRAFORMER = TerraformerConfig(**_SIZES)
SPARSE_SEQ2SEQ = Seq2SeqConfig(**_SIZES | _SPARSE, cross_attention=SparseCrossProjectionConfig(qkv_modules=4))
SPARSE_TERRAFORMER = TerraformerConfig(**_SIZES | _SPARSE, head=MIXED.head, reversible_encoder=True)
SPANS = SpanCorruptionConfig()
PAIRS = PairsConfig(max_target_length=12)
PAIRS_FILE = "pairs.jsonl"


def write_text(path: Path, num_documents: int = 40) -> Path:
    """JSON lines of nonsense, some words likelier than others."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = [" ".join(draw.choices(words, weights, k=60)) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_pairs(path: Path, num_pairs: int = 60) -> Path:
    """JSON lines of a few words each, and of them the first ones, from one to four."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 4))) for _ in range(9)]
    texts = [draw.choices(words, k=draw.randint(1, 9)) for _ in range(num_pairs)]
    rows = ({"text": " ".join(text), "title": " ".join(text[: draw.randint(1, 4)])} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recipe(text: Path, model: ModelConfig | EncoderDecoderConfig = SPARSE, **train: Any) -> Recipe:
    """A recipe of few steps; an encoder-decoder's is of the pairs that stand beside the text, whole or as a text."""
    data = {"sources": (str(text),), "vocab_size": 300, "validation_fraction": 0.2}
    if not isinstance(model, ModelConfig):
        train = {"objective": PAIRS} | train
        field = {"target_field": "title"} if isinstance(train["objective"], PairsConfig) else {"num_sentinels": 4}
        data |= {"sources": (str(text.with_name(PAIRS_FILE)),)} | field
    small = {"steps": 8, "batch_size": 4, "sequence_length": 12, "warmup_steps": 3, "log_every": 1}
    quiet = {"evaluate_every": 0, "evaluate_sequences": 4, "checkpoint_every": 0}
    return Recipe(
        model=model,
        data=DataConfig(**data),
        train=TrainConfig(**(small | quiet | train)),
    )


def train_losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / METRICS) if "train/loss" in line]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and optimiser state."""
    files = (checkpoint / "model.safetensors", checkpoint / "training" / "optimizer.safetensors")
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}
