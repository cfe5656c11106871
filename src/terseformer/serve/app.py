"""The application: routes, and what stands behind them.

The page at `/` needs no key (`guard` asks for one below `/v1` and at `/metrics` alone); its script talks to the routes
that all clients use.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from openai.types import Model

from terseformer import __version__
from terseformer.serve import chat, completions, page, reference
from terseformer.serve.cache import PrefixCache
from terseformer.serve.errors import ERRORS, add_handlers
from terseformer.serve.guard import Guard
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import METRICS_TYPE, Metrics
from terseformer.serve.models import ServedModel
from terseformer.serve.scheduler import Scheduler
from terseformer.serve.server import Server, server_of

_router = APIRouter(responses=ERRORS)
_SHUTTING_DOWN = {"content": {"text/plain": {}}, "description": "The server is shutting down."}


def create_app(
    models: Sequence[ServedModel],
    limits: Limits | None = None,
    cache: PrefixCache | None = None,
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application, as any ASGI server runs it.

    Args:
        models: what is served, under names of their own.
        limits: how much it takes on.
        cache: the prefix cache; None: nothing is remembered.
        keys: of which a request must have one; none: all may come in.
        hosts: names by which it may be called; None: any.
    """
    limits = limits or Limits()
    metrics = Metrics()
    scheduler = Scheduler(models, limits, cache, metrics)
    metrics.watch("terse_waiting_requests", "Requests that wait for their turn.", lambda: scheduler.num_waiting)
    if cache is not None:
        metrics.watch("terse_cache_memory_bytes", "Bytes of the prefix cache in memory.", lambda: cache.num_bytes)
        metrics.watch("terse_cache_disk_bytes", "Bytes of the prefix cache on disk.", lambda: cache.disk_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.stop()
        if cache is not None:
            cache.close()

    app = FastAPI(
        title="Terseformer",
        version=__version__,
        summary="Sparse language models, in the forms of OpenAI's interface.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = Server(models, limits, metrics, scheduler)
    for router in (_router, completions.router, chat.router, page.router, reference.router):
        app.include_router(router)
    add_handlers(app)
    app.add_middleware(Guard, limits=limits, keys=keys, hosts=hosts, metrics=metrics)
    return app


@_router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models by name."""
    return {"object": "list", "data": [_describe(model) for model in server_of(request).models]}


@_router.get("/v1/models/{name}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    return _describe(server_of(request).model(name))


def _describe(model: ServedModel) -> dict[str, Any]:
    described = Model(id=model.name, created=model.created, object="model", owned_by="terseformer")
    return described.to_dict() | {"max_model_len": model.context, "terse": model.shape}


@_router.get("/health", response_class=PlainTextResponse, responses={503: _SHUTTING_DOWN})
async def health(request: Request) -> Response:
    """Whether requests are answered."""
    alive = server_of(request).scheduler.alive
    return PlainTextResponse("ok\n" if alive else "shutting down\n", 200 if alive else 503)


@_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return PlainTextResponse(server_of(request).metrics.show(), media_type=METRICS_TYPE)
