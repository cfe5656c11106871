"""Jobs for a lane without a server."""

from __future__ import annotations

from typing import Any

from terseformer.sampling import SamplingConfig
from terseformer.serve.delivery import Delivery
from terseformer.serve.guided import Grammar
from terseformer.serve.job import Client, Job, Prompt


class Delivered(Delivery):
    """What has been sent, without an event loop."""

    pending = 0

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def put(self, item: Any) -> None:
        self.sent.append(item)


def make_job(
    delivery: Delivered, grammar: Grammar | None = None, model: str = "small", num_top: int | None = None
) -> Job:
    """Four tokens of one text; with `num_top`, which asks for log-probabilities, one in a round."""
    return Job(
        model=model,
        client=Client("a"),
        prompts=[Prompt(tokens=[1, 2, 3])],
        num_texts=1,
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=4),
        max_tokens=4,
        seed=0,
        delivery=delivery,
        grammar=grammar,
        num_top=num_top,
    )
