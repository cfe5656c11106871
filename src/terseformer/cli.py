"""The command `terse`: verbs become function calls, nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from terseformer.errors import UserError

_USAGE = """\
terse: Scaling Transformers, trained beside their dense twins and decoded on CPUs

  terse demo                                          train a sparse and a dense model, compare them, let both write
  terse data recipes/small-1m.toml                    make the token files of a recipe
  terse train recipes/small-1m.toml                   train it; Ctrl-C saves, --resume goes on
  terse train recipes/small-1m.toml --train.steps 500 --model.preset small-1m-ff64
  terse evaluate runs/small-1m                        loss, perplexity and bits per byte
  terse generate runs/small-1m "In the beginning"     write
  terse info runs/small-1m                            sizes, FLOPs and bytes per token; of presets and recipes too
  terse bench                                         measure speed on this machine

  terse VERB --help lists a verb's flags.
"""

Words = Annotated[str, "positional"]


def main() -> None:
    """Runs the command line; exits with 2 after a user's mistake, with 130 after an interruption."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return
    if args[0] in ("-V", "--version", "version"):
        from terseformer import __version__

        print(__version__)
        return
    verbs: dict[str, Callable[[Sequence[str]], None]] = {
        "bench": _bench,
        "data": _data,
        "demo": _demo,
        "evaluate": _evaluate,
        "generate": _generate,
        "info": _info,
        "train": _train,
    }
    try:
        if args[0] not in verbs:
            import difflib

            near = difflib.get_close_matches(args[0], verbs, n=1, cutoff=0.0)[0]
            raise UserError(f"no such verb: {args[0]}; the nearest is {near}, allowed are {', '.join(verbs)}")
        verbs[args[0]](args[1:])
    except UserError as error:
        print(f"terse: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _call(function: Callable[..., Any], args: Sequence[str], verb: str) -> Any:
    """Calls a function with flags made from its signature."""
    import tyro

    return tyro.cli(function, args=list(args), prog=f"terse {verb}", config=(tyro.conf.OmitArgPrefixes,))


def _data(args: Sequence[str]) -> None:
    from terseformer.recipe import load_recipe, parse_flags, show_flags

    path, rest = _recipe_argument(args, "data")
    if "--help" in rest or "-h" in rest:
        return show_flags(load_recipe(path), "terse data RECIPE.toml")
    recipe = load_recipe(path, parse_flags(rest))

    from terseformer.data import prepare_in_cache

    def progress(stage: str, documents: int, size: int) -> None:
        print(f"{stage}: {documents:,} documents, {size / 1e6:.1f} MB", file=sys.stderr)

    prepared = prepare_in_cache(recipe.data, progress)
    for name, file in (("train", prepared.train), ("validation", prepared.validation)):
        print(
            f"{name}: {file.num_documents:,} documents, {file.num_tokens:,} tokens, {file.num_bytes / 1e6:.1f} MB, "
            f"{file.bytes_per_token:.2f} bytes per token: {file.path}"
        )
    print(f"tokenizer: {prepared.tokenizer.get_vocab_size():,} tokens: {prepared.tokenizer_path}")


def _train(args: Sequence[str]) -> None:
    from terseformer.recipe import load_recipe, parse_flags, show_flags

    path, rest = _recipe_argument(args, "train")
    if "--help" in rest or "-h" in rest:
        print(
            "terse train RECIPE.toml [--out FOLDER] [--resume [CHECKPOINT]] [--quiet] [FLAGS OF THE RECIPE]\n\n"
            "  --out FOLDER           where the run goes (default: runs/ and the recipe's name)\n"
            "  --resume [CHECKPOINT]  go on from the run's newest checkpoint, or from this one\n"
            "  --quiet                show nothing but the result\n"
        )
        return show_flags(load_recipe(path), "terse train RECIPE.toml")
    rest, out = _take(rest, "--out", needs_value=True)
    rest, resume = _take(rest, "--resume")
    rest, quiet = _take(rest, "--quiet", takes_value=False)
    recipe = load_recipe(path, parse_flags(rest))
    run = Path(out or Path("runs") / path.stem)

    from terseformer.train import Interrupted, train

    try:
        last = train(recipe, run, None if resume is None else Path(resume or run), quiet is not None)
    except Interrupted as stop:
        print(f"terse: {stop}", file=sys.stderr)
        sys.exit(130)
    print(f"trained: {last}\n\n  terse evaluate {run}\n  terse generate {run} {recipe.train.sample_prompt!r}")


def _evaluate(args: Sequence[str]) -> None:
    import tyro

    def evaluate(
        checkpoint: Annotated[Path, tyro.conf.Positional], files: tuple[Path, ...] = (), sequences: int = 0
    ) -> None:
        """Loss, perplexity and bits per byte of a checkpoint.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            files: texts to evaluate on; without any, the validation text that the model was trained with.
            sequences: sequences at most; 0 takes all.
        """
        from terseformer.evaluate import evaluate_folder

        result = evaluate_folder(checkpoint, files, sequences)
        print(f"loss            {result.loss:.4f} nats per token")
        print(f"perplexity      {result.perplexity:.2f}")
        if result.bits_per_byte is not None:
            print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"tokens          {result.tokens:,} in {result.seconds:.1f} s, {result.tokens_per_second:,.0f} a second")

    _call(evaluate, args, "evaluate")


