"""A decoding state in the form in which Hugging Face's `generate` hands it from call to call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from terseformer.errors import UserError
from terseformer.interop.hf.padding import Rows
from terseformer.state import DecodeState

Call = Callable[[Tensor, DecodeState, Tensor | None], Tensor]

_NUM_BOOKMARKS = 32
_CROPS_TO_LENGTH = "max_length" in inspect.signature(Cache.crop).parameters


class _Bookmark(NamedTuple):
    num_read: int
    state: DecodeState


class TerseformerCache(Cache):
    """A state, and the tokens that it has read, padding included.

    `crop`, by which assisted decoding takes back what was guessed wrong, is exact for all models. Where a state is more
    than keys and values, convolutions' frames, say, it goes back to a bookmark before the cut, of which each call
    leaves one, and the next call reads what lies between once more.

    A new one knows no state yet: the model that it is first handed to makes it.
    """

    is_compileable = False
    state: DecodeState

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.is_new = True
        self._tokens = torch.zeros(0, 0, dtype=torch.long)
        self._num_read = 0  # fewer than there are tokens after a crop
        self._bookmarks: list[_Bookmark] = []

    def begin(self, state: DecodeState) -> None:
        """Takes a state that has read nothing, or a source alone."""
        self.is_new, self.state = False, state
        self._tokens = state.lengths.new_zeros(len(state.lengths), 0)
        self._real = self._tokens.bool()

    def read(self, tokens: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], call: Call) -> Tensor:
        """What `call(tokens, state, num_real)` gives for each of the tokens, [B, T, ...].

        Args:
            tokens: the next ones.
            real: which of them are.
            call: gives something for each token that the state reads.
        """
        self._tokens, self._real = torch.cat([self._tokens, tokens], 1), torch.cat([self._real, real], 1)
        self._leave_bookmark()
        unread, rows = self._tokens[:, self._num_read :], Rows(self._real[:, self._num_read :])
        self.state.make_room(unread.shape[1])
        y = call(rows.real_first(unread), self.state, rows.num_real)
        self._num_read = self._tokens.shape[1]
        return rows.as_given(y)[:, unread.shape[1] - tokens.shape[1] :]

    def _leave_bookmark(self) -> None:
        """Before a call; of one row's, for that is what assisted decoding has, the latest are kept, else the first."""
        if self.state.is_slots_only:
            return
        if not self._bookmarks or len(self._tokens) == 1:
            self._bookmarks.append(_Bookmark(self._num_read, self.state.bookmark()))
            del self._bookmarks[1:-_NUM_BOOKMARKS]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, whose number is given as a negative one.

        In older versions of transformers, a number that is not negative is that of the tokens to keep.

        Raises:
            UserError: rows were exchanged before, and the state does not tell the tokens apart.
        """
        if self.is_new:
            return
        length, is_length = self.get_seq_length(), _CROPS_TO_LENGTH and tokens_to_remove >= 0
        end = max(0, min(length, tokens_to_remove if is_length else length + tokens_to_remove))
        if self.state.is_slots_only:
            self.state.lengths -= self._real[:, end : self._num_read].sum(-1)
            self._num_read = min(self._num_read, end)
        elif end < self._num_read:
            self._go_back(end)
        self._tokens, self._real = self._tokens[:, :end], self._real[:, :end]

    def _go_back(self, end: int) -> None:
        while self._bookmarks and self._bookmarks[-1].num_read > end:
            self._bookmarks.pop()
        if not self._bookmarks:
            raise UserError(
                "a cache whose rows were exchanged, as by beams, cannot be cropped; read the tokens anew with another"
            )
        self._num_read, state = self._bookmarks[-1]
        self.state = state.bookmark()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self._tokens.shape[1]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows."""
        return -1

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Goes on with these rows, in this order."""
        if self.is_new:
            return
        rows = beam_idx.tolist()
        self.state = self.state.select(rows)
        self._tokens, self._real = self._tokens[rows], self._real[rows]
        self._bookmarks = []

    def batch_select_indices(self, indices: Int[Tensor, " B"]) -> None:
        """The same, of fewer rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Goes on with each row so many times."""
        self.reorder_cache(torch.arange(len(self._tokens)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets all that was read."""
        self.__init__()
