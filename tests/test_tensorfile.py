"""Tensor files: the format is the library's, and damage is found when a file is opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from terseformer import tensorfile
from terseformer.tensorfile import Declared, TensorFileError

ARRAYS = {
    "odd": np.arange(6, dtype=np.float32).reshape(2, 3),
    "whole_line": np.arange(64, dtype=np.int8),
    "half": np.array([1.5, -2], np.float16),
    "empty": np.zeros((0, 4), np.float32),
}


def write(path: Path) -> None:
    names = {"float32": "F32", "int8": "I8", "float16": "F16"}
    tensors = [(name, Declared(names[str(x.dtype)], x.shape), lambda x=x: x) for name, x in ARRAYS.items()]
    tensorfile.write(path, tensors, {"key": "value"})


def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    write(tmp_path / "file")
    ours, theirs = tensorfile.read(tmp_path / "file"), load_file(tmp_path / "file")
    assert ours.metadata == {"key": "value"}
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(ours.arrays[name], expected)
        np.testing.assert_array_equal(theirs[name], expected)
    assert ours.arrays["whole_line"].ctypes.data % 64 == 0
    assert not ours.arrays["odd"].flags.writeable


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    save_file({"odd": ARRAYS["odd"]}, tmp_path / "file")
    np.testing.assert_array_equal(tensorfile.read(tmp_path / "file").arrays["odd"], ARRAYS["odd"])


def damaged(header: object, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        (1 << 60).to_bytes(8, "little") + b"{}",
        damaged(b"{not json}"),
        damaged([1]),
        damaged(b"[" * 100_000),
        damaged({"x": GOOD}, b"\0" * 23),
        damaged({"x": GOOD | {"shape": [2, 4]}}),
        damaged({"x": GOOD | {"shape": [-2, -3]}}),
        damaged({"x": GOOD | {"shape": "23"}}),
        damaged({"x": GOOD | {"dtype": "C64"}}),
        damaged({"x": GOOD | {"data_offsets": [-24, 0]}}),
        damaged({"x": GOOD | {"data_offsets": [8, 32]}}),
        damaged({"x": GOOD | {"data_offsets": [0]}}),
        damaged({"x": {}}),
        damaged({"x": 3}),
    ],
)
def test_damage_is_found(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TensorFileError, match=r"file is damaged: "):
        tensorfile.read(tmp_path / "file")


def test_missing_file_and_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="cannot read .*: No such file"):
        tensorfile.read(tmp_path / "none")
    with pytest.raises(TensorFileError, match="cannot write .*: No such file"):
        write(tmp_path / "none" / "file")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def fail() -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(TensorFileError, match="No space left on device"):
        tensorfile.write(tmp_path / "file", [("x", Declared("F32", (2,)), fail)], {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before
