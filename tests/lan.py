"""Real LANs inside this machine: namespaces with a network of their own, joined by a switch, and faults between them.

A `Lan` is a namespace that holds a bridge; each `Machine` is a namespace joined to it by a cable (a veth pair). Nothing
is put into the namespace that the tests run in, and no cable leads out of a LAN: what happens in it stays in it. Every
machine and the switch count what is sent to somewhere else than the LAN (`Lan.strays`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import harness
import pytest

PROGRAM = Path(os.environ.get("QMESH_TEST_PROGRAM", harness.PROGRAM))  # to try a changed copy
WORKER_FLAGS = ("--threads", "1", "--ctx", "1024")  # no --port: each machine has the preferred one for itself

TOOL_TIMEOUT_S = 20  # ip and nft take some milliseconds, on a loaded machine a second
NO_WORKER = 3  # the exit code
POLL_S = 0.1  # between two looks at something that is waited for
FIRST_HOST = 10  # the addresses below are for what is not made here
MAX_LANS = 255  # 10.77.1.0/24 to 10.77.255.0/24

# Where a member of a mesh may send: its LAN, itself, the groups of beacons, and what no router passes on.
BEACON_GROUP = "239.192.77.77"
ALLOWED_IPV4 = ("127.0.0.0/8", "255.255.255.255", BEACON_GROUP)
ALLOWED_IPV6 = ("::1", "fe80::/10", "ff02::/16", "ff12::/16")  # neighbour discovery and MLD are in ff02::/16
IGMP_REPORTS = "224.0.0.22"  # the kernel's own, when a group is joined

MULTICAST = ("ip daddr 224.0.0.0/4", "ip6 daddr ff00::/8 meta l4proto udp")  # IPv6 finds its neighbours by ICMP
BROADCAST = ("ether daddr ff:ff:ff:ff:ff:ff ether type ip",)  # not ARP, which IPv4 finds its neighbours by

# Every frame that passes an interface of the namespace, to a file, each behind its size; ends when its input does.
CAPTURE = """
import select, socket, struct, sys
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL: both directions
frames.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
with open({path!r}, "wb") as file:
    print("listening", flush=True)
    ending = False
    while True:
        ready, _, _ = select.select([frames] if ending else [frames, sys.stdin], [], [], {quiet_s} if ending else None)
        if frames in ready:
            frame = frames.recv(1 << 17)
            file.write(struct.pack(">I", len(frame)) + frame)
        elif ending:
            break
        else:
            ending = True
print(struct.unpack("II", frames.getsockopt(263, 6, 8))[1])  # SOL_PACKET, PACKET_STATISTICS: what was lost
"""
QUIET_S = 0.3  # after which what was sent before the end of a capture has passed

T = TypeVar("T")


class NoLan(Exception):
    """A tool failed, with what it said."""


@functools.cache
def unavailable() -> str | None:
    """Why no LAN can be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces take root"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    try:
        with contextlib.ExitStack() as made:
            first, second = (Namespace(f"{_prefix()}-try{number}", made) for number in (1, 2))
            first.ip(
                "link add name switch type bridge", f"link add cable type veth peer name cable netns {second.name}"
            )
            first.watch("bridge")
            second.watch("inet")
            second.set_ipv6(accept_dad=0)
    except NoLan as error:
        return f"namespaces are not permitted here: {error}"
    return None


def require() -> None:
    """Skip the test where no LAN can be made; fail it where LANs have to be tested (QMESH_TEST_LAN=required)."""
    reason = unavailable()
    if reason is not None:
        if os.environ.get("QMESH_TEST_LAN") == "required":
            pytest.fail(reason)
        pytest.skip(reason)


def _prefix() -> str:
    return f"qmesh-{os.getpid()}"


@functools.cache
def _sweep() -> None:
    """Take away what is left of runs that were killed."""
    for pid, name in re.findall(r"^(?=qmesh-(\d+)-)(\S+)", tool("ip", "netns", "list"), re.MULTILINE):
        if not Path("/proc", pid).exists():
            _remove(name)


