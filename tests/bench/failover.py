"""The gap in an answer when its worker is lost half-way, and whether any token is lost or comes twice.

    python tests/bench/failover.py [--rounds N] [--workers N] [--faults NAME ...] [--seed N] [--model FILE] [--out DIR]

Real workers, each a process with one thread, answer a greedy request of a fresh client. At a token that the seed draws,
the one that writes is killed (SIGKILL), or told to stop with nothing left to finish in (SIGTERM, --grace 0), or only
its connection is shut down, both ways. The faults take turns within each run, and no two requests begin alike, so that
whoever goes on has nothing of them in its memory.

The gap is from the last token before the loss to the first one after it. A part of it is evaluating the prompt and the
tokens again, as the worker that goes on says itself (`prompt_ms`); the rest is what failover costs. Then the same
question is asked again and left alone: its tokens are those that must have come.

At the end all workers but one are killed, and clients that were not here before look for workers until they find no
record of those any more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import report  # noqa: E402

import qmesh  # noqa: E402

TOKENS = 96
PROMPT_NUMBERS = (5, 30)  # of some eight tokens each
STRUCK_AFTER = (8, TOKENS - 16)  # tokens: some before, and some left to write after
FOUND_TIMEOUT_S = 20.0
END_TIMEOUT_S = 30.0
FORGOTTEN_TIMEOUT_S = 2 * qmesh.RECORD_TTL_S
WORKER_FLAGS = ("--slots", "2", "--nice", "0", "--grace", "0")


# --- Faults ---


def kill(worker: harness.Process) -> None:
    worker.popen.send_signal(signal.SIGKILL)


def stop(worker: harness.Process) -> None:
    worker.popen.send_signal(signal.SIGTERM)


def cut_off(worker: harness.Process) -> None:
    """Shut this process's connections to the worker down, as both sides see it. To find them takes some 8 ms."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == worker.ready["tcp"][1]:
            with socket.socket(fileno=os.dup(connection.fd)) as same:
                same.shutdown(socket.SHUT_RDWR)


Strike = Callable[[harness.Process], None]
FAULTS: dict[str, Strike] = {"killed": kill, "stopped": stop, "cut off": cut_off}
FATAL = (kill, stop)


# --- One answer ---


@dataclass(frozen=True)
class Heard:
    """Something that a client heard, and when, by the clock of its loop."""

    at: float
    event: Any


class Story:
    """One request from its question to its answer."""

    def __init__(self, heard: Sequence[Heard]) -> None:
        self._heard = heard
        self.tokens = [(it.at, it.event) for it in heard if isinstance(it.event, qmesh.Token)]
        self.answer: qmesh.Answer = heard[-1].event

    @property
    def first_worker(self) -> str:
        return next(it.event.worker_id for it in self._heard if isinstance(it.event, qmesh.Selected))

    @property
    def chosen_again(self) -> int:
        lost = next(number for number, it in enumerate(self._heard) if isinstance(it.event, qmesh.Lost))
        chosen = [it.event.worker_id for it in self._heard[lost:] if isinstance(it.event, qmesh.Selected)]
        return chosen.count(self.first_worker)

    @property
    def ids(self) -> list[int]:
        return [token for _, piece in self.tokens for token in piece.tokens]

    @property
    def repeated(self) -> int:
        """Tokens that came again."""
        places = [piece.seq + index for _, piece in self.tokens for index in range(len(piece.tokens))]
        return len(places) - len(set(places))

    def longest_gap_ms(self) -> float:
        return 1000 * max(after - before for (before, _), (after, _) in pairwise(self.tokens))

    def laps_ms(self) -> dict[str, float]:
        """The gap around the loss, and its parts: until it was noticed, a worker was chosen, and it gave a token."""
        lost = next(number for number, it in enumerate(self._heard) if isinstance(it.event, qmesh.Lost))
        before = [it.at for it in self._heard[:lost] if isinstance(it.event, qmesh.Token)][-1]
        first = next(it.at for it in self._heard[lost:] if isinstance(it.event, qmesh.Token))
        noticed = self._heard[lost].at
        chosen = [it.at for it in self._heard[lost:] if isinstance(it.event, qmesh.Selected) and it.at <= first]
        moments = [before, noticed, (chosen or [noticed])[-1], first]
        laps = [1000 * (end - begin) for begin, end in pairwise(moments)]
        return {"gap_ms": sum(laps), "noticed_ms": laps[0], "chosen_ms": laps[1], "went_on_ms": laps[2]}


