"""Lookup: finding the nodes closest to an id."""

import random
from collections.abc import Iterable

import pytest

from qmesh import Contact, Lookup, NodeId

ZERO = NodeId(0)  # as a target it makes a node's number its distance


def contact(number: int) -> Contact:
    return Contact(NodeId(number), ("10.0.0.1", 1 + number % 65535))


def contacts(*numbers: int) -> list[Contact]:
    return [contact(number) for number in numbers]


def numbers(found: Iterable[Contact]) -> list[int]:
    return [entry.node_id for entry in found]


def lookup_of(*known: int, k: int = 3, concurrency: int = 10) -> Lookup:
    lookup = Lookup(ZERO, deadline=3.0, k=k, concurrency=concurrency)
    lookup.heard_of(contacts(*known))
    return lookup


def ask(lookup: Lookup) -> list[int]:
    return numbers(lookup.next_to_ask())


def answer(lookup: Lookup, number: int, *named: int) -> None:
    lookup.answered(NodeId(number), contacts(*named))


# --- Whom it asks ---


def test_the_closest_are_asked_closest_first() -> None:
    assert ask(lookup_of(5, 1, 9, 3)) == [1, 3, 5]


def test_distance_is_xor() -> None:
    lookup = Lookup(NodeId(6), deadline=3.0, k=2)
    lookup.heard_of(contacts(9, 1, 5, 7))
    assert ask(lookup) == [7, 5]


def test_no_more_than_the_k_closest_are_asked() -> None:
    lookup = lookup_of(1, 2, 3, 4, 5)
    assert ask(lookup) == [1, 2, 3]
    for number in (1, 2, 3):
        answer(lookup, number, 4, 5, 6)
    assert ask(lookup) == []
    assert lookup.ended(0.0)


def test_nobody_is_asked_twice() -> None:
    lookup = lookup_of(1, 2)
    assert ask(lookup) == [1, 2]
    lookup.heard_of(contacts(1, 2))
    answer(lookup, 1, 1, 2)
    lookup.slow(NodeId(2))
    assert ask(lookup) == []


def test_no_more_than_the_concurrency_are_in_flight() -> None:
    lookup = lookup_of(1, 2, 3, concurrency=2)
    assert ask(lookup) == [1, 2]
    assert ask(lookup) == []
    answer(lookup, 2)
    assert ask(lookup) == [3]


def test_one_in_flight_that_is_no_longer_among_the_closest_still_takes_a_place() -> None:
    lookup = lookup_of(8, 9, k=2, concurrency=2)
    assert ask(lookup) == [8, 9]
    answer(lookup, 8, 1, 2, 3)
    assert ask(lookup) == [1]
    answer(lookup, 9)
    assert ask(lookup) == [2]


def test_a_slow_node_frees_its_place() -> None:
    lookup = lookup_of(1, 2, concurrency=1)
    assert ask(lookup) == [1]
    lookup.slow(NodeId(1))
    assert ask(lookup) == [2]


def test_an_answer_releases_the_next_question_without_waiting_for_a_round() -> None:
    lookup = lookup_of(8, 9)
    assert ask(lookup) == [8, 9]
    answer(lookup, 9, 4)
    assert ask(lookup) == [4]


def test_a_failed_node_is_replaced_by_the_next_closest() -> None:
    lookup = lookup_of(1, 2, 3, 4)
    assert ask(lookup) == [1, 2, 3]
    answer(lookup, 1)
    answer(lookup, 3)
    lookup.failed(NodeId(2))
    assert not lookup.ended(0.0)
    assert ask(lookup) == [4]
    answer(lookup, 4)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [1, 3, 4]


def test_a_failed_node_that_is_named_again_stays_failed() -> None:
    lookup = lookup_of(1, 2)
    ask(lookup)
    lookup.failed(NodeId(1))
    answer(lookup, 2, 1)
    assert ask(lookup) == []
    assert numbers(lookup.closest()) == [2]


# --- What it believes ---


def test_an_answer_from_a_slow_node_counts_and_its_nodes_are_asked() -> None:
    lookup = lookup_of(5, 6)
    ask(lookup)
    lookup.slow(NodeId(5))
    answer(lookup, 5, 1)
    assert ask(lookup) == [1]
    assert numbers(lookup.closest()) == [5]


def test_an_answer_after_failure_is_too_late() -> None:
    lookup = lookup_of(5, 6)
    ask(lookup)
    lookup.slow(NodeId(5))
    lookup.failed(NodeId(5))
    answer(lookup, 5, 1)
    assert ask(lookup) == []
    assert lookup.closest() == []


def test_who_was_not_asked_is_not_believed() -> None:
    lookup = lookup_of(5)
    answer(lookup, 5, 1)  # not asked yet
    answer(lookup, 7, 2)  # not even heard of
    assert lookup.closest() == []
    assert ask(lookup) == [5]


