"""Feed-forward layers: executors, closed forms, exact gradients, and the statistics of their draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import oracles
from terseformer.config import (
    BlockFeedForwardConfig,
    DenseFeedForwardConfig,
    FeedForwardConfig,
    SparseFeedForwardConfig,
    SwitchFeedForwardConfig,
)
from terseformer.layers.controller import LowRankController, Router
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.feedforward import DenseFeedForward, SparseFeedForward, feed_forward
from terseformer.layers.masked_relu import hard_masked_relu, soft_masked_relu, softmax
from variants import make_visible

D, UNITS = 5, 12


def sparse(block_size: int, **changes: object) -> SparseFeedForwardConfig:
    return SparseFeedForwardConfig(intermediate_size=UNITS, ff_block_size=block_size, controller_rank=3, **changes)


CONFIGS: dict[str, FeedForwardConfig] = {
    **{f"sparse-N{n}": sparse(n) for n in (1, 2, 3, UNITS)},
    **{f"multiply-N{n}": sparse(n, multiply_by_controller=True) for n in (1, 4, UNITS)},
    "sparse-scaled": sparse(4, kernel_scaling=True),
    "all-N3": sparse(3, controller_gradient="all"),
    "all-multiply-N4": sparse(4, controller_gradient="all", multiply_by_controller=True),
    **{f"block-{n}": BlockFeedForwardConfig(intermediate_size=UNITS, num_experts=n) for n in (1, 3, UNITS)},
    **{f"switch-{n}": SwitchFeedForwardConfig(intermediate_size=UNITS, num_experts=n) for n in (1, 3, UNITS)},
}
every_layer = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: FeedForwardConfig) -> SparseFeedForward:
    """A layer in float64 and eval mode with biases of visible size."""
    layer = make_visible(feed_forward(config, D).double().eval())
    assert isinstance(layer, SparseFeedForward)
    return layer


def forced(config: FeedForwardConfig, hard: bool) -> SparseFeedForward:
    """The layer in training, its choice always (or never) hard, without noise."""
    layer = make(config).train()
    layer.temperature, layer.quant_prob = 0.0, float(hard)
    return layer


def expected(layer: SparseFeedForward, x: Tensor, policy: str) -> Tensor:
    """The oracle's output for tokens [T, D]."""
    weights = (layer.up_weight, layer.down_weight, layer.bias)
    rows = zip(x, layer.controller(x), strict=True)
    return torch.stack([oracles.sparse_feed_forward(*row, *weights, layer.span, policy) for row in rows])


def policy_of(config: FeedForwardConfig) -> str:
    """What the layer does outside training, as the oracle calls it."""
    multiplied = isinstance(config, SwitchFeedForwardConfig) or getattr(config, "multiply_by_controller", False)
    return "scaled" if multiplied else "hard"


class Fixed(nn.Module):
    """A controller that gives the same logits [G, N] to every token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:-1], -1, -1)


# ------------------------------------------------------------------------ contract 2, two executors


@pytest.mark.parametrize("batch", [1, 2, 7])
@every_layer
def test_masked_equals_gathered_equals_the_oracle(config: FeedForwardConfig, batch: int) -> None:
    layer = make(config)
    x = torch.randn(batch, D, dtype=torch.float64)
    truth = expected(layer, x, policy_of(config))
    assert_close(layer.masked(x), truth)
    assert_close(layer.gathered(x), truth)
    assert_close(layer(x), truth)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (2, 1, 3, D)], ids=str)
@every_layer
def test_any_leading_axes(config: FeedForwardConfig, shape: tuple[int, ...]) -> None:
    layer = make(config)
    x = torch.randn(*shape, dtype=torch.float64)
    truth = expected(layer, x.view(-1, D), policy_of(config)).view(shape)
    assert_close(layer.masked(x), truth)
    assert_close(layer.gathered(x), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layer
def test_executors_agree_in_lower_precision(config: FeedForwardConfig, dtype: torch.dtype) -> None:
    layer = make(config).to(dtype)
    x = torch.randn(7, D, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert layer.masked(x).dtype == layer.gathered(x).dtype == dtype
    assert_close(layer.masked(x), layer.gathered(x), atol=tolerance, rtol=tolerance)


@every_layer
def test_executors_take_a_softmax_of_higher_precision(
    config: FeedForwardConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast on a GPU gives the softmax of bfloat16 logits in float32."""
    softmax = Tensor.softmax
    layer, x = make(config).bfloat16(), torch.randn(7, D, dtype=torch.bfloat16)
    monkeypatch.setattr(Tensor, "softmax", lambda logits, dim: softmax(logits.float(), dim))
    assert_close(layer.masked(x), layer.gathered(x), atol=0.05, rtol=0.05)


