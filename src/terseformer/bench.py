"""Speed, measured in one process in turn, so that all that is compared meets the same machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from terseformer.accounting import account
from terseformer.config import ModelConfig, TrainConfig
from terseformer.generation import generate_tokens
from terseformer.model import CausalLM
from terseformer.optim import make_optimizer
from terseformer.presets import dense_twin, preset
from terseformer.sampling import SamplingConfig

DEFAULT_PRESETS = ("small-5m-ff16", "small-5m-ff64", "small-5m-ff-qkv", "small-5m-ff-qkv-loss")


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


def in_turn(runs: Sequence[Callable[[], object]], repetitions: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of each run, all of them once a round, so that a slow moment of the machine meets all."""
    times: list[list[float]] = [[] for _ in runs]
    for round_number in range(warm_up + repetitions):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if round_number >= warm_up:
                times[index].append(time.perf_counter() - start)
    return times


def spread(seconds: Sequence[float]) -> float:
    """(90th - 10th percentile) / median."""
    deciles = statistics.quantiles(seconds, n=10)
    return (deciles[-1] - deciles[0]) / statistics.median(seconds)


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
    presets: Sequence[str] = DEFAULT_PRESETS,
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
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": [asdict(row) for row in rows.values()],
        "ratios": ratios,
    }


def _at(configs: dict[str, ModelConfig], name: str) -> int:
    return list(configs).index(name)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(result: dict[str, object]) -> None:
    """Prints a table, and as the last line the whole result as JSON."""
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
    print(json.dumps(result))
