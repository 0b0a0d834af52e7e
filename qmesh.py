#!/usr/bin/env python3
"""QMesh: one LLM service out of the idle machines of a lab, an office or a home.

Run `python qmesh.py worker` on some machines and `python qmesh.py prompt "..."` on any of them. There is
no server, no account and no internet: the machines find each other through a distributed hash table (DHT)
over UDP, talk in length-prefixed JSON over TCP, and a worker answers from a GGUF model through llama.cpp.

The module reads from top to bottom. A section uses only what stands above it, and sections 1 to 11 are pure:
they do no input or output, start no task, read no clock and draw no random number; time and randomness are
arguments. `tests/test_architecture.py` holds the module to both rules and to this map:

     1  Limits and settings    every bound with its reason; Settings
     2  Errors                 what can go wrong, in the words a user reads
     3  Values                 ids, records, health, jobs, tokens, results
     4  Wire                   datagrams and TCP frames, bytes to messages and back
     5  Mesh keys              what a mesh is called and what its members share
     6  Routing table          which nodes we know, in k-buckets
     7  Lookup                 finding the nodes closest to an id
     8  Records and tokens     which workers we vouch for, and who may tell us
     9  DHT engine             4 to 8 composed, without input or output
    10  Health and selection   samples to a score, scores to a choice
    11  Fair queue             whose request runs next
    12  This machine           state files, processor, memory, GPU
    13  Models                 GGUF headers, finding and fetching model files
    14  Engine                 the one thread that owns llama.cpp
    15  UDP shell              moves datagrams and arms one timer
    16  TCP shell              moves frames, with deadlines and limits
    17  Worker                 serves a model to the mesh
    18  Client                 finds workers, chooses one, follows its answer
    19  Command line           arguments in, text and exit codes out

The journey of one request:

    prompt -> find peers (15) -> look up the topic (7, 9) -> records with health
           -> keep those with the model that are not overloaded (10)
           -> fresh status from the best three at once (16) -> highest score
           -> `prompt` on that connection (4, 18) -> worker admits or refuses (17)
           -> queue (11) -> slot (14) -> tokens stream back -> `inference_result`
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import bisect
import codecs
import contextlib
import ctypes
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import importlib
import ipaddress
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

if TYPE_CHECKING:
    import ssl

__all__ = [
    "Client",
    "HealthReport",
    "Job",
    "MeshKeys",
    "NodeId",
    "QMeshError",
    "Result",
    "Sampling",
    "Settings",
    "Token",
    "Worker",
    "WorkerRecord",
    "main",
]

__version__ = "0.1.0"

log = logging.getLogger("qmesh")


# ======================================================================================================
# 1  Limits and settings
#
# Every bound of the program, each with the reason for its value, so that no number stands in the middle
# of code. Durations end in _S (seconds), sizes in _BYTES. Settings are made once, from flags, environment
# and defaults in that order, and never change afterwards.
# ======================================================================================================

PROTOCOL_VERSION: Final = 1
AGENT: Final = f"qmesh/{__version__}"

# --- The network ---
DEFAULT_TOPIC: Final = "qmesh-inference"
DEFAULT_PORT: Final = 47475  # preferred for UDP and TCP; a free port is taken when it is not to be had
BEACON_PORT: Final = 47474  # apart from the service port, so that every process of a machine can share it
BEACON_GROUP: Final = "239.192.77.77"  # organisation-local multicast scope (RFC 2365): never routed outside
MAX_DATAGRAM_BYTES: Final = 1200  # fits the smallest IPv6 path (1,280) with its headers: never fragmented
MAC_BYTES: Final = 16  # 128 bits cannot be guessed at the rate a network delivers guesses
TRANSACTION_BYTES: Final = 8  # long enough that an outsider cannot answer in a peer's place
SMALL_REQUEST_BYTES: Final = 320  # pings and beacons are padded to this: room for a reply with one record

# --- The DHT ---
K: Final = 20  # bucket size and number of holders (Maymounkov and Mazieres, Kademlia, 2002)
LOOKUP_CONCURRENCY: Final = 10  # in flight at once; higher than the paper's 3 because a LAN's cost is waiting
REQUEST_TIMEOUT_S: Final = 0.4  # before the first round trip is known
MIN_REQUEST_TIMEOUT_S: Final = 0.1  # a loaded laptop takes this long to be scheduled
MAX_REQUEST_TIMEOUT_S: Final = 1.0  # beyond it a peer is of no use to a lookup of 3 s
REQUEST_RETRIES: Final = 2  # three losses in a row are rare at 10 % loss: 0.7 % with replies counted
LOOKUP_DEADLINE_S: Final = 3.0  # a person waits this long without asking whether it hangs
RECORD_TTL_S: Final = 35.0  # three announcements may be lost before a living worker vanishes
ANNOUNCE_PERIOD_S: Final = 10.0  # the health in a record is never older than this
ANNOUNCE_JITTER: Final = 0.1  # share of the period, so that workers started together drift apart
ANNOUNCE_DEBOUNCE_S: Final = 0.2  # newly met nodes are told of us together, not one by one
HOLDER_SEARCH_PERIOD_S: Final = 60.0  # holders are looked up afresh this often, else told directly
TOKEN_PERIOD_S: Final = 60.0  # announce tokens' secret rotates; the last two count
REFRESH_PERIOD_S: Final = 60.0  # a node silent for this long is asked whether it still lives
SLEEP_GAP_S: Final = 15.0  # timers fire at least every 10 s; a longer gap means the machine slept
BEACON_TIMES_S: Final = (0.0, 0.25, 1.0, 2.0, 5.0)  # dense at first: a person is waiting
BEACON_PERIOD_S: Final = 10.0  # then for ever, so that meshes that started apart become one
MAX_TABLE_NODES: Final = 1024  # about 0.5 MB; a network of millions fills fewer
MAX_RECORDS: Final = 4096  # about 2 MB; far more workers than one topic will see
MAX_RECORDS_PER_HOST: Final = 64  # one machine runs a handful of workers; a flood is not one
MAX_TRANSACTIONS: Final = 512  # several lookups' worth; more is a fault of ours
MAX_UNVERIFIED: Final = 32  # newly heard senders being asked to answer, at once
RATE_BURST: Final = 400.0  # datagrams an address may send at once: a lookup and its retries, with room
RATE_PER_S: Final = 100.0  # and then per second
MAX_RATED_ADDRESSES: Final = 4096  # the oldest is forgotten first
MODEL_NAME_BYTES: Final = 40  # keeps a record within 100 bytes, so that eight fit a reply
MAX_RECORD_BYTES: Final = 100
MAX_REMEMBERED_PEERS: Final = 64  # enough that some are still there tomorrow

# --- TCP ---
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024  # a long prompt with its history, several times over
MAX_HELLO_BYTES: Final = 4 * 1024  # before `welcome` nobody is owed more memory than a greeting
HANDSHAKE_TIMEOUT_S: Final = 5.0  # connect, greet and be greeted; a slow link does it in one
CONNECT_TIMEOUT_S: Final = 3.0  # a machine that is switched off does not refuse, it is silent
STATUS_TIMEOUT_S: Final = 2.0  # a worker that cannot tell its health by then is not healthy
SEND_TIMEOUT_S: Final = 30.0  # a reader that takes nothing for this long has gone
IDLE_TIMEOUT_S: Final = 120.0  # a connection with nothing in flight is closed after this
MAX_CONNECTIONS: Final = 1024  # below the usual limit on open files
MAX_CONNECTIONS_PER_HOST: Final = 64  # a classroom behind one address still fits
MAX_REQUESTS_PER_CONNECTION: Final = 64  # more wait on the client's side
READ_BYTES: Final = 64 * 1024
MAX_ID_CHARS: Final = 64  # request and session ids: a UUID or a hash in hexadecimal

# --- Requests ---
DEFAULT_TIMEOUT_S: Final = 300.0  # a small machine writes a page in that time
MAX_TIMEOUT_S: Final = 24 * 3600.0
DISCOVERY_TIMEOUT_S: Final = 5.0  # beacons at 0, 0.25, 1 and 2 s and a lookup after the last of them
DISCOVERY_GATHER_S: Final = 0.12  # after the first worker, others on the LAN are waited for this long
MAX_MESSAGES: Final = 1024  # turns of one conversation
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_TOKENS_LIMIT: Final = 1_000_000  # the context binds first; this keeps arithmetic sane
DEFAULT_MAX_TOKENS: Final = 512
STATUS_CANDIDATES: Final = 3  # asked for fresh status before a choice (more adds cost, not quality)
SCORE_TIE: Final = 2.0  # points; a one-second sample is not more exact, so closer scores are ties
RETRY_FIRST_S: Final = 0.25  # when all refuse: wait this long, doubling, with jitter
RETRY_MAX_S: Final = 4.0

# --- Health ---
HEALTHY_ABOVE: Final = 60.0
OVERLOADED_BELOW: Final = 20.0
HYSTERESIS: Final = 3.0  # points a score must clear a threshold by to be called better again
SAMPLE_PERIOD_S: Final = 1.0
SAMPLE_WINDOW: Final = 5  # samples averaged: long enough to pass over a spike, short enough to react

# --- The worker ---
DEFAULT_QUEUE: Final = 16  # requests running and waiting; a person at the end of it waits minutes
MAX_QUEUE: Final = 4096
DEFAULT_SLOTS: Final = 4  # requests that run at once
MAX_SLOTS: Final = 64
DEFAULT_CONTEXT: Final = 4096  # tokens per slot, when the model and the memory allow
MIN_CONTEXT: Final = 256
PROMPT_CHUNK_TOKENS: Final = 256  # of prompt in one step: bounds the gap in other streams
MEMORY_RESERVE: Final = 0.1  # share of the free memory that loading a model leaves alone
SHUTDOWN_GRACE_S: Final = 5.0  # running answers are cut off after this when a worker is told to stop
DEFAULT_NICE: Final = 10  # whoever sits at the machine goes first

# --- Models ---
MAX_GGUF_METADATA_BYTES: Final = 256 * 1024 * 1024  # the largest vocabularies take some 20 MB
MAX_GGUF_ITEMS: Final = 16 * 1024 * 1024  # array elements; the largest vocabularies have under one million
FINGERPRINT_SAMPLES: Final = 16  # places of the tensor data that enter a model's fingerprint
FINGERPRINT_SAMPLE_BYTES: Final = 64 * 1024
FINGERPRINT_BYTES: Final = 8  # tells a lab's models apart; it is not a defence against forgery
DOWNLOAD_TIMEOUT_S: Final = 60.0  # without a byte
DOWNLOAD_CHUNK_BYTES: Final = 1024 * 1024

LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process was told: flags first, then environment, then defaults (see `Settings.resolve`).

    host: address to bind and to beacon on; "" means every interface. port: 0 takes a free one.
    peers: "HOST", "HOST:PORT" or "[IPV6]:PORT". state_dir: None means the platform's own place.
    """

    host: str = ""
    port: int = DEFAULT_PORT
    peers: tuple[str, ...] = ()
    topic: str = DEFAULT_TOPIC
    state_dir: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    log_level: str = "warning"
    model: str | None = None
    gpu_layers: int | None = None

    @classmethod
    def resolve(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
        """Combine command-line flags (absent or None when not given) with the environment.

        Raises ValueError, naming the flag or variable, when a value cannot be used.
        """
        chosen: dict[str, Any] = {}
        for name, (variable, parse) in _SETTING_SOURCES.items():
            flag = flags.get(name)
            if flag is not None:
                chosen[name] = _parse_setting(f"--{name.replace('_', '-')}", parse, flag)
            elif environ.get(variable, "").strip():
                chosen[name] = _parse_setting(variable, parse, environ[variable].strip())
        return cls(**chosen)


def _parse_setting(source: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _parse_port(value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def _parse_host(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(str(value)))
    except ValueError:
        raise ValueError(f"an IP address of this machine is needed, not {value!r}") from None


def _parse_peers(value: Any) -> tuple[str, ...]:
    names = value.replace(",", " ").split() if isinstance(value, str) else list(value)
    for name in names:
        parse_address(name, DEFAULT_PORT)
    return tuple(names)


def _parse_topic(value: Any) -> str:
    text = str(value)
    if not text or len(text.encode("utf-8", "replace")) > 255:
        raise ValueError("a topic has 1 to 255 bytes")
    return text


def _parse_timeout(value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"a number of seconds is needed, not {value!r}") from None
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"more than 0 and at most {MAX_TIMEOUT_S:g} seconds, not {value!r}")
    return seconds


def _parse_log_level(value: Any) -> str:
    if str(value).lower() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}, not {value!r}")
    return str(value).lower()


def _parse_gpu_layers(value: Any) -> int:
    try:
        layers = int(value)
    except ValueError:
        raise ValueError(f"a number of layers is needed (-1 all, 0 none), not {value!r}") from None
    if layers < -1:
        raise ValueError(f"-1 (all), 0 (none) or a number of layers, not {layers}")
    return layers


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Split "HOST", "HOST:PORT", "IPV6" or "[IPV6]:PORT"; the host is not resolved. Raises ValueError."""
    match = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?|([^:]+)(?::(.*))?", text.strip())
    if match:
        host, port = match[1] or match[3], match[2] if match[1] else match[4]
    elif text.count(":") > 1:
        host, port = text.strip(), None
    else:
        raise ValueError(f"HOST or HOST:PORT is needed, not {text!r}")
    if match is None or match[1]:
        _parse_host(host)
    return host, default_port if port is None else _parse_port(port)


_SETTING_SOURCES: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "host": ("QMESH_HOST", _parse_host),
    "port": ("QMESH_PORT", _parse_port),
    "peers": ("QMESH_PEERS", _parse_peers),
    "topic": ("QMESH_TOPIC", _parse_topic),
    "state_dir": ("QMESH_STATE_DIR", str),
    "timeout_s": ("QMESH_TIMEOUT", _parse_timeout),
    "log_level": ("QMESH_LOG", _parse_log_level),
    "model": ("QMESH_MODEL", str),
    "gpu_layers": ("GPU_LAYERS", _parse_gpu_layers),
}


# ======================================================================================================
# 2  Errors
#
#     QMeshError
#      +- UsageError        exit 2      +- ModelError
#      +- NoWorkerFound     exit 3      +- InvalidRequest
#      +- Refused           exit 4      +- WorkerLost
#      +- ModelNotFound     exit 5      +- DeadlineExceeded
#                                       +- WireError
#
# Rule 1: a message says what happened; the class's docstring says what to do about it, and both are shown.
# Rule 2: `code` is what crosses the wire; `retryable` says whether another worker, or a later try, may help.
# ======================================================================================================


class QMeshError(Exception):
    """Run the command again with --log-level debug to see what led to it."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def remedy(self) -> str:
        """What the user can do, in one line: the class's docstring."""
        return " ".join((type(self).__doc__ or "").split())


class UsageError(QMeshError):
    """See `qmesh.py --help`, or `qmesh.py COMMAND --help`, for what is accepted."""

    exit_code = 2


class NoWorkerFound(QMeshError):
    """Start one with `python qmesh.py worker`, or name a machine that runs one with --peer HOST."""

    exit_code = 3
    retryable = True


class Refused(QMeshError):
    """Every worker is at its limit: try again later, allow more time with --timeout, or add a worker."""

    code = "overloaded"
    exit_code = 4
    retryable = True

    def __init__(self, message: str, code: str = "overloaded") -> None:
        super().__init__(message)
        self.reason = code


class ModelNotFound(QMeshError):
    """Name one of those that exist, or leave --model away to take any."""

    code = "model_not_found"
    exit_code = 5


class ModelError(QMeshError):
    """`python qmesh.py models` lists the models here; `python qmesh.py pull` fetches a small one."""


class InvalidRequest(QMeshError):
    """The request itself has to change: no worker can answer it as it is."""

    code = "invalid_request"

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.reason = code


class WorkerLost(QMeshError):
    """The worker, or the network to it, went away: send the request again."""

    retryable = True


class DeadlineExceeded(QMeshError):
    """Allow more time with --timeout, or ask for fewer tokens with --max-tokens."""

    code = "timeout"


class WireError(QMeshError):
    """The other side does not speak this version of QMesh: use the same file on both machines."""


def error_code(error: QMeshError) -> str:
    """The code that crosses the wire for this error: one of those in section 4's `ERROR_CODES`."""
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, str) else error.code


