"""Whatever comes from outside ends in a value or in the error that is documented: tests/fuzz.py's targets, briefly."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import Datagram, NodeId, WireError

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=50)

SEEDS = {name: target.seeds() for name, target in fuzz.TARGETS.items()}


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


# --- Every parser ---


@pytest.mark.parametrize("name", fuzz.TARGETS)
@given(st.data())
@SETTINGS
def test_any_bytes_and_any_damage_end_as_documented(name: str, data: st.DataObject) -> None:
    noise = data.draw(st.binary(max_size=40))
    target, seed = fuzz.TARGETS[name], bytearray(data.draw(st.sampled_from(SEEDS[name])))
    target.run(noise)
    at = data.draw(st.integers(0, len(seed)))
    seed[at : at + data.draw(st.integers(0, 8))] = noise[:8]
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)):
        seed[place % len(seed) :][:1] = bytes([byte])
    target.run(bytes(seed))


@pytest.mark.parametrize("name", sorted(set(fuzz.TARGETS) - {"dht"}))
def test_a_valid_message_cut_off_anywhere_ends_as_documented(name: str) -> None:
    """A datagram's MAC is made for what is left of it."""
    for seed in SEEDS[name]:
        for size in range(len(seed)):
            fuzz.TARGETS[name].run(seed[:size])


@pytest.mark.parametrize(
    "name", ["datagram", "job", "health", "token", "result", "embed_job", "embeddings", "error", "status"]
)
def test_each_field_may_hold_anything(name: str) -> None:
    """An edit is three bytes: which field, how much deeper, and what is put there."""
    for seed, field, deeper, act in itertools.product(range(4), range(9), (0, 1, 255), range(len(fuzz.NASTY) + 4)):
        fuzz.TARGETS[name].run(bytes([seed, field, deeper, act, deeper, act]))


# --- Datagrams ---

HOSTILE = [
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 900, b"-1", b"0.5", b"true", b"null", b"{}", b"[]", b'[""]'),
    *(b'"\\ud800"', b'"\xff"', b'"\xed\xa0\x80"', b'"\\u0000"', b'"\xc3\xa9"', b'"' + b"A" * 900 + b'"'),
    *(deep(400), b'{"a":' * 180 + b"0" + b"}" * 180, b"[" * 900, b'{"a":1,"a":1}', b""),
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value[:12]))
def test_no_field_of_a_datagram_takes_what_it_does_not_mean(value: bytes) -> None:
    for kind, told in qmesh.DATAGRAMS.items():
        plain = {
            name: fuzz.sample(name)[:1] if name in ("nodes", "records") else fuzz.sample(name) for name in told.required
        }
        text = fuzz.CODEC.encode(Datagram(kind, fuzz.TRANSACTION, fuzz.IDS[1], plain))[qmesh.DATAGRAM_HEADER_BYTES :]
        for name in ("t", "x", "i", *told.fields):
            body = {key: json.dumps(each).encode() for key, each in json.loads(text).items()} | {name: value}
            members = b",".join(b'"%s":%s' % (key.encode(), each) for key, each in body.items())
            data = fuzz.seal(b"{" + members + b"}")
            with pytest.raises(WireError):
                fuzz.CODEC.decode(data)
            with pytest.raises(WireError):
                fuzz.CODEC.decode(fuzz.seal(b'{"%s":%s,' % (name.encode(), body[name]) + members + b"}"))


# --- Frames ---

FRAME = qmesh.encode_frame(fuzz.TOKEN)
chunks = st.binary(max_size=9) | st.sampled_from(
    [FRAME, FRAME[:7], FRAME[7:], struct.pack(">I", 9), b"{}", b"\xff" * 5]
)


@given(st.lists(chunks, max_size=12), st.lists(st.integers(0, 255), max_size=6))
@SETTINGS
def test_a_stream_says_the_same_however_it_is_cut(stream: list[bytes], sizes: list[int]) -> None:
    whole = b"".join(stream)
    at_once = fuzz.messages([whole])
    assert fuzz.messages(stream) == at_once
    assert fuzz.messages(fuzz.pieces(whole, b"")) == at_once
    assert fuzz.messages(fuzz.pieces(whole, bytes(sizes))) == at_once


@given(st.integers(0, 64), st.integers(0, 2**32 - 1))
@SETTINGS
def test_a_length_over_the_limit_is_refused_before_anything_is_kept(limit: int, size: int) -> None:
    reader = qmesh.FrameReader(limit)
    for byte in struct.pack(">I", size):
        assert reader.read() is None
        reader.feed(bytes([byte]))
    if size > limit:
        with pytest.raises(WireError):
            reader.read()
    elif size:
        assert reader.read() is None
    assert reader.pending == 4


# --- A live node ---


def hosts(count: int) -> list[qmesh.Address]:
    return [(f"10.{number >> 8}.{number & 255}.1", 5000) for number in range(count)]


