"""Real servers in processes of their own, and clients for them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import OpenAI

CONTEXT = 256
PROMPT = "abc def ghi jab cde fgh ija bcd efg hij abc def"


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

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = re.findall(rf"^{name}(?:\{{.*?\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, lines))

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
