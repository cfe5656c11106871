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
    """Between which a text that was asked for before is written; the texts are those of sources read at once."""

    def make_lane() -> Lane:
        return Lane(load_model("pairs", runs / "pairs", threads=1), Limits(), None, Metrics(), lambda _: None)

    expected, first, second = Delivered(), Delivered(), Delivered()
    lane = make_lane()
    lane.add(make_job(expected, model="pairs"))
    lane.round()
    lane.add(make_job(first, model="pairs"))
    lane.round()
    assert first.sent
    monkeypatch.setattr(prefill, "_PIECE_SECONDS", 0.0)
    lane.add(make_job(second, model="pairs"))
    rounds = 0
    while lane.busy:
        assert not second.sent
        lane.round()
        rounds += 1
    assert rounds > 5
    assert expected.sent == first.sent == second.sent
