"""Section 12, Metrics, and what workers and clients count: pages as Prometheus' own parser reads them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from desk import SilentEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import PATIENCE_S, in_a_loop
from prometheus_client.parser import text_string_to_metric_families
from raw_client import RawClient, connected
from scripted_worker import client_of, health_of, until_known

import qmesh
from qmesh import (
    Answer,
    ClientTally,
    Embeddings,
    Histogram,
    Json,
    Lost,
    Metric,
    QMeshError,
    Refused,
    RequestTable,
    RequestTally,
    Result,
    Token,
    Waiting,
    counted,
    mesh_metrics,
    metrics_text,
)

SHORT = {"max_tokens": 4, "temperature": 0}
LONG = {"max_tokens": 900, "temperature": 0}  # over many seconds, unless it is cut short

Page = dict[str, float]
"""Numbers by the name of their sample and its labels, in order: `cups_total{who="ann"}`."""


def page_of(metrics: Iterable[Metric]) -> Page:
    """What Prometheus' own parser reads on a page. No sample stands twice."""
    page: Page = {}
    for family in text_string_to_metric_families(metrics_text(metrics)):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in page
            page[name] = sample.value
    return page


def counts_of(page: Page, name: str) -> dict[str, float]:
    """The samples of one name that are not 0, by the value of their only label."""
    found = {key: value for key, value in page.items() if key.startswith(f"{name}{{")}
    return {key.split('"')[1]: value for key, value in found.items() if value}


def result_of(tokens: int = 3, **usage: int) -> Result:
    told = {"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": tokens, **usage}
    return Result("text", "stop", told, {"queue_ms": 1500.0}, "tiny", "0" * 64)


# --- Histograms ---


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(1, 5))))
def test_a_histograms_ranges_hold_what_is_not_above_their_bounds(observed: list[tuple[float, int]]) -> None:
    histogram = Histogram(qmesh.WAIT_BOUNDS_S)
    for value, times in observed:
        histogram.observe(value, times)
    page = page_of([Metric.of("wait_seconds", "histogram", "Waited.", histogram)])
    for bound in qmesh.WAIT_BOUNDS_S:
        expected = sum(times for value, times in observed if value <= bound)
        assert page[f'wait_seconds_bucket{{le="{bound}"}}'] == expected
    everything = sum(times for _, times in observed)
    assert page['wait_seconds_bucket{le="+Inf"}'] == page["wait_seconds_count"] == everything
    assert page["wait_seconds_sum"] == pytest.approx(sum(value * times for value, times in observed))


@pytest.mark.parametrize("bound", [*qmesh.WAIT_BOUNDS_S, *qmesh.TOKEN_BOUNDS_S])
def test_a_value_on_a_bound_is_below_it(bound: float) -> None:
    histogram = Histogram([bound])
    histogram.observe(bound)
    assert histogram.cumulative() == [(str(bound), 1), ("+Inf", 1)]


def test_a_histogram_may_have_labels() -> None:
    ann, bob = Histogram([1.0]), Histogram([1.0])
    ann.observe(0.5)
    bob.observe(2)
    page = page_of([Metric("wait_seconds", "histogram", "Waited.", ("who",), {("ann",): ann, ("bob",): bob})])
    assert page['wait_seconds_bucket{le="1.0",who="ann"}'] == 1
    assert page['wait_seconds_bucket{le="1.0",who="bob"}'] == 0
    assert page['wait_seconds_sum{who="bob"}'] == 2


# --- The page ---


