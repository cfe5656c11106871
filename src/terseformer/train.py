"""Training: the one place that knows about optimisers, processes and checkpoints at once.

Nothing about a step is remembered but weights and optimiser state: batches, learning rate and noise
are functions of (seed, step, rank), so that a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import checkpoint, data
from terseformer.config import ConfigError, Recipe
from terseformer.controller_stats import ControllerStatistics, ControllerUse
from terseformer.errors import UserError
from terseformer.evaluate import Evaluation, evaluate
from terseformer.layers.feedforward import SparseFeedForward
from terseformer.layers.head import MixedHead
from terseformer.model import CausalLM
from terseformer.optim import learning_rate, make_optimizer, set_learning_rate
from terseformer.training_log import TrainingLog


class TrainingError(UserError):
    """A training that cannot go on: the message says at which step, why, and what is safe."""


class Interrupted(Exception):
    """Ctrl-C or a termination signal: the state is saved in `checkpoint`."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"interrupted; everything is saved in {path}; go on with --resume")
        self.checkpoint = path


@dataclass(frozen=True)
class Step:
    """What one step did."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean training loss of this process, nats per token."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the step, over all processes."""
    seconds: float


class Trainer:
    """A model in training, one step at a time.

    Args:
        recipe: model, data and training.
        run: folder of the checkpoints.
        prepared: the token files.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """

    def __init__(self, recipe: Recipe, run: Path, prepared: data.PreparedData, accelerator: Accelerator) -> None:
        config = recipe.train
        if prepared.train.vocab_size > recipe.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {prepared.train.vocab_size} tokens, but model.vocab_size = {recipe.model.vocab_size}; "
                "set it, or data.vocab_size, so that they agree"
            )
        self.recipe, self.run, self.data, self.accelerator = recipe, run, prepared, accelerator
        torch.manual_seed(config.seed)
        self.model = CausalLM(recipe.model)
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self._sparse = [layer for layer in self.model.modules() if isinstance(layer, SparseFeedForward)]
        self._first_quant_probs = [layer.quant_prob for layer in self._sparse]
        data.num_windows(len(prepared.train.tokens), config.sequence_length)  # raises if the corpus is too short
        self._wrapped: nn.Module = self.model

    def resume(self, path: Path) -> None:
        """Takes weights, optimiser state and step from a checkpoint. Raises CheckpointError."""
        state = checkpoint.load_training(path)
        checkpoint.check_same_recipe(self.recipe, state.recipe, path)
        checkpoint.load_weights(self.model, path)
        checkpoint.restore_optimizer(self.model, self.optimizer, state.optimizer)
        self.step = state.step

    def start(self) -> None:
        """Hands the model to its device, its processes and, if asked for, the compiler."""
        if self.recipe.train.compile:
            self.model.compile()
        wrapped, prepared = self.accelerator.prepare(self.model, self.optimizer)
        self._wrapped = wrapped
        self._prepared_optimizer = prepared
        self._wrapped.train()

    def advance(self) -> Step:
        """One optimiser step.

        Raises:
            TrainingError: the loss or a gradient is not finite; weights and checkpoints are those before the step.
        """
        config, accelerator = self.recipe.train, self.accelerator
        started = time.perf_counter()
        rate = learning_rate(config, self.step)
        set_learning_rate(self.optimizer, rate)
        self._set_quant_prob()
        self._seed_noise()
        parts = self._batch().chunk(config.gradient_accumulation_steps)
        loss = 0.0
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self._wrapped):
                part_loss = self._loss(part) / len(parts)
                accelerator.backward(part_loss)
            loss += float(part_loss.detach())
        limit = config.max_grad_norm or math.inf
        norm = float(accelerator.clip_grad_norm_(self._wrapped.parameters(), limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(self._describe_failure(loss, norm))
        self._prepared_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        return Step(self.step, loss, rate, norm, config.batch_size * config.sequence_length, seconds)

    def evaluate(self, num_sequences: int | None = None) -> tuple[Evaluation, dict[str, ControllerUse]]:
        """Loss on the validation text, and how the controllers choose there."""
        config = self.recipe.train
        limit = config.evaluate_sequences if num_sequences is None else num_sequences
        with ControllerStatistics(self.model) as statistics:
            result = evaluate(
                self.model,
                self.data.validation,
                config.sequence_length,
                limit,
                tokenizer=self.data.tokenizer,
            )
        return result, statistics.results()

    def save(self) -> Path:
        """Writes a checkpoint. Raises CheckpointError."""
        return checkpoint.save(
            self.run,
            self.step,
            self.model,
            self.optimizer,
            self.recipe,
            self.data.tokenizer_path,
            self.data.train.end_of_text_id,
            self.recipe.train.keep_checkpoints,
        )

    def _batch(self) -> Tensor:
        config, accelerator = self.recipe.train, self.accelerator
        windows = data.batch(
            self.data.train.tokens,
            seed=config.seed,
            step=self.step,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
        )
        return torch.from_numpy(windows).to(accelerator.device)

    def _loss(self, windows: Tensor) -> Tensor:
        with self.accelerator.autocast():
            logits = self._wrapped(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def _seed_noise(self) -> None:
        key = f"{self.recipe.train.seed}/{self.step}/{self.accelerator.process_index}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)

    def _set_quant_prob(self) -> None:
        last = self.recipe.train.final_quant_prob
        if last is not None:
            share = self.step / max(1, self.recipe.train.steps - 1)
            for layer, first in zip(self._sparse, self._first_quant_probs, strict=True):
                if layer.policy == "straight_through":
                    layer.quant_prob = first + (last - first) * share

    def _describe_failure(self, loss: float, norm: float) -> str:
        """Names the step, the first layer with a value that is not finite, and the last good checkpoint."""
        where = None
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                where = f"the weight {name}"
                break
        if where is None:
            self._seed_noise()
            where = self._first_bad_output()
        if where is None:
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            where = f"the gradient of {bad[-1]}" if bad else "the loss"
        whole = checkpoint.checkpoints(self.run)
        safe = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        return (
            f"step {self.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}; the first value that is not "
            f"finite is in {where}; {safe}; lower train.learning_rate or train.max_grad_norm"
        )

    def _first_bad_output(self) -> str | None:
        found: list[str] = []
        names = {module: name for name, module in self.model.named_modules()}

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                found.append(names[module])

        hooks = [module.register_forward_hook(look) for module in names if module is not self.model]
        try:
            with torch.no_grad():
                self.model(self._batch()[:, :-1])
        finally:
            for hook in hooks:
                hook.remove()
        return f"the output of {found[0]}" if found else None


def make_accelerator(recipe: Recipe) -> Accelerator:
    """One process on CPU or GPU, or those that torchrun started."""
    kwargs = []
    head = recipe.model.head
    if getattr(head, "sparse_prob", 1.0) < 1.0:  # a call leaves one of the two heads without gradient
        kwargs.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    precision = "bf16" if recipe.train.precision == "bf16" else "no"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=kwargs)


def train(recipe: Recipe, run: Path, resume: str | Path | None = None, quiet: bool = False) -> Path:
    """Trains a recipe to its end.

    Args:
        recipe: model, data and training.
        run: folder of checkpoints, curves and samples.
        resume: a checkpoint or run folder to go on from; None starts anew.
        quiet: no progress on the terminal.

    Returns:
        The last checkpoint.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        TrainingError, CheckpointError, ConfigError, DataError: as their messages say.
    """
    accelerator = make_accelerator(recipe)
    main = accelerator.is_main_process
    if resume is None and checkpoint.checkpoints(run):
        raise ConfigError(f"{run} holds checkpoints already; go on with --resume, or choose another folder with --out")
    with accelerator.main_process_first():
        prepared = data.prepare_in_cache(recipe.data)
    trainer = Trainer(recipe, run, prepared, accelerator)
    if resume is not None:
        trainer.resume(checkpoint.find(resume))
    trainer.start()
    config = recipe.train
    last_saved = trainer.step if resume is not None else -1
    path = run
    with TrainingLog(run if main else None, recipe, trainer.step, quiet or not main) as log, _signals() as stop:
        while trainer.step < config.steps:
            step = trainer.advance()
            log.step(step)
            done = trainer.step == config.steps
            if main and (done or _due(trainer.step, config.evaluate_every)):
                result, use = trainer.evaluate(0 if done else None)
                log.evaluation(trainer.step, result, use, _sample(trainer))
            interrupted = _any_process(accelerator, bool(stop))
            if done or interrupted or _due(trainer.step, config.checkpoint_every):
                if main:
                    path = trainer.save()
                accelerator.wait_for_everyone()
                last_saved = trainer.step
            if interrupted and not done:
                raise Interrupted(path)
    accelerator.end_training()
    return path if last_saved != -1 and path != run else checkpoint.find(run)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _sample(trainer: Trainer) -> str:
    from terseformer.generate import generate
    from terseformer.sampling import SamplingConfig

    config = SamplingConfig(max_new_tokens=40, temperature=0.8, seed=0)
    return generate(trainer.model, trainer.data.tokenizer, trainer.recipe.train.sample_prompt, config)[0].text


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step is finished and saved; a second one acts at once."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        for one, handler in previous.items():
            signal.signal(one, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
