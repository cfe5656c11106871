"""Runs the engine's tests on a build with sanitizers: python tests/sanitize.py MODULE SANITIZERS [pytest's arguments].

The sanitizer's library must be there before Python starts, so that this starts another Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FILES = (
    "test_beam.py",
    "test_engine.py",
    "test_engine_sources.py",
    "test_engine_window.py",
    "test_engine_trace.py",
    "test_native.py",
    "test_native_sampler.py",
    "test_chat.py",
)


def main() -> None:
    """Exits with pytest's status."""
    module, sanitizers, *arguments = sys.argv[1:]
    library = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizers.split(",")[0]]
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in (library, "libstdc++.so")
    ]
    tests = Path(__file__).parent
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has
        "TERSE_TEST_NATIVE": str(Path(module).resolve()),
        "TOKENIZERS_PARALLELISM": "false",  # its threads were not built with the sanitizer, which misunderstands them
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    left_out = "not memory_flat and not forked"
    command += ["-k", left_out, *(str(tests / name) for name in FILES)]
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
