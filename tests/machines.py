"""Bare machines: with Python, and nothing else that a developer has.

An `Account` is a user of this machine of whom nothing is known: without a package, a compiler, or a network but the
loopback. A `Computer` is a machine of a LAN with a small Debian of its own, which debootstrap makes once, from where
apt takes its packages; it is kept for later runs in the folder that QMESH_TEST_ROOTFS names, or one in the temporary
directory. Programs run on both as users without rights. What is mounted for them is seen by them alone, and so is gone
with their last process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import lan
import pytest
from lan import Lan, Machine, NoLan

CACHE_VARIABLE = "QMESH_TEST_ROOTFS"
CACHE_NAME = "qmesh-test-rootfs"
ROOT_TIMEOUT_S = 900  # 90 s were measured, on two busy cores with a near mirror
RELEASE = "bookworm"  # its Python is 3.11, the oldest that is supported
PACKAGES = ("python3", "curl")  # what a machine of a lab has
NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")

USERS = {"user": 1000, "other": 1001}  # of a computer, besides root
STRANGER = 60001  # an account's; no list of users has it
TOOLS = "/usr/local/bin:/usr/bin:/bin"  # what a login sets PATH to

# Mounts what a machine has, says so, and keeps it until standard input ends.
HOLD = "set -e\n{script}\necho ready\nexec cat\n"


@functools.cache
def no_accounts() -> str | None:
    """Why no accounts can be made here, or None."""
    reason = lan.unavailable()
    absent = [tool for tool in ("nsenter", "unshare", "chroot", "env") if shutil.which(tool) is None]
    return reason or (f"there is no {absent[0]} here" if absent else None)


@functools.cache
def no_computers() -> str | None:
    """Why no computers can be made here, or None."""
    reason = no_accounts()
    if reason is None:
        try:
            root_file_system()
        except NoLan as error:
            return f"no bare file system can be made here: {error}"
    return reason


def require(reason: str | None) -> None:
    """Skip the test for this reason; fail it where bare machines have to be tested (QMESH_TEST_BARE=required)."""
    if reason is not None:
        if os.environ.get("QMESH_TEST_BARE") == "required":
            pytest.fail(reason)
        pytest.skip(reason)


def _path(name: str) -> str:
    """Where a tool is: a user with another PATH would not find it."""
    found = shutil.which(name)
    if found is None:
        raise NoLan(f"there is no {name} here")
    return found


# --- A bare Debian ---


@functools.cache
def root_file_system() -> Path:
    """The folder of a bare Debian with Python, made on the first call of all. Nothing may be written in it."""
    import fcntl  # not on Windows, where conftest.py imports this module too

    cache = Path(os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir(), CACHE_NAME))
    cache.mkdir(parents=True, exist_ok=True)
    if cache.stat().st_uid != os.geteuid():
        raise NoLan(f"{cache} belongs to somebody else: name another folder by {CACHE_VARIABLE}")
    made = cache / f"{RELEASE}-{platform.machine()}-{'-'.join(PACKAGES)}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests' processes wait for the first
        if not made.is_dir():
            unfinished = made.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            _debootstrap(unfinished)
            unfinished.rename(made)
    return made


def _debootstrap(target: Path) -> None:
    sites = lan.tool(_path("apt-get"), "indextargets", "--format", "$(CODENAME) $(SITE)").splitlines()
    mirror = next((site for codename, site in map(str.split, sites) if codename == RELEASE), None)
    if mirror is None:
        raise NoLan(f"apt has no packages of {RELEASE} here")
    command = (
        _path("debootstrap"),
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        RELEASE,
        str(target),
        mirror,
    )
    lan.tool(*command, timeout_s=ROOT_TIMEOUT_S)
    for folder in NOT_NEEDED:
        shutil.rmtree(target / folder)
    for name, uid in USERS.items():
        lan.tool(_path("chroot"), str(target), "useradd", "--create-home", "--uid", str(uid), name)


# --- Machines ---


class View:
    """What the processes of a machine see: its network, its name, and what a script of the shell mounts."""

    def __init__(self, machine: Machine, script: str, made: contextlib.ExitStack) -> None:
        network = f"--net=/run/netns/{machine.namespace.name}"
        script = f"hostname {machine.name}\n{script}"
        command = [
            _path("nsenter"),
            network,
            _path("unshare"),
            "--mount",
            "--uts",
            "sh",
            "-c",
            HOLD.format(script=script),
        ]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._holder = subprocess.Popen(command, **pipes)
        made.callback(self._holder.communicate, timeout=lan.TOOL_TIMEOUT_S)
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if not self._holder.stdout.readline():
            raise NoLan(self._holder.stderr.read().decode().strip())
        self.prefix = (_path("nsenter"), "--target", str(self._holder.pid), "--mount", "--uts", network)

    def run(self, script: str) -> str:
        """What a script of the shell prints that root runs in it."""
        return lan.tool(*self.prefix, "sh", "-ec", script)

    def path(self, seen: Path) -> Path:
        """Where the tests find what is seen at a path in it."""
        return Path(f"/proc/{self._holder.pid}/root", *seen.parts[1:])


class Bare(Machine):
    """A machine that one file is copied to, `program`; its `user` has a home that is empty but for it."""

    interpreter = "python3"
    worker_flags: tuple[str, ...] = ("--threads", "1", "--ctx", "1024")
    tools = TOOLS
    user = "user"
    root = Path("/")  # as the view has it

    def __init__(self, network: Lan, name: str, made: contextlib.ExitStack, *, ipv4: bool, ipv6: bool) -> None:
        made.callback(shutil.rmtree, network.directory / name, ignore_errors=True)  # some 300 MB
        super().__init__(network, name, made, ipv4=ipv4, ipv6=ipv6)
        self.view = View(self, self._mounts(), made)

    def _mounts(self) -> str:
        """The script that mounts what this machine has."""
        raise NotImplementedError

    @property
    def login(self) -> tuple[str, ...]:
        """What a command of the user begins with."""
        raise NotImplementedError

    @property
    def uid(self) -> int:
        return USERS.get(self.user, 0)

    @property
    def home(self) -> Path:
        """As the user sees it."""
        return Path("/home", self.user) if self.user in USERS else Path("/root")

    @property
    def env(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": self.tools, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}

    @property
    def client_env(self) -> dict[str, str]:
        return self.env

    def _command(self, *arguments: str) -> list[str]:
        return [*self.login, self.interpreter, str(self.program), *arguments]

    def start_worker(self, *flags: str, ready: bool = True, env: dict[str, str] | None = None) -> harness.Process:
        """With the model that its program carries."""
        command = self._command("worker", "--json", *self.worker_flags, *flags)
        process = self._start(command, f"worker-{len(self.processes)}.log", env or {})
        if ready:
            assert process.wait_ready().get("event") == "ready", process.stderr
        return process

    def here(self, seen: Path | str) -> Path:
        """Where the tests find what its user sees at a path; a relative one begins at the home."""
        return self.view.path(self.root.joinpath(*(self.home / seen).parts[1:]))

    def copy(self, file: Path, name: str | None = None) -> Path:
        """Copy a file into the home, as its user's own; returns where the user sees it."""
        seen = self.home / (name or file.name)
        target = self.here(seen)
        shutil.copyfile(file, target)
        target.chmod(file.stat().st_mode & 0o777)
        os.chown(target, self.uid, self.uid)
        return seen


