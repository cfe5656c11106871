"""Decoding by the native engine: the same texts as the PyTorch path gives, at the speed of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from tokenizers import Tokenizer

from terseformer import native, tensorfile
from terseformer.config import ConfigError, ModelConfig
from terseformer.configfile import to_dict
from terseformer.data import load_tokenizer
from terseformer.folder import find
from terseformer.layout import Dtype
from terseformer.pack import Packed, load_packed, pack
from terseformer.sampling import DEFAULT_SAMPLING, GenerationError, SamplingConfig, nothing_left
from terseformer.session import SESSION_FORMAT, Session, Snapshot
from terseformer.tensorfile import TensorFileError
from terseformer.text import FinishReason, Generation, TextWriter, check_source, end_of_text_ids, token_bytes
from terseformer.threads import MAX_THREADS, default_threads

MAX_ROWS = 128
"""Tokens that pass through the model together when a prompt is read."""
MAX_RUNS = 8
"""Texts that are written together."""
_STREAM_SECONDS = 0.02
_FOREVER = 1 << 30


@dataclass(frozen=True)
class Touched:
    """Which units of the decoder's L feed-forward layers T tokens touched; G is 0 where a dense layer is read whole."""

    chosen: Int32[np.ndarray, "T L G"]
    """Which of its N units each block's controller chose; of a block or switch layer, whose G is 1, which expert."""
    active: Int32[np.ndarray, "T L G"]
    """How many units of the choice the ReLU let through: 0 or 1, of an expert up to all; the other units' rows of the
    second matrix were not read."""


