"""The demonstration, on a small text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from runs import make_recipe
from terseformer import demo
from terseformer.bench import floors
from terseformer.checkpoint import load_training
from terseformer.folder import find
from terseformer.training_log import METRICS, read_metrics


@pytest.mark.slow
def test_demo(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(make_recipe(text).data, vocab_size=512)
    monkeypatch.setattr(demo, "_TEXT", data)
    monkeypatch.setattr(floors, "_READ_BYTES", 1 << 22)
    monkeypatch.setenv("TERSE_THREADS", "1")
    for _ in range(2):  # the second replaces the first
        demo.demo("tiny", steps=5, out=tmp_path)
    out = capsys.readouterr().out
    assert "validation loss (nats per token)" in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    page = BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")
    assert page.h1.get_text() == "dense, sparse"
    for name in ("dense", "sparse"):
        assert load_training(find(tmp_path / name)).step == 5
        lines = read_metrics(tmp_path / name / METRICS)
        assert [line["step"] for line in lines if "sample" in line] == [1, 2, 3, 4, 5]
        last = [line for line in lines if "validation/loss" in line][-1]
        assert f"{last['validation/loss']:.4f}" in page.get_text()
