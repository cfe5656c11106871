"""What encoder-decoders share: the embedding, the positions of source and target, and the way to the logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from terseformer.blocks import last_norm, positions
from terseformer.config import DenseHeadConfig, EncoderDecoderConfig
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.head import language_model_head
from terseformer.state import Chunk, check_length, first_chunk


class EncoderDecoder(nn.Module):
    """A model of a target, given its source.

    `model(source, target)` gives, at each position of the target, the logits of its next token. A target begins with
    the padding token.

    Args:
        config: the model.
        last: the same at the width of the last norm and the head, if that is another.
    """

    def __init__(self, config: EncoderDecoderConfig, last: EncoderDecoderConfig | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        tied = isinstance(config.head, DenseHeadConfig) and config.head.tied
        self.embedding_scale = config.hidden_size**0.5 if tied else 1.0
        nn.init.normal_(self.embedding.weight, std=1 / self.embedding_scale)
        self.embedding_dropout = SequenceDropout(config.dropout)
        self.encoder_position, self.position = positions(config.of_encoder), positions(config)
        last = last or config
        self.norm = last_norm(last)
        self.head = language_model_head(last.head, last.hidden_size, self.embedding)
        self._limit, self._pad_token_id = config.max_position_embeddings, config.pad_token_id

    def forward(
        self, source: Int[Tensor, "B N"], target: Int[Tensor, "B T"], num_source: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next target token at each position.

        Args:
            source: token ids; those behind a row's real ones are padding.
            target: token ids.
            num_source: real tokens at the head of each source; default: those that are not `pad_token_id`.

        Raises:
            ValueError: a source is empty, a sequence is longer than `max_position_embeddings`, or there are different
                numbers of rows.
        """
        if len(source) != len(target):
            raise ValueError(f"there are {len(source)} sources, but {len(target)} targets")
        encoded, num_source = self.encode(source, num_source)
        return self.head(self.hidden(encoded, num_source, target))

    def encode(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None = None
    ) -> tuple[Any, Int[Tensor, " B"]]:
        """What the decoder needs of a source, and its number of real tokens."""
        raise NotImplementedError

    def hidden(
        self,
        encoded: Any,
        num_source: Int[Tensor, " B"],
        target: Int[Tensor, "B T"],
        num_target: Int[Tensor, " B"] | None = None,
    ) -> Tensor:
        """The normalised hidden vectors of whole targets, [B, T, D]."""
        raise NotImplementedError

    def embed_source(
        self, source: Int[Tensor, "B N"], num_source: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B N D"], Chunk, Int[Tensor, " B"]]:
        """A source's vectors, where they stand, and how many tokens at the head of each row are no padding."""
        if not source.numel():
            raise ValueError(f"there is no source among {list(source.shape)} tokens; leave the call out")
        if num_source is None:
            places = torch.arange(1, source.shape[1] + 1, device=source.device)
            num_source = ((source != self._pad_token_id) * places).amax(-1)
        chunk = first_chunk(source, num_source)
        check_length(chunk.end, self._limit, "the source")
        if int(num_source.min()) < 1:
            raise ValueError("a source has no token; leave it out")
        if (most := int(num_source.max())) > chunk.end:
            raise ValueError(f"num_source = {most} is more than the {chunk.end} tokens that a row has")
        x = self._embed(source)
        if self.encoder_position is not None:
            x = x + self.encoder_position(chunk.positions)
        return x, chunk, num_source

    def embed_target(self, target: Int[Tensor, "B T"], places: Int[Tensor, "B T"], end: int) -> Tensor:
        """The vectors of target tokens at these places, the last real one before `end`; [B, T, D]."""
        check_length(end, self._limit, "the target")
        x = self._embed(target)
        return x if self.position is None else x + self.position(places)

    def _embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.embedding_dropout(self.embedding(tokens) * self.embedding_scale)
