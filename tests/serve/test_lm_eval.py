"""lm-evaluation-harness on the server: the log-likelihoods are the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from served import CONTEXT, PROMPT, ServerProcess
from terseformer.engine import Engine
from terseformer.folder import find
from terseformer.sampling import SamplingConfig

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval is installed without its extra `api`")

PAIRS = [
    (PROMPT, " ghi"),
    (PROMPT, " jab cde"),
    ("abc", " def"),
    ("", "abc def"),
    (PROMPT * 3, " " + PROMPT),
    ("ü", "ber 🙂"),
]


def harness(server: ServerProcess, runs: Path, batch_size: int, tokenized: bool):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="small",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(find(runs / "small")),
        custom_prefix_token_id=0,
        eos_string="<|endoftext|>",
        tokenized_requests=tokenized,
        batch_size=batch_size,
        max_length=CONTEXT,
        max_retries=1,
    )


def expected(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
    """The sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
    whole = engine.tokenizer.encode(context + continuation).ids
    begin = len(engine.tokenizer.encode(context).ids)
    if not begin:
        whole, begin = [*engine.stop_ids, *whole], 1
    logits = engine.logits(whole).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(begin - 1, len(whole) - 1)
    return (
        sum(logs[i, whole[i + 1]] for i in places),
        all(logs[i].argmax() == whole[i + 1] for i in places),
    )


def likeliest(engine: Engine) -> tuple[str, str]:
    """A text and the token that is the likeliest after it, which together are just these tokens."""
    for end in range(3, len(PROMPT)):
        context = PROMPT[:end]
        ids = engine.tokenizer.encode(context).ids
        token = int(engine.logits(ids)[-1].argmax())
        continuation = engine.tokenizer.decode([token])
        if context.strip() == context and engine.tokenizer.encode(context + continuation).ids == [*ids, token]:
            return context, continuation
    raise AssertionError("there is none")


@pytest.mark.parametrize(("batch_size", "tokenized"), [(1, True), (4, True), (1, False)])
def test_log_likelihoods(batch_size: int, tokenized: bool, server: ServerProcess, engine: Engine, runs: Path) -> None:
    from lm_eval.api.instance import Instance

    pairs = PAIRS if tokenized else [pair for pair in PAIRS if pair[0]]  # the end-of-text token has no text
    pairs = [*pairs, likeliest(engine)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    given = harness(server, runs, batch_size, tokenized).loglikelihood(asked)
    for pair, (value, is_greedy) in zip(pairs, given, strict=True):
        likelihood, greedy = expected(engine, *pair)
        assert value == pytest.approx(likelihood, abs=1e-3), pair
        assert is_greedy == greedy, pair
    assert {is_greedy for _, is_greedy in given} == {True, False}


def test_texts_until_a_stop_string(server: ServerProcess, engine: Engine, runs: Path) -> None:
    from lm_eval.api.instance import Instance

    (whole,) = engine.generate(PROMPT, SamplingConfig(temperature=0.0, max_new_tokens=12))
    stop = whole.text[4:6]
    options = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (PROMPT, options), 0)]
    (text,) = harness(server, runs, 1, True).generate_until(asked)
    assert text == whole.text[: whole.text.index(stop)]
