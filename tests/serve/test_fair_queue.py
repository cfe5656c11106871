"""Clients take turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terseformer.serve.queue import FairQueue


def drain(queue: FairQueue[tuple[str, int]]) -> list[tuple[str, int]]:
    return [queue.pop() for _ in range(len(queue))]


def test_a_client_with_much_delays_others_by_a_turn() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for i in range(5):
        queue.push("many", ("many", i))
    assert queue.pop() == ("many", 0)
    queue.push("one", ("one", 0))
    assert drain(queue)[:2] == [("many", 1), ("one", 0)]
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.sets(st.sampled_from("abc")))
def test_each_in_its_own_order_and_no_two_turns_while_another_waits(clients: list[str], gone: set[str]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for i, client in enumerate(clients):
        queue.push(client, (client, i))
    removed = queue.remove(lambda item: item[0] in gone)
    assert sorted(removed) == sorted((c, i) for i, c in enumerate(clients) if c in gone)
    taken = drain(queue)
    for client in "abc":
        own = [i for c, i in taken if c == client]
        assert own == [i for i, c in enumerate(clients) if c == client and c not in gone]
    for turn, (client, _) in enumerate(taken[1:], 1):
        if client == taken[turn - 1][0]:
            assert {c for c, _ in taken[turn:]} == {client}
