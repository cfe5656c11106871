"""Text that a grammar allows, token by token: JSON by a schema.

llguidance says after each token which may come next, and the engine draws of these. It draws from the same seed as it
would without a grammar, so that the text is the same where the grammar allows it.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
from tokenizers import Tokenizer

from terseformer.sampling import GenerationError

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
        """Which tokens may follow, bool [V].

        Raises:
            GenerationError: there is none.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little").astype(bool)
        if not mask.any():
            raise GenerationError("the schema cannot be followed any further: no token of the model's is allowed")
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
