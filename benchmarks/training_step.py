"""The cost of a training step and of PyTorch decoding, of sparse models beside their dense twins.

python benchmarks/training_step.py small-1m-ff16 small-1m-ff-qkv
python benchmarks/training_step.py small-1m-ff16 --out docs/results/small-1m-speed.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from terseformer.accounting import account
from terseformer.bench.timing import in_turn, spread
from terseformer.config import ModelConfig, TrainConfig
from terseformer.generation import generate_tokens
from terseformer.machine import processor
from terseformer.model import CausalLM
from terseformer.optim import make_optimizer
from terseformer.presets import dense_twin, preset
from terseformer.sampling import SamplingConfig


@dataclass(frozen=True)
class Row:
    """One model's figures; times are medians."""

    name: str
    parameters: int
    bytes_per_token: int
    """Bytes of weights read to decode one token, f32."""
    train_step_seconds: float
    train_step_spread: float
    """(90th - 10th percentile) / median."""
    decode_tokens_per_second: float
    """One row, greedy, in PyTorch."""


class _Training:
    """A model that takes one optimiser step at a call, on random tokens."""

    def __init__(self, config: ModelConfig, batch_size: int, sequence_length: int) -> None:
        torch.manual_seed(0)
        self.model = CausalLM(config).train()
        self.optimizer = make_optimizer(self.model, TrainConfig())
        self.tokens = torch.randint(config.vocab_size, (batch_size, sequence_length + 1))

    def __call__(self) -> None:
        logits = self.model(self.tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _decode(config: ModelConfig, num_tokens: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    sampling = SamplingConfig(max_new_tokens=num_tokens, temperature=0.0)
    return lambda: list(generate_tokens(model, [[1] * 16], sampling))


def bench(
    presets: Sequence[str],
    repetitions: int = 12,
    batch_size: int = 16,
    sequence_length: int = 128,
    decode_tokens: int = 32,
    threads: int = 0,
) -> dict[str, object]:
    """Compares the training step and PyTorch decoding of presets with that of their dense twins.

    Args:
        presets: names of presets.
        repetitions: rounds that are measured, each with one step of every model.
        batch_size: sequences in a training step.
        sequence_length: tokens in a sequence.
        decode_tokens: tokens of a decoding run, after a prompt of 16.
        threads: threads of PyTorch; 0 leaves its default.

    Returns:
        Machine, rows, and `ratios` of training step times, sparse over dense.
    """
    if threads:
        torch.set_num_threads(threads)
    configs: dict[str, ModelConfig] = {}
    twin_of: dict[str, str] = {}
    for name in presets:
        twin = dense_twin(preset(name))
        twin_name = next((n for n, c in configs.items() if c == twin), f"dense twin of {name}")
        configs.setdefault(twin_name, twin)
        configs[name] = preset(name)
        twin_of[name] = twin_name
    steps = in_turn([_Training(c, batch_size, sequence_length) for c in configs.values()], repetitions)
    decodes = in_turn([_decode(c, decode_tokens) for c in configs.values()], max(3, repetitions // 3), warm_up=1)
    rows = {
        name: Row(
            name,
            account(config).parameters,
            account(config).bytes_per_token(4),
            statistics.median(step),
            spread(step),
            decode_tokens / statistics.median(decode),
        )
        for (name, config), step, decode in zip(configs.items(), steps, decodes, strict=True)
    }
    ratios = {
        f"train_step/{name}": statistics.median(
            s / d for s, d in zip(steps[_at(configs, name)], steps[_at(configs, twin)], strict=True)
        )
        for name, twin in twin_of.items()
    }
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": [asdict(row) for row in rows.values()],
        "ratios": ratios,
    }


def _at(configs: dict[str, ModelConfig], name: str) -> int:
    return list(configs).index(name)


def show(result: dict[str, object]) -> None:
    """Prints a table."""
    machine, rows, ratios = result["machine"], result["rows"], result["ratios"]
    assert isinstance(machine, dict)
    assert isinstance(rows, list)
    assert isinstance(ratios, dict)
    title = f"{machine['processor']}, {machine['threads']} threads, PyTorch {machine['torch']}"
    table = Table(
        "model", "parameters", "read per token", "training step", "spread", "step / twin's", "decode", title=title
    )
    for row in rows:
        ratio = ratios.get(f"train_step/{row['name']}")
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['bytes_per_token'] / 1e6:.2f} MB",
            f"{row['train_step_seconds'] * 1e3:.0f} ms",
            f"{row['train_step_spread']:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{row['decode_tokens_per_second']:.0f} tokens/s",
        )
    Console().print(table)


def main() -> None:
    """Measures, shows and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    result = bench(args.presets, args.repetitions)
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
