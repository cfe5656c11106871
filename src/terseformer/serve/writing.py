"""A text that is being written: its tokens become pieces of text that are certain."""

from __future__ import annotations

from collections.abc import Sequence

from terseformer.engine import finish_reason
from terseformer.serve.delivery import Piece, Token, Trace
from terseformer.serve.job import Job, Prompt
from terseformer.serve.models import ServedModel
from terseformer.serve.scores import score
from terseformer.session import Session
from terseformer.text import TextWriter


class Writing:
    """A text that is being written.

    Args:
        model: writes it.
        job: what it is for.
        prompt: what it goes on from.
        session: has read the prompt, and is this text's own.
        index: of the text among those of the job.
        number: of the text among those of the prompt, each of which has a seed of its own.
    """

    def __init__(self, model: ServedModel, job: Job, prompt: Prompt, session: Session, index: int, number: int) -> None:
        self.job, self.session, self.index, self._engine = job, session, index, model.engine
        self._text = TextWriter(model.tokenizer, prompt.tokens, job.sampling.stop, model.pad_token_id)
        seed = (job.seed + number) % 2**63
        self.writer = model.engine.start(session, [], job.sampling, seed, trace=job.trace)
        self._grammar = job.grammar.copy() if job.grammar is not None else None
        # A grammar is asked before each token; logits are there of the last one alone; and where the tokens' bytes are
        # not known, only the text shows a stop string.
        self.stepwise = (
            self._grammar is not None
            or job.num_top is not None
            or (bool(job.sampling.stop) and model.engine.token_bytes is None)
        )

    def prepare(self) -> None:
        """Tells the writer which tokens may be drawn next, where a grammar says so.

        Raises:
            GenerationError: the grammar cannot go on.
        """
        if self._grammar is not None:
            self.writer.allow(self._grammar.allowed())

    def push(self, tokens: Sequence[int]) -> Piece:
        """The piece of text that has become certain with the tokens that were just drawn.

        Raises:
            GenerationError: the text cannot go on.
        """
        reason = finish_reason(self.writer.finish, self.job.sampling)
        self.session.tokens += tokens
        if self._grammar is not None and reason not in ("eos", "stop"):
            for token in tokens:
                self._grammar.push(token)
            if self._grammar.complete:
                reason = "stop"
        pieces, scored = [], []
        for i, token in enumerate(tokens, 1):
            if self.job.num_top is not None:
                scored.append(self._score(token))
            pieces.append(self._text.push(token, reason if i == len(tokens) else None))
            if self._text.finish_reason is not None:
                break
        finish = self._text.finish_reason or reason
        if finish == "eos":
            finish = "stop"
        trace = Trace(tuple(pieces), self._engine.touched(self.writer)) if self.job.trace else None
        return Piece(self.index, "".join(pieces), tuple(scored), finish, trace)

    def _score(self, token: int) -> Token:
        return score(self.session.logits, token, self.job.num_top or 0)
