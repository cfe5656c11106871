"""The report: what stands in the page, that nothing of it comes from elsewhere, and what is said of missing parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag

from runs import DENSE, PAIRS, SPARSE, SPARSE_SEQ2SEQ, make_recipe
from terseformer import checkpoint
from terseformer.accounting import account
from terseformer.bench import floors, parity
from terseformer.config import FavorPatternConfig
from terseformer.errors import UserError
from terseformer.folder import CheckpointError
from terseformer.models import make_model
from terseformer.report import REPORT, speed, write_report
from terseformer.report.figures import draw
from terseformer.report.runs import ReportError, read_runs
from terseformer.training import train
from terseformer.training_log import METRICS, read_metrics

SCHEDULE = {"evaluate_every": 4, "checkpoint_every": 4, "sample_prompt": "abc"}


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense, a sparse and an encoder-decoder's run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model, changes in (
        ("dense", DENSE, {}),
        ("sparse", SPARSE, {}),
        ("pairs", SPARSE_SEQ2SEQ, {"objective": PAIRS, "sample_prompt": ""}),
    ):
        train(make_recipe(text, model, **SCHEDULE | changes), folder / name, quiet=True)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies a run, to be changed."""

    def copy(name: str = "sparse", to: str = "copy") -> Path:
        return Path(shutil.copytree(trained / name, tmp_path / to))

    return copy


def parsed(path: Path) -> BeautifulSoup:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return BeautifulSoup(text, "html.parser")


def report(*folders: Path, out: Path | None = None) -> BeautifulSoup:
    return parsed(write_report(folders, out, speed=False))


def table(page: BeautifulSoup, caption: str) -> dict[str, dict[str, str]]:
    """A table by its rows' and columns' headings."""
    (found,) = [t for t in page.find_all("table") if t.caption.get_text().startswith(caption)]
    columns = [cell.get_text() for cell in found.thead.find_all("th")][1:]
    return {
        row.th.get_text(): dict(zip(columns, [cell.get_text() for cell in row.find_all("td")], strict=True))
        for row in found.tbody.find_all("tr")
    }


def section(page: BeautifulSoup, title: str) -> str:
    """The text between a heading and the next."""
    (heading,) = [h for h in page.find_all("h2") if h.get_text() == title]
    parts = []
    for element in heading.next_siblings:
        if isinstance(element, Tag) and element.name == "h2":
            break
        parts.append(element.get_text())
    return " ".join(" ".join(parts).split())


def last_validation(run: Path) -> dict:
    return [line for line in read_metrics(run / METRICS) if "validation/loss" in line][-1]


def test_two_runs_side_by_side(trained: Path, tmp_path: Path) -> None:
    dense, sparse = trained / "dense", trained / "sparse"
    page = report(dense, sparse, out=tmp_path / "both.html")
    assert page.title.get_text().startswith("dense, sparse")
    models, quality = table(page, "What each model"), table(page, "The last validation")
    for name, config in (("dense", DENSE), ("sparse", SPARSE)):
        costs = account(config)
        assert models[name]["parameters"] == f"{costs.parameters:,}"
        assert models[name]["read per token"] == f"{costs.total.parameters_read:,}"
        assert models[name]["float32 bytes per token"] == f"{costs.bytes_per_token(4) / 1e6:,.2f} MB"
    assert "feed-forward sparse (1 in 8)" in models["sparse"]["model"]
    base = last_validation(dense)["validation/loss"]
    for name, run in (("dense", dense), ("sparse", sparse)):
        line = last_validation(run)
        assert quality[name] == {
            "after step": "8",
            "validated on": "the whole validation text",
            "loss, nats per token": f"{line['validation/loss']:.4f}",
            "against dense": "–" if name == "dense" else f"{line['validation/loss'] / base - 1:+.1%}",
            "perplexity": f"{line['validation/perplexity']:.2f}",
            "bits per byte": f"{line['validation/bits_per_byte']:.4f}",
        }
    training = table(page, "Training")
    assert training["sparse"]["steps"] == "8 of 8"
    assert "threads, PyTorch" in training["sparse"]["on"]
    assert float(training["sparse"]["time of a step"].removesuffix(" ms")) > 0
    assert "Decoding was not measured" in section(page, "Speed")
    assert "without controllers" in section(page, "Controllers of dense")


