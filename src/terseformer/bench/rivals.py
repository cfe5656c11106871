"""Decoding by other libraries: a dense model like GPT-2 of given sizes, with random weights.

Each library decodes by its own means and with its own defaults: llama.cpp with GELU, and keys and values in float16;
CTranslate2 with ReLU, and those in float32. A call of `step` is the same in both: for each token, one pass of the model
over that token, and an argmax.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from terseformer.bench.models import RandomWeights
from terseformer.layout import quantise

Quantisation = Literal["F32", "Q8_0", "Q4_0"]
_EPSILON = 1e-5
_BLOCK = 32
"""Numbers that share a scale in llama.cpp's types."""
_MODULES = {"llama-cpp-python": "llama_cpp", "gguf": "gguf", "ctranslate2": "ctranslate2"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a dense decoder: learned positions, norms before the sublayers, biases, a head of its own."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_positions: int


class Rival(ABC):
    """A model in another library, with one text."""

    name: str
    """Library and type of the weights."""
    version: str
    """The library's."""

    @abstractmethod
    def start(self, prompt: Sequence[int]) -> None:
        """Forgets everything and reads a prompt, up to the logits of the token after it.

        Raises:
            ValueError: the prompt is empty or longer than `max_positions`.
        """

    @abstractmethod
    def step(self, count: int) -> list[int]:
        """The next tokens, the most probable each time; the model reads each before the call returns.

        Raises:
            ValueError: the text would be longer than `max_positions`.
        """


def missing() -> dict[str, str]:
    """Libraries that cannot be imported, and what to install with pip."""
    return {name: name for name, module in _MODULES.items() if not _can_import(module)}


def llama_cpp(sizes: Sizes, quantisation: Quantisation, threads: int, folder: Path) -> Rival:
    """A model in llama.cpp, on the CPU.

    All matrices have the type `quantisation`, the head too, which llama.cpp's own tool makes Q6_K where the rest is
    Q4_0. A row of Q8_0 or Q4_0 is a whole number of blocks of 32: `intermediate_size` is rounded down to one, so that
    llama.cpp has no more to do than others.

    Args:
        sizes: of the model.
        quantisation: type of the matrices.
        threads: of the computation.
        folder: where the model's GGUF file is kept and used again.

    Raises:
        ImportError: llama-cpp-python or gguf is missing.
        ValueError: `hidden_size` is no multiple of 32, and the matrices are Q8_0 or Q4_0.
    """
    if quantisation != "F32":
        sizes = replace(sizes, intermediate_size=sizes.intermediate_size // _BLOCK * _BLOCK)
    path = _made(folder / f"{_name(sizes)}-{quantisation}.gguf", lambda path: _write_gguf(path, sizes, quantisation))
    return _LlamaCpp(path, f"llama.cpp {quantisation}", sizes, threads)


def ctranslate2(sizes: Sizes, threads: int, folder: Path) -> Rival:
    """A model in CTranslate2 with int8 matrices, on the CPU.

    CTranslate2 generates a text in one call, in a thread of its own. Its callback after each token holds that thread
    until `step` asks for the next one, so that nothing is computed between the calls. This costs some 30 microseconds a
    token.

    Args:
        sizes: of the model.
        threads: of the computation.
        folder: where the model's folder is kept and used again.

    Raises:
        ImportError: ctranslate2 is missing.
    """
    path = _made(folder / f"{_name(sizes)}-ctranslate2", lambda path: _write_ctranslate2(path, sizes))
    return _CTranslate2(path, sizes.max_positions, threads)


class _LlamaCpp(Rival):
    def __init__(self, path: Path, name: str, sizes: Sizes, threads: int) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # else llama.cpp tells what it does
        import llama_cpp

        self.name, self.version = name, llama_cpp.__version__
        self._vocab_size, self._max_positions = sizes.vocab_size, sizes.max_positions
        self._length, self._last = 0, 0
        library: Any = llama_cpp
        self._library = library
        library.llama_backend_init()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = 0
        model = library.llama_model_load_from_file(str(path).encode(), model_options)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        weakref.finalize(self, library.llama_model_free, model)
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = sizes.max_positions
        options.n_threads = options.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {sizes.max_positions} tokens for {path}")
        weakref.finalize(self, library.llama_free, self._context)  # runs before the model's

    def start(self, prompt: Sequence[int]) -> None:
        _require_room(len(prompt), self._max_positions)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._length = 0
        self._last = self._read(prompt)

    def step(self, count: int) -> list[int]:
        _require_room(self._length + count, self._max_positions)
        tokens = []
        for _ in range(count):
            tokens.append(self._last)
            self._last = self._read([self._last])
        return tokens

    def _read(self, tokens: Sequence[int]) -> int:
        """The most probable token after these, which follow those that were read before."""
        array = (self._library.llama_token * len(tokens))(*tokens)
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")
        self._length += len(tokens)
        return int(self.logits().argmax())

    def logits(self) -> np.ndarray:
        """Logits of the next token, [vocab_size], which the next pass overwrites."""
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))


class _CTranslate2(Rival):
    name = "CTranslate2 int8"

    def __init__(self, path: Path, max_positions: int, threads: int) -> None:
        import ctranslate2

        self.version = ctranslate2.__version__
        self._held = _HeldGenerator(
            ctranslate2.Generator(str(path), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1)
        )
        weakref.finalize(self, self._held.close)
        self._max_positions, self._length, self._last = max_positions, 0, 0

    def start(self, prompt: Sequence[int]) -> None:
        _require_room(len(prompt), self._max_positions)
        self._held.start(prompt, self._max_positions - len(prompt) + 1)
        self._length = len(prompt)
        self._last = self._held.token()

    def step(self, count: int) -> list[int]:
        _require_room(self._length + count, self._max_positions)
        self._length += count
        self._held.allow(count)
        tokens = [self._last, *(self._held.token() for _ in range(count))]
        self._last = tokens.pop()
        return tokens


