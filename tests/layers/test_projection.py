"""Replacements of a dense layer against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracles
from terseformer.layers.projection import (
    LocalConvolution,
    LocallyConnected,
    LowRank,
    Multiplicative,
    MultiplicativeModular,
)
from terseformer.state import Chunk
from variants import make_visible


@pytest.mark.parametrize(("size_in", "size_out", "modules"), [(5, 6, 3), (7, 4, 1), (3, 5, 5), (6, 14, 2)])
class TestMultiplicative:
    def layer(self, size_in: int, size_out: int, modules: int) -> Multiplicative:
        return make_visible(Multiplicative(size_in, size_out, modules).double())

    @pytest.mark.parametrize("tokens", [1, 2, 11])
    def test_all_forms_equal_the_double_loop(self, size_in: int, size_out: int, modules: int, tokens: int) -> None:
        layer = self.layer(size_in, size_out, modules)
        x = torch.randn(tokens, size_in, dtype=torch.float64)
        expected = oracles.multiplicative(x, layer.modules_weight, layer.features_weight, layer.bias)
        assert_close(layer(x), expected)
        assert_close(layer.factored(x), expected)
        assert_close(x @ layer.dense_weight() + layer.bias, expected)

    def test_dense_weight_is_the_outer_product(self, size_in: int, size_out: int, modules: int) -> None:
        layer = self.layer(size_in, size_out, modules)
        dense, width = layer.dense_weight(), size_out // modules
        assert dense.shape == (size_in, size_out)
        for i in range(size_in):
            for s in range(modules):
                for m in range(width):
                    product = layer.modules_weight[s, i] * layer.features_weight[i, m]
                    assert_close(dense[i, s * width + m], product)

    def test_both_forms_have_the_same_gradients(self, size_in: int, size_out: int, modules: int) -> None:
        layer = self.layer(size_in, size_out, modules)
        x = torch.randn(2, 4, size_in, dtype=torch.float64, requires_grad=True)
        cotangent = torch.randn(2, 4, size_out, dtype=torch.float64)
        leaves = [x, *layer.parameters()]
        factored = torch.autograd.grad((layer.factored(x) * cotangent).sum(), leaves)
        dense = torch.autograd.grad(((x @ layer.dense_weight() + layer.bias) * cotangent).sum(), leaves)
        for one, other in zip(factored, dense, strict=True):
            assert_close(one, other)


def test_multiplicative_can_be_any_permutation() -> None:
    """Section 3.2 of the paper: output (s, m) takes input i where D[s, i] and E[i, m] are 1."""
    layer, permutation = Multiplicative(6, 6, 3), [4, 2, 0, 5, 1, 3]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for out, source in enumerate(permutation):
            layer.modules_weight[out // 2, source] = 1
            layer.features_weight[source, out % 2] = 1
    x = torch.arange(6.0)[None]
    assert layer(x).tolist() == [[4.0, 2.0, 0.0, 5.0, 1.0, 3.0]]


def test_multiplicative_needs_a_multiple_of_the_modules() -> None:
    with pytest.raises(ValueError, match="size_out = 7 is not a multiple of num_modules = 3"):
        Multiplicative(5, 7, 3)


@pytest.mark.parametrize("modules", [1, 2, 3, 6])
def test_multiplicative_modular(modules: int) -> None:
    layer = make_visible(MultiplicativeModular(6, modules).double())
    x = torch.randn(3, 6, dtype=torch.float64)
    weights = (layer.modules_weight, layer.features_weight, layer.mixing_weight, layer.bias)
    assert_close(layer(x), oracles.multiplicative_modular(x, *weights))
    assert_close(layer(x.view(3, 1, 6)), layer(x).view(3, 1, 6))


def test_low_rank_is_two_dense_layers_with_bias() -> None:
    layer = make_visible(LowRank(5, 7, 3).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    down, up = layer
    assert down.weight.shape == (3, 5)
    assert_close(layer(x), (x @ down.weight.t() + down.bias) @ up.weight.t() + up.bias)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("modules", [2, 3, 7])
def test_locally_connected(modules: int, kernel: int) -> None:
    layer = make_visible(LocallyConnected(2, 3, modules, kernel).double())
    x = torch.randn(4, modules * 2, dtype=torch.float64)
    expected = oracles.locally_connected(x.view(4, modules, 2), layer.weight, layer.bias)
    assert_close(layer(x), expected.flatten(1))
    assert_close(layer(x.view(2, 2, -1)), expected.view(2, 2, -1))


def test_locally_connected_weights_belong_to_the_source() -> None:
    layer = LocallyConnected(1, 1, 5, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[4] = torch.tensor([2.0, 3.0, 5.0]).view(3, 1, 1)
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    # Seen from output 0 (past the edge) it is the left neighbour, i = 0; from 4 the centre; from 3 the right one.
    assert layer(x).tolist() == [[2.0, 0.0, 0.0, 5.0, 3.0]]


@pytest.mark.parametrize("length_kernel", [1, 2, 3])
@pytest.mark.parametrize("module_kernel", [1, 3, 5])
@pytest.mark.parametrize("modules", [1, 2, 5])
def test_local_convolution(modules: int, module_kernel: int, length_kernel: int) -> None:
    layer = make_visible(LocalConvolution(2, 3, modules, module_kernel, length_kernel).double())
    x = torch.randn(2, 5, modules * 2, dtype=torch.float64)
    expected = [oracles.local_convolution(row.view(5, modules, 2), layer.kernel, layer.bias) for row in x]
    assert_close(layer(x), torch.stack(expected).flatten(2))


@pytest.mark.parametrize("length", [1, 2])
def test_local_convolution_of_fewer_tokens_than_its_window(length: int) -> None:
    layer = make_visible(LocalConvolution(2, 2, 3, 3, 4).double())
    x = torch.randn(1, length, 6, dtype=torch.float64)
    expected = oracles.local_convolution(x.view(length, 3, 2), layer.kernel, layer.bias)
    assert_close(layer(x)[0], expected.flatten(1))


@pytest.mark.parametrize("length_kernel", [1, 3, 9])
def test_local_convolution_goes_on_from_its_memory(length_kernel: int) -> None:
    layer = make_visible(LocalConvolution(2, 2, 3, 3, length_kernel).double())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    memory, parts = layer.new_memory(2), []
    for start, end in ((0, 1), (1, 4), (4, 7)):
        chunk = Chunk(torch.arange(start, end).expand(2, -1), end=end)
        parts.append(layer(x[:, start:end], chunk, memory))
    assert_close(torch.cat(parts, dim=1), layer(x))
    assert memory.frames.shape == (2, length_kernel - 1, 3, 2)


@pytest.mark.parametrize("make", [LocalConvolution, LocallyConnected])
def test_an_even_kernel_is_an_error(make: type) -> None:
    with pytest.raises(ValueError, match="module_kernel must be odd, not 2"):
        make(4, 4, 2, 2)
