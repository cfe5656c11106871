"""The units that tokens touch by the engine's account are those that PyTorch's controllers choose."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engines import draw_tokens, make_engine, pack_model
from quantised import rounded
from runs import DENSE, SPARSE
from terseformer.config import DenseFeedForwardConfig, ModelConfig
from terseformer.engine import Engine, Touched
from terseformer.layers.feedforward import SparseFeedForward
from terseformer.layout import Dtype
from terseformer.models import AnyModel
from terseformer.sampling import SamplingConfig
from variants import ENCODER_DECODERS, VARIANTS, make_model

CONFIGS = VARIANTS | ENCODER_DECODERS
WHOLE = ["whole-scaling_sru_rotary_rms", "seq2seq-scaling", "terraformer-scaling", "terraformer-feed_forward_block"]
CHOOSING = [
    name
    for name, config in VARIANTS.items()
    if name.startswith("feed_forward-") and not isinstance(config.feed_forward, DenseFeedForwardConfig)
]
# int8 rounds the controllers' inputs, which turns some choices.
CASES = [*((name, "f32") for name in CHOOSING + WHOLE), ("feed_forward-sparse", "bf16"), ("feed_forward-block", "bf16")]


@torch.inference_mode()
def torch_touched(model: AnyModel, source: list[int] | None, tokens: list[int], count: int) -> Touched:
    """What the last `count` tokens touch, when all are read at once and every unit is computed."""
    chosen, active, hooks = [], [], []

    def note(layer: SparseFeedForward, x: torch.Tensor, logits: torch.Tensor) -> None:
        choice = logits[0, -count:].argmax(-1)
        values = F.linear(x[0, -count:], layer.up_weight).unflatten(-1, (-1, layer.num_choices, layer.span))
        chosen.append(choice)
        active.append((values.take_along_dim(choice[..., None, None], dim=2) > 0).sum((2, 3)))

    for name, layer in model.named_modules():
        if isinstance(layer, SparseFeedForward) and not name.startswith("encoder"):
            hook = layer.controller.register_forward_hook
            hooks.append(hook(lambda _, inputs, logits, layer=layer: note(layer, inputs[0], logits)))
    if source is None:
        model(torch.tensor([tokens]))
    else:
        model(torch.tensor([source]), torch.tensor([tokens]), torch.tensor([len(source)]))
    for hook in hooks:
        hook.remove()
    return Touched(*(torch.stack(layers, 1).int().numpy() for layers in (chosen, active)))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_parity_of_touched_units(name: str, dtype: Dtype, tmp_path: Path) -> None:
    """Of three texts together and of one alone; by one thread and by two, which share the units."""
    config = CONFIGS[name]
    model = make_model(config)
    packed = pack_model(model, tmp_path / "packed", dtype)
    model.load_state_dict(rounded(model.state_dict(), dtype))
    sampling = SamplingConfig(max_new_tokens=5)
    beginnings = [draw_tokens(config, count, seed=count) for count in (1, 3, 6)]
    source = None if isinstance(config, ModelConfig) else draw_tokens(config, 7)
    for threads in (1, 2):
        engine = Engine(packed, threads=threads, poison=True)
        for together in (beginnings, beginnings[1:2]):
            sessions = [engine.new_session(source=source) for _ in together]
            writers = [engine.start(s, b, sampling, trace=True) for s, b in zip(sessions, together, strict=True)]
            texts = engine.write(writers)
            for beginning, text, writer in zip(together, texts, writers, strict=True):
                assert len(text) == 5
                touched = engine.touched(writer)
                expected = torch_touched(model, source, beginning + text[:-1], 4)
                np.testing.assert_array_equal(touched.chosen, expected.chosen)
                np.testing.assert_array_equal(touched.active, expected.active)


def test_only_who_asks_is_told_and_each_token_once(tmp_path: Path) -> None:
    engine = make_engine(make_model(SPARSE), tmp_path)
    sampling = SamplingConfig(max_new_tokens=9)
    seeds = (1, 2, 3)
    writers = [engine.start(engine.new_session(), [seed], sampling, seed, trace=seed != 2) for seed in seeds]
    parts = []
    texts = [[], [], []]
    for steps in (1, 3, 5):
        for text, tokens in zip(texts, engine.write(writers, steps), strict=True):
            text += tokens
        parts.append([engine.touched(writer) for writer in writers])
    blocks = (SPARSE.num_hidden_layers, 4)  # 32 units, one in 8
    assert [[touched.chosen.shape for touched in part] for part in parts] == [
        [(read, *blocks), (0, *blocks), (read, *blocks)] for read in (0, 3, 5)
    ]
    for i, (seed, text) in enumerate(zip(seeds, texts, strict=True)):
        alone = engine.start(engine.new_session(), [seed], sampling, seed, trace=True)
        assert engine.write([alone]) == [text]
        if seed != 2:
            whole = engine.touched(alone)
            for field in ("chosen", "active"):
                got = np.concatenate([getattr(part[i], field) for part in parts])
                np.testing.assert_array_equal(got, getattr(whole, field))


def test_a_dense_layer_has_no_blocks(tmp_path: Path) -> None:
    engine = make_engine(make_model(DENSE), tmp_path)
    writer = engine.start(engine.new_session(), [1], SamplingConfig(max_new_tokens=4), trace=True)
    engine.write([writer])
    assert engine.touched(writer).chosen.shape == (3, DENSE.num_hidden_layers, 0)


def test_nobody_takes_from_a_writer_that_is_writing(tmp_path: Path) -> None:
    engine = make_engine(make_model(replace(SPARSE, max_position_embeddings=4000)), tmp_path, threads=1)
    writer = engine.start(engine.new_session(), [1], SamplingConfig(max_new_tokens=3000), trace=True)
    writing = threading.Thread(target=engine.write, args=([writer],))

    def take() -> None:
        while writing.is_alive():
            engine.touched(writer)

    writing.start()
    with pytest.raises(ValueError, match="the session is in use"):
        take()
    writing.join()
