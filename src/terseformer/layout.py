"""How weights lie in a packed file: declared from a configuration, filled from a state dict, then validated.

Names are those of the state dict. A matrix is cut into panels of 16 outputs, the 16 weights of one input side by side:
`NAME.panels` [panels, inputs, 16], and `NAME.bias`. If int8, four inputs of an output are side by side, `NAME.panels`
[panels, inputs / 4, 16, 4], with `NAME.scales` of the outputs and `NAME.sums` of their weights. The units of a sparse
feed-forward layer are records: a unit's column of the first matrix, its row of the second, and if int8 the scales of
both, in a whole number of cache lines. int8 is symmetric, with a scale for each output or unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from terseformer import config as c
from terseformer.tensorfile import Declared
from terseformer.waves import waves

Dtype = Literal["f32", "bf16", "int8"]
DTYPES: tuple[Dtype, ...] = ("f32", "bf16", "int8")
PANEL = 16
_LINE = 64
_BLOCK = 1 << 22
_NAMES: dict[Dtype, str] = {"f32": "F32", "bf16": "BF16", "int8": "I8"}
_SIZES: dict[Dtype, int] = {"f32": 4, "bf16": 2, "int8": 1}

AnyConfig = c.ModelConfig | c.EncoderDecoderConfig
Array = np.ndarray
Weights = Mapping[str, Array]
"""A state dict: float32 arrays by name."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a packed file and how it is made."""

    name: str
    declared: Declared
    sources: dict[str, tuple[int, ...]]
    """Names and shapes of what `fill` takes from the state dict."""
    fill: Callable[[Weights], Array]


def declare(config: AnyConfig, dtype: Dtype) -> list[Entry]:
    """All tensors of a packed model.

    Raises:
        ConfigError: the engine does not decode such a model.
    """
    for name, value in _undecoded(config):
        raise c.ConfigError(f"model.{name} = {value!r} is not decoded by the engine; decode with --backend torch")
    return list(_model(config, _Pack(dtype)))


def _undecoded(config: AnyConfig) -> Iterator[tuple[str, object]]:
    """The keys, and their values, of what the engine does not know."""
    is_decoder = isinstance(config, c.ModelConfig)
    for name in ("attention_pattern",) if is_decoder else ("attention_pattern", "encoder_attention_pattern"):
        if (kind := getattr(config, name).kind) not in ("softmax", "local", "lsh", "mixed"):
            yield f"{name}.kind", kind
    if isinstance(config, c.TerraformerConfig):
        for name in ("forget_every", "half_before_layer", "double_after_layer"):
            if value := getattr(config, name):
                yield name, value
        if config.last_norm_kind != config.norm:
            yield "last_norm", config.last_norm


def quantise(rows: Array) -> tuple[Array, Array]:
    """int8 rows and their float32 scales, [rows]: symmetric, the largest magnitude of a row becomes 127."""
    numbers, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):  # some rows at a time: a matrix may be as large as half of the memory
        part = rows[at : at + step]
        scale = np.abs(part).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
        with np.errstate(invalid="ignore"):  # the scale of a row with NaN is NaN, whatever its numbers are
            numbers[at : at + step] = np.rint(part / np.where(scale > 0, scale, np.float32(1))[:, None])
        scales[at : at + step] = scale
    return numbers, scales


def to_bf16(x: Array) -> Array:
    """The nearest bfloat16 of each float32 (of two, the even one), as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16(x: Array) -> Array:
    """float32 of bfloat16 numbers that are given as uint16."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _padded(x: Array, multiple: int) -> Array:
    """Zeros appended to the first dimension."""
    return np.pad(x, [(0, -len(x) % multiple), *[(0, 0)] * (x.ndim - 1)])


def _panels(matrix: Array) -> Array:
    """[outputs, inputs] as [panels, inputs, 16]."""
    return _padded(matrix, PANEL).reshape(-1, PANEL, matrix.shape[1]).transpose(0, 2, 1)


