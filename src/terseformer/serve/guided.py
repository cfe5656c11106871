"""Text that a grammar allows, token by token: JSON by a schema.

llguidance says after each token which may come next; the others' logits become minus infinity before the draw. The
draw is the engine's own, from the same seed, so that a text is what it would be without the grammar where that allows
it. The text is read and drawn one token at a time, beside those that are written together.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
from tokenizers import Tokenizer

from terseformer.engine import Engine
from terseformer.sampling import GenerationError, SamplingConfig
from terseformer.session import Session

ANY_OBJECT = {"type": "object"}
_OPTIONS = {"whitespace_flexible": False}  # else a text may go on with blanks for ever


class Grammar:
    """A grammar between two tokens of a text."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def copy(self) -> Grammar:
        """The same for another text."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    @property
    def complete(self) -> bool:
        """Whether no token may follow but the end of the text."""
        return self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little").astype(bool)
        return np.pad(mask, (0, self._vocab_size - len(mask)))

    def push(self, token: int) -> None:
        """Goes on after a token that is allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(f"the schema cannot be followed any further: {self._matcher.get_error()}")


class Grammars:
    """Makes grammars for one model's tokens.

    Raises:
        GenerationError: the tokenizer has no end-of-text token, without which a text cannot be ended, or is of a kind
            that llguidance does not know.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: list[int]) -> None:
        if not stop_ids:
            raise GenerationError("the model has no end-of-text token, without which no schema can be followed")
        self._vocab_size = vocab_size
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=stop_ids[0])
        except ValueError as error:
            raise GenerationError(f"no schema can be followed with the model's tokenizer: {error}") from None

    def of_schema(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of JSON that a schema describes, without blanks between its parts.

        Raises:
            GenerationError: the schema is invalid, or asks for what cannot be done.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"the JSON schema cannot be used: {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GenerationError(f"the JSON schema cannot be used: {matcher.get_error()}")
        return Grammar(matcher, self._vocab_size)


class GuidedWriter:
    """Writes a text by a grammar; has what a native writer has, and one step for each token.

    Args:
        engine: of the model.
        session: has read the prompt.
        sampling: how tokens are drawn.
        seed: of the draws.
        grammar: this text's own.
    """

    def __init__(self, engine: Engine, session: Session, sampling: SamplingConfig, seed: int, grammar: Grammar) -> None:
        self._engine, self._session, self._sampling, self._grammar = engine, session, sampling, grammar
        self._sampler = engine.sampler(session, sampling, seed)
        self._left = sampling.max_new_tokens
        self._drawn: int | None = None  # and not yet read
        self.finish = "eos" if grammar.complete else ""

    def step(self) -> list[int]:
        """Draws the next token, unless the text has come to its end.

        Raises:
            GenerationError: the logits are not finite, or the grammar cannot go on.
        """
        if self.finish:
            return []
        if self._drawn is not None:
            self._engine.read(self._session, [self._drawn])
        logits = self._session.logits
        if not np.isfinite(logits.max()):
            self.finish = "not_finite"
            return []
        allowed = self._grammar.allowed()
        if not allowed.any():
            raise GenerationError("the schema cannot be followed any further: no token of the model's is allowed")
        logits[~allowed] = -np.inf
        token = self._sampler.next(logits)
        if token < 0:
            self.finish = "repeats"
            return []
        self._sampler.see(token)
        self._drawn = token
        self._left -= 1
        if token in self._engine.stop_ids:
            self.finish = "eos"
            return [token]
        self._grammar.push(token)
        if self._grammar.complete:
            self.finish = "stop"
        elif not self._left or self._session.length + 1 >= self._session.capacity + bool(self._session.source):
            self.finish = "length"
        return [token]
