"""Text from a model: prompts are read in chunks, then each step gives one token to every row."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from terseformer.drawing import new_generator, sample
from terseformer.evaluation import eval_mode
from terseformer.model import CausalLM
from terseformer.sampling import DEFAULT_SAMPLING, GenerationError, SamplingConfig
from terseformer.state import DecodeState
from terseformer.text import Generation, TextWriter, end_of_text_ids

PREFILL_TOKENS = 2048
"""Tokens of prompts, over all rows, that the model reads in one call."""


class Drawn(NamedTuple):
    """A token that was drawn for a row; with a reason if it is the row's last."""

    row: int
    token: int
    finish_reason: Literal["length", "eos"] | None


def generate_tokens(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig = DEFAULT_SAMPLING,
    stop_ids: Collection[int] = (),
    *,
    seeds: Sequence[int] | None = None,
    stopped: Collection[int] = (),
) -> Iterator[list[Drawn]]:
    """Yields, for each step, one token for every row that is not finished.

    A row ends with a token of `stop_ids` (`eos`), or when it has `max_new_tokens` or, prompt included,
    `max_position_embeddings` tokens (`length`). Rows that end leave the batch. A row's tokens are those
    of its prompt alone, but for the rounding of the matrix products. Prompts may differ in length.

    Args:
        model: set to evaluation mode while it computes.
        prompts: token ids of each row, at least one.
        config: the sampling; its stop strings are left to the caller, who knows the text.
        stop_ids: tokens that end a row.
        seeds: one for each row in place of `config.seed`, for different texts from one prompt.
        stopped: rows that the caller ends; it is looked at after each step, and may grow.

    Raises:
        GenerationError: a prompt is empty, fills the context, or has a token that the model does not
            know; the model's logits are not finite.
    """
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
        if len(prompt) >= limit:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {limit} "
                f"(max_position_embeddings); shorten it to {limit - 1} or fewer"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise GenerationError(
                    f"the prompt has the token {token}, but the model knows 0 to {vocab_size - 1} (vocab_size); "
                    "use the tokenizer that the model was trained with"
                )
    seeds = [config.seed] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise GenerationError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    return _steps(model, prompts, config, stop_ids, seeds, stopped)


def _steps(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Collection[int],
    seeds: Sequence[int],
    stopped: Collection[int],
) -> Iterator[list[Drawn]]:
    if not prompts:
        return
    rows = list(range(len(prompts)))  # those that stand in the state, in its order
    generators = [new_generator(seed) for seed in seeds]
    room = [min(config.max_new_tokens, model.config.max_position_embeddings - len(prompt)) for prompt in prompts]
    state = model.new_state(len(rows), max(len(prompt) + r for prompt, r in zip(prompts, room, strict=True)))
    seen = None
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    logits = _read_prompts(model, prompts, state)
    while True:
        tokens = sample(logits, seen, config, [generators[row] for row in rows])
        drawn = []
        for row, token in zip(rows, tokens.tolist(), strict=True):
            room[row] -= 1
            drawn.append(Drawn(row, token, "eos" if token in stop_ids else None if room[row] else "length"))
        yield drawn
        kept = [i for i, d in enumerate(drawn) if d.finish_reason is None and d.row not in stopped]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, tokens, state = [rows[i] for i in kept], tokens[kept], state.select(kept)
            seen = seen[kept] if seen is not None else None
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        logits = _read_tokens(model, tokens, state)


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
def _read_tokens(model: CausalLM, tokens: Tensor, state: DecodeState) -> Float[Tensor, "B V"]:
    """Reads one token a row; gives the logits of the next."""
    with eval_mode(model):  # not by way of model(...), which may be compiled: the state grows with each token
        return model.head(model.hidden(tokens[:, None].to(model.embedding.weight.device), state))[:, 0]


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    config: SamplingConfig = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Continues each prompt, all in one batch; each as it would be alone.

    An empty prompt starts from the end-of-text token, as a document does. Names of special tokens in a
    prompt stand for these tokens; none is added.

    Args:
        model: the model.
        tokenizer: the one that it was trained with.
        prompts: one or several.
        config: the sampling.
        seeds: one for each prompt in place of `config.seed`.

    Raises:
        GenerationError: a prompt does not fit the model, or the model's logits are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    rows = [TextWriter(tokenizer, prompt, config.stop) for prompt in prompts]
    stopped: set[int] = set()
    stop_ids = end_of_text_ids(tokenizer)
    for step in generate_tokens(model, [row.prompt for row in rows], config, stop_ids, seeds=seeds, stopped=stopped):
        for drawn in step:
            rows[drawn.row].push(drawn.token, drawn.finish_reason)
            if rows[drawn.row].finish_reason == "stop":
                stopped.add(drawn.row)
    return [row.result() for row in rows]


def stream(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, config: SamplingConfig = DEFAULT_SAMPLING
) -> Generator[str, None, Generation]:
    """Continues a prompt and yields pieces of the text as soon as they are certain.

    A piece never ends within a character, nor with what may become a stop string. The pieces together
    are the text that `generate` gives; the generator returns the same `Generation`.

    Raises:
        GenerationError: the prompt does not fit the model (at once), or the logits are not finite.
    """
    row = TextWriter(tokenizer, prompt, config.stop)
    return _pieces(row, generate_tokens(model, [row.prompt], config, end_of_text_ids(tokenizer)))


def _pieces(row: TextWriter, steps: Iterator[list[Drawn]]) -> Generator[str, None, Generation]:
    for (drawn,) in steps:
        if piece := row.push(drawn.token, drawn.finish_reason):
            yield piece
        if row.finish_reason is not None:
            break
    return row.result()
