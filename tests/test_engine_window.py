"""Local attention in the native engine, whose sessions keep only what is still seen, against the PyTorch path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch.testing import assert_close

from engines import TOLERANCE, draw_tokens, make_engine
from terseformer.beam import beam_search
from terseformer.config import LocalPatternConfig, ModelConfig
from terseformer.engine import Engine
from terseformer.models import AnyModel
from terseformer.sampling import SamplingConfig
from terseformer.session import Session
from variants import DISTINCT, DISTINCT_ENCODER_DECODERS, make_model

LENGTH = 700
MODELS = {
    "decoder": DISTINCT["attention-sparse_5x4"],
    "with cross-attention": DISTINCT_ENCODER_DECODERS["seq2seq-scaling"],
    "with a prefix": DISTINCT_ENCODER_DECODERS["terraformer-scaling"],
}
WINDOWS = {
    "two chunks": LocalPatternConfig(chunk_length=20),
    "one chunk": LocalPatternConfig(chunk_length=7, chunks_before=0),
    "whole panels": LocalPatternConfig(chunk_length=16, chunks_before=3),
    "more than there is": LocalPatternConfig(chunk_length=1000),
}


def windowed(name: str, window: str, folder: Path) -> tuple[AnyModel, Engine, list[int] | None]:
    """A model, its engine and a source that is much longer than the window."""
    model = make_model(replace(MODELS[name], attention_pattern=WINDOWS[window], max_position_embeddings=LENGTH))
    source = None if isinstance(model.config, ModelConfig) else draw_tokens(model.config, 611, seed=1)
    return model, make_engine(model, folder), source


@torch.inference_mode()
def torch_logits(model: AnyModel, source: list[int] | None, target: list[int]) -> np.ndarray:
    if source is None:
        return model(torch.tensor([target]))[0].numpy()
    return model(torch.tensor([source]), torch.tensor([target]), torch.tensor([len(source)]))[0].numpy()


def new_session(engine: Engine, source: list[int] | None) -> Session:
    return engine.new_session() if source is None else engine.new_session(source=source)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MODELS)
def test_parity_of_long_texts(name: str, window: str, tmp_path: Path) -> None:
    """In blocks and one by one; memory that was never written is NaN."""
    model, engine, source = windowed(name, window, tmp_path)
    target = draw_tokens(model.config, LENGTH)
    session, parts, begin = new_session(engine, source), [], 0
    for size in (250, *[1] * 100, 3, 347):
        parts.append(engine.logits(target[begin : begin + size], session))
        begin += size
    assert_close(np.concatenate(parts), torch_logits(model, source, target), **TOLERANCE)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MODELS)
def test_forks_and_saved_sessions_go_on(name: str, window: str, tmp_path: Path) -> None:
    model, engine, source = windowed(name, window, tmp_path)
    target = draw_tokens(model.config, LENGTH)
    expected = torch_logits(model, source, target)
    session = new_session(engine, source)
    for begin, end in ((0, 5), (5, 333), (333, 600)):
        engine.read(session, target[begin:end])
        session.save(tmp_path / "session")
        for copy in (session.fork(), engine.load_session(tmp_path / "session")):
            assert_close(engine.logits(target[end:], copy), expected[end:], **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_does_not_grow(name: str, tmp_path: Path) -> None:
    """Of 336 and of 672 tokens, which stand at the same place of a chunk."""
    model, engine, source = windowed(name, "whole panels", tmp_path)
    session = new_session(engine, source)
    sizes = []
    for _ in range(2):
        engine.read(session, draw_tokens(model.config, 336))
        sizes.append(len(session._state.save()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", MODELS)
def test_beams_find_the_same(name: str, tmp_path: Path) -> None:
    """Beams are forks that take over one another's keys and values, while their windows move on."""
    model, engine, source = windowed(name, "two chunks", tmp_path)
    prompt = draw_tokens(model.config, 300)
    search = SamplingConfig(num_beams=4, max_new_tokens=300, length_penalty=0.0)
    start = prompt if source is None else [model.config.pad_token_id]
    tokens, finish = engine.search(new_session(engine, source), start, search)
    expected = beam_search(model, source or prompt, search)
    assert finish == expected.finish_reason
    assert_array_equal(tokens, expected.tokens)
