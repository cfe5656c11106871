"""The engine's parity with PyTorch on the instruction sets that this machine has and would not choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from terseformer import native

TESTS = Path(__file__).parent
OTHER_ISAS = [isa for isa in native.supported_isas() if isa != native.isa()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isa", OTHER_ISAS)
@pytest.mark.parametrize("file", ["test_engine.py", "test_engine_sources.py", "test_engine_trace.py"])
def test_parity(file: str, isa: str) -> None:
    """In processes of their own: the instruction set is chosen once in each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "-k", "parity"]
    done = subprocess.run(command, env={**os.environ, "TERSE_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
