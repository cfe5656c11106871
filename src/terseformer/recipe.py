"""Recipes: a TOML file and what the command line changes in it.

A recipe's `[model]` table holds changes to a preset (`preset = "NAME"`), or else to the default
model of its `kind`. A table of changes is merged key by key; where it names another `kind`, it replaces the whole
part. `dense_twin = true` takes the dense twin of the model that results. Flags are changes to the
recipe, of the same form: `--model.feed-forward.ff-block-size 32` is `ff_block_size = 32` under
`[model.feed_forward]`, and `--model.preset NAME` takes the place of the recipe's preset, whose changes stay. In a
recipe without one it takes the place of the whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from terseformer.config import ConfigError, ModelConfig, Recipe, Seq2SeqConfig, TerraformerConfig
from terseformer.configfile import from_dict, parse_toml, read_text, to_dict
from terseformer.folder import find
from terseformer.presets import dense_twin, preset

_Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Shortcuts:
    preset: str = ""
    """A model by name, with the changes beside it; as a flag it takes the place of the preset, and the changes stay."""
    dense_twin: bool = False
    """Take the dense Transformer of the same size in the model's stead."""


@dataclass(frozen=True, kw_only=True)
class _CausalLMTable(_Shortcuts, ModelConfig):
    """What a recipe's `[model]` table may hold."""


@dataclass(frozen=True, kw_only=True)
class _Seq2SeqTable(_Shortcuts, Seq2SeqConfig):
    """The same for an encoder-decoder."""


@dataclass(frozen=True, kw_only=True)
class _TerraformerTable(_Shortcuts, TerraformerConfig):
    """The same for a Terraformer."""


_ModelTable = _CausalLMTable | _Seq2SeqTable | _TerraformerTable
_TABLES: dict[type, type[_ModelTable]] = {
    ModelConfig: _CausalLMTable,
    Seq2SeqConfig: _Seq2SeqTable,
    TerraformerConfig: _TerraformerTable,
}


@dataclass(frozen=True, kw_only=True)
class _RecipeTable(Recipe):
    """What a recipe may hold."""

    model: _ModelTable = field(default_factory=_CausalLMTable)
    """The model."""


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        path: a TOML file.
        overrides: nested tables of changes, as `parse_flags` gives them.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (with the nearest valid one) or a wrong value.
    """
    try:
        return _resolve(parse_toml(read_text(path)), overrides or {})
    except ConfigError as error:
        raise ConfigError(f"{path}{' with the given flags' if overrides else ''}: {error}") from None


def with_initial_tokenizer(recipe: Recipe, resumed: Path | None = None) -> Recipe:
    """The recipe with the tokenizer of its `train.initial_checkpoint`, where it names one and no tokenizer.

    Args:
        recipe: the recipe.
        resumed: a checkpoint of the same run, which has a copy.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if not recipe.train.initial_checkpoint or recipe.data.tokenizer:
        return recipe
    folder = resumed or find(recipe.train.initial_checkpoint)
    return replace(recipe, data=replace(recipe.data, tokenizer=str(folder / "tokenizer.json")))


def apply_overrides(recipe: Recipe, args: Sequence[str]) -> Recipe:
    """The recipe with the changes of a command line.

    Raises:
        ConfigError: an unknown flag (with the nearest valid one) or a wrong value.
    """
    return _resolve(to_dict(recipe), parse_flags(args))


def _resolve(*layers: Mapping[str, Any]) -> Recipe:
    """The recipe that nested tables of changes describe, the later ones over the earlier."""
    table: _Table = {"model": to_dict(ModelConfig())}
    of_preset: _Table = {}  # changes of the preset so far
    for changes in layers:
        model = changes.get("model")
        if isinstance(model, Mapping):
            table["model"] = _base_model(table["model"], model)
            if model.get("preset"):
                table["model"] = _merged(table["model"], of_preset)
                of_preset = {key: value for key, value in model.items() if key not in ("preset", "kind")}
        table = _merged(table, changes)
    read = from_dict(_RecipeTable, table)
    cls = next(cls for cls, table in _TABLES.items() if type(read.model) is table)
    config = cls(**_fields_of(cls, read.model))
    return Recipe(model=dense_twin(config) if read.model.dense_twin else config, data=read.data, train=read.train)