def test_a_second_answer_is_not_believed() -> None:
    lookup = lookup_of(5)
    ask(lookup)
    answer(lookup, 5, 6)
    answer(lookup, 5, 1)
    assert ask(lookup) == [6]


def test_who_has_answered_can_neither_be_slow_nor_fail_afterwards() -> None:
    lookup = lookup_of(5)
    ask(lookup)
    answer(lookup, 5)
    lookup.slow(NodeId(5))
    lookup.failed(NodeId(5))
    assert numbers(lookup.closest()) == [5]


def test_who_was_not_asked_can_neither_be_slow_nor_fail() -> None:
    lookup = lookup_of(5)
    for number in (5, 7):
        lookup.slow(NodeId(number))
        lookup.failed(NodeId(number))
    assert not lookup.ended(0.0)
    assert ask(lookup) == [5]


# --- When it has ended, and with what ---


def test_it_ends_when_the_closest_have_answered() -> None:
    lookup = lookup_of(1, 2, k=2)
    assert not lookup.ended(0.0)
    ask(lookup)
    answer(lookup, 1)
    assert not lookup.ended(0.0)
    answer(lookup, 2, 3, 4)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [1, 2]


def test_it_does_not_wait_for_those_that_closer_ones_have_pushed_out() -> None:
    lookup = lookup_of(8, 9, k=2)
    ask(lookup)
    answer(lookup, 9, 1, 2)
    assert ask(lookup) == [1, 2]
    answer(lookup, 1)
    answer(lookup, 2)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [1, 2]


def test_it_may_end_with_only_slow_nodes_outstanding() -> None:
    lookup = lookup_of(1, 2, 3, 4)
    ask(lookup)
    answer(lookup, 1)
    answer(lookup, 3)
    assert not lookup.ended(0.0)
    lookup.slow(NodeId(2))
    assert ask(lookup) == [4]  # the third of those that may be counted on
    answer(lookup, 4)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [1, 3, 4]


def test_a_patient_one_waits_for_the_slow_too() -> None:
    lookup = Lookup(ZERO, deadline=3.0, k=3, patient=True)
    lookup.heard_of(contacts(1, 2))
    ask(lookup)
    answer(lookup, 1)
    lookup.slow(NodeId(2))
    assert not lookup.ended(0.0)
    answer(lookup, 2)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [1, 2]


def test_nodes_that_were_made_up_hold_up_nobody() -> None:
    """A liar may name k nodes that do not exist, all nearer than those that do."""
    lookup = lookup_of(100, k=3)
    ask(lookup)
    answer(lookup, 100, 1, 2, 3, 90)
    assert ask(lookup) == [1, 2, 3]
    for invented in (1, 2, 3):
        lookup.slow(NodeId(invented))
    assert ask(lookup) == [90]
    answer(lookup, 90)
    assert lookup.ended(0.0)
    assert numbers(lookup.closest()) == [90, 100]


def test_it_goes_on_while_nobody_has_answered_and_slow_nodes_still_may() -> None:
    """In a mesh of two, one lost datagram must not end the search with nothing found."""
    lookup = lookup_of(5)
    ask(lookup)
    lookup.slow(NodeId(5))
    assert not lookup.ended(0.4)
    answer(lookup, 5, 1)
    assert ask(lookup) == [1]


def test_it_ends_when_everybody_has_failed() -> None:
    lookup = lookup_of(5, 6)
    ask(lookup)
    lookup.slow(NodeId(5))
    lookup.failed(NodeId(5))
    lookup.failed(NodeId(6))
    assert lookup.ended(0.0)
    assert lookup.closest() == []


def test_it_ends_at_once_when_nobody_is_known() -> None:
    lookup = lookup_of()
    assert ask(lookup) == []
    assert lookup.ended(0.0)
    assert lookup.closest() == []


def test_it_ends_at_its_deadline_with_what_it_has() -> None:
    lookup = lookup_of(1, 2)
    ask(lookup)
    answer(lookup, 2)
    assert not lookup.ended(2.999)
    assert lookup.ended(3.0)
    assert numbers(lookup.closest()) == [2]


# --- How deep it went ---


def test_hops_are_the_depth_of_the_deepest_answer() -> None:
    lookup = lookup_of(8, 9)
    ask(lookup)
    assert lookup.hops == 0
    answer(lookup, 8, 4)
    assert lookup.hops == 1
    ask(lookup)
    answer(lookup, 4, 2)
    assert lookup.hops == 2
    answer(lookup, 9, 1)
    assert lookup.hops == 2


def test_a_node_named_by_two_is_as_deep_as_who_named_it_first() -> None:
    lookup = lookup_of(8, 9, k=4)
    ask(lookup)
    answer(lookup, 8, 4)
    ask(lookup)
    answer(lookup, 4, 2)
    answer(lookup, 9, 2)
    ask(lookup)
    answer(lookup, 2)
    assert lookup.hops == 3


# --- Against a whole network ---


