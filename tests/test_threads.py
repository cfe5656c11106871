"""How many threads: the environment, then what was remembered, then the cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from terseformer import native
from terseformer.config import ConfigError
from terseformer.threads import default_threads, remember, remembered


def test_the_environment_comes_first_then_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path))
    monkeypatch.delenv("TERSE_THREADS", raising=False)
    assert default_threads() == native.physical_cores()
    path = remember(7)
    assert default_threads() == 7
    monkeypatch.setenv("TERSE_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.delenv("TERSE_THREADS")
    for damaged in ("", "[]", '{"cores": 1}', path.read_text().replace("7", '"7"'), path.read_text().replace("7", "0")):
        path.write_text(damaged)
        assert remembered() is None
    remember(7)
    monkeypatch.setattr(native, "physical_cores", lambda: 99)
    assert remembered() is None


@pytest.mark.parametrize("value", ["many", "0", "1025", "-1"])
def test_nonsense_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSE_THREADS", value)
    with pytest.raises(ConfigError, match=r"TERSE_THREADS must be a number in \[1, 1024\]"):
        default_threads()
