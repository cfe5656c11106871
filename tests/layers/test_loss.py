"""The loss in chunks: value and gradients of the loss as a whole, chance included, and no logits kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from terseformer.config import DenseHeadConfig, HeadConfig, MultiplicativeHeadConfig
from terseformer.layers.head import language_model_head
from terseformer.layers.loss import chunked_cross_entropy

VOCAB, SIZE = 21, 6
HEADS: dict[str, HeadConfig] = {
    "dense": DenseHeadConfig(),
    "tied": DenseHeadConfig(tied=True),
    "multiplicative": MultiplicativeHeadConfig(head_modules=7),
    "mixed": MultiplicativeHeadConfig(head_modules=3, sparse_prob=0.5),
}
every_head = pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())


def new_head(config: HeadConfig) -> nn.Module:
    torch.manual_seed(0)
    return language_model_head(config, SIZE, nn.Embedding(VOCAB, SIZE)).double().train()


def draw(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(length, SIZE, dtype=torch.float64).requires_grad_(), torch.randint(VOCAB, (length,))


def whole(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets, reduction="sum")


def gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Value and gradients with the same seed, and what chance gives next."""
    torch.manual_seed(3)
    value = loss()
    found = torch.autograd.grad(value * 0.5, inputs, allow_unused=True)
    return value, list(found), torch.rand(2)


@every_head
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (13, 1), (13, 5), (13, 13), (13, 99)])
def test_value_and_gradients_are_those_of_the_whole(config: HeadConfig, length: int, chunk: int) -> None:
    head, (hidden, targets) = new_head(config), draw(length)
    targets[length // 2 :: 4] = -100
    inputs = [hidden, *head.parameters()]
    ours = gradients(lambda: chunked_cross_entropy(head, hidden, targets, chunk), inputs)
    plain = gradients(lambda: whole(head, hidden, targets), inputs)
    for one, other in zip([ours[0], *ours[1], ours[2]], [plain[0], *plain[1], plain[2]], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)


def test_chance_decides_once_for_all_chunks() -> None:
    head, (hidden, targets) = new_head(HEADS["mixed"]), draw(12)
    either = [whole(part, hidden, targets) for part in (head.sparse, head.dense)]
    seen = [chunked_cross_entropy(head, hidden, targets, 2).item() for _ in range(20)]
    assert {round(x, 9) for x in seen} == {round(x.item(), 9) for x in either}


def test_what_does_not_learn_gets_no_gradient() -> None:
    head, (hidden, targets) = new_head(HEADS["dense"]), draw(7)
    head.bias.requires_grad_(False)
    chunked_cross_entropy(head, hidden.detach(), targets, 3).backward()
    assert hidden.grad is None
    assert head.bias.grad is None
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(head, hidden, targets, 3).requires_grad
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    assert not chunked_cross_entropy(head, hidden.detach(), targets, 3).requires_grad


class Widest(TorchDispatchMode):
    """The most rows of logits that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == VOCAB:
            self.rows = max(self.rows, result.shape[0])
        return result


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    head, (hidden, targets) = new_head(HEADS["dense"]), draw(64)
    with Widest() as widest:
        loss = chunked_cross_entropy(head, hidden, targets, 5)
        saved = sum(t.numel() for t in loss.grad_fn.saved_tensors if t is not None)
        loss.backward()
    assert widest.rows == max(5, SIZE)  # the weight's own gradient is [SIZE, VOCAB] before it is transposed
    assert saved == hidden.numel() + sum(p.numel() for p in head.parameters())


def test_half_precision_adds_up_in_float32() -> None:
    head, (hidden, targets) = new_head(HEADS["dense"]).float(), draw(300)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(head, hidden.float(), targets, 7)
    assert loss.dtype == torch.float32
    assert_close(loss, whole(head, hidden.float(), targets), rtol=1e-2, atol=0)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_no_tokens_a_chunk_is_refused() -> None:
    head, (hidden, targets) = new_head(HEADS["dense"]), draw(3)
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_cross_entropy(head, hidden, targets, 0)
