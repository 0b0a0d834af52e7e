"""Records and tokens: which workers we vouch for, and who may tell us."""

import random
from dataclasses import replace

import pytest

from qmesh import (
    RECORD_TTL_S,
    TOKEN_BYTES,
    TOKEN_PERIOD_S,
    AnnounceTokens,
    HealthState,
    NodeId,
    RecordKey,
    RecordStore,
    WorkerRecord,
)

TOPIC, OTHER_TOPIC = NodeId(100), NodeId(200)
FIRST = NodeId(0)  # no worker's id: pages start behind it


def worker(number: int, host: str = "10.0.0.1", stamp: int = 1) -> WorkerRecord:
    return WorkerRecord(NodeId(number), (host, 47475), stamp, 80, HealthState.HEALTHY, 4, "tiny", bytes(8))


def store_of(*numbers: int, per_host: int = 1000, capacity: int = 1000) -> RecordStore:
    store = RecordStore(capacity=capacity, per_host=per_host)
    for number in numbers:
        assert store.put(TOPIC, worker(number), 0.0)
    return store


def ids(records: list[WorkerRecord]) -> list[int]:
    return [record.worker_id for record in records]


def kept(store: RecordStore, topic: NodeId = TOPIC) -> list[int]:
    return ids(store.page(topic, FIRST, 1000))


def everything(store: RecordStore, topic: NodeId = TOPIC) -> list[WorkerRecord]:
    return store.page(topic, FIRST, 1000)


# --- Records: kept, replaced, taken back ---


def test_a_record_is_kept_under_its_topic_only() -> None:
    store = store_of(1)
    assert everything(store) == [worker(1)]
    assert everything(store, OTHER_TOPIC) == []
    assert (store.total(TOPIC), store.total(OTHER_TOPIC), len(store)) == (1, 0, 1)


def test_one_worker_may_stand_under_two_topics() -> None:
    store = store_of(1)
    assert store.put(OTHER_TOPIC, worker(1, stamp=5), 0.0)
    assert len(store) == 2
    assert store.remove(TOPIC, worker(1).key)
    assert everything(store) == []
    assert everything(store, OTHER_TOPIC) == [worker(1, stamp=5)]


def test_a_later_announcement_takes_the_place_of_the_earlier() -> None:
    store = store_of(1)
    later = replace(worker(1, stamp=2), score=10, state=HealthState.OVERLOADED)
    assert store.put(TOPIC, later, 1.0)
    assert everything(store) == [later]
    assert len(store) == store.total(TOPIC) == 1


def test_an_announcement_that_was_overtaken_on_its_way_changes_nothing() -> None:
    """A retry of an old one may arrive behind a new one; of two records the later counts."""
    store = RecordStore()
    store.put(TOPIC, worker(1, stamp=9), 0.0)
    store.put(TOPIC, worker(1, stamp=8), 1.0)
    assert everything(store) == [worker(1, stamp=9)]


def test_an_announcement_that_is_repeated_keeps_nobody_alive() -> None:
    """It may have been recorded on the wire, and be sent again and again after the worker's death."""
    store = RecordStore()
    store.put(TOPIC, worker(1, stamp=9), 0.0)
    for repeated_at in range(1, int(RECORD_TTL_S)):
        assert store.put(TOPIC, worker(1, stamp=9), float(repeated_at))
    store.expire(RECORD_TTL_S)
    assert not len(store)


def test_a_record_that_is_taken_back_is_gone_and_was_there_once() -> None:
    store = store_of(1, 2)
    assert store.remove(TOPIC, worker(1).key)
    assert not store.remove(TOPIC, worker(1).key)
    assert not store.remove(OTHER_TOPIC, worker(2).key)
    assert kept(store) == [2]
    assert store.remove(TOPIC, worker(2).key)
    assert len(store) == store.total(TOPIC) == 0


# --- Records: hosts that speak for one worker ---


def test_two_hosts_speak_for_one_id_and_neither_touches_what_the_other_said() -> None:
    """Whose id it is shows only when it is dialled; until then the truth must not be pushed aside."""
    true, false = worker(1, "10.0.0.2"), replace(worker(1, "10.0.0.1", stamp=9), score=99)
    for first, second in ((true, false), (false, true)):
        store = RecordStore()
        assert store.put(TOPIC, first, 0.0)
        assert store.put(TOPIC, second, 0.0)
        assert everything(store) == [false, true]
        assert (len(store), store.total(TOPIC)) == (2, 2)
        assert sorted(store.sample(TOPIC, 2, random.Random(0)), key=lambda record: record.key) == [false, true]


