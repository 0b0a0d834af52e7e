"""Embeddings, from the engine to the client: models of random weights, asked alone, in company, and across a mesh."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import secrets
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import http_client
import llama_cpp
import pytest
import tiny_models
from desk import THREADS, Clock, plan_for
from gguf import PoolingType
from loop import PATIENCE_S, in_a_loop
from raw_client import RawClient, connected
from scripted_worker import FINGERPRINT, HANGS_UP, Script, ScriptedWorker, client_of, health_of, mesh_of, sends

import qmesh
from qmesh import (
    Connection,
    DeadlineExceeded,
    Embeddings,
    EmbedJob,
    InvalidRequest,
    Json,
    ModelError,
    ModelNotFound,
    Queued,
    WorkerLost,
)

CONTEXT = 512
SLOTS = 2
TEXTS = ("Hello there", "A second text, which is longer", "x", "y" * 200, "The cat sat on the mat.")
KINDS = {"mean": ("bert", PoolingType.MEAN), "cls": ("bert", PoolingType.CLS), "last": ("qwen2", PoolingType.LAST)}
LONG = ["z" * 1000] * qmesh.MAX_EMBED_TEXTS  # takes a small model some seconds


def embed(*texts: str, timeout_s: float = 1e4, **more: Any) -> EmbedJob:
    return EmbedJob(secrets.token_hex(8), texts, timeout_s=timeout_s, **more)


def product(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


# --- The engine ---


class WatchedModel(qmesh.EmbeddingModel):
    """A model whose steps are watched, take a second each or more, and may fail."""

    def __init__(self, plan: qmesh.EnginePlan) -> None:
        super().__init__(plan)
        self.plan = plan
        self.clock = Clock()
        self.batches: list[list[int]] = []  # how many tokens of each text
        self.fails = False
        self.step_s = 1.0

    def decode(self, entries: Sequence[qmesh.BatchEntry]) -> bool:
        sizes: dict[int, int] = {}
        for entry in entries:
            assert entry.position == sizes.get(entry.slot, 0), "a text has a gap, or two are mixed up"
            sizes[entry.slot] = entry.position + 1
        self.batches.append(list(sizes.values()))
        self.clock.now += self.step_s
        return not self.fails and super().decode(entries)


class Desk:
    """An embedder, and what each of its tickets is told."""

    def __init__(self, model: WatchedModel) -> None:
        self.model = model
        self.model.batches.clear()
        self.embedder = qmesh.Embedder(model, model.plan, "worker-1", model.clock)
        self.told: dict[int, list[Any]] = {}

    def submit(self, job: EmbedJob, client: str = "ann") -> int:
        ticket = len(self.told)
        self.told[ticket] = []
        self.embedder.submit(ticket, client, job)
        self._listen()
        return ticket

    def step(self) -> None:
        self.embedder.step()
        self._listen()

    def finish(self) -> None:
        for _ in range(1000):
            if self.embedder.idle:
                return
            self.step()
        raise AssertionError("the embedder comes to no end")

    def _listen(self) -> None:
        for ticket, event in self.embedder.take_events():
            self.told[ticket].append(event)

    def last(self, ticket: int) -> Any:
        return self.told[ticket][-1] if self.told[ticket] else None

    def vectors(self, *texts: str) -> list[list[float]]:
        ticket = self.submit(embed(*texts))
        self.finish()
        made = self.last(ticket)
        assert isinstance(made, Embeddings), made
        return made.vectors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each of KINDS."""
    place = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.write_model(architecture, place / f"{name}.gguf", pooling)
        for name, (architecture, pooling) in KINDS.items()
    }


@pytest.fixture(scope="module")
def mean(files: dict[str, Path]) -> Iterator[WatchedModel]:
    with contextlib.closing(WatchedModel(plan_for(files["mean"], slots=SLOTS, context=CONTEXT))) as model:
        yield model


@pytest.fixture
def desk(mean: WatchedModel) -> Desk:
    mean.fails, mean.step_s = False, 1.0
    return Desk(mean)


