"""The encoder-decoder with cross-attention, assembled from layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.blocks import Block, new_states, norm, positions, self_attention
from terseformer.config import EncoderDecoderConfig, Seq2SeqConfig
from terseformer.layers.attention import CrossAttention
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.head import language_model_head
from terseformer.layers.qkv import cross_projection
from terseformer.state import Chunk, DecodeState, Source, check_length, first_chunk


class Seq2Seq(nn.Module):
    """A Transformer encoder-decoder.

    `model(source, target)` gives, at each position of the target, the logits of its next token. A target begins with
    the padding token.

    Source: `ConfigurableTransformer` of the reference, less its shift of the target to the right.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight)
        self.embedding_dropout = SequenceDropout(config.dropout)
        self.encoder_position, self.position = positions(config), positions(config)
        self.encoder_blocks = nn.ModuleList(
            Block(config, self_attention(config, config.encoder_attention, causal=False))
            for _ in range(config.num_encoder_layers)
        )
        self.encoder_norm = norm(config)
        self.blocks = nn.ModuleList(
            Block(config, self_attention(config, config.attention), self._cross_attention())
            for _ in range(config.num_decoder_layers)
        )
        self.norm = norm(config)
        self.head = language_model_head(config.head, config.hidden_size, self.embedding)

    def _cross_attention(self) -> CrossAttention:
        projection = cross_projection(self.config.cross_attention, self.config.hidden_size)
        return CrossAttention(projection, self.config.num_attention_heads, self.config.attention_dropout)

    def forward(
        self, source: Int[Tensor, "B N"], target: Int[Tensor, "B T"], num_source: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next target token at each position.

        Args:
            source: token ids; those behind a row's real ones are padding.
            target: token ids.
            num_source: real tokens at the head of each source; default: those that are not `pad_token_id`.

        Raises:
            ValueError: a sequence longer than `max_position_embeddings`, or different numbers of rows.
        """
        check_pairs(source, target)
        encoded, num_source = self.encode(source, num_source)
        return self.head(self._decode(target, first_chunk(target), self._sources(encoded, num_source)))

    def encode(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Int[Tensor, " B"]]:
        """A source's hidden vectors and its number of real tokens."""
        chunk, num_source = source_chunk(source, num_source, self.config)
        x = self.embedding_dropout(self.embedding(source)) + self.encoder_position(chunk.positions)
        for block in self.encoder_blocks:
            x = block(x, chunk)
        return self.encoder_norm(x), num_source

    def new_state(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None, capacity: int | None = None
    ) -> DecodeState:
        """A state that has read a source and nothing of its target.

        Args:
            source: token ids.
            num_source: real tokens at the head of each source; default: those that are not `pad_token_id`.
            capacity: longest target that fits, in tokens; default `max_position_embeddings`.
        """
        encoded, num_source = self.encode(source, num_source)
        batch, capacity = len(source), capacity or self.config.max_position_embeddings
        layers = new_states(self.blocks, self.config, batch, capacity)
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
        crosses = [block.cross for block in self.blocks if isinstance(block, Block)]
        return [cross.source(encoded, num_source) for cross in crosses if cross is not None]

    def _decode(
        self, target: Tensor, chunk: Chunk, sources: list[Source], state: DecodeState | None = None
    ) -> Float[Tensor, "B T D"]:
        check_length(chunk.end, self.config.max_position_embeddings, "the target")
        if state is not None:
            state.check_room(chunk)
        x = self.embedding_dropout(self.embedding(target)) + self.position(chunk.positions)
        for index, (block, source) in enumerate(zip(self.blocks, sources, strict=True)):
            x = block(x, chunk, state.layers[index] if state is not None else None, source)
        return self.norm(x)


def source_chunk(
    source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None, config: EncoderDecoderConfig
) -> tuple[Chunk, Int[Tensor, " B"]]:
    """Where the tokens of sources stand, and how many at the head of each row are no padding.

    Raises:
        ValueError: a source is empty or longer than `max_position_embeddings`, or there is another number of rows.
    """
    if num_source is None:
        places = torch.arange(1, source.shape[1] + 1, device=source.device)
        num_source = ((source != config.pad_token_id) * places).amax(-1)
    chunk = first_chunk(source, num_source)
    check_length(chunk.end, config.max_position_embeddings, "the source")
    if int(num_source.min()) < 1:
        raise ValueError("a source has no token; leave it out")
    return chunk, num_source


def check_pairs(source: Tensor, target: Tensor) -> None:
    """Raises ValueError where there are not as many targets as sources."""
    if len(source) != len(target):
        raise ValueError(f"there are {len(source)} sources, but {len(target)} targets")
