"""Takes over models that were trained with Trax, the reference implementation."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terseformer import checkpoint
from terseformer import config as c
from terseformer.config import ConfigError
from terseformer.interop.trax_weights import TraxError, fill, model
from terseformer.model import CausalLM
from terseformer.models import make_model
from terseformer.seq2seq import Seq2Seq
from terseformer.terraformer import Terraformer

ModelConfig = c.ModelConfig | c.EncoderDecoderConfig


def convert(description: Path, weights: Path, folder: Path) -> None:
    """Writes a Trax model as a checkpoint folder.

    Args:
        description: a JSON file with `model`, the Trax function's name, and `args`, what it was called with.
        weights: `model.weights.npy.gz`, or `model.pkl.gz` with the weights inside.
        folder: the new folder.

    Raises:
        TraxError: a file cannot be read, or the weights do not fit the description.
        CheckpointError: the folder cannot be written.
    """
    try:
        described = json.loads(description.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraxError(f"cannot read {description}: {error}") from None
    if not isinstance(described, dict):
        raise TraxError(f"{description} must hold a table with model and args")
    arrays = read_pickled_arrays(weights) if weights.name.endswith((".pkl.gz", ".pkl")) else read_arrays(weights)
    checkpoint.save_model(folder, load(described, arrays))


def read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of a `*.npy.gz` file that Trax's trainer wrote.

    Raises:
        TraxError: it is missing, truncated or no such file.
    """
    arrays: list[np.ndarray] = []
    try:
        with gzip.open(path, "rb") as file:
            while file.peek(1):
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise TraxError(f"cannot read weight {len(arrays)} of {path}: {error}") from None
    return arrays


class _ArraysOnly(pickle.Unpickler):
    """Reads containers, numbers and NumPy arrays; calls nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": np.empty(0).__reduce__()[0],  # makes an empty array, which then gets its bytes
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def read_pickled_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of a `model.pkl.gz` that Trax's trainer wrote, without running what else it may hold.

    Raises:
        TraxError: it is missing, damaged, or holds anything but containers, numbers and arrays.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = _ArraysOnly(file).load()
        weights = content["flat_weights"]
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        MemoryError,
        pickle.UnpicklingError,
    ) as error:
        raise TraxError(f"cannot read {path}: {error}") from None
    if not isinstance(weights, (list, tuple)) or not all(isinstance(array, np.ndarray) for array in weights):
        raise TraxError(f"{path} holds no weights itself; give the model.weights.npy.gz beside it")
    return list(weights)


def load(description: Mapping[str, Any], arrays: list[np.ndarray]) -> CausalLM | Seq2Seq | Terraformer:
    """The model of a description, with its weights, in eval mode.

    Args:
        description: `model`, the Trax function's name, and `args`, what it was called with.
        arrays: the weights in Trax's order.

    Raises:
        TraxError: the model is none of those that can be taken over, or the weights do not fit it.
    """
    config = model_config(description)
    weights = {name: torch.from_numpy(array) for name, array in fill(model(config), arrays).items()}
    made = make_model(config)
    made.load_state_dict(weights)
    return made.eval()


def model_config(description: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Trax model's name and arguments amount to.

    Raises:
        TraxError: a model or an argument that is not known here.
    """
    name, arguments = description.get("model"), description.get("args", {})
    if name not in _MODELS:
        raise TraxError(f"the model {name!r} cannot be taken over; allowed are {', '.join(_MODELS)}")
    if not isinstance(arguments, Mapping):
        raise TraxError(f"args must be a table of arguments, not {arguments!r}")
    taken = _Arguments(dict(arguments))
    try:
        config = _MODELS[name](taken)
    except ConfigError as error:
        raise TraxError(f"the arguments of {name} do not fit together: {error}") from None
    taken.check_all_used(name)
    return config


# What matters only in training, on an accelerator or in the reference's own way of decoding.
_IRRELEVANT = frozenset(
    {
        "attention_chunk_size",
        "dropout_shared_axes",
        "ff_chunk_size",
        "ff_dropout",
        "forget_dense",
        "loss_d_lowrank",
        "loss_sparsity_prob",
        "mode",
        "pos_max_offset_to_add",
        "pos_start_from_zero_prob",
        "use_bfloat16",
    }
)
_IRRELEVANT_OPTIONS = frozenset({"causal", "dropout", "force_no_dropout", "max_inference_length", "mode"})


