"""What W workers do together against W times one of them, and which requests are refused while others have room.

    python tests/bench/scaleout.py [--workers N ...] [--loads X ...] [--memory LOW HIGH] [--rounds N] [--out DIR]

The workers are real (DHT over UDP, TLS over TCP, admission, health), on 127.0.0.1, and only their engine is not: each
of its slots gives a token every TOKEN_S, and who finds no slot free waits in its queue. Their machines tell that they
are idle, since the cores that all of them share are none of theirs; with --memory they differ in how much of it is in
use. So a mesh that divides its requests well gives W times what one worker gives, however slow this machine is, and
what is missing was divided badly.

Real clients keep a fixed number of requests under way, each followed by the next at once; they came at different times,
and so hear of the workers at different times. A load of 1 is one request for each slot of the mesh: the hardest, as all
slots are busy only if no request ever waits while another slot is idle. At 1.5 half as many again wait in queues, at
0.5 half of the slots are free. What is measured begins after WARM_UP_S.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import report  # noqa: E402

import qmesh  # noqa: E402

SLOTS = qmesh.DEFAULT_SLOTS
TOKEN_S = 0.4  # so slow that 200 slots need a small part of a core: 500 tokens a second
ANSWER_TOKENS = (8, 24)  # from 3.2 to 9.6 s, of different lengths so that slots do not end in step
USUAL_S = statistics.mean(ANSWER_TOKENS) * TOKEN_S  # for an answer
WORD = " word"  # the text of every token
WARM_UP_S = 15.0  # each first request begins within the time of an answer, and then one follows
CLIENTS = 10  # at W = 50 each has 20 requests under way, so that none knows much of the others'
WORKER_PROCESSES = 2
HARDEST = 1.0  # of all loads; the goals are about this one
READY_TIMEOUT_S = 120.0
SPAWN = multiprocessing.get_context("spawn")


# --- A worker of fixed speed ---


@dataclass
class Journal:
    """What happened at one worker. Times are those of time.monotonic(), which all processes share."""

    changes: list[tuple[float, int, int]] = field(default_factory=list)  # when, requests running, requests waiting
    refusals: list[float] = field(default_factory=list)
    statuses: list[float] = field(default_factory=list)  # when it was asked how it does
    late: list[tuple[float, float]] = field(default_factory=list)  # when a token was given, and how late


class IdleMachine(qmesh.SystemMonitor):
    """A machine whose processor nobody else uses. memory: per cent of it in use."""

    def __init__(self, memory: float) -> None:
        self._memory = memory

    def sample(self) -> tuple[float, float]:
        return 0.0, self._memory


@dataclass(eq=False)
class Task:
    """One request in the engine. begun_at: when it got its slot. given: tokens so far, also those from elsewhere."""

    ticket: int
    client: str
    job: qmesh.Job
    asked_at: float
    given: int
    begun_at: float = 0.0
    told: qmesh.Queued | None = None
    next_token: asyncio.TimerHandle | None = None

    @property
    def next_due(self) -> float:
        """However late the last token was."""
        return self.begun_at + (self.given + 1 - len(self.job.given)) * TOKEN_S

    @property
    def remaining_s(self) -> float:
        return (self.job.params.max_tokens - self.given) * TOKEN_S


class FixedSpeedEngine(qmesh.Engine):
    """Gives tokens by the clock, on the event loop of its worker: each slot one every TOKEN_S, also the first."""

    def __init__(self, *, worker_id: str, publish: Callable[[list[qmesh.EngineEvent]], None], journal: Journal) -> None:
        model = qmesh.ModelFile(Path("simulated"), 1, "simulated", "none", "none", 4096, 1, 0, bytes(8))
        gpu = qmesh.GpuChoice(0, None, "simulated")
        super().__init__(qmesh.EnginePlan(model, SLOTS, 4096, 1, gpu), worker_id=worker_id, publish=publish)
        self._loop = asyncio.get_running_loop()
        self._journal = journal
        self._running: dict[int, Task] = {}
        self._waiting: dict[int, Task] = {}
        self._line: qmesh.FairQueue[Task] = qmesh.FairQueue()

    @property
    def alive(self) -> bool:
        return True

    def submit(self, ticket: int, client: str, job: qmesh.AnyJob) -> None:
        assert isinstance(job, qmesh.Job)
        self._waiting[ticket] = task = Task(ticket, client, job, self._loop.time(), len(job.given))
        self._line.push(client, str(ticket), task)
        self._changed(self._loop.time())

    def cancel(self, ticket: int) -> None:
        if (running := self._running.pop(ticket, None)) is not None and running.next_token is not None:
            running.next_token.cancel()
        if (waiting := self._waiting.pop(ticket, None)) is not None:
            self._line.remove(waiting.client, str(ticket))
        self._changed(self._loop.time())

    def stop(self) -> None:
        for ticket in [*self._running, *self._waiting]:
            self.cancel(ticket)

    def join(self, timeout_s: float) -> bool:
        return True

    def _changed(self, now: float) -> None:
        """Fill free slots, and tell those who wait their places. now: when a slot was due to be free, if one was."""
        while len(self._running) < SLOTS and (task := self._line.pop()) is not None:
            self._running[task.ticket] = self._waiting.pop(task.ticket)
            task.begun_at = now
            self._await_token(task)
        self.speed.tokens_per_s = len(self._running) / TOKEN_S
        self._journal.changes.append((time.monotonic(), len(self._running), len(self._waiting)))
        self._tell_places()

    def _await_token(self, task: Task) -> None:
        task.next_token = self._loop.call_at(task.next_due, self._give_token, task)

    def _give_token(self, task: Task) -> None:
        due, now = task.next_due, self._loop.time()
        self._journal.late.append((time.monotonic(), now - due))
        self._publish([(task.ticket, qmesh.Token(task.given, (task.given,), WORD))])
        task.given += 1
        if task.given < task.job.params.max_tokens:
            self._await_token(task)
            return
        del self._running[task.ticket]
        self._publish([(task.ticket, self._result(task, due))])
        self._changed(due)

    def _result(self, task: Task, now: float) -> qmesh.Result:
        usage = {"prompt_tokens": 1, "completion_tokens": task.given, "cached_tokens": 0}
        queued_s, generated_s = task.begun_at - task.asked_at, now - task.begun_at
        timings = {"queue_ms": 1000 * queued_s, "prompt_ms": 0.0, "generate_ms": 1000 * generated_s}
        return qmesh.Result(WORD * task.given, "length", usage, timings, self.plan.model.name, self._worker_id)

    def _tell_places(self) -> None:
        line = self._line.in_order()
        remaining = [task.remaining_s for task in self._running.values()]
        waits = qmesh.expected_waits(remaining, USUAL_S, len(line)) if line else []
        for place, (task, wait_s) in enumerate(zip(line, waits, strict=True)):
            if task.told is None or task.told.position != place:
                task.told = qmesh.Queued(place, round(wait_s, 1))
                self._publish([(task.ticket, task.told)])


class SimulatedWorker(qmesh.Worker):
    """A worker whose engine keeps to a fixed speed and whose machine is idle."""

    def __init__(self, settings: qmesh.Settings, memory: float) -> None:
        super().__init__(settings, qmesh.WorkerOptions(nice=0), {})
        self.journal = Journal()
        self._memory = memory

    async def _start_engine(self) -> qmesh.Engine:
        self._monitor = IdleMachine(self._memory)
        loop = asyncio.get_running_loop()
        return FixedSpeedEngine(
            worker_id=str(self.worker_id), publish=lambda events: self._publish(loop, events), journal=self.journal
        )

    def admit(self, session: qmesh.Session, job: qmesh.AnyJob) -> None:
        try:
            super().admit(session, job)
        except qmesh.Refused:
            self.journal.refusals.append(time.monotonic())
            raise

    def status(self) -> qmesh.Json:
        self.journal.statuses.append(time.monotonic())
        return super().status()


# --- Processes: each says that it is ready, and then answers what it is sent ---


@dataclass(frozen=True)
class Place:
    """Where the processes of one mesh meet."""

    topic: str
    directory: str

    def settings(self, name: str) -> qmesh.Settings:
        return qmesh.Settings(host=qmesh.LOOPBACK, port=0, topic=self.topic, state_dir=f"{self.directory}/{name}")


class Child:
    """Another process that runs `work(connection, ...)`."""

    def __init__(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        self._ours, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=run_child, args=(work, theirs, *arguments))
        self._process.start()
        theirs.close()

    def receive(self, timeout_s: float = READY_TIMEOUT_S) -> Any:
        assert self._ours.poll(timeout_s), "a process of the benchmark says nothing"
        return self._ours.recv()

    def send(self, message: Any) -> None:
        self._ours.send(message)

    def processor_s(self) -> float:
        """Seconds of processor that it has used."""
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def end(self) -> None:
        self._ours.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def run_child(work: Callable[..., Coroutine[Any, Any, None]], connection: Connection, *arguments: Any) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent has closed
        asyncio.run(work(connection, *arguments))


async def host_workers(connection: Connection, place: Place, machines: dict[str, float]) -> None:
    """Run workers on machines with so much memory in use; answers with the journal of each by its id."""
    workers = [SimulatedWorker(place.settings(name), memory) for name, memory in machines.items()]
    await asyncio.gather(*(worker.start() for worker in workers))
    try:
        connection.send("ready")
        while True:
            await asyncio.to_thread(connection.recv)
            connection.send({str(worker.worker_id): worker.journal for worker in workers})
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


@dataclass
class Seen:
    """What the clients saw between two moments."""

    began: float = 0.0
    ended: float = 0.0
    asked: int = 0
    tokens: Counter[str] = field(default_factory=Counter)  # by worker
    waits_s: list[float] = field(default_factory=list)  # for an answer to begin
    failures: Counter[str] = field(default_factory=Counter)  # requests that were not answered, by the error's code


class Load:
    """So many requests under way, each followed by the next at once; `seen` is what comes of them."""

    def __init__(self, clients: Sequence[qmesh.Client], under_way: int, seed: int) -> None:
        self.seen = Seen()
        rngs = (random.Random(f"{seed} {under_way} {number}") for number in range(under_way))
        pairs = zip(itertools.cycle(clients), rngs, strict=False)
        self._tasks = [asyncio.create_task(self._ask_on(mesh, rng)) for mesh, rng in pairs]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask_on(self, mesh: qmesh.Client, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0, USUAL_S))
        while True:
            params = qmesh.Sampling(max_tokens=rng.randint(*ANSWER_TOKENS), temperature=0)
            job = qmesh.Job(secrets.token_hex(8), prompt="Go on.", params=params)
            self.seen.asked += 1
            try:
                await self._ask(mesh, job)
            except qmesh.QMeshError as error:
                self.seen.failures[error.code] += 1

    async def _ask(self, mesh: qmesh.Client, job: qmesh.Job) -> None:
        asked_at, worker, begun = time.monotonic(), "", False
        async with contextlib.aclosing(mesh.run(job)) as progress:
            async for event in progress:
                if isinstance(event, qmesh.Selected):
                    worker = event.worker_id
                elif isinstance(event, qmesh.Token):
                    self.seen.tokens[worker] += len(event.tokens)
                    if not begun:
                        self.seen.waits_s.append(max(0.0, time.monotonic() - asked_at - TOKEN_S))
                    begun = True


async def run_clients(connection: Connection, place: Place, seed: int) -> None:
    """Ask as many at once as told, and answer twice: when it is steady, and with what was seen then."""
    rng = random.Random(seed)
    async with contextlib.AsyncExitStack() as opened:
        clients = []
        for _ in range(CLIENTS):
            await asyncio.sleep(rng.uniform(0, 2 * qmesh.BEACON_PERIOD_S / CLIENTS))
            own = random.Random(rng.getrandbits(64))
            clients.append(await opened.enter_async_context(qmesh.Client(place.settings("clients"), {}, own)))
        connection.send("ready")
        while True:
            under_way, seconds = await asyncio.to_thread(connection.recv)
            load = Load(clients, under_way, seed)
            await asyncio.sleep(WARM_UP_S)
            connection.send("steady")
            load.seen = seen = Seen(began=time.monotonic())
            await asyncio.sleep(seconds)
            load.seen, seen.ended = Seen(), time.monotonic()
            await load.end()
            connection.send(seen)


# --- What is made of it ---


@dataclass
class Slack:
    """Slots that were idle in a stretch of time, and refusals in it."""

    while_others_waited: float = 0.0  # slots, on average: so many could have been busy
    while_none_waited: float = 0.0  # their next request was on its way
    refusals: int = 0
    refusals_in_vain: int = 0  # another worker had room in its queue


def slack_of(journals: Sequence[Journal], began: float, ended: float) -> Slack:
    """Go through all workers' journals by the clock."""
    at_worker = [(when, number, change) for number, it in enumerate(journals) for when, *change in it.changes]
    refused = [(when, number, None) for number, it in enumerate(journals) for when in it.refusals]
    running, waiting = [0] * len(journals), [0] * len(journals)
    slack, since = Slack(), began
    for when, number, change in sorted([*at_worker, *refused, (ended, 0, None)], key=lambda entry: entry[0]):
        if began < when <= ended:
            idle, in_line = SLOTS * len(journals) - sum(running), sum(waiting)
            slack.while_others_waited += min(idle, in_line) * (when - since) / (ended - began)
            slack.while_none_waited += max(0, idle - in_line) * (when - since) / (ended - began)
            since = when
        if change is not None:
            running[number], waiting[number] = change
        elif began < when < ended:
            slack.refusals += 1
            held = [a + b for at, (a, b) in enumerate(zip(running, waiting, strict=True)) if at != number]
            slack.refusals_in_vain += any(count < qmesh.QUEUE_PER_SLOT * SLOTS for count in held)
    return slack


