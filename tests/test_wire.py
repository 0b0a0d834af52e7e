"""Wire: datagrams and TCP frames, from bytes to messages and back."""

import base64
import contextlib
import hmac
import ipaddress
import itertools
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import Contact, Datagram, DatagramCodec, FrameReader, HealthState, NodeId, WireError, WorkerRecord

SETTINGS = settings(derandomize=True, deadline=None, max_examples=25, database=None)

KEY = b"the key of this mesh"
CODEC = DatagramCodec(KEY)
TRANSACTION = bytes(range(8))
SENDER = NodeId(0xABCDEF << 200)


def worker(number: int = 1, host: str = "10.0.0.1", model: str = "tiny") -> WorkerRecord:
    return WorkerRecord(NodeId(number), (host, 47475), 1_700_000_000, 87, HealthState.BUSY, 3, model, b"\x11" * 8)


CONTACTS = (
    Contact(NodeId(1), ("10.0.0.1", 1)),
    Contact(NodeId((1 << 256) - 1), ("2001:db8::7", 65535)),
    Contact(NodeId(7), ("223.255.255.255", 47475)),
)
VALUES: dict[str, Any] = {
    "target": NodeId(3),
    "topic": NodeId(1 << 255),
    "after": NodeId(0),
    "next": NodeId((1 << 256) - 1),
    "token": b"\x00token\xff\x80",
    "record": worker(),
    "nodes": CONTACTS,
    "records": (worker(1), worker(2, "2001:db8::1", "modèle"), worker(3, model="")),
    "total": 4096,
    "known": 20,
    "code": "quota",
}


def full(kind: str) -> Datagram:
    return Datagram(kind, TRANSACTION, SENDER, {name: VALUES[name] for name in qmesh.DATAGRAMS[kind].fields})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def seal(text: bytes, *, key: bytes = KEY, head: bytes = b"QM\x01") -> bytes:
    """A datagram around any text, its MAC made here and not by the module."""
    return head + hmac.digest(key, head + text, "sha256")[:16] + text


def sealed(**body: Any) -> bytes:
    return seal(json.dumps({"x": b64(TRANSACTION), **body}).encode())


