"""How well a model predicts a text: loss, perplexity, bits per byte."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import checkpoint
from terseformer.config import ConfigError, DataConfig, Recipe
from terseformer.configfile import from_toml, read_text
from terseformer.data import (
    DataError,
    PairBatch,
    TokenFile,
    default_cache,
    fingerprint,
    load_tokenizer,
    prepare_in_cache,
    read_documents,
    validation_windows,
    write_token_file,
)
from terseformer.encoder_decoder import EncoderDecoder
from terseformer.engine import Engine
from terseformer.layout import Dtype
from terseformer.model import CausalLM
from terseformer.text import token_bytes

_LOGITS = 2**22
"""Logits that are held at once."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of the text, which can be compared between tokenizers; None where `bytes` is."""
    tokens: int
    """Tokens that were predicted."""
    bytes: int | None
    """UTF-8 bytes of these tokens, as near as they are known."""
    seconds: float
    """Time taken."""
    tokens_per_second: float
    """Tokens predicted in a second."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The block runs in evaluation mode; after it, each module is as it was."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluate(
    model: CausalLM | Engine,
    tokens: np.ndarray | TokenFile,
    sequence_length: int,
    num_sequences: int = 0,
    batch_size: int = 16,
    tokenizer: Tokenizer | None = None,
) -> Evaluation:
    """Scores a text in windows of `sequence_length` tokens, each without knowledge of the one before it.

    Every token but the first is predicted once, end-of-text tokens included: they cost bits and count
    no bytes. The bytes are those of exactly the tokens that were predicted, where `token_sizes` knows
    them; else the token file's mean bytes per token times their number; else unknown. The model runs in
    evaluation mode (hard one-in-N choices, no dropout).

    Args:
        model: the model, whose training flags are restored, or the engine of one.
        tokens: token ids, on end.
        sequence_length: inputs in a window, T.
        num_sequences: windows at most, evenly spaced; 0 takes all.
        batch_size: windows in a call.
        tokenizer: the tokenizer that made the tokens, to count bytes.

    Raises:
        DataError: there are fewer than two tokens, or a token is not in the model's vocabulary.
        ConfigError: `sequence_length` exceeds `max_position_embeddings`.
    """
    if not 1 <= sequence_length <= model.config.max_position_embeddings:
        raise ConfigError(
            f"sequence_length must be from 1 to the model's max_position_embeddings = "
            f"{model.config.max_position_embeddings}, not {sequence_length}"
        )
    ids = tokens.tokens if isinstance(tokens, TokenFile) else tokens
    sizes = token_sizes(tokenizer) if tokenizer is not None else None
    mean_bytes = tokens.bytes_per_token if isinstance(tokens, TokenFile) else 0.0
    vocab_size = model.config.vocab_size
    loss, count, num_bytes = 0.0, 0, 0
    start = time.perf_counter()
    with eval_mode(model) if isinstance(model, CausalLM) else nullcontext(), torch.inference_mode():
        for windows in validation_windows(ids, sequence_length, num_sequences, batch_size):
            if (largest := windows.max()) >= vocab_size:
                raise DataError(
                    f"the text has token {largest}, but the model's vocab_size is {vocab_size}; use its own tokenizer"
                )
            targets = windows[:, 1:]
            if isinstance(model, CausalLM):
                batch = torch.from_numpy(windows).to(model.embedding.weight.device)
                loss += _sum_of_losses(model.head, model.hidden(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            else:
                loss += _engine_loss(model, windows[:, :-1], targets)
            count += targets.size
            num_bytes += int(sizes[targets].sum()) if sizes is not None else 0
    return _summary(loss, count, num_bytes if sizes is not None else mean_bytes * count, time.perf_counter() - start)


def evaluate_pairs(model: EncoderDecoder, batches: Iterable[PairBatch]) -> Evaluation:
    """Scores targets, given their sources; the bytes of the targets are not known.

    Args:
        model: the model, whose training flags are restored.
        batches: the pairs.
    """
    start, loss, count = time.perf_counter(), 0.0, 0
    device = model.embedding.weight.device
    with eval_mode(model), torch.inference_mode():
        for batch in batches:
            source, num_source, target, num_target = (
                torch.from_numpy(x).to(device) for x in (batch.source, batch.num_source, batch.target, batch.num_target)
            )
            hidden = model.hidden(*model.encode(source, num_source), target[:, :-1], num_target)
            keep = torch.arange(target.shape[1] - 1, device=device) < num_target[:, None]
            loss += _sum_of_losses(model.head, hidden[keep], target[:, 1:][keep])
            count += int(batch.num_target.sum())
    return _summary(loss, count, None, time.perf_counter() - start)


def _summary(loss: float, count: int, num_bytes: int | float | None, seconds: float) -> Evaluation:
    """From the sum of the cross-entropies of so many tokens, which stand for so many bytes."""
    mean = loss / count
    return Evaluation(
        loss=mean,
        perplexity=math.inf if mean > 700 else math.exp(mean),
        bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None,
        tokens=count,
        bytes=round(num_bytes) if num_bytes else None,
        seconds=seconds,
        tokens_per_second=count / seconds,
    )


def evaluate_documents(
    model: CausalLM | Engine,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    sequence_length: int,
    num_sequences: int = 0,
    batch_size: int = 16,
) -> Evaluation:
    """Scores texts, an end-of-text token after each, as `evaluate` does.

    Args:
        model: the model, or the engine of one.
        documents: the texts, read once; their tokens are kept in a temporary file.
        tokenizer: the one that the model was trained with.
        sequence_length: inputs in a window, T; the length that the model was trained with, if it has learned positions.
        num_sequences: windows at most, evenly spaced; 0 takes all.
        batch_size: windows in a call.

    Raises:
        DataError: there are no documents, or the tokenizer has no end-of-text token, or as `evaluate`.
        ConfigError: as `evaluate`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.bin"
        write_token_file(path, documents, tokenizer)
        return evaluate(model, TokenFile.open(path), sequence_length, num_sequences, batch_size, tokenizer)


