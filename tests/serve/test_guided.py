"""JSON by a schema, by a model that has never seen any."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError

from served import PROMPT, ServerProcess

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]


def check(text: str) -> None:
    animal = json.loads(text)
    assert set(animal) == set(SCHEMA["required"])
    assert isinstance(animal["name"], str)
    assert len(animal["name"]) <= 5
    assert 0 <= animal["age"] <= 99
    assert animal["kind"] in ("cat", "dog")
    assert len(animal["tags"]) <= 2
    assert set(animal["tags"]) <= {True, False}


@pytest.mark.parametrize("stream", [False, True])
def test_texts_follow_the_schema(stream: bool, server: ServerProcess) -> None:
    """Several together, with others beside them; the same seed gives the same."""
    create = server.client().chat.completions.create
    ask: dict[str, Any] = {"model": "small", "messages": MESSAGES, "response_format": FORMAT, "n": 4, "seed": 1}
    texts = [""] * 4
    if stream:
        for chunk in create(stream=True, **ask):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        done = create(**ask)
        texts = [choice.message.content for choice in done.choices]
        assert {choice.finish_reason for choice in done.choices} == {"stop"}
        assert [choice.message.content for choice in create(**ask).choices] == texts
    for text in texts:
        check(text)
    assert len(set(texts)) > 1


def test_a_completion_too_and_with_log_probabilities(server: ServerProcess) -> None:
    done = server.client().completions.create(
        model="small", prompt=PROMPT, max_tokens=120, logprobs=1, extra_body={"response_format": FORMAT}
    )
    text, scores = done.choices[0].text, done.choices[0].logprobs
    check(text)
    assert len(scores.tokens) == done.usage.completion_tokens
    assert text.startswith(scores.tokens[0])
    assert scores.token_logprobs[0] < -1  # as the model sees it, which would not begin so


def test_any_object_and_plain_text(server: ServerProcess) -> None:
    create = server.client().chat.completions.create
    done = create(model="small", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=60, seed=1)
    assert done.choices[0].message.content.startswith("{")
    plain = {"model": "small", "messages": MESSAGES, "max_tokens": 10, "seed": 1}
    assert (
        create(response_format={"type": "text"}, **plain).choices[0].message.content
        == create(**plain).choices[0].message.content
    )


def test_an_encoder_decoder_follows_it(server: ServerProcess) -> None:
    kind = {"type": "json_schema", "json_schema": {"name": "kind", "schema": {"enum": ["cat", "dog"]}}}
    done = server.client().completions.create(model="pairs", prompt="abc", extra_body={"response_format": kind})
    assert done.choices[0].text in ('"cat"', '"dog"')
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "the JSON schema cannot be used"),
        ({"$ref": "https://example.com/schema"}, "the JSON schema cannot be used"),
        ({"type": "string", "pattern": "("}, "the JSON schema cannot be used"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "the JSON schema cannot be used"),
        (None, "json_schema"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed(schema: Any, message: str, server: ServerProcess) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    with pytest.raises(BadRequestError) as caught:
        server.client().chat.completions.create(model="small", messages=MESSAGES, response_format=given)
    assert message in caught.value.message
