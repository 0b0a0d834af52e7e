"""The engine: the real model's answers, slots, cuts and faults, step by step and in its own thread."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import llama_cpp
import pytest
from desk import (
    CONTEXT,
    SLOTS,
    STEP_S,
    THREADS,
    TOKEN_S,
    Answer,
    Desk,
    Event,
    WatchedModel,
    chat,
    is_last,
    plan_for,
    raw,
    resumed,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import InvalidRequest, Job, Message, ModelError, Queued, Result, TextStream, Token

PATIENCE_S = 60

POEM = "Write a short poem about the sea."
EMOJI = "Write five emoji."
CHINESE = "用中文写一句话介绍北京。"
FRUITS = "List three fruits."  # answered in 13 tokens, and then the model stops
HELLO = "Hi"  # answered in 9
QUESTIONS = {POEM: 44, EMOJI: 42, CHINESE: 40, FRUITS: 40}

NAMED = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[WatchedModel]:
    with contextlib.closing(WatchedModel(plan_for(model_path))) as model:
        yield model


@pytest.fixture
def desk(model: WatchedModel) -> Iterator[Desk]:
    desk = Desk(model)
    yield desk
    desk.batcher.close()


@pytest.fixture(scope="module")
def answer(model: WatchedModel) -> Callable[[Job], Answer]:
    """What a job is answered alone and cold, computed once; to be asked before a test uses its desk."""
    known: dict[str, Answer] = {}

    def answer(job: Job) -> Answer:
        key = json.dumps(job.to_json())
        if key not in known:
            desk = Desk(model)
            result = desk.ask(job)
            known[key] = Answer(desk.tokens(0), result)
            model.forget()
        return known[key]

    return answer


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Iterator[Any]:
    """The same model behind llama-cpp-python's own interface, with attention computed as ours is."""
    threads: Any = {"n_threads": THREADS, "n_threads_batch": THREADS}
    attention: Any = {"flash_attn": True, "type_k": qmesh.UNIFORM_CACHE[0], "type_v": qmesh.UNIFORM_CACHE[1]}
    llama = llama_cpp.Llama(str(model_path), n_ctx=CONTEXT, **threads, **attention, verbose=False)
    with contextlib.closing(llama):
        yield llama


@pytest.fixture(scope="module")
def expected(reference: Any) -> dict[str, str]:
    """What llama-cpp-python answers to the questions."""
    return {
        question: reference.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0, repeat_penalty=1.0, max_tokens=count
        )["choices"][0]["message"]["content"]
        for question, count in QUESTIONS.items()
    }


# --- Whole characters and stop strings ---


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def shown(stream: TextStream, parts: Sequence[bytes]) -> list[str]:
    return [*(stream.feed(part) for part in parts), stream.finish()]


