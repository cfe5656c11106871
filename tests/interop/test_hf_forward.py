"""What a causal language model's `forward` takes and gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import draw, pair
from torch.testing import assert_close

from terseformer.errors import UserError
from terseformer.objectives import Loss
from variants import DISTINCT, VARIANTS


@pytest.mark.parametrize("name", DISTINCT)
def test_the_loss_is_that_of_our_training(name: str, tmp_path: Path) -> None:
    own, model = pair(DISTINCT[name], tmp_path)
    tokens = draw(own.config, 3, 8)
    wanted = Loss(own)(tokens)
    assert_close(model(tokens, labels=tokens).loss, wanted / 21)
    assert_close(model(tokens, labels=tokens, num_items_in_batch=torch.tensor(2)).loss, wanted / 2)
    assert_close(model(tokens, labels=tokens, return_dict=False)[0], wanted / 21)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [*DISTINCT, "pattern-lsh", "pattern-local"])
def test_padding_changes_nothing_wherever_it_is(name: str, tmp_path: Path) -> None:
    own, model = pair(VARIANTS[name], tmp_path)
    tokens, mask = draw(own.config, 3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = mask[1, 6:] = mask[2, 2:4] = 0
    with torch.no_grad():
        for use_cache in (False, True):
            logits = model(tokens, mask, use_cache=use_cache).logits
            assert logits.isfinite().all()
            for row in range(3):
                kept = mask[row].bool()
                assert_close(logits[row, kept], model(tokens[row : row + 1, kept], use_cache=use_cache).logits[0])


def test_only_the_logits_that_are_wanted_are_computed(tmp_path: Path) -> None:
    own, model = pair(DISTINCT["whole-scaling"], tmp_path)
    tokens = draw(own.config, 3, 8)
    with torch.no_grad():
        whole = model(tokens).logits
        assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
        assert_close(model(tokens, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])


def test_a_module_that_was_replaced_takes_part(tmp_path: Path) -> None:
    own, model = pair(DISTINCT["attention-dense"], tmp_path)
    model.head = torch.nn.Linear(30, 9)
    tokens = draw(own.config, 1, 4)
    assert_close(model(tokens).logits, model.head(own.hidden(tokens)))


@pytest.mark.parametrize("what", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_what_is_not_known_is_refused(what: str, tmp_path: Path) -> None:
    own, model = pair(DISTINCT["whole-scaling"], tmp_path)
    with pytest.raises(UserError, match=f"know no {what}"):
        model(draw(own.config, 1, 3), **{what: torch.ones(1) if what == "inputs_embeds" else True})


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    own, model = pair(DISTINCT["whole-scaling"], tmp_path)
    for mask in (torch.ones(1, 2), torch.ones(2, 3), torch.ones(1, 1, 3, 3)):
        with pytest.raises(UserError, match="give a 0 or 1 for each token"):
            model(draw(own.config, 1, 3), mask)


def test_training_has_no_cache(tmp_path: Path) -> None:
    own, model = pair(DISTINCT["whole-scaling"], tmp_path)
    model.train()
    with pytest.raises(UserError, match="use_cache=False"):
        model(draw(own.config, 1, 3), use_cache=True)
