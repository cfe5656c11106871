"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from terseformer.config import TrainConfig


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
        return torch.optim.Adafactor(groups, lr=config.learning_rate, beta2_decay=-0.8, eps=(1e-16, 1e-3), d=1.0)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all of an optimiser's parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
