"""Random faults under load, for as long as one likes; what the workers that live through it hold is sampled all along.

    python tests/chaos/soak.py [--minutes M] [--seed S]

Some workers are killed, told to stop or suspended and come back, some clients are killed, some requests cancelled.
One worker is left alone, so that each request can have a whole answer. Ends with 1 when an invariant breaks.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import questions  # noqa: E402
from actors import Asker, Server  # noqa: E402
from arena import LoopbackArena  # noqa: E402
from questions import LONG_PROMPT, QUICK, STREAM  # noqa: E402
from story import ANSWER, ERROR, FAULT, LEFT, Story, complaints, misplaced, wrong_tokens  # noqa: E402

import qmesh  # noqa: E402

WORKERS = 4  # the first is left alone, the second is only ever suspended, the others end and are started again
WORKER_FLAGS = ("--slots", "2", "--queue", "64")  # so that one of them can have all requests
CLIENTS = 4  # the first lives through it
STREAMS_EACH = 2
QUESTIONS = (*QUICK, *QUICK, STREAM, LONG_PROMPT)

FAULT_EVERY_S = (1.0, 4.0)  # shorter than a request may last, so that some are struck twice
AWAY_S = (0.5, 6.0)  # from a blink to twice the time after which a client gives a worker up
TICK_S = 0.05
SAMPLE_S = 2.0
REQUEST_LIMIT_S = 150.0  # from question to end: its own deadline, and what a client adds to it
WARM_UP_SHARE = 0.25  # of the samples: caches and kept answers fill, and then stay as they are
MAX_GROWTH_BYTES = 32 << 20  # of a process, from then on; what is kept for clients that may come back is 6 MB
MAX_MORE_DESCRIPTORS = 16  # of a process: as many connections as there are streams, twice


@dataclass
class Sample:
    """What a process holds at a moment. own: memory that is no other process's (USS)."""

    at: float
    resident: int
    own: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        return cls(time.monotonic(), memory.rss, memory.uss, process.num_fds())


def slope_per_hour(samples: Sequence[Sample], value: Callable[[Sample], int]) -> float:
    """By least squares."""
    times, values = [sample.at for sample in samples], [float(value(sample)) for sample in samples]
    return 3600 * statistics.linear_regression(times, values).slope


def growth(samples: Sequence[Sample], value: Callable[[Sample], int]) -> float:
    """From the first half to the second, by medians: a peak is no growth."""
    half = len(samples) // 2
    return statistics.median(map(value, samples[half:])) - statistics.median(map(value, samples[:half]))


@dataclass
class Tally:
    """What became of the requests."""

    endings: Counter[str] = field(default_factory=Counter)
    shares: Counter[str] = field(default_factory=Counter)  # of the answers, by worker
    failovers: int = 0
    moved: int = 0  # to another worker, also before the first one had said anything
    wrong_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, story: Story, known: Story) -> None:
        for ending in story.endings:
            self.endings[ending.kind] += 1
            self.failovers += ending.failovers
            if ending.kind == ANSWER:
                self.shares[ending.worker_id] += 1
            if ending.kind in (ERROR, FAULT):
                self.errors[ending.text] += 1
        self.moved += len(set(story.selected)) > 1
        self.wrong_tokens += max(sum(misplaced(story.pieces)), wrong_tokens(story, known))


