"""Doctor, on real LANs with one fault each: it names the right cause, on the machine where it runs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import members
import pytest
import tiny_models
from lan import Lan, Machine, require, start_workers
from transcript import looks_like, sessions_in, written

import qmesh

# A machine with a later version of QMesh, as far as it can be heard.
LATER_VERSION = f"""
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
print("heard from now on", flush=True)
while True:
    sock.sendto(b"QM\\x63" + bytes(64), ("{{broadcast}}", {qmesh.BEACON_PORT}))
    time.sleep(1)
"""


HOLD_BEACON_PORT = f"""
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", {qmesh.BEACON_PORT}))
print("held", flush=True)
time.sleep(600)
"""


class Visit:
    """What `doctor --json` said on one machine."""

    def __init__(self, machine: Machine, *arguments: str) -> None:
        finished = machine.run("doctor", "--json", *arguments)
        self.named = arguments[-1] if arguments else ""
        assert finished.stdout, finished.stderr
        self.exit_code = finished.returncode
        self.told: dict[str, Any] = json.loads(finished.stdout)

    def causes(self, about: str = "", *, verdict: str = "problem") -> set[str]:
        """The causes of the checks whose name or finding holds this text."""
        checks = [check for check in self.told["checks"] if about in f"{check['name']} {check['found']}"]
        return {check["cause"] for check in checks if check["verdict"] == verdict}


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Visit]]:
    """All doctors at the same time, as each listens for eleven seconds."""
    require()
    directory = tmp_path_factory.mktemp("clinic")
    model = tiny_models.write_model("qwen2", directory / "tiny.gguf")
    with ExitStack() as made:
        lans = [made.enter_context(Lan(directory, model)) for _ in range(7)]
        wards = [healthy(lans[0]), faulty(lans[1]), another_topic(lans[2]), cloned(lans[3]), another_version(lans[4])]
        wards += [held(lans[5]), crowded(lans[6])]
        calls = {name: call for ward in wards for name, call in ward.items()}
        with ThreadPoolExecutor(len(calls)) as pool:
            started = {name: pool.submit(Visit, *call) for name, call in calls.items()}
            yield {name: visit.result() for name, visit in started.items()}
        assert [lan.strayed for lan in lans] == [0] * len(lans)


Calls = dict[str, tuple[Any, ...]]
"""Name: the machine and the arguments of a visit."""


def healthy(lan: Lan) -> Calls:
    worker, desk = lan.machine("worker"), lan.machine("desk")
    start_workers(worker)
    return {"well, at a worker": (worker,), "well, at a desk": (desk,)}


def crowded(lan: Lan) -> Calls:
    """A machine with two workers, whose firewall knows of the first one's ports alone."""
    home, other = lan.machine("home"), lan.machine("other")
    start_workers(home, other)
    second = home.start_worker()
    shut = [f"udp dport {second.ready['udp'][1]} drop", f"tcp dport {second.ready['tcp'][1]} drop"]
    home.namespace.filter("inet", "input", ['iifname "lo" accept', "ct state established accept", *shut])
    return {"a second worker's ports are shut": (home,)}


def faulty(lan: Lan) -> Calls:
    names = ("open", "shut-worker", "desk", "shut", "deaf", "mute", "half", "stranger")
    open_worker, shut_worker, desk, shut, deaf, mute, half, stranger = (lan.machine(name) for name in names)
    unplugged = lan.machine("unplugged", plugged=False)
    start_workers(open_worker, shut_worker)
    shut_worker.block_udp(qmesh.DEFAULT_PORT)
    shut.block_udp(replies=True)
    deaf.namespace.filter(
        "inet", "input", ['iifname "lo" accept', "ct state established accept", "meta l4proto tcp drop"]
    )
    lan.block(mute, open_worker)
    usual = "udp dport { 47474, 47475 } accept"  # what a client's answers come to is another port
    half.namespace.filter(
        "inet", "input", ['iifname "lo" accept', "ct state established accept", usual, "udp dport 1-65535 drop"]
    )
    named = ("--peer", str(open_worker.address_in(lan)))
    return {
        "a worker's port is shut": (desk,),
        "its own port is shut": (shut_worker,),
        "no UDP gets in": (shut, *named),
        "no TCP gets in": (deaf, *named),
        "one direction is blocked": (mute,),
        "answers to a client do not get in": (half,),
        "another topic": (stranger, "--topic", "another"),
        "no network": (unplugged,),
        "nobody is at the address": (unplugged, *named),
    }


def another_topic(lan: Lan) -> Calls:
    worker, desk = lan.machine("worker"), lan.machine("desk")
    start_workers(worker, flags=("--topic", qmesh.DEFAULT_TOPIC))
    return {"the default topic is elsewhere": (desk,)}


