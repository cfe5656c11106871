"""Feed-forward layers: dense, and those where a controller chooses the units that a token uses.

A sparse layer is a layout times a controller. The controller gives logits [..., G, N]: one of N
choices in each of G groups. The layout says which hidden units a choice stands for: `span`
neighbouring ones. The paper's layer has F / N groups of N single units; a block layer has one group
of N experts, each of F / N units.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import config as c
from terseformer.layers.initializers import dense, glorot, near_zero


class DenseFeedForward(nn.Module):
    """y = act(x W1 + b1) W2 + b2; `swiglu`: (silu(x Wg + bg) * (x W1 + b1)) W2 + b2.

    Dropout of rate `ff_dropout` stands before the activation, its mask shared by the sequence.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "relu", ff_dropout: float = 0.0):
        super().__init__()
        self.up = dense(hidden_size, intermediate_size)
        self.gate = dense(hidden_size, intermediate_size) if activation == "swiglu" else None
        self.down = dense(intermediate_size, hidden_size)
        self.dropout = SequenceDropout(ff_dropout)
        self.activation = F.relu if activation == "relu" else F.gelu

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        hidden = self.dropout(self.up(x))
        hidden = self.activation(hidden) if self.gate is None else F.silu(self.gate(x)) * hidden
        return self.down(hidden)


class SequenceDropout(nn.Module):
    """Dropout whose mask is shared by all tokens of a sequence, as the reference has it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if not self.training or self.rate == 0:
            return x
        return x * F.dropout(x.new_ones(*x.shape[:-2], 1, x.shape[-1]), self.rate)


class LowRankController(nn.Module):
    """Logits x C1 C2 + b of one-in-N choices, through a bottleneck of `rank` without activation."""

    def __init__(self, hidden_size: int, num_groups: int, num_choices: int, rank: int) -> None:
        super().__init__()
        self.num_choices = num_choices
        self.down = dense(hidden_size, rank, bias=False)
        self.up = dense(rank, num_groups * num_choices)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... G N"]:
        return self.up(self.down(x)).unflatten(-1, (-1, self.num_choices))


class Router(nn.Module):
    """Logits x C of one choice among experts, without bias."""

    def __init__(self, hidden_size: int, num_choices: int) -> None:
        super().__init__()
        self.choose = dense(hidden_size, num_choices, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... 1 N"]:
        return self.choose(x).unsqueeze(-2)


class _SoftMaskedReLU(torch.autograd.Function):
    """relu(u * softmax(l)) with few passes over memory; u and l are [..., G, N]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        mask = torch.softmax(logits, dim=-1)
        active = hidden.relu()  # the mask is positive: relu(u m) = relu(u) m
        ctx.save_for_backward(active, mask)
        return active * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        active, mask = ctx.saved_tensors
        grad_masked = grads[0] * mask
        grad_hidden = torch.ops.aten.threshold_backward(grad_masked, active, 0)
        grad_logits = grad_masked.mul_(active)  # m dL/dm
        return grad_hidden, torch.addcmul(grad_logits, mask, grad_logits.sum(-1, keepdim=True), value=-1)