class Network:
    """Nodes that each know up to k others at every magnitude of distance, as Kademlia's tables do."""

    def __init__(self, rng: random.Random, size: int, k: int) -> None:
        self.k = k
        self.nodes = [Contact(NodeId.random(rng), ("10.0.0.1", 1 + n)) for n in range(size)]
        self.known = {node.node_id: self._table(rng, node.node_id) for node in self.nodes}

    def _table(self, rng: random.Random, own: NodeId) -> list[Contact]:
        buckets: dict[int, list[Contact]] = {}
        for other in rng.sample(self.nodes, len(self.nodes)):
            bucket = buckets.setdefault(own.distance(other.node_id).bit_length(), [])
            if other.node_id != own and len(bucket) < self.k:
                bucket.append(other)
        return [other for bucket in buckets.values() for other in bucket]

    def answer(self, asked: NodeId, target: NodeId) -> list[Contact]:
        return nearest(self.known[asked], target, self.k)


def nearest(found: Iterable[Contact], target: NodeId, count: int) -> list[Contact]:
    return sorted(found, key=lambda entry: entry.node_id ^ target)[:count]


class Run:
    """One lookup, driven to its end in random order, with everything it asks held against what it may ask."""

    def __init__(
        self, network: Network, rng: random.Random, *, dead: Iterable[Contact], slow: float, concurrency: int
    ) -> None:
        self.network, self.rng, self.concurrency = network, rng, concurrency
        self.dead, self.slow_share = set(dead), slow
        self.target = NodeId.random(rng)
        self.lookup = Lookup(self.target, deadline=3.0, k=network.k, concurrency=concurrency)
        self.heard = set(rng.sample([node for node in network.nodes if node not in self.dead], 3))
        self.asked: list[Contact] = []
        self.in_flight: list[Contact] = []
        self.slow: list[Contact] = []
        self.failed: set[Contact] = set()
        self.lookup.heard_of(self.heard)

    def to_the_end(self) -> list[Contact]:
        self._ask()
        while not self.lookup.ended(0.0):
            self._happen(self.rng.choice(self.in_flight + self.slow))
            self._ask()
        assert len(set(self.asked)) == len(self.asked)
        return self.lookup.closest()

    def _ask(self) -> None:
        head = nearest(self.heard - self.failed - set(self.slow), self.target, self.network.k)
        for node in self.lookup.next_to_ask():
            assert node in head
            self.in_flight.append(node)
            self.asked.append(node)
        assert len(self.in_flight) <= self.concurrency

    def _happen(self, node: Contact) -> None:
        """Let one that was asked be slow, once; then it fails if it is dead, and answers if it is not."""
        if node in self.in_flight and self.rng.random() < self.slow_share:
            self.in_flight.remove(node)
            self.slow.append(node)
            self.lookup.slow(node.node_id)
            return
        (self.slow if node in self.slow else self.in_flight).remove(node)
        if node in self.dead:
            self.failed.add(node)
            self.lookup.failed(node.node_id)
        else:
            named = self.network.answer(node.node_id, self.target)
            self.heard |= set(named)
            self.lookup.answered(node.node_id, named)


@pytest.mark.parametrize("concurrency", [1, 3, 10])
def test_in_a_whole_network_it_finds_the_k_closest(concurrency: int) -> None:
    rng = random.Random(concurrency)
    network = Network(rng, size=100, k=8)
    for _ in range(20):
        run = Run(network, rng, dead=(), slow=0, concurrency=concurrency)
        assert run.to_the_end() == nearest(network.nodes, run.target, network.k)
        assert len(run.asked) < len(network.nodes) / 2


@pytest.mark.parametrize("concurrency", [1, 3, 10])
def test_with_a_third_of_the_network_dead_it_finds_most_of_the_closest_that_live(concurrency: int) -> None:
    rng = random.Random(concurrency)
    network = Network(rng, size=100, k=8)
    right = 0
    for _ in range(20):
        run = Run(network, rng, dead=rng.sample(network.nodes, 33), slow=0, concurrency=concurrency)
        found = run.to_the_end()
        assert found == nearest(run.heard - run.failed, run.target, network.k)
        right += len(set(found) & set(nearest(set(network.nodes) - run.dead, run.target, network.k)))
    assert right >= 0.85 * 20 * network.k  # not all: a third of what the nodes know is stale


@pytest.mark.parametrize("concurrency", [1, 3, 10])
def test_where_many_are_slow_it_finds_the_closest_but_for_slow_ones(concurrency: int) -> None:
    rng = random.Random(concurrency)
    network = Network(rng, size=100, k=8)
    outstanding = 0
    for _ in range(20):
        run = Run(network, rng, dead=rng.sample(network.nodes, 10), slow=0.3, concurrency=concurrency)
        found = run.to_the_end()
        assert found == nearest(run.heard - run.failed - set(run.slow), run.target, network.k)
        outstanding += len(set(run.slow) & set(nearest(run.heard, run.target, network.k)))
    assert outstanding  # else it waited for every slow one
