"""The engine on other architectures than llama's: biases, a sliding window, a recurrent state, and a hybrid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny_models
from desk import SLOTS, THREADS, Desk, WatchedModel, plan_for, raw, resumed

import qmesh

CONTEXT = 256
TEXTS = ("Hello there, it is a day", "A second text, which is longer than the window of a layer", "x", "12345")
TOKENS = 40
CUTTABLE = ("qwen2", "gemma3")  # the others keep a state that cannot be taken back


@dataclass(frozen=True)
class Subject:
    """A model, and what it answers to TEXTS when each is asked alone and cold."""

    architecture: str
    model: WatchedModel
    alone: dict[str, list[int]]


@pytest.fixture(scope="module", params=tiny_models.ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    path = tiny_models.write_model(request.param, tmp_path_factory.mktemp("model") / f"{request.param}.gguf")
    with contextlib.closing(WatchedModel(plan_for(path, context=CONTEXT))) as model:
        alone = {}
        for text in TEXTS:
            desk = Desk(model)
            desk.ask(raw(text, max_tokens=TOKENS))
            alone[text] = desk.ids(0)
        yield Subject(request.param, model, alone)


def test_an_answer_is_that_of_llama_cpp_python(subject: Subject) -> None:
    attention: Any = {"flash_attn": True, "type_k": qmesh.UNIFORM_CACHE[0], "type_v": qmesh.UNIFORM_CACHE[1]}
    path = str(subject.model.plan.model.path)
    with contextlib.closing(
        llama_cpp.Llama(path, n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, **attention, verbose=False)
    ) as llama:
        for text, ids in subject.alone.items():
            tokens = llama.tokenize(text.encode())
            theirs = llama.generate(tokens, temp=0.0, repeat_penalty=1.0)
            assert [token for _, token in zip(ids, theirs, strict=False)] == ids


def test_company_changes_nothing(subject: Subject) -> None:
    desk = Desk(subject.model)
    tickets = {}
    for text in TEXTS:
        tickets[text] = desk.submit(raw(text, max_tokens=TOKENS))
        desk.step(3)
    desk.finish()
    assert {text: desk.ids(ticket) for text, ticket in tickets.items()} == subject.alone
    assert max(len({entry.slot for entry in batch}) for batch in subject.model.batches) == SLOTS


def test_an_answer_goes_on_behind_any_of_its_tokens(subject: Subject) -> None:
    text = TEXTS[1]
    whole = subject.alone[text]
    for cut in range(1, len(whole), 5):
        desk = Desk(subject.model)
        desk.ask(replace(raw(text, max_tokens=TOKENS), resume=resumed(whole[:cut])))
        assert desk.ids(0) == whole[cut:]


def test_what_goes_on_from_a_slots_memory_is_answered_as_if_it_were_cold(subject: Subject) -> None:
    text, more = TEXTS[0], " and more of it"
    desk = Desk(subject.model)
    cold = desk.ask(raw(text + more, max_tokens=TOKENS))
    warm = Desk(subject.model)
    warm.ask(raw(text, max_tokens=1))
    second = warm.ask(raw(text + more, max_tokens=TOKENS))
    assert second.text == cold.text
    assert second.usage["cached_tokens"] >= len(text)


def test_where_texts_part_a_memory_is_cut_or_where_it_cannot_be_the_whole_is_evaluated(subject: Subject) -> None:
    desk = Desk(subject.model)
    for text in TEXTS[::-1]:
        desk.ask(raw(text, max_tokens=TOKENS))
    other = "Hello there, it is a night"
    warm = desk.ask(raw(other, max_tokens=TOKENS))
    cold = Desk(subject.model).ask(raw(other, max_tokens=TOKENS))
    assert warm.text == cold.text
    assert (warm.usage["cached_tokens"] > 0) is (subject.architecture in CUTTABLE)


def test_a_cancelled_answers_slot_serves_the_next_one_right(subject: Subject) -> None:
    desk = Desk(subject.model)
    for text in TEXTS:
        desk.submit(raw(text + "!", max_tokens=TOKENS))
    desk.step(9)
    for ticket in range(SLOTS):
        desk.batcher.cancel(ticket)
    tickets = {text: desk.submit(raw(text, max_tokens=TOKENS)) for text in TEXTS}
    desk.finish()
    assert {text: desk.ids(ticket) for text, ticket in tickets.items()} == subject.alone


def test_a_model_without_a_template_gets_the_plain_form(subject: Subject) -> None:
    assert not subject.model.has_template
    message = qmesh.Message("user", "Hello")
    desk = Desk(subject.model)
    chat = desk.ask(qmesh.Job("r", messages=(message,), params=qmesh.Sampling(max_tokens=9, temperature=0)))
    assert chat.text == desk.ask(raw(qmesh.plain_chat([message]), max_tokens=9)).text


def test_a_slot_can_be_cut_where_a_layers_window_has_long_left(tmp_path: Path) -> None:
    path = tiny_models.write_model("gemma3", tmp_path / "gemma3.gguf")
    with contextlib.closing(WatchedModel(plan_for(path, slots=1, context=tiny_models.CONTEXT))) as model:
        text = "abcdefghij" * 90
        for kept in (0, 100, 890):  # long out of the window, and in it
            other = text[:kept] + "XY"
            cold = Desk(model).ask(raw(other, max_tokens=TOKENS))
            desk = Desk(model)
            desk.ask(raw(text, max_tokens=TOKENS))
            warm = desk.ask(raw(other, max_tokens=TOKENS))
            assert (warm.text, warm.usage["cached_tokens"]) == (cold.text, kept + 1 if kept else 1)


def test_the_files_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (tiny_models.write_model("mamba", tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()
