"""Clients that send nothing, do not read, or leave: their connections and their work end, and others notice nothing."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from served import HEAD, PROMPT, ServerProcess, request_of, until
from terseformer.serve.limits import MAX_CONNECTIONS
from terseformer.serve.main import listen

ASKED = {"model": "small", "prompt": PROMPT, "max_tokens": 40, "seed": 3}


@pytest.fixture(scope="module")
def hasty(runs: Path) -> Iterator[ServerProcess]:
    """A server that waits for nobody."""
    with ServerProcess(runs / "small", "--stall", 1, "--max-texts", 200) as server:
        yield server


def ended(connection: socket.socket) -> bool:
    """Whether the server ends a connection, after whatever it still sends."""
    connection.settimeout(20)
    with suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: local", HEAD.encode()])
def test_half_a_header_is_not_waited_for(sent: bytes, hasty: ServerProcess) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        assert ended(connection)


def test_a_byte_now_and_then_is_no_header(hasty: ServerProcess) -> None:
    def send() -> None:
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.1)

    with hasty.connect() as connection, pytest.raises(ConnectionError):
        send()


def test_half_a_header_after_an_answer_is_not_waited_for(hasty: ServerProcess) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert ended(connection)


def test_a_piece_of_an_answer_does_not_wait_for_the_client_to_confirm_the_last() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_silent_connections_keep_nobody_out(server: ServerProcess) -> None:
    expected = server.client().completions.create(**ASKED).choices[0].text
    with ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(server.connect())
        assert server.client().completions.create(**ASKED).choices[0].text == expected
        assert server.connections <= 256
    until(lambda: server.connections == 0)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_given_up(stream: bool, hasty: ServerProcess) -> None:
    create = hasty.client().completions.create
    expected = create(**ASKED).choices[0].text
    written = hasty.metric("terse_completion_tokens_total")
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", int(hasty.url.rpartition(":")[2])))
        number = 200 if stream else 40
        reader.sendall(request_of(ASKED | {"max_tokens": 180, "n": number, "stream": stream, "logprobs": 20}))
        until(lambda: hasty.metric("terse_running_texts") > 0)
        assert create(**ASKED).choices[0].text == expected
        until(lambda: hasty.metric("terse_running_texts") == 0 and hasty.connections == 0)
    if stream:
        assert hasty.metric("terse_completion_tokens_total") - written < number * 180


@pytest.mark.slow
def test_clients_may_leave_at_any_moment(runs: Path) -> None:
    """Within header or body, while the text is written or read; by a proper end or a reset."""
    draw = random.Random(0)
    with ServerProcess(runs / "small") as server:
        create = server.client().completions.create
        expected = create(**ASKED).choices[0].text
        done, texts = threading.Event(), []

        def ask() -> None:
            while not done.is_set():
                texts.append(create(**ASKED).choices[0].text)

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(80):
            request = request_of(ASKED | {"max_tokens": 200, "n": 4, "stream": draw.random() < 0.7, "logprobs": 1})
            with server.connect() as connection:
                connection.sendall(request[: draw.choice([draw.randrange(len(request)), len(request)])])
                for _ in range(draw.randrange(3)):
                    connection.settimeout(draw.choice([0.01, 0.1]))
                    with suppress(TimeoutError, ConnectionError):
                        connection.recv(draw.choice([1, 1 << 16]))
                if draw.random() < 0.5:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        done.set()
        asking.join()
        assert set(texts) == {expected}
        until(lambda: not server.metric("terse_running_texts") and not server.metric("terse_waiting_requests"))
        until(lambda: server.connections == 0)
        assert 'status="500"' not in server.get("/metrics")


def test_more_requests_than_connections_are_refused_and_counted(server: ServerProcess) -> None:
    """Each takes its time to send its body; who is refused is told so in OpenAI's form."""
    with ExitStack() as stack:

        def begin() -> socket.socket:
            connection = stack.enter_context(server.connect())
            connection.sendall(HEAD.encode() + b"Content-Length: 100\r\n\r\n")
            return connection

        for _ in range(MAX_CONNECTIONS):
            begin()
        # Of those that came at once, some may have made room before their headers were read; so a few more may fit.
        until(lambda: b'"code": "too_many"' in all_that_comes(begin()))
    until(lambda: server.connections == 0)
    assert server.metric("terse_requests_total", status="503") >= 1


def all_that_comes(connection: socket.socket) -> bytes:
    """Within a moment, or until the connection ends."""
    answer = b""
    connection.settimeout(0.5)
    with suppress(TimeoutError, ConnectionError):
        while more := connection.recv(1 << 16):
            answer += more
    return answer
