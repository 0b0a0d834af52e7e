"""The programs that people have for OpenAI's API, unchanged, against a gateway with real workers behind it.

They are imported where they are used: that takes a second or two, and every run of the tests reads this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import pytest

import qmesh

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionChunk

KEY = "sk-of-this-test"
MODEL = qmesh.DEFAULT_MODEL.file_name.removesuffix(".gguf")
QUESTION = "Why is the sky blue?"
BRIEF: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
FREED_WITHIN_S = 1.0
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def said_by_user(text: str) -> Any:
    return [{"role": "user", "content": text}]


ASKED: dict[str, Any] = {"model": MODEL, "messages": said_by_user(QUESTION), **BRIEF}
LONG: dict[str, Any] = ASKED | {"messages": said_by_user("Write a long story about a fox."), "max_tokens": 100}


@dataclass(frozen=True)
class Door:
    """A mesh, and where its gateway is."""

    mesh: harness.Mesh
    base_url: str


def opened(mesh: harness.Mesh, *flags: str) -> Door:
    keys = mesh.directory / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    gateway = mesh.start_gateway("--api-key", str(keys), *flags)
    return Door(mesh, f"{gateway.ready['url']}/v1")


@pytest.fixture(scope="module", autouse=True)
def nothing_but_this_machine() -> Iterator[None]:
    """Nobody's proxy, key or record of what is asked comes between."""
    with pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.upper().startswith(("OPENAI_", "LANGSMITH_", "LANGCHAIN_"))]:
            patched.delenv(name)
        patched.setenv("NO_PROXY", harness.LOOPBACK)
        patched.setenv("LANGSMITH_TRACING", "false")
        yield


@pytest.fixture(scope="module")
def door(two_workers: harness.Mesh) -> Door:
    return opened(two_workers)


def openai_client(door: Door, **options: Any) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=door.base_url, **{"api_key": KEY, "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(door: Door) -> Iterator[openai.OpenAI]:
    with openai_client(door) as client:
        yield client


@pytest.fixture(scope="module")
def answer(client: openai.OpenAI) -> str:
    """What the mesh answers to ASKED, however it is asked."""
    text: str | None = client.chat.completions.create(**ASKED).choices[0].message.content
    assert text
    assert len(text.split()) > 5
    return text


def text_of(pieces: Iterable[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)


@contextlib.contextmanager
def requests_at(mesh: harness.Mesh) -> Iterator[Callable[[], int]]:
    """Asks the workers themselves how many requests they have."""
    settings = qmesh.Settings(host=harness.LOOPBACK, topic=mesh.topic, state_dir=str(mesh.directory / "watching"))
    with qmesh.BlockingClient(settings) as watching:
        yield lambda: sum(status["queue"][of] for status in watching.statuses() for of in ("active", "waiting"))


def until_none(requests: Callable[[], int]) -> None:
    closed = asked = time.monotonic()
    while requests():
        assert asked - closed < FREED_WITHIN_S
        asked = time.monotonic()


# --- The package `openai`: answers ---


def test_openai_reads_the_same_answer_whole_and_streamed(client: openai.OpenAI, answer: str) -> None:
    whole = client.chat.completions.create(**ASKED)
    assert (whole.object, whole.model, whole.choices[0].message.role) == ("chat.completion", MODEL, "assistant")
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer, "length")
    pieces = list(client.chat.completions.create(**ASKED, stream=True))
    assert len(pieces) > BRIEF["max_tokens"] / 2
    assert text_of(pieces) == answer
    assert {piece.id for piece in pieces} == {pieces[0].id} != {whole.id}
    assert [choice.finish_reason for choice in pieces[-1].choices] == ["length"]


def test_openai_reads_the_usage_at_the_end_of_a_stream(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(**ASKED).usage
    assert usage is not None
    assert (usage.completion_tokens, usage.total_tokens) == (20, usage.prompt_tokens + 20)
    *pieces, last = client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    assert last.usage is not None
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], usage.prompt_tokens, 20)
    assert {piece.usage for piece in pieces} == {None}


def test_openais_stream_helper_puts_the_answer_together(client: openai.OpenAI, answer: str) -> None:
    with client.chat.completions.stream(**ASKED, stop=".") as stream:  # it takes an answer that was cut for a failure
        told = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion().choices[0].message.content
    assert whole == "".join(told) == answer.partition(".")[0]


def test_openais_asynchronous_client_asks_several_at_once(door: Door, answer: str) -> None:
    import openai

    async def ask() -> Sequence[str | None]:
        async with openai.AsyncOpenAI(base_url=door.base_url, api_key=KEY, max_retries=0) as client:

            async def whole() -> str | None:
                said: str | None = (await client.chat.completions.create(**ASKED)).choices[0].message.content
                return said

            async def streamed() -> str:
                return text_of([piece async for piece in await client.chat.completions.create(**ASKED, stream=True)])

            return await asyncio.gather(whole(), streamed(), whole(), streamed())

    assert list(asyncio.run(ask())) == [answer] * 4


