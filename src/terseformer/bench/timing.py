"""Times that can be compared: all that is compared takes its turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def in_turn(runs: Sequence[Callable[[], object]], repetitions: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of each run, all of them once a round, so that a slow moment of the machine meets all."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return measured_in_turn([lambda run=run: seconds(run) for run in runs], repetitions, warm_up)


def measured_in_turn(
    runs: Sequence[Callable[[], float]], repetitions: int, warm_up: int = 1, rest: float = 0.0
) -> list[list[float]]:
    """What each run says that it took, all of them once a round.

    Args:
        runs: give seconds.
        repetitions: rounds that count.
        warm_up: rounds before them.
        rest: seconds before each run, in which the threads of the one before it come to rest; most libraries' threads
            spin for a while, and would take the cores from the next.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_number in range(warm_up + repetitions):
        for index, run in enumerate(runs):
            time.sleep(rest)
            taken = run()
            if round_number >= warm_up:
                times[index].append(taken)
    return times


def spread(seconds: Sequence[float]) -> float:
    """(90th - 10th percentile) / median."""
    if len(seconds) < 2:
        return 0.0
    deciles = statistics.quantiles(seconds, n=10)
    return (deciles[-1] - deciles[0]) / statistics.median(seconds)