# ======================================================================================================
# 3  Values
#
# Frozen, slotted, and validated once, where they are made: code that holds one need not doubt it.
# JSON from outside becomes a value here and nowhere else; what does not fit raises InvalidRequest (for
# what a client asked) or WireError (for what a peer sent), naming the field.
# ======================================================================================================

Address = tuple[str, int]
"""(IP address, port). IPv6 link-local addresses carry their scope: ("fe80::1%eth0", 47475)."""

Json = dict[str, Any]

ID_BYTES: Final = 32
ID_BITS: Final = ID_BYTES * 8


@dataclass(frozen=True, slots=True, order=True)
class NodeId:
    """A point of the DHT's 256-bit space: a node's id, or a topic's. Distance is XOR."""

    number: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < 1 << ID_BITS:
            raise ValueError("a node id has 256 bits")

    @classmethod
    def from_bytes(cls, data: bytes) -> NodeId:
        if len(data) != ID_BYTES:
            raise ValueError(f"a node id has {ID_BYTES} bytes, not {len(data)}")
        return cls(int.from_bytes(data, "big"))

    @classmethod
    def from_hex(cls, text: str) -> NodeId:
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise ValueError("a node id is written as 64 hexadecimal digits")
        return cls(int(text, 16))

    @classmethod
    def random(cls, rng: random.Random) -> NodeId:
        return cls(rng.getrandbits(ID_BITS))

    def distance(self, other: NodeId) -> int:
        return self.number ^ other.number

    def __bytes__(self) -> bytes:
        return self.number.to_bytes(ID_BYTES, "big")

    def __str__(self) -> str:
        return f"{self.number:064x}"

    @property
    def short(self) -> str:
        """The first six digits, as people see it."""
        return str(self)[:6]


@dataclass(frozen=True, slots=True)
class Contact:
    """A DHT node and the UDP address at which it can be asked."""

    node_id: NodeId
    address: Address


