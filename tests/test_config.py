"""Configurations: round trips through TOML and JSON, and errors that say what to change."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terseformer import config as c
from terseformer import configfile
from terseformer.config import ConfigError, DataConfig, ModelConfig, Recipe, TrainConfig

# ----------------------------------------------------------------------------- any valid configuration

small = st.integers(1, 6)
odd = st.sampled_from([1, 3, 5])
unit = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
inside = st.floats(0, 1, exclude_min=True, exclude_max=True)
BY_TYPE = {
    int: small,
    float: st.floats(0, 1e9, exclude_min=True),
    bool: st.booleans(),
    str: st.text(),
    tuple[str, ...]: st.lists(st.text(), max_size=3).map(tuple),
    float | None: st.none() | unit,
}


@functools.cache
def by_type(cls: type) -> dict[str, st.SearchStrategy[Any]]:
    fields = {}
    for name, kind in typing.get_type_hints(cls).items():
        if typing.get_origin(kind) is typing.Literal:
            fields[name] = st.sampled_from(typing.get_args(kind))
        elif kind in BY_TYPE:
            fields[name] = BY_TYPE[kind]
    return fields


def any_of(cls: type, **constrained: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any configuration of a class: fields that are not given take what their type allows."""
    return st.builds(cls, **(by_type(cls) | constrained))


@st.composite
def feed_forwards(draw: st.DrawFn) -> c.FeedForwardConfig:
    n = draw(small)
    size, n = st.just(n * draw(small)), st.just(n)
    return draw(
        any_of(c.DenseFeedForwardConfig, ff_dropout=below_one)
        | any_of(c.SparseFeedForwardConfig, intermediate_size=size, ff_block_size=n, quant_prob=unit)
        | any_of(c.BlockFeedForwardConfig, intermediate_size=size, num_experts=n, quant_prob=unit)
        | any_of(c.SwitchFeedForwardConfig, intermediate_size=size, num_experts=n)
    )


@functools.cache
def attentions(modules: int) -> st.SearchStrategy[c.AttentionProjectionConfig]:
    s = st.just(modules)
    return (
        any_of(c.DenseProjectionConfig)
        | any_of(c.LowRankProjectionConfig)
        | any_of(c.MultiplicativeProjectionConfig, qkv_modules=s)
        | any_of(c.MultiplicativeModularProjectionConfig, qkv_modules=s)
        | any_of(c.LocalConvolutionProjectionConfig, qkv_modules=s, module_kernel=odd)
        | any_of(c.LocallyConnectedProjectionConfig, qkv_modules=s, module_kernel=odd)
        | any_of(c.SparseProjectionConfig, qkv_modules=s, module_kernel=odd)
    )


@functools.cache
def patterns() -> st.SearchStrategy[c.AttentionPatternConfig]:
    even = small.map(lambda n: 2 * n - 2)
    return (
        any_of(c.SoftmaxPatternConfig)
        | any_of(c.LocalPatternConfig, chunks_after=st.just(0))
        | any_of(c.LSHPatternConfig, num_buckets=even)
        | any_of(c.MixedPatternConfig, num_buckets=even)
        | any_of(c.FavorPatternConfig)
        | any_of(c.FavorSoftmaxPatternConfig)
    )


def growing(draw: st.DrawFn) -> dict[str, Any]:
    """A Terraformer whose decoder grows to twice the width, somewhere."""
    blocks = draw(st.integers(2, 6))
    return {
        "num_decoder_layers": st.just(blocks),
        "forget_every": st.just(0),
        "half_before_layer": st.just(0),
        "double_after_layer": st.integers(1, blocks - 1),
        "head": any_of(c.DenseHeadConfig, tied=st.just(False)),
    }


