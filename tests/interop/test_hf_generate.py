"""`generate()` of causal language models: greedy, sampled, by beams, assisted; alone, and in padded batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import draw, expected, generate, padded, pair, rows_of
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from terseformer.config import ModelConfig
from terseformer.errors import UserError
from terseformer.interop.hf.cache import TerseformerCache
from variants import DISTINCT, MAX_POSITION, PYTORCH_ONLY, VARIANTS

MODELS: dict[str, ModelConfig] = (
    DISTINCT | PYTORCH_ONLY | {name: VARIANTS[name] for name in ("head-tied", "pattern-local_sparse")}
)


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path)
    rows = rows_of(own.config)
    wanted = expected(own, rows)
    assert generate(model, padded(rows)) == wanted
    assert generate(model, padded(rows[:1])) == wanted[:1]
    assert generate(model, padded(rows), use_cache=False) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_beams(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path)
    rows = rows_of(own.config)
    settings = {"num_beams": 3, "length_penalty": 0.7}
    assert generate(model, padded(rows), **settings) == expected(own, rows, **settings)


def test_sampling_does_not_depend_on_the_cache(tmp_path: Path) -> None:
    own, model = pair(MODELS["whole-scaling"], tmp_path)
    inputs, texts = padded(rows_of(own.config)), []
    for use_cache in (True, False, True):
        torch.manual_seed(7)
        texts.append(generate(model, inputs, do_sample=True, temperature=1.5, top_k=10, use_cache=use_cache))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != expected(own, rows_of(own.config))


@pytest.mark.parametrize("name", MODELS)
def test_an_assistant_changes_nothing(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path / "model")
    rows = rows_of(own.config)[1:2]
    wanted = expected(own, rows, max_new_tokens=8)
    (looked_up,) = generate(model, padded(rows), max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert looked_up[:8] == wanted[0]  # older versions of transformers may write one token more
    for seed in (0, 1):  # the model itself, whose guesses are right, and another, whose guesses are wrong
        _, assistant = pair(MODELS[name], tmp_path / f"assistant-{seed}", seed)
        assert generate(model, padded(rows), max_new_tokens=8, assistant_model=assistant) == wanted


@pytest.mark.parametrize(("num_rows", "num_bookmarks"), [(1, 32), (1, 2), (3, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_crop_takes_is_forgotten(
    name: str, num_rows: int, num_bookmarks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("terseformer.interop.hf.cache._NUM_BOOKMARKS", num_bookmarks)
    own, model = pair(MODELS[name], tmp_path)
    right, wrong = (draw(own.config, num_rows, MAX_POSITION, seed=seed) for seed in (0, 1))
    mask = torch.ones_like(right)
    mask[1:, :2] = 0
    cache, length = TerseformerCache(), 0

    def read(tokens: Tensor, count: int) -> Tensor:
        end = cache.get_seq_length() + count
        return model(tokens[:, end - count : end], mask[:, :end], past_key_values=cache).logits

    with torch.no_grad():
        whole = model(right, mask, use_cache=True).logits
        for num_right, num_wrong, back in ((4, 3, 0), (1, 1, 2), (1, 4, 4), (5, 3, 1)):
            read(right, num_right)
            length += num_right
            for _ in range(num_wrong):
                read(wrong, 1)
            for count in filter(None, (num_wrong, back)):
                cache.crop(-count)
            length -= back
            assert cache.get_seq_length() == length
        got = read(right, MAX_POSITION - length)
    real = mask[:, length:].bool()
    assert_close(got[real], whole[:, length:][real], rtol=1e-5, atol=1e-5)


def test_exchanged_rows_cannot_be_taken_back_where_tokens_cannot_be_told_apart(tmp_path: Path) -> None:
    own, _ = pair(MODELS["whole-scaling"], tmp_path)
    cache, tokens = TerseformerCache(), draw(own.config, 2, 4)
    cache.begin(own.new_state(2, 8))
    with torch.no_grad():
        cache.read(tokens, tokens > 0, own.hidden)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(UserError, match="cannot be cropped"):
            cache.crop(-1)


def test_a_cache_can_be_repeated_and_selected(tmp_path: Path) -> None:
    own, model = pair(MODELS["whole-scaling"], tmp_path)
    tokens = draw(own.config, 2, 7)
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert_close(model(tokens[:, 4:].flip(0), past_key_values=cache).logits, whole[:, 4:].flip(0))


def test_another_kind_of_cache_is_refused(tmp_path: Path) -> None:
    own, model = pair(MODELS["whole-scaling"], tmp_path)
    inputs = padded(rows_of(own.config))
    with pytest.raises(UserError, match="leave out cache_implementation"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UserError, match="DynamicCache"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=DynamicCache())
