"""Clients that are killed, that stop reading, and that vanish: what they leave at a worker, and how long it stays."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import lan
from actors import ANSWER_TIMEOUT_S, STAGE_TIMEOUT_S, Asker, Server, wait_until
from arena import Arena, LanArena
from cells import Cell, Scene
from questions import KEEP_BUSY, LONG_PROMPT, QUICK, STREAM
from stages import EARLIEST
from story import Question, Story

import qmesh

FREED_WITHIN_S = 1.0  # a slot, when the client that it works for is gone
EARLY_S = 6.0  # when a client that found nobody looks but now and then
SLOTS = 4
DEAF_STREAMS = 2  # so that slots are left for those who read
SMALL_BUFFERS = "4096 8192 8192"  # least, usual and most bytes: an answer of some hundred tokens does not fit
ANSWERED_S = 30.0  # in which a worker has written all answers here, read or unread
DROPPED_S = qmesh.SEND_TIMEOUT_S + 15.0  # by when a worker has hung up on who reads nothing

Leave = Callable[[Asker, Story], None]


def _kill(client: Asker, story: Story) -> None:
    client.kill()


def _cancel(client: Asker, story: Story) -> None:
    client.drop(story)


def _queued(arena: Arena, client: Asker, server: Server) -> Story:
    arena.occupy(server, KEEP_BUSY)
    story = client.ask(STREAM)
    client.wait(lambda: bool(story.queued), STAGE_TIMEOUT_S, "a request in the queue")
    return story


def _reading(arena: Arena, client: Asker, server: Server) -> Story:
    story = client.ask(LONG_PROMPT)
    wait_until(lambda: arena.watcher.load(server) == (1, 0), STAGE_TIMEOUT_S, "a prompt that is read")
    return story


def _streaming(arena: Arena, client: Asker, server: Server) -> Story:
    story = client.ask(KEEP_BUSY)
    client.wait(lambda: len(story.ids) >= EARLIEST, STAGE_TIMEOUT_S, "an answer that has begun")
    return story


STAGES = {"queued": (_queued, (1, 0)), "prompt evaluation": (_reading, (0, 0)), "mid-stream": (_streaming, (0, 0))}


def _leaving(fault: str, leave: Leave, at: str) -> Cell:
    """A client leaves a worker with one slot, which then works for others: for who was before it, or who comes next."""
    reach, left = STAGES[at]

    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            (server,) = arena.start(1, "--slots", "1")
            client = arena.new_asker()
            story = reach(arena, client, server)
            leave(client, story)
            took_s = wait_until(lambda: arena.watcher.load(server) == left, STAGE_TIMEOUT_S, "a slot that is free")
            if left == (0, 0):
                took_s += _first_token_s(arena, server)
            arena.measure("slot free again", took_s)
            arena.expect(took_s < FREED_WITHIN_S, f"what a client left was given up only after {took_s:.1f} s")

    return Cell(fault, at, play)


def _first_token_s(arena: Arena, server: Server) -> float:
    """How long it takes a worker to begin an answer, less what it takes when it has nothing else to do."""

    def ask(question: Question) -> float:
        began = time.monotonic()
        story = arena.watcher.ask_at(server, question)
        arena.watcher.wait(lambda: bool(story.pieces), STAGE_TIMEOUT_S, "a first token")
        return time.monotonic() - began

    first_s = ask(QUICK[0])
    arena.watcher.follow(*arena.watcher.stories.values())
    return max(0.0, first_s - ask(QUICK[1]))


def _deaf_ears(arena: LanArena, server: Server) -> tuple[Asker, list[Story]]:
    """A client that is suspended while a worker writes its answers, on a network that holds but little of them."""
    for machine, buffer in ((arena.desk, "rmem"), (arena.machines[server], "wmem")):
        machine.python(f"open('/proc/sys/net/ipv4/tcp_{buffer}', 'w').write('{SMALL_BUFFERS}')")
    client = arena.new_asker()
    stories = [client.ask(KEEP_BUSY) for _ in range(DEAF_STREAMS)]
    client.wait(lambda: all(story.pieces for story in stories), STAGE_TIMEOUT_S, "answers that have begun")
    client.popen.send_signal(signal.SIGSTOP)
    return client, stories


def _stops_reading(scene: Scene) -> None:
    """Others are answered meanwhile, its slots are free when its answers are written, and it loses nothing."""
    with scene.lan() as arena:
        (server,) = arena.start(1, "--slots", f"{SLOTS}")
        client, stories = _deaf_ears(arena, server)
        others = [arena.asker.ask(question) for question in QUICK]
        arena.asker.follow(*others)
        wait_until(lambda: arena.watcher.is_idle(server), ANSWERED_S, "a worker that has written what nobody reads")
        arena.expect(not any(story.over for story in stories), "the network held whole answers: nobody was deaf")
        client.popen.send_signal(signal.SIGCONT)
        client.follow(*stories)
        arena.expect(all(story.is_whole for story in stories + others), "no whole answer")


def _never_reads_again(scene: Scene) -> None:
    """A worker hangs up on it in the end, and keeps the answers: so it loses nothing still."""
    with scene.lan() as arena:
        (server,) = arena.start(1, "--slots", f"{SLOTS}")
        client, stories = _deaf_ears(arena, server)
        quiet = arena.before[server].descriptors
        took_s = wait_until(lambda: server.footprint().descriptors <= quiet, DROPPED_S, "a worker that hangs up")
        arena.measure("hung up on", took_s)
        client.popen.send_signal(signal.SIGCONT)
        client.follow(*stories)
        arena.expect(all(story.is_whole for story in stories), f"no whole answer: {[s.ending for s in stories]}")


def _vanishes(scene: Scene) -> None:
    """Its machine is gone without a word; what it asked for ends, and does not stay in a slot."""
    with scene.lan() as arena:
        (server,) = arena.start(1, "--slots", "1")
        home: lan.Machine = arena.lan.machine("elsewhere", ipv6=False)
        client = arena.new_asker(place=home)
        story = client.ask(KEEP_BUSY)
        client.wait(lambda: len(story.ids) >= EARLIEST, STAGE_TIMEOUT_S, "an answer that has begun")
        arena.lan.partition([home], [arena.machines[server]])
        client.kill()
        took_s = wait_until(lambda: arena.watcher.is_idle(server), ANSWERED_S, "a slot that is free")
        arena.measure("slot free again", took_s)
        arena.asker.follow(arena.asker.ask(STREAM), within_s=ANSWER_TIMEOUT_S)


def _opened_early(scene: Scene) -> None:
    """A client that found nobody finds who came since, when it is asked something."""
    with scene.loopback() as arena:
        client = arena.new_asker()
        time.sleep(EARLY_S)
        arena.start(1)
        story = client.ask(STREAM)
        client.follow(story)
        arena.expect(story.is_whole, f"no answer from a worker that is there: {story.ending}")


CELLS = [
    *(_leaving("client killed", _kill, at) for at in STAGES),
    *(_leaving("client cancels", _cancel, at) for at in STAGES),
    Cell("no worker when the client is opened", "start", _opened_early),
    Cell("client suspended for a while", "mid-stream", _stops_reading, needs_lan=True),
    Cell("client suspended until it is hung up on", "mid-stream", _never_reads_again, needs_lan=True),
    Cell("client's machine gone without a word", "mid-stream", _vanishes, needs_lan=True),
]
