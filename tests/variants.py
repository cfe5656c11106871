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
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    SwitchFeedForwardConfig,
)
from terseformer.model import CausalLM

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

VARIANTS: dict[str, ModelConfig] = {
    **{f"attention-{name}": _model(attention=config) for name, config in _ATTENTION.items()},
    **{f"feed_forward-{name}": _model(feed_forward=config) for name, config in _FEED_FORWARD.items()},
    **{f"head-{name}": _model(head=config) for name, config in _HEAD.items()},
    **{f"sru-{n}": _model(sru=SRUConfig(num_layers=n, size=9)) for n in (1, 2)},
    **{f"position-{position}": _model(position=position) for position in ("learned", "sinusoidal", "rotary")},
    **{f"norm-{norm}": _model(norm=norm) for norm in ("layer_norm", "rms_norm")},
    **{f"whole-{name}": config for name, config in _WHOLE.items()},
}


_PATTERN = {
    "local": LocalPatternConfig(chunk_length=3),
    "local_one_chunk": LocalPatternConfig(chunk_length=4, chunks_before=0),
    # Windows over all tokens: the whole form, too, is exact.
    "lsh": LSHPatternConfig(chunk_length=6),
    "lsh_4_chunks": LSHPatternConfig(chunk_length=3, num_hashes=3, chunks_before=2, chunks_after=1),
    "mixed": MixedPatternConfig(chunk_length=6, exact_length=MAX_POSITION),
    "favor": FavorPatternConfig(),
    "favor_softmax": FavorSoftmaxPatternConfig(num_features=12),
}
PYTORCH_ONLY: dict[str, ModelConfig] = {
    **{f"pattern-{name}": _model(attention_pattern=config) for name, config in _PATTERN.items()},
    "pattern-lsh_sparse_rotary": _model(
        attention_pattern=_PATTERN["lsh"], attention=SparseProjectionConfig(qkv_modules=5), position="rotary"
    ),
    "pattern-local_sparse": _model(
        attention_pattern=_PATTERN["local"], attention=SparseProjectionConfig(qkv_modules=5, share_qk=True)
    ),
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


def make_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    """A model in eval mode whose vectors (biases, norms) are large enough to be seen if one is missing."""
    torch.manual_seed(seed)
    model = CausalLM(config).eval()
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
