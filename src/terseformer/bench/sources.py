"""The time and the memory that a Terraformer needs to read a source, before the first token of its text."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from terseformer.bench.memory import forget_peak, in_use, peak_in_use
from terseformer.bench.models import random_model
from terseformer.config import LocalPatternConfig, LSHPatternConfig, SoftmaxPatternConfig, TerraformerConfig
from terseformer.engine import Engine
from terseformer.presets import preset

LENGTHS = (1024, 4096, 16384, 65536)
PATTERNS = {
    "local": (LocalPatternConfig(chunks_after=1), LocalPatternConfig(), 65536),
    "LSH": (LSHPatternConfig(chunks_after=1), LocalPatternConfig(), 16384),
    "exact": (SoftmaxPatternConfig(), SoftmaxPatternConfig(), 4096),
}
"""Of the encoder and of the decoder, for which the source stands before the text; and the longest source."""


@dataclass(frozen=True)
class Reading:
    """One source, read once."""

    pattern: str
    tokens: int
    seconds: float
    """By the encoder, and by the decoder as a prefix."""
    peak_gigabytes: float
    """The most memory in use, less what was in use before; the weights are in use before."""


def read_sources(threads: int, folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[Reading]:
    """Reads sources with the 800M Terraformer, float32 with random weights.

    Args:
        threads: that read together.
        folder: where models of random weights are kept.
        lengths: of the sources, in tokens; each pattern stops at its longest.
    """
    config = preset("terraformer-800m")
    assert isinstance(config, TerraformerConfig)
    config = replace(config, max_position_embeddings=max(lengths), position="sinusoidal")
    weights = random_model(config, "f32", folder)
    readings = []
    for name, (encoder, decoder, longest) in PATTERNS.items():
        patterns = {"encoder_attention_pattern": encoder, "attention_pattern": decoder}
        packed = replace(weights, config=replace(config, **patterns))
        for length in (length for length in lengths if length <= longest):
            engine = Engine(packed, threads=threads)  # a new one: memory that was used once stays in use
            engine.new_session(1, source=[1] * 128)  # the weights are read from the file
            forget_peak()
            before, start = in_use(), time.perf_counter()
            session = engine.new_session(1, source=[1 + i % 1000 for i in range(length)])
            seconds, peak = time.perf_counter() - start, peak_in_use()
            assert session.source
            readings.append(Reading(name, length, seconds, (peak - before) / 1e9))
    return readings