class _Arguments:
    """What a Trax model was called with."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def take(self, name: str, default: Any = None) -> Any:
        """An argument's value; it is used up."""
        return self._values.pop(name, default)

    def check_all_used(self, model_name: str) -> None:
        """Raises TraxError for an argument that nobody asked for."""
        left = [name for name in self._values if name not in _IRRELEVANT]
        if left:
            raise TraxError(f"the argument {left[0]!r} of {model_name} is not known here")


def _common(a: _Arguments, pos_type: str | None = None) -> dict[str, Any]:
    """What all three models share; `pos_type` is the default."""
    size, units = a.take("d_model", 512), a.take("d_ff", 2048)
    loss_modules = a.take("loss_sparsity", 0)
    _require("loss_sparsity_type", a.take("loss_sparsity_type", "mult"), "mult")
    _require("pos_axial_shape", a.take("pos_axial_shape") or None, None)
    a.take("pos_d_axial_embs")
    return {
        "hidden_size": size,
        "num_attention_heads": a.take("n_heads", 8),
        "max_position_embeddings": a.take("max_len", 2048),
        "position": _position(a.take("pos_type", pos_type)),
        "dropout": float(a.take("dropout", 0.1)),
        "feed_forward": _feed_forward(a, size, units),
        "sru": _sru(a.take("ff_use_sru", 0)),
        "head": c.MultiplicativeHeadConfig(head_modules=loss_modules) if loss_modules else c.DenseHeadConfig(),
    }