@given(st.text(), st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_read_again_as_it_is_shown(about: str, first: str, second: str) -> None:
    metric = Metric("cups", "gauge", about.replace("\r", ""), ("who", "where"), {(first, second): 7})
    (line,) = [line for line in metrics_text([metric]).split("\n") if not line.startswith("#") and line]
    (family,) = text_string_to_metric_families(f"{line}\n")
    (sample,) = family.samples
    assert sample.labels == {"who": qmesh.printable(first), "where": qmesh.printable(second)}
    assert sample.value == 7


def test_what_a_metric_is_about_is_escaped() -> None:
    text = metrics_text([Metric.of("cups", "gauge", 'Cups of "tea"\nand \\ more.', 1)])
    (family,) = text_string_to_metric_families(text)
    assert (family.documentation, family.type) == ('Cups of "tea"\nand \\ more.', "gauge")
    assert len(text.splitlines()) == 3


def test_no_value_of_a_label_breaks_its_line() -> None:
    text = metrics_text([Metric.by("cups", "gauge", "Cups.", "who", {'"} 1\ncups{who="eve': 1, "\ud800\x1b[2J": 2})])
    assert text.splitlines()[2:] == ['cups{who="\\"} 1?cups{who=\\"eve"} 1', 'cups{who="??[2J"} 2']


def test_the_page_is_in_one_order_however_it_was_counted() -> None:
    def metrics(names: Iterable[str], who: Iterable[str]) -> list[Metric]:
        return [Metric.by(name, "gauge", "Cups.", "who", dict.fromkeys(who, 1)) for name in names]

    pages = {metrics_text(metrics(names, "ba")) for names in itertools.permutations(["b", "c", "a"])}
    assert pages == {metrics_text(metrics("abc", "ab"))}


def test_a_name_that_stands_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="cups stands twice"):
        metrics_text([Metric.of("cups", "gauge", "", 1), Metric.of("mugs", "gauge", "", 1)] * 2)


@pytest.mark.parametrize(
    ("name", "kind", "labels", "samples"),
    [
        ("cups", "counter", (), {}),
        ("cups_total", "gauge", (), {}),
        ("cups", "summary", (), {}),
        ("Cups of tea", "gauge", (), {}),
        ("cups", "gauge", ("wh o",), {}),
        ("cups", "gauge", ("who",), {(): 1.0}),
        ("cups", "gauge", (), {("ann",): 1.0}),
    ],
)
def test_a_metric_that_prometheus_would_not_take_cannot_be_made(
    name: str, kind: str, labels: tuple[str, ...], samples: dict[tuple[str, ...], float]
) -> None:
    with pytest.raises(ValueError, match=name):
        Metric(name, kind, "", labels, samples)


def test_values_that_are_alike_once_they_are_cut_are_told_once() -> None:
    long = "x" * qmesh.MAX_SHOWN_CHARS
    assert page_of([Metric.by("cups", "gauge", "", "who", {f"{long}b": 2, f"{long}a": 1})]) == {
        f'cups{{who="{long}"}}': 1
    }


def test_no_metric_has_more_samples_than_are_allowed() -> None:
    many = {str(number): float(number) for number in range(qmesh.MAX_SAMPLES + 10)}
    assert len(page_of([Metric.by("cups", "gauge", "", "who", many)])) == qmesh.MAX_SAMPLES


@pytest.mark.parametrize("value", [0, 1, -3, 0.1, 1e-9, 2**53, 1e300, 10**4000, -(10**4000), 1.7e308])
def test_any_number_is_one_that_prometheus_reads(value: float) -> None:
    expected = value if abs(value) < qmesh.MAX_SAMPLE else qmesh.MAX_SAMPLE * (1 if value > 0 else -1)
    assert page_of([Metric.of("cups", "gauge", "", value)]) == {"cups": expected}


# --- A tally ---


