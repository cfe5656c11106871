"""Contract 3: with the reference's weights, layers and models give its outputs and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import trax_weights
from terseformer import config as c
from terseformer.layers.attention import Attention
from terseformer.layers.feedforward import SparseFeedForward, feed_forward
from terseformer.layers.projection import (
    LocalConvolution,
    LocallyConnected,
    LowRank,
    Multiplicative,
    MultiplicativeModular,
)
from terseformer.layers.qkv import attention_projection
from terseformer.layers.recurrence import SRU
from terseformer.model import CausalLM
from terseformer.state import Chunk

DATA = Path(__file__).parent / "reference_data"

LAYER = {"atol": 1e-5, "rtol": 1e-5}
MODEL = {"atol": 1e-4, "rtol": 1e-4}


def description(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def numbered(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    """The arrays `prefix0, prefix1, ...`"""
    count = sum(key.startswith(prefix) for key in arrays)
    return [arrays[f"{prefix}{i}"] for i in range(count)]


def load(layer: nn.Module, mapping: Callable[..., Any], arrays: dict[str, np.ndarray]) -> nn.Module:
    weights = iter(numbered(arrays, "w"))
    layer.load_state_dict(trax_weights.tensors(mapping(weights)))
    assert not list(weights), "a recorded weight was not used"
    return layer


def positions(x: Tensor) -> Chunk:
    return Chunk(torch.arange(x.shape[1]).expand(x.shape[:2]))


# -------------------------------------------------------------------------------------- projections

Run = Callable[[Any, Tensor], Tensor]


def through_dense_weight(layer: Multiplicative, x: Tensor) -> Tensor:
    return F.linear(x, layer.dense_weight().t(), layer.bias)


def among_many_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """So many tokens that the layer takes the form meant for training."""
    return layer(x.repeat(50, 1, 1))[: x.shape[0]]


def one_by_one(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([layer(token) for token in x.flatten(0, 1)]).view(*x.shape[:2], -1)


@dataclass(frozen=True)
class Case:
    make: Callable[[dict[str, Any], int], nn.Module]
    """From the Trax layer's arguments and the size of the input."""
    mapping: Callable[..., Any]
    forms: tuple[Run, ...] = (lambda layer, x: layer(x),)


PROJECTIONS = {
    "factored_dense": Case(
        lambda a, _: Multiplicative(a["d_in"], a["d_out"], a["n_modules"]),
        trax_weights.multiplicative,
        (Multiplicative.factored, through_dense_weight, among_many_tokens, one_by_one),
    ),
    "low_rank_dense": Case(lambda a, d: LowRank(d, a["n_units"], a["d_lowrank"]), trax_weights.low_rank),
    "mult_modular_dense": Case(
        lambda a, d: MultiplicativeModular(d, a["sparsity"]), trax_weights.multiplicative_modular
    ),
    "locally_connected_dense": Case(
        lambda a, d: LocallyConnected(d // a["n_modules"], a["n_units"], a["n_modules"], a["kernel_size"]),
        trax_weights.locally_connected,
    ),
    "locally_conv_dense": Case(
        lambda a, d: LocalConvolution(
            d // a["n_modules"], a["n_units"], a["n_modules"], a["kernel_size"], a["length_kernel_size"]
        ),
        trax_weights.local_convolution,
    ),
    "sru": Case(lambda a, _: SRU(a["n_units"]), trax_weights.sru, (lambda layer, x: layer(x, positions(x)),)),
}


@pytest.mark.parametrize(
    ("name", "form"), [(name, i) for name, case in PROJECTIONS.items() for i in range(len(case.forms))]
)
def test_projection_or_recurrence(name: str, form: int) -> None:
    case, recorded = PROJECTIONS[name], numbers(name)
    x, y = torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["y"])
    layer = load(case.make(description(name)["args"], x.shape[-1]), case.mapping, recorded)
    assert_close(case.forms[form](layer, x), y, **LAYER)


# ---------------------------------------------------------------------------------------- attention


def attention_config(name: str) -> c.AttentionProjectionConfig:
    a = description(name)["args"]
    if description(name)["layer"] == "CausalAttention":
        return c.DenseProjectionConfig()
    return c.SparseProjectionConfig(
        qkv_modules=a["sparsity"],
        length_kernel=a["length_kernel_size"],
        share_qk=a.get("share_qk", False),
        output_layer=a.get("output_layer_type", "none"),
        value_input=a.get("v_concat_type", "none"),
    )


@pytest.mark.parametrize("name", ["causal_attention", "mult_conv_attention", "mult_conv_attention_sharedqk_multconv"])
def test_attention(name: str) -> None:
    recorded, config = numbers(name), attention_config(name)
    x, y = torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["y"])
    projection = attention_projection(config, x.shape[-1])
    load(projection, lambda w: trax_weights.attention_projection(config, w), recorded)
    attention = Attention(projection, description(name)["args"]["n_heads"])
    assert_close(attention(x, positions(x)), y, **LAYER)


# ------------------------------------------------------------------------------------- feed-forward


