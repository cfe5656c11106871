"""Training: the one place that knows about optimisers, processes and checkpoints at once.

Nothing about a step is remembered but weights and optimiser state: batches, learning rate and noise
are functions of (seed, step, rank), so that a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from terseformer import checkpoint, data
from terseformer.config import ConfigError, Recipe
from terseformer.controller_stats import ControllerStatistics, ControllerUse
from terseformer.errors import UserError
from terseformer.evaluation import Evaluation
from terseformer.generation import generate
from terseformer.layers.feedforward import SparseFeedForward
from terseformer.layers.reversible import ReversibleStack
from terseformer.models import make_model
from terseformer.objectives import Loss, Pairs, Part, make_objective
from terseformer.optim import learning_rate, make_optimizer, set_learning_rate
from terseformer.recipe import with_initial_tokenizer
from terseformer.sampling import SamplingConfig
from terseformer.sharding import gathered_rest, shard_rest, sharding_units, whole
from terseformer.training_log import Step, TrainingLog


class TrainingError(UserError):
    """A training that cannot go on: the message says at which step, why, and what is safe."""


class Interrupted(Exception):
    """Ctrl-C or a termination signal: the state is saved in `checkpoint`."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"interrupted; everything is saved in {path}; go on with --resume")
        self.checkpoint = path


