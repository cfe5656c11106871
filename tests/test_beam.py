"""Beam search against slow twins, and the native engine's against PyTorch's; n-grams that are not repeated."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines import draw_tokens, make_engine, pack_model
from runs import DENSE
from terseformer import generation
from terseformer.beam import beam_search
from terseformer.config import ConfigError, ModelConfig
from terseformer.data import train_tokenizer
from terseformer.drawing import repeating
from terseformer.engine import MAX_RUNS, Engine
from terseformer.model import CausalLM
from terseformer.models import AnyModel
from terseformer.sampling import GenerationError, SamplingConfig
from variants import DISTINCT, DISTINCT_ENCODER_DECODERS, make_model

MODELS = {
    name: replace((DISTINCT | DISTINCT_ENCODER_DECODERS)[name], max_position_embeddings=40)
    for name in (
        "attention-sparse_5x4",
        "whole-scaling_sru_rotary_rms",
        "seq2seq-encoder_local_convolution",
        "seq2seq-scaling",
        "terraformer-scaling",
        "terraformer-merged-swap_twice-3",
    )
}
SEARCHES = {
    "plain": SamplingConfig(num_beams=3, max_new_tokens=8),
    "long": SamplingConfig(num_beams=5, length_penalty=2.0, max_new_tokens=12),
    "short": SamplingConfig(num_beams=4, length_penalty=-1.5, max_new_tokens=12),
    "early": SamplingConfig(num_beams=2, early_stopping=True, max_new_tokens=12),
    "bigrams": SamplingConfig(num_beams=4, no_repeat_ngram_size=2, max_new_tokens=20),
    "penalised": SamplingConfig(num_beams=3, repetition_penalty=1.7, no_repeat_ngram_size=3, max_new_tokens=12),
    "many": SamplingConfig(num_beams=MAX_RUNS + 3, max_new_tokens=7),
}


def likely_to_end(model: AnyModel, stop_ids: list[int]) -> AnyModel:
    """The model with these tokens made likelier, so that some beams end before others."""
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name in ("head.bias", "head.sparse.bias"):
                bias.view(-1)[stop_ids] += 0.5
    return model


@torch.no_grad()
def scores_of(model: AnyModel, prompt: list[int], text: list[int], config: SamplingConfig) -> torch.Tensor:
    """Of each next token, with everything computed anew and adjusted as Hugging Face's processors do."""
    if isinstance(model, CausalLM):
        before = prompt
        logits = model(torch.tensor([prompt + text]))[0, -1]
    else:
        before = []
        target = torch.tensor([[model.config.pad_token_id, *text]])
        logits = model(torch.tensor([prompt]), target, torch.tensor([len(prompt)]))[0, -1]
    scores = logits.double().log_softmax(-1)
    seen = before + text
    for token in set(seen):
        scores[token] *= config.repetition_penalty
    n = config.no_repeat_ngram_size
    for token in range(len(scores)) if n else ():
        ngrams = [tuple(seen[i : i + n]) for i in range(len(seen) - n + 1)]
        if len(seen) >= n - 1 and (*seen[len(seen) - n + 1 :], token) in ngrams:
            scores[token] = -torch.inf
    return scores


def slow_search(model: AnyModel, prompt: list[int], config: SamplingConfig, stop_ids: list[int]) -> tuple[float, list]:
    """As Hugging Face defines it, for one sequence: always `num_beams` rows, -1e9 for those that are not there."""
    beams, low = config.num_beams, -1e9
    running, totals = [[] for _ in range(beams)], [0.0] + [low] * (beams - 1)
    ended: list[tuple[float, list, bool]] = [(low, [], False)] * beams
    for length in range(1, config.max_new_tokens + 1):
        every = [
            (total + float(score), row, token)
            for row, (text, total) in enumerate(zip(running, totals, strict=True))
            for token, score in enumerate(scores_of(model, prompt, text, config))
        ]
        top = sorted(every, key=lambda x: -x[0])[: max(2, 1 + len(stop_ids)) * beams]
        stops = [token in stop_ids or length == config.max_new_tokens for _, _, token in top]
        texts = [[*running[row], token] for _, row, token in top]
        kept = sorted(range(len(top)), key=lambda i: -(top[i][0] + low * stops[i]))[:beams]
        new = [
            (total / length**config.length_penalty + (0 if stop and rank < beams else low), text, stop and rank < beams)
            for rank, ((total, _, _), text, stop) in enumerate(zip(top, texts, stops, strict=True))
        ]
        ended = sorted(ended + new, key=lambda x: -x[0])[:beams]
        running, totals = [texts[i] for i in kept], [top[i][0] + low * stops[i] for i in kept]
        worst = min(score if is_ended else low for score, _, is_ended in ended)
        may_improve = totals[0] / length**config.length_penalty > worst
        if not may_improve or (config.early_stopping and all(is_ended for _, _, is_ended in ended)) or all(stops):
            break
    return ended[0][:2]


