"""The web page, in a real browser, served by a real gateway; of the workers only the model is scripted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from loop import PATIENCE_S
from scripted_worker import (
    FINGERPRINT,
    IS_SILENT,
    Script,
    ScriptedWorker,
    health_of,
    in_turn,
    mesh_of,
    refuses,
    result_frame,
    says,
    token_frame,
)

import qmesh
from qmesh import LOOPBACK, Connection, Gateway, GatewayOptions

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

T = TypeVar("T")

STORY = ("Once ", "upon ", "a ", "time ", "there ", "was ", "a ", "fox.")
WHOLE = "".join(STORY)
KEY = "a-key-of-the-lab"
DESKTOP, PHONE = (1280, 800), (360, 640)
MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

pytestmark = pytest.mark.usefixtures("parting_without_waiting")


@functools.cache
def unavailable() -> str | None:
    """Why the page cannot be tried here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return "there is no Chromium here"
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Skips where there is no browser; fails where the page has to be tested (QMESH_TEST_BROWSER=required)."""
    reason = unavailable()
    if reason is not None:
        if os.environ.get("QMESH_TEST_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


# --- A mesh, and a gateway to it, in a thread of their own ---


@dataclass(eq=False)
class Writer(ScriptedWorker):
    """Writes `pieces` from where the request goes on. Before the piece `stops_at` it does what `then` says."""

    script: Script = IS_SILENT  # replaced
    pieces: tuple[str, ...] = STORY
    stops_at: int = -1
    then: Callable[[], Coroutine[Any, Any, bool]] | None = None  # whether to go on; hangs up otherwise
    shown_model: str = "tiny"

    def __post_init__(self) -> None:
        self.script = self._write
        queue = {"active": 0, "waiting": 0, "capacity": 16}
        models = [{"name": self.shown_model, "fingerprint": FINGERPRINT.hex()}]
        self.status = {"health": health_of(self.score), "slots": 4, "queue": queue, "speed": 1.0, "models": models}

    async def _write(self, connection: Connection, request_id: str) -> bool:
        done = len(self.prompts[-1].get("resume", {"tokens": []})["tokens"])
        for seq in range(done, len(self.pieces)):
            if seq == self.stops_at and self.then is not None and not await self.then():
                return False
            await connection.send(token_frame(request_id, seq, self.pieces[seq]))
        await connection.send(result_frame(request_id, "".join(self.pieces), len(self.pieces)))
        return True

    @property
    def said(self) -> list[list[tuple[str, str]]]:
        """The conversations that it was sent."""
        return [[(turn["role"], turn["content"]) for turn in body["messages"]] for body in self.prompts]


class Pause:
    """Where a worker waits until the test lets it go on."""

    def __init__(self) -> None:
        self._over: Future[bool] = Future()

    async def __call__(self) -> bool:
        return await asyncio.wrap_future(self._over)

    def end(self) -> None:
        self._over.set_result(True)


async def hang_up() -> bool:
    return False


@dataclass
class Stage:
    """A gateway with its mesh, running until the end of the `with`."""

    topic: str
    directory: Path
    url: str = ""
    _loop: asyncio.AbstractEventLoop | None = None
    _over: Future[None] = field(default_factory=Future)

    @contextlib.contextmanager
    def plays(self, *workers: ScriptedWorker, **options: Any) -> Iterator[Stage]:
        """options: of the gateway."""
        started: Future[str] = Future()
        thread = threading.Thread(target=lambda: asyncio.run(self._play(workers, options, started)))
        thread.start()
        try:
            self.url = started.result(PATIENCE_S)
            yield self
        finally:
            self.close()
            thread.join(PATIENCE_S)

    def wait(self, what: Coroutine[Any, Any, T]) -> T:
        """What something comes to in the mesh's own thread."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        """Stop the gateway."""
        if not self._over.done():
            self._over.set_result(None)

    async def _play(self, workers: tuple[ScriptedWorker, ...], options: dict[str, Any], started: Future[str]) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with mesh_of(self.topic, self.directory, *workers) as client:
                gateway = Gateway(client, GatewayOptions(host=LOOPBACK, port=0, **options))
                started.set_result((await gateway.start())[0])
                await asyncio.wrap_future(self._over)
                await gateway.stop()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise


@pytest.fixture
def stage(topic: str, tmp_path: Path) -> Stage:
    return Stage(topic, tmp_path)


# --- A visitor ---


