"""From what was asked to a job: prompts as tokens, lengths that fit, how each text is drawn."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from terseformer.sampling import GenerationError
from terseformer.serve.delivery import Delivery
from terseformer.serve.errors import ApiError
from terseformer.serve.guided import ANY_OBJECT, Grammar
from terseformer.serve.job import Client, Job, Prompt
from terseformer.serve.limits import Limits
from terseformer.serve.models import ServedModel
from terseformer.serve.requests import JsonSchemaFormat, TextFormat, TextRequest
from terseformer.text import check_token

_MAX_SCORES = 1 << 20
"""Log-probabilities that one request may ask for, some 150 bytes each."""


def check_number(num_prompts: int, request: TextRequest, limits: Limits) -> None:
    """Raises ApiError where a request asks for too many texts."""
    num_texts = request.n or 1
    if num_prompts * num_texts > limits.max_texts:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n = {num_texts} texts each are more than the {limits.max_texts} texts that a "
            "request may ask for; divide them among several",
            param="n" if num_texts > 1 else "prompt",
        )


def make_job(
    model: ServedModel,
    limits: Limits,
    client: Client,
    request: TextRequest,
    prompts: Sequence[Prompt],
    delivery: Delivery,
    *,
    max_tokens: int | None,
    stops: tuple[str, ...] = (),
    echo: bool = False,
    num_top: int | None = None,
) -> Job:
    """A job for a request.

    Args:
        model: writes the texts.
        limits: how many and how long they may be.
        client: who asks.
        request: what was asked.
        prompts: what is read.
        delivery: where the texts go.
        max_tokens: of each text; None: as many as fit.
        stops: strings that end a text, besides those that the request gives.
        echo: give the prompts back.
        num_top: likeliest tokens whose log-probabilities are given; None gives none at all.

    Raises:
        ApiError: it asks for too much.
        GenerationError: a prompt is empty or has an unknown token, or the response format cannot be followed.
        ConfigError: a value is none that is allowed.
    """
    num_texts = request.n or 1
    check_number(len(prompts), request, limits)
    if limits.max_new_tokens and max_tokens is not None and max_tokens > limits.max_new_tokens:
        raise ApiError(
            400, f"max_tokens must be at most {limits.max_new_tokens} here, not {max_tokens}", param="max_tokens"
        )
    trace = request.terse is not None and request.terse.trace
    if trace and (not request.stream or not isinstance(request.response_format, TextFormat | None)):
        raise ApiError(400, "terse.trace needs stream: true, and knows no response_format", param="terse")
    for prompt in prompts:
        _check_prompt(model, prompt.tokens, max_tokens)
    if max_tokens is None:
        max_tokens = min(model.context, limits.max_new_tokens or model.context)
    max_tokens = min(max_tokens, model.context)
    if num_top is not None:
        longest = max(len(prompt.tokens) for prompt in prompts) * echo + max_tokens
        _check_scores(len(prompts) * num_texts * longest * (num_top + 1))
    return Job(
        model=model.name,
        client=client,
        prompts=list(prompts),
        num_texts=num_texts,
        sampling=request.sampling(max(1, max_tokens), (*request.stops(), *stops)),
        max_tokens=max_tokens,
        seed=secrets.randbelow(2**63) if request.seed is None else request.seed % 2**63,
        delivery=delivery,
        echo=echo,
        num_top=num_top,
        grammar=_grammar(model, request),
        trace=trace,
    )


def _check_prompt(model: ServedModel, tokens: Sequence[int], max_tokens: int | None) -> None:
    if not tokens:
        raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
    for token in tokens:
        check_token("prompt", token, model.engine.config.vocab_size)
    room = model.context - (max_tokens != 0 and model.pad_token_id is None)  # a source's text has a context of its own
    if len(tokens) > room:
        raise ApiError(
            400,
            f"the prompt has {len(tokens)} tokens, but the model's context of {model.context} has room for {room}; "
            "shorten it",
            code="context_length_exceeded",
            param="prompt",
        )


def _check_scores(count: int) -> None:
    if count > _MAX_SCORES:
        raise ApiError(
            400,
            f"up to {count} log-probabilities are more than the {_MAX_SCORES} that a request may ask for; ask for "
            "fewer texts, tokens or likeliest tokens",
            param="logprobs",
        )


def _grammar(model: ServedModel, request: TextRequest) -> Grammar | None:
    """What the response format asks for."""
    form = request.response_format
    if form is None or isinstance(form, TextFormat):
        return None
    return model.grammars.of_schema(form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else ANY_OBJECT)
