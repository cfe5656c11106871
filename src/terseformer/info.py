"""What a model costs, and what this installation runs on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from terseformer import native
from terseformer.accounting import account
from terseformer.config import ConfigError, EncoderDecoderConfig, ModelConfig
from terseformer.errors import UserError
from terseformer.presets import PRESETS, dense_twin, preset
from terseformer.recipe import load_recipe


def show(model: str, context: int = 0) -> None:
    """Prints the costs of a checkpoint, recipe or preset, or of all presets, and the machine.

    Args:
        model: a checkpoint's or run's folder, a recipe's path or a preset's name; empty: the presets.
        context: tokens that attention looks at.

    Raises:
        CheckpointError, ConfigError: there is no such thing, or it is damaged.
        UserError: the instruction set that was asked for is unknown here.
    """
    console = Console(highlight=False, soft_wrap=True)
    if model:
        _show_model(console, model, _config(model), context)
    else:
        _show_presets(console, context)
    _show_machine(console)


def _config(model: str) -> ModelConfig | EncoderDecoderConfig:
    path = Path(model)
    if path.is_dir():
        from terseformer.folder import find, load_config

        return load_config(find(path))
    if path.suffix == ".toml":
        return load_recipe(path).model
    try:
        return preset(model)
    except ConfigError as error:
        raise ConfigError(f"{model!r} is neither a folder nor a recipe (.toml), and {error}") from None


def _table(first: str, *numbers: str, title: str | None = None) -> Table:
    return Table(Column(first, no_wrap=True), *(Column(name, justify="right") for name in numbers), title=title)


def _show_model(console: Console, name: str, config: ModelConfig | EncoderDecoderConfig, context: int) -> None:
    costs = account(config, context)
    table = _table("part", "count", "parameters", "read per token", "multiply-adds per token", title=name)
    for part in costs.parts:
        total = part.total
        table.add_row(
            part.name, str(part.count), f"{total.parameters:,}", f"{total.parameters_read:,}", f"{total.macs:,}"
        )
    table.add_section()
    total = costs.total
    table.add_row("all", "", f"{total.parameters:,}", f"{total.parameters_read:,}", f"{total.macs:,}", style="bold")
    console.print(table, soft_wrap=False)
    console.print(f"a token: {costs.flops_per_token:,} FLOPs, {costs.bytes_per_token(4) / 1e6:,.2f} MB of f32 weights")
    try:
        twin = account(dense_twin(config), context)
    except ConfigError:
        return console.print("there is no dense twin within 1 % of its parameters")
    console.print(
        f"the dense twin, {twin.parameters:,} parameters: {twin.flops_per_token:,} FLOPs, "
        f"{twin.bytes_per_token(4) / 1e6:,.2f} MB"
    )


def _show_presets(console: Console, context: int) -> None:
    table = _table("preset", "parameters", "read per token", "share", "FLOPs per token")
    for name, config in PRESETS.items():
        costs = account(config, context)
        read = costs.total.parameters_read
        share = f"{read / costs.parameters:.1%}"
        table.add_row(name, short(costs.parameters), short(read), share, short(costs.flops_per_token))
    console.print(table, soft_wrap=False)


def short(number: int) -> str:
    """A large number for people: `1.43 M`, `7.18 G`."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _show_machine(console: Console) -> None:
    import torch

    packages = []
    for name in ("terseformer", "torch", "accelerate", "tokenizers", "numpy"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} (not installed)")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        instructions = f"instruction set {native.isa()} of {', '.join(native.supported_isas())}"
    except ValueError as error:  # TERSE_ISA
        raise UserError(str(error)) from None
    console.print(f"{', '.join(packages)}, Python {platform.python_version()}")
    console.print(
        f"{device}, {native.physical_cores()} physical cores allowed, {torch.get_num_threads()} threads of PyTorch, "
        f"{instructions}"
    )
