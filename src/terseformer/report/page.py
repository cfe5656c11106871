"""The page: what the runs hold as tables, figures and texts, and these as HTML. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import jinja2
from markupsafe import Markup

from terseformer import __version__
from terseformer.configfile import to_toml
from terseformer.machine import commit, processor
from terseformer.report import tables
from terseformer.report.figures import DASHES, NUM_COLOURS, draw
from terseformer.report.runs import Run
from terseformer.report.speed import Decoding
from terseformer.report.tables import Table, number

_MOST_SAMPLES = 8
_LONGEST_SAMPLE = 2000
_CONTROLLER = {
    "entropy_bits": "entropy of the choice, bits",
    "share_used": "share of units used",
    "dead_units": "units never used",
}


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class Chapter:
    """Figures that share a key of lines, with a table or sentences beside them."""

    title: str
    lines: Sequence[str]
    """What the lines are, in the order of their colours."""
    figures: Sequence[Figure]
    table: Table | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Samples:
    """What a run wrote."""

    title: str
    prompt: str
    texts: Sequence[tuple[int, str]]


def render(runs: Sequence[Run], decoding: Decoding | None) -> str:
    """The page as HTML.

    Args:
        runs: at least one.
        decoding: what was measured, if anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("terseformer.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = f" ({commit()})" if commit() else ""
    return environment.get_template("page.html").render(
        names=[run.name for run in runs],
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, terseformer {__version__}{source}, {processor()}",
        models=tables.models_table(runs),
        quality=tables.quality_table(runs),
        has_pairs=any(run.recipe is not None and run.recipe.train.objective.kind == "pairs" for run in runs),
        training=tables.training_table(runs),
        decoding=tables.decoding_table(decoding) if decoding else None,
        decoded_on=tables.decoded_on(decoding) if decoding else "",
        left_out=decoding.left_out if decoding else [],
        chapters=[_losses(runs), *map(_controllers, runs)],
        samples=[_samples(run) for run in runs],
        recipes=[(run.name, to_toml(run.recipe)) for run in runs if run.recipe],
        num_colours=NUM_COLOURS,
        dashes=DASHES,
    )


def _losses(runs: Sequence[Run]) -> Chapter:
    figures = []
    for key, caption in (("train/loss", "training loss"), ("validation/loss", "validation loss")):
        curves = [run.curve(key) for run in runs]
        if any(curves):
            ends = (f"{run.name} ends at {run.last(key):.4f}" for run in runs if run.curve(key))
            svg = draw(curves, f"{caption.capitalize()} over the steps: {', '.join(ends)}.")
            figures.append(Figure(f"{caption.capitalize()}, nats per token", svg))
    notes = [
        f"{run.name} has no metrics.jsonl beside its checkpoint, so that nothing of its training can be shown."
        for run in runs
        if not run.log
    ]
    return Chapter("Curves", [run.name for run in runs], figures, None, notes)


def _controllers(run: Run) -> Chapter:
    title, layers = f"Controllers of {run.name}", run.controlled_layers()
    if not layers:
        why = (
            "its feed-forward layers are dense, without controllers"
            if run.config.feed_forward.kind == "dense"
            else "no validation in the log of its training"
        )
        return Chapter(title, [], [], None, [f"Nothing to show: {why}."])
    figures = []
    for quantity, caption in _CONTROLLER.items():
        curves = [run.curve(f"controller/{layer}/{quantity}") for layer in layers]
        description = f"{caption.capitalize()}, over the steps, of {run.name}; the table below has the last values."
        figures.append(Figure(caption.capitalize(), draw(curves, description)))
    forms = (("entropy_bits", ".3f"), ("share_used", ".1%"), ("dead_units", ",.0f"), ("imbalance", ".2f"))
    rows = [[layer, *(number(run.last(f"controller/{layer}/{key}"), form) for key, form in forms)] for layer in layers]
    columns = ("layer", *_CONTROLLER.values(), "busiest choice over the mean")
    note = "How the controllers choose on the validation text; a short text cannot use all units."
    return Chapter(title, layers, figures, Table("At the last validation", columns, rows), [note])


def _samples(run: Run) -> Samples:
    texts = run.samples()
    last = len(texts) - 1
    chosen = range(last + 1)
    if last >= _MOST_SAMPLES:
        chosen = [round(i * last / (_MOST_SAMPLES - 1)) for i in range(_MOST_SAMPLES)]
    shown = [(texts[i][0], _cut(texts[i][1])) for i in chosen]
    prompt = run.recipe.train.sample_prompt if run.recipe else ""
    if run.config.kind == "causal_lm":
        said = f"after “{prompt}”" if prompt else "from the beginning of a document"
    else:
        said = f"of the source “{prompt}”" if prompt else "of the first source of the validation text"
    return Samples(run.name, _cut(said), shown)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SAMPLE else f"{text[:_LONGEST_SAMPLE]}…"
