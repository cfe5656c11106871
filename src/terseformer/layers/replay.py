"""Repeating a call exactly: what chance decided in it is remembered, and not drawn again.

Reversible layers compute a layer a second time for its gradient. Dropout repeats itself when the random number
generator stands where it stood. A choice, such as a controller's or a hash bucket, is kept itself: its inputs are
reconstructed, and near a tie their last digits would decide it otherwise. The reference does the same (`_Remember` and
`_RecallQuantMaskInReverse`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Function = Callable[[Tensor], Tensor]


class Tape:
    """What chance decided in one call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outer: Tape | None = None
        self._start: tuple[Tensor, ...] = ()
        self._draws: list[tuple[Any, tuple[Tensor, ...]]] = []
        self._next: int | None = None  # None while recording

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what is drawn inside, or given by a tape around this one."""
        self._outer = _CURRENT.get()
        self._start = self._generators()
        self._draws = []
        with self._current():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Gives again what was kept; the generators stand afterwards where they stood before."""
        before = self._generators()
        self._restore(self._start)
        self._next = 0
        try:
            with self._current():
                yield
        finally:
            self._next = None
            self._restore(before)

    def remember(self, draw: Callable[[], T]) -> T:
        """What `draw` gives, or gave at this place of the recorded call."""
        if self._next is None:
            value = draw() if self._outer is None else self._outer.remember(draw)
            self._draws.append((value, self._generators()))
            return value
        value, after = self._draws[self._next]
        self._next += 1
        self._restore(after)
        return value

    @contextmanager
    def _current(self) -> Iterator[None]:
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def _generators(self) -> tuple[Tensor, ...]:
        states = (torch.get_rng_state(),)
        return (*states, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else states

    def _restore(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)


_CURRENT: ContextVar[Tape | None] = ContextVar("tape", default=None)


def remember(draw: Callable[[], T]) -> T:
    """What `draw` gives; where a call is computed again, what it gave the first time."""
    tape = _CURRENT.get()
    return draw() if tape is None else tape.remember(draw)


class Replayed:
    """A function that is computed twice, the second time for its gradient, alike in chance and in precision.

    Args:
        function: of one tensor.
        parameters: those whose gradients `again` gives; None: it leaves the gradients in the parameters.
    """

    def __init__(self, function: Function, parameters: list[nn.Parameter] | None) -> None:
        self._function, self._parameters = function, parameters

    def first(self, x: Tensor) -> Tensor:
        """The function's value."""
        self._tape, kind = Tape(x.device), x.device.type
        enabled = torch.is_autocast_enabled(kind)
        self._autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": enabled}
        with self._tape.recording():
            return self._function(x)

    def again(self, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The value once more, and the gradients of x and of each parameter, given the value's."""
        with torch.enable_grad(), self._tape.replaying(), torch.autocast(**self._autocast):
            x = x.detach().requires_grad_()
            y = self._function(x)
        if self._parameters is None:
            torch.autograd.backward(y, grad.to(y.dtype))
            return y.detach(), [x.grad]
        learning = [p for p in self._parameters if p.requires_grad]
        of_x, *gradients = torch.autograd.grad(y, [x, *learning], grad.to(y.dtype), allow_unused=True)
        by_parameter = dict(zip(map(id, learning), gradients, strict=True))
        return y.detach(), [of_x, *(by_parameter.get(id(p)) for p in self._parameters)]
