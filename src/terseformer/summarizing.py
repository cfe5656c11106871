"""Summaries by an encoder-decoder: of texts, and of a validation text, beside what its authors wrote."""

from __future__ import annotations

import functools
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from terseformer import checkpoint, data
from terseformer.config import ConfigError, ModelConfig
from terseformer.engine import Engine
from terseformer.errors import UserError
from terseformer.evaluation import Evaluation
from terseformer.generation import generate
from terseformer.layout import Dtype
from terseformer.models import AnyModel
from terseformer.objectives import Pairs, make_objective
from terseformer.rouge import Interval, baselines, rouge
from terseformer.sampling import DEFAULT_SUMMARY, GenerationError, SamplingConfig
from terseformer.text import Generation, source_ids

MAX_FILE_BYTES = 2**26
_TOGETHER = 16
_EXAMPLES = 5


@dataclass(frozen=True)
class SummaryEvaluation:
    """What an encoder-decoder makes of the pairs that it was not trained on."""

    evaluation: Evaluation
    """The loss on the targets."""
    rouge: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """ROUGE of the model's summaries (`model`) and of each baseline's; none where it was not trained on pairs."""
    num_pairs: int = 0
    """Pairs that were summarised."""
    num_left_out: int = 0
    """Pairs that are longer than the model was trained for."""
    tokens_per_second: float = 0.0
    """Tokens that the model wrote in a second, the reading of sources included."""
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    """Some sources, with the reference and the model's summary of each."""


