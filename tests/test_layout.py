"""The packed layout: rounding against PyTorch's, and that every weight has its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantised import as_numpy
from terseformer.config import ConfigError, FavorPatternConfig, ModelConfig, TerraformerConfig
from terseformer.layout import DTYPES, PANEL, Dtype, declare, from_bf16, quantise, to_bf16
from variants import ENCODER_DECODERS, PYTORCH_ONLY, VARIANTS, make_model


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bf16_is_pytorchs(values: list[float]) -> None:
    expected = torch.tensor(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(np.array(values, np.float32))), expected)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 33)).astype(np.float32)
    rows[3] = 0
    numbers, scales = quantise(rows)
    assert numbers.dtype == np.int8
    assert np.abs(numbers).max(axis=1)[np.arange(20) != 3].tolist() == [127] * 19
    assert (np.abs(numbers * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*VARIANTS, *ENCODER_DECODERS])
def test_every_weight_has_its_place(name: str, dtype: Dtype) -> None:
    """Each entry is what was declared, and each weight of the model is the source of some entry."""
    config = (VARIANTS | ENCODER_DECODERS)[name]
    weights = as_numpy(make_model(config).state_dict())
    entries = declare(config, dtype)
    assert len({entry.name for entry in entries}) == len(entries)
    used = set()
    for entry in entries:
        array = entry.fill(weights)
        assert array.shape == entry.declared.shape
        used |= set(entry.sources)
        for source, shape in entry.sources.items():
            assert weights[source].shape == shape
    unused = {"head.dense.weight", "head.dense.bias"}  # of a mixture, which only training has
    unused |= {"head.weight"} if "tied" in name else set()
    assert used == set(weights) - unused


@pytest.mark.parametrize("config", PYTORCH_ONLY.values(), ids=PYTORCH_ONLY.keys())
def test_what_the_engine_does_not_decode_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.\S+ = '.*' is not decoded by the engine; .* --backend torch"):
        declare(config, "f32")


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_attention_pattern": FavorPatternConfig()},
        {"forget_every": 1},
        {"half_before_layer": 1},
        {"double_after_layer": 1},
        {"last_norm": "rms_norm"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_engine_does_not_decode_of_a_terraformer_is_refused(change: dict[str, object]) -> None:
    ((name, _),) = change.items()
    with pytest.raises(ConfigError, match=rf"model\.{name}\S* = .* is not decoded by the engine"):
        declare(TerraformerConfig(**change), "f32")
    declare(TerraformerConfig(ff_chunk_size=64), "f32")


def test_a_panel_holds_16_outputs_side_by_side() -> None:
    config = VARIANTS["feed_forward-relu"]
    weights = as_numpy(make_model(config).state_dict())
    (panels,) = (e.fill(weights) for e in declare(config, "f32") if e.name == "blocks.0.feed_forward.up.panels")
    matrix = weights["blocks.0.feed_forward.up.weight"]
    assert panels.shape == (-(-len(matrix) // PANEL), matrix.shape[1], PANEL)
    np.testing.assert_array_equal(panels[1, 4, :], matrix[PANEL : 2 * PANEL, 4])
    assert not panels[-1, :, len(matrix) % PANEL :].any()