@every_layer
def test_executors_break_ties_alike(config: FeedForwardConfig) -> None:
    layer = make(config)
    for parameter in layer.controller.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(7, D, dtype=torch.float64)
    assert_close(layer.masked(x), layer.gathered(x))
    assert_close(layer.masked(x), expected(layer, x, policy_of(config)))  # the first of the largest


@every_layer
def test_hard_training_without_noise_equals_eval(config: FeedForwardConfig) -> None:
    layer = forced(config, hard=True)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    assert_close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("block_size", [1, 3, UNITS])
def test_gathered_reads_only_the_chosen_units(block_size: int) -> None:
    """All other units may hold anything, even NaN."""
    layer = make(sparse(block_size))
    x = torch.randn(2, D, dtype=torch.float64)
    truth = layer.gathered(x)
    choice = layer.controller(x).argmax(-1) + torch.arange(UNITS // block_size) * block_size  # [B, G]
    chosen = set(choice.flatten().tolist())
    assert len(chosen) <= 2 * UNITS // block_size
    with torch.no_grad():
        for unit in set(range(UNITS)) - chosen:
            layer.up_weight[unit] = layer.down_weight[unit] = float("nan")
    assert_close(layer.gathered(x), truth)


# ------------------------------------------------------------------------------- values in training


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("switch")])
def test_soft_training_uses_every_unit_times_its_probability(name: str) -> None:
    layer = forced(CONFIGS[name], hard=False)
    x = torch.randn(7, D, dtype=torch.float64)
    assert_close(layer(x), expected(layer, x, "soft"))


@every_layer
def test_hard_training_uses_the_chosen_units(config: FeedForwardConfig) -> None:
    layer = forced(config, hard=True)
    x = torch.randn(7, D, dtype=torch.float64)
    assert_close(layer(x), expected(layer, x, policy_of(config)))


def test_switch_is_hard_and_scaled_whatever_quant_prob_says() -> None:
    layer = forced(CONFIGS["switch-3"], hard=False)
    x = torch.randn(7, D, dtype=torch.float64)
    assert_close(layer(x), expected(layer, x, "scaled"))


@pytest.mark.parametrize("hard", [False, True])
def test_blocks_of_one_unit_are_a_dense_layer_without_first_bias(hard: bool) -> None:
    layer = forced(sparse(1), hard)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    plain = F.relu(x @ layer.up_weight.t()) @ layer.down_weight + layer.bias
    assert_close(layer(x), plain)
    assert_close(layer.eval()(x), plain)


# --------------------------------------------------------------------------------- exact gradients


def plain_mask(logits: Tensor, choice: Tensor | None) -> Tensor:
    """The mask as the reference writes it: softmax, or one-hot with the softmax's gradient."""
    p = logits.softmax(-1)
    if choice is None:
        return p
    return torch.zeros_like(p).scatter(-1, choice, 1.0) + p - p.detach()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (3, 2, 5, 2), (2, 1, 9)], ids=str)