def _require(name: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        raise TraxError(f"{name} = {value!r} is not known here; allowed are {', '.join(map(repr, allowed))}")


def _position(kind: str | None) -> str:
    _require("pos_type", kind, None, "sin-cos")
    return "learned" if kind is None else "sinusoidal"


def _sru(value: Any) -> c.SRUConfig:
    if not value:
        return c.SRUConfig()
    layers, size = value if isinstance(value, (list, tuple)) else (value, 32)
    return c.SRUConfig(num_layers=layers, size=size)


def _feed_forward(a: _Arguments, size: int, units: int) -> c.FeedForwardConfig:
    sparsity, kind = a.take("ff_sparsity", 0), a.take("ff_sparsity_type", "1inN")
    activation = a.take("ff_activation", "Relu")
    if isinstance(sparsity, str):
        sparsity = [float(word) if "." in word else int(word) for word in sparsity.split()]
    if not sparsity:
        name = activation.get("type") if isinstance(activation, Mapping) else activation
        _require("ff_activation", name, "Relu", "Gelu")
        return c.DenseFeedForwardConfig(intermediate_size=units, activation="relu" if name == "Relu" else "gelu")
    values = sparsity if isinstance(sparsity, (list, tuple)) else [sparsity, units // sparsity]
    if kind == "1inN":
        _require("the number of values of ff_sparsity", len(values), 2, 4)
        block, rank, temperature, quant_prob = [*values, 0.1, 0.3][:4] if len(values) == 2 else values
        return c.SparseFeedForwardConfig(
            intermediate_size=units,
            ff_block_size=int(block),
            controller_rank=int(rank),
            temperature=float(temperature),
            quant_prob=float(quant_prob),
        )
    _require("ff_sparsity_type", kind, "1inN", "Block", "Switch")
    experts = c.BlockFeedForwardConfig if kind == "Block" else c.SwitchFeedForwardConfig
    return experts(intermediate_size=units, num_experts=int(values[0]))


def _attention(name: str, value: Any, heads: int) -> c.AttentionProjectionConfig:
    """The projection of an attention: `{"type": NAME, "args": {…}}`, its name, or a list of equal ones."""
    if isinstance(value, (list, tuple)) and value:
        if any(other != value[0] for other in value):
            raise TraxError(f"{name} names different types of attention; here all blocks have the same")
        value = value[0]
    kind, options = (value.get("type"), dict(value.get("args", {}))) if isinstance(value, Mapping) else (value, {})
    modules = options.pop("sparsity", None) or heads
    config: c.AttentionProjectionConfig
    match kind:
        case "Attention" | "CausalAttention":
            config = c.DenseProjectionConfig()
        case "LowRankCausalAttention":
            config = c.LowRankProjectionConfig(rank=options.pop("lowrank", 64))
        case "MultiplicativeCausalAttention":
            config = c.MultiplicativeProjectionConfig(qkv_modules=modules)
        case "MultiplicativeModularCausalAttention":
            config = c.MultiplicativeModularProjectionConfig(qkv_modules=modules)
        case "ModularCausalAttention":
            kernel = options.pop("kernel_size", 1)
            config = c.LocallyConnectedProjectionConfig(qkv_modules=modules, module_kernel=kernel)
        case "ConvCausalAttention":
            kernel = options.pop("kernel_size", 1)
            config = c.LocalConvolutionProjectionConfig(qkv_modules=modules, module_kernel=kernel, length_kernel=1)
        case "MultiplicativeConvCausalAttention":
            config = c.SparseProjectionConfig(
                qkv_modules=modules,
                length_kernel=options.pop("length_kernel_size", 3),
                share_qk=options.pop("share_qk", False),
                output_layer=options.pop("output_layer_type", "none"),
                value_input=options.pop("v_concat_type", "none"),
            )
        case _:
            raise TraxError(f"{name} = {kind!r} is not known here; allowed are {', '.join(_ATTENTIONS)}")
    if left := [option for option in options if option not in _IRRELEVANT_OPTIONS]:
        raise TraxError(f"the argument {left[0]!r} of {kind} is not known here")
    if modules == 1 and getattr(config, "module_kernel", None):
        raise TraxError(f"{kind} with a sparsity of 1 has dense layers in the reference; that is not known here")
    return config


_ATTENTIONS = (
    "Attention",
    "CausalAttention",
    "LowRankCausalAttention",
    "MultiplicativeCausalAttention",
    "MultiplicativeModularCausalAttention",
    "ModularCausalAttention",
    "ConvCausalAttention",
    "MultiplicativeConvCausalAttention",
)


def _language_model(a: _Arguments) -> c.ModelConfig:
    common = _common(a)
    attention = _attention("attention_type", a.take("attention_type", "CausalAttention"), common["num_attention_heads"])
    vocab_size, layers = a.take("vocab_size"), a.take("n_layers", 6)
    _require_number("vocab_size", vocab_size)
    return c.ModelConfig(vocab_size=vocab_size, num_hidden_layers=layers, attention=attention, **common)


def _require_number(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TraxError(f"{name} must be given, as a whole number")


def _encoder_decoder(
    a: _Arguments, attention: str, causal_attention: str, pos_type: str | None = None
) -> dict[str, Any]:
    """What the two encoder-decoders share; the types of attention and of positions are their defaults."""
    common = _common(a, pos_type)
    heads, vocab_size = common["num_attention_heads"], a.take("input_vocab_size")
    _require_number("input_vocab_size", vocab_size)
    _require("output_vocab_size", a.take("output_vocab_size"), None, vocab_size)
    return common | {
        "vocab_size": vocab_size,
        "num_encoder_layers": a.take("n_encoder_layers", 6),
        "num_decoder_layers": a.take("n_decoder_layers", 6),
        "encoder_attention": _attention("encoder_attention_type", a.take("encoder_attention_type", "Attention"), heads),
        "attention": _attention(
            "encoder_decoder_attention_type", a.take("encoder_decoder_attention_type", causal_attention), heads
        ),
    }


def _seq2seq(a: _Arguments) -> c.Seq2SeqConfig:
    modules = a.take("enc_dec_attention_sparsity", 0)
    cross = c.SparseCrossProjectionConfig(qkv_modules=modules) if modules else c.DenseProjectionConfig()
    return c.Seq2SeqConfig(cross_attention=cross, **_encoder_decoder(a, "Attention", "CausalAttention"))


def _terraformer(a: _Arguments) -> c.TerraformerConfig:
    _require("n_layers_forget", a.take("n_layers_forget", 0), 0)
    for name in ("half_before_layer", "double_after_layer"):
        _require(name, a.take(name), None, 0)
    _require("center_layernorm", a.take("center_layernorm", True), True)
    widths = a.take("d_attention_key"), a.take("d_attention_value")
    config = c.TerraformerConfig(
        num_attention_layers=a.take("n_decoder_attention_layers", 2),
        reversible_encoder=a.take("reversible_encoder", False),
        swap_twice=a.take("use_two_swaps_per_encoder_block", True),
        **_encoder_decoder(a, "SelfAttention", "SelfAttention", "fixed-base"),
    )
    for name, width in zip(("d_attention_key", "d_attention_value"), widths, strict=True):
        _require(name, width, None, config.head_dim)
    return config


_MODELS = {
    "ConfigurableTransformerLM": _language_model,
    "ConfigurableTransformer": _seq2seq,
    "ConfigurableTerraformer": _terraformer,
}
