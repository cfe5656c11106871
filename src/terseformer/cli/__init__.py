"""The command `terse`: verbs become function calls, nothing else."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

from terseformer.cli import evaluating, flags, measuring, models, serving, training, writing
from terseformer.errors import UserError

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
        "bench": measuring.bench,
        "chat": writing.chat,
        "convert": models.convert,
        "data": training.data,
        "demo": training.demo,
        "evaluate": evaluating.evaluate,
        "generate": writing.generate,
        "info": models.info,
        "pack": models.pack,
        "report": evaluating.report,
        "serve": serving.serve,
        "summarize": writing.summarize,
        "train": training.train,
    }
    verb, rest = args[0], args[1:]
    try:
        if verb not in verbs:
            raise UserError(f"no such verb: {verb}; the nearest is {flags.nearest(verb, verbs)} of {', '.join(verbs)}")
        if flags.wants_help(rest):
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
