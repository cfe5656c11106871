"""Bytes that decoding reads, against the accounting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from terseformer.accounting import account
from terseformer.presets import preset
from terseformer.traffic import bytes_read


def test_bytes_read_are_those_of_the_accounting_but_for_padding() -> None:
    for name in ("small-1m-dense", "small-1m-ff64", "small-1m-ff-qkv-loss"):
        config = preset(name)
        expected = account(config).bytes_per_token(4)
        assert expected <= bytes_read(config, "f32", 0) <= 1.02 * expected
        assert bytes_read(config, "int8", 0) < 0.35 * expected
        cache = 2 * 4 * config.hidden_size * config.num_hidden_layers * 10
        assert bytes_read(config, "f32", 10) - bytes_read(config, "f32", 0) == cache


@pytest.mark.parametrize("kind", ["dense", "scaling", "terraformer"])
def test_a_source_is_not_read_again_for_each_token(kind: str) -> None:
    config = replace(preset(f"summarize-1m-{kind}"), position="sinusoidal")
    expected = account(config).bytes_per_token(4) + 4 * config.hidden_size  # and the position, which is a table here
    assert expected <= bytes_read(config, "f32", 0) <= 1.02 * expected
    layer = 2 * 4 * config.hidden_size * 10  # keys and values of ten tokens in a layer of attention
    layers = {"dense": 3, "scaling": 3, "terraformer": 5 * 2}[kind]
    assert bytes_read(config, "f32", 10) - bytes_read(config, "f32", 0) == layers * layer
    crosses = bytes_read(config, "f32", 0, num_source=10) - bytes_read(config, "f32", 0)
    assert crosses == (0 if kind == "terraformer" else 3 * layer)
