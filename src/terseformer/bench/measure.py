"""One model's decoding, timed beside the floors of the machine.

The protocol is the reference's (`decoding_timing_test.py`): batch 1, a source of 16 tokens, greedy, 4 tokens to warm
up, then the time of the following ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from terseformer.accounting import account
from terseformer.bench.floors import FloorMeter, Floors
from terseformer.bench.models import multiply_adds
from terseformer.bench.timing import measured_in_turn, spread
from terseformer.config import ModelConfig, Seq2SeqConfig
from terseformer.engine import Engine
from terseformer.pack import Packed
from terseformer.sampling import SamplingConfig
from terseformer.traffic import bytes_read

SOURCE = 16
WARM_UP = 4
TOKENS = 10
CAPACITY = SOURCE + WARM_UP + TOKENS + 1
"""Positions that the protocol needs."""
REST = 0.3


@dataclass(frozen=True)
class Row:
    """One model by one library; times are medians."""

    group: str
    name: str
    parameters: int
    milliseconds: float
    """Per token."""
    spread: float
    """(90th - 10th percentile) / median."""
    rounds: tuple[float, ...]
    """The milliseconds per token of each round."""
    first_token_milliseconds: float | None = None
    """From the source of 16 tokens to the first token."""
    block_milliseconds: float | None = None
    """Of the milliseconds per token, for each block."""
    megabytes: float | None = None
    """What a token must read, of weights, keys and values."""
    million_multiply_adds: float | None = None
    floor_milliseconds: float | None = None
    """The time that reading or multiplying that takes on this machine at least, measured before each turn."""
    floor_fraction: float | None = None
    """The floor's part of the time, of each turn."""
    resident_gigabytes: float | None = None
    """Memory in use, where that is the question."""


class Decoder:
    """A model by the engine.

    Args:
        packed: its weights.
        threads: of the engine.
    """

    def __init__(self, packed: Packed, threads: int) -> None:
        self.config, self.packed = packed.config, packed
        self.engine = Engine(packed, threads=threads)
        self.first: list[float] = []

    def half(self) -> Decoder:
        """The same with the first half of its blocks."""
        assert isinstance(self.config, ModelConfig)
        config = replace(self.config, num_hidden_layers=self.config.num_hidden_layers // 2)
        return Decoder(replace(self.packed, config=config), self.engine.threads)

    def __call__(self) -> float:
        """Seconds per token."""
        source = [1] * SOURCE
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=WARM_UP + TOKENS)
        start = time.perf_counter()
        if isinstance(self.config, ModelConfig):
            writer = self.engine.start(self.engine.new_session(CAPACITY), source, sampling)
        else:
            session = self.engine.new_session(CAPACITY, source)
            writer = self.engine.start(session, [self.config.pad_token_id], sampling)
        self.engine.write([writer], 1)
        self.first.append(time.perf_counter() - start)
        self.engine.write([writer], WARM_UP - 1)
        start = time.perf_counter()
        (tokens,) = self.engine.write([writer], TOKENS)
        return (time.perf_counter() - start) / len(tokens)


class _Turns:
    """One of our models; before each turn the floors are measured, since a shared machine is not the same for long."""

    def __init__(self, run: Decoder, meter: FloorMeter, rest: float) -> None:
        self.run, self.meter, self.rest = run, meter, rest
        self.floors: list[Floors] = []

    def __call__(self) -> float:
        """Seconds per token."""
        self.floors.append(self.meter())
        time.sleep(self.rest)
        return self.run()


def measure(
    group: str,
    runs: Mapping[str, Decoder | Callable[[], float]],
    repetitions: int,
    meter: FloorMeter,
    with_blocks: bool = False,
    rest: float = REST,
) -> list[Row]:
    """A row for each of some models, which take their turns.

    Args:
        group: what the rows are about.
        runs: by name; others than our own give their seconds per token.
        repetitions: rounds.
        meter: measures the floors.
        with_blocks: measure halves of our models too, and so the time of a block.
        rest: seconds before each turn, in which the threads of the one before it come to rest.
    """
    turns = {name: _Turns(run, meter, rest) if isinstance(run, Decoder) else run for name, run in runs.items()}
    halves = {name: run.half() for name, run in runs.items() if with_blocks and isinstance(run, Decoder)}
    times = measured_in_turn([*turns.values(), *halves.values()], repetitions, rest=rest)
    half_times = dict(zip(halves, times[len(runs) :], strict=True))
    return [
        _our_row(group, name, turn, seconds, half_times.get(name))
        if isinstance(turn, _Turns)
        else Row(group, name, 0, 1e3 * statistics.median(seconds), spread(seconds), _milliseconds(seconds))
        for (name, turn), seconds in zip(turns.items(), times, strict=False)
    ]


def _our_row(group: str, name: str, turns: _Turns, seconds: Sequence[float], half: Sequence[float] | None) -> Row:
    config, run = turns.run.config, turns.run
    num_source = SOURCE if isinstance(config, Seq2SeqConfig) else 0
    context = SOURCE + WARM_UP + TOKENS // 2 - num_source
    num_bytes = bytes_read(config, run.packed.dtype, context, num_source)
    macs = multiply_adds(config, context, num_source)
    floors = [floors.seconds(num_bytes, macs) for floors in turns.floors[-len(seconds) :]]
    block = None
    if half is not None:
        assert isinstance(config, ModelConfig)
        difference = statistics.median(whole - part for whole, part in zip(seconds, half, strict=True))
        block = 1e3 * difference / (config.num_hidden_layers - config.num_hidden_layers // 2)
    return Row(
        group,
        name,
        account(config).parameters,
        1e3 * statistics.median(seconds),
        spread(seconds),
        _milliseconds(seconds),
        first_token_milliseconds=1e3 * statistics.median(run.first),
        block_milliseconds=block,
        megabytes=num_bytes / 1e6,
        million_multiply_adds=macs / 1e6,
        floor_milliseconds=1e3 * statistics.median(floors),
        floor_fraction=statistics.median(floor / taken for floor, taken in zip(floors, seconds, strict=True)),
    )


def _milliseconds(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(1e3 * taken, 4) for taken in seconds)
