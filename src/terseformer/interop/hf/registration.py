"""Makes transformers know this package's models, whichever of the two is imported first, at no cost to either.

The configuration is registered when transformers has loaded its list of configurations: at once if it has, else right
after it does. The models are registered when the first configuration is made, without which none can be asked for:
earlier, transformers may be in the middle of importing what they are derived from.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_LIST = "transformers.models.auto.configuration_auto"
_OLDEST = 5


def register() -> None:
    """Registers the configuration, now or when it can be."""
    if _LIST in sys.modules:
        _register_config()
    else:
        sys.meta_path.insert(0, _Watch())


def _register_config() -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import AutoConfig

    if int(__version__.partition(".")[0]) < _OLDEST:
        warnings.warn(
            f"transformers {__version__} is too old for terseformer's models; for these, install {_OLDEST}.0 or newer",
            stacklevel=2,
        )
        return

    from terseformer.interop.hf.config import TerseformerConfig

    AutoConfig.register(TerseformerConfig.model_type, TerseformerConfig, exist_ok=True)


@cache
def register_models() -> None:
    """Registers what the configuration stands for."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from terseformer.interop.hf.causal_lm import TerseformerForCausalLM
    from terseformer.interop.hf.config import TerseformerConfig
    from terseformer.interop.hf.seq2seq import TerseformerForSeq2SeqLM
    from terseformer.interop.hf.tokenizer import TerseformerTokenizer

    AutoModelForCausalLM.register(TerseformerConfig, TerseformerForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(TerseformerConfig, TerseformerForSeq2SeqLM, exist_ok=True)
    AutoTokenizer.register(TerseformerConfig, fast_tokenizer_class=TerseformerTokenizer, exist_ok=True)


class _Watch:
    """An import hook that waits for one module, finds it as usual, and goes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _LIST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        return None if spec is None else _then_register(spec)


def _then_register(spec: ModuleSpec) -> ModuleSpec:
    loader: Any = spec.loader
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register_config()

    loader.exec_module = execute_and_register
    return spec