def frame(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def read_all(reader: FrameReader) -> list[qmesh.Json]:
    messages = []
    while (message := reader.read()) is not None:
        messages.append(message)
    return messages


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
node_ids = st.integers(0, (1 << 256) - 1).map(NodeId)
packed_hosts = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
hosts = packed_hosts.map(ipaddress.ip_address).filter(
    lambda ip: not (ip.is_multicast or ip.packed[0] in (0, *range(240, 256)))
)
addresses = st.tuples(hosts.map(str), st.integers(1, 65535))
contacts = st.builds(Contact, node_ids, addresses)
records = st.builds(
    WorkerRecord,
    worker_id=node_ids,
    address=addresses,
    stamp=st.integers(0, (1 << 32) - 1),
    score=st.integers(0, 100),
    state=st.sampled_from(HealthState),
    free_slots=st.integers(0, 255),
    model=st.text(max_size=qmesh.MODEL_NAME_BYTES // 4),
    fingerprint=st.binary(min_size=8, max_size=8),
)
some_contacts = st.lists(contacts, max_size=3)
some_records = st.lists(records, max_size=3)


# --- Datagrams: what is sent arrives ---


@pytest.mark.parametrize("kind", qmesh.DATAGRAMS)
def test_a_datagram_with_every_field_arrives_as_it_was_sent(kind: str) -> None:
    assert CODEC.decode(CODEC.encode(full(kind))) == full(kind)


@pytest.mark.parametrize("kind", qmesh.DATAGRAMS)
def test_a_datagram_from_an_ephemeral_client_without_optional_fields_arrives(kind: str) -> None:
    sent = Datagram(kind, TRANSACTION, None, {name: VALUES[name] for name in qmesh.DATAGRAMS[kind].required})
    assert CODEC.decode(CODEC.encode(sent)) == sent


def test_every_field_is_tried_by_these_tests() -> None:
    assert set(VALUES) == {name for told in qmesh.DATAGRAMS.values() for name in told.fields}


def test_a_datagram_is_magic_version_mac_and_compact_json() -> None:
    data = CODEC.encode(Datagram("find_node", TRANSACTION, SENDER, {"target": NodeId(3)}))
    text = data[19:]
    assert data == seal(text)
    assert b" " not in text
    assert json.loads(text) == {
        "t": "find_node",
        "x": b64(TRANSACTION),
        "i": b64(bytes(SENDER)),
        "target": b64(bytes(31) + b"\x03"),
    }


def test_a_field_that_nobody_knows_yet_is_passed_over() -> None:
    assert CODEC.decode(sealed(t="ping", colour="red")) == Datagram("ping", TRANSACTION)


@pytest.mark.parametrize("code", qmesh.DATAGRAM_ERRORS)
def test_every_error_code_arrives(code: str) -> None:
    assert CODEC.decode(sealed(t="error", code=code)).body == {"code": code}


@pytest.mark.parametrize("total", [0, (1 << 32) - 1])
def test_a_holder_may_have_no_records_or_very_many(total: int) -> None:
    body = {"nodes": (), "records": (), "total": total, "token": bytes(8)}
    assert CODEC.decode(CODEC.encode(Datagram("workers", TRANSACTION, SENDER, body))).body == body


# --- Datagrams: size and padding ---


def test_padding_fills_up_to_the_size_asked_for_and_changes_nothing_else() -> None:
    data = CODEC.encode(full("ping"), pad_to=qmesh.SMALL_REQUEST_BYTES)
    assert len(data) == qmesh.SMALL_REQUEST_BYTES
    assert CODEC.decode(data) == full("ping")


def test_padding_never_shortens() -> None:
    plain = CODEC.encode(full("ping"))
    assert CODEC.encode(full("ping"), pad_to=len(plain)) == plain
    assert CODEC.encode(full("ping"), pad_to=1) == plain
    assert len(CODEC.encode(full("ping"), pad_to=len(plain) + 1)) == len(plain) + 1


def test_the_largest_datagram_passes_and_one_byte_more_does_not() -> None:
    assert len(CODEC.encode(full("ping"), pad_to=1200)) == qmesh.MAX_DATAGRAM_BYTES == 1200
    with pytest.raises(WireError, match="1201 bytes"):
        CODEC.encode(full("ping"), pad_to=1201)
    text = CODEC.encode(full("ping"))[19:]
    assert CODEC.decode(seal(text.ljust(1200 - 19))) == full("ping")
    with pytest.raises(WireError, match="size"):
        CODEC.decode(seal(text.ljust(1201 - 19)))


def test_more_nodes_than_a_datagram_holds_are_not_sent() -> None:
    with pytest.raises(WireError):
        CODEC.encode(Datagram("nodes", TRANSACTION, SENDER, {"nodes": CONTACTS * 8, "token": bytes(8)}))


# --- Datagrams: what is wrong is a WireError and nothing else ---

PING = CODEC.encode(full("ping"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PING[:19],
        seal(b""),
        PING[:-1],
        PING + b" ",
        DatagramCodec(b"another mesh").encode(full("ping")),
        seal(PING[19:], key=b""),
        seal(PING[19:], head=b"QM\x02"),
        seal(PING[19:], head=b"QM\x00"),
        seal(PING[19:], head=b"qm\x01"),
        b"QM\x01" + bytes(16) + PING[19:],
    ],
)
def test_a_datagram_of_another_mesh_or_version_or_size_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        CODEC.decode(data)


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    damaged = [PING[:size] for size in range(len(PING))]
    for at, bit in itertools.product(range(len(PING)), range(8)):
        damaged.append(PING[:at] + bytes([PING[at] ^ 1 << bit]) + PING[at + 1 :])
    for data in damaged:
        with pytest.raises(WireError):
            CODEC.decode(data)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"t": None},
        {"t": "hello"},
        {"t": ["ping"]},
        {"t": "ping", "x": None},
        {"t": "ping", "x": 12345678},
        {"t": "ping", "x": b64(bytes(7))},
        {"t": "ping", "x": b64(bytes(9))},
        {"t": "ping", "x": b64(TRANSACTION).rstrip("=")},
        {"t": "ping", "x": "@" + b64(TRANSACTION)[1:]},
        {"t": "ping", "x": "é" + b64(TRANSACTION)[1:]},
        {"t": "ping", "x": "@" + b64(TRANSACTION)},
        {"t": "ping", "x": b64(TRANSACTION) + "\n"},
        {"t": "ping", "i": None},
        {"t": "ping", "i": b64(bytes(31))},
        {"t": "ping", "i": b64(bytes(33))},
        {"t": "find_node"},
        {"t": "find_node", "target": 7},
        {"t": "find_node", "target": ""},
        {"t": "find_node", "target": b64(bytes(20))},
        {"t": "find_workers", "topic": b64(bytes(32)), "after": b64(b"")},
        {"t": "withdraw", "topic": b64(bytes(32))},
        {"t": "pong", "record": None},
        {"t": "pong", "record": ""},
        {"t": "pong", "record": b64(qmesh.pack_record(worker()) * 2)},
        {"t": "pong", "record": b64(qmesh.pack_record(worker())[:-1])},
        {"t": "nodes", "nodes": b64(qmesh.pack_contacts(CONTACTS)[:-1]), "token": b64(bytes(8))},
        {"t": "nodes", "nodes": [], "token": b64(bytes(8))},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8))},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8)), "total": -1},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8)), "total": 1 << 32},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8)), "total": 1.0},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8)), "total": "1"},
        {"t": "workers", "nodes": "", "records": "", "token": b64(bytes(8)), "total": True},
        {"t": "error"},
        {"t": "error", "code": "unheard-of"},
        {"t": "error", "code": ["token"]},
    ],
)
def test_a_datagram_of_the_wrong_shape_is_refused(body: qmesh.Json) -> None:
    with pytest.raises(WireError):
        CODEC.decode(sealed(**body))


