"""Log-probabilities of tokens, from the logits as the model gives them: before temperature and any filter."""

from __future__ import annotations

import numpy as np

from terseformer.serve.delivery import Token


def score(logits: np.ndarray, token: int, num_top: int) -> Token:
    """A token with its log-probability and those of the likeliest tokens, of equals the first id first.

    Args:
        logits: float32 [V], from which the token was drawn.
        token: its id.
        num_top: likeliest tokens to name.
    """
    exact = logits.astype(np.float64)
    exact -= exact.max()
    logs = exact - np.log(np.exp(exact).sum())
    top = ()
    if num_top:
        num_top = min(num_top, len(logs))
        level = np.partition(logs, -num_top)[-num_top]
        likely = np.flatnonzero(logs >= level)  # with all that are as likely as the last
        likely = likely[np.argsort(-logs[likely], kind="stable")][:num_top]
        top = tuple((int(i), float(logs[i])) for i in likely)
    return Token(token, float(logs[token]), top)
