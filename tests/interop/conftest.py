"""Checkpoints of runs of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import MIXED, SPARSE_TERRAFORMER, make_recipe
from terseformer.training import train


@pytest.fixture(scope="module")
def folder(text: Path) -> Path:
    """Of a causal language model, sparse in all its parts."""
    return train(make_recipe(text, MIXED), text.with_name("run"), quiet=True)


@pytest.fixture(scope="module")
def seq2seq_folder(text: Path) -> Path:
    """Of an encoder-decoder."""
    return train(make_recipe(text, SPARSE_TERRAFORMER), text.with_name("seq2seq-run"), quiet=True)
