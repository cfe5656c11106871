"""`terse convert --from trax`: every recorded model, from the files that Trax's trainer writes to a folder of ours."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import terseformer
from terseformer import cli
from terseformer.config import TerraformerConfig
from terseformer.engine import Engine
from terseformer.interop import trax
from terseformer.interop.trax_weights import TraxError
from terseformer.pack import load_packed, pack

DATA = Path(__file__).parent / "reference_data"
MODELS = sorted(path.name.removesuffix(".weights.npy.gz") for path in DATA.glob("*.weights.npy.gz"))


def convert(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = DATA / f"{name}.json", DATA / f"{name}.weights.npy.gz"
    monkeypatch.setattr(sys, "argv", ["terse", "convert", "--from", "trax", *map(str, files), str(folder)])
    cli.main()


@pytest.mark.parametrize("name", MODELS)
def test_recorded_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(name, tmp_path / "new" / "model", monkeypatch)
    model = terseformer.load(tmp_path / "new" / "model")
    with np.load(DATA / f"{name}.npz") as file:
        recorded = {key: torch.from_numpy(array) for key, array in file.items()}
    last = "tokens" if "tokens" in recorded else "target"
    inputs = [F.pad(recorded[last].long(), (1, -1))]  # the reference shifts inside the model
    if last == "target":
        inputs.insert(0, recorded["source"].long())
    with torch.no_grad():
        assert_close(model(*inputs), recorded["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_takes_every_converted_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(name, tmp_path / "model", monkeypatch)
    tokens, source = [0, 5, 9, 2], [7, 3, 8]
    model, engine = terseformer.load(tmp_path / "model"), Engine(load_packed(pack(tmp_path / "model", "f32")))
    is_decoder = isinstance(model, terseformer.CausalLM)
    inputs = (tokens,) if is_decoder else (source, tokens)
    with torch.no_grad():
        expected = model(*(torch.tensor([ids]) for ids in inputs))[0]
    logits = engine.logits(tokens, engine.new_session(source=None if is_decoder else source))
    assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_an_occupied_folder_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(SystemExit):
        convert("lm_dense", tmp_path, monkeypatch)
    assert "exists and is not empty; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def write_pickle(path: Path, content: object) -> Path:
    with gzip.open(path, "wb") as file:
        pickle.dump(content, file)
    return path


def test_weights_inside_a_pickle(tmp_path: Path) -> None:
    arrays = trax.read_arrays(DATA / "lm_dense.weights.npy.gz")
    path = write_pickle(tmp_path / "model.pkl.gz", {"step": 3, "flat_weights": arrays, "slots": [(1.5, "x")]})
    trax.convert(DATA / "lm_dense.json", path, tmp_path / "model")
    expected = trax.load(json.loads((DATA / "lm_dense.json").read_text()), arrays)
    got = terseformer.load(tmp_path / "model").state_dict()
    assert got.keys() == expected.state_dict().keys()
    assert all(torch.equal(got[name], value) for name, value in expected.state_dict().items())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "model.pkl.gz", {"flat_weights": [Evil()]})
    with pytest.raises(TraxError, match=r"it holds \w+\.mkdir, which is no array"):
        trax.read_pickled_arrays(path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"flat_weights": "model.weights.npy.gz"}, "holds no weights itself; give the model.weights.npy.gz beside it"),
        ({"weights": []}, "cannot read"),
        ([1, 2], "cannot read"),
    ],
)
def test_a_pickle_without_weights(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraxError, match=message):
        trax.read_pickled_arrays(write_pickle(tmp_path / "model.pkl.gz", content))


def test_damaged_files_give_no_traceback(tmp_path: Path) -> None:
    """Whatever byte is wrong, what is read is arrays, or else it is said."""
    weights = (DATA / "lm_dense.weights.npy.gz").read_bytes()
    arrays = trax.read_arrays(DATA / "lm_dense.weights.npy.gz")
    pickled = write_pickle(tmp_path / "model.pkl.gz", {"flat_weights": arrays[:3]}).read_bytes()
    draw = random.Random(0)
    for whole, path, read in (
        (weights, tmp_path / "damaged.npy.gz", trax.read_arrays),
        (gzip.compress(gzip.decompress(weights), 0), tmp_path / "stored.npy.gz", trax.read_arrays),
        (pickled, tmp_path / "damaged.pkl.gz", trax.read_pickled_arrays),
        (gzip.decompress(pickled), tmp_path / "stored.pkl", trax.read_pickled_arrays),
    ):
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[draw.randrange(min(len(damaged), 20_000))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with contextlib.suppress(TraxError):
                assert all(isinstance(array, np.ndarray) for array in read(path))


def test_files_that_are_not_there_or_not_json(tmp_path: Path) -> None:
    weights = DATA / "lm_dense.weights.npy.gz"
    for text, message in ((None, "cannot read"), ("{", "cannot read"), ("[]", "must hold a table")):
        description = tmp_path / "model.json"
        if text is not None:
            description.write_text(text)
        with pytest.raises(TraxError, match=message):
            trax.convert(description, weights, tmp_path / "model")
    with pytest.raises(TraxError, match="cannot read weight 0 of"):
        trax.convert(DATA / "lm_dense.json", tmp_path / "none.npy.gz", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_example_of_the_documents() -> None:
    """Docs/trax.md describes the reference's medium Terraformer."""
    text = (Path(__file__).parent.parent / "docs" / "trax.md").read_text(encoding="utf-8")
    config = trax.model_config(json.loads(text.partition("```json\n")[2].partition("```")[0]))
    assert isinstance(config, TerraformerConfig)
    assert config.num_decoder_layers == 24
