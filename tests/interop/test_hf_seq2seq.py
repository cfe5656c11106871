"""Encoder-decoders in Hugging Face's form: their losses, their sources in batches, and `generate()`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import draw, expected, generate, padded, pair, rows_of
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from terseformer.config import EncoderDecoderConfig
from terseformer.errors import UserError
from terseformer.objectives import Loss
from variants import DISTINCT_ENCODER_DECODERS, ENCODER_DECODERS

MODELS: dict[str, EncoderDecoderConfig] = DISTINCT_ENCODER_DECODERS | {
    name: ENCODER_DECODERS[name] for name in ("seq2seq-head_tied", "terraformer-lsh", "seq2seq-cross_sparse_5x4")
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_our_training(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path)
    sources, targets = rows_of(own.config), [draw(own.config, n, seed=10 + n) for n in (3, 6, 1)]
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)
    num_source = torch.tensor([len(source) for source in sources])
    part = (
        pad_sequence([torch.tensor(source) for source in sources], batch_first=True),
        num_source,
        pad_sequence([torch.cat([torch.tensor([0]), target]) for target in targets], batch_first=True),
        torch.tensor([len(target) for target in targets]),
    )
    wanted = Loss(own)(*part)
    inputs = padded(sources) | {"labels": labels}
    assert_close(model(**inputs, num_items_in_batch=1).loss, wanted)
    assert_close(model(**inputs).loss, wanted / 10)
    assert_close(model(**inputs, return_dict=False)[0], wanted / 10)


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path)
    rows = rows_of(own.config)
    wanted = expected(own, rows)
    assert generate(model, padded(rows)) == wanted
    assert generate(model, padded(rows[:1])) == wanted[:1]
    if name != "terraformer-lsh":  # which hashes where it has no cache
        assert generate(model, padded(rows), use_cache=False) == wanted
    beams = {"num_beams": 3, "length_penalty": 0.7}
    assert generate(model, padded(rows), **beams) == expected(own, rows, **beams)


@pytest.mark.parametrize("name", MODELS)
def test_an_assistant_changes_nothing(name: str, tmp_path: Path) -> None:
    own, model = pair(MODELS[name], tmp_path / "model")
    rows = rows_of(own.config)[1:2]
    wanted = expected(own, rows)
    for seed in (0, 1):
        _, assistant = pair(MODELS[name], tmp_path / f"assistant-{seed}", seed)
        assert generate(model, padded(rows), assistant_model=assistant) == wanted


def test_targets_are_read_whole_or_in_parts_wherever_their_padding_is(tmp_path: Path) -> None:
    own, model = pair(MODELS["seq2seq-scaling"], tmp_path)
    inputs, target = padded(rows_of(own.config)), draw(own.config, 3, 7)
    mask = torch.ones_like(target)
    mask[1, :3] = mask[2, 5:] = 0
    with torch.no_grad():
        encoder_outputs = model.get_encoder()(**inputs)
        given = {"attention_mask": inputs["attention_mask"], "encoder_outputs": encoder_outputs}
        whole = model(**given, decoder_input_ids=target, decoder_attention_mask=mask).logits
        alone = own(torch.tensor([rows_of(own.config)[1]]), target[1:2, 3:])
        assert_close(whole[1:2, 3:], alone)
        first = model(**given, decoder_input_ids=target[:, :4], decoder_attention_mask=mask[:, :4], use_cache=True)
        rest = model(
            decoder_input_ids=target[:, 4:], decoder_attention_mask=mask, past_key_values=first.past_key_values
        )
    assert_close(torch.cat([first.logits, rest.logits], 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("what", ["inputs_embeds", "decoder_inputs_embeds"])
def test_what_is_not_known_is_refused(what: str, tmp_path: Path) -> None:
    own, model = pair(MODELS["seq2seq-scaling"], tmp_path)
    tokens = draw(own.config, 1, 3)
    with pytest.raises(UserError, match=f"know no {what}"):
        model(tokens, labels=tokens, **{what: torch.ones(1)})
    for other in ("output_attentions", "output_hidden_states"):
        with pytest.raises(UserError, match=f"know no {other}"):
            model(tokens, labels=tokens, **{other: True})
