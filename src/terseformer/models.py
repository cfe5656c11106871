"""The model that a configuration names."""

from __future__ import annotations

from terseformer.config import EncoderDecoderConfig, ModelConfig, Seq2SeqConfig
from terseformer.model import CausalLM
from terseformer.seq2seq import Seq2Seq
from terseformer.terraformer import Terraformer

AnyModel = CausalLM | Seq2Seq | Terraformer


def make_model(config: ModelConfig | EncoderDecoderConfig) -> AnyModel:
    """A model with new weights."""
    if isinstance(config, ModelConfig):
        return CausalLM(config)
    return Seq2Seq(config) if isinstance(config, Seq2SeqConfig) else Terraformer(config)