@pytest.mark.parametrize("kind", [kind for kind, told in qmesh.DATAGRAMS.items() if told.required])
def test_no_required_field_may_be_missing(kind: str) -> None:
    body = json.loads(CODEC.encode(full(kind))[19:])
    for name in qmesh.DATAGRAMS[kind].required:
        text = json.dumps({key: value for key, value in body.items() if key != name})
        with pytest.raises(WireError):
            CODEC.decode(seal(text.encode()))


@pytest.mark.parametrize("size", [0, 7, 9, 800])
def test_a_token_of_the_wrong_size_is_refused(size: int) -> None:
    """One that is too long would have to be sent back in an announcement, which it does not fit."""
    with pytest.raises(WireError):
        CODEC.decode(sealed(t="nodes", nodes="", token=b64(bytes(size))))


@given(st.binary(max_size=60))
@SETTINGS
def test_random_bytes_are_refused_sealed_or_not(noise: bytes) -> None:
    for data in (noise, b"QM\x01" + noise, seal(noise)):
        with pytest.raises(WireError):
            CODEC.decode(data)


@given(st.sampled_from(sorted(qmesh.DATAGRAMS)), st.data())
@SETTINGS
def test_damage_under_a_right_mac_gives_a_datagram_or_a_wire_error(kind: str, data: st.DataObject) -> None:
    text = bytearray(CODEC.encode(full(kind))[19:])
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(text)))
    _decodes_or_refuses(seal(bytes(text[:cut])))


@given(
    st.fixed_dictionaries(
        {"t": st.sampled_from(sorted(qmesh.DATAGRAMS))},
        optional={
            name: json_values | st.binary(max_size=70).map(b64) | st.binary(min_size=32, max_size=32).map(b64)
            for name in ("x", "i", *VALUES)
        },
    )
    | st.dictionaries(st.text(max_size=5), json_values, max_size=3)
)
@SETTINGS
def test_any_json_under_a_right_mac_gives_a_datagram_or_a_wire_error(body: qmesh.Json) -> None:
    _decodes_or_refuses(sealed(**body))
    _decodes_or_refuses(sealed(**{**body, "token": b64(bytes(8)), "nodes": "", "records": "", "total": 0}))


def _decodes_or_refuses(data: bytes) -> None:
    try:
        datagram = CODEC.decode(data)
    except WireError:
        return
    assert CODEC.decode(CODEC.encode(datagram)) == datagram


# --- Contacts and records ---


@given(some_contacts, some_records)
@SETTINGS
def test_packing_and_unpacking_changes_nothing(nodes: list[Contact], found: list[WorkerRecord]) -> None:
    assert qmesh.unpack_contacts(qmesh.pack_contacts(nodes)) == tuple(nodes)
    assert qmesh.unpack_records(qmesh.pack_records(found)) == tuple(found)


def test_a_contact_is_id_family_address_and_port() -> None:
    assert qmesh.pack_contact(CONTACTS[0]) == bytes(31) + b"\x01\x04\x0a\x00\x00\x01\x00\x01"
    ipv6 = b"\xff" * 32 + b"\x06" + bytes.fromhex("20010db8000000000000000000000007") + b"\xff\xff"
    assert qmesh.pack_contact(CONTACTS[1]) == ipv6