def _remove(namespace: str) -> None:
    for pid in tool("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    tool("ip", "netns", "del", namespace)


def _counters(family: str) -> str:
    """Rules that count, by destination, what is sent or heard here and does not belong to the LAN."""
    return f"""
table {family} watch {{
    set home {{ type ipv4_addr; flags interval; }}
    set strays4 {{ type ipv4_addr; flags dynamic; size 256; counter; }}
    set strays6 {{ type ipv6_addr; flags dynamic; size 256; counter; }}
    chain judge {{
        ip daddr @home accept
        ip daddr {{ {", ".join(ALLOWED_IPV4)} }} accept
        ip daddr {IGMP_REPORTS} ip protocol igmp accept
        ip6 daddr {{ {", ".join(ALLOWED_IPV6)} }} accept
        meta protocol ip update @strays4 {{ ip daddr }}
        meta protocol ip6 update @strays6 {{ ip6 daddr }}
    }}
    chain sent {{
        type filter hook output priority 0
        jump judge
    }}
    chain heard {{
        type filter hook prerouting priority 0
        jump judge
    }}
}}
"""


def tool(*command: str, stdin: str = "", timeout_s: float = TOOL_TIMEOUT_S) -> str:
    """What a command prints. Raises NoLan when it fails."""
    finished = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False, encoding="utf-8"
    )
    if finished.returncode:
        raise NoLan(f"{' '.join(command)}: {finished.stderr.strip()}")
    return finished.stdout


class Namespace:
    """A network namespace; `made` takes it away again, with every process in it."""

    def __init__(self, name: str, made: contextlib.ExitStack) -> None:
        self.name = name
        self.prefix = ("ip", "netns", "exec", name)
        tool("ip", "netns", "add", name)
        made.callback(_remove, name)
        self.ip("link set lo up")

    def ip(self, *commands: str) -> None:
        """Commands of `ip`, in one process."""
        tool("ip", "-n", self.name, "-batch", "-", stdin="\n".join(commands) + "\n")

    def nft(self, script: str) -> None:
        """All of a script of `nft`, or nothing of it."""
        tool(*self.prefix, "nft", "-f", "-", stdin=script)

    def set_ipv6(self, **settings: int) -> None:
        """Settings of net.ipv6.conf, for the interfaces that are here and those to come."""
        pairs = itertools.product(("all", "default"), settings.items())
        lines = [f"echo {value} > /proc/sys/net/ipv6/conf/{kind}/{name}" for kind, (name, value) in pairs]
        tool(*self.prefix, "sh", "-ec", "\n".join(lines))

    def filter(self, family: str, hook: str, rules: Iterable[str]) -> None:
        """Have exactly these rules on a hook."""
        chain = "\n".join((f"type filter hook {hook} priority 0", *rules))
        table = f"table {family} faults"
        self.nft(f"{table}\ndelete {table}\n{table} {{\nchain {hook} {{\n{chain}\n}}\n}}\n")

    def watch(self, family: str) -> None:
        """Count from now on what is sent or heard here with a destination out of the LAN."""
        self.nft(_counters(family))

    def call_home(self, family: str, subnet: str) -> None:
        self.nft(f"add element {family} watch home {{ {subnet} }}\n")

    def strays(self, family: str) -> Counter[str]:
        found: Counter[str] = Counter()
        listed = json.loads(tool(*self.prefix, "nft", "-j", "list", "table", family, "watch"))
        for item in listed["nftables"]:
            listed_set = item.get("set", {})
            for element in listed_set.get("elem", ()) if listed_set.get("name") != "home" else ():
                found[f"{self.name}: {element['elem']['val']}"] += element["elem"]["counter"]["packets"]
        return found


class Capture:
    """Records every frame that passes a namespace, from its making to its `stop`, which returns them."""

    def __init__(self, namespace: Namespace, path: Path) -> None:
        self._path = path
        script = CAPTURE.format(path=str(path), quiet_s=QUIET_S)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([*namespace.prefix, sys.executable, "-c", script], **pipes)
        assert self._process.stdout is not None
        assert self._process.stdout.readline()

    def stop(self) -> list[bytes]:
        lost, _ = self._process.communicate(timeout=TOOL_TIMEOUT_S)
        assert int(lost) == 0, f"{int(lost)} frames were not captured"
        data, frames, at = self._path.read_bytes(), [], 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            frames.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        return frames


@dataclass
class Cable:
    """A machine's connection to a LAN: its end at the switch, its end at the machine, and the address there."""

    port: str
    interface: str
    address: str | None


