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
from terseformer.seq2seq import Seq2Seq
from terseformer.state import DecodeState
from terseformer.terraformer import Terraformer
from terseformer.text import Generation, TextWriter, end_of_text_ids

PREFILL_TOKENS = 2048
"""Tokens of prompts, over all rows, that the model reads in one call."""


class Drawn(NamedTuple):
    """A token that was drawn for a row; with a reason if it is the row's last."""

    row: int
    token: int
    finish_reason: Literal["length", "eos"] | None


def generate_tokens(
    model: CausalLM | Seq2Seq | Terraformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig = DEFAULT_SAMPLING,
    stop_ids: Collection[int] = (),
    *,
    seeds: Sequence[int] | None = None,
    stopped: Collection[int] = (),
) -> Iterator[list[Drawn]]:
    """Yields, for each step, one token for every row that is not finished.

    A row ends with a token of `stop_ids` (`eos`), or when it has `max_new_tokens` or, prompt included,
    `max_position_embeddings` tokens (`length`). Prompts of an encoder-decoder are its sources, and not included. Rows
    that end leave the batch. A row's tokens are those of its prompt alone, but for the rounding of the matrix products.
    Prompts may differ in length.

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
    _check_prompts(model, prompts)
    seeds = [config.seed] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise GenerationError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    return _steps(model, prompts, config, stop_ids, seeds, stopped)


def _check_prompts(model: CausalLM | Seq2Seq | Terraformer, prompts: Sequence[Sequence[int]]) -> None:
    vocab_size = model.config.vocab_size
    name = "prompt" if isinstance(model, CausalLM) else "source"
    limit = model.config.max_position_embeddings - isinstance(model, CausalLM)
    for prompt in prompts:
        if not prompt:
            advice = "start it with the end-of-text token" if isinstance(model, CausalLM) else "give some text"
            raise GenerationError(f"the {name} has no tokens; {advice}")
        if len(prompt) > limit:
            room = " and leaves no room" if isinstance(model, CausalLM) else ", more than fit"
            raise GenerationError(
                f"the {name} has {len(prompt)} tokens{room} in the model's context of "
                f"{model.config.max_position_embeddings} (max_position_embeddings); shorten it to {limit} or fewer"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise GenerationError(
                    f"the {name} has the token {token}, but the model knows 0 to {vocab_size - 1} (vocab_size); "
                    "use the tokenizer that the model was trained with"
                )


def _steps(
    model: CausalLM | Seq2Seq | Terraformer,
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
    is_decoder = isinstance(model, CausalLM)
    limit = model.config.max_position_embeddings
    room = [min(config.max_new_tokens, limit - len(prompt) * is_decoder) for prompt in prompts]
    state, logits = _begin(model, prompts, room)
    seen = None
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts if is_decoder else ()):
            seen[row, list(prompt)] = True
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
def _begin(
    model: CausalLM | Seq2Seq | Terraformer, prompts: Sequence[Sequence[int]], room: Sequence[int]
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
    return state, _read_tokens(model, torch.full((len(prompts),), model.config.pad_token_id), state)


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
def _read_tokens(model: CausalLM | Seq2Seq | Terraformer, tokens: Tensor, state: DecodeState) -> Float[Tensor, "B V"]:
    """Reads one token a row; gives the logits of the next."""
    tokens = tokens[:, None].to(model.embedding.weight.device)
    with eval_mode(model):  # not by way of model(...), which may be compiled: the state grows with each token
        if isinstance(model, CausalLM):
            return model.head(model.hidden(tokens, state))[:, 0]
        return model.decode(tokens, state)[:, 0]


def generate(
    model: CausalLM | Seq2Seq | Terraformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    config: SamplingConfig = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Continues each prompt, all in one batch; each as it would be alone.

    An empty prompt starts from the end-of-text token, as a document does. Prompts of an encoder-decoder are its
    sources, and what it writes is their targets. Names of special tokens in a
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
    pad_token_id = getattr(model.config, "pad_token_id", None)
    rows = [TextWriter(tokenizer, prompt, config.stop, pad_token_id) for prompt in prompts]
    stopped: set[int] = set()
    stop_ids = end_of_text_ids(tokenizer)
    for step in generate_tokens(model, [row.prompt for row in rows], config, stop_ids, seeds=seeds, stopped=stopped):
        for drawn in step:
            rows[drawn.row].push(drawn.token, drawn.finish_reason)
            if rows[drawn.row].finish_reason == "stop":
                stopped.add(drawn.row)
    return [row.result() for row in rows]


def stream(
    model: CausalLM | Seq2Seq | Terraformer,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig = DEFAULT_SAMPLING,
) -> Generator[str, None, Generation]:
    """Continues a prompt and yields pieces of the text as soon as they are certain.

    A piece never ends within a character, nor with what may become a stop string. The pieces together
    are the text that `generate` gives; the generator returns the same `Generation`.

    Raises:
        GenerationError: the prompt does not fit the model (at once), or the logits are not finite.
    """
    row = TextWriter(tokenizer, prompt, config.stop, getattr(model.config, "pad_token_id", None))
    return _pieces(row, generate_tokens(model, [row.prompt], config, end_of_text_ids(tokenizer)))


def _pieces(row: TextWriter, steps: Iterator[list[Drawn]]) -> Generator[str, None, Generation]:
    for (drawn,) in steps:
        if piece := row.push(drawn.token, drawn.finish_reason):
            yield piece
        if row.finish_reason is not None:
            break
    return row.result()