class Trainer:
    """A model in training, one step at a time: make it, `resume` if need be, `start`, then `advance`.

    Args:
        recipe: model, data and training.
        run: folder of the checkpoints.
        prepared: the token files.
        accelerator: the processes.

    Raises:
        ConfigError: parts of the recipe do not fit each other or the number of processes.
        DataError: the text is shorter than one sequence.
    """

    def __init__(self, recipe: Recipe, run: Path, prepared: data.PreparedData, accelerator: Accelerator) -> None:
        _check(recipe, prepared, accelerator.num_processes)
        self.recipe, self.run, self.data, self.accelerator = recipe, run, prepared, accelerator
        self.step = 0
        torch.manual_seed(recipe.train.seed)
        self.objective = make_objective(recipe, prepared)
        mesh = _mesh(recipe, accelerator)
        self.is_sharded = mesh is not None
        with sharding_units(mesh):
            self.model = make_model(recipe.model)
        self._loss: nn.Module = Loss(self.model)
        if mesh is None:
            self.model.to(accelerator.device)
        else:
            shard_rest(self._loss, mesh)
        self.optimizer = make_optimizer(self.model, recipe.train)
        for module in self.model.modules():
            if isinstance(module, ReversibleStack):
                module.keeps_activations = recipe.train.keep_activations
        self._controlled = [
            (layer, layer.quant_prob)
            for layer in self.model.modules()
            if isinstance(layer, SparseFeedForward) and layer.policy == "straight_through"
        ]

    def resume(self, path: Path) -> None:
        """Takes weights, optimiser state and step from a checkpoint. Raises CheckpointError."""
        state = checkpoint.load_training(path, check=self.accelerator.is_main_process)
        checkpoint.check_same_run(state, path, self.recipe, self.data)
        checkpoint.load_weights(self.model, path)
        checkpoint.restore_optimizer(self.model, self.optimizer, path)
        self.step = state.step

    def begin_from(self, folder: Path) -> None:
        """Takes the weights of a checkpoint that knows the same tokens.

        Raises:
            CheckpointError: there is none, it is damaged, or it holds another model.
            ConfigError: it has another tokenizer.
        """
        path = checkpoint.find(folder)
        if data.fingerprint(data.load_tokenizer(path)) != data.fingerprint(self.data.tokenizer):
            raise ConfigError(
                f"train.initial_checkpoint = {str(folder)!r} has another tokenizer than the text; "
                "leave data.tokenizer empty"
            )
        advice = f"change the recipe's model or train.initial_checkpoint = {str(folder)!r}"
        kind, own = checkpoint.load_config(path).kind, self.recipe.model.kind
        if kind != own:
            raise checkpoint.CheckpointError(
                f"{path} holds a model of kind {kind!r}, the recipe's is {own!r}; {advice}"
            )
        checkpoint.load_weights(self.model, path, "the recipe's model", advice)

    def start(self) -> None:
        """Hands the model to the compiler, if asked for, and to all processes."""
        if self.recipe.train.compile:
            # A controller tosses its coin outside of the graph; that is meant and nothing to warn users of.
            logging.getLogger("torch._dynamo.variables.tensor").setLevel(logging.ERROR)
            self._loss.compile()
        if not self.is_sharded:
            self._loss = self.accelerator.prepare_model(self._loss)
        self._loss.train()

    def advance(self) -> Step:
        """One optimiser step.

        Raises:
            TrainingError: the loss or a gradient is not finite; weights and checkpoints are those before the step.
        """
        config = self.recipe.train
        started = time.perf_counter()
        rate = learning_rate(config, self.step)
        set_learning_rate(self.optimizer, rate)
        self._set_quant_prob()
        self._seed_noise(self.accelerator.process_index)
        loss, num_targets = self._accumulate_gradients()
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:g} and the norm of its gradient {norm:g}; the first value "
                f"that is not finite is in {self._first_bad()}; {checkpoint.last_good(self.run)}; "
                "lower train.learning_rate or train.max_grad_norm"
            )
        if config.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), config.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Step(self.step, float(loss), rate, float(norm), num_targets, time.perf_counter() - started)

    def evaluate(self, num_sequences: int | None = None) -> tuple[Evaluation, dict[str, ControllerUse]]:
        """Loss on the validation text, and how the controllers choose there.

        Of a sharded model, all processes call this together, after the first step; so for `sample`.

        Args:
            num_sequences: sequences at most; 0 takes all, None as many as the recipe says.
        """
        config = self.recipe.train
        limit = config.evaluate_sequences if num_sequences is None else num_sequences
        with self._together(), ControllerStatistics(self.model) as statistics:
            result = self.objective.evaluate(self.model, limit)
        return result, statistics.results()

    def sample(self) -> str:
        """What the model writes after the recipe's prompt, or for a source."""
        sampling = SamplingConfig(max_new_tokens=40, temperature=0.8)
        with self._together():
            return generate(self.model, self.data.tokenizer, self.objective.prompt(), sampling)[0].text

    def save(self) -> Path:
        """Writes a checkpoint, once for all processes. Raises CheckpointError."""
        is_main = self.accelerator.is_main_process
        if is_main or self.is_sharded:
            checkpoint.save(self.run, self.step, self.model, self.optimizer, self.recipe, self.data, is_main)
        self.accelerator.wait_for_everyone()
        return checkpoint.folder_of(self.run, self.step)

    def _parts(self) -> list[Part]:
        """This process's share of the present step's batch, in parts whose gradients are accumulated."""
        device, processes = self.accelerator.device, self.accelerator
        parts = self.objective.parts(self.step, processes.process_index, processes.num_processes)
        return [tuple(tensor.to(device) for tensor in part) for part in parts]

    def _sum_of_losses(self, loss: nn.Module, part: Part) -> Tensor:
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16):
            return loss(*part)

    def _accumulate_gradients(self) -> tuple[Tensor, int]:
        """Leaves the gradients of the mean loss, over all processes, in the parameters; gives that loss.

        Returns:
            The loss, in nats per token, and the number of tokens that were predicted.
        """
        parts, processes = self._parts(), self.accelerator
        num_targets = torch.tensor(sum(map(self.objective.num_targets, parts)), device=processes.device)
        num_targets = int(processes.reduce(num_targets, "sum"))
        total = torch.zeros((), device=processes.device)
        for index, part in enumerate(parts):
            # Shards are summed at once: gradients that wait for the last part would be whole.
            is_summed = self.is_sharded or index == len(parts) - 1
            with nullcontext() if is_summed else processes.no_sync(self._loss):
                loss = self._sum_of_losses(self._loss, part) / num_targets
                processes.backward(loss * processes.num_processes)  # of which the gradients' mean is taken
            total += loss.detach()
        return processes.reduce(total, "sum"), num_targets

    @contextmanager
    def _together(self) -> Iterator[None]:
        """In the block, processes that share a model compute the same."""
        if self.is_sharded:
            self._seed_noise(0)
        with gathered_rest(self._loss):
            yield

    def _seed_noise(self, process: int) -> None:
        key = f"{self.recipe.train.seed}/{self.step}/{process}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)

    def _set_quant_prob(self) -> None:
        config = self.recipe.train
        if config.final_quant_prob is not None:
            progress = self.step / max(1, config.steps - 1)
            for layer, first in self._controlled:
                layer.quant_prob = first + (config.final_quant_prob - first) * progress

    def _first_bad(self) -> str:
        """Where the first value is that is not finite."""
        for name, parameter in self.model.named_parameters():
            if _is_bad(parameter):
                return f"the weight {name}"
        names = self._bad_outputs()
        if _any_process(self.accelerator, bool(names)):
            return f"the output of {names[0]}" if names else "a layer's output in another process"
        for name, parameter in reversed([*self.model.named_parameters()]):  # gradients come from the last layer first
            if _is_bad(parameter.grad):
                return f"the gradient of {name}"
        return "the loss"

    def _bad_outputs(self) -> list[str]:
        """Layers whose output is not finite when the step's forward passes are repeated with the same noise."""
        found: list[str] = []

        def note(name: str, output: Any) -> None:
            if _is_bad(output):
                found.append(name)

        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
            for name, module in self.model.named_modules()
            if module is not self.model
        ]
        self._seed_noise(self.accelerator.process_index)
        try:
            with torch.no_grad():
                loss = self._loss if self.is_sharded else Loss(self.model)
                for part in self._parts():
                    self._sum_of_losses(loss, part)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _is_bad(value: Any) -> bool:
    return isinstance(value, Tensor) and not bool(whole(value.isfinite().all()))


