"""Models by name: the paper's, and families of small ones whose members are equally large.

The paper's models are counted here as decoders: self-attention and feed-forward layers, without the
encoder and without cross-attention. "800m" and "17b" name the paper's encoder-decoder models whose
dimensions they have; the decoder has 24 of the 24 + 24 blocks of the former and 6 of the 6 + 6 of the latter.

Of a small sparse model there are two entries: the plain name has the best settings that we know, the
one that ends in `-faithful` those of the reference.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from terseformer.accounting import account
from terseformer.config import (
    BlockFeedForwardConfig,
    ConfigError,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    DenseProjectionConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    Seq2SeqConfig,
    SparseCrossProjectionConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    SwitchFeedForwardConfig,
    TerraformerConfig,
)

TOLERANCE = 0.01
"""How far models of the same size may differ in their number of parameters."""


AnyConfig = ModelConfig | EncoderDecoderConfig
M = TypeVar("M", bound=ModelConfig | EncoderDecoderConfig)


def num_parameters(config: AnyConfig) -> int:
    """Parameters that a model stores."""
    return account(config).parameters


def match_parameters(config: M, parameters: int) -> M:
    """The model with the feed-forward width that brings it nearest to a number of parameters.

    The width stays a multiple of the block size, of the number of experts or, if dense, of 8.

    Raises:
        ConfigError: the nearest number is more than 1 % away.
    """

    def widened(width: int) -> M:
        return replace(config, feed_forward=replace(config.feed_forward, intermediate_size=width))

    step = _width_step(config.feed_forward)
    narrow, wide = num_parameters(widened(step)), num_parameters(widened(2 * step))  # linear in the width
    steps = 1 + max(0, round((parameters - narrow) / (wide - narrow)))
    matched = widened(steps * step)
    reached = num_parameters(matched)
    if abs(reached - parameters) > TOLERANCE * parameters:
        raise ConfigError(
            f"no feed_forward.intermediate_size gives the model {parameters:,} parameters within {TOLERANCE:.0%}: "
            f"the nearest, {steps * step}, gives {reached:,}; change model.hidden_size or model.num_hidden_layers"
        )
    return matched


def _width_step(config: FeedForwardConfig) -> int:
    match config:
        case SparseFeedForwardConfig(ff_block_size=step):
            return step
        case BlockFeedForwardConfig(num_experts=step) | SwitchFeedForwardConfig(num_experts=step):
            return step
        case DenseFeedForwardConfig():
            return 8


def dense_twin(config: AnyConfig) -> ModelConfig | Seq2SeqConfig:
    """The dense Transformer of the same hidden size, depth, heads, positions, norms and number of parameters.

    Parts that are dense already stay as they are, a tied head among them; a recurrent branch falls away. A
    Terraformer's twin is a Seq2Seq.

    Raises:
        ConfigError: no feed-forward width brings the number of parameters within 1 %.
    """
    if isinstance(config, TerraformerConfig):
        shared = {f.name: getattr(config, f.name) for f in fields(Seq2SeqConfig) if hasattr(config, f.name)}
        base: ModelConfig | Seq2SeqConfig = Seq2SeqConfig(**shared | {"kind": "seq2seq"})
    else:
        base = config
    parts: dict[str, Any] = {
        name: projection if isinstance(projection, DenseProjectionConfig) else DenseProjectionConfig()
        for name in ("attention", "encoder_attention", "cross_attention")
        if (projection := getattr(base, name, None)) is not None
    }
    feed_forward, head = base.feed_forward, base.head
    twin = replace(
        base,
        **parts,
        feed_forward=feed_forward if isinstance(feed_forward, DenseFeedForwardConfig) else DenseFeedForwardConfig(),
        head=head if isinstance(head, DenseHeadConfig) else DenseHeadConfig(),
        sru=replace(base.sru, num_layers=0),
    )
    if twin == config:
        return base
    parameters = num_parameters(config)
    return match_parameters(twin, parameters)


def preset(name: str) -> AnyConfig:
    """The model of that name.

    Raises:
        ConfigError: there is none; the message has the nearest names.
    """
    if name not in PRESETS:
        near = ", ".join(map(repr, difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)))
        raise ConfigError(f"no preset {name!r}; the nearest are {near}")
    return PRESETS[name]


def language_model_preset(name: str) -> ModelConfig:
    """The causal language model of that name.

    Raises:
        ConfigError: there is none, or it is an encoder-decoder.
    """
    config = preset(name)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"preset {name!r} is of kind {config.kind!r}; here a 'causal_lm' is needed")
    return config


# The small models: a row for each variant, a call for each family.


@dataclass(frozen=True)
class _Variant:
    """Which parts are sparse."""

    ff_block_size: int = 0
    qkv: bool = False
    loss: bool = False


_VARIANTS = {
    "dense": _Variant(),
    "ff8": _Variant(ff_block_size=8),
    "ff16": _Variant(ff_block_size=16),
    "ff32": _Variant(ff_block_size=32),
    "ff64": _Variant(ff_block_size=64),
    "qkv": _Variant(qkv=True),
    "ff-qkv": _Variant(ff_block_size=16, qkv=True),
    "ff-qkv-loss": _Variant(ff_block_size=16, qkv=True, loss=True),
}

# What the best settings that we know change in the reference's, which are the defaults in config/parts.py.
_TUNED: dict[type, dict[str, Any]] = {
    SparseFeedForwardConfig: {"quant_prob": 1.0, "controller_gradient": "all"},
    SparseProjectionConfig: {"output_layer": "mult"},
    MultiplicativeHeadConfig: {"head_modules": 2, "gates_std": 2.0},
}


def _small(dense: ModelConfig, variant: _Variant, tuned: bool) -> ModelConfig:
    """A variant with as many parameters as the dense model."""
    parts: dict[str, Any] = {}
    if n := variant.ff_block_size:
        parts["feed_forward"] = SparseFeedForwardConfig(
            intermediate_size=n, ff_block_size=n, controller_rank=dense.hidden_size // 8
        )
    if variant.qkv:
        parts["attention"] = SparseProjectionConfig(qkv_modules=8)
    if variant.loss:
        parts["head"] = MultiplicativeHeadConfig(head_modules=4)
    if tuned:
        parts = {name: replace(part, **_TUNED[type(part)]) for name, part in parts.items()}
    return match_parameters(replace(dense, **parts), num_parameters(dense))


def _family(prefix: str, dense: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    for name, variant in _VARIANTS.items():
        yield f"{prefix}-{name}", _small(dense, variant, tuned=True)
        if variant != _Variant():
            yield f"{prefix}-{name}-faithful", _small(dense, variant, tuned=False)


_TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    feed_forward=SparseFeedForwardConfig(intermediate_size=256, ff_block_size=16, controller_rank=8),
)

# 552 dense units are as many parameters as 512 sparse ones with their controller: 8 blocks even at N = 64.
_SMALL_1M = ModelConfig(
    hidden_size=128, num_hidden_layers=4, feed_forward=DenseFeedForwardConfig(intermediate_size=552)
)
_SMALL_5M = ModelConfig(
    hidden_size=256, num_hidden_layers=6, feed_forward=DenseFeedForwardConfig(intermediate_size=1024)
)


# Small encoder-decoders of one size, with the best settings that we know. Tied heads let them copy what they have
# read; a multiplicative head cannot be tied. With rotary positions the dense one learns to copy sooner.

_SUMMARIZE = Seq2SeqConfig(
    vocab_size=1024,
    hidden_size=128,
    num_encoder_layers=3,
    num_decoder_layers=3,
    max_position_embeddings=16384,
    position="rotary",
    feed_forward=DenseFeedForwardConfig(intermediate_size=512),
    head=DenseHeadConfig(tied=True),
)


def _summarizers() -> Iterator[tuple[str, Seq2SeqConfig | TerraformerConfig]]:
    """The dense Transformer, the same with sparse layers, and the reversible model."""
    sparse: dict[str, Any] = {
        "feed_forward": SparseFeedForwardConfig(
            intermediate_size=16, ff_block_size=16, controller_rank=16, **_TUNED[SparseFeedForwardConfig]
        ),
        "attention": SparseProjectionConfig(qkv_modules=8, **_TUNED[SparseProjectionConfig]),
    }
    size = num_parameters(_SUMMARIZE)
    yield "summarize-1m-dense", _SUMMARIZE
    scaling = replace(_SUMMARIZE, **sparse, cross_attention=SparseCrossProjectionConfig(qkv_modules=8))
    yield "summarize-1m-scaling", match_parameters(scaling, size)
    terraformer = TerraformerConfig(
        vocab_size=1024,
        hidden_size=128,
        num_encoder_layers=2,
        num_decoder_layers=5,  # which read the source, too; so the paper's larger ones have 4 + 24 and 6 + 36
        max_position_embeddings=16384,
        # Over source and target together rotary positions would be distances that differ from source to source.
        position="sinusoidal",
        encoder_position="rotary",
        num_attention_layers=2,  # as many as self- and cross-attention of the others together; the original's default
        head=DenseHeadConfig(tied=True),
        **sparse,
    )
    yield "summarize-1m-terraformer", match_parameters(terraformer, size)


# The paper's models, with the reference's dropout of 0.1 everywhere.

_SCALING_800M = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    max_position_embeddings=512,
    dropout=0.1,
    attention_dropout=0.1,
    feed_forward=DenseFeedForwardConfig(intermediate_size=4096, ff_dropout=0.1),
)
_SCALING_17B = replace(
    _SCALING_800M,
    hidden_size=9216,
    num_hidden_layers=6,
    num_attention_heads=96,
    max_position_embeddings=2048,
    feed_forward=DenseFeedForwardConfig(intermediate_size=40960, ff_dropout=0.1),
)


def _one_in(n: int, intermediate_size: int, controller_rank: int) -> SparseFeedForwardConfig:
    return SparseFeedForwardConfig(
        intermediate_size=intermediate_size, ff_block_size=n, controller_rank=controller_rank
    )


_QKV_800M = replace(_SCALING_800M, attention=SparseProjectionConfig(qkv_modules=16))
_FF_QKV_800M = replace(_QKV_800M, feed_forward=_one_in(64, 6144, controller_rank=96))

# A decoder alone with 0.8 billion parameters, for the comparison with libraries that know no encoder.
_DECODER_08B = replace(_SCALING_800M, hidden_size=1536, dropout=0.0, attention_dropout=0.0)
_SPARSE_DECODER_08B = replace(
    _DECODER_08B,
    attention=SparseProjectionConfig(qkv_modules=16),
    feed_forward=_one_in(64, 9216, controller_rank=144),
    head=MultiplicativeHeadConfig(head_modules=4),
)

# The same as encoder-decoders, whole.

_SEQ2SEQ_800M = Seq2SeqConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_encoder_layers=24,
    num_decoder_layers=24,
    num_attention_heads=16,
    feed_forward=DenseFeedForwardConfig(intermediate_size=4096, ff_dropout=0.1),
    dropout=0.1,
    attention_dropout=0.1,
)
_SEQ2SEQ_800M_FF_QKV = replace(
    _SEQ2SEQ_800M, attention=SparseProjectionConfig(qkv_modules=16), feed_forward=_one_in(64, 6144, controller_rank=96)
)
_TERRAFORMER_54B = TerraformerConfig(
    vocab_size=32000,
    hidden_size=9216,
    num_encoder_layers=6,
    num_decoder_layers=36,
    num_attention_heads=96,
    max_position_embeddings=2048,
    attention=SparseProjectionConfig(qkv_modules=64),
    feed_forward=_one_in(256, 65536, controller_rank=32),
    head=MultiplicativeHeadConfig(head_modules=8),
    sru=SRUConfig(num_layers=1, size=64),
    reversible_encoder=True,
    dropout=0.1,
    attention_dropout=0.1,
)

PRESETS: dict[str, AnyConfig] = {
    "tiny": _TINY,
    **dict(_family("small-1m", _SMALL_1M)),
    **dict(_family("small-5m", _SMALL_5M)),
    **dict(_summarizers()),
    # At 800M the controller's rank is F // N, which the reference makes of a plain N; the paper writes D / N.
    "scaling-800m-dense": _SCALING_800M,
    "scaling-800m-ff": replace(_SCALING_800M, feed_forward=_one_in(64, 4096, controller_rank=64)),
    "scaling-800m-qkv": replace(_QKV_800M, feed_forward=DenseFeedForwardConfig(intermediate_size=6144, ff_dropout=0.1)),
    "scaling-800m-ff-qkv": _FF_QKV_800M,
    "scaling-800m-ff-qkv-loss": replace(_FF_QKV_800M, head=MultiplicativeHeadConfig(head_modules=4)),
    "scaling-17b-dense": _SCALING_17B,
    "scaling-17b-ff-qkv": replace(
        _SCALING_17B,
        attention=SparseProjectionConfig(qkv_modules=64),
        feed_forward=_one_in(256, 65536, controller_rank=32),
    ),
    "decoder-0.8b-dense": dense_twin(_SPARSE_DECODER_08B),
    "decoder-0.8b-ff-qkv-loss": _SPARSE_DECODER_08B,
    "lm1b-sparse": replace(_QKV_800M, feed_forward=_one_in(64, 4096, controller_rank=64)),
    "seq2seq-800m-dense": _SEQ2SEQ_800M,
    "seq2seq-800m-ff": replace(_SEQ2SEQ_800M, feed_forward=_one_in(64, 4096, controller_rank=64)),
    "seq2seq-800m-ff-qkv": _SEQ2SEQ_800M_FF_QKV,
    "seq2seq-800m-ff-qkv-loss": replace(
        _SEQ2SEQ_800M_FF_QKV,
        cross_attention=SparseCrossProjectionConfig(qkv_modules=16),
        head=MultiplicativeHeadConfig(head_modules=4),
    ),
    "seq2seq-17b-dense": replace(
        _SEQ2SEQ_800M,
        hidden_size=9216,
        num_encoder_layers=6,
        num_decoder_layers=6,
        num_attention_heads=96,
        max_position_embeddings=2048,
        feed_forward=DenseFeedForwardConfig(intermediate_size=40960, ff_dropout=0.1),
    ),
    "terraformer-800m": replace(
        _TERRAFORMER_54B,
        hidden_size=1024,
        num_encoder_layers=24,
        num_decoder_layers=24,
        num_attention_heads=16,
        max_position_embeddings=32768,
        attention=SparseProjectionConfig(qkv_modules=16),
        feed_forward=_one_in(64, 6144, controller_rank=96),
        head=MultiplicativeHeadConfig(head_modules=4),
        sru=SRUConfig(num_layers=1, size=32),
    ),
    "terraformer-8b": replace(
        _TERRAFORMER_54B,
        hidden_size=4096,
        num_encoder_layers=4,
        num_decoder_layers=24,
        num_attention_heads=32,
        attention=SparseProjectionConfig(qkv_modules=32, share_qk=True),
        feed_forward=_one_in(128, 32768, controller_rank=32),
        head=DenseHeadConfig(),
        attention_dropout=0.0,
    ),
    "terraformer-17b": replace(
        _TERRAFORMER_54B,
        num_decoder_layers=6,
        head=MultiplicativeHeadConfig(head_modules=4),
        sru=SRUConfig(),
    ),
    "terraformer-54b": _TERRAFORMER_54B,
}
