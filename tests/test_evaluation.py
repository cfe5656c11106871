"""Evaluation against one window at a time, and honest bytes."""

from __future__ import annotations

import math
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F

from quantised import as_numpy
from terseformer.checkpoint import save
from terseformer.config import ConfigError, DataConfig, ModelConfig, Recipe, TrainConfig
from terseformer.data import DataError, TokenFile, prepare_in_cache, train_tokenizer, write_token_file
from terseformer.engine import Engine
from terseformer.evaluation import evaluate, evaluate_documents, evaluate_folder, token_sizes
from terseformer.model import CausalLM
from terseformer.pack import load_packed, write_packed
from variants import MAX_POSITION, VARIANTS, make_model

TEXTS = ["The cat sat on the mat, and the dog sat on the cat.\n", "Ça va? Žluťoučký kůň 你好世界 🙂🙃\n"] * 3
TOKENS = np.random.default_rng(0).integers(0, 21, 50).astype(np.uint16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def sizes_of(tokenizer: Tokenizer) -> np.ndarray:
    sizes = token_sizes(tokenizer)
    assert sizes is not None
    return sizes


def slow_losses(model: CausalLM, tokens: np.ndarray, length: int) -> list[float]:
    """The cross-entropy of each token but the first, one window at a time."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = torch.tensor(tokens[start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            losses += F.cross_entropy(model(window[None, :-1])[0].double(), window[1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize("logits", [2**22, 21 * 5, 1])
@pytest.mark.parametrize("name", ["feed_forward-relu", "whole-scaling", "whole-scaling_sru_rotary_rms", "head-mixed"])
def test_loss_is_that_of_single_windows(name, logits, monkeypatch):
    monkeypatch.setattr(sys.modules["terseformer.evaluation"], "_LOGITS", logits)
    model = make_model(VARIANTS[name])
    result = evaluate(model, TOKENS, sequence_length=9, batch_size=2)
    losses = slow_losses(model, TOKENS, 9)
    assert result.tokens == len(losses) == 49
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte is None
    assert result.bytes is None
    assert result.tokens_per_second == pytest.approx(49 / result.seconds)


def test_the_engine_scores_alike(tmp_path):
    model = make_model(VARIANTS["whole-scaling"])
    write_packed(tmp_path / "packed", model.config, "f32", as_numpy(model.state_dict()))
    result = evaluate(Engine(load_packed(tmp_path / "packed"), threads=1), TOKENS, sequence_length=9, batch_size=2)
    assert result.tokens == 49
    assert result.loss == pytest.approx(np.mean(slow_losses(model, TOKENS, 9)), rel=1e-5)


def test_some_sequences():
    model = make_model(VARIANTS["feed_forward-sparse"])
    result = evaluate(model, TOKENS, sequence_length=7, num_sequences=2)
    losses = slow_losses(model, TOKENS, 7)
    assert result.tokens == 14
    assert result.loss == pytest.approx(np.mean(losses[:7] + losses[21:28]), rel=1e-5)


def test_training_flags_come_back():
    model = make_model(VARIANTS["whole-scaling"]).train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    result = evaluate(model, TOKENS, sequence_length=9)
    assert [module.training for module in model.modules()] == flags
    assert result.loss == evaluate(model.eval(), TOKENS, sequence_length=9).loss
    with pytest.raises(DataError):
        evaluate(model.train(), TOKENS[:1], sequence_length=9)
    assert model.blocks[0].training


def test_token_out_of_the_vocabulary():
    with pytest.raises(DataError, match="token 21, but the model's vocab_size is 21"):
        evaluate(make_model(VARIANTS["feed_forward-relu"]), np.array([1, 21]), sequence_length=9)


def test_sequences_longer_than_the_context():
    with pytest.raises(ConfigError, match=f"from 1 to the model's max_position_embeddings = {MAX_POSITION}, not 99"):
        evaluate(make_model(VARIANTS["feed_forward-relu"]), TOKENS, sequence_length=99)


def test_losses_that_are_no_numbers():
    model = make_model(VARIANTS["feed_forward-relu"])
    model.norm.weight.data.fill_(1e9)
    assert evaluate(model, TOKENS, sequence_length=9).perplexity == math.inf
    model.norm.weight.data.fill_(math.nan)
    result = evaluate(model, TOKENS, sequence_length=9)
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)


def test_bytes_are_those_of_the_tokens_scored(tokenizer, tmp_path):
    write_token_file(tmp_path / "text.bin", TEXTS, tokenizer)
    file = TokenFile.open(tmp_path / "text.bin")
    assert sizes_of(tokenizer)[file.tokens].sum() == file.num_bytes
    model = CausalLM(ModelConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    first = len(tokenizer.decode([int(file.tokens[0])]).encode())
    exact = evaluate(model, file, sequence_length=16, tokenizer=tokenizer)
    assert exact.bytes is not None
    assert exact.bytes == file.num_bytes - first
    assert exact.bits_per_byte == pytest.approx(exact.loss * exact.tokens / math.log(2) / exact.bytes)
    assert evaluate(model, file.tokens, sequence_length=16, tokenizer=tokenizer).bytes == exact.bytes
    part = evaluate(model, file, sequence_length=4, num_sequences=3, tokenizer=tokenizer)
    count = (file.num_tokens - 1 + 3) // 4
    starts = [4 * (i * count // 3) for i in range(3)]
    scored = [int(token) for start in starts for token in file.tokens[start + 1 : start + 5]]
    assert part.bytes == sum(sizes_of(tokenizer)[scored])
    share = evaluate(model, file, sequence_length=16)
    num_bytes = share.tokens * file.num_bytes / file.num_tokens
    assert share.bytes == round(num_bytes)
    assert share.bits_per_byte == pytest.approx(share.loss * share.tokens / math.log(2) / num_bytes)
    assert share.loss == exact.loss
    documents = evaluate_documents(model, iter(TEXTS), tokenizer, sequence_length=16)
    assert (documents.loss, documents.bytes) == (exact.loss, exact.bytes)
    with pytest.raises(DataError, match="no documents"):
        evaluate_documents(model, [], tokenizer, sequence_length=16)


@given(st.text())
def test_bytes_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text.replace("<|endoftext|>", ""), add_special_tokens=False).ids
    assert sizes_of(tokenizer)[ids].sum() == len(text.replace("<|endoftext|>", "").encode("utf-8"))


def test_bytes_of_added_tokens():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens([AddedToken("<é>")])
    tokenizer.add_special_tokens(["<pad>"])
    assert sizes_of(tokenizer)[[0, 300, 301]].tolist() == [0, 4, 0]


def test_bytes_that_depend_on_neighbours_are_not_guessed():
    words = Tokenizer(models.WordLevel({"▁a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert token_sizes(words) is None
    assert token_sizes(Tokenizer(models.BPE())) is None
    for change in ("normalizer", "pre_tokenizer"):
        tokenizer = train_tokenizer(TEXTS, 300)
        sizes_of(tokenizer)
        changed = {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}
        setattr(tokenizer, change, changed[change])
        assert token_sizes(tokenizer) is None


def test_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for index, text in enumerate(["The cat sat. ", "The dog sat on the mat. ", "A cat, a dog, a mat, a hat. "]):
        (tmp_path / "text" / f"{index}.txt").write_text(text * 20)
    config = ModelConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=32
    )
    recipe = Recipe(
        model=config,
        data=DataConfig(sources=(str(tmp_path / "text"),), vocab_size=300, validation_fraction=0.3),
        train=TrainConfig(sequence_length=16),
    )
    prepared = prepare_in_cache(recipe.data)
    model = CausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    run = tmp_path / "run"
    path = save(run, 1, model, optimizer, recipe, prepared)

    expected = evaluate(model, prepared.validation, 16, tokenizer=prepared.tokenizer)
    for folder in (run, path):
        result = evaluate_folder(folder)
        assert (result.loss, result.bytes) == (expected.loss, expected.bytes)
    assert evaluate_folder(run, num_sequences=2).tokens == 32

    file = tmp_path / "text" / "1.txt"
    result = evaluate_folder(str(run), [file])
    assert result.loss == evaluate_documents(model, [file.read_text()], prepared.tokenizer, 16).loss
    with pytest.raises(DataError, match="no file or folder"):
        evaluate_folder(run, ["nowhere.txt"])

    file.write_text("Something else. " * 50)
    with pytest.raises(DataError, match="have changed since"):
        evaluate_folder(run)
    shutil.rmtree(path / "training")
    assert evaluate_folder(run, [file]).tokens > 50
    with pytest.raises(ConfigError, match="has no recipe"):
        evaluate_folder(run)
