"""A stream tells which units each token touched, as the engine does; and a model, how its units lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from openai import BadRequestError

from runs import SPARSE
from served import PROMPT, ServerProcess
from terseformer.accounting import account
from terseformer.config import BlockFeedForwardConfig, ModelConfig
from terseformer.engine import Engine
from terseformer.presets import dense_twin, preset
from terseformer.sampling import SamplingConfig
from terseformer.serve.shape import describe_shape
from terseformer.traffic import bytes_read

DRAWN = {"model": "small", "max_tokens": 24, "seed": 7, "temperature": 1.0, "stream": True}
TRACE = {"terse": {"trace": True}}


def trace_of(chunks: list[Any]) -> tuple[list[Any], ...]:
    """The pieces, units and active units of all chunks."""
    return tuple([x for chunk in chunks for x in chunk.terse[field]] for field in ("pieces", "units", "active"))


def test_a_completions_stream_has_what_the_engine_touched(server: ServerProcess, engine: Engine) -> None:
    create = server.client().completions.create
    chunks = list(create(prompt=PROMPT, extra_body=TRACE, **DRAWN))
    sampling = SamplingConfig(max_new_tokens=24, temperature=1.0)
    writer = engine.start(engine.new_session(), engine.tokenizer.encode(PROMPT).ids, sampling, 7, trace=True)
    (tokens,) = engine.write([writer])
    touched = engine.touched(writer)
    pieces, units, active = trace_of(chunks)
    assert ["".join(chunk.terse["pieces"]) for chunk in chunks] == [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) == len(tokens) == len(units) + 1
    np.testing.assert_array_equal(units, touched.chosen)
    np.testing.assert_array_equal(active, touched.active)
    untraced = list(create(prompt=PROMPT, **DRAWN))
    assert "".join(chunk.choices[0].text for chunk in untraced) == "".join(pieces)
    assert not any(hasattr(chunk, "terse") for chunk in untraced)


def test_a_chat_stream_has_it_too(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    chunks = list(server.client().chat.completions.create(messages=messages, extra_body=TRACE, **DRAWN))
    pieces, units, active = trace_of(chunks)
    assert "".join(pieces) == "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert np.shape(units) == np.shape(active) == (len(pieces) - 1, SPARSE.num_hidden_layers, 4)


def test_texts_of_one_request_are_told_apart(server: ServerProcess) -> None:
    create = server.client().completions.create
    chunks = list(create(prompt=PROMPT, n=2, extra_body=TRACE, **DRAWN))
    for index in (0, 1):
        alone = create(prompt=PROMPT, extra_body=TRACE, **DRAWN | {"seed": 7 + index})
        assert trace_of([chunk for chunk in chunks if chunk.choices[0].index == index]) == trace_of(list(alone))


@pytest.mark.parametrize("more", [{"stream": False}, {"response_format": {"type": "json_object"}}], ids=str)
def test_what_cannot_be_traced(more: dict[str, Any], server: ServerProcess) -> None:
    with pytest.raises(BadRequestError, match="terse.trace needs stream: true"):
        server.client().completions.create(prompt=PROMPT, **DRAWN, extra_body=TRACE | more)


def test_models_have_a_shape(server: ServerProcess, engine: Engine) -> None:
    small, pairs = (model.terse for model in server.client().models.list())
    assert small == describe_shape(engine.config, "f32", takes_turns=True)
    assert (small["layers"], small["blocks"], small["choices"], small["units_per_choice"]) == (2, 4, 8, 1)
    assert (small["has_source"], pairs["has_source"], pairs["takes_turns"]) == (False, True, False)
    assert server.client().models.retrieve("pairs").terse == pairs


def test_the_twins_bytes_stand_beside_a_models_own() -> None:
    config = preset("small-1m-ff16")
    shape, twin = describe_shape(config, "int8", takes_turns=True), dense_twin(config)
    costs = account(config).total
    assert (shape["parameters"], shape["parameters_read"]) == (costs.parameters, costs.parameters_read)
    assert shape["bytes_read"] == bytes_read(config, "int8", 0)
    assert shape["twin"]["bytes_read"] == bytes_read(twin, "int8", 0) > shape["bytes_read"]
    assert shape["blocks"] * shape["choices"] == config.feed_forward.intermediate_size


def test_shapes_of_experts_and_of_dense_layers() -> None:
    experts = BlockFeedForwardConfig(intermediate_size=32, num_experts=4)
    shape = describe_shape(ModelConfig(feed_forward=experts), "f32", takes_turns=True)
    assert (shape["blocks"], shape["choices"], shape["units_per_choice"]) == (1, 4, 8)
    shape = describe_shape(preset("small-1m-dense"), "f32", takes_turns=True)
    assert shape["blocks"] == 0
    assert shape["twin"]["bytes_read"] == shape["bytes_read"]
