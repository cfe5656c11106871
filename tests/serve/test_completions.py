"""`/v1/completions` by a real server and OpenAI's client: texts are the engine's own."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, NotFoundError
from openai.types import Completion

from served import CONTEXT, PROMPT, ServerProcess
from terseformer.engine import Engine
from terseformer.sampling import SamplingConfig

DRAWN = {"max_tokens": 24, "seed": 7, "temperature": 1.0}


def complete(server: ServerProcess, prompt: Any = PROMPT, **more: Any) -> Completion:
    return server.client().completions.create(model="small", prompt=prompt, **more)


def expected(engine: Engine, prompt: str = PROMPT, seed: int = 7, **more: Any) -> str:
    sampling = SamplingConfig(max_new_tokens=24, temperature=1.0, **more)
    return engine.generate(prompt, sampling, [seed])[0].text


def test_a_text_is_the_engines(server: ServerProcess, engine: Engine) -> None:
    done = complete(server, **DRAWN)
    assert done.choices[0].text == expected(engine)
    assert done.choices[0].finish_reason in ("length", "stop")
    assert (done.object, done.model) == ("text_completion", "small")
    prompt = len(engine.tokenizer.encode(PROMPT).ids)
    assert done.usage.prompt_tokens == prompt
    assert done.usage.total_tokens == prompt + done.usage.completion_tokens
    assert complete(server, **DRAWN).choices[0].text == done.choices[0].text
    assert complete(server, **DRAWN | {"seed": 8}).choices[0].text != done.choices[0].text
    assert complete(server, max_tokens=24).choices[0].text != complete(server, max_tokens=24).choices[0].text


def test_a_stream_is_the_same_text(server: ServerProcess, engine: Engine) -> None:
    options = {"include_usage": True}
    chunks = list(
        server.client().completions.create(model="small", prompt=PROMPT, stream=True, stream_options=options, **DRAWN)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(engine)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason
    whole = complete(server, **DRAWN).usage
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.prompt_tokens


def test_a_stream_ends_with_done(server: ServerProcess) -> None:
    body = json.dumps({"model": "small", "prompt": PROMPT, "stream": True, "max_tokens": 3}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_several_texts_and_prompts(server: ServerProcess, engine: Engine) -> None:
    prompts = [PROMPT, "jab", ""]
    done = complete(server, prompts, n=2, **DRAWN)
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [choice.text for choice in done.choices] == [
        expected(engine, prompt, seed) for prompt in prompts for seed in (7, 8)
    ]
    assert done.usage.prompt_tokens == sum(len(engine.tokenizer.encode(prompt).ids) or 1 for prompt in prompts)
    ids = [engine.tokenizer.encode(prompt).ids for prompt in prompts[:2]]
    assert [choice.text for choice in complete(server, ids, **DRAWN).choices] == [
        expected(engine, prompt) for prompt in prompts[:2]
    ]
    assert complete(server, ids[0], **DRAWN).choices[0].text == expected(engine)


def test_streams_of_several_texts_are_told_apart(server: ServerProcess, engine: Engine) -> None:
    texts = ["", "", ""]
    for chunk in complete(server, stream=True, n=3, **DRAWN):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [expected(engine, seed=seed) for seed in (7, 8, 9)]


def test_a_text_does_not_depend_on_its_company(server: ServerProcess, engine: Engine) -> None:
    """More requests than are written together, of different lengths, some step by step and some by a schema."""
    prompts = [PROMPT[: 8 + 3 * i] for i in range(12)]
    kinds: list[dict[str, Any]] = [{}, {"logprobs": 1}, {"n": 2}]
    schema = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"enum": ["cat", "dog"]}}}

    def ask(i: int) -> str:
        more = kinds[i % 3] if i < 12 else {"extra_body": {"response_format": schema}}
        return complete(server, prompts[i % 12], **DRAWN | {"seed": i} | more).choices[0].text

    with ThreadPoolExecutor(15) as pool:
        texts = list(pool.map(ask, range(15)))
    assert texts[:12] == [expected(engine, prompt, i) for i, prompt in enumerate(prompts)]
    assert {*texts[12:]} <= {'"cat"', '"dog"'}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(stream: bool, server: ServerProcess, engine: Engine) -> None:
    whole = expected(engine)
    stop = [whole[5:7], "never"]
    done = complete(server, stop=stop, stream=stream, **DRAWN)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop[0])]
    assert choices[-1].finish_reason == "stop"


def test_sampling_parameters_reach_the_engine(server: ServerProcess, engine: Engine) -> None:
    own = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    done = complete(server, top_p=0.9, extra_body=own, **DRAWN)
    assert done.choices[0].text == expected(engine, top_p=0.9, **own)
    assert done.choices[0].text != expected(engine)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_log_probabilities(max_tokens: int, stream: bool, server: ServerProcess, engine: Engine) -> None:
    """Each token's is that of the model's own logits; so is each of the likeliest."""
    ids = engine.tokenizer.encode(PROMPT * 6).ids  # more than are read at once
    assert len(ids) > 150
    done = complete(server, ids, echo=True, logprobs=3, max_tokens=max_tokens, temperature=0, stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    names = [name for choice in choices for name in choice.logprobs.tokens]
    given = [value for choice in choices for value in choice.logprobs.token_logprobs]
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    text = "".join(choice.text for choice in choices)
    assert text.startswith(PROMPT * 6)
    assert len(names) == len(given) == len(tops) == len(offsets) == len(ids) + max_tokens
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=5)
    written = engine.generate(PROMPT * 6, greedy)[0].token_ids[:max_tokens]
    logs = log_softmax(engine.logits([*ids, *written]))
    assert (given[0], tops[0]) == (None, None)
    for i, token in enumerate([*ids, *written][1:], 1):
        assert given[i] == pytest.approx(logs[i - 1, token], abs=1e-5)
        assert len(tops[i]) in (3, 4)
        assert tops[i][names[i]] == given[i]
        assert max(tops[i].values()) == pytest.approx(logs[i - 1].max(), abs=1e-5)
        assert names[i].startswith("bytes:") or text[offsets[i] :].startswith(names[i])
    for i in range(len(ids), len(names)):  # written without a temperature
        assert given[i] == max(tops[i].values())


def test_log_probabilities_do_not_change_the_text(server: ServerProcess, engine: Engine) -> None:
    done = complete(server, logprobs=0, **DRAWN)
    assert done.choices[0].text == expected(engine)
    assert len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens
    assert done.choices[0].logprobs.top_logprobs is None
    assert complete(server, echo=True, **DRAWN).choices[0].text == PROMPT + expected(engine)


def test_an_encoder_decoder_makes_a_text_of_its_source(server: ServerProcess, runs) -> None:
    target = Engine.from_pretrained(runs / "pairs", threads=1)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    texts = [done.text for done in target.generate(["abc def", "ghi"], greedy)]
    create = server.client().completions.create
    done = create(model="pairs", prompt=["abc def", "ghi"], n=2, max_tokens=12, temperature=0, logprobs=1)
    assert [choice.text for choice in done.choices] == [texts[0], texts[0], texts[1], texts[1]]
    with pytest.raises(BadRequestError, match="leave out echo"):
        create(model="pairs", prompt="abc", echo=True)
    with pytest.raises(BadRequestError, match="no chat template"):
        server.client().chat.completions.create(model="pairs", messages=[{"role": "user", "content": "abc"}])


def test_models(server: ServerProcess) -> None:
    assert [model.id for model in server.client().models.list()] == ["small", "pairs"]
    assert server.client().models.retrieve("pairs").owned_by == "terseformer"
    with pytest.raises(NotFoundError, match="no model 'smal'; the nearest is 'small'"):
        server.client().models.retrieve("smal")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"n": 0}, "n: "),
        ({"n": 200}, "1 prompts with n = 200 texts each are more than the 128"),
        ({"logprobs": 21}, "logprobs: "),
        (
            {"prompt": PROMPT * 5, "logprobs": 20, "max_tokens": 250, "n": 128, "echo": True},
            "log-probabilities are more than the 1048576",
        ),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "no prompt in the list"),
        ({"prompt": [[]]}, "the prompt has no tokens"),
        ({"prompt": [10**6]}, "the prompt has the token 1000000"),
        ({"prompt": [5] * CONTEXT}, f"the prompt has {CONTEXT} tokens, but the model's context of {CONTEXT} has room"),
        ({"frequency_penalty": 0.5}, "does not know the parameter 'frequency_penalty'"),
        ({"suffix": "end"}, "does not know the parameter 'suffix'"),
        ({"extra_body": {"temprature": 1}}, "unknown parameter 'temprature'; the nearest is 'temperature'"),
        ({"extra_body": {"top_k": -1}}, "top_k: "),
    ],
    ids=str,
)
def test_a_mistake_is_said(parameters: dict[str, Any], message: str, server: ServerProcess) -> None:
    with pytest.raises(BadRequestError) as caught:
        complete(server, **{"prompt": PROMPT} | parameters)
    assert message in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_parameters_that_change_nothing_are_ignored(server: ServerProcess, engine: Engine) -> None:
    done = complete(server, user="me", best_of=1, frequency_penalty=0, logit_bias={}, suffix=None, **DRAWN)
    assert done.choices[0].text == expected(engine)
