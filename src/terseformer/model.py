"""The decoder-only language model, assembled from layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.blocks import Block, new_states, norm, positions, self_attention
from terseformer.config import DenseHeadConfig, ModelConfig
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.head import language_model_head
from terseformer.state import DecodeState, check_length, first_chunk


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
        self.position = positions(config)
        self.blocks = nn.ModuleList(
            Block(config, self_attention(config, config.attention, config.attention_pattern))
            for _ in range(config.num_hidden_layers)
        )
        self.norm = norm(config)
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
        chunk = state.chunk(tokens, num_real) if state is not None else first_chunk(tokens, num_real)
        check_length(chunk.end, self.config.max_position_embeddings)
        if state is not None:
            state.check_room(chunk)
        x = self.embedding_dropout(self.embedding(tokens) * self.embedding_scale)
        if self.position is not None:
            x = x + self.position(chunk.positions)
        for index, block in enumerate(self.blocks):
            x = block(x, chunk, state.layers[index] if state is not None else None)
        if state is not None:
            state.advance(chunk)
        return self.norm(x)

    def new_state(self, batch: int = 1, capacity: int | None = None) -> DecodeState:
        """A state that has read nothing.

        Args:
            batch: rows B.
            capacity: longest sequence that fits, in tokens; default `max_position_embeddings`.
        """
        capacity = capacity or self.config.max_position_embeddings
        lengths = torch.zeros(batch, dtype=torch.long, device=self.embedding.weight.device)
        return DecodeState(lengths, new_states(self.blocks, self.config, batch, capacity), capacity)