@pytest.mark.parametrize("mask", ["soft", "hard", "hard, all units"])
def test_masked_relu_has_the_gradients_of_its_formula(shape: tuple[int, ...], mask: str) -> None:
    hidden = torch.randn(shape, dtype=torch.float64)
    hidden[hidden.abs() < 0.3] = 0.0  # the derivative at 0 is 0
    logits = torch.randn(shape, dtype=torch.float64) * 2
    choice = None if mask == "soft" else torch.randint(shape[-1], (*shape[:-1], 1))
    all_units = mask == "hard, all units"
    cotangent = torch.randn(shape, dtype=torch.float64)
    results = []
    for ours in (True, False):
        u, v = hidden.clone().requires_grad_(), logits.clone().requires_grad_()
        if not ours:
            m = plain_mask(v, choice)
            y = u.relu() * m if all_units else (u * m).relu()
        elif choice is None:
            y = soft_masked_relu(u, v)
        else:
            y = hard_masked_relu(u, v, choice, all_units)
        given = cotangent.clone()
        results.append((y, *torch.autograd.grad(y, (u, v), given)))
        assert torch.equal(given, cotangent)  # backward changes nothing that it was given
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_soft_masked_relu_equals_finite_differences() -> None:
    u = torch.tensor([[0.7, -0.4, 1.3], [-0.2, 0.9, 0.3]], dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_masked_relu, (u, logits))


@pytest.mark.parametrize("hard", [False, True])
@every_layer
def test_layer_has_the_gradients_of_its_formula(config: FeedForwardConfig, hard: bool) -> None:
    """Every weight's gradient, against autograd through the reference's expression."""
    layer = forced(config, hard)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, D, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad((layer(x) * cotangent).sum(), leaves)

    logits = layer.controller(x)
    p, choice = logits.softmax(-1), logits.argmax(-1, keepdim=True)
    mask = plain_mask(logits, choice if hard else None)
    if isinstance(config, SwitchFeedForwardConfig):
        mask = torch.zeros_like(p).scatter(-1, choice, 1.0) * p
    hidden = F.linear(x, layer.up_weight).unflatten(-1, (-1, layer.num_choices, layer.span))
    if hard and getattr(config, "controller_gradient", "chosen") == "all":
        active = hidden.relu() * mask.unsqueeze(-1)
    else:
        active = (hidden * mask.unsqueeze(-1)).relu()
    if hard and getattr(config, "multiply_by_controller", False):
        active = active * p.detach().unsqueeze(-1)
    y = active.flatten(-3) @ layer.down_weight + layer.bias
    for one, other in zip(ours, torch.autograd.grad((y * cotangent).sum(), leaves), strict=True):
        assert_close(one, other)