def ask(mesh: fuzz.Mesh, kind: str, sender: NodeId, source: qmesh.Address, **body: object) -> Datagram:
    """A request at its largest, and the reply to it."""
    data = fuzz.CODEC.encode(Datagram(kind, bytes(8), sender, body), pad_to=qmesh.MAX_DATAGRAM_BYTES)
    mesh.engine.receive_datagram(data, source, mesh.now)
    replies = [fuzz.CODEC.decode(said) for said, to in mesh.take() if to == source]
    return next(said for said in replies if said.kind not in qmesh.REQUESTS)


def test_a_flood_of_announcements_fills_no_more_than_its_share() -> None:
    mesh, rng, answers = fuzz.Mesh(), random.Random(1), set()
    for source in hosts(qmesh.MAX_RECORDS // qmesh.MAX_RECORDS_PER_HOST + 2):
        token = ask(mesh, "find_node", fuzz.IDS[1], source, target=fuzz.IDS[1]).body["token"]
        for _ in range(qmesh.MAX_RECORDS_PER_HOST + 1):
            sender = NodeId.random(rng)
            record = replace(fuzz.record(1), worker_id=sender)
            said = ask(mesh, "announce", sender, source, topic=fuzz.KEYS.topic, token=token, record=record)
            answers.add(said.body.get("code", said.kind))
    told = ask(mesh, "find_workers", fuzz.IDS[1], ("10.200.0.1", 1), topic=fuzz.KEYS.topic).body
    assert answers == {"ok", "quota"}
    assert told["total"] == qmesh.MAX_RECORDS
    mesh.wake(mesh.now + qmesh.RECORD_TTL_S)
    told = ask(mesh, "find_workers", fuzz.IDS[1], ("10.200.0.1", 1), topic=fuzz.KEYS.topic).body
    assert told["total"] == 0


steps = st.tuples(st.integers(0, fuzz.WISH), *([st.integers(0, 255)] * 4)).map(bytes)


@given(st.lists(steps, max_size=60))
@SETTINGS
def test_whatever_happens_to_a_node_it_goes_on_within_its_bounds(program: list[bytes]) -> None:
    fuzz.dht(b"".join(program))


# --- Text that people and files give ---


@given(
    st.dictionaries(
        st.sampled_from(["host", "port", "peers", "topic", "timeout_s", "log_level", "gpu_layers"]), st.text()
    ),
    st.dictionaries(st.sampled_from(["QMESH_HOST", "QMESH_PEERS", "QMESH_TOPIC", "GPU_LAYERS"]), st.text()),
)
@SETTINGS
def test_settings_are_right_or_a_value_error(flags: dict[str, str], environ: dict[str, str]) -> None:
    try:
        chosen = qmesh.Settings.resolve(flags, environ)
    except ValueError:
        return
    assert chosen.port is None or 0 <= chosen.port <= 65535
    assert 0 < chosen.timeout_s <= qmesh.MAX_TIMEOUT_S


addresses = st.text(st.sampled_from("[]:%.0159af\ud800é \n"), max_size=12) | st.text()


@given(addresses)
@SETTINGS
def test_an_address_is_a_host_and_a_port_or_a_value_error(text: str) -> None:
    try:
        host, port = qmesh.parse_address(text, 7)
    except ValueError:
        return
    assert host.strip()
    assert 0 <= port <= 65535


def test_no_error_about_a_key_file_tells_the_key() -> None:
    for at, wrong in itertools.product(range(len(fuzz.KEY.text)), ("!", "", "\n", " until ", "é")):
        text = fuzz.KEY.text[:at] + wrong + fuzz.KEY.text[at + 1 :]
        with pytest.raises(ValueError, match="key") as caught:
            qmesh.parse_mesh_keys(text)
        assert not any(
            part in str(caught.value) for part in (fuzz.KEY.text[at + 1 :][:12], fuzz.KEY.text[8:20]) if len(part) > 4
        )


# --- Found by fuzzing, and not mended yet ---


def from_below(levels: int, call: Callable[[], object]) -> object:
    """Call with more of the stack in use than the reader of the frame had."""
    return call() if not levels else from_below(levels - 1, call)


def test_nesting_that_json_lets_pass_is_no_error_of_its_own() -> None:
    for levels in range(700, 1000):
        try:
            body = qmesh.parse_json(b'{"finish_reason":' + deep(levels) + b"}")
        except WireError:
            break
        with pytest.raises(WireError):
            from_below(20, lambda body=body: qmesh.Result.from_json(body))  # type: ignore[misc]


def test_a_result_holds_nothing_that_utf8_cannot_carry() -> None:
    body = qmesh.parse_json(json.dumps({**fuzz.RESULT, "usage": {"\ud800": 1}}).encode())
    with pytest.raises(WireError):
        qmesh.Result.from_json(body)


def test_a_card_with_an_absurd_memory_is_left_out() -> None:
    assert qmesh.parse_gpu_load(f"card, {'9' * 400}, 1, 1") == []
