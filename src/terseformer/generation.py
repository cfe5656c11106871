"""Text from a model: prompts are read in chunks, then each step gives one token to every row."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from terseformer.beam import beam_search
from terseformer.drawing import new_generator, sample
from terseformer.model import CausalLM
from terseformer.models import AnyModel
from terseformer.reading import begin, read_tokens
from terseformer.sampling import DEFAULT_SAMPLING, GenerationError, SamplingConfig
from terseformer.text import Generation, TextWriter, check_source, check_token, end_of_text_ids


class Drawn(NamedTuple):
    """A token that was drawn for a row; with a reason if it is the row's last."""

    row: int
    token: int
    finish_reason: Literal["length", "eos"] | None


def generate_tokens(
    model: AnyModel,
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
    Prompts may differ in length. With beams, the rows are searched one after the other; a row's tokens come at the end.

    Args:
        model: set to evaluation mode while it computes.
        prompts: token ids of each row, at least one.
        config: the sampling; its stop strings are left to the caller, who knows the text.
        stop_ids: tokens that end a row.
        seeds: one for each row in place of `config.seed`, for different texts from one prompt.
        stopped: rows that the caller ends; it is looked at after each step, and may grow.

    Raises:
        GenerationError: a prompt is empty, fills the context, or has a token that the model does not
            know; the model's logits are not finite; every token would repeat an n-gram.
    """
    _check_prompts(model, prompts)
    seeds = [config.seed] * len(prompts) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise GenerationError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    if config.num_beams > 1:
        return _search(model, prompts, config, stop_ids)
    return _steps(model, prompts, config, stop_ids, seeds, stopped)


def _search(
    model: AnyModel, prompts: Sequence[Sequence[int]], config: SamplingConfig, stop_ids: Collection[int]
) -> Iterator[list[Drawn]]:
    for row, prompt in enumerate(prompts):
        found = beam_search(model, prompt, config, stop_ids)
        for token in found.tokens[:-1]:
            yield [Drawn(row, token, None)]
        yield [Drawn(row, found.tokens[-1], found.finish_reason)]


def _check_prompts(model: AnyModel, prompts: Sequence[Sequence[int]]) -> None:
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not isinstance(model, CausalLM):
            check_source(prompt, limit, vocab_size)
            continue
        if not prompt:
            raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
        if len(prompt) >= limit:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {limit} "
                f"(max_position_embeddings); shorten it to {limit - 1} or fewer"
            )
        for token in prompt:
            check_token("prompt", token, vocab_size)


def _steps(
    model: AnyModel,
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
    state, logits = begin(model, prompts, room)
    texts = [list(prompt) if is_decoder else [] for prompt in prompts]
    seen = None
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
    while True:
        tokens = sample(logits, seen, config, [generators[row] for row in rows], [texts[row] for row in rows])
        drawn = []
        for row, token in zip(rows, tokens.tolist(), strict=True):
            room[row] -= 1
            texts[row].append(token)
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
        logits = read_tokens(model, tokens, state)


def generate(
    model: AnyModel,
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
    model: AnyModel,
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
