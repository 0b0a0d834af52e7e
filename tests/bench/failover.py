"""The gap in an answer when its worker is lost half-way, and whether any token is lost or comes twice.

    python tests/bench/failover.py [--runs N] [--workers N] [--faults NAME ...] [--seed N] [--model FILE] [--json FILE]

Real workers, each a process with one thread, answer a greedy request of a fresh client. At a token that the seed draws,
the one that writes is killed (SIGKILL), or told to stop with nothing left to finish in (SIGTERM, --grace 0), or only
its connection is shut down, both ways. The faults take turns within each run, and no two requests begin alike, so that
whoever goes on has nothing of them in its memory.

The gap is from the last token before the loss to the first one after it. A part of it is evaluating the prompt and the
tokens again, as the worker that goes on says itself (`prompt_ms`); the rest is what failover costs. Then the same
question is asked again and left alone: its tokens are those that must have come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import random
import secrets
import signal
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402

import qmesh  # noqa: E402

TOKENS = 96
PROMPT_NUMBERS = (5, 30)  # of some eight tokens each
STRUCK_AFTER = (8, TOKENS - 16)  # tokens: some before, and some left to write after
GOAL_MS = 1000
FOUND_TIMEOUT_S = 20.0
END_TIMEOUT_S = 30.0
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
    def ids(self) -> list[int]:
        return [token for _, piece in self.tokens for token in piece.tokens]

    @property
    def repeated(self) -> int:
        """Tokens that came again."""
        places = [piece.seq + index for _, piece in self.tokens for index in range(len(piece.tokens))]
        return len(places) - len(set(places))

    @property
    def text(self) -> str:
        return "".join(piece.text for _, piece in self.tokens)

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
    same_text: bool

    @property
    def cost_ms(self) -> float:
        return self.gap_ms - self.evaluation_ms


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
        same_text=disturbed.text == left_alone.text == result.text,
    )


# --- The report ---


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def tail(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f}, {percentile(values, 0.99):,.0f}, {max(values):,.0f}"


def row(trials: Sequence[Trial]) -> list[str]:
    parts = [[getattr(it, name) for it in trials] for name in ("noticed_ms", "chosen_ms", "went_on_ms")]
    return [
        trials[0].fault,
        tail([it.gap_ms for it in trials]),
        tail([it.evaluation_ms for it in trials]),
        tail([it.cost_ms for it in trials]),
        ", ".join(f"{statistics.median(part):,.0f}" for part in parts),
        f"{statistics.median(it.undisturbed_gap_ms for it in trials):,.0f}",
        f"{sum(it.lost for it in trials)}, {sum(it.repeated for it in trials)}, {sum(it.altered for it in trials)}",
        f"{sum(it.same_text for it in trials)} of {len(trials)}",
    ]


def report(trials: Sequence[Trial]) -> str:
    header = ["the worker was", "gap p50, p99, longest, ms", "of it evaluation"]
    header += [f"rest (goal {GOAL_MS:,})", "noticed, chosen, went on after", "longest gap undisturbed"]
    header += ["tokens lost, repeated, altered", "same text"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for fault in dict.fromkeys(it.fault for it in trials):
        lines.append(f"| {' | '.join(row([it for it in trials if it.fault == fault]))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / qmesh.DEFAULT_MODEL.file_name)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rng, trials = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), arguments.model) as mesh:
        scene = Scene(mesh, arguments.workers)
        for run in range(arguments.runs):
            for fault in arguments.faults:
                trials.append(scene.trial(fault, rng))
                print(f"run {run + 1}: {trials[-1]}", file=sys.stderr, flush=True)
    machine = f"{platform.system()} {platform.machine()}, {psutil.cpu_count(logical=False)} cores"
    sides = f"{arguments.model.stem}, {qmesh.plural(arguments.workers, 'worker')} of one thread, {TOKENS} tokens"
    print(f"{machine}; {sides}; {qmesh.plural(arguments.runs, 'run')}, seed {arguments.seed}\n\n{report(trials)}")
    if arguments.json is not None:
        rows = [{**dataclasses.asdict(it), "cost_ms": it.cost_ms} for it in trials]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
