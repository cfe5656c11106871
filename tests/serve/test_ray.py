"""`terse serve --ray`: two replicas on this machine answer as one server, and one of them may be killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError, OpenAI

from served import PROMPT, ServerProcess
from terseformer import cli

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

KEY = "one"
LONG: dict[str, Any] = {"model": "slow", "prompt": "abc", "max_tokens": 400, "logprobs": 0}  # an event for each token
MARK = "TERSE_TEST_ON_RAY"
"""A variable that all processes of the server inherit."""


class Replicated(ServerProcess):
    """A server on Ray, whose replicas can be told apart."""

    def get(self, path: str, **headers: str) -> str:
        return super().get(path, **{"Authorization": f"Bearer {KEY}"} | headers)

    def running(self) -> dict[int, float]:
        """The texts that each replica is at, by its process."""
        found = re.findall(r'^terse_waiting_requests\{replica=".*?:(\d+)"\} (\S+)$', self.get("/metrics"), re.MULTILINE)
        texts = {int(pid): float(value) for pid, value in found}
        for pid, value in re.findall(
            r'^terse_running_texts\{.*?replica=".*?:(\d+)"\} (\S+)$', self.get("/metrics"), re.MULTILINE
        ):
            texts[int(pid)] = texts.get(int(pid), 0) + float(value)
        return texts


def until(condition: Callable[[], Any]) -> Any:
    for _ in range(1000):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it has not come true")


@pytest.fixture(scope="module")
def replicated(slow: Path, runs: Path) -> Iterator[Replicated]:
    flags = ("--ray", "--replicas", 2, "--api-key", KEY, "two", "--max-body", 20000, "--grace", 0.5)
    with Replicated(runs / "small", runs / "pairs", slow, *flags, **{MARK: "1"}) as server:
        yield server
    until(lambda: not left_behind())


@pytest.fixture(scope="module")
def plain(slow: Path, runs: Path) -> Iterator[ServerProcess]:
    with ServerProcess(runs / "small", runs / "pairs", slow) as server:
        yield server


def left_behind() -> list[str]:
    """Processes of the server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}=1".encode() in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_text())
        except OSError:  # it has ended, or is another user's
            continue
    return found


def answer(client: OpenAI, **asked: Any) -> list[Any]:
    """What a client is told, without what differs from one request to the next."""
    done = client.completions.create(**asked)
    return [done.choices, done.usage.completion_tokens, done.usage.prompt_tokens, done.system_fingerprint]


def tokens(client: OpenAI, **asked: Any) -> list[str]:
    """The tokens of a text, whose log-probabilities may differ in the last place by what else is written."""
    return client.completions.create(**asked).choices[0].logprobs.tokens


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "small", "prompt": PROMPT, "temperature": 0, "max_tokens": 20, "logprobs": 2, "echo": True},
        {"model": "small", "prompt": [PROMPT, "abc"], "seed": 3, "n": 2, "max_tokens": 20},
        {"model": "pairs", "prompt": "abc def", "seed": 1},
    ],
)
def test_the_same_answers(asked: dict[str, Any], replicated: Replicated, plain: ServerProcess) -> None:
    expected = answer(plain.client(), **asked)
    for _ in range(3):  # whichever replica it is
        assert answer(replicated.client(KEY), **asked) == expected


def test_the_same_streams_and_turns(replicated: Replicated, plain: ServerProcess) -> None:
    asked = {"model": "small", "seed": 5, "max_tokens": 30}
    said = []
    for client in (plain.client(), replicated.client(KEY)):
        with client.completions.create(prompt=PROMPT, stream=True, **asked) as stream:
            text = "".join(chunk.choices[0].text for chunk in stream)
        turn = client.chat.completions.create(messages=[{"role": "user", "content": "abc"}], **asked)
        said.append((text, turn.choices[0].message.content))
    assert said[0] == said[1]


