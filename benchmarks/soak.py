"""A server under mixed work and abuse for a long time: is anything lost or wrong, and does its memory grow?

python benchmarks/soak.py runs/demo/sparse                      # 30 minutes; writes its table into docs/reliability.md
python benchmarks/soak.py runs/demo/sparse --minutes 0.2 --print

Each client does one thing after another, drawn at random: it asks for a text, as a stream or whole, which must be the
one that it got alone; leaves at any point; reads slowly; or sends what is no request. The prefix cache is small, in
memory and on disk, so that it is full after a short while.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import aiohttp
import numpy as np
from document import replace_between
from serving import MEGABYTE, Answer, Server, connect, make_requests, metric, origin, plain, stream

FLAGS = ("--cache-memory", 16, "--cache-disk", 32, "--max-queue", 8, "--stall", 5)
PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 256, 64, 64
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WARM_UP = 0.2  # of the time
MALFORMED = (b"", b"{", b"[" * 10000, b'"text"', b"\xff\xfe", b'{"model": "model", "max_tokens": NaN}', b'{"model": 1}')
DEEDS = {"stream": 8, "whole": 6, "leave": 4, "slow": 1, "malformed": 2, "look": 1}
"""What a client does, and how often."""


@dataclass
class Soak:
    """A server's clients, and what they saw."""

    server: Server
    session: aiohttp.ClientSession
    requests: Sequence[tuple[dict[str, Any], str]]
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, bytes of memory, open files."""

    def take(self, answer: Answer, body: dict[str, Any], expected: str) -> None:
        """Counts what came of a request for a text."""
        if answer.status == 429:
            self.counts["refused"] += 1
        elif not answer.whole:
            self.counts["lost"] += 1
        else:
            otherwise = "drawn otherwise" if body["temperature"] else "wrong"
            self.counts["answered" if answer.text == expected else otherwise] += 1

    async def run(self, clients: int, seconds: float) -> None:
        """Lets all clients do something until the time is over, and the server come to rest."""
        end = time.monotonic() + seconds
        await asyncio.gather(self._watch(end), *(self._client(random.Random(seed), end) for seed in range(clients)))
        for _ in range(600):
            if not await metric(self.session, "terse_(?:running_texts|waiting_requests)"):
                return
            await asyncio.sleep(0.1)
        self.counts["never ended"] += 1

    async def _watch(self, end: float) -> None:
        begin = time.monotonic()
        while (now := time.monotonic()) < end:
            self.samples.append((now - begin, self.server.memory, self.server.files))
            print(f"{now - begin:7.0f} s, {self.samples[-1][1] / MEGABYTE:,.1f} MiB, {dict(self.counts)}", flush=True)
            await asyncio.sleep(min(10, max(0.1, (end - begin) / 50)))

    async def _client(self, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            (deed,) = draw.choices(list(DEEDS), list(DEEDS.values()))
            body, expected = draw.choice(self.requests)
            match deed:
                case "stream":
                    self.take(await stream(self.session, body), body, expected)
                case "whole":
                    self.take(await plain(self.session, body), body, expected)
                case "leave" | "slow":
                    with contextlib.suppress(OSError):
                        await self._raw(draw, body, slow=deed == "slow")
                    self.counts[deed] += 1
                case "malformed":
                    await self._malformed(draw.choice(MALFORMED))
                case "look":
                    await metric(self.session, "terse_requests_total")

    async def _raw(self, draw: random.Random, body: dict[str, Any], slow: bool) -> None:
        """Leaves before, within or after the request, or while the answer comes; or reads the answer slowly."""
        text = json.dumps(body | {"stream": draw.random() < 0.7, "n": 4, "logprobs": 5}).encode()
        request = f"{HEAD}Content-Length: {len(text)}\r\n\r\n".encode() + text
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, limit=1024)
        try:
            writer.write(request if slow or draw.random() < 0.6 else request[: draw.randrange(len(request))])
            await writer.drain()
            for _ in range(100 if slow else draw.randrange(20)):
                if not await asyncio.wait_for(reader.read(256), 1 if slow else draw.random()):
                    break
                await asyncio.sleep(0.05 if slow else 0)
        except asyncio.TimeoutError:
            pass
        finally:
            if draw.random() < 0.5:  # a reset in place of a proper end
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _malformed(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        async with self.session.post("/v1/completions", data=body, headers=headers) as response:
            await response.read()
            good = 400 <= response.status < 500
            self.counts["malformed, refused" if good else "malformed, not refused"] += 1


def table(soak: Soak, errors: float) -> str:
    """Markdown: what happened, and the server's memory."""
    seconds, memory, files = (np.array(column) for column in zip(*soak.samples, strict=True))
    warm = seconds >= WARM_UP * seconds[-1]
    slope = np.polyfit(seconds[warm] / 3600, memory[warm] / MEGABYTE, 1)[0]
    counts = soak.counts
    rows = {
        "minutes": f"{seconds[-1] / 60:.0f}",
        "texts answered as alone": f"{counts['answered']:,}",
        "drawn texts on which the rounding decided otherwise": f"{counts['drawn otherwise']}",
        "texts wrong, lost, never ended": f"{counts['wrong']}, {counts['lost']}, {counts['never ended']}",
        "requests refused because the queue was full": f"{counts['refused']:,}",
        "clients that left": f"{counts['leave']:,}",
        "clients that read slowly": f"{counts['slow']:,}",
        "malformed bodies: refused, taken": f"{counts['malformed, refused']:,}, {counts['malformed, not refused']}",
        "answers of status 500": f"{errors:.0f}",
        "memory at the beginning, MiB": f"{memory[0] / MEGABYTE:,.0f}",
        f"memory after {WARM_UP:.0%} of the time, MiB": f"{memory[warm][0] / MEGABYTE:,.0f}",
        "memory at the end, MiB": f"{memory[-1] / MEGABYTE:,.0f}",
        "growth after that, MiB an hour": f"{slope:,.1f}",
        "open files and connections: most, at rest": f"{files.max()}, {soak.server.files}",
    }
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())])


async def run(server: Server, checkpoint: Path, clients: int, seconds: float) -> tuple[Soak, str]:
    """The whole of it; with its table."""
    bodies = make_requests(checkpoint, PROMPTS, PROMPT_TOKENS, MAX_TOKENS)
    async with connect(server) as session:
        soak = Soak(server, session, [(body, (await plain(session, body)).text) for body in bodies])
        await soak.run(clients, seconds)
        errors = await metric(session, "terse_requests_total", 'status="500"')
    await asyncio.sleep(0.5)  # until all connections are closed
    return soak, table(soak, errors)


def main() -> None:
    """Runs it and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or run")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--print", action="store_true", help="leave the document alone")
    arguments = parser.parse_args()
    command = f"python benchmarks/soak.py {' '.join(sys.argv[1:])}"
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(arguments.checkpoint, arguments.threads, *FLAGS, "--cache-folder", folder) as server,
    ):
        soak, body = asyncio.run(run(server, arguments.checkpoint, arguments.clients, 60 * arguments.minutes))
        body = f"{origin(command, server)}\n\n{body}"
    print(body)
    if not arguments.print:
        replace_between("reliability.md", "soak", body)
    if any(soak.counts[what] for what in ("wrong", "lost", "never ended", "malformed, not refused")):
        raise SystemExit("something was lost or wrong")


if __name__ == "__main__":
    main()
