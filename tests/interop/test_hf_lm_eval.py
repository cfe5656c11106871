"""lm-evaluation-harness by its model `hf`, on tasks from local files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from terseformer.checkpoint import load
from terseformer.generation import generate
from terseformer.sampling import SamplingConfig

PASSAGES = ["ab cd ef ab", "a", "some longer text"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
output_type: {output}
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """
doc_to_text: "{{passage}}"
doc_to_choice: [" ab", " cd", " ef"]
doc_to_target: 1
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITING = """
doc_to_text: "{{passage}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["<|endoftext|>"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_scores_are_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))

    def score(context: list[int], ids: list[int]) -> float:
        with torch.no_grad():
            scores = model(torch.tensor([context + ids[:-1]])).log_softmax(-1)[0, len(context) - 1 :]
        return float(scores.gather(1, torch.tensor(ids)[:, None]).sum())

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    written = generate(model, tokenizer, PASSAGES, SamplingConfig(temperature=0.0, max_new_tokens=5))
    rows = [{"passage": text, "written": new.text} for text, new in zip(PASSAGES, written, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"rolling": ("loglikelihood_rolling", ROLLING), "choice": ("multiple_choice", CHOICE)}
    tasks["writing"] = ("generate_until", WRITING)
    for name, (output, body) in tasks.items():
        head = TASK.format(name=name, file=tmp_path / "rows.jsonl", cache=tmp_path / "cache", output=output)
        (tmp_path / f"{name}.yaml").write_text(head + body)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "batch_size": 2},
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]

    total = sum(score([0], encode(text)) for text in PASSAGES)
    num_bytes = sum(len(text.encode()) for text in PASSAGES)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    chosen = [max((" ab", " cd", " ef"), key=lambda end: score(encode(text), encode(end))) for text in PASSAGES]
    assert results["choice"]["acc,none"] == pytest.approx(chosen.count(" cd") / len(PASSAGES))
    assert results["writing"]["exact_match,none"] == 1