class Engine:
    """A model whose tokens are computed natively.

    Several engines may share the weights of one packed model, and several sessions one engine. Calls from several
    threads follow one another; the interpreter runs on while they compute.

    Args:
        packed: the weights.
        tokenizer: the one that the model was trained with; without it, there are tokens but no text.
        threads: default `default_threads`.
        poison: fill memory with NaN before it is first written, to find what is read too early.

    Raises:
        ConfigError: `threads` is no number of threads, or more than the system has; or the environment's `TERSE_ISA` is
            no instruction set that this machine has.
    """

    def __init__(
        self, packed: Packed, tokenizer: Tokenizer | None = None, threads: int | None = None, *, poison: bool = False
    ) -> None:
        self.config, self.dtype, self.tokenizer, self._packed = packed.config, packed.dtype, tokenizer, packed
        self._pad_token_id = None if isinstance(packed.config, ModelConfig) else packed.config.pad_token_id
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads must lie in [1, {MAX_THREADS}], not {self.threads}")
        self._poison = poison
        self._model = native.Model(_options(packed), packed.arrays)
        try:
            self._engine = native.Engine(self._model, self.threads, MAX_ROWS, MAX_RUNS, poison)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from None
        self._token_bytes = token_bytes(tokenizer, packed.config.vocab_size) if tokenizer else None
        self._pieces = native.Pieces(self._token_bytes or [])
        self._stop_ids = end_of_text_ids(tokenizer) if tokenizer else []

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: Dtype = "f32", threads: int | None = None
    ) -> Engine:
        """The engine of a checkpoint's or run's folder, which is packed first if it has to be.

        Args:
            folder: a checkpoint's folder, or a run's, which stands for its newest.
            dtype: `f32`, `bf16` or `int8`, of the matrices.
            threads: default `default_threads`.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
            DataError: its tokenizer is missing or damaged.
        """
        path = find(folder)
        return cls(load_packed(pack(path, dtype)), load_tokenizer(path), threads)

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each token adds to a text, special ones none; None where they depend on the tokens around."""
        return self._token_bytes

    @property
    def stop_ids(self) -> list[int]:
        """The token that ends a text, or none."""
        return self._stop_ids

    @property
    def isa(self) -> str:
        """The instruction set that the kernels use."""
        return native.isa()

    def new_session(
        self, capacity: int | None = None, source: Sequence[int] | None = None, *, in_pieces: bool = False
    ) -> Session:
        """A session that has read nothing but, for an encoder-decoder, its source.

        Args:
            capacity: longest sequence that fits, in tokens, a source not counted; default `max_position_embeddings`.
            source: token ids that an encoder-decoder makes a text of, which begins with `pad_token_id`.
            in_pieces: leave the source to `read_source`, before which the session reads nothing else.

        Raises:
            GenerationError: the source is missing, empty, too long, or has an unknown token; or it is not for this
                model.
        """
        if source is None and self._pad_token_id is not None:
            raise GenerationError("the model makes a text of a source; give one to new_session(source=...)")
        if source is not None and self._pad_token_id is None:
            raise GenerationError("the model is a causal language model, without a source; read a prompt instead")
        limit, source = self.config.max_position_embeddings, source or ()
        if self._pad_token_id is not None:
            check_source(source, limit, self.config.vocab_size)
        state = native.Session(self._model, capacity or limit, self._poison, len(source))
        session = Session(state, source=source)
        if source:
            session._reading = self._engine.begin_source(state, _ids(source))
            if not in_pieces:
                self.read_source(session)
        return session

    def read_source(self, session: Session, seconds: float = math.inf) -> bool:
        """Goes on reading a session's source, and says whether all is read.

        Args:
            session: of `new_session(source=..., in_pieces=True)`.
            seconds: after which no step is begun; each takes some 128 tokens a layer further, or, in an
                encoder's LSH attention, the whole source.
        """
        if session._reading is not None and self._engine.read_source(session._reading, min(seconds, _FOREVER)):
            session._reading = None
        return session._reading is None

    def load_session(self, path: Path | str) -> Session:
        """A session that was saved; a source that cross-attention looks at is read once more.

        Raises:
            TensorFileError: the file is missing, damaged, no session, or of another model.
        """
        path = Path(path)
        file = tensorfile.read(path)
        try:
            if file.metadata["format"] != SESSION_FORMAT:
                raise ValueError("it has another format")
            tokens, source = ([int(token) for token in file.arrays[name]] for name in ("tokens", "source"))
            length = int(file.metadata["length"])
            if len(tokens) < length:
                raise ValueError(f"it has {len(tokens)} tokens, of which {length} were read")
            session = self.new_session(int(file.metadata["capacity"]), source or None)
            session._state.restore(file.arrays["state"], length)
        except (ValueError, KeyError, TypeError) as error:
            raise TensorFileError(f"{path} is no session of this model: {error}") from None
        session.tokens = tokens
        return session

    def restore(self, snapshot: Snapshot, capacity: int | None = None) -> Session:
        """A session that goes on from a snapshot.

        Args:
            snapshot: of a session of this model.
            capacity: longest sequence that fits, in tokens; default `max_position_embeddings`.

        Raises:
            GenerationError: it is another model's, or does not fit.
        """
        session = self.new_session(capacity)
        try:
            session._state.restore(snapshot.state, len(snapshot.tokens))
        except ValueError as error:
            raise GenerationError(str(error)) from None
        session.tokens = list(snapshot.tokens)
        return session

    def read(self, session: Session, tokens: Sequence[int]) -> None:
        """Reads tokens into a session, in blocks: its `logits` are then those of the next token.

        A token that was drawn last, and is not read yet, is read before them.

        Raises:
            GenerationError: a token is unknown, or the session is full; nothing was read.
        """
        try:
            self._engine.read(session._state, _ids([*session.unread, *tokens]))
        except ValueError as error:
            raise GenerationError(str(error)) from None
        session.tokens += tokens

    def logits(self, tokens: Sequence[int], session: Session | None = None) -> Float32[np.ndarray, "T V"]:
        """Logits of the next token at each position.

        Args:
            tokens: token ids; with a session, the continuation of its text.
            session: reads the tokens; an encoder-decoder needs one.

        Raises:
            GenerationError: a token is unknown, or there are more than fit.
        """
        session = self.new_session() if session is None else session
        all_tokens = [*session.unread, *tokens]
        out = np.empty((len(all_tokens), self.config.vocab_size), np.float32)
        try:
            self._engine.read_logits(session._state, _ids(all_tokens), out)
        except ValueError as error:
            raise GenerationError(str(error)) from None
        session.tokens += tokens
        return out[len(all_tokens) - len(tokens) :]

    def start(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        seed: int | None = None,
        *,
        trace: bool = False,
    ) -> native.Writer:
        """Reads a prompt after what the session has read; gives what `write` goes on with.

        Args:
            session: reads the prompt.
            prompt: token ids; may be none where the session has some.
            sampling: how the text is drawn, without beams. Where the tokens' bytes are not known, its stop strings are
                the caller's.
            seed: in place of `sampling.seed`.
            trace: keep for `touched` what the tokens touch.

        Raises:
            GenerationError: a token is unknown, or there is no room for another.
        """
        self._read_prompt(session, prompt)
        writer = native.Writer(
            session._state,
            self._sampling(sampling, sampling.seed if seed is None else seed),
            min(sampling.max_new_tokens, session.capacity),
            self._stop_ids,
            [stop.encode() for stop in sampling.stop] if self._token_bytes else [],
            self._pieces,
            trace,
        )
        try:
            writer.see(_ids(_text(session)))
        except ValueError as error:
            raise GenerationError(str(error)) from None
        return writer

    def search(self, session: Session, prompt: Sequence[int], sampling: SamplingConfig) -> tuple[list[int], str]:
        """Reads a prompt after what the session has read; gives the likeliest text that beams find, and why it ends.

        The beams are forks of the session, with the text of `beam.beam_search`. They are read together, those beyond
        `MAX_RUNS` in a second batch, and so on. The text becomes part of the session, to be read when that goes on.

        Args:
            session: reads the prompt.
            prompt: token ids; may be none where the session has some.
            sampling: how to search; it has no stop strings.

        Raises:
            GenerationError: a token is unknown, there is no room for another, the logits are not finite, or every token
                would repeat an n-gram.
        """
        self._read_prompt(session, prompt)
        room = session.capacity + bool(session.source) - session.length
        search = native.Search(
            num_beams=sampling.num_beams,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=min(sampling.max_new_tokens, room),
        )
        tokens, finish = self._engine.search(session._state, search, _text(session), self._stop_ids)
        finish_reason(finish, sampling)  # or an error
        session.tokens += tokens
        return tokens, finish

    def _read_prompt(self, session: Session, prompt: Sequence[int]) -> None:
        length = len(session.tokens) + len(prompt)
        if not length:
            raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
        if length >= session.capacity + bool(session.source):
            whole = session.capacity == self.config.max_position_embeddings
            context = "the model's context" if whole else "the session's context"
            raise GenerationError(
                f"the prompt has {length} tokens and leaves no room in {context} of {session.capacity} "
                f"({'max_position_embeddings' if whole else 'capacity'}); shorten it to {session.capacity - 1} or fewer"
            )
        self.read(session, prompt)

    def write(
        self, writers: Sequence[native.Writer], steps: int | None = None, seconds: float = math.inf
    ) -> list[list[int]]:
        """Writes on, a token for every unfinished writer at each step; gives the tokens that each has written.

        Args:
            writers: up to `MAX_RUNS`, each with a session of its own; `finish` says why one has finished. Of one that
                was told to `allow` some tokens, bool [V], the next one is drawn of these.
            steps: steps at most; default: until all have finished.
            seconds: a step that ends later is the last.

        Raises:
            ValueError: there are too many, two share a session, or a session is of another model.
        """
        return self._engine.write(writers, _FOREVER if steps is None else steps, min(seconds, _FOREVER))

    def touched(self, writer: native.Writer) -> Touched:
        """What the tokens that were read since the last call have touched; none, unless the writer keeps a trace.

        A token is read when the next one is written, so that the last one of a text never is. Until they are taken,
        8 bytes are kept for each block of each token.

        Raises:
            ValueError: the writer is writing, in another thread.
        """
        config = self.config
        layers = config.num_hidden_layers if isinstance(config, ModelConfig) else config.num_decoder_layers
        touched = writer.take_touched()
        tokens, choices, _ = touched.shape
        chosen, active = np.moveaxis(touched.reshape(tokens, layers, choices // layers, 2), -1, 0)
        return Touched(chosen, active)

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues each prompt as it would be alone; up to `MAX_RUNS` are written together.

        An empty prompt starts from the end-of-text token, as a document does. An encoder-decoder makes a text of each
        prompt, which is its source and must not be empty.

        Args:
            prompts: one or several.
            sampling: how the texts are drawn.
            seeds: one for each prompt in place of `sampling.seed`.

        Raises:
            GenerationError: a prompt does not fit the model, or the model's logits are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise GenerationError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
        tokenizer = self._tokenizer()
        texts = [TextWriter(tokenizer, prompt, sampling.stop, self._pad_token_id) for prompt in prompts]
        for start in range(0, len(texts), MAX_RUNS):
            together = range(start, min(start + MAX_RUNS, len(texts)))
            writers = {}
            for i in together:
                session, tokens = self._begin(texts[i].prompt, sampling)
                if sampling.num_beams > 1:
                    self._search_text(texts[i], session, tokens, sampling)
                else:
                    writers[i] = self.start(session, tokens, sampling, seeds[i])
            while active := [i for i in together if texts[i].finish_reason is None]:
                written = self.write([writers[i] for i in active], self._steps(sampling))
                for i, tokens in zip(active, written, strict=True):
                    _push(texts[i], tokens, writers[i].finish, sampling)
        return [text.result() for text in texts]

    def stream(
        self, prompt: str, sampling: SamplingConfig = DEFAULT_SAMPLING, session: Session | None = None
    ) -> Generator[str, None, Generation]:
        """Continues a prompt and yields pieces of the text as soon as they are certain; with beams, all at the end.

        Args:
            prompt: the beginning, or an encoder-decoder's source; with a session, what follows that which it has read.
            sampling: how the text is drawn.
            session: reads the prompt and the text, to go on from there; not of an encoder-decoder.

        Raises:
            GenerationError: the prompt does not fit the model (at once), or the logits are not finite.
        """
        text = TextWriter(self._tokenizer(), prompt, sampling.stop, self._pad_token_id)
        if session is None:
            session, tokens = self._begin(text.prompt, sampling)
        elif self._pad_token_id is not None:
            raise GenerationError("an encoder-decoder writes one text of a source; leave the session out")
        else:
            tokens = text.prompt if prompt or not session.tokens else []
        if sampling.num_beams > 1:
            return _whole(text, self._search_text(text, session, tokens, sampling))
        return self._pieces_of(text, self.start(session, tokens, sampling, sampling.seed), session, sampling)

    def _pieces_of(
        self, text: TextWriter, writer: native.Writer, session: Session, sampling: SamplingConfig
    ) -> Generator[str, None, Generation]:
        while text.finish_reason is None:
            (tokens,) = self.write([writer], self._steps(sampling), _STREAM_SECONDS)
            session.tokens += tokens
            if piece := _push(text, tokens, writer.finish, sampling):
                yield piece
        return text.result()

    def _search_text(self, text: TextWriter, session: Session, tokens: Sequence[int], sampling: SamplingConfig) -> str:
        """All of a text at once, by beams."""
        found, reason = self.search(session, tokens, sampling)
        return _push(text, found, reason, sampling)

    def _steps(self, sampling: SamplingConfig) -> int | None:
        """Steps to write together: where the tokens' bytes are not known, only the text shows a stop string."""
        return 1 if sampling.stop and not self._token_bytes else None

    def _begin(self, prompt: list[int], sampling: SamplingConfig) -> tuple[Session, list[int]]:
        """A session that has room for a text, and what it reads first: the prompt, unless that is its source."""
        limit = self.config.max_position_embeddings
        if self._pad_token_id is None:
            return self.new_session(min(limit, len(prompt) + sampling.max_new_tokens)), prompt
        return self.new_session(min(limit, sampling.max_new_tokens), prompt), [self._pad_token_id]

    def _sampling(self, sampling: SamplingConfig, seed: int) -> native.Sampling:
        return native.Sampling(
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, self.config.vocab_size),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            seed=seed,
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise GenerationError("the engine has no tokenizer; give it one, or work with tokens")
        return self.tokenizer


