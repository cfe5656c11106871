"""Turns between a person and a model in a terminal."""

from __future__ import annotations

from dataclasses import replace

from terseformer.config import ModelConfig
from terseformer.engine import Engine
from terseformer.sampling import GenerationError, SamplingConfig


def chat(engine: Engine, sampling: SamplingConfig) -> None:
    """The model continues the text so far, the person's last line included, up to the end of a line.

    The session remembers the text, so that each turn reads only what is new. Where the context has no room for another
    turn, a new one begins. An empty line, or the end of the input, ends.

    Args:
        engine: one with a tokenizer.
        sampling: holds for each turn.

    Raises:
        GenerationError: it is an encoder-decoder's.
    """
    if not isinstance(engine.config, ModelConfig):
        raise GenerationError(
            f"a model of kind {engine.config.kind!r} makes a text of a source and takes no turns; use terse generate"
        )
    sampling = replace(sampling, stop=(*sampling.stop, "\n"))
    session = engine.new_session()
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        if (
            session.tokens and session.room <= len(line.encode()) + sampling.max_new_tokens
        ):  # a token has a byte or more
            print("(the context is full: a new one begins)")
            session = engine.new_session()
        for piece in engine.stream(line, sampling, session):
            print(piece, end="", flush=True)
        print()