def test_curves_and_controllers(trained: Path) -> None:
    page = report(trained / "sparse")
    assert [figure.figcaption.get_text() for figure in page.find_all("figure")] == [
        "Training loss, nats per token",
        "Validation loss, nats per token",
        "Entropy of the choice, bits",
        "Share of units used",
        "Units never used",
    ]
    assert f"sparse ends at {last_validation(trained / 'sparse')['validation/loss']:.4f}" in str(page.find_all("svg"))
    keys = [[item.get_text() for item in key.find_all("li")] for key in page.find_all("ul", class_="key")]
    layers = ["blocks.0.feed_forward", "blocks.1.feed_forward"]
    assert keys == [["sparse"], layers]
    line = last_validation(trained / "sparse")
    controllers = table(page, "At the last")
    for layer in layers:
        assert controllers[layer] == {
            "entropy of the choice, bits": f"{line[f'controller/{layer}/entropy_bits']:.3f}",
            "share of units used": f"{line[f'controller/{layer}/share_used']:.1%}",
            "units never used": f"{line[f'controller/{layer}/dead_units']:,}",
            "busiest choice over the mean": f"{line[f'controller/{layer}/imbalance']:.2f}",
        }


def test_samples(trained: Path) -> None:
    page = report(trained / "sparse")
    lines = [line for line in read_metrics(trained / "sparse" / METRICS) if "sample" in line]
    assert "sparse, after “abc” after step 4 " in section(page, "Samples")
    assert [block.get_text() for block in page.find_all("pre", dir="auto")] == [line["sample"] for line in lines]
    assert "ff_block_size = 8" in page.details.pre.get_text()


def test_many_samples_are_thinned(copied: Callable[..., Path]) -> None:
    run = copied()
    lines = [{"step": step, "validation/loss": 1.0, "sample": f"text {step}"} for step in range(1, 101)]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [block.get_text() for block in report(run).find_all("pre", dir="auto")]
    assert len(texts) == 8
    assert (texts[0], texts[-1]) == ("text 1", "text 100")


def test_an_encoder_decoder(trained: Path) -> None:
    page = report(trained / "pairs")
    assert "seq2seq, 1 + 2 layers of width 16" in table(page, "What each model")["pairs"]["model"]
    assert table(page, "The last validation")["pairs"]["bits per byte"] == "–"
    assert "terse evaluate RUN" in section(page, "Quality")
    assert "pairs, of the first source of the validation text" in section(page, "Samples")
    assert "encoder.blocks.0" in section(page, "Controllers of pairs") or "encoder" in section(
        page, "Controllers of pairs"
    )