class Visitor:
    """Somebody in front of the page; keeps what the browser complains of, and where it sends requests."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.aborted: list[str] = []
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.aborted.append(request.url))
        page.goto(url)

    def ask(self, question: str = "Tell me a story") -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def sees(self, text: str | re.Pattern[str], where: str = "body") -> None:
        self.page.locator(where).filter(has_text=text).first.wait_for()

    def sees_the_end(self) -> None:
        self.page.locator("#send").wait_for()

    @property
    def answers(self) -> list[str]:
        return self.page.locator(".answer .text").all_inner_texts()

    @property
    def foot(self) -> str:
        return self.page.locator(".answer .foot").last.inner_text()

    @property
    def overflow(self) -> int:
        """Pixels by which the page, or what scrolls in it, is wider than its place."""
        wider = "nodes => Math.max(...nodes.map(node => node.scrollWidth - node.clientWidth))"
        return int(self.page.locator("html, #talk, #mesh").evaluate_all(wider))


Visits = Callable[..., contextlib.AbstractContextManager[Visitor]]


@pytest.fixture
def visit(browser: Browser) -> Visits:
    @contextlib.contextmanager
    def visit(
        stage: Stage, size: tuple[int, int] = DESKTOP, *, expected: str = "nothing", **options: Any
    ) -> Iterator[Visitor]:
        """expected: a pattern of what the browser may complain of."""
        width, height = size
        with browser.new_context(viewport={"width": width, "height": height}, **options) as context:
            visitor = Visitor(context.new_page(), stage.url)
            yield visitor
            assert [said for said in visitor.complaints if not re.search(expected, said)] == []
            own = (stage.url, f"blob:{stage.url}", "data:")
            assert [url for url in visitor.requests if not url.startswith(own)] == []

    return visit


# --- Asking ---


def test_an_answer_is_seen_while_it_is_written_and_tells_who_wrote_it(stage: Stage, visit: Visits) -> None:
    pause = Pause()
    writer = Writer(stops_at=4, then=pause)
    with stage.plays(writer), visit(stage) as visitor:
        visitor.ask()
        visitor.sees("Once upon a time", ".answer .text")
        visitor.sees("answering", ".card.live")
        assert visitor.page.locator(".answer").get_attribute("aria-busy") == "true"
        pause.end()
        visitor.sees_the_end()
        assert visitor.answers == [WHOLE]
        assert re.search(rf"worker {writer.worker_id.short}.*tokens/s.*8 tokens.*\d s.*tiny", visitor.foot, re.DOTALL)
        assert visitor.page.locator(".card.live").count() == 0


def test_the_whole_conversation_is_sent_and_outlives_the_page(stage: Stage, visit: Visits) -> None:
    writer = Writer()
    with stage.plays(writer), visit(stage) as visitor:
        visitor.ask("One")
        visitor.sees_the_end()
        visitor.page.click("#settings-open")
        visitor.page.fill("#system", "Be brief.")
        visitor.page.fill("#temperature", "0.3")
        visitor.page.press("#system", "Escape")
        visitor.page.reload()
        visitor.ask("Two")
        visitor.sees_the_end()
        assert writer.said == [
            [("user", "One")],
            [("system", "Be brief."), ("user", "One"), ("assistant", WHOLE), ("user", "Two")],
        ]
        assert writer.prompts[1]["params"]["temperature"] == 0.3


def test_escape_stops_an_answer_at_the_worker_too_and_keeps_what_came(stage: Stage, visit: Visits) -> None:
    pause = Pause()
    writer = Writer(stops_at=2, then=pause)
    with stage.plays(writer), visit(stage, expected="ERR_ABORTED") as visitor:
        visitor.ask()
        visitor.sees("Once upon", ".answer .text")
        visitor.page.keyboard.press("Escape")
        visitor.sees_the_end()
        visitor.sees("stopped by you", ".answer .foot")
        assert visitor.answers == ["Once upon "]
        assert [url.rpartition("/")[2] for url in visitor.aborted] == ["completions"]
        pause.end()
        assert stage.wait(writer.cancelled.get()) == writer.prompts[0]["request_id"]


def test_an_answer_goes_on_quietly_when_its_worker_is_lost(stage: Stage, visit: Visits) -> None:
    first, second = Writer(score=95, stops_at=3, then=hang_up), Writer(score=70)
    with stage.plays(first, second), visit(stage) as visitor:
        visitor.ask()
        visitor.sees_the_end()
        lost, after = first.worker_id.short, second.worker_id.short
        assert visitor.answers == [WHOLE]
        note = visitor.page.locator(".answer .note").inner_text()
        assert note == f"Worker {lost} was lost after 3 tokens; {after} went on."
        assert f"worker {after}" in visitor.foot


def test_the_last_question_can_be_changed_and_asked_again(stage: Stage, visit: Visits) -> None:
    writer = Writer()
    with stage.plays(writer), visit(stage) as visitor:
        visitor.ask("Tell me a stroy")
        visitor.sees_the_end()
        visitor.page.get_by_role("button", name="Edit").click()
        assert visitor.page.input_value("#question") == "Tell me a stroy"
        visitor.page.keyboard.press("Escape")  # leaves all as it was
        assert visitor.page.input_value("#question") == ""
        visitor.page.get_by_role("button", name="Edit").click()
        visitor.ask("Tell me a story")
        visitor.sees_the_end()
        visitor.page.get_by_role("button", name="Try again").click()
        visitor.sees_the_end()
        assert writer.said == [[("user", text)] for text in ("Tell me a stroy", "Tell me a story", "Tell me a story")]
        assert visitor.answers == [WHOLE]


def test_a_certain_worker_is_asked(stage: Stage, visit: Visits) -> None:
    best, wanted = Writer(score=95), Writer(score=50)
    with stage.plays(best, wanted), visit(stage) as visitor:
        card = visitor.page.locator(".card").filter(has_text=wanted.worker_id.short)
        card.get_by_role("button", name="Ask this one").click()
        visitor.ask()
        visitor.sees_the_end()
        assert (len(best.prompts), len(wanted.prompts)) == (0, 1)


def test_a_conversation_is_exported_and_put_away_and_brought_back(stage: Stage, visit: Visits) -> None:
    with stage.plays(Writer()), visit(stage) as visitor:
        visitor.ask()
        visitor.sees_the_end()
        for kind, read in (("As text", str), ("As JSON", json.loads)):
            visitor.page.click("#export summary")
            with visitor.page.expect_download() as download:
                visitor.page.get_by_role("button", name=kind).click()
            exported = read(Path(download.value.path()).read_text("utf-8"))
            assert WHOLE in str(exported)
        visitor.page.click("#fresh")
        assert visitor.answers == []
        visitor.page.get_by_role("button", name="Bring back").click()
        assert visitor.answers == [WHOLE]


# --- What goes wrong ---


def test_without_a_worker_the_page_says_how_to_start_one(stage: Stage, visit: Visits) -> None:
    with stage.plays(), visit(stage, expected="503") as visitor:
        visitor.ask()
        visitor.sees_the_end()
        assert "python3 qmesh.pyz worker" in visitor.page.locator(".problem").inner_text()
        visitor.sees("No worker", "#mesh-said")


def test_a_mesh_that_is_full_is_asked_again_when_one_wants(stage: Stage, visit: Visits) -> None:
    worker = ScriptedWorker(in_turn(refuses(), refuses(), says("Welcome")))
    with stage.plays(worker, wait_s=0), visit(stage, expected="429") as visitor:
        visitor.ask()
        visitor.sees("Every worker is at its limit", ".problem")
        while not visitor.answers[-1]:
            visitor.page.get_by_role("button", name="Try again").click()
            visitor.sees_the_end()
        assert visitor.answers == ["Welcome"]


def test_the_api_key_is_asked_for_until_it_is_right_and_the_question_goes_out_then(stage: Stage, visit: Visits) -> None:
    writer = Writer()
    with stage.plays(writer, keys=(KEY,)), visit(stage, expected="401") as visitor:
        visitor.ask()
        visitor.sees("API key", ".problem")
        assert visitor.page.evaluate("document.activeElement.id") == "key"
        visitor.page.fill("#key", "not-the-key")
        visitor.page.press("#key", "Enter")
        visitor.sees("does not take this API key", "#gate")
        assert writer.prompts == []
        visitor.page.fill("#key", KEY)
        visitor.page.press("#key", "Enter")
        visitor.sees(WHOLE, ".answer .text")
        visitor.sees(writer.worker_id.short, ".card")
        assert not visitor.page.locator("#gate").is_visible()


def test_a_gateway_that_is_gone_is_named_and_the_conversation_stays(stage: Stage, visit: Visits) -> None:
    with stage.plays(Writer()), visit(stage, expected="ERR_") as visitor:
        visitor.ask()
        visitor.sees_the_end()
        stage.close()
        visitor.sees("does not answer", "#mesh-said")
        visitor.ask("And then?")
        visitor.sees("does not answer", ".problem")
        visitor.page.get_by_role("button", name="Try again").wait_for()
        assert visitor.answers == [WHOLE, ""]


# --- Strangers ---

EVIL = "<img src=x onerror='window.taken=1'><script>window.taken=1</script>"
TRICKS = (
    EVIL,
    f"**{EVIL}** `{EVIL}` [a](javascript:window.taken=1) [b](data:text/html,x) ![c](https://example.org/c.png)\n\n",
    f"# {EVIL}\n\n- {EVIL}\n\n|{EVIL}|b|\n|---|---|\n|x|{EVIL}|\n\n```{EVIL}\n{EVIL}\n```\n",
    "[a link](https://example.org/page)",
)


def test_nothing_that_workers_say_runs_or_loads(stage: Stage, visit: Visits) -> None:
    with stage.plays(Writer(pieces=TRICKS, shown_model=EVIL)), visit(stage) as visitor:
        visitor.sees("onerror", ".card .model")
        visitor.ask()
        visitor.sees_the_end()
        page = visitor.page
        assert "".join(visitor.answers).count("<script>") == 8
        assert page.evaluate("window.taken") is None
        assert page.locator("#turns img, #turns script, #cards img, #cards script").count() == 0
        links = page.locator("#turns a").evaluate_all("links => links.map(({href, rel}) => [href, rel])")
        assert [href for href, _ in links] == ["https://example.org/c.png", "https://example.org/page"]
        assert {rel for _, rel in links} == {"noopener noreferrer"}


MARKED = """\
# Sky
It is **blue**, *not* `red` or snake_case_name.

