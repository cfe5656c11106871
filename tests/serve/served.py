"""Real servers in processes of their own, and clients for them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil
from openai import OpenAI

CONTEXT = 256
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PROMPT = "abc def ghi jab cde fgh ija bcd efg hij abc def"


def until(condition: Callable[[], bool]) -> None:
    """Waits until something is true."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it has not come true")


def request_of(body: dict[str, Any]) -> bytes:
    """A completion's request as it is sent."""
    text = json.dumps(body)
    return f"{HEAD}Content-Length: {len(text)}\r\n\r\n{text}".encode()


class ServerProcess:
    """`terse serve` at a free port, until the block ends."""

    def __init__(self, *args: object, cache: Path | None = None, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        source = str(Path(__file__).parents[2] / "src")
        cached = () if cache else ("--cache-disk", "0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "terseformer", "serve", *map(str, args), *cached, "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": source} | ({"TERSE_CACHE": str(cache)} if cache else {}) | environment,
        )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", self.greeting)
        assert found, self.errors()
        self.url = found[0]

    def client(self, key: str = "none", **more: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300, **more)

    def get(self, path: str, **headers: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=300) as response:
            return response.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over its labels, or those that are not given."""
        lines = re.findall(rf"^{name}(\{{.*?\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in lines if all(text in found for text in wanted))

    @property
    def connections(self) -> int:
        """Connections that the server holds open."""
        held = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(connection.status != psutil.CONN_LISTEN for connection in held)

    def connect(self) -> socket.socket:
        """A bare connection."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), 60)

    def errors(self) -> str:
        """What the server has written to its standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(300)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()
        errors = self.errors()
        self._errors.close()
        if error is None:
            assert "Traceback" not in errors, errors
        elif errors:
            print(errors)