def test_openai_gets_json_that_fits_a_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    asked = ASKED | {"messages": said_by_user("John is 12 years old."), "max_tokens": 60}
    text = client.chat.completions.create(**asked, response_format=wanted).choices[0].message.content
    person = json.loads(text or "")
    assert (person.keys(), type(person["age"])) == ({"name", "age"}, int)


def test_openai_parses_an_answer_as_a_pydantic_model(client: openai.OpenAI) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    asked = ASKED | {"messages": said_by_user("John is 12 years old."), "max_tokens": 60}
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        parsed = parse(**asked, response_format=Person).choices[0].message.parsed
        assert isinstance(parsed, Person)
        assert parsed.name


def test_openai_gets_two_choices_that_differ_and_the_same_two_for_the_same_seed(client: openai.OpenAI) -> None:
    asked = ASKED | {"temperature": 1.0, "n": 2, "seed": 7}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    streamed = list(client.chat.completions.create(**asked, stream=True))
    for index, text in enumerate(texts):
        told = [choice for piece in streamed for choice in piece.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in told) == text


def test_openai_gets_an_answer_that_ends_before_a_stop_word(client: openai.OpenAI, answer: str) -> None:
    word = answer.split()[4]
    (choice,) = client.chat.completions.create(**ASKED, stop=[word, "\n\n\n"]).choices
    assert (choice.message.content, choice.finish_reason) == (answer.partition(word)[0], "stop")


def test_openais_legacy_completions_go_on_with_a_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "1 2 3 4 5 6 7", **BRIEF}
    whole = client.completions.create(**asked)
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    assert whole.choices[0].text.startswith(" 8 9")
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    two = client.completions.create(**(asked | {"prompt": [asked["prompt"], "a b c d e f"]}))
    assert len(two.choices) == 2
    assert two.choices[0].text == whole.choices[0].text


def test_openai_lists_the_models_and_retrieves_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