def test_the_same_routes(replicated: Replicated, plain: ServerProcess) -> None:
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert replicated.get(path) == plain.get(path)
    for mine, other in zip(replicated.client(KEY).models.list(), plain.client().models.list(), strict=True):
        assert mine.to_dict() | {"created": 0} == other.to_dict() | {"created": 0}
    for client in (replicated.client(KEY), plain.client()):
        with pytest.raises(NotFoundError, match="there is no model 'smal'; the nearest is 'small'"):
            client.completions.create(model="smal", prompt="")
        with pytest.raises(BadRequestError, match="temperature"):
            client.completions.create(model="small", prompt="", temperature=-1)


def test_keys_and_limits(replicated: Replicated) -> None:
    for key in ("three", "none"):
        with pytest.raises(AuthenticationError, match="no valid API key"):
            replicated.client(key).models.list()
    assert len(list(replicated.client("two").models.list())) == 3
    with pytest.raises(APIError, match="larger than 20000 bytes"):
        replicated.client(KEY).completions.create(model="small", prompt="a" * 20000)
    with pytest.raises(HTTPError, match="401"):
        replicated.get("/metrics", Authorization="")
    assert replicated.metric(r"terse_requests_total\{route=\"/v1/models\",status=\"200\"\}") >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(stream: bool, replicated: Replicated) -> None:
    before = replicated.metric("terse_completion_tokens_total")
    connection = http.client.HTTPConnection(urlsplit(replicated.url).netloc, timeout=300)
    body = json.dumps(LONG | {"stream": stream, "n": 4, "max_tokens": 2000, "temperature": 0})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", body, headers)
    if stream:
        assert connection.getresponse().read(10) == b'data: {"id'
    else:
        until(lambda: sum(replicated.running().values()) == 4)
    connection.close()
    until(lambda: sum(replicated.running().values()) == 0)
    assert replicated.metric("terse_completion_tokens_total") - before < 4 * 1000


def test_a_killed_replica_loses_no_answer(replicated: Replicated, plain: ServerProcess) -> None:
    until(lambda: len(replicated.running()) == 2)
    asked = [LONG | {"seed": seed, "max_tokens": 100} for seed in range(4)] + [LONG | {"temperature": 0}]
    expected = [tokens(plain.client(), **request) for request in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(tokens, replicated.client(KEY), **request) for request in asked]
        busy = until(lambda: [pid for pid, texts in replicated.running().items() if texts])
        os.kill(busy[0], signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
    assert replicated.metric("terse_retried_requests_total") >= 1
    until(lambda: len(replicated.running()) == 2)  # there is another in its place
    assert busy[0] not in replicated.running()


def test_a_stream_of_a_killed_replica_ends_with_an_error(replicated: Replicated) -> None:
    stream = replicated.client(KEY).completions.create(stream=True, **LONG | {"max_tokens": 2000})
    next(stream)
    (busy,) = (pid for pid, texts in replicated.running().items() if texts)
    os.kill(busy, signal.SIGKILL)
    with pytest.raises(APIError, match="the replica that wrote this has ended") as caught:
        list(stream)
    assert caught.value.code == "replica_lost"
    assert replicated.metric("terse_broken_streams_total") == 1


def test_the_end_is_in_good_order(replicated: Replicated) -> None:
    """It is the last test of this server."""
    stream = replicated.client(KEY).completions.create(stream=True, **LONG | {"max_tokens": 2000, "n": 8})
    next(stream)
    replicated.process.send_signal(signal.SIGTERM)
    with pytest.raises(APIError, match="shutting down"):
        list(stream)
    replicated.process.wait(60)
    until(lambda: not left_behind())


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # of Ray, as it is imported
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replicas", "3"], "replicas and their cluster are Ray's; give --ray too"),
        (["--ray", "--replicas", "0"], "replicas must be at least 1, not 0"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "max_replicas must be 0 or at least --replicas, not 2"),
        (["--ray", "--ray-address", "ray://there:10001"], "ray_address must be HOST:PORT or auto"),
        (["--ray", "--ray-address", "auto"], "on a cluster give --threads"),
        (["--ray", "--port", "70000"], "--port must lie in [0, 65535], not 70000"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str],
    message: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["terse", "serve", str(runs / "small"), *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith("terse: ")
    assert message in shown.err
