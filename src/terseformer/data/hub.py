"""Text from a Hugging Face data set, streamed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from terseformer.config import ConfigError
from terseformer.data.documents import Row
from terseformer.data.errors import DataError

_SPELLING = re.compile(
    r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[^/:\[\]]+))?(:(?P<split>[\w.-]+)(\[:(?P<rows>\d+)\])?)?"
)


@dataclass(frozen=True)
class HubSource:
    """`hf:NAME`, `hf:OWNER/NAME` or `hf:OWNER/NAME/CONFIG`, then nothing (`train`), `:SPLIT` or `:SPLIT[:ROWS]`.

    A data set that has a configuration is spelled with its owner: two names are always OWNER/NAME.
    """

    name: str
    config: str | None
    split: str
    rows: int | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Reads the spelling. Raises ConfigError."""
        match = _SPELLING.fullmatch(source)
        if match is None:
            raise ConfigError(
                f"data.sources: {source!r} must be spelled hf:OWNER/NAME[/CONFIG][:SPLIT], "
                "where SPLIT[:ROWS] takes the first rows only"
            )
        rows = match["rows"]
        return cls(match["name"], match["config"], match["split"] or "train", int(rows) if rows else None)


def hub_rows(source: str) -> Iterator[Row]:
    """The rows of a data set in its own order; the library `datasets` streams them and runs no remote code.

    Raises:
        ConfigError: the source is misspelled.
        DataError: `datasets` is missing, or the hub, the data set, its configuration or its split cannot be reached.
    """
    wanted = HubSource.parse(source)
    try:
        import datasets
    except ImportError:
        raise DataError("an hf: source needs the package datasets; run pip install datasets") from None
    try:
        rows = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        for number, row in enumerate(itertools.islice(rows, wanted.rows), start=1):
            yield f"{source} row {number}", row
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{source} cannot be read: {reason}; check the names in data.sources and the network"
        ) from error