def _check(recipe: Recipe, prepared: data.PreparedData, num_processes: int) -> None:
    """Raises ConfigError or DataError for what would fail later, perhaps after hours."""
    config = recipe.train
    if prepared.train.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {prepared.train.vocab_size} tokens, but model.vocab_size = {recipe.model.vocab_size}; "
            "set it, or data.vocab_size, so that they agree"
        )
    parts = num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ConfigError(
            f"train.batch_size = {config.batch_size} cannot be divided among {num_processes} processes and "
            f"train.gradient_accumulation_steps = {config.gradient_accumulation_steps}; make it a multiple of {parts}"
        )
    prompt = len(prepared.tokenizer.encode(config.sample_prompt).ids)
    if prompt >= recipe.model.max_position_embeddings:
        raise ConfigError(
            f"train.sample_prompt has {prompt} tokens, but model.max_position_embeddings = "
            f"{recipe.model.max_position_embeddings}; shorten it"
        )


def _mesh(recipe: Recipe, accelerator: Accelerator) -> DeviceMesh | None:
    """The processes that share the model; None where each holds all of it."""
    if recipe.train.parallelism == "ddp" or accelerator.num_processes == 1:
        return None
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def make_accelerator(recipe: Recipe) -> Accelerator:
    """One process on CPU or GPU, or those that torchrun started."""
    mixed_head = getattr(recipe.model.head, "sparse_prob", 1.0) < 1  # a call leaves one of its two parts out
    parallel = DistributedDataParallelKwargs(find_unused_parameters=mixed_head, gradient_as_bucket_view=True)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while one prepares or validates
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[parallel, patience])


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
    start = None if resume is None else checkpoint.find(resume)
    recipe = with_initial_tokenizer(recipe, start)
    if checkpoint.checkpoints(run) and (start is None or start.resolve().parent != run.resolve()):
        raise ConfigError(f"{run} holds checkpoints already; go on with --resume, or choose another folder with --out")
    accelerator = make_accelerator(recipe)
    try:
        with accelerator.local_main_process_first():
            prepared = data.prepare_in_cache(recipe.data)
        trainer = Trainer(recipe, run, prepared, accelerator)
        if start is not None:
            trainer.resume(start)
        elif recipe.train.initial_checkpoint:
            trainer.begin_from(Path(recipe.train.initial_checkpoint))
        trainer.start()
        return _go_on(trainer, quiet) or start or run
    finally:
        accelerator.end_training()


def _go_on(trainer: Trainer, quiet: bool) -> Path | None:
    """Advances to the last step, validates and saves; gives the last checkpoint that was saved."""
    config, accelerator, run = trainer.recipe.train, trainer.accelerator, trainer.run
    is_main = accelerator.is_main_process
    path = None
    try:
        with (
            _signals() as signals,
            TrainingLog(run if is_main else None, config, trainer.step, quiet or not is_main) as log,
        ):
            if isinstance(trainer.objective, Pairs) and trainer.objective.left_out:
                log.note(trainer.objective.left_out)
            while trainer.step < config.steps:
                log.step(trainer.advance())
                is_done = trainer.step == config.steps
                is_evaluated = is_done or _is_due(trainer.step, config.evaluate_every)
                if is_evaluated and (is_main or trainer.is_sharded):
                    log.evaluation(trainer.step, *trainer.evaluate(0 if is_done else None), trainer.sample())
                is_stopped = _any_process(accelerator, bool(signals))
                if is_done or is_stopped or _is_due(trainer.step, config.checkpoint_every):
                    path = trainer.save()
                    if is_stopped and not is_done:
                        raise Interrupted(path)
    except OSError as error:
        raise TrainingError(
            f"step {trainer.step}: the curves cannot be written: {error}; {checkpoint.last_good(run)}; "
            "mend this and go on with --resume"
        ) from error
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            f"step {trainer.step + 1}: another process has ended or cannot be reached; {checkpoint.last_good(run)}; "
            f"go on with --resume ({error})"
        ) from error
    return path


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step is finished and saved; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
