"""The softmax pattern, and the sparse projection's composition, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import oracles
from terseformer.config import (
    AttentionProjectionConfig,
    DenseProjectionConfig,
    LocalConvolutionProjectionConfig,
    LowRankProjectionConfig,
    SparseProjectionConfig,
)
from terseformer.layers.attention import Attention, CausalSoftmax
from terseformer.layers.projection import LocalConvolution
from terseformer.layers.qkv import SparseProjection, attention_projection
from terseformer.state import Chunk, KeyValueCache
from variants import make_visible


def chunk(batch: int, start: int, end: int) -> Chunk:
    return Chunk(torch.arange(start, end).expand(batch, -1), end=end)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_causal_softmax(length: int) -> None:
    q, k, v = (torch.randn(2, 3, length, 5, dtype=torch.float64) * 2 for _ in range(3))
    y = CausalSoftmax()(q, k, v, chunk(2, 0, length))
    for b in range(2):
        for h in range(3):
            assert_close(y[b, h], oracles.causal_attention(q[b, h], k[b, h], v[b, h]))


def test_causal_softmax_with_a_cache_of_rows_of_different_lengths() -> None:
    width = 4
    q, k, v = (torch.randn(2, 1, 6, width, dtype=torch.float64) for _ in range(3))
    pattern, cache = CausalSoftmax(), KeyValueCache.new(2, 1, 6, width, q)
    cache.keys.fill_(1e6)  # what no row has written, no row may read
    cache.values.fill_(1e6)
    first = Chunk(torch.arange(4).expand(2, -1), torch.tensor([4, 2]), 4)
    second = Chunk(torch.tensor([[4, 5], [2, 3]]), torch.tensor([2, 1]), 6)
    take = torch.tensor([[4, 5], [2, 5]])[:, None, :, None].expand(-1, -1, -1, width)
    parts = [
        pattern(q[:, :, :4], k[:, :, :4], v[:, :, :4], first, cache),
        pattern(*(x.gather(2, take) for x in (q, k, v)), second, cache),
    ]
    for row, counts in enumerate(((4, 2), (2, 1))):
        length = sum(counts)
        got = torch.cat([part[row, 0, :count] for part, count in zip(parts, counts, strict=True)])
        assert_close(got, oracles.causal_attention(*(x[row, 0, :length] for x in (q, k, v))))


def test_attention_dropout_scales_what_it_keeps() -> None:
    pattern = CausalSoftmax(0.5)
    q = torch.zeros(1, 1, 1, 4)
    v = torch.ones(1, 1, 1, 4)
    values = {pattern.train()(q, q, v, chunk(1, 0, 1))[0, 0, 0, 0].item() for _ in range(50)}
    assert values == {0.0, 2.0}
    assert_close(pattern.eval()(q, q, v, chunk(1, 0, 1)), v)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [DenseProjectionConfig(), LowRankProjectionConfig(rank=2), LocalConvolutionProjectionConfig(qkv_modules=3)],
)
def test_attention_divides_features_into_heads(config: AttentionProjectionConfig, heads: int) -> None:
    projection = make_visible(attention_projection(config, 6).double())
    attention, x = Attention(projection, heads, CausalSoftmax()), torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = (layer(x) for layer in (projection.query, projection.key, projection.value))
    merged = torch.empty_like(x)
    for row in range(2):
        for part in torch.arange(6).chunk(heads):
            merged[row, :, part] = oracles.causal_attention(q[row][:, part], k[row][:, part], v[row][:, part])
    assert_close(attention(x, chunk(2, 0, 5)), projection.out(merged))


def convolve(layer: LocalConvolution, rows: Tensor) -> Tensor:
    """The layer as a loop, on [B, T, S, C]."""
    return torch.stack([oracles.local_convolution(row, layer.kernel, layer.bias) for row in rows]).flatten(2)


@pytest.mark.parametrize("value_input", ["none", "fixed", "original"])
@pytest.mark.parametrize("share_qk", [False, True])
def test_sparse_projection_makes_q_k_and_v(share_qk: bool, value_input: str) -> None:
    modules, width, size = 3, 2, 6
    config = SparseProjectionConfig(qkv_modules=modules, share_qk=share_qk, value_input=value_input)
    projection = make_visible(attention_projection(config, size).double())
    assert isinstance(projection, SparseProjection)
    x = torch.randn(2, 4, size, dtype=torch.float64)
    shared = projection.shared
    weights = (shared.modules_weight, shared.features_weight, shared.bias)
    u = torch.stack([oracles.multiplicative(row, *weights) for row in x])
    q, k, v = projection.qkv(x, chunk(2, 0, 4))
    assert_close(q, convolve(projection.query, u.view(2, 4, modules, width)))
    if share_qk:
        assert projection.key is None
        assert k is q
    else:
        assert_close(k, convolve(projection.key, u.view(2, 4, modules, width)))
        assert not torch.allclose(q, k)
    assert projection.value.kernel.shape[:2] == (3, 1)
    if value_input == "none":
        seen = u.view(2, 4, modules, width)
    elif value_input == "original":
        seen = torch.cat([u, x], dim=-1).view(2, 4, modules, 2 * width)  # modules that mix u and x
    else:
        seen = torch.stack(
            [torch.cat([u[..., s : s + width], x[..., s : s + width]], dim=-1) for s in range(0, size, width)], dim=2
        )
    assert_close(v, convolve(projection.value, seen))


@pytest.mark.parametrize("output_layer", ["none", "mult", "conv", "multconv"])
def test_sparse_projection_makes_the_output(output_layer: str) -> None:
    config = SparseProjectionConfig(qkv_modules=3, output_layer=output_layer)
    projection = make_visible(attention_projection(config, 6).double())
    assert isinstance(projection, SparseProjection)
    x = expected = torch.randn(1, 4, 6, dtype=torch.float64)
    if "mult" in output_layer:
        layer = projection.out_mult
        expected = oracles.multiplicative(x[0], layer.modules_weight, layer.features_weight, layer.bias)[None]
    if "conv" in output_layer:
        expected = convolve(projection.out_conv, expected.view(1, 4, 3, 2))
    assert_close(projection.output(x, chunk(1, 0, 4)), expected)
    assert (projection.out_mult is None) == ("mult" not in output_layer)
    assert (projection.out_conv is None) == ("conv" not in output_layer)


def test_a_sparse_projection_without_output_layer_hands_the_heads_through() -> None:
    projection = attention_projection(SparseProjectionConfig(qkv_modules=3), 6)
    x = torch.randn(2, 4, 6)
    assert projection.output(x, chunk(2, 0, 4)) is x


@pytest.mark.parametrize("modules", [1, 2, 3, 6])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_modules_need_not_equal_heads(modules: int, heads: int) -> None:
    projection = make_visible(attention_projection(SparseProjectionConfig(qkv_modules=modules), 6).double())
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = (h[0] for h in projection.qkv(x, chunk(1, 0, 5)))
    parts = [oracles.causal_attention(q[:, p], k[:, p], v[:, p]) for p in torch.arange(6).chunk(heads)]
    assert_close(Attention(projection, heads, CausalSoftmax())(x, chunk(1, 0, 5))[0], torch.cat(parts, dim=-1))


def test_rotary_positions_turn_queries_and_keys_alone() -> None:
    projection = attention_projection(DenseProjectionConfig(), 4)
    x = torch.randn(1, 3, 4)
    plain, rotary = (
        Attention(projection, 1, CausalSoftmax()),
        Attention(projection, 1, CausalSoftmax(), rope_theta=100.0),
    )
    assert_close(rotary(x[:, :1], chunk(1, 0, 1)), plain(x[:, :1], chunk(1, 0, 1)))
    later = Chunk(torch.tensor([[7, 8, 9]]), end=10)
    assert_close(rotary(x, later), rotary(x, chunk(1, 0, 3)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rotary(x, chunk(1, 0, 3)), plain(x, chunk(1, 0, 3)), atol=1e-3)
