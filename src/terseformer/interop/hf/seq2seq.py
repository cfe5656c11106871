"""`Seq2Seq` and `Terraformer` in Hugging Face's form."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from terseformer.config import ConfigError, ModelConfig
from terseformer.interop.hf.config import TerseformerConfig
from terseformer.interop.hf.model import TerseformerModel, cache_for, last, refuse, token_loss
from terseformer.interop.hf.padding import Rows, real_tokens
from terseformer.seq2seq import Seq2Seq
from terseformer.terraformer import Terraformer


class TerseformerForSeq2SeqLM(TerseformerModel):
    """An encoder-decoder of either kind. The decoder starts with the padding token.

    Raises:
        ConfigError: the configuration is of a causal language model.
    """

    def __init__(self, config: TerseformerConfig) -> None:
        if config.kind == ModelConfig.kind:
            raise ConfigError(f"a model of kind {config.kind!r} is loaded by AutoModelForCausalLM")
        super().__init__(config)
        if hasattr(self, "encoder"):  # a Terraformer's: `generate` asks for its name
            self.encoder.__dict__["main_input_name"] = self.main_input_name
        self._name_tokens()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The model of a folder or of a repository. Raises CheckpointError as that of a causal language model does."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._name_tokens()
        return loaded

    def _name_tokens(self) -> None:
        """Tells `generate` which tokens fill up sources and start targets."""
        self.generation_config.pad_token_id = self.config.pad_token_id
        self.generation_config.decoder_start_token_id = self.config.pad_token_id

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """The encoder by itself, as `generate` calls it once for all tokens of a target."""
        return _Encoder(self)

    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "B T"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits of a target's next token at each position, and with labels their loss.

        Args:
            input_ids: the source.
            attention_mask: 0 at the source's padding, which may stand anywhere; default: there is none.
            decoder_input_ids: the target, begun with the padding token; default: made of the labels.
            decoder_attention_mask: 0 at the target's padding.
            labels: the target without its start, -100 where no loss is wanted.
            encoder_outputs: what `get_encoder()` gives for the source, in its place.
            past_key_values: what an earlier call gave; the target is then what follows, and the source is known.
            use_cache: whether to give a cache that has read the target; default: if one was given.
            logits_to_keep: last positions whose logits are given, or their index; 0: all.
            num_items_in_batch: what the sum of the losses is divided by; default: the number of labels.
            return_dict: False: give a tuple.
            inputs_embeds: not known, like the next three.
            decoder_inputs_embeds: not known.
            output_attentions: not known.
            output_hidden_states: not known.

        Raises:
            UserError: something that is not known; a mask of another shape; a cache in training.
        """
        refuse(inputs_embeds=inputs_embeds, decoder_inputs_embeds=decoder_inputs_embeds)
        refuse(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        own, real = self.own, real_tokens(decoder_attention_mask, decoder_input_ids)
        cache = cache_for(self, past_key_values, use_cache)
        if encoder_outputs is None and (cache is None or cache.is_new):
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        encoded: Any = None if encoder_outputs is None else encoder_outputs[0]
        if cache is not None:
            if cache.is_new:
                source = _for_decoder(own, encoded, attention_mask)
                cache.begin(own.state_after(*source, decoder_input_ids.shape[1]))
            logits = last(cache.read(decoder_input_ids, real, own.decode), logits_to_keep)
        else:
            rows = Rows(real)
            hidden = own.hidden(*_for_decoder(own, encoded, attention_mask), rows.real_first(decoder_input_ids))
            logits = own.head(last(rows.as_given(hidden), logits_to_keep))
        loss = None if labels is None else token_loss(logits, labels, num_items_in_batch)
        known: dict[str, Any] = {"past_key_values": cache, "encoder_last_hidden_state": encoded}
        output = Seq2SeqLMOutput(loss=loss, logits=logits, **known)
        return output.to_tuple() if return_dict is False else output

    def prepare_decoder_input_ids_from_labels(self, labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The labels behind the padding token, without the last; padding where they are -100."""
        start = labels.new_full((len(labels), 1), self.config.pad_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, self.config.pad_token_id)], dim=1)

    def prepare_inputs_for_generation(  # pyrefly: ignore[bad-override, bad-override-param-name]
        self,
        input_ids: Int[Tensor, "B T"],
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,  # by this name `generate` knows that it may give whatever `forward` takes
    ) -> dict[str, Any]:
        """What `generate` calls the model with: the target's tokens that the cache has not read."""
        inputs = {
            "decoder_input_ids": input_ids[:, past_key_values.get_seq_length() if past_key_values is not None else 0 :],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        return {name: value for name, value in inputs.items() if value is not None}


class _Encoder(nn.Module):
    """From sources to their hidden vectors, [B, N, D]; a Terraformer's two streams stand side by side, [B, N, 2 D]."""

    main_input_name = "input_ids"

    def __init__(self, model: TerseformerForSeq2SeqLM) -> None:
        super().__init__()
        self._model = model

    def forward(
        self,
        input_ids: Int[Tensor, "B N"],
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        refuse(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        rows = Rows(real_tokens(attention_mask, input_ids))
        encoded, _ = self._model.own.encode(rows.real_first(input_ids), rows.lengths)
        hidden = torch.cat(encoded, dim=-1) if isinstance(encoded, tuple) else encoded
        output = BaseModelOutput(last_hidden_state=rows.as_given(hidden))
        return output.to_tuple() if return_dict is False else output


def _for_decoder(own: Seq2Seq | Terraformer, hidden: Tensor, attention_mask: Tensor | None) -> tuple[Any, Tensor]:
    """What the encoder gave, as `state_after` and `hidden` of a model of this package take it."""
    rows = Rows(real_tokens(attention_mask, hidden))
    encoded = rows.real_first(hidden)
    return (encoded.chunk(2, dim=-1) if isinstance(own, Terraformer) else encoded), rows.lengths