def _opened(python: Path) -> str:
    """Puts what was mounted at /mnt/python where it is at home, if strangers may not go there, as to root's."""
    closed = [folder for folder in python.parents if not folder.stat().st_mode & stat.S_IXOTH]
    if not closed:
        return ""
    return f"""
        mount -t tmpfs -o mode=755 machine {closed[-1]}
        mkdir -p {python}
        mount --bind /mnt/python {python}
    """


class Account(Bare):
    """A user of this machine, with the tests' Python but none of its packages. Unplugged, it has the loopback alone."""

    uid = STRANGER
    home = Path("/mnt/home")  # /mnt is there on every Linux, and what is in it is nobody's business
    interpreter = "/mnt/venv/bin/python"
    tools = "/mnt/empty"

    def _mounts(self) -> str:
        home, python = self.directory / "home", sys.base_prefix
        home.mkdir()
        os.chown(home, self.uid, self.uid)
        return f"""
            mount -t tmpfs -o mode=755 machine /mnt
            mkdir /mnt/home /mnt/python /mnt/empty
            mount --bind {home} /mnt/home
            mount --bind {python} /mnt/python
            {_opened(Path(python))}
            {python}/bin/python3 -I -m venv --without-pip /mnt/venv
        """

    @property
    def login(self) -> tuple[str, ...]:
        user = ("--setuid", str(self.uid), "--setgid", str(self.uid))
        return (*self.view.prefix, *user, _path("env"), "-C", "/mnt/empty")


class Computer(Bare):
    """A computer with a Debian of its own, as small as they come, and its Python."""

    def _mounts(self) -> str:
        self.root = self.directory / "root"
        for folder in (self.root, self.directory / "written", self.directory / "work"):
            folder.mkdir(mode=0o755)
        layers = f"lowerdir={root_file_system()},upperdir={self.directory}/written,workdir={self.directory}/work"
        return f"""
            mount -t overlay -o {layers} machine {self.root}
            mount -t proc machine {self.root}/proc
            mount -t sysfs -o ro machine {self.root}/sys
            mount -t tmpfs machine {self.root}/dev/shm
            echo {self.name} > {self.root}/etc/hostname
        """

    @property
    def login(self) -> tuple[str, ...]:
        user = (f"--userspec={self.uid}:{self.uid}", "--groups=")
        return (*self.view.prefix, _path("chroot"), *user, str(self.root), "/usr/bin/env", "-C", "/")
