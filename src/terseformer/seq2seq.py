"""The encoder-decoder with cross-attention, assembled from layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.blocks import Block, new_states, norm, self_attention
from terseformer.config import Seq2SeqConfig
from terseformer.encoder_decoder import EncoderDecoder
from terseformer.layers.attention import CrossAttention
from terseformer.layers.qkv import cross_projection
from terseformer.state import Chunk, DecodeState, Source, first_chunk


class Seq2Seq(EncoderDecoder):
    """A Transformer encoder-decoder.

    Source: `ConfigurableTransformer` of the reference, less its shift of the target to the right.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.config = config
        self.encoder_blocks = nn.ModuleList(
            Block(
                config,
                self_attention(
                    config.of_encoder, config.encoder_attention, config.encoder_attention_pattern, causal=False
                ),
            )
            for _ in range(config.num_encoder_layers)
        )
        self.encoder_norm = norm(config)
        self.blocks = nn.ModuleList(
            Block(
                config,
                self_attention(config, config.attention, config.attention_pattern),
                self._cross_attention(),
            )
            for _ in range(config.num_decoder_layers)
        )

    def _cross_attention(self) -> CrossAttention:
        projection = cross_projection(self.config.cross_attention, self.config.hidden_size)
        return CrossAttention(projection, self.config.num_attention_heads, self.config.attention_dropout)

    def encode(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Int[Tensor, " B"]]:
        """A source's hidden vectors and its number of real tokens."""
        x, chunk, num_source = self.embed_source(source, num_source)
        for block in self.encoder_blocks:
            x = block(x, chunk)
        return self.encoder_norm(x), num_source

    def hidden(
        self,
        encoded: Float[Tensor, "B N D"],
        num_source: Int[Tensor, " B"],
        target: Int[Tensor, "B T"],
        num_target: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The normalised hidden vectors of whole targets.

        Args:
            encoded: what `encode` made of the sources.
            num_source: real tokens at the head of each source.
            target: token ids.
            num_target: real tokens at the head of each target; default: all.
        """
        return self._decode(target, first_chunk(target, num_target), self._sources(encoded, num_source))

    def new_state(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None, capacity: int | None = None
    ) -> DecodeState:
        """A state that has read a source and nothing of its target.

        Args:
            source: token ids.
            num_source: real tokens at the head of each source; default: those that are not `pad_token_id`.
            capacity: longest target that fits, in tokens; default `max_position_embeddings`.
        """
        return self.state_after(*self.encode(source, num_source), capacity)

    def state_after(
        self, encoded: Float[Tensor, "B N D"], num_source: Int[Tensor, " B"], capacity: int | None = None
    ) -> DecodeState:
        """The same, of a source that `encode` has read."""
        capacity = capacity or self.config.max_position_embeddings
        layers = new_states(self.blocks, self.config, len(encoded), capacity)
        for layer, seen in zip(layers, self._sources(encoded, num_source), strict=True):
            layer.source = seen
        return DecodeState(torch.zeros_like(num_source), layers, capacity)

    def decode(
        self, target: Int[Tensor, "B T"], state: DecodeState, num_real: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at each position of a target's continuation; changes the state in place."""
        chunk = state.chunk(target, num_real)
        sources = [layer.source for layer in state.layers if layer.source is not None]
        hidden = self._decode(target, chunk, sources, state)
        state.advance(chunk)
        return self.head(hidden)

    def _sources(self, encoded: Tensor, num_source: Tensor) -> list[Source]:
        """What each block's cross-attention sees."""
        return [block.source(encoded, num_source) for block in self.blocks if isinstance(block, Block)]

    def _decode(
        self, target: Tensor, chunk: Chunk, sources: list[Source], state: DecodeState | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.embed_target(target, chunk.positions, chunk.end)
        if state is not None:
            state.check_room(chunk)
        for index, (block, source) in enumerate(zip(self.blocks, sources, strict=True)):
            x = block(x, chunk, state.layers[index] if state is not None else None, source)
        return self.norm(x)
