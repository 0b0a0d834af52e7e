"""Routing table: which nodes are known, in k-buckets."""

import itertools
import random

import pytest

from qmesh import (
    ANNOUNCE_PERIOD_S,
    ID_BITS,
    MAX_FAILURES,
    Address,
    Bucket,
    Contact,
    KnownNode,
    NodeId,
    RoutingTable,
)

OWN = NodeId(0)
TOP = 1 << (ID_BITS - 1)  # the lowest id of the half that does not hold OWN


def contact(number: int, port: int = 1) -> Contact:
    return Contact(NodeId(number), ("10.0.0.1", port))


def table_of(*numbers: int, k: int = 2, capacity: int = 100) -> RoutingTable:
    """A table of OWN's to which these have answered, at the times 0, 1, 2, ..."""
    table = RoutingTable(OWN, k=k, capacity=capacity)
    for now, number in enumerate(numbers):
        table.answered(contact(number), float(now))
    return table


def known(table: RoutingTable) -> set[int]:
    return {entry.node_id for entry in table}


def drop(table: RoutingTable, number: int) -> None:
    dropped = [table.failed(NodeId(number)) for _ in range(MAX_FAILURES)]
    assert dropped == [False] * (MAX_FAILURES - 1) + [True]


def check_invariants(table: RoutingTable, own: NodeId, k: int, capacity: int) -> None:
    buckets = table.buckets
    assert buckets[0].low == 0
    assert buckets[-1].high == 1 << ID_BITS
    for left, right in itertools.pairwise(buckets):
        assert left.high == right.low
    listed: list[NodeId] = []
    for bucket in buckets:
        width = bucket.high - bucket.low
        parent = bucket.low - bucket.low % (2 * width)
        if len(buckets) > 1:  # it came of a split, and only a bucket with our own id is split
            assert parent <= own < parent + 2 * width
        assert len(bucket.nodes) <= k
        assert len(bucket.waiting) <= k
        assert not set(bucket.nodes) & set(bucket.waiting)
        assert all(bucket.covers(node_id) for node_id in (*bucket.nodes, *bucket.waiting))
        assert all(node_id == node.contact.node_id for node_id, node in bucket.nodes.items())
        listed += bucket.nodes
    assert len(listed) == len(table) <= capacity
    assert set(listed) == {entry.node_id for entry in table}
    assert own not in table


# --- Whatever happens ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "capacity"), [(1, 1000), (2, 12), (20, 1000)])
def test_the_table_keeps_its_rules_whatever_happens(k: int, capacity: int, seed: int) -> None:
    rng = random.Random(seed)
    own = NodeId.random(rng)
    table = RoutingTable(own, k=k, capacity=capacity)
    # Distances of all magnitudes, so that buckets split far down.
    pool = [NodeId(own ^ rng.getrandbits(rng.randrange(1, ID_BITS + 1))) for _ in range(60)]
    for step in range(301):
        node_id = rng.choice(pool)
        before = {entry.node_id for entry in table}
        wanted = table.wants(node_id)
        if rng.random() < 0.6:
            entered = table.answered(Contact(node_id, ("10.0.0.1", step + 1)), float(step))
            assert {entry.node_id for entry in table} == before | ({node_id} if entered else set())
            assert entered == (node_id not in before and node_id in table)
            assert wanted or not entered
        else:
            dropped = table.failed(node_id)
            assert dropped == (node_id in before and node_id not in table)
            assert before - {entry.node_id for entry in table} == ({node_id} if dropped else set())
        if step % 6 == 0:
            check_invariants(table, own, k, capacity)
    assert len(table) > k


@pytest.mark.parametrize("seed", range(3))
def test_closest_is_what_sorting_everything_gives(seed: int) -> None:
    rng = random.Random(seed)
    own = NodeId.random(rng)
    table = RoutingTable(own, k=4)
    for _ in range(200):
        table.answered(Contact(NodeId.random(rng), ("10.0.0.1", 1)), 0.0)
    for target in [own, *(NodeId.random(rng) for _ in range(20))]:
        everyone = sorted(table, key=lambda entry: entry.node_id ^ target)
        for count in (0, 1, 7, len(table), len(table) + 5):
            assert table.closest(target, count) == everyone[:count]


