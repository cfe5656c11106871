"""Simple recurrent units: a branch that runs beside the feed-forward layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from terseformer.layers.initializers import dense
from terseformer.state import Chunk, RecurrentCarry


def linear_recurrence(
    forget: Float[Tensor, "B T U"], update: Float[Tensor, "B T U"], start: Float[Tensor, "B U"]
) -> Float[Tensor, "B T U"]:
    """c_t = forget_t * c_{t-1} + update_t for all t, in log2(T) parallel steps."""
    update = torch.cat([update[:, :1] + forget[:, :1] * start[:, None], update[:, 1:]], dim=1)
    shift, length = 1, forget.shape[1]
    while shift < length:
        update = torch.cat([update[:, :shift], update[:, shift:] + forget[:, shift:] * update[:, :-shift]], dim=1)
        forget = torch.cat([forget[:, :shift], forget[:, shift:] * forget[:, :-shift]], dim=1)
        shift *= 2
    return update


class SRU(nn.Module):
    """One simple recurrent layer.

    r, f, y come from one dense layer; c_t = f_t c_{t-1} + (1 - f_t) y_t;
    h_t = r_t c_t + (1 - r_t) x_t sqrt(3).

    Source: "Simple Recurrent Units for Highly Parallelizable Recurrence", arXiv 1709.02755, in the
    reference's form (identity activation, highway scaled by sqrt(3)).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gates = dense(size, 3 * size)

    def forward(self, x: Float[Tensor, "B T U"], chunk: Chunk, carry: RecurrentCarry | None = None) -> Tensor:
        reset, forget, candidate = self.gates(x).chunk(3, dim=-1)
        reset, forget = reset.sigmoid(), forget.sigmoid()
        start = x.new_zeros(x.shape[0], x.shape[2]) if carry is None else carry.carry
        states = linear_recurrence(forget, (1 - forget) * candidate, start)
        if carry is not None:
            carry.advance(states, chunk)
        return reset * states + (1 - reset) * x * 3**0.5


class RecurrentBranch(nn.Module):
    """Dense to a narrow width, recurrent layers there, and dense back to the residual stream."""

    def __init__(self, hidden_size: int, size: int, num_layers: int) -> None:
        super().__init__()
        self.size = size
        self.down = dense(hidden_size, size)
        self.layers = nn.ModuleList(SRU(size) for _ in range(num_layers))
        self.up = dense(size, hidden_size)

    def forward(self, x: Float[Tensor, "B T D"], chunk: Chunk, carries: list[RecurrentCarry] | None = None) -> Tensor:
        x = self.down(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, chunk, carries[index] if carries else None)
        return self.up(x)

    def new_carries(self, batch: int) -> list[RecurrentCarry]:
        """Empty carries for `batch` rows."""
        # Not of the weight itself, which may be a shard.
        kind = {"dtype": self.down.weight.dtype, "device": self.down.weight.device}
        return [RecurrentCarry(torch.zeros(batch, self.size, **kind)) for _ in self.layers]
