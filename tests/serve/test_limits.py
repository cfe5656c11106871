"""What goes beyond is refused or ended, and disturbs nobody else."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import APIError, APIStatusError, AuthenticationError, OpenAI, RateLimitError

from served import ServerProcess, until
from terseformer.config import ConfigError
from terseformer.serve.limits import Limits
from terseformer.serve.requests import IGNORED, NEUTRAL, ChatRequest, CompletionRequest

LONG: dict[str, Any] = {
    "model": "slow",
    "prompt": "abc",
    "max_tokens": 480,
    "temperature": 0,
    "logprobs": 0,
}  # an event for each token


@pytest.fixture(scope="module")
def narrow(slow: Path, runs: Path) -> Iterator[ServerProcess]:
    """A server that writes one text at a time, lets one wait, and knows two keys."""
    flags = ("--max-batch", 1, "--max-queue", 1, "--api-key", "one", "two", "--max-body", 20000)
    with ServerProcess(slow, runs / "small", *flags) as server:
        yield server


def idle(server: ServerProcess) -> bool:
    page = server.get("/metrics", Authorization="Bearer one")
    counts = [line for line in page.splitlines() if line.startswith(("terse_running_texts", "terse_waiting"))]
    return len(counts) > 1 and all(line.endswith(" 0.0") for line in counts)


def waiting(server: ServerProcess) -> bool:
    return "terse_waiting_requests 1.0" in server.get("/metrics", Authorization="Bearer one")


def test_a_full_queue_refuses_and_says_when_to_come_again(narrow: ServerProcess) -> None:
    client = narrow.client("one")
    with ThreadPoolExecutor() as pool, client.completions.create(stream=True, **LONG) as stream:
        next(stream)
        second = pool.submit(client.completions.create, **LONG | {"max_tokens": 2})
        until(lambda: waiting(narrow))
        with pytest.raises(RateLimitError, match="requests are waiting already") as caught:
            client.completions.create(**LONG)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert caught.value.code == "queue_full"
        stream.close()
        assert second.result().usage.completion_tokens == 2
    until(lambda: idle(narrow))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(stream: bool, slow: Path) -> None:
    with ServerProcess(slow) as server:
        body = json.dumps(LONG | {"stream": stream, "n": 4, "max_tokens": 2000})
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().read(10) == b'data: {"id'
        else:
            until(lambda: server.metric("terse_running_texts") == 4)
        connection.close()
        until(lambda: server.metric("terse_running_texts") == 0)
        assert server.metric("terse_completion_tokens_total") < 4 * 1000


def test_a_client_that_leaves_the_queue_makes_room(narrow: ServerProcess) -> None:
    client = narrow.client("one")
    with client.completions.create(stream=True, **LONG) as stream:
        next(stream)
        for _ in range(3):
            connection = http.client.HTTPConnection(urlsplit(narrow.url).netloc, timeout=300)
            headers = {"Content-Type": "application/json", "Authorization": "Bearer one"}
            connection.request("POST", "/v1/completions", json.dumps(LONG), headers)
            until(lambda: waiting(narrow))
            connection.close()
            until(lambda: not waiting(narrow))
    until(lambda: idle(narrow))


@pytest.mark.slow
def test_clients_take_turns_and_short_texts_join(slow: Path) -> None:
    """A client with many texts in a request delays another's by no more than it must."""
    done: list[str] = []

    def ask(client: OpenAI, name: str, n: int, tokens: int) -> None:
        client.completions.create(**LONG | {"max_tokens": tokens, "n": n})
        done.append(name)

    with ServerProcess(slow, "--max-batch", 2, "--api-key", "one", "two") as server, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server.client("one"), "many", 12, 40)
        until(lambda: not idle(server))
        other = pool.submit(ask, server.client("two"), "one", 1, 10)
        first.result()
        other.result()
    assert done == ["one", "many"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream: bool, slow: Path) -> None:
    with ServerProcess(slow, "--timeout", 0.7) as server:
        create = server.client().completions.create
        if stream:
            with pytest.raises(APIError, match="taken too long"):
                list(create(stream=True, **LONG))
        else:
            with pytest.raises(APIStatusError, match="taken too long") as caught:
                create(**LONG)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["x-should-retry"] == "false"
        until(lambda: server.metric("terse_running_texts") == 0)


def status(call: Callable[[], Any]) -> tuple[int, dict[str, Any]]:
    with pytest.raises(HTTPError) as caught:
        call()
    with caught.value as error:
        return error.code, json.loads(error.read())["error"]