def test_a_record_is_id_address_figures_and_name() -> None:
    expected = bytes(31) + b"\x01\x04\x0a\x00\x00\x01\xb9\x73"
    expected += struct.pack(">IBBB", 1_700_000_000, 87, 1, 3) + b"\x11" * 8 + b"\x04tiny"
    assert qmesh.pack_record(worker()) == expected


def test_a_link_local_address_loses_its_scope() -> None:
    scoped, plain = ("fe80::1%eth0", 9), ("fe80::1", 9)
    assert qmesh.unpack_contacts(qmesh.pack_contact(Contact(SENDER, scoped))) == (Contact(SENDER, plain),)
    assert qmesh.pack_address(scoped) == qmesh.pack_address(plain)


@pytest.mark.parametrize("host", ["255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"])
def test_no_record_is_larger_than_the_limit(host: str) -> None:
    largest = worker((1 << 256) - 1, host, "é" * (qmesh.MODEL_NAME_BYTES // 2))
    assert len(qmesh.pack_record(largest)) <= qmesh.MAX_RECORD_BYTES


def test_the_sizes_that_replies_are_planned_with_are_bounds() -> None:
    assert len(b64(qmesh.pack_contact(CONTACTS[1]))) <= qmesh.NODE_CHARS
    assert len(b64(qmesh.pack_record(worker(model="")) * 3)) >= 3 * qmesh.MIN_RECORD_CHARS


def test_a_list_of_contacts_that_is_cut_off_is_refused() -> None:
    for contact in CONTACTS:
        packed = qmesh.pack_contact(contact)
        for size in range(1, len(packed)):
            with pytest.raises(WireError):
                qmesh.unpack_contacts(packed + packed[:size])


@pytest.mark.parametrize("host", ["0.0.0.0", "0.0.0.1", "224.0.0.1", "239.192.77.77", "255.255.255.255", "ff02::1"])
def test_a_contact_at_which_a_whole_network_would_be_asked_is_refused(host: str) -> None:
    with pytest.raises(WireError):
        qmesh.unpack_contacts(bytes(32) + qmesh.pack_address((host, 5)))


@pytest.mark.parametrize("host", ["::", "::ffff:10.0.0.1", "ff12::1"])
def test_so_is_an_ipv6_address_that_is_none(host: str) -> None:
    with pytest.raises(WireError):
        qmesh.unpack_contacts(bytes(32) + qmesh.pack_address((host, 5)))


@pytest.mark.parametrize("address", ["050a000001b973", "040a0000010000"], ids=["family 5", "port 0"])
def test_a_contact_that_cannot_be_reached_is_refused(address: str) -> None:
    with pytest.raises(WireError):
        qmesh.unpack_contacts(bytes(32) + bytes.fromhex(address))


def test_a_list_of_records_that_is_cut_off_is_refused() -> None:
    for record in VALUES["records"]:
        packed = qmesh.pack_record(record)
        for size in range(1, len(packed)):
            with pytest.raises(WireError):
                qmesh.unpack_records(packed[:size])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (32, b"\x05"),  # neither IPv4 nor IPv6
        (37, b"\x00\x00"),  # port 0
        (43, b"\x65"),  # a score of 101
        (44, b"\x03"),  # a state that does not exist
        (54, b"\x05"),  # a name longer than what follows
        (55, b"\xff"),  # a name that is not UTF-8
    ],
)
def test_a_record_that_makes_no_sense_is_refused(at: int, value: bytes) -> None:
    packed = qmesh.pack_record(worker())
    with pytest.raises(WireError):
        qmesh.unpack_records(packed[:at] + value + packed[at + len(value) :])


def test_a_record_with_too_long_a_name_is_refused() -> None:
    packed = qmesh.pack_record(worker(model=""))[:-1]
    with pytest.raises(WireError):
        qmesh.unpack_records(packed + bytes([qmesh.MODEL_NAME_BYTES + 1]) + b"m" * (qmesh.MODEL_NAME_BYTES + 1))


@given(some_contacts, some_records, st.data())
@SETTINGS
def test_damaged_lists_are_refused_or_mean_just_what_they_say(
    nodes: list[Contact], found: list[WorkerRecord], data: st.DataObject
) -> None:
    noise = data.draw(st.binary(max_size=3))
    for packed in (qmesh.pack_contacts(nodes), qmesh.pack_records(found)):
        at = data.draw(st.integers(0, len(packed)))
        damaged = packed[:at] + noise + packed[at + data.draw(st.integers(0, 3)) :]
        with contextlib.suppress(WireError):
            assert qmesh.pack_contacts(qmesh.unpack_contacts(damaged)) == damaged
        with contextlib.suppress(WireError):
            assert qmesh.pack_records(qmesh.unpack_records(damaged)) == damaged


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(-4, 40))
@SETTINGS
def test_fit_items_says_how_many_fit(sizes: list[int], room: int) -> None:
    items = [bytes(size) for size in sizes]
    fitting = [n for n in range(len(items) + 1) if len(b64(b"".join(items[:n]))) <= room]
    assert qmesh.fit_items(items, room) == max(fitting, default=0)


