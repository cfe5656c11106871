"""How q, k, v and the attention's output are made: one projection a variant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from terseformer import config as c
from terseformer.layers.initializers import dense
from terseformer.layers.projection import (
    LocalConvolution,
    LocallyConnected,
    LowRank,
    Multiplicative,
    MultiplicativeModular,
    convolve_together,
)
from terseformer.state import Chunk, FrameMemory

Memories = dict[str, FrameMemory]


class SeparateProjection(nn.Module):
    """q, k, v and the output by four layers of one sort."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = make(), make(), make(), make()

    def _apply_layer(self, name: str, x: Tensor, chunk: Chunk, memories: Memories | None) -> Tensor:
        layer = getattr(self, name)
        if isinstance(layer, LocalConvolution):
            return layer(x, chunk, memories[name] if memories is not None else None)
        return layer(x)

    def qkv(self, x: Float[Tensor, "B T D"], chunk: Chunk, memories: Memories | None = None) -> tuple[Tensor, ...]:
        """Query, key and value, each [B, T, D]."""
        return tuple(self._apply_layer(name, x, chunk, memories) for name in ("query", "key", "value"))

    def output(self, x: Float[Tensor, "B T D"], chunk: Chunk, memories: Memories | None = None) -> Tensor:
        """From the merged heads to the residual stream."""
        return self._apply_layer("out", x, chunk, memories)

    def new_memories(self, batch: int) -> Memories:
        """Empty memories of the layers that have one."""
        layers = dict(self.named_children())
        return {name: m.new_memory(batch) for name, m in layers.items() if isinstance(m, LocalConvolution)}


class SparseProjection(nn.Module):
    """The paper's sparse QKV: a multiplicative layer that q, k and v share, then a convolution for each.

    Source: section 3.2 of the paper; `MultiplicativeConvCausalAttention` of the reference.

    Args:
        size: width D of the residual stream.
        num_modules: modules S; need not equal the number of heads.
        length_kernel, module_kernel: window of the convolutions (that of v covers one module).
        share_qk: one convolution for both q and k.
        output_layer: `none`, `mult`, `conv`, or `multconv` (both, in that order).
        value_input: what v's convolution sees: the shared layer's output u (`none`), each module of
            u beside that of x (`fixed`), or u and x one after the other, cut into modules (`original`).
    """

    def __init__(
        self,
        size: int,
        num_modules: int,
        length_kernel: int = 3,
        module_kernel: int = 3,
        share_qk: bool = False,
        output_layer: str = "none",
        value_input: str = "none",
    ) -> None:
        super().__init__()
        width = size // num_modules
        self.num_modules, self.value_input = num_modules, value_input
        self.shared = Multiplicative(size, size, num_modules)
        self.query = LocalConvolution(width, width, num_modules, module_kernel, length_kernel)
        self.key = None if share_qk else LocalConvolution(width, width, num_modules, module_kernel, length_kernel)
        value_width = width if value_input == "none" else 2 * width
        self.value = LocalConvolution(value_width, width, num_modules, 1, length_kernel)
        self.out_mult = Multiplicative(size, size, num_modules) if "mult" in output_layer else None
        self.out_conv = (
            LocalConvolution(width, width, num_modules, module_kernel, length_kernel)
            if "conv" in output_layer
            else None
        )

    def qkv(self, x: Float[Tensor, "B T D"], chunk: Chunk, memories: Memories | None = None) -> tuple[Tensor, ...]:
        """Query, key and value, each [B, T, D]."""
        m = memories or {}
        u = self.shared(x)
        frames = self.query.frames(u, chunk, m.get("query"))  # of both q and k
        if self.key is None:
            q = k = self.query.convolve(frames)
        else:
            q, k = convolve_together((self.query, self.key), frames)
        if self.value_input == "original":
            u = torch.cat([u, x], dim=-1)
        elif self.value_input == "fixed":
            u = torch.cat([h.unflatten(-1, (self.num_modules, -1)) for h in (u, x)], dim=-1).flatten(-2)
        return q, k, self.value(u, chunk, m.get("value"))

    def output(self, x: Float[Tensor, "B T D"], chunk: Chunk, memories: Memories | None = None) -> Tensor:
        """From the merged heads to the residual stream."""
        if self.out_mult is not None:
            x = self.out_mult(x)
        if self.out_conv is not None:
            x = self.out_conv(x, chunk, (memories or {}).get("out_conv"))
        return x

    def new_memories(self, batch: int) -> Memories:
        """Empty memories of the convolutions."""
        layers = {name: m for name, m in self.named_children() if isinstance(m, LocalConvolution) and name != "key"}
        return {name: layer.new_memory(batch) for name, layer in layers.items()}


