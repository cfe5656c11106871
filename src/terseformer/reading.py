"""What precedes a text is read in chunks, the text itself token by token, by any kind of model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from terseformer.evaluation import eval_mode
from terseformer.model import CausalLM
from terseformer.models import AnyModel
from terseformer.state import DecodeState

PREFILL_TOKENS = 2048
"""Tokens of prompts, over all rows, that the model reads in one call."""


@torch.inference_mode()
def begin(
    model: AnyModel, prompts: Sequence[Sequence[int]], room: Sequence[int]
) -> tuple[DecodeState, Float[Tensor, "B V"]]:
    """A state that has read the prompts, or of an encoder-decoder the sources and a target's start; the next logits."""
    if isinstance(model, CausalLM):
        state = model.new_state(len(prompts), max(len(prompt) + r for prompt, r in zip(prompts, room, strict=True)))
        return state, _read_prompts(model, prompts, state)
    sources = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    device = model.embedding.weight.device
    with eval_mode(model):
        state = model.new_state(sources.to(device), lengths.to(device), max(room))
    return state, read_tokens(model, torch.full((len(prompts),), model.config.pad_token_id), state)


@torch.inference_mode()
def _read_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], state: DecodeState) -> Float[Tensor, "B V"]:
    """Reads right-padded chunks of bounded size; gives the logits after each row's last token."""
    weight = model.embedding.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True)
    last = weight.new_empty(len(prompts), weight.shape[1])
    size = max(1, PREFILL_TOKENS // len(prompts))
    with eval_mode(model):
        for start in range(0, tokens.shape[1], size):
            chunk = tokens[:, start : start + size]
            num_real = (lengths - start).clamp(0, chunk.shape[1])
            hidden = model.hidden(chunk.to(weight.device), state, num_real.to(weight.device))
            ends = ((lengths > start) & (lengths <= start + size)).nonzero()[:, 0]
            last[ends] = hidden[ends, num_real[ends] - 1].to(last.dtype)
        return model.head(last[:, None])[:, 0]


@torch.inference_mode()
def read_tokens(model: AnyModel, tokens: Tensor, state: DecodeState) -> Float[Tensor, "B V"]:
    """Reads one token a row; gives the logits of the next."""
    tokens = tokens[:, None].to(model.embedding.weight.device)
    with eval_mode(model):  # not by way of model(...), which may be compiled: the state grows with each token
        if isinstance(model, CausalLM):
            return model.head(model.hidden(tokens, state))[:, 0]
        return model.decode(tokens, state)[:, 0]
