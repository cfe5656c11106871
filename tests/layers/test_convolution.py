"""The convolution's hand-written gradient, against finite differences and the library's convolution."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from terseformer.layers.convolution import local_convolution

SHAPES = [  # B, P, S, C, L, k, U
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 3, 2, 3, 3, 3),
    (1, 3, 2, 3, 2, 5, 1),  # fewer modules than the kernel covers
    (1, 3, 2, 1, 2, 9, 2),  # fewer than half of it
    (3, 5, 1, 2, 3, 3, 2),
    (2, 3, 5, 1, 3, 5, 2),  # one token
    (1, 4, 7, 2, 1, 1, 3),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(shape: tuple[int, ...]) -> list[torch.Tensor]:
    b, p, s, c, length, k, u = shape
    sizes = ((b, p, s, c), (length, k, c, u), (u,))
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes]


@shapes
def test_gradients_equal_finite_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(local_convolution, draw(shape))


@shapes
def test_equals_the_librarys_convolution(shape: tuple[int, ...]) -> None:
    frames, kernel, bias = draw(shape)
    ours = local_convolution(frames, kernel, bias)
    padding = (0, kernel.shape[1] // 2)
    theirs = F.conv2d(frames.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1).contiguous(), bias, padding=padding)
    assert_close(ours, theirs.permute(0, 2, 3, 1))
    cotangent = torch.randn_like(ours)
    leaves = (frames, kernel, bias)
    for one, other in zip(
        torch.autograd.grad((ours * cotangent).sum(), leaves),
        torch.autograd.grad((theirs.permute(0, 2, 3, 1) * cotangent).sum(), leaves),
        strict=True,
    ):
        assert_close(one, other)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradient_of_one_argument_alone(needed: tuple[bool, bool]) -> None:
    frames, kernel, bias = draw(SHAPES[1])
    both = torch.autograd.grad(local_convolution(frames, kernel, bias).square().sum(), (frames, kernel))
    frames, kernel = (x.detach().requires_grad_(n) for x, n in zip((frames, kernel), needed, strict=True))
    local_convolution(frames, kernel, bias).square().sum().backward()
    for tensor, expected, n in zip((frames, kernel), both, needed, strict=True):
        if n:
            assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_takes_strided_input_and_gradient() -> None:
    frames, kernel, bias = draw(SHAPES[1])
    strided = frames.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    one, other = local_convolution(frames, kernel, bias), local_convolution(strided, kernel, bias)
    assert_close(one, other)
    cotangent = torch.randn(one.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    assert_close(torch.autograd.grad(one, frames, cotangent)[0], torch.autograd.grad(other, strided, cotangent)[0])


def test_reads_nothing_beyond_the_batch_rows() -> None:
    """Rows of the batch stand one after another in memory: none sees its neighbour."""
    frames, kernel, bias = draw((3, 5, 4, 2, 3, 3, 2))
    expected = local_convolution(frames, kernel, bias)[1]
    with torch.no_grad():
        frames[0], frames[2] = float("nan"), float("inf")
        assert_close(local_convolution(frames, kernel, bias)[1], expected)


def test_runs_in_bfloat16_under_autocast() -> None:
    frames, kernel, bias = (x.detach().float().requires_grad_() for x in draw((2, 6, 3, 5, 3, 3, 5)))
    exact = local_convolution(frames, kernel, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = local_convolution(frames, kernel, bias)
    assert_close(rounded.float(), exact, atol=0.1, rtol=0.05)
    assert not torch.equal(rounded.float(), exact)
    rounded.float().sum().backward()
    assert frames.grad is not None
    assert frames.grad.dtype == kernel.grad.dtype == torch.float32
