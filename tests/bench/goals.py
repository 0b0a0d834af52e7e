"""What is to be reached, and the command that measures each part of it: data, and nothing else.

A ratio is of one run, both sides in turn on the same machine. `tests/bench/report.py` holds figures against these, by
their keys; `python -m tests.bench` runs all parts.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE_STREAMS = (1, 4, 8)
DISCOVERY_WORKERS = (1, 10, 50)
BUILT, PREBUILT = "llama.cpp server, same build", "llama.cpp server, prebuilt"
PYTHON_SERVER, NODE = "llama_cpp.server", "node-llama-cpp"
SOURCE, ARCHIVE = "qmesh.py", "qmesh.pyz"  # as which the program is started


@dataclass(frozen=True)
class Part:
    """One benchmark: its script, the options of a whole run and of a quick one, and how long they take."""

    title: str
    script: str
    options: str
    quick: str
    minutes: float  # on two cores, with the options of a whole run
    quick_minutes: float
    usual: bool = True  # or measured only where it is named: what it takes to run is seldom at hand


PARTS: dict[str, Part] = {
    "startup": Part("Start-up", "startup.py", "--rounds 9", "--rounds 3 --workers 10", 2, 0.5),
    "engine": Part("Engine", "engine.py", "--rounds 5", "--rounds 1 --tokens 48 --streams 4", 17, 1.3),
    "mesh": Part("Mesh against the bare engine", "mesh.py", "--rounds 9", "--rounds 3", 1, 0.3),
    "discovery": Part(
        "Discovery",
        "discovery.py",
        "--rounds 7 --only qmesh hyperswarm",
        "--rounds 3 --only qmesh hyperswarm --workers 1 10",
        4,
        0.6,
    ),
    "simulation": Part(
        "Simulated mesh", "simulate.py", "--nodes 1000 --clients 200", "--nodes 200 --clients 50", 2, 0.3
    ),
    "failover": Part("Failover", "failover.py", "--rounds 10", "--rounds 1 --faults killed", 4, 0.8),
    "gateway": Part(
        "Gateway", "gateway.py", "--rounds 5 --pairs 10 --streams 4", "--rounds 1 --pairs 5 --streams 4", 3, 0.5
    ),
    "scaleout": Part(
        "Workers together",
        "scaleout.py",
        "--rounds 5 --workers 50 --loads 1 --seconds 15",
        "--rounds 1 --workers 50 --loads 1 --seconds 10",
        9,
        1.3,
    ),
    "memory": Part("Memory", "memory.py", "--rounds 5", "--rounds 1 --nodes 200", 2, 0.5),
    "trust": Part("Trust", "trust.py", "mint handshake", "mint handshake", 0.5, 0.4),
    "archive": Part("Archives", "archive.py", "starts --rounds 5", "starts --rounds 1", 6, 1.5, usual=False),
    "portable": Part("Engine for every processor", "portable.py", "--rounds 5", "--rounds 1", 5, 1, usual=False),
    "bare": Part("Bare machines", "bare.py", "--rounds 5", "--rounds 1", 3, 1, usual=False),
    "contention": Part("Busy neighbours", "contention.py", "--rounds 5", "--rounds 1", 3, 0.7, usual=False),
    "determinism": Part(
        "The same answer", "determinism.py", "--prompts 16 --tokens 64", "--prompts 4 --tokens 16", 6, 1, usual=False
    ),
    "gpu": Part("Engine on a GPU", "gpu.py", "--rounds 5", "--rounds 1", 10, 3, usual=False),
}
WITH_ARCHIVES = ("startup", "memory", "archive", "portable", "bare")


def command(part: str, *, quick: bool = False) -> str:
    """What measures a part alone, in the repository's folder."""
    it = PARTS[part]
    return f"python tests/bench/{it.script} {it.quick if quick else it.options}"


def minutes(*, quick: bool = False) -> float:
    """Of all parts that are usually run."""
    return sum(part.quick_minutes if quick else part.minutes for part in PARTS.values() if part.usual)


