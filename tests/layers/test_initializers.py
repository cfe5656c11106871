"""Initial values: the distributions that the reference draws from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from terseformer.config import (
    BlockFeedForwardConfig,
    DenseFeedForwardConfig,
    DenseHeadConfig,
    FeedForwardConfig,
    ModelConfig,
    SparseFeedForwardConfig,
    SwitchFeedForwardConfig,
)
from terseformer.layers.feedforward import feed_forward
from terseformer.layers.initializers import dense, glorot, near_zero
from terseformer.layers.position import sinusoids
from terseformer.layers.projection import (
    LocalConvolution,
    LocallyConnected,
    LowRank,
    Multiplicative,
    MultiplicativeModular,
)
from terseformer.layers.recurrence import SRU
from terseformer.model import CausalLM


def assert_uniform(values: Tensor, limit: float) -> None:
    """Uniform in [-limit, limit]: its ends, mean and standard deviation."""
    assert values.numel() >= 300
    assert values.abs().max() <= limit
    assert values.min() < -0.95 * limit
    assert values.max() > 0.95 * limit
    assert abs(values.mean()) < 5 * limit / math.sqrt(3 * values.numel())
    assert_close(values.std().item(), limit / math.sqrt(3), rtol=0.1, atol=0)


def assert_normal(values: Tensor, std: float) -> None:
    """Normal with the given standard deviation: mean, deviation, and that it has tails."""
    assert values.numel() >= 300
    assert abs(values.mean()) < 5 * std / math.sqrt(values.numel())
    assert_close(values.std().item(), std, rtol=0.15, atol=0)
    assert values.abs().max() > 2.2 * std


def assert_near_zero(values: Tensor) -> None:
    """A bias: normal with standard deviation 1e-6, not zero."""
    assert 0 < values.abs().max() < 6e-6
    if values.numel() > 20:
        assert 0.5e-6 < values.std() < 2e-6


def test_glorot_and_near_zero() -> None:
    assert_uniform(glorot(50, 30, fan_in=50, fan_out=30), math.sqrt(6 / 80))
    assert_uniform(glorot(50, 30, fan_in=4, fan_out=2), 1.0)
    assert_normal(near_zero(1000), 1e-6)


def test_dense() -> None:
    layer = dense(30, 70)
    assert layer.weight.shape == (70, 30)
    assert_uniform(layer.weight, math.sqrt(6 / 100))
    assert_near_zero(layer.bias)
    assert dense(30, 70, bias=False).bias is None


def test_low_rank() -> None:
    down, up = LowRank(60, 70, 10)
    assert_uniform(down.weight, math.sqrt(6 / 70))
    assert_uniform(up.weight, math.sqrt(6 / 80))
    assert_near_zero(down.bias)
    assert_near_zero(up.bias)


def test_multiplicative() -> None:
    layer = Multiplicative(90, 120, 6)
    assert_normal(layer.modules_weight, 0.5)
    assert_uniform(layer.features_weight, math.sqrt(6 / (90 + 20)))
    assert_near_zero(layer.bias)


def test_multiplicative_modular() -> None:
    layer = MultiplicativeModular(90, 6)
    assert_normal(layer.modules_weight, 0.5)
    assert_uniform(layer.features_weight, math.sqrt(6 / (90 + 15)))
    assert_uniform(layer.mixing_weight, math.sqrt(6 / (15 + 15)))
    assert_near_zero(layer.bias)


@pytest.mark.parametrize(("module_kernel", "length_kernel"), [(1, 3), (3, 3), (5, 1)])
def test_local_convolution_ignores_the_size_of_its_window(module_kernel: int, length_kernel: int) -> None:
    layer = LocalConvolution(16, 24, 3, module_kernel, length_kernel)
    assert_normal(layer.kernel, math.sqrt(2 / (16 + 24)))
    assert_near_zero(layer.bias)


@pytest.mark.parametrize("module_kernel", [1, 3])
def test_locally_connected_ignores_the_size_of_its_window(module_kernel: int) -> None:
    layer = LocallyConnected(8, 12, 9, module_kernel)
    assert_uniform(layer.weight, math.sqrt(6 / (8 + 12)))
    assert_near_zero(layer.bias)


def test_sru() -> None:
    layer = SRU(20)
    assert_uniform(layer.gates.weight, math.sqrt(6 / (20 + 60)))
    assert_near_zero(layer.gates.bias)


@pytest.mark.parametrize("kernel_scaling", [False, True])
def test_sparse_feed_forward(kernel_scaling: bool) -> None:
    config = SparseFeedForwardConfig(
        intermediate_size=90, ff_block_size=9, controller_rank=12, kernel_scaling=kernel_scaling
    )
    layer = feed_forward(config, 40)
    limit = math.sqrt(6 / (40 + 90))
    assert_uniform(layer.up_weight, limit)
    assert_uniform(layer.down_weight, limit * (3 if kernel_scaling else 1))  # sqrt(N)
    assert_uniform(layer.controller.down.weight, math.sqrt(6 / (40 + 12)))
    assert_uniform(layer.controller.up.weight, math.sqrt(6 / (12 + 90)))
    assert_near_zero(layer.bias)
    assert_near_zero(layer.controller.up.bias)


@pytest.mark.parametrize(
    "config",
    [
        BlockFeedForwardConfig(intermediate_size=90, num_experts=9),
        SwitchFeedForwardConfig(intermediate_size=90, num_experts=9),
    ],
)
def test_expert_feed_forward(config: FeedForwardConfig) -> None:
    layer = feed_forward(config, 40)
    assert_uniform(layer.up_weight, math.sqrt(6 / (40 + 90)))
    assert_uniform(layer.down_weight, math.sqrt(6 / (40 + 90)))
    assert_uniform(layer.controller.choose.weight, math.sqrt(6 / (40 + 9)))
    assert_near_zero(layer.bias)


def test_dense_feed_forward() -> None:
    layer = feed_forward(DenseFeedForwardConfig(intermediate_size=90, activation="swiglu"), 40)
    for part in (layer.up, layer.gate, layer.down):
        assert_uniform(part.weight, math.sqrt(6 / (40 + 90)))
        assert_near_zero(part.bias)


@pytest.mark.parametrize("tied", [False, True])
def test_model(tied: bool) -> None:
    config = ModelConfig(
        vocab_size=300, hidden_size=20, num_hidden_layers=1, max_position_embeddings=9, head=DenseHeadConfig(tied=tied)
    )
    model = CausalLM(config)
    # A tied embedding is scaled up by sqrt(D) on its way in: the residual stream starts with the same size.
    assert_normal(model.embedding.weight, 1 / math.sqrt(20) if tied else 1.0)
    seen: list[Tensor] = []
    model.position.register_forward_pre_hook(lambda *_: None)
    model.embedding_dropout.register_forward_hook(lambda *args: seen.append(args[2]))
    model(torch.arange(300)[:9][None])
    assert_close(seen[0].std().item(), 1.0, rtol=0.25, atol=0)
    assert_close(model.position.weight, sinusoids(torch.arange(9), 20), atol=0, rtol=0)
    for norm in (model.norm, model.blocks[0].attention_norm, model.blocks[0].feed_forward_norm):
        assert norm.weight.tolist() == [1.0] * 20
        assert norm.bias.tolist() == [0.0] * 20
    if not tied:
        assert_uniform(model.head.weight, math.sqrt(6 / 320))
        assert_near_zero(model.head.bias)
