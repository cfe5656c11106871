"""The server on Ray: replicas of it in processes of their own, on one machine or several.

Ray Serve starts the replicas, chooses one for each request, replaces those that end, and adds or removes some. Requests
do not come in by its HTTP proxy, which asks no other replica where one has ended: `serve.front` does, and what holds
for `terse serve` (keys, limits, names, slow clients) holds the same before the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from terseformer import native
from terseformer.errors import UserError
from terseformer.folder import find
from terseformer.layout import Dtype
from terseformer.pack import pack
from terseformer.serve.errors import internal_error, no_replica
from terseformer.serve.front import Front, ReplicaLost
from terseformer.serve.guard import Guard
from terseformer.serve.limits import MAX_CONNECTIONS, Caching, Limits
from terseformer.serve.main import listen, log_to_stderr, own_names, run
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import named_folders
from terseformer.serve.replica import Replica
from terseformer.serve.scaling import LOCAL, Scaling
from terseformer.threads import default_threads

_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, RequestCancelledError)
_OBJECT_STORE_BYTES = 128 << 20  # answers in small parts, of which few are on their way
_NAME = "replica"
_STARTS = 3  # that may fail before there is one
_HEALTH_SECONDS = 2.0
_METRICS_SECONDS = 5.0
_log = logging.getLogger(__name__)


def serve(
    checkpoints: Sequence[str],
    limits: Limits,
    caching: Caching,
    *,
    scaling: Scaling,
    host: str,
    port: int,
    dtype: Dtype,
    threads: int | None,
    keys: Sequence[str],
) -> None:
    """Serves models as `terseformer.serve.main.serve` does, by replicas on Ray.

    Args:
        checkpoints: as `named_folders` takes them; the replicas must find the folders at the same paths.
        limits: how much the server, and in it each replica, takes on.
        caching: how much each replica keeps.
        scaling: how many replicas, and where.
        host: the address to listen at.
        port: 0: any that is free.
        dtype: of the weights.
        threads: of each engine, and the CPUs that Ray keeps for a replica; None: the cores, shared by the replicas.
        keys: of which a request must have one.

    Raises:
        UserError: a checkpoint cannot be used, there is no listening at this address, or the replicas do not start.
    """
    log_to_stderr()
    with listen(host, port) as listener:
        folders = {name: folder.absolute() for name, folder in named_folders(checkpoints).items()}
        for folder in folders.values():  # here, so that a mistake is told at once, and not by every replica
            pack(find(folder), dtype)
        if scaling.address != LOCAL and threads is None:
            raise UserError("on a cluster give --threads, the cores that a replica uses")
        threads = threads or max(1, default_threads() // scaling.most)
        replica = ray_serve.deployment(
            name=_NAME,
            **_numbers(scaling, limits),
            max_ongoing_requests=MAX_CONNECTIONS,  # it refuses by itself what is too much for it
            ray_actor_options={"num_cpus": threads},
            health_check_period_s=_HEALTH_SECONDS,
            max_constructor_retry_count=_STARTS,
            graceful_shutdown_timeout_s=limits.timeout,  # one that is removed finishes what it has begun
            graceful_shutdown_wait_loop_s=0.5,
            logging_config={"enable_access_log": False},
        )(_Deployed).bind(
            folders,
            limits,
            replace(caching, cache_folder=caching.cache_folder and caching.cache_folder.absolute()),
            dtype=dtype,
            threads=threads,
        )
        with _cluster(scaling.address, threads * scaling.most), _running(replica, listener) as handle:
            metrics = Metrics()
            front = Front(_Replicas(handle), limits, metrics)
            app = Guard(front, limits, keys, own_names(host, keys), metrics)
            number = (
                str(scaling.replicas) if scaling.most == scaling.replicas else f"{scaling.replicas} to {scaling.most}"
            )
            run(app, front, limits, listener, list(folders), f"{number} replicas, {threads} threads each, {dtype}")


class _Deployed(Replica):
    """A replica as Ray Serve ends it."""

    def __del__(self) -> None:
        self.close()


class _Replicas:
    """Replicas behind a handle of Ray Serve's."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._answer = handle, handle.options(method_name="answer", stream=True)

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Any], None]:
        """As `Replicas` says."""
        response = self._answer.remote(scope, body)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for messages in response:
                yield messages
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
        except _LOST as error:
            raise ReplicaLost from error
        except DeploymentUnavailableError:
            raise no_replica() from None
        except RayError:
            _log.exception("a request has failed")
            raise internal_error() from None

    async def metrics(self) -> Mapping[str, str]:
        """As `Replicas` says; one that ends meanwhile is left out."""
        try:
            answers = await self._handle.broadcast("metrics").results_async(
                timeout_s=_METRICS_SECONDS, return_exceptions=True
            )
        except DeploymentUnavailableError:  # there is none at the moment
            return {}
        except (TimeoutError, asyncio.TimeoutError):
            raise no_replica() from None
        return dict(answer for answer in answers if isinstance(answer, tuple))


def _numbers(scaling: Scaling, limits: Limits) -> dict[str, Any]:
    """How many replicas Ray Serve runs."""
    if scaling.most == scaling.replicas:
        return {"num_replicas": scaling.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.replicas,
            "max_replicas": scaling.most,
            "target_ongoing_requests": scaling.target_requests or limits.max_batch,
        }
    }


@contextlib.contextmanager
def _cluster(address: str, cpus: int) -> Iterator[None]:
    """Joins a cluster, or begins one for this process, with which it ends."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that all is well
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        cores = native.physical_cores()
        if cpus > cores:
            _log.warning(
                "the replicas have %s threads, and this machine %s cores: they slow each other down", cpus, cores
            )
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"there is no joining Ray at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _running(replica: Any, listener: socket.socket) -> Iterator[DeploymentHandle]:
    """Replicas, until the block ends; those that a server at this address has left behind are removed."""
    name = f"terse-{socket.gethostname()}-{listener.getsockname()[1]}"
    ray_serve.start(proxy_location="Disabled")
    if name in ray_serve.status().applications:
        ray_serve.delete(name)
    try:
        try:
            handle = ray_serve.run(replica, name=name, route_prefix=None)
        except RuntimeError:
            told = ray_serve.status().applications[name].deployments[_NAME].message
            reason = told.strip().splitlines()[-1].removeprefix("terseformer.errors.UserError: ")  # a traceback's end
            raise UserError(f"the replicas do not start: {reason}") from None
        yield handle
    finally:
        ray_serve.delete(name)
