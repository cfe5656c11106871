"""What every route needs to know of the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from terseformer.serve.errors import ApiError, nearest, short
from terseformer.serve.job import Client
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import ServedModel
from terseformer.serve.scheduler import Scheduler


@dataclass(frozen=True)
class Server:
    """A server's parts; `server_of` finds it from a request."""

    models: Sequence[ServedModel]
    limits: Limits
    metrics: Metrics
    scheduler: Scheduler

    def model(self, name: str) -> ServedModel:
        """A model by its name.

        Raises:
            ApiError: there is none.
        """
        models = {model.name: model for model in self.models}
        if name not in models:
            raise ApiError(
                404,
                f"there is no model {short(name)!r}; the nearest is {nearest(name, models)!r}, /v1/models lists all",
                code="model_not_found",
                param="model",
            )
        return models[name]


def server_of(request: Request) -> Server:
    """The server that a request has come to."""
    return request.app.state.server


def client_of(request: Request) -> Client:
    """Who asks: known by a key, or else by an address."""
    if secret := request.scope.get("terse.key"):
        return Client(secret.hex(), secret)
    return Client(request.client.host if request.client else "")
