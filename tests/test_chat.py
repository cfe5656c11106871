"""Turns in a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from quantised import as_numpy
from runs import SPARSE
from terseformer.chat import chat
from terseformer.data import train_tokenizer
from terseformer.engine import Engine
from terseformer.pack import load_packed, write_packed
from terseformer.sampling import SamplingConfig
from variants import make_model


def test_turns_go_on_and_a_full_context_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat\n" * 5], 300)
    model = make_model(replace(SPARSE, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=48))
    write_packed(tmp_path / "packed", model.config, "f32", as_numpy(model.state_dict()))
    engine = Engine(load_packed(tmp_path / "packed"), tokenizer, threads=1)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=8)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\non\n" + "the mat\n" * 4 + "\nnever read\n"))
    chat(engine, sampling)
    text = capsys.readouterr().out
    assert text.count("> ") == 7
    assert "(the context is full: a new one begins)" in text
    stopping = replace(sampling, stop=("\n",))
    session = engine.new_session()
    turns = ["".join(engine.stream(line, stopping, session)) for line in ("the cat", "on")]
    assert text.startswith(f"> {turns[0]}\n> {turns[1]}\n> ")
