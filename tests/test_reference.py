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

from terseformer import config as c
from terseformer.interop import trax, trax_weights
from terseformer.interop.trax_weights import Entries, TraxError
from terseformer.layers.attention import Attention, CausalSoftmax
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
from terseformer.layers.reversible import ReversibleStack
from terseformer.state import Chunk, first_chunk

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


def tensors(entries: Entries, arrays: list[np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in trax_weights.fill(entries, arrays).items()}


def load(layer: nn.Module, entries: Entries, arrays: dict[str, np.ndarray]) -> nn.Module:
    layer.load_state_dict(tensors(entries, numbered(arrays, "w")))
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
    entries: Callable[[dict[str, Any], int], Entries]
    """From the same."""
    forms: tuple[Run, ...] = (lambda layer, x: layer(x),)


PROJECTIONS = {
    "factored_dense": Case(
        lambda a, _: Multiplicative(a["d_in"], a["d_out"], a["n_modules"]),
        lambda a, _: trax_weights.multiplicative(a["d_in"], a["d_out"], a["n_modules"]),
        (Multiplicative.factored, through_dense_weight, among_many_tokens, one_by_one),
    ),
    "low_rank_dense": Case(
        lambda a, d: LowRank(d, a["n_units"], a["d_lowrank"]),
        lambda a, d: trax_weights.low_rank(d, a["n_units"], a["d_lowrank"]),
    ),
    "mult_modular_dense": Case(
        lambda a, d: MultiplicativeModular(d, a["sparsity"]),
        lambda a, d: trax_weights.multiplicative_modular(d, a["sparsity"]),
    ),
    "locally_connected_dense": Case(
        lambda a, d: LocallyConnected(d // a["n_modules"], a["n_units"], a["n_modules"], a["kernel_size"]),
        lambda a, d: trax_weights.locally_connected(
            d // a["n_modules"], a["n_units"], a["n_modules"], a["kernel_size"]
        ),
    ),
    "locally_conv_dense": Case(
        lambda a, d: LocalConvolution(
            d // a["n_modules"], a["n_units"], a["n_modules"], a["kernel_size"], a["length_kernel_size"]
        ),
        lambda a, d: trax_weights.local_convolution(
            d // a["n_modules"], a["n_units"], a["kernel_size"], a["length_kernel_size"]
        ),
    ),
    "sru": Case(
        lambda a, _: SRU(a["n_units"]),
        lambda a, _: trax_weights.sru(a["n_units"]),
        (lambda layer, x: layer(x, positions(x)),),
    ),
}


@pytest.mark.parametrize(
    ("name", "form"), [(name, i) for name, case in PROJECTIONS.items() for i in range(len(case.forms))]
)
def test_projection_or_recurrence(name: str, form: int) -> None:
    case, recorded = PROJECTIONS[name], numbers(name)
    x, y = torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["y"])
    arguments = description(name)["args"], x.shape[-1]
    layer = load(case.make(*arguments), case.entries(*arguments), recorded)
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
    load(projection, trax_weights.attention_projection(config, x.shape[-1]), recorded)
    attention = Attention(projection, description(name)["args"]["n_heads"], CausalSoftmax())
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
    size = recorded["x"].shape[-1]
    layer = feed_forward(config, size)
    load(layer, trax_weights.feed_forward(config, size), recorded)
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
    expected = tensors(trax_weights.feed_forward(feed_forward_config(name), x.shape[-1]), numbered(recorded, "grad_w"))
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        assert_close(parameter.grad, expected[key], **LAYER, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------------- models


LANGUAGE_MODELS = ["lm_dense", "lm_sparse"]
ENCODER_DECODERS = ["encdec_sparse", "terraformer_dense", "terraformer_small"]


def load_model(name: str) -> nn.Module:
    arrays = trax.read_arrays(DATA / f"{name}.weights.npy.gz")
    assert len(arrays) == description(name)["num_weights"]
    return trax.load(description(name), arrays)


def inputs(name: str) -> tuple[Tensor, ...]:
    """The tokens, or source and target; what the model continues is shifted right, as the reference does inside."""
    recorded = numbers(name)
    last = "tokens" if "tokens" in recorded else "target"
    shifted = F.pad(torch.from_numpy(recorded[last]).long(), (1, -1))
    return (shifted,) if last == "tokens" else (torch.from_numpy(recorded["source"]).long(), shifted)


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "lm_sparse_gradients", *ENCODER_DECODERS, "terraformer_gradients"])
def test_model(name: str) -> None:
    with torch.no_grad():
        logits = load_model(name)(*inputs(name))
    assert_close(logits, torch.from_numpy(numbers(name)["logits"]), **MODEL)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_token_by_token(name: str) -> None:
    model, (shifted,) = load_model(name), inputs(name)
    with torch.no_grad():
        state = model.new_state(batch=shifted.shape[0])
        logits = torch.cat([model(column, state) for column in shifted.split(1, dim=1)], dim=1)
    assert_close(logits, torch.from_numpy(numbers(name)["logits"]), **MODEL)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_token_by_token(name: str) -> None:
    model, (source, shifted) = load_model(name), inputs(name)
    with torch.no_grad():
        state = model.new_state(source)
        logits = torch.cat([model.decode(column, state) for column in shifted.split(1, dim=1)], dim=1)
    assert_close(logits, torch.from_numpy(numbers(name)["logits"]), **MODEL)


