"""The fair queue: whose request runs next, and how long until then."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import FairQueue

REQUESTS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("12345")), unique=True)


def queue_of(*requests: str) -> FairQueue[str]:
    """A queue with these pushed in order: "a1" is client a's request 1."""
    queue: FairQueue[str] = FairQueue()
    for request in requests:
        queue.push(request[0], request[1:], request)
    return queue


def drain(queue: FairQueue[str]) -> list[str]:
    served = []
    while (item := queue.pop()) is not None:
        served.append(item)
    return served


def test_an_empty_queue_has_nothing_to_give() -> None:
    queue = queue_of()
    assert len(queue) == 0
    assert queue.pop() is None
    assert queue.in_order() == []


def test_one_clients_requests_keep_their_order() -> None:
    assert drain(queue_of("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_clients_take_turns_in_the_order_they_came() -> None:
    assert drain(queue_of("a1", "a2", "a3", "b1", "c1", "b2")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_hundred_requests_of_one_client_cost_another_one_turn() -> None:
    queue = queue_of(*(f"a{number}" for number in range(100)))
    assert queue.pop() == "a0"
    queue.push("b", "1", "b1")
    assert queue.in_order().index("b1") == 1


def test_a_client_that_was_just_served_waits_until_the_others_were() -> None:
    queue = queue_of("a1", "b1", "c1")
    assert queue.pop() == "a1"
    queue.push("a", "2", "a2")
    assert drain(queue) == ["b1", "c1", "a2"]


def test_the_same_request_id_of_two_clients_is_two_requests() -> None:
    queue = queue_of("a1", "b1")
    assert queue.remove("b", "1") == "b1"
    assert drain(queue) == ["a1"]


def test_a_removed_request_leaves_the_others_in_their_places() -> None:
    queue = queue_of("a1", "a2", "b1", "c1")
    assert queue.remove("a", "1") == "a1"
    assert queue.remove("b", "1") == "b1"
    assert len(queue) == 2
    assert drain(queue) == ["a2", "c1"]


@pytest.mark.parametrize(("client", "request_id"), [("a", "2"), ("b", "1"), ("", "")])
def test_what_does_not_wait_cannot_be_removed(client: str, request_id: str) -> None:
    queue = queue_of("a1")
    assert queue.remove(client, request_id) is None
    assert queue.in_order() == ["a1"]


def test_what_was_served_cannot_be_removed() -> None:
    queue = queue_of("a1", "a2")
    queue.pop()
    assert queue.remove("a", "1") is None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(REQUESTS, st.integers(0, 10), REQUESTS, REQUESTS)
def test_the_order_foretold_is_the_order_served(
    first: list[tuple[str, str]], served: int, then: list[tuple[str, str]], gone: list[tuple[str, str]]
) -> None:
    queue = queue_of(*(client + request for client, request in first))
    taken = [queue.pop() for _ in range(min(served, len(queue)))]
    new = [(client, request) for client, request in then if (client, request) not in first]
    for client, request in new:
        queue.push(client, request, client + request)
    removed = [item for client, request in gone if (item := queue.remove(client, request)) is not None]
    foretold = queue.in_order()
    assert len(queue) == len(foretold)
    assert drain(queue) == foretold
    assert len(queue) == 0
    assert sorted([*filter(None, taken), *removed, *foretold]) == sorted(c + r for c, r in [*first, *new])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(REQUESTS)
def test_nobody_is_served_twice_while_another_waits_for_the_first_time(requests: list[tuple[str, str]]) -> None:
    order = [item[0] for item in queue_of(*(client + request for client, request in requests)).in_order()]
    for at, client in enumerate(order):
        turns = order[:at].count(client)
        assert all(order[:at].count(other) >= turns for other in order[at:])


@pytest.mark.parametrize(
    ("remaining", "service", "waits"),
    [
        ([8.0], 8.0, [8.0, 16.0, 24.0]),
        ([3.0, 1.0], 10.0, [1.0, 3.0, 11.0]),
        ([0.0, 0.0, 5.0], 2.0, [0.0, 0.0, 2.0, 2.0, 4.0, 4.0, 5.0]),
    ],
)
def test_a_wait_ends_when_a_slot_is_done_with_all_that_come_before(
    remaining: list[float], service: float, waits: list[float]
) -> None:
    assert qmesh.expected_waits(remaining, service, len(waits)) == waits


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 100), st.integers(0, 20))
def test_who_is_further_back_never_waits_less(remaining: list[float], service: float, count: int) -> None:
    waits = qmesh.expected_waits(remaining, service, count)
    assert waits == sorted(waits)
    assert not waits or waits[0] == min(remaining)
