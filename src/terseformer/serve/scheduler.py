"""The one thread that owns the engines, and what the event loop may ask of it.

In each round, every model's lane lets new texts join, reads a piece of one prompt, and writes on for some 20 ms: so a
long prompt delays the others' tokens by a piece, and a text that has come to its end makes room at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from terseformer.serve.cache import PrefixCache
from terseformer.serve.errors import ApiError, internal_error, shutting_down
from terseformer.serve.job import Job
from terseformer.serve.lane import Lane
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import ServedModel


class Scheduler:
    """Admits jobs and sees to it that they are done.

    Args:
        models: what is served.
        limits: how much.
        cache: the prefix cache; None: there is none.
        metrics: count what is done.
    """

    def __init__(
        self, models: Sequence[ServedModel], limits: Limits, cache: PrefixCache | None, metrics: Metrics
    ) -> None:
        self._limits = limits
        self._lanes = {model.name: Lane(model, limits, cache, metrics, self._started) for model in models}
        self._changed = threading.Condition()
        self._added: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._waiting: set[Job] = set()
        self._closing = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being done."""
        return self._thread.is_alive() and not self._closing

    @property
    def num_waiting(self) -> int:
        """Jobs of which no text has begun."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Lets a job wait for its turn.

        Raises:
            ApiError: too many wait already, or the server is being stopped.
        """
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise shutting_down()
            if len(self._waiting) >= self._limits.max_queue:
                seconds = max(1, len(self._waiting) // self._limits.max_batch)
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again in {seconds} s",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._waiting.add(job)
            self._added.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stops the work for a job; nothing more is delivered. Harmless if it is done."""
        with self._changed:
            job.cancelled = True
            self._waiting.discard(job)
            self._cancelled.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Takes no more jobs; those that there are go on."""
        with self._changed:
            self._closing = True

    def stop(self) -> None:
        """Ends all jobs, with an error each, and the thread."""
        with self._changed:
            self._closing = self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _started(self, job: Job) -> None:
        with self._changed:
            self._waiting.discard(job)

    def _run(self) -> None:
        failure = internal_error()
        try:
            while self._take():
                for lane in self._lanes.values():
                    if lane.busy:
                        lane.round()
            failure = shutting_down()
        finally:
            self._fail_all(failure)

    def _fail_all(self, failure: ApiError) -> None:
        with self._changed:
            self._closing = True
            added, self._added = self._added, deque()
        for job in added:
            self._lanes[job.model].add(job)
        for lane in self._lanes.values():
            lane.fail_all(failure)

    def _take(self) -> bool:
        """Hands new jobs to their lanes, and waits for some where there is nothing to do; False at the end."""
        with self._changed:
            while not (self._stopping or self._added or self._cancelled or self._busy()):
                self._changed.wait()
            added, self._added = self._added, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            stopping = self._stopping
        for job in added:
            self._lanes[job.model].add(job)
        for job in cancelled:
            self._lanes[job.model].remove(job)
        return not stopping

    def _busy(self) -> bool:
        return any(lane.busy for lane in self._lanes.values())
