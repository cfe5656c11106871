"""Trax's weights under our names.

Trax keeps the weights of a model as a list in the order of its layer tree. Here each part declares what it takes from
the front of such a list: for each weight our name, Trax's shape, and what turns one into the other. The turns only
permute, so that gradients go the same way as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from terseformer import config as c
from terseformer.errors import UserError

Array = np.ndarray


class TraxError(UserError):
    """A model or a file of Trax's that cannot be taken over: the message says where and why."""


@dataclass(frozen=True)
class Entry:
    """One weight."""

    name: str
    """Ours; empty for what Trax stores and does not use. Entries of one name are rows of one array."""
    shape: tuple[int, ...]
    """Trax's."""
    turn: Callable[[Array], Array] = lambda array: array
    """From Trax's layout to ours."""
    twin: str = ""
    """Another of ours that is the same, if any."""
    may_be_product: bool = False
    """Trax may have two matrices in its place, whose product it is."""


Entries = list[Entry]

Layout = Literal["whole", "heads", "heads, one for q and k"]
"""How an attention's weights lie: whole matrices, or a matrix for each head, stacked."""


def under(prefix: str, entries: Entries) -> Entries:
    """The weights of a submodule."""

    def below(name: str) -> str:
        return f"{prefix}.{name}" if name else ""

    return [replace(entry, name=below(entry.name), twin=below(entry.twin)) for entry in entries]


def fill(entries: Sequence[Entry], arrays: Sequence[Array]) -> dict[str, Array]:
    """The weights by name.

    Raises:
        TraxError: the shapes are others; the message names the first place where they part.
    """
    named: dict[str, list[Array]] = {}
    index = 0
    for entry in entries:
        if index == len(arrays):
            raise TraxError(f"the file ends after {index} weights; {entry.name}, {list(entry.shape)}, should follow")
        array, following = arrays[index], index + 1
        if entry.may_be_product and following < len(arrays) and _multiply_to(entry.shape, array, arrays[following]):
            array, following = array @ arrays[following], following + 1
        if array.shape != entry.shape:
            raise TraxError(
                f"weight {index} of the file has shape {list(array.shape)}, but {entry.name} needs "
                f"{list(entry.shape)}; do the model's arguments belong to these weights?"
            )
        for name in filter(None, (entry.name, entry.twin)):
            named.setdefault(name, []).append(entry.turn(array))
        index = following
    if len(arrays) > index:
        raise TraxError(
            f"the file has {len(arrays)} weights, but the model has {index}; the first that is left over has "
            f"shape {list(arrays[index].shape)}"
        )
    return {
        name: np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        for name, parts in named.items()
    }


def _multiply_to(shape: tuple[int, ...], left: Array, right: Array) -> bool:
    """Whether two arrays are matrices with a product of that shape, and the first one alone is not."""
    is_product = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    return is_product and left.shape != shape and (left.shape[0], right.shape[1]) == shape


def _transposed(array: Array) -> Array:
    return array.T


# Small parts.


def dense(size_in: int, size_out: int, bias: bool = True) -> Entries:
    """Trax's matrix is [in, out]."""
    return [Entry("weight", (size_in, size_out), _transposed)] + ([Entry("bias", (size_out,))] if bias else [])


def layer_norm(size: int, kind: str = "layer_norm") -> Entries:
    """A gain and a bias, which an RMS norm, `center=False`, does not use."""
    return [Entry("weight", (size,)), Entry("bias" if kind == "layer_norm" else "", (size,))]


def low_rank(size_in: int, size_out: int, rank: int) -> Entries:
    """`LowRankDense`."""
    return under("0", dense(size_in, rank)) + under("1", dense(rank, size_out))


