"""What a model costs, and what this installation runs on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from terseformer import native
from terseformer.accounting import account
from terseformer.config import ConfigError, ModelConfig
from terseformer.presets import PRESETS, dense_twin, preset
from terseformer.recipe import load_recipe


def show(model: str, context: int = 0) -> None:
    """Prints the costs of a checkpoint, recipe or preset, or of all presets, and the machine.

    Raises:
        ConfigError: there is no such thing.
    """
    console = Console()
    if model:
        _show_model(console, model, _config(model), context)
    else:
        _show_presets(console, context)
    _show_machine(console)


def _config(model: str) -> ModelConfig:
    path = Path(model)
    if path.is_dir():
        from terseformer import checkpoint

        return checkpoint.load_config(checkpoint.find(path))
    if path.suffix == ".toml":
        return load_recipe(path).model
    try:
        return preset(model)
    except ConfigError as error:
        raise ConfigError(f"{model!r} is neither a folder nor a recipe (.toml), and {error}") from None


def _show_model(console: Console, name: str, config: ModelConfig, context: int) -> None:
    costs = account(config, context)
    table = Table("part", "count", "parameters", "read per token", "multiply-adds per token", title=name)
    for part in costs.parts:
        total = part.total
        table.add_row(
            part.name, str(part.count), f"{total.parameters:,}", f"{total.parameters_read:,}", f"{total.macs:,}"
        )
    table.add_section()
    total = costs.total
    table.add_row("all", "", f"{total.parameters:,}", f"{total.parameters_read:,}", f"{total.macs:,}", style="bold")
    console.print(table)
    twin = account(dense_twin(config), context)
    console.print(
        f"a token: {costs.flops_per_token:,} FLOPs, {costs.bytes_per_token(4) / 1e6:,.2f} MB of f32 weights; "
        f"the dense twin ({twin.parameters:,} parameters): {twin.flops_per_token:,} FLOPs, "
        f"{twin.bytes_per_token(4) / 1e6:,.2f} MB",
        highlight=False,
    )


def _show_presets(console: Console, context: int) -> None:
    table = Table("preset", "parameters", "read per token", "share read", "FLOPs per token")
    for name, config in PRESETS.items():
        costs = account(config, context)
        read = costs.total.parameters_read
        table.add_row(
            name, f"{costs.parameters:,}", f"{read:,}", f"{read / costs.parameters:.1%}", f"{costs.flops_per_token:,}"
        )
    console.print(table)


def _show_machine(console: Console) -> None:
    import torch

    packages = []
    for name in ("terseformer", "torch", "accelerate", "tokenizers", "numpy"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} (not installed)")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console.print(f"{', '.join(packages)}, Python {platform.python_version()}", highlight=False)
    console.print(
        f"{device}; {native.physical_cores()} physical cores allowed, {torch.get_num_threads()} threads of PyTorch; "
        f"instruction set {native.isa()} of {', '.join(native.supported_isas())}",
        highlight=False,
    )
