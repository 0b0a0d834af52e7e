"""An engine that runs on other machines than its builder's: what is gathered, what it needs, and what it chooses there.

The tests of a built engine take that of the archives that conftest.py finds or builds. Other processors are those of
Debian's package qemu-user.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import machines
import pytest
import tiny_models
from archives import Archives

import build_zipapp
import qmesh

QEMU = "qemu-x86_64"
SLOW_S = 100  # an emulator on a busy machine
# Checks and loads the engine of a folder, and tells what a tiny model says with it.
RUN_ENGINE = """
import json, sys
from pathlib import Path
about, model, *folders = sys.argv[1:]
sys.path[:0] = folders
import qmesh
try:
    qmesh.check_engine_fits(json.loads(about))
    qmesh.load_llama()
except qmesh.MissingPackage as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
import desk
asked = desk.Desk(desk.WatchedModel(desk.plan_for(Path(model))))
asked.ask(desk.raw("Hello there", max_tokens=16))
maps = Path("/proc/self/maps").read_text().splitlines()
libraries = sorted({line.split(maxsplit=5)[5] for line in maps if "libggml" in line or "libgomp" in line})
print(json.dumps({"processor": qmesh.llama_log().processor, "ids": asked.ids(0), "libraries": libraries}))
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files there")


# --- Gathering ---


def test_what_running_does_not_need_goes_and_licences_stay(tmp_path: Path) -> None:
    kept = ["numpy/core.py", "numpy-2.dist-info/licenses/LICENSE.txt", "numpy-2.dist-info/METADATA", "a/testing/b.py"]
    gone = ["lib/libllama.so", "bin/f2py", "numpy/tests/test_a.py", "numpy/ma/tests/data/a.txt", "numpy/a.pyi"]
    gone += ["numpy/__pycache__/core.pyc", "numpy-2.dist-info/RECORD", "numpy-2.dist-info/direct_url.json"]
    gone += ["llama_cpp/lib/cmake/ggml/ggml-config.cmake", "llama_cpp/server/app.py", "numpy/_core/lib/libnpymath.a"]
    for name in kept + gone:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    build_zipapp.prune(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.fixture
def built_libraries(tmp_path: Path) -> Path:
    """A copy of those that the installed llama-cpp-python has."""
    package = importlib.metadata.distribution("llama-cpp-python").locate_file("llama_cpp/lib")
    return Path(shutil.copytree(str(package), tmp_path / "lib"))


@on_linux
def test_a_library_under_several_names_is_one_file_and_under_no_name_that_nobody_uses(built_libraries: Path) -> None:
    build_zipapp.tidy_libraries(built_libraries)
    names = {path.name for path in built_libraries.iterdir()}
    assert {"libllama.so", "libggml.so", "libggml.so.0", "libggml-base.so.0"} <= names
    assert not names & {"libllama.so.0", "libggml-base.so", "libmtmd.so", "libmtmd.so.0"}
    assert (built_libraries / "libggml.so").samefile(built_libraries / "libggml.so.0")
    contents = {path.stat().st_ino: path.read_bytes() for path in built_libraries.iterdir()}
    assert len(set(contents.values())) == len(contents)
    build_zipapp.tidy_libraries(built_libraries)  # has nothing left to do
    assert {path.name for path in built_libraries.iterdir()} == names


@on_linux
def test_a_backend_that_nothing_names_stays(built_libraries: Path) -> None:
    backend = built_libraries / "libggml-cpu-haswell.so"
    backend.write_bytes((built_libraries / "libggml-cpu.so.0").read_bytes() + b"another")
    build_zipapp.tidy_libraries(built_libraries)
    assert backend.exists()


@on_linux
def test_openmp_and_its_licence_are_put_beside_what_needs_them(built_libraries: Path) -> None:
    build_zipapp.add_openmp(built_libraries)
    assert (built_libraries / "libgomp.so.1").read_bytes()[:4] == b"\x7fELF"
    assert not any(map(Path.exists, build_zipapp.OPENMP_LICENCES)) or list(built_libraries.glob("libgomp.so.1.*"))


@on_linux
def test_what_libraries_need_is_read_from_them(built_libraries: Path) -> None:
    linked = build_zipapp.read_linked(built_libraries / "libllama.so")
    assert {"libggml.so.0", "libc.so.6"} <= linked.needed
    assert "libllama.so.0" not in linked.needed  # its own name
    assert qmesh.version_numbers(linked.glibc) <= qmesh.version_numbers(qmesh.glibc_version() or "")
    assert build_zipapp.newest(["2.4", "2.34", "2.2.5"]) == "2.34"
    with pytest.raises(build_zipapp.BuildError, match="cannot be read"):
        build_zipapp.read_linked(built_libraries / "none.so")


@pytest.mark.parametrize(
    ("baseline", "features"),
    [
        (["X86_V2"], sorted(qmesh.X86_FEATURES)),
        (["SSE", "SSE2", "SSE3"], ["pni"]),
        (["SSE3", "SSSE3", "SSE41", "POPCNT", "SSE42"], ["pni", "popcnt", "sse4_1", "sse4_2", "ssse3"]),
    ],
)
def test_what_numpy_was_compiled_to_need_is_needed(
    monkeypatch: pytest.MonkeyPatch, baseline: list[str], features: list[str]
) -> None:
    monkeypatch.setattr(qmesh, "system_tag", lambda: "linux-x86_64")
    assert build_zipapp.needed_features(baseline) == features


def test_a_numpy_for_newer_processors_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "system_tag", lambda: "linux-x86_64")
    with pytest.raises(build_zipapp.BuildError, match="needs processors with X86_V3"):
        build_zipapp.needed_features(["X86_V3"])


