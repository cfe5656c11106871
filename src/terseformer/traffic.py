"""What decoding a token must read of a packed model."""

from __future__ import annotations

from terseformer import config as c
from terseformer.accounting import account
from terseformer.layout import AnyConfig, Dtype, declare

_OF_A_SOURCE = (".cross.projection.key.", ".cross.projection.value.")
"""Beside the encoder, what is read once for a source."""


def bytes_read(config: AnyConfig, dtype: Dtype, context: int, num_source: int = 0) -> int:
    """Bytes of weights, keys and values that decoding one token must read; `num_source` is cross-attention's."""
    feed_forward = config.feed_forward
    match feed_forward:
        case c.SparseFeedForwardConfig(ff_block_size=choices):
            share = 1 / choices
        case c.BlockFeedForwardConfig(num_experts=choices) | c.SwitchFeedForwardConfig(num_experts=choices):
            share = 1 / choices
        case _:
            share = 1.0
    total = 0.0
    for entry in declare(config, dtype):
        if entry.name.startswith("encoder") or any(part in entry.name for part in _OF_A_SOURCE):
            continue
        num_bytes = entry.declared.num_bytes
        if entry.name.startswith(("embedding.", "position.")):
            num_bytes /= entry.declared.shape[0]
        elif entry.name.endswith(".units"):
            num_bytes *= share
        total += num_bytes
    return round(total) + account(config, context, num_source).cache_bytes_per_token(4)