def test_hard_choice_teaches_the_controller_through_active_chosen_units_alone() -> None:
    """System notes A.1: dL/dl = p_c u_c g_c (onehot_c - p) where the chosen unit c is active, else 0."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.1, -1.0]], dtype=torch.float64)
    layer = SparseFeedForward(1, 6, Fixed(logits.clone()), num_choices=3, temperature=0.0, quant_prob=1.0).double()
    up = torch.tensor([5.0, 2.0, 7.0, -4.0, 6.0, 8.0], dtype=torch.float64)
    down = torch.tensor([1.0, -3.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    layer.up_weight.data, layer.down_weight.data = up[:, None], down[:, None]
    layer.train()(torch.ones(1, 1, 1, dtype=torch.float64)).sum().backward()
    p = torch.tensor(oracles.softmax([1.0, 3.0, 2.0]), dtype=torch.float64)
    onehot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    gradient = layer.controller.logits.grad
    assert_close(gradient[0], p[1] * 2.0 * -3.0 * (onehot - p))
    assert gradient[1].tolist() == [0.0, 0.0, 0.0]  # the second block's chosen unit is inactive
    assert layer.up_weight.grad[:, 0].tolist() == [0.0, -3.0, 0.0, 0.0, 0.0, 0.0]
    assert layer.down_weight.grad[:, 0].tolist() == [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_soft_choice_teaches_the_controller_through_every_active_unit() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    layer = SparseFeedForward(1, 3, Fixed(logits.clone()), num_choices=3, temperature=0.0, quant_prob=0.0).double()
    up, down = [5.0, -2.0, 7.0], [1.0, -3.0, 0.5]
    layer.up_weight.data, layer.down_weight.data = (torch.tensor(w, dtype=torch.float64)[:, None] for w in (up, down))
    layer.train()(torch.ones(1, 1, 1, dtype=torch.float64)).sum().backward()
    p = oracles.softmax([1.0, 3.0, 2.0])
    slope = [5.0 * 1.0, 0.0, 7.0 * 0.5]
    mean = sum(pi * si for pi, si in zip(p, slope, strict=True))
    truth = [pi * (si - mean) for pi, si in zip(p, slope, strict=True)]
    assert_close(layer.controller.logits.grad[0], torch.tensor(truth, dtype=torch.float64))
    assert_close(layer.up_weight.grad[:, 0], torch.tensor([p[0], 0.0, p[2] * 0.5], dtype=torch.float64))


def test_switch_teaches_the_router_through_the_chosen_probability_alone() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    layer = SparseFeedForward(1, 6, Fixed(logits.clone()), 3, span=2, temperature=0.0, policy="switch").double()
    layer.up_weight.data = torch.tensor([9.0, 9.0, 2.0, -4.0, 9.0, 9.0], dtype=torch.float64)[:, None]
    layer.down_weight.data = torch.full((6, 1), 0.5, dtype=torch.float64)
    layer.train()(torch.ones(1, 1, 1, dtype=torch.float64)).sum().backward()
    p = torch.tensor(oracles.softmax([1.0, 3.0, 2.0]), dtype=torch.float64)
    onehot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert_close(layer.controller.logits.grad[0], p[1] * 2.0 * 0.5 * (onehot - p))


# ------------------------------------------------------------------------------ statistics of draws


def drawing(temperature: float) -> SparseFeedForward:
    return SparseFeedForward(1, 3, Router(1, 3), num_choices=3, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_draws_are_samples_of_the_softmax_over_the_temperature(temperature: float) -> None:
    torch.manual_seed(0)
    count, logits = 20_000, torch.tensor([[0.10, -0.05, 0.0, 0.22], [1.0, 2.0, 0.0, -1.0]])
    choice = drawing(temperature).draw(logits.expand(count, 2, 4))
    assert choice.shape == (count, 2, 1)
    for group in range(2):
        p = oracles.softmax((logits[group] / temperature).tolist())
        seen = torch.bincount(choice[:, group, 0], minlength=4).tolist()
        for probability, number in zip(p, seen, strict=True):
            sigma = math.sqrt(count * probability * (1 - probability))
            assert abs(number - count * probability) < 4.5 * sigma + 3


def test_draws_of_different_groups_and_tokens_are_independent() -> None:
    torch.manual_seed(0)
    choice = drawing(1.0).draw(torch.zeros(5_000, 2, 2))[..., 0].double() * 2 - 1
    assert abs((choice[:, 0] * choice[:, 1]).mean()) < 0.07
    assert abs((choice[1:, 0] * choice[:-1, 0]).mean()) < 0.07


def test_temperature_zero_draws_the_largest() -> None:
    logits = torch.randn(50, 3, 5)
    assert torch.equal(drawing(0.0).draw(logits)[..., 0], logits.argmax(-1))


@pytest.mark.parametrize("quant_prob", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["sparse-N3", "block-3", "block-12"])
def test_a_whole_call_is_hard_with_quant_prob(name: str, quant_prob: float) -> None:
    torch.manual_seed(0)
    hard, soft = (forced(CONFIGS[name], h) for h in (True, False))
    soft.load_state_dict(hard.state_dict())
    x = torch.randn(2, 3, D, dtype=torch.float64)
    with torch.no_grad():
        of_hard, of_soft = hard(x), soft(x)
        assert (of_hard - of_soft).abs().amax(-1).min() > 1e-3  # they differ at every token
        hard.quant_prob = quant_prob
        calls = 300
        outputs = [hard(x) for _ in range(calls)]
    num_hard = sum(torch.allclose(y, of_hard) for y in outputs)
    num_soft = sum(torch.allclose(y, of_soft) for y in outputs)
    assert num_hard + num_soft == calls
    assert abs(num_hard - calls * quant_prob) <= 4.5 * math.sqrt(calls * quant_prob * (1 - quant_prob))


def test_defaults_are_the_references() -> None:
    config = SparseFeedForwardConfig()
    assert (config.temperature, config.quant_prob) == (0.1, 0.3)
    block, switch = BlockFeedForwardConfig(), SwitchFeedForwardConfig()
    assert (block.temperature, block.quant_prob, switch.temperature) == (0.7, 0.5, 0.1)


# ------------------------------------------------------------------- dense layer, dropout, controller


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", lambda x: x.clamp(min=0)), ("gelu", gelu), ("swiglu", None)]
)
def test_dense_feed_forward(activation: str, function: Callable[[Tensor], Tensor] | None) -> None:
    config = DenseFeedForwardConfig(intermediate_size=7, activation=activation)
    layer = make_visible(feed_forward(config, D).double())
    assert isinstance(layer, DenseFeedForward)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    up = x @ layer.up.weight.t() + layer.up.bias
    if function is None:
        hidden = silu(x @ layer.gate.weight.t() + layer.gate.bias) * up
    else:
        assert layer.gate is None
        hidden = function(up)
    assert_close(layer(x), hidden @ layer.down.weight.t() + layer.down.bias)


def test_sequence_dropout_shares_its_mask_over_the_sequence() -> None:
    torch.manual_seed(0)
    layer, x = SequenceDropout(0.25), torch.rand(3, 5, 64) + 1
    factors = layer(x) / x
    assert_close(factors, factors[:, :1].expand_as(factors))
    seen = set(factors[:, 0].mul(3).round().flatten().tolist())
    assert seen == {0.0, 4.0}  # 0 or 1 / (1 - 0.25)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(factors[one] == 0, factors[other] == 0)
    dropped = torch.stack([layer(x)[:, 0] == 0 for _ in range(100)]).float().mean()
    assert abs(dropped - 0.25) < 0.02
    assert layer.eval()(x) is x


def test_ff_dropout_stands_before_the_activation_and_is_shared_by_the_sequence() -> None:
    layer = feed_forward(DenseFeedForwardConfig(intermediate_size=64, ff_dropout=0.5), D)
    seen: list[Tensor] = []
    layer.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 9, D)
    layer.train()(x)
    plain = layer.up(x).relu()
    dropped = (seen[0] == 0) & (plain > 0)
    kept = (seen[0] != 0) & (plain > 0)
    assert_close(seen[0][kept], 2 * plain[kept])
    for row in range(2):
        for unit in range(64):
            assert not (dropped[row, :, unit].any() and kept[row, :, unit].any())
    assert 0.3 < dropped.sum() / (plain > 0).sum() < 0.7


def test_controller_is_low_rank_with_one_bias() -> None:
    controller = make_visible(LowRankController(D, 4, 3, 2).double())
    x = torch.randn(2, 7, D, dtype=torch.float64)
    flat = x @ controller.down.weight.t() @ controller.up.weight.t() + controller.up.bias
    assert controller.down.bias is None
    assert_close(controller(x), flat.view(2, 7, 4, 3))


def test_router_has_no_bias() -> None:
    router = Router(D, 3).double()
    x = torch.randn(2, D, dtype=torch.float64)
    assert [name for name, _ in router.named_parameters()] == ["choose.weight"]
    assert_close(router(x), (x @ router.choose.weight.t()).view(2, 1, 3))


@pytest.mark.parametrize("policy", ["soft", "hard", "switch"])
def test_training_runs_in_bfloat16_under_autocast(policy: str) -> None:
    config = CONFIGS["switch-3"] if policy == "switch" else CONFIGS["sparse-N3"]
    layer = forced(config, hard=policy == "hard").float()
    x = torch.randn(2, 3, D)
    exact = layer(x)
    layer.controller.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    rounded.float().sum().backward()
    assert_close(rounded.float(), exact, atol=0.2, rtol=0.1)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 8, 15, 16, 17])
def test_softmax_of_any_length(length: int) -> None:
    logits = torch.randn(3, 5, length) * 50  # large enough that powers without the maximum taken off would overflow
    before = logits.clone()
    assert_close(softmax(logits), logits.softmax(-1))
    assert torch.equal(logits, before)
