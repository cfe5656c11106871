"""How the controllers of the sparse feed-forward layers choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from terseformer.layers.feedforward import SparseFeedForward


@dataclass(frozen=True)
class ControllerUse:
    """What one layer's controller did with the tokens of a pass.

    Its choice is the largest logit, as at inference: without the noise of training.
    """

    entropy: float
    """Mean entropy of softmax(logits) over tokens and groups, in bits; at most log2(N)."""
    share_used: float
    """Share of the layer's units that were chosen at least once; few tokens cannot choose many."""
    dead_units: int
    """Units that were never chosen."""
    imbalance: float
    """Load of a group's busiest choice over its mean load, on average: 1 is even, N always the same choice."""
    tokens: int
    """Tokens of the pass."""


class _Tally:
    """Counts of one layer; on the layer's device, so that nothing waits for them."""

    def __init__(self) -> None:
        self.entropy: Tensor | float = 0.0
        self.counts: Tensor | int = 0  # [G, N]
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        groups, choices = logits.shape[-2:]
        logits = logits.detach().reshape(-1, groups, choices).float()
        log_p = logits.log_softmax(-1)
        self.entropy = self.entropy - (log_p.exp() * log_p).sum() / (groups * math.log(2))
        chosen = logits.argmax(-1) + torch.arange(groups, device=logits.device) * choices
        self.counts = self.counts + chosen.flatten().bincount(minlength=groups * choices).view(groups, choices)
        self.tokens += len(logits)

    def use(self, span: int) -> ControllerUse:
        counts = torch.as_tensor(self.counts)
        used = int((counts > 0).sum())
        return ControllerUse(
            entropy=float(self.entropy) / self.tokens,
            share_used=used / counts.numel(),
            dead_units=(counts.numel() - used) * span,
            imbalance=float((counts.amax(-1) * counts.shape[-1] / self.tokens).mean()),
            tokens=self.tokens,
        )


class ControllerStatistics:
    """Watches the controllers of a model's sparse feed-forward layers while its block runs.

    ```
    with ControllerStatistics(model) as statistics:
        evaluate(model, ...)
    statistics.results()["blocks.0.feed_forward"].dead_units
    ```

    Args:
        model: any module; not one compiled by torch.compile, which may pass the hooks over.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseFeedForward)}
        self._tallies: dict[str, _Tally] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ControllerStatistics:
        """Starts to count from nothing."""
        self._tallies = {name: _Tally() for name in self._layers}
        self._hooks = [m.controller.register_forward_hook(self._tallies[name]) for name, m in self._layers.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def results(self) -> dict[str, ControllerUse]:
        """By the layer's name in the model; layers that saw no token are left out."""
        return {name: tally.use(self._layers[name].span) for name, tally in self._tallies.items() if tally.tokens}