def _text(session: Session) -> list[int]:
    """A session's tokens less that which a source's text begins with."""
    return session.tokens[1:] if session.source else session.tokens


def finish_reason(finish: str, sampling: SamplingConfig) -> FinishReason | None:
    """Why a text has come to its end, if it has: what a writer's `finish` says.

    Raises:
        GenerationError: it cannot go on, because the logits are not finite or every token would repeat an n-gram.
    """
    if finish == "not_finite":
        raise GenerationError(
            "the model gives no usable logits: some are NaN or the largest is infinite; its weights are damaged or its "
            "training has diverged"
        )
    if finish == "repeats":
        raise nothing_left(sampling)
    reasons: dict[str, FinishReason] = {"eos": "eos", "length": "length", "stop": "stop"}
    return reasons.get(finish)


def _whole(text: TextWriter, piece: str) -> Generator[str, None, Generation]:
    if piece:
        yield piece
    return text.result()


def _push(text: TextWriter, tokens: Sequence[int], finish: str, sampling: SamplingConfig) -> str:
    """The text that has become certain with some tokens; `finish` is the reason if the last one is the last of all."""
    reason = finish_reason(finish, sampling)
    pieces = []
    for i, token in enumerate(tokens, 1):
        pieces.append(text.push(token, reason if i == len(tokens) else None))
        if text.finish_reason is not None:
            break
    return "".join(pieces)


def _ids(tokens: Sequence[int]) -> np.ndarray:
    try:
        return np.array(tokens, np.int32)
    except OverflowError:
        raise GenerationError("a token is not in the vocabulary: it does not fit 32 bits") from None


def _options(packed: Packed) -> dict[str, Any]:
    """What the engine knows of a model, whose encoder's positions are named even where they are the decoder's."""
    options = dict(_flat(to_dict(packed.config))) | {"dtype": packed.dtype}
    if not isinstance(packed.config, ModelConfig):
        options["encoder_position"] = packed.config.of_encoder.position
    return options


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):  # no list describes what the engine knows
            yield f"{prefix}{name}", value
