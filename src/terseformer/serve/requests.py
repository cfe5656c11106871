"""What may be asked: OpenAI's parameters and a few of our own, checked at the edge.

Parameters of OpenAI's that this server does not know are refused where they would change the text, and otherwise
ignored: `IGNORED` and `NEUTRAL` say which, and a test holds them against the `openai` package.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from terseformer.sampling import SamplingConfig
from terseformer.serve.errors import nearest, short

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters that change nothing of the text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that would change the text, and the values that do not; null never does."""

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]


class _Strict(BaseModel):
    """Knows no parameters but its own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in map(str, values):
                if name not in known:
                    raise ValueError(f"unknown parameter {short(name)!r}; the nearest is {nearest(name, known)!r}")
        return values


class StreamOptions(_Strict):
    """How a text is streamed."""

    include_usage: bool = False
    """End with a chunk that counts all tokens."""
    include_obfuscation: bool = False
    """Accepted and ignored: no padding is added."""


class JsonSchema(_Strict):
    """A schema by which a text is written."""

    name: str
    """Changes nothing."""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    """JSON Schema, as far as llguidance knows it."""
    description: str | None = None
    """Changes nothing."""
    strict: bool | None = None
    """Changes nothing: the schema is always kept to."""


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Extension(_Strict):
    """What is asked of this server alone."""

    trace: bool = False
    """Add to each chunk of a stream the field `terse`: the `pieces` of the text token by token, and of the tokens that
    were read the `units` chosen in each block of each layer, with how many of them were `active`."""


class TextRequest(_Strict):
    """What requests for texts have in common."""

    model: str
    """One of `/v1/models`."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Below 1 likely tokens become likelier; 0 always takes the likeliest; default 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw only from the fewest tokens that have this probability together."""
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    """Draw only from the k likeliest tokens; 0: from all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw only from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Above 1 makes tokens of prompt and text less likely."""
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1 << 20)
    """No sequence of so many tokens stands twice in prompt and text; 0: it may."""
    n: int | None = Field(None, ge=1)
    """Texts for each prompt."""
    max_tokens: int | None = Field(None, ge=0)
    """Tokens of a text at most."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    """Strings before which a text ends."""
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    """The same seed gives the same text."""
    stream: bool | None = None
    """Send the text as it is written."""
    stream_options: StreamOptions | None = None
    """How it is sent then."""
    response_format: ResponseFormat | None = None
    """Any text, or JSON."""
    terse: Extension | None = None
    """Not OpenAI's."""

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_effects(cls, values: Any) -> Any:
        """Takes out what changes nothing, before the rest is looked at."""
        if not isinstance(values, dict):
            return values
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("the request has half of a surrogate pair, which is no text") from None
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields or not (name in IGNORED or name in NEUTRAL):
                kept[name] = value
            elif name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise ValueError(f"this server does not know the parameter {name!r}; leave it out")
        return kept

    def stops(self) -> tuple[str, ...]:
        """The strings before which a text ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_new_tokens: int, stops: tuple[str, ...]) -> SamplingConfig:
        """How texts are drawn."""
        given = {
            name: getattr(self, name)
            for name in ("top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")
            if getattr(self, name) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, stop=stops, **given)


class CompletionRequest(TextRequest):
    """Continue each prompt, or make a text of each source."""

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)] | None = None
    """A text, or its tokens; one or several. Without one, a document begins."""
    echo: bool | None = None
    """Give the prompt back before the text."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Give each token's log-probability, and those of so many of the likeliest tokens."""


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who; `developer` is another name for `system`."""
    content: str | list[TextPart]
    """What."""
    name: str | None = None
    """Changes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, values: Any) -> Any:
        """Takes out the empty fields that a message has which came from a client's last response."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name == "content" or value not in (None, [], {})}

    def text(self) -> str:
        """All of its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(TextRequest):
    """Say what comes next in a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Tokens of a text at most; default: as many as fit."""
    logprobs: bool | None = None
    """Give each token's log-probability."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """Give those of so many of the likeliest tokens, too."""
