"""Memory of a training process, by what the processes share.

python benchmarks/scaling.py                 # prints both tables of docs/scaling.md
python benchmarks/scaling.py --computed      # only the one for the presets, in seconds

Measured: a small model takes steps in processes of its own. The figure is the peak of memory that the first process has
in use in a step, less what it had in use before it made the model. It needs Linux with glibc.
Computed: `terseformer.sharding.training_memory`, which leaves activations out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from terseformer import data
from terseformer.bench.memory import forget_peak, in_use, peak_in_use
from terseformer.config import (
    DataConfig,
    DenseFeedForwardConfig,
    ModelConfig,
    PairsConfig,
    Recipe,
    TerraformerConfig,
    TrainConfig,
)
from terseformer.info import short
from terseformer.presets import num_parameters, preset
from terseformer.sharding import training_memory
from terseformer.training import Trainer, make_accelerator

SHARED = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "feed_forward": DenseFeedForwardConfig(intermediate_size=2048),
}
MODELS = {
    "decoder": ModelConfig(**SHARED, num_hidden_layers=12),
    "reversible": TerraformerConfig(**SHARED, num_encoder_layers=4, num_decoder_layers=8, reversible_encoder=True),
}
STRATEGIES = {"one process": ("ddp", 1), "DDP": ("ddp", 2), "FSDP": ("fsdp", 2)}
OPTIMIZERS = ("adamw", "adafactor")
PRESETS = ("seq2seq-800m-ff-qkv", "terraformer-800m", "seq2seq-17b-dense", "terraformer-17b", "terraformer-54b")
MEGABYTE, GIGABYTE = 2**20, 2**30


def measure(model: str, parallelism: str, optimizer: str, folder: Path) -> dict[str, int]:
    """Peaks of a step, of saving a checkpoint, and of making the model anew and resuming, less what was in use before.

    Files that are mapped count as far as they were read.
    """
    config = MODELS[model]
    is_decoder = isinstance(config, ModelConfig)
    rows = ({"text": f"{n} words " * (20 if is_decoder else 1), "title": str(n)} for n in range(1000, 1060))
    text = folder / "text.jsonl"
    if int(os.environ.get("RANK", "0")) == 0:
        text.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    objective = {} if is_decoder else {"objective": PairsConfig(max_target_length=16)}
    recipe = Recipe(
        model=config,
        data=DataConfig(
            sources=(str(text),), vocab_size=300, validation_fraction=0.2, target_field="" if is_decoder else "title"
        ),
        train=TrainConfig(batch_size=2, sequence_length=16, optimizer=optimizer, parallelism=parallelism, **objective),
    )
    accelerator = make_accelerator(recipe)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        prepared = data.prepare_in_cache(recipe.data)
    forget_peak()
    before = in_use()
    trainer = Trainer(recipe, folder / "run", prepared, accelerator)
    trainer.start()
    trainer.advance()
    trainer.advance()
    forget_peak()
    trainer.advance()
    step = peak_in_use() - before
    forget_peak()
    path = trainer.save()
    save = peak_in_use() - before
    del trainer
    gc.collect()
    forget_peak()
    Trainer(recipe, folder / "run", prepared, accelerator).resume(path)
    resume = peak_in_use() - before
    accelerator.end_training()
    return {"step": step, "save": save, "resume": resume}


def apart(model: str, strategy: str, optimizer: str) -> dict[str, int]:
    """The same, in fresh processes, of which every larger block of memory is the system's own and goes back to it."""
    parallelism, num_processes = STRATEGIES[strategy]
    heap = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        point = [__file__, "--point", model, parallelism, optimizer, folder]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        command = [sys.executable, *(torchrun if num_processes > 1 else []), *point]
        environment = os.environ | heap | {"TERSE_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def computed(model: Any, strategy: str, optimizer: str) -> int:
    """Bytes of a process."""
    parallelism, num_processes = STRATEGIES[strategy]
    return sum(training_memory(model, optimizer, parallelism, num_processes).values())


def measured_table() -> str:
    """Markdown: a row for each model, strategy and optimiser."""
    lines = [
        "| model | processes | optimiser | computed | a step | saving | resuming |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for model, config in MODELS.items():
        for strategy in STRATEGIES:
            for optimizer in OPTIMIZERS:
                found = apart(model, strategy, optimizer)
                figures = [computed(config, strategy, optimizer), *found.values()]
                cells = " | ".join(f"{figure / MEGABYTE:,.0f} MiB" for figure in figures)
                lines.append(f"| {model} | {strategy} | {optimizer} | {cells} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def computed_table() -> str:
    """Markdown: a row for each preset and optimiser."""
    columns = [("ddp", 1), ("fsdp", 8), ("fsdp", 64)]
    lines = ["| preset | parameters | optimiser | one process | FSDP, 8 | FSDP, 64 |", "|---|---:|---|---:|---:|---:|"]
    for name in PRESETS:
        for optimizer in OPTIMIZERS:
            totals = [sum(training_memory(preset(name), optimizer, *column).values()) for column in columns]
            cells = " | ".join(f"{total / GIGABYTE:,.1f} GiB" for total in totals)
            lines.append(f"| {name} | {short(num_parameters(preset(name)))} | {optimizer} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables, or measures one point and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", action="store_true", help="only what is computed")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        model, parallelism, optimizer, folder = arguments.point
        found = measure(model, parallelism, optimizer, Path(folder))
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
        return
    if not arguments.computed:
        print(measured_table(), end="\n\n")
    print(computed_table())


if __name__ == "__main__":
    main()
