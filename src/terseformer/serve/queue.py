"""A queue that is fair to all clients: each takes its turn, whatever number of things it has brought."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Clients take turns; what one client has put in comes out in its order."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def push(self, client: str, item: T) -> None:
        """Puts something behind whatever else its client has in the queue."""
        self._clients.setdefault(client, deque()).append(item)

    def pop(self) -> T:
        """Takes the first thing of the client whose turn it is.

        Raises:
            IndexError: there is nothing.
        """
        if not self._clients:
            raise IndexError("the queue is empty")
        client, items = next(iter(self._clients.items()))
        item = items.popleft()
        if items:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return item

    def remove(self, gone: Callable[[T], bool]) -> list[T]:
        """Takes out all that `gone` holds for, and gives it."""
        removed = []
        for client, items in list(self._clients.items()):
            removed += [item for item in items if gone(item)]
            kept = deque(item for item in items if not gone(item))
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        return removed
