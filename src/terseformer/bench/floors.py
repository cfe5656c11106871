"""The two floors of decoding: how fast this machine reads memory, and how fast it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from terseformer import native

_READ_BYTES = 1 << 30
_ROUNDS = 15


@dataclass(frozen=True)
class Floors:
    """Rates of all threads together, the best of some rounds."""

    read_bytes_per_second: float
    """Of one long stream for each thread."""
    record_bytes_per_second: dict[int, float]
    """Of records of so many bytes, in random order."""
    multiply_adds_per_second: float
    """float32, in registers."""

    def seconds(self, num_bytes: int | float, multiply_adds: int | float) -> float:
        """The time that no decoder can beat: the longer of reading and multiplying."""
        return max(num_bytes / self.read_bytes_per_second, multiply_adds / self.multiply_adds_per_second)


def measure_floors(threads: int, record_bytes: tuple[int, ...] = ()) -> Floors:
    """Measures the rates of this machine at this moment.

    Args:
        threads: threads that read and multiply together.
        record_bytes: sizes of records whose rate is measured too, multiples of 64.
    """
    machine = native.Floors(threads)
    data = np.ones(_READ_BYTES // 4, np.float32)
    generator = np.random.default_rng(0)
    records = {}
    for size in record_bytes:
        order = generator.permutation(_READ_BYTES // size).astype(np.int32)
        taken = min(machine.read_records(data, size // 4, order) for _ in range(_ROUNDS))
        records[size] = len(order) * size / taken
    rates = (machine.multiply(10_000_000) for _ in range(_ROUNDS))
    return Floors(
        read_bytes_per_second=data.nbytes / min(machine.read(data) for _ in range(_ROUNDS)),
        record_bytes_per_second=records,
        multiply_adds_per_second=max(count / seconds for seconds, count in rates),
    )
