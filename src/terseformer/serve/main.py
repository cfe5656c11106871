"""Runs the application: listens, says where, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from terseformer.data import default_cache
from terseformer.errors import UserError
from terseformer.layout import Dtype
from terseformer.serve.app import create_app
from terseformer.serve.cache import PrefixCache
from terseformer.serve.connection import connection
from terseformer.serve.disk import DiskCache
from terseformer.serve.limits import Limits
from terseformer.serve.models import ServedModel, load_models
from terseformer.serve.scheduler import Scheduler

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAX_CONNECTIONS = 256
_MB = 1 << 20


def serve(
    checkpoints: Sequence[str],
    limits: Limits,
    *,
    host: str,
    port: int,
    dtype: Dtype,
    threads: int | None,
    keys: Sequence[str],
    cache_memory: int,
    cache_disk: int,
    cache_folder: Path | None,
) -> None:
    """Serves models until it is told to stop: by SIGTERM, or Ctrl-C; a second one stops it at once.

    Args:
        checkpoints: as `load_models` takes them.
        limits: how much is taken on.
        host: the address to listen at.
        port: 0: any that is free.
        dtype: of the weights.
        threads: of each engine.
        keys: of which a request must have one.
        cache_memory: megabytes of the prefix cache in memory; 0: none is kept at all.
        cache_disk: megabytes on disk.
        cache_folder: where; default: in the folder for fetched files.

    Raises:
        UserError: a checkpoint cannot be used, or there is no listening at this address.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    is_local = _is_loopback(host)
    with _listen(host, port) as listener:
        models = load_models(checkpoints, dtype, threads)
        cache = _cache(cache_memory, cache_disk, cache_folder) if cache_memory else None
        # With a key, which no page of another site knows, a proxy may call the server by another name.
        hosts = _LOOPBACK_NAMES | {host} if is_local and not keys else None
        app = create_app(models, limits, cache, keys, hosts)
        if not is_local and not keys:
            print(f"terse: whoever reaches {host} may use this server; --api-key limits that", file=sys.stderr)
        config = uvicorn.Config(
            app,
            http=connection(limits.stall),
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(limits.grace) + 5,
        )
        with contextlib.suppress(KeyboardInterrupt):  # raised once more when all has come to its end
            _Server(config, app.state.server.scheduler, limits, _greeting(models, listener)).run([listener])


class _Server(uvicorn.Server):
    """Says when it listens; when it is to stop, takes nothing new and ends after a while what does not end itself."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, limits: Limits, greeting: str) -> None:
        super().__init__(config)
        self._scheduler, self._grace, self._greeting = scheduler, limits.grace, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.close()
        ending = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self._scheduler.stop)


def _cache(memory: int, disk: int, folder: Path | None) -> PrefixCache:
    if not disk:
        return PrefixCache(memory * _MB)
    folder = folder or default_cache() / "prefixes"
    try:
        return PrefixCache(memory * _MB, DiskCache(folder, disk * _MB))
    except OSError as error:
        raise UserError(
            f"the prefix cache cannot be kept in {folder}: {error.strerror or error}; give another --cache-folder, or "
            "--cache-disk 0"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
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


def _greeting(models: Sequence[ServedModel], listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    engine = models[0].engine
    names = ", ".join(model.name for model in models)
    return f"serving {names} at {address}/v1 ({engine.isa}, {engine.threads} threads, {engine.dtype})"
