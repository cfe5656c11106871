"""One model's texts, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import Delivered, make_job
from terseformer.serve import prefill
from terseformer.serve.lane import Lane
from terseformer.serve.limits import Limits
from terseformer.serve.metrics import Metrics
from terseformer.serve.models import load_model


def test_a_source_is_read_in_pieces(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between which another text is written to its end; the texts are those of sources that are read at once."""
    lane = Lane(load_model("pairs", runs / "pairs", threads=1), Limits(), None, Metrics(), lambda _: None)
    expected, first, second = Delivered(), Delivered(), Delivered()
    lane.add(make_job(expected, model="pairs"))
    while lane.busy:
        lane.round()
    lane.add(make_job(first, model="pairs", num_top=0))
    lane.round()
    assert 0 < sum(len(piece.tokens) for piece in first.sent) < 4
    monkeypatch.setattr(prefill, "_PIECE_SECONDS", 0.0)
    lane.add(make_job(second, model="pairs"))
    while not second.sent:
        done = first.sent[-1]
        lane.round()
    assert done.completion_tokens == 4
    assert second.sent == expected.sent
    assert "".join(piece.text for piece in first.sent[:-1]) == "".join(piece.text for piece in expected.sent[:-1])
