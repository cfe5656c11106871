"""The command line: what each verb does, and one line for each mistake."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import terseformer
from runs import make_recipe, train_losses, write_text
from terseformer import checkpoint, cli
from terseformer.configfile import to_toml
from terseformer.data import load_tokenizer
from terseformer.generation import generate
from terseformer.sampling import SamplingConfig

VERBS = (
    "bench",
    "chat",
    "convert",
    "data",
    "demo",
    "evaluate",
    "generate",
    "info",
    "pack",
    "report",
    "serve",
    "summarize",
    "train",
)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def terse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["terse", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a text, `mine.toml` for it and the run that came of it."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSE_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "100")
        patch.chdir(folder)
        text = write_text(folder / "text.jsonl")
        (folder / "mine.toml").write_text(to_toml(make_recipe(text, steps=3, sample_prompt="abc")))
        patch.setattr(sys, "argv", ["terse", "train", "mine.toml", "--quiet"])
        cli.main()
        yield folder


# Help.


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_shows_each_verb(args, terse):
    result = terse(*args)
    assert (result.code, result.err) == (0, "")
    assert all(f"\n  terse {verb}" in result.out for verb in VERBS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("bench", ["--groups", "--repetitions", "--threads", "--plot"]),
        ("data", ["--data.sources", "--data.vocab-size"]),
        ("demo", ["--model", "--steps", "--out"]),
        ("evaluate", ["--files", "--sequences", "--num-beams"]),
        ("generate", ["--temperature", "--top-p", "--stop", "--seed", "--num-beams", "--no-repeat-ngram-size"]),
        ("info", ["--context"]),
        ("report", ["--out", "--no-speed"]),
        ("serve", ["--host", "--port", "--api-key", "--max-queue", "--cache-memory", "--dtype"]),
        ("train", ["--out", "--resume", "--quiet", "--train.steps", "--model.feed-forward.kind"]),
    ],
)
def test_help_of_a_verb_opens_with_examples(verb, flags, flag, terse):
    result = terse(verb, flag)
    assert (result.code, result.err) == (0, "")
    assert re.match(rf"  terse {verb}\b", result.out)
    assert "terse VERB" not in result.out
    assert all(flag in result.out for flag in ["usage: ", *flags])


def test_help_of_train_shows_the_recipes_values(folder, terse):
    result = terse("train", "mine.toml", "--help")
    assert result.code == 0
    assert re.search(r"--train.steps INT[\s│]+Optimiser steps. \(default: 3\)", result.out)


def test_examples_of_the_usage_are_possible(terse):
    """Each example's flags exist; the recipes that it names do too."""
    for line in terse().out.splitlines():
        if found := re.match(r"  (?:terse|torchrun .* terseformer) (\w+) (.*?)(?:  |$)", line):
            verb, rest = found.groups()
            if verb == "VERB":
                continue
            for flag in re.findall(r"--[\w.-]+", rest):
                assert flag in terse(verb, "--help").out
            for recipe in re.findall(r"\S+\.toml", rest):
                assert (Path(__file__).parents[1] / recipe).exists()


def test_version(terse):
    assert terse("--version").out == f"{terseformer.__version__}\n"


