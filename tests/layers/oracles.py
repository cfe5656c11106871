"""The layers' formulas as plain loops in float64: slow, and plain enough to be believed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def detached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hands the function its tensors without their gradients' history."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))

    return call


@detached
def multiplicative(x: Tensor, modules: Tensor, features: Tensor, bias: Tensor) -> Tensor:
    """y[s, m] = sum_i x[i] D[s, i] E[i, m], plus the bias; x is [T, I]."""
    num_modules, width = modules.shape[0], features.shape[1]
    y = torch.zeros(x.shape[0], num_modules * width, dtype=torch.float64)
    for t in range(x.shape[0]):
        for s in range(num_modules):
            for m in range(width):
                total = sum(float(x[t, i] * modules[s, i] * features[i, m]) for i in range(x.shape[1]))
                y[t, s * width + m] = total + float(bias[s * width + m])
    return y


@detached
def multiplicative_modular(x: Tensor, modules: Tensor, features: Tensor, mixing: Tensor, bias: Tensor) -> Tensor:
    """y[s, o] = sum_x (sum_i x_i D[s, i] K[i, x]) K2[s, x, o], plus the bias; x is [T, I]."""
    num_modules, width = mixing.shape[0], mixing.shape[1]
    inner = multiplicative(x, modules, features, torch.zeros(num_modules * width))
    y = torch.zeros_like(inner)
    for t in range(x.shape[0]):
        for s in range(num_modules):
            for o in range(width):
                total = sum(float(inner[t, s * width + i] * mixing[s, i, o]) for i in range(width))
                y[t, s * width + o] = total + float(bias[s * width + o])
    return y


@detached
def local_convolution(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Causal over time, zero-padded over modules; x is [T, S, C], kernel [L, k, C, U]."""
    length, modules, _ = x.shape
    lags, window, width_in, width_out = kernel.shape
    y = torch.zeros(length, modules, width_out, dtype=torch.float64)
    for t in range(length):
        for s in range(modules):
            for u in range(width_out):
                total = float(bias[u])
                for lag in range(lags):
                    for i in range(window):
                        source_t, source_s = t - (lags - 1) + lag, s - (window - 1) // 2 + i
                        if source_t < 0 or not 0 <= source_s < modules:
                            continue
                        total += sum(float(x[source_t, source_s, c] * kernel[lag, i, c, u]) for c in range(width_in))
                y[t, s, u] = total
    return y


@detached
def locally_connected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y[q] = sum_i x[(q-c+i) mod S] W[(q-c+i) mod S, i] + b[q]; x is [T, S, P], weight [S, k, P, U]."""
    modules, window, width_in, width_out = weight.shape
    y = torch.zeros(x.shape[0], modules, width_out, dtype=torch.float64)
    for t in range(x.shape[0]):
        for q in range(modules):
            for u in range(width_out):
                total = float(bias[q, u])
                for i in range(window):
                    source = (q - (window - 1) // 2 + i) % modules
                    total += sum(float(x[t, source, p] * weight[source, i, p, u]) for p in range(width_in))
                y[t, q, u] = total
    return y


@detached
def sru(x: Tensor, weight: Tensor, bias: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs and last inner state of one recurrent layer; x is [T, U], weight [3U, U] (r, f, y)."""
    size = x.shape[1]
    state = [0.0] * size if carry is None else [float(c) for c in carry]
    h = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        gates = [sum(float(weight[g, i] * x[t, i]) for i in range(size)) + float(bias[g]) for g in range(3 * size)]
        for u in range(size):
            r = 1 / (1 + math.exp(-gates[u]))
            f = 1 / (1 + math.exp(-gates[size + u]))
            state[u] = f * state[u] + (1 - f) * gates[2 * size + u]
            h[t, u] = r * state[u] + (1 - r) * float(x[t, u]) * math.sqrt(3)
    return h, torch.tensor(state, dtype=torch.float64)


@detached
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: softmax(q k^T / sqrt(K)) v over the tokens up to the present one; all are [T, K]."""
    y = torch.zeros(v.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        scores = [float((q[t] * k[s]).sum()) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        largest = max(scores)
        weights = [math.exp(score - largest) for score in scores]
        for s in range(t + 1):
            y[t] += weights[s] / sum(weights) * v[s].double()
    return y


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


@detached
def sparse_feed_forward(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, bias: Tensor, span: int, policy: str
) -> Tensor:
    """A sparse layer's output for one token; logits are [G, N], unit (g N + n) span + j is a row of `up` and `down`.

    Policies: `hard` takes the unit of the largest logit, `scaled` multiplies it by its probability,
    `soft` takes all units times their probabilities.
    """
    y = bias.double().clone()
    num_choices = logits.shape[1]
    for g, row in enumerate(logits.tolist()):
        p = softmax(row)
        best = row.index(max(row))
        for n in range(num_choices):
            factor = {"hard": float(n == best), "scaled": p[n] * (n == best), "soft": p[n]}[policy]
            for j in range(span):
                unit = (g * num_choices + n) * span + j
                y += max(0.0, float((x * up[unit]).sum())) * factor * down[unit].double()
    return y
