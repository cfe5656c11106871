"""Recipes: presets with changes, twins, flags, and the errors of each."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from terseformer.config import (
    ConfigError,
    DenseFeedForwardConfig,
    DenseProjectionConfig,
    EncoderDecoderConfig,
    ModelConfig,
    PairsConfig,
    Recipe,
    Seq2SeqConfig,
    SpanCorruptionConfig,
    SparseCrossProjectionConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    TerraformerConfig,
    TrainConfig,
)
from terseformer.configfile import to_toml
from terseformer.folder import CheckpointError
from terseformer.presets import PRESETS, dense_twin, preset
from terseformer.recipe import apply_overrides, load_recipe, parse_flags, show_flags, with_initial_tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
Load = Callable[..., Recipe]


def changed(config: Any, **changes: Any) -> Any:
    """A part of a recipe with changes that its kind knows."""
    return dataclasses.replace(config, **changes)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Reads a recipe of that text, with the flags of a command line."""

    def load(text: str, *flags: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, parse_flags(flags))

    return load


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_of_the_repository(path: Path) -> None:
    recipe = load_recipe(path)
    keys = tomllib.loads(path.read_text())["model"]
    if name := keys.pop("preset", None):  # and nothing else than what the recipe changes
        assert dataclasses.replace(recipe.model, **{key: getattr(preset(name), key) for key in keys}) == preset(name)
    assert recipe.model.vocab_size == recipe.data.vocab_size
    assert all(source.startswith(("pypi:", "debian:", "data/")) for source in recipe.data.sources)
    commands = [line for line in path.read_text().splitlines() if line.startswith("#   terse train ")]
    assert commands
    for command in commands:
        verb, file, *flags = shlex.split(command.removeprefix("#"), comments=True)[1:]
        if "--out" in flags:
            place = flags.index("--out")
            del flags[place : place + 2]
        assert (verb, file) == ("train", f"recipes/{path.name}")
        assert (load_recipe(path, parse_flags(flags)) == recipe) == (not flags)


def test_recipes_exist() -> None:
    assert {"tiny", "small-1m", "small-5m"} <= {path.stem for path in RECIPES}


def test_empty_recipe_is_the_default(load: Load) -> None:
    assert load("") == Recipe()


def test_written_recipe_reads_back(load: Load) -> None:
    recipe = Recipe(model=preset("small-1m-ff-qkv-loss"), train=TrainConfig(steps=3, final_quant_prob=0.5))
    assert load(to_toml(recipe)) == recipe


def test_changes_beside_a_preset(load: Load) -> None:
    recipe = load(
        """
        [model]
        preset = "small-1m-ff-qkv"
        norm = "rms_norm"
        feed_forward.temperature = 0.7
        attention = { kind = "sparse", share_qk = true }
        """
    )
    base = preset("small-1m-ff-qkv")
    assert recipe.model == changed(
        base,
        norm="rms_norm",
        feed_forward=changed(base.feed_forward, temperature=0.7),
        attention=changed(base.attention, share_qk=True),
    )


def test_another_kind_replaces_the_part(load: Load) -> None:
    recipe = load('[model]\npreset = "small-1m-ff-qkv"\n[model.feed_forward]\nkind = "dense"\nactivation = "gelu"')
    base = preset("small-1m-ff-qkv")
    assert recipe.model == changed(base, feed_forward=DenseFeedForwardConfig(activation="gelu"))


def test_same_kind_keeps_what_the_recipe_changed(load: Load) -> None:
    text = '[model]\npreset = "small-1m-ff16"\nfeed_forward.temperature = 0.7'
    part = load(
        text, "--model.feed-forward.kind", "sparse", "--model.feed-forward.controller-rank", "3"
    ).model.feed_forward
    assert part == changed(preset("small-1m-ff16").feed_forward, temperature=0.7, controller_rank=3)


def test_parts_need_no_kind_where_one_stands_already(load: Load) -> None:
    assert load("[model.feed_forward]\nintermediate_size = 64").model.feed_forward.intermediate_size == 64


def test_dense_twin_is_taken_after_the_changes(load: Load) -> None:
    text = '[model]\npreset = "small-1m-ff16"\nnum_hidden_layers = 3\n'
    assert load(text + "dense_twin = true").model == dense_twin(load(text).model) != load(text).model
    assert load(text + "dense_twin = false").model == load(text).model
    assert load(text, "--model.dense-twin", "--model.feed-forward.controller-rank", "64").model == dense_twin(
        load(text + "feed_forward.controller_rank = 64").model
    )


