"""The mesh over HTTP, as programs made for OpenAI's API and people with a browser see it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import pytest
from http_client import HttpPeer, Reply, connected, fetch, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loop import PATIENCE_S, in_a_loop
from scripted_worker import (
    HANGS_UP,
    IS_SILENT,
    NO_STATUS,
    Script,
    ScriptedWorker,
    client_of,
    in_turn,
    mesh_of,
    refuses,
    result_frame,
    says,
    sends,
    token_frame,
)

import qmesh
from qmesh import LOOPBACK, Connection, Gateway, GatewayOptions, Json

pytestmark = pytest.mark.usefixtures("parting_without_waiting")

KEY = "correct-horse"
CHAT: Json = {"messages": [{"role": "user", "content": "hello"}]}
STREAM: Json = CHAT | {"stream": True}
CHAT_PATH, TEXT_PATH = qmesh.CHAT.path, qmesh.TEXT.path
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def no_faults(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@contextlib.asynccontextmanager
async def open_gateway(client: qmesh.Client, *, wait_s: float = 5, keys: tuple[str, ...] = ()) -> AsyncIterator[int]:
    """The port of a gateway to a client's mesh."""
    gateway = Gateway(client, GatewayOptions(LOOPBACK, 0, keys, wait_s))
    url, *_ = await gateway.start()
    try:
        port = urllib.parse.urlsplit(url).port
        assert port is not None
        yield port
    finally:
        await gateway.stop()


@contextlib.asynccontextmanager
async def gateway_to(
    topic: str, state_dir: Path, *workers: ScriptedWorker, wait_s: float = 5, keys: tuple[str, ...] = (), **more: Any
) -> AsyncIterator[int]:
    """The port of a gateway that has heard of all these workers."""
    async with (
        mesh_of(topic, state_dir, *workers, **more) as client,
        open_gateway(client, wait_s=wait_s, keys=keys) as port,
    ):
        yield port


@dataclass
class Events:
    """What came in a stream of server-sent events."""

    data: list[Any]
    notes: list[Json]
    done: bool

    @classmethod
    def of(cls, body: bytes) -> Events:
        data, notes, done = [], [], False
        assert body.endswith(b"\n\n")
        for event in body[:-2].split(b"\n\n"):
            assert b"\n" not in event
            assert not done
            if event == b"data: [DONE]":
                done = True
            elif event.startswith(b"data: "):
                data.append(json.loads(event[6:]))
            elif event != b":":
                assert event.startswith(b": qmesh ")
                notes.append(json.loads(event[8:]))
        return cls(data, notes, done)

    def text(self, index: int = 0) -> str:
        choices = [choice for body in self.data for choice in body.get("choices", [])]
        return "".join(
            choice.get("text", "") or choice.get("delta", {}).get("content", "")
            for choice in choices
            if choice["index"] == index
        )


def streamed(reply: Reply) -> Events:
    assert (reply.status, reply.headers["content-type"]) == (200, qmesh.EVENT_STREAM)
    return Events.of(reply.body)


# --- What is there ---


