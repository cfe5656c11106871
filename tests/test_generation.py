"""Generation against a slow twin without state, and text that comes in pieces."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

from terseformer.config import EncoderDecoderConfig, ModelConfig, Seq2SeqConfig, TerraformerConfig
from terseformer.data import train_tokenizer
from terseformer.drawing import new_generator, sample
from terseformer.generation import Drawn, generate, generate_tokens, stream
from terseformer.model import CausalLM
from terseformer.models import AnyModel
from terseformer.models import make_model as make_new_model
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.text import Detokenizer, Generation, StopStrings, source_ids, token_bytes
from variants import DISTINCT_ENCODER_DECODERS, ENCODER_DECODERS, MAX_POSITION, VARIANTS, make_model

MODULE = sys.modules["terseformer.reading"]
NAMES = [
    "attention-local_convolution_long",
    "feed_forward-relu",
    "feed_forward-sparse",
    "feed_forward-switch",
    "head-mixed",
    "position-sinusoidal",
    "sru-2",
    "whole-scaling",
    "whole-scaling_sru_rotary_rms",
    "seq2seq-scaling",
    "terraformer-scaling",
]
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [9, 8], [5] * (MAX_POSITION - 1)]
CONFIGS = {
    "greedy": SamplingConfig(temperature=0.0, max_new_tokens=6),
    "drawn": SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.3, max_new_tokens=6, seed=4),
}
# In every script, with characters of one to four bytes.
TEXT = ["The cat sat on the mat, and the dog sat on the cat.", "Ça va? Žluťoučký kůň, 你好世界 🙂🙃 naïve\n\n�"] * 3

# float64: a near tie of a tiny model must not look like an error of generation.


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(
            vocab_size=310,  # more than the tokenizer has
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=60,
        )
    ).double()
    model.get_parameter("head.bias").data[0] += 3  # the end-of-text token is drawn now and then
    return model


def slow_logits(model: AnyModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Of the token after these."""
    if isinstance(model, CausalLM):
        return model(torch.tensor([ids]))[:, -1]
    return model(torch.tensor([prompt]), torch.tensor([ids]), torch.tensor([len(prompt)]))[:, -1]


def slow_tokens(model: AnyModel, prompt: list[int], config: SamplingConfig, stop_ids: list[int]) -> list[int]:
    """Tokens drawn with the whole sequence computed anew for each."""
    start = list(prompt) if isinstance(model, CausalLM) else [model.config.pad_token_id]
    ids, generator = list(start), new_generator(config.seed)
    room = model.config.max_position_embeddings - (len(start) if isinstance(model, CausalLM) else 0)
    while len(ids) < len(start) + min(config.max_new_tokens, room):
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, ids if isinstance(model, CausalLM) else ids[1:]] = True
        with torch.no_grad():
            logits = slow_logits(model, prompt, ids)
        ids.append(int(sample(logits, seen, config, [generator])))
        if ids[-1] in stop_ids:
            break
    return ids[len(start) :]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_ragged_batch_equals_the_slow_twin(name, config, monkeypatch):
    monkeypatch.setattr(MODULE, "PREFILL_TOKENS", 20)  # chunks of five tokens
    model = make_model((VARIANTS | ENCODER_DECODERS)[name]).double()
    expected = [slow_tokens(model, prompt, config, stop_ids=[2, 11]) for prompt in PROMPTS]
    found: list[list[int]] = [[] for _ in PROMPTS]
    reasons: dict[int, str] = {}
    for step in generate_tokens(model, PROMPTS, config, stop_ids={2, 11}):
        for row, token, reason in step:
            assert row not in reasons
            found[row].append(token)
            if reason:
                reasons[row] = reason
    assert found == expected
    assert reasons == {row: "eos" if tokens[-1] in (2, 11) else "length" for row, tokens in enumerate(expected)}
    assert len(found[3]) == 1 or not isinstance(model, CausalLM)  # the context is full


def test_cases_cover_both_ends_of_a_row():
    reasons = set()
    for name in NAMES:
        for prompt in PROMPTS[:3]:
            tokens = slow_tokens(
                make_model((VARIANTS | ENCODER_DECODERS)[name]).double(), prompt, CONFIGS["drawn"], [2, 11]
            )
            reasons.add((tokens[-1] in (2, 11), len(tokens) < 6))
    assert reasons >= {(True, True), (False, False)}