def test_a_request_is_counted_with_its_tokens_and_times() -> None:
    tally = RequestTally()
    tallied = tally.begin(100.0)
    tallied.given(1, 100.25)
    tallied.given(2, 100.75)
    tallied.given(0, 100.8)  # the rest of a text, without a token
    tallied.end("done", 101.5, result_of())
    page = page_of(tally.metrics("it"))
    assert counts_of(page, "it_requests_total") == {"done": 1}
    assert page["it_requests_in_progress"] == 0
    assert [page[f"it_{kind}_tokens_total"] for kind in ("prompt", "cached", "generated")] == [10, 4, 3]
    assert page["it_time_to_first_token_seconds_sum"] == 0.25
    assert page["it_time_per_token_seconds_count"] == 2
    assert page["it_time_per_token_seconds_sum"] == 0.5
    assert page['it_time_per_token_seconds_bucket{le="0.2"}'] == 0
    assert page['it_time_per_token_seconds_bucket{le="0.5"}'] == 2
    assert page["it_queue_time_seconds_sum"] == 1.5
    assert page["it_request_duration_seconds_sum"] == 1.5


def test_embeddings_are_counted_without_a_time_in_the_queue_which_no_worker_tells_of_them() -> None:
    tally = RequestTally()
    made = Embeddings(bytes(4), 1, {"prompt_tokens": 7}, "tiny", "0" * 64, "")
    tally.begin(0.0).end("done", 2.0, made)
    page = page_of(tally.metrics("it"))
    assert (page["it_prompt_tokens_total"], page["it_request_duration_seconds_sum"]) == (7, 2)
    assert page["it_queue_time_seconds_count"] == 0


def test_a_request_without_an_answer_has_neither_a_prompt_nor_a_duration() -> None:
    tally = RequestTally()
    tally.begin(0.0).end("cancelled", 9.0)
    page = page_of(tally.metrics("it"))
    assert counts_of(page, "it_requests_total") == {"cancelled": 1}
    assert page["it_request_duration_seconds_count"] == page["it_prompt_tokens_total"] == 0


def test_every_outcome_is_there_before_the_first_so_that_a_rate_sees_it() -> None:
    page = page_of(RequestTally().metrics("it"))
    assert {f'it_requests_total{{outcome="{code}"}}' for code in ("done", *qmesh.ERROR_CODES)} <= page.keys()


def test_outcomes_are_bounded_and_those_beyond_count_as_internal() -> None:
    tally = RequestTally()
    for number in range(100):
        tally.begin(0.0).end(f"code {number}", 1.0)
    assert len(tally.outcomes) == qmesh.MAX_OUTCOMES
    assert tally.outcomes.total() == 100
    assert tally.outcomes["internal"] == 100 - (qmesh.MAX_OUTCOMES - len(qmesh.OUTCOMES))


def test_what_a_worker_says_of_an_answer_cannot_spoil_a_tally() -> None:
    tally = RequestTally()
    usage = {"prompt_tokens": 10**4000, "cached_tokens": 10**4000}
    for queue_ms in (-1e300, 1e300):
        tally.begin(0.0).end("done", 1.0, Result("", "stop", usage, {"queue_ms": queue_ms}, "tiny", ""))
    tally.begin(0.0).end("done", 1.0, Result("", "stop", {}, {}, "tiny", ""))
    page = page_of(tally.metrics("it"))
    assert page["it_prompt_tokens_total"] == page["it_cached_tokens_total"] == 2 * qmesh.MAX_TOKENS_LIMIT
    assert page["it_queue_time_seconds_sum"] == qmesh.MAX_TIMEOUT_S


# --- A worker's table of requests: each request that is taken ends once, whatever happens ---


class Listener:
    """A session, without its connection."""

    def __init__(self, member: str) -> None:
        self.member = member
        self.requests: list[qmesh.Request] = []

    def follow(self, request: qmesh.Request) -> None:
        self.requests.append(request)

    def forget(self, request: qmesh.Request) -> None:
        self.requests.remove(request)

    def tell(self, request_id: str, said: qmesh.Said) -> None: ...

    def speak(self) -> None: ...

    def show_life(self, request: qmesh.Request) -> None: ...


CAPACITY = 4
HAPPENINGS = ["asked", "resumed", "token", "result", "error", "cancel", "leave", "late", "stale", "end all"]