@in_a_loop
async def test_every_route_answers_and_takes_its_own_method_alone(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(says("hi"))
    async with gateway_to(topic, tmp_path, worker) as port:
        gets = {"/": 200, "/health": 200, "/mesh": 200, "/qmesh.pyz": 404, "/v1/models": 200, "/v1/models/tiny": 200}
        for path, status in gets.items():
            assert (await fetch(port, path)).status == status, path
            head = await fetch(port, path, method="HEAD")
            assert (head.status, head.body) == (status, b"")
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                reply = await fetch(port, path, method=method)
                assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        for path in (CHAT_PATH, TEXT_PATH):
            for method in ("GET", "HEAD", "PUT"):
                reply = await fetch(port, path, method=method)
                assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert (await fetch(port, CHAT_PATH, CHAT)).status == 200
        assert (await fetch(port, TEXT_PATH, {"prompt": "hello"})).status == 200


@in_a_loop
async def test_what_is_not_there_is_told_in_openai_s_shape(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        for path in ("/nothing", "/v1", "/v1/", "/v1/chat", "/v1/models/a/b", "/*", "/..", "/\0", "/mesh/"):
            reply = await fetch(port, urllib.parse.quote(path))
            assert (reply.status, reply.error["code"]) == (404, "unknown_url"), path
            assert reply.error["type"] == "invalid_request_error"
            assert reply.error["message"].isprintable()


@in_a_loop
async def test_who_forgets_the_first_part_of_the_path_is_told(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        reply = await fetch(port, "/chat/completions", CHAT)
        assert (reply.status, "base_url ends in /v1" in reply.error["message"]) == (404, True)


@in_a_loop
async def test_the_page_may_load_nothing_from_elsewhere(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        reply = await fetch(port, "/")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        assert reply.headers["cache-control"] == "no-store"


@in_a_loop
async def test_the_models_are_those_of_all_workers(topic: str, tmp_path: Path) -> None:
    workers = [ScriptedWorker(says("hi"), model=model) for model in ("b.gguf", "a", "a")]
    async with gateway_to(topic, tmp_path, *workers) as port:
        listed = (await fetch(port, "/v1/models")).json
        assert listed["object"] == "list"
        assert [(model["id"], model["object"]) for model in listed["data"]] == [("a", "model"), ("b.gguf", "model")]
        assert (await fetch(port, "/v1/models/B")).json["id"] == "b.gguf"
        reply = await fetch(port, "/v1/models/c")
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")


@in_a_loop
async def test_health_tells_whether_somebody_takes_requests(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        reply = await fetch(port, "/health")
        assert (reply.status, reply.json["status"], reply.json["workers"]) == (503, "no_workers", 0)
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"), score=5)) as port:
        reply = await fetch(port, "/health")
        assert (reply.status, reply.json["status"], reply.json["workers"]) == (503, "overloaded", 1)
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"))) as port:
        reply = await fetch(port, "/health")
        assert (reply.status, reply.json["status"], reply.json["workers"]) == (200, "ok", 1)


@in_a_loop
async def test_however_many_look_at_the_mesh_its_workers_are_asked_once(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer takes longer than it counts, as one worker is silent."""
    monkeypatch.setattr(qmesh, "STATUS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(qmesh, "MESH_VIEW_S", 0.25)
    worker, silent = ScriptedWorker(says("hi")), ScriptedWorker(says("hi"), status=NO_STATUS)
    async with gateway_to(topic, tmp_path, worker, silent) as port:
        replies = await asyncio.gather(*(fetch(port, "/mesh") for _ in range(50)))
        assert worker.statuses == silent.statuses == 1
        for reply in replies:
            assert [told["worker_id"] for told in reply.json["workers"]] == [str(worker.worker_id)]
            assert [told["worker_id"] for told in reply.json["unreachable"]] == [str(silent.worker_id)]
        await asyncio.sleep(0.3)
        await fetch(port, "/mesh")
        assert worker.statuses == 2


class Overlooking(qmesh.Client):
    """A client to whom workers tell whatever JSON can be read."""

    told: tuple[Any, ...] = ()

    async def overview(self) -> Json:
        usual = {"address": [LOOPBACK, 1], "models": [{"name": "tiny"}]}
        workers = [usual | {"worker_id": f"{at:064}", "told": told} for at, told in enumerate(self.told)]
        return {"workers": workers, "unreachable": [], "network": {}, "mesh": {}}


@in_a_loop
async def test_a_worker_whose_status_cannot_be_told_spoils_nobody_else_s(topic: str, tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit() - 40):
        deep = [deep]
    settings = qmesh.Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))
    client = Overlooking(settings, environ={})
    async with client, open_gateway(client) as port:
        client.told = ("fine", "\ud800", deep, {"\udfff": 1})
        reply = await fetch(port, "/mesh")
        assert reply.status == 200
        assert [worker["told"] for worker in reply.json["workers"]] == ["fine"]
        assert [int(worker["worker_id"]) for worker in reply.json["unreachable"]] == [1, 2, 3]
        assert (await fetch(port, "/v1/models")).json["data"][0]["id"] == "tiny"


# --- Who may come in ---


@in_a_loop
async def test_a_key_opens_all_but_the_page_and_health(topic: str, tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi")), keys=keys) as port:
        assert (await fetch(port, "/")).status == 200
        assert (await fetch(port, "/health")).status == 200
        wrong = ["", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-keyx", "Basic first-key", "first-key"]
        wrong += ["Bearer first-key, Bearer second-key", "Bearer \xe4\xf6\xfc"]
        for path, body in (("/mesh", None), ("/v1/models", None), ("/qmesh.pyz", None), (CHAT_PATH, CHAT)):
            for given_key in (None, *wrong):
                headers = [f"Authorization: {given_key}"] if given_key is not None else []
                reply = await fetch(port, path, body, *headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), given_key
                assert reply.headers["www-authenticate"] == "Bearer"
            for key in keys:
                reply = await fetch(port, path, body, f"Authorization: bearer  {key}")
                assert reply.status == (404 if path == "/qmesh.pyz" else 200)


# Host, Origin, and the status that they get.
SITES = [
    ("127.0.0.1:{port}", None, 200),
    ("localhost:{port}", "http://localhost:{port}", 200),
    ("LOCALHOST", None, 200),
    ("lab.localhost:8080", None, 200),
    ("[::1]:{port}", "http://[::1]:{port}", 200),
    ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),
    ("evil.example", None, 403),
    ("evil.example:{port}", "http://evil.example:{port}", 403),
    ("localhost.evil.example", None, 403),
    ("evillocalhost", None, 403),
    ("127.0.0.1.evil.example", None, 403),
    ("user@127.0.0.1", None, 403),
    ("127.0.0.1:{port}", "http://evil.example", 403),
    ("127.0.0.1:{port}", "http://127.0.0.1:1", 403),
    ("127.0.0.1:{port}", "null", 403),
    ("127.0.0.1:{port}", "", 403),
    ("127.0.0.1:{port}", "http://[x", 403),
    ("127.0.0.1:{port}", "http://127.0.0.1:{port}, http://evil.example", 403),
    ("127.0.0.1:x", None, 400),
    ("127.0.0.1:99999", None, 400),
    ("[::1", None, 400),
    ("", None, 400),
    ("a b", None, 400),
]


@in_a_loop
async def test_without_a_key_pages_of_other_sites_are_turned_away(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        for host, origin, status in SITES:
            async with connected(port) as peer:
                lines = ["GET / HTTP/1.1", f"Host: {host}"] + ([f"Origin: {origin}"] if origin is not None else [])
                peer.send("\r\n".join([*lines, "", ""]).format(port=port).encode())
                assert (await peer.reply()).status == status, (host, origin)


@in_a_loop
async def test_the_host_of_a_url_counts_and_not_that_of_the_header(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path) as port:
        assert (await fetch(port, "http://evil.example/health")).status == 403
        assert (await fetch(port, "http://localhost/")).status == 200


# --- Refusals ---


# A body, and the parameter that is wrong with it.
WRONG: list[tuple[Any, str | None]] = [
    (CHAT | {"temperature": -1}, "temperature"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    (CHAT | {"worker": "nobody"}, "worker"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({}, "messages"),
    (b"", None),
    (b"[]", None),
    (b"{", None),
    (b'{"messages": NaN}', None),
    (b'{"messages": 1e999}', None),
    (b'{"n": 1, "n": 2}', None),
    (b'{"a": "\xff"}', None),
    (b"[" * 100_000, None),
    (b'{"a":' * 100_000, None),
    (b'{"seed": ' + b"9" * 10_000 + b"}", None),
]


@in_a_loop
async def test_what_is_wrong_with_a_request_is_told_by_its_parameter(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"))) as port:
        for body, param in WRONG:
            reply = await fetch(port, CHAT_PATH, body)
            assert (reply.status, reply.error["type"]) == (400, "invalid_request_error"), param
            assert reply.error["param"] == param


@in_a_loop
async def test_a_schema_as_deep_as_json_allows_is_refused_like_any_other(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"))) as port:
        for depth in (*range(100, 900, 200), *range(900, 1000, 7)):
            schema = b'{"items":' * depth + b"{}" + b"}" * depth
            wanted = b'{"type": "json_schema", "json_schema": {"schema": ' + schema + b"}}"
            body = json.dumps(CHAT).encode()[:-1] + b', "response_format": ' + wanted + b"}"
            assert (await fetch(port, CHAT_PATH, body)).status == 400


@in_a_loop
async def test_a_request_that_is_too_large_for_a_worker_is_refused_and_the_worker_is_not_blamed(
    topic: str, tmp_path: Path
) -> None:
    """1e15 in JSON becomes 1000000000000000.0 in ours."""
    worker = ScriptedWorker(says("hi"))
    async with gateway_to(topic, tmp_path, worker) as port:
        wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["@"]}}}
        body = json.dumps(CHAT | {"response_format": wanted}).replace('"@"', ",".join(["1e15"] * 600_000)).encode()
        reply = await fetch(port, CHAT_PATH, body)
        assert (reply.status, "can be sent" in reply.error["message"]) == (400, True)
        reply = await fetch(port, CHAT_PATH, bytes(qmesh.MAX_HTTP_BODY_BYTES + 1))
        assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")
        assert (await fetch(port, CHAT_PATH, CHAT)).status == 200


@pytest.mark.parametrize("body", [CHAT, STREAM])
@in_a_loop
async def test_a_model_that_nobody_has_is_not_found_and_those_there_are_named(
    topic: str, tmp_path: Path, body: Json
) -> None:
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"))) as port:
        reply = await fetch(port, CHAT_PATH, body | {"model": "gpt-17"})
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
        assert "the mesh has: tiny" in reply.error["message"]
        reply = await fetch(port, CHAT_PATH, body | {"model": "\x1b[2J" * 100_000})
        assert (reply.status, reply.error["message"].isprintable()) == (404, True)
        assert len(reply.body) < 2 * qmesh.MAX_ERROR_CHARS


@in_a_loop
async def test_a_worker_that_is_asked_for_answers_or_is_not_found(topic: str, tmp_path: Path) -> None:
    workers = [ScriptedWorker(says("one"), score=30), ScriptedWorker(says("two"), score=90)]
    async with gateway_to(topic, tmp_path, *workers) as port:
        for digits in (6, 64):
            wanted = str(workers[0].worker_id)[:digits]
            reply = await fetch(port, CHAT_PATH, CHAT | {"worker": wanted})
            assert reply.json["choices"][0]["message"]["content"] == "one"
            assert reply.headers["x-qmesh-worker"] == str(workers[0].worker_id)
        for body in (CHAT, STREAM):
            reply = await fetch(port, CHAT_PATH, body | {"worker": "0" * 64})
            assert (reply.status, reply.error["param"]) == (404, "worker")
            assert workers[0].worker_id.short in reply.error["message"]


@in_a_loop
async def test_where_no_worker_is_the_service_is_not_available(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 0.3)
    async with client_of(topic, tmp_path) as client, open_gateway(client) as port:
        for body in (CHAT, STREAM, CHAT | {"worker": "0" * 64}):
            reply = await fetch(port, CHAT_PATH, body)
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "no_worker", "5")


@pytest.mark.parametrize("body", [CHAT, STREAM, CHAT | {"n": 2}])
@in_a_loop
async def test_where_all_refuse_for_long_the_client_is_asked_to_come_again(
    topic: str, tmp_path: Path, body: Json
) -> None:
    async with gateway_to(topic, tmp_path, ScriptedWorker(refuses()), wait_s=0) as port:
        reply = await fetch(port, CHAT_PATH, body)
        assert (reply.status, reply.error["type"], reply.headers["retry-after"]) == (429, "rate_limit_error", "5")
        assert "the queue is full" in reply.error["message"]


@in_a_loop
async def test_who_is_refused_at_first_waits_for_a_worker(topic: str, tmp_path: Path) -> None:
    async with gateway_to(topic, tmp_path, ScriptedWorker(in_turn(refuses(), says("hi")))) as port:
        events = streamed(await fetch(port, CHAT_PATH, STREAM))
        assert (events.text(), events.done) == ("hi", True)
        assert "waiting" in [note["event"] for note in events.notes]


@in_a_loop
async def test_too_many_at_once_are_refused_and_each_makes_room_when_it_ends(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "MAX_GATEWAY_JOBS", 2)
    worker = ScriptedWorker(IS_SILENT)
    async with gateway_to(topic, tmp_path, worker) as port:
        async with connected(port) as peer:
            peer.post(CHAT_PATH, CHAT | {"n": 2})
            await until(lambda: len(worker.prompts) == 2)
            reply = await fetch(port, CHAT_PATH, CHAT)
            assert (reply.status, reply.headers["retry-after"]) == (429, "5")
        worker.script = says("hi")
        for _ in range(3):  # of what was wrong with a request nothing stays either
            assert (await fetch(port, CHAT_PATH, CHAT | {"worker": "nobody"})).status == 400
            assert (await fetch(port, CHAT_PATH, CHAT | {"model": "gpt-17"})).status == 404
        await until(lambda: worker.cancelled.qsize() == 2)
        assert (await fetch(port, CHAT_PATH, CHAT | {"n": 2})).status == 200


@in_a_loop
async def test_a_deadline_that_passes_is_told(topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "DEADLINE_GRACE_S", 0.0)
    async with gateway_to(topic, tmp_path, ScriptedWorker(IS_SILENT), timeout_s=0.5) as port:
        reply = await fetch(port, CHAT_PATH, CHAT)
        assert (reply.status, reply.error["code"]) == (504, "timeout")


@in_a_loop
async def test_a_worker_that_makes_no_sense_is_a_bad_gateway_s_answer(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "MAX_LOSSES", 1)
    async with gateway_to(topic, tmp_path, ScriptedWorker(sends(token_frame("", 7, "x")))) as port:
        reply = await fetch(port, CHAT_PATH, CHAT)
        assert (reply.status, reply.error["type"]) == (502, "server_error")
        assert "the worker gave 1 token from 7 on" in reply.error["message"]


# --- Answers ---


@in_a_loop
async def test_a_whole_answer_tells_who_gave_it(topic: str, tmp_path: Path) -> None:
    """By the id that was proved in the handshake: what a worker calls itself in its answer could be anything."""

    async def lies(connection: Connection, request_id: str) -> bool:
        await connection.send(token_frame(request_id, 0, "hi"))
        await connection.send(result_frame(request_id, "hi") | {"worker_id": "x\r\nSet-Cookie: ☃=1"})
        return True

    worker = ScriptedWorker(lies)
    async with gateway_to(topic, tmp_path, worker) as port:
        reply = await fetch(port, CHAT_PATH, CHAT)
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert (reply.headers["x-qmesh-worker"], reply.headers["x-qmesh-failovers"]) == (str(worker.worker_id), "0")
        assert "set-cookie" not in reply.headers
        assert reply.json["choices"][0]["message"]["content"] == "hi"
        assert (reply.json["model"], reply.json["usage"]["total_tokens"]) == ("tiny", 2)


@in_a_loop
async def test_a_stream_gives_the_answer_in_pieces_and_tells_what_happens(topic: str, tmp_path: Path) -> None:
    queued = {"type": "inference_queued", "position": 2, "wait_s": 1.5}

    async def script(connection: Connection, request_id: str) -> bool:
        await connection.send(queued | {"request_id": request_id})
        return await says("he", "llo\n\ndata: x\u2028")(connection, request_id)

    worker = ScriptedWorker(script)
    async with gateway_to(topic, tmp_path, worker) as port:
        body = STREAM | {"stream_options": {"include_usage": True}}
        reply = await fetch(port, CHAT_PATH, body)
        events = streamed(reply)
        assert (events.text(), events.done) == ("hello\n\ndata: x\u2028", True)
        assert reply.headers["cache-control"] == "no-store"
        assert events.notes == [
            {"event": "selected", "worker_id": str(worker.worker_id), "score": 80},
            {"event": "queued", "position": 2, "wait_s": 1.5},
        ]
        *pieces, last = events.data
        assert [piece["usage"] for piece in pieces] == [None] * len(pieces)
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
        assert len({(piece["id"], piece["model"]) for piece in events.data}) == 1


@pytest.mark.parametrize("streams", [False, True])
@in_a_loop
async def test_several_choices_come_with_their_numbers(topic: str, tmp_path: Path, streams: bool) -> None:
    worker = ScriptedWorker(says("a", "b"))
    async with gateway_to(topic, tmp_path, worker) as port:
        reply = await fetch(port, TEXT_PATH, {"prompt": ["x", "y"], "n": 2, "stream": streams, "seed": 5})
        if streams:
            events = streamed(reply)
            assert [events.text(index) for index in range(4)] == ["ab"] * 4
            reasons = [body["choices"][0]["finish_reason"] for body in events.data]
            assert (reasons.count("stop"), events.done) == (4, True)
        else:
            assert [choice["text"] for choice in reply.json["choices"]] == ["ab"] * 4
            assert reply.json["usage"]["completion_tokens"] == 8
        assert sorted((prompt["prompt"], prompt["params"]["seed"]) for prompt in worker.prompts) == [
            ("x", 5),
            ("x", 6),
            ("y", 5),
            ("y", 6),
        ]


@pytest.mark.parametrize("n", [1, 2])
@in_a_loop
async def test_what_goes_wrong_in_the_middle_of_a_stream_is_its_last_event(topic: str, tmp_path: Path, n: int) -> None:
    async def script(connection: Connection, request_id: str) -> bool:
        await connection.send(token_frame(request_id, 0, "he"))
        await connection.send(qmesh.error_frame(None, qmesh.QMeshError("it broke")) | {"request_id": request_id})
        return True

    async with gateway_to(topic, tmp_path, ScriptedWorker(script)) as port, connected(port) as peer:
        peer.post(CHAT_PATH, STREAM | {"n": n})
        events = streamed(await peer.reply())
        assert not events.done
        assert "it broke" in events.data[-1]["error"]["message"]
        assert events.data[-1]["error"]["type"] == "server_error"
        assert all("error" not in body for body in events.data[:-1])
        peer.get("/health")  # the stream has ended well, as far as HTTP is concerned
        assert (await peer.reply()).status == 200


@in_a_loop
async def test_a_stream_goes_on_where_its_worker_was_lost(topic: str, tmp_path: Path) -> None:
    """The client sees every piece once."""

    async def dies(connection: Connection, request_id: str) -> bool:
        for seq, piece in enumerate(["one ", "two "]):
            await connection.send(token_frame(request_id, seq, piece))
        await asyncio.sleep(0.05)
        return False

    async def goes_on(connection: Connection, request_id: str) -> bool:
        await connection.send(token_frame(request_id, 2, "three"))
        await connection.send(result_frame(request_id, "one two three", 3))
        return True

    first, second = ScriptedWorker(in_turn(dies, HANGS_UP), score=95), ScriptedWorker(goes_on, score=30)
    async with gateway_to(topic, tmp_path, first, second) as port:
        events = streamed(await fetch(port, CHAT_PATH, STREAM))
        assert (events.text(), events.done) == ("one two three", True)
        (lost,) = [note for note in events.notes if note["event"] == "lost"][-1:]
        assert (lost["worker_id"], lost["tokens"]) == (str(first.worker_id), 2)
        assert [note["worker_id"] for note in events.notes if note["event"] == "selected"][-1] == str(second.worker_id)
        assert second.prompts[0]["resume"]["tokens"] == [0, 1]
    third, fourth = ScriptedWorker(in_turn(dies, HANGS_UP), score=95), ScriptedWorker(goes_on, score=30)
    async with gateway_to(topic, tmp_path, third, fourth) as port:
        reply = await fetch(port, CHAT_PATH, CHAT)
        assert reply.json["choices"][0]["message"]["content"] == "one two three"
        assert (reply.headers["x-qmesh-worker"], reply.headers["x-qmesh-failovers"]) == (str(fourth.worker_id), "1")


@in_a_loop
async def test_a_stream_of_which_nothing_is_heard_shows_signs_of_life(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "HTTP_SILENCE_S", 0.1)
    async with gateway_to(topic, tmp_path, ScriptedWorker(IS_SILENT)) as port, connected(port) as peer:
        peer.post(CHAT_PATH, STREAM)
        assert (await peer.head()).status == 200  # though the worker has said nothing
        assert (await peer.chunk()).startswith(b': qmesh {"event":"selected"')
        assert [await peer.chunk(), await peer.chunk()] == [b":\n\n", b":\n\n"]


# --- Clients that go away ---

queued_only = sends({"type": "inference_queued", "position": 1, "wait_s": 9.0})
begun_only = sends({"type": "inference_token", "seq": 0, "tokens": [0], "text": "he"})


@pytest.mark.parametrize("script", [IS_SILENT, queued_only, begun_only], ids=["taken", "queued", "begun"])
@pytest.mark.parametrize("body", [CHAT, STREAM, STREAM | {"n": 2}], ids=["whole", "stream", "two"])
@pytest.mark.parametrize("leaves", [HttpPeer.vanish, lambda peer: peer.writer.write_eof()], ids=["reset", "half"])
@in_a_loop
async def test_who_hangs_up_costs_the_worker_nothing_from_then_on(
    topic: str, tmp_path: Path, script: Script, body: Json, leaves: Callable[[HttpPeer], None]
) -> None:
    worker, count = ScriptedWorker(script), body.get("n", 1)
    async with gateway_to(topic, tmp_path, worker) as port, connected(port) as peer:
        peer.post(CHAT_PATH, body)
        await until(lambda: len(worker.prompts) == count)
        if script is begun_only and "stream" in body:
            await peer.head()
        leaves(peer)
        async with asyncio.timeout(1):
            cancelled = {await worker.cancelled.get() for _ in range(count)}
        assert cancelled == {prompt["request_id"] for prompt in worker.prompts}


@in_a_loop
async def test_one_reader_that_takes_nothing_keeps_nobody_else_waiting(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker is cancelled, which shows that no more is kept for it than fits the buffers."""
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", 0.5)
    piece, others, count = "x" * 50_000, 99, 3
    tokens = 0

    async def floods(connection: Connection, request_id: str) -> bool:
        nonlocal tokens
        while worker.cancelled.empty():
            await connection.send(qmesh.Token(tokens, tuple(range(50)), piece).to_json(request_id))
            tokens += 50
            await asyncio.sleep(0.001)
        return True

    async def script(connection: Connection, request_id: str) -> bool:
        if worker.prompts[-1]["params"].get("seed") == 13:
            tasks.append(asyncio.create_task(floods(connection, request_id)))
            return True
        return await says(*["y" * 100] * count)(connection, request_id)

    tasks: list[asyncio.Task[bool]] = []
    worker = ScriptedWorker(script)
    async with gateway_to(topic, tmp_path, worker) as port, connected(port, buffer=4096) as stuck:
        stuck.post(CHAT_PATH, STREAM | {"seed": 13})
        await stuck.head()
        replies = await asyncio.gather(*(fetch(port, CHAT_PATH, STREAM) for _ in range(others)))
        assert [streamed(reply).text() for reply in replies] == ["y" * 100 * count] * others
        async with asyncio.timeout(PATIENCE_S):
            await worker.cancelled.get()
            worker.cancelled.put_nowait("again")
            await asyncio.gather(*tasks)
        assert len(await stuck.rest()) < 20 * 1024 * 1024


# --- The program ---


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.168.1.2"])
def test_a_gateway_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(qmesh.UsageError, match="give a key with --api-key"):
        GatewayOptions(host, 0)
    assert GatewayOptions(host, 0, (KEY,)).keys == (KEY,)
    assert KEY not in repr(GatewayOptions(host, 0, (KEY,)))


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"correct-horse\n", ("correct-horse",)),
        (b"\xef\xbb\xbffirst-key\r\n\r\n# of Ada\r\nsecond-key # of Bob\r\nfirst-key\r\n", ("first-key", "second-key")),
    ],
)
def test_keys_are_read_from_a_file(tmp_path: Path, content: bytes, keys: tuple[str, ...]) -> None:
    path = tmp_path / "api.keys"
    path.write_bytes(content)
    assert qmesh.read_api_keys(str(path)) == keys


def test_a_key_may_be_told_itself() -> None:
    assert qmesh.read_api_keys(None) == ()
    assert qmesh.read_api_keys(" correct-horse\n") == ("correct-horse",)
    assert qmesh.read_api_keys("sk-" + "x" * 300) == ("sk-" + "x" * 300,)
    assert qmesh.read_api_keys("correct#horse") == ("correct#horse",)


TOO_MANY_KEYS = b"".join(b"key-%06d\n" % number for number in range(qmesh.MAX_API_KEYS + 1))


@pytest.mark.parametrize(
    "content",
    [b"", b"# none\n", b"short", b"two words", "schlüssel".encode(), b"\xff\xfe1234", b"bell\x0712345", TOO_MANY_KEYS],
)
def test_keys_that_cannot_be_used_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "api.keys"
    path.write_bytes(content)
    with pytest.raises(qmesh.UsageError, match=r"API key"):
        qmesh.read_api_keys(str(path))


@pytest.mark.parametrize("name", ["api.keys", "", "not/there"])
def test_the_name_of_a_file_that_cannot_be_had_is_no_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(qmesh.UsageError, match="API keys"):
        qmesh.read_api_keys(str(tmp_path / name))
    for name_alone in ("~nobody-of-this-name/keys", "lab-keys.txt", "secrets/keys", "secrets\\keys"):
        with pytest.raises(qmesh.UsageError, match="API keys"):
            qmesh.read_api_keys(name_alone)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_of_keys_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "api.keys"
    path.write_text(KEY)
    path.chmod(mode)
    qmesh.read_api_keys(str(path))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == warned
    assert all("other users of this machine can read the API keys" in warning for warning in warnings)


@in_a_loop
async def test_a_port_that_is_taken_is_told_unless_nobody_asked_for_it(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(qmesh, "DEFAULT_HTTP_PORT", port)
        async with client_of(topic, tmp_path) as client:
            with pytest.raises(qmesh.UsageError, match=f"{port}"):
                await Gateway(client, GatewayOptions(LOOPBACK, port)).start()
            gateway = Gateway(client, GatewayOptions(LOOPBACK, None))
            url, *_ = await gateway.start()
            try:
                own = urllib.parse.urlsplit(url).port
                assert own not in (None, port)
                assert (await fetch(own or 0, "/")).status == 200
            finally:
                await gateway.stop()


@contextlib.asynccontextmanager
async def gateway_process(
    topic: str, state_dir: Path, *arguments: str, program: Path = harness.PROGRAM
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """The command `gateway`, and its port."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
    process = await asyncio.create_subprocess_exec(
        *harness.running(program),
        *("gateway", "--json", "--http", "127.0.0.1:0", "--host", LOOPBACK),
        *("--topic", topic, "--state-dir", str(state_dir), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=inherited,
        cwd=harness.ROOT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            ready = json.loads(await process.stdout.readline())
        assert ready["event"] == "ready"
        port = urllib.parse.urlsplit(ready["url"]).port
        assert port
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@in_a_loop
async def test_a_gateway_that_is_told_to_stop_lets_a_stream_come_to_its_end(topic: str, tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(connection: Connection, request_id: str) -> bool:
        await connection.send(token_frame(request_id, 0, "he"))
        await go.wait()
        await connection.send(token_frame(request_id, 1, "llo"))
        await connection.send(result_frame(request_id, "hello", 2))
        return True

    async with ScriptedWorker(script).on(topic), gateway_process(topic, tmp_path) as (process, port):
        async with connected(port) as peer, connected(port) as idle:
            idle.get("/")
            await idle.reply()
            peer.post(CHAT_PATH, STREAM)
            body = b""
            assert (await peer.head()).status == 200
            while b'"content":"he"' not in body:
                body += await peer.chunk()
            process.send_signal(signal.SIGTERM)
            assert await idle.rest() == b""  # it has begun to stop
            go.set()
            while chunk := await peer.chunk():
                body += chunk
            events = Events.of(body)
            assert (events.text(), events.done) == ("hello", True)
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline()) == {"event": "stopped"}
        assert await process.wait() == 0


@in_a_loop
async def test_a_stream_that_does_not_end_in_time_is_told_that_it_is_cut(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(sends(token_frame("", 0, "he")))
    async with mesh_of(topic, tmp_path, worker) as client:
        gateway = Gateway(client, GatewayOptions(LOOPBACK, 0, grace_s=0.1))
        url, *_ = await gateway.start()
        async with connected(urllib.parse.urlsplit(url).port or 0) as peer:
            peer.post(CHAT_PATH, STREAM)
            assert (await peer.head()).status == 200
            body = await peer.chunk()
            stopping = asyncio.create_task(gateway.stop())
            while chunk := await peer.chunk():
                body += chunk
            await stopping
    *said, last = Events.of(body).data
    assert said
    assert last["error"]["type"] == "server_error"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "qmesh.pyz"
    subprocess.run([sys.executable, harness.ROOT / "build_zipapp.py", "-o", path], check=True, capture_output=True)
    return path


@in_a_loop
async def test_a_gateway_hands_out_the_archive_that_it_runs_from(topic: str, tmp_path: Path, archive: Path) -> None:
    data = await asyncio.to_thread(archive.read_bytes)
    async with gateway_process(topic, tmp_path, program=archive) as (_, port), connected(port) as peer:
        for _ in range(2):
            peer.get("/qmesh.pyz")
            reply = await peer.reply()
            assert (reply.status, reply.body == data) == (200, True)
            assert reply.headers["content-disposition"] == 'attachment; filename="qmesh.pyz"'
        peer.get("/qmesh.pyz", method="HEAD")
        assert (await peer.reply(has_body=False)).headers["content-length"] == str(len(data))


@pytest.fixture
def large(archive: Path, tmp_path: Path) -> Path:
    """An archive with more before its program than the systems hold for their sockets."""
    path = tmp_path / "qmesh-any-large.pyz"
    path.write_bytes(b"#!/usr/bin/env python3\n" + random.Random(1).randbytes(24 << 20) + archive.read_bytes())
    return path


@in_a_loop
async def test_a_download_of_the_archive_that_was_cut_goes_on_where_it_stopped(
    topic: str, tmp_path: Path, archive: Path
) -> None:
    data, at = await asyncio.to_thread(archive.read_bytes), 100_000
    async with gateway_process(topic, tmp_path, program=archive) as (_, port), connected(port) as peer:
        peer.get("/qmesh.pyz", method="HEAD")
        head = (await peer.reply(has_body=False)).headers
        assert head["accept-ranges"] == "bytes"
        etag = head["etag"]
        for condition in ([], [f"If-Range: {etag}"]):
            peer.get("/qmesh.pyz", f"Range: bytes={at}-", *condition)
            reply = await peer.reply()
            assert (reply.status, reply.body == data[at:], reply.headers["etag"]) == (206, True, etag)
            assert reply.headers["content-range"] == f"bytes {at}-{len(data) - 1}/{len(data)}"
        peer.get("/qmesh.pyz", f"Range: bytes={at}-", 'If-Range: "another"')
        reply = await peer.reply()
        assert (reply.status, reply.body == data, "content-range" in reply.headers) == (200, True, False)
        peer.get("/qmesh.pyz", f"Range: bytes={len(data)}-")
        reply = await peer.reply()
        assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{len(data)}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@in_a_loop
async def test_curl_goes_on_with_a_cut_download_and_takes_the_archive_s_own_name(
    topic: str, tmp_path: Path, large: Path
) -> None:
    data, place = await asyncio.to_thread(large.read_bytes), tmp_path / "fetched"
    place.mkdir()
    async with gateway_process(topic, tmp_path / "state", program=large) as (_, port):
        url = f"http://{LOOPBACK}:{port}/qmesh.pyz"
        for arguments in (["-OJ", url], ["-C", "-", "-o", "part.pyz", url]):
            (place / "part.pyz").write_bytes(data[:1_000_000])
            curl = await asyncio.create_subprocess_exec("curl", "-sSf", *arguments, cwd=place)
            assert await asyncio.wait_for(curl.wait(), PATIENCE_S) == 0
    assert {path.name: path.read_bytes() == data for path in place.iterdir()} == {large.name: True, "part.pyz": True}


@in_a_loop
async def test_an_archive_that_is_replaced_meanwhile_is_handed_out_as_it_was(
    topic: str, tmp_path: Path, archive: Path, large: Path
) -> None:
    data, new = await asyncio.to_thread(large.read_bytes), await asyncio.to_thread(archive.read_bytes)
    async with gateway_process(topic, tmp_path, program=large) as (_, port):
        async with connected(port) as peer:
            peer.get("/qmesh.pyz")
            head = await peer.head()
            await asyncio.to_thread(shutil.copy, archive, tmp_path / "new")
            await asyncio.to_thread(os.replace, tmp_path / "new", large)
            async with asyncio.timeout(PATIENCE_S):
                assert await peer.reader.readexactly(len(data)) == data
            peer.get("/qmesh.pyz", "Range: bytes=5-", f"If-Range: {head.headers['etag']}")
            reply = await peer.reply()
        assert (reply.status, reply.body == new, reply.headers["etag"] != head.headers["etag"]) == (200, True, True)


@in_a_loop
async def test_an_archive_that_is_written_over_meanwhile_is_not_handed_out_as_a_mixture(
    topic: str, tmp_path: Path, large: Path
) -> None:
    data = await asyncio.to_thread(large.read_bytes)
    async with gateway_process(topic, tmp_path, program=large) as (_, port), connected(port, buffer=4096) as peer:
        peer.get("/qmesh.pyz")
        await peer.head()
        with await asyncio.to_thread(large.open, "r+b") as file:
            file.seek(len(data) - 1_000_000)
            file.write(bytes(1000))
        got = await peer.rest()
    assert len(got) < len(data)
    assert got == data[: len(got)]


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("qmesh-linux-x86_64-cp311.pyz", 'attachment; filename="qmesh-linux-x86_64-cp311.pyz"'),
        ("my lab.pyz", 'attachment; filename="my lab.pyz"'),
        ('a"b\\c.pyz', "attachment; filename=\"a_b_c.pyz\"; filename*=UTF-8''a%22b%5Cc.pyz"),
        ("Übung.pyz", "attachment; filename=\"_bung.pyz\"; filename*=UTF-8''%C3%9Cbung.pyz"),
        ("odd\udcff.pyz", "attachment; filename=\"odd_.pyz\"; filename*=UTF-8''odd%FF.pyz"),
        ("a\r\nb.pyz", "attachment; filename=\"a__b.pyz\"; filename*=UTF-8''a%0D%0Ab.pyz"),
    ],
)
def test_a_file_is_told_by_its_name_whatever_is_in_it(name: str, header: str) -> None:
    assert qmesh.attachment(name) == header


class SlowFile(io.FileIO):
    """A file on a disk that stands still until `goes`."""

    def __init__(self, disk: SlowDisk, path: Path) -> None:
        super().__init__(path)
        self._disk = disk

    def read(self, size: int | None = -1, /) -> bytes:
        self._disk.reading += 1
        self._disk.most = max(self._disk.most, self._disk.reading)
        assert self._disk.goes.wait(PATIENCE_S)
        self._disk.reading -= 1
        return super().read(size)


class SlowDisk:
    """Where the running archive lies; knows all that was opened there, and how many are read at once."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path
        self.goes = threading.Event()
        self.reading = self.most = 0  # the most at once
        self.files: list[SlowFile] = []

    def open(self, mode: str) -> SlowFile:
        self.files.append(SlowFile(self, self._path))
        return self.files[-1]


@pytest.fixture
def slow_disk(archive: Path) -> SlowDisk:
    return SlowDisk(archive)


@in_a_loop
async def test_of_an_archive_on_a_slow_disk_few_pieces_are_read_at_once_also_for_those_who_have_gone(
    topic: str, tmp_path: Path, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads cannot be stopped: it counts until it ends, and its file is closed then."""
    async with gateway_to(topic, tmp_path, keys=(KEY,)) as port, contextlib.AsyncExitStack() as at_last:
        at_last.callback(slow_disk.goes.set)
        monkeypatch.setattr(qmesh, "running_archive", lambda: slow_disk)
        for _ in range(3):
            async with contextlib.AsyncExitStack() as leaving:
                for _ in range(2 * qmesh.ARCHIVE_READERS):
                    peer = await leaving.enter_async_context(connected(port))
                    peer.get("/qmesh.pyz", f"Authorization: Bearer {KEY}")
                    assert (await peer.head()).status == 200
                await until(lambda: slow_disk.reading)
        assert (await fetch(port)).status == 200
        await asyncio.to_thread(int)  # whatever was begun before has its thread
        assert slow_disk.most == qmesh.ARCHIVE_READERS
        await until(lambda: sum(not file.closed for file in slow_disk.files) == qmesh.ARCHIVE_READERS)
        slow_disk.goes.set()
        await until(lambda: all(file.closed for file in slow_disk.files))


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["an archive of which nobody can tell", "a part that is not there"])
@in_a_loop
async def test_an_archive_that_is_not_handed_out_is_closed(
    topic: str, tmp_path: Path, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    slow_disk.goes.set()
    monkeypatch.setattr(qmesh, "is_sealed", lambda file: True)
    async with gateway_to(topic, tmp_path, keys=keys) as port:
        monkeypatch.setattr(qmesh, "running_archive", lambda: slow_disk)
        reply = await fetch(port, "/qmesh.pyz", None, f"Authorization: Bearer {KEY}", "Range: bytes=1000000000-")
        assert reply.status == (416 if keys else 403)
        assert [file.closed for file in slow_disk.files] == [True]


@pytest.fixture
def sealed(archive: Path, tmp_path: Path) -> Path:
    """The archive with a mesh's key in it."""
    path, key = tmp_path / "lab.pyz", tmp_path / "lab.key"
    for command in (["init", key], ["seal", path, "--key", key]):
        subprocess.run([sys.executable, archive, *map(str, command)], check=True, capture_output=True)
    return path


@in_a_loop
async def test_an_archive_with_the_mesh_s_key_is_only_for_those_with_a_key(
    topic: str, tmp_path: Path, sealed: Path
) -> None:
    data, api_key = await asyncio.to_thread(sealed.read_bytes), tmp_path / "api.key"
    async with gateway_process(topic, tmp_path, program=sealed) as (_, port):
        reply = await fetch(port, "/qmesh.pyz")
        assert (reply.status, "holds the mesh's key" in reply.error["message"]) == (403, True)
    await asyncio.to_thread(api_key.write_text, KEY)
    async with gateway_process(topic, tmp_path, "--api-key", str(api_key), program=sealed) as (_, port):
        assert (await fetch(port, "/qmesh.pyz")).status == 401
        reply = await fetch(port, "/qmesh.pyz", None, f"Authorization: Bearer {KEY}")
        assert (reply.status, reply.body == data) == (200, True)
        assert reply.headers["content-disposition"] == 'attachment; filename="lab.pyz"'


def test_a_worker_may_be_a_gateway_as_well(mesh: harness.Mesh) -> None:
    process = mesh.start_worker("--gateway", "--http", "127.0.0.1:0")
    address = urllib.parse.urlsplit(json.loads(process.stdout.readline())["url"])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, {"prompt": "1 2 3 4"})):
            connection.request("POST", path, json.dumps(body | {"max_tokens": 4, "temperature": 0}))
            answer = connection.getresponse()
            told = json.loads(answer.read())
            assert (answer.status, told["usage"]["completion_tokens"]) == (200, 4)
            assert answer.headers["X-QMesh-Worker"] == process.worker_id
            assert told["model"] == process.ready["model"]
        connection.request("POST", CHAT_PATH, json.dumps(STREAM | {"max_tokens": 4}))
        events = Events.of(connection.getresponse().read())
        assert events.done
        assert events.data[-1]["choices"][0]["finish_reason"] == "length"
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--http", "0.0.0.0:0"], "give a key with --api-key FILE"),
        (["--http", "somewhere:0"], "an IP address of this machine"),
        (["--api-key", "no-such-file"], "is no file"),
    ],
)
def test_a_gateway_that_cannot_be_opened_says_why(mesh: harness.Mesh, arguments: list[str], words: str) -> None:
    finished = mesh.run("gateway", *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr


# --- Whatever comes ---

NEAR: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.sampled_from(
        [CHAT["messages"], [], None, [{"role": "user"}], "x", [{"role": "developer", "content": "\0"}]]
    ),
    "prompt": st.sampled_from(["x", ["x", "y"], None, 3, "\ud800"]),
    "model": st.sampled_from(["tiny", "TINY.gguf", None, "", "x", 3, "\ud800", "\x1b[2J"]),
    "n": st.sampled_from([1, 2, 16, 0, 17, None, True, 1.5]),
    "stream": st.sampled_from([True, False, None, 1]),
    "stream_options": st.sampled_from([{"include_usage": True}, {}, None, [], {"x": 1}]),
    "worker": st.sampled_from([None, "0" * 64, "x", 7, ""]),
    "seed": st.sampled_from([1, None, -1, 2**70]),
    "temperature": st.sampled_from([0, 0.5, None, -1, "x"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {}, None, {"type": {}}]),
    "stop": st.sampled_from([[], "x", None, [""], {}]),
    "tools": st.sampled_from([[], None, [{}]]),
}
ALMOST = st.fixed_dictionaries({}, optional=NEAR) | st.dictionaries(
    st.text(max_size=5), st.text(max_size=5), max_size=3
)
OTHER_BODIES = st.binary(max_size=60) | st.sampled_from(
    [b"null", b"[1]", b'"x"', b'{"messages":[{}]}', b"{}{}", b"\xef\xbb\xbf{}"]
)


def test_whatever_is_asked_is_answered_or_refused_and_is_no_fault_of_ours(
    topic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One gateway for all examples, with a worker that answers everything."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        opened = gateway_to(topic, tmp_path, ScriptedWorker(says("h", "i")))
        port = runner.run(stack.enter_async_context(opened))

        async def ask(path: str, body: Any) -> None:
            async with connected(port) as peer:
                peer.post(path, body)
                reply = await peer.reply()
                assert reply.status in (200, 400, 404), (reply.status, body)
                if reply.status != 200:
                    assert reply.error["message"]
                elif reply.headers["content-type"] == qmesh.EVENT_STREAM:
                    assert Events.of(reply.body).done
                peer.get("/health")
                assert (await peer.reply()).status == 200

        @given(st.sampled_from([CHAT_PATH, TEXT_PATH]), ALMOST | OTHER_BODIES, st.booleans())
        @SETTINGS
        def run(path: str, body: Any, is_near: bool) -> None:
            if is_near and isinstance(body, dict):
                body = {
                    "messages" if path == CHAT_PATH else "prompt": CHAT["messages"] if path == CHAT_PATH else "x",
                    **body,
                }
            runner.run(ask(path, body))

        run()
        runner.run(stack.aclose())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@in_a_loop
async def test_whatever_bytes_come_the_gateway_stays_well(topic: str, tmp_path: Path) -> None:
    rng = random.Random(26)
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nOrigin: http://a\r\n\r\n{}{}"
    )
    async with gateway_to(topic, tmp_path, ScriptedWorker(says("hi"))) as port:
        for round_ in range(150):
            data = bytearray(request)
            for _ in range(rng.randint(0, 5)):
                at = rng.randrange(len(data))
                data[at : at + rng.randint(0, 6)] = rng.choice([rng.randbytes(3), b"[", b"\r\n", b"%", b":", b"//"])
            async with connected(port) as peer:
                peer.send(rng.randbytes(40) + b"\r\n\r\n" if round_ % 10 == 0 else bytes(data))
                with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                    async with asyncio.timeout(0.02):
                        assert (await peer.head()).status < 500
        assert (await fetch(port, "/health")).status == 200
