"""Verbs about models: `info`, `pack` and `convert`."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from terseformer.cli import flags


def info(args: Sequence[str]) -> None:
    """Describes a model."""

    def info(model: str = "", /, context: int = 0) -> None:
        """Sizes, FLOPs and bytes per token of a model, and what this installation runs on.

        Args:
            model: a checkpoint's or run's folder, a recipe, or the name of a preset; without one, the presets.
            context: tokens that attention looks at.
        """
        from terseformer.info import show

        show(model, context)

    flags.call("info", info, args)


def pack(args: Sequence[str]) -> None:
    """Makes a packed file."""

    def pack(checkpoint: Path, /, dtype: Literal["f32", "bf16", "int8"] = "f32") -> None:
        """Makes the packed file of a checkpoint, which the engine would make at first use.

        Args:
            checkpoint: a checkpoint's or a run's folder.
            dtype: of the matrices; vectors stay float32.
        """
        from terseformer.pack import pack

        path = pack(checkpoint, dtype)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    flags.call("pack", pack, args)


def convert(args: Sequence[str]) -> None:
    """Takes over a model."""
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
        print(f"{folder}: without tokenizer; `terse generate` and `terse summarize` need a tokenizer.json there")

    flags.call("convert", convert, args)
