#!/usr/bin/env python3
"""Build the program into one file that Python runs as it is.

    python build_zipapp.py                         dist/qmesh.pyz: the program, for every platform
    python build_zipapp.py --engine                dist/qmesh-<os>-<arch>-<python>.pyz: and the engine, for this one
    python build_zipapp.py --engine --model FILE   dist/qmesh-<os>-<arch>-<python>-<model>.pyz: and a model

qmesh.py's section "Files and archive" tells how these lie in the file, and unpacks them where they are used. The same
sources give the same bytes: members are sorted and dated 1980-01-01, and the program is stored uncompressed (deflate
differs between versions of zlib).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this has what there is
    sys.exit("error: Python 3.11 or newer is needed")

try:
    import qmesh
except ModuleNotFoundError:
    sys.exit("error: qmesh.py, which is to be packed, does not lie beside build_zipapp.py")

ROOT: Final = Path(__file__).resolve().parent
WORK: Final = ROOT / "build"  # keeps what took long to make
# Python runs the zip at a file's end. Where that is missing, since a copy was cut short, it takes the file for a
# script, and all that it says then is "SyntaxError: encoding problem: " and what the second line holds.
HEAD: Final = b"#!/usr/bin/env python3\n# coding: this-file-is-damaged--copy-it-to-this-machine-again\n"
DEFLATE_LEVEL: Final = 9  # packed once, copied to every machine

# zipapp's own template drops the exit code of what it calls. Any Python can read this, older ones not what it imports;
# and Python itself does not look whether what it imports from a zip is what was packed. Ctrl-C may come at any time.
# What it says to --help is there at once, as it was made beforehand for a file of this name and a usual terminal.
MAIN: Final = """\
import os, sys

if sys.version_info < (3, 11):
    sys.exit("error: QMesh needs Python 3.11 or newer, and this is %s, %s" % (sys.version.split()[0], sys.executable))

def prepared():
    try:
        if os.path.basename(sys.argv[0]) != {name!r} or "COLUMNS" in os.environ or sys.argv[-1] not in {flags}:
            return None
        if sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns < {columns}:
            return None
        return __loader__.get_data("help/%s.txt" % " ".join(sys.argv[1:])).decode()
    except (AttributeError, OSError, ValueError):
        return None

try:
    said = prepared()
    if said is not None:
        try:
            sys.stdout.write(said)
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)

    import binascii

    for name, crc in {checksums}:
        if binascii.crc32(__loader__.get_data(name)) != crc:
            sys.exit("error: %s is damaged: copy it to this machine again" % sys.argv[0])

    import qmesh

    sys.exit(qmesh.main())
except KeyboardInterrupt:
    sys.exit(130)  # as the program itself ends then
