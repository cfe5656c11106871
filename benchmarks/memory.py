"""Memory of training against depth, and the cost of long inputs by attention pattern.

python benchmarks/memory.py                                # writes docs/memory.md, .json and the two plots
python benchmarks/memory.py --layers 2 4 --lengths 1024 2048 --out /tmp/small

Each point is a process of its own. Its peak of memory is that of the whole process, less what was in use before the
forward pass: weights, room for their gradients, inputs and PyTorch itself. It needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terseformer.bench.memory import forget_peak, in_use, peak_in_use
from terseformer.blocks import self_attention
from terseformer.config import (
    AttentionPatternConfig,
    DenseFeedForwardConfig,
    DenseProjectionConfig,
    FavorPatternConfig,
    LocalPatternConfig,
    LSHPatternConfig,
    ModelConfig,
    Seq2SeqConfig,
    SoftmaxPatternConfig,
    TerraformerConfig,
)
from terseformer.layers.reversible import ReversibleStack
from terseformer.machine import processor
from terseformer.models import make_model
from terseformer.presets import preset
from terseformer.state import first_chunk

DOCS = Path(__file__).resolve().parent.parent / "docs"
PATTERNS: dict[str, AttentionPatternConfig] = {
    "softmax": SoftmaxPatternConfig(),
    "LSH": LSHPatternConfig(),
    "local": LocalPatternConfig(),
    "FAVOR": FavorPatternConfig(),
}
LOCAL = LocalPatternConfig(chunk_length=256, chunks_after=1)
SUMMARIZERS: dict[str, tuple[AttentionPatternConfig, AttentionPatternConfig]] = {
    "local, then softmax": (LOCAL, SoftmaxPatternConfig()),  # recipes/summarize-long.toml
    "local, then LSH": (LOCAL, LSHPatternConfig()),
}
"""Patterns of the encoder and of the decoder."""
MODELS = ("Terraformer, reversible", "Terraformer, plain", "Seq2Seq")
LONGEST = 16384  # source of the summariser
SOURCE, TARGET = 256, 256  # tokens of the models' rows
MEGABYTE = 2**20


def step(run: Callable[[], Tensor]) -> dict[str, Any]:
    """Seconds of a forward and a backward pass, and the peak of memory less what was in use before."""
    forget_peak()
    before, start = in_use(), time.perf_counter()
    run().sum().backward()
    return {"seconds": time.perf_counter() - start, "bytes": peak_in_use() - before}


def of_depth(name: str, layers: int) -> dict[str, Any]:
    """One step, forward and backward, of an encoder-decoder with so many blocks on each side."""
    shared = {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
        "feed_forward": DenseFeedForwardConfig(intermediate_size=1024),
    }
    terraformer = TerraformerConfig(**shared, num_attention_layers=1, reversible_encoder=True)
    model = make_model(Seq2SeqConfig(**shared) if name == "Seq2Seq" else terraformer).train()
    for module in model.modules():
        if isinstance(module, ReversibleStack):
            module.keeps_activations = name == "Terraformer, plain"
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)  # in use, like the weights, before the step
    source, target = torch.randint(1, 512, (4, SOURCE)), torch.randint(1, 512, (4, TARGET))
    model(source[:1, :8], target[:1, :8]).sum().backward()  # starts threads and libraries
    return {"model": name, "layers": layers, **step(lambda: model(source, target).logsumexp(-1))}


def of_length(name: str, length: int) -> dict[str, Any]:
    """One attention layer of 4 heads of width 64, forward and backward, on one sequence."""
    config = ModelConfig(hidden_size=256, num_attention_heads=4)
    attention = self_attention(config, DenseProjectionConfig(), PATTERNS[name]).train()
    x = torch.randn(1, length, 256, requires_grad=True)
    chunk = first_chunk(x)
    attention(x[:, :256], first_chunk(x[:, :256])).sum().backward()
    return {"pattern": name, "length": length, **step(lambda: attention(x, chunk))}


def of_source(name: str, length: int) -> dict[str, Any]:
    """One step of the small summariser on one pair, whose source has so many tokens."""
    encoder, decoder = SUMMARIZERS[name]
    config = replace(preset("summarize-1m-terraformer"), encoder_attention_pattern=encoder, attention_pattern=decoder)
    model = make_model(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)
    source, target = torch.randint(1, 1024, (1, length)), torch.randint(1, 1024, (1, 64))
    model(source[:, :8], target[:, :8]).sum().backward()
    return {"attention": name, "source": length, **step(lambda: model(source, target).logsumexp(-1))}


POINTS = {"depth": of_depth, "length": of_length, "source": of_source}


def apart(kind: str, name: str, size: int) -> dict[str, Any]:
    """A point, measured in a fresh process.

    Every larger block of memory is one of the system's own and goes back to it: a heap would hold on to what is free.
    """
    heap = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    command = [sys.executable, __file__, "--point", kind, name, str(size)]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | heap).stdout)
    print(f"{name}, {size:,}: {row['bytes'] / MEGABYTE:,.0f} MiB, {row['seconds']:.2f} s", flush=True)
    return row


def table(rows: list[dict[str, Any]], kind: str, size: str, with_time: bool) -> str:
    """Markdown: a row for each size, a column for each kind."""
    kinds, sizes = (sorted({row[key] for row in rows}, key=order) for key, order in ((kind, _place), (size, int)))
    found = {(row[kind], row[size]): row for row in rows}
    lines = [f"| {size} | {' | '.join(kinds)} |", f"|---:|{'---:|' * len(kinds)}"]
    for value in sizes:
        cells = []
        for name in kinds:
            row = found[name, value]
            seconds = f", {row['seconds']:.2f} s" if with_time else ""
            cells.append(f"{row['bytes'] / MEGABYTE:,.0f} MiB{seconds}")
        lines.append(f"| {value:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(name: str) -> int:
    return [*MODELS, *PATTERNS, *SUMMARIZERS].index(name)


def draw(result: dict[str, Any], out: Path) -> None:
    """Memory against depth; time and memory against length."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "terseformer"
    from matplotlib import pyplot

    def lines(axes: Any, rows: list[dict[str, Any]], kind: str, size: str, key: str, scale: float) -> None:
        for name in sorted({row[kind] for row in rows}, key=_place):
            of_name = [row for row in rows if row[kind] == name]
            axes.plot([r[size] for r in of_name], [r[key] / scale for r in of_name], marker="o", ms=3, label=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    def save(figure: Any, name: str) -> None:
        figure.savefig(out / name, metadata={"Date": None})
        pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    lines(axes, result["depth"], "model", "layers", "bytes", MEGABYTE)
    axes.set(xlabel="blocks of encoder and of decoder", ylabel="peak memory of a training step, MiB", ylim=(0, None))
    save(figure, "memory-depth.svg")
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, key, scale, label in zip(both, ("seconds", "bytes"), (1, MEGABYTE), ("seconds", "MiB"), strict=True):
        lines(axes, result["length"], "pattern", "length", key, scale)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}, forward and backward")
    save(figure, "memory-length.svg")