@pytest.mark.parametrize(
    "harmless",
    [
        {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
        {"prediction": {"type": "content", "content": "The answer"}},
        {"reasoning_effort": "none", "verbosity": "medium"},
        {"metadata": {"team": "fox"}, "service_tier": "auto", "store": False, "user": "me"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False},
    ],
    ids=lambda harmless: next(iter(harmless)),
)
def test_openais_parameters_that_leave_an_answer_as_it_is_are_taken(
    client: openai.OpenAI, answer: str, harmless: dict[str, Any]
) -> None:
    assert client.chat.completions.create(**ASKED, **harmless).choices[0].message.content == answer


# --- The package `openai`: errors ---


def test_openai_raises_authentication_error_for_a_key_that_is_not_known(door: Door) -> None:
    import openai

    with (
        openai_client(door, api_key="sk-of-someone") as stranger,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        stranger.models.list()
    assert raised.value.code == "invalid_api_key"


Refusal = tuple[str, str | None, str | None, Callable[["openai.OpenAI"], object]]
REFUSALS: dict[str, Refusal] = {
    "no such model": (
        "NotFoundError",
        "model",
        "model_not_found",
        lambda client: client.chat.completions.create(**(ASKED | {"model": "nobody-has-this"})),
    ),
    "no such model, streamed": (
        "NotFoundError",
        "model",
        "model_not_found",
        lambda client: client.chat.completions.create(**(ASKED | {"model": "nobody-has-this"}), stream=True),
    ),
    "no such model to retrieve": (
        "NotFoundError",
        "model",
        "model_not_found",
        lambda client: client.models.retrieve("nobody-has-this"),
    ),
    "no such endpoint": ("NotFoundError", None, "unknown_url", lambda client: client.files.list()),
    "a parameter that is not supported": (
        "BadRequestError",
        "logprobs",
        "invalid_request",
        lambda client: client.chat.completions.create(**ASKED, logprobs=True),
    ),
    "a value out of range": (
        "BadRequestError",
        "top_p",
        "invalid_request",
        lambda client: client.chat.completions.create(**ASKED, top_p=3),
    ),
    "more than the context holds": (
        "BadRequestError",
        None,
        "context_length_exceeded",
        lambda client: client.chat.completions.create(**(ASKED | {"messages": said_by_user("a b " * 2000)})),
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_openai_raises_the_class_that_fits_and_names_the_parameter(client: openai.OpenAI, refusal: Refusal) -> None:
    import openai

    kind, param, code, ask = refusal
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client)
    assert (type(raised.value).__name__, raised.value.param, raised.value.code) == (kind, param, code)


class Sleeps:
    """In the place of `time.sleep`: notes how long, and does something meanwhile."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.seconds: list[float] = []
        self._meanwhile = meanwhile

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self._meanwhile()


def test_openai_raises_rate_limit_error_while_all_are_busy_and_asks_again_when_it_is_told(
    mesh: harness.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    mesh.start_worker("--slots", "1", "--queue", "1")
    with openai_client(opened(mesh, "--wait", "0")) as client, requests_at(mesh) as requests:
        whole = client.chat.completions.create(**ASKED).choices[0].message.content
        busy = client.chat.completions.create(**LONG, stream=True)
        next(busy)
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(**ASKED)
        assert raised.value.response.headers["Retry-After"] == str(qmesh.RETRY_AFTER_S)

        def give_up_the_slot() -> None:
            busy.close()
            until_none(requests)

        sleeps = Sleeps(give_up_the_slot)
        monkeypatch.setattr(time, "sleep", sleeps)
        again = client.with_options(max_retries=1).chat.completions.create(**ASKED)
    assert again.choices[0].message.content == whole
    assert sleeps.seconds == [qmesh.RETRY_AFTER_S]


def test_openai_asks_again_while_there_is_no_worker_and_gets_its_answer_when_one_has_come(
    mesh: harness.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    sleeps, statuses = Sleeps(mesh.start_worker), list[int]()
    monkeypatch.setattr(time, "sleep", sleeps)
    watched = openai.DefaultHttpxClient(event_hooks={"response": [lambda said: statuses.append(said.status_code)]})
    with openai_client(opened(mesh), max_retries=1, http_client=watched) as client:
        late = client.chat.completions.create(**ASKED)
    assert late.choices[0].message.content
    assert (statuses, sleeps.seconds) == ([503, 200], [qmesh.RETRY_AFTER_S])


# --- The package `openai`: what happens on the way ---


def test_a_stream_that_openai_closes_early_frees_its_slot_within_a_second(door: Door, client: openai.OpenAI) -> None:
    with requests_at(door.mesh) as requests:
        stream = client.chat.completions.create(**LONG, stream=True)
        next(stream)
        assert requests() == 1
        stream.close()
        until_none(requests)


def test_openai_reads_the_whole_answer_though_its_worker_is_killed_in_the_middle(mesh: harness.Mesh) -> None:
    worker, _ = mesh.start_workers(2)
    with openai_client(opened(mesh)) as client:
        undisturbed = client.chat.completions.create(**LONG)
        here: dict[str, Any] = {"stream_options": {"include_usage": True}, "extra_body": {"worker": worker.worker_id}}
        stream = client.chat.completions.create(**LONG, stream=True, **here)
        pieces = [next(stream) for _ in range(5)]
        worker.end()
        pieces += stream
    assert text_of(pieces) == undisturbed.choices[0].message.content
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == LONG["max_tokens"]
    gateway = mesh.processes[-1]
    assert gateway.popen.poll() is None
    assert "Traceback" not in gateway.stderr


# --- LangChain ---


def chat_model(door: Door, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=door.base_url, api_key=lambda: KEY, model=MODEL, max_retries=0, **(BRIEF | options))


def test_langchain_invokes_streams_and_asks_in_batches(door: Door, answer: str) -> None:
    model = chat_model(door, stream_usage=True)
    said = model.invoke(QUESTION)
    assert (said.content, said.usage_metadata["output_tokens"]) == (answer, 20)
    pieces = list(model.stream(QUESTION))
    assert len(pieces) > BRIEF["max_tokens"] / 2
    assert "".join(piece.content for piece in pieces) == answer
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 20
    assert [one.content for one in model.batch([QUESTION] * 3)] == [answer] * 3


def test_langchain_gets_structured_output(door: Door) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    model = chat_model(door, max_tokens=60)
    for method in ("json_schema", "json_mode"):
        said = model.with_structured_output(Person, method=method).invoke(
            "John is 12 years old. Say name and age, JSON."
        )
        assert isinstance(said, Person)


# --- llm ---


@pytest.fixture
def llm(door: Door, tmp_path: Path) -> Callable[..., str]:
    """Runs the command `llm`, for which the mesh is a model of its own."""
    model = {"model_id": "mesh", "model_name": MODEL, "api_base": door.base_url, "api_key_name": "mesh"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML

    def run(*arguments: str) -> str:
        limits = ["-o", "temperature", "0", "-o", "max_tokens", "20"]
        return output_of([sys.executable, "-m", "llm", *arguments, "--key", KEY, *limits], LLM_USER_PATH=str(tmp_path))

    return run


def output_of(command: list[str], stdin: bytes = b"", **env: str) -> str:
    """What a command prints; it must succeed."""
    finished = subprocess.run(
        command, input=stdin, capture_output=True, timeout=harness.COMMAND_TIMEOUT_S, check=False, env=os.environ | env
    )
    assert finished.returncode == 0, finished.stderr.decode()
    return finished.stdout.decode()


def test_llm_asks_whole_and_streamed_and_goes_on_with_the_conversation(
    llm: Callable[..., str], client: openai.OpenAI, answer: str
) -> None:
    assert llm("-m", "mesh", QUESTION, "--no-stream") == llm("-m", "mesh", QUESTION) == f"{answer}\n"
    turns = [*said_by_user(QUESTION), {"role": "assistant", "content": answer}, *said_by_user("And at night?")]
    whole = client.chat.completions.create(**(ASKED | {"messages": turns}))
    assert llm("-c", "And at night?") == f"{whole.choices[0].message.content}\n"


# --- curl ---


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def curl(*arguments: str, stdin: bytes = b"") -> str:
    return output_of(["curl", "-sS", "-H", f"Authorization: Bearer {KEY}", *arguments], stdin)


def content_in(body: str) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


@needs_curl
def test_curl_gets_an_answer_however_it_sends_the_question(door: Door, answer: str) -> None:
    url, question = f"{door.base_url}/chat/completions", json.dumps(ASKED).encode()
    assert content_in(curl(url, "-d", "@-", stdin=question)) == answer
    assert content_in(curl(url, "-H", "Transfer-Encoding: chunked", "--data-binary", "@-", stdin=question)) == answer
    assert content_in(curl(url, "--http1.0", "-d", "@-", stdin=question)) == answer


@needs_curl
def test_curl_shows_a_stream_as_server_sent_events(door: Door, answer: str) -> None:
    question = json.dumps(ASKED | {"stream": True}).encode()
    lines = curl("-N", f"{door.base_url}/chat/completions", "-d", "@-", stdin=question).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line.startswith("data: ")]
    assert "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]) == answer
    (selected,) = [json.loads(line.removeprefix(": qmesh ")) for line in lines if '"selected"' in line]
    assert selected["worker_id"] in {worker.worker_id for worker in door.mesh.processes[:2]}


@needs_curl
def test_curl_is_told_to_go_on_with_a_large_body_and_is_spared_one_that_is_too_large(door: Door, answer: str) -> None:
    def upload(size: int) -> str:
        question = json.dumps(ASKED | {"user": "x" * size}).encode()
        url, head = f"{door.base_url}/chat/completions", ["-H", "Expect: 100-continue", "--expect100-timeout", "60"]
        return curl(url, "-i", *head, "--data-binary", "@-", "-w", "\n%{size_upload}", stdin=question)

    went_on, _, rest = upload(qmesh.MAX_HTTP_BODY_BYTES - 10_000).partition("\r\n\r\n")
    assert went_on == "HTTP/1.1 100 Continue"
    head, _, tail = rest.partition("\r\n\r\n")
    body, _, sent = tail.rpartition("\n")
    assert (head.split("\r\n")[0], content_in(body)) == ("HTTP/1.1 200 OK", answer)
    assert int(sent) > qmesh.MAX_HTTP_BODY_BYTES - 10_000
    refused = upload(qmesh.MAX_HTTP_BODY_BYTES)
    assert refused.startswith("HTTP/1.1 413 ")
    assert refused.endswith("\n0")


@needs_curl
def test_curl_asks_for_the_headers_alone(door: Door) -> None:
    head, body = curl("-I", f"{door.base_url}/models"), curl(f"{door.base_url}/models")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert head.endswith("\r\n\r\n")
    assert f"\r\nContent-Length: {len(body)}\r\n" in head
    assert curl("-I", f"{door.base_url}/chat/completions").startswith("HTTP/1.1 405 ")


# --- Node ---


NODE_PROGRAM = """
const { OpenAI } = require("openai");
const [baseURL, apiKey, asked] = process.argv.slice(1);
(async () => {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const whole = await client.chat.completions.create(JSON.parse(asked));
  let streamed = "";
  for await (const piece of await client.chat.completions.create({ ...JSON.parse(asked), stream: true })) {
    streamed += piece.choices[0]?.delta?.content ?? "";
  }
  const failed = await client.chat.completions.create({ ...JSON.parse(asked), model: "none" }).catch((error) => error);
  console.log(JSON.stringify([whole.choices[0].message.content, streamed, failed.constructor.name, failed.code]));
})();
"""


def test_the_openai_package_for_node_reads_answers_and_errors(door: Door, answer: str) -> None:
    if (
        shutil.which("node") is None
        or subprocess.run(["node", "-e", "require.resolve('openai')"], check=False).returncode
    ):
        pytest.skip("needs node and its package openai, where NODE_PATH tells")
    said = output_of(["node", "-e", NODE_PROGRAM, door.base_url, KEY, json.dumps(ASKED)])
    assert json.loads(said) == [answer, answer, "NotFoundError", "model_not_found"]