@dataclass(frozen=True)
class Figures:
    """One mesh at one load."""

    workers: int
    load: float
    tokens_per_s: float
    idle_share: float  # of the slots' time, while other requests waited
    free_share: float  # while none waited
    least_share: float  # tokens of the worker that gave the fewest, against an equal share
    most_share: float
    wait_p50_s: float
    wait_p99_s: float
    unanswered: dict[str, int]  # requests, by the error's code
    refused: int  # requests that workers turned away, answered elsewhere or not
    refused_in_vain: int  # of them while another worker had room
    statuses: float  # that were asked for, for each request
    late_p99_s: float  # tokens, for want of processor
    processor: float  # cores, of the busiest process

    @classmethod
    def of(cls, load: float, seen: Seen, journals: dict[str, Journal], processor: float) -> Figures:
        seconds, slots = seen.ended - seen.began, SLOTS * len(journals)
        slack = slack_of(list(journals.values()), seen.began, seen.ended)
        assert seen.waits_s, "nothing was answered"
        late = [late for it in journals.values() for at, late in it.late if at > seen.began]
        fair = seen.tokens.total() / len(journals)
        told = sum(seen.began < when < seen.ended for journal in journals.values() for when in journal.statuses)
        shares = [seen.tokens[worker_id] / fair for worker_id in journals]
        return cls(
            workers=len(journals),
            load=load,
            tokens_per_s=seen.tokens.total() / seconds,
            idle_share=slack.while_others_waited / slots,
            free_share=slack.while_none_waited / slots,
            least_share=min(shares),
            most_share=max(shares),
            wait_p50_s=statistics.median(seen.waits_s),
            wait_p99_s=report.percentile(seen.waits_s, 0.99),
            unanswered=dict(seen.failures),
            refused=slack.refusals,
            refused_in_vain=slack.refusals_in_vain,
            statuses=told / seen.asked,
            late_p99_s=report.percentile(late, 0.99),
            processor=processor / seconds,
        )


