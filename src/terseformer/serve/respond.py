"""How a job's texts get to its client: whole, or as a stream of events; and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol, runtime_checkable

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from terseformer.serve.delivery import Piece, Usage
from terseformer.serve.errors import ApiError
from terseformer.serve.job import Job
from terseformer.serve.server import Server

STREAM: dict[str, Any] = {"text/event-stream": {}}
"""What a route answers beside its structure, for its description."""
_GONE = Response(status_code=499)  # nobody reads it


@runtime_checkable
class Form(Protocol):
    """What is sent: OpenAI's structures of one route."""

    def chunk(self, piece: Piece) -> BaseModel:
        """An event of a stream."""

    def last(self, usage: Usage) -> BaseModel | None:
        """The event that counts all tokens, if it is asked for."""

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> BaseModel:
        """All texts at once."""


async def respond(server: Server, request: Request, job: Job, form: Form, stream: bool) -> Response:
    """Submits a job and answers with what comes of it.

    Raises:
        ApiError: the job has failed, or was not taken.
    """
    server.scheduler.submit(job)
    if stream:
        return EventStream(server, job, form)
    try:
        response = await unless_client_leaves(_collect(server, job, form), request.receive)
    finally:
        server.scheduler.cancel(job)
    return _GONE if response is None else response


async def _collect(server: Server, job: Job, form: Form) -> Response:
    pieces: list[Piece] = []
    async for item in job.delivery.items(job.arrived + server.limits.timeout):
        if isinstance(item, Usage):
            return Response(to_json(form.whole(pieces, item)), media_type="application/json")
        pieces.append(item)
    raise AssertionError("the usage is the last")


class EventStream(Response):
    """Server-sent events, one for each piece of text; an error after the first is an event, too."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, job: Job, form: Form) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._server, self._job, self._form = server, job, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, or as many as the client waits for."""
        try:
            await unless_client_leaves(self._send_all(scope, receive, send), receive)
        finally:
            self._server.scheduler.cancel(self._job)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for item in self._job.delivery.items(self._job.arrived + self._server.limits.timeout):
                data = self._form.last(item) if isinstance(item, Usage) else self._form.chunk(item)
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if data is not None:
                    await send(event(to_json(data)))
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, send)
                return
            await send(event(json.dumps(error.body())))
        await send(event("[DONE]", last=True))


def event(data: str, last: bool = False) -> Message:
    """One of a stream's events."""
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": not last}


def to_json(data: BaseModel) -> str:
    """One of OpenAI's structures, with what was set; a stream's reason to end is null until there is one."""
    return data.model_dump_json(by_alias=True, exclude_unset=True, warnings=False)


async def unless_client_leaves(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of some work; None where the client has gone before it was done."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await stop(working, leaving)


async def stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks until they have ended: before Python 3.12, `wait_for` may swallow a cancellation."""
    going = set(tasks)
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=0.1)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