@st.composite
def models(draw: st.DrawFn) -> ModelConfig | c.EncoderDecoderConfig:
    modules, heads, head_modules = draw(small), draw(small), draw(small)
    shared: dict[str, Any] = {
        "vocab_size": st.just(head_modules * draw(small)),
        "hidden_size": st.just(2 * heads * modules),
        "num_attention_heads": st.just(heads),
        "max_position_embeddings": st.integers(3, 10**6),
        "dropout": below_one,
        "attention_dropout": below_one,
        "attention": attentions(modules),
        "attention_pattern": patterns(),
        "position": st.sampled_from(["learned", "sinusoidal", "sin_cos", "rotary", "none"]),
        "feed_forward": feed_forwards(),
        "sru": any_of(c.SRUConfig),
        "head": any_of(c.DenseHeadConfig)
        | any_of(c.MultiplicativeHeadConfig, head_modules=st.just(head_modules), sparse_prob=unit),
    }
    encoder = {"encoder_attention": attentions(modules), "encoder_attention_pattern": patterns()}
    encoder["encoder_position"] = st.sampled_from(["learned", "sinusoidal", "sin_cos", "infinite", "rotary"])
    both = shared | encoder | {"pad_token_id": st.just(0)}
    cross = any_of(c.DenseProjectionConfig) | any_of(
        c.SparseCrossProjectionConfig, qkv_modules=st.just(modules), module_kernel=odd
    )
    return draw(
        any_of(ModelConfig, **shared)
        | any_of(c.Seq2SeqConfig, **both, cross_attention=cross)
        | any_of(c.TerraformerConfig, **both, half_before_layer=st.just(0), double_after_layer=st.just(0))
        | any_of(c.TerraformerConfig, **both | growing(draw))
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    model, parts, fields = draw(models()), draw(small), draw(st.booleans())
    lengths = st.integers(2, model.max_position_embeddings - 1)  # room for the end of a text
    objectives = (
        any_of(c.NextTokenConfig)
        if isinstance(model, ModelConfig)
        else any_of(c.SpanCorruptionConfig, corruption_rate=unit, mean_span_length=st.floats(1, 1e3))
        | any_of(c.PairsConfig, max_target_length=lengths)
    )
    objective = draw(objectives)
    has_targets = isinstance(objective, c.PairsConfig)
    compiled = draw(st.booleans())
    return draw(
        any_of(
            Recipe,
            model=st.just(model),
            data=any_of(
                DataConfig,
                validation_fraction=inside,
                target_field=st.text(min_size=1) if has_targets else st.just(""),
                group_field=st.text() if fields or has_targets else st.just(""),
                document_fields=st.just(()) if fields or has_targets else BY_TYPE[tuple[str, ...]],
            ),
            train=any_of(
                TrainConfig,
                batch_size=st.just(parts * draw(small)),
                sequence_length=lengths,
                objective=st.just(objective),
                compile=st.just(compiled),
                parallelism=st.just("ddp") if compiled else st.sampled_from(["ddp", "fsdp"]),
                gradient_accumulation_steps=st.just(parts),
                final_learning_rate=unit,
                adam_beta2=below_one,
            ),
        )
    )


# beartype checks one item of a tuple, drawn by `random`, of which hypothesis complains.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def types(config: Any) -> Any:
    """The type of every value, which equality does not tell: 1 == 1.0 == True."""
    if dataclasses.is_dataclass(config):
        return type(config), {f.name: types(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return type(config)


# -------------------------------------------------------------------------------------- round trips


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes())
def test_round_trips_lose_nothing(recipe: Recipe) -> None:
    read_back = [
        configfile.from_toml(Recipe, configfile.to_toml(recipe)),
        configfile.from_json(Recipe, configfile.to_json(recipe)),
        configfile.from_dict(Recipe, configfile.to_dict(recipe)),
        configfile.from_json(Recipe, configfile.to_json(configfile.from_toml(Recipe, configfile.to_toml(recipe)))),
    ]
    for other in read_back:
        assert other == recipe
        assert types(other) == types(recipe)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(model=models())
def test_a_model_alone_round_trips_and_says_every_kind(model: ModelConfig | c.EncoderDecoderConfig) -> None:
    values = json.loads(configfile.to_json(model))
    assert values["feed_forward"]["kind"] == model.feed_forward.kind
    assert values["attention"]["kind"] == model.attention.kind
    assert values["head"]["kind"] == model.head.kind
    assert set(values) == {f.name for f in dataclasses.fields(model)}
    assert configfile.model_from_dict(values) == model


def test_defaults_round_trip_and_fill_what_a_file_leaves_out() -> None:
    assert configfile.from_toml(Recipe, "") == Recipe()
    assert configfile.from_toml(Recipe, configfile.to_toml(Recipe())) == Recipe()
    text = "[model]\nhidden_size = 96\n[model.feed_forward]\nkind = 'sparse'\nff_block_size = 32\n"
    expected = ModelConfig(hidden_size=96, feed_forward=c.SparseFeedForwardConfig(ff_block_size=32))
    assert configfile.from_toml(Recipe, text).model == expected


def test_lists_of_numbers_round_trip() -> None:
    model = ModelConfig(position="axial", axial_shape=(32, 16), axial_sizes=(100, 156))
    for read in (configfile.from_toml, configfile.from_json):
        write = configfile.to_toml if read is configfile.from_toml else configfile.to_json
        assert read(Recipe, write(Recipe(model=model))).model == model
    message = "model.axial_shape: needs a list of whole numbers, not [4, 1.5]"
    assert error({"model": {"axial_shape": [4, 1.5]}}) == message


def test_none_is_left_out_and_comes_back() -> None:
    assert "final_quant_prob" not in configfile.to_dict(TrainConfig())
    assert configfile.from_dict(TrainConfig, {}).final_quant_prob is None
    assert configfile.from_dict(TrainConfig, {"final_quant_prob": None}).final_quant_prob is None
    assert configfile.from_dict(TrainConfig, {"final_quant_prob": 1}).final_quant_prob == 1.0


def test_a_whole_number_may_stand_for_a_float_and_becomes_one() -> None:
    dropout = configfile.from_dict(ModelConfig, {"dropout": 0}).dropout
    assert isinstance(dropout, float)
    assert dropout == 0.0


def test_a_config_is_frozen_and_hashable() -> None:
    config = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 3
    assert hash(config) == hash(Recipe())


def test_written_forms_are_readable_by_others(tmp_path: Path) -> None:
    text = configfile.to_json(Recipe())
    assert text.endswith("}\n")
    assert json.loads(text)["model"]["hidden_size"] == 256
    path = tmp_path / "recipe.toml"
    path.write_text(configfile.to_toml(Recipe()), encoding="utf-8")
    assert configfile.from_toml(Recipe, configfile.read_text(path)) == Recipe()


# ------------------------------------------------------------------------------------------- errors


def error(values: Any, cls: type = Recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        configfile.from_dict(cls, values)
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "path", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"hiden_size": 3}}, "model.hiden_size", "hidden_size"),
        (
            {"model": {"feed_forward": {"kind": "sparse", "block_size": 8}}},
            "model.feed_forward.block_size",
            "ff_block_size",
        ),
        ({"model": {"attention": {"kind": "sparse", "sharekq": True}}}, "model.attention.sharekq", "share_qk"),
        ({"model": {"head": {"kind": "dense", "tie": True}}}, "model.head.tie", "tied"),
        ({"model": {"sru": {"layers": 1}}}, "model.sru.layers", "num_layers"),
        ({"data": {"source": []}}, "data.source", "sources"),
        ({"train": {"leaning_rate": 1.0}}, "train.leaning_rate", "learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], path: str, nearest: str) -> None:
    text = error(values)
    assert text.startswith(f"{path}: no such key; the nearest is {nearest!r}, allowed are ")


def test_an_unknown_key_lists_what_its_kind_allows() -> None:
    values = {"model": {"feed_forward": {"kind": "switch", "experts": 5}}}
    assert error(values) == (
        "model.feed_forward.experts: no such key; the nearest is 'num_experts', "
        "allowed are intermediate_size, num_experts, kind, temperature"
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "needed"),
    [
        ("model", "hidden_size", 3.0, "int"),
        ("model", "hidden_size", "3", "int"),
        ("model", "hidden_size", True, "int"),
        ("model", "hidden_size", None, "int"),
        ("model", "hidden_size", [3], "int"),
        ("model", "dropout", "0.1", "float"),
        ("model", "dropout", False, "float"),
        ("train", "compile", 1, "bool"),
        ("train", "compile", "true", "bool"),
        ("train", "sample_prompt", 3, "str"),
        ("train", "final_quant_prob", "half", "float"),
        ("data", "sources", "text.txt", "a list of strings"),
        ("data", "sources", ["a", 1], "a list of strings"),
        ("data", "sources", {"a": "b"}, "a list of strings"),
        ("train", "optimizer", "sgd", "one of 'adamw', 'adafactor'"),
        ("train", "optimizer", 1, "one of 'adamw', 'adafactor'"),
        ("train", "optimizer", ["adamw"], "one of 'adamw', 'adafactor'"),
    ],
)
def test_a_wrong_type_says_what_is_needed(section: str, key: str, value: Any, needed: str) -> None:
    assert error({section: {key: value}}) == f"{section}.{key}: needs {needed}, not {value!r}"


