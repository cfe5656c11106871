"""The verb `serve`."""

# Without `from __future__ import annotations`: flags are made from annotations whose names are imported late.

import functools
import os
from collections.abc import Sequence
from typing import Literal

from terseformer.cli import flags
from terseformer.errors import UserError


def serve(args: Sequence[str]) -> None:
    """Starts the server."""
    from terseformer.serve.limits import Caching, Limits
    from terseformer.serve.scaling import Scaling

    def serve(
        checkpoints: tuple[str, ...],
        /,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: tuple[str, ...] = (),
        limits: Limits = Limits(),  # noqa: B008
        caching: Caching = Caching(),  # noqa: B008
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
            caching: how much is kept.
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
            caching,
            host=host,
            port=port,
            dtype=dtype,
            threads=threads or None,
            keys=keys,
        )

    flags.call("serve", serve, args)
