"""A server that is killed in the midst of its work leaves a prefix cache that is right, or as good as none."""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from openai import APIConnectionError

from served import PROMPT, ServerProcess, until

WORDS = PROMPT.split()


def prompts() -> list[str]:
    """Prompts that begin alike."""
    draw = random.Random(0)
    begun = [" ".join(draw.choices(WORDS, k=8)) for _ in range(3)]
    return [f"{draw.choice(begun)} {' '.join(draw.choices(WORDS, k=6))}" for _ in range(24)]


def texts(server: ServerProcess) -> list[str]:
    """What follows each prompt, asked for by four clients."""

    with server.client() as client, ThreadPoolExecutor(4) as pool:

        def text(prompt: str) -> str:
            return client.completions.create(model="small", prompt=prompt, max_tokens=20, seed=7).choices[0].text

        return list(pool.map(text, prompts()))


def damage(folder: Path, draw: random.Random) -> None:
    """What a full disk or a lost page may leave of some files."""
    files = sorted(folder.rglob("*.safetensors"))
    for path in draw.sample(files, len(files) // 3):
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(draw.choice([b"", data[:place], data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]]))
    for path in draw.sample(files, 2):
        path.with_name(f".{path.name}.1").write_bytes(path.read_bytes()[:100])
        path.with_name(path.name.replace("-", "-0")).write_bytes(path.read_bytes())
    files[0].with_name("5-" + "0" * 32 + ".safetensors").mkdir()


@pytest.mark.slow
def test_a_killed_servers_cache_is_never_wrong(runs: Path, tmp_path: Path) -> None:
    with ServerProcess(runs / "small", "--cache-memory", 0) as server:
        expected = texts(server)
    folder = tmp_path / "prefixes"
    for moment in (1, 12):
        with ServerProcess(runs / "small", cache=tmp_path) as server, ThreadPoolExecutor() as pool:
            asked = pool.submit(lambda server=server: texts(server) == expected)
            until(lambda moment=moment: len(list(folder.rglob("*.safetensors"))) >= moment)
            server.stop(signal.SIGKILL)
            with suppress(APIConnectionError):
                assert asked.result()
    for damaged in (False, True):
        if damaged:
            damage(folder, random.Random(0))
        with ServerProcess(runs / "small", cache=tmp_path) as server:
            assert texts(server) == expected
            assert server.metric("terse_cached_tokens_total") > 0
            server.stop(signal.SIGKILL)
