"""The front of several replicas: hands requests on, and bears that a replica ends.

What has not begun to be sent is asked for again, of another replica: an answer that is no stream, since it is held back
until it is whole, and a stream before its first event. A text depends on the request and its seed alone, so that the
answer is the same. A stream that has begun ends with an event that says so.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from terseformer.serve.errors import ApiError, internal_error, no_replica, replica_lost, shutting_down, timed_out
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import METRICS_TYPE, Metrics
from terseformer.serve.respond import event, stop, unless_client_leaves

_TRIES = 3
"""A request that ends its replica must not end all of them."""
_HEALTH_SECONDS = 5.0
_GLANCE_SECONDS = 0.2
_HANDED_ON = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "server",
    "client",
    "terse.key",
)


class ReplicaLost(Exception):
    """A replica has ended before its answer did."""


@runtime_checkable
class Replicas(Protocol):
    """Replicas of the application, however they are reached."""

    def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        """Asks one of them; gives the messages of its answer as they come. Closing the generator stops the work.

        Raises:
            ReplicaLost: it has ended.
            ApiError: there is none.
        """

    async def metrics(self) -> Mapping[str, str]:
        """What each of them shows at `/metrics`, by its name.

        Raises:
            ApiError: one does not answer.
        """


class Front:
    """Answers requests by replicas.

    Args:
        replicas: answer.
        limits: how long that may take.
        metrics: count what the replicas cannot.
    """

    def __init__(self, replicas: Replicas, limits: Limits, metrics: Metrics) -> None:
        self._replicas, self._limits, self._metrics = replicas, limits, metrics
        self._retries = metrics.count("terse_retried_requests", "Requests that were given to another replica.")
        self._broken = metrics.count("terse_broken_streams", "Streams that ended early, since their replica did.")
        self._closing = self._stopping = False

    def close(self) -> None:
        """Takes no more requests; those that there are go on."""
        self._closing = True

    def stop(self) -> None:
        """Ends all requests, with an error each; from any thread."""
        self._closing = self._stopping = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, whose body is whole, unless the client leaves."""
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])  # which an ASGI server takes for an answer
        body = (await receive())["body"]
        await unless_client_leaves(self._respond(scope, body, receive, send), receive)

    async def _respond(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        answer = _Answer(scope, send)
        try:
            if self._closing:
                raise shutting_down()
            if scope["path"] == "/metrics":
                scope["route"] = _Route("/metrics")
                page = self._metrics.show(await self._replicas.metrics())
                await Response(page, media_type=METRICS_TYPE)(scope, receive, send)
                return
            await self._ask_until_whole(scope, body, answer)
        except ApiError as error:
            if not answer.started:
                await error.response()(scope, receive, send)
                return
            await send(event(json.dumps(error.body())))
            await send(event("[DONE]", last=True))

    async def _ask_until_whole(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        is_health = scope["path"] == "/health"
        late = no_replica() if is_health else timed_out()
        deadline = time.monotonic() + min(self._limits.timeout, _HEALTH_SECONDS if is_health else math.inf)
        for _ in range(_TRIES):
            answer.restart()
            try:
                async with aclosing(self._replicas.ask(_handed_on(scope), body)) as batches:
                    while not answer.ended:
                        await answer.add(await self._next(batches, deadline, late))
                return
            except ReplicaLost:
                if answer.started:
                    self._broken.inc()
                    raise replica_lost() from None
                self._retries.inc()
        raise replica_lost()

    async def _next(
        self, batches: AsyncGenerator[list[Message], None], deadline: float, late: ApiError
    ) -> list[Message]:
        getting = asyncio.ensure_future(anext(batches, None))
        try:
            while not getting.done():
                if self._stopping:
                    raise shutting_down()
                if time.monotonic() > deadline:
                    raise late
                await asyncio.wait((getting,), timeout=_GLANCE_SECONDS)
        finally:
            await stop(getting)
        messages = getting.result()
        if messages is None:  # it has failed before its answer was whole
            raise internal_error()
        return messages


class _Answer:
    """What a client is sent: a stream as it comes, all else when it is whole."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._held: list[Message] = []
        self.started = False
        """Whether something has been sent."""
        self.ended = False

    def restart(self) -> None:
        """Forgets what has not been sent."""
        self._held = []

    async def add(self, messages: Sequence[Message]) -> None:
        """Sends what comes next, or keeps it until the rest has come."""
        self._held += messages
        last = self._held[-1]
        self.ended = last["type"] == "http.response.body" and not last.get("more_body", False)
        if self.started or self.ended or _is_stream(self._held[0]):
            held, self._held = self._held, []
            for message in held:
                self.started = True
                if "route" in message:
                    self._scope["route"] = _Route(message["route"])
                await self._send(message)


class _Route(NamedTuple):
    """As the guard counts it."""

    path: str


def _is_stream(start: Message) -> bool:
    return (b"content-type", b"text/event-stream") in [
        (name, value.partition(b";")[0]) for name, value in start["headers"]
    ]


def _handed_on(scope: Scope) -> dict[str, Any]:
    """A request as a replica gets it: with a digest of its key instead of the key."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    return {name: scope[name] for name in _HANDED_ON if name in scope} | {"headers": headers}
