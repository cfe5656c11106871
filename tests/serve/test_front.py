"""The front of several replicas, before replicas that do what a test wants."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from starlette.types import Message

from terseformer.serve.front import Front, ReplicaLost
from terseformer.serve.guard import Guard
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics

LOST = "lost"
HANGS = "hangs"
WHOLE = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")], "route": "/v1/x"},
    {"type": "http.response.body", "body": b"whole"},
]
STREAM = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]},
    {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True},
    {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False},
]


class Scripted:
    """Replicas that answer each question by the next script: messages, and what becomes of the replica."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.asked: list[tuple[dict[str, Any], bytes]] = []
        self.closed = 0

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        self.asked.append((scope, body))
        try:
            for step in self._scripts.pop(0):
                if step == LOST:
                    raise ReplicaLost
                if step == HANGS:
                    await asyncio.Event().wait()
                yield [step]
        except GeneratorExit:
            self.closed += 1
            raise
        except asyncio.CancelledError:
            self.closed += 1
            raise

    async def metrics(self) -> Mapping[str, str]:
        own = Metrics()
        own.requests.labels("/", 200).inc()
        own.read("small", 7, 3)
        return {"a:1": own.show().decode(), "b:2": own.show().decode()}


class Asked:
    """What one request gets."""

    def __init__(self, replicas: Scripted, keys: tuple[str, ...] = (), **limits: float) -> None:
        metrics = Metrics()
        self.front = Front(replicas, Limits(**limits), metrics)
        self._app = Guard(self.front, Limits(**limits), keys, None, metrics)
        self.sent: list[Message] = []
        self.leave = asyncio.Event()

    async def get(self, path: str = "/v1/x", headers: list[tuple[bytes, bytes]] | None = None) -> Asked:
        requests = [{"type": "http.request", "body": b"question", "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "server": ("127.0.0.1", 1),
            "client": ("1.2.3.4", 5),
            "headers": headers or [],
        }
        await self._app(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]

    async def count(self, name: str) -> float:
        page = (await self.get("/metrics")).sent[-1]["body"].decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def ask(replicas: Scripted, path: str = "/v1/x", **limits: float) -> Asked:
    return asyncio.run(Asked(replicas, **limits).get(path))


@pytest.mark.parametrize("lost", [[LOST], [WHOLE[0], LOST], [STREAM[0] | {"headers": []}, STREAM[1], LOST]])
def test_what_has_not_begun_is_asked_again(lost: list[Any]) -> None:
    replicas = Scripted(lost, WHOLE)
    answer = ask(replicas)
    assert (answer.status, answer.body) == (200, b"whole")
    assert len(replicas.asked) == 2
    assert {body for _, body in replicas.asked} == {b"question"}


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    async def run() -> None:
        answer = await Asked(Scripted([*STREAM[:2], LOST])).get()
        assert answer.status == 200
        first, error, done = answer.body.decode().removesuffix("\n\n").split("\n\n")
        assert (first, done) == ("data: 1", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert not answer.sent[-1]["more_body"]
        assert await answer.count("terse_broken_streams_total") == 1

    asyncio.run(run())


def test_a_stream_goes_through_as_it_comes() -> None:
    async def run() -> None:
        answer = Asked(Scripted([*STREAM[:2], HANGS]))
        asking = asyncio.ensure_future(answer.get())
        while len(answer.sent) < 2:
            await asyncio.sleep(0.01)
        answer.leave.set()
        await asking

    asyncio.run(run())


def test_a_request_that_ends_its_replicas_does_not_end_all() -> None:
    replicas = Scripted([LOST], [LOST], [LOST], WHOLE)
    answer = ask(replicas)
    assert (answer.status, answer.code, len(replicas.asked)) == (503, "replica_lost", 3)


def test_an_answer_that_ends_too_early_is_a_mistake() -> None:
    answer = ask(Scripted(WHOLE[:1]))
    assert (answer.status, answer.code) == (500, "internal_error")


@pytest.mark.parametrize(("path", "code"), [("/v1/x", "timeout"), ("/health", "no_replica")])
def test_an_answer_may_take_so_long(path: str, code: str) -> None:
    replicas = Scripted([HANGS])
    answer = ask(replicas, path, timeout=0.01)
    assert (answer.status, answer.code, replicas.closed) == (503, code, 1)


def test_the_end() -> None:
    async def run() -> None:
        replicas = Scripted([HANGS])
        answer = Asked(replicas)
        asking = asyncio.ensure_future(answer.get())
        while not replicas.asked:
            await asyncio.sleep(0.01)
        answer.front.close()
        assert not asking.done()
        answer.front.stop()
        await asking
        assert (answer.status, answer.code, replicas.closed) == (503, "shutting_down", 1)
        answer.sent.clear()
        await answer.get()
        assert (answer.status, answer.code, len(replicas.asked)) == (503, "shutting_down", 1)

    asyncio.run(run())


def test_a_client_that_leaves_stops_the_work() -> None:
    async def run() -> None:
        replicas = Scripted([HANGS])
        answer = Asked(replicas)
        asking = asyncio.ensure_future(answer.get())
        while not replicas.asked:
            await asyncio.sleep(0.01)
        answer.leave.set()
        await asking
        assert (answer.sent, replicas.closed) == ([], 1)

    asyncio.run(run())


def test_keys_stay_at_the_front() -> None:
    async def run() -> None:
        replicas = Scripted(WHOLE)
        answer = Asked(replicas, keys=("one", "two"))
        await answer.get()
        assert (answer.status, replicas.asked) == (401, [])
        answer.sent.clear()
        await answer.get(headers=[(b"authorization", b"Bearer two"), (b"x", b"y")])
        ((scope, _),) = replicas.asked
        digest = hashlib.blake2b(b"two", digest_size=32).digest()
        assert (answer.status, scope["headers"], scope["terse.key"]) == (200, [(b"x", b"y")], digest)

    asyncio.run(run())


def test_metrics_of_all_replicas() -> None:
    async def run() -> None:
        answer = await Asked(Scripted(WHOLE)).get()
        answer.sent.clear()
        page = (await answer.get("/metrics")).body.decode()
        assert 'terse_requests_total{route="/v1/x",status="200"} 1.0' in page
        assert "terse_retried_requests_total 0.0" in page
        for replica in ("a:1", "b:2"):
            assert f'terse_prompt_tokens_total{{model="small",replica="{replica}"}} 7.0' in page
        assert page.count("# TYPE terse_prompt_tokens_total counter") == 1
        assert "terse_requests_total{replica" not in page
        assert 'route="/",' not in page

    asyncio.run(run())
