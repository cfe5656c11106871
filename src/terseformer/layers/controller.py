"""Controllers: they give the logits by which a sparse feed-forward layer chooses its units."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from terseformer.layers.initializers import dense


class LowRankController(nn.Module):
    """Logits x C1 C2 + b of one-in-N choices, through a bottleneck of `rank` without activation."""

    def __init__(self, hidden_size: int, num_groups: int, num_choices: int, rank: int) -> None:
        super().__init__()
        self.num_choices = num_choices
        self.down = dense(hidden_size, rank, bias=False)
        self.up = dense(rank, num_groups * num_choices)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... G N"]:
        return self.up(self.down(x)).unflatten(-1, (-1, self.num_choices))


class Router(nn.Module):
    """Logits x C of one choice among experts, without bias."""

    def __init__(self, hidden_size: int, num_choices: int) -> None:
        super().__init__()
        self.choose = dense(hidden_size, num_choices, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... 1 N"]:
        return self.choose(x).unsqueeze(-2)