class CrossProjection(nn.Module):
    """q of the target, k and v of the source, and the output of a cross-attention.

    Source: `AttentionQKV` of the reference.

    Args:
        size: width D of the residual stream.
        query: from the target to q.
        bias: of the dense layers.
        has_output: whether a dense layer follows the merged heads.
    """

    def __init__(self, size: int, query: nn.Module, bias: bool = True, has_output: bool = True) -> None:
        super().__init__()
        self.query = query
        self.key, self.value = dense(size, size, bias), dense(size, size, bias)
        self.out = dense(size, size, bias) if has_output else None

    def q(self, x: Float[Tensor, "B T D"], chunk: Chunk, memories: Memories | None = None) -> Tensor:
        """The query, [B, T, D]."""
        if isinstance(self.query, SparseQuery):
            return self.query(x, chunk, memories["cross"] if memories is not None else None)
        return self.query(x)

    def output(self, x: Float[Tensor, "B T D"]) -> Tensor:
        """From the merged heads to the residual stream."""
        return x if self.out is None else self.out(x)

    def new_memories(self, batch: int) -> Memories:
        """The empty memory of the query's convolution, if it has one."""
        return {"cross": self.query.convolution.new_memory(batch)} if isinstance(self.query, SparseQuery) else {}


class SparseQuery(nn.Module):
    """A multiplicative layer and a convolution over time and modules."""

    def __init__(self, size: int, num_modules: int, length_kernel: int, module_kernel: int) -> None:
        super().__init__()
        width = size // num_modules
        self.shared = Multiplicative(size, size, num_modules)
        self.convolution = LocalConvolution(width, width, num_modules, module_kernel, length_kernel)

    def forward(self, x: Float[Tensor, "B T D"], chunk: Chunk, memory: FrameMemory | None = None) -> Tensor:
        return self.convolution(self.shared(x), chunk, memory)


def cross_projection(config: c.CrossProjectionConfig, size: int) -> CrossProjection:
    """The projection of a cross-attention that a configuration names."""
    if isinstance(config, c.DenseProjectionConfig):
        return CrossProjection(size, dense(size, size, config.bias), config.bias)
    query = SparseQuery(size, config.qkv_modules, config.length_kernel, config.module_kernel)
    return CrossProjection(size, query, has_output=False)


def attention_projection(config: c.AttentionProjectionConfig, size: int) -> SeparateProjection | SparseProjection:
    """The projection that a configuration names, for a residual stream of width `size`."""
    match config:
        case c.DenseProjectionConfig():
            return SeparateProjection(lambda: dense(size, size, config.bias))
        case c.LowRankProjectionConfig():
            return SeparateProjection(lambda: LowRank(size, size, config.rank))
        case c.MultiplicativeProjectionConfig():
            return SeparateProjection(lambda: Multiplicative(size, size, config.qkv_modules))
        case c.MultiplicativeModularProjectionConfig():
            return SeparateProjection(lambda: MultiplicativeModular(size, config.qkv_modules))
        case c.LocallyConnectedProjectionConfig(qkv_modules=s):
            return SeparateProjection(lambda: LocallyConnected(size // s, size // s, s, config.module_kernel))
        case c.LocalConvolutionProjectionConfig(qkv_modules=s):
            return SeparateProjection(
                lambda: LocalConvolution(size // s, size // s, s, config.module_kernel, config.length_kernel)
            )
        case c.SparseProjectionConfig():
            return SparseProjection(
                size,
                config.qkv_modules,
                config.length_kernel,
                config.module_kernel,
                config.share_qk,
                config.output_layer,
                config.value_input,
            )
