"""Errors and values: what errors tell, what values refuse, and both through JSON and back."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import all_errors

import qmesh
from qmesh import (
    Embeddings,
    EmbedJob,
    HealthReport,
    HealthState,
    InvalidRequest,
    Job,
    Message,
    NodeId,
    QMeshError,
    Refused,
    Result,
    Resume,
    Sampling,
    Token,
    WireError,
    WorkerRecord,
)

fuzz = settings(deadline=None, derandomize=True, database=None)


def through_json(body: Any) -> Any:
    """What the other side reads of what this side writes."""
    return json.loads(json.dumps(body, allow_nan=False))


# --- Errors ---

# (Error, exit code, code on the wire, whether another worker or a later try may help).
ERRORS: list[tuple[type[QMeshError], int, str, bool]] = [
    (QMeshError, 1, "internal", False),
    (qmesh.UsageError, 2, "usage", False),
    (qmesh.NoWorkerFound, 3, "no_worker", True),
    (qmesh.Refused, 4, "overloaded", True),
    (qmesh.ModelNotFound, 5, "model_not_found", False),
    (qmesh.ModelError, 1, "internal", False),
    (qmesh.MissingPackage, 1, "internal", False),
    (qmesh.MissingTls, 1, "internal", False),
    (qmesh.InvalidRequest, 1, "invalid_request", False),
    (qmesh.WorkerLost, 1, "lost", True),
    (qmesh.DeadlineExceeded, 1, "timeout", False),
    (qmesh.WireError, 1, "internal", False),
    (qmesh.WrongMesh, 1, "wrong_mesh", False),
    (qmesh.DamagedArchive, 1, "damaged_archive", False),
]


def test_the_table_holds_every_error_of_the_public_face() -> None:
    public = {error for error in all_errors() if error.__module__ == "qmesh" and error.__name__[0] != "_"}
    of_one_face = {qmesh.BadParameter, qmesh.NoSuchWorker}  # see tests/test_openai_api.py
    assert {row[0] for row in ERRORS} == public - of_one_face


def test_the_tree_in_the_source_is_the_real_one() -> None:
    source = Path(qmesh.__file__).read_text(encoding="utf-8")
    banner = source.split("# 2  Errors\n")[1].split("# ====")[0]
    drawn = re.findall(r"\+- (\w+)(?: +exit (\d))?", banner)
    assert sorted(drawn) == sorted((kind.__name__, str(code) if code > 1 else "") for kind, code, *_ in ERRORS[1:])


@pytest.mark.parametrize(("kind", "exit_code", "code", "retryable"), ERRORS)
def test_an_error_knows_its_codes(kind: type[QMeshError], exit_code: int, code: str, retryable: bool) -> None:
    error = kind("what happened")
    assert (str(error), error.exit_code, error.retryable) == ("what happened", exit_code, retryable)
    assert error.code == code
    of_one_side = ("usage", "no_worker", "wrong_mesh", "damaged_archive")  # these never cross the wire
    assert code in (*qmesh.ERROR_CODES, *of_one_side)


@pytest.mark.parametrize("kind", [row[0] for row in ERRORS])
def test_an_error_says_what_to_do_in_one_line_of_its_own(kind: type[QMeshError]) -> None:
    remedy = kind("what happened").remedy
    assert re.fullmatch(r"[A-Z`][^\n]+[^ ]\.", remedy)
    assert remedy == " ".join(str(kind.__doc__).split())
    assert [other for other, *_ in ERRORS if other("").remedy == remedy] == [kind]


def test_a_remedy_over_several_lines_is_shown_as_one() -> None:
    class Odd(QMeshError):
        """First
        and   second.
        """

    assert Odd("").remedy == "First and second."


@pytest.mark.parametrize("code", qmesh.ERROR_CODES)
@pytest.mark.parametrize("kind", [Refused, InvalidRequest])
def test_a_refusal_carries_its_own_code(kind: type[Refused | InvalidRequest], code: str) -> None:
    assert kind("what happened", code).code == code


# --- Ids ---

IDS = st.integers(0, 2**256 - 1).map(NodeId)


@fuzz
@given(IDS)
def test_an_id_is_the_same_after_bytes_and_after_text(node_id: NodeId) -> None:
    assert NodeId.of_bytes(bytes(node_id)) == node_id
    assert NodeId.of_hex(str(node_id)) == node_id
    assert (len(bytes(node_id)), len(str(node_id))) == (32, 64)


@fuzz
@given(IDS, IDS, IDS)
def test_distance_is_a_metric(a: NodeId, b: NodeId, c: NodeId) -> None:
    assert (a.distance(b) == 0) == (a == b)
    assert a.distance(b) == b.distance(a)
    assert a.distance(c) <= a.distance(b) + b.distance(c)


def test_ids_are_big_endian_and_in_numeric_order() -> None:
    assert bytes(NodeId(258)) == bytes(30) + b"\x01\x02"
    assert str(NodeId(258)) == "0" * 61 + "102"
    assert sorted([NodeId(9), NodeId(10), NodeId(2)]) == [NodeId(2), NodeId(9), NodeId(10)]


def test_people_see_the_first_six_digits() -> None:
    assert NodeId(0xABC123 << 232).short == "abc123"


def test_a_random_id_comes_from_the_generator_alone() -> None:
    assert NodeId.random(random.Random(7)) == NodeId.random(random.Random(7))
    assert len({NodeId.random(random.Random(seed)).short for seed in range(20)}) > 15


@pytest.mark.parametrize("number", [-1, 2**256])
def test_an_id_has_256_bits(number: int) -> None:
    with pytest.raises(ValueError, match="256 bits"):
        NodeId(number)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_an_id_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        NodeId.of_bytes(bytes(size))


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "0x" + "a" * 62, "a" * 64 + "\n"])
def test_an_id_is_64_small_hexadecimal_digits(text: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal"):
        NodeId.of_hex(text)


# --- Addresses ---


@fuzz
@given(st.ip_addresses().map(str), st.integers(0, 65535))
def test_a_written_address_is_read_as_it_was(host: str, port: int) -> None:
    assert qmesh.parse_address(qmesh.format_address((host, port)), 1) == (host, port)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert qmesh.format_address(("10.0.0.1", 80)) == "10.0.0.1:80"
    assert qmesh.format_address(("fe80::1%eth0", 80)) == "[fe80::1%eth0]:80"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)],
)
def test_loopback_is_told_from_the_network(host: str, expected: bool) -> None:
    assert qmesh.is_loopback(host) is expected


# --- Values that are made in the program ---

RECORD = WorkerRecord(
    NodeId(1),
    ("10.0.0.1", 47475),
    stamp=7,
    score=80,
    state=HealthState.BUSY,
    free_slots=2,
    model="m",
    fingerprint=b"8" * 8,
)


@pytest.mark.parametrize(
    "change",
    [
        {"score": 0},
        {"score": 100},
        {"free_slots": 0},
        {"free_slots": 255},
        {"stamp": 0},
        {"stamp": 2**32 - 1},
        {"address": ("fe80::1%eth0", 1)},
        {"address": ("::1", 65535)},
        {"model": ""},
        {"model": "é" * (qmesh.MODEL_NAME_BYTES // 2)},
    ],
)
def test_a_record_at_its_limits_is_made(change: dict[str, Any]) -> None:
    record = dataclasses.replace(RECORD, **change)
    assert [getattr(record, name) for name in change] == list(change.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": -1}, "figures"),
        ({"score": 101}, "figures"),
        ({"free_slots": -1}, "figures"),
        ({"free_slots": 256}, "figures"),
        ({"stamp": -1}, "figures"),
        ({"stamp": 2**32}, "figures"),
        ({"address": ("host", 1)}, "address"),
        ({"address": ("", 1)}, "address"),
        ({"address": ("10.0.0.1", 0)}, "port"),
        ({"address": ("10.0.0.1", 65536)}, "port"),
        ({"model": "x" * 41}, "model name"),
        ({"model": "é" * 21}, "model name"),
        ({"fingerprint": b"7" * 7}, "fingerprint"),
        ({"fingerprint": b"9" * 9}, "fingerprint"),
    ],
)
def test_a_record_out_of_its_limits_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(RECORD, **change)


HEALTH = HealthReport(score=71.4, state=HealthState.HEALTHY, cpu=20.0, memory=50.5, queue=100.0)


@pytest.mark.parametrize("name", ["score", "cpu", "memory", "queue"])
@pytest.mark.parametrize("value", [-0.1, 100.1, math.nan, math.inf, -math.inf])
def test_a_health_figure_is_from_0_to_100(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(HEALTH, **{name: value})
    with pytest.raises(WireError, match=name):
        HealthReport.from_json({**HEALTH.to_json(), name: value})


def test_health_is_written_to_one_decimal() -> None:
    body = dataclasses.replace(HEALTH, score=66.666, cpu=0.04).to_json()
    assert body == {"score": 66.7, "state": "healthy", "cpu": 0.0, "memory": 50.5, "queue": 100.0}


SAMPLING = Sampling(
    max_tokens=5,
    temperature=0,
    top_p=0.5,
    top_k=1,
    min_p=0,
    repeat_penalty=1.1,
    seed=9,
    stop=("a", "b"),
    json_schema={},
)
RESUME = Resume((1, 2), "ab" * qmesh.FINGERPRINT_BYTES)
JOB = Job("r1", prompt="Hello", model="m", params=SAMPLING, resume=RESUME, timeout_s=9.5)
CHAT = Job("r2", messages=(Message("system", ""), Message("assistant", "Hello"), Message("user", "Hi 👋")))
TOKEN = Token(seq=3, tokens=(11, 12), text="é")
RESULT = Result("text", "stop", {"prompt_tokens": 5, "completion_tokens": 2}, {"queue_ms": 0.5}, "m", "ab" * 32)
EMBED_JOB = EmbedJob("r3", ("Hello", "é"), model="m", resume=RESUME, timeout_s=9.5)
EMBEDDINGS = Embeddings(
    struct.pack("<4f", 0.1, -0.2, 1e-30, math.pi), 2, {"prompt_tokens": 3}, "m", "ab" * 32, "cd" * 8
)
STATUS = {
    "health": HEALTH.to_json(),
    "slots": 4,
    "queue": {"active": 1, "waiting": 0},
    "speed": 7.5,
    "models": [{"name": "m"}],
}


@pytest.mark.parametrize("health", [HEALTH, HealthReport(0, HealthState.OVERLOADED, 100, 100, 0)])
def test_health_is_the_same_after_json(health: HealthReport) -> None:
    assert HealthReport.from_json(through_json(health.to_json())) == health


@pytest.mark.parametrize("params", [Sampling(), SAMPLING, Sampling(json_schema={"type": "object"})])
def test_sampling_is_the_same_after_json(params: Sampling) -> None:
    assert Sampling.from_json(through_json(params.to_json())) == params


@pytest.mark.parametrize("job", [JOB, CHAT, Job("r", prompt="x"), Job("x" * 64, prompt="x")])
def test_a_job_is_the_same_after_json(job: Job) -> None:
    body = through_json(job.to_json())
    assert body["type"] == "prompt"
    assert Job.from_json(body) == job


@pytest.mark.parametrize("job", [EMBED_JOB, EmbedJob("r", ("x",))])
def test_a_request_for_embeddings_is_the_same_after_json(job: EmbedJob) -> None:
    body = through_json(job.to_json())
    assert body["type"] == "embed"
    assert EmbedJob.from_json(body) == job


def test_embeddings_are_the_same_after_json_bit_by_bit() -> None:
    body = through_json(EMBEDDINGS.to_json("r1"))
    assert (body["type"], body["request_id"]) == ("embedding_result", "r1")
    assert Embeddings.from_json(body) == EMBEDDINGS
    assert len(EMBEDDINGS) == 2
    assert EMBEDDINGS.vectors == [pytest.approx([0.1, -0.2]), pytest.approx([1e-30, math.pi])]


@pytest.mark.parametrize("token", [TOKEN, Token(0, (), "")])
def test_a_token_is_the_same_after_json(token: Token) -> None:
    body = through_json(token.to_json("r1"))
    assert (body["type"], body["request_id"]) == ("inference_token", "r1")
    assert Token.from_json(body) == token


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_result_is_the_same_after_json(reason: str) -> None:
    result = dataclasses.replace(RESULT, finish_reason=reason)
    body = through_json(result.to_json("r1"))
    assert (body["type"], body["request_id"]) == ("inference_result", "r1")
    assert Result.from_json(body) == result


@pytest.mark.parametrize(
    "value", [HEALTH, RECORD, SAMPLING, JOB, EMBED_JOB, TOKEN, RESULT, EMBEDDINGS, Message("user", "x")]
)
def test_a_value_is_frozen_and_slotted(value: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
    assert not hasattr(value, "__dict__")


# --- Values that come from outside ---


def test_a_job_may_leave_out_all_but_its_id_and_its_prompt() -> None:
    assert Job.from_json({"type": "prompt", "request_id": "r", "prompt": "x"}) == Job("r", prompt="x")


def test_a_parameter_that_is_null_has_its_default() -> None:
    assert Sampling.from_json(dict.fromkeys(SAMPLING.to_json())) == Sampling()


def test_one_stop_text_is_a_list_of_one() -> None:
    assert Sampling.from_json({"stop": "END"}).stop == ("END",)


def test_fields_of_a_later_version_are_let_be() -> None:
    assert Job.from_json({**JOB.to_json(), "colour": "red"}) == JOB
    assert Token.from_json({**TOKEN.to_json("r"), "colour": "red"}) == TOKEN
    assert Result.from_json({**RESULT.to_json("r"), "colour": "red"}) == RESULT
    assert HealthReport.from_json({**HEALTH.to_json(), "colour": "red"}) == HEALTH


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1},
        {"max_tokens": 1_000_000},
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 0},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 1_000_000},
        {"min_p": 0},
        {"min_p": 1},
        {"repeat_penalty": 0.01},
        {"repeat_penalty": 100},
        {"seed": 0},
        {"seed": 2**32 - 2},
        {"stop": []},
        {"stop": ["x" * 256] * 16},
        {"json_schema": {}},
    ],
)
def test_a_parameter_at_its_limit_is_taken(params: dict[str, Any]) -> None:
    body = Sampling.from_json(params).to_json()
    assert Sampling.from_json(body) == Sampling.from_json(params)
    assert body == {name: value for name, value in params.items() if value != []}


def test_a_parameter_that_has_its_default_is_not_sent_and_every_other_is() -> None:
    assert Sampling().to_json() == {}
    assert SAMPLING.to_json().keys() == qmesh.PARAMETERS.keys()


def test_what_is_wrong_is_tried_of_every_parameter() -> None:
    assert BAD_PARAMS.keys() - {"best_of"} == qmesh.PARAMETERS.keys()


BAD_WHOLE: list[Any] = [1.5, "1", True, [], {}, 10**30]
BAD_NUMBERS: list[Any] = ["1", True, [], {}, math.nan, math.inf, -math.inf, 10**400]
BAD_TEXTS: list[Any] = [None, 1, True, [], {}, "\ud800"]

BAD_PARAMS: dict[str, list[Any]] = {
    "max_tokens": [*BAD_WHOLE, 0, -1, 1_000_001],
    "temperature": [*BAD_NUMBERS, -0.1, 100.1],
    "top_p": [*BAD_NUMBERS, -0.1, 1.1],
    "top_k": [*BAD_WHOLE, -1, 1_000_001],
    "min_p": [*BAD_NUMBERS, -0.1, 1.1],
    "repeat_penalty": [*BAD_NUMBERS, 0, -1, 100.1],
    "seed": [*BAD_WHOLE, -1, 2**32 - 1],
    "stop": [1, True, {}, [None], [1], ["a", []], "", [""], ["x" * 257], ["x"] * 17, "\udfff"],
    "json_schema": [1, True, "{}", []],
    "best_of": [1],
}
BAD_JOB: dict[str, list[Any]] = {
    "request_id": [*BAD_TEXTS, "", "x" * 65],
    "prompt": [*BAD_TEXTS, "", " \n"],
    "model": BAD_TEXTS,
    "params": [None, 1, "x", [], True],
    "resume": [None, 1, "x", [], True],
    "resume.fingerprint": [None, 1, [], {}],
    "resume.tokens": [None, 1, "x", {}, [None], ["1"], [1.0], [True], [[1]], [-1]],
    "timeout_s": [None, *BAD_NUMBERS, 0, -1, 86401],
    "messages": [None, 1, "x", {}, True],
}
BAD_MESSAGES: dict[str, list[Any]] = {
    "messages[1]": [None, 1, "x", []],
    "messages[1].role": [*BAD_TEXTS, "tool", "User", ""],
    "messages[1].content": BAD_TEXTS,
}
BAD_HEALTH: dict[str, list[Any]] = {
    **{name: [None, "x", [], {}, -1, 101, 10**400] for name in ("score", "cpu", "memory", "queue")},
    "state": [None, "fine", "BUSY", 1, [], {}],
}
BAD_TOKEN: dict[str, list[Any]] = {
    "seq": [None, 1.5, "1", True, [], -1],
    "tokens": [None, 1, "", "12", {}, {"1": 1}, [None], [1.5], ["1"], [True], [-1]],
    "text": BAD_TEXTS,
}
BAD_RESULT: dict[str, list[Any]] = {
    "text": BAD_TEXTS,
    "finish_reason": [*BAD_TEXTS, "because"],
    "usage": [None, 1, "x", [], {"prompt_tokens": None}, {"prompt_tokens": 1.5}, {"prompt_tokens": -1}],
    "timings": [None, 1, "x", [], {"queue_ms": None}, {"queue_ms": "1"}, {"queue_ms": math.nan}],
    "model": BAD_TEXTS,
    "worker_id": BAD_TEXTS,
}
BAD_EMBED_JOB: dict[str, list[Any]] = {
    **{name: BAD_JOB[name] for name in ("request_id", "model", "resume", "timeout_s")},
    "texts": [None, 1, "x", {}, [], ["x"] * 65],
    "texts[1]": [*BAD_TEXTS, ""],
}
BAD_EMBEDDINGS: dict[str, list[Any]] = {
    "vectors": ["", "AAAA", "!" * 16, "é" * 16, None, *(base64.b64encode(bytes(size)).decode() for size in (12, 15))],
    "dimensions": [0, -2, 3, 2.0, True, None, qmesh.MAX_DIMENSIONS + 1],
    "usage": [*BAD_RESULT["usage"], {"prompt_tokens": qmesh.MAX_TOKENS_LIMIT + 1}],
    **dict.fromkeys(("model", "worker_id", "fingerprint"), BAD_TEXTS),
}
BAD_STATUS: dict[str, list[Any]] = {
    "health": [None, 1, [], {}],
    "slots": [None, 1.5, "1", True, -1],
    "queue": [None, 1, []],
    "active": [None, -1],
    "waiting": [None, -1],
    "speed": [None, "1", math.nan, 10**400],
    "models": [None, {}],
    "model": [None, 1],
    "name": BAD_TEXTS,
}


def one_by_one(bad: dict[str, list[Any]]) -> pytest.MarkDecorator:
    """A test for each bad value of each field."""
    rows = [pytest.param(name, value, id=f"{name}={value!r:.24}") for name in bad for value in bad[name]]
    return pytest.mark.parametrize(("name", "value"), rows)


def refuses(error: type[QMeshError], parse: Callable[[Any], object], body: Any, name: str) -> None:
    with pytest.raises(error, match=rf"(?<![a-z]){re.escape(name)}(?![a-z])"):
        parse(body)


@one_by_one(BAD_PARAMS)
def test_a_bad_parameter_is_refused_by_name(name: str, value: Any) -> None:
    refuses(InvalidRequest, Sampling.from_json, {**SAMPLING.to_json(), name: value}, name)


@one_by_one(BAD_JOB)
def test_a_bad_field_of_a_job_is_refused_by_name(name: str, value: Any) -> None:
    field, _, inner = name.partition(".")
    refuses(InvalidRequest, Job.from_json, {**JOB.to_json(), field: {inner: value} if inner else value}, name)


@one_by_one(BAD_MESSAGES)
def test_a_bad_message_is_refused_by_its_number(name: str, value: Any) -> None:
    inner = name.partition(".")[2]
    message = {"role": "user", "content": "x", inner: value} if inner else value
    body = {**CHAT.to_json(), "messages": [{"role": "user", "content": "first"}, message]}
    refuses(InvalidRequest, Job.from_json, body, name)


@one_by_one(BAD_HEALTH)
def test_a_bad_field_of_a_health_report_is_refused_by_name(name: str, value: Any) -> None:
    refuses(WireError, HealthReport.from_json, {**HEALTH.to_json(), name: value}, name)


@one_by_one(BAD_TOKEN)
def test_a_bad_field_of_a_token_is_refused_by_name(name: str, value: Any) -> None:
    refuses(WireError, Token.from_json, {**TOKEN.to_json("r"), name: value}, name)


@one_by_one(BAD_RESULT)
def test_a_bad_field_of_a_result_is_refused_by_name(name: str, value: Any) -> None:
    refuses(WireError, Result.from_json, {**RESULT.to_json("r"), name: value}, name)


@one_by_one(BAD_EMBED_JOB)
def test_a_bad_field_of_a_request_for_embeddings_is_refused_by_name(name: str, value: Any) -> None:
    change = {"texts": ["first", value]} if name == "texts[1]" else {name: value}
    refuses(InvalidRequest, EmbedJob.from_json, {**EMBED_JOB.to_json(), **change}, name)


@one_by_one(BAD_EMBEDDINGS)
def test_embeddings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(WireError, match="embeddings that make no sense"):
        Embeddings.from_json({**EMBEDDINGS.to_json("r"), name: value})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_embeddings_are_finite(number: float) -> None:
    vectors = base64.b64encode(struct.pack("<4f", 0, 1, number, 1)).decode()
    with pytest.raises(WireError, match="vectors must hold finite numbers"):
        Embeddings.from_json({**EMBEDDINGS.to_json("r"), "vectors": vectors})


def test_a_status_that_makes_sense_is_accepted() -> None:
    qmesh.check_status(STATUS)
    qmesh.check_status({**STATUS, "models": []})


@one_by_one(BAD_STATUS)
def test_a_bad_field_of_a_status_is_refused_by_name(name: str, value: Any) -> None:
    inner: dict[str, Any] = {
        "active": {"queue": {"waiting": 0, "active": value}},
        "waiting": {"queue": {"waiting": value, "active": 0}},
        "model": {"models": [value]},
        "name": {"models": [{"name": value}]},
    }
    refuses(WireError, qmesh.check_status, {**STATUS, **inner.get(name, {name: value})}, name)


# (How it is read, a whole body, the error of a bad one).
PARSERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], type[QMeshError]]] = {
    "Sampling": (Sampling.from_json, SAMPLING.to_json(), InvalidRequest),
    "Job": (Job.from_json, JOB.to_json(), InvalidRequest),
    "Chat": (Job.from_json, CHAT.to_json(), InvalidRequest),
    "HealthReport": (HealthReport.from_json, HEALTH.to_json(), WireError),
    "Token": (Token.from_json, TOKEN.to_json("r"), WireError),
    "Result": (Result.from_json, RESULT.to_json("r"), WireError),
    "EmbedJob": (EmbedJob.from_json, EMBED_JOB.to_json(), InvalidRequest),
    "Embeddings": (Embeddings.from_json, EMBEDDINGS.to_json("r"), WireError),
}
REQUIRED = [
    *[("Job", name) for name in ("request_id", "prompt")],
    *[("HealthReport", name) for name in HEALTH.to_json()],
    *[("Token", name) for name in ("seq", "tokens", "text")],
    *[("Result", field.name) for field in dataclasses.fields(Result)],
    *[("EmbedJob", name) for name in ("request_id", "texts")],
    *[("Embeddings", name) for name in ("vectors", "dimensions", "usage", "model", "worker_id", "fingerprint")],
]


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_a_missing_field_is_named(kind: str, name: str) -> None:
    parse, body, error = PARSERS[kind]
    refuses(error, parse, {key: value for key, value in body.items() if key != name}, name)


@pytest.mark.parametrize("body", [None, 1, 1.5, True, "text", []])
@pytest.mark.parametrize("kind", ["Sampling", "HealthReport"])
def test_what_is_no_object_is_refused(kind: str, body: Any) -> None:
    parse, _, error = PARSERS[kind]
    with pytest.raises(error):
        parse(body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "not both"),
        ({"messages": [{"role": "user", "content": " "}], "prompt": ...}, "last message has no text"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025, "prompt": ...}, "at most 1024 messages"),
        ({"messages": [], "prompt": ...}, "either messages or prompt"),
    ],
)
def test_a_job_asks_for_one_thing_of_a_sane_size(change: dict[str, Any], words: str) -> None:
    body = {name: value for name, value in {**JOB.to_json(), **change}.items() if value is not ...}
    with pytest.raises(InvalidRequest, match=words):
        Job.from_json(body)


@pytest.mark.parametrize("seconds", [0.001, 86400.0])
def test_a_client_may_be_in_a_hurry_or_have_a_day(seconds: float) -> None:
    assert Job.from_json({**JOB.to_json(), "timeout_s": seconds}).timeout_s == seconds


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ((), "texts must be 1 to 64, not 0"),
        (("a",) * 65, "texts must be 1 to 64, not 65"),
        (("a", ""), r"texts\[1\] is empty"),
        (("a" * 262_144,) * 2 + ("b",), "at most 524,288 characters of texts fit one request, not 524,289"),
    ],
)
def test_a_request_for_embeddings_has_a_sane_size(texts: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        EmbedJob("r", texts)


def test_a_piece_of_an_answer_has_no_more_text_than_its_tokens_can_say() -> None:
    most = qmesh.MAX_STOP_CHARS + 2 * qmesh.MAX_TOKEN_CHARS
    assert Token.from_json({**TOKEN.to_json("r"), "text": "x" * most}).text == "x" * most
    with pytest.raises(WireError, match="2,305 characters in 2 tokens"):
        Token.from_json({**TOKEN.to_json("r"), "text": "x" * (most + 1)})


@pytest.mark.parametrize(
    ("address", "distance"),
    [
        ("127.0.0.9", 0),
        ("::1", 0),
        ("fe80::1", 1),
        ("febf::1%eth0", 1),
        ("fec0::1", 2),
        ("2001:db8::1", 2),
        ("10.0.0.1", 2),
    ],
)
def test_an_address_is_of_use_on_its_machine_on_its_link_or_beyond(address: str, distance: int) -> None:
    assert qmesh.reach((address, 1)) == distance


def test_a_conversation_of_1024_messages_is_taken() -> None:
    assert len(Job("r", messages=(Message("user", "x"),) * 1024).messages) == 1024


TEXTS = st.text(st.characters(), max_size=5)  # half surrogate pairs too, as JSON's \ud800 makes them
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", PARSERS)
@fuzz
@given(data=st.data())
def test_a_parser_takes_or_refuses_whatever_json_brings(kind: str, data: st.DataObject) -> None:
    parse, whole, error = PARSERS[kind]
    fields = {name: st.just(value) | ANYTHING for name, value in whole.items()}
    body = data.draw(st.fixed_dictionaries({}, optional=fields) | st.dictionaries(TEXTS, ANYTHING, max_size=3))
    try:
        value = parse(body)
    except error:
        return
    again = value.to_json(body.get("request_id")) if kind in ("Token", "Result", "Embeddings") else value.to_json()
    assert parse(again) == value or kind == "HealthReport"  # health is rounded when it is written


@pytest.mark.parametrize("kind", ["Sampling", "HealthReport"])
@fuzz
@given(body=ANYTHING)
def test_a_parser_refuses_what_is_no_object_at_all(kind: str, body: Any) -> None:
    parse, _, error = PARSERS[kind]
    try:
        parse(body)
    except error:
        return
    assert isinstance(body, dict)
