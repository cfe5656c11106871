"""The keystone: the native engine against the PyTorch path, for every variant, type, instruction set and batch."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close

from engines import TOLERANCE, check_logits, draw_tokens, make_engine, pack_model
from quantised import rounded
from runs import DENSE, SPARSE
from terseformer import generation, native
from terseformer.config import ConfigError, ModelConfig, SRUConfig
from terseformer.data import train_tokenizer
from terseformer.engine import MAX_ROWS, MAX_RUNS, Engine
from terseformer.layout import DTYPES, Dtype
from terseformer.model import CausalLM
from terseformer.pack import Packed
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.session import Session
from terseformer.tensorfile import TensorFileError
from variants import DISTINCT, VARIANTS, make_model


@torch.inference_mode()
def torch_logits(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_parity_of_logits(name: str, dtype: Dtype, tmp_path: Path) -> None:
    """Whole, token by token and in uneven chunks; one thread and two; memory that was never written is NaN."""
    config = VARIANTS[name]
    model = make_model(config)
    tokens = draw_tokens(config, config.max_position_embeddings)
    packed = pack_model(model, tmp_path / "packed", dtype)
    model.load_state_dict(rounded(model.state_dict(), dtype))
    expected = torch_logits(model, tokens).numpy()
    for threads in (1, 2):
        engine = Engine(packed, threads=threads, poison=True)
        check_logits(engine.logits(tokens), expected, config, dtype)
        for sizes in ([1] * len(tokens), [3, 1, 4, len(tokens) - 8]):
            session = engine.new_session()
            parts, rest = [], tokens
            for size in sizes:
                parts.append(engine.logits(rest[:size], session))
                rest = rest[size:]
            check_logits(np.concatenate(parts), expected, config, dtype)
            assert_close(session.logits, parts[-1][-1], **TOLERANCE)


def wide(config: ModelConfig) -> ModelConfig:
    """The same with room for long texts."""
    return replace(config, max_position_embeddings=300)


@pytest.mark.parametrize("name", DISTINCT)
def test_parity_of_greedy_texts(name: str, tmp_path: Path) -> None:
    """200 tokens, several prompts of different lengths together, as each has alone and as PyTorch gives them."""
    model = make_model(wide(DISTINCT[name]))
    engine = make_engine(model, tmp_path)
    prompts = [draw_tokens(model.config, count, seed=count) for count in (1, 2, 7, 40, 3, 5, 9, 80)]
    assert len(prompts) == MAX_RUNS
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=200)
    expected = [[] for _ in prompts]
    for step in generation.generate_tokens(model, prompts, greedy):
        for drawn in step:
            expected[drawn.row].append(drawn.token)
    sessions = [engine.new_session() for _ in prompts]
    writers = [engine.start(s, p, greedy, 0) for s, p in zip(sessions, prompts, strict=True)]
    assert engine.write(writers) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        alone = engine.start(engine.new_session(), prompt, greedy, 0)
        assert engine.write([alone]) == [text]
        assert alone.finish == "length"


def test_parity_of_a_long_prompt(tmp_path: Path) -> None:
    """More tokens than pass through the model together."""
    model = make_model(replace(DISTINCT["whole-scaling_sru_rotary_rms"], max_position_embeddings=3 * MAX_ROWS))
    engine = make_engine(model, tmp_path)
    tokens = draw_tokens(model.config, 2 * MAX_ROWS + 5)
    assert_close(engine.logits(tokens), torch_logits(model, tokens).numpy(), **TOLERANCE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, über die Brücke 🙂\n" * 5], 300)


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLM, Engine]:
    """A model that writes nonsense in whole characters, with its engine."""
    config = replace(SPARSE, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=96)
    model = make_model(config)
    packed = pack_model(model, tmp_path_factory.mktemp("speaker") / "packed")
    return model, Engine(packed, tokenizer, threads=2, poison=True)


def test_texts_are_those_of_the_pytorch_path(speaker, tokenizer: Tokenizer) -> None:
    model, engine = speaker
    prompts = ["the cat", "", "über die Brücke 🙂", "sat on " * 5]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=40)
    expected = generation.generate(model, tokenizer, prompts, greedy)
    assert engine.generate(prompts, greedy) == expected
    pieces = engine.stream(prompts[0], greedy)
    assert "".join(pieces) == expected[0].text
    stop = expected[0].text[5:8]
    stopping = replace(greedy, stop=(stop,))
    (first, *_) = generation.generate(model, tokenizer, prompts, stopping)
    assert first.finish_reason == "stop"
    assert engine.generate(prompts[0], stopping) == [first]
    assert "".join(engine.stream(prompts[0], stopping)) == first.text


def test_stop_strings_of_a_tokenizer_whose_bytes_depend_on_the_tokens_around(speaker, tokenizer: Tokenizer) -> None:
    _, engine = speaker
    other = Engine(Packed(engine.config, "f32", engine._packed.arrays), tokenizer, threads=1)
    other._token_bytes = None
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=40)
    stop = engine.generate("the cat", greedy)[0].text[5:8]
    sampling = replace(greedy, stop=(stop,))
    assert other.generate("the cat", sampling) == engine.generate("the cat", sampling)


def test_draws_depend_on_the_seed_alone(speaker) -> None:
    _, engine = speaker
    sampling = SamplingConfig(max_new_tokens=20, seed=5)
    (alone,) = engine.generate("the cat", sampling)
    together = engine.generate(["sat", "the cat", "mat"], sampling, seeds=[1, 5, 2])
    assert together[1] == alone
    assert engine.generate("the cat", replace(sampling, seed=6)) != [alone]
    assert engine.generate("the cat", sampling) == [alone]


def test_more_texts_than_are_written_together(speaker) -> None:
    _, engine = speaker
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=5)
    prompts = [f"the cat {i}" for i in range(MAX_RUNS + 3)]
    assert engine.generate(prompts, sampling) == [engine.generate(p, sampling)[0] for p in prompts]


def test_a_session_goes_on_is_forked_and_saved(speaker, tmp_path: Path) -> None:
    _, engine = speaker
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    session = engine.new_session()
    first = "".join(engine.stream("the cat", sampling, session))
    fork = session.fork()
    session.save(tmp_path / "session")
    loaded = engine.load_session(tmp_path / "session")
    assert loaded.tokens == session.tokens
    second = "".join(engine.stream(" sat", sampling, session))
    assert "".join(engine.stream(" sat", sampling, fork)) == second
    assert "".join(engine.stream(" sat", sampling, loaded)) == second
    whole = engine.new_session()
    engine.read(whole, session.tokens)
    assert_close(whole.logits, engine.logits(session.tokens)[-1], **TOLERANCE)
    assert first


@pytest.mark.parametrize("name", DISTINCT)
def test_forks_and_saved_sessions_remember_everything(name: str, tmp_path: Path) -> None:
    model = make_model(DISTINCT[name])
    engine = make_engine(model, tmp_path)
    tokens = draw_tokens(model.config, 11)
    expected = torch_logits(model, tokens).numpy()[6:]
    session = engine.new_session()
    engine.read(session, tokens[:6])
    session.save(tmp_path / "session")
    for copy in (session.fork(), engine.load_session(tmp_path / "session"), engine.restore(session.snapshot(), 11)):
        assert_close(engine.logits(tokens[6:], copy), expected, **TOLERANCE)
        assert copy.length == 11
    assert session.length == 6


def test_a_drawn_token_is_read_before_what_follows(speaker) -> None:
    _, engine = speaker
    drawn = engine.new_session()
    list(engine.stream("the cat", SamplingConfig(temperature=0.0, max_new_tokens=3), drawn))
    forced, text = drawn.fork(), [*drawn.tokens, 5, 6]
    with pytest.raises(GenerationError, match="the token -1"):
        engine.read(drawn, [-1])
    engine.read(drawn, [5, 6])
    whole = engine.logits(text)
    assert_close(drawn.logits, whole[-1], **TOLERANCE)
    assert_close(engine.logits([5, 6], forced), whole[-2:], **TOLERANCE)
    for session in (drawn, forced):
        assert (session.tokens, session.length) == (text, len(text))


def test_a_writer_draws_of_what_is_allowed(speaker) -> None:
    """Beside others that are free; without what is allowed, it draws what it would; the logits stay the model's."""
    _, engine = speaker
    sampling = SamplingConfig(max_new_tokens=12, top_p=0.9, repetition_penalty=1.3)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    expected = engine.write([engine.start(engine.new_session(), p, sampling, 3) for p in prompts])
    sessions = [engine.new_session() for _ in prompts]
    writers = [engine.start(s, p, sampling, 3) for s, p in zip(sessions, prompts, strict=True)]
    everything, few = np.ones(engine.config.vocab_size, bool), np.zeros(engine.config.vocab_size, bool)
    few[[20, 30, 40]] = True
    texts = [[], [], []]
    for step in range(12):
        writers[0].allow(everything)
        if step != 5:
            writers[2].allow(few)
        for text, tokens in zip(texts, engine.write(writers, steps=1), strict=True):
            text += tokens
    assert texts[:2] == expected[:2]
    assert len(set(texts[2]) - {texts[2][5]}) > 1
    assert {*texts[2][:5], *texts[2][6:]} <= {20, 30, 40}
    assert texts[2][5] not in (20, 30, 40)
    assert_close(sessions[2].logits, engine.logits(prompts[2] + texts[2][:-1])[-1], **TOLERANCE)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=4)
    writer = engine.start(engine.new_session(), [5], greedy)
    with pytest.raises(ValueError, match=f"the model has {len(few)} tokens, not 3"):
        writer.allow(few[:3])
    writer.allow(~everything)
    assert engine.write([writer]) == [[]]
    assert writer.finish == "not_finite"


