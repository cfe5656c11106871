"""A layer in chunks: the outputs and gradients of the whole, chance remembered, and little kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from terseformer.config import DenseFeedForwardConfig, FeedForwardConfig, SparseFeedForwardConfig
from terseformer.layers.chunked import in_chunks
from terseformer.layers.feedforward import feed_forward
from terseformer.layers.replay import remember
from terseformer.layers.reversible import ReversibleStack

SIZE = 12
LAYERS: dict[str, FeedForwardConfig] = {
    "dense": DenseFeedForwardConfig(intermediate_size=24),
    # Without chance: a hard choice without noise, or none.
    "hard": SparseFeedForwardConfig(
        intermediate_size=24, ff_block_size=4, controller_rank=5, quant_prob=1.0, temperature=0.0
    ),
    "soft": SparseFeedForwardConfig(intermediate_size=24, ff_block_size=4, controller_rank=5, quant_prob=0.0),
}


def gradients(layer: nn.Module, x: Tensor, chunk_size: int) -> list[Tensor]:
    """The output, and the gradients of the input and all parameters."""
    y = in_chunks(layer, x, chunk_size)
    return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8])
def test_outputs_and_gradients_are_those_of_the_whole(config: FeedForwardConfig, chunk_size: int) -> None:
    layer = feed_forward(config, SIZE).double().train()
    x = torch.randn(2, 7, SIZE, dtype=torch.float64, requires_grad=True)
    for ours, plain in zip(gradients(layer, x, chunk_size), gradients(layer, x, 99), strict=True):
        assert_close(ours, plain)
    layer.eval()
    with torch.no_grad():
        assert_close(in_chunks(layer, x, chunk_size), layer(x))


def test_a_chunk_is_computed_again_with_the_same_dropout() -> None:
    layer = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.5)).double().train()
    x = torch.randn(2, 9, SIZE, dtype=torch.float64, requires_grad=True)
    y = in_chunks(layer, x, 4)
    kept = (y != 0).double()
    expected = torch.autograd.grad((2 * kept * layer[0](x)).sum(), [x, *layer.parameters()])
    after = torch.get_rng_state()
    for ours, plain in zip(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), expected, strict=True):
        assert_close(ours, plain)
    assert torch.equal(torch.get_rng_state(), after)


class Scaled(nn.Module):
    """A choice of one of two scales that is another at each call, unless it is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 3.0], dtype=torch.float64))
        self.draws = 0

    def draw(self) -> int:
        self.draws += 1
        return self.draws % 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[remember(self.draw)]


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(self.inner, x, 2)


def test_choices_are_remembered_in_a_reversible_stack_too() -> None:
    stack = ReversibleStack([Chunked(), Chunked()], [True, True]).train()
    x = torch.randn(1, 6, SIZE, dtype=torch.float64, requires_grad=True)
    found = []
    for keeps_activations in (False, True):
        stack.keeps_activations = keeps_activations
        for layer in stack.layers:
            layer.inner.draws = 0
        y1, y2 = stack((x, x))
        found.append(torch.autograd.grad((y1 * 2 + y2).sum(), [x, *stack.parameters()]))
        assert [layer.inner.draws for layer in stack.layers] == [3, 3]
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain)


def test_only_the_input_is_kept() -> None:
    layer = feed_forward(LAYERS["dense"], SIZE)
    x, sizes = torch.randn(1, 64, SIZE, requires_grad=True), []

    def keep(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        in_chunks(layer, x, 8)
    assert sum(sizes) == x.numel()