class HealthState(enum.Enum):
    """What a score means: over 60 accept, 20 to 60 accept but slower, under 20 refuse."""

    HEALTHY = "healthy"
    BUSY = "busy"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class HealthReport:
    """A worker's condition; all figures but `state` are 0 to 100. cpu and memory are in use, queue is free."""

    score: float
    state: HealthState
    cpu: float
    memory: float
    queue: float

    def __post_init__(self) -> None:
        for name in ("score", "cpu", "memory", "queue"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} is a number from 0 to 100")

    def to_json(self) -> Json:
        figures = {name: round(getattr(self, name), 1) for name in ("score", "cpu", "memory", "queue")}
        return {**figures, "state": self.state.value}

    @classmethod
    def from_json(cls, body: Any) -> HealthReport:
        try:
            figures = {name: float(body[name]) for name in ("score", "cpu", "memory", "queue")}
            return cls(state=HealthState(body["state"]), **figures)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WireError(f"a health report that makes no sense ({error!r})") from None


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What the DHT says of a worker: where it answers over TCP, how it does, what it serves.

    stamp: grows with each announcement (seconds of the worker's clock); of two records the later counts.
    model: its name cut to MODEL_NAME_BYTES of UTF-8. fingerprint: FINGERPRINT_BYTES of the file's hash.
    """

    worker_id: NodeId
    address: Address
    stamp: int
    score: int
    state: HealthState
    free_slots: int
    model: str
    fingerprint: bytes

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.address[0])
        if not (0 <= self.score <= 100 and 0 <= self.free_slots <= 255 and 0 <= self.stamp < 1 << 32):
            raise ValueError("a record's figures are out of range")
        if not 0 < self.address[1] < 65536:
            raise ValueError("a record's port is out of range")
        if len(self.fingerprint) != FINGERPRINT_BYTES or len(self.model.encode()) > MODEL_NAME_BYTES:
            raise ValueError("a record's model name or fingerprint has the wrong size")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop. temperature 0 is greedy; seed None is drawn by the worker.

    top_k 0 and min_p 0 turn those filters off; repeat_penalty 1 is none. json_schema: the text is made to
    match it; {} means any JSON.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: Json | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{name} must be from {low} to {high}, not {value}")
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in self.stop):
            raise InvalidRequest(f"stop takes up to {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARS} characters")

    def to_json(self) -> Json:
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        body["stop"] = list(self.stop)
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def from_json(cls, body: Any) -> Sampling:
        if not isinstance(body, dict):
            raise InvalidRequest("params must be an object")
        unknown = sorted(set(body) - {f.name for f in fields(cls)})
        if unknown:
            raise InvalidRequest(f"unknown parameter: {', '.join(map(str, unknown))}")
        return cls(**{name: _SAMPLING_TYPES[name](name, value) for name, value in body.items() if value is not None})


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{name} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number")
    return number


def _text(name: str, value: Any) -> str:
    """Text that UTF-8 can carry: JSON's \\ud800 alone makes a string that it cannot."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise InvalidRequest(f"{name} must be text or a list of texts")
    return tuple(_text(name, item) for item in values)


def _object(name: str, value: Any) -> Json:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object")
    return value


_SAMPLING_TYPES: Final[dict[str, Callable[[str, Any], Any]]] = {
    "max_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "min_p": _number,
    "repeat_penalty": _number,
    "seed": _integer,
    "stop": _texts,
    "json_schema": _object,
}
_SAMPLING_RANGES: Final[dict[str, tuple[float, float]]] = {
    "max_tokens": (1, MAX_TOKENS_LIMIT),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, MAX_TOKENS_LIMIT),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "seed": (0, 2**32 - 2),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request for inference, as a client makes it and a worker runs it.

    Either `messages` (a conversation, given the model's chat template) or `prompt` (text as it is).
    model: None takes what the worker has. session: conversations that share one may share a context.
    resume: ids of tokens that the client already has; the answer goes on behind them.
    timeout_s: what is left of the client's patience when the request is sent.
    """

    request_id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    model: str | None = None
    params: Sampling = field(default_factory=Sampling)
    stream: bool = True
    session: str | None = None
    resume: tuple[int, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 0 < len(self.request_id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"request_id must have 1 to {MAX_ID_CHARS} characters")
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("either messages or prompt is needed, and not both")
        if self.prompt is not None and not self.prompt.strip():
            raise InvalidRequest("the prompt is empty")
        if self.messages and not self.messages[-1].content.strip():
            raise InvalidRequest("the last message is empty")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"at most {MAX_MESSAGES} messages, not {len(self.messages)}")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequest(f"timeout_s must be more than 0 and at most {MAX_TIMEOUT_S:g}")

    def to_json(self) -> Json:
        body: Json = {"type": "prompt", "request_id": self.request_id, "params": self.params.to_json()}
        if self.prompt is not None:
            body["prompt"] = self.prompt
        else:
            body["messages"] = [{"role": m.role, "content": m.content} for m in self.messages]
        if self.resume:
            body["resume"] = {"tokens": list(self.resume)}
        optional = {"model": self.model, "session": self.session}
        body.update({name: value for name, value in optional.items() if value is not None})
        return {**body, "stream": self.stream, "timeout_s": self.timeout_s}

    @classmethod
    def from_json(cls, body: Json) -> Job:
        """Raises InvalidRequest, naming the field."""
        optional = {name: _text(name, body[name]) for name in ("prompt", "model", "session") if name in body}
        stream = body.get("stream", True)
        if not isinstance(stream, bool):
            raise InvalidRequest("stream must be true or false")
        return cls(
            request_id=_text("request_id", body.get("request_id")),
            messages=_messages(body.get("messages", [])),
            params=Sampling.from_json(body.get("params", {})),
            stream=stream,
            resume=_resume(body.get("resume", {})),
            timeout_s=_number("timeout_s", body.get("timeout_s", DEFAULT_TIMEOUT_S)),
            **optional,
        )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise InvalidRequest("messages must be a list")
    return tuple(_message(index, item) for index, item in enumerate(value))


def _message(index: int, value: Any) -> Message:
    name = f"messages[{index}]"
    body = _object(name, value)
    role = _text(f"{name}.role", body.get("role"))
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(f'{name}.role must be "system", "user" or "assistant", not {role!r}')
    return Message(role, _text(f"{name}.content", body.get("content")))


def _resume(value: Any) -> tuple[int, ...]:
    tokens = _object("resume", value).get("tokens", [])
    if not isinstance(tokens, list):
        raise InvalidRequest("resume.tokens must be a list")
    return tuple(_integer("resume.tokens", token) for token in tokens)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer: the ids of its tokens, numbered from `seq` on, and their whole characters.

    text may be shorter than the tokens say: half a character, or what may become a stop string, is held
    back until it is decided.
    """

    seq: int
    tokens: tuple[int, ...]
    text: str

    def to_json(self, request_id: str) -> Json:
        body = {"type": "inference_token", "request_id": request_id}
        return {**body, "seq": self.seq, "tokens": list(self.tokens), "text": self.text}

    @classmethod
    def from_json(cls, body: Json) -> Token:
        try:
            tokens = tuple(_integer("tokens", token) for token in body["tokens"])
            return cls(_integer("seq", body["seq"]), tokens, _text("text", body["text"]))
        except (KeyError, TypeError, InvalidRequest) as error:
            raise WireError(f"a piece of an answer that makes no sense ({error})") from None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished answer. finish_reason: "stop" (the model or a stop string ended it) or "length".

    usage: prompt_tokens, completion_tokens, cached_tokens. timings: queue_ms, prompt_ms, generate_ms.
    """

    text: str
    finish_reason: str
    usage: Mapping[str, int]
    timings: Mapping[str, float]
    model: str
    worker_id: str

    def to_json(self, request_id: str) -> Json:
        body: Json = {"type": "inference_result", "request_id": request_id}
        return {**body, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def from_json(cls, body: Json) -> Result:
        try:
            usage = {str(name): _integer("usage", value) for name, value in body["usage"].items()}
            timings = {str(name): _number("timings", value) for name, value in body["timings"].items()}
            names = ("text", "finish_reason", "model", "worker_id")
            return cls(usage=usage, timings=timings, **{name: _text(name, body[name]) for name in names})
        except (KeyError, TypeError, AttributeError, InvalidRequest) as error:
            raise WireError(f"a result that makes no sense ({error})") from None


def format_address(address: Address) -> str:
    """"10.0.0.1:47475" or "[fe80::1%eth0]:47475"."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


# ======================================================================================================
# 4  Wire
#
# Rule 1: parsers take bytes and return values or raise WireError, and nothing else escapes them.
# Rule 2: a datagram is  b"QM" | version | 16-byte MAC | compact JSON, at most 1,200 bytes. Its fields are
# listed once, in `DATAGRAMS` (which fields a type has) and `_FIELDS` (how a field is written).
# Rule 3: a TCP frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, an object with a
# "type"; the types are listed in `FRAMES`.
# ======================================================================================================

DATAGRAM_MAGIC: Final = b"QM" + bytes([PROTOCOL_VERSION])
DATAGRAM_HEADER_BYTES: Final = len(DATAGRAM_MAGIC) + MAC_BYTES
TOKEN_BYTES: Final = 8
NODES_KEPT_FREE: Final = 3  # in a reply with records, so that a lookup can go on from it
NODE_CHARS: Final = 72  # the longest packed contact (IPv6) in base64
MIN_RECORD_CHARS: Final = 72  # the shortest packed record (IPv4, no name) in base64

# Type: (fields it must have, fields it may have).
DATAGRAMS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "ping": ((), ()),
    "find_node": (("target",), ()),
    "find_workers": (("topic",), ("after",)),
    "announce": (("topic", "token", "record"), ()),
    "withdraw": (("topic", "token"), ()),
    "beacon": (("topic",), ()),
    "pong": ((), ("record",)),
    "nodes": (("nodes", "token"), ()),
    "workers": (("nodes", "records", "total", "token"), ("next",)),
    "ok": ((), ("token",)),
    "error": (("code",), ()),
}
REQUESTS: Final = frozenset({"ping", "find_node", "find_workers", "announce", "withdraw", "beacon"})
DATAGRAM_ERRORS: Final = ("token", "quota", "record")

FRAMES: Final = frozenset(
    {
        "hello",
        "welcome",
        "status",
        "status_response",
        "prompt",
        "inference_queued",
        "inference_token",
        "inference_result",
        "inference_error",
        "cancel",
    }
)
ERROR_CODES: Final = (
    "overloaded",
    "draining",
    "model_not_found",
    "context_exceeded",
    "invalid_request",
    "timeout",
    "cancelled",
    "internal",
)


@dataclass(frozen=True, slots=True)
class Datagram:
    """A UDP message. sender: None for an ephemeral client, which nobody puts into a table."""

    kind: str
    transaction: bytes
    sender: NodeId | None = None
    body: Mapping[str, Any] = field(default_factory=dict)


def parse_json(data: bytes | bytearray | memoryview) -> Json:
    """Strict JSON: an object in UTF-8, no NaN or Infinity, no key twice, nesting within reason."""
    try:
        value = json.loads(bytes(data).decode(), parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise WireError("JSON, but not an object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key stands twice")
    return body


def dump_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pack_address(address: Address) -> bytes:
    """Family (4 or 6), address, port. A link-local address loses its scope: it means another wire there."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    return bytes([ip.version]) + ip.packed + struct.pack(">H", address[1])


def _unpack_address(data: bytes, at: int) -> tuple[Address, int]:
    size = {4: 4, 6: 16}.get(data[at])
    if size is None or len(data) < at + 3 + size:
        raise WireError("an address that is cut off or of no known family")
    ip = ipaddress.ip_address(data[at + 1 : at + 1 + size])
    (port,) = struct.unpack_from(">H", data, at + 1 + size)
    if port == 0:
        raise WireError("an address with port 0")
    return (str(ip), port), at + 3 + size


def pack_contact(contact: Contact) -> bytes:
    return bytes(contact.node_id) + pack_address(contact.address)


def pack_contacts(contacts: Iterable[Contact]) -> bytes:
    return b"".join(map(pack_contact, contacts))


def unpack_contacts(data: bytes) -> tuple[Contact, ...]:
    contacts, at = [], 0
    while at < len(data):
        if len(data) < at + ID_BYTES + 1:
            raise WireError("a list of nodes that is cut off")
        node_id = NodeId.from_bytes(data[at : at + ID_BYTES])
        address, at = _unpack_address(data, at + ID_BYTES)
        contacts.append(Contact(node_id, address))
    return tuple(contacts)


_STATES: Final = tuple(HealthState)
_RECORD_FIGURES: Final = struct.Struct(f">IBBB{FINGERPRINT_BYTES}sB")


def pack_record(record: WorkerRecord) -> bytes:
    """Id, address, then stamp, score, state, free slots, fingerprint and the length of the name; the name."""
    name = record.model.encode()
    state = _STATES.index(record.state)
    figures = (record.stamp, record.score, state, record.free_slots, record.fingerprint, len(name))
    return bytes(record.worker_id) + pack_address(record.address) + _RECORD_FIGURES.pack(*figures) + name


def pack_records(records: Iterable[WorkerRecord]) -> bytes:
    return b"".join(map(pack_record, records))


def unpack_records(data: bytes) -> tuple[WorkerRecord, ...]:
    records, at = [], 0
    while at < len(data):
        record, at = _unpack_record(data, at)
        records.append(record)
    return tuple(records)


def _unpack_record(data: bytes, at: int) -> tuple[WorkerRecord, int]:
    try:
        worker_id = NodeId.from_bytes(data[at : at + ID_BYTES])
        address, at = _unpack_address(data, at + ID_BYTES)
        stamp, score, state, free_slots, fingerprint, size = _RECORD_FIGURES.unpack_from(data, at)
        at += _RECORD_FIGURES.size
        name = data[at : at + size]
        if len(name) < size:
            raise WireError("a record that lies about its size")
        record = WorkerRecord(
            worker_id, address, stamp, score, _STATES[state], free_slots, name.decode(), fingerprint
        )
    except (struct.error, ValueError, IndexError) as error:
        raise WireError(f"a record that makes no sense ({error})") from None
    return record, at + size


def _one_record(data: bytes) -> WorkerRecord:
    records = unpack_records(data)
    if len(records) != 1:
        raise WireError("one record is needed")
    return records[0]


def _decode_binary(text: Any) -> bytes:
    if not isinstance(text, str):
        raise WireError("base64 text is needed")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError("text that is not base64") from None


def _decode_id(data: bytes) -> NodeId:
    try:
        return NodeId.from_bytes(data)
    except ValueError as error:
        raise WireError(str(error)) from None


# Field: (value to bytes, bytes to value); written in base64. The two that are not binary stand below.
_BINARY_FIELDS: Final[dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]]] = {
    "target": (bytes, _decode_id),
    "topic": (bytes, _decode_id),
    "after": (bytes, _decode_id),
    "next": (bytes, _decode_id),
    "token": (bytes, bytes),
    "record": (pack_record, _one_record),
    "nodes": (pack_contacts, unpack_contacts),
    "records": (pack_records, unpack_records),
}


def _decode_field(name: str, value: Any) -> Any:
    if name in _BINARY_FIELDS:
        return _BINARY_FIELDS[name][1](_decode_binary(value))
    if name == "total" and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return value
    if name == "code" and value in DATAGRAM_ERRORS:
        return value
    raise WireError(f"a field {name} that makes no sense")


class DatagramCodec:
    """Datagrams to bytes and back, under one mesh's MAC key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, datagram: Datagram, *, pad_to: int = 0) -> bytes:
        """The bytes of a datagram, filled up to `pad_to`; more than MAX_DATAGRAM_BYTES raises WireError."""
        body: Json = {"t": datagram.kind, "x": base64.b64encode(datagram.transaction).decode()}
        if datagram.sender is not None:
            body["i"] = base64.b64encode(bytes(datagram.sender)).decode()
        for name, value in datagram.body.items():
            body[name] = self._encode_field(name, value)
        text = dump_json(body)
        missing = pad_to - DATAGRAM_HEADER_BYTES - len(text)
        if missing > 0:
            text += b" " * missing  # white space after JSON is JSON still
        data = DATAGRAM_MAGIC + self._mac(text) + text
        if len(data) > MAX_DATAGRAM_BYTES:
            raise WireError(f"a datagram of {len(data)} bytes")
        return data

    @staticmethod
    def _encode_field(name: str, value: Any) -> Any:
        if name in _BINARY_FIELDS:
            return base64.b64encode(_BINARY_FIELDS[name][0](value)).decode()
        return value

    def decode(self, data: bytes) -> Datagram:
        """Raises WireError; the MAC is judged before anything else is looked at."""
        if not DATAGRAM_HEADER_BYTES < len(data) <= MAX_DATAGRAM_BYTES:
            raise WireError("a datagram of the wrong size")
        if not data.startswith(DATAGRAM_MAGIC):
            raise WireError("a datagram of another protocol or version")
        text = data[DATAGRAM_HEADER_BYTES:]
        if not hmac.compare_digest(self._mac(text), data[len(DATAGRAM_MAGIC) : DATAGRAM_HEADER_BYTES]):
            raise WireError("a datagram of another mesh, or a damaged one")
        return self._parse(parse_json(text))

    @staticmethod
    def _parse(body: Json) -> Datagram:
        kind = body.get("t")
        if not isinstance(kind, str) or kind not in DATAGRAMS:
            raise WireError("a datagram of an unknown type")
        transaction = _decode_binary(body.get("x"))
        if len(transaction) != TRANSACTION_BYTES:
            raise WireError("a transaction id of the wrong size")
        sender = _decode_id(_decode_binary(body["i"])) if "i" in body else None
        required, optional = DATAGRAMS[kind]
        if any(name not in body for name in required):
            raise WireError(f"a {kind} that lacks a field")
        values = {name: _decode_field(name, body[name]) for name in required + optional if name in body}
        return Datagram(kind, transaction, sender, values)

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._key, DATAGRAM_MAGIC + text, "sha256")[:MAC_BYTES]


def fit_items(items: Sequence[bytes], room: int) -> int:
    """How many of `items`, from the first on, fit `room` characters of base64 when joined."""
    size = 0
    for count, item in enumerate(items):
        size += len(item)
        if (size + 2) // 3 * 4 > room:
            return count
    return len(items)


_FRAME_LENGTH: Final = struct.Struct(">I")


def encode_frame(body: Mapping[str, Any]) -> bytes:
    """The bytes of one TCP frame. Raises InvalidRequest when it is larger than the other side accepts."""
    text = dump_json(body)
    if len(text) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"a message of {len(text):,} bytes; at most {MAX_FRAME_BYTES:,} can be sent")
    return _FRAME_LENGTH.pack(len(text)) + text