def happen(table: RequestTable, what: str, number: int, members: dict[str, Any], begun: list[qmesh.Request]) -> None:
    """One thing happens to one of the requests that were ever taken, or to a new one."""
    if what in ("asked", "resumed"):
        given_before = (1, 2) if what == "resumed" else ()
        job = qmesh.Job(f"r{len(begun)}", prompt="hello", resume=qmesh.Resume(given_before) if given_before else None)
        session = members["ab"[number % 2]]
        try:
            table.begin(session, job)
            begun.append(session.requests[-1])
        except QMeshError as error:
            table.count_refusal(error)
    elif what == "end all":
        table.end_all(Refused("enough", "draining"))
    elif begun:
        request = begun[number % len(begun)]
        engine_says: dict[str, Any] = {
            "token": Token(0, (1,), "x"),
            "result": result_of(),
            "error": QMeshError("the engine failed"),
            "stale": result_of(),
        }
        if what in engine_says:
            ticket = -1 if what == "stale" else request.ticket
            table.on_events([(ticket, engine_says[what])])
        elif what == "late":
            request.deadline = 0.0
            table.look_after()
        else:
            {"cancel": table.cancel, "leave": table.leave}[what](request)
            with contextlib.suppress(ValueError):  # as a session does with a request that it has still
                request.session.forget(request)


@given(st.lists(st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 40)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_request_that_is_taken_is_counted_with_exactly_one_outcome(happenings: list[tuple[str, int]]) -> None:
    async def go_through() -> None:
        table = RequestTable(SilentEngine(), CAPACITY)
        members, begun = {name: Listener(name) for name in "ab"}, list[qmesh.Request]()
        for what, number in happenings:
            happen(table, what, number, members, begun)
            assert table.tally.begun == len(begun)
            assert table.tally.outcomes.total() == len(begun) - len(table)
        asked = sum(what in ("asked", "resumed") for what, _ in happenings)
        assert table.refused.total() == table.refused["queue_full"] == asked - len(begun)
        page = page_of(table.metrics())
        assert page["qmesh_worker_requests_in_progress"] == len(table)
        taken_over = sum(bool(request.job.given) for request in begun)
        assert page['qmesh_worker_resumed_requests_total{begun="elsewhere"}'] == taken_over

    asyncio.run(go_through())


@in_a_loop
async def test_each_way_to_end_has_its_outcome() -> None:
    table, session, begun = RequestTable(SilentEngine(), CAPACITY), Listener("a"), list[qmesh.Request]()
    for what in ("result", "error", "cancel", "leave", "late", "end all"):
        for now in ("asked", what):
            happen(table, now, len(begun) - 1, {"a": session, "b": session}, begun)
    ended = {"done": 1, "internal": 1, "cancelled": 1, "disconnected": 1, "timeout": 1, "draining": 1}
    assert counts_of(page_of(table.metrics()), "qmesh_worker_requests_total") == ended


@in_a_loop
async def test_a_full_queue_is_a_reason_of_its_own_and_who_makes_room_for_others_counts_as_refused_by_overload() -> (
    None
):
    table, begun = RequestTable(SilentEngine(), CAPACITY), list[qmesh.Request]()
    members = {"a": Listener("a"), "b": Listener("b")}
    for _ in range(CAPACITY + 2):
        happen(table, "asked", 0, members, begun)
    happen(table, "asked", 1, members, begun)
    page = page_of(table.metrics())
    assert counts_of(page, "qmesh_worker_refused_requests_total") == {"queue_full": 2}
    assert counts_of(page, "qmesh_worker_requests_total") == {"overloaded": 1}
    assert page["qmesh_worker_requests_in_progress"] == page["qmesh_worker_queue_capacity"] == CAPACITY


# --- A client's requests ---


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Story:
    """Events as `Client.run` tells them: each a second after the one before. An error at the end is raised."""

    def __init__(self, clock: Clock, *events: Any) -> None:
        self.closed = False
        self._clock = clock
        self._events = events

    async def run(self) -> AsyncGenerator[Any, None]:
        try:
            for event in self._events:
                self._clock.now += 1
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


ANSWER = Answer(result_of(), 2, 1.0, 2.0, 3.0)


@in_a_loop
async def test_what_a_client_is_told_is_passed_on_and_counted() -> None:
    events = [
        qmesh.Discovered(2),
        Token(0, (1,), "a"),
        Lost("0" * 64, "it died", 1),
        Waiting("nobody is there"),
        Waiting("nobody is there"),
        Token(1, (2, 3), "bc"),
        ANSWER,
    ]
    clock, tally = Clock(), ClientTally()
    told = [event async for event in counted(Story(clock, *events).run(), tally, clock)]
    assert told == events
    page = page_of(tally.metrics("qmesh_gateway"))
    assert counts_of(page, "qmesh_gateway_requests_total") == {"done": 1}
    counters = {name: page[f"qmesh_gateway_{name}_total"] for name in ("workers_lost", "failovers", "waits")}
    assert counters == {"workers_lost": 1, "failovers": 2, "waits": 2}
    assert page["qmesh_gateway_generated_tokens_total"] == 3
    assert page["qmesh_gateway_time_to_first_token_seconds_sum"] == 2
    assert (page["qmesh_gateway_time_per_token_seconds_sum"], page["qmesh_gateway_time_per_token_seconds_count"]) == (
        4,
        2,
    )
    assert page["qmesh_gateway_request_duration_seconds_sum"] == 7


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (qmesh.NoWorkerFound("none"), "no_worker"),
        (Refused("full"), "overloaded"),
        (qmesh.InvalidRequest("too long", "context_exceeded"), "context_exceeded"),
        (qmesh.WorkerLost("gone"), "lost"),
        (ZeroDivisionError(), "internal"),
    ],
)
@in_a_loop
async def test_an_error_is_passed_on_and_counted_by_its_code(error: Exception, outcome: str) -> None:
    clock, tally = Clock(), ClientTally()
    with pytest.raises(type(error)):
        async for _ in counted(Story(clock, qmesh.Discovered(1), error).run(), tally, clock):
            pass
    assert counts_of(page_of(tally.metrics("it")), "it_requests_total") == {outcome: 1}


