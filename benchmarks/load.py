"""A server under load: throughput, time to the first token and time per token against the number of clients.

python benchmarks/load.py runs/demo/sparse                            # writes its table into docs/reliability.md
python benchmarks/load.py runs/demo/sparse --preset small-5m-ff16     # of that size, with random weights
python benchmarks/load.py runs/demo/sparse --clients 1 4 --seconds 2 --print

Every client sends its next request when the last one is answered. The server and all clients share this machine. Every
answer without a temperature must be the one that the same request got alone, and of drawn ones it is counted how many
are not; nothing is remembered between requests (`--cache-memory 0`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from document import replace_between
from serving import (
    MEGABYTE,
    Answer,
    Server,
    connect,
    make_requests,
    metric,
    origin,
    percentiles,
    plain,
    random_checkpoint,
    stream,
)

PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 32, 64, 128


@dataclass
class Level:
    """What so many clients got."""

    clients: int
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    lost: int = 0
    wrong: int = 0
    differ: int = 0
    memory: int = 0

    def take(self, answer: Answer, body: dict[str, Any], expected: str) -> None:
        """Counts an answer."""
        if answer.status == 429:
            self.refused += 1
        elif not answer.whole:
            self.lost += 1
        else:
            self.answers.append(answer)
            if answer.text != expected:
                self.differ += bool(body["temperature"])
                self.wrong += not body["temperature"]


async def measure(
    server: Server,
    session: aiohttp.ClientSession,
    requests: Sequence[tuple[dict[str, Any], str]],
    clients: int,
    seconds: float,
) -> Level:
    """So many clients for so long; what has begun by then is finished, and counted but in the throughput."""
    level = Level(clients)
    begin = time.perf_counter()
    before = await metric(session, "terse_completion_tokens_total")

    async def client(number: int) -> None:
        turn = number * len(requests) // clients
        while time.perf_counter() < begin + seconds:
            body, expected = requests[turn % len(requests)]
            level.take(await stream(session, body), body, expected)
            turn += 1

    async def clock() -> None:
        await asyncio.sleep(seconds)
        written = await metric(session, "terse_completion_tokens_total") - before
        level.seconds = time.perf_counter() - begin
        level.tokens_per_second = written / level.seconds

    await asyncio.gather(clock(), *(client(number) for number in range(clients)))
    level.memory = server.memory
    return level


async def measure_all(server: Server, checkpoint: Path, clients: Sequence[int], seconds: float) -> list[Level]:
    """Each level after the last."""
    bodies = make_requests(checkpoint, PROMPTS, PROMPT_TOKENS, MAX_TOKENS)
    async with connect(server) as session:
        requests = [(body, (await plain(session, body)).text) for body in bodies]
        levels = []
        for count in clients:
            levels.append(await measure(server, session, requests, count, seconds))
            print(row(levels[-1]), flush=True)
    return levels


def row(level: Level) -> str:
    """A row of the table."""
    if not level.answers:
        return f"| {level.clients} | no answer |"
    firsts = percentiles([answer.first for answer in level.answers])
    rates = percentiles([answer.per_token for answer in level.answers if answer.per_token is not None] or [0.0])
    cells = [
        level.clients,
        f"{level.tokens_per_second:,.0f}",
        " / ".join(f"{1e3 * value:,.0f}" for value in firsts),
        " / ".join(f"{1e3 * value:,.2f}" for value in rates),
        len(level.answers),
        level.refused,
        level.lost,
        level.wrong,
        level.differ,
        f"{level.memory / MEGABYTE:,.0f} MiB",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(levels: Sequence[Level]) -> str:
    """Markdown."""
    return "\n".join(
        [
            "| clients | tokens/s | first token, ms: p50 / p95 / p99 | per token, ms: p50 / p95 / p99 "
            "| answered | refused | lost | wrong | drawn otherwise | server's memory |",
            f"|{'---:|' * 10}",
            *map(row, levels),
        ]
    )


def main() -> None:
    """Measures every level and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or run")
    parser.add_argument("--preset", help="serve random weights of this size, with the checkpoint's tokenizer")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each level")
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--print", action="store_true", help="leave the document alone")
    arguments = parser.parse_args()
    command = f"python benchmarks/load.py {' '.join(sys.argv[1:])}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if arguments.preset:
            checkpoint = random_checkpoint(arguments.preset, checkpoint, Path(folder))
        with Server(checkpoint, arguments.threads, "--cache-memory", 0) as server:
            levels = asyncio.run(measure_all(server, checkpoint, arguments.clients, arguments.seconds))
            body = f"{origin(command, server)}\n\n{table(levels)}"
    if not arguments.print:
        replace_between("reliability.md", arguments.preset or "load", body)
    if any(level.lost or level.wrong or not level.answers for level in levels):
        raise SystemExit("answers were lost or wrong")


if __name__ == "__main__":
    main()
