"""Runs the application: listens, says where, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import uvicorn
from starlette.types import ASGIApp

from terseformer.errors import UserError
from terseformer.layout import Dtype
from terseformer.serve.app import create_app
from terseformer.serve.cache import open_cache
from terseformer.serve.connection import connection
from terseformer.serve.limits import Caching, Limits
from terseformer.serve.models import load_models, named_folders

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def serve(
    checkpoints: Sequence[str],
    limits: Limits,
    caching: Caching,
    *,
    host: str,
    port: int,
    dtype: Dtype,
    threads: int | None,
    keys: Sequence[str],
) -> None:
    """Serves models until it is told to stop: by SIGTERM, or Ctrl-C; a second one stops it at once.

    Args:
        checkpoints: as `named_folders` takes them.
        limits: how much is taken on.
        caching: how much is kept.
        host: the address to listen at.
        port: 0: any that is free.
        dtype: of the weights.
        threads: of each engine.
        keys: of which a request must have one.

    Raises:
        UserError: a checkpoint cannot be used, or there is no listening at this address.
    """
    log_to_stderr()
    with listen(host, port) as listener:
        models = load_models(named_folders(checkpoints), dtype, threads)
        cache = open_cache(caching)
        app = create_app(models, limits, cache, keys, own_names(host, keys))
        engine = models[0].engine
        how = f"{engine.isa}, {engine.threads} threads, {engine.dtype}"
        run(app, app.state.server.scheduler, limits, listener, [model.name for model in models], how)


@runtime_checkable
class Work(Protocol):
    """What a server does, as it is told of the server's end."""

    def close(self) -> None:
        """Takes nothing new; what there is goes on."""

    def stop(self) -> None:
        """Ends all, with an error each; from any thread."""


def run(app: ASGIApp, work: Work, limits: Limits, listener: socket.socket, names: Sequence[str], how: str) -> None:
    """Runs an application until it is told to stop: by SIGTERM, or Ctrl-C; a second one stops it at once.

    Args:
        app: answers.
        work: is told of the end.
        limits: how long that may take.
        listener: where requests come in.
        names: of the models.
        how: they run.
    """
    config = uvicorn.Config(
        app,
        # The same whatever else is installed.
        http=connection(limits.stall),
        loop="asyncio",
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.grace) + 5,
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with contextlib.suppress(KeyboardInterrupt):  # raised once more when all has come to its end
        _Server(config, work, limits, f"serving {', '.join(names)} at {address}/v1 ({how})").run([listener])


class _Server(uvicorn.Server):
    """Says when it listens; when it is to stop, takes nothing new and ends after a while what does not end itself."""

    def __init__(self, config: uvicorn.Config, work: Work, limits: Limits, greeting: str) -> None:
        super().__init__(config)
        self._work, self._grace, self._greeting = work, limits.grace, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._work.close()
        ending = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self._work.stop)


def log_to_stderr() -> None:
    """Shows warnings and errors."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)


def own_names(host: str, keys: Sequence[str]) -> Collection[str] | None:
    """The names by which a server may be called; None: any. Warns where all may come in."""
    if not _is_loopback(host):
        if not keys:
            print(f"terse: whoever reaches {host} may use this server; --api-key limits that", file=sys.stderr)
        return None
    # With a key, which no page of another site knows, a proxy may call the server by another name.
    return None if keys else _LOOPBACK_NAMES | {host}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address.
        port: 0: any that is free.

    Raises:
        UserError: there is no listening at this address.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must lie in [0, 65535], not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"there is no listening at {host}, port {port}: {error}; give another --host or --port"
        ) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections' too: no event waits for the last
    return listener