# --- Who is known ---


def test_a_node_that_answered_is_known() -> None:
    table = RoutingTable(OWN)
    assert table.answered(contact(5), 3.0)
    assert NodeId(5) in table
    assert len(table) == 1
    assert list(table) == [contact(5)]
    assert table.get(NodeId(5)) == KnownNode(contact(5), answered=3.0)


def test_a_node_that_would_find_its_half_full_is_not_wanted_even_before_the_split() -> None:
    table = table_of(TOP, TOP + 1)
    assert table.wants(NodeId(1))
    assert not table.wants(NodeId(TOP + 2))
    assert not table.answered(contact(TOP + 2), 9.0)


def test_a_node_that_we_only_heard_from_is_not_known() -> None:
    table = RoutingTable(OWN)
    assert table.wants(NodeId(5))
    assert not table.failed(NodeId(5))
    assert NodeId(5) not in table
    assert table.get(NodeId(5)) is None
    assert table.closest(NodeId(5), 1) == []


def test_our_own_id_is_neither_wanted_nor_entered() -> None:
    table = RoutingTable(OWN)
    assert not table.wants(OWN)
    assert not table.answered(contact(OWN), 0.0)
    assert not table.failed(OWN)
    assert len(table) == 0


def test_a_known_node_is_not_wanted_again_and_not_new_again() -> None:
    table = table_of(5)
    assert not table.wants(NodeId(5))
    assert not table.answered(contact(5), 1.0)
    assert len(table) == 1


def test_a_node_is_known_at_the_address_it_last_answered_from() -> None:
    table = table_of(5)
    table.answered(contact(5, port=2), 1.0)
    assert list(table) == [contact(5, port=2)]
    assert table.closest(OWN, 1) == [contact(5, port=2)]


WAYS = {"loopback": ("127.0.0.1", 1), "link": ("fe80::5%eth0", 1), "beyond": ("10.0.0.5", 1)}
NEARER_THEN_WIDER = list(itertools.combinations(WAYS.values(), 2))


@pytest.mark.parametrize(("nearer", "wider"), NEARER_THEN_WIDER)
def test_of_two_ways_to_a_node_the_wider_one_counts_as_more_others_can_use_it(nearer: Address, wider: Address) -> None:
    for order in ((nearer, wider), (wider, nearer)):
        table = RoutingTable(OWN)
        for now, address in enumerate(order):
            table.answered(Contact(NodeId(5), address), float(now))
        assert list(table) == [Contact(NodeId(5), wider)]


@pytest.mark.parametrize(("nearer", "wider"), NEARER_THEN_WIDER)
def test_a_nearer_way_counts_where_the_wider_one_failed(nearer: Address, wider: Address) -> None:
    table = RoutingTable(OWN)
    table.answered(Contact(NodeId(5), wider), 0.0)
    table.failed(NodeId(5))
    table.answered(Contact(NodeId(5), nearer), 1.0)
    assert list(table) == [Contact(NodeId(5), nearer)]


def test_what_is_found_at_an_address_is_not_laid_to_a_node_that_is_known_elsewhere() -> None:
    table = table_of(5)
    assert table.is_at(NodeId(5), contact(5).address)
    assert not table.is_at(NodeId(5), contact(5, port=2).address)
    assert table.is_at(NodeId(6), contact(5).address)


def test_a_stranger_is_worth_asking_while_there_is_room_for_it() -> None:
    table = table_of(5, capacity=2)
    assert table.worth_asking(contact(6), 0.0)
    table.answered(contact(6), 0.0)
    assert not table.worth_asking(contact(7), 0.0)


def test_a_known_node_is_worth_asking_when_it_failed_or_is_met_on_a_wider_way() -> None:
    table = RoutingTable(OWN)
    table.answered(Contact(NodeId(5), WAYS["link"]), 0.0)
    assert not table.worth_asking(Contact(NodeId(5), WAYS["link"]), 0.0)
    assert not table.worth_asking(Contact(NodeId(5), WAYS["loopback"]), 0.0)
    assert table.worth_asking(Contact(NodeId(5), WAYS["beyond"]), 0.0)
    table.failed(NodeId(5))
    assert table.worth_asking(Contact(NodeId(5), WAYS["link"]), 0.0)