@in_a_loop
async def test_who_leaves_early_has_cancelled_and_the_request_is_closed() -> None:
    clock, tally = Clock(), ClientTally()
    story = Story(clock, Token(0, (1,), "a"), ANSWER)
    async with contextlib.aclosing(counted(story.run(), tally, clock)) as events:
        async for _ in events:
            assert page_of(tally.metrics("it"))["it_requests_in_progress"] == 1
            break
    assert story.closed
    assert counts_of(page_of(tally.metrics("it")), "it_requests_total") == {"cancelled": 1}


@in_a_loop
async def test_who_leaves_with_the_answer_has_it() -> None:
    clock, tally = Clock(), ClientTally()
    async with contextlib.aclosing(counted(Story(clock, ANSWER).run(), tally, clock)) as events:
        assert await anext(events) is ANSWER
    assert counts_of(page_of(tally.metrics("it")), "it_requests_total") == {"done": 1}


# --- The mesh ---


def status_of(worker_id: str, score: float = 80, **more: Any) -> Json:
    queue = {"active": 2, "waiting": 1, "capacity": 16}
    status = {"health": health_of(score), "slots": 4, "queue": queue, "speed": 7.5, "models": [{"name": "tiny"}]}
    return {"worker_id": worker_id, **status, **more}


def test_one_page_shows_how_every_worker_does() -> None:
    page = page_of(mesh_metrics([status_of("a" * 64), status_of("b" * 64, score=10)], unreachable=3))
    assert (page["qmesh_mesh_workers"], page["qmesh_mesh_workers_unreachable"]) == (2, 3)
    a, b = ('{model="tiny",worker="aaaaaa"}', '{model="tiny",worker="bbbbbb"}')
    assert (page[f"qmesh_mesh_worker_health_score{a}"], page[f"qmesh_mesh_worker_health_score{b}"]) == (80, 10)
    expected = {"cpu_used_ratio": 0.01, "memory_used_ratio": 0.02, "queue_free_ratio": 0.03, "slots": 4}
    expected |= {"requests_active": 2, "requests_waiting": 1, "tokens_per_second": 7.5}
    assert {name: page[f"qmesh_mesh_worker_{name}{a}"] for name in expected} == pytest.approx(expected)
    states = {
        state: page[f'qmesh_mesh_worker_state{{model="tiny",state="{state}",worker="bbbbbb"}}'] for state in STATES
    }
    assert states == {"healthy": 0, "busy": 0, "overloaded": 1}