@contextlib.contextmanager
def mesh_of(count: int, memory: tuple[float, float], seed: int) -> Iterator[tuple[list[Child], Child]]:
    """The processes of so many workers, whose memory in use is spread over a range, and that of the clients."""
    low, high = memory
    machines = [(f"worker-{number}", low + (high - low) * (number + 0.5) / count) for number in range(count)]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as ends:
        place = Place(f"scaleout-{secrets.token_hex(8)}", directory)
        hosts = []
        for share in filter(None, (machines[at::WORKER_PROCESSES] for at in range(WORKER_PROCESSES))):
            hosts.append(Child(host_workers, place, dict(share)))
            ends.callback(hosts[-1].end)
        for host in hosts:
            host.receive()
        clients = Child(run_clients, place, seed)
        ends.callback(clients.end)
        clients.receive()
        yield hosts, clients


def measure(count: int, arguments: argparse.Namespace, seed: int) -> list[Figures]:
    """One mesh, at one load after the other."""
    figures, seconds = [], arguments.seconds
    with mesh_of(count, arguments.memory, seed) as (hosts, clients):
        for load in arguments.loads:
            clients.send((max(1, round(load * count * SLOTS)), seconds))
            clients.receive()
            before = [child.processor_s() for child in (*hosts, clients)]
            seen: Seen = clients.receive(seconds + READY_TIMEOUT_S)
            used = [child.processor_s() - then for child, then in zip((*hosts, clients), before, strict=True)]
            journals: dict[str, Journal] = {}
            for host in hosts:
                host.send("journals")
                journals |= host.receive()
            figures.append(Figures.of(load, seen, journals, max(used)))
    return figures