def _base_model(old: Any, changes: Mapping[str, Any]) -> Any:
    """What a `[model]` table changes: a preset, the default model of another kind, or else the model so far."""
    name, kind = changes.get("preset"), changes.get("kind")
    if isinstance(name, str) and name:
        base = to_dict(preset(name))
        if kind not in (None, base["kind"]):
            raise ConfigError(
                f"model.preset = {name!r} is of kind {base['kind']!r}, not {kind!r}; leave one of them out"
            )
        return base
    defaults = next((to_dict(cls()) for cls in _TABLES if cls().kind == kind), None)
    return defaults if defaults and isinstance(old, Mapping) and old.get("kind") != kind else old


def _fields_of(cls: type, config: Any) -> _Table:
    return {f.name: getattr(config, f.name) for f in fields(cls)}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> _Table:
    """`base` with `changes`, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("kind") in (None, old.get("kind"))
        )
        merged[key] = _merged(old, value) if same_kind else value
    return merged


# Flags.


def parse_flags(args: Sequence[str]) -> _Table:
    """Flags as nested tables of changes.

    `--train.steps 10`, `--train.steps=10`, `--train.compile`, `--train.no-compile`,
    `--data.sources a.txt b.txt`; dashes and underscores mean the same.

    Raises:
        ConfigError: an unknown flag (with the nearest valid one), or a value that the flag cannot have.
    """
    types = dict(_flag_types(_RecipeTable))
    changes: _Table = {}
    for name, words in _flags(args):
        section, _, key = name.rpartition(".")
        positive = f"{section}.{key.removeprefix('no_')}"
        if name not in types and types.get(positive) is bool:
            name, words = positive, words or ["false"]
        if name not in types:
            near = _flag(_nearest(name, types))
            raise ConfigError(f"no such flag: {_flag(name)}; the nearest is {near}, --help lists them all")
        *sections, key = name.split(".")
        table = changes
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = _value(_flag(name), types[name], words)
    return changes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name, with underscores, and the words after it."""
    found: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(arg)
        else:
            raise ConfigError(f"{arg!r} stands before any flag; changes look like --train.steps 10")
    return iter(found)


def _flag_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The name and type of each key; of a choice of parts, those of every kind."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
        for part in inner:
            yield from _flag_types(part, f"{prefix}{f.name}.")
        if not inner:
            yield f"{prefix}{f.name}", hints[f.name]


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    """The most similar name, by the whole or by its last part."""

    def similarity(other: str) -> float:
        pairs = (name, other), (name.rpartition(".")[2], other.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(names, key=similarity)


def _value(flag: str, kind: Any, words: list[str]) -> Any:
    if kind == tuple[str, ...]:
        return words
    if kind == tuple[int, ...]:
        return [_value(flag, int, [word]) for word in words]
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise ConfigError(f"{flag} needs one value, not {' '.join(words) or 'none'}")
    word = words[0]
    if type(None) in typing.get_args(kind) and word.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[word.lower()]
        if kind is int:
            return int(word)
        if float in (kind, *typing.get_args(kind)):
            return float(word)
    except (KeyError, ValueError):
        needed = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ConfigError(f"{flag} needs {needed}, not {word!r}") from None
    return word


def show_flags(recipe: Recipe, command: str) -> None:
    """Prints the flags that change a recipe, with the values that they have there.

    Args:
        recipe: the recipe.
        command: what the usage line starts with.
    """
    import tyro

    kinds: dict[str, list[str]] = {}
    for name, kind in _flag_types(_RecipeTable):
        if name.endswith(".kind"):
            kinds.setdefault(_flag(name), []).extend(typing.get_args(kind))
    choices = "".join(f"\n  {flag}: {', '.join(dict.fromkeys(names))}" for flag, names in kinds.items())
    description = f"Flags change the recipe. Another kind of part has flags of its own; there are{choices}"
    cls = type(recipe.model)
    model = _TABLES[cls](**_fields_of(cls, recipe.model))
    with contextlib.suppress(SystemExit):
        tyro.cli(
            _RecipeTable,
            default=_RecipeTable(model=model, data=recipe.data, train=recipe.train),
            args=["--help"],
            config=(tyro.conf.AvoidSubcommands,),
            prog=command,
            description=description,
        )
