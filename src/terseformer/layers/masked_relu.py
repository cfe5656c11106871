"""ReLU under a controller's mask, forward and backward, in few passes over memory.

Hidden units u and logits l are [..., G, N]; the mask is soft, p = softmax(l), or one-hot.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_VECTOR = 16
"""Floats in the widest vector register, AVX-512's."""


def softmax(logits: Float[Tensor, "... N"]) -> Float[Tensor, "... N"]:
    """Softmax over the last dimension, also quick where it is shorter than a vector register.

    PyTorch's own costs 5 times as much there on a CPU; longer ones are left to it.
    """
    if logits.shape[-1] >= _VECTOR or logits.device.type != "cpu":
        return torch.softmax(logits, dim=-1)
    powers = (logits - logits.amax(-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(-1, keepdim=True))


def soft_masked_relu(hidden: Float[Tensor, "... G N"], logits: Float[Tensor, "... G N"]) -> Float[Tensor, "... G N"]:
    """relu(u * softmax(l))."""
    return _SoftMask.apply(hidden, logits)


def hard_masked_relu(
    hidden: Float[Tensor, "... G N"],
    logits: Float[Tensor, "... G N"],
    choice: Int[Tensor, "... G 1"],
    all_units: bool = False,
) -> Float[Tensor, "... G N"]:
    """relu(u * m), where m is one-hot at `choice` and has the gradient of softmax(l).

    Args:
        hidden: u.
        logits: l.
        choice: the chosen unit of each group.
        all_units: the mask's gradient is that of relu(u) * m, to which every active unit contributes, instead of
            that of relu(u * m), to which only the chosen ones do. The value is the same.
    """
    return _HardMask.apply(hidden, logits, choice, all_units)


def _softmax_gradient(probability: Tensor, weighted: Tensor) -> Tensor:
    """dL/dl from p and p * dL/dp."""
    return torch.addcmul(weighted, probability, weighted.sum(-1, keepdim=True), value=-1)


class _SoftMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        mask = softmax(logits)
        active = hidden.relu()  # the mask is positive: relu(u m) = relu(u) m
        ctx.save_for_backward(active, mask)
        return active * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        active, mask = ctx.saved_tensors
        grad_masked = grads[0] * mask
        grad_hidden = torch.ops.aten.threshold_backward(grad_masked, active, 0)
        return grad_hidden, _softmax_gradient(mask, grad_masked.mul_(active))


class _HardMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor, choice: Tensor, all_units: bool) -> Tensor:
        active = hidden.relu() if all_units else hidden.gather(-1, choice).relu()
        chosen = active.gather(-1, choice) if all_units else active
        ctx.save_for_backward(active, chosen, logits, choice)
        ctx.all_units = all_units
        return torch.zeros_like(hidden).scatter_(-1, choice, chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        active, chosen, logits, choice = ctx.saved_tensors
        grad = grads[0].gather(-1, choice)
        grad_hidden = torch.zeros_like(logits).scatter_(-1, choice, grad * (chosen > 0))
        mask = softmax(logits)
        if ctx.all_units:
            return grad_hidden, _softmax_gradient(mask, (grads[0] * active).mul_(mask)), None, None
        weight = mask.gather(-1, choice) * grad * chosen  # p dL/dp, which only the chosen unit has
        return grad_hidden, mask.mul_(-weight).scatter_add_(-1, choice, weight), None, None
