"""Ten thousand requests that are none, over connections that stay open: each is refused, and nothing else happens."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from served import PROMPT, ServerProcess

COUNT, CONNECTIONS = 10_000, 4
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "small", "prompt": "abc", "max_tokens": 1, "temperature": 1.0},
    "/v1/chat/completions": {"model": "small", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 1},
}
WRONG: dict[str, list[Any]] = {
    "model": [1, None, [], {}, "nobody", "small\0", "\ud800", "a" * 10000],
    "temperature": ["hot", [], {}, -1, 3, 1e300, float("nan"), float("inf")],
    "top_p": [0, 1.5, "x", float("-inf")],
    "top_k": [-1, 1 << 31, 10**30, 0.5],
    "repetition_penalty": [0, -1, 1e-300, 1e300],
    "n": [0, -1, 1.5, "x", 129, 10**30, {}],
    "max_tokens": [-1, 2.5, "x", [], {}],
    "stop": ["", [""], 5, {}, ["a"] * 17, "a" * 257],
    "seed": [1 << 63, -(1 << 70), 0.5, 1e300, "x", 10**4000],
    "stream": ["maybe", 5, {}],
    "stream_options": [5, {"include": True}],
    "response_format": [{}, {"type": "xml"}, "json", {"type": "json_schema"}, {"type": "json_object", "more": 1}],
    "logit_bias": [{"1": 5}],
    "tools": [[{"type": "function"}], 5],
    "terse": [5, {"trace": "x"}, {"trase": True}],
    "prompt": [{}, 1.5, [1.5], [[1, "a"]], [-1], [1 << 31], [], [[]], [100000], "a" * 3000],
    "messages": [[], "a", [{"role": "user"}], [{"role": "wizard", "content": "a"}], [{"role": "user", "content": 5}]],
    "max_completion_tokens": [0, "x"],
}
SCALARS = [b"", b"5", b'"a"', b"null", b"[]", b"true", b"NaN", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe{\x00}\x00"]


def truncated(draw: random.Random, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return text[: draw.randrange(1, len(text))]


def of_wrong_type(draw: random.Random, body: dict[str, Any]) -> bytes:
    own = "messages" if "messages" in body else "prompt"
    name = draw.choice([name for name in WRONG if name not in ("prompt", "messages", "max_completion_tokens")] + [own])
    return json.dumps(body | {name: draw.choice(WRONG[name])}).encode()


def of_another_name(draw: random.Random, body: dict[str, Any]) -> bytes:
    name = "".join(draw.choices("abcdefg\u00e9\U0001f600_\0", k=draw.randrange(1, 200)))
    return json.dumps(body | {name: draw.choice([None, 1, [], "x"])}, ensure_ascii=draw.random() < 0.5).encode()


def not_utf8(draw: random.Random, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    place = draw.randrange(len(text))
    return text[:place] + draw.choice([b"\xff", b"\xc0\x80", b"\xf5"]) + text[place:]


def nested(draw: random.Random, body: dict[str, Any]) -> bytes:
    depth, name = draw.choice([50, 400, 900, 990, 3000, 100_000]), draw.choice(["model", "stop", "tools", "nested"])
    begin, end = draw.choice([("[", "]"), ('{"a":', "}")])
    return f'{json.dumps(body)[:-1]}, "{name}": {begin * depth}1{end * depth}}}'.encode()


def twice(draw: random.Random, body: dict[str, Any]) -> bytes:
    name = draw.choice(["model", "max_tokens"])
    return f'{json.dumps(body)[:-1]}, "{name}": {draw.choice(["[]", "{}", "-1"])}}}'.encode()


def no_object(draw: random.Random, _: dict[str, Any]) -> bytes:
    return draw.choice(SCALARS)


MUTATIONS: list[Callable[[random.Random, dict[str, Any]], bytes]] = [
    truncated,
    of_wrong_type,
    of_wrong_type,
    of_another_name,
    not_utf8,
    nested,
    twice,
    no_object,
]
FOREIGN = ["text/plain", "application/xml", "multipart/form-data", "application/x-www-form-urlencoded", "\xff/\xfe"]


def ask(server: ServerProcess, seed: int) -> None:
    """One client's share."""
    draw = random.Random(seed)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    for _ in range(COUNT // CONNECTIONS):
        route = draw.choice(list(ROUTES))
        kind, body = "application/json", draw.choice(MUTATIONS)(draw, ROUTES[route])
        if draw.random() < 0.05:
            kind, body = draw.choice(FOREIGN), json.dumps(ROUTES[route]).encode()
        connection.request("POST", route, body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = response.read()
        assert response.status in (400, 404), (kind, body[:500], response.status, answer)
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 500, answer
    connection.close()


@pytest.mark.slow
def test_ten_thousand_malformed_bodies_are_refused(server: ServerProcess) -> None:
    create = server.client().completions.create
    drawn = {"model": "small", "prompt": PROMPT, "max_tokens": 40, "seed": 3}
    expected = create(**drawn).choices[0].text
    written = server.metric("terse_completion_tokens_total")
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda seed: ask(server, seed), range(CONNECTIONS)))
    assert server.metric("terse_completion_tokens_total") == written
    assert create(**drawn).choices[0].text == expected


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: elsewhere\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: elsewhere\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000,
        b"GET /%ff%00/../..//health?\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:60]),
)
def test_what_is_no_http_is_refused(sent: bytes, server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        answer = connection.recv(1 << 16)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")), answer
        connection.settimeout(0.5)
        with suppress(ConnectionError, TimeoutError):  # after the answer, too
            connection.sendall(b"xyz\r\n")
            assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 2")
    assert server.get("/health") == "ok\n"