def test_seeds_make_rows_differ_and_repeat():
    model = make_model(VARIANTS["whole-scaling"]).double()
    config = SamplingConfig(temperature=1.0, max_new_tokens=8)

    def tokens(seeds: list[int] | None = None) -> list[list[int]]:
        steps = list(generate_tokens(model, [[1, 2]] * 3, config, seeds=seeds))
        return [[step[row].token for step in steps] for row in range(3)]

    same, different = tokens(), tokens([7, 0, 8])
    assert same[0] == same[1] == same[2] == different[1]
    assert len(set(map(tuple, different))) == 3
    assert different == tokens([7, 0, 8])


def test_rows_stopped_by_the_caller_leave():
    model = make_model(VARIANTS["feed_forward-sparse"])
    stopped: set[int] = set()
    rows = []
    for step in generate_tokens(model, [[1], [2], [3]], SamplingConfig(max_new_tokens=4), stopped=stopped):
        rows.append([drawn.row for drawn in step])
        stopped.add({1: 1, 2: 0}.get(len(rows), 9))
    assert rows == [[0, 1, 2], [0, 2], [2], [2]]


def test_training_flags_and_random_state_are_left_alone():
    model = make_model(VARIANTS["whole-scaling"]).train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    steps = generate_tokens(model, [[1]], SamplingConfig(max_new_tokens=3))
    tokens = [next(steps)[0].token]
    assert [module.training for module in model.modules()] == flags  # between steps as well
    tokens += [step[0].token for step in steps]
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()
    assert tokens == [step[0].token for step in generate_tokens(model, [[1]], SamplingConfig(max_new_tokens=3))]
    model.train()(torch.tensor([[1, 2]])).sum().backward()  # the weights are no inference tensors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "has no tokens"),
        (
            [[1] * MAX_POSITION],
            f"has {MAX_POSITION} tokens .* context of {MAX_POSITION} .* to {MAX_POSITION - 1} or fewer",
        ),
        ([[1, 21]], "has the token 21, but the model knows 0 to 20"),
        ([[-1]], "has the token -1"),
    ],
)
def test_wrong_prompts(prompts, message):
    with pytest.raises(GenerationError, match=message):
        generate_tokens(make_model(VARIANTS["feed_forward-relu"]), prompts)


def test_wrong_number_of_seeds():
    with pytest.raises(GenerationError, match="1 seeds for 2 prompts"):
        generate_tokens(make_model(VARIANTS["feed_forward-relu"]), [[1], [2]], seeds=[1])


def test_damaged_weights():
    model = make_model(VARIANTS["feed_forward-relu"])
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(GenerationError, match="21 of 21 are NaN"):
        next(generate_tokens(model, [[1]]))


def drain(pieces: Generator[str, None, Generation]) -> tuple[list[str], Generation]:
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as end:
            return texts, end.value


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_is_the_batchs(model, tokenizer, seed):
    prompts = ["The cat", "", "你好世", "the cat sat on the mat, and the dog"]
    config = SamplingConfig(temperature=1.5, max_new_tokens=40, seed=seed, stop=("e", "\u00e7a", "at"))
    generations = generate(model, tokenizer, prompts, config)
    for prompt, generation in zip(prompts, generations, strict=True):
        pieces, result = drain(stream(model, tokenizer, prompt, config))
        assert result == generation == generate(model, tokenizer, prompt, config)[0]
        assert all(pieces)
        assert "".join(pieces) == generation.text
        whole = tokenizer.decode(generation.token_ids)
        assert whole.startswith(generation.text)
        if generation.finish_reason != "stop":
            assert whole == generation.text
        assert not any(stop in generation.text for stop in config.stop)
        assert (generation.token_ids[-1] == 0) == (generation.finish_reason == "eos")
    assert generations[1].prompt_tokens == 1