@pytest.mark.parametrize("keeps_activations", [False, True])
@pytest.mark.parametrize("name", ["lm_sparse_gradients", "terraformer_gradients"])
def test_model_loss_and_gradients(name: str, keeps_activations: bool) -> None:
    model, recorded = load_model(name), numbers(name)
    for module in model.modules():
        if isinstance(module, ReversibleStack):
            module.keeps_activations = keeps_activations
    expected_tokens = torch.from_numpy(recorded.get("tokens", recorded.get("target"))).long()
    logits = model.train()(*inputs(name))
    loss = F.cross_entropy(logits.flatten(0, 1), expected_tokens.flatten(), ignore_index=0)
    loss.backward()
    assert_close(loss.item(), description(name)["loss"], **MODEL)
    gradients = trax.read_arrays(DATA / f"{name}.grads.npy.gz")
    expected = tensors(trax_weights.model(model.config), gradients)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        # Some gradients are small as a whole: the absolute tolerance goes with their size.
        atol = 1e-4 * expected[key].abs().max().item() + 1e-7
        assert_close(parameter.grad, expected[key], rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------------------------- what does not fit


def test_weights_that_do_not_fit_name_the_first_place_where_shapes_part() -> None:
    entries = trax_weights.model(trax.model_config(description("lm_dense")))
    arrays = trax.read_arrays(DATA / "lm_dense.weights.npy.gz")
    with pytest.raises(TraxError, match=rf"has {len(arrays) + 1} weights, but the model has {len(arrays)}; .* \[3\]"):
        trax_weights.fill(entries, [*arrays, np.zeros(3)])
    with pytest.raises(TraxError, match=rf"ends after {len(arrays) - 1} weights; head.bias"):
        trax_weights.fill(entries, arrays[:-1])
    arrays[2] = np.zeros(3)
    with pytest.raises(TraxError, match=r"weight 2 of the file has shape \[3\], but blocks.0.attention_norm.weight"):
        trax_weights.fill(entries, arrays)


def test_a_table_of_positions_may_be_a_product() -> None:
    """As the reference has it where `PositionalEncoding.d_feature` is set."""
    entries = trax_weights.model(trax.model_config(description("lm_dense")))
    arrays = trax.read_arrays(DATA / "lm_dense.weights.npy.gz")
    (place,) = (index for index, entry in enumerate(entries) if entry.name == "position.weight")
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(len(arrays[place]), 3)), draw.normal(size=(3, arrays[place].shape[1]))
    weights = trax_weights.fill(entries, [*arrays[:place], left, right, *arrays[place + 1 :]])
    np.testing.assert_array_equal(weights["position.weight"], left @ right)
    expected = trax_weights.fill(entries, arrays) | {"position.weight": left @ right}
    assert all(np.array_equal(weights[name], value) for name, value in expected.items())


def lsh(implementation: str = "PureLSHSelfAttention", **options: Any) -> dict[str, Any]:
    return {"type": "PureLSHSelfAttentionWrapper", "args": {"pure_lsh_implementation": implementation} | options}