def multiplicative(size_in: int, size_out: int, modules: int) -> Entries:
    """`FactoredDense`."""
    return [
        Entry("modules_weight", (modules, size_in)),
        Entry("features_weight", (size_in, size_out // modules)),
        Entry("bias", (size_out,)),
    ]


def multiplicative_modular(size: int, modules: int) -> Entries:
    """`MultiplicativeModularSparseDense`."""
    width = size // modules
    return [
        Entry("modules_weight", (modules, size)),
        Entry("features_weight", (size, width)),
        Entry("mixing_weight", (modules, width, width)),
        Entry("bias", (size,)),
    ]


def local_convolution(module_in: int, module_out: int, module_kernel: int, length_kernel: int) -> Entries:
    """`LocallyConvDense`."""
    return [Entry("kernel", (length_kernel, module_kernel, module_in, module_out)), Entry("bias", (module_out,))]


def locally_connected(module_in: int, module_out: int, modules: int, module_kernel: int) -> Entries:
    """`LocallyConnectedDense`."""
    return [Entry("weight", (modules, module_kernel, module_in, module_out)), Entry("bias", (modules, module_out))]


def sru(size: int) -> Entries:
    """`SRU`."""
    return under("gates", dense(size, 3 * size))


# Feed-forward layers.


def feed_forward(config: c.FeedForwardConfig, size: int) -> Entries:
    """The layer that a configuration names."""
    units = config.intermediate_size
    match config:
        case c.DenseFeedForwardConfig():
            return under("up", dense(size, units)) + under("down", dense(units, size))
        case c.SparseFeedForwardConfig(ff_block_size=block, controller_rank=rank):
            return _sparse_feed_forward(size, units, block, rank)
        case c.BlockFeedForwardConfig() | c.SwitchFeedForwardConfig():
            return [
                Entry("controller.choose.weight", (size, config.num_experts), _transposed),
                Entry("up_weight", (size, units), _transposed),
                Entry("down_weight", (units, size)),
                Entry("bias", (size,)),
            ]


def _sparse_feed_forward(size: int, units: int, block: int, rank: int) -> Entries:
    """Unit j of ours is element j % N of block j // N."""
    blocks = units // block
    return [
        Entry("controller.down.weight", (size, rank), _transposed),
        Entry("controller.up.weight", (rank, blocks, block), lambda a: a.reshape(rank, units).T),
        Entry("controller.up.bias", (blocks, block), lambda a: a.reshape(units)),
        Entry("up_weight", (size, blocks, block), lambda a: a.reshape(size, units).T),
        Entry("down_weight", (block, blocks, size), lambda a: a.transpose(1, 0, 2).reshape(units, size)),
        Entry("bias", (size,)),
    ]


# Attention.


def _self_attention(
    config: c.ModelConfig | c.EncoderDecoderConfig, name: str, layouts: Mapping[str, Layout]
) -> Entries:
    """Of the attention that a key of the configuration names."""
    layout, size = layouts.get(name, "whole"), config.hidden_size
    if layout == "whole":
        return attention_projection(getattr(config, name), size)
    return _projection_by_heads(size, config.num_attention_heads, layout)


def attention_projection(config: c.AttentionProjectionConfig, size: int) -> Entries:
    """q, k, v and the output, as whole matrices."""
    match config:
        case c.SparseProjectionConfig():
            return _sparse_projection(config, size)
        case c.DenseProjectionConfig(bias=bias):
            layer = dense(size, size, bias)
        case c.LowRankProjectionConfig(rank=rank):
            layer = low_rank(size, size, rank)
        case c.MultiplicativeProjectionConfig(qkv_modules=s):
            layer = multiplicative(size, size, s)
        case c.MultiplicativeModularProjectionConfig(qkv_modules=s):
            layer = multiplicative_modular(size, s)
        case c.LocallyConnectedProjectionConfig(qkv_modules=s, module_kernel=k):
            layer = locally_connected(size // s, size // s, s, k)
        case c.LocalConvolutionProjectionConfig(qkv_modules=s, module_kernel=k, length_kernel=length):
            layer = local_convolution(size // s, size // s, k, length)
    return [entry for name in ("query", "key", "value", "out") for entry in under(name, layer)]


def _projection_by_heads(size: int, heads: int, layout: Layout) -> Entries:
    shape = (heads, size, size // heads)

    def outputs(array: Array) -> Array:
        return array.transpose(0, 2, 1).reshape(size, size)

    if layout == "heads":
        entries = [Entry(f"{name}.weight", shape, outputs) for name in ("query", "key", "value")]
    else:  # the mean of q and k, which is what LSH attention takes, is then either
        entries = [Entry("query.weight", shape, outputs, twin="key.weight"), Entry("value.weight", shape, outputs)]
    return [*entries, Entry("out.weight", (heads, size // heads, size), lambda array: array.reshape(size, size).T)]


def _sparse_projection(config: c.SparseProjectionConfig, size: int) -> Entries:
    modules, length = config.qkv_modules, config.length_kernel
    width = size // modules
    convolution = local_convolution(width, width, config.module_kernel, length)
    value_width = width if config.value_input == "none" else 2 * width
    entries = under("shared", multiplicative(size, size, modules)) + under("query", convolution)
    if not config.share_qk:
        entries += under("key", convolution)
    entries += under("value", local_convolution(value_width, width, 1, length))
    if "mult" in config.output_layer:
        entries += under("out_mult", multiplicative(size, size, modules))
    if "conv" in config.output_layer:
        entries += under("out_conv", convolution)
    return entries


def cross_projection(config: c.CrossProjectionConfig, size: int) -> Entries:
    """`AttentionQKV`, dense or with a sparse query."""
    layer = dense(size, size)
    if isinstance(config, c.DenseProjectionConfig):
        return [entry for name in ("query", "key", "value", "out") for entry in under(name, layer)]
    width = size // config.qkv_modules
    query = under("shared", multiplicative(size, size, config.qkv_modules))
    query += under("convolution", local_convolution(width, width, config.module_kernel, config.length_kernel))
    return under("query", query) + under("key", layer) + under("value", layer)


# Models.


def model(config: c.ModelConfig | c.EncoderDecoderConfig, layouts: Mapping[str, Layout] | None = None) -> Entries:
    """All weights of a model, in Trax's order.

    Args:
        config: the model.
        layouts: of `attention` and `encoder_attention`, where their weights are not whole matrices.
    """
    match config:
        case c.ModelConfig():
            return _language_model(config, layouts or {})
        case c.Seq2SeqConfig():
            return _seq2seq(config, layouts or {})
        case c.TerraformerConfig():
            return _terraformer(config, layouts or {})


def _norm(config: c.ModelConfig | c.EncoderDecoderConfig) -> Entries:
    return layer_norm(config.hidden_size, config.norm)


def _feed_forward_layer(config: c.ModelConfig | c.EncoderDecoderConfig) -> Entries:
    """With the norm before it and the recurrent branch beside it."""
    size, narrow = config.hidden_size, config.sru.size
    entries = under("feed_forward_norm", _norm(config)) + under("feed_forward", feed_forward(config.feed_forward, size))
    if config.sru.num_layers:
        branch = under("down", dense(size, narrow))
        for index in range(config.sru.num_layers):
            branch += under(f"layers.{index}", sru(narrow))
        branch += under("up", dense(narrow, size))
        entries += under("recurrent_norm", _norm(config)) + under("recurrent", branch)
    return entries


def _head(config: c.ModelConfig | c.EncoderDecoderConfig) -> Entries:
    size, vocab_size = config.hidden_size, config.vocab_size
    if isinstance(config.head, c.MultiplicativeHeadConfig):
        return under("head", multiplicative(size, vocab_size, config.head.head_modules))
    return under("head", dense(size, vocab_size))


def _embedding(config: c.ModelConfig | c.EncoderDecoderConfig) -> Entries:
    return [Entry("embedding.weight", (config.vocab_size, config.hidden_size))]


def _position(config: c.ModelConfig | c.EncoderDecoderConfig, name: str = "position") -> Entries:
    size = config.hidden_size
    match config.position:
        case "learned":
            # A product where the reference's `PositionalEncoding.d_feature` is set, as in its medium Terraformer.
            return [Entry(f"{name}.weight", (config.max_position_embeddings, size), may_be_product=True)]
        case "fixed_base":
            start = Entry(f"{name}.start", (1, 1, size), lambda array: array[0, 0])
            return [*[Entry(f"{name}.digits", (1, size // 8))] * 32, start]
        case "infinite":
            return [Entry(f"{name}.weight", (size, size))]
        case "axial":
            return [
                Entry(f"{name}.tables.{axis}", _along(config.axial_shape, axis, width), _squeezed)
                for axis, width in enumerate(config.axial_sizes)
            ]
        case _:
            return []


def _along(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """Of an array that is long in one of a box's dimensions."""
    return (1, *(side if index == axis else 1 for index, side in enumerate(shape)), size)


def _squeezed(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _language_model(config: c.ModelConfig, layouts: Mapping[str, Layout]) -> Entries:
    entries = _embedding(config) + _position(config)
    for index in range(config.num_hidden_layers):
        block = under("attention_norm", _norm(config))
        block += under("attention.projection", _self_attention(config, "attention", layouts))
        entries += under(f"blocks.{index}", block + _feed_forward_layer(config))
    return entries + under("norm", _norm(config)) + _head(config)


def _seq2seq(config: c.Seq2SeqConfig, layouts: Mapping[str, Layout]) -> Entries:
    size = config.hidden_size
    entries = _embedding(config) + _position(config, "encoder_position")
    for index in range(config.num_encoder_layers):
        block = under("attention_norm", _norm(config))
        block += under("attention.projection", _self_attention(config, "encoder_attention", layouts))
        entries += under(f"encoder_blocks.{index}", block + _feed_forward_layer(config))
    entries += under("encoder_norm", _norm(config)) + _position(config)
    for index in range(config.num_decoder_layers):
        block = under("attention_norm", _norm(config))
        block += under("attention.projection", _self_attention(config, "attention", layouts))
        block += under("cross_norm", _norm(config))
        block += under("cross.projection", cross_projection(config.cross_attention, size))
        entries += under(f"blocks.{index}", block + _feed_forward_layer(config))
    return entries + under("norm", _norm(config)) + _head(config)


def _terraformer(config: c.TerraformerConfig, layouts: Mapping[str, Layout]) -> Entries:
    first, last = config.first, config.last
    size = first.hidden_size

    def stack(blocks: tuple[c.TerraformerConfig, ...], attentions: int, name: str) -> Entries:
        entries, forgets = [], config.forgets(len(blocks))
        for index, block in enumerate(blocks):
            attention = under("norm", _norm(block))
            attention += under("attention.projection", _self_attention(block, name, layouts))
            layers = [attention] * attentions + [_feed_forward_layer(block)]
            for place, layer in enumerate(layers, index * len(layers)):
                entries += under(f"layers.{place}", layer)
            if index + 1 in forgets:
                forget = dense(block.hidden_size, block.hidden_size)
                entries += under(f"joints.{(index + 1) * len(layers)}.dense", forget)
        return entries

    entries = _embedding(first) + _position(first, "encoder_position") + _position(first)
    entries += under("encoder", stack((first,) * config.num_encoder_layers, 1, "encoder_attention"))
    if not config.reversible_encoder:
        entries += under("encoder_out", dense(size, size))
        entries += under("encoder_norm", layer_norm(size, config.last_norm_kind))
    entries += under("decoder", stack(config.decoder_blocks, config.num_attention_layers, "attention"))
    return entries + under("norm", layer_norm(last.hidden_size, config.last_norm_kind)) + _head(last)