def test_a_known_node_at_another_address_is_worth_asking_once_it_was_silent_at_the_first() -> None:
    table = table_of(5)
    moved = contact(5, port=2)
    assert not table.worth_asking(moved, ANNOUNCE_PERIOD_S)
    assert table.worth_asking(moved, ANNOUNCE_PERIOD_S + 0.1)
    assert not table.worth_asking(contact(5), ANNOUNCE_PERIOD_S + 0.1)


def test_silent_nodes_are_those_that_have_not_answered_since() -> None:
    table = table_of(5, 6, 7, k=20)  # at 0, 1 and 2
    table.answered(contact(5), 3.0)
    assert [entry.node_id for entry in table.silent_since(2.0)] == [6]
    assert {entry.node_id for entry in table.silent_since(2.5)} == {6, 7}


# --- Buckets ---


def test_a_bucket_covers_its_lowest_id_and_not_its_highest() -> None:
    bucket = Bucket(4, 8)
    assert [n for n in range(12) if bucket.covers(NodeId(n))] == [4, 5, 6, 7]


def test_a_split_bucket_hands_each_half_its_nodes_and_those_waiting() -> None:
    entries = {NodeId(n): KnownNode(contact(n), 0.0) for n in range(4, 8)}
    bucket = Bucket(4, 8)
    bucket.nodes.update({node_id: entries[node_id] for node_id in (NodeId(5), NodeId(6))})
    bucket.waiting.update({node_id: entries[node_id] for node_id in (NodeId(7), NodeId(4))})
    lower, upper = bucket.split()
    assert (lower.low, lower.high, upper.low, upper.high) == (4, 6, 6, 8)
    assert [list(half) for half in (lower.nodes, lower.waiting)] == [[NodeId(5)], [NodeId(4)]]
    assert [list(half) for half in (upper.nodes, upper.waiting)] == [[NodeId(6)], [NodeId(7)]]


def test_nothing_splits_until_a_bucket_is_full() -> None:
    table = table_of(TOP, TOP + 1)
    assert len(table.buckets) == 1
    table.answered(contact(1), 2.0)
    assert len(table.buckets) == 2


def test_only_the_bucket_with_our_own_id_splits() -> None:
    table = table_of(TOP, TOP + 1, TOP + 2, TOP + 3)
    assert known(table) == {TOP, TOP + 1}
    assert [bucket.low for bucket in table.buckets] == [0, TOP]


def test_the_closest_ids_split_down_to_a_bucket_of_two() -> None:
    table = table_of(4, 3, 2, 1, k=1)
    assert known(table) == {4, 3, 1}  # 2 and 3 share a bucket that is not ours
    assert table.buckets[0].high == 2


def test_a_bucket_lists_its_nodes_least_recently_answered_first() -> None:
    table = table_of(5, 6, 7, k=3)
    table.answered(contact(5), 9.0)
    assert list(table.buckets[0].nodes) == [NodeId(6), NodeId(7), NodeId(5)]


# --- Full buckets and those waiting ---


def test_a_full_bucket_keeps_the_nodes_it_has() -> None:
    table = table_of(1, TOP, TOP + 1)
    assert not table.wants(NodeId(TOP + 2))
    assert not table.answered(contact(TOP + 2), 9.0)
    assert known(table) == {1, TOP, TOP + 1}


def test_a_dropped_node_is_replaced_by_the_one_heard_of_last() -> None:
    table = table_of(1, TOP, TOP + 1, TOP + 2, TOP + 3)
    drop(table, TOP)
    assert known(table) == {1, TOP + 1, TOP + 3}
    drop(table, TOP + 1)
    assert known(table) == {1, TOP + 3, TOP + 2}


def test_a_waiting_node_that_answers_again_is_the_last_heard_of_and_keeps_its_new_address() -> None:
    table = table_of(1, TOP, TOP + 1, TOP + 2, TOP + 3)
    assert not table.answered(contact(TOP + 2, port=7), 9.0)
    drop(table, TOP)
    assert table.closest(NodeId(TOP + 2), 1) == [contact(TOP + 2, port=7)]


