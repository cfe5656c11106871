"""Checkpoint folders that Hugging Face's libraries load, and those that they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import draw, pair
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import terseformer
from terseformer.config import ConfigError, DenseHeadConfig, EncoderDecoderConfig, ModelConfig
from terseformer.errors import UserError
from terseformer.folder import CheckpointError
from variants import DISTINCT, ENCODER_DECODERS, PYTORCH_ONLY, VARIANTS

ALL = VARIANTS | PYTORCH_ONLY | ENCODER_DECODERS


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_loaded_and_saved_without_loss(name: str, tmp_path: Path) -> None:
    config = ALL[name]
    own, model = pair(config, tmp_path / "ours")
    assert model.config.to_model_config() == config
    assert not model.training
    tokens = draw(config, 2, 7)
    with torch.no_grad():
        if isinstance(config, ModelConfig):
            got, expected = model(tokens).logits, own(tokens)
        else:
            target, lengths = draw(config, 2, 5, seed=1), torch.tensor([7, 7])
            got, expected = model(tokens, decoder_input_ids=target).logits, own(tokens, target, lengths)
    assert torch.equal(got, expected)

    model.save_pretrained(tmp_path / "theirs")
    again = terseformer.load(tmp_path / "theirs")
    assert again.config == config
    state = own.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("ours", "theirs"))
    assert before.keys() == after.keys()


def test_a_saved_configuration_has_the_keys_of_ours(tmp_path: Path) -> None:
    config = VARIANTS["whole-scaling"]
    _, model = pair(config, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / which / "config.json").read_text()) for which in ("ours", "theirs"))
    assert theirs.pop("transformers_version")
    assert theirs.pop("architectures") == ["TerseformerForCausalLM"]
    del ours["architectures"]
    assert theirs == ours


def test_a_key_is_changed_on_the_way(tmp_path: Path) -> None:
    pair(VARIANTS["whole-scaling"], tmp_path / "ours")
    config = AutoConfig.from_pretrained(tmp_path / "ours", dropout=0.25, num_hidden_layers=1)
    assert config.to_model_config() == replace(VARIANTS["whole-scaling"], dropout=0.25, num_hidden_layers=1)
    assert AutoModelForCausalLM.from_config(config).own.embedding_dropout.rate == 0.25


def test_a_new_model_has_the_initial_values_of_ours() -> None:
    config = AutoConfig.for_model("terseformer", vocab_size=50, hidden_size=16, num_hidden_layers=1)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    expected = terseformer.CausalLM(config.to_model_config()).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_stays_tied(tied: bool, tmp_path: Path) -> None:
    own, model = pair(replace(DISTINCT["attention-dense"], head=DenseHeadConfig(tied=tied)), tmp_path / "ours")
    assert (model.head.weight is model.embedding.weight) == tied
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in own.parameters())
    with torch.no_grad():
        model.embedding.weight[3] += 1
    model.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.embedding.weight, model.embedding.weight)
    assert (again.head.weight is again.embedding.weight) == tied


def test_bfloat16(tmp_path: Path) -> None:
    config = VARIANTS["whole-scaling"]
    own, _ = pair(config, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokens = draw(config, 2, 7)
    with torch.no_grad():
        assert (model(tokens).logits.float() - own(tokens)).abs().mean() < 0.1 * own(tokens).std()
    model.save_pretrained(tmp_path / "theirs")
    again = terseformer.load(tmp_path / "theirs")
    assert torch.equal(again.embedding.weight, own.embedding.weight.bfloat16().float())


@pytest.mark.parametrize("name", ["head-dense", "head-tied"])
def test_the_vocabulary_is_resized_with_a_matrix_as_head(name: str, tmp_path: Path) -> None:
    own, model = pair(VARIANTS[name], tmp_path / "ours")
    model.resize_token_embeddings(30, mean_resizing=False)
    model.save_pretrained(tmp_path / "theirs")
    again, tokens = terseformer.load(tmp_path / "theirs"), draw(own.config, 2, 7)
    assert again.config == replace(own.config, vocab_size=30)
    with torch.no_grad():
        assert torch.allclose(again(tokens)[..., :21], own(tokens), atol=1e-6)


def test_the_vocabulary_of_a_multiplicative_head_cannot_be_resized(tmp_path: Path) -> None:
    _, model = pair(VARIANTS["head-multiplicative"], tmp_path)
    with pytest.raises(UserError, match="multiplicative head cannot be resized"):
        model.resize_token_embeddings(30)


def test_a_folder_without_some_weights_is_refused(tmp_path: Path) -> None:
    pair(VARIANTS["whole-scaling"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "auto", "other"),
    [
        (DISTINCT["attention-dense"], AutoModelForSeq2SeqLM, "AutoModelForCausalLM"),
        (ENCODER_DECODERS["seq2seq-scaling"], AutoModelForCausalLM, "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_wrong_auto_class_names_the_right_one(
    config: ModelConfig | EncoderDecoderConfig, auto: type, other: str, tmp_path: Path
) -> None:
    pair(config, tmp_path)
    with pytest.raises(ConfigError, match=f"loaded by {other}"):
        auto.from_pretrained(tmp_path)
