"""Hugging Face's Trainer: it learns, goes on where it was stopped, and shares a batch among processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_two_steps
import pytest
import torch
from hf_models import pair
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import terseformer
from runs import PAIRS_FILE
from variants import DISTINCT

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def causal_trainer(folder: Path, text: Path, output: Path, **settings: Any) -> Trainer:
    """On lines of 16 tokens at most, some of them shorter and padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    rows = [tokenizer(line[: 20 + 3 * (number % 5)])["input_ids"][:16] for number, line in enumerate(lines)]
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=TrainingArguments(str(output), **QUIET | settings),
        train_dataset=[{"input_ids": row} for row in rows],
        eval_dataset=[{"input_ids": row} for row in rows[:6]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(folder: Path, text: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    whole = causal_trainer(folder, text, tmp_path / "whole", **settings)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    half = tmp_path / "whole" / "checkpoint-4"
    resumed = causal_trainer(folder, text, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(half))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 8

    last = tmp_path / "whole" / "checkpoint-8"
    own = terseformer.load(last)
    assert own.state_dict().keys() == whole.model.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    (text_written,) = terseformer.Engine.from_pretrained(last).generate("a")
    assert text_written.token_ids


@pytest.mark.slow
def test_an_encoder_decoder_learns_and_writes(seq2seq_folder: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(seq2seq_folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_folder)
    rows = [json.loads(line) for line in text.with_name(PAIRS_FILE).read_text().splitlines()]
    examples = [
        {"input_ids": tokenizer(row["text"])["input_ids"][:20], "labels": tokenizer(row["title"])["input_ids"][:8]}
        for row in rows
    ]
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            **QUIET,
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            predict_with_generate=True,
            generation_max_length=9,
            save_strategy="no",
        ),
        train_dataset=examples,
        eval_dataset=examples[:6],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predictions = trainer.predict(examples[:6]).predictions
    assert len(predictions) == 6
    assert (predictions[:, 1:9] != 0).any()
    assert (predictions[:, 9:] == 0).all()


@pytest.mark.slow
def test_calls_and_processes_share_a_batch(tmp_path: Path) -> None:
    """Each label counts the same, wherever it is."""
    pair(DISTINCT["attention-dense"], tmp_path / "start")
    hf_two_steps.run(str(tmp_path / "start"), str(tmp_path / "one"), 8)
    hf_two_steps.run(str(tmp_path / "start"), str(tmp_path / "calls"), 4, 2)
    script = [hf_two_steps.__file__, str(tmp_path / "start"), str(tmp_path / "processes"), "4", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *script], check=True)
    start, one, *others = (
        load_file(tmp_path / name / "model.safetensors") for name in ("start", "one", "calls", "processes")
    )
    assert not torch.allclose(one["head.weight"], start["head.weight"], atol=1e-2)
    for other in others:
        assert_close(other, one, rtol=1e-4, atol=1e-5)
