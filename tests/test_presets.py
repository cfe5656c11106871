"""Presets, models of a given size, and dense twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from terseformer.accounting import account
from terseformer.config import (
    BlockFeedForwardConfig,
    ConfigError,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    DenseProjectionConfig,
    FeedForwardConfig,
    ModelConfig,
    MultiplicativeHeadConfig,
    Seq2SeqConfig,
    SparseFeedForwardConfig,
    SparseProjectionConfig,
    SRUConfig,
    SwitchFeedForwardConfig,
    TerraformerConfig,
)
from terseformer.models import make_model
from terseformer.presets import PRESETS, dense_twin, match_parameters, num_parameters, preset

every_preset = pytest.mark.parametrize("name", PRESETS)
_SAME_IN_TWIN = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "pad_token_id",
    "num_attention_heads",
    "max_position_embeddings",
    "position",
    "norm",
    "norm_eps",
    "dropout",
    "attention_dropout",
)


def within_1_percent(count: int, of: int) -> bool:
    return abs(count - of) <= 0.01 * of


@every_preset
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = make_model(preset(name))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(preset(name))


@every_preset
def test_dense_twin(name: str) -> None:
    config = preset(name)
    twin = dense_twin(config)
    assert within_1_percent(num_parameters(twin), num_parameters(config))
    assert isinstance(twin.attention, DenseProjectionConfig)
    assert isinstance(twin.feed_forward, DenseFeedForwardConfig)
    assert twin.feed_forward.activation == "relu"
    assert twin.head == (config.head if isinstance(config.head, DenseHeadConfig) else DenseHeadConfig())
    assert isinstance(twin, ModelConfig) == isinstance(config, ModelConfig)
    if not isinstance(twin, ModelConfig):
        assert isinstance(twin, Seq2SeqConfig)
        assert isinstance(twin.encoder_attention, DenseProjectionConfig)
        assert isinstance(twin.cross_attention, DenseProjectionConfig)
    assert all(getattr(twin, key) == getattr(config, key) for key in _SAME_IN_TWIN if hasattr(config, key))
    assert dense_twin(twin) == twin


def test_dense_twin_of_other_parts() -> None:
    config = ModelConfig(
        attention=SparseProjectionConfig(output_layer="multconv"),
        feed_forward=SwitchFeedForwardConfig(),
        sru=SRUConfig(num_layers=2),
        head=MultiplicativeHeadConfig(sparse_prob=0.5),
        position="rotary",
        norm="rms_norm",
    )
    twin = dense_twin(config)
    assert within_1_percent(num_parameters(twin), num_parameters(config))
    assert (twin.sru, twin.position, twin.norm) == (SRUConfig(), "rotary", "rms_norm")
    tied = DenseHeadConfig(tied=True)
    assert dense_twin(replace(config, head=tied)).head == tied


@pytest.mark.parametrize("family", ["small-1m", "small-5m"])
def test_families_are_equally_large_and_faithful(family: str) -> None:
    dense = preset(f"{family}-dense")
    members = {name.removeprefix(f"{family}-"): config for name, config in PRESETS.items() if name.startswith(family)}
    assert all(within_1_percent(num_parameters(config), num_parameters(dense)) for config in members.values())
    assert {name for name in members if not name.endswith("-faithful")} == {
        "dense", "ff8", "ff16", "ff32", "ff64", "qkv", "ff-qkv", "ff-qkv-loss",
    }  # fmt: skip
    for name, config in members.items():
        if name.endswith("-faithful"):
            assert name.removesuffix("-faithful") in members
            if isinstance(config.feed_forward, SparseFeedForwardConfig):
                n, width = config.feed_forward.ff_block_size, config.feed_forward.intermediate_size
                assert config.feed_forward == SparseFeedForwardConfig(
                    intermediate_size=width, ff_block_size=n, controller_rank=config.hidden_size // 8
                )
            assert config.attention in (DenseProjectionConfig(), SparseProjectionConfig(qkv_modules=8))
            assert config.head in (DenseHeadConfig(), MultiplicativeHeadConfig(head_modules=4))
        elif name != "dense":
            assert f"{name}-faithful" in members


def test_paper_models() -> None:
    """C.5 and A.11 of system.md, for the self-attention and feed-forward layers of a decoder block."""

    def block_reads(name: str) -> int:
        parts = {part.name: part.each.parameters_read for part in account(preset(name)).parts}
        return parts["attention"] + parts["feed_forward"]

    assert block_reads("scaling-800m-dense") == 4_198_400 + 8_393_728
    assert block_reads("scaling-800m-ff") == 4_198_400 + 463_872
    assert block_reads("scaling-800m-qkv") == 169_152 + 12_590_080
    assert block_reads("scaling-800m-ff-qkv") == block_reads("scaling-800m-ff-qkv-loss") == 169_152 + 891_904
    assert block_reads("scaling-17b-ff-qkv") == 2_362_032 + 7_185_408
    assert block_reads("lm1b-sparse") == 169_152 + 463_872
    assert preset("scaling-800m-ff-qkv-loss").head == MultiplicativeHeadConfig(head_modules=4)
    heads = {"scaling-800m-ff": (16, 24), "scaling-17b-dense": (96, 6), "lm1b-sparse": (16, 24)}
    for name, sizes in heads.items():
        assert (preset(name).num_attention_heads, preset(name).num_hidden_layers) == sizes
        assert preset(name).dropout == preset(name).attention_dropout == 0.1


def test_summarizers_are_equally_large() -> None:
    members = {name.split("-")[-1]: config for name, config in PRESETS.items() if name.startswith("summarize-")}
    assert {name: type(config) for name, config in members.items()} == {
        "dense": Seq2SeqConfig,
        "scaling": Seq2SeqConfig,
        "terraformer": TerraformerConfig,
    }
    dense = members["dense"]
    assert all(within_1_percent(num_parameters(config), num_parameters(dense)) for config in members.values())
    assert dense_twin(members["scaling"]) == dense
    shared = ("vocab_size", "hidden_size", "head")
    assert all(getattr(config, key) == getattr(dense, key) for config in members.values() for key in shared)
    layers = {name: (config.num_encoder_layers, config.num_decoder_layers) for name, config in members.items()}
    assert layers == {"dense": (3, 3), "scaling": (3, 3), "terraformer": (2, 5)}
    sparse = (SparseFeedForwardConfig, SparseProjectionConfig)
    assert all(
        (type(members[n].feed_forward), type(members[n].attention)) == sparse for n in ("scaling", "terraformer")
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [("seq2seq-800m-dense", 0.8), ("seq2seq-17b-dense", 17), ("terraformer-800m", 0.8), ("terraformer-8b", 8),
     ("terraformer-17b", 17), ("terraformer-54b", 54)],
)  # fmt: skip
def test_encoder_decoders_of_the_paper_have_the_size_of_their_name(name: str, billions: float) -> None:
    assert num_parameters(preset(name)) == pytest.approx(billions * 1e9, rel=0.08)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no preset 'small-1m-f16'; the nearest are 'small-1m-ff16', "):
        preset("small-1m-f16")


@pytest.mark.parametrize(
    ("feed_forward", "step"),
    [
        (DenseFeedForwardConfig(activation="swiglu"), 8),
        (SparseFeedForwardConfig(ff_block_size=32), 32),
        (BlockFeedForwardConfig(num_experts=4), 4),
        (SwitchFeedForwardConfig(num_experts=16), 16),
    ],
)
def test_match_parameters_takes_the_nearest_width(feed_forward: FeedForwardConfig, step: int) -> None:
    config = ModelConfig(feed_forward=feed_forward)
    for target in (5_000_000, 7_777_777):
        matched = match_parameters(config, target)
        width = matched.feed_forward.intermediate_size
        assert width % step == 0
        assert replace(matched, feed_forward=feed_forward) == config

        def distance(width: int, target: int = target) -> int:
            changed = replace(config.feed_forward, intermediate_size=width)
            return abs(num_parameters(replace(config, feed_forward=changed)) - target)

        assert distance(width) <= min(distance(width - step), distance(width + step))


@pytest.mark.parametrize("target", [100_000, 3_000_000])
def test_match_parameters_out_of_reach(target: int) -> None:
    """Too few parameters for the other parts, or the steps of a block too wide."""
    config = ModelConfig(num_hidden_layers=6, feed_forward=SparseFeedForwardConfig(ff_block_size=1024))
    with pytest.raises(ConfigError, match=rf"{target:,} parameters within 1%: the nearest, 1024, gives [\d,]+; change"):
        match_parameters(config, target)
