"""What may be asked, against the package that asks."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from terseformer.serve.requests import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, TextRequest

OPENAI: dict[type[TextRequest], set[str]] = {
    CompletionRequest: set(completion_create_params.CompletionCreateParamsStreaming.__annotations__)
    | set(completion_create_params.CompletionCreateParamsBase.__annotations__),
    ChatRequest: set(chat_create_params.CompletionCreateParamsStreaming.__annotations__)
    | set(chat_create_params.CompletionCreateParamsBase.__annotations__),
}
OWN = {"min_p", "no_repeat_ngram_size", "repetition_penalty", "terse", "top_k"}
SMALLEST: dict[type[TextRequest], dict[str, Any]] = {
    CompletionRequest: {"model": "m"},
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("kind", OPENAI)
def test_each_of_openais_parameters_is_known_ignored_or_refused(kind: type[TextRequest]) -> None:
    assert OPENAI[kind] - set(kind.model_fields) <= IGNORED | set(NEUTRAL)
    extra = {"response_format"} if kind is CompletionRequest else set()
    assert set(kind.model_fields) - OPENAI[kind] <= OWN | extra


def test_no_parameter_is_listed_for_nothing() -> None:
    every = set().union(*OPENAI.values())
    assert IGNORED | set(NEUTRAL) <= every
    assert not IGNORED & set(NEUTRAL)


@pytest.mark.parametrize("kind", OPENAI)
@pytest.mark.parametrize("name", sorted(IGNORED | set(NEUTRAL)))
def test_a_parameter_without_effect_is_ignored_and_another_value_refused(kind: type[TextRequest], name: str) -> None:
    smallest = kind.model_validate(SMALLEST[kind])
    for value in (None, *NEUTRAL.get(name, ("anything",))):
        assert kind.model_validate(SMALLEST[kind] | {name: value}) == smallest
    if name in NEUTRAL:
        with pytest.raises(ValidationError, match=f"does not know the parameter '{name}'"):
            kind.model_validate(SMALLEST[kind] | {name: {"some": "thing"}})


def test_messages_that_a_client_got_can_be_sent_back() -> None:
    answer = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "tool_calls": None}
    request = ChatRequest.model_validate({"model": "m", "messages": [answer]})
    assert request.messages[0].text() == "b"
    with pytest.raises(ValidationError, match="unknown parameter 'tool_calls'"):
        ChatRequest.model_validate({"model": "m", "messages": [answer | {"tool_calls": [{"id": "1"}]}]})
