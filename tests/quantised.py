"""The state dict that a packed model amounts to, by a way of its own: rounded where the packed file is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from terseformer.layout import Dtype


def _round_rows(rows: Tensor, dtype: Dtype) -> Tensor:
    """[outputs, inputs] with each output rounded."""
    if dtype == "bf16":
        return rows.to(torch.bfloat16).float()
    scale = rows.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (rows / scale).round() * scale, rows)


def rounded(weights: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """What remains of the weights when they are packed as `dtype`."""
    if dtype == "f32":
        return weights
    result = dict(weights)
    for name, x in weights.items():
        kind = name.rsplit(".", 1)[-1]
        if x.dim() < 2 or kind == "modules_weight" or "position." in name:
            continue
        if kind == "features_weight":
            result[name] = _round_rows(x.T, dtype).T
        elif kind == "kernel":
            result[name] = _round_rows(x.flatten(0, 2).T, dtype).T.reshape(x.shape)
        elif kind == "mixing_weight":
            result[name] = torch.stack([_round_rows(matrix.T, dtype).T for matrix in x])
        elif x.dim() == 4:  # locally connected
            result[name] = _round_locally_connected(x, dtype)
        else:
            result[name] = _round_rows(x, dtype)
    return result


def _round_locally_connected(x: Tensor, dtype: Dtype) -> Tensor:
    """The weights [S, k, P, U] belong to the module that they come from, a packed row to the one that they go to."""
    modules, kernel = x.shape[:2]
    out = torch.empty_like(x)
    for module in range(modules):
        seen = [(module - kernel // 2 + i) % modules for i in range(kernel)]
        matrix = _round_rows(torch.cat([x[s, i] for i, s in enumerate(seen)]).T, dtype).T
        for i, (s, part) in enumerate(zip(seen, matrix.chunk(kernel), strict=True)):
            out[s, i] = part
    return out


def as_numpy(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The same arrays without gradients."""
    return {name: tensor.detach().numpy() for name, tensor in weights.items()}
