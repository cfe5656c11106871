"""The two floors of decoding: how fast this machine reads memory, and how fast it multiplies."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from terseformer import native
from terseformer.bench.timing import spread

_READ_BYTES = 1 << 29


@dataclass(frozen=True)
class Floors:
    """Rates of all threads together."""

    read_bytes_per_second: float
    """Of one long stream for each thread."""
    record_bytes_per_second: dict[int, float]
    """Of records of so many bytes, in random order."""
    multiply_adds_per_second: float
    """float32, in registers."""

    def seconds(self, num_bytes: int | float, multiply_adds: int | float) -> float:
        """The time that no decoder can beat: the longer of reading and multiplying."""
        return max(num_bytes / self.read_bytes_per_second, multiply_adds / self.multiply_adds_per_second)


class FloorMeter:
    """Measures the rates of this machine.

    Args:
        threads: threads that read and multiply together.
        record_bytes: sizes of records whose rate is measured too, multiples of 64.
    """

    def __init__(self, threads: int, record_bytes: tuple[int, ...] = ()) -> None:
        self._machine = native.Floors(threads)
        self._data = np.ones(_READ_BYTES // 4, np.float32)
        generator = np.random.default_rng(0)
        self._orders = {n: generator.permutation(_READ_BYTES // n).astype(np.int32) for n in record_bytes}
        self._readings: list[Floors] = []

    def __call__(self) -> Floors:
        """Measures once."""
        read = self._data.nbytes / self._machine.read(self._data)
        records = {
            size: len(order) * size / self._machine.read_records(self._data, size // 4, order)
            for size, order in self._orders.items()
        }
        seconds, count = self._machine.multiply(10_000_000)
        self._readings.append(Floors(read, records, count / seconds))
        return self._readings[-1]

    @property
    def floors(self) -> Floors:
        """The medians so far."""
        median, readings = statistics.median, self._readings
        return Floors(
            median(reading.read_bytes_per_second for reading in readings),
            {size: median(reading.record_bytes_per_second[size] for reading in readings) for size in self._orders},
            median(reading.multiply_adds_per_second for reading in readings),
        )

    @property
    def read_spread(self) -> float:
        """(90th - 10th percentile) / median of the rate of reading: how restless the machine is."""
        return spread([reading.read_bytes_per_second for reading in self._readings])