@pytest.mark.parametrize("part", ["feed_forward", "attention", "head"])
@pytest.mark.parametrize("value", [3, "sparse", None, []])
def test_a_part_needs_a_table(part: str, value: Any) -> None:
    assert error({"model": {part: value}}) == f"model.{part}: needs a table with a kind, not {value!r}"


@pytest.mark.parametrize("value", [3, None])
def test_a_model_needs_a_table(value: Any) -> None:
    assert error({"model": value}) == f"model: needs a table with a kind, not {value!r}"


def test_objectives_fit_model_and_data() -> None:
    wrong = {"objective": {"kind": "pairs"}}
    assert "does not fit a model of kind 'causal_lm', which learns by 'next_token'" in error({"train": wrong})
    model = {"kind": "seq2seq"}
    assert "learns by 'span_corruption' or 'pairs'" in error({"model": model})
    assert "'pairs' needs data.target_field" in error({"model": model, "train": wrong})
    spans = {"objective": {"kind": "span_corruption"}}
    assert "leave it out" in error({"model": model, "train": spans, "data": {"target_field": "summary"}})
    fields = {"target_field": "summary", "document_fields": ["book"]}
    assert "data.document_fields joins rows" in error({"model": model, "train": wrong, "data": fields})
    long = {"objective": {"kind": "pairs", "max_target_length": 1000}}
    message = error({"model": model, "train": long, "data": {"target_field": "summary"}})
    assert message.startswith("train.objective.max_target_length = 1000 is longer than model.max_position_embeddings")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"model": {"sru": 3}}, "model.sru"),
        ({"train": []}, "train"),
        ({"data": "x"}, "data"),
    ],
)
def test_a_section_needs_a_table(values: dict[str, Any], path: str) -> None:
    assert error(values) == f"{path} needs a table"


