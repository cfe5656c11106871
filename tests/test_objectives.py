"""What a model learns: the loss of a padded batch is that of its rows, and what does not suffice is told at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from runs import PAIRS, SEQ2SEQ, SPANS, TERRAFORMER, make_recipe
from terseformer import data
from terseformer.config import ConfigError, EncoderDecoderConfig, PairsConfig, Recipe, SpanCorruptionConfig
from terseformer.data import DataError, PairBatch
from terseformer.data.pairs import collate
from terseformer.data.tokenizer import sentinel
from terseformer.evaluation import evaluate_pairs
from terseformer.models import make_model as make_new_model
from terseformer.objectives import Loss, Objective, make_objective, tensors
from terseformer.text import source_ids
from variants import DISTINCT_ENCODER_DECODERS, make_model

every_model = pytest.mark.parametrize(
    "config", DISTINCT_ENCODER_DECODERS.values(), ids=DISTINCT_ENCODER_DECODERS.keys()
)
both_objectives = pytest.mark.parametrize("objective", [PAIRS, SPANS], ids=["pairs", "spans"])
EMPTY_TARGET = 1


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    """Rows of different lengths on both sides; of one target there is but its end."""
    draw = np.random.default_rng(0)
    sources, targets = ([draw.integers(1, 21, n) for n in lengths] for lengths in ((3, 9, 1), (7, 0, 4)))
    return collate(sources, [np.append(target, 0) for target in targets], pad_token_id=0)


def alone(batch: PairBatch, row: int) -> PairBatch:
    """A row without padding."""
    n, m, one = batch.num_source[row], batch.num_target[row], slice(row, row + 1)
    source, target = batch.source[one, :n], batch.target[one, : m + 1]
    return PairBatch(source, batch.num_source[one], target, batch.num_target[one])


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_model
@pytest.mark.parametrize("logits", [2**24, 21 * 4], ids=["whole", "in chunks"])
def test_a_padded_batch_loses_what_its_rows_lose(
    config: EncoderDecoderConfig, logits: int, batch: PairBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["terseformer.objectives"], "_LOGITS", logits)
    model = make_model(config).double()
    loss = Loss(model)
    together = gradients(model, total := loss(*tensors(batch)))
    sums: dict[str, torch.Tensor] = {}
    expected = 0.0
    for row in range(3):
        one = alone(batch, row)
        source, _, target, _ = tensors(one)
        logits_alone = model(source, target[:, :-1])[0].double()
        expected += F.cross_entropy(logits_alone, target[0, 1:], reduction="sum").item()
        for name, grad in gradients(model, loss(*tensors(one))).items():
            sums[name] = sums.get(name, 0) + grad
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert together.keys() == sums.keys()
    for name, grad in together.items():
        assert_close(grad, sums[name], atol=1e-5, rtol=1e-5, msg=name)


@every_model
def test_padding_costs_nothing(config: EncoderDecoderConfig, batch: PairBatch) -> None:
    """Whatever stands there."""
    loss = Loss(make_model(config).double())
    source, num_source, target, num_target = (tensor.clone() for tensor in tensors(batch))
    expected = loss(source, num_source, target, num_target).item()
    source[torch.arange(source.shape[1]) >= num_source[:, None]] = 5
    target[torch.arange(target.shape[1]) > num_target[:, None]] = 6
    assert loss(source, num_source, target, num_target).item() == pytest.approx(expected, rel=1e-6)


@every_model
def test_evaluation_is_the_mean_over_the_targets(config: EncoderDecoderConfig, batch: PairBatch) -> None:
    model = make_model(config)
    expected = Loss(model)(*tensors(batch)).item()
    model.train()
    model.embedding_dropout.eval()
    flags = [module.training for module in model.modules()]
    whole = evaluate_pairs(model, [batch])
    assert whole.tokens == 7 + 0 + 4 + 3
    assert whole.loss == pytest.approx(expected / whole.tokens, rel=1e-5)
    assert (whole.bytes, whole.bits_per_byte) == (None, None)
    rows = evaluate_pairs(model, (alone(batch, row) for row in range(3)))
    assert (rows.loss, rows.tokens) == (pytest.approx(whole.loss, rel=1e-5), whole.tokens)
    assert [module.training for module in model.modules()] == flags


Make = Callable[..., tuple[Recipe, data.PreparedData, Objective]]


@pytest.fixture
def make(text: Path) -> Make:
    """A recipe with its text and objective."""

    def make(model: EncoderDecoderConfig = SEQ2SEQ, data_changes: dict[str, Any] | None = None, **train: Any) -> Any:
        recipe = make_recipe(text, model, **train)
        recipe = replace(recipe, data=replace(recipe.data, **data_changes or {}))
        prepared = data.prepare_in_cache(recipe.data)
        return recipe, prepared, make_objective(recipe, prepared)

    return make


@both_objectives
def test_parts_of_a_step(make: Make, objective: PairsConfig | SpanCorruptionConfig) -> None:
    _, prepared, whole = make(objective=objective, batch_size=12)
    _, _, divided = make(objective=objective, batch_size=12, gradient_accumulation_steps=3)
    (part,) = whole.parts(5, 0, 1)
    parts = [part for rank in (0, 1) for part in divided.parts(5, rank, 2)]
    assert len(parts) == 6
    assert all(len(part[0]) == 2 for part in parts)

    def rows(part: tuple[torch.Tensor, ...]) -> list[tuple[list[int], list[int]]]:
        zipped = zip(*(tensor.tolist() for tensor in part), strict=True)
        return [(source[:n], target[: m + 1]) for source, n, target, m in zipped]

    found = [row for one in parts for row in rows(one)]
    assert sorted(found) == sorted(rows(part))
    assert sum(map(divided.num_targets, parts)) == whole.num_targets(part) == sum(len(t) - 1 for _, t in rows(part))
    if objective is PAIRS:
        assert len({divided.num_targets(one) for one in parts}) > 1
        texts = {prepared.tokenizer.decode(target) for _, target in rows(part)}
        assert all(text for text in texts)
    else:
        assert prepared.tokenizer.token_to_id(sentinel(0)) in rows(part)[0][0]


@both_objectives
def test_evaluation_takes_as_many_as_it_is_told(make: Make, objective: PairsConfig | SpanCorruptionConfig) -> None:
    recipe, prepared, learned = make(objective=objective)
    model = make_new_model(recipe.model)
    some, all_of_them = learned.evaluate(model, 2), learned.evaluate(model, 0)
    assert some.tokens == sum(int(batch.num_target.sum()) for batch in learned.validation(2))
    if objective is PAIRS:
        file = data.PairFile(prepared.validation, 12, 12, 0)
        assert all_of_them.tokens == file.num_target.sum() > some.tokens
    else:
        assert all_of_them.tokens == (prepared.validation.num_tokens - 1) // 12 * (2 + 1 + 1)


@pytest.mark.parametrize("pad", [0, 7])
@both_objectives
def test_prompt_is_a_source_that_the_model_can_read(
    make: Make, objective: PairsConfig | SpanCorruptionConfig, pad: int
) -> None:
    model = replace(TERRAFORMER, max_position_embeddings=14, pad_token_id=pad)
    _, prepared, learned = make(model, objective=objective)
    first = next(learned.validation(1))
    source = first.source[0, : first.num_source[0]].tolist()
    assert source_ids(prepared.tokenizer, learned.prompt(), pad) == source
    _, _, told = make(model, objective=objective, sample_prompt="a source")
    assert told.prompt() == "a source"


def test_prompt_fits_though_its_text_has_more_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that begins within a character has no text of its own length."""
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "' + "\N{SNOWMAN}\N{COMET}" * 40 + '"}\n' + '{"text": "' + "\N{UMBRELLA}" * 99 + '"}\n')
    objective = SpanCorruptionConfig(mean_span_length=1.0, corruption_rate=0.2)
    recipe = make_recipe(tmp_path / "x", SEQ2SEQ, objective=objective, sequence_length=32)
    recipe = replace(recipe, data=replace(recipe.data, num_sentinels=7, vocab_size=264, validation_fraction=0.5))
    prepared = data.prepare_in_cache(recipe.data)
    prompt = make_objective(recipe, prepared).prompt()
    assert 1 <= len(source_ids(prepared.tokenizer, prompt, 0)) <= 32