1. one
   - inner
2. two

```py
x = 1
```
2 * 3 * 4"""


def test_marks_become_what_they_mean(stage: Stage, visit: Visits) -> None:
    with stage.plays(Writer(pieces=(MARKED,))), visit(stage) as visitor:
        visitor.ask()
        visitor.sees_the_end()
        text = visitor.page.locator(".answer .text")
        tags = text.evaluate("node => [...node.children].map(child => child.tagName)")
        assert tags == ["H2", "P", "OL", "DIV", "P"]
        for tag, words in (("strong", "blue"), ("em", "not"), ("p code", "red"), ("ol ul", "inner"), ("pre", "x = 1")):
            assert text.locator(tag).all_inner_texts() == [words]
        assert text.locator("p").last.inner_text() == "2 * 3 * 4"


# --- Everybody can use it ---


def test_the_keyboard_does_it_all(stage: Stage, visit: Visits) -> None:
    writer = Writer()
    with stage.plays(writer), visit(stage) as visitor:
        keyboard, page = visitor.page.keyboard, visitor.page
        assert page.evaluate("document.activeElement.id") == "question"
        keyboard.type("One")
        keyboard.press("Shift+Enter")
        keyboard.type("line")
        keyboard.press("Enter")
        visitor.sees_the_end()
        assert writer.said == [[("user", "One\nline")]]
        order = []
        for _ in range(3):
            keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
            outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outlined != "none"
        assert order == ["model", "worker", "send"]


def test_a_phone_has_all_of_it_without_scrolling_sideways(stage: Stage, visit: Visits) -> None:
    wide = "x" * 300
    pieces = (f"{wide}\n\n```\n{wide}\n```\n\n{'|wide' * 40}|\n{'|-' * 40}|\n",)
    with stage.plays(Writer(pieces=pieces, shown_model=wide)), visit(stage, PHONE, has_touch=True) as visitor:
        assert visitor.overflow == 0
        visitor.ask(wide)
        visitor.sees_the_end()
        assert visitor.overflow == 0
        assert not visitor.page.locator("#mesh").is_visible()
        visitor.page.click("#mesh-bar")
        visitor.sees("healthy 80", ".card")
        assert visitor.overflow == 0
        visitor.page.keyboard.press("Escape")
        assert not visitor.page.locator("#mesh").is_visible()


# The texts that are seen, each with the contrast of its colour with the background behind it.
CONTRASTS = """() => {
  const light = (color) => {
    const part = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const behind = (node) => {
    const color = node ? getComputedStyle(node).backgroundColor : "rgb(255, 255, 255)";
    return /, 0\\)$/.test(color) ? behind(node.parentElement) : color;
  };
  const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.body.querySelectorAll("*")].filter((node) => own(node) && node.checkVisibility()).map((node) => {
    const [one, other] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    return [node.textContent.slice(0, 40), (one + 0.05) / (other + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(stage: Stage, visit: Visits, scheme: str) -> None:
    with (
        stage.plays(Writer(score=95, stops_at=3, then=hang_up), Writer(score=60), Writer(score=20)),
        visit(stage, color_scheme=scheme) as visitor,
    ):
        visitor.ask()
        visitor.sees_the_end()
        contrasts = visitor.page.evaluate(CONTRASTS)
        assert len(contrasts) > 30
        assert [found for found in contrasts if found[1] < MIN_CONTRAST] == []
        background = "getComputedStyle(document.body).backgroundColor"
        before = visitor.page.evaluate(background)
        while visitor.page.locator("#theme-name").inner_text().lower() != {"light": "dark", "dark": "light"}[scheme]:
            visitor.page.click("#theme")
        assert visitor.page.evaluate(background) != before


# --- The text of the page ---


def test_the_policy_lets_the_pages_own_script_and_style_run_and_nothing_else() -> None:
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", qmesh.PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in qmesh.page_policy()
    assert qmesh.page_policy().startswith("default-src 'none'; ")
    assert "unsafe" not in qmesh.page_policy()


def test_the_page_never_turns_text_into_markup_or_code() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", " style="):
        assert way not in qmesh.PAGE
    assert re.findall(r"<[^>]* on\w+=", qmesh.PAGE) == []
