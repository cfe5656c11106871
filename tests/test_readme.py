"""The README against the program: its commands, its tree and its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from terseformer import cli
from terseformer.presets import PRESETS
from terseformer.recipe import load_recipe, parse_flags

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/results.md", "docs/huggingface.md")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
LINES = sorted({line.partition("#")[0].strip() for text in TEXT.values() for line in text.splitlines()})
TERSE = [line for line in LINES if line.startswith("terse ")]


@pytest.mark.parametrize("line", [line for line in TERSE if line.startswith("terse train ")])
def test_a_training_command_names_a_recipe_and_flags_that_exist(line: str) -> None:
    rest = shlex.split(line)[2:]
    for flag, options in {"--out": {}, "--resume": {}, "--quiet": {"takes_value": False}}.items():
        rest, _ = cli._take(rest, flag, **options)
    load_recipe(ROOT / rest[0], parse_flags(rest[1:]))


@pytest.mark.parametrize("line", [line for line in TERSE if not line.startswith("terse train ")])
def test_another_command_has_flags_that_exist(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, verb, *rest = shlex.split(line)
    monkeypatch.setattr("sys.argv", ["terse", verb, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (None, 0)
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in rest if flag.startswith("--"))
    assert all(name in PRESETS for name in rest if name.startswith("small-"))


def test_commands_were_found() -> None:
    assert {line.split()[1] for line in TERSE} >= {"train", "evaluate", "generate", "info", "bench"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", TEXT[name], re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = TEXT["README.md"].partition("## The house")[2].partition("```")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    package = ROOT / "src" / "terseformer"
    modules = {path.name for path in (*package.glob("*.py"), *package.glob("layers/*.py"))}
    assert named == {name for name in modules if not name.startswith("__")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT[name]):
        assert ((ROOT / name).parent / target).exists(), target
