"""The engines that ours is measured against, each set up once under a cache folder and started as its own process.

- llama.cpp's own server: the prebuilt one of the package `xllamacpp`, and one built from the source inside
  llama-cpp-python's package, that is, from the code and with the flags that our own engine runs on.
- `llama_cpp.server`, the HTTP server of llama-cpp-python.
- `node-llama-cpp`, from npm, driven by node_peer.mjs through its own interface, without HTTP.

And what our discovery is measured against: `hyperswarm`, from npm, driven by hyperswarm_peer.mjs; and our archives:
`shiv` and `pex`, which pack a program with the packages that it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import goals
import psutil
import report

import qmesh

CACHE = Path(os.environ.get("QMESH_BENCH_DIR") or Path.home() / ".cache" / "qmesh-bench")
NODE_PEER = Path(__file__).with_name("node_peer.mjs")
HYPERSWARM_PEER = Path(__file__).with_name("hyperswarm_peer.mjs")
START_TIMEOUT_S = 120
LOAD_TIMEOUT_S = 300
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
ARCHIVE_BUILDERS = ("shiv==1.0.8", "pex==2.105.2")

PREBUILT_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.n_parallel, params.n_ctx, threads = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


@dataclass(frozen=True)
class Setup:
    """What every side runs with."""

    model: Path
    slots: int
    context: int  # tokens per slot
    threads: int
    gpu: bool = False  # all layers on it, or none


@dataclass
class Stream:
    """One answer as its reader saw it: when it was asked for, and when each token came, in seconds."""

    started: float
    times: list[float] = field(default_factory=list)

    @property
    def first_token_ms(self) -> float:
        return 1000 * (self.times[0] - self.started)

    @property
    def longest_gap_ms(self) -> float:
        return 1000 * max((later - earlier for earlier, later in itertools.pairwise(self.times)), default=0.0)


class Peer:
    """A process that answers prompts; `load` runs several at once."""

    name: str

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, *, pipes: bool = False) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        with (CACHE / f"{self.name.replace('/', '-')}.log").open("wb") as log:
            self.popen = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, env={**os.environ, **(env or {})}
            )

    async def ready(self) -> None:
        raise NotImplementedError

    async def load(self, prompts: Sequence[str], tokens: int) -> list[Stream]:
        raise NotImplementedError

    @property
    def memory_mb(self) -> float:
        return float(psutil.Process(self.popen.pid).memory_info().rss / 1e6)

    async def close(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(20)


class HttpPeer(Peer):
    """A server that streams completions as server-sent events, one token an event."""

    path: str
    port: int

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        raise NotImplementedError

    async def ready(self) -> None:
        for _ in range(10 * START_TIMEOUT_S):
            assert self.popen.poll() is None, f"{self.name} did not start; see {CACHE}"
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._ask_for_models)
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{self.name} did not start within {START_TIMEOUT_S} s; see {CACHE}")

    def _ask_for_models(self) -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5).close()

    async def load(self, prompts: Sequence[str], tokens: int) -> list[Stream]:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            return await asyncio.gather(*(self._stream(prompt, tokens) for prompt in prompts))

    async def _stream(self, prompt: str, tokens: int) -> Stream:
        """Reads the events as lines off the socket: an HTTP library would take its share of the two cores."""
        payload = json.dumps(self.body(prompt, tokens)).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        stream = Stream(time.perf_counter())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        status = await reader.readline()
        assert b" 200 " in status, (self.name, status, await reader.read(2000))
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                if self.carries_token(json.loads(line[6:])):
                    stream.times.append(time.perf_counter())
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        return stream

    @staticmethod
    def carries_token(event: dict[str, Any]) -> bool:
        raise NotImplementedError


class LlamaServer(HttpPeer):
    path = "/completion"

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "n_predict": tokens, "temperature": 0, "stream": True, "cache_prompt": True}

    @staticmethod
    def carries_token(event: dict[str, Any]) -> bool:
        return not event.get("stop")


class BuiltLlamaServer(LlamaServer):
    name = goals.BUILT

    def __init__(self, setup: Setup) -> None:
        self.port = free_port()
        sizes = ["-np", str(setup.slots), "-c", str(setup.slots * setup.context)]
        threads = ["-t", str(setup.threads), "-tb", str(setup.threads)]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "-ngl", "999" if setup.gpu else "0"]
        super().__init__([str(server_binary(gpu=setup.gpu)), "-m", str(setup.model), *sizes, *threads, *where])


class PrebuiltLlamaServer(LlamaServer):
    name = goals.PREBUILT

    def __init__(self, setup: Setup) -> None:
        self.port = free_port()
        sizes = [str(setup.slots), str(setup.slots * setup.context), str(setup.threads)]
        super().__init__([str(peer_python()), "-c", PREBUILT_SERVER, str(setup.model), str(self.port), *sizes])


class PythonServer(HttpPeer):
    name = goals.PYTHON_SERVER
    path = "/v1/completions"

    def __init__(self, setup: Setup) -> None:
        self.port = free_port()
        flags = {"model": setup.model, "host": "127.0.0.1", "port": self.port, "n_ctx": setup.context}
        flags |= {"n_threads": setup.threads, "n_threads_batch": setup.threads, "interrupt_requests": "False"}
        command = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        super().__init__([str(peer_python()), "-m", "llama_cpp.server", *command])

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "repeat_penalty": 1, "stream": True}

    @staticmethod
    def carries_token(event: dict[str, Any]) -> bool:
        return bool(event["choices"][0]["text"])


class NodeProcess(Peer):
    """A script of ours for node, which answers a line of JSON with a line of JSON; the first line says it is ready."""

    def __init__(self, script: Path, *arguments: str, package: str) -> None:
        node_package(package)
        shutil.copy(script, CACHE / script.name)  # node looks for packages beside the script
        super().__init__(["node", str(CACHE / script.name), *arguments], pipes=True)

    async def ready(self) -> None:
        await self._read_line()

    async def ask(self, question: Any) -> Any:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(question).encode() + b"\n")
        self.popen.stdin.flush()
        return await self._read_line()

    async def _read_line(self) -> Any:
        assert self.popen.stdout is not None
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            line = await asyncio.to_thread(self.popen.stdout.readline)
        assert line, f"{self.name} ended; see {CACHE}"
        return json.loads(line)


class NodePeer(NodeProcess):
    name = goals.NODE

    def __init__(self, setup: Setup) -> None:
        sizes = [str(setup.slots), str(setup.context), str(setup.threads)]
        super().__init__(NODE_PEER, str(setup.model), *sizes, package="node-llama-cpp")

    async def load(self, prompts: Sequence[str], tokens: int) -> list[Stream]:
        answers = await self.ask({"prompts": prompts, "tokens": tokens})
        return [Stream(0.0, [ms / 1000 for ms in times]) for times in answers]


class Hyperswarm(NodeProcess):
    """Discovery for peers in JavaScript, driven by hyperswarm_peer.mjs, which says what can be asked."""

    name = "Hyperswarm"

    def __init__(self) -> None:
        super().__init__(HYPERSWARM_PEER, package="hyperswarm")


class QmeshWorker(Peer):
    """Our own worker process, asked through the mesh as any client asks it. packages: go before those installed."""

    name = "QMesh worker"

    def __init__(self, setup: Setup, directory: Path, packages: Path | None = None) -> None:
        program = [str(gpu_python() if setup.gpu else sys.executable), qmesh.__file__]
        sizes = ["--slots", str(setup.slots), "--ctx", str(setup.context), "--threads", str(setup.threads)]
        sizes += ["--gpu-layers", "-1" if setup.gpu else "0"]
        command = [*program, "worker", "--model", str(setup.model), *sizes, "--nice", "0", "--json"]
        topic = f"bench-{os.urandom(8).hex()}"
        self._settings = qmesh.Settings(host="127.0.0.1", topic=topic, state_dir=str(directory))
        own = {"QMESH_HOST": "127.0.0.1", "QMESH_TOPIC": topic, "QMESH_STATE_DIR": str(directory)}
        own |= {"PYTHONPATH": str(packages)} if packages is not None else {}
        super().__init__([*command, "--port", "0"], own, pipes=True)
        self._client = qmesh.Client(self._settings)

    async def ready(self) -> None:
        assert self.popen.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            assert await asyncio.to_thread(self.popen.stdout.readline), f"the worker did not start; see {CACHE}"
        await self._client.__aenter__()

    async def load(self, prompts: Sequence[str], tokens: int) -> list[Stream]:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            return await asyncio.gather(*(self._stream(prompt, tokens) for prompt in prompts))

    async def _stream(self, prompt: str, tokens: int) -> Stream:
        sampling = qmesh.Sampling(max_tokens=tokens, temperature=0)
        stream = Stream(time.perf_counter())
        async with contextlib.aclosing(
            self._client.run(qmesh.Job(os.urandom(8).hex(), prompt=prompt, params=sampling))
        ) as run:
            async for event in run:
                if isinstance(event, qmesh.Token):
                    stream.times += [time.perf_counter()] * len(event.tokens)
        return stream

    async def close(self) -> None:
        try:
            await self._client.__aexit__(None, None, None)
        finally:
            await super().close()


@contextlib.asynccontextmanager
async def running(
    setup: Setup, *others: Callable[[Setup], Peer], left_out: dict[str, str] | None = None
) -> AsyncIterator[list[Peer]]:
    """Our own worker and the others, set up and started one after another; ended at the end.

    left_out: takes the names of those that cannot be set up, and why; without it report.CannotMeasure is raised.
    """
    sides: list[Peer] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            ours: Callable[[Setup], Peer] = functools.partial(QmeshWorker, directory=Path(directory))
            for make in (ours, *others):
                try:
                    sides.append(make(setup))
                except report.CannotMeasure as reason:
                    if left_out is None:
                        raise
                    left_out[getattr(make, "name", "")] = str(reason)
                    continue
                await sides[-1].ready()
            yield sides
        finally:
            for side in sides:
                await side.close()


# --- Setting up ---


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot tell which one they took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peer_python() -> Path:
    """An interpreter with the Python peers."""
    python = CACHE / "venv" / "bin" / "python"
    if not (CACHE / "venv" / "done").exists():
        _run(sys.executable, "-m", "venv", str(CACHE / "venv"))
        _run(str(python), "-m", "pip", "install", "-q", "xllamacpp", LLAMA_SOURCE.replace("python=", "python[server]="))
        (CACHE / "venv" / "done").touch()
    return python


def builders_python() -> Path:
    """An interpreter with the builders of archives."""
    python = CACHE / "venv-builders" / "bin" / "python"
    if not (CACHE / "venv-builders" / "done").exists():
        _run(sys.executable, "-m", "venv", str(CACHE / "venv-builders"))
        _run(str(python), "-m", "pip", "install", "-q", *ARCHIVE_BUILDERS)
        (CACHE / "venv-builders" / "done").touch()
    return python


def gpu_python() -> Path:
    """An interpreter with our own packages, llama.cpp built for CUDA."""
    python = CACHE / "venv-cuda" / "bin" / "python"
    if not (CACHE / "venv-cuda" / "done").exists():
        _run(sys.executable, "-m", "venv", str(CACHE / "venv-cuda"))
        no_wheel = ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
        _run(str(python), "-m", "pip", "install", "-q", *no_wheel, LLAMA_SOURCE, "psutil", CMAKE_ARGS="-DGGML_CUDA=on")
        (CACHE / "venv-cuda" / "done").touch()
    return python


def node_package(name: str) -> None:
    """A package from npm, with what it needs, beside the script that drives it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise report.CannotMeasure(f"{name} needs node and npm, which are not here")
    if not (CACHE / "node_modules" / name).exists():
        _run("npm", "install", "--prefix", str(CACHE), "--silent", name)


