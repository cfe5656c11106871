"""What a model learns: the batches of a step, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from terseformer import data
from terseformer.config import ConfigError, PairsConfig, Recipe, SpanCorruptionConfig, TrainConfig
from terseformer.encoder_decoder import EncoderDecoder
from terseformer.evaluation import Evaluation, evaluate, evaluate_pairs
from terseformer.layers.loss import chunked_cross_entropy
from terseformer.model import CausalLM
from terseformer.text import source_ids

Part = tuple[Tensor, ...]
"""What the loss is computed on at once."""
_NO_TARGET = -100
_LOGITS = 2**24
"""Logits that are held at once: 64 MiB."""


class Loss(nn.Module):
    """The sum of a part's cross-entropies, in float32: what processes share gradients of, and the compiler sees."""

    def __init__(self, model: CausalLM | EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *part: Tensor) -> Float[Tensor, ""]:
        """Of windows, [B, T + 1], or of sources, their lengths, targets with their start, and their lengths."""
        if isinstance(self.model, CausalLM):
            (windows,) = part
            return self._sum(self.model.hidden(windows[:, :-1]), windows[:, 1:])
        source, num_source, target, num_target = part
        encoded, num_source = self.model.encode(source, num_source)
        hidden, target = self.model.hidden(encoded, num_source, target[:, :-1], num_target), target[:, 1:]
        padding = torch.arange(target.shape[1], device=target.device) >= num_target[:, None]
        return self._sum(hidden, target.masked_fill(padding, _NO_TARGET))

    def _sum(self, hidden: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        chunk = max(1, _LOGITS // self.model.embedding.num_embeddings)
        if len(targets) > chunk:
            return chunked_cross_entropy(self.model.head, hidden, targets, chunk)
        return F.cross_entropy(self.model.head(hidden).float(), targets, ignore_index=_NO_TARGET, reduction="sum")


def _share(config: TrainConfig, step: int, rank: int, world_size: int) -> dict[str, int]:
    """Which part of which step's batch."""
    numbers = {"step": step, "rank": rank, "world_size": world_size}
    return {"seed": config.seed, "batch_size": config.batch_size, **numbers}


class NextToken:
    """Each token of a window from those before it."""

    def __init__(self, config: TrainConfig, prepared: data.PreparedData) -> None:
        self._config, self._data = config, prepared
        data.num_windows(prepared.train.num_tokens, config.sequence_length)  # whether there is text enough

    def parts(self, step: int, rank: int, world_size: int) -> list[Part]:
        """A process's share of a step's windows, in parts whose gradients are accumulated."""
        config = self._config
        which = _share(config, step, rank, world_size)
        windows = data.batch(self._data.train.tokens, **which, sequence_length=config.sequence_length)
        return [(part,) for part in torch.from_numpy(windows).chunk(config.gradient_accumulation_steps)]

    def num_targets(self, part: Part) -> int:
        """All tokens but the first of each row."""
        return part[0][:, 1:].numel()

    def evaluate(self, model: nn.Module, limit: int) -> Evaluation:
        """Loss on the validation text."""
        assert isinstance(model, CausalLM)
        length, tokenizer = self._config.sequence_length, self._data.tokenizer
        return evaluate(model, self._data.validation, length, limit, tokenizer=tokenizer)

    def prompt(self) -> str:
        """The recipe's prompt."""
        return self._config.sample_prompt


class _SourceToTarget:
    """A target from its source; with a sample's source from the recipe, else the first one of the validation."""

    def __init__(self, config: TrainConfig, prepared: data.PreparedData, pad_token_id: int) -> None:
        self._config, self._data, self._pad_token_id = config, prepared, pad_token_id

    def batches(self, step: int, rank: int, world_size: int) -> list[data.PairBatch]:
        """The same as arrays."""
        raise NotImplementedError

    def validation(self, limit: int) -> Iterator[data.PairBatch]:
        """Batches of the validation text."""
        raise NotImplementedError

    def parts(self, step: int, rank: int, world_size: int) -> list[Part]:
        """A process's share of a step's pairs, in parts whose gradients are accumulated."""
        return [tensors(batch) for batch in self.batches(step, rank, world_size)]

    def num_targets(self, part: Part) -> int:
        """Real tokens of the targets."""
        return int(part[-1].sum())

    def evaluate(self, model: nn.Module, limit: int) -> Evaluation:
        """Loss on the targets of the validation text."""
        assert isinstance(model, EncoderDecoder)
        return evaluate_pairs(model, self.validation(limit))

    def prompt(self) -> str:
        """The recipe's prompt, or the first source of the validation text."""
        if prompt := self._config.sample_prompt:
            return prompt
        first, tokenizer = next(self.validation(1)), self._data.tokenizer
        num_ends = self._data.train.end_of_text_id != self._pad_token_id  # the reader of the text adds it again
        ids = first.source[0, : first.num_source[0] - num_ends].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        # Of a window that begins or ends within a character, the text may have more tokens.
        while len(source_ids(tokenizer, text, self._pad_token_id)) > self._config.sequence_length:
            text = text[:-1]
        return text


class SpanCorruption(_SourceToTarget):
    """The spans that were taken out of a window."""

    def __init__(
        self,
        config: TrainConfig,
        objective: SpanCorruptionConfig,
        prepared: data.PreparedData,
        pad_token_id: int,
        limit: int,
    ) -> None:
        super().__init__(config, prepared, pad_token_id)
        data.num_windows(prepared.train.num_tokens, config.sequence_length)
        self._corruption = data.SpanCorruption(
            prepared.tokenizer,
            config.sequence_length,
            objective.corruption_rate,
            objective.mean_span_length,
            objective.target,
            pad_token_id,
        )
        batch = next(self.validation(1))  # if there is text enough; all others have these lengths
        longest = max(batch.source.shape[1], batch.target.shape[1] - 1)
        if longest > limit:
            raise ConfigError(
                f"train.objective.corruption_rate = {objective.corruption_rate} and mean_span_length = "
                f"{objective.mean_span_length} make {longest} tokens of windows of train.sequence_length = "
                f"{config.sequence_length}, more than model.max_position_embeddings = {limit}; change one of them"
            )

    def batches(self, step: int, rank: int, world_size: int) -> list[data.PairBatch]:
        """Windows without their spans."""
        which = _share(self._config, step, rank, world_size)
        num_parts = self._config.gradient_accumulation_steps
        return self._corruption.batch(self._data.train.tokens, **which, num_parts=num_parts)

    def validation(self, limit: int) -> Iterator[data.PairBatch]:
        """Batches of the validation text."""
        return self._corruption.validation_batches(self._data.validation.tokens, limit)


class Pairs(_SourceToTarget):
    """The target that the data name for a source."""

    def __init__(
        self, config: TrainConfig, objective: PairsConfig, prepared: data.PreparedData, pad_token_id: int
    ) -> None:
        super().__init__(config, prepared, pad_token_id)
        limits = config.sequence_length, objective.max_target_length, pad_token_id
        self._train = data.PairFile(prepared.train, *limits)
        self.validation_pairs = data.PairFile(prepared.validation, *limits)

    @property
    def left_out(self) -> str:
        """How many pairs are not learned from, and why; empty if there is none."""
        number = self._train.num_left_out
        if not number:
            return ""
        return (
            f"{number:,} of {number + len(self._train):,} pairs are left out: they are longer than "
            "train.sequence_length or train.objective.max_target_length"
        )

    def batches(self, step: int, rank: int, world_size: int) -> list[data.PairBatch]:
        """Pairs of similar length."""
        which = _share(self._config, step, rank, world_size)
        return data.pair_batch(self._train, **which, num_parts=self._config.gradient_accumulation_steps)

    def validation(self, limit: int) -> Iterator[data.PairBatch]:
        """Batches of the validation text."""
        return data.pair_validation_batches(self.validation_pairs, limit)


def tensors(batch: data.PairBatch) -> Part:
    """A batch as `Loss` takes it."""
    return tuple(map(torch.from_numpy, (batch.source, batch.num_source, batch.target, batch.num_target)))


Objective = NextToken | SpanCorruption | Pairs
"""How a recipe's model is trained and validated."""


def make_objective(recipe: Recipe, prepared: data.PreparedData) -> Objective:
    """The objective of a recipe.

    Raises:
        DataError: its data do not suffice.
        ConfigError: what it makes of them does not fit the model.
    """
    match recipe.train.objective:
        case SpanCorruptionConfig() as objective:
            pad_token_id, limit = getattr(recipe.model, "pad_token_id", 0), recipe.model.max_position_embeddings
            return SpanCorruption(recipe.train, objective, prepared, pad_token_id, limit)
        case PairsConfig() as objective:
            return Pairs(recipe.train, objective, prepared, getattr(recipe.model, "pad_token_id", 0))
        case _:
            return NextToken(recipe.train, prepared)
