"""How single tokens are shown, each so that no two look alike."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


class Vocabulary:
    """A model's tokens by their ids.

    Args:
        tokenizer: the model's.
        token_bytes: the bytes that each token adds to a text, special ones none; None where they depend on the tokens
            around.
        size: of the model's vocabulary; the tokenizer may know fewer.
    """

    def __init__(self, tokenizer: Tokenizer, token_bytes: Sequence[bytes] | None, size: int) -> None:
        self._tokenizer, self._bytes, self._size = tokenizer, token_bytes, size

    def name(self, token: int) -> str:
        """A token as a string: its text; its bytes where they are no text; a special token's name."""
        letters = self._tokenizer.id_to_token(token)
        if letters is None:
            return f"<token {token}>"  # the model has more tokens than the tokenizer
        if self._bytes is None:
            return letters.replace("▁", " ")
        if not self._bytes[token]:
            return letters
        try:
            return self._bytes[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._bytes[token])

    def bytes_of(self, token: int) -> list[int]:
        """A token's bytes, as far as they are known."""
        return list(self.name(token).encode() if self._bytes is None else self._bytes[token])

    def width(self, token: int) -> int:
        """Characters that begin in a token; in a text, these of all tokens before one are its offset."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token))
