"""Verbs that show what was learned: `evaluate` and `report`."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from terseformer.cli import flags
from terseformer.errors import UserError

if TYPE_CHECKING:
    from terseformer.sampling import SamplingConfig


def evaluate(args: Sequence[str]) -> None:
    """Finds out how good a model is."""
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

        if sequences < 0:
            raise UserError(f"--sequences must be at least 0, not {sequences}")
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

    flags.call("evaluate", evaluate, args)


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


def report(args: Sequence[str]) -> None:
    """Writes a page about runs."""

    def report(runs: tuple[Path, ...], /, out: Path | None = None, speed: bool = True) -> None:
        """Writes one HTML file about runs: curves, controllers, samples, quality and speed.

        Args:
            runs: runs' or checkpoints' folders; the first one is what the others are compared with.
            out: the file; without it, report.html in the folder of the only run.
            speed: measure the engine's decoding on this machine, which takes some seconds.
        """
        from terseformer.report import write_report

        print(f"report: {write_report(runs, out, speed)}")

    flags.call("report", report, args)