def test_help_does_not_import_torch():
    code = "import sys; from terseformer.cli import main; main(); assert 'torch' not in sys.modules; print('end')"
    environment = os.environ | {"PYTHONPATH": str(Path(terseformer.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("end\n")


# Mistakes.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no such verb: trian; the nearest is train"),
        (["train"], "terse train needs a recipe first"),
        (["data", "--data.vocab-size", "300"], "terse data needs a recipe first"),
        (["train", "nowhere.toml"], "nowhere.toml: cannot read"),
        (["train", "mine.toml", "--train.step", "3"], "no such flag: --train.step; the nearest is --train.steps"),
        (["train", "mine.toml", "--resum"], "no such flag: --resum"),
        (["train", "mine.toml", "--train.steps", "x"], "--train.steps needs a whole number, not 'x'"),
        (["train", "mine.toml", "--out"], "--out needs a value"),
        (["train", "mine.toml"], "runs/mine holds checkpoints already"),
        (["train", "mine.toml", "--resume", "--train.batch-size", "8"], "train.batch_size = 8, but"),
        (["train", "mine.toml", "--resume", "elsewhere"], "no checkpoint at elsewhere"),
        (["train", "mine.toml", "--out", "new", "--data.sources", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["evaluate"], "Missing from terse evaluate: PATH"),
        (["evaluate", "elsewhere"], "no checkpoint at elsewhere"),
        (["evaluate", "runs/mine", "--file", "a.txt"], "no such flag: --file; the nearest is --files"),
        (["evaluate", "runs/mine", "--files", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (
            ["generate", "runs/mine", "a", "--num-beams", "2", "--top-k", "5"],
            "beams draw nothing, so that top_k (5) is in",
        ),
        (["evaluate", "runs/mine", "--sequences", "x"], "--sequences: invalid literal"),
        (["evaluate", "runs/mine", "--sequences"], "Missing value for argument '--sequences'"),
        (["generate", "runs/mine", "a", "b"], "Unrecognized options: b"),
        (["generate", "runs/mine", "a", "--temprature=0"], "no such flag: --temprature; the nearest is --temperature"),
        (["generate", "runs/mine", "a", "--top-p", "2"], "top_p must be above 0 and at most 1, not 2.0"),
        (["generate", "runs/mine", "a" * 500], "leaves no room in the model's context of 32"),
        (["info", "tinny"], "'tinny' is neither a folder nor a recipe (.toml), and no preset 'tinny'"),
        (["info", "."], "neither config.json nor step-"),
        (["bench", "--group", "tiny"], "no such flag: --group; the nearest is --groups"),
        (["bench", "--groups", "tinny"], "'tinny'"),
        (["demo", "--stesp", "3"], "no such flag: --stesp; the nearest is --steps"),
        (["report"], "terse report needs a run's folder"),
        (["report", "runs/mine", "--no-sped"], "no such flag: --no-sped; the nearest is --no-speed"),
        (["report", "elsewhere"], "no checkpoint at elsewhere"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(args, message, folder, terse):
    result = terse(*args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("terse: ")
    assert message in result.err
    assert not re.search("[│─╭]", result.err)


def test_a_file_in_the_way(folder, terse):
    result = terse("train", "mine.toml", "--out", "text.jsonl")
    assert result.code == 2
    assert result.err.startswith("terse: ")
    assert "text.jsonl" in result.err.splitlines()[-1]


def test_ctrl_c(monkeypatch, terse):
    def press(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.training, "demo", press)
    result = terse("demo")
    assert (result.code, result.out, result.err) == (130, "", "")


# What the verbs do.


def test_data(folder, terse):
    result = terse("data", "mine.toml", "--data.vocab-size", "280")
    assert result.code == 0
    assert re.search(r"^train: \d+ documents, [\d,]+ tokens, [\d.]+ MB, [\d.]+ bytes per token: ", result.out, re.M)
    assert re.search(r"^validation: \d+ documents, ", result.out, re.M)
    assert re.search(r"^tokenizer: 280 tokens: .*tokenizer\.json$", result.out, re.M)
    assert "tokens: 40 documents" in result.err


def test_train_says_what_comes_next(folder, terse):
    result = terse("train", "mine.toml", "--train.steps", "2", "--out=runs/short")
    assert result.code == 0
    assert result.out == (
        "trained: runs/short/step-00000002\n\n  terse evaluate runs/short\n  terse generate runs/short 'abc'\n"
    )
    assert "validation loss" in result.err
    assert len(train_losses(Path("runs/short"))) == 2


def test_resume_bare_and_with_a_path(folder, terse):
    for args, out in ((["--resume"], "runs/mine"), (["--resume=runs/mine", "--out", "runs/other"], "runs/mine")):
        result = terse("train", "mine.toml", "--quiet", *args)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(f"trained: {out}/step-00000003\n")


def test_evaluate(folder, terse):
    (folder / "other.txt").write_text("abc def " * 50)
    whole, some = terse("evaluate", "runs/mine"), terse("evaluate", "runs/mine", "--sequences", "2")
    other = terse("evaluate", checkpoint.find("runs/mine"), "--files", "other.txt", "other.txt")
    for result in (whole, some, other):
        assert (result.code, result.err) == (0, "")
        assert re.match(
            r"loss +\d\.\d{4} nats per token\nperplexity +\d+\.\d\d\nbits per byte +\d\.\d{4}\n", result.out
        )
    assert "tokens          24 in" in some.out
    engine = terse("evaluate", "runs/mine", "--backend", "engine")
    assert engine.out.splitlines()[0] == whole.out.splitlines()[0]
    assert terse("evaluate", "runs/mine", "--backend", "engine", "--dtype", "int8").code == 0
    assert terse("evaluate", "runs/mine", "--dtype", "int8").err == (
        "terse: --dtype is the engine's; give --backend engine too\n"
    )
    assert terse("evaluate", "runs/mine", "--num-beams", "2").err == (
        "terse: a causal language model is evaluated without writing; leave out the flags of sampling\n"
    )
    assert len({result.out.splitlines()[0] for result in (whole, some, other)}) == 3


def test_generate_streams(folder, terse, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *values, **how: pieces.append((*values, how)))
    terse("generate", "runs/mine", "abc", "--temperature", "0", "--max-new-tokens", "9", "--backend", "torch")
    texts = [text for text, how in pieces[:-1] if how == {"end": "", "flush": True}]
    model, tokenizer = checkpoint.load("runs/mine"), load_tokenizer(checkpoint.find("runs/mine"))
    [expected] = generate(model, tokenizer, "abc", SamplingConfig(temperature=0.0, max_new_tokens=9))
    assert len(texts) > 2
    assert "".join(texts) == f"abc{expected.text}"


def test_generate_flags(folder, terse):
    first, again, other = (
        terse("generate", "--seed", seed, "runs/mine", "--max-new-tokens=20", "abc").out for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith("abc")
    stopped = terse("generate", "runs/mine", "abc", "--seed", "1", "--max-new-tokens", "20", "--stop", first[10:12]).out
    assert first.startswith(stopped.removesuffix("\n"))
    assert len(stopped) < len(first)
    assert terse("generate", "runs/mine").code == 0


def test_generate_by_engine_and_by_pytorch(folder, terse):
    flags = ("--temperature", "0", "--max-new-tokens", "12")
    engine = terse("generate", "runs/mine", "abc", *flags)
    assert engine.err.startswith("engine: ")
    assert terse("generate", "runs/mine", "abc", *flags, "--backend", "torch").out == engine.out
    assert "1 threads, int8" in terse("generate", "runs/mine", "abc", "--dtype", "int8", "--threads", "1").err
    refused = terse("generate", "runs/mine", "abc", "--backend", "torch", "--dtype", "bf16")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_pack_and_chat(folder, terse, monkeypatch):
    packed = terse("pack", "runs/mine", "--dtype", "bf16").out
    assert re.fullmatch(r"runs/mine/step-00000003/packed-bf16\.safetensors: [\d.]+ MB\n", packed)
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    chat = terse("chat", "runs/mine", "--max-new-tokens", "3")
    assert (chat.code, chat.out.count("> ")) == (0, 2)


def test_report(folder, terse):
    result = terse("report", "runs/mine", "--no-speed")
    assert (result.code, result.out, result.err) == (0, "report: runs/mine/report.html\n", "")
    assert Path("runs/mine/report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("model", ["tiny", "mine.toml", "runs/mine", "runs/mine/step-00000003"])
def test_info(model, folder, terse):
    result = terse("info", model, "--context", "10")
    assert (result.code, result.err) == (0, "")
    assert "feed_forward" in result.out


def test_reader_that_goes_away(folder):
    command = f"{sys.executable} -m terseformer generate runs/mine abc | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(Path(terseformer.__file__).parents[1])}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["engine"]