def evaluate_folder(
    folder: str | os.PathLike[str],
    files: Iterable[str | os.PathLike[str]] = (),
    num_sequences: int = 0,
    engine_dtype: Dtype | None = None,
) -> Evaluation:
    """Scores texts with a checkpoint, in sequences of the length that it was trained with.

    Args:
        folder: a checkpoint's folder, or a run's for its newest.
        files: sources as in `data.sources`; none: the validation text of the checkpoint's own recipe.
        num_sequences: sequences at most, evenly spaced; 0 takes all.
        engine_dtype: scores with the engine, its matrices in this type; None: with PyTorch.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: a source cannot be read; the recipe's text is no longer what the model was trained on.
        ConfigError: there are no files, and the checkpoint has no recipe.
    """
    path = checkpoint.find(folder)
    tokenizer = load_tokenizer(path)
    model = Engine.from_pretrained(path, engine_dtype) if engine_dtype else checkpoint.load_language_model(path)
    recipe_path, sources = path / "training" / "recipe.toml", tuple(map(str, files))
    recipe = from_toml(Recipe, read_text(recipe_path)) if recipe_path.is_file() else None
    sequence_length = recipe.train.sequence_length if recipe else model.config.max_position_embeddings
    if sources:
        config = dataclasses.replace(recipe.data if recipe else DataConfig(), sources=sources)
        documents = (document.text for document in read_documents(config, default_cache()))
        return evaluate_documents(model, documents, tokenizer, sequence_length, num_sequences)
    if recipe is None:
        raise ConfigError(f"{path} has no recipe that names a validation text; give files to evaluate on")
    validation = prepare_in_cache(checkpoint.data_config(path, recipe)).validation
    if validation.tokenizer_sha256 != fingerprint(tokenizer):
        raise DataError(
            f"data.sources have changed since {path} was trained and give another tokenizer; give files to evaluate on"
        )
    return evaluate(model, validation, sequence_length, num_sequences, tokenizer=tokenizer)


def token_sizes(tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token of a byte-level tokenizer stands for; special tokens stand for none.

    Returns:
        int64 of shape [V], or None for a tokenizer that changes the text or whose tokens' bytes depend
        on their neighbours.
    """
    parts = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lossless = (
        parts["normalizer"] is None
        and '"add_prefix_space": true' not in json.dumps(parts["pre_tokenizer"])
        and all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())
    )
    pieces = token_bytes(tokenizer, max(vocabulary.values()) + 1) if lossless else None
    return np.array([len(piece) for piece in pieces]) if pieces is not None else None


def _engine_loss(engine: Engine, inputs: np.ndarray, targets: np.ndarray) -> float:
    """The sum of the cross-entropies, a window at a time."""
    total = 0.0
    for tokens, expected in zip(inputs, targets, strict=True):
        logits = engine.logits(tokens.tolist(), engine.new_session(len(tokens))).astype(np.float64)
        largest = logits.max(axis=1)
        log_sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        total += float((log_sums - logits[np.arange(len(expected)), expected]).sum())
    return total


def _sum_of_losses(head: nn.Module, hidden: Float[Tensor, "P D"], targets: Int[Tensor, " P"]) -> float:
    """The sum of the cross-entropies, some tokens at a time."""
    step = max(1, _LOGITS // head(hidden[:1]).shape[-1])
    total = 0.0
    for x, y in zip(hidden.split(step), targets.split(step), strict=True):
        losses = F.cross_entropy(head(x).float(), y, reduction="none")
        total += float(losses.cpu().double().sum())
    return total
