"""Networks that lose, delay, hold up and damage what workers and clients say to each other."""

from __future__ import annotations

from collections.abc import Callable

from actors import STALL_TIMEOUT_S, Server
from arena import LanArena
from cells import Cell, Scene
from stages import MID_STREAM, Stage, strike_in
from story import Story

WORKERS = 2
LOSS = "numgen random mod 100 < 30"
DELAY_S = 0.3
BYTE_S = 0.005  # a token's frame of some 150 bytes takes most of a second
TRICKLE_S = STALL_TIMEOUT_S  # longer would only be more of the same
SLOW_BYTE_S = 0.05  # a frame takes longer than a client waits for a word

Strike = Callable[[LanArena, Server, Story], None]


def _cut(arena: LanArena, victim: Server, story: Story) -> None:
    arena.lan.partition([arena.desk], [arena.machines[victim]])


def _cut_up(arena: LanArena, victim: Server, story: Story) -> None:
    arena.drop(arena.desk, arena.machines[victim])


def _cut_down(arena: LanArena, victim: Server, story: Story) -> None:
    arena.drop(arena.machines[victim], arena.desk)


def _then_healed(cut: Strike) -> Strike:
    """The network is whole again when the client has gone on, while the answer is still being written."""

    def strike(arena: LanArena, victim: Server, story: Story) -> None:
        cut(arena, victim, story)
        arena.wait_lost(story)
        arena.lan.heal()

    return strike


def _lose(arena: LanArena, victim: Server, story: Story) -> None:
    for source, target in ((arena.desk, arena.machines[victim]), (arena.machines[victim], arena.desk)):
        arena.drop(source, target, LOSS)


def _vanish(arena: LanArena, victim: Server, story: Story) -> None:
    """The machine is gone: its kernel takes no leave of anybody."""
    _cut(arena, victim, story)
    victim.kill()


def _delay(arena: LanArena, victim: Server, story: Story) -> None:
    arena.harm(victim, delay_s=DELAY_S)
    arena.asker.follow(story)
    arena.harm(victim)
    arena.expect(not story.lost, f"a delay of {DELAY_S:g} s made the client leave a worker that is well")


def _trickle(arena: LanArena, victim: Server, story: Story) -> None:
    arena.harm(victim, byte_s=BYTE_S)
    arena.go_on(story, TRICKLE_S)
    arena.harm(victim)


def _trickle_slowly(arena: LanArena, victim: Server, story: Story) -> None:
    arena.harm(victim, byte_s=SLOW_BYTE_S)
    arena.wait_lost(story)
    arena.harm(victim)


def _flip(arena: LanArena, victim: Server, story: Story) -> None:
    arena.harm(victim, flip=True)


def _cell(fault: str, strike: Strike, *, proxied: bool = False, stage: Stage = MID_STREAM) -> Cell:
    def play(scene: Scene) -> None:
        with scene.lan(proxied=proxied) as arena:
            strike_in(stage, arena, WORKERS, strike)

    return Cell(fault, stage.name, play, needs_lan=True)


CELLS = [
    _cell("network cut both ways, later healed", _then_healed(_cut)),
    _cell("network cut from client to worker, later healed", _then_healed(_cut_up)),
    _cell("network cut from worker to client, later healed", _then_healed(_cut_down)),
    _cell("30 % of packets lost each way", _lose),
    _cell("300 ms delay each way", _delay, proxied=True),
    _cell("machine gone without a word (half-open connection)", _vanish),
    _cell("bytes that trickle", _trickle, proxied=True),
    _cell("bytes that trickle more slowly than a client waits", _trickle_slowly, proxied=True),
    _cell("a bit flipped on the wire", _flip, proxied=True),
]
