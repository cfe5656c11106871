"""Model configurations in Hugging Face's form."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from terseformer.config import EncoderDecoderConfig, ModelConfig, Seq2SeqConfig, TerraformerConfig
from terseformer.configfile import model_from_dict, to_dict
from terseformer.folder import FOREIGN_KEYS, MODEL_TYPE
from terseformer.interop.hf.registration import register_models

_NAMES = {cls.kind: [f.name for f in fields(cls)] for cls in (ModelConfig, Seq2SeqConfig, TerraformerConfig)}


class TerseformerConfig(PreTrainedConfig):
    """The configuration of a model of any kind: its keys are attributes, and its parts are dictionaries.

    Args:
        values: keys of a `config.json`; those of the model that are left out have its kind's defaults.

    Raises:
        ConfigError: a key or value that the model's kind does not have.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **values: Any) -> None:
        kind = values.get("kind", ModelConfig.kind)
        own = {name: values.pop(name) for name in _NAMES.get(kind, ["kind"]) if name in values}
        model = model_from_dict(own)
        is_decoder = isinstance(model, ModelConfig)
        values |= {"is_encoder_decoder": not is_decoder, "tie_word_embeddings": getattr(model.head, "tied", False)}
        for name, value in to_dict(model).items():  # before they are asked for
            setattr(self, name, value)
        super().__init__(**values)
        register_models()

    def to_model_config(self) -> ModelConfig | EncoderDecoderConfig:
        """The same as this package's own dataclass. Raises ConfigError where an attribute was changed to no use."""
        return model_from_dict({name: getattr(self, name) for name in _NAMES[self.kind]})

    def to_dict(self) -> dict[str, Any]:
        """What stands in a `config.json`: the model's keys, and the few others that this package lets pass."""
        names = {*_NAMES[self.kind], *FOREIGN_KEYS}
        return {name: value for name, value in super().to_dict().items() if name in names}
