"""A run: model, data and training."""

from __future__ import annotations

from dataclasses import dataclass, field

from terseformer.config.checks import require
from terseformer.config.data import DataConfig
from terseformer.config.model import EncoderDecoderConfig, ModelConfig
from terseformer.config.training import PairsConfig, SpanCorruptionConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: model, data and training."""

    model: ModelConfig | EncoderDecoderConfig = field(default_factory=ModelConfig)
    """The model; in a file also `preset = "NAME"` with changes beside it, and `dense_twin = true`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        limit = self.model.max_position_embeddings
        self._require_fits("train.sequence_length", self.train.sequence_length, limit)
        objective = self.train.objective
        kinds = ("next_token",) if isinstance(self.model, ModelConfig) else ("span_corruption", "pairs")
        require(
            objective.kind in kinds,
            f"train.objective.kind = {objective.kind!r} does not fit a model of kind {self.model.kind!r}, which learns "
            f"by {' or '.join(map(repr, kinds))}",
        )
        has_targets = bool(self.data.target_field)
        if isinstance(objective, PairsConfig):
            self._require_fits("train.objective.max_target_length", objective.max_target_length, limit)
            require(has_targets, "train.objective.kind = 'pairs' needs data.target_field, the field of the targets")
        else:
            require(
                not has_targets,
                f"data.target_field = {self.data.target_field!r} is for train.objective.kind = 'pairs'; leave it out",
            )
        if isinstance(objective, SpanCorruptionConfig):
            require(self.train.sequence_length >= 2, "train.sequence_length must be at least 2 for span corruption")
            if objective.target == "text":
                self._require_fits(
                    "train.sequence_length + 1 (the text and its end)", self.train.sequence_length + 1, limit
                )

    def _require_fits(self, name: str, length: int, limit: int) -> None:
        require(
            length <= limit,
            f"{name} = {length} is longer than model.max_position_embeddings = {limit}; change one of them",
        )