@pytest.mark.parametrize(
    ("changes", "data_changes", "message"),
    [
        ({"objective": PairsConfig(max_target_length=1)}, {}, "none of the .* pairs .* and 1 in its target; raise tr"),
        ({"objective": PAIRS, "sequence_length": 1}, {}, "none of the .* pairs .* at most 1 tokens in its source"),
        (
            {"objective": SPANS, "sequence_length": 32},
            {"num_sentinels": 1},
            "lose 2 spans, but the tokenizer has only 1",
        ),
        (
            {"objective": SPANS, "sequence_length": 31},
            {"validation_fraction": 1e-9},
            "validation text has .* tokens, but",
        ),
    ],
)
def test_what_does_not_suffice(make: Make, changes: dict[str, Any], data_changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(SEQ2SEQ, data_changes, **changes)


def test_spans_that_the_model_cannot_write(make: Make) -> None:
    objective = SpanCorruptionConfig(corruption_rate=0.9, mean_span_length=3.0)
    limit = SEQ2SEQ.max_position_embeddings
    with pytest.raises(
        ConfigError, match=rf"corruption_rate = 0.9 and .* more than model.max_.* = {limit}; change one"
    ):
        make(SEQ2SEQ, {"num_sentinels": 40}, objective=objective, sequence_length=limit)