def report(result: dict[str, Any]) -> str:
    """The page."""
    return f"""# Memory

`{result["command"]}`, {result["processor"]}, {result["threads"]} threads, PyTorch {result["torch"]}.
Each point in a process of its own: the peak of memory in use, less what was in use before the forward pass.

## Depth

A training step on 4 pairs of {SOURCE} and {TARGET} tokens, width 256. The two Terraformers are the same model; one lets
autograd keep its activations.

{table(result["depth"], "model", "layers", with_time=False)}

![peak memory against depth](memory-depth.svg)

## Length

One attention layer, 4 heads of width 64, one sequence, forward and backward. The softmax is PyTorch's, which needs no
memory for its weights; LSH has 2 rounds, LSH and local have chunks of 128 tokens and see one chunk before.

{table(result["length"], "pattern", "length", with_time=True)}

![time and memory against length](memory-length.svg)

## A summariser

A training step of `summarize-1m-terraformer` on one pair: a source of so many tokens, and 64 of its text, whose decoder
sees both.

{table(result["source"], "attention", "source", with_time=True)}
"""


def main() -> None:
    """Measures every point and writes the page, or measures one point and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**n for n in range(7)])
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        kind, name, size = arguments.point
        print(json.dumps(POINTS[kind](name, int(size))))
        return
    result = {
        "command": f"python benchmarks/memory.py {' '.join(sys.argv[1:])}".strip(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "depth": [apart("depth", name, n) for name in MODELS for n in sorted(arguments.layers)],
        "length": [apart("length", name, n) for name in PATTERNS for n in sorted(arguments.lengths)],
        "source": [apart("source", name, n) for name in SUMMARIZERS for n in sorted(arguments.lengths) if n <= LONGEST],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(result, arguments.out)
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "memory.md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