"""

USUAL_NAME: Final = "qmesh.pyz"
ASKS_FOR_HELP: Final = ("-h", "--help", "--version")
HELP_COLUMNS: Final = 80  # of a usual terminal; in a wider one, lines of this length read well too

COMPILE: Final = """\
import py_compile, sys
from py_compile import PycInvalidationMode
source, target = sys.argv[1:]
mode = PycInvalidationMode.UNCHECKED_HASH
py_compile.compile(source, target, dfile="qmesh.py", doraise=True, optimize=0, invalidation_mode=mode)
"""


class BuildError(Exception):
    """What hinders the build, in a line for a person."""


# --- The engine: llama.cpp for every processor of this machine's kind, and what it needs to run ---

PIP_DEADLINE_S = 4 * 3600  # compiling for every processor takes an old laptop so long
LLAMA_LIBRARIES = Path("llama_cpp", "lib")
OPENED_BY_NAME = frozenset({"libllama.so", "libggml.so"})  # by llama_cpp, through ctypes
BACKENDS = "libggml-*.so"  # looked for by llama.cpp itself, of which it takes those that suit the machine
OPENMP = "libgomp.so.1"
OPENMP_LICENCES = (  # GPL 3 with the exception that lets programs of any kind carry it
    Path("/usr/share/doc/libgomp1/copyright"),
    Path("/usr/share/licenses/libgomp/COPYING.RUNTIME"),
)

# What running does not need, as patterns from the packages' folder; licences stay where they are.
UNNEEDED = (
    ("bin", "include", "lib", "lib64", "share"),  # scripts, headers, and second copies of libraries
    ("llama_cpp/lib/cmake", "llama_cpp/lib/pkgconfig"),
    ("**/*.a", "**/*.cmake", "**/*.h", "**/*.pc", "**/*.pxd", "**/*.pyi", "**/*.pyx", "**/py.typed"),  # for compilers
    ("**/__pycache__", "**/tests", "numpy/_core/include", "numpy/_core/lib", "numpy/distutils", "numpy/f2py"),
    ("llama_cpp/server",),  # imports what is not here
    ("*.dist-info/INSTALLER", "*.dist-info/RECORD", "*.dist-info/REQUESTED", "*.dist-info/direct_url.json"),
)

# numpy's names of what it was compiled to need, in those of qmesh.X86_FEATURES. The others are in every processor of
# the kind.
NUMPY_BASELINES = {
    "SSE": (),
    "SSE2": (),
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "SSE41": ("sse4_1",),
    "POPCNT": ("popcnt",),
    "SSE42": ("sse4_2",),
    "X86_V2": tuple(qmesh.X86_FEATURES),
}

# Imports what the program does, as it does, and tells what numpy was compiled to need.
TRY_ENGINE = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jinja2, numpy, psutil, qmesh
qmesh.load_llama()
print(json.dumps(numpy.show_config(mode="dicts")["SIMD Extensions"]["baseline"]))
"""


@dataclass(frozen=True)
class EngineTree:
    """The engine, unpacked.

    root: a folder that is to stand on sys.path. about: where it runs, as `qmesh.check_engine_fits` reads it: "platform"
    and "python"; "packages", their versions by name; "glibc", the lowest that will do, None where it is not used;
    "cpu", what the processor must have, by the names of `qmesh.X86_FEATURES`.
    """

    root: Path
    about: dict[str, Any]


def gather_engine(root: Path, work: Path, wheels: Path | None = None) -> EngineTree:
    """Put the engine for this kind of machine and this Python together, in a folder `root` that is not there yet.

    work: a folder that keeps what was compiled, and what pip said last. wheels: a folder with wheels that go before
    those of the package index, such as one of llama-cpp-python that was built elsewhere. Without one it is compiled,
    which takes a quarter of an hour, and kept for the next time. Raises BuildError, and OSError where files cannot be
    written.
    """
    given = wheels if wheels is not None else portable_wheel(work, qmesh.LLAMA_REQUIREMENT).parent
    sources = ("--only-binary=:all:", f"--find-links={given}")  # llama-cpp-python has no wheels but those given
    run_pip(work, "install", "--target", root, "--no-compile", *sources, *qmesh.ENGINE_PACKAGES.values())
    prune(root)
    if sys.platform == "linux":
        tidy_libraries(root / LLAMA_LIBRARIES)
        add_openmp(root / LLAMA_LIBRARIES)
    return EngineTree(root, describe_engine(root))


def llama_options() -> dict[str, str]:
    """CMake's, for a llama.cpp that runs on every processor of this machine's kind.

    Where llama.cpp can, it is built once for each generation of processors and chooses when it runs; elsewhere there is
    one build for all.
    """
    options = {"GGML_NATIVE": "OFF", "LLAVA_BUILD": "OFF", "LLAMA_BUILD_TOOLS": "OFF", "LLAMA_BUILD_SERVER": "OFF"}
    if qmesh.system_tag() in ("linux-x86_64", "linux-aarch64", "windows-x86_64"):
        options |= {"GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON"}
        options |= dict.fromkeys(("CMAKE_INSTALL_BINDIR", "CMAKE_INSTALL_LIBDIR"), LLAMA_LIBRARIES.as_posix())
    if sys.platform == "linux":  # libraries find each other wherever they lie, and tell nothing of where they were made
        options |= {"CMAKE_INSTALL_RPATH": "$ORIGIN", "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON"}
    return options


