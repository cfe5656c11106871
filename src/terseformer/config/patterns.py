"""Attention patterns: which tokens a token sees, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from terseformer.config.checks import require, require_ranges


@dataclass(frozen=True, kw_only=True)
class SoftmaxPatternConfig:
    """A softmax over all tokens that may be seen."""

    kind: Literal["softmax"] = "softmax"


@dataclass(frozen=True, kw_only=True)
class _ChunkedPatternConfig:
    chunk_length: int = 128
    """Tokens in a chunk."""
    chunks_before: int = 1
    """Chunks before its own that a token sees."""
    chunks_after: int = 0
    """Chunks after its own that a token sees; local patterns of a decoder have none."""

    def __post_init__(self) -> None:
        require_ranges(
            "model.attention_pattern",
            self,
            count=("chunk_length",),
            zero_or_more=("chunks_before", "chunks_after"),
        )


@dataclass(frozen=True, kw_only=True)
class LocalPatternConfig(_ChunkedPatternConfig):
    """A softmax over the tokens of the present chunk and of the chunks around it."""

    kind: Literal["local"] = "local"


@dataclass(frozen=True, kw_only=True)
class _HashedPatternConfig(_ChunkedPatternConfig):
    num_hashes: int = 2
    """Rounds, each with hashes of its own."""
    num_buckets: int = 0
    """Buckets of a round, an even number; 0 is two for each chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model.attention_pattern", self, count=("num_hashes",), zero_or_more=("num_buckets",))
        require(self.num_buckets % 2 == 0, f"model.attention_pattern.num_buckets must be even, not {self.num_buckets}")


@dataclass(frozen=True, kw_only=True)
class LSHPatternConfig(_HashedPatternConfig):
    """Shared-QK attention among tokens that hash alike; chunks are cut from the tokens sorted by bucket.

    Queries and keys are made one vector, their mean. Decoding with a state sees all earlier tokens.
    """

    kind: Literal["lsh"] = "lsh"


@dataclass(frozen=True, kw_only=True)
class MixedPatternConfig(_HashedPatternConfig):
    """A softmax over all tokens, with the mean of query and key as both, where they are few; beyond, LSH."""

    kind: Literal["mixed"] = "mixed"
    exact_length: int = 1024
    """Longest sequence whose attention is exact, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges("model.attention_pattern", self, zero_or_more=("exact_length",))


@dataclass(frozen=True, kw_only=True)
class FavorPatternConfig:
    """Linear attention: weights are products of the features relu(x) + 0.001; there is no dropout on them."""

    kind: Literal["favor"] = "favor"


@dataclass(frozen=True, kw_only=True)
class FavorSoftmaxPatternConfig:
    """Linear attention by random features, whose products approximate the softmax's; no dropout on the weights."""

    kind: Literal["favor_softmax"] = "favor_softmax"
    num_features: int = 256
    """Random features of a head."""

    def __post_init__(self) -> None:
        require_ranges("model.attention_pattern", self, count=("num_features",))


AttentionPatternConfig = (
    SoftmaxPatternConfig
    | LocalPatternConfig
    | LSHPatternConfig
    | MixedPatternConfig
    | FavorPatternConfig
    | FavorSoftmaxPatternConfig
)
