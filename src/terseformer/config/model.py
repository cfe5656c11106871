"""Models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from terseformer.config.checks import ConfigError, require, require_multiple, require_ranges
from terseformer.config.parts import (
    AttentionProjectionConfig,
    CrossProjectionConfig,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    DenseProjectionConfig,
    FeedForwardConfig,
    HeadConfig,
    MultiplicativeHeadConfig,
    SRUConfig,
)
from terseformer.config.patterns import AttentionPatternConfig, LocalPatternConfig, SoftmaxPatternConfig

if TYPE_CHECKING:
    from typing_extensions import Self


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
    position: Literal["learned", "sinusoidal", "sin_cos", "fixed_base", "infinite", "axial", "rotary", "none"] = (
        "learned"
    )
    """How a token knows its place, in an encoder-decoder with weights of their own for source and target: `learned`
    starts from the sinusoids, as the reference does; `sin_cos` has all sines before all cosines; `fixed_base` has
    digits, and in training starts anywhere; `infinite` has drifting waves; `axial` has coordinates; `rotary` turns
    queries and keys; with `none` a token knows its place only by what it sees, which are the tokens before it."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    axial_shape: tuple[int, ...] = ()
    """Sides of the box whose coordinates are `axial` positions; it holds max_position_embeddings at least."""
    axial_sizes: tuple[int, ...] = ()
    """Features of each coordinate; their sum is hidden_size."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation before each sublayer and before the head."""
    norm_eps: float = 1e-6
    """Constant under the root of the normalisation."""
    dropout: float = 0.0
    """Dropout on the embedding, the positions and each sublayer's output."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights; the linear patterns have none to drop."""
    attention: AttentionProjectionConfig = field(default_factory=DenseProjectionConfig)
    """How q, k, v and the output of the decoder's self-attention are made."""
    attention_pattern: AttentionPatternConfig = field(default_factory=SoftmaxPatternConfig)
    """Which earlier tokens a token sees, and how."""
    feed_forward: FeedForwardConfig = field(default_factory=DenseFeedForwardConfig)
    """The feed-forward layer."""
    ff_chunk_size: int = 0
    """Tokens of each row whose feed-forward layer is computed at a time, and again in the backward pass, so that long
    inputs need less memory; 0 is all at once. Its output is the same."""
    sru: SRUConfig = field(default_factory=SRUConfig)
    """The recurrent branch beside the feed-forward layer."""
    head: HeadConfig = field(default_factory=DenseHeadConfig)
    """From the last hidden vector to the logits."""

    def __post_init__(self) -> None:
        require_ranges(
            "model",
            self,
            count=("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"),
            positive=("norm_eps", "rope_theta"),
            share_below_one=("dropout", "attention_dropout"),
            zero_or_more=("ff_chunk_size",),
        )
        require_multiple("model.hidden_size", self.hidden_size, "model.num_attention_heads", self.num_attention_heads)
        for name in ("attention", "encoder_attention", "cross_attention"):
            modules = getattr(getattr(self, name, None), "qkv_modules", 1)
            require_multiple("model.hidden_size", self.hidden_size, f"model.{name}.qkv_modules", modules)
        self._check_position("position", self.position)
        self._check_axes()
        pattern = self.attention_pattern
        require(
            not (isinstance(pattern, LocalPatternConfig) and pattern.chunks_after),
            "model.attention_pattern.chunks_after must be 0 where a token sees no later ones; "
            "only model.encoder_attention_pattern may have more",
        )
        if isinstance(self.head, MultiplicativeHeadConfig):
            require_multiple("model.vocab_size", self.vocab_size, "model.head.head_modules", self.head.head_modules)

    def _check_position(self, option: str, position: str) -> None:
        if position == "rotary":
            require(
                self.head_dim % 2 == 0,
                f"model.{option} = 'rotary' needs an even head width, not {self.head_dim}; "
                "change model.num_attention_heads",
            )
        if position == "fixed_base":
            require(
                self.hidden_size % 8 == 0,
                f"model.{option} = 'fixed_base' has 8 digits, but model.hidden_size = {self.hidden_size} is not a "
                "multiple of 8; change one of them",
            )

    def _check_axes(self) -> None:
        shape, sizes = self.axial_shape, self.axial_sizes
        if self.position != "axial":
            require(
                not (shape or sizes),
                f"model.axial_shape and model.axial_sizes are of model.position = 'axial', not {self.position!r}; "
                "leave them out",
            )
            return
        require(
            len(shape) == len(sizes) > 0 and min(*shape, *sizes) > 0 and sum(sizes) == self.hidden_size,
            f"model.axial_sizes = {list(sizes)} must be as many as model.axial_shape = {list(shape)}, all above 0, and "
            f"sum up to model.hidden_size = {self.hidden_size}",
        )
        require(
            math.prod(shape) >= self.max_position_embeddings,
            f"model.axial_shape = {list(shape)} holds {math.prod(shape)} positions; it must hold "
            f"model.max_position_embeddings = {self.max_position_embeddings}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def last_norm_kind(self) -> str:
        """Normalisation of what leaves the encoder and the decoder."""
        return self.norm


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_TransformerConfig):
    """A causal language model."""

    kind: Literal["causal_lm"] = "causal_lm"
    num_hidden_layers: int = 6
    """Blocks of attention and feed-forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model", self, count=("num_hidden_layers",))


@dataclass(frozen=True, kw_only=True)
class _EncoderDecoderConfig(_TransformerConfig):
    num_encoder_layers: int = 6
    """Blocks of the encoder."""
    num_decoder_layers: int = 6
    """Blocks of the decoder."""
    encoder_attention: AttentionProjectionConfig = field(default_factory=DenseProjectionConfig)
    """How q, k, v and the output of the encoder's attention are made."""
    encoder_attention_pattern: AttentionPatternConfig = field(default_factory=SoftmaxPatternConfig)
    """Which tokens of the source a token of the source sees, and how."""
    encoder_position: Literal[
        "like_decoder", "learned", "sinusoidal", "sin_cos", "fixed_base", "infinite", "rotary"
    ] = "like_decoder"
    """How a token of the source knows its place; `position` then says how one of the target does."""
    pad_token_id: int = 0
    """The token that fills up a source; the decoder starts with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model", self, count=("num_encoder_layers", "num_decoder_layers"))
        require(
            0 <= self.pad_token_id < self.vocab_size,
            f"model.pad_token_id must lie in [0, {self.vocab_size}), not {self.pad_token_id}",
        )
        require(
            self.position != "none" or self.encoder_position != "like_decoder",
            "model.position = 'none' leaves the source without any order; name a model.encoder_position, such as "
            "'rotary'",
        )
        require(
            self.position != "axial" or self.encoder_position == "like_decoder",
            f"model.encoder_position = {self.encoder_position!r} cannot be combined with model.position = 'axial'; "
            "leave it out or change model.position",
        )
        self._check_position("encoder_position", self.encoder_position)

    @property
    def of_encoder(self) -> Self:
        """The configuration as the encoder has it: `position` is its own."""
        if self.encoder_position == "like_decoder":
            return self
        return replace(self, position=self.encoder_position, encoder_position="like_decoder")


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
    last_norm: Literal["like_others", "layer_norm", "rms_norm"] = "like_others"
    """Normalisation of what leaves the encoder and the decoder; the others are `norm`."""
    forget_every: int = 0
    """Blocks after which a dense layer of the streams' mean replaces both, unless only one more follows; 0 is never.
    Less precision is lost in computing inputs back from outputs, and the dense layers' inputs are kept."""
    half_before_layer: int = 0
    """Decoder blocks of half the width, of `hidden_size` and of the feed-forward layer, as has the encoder; behind
    them the streams are joined side by side. 0 is none."""
    double_after_layer: int = 0
    """The last decoder block, counted from 0, before the streams are joined side by side, so that those after it and
    the head have twice the width. 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            "model",
            self,
            count=("num_attention_layers",),
            zero_or_more=("forget_every", "half_before_layer", "double_after_layer"),
        )
        if not (self.half_before_layer or self.double_after_layer):
            return
        require(
            self.forget_every == 0,
            "model.forget_every cannot be combined with model.half_before_layer or model.double_after_layer; "
            "make it or them 0",
        )
        require(
            self.half_before_layer <= self.num_decoder_layers and self.double_after_layer < self.num_decoder_layers,
            f"model.half_before_layer = {self.half_before_layer} must be at most model.num_decoder_layers = "
            f"{self.num_decoder_layers}, and model.double_after_layer = {self.double_after_layer} below it",
        )
        require(
            not (isinstance(self.head, DenseHeadConfig) and self.head.tied),
            "model.head.tied = true needs one width for embedding and head; make model.half_before_layer and "
            "model.double_after_layer 0, or it false",
        )
        for key, does, block in (
            ("half_before_layer", "halves", 0),
            ("double_after_layer", "doubles", self.num_decoder_layers),
        ):
            try:
                self._at_width_of(block)
            except ConfigError as error:
                raise ConfigError(f"where model.{key} {does} the width, {error}") from None

    @property
    def last_norm_kind(self) -> str:
        """Normalisation of what leaves the encoder and the decoder."""
        return self.norm if self.last_norm == "like_others" else self.last_norm

    @property
    def decoder_blocks(self) -> tuple[TerraformerConfig, ...]:
        """The configuration of each decoder block at its own width."""
        return tuple(self._at_width_of(index) for index in range(self.num_decoder_layers))

    @property
    def first(self) -> TerraformerConfig:
        """The configuration at the width of the embedding, the encoder and the decoder's first block."""
        return self._at_width_of(0)

    @property
    def last(self) -> TerraformerConfig:
        """The configuration at the width of the last norm and the head."""
        return self._at_width_of(self.num_decoder_layers)

    def forgets(self, num_blocks: int) -> range:
        """Numbers of blocks behind which a stack forgets: each `forget_every`, if more than one block follows."""
        return range(self.forget_every, num_blocks - 1, self.forget_every) if self.forget_every else range(0)

    def _at_width_of(self, block: int) -> TerraformerConfig:
        """Of a decoder block, or where `block` is their number of what follows them."""
        if not (self.half_before_layer or self.double_after_layer):
            return self
        units, divisor, factor = self.feed_forward.intermediate_size, 1, 1
        if block < self.half_before_layer:
            divisor = 2
        elif self.double_after_layer and block > self.double_after_layer:
            factor = 2
        require_multiple("model.hidden_size", self.hidden_size, "the divisor", divisor)
        require_multiple("model.feed_forward.intermediate_size", units, "the divisor", divisor)
        return replace(
            self,
            hidden_size=self.hidden_size * factor // divisor,
            feed_forward=replace(self.feed_forward, intermediate_size=units * factor // divisor),
            half_before_layer=0,
            double_after_layer=0,
        )


EncoderDecoderConfig = Seq2SeqConfig | TerraformerConfig
