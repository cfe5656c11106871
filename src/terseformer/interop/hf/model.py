"""What the models have in common in Hugging Face's form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from terseformer.errors import UserError
from terseformer.folder import CheckpointError
from terseformer.interop.hf.cache import TerseformerCache
from terseformer.interop.hf.config import TerseformerConfig
from terseformer.layers.head import TiedHead
from terseformer.models import make_model

_NO_LABEL = -100


class TerseformerModel(PreTrainedModel, GenerationMixin):
    """A model whose submodules are those of one of this package's, so that its tensors have the same names.

    What Hugging Face's libraries do to submodules, wrap or replace or move them, takes effect here; `own` gives them as
    a model of this package again.
    """

    config_class = TerseformerConfig
    base_model_prefix = ""
    accepts_loss_kwargs = True
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    config: TerseformerConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    embedding: nn.Embedding
    head: nn.Module

    def __init__(self, config: TerseformerConfig) -> None:
        super().__init__(config)
        own = make_model(config.to_model_config())
        self._modules = own._modules
        self.__dict__["_shell"] = own  # not as a submodule, which would give each tensor a second name
        self.post_init()

    @property
    def own(self) -> Any:
        """A model of this package, with the submodules as they are now."""
        own: Any = copy.copy(self._shell)
        own._modules = self._modules
        return own

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """The model of a folder or of a repository.

        Raises:
            CheckpointError: the file of the weights lacks some of them.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{args[0]} does not fit its config.json: {', '.join(missing)} missing")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the layers draw their initial values themselves, when they are made."""

    def _prepare_cache_for_generation(  # pyrefly: ignore[bad-override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Gives `generate` our kind of cache instead of one of its own."""
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise UserError(
                f"terseformer models have a cache of their own, not {generation_config.cache_implementation!r}; leave "
                "out cache_implementation"
            )
        if generation_config.use_cache is not False:
            model_kwargs.setdefault("past_key_values", TerseformerCache())

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces it."""
        self._modules["embedding"] = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, if it is a matrix."""
        return self.head if isinstance(self.head, (nn.Linear, TiedHead)) else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces it."""
        self.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Changes the size of the vocabulary.

        Raises:
            UserError: the head cannot be resized.
        """
        if self.get_output_embeddings() is None:
            raise UserError(
                f"the vocabulary of a model with a {self.config.head['kind']} head cannot be resized; train one of the "
                "size that you need"
            )
        return super().resize_token_embeddings(*args, **kwargs)


def token_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], num_items: Tensor | int | None
) -> Float[Tensor, ""]:
    """The cross-entropy, in float32, of the tokens that have a label, which is not -100.

    Args:
        logits: at each position.
        labels: at each position.
        num_items: what the sum is divided by, where a step has more calls than this one; default: this call's number.
    """
    labels = labels.flatten().to(logits.device)
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=_NO_LABEL, reduction=reduction)
    return loss if num_items is None else loss / num_items


def refuse(**given: Any) -> None:
    """Raises UserError where something is given that our models do not have."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"terseformer models know no {name}; leave it out")


def cache_for(model: nn.Module, given: Cache | None, use_cache: bool | None) -> TerseformerCache | None:
    """The cache that a call has: the given one, or a new one if it is asked for.

    Raises:
        UserError: it is of another kind, or gradients would be lost.
    """
    if given is None and not use_cache:
        return None
    if model.training and torch.is_grad_enabled():
        raise UserError("a cache keeps no gradients; train with use_cache=False")
    if given is None:
        return TerseformerCache()
    if not isinstance(given, TerseformerCache):
        raise UserError(f"terseformer models have a cache of their own, not {type(given).__name__}; leave it out")
    return given


def last(x: Float[Tensor, "B T D"], logits_to_keep: int | Tensor) -> Float[Tensor, "B P D"]:
    """The last so many positions, 0: all; or those of an index."""
    return x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
