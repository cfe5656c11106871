"""Takes over models that were trained with Trax, the reference implementation."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import tokenize
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terseformer import checkpoint
from terseformer import config as c
from terseformer.config import ConfigError
from terseformer.interop.trax_attention import attention, require
from terseformer.interop.trax_weights import Layout, TraxError, fill, model
from terseformer.model import CausalLM
from terseformer.models import make_model
from terseformer.seq2seq import Seq2Seq
from terseformer.terraformer import Terraformer

ModelConfig = c.ModelConfig | c.EncoderDecoderConfig

# What gzip, NumPy and pickle raise when bytes of a file are wrong.
_DAMAGED = (
    OSError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    RuntimeError,
    pickle.UnpicklingError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)


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
    except _DAMAGED as error:
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
    except _DAMAGED as error:
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
    config, layouts = _read(description)
    weights = {name: torch.from_numpy(array) for name, array in fill(model(config, layouts), arrays).items()}
    made = make_model(config)
    made.load_state_dict(weights)
    return made.eval()


def model_config(description: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Trax model's name and arguments amount to.

    Raises:
        TraxError: a model or an argument that is not known here.
    """
    return _read(description)[0]


def _read(description: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Layout]]:
    """The configuration, and how the weights of its attentions lie."""
    name, arguments = description.get("model"), description.get("args", {})
    if not isinstance(name, str) or name not in _MODELS:
        raise TraxError(f"the model {name!r} cannot be taken over; allowed are {', '.join(_MODELS)}")
    if not isinstance(arguments, Mapping):
        raise TraxError(f"args must be a table of arguments, not {arguments!r}")
    taken = _Arguments(dict(arguments))
    try:
        config = _MODELS[name](taken)
    except ConfigError as error:
        raise TraxError(f"the arguments of {name} do not fit together: {error}") from None
    taken.check_all_used(name)
    return config, taken.layouts


# What matters only in training, on an accelerator or in the reference's own way of decoding.
_IRRELEVANT = frozenset(
    {
        "attention_chunk_size",
        "dropout_shared_axes",
        "ff_chunk_size",
        "ff_dropout",
        "loss_d_lowrank",
        "loss_sparsity_prob",
        "mode",
        "pos_max_offset_to_add",
        "pos_start_from_zero_prob",
        "use_bfloat16",
    }
)


class _Arguments:
    """What a Trax model was called with."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.layouts: dict[str, Layout] = {}
        """How the weights of our attentions lie."""

    def take(self, name: str, default: Any = None) -> Any:
        """An argument's value; it is used up."""
        return self._values.pop(name, default)

    def take_whole(self, name: str, default: int | None = None) -> int:
        """An argument that is a whole number, None being the default. Raises TraxError if it is something else."""
        value = self.take(name)
        value = default if value is None else value
        if value is None:
            raise TraxError(f"{name} must be given, as a whole number")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TraxError(f"{name} must be a whole number, not {value!r}")
        return value

    def get(self, name: str) -> Any:
        """An argument's value, which somebody else uses up."""
        return self._values.get(name)

    def check_all_used(self, model_name: str) -> None:
        """Raises TraxError for an argument that nobody asked for."""
        left = [name for name in self._values if name not in _IRRELEVANT]
        if left:
            raise TraxError(f"the argument {left[0]!r} of {model_name} is not known here")


def _common(a: _Arguments, pos_type: str | None = None) -> dict[str, Any]:
    """What all three models share; `pos_type` is the default."""
    size, units = a.take_whole("d_model", 512), a.take_whole("d_ff", 2048)
    loss_modules, dropout = a.take_whole("loss_sparsity", 0), a.take("dropout", 0.1)
    if not isinstance(dropout, (int, float)):
        raise TraxError(f"dropout must be a number, not {dropout!r}")
    require("loss_sparsity_type", a.take("loss_sparsity_type", "mult"), "mult")
    return {
        "hidden_size": size,
        "num_attention_heads": a.take_whole("n_heads", 8),
        "max_position_embeddings": a.take_whole("max_len", 2048),
        **_position(a, pos_type),
        "dropout": float(dropout),
        "feed_forward": _feed_forward(a, size, units),
        "sru": _sru(a.take("ff_use_sru", 0)),
        "head": c.MultiplicativeHeadConfig(head_modules=loss_modules) if loss_modules else c.DenseHeadConfig(),
    }


def _position(a: _Arguments, default: str | None) -> dict[str, Any]:
    """What is not known by name is axial, if there is a shape."""
    kind, shape, sizes = a.take("pos_type", default), a.take("pos_axial_shape"), a.take("pos_d_axial_embs")
    if kind and shape and kind not in ("sin-cos", "fixed-base", "infinite", "infinite-affine", "time-bin"):
        return {"position": "axial", "axial_shape": tuple(shape), "axial_sizes": tuple(sizes or ())}
    require("pos_type", kind, *_POSITIONS)
    return {"position": _POSITIONS[kind]}


_POSITIONS = {None: "learned", "sin-cos": "sin_cos", "fixed-base": "fixed_base", "infinite": "infinite"}


def _sru(value: Any) -> c.SRUConfig:
    if not value:
        return c.SRUConfig()
    layers, size = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, 32)
    if not isinstance(layers, int) or not isinstance(size, int):
        raise TraxError(f"ff_use_sru must be a number of layers, or that and a width, not {value!r}")
    return c.SRUConfig(num_layers=layers, size=size)