def test_flags(load: Load) -> None:
    flags = """--train.steps 10 --train.learning-rate=1e-3 --train.no-compile --train.final_quant_prob 1
        --model.feed-forward.ff-block-size 32 --model.feed-forward.kernel-scaling --data.sources a.txt b.txt
        --train.sample-prompt "In the beginning" --data.document-fields --data.tokenizer 1"""
    recipe = load('model.preset = "small-1m-ff16"\ntrain.compile = true', *shlex.split(flags))
    base = preset("small-1m-ff16")
    assert recipe.model == changed(base, feed_forward=changed(base.feed_forward, ff_block_size=32, kernel_scaling=True))
    assert recipe.train == TrainConfig(
        steps=10, learning_rate=1e-3, final_quant_prob=1.0, sample_prompt="In the beginning"
    )
    assert recipe.data.sources == ("a.txt", "b.txt")
    assert (recipe.data.document_fields, recipe.data.tokenizer) == ((), "1")


def test_later_flag_wins() -> None:
    flags = shlex.split("--train.steps 10 --train.compile true --train.steps 20 --train.final-quant-prob none")
    assert parse_flags(flags) == {"train": {"steps": 20, "compile": True, "final_quant_prob": None}}


def test_preset_flag_takes_the_place_of_the_preset(load: Load) -> None:
    text = '[model]\npreset = "small-1m-ff16"\nnum_hidden_layers = 3\nnorm = "layer_norm"\n[train]\nsteps = 7'
    recipe = load(text, "--model.preset", "small-1m-dense", "--model.norm", "rms_norm")
    assert recipe.model == changed(preset("small-1m-dense"), num_hidden_layers=3, norm="rms_norm")
    assert recipe.train.steps == 7
    with pytest.raises(ConfigError, match=r"model\.feed_forward\.temperature: no such key"):
        load(
            text.replace("num_hidden_layers = 3", "feed_forward.temperature = 0.7"), "--model.preset", "small-1m-dense"
        )


def test_models_of_a_recipe_read_the_same_sources(load: Load) -> None:
    """What a recipe says of its documents holds for each of the models that are compared."""
    text = (RECIPES[0].parent / "summarize-long.toml").read_text()
    own, dense, scaling = (
        load(text, *flags)
        for flags in ((), ("--model.preset", "summarize-1m-dense"), ("--model.preset", "summarize-1m-scaling"))
    )
    assert isinstance(own.model, TerraformerConfig)
    assert isinstance(dense.model, Seq2SeqConfig)
    for other in (dense.model, scaling.model):
        assert isinstance(other, Seq2SeqConfig)
        assert other.encoder_attention_pattern == own.model.encoder_attention_pattern
        assert other.max_position_embeddings == own.model.max_position_embeddings == 8192


# Encoder-decoders.

COPY = """
[model]
kind = "seq2seq"
hidden_size = 32
num_decoder_layers = 3
feed_forward.intermediate_size = 64
[data]
target_field = "title"
[train]
objective = { kind = "pairs", max_target_length = 9 }
"""


def test_kind_of_a_model_in_a_file(load: Load) -> None:
    """Nothing of the default language model stays but the defaults."""
    feed_forward = DenseFeedForwardConfig(intermediate_size=64)
    recipe = load(COPY)
    assert recipe.model == Seq2SeqConfig(hidden_size=32, num_decoder_layers=3, feed_forward=feed_forward)
    assert recipe.train.objective == PairsConfig(max_target_length=9)
    other = load(COPY.replace("seq2seq", "terraformer"))
    assert other.model == TerraformerConfig(hidden_size=32, num_decoder_layers=3, feed_forward=feed_forward)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("summarize-")])
def test_presets_of_encoder_decoders(load: Load, name: str) -> None:
    text = f"""
        model = {{ preset = "{name}", num_encoder_layers = 2, pad_token_id = 3 }}
        train.objective = {{ kind = "span_corruption", target = "text" }}
    """
    recipe = load(text, "--model.no-dense-twin", "--train.objective.corruption-rate", "0.3")
    assert recipe.model == changed(preset(name), num_encoder_layers=2, pad_token_id=3)
    assert recipe.train.objective == SpanCorruptionConfig(target="text", corruption_rate=0.3)
    assert load(to_toml(recipe)) == apply_overrides(recipe, []) == recipe


def test_dense_twin_of_a_terraformer(load: Load) -> None:
    text = 'model.preset = "summarize-1m-terraformer"\ntrain.objective.kind = "span_corruption"\n'
    twin = load(text, "--model.dense-twin", "--model.num-decoder-layers", "3")
    assert isinstance(twin.model, Seq2SeqConfig)
    assert twin.model == dense_twin(changed(preset("summarize-1m-terraformer"), num_decoder_layers=3))
    assert apply_overrides(load(text), ["--model.dense-twin", "--model.num-decoder-layers", "3"]) == twin
    assert load(to_toml(twin)) == twin


