"""Small models that were really trained, shared by all tests of the server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runs import DENSE, PAIRS_FILE, SPARSE, SPARSE_SEQ2SEQ, make_recipe, write_pairs, write_text
from served import CONTEXT, ServerProcess
from terseformer.checkpoint import save_model
from terseformer.config import DenseFeedForwardConfig
from terseformer.engine import Engine
from terseformer.folder import find
from terseformer.model import CausalLM
from terseformer.training import train


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two runs: `small`, a language model, and `pairs`, an encoder-decoder."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSE_CACHE", str(folder / "cache"))
        text = write_text(folder / "text.jsonl")
        write_pairs(folder / PAIRS_FILE)
        decoder = replace(SPARSE, max_position_embeddings=CONTEXT)
        train(make_recipe(text, decoder, steps=30), folder / "small", quiet=True)
        train(make_recipe(text, SPARSE_SEQ2SEQ, steps=4), folder / "pairs", quiet=True)
        yield folder


@pytest.fixture(scope="session")
def slow(runs: Path) -> Path:
    """A model that takes some milliseconds for a token, and without a temperature never ends by itself."""
    folder = runs / "slow"
    wide = DenseFeedForwardConfig(intermediate_size=2048)
    changes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "feed_forward": wide}
    torch.manual_seed(0)
    model = CausalLM(replace(DENSE, max_position_embeddings=2048, **changes))
    save_model(folder, model.eval())
    shutil.copyfile(find(runs / "small") / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def engine(runs: Path) -> Engine:
    """The language model, for what the server must say."""
    return Engine.from_pretrained(runs / "small", threads=1)


@pytest.fixture(scope="session")
def server(runs: Path) -> Iterator[ServerProcess]:
    """A server of both models, with defaults."""
    with ServerProcess(runs / "small", runs / "pairs") as server:
        yield server
