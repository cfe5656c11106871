"""The native engine's encoder-decoders against the PyTorch path, for every variant, type, instruction set and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close

from engines import TOLERANCE, check_logits, draw_tokens, make_engine, pack_model
from quantised import rounded
from runs import DENSE
from terseformer import generation, native
from terseformer.config import LocalPatternConfig, LSHPatternConfig, MixedPatternConfig, Seq2SeqConfig
from terseformer.data import end_of_text_id, train_tokenizer
from terseformer.engine import MAX_ROWS, MAX_RUNS, Engine
from terseformer.layout import DTYPES, Dtype
from terseformer.models import AnyModel
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.session import Session
from terseformer.tensorfile import TensorFileError
from terseformer.text import source_ids
from variants import DISTINCT_ENCODER_DECODERS, ENCODER_DECODERS, make_model

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=200)


@torch.inference_mode()
def torch_logits(model: AnyModel, source: list[int], target: list[int]) -> np.ndarray:
    return model(torch.tensor([source]), torch.tensor([target]), torch.tensor([len(source)]))[0].numpy()


def read_in_parts(engine: Engine, tokens: list[int], sizes: list[int], session: Session) -> np.ndarray:
    parts = []
    for size in sizes:
        parts.append(engine.logits(tokens[:size], session))
        tokens = tokens[size:]
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_parity_of_logits(name: str, dtype: Dtype, tmp_path: Path) -> None:
    """Whole, token by token and in uneven chunks; one thread and two; memory that was never written is NaN."""
    config = ENCODER_DECODERS[name]
    model = make_model(config)
    source, target = draw_tokens(config, 9, seed=1), draw_tokens(config, config.max_position_embeddings)
    packed = pack_model(model, tmp_path / "packed", dtype)
    model.load_state_dict(rounded(model.state_dict(), dtype))
    expected = torch_logits(model, source, target)
    for threads in (1, 2):
        engine = Engine(packed, threads=threads, poison=True)
        for sizes in ([len(target)], [1] * len(target), [3, 1, 4, len(target) - 8]):
            session = engine.new_session(source=source)
            check_logits(read_in_parts(engine, target, sizes, session), expected, config, dtype)


@pytest.mark.parametrize("name", DISTINCT_ENCODER_DECODERS)
def test_parity_of_a_source_in_pieces(name: str, tmp_path: Path) -> None:
    """Two sources and a text by turns, a step each; all are read as they are alone."""
    model = make_model(replace(DISTINCT_ENCODER_DECODERS[name], max_position_embeddings=2 * MAX_ROWS + 5))
    engine = make_engine(model, tmp_path)
    sources = [draw_tokens(model.config, length, seed=length) for length in (3, 2 * MAX_ROWS + 5, MAX_ROWS + 1)]
    text = draw_tokens(model.config, 40)
    alone = [engine.logits(text, engine.new_session(source=source)) for source in sources]
    written = engine.new_session(source=sources[0])
    sessions = [engine.new_session(source=source, in_pieces=True) for source in sources[1:]]
    with pytest.raises(GenerationError, match="waits for its source"):
        engine.read(sessions[0], [1])
    waiting, rows = list(sessions), []
    while waiting:
        waiting = [session for session in waiting if not engine.read_source(session, 0.0)]
        if len(rows) < len(text):
            rows.append(engine.logits(text[len(rows) : len(rows) + 1], written)[0])
    assert len(rows) > 10
    assert_close(np.stack(rows), alone[0][: len(rows)], **TOLERANCE)
    for session, expected in zip(sessions, alone[1:], strict=True):
        assert engine.read_source(session)
        assert_close(engine.logits(text, session), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DISTINCT_ENCODER_DECODERS)
@pytest.mark.parametrize("length", [1, 2 * MAX_ROWS + 5])
def test_parity_of_short_and_long_sources(name: str, length: int, tmp_path: Path) -> None:
    """One token, and more than pass through the model together."""
    model = make_model(replace(DISTINCT_ENCODER_DECODERS[name], max_position_embeddings=2 * MAX_ROWS + 5))
    source, target = draw_tokens(model.config, length, seed=1), draw_tokens(model.config, 2 * MAX_ROWS + 5)
    engine = make_engine(model, tmp_path)
    logits = engine.logits(target, engine.new_session(source=source))
    assert_close(logits, torch_logits(model, source, target), **TOLERANCE)


@pytest.mark.parametrize("kind", ["seq2seq", "terraformer"])
@pytest.mark.parametrize("length", [1, 16, 17, 300])
@pytest.mark.parametrize(
    "pattern",
    [
        LSHPatternConfig(chunk_length=16, chunks_after=1),
        LSHPatternConfig(chunk_length=7, chunks_before=0, num_hashes=3, num_buckets=150),  # two factors
        MixedPatternConfig(chunk_length=16, exact_length=16),
        LocalPatternConfig(chunk_length=20, chunks_after=2),
    ],
    ids=lambda pattern: pattern.kind,
)
def test_parity_of_patterns_in_encoders(
    pattern: LSHPatternConfig | MixedPatternConfig | LocalPatternConfig, length: int, kind: str, tmp_path: Path
) -> None:
    config = ENCODER_DECODERS[{"seq2seq": "seq2seq-scaling", "terraformer": "terraformer-scaling"}[kind]]
    model = make_model(replace(config, encoder_attention_pattern=pattern, max_position_embeddings=300))
    source, target = draw_tokens(model.config, length, seed=1), draw_tokens(model.config, 5)
    engine = make_engine(model, tmp_path)
    logits = engine.logits(target, engine.new_session(source=source))
    assert_close(logits, torch_logits(model, source, target), **TOLERANCE)


@pytest.mark.parametrize("name", DISTINCT_ENCODER_DECODERS)
def test_parity_of_greedy_texts(name: str, tmp_path: Path) -> None:
    """Of several sources of different lengths together, as of each alone and as PyTorch gives them."""
    model = make_model(replace(DISTINCT_ENCODER_DECODERS[name], max_position_embeddings=100))
    engine = make_engine(model, tmp_path)
    sources = [draw_tokens(model.config, count, seed=count) for count in (1, 2, 7, 40, 3, 5, 9, 80)]
    assert len(sources) == MAX_RUNS
    expected = [[] for _ in sources]
    for step in generation.generate_tokens(model, sources, GREEDY):
        for drawn in step:
            expected[drawn.row].append(drawn.token)
    assert {len(text) for text in expected} == {100}
    writers = [engine.start(engine.new_session(source=source), [0], GREEDY) for source in sources]
    assert engine.write(writers) == expected
    for source, text in zip(sources, expected, strict=True):
        alone = engine.start(engine.new_session(source=source), [0], GREEDY)
        assert engine.write([alone]) == [text]
        assert alone.finish == "length"


@pytest.mark.parametrize("name", DISTINCT_ENCODER_DECODERS)
def test_forks_and_saved_sessions_remember_everything(name: str, tmp_path: Path) -> None:
    model = make_model(DISTINCT_ENCODER_DECODERS[name])
    engine = make_engine(model, tmp_path)
    source, target = draw_tokens(model.config, 7, seed=1), draw_tokens(model.config, 11)
    expected = torch_logits(model, source, target)
    fresh = engine.new_session(source=source).fork()
    assert_close(engine.logits(target, fresh), expected, **TOLERANCE)
    session = engine.new_session(source=source)
    engine.read(session, target[:6])
    session.save(tmp_path / "session")
    for copy in (session.fork(), engine.load_session(tmp_path / "session")):
        assert (copy.source, copy.tokens) == (tuple(source), target[:6])
        assert_close(engine.logits(target[6:], copy), expected[6:], **TOLERANCE)
        assert copy.length == 11
    assert session.length == 6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, über die Brücke 🙂\n" * 5], 300)


def make_speaker(name: str, tokenizer: Tokenizer, path: Path, **changes) -> tuple[AnyModel, Engine]:
    """A model that writes nonsense in whole characters, with its engine."""
    changes |= {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 60}
    model = make_model(replace(DISTINCT_ENCODER_DECODERS[name], **changes))
    return model, Engine(pack_model(model, path / "packed"), tokenizer, threads=2, poison=True)


@pytest.mark.parametrize("name", ["seq2seq-encoder_dense", "terraformer-merged-swap_twice-3"])
@pytest.mark.parametrize("pad_token_id", [0, 5])
def test_texts_are_those_of_the_pytorch_path(
    name: str, pad_token_id: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, engine = make_speaker(name, tokenizer, tmp_path, pad_token_id=pad_token_id)
    sources = ["the cat", "über die Brücke 🙂", "sat on " * 5, *(f"the cat {i}" for i in range(MAX_RUNS))]
    for sampling in (
        SamplingConfig(temperature=0.0, max_new_tokens=40),
        SamplingConfig(temperature=0.0, repetition_penalty=1.5),
    ):
        expected = generation.generate(model, tokenizer, sources, sampling)
        assert engine.generate(sources, sampling) == expected
        assert "".join(engine.stream(sources[0], sampling)) == expected[0].text
        assert "".join(generation.stream(model, tokenizer, sources[0], sampling)) == expected[0].text
    assert expected[0].prompt_tokens == len(source_ids(tokenizer, sources[0], pad_token_id))
    assert {len(text.token_ids) for text in expected if text.finish_reason == "length"} <= {60}
    stopping = SamplingConfig(temperature=0.0, stop=(expected[0].text[5:8],))
    assert engine.generate(sources[:1], stopping) == generation.generate(model, tokenizer, sources[:1], stopping)


def test_draws_depend_on_the_seed_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, engine = make_speaker("seq2seq-encoder_local_convolution", tokenizer, tmp_path)
    sampling = SamplingConfig(max_new_tokens=20, seed=5)
    (alone,) = engine.generate("the cat", sampling)
    assert engine.generate(["sat", "the cat", "mat"], sampling, seeds=[1, 5, 2])[1] == alone
    assert engine.generate("the cat", replace(sampling, seed=6)) != [alone]


def test_a_source_ends_with_the_end_of_text_unless_that_pads(tokenizer: Tokenizer) -> None:
    end = end_of_text_id(tokenizer)
    ids = tokenizer.encode("the cat").ids
    assert source_ids(tokenizer, "the cat", end) == ids
    assert source_ids(tokenizer, "the cat", 7) == [*ids, end]


@pytest.mark.parametrize("name", ["seq2seq-encoder_dense", "terraformer-merged-swap_twice-3"])
def test_what_does_not_fit(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, engine = make_speaker(name, tokenizer, tmp_path)
    size = model.config.vocab_size
    for source, message in (
        ([], "the source has no tokens"),
        ([1] * 61, "the source has 61 tokens, more than fit in the model's context of 60"),
        ([1, size], f"the source has the token {size}, but the model knows 0 to {size - 1}"),
        ([-1], "the source has the token -1"),
        (None, "the model makes a text of a source"),
    ):
        with pytest.raises(GenerationError, match=message):
            engine.new_session(source=source)
        if source is not None:
            with pytest.raises(GenerationError, match=message):
                generation.generate_tokens(model, [[1], source])
    for text, message in (("", "has no tokens"), ("the cat " * 40, "more than fit in the model's context of 60")):
        for call in (
            lambda text=text: engine.generate(["the cat", text]),
            lambda text=text: engine.stream(text),
            lambda text=text: generation.generate(model, tokenizer, ["the cat", text]),
        ):
            with pytest.raises(GenerationError, match=message):
                call()
    with pytest.raises(GenerationError, match="makes a text of a source"):
        engine.logits([0])
    session = engine.new_session(4, source=[1, 2])
    with pytest.raises(GenerationError, match="5 more tokens do not fit the session"):
        engine.read(session, [0] * 5)
    with pytest.raises(GenerationError, match="leave the session out"):
        engine.stream("the cat", session=session)
    session.save(tmp_path / "session")
    for other in (make_model(DENSE), make_model(replace(ENCODER_DECODERS["seq2seq-deep_encoder"]))):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises((TensorFileError, GenerationError), match="no session of this model|without a source"):
            make_engine(other, tmp_path / "other").load_session(tmp_path / "session")
    language_model = make_engine(make_model(DENSE), tmp_path)
    with pytest.raises(GenerationError, match="causal language model, without a source"):
        language_model.new_session(source=[1])


def test_a_session_whose_source_is_being_read_is_not_copied(tmp_path: Path) -> None:
    engine = make_engine(make_model(ENCODER_DECODERS["seq2seq-encoder_dense"]), tmp_path)
    session = engine.new_session(source=[1, 2, 3], in_pieces=True)
    for copy in (session.fork, lambda: session.save(tmp_path / "session")):
        with pytest.raises(GenerationError, match="source is not read to its end; call Engine.read_source first"):
            copy()
    assert engine.read_source(session)
    assert session.fork().length == 0


def test_a_session_reads_its_source_once_and_first(tmp_path: Path) -> None:
    """The compiled module's own checks, which Python's calls never meet."""
    config = ENCODER_DECODERS["seq2seq-encoder_dense"]
    engine = make_engine(make_model(config), tmp_path)
    assert isinstance(config, Seq2SeqConfig)
    state = native.Session(engine._model, 4, False, 3)
    one, three = np.ones(1, np.int32), np.ones(3, np.int32)
    with pytest.raises(ValueError, match="waits for its source"):
        engine._engine.read(state, one)
    with pytest.raises(ValueError, match="no room for a source of 1 tokens"):
        engine._engine.begin_source(state, one)
    with pytest.raises(ValueError, match="the token 21 at place 1"):
        engine._engine.begin_source(state, np.array([1, 21, 1], np.int32))
    reading, again = (engine._engine.begin_source(state, three) for _ in range(2))
    assert engine._engine.read_source(reading, 1.0)
    assert engine._engine.read_source(reading, 1.0)
    with pytest.raises(ValueError, match="has read its source another time"):
        engine._engine.read_source(again, 1.0)
    with pytest.raises(ValueError, match="no room for a source of 3 tokens"):
        engine._engine.begin_source(state, three)
    other = make_engine(make_model(config), tmp_path)
    reading = engine._engine.begin_source(native.Session(engine._model, 4, False, 3), three)
    with pytest.raises(ValueError, match="begun by another model"):
        other._engine.read_source(reading, 1.0)
    for rows, runs in ((0, 1), (1, 0), (2, 3)):
        with pytest.raises(ValueError, match="at least one run, and a row for each"):
            native.Engine(engine._model, 1, rows, runs, False)
    for length in (0, 12):
        with pytest.raises(ValueError, match=f"no session for a source of {length} tokens"):
            native.Session(engine._model, 4, False, length)
