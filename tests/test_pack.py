"""Packed files: made once, made anew when the weights or the configuration change, refused when damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from torch.testing import assert_close

from quantised import as_numpy
from runs import SPARSE, make_recipe
from terseformer import checkpoint
from terseformer.config import ConfigError
from terseformer.engine import Engine
from terseformer.folder import CheckpointError
from terseformer.pack import PackError, check_dtype, load_packed, pack, write_packed
from terseformer.training import train
from variants import make_model


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_recipe(text, SPARSE, steps=2), tmp_path_factory.mktemp("run"), quiet=True)


def test_a_checkpoint_is_packed_once(run: Path) -> None:
    path = pack(run.parent, "int8")
    assert path == run / "packed-int8.safetensors"
    first = path.stat().st_mtime_ns
    assert pack(run, "int8").stat().st_mtime_ns == first
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert pack(run, "int8").stat().st_mtime_ns != first
    path.write_bytes(path.read_bytes()[:-5])
    assert load_packed(pack(run, "int8")).dtype == "int8"
    assert load_packed(path).config == checkpoint.load_config(run)


def test_a_checkpoint_is_packed_anew_for_another_configuration(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    pack(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text()) | {"norm_eps": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert load_packed(pack(tmp_path)).config == checkpoint.load_config(tmp_path)


def test_an_engine_is_made_from_a_run(run: Path) -> None:
    engine = Engine.from_pretrained(run.parent)
    model = checkpoint.load(run)
    import torch

    with torch.inference_mode():
        assert_close(engine.logits([1, 2, 3]), model(torch.tensor([[1, 2, 3]]))[0].numpy(), rtol=1e-5, atol=1e-4)


def test_bfloat16_checkpoints_are_read(run: Path, tmp_path: Path) -> None:
    import torch

    model = checkpoint.load(run)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_torch(half, tmp_path / "model.safetensors")
    packed = load_packed(pack(tmp_path))
    np.testing.assert_array_equal(packed.arrays["norm.weight"], half["norm.weight"].float().numpy())


def test_what_cannot_be_packed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of f32, bf16, int8, not 'f16'"):
        check_dtype("f16")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        pack(tmp_path / "none")
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(PackError, match=r"model\.safetensors is missing"):
        pack(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PackError, match=r"model\.safetensors is damaged"):
        pack(tmp_path)
    weights = load_file(run / "model.safetensors")
    weights.pop("norm.bias")
    weights["embedding.weight"] = weights["embedding.weight"][:-1]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(PackError, match=r"norm\.bias is missing; embedding\.weight has shape \[299, 16\] instead of"):
        pack(tmp_path)
    assert not list(tmp_path.glob("*packed*"))


def test_damaged_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    model = make_model(SPARSE)
    write_packed(path, model.config, "f32", as_numpy(model.state_dict()))
    load_packed(path)
    content = path.read_bytes()
    for broken, message in (
        (content[:-1], "is damaged: it is truncated"),
        (content[:100], "is damaged"),
        (content.replace(b"norm.weight", b"norm.w_ight", 1), r"attention_norm\.weight is missing; .* not part of"),
        (content.replace(b"terseformer-packed-2", b"terseformer-packed-0"), "no packed file of this version"),
        (content.replace(b'"dtype":"f32"', b'"dtype":"f64"'), "dtype must be one of"),
        (content.replace(b"hidden_size", b"hidden_seize"), "is damaged"),
    ):
        path.write_bytes(broken)
        with pytest.raises(PackError, match=message) as error:
            load_packed(path)
        assert "delete it, and it is made anew" in str(error.value)
    with pytest.raises(PackError, match="cannot read"):
        load_packed(tmp_path / "none")


def test_a_configuration_that_does_not_fit_its_arrays(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    model = make_model(SPARSE)
    write_packed(path, model.config, "f32", as_numpy(model.state_dict()))
    packed = load_packed(path)
    with pytest.raises(ValueError, match=r"has another type or shape than the model needs"):
        Engine(replace(packed, config=replace(SPARSE, hidden_size=32)))
    with pytest.raises(ValueError, match=r"the weights have no norm\.bias"):
        Engine(replace(packed, arrays={k: v for k, v in packed.arrays.items() if k != "norm.bias"}))


def test_misaligned_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    model = make_model(SPARSE)
    write_packed(path, model.config, "f32", as_numpy(model.state_dict()))
    packed = load_packed(path)
    norm = packed.arrays["norm.weight"]
    shifted = np.frombuffer(b"\0" + norm.tobytes(), np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match=r"norm\.weight do not begin at a multiple"):
        Engine(replace(packed, arrays=packed.arrays | {"norm.weight": shifted}))
