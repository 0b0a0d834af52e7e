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
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import qmesh

ROOT: Final = Path(__file__).resolve().parent
SHEBANG: Final = b"#!/usr/bin/env python3\n"
DEFLATE_LEVEL: Final = 9  # packed once, copied to every machine

# zipapp's own template drops the exit code of what it calls.
MAIN: Final = b"""\
import sys

import qmesh

sys.exit(qmesh.main())
"""


COMPILE: Final = """\
import py_compile, sys
from py_compile import PycInvalidationMode
source, target = sys.argv[1:]
py_compile.compile(source, target, dfile="qmesh.py", doraise=True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
"""


class BuildError(Exception):
    """What hinders the build, in a line for a person."""


# --- The engine ---


@dataclass(frozen=True)
class EngineTree:
    """A folder of packages for one platform, and what is known of them."""

    root: Path
    about: Mapping[str, Any]


def gather_engine(work: Path, wheels: Path | None) -> EngineTree:
    raise BuildError("not yet")


# --- Packing ---


@dataclass
class Packer:
    """Writes an archive, piece by piece: the parts first, the program last."""

    file: IO[bytes]
    parts: dict[str, qmesh.Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file.write(SHEBANG)

    def add(self, kind: str, name: str, source: IO[bytes], *, unpacked: int, about: Mapping[str, Any]) -> None:
        offset = self.file.tell()
        sha256 = qmesh.copy_bytes(source, self.file, sys.maxsize)
        size = self.file.tell() - offset
        self.parts[kind] = qmesh.Part(kind, name, offset, size, sha256, unpacked, about)

    def finish(self, program: bytes) -> None:
        contents = qmesh.Contents(qmesh.__version__, hashlib.sha256(program).hexdigest(), self.parts)
        members = {
            "__main__.py": MAIN,
            "qmesh.py": program,
            "qmesh.pyc": compiled(program),
            qmesh.CONTENTS_FILE: qmesh.dump_json(contents.to_json()),
        }
        self.file.write(qmesh.program_zip(members))


def compiled(program: bytes) -> bytes:
    """The program as the Python that builds compiles it; others pass over it, and compile the source at each start.

    By a process of its own: what marshal writes depends on what else holds the same strings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "qmesh.py", Path(scratch) / "qmesh.pyc"
        source.write_bytes(program)
        environ = os.environ | {"PYTHONHASHSEED": "0"}
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
    program = (ROOT / "qmesh.py").read_bytes().replace(b"\r\n", b"\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    with qmesh.replacing(target) as file:
        packer = Packer(file)
        if engine is not None:
            pack_engine(packer, engine)
        if model is not None:
            with model.open("rb") as source:
                packer.add(qmesh.MODEL, model.name, source, unpacked=model.stat().st_size, about={})
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
    """Print what is inside, file by file, with sizes in bytes. Raises BuildError, qmesh.DamagedArchive."""
    try:
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
    except OSError as error:
        raise BuildError(f"{archive} cannot be read: {error.strerror or error}") from None


def print_members(archive: Path | IO[bytes], links: Mapping[str, str]) -> None:
    with zipfile.ZipFile(archive) as members:
        sizes = {info.filename: info.file_size for info in members.infolist()}
    for name in sorted([*sizes, *links]):
        print(f"{sizes[name]:14,} {name}" if name in sizes else f"{'same file':>14} {name} as {links[name]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the program into one file that Python runs as it is.")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (dist/qmesh...pyz)")
    parser.add_argument("--engine", action="store_true", help="put in all that a worker needs, for this platform")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the engine's wheels from here")
    parser.add_argument("--model", type=Path, metavar="FILE", help="put this GGUF file in")
    parser.add_argument(
        "--list", type=Path, metavar="ARCHIVE", dest="listed", help="build nothing, tell what is in this one"
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    if arguments.listed is not None:
        list_archive(arguments.listed)
        return
    if arguments.model is not None:
        qmesh.read_model(arguments.model)
    engine = gather_engine(ROOT / "build", arguments.wheels) if arguments.engine else None
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
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
