"""What a model stores, reads and computes: one formula for each kind of layer.

Decoding is counted for one token at batch 1 in the form that reads the fewest weights: gathered
units in a sparse feed-forward layer, factors in a multiplicative layer. Training is counted in the
form that computes all units and masks them. A multiply-add is a product with a weight or, in
attention, with a key or a value; norms, biases, activations and the recurrence are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, replace

from terseformer import config as c


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a layer costs; costs add up."""

    parameters: int = 0
    """Parameters stored."""
    parameters_read: int = 0
    """Parameters read to decode one token."""
    macs: int = 0
    """Multiply-adds to decode one token."""
    training_macs: int = 0
    """Multiply-adds of the forward pass for one token of a batch in training or of a long prompt."""
    cache_read: int = 0
    """Elements of the key-value cache that are read to decode one token."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, count: int) -> Cost:
        return Cost(**{name: value * count for name, value in vars(self).items()})


@dataclass(frozen=True)
class Part:
    """A row of the table: a layer that stands `count` times in the model."""

    name: str
    count: int
    each: Cost

    @property
    def total(self) -> Cost:
        """The cost of all of them."""
        return self.each * self.count


@dataclass(frozen=True)
class Account:
    """The parts of a model, in the order of the data flow, and their totals."""

    parts: tuple[Part, ...]
    context: int
    """Tokens that attention looks at, the present one included."""

    @property
    def total(self) -> Cost:
        """The cost of the model."""
        return sum((part.total for part in self.parts), Cost())

    @property
    def parameters(self) -> int:
        """Parameters stored; those of a tied head count once."""
        return self.total.parameters

    @property
    def flops_per_token(self) -> int:
        """Operations to decode one token, two for each multiply-add."""
        return 2 * self.total.macs

    @property
    def training_flops_per_token(self) -> int:
        """Operations of a training step for each token: the backward pass costs twice the forward pass."""
        return 6 * self.total.training_macs

    def bytes_per_token(self, bytes_per_parameter: int | float = 4) -> int:
        """Bytes of parameters that are read to decode one token at batch 1."""
        return round(self.total.parameters_read * bytes_per_parameter)

    def cache_bytes_per_token(self, bytes_per_element: int | float = 4) -> int:
        """Bytes of keys and values that are read to decode one token at batch 1."""
        return round(self.total.cache_read * bytes_per_element)


def account(config: c.ModelConfig | c.EncoderDecoderConfig, context: int = 0, num_source: int = 0) -> Account:
    """The costs of a model; of an encoder-decoder, what it stores, and what a token of the target costs.

    The encoder, and the keys and values of cross-attention, which are made once for a source, count as stored only.

    Args:
        config: the model.
        context: tokens that self-attention looks at, the present one included (in a Terraformer the source's too); in
            training the sequence length, whose masked half is computed too. 0 leaves out what depends on it.
        num_source: tokens that cross-attention looks at.
    """
    first, last = (config.first, config.last) if isinstance(config, c.TerraformerConfig) else (config, config)
    size = first.hidden_size
    parts = (
        Part("embedding", 1, table_cost(config.vocab_size, size)),
        *(() if isinstance(first, c.ModelConfig) else _encoder_parts(first)),
        Part("position", 1, position_cost(first)),
        *_decoder_parts(config, context, num_source),
        Part("final_norm", 1, norm_cost(last.last_norm_kind, last.hidden_size)),
        Part("head", 1, head_cost(last.head, last.hidden_size, last.vocab_size)),
    )
    return Account(tuple(part for part in parts if part.count and any(astuple(part.each))), context)


def _decoder_parts(config: c.ModelConfig | c.EncoderDecoderConfig, context: int, num_source: int) -> tuple[Part, ...]:
    if isinstance(config, c.TerraformerConfig):
        parts = [part for block in config.decoder_blocks for part in _block_parts(block, 1, context, num_source)]
        forget = dense_cost(config.hidden_size, config.hidden_size)
        return (*_added(parts), Part("forget", len(config.forgets(config.num_decoder_layers)), forget))
    blocks = config.num_hidden_layers if isinstance(config, c.ModelConfig) else config.num_decoder_layers
    return _block_parts(config, blocks, context, num_source)


def _added(parts: list[Part]) -> list[Part]:
    """The parts with equal ones counted together; where blocks differ in width, so do their parts."""
    counts: Counter[tuple[str, Cost]] = Counter()
    for part in parts:
        counts[part.name, part.each] += part.count
    return [Part(name, count, each) for (name, each), count in counts.items()]


def _block_parts(
    config: c.ModelConfig | c.EncoderDecoderConfig, blocks: int, context: int, num_source: int
) -> tuple[Part, ...]:
    size = config.hidden_size
    attentions = blocks * (config.num_attention_layers if isinstance(config, c.TerraformerConfig) else 1)
    cross = blocks if isinstance(config, c.Seq2SeqConfig) else 0
    cross_cost = cross_attention_cost(config.cross_attention, size) if isinstance(config, c.Seq2SeqConfig) else Cost()
    feed_forwards = blocks * (2 if config.sru.num_layers else 1)  # each branch has a norm
    return (
        Part("attention", attentions, attention_cost(config.attention, size)),
        Part("attention_scores", attentions, pattern_cost(config, context)),
        Part("cross_attention", cross, cross_cost),
        Part("cross_attention_scores", cross, scores_cost(size, num_source)),
        Part("feed_forward", blocks, feed_forward_cost(config.feed_forward, size)),
        Part("recurrent", blocks, recurrent_cost(config.sru, size)),
        Part("norms", attentions + cross + feed_forwards, norm_cost(config.norm, size)),
    )


def _encoder_parts(config: c.EncoderDecoderConfig) -> tuple[Part, ...]:
    size, blocks = config.hidden_size, config.num_encoder_layers
    has_end = not (isinstance(config, c.TerraformerConfig) and config.reversible_encoder)
    end, num_forgets = norm_cost(config.last_norm_kind, size), 0
    if isinstance(config, c.TerraformerConfig):
        end, num_forgets = end + dense_cost(size, size), len(config.forgets(blocks))
    parts = (
        Part("encoder_position", 1, position_cost(config.of_encoder)),
        Part("encoder_attention", blocks, attention_cost(config.encoder_attention, size)),
        Part("encoder_feed_forward", blocks, feed_forward_cost(config.feed_forward, size)),
        Part("encoder_recurrent", blocks, recurrent_cost(config.sru, size)),
        Part("encoder_norms", blocks * (3 if config.sru.num_layers else 2), norm_cost(config.norm, size)),
        Part("encoder_forget", num_forgets, dense_cost(size, size)),
        Part("encoder_end", int(has_end), end),
    )
    return tuple(Part(part.name, part.count, Cost(parameters=part.each.parameters)) for part in parts)


def _weights(parameters: int, macs: int, read: int | None = None, training_macs: int | None = None) -> Cost:
    """A layer that reads all that it stores and computes the same in training, where nothing else is said."""
    return Cost(
        parameters=parameters,
        parameters_read=parameters if read is None else read,
        macs=macs,
        training_macs=macs if training_macs is None else training_macs,
    )


def table_cost(rows: int, size: int) -> Cost:
    """A table of vectors, of which a token reads one."""
    return _weights(rows * size, 0, read=size)


def position_cost(config: c.ModelConfig | c.EncoderDecoderConfig) -> Cost:
    """The vectors that are added to the embedding's."""
    match config.position:
        case "learned":
            return table_cost(config.max_position_embeddings, config.hidden_size)
        case "fixed_base":  # a vector of the digits in each of four bases, and one of the start
            return _weights(5 * config.hidden_size, 4 * config.hidden_size)
        case "infinite":  # a matrix, times waves that are computed
            return dense_cost(config.hidden_size, config.hidden_size, bias=False)
        case "axial":
            sides = zip(config.axial_shape, config.axial_sizes, strict=True)
            return sum((table_cost(side, size) for side, size in sides), Cost())
        case _:
            return Cost()


def norm_cost(kind: str, size: int) -> Cost:
    """`layer_norm` has a gain and a bias, `rms_norm` a gain."""
    return _weights(size if kind == "rms_norm" else 2 * size, 0)


def dense_cost(size_in: int, size_out: int, bias: bool = True) -> Cost:
    """One matrix, with or without bias."""
    return _weights(size_in * size_out + size_out * bias, size_in * size_out)


def low_rank_cost(size_in: int, size_out: int, rank: int) -> Cost:
    """Two dense layers with a bottleneck between them."""
    return dense_cost(size_in, rank) + dense_cost(rank, size_out)


def multiplicative_cost(size_in: int, size_out: int, num_modules: int) -> Cost:
    """Few weights, but the arithmetic of a dense layer: by the factors, or in training by their product.

    The product itself, formed once a call, is left out.
    """
    dense = size_in * size_out
    factors = num_modules * size_in + dense // num_modules
    return _weights(factors + size_out, num_modules * size_in + dense, training_macs=dense)


def local_convolution_cost(
    module_in: int, module_out: int, num_modules: int, module_kernel: int, length_kernel: int
) -> Cost:
    """One kernel that all modules share; those beyond the edges, zeros, are multiplied too."""
    kernel = length_kernel * module_kernel * module_in * module_out
    return _weights(kernel + module_out, kernel * num_modules)


def locally_connected_cost(module_in: int, module_out: int, num_modules: int, module_kernel: int) -> Cost:
    """A kernel for each module."""
    kernels = num_modules * module_kernel * module_in * module_out
    return _weights(kernels + num_modules * module_out, kernels)


def multiplicative_modular_cost(size: int, num_modules: int) -> Cost:
    """The factors of a multiplicative layer, then a matrix for each module."""
    width = size // num_modules
    modules, features, mixing = num_modules * size, size * width, size * width
    return _weights(modules + features + mixing + size, modules + size * size + mixing)


def attention_cost(config: c.AttentionProjectionConfig, size: int) -> Cost:
    """Query, key, value and output, without the scores."""
    match config:
        case c.DenseProjectionConfig():
            return dense_cost(size, size, config.bias) * 4
        case c.LowRankProjectionConfig():
            return low_rank_cost(size, size, config.rank) * 4
        case c.MultiplicativeProjectionConfig():
            return multiplicative_cost(size, size, config.qkv_modules) * 4
        case c.MultiplicativeModularProjectionConfig():
            return multiplicative_modular_cost(size, config.qkv_modules) * 4
        case c.LocallyConnectedProjectionConfig(qkv_modules=s):
            return locally_connected_cost(size // s, size // s, s, config.module_kernel) * 4
        case c.LocalConvolutionProjectionConfig(qkv_modules=s):
            return local_convolution_cost(size // s, size // s, s, config.module_kernel, config.length_kernel) * 4
        case c.SparseProjectionConfig():
            return _sparse_projection_cost(config, size)


def _sparse_projection_cost(config: c.SparseProjectionConfig, size: int) -> Cost:
    modules, width = config.qkv_modules, size // config.qkv_modules
    multiplicative = multiplicative_cost(size, size, modules)
    convolution = local_convolution_cost(width, width, modules, config.module_kernel, config.length_kernel)
    value_width = width if config.value_input == "none" else 2 * width
    cost = multiplicative + local_convolution_cost(value_width, width, modules, 1, config.length_kernel)
    cost += convolution if config.share_qk else convolution * 2
    if "mult" in config.output_layer:
        cost += multiplicative
    if "conv" in config.output_layer:
        cost += convolution
    return cost


def cross_attention_cost(config: c.CrossProjectionConfig, size: int) -> Cost:
    """Query and output for a token of the target; key and value, made once for a source, are stored."""
    if isinstance(config, c.DenseProjectionConfig):
        dense = dense_cost(size, size, config.bias)
        return dense * 2 + Cost(parameters=2 * dense.parameters)
    width = size // config.qkv_modules
    query = multiplicative_cost(size, size, config.qkv_modules) + local_convolution_cost(
        width, width, config.qkv_modules, config.module_kernel, config.length_kernel
    )
    return query + Cost(parameters=2 * dense_cost(size, size).parameters)


def scores_cost(size: int, context: int) -> Cost:
    """Query times keys and weights times values, over `context` tokens."""
    macs = 2 * size * context
    return Cost(macs=macs, training_macs=macs, cache_read=macs)


def pattern_cost(config: c.ModelConfig | c.EncoderDecoderConfig, context: int) -> Cost:
    """What the pattern of self-attention does with those of `context` tokens that it sees.

    Linear attention has sums over all features in their place. Hashing is left out.
    """
    pattern, size = config.attention_pattern, config.hidden_size
    match pattern:
        case c.FavorPatternConfig():
            return _linear_scores_cost(config, config.head_dim, context)
        case c.FavorSoftmaxPatternConfig(num_features=m):
            features = 2 * size * m  # query and key times the random features
            return _linear_scores_cost(config, m, context) + Cost(macs=features, training_macs=features)
        case c.LocalPatternConfig():
            unseen_chunks = max(0, max(0, context - 1) // pattern.chunk_length - pattern.chunks_before)
            seen, seen_in_training = context - unseen_chunks * pattern.chunk_length, _window(pattern, context)
        case c.LSHPatternConfig():
            seen, seen_in_training = context, pattern.num_hashes * _window(pattern, context)
        case c.MixedPatternConfig():
            exact = context <= pattern.exact_length
            seen, seen_in_training = context, context if exact else pattern.num_hashes * _window(pattern, context)
        case c.SoftmaxPatternConfig():
            seen = seen_in_training = context
    return replace(scores_cost(size, seen), training_macs=2 * size * seen_in_training)


def _window(pattern: c.LocalPatternConfig | c.LSHPatternConfig | c.MixedPatternConfig, context: int) -> int:
    """Tokens in the chunks that a token sees, the last of which may not be full."""
    chunks = -(-context // pattern.chunk_length)
    return min(chunks, 1 + pattern.chunks_before + pattern.chunks_after) * pattern.chunk_length


def _linear_scores_cost(config: c.ModelConfig | c.EncoderDecoderConfig, num_features: int, context: int) -> Cost:
    """A token's query reads the sums, which its key and value then enter; within a chunk pairs are weighed too."""
    if context == 0:
        return Cost()
    columns = config.head_dim + 1  # of a value and its weight
    sums = config.num_attention_heads * num_features * columns

    def macs(chunk_length: int) -> int:
        return 2 * sums + config.num_attention_heads * chunk_length * (num_features + columns)

    return Cost(macs=macs(1), training_macs=macs(min(config.head_dim, context)), cache_read=2 * sums)


def feed_forward_cost(config: c.FeedForwardConfig, size: int) -> Cost:
    """A feed-forward layer with its controller."""
    width = config.intermediate_size
    match config:
        case c.DenseFeedForwardConfig():
            num_up = 2 if config.activation == "swiglu" else 1
            return dense_cost(size, width) * num_up + dense_cost(width, size)
        case c.SparseFeedForwardConfig(controller_rank=rank):
            controller = dense_cost(size, rank, bias=False) + dense_cost(rank, width)
            return controller + _chosen_units_cost(size, width, config.ff_block_size)
        case c.BlockFeedForwardConfig() | c.SwitchFeedForwardConfig():
            controller = dense_cost(size, config.num_experts, bias=False)
            return controller + _chosen_units_cost(size, width, config.num_experts)


def _chosen_units_cost(size: int, width: int, num_choices: int) -> Cost:
    """Two matrices of which a token uses one unit in `num_choices`, and the output's bias."""
    stored, chosen = 2 * size * width, 2 * size * width // num_choices
    return _weights(stored + size, chosen, read=chosen + size, training_macs=stored)


def feed_forward_units(config: c.ModelConfig | c.EncoderDecoderConfig) -> tuple[int, int]:
    """Units of all feed-forward layers of the decoder: those that are read to decode one token, and all of them."""
    if isinstance(config, c.TerraformerConfig):
        layers = [block.feed_forward for block in config.decoder_blocks]
    else:
        blocks = config.num_hidden_layers if isinstance(config, c.ModelConfig) else config.num_decoder_layers
        layers = [config.feed_forward] * blocks
    return (
        sum(layer.intermediate_size // _num_choices(layer) for layer in layers),
        sum(layer.intermediate_size for layer in layers),
    )


def _num_choices(config: c.FeedForwardConfig) -> int:
    """Units of which a token uses one."""
    match config:
        case c.DenseFeedForwardConfig():
            return 1
        case c.SparseFeedForwardConfig():
            return config.ff_block_size
        case c.BlockFeedForwardConfig() | c.SwitchFeedForwardConfig():
            return config.num_experts


def recurrent_cost(config: c.SRUConfig, size: int) -> Cost:
    """The branch of simple recurrent units, without its norm."""
    if config.num_layers == 0:
        return Cost()
    gates = dense_cost(config.size, 3 * config.size)
    return dense_cost(size, config.size) + gates * config.num_layers + dense_cost(config.size, size)


def head_cost(config: c.HeadConfig, size: int, vocab_size: int) -> Cost:
    """The logits; a tied head stores nothing of its own but reads the embedding whole."""
    if isinstance(config, c.DenseHeadConfig):
        if config.tied:
            return _weights(0, size * vocab_size, read=size * vocab_size)
        return dense_cost(size, vocab_size)
    sparse = multiplicative_cost(size, vocab_size, config.head_modules)
    if config.sparse_prob == 1:
        return sparse
    return sparse + Cost(parameters=dense_cost(size, vocab_size).parameters)  # in training both cost the same
