"""Models, assembled from layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.config import DenseHeadConfig, ModelConfig
from terseformer.layers.attention import Attention
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.feedforward import feed_forward
from terseformer.layers.head import language_model_head
from terseformer.layers.position import LearnedPositions, SinusoidalPositions
from terseformer.layers.qkv import attention_projection
from terseformer.layers.recurrence import RecurrentBranch
from terseformer.state import Chunk, DecodeState, KeyValueCache, LayerState


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), and the recurrent branch beside the latter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(
            attention_projection(config.attention, config.hidden_size),
            config.num_attention_heads,
            config.attention_dropout,
            config.rope_theta if config.position == "rotary" else None,
        )
        self.attention_dropout = nn.Dropout(config.dropout)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = feed_forward(config.feed_forward, config.hidden_size)
        self.feed_forward_dropout = SequenceDropout(config.dropout)
        if config.sru.num_layers:
            self.recurrent_norm = _norm(config)
            self.recurrent = RecurrentBranch(config.hidden_size, config.sru.size, config.sru.num_layers)
        else:
            self.recurrent = None

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), chunk, state))
        y = self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))
        if self.recurrent is not None:
            y = y + self.recurrent(self.recurrent_norm(x), chunk, state.carries if state is not None else None)
        return x + y


class CausalLM(nn.Module):
    """A decoder-only language model.

    `model(tokens)` gives, at each position, the logits of the next token (Hugging Face's convention).

    Source: `ConfigurableTransformerLM` of the reference, less its shift to the right. Unlike there, where it is
    uniform with a standard deviation of 1 / sqrt(D), an embedding that is not tied is drawn from N(0, 1): see
    docs/log.md.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        tied = isinstance(config.head, DenseHeadConfig) and config.head.tied
        self.embedding_scale = config.hidden_size**0.5 if tied else 1.0
        nn.init.normal_(self.embedding.weight, std=1 / self.embedding_scale)
        self.embedding_dropout = SequenceDropout(config.dropout)
        if config.position == "learned":
            self.position = LearnedPositions(config.max_position_embeddings, config.hidden_size)
        else:
            self.position = SinusoidalPositions(config.hidden_size) if config.position == "sinusoidal" else None
        self.position_dropout = SequenceDropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.head = language_model_head(config.head, config.hidden_size, self.embedding)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: DecodeState | None = None,
        num_real: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at each position.

        Args:
            tokens: token ids; with a state, the continuation of what the state has read.
            state: changed in place.
            num_real: with a state, real tokens at the head of each row; the logits behind them mean nothing.

        Raises:
            ValueError: a position beyond `max_position_embeddings` or the state's capacity, or another number of rows
                in the state or in `num_real` than in the tokens.
        """
        return self.head(self.hidden(tokens, state, num_real))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        state: DecodeState | None = None,
        num_real: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The normalised hidden vectors that the head turns into logits."""
        chunk = self._chunk(tokens, state, num_real)
        x = self.embedding_dropout(self.embedding(tokens) * self.embedding_scale)
        if self.position is not None:
            positions = chunk.positions.clamp(max=self.config.max_position_embeddings - 1)  # padding may lie beyond
            x = x + self.position_dropout(self.position(positions))
        for index, block in enumerate(self.blocks):
            x = block(x, chunk, state.layers[index] if state is not None else None)
        if state is not None:
            state.lengths += tokens.shape[1] if num_real is None else num_real
        return self.norm(x)

    def _chunk(self, tokens: Tensor, state: DecodeState | None, num_real: Tensor | None) -> Chunk:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        for name, sizes in (("state", state.lengths if state is not None else None), ("num_real", num_real)):
            if sizes is not None and len(sizes) != len(tokens):
                raise ValueError(f"there are {len(tokens)} rows of tokens, but {name} has {len(sizes)}")
        if state is None:
            end = tokens.shape[1]
        else:
            positions = positions + state.lengths[:, None]
            end = int((state.lengths + (tokens.shape[1] if num_real is None else num_real)).max())
        limit = self.config.max_position_embeddings
        if end > limit:
            raise ValueError(
                f"the sequence reaches {end} tokens, but max_position_embeddings is {limit}; shorten the input"
            )
        if state is not None and end > state.capacity:
            raise ValueError(f"position {end - 1} does not fit a state of capacity {state.capacity}; make a larger one")
        return Chunk(positions, num_real, end)

    def new_state(self, batch: int = 1, capacity: int | None = None) -> DecodeState:
        """A state that has read nothing.

        Args:
            batch: rows B.
            capacity: longest sequence that fits, in tokens; default `max_position_embeddings`.
        """
        like = self.embedding.weight
        capacity = capacity or self.config.max_position_embeddings
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            heads, width = self.config.num_attention_heads, self.config.head_dim
            cache = KeyValueCache.new(batch, heads, capacity, width, like.detach())
            carries = block.recurrent.new_carries(batch) if block.recurrent is not None else []
            layers.append(LayerState(cache, block.attention.projection.new_memories(batch), carries))
        return DecodeState(torch.zeros(batch, dtype=torch.long, device=like.device), layers)
