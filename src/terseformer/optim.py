"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from terseformer.config import TrainConfig
from terseformer.sharding import empty_state, is_sharded, own_part, summed


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (from 0): a pure function, so that nothing of it needs saving.

    With n = step + 1, w = warmup_steps and a warm-up of min(1, n / w): `constant` keeps
    learning_rate; `cosine` falls from there to final_learning_rate of it at the last step; `rsqrt`, the
    paper's, is learning_rate / sqrt(max(n, w)), without warm-up for Adafactor.
    """
    number = step + 1
    warmup = min(1.0, number / max(1, config.warmup_steps))
    if config.schedule == "rsqrt":
        rate = config.learning_rate / math.sqrt(max(number, config.warmup_steps))
        return rate if config.optimizer == "adafactor" else rate * warmup
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = max(0, number - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a model's parameters; weight decay is for tensors of two dimensions or more.

    Adafactor is the paper's: second moment factored over the last two dimensions, its decay
    1 - t^-0.8, updates clipped at an RMS of 1, steps of rate * max(RMS(w), 1e-3), no momentum. PyTorch's
    differs in two points: a rate above t^-0.5 counts as t^-0.5, and squared gradients are not
    raised by 1e-16, which is felt where gradients are smaller than some 1e-7.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adafactor":
        # 1e-16: above it, PyTorch inflates the steps of matrices whose mean squared gradient is smaller.
        cls = ShardedAdafactor if any(map(is_sharded, model.parameters())) else torch.optim.Adafactor
        return cls(groups, lr=config.learning_rate, beta2_decay=-0.8, eps=(1e-16, 1e-3), d=1.0)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all of an optimiser's parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class ShardedAdafactor(torch.optim.Optimizer):
    """PyTorch's Adafactor, where each process has some rows of a parameter: sums over rows go over all processes.

    PyTorch's own takes a process's rows for all of them, or fails. The state has the same names and shapes: of a
    matrix, `row_var` is shared out as the matrix is, and every process has all of `col_var`.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        shape, state = parameter.shape, self.state[parameter]
        if not state:
            factors = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
            state["step"] = torch.tensor(0.0)
            for name, size in factors.items() if len(shape) > 1 else [("variance", shape)]:
                state[name] = empty_state(parameter, name, size).zero_()
        state["step"] += 1
        step, rate, (eps, least_rms) = float(state["step"]), group["lr"], group["eps"]
        share = step ** group["beta2_decay"]
        weight, grad = own_part(parameter)[0], own_part(gradient)[0]

        def rms(rows: Tensor) -> float:
            return math.sqrt(float(summed(rows.square().sum(), parameter)) / parameter.numel())

        alpha = max(least_rms, rms(weight)) * min(rate, step**-0.5)
        weight.mul_(1 - rate * group["weight_decay"])
        squares = grad.square()
        if len(shape) > 1:
            row, col = own_part(state["row_var"])[0], own_part(state["col_var"])[0]
            row.lerp_(squares.mean(-1, keepdim=True), share)
            sums, row_sum = squares.sum(-2, keepdim=True), row.sum(-2, keepdim=True)
            if len(shape) == 2:
                sums, row_sum = summed(sums, parameter), summed(row_sum, parameter)
            col.lerp_(sums / shape[-2], share)
            estimate = (row @ col).div_((row_sum / shape[-2]).clamp_(min=eps))
        else:
            variance = own_part(state["variance"])[0]
            estimate = variance.lerp_(squares, share).clone()
        update = estimate.clamp_(min=eps * eps).rsqrt_().mul_(grad)
        weight.add_(update, alpha=-alpha / max(1.0, rms(update) / group["d"]))