def test_a_snapshot_leaves_out_what_was_drawn_and_not_read(speaker) -> None:
    _, engine = speaker
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=9)
    session = engine.new_session()
    writer = engine.start(session, [5, 6, 7], greedy)
    session.tokens += engine.write([writer], steps=4)[0]
    snapshot = session.snapshot()
    assert snapshot.tokens == tuple(session.tokens[:6])
    restored = engine.restore(snapshot)
    rest = engine.write([engine.start(restored, session.tokens[6:], greedy)], steps=5)[0]
    assert rest == engine.write([writer])[0]


def test_engines_share_weights_and_threads_share_an_engine(speaker) -> None:
    _, engine = speaker
    twin = Engine(engine._packed, engine.tokenizer, threads=1)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=30)
    (expected,) = engine.generate("the cat", sampling)
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda e=e: results.append(e.generate("the cat", sampling)[0].text))
        for e in (engine, twin, engine, twin)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected.text] * 4


def test_what_does_not_fit(speaker, tmp_path: Path) -> None:
    _, engine = speaker
    size = engine.config.vocab_size
    session = engine.new_session(4)
    for tokens, message in (
        ([size], rf"token {size} at place 0 is not in \[0, {size}\)"),
        ([0, -1], "token -1 at place 1"),
        ([2**40], "does not fit 32 bits"),
        ([1] * 5, "5 more tokens do not fit the session: it holds 0 of 4"),
    ):
        with pytest.raises(GenerationError, match=message):
            engine.read(session, tokens)
    assert session.length == 0
    with pytest.raises(GenerationError, match=r"no room in the session's context of 4 \(capacity\); shorten it to 3"):
        engine.stream("the cat sat on the mat", session=session)
    with pytest.raises(ValueError, match="capacity must lie in"):
        engine.new_session(engine.config.max_position_embeddings + 1)
    with pytest.raises(ConfigError, match=r"threads must lie in \[1, 1024\], not 0"):
        Engine(engine._packed, threads=0)
    other = make_engine(make_model(DENSE), tmp_path)
    with pytest.raises(GenerationError, match="made for another model"):
        other.read(session, [1])
    with pytest.raises(GenerationError, match="no tokenizer"):
        other.generate("the cat")
    session.save(tmp_path / "session")
    with pytest.raises(TensorFileError, match="no session of this model"):
        other.load_session(tmp_path / "session")
    engine.read(session, [1, 2])
    session.tokens = [1]
    session.save(tmp_path / "session")
    with pytest.raises(TensorFileError, match="it has 1 tokens, of which 2 were read"):
        engine.load_session(tmp_path / "session")
    with pytest.raises(GenerationError, match="2 seeds for 1 prompts"):
        engine.generate("the cat", seeds=[1, 2])


