"""What a client is told of a model's inside: how its units lie, and what a token reads, beside the dense twin."""

from __future__ import annotations

from typing import Any

from terseformer import config as c
from terseformer.accounting import account
from terseformer.config import ConfigError
from terseformer.layout import AnyConfig, Dtype
from terseformer.presets import dense_twin
from terseformer.traffic import bytes_read


def describe_shape(config: AnyConfig, dtype: Dtype, *, takes_turns: bool) -> dict[str, Any]:
    """The field `terse` of a model.

    `layers` of the decoder have `blocks` each, in which a token chooses one of `choices`, each of which stands for
    `units_per_choice`; dense layers have no blocks. `bytes_read` for a token are those of the weights. `twin` is null
    where there is no dense model of the same size.

    Args:
        config: of the model.
        dtype: of the weights.
        takes_turns: whether it can be chatted with.
    """
    is_decoder = isinstance(config, c.ModelConfig)
    blocks, choices, units = _units(config.feed_forward)
    return {
        "kind": config.kind,
        "dtype": dtype,
        "has_source": not is_decoder,
        "takes_turns": takes_turns,
        "layers": config.num_hidden_layers if is_decoder else config.num_decoder_layers,
        "blocks": blocks,
        "choices": choices,
        "units_per_choice": units,
        **_cost(config, dtype),
        "twin": _twin(config, dtype),
    }


def _units(config: c.FeedForwardConfig) -> tuple[int, int, int]:
    """Blocks of a layer, choices in a block, units of a choice."""
    match config:
        case c.SparseFeedForwardConfig(intermediate_size=width, ff_block_size=choices):
            return width // choices, choices, 1
        case c.BlockFeedForwardConfig(intermediate_size=width, num_experts=choices):
            return 1, choices, width // choices
        case c.SwitchFeedForwardConfig(intermediate_size=width, num_experts=choices):
            return 1, choices, width // choices
        case c.DenseFeedForwardConfig(intermediate_size=width):
            return 0, 1, width


def _cost(config: AnyConfig, dtype: Dtype) -> dict[str, int]:
    total = account(config).total
    return {
        "parameters": total.parameters,
        "parameters_read": total.parameters_read,
        "bytes_read": bytes_read(config, dtype, context=0),
    }


def _twin(config: AnyConfig, dtype: Dtype) -> dict[str, int] | None:
    try:
        return _cost(dense_twin(config), dtype)
    except ConfigError:
        return None
