"""What the load benchmarks share: a server in a process of its own, and clients that measure its answers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import psutil

from terseformer.folder import find, load_config
from terseformer.machine import commit, processor

MEGABYTE = 2**20


class Server:
    """`terse serve` of one checkpoint at a free port, until the block ends."""

    def __init__(self, checkpoint: Path, threads: int | None, *flags: object) -> None:
        command = [sys.executable, "-m", "terseformer", "serve", f"model={checkpoint}", "--port", "0", *map(str, flags)]
        command += ["--threads", str(threads)] if threads else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.greeting = self._process.stdout.readline().strip()
        found = re.search(r"http://\S+?:(\d+)", self.greeting)
        if not found:
            raise SystemExit("the server has not started")
        self.url, self.port = found[0], int(found[1])
        self._state = psutil.Process(self._process.pid)

    @property
    def memory(self) -> int:
        """Bytes in use."""
        return self._state.memory_info().rss

    @property
    def files(self) -> int:
        """Open files and connections."""
        return self._state.num_fds()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


@dataclass
class Answer:
    """What came of a request; times are in seconds."""

    status: int
    """0: the connection has failed."""
    text: str = ""
    tokens: int = 0
    whole: bool = False
    """Whether it came to its proper end."""
    first: float = 0.0
    """From sending the request to the first piece of text."""
    per_token: float | None = None
    """From the first piece to the last, over the tokens after the first piece, of which its share of the characters
    tells how many it had."""


async def stream(session: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    """The answer to a request, as a stream."""
    begin = time.perf_counter()
    pieces: list[tuple[float, str]] = []
    answer = Answer(0)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post("/v1/completions", json=body) as response:
            answer.status = response.status
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    pieces += [(time.perf_counter(), choice["text"]) for choice in event.get("choices", ())]
                    answer.tokens = (event.get("usage") or {}).get("completion_tokens", 0)
                answer.whole |= line == b"data: [DONE]\n" and answer.tokens > 0
    except (aiohttp.ClientError, TimeoutError):
        return answer
    if answer.whole and pieces:
        answer.text = "".join(text for _, text in pieces)
        answer.first = pieces[0][0] - begin
        rest = answer.tokens * (1 - len(pieces[0][1]) / max(1, len(answer.text)))
        answer.per_token = (pieces[-1][0] - pieces[0][0]) / rest if rest >= 1 else None
    return answer


async def plain(session: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    """The answer to a request, all at once."""
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                return Answer(response.status)
            done = await response.json()
            return Answer(200, done["choices"][0]["text"], done["usage"]["completion_tokens"], whole=True)
    except (aiohttp.ClientError, TimeoutError):
        return Answer(0)


async def metric(session: aiohttp.ClientSession, name: str, label: str = "") -> float:
    """The sum of one of the server's metrics over its labels, or over those in which something stands."""
    async with session.get("/metrics") as response:
        page = await response.text()
    found = re.findall(rf"^{name}(\{{.*?\}})? (\S+)$", page, re.MULTILINE)
    return sum(float(value) for labels, value in found if label in labels)


def connect(server: Server) -> aiohttp.ClientSession:
    """A client with as many connections as it needs."""
    return aiohttp.ClientSession(
        server.url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    )


def make_requests(checkpoint: Path, count: int, prompt_tokens: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests with prompts of random tokens; every other one takes the likeliest tokens, the rest are drawn by a seed.

    The likeliest tokens must be the same in any company. A draw may fall on the edge between two tokens, where the
    rounding decides, which changes with the number of texts that are written together.
    """
    draw, size = random.Random(0), load_config(find(checkpoint)).vocab_size
    return [
        {
            "model": "model",
            "prompt": [draw.randrange(1, size) for _ in range(prompt_tokens)],
            "max_tokens": max_tokens,
            "seed": seed,
            "temperature": seed % 2,
        }
        for seed in range(count)
    ]


def random_checkpoint(name: str, tokenizer: Path, folder: Path) -> Path:
    """A checkpoint of a preset with random weights, and another's tokenizer."""
    import torch

    from terseformer.checkpoint import save_model
    from terseformer.models import make_model
    from terseformer.presets import preset

    torch.manual_seed(0)
    save_model(folder, make_model(preset(name)).eval())
    shutil.copyfile(find(tokenizer) / "tokenizer.json", folder / "tokenizer.json")
    return folder


def origin(command: str, server: Server) -> str:
    """What a table was measured with."""
    engine = server.greeting.rpartition("(")[2].rstrip(")")
    return f"`{command}`, {processor()}, {os.cpu_count()} cores, commit {commit()}; engine: {engine}."


def percentiles(values: Sequence[float]) -> list[float]:
    """The 50th, 95th and 99th."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)]
