"""Trax's weights under our names.

Trax keeps the weights of a layer or model as a list in the order of its layer tree. Each function
takes what is one layer's from the front of such a list and gives it by parameter name; the larger
ones compose the smaller. All of them only permute, so that gradients go the same way as weights.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terseformer import config as c

Weights = Iterator[np.ndarray]
Named = dict[str, np.ndarray]


def read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of a `*.npy.gz` file that Trax's trainer wrote."""
    arrays = []
    with gzip.open(path, "rb") as file:
        while file.peek(1):
            arrays.append(np.load(file, allow_pickle=False))
    return arrays


def tensors(named: Named) -> dict[str, torch.Tensor]:
    """What `load_state_dict` takes."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in named.items()}


def under(prefix: str, named: Named) -> Named:
    """The parameters of a submodule."""
    return {f"{prefix}.{name}": array for name, array in named.items()}


# ------------------------------------------------------------------------------------- small parts


def dense(w: Weights) -> Named:
    """Trax's matrix is [in, out]."""
    return {"weight": next(w).T, "bias": next(w)}


def layer_norm(w: Weights) -> Named:
    return {"weight": next(w), "bias": next(w)}


def low_rank(w: Weights) -> Named:
    return under("0", dense(w)) | under("1", dense(w))


def multiplicative(w: Weights) -> Named:
    return {"modules_weight": next(w), "features_weight": next(w), "bias": next(w)}


def multiplicative_modular(w: Weights) -> Named:
    return {"modules_weight": next(w), "features_weight": next(w), "mixing_weight": next(w), "bias": next(w)}


def local_convolution(w: Weights) -> Named:
    return {"kernel": next(w), "bias": next(w)}


def locally_connected(w: Weights) -> Named:
    return {"weight": next(w), "bias": next(w)}


def sru(w: Weights) -> Named:
    return under("gates", dense(w))


# ------------------------------------------------------------------------------------ feed-forward


def dense_feed_forward(w: Weights) -> Named:
    return under("up", dense(w)) | under("down", dense(w))


def sparse_feed_forward(w: Weights) -> Named:
    """The 1-in-N layer: unit j of ours is element j % N of block j // N."""
    controller_down, controller_up, controller_bias, up, down, bias = (next(w) for _ in range(6))
    hidden_size, num_blocks, block_size = up.shape
    units = num_blocks * block_size
    return {
        "controller.down.weight": controller_down.T,
        "controller.up.weight": controller_up.reshape(-1, units).T,
        "controller.up.bias": controller_bias.reshape(units),
        "up_weight": up.reshape(hidden_size, units).T,
        "down_weight": down.transpose(1, 0, 2).reshape(units, hidden_size),  # Trax: [N, F/N, D]
        "bias": bias,
    }


def expert_feed_forward(w: Weights) -> Named:
    """The block and the switch layer."""
    return {"controller.choose.weight": next(w).T, "up_weight": next(w).T, "down_weight": next(w), "bias": next(w)}


def feed_forward(config: c.FeedForwardConfig, w: Weights) -> Named:
    match config:
        case c.DenseFeedForwardConfig():
            return dense_feed_forward(w)
        case c.SparseFeedForwardConfig():
            return sparse_feed_forward(w)
        case c.BlockFeedForwardConfig() | c.SwitchFeedForwardConfig():
            return expert_feed_forward(w)


# --------------------------------------------------------------------------------------- attention

_SEPARATE = {
    c.DenseProjectionConfig: dense,
    c.LowRankProjectionConfig: low_rank,
    c.MultiplicativeProjectionConfig: multiplicative,
    c.MultiplicativeModularProjectionConfig: multiplicative_modular,
    c.LocallyConnectedProjectionConfig: locally_connected,
    c.LocalConvolutionProjectionConfig: local_convolution,
}


def attention_projection(config: c.AttentionProjectionConfig, w: Weights) -> Named:
    if not isinstance(config, c.SparseProjectionConfig):
        layer = _SEPARATE[type(config)]
        return under("query", layer(w)) | under("key", layer(w)) | under("value", layer(w)) | under("out", layer(w))
    named = under("shared", multiplicative(w)) | under("query", local_convolution(w))
    if not config.share_qk:
        named |= under("key", local_convolution(w))
    named |= under("value", local_convolution(w))
    if "mult" in config.output_layer:
        named |= under("out_mult", multiplicative(w))
    if "conv" in config.output_layer:
        named |= under("out_conv", local_convolution(w))
    return named


# ------------------------------------------------------------------------------------------- model


def language_model(config: c.ModelConfig, arrays: Iterable[np.ndarray]) -> Named:
    """The weights of a `ConfigurableTransformerLM` as those of our CausalLM."""
    if config.sru.num_layers or config.position != "learned":
        raise NotImplementedError("no recorded model has a recurrent branch or fixed positions")
    w = iter(arrays)
    named = {"embedding.weight": next(w), "position.weight": next(w)}
    for index in range(config.num_hidden_layers):
        block = under("attention_norm", layer_norm(w))
        block |= under("attention.projection", attention_projection(config.attention, w))
        block |= under("feed_forward_norm", layer_norm(w))
        block |= under("feed_forward", feed_forward(config.feed_forward, w))
        named |= under(f"blocks.{index}", block)
    named |= under("norm", layer_norm(w))
    named |= under("head", multiplicative(w) if isinstance(config.head, c.MultiplicativeHeadConfig) else dense(w))
    if left := [array.shape for array in w]:
        raise ValueError(f"{len(left)} weights have no place in this model; their shapes are {left}")
    return named


def language_model_config(arguments: dict[str, Any]) -> c.ModelConfig:
    """The configuration that the arguments of a `ConfigurableTransformerLM` amount to."""
    attention = c.DenseProjectionConfig()
    if "attention_type" in arguments:
        assert arguments["attention_type"]["type"] == "MultiplicativeConvCausalAttention"
        options = arguments["attention_type"]["args"]
        attention = c.SparseProjectionConfig(
            qkv_modules=options["sparsity"], length_kernel=options["length_kernel_size"]
        )
    feed_forward_config = c.DenseFeedForwardConfig(intermediate_size=arguments["d_ff"])
    if "ff_sparsity" in arguments:
        block_size, rank, temperature, quant_prob = [*arguments["ff_sparsity"], 0.1, 0.3][:4]
        feed_forward_config = c.SparseFeedForwardConfig(
            intermediate_size=arguments["d_ff"],
            ff_block_size=block_size,
            controller_rank=rank,
            temperature=temperature,
            quant_prob=quant_prob,
        )
    head = c.DenseHeadConfig()
    if arguments.get("loss_sparsity"):
        head = c.MultiplicativeHeadConfig(head_modules=arguments["loss_sparsity"])
    return c.ModelConfig(
        vocab_size=arguments["vocab_size"],
        hidden_size=arguments["d_model"],
        num_hidden_layers=arguments["n_layers"],
        num_attention_heads=arguments["n_heads"],
        max_position_embeddings=arguments["max_len"],
        attention=attention,
        feed_forward=feed_forward_config,
        head=head,
    )
