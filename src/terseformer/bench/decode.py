"""Decoding speed: models of random weights by the protocol of the paper, beside the floors and other libraries."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from terseformer import __version__, native
from terseformer.bench import rivals
from terseformer.bench.floors import FloorMeter
from terseformer.bench.groups import GROUPS, Group
from terseformer.bench.measure import CAPACITY, REST, SOURCE, TOKENS, WARM_UP, Decoder, Row, measure
from terseformer.bench.memory import in_use
from terseformer.bench.models import random_model
from terseformer.bench.parity import check_parity
from terseformer.bench.sources import read_sources
from terseformer.bench.timing import measured_in_turn
from terseformer.config import DenseFeedForwardConfig, EncoderDecoderConfig, ModelConfig
from terseformer.data import default_cache
from terseformer.layout import AnyConfig, Dtype
from terseformer.machine import commit, processor
from terseformer.model import CausalLM
from terseformer.presets import language_model_preset, preset
from terseformer.threads import default_threads, remember


class _Rival:
    """The same model by another library."""

    def __init__(self, rival: rivals.Rival | _PyTorch) -> None:
        self.rival = rival

    def __call__(self) -> float:
        """Seconds per token."""
        self.rival.start([1] * SOURCE)
        self.rival.step(WARM_UP)
        start = time.perf_counter()
        tokens = self.rival.step(TOKENS)
        return (time.perf_counter() - start) / len(tokens)


class _PyTorch:
    """The same model by PyTorch, a call for each token."""

    def __init__(self, config: ModelConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = CausalLM(config).eval()
        self.state: Any = None
        self.last = 0

    def start(self, prompt: Sequence[int]) -> None:
        """Reads a prompt into a new state."""
        self.state = self.model.new_state(1, CAPACITY)
        self.last = self._read(prompt)

    def step(self, count: int) -> list[int]:
        """Decodes some tokens."""
        tokens = []
        for _ in range(count):
            tokens.append(self.last)
            self.last = self._read([self.last])
        return tokens

    def _read(self, tokens: Sequence[int]) -> int:
        with torch.inference_mode():
            hidden = self.model.hidden(torch.tensor([list(tokens)]), self.state)
            return int(self.model.head(hidden[:, -1:]).argmax())


def bench(
    groups: tuple[Group, ...] = GROUPS, repetitions: int = 9, threads: int = 0, folder: Path | None = None
) -> dict[str, Any]:
    """Measures decoding on this machine, all models of a group in turn.

    Args:
        groups: of `800m`, the paper's 800M rows as decoders; `17b`, one block of its 17B rows; `17b-whole`, the sparse
            17B model; `0.8b`, our types of numbers and other libraries; `tiny`, the overhead of a token; `summarize`,
            the small summarisers; `terraformer`, the 800M encoder-decoders; `terraformer-17b`, a block of each side of
            the 17B ones, and `-whole`, all of the Terraformer; `sources`, the time to read a source.
        repetitions: rounds.
        threads: 0: the physical cores, or TERSE_THREADS.
        folder: where models of random weights are kept; default: in the cache.

    Returns:
        Machine, floors, rows, readings of sources, and ratios.

    Raises:
        ParityError: the engine's results are wrong.
    """
    threads = threads or default_threads()
    folder = folder or default_cache() / "bench"
    check_parity(threads)
    meter = FloorMeter(threads, (8192, 73728))
    meter()  # reading sources does not need the floors, but the result has them
    rows: list[Row] = []
    for group in groups:
        if group != "sources":
            rows += _GROUPS[group](threads, folder, repetitions, meter)
            for row in rows:
                if row.group == group:
                    print(f"{group} {row.name}: {row.milliseconds:.3f} ms a token", file=sys.stderr, flush=True)
    return {
        "machine": {
            "processor": processor(),
            "isa": native.isa(),
            "threads": threads,
            "version": __version__,
            "commit": commit(),
            "missing": rivals.missing() if "0.8b" in groups else {},
        },
        "floors": asdict(meter.floors) | {"read_spread": meter.read_spread},
        "rows": [asdict(row) for row in rows],
        "sources": [asdict(reading) for reading in (read_sources(threads, folder) if "sources" in groups else ())],
        "ratios": _ratios({(row.group, row.name): row for row in rows}),
    }


def tune(folder: Path | None = None, repetitions: int = 5) -> dict[int, float]:
    """Measures each number of threads up to the physical cores, and keeps the fastest for later.

    Args:
        folder: where the model of random weights is kept; default: in the cache.
        repetitions: rounds.

    Returns:
        Seconds a token by number of threads, for the paper's 800M sparse decoder.
    """
    folder = folder or default_cache() / "bench"
    config = language_model_preset("scaling-800m-ff-qkv-loss")
    counts = range(1, native.physical_cores() + 1)
    times = measured_in_turn([_decoder(config, "f32", count, folder) for count in counts], repetitions, rest=REST)
    medians = {count: statistics.median(seconds) for count, seconds in zip(counts, times, strict=True)}
    remember(min(medians, key=lambda count: medians[count]))
    return medians


def _decoder(config: AnyConfig, dtype: Dtype, threads: int, folder: Path) -> Decoder:
    """A model of random weights by the engine."""
    return Decoder(random_model(config, dtype, folder), threads)


def _800m(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    names = ("dense", "ff", "qkv", "ff-qkv", "ff-qkv-loss")
    runs = {name: _decoder(language_model_preset(f"scaling-800m-{name}"), "f32", threads, folder) for name in names}
    return measure("800m", dict(runs), repetitions, meter, with_blocks=True)


def _17b(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    """One block each, with a vocabulary of 16: the dense model as a whole does not fit the memory that is usual."""
    runs = {}
    for name in ("dense", "ff-qkv"):
        config = replace(
            language_model_preset(f"scaling-17b-{name}"),
            num_hidden_layers=1,
            vocab_size=16,
            max_position_embeddings=SOURCE * 4,
        )
        runs[f"{name}, one block"] = _decoder(config, "f32", threads, folder)
    return measure("17b", dict(runs), repetitions, meter)


def _17b_whole(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    """The sparse model with 14 blocks, which make 17 billion parameters without an encoder."""
    config = replace(language_model_preset("scaling-17b-ff-qkv"), num_hidden_layers=14)
    run = _decoder(config, "int8", threads, folder)
    (row,) = measure("17b-whole", {"ff-qkv int8": run}, repetitions, meter)
    return [replace(row, resident_gigabytes=in_use() / 1e9)]


def _encoder_decoder(name: str, **changes: Any) -> EncoderDecoderConfig:
    config = preset(name)
    assert not isinstance(config, ModelConfig)
    return replace(config, **changes)


def _summarize(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    names = ("dense", "scaling", "terraformer")
    presets = {name: _encoder_decoder(f"summarize-1m-{name}", max_position_embeddings=512) for name in names}
    runs = {name: _decoder(config, "f32", threads, folder) for name, config in presets.items()}
    return measure("summarize", dict(runs), 5 * repetitions, meter)


def _terraformer(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    names = ("seq2seq-800m-dense", "seq2seq-800m-ff-qkv-loss", "terraformer-800m")
    runs = {
        name: _decoder(_encoder_decoder(name, max_position_embeddings=512), "f32", threads, folder) for name in names
    }
    return measure("terraformer", dict(runs), repetitions, meter)


def _terraformer_17b(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    """One block of each side, with a vocabulary of 16."""
    runs = {}
    for name in ("seq2seq-17b-dense", "terraformer-17b"):
        config = _encoder_decoder(
            name, num_encoder_layers=1, num_decoder_layers=1, vocab_size=16, max_position_embeddings=SOURCE * 4
        )
        runs[f"{name}, one block"] = _decoder(config, "f32", threads, folder)
    return measure("terraformer-17b", dict(runs), repetitions, meter)


def _terraformer_17b_whole(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    run = _decoder(_encoder_decoder("terraformer-17b"), "int8", threads, folder)
    (row,) = measure("terraformer-17b-whole", {"terraformer-17b int8": run}, repetitions, meter)
    return [replace(row, resident_gigabytes=in_use() / 1e9)]


def _08b(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    dense, sparse = language_model_preset("decoder-0.8b-dense"), language_model_preset("decoder-0.8b-ff-qkv-loss")
    feed_forward = dense.feed_forward
    assert isinstance(feed_forward, DenseFeedForwardConfig)
    sizes = rivals.Sizes(
        dense.vocab_size,
        dense.hidden_size,
        dense.num_hidden_layers,
        dense.num_attention_heads,
        feed_forward.intermediate_size,
        dense.max_position_embeddings,
    )
    runs: dict[str, Decoder | _Rival] = {}
    for dtype in ("f32", "int8"):
        runs[f"dense {dtype}"] = _decoder(dense, dtype, threads, folder)
    for dtype in ("f32", "bf16", "int8"):
        runs[f"sparse {dtype}"] = _decoder(sparse, dtype, threads, folder)
    missing = rivals.missing()
    if "llama-cpp-python" not in missing and "gguf" not in missing:
        for quantisation in ("F32", "Q8_0", "Q4_0"):
            runs[f"llama.cpp {quantisation}"] = _Rival(rivals.llama_cpp(sizes, quantisation, threads, folder))
    if "ctranslate2" not in missing:
        runs["CTranslate2 int8"] = _Rival(rivals.ctranslate2(sizes, threads, folder))
    runs["PyTorch f32"] = _Rival(_PyTorch(dense, threads))
    return measure("0.8b", runs, repetitions, meter)


def _tiny(threads: int, folder: Path, repetitions: int, meter: FloorMeter) -> list[Row]:
    config = replace(language_model_preset("tiny"), max_position_embeddings=64)
    runs = {f"{count} threads": _decoder(config, "f32", count, folder) for count in sorted({1, threads})}
    return measure("tiny", dict(runs), 5 * repetitions, meter)


_GROUPS = {
    "800m": _800m,
    "0.8b": _08b,
    "tiny": _tiny,
    "summarize": _summarize,
    "terraformer": _terraformer,
    "17b": _17b,
    "terraformer-17b": _terraformer_17b,
    "17b-whole": _17b_whole,
    "terraformer-17b-whole": _terraformer_17b_whole,
}


def _ratios(rows: dict[tuple[str, str], Row]) -> dict[str, float]:
    """What the rows that were measured say together: of two, the median of their rounds' ratios."""
    ratios: dict[str, float] = {}

    def ratio(key: str, slow: tuple[str, str], fast: tuple[str, str]) -> None:
        if slow in rows and fast in rows:
            pairs = zip(rows[slow].rounds, rows[fast].rounds, strict=True)
            ratios[key] = statistics.median(one / other for one, other in pairs)

    dense = rows.get(("0.8b", "dense f32")) or rows.get(("800m", "dense"))
    if dense is not None and dense.floor_fraction is not None:
        ratios["dense_f32_vs_bandwidth"] = dense.floor_fraction
    ratio("dense_f32_vs_llamacpp_f32", ("0.8b", "llama.cpp F32"), ("0.8b", "dense f32"))
    ratio("800m_sparse_vs_dense_f32", ("800m", "dense"), ("800m", "ff-qkv-loss"))
    ratio("17b_block_sparse_vs_dense_f32", ("17b", "dense, one block"), ("17b", "ff-qkv, one block"))
    for name in ("seq2seq-800m-ff-qkv-loss", "terraformer-800m"):
        ratio(f"{name}_vs_dense_f32", ("terraformer", "seq2seq-800m-dense"), ("terraformer", name))
    blocks = [("terraformer-17b", f"{name}, one block") for name in ("seq2seq-17b-dense", "terraformer-17b")]
    ratio("terraformer-17b_block_vs_dense_f32", *blocks)
    ratio("0.8b_int8_vs_llamacpp_q8_0", ("0.8b", "llama.cpp Q8_0"), ("0.8b", "sparse int8"))
    ratio("0.8b_int8_vs_llamacpp_q4_0", ("0.8b", "llama.cpp Q4_0"), ("0.8b", "sparse int8"))
    ratio("0.8b_int8_vs_ctranslate2_int8", ("0.8b", "CTranslate2 int8"), ("0.8b", "sparse int8"))
    sparse = rows.get(("800m", "ff-qkv-loss"))
    if sparse is not None and sparse.floor_fraction is not None:
        ratios["800m_sparse_f32_vs_floor"] = sparse.floor_fraction
    tiny = [row.milliseconds for (group, _), row in rows.items() if group == "tiny"]
    if tiny:
        ratios["tiny_us_per_token"] = 1e3 * min(tiny)
    return ratios