def test_of_two_hosts_that_speak_for_one_id_each_has_its_own_stamps_and_its_own_end() -> None:
    store = RecordStore()
    store.put(TOPIC, worker(1, "10.0.0.1", stamp=9), 0.0)
    store.put(TOPIC, worker(1, "10.0.0.2", stamp=1), 0.0)
    store.put(TOPIC, worker(1, "10.0.0.2", stamp=2), 5.0)  # older than the other's, and news all the same
    assert everything(store) == [worker(1, "10.0.0.1", stamp=9), worker(1, "10.0.0.2", stamp=2)]
    store.expire(RECORD_TTL_S)
    assert everything(store) == [worker(1, "10.0.0.2", stamp=2)]


def test_what_one_host_takes_back_the_other_still_says() -> None:
    store = RecordStore()
    store.put(TOPIC, worker(1, "10.0.0.1"), 0.0)
    assert not store.remove(TOPIC, (NodeId(1), "10.0.0.2"))
    store.put(TOPIC, worker(1, "10.0.0.2"), 0.0)
    assert store.remove(TOPIC, (NodeId(1), "10.0.0.2"))
    assert everything(store) == [worker(1, "10.0.0.1")]


def test_who_speaks_for_anothers_id_pays_with_its_own_quota() -> None:
    store = store_of(1, 2, per_host=2)
    for number in (1, 2):
        assert store.put(TOPIC, worker(number, host="10.0.0.2"), 0.0)
    assert not store.put(TOPIC, worker(3, host="10.0.0.2"), 0.0)
    assert store.put(TOPIC, worker(1, stamp=2), 1.0)  # those of whom it speaks are renewed where they are
    assert store.remove(TOPIC, (NodeId(1), "10.0.0.2"))
    assert store.put(TOPIC, worker(3, host="10.0.0.2"), 1.0)
    assert not store.put(TOPIC, worker(3, host="10.0.0.1"), 1.0)


# --- Records: time ---


def test_a_record_is_believed_until_its_time_is_up_and_not_a_moment_longer() -> None:
    store = store_of(1)
    store.expire(RECORD_TTL_S - 0.001)
    assert kept(store) == [1]
    store.expire(RECORD_TTL_S)
    assert kept(store) == []
    assert len(store) == 0


def test_an_announcement_renews_a_record() -> None:
    store = store_of(1)
    store.put(TOPIC, worker(1, stamp=2), 10.0)
    store.expire(RECORD_TTL_S + 9.9)
    assert kept(store) == [1]
    store.expire(RECORD_TTL_S + 10.0)
    assert kept(store) == []


def test_records_expire_in_the_order_in_which_they_were_last_announced() -> None:
    store = RecordStore()
    for now, number in enumerate((1, 2, 3, 1)):
        store.put(TOPIC, worker(number, stamp=now), float(now))
    for now, left in ((1, [1, 3]), (2, [1]), (3, [])):
        store.expire(now + RECORD_TTL_S)
        assert kept(store) == left


def test_topics_expire_each_by_its_own_time() -> None:
    store = store_of(1)
    store.put(OTHER_TOPIC, worker(1), 5.0)
    store.expire(RECORD_TTL_S)
    assert (store.total(TOPIC), store.total(OTHER_TOPIC)) == (0, 1)


# --- Records: quotas ---


def test_a_full_store_takes_no_new_worker_but_renews_those_it_has() -> None:
    store = store_of(1, 2, capacity=2)
    assert not store.put(TOPIC, worker(3, "10.0.0.3"), 1.0)
    assert not store.put(OTHER_TOPIC, worker(1), 1.0)
    assert store.put(TOPIC, worker(2, stamp=2), 1.0)
    assert kept(store) == [1, 2]
    store.expire(RECORD_TTL_S)  # 1 was not renewed
    assert store.put(TOPIC, worker(3, "10.0.0.3"), RECORD_TTL_S)
    assert kept(store) == [2, 3]


def test_one_host_may_have_so_many_workers_under_all_topics_together() -> None:
    store = store_of(1, per_host=2)
    assert store.put(OTHER_TOPIC, worker(2), 0.0)
    assert not store.put(TOPIC, worker(3), 0.0)
    assert store.put(TOPIC, worker(3, host="10.0.0.2"), 0.0)
    assert store.put(TOPIC, worker(1, stamp=2), 0.0)


