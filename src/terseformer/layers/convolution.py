"""Convolution over time and modules as a few matrix products, without copying each window.

The library's two-dimensional convolution costs a multiple of this one at the sizes of a sparse QKV.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def _neighbours(frames: Tensor, count: int) -> Tensor:
    """Each module beside its `count - 1` neighbours, zeros beyond the edges: [B, P, S, count * C]."""
    if count == 1:
        return frames.contiguous()
    batch, length, modules, width = frames.shape
    out = frames.new_empty(batch, length, modules, count, width)
    for i in range(count):
        shift = i - count // 2  # out[s] = frames[s + shift]
        low, high = max(0, -shift), max(0, min(modules, modules - shift))
        out[:, :, :low, i] = 0
        out[:, :, high:, i] = 0
        if low < high:
            out[:, :, low:high, i] = frames[:, :, low + shift : high + shift]
    return out.flatten(3)


def _add_neighbours(grad: Tensor, count: int) -> Tensor:
    """The transpose of `_neighbours`."""
    batch, length, modules, width = grad.shape
    grad = grad.view(batch, length, modules, count, width // count)
    out = grad[:, :, :, count // 2].clone()
    for i in range(count):
        shift = i - count // 2
        low, high = max(0, -shift), min(modules, modules - shift)
        if shift and low < high:
            out[:, :, low + shift : high + shift] += grad[:, :, low:high, i]
    return out


class _LocalConvolution(torch.autograd.Function):
    """Rows of all frames in one matrix; a shift in time is a shift of rows, so that no lag needs a copy."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, kernel: Tensor) -> Tensor:
        lags, count, _, width = kernel.shape
        batch, length, modules, _ = frames.shape
        rows = _neighbours(frames, count).flatten(0, 2)  # [B * P * S, count * C]
        matrices = kernel.flatten(1, 2)  # [lags, count * C, U]
        total = rows.shape[0] - (lags - 1) * modules
        out = rows.new_empty(rows.shape[0], width)
        torch.mm(rows[:total], matrices[0], out=out[:total])
        for lag in range(1, lags):
            out[:total].addmm_(rows[lag * modules : lag * modules + total], matrices[lag])
        ctx.save_for_backward(rows, kernel)
        ctx.shape = (batch, length, modules)
        return out.view(batch, length, modules, width)[:, : length - lags + 1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, kernel = ctx.saved_tensors
        lags, count, _, width = kernel.shape
        batch, length, modules = ctx.shape
        total = rows.shape[0] - (lags - 1) * modules
        grad = F.pad(grads[0], (0, 0, 0, 0, 0, lags - 1)).view(-1, width)[:total]
        matrices = kernel.flatten(1, 2)
        grad_frames = grad_kernel = None
        if ctx.needs_input_grad[1]:
            parts = [rows[lag * modules : lag * modules + total].t() @ grad for lag in range(lags)]
            grad_kernel = torch.stack(parts).view_as(kernel)
        if ctx.needs_input_grad[0]:
            grad_rows = torch.zeros_like(rows)
            for lag in range(lags):
                grad_rows[lag * modules : lag * modules + total].addmm_(grad, matrices[lag].t())
            grad_frames = _add_neighbours(grad_rows.view(batch, length, modules, -1), count)
        return grad_frames, grad_kernel


def local_convolution(
    frames: Float[Tensor, "B P S C"], kernel: Float[Tensor, "L k C U"], bias: Float[Tensor, " U"]
) -> Float[Tensor, "B T S U"]:
    """Convolves over time, without padding, and over modules, with zeros beyond the edges.

    Args:
        frames: P = T + L - 1 frames, the oldest first.
        kernel: window of L frames (the last is the present) and k modules.
        bias: added to every output module.
    """
    if torch.is_autocast_enabled(frames.device.type):
        dtype = torch.get_autocast_dtype(frames.device.type)
        frames, kernel = frames.to(dtype), kernel.to(dtype)
    return _LocalConvolution.apply(frames, kernel) + bias
