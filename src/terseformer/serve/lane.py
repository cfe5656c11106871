"""One model's texts: those that wait, those whose prompts are read, and those that are written together."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from terseformer.errors import UserError
from terseformer.serve.cache import PrefixCache
from terseformer.serve.delivery import MAX_PENDING, Piece
from terseformer.serve.errors import ApiError, internal_error
from terseformer.serve.job import Job, Prompt
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import ServedModel
from terseformer.serve.prefill import Prefill
from terseformer.serve.queue import FairQueue
from terseformer.serve.writing import Writing

_ROUND_SECONDS = 0.02
"""For how long texts are written before others may join them."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class _Text:
    """A text that has not begun."""

    job: Job
    prompt: Prompt
    index: int
    number: int
    prefill: Prefill | None = None


class Lane:
    """The texts of one model; the scheduler's thread calls all of it.

    Args:
        model: writes them.
        limits: how many together.
        cache: the prefix cache.
        metrics: count what is done.
        on_start: called when the first text of a job has begun.
    """

    def __init__(
        self,
        model: ServedModel,
        limits: Limits,
        cache: PrefixCache | None,
        metrics: Metrics,
        on_start: Callable[[Job], None],
    ) -> None:
        self._model, self._limits, self._cache, self._metrics = model, limits, cache, metrics
        self._on_start = on_start
        self._waiting: FairQueue[_Text] = FairQueue()
        self._reading: deque[_Text] = deque()
        self._writing: list[Writing] = []
        metrics.running.labels(model.name).set_function(lambda: len(self._reading) + len(self._writing))

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._reading or self._writing)

    def add(self, job: Job) -> None:
        """Lets a job's texts wait for their turn."""
        for i, prompt in enumerate(job.prompts):
            for number in range(job.num_texts):
                self._waiting.push(job.client.name, _Text(job, prompt, i * job.num_texts + number, number))

    def remove(self, job: Job) -> None:
        """Drops a job that was cancelled or has failed."""
        job.cancelled = True
        self._waiting.remove(lambda text: text.job is job)
        self._reading = deque(text for text in self._reading if text.job is not job)
        self._writing = [text for text in self._writing if text.job is not job]

    def round(self) -> None:
        """Lets new texts join, reads a piece of one prompt, and goes on with all that are written."""
        self._admit()
        if text := self._next_to_read():
            self._guard([text.job], lambda text=text: self._read(text))
        for text in [text for text in self._reading if text.prompt.session is not None]:
            if not text.job.cancelled:  # with another text of its own in this round
                self._guard([text.job], lambda text=text: self._begin(text))
        if self._writing:
            self._write()

    def fail_all(self, error: ApiError) -> None:
        """Ends everything."""
        jobs = {text.job for text in self._waiting.remove(lambda _: True)}
        jobs |= {text.job for text in (*self._reading, *self._writing)}
        for job in jobs:
            self._fail(job, error)

    def _admit(self) -> None:
        while self._waiting and len(self._reading) + len(self._writing) < self._limits.max_batch:
            text = self._waiting.pop()
            if not text.job.started:
                text.job.started = True
                self._on_start(text.job)
            self._reading.append(text)

    def _next_to_read(self) -> _Text | None:
        """Whose turn it is to read a piece of its prompt: they take turns, so that a short one soon is done."""
        for _ in range(len(self._reading)):
            text = self._reading[0]
            self._reading.rotate(-1)
            if text.prefill is not None or not text.prompt.being_read:  # for another text
                return text
        return None

    def _read(self, text: _Text) -> None:
        """Reads a piece of a prompt."""
        prompt = text.prompt
        if text.prefill is None:
            prompt.being_read = True
            text.prefill = Prefill(self._model, self._cache, text.job, prompt)
        if text.prefill.step():
            self._metrics.read(self._model.name, len(prompt.tokens), prompt.cached)

    def _begin(self, text: _Text) -> None:
        """Lets a text whose prompt has been read be written."""
        job, prompt = text.job, text.prompt
        assert prompt.session is not None
        self._reading.remove(text)
        prompt.texts_left -= 1
        session = prompt.session.fork() if prompt.texts_left else prompt.session
        if not prompt.texts_left:
            prompt.session = None  # the last text's own
        if job.echo:
            self._deliver(job, Piece(text.index, prompt.text, tuple(prompt.scores)))
        if job.max_tokens:
            self._writing.append(Writing(self._model, job, prompt, session, text.index, text.number))
        else:
            self._deliver(job, Piece(text.index, "", (), "length"))
            self._end(job)

    def _write(self) -> None:
        """Goes on with all texts; by a step where one of them is to be looked at after every token."""
        for text in list(self._writing):
            self._guard([text.job], text.prepare)
        texts = list(self._writing)  # of jobs that go on
        steps = 1 if any(text.stepwise for text in texts) else None

        def write() -> list[list[int]]:
            return self._model.engine.write([text.writer for text in texts], steps, _ROUND_SECONDS)

        written = self._guard([text.job for text in texts], write) or []
        for text, tokens in zip(texts, written, strict=False):
            self._guard([text.job], lambda text=text, tokens=tokens: self._advance(text, tokens))

    def _advance(self, text: Writing, tokens: Sequence[int]) -> None:
        """Sends what has become certain of a text, and ends it where it has come to its end."""
        job = text.job
        if job.cancelled:  # another of its texts has failed in this round
            return
        if tokens:
            if job.first_token is None:
                job.first_token = time.monotonic()
                self._metrics.first_token.labels(self._model.name).observe(job.first_token - job.arrived)
            job.completion_tokens += len(tokens)
            self._metrics.wrote(self._model, len(tokens))
        piece = text.push(tokens)
        if piece.text or piece.tokens or piece.finish or piece.trace:
            self._deliver(job, piece)
        if piece.finish:
            self._writing.remove(text)
            if self._cache and self._model.pad_token_id is None:
                self._cache.remember(self._model.fingerprint, text.session, job.client.secret)
            self._end(job)

    def _deliver(self, job: Job, piece: Piece) -> None:
        if job.delivery.pending > MAX_PENDING:
            raise ApiError(503, "the client reads more slowly than the text is written", code="slow_client")
        job.delivery.put(piece)

    def _end(self, job: Job) -> None:
        """Counts a text that has come to its end; with the last one, the job has."""
        job.texts_left -= 1
        if not job.texts_left:
            self._metrics.finished(self._model.name, job)
            job.delivery.put(job.usage())

    def _fail(self, job: Job, error: ApiError) -> None:
        self.remove(job)
        job.delivery.put(error)

    def _guard(self, jobs: Sequence[Job], work: Callable[[], T]) -> T | None:
        """Does some work; what goes wrong fails the jobs that it is for, and no others."""
        try:
            return work()
        except ApiError as error:
            failure = error
        except UserError as error:
            failure = ApiError(400, str(error))
        except BaseException:  # a Rust library's panic is no Exception
            _log.exception("a text could not be written")
            failure = internal_error()
        for job in jobs:
            self._fail(job, failure)
        return None
