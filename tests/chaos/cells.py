"""A cell of the matrix: one fault that strikes at one stage, in an arena of its own, and what came of it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

from arena import Arena, Known, LanArena, LoopbackArena
from story import ANSWER, ERROR, misplaced, wrong_tokens

A = TypeVar("A", bound=Arena)


class NotTried(Exception):
    """Why a fault cannot be let loose here."""


@dataclass
class Scene:
    """What a fault gets: the means to make arenas, and dice that fall the same way for the same seed."""

    directory: Path
    model: Path
    known: Known
    rng: Random
    arenas: list[Arena] = field(default_factory=list)

    def loopback(self) -> LoopbackArena:
        """An arena on 127.0.0.1."""
        return self._keep(LoopbackArena(self._place(), self.model, self.known, self.rng))

    def lan(self, *, proxied: bool = False) -> LanArena:
        """An arena with a machine for each worker; proxied: what clients and workers say can be harmed on its way."""
        return self._keep(LanArena(self._place(), self.model, self.known, self.rng, proxied=proxied))

    def _place(self) -> Path:
        return self.directory / f"arena-{len(self.arenas)}"

    def _keep(self, arena: A) -> A:
        self.arenas.append(arena)
        return arena


@dataclass(frozen=True)
class Cell:
    """needs_lan: whether it is played in network namespaces. play: may raise NotTried."""

    fault: str
    at: str
    play: Callable[[Scene], None]
    needs_lan: bool = False

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.at}" if self.at else self.fault


@dataclass
class Outcome:
    """What came of some runs of one cell.

    moved: answers that another worker went on with. pauses_s: the longest that each reader waited behind the fault.
    """

    runs: int = 0
    whole: int = 0
    errors: int = 0
    wrong_tokens: int = 0
    moved: int = 0
    pauses_s: list[float] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)  # errors, as users read them
    measured: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)

    def add(self, arena: Arena) -> None:
        for story in arena.stories:
            kinds = [ending.kind for ending in story.endings]
            self.whole += kinds == [ANSWER]
            self.errors += kinds == [ERROR]
            self.wrong_tokens += max(sum(misplaced(story.pieces)), wrong_tokens(story, arena.known[story.question]))
            self.said.update(ending.text for ending in story.endings if ending.kind == ERROR)
            self.moved += len(set(story.selected)) > 1
            if arena.struck_at is not None and (pause_s := story.pause_s(arena.struck_at)) is not None:
                self.pauses_s.append(pause_s)
        for what, seconds in arena.measured:
            self.measured.setdefault(what, []).append(seconds)
        self.notes += arena.notes
        self.broken += arena.broken


def run(cell: Cell, directory: Path, model: Path, known: Known, *, seed: str, into: Outcome | None = None) -> Outcome:
    """Play a cell once, and add what came of it."""
    outcome = into or Outcome()
    scene = Scene(directory, model, known, Random(f"{seed}/{cell.name}"))
    outcome.runs += 1
    try:
        cell.play(scene)
    except NotTried as reason:
        outcome.not_tried.append(str(reason))
    except Exception:  # of one fault; the others are still to be tried
        outcome.broken.append(traceback.format_exc())
    for arena in scene.arenas:
        outcome.add(arena)
    return outcome