def native_search(engine: Engine, prompt: list[int], config: SamplingConfig, stop_ids: list[int]) -> tuple:
    """The text that the engine finds after a prompt or of a source, and why it ends."""
    engine._stop_ids = stop_ids
    is_decoder = isinstance(engine.config, ModelConfig)
    start = prompt if is_decoder else [engine.config.pad_token_id]
    session = engine.new_session() if is_decoder else engine.new_session(source=prompt)
    tokens, finish = engine.search(session, start, config)
    assert session.tokens == start + tokens
    assert session.length == len(start)
    return tokens, finish


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["whole-scaling_sru_rotary_rms", "seq2seq-scaling", "terraformer-scaling"])
def test_search_is_the_slow_twins(name: str, search: str) -> None:
    config = SEARCHES[search]
    model = likely_to_end(make_model(MODELS[name], seed=1).double(), [2, 5])
    prompt = draw_tokens(model.config, 4, seed=1)
    found = beam_search(model, prompt, config, {2, 5})
    score, tokens = slow_search(model, prompt, config, [2, 5])
    assert found.tokens == tokens
    assert found.score == pytest.approx(score, abs=1e-9)
    assert found.finish_reason == ("eos" if tokens[-1] in (2, 5) else "length")


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
def test_enough_beams_find_the_best_of_all_texts(length_penalty: float) -> None:
    model = likely_to_end(make_model(replace(MODELS["attention-sparse_5x4"], vocab_size=4)).double(), [3])
    best = (-torch.inf, [])
    for length in (1, 2, 3):
        for text in itertools.product(range(4), repeat=length):
            if 3 in text[:-1] or (text[-1] != 3 and length < 3):
                continue
            parts = [scores_of(model, [1, 0], list(text[:i]), SamplingConfig())[text[i]] for i in range(length)]
            best = max(best, (float(sum(parts)) / length**length_penalty, list(text)))
    config = SamplingConfig(num_beams=64, length_penalty=length_penalty, max_new_tokens=3)
    found = beam_search(model, [1, 0], config, [3])
    assert found.tokens == best[1]
    assert found.score == pytest.approx(best[0], abs=1e-9)


def test_the_searches_differ() -> None:
    """Texts end with a stop token and for want of room, and the settings matter."""
    model = likely_to_end(make_model(MODELS["whole-scaling_sru_rotary_rms"]), [2, 5])
    prompt = draw_tokens(model.config, 7, seed=7)
    found = [beam_search(model, prompt, config, [2, 5]) for config in SEARCHES.values()]
    assert {f.finish_reason for f in found} == {"eos", "length"}
    assert len({len(f.tokens) for f in found}) >= 5


@pytest.mark.parametrize("name", MODELS)
def test_parity_of_the_native_search(name: str, tmp_path: Path) -> None:
    model = likely_to_end(make_model(MODELS[name]), [2, 5])
    prompts = [draw_tokens(model.config, count, seed=count) for count in (1, 23)]
    engines = [make_engine(model, tmp_path, threads=threads) for threads in (1, 2)]
    for config, prompt in zip(SEARCHES.values(), itertools.cycle(prompts), strict=False):
        expected = beam_search(model, prompt, config, {2, 5})
        for engine in engines:
            assert native_search(engine, prompt, config, [2, 5]) == expected[1:]


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
@pytest.mark.parametrize("name", ["attention-sparse_5x4", "seq2seq-scaling", "terraformer-scaling"])
def test_of_equals_the_first_beam_and_token_come_first(name: str, length_penalty: float, tmp_path: Path) -> None:
    model = make_model(MODELS[name])
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    config = SamplingConfig(num_beams=3, length_penalty=length_penalty, max_new_tokens=5)
    found = beam_search(model, [1, 3], config, [2, 5])
    assert found.tokens == ([0, 0, 0, 0, 0] if length_penalty else [2])
    assert slow_search(model, [1, 3], config, [2, 5])[1] == found.tokens
    assert native_search(make_engine(model, tmp_path, threads=2), [1, 3], config, [2, 5]) == found[1:]


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_that_stops_early_is_greedy(name: str, tmp_path: Path) -> None:
    model = likely_to_end(make_model(MODELS[name]), [2, 5])
    engine = make_engine(model, tmp_path)
    config = SamplingConfig(temperature=0.0, num_beams=1, early_stopping=True, max_new_tokens=12)
    for seed in range(2):
        prompt = draw_tokens(model.config, 5, seed)
        steps = [drawn for (drawn,) in generation.generate_tokens(model, [prompt], config, [2, 5])]
        expected = [drawn.token for drawn in steps], steps[-1].finish_reason
        assert beam_search(model, prompt, config, [2, 5])[1:] == expected
        assert native_search(engine, prompt, config, [2, 5]) == expected


