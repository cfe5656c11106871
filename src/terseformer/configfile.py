"""Configurations as TOML, JSON and plain dictionaries, both ways.

Reading is strict: an unknown key is an error that names the nearest valid one, and no value is
converted silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs
import cattrs.errors
import tomli_w

from terseformer.config import ConfigError, EncoderDecoderConfig, ModelConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_UNSAID = "causal_lm"
"""The kind of a model whose table says none."""


class _Misfit(ConfigError):
    """A value of the wrong sort; the message lacks the path of its key."""


def _strict(kind: type, allowed: tuple[type, ...]) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            raise _Misfit(f"needs {kind.__name__}, not {value!r}")
        return kind(value)

    return structure


def _unknown_key(key: str, cls: type) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return f"no such key; the nearest is {near[0]!r}, allowed are {', '.join(names)}"


def _is_kind_union(kind: Any) -> bool:
    members = typing.get_args(kind)
    return len(members) > 1 and all(dataclasses.is_dataclass(cls) and hasattr(cls, "kind") for cls in members)


def _kind_union(union: Any) -> Any:
    members = {typing.get_type_hints(cls)["kind"].__args__[0]: cls for cls in typing.get_args(union)}

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Misfit(f"needs a table with a kind, not {value!r}")
        kind = value.get("kind", _UNSAID if _UNSAID in members else None)
        if not isinstance(kind, str) or kind not in members:
            near = difflib.get_close_matches(str(kind), members, n=1, cutoff=0.0)[0]
            raise _Misfit(f"kind = {kind!r} is unknown; the nearest is {near!r}, allowed are {', '.join(members)}")
        return _converter.structure(value, members[kind])

    return structure


def _literal(value: Any, kind: Any) -> Any:
    allowed = typing.get_args(kind)
    if value not in allowed:
        raise _Misfit(f"needs one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def _string_tuple(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _Misfit(f"needs a list of strings, not {value!r}")
    return tuple(value)


def _number_tuple(value: Any, _: Any) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and all(isinstance(item, int) and item is not True for item in value)
    if not whole:
        raise _Misfit(f"needs a list of whole numbers, not {value!r}")
    return tuple(value)


_converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
_converter.register_structure_hook(int, _strict(int, (int,)))
_converter.register_structure_hook(float, _strict(float, (int, float)))
_converter.register_structure_hook(bool, _strict(bool, (bool,)))
_converter.register_structure_hook(str, _strict(str, (str,)))
_converter.register_structure_hook_func(lambda t: t == tuple[str, ...], _string_tuple)
_converter.register_structure_hook_func(lambda t: t == tuple[int, ...], _number_tuple)
_converter.register_structure_hook_func(lambda t: typing.get_origin(t) is Literal, _literal)
_converter.register_structure_hook_factory(_is_kind_union, _kind_union)


def _first_error(error: BaseException, path: str) -> str:
    """The first mistake of a nested validation error, with the path of its key."""
    if isinstance(error, cattrs.errors.ForbiddenExtraKeysError):
        key = sorted(error.extra_fields)[0]
        return f"{path}{'.' if path else ''}{key}: {_unknown_key(key, error.cl)}"
    if isinstance(error, cattrs.errors.BaseValidationError):
        attributes, others = error.group_exceptions()
        if others:
            return _first_error(others[0], path)
        inner, note = attributes[0]
        return _first_error(inner, f"{path}{'.' if path else ''}{getattr(note, 'name', note)}")
    if isinstance(error, _Misfit):
        return f"{path}: {error}" if path else str(error)
    if isinstance(error, ConfigError):
        return str(error)
    return f"{path or 'the file'} needs a table"


def from_dict(cls: type[T], values: Any) -> T:
    """Builds a configuration from plain dictionaries, lists, strings and numbers.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__} needs a table, not {values!r}")
    return _structured(cls, values)


def model_from_dict(values: Mapping[str, Any]) -> ModelConfig | EncoderDecoderConfig:
    """A model of any kind; without a `kind`, a causal language model. Raises ConfigError."""
    return _structured(ModelConfig | EncoderDecoderConfig, values)


def _structured(kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return _converter.structure(values, kind)
    except (cattrs.errors.BaseValidationError, ConfigError) as error:
        raise ConfigError(_first_error(error, "")) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries, lists, strings and numbers; `None` fields are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in items if item is not None}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def from_json(cls: type[T], text: str) -> T:
    """Reads a configuration from JSON text. Raises ConfigError."""
    try:
        return from_dict(cls, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON: {error}") from None


def to_json(config: Any) -> str:
    """Writes a configuration as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_toml(cls: type[T], text: str) -> T:
    """Reads a configuration from TOML text. Raises ConfigError."""
    return from_dict(cls, parse_toml(text))


def to_toml(config: Any) -> str:
    """Writes a configuration as TOML."""
    return tomli_w.dumps(to_dict(config))


def parse_toml(text: str) -> dict[str, Any]:
    """TOML text as dictionaries. Raises ConfigError where it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises ConfigError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