@pytest.mark.parametrize("name", KINDS)
def test_vectors_are_those_of_llama_cpp_python_alone_and_in_company(name: str, files: dict[str, Path]) -> None:
    sizes: Any = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_ubatch": CONTEXT, "n_threads": THREADS}
    with contextlib.closing(llama_cpp.Llama(str(files[name]), embedding=True, verbose=False, **sizes)) as llama:
        theirs: Any = [llama.embed(text, normalize=True) for text in TEXTS]
    with contextlib.closing(WatchedModel(plan_for(files[name], slots=SLOTS, context=CONTEXT))) as model:
        together = Desk(model).vectors(*TEXTS)
        assert len(model.batches) < len(TEXTS), "no text had company"
        alone = [Desk(model).vectors(text)[0] for text in TEXTS]
    for number in range(len(TEXTS)):
        assert product(together[number], theirs[number]) > 0.9999
        assert product(alone[number], theirs[number]) > 0.9999
        assert product(together[number], together[number]) == pytest.approx(1, abs=1e-6)
        assert together[number] == pytest.approx(alone[number], abs=1e-6)
        others = [product(together[number], theirs[other]) for other in range(len(TEXTS)) if other != number]
        assert max(others) < 0.999, "the model tells texts apart too little for the test to mean anything"


def test_a_result_tells_its_model_and_counts_all_tokens(desk: Desk) -> None:
    ticket = desk.submit(embed("abc", "de"))
    desk.finish()
    made = desk.last(ticket)
    model = desk.model.plan.model
    assert (made.model, made.worker_id, made.dimensions) == (model.name, "worker-1", tiny_models.EMBEDDING)
    assert made.fingerprint == model.fingerprint.hex()
    assert made.usage == {"prompt_tokens": 4 + 3}  # each begins with a token of its own
    assert len(made) == 2


def test_a_step_holds_as_many_texts_as_it_has_time_for_and_a_long_one_alone(desk: Desk) -> None:
    texts = ["t" * size for size in (500, 3, *[100] * 9, *[1] * 90)]
    for part in range(0, len(texts), qmesh.MAX_EMBED_TEXTS):
        desk.submit(embed(*texts[part:][: qmesh.MAX_EMBED_TEXTS]))
    desk.finish()
    assert sum(map(len, desk.model.batches)) == len(texts)
    for batch in desk.model.batches:
        assert len(batch) <= qmesh.MAX_STEP_TEXTS
        assert sum(batch) <= qmesh.MAX_CHUNK_TOKENS
    assert [501] in desk.model.batches


def test_a_text_as_long_as_the_context_is_taken_and_one_token_more_refused_with_both_lengths(desk: Desk) -> None:
    assert len(desk.vectors("c" * (CONTEXT - 1))) == 1
    refused = desk.submit(embed("short", "c" * CONTEXT))
    error = desk.last(refused)
    assert isinstance(error, InvalidRequest)
    assert error.code == "context_exceeded"
    assert str(error).startswith("texts[1] has 513 tokens and this worker's context holds 512; split the text, or")
    assert desk.embedder.idle


def test_a_text_that_takes_too_long_is_refused_until_the_machine_is_fast_again(desk: Desk) -> None:
    text, short = embed("c" * (CONTEXT - 1)), embed("c" * 99)
    desk.model.step_s = qmesh.FIRST_CHUNK_TOKENS / 10  # ten tokens a second
    desk.embedder.measure()
    error = desk.last(desk.submit(text))
    assert isinstance(error, InvalidRequest)
    assert error.code == "context_exceeded"
    assert str(error).startswith("texts[0] has 512 tokens, which would take this worker 51 s, and 30 s are its most")
    accepted = desk.submit(short)
    desk.finish()
    assert isinstance(desk.last(accepted), Embeddings)
    desk.model.step_s = 1.0
    accepted = desk.submit(text)
    desk.finish()
    assert isinstance(desk.last(accepted), Embeddings)


def test_requests_with_a_slot_take_turns_so_that_a_small_one_is_soon_done(desk: Desk) -> None:
    large = desk.submit(embed(*["a" * 300] * 40), "ann")
    desk.step()
    small = desk.submit(embed("b"), "bob")
    desk.step()
    desk.step()
    assert isinstance(desk.last(small), Embeddings)
    assert desk.last(large) is None
    desk.finish()
    assert isinstance(desk.last(large), Embeddings)


