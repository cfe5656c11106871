"""`/v1/completions`: texts that go on from prompts, or a text of a source, with log-probabilities and echo."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs
from pydantic import create_model
from starlette.concurrency import run_in_threadpool

from terseformer.serve.delivery import Delivery, Piece, Token, Usage
from terseformer.serve.errors import ERRORS, ApiError
from terseformer.serve.job import Client, Job, Prompt
from terseformer.serve.limits import Limits
from terseformer.serve.models import ServedModel
from terseformer.serve.prepare import check_number, make_job
from terseformer.serve.requests import CompletionRequest
from terseformer.serve.respond import STREAM, respond
from terseformer.serve.server import Server, client_of, server_of
from terseformer.serve.vocabulary import Vocabulary

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
# OpenAI's own types do not know that the first token of all has no log-probability.
_Logprobs = create_model(
    "CompletionLogprobs",
    __base__=Logprobs,
    token_logprobs=(list[float | None] | None, None),
    top_logprobs=(list[dict[str, float] | None] | None, None),
)
_Choice = create_model("CompletionText", __base__=CompletionChoice, logprobs=(_Logprobs | None, None))
_Described = create_model("CompletionResponse", __base__=Completion, choices=(list[_Choice], ...))
router = APIRouter(responses=ERRORS)


@router.post("/v1/completions", responses={200: {"model": _Described, "content": STREAM}}, response_class=Response)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts; an encoder-decoder makes a text of each."""
    server = server_of(request)
    model = server.model(body.model)
    delivery = Delivery(asyncio.get_running_loop())
    job = await run_in_threadpool(_make_job, server, model, client_of(request), body, delivery)
    options = body.stream_options
    form = CompletionForm(model, job, include_usage=bool(options and options.include_usage))
    return await respond(server, request, job, form, bool(body.stream))


def _make_job(server: Server, model: ServedModel, client: Client, body: CompletionRequest, delivery: Delivery) -> Job:
    is_source = model.pad_token_id is not None
    if is_source and body.echo:
        raise ApiError(
            400, f"{model.name} makes a text of a source, which is no part of it; leave out echo", param="echo"
        )
    most = server.limits.max_new_tokens or _DEFAULT_MAX_TOKENS
    default = None if is_source else min(_DEFAULT_MAX_TOKENS, most)  # a source's text ends where the model says
    return make_job(
        model,
        server.limits,
        client,
        body,
        _prompts(model, body, server.limits),
        delivery,
        max_tokens=default if body.max_tokens is None else body.max_tokens,
        echo=bool(body.echo),
        num_top=body.logprobs,
    )


def _prompts(model: ServedModel, body: CompletionRequest, limits: Limits) -> list[Prompt]:
    given: Any = "" if body.prompt is None else body.prompt
    if given == []:
        raise ApiError(400, "there is no prompt in the list; give one or more, or leave prompt out", param="prompt")
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    check_number(len(given), body, limits)  # before they are encoded
    prompts = []
    for prompt in given:
        tokens = model.encode(prompt) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) if body.echo else ""
        prompts.append(Prompt(tokens=tokens, text=text))
    return prompts


class CompletionForm:
    """OpenAI's `text_completion`.

    Args:
        model: writes the texts.
        job: what they are for.
        include_usage: end a stream with a chunk that counts all tokens.
    """

    def __init__(self, model: ServedModel, job: Job, include_usage: bool) -> None:
        self._scored, self._include_usage, self._vocabulary = job.num_top is not None, include_usage, model.vocabulary
        self._num_top = job.num_top
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"fp_{model.fingerprint[:12]}",
        }
        self._offsets: defaultdict[int, int] = defaultdict(int)  # of each text, where its next token begins

    def chunk(self, piece: Piece) -> Completion:
        """An event of a stream."""
        more = piece.own_fields() | ({"usage": None} if self._include_usage else {})
        return Completion.construct(**self._common, choices=[self._choice(piece.index, [piece])], **more)

    def last(self, usage: Usage) -> Completion | None:
        """The event that counts all tokens."""
        return Completion.construct(**self._common, choices=[], usage=usage_of(usage)) if self._include_usage else None

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> Completion:
        """All texts at once."""
        texts: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            texts[piece.index].append(piece)
        choices = [self._choice(index, texts[index]) for index in sorted(texts)]
        return Completion.construct(**self._common, choices=choices, usage=usage_of(usage))

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(index, tokens) if self._scored else None,
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += self._vocabulary.width(token.id)
        return {
            "tokens": [self._vocabulary.name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [top_of(self._vocabulary, token) for token in tokens] if self._num_top else None,
            "text_offset": offsets,
        }


def top_of(vocabulary: Vocabulary, token: Token) -> dict[str, float] | None:
    """The likeliest tokens in a token's place, and itself; None of the first token of all."""
    if token.logprob is None:
        return None
    return {vocabulary.name(other): logprob for other, logprob in (*token.top, (token.id, token.logprob))}


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