def test_processors_of_another_kind_have_what_numpy_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "system_tag", lambda: "linux-aarch64")
    assert build_zipapp.needed_features(["NEON", "ASIMD"]) == []


def test_what_pip_cannot_do_is_told_with_its_reason_and_its_words(tmp_path: Path) -> None:
    with pytest.raises(build_zipapp.BuildError, match="No matching distribution found for qmesh-nothing") as caught:
        build_zipapp.run_pip(tmp_path, "download", "--no-index", "-d", tmp_path, "qmesh-nothing")
    assert str(caught.value).endswith(str(tmp_path / "pip.log"))
    assert "--no-index" in (tmp_path / "pip.log").read_text()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What pip was asked for; it downloads a source without content, and compiles that at once."""
    asked: list[tuple[Any, ...]] = []

    def run_pip(work: Path, *arguments: Any, env: object = None) -> None:
        asked.append(arguments)
        if arguments[0] == "download":
            place = arguments[arguments.index("-d") + 1]
            (place / "llama_cpp_python-0.3.36").mkdir(parents=True)
            with tarfile.open(place / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as archive:
                archive.add(place / "llama_cpp_python-0.3.36", "llama_cpp_python-0.3.36")
        else:
            made = arguments[arguments.index("-w") + 1]
            made.mkdir()
            (made / "llama_cpp_python-0.3.36-py3-none-any.whl").touch()

    monkeypatch.setattr(build_zipapp, "run_pip", run_pip)
    return asked


def test_what_was_compiled_is_used_again_until_it_is_to_be_another(
    tmp_path: Path, pip: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_zipapp.portable_wheel(tmp_path, qmesh.LLAMA_REQUIREMENT)
    assert wheel.is_file()
    assert [arguments[0] for arguments in pip] == ["download", "wheel"]
    assert any("GGML_NATIVE=OFF" in str(argument) for argument in pip[1])
    assert "--no-cache-dir" in pip[1]
    assert build_zipapp.portable_wheel(tmp_path, qmesh.LLAMA_REQUIREMENT) == wheel
    assert len(pip) == 2
    build_zipapp.portable_wheel(tmp_path, "llama-cpp-python==0.3.36")
    assert len(pip) == 4
    monkeypatch.setattr(build_zipapp, "llama_options", dict)
    build_zipapp.portable_wheel(tmp_path, qmesh.LLAMA_REQUIREMENT)
    assert len(pip) == 6


@pytest.mark.parametrize(
    ("tag", "system", "chooses"),
    [("linux-x86_64", "linux", True), ("macos-arm64", "darwin", False), ("linux-riscv64", "linux", False)],
)
def test_llama_cpp_chooses_its_code_when_it_runs_where_it_can(
    monkeypatch: pytest.MonkeyPatch, tag: str, system: str, chooses: bool
) -> None:
    monkeypatch.setattr(qmesh, "system_tag", lambda: tag)
    monkeypatch.setattr(sys, "platform", system)
    options = build_zipapp.llama_options()
    assert options["GGML_NATIVE"] == "OFF"
    assert ("GGML_CPU_ALL_VARIANTS" in options) is chooses
    assert ("CMAKE_INSTALL_RPATH" in options) is (system == "linux")


# --- A gathered engine, here and on other processors ---


@pytest.fixture(scope="module")
def engine(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The engine of an archive, unpacked."""
    contents = qmesh.read_contents(archives.engine)
    assert contents is not None
    unpacked = qmesh.Cache(tmp_path_factory.mktemp("cache")).unpack(archives.engine, contents.parts[qmesh.ENGINE])
    with unpacked.lock:
        yield unpacked.path