STATES = [state.value for state in qmesh.HealthState]


def test_a_worker_whose_id_begins_like_anothers_takes_nobodys_place() -> None:
    page = page_of(mesh_metrics([status_of("a" * 64, 80), status_of("a" * 63 + "b", 10), status_of("c" * 64, 50)]))
    scores = {name.split('worker="')[1][:-2]: value for name, value in page.items() if "health_score" in name}
    assert scores == {"a" * 64: 80, "a" * 63 + "b": 10, "cccccc": 50}


def test_a_mesh_without_workers_is_a_page_too() -> None:
    assert page_of(mesh_metrics([])) == {"qmesh_mesh_workers": 0, "qmesh_mesh_workers_unreachable": 0}


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**400), st.booleans())
def test_no_status_that_makes_sense_spoils_the_page(name: str, speed: float, count: int, nameless: bool) -> None:
    queue = {"active": count, "waiting": count}
    models = [] if nameless else [{"name": name}]
    bad = status_of("b" * 64, slots=count, queue=queue, speed=speed, models=models)
    with contextlib.suppress(qmesh.WireError):
        qmesh.check_status(bad)
        page = page_of(mesh_metrics([status_of("a" * 64), bad]))
        assert page['qmesh_mesh_worker_slots{model="tiny",worker="aaaaaa"}'] == 4
        assert len([name for name in page if name.startswith("qmesh_mesh_worker_slots")]) == 2


# --- The machine ---


def test_cards_are_told_and_what_they_do_not_say_is_left_out() -> None:
    cards = [qmesh.GpuLoad("T4", 300, 1000, 7.0), qmesh.GpuLoad("T4", 100, 1000, None)]
    assert page_of(qmesh.gpu_metrics(cards)) == {
        'qmesh_gpu_memory_used_bytes{gpu="0",name="T4"}': 300,
        'qmesh_gpu_memory_used_bytes{gpu="1",name="T4"}': 100,
        'qmesh_gpu_memory_bytes{gpu="0",name="T4"}': 1000,
        'qmesh_gpu_memory_bytes{gpu="1",name="T4"}': 1000,
        'qmesh_gpu_used_ratio{gpu="0",name="T4"}': 0.07,
    }
    assert qmesh.gpu_metrics([]) == []


# --- A real worker, and clients of it ---


@contextlib.asynccontextmanager
async def worker_on(topic: str, state_dir: Path, model: Path, *, yields: bool = False) -> AsyncIterator[qmesh.Worker]:
    """A worker in this process, with one slot and room for another request."""
    network = qmesh.Settings(host=qmesh.LOOPBACK, port=0, topic=topic, state_dir=str(state_dir), model=str(model))
    options = qmesh.WorkerOptions(slots=1, context=1024, queue=2, threads=1, nice=0, grace_s=0.0, yields=yields)
    worker = qmesh.Worker(network, options, environ={})
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


@contextlib.asynccontextmanager
async def reaching(worker: qmesh.Worker) -> AsyncIterator[RawClient]:
    async with connected(worker.address, identity=qmesh.Identity.ephemeral(worker.meshes)) as client:
        yield client


