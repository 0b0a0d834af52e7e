"""The engine against its peers: tokens per second, waits and gaps at 1, 4 and 8 streams, memory, long prompts.

    python tests/bench/engine.py [--rounds N] [--streams N ...] [--tokens N] [--peers NAME ...] [--out DIR]

All sides run the same model, threads and context, and take turns within each round. The first run sets the peers up
under ~/.cache/qmesh-bench (or QMESH_BENCH_DIR): about fifteen minutes, most of it for building. A peer that cannot be
set up is left out, and the figures say so.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence

import goals
import peers
import psutil
import report

import qmesh

PEERS = (peers.BuiltLlamaServer, peers.PrebuiltLlamaServer, peers.PythonServer, peers.NodePeer)
ASKED_LONG = (peers.QmeshWorker, peers.BuiltLlamaServer)  # others run one load at a time, or are the same server
TOKENS = 128
LONG_PROMPT_TOKENS = 1500


def short_prompt(number: int) -> str:
    """About fifty tokens that no other prompt begins with, and that a small model goes on with for ever."""
    return " ".join(str(1000 * number + count) for count in range(100, 110))


def long_prompt(number: int) -> str:
    return short_prompt(number) + " and" * (LONG_PROMPT_TOKENS - 50)


class Rounds:
    """What one side did in all rounds at one number of streams."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.waits: list[float] = []
        self.gaps: list[float] = []

    def add(self, streams: Sequence[peers.Stream]) -> None:
        began = min(stream.started for stream in streams)
        ended = max(stream.times[-1] for stream in streams)
        self.speeds.append(sum(len(stream.times) for stream in streams) / (ended - began))
        self.waits += [stream.first_token_ms for stream in streams]
        self.gaps += [stream.longest_gap_ms for stream in streams]


async def streams_in_turn(
    sides: Sequence[peers.Peer], counts: Sequence[int], rounds: int, tokens: int = TOKENS
) -> dict[tuple[str, int], Rounds]:
    figures = {(side.name, count): Rounds() for side in sides for count in counts}
    number = 0
    for turn in range(-1, rounds):  # the first round warms up
        for count in counts:
            for side in rotated(sides, turn):
                prompts = [short_prompt(number := number + 1) for _ in range(count)]
                streams = await side.load(prompts, tokens)
                lengths = [len(stream.times) for stream in streams]
                assert min(lengths) > tokens // 2, f"{side.name} stopped early: {lengths}"
                if turn >= 0:
                    figures[side.name, count].add(streams)
    return figures


def rotated(sides: Sequence[peers.Peer], by: int) -> list[peers.Peer]:
    """No side always follows the same one."""
    start = by % len(sides)
    return [*sides[start:], *sides[:start]]


async def long_prompts(side: peers.Peer, rounds: int) -> list[report.Item]:
    """A stream disturbed by a long prompt, and the first token of a long conversation's second turn."""
    gaps, cold, warm = [], [], []
    for number in range(10_000, 10_000 + rounds):
        calm = asyncio.create_task(side.load([short_prompt(number)], 2 * TOKENS))
        await asyncio.sleep(0.5)  # it streams by now; a figure, not a condition
        await side.load([long_prompt(number + 50_000)], 2)
        [stream] = await calm
        gaps.append(stream.longest_gap_ms)
        [first] = await side.load([long_prompt(number)], 2)
        cold.append(first.first_token_ms)
        [second] = await side.load([long_prompt(number) + " and then?"], 2)
        warm.append(second.first_token_ms)
    goal = "engine.second-turn" if side.name == peers.QmeshWorker.name else ""
    return [
        report.Figure.of(f"longest gap beside a long prompt, {side.name}", gaps, "ms"),
        report.ratio(
            f"second turn, first token sooner, {side.name}",
            (cold, warm),
            "ms",
            own="cold",
            peer="second turn",
            group=f"first token of a long prompt, {side.name}",
            goal=goal,
        ),
    ]


def peer_figures(figures: dict[tuple[str, int], Rounds], counts: Sequence[int]) -> Iterator[report.Figure]:
    """Ours against each peer's, at each number of streams."""
    ours = peers.QmeshWorker.name
    for count in counts:
        group = qmesh.plural(count, "stream")
        for peer in dict.fromkeys(name for name, _ in figures if name != ours):
            speeds = [figures[side, count].speeds for side in (ours, peer)]
            goal = goals.engine_key(peer, count)
            yield report.ratio(f"tokens/s, {group}", speeds, "tokens/s", peer=peer, group=group, goal=goal)


def wait_figures(figures: dict[tuple[str, int], Rounds]) -> Iterator[report.Figure]:
    for (side, count), it in figures.items():
        where = f"{side}, {qmesh.plural(count, 'stream')}"
        yield report.Figure.of(f"first token, {where}", it.waits, "ms")
        yield report.Figure.of(f"longest gap, {where}", it.gaps, "ms")


async def measure(arguments: argparse.Namespace) -> list[report.Item]:
    slots = max(8, *arguments.streams)
    model = report.needed_model()
    setup = peers.Setup(model, slots, arguments.context, psutil.cpu_count(logical=False) or 1)
    chosen = [peer for peer in PEERS if not arguments.peers or peer.name in arguments.peers]
    left_out: dict[str, str] = {}
    async with peers.running(setup, *chosen, left_out=left_out) as sides:
        print(f"{model.stem}, {slots} slots of {setup.context} tokens, {setup.threads} threads", flush=True)
        figures = await streams_in_turn(sides, arguments.streams, arguments.rounds, arguments.tokens)
        items: list[report.Item] = [*peer_figures(figures, arguments.streams), *wait_figures(figures)]
        for side in sides:
            items.append(report.Figure.of(f"memory, {side.name}", [side.memory_mb], "MB"))
            if isinstance(side, ASKED_LONG):
                items += await long_prompts(side, arguments.rounds)
    return [*items, *(report.Missing(f"engine.{name}.", why) for name, why in left_out.items())]


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    yield from asyncio.run(measure(arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--streams", type=int, nargs="+", default=list(goals.ENGINE_STREAMS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of an answer")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--peers", nargs="*", choices=[peer.name for peer in PEERS], help="default: all")
    return parser


if __name__ == "__main__":
    report.main("engine", make_parser(), figures)
