"""How a conversation becomes a prompt: by the checkpoint's chat template, or a plain one.

A template is a Jinja program in `chat_template.jinja` or in `tokenizer_config.json`, as Hugging Face's tokenizers have
it. It runs in a sandbox, without access to anything but the messages.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from terseformer.data import DataError, end_of_text_id
from terseformer.errors import UserError
from terseformer.sampling import GenerationError

PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}"""
"""For models that were trained on texts alone: a line for each message, and the beginning of the next."""
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""Where an answer to the plain template ends."""


class ChatTemplate:
    """Makes prompts of conversations.

    Args:
        source: the Jinja program.
        tokens: names of special tokens, `bos_token` and `eos_token`.
        stops: strings that end an answer, besides those that a request gives.

    Raises:
        UserError: it is no Jinja program.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, stops: tuple[str, ...] = ()) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source, {"raise_exception": _refuse, "strftime_now": _now})
        except TemplateError as error:
            raise UserError(f"the chat template is no Jinja program: {error}") from None
        self._tokens, self.stops = dict(tokens or {}), stops

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt whose continuation is the next message.

        Args:
            messages: `role` and `content` of each.
            add_generation_prompt: end with the beginning of the assistant's answer.

        Raises:
            GenerationError: the template does not take these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise GenerationError(f"the model's chat template does not take these messages: {error}") from None


def load_template(checkpoint: Path, tokenizer: Tokenizer, plain: bool) -> ChatTemplate | None:
    """The chat template of a checkpoint's folder.

    Args:
        checkpoint: the folder.
        tokenizer: the model's.
        plain: take the plain template where there is no other.

    Raises:
        UserError: it cannot be read, or is no Jinja program.
    """
    values = _read_json(checkpoint / "tokenizer_config.json")
    source, file = values.get("chat_template"), checkpoint / "chat_template.jinja"
    if isinstance(source, list):  # several by name
        source = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}.get(
            "default"
        )
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    tokens = {name: _content(values.get(name)) for name in ("bos_token", "eos_token")}
    if not tokens["eos_token"]:
        tokens["eos_token"] = _end_of_text(tokenizer)
    if isinstance(source, str):
        return ChatTemplate(source, tokens)
    return ChatTemplate(PLAIN, tokens, PLAIN_STOPS) if plain else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def _content(token: Any) -> str:
    """A special token's name, which may stand in a structure of its own."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _end_of_text(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.id_to_token(end_of_text_id(tokenizer)) or ""
    except DataError:
        return ""


def _to_json(value: Any, indent: int | None = None) -> str:
    """As Hugging Face's tokenizers do it: without the escapes that Jinja's own filter makes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
