"""Padding anywhere in a row, as Hugging Face's libraries have it, and at its end, as our models do."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from terseformer.errors import UserError


def real_tokens(attention_mask: Tensor | None, tokens: Shaped[Tensor, "B T *D"]) -> Bool[Tensor, "B T"]:
    """Which of a call's tokens, ids or vectors, are real, by a mask over these and perhaps earlier ones.

    Raises:
        UserError: a mask of another form.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < length:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, but the tokens have {[batch, length]}; give a 0 "
            "or 1 for each token read so far"
        )
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


class Rows:
    """A batch with each row's real tokens at its head, in their order, and the way back.

    Args:
        real: which tokens are real.
    """

    def __init__(self, real: Bool[Tensor, "B T"]) -> None:
        self.lengths = real.sum(-1)
        """Real tokens of each row."""
        self.num_real: Tensor | None = None
        """The same; None: all are real, and nothing is moved."""
        if not real.all():
            self.num_real = self.lengths
            self._order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)

    def real_first(self, x: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "B T *D"]:
        """The batch with the real tokens first."""
        return x if self.num_real is None else _take(x, self._order)

    def as_given(self, x: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "B T *D"]:
        """The batch as it was; what stands at padding means nothing."""
        return x if self.num_real is None else _take(x, self._order.argsort(-1))


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(*order.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:]))
