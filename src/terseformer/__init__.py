"""Terseformer: Scaling Transformers that are trained beside their dense twins and decoded on CPUs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from terseformer.accounting import account as account
    from terseformer.checkpoint import load as load
    from terseformer.config import ModelConfig as ModelConfig
    from terseformer.config import Recipe as Recipe
    from terseformer.config import Seq2SeqConfig as Seq2SeqConfig
    from terseformer.config import TerraformerConfig as TerraformerConfig
    from terseformer.engine import Engine as Engine
    from terseformer.evaluation import evaluate as evaluate
    from terseformer.generation import generate as generate
    from terseformer.generation import stream as stream
    from terseformer.model import CausalLM as CausalLM
    from terseformer.presets import dense_twin as dense_twin
    from terseformer.presets import preset as preset
    from terseformer.recipe import load_recipe as load_recipe
    from terseformer.sampling import SamplingConfig as SamplingConfig
    from terseformer.seq2seq import Seq2Seq as Seq2Seq
    from terseformer.terraformer import Terraformer as Terraformer
    from terseformer.training import train as train

_HOMES = {
    "CausalLM": "model",
    "Engine": "engine",
    "ModelConfig": "config",
    "Recipe": "config",
    "SamplingConfig": "sampling",
    "Seq2Seq": "seq2seq",
    "Seq2SeqConfig": "config",
    "Terraformer": "terraformer",
    "TerraformerConfig": "config",
    "account": "accounting",
    "dense_twin": "presets",
    "evaluate": "evaluation",
    "generate": "generation",
    "load": "checkpoint",
    "load_recipe": "recipe",
    "preset": "presets",
    "stream": "generation",
    "train": "training",
}

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `import terseformer` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'terseformer' has no attribute {name!r}")
    value = getattr(import_module(f"terseformer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


import_module("terseformer.interop.hf.registration").register()  # so that transformers knows the models
