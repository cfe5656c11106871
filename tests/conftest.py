"""What all tests share: checked shapes, few threads, fixed seeds, no network."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The tests' tensors are small: one thread is as fast as two, and results do not depend on the machine.
# Subprocesses inherit all of these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# `make sanitize` tests another build of the compiled module.
if native := os.environ.get("TERSE_TEST_NATIVE"):
    spec = importlib.util.spec_from_file_location("terseformer._native", native)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["terseformer._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["terseformer._native"])

# Before terseformer is imported, so that every annotation is checked when it is called.
install_import_hook("terseformer", "beartype.beartype")

# A busy machine fails no test; CI draws the same examples each time.
settings.register_profile("terseformer", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("terseformer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, for the sake of what they share; so do those of engines, whose threads spin."""
    for item in items:
        is_engine = item.path.name.startswith(("test_engine", "test_beam", "test_bench"))
        alone = item.name if item.path.stem == "test_isas" else item.path.stem  # its tests are minutes long
        item.add_marker(pytest.mark.xdist_group("engines" if is_engine else alone))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and among others."""
    random.seed(0)
    for name, seed in (("numpy", lambda m: m.random.seed(0)), ("torch", lambda m: m.manual_seed(0))):
        if name in sys.modules:
            seed(sys.modules[name])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small text with pairs beside it, and a cache of its own for what is made of them."""
    from runs import PAIRS_FILE, write_pairs, write_text

    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSE_CACHE", str(folder / "cache"))
        write_pairs(folder / PAIRS_FILE)
        yield write_text(folder / "text.jsonl")