def test_the_page_is_whole_and_accessible(trained: Path, tmp_path: Path) -> None:
    path = write_report([trained / name for name in ("dense", "sparse", "pairs")], tmp_path / REPORT, speed=False)
    page = parsed(path)
    assert page.html["lang"] == "en"
    assert page.find("meta", attrs={"name": "viewport"})
    for element in page.find_all(True):
        assert (
            element.name not in ("script", "link", "img", "iframe", "object", "style") or element.parent.name == "head"
        )
        for name, value in element.attrs.items():
            assert not name.startswith("on")
            assert name not in ("src", "action")
            assert name != "href" or value.startswith("#")
            assert "url(" not in str(value) or "url(#" in str(value)
    assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", "")
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(set(ids)) == len(ids)
    referred = {use["href"].removeprefix("#") for use in page.find_all("use")}
    assert referred <= set(ids)
    drawings = [svg for figure in page.find_all("figure") for svg in figure.find_all("svg")]
    labels = [svg["aria-label"] for svg in drawings]
    assert all(svg["role"] == "img" for svg in drawings)
    assert len(set(labels)) == len(labels) == 8
    assert all(cell.get("scope") in ("col", "row") for cell in page.find_all("th"))
    assert all(found.caption.get_text() for found in page.find_all("table"))


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>&lt;{{ 7 * 7 }}\u202e\u0000 \ud800 $x^{"


def test_texts_are_escaped(copied: Callable[..., Path], text: Path) -> None:
    name = "<b onclick=x>&amp;'\" $\\bad{"
    run = copied(to=name)
    with (run / METRICS).open("a") as file:
        file.write(json.dumps({"step": 8, "machine": {"processor": HOSTILE}}) + "\n")
        file.write(json.dumps({"step": 8, "sample": HOSTILE, "controller/<i>x/share_used": 0.5}) + "\n")
    page = report(run)
    assert not page.find_all(["script", "img", "b", "i"])
    assert page.h1.get_text() == name
    said = HOSTILE.replace("\ud800", "?")
    assert page.find_all("pre", dir="auto")[-1].get_text() == said
    assert said[:40] in table(page, "Training")[name]["on"]
    assert table(page, "At the last")["<i>x"]["share of units used"] == "50.0%"
    assert all(name in svg["aria-label"] for figure in page.find_all("figure") for svg in figure.find_all("svg"))


def test_a_checkpoint_without_a_training(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path / "converted", make_model(SPARSE))
    page = report(tmp_path / "converted")
    assert table(page, "The last validation")["converted"]["validated on"] == "no log of its training"
    assert "converted has no metrics.jsonl beside its checkpoint" in section(page, "Curves")
    assert "no validation in the log" in section(page, "Controllers of converted")
    assert "There are none" in section(page, "Samples")
    assert not page.find_all(["figure", "details"])
    assert "None" not in page.get_text()


def test_a_run_that_is_not_validated_yet(copied: Callable[..., Path]) -> None:
    run = copied()
    lines = [line for line in read_metrics(run / METRICS) if "validation/loss" not in line]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run)
    assert table(page, "The last validation")["copy"] == {
        "after step": "–",
        "validated on": "not validated yet",
        **dict.fromkeys(("loss, nats per token", "perplexity", "bits per byte"), "–"),
    }
    assert len(page.find_all("figure")) == 1
    assert "None" not in page.get_text()


def test_an_earlier_checkpoint_has_the_curves_up_to_it(trained: Path, tmp_path: Path) -> None:
    first, _ = checkpoint.checkpoints(trained / "sparse")
    page = report(first, trained / "dense", out=tmp_path / REPORT)
    row = table(page, "The last validation")[first.name]
    assert (row["after step"], row["validated on"]) == ("4", "4 sequences")
    assert table(page, "Training")[first.name]["steps"] == "4 of 8"


