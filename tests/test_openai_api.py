"""What programs made for OpenAI's API send, as jobs, and answers in the shapes that they read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import (
    CHAT,
    TEXT,
    Answer,
    BadParameter,
    CompletionRequest,
    InvalidRequest,
    Json,
    Message,
    Reply,
    Result,
    Sampling,
    Shape,
    Token,
)

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=200)
TIMEOUT_S = 30.0
HELLO: Json = {"messages": [{"role": "user", "content": "hello"}]}
DEEP = qmesh.MAX_SCHEMA_DEPTH + 1


def chat(**more: Any) -> CompletionRequest:
    return CompletionRequest.from_json(CHAT, HELLO | more, TIMEOUT_S)


def text(prompt: Any = "hello", **more: Any) -> CompletionRequest:
    return CompletionRequest.from_json(TEXT, {"prompt": prompt, **more}, TIMEOUT_S)


def said(*messages: Json) -> list[tuple[str, str]]:
    """The turns of the one job that these messages make."""
    (job,) = CompletionRequest.from_json(CHAT, {"messages": list(messages)}, TIMEOUT_S).jobs
    return [(message.role, message.content) for message in job.messages]


def schema_of(schema: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}


def nested(levels: int) -> Json:
    schema: Json = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


# --- What is read ---


def test_a_question_alone_is_a_job_that_may_fill_the_context() -> None:
    request = chat()
    (job,) = request.jobs
    assert (request.shape, request.n, request.stream, request.include_usage, request.worker) == (
        CHAT,
        1,
        False,
        False,
        None,
    )
    assert job.messages == (Message("user", "hello"),)
    assert (job.prompt, job.model, job.timeout_s) == (None, None, TIMEOUT_S)
    assert job.params == Sampling(max_tokens=qmesh.REST_OF_CONTEXT)


def test_a_prompt_is_asked_as_it_is() -> None:
    (job,) = text("Once upon").jobs
    assert (job.prompt, job.messages) == ("Once upon", ())


@pytest.mark.parametrize(
    ("given_name", "value", "name", "expected"),
    [
        ("max_tokens", 7, "max_tokens", 7),
        ("max_completion_tokens", 7, "max_tokens", 7),
        ("max_tokens", -1, "max_tokens", qmesh.REST_OF_CONTEXT),
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 1.5, "temperature", 1.5),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 3, "top_k", 3),
        ("min_p", 0.25, "min_p", 0.25),
        ("repeat_penalty", 1.2, "repeat_penalty", 1.2),
        ("seed", 17, "seed", 17),
        ("seed", -1, "seed", qmesh.MAX_SEED),
        ("seed", 2**63 - 1, "seed", (2**63 - 1) % (qmesh.MAX_SEED + 1)),
        ("stop", "END", "stop", ("END",)),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop", [], "stop", ()),
        ("response_format", {"type": "text"}, "json_schema", None),
        ("response_format", {"type": "json_object"}, "json_schema", {"type": "object"}),
        ("response_format", schema_of({"type": "array"}), "json_schema", {"type": "array"}),
        ("response_format", schema_of(nested(qmesh.MAX_SCHEMA_DEPTH)), "json_schema", nested(qmesh.MAX_SCHEMA_DEPTH)),
    ],
)
def test_how_to_choose_tokens_reaches_the_job(given_name: str, value: Any, name: str, expected: Any) -> None:
    for request in (chat(**{given_name: value}), text(**{given_name: value})):
        assert getattr(request.jobs[0].params, name) == expected


@pytest.mark.parametrize("names", [("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")])
def test_the_newer_name_of_the_limit_counts_where_both_are_given(names: tuple[str, str]) -> None:
    sizes = {"max_tokens": 5, "max_completion_tokens": 9}
    assert chat(**{name: sizes[name] for name in names}).jobs[0].params.max_tokens == 9


def test_the_model_and_the_worker_are_passed_on() -> None:
    request = chat(model="tiny", worker="0123ab")
    assert (request.jobs[0].model, request.worker) == ("tiny", "0123ab")
    assert chat(model="").jobs[0].model is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (False, False)),
        ({"stream": False, "stream_options": {}}, (False, False)),
        ({"stream": True}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True)),
        ({"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}, (True, False)),
    ],
)
def test_whether_to_stream_and_with_what_at_the_end(more: Json, expected: tuple[bool, bool]) -> None:
    request = chat(**more)
    assert (request.stream, request.include_usage) == expected


NEUTRAL = [
    ("audio", {}),
    ("best_of", 1),
    ("echo", False),
    ("frequency_penalty", 0),
    ("frequency_penalty", 0.0),
    ("function_call", "none"),
    ("functions", []),
    ("logit_bias", {}),
    ("logprobs", False),
    ("logprobs", 0),
    ("modalities", ["text"]),
    ("parallel_tool_calls", True),
    ("parallel_tool_calls", False),
    ("presence_penalty", 0),
    ("suffix", ""),
    ("tool_choice", "auto"),
    ("tools", []),
    ("top_logprobs", 0),
    ("user", "me"),
    ("store", True),
    ("metadata", {"a": "b"}),
    ("safety_identifier", "x"),
    ("prompt_cache_key", "x"),
    ("service_tier", "auto"),
]


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_what_changes_nothing_is_taken(name: str, value: Any) -> None:
    assert chat(**{name: value}).jobs[0].params == chat().jobs[0].params


@pytest.mark.parametrize("name", sorted({name for name, _ in NEUTRAL} | {"n", "model", "stop", "seed", "worker"}))
def test_null_is_as_good_as_nothing(name: str) -> None:
    assert chat(**{name: None}).jobs[0].params == chat().jobs[0].params


def test_null_of_a_parameter_that_nobody_knows_is_nothing_too() -> None:
    assert len(chat(reasoning_effort=None).jobs) == 1


# --- Messages ---


def test_every_role_is_read() -> None:
    roles = ["system", "developer", "user", "assistant", "user"]
    turns = said(*({"role": role, "content": role} for role in roles))
    assert turns == list(zip(["system", "system", "user", "assistant", "user"], roles, strict=True))


def test_the_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}]
    assert said({"role": "user", "content": parts}) == [("user", "one\ntwo")]


def test_who_says_it_and_an_answer_without_a_word_are_taken() -> None:
    turns = said(
        {"role": "user", "content": "hello", "name": "Ada"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "and?"},
    )
    assert turns == [("user", "hello"), ("assistant", ""), ("user", "and?")]


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]]])
def test_texts_that_come_as_tokens_are_refused_with_what_to_send(tokens: Any) -> None:
    with pytest.raises(BadParameter, match="prompt as tokens is not supported: send texts"):
        text(tokens)
    with pytest.raises(BadParameter, match="input as tokens is not supported: send texts"):
        qmesh.EmbeddingsRequest.from_json({"input": tokens})


def test_an_answer_is_taken_back_as_it_was_given() -> None:
    request = chat()
    message = Reply(request).whole([answer_of("hi")])["choices"][0]["message"]
    sent_again = message | {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    turns = said(*HELLO["messages"], sent_again, {"role": "user", "content": "and?"})
    assert turns == [("user", "hello"), ("assistant", "hi"), ("user", "and?")]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ({}, "messages"),
        ([], "messages"),
        ([{"role": "user", "content": "x"}] * (qmesh.MAX_MESSAGES + 1), "messages"),
        ([{"role": "user", "content": "  "}], "messages"),
        ([{"role": "user", "content": []}], "messages"),
        (["hello"], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": {}, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "bold": 1}]}], "messages[0].content[0].bold"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages[0].weight"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}], "messages[1].tool_calls"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_where_they_are_wrong(messages: Any, param: str) -> None:
    with pytest.raises(BadParameter) as caught:
        CompletionRequest.from_json(CHAT, {"messages": messages}, TIMEOUT_S)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


# --- Refusals ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x"}),
        ("best_of", 2),
        ("echo", True),
        ("frequency_penalty", 0.5),
        ("functions", [{}]),
        ("logit_bias", {"1": 1}),
        ("logprobs", True),
        ("logprobs", 3),
        ("modalities", ["text", "audio"]),
        ("presence_penalty", -1),
        ("suffix", "x"),
        ("tool_choice", "required"),
        ("tools", [{"type": "function"}]),
        ("top_logprobs", 2),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("unheard_of", False),
        ("prompt", "x"),  # of the other endpoint
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "7"),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", 10**4000),
        ("temperature", -1),
        ("temperature", 10**4000),
        ("temperature", "hot"),
        ("top_p", 2),
        ("top_k", -1),
        ("min_p", []),
        ("repeat_penalty", 0),
        ("seed", -(2**63) - 1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", 3),
        ("stop", ""),
        ("stop", [None]),
        ("stop", ["x"] * (qmesh.MAX_STOP_STRINGS + 1)),
        ("stop", "x" * (qmesh.MAX_STOP_CHARS + 1)),
        ("n", 0),
        ("n", -1),
        ("n", 1.0),
        ("n", True),
        ("n", qmesh.MAX_CHOICES + 1),
        ("n", 10**4000),
        ("model", 3),
        ("model", "\ud800"),
        ("worker", 3),
        ("worker", ""),
        ("worker", "abc"),
        ("worker", "0123456\n"),
        ("worker", "0" * 65),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", []),
        ("stream_options", {"include_usage": True}),
        ("response_format", "json"),
        ("response_format", {}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": []}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", schema_of("x")),
        ("response_format", schema_of(nested(DEEP))),
        ("response_format", schema_of({"type": "string", "maxLength": 10**9})),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(BadParameter) as caught:
        chat(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value) or name == "response_format"
    assert qmesh.api_error(caught.value)[1]["error"]["param"] == name


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"include_obfuscation": True}, "stream_options"),
        ({"chunk_size": 3}, "stream_options"),
        ({"include_usage": "yes"}, "stream_options.include_usage"),
    ],
)
def test_options_of_a_stream_that_are_not_supported_are_refused(options: Json, param: str) -> None:
    with pytest.raises(BadParameter) as caught:
        chat(stream=True, stream_options=options)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [None, [], "", " ", ["a", ""], [1, 2], [[1]], 5, {}, "\ud800"])
def test_a_prompt_that_cannot_be_asked_is_refused(prompt: Any) -> None:
    with pytest.raises(BadParameter) as caught:
        text(prompt)
    assert caught.value.param == "prompt"


def test_a_name_that_could_steer_a_terminal_is_not_shown() -> None:
    with pytest.raises(BadParameter) as caught:
        chat(**{"\x1b[2J" + "x" * 1000 + "\ud800": 1})
    shown = caught.value.param + str(caught.value)
    assert shown.isprintable()
    assert len(shown) < 200


# --- Several choices ---


def test_each_prompt_has_all_its_choices_one_after_the_other() -> None:
    request = text(["a", "b"], n=2)
    assert [job.prompt for job in request.jobs] == ["a", "a", "b", "b"]
    assert len({job.request_id for job in request.jobs}) == 4


def test_the_choices_of_one_prompt_have_seeds_of_their_own_and_the_same_each_time() -> None:
    highest = qmesh.MAX_SEED
    assert [job.params.seed for job in text(["a", "b"], n=2, seed=highest).jobs] == [highest, 0, highest, 0]
    assert [job.params.seed for job in text(["a", "b"], n=2).jobs] == [None] * 4


def test_more_choices_than_are_allowed_are_refused_however_they_come_about() -> None:
    most = qmesh.MAX_CHOICES
    assert len(text(["x"] * (most // 2), n=2).jobs) == most
    for prompts, n in ((most + 1, 1), (most // 2 + 1, 2)):
        with pytest.raises(BadParameter, match=f"{most} is the most") as caught:
            text(["x"] * prompts, n=n)
        assert caught.value.param == "n"


# --- Answers ---


def answer_of(reply: str, *, prompt: int = 5, completion: int = 3, cached: int = 2, reason: str = "stop") -> Answer:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "cached_tokens": cached}
    return Answer(Result(reply, reason, usage, {}, "tiny-1", "0" * 64), 0, 1.0, 2.0, 3.0)


def test_a_whole_answer_of_a_chat() -> None:
    body = Reply(chat()).whole([answer_of("hi", reason="length")])
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "tiny-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_a_whole_answer_to_a_prompt() -> None:
    body = Reply(text()).whole([answer_of("hi")])
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}]


def test_two_replies_have_ids_of_their_own() -> None:
    request = chat()
    assert Reply(request).id != Reply(request).id


def test_a_prompt_is_counted_once_however_many_choices_it_has() -> None:
    request = text(["a", "b"], n=2)
    answers = [
        answer_of("a1", prompt=10, completion=1, cached=4),
        answer_of("a2", prompt=10, completion=2, cached=10),
        answer_of("b1", prompt=100, completion=4, cached=40),
        answer_of("b2", prompt=100, completion=8, cached=100),
    ]
    body = Reply(request).whole(answers)
    assert [choice["text"] for choice in body["choices"]] == ["a1", "a2", "b1", "b2"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {
        "prompt_tokens": 110,
        "completion_tokens": 15,
        "total_tokens": 125,
        "prompt_tokens_details": {"cached_tokens": 44},
    }


def test_usage_that_a_worker_does_not_tell_counts_as_none() -> None:
    result = Result("hi", "stop", {}, {}, "tiny", "0" * 64)
    usage = Reply(chat()).whole([Answer(result, 0, 1.0, 2.0, 3.0)])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (0, 0, 0)


def deltas(pieces: list[Json]) -> list[Any]:
    return [(piece["choices"][0].get("delta"), piece["choices"][0]["finish_reason"]) for piece in pieces]


def test_the_pieces_of_a_chat_begin_with_the_role_and_end_with_the_reason() -> None:
    reply = Reply(chat(stream=True))
    first = reply.pieces(0, Token(0, (1,), "he"), is_first=True)
    second = reply.pieces(0, Token(1, (2,), "llo"), is_first=False)
    last = reply.pieces(0, answer_of("hello"), is_first=False)
    assert deltas(first) == [({"role": "assistant", "content": ""}, None), ({"content": "he"}, None)]
    assert deltas(second) == [({"content": "llo"}, None)]
    assert deltas(last) == [({}, "stop")]
    assert {piece["object"] for piece in first + second + last} == {"chat.completion.chunk"}
    assert len({(piece["id"], piece["created"], piece["model"]) for piece in first + second + last}) == 1
    assert all("usage" not in piece for piece in first + second + last)


def test_the_pieces_of_a_completion_are_texts() -> None:
    reply = Reply(text(stream=True, n=2))
    pieces = reply.pieces(1, Token(0, (1,), "he"), is_first=True) + reply.pieces(1, answer_of("he"), is_first=False)
    assert [piece["choices"] for piece in pieces] == [
        [{"index": 1, "text": "he", "logprobs": None, "finish_reason": None}],
        [{"index": 1, "text": "", "logprobs": None, "finish_reason": "stop"}],
    ]


def test_a_token_without_a_whole_character_is_no_piece() -> None:
    reply = Reply(chat(stream=True))
    assert reply.pieces(0, Token(0, (1,), ""), is_first=False) == []
    assert deltas(reply.pieces(0, Token(0, (1,), ""), is_first=True)) == [({"role": "assistant", "content": ""}, None)]


def test_an_empty_answer_has_its_role_and_its_reason() -> None:
    pieces = Reply(chat(stream=True)).pieces(0, answer_of("", completion=0), is_first=True)
    assert deltas(pieces) == [({"role": "assistant", "content": ""}, None), ({}, "stop")]


def test_usage_that_was_asked_for_is_null_until_the_last_piece_which_has_no_choice() -> None:
    reply = Reply(chat(stream=True, stream_options={"include_usage": True}))
    pieces = reply.pieces(0, answer_of("hi"), is_first=True)
    assert [piece["usage"] for piece in pieces] == [None, None]
    last = reply.usage_piece([answer_of("hi")])
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 8)


# --- Errors ---


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (BadParameter("top_p", "no"), 400, "invalid_request_error", "invalid_request", "top_p"),
        (InvalidRequest("no"), 400, "invalid_request_error", "invalid_request", None),
        (InvalidRequest("no", "context_exceeded"), 400, "invalid_request_error", "context_length_exceeded", None),
        (qmesh.NoSuchWorker("no"), 404, "invalid_request_error", "worker_not_found", "worker"),
        (qmesh.ModelNotFound("no"), 404, "invalid_request_error", "model_not_found", "model"),
        (qmesh.Refused("no"), 429, "rate_limit_error", "overloaded", None),
        (qmesh.Refused("no", "draining"), 429, "rate_limit_error", "draining", None),
        (qmesh.NoWorkerFound("no"), 503, "service_unavailable_error", "no_worker", None),
        (qmesh.DeadlineExceeded("no"), 504, "timeout_error", "timeout", None),
        (qmesh.WorkerLost("no"), 502, "server_error", "lost", None),
        (qmesh.WireError("no"), 502, "server_error", "internal", None),
        (qmesh.QMeshError("no"), 500, "server_error", "internal", None),
        (qmesh.MissingTls("no"), 500, "server_error", "internal", None),
    ],
)
def test_every_error_has_a_status_and_openai_s_shape(
    error: qmesh.QMeshError, status: int, kind: str, code: str, param: str | None
) -> None:
    got, body = qmesh.api_error(error)
    message = body["error"].pop("message")
    assert (got, body) == (status, {"error": {"type": kind, "param": param, "code": code}})
    assert message.startswith("no. ")
    assert message.endswith(".")


# --- Whatever comes ---

NAMES = sorted(
    {name for name, _ in NEUTRAL}
    | {"messages", "prompt", "model", "worker", "n", "stream", "stream_options", "response_format", "seed", "stop"}
    | {"max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty"}
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["user", "assistant", "text", "json_schema", "json_object", "auto", "none", "\ud800", "0123456"]),
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "json_schema", "schema", "include_usage", "name", "maxLength", "pattern"]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(
    st.sampled_from([CHAT, TEXT]), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES), st.booleans()
)
@SETTINGS
def test_any_object_is_a_request_or_what_is_wrong_with_it(shape: Shape, body: Json, is_near: bool) -> None:
    """is_near: with a question that is right, so that what else there is gets looked at."""
    if is_near:
        body = body | {"messages": HELLO["messages"]} if shape is CHAT else body | {"prompt": "hello"}
    try:
        jobs = CompletionRequest.from_json(shape, body, TIMEOUT_S).jobs
    except BadParameter as error:
        qmesh.dump_json(qmesh.api_error(error)[1])
        return
    assert 1 <= len(jobs) <= qmesh.MAX_CHOICES
    for job in jobs:
        qmesh.encode_frame(job.to_json())
