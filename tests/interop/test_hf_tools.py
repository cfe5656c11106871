"""What Hugging Face's tools do with the folder of a run: tokenizer, pipeline, repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import hub
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, pipeline

import terseformer
from terseformer.checkpoint import load
from terseformer.generation import generate
from terseformer.sampling import SamplingConfig

TEXT = "Some words, 🙂 naïve\n\n and  others<|endoftext|>again"


@pytest.fixture(params=["folder", "seq2seq_folder"])
def any_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_the_tokenizer_is_that_of_the_folder(any_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(any_folder)
    wanted = Tokenizer.from_file(str(any_folder / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer(TEXT)["input_ids"] == wanted
    assert tokenizer.decode(wanted) == TEXT
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 32
    assert AutoTokenizer.from_pretrained(any_folder, padding_side="left").padding_side == "left"

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)  # without the model's configuration
    assert again(TEXT)["input_ids"] == wanted
    assert again.eos_token_id == again.pad_token_id == 0
    assert again.model_max_length == 32


def test_what_generate_needs_to_know_is_known(folder: Path, seq2seq_folder: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert config.eos_token_id == config.bos_token_id == 0
    config = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_folder).generation_config
    assert config.eos_token_id == config.pad_token_id == config.decoder_start_token_id == 0


def test_pipeline(folder: Path) -> None:
    prompts = ["a b", "some longer prompt"]
    write = pipeline("text-generation", model=str(folder), device="cpu")
    write.tokenizer.padding_side = "left"
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)
    written = write(prompts, generation_config=settings, batch_size=2, return_full_text=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = generate(load(folder), tokenizer, prompts, SamplingConfig(temperature=0.0, max_new_tokens=6))
    assert [row["generated_text"] for (row,) in written] == [row.text for row in wanted]


def test_a_saved_folder_is_decoded_by_the_engine(any_folder: Path, tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if any_folder.parent.name == "run" else AutoModelForSeq2SeqLM
    for part in (auto.from_pretrained(any_folder), AutoTokenizer.from_pretrained(any_folder)):
        part.save_pretrained(tmp_path)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=6)
    first, second = (terseformer.Engine.from_pretrained(path) for path in (any_folder, tmp_path))
    assert first.generate("a b c", greedy) == second.generate("a b c", greedy)


PUSH = """
import sys, terseformer
from transformers import AutoModelForCausalLM, AutoTokenizer
for auto in (AutoModelForCausalLM, AutoTokenizer):
    auto.from_pretrained(sys.argv[1]).push_to_hub("someone/model")
"""


@pytest.mark.slow
def test_what_is_pushed_is_a_folder_of_ours(folder: Path, tmp_path: Path) -> None:
    with hub() as (address, files):
        variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PUSH, str(folder)]
        subprocess.run(command, env=os.environ | variables | {"HF_HUB_DISABLE_XET": "1"}, check=True)
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in files.items():
        (pushed / name).write_bytes(content)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    ours, theirs = load(folder), load(pushed)
    assert ours.config == theirs.config
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
