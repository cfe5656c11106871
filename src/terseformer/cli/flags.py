"""Flags: made from functions' signatures, or from a recipe's keys."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terseformer.errors import UserError

if TYPE_CHECKING:
    from terseformer.config import Recipe


def call(verb: str, function: Callable[..., Any], args: Sequence[str]) -> Any:
    """Calls a function with flags made from its signature; parameters before `/` have none.

    Args:
        verb: for messages.
        function: its parameters are the flags, and what its docstring says of them is their help.
        args: the command line after the verb.

    Raises:
        UserError: a flag or a value is not possible.
    """
    return bound(verb, function, args)()


def bound(verb: str, function: Callable[..., Any], args: Sequence[str]) -> Callable[[], Any]:
    """The function with the values of the flags."""
    import tyro

    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        has_fields = dataclasses.is_dataclass(parameter.default)
        renamed = [item.name for item in getattr(parameter.annotation, "__metadata__", ())]  # by tyro.conf.arg
        names += [f.name for f in dataclasses.fields(parameter.default)] if has_fields else renamed or [name]
        names += [f"no_{name}"] if isinstance(parameter.default, bool) else []
    flags = ["--help", *(f"--{name.replace('_', '-')}" for name in names)]
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise UserError(f"no such flag: {flag}; the nearest is {nearest(flag, flags)}, --help lists them all")

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *values, **named)

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(bind, args=list(args), prog=f"terse {verb}", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()[1:]]
        raise UserError(f"{' '.join(lines[: lines.index('')])}; terse {verb} --help lists what there is") from None


def recipe_of(verb: str, args: Sequence[str]) -> tuple[Recipe, Path]:
    """The recipe that a command line names, with its changes, and the recipe's path; or help, and the end."""
    from terseformer.config import Recipe
    from terseformer.recipe import load_recipe, parse_flags, show_flags

    path = Path(args[0]) if args and not args[0].startswith("-") else None
    if wants_help(args):
        show_flags(load_recipe(path) if path else Recipe(), f"terse {verb} RECIPE.toml")
        sys.exit()
    if path is None:
        raise UserError(f"terse {verb} needs a recipe first, such as: terse {verb} recipes/small-1m.toml")
    return load_recipe(path, parse_flags(args[1:])), path


def take(
    args: Sequence[str], flag: str, takes_value: bool = True, needs_value: bool = False
) -> tuple[Sequence[str], str | None]:
    """Takes a flag and its value out of a command line: (the rest, None if absent, "" if bare)."""
    for index, arg in enumerate(args):
        if takes_value and arg.startswith(f"{flag}="):
            return [*args[:index], *args[index + 1 :]], arg.partition("=")[2]
        if arg == flag:
            follows = args[index + 1 : index + 2]
            has_value = takes_value and bool(follows) and not follows[0].startswith("--")
            if needs_value and not has_value:
                raise UserError(f"{flag} needs a value")
            return [*args[:index], *args[index + 1 + has_value :]], follows[0] if has_value else ""
    return args, None


def wants_help(args: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return "--help" in args or "-h" in args


def nearest(word: str, words: Any) -> str:
    """The word that is most like what was given."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
