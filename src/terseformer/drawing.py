"""From logits to the next token: greedy, or a draw from a filtered distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from terseformer.sampling import GenerationError, SamplingConfig, nothing_left


def new_generator(seed: int) -> torch.Generator:
    """The source of one row's draws; it is on the CPU whatever the model's device."""
    return torch.Generator().manual_seed(seed)


def repeating(tokens: Sequence[int], size: int) -> set[int]:
    """The tokens that would end, after these, a sequence of `size` tokens that already stands among them."""
    if not size or len(tokens) < size:
        return set()
    tail = list(tokens[len(tokens) - size + 1 :])
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if list(tokens[i : i + size - 1]) == tail}


def adjusted(
    scores: Float[Tensor, "B V"],
    seen: Bool[Tensor, "B V"] | None,
    texts: Sequence[Sequence[int]],
    config: SamplingConfig,
) -> Float[Tensor, "B V"]:
    """Scores less what the repetition penalty takes off, minus infinity where a token would repeat an n-gram.

    Args:
        scores: logits, or with beams logarithms of probabilities.
        seen: the tokens in each row's prompt and text so far; None: no penalty.
        texts: these tokens in their order, where n-grams must not be repeated.
        config: the sampling.
    """
    if seen is not None and config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if config.no_repeat_ngram_size:
        scores = scores.clone()
        for row, text in enumerate(texts):
            scores[row, list(repeating(text, config.no_repeat_ngram_size))] = -math.inf
    return scores


def usable(logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Logits as float64 on the CPU.

    Raises:
        GenerationError: a row has NaN, infinity or nothing but minus infinity among its logits.
    """
    scores = logits.detach().to("cpu", torch.float64)
    finite = scores.amax(-1).isfinite()  # a NaN is the maximum of its row
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise GenerationError(
            f"the model gives no usable logits: {int(scores[row].isnan().sum())} of {scores.shape[1]} are NaN and the "
            f"largest is {float(scores[row].amax())} in row {row}; its weights are damaged or its training has diverged"
        )
    return scores


def probabilities(
    logits: Float[Tensor, "B V"],
    seen: Bool[Tensor, "B V"] | None,
    config: SamplingConfig,
    texts: Sequence[Sequence[int]] = (),
) -> Float[Tensor, "B V"]:
    """The distribution that `sample` draws from.

    The steps have Hugging Face's definitions and order (llama.cpp divides by the temperature last):

    1. repetition penalty: logits of seen tokens are divided by it where positive, else multiplied; then tokens go that
       would repeat an n-gram;
    2. temperature: logits are divided by it; 0 leaves the likeliest token alone, of equals the first;
    3. top-k: tokens below the k-th largest logit go; those equal to it stay;
    4. top-p: of the tokens from the likeliest on, of equals the first id first, those go that have
       probability `top_p` before them (the probabilities are those after top-k);
    5. min-p: tokens with less than `min_p` times the largest probability go.

    The likeliest token always stays.

    Args:
        logits: any float type and device.
        seen: the tokens in each row's prompt and text so far; None: no penalty.
        config: the sampling.
        texts: these tokens in their order, where n-grams must not be repeated.

    Returns:
        float64 on the CPU.

    Raises:
        GenerationError: as `usable`, or a row has no token that repeats no n-gram.
    """
    scores = adjusted(usable(logits), seen, texts, config)
    if not scores.amax(-1).isfinite().all():
        raise nothing_left(config)
    if config.temperature == 0:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
    scores = (scores - scores.amax(-1, keepdim=True)) / config.temperature  # the likeliest has 0, in whatever follows
    if config.top_k:
        kth = scores.topk(min(config.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if config.top_p < 1:
        ranked, order = scores.sort(descending=True, stable=True)
        before = torch.nn.functional.pad(ranked.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        dropped = before >= config.top_p
        dropped[:, 0] = False  # even where top_p is 0 in 32 bits
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    if config.min_p:
        scores = scores.masked_fill(scores < math.log(config.min_p), -math.inf)
    return scores.softmax(-1)


def sample(
    logits: Float[Tensor, "B V"],
    seen: Bool[Tensor, "B V"] | None,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    texts: Sequence[Sequence[int]] = (),
) -> Int[Tensor, " B"]:
    """Draws each row's next token from `probabilities`, never one of probability 0.

    A row uses one number of its own generator, so that its tokens do not depend on the other rows.

    Returns:
        int64 on the CPU.

    Raises:
        GenerationError: as `probabilities`.
    """
    distribution = probabilities(logits, seen, config, texts)
    if config.temperature == 0:
        return distribution.argmax(-1)
    cumulative = distribution.cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, draws * total, right=True)  # the first that exceeds the draw
    return torch.minimum(token, torch.searchsorted(cumulative, total))[:, 0]  # rounding may lift a draw to the total
