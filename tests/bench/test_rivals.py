"""Other libraries: they decode the model that was written, token by token, and nothing between the calls."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from terseformer.bench import rivals
from terseformer.bench.models import RandomWeights
from terseformer.bench.rivals import Rival, Sizes

SIZES = Sizes(512, 64, 2, 4, 256, 64)
PROMPT = [1, 5, 300, 2, 2]
MAKE: dict[str, Callable[[Path], Rival]] = {
    "F32": lambda folder: rivals.llama_cpp(SIZES, "F32", 1, folder),
    "Q8_0": lambda folder: rivals.llama_cpp(SIZES, "Q8_0", 1, folder),
    "Q4_0": lambda folder: rivals.llama_cpp(SIZES, "Q4_0", 1, folder),
    "int8": lambda folder: rivals.ctranslate2(SIZES, 2, folder),
}
needs_ctranslate2 = pytest.mark.skipif("ctranslate2" in rivals.missing(), reason="ctranslate2 is not installed")
needs_llama_cpp = pytest.mark.skipif(
    bool({"llama-cpp-python", "gguf"} & rivals.missing().keys()), reason="llama-cpp-python or gguf is not installed"
)
each_rival = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=id, marks=needs_ctranslate2 if id == "int8" else needs_llama_cpp)
        for id, make in MAKE.items()
    ],
)


@each_rival
def test_a_text_is_the_same_again_and_in_parts(make: Callable[[Path], Rival], tmp_path: Path) -> None:
    rival = make(tmp_path)
    rival.start(PROMPT)
    whole = rival.step(5)
    assert len(whole) == 5
    rival.start([7])
    assert rival.step(4) != whole[:4]
    rival.start(PROMPT)
    assert rival.step(3) + rival.step(2) == whole
    again = make(tmp_path)
    again.start(PROMPT)
    assert again.step(5) == whole


@each_rival
def test_what_was_written_is_used_again(make: Callable[[Path], Rival], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "models"
    assert make(folder).version[0].isdigit()
    (path,) = folder.iterdir()
    first = path.stat().st_mtime_ns
    make(folder)
    assert [path] == list(folder.iterdir())
    assert path.stat().st_mtime_ns == first


@each_rival
def test_a_text_fills_the_positions_and_no_more(make: Callable[[Path], Rival], tmp_path: Path) -> None:
    rival = make(tmp_path)
    rival.start(PROMPT)
    assert len(rival.step(59)) == 59
    with pytest.raises(ValueError, match="a text of 65 tokens, where 1 to 64 are allowed"):
        rival.step(1)
    for prompt in ([], [1] * 65):
        with pytest.raises(ValueError, match="where 1 to 64 are allowed"):
            rival.start(prompt)
    rival.start([1] * 64)
    with pytest.raises(ValueError, match="a text of 65 tokens"):
        rival.step(1)


@each_rival
def test_a_program_ends_with_a_text_begun(make: Callable[[Path], Rival], tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from test_rivals import MAKE; "
        f"rival = MAKE[{next(name for name, m in MAKE.items() if m is make)!r}](Path({str(tmp_path)!r})); "
        "rival.start([1, 2]); print(len(rival.step(3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@needs_ctranslate2
def test_ctranslate2_waits_between_the_calls(tmp_path: Path) -> None:
    rival = rivals.ctranslate2(SIZES, 1, tmp_path)
    rival.start(PROMPT)
    rival.step(2)
    time.sleep(0.2)
    assert rival._held._tokens.empty()
    assert not rival._held._result.done()


@needs_ctranslate2
def test_an_error_in_ctranslate2_is_seen(tmp_path: Path) -> None:
    rival = rivals.ctranslate2(SIZES, 1, tmp_path)
    rival._max_positions = 1000
    rival.start(PROMPT)
    with pytest.raises(RuntimeError, match="position"):
        rival.step(100)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> RandomWeights:
    """Those of SIZES, random also where a timed model has ones and zeros."""

    class Random(RandomWeights):
        def __getitem__(self, name: str) -> np.ndarray:
            shape = self.shapes[name]
            if len(shape) == 2:
                return super().__getitem__(name)
            rng = np.random.default_rng(list(name.encode()))
            return (name.endswith("norm.weight") + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    monkeypatch.setattr(rivals, "RandomWeights", Random)
    return rivals._weights(SIZES)


def gpt2(weights: RandomWeights, tokens: Sequence[int], activation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Logits after the last token, in float64."""

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T.astype(np.float64) + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length, heads = len(tokens), SIZES.num_attention_heads
    x = weights["token_embd.weight"][list(tokens)].astype(np.float64) + weights["position_embd.weight"][:length]
    for block in range(SIZES.num_hidden_layers):
        qkv = dense(norm(x, f"blk.{block}.attn_norm"), f"blk.{block}.attn_qkv")
        q, k, v = qkv.reshape(length, 3, heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        x = x + dense((shares @ v).transpose(1, 0, 2).reshape(length, -1), f"blk.{block}.attn_output")
        wide = activation(dense(norm(x, f"blk.{block}.ffn_norm"), f"blk.{block}.ffn_up"))
        x = x + dense(wide, f"blk.{block}.ffn_down")
    return norm(x, "output_norm")[-1] @ weights["output.weight"].T.astype(np.float64)


def gelu(x: np.ndarray) -> np.ndarray:
    """As llama.cpp has it, from a table of float16."""
    x = x.astype(np.float16).astype(np.float64)
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float16)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@needs_llama_cpp
def test_llama_cpp_computes_the_model(weights: RandomWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its shortcuts exactly: keys, values and attention in float16."""
    import llama_cpp

    options = llama_cpp.llama_context_default_params()
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    monkeypatch.setattr(llama_cpp, "llama_context_default_params", lambda: options)
    rival = rivals.llama_cpp(SIZES, "F32", 1, tmp_path)
    rival.start(PROMPT)
    text = PROMPT
    for _ in range(20):
        logits = gpt2(weights, text, gelu)
        np.testing.assert_allclose(rival.logits(), logits, rtol=0, atol=1e-3)
        token = logits.argmax()
        assert rival.step(1) == [token]
        text = [*text, token]


@needs_llama_cpp
@pytest.mark.parametrize(("quantisation", "tolerance"), [("F32", 0.002), ("Q8_0", 0.04), ("Q4_0", 0.5)])
def test_llama_cpp_as_it_is_timed_computes_the_model_roughly(
    weights: RandomWeights, tmp_path: Path, quantisation: rivals.Quantisation, tolerance: float
) -> None:
    rival = rivals.llama_cpp(SIZES, quantisation, 1, tmp_path)
    rival.start(PROMPT)
    text = PROMPT
    for _ in range(4):
        logits = gpt2(weights, text, gelu)
        difference = rival.logits() - logits
        assert np.linalg.norm(difference) < tolerance * np.linalg.norm(logits)
        text = text + rival.step(1)


@needs_ctranslate2
def test_ctranslate2_computes_the_model(weights: RandomWeights, tmp_path: Path) -> None:
    rival = rivals.ctranslate2(SIZES, 1, tmp_path)
    rival.start(PROMPT)
    text = PROMPT
    for _ in range(20):
        logits = gpt2(weights, text, relu)
        (token,) = rival.step(1)
        assert logits[token] > logits.max() - 0.05
        text = [*text, token]


@needs_ctranslate2
def test_no_token_ends_a_text_of_ctranslate2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first, which the vocabulary must call its end."""

    class First(RandomWeights):
        def __getitem__(self, name: str) -> np.ndarray:
            array = super().__getitem__(name)
            if name == "output_norm.weight":
                return 0 * array
            if name == "output_norm.bias":
                return array + 1
            return np.where(np.arange(len(array))[:, None] == 0, 1, -abs(array)) if name == "output.weight" else array

    monkeypatch.setattr(rivals, "RandomWeights", First)
    rival = rivals.ctranslate2(SIZES, 1, tmp_path)
    rival.start(PROMPT)
    assert rival.step(20) == [0] * 20


@needs_llama_cpp
def test_llama_cpp_has_no_more_to_do_where_a_width_is_no_whole_number_of_blocks(tmp_path: Path) -> None:
    rivals.llama_cpp(replace(SIZES, intermediate_size=88), "Q8_0", 1, tmp_path)
    rivals.llama_cpp(replace(SIZES, intermediate_size=88), "F32", 1, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpt2-512-64-2-4-64-64-Q8_0.gguf",
        "gpt2-512-64-2-4-88-64-F32.gguf",
    ]
    with pytest.raises(ValueError, match="not a multiple of Q4_0 block size"):
        rivals.llama_cpp(replace(SIZES, hidden_size=72), "Q4_0", 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert rivals.missing()["gguf"] == "gguf"
    monkeypatch.setitem(sys.modules, "gguf", rivals)
    assert "gguf" not in rivals.missing()
