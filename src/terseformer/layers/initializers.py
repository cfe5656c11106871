"""The reference's initial values: Glorot for matrices, near-zero noise for biases."""

from __future__ import annotations

import math

import torch
from torch import nn


def glorot(*shape: int, fan_in: int, fan_out: int) -> nn.Parameter:
    """Uniform in +-sqrt(6 / (fan_in + fan_out))."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return nn.Parameter(torch.empty(*shape).uniform_(-limit, limit))


def near_zero(*shape: int) -> nn.Parameter:
    """Normal with standard deviation 1e-6, the reference's initial bias."""
    return nn.Parameter(torch.randn(*shape) * 1e-6)


def dense(size_in: int, size_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer with the reference's initial values."""
    layer = nn.Linear(size_in, size_out, bias=bias)
    layer.weight = glorot(size_out, size_in, fan_in=size_in, fan_out=size_out)
    if bias:
        layer.bias = near_zero(size_out)
    return layer