def test_only_alike_validations_are_compared(trained: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    other = checkpoint.find(copied()) / "training" / "recipe.toml"
    other.write_text(other.read_text().replace("validation_fraction = 0.2", "validation_fraction = 0.3"))
    first, _ = checkpoint.checkpoints(trained / "sparse")
    page = report(trained / "sparse", trained / "dense", other.parents[2], trained / "pairs", first, out=tmp_path / "r")
    compared = {name: row["against sparse"] for name, row in table(page, "The last validation").items()}
    assert compared.pop("dense").endswith("%")
    assert set(compared.values()) == {"–"}


def test_strange_numbers(copied: Callable[..., Path]) -> None:
    run = copied()
    with (run / METRICS).open("a") as file:
        file.write(
            '{"step": 9, "train/loss": NaN}\n{"step": 9, "validation/loss": 800, "validation/perplexity": Infinity}\n'
        )
    page = report(run)
    assert table(page, "The last validation")["copy"]["perplexity"] == "inf"
    assert len(page.find_all("figure")) == 5


def test_draw() -> None:
    steps = [(step, float(step)) for step in range(1, 5001)]
    svg = draw([steps, [(1, 2.0)], []], "A & B")
    assert 'aria-label="A &amp; B"' in svg
    assert svg.startswith("<svg")
    assert all(f"var(--line-{i})" in svg for i in (0, 1))
    assert "currentColor" in svg
    assert "#0100" not in svg
    (line,) = [p for p in BeautifulSoup(svg, "html.parser").find_all("path") if "--line-0" in p.get("style", "")]
    assert 2 <= line["d"].count("L") < 400
    assert draw([steps], "A") != draw([steps], "B")


# Speed.


@pytest.fixture
def small_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_READ_BYTES", 1 << 22)
    monkeypatch.setenv("TERSE_THREADS", "1")


@pytest.mark.usefixtures("small_floors")
def test_speed(trained: Path, tmp_path: Path) -> None:
    linear = replace(DENSE, attention_pattern=FavorPatternConfig())
    short = replace(DENSE, max_position_embeddings=30)
    for name, config in (("linear", linear), ("short", short)):
        checkpoint.save_model(tmp_path / name, make_model(config))
    folders = [trained / "sparse", trained / "pairs", tmp_path / "linear", tmp_path / "short"]
    page = parsed(write_report(folders, tmp_path / REPORT))
    rows = table(page, "Decoding")
    assert list(rows) == ["sparse, f32", "sparse, int8", "pairs, f32", "pairs, int8"]
    for row in rows.values():
        assert float(row["tokens a second"].replace(",", "")) > 0
        assert float(row["per token"].removesuffix(" ms")) > 0
        assert float(row["floor"].removesuffix(" ms")) >= 0
    said = section(page, "Speed")
    assert "1 threads, which read" in said
    assert "linear is not timed: model.attention_pattern.kind = 'favor' is not decoded by the engine" in said
    assert "short is not timed: that needs 31 positions, and the model has 30 (max_position_embeddings)" in said


def test_wrong_results_have_no_speed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_difference", lambda config, threads: 1.0)
    with pytest.raises(parity.ParityError):
        write_report([trained / "sparse"], tmp_path / REPORT)
    assert not (tmp_path / REPORT).exists()


def test_without_speed_nothing_is_packed(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "check_parity", lambda threads: pytest.fail("it was measured"))
    run = copied()
    for path in run.rglob("packed-*"):
        path.unlink()
    report(run)
    assert not list(run.rglob("packed-*"))


# Mistakes.


def test_where_it_is_written(copied: Callable[..., Path]) -> None:
    run = copied()
    (run / REPORT).write_text("an older one")
    assert write_report([run], speed=False) == run / REPORT
    assert parsed(run / REPORT).h1.get_text() == "copy"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_runs_of_one_name_are_told_apart(copied: Callable[..., Path], tmp_path: Path) -> None:
    one, two = copied(to="one/run"), copied(to="two/run")
    assert [run.name for run in read_runs([one, two])] == [str(one), str(two)]
    assert [run.name for run in read_runs([one])] == ["run"]


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    dense, sparse = trained / "dense", trained / "sparse"
    cases: list[tuple[list[Path], Path | None, type[UserError], str]] = [
        ([], tmp_path / "r.html", ReportError, "needs a run's folder"),
        ([dense, sparse], None, ReportError, "of several runs needs a place; give --out FILE.html"),
        ([dense, dense], tmp_path / "r.html", ReportError, "a run is named twice"),
        ([dense], tmp_path, ReportError, "is a folder; name the report's file"),
        ([tmp_path], None, CheckpointError, "no checkpoint at"),
        ([tmp_path / "nowhere"], None, CheckpointError, "it is no folder"),
    ]
    for folders, out, error, message in cases:
        with pytest.raises(error, match=message) as raised:
            write_report(folders, out, speed=False)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    [
        *("[1]", '{"train/loss": 1}', '{"step": "1"}', '{"step": 1, "train/loss": "x"}', '{"step": 1, "sample": 3}'),
        *('{"step": 1, "machine": "x"}', '{"step": 1, "controller/a": 1}', '{"step": 1, "train/loss": null}', "\xff"),
    ],
)
def test_a_log_that_is_none(line: str, copied: Callable[..., Path]) -> None:
    run = copied()
    (run / METRICS).write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl.*move "):
        report(run)
