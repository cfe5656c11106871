"""`/v1/chat/completions`: what comes next in a conversation."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.concurrency import run_in_threadpool

from terseformer.sampling import GenerationError
from terseformer.serve.completions import usage_of
from terseformer.serve.delivery import Delivery, Piece, Token, Usage
from terseformer.serve.errors import ERRORS, ApiError
from terseformer.serve.job import Client, Job, Prompt
from terseformer.serve.models import ServedModel
from terseformer.serve.prepare import make_job
from terseformer.serve.requests import ChatRequest
from terseformer.serve.respond import STREAM, respond
from terseformer.serve.server import Server, client_of, server_of
from terseformer.serve.template import ChatTemplate

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": STREAM}}, response_class=Response
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Says what comes next in a conversation."""
    server = server_of(request)
    model = server.model(body.model)
    delivery = Delivery(asyncio.get_running_loop())
    job = await run_in_threadpool(_make_job, server, model, client_of(request), body, delivery)
    options = body.stream_options
    form = ChatForm(model, job, include_usage=bool(options and options.include_usage))
    return await respond(server, request, job, form, bool(body.stream))


def _make_job(server: Server, model: ServedModel, client: Client, body: ChatRequest, delivery: Delivery) -> Job:
    if model.template is None:
        raise ApiError(
            400,
            f"{model.name} makes a text of a source and has no chat template; use /v1/completions with the source as "
            "prompt, or a model that has one",
            param="model",
        )
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens must be at least 1, not 0", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return make_job(
        model,
        server.limits,
        client,
        body,
        [_prompt(model, body)],
        delivery,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        stops=model.template.stops,
        num_top=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _prompt(model: ServedModel, body: ChatRequest) -> Prompt:
    assert model.template is not None
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
        for message in body.messages
    ]
    tokens = model.encode(model.template.render(messages))
    return Prompt(tokens=tokens, marks=_marks(model, model.template, messages, tokens))


def _marks(
    model: ServedModel, template: ChatTemplate, messages: Sequence[Mapping[str, str]], tokens: Sequence[int]
) -> list[int]:
    """The end of the instructions at the beginning, from which other conversations go on."""
    others = [i for i, message in enumerate(messages) if message["role"] != "system"]
    if not others or not others[0]:
        return []
    try:
        begun = model.encode(template.render(messages[: others[0]], add_generation_prompt=False))
    except GenerationError:  # a template may want more than instructions
        return []
    return [next((i for i, pair in enumerate(zip(begun, tokens, strict=False)) if pair[0] != pair[1]), len(begun))]


class ChatForm:
    """OpenAI's `chat.completion` and `chat.completion.chunk`.

    Args:
        model: writes the answers.
        job: what they are for.
        include_usage: end a stream with a chunk that counts all tokens.
    """

    def __init__(self, model: ServedModel, job: Job, include_usage: bool) -> None:
        self._scored, self._include_usage, self._vocabulary = job.num_top is not None, include_usage, model.vocabulary
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"fp_{model.fingerprint[:12]}",
        }
        self._begun: set[int] = set()

    def chunk(self, piece: Piece) -> ChatCompletionChunk:
        """An event of a stream; a text's first one says whose it is."""
        delta: dict[str, Any] = {"content": piece.text}
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta["role"] = "assistant"
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
        }
        more = piece.own_fields() | ({"usage": None} if self._include_usage else {})
        return ChatCompletionChunk.construct(**self._common, object="chat.completion.chunk", choices=[choice], **more)

    def last(self, usage: Usage) -> ChatCompletionChunk | None:
        """The event that counts all tokens."""
        if not self._include_usage:
            return None
        return ChatCompletionChunk.construct(
            **self._common, object="chat.completion.chunk", choices=[], usage=usage_of(usage)
        )

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> ChatCompletion:
        """All answers at once."""
        texts: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            texts[piece.index].append(piece)
        choices = []
        for index in sorted(texts):
            content = "".join(piece.text for piece in texts[index])
            tokens = [token for piece in texts[index] for token in piece.tokens]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": content, "refusal": None},
                    "logprobs": self._logprobs(tokens),
                    "finish_reason": texts[index][-1].finish,
                }
            )
        return ChatCompletion.construct(
            **self._common, object="chat.completion", choices=choices, usage=usage_of(usage)
        )

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        content = []
        for token in tokens:
            top = [self._token(other, logprob) for other, logprob in token.top]
            content.append(self._token(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        names = self._vocabulary
        return {"token": names.name(token), "bytes": names.bytes_of(token), "logprob": logprob}
