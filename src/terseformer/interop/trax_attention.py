"""The types of attention of Trax's models: each a projection and a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from terseformer import config as c
from terseformer.interop.trax_weights import Layout, TraxError

# What matters only in training or in the reference's own way of decoding.
_IRRELEVANT_OPTIONS = frozenset({"causal", "dropout", "force_no_dropout", "max_inference_length", "mode"})


def require(name: str, value: Any, *allowed: Any) -> None:
    """Raises TraxError unless an argument has an allowed value."""
    if value not in allowed:
        raise TraxError(f"{name} = {value!r} is not known here; allowed are {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Attention:
    """What a type of attention amounts to."""

    projection: c.AttentionProjectionConfig
    pattern: c.AttentionPatternConfig
    layout: Layout = "whole"


def attention(name: str, value: Any, heads: int, causal: bool) -> Attention:
    """The parts of an attention: `{"type": NAME, "args": {…}}`, its name, or a list of equal ones.

    Args:
        name: of the model's argument, for messages.
        value: of the argument.
        heads: of the model.
        causal: whether the tokens may see earlier ones only. Some types do one thing or the other wherever they stand.

    Raises:
        TraxError: it, or an argument of it, is not known here, or it sees other tokens.
    """
    if isinstance(value, (list, tuple)) and value:
        if any(other != value[0] for other in value):
            raise TraxError(f"{name} names different types of attention; here all blocks have the same")
        value = value[0]
    kind, options = (value.get("type"), dict(value.get("args", {}))) if isinstance(value, Mapping) else (value, {})
    if kind in (_BIDIRECTIONAL if causal else _CAUSAL):
        raise TraxError(
            f"{name} = {kind!r} sees {'later' if causal else 'earlier'} tokens{'' if causal else ' only'} in the "
            "reference; that is not known here"
        )
    if kind == "PureLSHSelfAttentionWrapper":
        return _wrapped_attention(options)
    if kind in ("SelfAttention", "LSHSelfAttention"):
        return _attention_by_heads(kind, options)
    modules = options.pop("sparsity", None) or heads
    config: c.AttentionProjectionConfig
    pattern: c.AttentionPatternConfig = c.SoftmaxPatternConfig()
    match kind:
        case "Favor" | "CausalFavor":
            config, pattern = c.DenseProjectionConfig(), c.FavorPatternConfig()
            require("numerical_stabilizer", options.pop("numerical_stabilizer", 0.001), 0.001)
            require("use_approximate_softmax", options.pop("use_approximate_softmax", False), False)
            for unused in ("n_random_features", "scale_by_norm", "normalize_data", "epsilon"):
                options.pop(unused, None)
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
    return Attention(config, pattern)


# Where and how the reference computes attention to long inputs, and what its decoder remembers.
_IRRELEVANT_FOR_LONG_INPUTS = frozenset(
    {
        "attention_dropout",
        "max_length_for_buckets",
        "n_parallel_heads",
        "output_dropout",
        "predict_drop_len",
        "predict_mem_len",
        "use_python_loop",
        "use_reference_code",
    }
)


def _attention_by_heads(kind: str, options: dict[str, Any]) -> Attention:
    """`SelfAttention` with all of a sequence in one chunk, or `LSHSelfAttention`."""
    require("bias", options.pop("bias", False), False)
    hashed = kind == "LSHSelfAttention"
    shares_qk = options.pop("share_qk", False)
    pattern: c.AttentionPatternConfig = c.SoftmaxPatternConfig()
    if hashed:
        pattern = c.LSHPatternConfig(**_hashes(options))
    else:
        require("share_qk", shares_qk, False)
        require("chunk_len", options.pop("chunk_len", None), None)
        _ = options.pop("n_chunks_before", 0), options.pop("n_chunks_after", 0)
    _require_known(kind, options)
    return Attention(c.DenseProjectionConfig(bias=False), pattern, "heads, one for q and k" if hashed else "heads")


def _hashes(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LSH as ours; they are used up."""
    buckets = options.pop("n_buckets", None)
    if isinstance(buckets, (list, tuple)):
        raise TraxError(f"n_buckets = {buckets!r} is not known here; allowed are None and an even number")
    return {
        "chunk_length": options.pop("chunk_len", 128),
        "chunks_before": options.pop("n_chunks_before", 1),
        "chunks_after": options.pop("n_chunks_after", 0),
        "num_hashes": options.pop("n_hashes", 1),
        "num_buckets": buckets or 0,
    }


def _require_known(kind: str, options: dict[str, Any]) -> None:
    if left := [option for option in options if option not in _IRRELEVANT_OPTIONS | _IRRELEVANT_FOR_LONG_INPUTS]:
        raise TraxError(f"the argument {left[0]!r} of {kind} is not known here")


def _wrapped_attention(options: dict[str, Any]) -> Attention:
    """`PureLSHSelfAttentionWrapper`."""
    kind, weights = options.pop("pure_lsh_implementation", None), options.pop("num_weights", 3)
    kind = kind.get("type") if isinstance(kind, Mapping) else kind
    require("pure_lsh_implementation", kind, "PureLSHSelfAttention", "MixedLSHSelfAttention")
    layout, modules = options.pop("weights_format", "model"), options.pop("sparsity", 16)
    require("weights_format", layout, "model", "sparse")
    require("num_weights", weights, *((2, 3) if layout == "sparse" else (3,)))
    require("rotary_position_emb", options.pop("rotary_position_emb", False), False)
    bias, fields = options.pop("bias", True), _hashes(options)
    exact = options.pop("std_length", None) if kind == "MixedLSHSelfAttention" else None
    _require_known("PureLSHSelfAttentionWrapper", options)
    projection = (
        c.SparseProjectionConfig(qkv_modules=modules, share_qk=weights == 2)
        if layout == "sparse"
        else c.DenseProjectionConfig(bias=bias)
    )
    if exact is None:
        return Attention(projection, c.LSHPatternConfig(**fields))
    return Attention(projection, c.MixedPatternConfig(**fields, exact_length=exact))


_BIDIRECTIONAL = ("Attention", "Favor")
_CAUSAL = (
    "CausalAttention",
    "LowRankCausalAttention",
    "MultiplicativeCausalAttention",
    "MultiplicativeModularCausalAttention",
    "ModularCausalAttention",
    "ConvCausalAttention",
    "MultiplicativeConvCausalAttention",
    "CausalFavor",
)
_ATTENTIONS = (*_BIDIRECTIONAL, *_CAUSAL, "SelfAttention", "LSHSelfAttention", "PureLSHSelfAttentionWrapper")
