"""Controller statistics against counting by hand."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import pytest
import torch

from terseformer.controller_stats import ControllerStatistics
from terseformer.layers.feedforward import SparseFeedForward
from variants import MAX_POSITION, VARIANTS, make_model


def make_layer(num_choices: int, span: int, logits: torch.Tensor) -> SparseFeedForward:
    """A layer whose controller gives the rows of `logits` [T, G, N], whatever it sees."""

    class Given(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits.expand(*x.shape[:-1], *logits.shape[-2:])

    return SparseFeedForward(4, logits.shape[-2] * num_choices * span, Given(), num_choices, span=span).eval()


@pytest.mark.parametrize("name", ["feed_forward-sparse", "feed_forward-switch", "whole-scaling"])
def test_statistics_are_those_counted_by_hand(name):
    model = make_model(VARIANTS[name])
    logits: dict[str, list[torch.Tensor]] = {}
    for layer, module in model.named_modules():
        if isinstance(module, SparseFeedForward):
            logits[layer] = []
            module.controller.register_forward_hook(lambda m, i, out, layer=layer: logits[layer].append(out))
    with ControllerStatistics(model) as statistics, torch.inference_mode():
        model(torch.arange(3 * MAX_POSITION).view(3, -1) % 21)
        model(torch.tensor([[1]]))
    results = statistics.results()
    assert list(results) == ["blocks.0.feed_forward", "blocks.1.feed_forward"]
    for layer, use in results.items():
        span = model.get_submodule(layer).span
        rows = torch.cat([out.flatten(0, 1) for out in logits[layer]]).double()
        tokens, groups, choices = rows.shape
        entropy, loads, used = 0.0, 0.0, 0
        for group in range(groups):
            counts = Counter(rows[:, group].argmax(-1).tolist())
            used += len(counts)
            loads += max(counts.values()) / (tokens / choices)
            for p in rows[:, group].softmax(-1):
                entropy -= sum(x * math.log2(x) for x in p.tolist())
        assert use.tokens == tokens == 3 * MAX_POSITION + 1
        assert use.entropy == pytest.approx(entropy / tokens / groups, rel=1e-5)
        assert use.share_used == used / (groups * choices)
        assert use.dead_units == (groups * choices - used) * span
        assert use.imbalance == pytest.approx(loads / groups)


def test_even_and_constant_choices():
    even = torch.eye(4)[:, None] * 1000  # token i chooses i
    layer = make_layer(num_choices=4, span=3, logits=even)
    with ControllerStatistics(layer) as statistics:
        layer(torch.zeros(1, 4, 4))
    use = statistics.results()[""]
    assert (use.entropy, use.share_used, use.dead_units, use.imbalance) == (0, 1, 0, 1)
    layer = make_layer(num_choices=4, span=3, logits=torch.zeros(4, 2, 4))
    with ControllerStatistics(layer) as statistics:
        layer(torch.zeros(1, 4, 4))
    use = statistics.results()[""]
    assert (use.entropy, use.share_used, use.dead_units, use.imbalance) == (pytest.approx(2), 0.25, 18, 4)


def test_hooks_go_and_counts_begin_anew():
    model = make_model(VARIANTS["feed_forward-sparse"])
    statistics = ControllerStatistics(model)
    with statistics:
        model(torch.tensor([[1, 2]]))
    model(torch.tensor([[1, 2, 3]]))
    assert {use.tokens for use in statistics.results().values()} == {2}
    with statistics:
        assert statistics.results() == {}
        model(torch.tensor([[1, 2, 3]]))
    assert {use.tokens for use in statistics.results().values()} == {3}


def test_training_steps_are_watched_without_a_trace():
    model = make_model(VARIANTS["feed_forward-sparse"]).train()
    tokens = torch.tensor([[1, 2, 3]])
    gradients = []
    statistics = ControllerStatistics(model)
    for watching in (contextlib.nullcontext(), statistics):
        torch.manual_seed(0)
        model.zero_grad()
        with watching:
            model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert statistics.results()["blocks.0.feed_forward"].tokens == 3


def test_a_dense_model_has_none():
    model = make_model(VARIANTS["feed_forward-relu"])
    with ControllerStatistics(model) as statistics:
        model(torch.tensor([[1]]))
    assert statistics.results() == {}