@dataclass(frozen=True)
class Goal:
    """A bound on a figure. of: the statistic of its values that is held against it, by report.STATISTICS."""

    key: str  # of the figure: its part, and what of it
    figure: str
    bound: float
    unit: str
    at_least: bool = False
    of: str = "median"

    @property
    def part(self) -> str:
        return self.key.partition(".")[0]

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}"


def engine_key(peer: str, streams: int) -> str:
    return f"engine.{peer}.{streams}"


def discovery_key(what: str, workers: int) -> str:
    """what: `first` or `all`."""
    return f"discovery.{what}.{workers}"


def program_key(what: str, program: str) -> str:
    """what: of which both ways to start the program are measured."""
    return f"{what}.{program}"


def _programs(what: str, figure: str, bound: float, unit: str) -> list[Goal]:
    return [Goal(program_key(what, it), f"{figure}, `{it}`", bound, unit) for it in (SOURCE, ARCHIVE)]


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _engine(peer: str, bound: float, counts: tuple[int, ...] = ENGINE_STREAMS) -> list[Goal]:
    """Tokens per second of all streams together, with the same model, threads and context."""
    figure = f"engine, total tokens/s against {peer}"
    return [Goal(engine_key(peer, it), f"{figure}, {_streams(it)}", bound, "x", at_least=True) for it in counts]


def _discovery() -> list[Goal]:
    """In one process, on the same loopback; of one worker the first is all."""
    shapes = [("first", 1, "1 worker")]
    for count in DISCOVERY_WORKERS[1:]:
        shapes += [("first", count, f"the first of {count} workers"), ("all", count, f"all of {count} workers")]
    return [
        Goal(discovery_key(what, count), f"time to connect to {said}, against Hyperswarm", 1.0, "x")
        for what, count, said in shapes
    ]


GOALS: list[Goal] = [
    *_engine(BUILT, 1.10),
    *_engine(PREBUILT, 1.10),
    *_engine(NODE, 2.5),
    *_engine(PYTHON_SERVER, 2.0, (4,)),
    Goal("engine.second-turn", "second turn of 1,500 tokens, first token sooner than cold", 10, "x", at_least=True),
    Goal("mesh.speed", "through the mesh against the bare engine, tokens/s", 0.97, "x", at_least=True),
    Goal("mesh.wait", "time to first token that the mesh adds, warm", 5, "ms"),
    *_discovery(),
    *_programs("startup.request", "`prompt`, process start to request sent, 50 workers", 300, "ms"),
    *_programs("startup.help", "`--help` against `python -c pass`", 2.5, "x"),
    Goal("simulation.hops", "1,000 simulated nodes: hops of a node's search, median", 2, "hops"),
    Goal("simulation.hops", "the same, 99th in 100", 4, "hops", of="p99"),
    Goal("simulation.half", "worker found, half of 1,000 nodes killed at once", 99.5, "%", at_least=True),
    Goal("simulation.half-later", "the same, after one more announcement", 99.99, "%", at_least=True),
    Goal("simulation.lossy", "half killed, 10 % of datagrams lost each way", 99, "%", at_least=True),
    Goal("failover.forgotten", "killed worker: no longer found by new clients", 35, "s", of="largest"),
    Goal("failover.again", "killed worker: chosen again after its connection was reset", 0, "times", of="largest"),
    Goal("failover.cost", "gap in a running stream without evaluating again, 99th in 100", 1000, "ms", of="p99"),
    Goal("gateway.wait", "time to first token that the gateway adds", 3, "ms"),
    Goal("gateway.speed", "gateway against the library, tokens/s, 4 streams", 0.97, "x", at_least=True),
    Goal("scaleout.50", "50 workers of fixed speed, against 50 times one", 0.95, "x", at_least=True),
    *_programs("memory.client", "memory of a client", 45, "MB"),
    *_programs("memory.worker", "memory of a worker over the bare engine", 40, "MB"),
    Goal("memory.node", "memory of a DHT node among 1,000", 2, "MB"),
]