def portable_wheel(work: Path, requirement: str) -> Path:
    """A wheel of llama-cpp-python for every processor of this machine's kind: the one built before, or a new one.

    pip's own cache is not asked: what it keeps may be built for this very processor.
    """
    options = llama_options()
    asked = json.dumps([requirement, options, qmesh.system_tag()], sort_keys=True)
    shelf = work / "wheels" / hashlib.sha256(asked.encode()).hexdigest()[:16]
    if ready := sorted(shelf.glob("*.whl")):
        return ready[-1]
    shelf.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="compiling-") as scratch:
        wheel = compile_wheel(work, unpack_source(work, Path(scratch), requirement), options, Path(scratch) / "made")
        return wheel.replace(shelf / wheel.name)


def compile_wheel(work: Path, source: Path, options: Mapping[str, str], made: Path) -> Path:
    """A wheel of llama-cpp-python from its source, in the folder `made`."""
    arguments = ";".join(f"-D{name}={value}" for name, value in options.items())
    settings = ["-C", f"build-dir={source / '_build'}", "-C", f"cmake.args={arguments}"]
    env = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    if sys.platform != "win32":
        # Else the folder's name gets into the libraries.
        flag = shlex.quote(f"-ffile-prefix-map={source}=llama-cpp-python")
        env |= {name: f"{os.environ.get(name, '')} {flag}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    print("compiling llama.cpp for every kind of processor, once; this takes a quarter of an hour ...", file=sys.stderr)
    run_pip(work, "wheel", "--no-deps", "--no-cache-dir", "-w", made, source, *settings, env=env)
    [wheel] = made.glob("*.whl")
    return wheel


def unpack_source(work: Path, place: Path, requirement: str) -> Path:
    """llama-cpp-python's source, in a folder of its own under `place`."""
    run_pip(work, "download", "--no-deps", "--no-binary=:all:", "-d", place, requirement)
    [archive] = place.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        members.extractall(place, filter="data")
    return archive.with_suffix("").with_suffix("")


def run_pip(work: Path, *arguments: object, env: Mapping[str, str] | None = None) -> None:
    """Run pip to its end. What it says goes into a file. Raises BuildError with the end of that."""
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "pip.log"
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    with kept.open("w", encoding="utf-8") as file:
        print(*command, file=file, flush=True)
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                timeout=PIP_DEADLINE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise BuildError(f"pip {arguments[0]} did not end within {PIP_DEADLINE_S} s; see {kept}") from None
    if code:
        *_, last = kept.read_text("utf-8", errors="replace").strip().splitlines()
        raise BuildError(f"pip {arguments[0]} failed ({last}); what it said is in {kept}")


def prune(root: Path) -> None:
    """Take away what running does not need."""
    for pattern in (pattern for patterns in UNNEEDED for pattern in patterns):
        for path in sorted(root.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Linked:
    """What a library wants of the system that loads it: libraries by name, and the lowest version of glibc."""

    needed: frozenset[str]
    glibc: str


def read_linked(library: Path) -> Linked:
    """Read an ELF file with binutils, which whoever compiles has. Raises BuildError."""
    command = ["readelf", "--dynamic", "--version-info", "--wide", str(library)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=True)
    except FileNotFoundError:
        raise BuildError("readelf is not installed here; install binutils with the system's package manager") from None
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{library} cannot be read: {error.stderr.strip()}") from None
    versions = re.findall(r"Name: GLIBC_([0-9.]+)", told.stdout)
    needed = re.findall(r"\(NEEDED\) +Shared library: \[(.+)\]", told.stdout)
    return Linked(frozenset(needed), newest(versions))


def newest(versions: Iterable[str]) -> str:
    return max(versions, key=qmesh.version_numbers, default="0")


def tidy_libraries(folder: Path) -> None:
    """Keep of a folder's libraries those that are used, each under the names it is used by, as one file.

    Wheels cannot hold links, so that each library is in them under all its names. Two copies of one would be two
    libraries in one process: what is registered with one of them, the other does not know.
    """
    libraries = {path.name: path for path in sorted(folder.glob("*.so*"))}
    contents = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in libraries.items()}
    used = with_needed(OPENED_BY_NAME & libraries.keys(), libraries)
    known = {contents[name] for name in used}
    backends = [path.name for path in sorted(folder.glob(BACKENDS)) if contents[path.name] not in known]
    used |= with_needed(backends, libraries)
    first: dict[bytes, Path] = {}
    for name, path in libraries.items():
        if name not in used:
            path.unlink()
        elif (same := first.setdefault(contents[name], path)) != path:
            path.unlink()
            path.hardlink_to(same)


def with_needed(names: Iterable[str], libraries: Mapping[str, Path]) -> set[str]:
    """These libraries and those that they need, as far as they are among `libraries`."""
    found, to_read = set[str](), list(names)
    while to_read:
        name = to_read.pop()
        if name not in found:
            found.add(name)
            to_read += read_linked(libraries[name]).needed & libraries.keys()
    return found


def add_openmp(folder: Path) -> None:
    """Put GNU's OpenMP, which a bare system lacks, beside the libraries that need it: they look there first."""
    users = [path for path in sorted(folder.glob("*.so*")) if OPENMP in read_linked(path).needed]
    if not users or (folder / OPENMP).exists():
        return
    told = subprocess.run(["ldd", str(users[0])], capture_output=True, text=True, check=False).stdout
    found = re.search(rf"{re.escape(OPENMP)} => (/.+) \(", told)
    if found is None:
        raise BuildError(f"{OPENMP}, which {users[0].name} needs, is not installed here; it comes with gcc")
    shutil.copyfile(found[1], folder / OPENMP)
    for licence in [path for path in OPENMP_LICENCES if path.exists()][:1]:
        shutil.copyfile(licence, folder / f"{OPENMP}.{licence.name}")


def describe_engine(root: Path) -> dict[str, Any]:
    """An engine's `about` (see EngineTree). Loads it, and so raises BuildError for one that does not run here."""
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", TRY_ENGINE, str(root), str(ROOT)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if told.returncode:
        raise BuildError(f"the engine in {root} does not load: {told.stderr.strip().rpartition(chr(10))[2]}")
    found = importlib.metadata.distributions(path=[str(root)])
    return {
        "platform": qmesh.system_tag(),
        "python": qmesh.python_tag(),
        "packages": dict(sorted((package_name(it), it.version) for it in found)),
        "glibc": newest(read_linked(path).glibc for path in elf_files(root)) if sys.platform == "linux" else None,
        "cpu": needed_features(json.loads(told.stdout)),
    }


def package_name(package: importlib.metadata.Distribution) -> str:
    """As the package index writes it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()


def elf_files(root: Path) -> list[Path]:
    files = [path for path in sorted(root.rglob("*.so*")) if path.is_file()]
    return [path for path in files if path.read_bytes()[:4] == b"\x7fELF"]


def needed_features(baseline: Sequence[str]) -> list[str]:
    """What numpy was compiled to need, by the names of `qmesh.X86_FEATURES`; nothing on other kinds of processor.

    llama.cpp needs nothing: it has a build for the first processors of the kind.
    """
    if not qmesh.system_tag().endswith("x86_64"):
        return []
    if unknown := [name for name in baseline if name not in NUMPY_BASELINES]:
        raise BuildError(f"this numpy needs processors with {', '.join(unknown)}; give one for all with --wheels")
    return sorted({feature for name in baseline for feature in NUMPY_BASELINES[name]})


# --- Packing ---


@dataclass
class Packer:
    """Writes an archive, piece by piece: the parts first, the program last."""

    file: IO[bytes]
    parts: dict[str, qmesh.Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file.write(HEAD)

    def add(self, kind: str, name: str, source: IO[bytes], *, unpacked: int, about: Mapping[str, Any]) -> None:
        offset = self.file.tell()
        sha256 = qmesh.copy_bytes(source, self.file, sys.maxsize)
        size = self.file.tell() - offset
        self.parts[kind] = qmesh.Part(kind, name, offset, size, sha256, unpacked, about)

    def finish(self, program: bytes) -> None:
        contents = qmesh.Contents(qmesh.__version__, hashlib.sha256(program).hexdigest(), self.parts)
        code = {qmesh.PROGRAM_FILE: program, "qmesh.pyc": compiled(program)}
        members = {
            "__main__.py": main_program(code),
            qmesh.CONTENTS_FILE: qmesh.dump_json(contents.to_json()),
        }
        self.file.write(qmesh.program_zip(code | members | prepared_texts()))


def main_program(code: Mapping[str, bytes]) -> bytes:
    """The member that Python runs. code: the members that it imports."""
    checksums = tuple((name, zlib.crc32(data)) for name, data in code.items())
    told = {"name": USUAL_NAME, "flags": ASKS_FOR_HELP, "columns": HELP_COLUMNS, "checksums": checksums}
    return MAIN.format(**told).encode()


def prepared_texts() -> dict[str, bytes]:
    """What the program says to --help and --version, as members of the archive, by the words that ask for it."""
    asked = [[flag] for flag in ASKS_FOR_HELP] + [[name, flag] for name in qmesh.COMMANDS for flag in ("-h", "--help")]
    argv, environ = sys.argv, dict(os.environ)
    sys.argv, os.environ["COLUMNS"] = [USUAL_NAME], str(HELP_COLUMNS)
    try:
        return {f"help/{' '.join(words)}.txt": said_to(words).encode() for words in asked}
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environ)


def said_to(words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        qmesh.make_parser().parse_args(words)
    return said.getvalue()


def compiled(program: bytes) -> bytes:
    """The program as the Python that builds compiles it; others pass over it, and compile the source at each start.

    By a process of its own: what marshal writes depends on what else holds the same strings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "qmesh.py", Path(scratch) / "qmesh.pyc"
        source.write_bytes(program)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environ["PYTHONHASHSEED"] = "0"
        subprocess.run([sys.executable, "-S", "-c", COMPILE, source, target], check=True, env=environ)
        return target.read_bytes()


def pack_engine(packer: Packer, engine: EngineTree) -> None:
    """Add a folder of packages as a zip. Of files that are one (hard links), one is packed, and the others named."""
    first: dict[int, str] = {}
    links: dict[str, str] = {}
    unpacked = 0
    with tempfile.TemporaryFile() as packed:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=DEFLATE_LEVEL) as archive:
            for path in sorted(path for path in engine.root.rglob("*") if path.is_file()):
                name, found = path.relative_to(engine.root).as_posix(), path.stat()
                original = first.setdefault(found.st_ino, name)
                if original != name:
                    links[name] = original
                    continue
                info = zipfile.ZipInfo(name)  # dated 1980-01-01
                info.create_system, info.external_attr = 3, qmesh.ZIP_MODE << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())
                unpacked += found.st_size
        packed.seek(0)
        name = f"{engine.about['platform']}-{engine.about['python']}"
        packer.add(qmesh.ENGINE, name, packed, unpacked=unpacked, about={**engine.about, "links": links})