# --- The figures ---


Rounds = dict[tuple[float, int], list[Figures]]
"""(load, workers): the figures of each round."""


def mesh_figures(rounds: Rounds, load: float, workers: int) -> Iterator[report.Item]:
    """Tokens per second against those of as many workers alone, and what explains them."""
    them = rounds[load, workers]
    alone = [workers * one.tokens_per_s for one in rounds[load, 1]]
    where = f"{qmesh.plural(workers, 'worker')}, load {load:g}"
    goal = f"scaleout.{workers}" if load == HARDEST else ""
    speeds = [it.tokens_per_s for it in them]
    yield report.ratio(where, (speeds, alone), "tokens/s", peer="as many alone", group=where, goal=goal)
    for name, label, unit in (
        ("idle_share", "slots idle while others waited", ""),
        ("free_share", "slots idle while none waited", ""),
        ("least_share", "worker that gave the fewest tokens, of a fair share", ""),
        ("most_share", "worker that gave the most", ""),
        ("wait_p50_s", "wait of an answer", "s"),
        ("wait_p99_s", "wait, 99th in 100", "s"),
        ("refused", "refused", "requests"),
        ("refused_in_vain", "refused while others had room", "requests"),
        ("statuses", "statuses for a request", ""),
        ("late_p99_s", "tokens late for want of processor, 99th in 100", "s"),
        ("processor", "busiest process", "cores"),
    ):
        yield report.Figure.of(f"{where}: {label}", [getattr(it, name) for it in them], unit)
    unanswered = [sum(it.unanswered.values()) for it in them]
    yield report.Figure.of(f"{where}: unanswered", unanswered, "requests")


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    sizes = sorted({1, *arguments.workers})
    rounds: Rounds = {(load, workers): [] for load in arguments.loads for workers in sizes}
    print(f"{SLOTS} slots of {1 / TOKEN_S:g} tokens/s for each worker, {CLIENTS} clients", flush=True)
    for turn, workers in itertools.product(range(arguments.rounds), sizes):
        for found in measure(workers, arguments, arguments.seed + turn):
            rounds[found.load, workers].append(found)
            print(f"round {turn + 1}: {found}", file=sys.stderr, flush=True)
    for load, workers in sorted(rounds):
        if workers > 1:
            yield from mesh_figures(rounds, load, workers)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument(
        "--memory", type=float, nargs=2, default=[0.0, 0.0], metavar=("LOW", "HIGH"), help="per cent in use on machines"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="that are measured at each load")
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    report.main("scaleout", make_parser(), figures)
