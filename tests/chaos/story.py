"""What a request was told, from first to last, and what must be true of it.

Pure: no process, no clock. So tests can show that each check bites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

Json = dict[str, Any]

MAX_QUOTED = 60  # characters of a text that stand in a complaint


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy request: with the same model, each run of it has the same answer, token for token."""

    text: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of an answer, as the client was told of them. at: seconds of the machine's monotonic clock."""

    at: float
    seq: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended: with an answer, or with an error. failovers: workers that were given up on the way."""

    at: float
    kind: str
    text: str = ""
    worker_id: str = ""
    finish_reason: str = ""
    failovers: int = 0


ANSWER, ERROR, FAULT, LEFT = "answer", "error", "fault", "left"
ENDINGS = frozenset({ANSWER, ERROR, FAULT, LEFT})  # FAULT: what no user may see. LEFT: the client wanted no more


@dataclass(slots=True)
class Story:
    """A request and all that was said of it. `over` is true when nothing more can come."""

    request_id: str
    question: Question
    selected: list[str] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    lost: list[Json] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    late: list[str] = field(default_factory=list)  # kinds of events that came behind the end
    over: bool = False

    def take(self, event: Json) -> None:
        """Write down one event, as `asker.py` prints it."""
        kind = event["event"]
        if self.endings and kind != "over":
            self.late.append(kind)
        if kind == "selected":
            self.selected.append(event["worker_id"])
        elif kind == "queued":
            self.queued.append(event["position"])
        elif kind == "token":
            self.pieces.append(Piece(event["at"], event["seq"], tuple(event["tokens"]), event["text"]))
        elif kind == "lost":
            self.lost.append(event)
        elif kind in ENDINGS:
            told = {name: event[name] for name in ("text", "worker_id", "finish_reason", "failovers") if name in event}
            self.endings.append(Ending(event["at"], kind, **told))
        elif kind == "over":
            self.over = True

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.tokens)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ending(self) -> Ending | None:
        return self.endings[0] if self.endings else None

    @property
    def is_whole(self) -> bool:
        return self.ending is not None and self.ending.kind == ANSWER

    def pause_s(self, moment: float) -> float | None:
        """The longest that the reader waited for a piece, from a moment on; None if none came after it."""
        before = [piece.at for piece in self.pieces if piece.at <= moment][-1:] or [moment]
        times = [*before, *(piece.at for piece in self.pieces if piece.at > moment)]
        return max((later - earlier for earlier, later in pairwise(times)), default=None)


def misplaced(pieces: Sequence[Piece]) -> tuple[int, int]:
    """How many tokens were lost and how many came twice, as the pieces' own numbers tell."""
    lost = repeated = expected = 0
    for piece in pieces:
        lost += max(0, piece.seq - expected)
        repeated += max(0, expected - piece.seq)
        expected = max(expected, piece.seq + len(piece.tokens))
    return lost, repeated


def wrong_tokens(story: Story, known: Story) -> int:
    """In how many places the tokens differ from those of the undisturbed run; of a cut answer, as far as it goes."""
    if story.is_whole:
        return sum(mine != right for mine, right in zip_longest(story.ids, known.ids))
    same = sum(mine == right for mine, right in zip(story.ids, known.ids, strict=False))
    return len(story.ids) - same


def complaints(story: Story, known: Story) -> list[str]:
    """What is wrong with what a request was told; `known` is the same question in an undisturbed run."""
    who = f"request {story.request_id}: "
    return [who + complaint for complaint in (*_about_the_end(story), *_about_the_tokens(story, known))]


def _about_the_end(story: Story) -> list[str]:
    found = []
    if not story.over:
        found.append("it has not ended")
    if story.over and len(story.endings) != 1:
        found.append(f"it ended {len(story.endings)} times: {[ending.kind for ending in story.endings]}")
    if story.late:
        found.append(f"behind its end came {story.late}")
    found += [f"a fault reached the user: {end.text}" for end in story.endings if end.kind == FAULT]
    unclear = [end for end in story.endings if end.kind == ERROR and not end.text.strip()]
    found += ["it ended with an error that says nothing"] * len(unclear)
    return found


def _about_the_tokens(story: Story, known: Story) -> list[str]:
    found = []
    lost, repeated = misplaced(story.pieces)
    if lost or repeated:
        found.append(f"{lost} tokens were lost and {repeated} came twice: {[piece.seq for piece in story.pieces]}")
    if wrong := wrong_tokens(story, known):
        found.append(f"{wrong} tokens are not those of the undisturbed run")
    if not known.text.startswith(story.text):
        found.append(f"the text read is not that of the undisturbed run: {_difference(story.text, known.text)}")
    if story.is_whole:
        assert story.ending is not None
        assert known.ending is not None
        for name, mine in (("text read", story.text), ("result's text", story.ending.text)):
            if mine != known.text:
                found.append(f"the {name} is not that of the undisturbed run: {_difference(mine, known.text)}")
        if story.ending.finish_reason != known.ending.finish_reason:
            found.append(f"it ended by {story.ending.finish_reason!r} and not by {known.ending.finish_reason!r}")
    return found


def _difference(mine: str, right: str) -> str:
    """Both texts from a little before the place where they part."""
    same = next((at for at, pair in enumerate(zip_longest(mine, right)) if pair[0] != pair[1]), len(mine))
    start = max(0, same - MAX_QUOTED // 2)
    return f"{mine[start : start + MAX_QUOTED]!r} for {right[start : start + MAX_QUOTED]!r}, at character {same}"