def build(target: Path, engine: EngineTree | None, model: Path | None) -> None:
    """Write an archive, executable, and put it into place at once, so that nobody runs half of it."""
    program = (ROOT / qmesh.PROGRAM_FILE).read_bytes().replace(b"\r\n", b"\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    with qmesh.replacing(target) as file:
        packer = Packer(file)
        if engine is not None:
            pack_engine(packer, engine)
        if model is not None:
            with model.open("rb") as source:
                about = {name: value for name, value in qmesh.read_model(model).to_json().items() if name != "path"}
                packer.add(qmesh.MODEL, model.name, source, unpacked=model.stat().st_size, about=about)
        packer.finish(program)
    target.chmod(0o755)


# --- Command line ---


def file_name(engine: EngineTree | None, model: Path | None) -> str:
    """What an archive is called after what it carries: "qmesh-linux-x86_64-cp311.pyz"."""
    parts = ["qmesh"]
    if engine is not None:
        parts += [engine.about["platform"], engine.about["python"]]
    if model is not None:
        parts.append(model.stem)
    return "-".join(parts) + ".pyz"


def list_archive(archive: Path) -> None:
    """Print what is inside, file by file, with sizes in bytes. Raises qmesh.DamagedArchive, OSError."""
    contents = qmesh.read_contents(archive)
    qmesh.check_archive(archive, contents)
    for part in contents.parts.values() if contents is not None else []:
        print(f"{part.kind}: {part.name}, {part.size:,} bytes, SHA-256 {part.sha256}")
        if part.kind == qmesh.ENGINE:
            with archive.open("rb") as source, tempfile.TemporaryFile() as packed:
                source.seek(part.offset)
                qmesh.copy_bytes(source, packed, part.size)
                print_members(packed, part.about["links"])
    print("program:")
    print_members(archive, {})


def print_members(archive: Path | IO[bytes], links: Mapping[str, str]) -> None:
    with zipfile.ZipFile(archive) as members:
        sizes = {info.filename: info.file_size for info in members.infolist()}
    for name in sorted([*sizes, *links]):
        print(f"{sizes[name]:14,} {name}" if name in sizes else f"{'same file':>14} {name} as {links[name]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the program into one file that Python runs as it is.")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (dist/qmesh...pyz)")
    parser.add_argument("--engine", action="store_true", help="put in all that a worker needs, for this platform")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take llama-cpp-python's wheel from here")
    parser.add_argument("--model", type=Path, metavar="FILE", help="put this GGUF file in")
    parser.add_argument(
        "--list", type=Path, metavar="ARCHIVE", dest="listed", help="build nothing, list this one's files"
    )
    arguments = parser.parse_args()
    if arguments.wheels is not None and not arguments.engine:
        parser.error("--wheels are for an engine: add --engine")
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """What is wrong with them is said before anything is compiled. Raises BuildError, qmesh.ModelError."""
    if arguments.wheels is not None and not any(arguments.wheels.glob("llama_cpp_python-*.whl")):
        raise BuildError(f"there is no wheel of llama-cpp-python in {arguments.wheels}")
    if arguments.model is not None:
        qmesh.read_model(arguments.model)
    target: Path | None = arguments.output
    if target is None or not target.exists():
        return
    if not target.is_file() or not (zipfile.is_zipfile(target) or not target.stat().st_size):
        raise BuildError(f"{target} is there, and is no archive: name another file to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.listed is not None:
        list_archive(arguments.listed)
        return
    check_arguments(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        engine = gather_engine(Path(scratch) / "engine", WORK, arguments.wheels) if arguments.engine else None
        target: Path = arguments.output or ROOT / "dist" / file_name(engine, arguments.model)
        try:
            build(target, engine, arguments.model)
        except OSError as error:
            raise BuildError(f"{target} cannot be written: {error.strerror or error}") from None
    print(f"{target} ({target.stat().st_size:,} bytes)")


def main() -> int:
    try:
        run(parse_arguments())
    except (BuildError, qmesh.QMeshError) as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read the list has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