def _quads(inputs: int) -> int:
    return -(-inputs // 4)


def _quad_panels(matrix: Array, segments: int) -> Array:
    """[outputs, segments * inputs] as [panels, segments * inputs / 4, 16, 4], each segment padded with zeros."""
    parts = matrix.reshape(len(matrix), segments, -1)
    padded = _padded(np.pad(parts, [(0, 0), (0, 0), (0, -parts.shape[2] % 4)]), PANEL)
    return padded.reshape(len(padded) // PANEL, PANEL, -1, 4).transpose(0, 2, 1, 3)


def _sums(matrix: Array, segments: int) -> Array:
    """[outputs, segments * inputs] as [segments, outputs in whole panels], summed over the inputs."""
    parts = matrix.reshape(len(matrix), segments, -1).sum(axis=2, dtype=np.int64)
    return np.ascontiguousarray(_padded(parts, PANEL).T, np.float32)


class _Pack:
    """Makes the entries of one dtype; a name ending in `source` is one of the state dict."""

    def __init__(self, dtype: Dtype) -> None:
        self.dtype = dtype

    def vector(self, name: str, *shape: int, source: str = "") -> Iterator[Entry]:
        """A small tensor, always float32."""
        source = source or name
        yield Entry(name, Declared("F32", shape), {source: shape}, lambda w: w[source])

    def matrix(
        self,
        name: str,
        outputs: int,
        inputs: int,
        source: str,
        shape: tuple[int, ...],
        rows: Callable[[Array], Array],
        bias: str = "",
        segments: int = 1,
    ) -> Iterator[Entry]:
        """A matrix that `rows` makes of the source as [outputs, inputs], in equal segments; and its bias."""
        count, sources = -(-outputs // PANEL), {source: shape}
        if self.dtype == "int8":
            depth = segments * _quads(inputs // segments)
            yield Entry(
                f"{name}.panels",
                Declared("I8", (count, depth, PANEL, 4)),
                sources,
                lambda w: _quad_panels(quantise(rows(w[source]))[0], segments),
            )
            yield Entry(
                f"{name}.scales",
                Declared("F32", (count * PANEL,)),
                sources,
                lambda w: _padded(quantise(rows(w[source]))[1], PANEL),
            )
            yield Entry(
                f"{name}.sums",
                Declared("F32", (segments, count * PANEL)),
                sources,
                lambda w: _sums(quantise(rows(w[source]))[0], segments),
            )
        else:
            convert = to_bf16 if self.dtype == "bf16" else np.asarray
            declared = Declared(_NAMES[self.dtype], (count, inputs, PANEL))
            yield Entry(f"{name}.panels", declared, sources, lambda w: convert(_panels(rows(w[source]))))
        if bias:
            declared = Declared("F32", (count * PANEL,))
            yield Entry(f"{name}.bias", declared, {bias: (outputs,)}, lambda w: _padded(w[bias], PANEL))

    def dense(self, name: str, inputs: int, outputs: int, bias: bool = True, source: str = "") -> Iterator[Entry]:
        """A dense layer."""
        shape = (outputs, inputs)
        bias_source = f"{name}.bias" if bias else ""
        yield from self.matrix(name, *shape, source or f"{name}.weight", shape, np.asarray, bias_source)

    def multiplicative(
        self, name: str, inputs: int, outputs: int, modules: int, bias: bool = True, source: str = ""
    ) -> Iterator[Entry]:
        """A multiplicative layer: gates D, features E and a bias that is not padded."""
        source, width = source or name, outputs // modules
        yield from self.vector(f"{name}.modules_weight", modules, inputs, source=f"{source}.modules_weight")
        features = f"{source}.features_weight"
        yield from self.matrix(f"{name}.features_weight", width, inputs, features, (inputs, width), np.transpose)
        if bias:
            yield from self.vector(f"{name}.bias", outputs, source=f"{source}.bias")

    def convolution(
        self, name: str, module_in: int, module_out: int, module_kernel: int, length_kernel: int
    ) -> Iterator[Entry]:
        """A local convolution, as a matrix over the frames and modules that it sees."""
        inputs = length_kernel * module_kernel * module_in
        shape = (length_kernel, module_kernel, module_in, module_out)
        kernel = f"{name}.kernel"
        rows = lambda x: x.reshape(inputs, module_out).T  # noqa: E731
        yield from self.matrix(kernel, module_out, inputs, kernel, shape, rows, f"{name}.bias", length_kernel)

    def table(self, name: str, rows: int, size: int) -> Iterator[Entry]:
        """A row for each token: `NAME.weight`, with `NAME.scales` if int8."""
        source, shape = f"{name}.weight", (rows, size)
        if self.dtype == "int8":
            yield Entry(source, Declared("I8", shape), {source: shape}, lambda w: quantise(w[source])[0])
            yield Entry(f"{name}.scales", Declared("F32", (rows,)), {source: shape}, lambda w: quantise(w[source])[1])
        else:
            convert = to_bf16 if self.dtype == "bf16" else np.asarray
            yield Entry(source, Declared(_NAMES[self.dtype], shape), {source: shape}, lambda w: convert(w[source]))

    def units(self, name: str, count: int, size: int) -> Iterator[Entry]:
        """The records of a sparse layer's units."""
        content = 2 * size * _SIZES[self.dtype] + (8 if self.dtype == "int8" else 0)
        stride = -(-content // _LINE) * _LINE
        sources = (f"{name}.up_weight", f"{name}.down_weight")

        def fill(weights: Weights) -> Array:
            records = np.zeros((count, stride), np.int8)
            at = 0
            scales = []
            for source in sources:
                rows = weights[source]
                if self.dtype == "int8":
                    rows, scale = quantise(rows)
                    scales.append(scale)
                elif self.dtype == "bf16":
                    rows = to_bf16(rows)
                part = np.ascontiguousarray(rows).view(np.int8)
                records[:, at : at + part.shape[1]] = part
                at += part.shape[1]
            if scales:
                records[:, at:content] = np.stack(scales, axis=1).view(np.int8)
            return records

        yield Entry(f"{name}.units", Declared("I8", (count, stride)), dict.fromkeys(sources, (count, size)), fill)


def _model(config: AnyConfig, pack: _Pack) -> Iterator[Entry]:
    size, vocab_size = config.hidden_size, config.vocab_size
    yield from pack.table("embedding", vocab_size, size)
    yield from _positions(config, "position", pack)
    match config:
        case c.ModelConfig():
            for index in range(config.num_hidden_layers):
                yield from _block(config, f"blocks.{index}", config.attention, pack)
        case c.Seq2SeqConfig():
            yield from _positions(config.of_encoder, "encoder_position", pack)
            for index in range(config.num_encoder_layers):
                yield from _block(config, f"encoder_blocks.{index}", config.encoder_attention, pack)
            yield from _norm(config, "encoder_norm", pack)
            for index in range(config.num_decoder_layers):
                yield from _block(config, f"blocks.{index}", config.attention, pack)
                yield from _norm(config, f"blocks.{index}.cross_norm", pack)
                yield from _cross_projection(config, f"blocks.{index}.cross.projection", pack)
        case c.TerraformerConfig():
            yield from _positions(config.of_encoder, "encoder_position", pack)
            yield from _reversible(config, "encoder", config.num_encoder_layers, 1, config.encoder_attention, pack)
            if not config.reversible_encoder:
                yield from pack.dense("encoder_out", size, size)
                yield from _norm(config, "encoder_norm", pack)
            attentions = config.num_attention_layers
            yield from _reversible(config, "decoder", config.num_decoder_layers, attentions, config.attention, pack)
    yield from _norm(config, "norm", pack)
    yield from _head(config.head, size, vocab_size, pack)


def _positions(config: AnyConfig, name: str, pack: _Pack) -> Iterator[Entry]:
    """A vector for each position, whatever makes it in layers/position.py."""
    positions, size = config.max_position_embeddings, config.hidden_size
    declared = Declared("F32", (positions, size))
    match config.position:
        case "learned":
            yield from pack.vector(f"{name}.weight", positions, size)
        case "sinusoidal":
            yield Entry(f"{name}.weight", declared, {}, lambda _: _sinusoids(positions, size))
        case "sin_cos":
            halves = [*range(0, size, 2), *range(1, size, 2)]
            yield Entry(f"{name}.weight", declared, {}, lambda _: _sinusoids(positions, size)[:, halves])
        case "fixed_base":
            sources: dict[str, tuple[int, ...]] = {f"{name}.digits": (32, size // 8), f"{name}.start": (size,)}
            yield Entry(f"{name}.weight", declared, sources, lambda w: _digits(positions, *(w[key] for key in sources)))
        case "infinite":
            key = f"{name}.weight"
            yield Entry(key, declared, {key: (size, size)}, lambda w: waves(positions, size) @ w[key])
        case "axial":
            sides = zip(config.axial_shape, config.axial_sizes, strict=True)
            tables = {f"{name}.tables.{axis}": side for axis, side in enumerate(sides)}
            yield Entry(
                f"{name}.weight", declared, dict(tables), lambda w: _axial(positions, [w[key] for key in tables])
            )


def _block(config: AnyConfig, name: str, attention: c.AttentionProjectionConfig, pack: _Pack) -> Iterator[Entry]:
    yield from _norm(config, f"{name}.attention_norm", pack)
    yield from _projection(attention, f"{name}.attention.projection", config.hidden_size, pack)
    yield from _feed_forward_layer(config, name, pack)


def _reversible(
    config: c.TerraformerConfig,
    name: str,
    blocks: int,
    attentions: int,
    attention: c.AttentionProjectionConfig,
    pack: _Pack,
) -> Iterator[Entry]:
    """A reversible stack: in each block some layers of attention, then one of feed-forward."""
    for index in range(blocks * (attentions + 1)):
        layer = f"{name}.layers.{index}"
        if index % (attentions + 1) < attentions:
            yield from _norm(config, f"{layer}.norm", pack)
            yield from _projection(attention, f"{layer}.attention.projection", config.hidden_size, pack)
        else:
            yield from _feed_forward_layer(config, layer, pack)


def _feed_forward_layer(config: AnyConfig, name: str, pack: _Pack) -> Iterator[Entry]:
    size = config.hidden_size
    yield from _norm(config, f"{name}.feed_forward_norm", pack)
    yield from _feed_forward(config.feed_forward, f"{name}.feed_forward", size, pack)
    if config.sru.num_layers:
        yield from _norm(config, f"{name}.recurrent_norm", pack)
        yield from _recurrent(config.sru, f"{name}.recurrent", size, pack)


def _sinusoids(positions: int, size: int) -> Array:
    """As layers/position.py has them, in float32."""
    steps = np.arange(0, size, 2, dtype=np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * np.exp(steps * np.float32(-np.log(10000.0) / size))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(positions, -1)[:, :size]


def _digits(positions: int, weights: Array, start: Array) -> Array:
    """The digits of positions in the bases 11, 13, 14 and 15, each times its vector of `weights`."""
    bases = np.array([11, 13, 14, 15])[:, None]
    digits = np.arange(positions)[:, None, None] // bases ** np.arange(8) % bases  # [positions, bases, 8]
    rows = np.einsum("tni,niw->tiw", digits.astype(np.float32), weights.reshape(4, 8, -1)).reshape(positions, -1)
    rows[0] += start
    return rows


def _axial(positions: int, tables: list[Array]) -> Array:
    """The vectors of the coordinates of positions, the last of which runs fastest."""
    places = np.unravel_index(np.arange(positions), tuple(len(table) for table in tables))
    return np.concatenate([table[place] for table, place in zip(tables, places, strict=True)], axis=1)


def _norm(config: AnyConfig, name: str, pack: _Pack) -> Iterator[Entry]:
    yield from pack.vector(f"{name}.weight", config.hidden_size)
    if config.norm == "layer_norm":
        yield from pack.vector(f"{name}.bias", config.hidden_size)


def _projection(config: c.AttentionProjectionConfig, name: str, size: int, pack: _Pack) -> Iterator[Entry]:
    if isinstance(config, c.SparseProjectionConfig):
        yield from _sparse_projection(config, name, size, pack)
        return
    for part in (f"{name}.query", f"{name}.key", f"{name}.value", f"{name}.out"):
        match config:
            case c.DenseProjectionConfig():
                yield from pack.dense(part, size, size, config.bias)
            case c.LowRankProjectionConfig():
                yield from pack.dense(f"{part}.0", size, config.rank)
                yield from pack.dense(f"{part}.1", config.rank, size)
            case c.MultiplicativeProjectionConfig():
                yield from pack.multiplicative(part, size, size, config.qkv_modules)
            case c.MultiplicativeModularProjectionConfig():
                yield from _multiplicative_modular(part, size, config.qkv_modules, pack)
            case c.LocallyConnectedProjectionConfig():
                yield from _locally_connected(part, size, config.qkv_modules, config.module_kernel, pack)
            case c.LocalConvolutionProjectionConfig():
                width = size // config.qkv_modules
                yield from pack.convolution(part, width, width, config.module_kernel, config.length_kernel)


def _cross_projection(config: c.Seq2SeqConfig, name: str, pack: _Pack) -> Iterator[Entry]:
    size, cross = config.hidden_size, config.cross_attention
    bias = not isinstance(cross, c.DenseProjectionConfig) or cross.bias
    yield from pack.dense(f"{name}.key", size, size, bias)
    yield from pack.dense(f"{name}.value", size, size, bias)
    if isinstance(cross, c.DenseProjectionConfig):
        yield from pack.dense(f"{name}.query", size, size, bias)
        yield from pack.dense(f"{name}.out", size, size, bias)
        return
    width = size // cross.qkv_modules
    yield from pack.multiplicative(f"{name}.query.shared", size, size, cross.qkv_modules)
    yield from pack.convolution(f"{name}.query.convolution", width, width, cross.module_kernel, cross.length_kernel)


def _sparse_projection(config: c.SparseProjectionConfig, name: str, size: int, pack: _Pack) -> Iterator[Entry]:
    modules, width = config.qkv_modules, size // config.qkv_modules
    wide = (config.module_kernel, config.length_kernel)
    yield from pack.multiplicative(f"{name}.shared", size, size, modules)
    yield from pack.convolution(f"{name}.query", width, width, *wide)
    if not config.share_qk:
        yield from pack.convolution(f"{name}.key", width, width, *wide)
    value_width = width if config.value_input == "none" else 2 * width
    yield from pack.convolution(f"{name}.value", value_width, width, 1, config.length_kernel)
    if "mult" in config.output_layer:
        yield from pack.multiplicative(f"{name}.out_mult", size, size, modules)
    if "conv" in config.output_layer:
        yield from pack.convolution(f"{name}.out_conv", width, width, *wide)


def _locally_connected(name: str, size: int, modules: int, kernel: int, pack: _Pack) -> Iterator[Entry]:
    """A matrix for each output module, over the modules that it sees: in the state dict the weights belong to these."""
    width = size // modules
    shape = (modules, kernel, width, width)

    def rows(module: int) -> Callable[[Array], Array]:
        seen = [(module - kernel // 2 + i) % modules for i in range(kernel)]
        return lambda x: np.concatenate([x[s, i] for i, s in enumerate(seen)]).T

    for module in range(modules):
        yield from pack.matrix(f"{name}.weight.{module}", width, kernel * width, f"{name}.weight", shape, rows(module))
    yield from pack.vector(f"{name}.bias", modules, width)


def _multiplicative_modular(name: str, size: int, modules: int, pack: _Pack) -> Iterator[Entry]:
    width = size // modules
    yield from pack.multiplicative(name, size, size, modules, bias=False)

    def rows(module: int) -> Callable[[Array], Array]:
        return lambda x: x[module].T

    shape = (modules, width, width)
    for module in range(modules):
        yield from pack.matrix(
            f"{name}.mixing.weight.{module}", width, width, f"{name}.mixing_weight", shape, rows(module)
        )
    yield from pack.vector(f"{name}.mixing.bias", size, source=f"{name}.bias")


def _feed_forward(config: c.FeedForwardConfig, name: str, size: int, pack: _Pack) -> Iterator[Entry]:
    width = config.intermediate_size
    if isinstance(config, c.DenseFeedForwardConfig):
        yield from pack.dense(f"{name}.up", size, width)
        if config.activation == "swiglu":
            yield from pack.dense(f"{name}.gate", size, width)
        yield from pack.dense(f"{name}.down", width, size)
        return
    if isinstance(config, c.SparseFeedForwardConfig):
        yield from pack.dense(f"{name}.controller.down", size, config.controller_rank, bias=False)
        yield from pack.dense(f"{name}.controller.up", config.controller_rank, width)
    else:
        yield from pack.dense(f"{name}.controller.choose", size, config.num_experts, bias=False)
    yield from pack.units(name, width, size)
    yield from pack.vector(f"{name}.bias", size)


def _recurrent(config: c.SRUConfig, name: str, size: int, pack: _Pack) -> Iterator[Entry]:
    yield from pack.dense(f"{name}.down", size, config.size)
    for layer in range(config.num_layers):
        yield from pack.dense(f"{name}.layers.{layer}.gates", config.size, 3 * config.size)
    yield from pack.dense(f"{name}.up", config.size, size)


def _head(config: c.HeadConfig, size: int, vocab_size: int, pack: _Pack) -> Iterator[Entry]:
    if isinstance(config, c.DenseHeadConfig):
        yield from pack.dense(
            "head", size, vocab_size, bias=not config.tied, source="embedding.weight" if config.tied else ""
        )
        return
    source = "head" if config.sparse_prob == 1 else "head.sparse"
    yield from pack.multiplicative("head", size, vocab_size, config.head_modules, source=source)
