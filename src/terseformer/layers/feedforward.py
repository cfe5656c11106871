"""Feed-forward layers: dense, and those where a controller chooses the units that a token uses.

A sparse layer is a layout times a controller. The controller gives logits [..., G, N]: one of N
choices in each of G groups. The layout says which hidden units a choice stands for: `span`
neighbouring ones. The paper's layer has F / N groups of N single units; a block layer has one group
of N experts, each of F / N units.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import config as c
from terseformer.layers.controller import LowRankController, Router
from terseformer.layers.dropout import SequenceDropout
from terseformer.layers.initializers import dense, glorot, near_zero
from terseformer.layers.masked_relu import hard_masked_relu, soft_masked_relu, softmax
from terseformer.layers.replay import remember


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
        controller_gradient: which units tell the controller of a hard choice how they do: `chosen`, as in the
            reference, where the ReLU follows the mask, or `all` active ones, as if the mask followed the ReLU.
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
        controller_gradient: Literal["chosen", "all"] = "chosen",
    ) -> None:
        super().__init__()
        self.controller_gradient = controller_gradient
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
        cumulative = softmax(logits.float() / self.temperature).cumsum(-1)
        level = torch.rand(*logits.shape[:-1], 1, device=logits.device) * cumulative[..., -1:]
        return (cumulative <= level).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)

    def _train(self, x: Tensor) -> Tensor:
        logits = self.controller(x)
        hidden = self._groups(F.linear(x, self.up_weight))
        if self.policy == "switch":
            chosen = torch.zeros_like(logits).scatter_(-1, remember(lambda: self.draw(logits)), 1.0)
            active = (hidden * self._spread(chosen * logits.softmax(-1))).relu()
        elif remember(lambda: torch.rand((), device="cpu").item()) >= self.quant_prob:
            active = self._soft(hidden, logits)
        else:
            active = self._hard(hidden, logits, remember(lambda: self.draw(logits)))
        return active.flatten(-2) @ self.down_weight + self.bias

    def _soft(self, hidden: Tensor, logits: Tensor) -> Tensor:
        if self.span == 1:
            return soft_masked_relu(hidden, logits)
        return (hidden * self._spread(logits.softmax(-1))).relu()

    def _hard(self, hidden: Tensor, logits: Tensor, choice: Tensor) -> Tensor:
        if self.span == 1:
            active = hard_masked_relu(hidden, logits, choice, self.controller_gradient == "all")
            return active * logits.detach().softmax(-1) if self.multiply_by_controller else active
        mask = logits.softmax(-1)
        mask = torch.zeros_like(mask).scatter_(-1, choice, 1.0) + (mask - mask.detach())
        return (hidden * self._spread(mask)).relu()

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
                controller_gradient=config.controller_gradient,
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