@pytest.fixture(scope="module")
def about(engine: Path) -> dict[str, Any]:
    return build_zipapp.describe_engine(engine)


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run_engine(engine: Path, about: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the engine in a process of its own; `processor` is one that the emulator knows."""
    folder = tmp_path_factory.mktemp("portable")
    model = tiny_models.write_model("qwen2", folder / "qwen2.gguf")
    python = Path(sys.executable).resolve()  # without the virtual environment's packages

    def run(processor: str | None = None, *, cwd: Path = folder, tree: Path = engine) -> dict[str, Any]:
        emulated = [] if processor is None else [QEMU, "-cpu", processor]
        options = ["-I", "-S", "-X", f"pycache_prefix={folder / 'bytecode'}"]
        folders = [tree, harness.ROOT, harness.ROOT / "tests"]
        command = [*emulated, python, *options, "-c", RUN_ENGINE, json.dumps(about), model, *folders]
        finished = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=SLOW_S, check=False
        )
        assert finished.returncode == 0, finished.stderr
        answer: dict[str, Any] = json.loads(finished.stdout)
        return answer

    return run


@pytest.fixture(scope="module")
def here(run_engine: Run) -> dict[str, Any]:
    """What the engine does on this processor."""
    return run_engine()


@pytest.fixture
def emulator() -> None:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("processors are emulated on Linux, for programs of its own kind")
    if shutil.which(QEMU) is None:
        machines.require(f"{QEMU} is not installed; it comes with Debian's qemu-user")


def test_a_gathered_engine_says_what_it_needs(about: dict[str, Any]) -> None:
    assert (about["platform"], about["python"]) == (qmesh.system_tag(), qmesh.python_tag())
    assert {"llama-cpp-python", "psutil", "numpy", "jinja2"} <= about["packages"].keys()
    assert list(about["packages"]) == sorted(about["packages"])
    qmesh.check_engine_fits(about)


def test_a_gathered_engine_uses_nothing_but_its_own_libraries(engine: Path, here: dict[str, Any]) -> None:
    assert here["ids"]
    assert here["libraries"]
    assert {Path(name).parent for name in here["libraries"]} == {engine / "llama_cpp" / "lib"}


def test_libraries_in_the_current_directory_are_not_loaded(
    engine: Path, here: dict[str, Any], run_engine: Run, tmp_path: Path
) -> None:
    for backend in (engine / "llama_cpp" / "lib").glob("libggml-cpu-*"):
        shutil.copyfile(backend, tmp_path / backend.name)
    assert run_engine(cwd=tmp_path) == here


def test_an_engine_with_nothing_to_compute_on_is_refused_with_the_command_that_mends_it(
    engine: Path, run_engine: Run, tmp_path: Path
) -> None:
    tree = tmp_path / "engine"
    shutil.copytree(engine, tree, copy_function=os.link, ignore=shutil.ignore_patterns("libggml-cpu-*", "numpy.libs"))
    (tree / "numpy.libs").symlink_to(engine / "numpy.libs")
    error = run_engine(tree=tree)["error"]
    assert f"llama-cpp-python finds nothing in {tree / 'llama_cpp' / 'lib'} that runs here; build it anew: " in error


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("processor", "kind"), [("Nehalem", "sse42"), ("Haswell", "haswell")])
def test_another_processor_gets_code_of_its_own_and_says_the_same(
    here: dict[str, Any], run_engine: Run, processor: str, kind: str
) -> None:
    # It rounds in another way, which changes an answer only where two tokens are on a par; here none are.
    there = run_engine(processor)
    assert there["processor"] == kind
    assert there["ids"] == here["ids"]


@pytest.mark.usefixtures("emulator")
def test_a_processor_that_is_too_old_is_told_so_before_it_would_end_the_process(run_engine: Run) -> None:
    error = run_engine("core2duo")["error"]
    assert "needs a processor with popcnt, sse4_1, sse4_2; this machine's (" in error
    assert "run workers on newer machines; this one can ask them" in error
