"""Trains single changes of a small model, each by the command in its row, and writes their table in docs/results.md.

python benchmarks/ablations.py            # what docs/results/ablations.json lacks, then the table
python benchmarks/ablations.py --render   # only the table
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from document import ROOT, replace_between

from terseformer.training_log import METRICS, read_metrics

RESULTS = ROOT / "docs" / "results" / "ablations.json"
COMMAND = "terse train recipes/small-1m.toml --train.steps 600"
_FF = "--model.preset small-1m-ff16-faithful"
_HARD = f"{_FF} --model.feed-forward.quant-prob 1"
_QKV = "--model.preset small-1m-qkv-faithful"
_LOSS = "--model.preset small-1m-ff-qkv-loss"
_FOUR = f"{_LOSS} --model.head.head-modules 4 --model.feed-forward.intermediate-size 896"
ROWS = {
    "dense, learning rate 2e-3": "--model.preset small-1m-dense --train.learning-rate 2e-3",
    "dense, 4e-3": "--model.preset small-1m-dense --train.learning-rate 4e-3",
    "dense, 8e-3, as all that follow": "--model.preset small-1m-dense",
    "dense, 16e-3": "--model.preset small-1m-dense --train.learning-rate 16e-3",
    "ff16 as in the reference, but at 2e-3": f"{_FF} --train.learning-rate 2e-3",
    "ff16 as in the reference": _FF,
    "… quant_prob from 0.3 to 1 over the run": f"{_FF} --train.final-quant-prob 1",
    "… all active units tell the controller": f"{_FF} --model.feed-forward.controller-gradient all",
    "… always the hard choice": _HARD,
    "… hard, controller rank 32, as many parameters": (
        f"{_HARD} --model.feed-forward.controller-rank 32 --model.feed-forward.intermediate-size 480"
    ),
    "… hard, temperature 1": f"{_HARD} --model.feed-forward.temperature 1",
    "… hard, kernel scaling": f"{_HARD} --model.feed-forward.kernel-scaling",
    "… hard, times the controller's probability": f"{_HARD} --model.feed-forward.multiply-by-controller",
    "ff16, hard, all active units (our preset)": "--model.preset small-1m-ff16",
    "qkv as in the reference (no output layer)": _QKV,
    "qkv, multiplicative output layer (our preset)": "--model.preset small-1m-qkv",
    "ff-qkv (our preset)": "--model.preset small-1m-ff-qkv",
    "ff-qkv, chosen units only": "--model.preset small-1m-ff-qkv --model.feed-forward.controller-gradient chosen",
    "ff-qkv-loss, 4 modules, D as in the reference": f"{_FOUR} --model.head.gates-std 0.5",
    "… 4 modules, D with a standard deviation of 2": _FOUR,
    "… 2 modules, D as in the reference": f"{_LOSS} --model.head.gates-std 0.5",
    "ff-qkv-loss, 2 modules, D with a standard deviation of 2 (our preset)": _LOSS,
}


def train_row(name: str, flags: str, runs: Path) -> float:
    """The validation loss that a row's command ends with."""
    run = runs / f"{list(ROWS).index(name):02d}"
    verb, *rest = shlex.split(COMMAND)[1:]
    arguments = [verb, *rest, *shlex.split(flags), "--out", str(run), *(["--resume"] if run.exists() else [])]
    subprocess.run([sys.executable, "-m", "terseformer", *arguments], cwd=ROOT, check=True)
    losses = [line["validation/loss"] for line in read_metrics(run / METRICS) if "validation/loss" in line]
    return losses[-1]


def main() -> None:
    """Trains what is missing, then renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations", help="folder of the checkpoints")
    parser.add_argument("--render", action="store_true", help="only write the table")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, flags in ROWS.items():
        if flags not in results and not args.render:
            results[flags] = train_row(name, flags, args.runs)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    lines = ["| change | flags | validation loss |", "|---|---|---:|"]
    lines += [f"| {name} | `{flags}` | {results[flags]:.3f} |" for name, flags in ROWS.items() if flags in results]
    replace_between("results.md", "ablations", "\n".join(lines))


if __name__ == "__main__":
    main()
