"""Everything that decoding remembers: one structure, batch first.

A state is made by a model's `new_state` and handed to each call. Calls change it in place: it belongs
to inference, where no gradient is taken. Every row of a batch has a length of its own. A call may
bring fewer real tokens for one row than for another: the real ones stand first in the row, what
follows them is padding that leaves no trace in the state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Chunk:
    """Where the tokens of one call stand."""

    positions: Int[Tensor, "B T"]
    """Position of each token in its row's sequence."""
    num_real: Int[Tensor, " B"] | None = None
    """Real tokens at the head of each row; None: all."""
    end: int = 0
    """One more than the largest position of the call."""


def _last_frames(frames: Tensor, count: int, num_real: Tensor | None) -> Tensor:
    """The `count` frames of dimension 1 that end where each row's real tokens end.

    `frames` holds `count` remembered frames followed by the call's T frames.
    """
    if num_real is None:
        return frames[:, frames.shape[1] - count :].clone()
    index = num_real[:, None] + torch.arange(count, device=frames.device)  # [B, count]
    index = index.reshape(*index.shape, *([1] * (frames.dim() - 2))).expand(-1, -1, *frames.shape[2:])
    return frames.gather(1, index)


@dataclass
class KeyValueCache:
    """Keys and values of one attention layer; a token's slot is its position."""

    keys: Float[Tensor, "B H C K"]
    values: Float[Tensor, "B H C K"]

    @classmethod
    def new(cls, batch: int, heads: int, capacity: int, width: int, like: Tensor) -> KeyValueCache:
        """An empty cache of `capacity` positions, with the dtype and device of `like`."""
        return cls(like.new_zeros(batch, heads, capacity, width), like.new_zeros(batch, heads, capacity, width))

    def append(
        self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"], chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """Writes a call's keys and values and returns all up to `chunk.end`."""
        capacity = self.keys.shape[2]
        assert chunk.end <= capacity
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None].expand_as(chunk.positions)
        slots = chunk.positions.clamp(max=capacity - 1)
        rows, slots = rows.reshape(-1), slots.reshape(-1)
        new_keys, new_values = (x.detach().transpose(1, 2).flatten(0, 1) for x in (keys, values))
        if chunk.num_real is not None:
            real = (torch.arange(keys.shape[2], device=keys.device) < chunk.num_real[:, None]).reshape(-1)
            rows, slots, new_keys, new_values = (x[real] for x in (rows, slots, new_keys, new_values))
        self.keys[rows, :, slots] = new_keys
        self.values[rows, :, slots] = new_values
        return self.keys[:, :, : chunk.end], self.values[:, :, : chunk.end]

    def grow(self, capacity: int) -> None:
        """Makes room for more positions."""
        more = capacity - self.keys.shape[2]
        self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def select(self, rows: list[int]) -> KeyValueCache:
        """A cache that holds only these rows, in this order."""
        return KeyValueCache(self.keys[rows], self.values[rows])


@dataclass
class FeatureSums:
    """What linear attention remembers: for each feature of the keys, a sum over all tokens read."""

    sums: Float[Tensor, "B H M P"]

    def add(self, sums: Float[Tensor, "B H M P"]) -> None:
        """Adds those of a call's real tokens."""
        self.sums = self.sums + sums.detach()

    def select(self, rows: list[int]) -> FeatureSums:
        """Sums of only these rows, in this order."""
        return FeatureSums(self.sums[rows])


@dataclass
class FrameMemory:
    """The last frames that a causal convolution saw, zeros before the sequence's start."""

    frames: Float[Tensor, "B P ..."]

    def extend(self, x: Float[Tensor, "B T ..."], chunk: Chunk) -> Tensor:
        """The remembered frames followed by the call's; remembers the last ones."""
        frames = torch.cat([self.frames, x], dim=1)
        self.frames = _last_frames(frames.detach(), self.frames.shape[1], chunk.num_real)
        return frames


@dataclass
class RecurrentCarry:
    """The inner state of a recurrent layer."""

    carry: Float[Tensor, "B U"]

    def advance(self, states: Float[Tensor, "B T U"], chunk: Chunk) -> None:
        """Remembers, of the call's inner states, each row's last real one."""
        self.carry = _last_frames(torch.cat([self.carry[:, None], states.detach()], dim=1), 1, chunk.num_real)[:, 0]


@dataclass
class Source:
    """What a cross-attention sees of an encoded source."""

    keys: Float[Tensor, "B H N K"]
    values: Float[Tensor, "B H N K"]
    num_real: Int[Tensor, " B"]
    """Real tokens at the head of each row."""


