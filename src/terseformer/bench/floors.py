"""The two floors of decoding: how fast this machine reads memory, and how fast it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from terseformer import native

_READ_BYTES = 1 << 30


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
    """Measures the rates of this machine, the best of all rounds; neighbours on a shared machine come and go.

    Args:
        threads: threads that read and multiply together.
        record_bytes: sizes of records whose rate is measured too, multiples of 64.
    """

    def __init__(self, threads: int, record_bytes: tuple[int, ...] = ()) -> None:
        self._machine = native.Floors(threads)
        self._data = np.ones(_READ_BYTES // 4, np.float32)
        generator = np.random.default_rng(0)
        self._orders = {n: generator.permutation(_READ_BYTES // n).astype(np.int32) for n in record_bytes}
        self._read, self._multiply = 0.0, 0.0
        self._records = dict.fromkeys(record_bytes, 0.0)

    def __call__(self) -> float:
        """Measures once more; gives the seconds that it took to read."""
        seconds = self._machine.read(self._data)
        self._read = max(self._read, self._data.nbytes / seconds)
        for size, order in self._orders.items():
            taken = self._machine.read_records(self._data, size // 4, order)
            self._records[size] = max(self._records[size], len(order) * size / taken)
        taken, count = self._machine.multiply(10_000_000)
        self._multiply = max(self._multiply, count / taken)
        return seconds

    @property
    def floors(self) -> Floors:
        """The best so far."""
        return Floors(self._read, self._records, self._multiply)