@dataclass(frozen=True)
class Trial:
    """One fault in the middle of one answer."""

    fault: str
    struck_after: int  # tokens
    prompt_tokens: int
    failovers: int
    gap_ms: float
    noticed_ms: float
    chosen_ms: float
    went_on_ms: float
    evaluation_ms: float  # of prompt and tokens, by the worker that went on
    cached_tokens: int  # of the prompt, that it did not have to evaluate
    undisturbed_gap_ms: float  # the longest one of the same answer without a fault
    lost: int  # tokens of the undisturbed answer that did not come
    repeated: int
    altered: int  # that are others than in the undisturbed answer
    chosen_again: int  # times that the worker which was lost was chosen after that


def make_job(rng: random.Random) -> qmesh.Job:
    """Numbers that no other prompt begins with, and that a small model goes on with for ever."""
    first = rng.randrange(10**6, 10**7)
    prompt = " ".join(str(first + 7 * number) for number in range(rng.randint(*PROMPT_NUMBERS)))
    params = qmesh.Sampling(max_tokens=TOKENS, temperature=0)
    return qmesh.Job(secrets.token_hex(8), prompt=prompt, params=params)


class Scene:
    """A mesh in which each trial finds all workers well."""

    def __init__(self, mesh: harness.Mesh, workers: int) -> None:
        self._settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=mesh.topic, state_dir=str(mesh.state_dir))
        self._mesh = mesh
        self._workers = mesh.start_workers(workers, *WORKER_FLAGS)

    def trial(self, fault: str, rng: random.Random) -> Trial:
        job, struck_after = make_job(rng), rng.randint(*STRUCK_AFTER)
        disturbed = asyncio.run(self._ask(job, FAULTS[fault], struck_after))
        if FAULTS[fault] in FATAL:
            self._replace(disturbed.first_worker)
        left_alone = asyncio.run(self._ask(dataclasses.replace(job, request_id=secrets.token_hex(8))))
        return compared(fault, struck_after, disturbed, left_alone)

    def forgotten_s(self) -> list[float]:
        """Seconds from the death of each worker but the last until new clients do not find it."""
        dead = {worker.worker_id for worker in self._workers[:-1]}
        for worker in self._workers[:-1]:
            kill(worker)
        started, times = time.monotonic(), []
        while dead:
            found = asyncio.run(self._found())
            passed = time.monotonic() - started
            assert passed < FORGOTTEN_TIMEOUT_S, "a dead worker is still found"
            times += [passed] * len(dead - found)
            dead &= found
        return times

    async def _found(self) -> set[str]:
        """The workers that a new client finds, which remembers nobody."""
        with tempfile.TemporaryDirectory() as directory:
            async with qmesh.Client(dataclasses.replace(self._settings, state_dir=directory)) as client:
                await client.discover(everything=True)
                return {str(record.worker_id) for record in client.records()}

    def _replace(self, worker_id: str) -> None:
        """Put a new worker in the place of one that ends."""
        gone = self._worker(worker_id)
        gone.popen.wait(END_TIMEOUT_S)
        self._workers[self._workers.index(gone)] = self._mesh.start_worker(*WORKER_FLAGS)

    def _worker(self, worker_id: str) -> harness.Process:
        return next(worker for worker in self._workers if worker.worker_id == worker_id)

    async def _ask(self, job: qmesh.Job, strike: Strike | None = None, struck_after: int = TOKENS) -> Story:
        """Ask as a client that was not here before, and strike the worker that writes, after so many tokens."""
        heard: list[Heard] = []
        loop, writing = asyncio.get_running_loop(), ""
        async with qmesh.Client(self._settings) as client:
            await self._meet_all(client)
            async with contextlib.aclosing(client.run(job)) as progress:
                async for event in progress:
                    heard.append(Heard(loop.time(), event))
                    if isinstance(event, qmesh.Selected):
                        writing = event.worker_id
                    elif strike is not None and isinstance(event, qmesh.Token) and event.seq + 1 >= struck_after:
                        strike(self._worker(writing))
                        strike = None
        return Story(heard)

    async def _meet_all(self, client: qmesh.Client) -> None:
        """Wait until the client knows all workers at the addresses that they have now."""
        wanted = {(worker.worker_id, worker.ready["tcp"][1]) for worker in self._workers}
        async with asyncio.timeout(FOUND_TIMEOUT_S):
            while True:
                if wanted <= {(str(record.worker_id), record.address[1]) for record in client.records()}:
                    return
                await asyncio.sleep(0.01)