class _HardMaskedReLU(torch.autograd.Function):
    """relu(u * m), m one-hot at `choice` with the gradient of softmax(l); u and l are [..., G, N]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor, choice: Tensor) -> Tensor:
        active = hidden.gather(-1, choice).relu()
        ctx.save_for_backward(active, logits, choice)
        return torch.zeros_like(hidden).scatter_(-1, choice, active)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        active, logits, choice = ctx.saved_tensors
        grad = grads[0].gather(-1, choice)
        grad_hidden = torch.zeros_like(logits).scatter_(-1, choice, grad * (active > 0))
        mask = torch.softmax(logits, dim=-1)
        weight = mask.gather(-1, choice) * grad * active  # m dL/dm, which only the chosen unit has
        grad_logits = mask.mul_(-weight).scatter_add_(-1, choice, weight)
        return grad_hidden, grad_logits * 1.0, None


Policy = Literal["straight_through", "switch"]


class SparseFeedForward(nn.Module):
    """y = relu((x W1) * m) W2 + b, where the mask m is the controller's choice.

    Training form: all units are computed and masked. With probability `quant_prob`, drawn once a
    call, the mask is one-hot at argmax(log p + temperature * Gumbel noise) with the gradient of
    p = softmax(logits), otherwise it is p. Policy `switch`: always one-hot, times p. Outside
    training: one-hot at the largest logit. There is no bias before the activation.

    Source: section 3.1 of the paper; `SparseFF`, `BlockSparseFF` and `SwitchSparseFF` of the reference.

    Args:
        hidden_size: width D of the residual stream.
        intermediate_size: hidden units F.
        controller: gives logits [..., G, N].
        num_choices: N; G * N * span = F.
        span: units that a choice stands for.
        temperature: factor of the Gumbel noise.
        quant_prob: probability of the hard mask in a training call.
        policy: `straight_through` or `switch`.
        multiply_by_controller: scale the hard choice's units by p, without gradient through it.
        kernel_scaling: scale W2 by sqrt(N) at initialisation.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        controller: nn.Module,
        num_choices: int,
        span: int = 1,
        temperature: float = 0.1,
        quant_prob: float = 0.3,
        policy: Policy = "straight_through",
        multiply_by_controller: bool = False,
        kernel_scaling: bool = False,
    ) -> None:
        super().__init__()
        self.controller, self.num_choices, self.span = controller, num_choices, span
        self.temperature, self.quant_prob, self.policy = temperature, quant_prob, policy
        self.multiply_by_controller = multiply_by_controller
        fans = {"fan_in": hidden_size, "fan_out": intermediate_size}
        self.up_weight = glorot(intermediate_size, hidden_size, **fans)  # a unit is a row of both
        self.down_weight = glorot(intermediate_size, hidden_size, **fans)
        if kernel_scaling:
            self.down_weight.data.mul_(math.sqrt(num_choices))
        self.bias = near_zero(hidden_size)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Masked product in training and for many tokens, gathered units for few."""
        if self.training:
            return self._train(x)
        if x.numel() // x.shape[-1] < self.num_choices:
            return self.gathered(x)
        return self.masked(x)

    def _groups(self, units: Tensor) -> Tensor:
        """[..., F] as [..., G, N * span]; a group's choices lie side by side."""
        return units.unflatten(-1, (-1, self.num_choices * self.span))

    def _spread(self, choices: Float[Tensor, "... G N"]) -> Float[Tensor, "... G M"]:
        """A value for each choice as a value for each of its units."""
        return choices if self.span == 1 else choices.repeat_interleave(self.span, dim=-1)

    def draw(self, logits: Float[Tensor, "... G N"]) -> Int[Tensor, "... G 1"]:
        """argmax(logits + temperature * Gumbel noise), which is a sample of softmax(logits / temperature).

        It is drawn as the latter, by one uniform number a group: N logarithms a group cost more than
        the rest of the layer's noise and mask together.
        """
        logits = logits.detach()
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        cumulative = (logits.float() / self.temperature).softmax(-1).cumsum(-1)
        level = torch.rand(*logits.shape[:-1], 1, device=logits.device) * cumulative[..., -1:]
        return (cumulative <= level).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)

    def _train(self, x: Tensor) -> Tensor:
        logits = self.controller(x)
        hidden = self._groups(F.linear(x, self.up_weight))
        hard = self.policy == "switch" or torch.rand((), device="cpu").item() < self.quant_prob
        choice = self.draw(logits) if hard else None
        if self.policy == "switch":
            chosen = torch.zeros_like(logits).scatter_(-1, choice, 1.0)
            active = (hidden * self._spread(chosen * logits.softmax(-1))).relu()
        elif self.span > 1:
            mask = logits.softmax(-1)
            if choice is not None:
                mask = torch.zeros_like(mask).scatter_(-1, choice, 1.0) + (mask - mask.detach())
            active = (hidden * self._spread(mask)).relu()
        elif choice is None:
            active = _SoftMaskedReLU.apply(hidden, logits)
        else:
            active = _HardMaskedReLU.apply(hidden, logits, choice)
            if self.multiply_by_controller:
                active = active * logits.detach().softmax(-1)
        return active.flatten(-2) @ self.down_weight + self.bias

    def _scale(self, logits: Tensor, choice: Tensor) -> Tensor | None:
        """What the chosen units are multiplied by, [..., G, 1]."""
        if self.policy == "switch" or self.multiply_by_controller:
            return logits.softmax(-1).gather(-1, choice).to(logits.dtype)  # autocast gives float32 on a GPU
        return None

    def masked(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Inference with all units computed and all but the chosen ones set to zero."""
        logits = self.controller(x)
        choice = logits.argmax(-1, keepdim=True)
        scale = self._scale(logits, choice)
        mask = torch.zeros_like(logits).scatter_(-1, choice, 1.0 if scale is None else scale)
        active = (self._groups(F.linear(x, self.up_weight)) * self._spread(mask)).relu()
        return active.flatten(-2) @ self.down_weight + self.bias

    def gathered(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Inference that reads only the chosen units."""
        logits = self.controller(x)
        choice = logits.argmax(-1, keepdim=True)
        scale = self._scale(logits, choice)
        groups = torch.arange(choice.shape[-2], device=x.device)[:, None] * self.num_choices
        units = (groups + choice) * self.span + torch.arange(self.span, device=x.device)  # [..., G, span]
        up = self.up_weight[units.flatten(-2)]  # [..., G * span, D]
        hidden = (up @ x.unsqueeze(-1)).squeeze(-1).unflatten(-1, (-1, self.span)).relu()
        if scale is not None:
            hidden = hidden * scale
        down = self.down_weight[units.flatten(-2)]
        return (hidden.flatten(-2).unsqueeze(-2) @ down).squeeze(-2) + self.bias


def feed_forward(config: c.FeedForwardConfig, hidden_size: int) -> DenseFeedForward | SparseFeedForward:
    """The layer that a configuration names."""
    size = config.intermediate_size
    match config:
        case c.DenseFeedForwardConfig():
            return DenseFeedForward(hidden_size, size, config.activation, config.ff_dropout)
        case c.SparseFeedForwardConfig(ff_block_size=n):
            return SparseFeedForward(
                hidden_size,
                size,
                LowRankController(hidden_size, size // n, n, config.controller_rank),
                num_choices=n,
                temperature=config.temperature,
                quant_prob=config.quant_prob,
                multiply_by_controller=config.multiply_by_controller,
                kernel_scaling=config.kernel_scaling,
            )
        case c.BlockFeedForwardConfig() | c.SwitchFeedForwardConfig():
            return SparseFeedForward(
                hidden_size,
                size,
                Router(hidden_size, config.num_experts),
                num_choices=config.num_experts,
                span=size // config.num_experts,
                temperature=config.temperature,
                quant_prob=1.0 if isinstance(config, c.SwitchFeedForwardConfig) else config.quant_prob,
                policy="switch" if isinstance(config, c.SwitchFeedForwardConfig) else "straight_through",
            )