# --- JSON ---


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_json_is_read_from_any_kind_of_bytes(kind: type[bytes]) -> None:
    text = ' {"a": [1, -2.5, null, true, {"é": "\\ud83d\\ude00"}]}\n'.encode()
    assert qmesh.parse_json(kind(text)) == {"a": [1, -2.5, None, True, {"é": "😀"}]}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}x",
        b"{'a':1}",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":[-Infinity]}',
        b'{"a":1e999}',
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"c":2,"b":3}}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' * 50_000,
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_not_strictly_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(WireError):
        qmesh.parse_json(text)


def test_json_is_written_compactly_in_utf8() -> None:
    assert qmesh.dump_json({"a": [1, None], "b": "é"}) == b'{"a":[1,null],"b":"\xc3\xa9"}'


def test_a_line_of_json_is_one_line_to_every_reader_and_says_the_same() -> None:
    body = {"text": "a\nb\rc\x0bd\x85e\u2028f\u2029g"}
    line = qmesh.dump_line(body)
    assert len(line.decode().splitlines()) == 1
    assert qmesh.parse_json(line) == body


def test_a_number_that_json_does_not_have_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        qmesh.dump_json({"a": float("nan")})


# --- Errors ---


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (qmesh.Refused("why"), "overloaded"),
        (qmesh.Refused("why", "draining"), "draining"),
        (qmesh.InvalidRequest("why"), "invalid_request"),
        (qmesh.InvalidRequest("why", "context_exceeded"), "context_exceeded"),
        (qmesh.ModelNotFound("why"), "model_not_found"),
        (qmesh.DeadlineExceeded("why"), "timeout"),
        (qmesh.WorkerLost("why"), "lost"),
        (qmesh.QMeshError("why"), "internal"),
    ],
)
def test_an_error_crosses_the_wire_as_what_it_is(error: qmesh.QMeshError, code: str) -> None:
    body = qmesh.error_frame("r", error)
    expected = {"type": "inference_error", "request_id": "r", "code": code, "message": "why"}
    assert body == {**expected, "retryable": error.retryable}
    assert code in qmesh.ERROR_CODES
    said = qmesh.error_from_frame(body)
    assert (type(said), str(said), said.code) == (type(error), "why", code)


def test_a_refusal_tells_the_health_and_an_error_of_no_request_names_none() -> None:
    health = qmesh.HealthReport(10, HealthState.OVERLOADED, cpu=90, memory=90, queue=10)
    body = qmesh.error_frame(None, qmesh.Refused("full"), health)
    assert "request_id" not in body
    assert qmesh.HealthReport.from_json(body["health"]) == health


@pytest.mark.parametrize("code", [None, "unheard-of", ["overloaded"], 7])
def test_an_error_that_nobody_knows_is_an_error_still(code: object) -> None:
    said = qmesh.error_from_frame({"type": "inference_error", "code": code})
    assert type(said) is qmesh.QMeshError
    assert str(said) == "the worker gave no reason"


# --- TCP frames ---

MESSAGES: list[qmesh.Json] = [
    {"type": "hello", "version": 1, "agent": "é"},
    {"type": "status"},
    {"type": "inference_token", "request_id": "r", "seq": 0, "tokens": [1, 2], "text": "ab"},
]
STREAM = b"".join(qmesh.encode_frame(message) for message in MESSAGES)


def test_a_frame_is_a_big_endian_length_and_json() -> None:
    assert qmesh.encode_frame({"type": "status"}) == b'\x00\x00\x00\x11{"type":"status"}'


@pytest.mark.parametrize("kind", sorted(qmesh.FRAMES))
def test_every_type_of_frame_arrives(kind: str) -> None:
    reader = FrameReader()
    reader.feed(qmesh.encode_frame({"type": kind, "n": 1}))
    assert read_all(reader) == [{"type": kind, "n": 1}]


