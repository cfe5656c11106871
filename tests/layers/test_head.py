"""From the last hidden vector to the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import oracles
from terseformer.config import DenseHeadConfig, MultiplicativeHeadConfig
from terseformer.layers.head import MixedHead, TiedHead, language_model_head
from terseformer.layers.projection import Multiplicative
from variants import make_visible


def embedding() -> nn.Embedding:
    return nn.Embedding(15, 6).double()


def test_dense_head_has_a_matrix_and_a_bias_of_its_own() -> None:
    head = make_visible(language_model_head(DenseHeadConfig(), 6, embedding())).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(head(x), x @ head.weight.t() + head.bias)


def test_tied_head_uses_the_embedding_without_bias() -> None:
    table = embedding()
    head = language_model_head(DenseHeadConfig(tied=True), 6, table)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert isinstance(head, TiedHead)
    assert [p.data_ptr() for p in head.parameters()] == [table.weight.data_ptr()]
    assert_close(head(x), x @ table.weight.t())
    head(x).sum().backward()
    assert_close(table.weight.grad, x.sum((0, 1)).expand(15, -1))


@pytest.mark.parametrize("modules", [1, 3, 5, 15])
def test_multiplicative_head_equals_the_double_loop(modules: int) -> None:
    head = make_visible(language_model_head(MultiplicativeHeadConfig(head_modules=modules), 6, embedding())).double()
    assert isinstance(head, Multiplicative)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(head(x), oracles.multiplicative(x, head.modules_weight, head.features_weight, head.bias))


def test_mixed_head_draws_once_a_call_in_training_and_is_sparse_otherwise() -> None:
    torch.manual_seed(0)
    config = MultiplicativeHeadConfig(head_modules=3, sparse_prob=0.3)
    head = make_visible(language_model_head(config, 6, embedding())).double()
    assert isinstance(head, MixedHead)
    x, calls = torch.randn(2, 3, 6, dtype=torch.float64), 300
    of_sparse, of_dense = head.sparse(x), head.dense(x)
    assert all(torch.equal(head.eval()(x), of_sparse) for _ in range(20))
    head.train()
    outputs = [head(x) for _ in range(calls)]
    num_sparse = sum(torch.equal(y, of_sparse) for y in outputs)
    assert num_sparse + sum(torch.equal(y, of_dense) for y in outputs) == calls
    assert abs(num_sparse - calls * 0.3) < 4.5 * math.sqrt(calls * 0.3 * 0.7)


def test_mixed_head_extremes() -> None:
    head = make_visible(language_model_head(MultiplicativeHeadConfig(head_modules=3, sparse_prob=0.0), 6, embedding()))
    head = head.double().train()
    x = torch.randn(1, 2, 6, dtype=torch.float64)
    assert all(torch.equal(head(x), head.dense(x)) for _ in range(20))
    assert torch.equal(head.eval()(x), head.sparse(x))
