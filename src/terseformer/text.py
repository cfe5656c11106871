"""Text that grows token by token: what is certain of it, where it stops, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from terseformer.data import DataError, end_of_text_id
from terseformer.sampling import GenerationError

FinishReason = Literal["stop", "length", "eos"]
"""`stop`: a stop string; `length`: enough tokens, or the context is full; `eos`: the end-of-text token."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    text: str
    """The text, without end-of-text token and stop string."""
    token_ids: list[int]
    """All tokens drawn, those of the end-of-text or stop string included."""
    prompt_tokens: int
    """Tokens read before the first was drawn."""
    finish_reason: FinishReason


def end_of_text_ids(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a document, or none."""
    try:
        return [end_of_text_id(tokenizer)]
    except DataError:
        return []


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes] | None:
    """The bytes that each token adds to a text, special ones none; None where they depend on the tokens around.

    They do not in a byte-level vocabulary, whose tokens are written with a printable character for each byte.
    """
    if (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type") != "ByteLevel":
        return None
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]  # GPT-2's table
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    added = tokenizer.get_added_tokens_decoder()
    pieces = []
    for token in range(vocab_size):
        if token in added:
            pieces.append(b"" if added[token].special else added[token].content.encode())
        else:
            letters = tokenizer.id_to_token(token) or ""
            if not set(letters) <= byte_of.keys():
                return None
            pieces.append(bytes(byte_of[letter] for letter in letters))
    return pieces


def source_ids(tokenizer: Tokenizer, text: str, pad_token_id: int) -> list[int]:
    """A text as an encoder-decoder reads it: with the end-of-text token behind it, if that is not the padding."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids + [end for end in end_of_text_ids(tokenizer) if end != pad_token_id]


def prompt_ids(tokenizer: Tokenizer, text: str, pad_token_id: int | None = None) -> list[int]:
    """A text as a model reads it: a prompt, which starts from the end-of-text token if it is empty, or a source.

    Args:
        tokenizer: the model's.
        text: the prompt or source.
        pad_token_id: of an encoder-decoder, which makes it a source.
    """
    if pad_token_id is not None:
        return source_ids(tokenizer, text, pad_token_id)
    return tokenizer.encode(text, add_special_tokens=False).ids or end_of_text_ids(tokenizer)


def check_source(source: Sequence[int], limit: int, vocab_size: int) -> None:
    """Raises GenerationError where a source is empty, has more than `limit` tokens or one that the model lacks."""
    if not source:
        raise GenerationError("the source has no tokens; give some text")
    if len(source) > limit:
        raise GenerationError(
            f"the source has {len(source)} tokens, more than fit in the model's context of {limit} "
            f"(max_position_embeddings); shorten it to {limit} or fewer"
        )
    for token in source:
        check_token("source", token, vocab_size)


def check_token(name: str, token: int, vocab_size: int) -> None:
    """Raises GenerationError where something has a token that the model lacks."""
    if not 0 <= token < vocab_size:
        raise GenerationError(
            f"the {name} has the token {token}, but the model knows 0 to {vocab_size - 1} (vocab_size); "
            "use the tokenizer that the model was trained with"
        )


class TextWriter:
    """A prompt and the text that grows after it, or a source and its target.

    Args:
        tokenizer: of both.
        prompt: the text that is read, or its tokens.
        stops: strings before which the new text ends.
        pad_token_id: of an encoder-decoder, which makes the prompt a source.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        stops: Sequence[str],
        pad_token_id: int | None = None,
    ) -> None:
        self.prompt = prompt_ids(tokenizer, prompt, pad_token_id) if isinstance(prompt, str) else list(prompt)
        self.finish_reason: FinishReason | None = None
        self._token_ids: list[int] = []
        self._text = ""
        self._detokenizer = Detokenizer(tokenizer, self.prompt if pad_token_id is None else ())
        self._stops = StopStrings(stops)

    def push(self, token: int, reason: FinishReason | None) -> str:
        """The text that has become certain with this token, which has a reason if it is the last one."""
        self._token_ids.append(token)
        self.finish_reason = reason
        piece = "" if reason == "eos" else self._detokenizer.push(token)
        if reason is not None:
            piece += self._detokenizer.flush()
        piece = self._stops.push(piece)
        if self._stops.found:
            self.finish_reason = "stop"
        elif reason is not None:
            piece += self._stops.flush()
        self._text += piece
        return piece

    def result(self) -> Generation:
        """What was written; the text has come to its end."""
        assert self.finish_reason is not None
        return Generation(self._text, self._token_ids, len(self.prompt), self.finish_reason)


class Detokenizer:
    """Text from tokens that come one at a time; the pieces together are the text of all tokens.

    A piece comes as soon as it ends with a whole character. Special tokens have no text.

    Args:
        tokenizer: any; the claim is exact for byte-level ones.
        context: tokens before the first, whose last ones tell whether a word begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-4:])
        self._num_known, self._known = len(self._ids), len(tokenizer.decode(self._ids))

    def _settle(self, text: str) -> str:
        """Gives what is new in the text of the tokens held; these are then the context of the next."""
        piece = text[self._known :]
        self._ids = self._ids[self._num_known :]
        self._num_known, self._known = len(self._ids), len(self._tokenizer.decode(self._ids))
        return piece

    def push(self, token: int) -> str:
        """The text that is certain after this token, often none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if len(text) <= self._known or text.endswith("\ufffd"):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What was held back."""
        return self._settle(self._tokenizer.decode(self._ids))


class StopStrings:
    """Cuts text that comes in pieces before the stop string that is complete first, however it is divided.

    Of two that end together the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is surely no part of a stop string."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(begun, default=0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text
