"""Summaries of files and of the validation text, by a small encoder-decoder that was really trained."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from runs import make_recipe, write_text
from terseformer import cli
from terseformer.config import (
    ConfigError,
    DataConfig,
    DenseFeedForwardConfig,
    PairsConfig,
    Recipe,
    Seq2SeqConfig,
    SpanCorruptionConfig,
    TrainConfig,
)
from terseformer.errors import UserError
from terseformer.generation import generate
from terseformer.sampling import DEFAULT_SUMMARY, GenerationError, SamplingConfig
from terseformer.summarizing import Summarizer, read_source, summarize_files
from terseformer.training import train

WORDS = ("red", "green", "blue", "cat", "dog", "mat", "sat", "ran", "hat")


def recipe(rows: Path, **train: object) -> Recipe:
    model = Seq2SeqConfig(
        vocab_size=300,
        hidden_size=16,
        num_attention_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_position_embeddings=40,
        feed_forward=DenseFeedForwardConfig(intermediate_size=32),
    )
    data = DataConfig(sources=(str(rows),), target_field="title", vocab_size=300, validation_fraction=0.2)
    objective = PairsConfig(max_target_length=12)
    small = {"steps": 3, "batch_size": 4, "sequence_length": 24, "objective": objective, "evaluate_sequences": 4}
    return Recipe(model=model, data=data, train=TrainConfig(**small | train))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("summaries")
    draw = random.Random(0)
    texts = [draw.choices(WORDS, k=draw.randint(3, 9)) for _ in range(50)] + [[*WORDS] * 9] * 3
    rows = [{"text": " ".join(words), "title": " ".join(words[:2])} for words in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSE_CACHE", str(folder / "cache"))
        train(recipe(folder / "rows.jsonl"), folder / "run", quiet=True)
        yield folder / "run"


@pytest.fixture(scope="module")
def summarizer(run: Path) -> Summarizer:
    return Summarizer(run)


def test_summaries_come_in_the_order_of_the_texts(summarizer: Summarizer) -> None:
    texts = [" ".join(WORDS[:n]) for n in (5, 1, 7, 2)] * 5
    expected = [
        generate(summarizer.model, summarizer.tokenizer, text, DEFAULT_SUMMARY)[0].text.strip() for text in texts
    ]
    assert summarizer.summarize(texts) == expected
    assert len(set(expected)) > 1
    assert summarizer.summarize([]) == []


def test_files(summarizer: Summarizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffred cat sat\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("blue dog", encoding="utf-8")
    files = [(path, read_source(path)) for path in (tmp_path / "a.txt", tmp_path / "b.txt")]
    summaries = list(summarize_files(summarizer, files))
    assert summaries == [summarizer.summarize(["red cat sat"]), summarizer.summarize(["blue dog"])]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"red cat")))
    assert read_source(Path("-")) == "red cat"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; there is nothing to summarise"),
        (b" \n\t", "is empty; there is nothing to summarise"),
        (b"cat\0dog", "is no text: it has a zero byte at offset 3; give a text file"),
        (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3 cannot be decoded; convert it to UTF-8"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_cannot_be_summarised(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_source(path)
    assert str(error.value) == f"{path} {message}"


def test_a_standard_input_that_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b" ")))
    with pytest.raises(UserError, match="the standard input is empty"):
        read_source(Path("-"))


def test_a_long_source_is_refused_or_divided_and_never_cut(summarizer: Summarizer, tmp_path: Path) -> None:
    path, short = (tmp_path / "long.txt", " ".join(WORDS * 30)), (tmp_path / "short.txt", "red cat")
    with pytest.raises(UserError, match=r"long\.txt has \d+ tokens, but the model reads 40 at most .* give --divide"):
        list(summarize_files(summarizer, [short, path]))
    (summaries, other) = summarize_files(summarizer, [path, short], divide=True)
    assert len(summaries) > 3
    assert other == summarizer.summarize(["red cat"])


@pytest.mark.parametrize(
    "text",
    [
        " ".join(WORDS * 30),
        "\n\n".join(" ".join(WORDS[:n]) for n in range(1, 9)) * 4,
        "x" * 500,
        "\N{SNOWMAN}" * 100,
        "a. b. " * 200,
        " " * 300 + "red",
        "red",
    ],
)
def test_parts_hold_all_of_a_text_and_fit(summarizer: Summarizer, text: str) -> None:
    parts = list(summarizer.parts(text))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(1 <= summarizer.num_tokens(part) <= summarizer.limit for part in parts)
    words = {word for part in parts for word in part.split()}
    assert words <= set(text.split()) or " " not in text


@pytest.mark.parametrize("length", range(1, 30))
def test_parts_of_a_tokenizer_that_ends_texts_itself(summarizer: Summarizer, length: int) -> None:
    other = copy.copy(summarizer)
    other.config = replace(summarizer.config, max_position_embeddings=8)
    other.tokenizer = Tokenizer.from_str(summarizer.tokenizer.to_str())
    other.tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    parts = list(other.parts("x" * length))
    assert "".join(parts) == "x" * length
    assert all(len(part) == 8 for part in parts[:-1])


def test_a_character_that_is_longer_than_the_model(summarizer: Summarizer) -> None:
    small = copy.copy(summarizer)
    small.config = replace(summarizer.config, max_position_embeddings=3)
    with pytest.raises(GenerationError, match="'😀' alone has more tokens than the 3 that the model reads"):
        list(small.parts("red 😀😀"))


def test_pairs_that_are_too_long_are_told_of(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(run.parent / "rows.jsonl", steps=1), tmp_path / "run")
    assert "pairs are left out: they are longer than train.sequence_length or" in capsys.readouterr().err


def test_evaluation(summarizer: Summarizer) -> None:
    result = summarizer.evaluate()
    assert set(result.rouge) == {"model", "first sentence", "first words", "whole source"}
    assert result.rouge["first words"]["rouge1"].mid > 60  # of what the title is made
    assert 0 < result.num_pairs < 25
    assert result.evaluation.tokens > 2 * result.num_pairs
    source, reference, _ = result.examples[0]
    assert source.startswith(reference)
    few = summarizer.evaluate(3)
    assert few.num_pairs == 3


def test_without_pairs_there_is_a_loss_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    pairs, text = recipe(run), write_text(tmp_path / "text.jsonl")
    data = DataConfig(sources=(str(text),), vocab_size=300, num_sentinels=4, validation_fraction=0.2)
    spans = replace(pairs, data=data, train=replace(pairs.train, objective=SpanCorruptionConfig()))
    train(spans, tmp_path / "spans", quiet=True)
    result = Summarizer(tmp_path / "spans").evaluate(2)
    assert result.evaluation.loss > 0
    assert not result.rouge


def test_a_language_model_reads_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    train(make_recipe(write_text(tmp_path / "text.jsonl"), steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="holds a model of kind 'causal_lm', which reads no sources"):
        Summarizer(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "by"), [((), "engine"), (("--dtype", "int8"), "engine"), (("--backend", "torch"), "")]
)
def test_the_command_writes_by_the_backend_that_was_asked_for(
    run: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("red cat sat")
    monkeypatch.setattr(sys, "argv", ["terse", "summarize", str(run), str(tmp_path / "text.txt"), *flags])
    cli.main()
    out, err = capsys.readouterr()
    assert err.startswith("engine: ") == (by == "engine")
    assert ("int8" in err) == ("int8" in flags)
    if "int8" not in flags:
        (expected,) = Summarizer(run).summarize(["red cat sat"])
        assert out.strip() == expected


def test_beams_at_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-beams", "4", "--length-penalty", "2", "--no-repeat-ngram-size", "2", "--max-new-tokens", "9"]
    monkeypatch.setattr(sys, "argv", ["terse", "evaluate", str(run), "--sequences", "3", *flags])
    cli.main()
    out = capsys.readouterr().out
    sampling = SamplingConfig(
        temperature=0.0, num_beams=4, length_penalty=2.0, no_repeat_ngram_size=2, max_new_tokens=9
    )
    by_engine = Summarizer(run, "f32").evaluate(3, sampling)
    for source, _, summary in by_engine.examples:
        assert f"source     {source}" in out
        assert f"model      {summary}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text.txt", "--backend", "torch", "--threads", "2"), "--dtype and --threads are the engine's"),
        ((), "needs a text after the checkpoint"),
        (("absent.txt",), "absent.txt cannot be read: No such file or directory"),
    ],
)
def test_mistakes_at_the_command(
    run: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["terse", "summarize", str(run), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_engine_writes_what_pytorch_writes(run: Path, summarizer: Summarizer) -> None:
    texts = [" ".join(WORDS[:n]) for n in (5, 1, 7, 2)] * 5
    assert Summarizer(run, "f32").summarize(texts) == summarizer.summarize(texts)
