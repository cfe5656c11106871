"""Reading a prompt, a piece at a time, from where the prefix cache knows it."""

from __future__ import annotations

from terseformer.engine import MAX_ROWS
from terseformer.serve.cache import PrefixCache
from terseformer.serve.delivery import Token
from terseformer.serve.job import Job, Prompt
from terseformer.serve.models import ServedModel
from terseformer.serve.scores import score
from terseformer.session import Session

_PIECE_SECONDS = 0.02
"""For how long a source is read before others have their turn."""


class Prefill:
    """Reads one prompt into a session, between the steps of other texts.

    Args:
        model: reads it.
        cache: where it looks, and leaves snapshots; None: nowhere.
        job: what it is for.
        prompt: what is read.
    """

    def __init__(self, model: ServedModel, cache: PrefixCache | None, job: Job, prompt: Prompt) -> None:
        self._model, self._job, self._prompt = model, job, prompt
        # A source cannot be cut; and a prompt that is scored must be read whole.
        self._cache = cache if model.pad_token_id is None else None
        self._find = not job.scored
        self._session: Session | None = None
        self._places: list[int] = []

    def step(self) -> bool:
        """Reads the next piece; whether all has been read, into the prompt's session then.

        Raises:
            GenerationError: the prompt does not fit the model.
        """
        if self._session is None:
            self._session = self._begin()
        session, tokens = self._session, self._prompt.tokens
        if self._model.pad_token_id is not None:
            if not self._model.engine.read_source(session, _PIECE_SECONDS):
                return False
            self._model.engine.read(session, [self._model.pad_token_id])
        elif session.length < len(tokens):
            self._read(session, min(self._places[0], session.length + MAX_ROWS))
            if session.length == self._places[0]:
                self._places.pop(0)
                if self._cache:
                    self._cache.remember(self._model.fingerprint, session, self._job.client.secret)
            if session.length < len(tokens):
                return False
        self._prompt.session = session
        return True

    def _begin(self) -> Session:
        """A session with room for the text, which has read what the cache knows, or waits for its source."""
        engine, prompt, context = self._model.engine, self._prompt, self._model.context
        if self._model.pad_token_id is not None:
            return engine.new_session(min(context, max(1, self._job.max_tokens)), prompt.tokens, in_pieces=True)
        capacity = min(context, len(prompt.tokens) + self._job.max_tokens)
        parting, snapshot = 0, None
        if self._cache:
            known = (self._model.fingerprint, prompt.tokens, self._job.client.secret)
            parting = self._cache.parting(*known)
            snapshot = self._cache.find(*known) if self._find else None
        session = engine.restore(snapshot, capacity) if snapshot else engine.new_session(capacity)
        prompt.cached = session.length
        places = {parting, *prompt.marks, len(prompt.tokens)}
        self._places = sorted(place for place in places if session.length < place <= len(prompt.tokens))
        if self._job.scored:
            prompt.scores.append(Token(prompt.tokens[0], None, ()))
        return session

    def _read(self, session: Session, end: int) -> None:
        tokens = self._prompt.tokens
        piece = tokens[session.length : end]
        if not self._job.scored:
            self._model.engine.read(session, piece)
            return
        begin = session.length
        logits = self._model.engine.logits(piece, session)
        for row, place in zip(logits, range(begin + 1, min(end + 1, len(tokens))), strict=False):
            self._prompt.scores.append(score(row, tokens[place], self._job.num_top or 0))