class Soak:
    """The arena, the load on it, and what is due next."""

    def __init__(self, arena: LoopbackArena, rng: Random) -> None:
        self.tally = Tally()
        self.faults: Counter[str] = Counter()
        self._arena = arena
        self._rng = rng
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._keeper, self._sleeper, *self._victims = arena.start(WORKERS, *WORKER_FLAGS)
        self._asleep = False
        self._clients = [arena.new_asker() for _ in range(CLIENTS)]
        self._asked_at: dict[str, float] = {}
        self.samples: dict[str, list[Sample]] = {}
        self._survivors = {
            "worker left alone": self._keeper.pid,
            "worker suspended now and then": self._sleeper.pid,
            "client": self._clients[0].popen.pid,
        }

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._in(SAMPLE_S, self._sample)
        self._in(self._rng.uniform(*FAULT_EVERY_S), self._strike)
        while time.monotonic() < end:
            self._tend()
            for item in sorted((item for item in self._due if item[0] <= time.monotonic()), key=lambda item: item[0]):
                self._due.remove(item)
                item[1]()
            time.sleep(TICK_S)

    def calm_down(self) -> None:
        """Let all that is under way end, and check it."""
        self._sleeper.resume()
        for client in self._clients:
            client.follow(*client.stories.values(), within_s=REQUEST_LIMIT_S)
            self._check(client)

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    # --- Load ---

    def _tend(self) -> None:
        """Ask something new for each request that has ended, and see that none lasts for ever."""
        for client in self._clients:
            self._check(client)
            for _ in range(STREAMS_EACH - len(client.stories)):
                story = client.ask(self._rng.choice(QUESTIONS))
                self._asked_at[story.request_id] = time.monotonic()
            for story in client.stories.values():
                late_s = time.monotonic() - self._asked_at[story.request_id]
                assert late_s < REQUEST_LIMIT_S, f"request {story.request_id} has not ended in {late_s:.0f} s"

    def _check(self, client: Asker) -> None:
        for story in client.take_finished():
            del self._asked_at[story.request_id]
            known = self._arena.known[story.question]
            self.tally.add(story, known)
            self._arena.broken += complaints(story, known)
            if story.ending is not None and story.ending.kind not in (ANSWER, LEFT):
                self._arena.broken.append(f"no answer, with a worker that is well: {story.ending.text}")

    # --- Faults ---

    def _strike(self) -> None:
        fault = self._rng.choice((self._kill, self._terminate, self._suspend, self._kill_client, self._cancel))
        self.faults[fault.__name__.strip("_").replace("_", " ")] += 1
        fault()
        self._in(self._rng.uniform(*FAULT_EVERY_S), self._strike)

    def _end_one(self, end: Callable[[Server], None]) -> None:
        if self._victims:  # else all are away already
            victim = self._victims.pop(self._rng.randrange(len(self._victims)))
            end(victim)
            self._in(self._rng.uniform(*AWAY_S), self._start_one)

    def _start_one(self) -> None:
        self._victims += self._arena.start(1, *WORKER_FLAGS)

    def _kill(self) -> None:
        self._end_one(Server.kill)

    def _terminate(self) -> None:
        self._end_one(Server.terminate)

    def _suspend(self) -> None:
        if not self._asleep:
            self._asleep = True
            self._sleeper.suspend()
            self._in(self._rng.uniform(*AWAY_S), self._wake)

    def _wake(self) -> None:
        self._asleep = False
        self._sleeper.resume()

    def _kill_client(self) -> None:
        client = self._clients.pop(self._rng.randrange(1, CLIENTS))
        client.kill()
        for story in client.stories:
            del self._asked_at[story]
        self._clients.append(self._arena.new_asker())

    def _cancel(self) -> None:
        client = self._rng.choice(self._clients)
        for story in itertools.islice(client.stories.values(), 1):
            client.drop(story)

    # --- What lives through it ---

    def _sample(self) -> None:
        for name, pid in self._survivors.items():
            self.samples.setdefault(name, []).append(Sample.of(pid))
        self._in(SAMPLE_S, self._sample)

    def report(self) -> list[str]:
        """What is worth knowing, in lines; what has grown is put with what is broken."""
        ended = ", ".join(f"{count} {kind}" for kind, count in self.tally.endings.most_common())
        struck = ", ".join(f"{count} {name}" for name, count in self.faults.most_common())
        lines = [
            f"requests: {self.tally.endings.total()} ({ended}); another worker went on with {self.tally.moved}, "
            f"with {self.tally.failovers} after the first token; answers by worker: {[*self.tally.shares.values()]}",
            f"tokens lost or repeated: {self.tally.wrong_tokens}; errors: {dict(self.tally.errors)}",
            f"faults: {self.faults.total()} ({struck})",
        ]
        for name, samples in self.samples.items():
            settled = samples[int(len(samples) * WARM_UP_SHARE) :]
            lines.append(self._line(name, settled))
            own, descriptors = growth(settled, lambda s: s.own), growth(settled, lambda s: s.descriptors)
            if own > MAX_GROWTH_BYTES or descriptors > MAX_MORE_DESCRIPTORS:
                self._arena.broken.append(f"{name}: it grew by {own / 1e6:.0f} MB and {descriptors:.0f} descriptors")
        return lines

    @staticmethod
    def _line(name: str, samples: Sequence[Sample]) -> str:
        last = samples[-1]
        own, resident = (slope_per_hour(samples, value) / 1e6 for value in (lambda s: s.own, lambda s: s.resident))
        descriptors = slope_per_hour(samples, lambda s: s.descriptors)
        return (
            f"{name}: {last.own / 1e6:.1f} MB its own ({own:+.1f} MB/h), {last.resident / 1e6:.1f} MB resident "
            f"({resident:+.1f} MB/h), {last.descriptors} descriptors ({descriptors:+.1f}/h)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (2)")
    parser.add_argument("--seed", default="0", help="of all chance (0)")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / qmesh.DEFAULT_MODEL.file_name)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="qmesh-soak-") as scratch:
        directory = Path(scratch)
        known = questions.learn(directory / "undisturbed", arguments.model)
        rng = Random(arguments.seed)
        arena = LoopbackArena(directory / "arena", arguments.model, known, rng)
        with arena:
            soak = Soak(arena, rng)
            try:
                soak.run(60 * arguments.minutes)
                soak.calm_down()
            finally:
                print("\n".join(soak.report()), flush=True)
    for complaint in arena.broken:
        print(f"\n{complaint}", file=sys.stderr)
    print("broken" if arena.broken else "all invariants held")
    return 1 if arena.broken else 0


if __name__ == "__main__":
    sys.exit(main())
