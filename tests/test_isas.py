"""The engine's parity with PyTorch on the instruction sets that this machine has and would not choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from terseformer import native
from variants import DISTINCT_ENCODER_DECODERS

TESTS = Path(__file__).parent
OTHER_ISAS = [isa for isa in native.supported_isas() if isa != native.isa()]
# What is left out are other ways to put the same layers together, and texts drawn of the same logits. The inner loops
# have a test of their own on every instruction set, `make test-kernels`.
_SOURCES = " or ".join(("lsh", "mixed", *DISTINCT_ENCODER_DECODERS))
WHICH = {
    "test_engine.py": "parity and not greedy and not attention-sparse-",
    "test_engine_sources.py": f"parity and not greedy and (not test_parity_of_logits or {_SOURCES})",
    "test_engine_trace.py": "parity",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isa", OTHER_ISAS)
@pytest.mark.parametrize("file", WHICH)
def test_parity(file: str, isa: str) -> None:
    """In processes of their own: the instruction set is chosen once in each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "-k", WHICH[file]]
    done = subprocess.run(command, env={**os.environ, "TERSE_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
