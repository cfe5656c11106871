"""Verbs that train: `data`, `train` and `demo`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from terseformer.cli import flags

_TRAIN_FLAGS = """\
  --out FOLDER           where the run goes (default: runs/ and the recipe's name)
  --resume [CHECKPOINT]  go on from the run's newest checkpoint, or from this one
  --quiet                show nothing but the result
"""


def data(args: Sequence[str]) -> None:
    """Makes token files."""
    recipe, _ = flags.recipe_of("data", args)

    from terseformer.data import prepare_in_cache
    from terseformer.recipe import with_initial_tokenizer

    def progress(stage: str, documents: int, size: int) -> None:
        print(f"{stage}: {documents:,} documents, {size / 1e6:.1f} MB", file=sys.stderr)

    prepared = prepare_in_cache(with_initial_tokenizer(recipe).data, progress)
    for name, file in (("train", prepared.train), ("validation", prepared.validation)):
        each, what = (2, "pairs") if recipe.data.target_field else (1, "documents")
        print(
            f"{name}: {file.num_documents // each:,} {what}, {file.num_tokens:,} tokens, "
            f"{file.num_bytes / 1e6:.1f} MB, {file.bytes_per_token:.2f} bytes per token: {file.path}"
        )
    print(f"tokenizer: {prepared.tokenizer.get_vocab_size():,} tokens: {prepared.tokenizer_path}")


def train(args: Sequence[str]) -> None:
    """Trains a recipe."""
    if flags.wants_help(args):
        print(_TRAIN_FLAGS)
    rest, out = flags.take(args, "--out", needs_value=True)
    rest, resume = flags.take(rest, "--resume")
    rest, quiet = flags.take(rest, "--quiet", takes_value=False)
    recipe, path = flags.recipe_of("train", rest)
    run = Path(out or Path("runs") / path.stem)

    from terseformer.training import Interrupted, train

    try:
        last = train(recipe, run, None if resume is None else Path(resume or run), quiet is not None)
    except Interrupted as stop:
        print(f"terse: {stop}", file=sys.stderr)
        _leave(130)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        uses = {
            "next_token": f"generate {run} {recipe.train.sample_prompt!r}",
            "span_corruption": f"train RECIPE.toml --train.initial-checkpoint {run}",
            "pairs": f"summarize {run} text.txt",
        }
        print(f"trained: {last}\n\n  terse evaluate {run}\n  terse {uses[recipe.train.objective.kind]}")
    _leave(0)


def _leave(code: int) -> None:
    """Ends one of torchrun's processes at once, since Gloo's threads may still hold its tensors.

    While Python shuts down, such a thread would abort the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def demo(args: Sequence[str]) -> None:
    """Shows what this is about."""
    from terseformer.demo import demo

    flags.call("demo", demo, args)
