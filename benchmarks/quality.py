"""Trains a family of models at equal parameters and equal tokens, and writes the table and curves of docs/results.md.

    python benchmarks/quality.py recipes/small-1m.toml
    python benchmarks/quality.py recipes/small-1m.toml --variants dense ff16 --seeds 1 2
    python benchmarks/quality.py --render

A run that is done is not repeated, one that was interrupted goes on. `--render` writes the document
from the results that lie in docs/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from document import ROOT, replace_between

from terseformer import checkpoint
from terseformer.accounting import account
from terseformer.presets import preset
from terseformer.recipe import load_recipe
from terseformer.training import train
from terseformer.training_log import METRICS, read_metrics

RESULTS = ROOT / "docs" / "results"
VARIANTS = ("dense", "ff8", "ff16", "ff32", "ff64", "qkv", "ff-qkv", "ff-qkv-loss")


def run(recipe_path: Path, variant: str, seed: int, runs: Path) -> None:
    """Trains one model and keeps its result and curve."""
    recipe = load_recipe(recipe_path)
    name = f"{recipe_path.stem}-{variant}"
    recipe = replace(recipe, model=preset(name), train=replace(recipe.train, seed=seed))
    target = RESULTS / f"{name}-seed{seed}.json"
    if target.exists():
        return
    folder = runs / f"{name}-seed{seed}"
    started = checkpoint.checkpoints(folder)
    if not started or checkpoint.load_training(started[-1]).step < recipe.train.steps:
        print(f"training {name}, seed {seed}", flush=True)
        train(recipe, folder, resume=started[-1] if started else None)
    metrics = read_metrics(folder / METRICS)
    curve = [(line["step"], line["validation/loss"]) for line in metrics if "validation/loss" in line]
    last = next(line for line in reversed(metrics) if "validation/loss" in line)
    costs = account(recipe.model)
    used = [value for key, value in last.items() if key.endswith("/share_used")]
    result = {
        "preset": name,
        "seed": seed,
        "steps": recipe.train.steps,
        "tokens": recipe.train.steps * recipe.train.batch_size * recipe.train.sequence_length,
        "parameters": costs.parameters,
        "bytes_per_token": costs.bytes_per_token(4),
        "validation_loss": last["validation/loss"],
        "bits_per_byte": last["validation/bits_per_byte"],
        "share_used": statistics.mean(used) if used else None,
        "curve": curve,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{name}, seed {seed}: validation loss {result['validation_loss']:.4f}", flush=True)


def load_results() -> dict[str, dict[str, list[dict]]]:
    """Results by family and variant, the dense one first."""
    families: dict[str, dict[str, list[dict]]] = {}
    for path in sorted(RESULTS.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts = result["preset"].split("-")
        family, variant = "-".join(parts[:2]), "-".join(parts[2:])
        families.setdefault(family, {}).setdefault(variant, []).append(result)
    order = {name: index for index, name in enumerate(VARIANTS)}
    return {
        family: dict(sorted(variants.items(), key=lambda item: (order.get(item[0], 99), item[0])))
        for family, variants in sorted(families.items())
    }


def table(variants: dict[str, list[dict]], speeds: dict[str, dict]) -> str:
    """A Markdown table of one family."""
    dense = {r["seed"]: r["validation_loss"] for r in variants.get("dense", [])}
    lines = [
        "| model | parameters | read per token | validation loss | against dense | bits per byte | units used "
        "| training step | PyTorch decoding |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, results in variants.items():
        losses = [r["validation_loss"] for r in results]
        shared = [r for r in results if r["seed"] in dense]
        change = statistics.mean(r["validation_loss"] / dense[r["seed"]] - 1 for r in shared) if shared else None
        first = results[0]
        loss = f"{statistics.mean(losses):.3f}"
        if len(losses) > 1:
            loss += f" ± {statistics.stdev(losses):.3f} ({len(losses)} seeds)"
        speed = speeds.get(first["preset"], {})
        cells = [
            name,
            f"{first['parameters'] / 1e6:.2f} M",
            f"{first['bytes_per_token'] / 1e6:.2f} MB",
            loss,
            "" if change is None or name == "dense" else f"{change:+.1%}",
            f"{statistics.mean(r['bits_per_byte'] for r in results):.3f}",
            "" if first["share_used"] is None else f"{first['share_used']:.0%}",
            f"{speed['train_step_seconds'] * 1e3:.0f} ms" if speed else "",
            f"{speed['decode_tokens_per_second']:.0f} tokens/s" if speed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(family: str, variants: dict[str, list[dict]]) -> Path:
    """Validation loss against steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "terseformer"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, results in variants.items():
        steps, losses = zip(*results[0]["curve"], strict=True)
        axes.plot(steps, losses, label=name, linewidth=2.4 if name == "dense" else 1.3)
    axes.set(xlabel="step", ylabel="validation loss, nats per token", title=family)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = RESULTS / f"{family}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def render() -> None:
    """Writes the table and the curves of each family into docs/results.md."""
    for family, variants in load_results().items():
        speed_file = RESULTS / f"{family}-speed.json"
        rows = json.loads(speed_file.read_text(encoding="utf-8"))["rows"] if speed_file.exists() else []
        speeds = {row["name"]: row for row in rows} | ({f"{family}-dense": rows[0]} if rows else {})
        plot(family, variants)
        replace_between("results.md", family, f"{table(variants, speeds)}\n\n![{family}](results/{family}.svg)")


def main() -> None:
    """Trains what is asked for, then renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="a recipe whose name is a family of presets")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="presets of the family, without its name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="folder of the checkpoints")
    parser.add_argument("--render", action="store_true", help="only write the document")
    args = parser.parse_args()
    if not args.render:
        if args.recipe is None:
            parser.error("name a recipe, such as recipes/small-1m.toml, or give --render")
        for seed in args.seeds:
            for variant in args.variants:
                run(args.recipe, variant, seed, args.runs)
    render()


if __name__ == "__main__":
    main()