def server_binary(*, gpu: bool = False) -> Path:
    """llama.cpp's server, built from the source that llama-cpp-python's package brings, with the same flags."""
    folder = CACHE / ("server-cuda" if gpu else "server")
    binary = folder / "bin" / "llama-server"
    if not binary.exists():
        download = ["download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(CACHE), LLAMA_SOURCE]
        _run(sys.executable, "-m", "pip", *download)
        archive = next(CACHE.glob("llama_cpp_python-*.tar.gz"))
        _run("tar", "-xzf", str(archive), "-C", str(CACHE))
        source = archive.with_suffix("").with_suffix("") / "vendor" / "llama.cpp"
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
        options += [
            "-DLLAMA_BUILD_UI=OFF",
            "-DLLAMA_USE_PREBUILT_UI=OFF",
            "-DLLAMA_OPENSSL=OFF",
            "-DBUILD_SHARED_LIBS=OFF",
        ]
        options += ["-DGGML_CUDA=ON"] if gpu else []
        _run("cmake", "-S", str(source), "-B", str(folder), *options)
        _run("cmake", "--build", str(folder), "--target", "llama-server", "--parallel")
    return binary


def _run(*command: str, **env: str) -> None:
    """Raises report.CannotMeasure where it fails, or is not here."""
    print("  $", *(f"{name}={value}" for name, value in env.items()), *command, flush=True)
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **env})
    except (OSError, subprocess.CalledProcessError) as error:
        raise report.CannotMeasure(f"a peer cannot be set up: {error}") from error
