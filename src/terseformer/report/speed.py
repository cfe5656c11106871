"""How fast the engine decodes the models of a report, beside the floors of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from terseformer import native
from terseformer.bench.floors import FloorMeter, Floors
from terseformer.bench.measure import CAPACITY, Decoder, Row, measure
from terseformer.bench.parity import check_parity
from terseformer.errors import UserError
from terseformer.layout import Dtype
from terseformer.pack import load_packed, pack
from terseformer.report.runs import Run
from terseformer.threads import default_threads

_DTYPES: tuple[Dtype, ...] = ("f32", "int8")
_REPETITIONS = 9
_REST = 0.01  # the engine's threads spin for a millisecond


@dataclass(frozen=True)
class Decoding:
    """What was measured."""

    isa: str
    threads: int
    floors: Floors
    rows: list[tuple[str, Dtype, Row]]
    """Of each run, by its name, and type of weights."""
    left_out: list[str]
    """Why a run has no row: a sentence each."""


def measure_decoding(runs: Sequence[Run]) -> Decoding:
    """Times the engine with all runs in turn; takes some seconds, and packs what is not packed yet.

    Raises:
        ParityError: the engine's results are wrong.
    """
    threads = default_threads()
    check_parity(threads)
    decoders: dict[tuple[str, Dtype], Decoder] = {}
    left_out = []
    for run in runs:
        try:
            decoders |= {(run.name, dtype): _decoder(run, dtype, threads) for dtype in _DTYPES}
        except UserError as error:
            left_out.append(f"{run.name} is not timed: {error}.")
    meter = FloorMeter(threads)
    rows = measure("report", {" ".join(key): one for key, one in decoders.items()}, _REPETITIONS, meter, rest=_REST)
    named = [(*key, row) for key, row in zip(decoders, rows, strict=True)]
    return Decoding(native.isa(), threads, meter.floors, named, left_out)


def _decoder(run: Run, dtype: Dtype, threads: int) -> Decoder:
    limit = run.config.max_position_embeddings
    if limit < CAPACITY:
        raise UserError(f"that needs {CAPACITY} positions, and the model has {limit} (max_position_embeddings)")
    return Decoder(load_packed(pack(run.checkpoint, dtype)), threads)
