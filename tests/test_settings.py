"""Limits and settings: where settings come from, what they refuse, how addresses are read, bounds that fit together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import qmesh
from qmesh import Settings, parse_address

# Field: (flag's value, its meaning, variable, variable's value, its meaning, default).
SOURCES: dict[str, tuple[Any, Any, str, str, Any, Any]] = {
    "host": ("127.0.0.1", "127.0.0.1", "QMESH_HOST", "0:0::1", "::1", ""),
    "port": (4000, 4000, "QMESH_PORT", "0", 0, None),
    "peers": (["a:1", "[::1]:2"], ("a:1", "[::1]:2"), "QMESH_PEERS", "b, c:3 d", ("b", "c:3", "d"), ()),
    "topic": ("lab", "lab", "QMESH_TOPIC", "büro", "büro", "qmesh-inference"),
    "key": ("lab.key", "lab.key", "QMESH_KEY", "qmesh1-x", "qmesh1-x", None),
    "state_dir": ("/a", "/a", "QMESH_STATE_DIR", "/b", "/b", None),
    "timeout_s": (1.5, 1.5, "QMESH_TIMEOUT", "20", 20.0, 300.0),
    "stall_s": (4, 4.0, "QMESH_STALL_TIMEOUT", "20", 20.0, 10.0),
    "log_level": ("debug", "debug", "QMESH_LOG", "ERROR", "error", "warning"),
    "model": ("a.gguf", "a.gguf", "QMESH_MODEL", "b", "b", None),
    "gpu_layers": (0, 0, "GPU_LAYERS", "-1", -1, None),
    "http": ("8000", ("127.0.0.1", 8000), "QMESH_HTTP", "[::1]:0", ("::1", 0), ("127.0.0.1", None)),
    "metrics": ("localhost", ("127.0.0.1", 9475), "QMESH_METRICS", "0.0.0.0:1", ("0.0.0.0", 1), None),
    "api_key": ("keys.txt", "keys.txt", "QMESH_API_KEY", "sk-0123456789", "sk-0123456789", None),
}

# (Flag as it is typed, field, variable, values that neither may have).
REFUSED: list[tuple[str, str, str, list[str]]] = [
    ("--host", "host", "QMESH_HOST", ["localhost", "10.0.0", "10.0.0.256", "10.0.0.1:80", "[::1]", "::1::"]),
    ("--port", "port", "QMESH_PORT", ["-1", "65536", "x", "80.0", "0x50", "1_0", "+1", "99999"]),
    ("--peer", "peers", "QMESH_PEERS", ["a:b", "a:", ":80", "a:65536", "[a]:1", "b,:1", "a:0", "224.0.0.1", "[::]:1"]),
    ("--topic", "topic", "QMESH_TOPIC", ["x" * 256, "é" * 128, "\udcff"]),
    ("--timeout", "timeout_s", "QMESH_TIMEOUT", ["0", "-1", "nan", "inf", "x", "86401"]),
    ("--stall-timeout", "stall_s", "QMESH_STALL_TIMEOUT", ["0", "2.9", "nan", "inf", "x", "86401"]),
    ("--log-level", "log_level", "QMESH_LOG", ["loud", "10", "warn"]),
    ("--gpu-layers", "gpu_layers", "GPU_LAYERS", ["-2", "all", "1.5"]),
    ("--http", "http", "QMESH_HTTP", ["example.com", "127.0.0.1:x", "65536", ":80", "127.0.0.1:-1"]),
]
REFUSED_ONE_BY_ONE = [(*row[:3], value) for row in REFUSED for value in row[3]]


def test_every_setting_is_in_the_table() -> None:
    assert set(SOURCES) == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", SOURCES)
def test_a_flag_goes_before_the_environment(name: str) -> None:
    flag, meaning, variable, other, _, _ = SOURCES[name]
    assert getattr(Settings.resolve({name: flag}, {variable: other}), name) == meaning


@pytest.mark.parametrize("name", SOURCES)
def test_the_environment_goes_before_the_default(name: str) -> None:
    _, _, variable, value, meaning, _ = SOURCES[name]
    assert getattr(Settings.resolve({name: None}, {variable: f" {value} "}), name) == meaning


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_variable_leaves_the_default(name: str, blank: str) -> None:
    _, _, variable, _, _, default = SOURCES[name]
    if name in ("key", "api_key"):  # what was to close the mesh, or a gateway, must not leave it open without a word
        with pytest.raises(ValueError, match=f"{variable}: it is empty"):
            Settings.resolve({}, {variable: blank})
    else:
        assert getattr(Settings.resolve({}, {variable: blank}), name) == default


@pytest.mark.parametrize("name", SOURCES)
def test_a_variable_sets_one_setting_and_leaves_the_others(name: str) -> None:
    _, _, variable, value, meaning, _ = SOURCES[name]
    assert Settings.resolve({}, {variable: value}) == dataclasses.replace(Settings(), **{name: meaning})


def test_nothing_said_means_the_defaults() -> None:
    defaults = {name: row[-1] for name, row in SOURCES.items()}
    assert dataclasses.asdict(Settings.resolve({}, {})) == defaults


@pytest.mark.parametrize("name", ["key", "api_key"])
@pytest.mark.parametrize("key", ["lab.key", qmesh.MeshKey(bytes(range(32))).text])
def test_no_key_stands_in_what_is_printed_of_settings(name: str, key: str) -> None:
    """Not even the path: what looks like one may be a key that was mistyped."""
    for told in (Settings.resolve({name: key}, {}), Settings.resolve({}, {f"QMESH_{name.upper()}": key})):
        assert getattr(told, name) == key
        assert key not in repr(told)
        assert "key=" not in repr(told)


def test_flags_and_variables_of_others_are_let_be() -> None:
    assert Settings.resolve({"command": "worker", "json": True}, {"HOME": "/root", "QMESH": "1"}) == Settings()


def test_a_variable_behind_a_flag_is_not_even_read() -> None:
    assert Settings.resolve({"port": 1}, {"QMESH_PORT": "nonsense"}).port == 1


@pytest.mark.parametrize(("flag", "name", "variable", "value"), REFUSED_ONE_BY_ONE)
def test_a_bad_value_names_the_flag_it_came_with(flag: str, name: str, variable: str, value: str) -> None:
    given = value.split(",") if name == "peers" else value
    with pytest.raises(ValueError, match=f"^{flag}: "):
        Settings.resolve({name: given}, {})


@pytest.mark.parametrize(("flag", "name", "variable", "value"), REFUSED_ONE_BY_ONE)
def test_a_bad_value_names_the_variable_it_came_from(flag: str, name: str, variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{variable}: "):
        Settings.resolve({}, {variable: value})


def test_an_empty_topic_is_refused() -> None:
    with pytest.raises(ValueError, match="--topic"):
        Settings.resolve({"topic": ""}, {})


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("port", "65535", 65535),
        ("topic", "x" * 255, "x" * 255),
        ("timeout_s", "0.001", 0.001),
        ("timeout_s", "86400", 86400.0),
        ("gpu_layers", "999", 999),
        ("host", "fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_a_value_at_its_limit_is_taken(name: str, value: str, meaning: object) -> None:
    assert getattr(Settings.resolve({name: value}, {}), name) == meaning


@pytest.mark.parametrize("level", qmesh.LOG_LEVELS)
def test_every_log_level_may_be_written_large(level: str) -> None:
    assert Settings.resolve({"log_level": level.upper()}, {}).log_level == level


def test_settings_never_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", ("host", 9)),
        ("host:80", ("host", 80)),
        ("host.lan:0", ("host.lan", 0)),
        ("host:65535", ("host", 65535)),
        (" host:80 ", ("host", 80)),
        ("10.0.0.1", ("10.0.0.1", 9)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("::1", ("::1", 9)),
        ("::", ("::", 9)),
        ("fe80::1", ("fe80::1", 9)),
        ("2001:db8::7:80", ("2001:db8::7:80", 9)),
        ("1:2:3:4:5:6:7:8", ("1:2:3:4:5:6:7:8", 9)),
        ("fe80::1%eth0", ("fe80::1%eth0", 9)),
        ("[::1]", ("::1", 9)),
        ("[::1]:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_an_address_is_split_into_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 9) == address


@pytest.mark.parametrize("host", ["1.2.3.4", "127.0.0.1", "223.255.255.255", "::1", "fe80::1%eth0", "2001:db8::ff02"])
def test_an_address_that_may_be_one_machines_is_known_for_it(host: str) -> None:
    assert qmesh.is_one_machines(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "::ffff:10.0.0.1", "ff02::1"])
def test_an_address_of_nobody_or_of_many_is_no_single_machines(host: str) -> None:
    assert not qmesh.is_one_machines(host)


@pytest.mark.parametrize("model", ["", " "])
def test_a_model_without_a_name_is_refused_where_it_is_a_flag(model: str) -> None:
    with pytest.raises(ValueError, match=r"^--model: the name or the path of a model is needed"):
        Settings.resolve({"model": model}, {})


NO_HOST_OR_PORT = ["", " ", ":", ":80", "host:", "host:x", "host:-1", "host:65536", "host:8 0", "a:b:c"]
BAD_BRACKETS = ["[", "]", "[]", "[]:80", "[host", "host]", "[host]", "[host]:80", "[::1", "::1]", "[::1]80", "[[::1]]"]
BAD_IPV6 = ["[::1]:", "[::1]:x", "[::1]:65536", "1::2::3", "::1%", "12345::"]


@pytest.mark.parametrize("text", NO_HOST_OR_PORT + BAD_BRACKETS + BAD_IPV6)
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is needed, not|a port is a number"):
        parse_address(text, 9)


# Bounds whose reasons name one another: (less, more, why).
ORDERED = [
    (qmesh.MIN_REQUEST_TIMEOUT_S, qmesh.REQUEST_TIMEOUT_S, "the first timeout is not under the least"),
    (qmesh.REQUEST_TIMEOUT_S, qmesh.MAX_REQUEST_TIMEOUT_S, "the first timeout is not over the greatest"),
    (qmesh.MAX_REQUEST_TIMEOUT_S, qmesh.LOOKUP_DEADLINE_S, "one silent peer does not cost a whole lookup"),
    (qmesh.LOOKUP_CONCURRENCY, qmesh.MAX_TRANSACTIONS, "a lookup has room among the transactions"),
    (3 * qmesh.ANNOUNCE_PERIOD_S * (1 + qmesh.ANNOUNCE_JITTER), qmesh.RECORD_TTL_S, "a lost announcement is no death"),
    (qmesh.ANNOUNCE_PERIOD_S * (1 + qmesh.ANNOUNCE_JITTER), qmesh.SLEEP_GAP_S, "being late is not being asleep"),
    (qmesh.BEACON_PERIOD_S, qmesh.SLEEP_GAP_S, "waiting for a beacon's time is not being asleep"),
    (qmesh.MAX_RECORD_BYTES * 8, qmesh.MAX_DATAGRAM_BYTES * 3 // 4, "eight records fit a datagram in base64"),
    (qmesh.SMALL_REQUEST_BYTES, qmesh.MAX_DATAGRAM_BYTES, "padding fits a datagram"),
    (qmesh.MAX_HELLO_BYTES, qmesh.MAX_FRAME_BYTES, "a stranger gets less memory than a member"),
    (qmesh.MAX_CONNECTIONS_PER_HOST, qmesh.MAX_CONNECTIONS, "one host cannot take every connection"),
    (qmesh.MAX_RECORDS_PER_HOST, qmesh.MAX_RECORDS, "one host cannot take every record"),
    (qmesh.OVERLOADED_BELOW + qmesh.HYSTERESIS, qmesh.HEALTHY_ABOVE, "busy is a state one can be in"),
    (qmesh.RETRY_FIRST_S, qmesh.RETRY_MAX_S, "waits grow"),
    (qmesh.DEFAULT_TIMEOUT_S, qmesh.MAX_TIMEOUT_S, "the default is allowed"),
    (1, qmesh.QUEUE_PER_SLOT, "the queue holds what runs, and more"),
    (qmesh.QUEUE_PER_SLOT * qmesh.MAX_SLOTS, qmesh.MAX_QUEUE, "the default is allowed"),
    (qmesh.MIN_CHUNK_TOKENS, qmesh.FIRST_CHUNK_TOKENS, "the first chunk is one"),
    (qmesh.FIRST_CHUNK_TOKENS, qmesh.MAX_CHUNK_TOKENS, "the first chunk is one"),
    (qmesh.SHARED_STEP_S, qmesh.STEP_S, "who is read along with waits less than who is alone"),
    (qmesh.DEFAULT_SLOTS, qmesh.MAX_SLOTS, "the default is allowed"),
    (qmesh.MIN_CONTEXT, qmesh.DEFAULT_CONTEXT, "the default is allowed"),
    (qmesh.DEFAULT_MAX_TOKENS, qmesh.MAX_TOKENS_LIMIT, "the default is allowed"),
]


@pytest.mark.parametrize(("less", "more", "why"), ORDERED)
def test_a_bound_stays_on_its_side_of_another(less: float, more: float, why: str) -> None:
    assert less < more, why
