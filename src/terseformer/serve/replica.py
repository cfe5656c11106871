"""The application as one of several replicas, which a front asks."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.types import Message

from terseformer.layout import Dtype
from terseformer.serve.app import create_app
from terseformer.serve.cache import open_cache
from terseformer.serve.limits import Caching, Limits
from terseformer.serve.models import load_models
from terseformer.serve.respond import stop
from terseformer.serve.server import Server

_log = logging.getLogger(__name__)


class Replica:
    """The application, in a process of its own.

    Args:
        folders: of the models, by name.
        limits: how much it takes on.
        caching: how much it keeps.
        dtype: of the weights.
        threads: of each engine.

    Raises:
        UserError: a model or the cache's folder cannot be used.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        limits: Limits,
        caching: Caching,
        *,
        dtype: Dtype,
        threads: int,
    ) -> None:
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._cache = open_cache(caching)
        self._app = create_app(load_models(folders, dtype, threads), limits, self._cache)
        self._server: Server = self._app.state.server
        self._server.scheduler.start()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The messages of an answer, as many at a time as there are; the first names the route."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._answer(scope, body, messages))
        try:
            while True:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                if whole := [message for message in batch if message is not None]:
                    yield whole
                if batch[-1] is None:
                    return
        finally:  # it may be that nobody waits any more
            await stop(work)

    async def _answer(self, scope: dict[str, Any], body: bytes, messages: asyncio.Queue[Message | None]) -> None:
        requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return requests.pop() if requests else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "route": getattr(scope.get("route"), "path", "")}
            messages.put_nowait(message)

        try:
            await self._app(scope, receive, send)
        except Exception:
            _log.exception("a request has failed")
        finally:
            messages.put_nowait(None)

    async def metrics(self) -> tuple[str, str]:
        """Its name, and what it shows at `/metrics`."""
        return self._name, self._server.metrics.show().decode()

    def check_health(self) -> None:
        """Whether requests are answered.

        Raises:
            RuntimeError: they are not.
        """
        if not self._server.scheduler.alive:
            raise RuntimeError("the engine's thread has ended")

    def close(self) -> None:
        """Ends all requests, and writes what is still to be written to disk."""
        self._server.scheduler.stop()
        if self._cache is not None:
            self._cache.close()