def _feed_forward(a: _Arguments, size: int, units: int) -> c.FeedForwardConfig:
    sparsity, kind = a.take("ff_sparsity", 0), a.take("ff_sparsity_type", "1inN")
    activation = a.take("ff_activation", "Relu")
    if isinstance(sparsity, str):
        try:
            sparsity = [float(word) if "." in word else int(word) for word in sparsity.split()]
        except ValueError:
            raise TraxError(f"ff_sparsity must be a number, or 2 or 4 of them, not {sparsity!r}") from None
    if not sparsity:
        name = activation.get("type") if isinstance(activation, Mapping) else activation
        require("ff_activation", name, "Relu", "Gelu")
        return c.DenseFeedForwardConfig(intermediate_size=units, activation="relu" if name == "Relu" else "gelu")
    if not isinstance(sparsity, (int, list, tuple)):
        raise TraxError(f"ff_sparsity must be a whole number, or 2 or 4 numbers, not {sparsity!r}")
    values = sparsity if isinstance(sparsity, (list, tuple)) else [sparsity, units // sparsity]
    if kind == "1inN":
        require("the number of values of ff_sparsity", len(values), 2, 4)
        block, rank, temperature, quant_prob = [*values, 0.1, 0.3][:4] if len(values) == 2 else values
        return c.SparseFeedForwardConfig(
            intermediate_size=units,
            ff_block_size=int(block),
            controller_rank=int(rank),
            temperature=float(temperature),
            quant_prob=float(quant_prob),
        )
    require("ff_sparsity_type", kind, "1inN", "Block", "Switch")
    experts = c.BlockFeedForwardConfig if kind == "Block" else c.SwitchFeedForwardConfig
    return experts(intermediate_size=units, num_experts=int(values[0]))


def _attention(a: _Arguments, ours: str, name: str, default: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """A type of attention, as our keys of it."""
    found = attention(name, a.take(name, default), common["num_attention_heads"], causal=ours == "attention")
    a.layouts[ours] = found.layout
    return {ours: found.projection, f"{ours}_pattern": found.pattern}


def _language_model(a: _Arguments) -> c.ModelConfig:
    common = _common(a)
    return c.ModelConfig(
        vocab_size=a.take_whole("vocab_size"),
        num_hidden_layers=a.take_whole("n_layers", 6),
        **_attention(a, "attention", "attention_type", "CausalAttention", common),
        **common,
    )


def _encoder_decoder(
    a: _Arguments, encoder_attention: str, causal_attention: str, pos_type: str | None = None
) -> dict[str, Any]:
    """What the two encoder-decoders share; the types of attention and of positions are their defaults."""
    common = _common(a, pos_type)
    vocab_size = a.take_whole("input_vocab_size")
    require("output_vocab_size", a.take("output_vocab_size"), None, vocab_size)
    encoder = _attention(a, "encoder_attention", "encoder_attention_type", encoder_attention, common)
    decoder = _attention(a, "attention", "encoder_decoder_attention_type", causal_attention, common)
    return (
        common
        | encoder
        | decoder
        | {
            "vocab_size": vocab_size,
            "num_encoder_layers": a.take_whole("n_encoder_layers", 6),
            "num_decoder_layers": a.take_whole("n_decoder_layers", 6),
        }
    )


def _seq2seq(a: _Arguments) -> c.Seq2SeqConfig:
    modules = a.take_whole("enc_dec_attention_sparsity", 0)
    cross = c.SparseCrossProjectionConfig(qkv_modules=modules) if modules else c.DenseProjectionConfig()
    return c.Seq2SeqConfig(cross_attention=cross, **_encoder_decoder(a, "Attention", "CausalAttention"))


def _terraformer(a: _Arguments) -> c.TerraformerConfig:
    forget_every, forget_dense = a.take_whole("n_layers_forget", 0), a.take("forget_dense", True)
    growth: dict[str, Any] = {name: a.take(name) or 0 for name in ("half_before_layer", "double_after_layer")}
    if any(growth.values()) and isinstance(a.get("ff_sparsity"), int) and a.get("ff_sparsity"):
        raise TraxError(
            "ff_sparsity as one number gives layers of different width controllers of different rank, which is not "
            "known here together with half_before_layer or double_after_layer"
        )
    norms: dict[str, Any] = {} if a.take("center_layernorm", True) else {"norm": "rms_norm", "last_norm": "layer_norm"}
    widths = a.take("d_attention_key"), a.take("d_attention_value")
    config = c.TerraformerConfig(
        num_attention_layers=a.take_whole("n_decoder_attention_layers", 2),
        reversible_encoder=a.take("reversible_encoder", False),
        swap_twice=a.take("use_two_swaps_per_encoder_block", True),
        forget_every=forget_every if forget_dense else 0,  # without a dense layer nothing is forgotten
        **growth,
        **norms,
        **_encoder_decoder(a, "SelfAttention", "SelfAttention", "fixed-base"),
    )
    for name, width in zip(("d_attention_key", "d_attention_value"), widths, strict=True):
        require(name, width, None, config.head_dim)
    return config


_MODELS: dict[Any, Callable[[_Arguments], ModelConfig]] = {
    "ConfigurableTransformerLM": _language_model,
    "ConfigurableTransformer": _seq2seq,
    "ConfigurableTerraformer": _terraformer,
}
