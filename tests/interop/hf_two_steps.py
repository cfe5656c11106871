"""Two steps of Hugging Face's Trainer on 8 sequences each, alone or as one process of several.

python hf_two_steps.py FOLDER OUTPUT SEQUENCES_PER_CALL CALLS
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import terseformer  # noqa: F401  makes its models known


def run(folder: str, output: str, batch_size: int, calls: int = 1) -> None:
    """Trains the model of a folder and saves it in another; the sequences have different numbers of labels."""
    rows = torch.randint(21, (16, 8), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    for number, row in enumerate(labels):
        row[1 + number % 7 :] = -100
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=TrainingArguments(
            output,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=calls,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)],
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