def test_members_take_turns_in_the_queue_and_hear_their_places(desk: Desk) -> None:
    ann = [desk.submit(embed(*["a" * 300] * 4), "ann") for _ in range(5)]
    desk.step()
    bob = desk.submit(embed("b"), "bob")
    desk.step()
    places = {ticket: news.position for ticket in (*ann, bob) if isinstance(news := desk.last(ticket), Queued)}
    assert places == {ann[2]: 0, bob: 1, ann[3]: 2, ann[4]: 3}
    desk.finish()
    assert all(isinstance(desk.last(ticket), Embeddings) for ticket in (*ann, bob))


def test_a_cancelled_request_is_told_nothing_more_and_leaves_its_slot(desk: Desk) -> None:
    tickets = [desk.submit(embed(*["a" * 300] * 9)) for _ in range(SLOTS + 1)]
    desk.step()
    for ticket in tickets:
        desk.embedder.cancel(ticket)
    assert desk.embedder.idle
    before = len(desk.model.batches)
    assert len(desk.vectors("b")) == 1
    assert len(desk.model.batches) == before + 1
    assert not any(isinstance(event, Embeddings) for ticket in tickets for event in desk.told[ticket])


def test_a_request_that_is_not_done_in_time_ends_so(desk: Desk) -> None:
    late = desk.submit(embed(*["a" * 300] * 9, timeout_s=2.5))
    other = desk.submit(embed(*["b" * 300] * 9))
    desk.finish()
    assert isinstance(desk.last(late), DeadlineExceeded)
    assert isinstance(desk.last(other), Embeddings)


def test_after_a_failed_step_those_in_it_may_go_elsewhere_and_the_next_are_answered_right(desk: Desk) -> None:
    (whole,) = desk.vectors("whole")
    tickets = [desk.submit(embed("one" * 100, "two")), desk.submit(embed("three" * 60))]  # too long to share a step
    desk.model.fails = True
    desk.step()
    desk.model.fails = False
    (other,) = (ticket for ticket in tickets if not isinstance(desk.last(ticket), WorkerLost))
    desk.finish()
    assert isinstance(desk.last(other), Embeddings)
    assert desk.vectors("whole") == [whole]


# --- What a model is made for ---


@pytest.mark.parametrize(
    ("architecture", "pooling", "kind"),
    [
        *(("bert", pooling, "embedding") for pooling in (PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST)),
        *(("bert", pooling, "other") for pooling in (None, PoolingType.NONE, PoolingType.RANK)),
        *(("qwen2", pooling, "text") for pooling in (None, PoolingType.NONE)),
        ("qwen2", PoolingType.LAST, "embedding"),
        ("qwen2", PoolingType.RANK, "other"),
    ],
)
def test_a_header_tells_what_a_model_is_made_for(
    architecture: str, pooling: PoolingType | None, kind: str, tmp_path: Path
) -> None:
    model = qmesh.read_model(tiny_models.write_model(architecture, tmp_path / "model.gguf", pooling))
    assert model.kind == kind
    assert model.to_json()["kind"] == kind


def test_room_is_planned_for_the_choice_of_a_next_token_that_a_decoder_makes_unasked(
    files: dict[str, Path], tmp_path: Path
) -> None:
    writes = qmesh.read_model(tiny_models.write_model("qwen2", tmp_path / "writes.gguf"))
    embeds = qmesh.read_model(files["last"])
    assert embeds.kv_bytes == writes.kv_bytes + 2 * 4 * len(tiny_models.VOCABULARY)


def planned(model: qmesh.ModelFile, context: int | None) -> qmesh.EnginePlan:
    gpu = qmesh.GpuChoice(0, None, "for a test")
    return qmesh.plan_engine(model, slots=None, context=context, threads=1, gpu=gpu, free_bytes=10**9)


