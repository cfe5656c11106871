"""Replacements of a dense layer: low-rank, multiplicative, local convolution, locally connected.

Shapes follow the paper: a feature vector of width D is S modules of width M = D / S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer.layers.convolution import local_convolution
from terseformer.layers.initializers import dense, glorot, near_zero
from terseformer.state import Chunk, FrameMemory


class LowRank(nn.Sequential):
    """Two dense layers with a bottleneck of `rank` between them, both with bias."""

    def __init__(self, size_in: int, size_out: int, rank: int) -> None:
        super().__init__(dense(size_in, rank), dense(rank, size_out))


class Multiplicative(nn.Module):
    """The paper's multiplicative layer: y[s, m] = sum_i x[i] D[s, i] E[i, m], plus a bias.

    It stores S * size_in + size_in * size_out / S weights and can represent any permutation of its
    input. Source: section 3.2 of the paper; `FactoredDense` of the reference.

    Args:
        size_in: features of the input.
        size_out: features of the output, a multiple of `num_modules`.
        num_modules: modules S of the output.
        gates_std: standard deviation of the initial D, the reference's by default; E is smaller by as much as it is
            larger than that.
    """

    def __init__(self, size_in: int, size_out: int, num_modules: int, gates_std: float = 0.5) -> None:
        super().__init__()
        if size_out % num_modules:
            raise ValueError(f"size_out = {size_out} is not a multiple of num_modules = {num_modules}")
        width = size_out // num_modules
        self.modules_weight = nn.Parameter(torch.randn(num_modules, size_in) * gates_std)  # D [S, size_in]
        self.features_weight = glorot(size_in, width, fan_in=size_in, fan_out=width)  # E [size_in, M]
        self.features_weight.data.mul_(0.5 / gates_std)
        self.bias = near_zero(size_out)

    def dense_weight(self) -> Float[Tensor, "I O"]:
        """The one matrix that the layer amounts to."""
        return torch.einsum("si,im->ism", self.modules_weight, self.features_weight).flatten(1)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiplies by the whole matrix for many tokens, by its two factors for few."""
        if x.numel() // x.shape[-1] > self.features_weight.shape[1]:
            return F.linear(x, self.dense_weight().t(), self.bias)
        return self.factored(x)

    def factored(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The form that reads only the stored weights."""
        return ((x.unsqueeze(-2) * self.modules_weight) @ self.features_weight).flatten(-2) + self.bias


class LocalConvolution(nn.Module):
    """A convolution over time (causal) and over modules (zero-padded), its weights shared by the modules.

    Source: section 3.2 of the paper; `LocallyConvDense` of the reference, whose initial values it has:
    normal with standard deviation sqrt(2 / (C + U)), whatever the size of the window.

    Args:
        module_in: features C of an input module.
        module_out: features U of an output module.
        num_modules: modules S.
        module_kernel: modules that the window covers, odd.
        length_kernel: tokens that the window covers, the present one last.
    """

    def __init__(
        self, module_in: int, module_out: int, num_modules: int, module_kernel: int = 3, length_kernel: int = 3
    ) -> None:
        super().__init__()
        if module_kernel % 2 == 0:
            raise ValueError(f"module_kernel must be odd, not {module_kernel}")
        self.num_modules, self.module_in = num_modules, module_in
        std = math.sqrt(2.0 / (module_in + module_out))
        self.kernel = nn.Parameter(torch.randn(length_kernel, module_kernel, module_in, module_out) * std)
        self.bias = near_zero(module_out)

    def forward(
        self, x: Float[Tensor, "B T I"], chunk: Chunk | None = None, memory: FrameMemory | None = None
    ) -> Float[Tensor, "B T O"]:
        """Convolves a sequence; with a memory, a continuation of the sequence that the memory saw."""
        return self.convolve(self.frames(x, chunk, memory))

    def frames(
        self, x: Float[Tensor, "B T I"], chunk: Chunk | None = None, memory: FrameMemory | None = None
    ) -> Float[Tensor, "B P S C"]:
        """The frames of a sequence, after those that the window sees before it: P = T + length_kernel - 1."""
        frames = x.unflatten(-1, (self.num_modules, self.module_in))
        if memory is not None and chunk is not None:
            return memory.extend(frames, chunk)
        return F.pad(frames, (0, 0, 0, 0, self.kernel.shape[0] - 1, 0))

    def convolve(self, frames: Float[Tensor, "B P S C"]) -> Float[Tensor, "B T O"]:
        """The convolution of `frames`."""
        return local_convolution(frames, self.kernel, self.bias).flatten(-2)

    def new_memory(self, batch: int) -> FrameMemory:
        """The memory before the first token."""
        # Not of the kernel itself, which may be a shard.
        shape = batch, self.kernel.shape[0] - 1, self.num_modules, self.module_in
        return FrameMemory(torch.zeros(shape, dtype=self.kernel.dtype, device=self.kernel.device))


def convolve_together(
    layers: Sequence[LocalConvolution], frames: Float[Tensor, "B P S C"]
) -> list[Float[Tensor, "B T O"]]:
    """What each of some layers of equal shape makes of the same frames, by one convolution."""
    kernel = torch.cat([layer.kernel for layer in layers], dim=-1)
    bias = torch.cat([layer.bias for layer in layers])
    return [y.flatten(-2) for y in local_convolution(frames, kernel, bias).chunk(len(layers), dim=-1)]


class LocallyConnected(nn.Module):
    """Modules that each see their neighbours, with weights of their own and a circular edge.

    y[q] = sum_i x[(q - c + i) mod S] W[(q - c + i) mod S, i] + b[q], where c = (k - 1) / 2: the
    weights belong to the source module. Source: `LocallyConnectedDense` of the reference, whose
    initial values ignore the size of the window too.

    Args:
        module_in: features P of an input module.
        module_out: features U of an output module.
        num_modules: modules S.
        module_kernel: neighbours k that an output module sees, odd.
    """

    def __init__(self, module_in: int, module_out: int, num_modules: int, module_kernel: int = 3) -> None:
        super().__init__()
        if module_kernel % 2 == 0:
            raise ValueError(f"module_kernel must be odd, not {module_kernel}")
        self.num_modules = num_modules
        shape = (num_modules, module_kernel, module_in, module_out)
        self.weight = glorot(*shape, fan_in=module_in, fan_out=module_out)
        self.bias = near_zero(num_modules, module_out)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        modules = x.unflatten(-1, (self.num_modules, -1))
        parts = torch.einsum("...sp,skpu->...ksu", modules, self.weight)
        centre = self.weight.shape[1] // 2
        shifted = [part.roll(centre - i, dims=-2) for i, part in enumerate(parts.unbind(-3))]
        return (torch.stack(shifted).sum(0) + self.bias).flatten(-2)


class MultiplicativeModular(nn.Module):
    """A multiplicative layer followed by one matrix for each module.

    y[s, o] = sum_x (sum_i x_i D[s, i] K[i, x]) K2[s, x, o], plus a bias.
    Source: `MultiplicativeModularSparseDense` of the reference.

    Args:
        size: features of input and output, a multiple of `num_modules`.
        num_modules: modules S.
    """

    def __init__(self, size: int, num_modules: int) -> None:
        super().__init__()
        width = size // num_modules
        self.modules_weight = nn.Parameter(torch.randn(num_modules, size) * 0.5)  # D [S, I]
        self.features_weight = glorot(size, width, fan_in=size, fan_out=width)  # K [I, M]
        self.mixing_weight = glorot(num_modules, width, width, fan_in=width, fan_out=width)  # K2 [S, M, M]
        self.bias = near_zero(size)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        modules = (x.unsqueeze(-2) * self.modules_weight) @ self.features_weight  # [..., S, M]
        return torch.einsum("...sx,sxo->...so", modules, self.mixing_weight).flatten(-2) + self.bias