@pytest.mark.parametrize("values", [3, "model", [], None])
def test_a_file_needs_a_table(values: Any) -> None:
    assert error(values) == f"Recipe needs a table, not {values!r}"


@pytest.mark.parametrize(
    ("part", "kind", "nearest", "allowed"),
    [
        ("feed_forward", "spares", "sparse", "dense, sparse, block, switch"),
        ("attention", "lowrank", "low_rank", "dense, low_rank, multiplicative, local_convolution"),
        ("head", "mult", "multiplicative", "dense, multiplicative"),
    ],
)
def test_an_unknown_kind_names_the_nearest(part: str, kind: str, nearest: str, allowed: str) -> None:
    text = error({"model": {part: {"kind": kind}}})
    assert text.startswith(
        f"model.{part}: kind = {kind!r} is unknown; the nearest is {nearest!r}, allowed are {allowed}"
    )


@pytest.mark.parametrize("kind", ["", 3, True, ["dense"], {}])
def test_a_kind_that_is_like_none_lists_what_is_allowed(kind: Any) -> None:
    text = error({"model": {"head": {"kind": kind}}})
    assert text.startswith(f"model.head: kind = {kind!r} is unknown; ")
    assert text.endswith("allowed are dense, multiplicative")


def test_a_part_without_kind_asks_for_one() -> None:
    assert error({"model": {"head": {"tied": True}}}) == (
        "model.head: kind = None is unknown; the nearest is 'dense', allowed are dense, multiplicative"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"model": {"feed_forward": {"kind": "sparse", "intermediate_size": 100, "ff_block_size": 16}}},
            "model.feed_forward.intermediate_size = 100 is not a multiple of model.feed_forward.ff_block_size = 16; "
            "change one of them",
        ),
        (
            {"model": {"feed_forward": {"kind": "sparse", "ff_block_size": 0}}},
            "model.feed_forward.intermediate_size = 1024 is not a multiple of model.feed_forward.ff_block_size = 0; "
            "change one of them",
        ),
        (
            {"model": {"feed_forward": {"kind": "block", "intermediate_size": 100, "num_experts": 8}}},
            "model.feed_forward.intermediate_size = 100 is not a multiple of model.feed_forward.num_experts = 8; "
            "change one of them",
        ),
        (
            {"model": {"feed_forward": {"kind": "sparse", "controller_rank": 0}}},
            "model.feed_forward.controller_rank must be at least 1, not 0",
        ),
        (
            {"model": {"feed_forward": {"kind": "sparse", "quant_prob": 1.5}}},
            "model.feed_forward.quant_prob must lie in [0, 1], not 1.5",
        ),
        (
            {"model": {"feed_forward": {"kind": "sparse", "quant_prob": math.nan}}},
            "model.feed_forward.quant_prob must lie in [0, 1], not nan",
        ),
        (
            {"model": {"feed_forward": {"kind": "sparse", "temperature": -1}}},
            "model.feed_forward.temperature must be at least 0, not -1.0",
        ),
        (
            {"model": {"hidden_size": 250}},
            "model.hidden_size = 250 is not a multiple of model.num_attention_heads = 4; change one of them",
        ),
        (
            {"model": {"hidden_size": 12, "position": "rotary"}},
            "model.position = 'rotary' needs an even head width, not 3; change model.num_attention_heads",
        ),
        (
            {"model": {"kind": "seq2seq", "hidden_size": 12, "encoder_position": "rotary"}},
            "model.encoder_position = 'rotary' needs an even head width, not 3; change model.num_attention_heads",
        ),
        (
            {"model": {"kind": "seq2seq", "position": "none"}},
            "model.position = 'none' leaves the source without any order; name a model.encoder_position, such as "
            "'rotary'",
        ),
        (
            {
                "model": {
                    "kind": "seq2seq",
                    "encoder_position": "rotary",
                    "position": "axial",
                    "axial_shape": [8, 64],
                    "axial_sizes": [128, 128],
                }
            },
            "model.encoder_position = 'rotary' cannot be combined with model.position = 'axial'; leave it out or "
            "change model.position",
        ),
        (
            {"model": {"hidden_size": 12, "position": "fixed_base"}},
            "model.position = 'fixed_base' has 8 digits, but model.hidden_size = 12 is not a multiple of 8; "
            "change one of them",
        ),
        (
            {"model": {"axial_shape": [3, 4]}},
            "model.axial_shape and model.axial_sizes are of model.position = 'axial', not 'learned'; leave them out",
        ),
        (
            {"model": {"position": "axial", "axial_shape": [32, 16], "axial_sizes": [56, 100]}},
            "model.axial_sizes = [56, 100] must be as many as model.axial_shape = [32, 16], all above 0, and sum up to "
            "model.hidden_size = 256",
        ),
        (
            {"model": {"position": "axial", "axial_shape": [3, 4], "axial_sizes": [156, 100]}},
            "model.axial_shape = [3, 4] holds 12 positions; it must hold model.max_position_embeddings = 512",
        ),
        (
            {"model": {"attention": {"kind": "sparse", "qkv_modules": 7}}},
            "model.hidden_size = 256 is not a multiple of model.attention.qkv_modules = 7; change one of them",
        ),
        (
            {"model": {"attention": {"kind": "locally_connected", "module_kernel": 2}}},
            "model.attention.module_kernel must be odd, not 2",
        ),
        (
            {"model": {"attention_pattern": {"kind": "local", "chunks_after": 1}}},
            "model.attention_pattern.chunks_after must be 0 where a token sees no later ones; "
            "only model.encoder_attention_pattern may have more",
        ),
        (
            {"model": {"attention_pattern": {"kind": "mixed", "num_buckets": 7}}},
            "model.attention_pattern.num_buckets must be even, not 7",
        ),
        (
            {"model": {"attention_pattern": {"kind": "lsh", "chunk_length": 0}}},
            "model.attention_pattern.chunk_length must be at least 1, not 0",
        ),
        (
            {"model": {"head": {"kind": "multiplicative", "head_modules": 3}}},
            "model.vocab_size = 2048 is not a multiple of model.head.head_modules = 3; change one of them",
        ),
        (
            {"model": {"attention": {"kind": "locally_connected", "module_kernel": -1}}},
            "model.attention.module_kernel must be odd, not -1",
        ),
        (
            {"model": {"attention": {"kind": "sparse", "length_kernel": 0}}},
            "model.attention.length_kernel must be at least 1, not 0",
        ),
        ({"model": {"attention": {"kind": "low_rank", "rank": 0}}}, "model.attention.rank must be at least 1, not 0"),
        (
            {"model": {"feed_forward": {"kind": "dense", "intermediate_size": 0}}},
            "model.feed_forward.intermediate_size must be at least 1, not 0",
        ),
        (
            {"model": {"feed_forward": {"kind": "dense", "ff_dropout": 1.5}}},
            "model.feed_forward.ff_dropout must lie in [0, 1), not 1.5",
        ),
        (
            {"model": {"feed_forward": {"kind": "block", "quant_prob": 2.0}}},
            "model.feed_forward.quant_prob must lie in [0, 1], not 2.0",
        ),
        (
            {"model": {"head": {"kind": "multiplicative", "sparse_prob": 7.0}}},
            "model.head.sparse_prob must lie in [0, 1], not 7.0",
        ),
        ({"model": {"sru": {"num_layers": -1}}}, "model.sru.num_layers must be at least 0, not -1"),
        ({"model": {"norm_eps": -1.0}}, "model.norm_eps must be above 0, not -1.0"),
        ({"train": {"warmup_steps": -4}}, "train.warmup_steps must be at least 0, not -4"),
        ({"train": {"final_quant_prob": 3.0}}, "train.final_quant_prob must lie in [0, 1], not 3.0"),
        ({"train": {"adam_beta2": 2.0}}, "train.adam_beta2 must lie in [0, 1), not 2.0"),
        ({"model": {"num_hidden_layers": 0}}, "model.num_hidden_layers must be at least 1, not 0"),
        ({"model": {"dropout": 1.0}}, "model.dropout must lie in [0, 1), not 1.0"),
        ({"data": {"validation_fraction": 0.0}}, "data.validation_fraction must lie between 0 and 1, not 0.0"),
        ({"train": {"steps": -1}}, "train.steps must be at least 1, not -1"),
        ({"train": {"learning_rate": 0.0}}, "train.learning_rate must be above 0, not 0.0"),
        (
            {"train": {"batch_size": 16, "gradient_accumulation_steps": 3}},
            "train.batch_size = 16 is not a multiple of train.gradient_accumulation_steps = 3; change one of them",
        ),
        (
            {"train": {"sequence_length": 513}},
            "train.sequence_length = 513 is longer than model.max_position_embeddings = 512; change one of them",
        ),
    ],
)
def test_a_value_out_of_range_says_what_is_allowed(values: dict[str, Any], text: str) -> None:
    assert error(values) == text


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), recipe=recipes())
def test_any_mistake_in_any_key_is_a_config_error_with_its_path(data: st.DataObject, recipe: Recipe) -> None:
    """Whatever stands at a key, reading it gives a configuration or a ConfigError that names the key."""
    values = configfile.to_dict(recipe)
    table, path = values, []
    while True:
        key = data.draw(st.sampled_from(sorted(table)))
        path.append(key)
        if not isinstance(table[key], dict) or data.draw(st.booleans()):
            break
        table = table[key]
    scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
    table[key] = data.draw(
        scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    )
    try:
        configfile.from_dict(Recipe, values)
        message = path[-1]
    except ConfigError as caught:
        message = str(caught)
    assert any(key in message for key in path[-2:])


def test_text_that_is_not_toml_or_json() -> None:
    with pytest.raises(ConfigError, match="not valid TOML: .*line 2"):
        configfile.from_toml(Recipe, "[model]\nx = = 3")
    with pytest.raises(ConfigError, match="not valid JSON: .*line 1"):
        configfile.from_json(Recipe, "{")
    with pytest.raises(ConfigError, match=r"Recipe needs a table, not \[\]"):
        configfile.from_json(Recipe, "[]")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*nothing.toml"):
        configfile.read_text(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="cannot read "):
        configfile.read_text(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"x = '\xe9'")
    with pytest.raises(ConfigError, match="cannot read .*latin.toml"):
        configfile.read_text(tmp_path / "latin.toml")
