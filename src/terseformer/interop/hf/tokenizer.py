"""The tokenizer of a checkpoint folder, with names for its special tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from terseformer.interop.hf.config import TerseformerConfig
from terseformer.text import end_of_text_ids


class TerseformerTokenizer(PreTrainedTokenizerFast):
    """What `AutoTokenizer` asks for a folder's tokenizer; what it gives is a plain `PreTrainedTokenizerFast`.

    A folder of this package has no `tokenizer_config.json`, which would say what is known otherwise: the token that
    ends a text has one of the common names, an encoder-decoder's configuration has the padding token, and the longest
    text is as long as the model's positions reach. A language model's texts are padded with the token that ends them.
    """

    @classmethod
    def from_pretrained(  # pyrefly: ignore[bad-override]
        cls, name: Any, *args: Any, **kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """The tokenizer of a folder or of a repository; what it is told otherwise by keyword stays."""
        config = TerseformerConfig.from_pretrained(name, **kwargs)
        known: dict[str, Any] = {
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, *args, **(known | kwargs))
        ends = tokenizer.convert_ids_to_tokens(end_of_text_ids(tokenizer.backend_tokenizer))
        if ends and tokenizer.eos_token is None:
            tokenizer.eos_token = ends[0]
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            pad = getattr(config, "pad_token_id", None)
            tokenizer.pad_token = tokenizer.eos_token if pad is None else tokenizer.convert_ids_to_tokens(pad)
        return tokenizer