class Summarizer:
    """An encoder-decoder with its tokenizer.

    Args:
        folder: a checkpoint's or a run's folder.
        engine_dtype: writes by the engine, its matrices in this type; None: by PyTorch.
        threads: of the engine; default `default_threads`.

    Raises:
        CheckpointError: there is none, it is damaged, or it has no tokenizer.
        ConfigError: it holds a language model, or one that the engine does not know.
    """

    def __init__(self, folder: Path, engine_dtype: Dtype | None = None, threads: int | None = None) -> None:
        self.path = checkpoint.find(folder)
        config = checkpoint.load_config(self.path)
        if isinstance(config, ModelConfig):
            raise ConfigError(f"{self.path} holds a model of kind {config.kind!r}, which reads no sources")
        self.config = config
        self.tokenizer: Tokenizer = data.load_tokenizer(self.path)
        self.engine = Engine.from_pretrained(self.path, engine_dtype, threads) if engine_dtype else None

    @functools.cached_property
    def model(self) -> AnyModel:
        """The model as a module."""
        return checkpoint.load(self.path)

    @property
    def limit(self) -> int:
        """Longest source, in tokens."""
        return self.config.max_position_embeddings

    def num_tokens(self, text: str) -> int:
        """Tokens of a source."""
        return len(source_ids(self.tokenizer, text, self.config.pad_token_id))

    def summarize(self, texts: Sequence[str], sampling: SamplingConfig = DEFAULT_SUMMARY) -> list[str]:
        """A summary of each text.

        Args:
            texts: the sources.
            sampling: how the summaries are drawn.

        Raises:
            GenerationError: a text is empty or longer than the model's positions.
        """
        return self._write(texts, sampling)[0]

    def _write(self, texts: Sequence[str], sampling: SamplingConfig) -> tuple[list[str], int]:
        """The summaries, and how many tokens were written for them."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        written, num_written = [""] * len(texts), 0
        for start in range(0, len(order), _TOGETHER):
            together = order[start : start + _TOGETHER]
            results = self._generate([texts[i] for i in together], sampling)
            for i, result in zip(together, results, strict=True):
                written[i] = result.text.strip()
                num_written += len(result.token_ids)
        return written, num_written

    def _generate(self, texts: list[str], sampling: SamplingConfig) -> list[Generation]:
        if self.engine is not None:
            return self.engine.generate(texts, sampling)
        return generate(self.model, self.tokenizer, texts, sampling)

    def parts(self, text: str) -> Iterator[str]:
        """A text in parts that the model can read; they end where paragraphs, lines, sentences or words do.

        Raises:
            GenerationError: the model cannot even read a single character.
        """
        starts = [start for start, _ in self.tokenizer.encode(text, add_special_tokens=False).offsets]
        begin = 0
        while begin < len(text):
            room = self.limit - self.num_tokens("")  # what ends each source has its place
            while True:  # a part by itself may have a token more than within the text
                last = bisect_left(starts, begin) + room
                end = len(text) if last >= len(starts) else _last_boundary(text, begin, starts[last])
                part = text[begin:end].strip()
                if self.num_tokens(part) <= self.limit:
                    break
                room = room * 3 // 4
            if end <= begin:
                raise GenerationError(
                    f"{text[begin]!r} alone has more tokens than the {self.limit} that the model reads at most "
                    "(max_position_embeddings); take a model for longer sources"
                )
            if part:
                yield part
            begin = end

    def evaluate(self, num_pairs: int = 0, sampling: SamplingConfig = DEFAULT_SUMMARY) -> SummaryEvaluation:
        """Scores targets, and summaries if it was trained on pairs, of what its recipe keeps for validation.

        Args:
            num_pairs: pairs (or windows without their spans) at most, evenly spaced; 0 takes all.
            sampling: how the summaries are drawn.

        Raises:
            CheckpointError, DataError: the recipe or its data cannot be read, or have changed.
        """
        recipe = checkpoint.load_recipe(self.path)
        prepared = data.prepare_in_cache(checkpoint.data_config(self.path, recipe))
        if prepared.validation.tokenizer_sha256 != data.fingerprint(self.tokenizer):
            raise data.DataError(f"data.sources have changed since {self.path} was trained and give another tokenizer")
        objective = make_objective(recipe, prepared)
        evaluation = objective.evaluate(self.model, num_pairs)
        if not isinstance(objective, Pairs):
            return SummaryEvaluation(evaluation)
        pairs = objective.validation_pairs
        chosen = data.evenly_spaced(len(pairs), num_pairs).tolist()
        sources, references = (
            [self.tokenizer.decode(tokens(i).tolist()) for i in chosen] for tokens in (pairs.source, pairs.target)
        )
        start = time.perf_counter()
        summaries, num_written = self._write(sources, sampling)
        seconds = time.perf_counter() - start
        num_words = sum(len(text.split()) for text in references) / len(references)
        others = {name: [short(text) for text in sources] for name, short in baselines(num_words).items()}
        return SummaryEvaluation(
            evaluation,
            {name: rouge(references, texts) for name, texts in ({"model": summaries} | others).items()},
            len(chosen),
            pairs.num_left_out,
            num_written / seconds,
            list(zip(sources, references, summaries, strict=True))[:_EXAMPLES],
        )


def _last_boundary(text: str, begin: int, end: int) -> int:
    """Where to cut a text before `end`: behind the last paragraph, line, sentence or word in the second half."""
    for separator in ("\n\n", "\n", ". ", " "):
        at = text.rfind(separator, (begin + end) // 2, end)
        if at >= 0:
            return at + len(separator)
    return end


def read_source(path: Path) -> str:
    """The text of a file that shall be summarised, or of the standard input for `-`.

    Raises:
        UserError: it cannot be read, is empty, larger than 64 MiB, or no text.
    """
    name = "the standard input" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{name} is larger than {MAX_FILE_BYTES} bytes; divide it")
    if b"\0" in content:
        raise UserError(f"{name} is no text: it has a zero byte at offset {content.index(0)}; give a text file")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} cannot be decoded; "
            "convert it to UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{name} is empty; there is nothing to summarise")
    return text


def summarize_files(
    summarizer: Summarizer,
    files: Sequence[tuple[Path, str]],
    divide: bool = False,
    sampling: SamplingConfig = DEFAULT_SUMMARY,
) -> Iterator[list[str]]:
    """For each file, its summary, or one for each part of it.

    Args:
        summarizer: the model.
        files: their paths, for messages, and their texts.
        divide: whether files that are too long are divided.
        sampling: how the summaries are drawn.

    Raises:
        GenerationError: a file is longer than the model's positions and not to be divided; nothing is written.
    """
    sources = []
    for path, whole in files:
        text = whole.strip()
        length = summarizer.num_tokens(text)
        if length > summarizer.limit and not divide:
            raise GenerationError(
                f"{path} has {length} tokens, but the model reads {summarizer.limit} at most "
                "(max_position_embeddings); give --divide for a summary of each part, or a model for longer sources"
            )
        sources.append(list(summarizer.parts(text)) if length > summarizer.limit else [text])
    for parts in sources:
        yield summarizer.summarize(parts, sampling)