class Machine(harness.Place):
    """A computer of a LAN. What runs on it is given no address: neither its own nor another's."""

    worker_flags: tuple[str, ...] = WORKER_FLAGS

    def __init__(self, lan: Lan, name: str, made: contextlib.ExitStack, *, ipv4: bool, ipv6: bool) -> None:
        super().__init__(lan.directory / name, lan.model, lan.topic, lan.program)
        self.directory.mkdir()
        self.name = name
        self.ipv4 = ipv4
        self.gateway: Machine | None = None
        self.namespace = Namespace(f"{lan.switch.name}-{name}", made)
        self.prefix = self.namespace.prefix
        made.callback(self.end)
        self._cables: dict[Lan, Cable] = {}
        self._commands = itertools.count()
        self._firewalled = False
        # A link-local address is used at once, without asking whether another has it: none here could.
        self.namespace.set_ipv6(accept_dad=0, disable_ipv6=int(not ipv6))
        self.namespace.watch("inet")

    @property
    def client_env(self) -> dict[str, str]:
        """With a state directory of its own for each command: none remembers whom another has met."""
        return self.env | {"QMESH_STATE_DIR": str(self.directory / f"client-{next(self._commands)}")}

    def address_in(self, lan: Lan) -> str | None:
        """Its IPv4 address there."""
        return self._cables[lan].address

    def port_in(self, lan: Lan) -> str:
        """The switch's name for its place there."""
        return self._cables[lan].port

    def popen_python(self, script: str) -> None:
        """Start a script here that runs on; it is ended with this machine. Waits for the first line it prints."""
        process = harness.Process([*self.prefix, sys.executable, "-c", script], self.env, self.directory / "script.log")
        self.processes.append(process)
        assert process.stdout.readline()

    def python(self, script: str) -> str:
        """What a script prints that runs here."""
        return tool(*self.prefix, sys.executable, "-c", script)

    # --- What its clients see ---

    def status(self, *flags: str) -> dict[str, Any]:
        """What `status --json` prints; of no worker found, its error."""
        finished = self.run("status", "--json", *flags)
        assert finished.returncode in (0, NO_WORKER), finished.stderr
        told: dict[str, Any] = json.loads(finished.stdout)
        return told

    def reached(self, *flags: str) -> set[str]:
        """The machines whose workers a client here finds, and hears from."""
        return self._names(self.status(*flags).get("workers", ()))

    def heard_of(self) -> set[str]:
        """The machines whose workers the worker here knows of: a client that speaks to it alone is told of them."""
        told = self.status("--host", harness.LOOPBACK)
        return self._names([*told.get("workers", ()), *told.get("unreachable", ())])

    def answered_by(self) -> str:
        """The machine whose worker answers a client here."""
        (name,) = self._names([self.json("prompt", "Hello", "--max-tokens", "4")])
        return name

    def _names(self, workers: Iterable[dict[str, Any]]) -> set[str]:
        neighbours = [machine for lan in self._cables for machine in lan.machines]
        names = {process.worker_id: machine.name for machine in neighbours for process in machine.processes}
        return {names.get(worker["worker_id"], worker["worker_id"]) for worker in workers}

    # --- Cables ---

    def attach(self, lan: Lan, cable: Cable) -> None:
        """Have a place at a LAN's switch, with no cable in it yet."""
        self._cables[lan] = cable
        self.namespace.call_home("inet", lan.subnet)

    def plug(self, lan: Lan) -> None:
        """The interface comes into being, with the address that it had."""
        cable = self._cables[lan]
        lan.switch.ip(
            f"link add {cable.port} type veth peer name {cable.interface} netns {self.namespace.name}",
            f"link set {cable.port} master switch up",
        )
        self.up(lan)

    def unplug(self, lan: Lan) -> None:
        """The interface is gone, as when a network card is pulled."""
        lan.switch.ip(f"link del {self._cables[lan].port}")

    def up(self, lan: Lan) -> None:
        cable = self._cables[lan]
        commands = [f"link set {cable.interface} up"]
        if cable.address is not None:
            commands.append(f"addr replace {cable.address}/24 brd + dev {cable.interface}")
        if self.gateway is not None:
            commands.append(f"route replace default via {self.gateway.address_in(lan)}")
        self.namespace.ip(*commands)

    def down(self, lan: Lan) -> None:
        """The interface stays, and so does its IPv4 address; its routes go."""
        self.namespace.ip(f"link set {self._cables[lan].interface} down")

    # --- Faults ---

    def block_udp(self, *ports: int, replies: bool = False) -> None:
        """Let no UDP in from the LAN, to these ports or to any.

        replies: let in what answers a datagram from here to that very address, as most firewalls do.
        """
        rules = ['iifname "lo" accept']
        if replies:
            rules.append("ct state established accept")
        blocked = f"udp dport {{ {', '.join(map(str, ports))} }}" if ports else "meta l4proto udp"
        self.namespace.filter("inet", "input", [*rules, f"{blocked} drop"])
        self._firewalled = True

    def unblock(self) -> None:
        if self._firewalled:
            self.namespace.filter("inet", "input", [])
            self._firewalled = False


SomeMachine = TypeVar("SomeMachine", bound=Machine)


