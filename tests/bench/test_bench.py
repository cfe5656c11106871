"""The benchmark: what it counts, that it refuses wrong results, and one small run of it."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from terseformer import native
from terseformer.bench import decode, floors, parity, show, sources
from terseformer.bench.models import RandomWeights, random_model
from terseformer.bench.timing import in_turn, measured_in_turn, spread
from terseformer.engine import Engine
from terseformer.presets import preset
from terseformer.threads import default_threads
from variants import DISTINCT


@pytest.fixture(autouse=True)
def _small_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_READ_BYTES", 1 << 22)


@pytest.mark.parametrize("name", DISTINCT)
def test_random_models_are_whole_and_used_again(name: str, tmp_path: Path) -> None:
    config = DISTINCT[name]
    engine = Engine(random_model(config, "int8", tmp_path), threads=1)
    assert np.isfinite(engine.logits([1, 2, 3])).all()
    (path,) = tmp_path.iterdir()
    first = path.stat().st_mtime_ns
    random_model(config, "int8", tmp_path)
    assert path.stat().st_mtime_ns == first


def test_random_weights_are_the_same_each_time() -> None:
    shapes = {"a.weight": (300, 40), "norm.weight": (40,), "a.bias": (300,)}
    one, other = RandomWeights(shapes), RandomWeights(shapes)
    np.testing.assert_array_equal(one["a.weight"], other["a.weight"])
    assert (one["norm.weight"] == 1).all()
    assert not one["a.bias"].any()
    assert abs(one["a.weight"].std() * 40**0.5 - 1) < 0.05


def test_all_take_their_turns() -> None:
    order: list[str] = []
    times = in_turn([lambda: order.append("a"), lambda: order.append("b")], repetitions=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert [len(t) for t in times] == [2, 2]
    assert measured_in_turn([lambda: 1.0, lambda: 2.0], 3) == [[1.0] * 3, [2.0] * 3]
    assert spread([1.0]) == 0
    assert spread([1.0] * 10) == 0


def test_floors_are_rates_of_this_machine() -> None:
    meter = floors.FloorMeter(1, (128,))
    readings = [meter() for _ in range(3)]
    measured = meter.floors
    assert measured.read_bytes_per_second == statistics.median(r.read_bytes_per_second for r in readings)
    assert meter.read_spread > 0
    assert measured.read_bytes_per_second > 1e8
    assert measured.record_bytes_per_second[128] > 1e6
    assert measured.multiply_adds_per_second > 1e7
    assert measured.seconds(measured.read_bytes_per_second, 0.0) == pytest.approx(1)
    assert measured.seconds(0.0, 2 * measured.multiply_adds_per_second) == pytest.approx(2)
    with pytest.raises(ValueError, match="there is no record 1"):
        native.Floors(1).read_records(np.ones(64, np.float32), 64, np.array([1], np.int32))


def test_wrong_results_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.check_parity(1) < 1e-4
    monkeypatch.setattr(parity, "_difference", lambda config, threads: float("nan"))
    with pytest.raises(parity.ParityError, match=r"differ from PyTorch's by nan, more than 1e-04"):
        parity.check_parity(1)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The 800m rows with small sizes, and the tiny ones; a table, a plot, and JSON as the last line."""
    monkeypatch.setattr(
        decode,
        "language_model_preset",
        lambda name: replace(
            preset(f"small-1m-{name.removeprefix('scaling-800m-').replace('ff', 'ff16', 1)}")
            if name in ("scaling-800m-dense", "scaling-800m-ff")
            else preset("small-1m-ff-qkv-loss" if name.startswith("scaling") else name)
        ),
    )
    result = decode.bench(("800m", "tiny"), repetitions=2, threads=1, folder=tmp_path / "models")
    show(result, tmp_path / "plot.svg")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(result))
    assert {
        "800m_sparse_vs_dense_f32",
        "800m_sparse_f32_vs_floor",
        "tiny_us_per_token",
        "dense_f32_vs_bandwidth",
    } <= set(result["ratios"])
    names = [row["name"] for row in result["rows"]]
    assert names == ["dense", "ff", "qkv", "ff-qkv", "ff-qkv-loss", "1 threads"]
    assert all(row["milliseconds"] > 0 for row in result["rows"])
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_encoder_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Small ones instead of those of 800M and 17B."""
    small = {"seq2seq-800m-dense": "dense", "seq2seq-17b-dense": "dense", "seq2seq-800m-ff-qkv-loss": "scaling"}
    for module in (decode, sources):
        monkeypatch.setattr(module, "preset", lambda name: preset(f"summarize-1m-{small.get(name, 'terraformer')}"))
    monkeypatch.setattr(decode, "read_sources", lambda *args: sources.read_sources(*args, lengths=(8, 5000)))
    groups = ("summarize", "terraformer", "sources", "terraformer-17b", "terraformer-17b-whole")
    result = decode.bench(groups, 2, 1, tmp_path)
    show(result)
    out, progress = capsys.readouterr()
    assert progress.splitlines()[0].startswith("summarize dense: ")
    assert len(progress.splitlines()) == len(result["rows"])
    assert "a source of 5,000 tokens, local attention" in out
    assert [(reading["pattern"], reading["tokens"]) for reading in result["sources"]] == [
        ("local", 8),
        ("local", 5000),
        ("LSH", 8),
        ("LSH", 5000),
        ("exact", 8),
    ]
    assert [row["name"] for row in result["rows"]] == [
        "dense",
        "scaling",
        "terraformer",
        "seq2seq-800m-dense",
        "seq2seq-800m-ff-qkv-loss",
        "terraformer-800m",
        "seq2seq-17b-dense, one block",
        "terraformer-17b, one block",
        "terraformer-17b int8",
    ]
    assert all(row["floor_milliseconds"] > 0 and row["megabytes"] < 8 for row in result["rows"])
    assert {
        "seq2seq-800m-ff-qkv-loss_vs_dense_f32",
        "terraformer-800m_vs_dense_f32",
        "terraformer-17b_block_vs_dense_f32",
    } <= set(result["ratios"])


def test_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "preset", lambda name: preset("summarize-1m-terraformer"))
    monkeypatch.setattr(decode, "read_sources", lambda *args: sources.read_sources(*args, lengths=(200,)))
    result = decode.bench(("sources",), 1, 1, tmp_path)
    assert (result["rows"], len(result["sources"])) == ([], 3)
    assert result["floors"]["read_bytes_per_second"] > 0


def test_tuning_remembers_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSE_CACHE", str(tmp_path))
    monkeypatch.delenv("TERSE_THREADS", raising=False)
    monkeypatch.setattr(decode, "language_model_preset", lambda name: preset("small-1m-ff-qkv-loss"))
    times = decode.tune(repetitions=2)
    assert list(times) == list(range(1, native.physical_cores() + 1))
    assert default_threads() == min(times, key=lambda count: times[count])
