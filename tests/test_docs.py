"""The documents against the program: their commands, the README's tree, and links. Nothing that they name is run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import terseformer
from terseformer import cli, data, training
from terseformer.bench import GROUPS
from terseformer.cli import flags
from terseformer.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"RECIPE.toml": "recipes/tiny.toml"}
MENTION = ""
"""Ends a command that a sentence speaks of by its flags alone, without what they need."""


def commands() -> Iterator[tuple[str, str]]:
    """Each command, on one line, and whether it is a line of its own or within a sentence."""
    for text in TEXT.values():
        for block in FENCE.findall(text):
            yield from ((line, "line") for line in block.replace("\\\n", " ").splitlines())
        for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            yield " ".join(span.split()), "span"
    for recipe in (ROOT / "recipes").glob("*.toml"):
        comments = re.findall(r"^#   (.*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        yield from ((line, "line") for line in comments)


def of_program(program: str) -> list[list[str]]:
    """The arguments of each command of a program, which may stand behind variables or a pipe."""
    found = set()
    for line, place in commands():
        if not re.search(rf"\b{program} ", line):
            continue
        for part in line.split(" | "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == [program]:
                is_mention = place == "span" and all(word.startswith("-") for word in words[2:])
                found.add((*(PLACEHOLDERS.get(word, word) for word in words[1:]), *([MENTION] if is_mention else [])))
    return [list(words) for words in sorted(found)]


def name(words: list[str]) -> str:
    return " ".join(words)


def whole(program: str) -> list[list[str]]:
    return [words for words in of_program(program) if words[-1] != MENTION]


TERSE = whole("terse")
MENTIONS = [words[:-1] for words in of_program("terse") if words[-1] == MENTION]
TORCHRUN = whole("torchrun")
PYTHON = [words for words in whole("python") if not words[0].startswith("-")]
MAKE = [[word for word in words if word != MENTION] for words in of_program("make")]


class Parsed(Exception):
    """The arguments are understood."""


def stop(*_: Any) -> None:
    raise Parsed


def check_terse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads a command's flags and files as the program does, and goes no further."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(flags, "call", flags.bound)
    monkeypatch.setattr(training, "train", lambda recipe, run, resume, quiet: run)
    monkeypatch.setattr(data, "prepare_in_cache", stop)
    monkeypatch.setattr("sys.argv", ["terse", *words])
    code = None
    try:
        cli.main()
    except Parsed:
        pass
    except SystemExit as end:
        code = end.code
    assert not code


def check_names(words: list[str]) -> None:
    """Files of the repository and presets."""
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("build", "data", "runs")]
    families = {preset.partition("-")[0] for preset in PRESETS}
    for word in words:
        if word.partition("/")[0] in folders and "/" in word:
            assert (ROOT / word).exists(), word
        if re.fullmatch(rf"({'|'.join(families)})-[\w.-]+", word):
            assert word in (*PRESETS, *GROUPS)


@pytest.mark.parametrize("words", TERSE, ids=name)
def test_terse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(words)
    check_terse(words, monkeypatch)


@pytest.mark.parametrize("words", MENTIONS, ids=name)
def test_mentions_of_terse(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *flags = words
    check_terse([verb, "--help"], monkeypatch)
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags)


@pytest.mark.parametrize("words", TORCHRUN, ids=name)
def test_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = get_args_parser().parse_args(words)
    assert arguments.module
    assert arguments.training_script == "terseformer"
    check_names(arguments.training_script_args)
    check_terse(arguments.training_script_args, monkeypatch)


@pytest.mark.parametrize("words", PYTHON, ids=name)
def test_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = words
    check_names(words)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *values: Any) -> None:
        parse(parser, *values)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # as Python does
    if script.startswith("benchmarks/"):
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        assert len(arguments) == 1, "an example takes the file that it writes"


@pytest.mark.parametrize("words", MAKE, ids=name)
def test_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    variables = re.findall(r"^([A-Z]+)\s*\?=", makefile, re.MULTILINE)
    for word in words:
        assert word in targets or word.partition("=")[0] in variables


def test_commands_were_found() -> None:
    assert {words[0] for words in TERSE} >= {"train", "evaluate", "generate", "info", "bench", "report", "summarize"}
    assert {words[0] for words in PYTHON} >= {"benchmarks/quality.py", "benchmarks/training_step.py"}
    assert {words[0] for words in MAKE} >= {"demo", "test", "docs", "setup"}
    assert TORCHRUN


@pytest.mark.parametrize(
    "words",
    [
        *(["trian"], ["train", "recipes/tinny.toml"], ["train", "recipes/tiny.toml", "--train.stesp", "3"]),
        *(["train", "recipes/tiny.toml", "--train.steps", "x"], ["bench", "--groups", "tinny"]),
        *(["generate", "runs/x", "a", "--temprature", "0"], ["pack", "runs/x", "--dtype", "int9"], ["pack"]),
    ],
    ids=name,
)
def test_a_wrong_command_is_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_terse(words, monkeypatch)


def test_a_wrong_name_is_found() -> None:
    for word in ("recipes/tinny.toml", "small-1m-ff65", "docs/absent.md"):
        with pytest.raises(AssertionError):
            check_names([word])


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = TEXT["README.md"].partition("## The house")[2].partition("```")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    package = ROOT / "src" / "terseformer"
    modules = {path.name for path in (*package.glob("*.py"), *package.glob("layers/*.py"))}
    assert named == {name for name in modules if not name.startswith("__")}


def test_the_reference_has_every_public_name() -> None:
    names = re.findall(r"^::: terseformer\.(\w+)$", TEXT["docs/python.md"], re.MULTILINE)
    assert sorted(names) == sorted(terseformer.__all__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT[document]):
        assert ((ROOT / document).parent / target).exists(), target