def test_what_a_caller_may_do_to_a_session_in_between(speaker) -> None:
    """Fill it behind a writer's back, or write nonsense among its tokens: neither may reach beyond its memory."""
    _, engine = speaker
    session = engine.new_session(8)
    writer = engine.start(session, [1, 2], SamplingConfig(temperature=0.0, max_new_tokens=10**12))
    assert len(engine.write([writer], steps=1)[0]) == 1
    engine.read(session, [3] * 6)
    assert (engine.write([writer]), writer.finish) == ([[]], "length")
    other = engine.new_session()
    other.tokens = [1 << 30]
    with pytest.raises(GenerationError, match="the token 1073741824"):
        engine.start(other, [1], SamplingConfig(repetition_penalty=2.0))
    engine.read(whole := engine.new_session(), [1, 2])
    whole.tokens = [1, 1 << 30]
    with pytest.raises(GenerationError, match="the token 1073741824"):
        engine.start(whole, [1], SamplingConfig(repetition_penalty=2.0))


def test_a_session_that_is_in_use_is_refused(speaker) -> None:
    _, engine = speaker
    session = engine.new_session()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=60)
    writer = engine.start(session, [1], sampling, 0)
    again = native.Writer(session._state, engine._sampling(sampling, 0), 3, [], [], engine._pieces)
    with pytest.raises(ValueError, match="the session is in use"):
        engine._engine.write([writer, again], 3, 1.0)
    assert engine._engine.write([again], 3, 1.0) != [[]]