def test_of_those_waiting_the_oldest_are_forgotten() -> None:
    table = table_of(1, TOP, TOP + 1, TOP + 2, TOP + 3, TOP + 4)  # k is 2: TOP + 2 no longer waits
    for number in (TOP, TOP + 1, TOP + 4, TOP + 3):
        drop(table, number)
    assert known(table) == {1}


def test_a_waiting_node_that_leaves_a_request_unanswered_waits_no_longer() -> None:
    table = table_of(1, TOP, TOP + 1, TOP + 2)
    assert not table.failed(NodeId(TOP + 2))
    drop(table, TOP)
    assert known(table) == {1, TOP + 1}


def test_a_dropped_node_without_a_successor_leaves_a_place() -> None:
    table = table_of(1, TOP, TOP + 1)
    drop(table, TOP)
    assert table.wants(NodeId(TOP + 2))
    assert table.answered(contact(TOP + 2), 9.0)


def test_a_node_that_is_gone_waits_for_no_place_either() -> None:
    table = table_of(TOP + 1, TOP + 2, 1, 2, TOP + 3)
    table.remove(NodeId(TOP + 3))  # it was only waiting
    drop(table, TOP + 1)
    assert known(table) == {TOP + 2, 1, 2}


def test_an_answer_between_two_failures_forgives_the_first() -> None:
    table = table_of(5)
    for now in range(3):
        for _ in range(MAX_FAILURES - 1):
            assert not table.failed(NodeId(5))
        table.answered(contact(5), float(now))
    drop(table, 5)
    assert NodeId(5) not in table
    assert not table.failed(NodeId(5))


def test_a_full_table_takes_no_one_until_a_node_is_dropped() -> None:
    table = table_of(5, TOP, k=20, capacity=2)
    assert not table.wants(NodeId(6))
    assert not table.answered(contact(6), 2.0)
    assert known(table) == {5, TOP}
    drop(table, TOP)  # 6 waited in the same bucket
    assert known(table) == {5, 6}


def test_a_place_that_comes_free_elsewhere_is_taken_by_the_next_answer() -> None:
    table = table_of(1, 2, TOP, 3, k=2, capacity=3)  # 3 waits
    drop(table, TOP)
    assert known(table) == {1, 2}
    assert table.answered(contact(3), 9.0)
    drop(table, 3)
    assert known(table) == {1, 2}  # it no longer waited for the place that it had


@pytest.mark.parametrize("seed", range(3))
def test_wants_says_exactly_whether_an_answer_would_let_a_node_in(seed: int) -> None:
    rng = random.Random(seed)
    own = NodeId.random(rng)
    table = RoutingTable(own, k=3, capacity=40)
    for _ in range(200):
        node_id = NodeId(own ^ rng.getrandbits(rng.randrange(ID_BITS - 9, ID_BITS + 1)))
        assert table.wants(node_id) == table.answered(Contact(node_id, ("10.0.0.1", 1)), 0.0)


# --- Round-trip times ---


def test_the_first_round_trip_is_taken_as_it_is_and_later_ones_weigh_an_eighth() -> None:
    table = table_of(5)
    node = table.get(NodeId(5))
    assert node == KnownNode(contact(5), 0.0, rtt=None)
    node.measured(0.8)
    assert node.rtt == 0.8
    node.measured(0.0)
    assert node.rtt == pytest.approx(0.7)
    node.measured(1.5)
    assert node.rtt == pytest.approx(0.8)


def test_a_round_trip_after_a_retry_is_believed_only_where_it_is_longer() -> None:
    node = KnownNode(contact(5), 0.0, rtt=0.4)
    node.measured(0.1, exact=False)  # it may be the answer to the first question, or to the second
    assert node.rtt == 0.4
    node.measured(0.9, exact=False)
    assert node.rtt == 0.9


def test_a_round_trip_time_outlives_the_next_answer() -> None:
    table = table_of(5)
    node = table.get(NodeId(5))
    assert node is not None
    node.measured(0.3)
    table.answered(contact(5, port=9), 1.0)
    again = table.get(NodeId(5))
    assert again is not None
    assert (again.rtt, again.answered, again.contact.address[1]) == (0.3, 1.0, 9)