LANGUAGE = {"vocab_size": 64}
WRAPPED = {"input_vocab_size": 64, "encoder_attention_type": lsh(), "encoder_decoder_attention_type": lsh()}
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lsh": (
        "ConfigurableTerraformer",
        WRAPPED
        | {
            "encoder_attention_type": lsh(n_chunks_after=1, n_hashes=2, n_parallel_heads=8, bias=False),
            "encoder_decoder_attention_type": lsh("MixedLSHSelfAttention", weights_format="sparse", std_length=99),
        },
        {
            "position": "fixed_base",
            "encoder_attention": c.DenseProjectionConfig(bias=False),
            "encoder_attention_pattern": c.LSHPatternConfig(chunks_after=1, num_hashes=2),
            "attention": c.SparseProjectionConfig(qkv_modules=16),
            "attention_pattern": c.MixedPatternConfig(num_hashes=1, exact_length=99),
        },
    ),
    "lsh, two weights": (
        "ConfigurableTransformerLM",
        LANGUAGE | {"attention_type": lsh(weights_format="sparse", num_weights=2, n_buckets=8, chunk_len=4)},
        {
            "attention": c.SparseProjectionConfig(qkv_modules=16, share_qk=True),
            "attention_pattern": c.LSHPatternConfig(num_hashes=1, num_buckets=8, chunk_length=4),
        },
    ),
    "favor": (
        "ConfigurableTransformer",
        {
            "input_vocab_size": 64,
            "encoder_attention_type": "Favor",
            "encoder_decoder_attention_type": "CausalFavor",
            "pos_type": "sin-cos",
        },
        {
            "encoder_attention_pattern": c.FavorPatternConfig(),
            "attention_pattern": c.FavorPatternConfig(),
            "position": "sin_cos",
        },
    ),
    "axial": (
        "ConfigurableTransformerLM",
        LANGUAGE | {"pos_type": "axial", "pos_axial_shape": [64, 32], "pos_d_axial_embs": [500, 12]},
        {"position": "axial", "axial_shape": (64, 32), "axial_sizes": (500, 12)},
    ),
    "by heads": (
        "ConfigurableTerraformer",
        {
            "input_vocab_size": 64,
            "d_attention_key": 128,
            "encoder_decoder_attention_type": {"type": "LSHSelfAttention", "args": {"n_hashes": 4, "chunk_len": 64}},
        },
        {
            "encoder_attention": c.DenseProjectionConfig(bias=False),
            "encoder_attention_pattern": c.SoftmaxPatternConfig(),
            "attention": c.DenseProjectionConfig(bias=False),
            "attention_pattern": c.LSHPatternConfig(num_hashes=4, chunk_length=64),
        },
    ),
    "infinite": ("ConfigurableTransformerLM", LANGUAGE | {"pos_type": "infinite"}, {"position": "infinite"}),
    "forgetting": (
        "ConfigurableTerraformer",
        WRAPPED | {"n_layers_forget": 2, "center_layernorm": False, "pos_type": None},
        {"forget_every": 2, "norm": "rms_norm", "last_norm": "layer_norm", "position": "learned"},
    ),
    "nothing to forget": (
        "ConfigurableTerraformer",
        WRAPPED | {"n_layers_forget": 2, "forget_dense": False},
        {"forget_every": 0, "norm": "layer_norm"},
    ),
    "growing": (
        "ConfigurableTerraformer",
        WRAPPED | {"half_before_layer": 2, "double_after_layer": 3, "ff_sparsity": [8, 16]},
        {"half_before_layer": 2, "double_after_layer": 3},
    ),
}


