"""A text that is being written: its tokens become pieces of text that are certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from terseformer.engine import finish_reason
from terseformer.serve.delivery import Piece, Token, Trace
from terseformer.serve.guided import GuidedWriter
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
        self.writer: Any = None
        self.guided: GuidedWriter | None = None
        if job.grammar is not None:
            self.guided = GuidedWriter(model.engine, session, job.sampling, seed, job.grammar.copy())
        else:
            self.writer = model.engine.start(session, [], job.sampling, seed, trace=job.trace)
        # Logits are there of the last token alone; and where the tokens' bytes are not known, only the text shows a
        # stop string.
        self.stepwise = job.num_top is not None or (bool(job.sampling.stop) and model.engine.token_bytes is None)

    @property
    def finish(self) -> str:
        """What ends the text after the tokens that were drawn, if something does."""
        return self.guided.finish if self.guided else self.writer.finish

    def step(self) -> list[int]:
        """Draws the next token of a text that a grammar guides.

        Raises:
            GenerationError: the text cannot go on.
        """
        assert self.guided is not None
        return self.guided.step()

    def push(self, tokens: Sequence[int]) -> Piece:
        """The piece of text that has become certain with the tokens that were just drawn.

        Raises:
            GenerationError: the text cannot go on.
        """
        reason = finish_reason(self.finish, self.job.sampling)
        if self.guided is None:  # which counts a token when it is read
            self.session.tokens += tokens
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