def test_flags_change_the_kind(load: Load) -> None:
    objective = ("--train.objective.kind", "span_corruption")
    flags = ("--model.kind", "terraformer", "--model.num-attention-layers", "1", "--model.reversible-encoder")
    expected = TerraformerConfig(num_attention_layers=1, reversible_encoder=True)
    assert load("model.hidden_size = 512", *flags, *objective).model == expected
    assert load(COPY, *flags).model == expected
    # Of the same kind, the rest stays.
    same = load(COPY, "--model.kind", "seq2seq", "--model.cross-attention.kind", "sparse").model
    assert (same.hidden_size, same.cross_attention) == (32, SparseCrossProjectionConfig())
    # Where there is no preset, one takes the place of the model, whatever its kind; an objective, of the objective.
    other = load(COPY, "--model.preset", "summarize-1m-terraformer", "--train.objective.max-target-length", "8")
    assert other.model == preset("summarize-1m-terraformer")
    assert other.train.objective == PairsConfig(max_target_length=8)
    plain = ("--model.preset", "tiny", "--train.objective.kind", "next_token", "--data.target-field", "")
    assert load(COPY, *plain).model == preset("tiny")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--model.kind seqtoseq",
            "model: kind = 'seqtoseq' is unknown; the nearest is 'seq2seq', allowed are causal_lm, ",
        ),
        ("--model.num-hidden-layers 3", "model.num_hidden_layers: no such key; the nearest is 'num_"),
        ("--model.reversible-encoder", "model.reversible_encoder: no such key; the nearest is "),
        ("--model.position alibi", "model.position: needs one of 'learned', 'sinusoidal', "),
        ("--model.pad-token-id 9999", "model.pad_token_id must lie in [0, 2048), not 9999"),
        (
            "--model.preset tiny --model.kind seq2seq",
            "model.preset = 'tiny' is of kind 'causal_lm', not 'seq2seq'; leave o",
        ),
        ("--model.kind terraformer --model.cross-attention.kind sparse", "model.cross_attention: no such key"),
        (
            "--model.cross-attention.kind low_rank",
            "model.cross_attention: kind = 'low_rank' is unknown; the nearest is",
        ),
        (
            "--model.preset tiny",
            "train.objective.kind = 'pairs' does not fit a model of kind 'causal_lm', which learns by",
        ),
        (
            "--train.objective.kind next_token",
            "'next_token' does not fit a model of kind 'seq2seq', which learns by 'span_",
        ),
        (
            "--train.objective.kind span_corruption",
            "data.target_field = 'title' is for train.objective.kind = 'pairs'; lea",
        ),
        (
            "--train.objective.max-target-length 513",
            "train.objective.max_target_length = 513 is longer than model.max_p",
        ),
        ("--train.objective.max-target-length 0", "train.objective.max_target_length must be at least 1, not 0"),
        ("--data.target-field=", "train.objective.kind = 'pairs' needs data.target_field, the field of the targets"),
        (
            "--data.document-fields id",
            "data.document_fields joins rows to documents, and data.target_field and data.gro",
        ),
        ("--data.num-sentinels -1", "data.num_sentinels must be at least 0, not -1"),
    ],
)
def test_flags_that_do_not_fit_an_encoder_decoder(load: Load, flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(COPY, *flags.split())
    assert message in str(error.value)
    assert "recipe.toml with the given flags: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.sequence-length 1", "train.sequence_length must be at least 2 for span corruption"),
        (
            "--train.objective.target text --train.sequence-length 512",
            "train.sequence_length + 1 (the text and its end) = 513 is longer than model.max_position_embeddings = 512",
        ),
        ("--train.objective.mean-span-length 0.5", "train.objective.mean_span_length must be at least 1, not 0.5"),
        ("--train.objective.corruption-rate 2", "train.objective.corruption_rate must lie in [0, 1], not 2.0"),
        (
            "--train.objective.max-target-length 3",
            "train.objective.max_target_length: no such key; the nearest is 'mean_span_length'",
        ),
    ],
)
def test_flags_that_do_not_fit_span_corruption(load: Load, flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load('model.kind = "terraformer"\ntrain.objective.kind = "span_corruption"', *flags.split())
    assert message in str(error.value)


@pytest.mark.parametrize("model", [Seq2SeqConfig(), TerraformerConfig()], ids=lambda model: model.kind)
def test_help_for_an_encoder_decoder(model: EncoderDecoderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(model=model, train=TrainConfig(objective=SpanCorruptionConfig()))
    show_flags(recipe, "terse train RECIPE.toml")
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--train.objective.kind: next_token, span_corruption, pairs" in help_text
    for section, of in ((model, "model"), (recipe.train.objective, "train.objective")):
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(getattr(section, field.name)):
                assert f"--{of}.{field.name.replace('_', '-')}" in help_text
    assert "--model.num-hidden-layers" not in help_text


# The tokenizer of an initial checkpoint.


def test_tokenizer_of_an_initial_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / "run" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "run" / f"step-{step:08d}" / "config.json").touch()
    recipe = Recipe(train=TrainConfig(initial_checkpoint=str(tmp_path / "run")))
    expected = str(tmp_path / "run" / "step-00000010" / "tokenizer.json")
    assert with_initial_tokenizer(recipe) == changed(recipe, data=changed(recipe.data, tokenizer=expected))
    own = changed(recipe, data=changed(recipe.data, tokenizer="mine.json"))
    assert with_initial_tokenizer(own) == own
    assert with_initial_tokenizer(Recipe()) == Recipe()
    with pytest.raises(CheckpointError, match="no checkpoint at .*absent: it is no folder"):
        with_initial_tokenizer(Recipe(train=TrainConfig(initial_checkpoint=str(tmp_path / "absent"))))


def test_apply_overrides() -> None:
    recipe = Recipe(model=preset("small-5m-ff-qkv"), train=TrainConfig(final_quant_prob=0.5))
    assert apply_overrides(recipe, []) == recipe
    other = apply_overrides(recipe, ["--model.attention.kind", "dense", "--train.final-quant-prob", "none"])
    assert other.model == changed(recipe.model, attention=DenseProjectionConfig())
    assert other.train == TrainConfig()
    assert apply_overrides(recipe, ["--model.dense-twin"]).model == dense_twin(recipe.model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model.preet = "tiny"', "model.preet: no such key; the nearest is 'preset', allowed are vocab_size, "),
        ("model.dens_twin = true", "model.dens_twin: no such key; the nearest is 'dense_twin'"),
        ('model.preset = "tinny"', "no preset 'tinny'; the nearest are 'tiny', "),
        ("model.preset = 3", "model.preset: needs str, not 3"),
        ("model.dense_twin = 1", "model.dense_twin: needs bool, not 1"),
        ("model = 3", "needs a table"),
        ("modell.hidden_size = 3", "modell: no such key; the nearest is 'model'"),
        (
            'model.preset = "small-1m-ff16"\nmodel.feed_forward.ff_blok_size = 8',
            "model.feed_forward.ff_blok_size: no such key; the nearest is 'ff_block_size'",
        ),
        ('model.head.kind = "sparse"', "model.head: kind = 'sparse' is unknown; the nearest is"),
        ('model.preset = "tiny"\ntrain.sequence_length = 500', "train.sequence_length = 500 is longer than"),
        ("model", "not valid TOML"),
    ],
)
def test_errors_name_the_file(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    assert "recipe.toml: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.step 10", "no such flag: --train.step; the nearest is --train.steps, --help lists them all"),
        ("--learning-rate 1", "no such flag: --learning-rate; the nearest is --train.learning-rate, "),
        ("--model.feed_forward.ff_blok_size 8", "the nearest is --model.feed-forward.ff-block-size, "),
        ("--model.pre-set tiny", "the nearest is --model.preset, "),
        ("--train.no-steps", "no such flag: --train.no-steps; the nearest is --train.steps, "),
        ("10", "'10' stands before any flag; changes look like --train.steps 10"),
        ("--train.steps", "--train.steps needs one value, not none"),
        ("--train.steps 1 2", "--train.steps needs one value, not 1 2"),
        ("--train.steps 1.5", "--train.steps needs a whole number, not '1.5'"),
        ("--train.learning-rate fast", "--train.learning-rate needs a number, not 'fast'"),
        ("--train.compile maybe", "--train.compile needs true or false, not 'maybe'"),
        ("--train.schedule sine", "train.schedule: needs one of 'cosine', 'rsqrt', 'constant', not 'sine'"),
        ("--model.head.kind sparse", "model.head: kind = 'sparse' is unknown"),
        ("--model.preset tinny", "no preset 'tinny'; the nearest are 'tiny', "),
        ("--model.hidden-size 30", "model.hidden_size = 30 is not a multiple of model.num_attention_heads = 4"),
        ("--model.feed-forward.ff-block-size 3", "model.feed_forward.ff_block_size: no such key"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(Recipe(), flags.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(feed_forward=SparseFeedForwardConfig(), attention=SparseProjectionConfig())
    show_flags(Recipe(model=model), "terse train RECIPE.toml")
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert help_text.startswith("usage: terse train RECIPE.toml ")
    assert "--model.attention.kind: dense, low_rank, multiplicative, " in help_text
    assert "--train.steps INT Optimiser steps. (default: 1000)" in help_text
    assert (
        "--model.feed-forward.ff-block-size INT Units in a block, N: one of them is used for each token." in help_text
    )
    assert "--model.preset STR A model by name" in help_text
    for section in (Recipe().train, Recipe().data, model, model.feed_forward, model.attention):
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(getattr(section, field.name)):
                assert f".{field.name.replace('_', '-')}" in help_text
