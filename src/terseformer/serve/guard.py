"""The door: who may come in, and with how much."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from terseformer.serve.errors import ApiError, internal_error, too_many
from terseformer.serve.limits import MAX_CONNECTIONS, Limits
from terseformer.serve.metrics import Metrics

_NEEDS_KEY = re.compile(r"/v1/|/metrics\b")
_ENDS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
_log = logging.getLogger(__name__)


class Guard:
    """Refuses what has no key, is too large or comes from elsewhere; counts requests, those that a bug ends, too.

    A page of another site may send its visitors' browsers to a server on their own machine, under a name of that
    site's; so the names by which this server is called can be limited.

    Args:
        app: gets what is let in.
        limits: how large a body may be, and how long it may take.
        keys: of which a request must have one; none: all may come in.
        hosts: names in the `Host` header; None: any.
        metrics: count requests.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Sequence[str], hosts: Collection[str] | None, metrics: Metrics
    ) -> None:
        self._app, self._limits, self._hosts, self._metrics = app, limits, hosts, metrics
        self._keys = [key.encode() for key in keys]
        self._num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets the application do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        self._num_inside += 1
        try:
            if self._num_inside > MAX_CONNECTIONS:
                raise too_many()
            headers = Headers(scope=scope)
            self._check_host(headers)
            if self._keys and _NEEDS_KEY.match(scope["path"]):
                scope["terse.key"] = self._check_key(headers)
            receive = await self._with_body(headers, receive)
            await self._app(scope, receive, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except _ENDS:
            raise
        except BaseException:  # a Rust library's panic is no Exception
            if started:
                raise
            _log.exception("a request could not be answered")
            await internal_error().response()(scope, receive, counted)
        finally:
            self._num_inside -= 1

    def _check_host(self, headers: Headers) -> None:
        name = re.sub(r":\d*$", "", headers.get("host", ""))
        if self._hosts is not None and name.lower() not in self._hosts:
            raise ApiError(
                400, f"the server is not called {name!r} but {' or '.join(sorted(self._hosts))}", code="wrong_host"
            )

    def _check_key(self, headers: Headers) -> bytes:
        """A digest of the key that a request has."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        known = [hmac.compare_digest(given, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "the request has no valid API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.blake2b(given, digest_size=32).digest()

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Reads the body; gives what hands it on."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.max_body:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read(receive), self._limits.stall)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request's body did not come in time", headers={"Connection": "close"}) from None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the request's body ended too soon")
            body += message.get("body", b"")
            if len(body) > self._limits.max_body:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self._limits.max_body} bytes; send less at a time",
            code="body_too_large",
            headers={"Connection": "close"},
        )
