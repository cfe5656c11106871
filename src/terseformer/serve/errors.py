"""Errors in OpenAI's form, whatever went wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from terseformer.errors import UserError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_LONGEST_WORD = 64


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """One sentence: what was given, what is allowed, what to change."""
    type: str
    param: str | None
    """The parameter that it is about."""
    code: str | None
    """A word that programs know it by."""


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault, is shutting down, or took too long."},
}
"""The errors of a route, for its description."""


class ApiError(Exception):
    """What a client is told instead of a result.

    Args:
        status: of HTTP.
        message: one sentence: what was given, what is allowed, what to change.
        code: a word that programs know it by.
        param: the parameter that it is about.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message.encode("utf-8", "replace").decode()  # it may quote half of a surrogate pair
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code)).model_dump()

    def response(self) -> Response:
        """The error as a response."""
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def shutting_down() -> ApiError:
    """The error of a request that a server has no time for any more."""
    return ApiError(503, "the server is shutting down; try again later", code="shutting_down")


def too_many() -> ApiError:
    """The error of a request that comes when all connections have one."""
    headers = {"Connection": "close", "Retry-After": "1"}
    return ApiError(503, "the server answers as many requests as it can; try again", code="too_many", headers=headers)


def timed_out() -> ApiError:
    """The error of a request that took too long; OpenAI's clients do not try it again."""
    message = "the request has taken too long; ask for fewer tokens, or start the server with a larger --timeout"
    return ApiError(503, message, code="timeout", headers={"x-should-retry": "false"})


def internal_error() -> ApiError:
    """The error of a bug, of which the server's log says more."""
    return ApiError(500, "the server has made a mistake; its log says which", code="internal_error")


def replica_lost() -> ApiError:
    """The error of a request whose replica has ended, where it cannot be handed to another."""
    return ApiError(503, "the replica that wrote this has ended; ask again", code="replica_lost")


def no_replica() -> ApiError:
    """The error of a request that no replica can answer."""
    return ApiError(503, "no replica answers; try again later", code="no_replica")


def add_handlers(app: FastAPI) -> None:
    """Makes an application answer in OpenAI's form all errors but those of a bug, which the guard answers."""

    async def answer(_: Request, error: Exception) -> Response:
        return _as_api_error(error).response()

    for kind in (ApiError, UserError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing at this path; /docs lists what there is")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:  # a user's mistake
            return ApiError(400, str(error))


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of the things that are wrong with a request."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if first["type"] == "missing" and not place:
        return ApiError(400, "the request has no body, or its Content-Type is not application/json")
    message = str(first["msg"]).removeprefix("Value error, ")
    name = place[0] if place else None
    return ApiError(400, f"{'.'.join(place)}: {message}" if place else message, param=name)


def nearest(word: str, words: Collection[str]) -> str:
    """The most similar of some words, for messages; of a long one its beginning counts, which takes no time."""
    return difflib.get_close_matches(short(word), words, n=1, cutoff=0.0)[0]


def short(word: str) -> str:
    """As much of a word as a message may repeat."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…"
