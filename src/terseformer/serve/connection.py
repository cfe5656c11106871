"""A connection: uvicorn's, with an end to waiting for a client that neither sends nor reads."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from terseformer.serve.limits import MAX_CONNECTIONS


class Connection(H11Protocol):
    """HTTP/1.1 with a client that may take `stall` seconds to send a request's header, or to read a part of an answer.

    Where all connections are taken, the one that has been without a request for the longest time makes room.
    """

    stall: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sends: asyncio.Handle | None = None
        self._reads: asyncio.Handle | None = None
        self._idle_since = self.loop.time()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Waits for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # tells at once of what is not read
        self._expect_header()
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
        super().connection_lost(exc)
        self._sends = _cancelled(self._sends)
        self._reads = _cancelled(self._reads)

    def data_received(self, data: bytes) -> None:
        """Goes on with a request, or with waiting for the rest of its header."""
        super().data_received(data)
        if self.idle:
            self._expect_header()
        else:
            self._sends = _cancelled(self._sends)

    def on_response_complete(self) -> None:
        """Notes since when there is nothing to do."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP, unless an answer has begun; the request whose body it was has come to its end."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Watches whether the client reads."""
        super().pause_writing()
        self._reads = self.loop.call_soon(self._expect_reading, math.inf)

    def resume_writing(self) -> None:
        """The client has read all that there was."""
        super().resume_writing()
        self._reads = _cancelled(self._reads)

    def _expect_header(self) -> None:
        """The header must come in time, from its first byte on; a byte now and then does not help."""
        if self._sends is None:
            self._sends = self.loop.call_later(self.stall, self.transport.abort)

    def _expect_reading(self, before: float) -> None:
        """Ends the connection where nothing has been read since there were so many bytes to read."""
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._reads = self.loop.call_later(self.stall, self._expect_reading, unread)
        else:
            self.logger.warning("a client does not read its answer, which is ended")
            self.transport.abort()

    def _make_room(self) -> None:
        if len(self.connections) <= MAX_CONNECTIONS:
            return
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        if idle := [other for other in others if other.idle]:
            longest = min(idle, key=lambda other: other._idle_since)
            self.connections.discard(longest)
            longest.transport.abort()


def connection(stall: float) -> type[Connection]:
    """The protocol for a server whose clients may take so many seconds."""
    return type("Connection", (Connection,), {"stall": stall})


def _cancelled(handle: asyncio.Handle | None) -> None:
    if handle is not None:
        handle.cancel()