class _HeldGenerator:
    """CTranslate2's generator with one text, whose thread waits after each token until it is allowed to go on.

    Args:
        generator: a `ctranslate2.Generator` to which nothing else refers, so that `close` can end its thread.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._result: Any = None

    def start(self, prompt: Sequence[int], max_length: int) -> None:
        """Begins a text of at most `max_length` tokens after the prompt; the first is computed at once."""
        self.stop()
        self._tokens: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._allowed = threading.Semaphore(0)
        self._is_stopped = False
        (self._result,) = self._generator.generate_batch(
            [[str(token) for token in prompt]],
            max_length=max_length,
            beam_size=1,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            asynchronous=True,
            callback=self._arrived,
        )

    def _arrived(self, result: Any) -> bool:
        """Called in CTranslate2's thread; true ends the text."""
        self._tokens.put(result.token_id)
        self._allowed.acquire()
        return self._is_stopped

    def allow(self, count: int) -> None:
        """Lets it compute some tokens."""
        self._allowed.release(count)

    def token(self) -> int:
        """Waits for the next token.

        Raises:
            RuntimeError: the library failed.
        """
        while True:
            try:
                return self._tokens.get(timeout=1)
            except queue.Empty:
                if self._result.done():
                    self._result.result()
                    raise RuntimeError("CTranslate2 ended the text too early") from None

    def stop(self) -> None:
        """Ends the text, if there is one."""
        if self._result is not None:
            self._is_stopped = True
            self.allow(1)
            with contextlib.suppress(RuntimeError):  # which `token` has raised
                self._result.result()

    def close(self) -> None:
        """Ends the text and the thread, which would not outlive the interpreter."""
        self.stop()
        self._generator = None


def _can_import(module: str) -> bool:
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError):  # the latter two where its shared library does not load
        return False
    return True


def _require_room(length: int, max_positions: int) -> None:
    if not 1 <= length <= max_positions:
        raise ValueError(f"a text of {length} tokens, where 1 to {max_positions} are allowed")


def _name(sizes: Sizes) -> str:
    return "-".join(["gpt2", *map(str, astuple(sizes))])


def _made(path: Path, write: Callable[[Path], None]) -> Path:
    """A path, whose file or folder is written if it is not there, whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as building:
            write(Path(building, path.name))
            Path(building, path.name).replace(path)
    return path


def _weights(sizes: Sizes) -> RandomWeights:
    """Weights by llama.cpp's names, [outputs, inputs]; `attn_qkv` has the rows of queries, keys and values."""
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (sizes.vocab_size, hidden),
        "position_embd.weight": (sizes.max_positions, hidden),
    }
    for block in range(sizes.num_hidden_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_qkv": (3 * hidden, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }.items():
            shapes |= {f"blk.{block}.{name}.weight": shape, f"blk.{block}.{name}.bias": shape[:1]}
    shapes |= {"output_norm.weight": (hidden,), "output_norm.bias": (hidden,)}
    shapes |= {"output.weight": (sizes.vocab_size, hidden)}
    return RandomWeights(shapes)


def _write_gguf(path: Path, sizes: Sizes, quantisation: Quantisation) -> None:
    """Writes a GGUF file, tensor by tensor; its tokenizer knows how many tokens there are, and nothing more."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    weights = _weights(sizes)
    kinds = {
        name: GGMLQuantizationType[quantisation if len(shape) == 2 else "F32"] for name, shape in weights.shapes.items()
    }
    writer = GGUFWriter(path, "gpt2")
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_context_length(sizes.max_positions)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_layer_norm_eps(_EPSILON)
    writer.add_tokenizer_model("none")
    for name, kind in kinds.items():
        shape = quant_shape_to_byte_shape(weights.shapes[name], kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in kinds.items():
        writer.write_tensor_data(quantize(weights[name], kind))
    writer.close()


def _write_ctranslate2(path: Path, sizes: Sizes) -> None:
    """Writes a model's folder; a token of its vocabulary is called by its number."""
    from ctranslate2.specs import TransformerDecoderModelSpec

    weights = _weights(sizes)
    spec: Any = TransformerDecoderModelSpec.from_config(sizes.num_hidden_layers, sizes.num_attention_heads)
    decoder = spec.decoder

    def matrix(part: Any, name: str) -> None:
        part.weight, scales = quantise(weights[f"{name}.weight"])
        part.weight_scale = 1 / scales
        if f"{name}.bias" in weights.shapes:
            part.bias = weights[f"{name}.bias"]

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    matrix(decoder.embeddings, "token_embd")
    decoder.scale_embeddings = False
    decoder.position_encodings.encodings = weights["position_embd.weight"]
    for index, layer in enumerate(decoder.layer):
        attention, feed_forward = layer.self_attention, layer.ffn
        norm(attention.layer_norm, f"blk.{index}.attn_norm")
        matrix(attention.linear[0], f"blk.{index}.attn_qkv")
        matrix(attention.linear[1], f"blk.{index}.attn_output")
        norm(feed_forward.layer_norm, f"blk.{index}.ffn_norm")
        matrix(feed_forward.linear_0, f"blk.{index}.ffn_up")
        matrix(feed_forward.linear_1, f"blk.{index}.ffn_down")
    norm(decoder.layer_norm, "output_norm")
    matrix(decoder.projection, "output")
    spec.register_vocabulary([str(token) for token in range(sizes.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.config.layer_norm_epsilon = _EPSILON
    spec.validate()
    path.mkdir()
    spec.save(str(path))