def held(lan: Lan) -> Calls:
    """One machine where another program has the port for beacons, and one that others' beacons do not reach."""
    worker, holder = lan.machine("worker"), lan.machine("holder")
    start_workers(worker)
    worker.block_udp(qmesh.BEACON_PORT)
    holder.popen_python(HOLD_BEACON_PORT)
    return {"the port for beacons is taken": (holder,), "a worker does not hear beacons": (lan.machine("desk"),)}


def cloned(lan: Lan) -> Calls:
    machines = [lan.machine(name) for name in ("first", "copy")]
    for machine in machines:
        instance = machine.state_dir / platform.node() / "0"
        instance.mkdir(parents=True)
        (instance / qmesh.NODE_KEY_FILE).write_text(members.node_key(1).pem)
    start_workers(*machines)
    return {"a clone": (lan.machine("desk"),)}


def another_version(lan: Lan) -> Calls:
    calls: Calls = {"a later version": (lan.machine("desk"),)}
    lan.machine("later").popen_python(LATER_VERSION.format(broadcast=lan.broadcast))
    return calls


def test_where_all_is_well_the_exit_code_is_0(visits: dict[str, Visit]) -> None:
    for name in ("well, at a worker", "well, at a desk"):
        visit = visits[name]
        assert (visit.exit_code, visit.told["ok"], visit.causes()) == (0, True, set()), name


def test_a_peer_that_answers_is_said_to_do_so_in_both_directions(visits: dict[str, Visit]) -> None:
    found = {check["name"]: check["found"] for check in visits["well, at a desk"].told["checks"]}
    peers = [found[name] for name in found if name.startswith("peer 10.")]
    assert peers == ["UDP and TCP pass in both directions"]
    assert (
        next(found[name] for name in found if name.startswith("interface lan"))
        == "multicast and broadcast heard on this machine"
    )


CAUSES = {
    "a worker's port is shut": {"udp_blocked_there"},
    "its own port is shut": {"udp_blocked_here"},
    "a second worker's ports are shut": {"udp_blocked_here"},
    "no UDP gets in": {"udp_blocked_here"},
    "no TCP gets in": {"tcp_blocked_here"},
    "one direction is blocked": {"one_way", "udp_blocked_there"},  # and the other worker's port is shut
    "answers to a client do not get in": {"udp_blocked_here", "udp_blocked_there"},  # the latter as above
    "the port for beacons is taken": {"beacon_port_taken", "udp_blocked_there"},  # the latter as below
    "a worker does not hear beacons": {"udp_blocked_there"},
    "another topic": {"other_mesh"},
    "no network": {"no_network", "no_worker"},
    "nobody is at the address": {"no_network", "no_worker", "peer_silent"},
    "the default topic is elsewhere": {"other_topic"},
    "a clone": {"cloned_identity"},
    "a later version": {"other_version"},
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_right_cause_is_named(visits: dict[str, Visit], name: str) -> None:
    visit = visits[name]
    # From where nothing is let in, the other worker's port, which is shut, is not to be judged.
    seen_from_behind_a_wall = name in ("no UDP gets in", "no TCP gets in")
    abouts = ("interface lan", f"peer {visit.named}:") if seen_from_behind_a_wall else ("",)
    assert set().union(*map(visit.causes, abouts)) == CAUSES[name]
    assert (visit.exit_code, visit.told["ok"]) == (1, False)


def test_of_two_workers_the_one_with_the_fault_is_named(visits: dict[str, Visit]) -> None:
    for name, cause in (("a worker's port is shut", "udp_blocked_there"), ("one direction is blocked", "one_way")):
        blamed = [check["name"] for check in visits[name].told["checks"] if check["cause"] == cause]
        assert len({check.partition("(")[2] for check in blamed}) == 1, blamed


def test_every_problem_says_what_was_found_and_what_to_do(visits: dict[str, Visit]) -> None:
    for visit in visits.values():
        for check in visit.told["checks"]:
            assert check["found"]
            assert check["verdict"] != "problem" or check["remedy"]


def test_what_the_readme_shows_of_a_firewall_is_shown(
    visits: dict[str, Visit], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the interfaces and the mesh are called."""
    for name in ("a worker's port is shut", "well, at a desk"):
        for told in visits[name].told["checks"]:
            qmesh.print_check(qmesh.Check(**told | {"verdict": qmesh.Verdict(told["verdict"])}))
    shown = re.sub("interface \\S+", "interface lan1", capsys.readouterr().out)
    lines = re.sub("mesh '.*'", f"mesh '{qmesh.DEFAULT_TOPIC}'", shown).splitlines()
    (session,) = (typed for typed in sessions_in(written()) if typed[0].command == "python qmesh.pyz doctor")
    transcript = [line for line in session[0].shown.splitlines()[:-1] if line != "..."]
    assert len(transcript) > 5
    assert [line for line in transcript if not any(looks_like(each, line) for each in lines)] == []
