"""The command `terse`: verbs become function calls, nothing else."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from terseformer.errors import UserError

if TYPE_CHECKING:
    from terseformer.config import Recipe
    from terseformer.engine import Engine
    from terseformer.sampling import SamplingConfig

_USAGE = """\
terse: Scaling Transformers, trained beside their dense twins and decoded on CPUs

  terse demo                                          train a sparse and a dense model, compare them, let both write
  terse data recipes/small-1m.toml                    make the token files of a recipe
  terse train recipes/small-1m.toml                   train it; Ctrl-C saves
  terse train recipes/small-1m.toml --resume          go on
  terse train recipes/small-1m.toml --train.steps 500 --model.preset small-1m-ff64 --out runs/ff64
  torchrun --nproc-per-node 2 -m terseformer train recipes/small-1m.toml
  terse evaluate runs/small-1m                        loss, perplexity and bits per byte
  terse evaluate runs/small-1m --files my-text.txt    of other text
  terse generate runs/small-1m "In the beginning"     write; --temperature 0 takes the likeliest token each time
  terse chat runs/small-1m                            write on, line by line
  terse serve runs/small-1m                           answer OpenAI's clients at http://127.0.0.1:8000/v1
  terse serve runs/small-1m --ray --replicas 2        the same by two processes on Ray
  terse summarize runs/summarize-short text.txt       a line for a text, by an encoder-decoder
  terse pack runs/small-1m --dtype int8               make the file that decoding maps into memory
  terse convert --from trax model.json model.weights.npy.gz models/converted
                                                      take over a model of the reference implementation
  terse info runs/small-1m                            sizes, FLOPs and bytes per token; of presets and recipes too
  terse report runs/small-1m                          curves, controllers, samples, quality and speed as an HTML file
  terse report runs/dense runs/sparse --out both.html of several runs, side by side
  terse bench                                         measure decoding on this machine, beside other libraries

  terse VERB --help lists a verb's flags.