def feed_forward_config(name: str) -> c.FeedForwardConfig:
    a = description(name)["args"]
    size = a["d_ff"]
    match description(name)["layer"]:
        case "BlockSparseFF":
            return c.BlockFeedForwardConfig(intermediate_size=size, num_experts=a["n_experts"])
        case "SwitchSparseFF":
            return c.SwitchFeedForwardConfig(intermediate_size=size, num_experts=a["n_experts"])
    return c.SparseFeedForwardConfig(
        intermediate_size=size,
        ff_block_size=a["n_elements_in_block"],
        controller_rank=a["d_lowrank"],
        multiply_by_controller=a.get("multiply_by_controller_output", False),
        temperature=a.get("temperature", 0.1),
        quant_prob=a.get("quant_prob", 0.3),
    )


def load_feed_forward(name: str) -> tuple[SparseFeedForward, dict[str, np.ndarray]]:
    recorded, config = numbers(name), feed_forward_config(name)
    layer = feed_forward(config, recorded["x"].shape[-1])
    load(layer, lambda w: trax_weights.feed_forward(config, w), recorded)
    return layer, recorded


@pytest.mark.parametrize("form", [SparseFeedForward.masked, SparseFeedForward.gathered, among_many_tokens, one_by_one])
@pytest.mark.parametrize(
    "name", ["sparse_ff_eval", "sparse_ff_multiply_eval", "block_sparse_ff_eval", "switch_sparse_ff_eval"]
)
def test_feed_forward(name: str, form: Run) -> None:
    layer, recorded = load_feed_forward(name)
    x, y = torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["y"])
    assert_close(form(layer.eval(), x), y, **LAYER)


@pytest.mark.parametrize("name", ["sparse_ff_train_hard", "sparse_ff_train_soft"])
def test_feed_forward_in_training(name: str) -> None:
    layer, recorded = load_feed_forward(name)
    x = torch.from_numpy(recorded["x"]).requires_grad_()
    y = layer.train()(x)
    (y * torch.from_numpy(recorded["cotangent"])).sum().backward()
    assert_close(y, torch.from_numpy(recorded["y"]), **LAYER)
    assert_close(x.grad, torch.from_numpy(recorded["grad_x"]), **LAYER)
    expected = trax_weights.tensors(trax_weights.sparse_feed_forward(iter(numbered(recorded, "grad_w"))))
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        assert_close(parameter.grad, expected[key], **LAYER, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------------- models


def load_model(name: str) -> tuple[CausalLM, Tensor, Tensor]:
    """The model, the tokens, and the tokens shifted right as the reference does inside."""
    config = trax_weights.language_model_config(description(name)["args"])
    model = CausalLM(config)
    arrays = trax_weights.read_arrays(DATA / f"{name}.weights.npy.gz")
    assert len(arrays) == description(name)["num_weights"]
    model.load_state_dict(trax_weights.tensors(trax_weights.language_model(config, arrays)))
    tokens = torch.from_numpy(numbers(name)["tokens"]).long()
    return model, tokens, F.pad(tokens, (1, -1))


@pytest.mark.parametrize("name", ["lm_dense", "lm_sparse", "lm_sparse_gradients"])
def test_model(name: str) -> None:
    model, _, shifted = load_model(name)
    with torch.no_grad():
        logits = model.eval()(shifted)
    assert_close(logits, torch.from_numpy(numbers(name)["logits"]), **MODEL)


@pytest.mark.parametrize("name", ["lm_dense", "lm_sparse"])
def test_model_token_by_token(name: str) -> None:
    model, _, shifted = load_model(name)
    model.eval()
    with torch.no_grad():
        state = model.new_state(batch=shifted.shape[0])
        logits = torch.cat([model(column, state) for column in shifted.split(1, dim=1)], dim=1)
    assert_close(logits, torch.from_numpy(numbers(name)["logits"]), **MODEL)


def test_model_loss_and_gradients() -> None:
    name = "lm_sparse_gradients"
    model, tokens, shifted = load_model(name)
    loss = F.cross_entropy(model.train()(shifted).flatten(0, 1), tokens.flatten(), ignore_index=0)
    loss.backward()
    assert_close(loss.item(), description(name)["loss"], **MODEL)
    gradients = trax_weights.read_arrays(DATA / f"{name}.grads.npy.gz")
    expected = trax_weights.tensors(trax_weights.language_model(model.config, gradients))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        # Some gradients are small as a whole: the absolute tolerance goes with their size.
        atol = 1e-4 * expected[key].abs().max().item() + 1e-7
        assert_close(parameter.grad, expected[key], rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------- the mapping's own mistakes


def test_a_weight_too_many_is_an_error() -> None:
    config = trax_weights.language_model_config(description("lm_dense")["args"])
    arrays = trax_weights.read_arrays(DATA / "lm_dense.weights.npy.gz")
    with pytest.raises(ValueError, match=r"1 weights have no place in this model; their shapes are \[\(3,\)\]"):
        trax_weights.language_model(config, [*arrays, np.zeros(3)])