@pytest.mark.parametrize(("name", "args", "expected"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(name: str, args: dict[str, Any], expected: dict[str, Any]) -> None:
    """What they amount to, and that the weights in Trax's order fill the model."""
    described = {"model": name, "args": {"d_model": 512, "d_ff": 64, "max_len": 99, "n_heads": 4} | args}
    config, layouts = trax._read(described)
    assert trax.model_config(described) == config
    assert {key: getattr(config, key) for key in expected} == expected
    entries = trax_weights.model(config, layouts)
    arrays = [np.full(entry.shape, index, np.float32) for index, entry in enumerate(entries)]
    assert set(trax.load(described, arrays).state_dict()) > {"embedding.weight"}


@pytest.mark.parametrize("kind", ["SelfAttention", "LSHSelfAttention"])
def test_weights_that_lie_head_by_head(kind: str) -> None:
    """One layer against the sum over heads, each with matrices of its own."""
    size, heads, length = 12, 3, 7
    args = {"d_model": size, "d_ff": 8, "n_heads": heads, "n_layers": 1, "attention_type": kind}
    described = {"model": "ConfigurableTransformerLM", "args": LANGUAGE | args | {"max_len": 16}}
    entries = trax_weights.model(*trax._read(described))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(entry.shape).astype(np.float32) for entry in entries]
    layer = trax.load(described, arrays).blocks[0].attention
    first = next(index for index, entry in enumerate(entries) if entry.shape == (heads, size, size // heads))
    *queries_keys, values, outs = arrays[first : first + (4 if kind == "SelfAttention" else 3)]
    x = rng.standard_normal((length, size)).astype(np.float32)
    expected = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (x @ matrix[head] for matrix in (queries_keys[0], queries_keys[-1], values))
        if kind == "SelfAttention":
            scores, seen = q @ k.T / (size // heads) ** 0.5, np.tri(length)
        else:
            k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) / (size // heads) ** 0.5
            scores, seen = q @ k.T, np.tri(length, k=-1)
            seen[0, 0] = 1
        weights = np.exp(np.where(seen == 1, scores, -np.inf) - scores.max(-1, keepdims=True))
        expected += weights / weights.sum(-1, keepdims=True) @ v @ outs[head]
    inputs = torch.from_numpy(x)[None]
    assert_close(layer(inputs, first_chunk(inputs))[0], torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Reformer"}, "the model 'Reformer' cannot be taken over; allowed are ConfigurableTransformerLM"),
        ({"args": 3}, "args must be a table of arguments, not 3"),
        ({"model": ["Reformer"]}, r"the model \['Reformer'\] cannot be taken over"),
        ({"args": {}}, "vocab_size must be given"),
        ({"args": LANGUAGE | {"n_layers": "two"}}, "n_layers must be a whole number, not 'two'"),
        ({"args": LANGUAGE | {"d_model": 64.5}}, "d_model must be a whole number, not 64.5"),
        ({"args": LANGUAGE | {"dropout": "x"}}, "dropout must be a number, not 'x'"),
        ({"args": LANGUAGE | {"ff_sparsity": "a b"}}, "ff_sparsity must be a number, or 2 or 4 of them, not 'a b'"),
        ({"args": LANGUAGE | {"ff_sparsity": 0.5}}, "ff_sparsity must be a whole number, or 2 or 4 numbers, not 0.5"),
        (
            {"args": LANGUAGE | {"ff_use_sru": [1, 2, 3]}},
            r"ff_use_sru must be a number of layers, or that",
        ),
        ({"args": {"vocab_size": 64, "pos_type": "time-bin"}}, "pos_type = 'time-bin' is not known here"),
        ({"args": {"vocab_size": 64, "surprise": 1}}, "the argument 'surprise' of ConfigurableTransformerLM"),
        ({"args": {"vocab_size": 64, "n_heads": 7}}, "do not fit together: model.hidden_size = 512"),
        ({"args": {"vocab_size": 64, "ff_sparsity": [1, 2, 3]}}, "the number of values of ff_sparsity = 3"),
        ({"args": {"vocab_size": 64, "attention_type": "EncDecAttention"}}, "attention_type = 'EncDecAttention'"),
        ({"args": {"vocab_size": 64, "attention_type": ["Attention", "CausalAttention"]}}, "names different types"),
        ({"args": LANGUAGE | {"attention_type": "Attention"}}, "attention_type = 'Attention' sees later tokens in the"),
        (
            {
                "model": "ConfigurableTransformer",
                "args": {"input_vocab_size": 64, "encoder_attention_type": "MultiplicativeConvCausalAttention"},
            },
            "encoder_attention_type = 'MultiplicativeConvCausalAttention' sees earlier tokens only in the reference",
        ),
        ({"args": {"vocab_size": 64, "pos_type": "infinite-affine"}}, "pos_type = 'infinite-affine' is not known here"),
        *(
            ({"args": LANGUAGE | {"attention_type": {"type": "SelfAttention", "args": options}}}, message)
            for options, message in (
                ({"share_qk": True}, "share_qk = True is not known here; allowed are False"),
                ({"bias": True}, "bias = True is not known here; allowed are False"),
                ({"chunk_len": 64}, "chunk_len = 64 is not known here; allowed are None"),
                ({"surprise": 1}, "the argument 'surprise' of SelfAttention is not known here"),
            )
        ),
        (
            {"model": "ConfigurableTerraformer", "args": WRAPPED | {"double_after_layer": 1, "ff_sparsity": 4}},
            "ff_sparsity as one number gives layers of different width controllers of different rank",
        ),
        ({"args": LANGUAGE | {"attention_type": lsh(num_weights=2)}}, "num_weights = 2 is not known here"),
        ({"args": LANGUAGE | {"attention_type": lsh(n_buckets=[4, 6])}}, r"n_buckets = \[4, 6\] is not known here"),
        ({"args": LANGUAGE | {"attention_type": lsh(surprise=1)}}, "the argument 'surprise' of PureLSHSelfAttention"),
        ({"args": LANGUAGE | {"attention_type": lsh(rotary_position_emb=True)}}, "rotary_position_emb = True is not"),
        (
            {"args": LANGUAGE | {"attention_type": {"type": "CausalFavor", "args": {"use_approximate_softmax": True}}}},
            "use_approximate_softmax = True is not known here",
        ),
    ],
)
def test_a_description_that_cannot_be_taken_over(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraxError, match=message):
        trax.model_config({"model": "ConfigurableTransformerLM", "args": {"vocab_size": 64}} | change)


def test_a_truncated_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy.gz"
    path.write_bytes((DATA / "lm_dense.weights.npy.gz").read_bytes()[:-500])
    with pytest.raises(TraxError, match=r"cannot read weight \d+ of"):
        trax.read_arrays(path)
