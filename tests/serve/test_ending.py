"""A server that is stopped finishes what it does, or ends it in good order; and what keeps it from beginning."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import APIError

import terseformer
from served import PROMPT, ServerProcess
from terseformer import cli

LONG: dict[str, Any] = {"model": "slow", "prompt": "abc", "temperature": 0, "logprobs": 0}  # an event for each token


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_is_finished(how: int, slow: Path) -> None:
    with ServerProcess(slow, "--grace", 100) as server:
        stream = server.client().completions.create(stream=True, max_tokens=150, **LONG)
        next(stream)
        server.process.send_signal(how)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(300) in (-how, 0)


def test_what_takes_too_long_is_ended_in_good_order(slow: Path) -> None:
    with ServerProcess(slow, "--grace", 0.2) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
        body = json.dumps(LONG | {"stream": True, "max_tokens": 480, "n": 8})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()
        server.process.send_signal(signal.SIGTERM)
        events = response.read().decode().split("\n\n")  # to the end of a whole response
        connection.close()
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down"
        server.process.wait(300)


def test_a_request_that_waits_is_told(slow: Path) -> None:
    with ServerProcess(slow, "--grace", 0.2) as server:
        stream = server.client().completions.create(stream=True, max_tokens=480, n=8, **LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(APIError, match="shutting down"):
            list(stream)
        server.process.wait(300)


# What keeps it from beginning.


def test_mistakes_are_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        small = str(runs / "small")
        for args, message in (
            ([], "terse serve needs a checkpoint's or a run's folder"),
            (["nowhere"], "no checkpoint at nowhere"),
            ([small, small], "there are two models 'small'; give one of them another name: NAME="),
            ([small, "--port", port], f"there is no listening at 127.0.0.1, port {port}"),
            ([small, "--port", "70000"], "--port must lie in [0, 65535], not 70000"),
            ([small, "--max-queue", "0"], "max_queue must be at least 1, not 0"),
            ([small, "--cache-folder", __file__], "the prefix cache cannot be kept in"),
            ([small, "--prot", "1"], "no such flag: --prot; the nearest is --port"),
        ):
            monkeypatch.setattr(sys, "argv", ["terse", "serve", *args])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 2
            shown = capsys.readouterr()
            assert (shown.out, shown.err.count("\n")) == ("", 1)
            assert shown.err.startswith("terse: ")
            assert message in shown.err


@pytest.mark.parametrize(
    ("package", "extra", "flags"), [("fastapi", "serve", []), ("ray", "ray", ["--ray"])], ids=["serve", "ray"]
)
def test_without_the_extra_it_says_what_to_install(package: str, extra: str, flags: list[str], runs: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from terseformer.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(runs / "small"), *flags]
    environment = {"PYTHONPATH": str(Path(terseformer.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    verb = " ".join(["terse serve", *flags])
    assert done.stderr == (
        f"terse: {verb} needs the package {package}; install the extra: pip install 'terseformer[{extra}]'\n"
    )


def test_names_and_addresses(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "small", tmp_path / "a=b")
    with ServerProcess(f"first={runs / 'small'}", tmp_path / "a=b", "--host", "0.0.0.0") as server:
        assert "serving first, a=b at http://0.0.0.0:" in server.greeting
        assert "whoever reaches 0.0.0.0 may use this server" in server.errors()
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        for name in ("first", "a=b"):
            assert server.client().completions.create(model=name, prompt=PROMPT, max_tokens=2).model == name
        assert server.get("/health", Host="my.server") == "ok\n"