"""

_TRAIN_FLAGS = """\
  --out FOLDER           where the run goes (default: runs/ and the recipe's name)
  --resume [CHECKPOINT]  go on from the run's newest checkpoint, or from this one
  --quiet                show nothing but the result
"""


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
        "chat": _chat,
        "convert": _convert,
        "data": _data,
        "demo": _demo,
        "evaluate": _evaluate,
        "generate": _generate,
        "info": _info,
        "pack": _pack,
        "report": _report,
        "serve": _serve,
        "summarize": _summarize,
        "train": _train,
    }
    verb, rest = args[0], args[1:]
    try:
        if verb not in verbs:
            raise UserError(f"no such verb: {verb}; the nearest is {_nearest(verb, verbs)} of {', '.join(verbs)}")
        if _wants_help(rest):
            examples = [line for line in _USAGE.splitlines() if re.search(rf"(^  terse|-m terseformer) {verb}\b", line)]
            print("\n".join(examples), end="\n\n")
        verbs[verb](rest)
    except UserError as error:
        print(f"terse: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"terse: {error}", file=sys.stderr)
        sys.exit(2)


def _data(args: Sequence[str]) -> None:
    recipe, _ = _recipe("data", args)

    from terseformer.data import prepare_in_cache
    from terseformer.recipe import with_initial_tokenizer

    def progress(stage: str, documents: int, size: int) -> None:
        print(f"{stage}: {documents:,} documents, {size / 1e6:.1f} MB", file=sys.stderr)

    prepared = prepare_in_cache(with_initial_tokenizer(recipe).data, progress)
    for name, file in (("train", prepared.train), ("validation", prepared.validation)):
        print(
            f"{name}: {file.num_documents:,} documents, {file.num_tokens:,} tokens, {file.num_bytes / 1e6:.1f} MB, "
            f"{file.bytes_per_token:.2f} bytes per token: {file.path}"
        )
    print(f"tokenizer: {prepared.tokenizer.get_vocab_size():,} tokens: {prepared.tokenizer_path}")


def _train(args: Sequence[str]) -> None:
    if _wants_help(args):
        print(_TRAIN_FLAGS)
    rest, out = _take(args, "--out", needs_value=True)
    rest, resume = _take(rest, "--resume")
    rest, quiet = _take(rest, "--quiet", takes_value=False)
    recipe, path = _recipe("train", rest)
    run = Path(out or Path("runs") / path.stem)

    from terseformer.training import Interrupted, train

    try:
        last = train(recipe, run, None if resume is None else Path(resume or run), quiet is not None)
    except Interrupted as stop:
        print(f"terse: {stop}", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        is_decoder = recipe.model.kind == "causal_lm"
        write = f"generate {run} {recipe.train.sample_prompt!r}" if is_decoder else f"summarize {run} text.txt"
        print(f"trained: {last}\n\n  terse evaluate {run}\n  terse {write}")


def _evaluate(args: Sequence[str]) -> None:
    from terseformer.sampling import DEFAULT_SUMMARY, SamplingConfig

    def evaluate(
        checkpoint: Path,
        /,
        files: tuple[str, ...] = (),
        sequences: int = 0,
        sampling: SamplingConfig = DEFAULT_SUMMARY,
        backend: Literal["torch", "engine"] = "torch",
        dtype: Literal["f32", "bf16", "int8"] = "f32",
    ) -> None:
        """Loss, perplexity and bits per byte of a checkpoint; of an encoder-decoder, loss and ROUGE.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            files: texts to evaluate on; without any, the validation text that the model was trained with.
            sequences: sequences or pairs at most; 0 takes all.
            sampling: how summaries are searched for, or with one beam drawn.
            backend: PyTorch, or the native engine.
            dtype: of the engine's weights.
        """
        from terseformer.config import ModelConfig
        from terseformer.evaluation import evaluate_folder
        from terseformer.folder import find, load_config

        if backend == "torch" and dtype != "f32":
            raise UserError("--dtype is the engine's; give --backend engine too")
        if not isinstance(load_config(find(checkpoint)), ModelConfig):
            if files:
                raise UserError("an encoder-decoder is evaluated on its own validation text; leave --files out")
            return _evaluate_summaries(checkpoint, sequences, sampling, dtype if backend == "engine" else None)
        if sampling != DEFAULT_SUMMARY:
            raise UserError("a causal language model is evaluated without writing; leave out the flags of sampling")
        result = evaluate_folder(checkpoint, files, sequences, dtype if backend == "engine" else None)
        print(f"loss            {result.loss:.4f} nats per token")
        print(f"perplexity      {result.perplexity:.2f}")
        if result.bits_per_byte is not None:
            print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"tokens          {result.tokens:,} in {result.seconds:.1f} s, {result.tokens_per_second:,.0f} a second")

    _call("evaluate", evaluate, args)


def _evaluate_summaries(checkpoint: Path, num_pairs: int, sampling: "SamplingConfig", engine_dtype: Any) -> None:
    from terseformer.rouge import TYPES
    from terseformer.summarizing import Summarizer

    result = Summarizer(checkpoint, engine_dtype).evaluate(num_pairs, sampling)
    print(f"loss            {result.evaluation.loss:.4f} nats per token of the targets")
    print(f"perplexity      {result.evaluation.perplexity:.2f}")
    if not result.rouge:
        return
    left_out = f", {result.num_left_out:,} longer ones left out" if result.num_left_out else ""
    print(f"summaries       {result.num_pairs:,}{left_out}; {result.tokens_per_second:,.0f} tokens a second")
    print(f"\n{'ROUGE':16}" + "".join(f"{name:>20}" for name in TYPES))
    for name, scores in result.rouge.items():
        bounds = (f"{s.mid:.1f} [{s.low:.1f}, {s.high:.1f}]" for s in (scores[kind] for kind in TYPES))
        print(f"{name:16}" + "".join(f"{text:>20}" for text in bounds))
    for source, reference, summary in result.examples:
        print(f"\nsource     {' '.join(source.split())[:200]}\nreference  {reference}\nmodel      {summary}")


def _summarize(args: Sequence[str]) -> None:
    from terseformer.sampling import DEFAULT_SUMMARY, SamplingConfig

    def summarize(
        checkpoint: Path,
        files: tuple[Path, ...],
        /,
        divide: bool = False,
        sampling: SamplingConfig = DEFAULT_SUMMARY,
        backend: Literal["engine", "torch"] = "engine",
        dtype: Literal["f32", "bf16", "int8"] = "f32",
        threads: int = 0,
    ) -> None:
        """Prints a summary of each text.

        Args:
            checkpoint: a checkpoint's or a run's folder, of an encoder-decoder that was trained on pairs.
            files: texts; `-` is the standard input.
            divide: divide a text that is longer than the model can read, and summarise each part.
            sampling: how the summaries are searched for, or with one beam drawn.
            backend: the native engine, or PyTorch.
            dtype: of the engine's weights.
            threads: of the engine; 0: the physical cores, or TERSE_THREADS.
        """
        from terseformer.summarizing import Summarizer, summarize_files

        if not files:
            raise UserError("terse summarize needs a text after the checkpoint: a file, or - for the standard input")
        if backend == "torch" and (dtype != "f32" or threads):
            raise UserError("--dtype and --threads are the engine's; leave them out with --backend torch")
        summarizer = Summarizer(checkpoint, dtype if backend == "engine" else None, threads or None)
        if summarizer.engine is not None:
            _introduce(summarizer.engine)
        for path, summaries in zip(files, summarize_files(summarizer, files, divide, sampling), strict=True):
            for summary in summaries:
                print(f"{path}: {summary}" if len(files) > 1 else summary)

    _call("summarize", summarize, args)


def _generate(args: Sequence[str]) -> None:
    from terseformer.sampling import DEFAULT_SAMPLING, SamplingConfig

    def generate(
        checkpoint: Path,
        prompt: str = "",
        /,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        backend: Literal["engine", "torch"] = "engine",
        dtype: Literal["f32", "bf16", "int8"] = "f32",
        threads: int = 0,
    ) -> None:
        """Continues a prompt, or makes a text of an encoder-decoder's source, and prints it as it comes.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            prompt: the beginning, without which the model begins a document; or the source.
            sampling: how the text is drawn, or searched for with beams.
            backend: the native engine, or PyTorch.
            dtype: of the engine's weights.
            threads: of the engine; 0: the physical cores, or TERSE_THREADS.
        """
        if backend == "torch":
            from terseformer.checkpoint import load
            from terseformer.data import load_tokenizer
            from terseformer.folder import find
            from terseformer.generation import stream

            if dtype != "f32" or threads:
                raise UserError("--dtype and --threads are the engine's; leave them out with --backend torch")
            folder = find(checkpoint)
            model = load(folder)
            config, pieces = model.config, stream(model, load_tokenizer(folder / "tokenizer.json"), prompt, sampling)
        else:
            engine = _engine(checkpoint, dtype, threads)
            config, pieces = engine.config, engine.stream(prompt, sampling)
            _introduce(engine)
        print(prompt if config.kind == "causal_lm" else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    _call("generate", generate, args)


def _engine(checkpoint: Path, dtype: Any, threads: int) -> "Engine":
    from terseformer.engine import Engine

    return Engine.from_pretrained(checkpoint, dtype, threads or None)


def _introduce(engine: "Engine") -> None:
    """Says on which instruction set, threads and type of numbers an engine runs."""
    print(f"engine: {engine.isa}, {engine.threads} threads, {engine.dtype}", file=sys.stderr)


def _chat(args: Sequence[str]) -> None:
    from terseformer.sampling import DEFAULT_SAMPLING, SamplingConfig

    def chat(
        checkpoint: Path,
        /,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        dtype: Literal["f32", "bf16", "int8"] = "f32",
        threads: int = 0,
    ) -> None:
        """Takes turns with a model: it continues the text so far, your last line included. An empty line ends.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            sampling: how the text is drawn.
            dtype: of the engine's weights.
            threads: of the engine; 0: the physical cores, or TERSE_THREADS.
        """
        from terseformer.chat import chat

        engine = _engine(checkpoint, dtype, threads)
        _introduce(engine)
        chat(engine, sampling)

    _call("chat", chat, args)


def _pack(args: Sequence[str]) -> None:
    def pack(checkpoint: Path, /, dtype: Literal["f32", "bf16", "int8"] = "f32") -> None:
        """Makes the packed file of a checkpoint, which the engine would make at first use.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            dtype: of the matrices; vectors stay float32.
        """
        from terseformer.pack import pack

        path = pack(checkpoint, dtype)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    _call("pack", pack, args)


def _serve(args: Sequence[str]) -> None:
    from terseformer.serve.limits import Limits
    from terseformer.serve.scaling import Scaling

    def serve(
        checkpoints: tuple[str, ...],
        /,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: tuple[str, ...] = (),
        limits: Limits = Limits(),  # noqa: B008
        cache_memory: int = 1024,
        cache_disk: int = 4096,
        cache_folder: Path | None = None,
        dtype: Literal["f32", "bf16", "int8"] = "f32",
        threads: int = 0,
        ray: bool = False,
        scaling: Scaling = Scaling(),  # noqa: B008
    ) -> None:
        """Answers OpenAI's clients: texts, conversations, log-probabilities, JSON by a schema; /docs shows all.

        Args:
            checkpoints: a checkpoint's or a run's folder each, whose name is the model's, or NAME=FOLDER.
            host: the address to listen at; 0.0.0.0: all of this machine's.
            port: 0 takes any that is free.
            api_key: a request must have one of these; without any, all are answered. TERSE_API_KEY is another.
            limits: how much is taken on.
            cache_memory: megabytes of the prefix cache in memory; 0: no prefix cache.
            cache_disk: megabytes of the prefix cache on disk; 0: none.
            cache_folder: where it lies; without one, in the folder for fetched files.
            dtype: of the engines' weights.
            threads: of each engine; 0: the physical cores, or TERSE_THREADS; replicas share these.
            ray: serve by replicas on Ray, on this machine or a cluster.
            scaling: how many replicas, and where.
        """
        if not checkpoints:
            raise UserError("terse serve needs a checkpoint's or a run's folder, such as: terse serve runs/small-1m")
        if not ray and scaling != Scaling():
            raise UserError("replicas and their cluster are Ray's; give --ray too")
        try:
            if ray:
                scaling.prepare()
                from terseformer.scale import serve as serve_on_ray

                serve = functools.partial(serve_on_ray, scaling=scaling)
            else:
                from terseformer.serve.main import serve
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("terseformer"):
                raise
            verb, extra = ("terse serve --ray", "ray") if ray else ("terse serve", "serve")
            raise UserError(
                f"{verb} needs the package {error.name}; install the extra: pip install 'terseformer[{extra}]'"
            ) from None
        keys = (*api_key, *filter(None, [os.environ.get("TERSE_API_KEY")]))
        serve(
            checkpoints,
            limits,
            host=host,
            port=port,
            dtype=dtype,
            threads=threads or None,
            keys=keys,
            cache_memory=cache_memory,
            cache_disk=cache_disk,
            cache_folder=cache_folder,
        )

    _call("serve", serve, args)


def _convert(args: Sequence[str]) -> None:
    import tyro

    def convert(
        description: Path,
        weights: Path,
        folder: Path,
        /,
        source: Annotated[Literal["trax"], tyro.conf.arg(name="from")],
    ) -> None:
        """Writes a model of another library as a checkpoint folder, without tokenizer.

        Args:
            description: a JSON file: `model`, the name of the Trax function that makes it, and `args`, its arguments.
            weights: the weights that Trax's trainer wrote: model.weights.npy.gz, or model.pkl.gz with them inside.
            folder: the new folder.
            source: the library.
        """
        from terseformer.interop import trax

        assert source == "trax"
        trax.convert(description, weights, folder)
        print(folder)

    _call("convert", convert, args)


def _info(args: Sequence[str]) -> None:
    def info(model: str = "", /, context: int = 0) -> None:
        """Sizes, FLOPs and bytes per token of a model, and what this installation runs on.

        Args:
            model: a checkpoint's or run's folder, a recipe, or the name of a preset; without one, the presets.
            context: tokens that attention looks at.
        """
        from terseformer.info import show

        show(model, context)

    _call("info", info, args)


def _report(args: Sequence[str]) -> None:
    def report(runs: tuple[Path, ...], /, out: Path | None = None, speed: bool = True) -> None:
        """Writes one HTML file about runs: curves, controllers, samples, quality and speed.

        Args:
            runs: runs' or checkpoints' folders; the first one is what the others are compared with.
            out: the file; without it, report.html in the folder of the only run.
            speed: measure the engine's decoding on this machine, which takes some seconds.
        """
        from terseformer.report import write_report

        print(f"report: {write_report(runs, out, speed)}")

    _call("report", report, args)


def _bench(args: Sequence[str]) -> None:
    def bench(
        groups: tuple[
            Literal[
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
            ],
            ...,
        ] = (),
        repetitions: int = 9,
        threads: int = 0,
        plot: Path | None = None,
        tune: bool = False,
    ) -> None:
        """Measures decoding on this machine against its floors, dense models and other libraries; random weights.

        Args:
            groups: without any, all: the paper's 800M rows, types of numbers and other libraries at 0.8B, the overhead
                of a token, the small summarisers, encoder-decoders of 800M, the time to read long sources, one block
                of the paper's 17B rows and encoder-decoders, and the whole sparse 17B models. All keep some 90 GB in
                the cache.
            repetitions: rounds in which all models of a group take their turn.
            threads: 0: the physical cores, or TERSE_THREADS.
            plot: an image to write, .svg or .png.
            tune: only find the fastest number of threads, and use it from now on.
        """
        from terseformer import bench
        from terseformer.threads import default_threads

        if tune:
            for count, seconds in bench.tune().items():
                print(f"{count} threads: {1e3 * seconds:.3f} ms a token")
            print(f"from now on: {default_threads()} threads")
            return
        bench.show(bench.bench(groups or bench.GROUPS, repetitions, threads), plot)

    _call("bench", bench, args)


def _demo(args: Sequence[str]) -> None:
    from terseformer.demo import demo

    _call("demo", demo, args)


def _wants_help(args: Sequence[str]) -> bool:
    return "--help" in args or "-h" in args


def _nearest(word: str, words: Any) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def _call(verb: str, function: Callable[..., Any], args: Sequence[str]) -> Any:
    """Calls a function with flags made from its signature; parameters before `/` have none."""
    return _bound(verb, function, args)()


def _bound(verb: str, function: Callable[..., Any], args: Sequence[str]) -> Callable[[], Any]:
    """The function with the values of the flags."""
    import tyro

    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        has_fields = dataclasses.is_dataclass(parameter.default)
        renamed = [item.name for item in getattr(parameter.annotation, "__metadata__", ())]  # by tyro.conf.arg
        names += [f.name for f in dataclasses.fields(parameter.default)] if has_fields else renamed or [name]
        names += [f"no_{name}"] if isinstance(parameter.default, bool) else []
    flags = ["--help", *(f"--{name.replace('_', '-')}" for name in names)]
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise UserError(f"no such flag: {flag}; the nearest is {_nearest(flag, flags)}, --help lists them all")

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *values, **named)

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(bind, args=list(args), prog=f"terse {verb}", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()[1:]]
        raise UserError(f"{' '.join(lines[: lines.index('')])}; terse {verb} --help lists what there is") from None


def _recipe(verb: str, args: Sequence[str]) -> "tuple[Recipe, Path]":
    """The recipe that a command line names, with its changes, and the recipe's path; or help, and the end."""
    from terseformer.config import Recipe
    from terseformer.recipe import load_recipe, parse_flags, show_flags

    path = Path(args[0]) if args and not args[0].startswith("-") else None
    if _wants_help(args):
        show_flags(load_recipe(path) if path else Recipe(), f"terse {verb} RECIPE.toml")
        sys.exit()
    if path is None:
        raise UserError(f"terse {verb} needs a recipe first, such as: terse {verb} recipes/small-1m.toml")
    return load_recipe(path, parse_flags(args[1:])), path


def _take(
    args: Sequence[str], flag: str, takes_value: bool = True, needs_value: bool = False
) -> tuple[Sequence[str], str | None]:
    """Takes a flag and its value out of a command line: (the rest, None if absent, "" if bare)."""
    for index, arg in enumerate(args):
        if takes_value and arg.startswith(f"{flag}="):
            return [*args[:index], *args[index + 1 :]], arg.partition("=")[2]
        if arg == flag:
            follows = args[index + 1 : index + 2]
            has_value = takes_value and bool(follows) and not follows[0].startswith("--")
            if needs_value and not has_value:
                raise UserError(f"{flag} needs a value")
            return [*args[:index], *args[index + 1 + has_value :]], follows[0] if has_value else ""
    return args, None