def compared(fault: str, struck_after: int, disturbed: Story, left_alone: Story) -> Trial:
    result, pairs = disturbed.answer.result, zip(disturbed.ids, left_alone.ids, strict=False)
    assert left_alone.answer.result.usage["completion_tokens"] == TOKENS, "the model stopped by itself"
    return Trial(
        fault=fault,
        struck_after=struck_after,
        prompt_tokens=result.usage["prompt_tokens"],
        failovers=disturbed.answer.failovers,
        **disturbed.laps_ms(),
        evaluation_ms=result.timings["prompt_ms"],
        cached_tokens=result.usage["cached_tokens"],
        undisturbed_gap_ms=left_alone.longest_gap_ms(),
        lost=max(0, len(left_alone.ids) - len(disturbed.ids)),
        repeated=disturbed.repeated,
        altered=sum(one != other for one, other in pairs),
        chosen_again=disturbed.chosen_again,
    )


# --- The figures ---


def fault_figures(fault: str, trials: Sequence[Trial]) -> Iterator[report.Item]:
    goal = "failover.cost" if fault == "killed" else ""
    gaps, evaluation = [it.gap_ms for it in trials], [it.evaluation_ms for it in trials]
    group = f"gap, {fault}"
    yield report.added(
        f"{group}: without evaluation",
        (gaps, evaluation),
        "ms",
        own="whole gap",
        peer="evaluation",
        group=group,
        goal=goal,
    )
    for name, label in {"noticed_ms": "noticed", "chosen_ms": "then chosen", "went_on_ms": "then went on"}.items():
        yield report.Figure.of(f"{group}: {label} after", [getattr(it, name) for it in trials], "ms")
    yield report.Figure.of(f"longest gap undisturbed, {fault}", [it.undisturbed_gap_ms for it in trials], "ms")
    for name in ("lost", "repeated", "altered"):
        yield report.Figure.of(f"tokens {name} in an answer, {fault}", [getattr(it, name) for it in trials], "tokens")
    if FAULTS[fault] in FATAL:
        again = [it.chosen_again for it in trials]
        key = "failover.again" if fault == "killed" else ""
        yield report.Figure.of(f"lost worker chosen again, {fault}", again, "times", key)


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    model = report.needed_model(arguments.model)
    rng = random.Random(arguments.seed)
    trials: dict[str, list[Trial]] = {fault: [] for fault in arguments.faults}
    workers = qmesh.plural(arguments.workers, "worker")
    print(f"{model.stem}, {workers} of one thread, {TOKENS} tokens, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), model) as mesh:
        scene = Scene(mesh, arguments.workers)
        for run in range(arguments.rounds):
            for fault in arguments.faults:
                trials[fault].append(scene.trial(fault, rng))
                print(f"round {run + 1}: {trials[fault][-1]}", file=sys.stderr, flush=True)
        for fault, them in trials.items():
            yield from fault_figures(fault, them)
        yield report.Figure.of("killed, and no longer found", scene.forgotten_s(), "s", "failover.forgotten")


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=10)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=report.MODEL)
    return parser


if __name__ == "__main__":
    report.main("failover", make_parser(), figures)
