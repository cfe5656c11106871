"""Verbs that write: `generate`, `chat` and `summarize`."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from terseformer.cli import flags
from terseformer.errors import UserError

if TYPE_CHECKING:
    from terseformer.engine import Engine


def generate(args: Sequence[str]) -> None:
    """Writes a text."""
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
            config, pieces = model.config, stream(model, load_tokenizer(folder), prompt, sampling)
        else:
            engine = _engine(checkpoint, dtype, threads)
            config, pieces = engine.config, engine.stream(prompt, sampling)
            _introduce(engine)
        print(prompt if config.kind == "causal_lm" else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    flags.call("generate", generate, args)


def chat(args: Sequence[str]) -> None:
    """Takes turns."""
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

    flags.call("chat", chat, args)


def summarize(args: Sequence[str]) -> None:
    """Summarises texts."""
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
        from terseformer.summarizing import Summarizer, read_source, summarize_files

        if not files:
            raise UserError("terse summarize needs a text after the checkpoint: a file, or - for the standard input")
        if backend == "torch" and (dtype != "f32" or threads):
            raise UserError("--dtype and --threads are the engine's; leave them out with --backend torch")
        sources = [(path, read_source(path)) for path in files]
        summarizer = Summarizer(checkpoint, dtype if backend == "engine" else None, threads or None)
        if summarizer.engine is not None:
            _introduce(summarizer.engine)
        for path, summaries in zip(files, summarize_files(summarizer, sources, divide, sampling), strict=True):
            for summary in summaries:
                print(f"{path}: {summary}" if len(files) > 1 else summary)

    flags.call("summarize", summarize, args)


def _engine(checkpoint: Path, dtype: Any, threads: int) -> "Engine":
    from terseformer.engine import Engine

    return Engine.from_pretrained(checkpoint, dtype, threads or None)


def _introduce(engine: "Engine") -> None:
    """Says on which instruction set, threads and type of numbers an engine runs."""
    print(f"engine: {engine.isa}, {engine.threads} threads, {engine.dtype}", file=sys.stderr)