@dataclass
class LayerState:
    """What one block remembers."""

    cache: KeyValueCache | FeatureSums | None = None
    """What its self-attention remembers of earlier tokens."""
    memories: dict[str, FrameMemory] = field(default_factory=dict)
    """Memory of each of the attention projection's convolutions, by name."""
    carries: list[RecurrentCarry] = field(default_factory=list)
    """Carry of each layer of the recurrent branch."""
    source: Source | None = None
    """What its cross-attention sees."""

    def select(self, rows: list[int]) -> LayerState:
        """A state that holds only these rows, in this order."""
        cache, source = self.cache, self.source
        return LayerState(
            cache.select(rows) if cache is not None else None,
            {name: FrameMemory(memory.frames[rows]) for name, memory in self.memories.items()},
            [RecurrentCarry(carry.carry[rows]) for carry in self.carries],
            Source(source.keys[rows], source.values[rows], source.num_real[rows]) if source is not None else None,
        )

    def bookmark(self) -> LayerState:
        """As `DecodeState.bookmark`."""
        memories = {name: copy.copy(memory) for name, memory in self.memories.items()}
        return LayerState(copy.copy(self.cache), memories, [copy.copy(carry) for carry in self.carries], self.source)


@dataclass
class DecodeState:
    """What a model remembers of the sequences that it has read."""

    lengths: Int[Tensor, " B"]
    """Tokens read so far, for each row."""
    layers: list[LayerState]
    capacity: int
    """Longest sequence that fits, in tokens."""
    num_source: Int[Tensor, " B"] | None = None
    """How many of the tokens read were a source that the decoder goes on from."""

    def clone(self) -> DecodeState:
        """A copy that goes its own way."""
        return copy.deepcopy(self)

    def bookmark(self) -> DecodeState:
        """A copy to go back to when later calls shall not have been.

        It shares the slots of keys and values, which are written anew; one of the two goes on, not both.
        """
        return replace(self, lengths=self.lengths.clone(), layers=[layer.bookmark() for layer in self.layers])

    @property
    def is_slots_only(self) -> bool:
        """Whether all that is remembered of a token lies in slots of its own, so that to forget it is to count less."""
        return not any(x.memories or x.carries or isinstance(x.cache, FeatureSums) for x in self.layers)

    def make_room(self, count: int) -> None:
        """Makes the capacity large enough for `count` more tokens in each row."""
        needed = int(self.lengths.max()) + count
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)  # so that a text that grows token by token is seldom copied
        for layer in self.layers:
            if isinstance(layer.cache, KeyValueCache):
                layer.cache.grow(self.capacity)

    def select(self, rows: list[int]) -> DecodeState:
        """A state that holds only these rows, in this order."""
        num_source = self.num_source[rows] if self.num_source is not None else None
        return DecodeState(self.lengths[rows], [layer.select(rows) for layer in self.layers], self.capacity, num_source)

    def chunk(self, tokens: Int[Tensor, "B T"], num_real: Int[Tensor, " B"] | None = None) -> Chunk:
        """Where the next tokens stand.

        Raises:
            ValueError: there is another number of rows.
        """
        check_rows(tokens, state=self.lengths, num_real=num_real)
        positions = torch.arange(tokens.shape[1], device=tokens.device) + self.lengths[:, None]
        end = int((self.lengths + (tokens.shape[1] if num_real is None else num_real)).max())
        return Chunk(positions, num_real, end)

    def check_room(self, chunk: Chunk) -> None:
        """Raises ValueError where a call's tokens do not fit."""
        if chunk.end > self.capacity:
            raise ValueError(
                f"position {chunk.end - 1} does not fit a state of capacity {self.capacity}; make a larger one"
            )

    def advance(self, chunk: Chunk) -> None:
        """Counts what a call has read."""
        self.lengths += chunk.positions.shape[1] if chunk.num_real is None else chunk.num_real


def check_rows(tokens: Shaped[Tensor, "B T *D"], **sizes: Tensor | None) -> None:
    """Raises ValueError where something has not as many rows as the tokens."""
    for name, of_rows in sizes.items():
        if of_rows is not None and len(of_rows) != len(tokens):
            raise ValueError(f"there are {len(tokens)} rows of tokens, but {name} has {len(of_rows)}")


def check_length(length: int, limit: int, name: str = "the sequence") -> None:
    """Raises ValueError where a sequence is longer than the model's positions."""
    if length > limit:
        raise ValueError(f"{name} reaches {length} tokens, but max_position_embeddings is {limit}; shorten the input")


def first_chunk(tokens: Shaped[Tensor, "B T *D"], num_real: Int[Tensor, " B"] | None = None) -> Chunk:
    """Where the tokens of whole sequences, ids or vectors, stand.

    Raises:
        ValueError: `num_real` has another number of rows.
    """
    check_rows(tokens, num_real=num_real)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    return Chunk(positions, num_real, tokens.shape[1])
