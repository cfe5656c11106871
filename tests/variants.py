"""One small model for every variant, of odd sizes: what a test over all variants is parametrised by."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from terseformer.config import (
    BlockFeedForwardConfig,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    DenseProjectionConfig,
    EncoderDecoderConfig,
    FavorPatternConfig,
    FavorSoftmaxPatternConfig,
    LocalConvolutionProjectionConfig,
    LocallyConnectedProjectionConfig,
    LocalPatternConfig,
    LowRankProjectionConfig,
    LSHPatternConfig,
    MixedPatternConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    MultiplicativeModularProjectionConfig,
    MultiplicativeProjectionConfig,
    Seq2SeqConfig,
    SparseCrossProjectionConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    SwitchFeedForwardConfig,
    TerraformerConfig,
)
from terseformer.models import AnyModel
from terseformer.models import make_model as make_new_model

MAX_POSITION = 11
FF = 35  # width of the feed-forward layers


def _model(**changes: object) -> ModelConfig:
    """Two blocks of width 30 and 3 heads of width 10."""
    defaults = {
        "vocab_size": 21,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": MAX_POSITION,
        "feed_forward": DenseFeedForwardConfig(intermediate_size=FF),
    }
    return ModelConfig(**(defaults | changes))


def _sparse(block_size: int = 5, **changes: object) -> SparseFeedForwardConfig:
    return SparseFeedForwardConfig(intermediate_size=FF, ff_block_size=block_size, controller_rank=7, **changes)


_ATTENTION = {
    "dense": DenseProjectionConfig(),
    "dense_no_bias": DenseProjectionConfig(bias=False),
    "low_rank": LowRankProjectionConfig(rank=7),
    "multiplicative": MultiplicativeProjectionConfig(qkv_modules=5),
    "multiplicative_modular": MultiplicativeModularProjectionConfig(qkv_modules=5),
    "local_convolution": LocalConvolutionProjectionConfig(qkv_modules=5),
    "local_convolution_1x1": LocalConvolutionProjectionConfig(qkv_modules=5, module_kernel=1, length_kernel=1),
    "local_convolution_5x2": LocalConvolutionProjectionConfig(qkv_modules=2, module_kernel=5, length_kernel=2),
    "local_convolution_long": LocalConvolutionProjectionConfig(qkv_modules=1, module_kernel=1, length_kernel=20),
    "locally_connected": LocallyConnectedProjectionConfig(qkv_modules=5),
    "locally_connected_5": LocallyConnectedProjectionConfig(qkv_modules=3, module_kernel=5),
    **{
        f"sparse-{'qk' if share_qk else 'q,k'}-out_{output_layer}-value_{value_input}": SparseProjectionConfig(
            qkv_modules=5, share_qk=share_qk, output_layer=output_layer, value_input=value_input
        )
        for share_qk, output_layer, value_input in itertools.product(
            (False, True), ("none", "mult", "conv", "multconv"), ("none", "fixed", "original")
        )
    },
    "sparse_5x4": SparseProjectionConfig(qkv_modules=2, module_kernel=5, length_kernel=4, output_layer="conv"),
    "sparse_1x1": SparseProjectionConfig(qkv_modules=15, module_kernel=1, length_kernel=1),
}

_FEED_FORWARD = {
    "relu": DenseFeedForwardConfig(intermediate_size=FF),
    "gelu": DenseFeedForwardConfig(intermediate_size=FF, activation="gelu"),
    "swiglu": DenseFeedForwardConfig(intermediate_size=FF, activation="swiglu"),
    "sparse": _sparse(),
    "sparse_all_gradients": _sparse(controller_gradient="all"),
    "sparse_multiply": _sparse(multiply_by_controller=True),
    "sparse_scaled": _sparse(kernel_scaling=True),
    "sparse_all_units": _sparse(block_size=1),
    "sparse_one_block": _sparse(block_size=FF),
    "block": BlockFeedForwardConfig(intermediate_size=FF, num_experts=5),
    "block_units": BlockFeedForwardConfig(intermediate_size=FF, num_experts=FF),
    "switch": SwitchFeedForwardConfig(intermediate_size=FF, num_experts=5),
    "switch_units": SwitchFeedForwardConfig(intermediate_size=FF, num_experts=FF),
}

_HEAD = {
    "dense": DenseHeadConfig(),
    "tied": DenseHeadConfig(tied=True),
    "multiplicative": MultiplicativeHeadConfig(head_modules=7),
    "mixed": MultiplicativeHeadConfig(head_modules=3, sparse_prob=0.5),
}

_WHOLE = {
    "scaling": _model(
        attention=SparseProjectionConfig(qkv_modules=6),
        feed_forward=_sparse(),
        head=MultiplicativeHeadConfig(head_modules=3),
    ),
    "scaling_sru_rotary_rms": _model(
        attention=SparseProjectionConfig(qkv_modules=6, output_layer="mult", value_input="fixed"),
        feed_forward=_sparse(),
        sru=SRUConfig(num_layers=2, size=9),
        position="rotary",
        norm="rms_norm",
    ),
    "one_layer_one_head": _model(num_hidden_layers=1, num_attention_heads=1, attention=_ATTENTION["locally_connected"]),
}

_PATTERN: dict[str, LocalPatternConfig | LSHPatternConfig | MixedPatternConfig] = {
    "local": LocalPatternConfig(chunk_length=3),
    "local_one_chunk": LocalPatternConfig(chunk_length=4, chunks_before=0),
    # Windows over all tokens: the whole form, too, is exact.
    "lsh": LSHPatternConfig(chunk_length=6),
    "lsh_4_chunks": LSHPatternConfig(chunk_length=3, num_hashes=3, chunks_before=2, chunks_after=1),
    "mixed": MixedPatternConfig(chunk_length=6, exact_length=MAX_POSITION),
}

VARIANTS: dict[str, ModelConfig] = {
    **{f"attention-{name}": _model(attention=config) for name, config in _ATTENTION.items()},
    **{f"feed_forward-{name}": _model(feed_forward=config) for name, config in _FEED_FORWARD.items()},
    **{f"head-{name}": _model(head=config) for name, config in _HEAD.items()},
    **{f"sru-{n}": _model(sru=SRUConfig(num_layers=n, size=9)) for n in (1, 2)},
    **{
        f"position-{position}": _model(position=position)
        for position in ("learned", "sinusoidal", "sin_cos", "rotary", "none")
    },
    "position-fixed_base": _model(position="fixed_base", hidden_size=24),
    "position-infinite": _model(position="infinite"),
    "position-axial": _model(position="axial", axial_shape=(4, 3), axial_sizes=(19, 11)),
    **{f"norm-{norm}": _model(norm=norm) for norm in ("layer_norm", "rms_norm")},
    **{f"whole-{name}": config for name, config in _WHOLE.items()},
    **{f"pattern-{name}": _model(attention_pattern=config) for name, config in _PATTERN.items()},
    "pattern-lsh_sparse_rotary": _model(
        attention_pattern=_PATTERN["lsh"], attention=SparseProjectionConfig(qkv_modules=5), position="rotary"
    ),
    "pattern-local_sparse": _model(
        attention_pattern=_PATTERN["local"], attention=SparseProjectionConfig(qkv_modules=5, share_qk=True)
    ),
}

PYTORCH_ONLY: dict[str, ModelConfig] = {
    "pattern-favor": _model(attention_pattern=FavorPatternConfig()),
    "pattern-favor_softmax": _model(attention_pattern=FavorSoftmaxPatternConfig(num_features=12)),
}
"""Variants that the engine does not decode."""


DISTINCT: dict[str, ModelConfig] = {
    name: VARIANTS[name]
    for name in (
        "attention-dense",
        "attention-local_convolution",
        "attention-local_convolution_long",
        "attention-sparse-qk-out_multconv-value_fixed",
        "attention-sparse_5x4",
        "feed_forward-switch",
        "sru-2",
        "position-sinusoidal",
        "whole-scaling",
        "whole-scaling_sru_rotary_rms",
    )
}
"""A few variants that between them remember all that a state can hold."""


_SIZES = {
    "vocab_size": 21,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "max_position_embeddings": MAX_POSITION,
    "feed_forward": DenseFeedForwardConfig(intermediate_size=FF),
}


def _seq2seq(**changes: object) -> Seq2SeqConfig:
    return Seq2SeqConfig(**(_SIZES | changes))


def _terraformer(**changes: object) -> TerraformerConfig:
    return TerraformerConfig(**(_SIZES | changes))


_SCALING = {
    "attention": SparseProjectionConfig(qkv_modules=5, output_layer="mult"),
    "encoder_attention": SparseProjectionConfig(qkv_modules=6, value_input="fixed", output_layer="multconv"),
    "feed_forward": _sparse(),
    "sru": SRUConfig(num_layers=2, size=9),
    "head": MultiplicativeHeadConfig(head_modules=3),
}

ENCODER_DECODERS: dict[str, EncoderDecoderConfig] = {
    **{f"seq2seq-encoder_{name}": _seq2seq(encoder_attention=config) for name, config in _ATTENTION.items()},
    **{
        f"seq2seq-decoder_{name}": _seq2seq(attention=_ATTENTION[name])
        for name in ("dense_no_bias", "low_rank", "multiplicative_modular", "local_convolution_long", "sparse_5x4")
    },
    "seq2seq-cross_no_bias": _seq2seq(cross_attention=DenseProjectionConfig(bias=False)),
    "seq2seq-cross_sparse": _seq2seq(cross_attention=SparseCrossProjectionConfig(qkv_modules=5)),
    "seq2seq-cross_sparse_5x4": _seq2seq(
        cross_attention=SparseCrossProjectionConfig(qkv_modules=2, module_kernel=5, length_kernel=4)
    ),
    "seq2seq-cross_sparse_1x1": _seq2seq(
        cross_attention=SparseCrossProjectionConfig(qkv_modules=15, module_kernel=1, length_kernel=1)
    ),
    **{f"seq2seq-feed_forward_{name}": _seq2seq(feed_forward=config) for name, config in _FEED_FORWARD.items()},
    **{f"seq2seq-head_{name}": _seq2seq(head=config) for name, config in _HEAD.items()},
    "seq2seq-sru": _seq2seq(sru=SRUConfig(num_layers=2, size=9)),
    "seq2seq-sinusoidal_rms": _seq2seq(position="sinusoidal", norm="rms_norm"),
    **{
        f"seq2seq-{position}": _seq2seq(position=position, hidden_size=24)
        for position in ("sin_cos", "fixed_base", "infinite")
    },
    "seq2seq-rotary_scaling": _seq2seq(
        **_SCALING, cross_attention=SparseCrossProjectionConfig(qkv_modules=6), position="rotary"
    ),
    "seq2seq-encoder_learned": _seq2seq(encoder_position="learned", position="rotary"),
    "seq2seq-rotary_lsh": _seq2seq(
        position="rotary",
        encoder_attention_pattern=LSHPatternConfig(chunk_length=3, chunks_after=1),
        attention_pattern=_PATTERN["lsh"],
    ),
    "seq2seq-axial": _seq2seq(position="axial", axial_shape=(4, 3), axial_sizes=(19, 11)),
    "seq2seq-local": _seq2seq(encoder_attention_pattern=LocalPatternConfig(chunk_length=2, chunks_after=1)),
    "seq2seq-lsh": _seq2seq(
        encoder_attention_pattern=LSHPatternConfig(chunk_length=3, chunks_after=1), attention_pattern=_PATTERN["lsh"]
    ),
    "seq2seq-mixed": _seq2seq(
        encoder_attention_pattern=MixedPatternConfig(exact_length=MAX_POSITION), attention_pattern=_PATTERN["mixed"]
    ),
    "seq2seq-deep_encoder": _seq2seq(num_encoder_layers=3, num_decoder_layers=1, num_attention_heads=1),
    "seq2seq-scaling": _seq2seq(**_SCALING, cross_attention=SparseCrossProjectionConfig(qkv_modules=6)),
    **{
        f"terraformer-attention_{name}": _terraformer(encoder_attention=config, attention=config)
        for name, config in _ATTENTION.items()
        if "-" not in name
    },
    **{f"terraformer-feed_forward_{name}": _terraformer(feed_forward=config) for name, config in _FEED_FORWARD.items()},
    **{
        f"terraformer-{'reversible' if reversible else 'merged'}-swap_{'twice' if twice else 'once'}-{n}": _terraformer(
            reversible_encoder=reversible, swap_twice=twice, num_attention_layers=n
        )
        for reversible, twice, n in itertools.product((False, True), (False, True), (1, 3))
    },
    "terraformer-tied_sinusoidal_rms": _terraformer(
        head=DenseHeadConfig(tied=True), position="sinusoidal", norm="rms_norm"
    ),
    "terraformer-local": _terraformer(
        encoder_attention_pattern=LocalPatternConfig(chunk_length=4, chunks_before=0, chunks_after=1),
        attention_pattern=LocalPatternConfig(chunk_length=5),
    ),
    # Decoding sees all earlier tokens; so does a window over a source and its text.
    "terraformer-lsh": _terraformer(
        encoder_attention_pattern=LSHPatternConfig(chunk_length=2, num_hashes=3),
        attention_pattern=LSHPatternConfig(chunk_length=2 * MAX_POSITION),
    ),
    "terraformer-rotary_local": _terraformer(
        position="rotary",
        encoder_attention_pattern=LocalPatternConfig(chunk_length=4, chunks_before=0, chunks_after=1),
        attention_pattern=LocalPatternConfig(chunk_length=5),
    ),
    "terraformer-encoder_rotary": _terraformer(encoder_position="rotary", position="none"),
    "terraformer-rotary_scaling": _terraformer(**_SCALING, position="rotary"),
    "terraformer-fixed_base": _terraformer(position="fixed_base", hidden_size=24),
    "terraformer-scaling": _terraformer(**_SCALING),
    "terraformer-scaling_reversible": _terraformer(**_SCALING, reversible_encoder=True, num_attention_layers=1),
}

DISTINCT_ENCODER_DECODERS: dict[str, EncoderDecoderConfig] = {
    name: ENCODER_DECODERS[name]
    for name in (
        "seq2seq-encoder_dense",
        "seq2seq-encoder_local_convolution",
        "seq2seq-scaling",
        "terraformer-merged-swap_twice-3",
        "terraformer-scaling",
        "terraformer-scaling_reversible",
    )
}
"""A few that between them remember all that a state can hold."""


def make_model(config: ModelConfig | EncoderDecoderConfig, seed: int = 0) -> AnyModel:
    """A model in eval mode whose vectors (biases, norms) are large enough to be seen if one is missing."""
    torch.manual_seed(seed)
    model = make_new_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_visible(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """The module with noise added to all its parameters, so that no bias is nearly zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return module