def test_a_plan_holds_the_longest_text_once_and_no_more_than_the_model_knows_places_for(files: dict[str, Path]) -> None:
    model = qmesh.read_model(files["mean"])
    assert planned(model, None).context == model.context_length == tiny_models.CONTEXT
    large = replace(model, context_length=32_768, kv_bytes=10**9 // qmesh.DEFAULT_EMBED_CONTEXT // 2)
    assert (planned(large, None).context, planned(large, None).slots) == (2048, qmesh.DEFAULT_SLOTS)
    with pytest.raises(ModelError, match=r"takes texts of up to 1,024 tokens; lower --ctx"):
        planned(model, 1025)
    with pytest.raises(ModelError, match="neither to write text nor to give embeddings"):
        planned(replace(model, kind="other"), None)


def test_the_memory_that_attention_takes_grows_with_the_square_of_the_context(files: dict[str, Path]) -> None:
    model = qmesh.read_model(files["mean"])
    assert model.heads == tiny_models.HEADS
    assert qmesh.attention_bytes(model, 8192) == pytest.approx(1293 * 2**20, rel=0.05)  # as was measured
    many = replace(model, context_length=32_768, heads=64)  # 1,342 MB for 2,048 tokens, and a quarter for half as many
    assert planned(many, None).context == 1024
    with pytest.raises(ModelError, match=r"needs about 1\.3 GB .* lower --slots or --ctx"):
        planned(many, 2048)


# --- Values and frames ---


def made(*vectors: Sequence[float], fingerprint: str = FINGERPRINT.hex(), tokens: int = 1) -> Embeddings:
    data = struct.pack(f"<{sum(map(len, vectors))}f", *(number for vector in vectors for number in vector))
    return Embeddings(data, len(vectors[0]), {"prompt_tokens": tokens}, "tiny", "0" * 64, fingerprint)


def test_the_largest_request_and_the_largest_result_fit_a_frame() -> None:
    texts = ["\x01" * (qmesh.MAX_EMBED_CHARS // qmesh.MAX_EMBED_TEXTS)] * qmesh.MAX_EMBED_TEXTS
    qmesh.encode_frame(embed(*texts).to_json())
    vector = [0.1] * qmesh.MAX_DIMENSIONS
    qmesh.encode_frame(made(*[vector] * qmesh.MAX_EMBED_TEXTS).to_json("r" * qmesh.MAX_ID_CHARS))


def test_vectors_that_a_worker_keeps_count_by_the_memory_they_take() -> None:
    result = made(*[[0.5] * 768] * qmesh.MAX_EMBED_TEXTS)
    kept = qmesh.Kept(b"question", (), (), result, 0.0)
    assert kept.size == len(result.data) // qmesh.KEPT_TOKEN_BYTES == 1024


# --- A client and scripted workers ---


def vector_of(text: str) -> list[float]:
    """What a scripted worker gives for a text."""
    return [float(len(text)), float(ord(text[0])), 0.5]


@dataclass(eq=False)
class Embedding(ScriptedWorker):
    """Embeds what it is asked for, unless `instead` is to be done; of a model with this fingerprint."""

    script: Script = HANGS_UP  # replaced
    instead: Script | None = None
    fingerprint: str = FINGERPRINT.hex()
    kind: str = "embedding"
    under_way: int = 0
    most_under_way: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.script = self.instead or self._embed
        queue = {"active": 0, "waiting": 0, "capacity": 16}
        models = [{"name": self.model, "kind": self.kind, "fingerprint": self.fingerprint}]
        self.status = {"health": health_of(self.score), "slots": 4, "queue": queue, "speed": 1.0, "models": models}

    async def _embed(self, connection: Connection, request_id: str) -> bool:
        vectors = map(vector_of, self.prompts[-1]["texts"])
        await connection.send(made(*vectors, fingerprint=self.fingerprint, tokens=7).to_json(request_id))
        return True


def sends_instead(*vectors: Sequence[float], fingerprint: str = FINGERPRINT.hex()) -> Script:
    return sends(made(*vectors, fingerprint=fingerprint).to_json("replaced"))


FAULTS: dict[str, Script] = {
    "it hangs up": HANGS_UP,
    "it gives too few vectors": sends_instead((1.0, 0.0)),
    "it gives no vectors": sends({**made((1.0,)).to_json("r"), "vectors": "?"}),
    "its vectors are of another model than its status tells": sends_instead((1.0,), (1.0,), fingerprint="ff" * 8),
    "it begins to write": sends({"type": "inference_token", "seq": 0, "tokens": [1], "text": "No"}),
    "it writes": sends(qmesh.Result("No", "stop", {"completion_tokens": 0}, {}, "tiny", "0" * 64).to_json("r")),
    "it has not the model, after all": sends(qmesh.error_frame(None, ModelNotFound("none of mine"))),
    "it leaves": sends(qmesh.error_frame(None, qmesh.Refused("shutting down", "draining"))),
}


@pytest.mark.usefixtures("parting_without_waiting")
@pytest.mark.parametrize("fault", FAULTS)
@in_a_loop
async def test_what_one_worker_does_not_give_the_next_one_does(fault: str, topic: str, tmp_path: Path) -> None:
    bad, good = Embedding(score=95, instead=FAULTS[fault]), Embedding(score=70)
    async with mesh_of(topic, tmp_path, bad, good) as mesh:
        result = await mesh.embed(["two", "texts"])
    assert result.vectors == [vector_of("two"), vector_of("texts")]
    again = fault == "it hangs up"  # it may have kept the request
    assert (len(bad.prompts), len(good.prompts)) == (1 + again, 1)
    assert good.prompts[0]["request_id"] == bad.prompts[0]["request_id"]
    assert good.prompts[0]["resume"] == {"tokens": [], "fingerprint": ""}  # it is not the first that is asked


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_model_without_a_fingerprint_gives_no_vectors_as_others_could_not_be_asked_for_its_like(
    topic: str, tmp_path: Path
) -> None:
    nameless, good = Embedding(score=95, fingerprint="any"), Embedding(score=70)
    async with mesh_of(topic, tmp_path, nameless, good) as mesh:
        result = await mesh.embed("text")
    assert (len(nameless.prompts), result.fingerprint) == (1, good.fingerprint)


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_gateway_gives_vectors_piece_by_piece_in_both_encodings(topic: str, tmp_path: Path) -> None:
    texts = [f"{'long ' * (number % 7)}{number}" for number in range(100)]
    async with mesh_of(topic, tmp_path, Embedding()) as mesh:
        gateway = qmesh.Gateway(mesh, qmesh.GatewayOptions(qmesh.LOOPBACK, 0))
        url, *_ = await gateway.start()
        port = int(url.rstrip("/").rpartition(":")[2])
        try:
            async with http_client.connected(port) as peer:
                peer.post("/v1/embeddings", {"input": texts})
                assert (await peer.head()).status == 200
                pieces = []
                while piece := await peer.chunk():
                    pieces.append(piece)
                assert len(pieces) > len(texts)  # none holds two vectors
                floats = json.loads(b"".join(pieces))
            coded = await http_client.fetch(port, "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
            refused = await http_client.fetch(port, "/v1/embeddings", {"input": texts, "model": "none such"})
        finally:
            await gateway.stop()
    assert [one["embedding"] for one in floats["data"]] == [vector_of(text) for text in texts]
    assert [one["index"] for one in floats["data"]] == list(range(100))
    assert floats["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    data = [base64.b64decode(one["embedding"]) for one in coded.json["data"]]
    assert [list(struct.unpack("<3f", one)) for one in data] == [vector_of(text) for text in texts]
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_many_texts_go_in_several_requests_to_one_model_and_come_back_in_order(
    topic: str, tmp_path: Path
) -> None:
    first, other = Embedding(score=95), Embedding(score=90, fingerprint="ff" * qmesh.FINGERPRINT_BYTES)
    texts = [f"{'long ' * (number % 7)}{number}" for number in range(qmesh.MAX_EMBED_INPUTS)]
    async with mesh_of(topic, tmp_path, first, other) as mesh:
        result = await mesh.embed(texts)
    assert result.vectors == [vector_of(text) for text in texts]
    assert len(first.prompts) == qmesh.MAX_EMBED_INPUTS // qmesh.MAX_EMBED_TEXTS
    assert not other.prompts
    assert {prompt["resume"]["fingerprint"] for prompt in first.prompts[1:]} == {first.fingerprint}
    assert "resume" not in first.prompts[0]
    assert result.usage == {"prompt_tokens": 7 * len(first.prompts)}


def test_texts_are_split_by_their_characters_too_and_none_is_cut() -> None:
    sizes = [200_000, 300_000, 100_000, qmesh.MAX_EMBED_CHARS, *[1] * 70]
    texts = [chr(97 + number % 26) * size for number, size in enumerate(sizes)]
    jobs = qmesh.embed_jobs(texts, model="m", timeout_s=5)
    assert [list(map(len, job.texts)) for job in jobs] == [[200_000, 300_000], [100_000], sizes[3:4], [1] * 64, [1] * 6]
    assert [text for job in jobs for text in job.texts] == texts
    assert {(job.model, job.timeout_s) for job in jobs} == {("m", 5)}
    assert len({job.request_id for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        ([], "texts must be 1 to 2,048, not 0"),
        (["a"] * 2049, "texts must be 1 to 2,048, not 2,049"),
        (["a" * (qmesh.MAX_EMBED_CHARS + 1)], "at most 524,288 characters"),
        ([1], "texts must be text"),
        (7, "texts must be text or a list of texts"),
        (["\ud800"], "half a surrogate pair"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_anybody_is_asked(texts: Any, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        qmesh.embed_jobs(texts, model=None, timeout_s=5)


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_of_one_model_no_other_models_vectors_are_taken(topic: str, tmp_path: Path) -> None:
    strange = "ff" * qmesh.FINGERPRINT_BYTES
    liar = Embedding(score=95, instead=sends_instead((1.0, 0.0), fingerprint=strange))
    async with mesh_of(topic, tmp_path, liar, Embedding(score=60)) as mesh:
        job = embed("text", resume=qmesh.Resume(fingerprint=FINGERPRINT.hex()), timeout_s=PATIENCE_S)
        events = [event async for event in mesh.run(job)]
    assert len(liar.prompts) == 1
    assert isinstance(events[-1], Embeddings)
    assert events[-1].fingerprint == FINGERPRINT.hex()


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_part_that_fails_ends_the_others_and_tells_why(topic: str, tmp_path: Path) -> None:
    worker = Embedding()
    answered = worker.script

    async def script(connection: Connection, request_id: str) -> bool:
        if len(worker.prompts) == 1:
            return await answered(connection, request_id)
        if len(worker.prompts) == 3:
            refusal = InvalidRequest("texts[0] has 9 tokens", "context_exceeded")
            await connection.send(qmesh.error_frame(request_id, refusal))
        return True

    worker.script = script
    async with mesh_of(topic, tmp_path, worker) as mesh:
        with pytest.raises(InvalidRequest, match=r"texts\[0\] has 9 tokens"):
            await mesh.embed(["a"] * (3 * qmesh.MAX_EMBED_TEXTS))
        async with asyncio.timeout(PATIENCE_S):
            cancelled = await worker.cancelled.get()
    assert cancelled in {prompt["request_id"] for prompt in worker.prompts[1:]}


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_where_no_worker_embeds_it_is_said_and_nobody_is_asked_to(topic: str, tmp_path: Path) -> None:
    writer = Embedding(kind="text", model="SmolLM2")
    async with mesh_of(topic, tmp_path, writer) as mesh:
        with pytest.raises(
            ModelNotFound, match=r"no worker gives embeddings; the mesh has: SmolLM2; start one with an"
        ):
            await mesh.embed("text")
        with pytest.raises(ModelNotFound, match=r"SmolLM2 writes text and gives no embeddings; ask a worker with an"):
            await mesh.embed("text", model="SmolLM2")
        with pytest.raises(ModelNotFound, match=r"no worker has the model bge; the mesh has: SmolLM2"):
            await mesh.embed("text", model="bge")
        with pytest.raises(ModelNotFound, match="no worker is left with the model that this was begun with"):
            async for _ in mesh.run(embed("text", resume=qmesh.Resume(fingerprint="ab"), timeout_s=PATIENCE_S)):
                pass
    assert not writer.prompts


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_client_that_leaves_cancels_what_it_asked_for(topic: str, tmp_path: Path) -> None:
    worker = Embedding(instead=sends({"type": "inference_alive"}))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        asking = asyncio.create_task(mesh.embed("text"))
        async with asyncio.timeout(PATIENCE_S):
            while not worker.prompts:  # noqa: ASYNC110 - it is the worker that counts
                await asyncio.sleep(0.01)
            asking.cancel()
            assert await worker.cancelled.get() == worker.prompts[0]["request_id"]
        with pytest.raises(asyncio.CancelledError):
            await asking


# --- Real workers ---


@dataclass
class Mixed:
    """A mesh with one worker that writes and one that embeds."""

    mesh: harness.Mesh
    writer: harness.Process
    embedder: harness.Process


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, model_path: Path, files: dict[str, Path]) -> Iterator[Mixed]:
    with harness.Mesh(tmp_path_factory.mktemp("mesh"), model_path) as mesh:
        writer = mesh.start_worker(ready=False)
        embedder = mesh.start_worker("--model", str(files["mean"]), "--slots", "1", "--queue", "2", ready=False)
        for worker in (writer, embedder):
            worker.wait_ready()
        yield Mixed(mesh, writer, embedder)


@contextlib.asynccontextmanager
async def asking(worker: harness.Process) -> AsyncIterator[RawClient]:
    """A connection to a worker, of somebody who was never here before."""
    keys = qmesh.MeshKeys.derive(worker.ready["mesh"]["topic"])
    host, port = worker.ready["tcp"]
    async with connected((host, port), identity=qmesh.Identity.ephemeral([keys])) as client:
        yield client


async def until_active(client: RawClient, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await client.status())["queue"]["active"] != count:  # noqa: ASYNC110 - a worker tells when it is asked
            await asyncio.sleep(0.01)


async def error_of(client: RawClient, request_id: str) -> Json:
    error = await client.receive_kind("inference_error", request_id)
    return {name: error[name] for name in ("code", "message", "retryable")}


@in_a_loop
async def test_in_a_mixed_mesh_each_request_finds_its_worker_without_a_models_name(
    mixed: Mixed, tmp_path: Path
) -> None:
    async with client_of(mixed.mesh.topic, tmp_path) as mesh:
        for number in range(4):
            result = await mesh.embed(TEXTS)
            assert (result.worker_id, len(result)) == (mixed.embedder.worker_id, len(TEXTS))
            answer = await mesh.ask(f"Count to {number}.", max_tokens=4)
            assert answer.result.worker_id == mixed.writer.worker_id


@in_a_loop
async def test_a_named_model_of_the_other_kind_is_refused_in_words(mixed: Mixed, tmp_path: Path) -> None:
    writer, embedder = mixed.writer.ready["model"], mixed.embedder.ready["model"]
    async with client_of(mixed.mesh.topic, tmp_path) as mesh:
        with pytest.raises(ModelNotFound, match=f"{writer} writes text and gives no embeddings; ask a worker with"):
            await mesh.embed("text", model=writer)
        with pytest.raises(ModelNotFound, match=f"{embedder} gives embeddings and writes no text; ask a worker with"):
            await mesh.ask("text", model=embedder)


@in_a_loop
async def test_a_worker_refuses_what_its_model_is_not_made_for(mixed: Mixed) -> None:
    async with asking(mixed.writer) as client:
        await client.embed("r", "text")
        error = await error_of(client, "r")
        assert (error["code"], error["retryable"]) == ("model_not_found", False)
        assert "writes text and gives no embeddings; ask a worker with an embedding model, such as" in error["message"]
    async with asking(mixed.embedder) as client:
        await client.ask("r")
        error = await error_of(client, "r")
        assert error["code"] == "model_not_found"
        assert error["message"].startswith("mean gives embeddings and writes no text; ask a worker with a model that")


@in_a_loop
async def test_a_worker_answers_in_one_frame(mixed: Mixed) -> None:
    async with asking(mixed.embedder) as client:
        await client.embed("r", *TEXTS)
        body = await client.receive_kind("embedding_result")
    tokens = sum(1 + len(text.replace(" ", "▁").encode()) for text in TEXTS)  # one for each byte, and one before
    assert body["request_id"] == "r"
    assert body["dimensions"] == tiny_models.EMBEDDING
    assert body["usage"] == {"prompt_tokens": tokens}
    assert (body["model"], body["worker_id"]) == ("mean", mixed.embedder.worker_id)
    assert len(base64.b64decode(body["vectors"])) == 4 * tiny_models.EMBEDDING * len(TEXTS)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"texts": []}, "texts must be 1 to 64, not 0"),
        ({"texts": ["a"] * 65}, "texts must be 1 to 64, not 65"),
        ({"texts": [7] * 65}, "texts must be 1 to 64, not 65"),
        ({"texts": ["a", 7]}, "texts[1] must be text"),
        ({"texts": "a"}, "texts must be a list"),
        ({"texts": ["a"], "timeout_s": 0}, "timeout_s must be more than 0"),
        ({"texts": ["a"], "model": 7}, "model must be text"),
        ({"texts": ["a" * 1025]}, "texts[0] has 1,026 tokens and this worker's context holds 1,024"),
    ],
)
@in_a_loop
async def test_what_is_wrong_with_a_request_is_named(mixed: Mixed, fields: Json, what: str) -> None:
    async with asking(mixed.embedder) as client:
        await client.embed("r", **fields)
        error = await error_of(client, "r")
        assert error["code"] in ("invalid_request", "context_exceeded")
        assert what in error["message"]


@in_a_loop
async def test_what_is_cancelled_frees_the_worker_and_is_not_spoken_of_again(mixed: Mixed) -> None:
    async with asking(mixed.embedder) as client:
        await client.embed("long", *LONG)
        await until_active(client, 1)
        await client.send({"type": "cancel", "request_id": "long"})
        await client.embed("short", "text")
        body = await client.receive()
        assert (body["type"], body["request_id"]) == ("embedding_result", "short")
        assert (await client.status())["queue"]["active"] == 0


@in_a_loop
async def test_who_comes_back_is_told_what_was_made_also_where_nobody_else_gets_in(mixed: Mixed) -> None:
    async with asking(mixed.embedder) as client:
        await client.embed("kept", *TEXTS)
        first = await client.receive_kind("embedding_result")
    async with asking(mixed.embedder) as client:
        for number in range(2):
            await client.embed(f"long-{number}", *LONG)
        await client.embed("refused", *TEXTS)
        assert (await error_of(client, "refused"))["code"] == "overloaded"
        await client.embed("kept", *TEXTS, resume={"tokens": [], "fingerprint": ""})
        assert await client.receive_kind("embedding_result", "kept") == first


def test_programs_and_people_are_told_what_a_worker_is_for(mixed: Mixed) -> None:
    assert (mixed.embedder.ready["kind"], mixed.writer.ready["kind"]) == ("embedding", "text")
    kinds = {worker["worker_id"]: worker["models"][0]["kind"] for worker in mixed.mesh.json("status")["workers"]}
    assert kinds == {mixed.embedder.worker_id: "embedding", mixed.writer.worker_id: "text"}
    assert "mean (embedding)" in mixed.mesh.run("status").stdout
    assert "no chat template" not in mixed.embedder.stderr


def test_a_worker_tells_its_owner_that_it_embeds(mixed: Mixed, files: dict[str, Path]) -> None:
    worker = mixed.mesh.popen("worker", "--model", str(files["cls"]), *harness.WORKER_FLAGS)
    watchdog = threading.Timer(PATIENCE_S, worker.kill)
    watchdog.start()
    try:
        assert worker.stderr is not None
        assert any("serves cls, an embedding model (4 slots, 1 thread)" in line for line in worker.stderr)
    finally:
        watchdog.cancel()
        worker.kill()
        worker.communicate()


def test_the_list_of_models_tells_what_each_is_for(mixed: Mixed, files: dict[str, Path]) -> None:
    command = [sys.executable, str(harness.PROGRAM), "models"]
    listed = subprocess.run(command, cwd=files["mean"].parent, capture_output=True, text=True, check=True)
    kinds = {name: kind for name, kind, *_ in map(str.split, listed.stdout.splitlines())}
    assert kinds["NAME"] == "KIND"
    assert {name: kinds[name] for name in files} == dict.fromkeys(files, "embedding")
    assert kinds[mixed.writer.ready["model"]] == "text"


def test_a_program_without_asyncio_gets_embeddings_too(mixed: Mixed, tmp_path: Path) -> None:
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=mixed.mesh.topic, state_dir=str(tmp_path))
    with qmesh.BlockingClient(settings) as mesh:
        one, other = mesh.embed(["a text", "another"]).vectors
        assert mesh.embed("a text").vectors == [pytest.approx(one, abs=1e-6)]
    assert one != other


@in_a_loop
async def test_embeddings_survive_the_death_of_their_worker(
    model_path: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    with harness.Mesh(tmp_path, files["mean"]) as place:
        workers = {worker.worker_id: worker for worker in place.start_workers(2)}
        async with client_of(place.topic, tmp_path / "client") as mesh:
            lost, selected, result = [], [], None
            async for event in mesh.run(embed(*LONG[:16], timeout_s=PATIENCE_S)):
                if isinstance(event, qmesh.Selected):
                    selected.append(event.worker_id)
                    if len(selected) == 1:
                        killing = asyncio.create_task(kill_at_work(workers[event.worker_id]))
                elif isinstance(event, qmesh.Lost):
                    lost.append(event.worker_id)
                elif isinstance(event, Embeddings):
                    result = event
            await killing
    assert result is not None
    assert len(result) == 16
    assert [*lost, result.worker_id] == selected
    assert len(set(selected)) == 2


async def kill_at_work(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await until_active(client, 1)
        worker.popen.kill()
