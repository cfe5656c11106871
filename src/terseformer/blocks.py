"""The residual blocks that models are made of, and what turns tokens into their input."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.config import AttentionPatternConfig, AttentionProjectionConfig, EncoderDecoderConfig, ModelConfig
from terseformer.layers.attention import Attention, CrossAttention
from terseformer.layers.chunked import in_chunks
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.feedforward import feed_forward
from terseformer.layers.pattern import attention_pattern
from terseformer.layers.position import (
    AxialPositions,
    FixedBasePositions,
    InfinitePositions,
    LearnedPositions,
    SinusoidalPositions,
)
from terseformer.layers.qkv import attention_projection
from terseformer.layers.recurrence import RecurrentBranch
from terseformer.state import Chunk, FeatureSums, KeyValueCache, LayerState, RecurrentCarry, Source

AnyConfig = ModelConfig | EncoderDecoderConfig


def norm(config: AnyConfig) -> nn.Module:
    """The normalisation before each sublayer."""
    return _norm(config, config.norm)


def last_norm(config: AnyConfig) -> nn.Module:
    """The normalisation of what leaves the encoder and the decoder."""
    return _norm(config, config.last_norm_kind)


def _norm(config: AnyConfig, kind: str) -> nn.Module:
    if kind == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def positions(config: AnyConfig) -> nn.Module | None:
    """The vectors that are added to the embedding's, as a configuration names them, if any."""
    size = config.hidden_size
    match config.position:
        case "learned":
            return LearnedPositions(config.max_position_embeddings, size, config.dropout)
        case "sinusoidal" | "sin_cos":
            return SinusoidalPositions(size, config.dropout, halves=config.position == "sin_cos")
        case "fixed_base":
            return FixedBasePositions(size)
        case "infinite":
            return InfinitePositions(config.max_position_embeddings, size)
        case "axial":
            return AxialPositions(config.axial_shape, config.axial_sizes, config.dropout)
        case "rotary" | "none":
            return None


def self_attention(
    config: AnyConfig,
    projection: AttentionProjectionConfig,
    pattern: AttentionPatternConfig,
    causal: bool = True,
) -> Attention:
    """Attention of tokens to those before them, or to all of their sequence."""
    return Attention(
        attention_projection(projection, config.hidden_size),
        config.num_attention_heads,
        attention_pattern(pattern, config.head_dim, causal, config.attention_dropout),
        config.rope_theta if config.position == "rotary" else None,
    )


class FeedForwardLayer(nn.Module):
    """feed_forward(norm(x)), and the recurrent branch beside it."""

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        self.feed_forward_norm = norm(config)
        self.feed_forward = feed_forward(config.feed_forward, config.hidden_size)
        self.ff_chunk_size = config.ff_chunk_size
        self.feed_forward_dropout = SequenceDropout(config.dropout)
        if config.sru.num_layers:
            self.recurrent_norm = norm(config)
            self.recurrent = RecurrentBranch(config.hidden_size, config.sru.size, config.sru.num_layers)
        else:
            self.recurrent = None

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        """What the layer adds to the residual stream."""
        y = self.feed_forward_norm(x)
        y = in_chunks(self.feed_forward, y, self.ff_chunk_size) if self.ff_chunk_size else self.feed_forward(y)
        y = self.feed_forward_dropout(y)
        if self.recurrent is None:
            return y
        return y + self.recurrent(self.recurrent_norm(x), chunk, state.carries if state is not None else None)

    def new_carries(self, batch: int) -> list[RecurrentCarry]:
        """Empty carries of the recurrent branch."""
        return [] if self.recurrent is None else self.recurrent.new_carries(batch)


class Block(FeedForwardLayer):
    """x + attention(norm(x)); with `cross`, x + cross(norm(x), source); then x + feed_forward(norm(x)).

    Args:
        config: the model.
        attention: to the tokens of x itself.
        cross: to those of a source.
    """

    def __init__(self, config: AnyConfig, attention: Attention, cross: CrossAttention | None = None) -> None:
        super().__init__(config)
        self.attention_norm = norm(config)
        self.attention = attention
        self.attention_dropout = nn.Dropout(config.dropout)
        self.cross = cross
        if cross is not None:
            self.cross_norm = norm(config)
            self.cross_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None, source: Source | None = None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream behind the block."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), chunk, state))
        if self.cross is not None:
            assert source is not None
            x = x + self.cross_dropout(self.cross(self.cross_norm(x), source, chunk, state))
        return x + super().forward(x, chunk, state)

    def source(self, encoded: Float[Tensor, "B N D"], num_source: Int[Tensor, " B"]) -> Source:
        """What the cross-attention sees of an encoded source."""
        assert self.cross is not None
        return self.cross.source(encoded, num_source)

    def new_state(self, config: AnyConfig, batch: int, capacity: int) -> LayerState:
        """What the block remembers before the first token."""
        memories = self.attention.projection.new_memories(batch)
        if self.cross is not None:
            memories |= self.cross.projection.new_memories(batch)
        cache = new_cache(self.attention, config, batch, capacity)
        return LayerState(cache, memories, self.new_carries(batch))


def new_states(blocks: Iterable[nn.Module], config: AnyConfig, batch: int, capacity: int) -> list[LayerState]:
    """What some blocks remember before the first token."""
    states = []
    for block in blocks:
        assert isinstance(block, Block)
        states.append(block.new_state(config, batch, capacity))
    return states


def new_cache(attention: Attention, config: AnyConfig, batch: int, capacity: int) -> KeyValueCache | FeatureSums:
    """What an attention's pattern remembers before the first token."""
    weight = next(attention.parameters())
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)  # the weight itself may be a shard
    return attention.pattern.new_cache(batch, config.num_attention_heads, capacity, config.head_dim, like)
