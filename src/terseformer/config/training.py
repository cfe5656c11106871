"""Training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from terseformer.config.checks import require, require_multiple, require_ranges


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """A language model predicts each token of a text from those before it."""

    kind: Literal["next_token"] = "next_token"


@dataclass(frozen=True, kw_only=True)
class SpanCorruptionConfig:
    """An encoder-decoder writes the spans that were taken out of its source."""

    kind: Literal["span_corruption"] = "span_corruption"
    corruption_rate: float = 0.15
    """Share of the tokens that are taken out."""
    mean_span_length: float = 3.0
    """Mean number of tokens in a span."""
    target: Literal["spans", "text"] = "spans"
    """What is written: each sentinel with its span, T5's choice, or the whole text, by which copying is learned too."""

    def __post_init__(self) -> None:
        require_ranges("train.objective", self, share=("corruption_rate",))
        require(
            self.mean_span_length >= 1,
            f"train.objective.mean_span_length must be at least 1, not {self.mean_span_length}",
        )


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """An encoder-decoder writes the `data.target_field` of a row whose text is its source.

    Pairs whose source is longer than `train.sequence_length` are left out.
    """

    kind: Literal["pairs"] = "pairs"
    max_target_length: int = 64
    """Longest target, in tokens, its end included; pairs with longer ones are left out."""

    def __post_init__(self) -> None:
        require_ranges("train.objective", self, count=("max_target_length",))


ObjectiveConfig = NextTokenConfig | SpanCorruptionConfig | PairsConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences or pairs in a step, over all processes and accumulated parts."""
    sequence_length: int = 128
    """Tokens in a sequence; of pairs, in the longest source."""
    objective: ObjectiveConfig = field(default_factory=NextTokenConfig)
    """What is learned."""
    initial_checkpoint: str = ""
    """A checkpoint's or run's folder whose weights the model begins with, and whose tokenizer it has."""
    gradient_accumulation_steps: int = 1
    """Parts that each step's batch is divided into."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` is the paper's."""
    learning_rate: float = 2e-3
    """Peak learning rate; for `rsqrt` the factor before 1 / sqrt(max(step, warmup_steps))."""
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    """How the learning rate goes on after its warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_learning_rate: float = 0.1
    """Where `cosine` ends, as a share of its peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them as they are."""
    final_quant_prob: float | None = None
    """If given, quant_prob moves from the model's value to this one, linearly over the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights and optimiser state stay in fp32."""
    keep_activations: bool = False
    """Let a reversible model keep its activations, as others do: faster than computing them again, with more memory."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several processes share: `ddp` the batch, `fsdp` weights, gradients and optimiser state as well."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Seed of the weights, the batch order and the noise."""
    evaluate_every: int = 250
    """Steps between validations; 0 validates at the end only."""
    evaluate_sequences: int = 256
    """Validation sequences; 0 takes all."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 10
    """Steps between points of the curves."""
    sample_prompt: str = ""
    """Prompt of the sample that each validation prints."""

    def __post_init__(self) -> None:
        require_ranges(
            "train",
            self,
            count=(
                "steps",
                "batch_size",
                "sequence_length",
                "gradient_accumulation_steps",
                "keep_checkpoints",
                "log_every",
            ),
            zero_or_more=(
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
                "evaluate_every",
                "evaluate_sequences",
                "checkpoint_every",
            ),
            positive=("learning_rate",),
            share=("final_learning_rate", "final_quant_prob"),
            share_below_one=("adam_beta2",),
        )
        require(
            not (self.compile and self.parallelism == "fsdp"),
            "train.compile = true does not go with train.parallelism = 'fsdp'; leave one of them out",
        )
        require_multiple(
            "train.batch_size",
            self.batch_size,
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
        )