AFTER_A_FORK = """
import gc, os, pathlib, sys
from terseformer.engine import Engine
from terseformer.pack import load_packed
packed = load_packed(pathlib.Path(sys.argv[1]))
engine = Engine(packed, threads=2)
if os.fork() == 0:
    try:
        engine.logits([1])
    except RuntimeError as error:
        print(error)
    print(Engine(packed, threads=2).logits([1]).shape)
    del engine
    gc.collect()
    print("gone", flush=True)
    os._exit(0)
os.wait()
print(engine.logits([1]).shape)
"""


def test_a_forked_process_is_told_to_make_its_own_engine(tmp_path: Path) -> None:
    path = tmp_path / "f32.safetensors"
    size = pack_model(make_model(DENSE), path).config.vocab_size
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_A_FORK, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines[0].startswith("the engine's threads stayed in the process that was forked")
    assert lines[1:] == [f"(1, {size})", "gone", f"(1, {size})"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_the_weights_is_said(dtype: Dtype, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model(replace(DENSE, vocab_size=tokenizer.get_vocab_size()))
    with torch.no_grad():
        model.blocks[0].feed_forward.up.weight[3] = float("nan")
    engine = make_engine(model, tmp_path, dtype, tokenizer=tokenizer)
    for sampling in (SamplingConfig(temperature=0.0), SamplingConfig(top_p=0.5, top_k=3, min_p=0.1)):
        with pytest.raises(GenerationError, match="no usable logits"):
            engine.generate("the cat", sampling)


@pytest.mark.slow
def test_a_long_loop_leaves_memory_flat(tmp_path: Path) -> None:
    """A million tokens, of all kinds of calls."""
    resource = pytest.importorskip("resource")
    config = replace(SPARSE, max_position_embeddings=512, sru=SRUConfig(num_layers=1, size=4), num_hidden_layers=1)
    engine = Engine(pack_model(make_model(config), tmp_path / "packed"), threads=1)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=500)
    peaks, count = [], 0
    while count < 1_000_000:
        session = engine.new_session()
        writer = engine.start(session, draw_tokens(config, 8, seed=count), sampling, 0)
        count += sum(len(tokens) for tokens in engine.write([writer]))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[len(peaks) // 10] < 8 << 10  # KiB


def test_an_empty_session_has_no_tokens(speaker) -> None:
    _, engine = speaker
    session = engine.new_session(10)
    assert isinstance(session, Session)
    assert (session.length, session.capacity, session.room, session.tokens) == (0, 10, 10, [])
    assert engine.isa == native.isa()
