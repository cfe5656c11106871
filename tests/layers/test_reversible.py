"""Reversible layers: the gradients of ordinary autograd, with dropout and sampled choices, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from terseformer.config import LSHPatternConfig, SparseFeedForwardConfig, TerraformerConfig
from terseformer.layers.feedforward import feed_forward
from terseformer.layers.lsh import LSHAttention
from terseformer.layers.replay import Tape, remember
from terseformer.layers.reversible import Forget, Join, ReversibleStack
from terseformer.terraformer import Terraformer

SIZE = 12


class Noisy(nn.Module):
    """A sampled controller between two dropouts, and an argument from outside."""

    def __init__(self) -> None:
        super().__init__()
        config = SparseFeedForwardConfig(intermediate_size=24, ff_block_size=4, controller_rank=5, quant_prob=0.5)
        self.before, self.feed_forward, self.after = nn.Dropout(0.3), feed_forward(config, SIZE), nn.Dropout(0.3)

    def forward(self, x: Tensor, shift: float) -> Tensor:
        return self.after(self.feed_forward(self.before(x + shift)))


def stack(layers: int, swaps: Callable[[int], bool] = lambda index: True, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return ReversibleStack([Noisy() for _ in range(layers)], [swaps(i) for i in range(layers)]).to(dtype).train()


def gradients(model: ReversibleStack, keeps_activations: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of both inputs and all parameters."""
    model.keeps_activations = keeps_activations
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(2, 5, SIZE, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    torch.manual_seed(2)
    y1, y2 = model((x1, x2), 0.25)
    loss = (y1.sin() * torch.arange(SIZE)).sum() + (y2**2).sum()
    return list(torch.autograd.grad(loss, [x1, x2, *model.parameters()]))


@pytest.mark.parametrize(
    "swaps", [lambda index: True, lambda index: False, lambda index: index % 2 == 0], ids=["all", "none", "every other"]
)
def test_gradients_are_those_of_autograd(swaps: Callable[[int], bool]) -> None:
    model = stack(6, swaps)
    for ours, plain in zip(gradients(model, False), gradients(model, True), strict=True):
        assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("places", [[2, 5], [0], [6], [1, 2, 6]], ids=str)
def test_gradients_through_joints_are_those_of_autograd(places: list[int]) -> None:
    torch.manual_seed(0)
    joints = {place: Forget(SIZE) for place in places}
    model = ReversibleStack([Noisy() for _ in range(6)], [True, True, False] * 2, joints).double().train()
    for ours, plain in zip(gradients(model, False), gradients(model, True), strict=True):
        assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    x = torch.randn(1, 2, SIZE, dtype=torch.float64)
    for forget in joints.values():
        one, other = forget((x, 3 * x))
        assert_close(one, forget.dense(2 * x))
        assert_close(one, other)


def test_streams_are_joined_side_by_side() -> None:
    one, other = Join()((torch.zeros(1, 2, 3), torch.ones(1, 2, 3)))
    assert one[0, 1].tolist() == other[0, 1].tolist() == [0, 0, 0, 1, 1, 1]


def test_gradients_in_float32() -> None:
    model = stack(6, dtype=torch.float32)
    for ours, plain in zip(gradients(model, False, torch.float32), gradients(model, True, torch.float32), strict=True):
        assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_gradients_under_autocast() -> None:
    model = stack(3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = list(zip(gradients(model, False, torch.float32), gradients(model, True, torch.float32), strict=True))
    for ours, plain in pairs:
        assert (ours - plain).norm() <= 0.02 * plain.norm()


def test_what_follows_draws_the_same_numbers() -> None:
    """The random number generators stand where they would stand without a second computation."""
    after = []
    for keeps_activations in (False, True):
        gradients(stack(3), keeps_activations)
        after.append(torch.rand(3))
    assert_close(after[0], after[1])


@pytest.mark.parametrize("layers", [2, 8])
def test_no_activation_is_kept(layers: int) -> None:
    kept: dict[bool, int] = {}
    for keeps_activations in (False, True):
        model, sizes = stack(layers), []
        model.keeps_activations = keeps_activations

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        x = torch.randn(2, 5, SIZE, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model((x, x), 0.0)
        kept[keeps_activations] = sum(sizes)
    assert kept[False] == 0
    assert kept[True] > layers * x.numel()


def test_a_choice_near_a_tie_is_remembered() -> None:
    """The second computation sees other last digits; what was chosen stays."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.chosen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            choice = remember(lambda: len(self.chosen) % 2)
            self.chosen.append(choice)
            return x * self.scale[choice]

    layer = Choosing()
    model = ReversibleStack([layer, layer], [True, True]).train()
    x = torch.randn(1, 2, 3, requires_grad=True)
    y1, y2 = model((x, x))
    (y1 + y2).sum().backward()
    assert layer.chosen == [0, 1, 1, 0]


def test_a_stack_is_taken_back_once() -> None:
    model = stack(2)
    x = torch.randn(2, 5, SIZE, dtype=torch.float64, requires_grad=True)
    loss = model((x, x), 0.0)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken back already"):
        loss.backward()


def test_frozen_parameters_get_no_gradient() -> None:
    model = stack(2)
    frozen = next(model.layers[0].parameters()).requires_grad_(False)
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    sum(model((x, x), 0.0)).sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in model.layers[1].parameters())


def test_without_gradients_nothing_is_recorded() -> None:
    model = stack(2).eval()
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    with torch.no_grad():
        y1, y2 = model((x, x), 0.0)
    assert not y1.requires_grad
    first, second = model.layers
    assert_close(y1, x + first(x, 0.0))
    assert_close(y2, x + second(y1, 0.0))


def test_a_tape_repeats_what_was_drawn() -> None:
    tape = Tape(torch.device("cpu"))

    def call() -> list[float]:
        return [torch.rand(()).item(), remember(lambda: torch.rand(3)).sum().item(), torch.rand(()).item()]

    with tape.recording():
        first = call()
    later = torch.get_rng_state()
    for _ in range(2):
        with tape.replaying():
            assert call() == first
    assert torch.equal(torch.get_rng_state(), later)


@pytest.mark.parametrize("reversible_encoder", [False, True])
def test_hash_buckets_are_remembered(reversible_encoder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows smaller than the sequence: other buckets in the backward pass would give other gradients."""
    draws, draw = [], LSHAttention.hash
    monkeypatch.setattr(LSHAttention, "hash", lambda *args: draws.append(1) or draw(*args))
    pattern = LSHPatternConfig(chunk_length=4, chunks_before=0)
    config = TerraformerConfig(
        vocab_size=21,
        hidden_size=24,
        num_attention_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        max_position_embeddings=32,
        dropout=0.2,
        attention_dropout=0.2,
        attention_pattern=pattern,
        encoder_attention_pattern=pattern,
        reversible_encoder=reversible_encoder,
    )
    torch.manual_seed(0)
    model = Terraformer(config).double().train()
    source, target = torch.randint(1, 21, (3, 23)), torch.randint(1, 21, (3, 17))
    found = []
    for keeps_activations in (False, True):
        for stack in (model.encoder, model.decoder):
            stack.keeps_activations = keeps_activations
        torch.manual_seed(4)
        loss = model(source, target, torch.tensor([23, 9, 16])).logsumexp(-1).sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(draws) == 2 * 6  # once a layer, in neither backward pass
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, rtol=1e-9, atol=1e-9)
