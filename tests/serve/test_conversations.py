"""`/v1/chat/completions`, and the templates that make prompts of conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError
from tokenizers import Tokenizer

from served import ServerProcess
from terseformer.engine import Engine
from terseformer.errors import UserError
from terseformer.folder import find
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.serve.template import PLAIN, PLAIN_STOPS, ChatTemplate, load_template

MESSAGES: list[Any] = [{"role": "system", "content": "abc"}, {"role": "user", "content": "def ghi"}]
DRAWN = {"max_tokens": 20, "seed": 3, "temperature": 1.0}


def expected(engine: Engine, prompt: str, seed: int = 3) -> str:
    sampling = SamplingConfig(max_new_tokens=20, temperature=1.0, stop=PLAIN_STOPS)
    return engine.generate(prompt, sampling, [seed])[0].text


def test_an_answer_goes_on_from_the_plain_template(server: ServerProcess, engine: Engine) -> None:
    prompt = "System: abc\nUser: def ghi\nAssistant:"
    done = server.client().chat.completions.create(model="small", messages=MESSAGES, n=2, **DRAWN)
    assert [choice.message.content for choice in done.choices] == [expected(engine, prompt, seed) for seed in (3, 4)]
    assert [choice.message.role for choice in done.choices] == ["assistant"] * 2
    assert done.object == "chat.completion"
    assert done.usage.prompt_tokens == len(engine.tokenizer.encode(prompt).ids)
    parts = [
        {"role": "developer", "content": "abc"},
        {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "ghi"}]},
    ]
    again = server.client().chat.completions.create(model="small", messages=parts, **DRAWN)
    assert again.choices[0].message.content == done.choices[0].message.content


def test_a_stream_is_the_same_answer(server: ServerProcess, engine: Engine) -> None:
    options = {"include_usage": True}
    create = server.client().chat.completions.create
    chunks = list(create(model="small", messages=MESSAGES, stream=True, stream_options=options, **DRAWN))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in chunks[:-1])
    assert text == expected(engine, "System: abc\nUser: def ghi\nAssistant:")
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_log_probabilities(server: ServerProcess, engine: Engine) -> None:
    done = server.client().chat.completions.create(
        model="small", messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=5, temperature=0
    )
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens == 5
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == done.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "messages.0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "does not know the parameter 'tools'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ],
    ids=str,
)
def test_a_mistake_is_said(parameters: dict[str, Any], message: str, server: ServerProcess) -> None:
    with pytest.raises(BadRequestError) as caught:
        server.client().chat.completions.create(**{"model": "small", "messages": MESSAGES} | parameters)
    assert message in caught.value.message


# Templates.


def test_a_checkpoints_own_template(runs: Path, engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(find(runs / "small"), folder)
    source = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"chat_template": source, "bos_token": {"content": "<b>"}, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_template(folder, engine.tokenizer, plain=True)
    assert template is not None
    assert template.render(MESSAGES) == "<b><system>abc<|endoftext|><user>def ghi<|endoftext|>"
    assert template.stops == ()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]})
    )
    assert load_template(folder, engine.tokenizer, plain=False).render(MESSAGES) == "yes"
    (folder / "chat_template.jinja").write_text(
        "{% if not messages[0].content %}{{ raise_exception('say it') }}{% endif %}hi"
    )
    assert load_template(folder, engine.tokenizer, plain=True).render(MESSAGES) == "hi"
    with pytest.raises(GenerationError, match="say it"):
        load_template(folder, engine.tokenizer, plain=True).render([{"role": "user", "content": ""}])
    target = tmp_path / "target"
    shutil.copytree(find(runs / "pairs"), target)
    (target / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=9)
    text = Engine.from_pretrained(target, threads=1).generate("abc def", greedy)[0].text
    with ServerProcess(f"mine={folder}", target) as server:
        answer = server.client().chat.completions.create(
            model="target", messages=[{"role": "user", "content": "abc def"}], max_tokens=9, temperature=0
        )
        assert answer.choices[0].message.content == text
        done = server.client().chat.completions.create(model="mine", messages=MESSAGES, max_tokens=3)
        assert done.usage.prompt_tokens == len(engine.tokenizer.encode("hi").ids)
        with pytest.raises(BadRequestError, match="say it"):
            server.client().chat.completions.create(model="mine", messages=[{"role": "user", "content": ""}])
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="no Jinja program"):
        load_template(folder, engine.tokenizer, plain=True)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read"):
        load_template(folder, engine.tokenizer, plain=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0].content / 0 }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(GenerationError, match="does not take these messages"):
        ChatTemplate(source).render([{"role": "user", "content": "a"}])


def test_the_plain_template(engine: Engine, runs: Path) -> None:
    tokenizer: Tokenizer = engine.tokenizer
    folder = find(runs / "small")
    assert load_template(folder, tokenizer, plain=False) is None
    template = load_template(folder, tokenizer, plain=True)
    assert template is not None
    turns = [*MESSAGES, {"role": "assistant", "content": "jab"}]
    assert template.render(turns, add_generation_prompt=False) == "System: abc\nUser: def ghi\nAssistant: jab\n"
    assert ChatTemplate(PLAIN).render(turns[1:2]) == "User: def ghi\nAssistant:"
