"""The verb `bench`."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

from collections.abc import Sequence
from pathlib import Path

from terseformer.cli import flags


def bench(args: Sequence[str]) -> None:
    """Measures."""
    from terseformer.bench.groups import Group

    def bench(
        groups: tuple[Group, ...] = (),
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

    flags.call("bench", bench, args)