def test_seeds_of_the_streamed_text_reach_every_reason(model, tokenizer):
    config = SamplingConfig(temperature=1.5, max_new_tokens=40, stop=("e", "at"))
    found = generate(model, tokenizer, ["The"] * 20, config, seeds=range(20))
    assert {g.finish_reason for g in found} == {"stop", "length", "eos"}
    assert len({g.text for g in found}) > 10


def test_what_may_become_a_stop_string_is_not_lost(model, tokenizer):
    config = SamplingConfig(temperature=1.5, max_new_tokens=20)
    text = generate(model, tokenizer, "The", config)[0].text
    pieces, result = drain(stream(model, tokenizer, "The", dataclasses.replace(config, stop=(text[-3:] + "\0",))))
    assert "".join(pieces) == result.text == text
    assert pieces[-1].endswith(text[-3:])


def test_no_prompts(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_prompt_errors_come_before_the_first_piece(model, tokenizer):
    with pytest.raises(GenerationError, match="leaves no room"):
        stream(model, tokenizer, "x y z " * 60)


def test_tokenizer_without_end_of_text(model):
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    assert generate(model, plain, "a b", SamplingConfig(max_new_tokens=4))[0].finish_reason == "length"
    with pytest.raises(GenerationError, match="no tokens"):
        generate(model, plain, "")


def test_greedy_ignores_the_seed(model, tokenizer):
    config = SamplingConfig(temperature=0.0, max_new_tokens=9)
    assert generate(model, tokenizer, "The", config) == generate(
        model, tokenizer, "The", dataclasses.replace(config, seed=9)
    )


def test_prompts_of_any_length_in_chunks_of_any_size(model, monkeypatch):
    prompts = [list(range(1, 2 + n)) for n in (0, 1, 29, 58)]
    whole = [model(torch.tensor([prompt]))[0, -1].detach() for prompt in prompts]
    for size in (1, 4, 12, 10_000):
        monkeypatch.setattr(MODULE, "PREFILL_TOKENS", size)
        _, got = MODULE.begin(model, prompts, room=[60 - len(prompt) for prompt in prompts])
        assert_close(got, torch.stack(whole), atol=1e-12, rtol=0)


# Encoder-decoders: what the slow twin above does not see.

every_encoder_decoder = pytest.mark.parametrize(
    "config", DISTINCT_ENCODER_DECODERS.values(), ids=DISTINCT_ENCODER_DECODERS.keys()
)
SOURCES = [[3], [1, 2, 3, 4, 5, 6, 7], [9, 8], [5] * MAX_POSITION, [4, 0, 6, 0]]
"""Ragged; one fills the context, and the last has the padding in it and at its end."""


def tokens_of(steps: Iterator[list[Drawn]], rows: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for drawn in step:
            found[drawn.row].append(drawn.token)
    return found


@every_encoder_decoder
@pytest.mark.parametrize("pad", [0, 5])
def test_targets_are_those_of_a_whole_pass(config: EncoderDecoderConfig, pad: int) -> None:
    """Of each source alone: the likeliest token at each place, as many as there are positions."""
    model = make_model(dataclasses.replace(config, pad_token_id=pad)).double()
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=50)
    found = tokens_of(generate_tokens(model, SOURCES, greedy), len(SOURCES))
    assert [len(tokens) for tokens in found] == [MAX_POSITION] * len(SOURCES)
    for source, tokens in zip(SOURCES, found, strict=True):
        assert tokens_of(generate_tokens(model, [source], greedy), 1) == [tokens]
        target = torch.tensor([[pad, *tokens[:-1]]])
        with torch.no_grad():
            logits = model(torch.tensor([source]), target, torch.tensor([len(source)]))
        assert logits[0].argmax(-1).tolist() == tokens
    assert len(set(map(tuple, found))) > 1


@every_encoder_decoder
def test_targets_end(config: EncoderDecoderConfig) -> None:
    model = make_model(config).double()
    plain = SamplingConfig(temperature=1.5, max_new_tokens=8, seed=3)
    whole = tokens_of(generate_tokens(model, SOURCES, plain), len(SOURCES))
    stop_ids = {whole[0][2], whole[1][5]}
    steps = list(generate_tokens(model, SOURCES, plain, stop_ids))
    reasons = {drawn.row: drawn.finish_reason for step in steps for drawn in step}
    for row, tokens in enumerate(tokens_of(iter(steps), len(SOURCES))):
        end = next((i + 1 for i, token in enumerate(whole[row]) if token in stop_ids), 8)
        assert tokens == whole[row][:end]
        assert reasons[row] == ("eos" if tokens[-1] in stop_ids else "length")
    assert len(steps[-1]) < len(SOURCES) == len(steps[0])


def test_penalty_counts_what_was_written_and_not_the_source() -> None:
    model = make_model(DISTINCT_ENCODER_DECODERS["seq2seq-scaling"]).double()
    source = list(range(10, 21))
    config = SamplingConfig(temperature=0.0, max_new_tokens=MAX_POSITION)
    free, bound = (
        tokens_of(generate_tokens(model, [source], dataclasses.replace(config, repetition_penalty=p)), 1)[0]
        for p in (1.0, 100.0)
    )
    assert bound[:3] == free[:3]
    assert set(bound[:3]) <= set(source)
    assert len(set(free)) < len(set(bound)) == len(bound)


@pytest.mark.parametrize("name", ["seq2seq-scaling", "terraformer-scaling"])
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([[1], []], "the source has no tokens; give some text"),
        (
            [[1] * (MAX_POSITION + 1)],
            f"the source has {MAX_POSITION + 1} tokens, more than fit in the model's context of {MAX_POSITION} "
            rf"\(max_position_embeddings\); shorten it to {MAX_POSITION} or fewer",
        ),
        ([[1, 21]], "the source has the token 21, but the model knows 0 to 20"),
        ([[-1]], "the source has the token -1"),
    ],
)
def test_wrong_sources(name: str, sources: list[list[int]], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        generate_tokens(make_model(ENCODER_DECODERS[name]), sources)


@pytest.mark.parametrize("kind", [Seq2SeqConfig, TerraformerConfig])
def test_flags_of_an_encoder_decoder_come_back(kind: type[EncoderDecoderConfig]) -> None:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = make_model(kind(vocab_size=21, dropout=0.5, attention_dropout=0.5, **sizes)).train()
    model.norm.eval()
    flags = [module.training for module in model.modules()]
    found = tokens_of(generate_tokens(model, SOURCES, CONFIGS["drawn"]), len(SOURCES))
    assert [module.training for module in model.modules()] == flags
    assert found == tokens_of(generate_tokens(model.eval(), SOURCES, CONFIGS["drawn"]), len(SOURCES))


@pytest.fixture(scope="module", params=[0, 299], ids=["end as padding", "other padding"])
def writer(request: pytest.FixtureRequest) -> AnyModel:
    """An encoder-decoder that ends its targets now and then."""
    torch.manual_seed(0)
    config = Seq2SeqConfig(
        vocab_size=310,
        hidden_size=16,
        num_attention_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_position_embeddings=60,
        pad_token_id=request.param,
    )
    model = make_new_model(config).double()
    model.get_parameter("head.bias").data[0] += 3
    return model


@pytest.mark.parametrize("seed", range(3))
def test_streamed_targets_are_the_batchs(writer: AnyModel, tokenizer: Tokenizer, seed: int) -> None:
    sources = ["The cat", "你好世", "the cat sat on the mat, and the dog<|endoftext|>", " "]
    config = SamplingConfig(temperature=1.5, max_new_tokens=90, seed=seed, stop=("e", "at"))
    generations = generate(writer, tokenizer, sources, config)
    for source, generation in zip(sources, generations, strict=True):
        pieces, result = drain(stream(writer, tokenizer, source, config))
        assert result == generation == generate(writer, tokenizer, source, config)[0]
        assert "".join(pieces) == generation.text
        whole = tokenizer.decode(generation.token_ids)
        assert whole.startswith(generation.text)
        assert generation.finish_reason == "stop" or whole == generation.text
        assert (generation.token_ids[-1] == 0) == (generation.finish_reason == "eos")
        ending = writer.config.pad_token_id != 0
        assert generation.prompt_tokens == len(tokenizer.encode(source, add_special_tokens=False).ids) + ending


def test_a_target_may_be_longer_than_its_source_leaves_room(writer: AnyModel, tokenizer: Tokenizer) -> None:
    """It has positions of its own."""
    source = "".join(tokenizer.decode([token]) for token in range(33, 92))
    length = len(source_ids(tokenizer, source, writer.config.pad_token_id))
    assert 50 < length <= 60
    found = generate(
        writer, tokenizer, [source] * 8, SamplingConfig(temperature=9.0, max_new_tokens=999), seeds=range(8)
    )
    assert {len(g.token_ids) for g in found if g.finish_reason == "length"} == {60}


def test_sources_without_text(writer: AnyModel, tokenizer: Tokenizer) -> None:
    if writer.config.pad_token_id == 0:
        with pytest.raises(GenerationError, match="the source has no tokens; give some text"):
            generate(writer, tokenizer, "")
        with pytest.raises(GenerationError, match="the source has no tokens"):
            stream(writer, tokenizer, "")
    else:
        assert generate(writer, tokenizer, "")[0].prompt_tokens == 1
    with pytest.raises(GenerationError, match=r"the source has \d+ tokens, more than fit in the model's context of 60"):
        stream(writer, tokenizer, "x y z " * 60)


def test_source_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a cat").ids
    assert source_ids(tokenizer, "a cat", 0) == ids
    assert source_ids(tokenizer, "a cat", 5) == [*ids, 0]
    assert source_ids(tokenizer, "", 5) == [0]
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert source_ids(plain, "a", 5) == [0]


@given(st.data())
def test_pieces_of_any_tokens_are_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, 305), max_size=30))
    prompt = tokenizer.encode(data.draw(st.text(max_size=8)), add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_old_tokens_are_not_decoded_again(tokenizer, monkeypatch):
    lengths = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids)

    detokenizer = Detokenizer(tokenizer)
    monkeypatch.setattr(detokenizer, "_tokenizer", Counting())
    text = "你好 the cat " * 50
    assert "".join(map(detokenizer.push, tokenizer.encode(text).ids)) == text
    assert max(lengths) < 12