def test_several_frames_may_come_at_once() -> None:
    reader = FrameReader()
    reader.feed(STREAM)
    assert read_all(reader) == MESSAGES
    assert reader.pending == 0


def test_a_frame_may_come_byte_by_byte() -> None:
    reader, got = FrameReader(), []
    for at in range(len(STREAM)):
        reader.feed(STREAM[at : at + 1])
        got += read_all(reader)
    assert got == MESSAGES


@given(st.sets(st.integers(0, len(STREAM))))
@SETTINGS
def test_it_does_not_matter_where_the_stream_is_cut(cuts: set[int]) -> None:
    reader, got, edges = FrameReader(), [], [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        reader.feed(STREAM[start:end])
        got += read_all(reader)
    assert got == MESSAGES
    assert reader.pending == 0


def test_pending_counts_the_bytes_of_an_unfinished_frame() -> None:
    reader = FrameReader()
    reader.feed(STREAM + b"\x00\x00\x00")
    assert read_all(reader) == MESSAGES
    assert reader.pending == 3
    reader.feed(b'\x11{"type"')
    assert reader.read() is None
    assert reader.pending == 11


def test_a_frame_at_the_limit_passes_and_one_over_it_is_refused_from_its_length_alone() -> None:
    text = b'{"type":"status"}'
    reader = FrameReader(limit=len(text))
    reader.feed(frame(text))
    assert reader.read() == {"type": "status"}
    reader.feed(struct.pack(">I", len(text) + 1))
    with pytest.raises(WireError, match="18 bytes"):
        reader.read()


def test_a_stranger_may_send_no_more_than_a_greeting() -> None:
    reader = FrameReader()
    reader.feed(struct.pack(">I", qmesh.MAX_HELLO_BYTES + 1))
    with pytest.raises(WireError):
        reader.read()


def test_the_limit_may_be_raised_between_two_frames_that_came_together() -> None:
    reader = FrameReader()
    prompt = {"type": "prompt", "prompt": "x" * qmesh.MAX_HELLO_BYTES}
    reader.feed(qmesh.encode_frame(MESSAGES[0]) + qmesh.encode_frame(prompt))
    assert reader.read() == MESSAGES[0]
    reader.limit = qmesh.MAX_FRAME_BYTES
    assert reader.read() == prompt


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"[]",
        b'"status"',
        b"{}",
        b'{"type":"status"',
        b'{"type":"reboot"}',
        b'{"type":null}',
        b'{"type":["status"]}',
        b'{"type":{"status":1}}',
        b'{"type":"\\ud800"}',
        b'{"type":"status","type":"status"}',
        b'{"type":"status","n":NaN}',
    ],
)
def test_a_frame_that_is_no_message_is_refused(text: bytes) -> None:
    reader = FrameReader()
    reader.feed(frame(text))
    with pytest.raises(WireError):
        reader.read()


@given(st.dictionaries(st.sampled_from(["type", "request_id", "n"]), json_values))
@SETTINGS
def test_any_json_in_a_frame_gives_a_message_or_a_wire_error(body: qmesh.Json) -> None:
    reader = FrameReader()
    reader.feed(frame(json.dumps(body).encode()))
    try:
        assert reader.read() == body
    except WireError:
        assert body.get("type") not in list(qmesh.FRAMES)


@given(st.binary(max_size=20))
@SETTINGS
def test_random_bytes_in_a_stream_give_nothing_or_a_wire_error(noise: bytes) -> None:
    for data in (noise, frame(noise)):
        reader = FrameReader()
        reader.feed(data)
        try:
            assert reader.read() is None
        except WireError:
            continue
        assert reader.pending == len(data)


def test_the_largest_frame_is_sent_and_one_byte_more_is_an_invalid_request() -> None:
    room = qmesh.MAX_FRAME_BYTES - len(b'{"text":""}')
    assert len(qmesh.encode_frame({"text": "x" * room})) == 4 + qmesh.MAX_FRAME_BYTES
    with pytest.raises(qmesh.InvalidRequest, match="at most"):
        qmesh.encode_frame({"text": "x" * (room + 1)})


@pytest.mark.parametrize("value", ["\udcff", float("inf")], ids=["half a surrogate pair", "infinity"])
def test_what_json_in_utf8_cannot_carry_is_an_invalid_request(value: object) -> None:
    """Such text comes from a command line that is not UTF-8, or from \\ud800 in a client's JSON."""
    with pytest.raises(qmesh.InvalidRequest):
        qmesh.encode_frame({"type": "prompt", "prompt": value})
