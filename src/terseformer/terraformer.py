"""Terraformer: a reversible encoder-decoder whose decoder goes on where the source ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.blocks import FeedForwardLayer, last_norm, new_cache, norm, self_attention
from terseformer.config import AttentionPatternConfig, AttentionProjectionConfig, TerraformerConfig
from terseformer.encoder_decoder import EncoderDecoder
from terseformer.layers.initializers import dense
from terseformer.layers.reversible import Forget, Join, Joined, Pair, ReversibleStack, mean
from terseformer.state import Chunk, DecodeState, LayerState, first_chunk


class AttentionLayer(nn.Module):
    """attention(norm(x))."""

    def __init__(
        self,
        config: TerraformerConfig,
        projection: AttentionProjectionConfig,
        pattern: AttentionPatternConfig,
        causal: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.norm = norm(config)
        self.attention = self_attention(config, projection, pattern, causal=causal)

    def forward(
        self, x: Float[Tensor, "B T D"], chunk: Chunk, state: LayerState | None = None
    ) -> Float[Tensor, "B T D"]:
        """What the layer adds to a stream."""
        return self.attention(self.norm(x), chunk, state)

    def new_state(self, batch: int, capacity: int) -> LayerState:
        """What the layer remembers before the first token."""
        cache = new_cache(self.attention, self.config, batch, capacity)
        return LayerState(cache, self.attention.projection.new_memories(batch))


class Terraformer(EncoderDecoder):
    """A reversible Transformer that reads the source and writes the target as one sequence.

    The decoder's blocks are causal over the source's encoded tokens and the target's, which follow the last real one
    of the source, so that there is no cross-attention.

    Source: section 4 of the paper; `ConfigurableTerraformer` of the reference, less its shift of the target to the
    right. Unlike there, rows of a batch may have sources of different lengths in decoding too.
    """

    def __init__(self, config: TerraformerConfig) -> None:
        first, last = config.first, config.last
        super().__init__(first, last)
        self.config = config
        self.encoder = self._encoder()
        if not config.reversible_encoder:
            self.encoder_out = dense(first.hidden_size, first.hidden_size)
            self.encoder_norm = last_norm(first)
        self.decoder = self._decoder()

    def _encoder(self) -> ReversibleStack:
        c, blocks = self.config.first.of_encoder, self.config.num_encoder_layers
        layers = nn.ModuleList()
        for _ in range(blocks):
            layers += [
                AttentionLayer(c, c.encoder_attention, c.encoder_attention_pattern, causal=False),
                FeedForwardLayer(c),
            ]
        return ReversibleStack(layers, [True, c.swap_twice] * blocks, self._forgets(blocks, 2))

    def _decoder(self) -> ReversibleStack:
        layers = nn.ModuleList()
        joints = self._forgets(self.config.num_decoder_layers, self.config.num_attention_layers + 1)
        width = self.config.first.hidden_size
        for c in self.config.decoder_blocks:
            if c.hidden_size != width:
                joints[len(layers)], width = Join(), c.hidden_size
            for _ in range(c.num_attention_layers):
                layers.append(AttentionLayer(c, c.attention, c.attention_pattern, causal=True))
            layers.append(FeedForwardLayer(c))
        if self.config.last.hidden_size != width:
            joints[len(layers)] = Join()
        return ReversibleStack(layers, [True] * len(layers), joints)

    def _forgets(self, blocks: int, layers: int) -> dict[int, nn.Module]:
        """The forgetting layers of a stack of blocks, by the number of layers before them."""
        return {layers * block: Forget(self.config.hidden_size) for block in self.config.forgets(blocks)}

    def encode(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None
    ) -> tuple[Pair, Int[Tensor, " B"]]:
        """A source's two streams, equal if the encoder is not reversible, and its number of real tokens."""
        x, chunk, num_source = self.embed_source(source, num_source)
        streams = self.encoder((x, x), chunk)
        if self.config.reversible_encoder:
            return streams, num_source
        x = self.encoder_norm(self.encoder_out(mean(streams)))
        return (x, x), num_source

    def hidden(
        self,
        encoded: Pair,
        num_source: Int[Tensor, " B"],
        target: Int[Tensor, "B T"],
        num_target: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T E"]:
        """The normalised hidden vectors of whole targets, at the width of the head.

        Args:
            encoded: what `encode` made of the sources.
            num_source: real tokens at the head of each source.
            target: token ids.
            num_target: real tokens at the head of each target; default: all.
        """
        chunk = first_chunk(target)
        x = self.embed_target(target, chunk.positions, chunk.end)
        first, second = (join(stream, x, num_source) for stream in encoded)
        merged = first_chunk(first, num_source + (chunk.end if num_target is None else num_target))
        x = self.norm(mean(self.decoder((first, second), merged)))
        return following(x, num_source, chunk.end)

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

    def state_after(self, encoded: Pair, num_source: Int[Tensor, " B"], capacity: int | None = None) -> DecodeState:
        """The same, of a source that `encode` has read."""
        batch, length, _ = encoded[0].shape
        room = length + (capacity or self.config.max_position_embeddings)
        layers = []
        for layer in self.decoder.layers:
            if isinstance(layer, AttentionLayer):
                layers.append(layer.new_state(batch, room))
            else:
                assert isinstance(layer, FeedForwardLayer)
                layers.append(LayerState(carries=layer.new_carries(batch)))
        state = DecodeState(torch.zeros_like(num_source), layers, room, num_source)
        chunk = first_chunk(encoded[0], num_source)
        self._decode(encoded, state, replace(chunk, end=int(num_source.max())))
        return state

    def decode(
        self, target: Int[Tensor, "B T"], state: DecodeState, num_real: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at each position of a target's continuation; changes the state in place."""
        assert state.num_source is not None
        chunk = state.chunk(target, num_real)
        before = state.lengths - state.num_source
        end = int((before + (target.shape[1] if num_real is None else num_real)).max())
        x = self.embed_target(target, chunk.positions - state.num_source[:, None], end)
        state.check_room(chunk)
        return self.head(self.norm(mean(self._decode((x, x), state, chunk))))

    def _decode(self, streams: Pair, state: DecodeState, chunk: Chunk) -> Joined:
        streams = self.decoder(streams, chunk, each=[(layer,) for layer in state.layers])
        state.advance(chunk)
        return streams


def join(source: Float[Tensor, "B N D"], target: Float[Tensor, "B T D"], num_source: Int[Tensor, " B"]) -> Tensor:
    """Each target behind its source's last real token, [B, N + T, D]; what follows it means nothing.

    Source: `ConcatWithPadding` of the reference.
    """
    length = source.shape[1]
    place = torch.arange(length + target.shape[1], device=source.device)
    behind = place - num_source[:, None]  # in the target
    index = torch.where(behind < 0, place, (length + behind).clamp(max=len(place) - 1))
    return torch.cat([source, target], dim=1).gather(1, index[..., None].expand(-1, -1, source.shape[-1]))


def following(x: Float[Tensor, "B P D"], num_source: Int[Tensor, " B"], length: int) -> Float[Tensor, "B T D"]:
    """The `length` vectors behind each row's source.

    Source: `StripFromConcatenateWithPadding` of the reference.
    """
    index = num_source[:, None] + torch.arange(length, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
