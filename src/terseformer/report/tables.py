"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from terseformer.accounting import account
from terseformer.config import ModelConfig
from terseformer.info import short
from terseformer.layout import AnyConfig
from terseformer.machine import processor
from terseformer.report.runs import Run
from terseformer.report.speed import Decoding
from terseformer.training_log import duration


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with a heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: Sequence[str] = ()
    """Columns of words, which may be broken; the others hold numbers."""


def models_table(runs: Sequence[Run]) -> Table:
    """What the models store, read and compute."""
    rows = []
    for run in runs:
        costs = account(run.config)
        read = costs.total.parameters_read
        rows.append(
            [
                run.name,
                describe(run.config),
                f"{costs.parameters:,}",
                f"{read:,}",
                f"{read / costs.parameters:.1%}",
                f"{costs.bytes_per_token(4) / 1e6:,.2f} MB",
                short(costs.flops_per_token),
            ]
        )
    columns = ("model", "parameters", "read per token", "share", "float32 bytes per token", "FLOPs per token")
    return Table("What each model stores, reads and computes", ("run", *columns), rows, prose=("model",))


def describe(config: AnyConfig) -> str:
    """A model in a line: its layers, and of which kind they are."""
    if isinstance(config, ModelConfig):
        depth = f"{config.num_hidden_layers}"
    else:
        depth = f"{config.num_encoder_layers} + {config.num_decoder_layers}"
    feed_forward = config.feed_forward
    size = getattr(feed_forward, "ff_block_size", None) or getattr(feed_forward, "num_experts", None)
    parts = (
        f"{config.kind}, {depth} layers of width {config.hidden_size}",
        f"feed-forward {feed_forward.kind}{f' (1 in {size})' if size else ''}",
        f"attention {config.attention.kind}",
        f"head {config.head.kind}",
    )
    return "; ".join(parts).replace("_", " ")


def quality_table(runs: Sequence[Run]) -> Table:
    """The last validations, beside the first run's where the text and what was taken of it are the same."""
    first = runs[0]
    rows = []
    for run in runs:
        points = run.curve("validation/loss")
        step, loss = points[-1] if points else (None, None)
        base, comparable = first.last("validation/loss"), run.validated_on()
        can_compare = run is not first and loss and base and comparable and comparable == first.validated_on()
        rows.append(
            [
                run.name,
                number(step, ","),
                _validated_on(run),
                number(loss, ".4f"),
                *([f"{loss / base - 1:+.1%}" if can_compare else ""] if len(runs) > 1 else []),
                number(run.last("validation/perplexity"), ",.2f"),
                number(run.last("validation/bits_per_byte"), ".4f"),
            ]
        )
    against = [f"against {first.name}"] if len(runs) > 1 else []
    columns = ("run", "after step", "validated on", "loss, nats per token", *against, "perplexity", "bits per byte")
    return Table("The last validation of each run", columns, rows)


def _validated_on(run: Run) -> str:
    if not run.curve("validation/loss"):
        return "not validated yet" if run.log else "no log of its training"
    limit = run.recipe.train.evaluate_sequences if run.recipe else 0
    return f"{limit:,} sequences" if limit and not run.is_done() else "the whole validation text"


def training_table(runs: Sequence[Run]) -> Table:
    """How long training took, by its log."""
    rows = []
    for run in runs:
        points, machines = run.curve("train/loss"), run.machines()
        seconds, taken = run.step_seconds(), run.last("train/seconds")
        steps = f"{points[-1][0]:,}" if points else ""
        rows.append(
            [
                run.name,
                f"{steps} of {run.recipe.train.steps:,}" if steps and run.recipe else steps,
                "" if seconds is None else f"{1e3 * seconds:,.1f} ms",
                number(run.last("train/tokens_per_second"), ",.0f"),
                "" if taken is None else duration(taken),
                str(machines[0].get("date", "")).replace("T", " ").replace("+00:00", " UTC") if machines else "",
                "; then ".join(dict.fromkeys(map(_machine, machines))),
            ]
        )
    columns = ("run", "steps", "time of a step", "tokens a second", "all steps", "began", "on")
    return Table("Training, by PyTorch", columns, rows, prose=("on",))


def _machine(machine: dict[str, Any]) -> str:
    """What a training's log says of a machine."""
    processes, source = machine.get("processes", 1), machine.get("commit")
    return (
        f"{machine.get('processor')}, {f'{processes} processes of ' if processes != 1 else ''}"
        f"{machine.get('threads')} threads, PyTorch {machine.get('torch')}, terseformer {machine.get('version')}"
        f"{f' ({source})' if source else ''}"
    )


def decoding_table(decoding: Decoding) -> Table:
    """How fast the engine decodes."""
    rows = [
        [
            f"{name}, {dtype}",
            f"{1e3 / row.milliseconds:,.0f}",
            f"{row.milliseconds:,.3f} ms",
            f"{row.spread:.0%}",
            number(row.first_token_milliseconds, ",.2f", " ms"),
            number(row.megabytes, ",.2f", " MB"),
            number(row.floor_milliseconds, ",.3f", " ms"),
            number(row.floor_fraction, ".0%"),
        ]
        for name, dtype, row in decoding.rows
    ]
    columns = ("tokens a second", "per token", "spread", "first token", "reads per token", "floor", "reached")
    return Table("Decoding, by the engine", ("run, weights", *columns), rows)


def decoded_on(decoding: Decoding) -> str:
    """How and on what that was measured."""
    floors = decoding.floors
    return (
        f"Measured when this report was made: batch 1, greedy, after a source of 16 tokens, medians; {processor()}, "
        f"{decoding.isa}, {decoding.threads} threads, which read {floors.read_bytes_per_second / 1e9:.1f} GB/s and do "
        f"{floors.multiply_adds_per_second / 1e9:.0f} G multiply-adds/s. The floor is the longer of the times that "
        "reading and multiplying take at least. Small models stay in the cache and may beat it."
    )


def number(value: int | float | None, form: str, unit: str = "") -> str:
    """A number that may be missing."""
    return "" if value is None else f"{value:{form}}{unit}"