def test_a_key_is_needed_where_there_are_some(narrow: ServerProcess) -> None:
    for key in ("three", "one two"):
        with pytest.raises(AuthenticationError, match="no valid API key"):
            narrow.client(key).models.list()
    for key in ("one", "two"):
        assert len(list(narrow.client(key).models.list())) == 2
    assert status(lambda: narrow.get("/v1/models"))[0] == 401
    for header in ("Basic one", "one", "Bearer", "Bearer \xff\xfe", ""):
        assert status(lambda header=header: narrow.get("/v1/models", Authorization=header))[0] == 401
    assert status(lambda: narrow.get("/metrics"))[0] == 401
    assert narrow.get("/health", Host="behind.a.proxy") == "ok\n"


def test_a_key_may_come_from_the_environment(runs: Path) -> None:
    with ServerProcess(runs / "small", TERSE_API_KEY="hidden") as server:
        assert status(lambda: server.get("/v1/models"))[0] == 401
        assert server.get("/v1/models", Authorization="Bearer hidden")


def test_a_large_body_is_refused(narrow: ServerProcess) -> None:
    with pytest.raises(APIStatusError, match="larger than 20000 bytes") as caught:
        narrow.client("one").completions.create(model="small", prompt="a" * 20000)
    assert caught.value.status_code == 413
    connection = http.client.HTTPConnection(urlsplit(narrow.url).netloc, timeout=300)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer one"}
    connection.request("POST", "/v1/completions", iter([b"a" * 15000] * 2), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_another_name_for_the_server_is_refused(server: ServerProcess) -> None:
    code, error = status(lambda: server.get("/v1/models", Host="evil.example"))
    assert (code, error["code"]) == (400, "wrong_host")
    for host in ("localhost", "127.0.0.1:80", "LOCALHOST:1"):
        assert server.get("/health", Host=host) == "ok\n"


@pytest.mark.parametrize(
    ("body", "kind", "code", "message"),
    [
        (b"", "application/json", 400, "the request has no body"),
        (b"{", "application/json", 400, "the body is not valid JSON"),
        (b"[" * 15000, "application/json", 400, ""),
        (b'{"model": "small", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, ""),
        (b'{"model": "small", "prompt": "\\ud800"}', "application/json", 400, "half of a surrogate pair"),
        (b'{"model": "small", "\\ud800": 1}', "application/json", 400, "half of a surrogate pair"),
        (b'{"model": "\\ud800"}', "application/json", 400, "half of a surrogate pair"),
        (b'{"model": "small", "temperature": NaN}', "application/json", 400, "temperature"),
        (b'{"model": "small", "repetition_penalty": 1e-50}', "application/json", 400, "repetition_penalty: Input"),
        (b'{"model": "small"}', "text/plain", 400, ""),
        (b'"small"', "application/json", 400, ""),
        (b"\xff\xfe", "application/json", 400, ""),
        (b'{"model": "nobody"}', "application/json", 404, "there is no model 'nobody'"),
        (b'{"prompt": "a"}', "application/json", 400, "model: Field required"),
        (b'{"model": "' + b"a" * 300000 + b'"}', "application/json", 404, "there is no model 'aaaa"),
        (b'{"model": "small", "' + b"b" * 300000 + b'": 1}', "application/json", 400, "unknown parameter 'bbbb"),
        (b'{"model": "small", "prompt": [' + b'"a",' * 300000 + b'"a"]}', "application/json", 400, "300001 prompts"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_malformed_request_is_answered_in_openais_form(
    body: bytes, kind: str, code: int, message: str, server: ServerProcess
) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
    connection.request("POST", "/v1/completions", body, {"Content-Type": kind})
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    connection.close()
    assert response.status == code, error
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert len(error["message"]) < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=6),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3),
    max_leaves=6,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *NEUTRAL, *IGNORED})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(["completions", "chat/completions"]),
    changes=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), VALUES, max_size=3),
    model=st.sampled_from(["small", "pairs"]),
)
def test_no_body_makes_the_server_fail(route: str, changes: dict[str, Any], model: str, server: ServerProcess) -> None:
    own = {"prompt": "abc"} if route == "completions" else {"messages": [{"role": "user", "content": "abc"}]}
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
    body = json.dumps({"model": model, "max_tokens": 3, **own} | changes)
    connection.request("POST", f"/v1/{route}", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status in (200, 400, 404), answer
    if response.status != 200:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


def test_other_paths_and_methods(server: ServerProcess) -> None:
    assert status(lambda: server.get("/v1/nothing"))[0] == 404
    assert status(lambda: server.get("/v1/completions"))[0] == 405
    paths = json.loads(server.get("/openapi.json"))["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"} <= set(paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_queue": 0}, "max_queue must be at least 1, not 0"),
        ({"max_batch": 9}, "max_batch must be in"),
        ({"timeout": 0.0}, "timeout must be positive"),
    ],
)
def test_limits_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**changes)
