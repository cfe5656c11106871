"""A bug of this server's or of a library's ends one request, not the server, and is counted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.types import Message, Receive, Scope, Send

from jobs import Delivered, make_job
from terseformer.serve.errors import ApiError
from terseformer.serve.guard import Guard
from terseformer.serve.guided import Grammar
from terseformer.serve.lane import Lane
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import load_model


class Panic(BaseException):
    """What a Rust library raises: no Exception."""


class Broken(Grammar):
    """A grammar that cannot be begun."""

    def __init__(self) -> None: ...

    def copy(self) -> Broken:
        raise Panic


def test_a_panic_fails_one_job(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    lane = Lane(load_model("small", runs / "small", threads=1), Limits(), None, Metrics(), lambda _: None)
    whole, broken = Delivered(), Delivered()
    lane.add(make_job(broken, Broken()))
    lane.add(make_job(whole))
    while lane.busy:
        lane.round()
    assert [(type(item), item.status) for item in broken.sent] == [(ApiError, 500)]
    assert whole.sent[-1].completion_tokens == 4
    assert "Panic" in caplog.text


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("fault", [KeyError, Panic])
def test_a_fault_is_answered_and_counted(
    fault: type[BaseException], begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/v1/broken")
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise fault

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    metrics = Metrics()
    guard = Guard(app, Limits(), (), None, metrics)
    call = guard({"type": "http", "path": "/v1/broken", "headers": []}, receive, send)
    if begun:
        with pytest.raises(fault):
            asyncio.run(call)
    else:
        asyncio.run(call)
        assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
        assert fault.__name__ in caplog.text
    status = 200 if begun else 500
    assert f'terse_requests_total{{route="/v1/broken",status="{status}"}} 1.0' in metrics.show().decode()