def test_however_characters_are_cut_they_come_out_whole() -> None:
    text = "é北🌟z"
    data = text.encode()
    for count in range(len(data)):
        for cuts in itertools.combinations(range(1, len(data)), count):
            out = shown(TextStream(), pieces(data, cuts))
            assert "".join(out) == text
            assert "\ufffd" not in "".join(out)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([byte])) for byte in "é北🌟z".encode()] == ["", "é", "", "", "北", "", "", "", "🌟", "z"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_half_a_character_at_the_end_is_dropped(size: int) -> None:
    assert shown(TextStream(), [b"a", "🌟".encode()[:size]]) == ["a", "", ""]


def test_bytes_that_are_no_text_are_replaced_and_the_rest_goes_on() -> None:
    assert "".join(shown(TextStream(), [b"a\xff", b"b\xe5\x8c", b"c"])) == "a\ufffdb\ufffdc"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_decided() -> None:
    stream = TextStream(stop=("END", "EX"))
    assert [stream.feed(part) for part in (b"an E", b"N", b"TER E", b"X it")] == ["an ", "", "ENTER ", ""]
    assert stream.stopped


def test_what_was_held_back_comes_out_at_the_end() -> None:
    assert shown(TextStream(stop=("END",)), [b"the E", b"N"]) == ["the ", "", "EN"]


def test_after_a_stop_string_nothing_comes_out() -> None:
    stream = TextStream(stop=("END",))
    assert shown(stream, [b"an END of", b" it", b"END"]) == ["an ", "", "", ""]


LETTERS = st.text(alphabet="ab🌟", max_size=12)
STOPS = st.lists(st.text(alphabet="ab🌟", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 48), max_size=8)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of those, the longest."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


@repeatable
@given(LETTERS, STOPS, CUTS)
def test_nothing_of_a_stop_string_leaks_and_nothing_before_it_is_lost(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    data = text.encode()
    stream = TextStream(stop=stops)
    out = "".join(shown(stream, pieces(data, [cut for cut in cuts if cut <= len(data)])))
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
    ends = {len(text)} if not stream.stopped else {at for at in range(len(text)) if text.startswith(tuple(stops), at)}
    assert len(out) in ends


@repeatable
@example("abc", ["abc", "b"], [])
@given(LETTERS, STOPS, CUTS)
def test_the_chunks_that_text_comes_in_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    parts = pieces(data, [cut for cut in cuts if cut <= len(data)])
    assert "".join(shown(TextStream(stop=stops), parts)) == before_stop(text, stops)


@repeatable
@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(stop=stops)
    out = ""
    for count, character in enumerate(text, start=1):
        out += stream.feed(character.encode())
        held = text[len(out) : count]
        assert stream.stopped or not held or any(stop.startswith(held) for stop in stops)


# --- The same answers as llama-cpp-python ---


@pytest.mark.parametrize("question", QUESTIONS, ids=["poem", "emoji", "chinese", "fruits"])
def test_a_greedy_answer_is_that_of_llama_cpp_python(
    question: str, answer: Callable[[Job], Answer], expected: dict[str, str]
) -> None:
    assert answer(chat(question, max_tokens=QUESTIONS[question])).text == expected[question]


def test_four_answers_at_once_are_those_of_llama_cpp_python(desk: Desk, expected: dict[str, str]) -> None:
    tickets = {question: desk.submit(chat(question, max_tokens=count)) for question, count in QUESTIONS.items()}
    desk.finish()
    assert {question: desk.result(ticket).text for question, ticket in tickets.items()} == expected
    assert max(len({entry.slot for entry in batch}) for batch in desk.model.batches) == SLOTS


def test_a_text_as_it_is_goes_on_as_with_llama_cpp_python(desk: Desk, reference: Any) -> None:
    theirs = reference.create_completion("The sea is", temperature=0, repeat_penalty=1.0, max_tokens=40)
    ours = desk.ask(raw("The sea is", max_tokens=40))
    assert ours.text == theirs["choices"][0]["text"]
    assert ours.usage["prompt_tokens"] == theirs["usage"]["prompt_tokens"]


def test_company_changes_nothing_not_even_what_is_drawn(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    prompts = ("The sea is", "Once upon a time there was", "1 2 3", "Dear")
    jobs = [raw(prompt, temperature=1.5, seed=at, max_tokens=9) for at, prompt in enumerate(prompts)]
    alone = [answer(job).ids for job in jobs]
    for job in jobs:
        desk.submit(job)
        desk.step(2)
    desk.finish()
    assert [desk.ids(ticket) for ticket in desk.told] == alone


# --- The stream and its end ---


@pytest.mark.parametrize("question", QUESTIONS, ids=["poem", "emoji", "chinese", "fruits"])
def test_a_stream_holds_the_whole_answer_in_whole_characters(
    question: str, model: WatchedModel, answer: Callable[[Job], Answer]
) -> None:
    told = answer(chat(question, max_tokens=QUESTIONS[question]))
    assert "".join(token.text for token in told.tokens) == told.text
    assert not any("\ufffd" in token.text for token in told.tokens)
    assert b"".join(map(model.piece, told.ids)) == told.text.encode()


def test_tokens_are_numbered_from_nought_without_gaps_and_counted(answer: Callable[[Job], Answer]) -> None:
    told = answer(chat(EMOJI, max_tokens=42))
    assert [token.seq for token in told.tokens] == list(range(42))
    assert [len(token.tokens) for token in told.tokens] == [1] * 42
    assert told.result.usage == {"prompt_tokens": 35, "completion_tokens": 42, "cached_tokens": 0}


def test_a_character_of_several_tokens_is_told_with_the_last_of_them(answer: Callable[[Job], Answer]) -> None:
    assert [token.text for token in answer(chat(EMOJI, max_tokens=42)).tokens] == ["", "", "🌟"] * 14


def test_a_limit_within_a_character_leaves_it_away(desk: Desk) -> None:
    result = desk.ask(chat(EMOJI, max_tokens=5))
    assert (result.text, result.usage["completion_tokens"]) == ("🌟", 5)
    assert [token.text for token in desk.tokens(0)] == ["", "", "🌟", "", ""]


def test_a_result_names_its_model_and_worker(model_path: Path, answer: Callable[[Job], Answer]) -> None:
    told = answer(chat(HELLO)).result
    assert (told.model, told.worker_id) == (model_path.stem, "worker-1")


def test_timings_are_those_of_queue_prompt_and_answer(desk: Desk) -> None:
    desk.submit(raw("The sea is", max_tokens=5))
    desk.model.clock.now += 3
    desk.finish()
    assert desk.result(0).timings == {"queue_ms": 3000, "prompt_ms": 1000 * STEP_S, "generate_ms": 4000 * STEP_S}


def test_the_wait_for_a_slot_counts_as_queueing(desk: Desk) -> None:
    for _ in range(SLOTS + 1):
        desk.submit(raw("The sea is", max_tokens=3))
    desk.finish()
    assert [desk.result(ticket).timings["queue_ms"] for ticket in desk.told] == [0] * SLOTS + [3000 * STEP_S]


def test_the_speed_is_that_of_all_slots_together(desk: Desk) -> None:
    for _ in range(SLOTS):
        desk.submit(raw("The sea is", max_tokens=4))
    desk.finish()
    assert desk.batcher.speed.tokens_per_s == pytest.approx(SLOTS / STEP_S)
    assert desk.batcher.speed.mean_service_s == pytest.approx(4 * STEP_S)


def test_the_model_ends_its_answer_with_stop(answer: Callable[[Job], Answer]) -> None:
    told = answer(chat(HELLO))
    assert told.result.finish_reason == "stop"
    assert told.result.usage["completion_tokens"] == len(told.ids) == 9


@pytest.mark.parametrize("count", [1, 7])
def test_an_answer_ends_after_max_tokens_with_length(desk: Desk, answer: Callable[[Job], Answer], count: int) -> None:
    whole = answer(raw("The sea is", max_tokens=12))
    result = desk.ask(raw("The sea is", max_tokens=count))
    assert desk.ids(0) == whole.ids[:count]
    assert result.text == "".join(token.text for token in whole.tokens[:count])
    assert result.finish_reason == "length"
    assert result.usage["completion_tokens"] == count


# --- Stop strings in real answers ---


def across(tokens: Sequence[Token], at: int) -> str:
    """A stop string that begins within one token and ends within the next."""
    return tokens[at].text[-2:] + tokens[at + 1].text[:2]


@pytest.mark.parametrize("at", [4, 16])
def test_a_stop_string_across_tokens_ends_an_answer_and_is_not_shown(
    desk: Desk, answer: Callable[[Job], Answer], at: int
) -> None:
    whole = answer(chat(POEM, max_tokens=44))
    stop = across(whole.tokens, at)
    result = desk.ask(chat(POEM, max_tokens=44, stop=(stop,)))
    assert result.text == whole.text.split(stop)[0] != whole.text
    assert "".join(token.text for token in desk.tokens(0)) == result.text
    assert result.finish_reason == "stop"
    assert desk.ids(0) == whole.ids[: result.usage["completion_tokens"]]


def test_a_stop_string_of_a_character_in_several_tokens_is_found(desk: Desk) -> None:
    result = desk.ask(chat(EMOJI, max_tokens=42, stop=("🌟🌟",)))
    assert (result.text, result.finish_reason) == ("", "stop")
    assert result.usage["completion_tokens"] == 6


def test_the_beginning_of_a_stop_string_that_does_not_go_on_comes_with_the_whole_text_when_the_model_ends(
    desk: Desk, answer: Callable[[Job], Answer]
) -> None:
    whole = answer(chat(HELLO))
    result = desk.ask(chat(HELLO, stop=(whole.text[-7:] + "?!",)))
    assert result.text == whole.text
    assert "".join(token.text for token in desk.tokens(0)) == whole.text[:-7]


def test_the_beginning_of_a_stop_string_that_does_not_go_on_comes_with_the_whole_text_at_the_limit(
    desk: Desk, answer: Callable[[Job], Answer]
) -> None:
    whole = answer(raw("The sea is", max_tokens=12))
    result = desk.ask(raw("The sea is", max_tokens=12, stop=(whole.text[-9:] + "#",)))
    assert (result.text, result.finish_reason) == (whole.text, "length")
    assert "".join(token.text for token in desk.tokens(0)) == whole.text[:-9]


# --- Slots and their memory ---


COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"


def test_a_second_turn_evaluates_only_what_is_new(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    longer = COUNTING + answer(raw(COUNTING, max_tokens=12)).text
    cold = answer(raw(longer, max_tokens=12))
    asked = desk.ask(raw(COUNTING, max_tokens=12))
    second = desk.ask(raw(longer, max_tokens=12))
    assert second.usage["cached_tokens"] > asked.usage["prompt_tokens"]
    assert (second.text, cold.result.usage["cached_tokens"]) == (cold.text, 0)


@pytest.mark.parametrize("question", QUESTIONS, ids=["poem", "emoji", "chinese", "fruits"])
def test_a_conversation_on_a_warm_slot_goes_as_on_a_cold_one(
    desk: Desk, answer: Callable[[Job], Answer], question: str
) -> None:
    first = answer(chat(question, max_tokens=QUESTIONS[question])).text
    turns = (question, first, "Say that again in other words.")
    cold = answer(chat(*turns, max_tokens=24))
    asked = desk.ask(chat(question, max_tokens=QUESTIONS[question]))
    warm = desk.ask(chat(*turns, max_tokens=24))
    assert warm.usage["cached_tokens"] >= asked.usage["prompt_tokens"]
    assert (warm.text, cold.result.usage["cached_tokens"]) == (cold.text, 0)


def test_the_same_request_again_evaluates_only_the_end_of_its_prompt(desk: Desk) -> None:
    first = desk.ask(raw(COUNTING, max_tokens=6))
    again = desk.ask(raw(COUNTING, max_tokens=6))
    assert again.text == first.text
    assert first.usage["cached_tokens"] == 0
    assert again.usage["cached_tokens"] - first.usage["prompt_tokens"] in (-1, -2)


def test_a_request_takes_the_slot_that_remembers_most_of_it(desk: Desk) -> None:
    for prompt in ("The sea is", "1 2 3", "Once upon a time"):
        assert desk.ask(raw(prompt, max_tokens=3)).usage["cached_tokens"] == 0
    kept = [desk.ask(raw(prompt, max_tokens=1)).usage["cached_tokens"] for prompt in ("1 2 3 A B", "The sea is A B")]
    assert kept == [5, 3]


def test_what_has_nothing_in_common_takes_the_slot_that_was_longest_unused(desk: Desk) -> None:
    first, second, third = "1 2 3 4", "Once upon a time", "The sea is blue"
    for prompt in (first, second, third, "Dear Sir or Madam", "Hello my old friend"):
        assert desk.ask(raw(prompt, max_tokens=1)).usage["cached_tokens"] == 0
    kept = [desk.ask(raw(prompt, max_tokens=1)).usage["cached_tokens"] > 0 for prompt in (second, third, first)]
    assert kept == [True, True, False]


def test_a_memory_that_cannot_be_cut_is_evaluated_afresh_and_answers_right(
    desk: Desk, answer: Callable[[Job], Answer]
) -> None:
    cold = answer(raw("The sea was", max_tokens=6))
    desk.model.cuttable = False
    desk.ask(raw("The sea is", max_tokens=3))
    for _ in range(SLOTS - 1):
        desk.ask(raw("Dear", max_tokens=1))
    warm = desk.ask(raw("The sea was", max_tokens=6))
    assert (warm.text, warm.usage["cached_tokens"]) == (cold.text, 0)


def test_a_memory_that_cannot_be_cut_still_serves_what_goes_on_from_it(
    desk: Desk, answer: Callable[[Job], Answer]
) -> None:
    longer = COUNTING + answer(raw(COUNTING, max_tokens=12)).text + " "
    cold = answer(raw(longer, max_tokens=8))
    desk.model.cuttable = False
    desk.ask(raw(COUNTING, max_tokens=12))
    warm = desk.ask(raw(longer, max_tokens=8))
    assert warm.text == cold.text
    assert warm.usage["cached_tokens"] > 0


def test_requests_that_begin_alike_do_not_share_a_slot(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    jobs = [raw("The sea is", max_tokens=8), raw("The sea was", max_tokens=8)]
    alone = [answer(job).ids for job in jobs]
    desk.ask(raw("The sea", max_tokens=2))
    tickets = [desk.submit(job) for job in jobs]
    desk.finish()
    assert [desk.ids(ticket) for ticket in tickets] == alone


# --- A full context and long prompts ---


def prompt_of(model: WatchedModel, count: int) -> str:
    text = "a" + " a" * (count - 1)
    assert len(model.tokenize(text, add_special=True)) == count
    return text


@dataclass(frozen=True)
class Crowd:
    """What happened: how many tokens the first was given in each step, and what each step evaluated."""

    desk: Desk
    counts: list[int]
    batches: list[tuple[qmesh.BatchEntry, ...]]


@pytest.fixture(scope="module")
def crowded(model: WatchedModel) -> Crowd:
    """A prompt that all but fills its slot, come while another writes."""
    desk = Desk(model)
    model.token_s = TOKEN_S
    desk.submit(raw(prompt_of(model, 100), max_tokens=12))
    desk.step(2)
    desk.submit(raw(prompt_of(model, model.slot_tokens - 4), max_tokens=40))
    counts = []
    while not desk.batcher.idle:
        before = len(desk.tokens(0))
        desk.step()
        counts.append(len(desk.tokens(0)) - before)
    return Crowd(desk, counts, list(model.batches))


def test_an_answer_that_fills_the_context_ends_with_length(crowded: Crowd) -> None:
    desk = crowded.desk
    result = desk.result(1)
    assert result.finish_reason == "length"
    assert result.usage["prompt_tokens"] + result.usage["completion_tokens"] == desk.model.slot_tokens
    assert len(desk.ids(1)) == 4


def test_a_long_prompt_does_not_hold_up_who_is_being_answered(crowded: Crowd, answer: Callable[[Job], Answer]) -> None:
    desk = crowded.desk
    assert desk.begun == [0, 1]
    assert crowded.counts == [1] * 11 + [0] * (len(crowded.counts) - 11)
    assert desk.ids(0) == answer(raw(prompt_of(desk.model, 100), max_tokens=12)).ids


def test_beside_an_answer_a_step_is_short_and_alone_it_is_longer(crowded: Crowd) -> None:
    beside = [len(batch) * TOKEN_S for batch in crowded.batches if len({entry.slot for entry in batch}) == 2]
    assert len(beside) > 5
    assert all(qmesh.SHARED_STEP_S / 2 < size <= qmesh.SHARED_STEP_S + TOKEN_S for size in beside[:5])
    assert max(map(len, crowded.batches)) * TOKEN_S <= qmesh.STEP_S


@pytest.mark.parametrize(
    ("token_s", "tokens"), [(0.1, qmesh.MIN_CHUNK_TOKENS), (0.01, 100), (0.002, 500), (1e-5, qmesh.MAX_CHUNK_TOKENS)]
)
def test_a_step_evaluates_what_its_time_allows_for_on_fast_and_slow_machines(token_s: float, tokens: int) -> None:
    pacer = qmesh.StepPacer()
    for _ in range(30):
        count = pacer.tokens(1.0)
        pacer.stepped(count, count * token_s, prefill=count)
    assert pacer.tokens(1.0) == pytest.approx(tokens, abs=1)


def test_what_a_step_costs_besides_its_tokens_does_not_keep_it_small() -> None:
    pacer = qmesh.StepPacer()
    for _ in range(30):
        count = pacer.tokens(1.0)
        pacer.stepped(count, 0.5 + count * 0.002, prefill=count)
    assert pacer.tokens(1.0) == pytest.approx(250, abs=3)


def test_steps_with_next_to_no_prompt_say_nothing_about_its_speed() -> None:
    pacer = qmesh.StepPacer()
    pacer.stepped(64, 60.0, prefill=qmesh.MIN_CHUNK_TOKENS - 1)
    assert pacer.tokens(1.0) == qmesh.FIRST_CHUNK_TOKENS


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(desk: Desk) -> None:
    room = desk.model.slot_tokens
    desk.submit(raw(prompt_of(desk.model, room)))
    error = desk.error(0)
    assert isinstance(error, InvalidRequest)
    assert error.code == "context_exceeded"
    assert f"has {room} tokens and this worker's context holds {room}" in str(error)
    assert desk.batcher.idle


def test_a_prompt_that_leaves_room_for_one_token_is_taken(desk: Desk) -> None:
    desk.submit(raw(prompt_of(desk.model, desk.model.slot_tokens - 1)))
    assert desk.told == {0: []}
    assert not desk.batcher.idle


def test_what_is_resumed_counts_towards_the_context(desk: Desk) -> None:
    desk.submit(raw(prompt_of(desk.model, desk.model.slot_tokens - 4), resume=[1, 2, 3, 4, 5]))
    error = desk.error(0)
    assert isinstance(error, InvalidRequest)
    assert error.code == "context_exceeded"


def test_an_answer_that_has_filled_the_context_gets_no_more(desk: Desk) -> None:
    desk.submit(raw(prompt_of(desk.model, desk.model.slot_tokens - 4), resume=[282, 282, 282, 282]))
    assert desk.result(0).finish_reason == "length"
    assert desk.tokens(0) == []


@pytest.mark.parametrize("empty", [{"prompt": ""}, {"prompt": " \n"}, {"messages": (Message("user", ""),)}, {}])
def test_an_empty_prompt_is_no_request(empty: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Job("r", **empty)


# --- The queue ---


def test_more_requests_than_slots_wait_and_are_told_their_places(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(raw("The sea is", max_tokens=12)).ids
    counts = [1, 2, 3, 4, 2, 2, 2]
    for count in counts:
        desk.submit(raw("The sea is", max_tokens=count))
    desk.finish()
    assert [desk.positions(ticket) for ticket in desk.told] == [[], [], [], [], [0], [1, 0], [2, 1, 0]]
    assert [desk.ids(ticket) for ticket in desk.told] == [whole[:count] for count in counts]


def test_a_place_is_told_before_the_first_token(desk: Desk) -> None:
    desk.model.token_s = TOKEN_S
    for _ in range(SLOTS + 2):
        desk.submit(raw("The sea is", max_tokens=3))
    desk.finish()
    assert [type(event) for event in desk.told[SLOTS]] == [Queued, Token, Token, Token, Result]


def test_the_expected_wait_is_told_anew_as_it_passes(desk: Desk) -> None:
    for _ in range(SLOTS + 1):
        desk.submit(raw("The sea is", max_tokens=6))
    desk.finish()
    news = [event for event in desk.told[SLOTS] if isinstance(event, Queued)]
    assert news == [Queued(0, wait) for wait in (10.0, 8.0, 6.0, 4.0, 2.0, 0.0)]


def test_one_who_waits_long_is_not_told_at_every_step(desk: Desk) -> None:
    desk.model.token_s = qmesh.QUEUE_NEWS_S / 40
    for _ in range(SLOTS + 1):
        desk.submit(raw("The sea is", max_tokens=30))
    desk.step(30)
    heard = [event.wait_s for event in desk.told[SLOTS] if isinstance(event, Queued)]
    assert heard == sorted(heard, reverse=True)
    assert 2 <= len(heard) <= desk.model.clock.now / qmesh.QUEUE_NEWS_S + 1


def test_the_expected_wait_follows_from_what_others_took(desk: Desk) -> None:
    desk.ask(raw("The sea is", max_tokens=8))
    for _ in range(SLOTS + 2):
        desk.submit(raw("The sea is", max_tokens=400))
    desk.step()
    usual = 8 * STEP_S
    assert desk.told[SLOTS + 1] == [Queued(0, usual - STEP_S)]
    assert desk.told[SLOTS + 2] == [Queued(1, usual - STEP_S)]


def test_nobody_is_expected_to_run_beyond_the_last_token_that_was_asked_for(desk: Desk) -> None:
    desk.ask(raw("The sea is", max_tokens=40))
    for count in (2, 30, 30, 30, 30, 30):
        desk.submit(raw("The sea is", max_tokens=count))
    desk.step()
    assert [event.wait_s for ticket in (5, 6) for event in desk.told[ticket] if isinstance(event, Queued)] == [
        pytest.approx(SLOTS * STEP_S, rel=0.8),
        pytest.approx(39 * STEP_S, rel=0.3),
    ]


def test_a_client_with_many_requests_does_not_keep_another_waiting(desk: Desk) -> None:
    for count in (1, 2, 3, 4, 9, 9, 9):
        desk.submit(raw("The sea is", max_tokens=count), "ann")
    desk.step()
    desk.submit(raw("The sea is", max_tokens=9), "bob")
    desk.finish()
    assert desk.begun == [0, 1, 2, 3, 4, 7, 5, 6]


# --- Cancelling and deadlines ---


def test_a_request_that_is_cancelled_in_the_queue_costs_nothing_and_hears_nothing_more(desk: Desk) -> None:
    for count in (1, 2, 3, 4):
        desk.submit(raw("The sea is", max_tokens=count))
    waiting = desk.submit(raw("Once upon a time", max_tokens=9))
    desk.step()
    desk.batcher.cancel(waiting)
    desk.finish()
    assert [type(event) for event in desk.told[waiting]] == [Queued]
    evaluated = sum(map(len, desk.model.batches))
    usages = [desk.result(ticket).usage for ticket in range(SLOTS)]
    assert evaluated == sum(usage["prompt_tokens"] + usage["completion_tokens"] - 1 for usage in usages)


def test_who_waits_behind_a_cancelled_request_moves_up(desk: Desk) -> None:
    for _ in range(SLOTS + 2):
        desk.submit(raw("The sea is", max_tokens=4))
    desk.step()
    desk.batcher.cancel(SLOTS)
    desk.step()
    assert desk.positions(SLOTS + 1) == [1, 0]


def test_a_cancelled_answer_frees_its_slot_for_the_next_step(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    alone = answer(raw("Once upon a time", max_tokens=4))
    for _ in range(SLOTS):
        desk.submit(raw("The sea is", max_tokens=40))
    waiting = desk.submit(raw("Once upon a time", max_tokens=4))
    desk.step(2)
    heard = list(desk.told[1])
    desk.batcher.cancel(1)
    assert not desk.tokens(waiting)
    desk.step()
    assert len(desk.tokens(waiting)) == 1
    desk.step(3)
    assert desk.ids(waiting) == alone.ids
    assert desk.told[1] == heard


def test_a_cancelled_answer_goes_on_from_what_its_slot_remembers(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(raw("The sea is", max_tokens=12))
    desk.submit(raw("The sea is", max_tokens=12))
    desk.step(5)
    desk.batcher.cancel(0)
    again = desk.ask(raw("The sea is", max_tokens=12))
    assert again.text == whole.text
    assert again.usage["cached_tokens"] > 0


def test_cancelling_what_is_not_there_does_nothing(desk: Desk) -> None:
    done = desk.submit(raw("The sea is", max_tokens=1))
    desk.finish()
    running = desk.submit(raw("The sea is", max_tokens=2))
    for ticket in (done, 99):
        desk.batcher.cancel(ticket)
    desk.finish()
    assert len(desk.ids(running)) == 2


def test_a_deadline_passes_in_the_queue(desk: Desk) -> None:
    for _ in range(SLOTS):
        desk.submit(raw("The sea is", max_tokens=5))
    late = desk.submit(raw("The sea is", timeout_s=1.5 * STEP_S))
    desk.finish()
    assert [type(event) for event in desk.told[late]] == [Queued, Queued, qmesh.DeadlineExceeded]
    assert "within 3 s" in str(desk.told[late][-1])
    assert [len(desk.ids(ticket)) for ticket in range(SLOTS)] == [5] * SLOTS
    assert desk.ask(raw("The sea is", max_tokens=1)).finish_reason == "length"


def test_a_deadline_ends_a_running_answer_and_frees_its_slot(desk: Desk) -> None:
    for _ in range(SLOTS - 1):
        desk.submit(raw("The sea is", max_tokens=5))
    late = desk.submit(raw("The sea is", max_tokens=40, timeout_s=2.5 * STEP_S))
    waiting = desk.submit(raw("The sea is", max_tokens=2))
    desk.step(3)
    assert not desk.tokens(waiting)
    desk.step()
    assert [type(event) for event in desk.told[late]] == [Token, Token, Token, qmesh.DeadlineExceeded]
    assert len(desk.tokens(waiting)) == 1


def test_an_answer_within_its_deadline_is_not_cut_off(desk: Desk) -> None:
    assert desk.ask(raw("The sea is", max_tokens=3, timeout_s=3.5 * STEP_S)).finish_reason == "length"


def test_after_two_hundred_random_operations_all_is_idle_and_every_answer_was_right(
    desk: Desk, answer: Callable[[Job], Answer]
) -> None:
    prompts = ("The sea is", "The sea was", "Once upon a time", "1 2 3")
    whole = {prompt: answer(raw(prompt, max_tokens=12)).ids for prompt in prompts}
    rng = random.Random(1)
    wanted: dict[int, list[int]] = {}
    for _ in range(200):
        operation = rng.choices(("submit", "cancel", "step"), (4, 2, 3))[0]
        if operation == "submit":
            prompt, count = rng.choice(prompts), rng.randint(1, 4)
            ticket = desk.submit(raw(prompt, max_tokens=count), rng.choice("abc"))
            wanted[ticket] = whole[prompt][:count]
        elif operation == "cancel" and wanted:
            ticket = rng.choice(list(wanted))
            desk.batcher.cancel(ticket)
            if not any(map(is_last, desk.told[ticket])):
                del wanted[ticket]
        else:
            desk.step()
    desk.finish()
    assert len(wanted) > 20
    assert {ticket: desk.ids(ticket) for ticket in wanted} == wanted
    ended = {ticket for ticket, told in desk.told.items() if any(map(is_last, told))}
    assert ended == set(wanted)


def test_closing_frees_what_runs_and_what_waits(desk: Desk) -> None:
    for _ in range(SLOTS + 2):
        desk.submit(raw("The sea is"))
    desk.step()
    desk.batcher.close()
    assert not desk.model.samplers
    assert desk.batcher.idle


# --- Going on behind tokens that the client has ---


RESUMED = {
    "numbers": raw(COUNTING, max_tokens=10),
    "emoji": chat(EMOJI, max_tokens=10),
    "poem": chat(POEM, max_tokens=12),
    "drawn": raw("Once upon a time", temperature=1.2, seed=7, max_tokens=12),
    "drawn with a penalty": raw("The sea is", temperature=0.9, seed=3, top_k=0, repeat_penalty=1.2, max_tokens=9),
    "drawn to a schema": raw("A name:", temperature=1.0, seed=1, json_schema=NAMED, max_tokens=10),
}


@pytest.mark.parametrize("job", RESUMED.values(), ids=RESUMED)
def test_an_answer_goes_on_where_another_worker_left_it_at_whatever_token(
    model: WatchedModel, answer: Callable[[Job], Answer], job: Job
) -> None:
    whole = answer(job)
    for first in range(1, len(whole.ids), SLOTS):
        desk = Desk(model)
        cuts = range(first, min(first + SLOTS, len(whole.ids)))
        tickets = {cut: desk.submit(replace(job, resume=resumed(whole.ids[:cut]))) for cut in cuts}
        desk.finish()
        for cut, ticket in tickets.items():
            result = desk.result(ticket)
            assert desk.tokens(ticket) == whole.tokens[cut:], f"behind {cut} tokens"
            assert result.text == whole.text
            assert result.finish_reason == whole.result.finish_reason
            assert result.usage == whole.result.usage


def test_an_answer_that_was_whole_but_for_its_end_only_ends(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(chat(HELLO))
    result = desk.ask(chat(HELLO, resume=whole.ids))
    assert desk.tokens(0) == []
    assert (result.text, result.finish_reason) == (whole.text, "stop")


def test_an_answer_that_has_all_its_tokens_gets_no_more(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(raw("The sea is", max_tokens=12))
    result = desk.ask(raw("The sea is", max_tokens=12, resume=whole.ids))
    assert desk.tokens(0) == []
    assert (result.text, result.finish_reason) == (whole.text, "length")
    assert result.usage["completion_tokens"] == 12


def test_text_that_was_held_back_until_the_limit_is_not_told_again(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    text = answer(raw("The sea is", max_tokens=12)).text
    stop = (text[-9:] + "#",)
    whole = answer(raw("The sea is", max_tokens=12, stop=stop))
    result = desk.ask(raw("The sea is", max_tokens=12, stop=stop, resume=whole.ids))
    assert desk.tokens(0) == []
    assert result.text == whole.text == text


def test_an_answer_that_has_its_stop_string_gets_no_more(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(raw("The sea is", max_tokens=12))
    stop = across(whole.tokens, 3)
    stopped = answer(raw("The sea is", max_tokens=12, stop=(stop,)))
    result = desk.ask(raw("The sea is", max_tokens=12, stop=(stop,), resume=stopped.ids))
    assert desk.tokens(0) == []
    assert (result.text, result.finish_reason) == (stopped.text, "stop")
    assert result.usage["completion_tokens"] == len(stopped.ids)


def test_a_stop_string_may_begin_in_what_is_resumed(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    stop = across(answer(raw("The sea is", max_tokens=12)).tokens, 3)
    stopped = answer(raw("The sea is", max_tokens=12, stop=(stop,)))
    result = desk.ask(raw("The sea is", max_tokens=12, stop=(stop,), resume=stopped.ids[:4]))
    assert desk.tokens(0) == stopped.tokens[4:]
    assert (result.text, result.finish_reason) == (stopped.text, "stop")


def test_what_is_resumed_is_shown_to_the_repeat_penalty(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(chat(EMOJI, repeat_penalty=1.3, max_tokens=12))
    result = desk.ask(chat(EMOJI, repeat_penalty=1.3, max_tokens=12, resume=whole.ids[:6]))
    assert (result.text, desk.ids(0)) == (whole.text, whole.ids[6:])


@pytest.mark.parametrize("token", [49152, 2**31, 2**70])
def test_ids_that_no_token_has_cannot_be_resumed(desk: Desk, token: int) -> None:
    assert desk.model.vocabulary_size == 49152
    desk.submit(raw("The sea is", resume=[1, token]))
    error = desk.error(0)
    assert isinstance(error, InvalidRequest)
    assert "resume.tokens" in str(error)


# --- Sampling ---


def test_the_same_seed_draws_the_same_text_and_another_seed_another(desk: Desk) -> None:
    texts = [desk.ask(raw("The sea is", temperature=1.0, seed=seed, max_tokens=10)).text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-5}, {"temperature": 1e-38}]
)
def test_what_leaves_only_the_likeliest_token_is_greedy(
    desk: Desk, answer: Callable[[Job], Answer], params: dict[str, Any]
) -> None:
    greedy = answer(raw("The sea is", max_tokens=12)).ids[:5]
    desk.ask(raw("The sea is", **{"max_tokens": 5, "temperature": 1.0, "seed": 3, **params}))
    assert desk.ids(0) == greedy


def test_the_repeat_penalty_keeps_the_model_from_repeating(answer: Callable[[Job], Answer]) -> None:
    assert len(set(answer(chat(EMOJI, max_tokens=42)).text)) == 1
    assert len(set(answer(chat(EMOJI, repeat_penalty=1.3, max_tokens=12)).text)) > 1


# --- JSON ---


def test_an_answer_matches_its_schema(answer: Callable[[Job], Answer]) -> None:
    told = answer(chat("Name a cat.", json_schema=NAMED, max_tokens=40))
    assert told.result.finish_reason == "stop"
    assert list(json.loads(told.text)) == ["name"]


def test_an_empty_schema_means_any_json(answer: Callable[[Job], Answer]) -> None:
    told = answer(chat("Name a cat.", json_schema={}, max_tokens=40))
    json.loads(told.text)


def test_an_answer_with_a_schema_goes_on_where_it_was_left(desk: Desk, answer: Callable[[Job], Answer]) -> None:
    whole = answer(chat("Name a cat.", json_schema=NAMED, max_tokens=40))
    result = desk.ask(chat("Name a cat.", json_schema=NAMED, max_tokens=40, resume=whole.ids[:5]))
    assert (result.text, desk.ids(0)) == (whole.text, whole.ids[5:])


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"enum": []},
        {"properties": 3},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema"},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "^\ud83d$"},
        nested(2000),
    ],
    ids=["type", "no-value", "no-object", "no-such-ref", "remote-ref", "pattern", "half-a-character", "deep"],
)
def test_a_schema_that_cannot_be_met_is_refused_by_name(desk: Desk, schema: dict[str, Any]) -> None:
    desk.submit(raw("The sea is", json_schema=schema))
    error = desk.error(0)
    assert isinstance(error, InvalidRequest)
    assert "json_schema" in str(error)
    assert desk.batcher.idle


@pytest.mark.parametrize("schema", [{"type": "string", "pattern": "^/2024/[a-z]+$"}, {"enum": ["北京", "🌟"]}])
def test_a_schema_that_asks_for_little_is_met_whatever_its_text(desk: Desk, schema: dict[str, Any]) -> None:
    result = desk.ask(raw("A place:", json_schema=schema, max_tokens=12))
    assert result.text.startswith(('"/2024/', '"北', '"🌟'))


# What llama.cpp may answer with the end of the process is asked of another one.
HOSTILE = """
import contextlib, json, sys
from pathlib import Path
import qmesh

plan = qmesh.EnginePlan(qmesh.read_model(Path(sys.argv[1])), 1, 256, 1, qmesh.GpuChoice(0, None, "for a test"))
with contextlib.closing(qmesh.LlamaModel(plan)) as model:
    batcher = qmesh.Batcher(model, plan, "worker-1", lambda: 0.0)
    for ticket, body in enumerate(json.load(sys.stdin)):
        batcher.submit(ticket, "ann", qmesh.Job.from_json(body))
        while not batcher.idle:
            batcher.step()
        last = batcher.take_events()[-1][1]
        print(json.dumps([type(last).__name__, str(last)]), flush=True)
"""


def outcomes(model_path: Path, *jobs: Job) -> list[tuple[str, str]]:
    """What becomes of jobs, one after the other, in a process of their own: the type of the last event, its text."""
    bodies = json.dumps([job.to_json() for job in jobs])
    finished = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(model_path)],
        input=bodies,
        capture_output=True,
        text=True,
        cwd=harness.ROOT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout}{finished.stderr[-2000:]}"
    return [(kind, text) for kind, text in map(json.loads, finished.stdout.splitlines())]


HARMLESS = raw("The sea is", max_tokens=1)


def test_what_is_resumed_must_match_the_schema(model_path: Path) -> None:
    other_text, end_of_text = [100, 200, 300], [2]
    jobs = [raw("A cat:", json_schema=NAMED, max_tokens=4, resume=ids) for ids in (other_text, end_of_text)]
    *refused, last = outcomes(model_path, *jobs, HARMLESS)
    for kind, text in refused:
        assert kind == "InvalidRequest"
        assert "resume.tokens" in text
    assert last[0] == "Result"


def string(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


@pytest.mark.parametrize(
    "schemas",
    [
        [
            {"const": "\u0000"},
            string("^[z-a]$"),
            {"type": "array", "items": {"type": "string"}, "maxItems": 10**5},
            {"type": "array", "items": {"type": "string"}, "minItems": 10**8},
            {"type": "array", "items": {"type": "string"}, "minItems": 1e8},
            {"enum": ["x" * 500_000]},
        ],
        [string("^" + "(a|b)?" * 100 + "$"), string("^(a*){1000}$")],
    ],
    ids=["large-or-unmeetable", "ambiguous"],
)
def test_no_schema_ends_or_blocks_the_worker(model_path: Path, schemas: list[dict[str, Any]]) -> None:
    jobs = [raw("A cat:", json_schema=schema, max_tokens=4) for schema in schemas]
    *hostile, last = outcomes(model_path, *jobs, HARMLESS)
    assert {kind for kind, _ in hostile} <= {"Result", "InvalidRequest"}
    assert last[0] == "Result"


# --- Faults ---


def fail_once(model: WatchedModel, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Let the next evaluation fail: as llama.cpp does, or by an error of ours."""

    def decode(entries: Sequence[qmesh.BatchEntry]) -> bool:
        monkeypatch.undo()
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(model, "decode", decode)


def test_when_an_evaluation_fails_the_running_end_and_the_waiting_are_answered_right(
    desk: Desk, answer: Callable[[Job], Answer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = answer(raw("The sea is", max_tokens=12)).ids
    for _ in range(SLOTS + 1):
        desk.submit(raw("The sea is", max_tokens=6))
    desk.step(2)
    fail_once(desk.model, monkeypatch, None)
    desk.finish()
    for ticket in range(SLOTS):
        assert desk.ids(ticket) == whole[:2]
        assert type(desk.told[ticket][-1]) is qmesh.WorkerLost
    assert desk.ids(SLOTS) == whole[:6]
    assert "could not evaluate" in caplog.text


def test_after_a_fault_of_ours_everyone_is_told_and_the_next_answer_is_right(
    desk: Desk, answer: Callable[[Job], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer(raw("The sea is", max_tokens=12)).ids
    desk.submit(raw("The sea is"))
    fail_once(desk.model, monkeypatch, RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        desk.step()
    desk.batcher.fail_all(qmesh.QMeshError("failed"))
    desk.ask(raw("The sea is", max_tokens=6))
    assert type(desk.error(0)) is qmesh.QMeshError
    assert desk.ids(1) == whole[:6]


def test_a_request_that_waited_when_all_failed_never_runs(desk: Desk) -> None:
    for _ in range(SLOTS + 2):
        desk.submit(raw("The sea is"))
    desk.step()
    desk.batcher.fail_all(qmesh.QMeshError("failed"))
    desk.ask(raw("The sea is", max_tokens=2))
    assert [type(desk.told[ticket][-1]) for ticket in range(SLOTS + 2)] == [qmesh.QMeshError] * (SLOTS + 2)


# --- Models that are not as they should be ---


@pytest.fixture
def patched(model_path: Path, tmp_path: Path) -> Iterator[Callable[[bytes, bytes], Path]]:
    """Makes a copy of the model with some bytes of its header replaced by as many others."""
    path = tmp_path / "patched.gguf"

    def patch(old: bytes, new: bytes) -> Path:
        data = model_path.read_bytes()
        assert data.count(old) == 1
        assert len(old) == len(new)
        path.write_bytes(data.replace(old, new))
        return path

    yield patch
    path.unlink(missing_ok=True)  # pytest keeps the directories of its last runs


def test_a_model_without_a_chat_template_gets_the_plain_form(
    patched: Callable[[bytes, bytes], Path], reference: Any
) -> None:
    path = patched(b"tokenizer.chat_template", b"tokenizer.chat_templatX")
    with contextlib.closing(WatchedModel(plan_for(path, slots=1))) as model:
        assert not model.has_template
        job = replace(chat("Hi", "Hello.", "Who?", max_tokens=6))
        plain = "User: Hi\nAssistant: Hello.\nUser: Who?\nAssistant:"
        assert model.prompt_tokens(job) == model.tokenize(plain, add_special=True)
        theirs = reference.create_completion(plain, temperature=0, repeat_penalty=1.0, max_tokens=6)
        assert Desk(model).ask(job).text == theirs["choices"][0]["text"]


def test_a_chat_template_that_cannot_be_read_is_spoken_of_and_the_plain_form_used(
    patched: Callable[[bytes, bytes], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = patched(b"{% for message in messages %}", b"{% fox message in messages %}")
    with contextlib.closing(qmesh.LlamaModel(plan_for(path, slots=1))) as model:
        assert not model.has_template
        assert model.prompt_tokens(chat("Hi")) == model.tokenize("User: Hi\nAssistant:", add_special=True)
    assert "chat template cannot be used" in caplog.text


def test_a_chat_template_that_refuses_the_messages_makes_the_request_invalid(
    patched: Callable[[bytes, bytes], Path],
) -> None:
    start = b"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    refusing = b"{{ raise_exception('no system message') }}{% for message in messages %}{% if true %}"
    path = patched(start, refusing.ljust(len(start)))
    with contextlib.closing(WatchedModel(plan_for(path, slots=1))) as model:
        desk = Desk(model)
        desk.submit(chat("Hi"))
        assert isinstance(desk.error(0), InvalidRequest)
        assert "no system message" in str(desk.error(0))


def test_the_system_message_of_a_job_takes_the_place_of_the_templates_own(model: WatchedModel) -> None:
    def text(*messages: Message) -> str:
        tokens = model.prompt_tokens(Job("r", messages=messages))
        return b"".join(map(model.piece, tokens)).decode()

    assert "named SmolLM" in text(Message("user", "Hi"))
    own = text(Message("system", "Be brief."), Message("user", "Hi"))
    assert "named SmolLM" not in own
    assert own.index("Be brief.") < own.index("Hi")


def test_a_model_that_llama_cpp_does_not_know_is_refused_with_its_reason(
    patched: Callable[[bytes, bytes], Path],
) -> None:
    field = b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00"
    path = patched(field + b"llama", field + b"lemma")
    with pytest.raises(ModelError, match=r"patched\.gguf: .*unknown model architecture.*lemma"):
        qmesh.LlamaModel(plan_for(path))


def test_a_context_that_llama_cpp_cannot_make_is_refused_with_its_reason(model_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot make 300 x 256 tokens of context.*n_seq_max.*--slots"):
        qmesh.LlamaModel(plan_for(model_path, slots=300, context=256))


def test_a_model_that_cannot_be_evaluated_alike_in_every_batch_is_served_all_the_same(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(qmesh, "UNIFORM_CACHE", (12, 12))  # Q4_K, whose blocks are larger than the model's heads
    caplog.set_level("INFO", logger="qmesh")
    with contextlib.closing(WatchedModel(plan_for(model_path, slots=1))) as model:
        assert Desk(model).ask(raw("1, 2, 3, 4,", max_tokens=6)).text.startswith(" 5, 6")
    assert "cannot evaluate SmolLM2-135M-Instruct.Q4_1 alike in every batch" in caplog.text


def test_the_reason_is_that_of_the_model_which_failed_last(model_path: Path, tmp_path: Path) -> None:
    plan = plan_for(model_path)
    for name in ("one.gguf", "two.gguf"):
        missing = replace(plan, model=replace(plan.model, path=tmp_path / name))
        with pytest.raises(ModelError) as caught:
            qmesh.LlamaModel(missing)
    assert "two.gguf" in str(caught.value)
    assert "one.gguf" not in str(caught.value)


# --- Choosing slots and context ---

GB = 10**9
MODEL = qmesh.ModelFile(Path("m.gguf"), GB, "m", "llama", "Q4_0", 8192, 30, 100_000, bytes(8))
ON_CPU = qmesh.GpuChoice(0, None, "no GPU was found")
ON_GPU = qmesh.GpuChoice(-1, "CUDA", "a GPU for CUDA was found")


def planned(
    usable: float,
    *,
    slots: int | None = None,
    context: int | None = None,
    model: qmesh.ModelFile = MODEL,
    gpu: qmesh.GpuChoice = ON_CPU,
) -> tuple[int, int]:
    """(Slots, context) for so many bytes beside the model, once the reserve is set aside."""
    free = int((usable + model.size) / (1 - qmesh.MEMORY_RESERVE)) + 1
    plan = qmesh.plan_engine(model, slots=slots, context=context, threads=2, gpu=gpu, free_bytes=free)
    assert (plan.model, plan.threads, plan.gpu) == (model, 2, gpu)
    return plan.slots, plan.context


def test_with_memory_enough_slots_and_context_are_the_defaults() -> None:
    assert planned(100 * GB) == (qmesh.DEFAULT_SLOTS, qmesh.DEFAULT_CONTEXT)


@pytest.mark.parametrize(("trained", "context"), [(2048, 2048), (8192, 4096), (0, 4096)])
def test_the_default_context_is_no_longer_than_what_the_model_was_trained_for(trained: int, context: int) -> None:
    assert planned(100 * GB, model=replace(MODEL, context_length=trained)) == (4, context)


@pytest.mark.parametrize(
    ("tokens", "chosen"), [(16384, (4, 4096)), (16383, (4, 2048)), (1024, (4, 256)), (1023, (3, 256)), (256, (1, 256))]
)
def test_where_memory_is_scarce_the_context_shrinks_first_and_then_the_slots(
    tokens: int, chosen: tuple[int, int]
) -> None:
    assert planned(tokens * MODEL.kv_bytes) == chosen


def test_the_context_never_shrinks_below_its_least() -> None:
    assert planned(1100 * MODEL.kv_bytes, model=replace(MODEL, context_length=1000)) == (4, qmesh.MIN_CONTEXT)


def test_a_context_that_was_set_stays_and_the_slots_shrink() -> None:
    assert planned(9000 * MODEL.kv_bytes, context=3000) == (3, 3000)


def test_slots_that_were_set_stay_and_the_context_shrinks() -> None:
    assert planned(9000 * MODEL.kv_bytes, slots=8) == (8, 1024)


@pytest.mark.parametrize(("slots", "context"), [(4, 4096), (None, 65536), (256, None), (None, None)])
def test_what_cannot_fit_is_refused_with_the_numbers(slots: int | None, context: int | None) -> None:
    model = replace(MODEL, size=1_100_000_000)
    with pytest.raises(
        ModelError, match=r"m needs about \d+\.\d GB with \d+ x \d+ tokens.* 1\.2 GB of memory are free"
    ):
        qmesh.plan_engine(model, slots=slots, context=context, threads=2, gpu=ON_CPU, free_bytes=1_200_000_000)


def test_the_need_that_is_named_is_that_of_model_and_context() -> None:
    with pytest.raises(ModelError, match=r"about 2\.6 GB with 4 x 4096 tokens"):
        planned(GB, slots=4, context=4096)


def test_for_a_gpu_nothing_shrinks_for_the_machines_own_memory() -> None:
    assert planned(-GB / 2, gpu=ON_GPU) == (4, 4096)


@repeatable
@given(
    st.integers(0, 4 * GB), st.none() | st.integers(1, 64), st.none() | st.integers(256, 100_000), st.integers(0, 9999)
)
def test_a_plan_fits_and_leaves_what_was_set(usable: int, slots: int | None, context: int | None, trained: int) -> None:
    try:
        chosen = planned(usable, slots=slots, context=context, model=replace(MODEL, context_length=trained))
    except ModelError:
        least = (slots or 1) * (context or qmesh.MIN_CONTEXT)
        assert least * MODEL.kv_bytes > usable
        return
    assert chosen[0] * chosen[1] * MODEL.kv_bytes <= usable + 2
    assert slots in (None, chosen[0])
    assert context in (None, chosen[1])


# --- llama-cpp-python itself ---

INSTALL = f'{sys.executable} -m pip install "llama-cpp-python>=0.3.36,<0.4"'


def test_without_llama_cpp_python_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(qmesh.MissingPackage) as caught:
        qmesh.load_llama()
    assert str(caught.value) == f"llama-cpp-python is not installed here; install it with: {INSTALL}"


def test_where_its_library_does_not_load_the_command_that_builds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise OSError(f"{name}: libllama.so: invalid ELF header")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(qmesh.MissingPackage) as caught:
        qmesh.load_llama()
    assert "invalid ELF header" in str(caught.value)
    assert str(caught.value).endswith(f"{INSTALL} --force-reinstall --no-cache-dir")


def test_a_package_that_it_needs_and_that_does_not_load_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def import_module(name: str) -> Any:
        raise ImportError("a page of advice") from ImportError("libstdc++.so.6: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(qmesh.MissingPackage, match=r"does not load here \(libstdc\+\+\.so\.6: cannot open .* file\);"):
        qmesh.load_llama()


@pytest.mark.parametrize("version", ["0.2.90", "0.3.4", "0.3.35", "0.4.0", "1.0"])
def test_a_version_that_does_not_work_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", version)
    with pytest.raises(qmesh.MissingPackage) as caught:
        qmesh.load_llama()
    assert f"llama-cpp-python {version} is not one this works with" in str(caught.value)
    assert str(caught.value).endswith(INSTALL)


@pytest.mark.parametrize("version", ["0.3.36", "0.3.40", "0.3.37.dev1+cu121"])
def test_a_version_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", version)
    assert qmesh.load_llama() is llama_cpp


# --- The GPU ---


def warning(
    backend: str | None, layers: int, *, can_offload: bool = True, offloaded: tuple[int, int] | None = (31, 31)
) -> str | None:
    """What is said of an engine that was to use a GPU so, and then did so."""
    plan = qmesh.EnginePlan(MODEL, 4, 4096, 2, qmesh.GpuChoice(layers, backend, "for a test"))
    engine = qmesh.Engine(plan, worker_id="w", publish=lambda events: None)
    engine.can_offload, engine.offloaded = can_offload, offloaded
    return qmesh.offload_warning(engine)


@pytest.mark.parametrize("layers", [-1, 33])
@pytest.mark.parametrize("backend", ["CUDA", "Metal"])
def test_a_gpu_that_is_used_needs_no_warning(backend: str, layers: int) -> None:
    assert warning(backend, layers) is None
    assert warning(backend, layers, offloaded=None) is None
    assert warning(backend, layers, offloaded=(1, 31)) is None


def test_layers_that_were_asked_for_where_no_gpu_is_known_are_spoken_of_too() -> None:
    said = warning(None, 12, can_offload=False, offloaded=None)
    assert said is not None
    assert said.startswith("12 layers were to run on a GPU")
    assert 'CMAKE_ARGS="-DGGML_VULKAN=on"' in said
    assert warning(None, 12) is None


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("llama_model_load: using device CUDA0 (NVIDIA T4) (0000:00:1e.0) - 14918 MiB free", "CUDA0 (NVIDIA T4)"),
        ("load: using device Vulkan1 (AMD (RADV)) (unknown id) - 8192 MiB free", "Vulkan1 (AMD (RADV))"),
        ("llama_model_load: using device MTL0 (Apple M2) (unknown id) - 10922 MiB free", "MTL0 (Apple M2)"),
    ],
)
def test_the_log_tells_the_devices_that_a_model_is_put_on(line: str, device: str) -> None:
    log = qmesh.llama_log()
    log.begin()
    log.on_line(2, line.encode() + b"\n", None)
    log.on_line(2, b"load: skipping device V (a) with id 1 - already using device C (b) with the same id\n", None)
    log.on_line(2, b"load_tensors: offloaded 31/31 layers to GPU\n", None)
    assert (log.devices, log.offloaded) == ([device], (31, 31))
    log.begin()
    assert (log.devices, log.offloaded) == ([], None)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"load_backend: loaded CPU backend from /a b/libggml-cpu-haswell.so\n", "haswell"),
        (b"load_backend: loaded CPU backend from /a/libggml-cpu-armv8.2_1.so\n", "armv8.2_1"),
        (b"load_backend: loaded CPU backend from C:\\a\\ggml-cpu-zen4.dll\n", "zen4"),
        (b"load_backend: loaded CPU backend from /a/libggml-cpu.so\n", None),
        (b"load_backend: loaded CUDA backend from /a/libggml-cuda.so\n", None),
    ],
)
def test_the_log_tells_which_kind_of_processor_the_code_is_for(
    monkeypatch: pytest.MonkeyPatch, line: bytes, kind: str | None
) -> None:
    log = qmesh.llama_log()
    monkeypatch.setattr(log, "processor", None)
    log.on_line(2, line, None)
    assert log.processor == kind


def test_without_a_gpu_or_a_wish_for_it_there_is_no_warning() -> None:
    assert warning(None, 0, can_offload=False, offloaded=None) is None
    assert warning("CUDA", 0, can_offload=False, offloaded=(0, 31)) is None


@pytest.mark.parametrize(("backend", "flag"), [("CUDA", "-DGGML_CUDA=on"), ("Metal", "-DGGML_METAL=on")])
def test_a_build_that_cannot_use_the_gpu_is_named_with_the_command_that_mends_it(backend: str, flag: str) -> None:
    said = warning(backend, -1, can_offload=False, offloaded=None)
    assert said is not None
    assert backend in said
    assert f'CMAKE_ARGS="{flag}" {sys.executable} -m pip install "llama-cpp-python' in said


def test_layers_that_did_not_get_to_the_gpu_are_spoken_of() -> None:
    said = warning("CUDA", 20, offloaded=(0, 31))
    assert said is not None
    assert "20 layers" in said
    assert "CUDA" in said


def test_all_layers_are_not_called_minus_one() -> None:
    said = warning("CUDA", -1, offloaded=(0, 31))
    assert said is not None
    assert "-1" not in said


# --- The thread ---


class Listener:
    """Hears what an engine publishes, from its thread."""

    def __init__(self) -> None:
        self.told: dict[int, list[Event]] = {}
        self._events: queue.SimpleQueue[qmesh.EngineEvent] = queue.SimpleQueue()

    def publish(self, events: list[qmesh.EngineEvent]) -> None:
        for event in events:
            self._events.put(event)

    def next(self) -> Event:
        ticket, event = self._events.get(timeout=PATIENCE_S)
        self.told.setdefault(ticket, []).append(event)
        return event

    def until_ended(self, *tickets: int) -> None:
        while not all(any(map(is_last, self.told.get(ticket, []))) for ticket in tickets):
            self.next()


@contextlib.contextmanager
def running(plan: qmesh.EnginePlan) -> Iterator[tuple[qmesh.Engine, Listener]]:
    listener = Listener()
    engine = qmesh.Engine(plan, worker_id="w", publish=listener.publish)
    engine.start().result(PATIENCE_S)
    try:
        yield engine, listener
    finally:
        engine.stop()
        assert engine.join(PATIENCE_S)


def test_an_engine_answers_what_several_threads_ask(model_path: Path, answer: Callable[[Job], Answer]) -> None:
    jobs = {ticket: raw("The sea is", max_tokens=ticket) for ticket in range(1, 7)}
    whole = answer(raw("The sea is", max_tokens=12)).ids
    with running(plan_for(model_path)) as (engine, listener):
        assert (engine.slot_tokens, engine.has_template) == (CONTEXT, True)
        threads = [threading.Thread(target=engine.submit, args=(at, "ann", job)) for at, job in jobs.items()]
        for thread in threads:
            thread.start()
        listener.until_ended(*jobs)
        for thread in threads:
            thread.join()
    for ticket, told in listener.told.items():
        assert isinstance(told[-1], Result)
        assert [event.tokens[0] for event in told if isinstance(event, Token)] == whole[:ticket]


def test_an_engine_cancels_stops_in_the_middle_and_can_be_followed_by_another(model_path: Path) -> None:
    plan = plan_for(model_path, slots=1)
    for _ in range(2):
        with running(plan) as (engine, listener):
            for ticket in (1, 2):
                engine.submit(ticket, "ann", raw("The sea is", max_tokens=400))
            while not listener.told.get(1):
                listener.next()
            engine.cancel(1)
            while not any(isinstance(event, Token) for event in listener.told.get(2, [])):
                listener.next()
            assert not any(map(is_last, listener.told[1]))


def test_an_engine_that_is_stopped_while_it_loads_ends(model_path: Path) -> None:
    engine = qmesh.Engine(plan_for(model_path), worker_id="w", publish=lambda events: None)
    loaded = engine.start()
    engine.stop()
    assert engine.join(PATIENCE_S)
    assert loaded.exception(0) is None


def test_an_engine_with_a_model_that_does_not_load_says_so_and_ends(patched: Callable[[bytes, bytes], Path]) -> None:
    field = b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00"
    plan = plan_for(patched(field + b"llama", field + b"lemma"))
    engine = qmesh.Engine(plan, worker_id="w", publish=lambda events: None)
    with pytest.raises(ModelError, match="lemma"):
        engine.start().result(PATIENCE_S)
    assert engine.join(PATIENCE_S)


def test_an_engine_lives_on_after_a_fault_of_ours(
    model_path: Path,
    answer: Callable[[Job], Answer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = answer(raw("The sea is", max_tokens=12))

    def decode(self: qmesh.LlamaModel, entries: Sequence[qmesh.BatchEntry]) -> bool:
        monkeypatch.undo()
        raise RuntimeError("a fault")

    with running(plan_for(model_path)) as (engine, listener):
        monkeypatch.setattr(qmesh.LlamaModel, "decode", decode)
        engine.submit(1, "ann", raw("The sea is", max_tokens=12))
        listener.until_ended(1)
        engine.submit(2, "ann", raw("The sea is", max_tokens=12))
        listener.until_ended(2)
    assert [type(event) for event in listener.told[1]] == [qmesh.WorkerLost]
    assert listener.told[2][:-1] == whole.tokens
    assert "a fault" in caplog.text


EXITING = """
import queue, sys
from pathlib import Path
import qmesh

plan = qmesh.EnginePlan(qmesh.read_model(Path(sys.argv[1])), 1, 256, 1, qmesh.GpuChoice(0, None, "for a test"))
events = queue.SimpleQueue()
engine = qmesh.Engine(plan, worker_id="w", publish=events.put)
engine.start().result(60)
engine.submit(1, "ann", qmesh.Job("r", prompt="The sea is", params=qmesh.Sampling(max_tokens=250)))
events.get(timeout=60)
print("it runs")
"""


def test_a_process_may_end_while_its_engine_runs(model_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", EXITING, str(model_path)],
        capture_output=True,
        text=True,
        cwd=harness.ROOT,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "it runs\n", "")