def _generate(args: Sequence[str]) -> None:
    import tyro

    from terseformer.sampling import SamplingConfig

    def generate(
        checkpoint: Annotated[Path, tyro.conf.Positional],
        prompt: Annotated[str, tyro.conf.Positional] = "",
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
    ) -> None:
        """Continues a prompt and prints the text as it comes.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            prompt: the beginning; without one, the model begins a document.
            sampling: how the text is drawn.
        """
        from terseformer import checkpoint as checkpoints
        from terseformer.data import load_tokenizer
        from terseformer.generate import stream

        folder = checkpoints.find(checkpoint)
        pieces = stream(checkpoints.load(folder), load_tokenizer(folder / "tokenizer.json"), prompt, sampling)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    _call(generate, args, "generate")


def _info(args: Sequence[str]) -> None:
    import tyro

    def info(model: Annotated[str, tyro.conf.Positional] = "", context: int = 0) -> None:
        """Sizes, FLOPs and bytes per token of a model, and what this installation runs on.

        Args:
            model: a checkpoint's or run's folder, a recipe, or the name of a preset; without one, the presets.
            context: tokens that attention looks at.
        """
        from terseformer.info import show

        show(model, context)

    _call(info, args, "info")


def _bench(args: Sequence[str]) -> None:
    from terseformer.bench import bench, show

    result = _call(bench, args, "bench")
    show(result)


def _demo(args: Sequence[str]) -> None:
    from terseformer.demo import demo

    _call(demo, args, "demo")


def _recipe_argument(args: Sequence[str], verb: str) -> tuple[Path, list[str]]:
    if args and not args[0].startswith("-"):
        return Path(args[0]), list(args[1:])
    raise UserError(f"terse {verb} needs a recipe first, such as: terse {verb} recipes/small-1m.toml")


def _take(
    args: list[str], flag: str, takes_value: bool = True, needs_value: bool = False
) -> tuple[list[str], str | None]:
    """Takes a flag and its value out of a command line: (the rest, None if absent, "" if bare)."""
    for index, arg in enumerate(args):
        if takes_value and arg.startswith(f"{flag}="):
            return args[:index] + args[index + 1 :], arg.partition("=")[2]
        if arg == flag:
            follows = args[index + 1 : index + 2]
            has_value = takes_value and bool(follows) and not follows[0].startswith("--")
            if needs_value and not has_value:
                raise UserError(f"{flag} needs a value")
            return args[:index] + args[index + 1 + has_value :], follows[0] if has_value else ""
    return args, None
