"""Real processes on real LANs, given no address: who finds whom, and what happens when the network fails."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from lan import Lan, Machine, require, settle, start_workers

SOON_S = 15.0  # the pause between two beacons, and half of it
NAP_S = 20.0  # longer than any timer of a worker: it has to notice that it slept
WORKERS = ("a", "b", "c", "d", "e")
EVERYONE = set(WORKERS)
SERVICE_PORT = 47475
STRAY = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"


@dataclass
class Network:
    """Makes the LANs of this file; nothing may have been sent out of one when it is taken away."""

    directory: Path
    model: Path

    @contextlib.contextmanager
    def lan(self, topic: str | None = None) -> Iterator[Lan]:
        with Lan(self.directory, self.model, topic=topic) as made:
            yield made
            assert made.strays == Counter()


@dataclass
class Office:
    """A LAN with a worker on five machines, and two machines without; some have a default route."""

    lan: Lan
    desk: Machine
    laptop: Machine
    workers: dict[str, Machine]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    require()
    directory = tmp_path_factory.mktemp("network")
    return Network(directory, tiny_models.write_model("qwen2", directory / "tiny.gguf"))


@pytest.fixture(scope="module")
def whole_office(network: Network) -> Iterator[Office]:
    with network.lan() as lan:
        router = lan.machine("router")
        workers = {name: lan.machine(name, gateway=router if name == "e" else None) for name in WORKERS}
        office = Office(lan, lan.machine("desk"), lan.machine("laptop", gateway=router), workers)
        start_workers(*workers.values())
        yield office


@pytest.fixture
def office(whole_office: Office) -> Iterator[Office]:
    yield whole_office
    whole_office.lan.heal()
    assert whole_office.lan.strays == Counter()


# --- What takes its time: begun before the first test, looked at by a late one ---


@dataclass
class Begun:
    """LANs on which something has been going on for a while: workers that are apart, cut off, or suspended."""

    apart: Lan
    cut_off: Lan
    bedroom: Lan
    asleep_since: float = 0.0


@pytest.fixture(scope="module", autouse=True)
def begun(network: Network) -> Iterator[Begun]:
    with network.lan() as apart, network.lan() as cut_off, network.lan() as bedroom:
        pair = [apart.machine(name) for name in ("x", "y")]
        apart.partition(*([machine] for machine in pair))
        cut_off.block_broadcast()  # it would be heard on any interface, joined to a group or not
        lonely = [
            cut_off.machine(name, ipv6=False, plugged=name != "late") for name in ("late", "away", "down", "brief")
        ]
        lonely.append(cut_off.machine("late6", ipv4=False, plugged=False))
        cut_off.partition(*([machine] for machine in lonely))
        sleepers = [bedroom.machine(name) for name in ("sleeper", "waker")]
        start_workers(*pair, *lonely, *sleepers)
        for lan in (cut_off, bedroom):
            lan.machine("desk")
        lonely[1].unplug(cut_off)
        lonely[2].down(cut_off)
        sleepers[0].processes[0].popen.send_signal(signal.SIGSTOP)
        yield Begun(apart, cut_off, bedroom, asleep_since=time.monotonic())


def settle_all(wanted: dict[Machine, set[str]]) -> None:
    """Wait until clients on these machines, side by side, reach just these workers."""
    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in pool.map(lambda machine: settle(machine.reached, wanted[machine], SOON_S), wanted):
            pass


# --- Everyone finds everyone ---


def test_from_every_machine_of_a_lan_every_worker_is_found(office: Office) -> None:
    settle_all(dict.fromkeys((office.desk, *office.workers.values()), EVERYONE))


def test_a_machine_without_a_worker_is_answered(office: Office) -> None:
    assert office.desk.answered_by() in EVERYONE


def test_a_machine_with_a_default_route_finds_everyone_and_sends_the_router_nothing(office: Office) -> None:
    settle(office.laptop.reached, EVERYONE, SOON_S)
    assert office.laptop.answered_by() in EVERYONE


def test_every_worker_knows_every_other(office: Office) -> None:
    for worker in office.workers.values():
        settle(worker.heard_of, EVERYONE, SOON_S)


def test_a_machine_on_two_lans_is_found_from_both_and_finds_both(network: Network) -> None:
    with network.lan() as left, network.lan(topic=left.topic) as right:
        middle, one, other = left.machine("middle"), left.machine("one"), right.machine("other")
        right.join(middle)
        start_workers(middle, one, other)
        here, there = left.machine("here"), right.machine("there")
        settle_all({here: {"middle", "one"}, there: {"middle", "other"}, middle: {"middle", "one", "other"}})


def test_machines_with_nothing_but_a_link_local_ipv6_address_find_each_other(network: Network) -> None:
    with network.lan() as lan:
        first, second, desk = (lan.machine(name, ipv4=False) for name in ("first", "second", "desk"))
        start_workers(first, second)
        both = {"first", "second"}
        settle_all({first: both, second: both, desk: both})
        assert desk.answered_by() in both


@pytest.mark.parametrize("passes", ["broadcast", "multicast"])
def test_broadcast_or_multicast_alone_will_do(network: Network, passes: str) -> None:
    with network.lan() as lan:
        if passes == "broadcast":
            lan.block_multicast()
        else:
            lan.block_broadcast()
        first, second, desk = (lan.machine(name, ipv6=False) for name in ("first", "second", "desk"))
        start_workers(first, second)
        settle(desk.reached, {"first", "second"}, SOON_S)
        settle(first.heard_of, {"first", "second"}, SOON_S)
        settle(second.heard_of, {"first", "second"}, SOON_S)


# --- Faults ---


def test_each_side_of_a_parted_lan_works_by_itself_and_once_healed_all_are_back(office: Office) -> None:
    a, b, *others = office.workers.values()
    office.lan.partition([a, b, office.desk], [*others, office.laptop])
    settle_all({office.desk: {"a", "b"}, office.laptop: {"c", "d", "e"}})
    assert office.desk.answered_by() in {"a", "b"}
    office.lan.heal()
    settle_all({office.desk: EVERYONE, office.laptop: EVERYONE})


@pytest.mark.parametrize("mute", ["worker", "client"])
def test_a_worker_that_is_cut_off_one_way_is_passed_over_and_found_from_elsewhere(office: Office, mute: str) -> None:
    ends = (office.workers["c"], office.desk) if mute == "worker" else (office.desk, office.workers["c"])
    office.lan.block(*ends)
    settle_all({office.desk: EVERYONE - {"c"}, office.laptop: EVERYONE})
    assert office.desk.answered_by() in EVERYONE - {"c"}


def test_two_workers_one_of_which_does_not_hear_the_other_are_both_found(office: Office) -> None:
    a, b = office.workers["a"], office.workers["b"]
    office.lan.block(a, b)
    settle_all({office.desk: EVERYONE, a: EVERYONE - {"b"}, b: EVERYONE - {"a"}})


def test_a_worker_whose_port_lets_no_udp_in_is_found_and_used(office: Office) -> None:
    closed = office.workers["c"]
    closed.block_udp(SERVICE_PORT)
    office.lan.partition([office.desk], [machine for machine in office.workers.values() if machine is not closed])
    settle(office.desk.reached, {"c"}, SOON_S)
    assert office.desk.answered_by() == "c"


def test_a_client_on_a_machine_whose_port_lets_no_udp_in_finds_everyone(office: Office) -> None:
    office.workers["c"].block_udp(SERVICE_PORT)
    settle(office.workers["c"].reached, EVERYONE, SOON_S)


# --- What comes and goes ---


@pytest.fixture(scope="module")
def mended(begun: Begun) -> Begun:
    """Every cable is in and nothing held apart, from here on; both tests wait for the workers at the same time."""
    x, y = begun.apart.machines
    assert (x.heard_of(), y.heard_of()) == ({"x"}, {"y"})
    begun.apart.heal()
    lan = begun.cut_off
    late, away, down, brief, late6, _ = lan.machines
    brief.unplug(lan)  # and back before the next beacon: the same address, on another interface
    for machine in (late, away, brief, late6):
        machine.plug(lan)
    down.up(lan)
    return begun


def test_interfaces_that_come_up_or_come_back_after_a_worker_has_started_are_used(mended: Begun) -> None:
    *_, desk = mended.cut_off.machines
    settle(desk.reached, {"late", "away", "down", "brief", "late6"}, SOON_S)


def test_meshes_that_started_apart_become_one(mended: Begun) -> None:
    for worker in mended.apart.machines:
        settle(worker.heard_of, {"x", "y"}, SOON_S)


def test_a_suspended_worker_is_passed_over_and_once_it_goes_on_it_is_back(begun: Begun) -> None:
    sleeper, waker, desk = begun.bedroom.machines
    settle(desk.reached, {"waker"}, SOON_S)
    assert desk.answered_by() == "waker"
    time.sleep(max(0.0, begun.asleep_since + NAP_S - time.monotonic()))
    sleeper.processes[0].popen.send_signal(signal.SIGCONT)
    settle(desk.reached, {"sleeper", "waker"}, SOON_S)
    for worker in (sleeper, waker):
        settle(worker.heard_of, {"sleeper", "waker"}, SOON_S)


# --- The harness itself ---


def test_what_strays_is_counted_where_it_is_sent_and_at_the_router(network: Network) -> None:
    lan = Lan(network.directory, network.model)  # not of the network's: there nothing may stray
    with lan:
        router = lan.machine("router")
        leaky = lan.machine("leaky", gateway=router)
        assert lan.strayed == 0
        leaky.python(STRAY)
        assert {name.rpartition("-")[2] for name in lan.strays} == {
            f"{place}: 192.0.2.1" for place in (str(lan.number), "leaky", "router")
        }
        assert lan.strayed == 3
