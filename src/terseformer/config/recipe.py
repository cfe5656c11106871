"""A run: model, data and training."""

from __future__ import annotations

from dataclasses import dataclass, field

from terseformer.config.checks import require
from terseformer.config.data import DataConfig
from terseformer.config.model import ModelConfig
from terseformer.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: model, data and training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; in a file also `preset = "NAME"` with changes beside it, and `dense_twin = true`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        require(
            self.train.sequence_length <= self.model.max_position_embeddings,
            f"train.sequence_length = {self.train.sequence_length} is longer than "
            f"model.max_position_embeddings = {self.model.max_position_embeddings}; change one of them",
        )