class Lan:
    """A switch and the machines at it. Use as a context manager, and `machine` to add to it.

    topic: that of another LAN, to have members of one mesh on both.
    """

    _numbers = itertools.count(1)

    def __init__(self, directory: Path, model: Path, *, topic: str | None = None, program: Path = PROGRAM) -> None:
        self.number = next(self._numbers)
        assert self.number <= MAX_LANS
        self.subnet = f"10.77.{self.number}.0/24"
        self.broadcast = f"10.77.{self.number}.255"
        self.directory = directory / f"lan-{self.number}"
        self.model = model
        self.program = program
        self.topic = topic or f"test-{secrets.token_hex(8)}"
        self.machines: list[Machine] = []
        self._made = contextlib.ExitStack()
        self._ports = itertools.count(1)
        self._drops: list[str] = []

    def __enter__(self) -> Lan:
        self.directory.mkdir(parents=True)
        _sweep()
        try:
            self.switch = Namespace(f"{_prefix()}-{self.number}", self._made)
            # As a simple switch: it forwards at once, and multicast to everyone.
            self.switch.ip("link add name switch type bridge mcast_snooping 0 forward_delay 0", "link set switch up")
            self.switch.watch("bridge")
            self.switch.call_home("bridge", self.subnet)
        except BaseException:
            self._made.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._made.close()

    def machine(
        self,
        name: str,
        *,
        ipv4: bool = True,
        ipv6: bool = True,
        gateway: Machine | None = None,
        plugged: bool = True,
    ) -> Machine:
        """A machine of this LAN. ipv6: with the link-local address that every interface has, and no other.

        gateway: where its default route leads; else it has none. plugged: False leaves `plug` to the test.
        """
        machine = Machine(self, name, self._made, ipv4=ipv4, ipv6=ipv6)
        machine.gateway = gateway
        self.join(machine, plugged=plugged)
        return machine

    def machine_of(self, kind: type[SomeMachine], name: str, *, plugged: bool = True) -> SomeMachine:
        """A machine of another kind, with both versions of IP and no default route."""
        machine = kind(self, name, self._made, ipv4=True, ipv6=True)
        self.join(machine, plugged=plugged)
        return machine

    def join(self, machine: Machine, *, plugged: bool = True) -> None:
        """Give a machine, of another LAN maybe, an interface in this one."""
        number = next(self._ports)
        address = f"10.77.{self.number}.{FIRST_HOST + number}" if machine.ipv4 else None
        machine.attach(self, Cable(port=f"port{number}", interface=f"lan{self.number}", address=address))
        self.machines.append(machine)
        if plugged:
            machine.plug(self)

    # --- Faults ---

    def block(self, source: Machine, target: Machine) -> None:
        """Let nothing pass from one machine to another; the other way stays open."""
        self.drop([self._between(source, target)])

    def partition(self, *groups: Sequence[Machine]) -> None:
        """Let nothing pass between machines of different groups; one that is in none talks to all."""
        for here, there in itertools.permutations(groups, 2):
            self.drop([self._between(*pair) for pair in itertools.product(here, there)])

    def block_multicast(self) -> None:
        self.drop(MULTICAST)

    def block_broadcast(self) -> None:
        """ARP passes: without it there is no LAN."""
        self.drop(BROADCAST)

    def heal(self) -> None:
        """Undo what was blocked, at the switch and on every machine; cables stay as they are."""
        self._drops.clear()
        self.drop([])
        for machine in self.machines:
            machine.unblock()

    def drop(self, matches: Iterable[str]) -> None:
        """Let nothing pass the switch that these expressions of nftables match, until `heal`."""
        self._drops += [f"{match} drop" for match in matches]
        self.switch.filter("bridge", "forward", self._drops)

    def _between(self, source: Machine, target: Machine) -> str:
        return f'iifname "{source.port_in(self)}" oifname "{target.port_in(self)}"'

    # --- What must not be ---

    @property
    def strays(self) -> Counter[str]:
        """Where packets were sent that is out of the LAN, and how many, as each machine and the switch saw them."""
        found = self.switch.strays("bridge")
        for machine in self.machines:
            found += machine.namespace.strays("inet")
        return found

    @property
    def strayed(self) -> int:
        return self.strays.total()


def start_workers(*machines: Machine, flags: Sequence[str] = ()) -> list[harness.Process]:
    """A worker on each: their models load side by side."""
    started = [machine.start_worker(*flags, ready=False) for machine in machines]
    for process in started:
        process.wait_ready()
    return started


def settle(look: Callable[[], T], wanted: T, within_s: float) -> None:
    """Wait until what is seen is what is wanted."""
    deadline = time.monotonic() + within_s
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"{seen} is not {wanted}, after {within_s} s"
        time.sleep(POLL_S)