@pytest.mark.parametrize("leave", ["remove", "expire"])
def test_a_worker_that_left_makes_room_on_its_host(leave: str) -> None:
    store = store_of(1, per_host=1)
    if leave == "remove":
        store.remove(TOPIC, worker(1).key)
    else:
        store.expire(RECORD_TTL_S)
    assert store.put(TOPIC, worker(2), RECORD_TTL_S)
    assert not store.put(TOPIC, worker(3), RECORD_TTL_S)


def test_a_worker_cannot_be_told_of_at_a_host_that_is_full_and_is_kept_where_it_was() -> None:
    store = store_of(1, per_host=1)
    assert store.put(TOPIC, worker(2, host="10.0.0.2"), 0.0)
    assert not store.put(TOPIC, worker(2, host="10.0.0.1", stamp=2), 1.0)
    assert everything(store) == [worker(1), worker(2, host="10.0.0.2")]
    assert not store.put(TOPIC, worker(3, host="10.0.0.2"), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_store_agrees_with_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    store, model = RecordStore(capacity=12, per_host=4), dict[tuple[NodeId, RecordKey], tuple[WorkerRecord, float]]()
    refused = 0
    for step in range(300):
        now = step * 2.0
        topic = rng.choice((TOPIC, OTHER_TOPIC))
        record = worker(rng.randrange(1, 6), f"10.0.0.{rng.randrange(4)}", stamp=step)
        key = (topic, record.key)
        store.expire(now)
        model = {k: (r, expires) for k, (r, expires) in model.items() if expires > now}
        if rng.random() < 0.2:
            assert store.remove(*key) == (model.pop(key, None) is not None)
            continue
        others = [r.address[0] for k, (r, _) in model.items() if k != key]
        fits = key in model or (len(others) < 12 and others.count(record.address[0]) < 4)
        assert store.put(topic, record, now) == fits
        refused += not fits
        if fits:
            model[key] = (record, now + RECORD_TTL_S)
        assert len(store) == len(model)
        for each in (TOPIC, OTHER_TOPIC):
            expected = sorted((r for (t, _), (r, _) in model.items() if t == each), key=lambda r: r.key)
            assert store.page(each, FIRST, 100) == expected
            assert store.total(each) == len(expected)
    assert refused > 10


def test_of_very_many_hosts_that_speak_for_a_worker_those_that_did_so_lately_are_kept() -> None:
    store = store_of(7)
    for second in range(20):
        assert store.put(TOPIC, worker(1, f"10.0.{second}.1"), float(second))
    assert [record.address[0] for record in store.page(TOPIC, FIRST, 8)] == sorted(f"10.0.{n}.1" for n in range(12, 20))
    assert ids(store.page(TOPIC, NodeId(1), 8)) == [7]


# --- Records: pages and samples ---


def test_a_page_is_in_order_of_id_and_starts_behind_the_id_given() -> None:
    store = store_of(50, 10, 40, 20, 30)
    assert ids(store.page(TOPIC, FIRST, 3)) == [10, 20, 30]
    assert ids(store.page(TOPIC, NodeId(30), 3)) == [40, 50]
    assert ids(store.page(TOPIC, NodeId(25), 1)) == [30]
    assert store.page(TOPIC, NodeId(50), 3) == []
    assert store.page(OTHER_TOPIC, FIRST, 3) == []


def test_pages_hold_every_record_once() -> None:
    store = store_of(*random.Random(0).sample(range(1, 10_000), 101))
    got: list[int] = []
    after = FIRST
    while page := store.page(TOPIC, after, 7):
        got += ids(page)
        after = page[-1].worker_id
    assert len(got) == 101
    assert got == kept(store)


def test_pages_hold_every_record_once_where_workers_have_several_hosts() -> None:
    store, rng = RecordStore(), random.Random(0)
    records = [worker(number, f"10.0.{host}.1") for number in range(1, 41) for host in range(rng.randint(1, 5))]
    for record in records:
        store.put(TOPIC, record, 0.0)
    got: list[WorkerRecord] = []
    after = FIRST
    while page := store.page(TOPIC, after, 7):
        got += page
        after = page[-1].worker_id
    assert got == sorted(records, key=lambda record: record.key)


def test_a_worker_with_more_hosts_than_a_page_holds_does_not_stop_the_paging() -> None:
    store = RecordStore()
    for host in range(5):
        store.put(TOPIC, worker(1, f"10.0.{host}.1"), 0.0)
    store.put(TOPIC, worker(2), 0.0)
    assert ids(store.page(TOPIC, FIRST, 3)) == [1, 1, 1]
    assert ids(store.page(TOPIC, NodeId(1), 3)) == [2]


def test_a_page_goes_on_rightly_after_records_came_and_went() -> None:
    store = store_of(10, 20, 30, 40)
    assert ids(store.page(TOPIC, FIRST, 2)) == [10, 20]
    store.remove(TOPIC, worker(20).key)
    store.put(TOPIC, worker(25), 0.0)
    assert ids(store.page(TOPIC, NodeId(20), 9)) == [25, 30, 40]


def test_a_sample_is_drawn_without_repetition_and_takes_all_when_it_may() -> None:
    store = store_of(*range(1, 21))
    rng = random.Random(0)
    for count in (0, 1, 5, 20, 50):
        sample = ids(store.sample(TOPIC, count, rng))
        assert len(sample) == len(set(sample)) == min(count, 20)
        assert set(sample) <= set(range(1, 21))
    assert store.sample(OTHER_TOPIC, 5, rng) == []


def test_samples_show_every_record_about_equally_often() -> None:
    store = store_of(*range(1, 11))
    rng = random.Random(0)
    drawn = [number for _ in range(1000) for number in ids(store.sample(TOPIC, 3, rng))]
    assert all(220 < drawn.count(number) < 380 for number in range(1, 11))  # 300 expected


def test_a_sample_depends_on_nothing_but_its_random_source() -> None:
    store = store_of(*range(1, 21))
    samples = [ids(store.sample(TOPIC, 5, random.Random(seed))) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("count", [0, -1])
def test_a_page_with_room_for_less_than_one_record_is_empty(count: int) -> None:
    assert store_of(1, 2, 3).page(TOPIC, FIRST, count) == []


@pytest.mark.parametrize("count", [0, -1])
def test_a_sample_with_room_for_less_than_one_record_is_empty(count: int) -> None:
    """A request that was not padded leaves its reply less than no room."""
    assert store_of(1, 2, 3).sample(TOPIC, count, random.Random(0)) == []


# --- Tokens ---

ADDRESS = ("10.0.0.1", 47475)
ISSUED_AT = 10 * TOKEN_PERIOD_S + 1


def test_a_token_is_valid_in_the_minute_it_was_given_in_and_the_next_and_then_no_more() -> None:
    tokens = AnnounceTokens(b"secret")
    token = tokens.issue(ADDRESS, ISSUED_AT)
    assert len(token) == TOKEN_BYTES
    assert tokens.valid(token, ADDRESS, ISSUED_AT)
    assert tokens.valid(token, ADDRESS, 11 * TOKEN_PERIOD_S)
    assert tokens.valid(token, ADDRESS, 12 * TOKEN_PERIOD_S - 0.001)
    assert not tokens.valid(token, ADDRESS, 12 * TOKEN_PERIOD_S)


def test_a_token_is_not_valid_before_its_time() -> None:
    tokens = AnnounceTokens(b"secret")
    assert not tokens.valid(tokens.issue(ADDRESS, ISSUED_AT), ADDRESS, 10 * TOKEN_PERIOD_S - 0.001)


@pytest.mark.parametrize("address", [("10.0.0.2", 47475), ("10.0.0.1", 47476), ("fe80::1%eth0", 47475)])
def test_a_token_is_valid_for_no_other_address(address: tuple[str, int]) -> None:
    tokens = AnnounceTokens(b"secret")
    assert tokens.valid(tokens.issue(address, ISSUED_AT), address, ISSUED_AT)
    assert not tokens.valid(tokens.issue(ADDRESS, ISSUED_AT), address, ISSUED_AT)


def test_a_token_is_valid_under_no_other_secret() -> None:
    token = AnnounceTokens(b"secret").issue(ADDRESS, ISSUED_AT)
    assert AnnounceTokens(b"secret").valid(token, ADDRESS, ISSUED_AT)
    assert not AnnounceTokens(b"another").valid(token, ADDRESS, ISSUED_AT)


@pytest.mark.parametrize("forged", [b"", bytes(TOKEN_BYTES), bytes(100)])
def test_what_is_no_token_is_not_valid(forged: bytes) -> None:
    assert not AnnounceTokens(b"secret").valid(forged, ADDRESS, ISSUED_AT)


def test_part_of_a_token_is_not_valid() -> None:
    tokens = AnnounceTokens(b"secret")
    token = tokens.issue(ADDRESS, ISSUED_AT)
    for wrong in (token[:-1], token + b"\x00", token[:-1] + bytes([token[-1] ^ 1])):
        assert not tokens.valid(wrong, ADDRESS, ISSUED_AT)