class FrameReader:
    """Bytes in, messages out: `feed` what arrived, then take messages from `read` until it returns None.

    `limit` bounds one frame and may be raised once the other side is trusted. After a WireError the
    stream has no known frame border left: the connection has to be closed.
    """

    def __init__(self, limit: int = MAX_HELLO_BYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def read(self) -> Json | None:
        if len(self._buffer) < _FRAME_LENGTH.size:
            return None
        (size,) = _FRAME_LENGTH.unpack_from(self._buffer)
        if size > self.limit:
            raise WireError(f"a frame of {size:,} bytes, where at most {self.limit:,} are accepted")
        end = _FRAME_LENGTH.size + size
        if len(self._buffer) < end:
            return None
        body = parse_json(self._buffer[_FRAME_LENGTH.size : end])
        del self._buffer[:end]
        if body.get("type") not in FRAMES:
            raise WireError(f"a message of an unknown type: {str(body.get('type'))[:40]!r}")
        return body

    @property
    def pending(self) -> int:
        """Bytes of a message that has not arrived whole."""
        return len(self._buffer)


# ======================================================================================================
# 5  Mesh keys
#
# A mesh is a topic and a key. Without a key the mesh is open: the key is then derived from the topic's
# name alone, so that there is one code path. From the key, under separate labels, come the key of the
# datagrams' MAC and the key that hides the topic's name.
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class MeshKeys:
    """What the members of one mesh share. topic: where workers are announced; udp_key: of every MAC."""

    name: str
    topic: NodeId
    udp_key: bytes = field(repr=False)

    @classmethod
    def derive(cls, topic_name: str) -> MeshKeys:
        """The keys of the open mesh with this topic name."""
        secret = hashlib.sha256(b"qmesh open mesh\0" + topic_name.encode()).digest()
        topic = hmac.digest(_subkey(secret, b"topic"), topic_name.encode(), "sha256")
        return cls(topic_name, NodeId.from_bytes(topic), _subkey(secret, b"udp"))


def _subkey(secret: bytes, label: bytes) -> bytes:
    return hmac.digest(secret, b"qmesh " + label, "sha256")


# ======================================================================================================
# 6  Routing table
#
# Rule 1: a node is known only after it answered us; having heard from it is not enough.
# Rule 2: a bucket covers the ids from `low` inclusive to `high` exclusive; buckets cover all ids, without
# gap or overlap, in order. Only the bucket that holds our own id is split.
# Rule 3: a full bucket keeps the nodes it has, for the longest known are the likeliest to stay; a
# newcomer waits in the bucket's replacement cache until one of them fails twice in a row.
# ======================================================================================================

MAX_FAILURES: Final = 2  # requests (each with its retries) unanswered in a row before a node is dropped


@dataclass(slots=True)
class KnownNode:
    """A node that answered us, last at `answered`, with `failures` requests unanswered since.

    rtt: its round-trip time in seconds, smoothed; None until one was measured.
    """

    contact: Contact
    answered: float
    failures: int = 0
    rtt: float | None = None

    def measured(self, rtt: float) -> None:
        """Smooth a new round-trip time in, with the weight of RFC 6298."""
        self.rtt = rtt if self.rtt is None else self.rtt + (rtt - self.rtt) / 8


@dataclass(slots=True)
class Bucket:
    """Nodes with ids in [low, high), least recently answered first, and those waiting for a place."""

    low: int
    high: int
    nodes: OrderedDict[NodeId, KnownNode] = field(default_factory=OrderedDict)
    waiting: OrderedDict[NodeId, KnownNode] = field(default_factory=OrderedDict)

    def covers(self, node_id: NodeId) -> bool:
        return self.low <= node_id.number < self.high

    def split(self) -> tuple[Bucket, Bucket]:
        middle = (self.low + self.high) // 2
        halves = Bucket(self.low, middle), Bucket(middle, self.high)
        for source, name in ((self.nodes, "nodes"), (self.waiting, "waiting")):
            for node_id, node in source.items():
                getattr(halves[node_id.number >= middle], name)[node_id] = node
        return halves


class RoutingTable:
    """The nodes we know, most of them near our own id (Kademlia, section 2.4).

    >>> table = RoutingTable(NodeId(0), k=2)
    >>> table.answered(Contact(NodeId(9), ("127.0.0.1", 1)), now=0.0)
    True
    >>> [str(contact.node_id)[-1] for contact in table.closest(NodeId(8), 2)]
    ['9']
    """

    def __init__(self, own: NodeId, *, k: int = K, capacity: int = MAX_TABLE_NODES) -> None:
        self._own = own
        self._k = k
        self._capacity = capacity
        self._buckets = [Bucket(0, 1 << ID_BITS)]
        self._nodes: dict[NodeId, KnownNode] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._nodes

    def __iter__(self) -> Iterator[Contact]:
        return (node.contact for node in self._nodes.values())

    @property
    def buckets(self) -> Sequence[Bucket]:
        return self._buckets

    def get(self, node_id: NodeId) -> KnownNode | None:
        return self._nodes.get(node_id)

    def answered(self, contact: Contact, now: float) -> bool:
        """Note that a node answered at `now`. True when it was not in the table before, and now is."""
        if contact.node_id == self._own:
            return False
        bucket = self._bucket(contact.node_id)
        known = bucket.nodes.get(contact.node_id)
        if known is not None:
            known.contact, known.answered, known.failures = contact, now, 0
            bucket.nodes.move_to_end(contact.node_id)
            return False
        return self._insert(KnownNode(contact, now))

    def _insert(self, node: KnownNode) -> bool:
        node_id = node.contact.node_id
        bucket = self._bucket(node_id)
        while len(bucket.nodes) >= self._k and bucket.covers(self._own) and bucket.high - bucket.low > 1:
            self._buckets[self._index(node_id) : self._index(node_id) + 1] = bucket.split()
            bucket = self._bucket(node_id)
        if len(bucket.nodes) < self._k and len(self._nodes) < self._capacity:
            bucket.nodes[node_id] = self._nodes[node_id] = node
            bucket.waiting.pop(node_id, None)
            return True
        bucket.waiting.pop(node_id, None)
        bucket.waiting[node_id] = node
        if len(bucket.waiting) > self._k:
            bucket.waiting.popitem(last=False)
        return False

    def failed(self, node_id: NodeId) -> bool:
        """Note that a node left a request unanswered. True when it is dropped for it."""
        bucket = self._bucket(node_id)
        bucket.waiting.pop(node_id, None)
        node = self._nodes.get(node_id)
        if node is None:
            return False
        node.failures += 1
        if node.failures < MAX_FAILURES:
            return False
        del self._nodes[node_id], bucket.nodes[node_id]
        if bucket.waiting:
            _, successor = bucket.waiting.popitem()
            self._insert(successor)
        return True

    def wants(self, node_id: NodeId) -> bool:
        """Whether a node, should it answer, would enter the table: worth asking one that we heard from."""
        if node_id == self._own or node_id in self._nodes or len(self._nodes) >= self._capacity:
            return False
        bucket = self._bucket(node_id)
        return len(bucket.nodes) < self._k or bucket.covers(self._own)

    def closest(self, target: NodeId, count: int) -> list[Contact]:
        """The `count` known nodes closest to `target`, closest first."""
        nearest = heapq.nsmallest(count, self._nodes, key=target.distance)
        return [self._nodes[node_id].contact for node_id in nearest]

    def silent_since(self, moment: float) -> list[Contact]:
        """Nodes that have not answered since `moment`."""
        return [node.contact for node in self._nodes.values() if node.answered < moment]

    def _index(self, node_id: NodeId) -> int:
        return bisect.bisect_right(self._buckets, node_id.number, key=lambda bucket: bucket.low) - 1

    def _bucket(self, node_id: NodeId) -> Bucket:
        return self._buckets[self._index(node_id)]


# ======================================================================================================
# 7  Lookup
#
# The iterative search for the nodes closest to an id, as a machine that is told what happened and says
# whom to ask next. It never waits for a round: each answer may release the next question.
# Rule 1: at most `concurrency` questions are in flight; one that is slow gives up its place, not its hope.
# Rule 2: only nodes among the k closest that have not failed are asked.
# Rule 3: it has ended when each of these has answered or is slow, or when its deadline has passed.
# ======================================================================================================


class Asked(enum.Enum):
    """How far the lookup is with one node."""

    NOT_YET = 0
    IN_FLIGHT = 1
    SLOW = 2
    ANSWERED = 3
    FAILED = 4


class Lookup:
    """One search for the k nodes closest to `target` (Kademlia, section 2.3)."""

    def __init__(
        self, target: NodeId, *, deadline: float, k: int = K, concurrency: int = LOOKUP_CONCURRENCY
    ) -> None:
        self.target = target
        self.deadline = deadline
        self.hops = 0
        self._k = k
        self._concurrency = concurrency
        self._contacts: dict[NodeId, Contact] = {}
        self._state: dict[NodeId, Asked] = {}
        self._depth: dict[NodeId, int] = {}
        self._order: list[tuple[int, NodeId]] = []  # by distance; failed nodes are taken out

    def heard_of(self, contacts: Iterable[Contact], *, source: NodeId | None = None) -> None:
        """Add candidates; `source` is the node whose answer named them."""
        depth = self._depth[source] + 1 if source in self._depth else 1
        for contact in contacts:
            if contact.node_id not in self._contacts:
                self._contacts[contact.node_id] = contact
                self._state[contact.node_id] = Asked.NOT_YET
                self._depth[contact.node_id] = depth
                bisect.insort(self._order, (self.target.distance(contact.node_id), contact.node_id))

    def next_to_ask(self) -> list[Contact]:
        """Nodes to ask now, each counted as in flight from here on."""
        head = [node_id for _, node_id in self._order[: self._k]]
        busy = sum(self._state[node_id] is Asked.IN_FLIGHT for _, node_id in self._order)
        chosen = [node_id for node_id in head if self._state[node_id] is Asked.NOT_YET]
        chosen = chosen[: max(0, self._concurrency - busy)]
        for node_id in chosen:
            self._state[node_id] = Asked.IN_FLIGHT
        return [self._contacts[node_id] for node_id in chosen]

    def answered(self, node_id: NodeId, contacts: Iterable[Contact]) -> None:
        """A node answered, and named these."""
        if self._state.get(node_id) in (Asked.IN_FLIGHT, Asked.SLOW):
            self._state[node_id] = Asked.ANSWERED
            self.hops = max(self.hops, self._depth[node_id])
            self.heard_of(contacts, source=node_id)

    def slow(self, node_id: NodeId) -> None:
        """A node's first timeout has passed."""
        if self._state.get(node_id) is Asked.IN_FLIGHT:
            self._state[node_id] = Asked.SLOW

    def failed(self, node_id: NodeId) -> None:
        """A node did not answer at all."""
        if self._state.get(node_id) in (Asked.IN_FLIGHT, Asked.SLOW):
            self._state[node_id] = Asked.FAILED
            self._order.remove((self.target.distance(node_id), node_id))

    def ended(self, now: float) -> bool:
        if now >= self.deadline:
            return True
        return all(self._state[node_id] in (Asked.ANSWERED, Asked.SLOW) for _, node_id in self._order[: self._k])

    def closest(self) -> list[Contact]:
        """The k closest nodes that answered, closest first."""
        answered = [node_id for _, node_id in self._order if self._state[node_id] is Asked.ANSWERED]
        return [self._contacts[node_id] for node_id in answered[: self._k]]


# ======================================================================================================
# 8  Records and tokens
#
# Rule 1: a record is believed for RECORD_TTL_S after it was announced, and not a moment longer.
# Rule 2: memory is bounded: so many records in all, so many from one host.
# Rule 3: who announces must show the token that its address was given a moment ago, so that nobody can
# announce in another's place by forging the sender's address.
# ======================================================================================================


class AnnounceTokens:
    """Tokens without memory of whom they were given to: a MAC over the address and the minute."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, address: Address, now: float) -> bytes:
        return self._token(address, int(now // TOKEN_PERIOD_S))

    def valid(self, token: bytes, address: Address, now: float) -> bool:
        """Whether this address was given this token in this minute or the one before."""
        period = int(now // TOKEN_PERIOD_S)
        recent = [self._token(address, period - age) for age in (0, 1)]
        return any(hmac.compare_digest(token, known) for known in recent)

    def _token(self, address: Address, period: int) -> bytes:
        text = f"{period} {format_address(address)}".encode()
        return hmac.digest(self._secret, text, "sha256")[:TOKEN_BYTES]


class RecordStore:
    """Worker records by topic, each until it expires or is taken back."""

    def __init__(self, *, capacity: int = MAX_RECORDS, per_host: int = MAX_RECORDS_PER_HOST) -> None:
        self._capacity = capacity
        self._per_host = per_host
        self._topics: dict[NodeId, dict[NodeId, WorkerRecord]] = {}
        self._sorted: dict[NodeId, list[NodeId]] = {}
        self._expiry: OrderedDict[tuple[NodeId, NodeId], float] = OrderedDict()  # soonest first
        self._hosts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._expiry)

    def put(self, topic: NodeId, record: WorkerRecord, now: float) -> bool:
        """Keep a record for RECORD_TTL_S. False when a quota forbids it."""
        key = (topic, record.worker_id)
        known = self._topics.get(topic, {}).get(record.worker_id)
        host = record.address[0]
        if known is None and len(self._expiry) >= self._capacity:
            return False
        if (known is None or known.address[0] != host) and self._hosts[host] >= self._per_host:
            return False
        if known is None:
            bisect.insort(self._sorted.setdefault(topic, []), record.worker_id)
        else:
            self._forget_host(known.address[0])
        self._topics.setdefault(topic, {})[record.worker_id] = record
        self._hosts[host] += 1
        self._expiry[key] = now + RECORD_TTL_S
        self._expiry.move_to_end(key)
        return True

    def remove(self, topic: NodeId, worker_id: NodeId) -> bool:
        record = self._topics.get(topic, {}).pop(worker_id, None)
        if record is None:
            return False
        self._sorted[topic].remove(worker_id)
        if not self._topics[topic]:
            del self._topics[topic], self._sorted[topic]
        del self._expiry[topic, worker_id]
        self._forget_host(record.address[0])
        return True

    def _forget_host(self, host: str) -> None:
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]

    def expire(self, now: float) -> None:
        """Forget every record whose time is up."""
        while self._expiry:
            (topic, worker_id), expires = next(iter(self._expiry.items()))
            if expires > now:
                return
            self.remove(topic, worker_id)

    def next_expiry(self) -> float | None:
        return next(iter(self._expiry.values()), None)

    def get(self, topic: NodeId, worker_id: NodeId) -> WorkerRecord | None:
        return self._topics.get(topic, {}).get(worker_id)

    def total(self, topic: NodeId) -> int:
        return len(self._topics.get(topic, ()))

    def page(self, topic: NodeId, after: NodeId, count: int) -> list[WorkerRecord]:
        """Up to `count` records with ids above `after`, in order of id."""
        ids = self._sorted.get(topic, [])
        start = bisect.bisect_right(ids, after)
        return [self._topics[topic][worker_id] for worker_id in ids[start : start + count]]

    def sample(self, topic: NodeId, count: int, rng: random.Random) -> list[WorkerRecord]:
        """Up to `count` records drawn at random, so that clients do not all hear of the same few."""
        ids = self._sorted.get(topic, [])
        return [self._topics[topic][worker_id] for worker_id in rng.sample(ids, min(count, len(ids)))]


# ======================================================================================================
# 9  DHT engine
#
# One node of the DHT, without input or output (the sans-IO manner of h11 and aioquic). Five verbs:
# `receive_datagram`, `datagrams_to_send`, `get_timer`, `handle_timer`, `next_event`. What the owner wants
# done (`find_workers`, `announce`, `withdraw`, `meet`) only queues datagrams and arms the timer.
# Rule 1: bad datagrams are dropped in silence and counted, and so is what exceeds a sender's rate.
# Rule 2: no reply is larger than its request, so that nobody can be flooded through us.
# Rule 3: a record or contact on the loopback is told to nobody outside this machine.
# ======================================================================================================

BEACON: Final[Address] = ("", BEACON_PORT)
"""The destination of a beacon: the shell sends it wherever peers may listen."""

UNSPECIFIED: Final = "0.0.0.0"
"""The host of a record about its own sender: who reads it puts the datagram's source in its place."""

_REPLIES: Final[dict[str, tuple[str, ...]]] = {
    "ping": ("pong",),
    "beacon": ("pong",),
    "find_node": ("nodes",),
    "find_workers": ("workers",),
    "announce": ("ok", "error"),
    "withdraw": ("ok", "error"),
}


@dataclass(frozen=True, slots=True)
class Joined:
    """A node entered our routing table."""

    contact: Contact


@dataclass(frozen=True, slots=True)
class Found:
    """Workers that were heard of; search is None when they answered a beacon by themselves."""

    search: int | None
    records: tuple[WorkerRecord, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A search has ended: the k closest nodes, the records found, how deep and how many questions."""

    search: int
    contacts: tuple[Contact, ...]
    records: tuple[WorkerRecord, ...]
    hops: int
    requests: int


Event = Joined | Found | Finished


class RateLimiter:
    """A token bucket per sender: bursts pass, floods do not. The longest idle senders are forgotten.

    A sender is a host; on the loopback, where all processes share one, it is a socket.
    """

    def __init__(self, *, burst: float = RATE_BURST, per_s: float = RATE_PER_S) -> None:
        self._burst = burst
        self._per_s = per_s
        self._buckets: OrderedDict[Address | str, tuple[float, float]] = OrderedDict()

    def allow(self, address: Address, now: float) -> bool:
        sender = address if is_loopback(address[0]) else address[0]
        level, since = self._buckets.get(sender, (self._burst, now))
        level = min(self._burst, level + (now - since) * self._per_s)
        allowed = level >= 1
        self._buckets[sender] = (level - allowed, now)
        self._buckets.move_to_end(sender)
        if len(self._buckets) > MAX_RATED_ADDRESSES:
            self._buckets.popitem(last=False)
        return allowed


class Responder:
    """Answers requests from what a node knows: its table, its records, and its own announcement."""

    def __init__(self, *, keys: MeshKeys, table: RoutingTable, rng: random.Random) -> None:
        self.store = RecordStore()
        self.own_record: WorkerRecord | None = None
        self._topic = keys.topic
        self._table = table
        self._rng = rng
        self._tokens = AnnounceTokens(rng.randbytes(32))

    def answer(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        """The type and body of the reply. room: characters of base64 that its lists may take."""
        self.store.expire(now)
        return _ANSWERS[request.kind](self, request, address, room, now)

    def _ping(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        return "pong", {}

    def _beacon(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        wanted = self.own_record is not None and request.body["topic"] == self._topic
        return "pong", {"record": self.own_record} if wanted else {}

    def _find_node(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        nodes = self._nodes_near(request.body["target"], request, address, room)
        return "nodes", {"nodes": nodes, "token": self._tokens.issue(address, now)}

    def _find_workers(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        topic, after = request.body["topic"], request.body.get("after")
        kept = NODES_KEPT_FREE * NODE_CHARS if after is None else 0
        most = (room - kept) // MIN_RECORD_CHARS
        page = self.store.sample(topic, most, self._rng) if after is None else self.store.page(topic, after, most)
        shown = [record for record in page if _may_tell(record.address, address)]
        packed = [pack_record(record) for record in shown]
        count = fit_items(packed, room - kept)
        room -= len(base64.b64encode(b"".join(packed[:count])))
        body = {"records": shown[:count], "total": self.store.total(topic), "token": self._tokens.issue(address, now)}
        if after is not None and page:
            last = shown[count - 1].worker_id if count < len(shown) else page[-1].worker_id
            body |= {"next": last} if self.store.page(topic, last, 1) else {}
        return "workers", {**body, "nodes": self._nodes_near(topic, request, address, room)}

    def _nodes_near(self, target: NodeId, request: Datagram, address: Address, room: int) -> list[Contact]:
        near = self._table.closest(target, K + 1)
        told = [c for c in near if c.node_id != request.sender and _may_tell(c.address, address)][:K]
        return told[: fit_items([pack_contact(contact) for contact in told], room)]

    def _announce(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        record: WorkerRecord = request.body["record"]
        if not self._tokens.valid(request.body["token"], address, now):
            return "error", {"code": "token"}
        if record.worker_id != request.sender or record.address[0] != UNSPECIFIED:
            return "error", {"code": "record"}
        if not self.store.put(request.body["topic"], _located(record, address), now):
            return "error", {"code": "quota"}
        return "ok", {"token": self._tokens.issue(address, now)}

    def _withdraw(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        if not self._tokens.valid(request.body["token"], address, now):
            return "error", {"code": "token"}
        if request.sender is not None:
            self.store.remove(request.body["topic"], request.sender)
        return "ok", {}


_ANSWERS: Final = {
    "ping": Responder._ping,
    "beacon": Responder._beacon,
    "find_node": Responder._find_node,
    "find_workers": Responder._find_workers,
    "announce": Responder._announce,
    "withdraw": Responder._withdraw,
}


def _may_tell(address: Address, asker: Address) -> bool:
    """A loopback address means another machine to whoever is not on this one."""
    return not is_loopback(address[0]) or is_loopback(asker[0])


def _located(record: WorkerRecord, source: Address) -> WorkerRecord:
    """A record about its own sender, with the address it was heard from."""
    if record.address[0] != UNSPECIFIED:
        return record
    return replace(record, address=(source[0], record.address[1]))


class SearchPurpose(enum.Enum):
    """Whom a search's end concerns."""

    OWNER = "owner"  # who called find_node or find_workers hears of it by `Finished`
    HOLDERS = "holders"  # our record goes to the nodes found
    TABLE = "table"  # the answers have filled the table, and that was all


class Search:
    """A lookup under way, with what its answers brought besides nodes."""

    def __init__(
        self, number: int, lookup: Lookup, *, workers: bool, everything: bool, purpose: SearchPurpose
    ) -> None:
        self.number = number
        self.lookup = lookup
        self.workers = workers
        self.everything = everything
        self.purpose = purpose
        self.records: dict[NodeId, WorkerRecord] = {}
        self.tokens: dict[NodeId, bytes] = {}
        self.requests = 0
        self.pages_open = 0

    def question(self) -> tuple[str, Json]:
        if not self.workers:
            return "find_node", {"target": self.lookup.target}
        return "find_workers", {"topic": self.lookup.target} | ({"after": NodeId(0)} if self.everything else {})

    def learned(self, records: Iterable[WorkerRecord]) -> tuple[WorkerRecord, ...]:
        """Unite an answer's records with those known; returns the new ones and the newer ones."""
        fresh = []
        for record in records:
            known = self.records.get(record.worker_id)
            if known is None or known.stamp < record.stamp:
                self.records[record.worker_id] = record
                fresh.append(record)
        return tuple(fresh)

    def ended(self, now: float) -> bool:
        return now >= self.lookup.deadline or (self.lookup.ended(now) and not self.pages_open)


@dataclass(slots=True)
class Transaction:
    """A request that waits for its reply. node_id: who is expected there, when we know."""

    request: Datagram
    data: bytes
    address: Address
    node_id: NodeId | None
    search: Search | None
    sent_at: float
    timeout: float
    due: float
    retries_left: int

    @property
    def first_page(self) -> bool:
        return bool(self.request.body.get("after", NodeId(0)) == NodeId(0))


class DhtEngine:
    """One node of the DHT. Give it datagrams and the time; take datagrams, a timer and events from it.

    own: our id, None for an ephemeral client, which asks but is never entered into a table or asked.
    rng: the source of transaction ids and jitter; unpredictable in earnest, seeded in tests.
    `now` is any clock that does not go back, in seconds, the same in every call.
    """

    def __init__(self, *, keys: MeshKeys, own: NodeId | None, rng: random.Random, now: float) -> None:
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._keys = keys
        self._own = own
        self._rng = rng
        self._codec = DatagramCodec(keys.udp_key)
        self._limiter = RateLimiter()
        self.table = RoutingTable(own if own is not None else NodeId.random(rng))
        self._responder = Responder(keys=keys, table=self.table, rng=rng)
        self._pending: dict[bytes, Transaction] = {}
        self._searches: dict[int, Search] = {}
        self._search_count = 0
        self._out: list[tuple[bytes, Address]] = []
        self._events: deque[Event] = deque()
        self._meeting: dict[Address, None] = {}
        self._holders: dict[NodeId, tuple[Contact, bytes]] = {}
        self._announce_at = math.inf
        self._holder_search_at = -math.inf
        self._refresh_at = now + REFRESH_PERIOD_S
        self._last_tick = now
        self._start_beacons(now)

    # --- The five verbs ---

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Take in a datagram from `address`."""
        if not self._limiter.allow(address, now):
            self.dropped["rate"] += 1
            return
        try:
            datagram = self._codec.decode(data)
        except WireError:
            self.dropped["malformed"] += 1
            return
        if datagram.kind not in REQUESTS:
            self._on_reply(datagram, address, now)
        elif self._own is not None and datagram.sender != self._own:
            self._on_request(datagram, address, len(data), now)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        """What has to be sent now; `BEACON` as an address means wherever peers may listen."""
        out, self._out = self._out, []
        return out

    def get_timer(self) -> float:
        """When `handle_timer` wants to be called next."""
        times = [self._beacon_at, self._announce_at, self._refresh_at]
        times += [transaction.due for transaction in self._pending.values()]
        times += [search.lookup.deadline for search in self._searches.values()]
        return min(times)

    def handle_timer(self, now: float) -> None:
        """Do what has come due."""
        if now - self._last_tick > SLEEP_GAP_S:
            self._woke(now)
        self._last_tick = now
        for transaction in [t for t in self._pending.values() if t.due <= now]:
            self._on_timeout(transaction, now)
        if self._beacon_at <= now:
            self._send_beacon(now)
        if self._announce_at <= now:
            self._send_announcements(now)
        if self._refresh_at <= now:
            self._refresh(now)
        self._finish_searches(now)

    def next_event(self) -> Event | None:
        return self._events.popleft() if self._events else None

    # --- What the owner wants done ---

    def meet(self, addresses: Iterable[Address], now: float) -> None:
        """Ask these addresses whether a node is there, now and with every beacon until one answers."""
        for address in addresses:
            self._meeting[address] = None
            self._request("ping", {}, address, now)

    def find_workers(self, now: float, *, everything: bool = False) -> int:
        """Search for the topic's workers: a random sample of each holder's, or all of them.

        Returns the number that the `Found` and `Finished` events of this search carry.
        """
        return self._start_search(self._keys.topic, now, workers=True, everything=everything)

    def find_node(self, target: NodeId, now: float) -> int:
        """Search for the k nodes closest to `target`; its end is a `Finished` event with this number."""
        return self._start_search(target, now)

    def announce(self, record: WorkerRecord, now: float, *, at_once: bool = False) -> None:
        """Say what is told of our worker from now on; it is told every 10 s, or now when `at_once`."""
        first = self._responder.own_record is None
        self._responder.own_record = replace(record, address=(UNSPECIFIED, record.address[1]))
        self._responder.store.put(self._keys.topic, self._responder.own_record, now)
        if first or at_once:
            self._announce_at = now

    def withdraw(self, now: float) -> None:
        """Take our record back from everyone who holds it."""
        if self._responder.own_record is None or self._own is None:
            return
        self._responder.own_record = None
        self._responder.store.remove(self._keys.topic, self._own)
        self._announce_at = math.inf
        for contact, token in self._holders.values():
            body = {"topic": self._keys.topic, "token": token}
            self._request("withdraw", body, contact.address, now, contact.node_id)
        self._holders.clear()

    @property
    def settled(self) -> bool:
        """Whether no request waits for its reply, beacons apart."""
        return all(transaction.request.kind == "beacon" for transaction in self._pending.values())

    # --- Requests of others ---

    def _on_request(self, request: Datagram, address: Address, size: int, now: float) -> None:
        # The reply's fixed part is measured with empty lists, so that what is left is exact.
        widest = {"nodes": (), "records": (), "total": 0xFFFFFFFF, "token": bytes(TOKEN_BYTES), "next": NodeId(0)}
        fixed = len(self._codec.encode(Datagram("workers", request.transaction, self._own, widest)))
        kind, body = self._responder.answer(request, address, size - fixed, now)
        reply = self._codec.encode(Datagram(kind, request.transaction, self._own, body))
        if len(reply) > size:
            self.dropped["unpadded"] += 1
            return
        self._send(kind, reply, address)
        if request.sender is not None and self.table.wants(request.sender):
            self._verify(Contact(request.sender, address), now)

    def _verify(self, contact: Contact, now: float) -> None:
        """Ask a node that we only heard from to answer, unless that was just done."""
        asked = [t for t in self._pending.values() if t.request.kind == "ping"]
        if len(asked) < MAX_UNVERIFIED and all(t.address != contact.address for t in asked):
            self._request("ping", {}, contact.address, now, contact.node_id)

    # --- Our requests ---

    def _request(
        self,
        kind: str,
        body: Json,
        address: Address,
        now: float,
        node_id: NodeId | None = None,
        search: Search | None = None,
    ) -> None:
        if len(self._pending) >= MAX_TRANSACTIONS:
            self.dropped["transactions"] += 1
            return
        request = Datagram(kind, self._rng.randbytes(TRANSACTION_BYTES), self._own, body)
        size = MAX_DATAGRAM_BYTES if kind in ("find_node", "find_workers") else SMALL_REQUEST_BYTES
        data = self._codec.encode(request, pad_to=size)
        timeout = LOOKUP_DEADLINE_S if kind == "beacon" else self._timeout(node_id)
        retries = 0 if kind == "beacon" else REQUEST_RETRIES
        self._pending[request.transaction] = Transaction(
            request, data, address, node_id, search, now, timeout, now + timeout, retries
        )
        self._send(kind, data, address)

    def _send(self, kind: str, data: bytes, address: Address) -> None:
        self.sent[kind] += 1
        self._out.append((data, address))

    def _timeout(self, node_id: NodeId | None) -> float:
        node = self.table.get(node_id) if node_id is not None else None
        if node is None or node.rtt is None:
            return REQUEST_TIMEOUT_S
        return min(max(2 * node.rtt, MIN_REQUEST_TIMEOUT_S), MAX_REQUEST_TIMEOUT_S)

    def _on_timeout(self, transaction: Transaction, now: float) -> None:
        search, node_id = transaction.search, transaction.node_id
        if transaction.retries_left:
            transaction.retries_left -= 1
            transaction.due = now + transaction.timeout
            self._send(transaction.request.kind, transaction.data, transaction.address)
            if search is not None and node_id is not None:
                search.lookup.slow(node_id)
                self._advance(search, now)
            return
        del self._pending[transaction.request.transaction]
        if node_id is not None:
            self.table.failed(node_id)
            self._holders.pop(node_id, None)
        if search is not None and node_id is not None:
            self._gave_up(search, transaction, node_id, now)

    def _gave_up(self, search: Search, transaction: Transaction, node_id: NodeId, now: float) -> None:
        if transaction.first_page:
            search.lookup.failed(node_id)
        else:
            search.pages_open -= 1
        self._advance(search, now)

    def _on_reply(self, reply: Datagram, address: Address, now: float) -> None:
        transaction = self._pending.get(reply.transaction)
        if transaction is None or reply.sender is None or reply.kind not in _REPLIES[transaction.request.kind]:
            self.dropped["stray"] += 1
            return
        beacon = transaction.request.kind == "beacon"
        if not beacon and transaction.address != address:
            self.dropped["stray"] += 1
            return
        if not beacon:  # a beacon may be answered by many
            del self._pending[reply.transaction]
        if reply.sender == self._own:
            self._meeting.pop(address, None)
            return
        self._answered(Contact(reply.sender, address), transaction, now)
        if transaction.node_id is not None and transaction.node_id != reply.sender:
            self._changed_identity(transaction, now)
        else:
            _REPLY_HANDLERS[reply.kind](self, reply, address, transaction, now)

    def _answered(self, contact: Contact, transaction: Transaction, now: float) -> None:
        self._meeting.pop(contact.address, None)
        was_empty = not len(self.table)
        joined = self.table.answered(contact, now)
        node = self.table.get(contact.node_id)
        if node is not None and transaction.retries_left == REQUEST_RETRIES:
            node.measured(now - transaction.sent_at)  # a retried request's reply is ambiguous (Karn)
        if not joined:
            return
        self._events.append(Joined(contact))
        if self._own is None:
            return
        if was_empty:
            self._start_search(self._own, now, purpose=SearchPurpose.TABLE)
        if self._responder.own_record is not None and self._would_hold(contact.node_id):
            self._holder_search_at = -math.inf
            self._announce_at = min(self._announce_at, now + ANNOUNCE_DEBOUNCE_S)

    def _changed_identity(self, transaction: Transaction, now: float) -> None:
        """Another node answers where one was expected: that one is gone."""
        assert transaction.node_id is not None
        self.dropped["identity"] += 1
        self.table.failed(transaction.node_id)
        self._holders.pop(transaction.node_id, None)
        if transaction.search is not None:
            self._gave_up(transaction.search, transaction, transaction.node_id, now)

    def _on_pong(self, reply: Datagram, address: Address, transaction: Transaction, now: float) -> None:
        if "record" in reply.body:
            record = _located(reply.body["record"], address)
            if record.worker_id == reply.sender:
                self._events.append(Found(None, (record,)))

    def _on_nodes(self, reply: Datagram, address: Address, transaction: Transaction, now: float) -> None:
        search, sender = transaction.search, reply.sender
        if search is None or sender is None:
            return
        search.tokens[sender] = reply.body["token"]
        told = [c for c in reply.body["nodes"] if c.node_id != self._own and _may_tell(c.address, address)]
        search.lookup.answered(sender, told)
        self._advance(search, now)

    def _on_workers(self, reply: Datagram, address: Address, transaction: Transaction, now: float) -> None:
        search = transaction.search
        if search is None:
            return
        told = [record for record in reply.body["records"] if _may_tell(record.address, address)]
        fresh = search.learned(_located(record, address) for record in told)
        if fresh:
            self._events.append(Found(search.number, fresh))
        if not transaction.first_page:
            search.pages_open -= 1
        if "next" in reply.body and len(search.records) < reply.body["total"]:
            search.pages_open += 1
            question = {"topic": search.lookup.target, "after": reply.body["next"]}
            self._ask(search, Contact(reply.sender or NodeId(0), address), "find_workers", question, now)
        self._on_nodes(reply, address, transaction, now)

    def _on_ok(self, reply: Datagram, address: Address, transaction: Transaction, now: float) -> None:
        if "token" in reply.body and reply.sender is not None:
            self._holders[reply.sender] = (Contact(reply.sender, address), reply.body["token"])

    def _on_error(self, reply: Datagram, address: Address, transaction: Transaction, now: float) -> None:
        self.dropped[f"refused_{reply.body['code']}"] += 1
        if reply.sender is not None:
            self._holders.pop(reply.sender, None)

    # --- Searches ---

    def _start_search(
        self,
        target: NodeId,
        now: float,
        *,
        workers: bool = False,
        everything: bool = False,
        purpose: SearchPurpose = SearchPurpose.OWNER,
    ) -> int:
        self._search_count += 1
        lookup = Lookup(target, deadline=now + LOOKUP_DEADLINE_S)
        lookup.heard_of(self.table.closest(target, K))
        search = Search(self._search_count, lookup, workers=workers, everything=everything, purpose=purpose)
        self._searches[search.number] = search
        self._advance(search, now)
        return search.number

    def _advance(self, search: Search, now: float) -> None:
        if search.number not in self._searches:
            return  # it has ended; this answer came too late
        for contact in search.lookup.next_to_ask():
            self._ask(search, contact, *search.question(), now)
        self._finish_searches(now)

    def _ask(self, search: Search, contact: Contact, kind: str, body: Json, now: float) -> None:
        search.requests += 1
        self._request(kind, body, contact.address, now, contact.node_id, search)

    def _finish_searches(self, now: float) -> None:
        for search in [search for search in self._searches.values() if search.ended(now)]:
            del self._searches[search.number]
            contacts, records = tuple(search.lookup.closest()), tuple(search.records.values())
            if search.purpose is SearchPurpose.HOLDERS:
                self._found_holders(search, contacts, now)
            elif search.purpose is SearchPurpose.OWNER:
                event = Finished(search.number, contacts, records, search.lookup.hops, search.requests)
                self._events.append(event)

    # --- Our announcement ---

    def _would_hold(self, node_id: NodeId) -> bool:
        """Whether a node is among the k closest to the topic, as far as we know."""
        topic = self._keys.topic
        farthest = max((topic.distance(holder) for holder in self._holders), default=0)
        return len(self._holders) < K or topic.distance(node_id) < farthest

    def _send_announcements(self, now: float) -> None:
        period = ANNOUNCE_PERIOD_S * self._rng.uniform(1 - ANNOUNCE_JITTER, 1 + ANNOUNCE_JITTER)
        self._announce_at = now + period
        if self._holder_search_at <= now:
            self._holder_search_at = now + HOLDER_SEARCH_PERIOD_S
            self._start_search(self._keys.topic, now, purpose=SearchPurpose.HOLDERS)
        for contact, token in self._holders.values():
            self._announce_to(contact, token, now)

    def _found_holders(self, search: Search, contacts: Sequence[Contact], now: float) -> None:
        held = set(self._holders)
        self._holders = {c.node_id: (c, search.tokens[c.node_id]) for c in contacts if c.node_id in search.tokens}
        for node_id, (contact, token) in self._holders.items():
            if node_id not in held:
                self._announce_to(contact, token, now)

    def _announce_to(self, contact: Contact, token: bytes, now: float) -> None:
        body = {"topic": self._keys.topic, "token": token, "record": self._responder.own_record}
        if self._responder.own_record is not None:
            self._request("announce", body, contact.address, now, contact.node_id)

    # --- Beacons and upkeep ---

    def _start_beacons(self, now: float) -> None:
        self._beacons = deque(now + delay for delay in BEACON_TIMES_S)
        self._beacon_at = self._beacons.popleft()

    def _send_beacon(self, now: float) -> None:
        self._request("beacon", {"topic": self._keys.topic}, BEACON, now)
        for address in list(self._meeting):
            if all(transaction.address != address for transaction in self._pending.values()):
                self._request("ping", {}, address, now)
        self._beacon_at = self._beacons.popleft() if self._beacons else now + BEACON_PERIOD_S

    def _refresh(self, now: float) -> None:
        self._refresh_at = now + REFRESH_PERIOD_S
        if self._own is None:
            return
        for contact in self.table.silent_since(now - REFRESH_PERIOD_S)[:K]:
            self._request("ping", {}, contact.address, now, contact.node_id)
        self._start_search(self._own, now, purpose=SearchPurpose.TABLE)

    def _woke(self, now: float) -> None:
        """The machine slept: what we know is old, so ask everyone, announce and beacon as if new."""
        self._start_beacons(now)
        for contact in list(self.table)[:MAX_UNVERIFIED]:
            self._request("ping", {}, contact.address, now, contact.node_id)
        if self._responder.own_record is not None:
            self._holder_search_at, self._announce_at = -math.inf, now


_REPLY_HANDLERS: Final = {
    "pong": DhtEngine._on_pong,
    "nodes": DhtEngine._on_nodes,
    "workers": DhtEngine._on_workers,
    "ok": DhtEngine._on_ok,
    "error": DhtEngine._on_error,
}


# ======================================================================================================
# 10  Health and selection
#
#     score = (100 - cpu) * 0.4 + (100 - memory) * 0.4 + queue availability * 0.2
#     over 60 healthy: accept    20 to 60 busy: accept, slower    under 20 overloaded: refuse
#
# Rule 1: health is a window of samples that returns a verdict; it calls nobody.
# Rule 2: the highest score wins; scores within SCORE_TIE are ties, broken at random, so that clients who
# ask in the same moment do not all choose the same worker.
# ======================================================================================================


def health_score(cpu: float, memory: float, queue: float) -> float:
    """The score, 0 to 100, from per cent of processor and memory in use and of the queue free."""
    return (100 - cpu) * 0.4 + (100 - memory) * 0.4 + queue * 0.2


def queue_availability(occupied: int, capacity: int) -> float:
    """Per cent of the queue that is free; `occupied` counts running and waiting requests."""
    return 100 * max(0.0, 1 - occupied / capacity)


def state_of(score: float, before: HealthState | None = None) -> HealthState:
    """What a score means. Worse is believed at once, better only when it clears the threshold by HYSTERESIS."""
    if score < OVERLOADED_BELOW + (HYSTERESIS if before is HealthState.OVERLOADED else 0):
        return HealthState.OVERLOADED
    improving = before is not None and before is not HealthState.HEALTHY
    if score > HEALTHY_ABOVE + (HYSTERESIS if improving else 0):
        return HealthState.HEALTHY
    return HealthState.BUSY


class HealthWindow:
    """The last few samples of processor and memory, and the verdict on them with the queue as it is now."""

    def __init__(self, size: int = SAMPLE_WINDOW) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=size)
        self._state: HealthState | None = None

    def add(self, cpu: float, memory: float) -> None:
        """Take in one sample, in per cent in use."""
        self._samples.append((min(max(cpu, 0.0), 100.0), min(max(memory, 0.0), 100.0)))

    def report(self, occupied: int, capacity: int) -> HealthReport:
        """The health now. Before the first sample the machine counts as idle."""
        count = len(self._samples) or 1
        cpu = sum(sample[0] for sample in self._samples) / count
        memory = sum(sample[1] for sample in self._samples) / count
        queue = queue_availability(occupied, capacity)
        score = health_score(cpu, memory, queue)
        self._state = state_of(score, self._state)
        return HealthReport(score, self._state, cpu, memory, queue)


def model_key(name: str) -> str:
    """How model names are compared: without case, without the file's ending, cut as records cut them."""
    return short_model_name(name.casefold().removesuffix(".gguf"))


def short_model_name(name: str) -> str:
    """A name cut to MODEL_NAME_BYTES of UTF-8, at the border of a character."""
    return name.encode()[:MODEL_NAME_BYTES].decode(errors="ignore")


def can_serve(record: WorkerRecord, model: str | None) -> bool:
    """Whether a record's worker has the model and takes requests."""
    has_model = model is None or model_key(record.model) == model_key(model)
    return has_model and record.state is not HealthState.OVERLOADED


def rank_workers(
    records: Iterable[WorkerRecord], model: str | None, rng: random.Random
) -> list[WorkerRecord]:
    """Those that can serve the model, best first; ties in random order."""
    able = [record for record in records if can_serve(record, model)]
    return _best_first(able, [float(record.score) for record in able], rng)


T = TypeVar("T")


def _best_first(items: Sequence[T], scores: Sequence[float], rng: random.Random) -> list[T]:
    """Items by falling score. Those within SCORE_TIE of the best that is left are drawn at random."""
    left = sorted(zip(scores, range(len(items)), strict=True), reverse=True)
    order = []
    while left:
        tied = [entry for entry in left if entry[0] >= left[0][0] - SCORE_TIE]
        chosen = rng.choice(tied)
        left.remove(chosen)
        order.append(items[chosen[1]])
    return order


def choose_worker(candidates: Mapping[T, HealthReport], rng: random.Random) -> T | None:
    """The candidate with the highest fresh score among those that accept requests; None when all refuse."""
    able = [key for key, health in candidates.items() if health.state is not HealthState.OVERLOADED]
    ranked = _best_first(able, [candidates[key].score for key in able], rng)
    return ranked[0] if ranked else None


# ======================================================================================================
# 11  Fair queue
#
# Rule 1: clients take turns. A client's own requests keep their order, and one client's hundred requests
# cost another's single one at most one turn.
# Rule 2: a position counts the requests that will be served before this one, if nobody else comes.
# ======================================================================================================


class FairQueue(Generic[T]):
    """Waiting requests, served round robin over clients.

    >>> queue = FairQueue()
    >>> for client, request in [("ann", "a1"), ("ann", "a2"), ("bob", "b1")]:
    ...     queue.push(client, request, request.upper())
    >>> [queue.pop() for _ in range(len(queue))]
    ['A1', 'B1', 'A2']
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def push(self, client: str, request_id: str, item: T) -> None:
        """Add a request at the end of its client's line."""
        self._clients.setdefault(client, OrderedDict())[request_id] = item

    def pop(self) -> T | None:
        """Take the next request; its client goes to the end of the round."""
        if not self._clients:
            return None
        client, line = self._clients.popitem(last=False)
        _, item = line.popitem(last=False)
        if line:
            self._clients[client] = line
        return item

    def remove(self, client: str, request_id: str) -> T | None:
        """Take a request out of its place; None when it does not wait here."""
        line = self._clients.get(client)
        if line is None or request_id not in line:
            return None
        item = line.pop(request_id)
        if not line:
            del self._clients[client]
        return item

    def in_order(self) -> list[T]:
        """All waiting requests as they would be served."""
        lines = [list(line.values()) for line in self._clients.values()]
        rounds = max(map(len, lines), default=0)
        return [line[turn] for turn in range(rounds) for line in lines if turn < len(line)]


def expected_wait_s(position: int, slots: int, mean_service_s: float) -> float:
    """How long the request at `position` (0 is next) waits for a slot, when each runs this long on average.

    With all slots busy at random points of their requests, one becomes free every mean/slots seconds.
    """
    return (position + 1) * mean_service_s / slots


