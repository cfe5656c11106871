"""The tokenizer: byte-level BPE trained here, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from terseformer.config import ConfigError
from terseformer.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<end_of_text>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<EOS>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
)
_MIN_VOCAB_SIZE = 257


def sentinel(number: int) -> str:
    """The name of the token that stands for a span of a text, from 0; T5's."""
    return f"<extra_id_{number}>"


def train_tokenizer(documents: Iterable[str], vocab_size: int, num_sentinels: int = 0) -> Tokenizer:
    """Trains a byte-level BPE; every text can be encoded and comes back unchanged.

    Token 0 is `<|endoftext|>`, sentinels follow. The same documents give the same tokenizer. A small corpus may give
    fewer than `vocab_size` tokens.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes, the end of text and the sentinels.
    """
    if vocab_size < _MIN_VOCAB_SIZE + num_sentinels:
        sentinels = f" and {num_sentinels} sentinels" if num_sentinels else ""
        raise ConfigError(
            f"data.vocab_size must be at least {_MIN_VOCAB_SIZE + num_sentinels} (256 bytes and {END_OF_TEXT}"
            f"{sentinels}), not {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *map(sentinel, range(num_sentinels))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a `tokenizer.json`, or the one in a folder, without the truncation and padding that it may prescribe.

    Raises:
        DataError: there is no such file, or it is no tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder, path = path, path / "tokenizer.json"
        if not path.exists():
            raise DataError(f"{folder} has no tokenizer.json; put the one there that the model was trained with")
    if not path.is_file():
        raise DataError(f"there is no tokenizer {str(path)!r}; check the path in data.tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{str(path)!r} is no tokenizer.json of the library tokenizers: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document, under any of its common names.

    Raises:
        DataError: the tokenizer has none of them.
    """
    for name in _END_OF_TEXT_NAMES:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise DataError(f"the tokenizer has no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)} to it")


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """The size of a table with a row for each token id: the largest id + 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON, without truncation and padding."""
    parts = json.loads(tokenizer.to_str())
    parts.pop("truncation", None)
    parts.pop("padding", None)
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
