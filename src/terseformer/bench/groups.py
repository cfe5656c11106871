"""Groups of models that are measured together."""

from typing import Literal, get_args

Group = Literal[
    "800m",
    "0.8b",
    "tiny",
    "summarize",
    "terraformer",
    "sources",
    "17b",
    "terraformer-17b",
    "17b-whole",
    "terraformer-17b-whole",
]
GROUPS: tuple[Group, ...] = get_args(Group)  # the largest last: they displace the others