def test_fewer_beams_than_batches(tmp_path: Path) -> None:
    """With three tokens that must not come again, few beams go on."""
    model = make_model(replace(MODELS["attention-sparse_5x4"], vocab_size=3))
    config = SamplingConfig(num_beams=3 * MAX_RUNS, no_repeat_ngram_size=1, max_new_tokens=2)
    expected = beam_search(model, [0], config)
    assert len(expected.tokens) == 2
    assert native_search(make_engine(model, tmp_path, threads=2), [0], config, []) == expected[1:]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parity_of_greedy_texts_that_repeat_nothing(name: str, size: int, tmp_path: Path) -> None:
    model = make_model(MODELS[name])
    engine = make_engine(model, tmp_path)
    prompts = [draw_tokens(model.config, count, seed=count) for count in (1, 2, 7)]
    config = SamplingConfig(temperature=0.0, no_repeat_ngram_size=size, max_new_tokens=12)
    expected: list[list[int]] = [[] for _ in prompts]
    for step in generation.generate_tokens(model, prompts, config):
        for drawn in step:
            expected[drawn.row].append(drawn.token)
    is_decoder = isinstance(model, CausalLM)
    writers = [
        engine.start(engine.new_session(), prompt, config)
        if is_decoder
        else engine.start(engine.new_session(source=prompt), [0], config)
        for prompt in prompts
    ]
    assert engine.write(writers) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        whole = prompt + text if is_decoder else text
        new = [tuple(whole[i : i + size]) for i in range(len(whole) - size + 1) if i + size > len(whole) - len(text)]
        assert all(new.count(ngram) == 1 for ngram in new)


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(1, 5))
def test_what_repeats_would_make_an_ngram_stand_twice(text: list[int], size: int) -> None:
    ngrams = [text[i : i + size] for i in range(len(text) - size + 1)]
    assert repeating(text, size) == {t for t in range(3) if [*text, t][-size:] in ngrams}


def test_which_tokens_repeat() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    assert repeating(text, 3) == {3, 4}
    assert repeating(text, 2) == {3, 4}
    assert repeating(text, 1) == {1, 2, 3, 4}
    assert repeating(text, 4) == set()
    assert repeating(text, 0) == repeating([], 1) == repeating([1], 2) == set()
    assert repeating([1, 1], 2) == {1}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_nothing_is_left_where_all_repeats(num_beams: int, tmp_path: Path) -> None:
    model = make_model(replace(MODELS["attention-sparse_5x4"], vocab_size=3))
    config = SamplingConfig(no_repeat_ngram_size=1, num_beams=num_beams)
    message = r"every token would repeat a sequence of 1 \(no_repeat_ngram_size\)"
    with pytest.raises(GenerationError, match=message):
        list(generation.generate_tokens(model, [[0]], config))
    tokenizer = train_tokenizer(["ab"], 257)
    engine = make_engine(model, tmp_path)
    if num_beams > 1:
        with pytest.raises(GenerationError, match=message):
            engine.search(engine.new_session(), [0], config)
    else:
        writer = engine.start(engine.new_session(), [0], config)
        assert len(engine.write([writer])[0]) == 2
        assert writer.finish == "repeats"
    small = make_model(replace(DENSE, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=300))
    engine = make_engine(small, tmp_path, tokenizer=tokenizer)
    engine._stop_ids = []
    with pytest.raises(GenerationError, match=message):
        engine.generate("a", replace(config, max_new_tokens=280))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, über die Brücke 🙂\n" * 5], 300)


@pytest.mark.parametrize("name", ["attention-sparse_5x4", "seq2seq-encoder_local_convolution", "terraformer-scaling"])
def test_texts_are_those_of_the_pytorch_path(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = tokenizer.get_vocab_size() + 3 - tokenizer.get_vocab_size() % 3  # a multiple of the head's modules
    model = make_model(replace(MODELS[name], vocab_size=size))
    engine = Engine(pack_model(model, tmp_path / "packed"), tokenizer, threads=2, poison=True)
    prompts = ["the cat", "über die Brücke 🙂", *(f"sat {i}" for i in range(MAX_RUNS))]
    config = SamplingConfig(num_beams=3, max_new_tokens=9, no_repeat_ngram_size=2)
    expected = generation.generate(model, tokenizer, prompts, config)
    assert engine.generate(prompts, config) == expected
    assert "".join(engine.stream(prompts[0], config)) == expected[0].text
    assert "".join(generation.stream(model, tokenizer, prompts[0], config)) == expected[0].text
    if isinstance(model, CausalLM):
        session = engine.new_session()
        for prompt in (prompts[0], " on"):
            before = session.tokens + tokenizer.encode(prompt).ids
            list(engine.stream(prompt, config, session))
            assert session.tokens == before + native_search(engine, before, config, engine._stop_ids)[0]


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="beams know no stop strings"):
        SamplingConfig(num_beams=2, stop=("a",))
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.5), ("min_p", 0.1), ("seed", 1)):
        with pytest.raises(ConfigError, match=f"beams draw nothing, so that {name} .{value}. is in vain"):
            SamplingConfig(num_beams=2, **{name: value})
    SamplingConfig(num_beams=2, temperature=0.0)
    for name, value in (
        ("num_beams", 0),
        ("num_beams", 1025),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 2**31),
        ("length_penalty", float("nan")),
        ("length_penalty", 11.0),
    ):
        with pytest.raises(ConfigError, match=name):
            SamplingConfig(**{name: value})
