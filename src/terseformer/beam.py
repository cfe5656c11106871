"""Beam search: the likeliest text, by following several beginnings side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from terseformer.drawing import adjusted, usable
from terseformer.model import CausalLM
from terseformer.models import AnyModel
from terseformer.reading import begin, read_tokens
from terseformer.sampling import SamplingConfig, nothing_left


class Found(NamedTuple):
    """A text that has come to its end."""

    score: float
    """The logarithm of its probability over its length to the power of the length penalty."""
    tokens: list[int]
    """Its tokens, the one that ends it included."""
    finish_reason: Literal["length", "eos"]


class _Beam(NamedTuple):
    """A text that goes on."""

    total: float
    """The logarithm of its probability."""
    row: int
    """Of the state, where all but its last token have been read."""
    tokens: list[int]


def beam_search(
    model: AnyModel, prompt: Sequence[int], config: SamplingConfig, stop_ids: Collection[int] = ()
) -> Found:
    """The likeliest continuation of a prompt, or text of an encoder-decoder's source, that `num_beams` beams find.

    At each step the beams are continued by every token. The likeliest continuations, twice as many as there are beams
    (more if there are several `stop_ids`), are looked at: those that end, and are among the first `num_beams`, are
    kept as texts that have ended; the first `num_beams` of the others go on. The repetition penalty and
    `no_repeat_ngram_size` act on the logarithms of the probabilities, each beam's for itself. The search ends when
    `num_beams` texts have ended and, unless `early_stopping`, the likeliest beam, if it ended here, would be no better
    than the worst of them; or with `max_new_tokens` or the model's context, where all beams end.

    Source: the definitions of Hugging Face's `generate`, for one sequence.

    Args:
        model: set to evaluation mode while it computes.
        prompt: token ids that fit the model.
        config: how to search.
        stop_ids: tokens that end a text.

    Raises:
        GenerationError: the model's logits are not finite, or every continuation would repeat an n-gram.
    """
    is_decoder = isinstance(model, CausalLM)
    before = list(prompt) if is_decoder else []
    stop_ids = set(stop_ids)
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    room = min(config.max_new_tokens, limit - len(before))
    state, logits = begin(model, [prompt], [room])
    beams, ended = [_Beam(0.0, 0, [])], list[Found]()
    for length in range(1, room + 1):
        texts = [[*before, *beam.tokens] for beam in beams]
        seen = torch.zeros(len(beams), vocab_size, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
        scores = adjusted(usable(logits).log_softmax(-1), seen, texts, config)
        totals = (scores + torch.tensor([[beam.total] for beam in beams], dtype=torch.float64)).flatten()
        looked_at = min(max(2, 1 + len(stop_ids)) * config.num_beams, int(totals.isfinite().sum()))
        going: list[_Beam] = []
        for rank, place in enumerate(totals.argsort(descending=True, stable=True)[:looked_at].tolist()):
            row, token = divmod(place, vocab_size)
            total, tokens = float(totals[place]), [*beams[row].tokens, token]
            if token in stop_ids or length == room:
                if rank < config.num_beams:
                    reason = "eos" if token in stop_ids else "length"
                    ended.append(Found(_score(total, length, config), tokens, reason))
            elif len(going) < config.num_beams:
                going.append(_Beam(total, row, tokens))
        ended = sorted(ended, key=lambda found: -found.score)[: config.num_beams]
        full = len(ended) == config.num_beams
        if not going or (full and (config.early_stopping or not _may_improve(going[0], length, ended[-1], config))):
            break
        state, beams = state.select([beam.row for beam in going]), going
        logits = read_tokens(model, torch.tensor([beam.tokens[-1] for beam in beams]), state)
    if not ended:
        raise nothing_left(config)
    return ended[0]


def _may_improve(beam: _Beam, length: int, worst: Found, config: SamplingConfig) -> bool:
    return _score(beam.total, length, config) > worst.score


def _score(total: float, length: int, config: SamplingConfig) -> float:
    return total / length**config.length_penalty
