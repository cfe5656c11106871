"""`CausalLM` in Hugging Face's form."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from terseformer.config import ConfigError, ModelConfig
from terseformer.interop.hf.config import TerseformerConfig
from terseformer.interop.hf.model import TerseformerModel, cache_for, last, refuse, token_loss
from terseformer.interop.hf.padding import Rows, real_tokens


class TerseformerForCausalLM(TerseformerModel):
    """A causal language model.

    Raises:
        ConfigError: the configuration is of an encoder-decoder.
    """

    def __init__(self, config: TerseformerConfig) -> None:
        if config.kind != ModelConfig.kind:
            raise ConfigError(f"a model of kind {config.kind!r} is loaded by AutoModelForSeq2SeqLM")
        super().__init__(config)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token at each position, and with labels their loss.

        Args:
            input_ids: tokens; with a cache, those that it has not read.
            attention_mask: 0 at padding, which may stand anywhere; over the tokens, and with a cache those before them.
            labels: the tokens themselves, -100 where no loss is wanted; each is compared with the logits before it.
            past_key_values: what an earlier call gave.
            use_cache: whether to give a cache that has read the tokens; default: if one was given.
            logits_to_keep: last positions whose logits are computed, or their index; 0: all.
            num_items_in_batch: what the sum of the losses is divided by; default: the number of labels.
            return_dict: False: give a tuple.
            inputs_embeds: not known, like the next two.
            output_attentions: not known.
            output_hidden_states: not known.

        Raises:
            UserError: something that is not known; a mask of another shape; a cache in training.
        """
        refuse(inputs_embeds=inputs_embeds, output_attentions=output_attentions)
        refuse(output_hidden_states=output_hidden_states)
        assert input_ids is not None
        own, real = self.own, real_tokens(attention_mask, input_ids)
        cache = cache_for(self, past_key_values, use_cache)
        if cache is not None:
            if cache.is_new:
                cache.begin(own.new_state(len(input_ids), input_ids.shape[1]))
            hidden = cache.read(input_ids, real, own.hidden)
        else:
            rows = Rows(real)
            hidden = rows.as_given(own.hidden(rows.real_first(input_ids), None, rows.num_real))
        logits = own.head(last(hidden, logits_to_keep))
        loss = None if labels is None else token_loss(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(  # pyrefly: ignore[bad-override, bad-override-param-name]
        self,
        input_ids: Int[Tensor, "B T"],
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,  # by this name `generate` knows that it may give whatever `forward` takes
    ) -> dict[str, Any]:
        """What `generate` calls the model with: the tokens that the cache has not read, and the mask of all."""
        return {
            "input_ids": input_ids[:, past_key_values.get_seq_length() if past_key_values is not None else 0 :],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
