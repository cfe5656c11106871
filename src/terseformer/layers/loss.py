"""The cross-entropy of many tokens, without ever holding the logits of all of them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer.layers.replay import Tape


@torch.compiler.disable
def chunked_cross_entropy(
    head: nn.Module, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"], chunk: int
) -> Float[Tensor, ""]:
    """sum_t -log softmax(head(hidden_t))[targets_t], with its gradients.

    Each chunk's part of the gradients is computed beside its part of the loss, so that a chunk's logits can be let go
    and are computed once. What chance decides in the head, such as which half of a mixture is used, it decides once
    for all chunks: the loss is that of a single call.

    Args:
        head: from hidden vectors to logits.
        hidden: hidden vectors.
        targets: token ids; -100 where there is none.
        chunk: tokens whose logits are held at a time.

    Returns:
        The sum, in float32 or a wider type. It can be differentiated once.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1")
    return _ChunkedCrossEntropy.apply(head, chunk, targets, hidden, *head.parameters())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, chunk: int, targets: Tensor, hidden: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        learning = [p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        sums: list[Tensor | None] = [None] * len(learning)  # of the parameters' gradients
        grad_hidden, total = [], hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        tape = Tape(hidden.device)
        for index, (x, wanted) in enumerate(zip(hidden.split(chunk), targets.split(chunk), strict=True)):
            x = x.detach().requires_grad_(ctx.needs_input_grad[3])
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                with tape.replaying() if index else tape.recording():
                    logits = head(x)
                loss = F.cross_entropy(logits.to(total.dtype), wanted, reduction="sum")
            total += loss.detach()
            inputs = ([x] if ctx.needs_input_grad[3] else []) + learning
            if not inputs:
                continue
            gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True))
            if ctx.needs_input_grad[3]:
                grad_hidden.append(gradients.pop(0))
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, gradients, strict=True)]
        ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else None, *sums)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, *parameters = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        left = iter(parameters)
        return None, None, None, hidden, *(next(left) if needed else None for needed in ctx.needs_input_grad[4:])