async def until_page(worker: qmesh.Worker, holds: Callable[[Page], bool]) -> Page:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            page = page_of(worker.metrics())
            if holds(page):
                return page
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_worker_and_its_client_count_the_same_answer_alike(
    topic: str, tmp_path: Path, model_path: Path
) -> None:
    tally = ClientTally()
    async with worker_on(topic, tmp_path, model_path) as worker, client_of(topic, tmp_path) as client:
        await until_known(client, 1)
        job = qmesh.new_job("Why is the sky blue?", max_tokens=12, temperature=0)
        told = [event async for event in counted(client.run(job), tally)]
        usage = told[-1].result.usage if isinstance(told[-1], Answer) else {}
        job = qmesh.new_job("Why is the sky blue?", max_tokens=900, temperature=0)
        async with contextlib.aclosing(counted(client.run(job), tally)) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
        ended = {"done": 1, "cancelled": 1}
        page = await until_page(worker, lambda page: counts_of(page, "qmesh_worker_requests_total") == ended)
        ours = page_of(tally.metrics("qmesh_worker"))
        dht = page_of(client.node.metrics())
    assert usage["completion_tokens"] == 12
    assert counts_of(ours, "qmesh_worker_requests_total") == ended
    for side in (page, ours):
        assert side["qmesh_worker_prompt_tokens_total"] == usage["prompt_tokens"]
        assert side["qmesh_worker_time_to_first_token_seconds_count"] == 2
        assert side["qmesh_worker_generated_tokens_total"] == 2 + side["qmesh_worker_time_per_token_seconds_count"]
        assert side["qmesh_worker_request_duration_seconds_count"] == side["qmesh_worker_queue_time_seconds_count"] == 1
        assert side["qmesh_worker_requests_in_progress"] == 0
    assert page["qmesh_worker_generated_tokens_total"] >= ours["qmesh_worker_generated_tokens_total"] >= 13
    assert page["qmesh_worker_tokens_per_second"] > 0
    assert dht["qmesh_dht_received_datagrams_total"] > 0
    assert dht['qmesh_dht_messages_total{type="beacon"}'] > 0
    assert dht["qmesh_dht_deaf"] == 0
    assert dht["qmesh_dht_sent_bytes_total"] > dht["qmesh_dht_sent_datagrams_total"] > 0


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_worker_counts_what_it_refuses_and_how_requests_end(
    topic: str, tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker_on(topic, tmp_path, model_path) as worker:
        async with reaching(worker) as client:
            await client.ask("a", model="gpt-17", params=SHORT)
            await client.ask("b", params={"max_tokens": 0})
            await client.ask("c", prompt="one two " * 1024, params=SHORT)  # taken, and found to be too long then
            fingerprint = worker.engine.plan.model.fingerprint.hex()
            await client.ask("d", params=SHORT, resume={"tokens": [1, 2], "fingerprint": fingerprint})
            await client.receive_kind("inference_result", "d")
            await client.ask("d", params=SHORT, resume={"tokens": [1, 2], "fingerprint": fingerprint})
            await client.receive_kind("inference_result", "d")  # as it was kept
            await client.ask("e", params=LONG, timeout_s=0.3)
            await client.receive_kind("inference_error", "e")
            await client.ask("f", params=LONG)
            await client.receive_kind("inference_token", "f")
            page = page_of(worker.metrics())
            assert (page["qmesh_worker_requests_active"], page["qmesh_worker_requests_waiting"]) == (1, 0)
            assert page["qmesh_worker_requests_in_progress"] == 1
            assert page["qmesh_worker_queue_free_ratio"] == 0.5
            monkeypatch.setattr(qmesh, "OVERLOADED_BELOW", 101.0)
            await client.ask("g", params=SHORT)
            await client.receive_kind("inference_error", "g")
            worker.draining = True
            await client.ask("h", params=SHORT)
            await client.receive_kind("inference_error", "h")
            monkeypatch.setattr(qmesh, "MAX_REQUESTS_PER_CONNECTION", 1)
            await client.ask("i", params=SHORT)
            await client.receive_kind("inference_error", "i")
        page = await until_page(worker, lambda page: page["qmesh_worker_requests_in_progress"] == 0)
    ended = {"done": 1, "context_exceeded": 1, "timeout": 1, "disconnected": 1}
    assert counts_of(page, "qmesh_worker_requests_total") == ended
    refused = dict.fromkeys(("model_not_found", "invalid_request", "overloaded", "draining", "connection_full"), 1)
    assert counts_of(page, "qmesh_worker_refused_requests_total") == refused
    assert counts_of(page, "qmesh_worker_resumed_requests_total") == {"elsewhere": 1, "here": 1}
    assert page["qmesh_worker_kept_requests"] == 2  # d, and what f was given
    assert (page["qmesh_worker_slots"], page["qmesh_worker_queue_capacity"]) == (1, 2)
    assert page["qmesh_worker_uptime_seconds"] > 0
    (build,) = [name for name in page if name.startswith("qmesh_build_info")]
    for told in (qmesh.__version__, worker.worker_id.short, "SmolLM2-135M-Instruct"):
        assert told in build


@pytest.mark.usefixtures("parting_without_waiting")
@in_a_loop
async def test_a_worker_that_makes_way_counts_whom_it_refuses_for_that(
    topic: str, tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("YIELD_ABOVE", "YIELD_BELOW"):
        monkeypatch.setattr(qmesh, bound, -1.0)  # others use more than that, whatever they do
    async with worker_on(topic, tmp_path, model_path, yields=True) as worker, reaching(worker) as client:
        await until_page(worker, lambda page: page['qmesh_worker_state{state="overloaded"}'] == 1)
        await client.ask("a", params=SHORT)
        await client.receive_kind("inference_error", "a")
        page = page_of(worker.metrics())
    assert counts_of(page, "qmesh_worker_refused_requests_total") == {"yielding": 1}
    assert counts_of(page, "qmesh_worker_requests_total") == {}


# --- The board ---


def metrics_of_a_gateway(node: qmesh.UdpNode) -> list[Metric]:
    mesh = mesh_metrics([status_of("a" * 64)])
    return [qmesh.build_info(), *ClientTally().metrics("qmesh_gateway"), *mesh, *node.metrics()]


@in_a_loop
async def test_the_board_draws_nothing_but_what_a_gateway_tells(topic: str, tmp_path: Path) -> None:
    async with client_of(topic, tmp_path) as client:
        metrics = {metric.name: metric for metric in metrics_of_a_gateway(client.node)}
        metrics_text(metrics.values())
    known = {
        f"{name}{end}": {*metric.labels, *(["le"] if end == "_bucket" else [])}
        for name, metric in metrics.items()
        for end in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    for panel in qmesh.grafana_board()["panels"]:
        for target in panel["targets"]:
            drawn = re.findall(r"qmesh_\w+", target["expr"])
            assert drawn
            kept = [set(labels.split(", ")) for labels in re.findall(r"by \(([^)]*)\)", target["expr"])]
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            for name in drawn:
                for outer, inner in itertools.pairwise([legend, *kept, known[name]]):
                    assert outer <= inner, "a label is wanted that is summed away, or was never there"
                counts = metrics.get(name) is None or metrics[name].kind == "counter"
                assert counts == (f"rate({name}[$__rate_interval])" in target["expr"])


def test_the_panels_of_the_board_are_told_apart_and_do_not_overlap() -> None:
    board = qmesh.grafana_board()
    panels, taken = board["panels"], Counter[tuple[int, int]]()
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        taken.update(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    assert set(taken.values()) == {1}
    assert max(x for x, _ in taken) < 24
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource"]
    assert qmesh.parse_json(qmesh.dump_json(board)) == board
