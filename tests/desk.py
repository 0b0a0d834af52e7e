"""A batcher on a real model, whose slots, samplers and steps are watched; time is the tests' own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qmesh
from qmesh import Job, Message, Queued, Result, Sampling, Token

SLOTS = 4
CONTEXT = 512
THREADS = 1  # two would spin while they wait for each other, and on a busy machine they wait long
STEP_S = 2.0  # what a step takes on the tests' clock
TOKEN_S = 1 / 250  # and a token, where steps are to take as long as what they evaluate
MAX_STEPS = 5000

Event = Queued | Token | qmesh.Outcome | qmesh.QMeshError


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class WatchedModel(qmesh.LlamaModel):
    """The real model, which checks what llama.cpp leaves to its caller; time passes with each step that evaluates.

    token_s: what a token takes; without it a step takes STEP_S, whatever is in it.
    """

    def __init__(self, plan: qmesh.EnginePlan) -> None:
        super().__init__(plan)
        self.plan = plan
        self.clock = Clock()
        self.cuttable = True
        self.token_s = 0.0
        self.samplers: dict[int, qmesh.Sampler] = {}
        self.freed: dict[int, qmesh.Sampler] = {}
        self.memory: list[list[int]] = [[] for _ in range(plan.slots)]
        self.batches: list[tuple[qmesh.BatchEntry, ...]] = []

    def keep(self, slot: int, length: int) -> bool:
        if length and not self.cuttable:
            return False
        del self.memory[slot][length:]
        return super().keep(slot, length)

    def decode(self, entries: Sequence[qmesh.BatchEntry]) -> bool:
        for entry in entries:
            assert entry.position == len(self.memory[entry.slot]), "a slot's memory has a gap, or two users"
            self.memory[entry.slot].append(entry.token)
        self.batches.append(tuple(entries))
        self.clock.now += self.token_s * len(entries) or STEP_S
        return super().decode(entries)

    def make_sampler(self, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> qmesh.Sampler:
        sampler = super().make_sampler(sampling, prompt, answer)
        self.samplers[id(sampler)] = sampler
        return sampler

    def sample(self, sampler: qmesh.Sampler, index: int) -> int:
        assert id(sampler) in self.samplers, "a sampler is used after it was freed"
        return super().sample(sampler, index)

    def free_sampler(self, sampler: qmesh.Sampler) -> None:
        assert id(sampler) not in self.freed, "a sampler is freed again"
        self.freed[id(sampler)] = sampler
        self.samplers.pop(id(sampler), None)  # one whose making failed was never handed out
        super().free_sampler(sampler)

    def forget(self) -> None:
        self.cuttable = True
        self.token_s = 0.0
        for slot in range(self.plan.slots):
            self.keep(slot, 0)
        self.batches.clear()


class Desk:
    """A batcher on the model, whose slots are emptied first; it keeps what each ticket is told."""

    def __init__(self, model: WatchedModel) -> None:
        model.forget()
        self.model = model
        self.batcher = qmesh.Batcher(model, model.plan, "worker-1", model.clock)
        self.told: dict[int, list[Event]] = {}
        self.begun: list[int] = []  # tickets in the order of their first tokens

    def submit(self, job: Job, client: str = "ann") -> int:
        ticket = len(self.told)
        self.told[ticket] = []
        self.batcher.submit(ticket, client, job)
        self._listen()
        return ticket

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.batcher.step()
            self._listen()

    def finish(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(MAX_STEPS):
            if self.batcher.idle:
                break
            self.step()
        assert self.batcher.idle
        assert not self.model.samplers, "a sampler was never freed"

    def _listen(self) -> None:
        for ticket, event in self.batcher.take_events():
            assert not any(map(is_last, self.told[ticket])), "an event after a ticket's last one"
            self.told[ticket].append(event)
            if isinstance(event, Token) and ticket not in self.begun:
                self.begun.append(ticket)

    def tokens(self, ticket: int) -> list[Token]:
        return [event for event in self.told[ticket] if isinstance(event, Token)]

    def ids(self, ticket: int) -> list[int]:
        return [token for event in self.tokens(ticket) for token in event.tokens]

    def positions(self, ticket: int) -> list[int]:
        return [event.position for event in self.told[ticket] if isinstance(event, Queued)]

    def result(self, ticket: int) -> Result:
        last = self.told[ticket][-1]
        assert isinstance(last, Result)
        return last

    def error(self, ticket: int) -> qmesh.QMeshError:
        """The only thing that a refused ticket was told."""
        (last,) = self.told[ticket]
        assert isinstance(last, qmesh.QMeshError)
        return last

    def ask(self, job: Job) -> Result:
        ticket = self.submit(job)
        self.finish()
        return self.result(ticket)


def is_last(event: Event) -> bool:
    return isinstance(event, (qmesh.Outcome, qmesh.QMeshError))


def plan_for(path: Path, *, slots: int = SLOTS, context: int = CONTEXT, threads: int = THREADS) -> qmesh.EnginePlan:
    return qmesh.EnginePlan(qmesh.read_model(path), slots, context, threads, qmesh.GpuChoice(0, None, "for a test"))


def resumed(tokens: Sequence[int] | None) -> qmesh.Resume | None:
    return None if tokens is None else qmesh.Resume(tuple(tokens))


def chat(*turns: str, resume: Sequence[int] | None = None, **params: Any) -> Job:
    """A conversation, greedy unless said otherwise; the user has the first turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple(Message(role, turn) for role, turn in zip(roles, turns, strict=False))
    return Job("r", messages=messages, params=Sampling(**{"temperature": 0, **params}), resume=resumed(resume))


def raw(prompt: str, *, resume: Sequence[int] | None = None, timeout_s: float = 1e4, **params: Any) -> Job:
    """A text that goes on, greedy unless said otherwise; few tokens, and so cheap."""
    sampling = Sampling(**{"temperature": 0, **params})
    return Job("r", prompt=prompt, params=sampling, resume=resumed(resume), timeout_s=timeout_s)


@dataclass(frozen=True)
class Answer:
    """What one request was told from first to last."""

    tokens: list[Token]
    result: Result

    @property
    def ids(self) -> list[int]:
        return [token for event in self.tokens for token in event.tokens]

    @property
    def text(self) -> str:
        return self.result.text


class SilentEngine(qmesh.Engine):
    """Takes commands, and does nothing; there is no model."""

    def __init__(self) -> None:
        model = qmesh.ModelFile(Path("none"), 1, "none", "none", "none", 4096, 1, 0, bytes(8))
        plan = qmesh.EnginePlan(model, 2, 4096, 1, qmesh.GpuChoice(0, None, "none"))
        super().__init__(plan, worker_id="0" * 64, publish=lambda events: None)
