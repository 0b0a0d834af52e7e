"""Health and selection: samples to a score and a state, scores to a choice."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import HealthReport, HealthState, HealthWindow, NodeId, WorkerRecord

HEALTHY, BUSY, OVERLOADED = HealthState.HEALTHY, HealthState.BUSY, HealthState.OVERLOADED

repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def worker(score: int, model: str = "tiny", state: HealthState = HEALTHY, number: int = 0) -> WorkerRecord:
    return WorkerRecord(NodeId(number), ("10.0.0.1", 47475), 1, score, state, 4, model, bytes(8))


def health(score: float) -> HealthReport:
    return HealthReport(score, qmesh.state_of(score), 0, 0, 0)


def report(*samples: tuple[float, float], occupied: int = 0, capacity: int = 16) -> HealthReport:
    window = HealthWindow()
    for sample in samples:
        window.add(*sample)
    return window.report(occupied, capacity)


# --- Score and state ---


@pytest.mark.parametrize(
    ("cpu", "memory", "queue", "score"),
    [(0, 0, 100, 100), (100, 100, 0, 0), (100, 0, 0, 40), (0, 100, 0, 40), (100, 100, 100, 20), (50, 25, 80, 66)],
)
def test_the_score_is_forty_forty_twenty(cpu: float, memory: float, queue: float, score: float) -> None:
    assert qmesh.health_score(cpu, memory, queue) == pytest.approx(score)


@pytest.mark.parametrize(("occupied", "free"), [(0, 100), (4, 75), (15, 6.25), (16, 0), (20, 0)])
def test_the_queue_counts_by_its_free_share(occupied: int, free: float) -> None:
    assert qmesh.queue_availability(occupied, 16) == free


@pytest.mark.parametrize(
    ("score", "state"),
    [(100, HEALTHY), (60.01, HEALTHY), (60, BUSY), (20, BUSY), (19.99, OVERLOADED), (0, OVERLOADED)],
)
def test_over_sixty_is_healthy_and_under_twenty_overloaded(score: float, state: HealthState) -> None:
    assert qmesh.state_of(score) is state


@pytest.mark.parametrize(
    ("before", "score", "state"),
    [
        (HEALTHY, 60.01, HEALTHY),
        (HEALTHY, 60, BUSY),
        (HEALTHY, 19.99, OVERLOADED),
        (BUSY, 63, BUSY),
        (BUSY, 63.01, HEALTHY),
        (BUSY, 20, BUSY),
        (BUSY, 19.99, OVERLOADED),
        (OVERLOADED, 22.99, OVERLOADED),
        (OVERLOADED, 23, BUSY),
        (OVERLOADED, 63, BUSY),
        (OVERLOADED, 63.01, HEALTHY),
    ],
)
def test_worse_is_believed_at_once_and_better_only_three_points_beyond_the_threshold(
    before: HealthState, score: float, state: HealthState
) -> None:
    assert qmesh.state_of(score, before) is state


@repeatable
@given(st.lists(st.floats(18, 65), min_size=1))
def test_a_history_never_makes_a_state_better_than_the_score_alone(scores: list[float]) -> None:
    best_first = [HEALTHY, BUSY, OVERLOADED]
    state = None
    for score in scores:
        state = qmesh.state_of(score, state)
        assert best_first.index(state) >= best_first.index(qmesh.state_of(score))


def test_a_score_that_trembles_about_a_threshold_changes_the_state_once() -> None:
    states: list[HealthState | None] = [None]
    for score in (61, 59, 61, 59, 62.9, 60.1):
        states.append(qmesh.state_of(score, states[-1]))
    assert states[1:] == [HEALTHY, BUSY, BUSY, BUSY, BUSY, BUSY]


# --- The window ---


def test_before_the_first_sample_the_machine_counts_as_idle() -> None:
    assert report() == HealthReport(100, HEALTHY, 0, 0, 100)


def test_samples_are_averaged() -> None:
    assert report((10, 40), (30, 60)) == HealthReport(qmesh.health_score(20, 50, 100), HEALTHY, 20, 50, 100)


def test_only_the_last_five_samples_count() -> None:
    idle = [(0.0, 0.0)] * qmesh.SAMPLE_WINDOW
    assert report((100, 100), *idle) == report(*idle)
    assert report((100, 100), *idle[1:]).cpu == pytest.approx(100 / qmesh.SAMPLE_WINDOW)


def test_one_spike_does_not_make_a_healthy_worker_busy() -> None:
    assert report(*[(5, 40)] * 4, (100, 40)).state is HEALTHY


def test_samples_outside_nought_to_a_hundred_are_cut_off() -> None:
    assert report((-5, 130)) == report((0, 100))


def test_the_queue_counts_as_it_is_now() -> None:
    assert report((50, 50), occupied=16) == HealthReport(40, BUSY, 50, 50, 0)
    assert report((100, 99), occupied=16).state is OVERLOADED


def test_a_window_remembers_the_state_it_reported() -> None:
    window = HealthWindow(size=1)
    seen = []
    for load in (50, 47, 46, 97, 98, 96, 95):  # per cent of both; the score is the rest of it and an empty queue's 20
        window.add(load, load)
        seen.append(window.report(0, 16).state)
    assert seen == [BUSY, BUSY, HEALTHY, BUSY, BUSY, BUSY, BUSY]
    window.add(100, 99)
    assert window.report(16, 16).state is OVERLOADED
    assert window.report(0, 16).state is OVERLOADED  # 20.4 would be busy, had it not been overloaded
    window.add(96, 96)
    assert window.report(0, 16).state is BUSY


@repeatable
@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=8), st.integers(0, 99), st.integers(1, 40)
)
def test_whatever_the_samples_a_report_can_be_made(
    samples: list[tuple[float, float]], occupied: int, capacity: int
) -> None:
    made = report(*samples, occupied=occupied, capacity=capacity)
    assert made.score == pytest.approx(qmesh.health_score(made.cpu, made.memory, made.queue))
    assert made.state is qmesh.state_of(made.score)


def test_a_worker_that_yields_is_overloaded_while_others_use_much_of_the_processor() -> None:
    window = HealthWindow(size=1, yields=True)
    states = []
    for cpu in (10, 50, 51, 30, 26, 25, 50, 90):
        window.add(cpu, 10)
        report = window.report(0, 16)
        assert report.score == pytest.approx(qmesh.health_score(cpu, 10, 100))
        assert (report.state is OVERLOADED) == window.yielding
        states.append(window.yielding)
    assert states == [False, False, True, True, True, False, False, True]


def test_a_worker_that_does_not_yield_goes_by_its_score_alone() -> None:
    window = HealthWindow(size=1)
    window.add(100, 10)
    assert window.report(0, 16).state is HealthState.BUSY
    assert not window.yielding


# --- Which worker ---


def test_workers_are_ranked_by_score() -> None:
    ranked = qmesh.rank_workers([worker(30), worker(90), worker(60)], random.Random(0))
    assert [record.score for record in ranked] == [90, 60, 30]


@pytest.mark.parametrize("score", [19, 90])
def test_an_overloaded_worker_is_not_ranked_whatever_its_score(score: int) -> None:
    assert qmesh.rank_workers([worker(score, state=OVERLOADED)], random.Random(0)) == []


def test_a_record_offers_its_model_and_any_when_none_is_named() -> None:
    tiny = worker(50, "tiny")
    assert qmesh.offers(tiny, "tiny")
    assert not qmesh.offers(tiny, "other")
    assert qmesh.offers(tiny, None)


def test_models_of_one_name_are_told_apart_by_their_fingerprints() -> None:
    tiny = worker(50, "tiny")
    assert qmesh.offers(tiny, None, tiny.fingerprint.hex())
    assert qmesh.offers(tiny, "tiny", tiny.fingerprint.hex())
    assert not qmesh.offers(tiny, "tiny", "ff" * qmesh.FINGERPRINT_BYTES)
    assert not qmesh.offers(tiny, "other", tiny.fingerprint.hex())


@repeatable
@given(st.lists(st.integers(0, 100)), st.integers())
def test_a_ranking_holds_everyone_once_and_swaps_only_ties(scores: list[int], seed: int) -> None:
    workers = [worker(score, number=number) for number, score in enumerate(scores)]
    ranked = qmesh.rank_workers(workers, random.Random(seed))
    assert sorted(record.worker_id for record in ranked) == [record.worker_id for record in workers]
    for at, record in enumerate(ranked):
        assert all(later.score <= record.score + qmesh.SCORE_TIE for later in ranked[at:])


def choice(candidates: dict[str, HealthReport]) -> Callable[[random.Random], str | None]:
    return lambda rng: qmesh.choose_worker(candidates, rng)


def ranked_first(scores: dict[str, int]) -> Callable[[random.Random], str | None]:
    records = [worker(score, model) for model, score in scores.items()]
    return lambda rng: qmesh.rank_workers(records, rng)[0].model


@pytest.mark.parametrize(
    "choose",
    [choice({"a": health(88), "b": health(90), "c": health(87.9)}), ranked_first({"a": 88, "b": 90, "c": 87})],
)
def test_ties_are_drawn_at_random_and_nobody_else_is(choose: Callable[[random.Random], str | None]) -> None:
    rng = random.Random(0)
    drawn = [choose(rng) for _ in range(400)]
    assert set(drawn) == {"a", "b"}
    assert drawn.count("a") == pytest.approx(200, abs=50)


def test_the_highest_fresh_score_is_chosen() -> None:
    assert choice({"a": health(70), "b": health(90), "c": health(30)})(random.Random(0)) == "b"


def test_a_busy_worker_is_chosen_where_the_others_refuse() -> None:
    refusing = HealthReport(95, OVERLOADED, 0, 0, 0)
    assert choice({"a": refusing, "b": health(21)})(random.Random(0)) == "b"
    assert choice({"a": refusing})(random.Random(0)) is None
    assert choice({})(random.Random(0)) is None


def test_the_same_randomness_makes_the_same_choice() -> None:
    records = [worker(80, number=number) for number in range(10)]
    orders = [qmesh.rank_workers(records, random.Random(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


# --- Model names ---


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tiny", "tiny"),
        ("tiny", "TINY"),
        ("Tiny", "tiny.gguf"),
        ("tiny.GGUF", "tiny"),
        ("straße", "STRASSE"),
        ("m" * 60, "M" * 60 + ".gguf"),
        ("DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf", "deepseek-r1-distill-qwen-1.5b-q4_k_m"),
        ("DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf", "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf"),
        ("模型" * 10, "模型" * 10 + ".gguf"),
    ],
)
def test_a_model_is_known_by_its_name_without_case_and_ending_however_it_was_cut(name: str, wanted: str) -> None:
    assert qmesh.model_key(name) == qmesh.model_key(wanted)
    in_record = qmesh.short_model_name(qmesh.bare_model_name(name))
    assert qmesh.offers(worker(80, in_record), wanted)


@pytest.mark.parametrize("wanted", ["tin", "tiny-2", "tiny.bin", ""])
def test_another_name_is_another_model(wanted: str) -> None:
    assert not qmesh.offers(worker(80, "tiny"), wanted)
    assert qmesh.model_key(wanted) != qmesh.model_key("tiny")


def test_names_that_differ_only_beyond_the_cut_are_told_apart_by_the_worker_not_the_record() -> None:
    long, longer = "m" * qmesh.MODEL_NAME_BYTES, "m" * (qmesh.MODEL_NAME_BYTES + 1)
    assert qmesh.offers(worker(80, long), longer)
    assert qmesh.model_key(long) != qmesh.model_key(longer)


@repeatable
@given(st.text(max_size=60))
def test_a_short_name_fits_a_record_and_is_the_names_beginning(name: str) -> None:
    short = qmesh.short_model_name(name)
    assert name.startswith(short)
    assert len(short.encode()) <= qmesh.MODEL_NAME_BYTES
    assert short == name or len(short.encode()) > qmesh.MODEL_NAME_BYTES - 4