@given(st.text(max_size=40))
def test_whole_characters_come_at_once(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    seen = 0
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    given_out = ""
    for count, token in enumerate(ids, start=1):
        given_out += detokenizer.push(token)
        decoded = tokenizer.decode(ids[:count])
        assert decoded.endswith("\ufffd") or given_out == decoded
        seen = max(seen, len(given_out))
    assert len(given_out + detokenizer.flush()) == max(seen, len(tokenizer.decode(ids)))


def test_words_after_a_prompt_keep_their_space():
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    detokenizer = Detokenizer(words, [0])
    assert [detokenizer.push(token) for token in (1, 2, 0)] == [" cat", "s", " the"]
    assert detokenizer.flush() == ""


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, looked for letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


letters = st.text(alphabet="ab", max_size=5)


@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), max_size=3))
def test_stop_strings_however_the_text_is_divided(pieces, stops):
    text, stop = "".join(pieces), StopStrings(stops)
    out = ""
    for count, piece in enumerate(pieces, start=1):
        out += stop.push(piece)
        so_far = "".join(pieces[:count])
        expected, found = cut(so_far, stops)
        assert stop.found == found
        if found:
            assert out == expected
            break
        held = so_far[len(out) :]
        assert so_far.startswith(out)
        assert not held or any(other.startswith(held) for other in stops)  # nothing is held without need
        assert not any(so_far[at:] and s.startswith(so_far[at:]) for s in stops for at in range(len(out)))
    out += stop.flush() if not stop.found else ""
    assert (out, stop.found) == cut(text, stops)


def test_token_bytes_are_those_of_the_text() -> None:
    text = "The cat, über 你好 🙂\n\x00\xad\xa0"
    tokenizer = train_tokenizer([text] * 3, 300)
    pieces = token_bytes(tokenizer, 300)
    assert pieces is not None
    assert b"".join(pieces[token] for token in tokenizer.encode(text).ids) == text.encode()
    assert pieces[0] == b""
    foreign = Tokenizer(models.BPE({"你": 0}, []))
    foreign.decoder = decoders.ByteLevel()
    assert token_bytes(foreign, 1) is None
