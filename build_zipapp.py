#!/usr/bin/env python3
"""Build `dist/qmesh.pyz`: the whole program in one file that Python runs as it is.

    python build_zipapp.py [-o FILE]

The same sources give the same bytes, on every machine and at every time: members are sorted, stored
uncompressed (deflate differs between versions of zlib), and dated 1980-01-01.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SHEBANG = b"#!/usr/bin/env python3\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can hold
MODE = 0o644 << 16

# zipapp's own template drops the exit code of what it calls.
MAIN = b"""\
import sys

import qmesh

sys.exit(qmesh.main())
"""


def build(source: Path) -> bytes:
    """The archive's bytes: a shebang, then a zip of `__main__.py` and `qmesh.py`."""
    members = {"__main__.py": MAIN, "qmesh.py": source.read_bytes().replace(b"\r\n", b"\n")}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = MODE
            info.create_system = 3  # Unix, also where this is built on Windows
            archive.writestr(info, members[name])
    return SHEBANG + buffer.getvalue()


def write(data: bytes, target: Path) -> None:
    """Put the archive into place at once, executable, so that nobody runs half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o755)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the program into one file that Python runs as it is.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist" / "qmesh.pyz", metavar="FILE")
    output: Path = parser.parse_args().output
    try:
        data = build(ROOT / "qmesh.py")
    except OSError as error:
        print(f"error: {error.filename} cannot be read: {error.strerror or error}", file=sys.stderr)
        return 1
    try:
        write(data, output)
    except OSError as error:
        print(f"error: {output} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{output} ({output.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
