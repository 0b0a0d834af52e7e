"""Keys and certificates: what a mesh is called, what its members share, and how they prove it to each other."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, x448, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

import qmesh
from qmesh import (
    DEFAULT_TOPIC,
    Authority,
    Datagram,
    DatagramCodec,
    MeshKey,
    MeshKeys,
    NodeId,
    NodeKey,
    WireError,
    ed25519_public_key,
    ed25519_sign,
    parse_mesh_keys,
)

ROOT = Path(qmesh.__file__).parent
VECTORS = Path(__file__).parent / "vectors"
PING = Datagram("ping", b"8 bytes.")
SECRET = bytes(range(32))
TEXT = "qmesh1-aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dypq"
LAST_DAY = datetime.date(2026, 12, 31)
SEEDS = [bytes(32), b"\xff" * 32, SECRET, hashlib.sha256(b"a seed").digest()]
PKCS8 = serialization.PrivateFormat.PKCS8
PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()

seeds = st.binary(min_size=32, max_size=32)
reproducible = settings(deadline=None, derandomize=True, database=None, max_examples=50)


# --- Ed25519 ---


def vectors(file_name: str, kind: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((VECTORS / file_name).read_text("utf-8"))[kind]
    assert found
    return found


def signature_of(vector: dict[str, str]) -> str:
    return ed25519_sign(*(bytes.fromhex(vector[name]) for name in ("sk", "pk", "msg"))).hex()


@pytest.mark.parametrize("file_name", ["rfc8032_ed25519.json", "wycheproof_ed25519.json"])
def test_public_keys_and_signatures_are_those_of_the_published_vectors(file_name: str) -> None:
    for vector in vectors(file_name, "valid"):
        assert ed25519_public_key(bytes.fromhex(vector["sk"])).hex() == vector["pk"]
        assert signature_of(vector) == vector["sig"]


def test_no_signature_is_one_that_wycheproof_calls_invalid() -> None:
    for vector in vectors("wycheproof_ed25519.json", "invalid"):
        assert ed25519_public_key(bytes.fromhex(vector["sk"])).hex() == vector["pk"]
        assert signature_of(vector) != vector["sig"]


@reproducible
@given(seeds, st.binary(max_size=300))
def test_public_keys_and_signatures_are_those_of_another_implementation(seed: bytes, message: bytes) -> None:
    other = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    assert ed25519_public_key(seed) == other.public_key().public_bytes_raw()
    assert ed25519_sign(seed, ed25519_public_key(seed), message) == other.sign(message)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_private_key_of_another_size_is_refused(size: int) -> None:
    for use in (
        ed25519_public_key,
        functools.partial(ed25519_sign, public=bytes(32), message=b""),
        Authority,
        NodeKey.of_seed,
    ):
        with pytest.raises(ValueError, match="32 bytes"):
            use(bytes(size))


# --- Mesh keys ---


def runs(text: str, size: int = 8) -> set[str]:
    return {text[at : at + size] for at in range(len(text) - size + 1)}


def written(secret: bytes) -> list[str]:
    """What a secret can look like in print."""
    base32, hexadecimal = base64.b32encode(secret).decode().rstrip("="), secret.hex()
    base64s = [base64.b64encode(secret).decode(), base64.urlsafe_b64encode(secret).decode()]
    return [repr(secret), str(list(secret)), base32, base32.lower(), hexadecimal, hexadecimal.upper(), *base64s]


def assert_says_nothing_of(secrets: Iterable[bytes], text: str) -> None:
    shown = runs(text)
    for secret in secrets:
        assert not any(shown & runs(form) for form in written(secret))


def refusal(text: str) -> str:
    """All that is printed of the error with which a key file is refused."""
    with pytest.raises(ValueError, match=r".") as refused:
        parse_mesh_keys(text)
    error = refused.value
    return "".join(traceback.format_exception_only(error)) + repr(error) + str(error.__cause__)


def test_a_key_as_text_is_the_key_again() -> None:
    assert MeshKey(SECRET).text == TEXT
    assert MeshKey.parse(TEXT) == MeshKey(SECRET)
    assert MeshKey(SECRET, LAST_DAY).text == TEXT + " until 2026-12-31"
    assert MeshKey.parse(TEXT + " until 2026-12-31") == MeshKey(SECRET, LAST_DAY)


@reproducible
@given(seeds, st.none() | st.dates())
def test_every_key_as_text_is_that_key_again(secret: bytes, until: datetime.date | None) -> None:
    key = MeshKey(secret, until)
    assert MeshKey.parse(key.text) == key
    assert MeshKey.parse(key.text.upper()) == key


@pytest.mark.parametrize("text", [TEXT.upper(), f"  {TEXT}\t\n", TEXT.title()])
def test_capitals_and_space_around_a_key_do_not_matter(text: str) -> None:
    assert MeshKey.parse(text) == MeshKey(SECRET)


def test_space_and_capitals_before_the_last_day_do_not_matter() -> None:
    assert MeshKey.parse(TEXT + " \t UNTIL   2026-12-31 ") == MeshKey(SECRET, LAST_DAY)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_mesh_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        MeshKey(bytes(size))


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-1],
        TEXT + "a",
        TEXT.removeprefix("qmesh1-"),
        "qmesh2-" + TEXT.removeprefix("qmesh1-"),
        TEXT.replace("-", ""),
        TEXT.replace("-", "_"),
        TEXT.replace("5", "0"),
        TEXT[:20] + " " + TEXT[20:],
        TEXT + "====",
        TEXT + " 2026-12-31",
        TEXT + " until",
        TEXT + " until tomorrow",
        TEXT + " until 2026-13-01",
        TEXT + " until 2026-02-29",
        TEXT + " until 2026-12-31 or so",
        TEXT + " until " + TEXT,
        TEXT + " " + TEXT,
        TEXT.replace("k", "\N{KELVIN SIGN}"),
        TEXT.replace("i", "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"),
        "",
        "   ",
        "qmesh1-",
    ],
)
def test_what_is_nearly_a_key_is_refused_without_telling_the_secret(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        MeshKey.parse(text)
    assert_says_nothing_of([SECRET], refusal(text))


def test_a_secret_in_place_of_the_last_day_is_not_told() -> None:
    other = MeshKey(SEEDS[3]).text.removeprefix("qmesh1-")
    assert_says_nothing_of([SECRET, SEEDS[3]], refusal(f"{TEXT} until {other[:32]}"))


@pytest.mark.parametrize(
    "text",
    [
        TEXT + " until 20261231",
        TEXT + " until 2026-W53-4",
        TEXT.replace("qmesh", "qme\N{LATIN SMALL LETTER LONG S}h"),
        TEXT.replace("i", "\N{LATIN SMALL LETTER DOTLESS I}"),
        TEXT[:-1] + "r",  # differs from the last letter in bits that belong to no byte
    ],
)
def test_a_key_is_written_in_one_way_only(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        MeshKey.parse(text)


@settings(reproducible, max_examples=200)
@given(st.integers(0, len(TEXT)), st.integers(0, 3), st.text(max_size=3))
def test_a_damaged_key_is_refused_with_a_value_error_that_tells_nothing(at: int, cut: int, put: str) -> None:
    try:
        parse_mesh_keys(TEXT[:at] + put + TEXT[at + cut :])
    except ValueError as error:
        assert_says_nothing_of([SECRET], "".join(traceback.format_exception_only(error)))


@reproducible
@given(st.text(max_size=200))
def test_any_text_is_a_key_file_or_a_value_error(text: str) -> None:
    for parse in (MeshKey.parse, parse_mesh_keys):
        with contextlib.suppress(ValueError):
            parse(text)


def test_a_huge_text_is_no_key_file() -> None:
    for text in (TEXT * 20_000, "a" * 1_000_000, "\n" * 1_000_000, " " * 1_000_000, f"{TEXT} until {'1' * 1_000_000}"):
        assert_says_nothing_of([SECRET], refusal(text))


OLD = MeshKey(SEEDS[3], LAST_DAY)


def test_a_key_file_holds_the_key_in_force_and_the_one_that_it_replaces() -> None:
    assert parse_mesh_keys(TEXT) == (MeshKey(SECRET),)
    assert parse_mesh_keys(f"{TEXT}\n{OLD.text}\n") == (MeshKey(SECRET), OLD)
    older = MeshKey(SEEDS[0], LAST_DAY)
    assert parse_mesh_keys(f"{TEXT}\n{OLD.text}\n{older.text}") == (MeshKey(SECRET), OLD, older)


def test_comments_and_empty_lines_in_a_key_file_do_not_matter() -> None:
    text = f"# The lab's key\r\n\r\n  {TEXT.upper()}   # since May\r\n\t\n{OLD.text}# the old one\r\n#{TEXT}\r\n"
    assert parse_mesh_keys(text) == (MeshKey(SECRET), OLD)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no mesh key"),
        (["", "# nothing", "  "], "no mesh key"),
        (["#" + TEXT], "no mesh key"),
        ([OLD.text], "first key"),
        ([OLD.text, TEXT], "first key"),
        ([TEXT, MeshKey(SEEDS[0]).text], "each key after it"),
        ([TEXT, OLD.text, MeshKey(SEEDS[0]).text], "each key after it"),
        ([TEXT, *(MeshKey(bytes([number]) * 32, LAST_DAY).text for number in range(4))], "at most 4"),
        ([TEXT, MeshKey(SECRET, LAST_DAY).text], "each another"),
        ([TEXT, OLD.text, OLD.text], "each another"),
        (["# first", "", TEXT[:-1]], "line 3: "),
        ([TEXT, OLD.text + "x"], "line 2: "),
    ],
)
def test_another_set_of_keys_is_refused_without_telling_a_secret(lines: list[str], why: str) -> None:
    told = refusal("\n".join(lines))
    assert why in told
    assert_says_nothing_of([SECRET, *SEEDS[1:]], told)


def test_no_secret_stands_in_what_is_printed() -> None:
    for seed in SEEDS[2:]:
        key = MeshKey(seed, LAST_DAY)
        keys = MeshKeys.derive("lab", key)
        node = NodeKey.of_seed(seed)
        for value in (key, keys, node, Authority(seed), parse_mesh_keys(MeshKey(seed).text), keys.title):
            assert_says_nothing_of([seed, keys.udp_key, keys.ca_seed], f"{value!r} {value!s} {value}")


def test_the_check_for_secrets_finds_each_way_to_write_one() -> None:
    for form in written(SECRET):
        with pytest.raises(AssertionError):
            assert_says_nothing_of([SECRET], f"key={form[5:20]}")


# --- What a mesh derives from its key ---


def shared(keys: MeshKeys) -> list[bytes]:
    return [bytes(keys.topic), keys.udp_key, keys.ca_seed]


def test_the_same_topic_gives_the_same_keys_everywhere() -> None:
    assert MeshKeys.derive("lab") == MeshKeys.derive("lab")
    assert MeshKeys.derive("lab").name == "lab"


@reproducible
@given(seeds, st.text(st.characters(codec="utf-8"), max_size=8))
def test_the_same_key_and_topic_give_the_same_keys_everywhere(secret: bytes, name: str) -> None:
    assert MeshKeys.derive(name, MeshKey(secret)) == MeshKeys.derive(name, MeshKey(secret))


def test_the_open_mesh_keeps_its_keys_from_version_to_version() -> None:
    keys = MeshKeys.derive(DEFAULT_TOPIC)
    assert str(keys.topic) == "37ed93ce593a3e1576bb27ebe808b10eeb5a4c9f7ce42d05c536fb08342e4e59"
    assert keys.udp_key.hex() == "773d6575a11e4a8aa7bd958f8d09c920eb19a8a4b9c79f34aacef524a42c9825"
    assert keys.ca_seed.hex() == "5a3b72e9cabebd72fd033dd9776c8e03d002fdaea8fa5bee51b227647f4d8205"


def test_a_closed_mesh_keeps_its_keys_from_version_to_version() -> None:
    keys = MeshKeys.derive("qmesh-inference", MeshKey(SECRET))
    assert str(keys.topic) == "b60fa7727a9dd25d3646f56bd9e17f5de15102a638279f3a93fb8d4ffb4dc4db"
    assert keys.udp_key.hex() == "88e1e372c8de23e4944e9124a888f75b10bf872066129574dd90392e8b90b395"
    assert keys.ca_seed.hex() == "5de3a80d7504f6cd25920bb776e43460e6460ed9f53bdd5f2d15d24e7e06edb1"
    assert keys.fingerprint == "hiyeym3p"


def test_certificates_stay_the_same_from_version_to_version() -> None:
    authority = Authority(MeshKeys.derive("qmesh-inference", MeshKey(SECRET)).ca_seed)
    leaf = authority.certify(NodeKey.of_seed(bytes(32)).public)
    told = [hashlib.sha256(certificate).hexdigest() for certificate in (authority.certificate, leaf)]
    assert told == [
        "859ef39907e430ad2d6d374d6d6fe345aff252df413c974dadf0487d215bb7d3",
        "71643a0deba46cedb698945094582cdcdd29b69dacc25c532fb8667389d593d5",
    ]


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, min_size=2, max_size=4))
def test_another_topic_shares_nothing(names: list[str]) -> None:
    found = {value for name in names for value in shared(MeshKeys.derive(name))}
    assert len(found) == 3 * len(names)


@reproducible
@given(st.lists(seeds, unique=True, min_size=2, max_size=4))
def test_another_key_shares_nothing_not_even_with_the_open_mesh(secrets: list[bytes]) -> None:
    meshes = [MeshKeys.derive("lab"), *(MeshKeys.derive("lab", MeshKey(secret)) for secret in secrets)]
    assert len({value for keys in meshes for value in shared(keys)}) == 3 * len(meshes)
    assert len({keys.fingerprint for keys in meshes}) == len(meshes)


@reproducible
@given(seeds)
def test_nothing_that_is_shared_is_the_key_itself(secret: bytes) -> None:
    assert secret not in shared(MeshKeys.derive("lab", MeshKey(secret)))


def test_another_topic_of_one_key_is_another_place_in_the_dht() -> None:
    topics = {MeshKeys.derive(name, MeshKey(SECRET)).topic for name in ("lab", "office", "")}
    assert len(topics) == 3


def test_a_fingerprint_is_of_the_key_and_not_of_the_topic() -> None:
    lab, office = (MeshKeys.derive(name, MeshKey(SECRET)) for name in ("lab", "office"))
    assert lab.fingerprint == office.fingerprint
    assert len(lab.fingerprint) == 8


def test_only_an_open_mesh_is_called_open() -> None:
    for name in ("lab", DEFAULT_TOPIC, ""):
        assert MeshKeys.derive(name).fingerprint == "open"
        assert MeshKeys.derive(name).is_open
    for seed in SEEDS:
        assert MeshKeys.derive("lab", MeshKey(seed)).fingerprint != "open"
        assert not MeshKeys.derive("lab", MeshKey(seed)).is_open


def test_people_are_told_what_kind_of_mesh_it_is() -> None:
    assert MeshKeys.derive("lab").title == "open mesh 'lab'"
    assert MeshKeys.derive("lab", MeshKey(SECRET)).title == "closed mesh 'lab' (hiyeym3p)"


def test_keys_count_as_long_as_the_mesh_key_and_change_nothing_else_by_it() -> None:
    assert MeshKeys.derive("lab").until is None
    keys = MeshKeys.derive("lab", MeshKey(SECRET, LAST_DAY))
    assert keys.until == LAST_DAY
    assert dataclasses.replace(keys, until=None) == MeshKeys.derive("lab", MeshKey(SECRET))


def test_a_key_has_256_bits_and_stays_out_of_what_is_printed() -> None:
    keys = MeshKeys.derive("lab")
    assert [len(value) for value in shared(keys)] == [32, 32, 32]
    assert_says_nothing_of([keys.udp_key, keys.ca_seed], repr(keys))


def test_keys_never_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshKeys.derive("lab").name = "other"  # type: ignore[misc]


def test_members_of_one_mesh_understand_each_other() -> None:
    data = DatagramCodec(MeshKeys.derive("lab").udp_key).encode(PING)
    assert DatagramCodec(MeshKeys.derive("lab").udp_key).decode(data) == PING


def test_another_mesh_does_not_accept_our_datagrams() -> None:
    data = DatagramCodec(MeshKeys.derive("lab").udp_key).encode(PING)
    for other in (MeshKeys.derive("office"), MeshKeys.derive("lab", MeshKey(SECRET))):
        with pytest.raises(WireError, match="wrong mesh"):
            DatagramCodec(other.udp_key).decode(data)


# --- Certificates ---

AUTHORITY = Authority(SECRET)
NODE = NodeKey.of_seed(SEEDS[3])
LEAF = AUTHORITY.certify(NODE.public)
UNSIGNED = len(LEAF) - 64  # where the signature begins

BASIC = x509.BasicConstraints(ca=True, path_length=0)
ROLES = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH])


def usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def raw_public(seed: bytes) -> bytes:
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def key_id(public: bytes) -> bytes:
    """RFC 7093, 2, method 1."""
    return hashlib.sha256(public).digest()[:20]


def builder(public: bytes, subject: str) -> x509.CertificateBuilder:
    serial = bytearray(hashlib.sha256(b"serial" + public).digest()[:16])
    serial[0] = serial[0] % 64 + 64
    return x509.CertificateBuilder(
        issuer_name=common_name("QMesh"),
        subject_name=common_name(subject),
        public_key=ed25519.Ed25519PublicKey.from_public_bytes(public),
        serial_number=int.from_bytes(serial, "big"),
        not_valid_before=datetime.datetime(1970, 1, 1),
        not_valid_after=datetime.datetime(9999, 12, 31, 23, 59, 59),
    )


def leaf_builder(ca_seed: bytes, public: bytes, subject: str = "QMesh node") -> x509.CertificateBuilder:
    issuer = x509.AuthorityKeyIdentifier(key_id(raw_public(ca_seed)), None, None)
    return (
        builder(public, subject)
        .add_extension(usage(signs_certificates=False), critical=True)
        .add_extension(ROLES, critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(x509.SubjectKeyIdentifier(key_id(public)), critical=False)
    )


def der(built: x509.CertificateBuilder, ca_seed: bytes) -> bytes:
    signed = built.sign(ed25519.Ed25519PrivateKey.from_private_bytes(ca_seed), None)
    return signed.public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_authority_is_the_certificate_that_another_implementation_builds(seed: bytes) -> None:
    public = raw_public(seed)
    built = (
        builder(public, "QMesh")
        .add_extension(BASIC, critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(key_id(public)), critical=False)
    )
    assert Authority(seed).certificate == der(built, seed)


@reproducible
@given(seeds, seeds)
def test_a_nodes_certificate_is_the_one_that_another_implementation_builds(ca_seed: bytes, seed: bytes) -> None:
    public = raw_public(seed)
    assert Authority(ca_seed).certify(public) == der(leaf_builder(ca_seed, public), ca_seed)


def test_all_members_make_the_same_certificates() -> None:
    assert Authority(SECRET).certificate == AUTHORITY.certificate
    assert Authority(SECRET).certify(NODE.public) == LEAF


@settings(reproducible, max_examples=25)
@given(seeds, seeds)
def test_a_certificate_tells_whose_it_is(ca_seed: bytes, seed: bytes) -> None:
    authority, node = Authority(ca_seed), NodeKey.of_seed(seed)
    assert authority.node_id(authority.certify(node.public)) == node.node_id


def test_a_certificate_that_carries_the_marker_of_the_template_tells_whose_it_is() -> None:
    marker = b"\xa5" * 32
    assert AUTHORITY.node_id(AUTHORITY.certify(marker)) == NodeId.of_bytes(hashlib.sha256(marker).digest())


def assert_refused(certificate: bytes) -> None:
    with pytest.raises(WireError, match="not of QMesh's form"):
        AUTHORITY.node_id(certificate)


def test_a_certificate_of_another_form_is_refused() -> None:
    right = leaf_builder(SECRET, NODE.public)
    assert der(right, SECRET) == LEAF
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    day_off = datetime.datetime(9999, 12, 30, 23, 59, 59)
    for other in (
        der(right.add_extension(names, critical=False), SECRET),
        der(right.add_extension(BASIC, critical=True), SECRET),
        der(leaf_builder(SECRET, NODE.public, "QMesh nodf"), SECRET),
        der(leaf_builder(SECRET, NODE.public, "QMesh"), SECRET),
        der(leaf_builder(SECRET, NODE.public, "QMesh node "), SECRET),
        der(leaf_builder(SEEDS[0], NODE.public), SECRET),
        Authority(SEEDS[0]).certify(NODE.public),
        AUTHORITY.certificate,
        b"",
        NODE.public,
        qmesh.pem("CERTIFICATE", LEAF).encode(),
        LEAF + b"\0",
        b"\0" + LEAF,
        LEAF + LEAF,
    ):
        assert_refused(other)
    late = x509.CertificateBuilder(
        issuer_name=common_name("QMesh"),
        subject_name=common_name("QMesh node"),
        public_key=ed25519.Ed25519PublicKey.from_public_bytes(NODE.public),
        serial_number=x509.load_der_x509_certificate(LEAF).serial_number,
        not_valid_before=datetime.datetime(1970, 1, 1),
        not_valid_after=day_off,
        extensions=list(x509.load_der_x509_certificate(LEAF).extensions),
    )
    assert len(der(late, SECRET)) == len(LEAF)
    assert_refused(der(late, SECRET))


def test_a_certificate_that_is_cut_anywhere_is_refused() -> None:
    for size in range(len(LEAF)):
        assert_refused(LEAF[:size])
        assert_refused(LEAF[size + 1 :])


def test_a_certificate_with_any_bit_flipped_before_the_signature_is_refused() -> None:
    for at in range(UNSIGNED):
        for bit in range(8):
            assert_refused(LEAF[:at] + bytes([LEAF[at] ^ 1 << bit]) + LEAF[at + 1 :])


def test_a_certificate_with_another_public_key_put_in_is_refused() -> None:
    other = NodeKey.of_seed(SEEDS[0]).public
    assert LEAF.count(NODE.public) == 1
    assert_refused(LEAF.replace(NODE.public, other))


@reproducible
@given(st.binary(max_size=400))
def test_any_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    assert_refused(data)


# --- Node keys ---


def test_a_node_is_named_by_the_hash_of_its_public_key() -> None:
    assert NODE.public == raw_public(SEEDS[3])
    assert NODE.node_id == NodeId.of_bytes(hashlib.sha256(NODE.public).digest())


@reproducible
@given(seeds)
def test_a_node_key_as_text_is_the_key_again_for_us_and_for_others(seed: bytes) -> None:
    key = NodeKey.of_seed(seed)
    other = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    assert NodeKey.parse(key.pem) == key
    assert key.pem.encode() == other.private_bytes(PEM, PKCS8, PLAIN)
    read = serialization.load_pem_private_key(key.pem.encode(), None)
    assert isinstance(read, ed25519.Ed25519PrivateKey)
    assert read.private_bytes_raw() == seed


@pytest.mark.parametrize("text", [NODE.pem.replace("\n", "\r\n"), NODE.pem.rstrip(), f"\n  {NODE.pem}\n\n"])
def test_line_ends_and_space_around_a_node_key_do_not_matter(text: str) -> None:
    assert NodeKey.parse(text) == NODE


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 96, 97, 300])
def test_certificates_as_text_are_those_of_another_implementation(size: int) -> None:
    text = qmesh.pem("CERTIFICATE", bytes(size))
    body = text.removeprefix("-----BEGIN CERTIFICATE-----\n").removesuffix("-----END CERTIFICATE-----\n")
    assert base64.b64decode(body) == bytes(size)
    assert all(len(line) <= 64 for line in text.splitlines())
    assert x509.load_pem_x509_certificate(qmesh.pem("CERTIFICATE", LEAF).encode()).public_bytes(PEM).decode() == (
        qmesh.pem("CERTIFICATE", LEAF)
    )


def other_private_keys() -> list[str]:
    ours = ed25519.Ed25519PrivateKey.from_private_bytes(SECRET)
    curve = ec.derive_private_key(7, ec.SECP256R1())
    secret = serialization.BestAvailableEncryption(b"password")
    found = [
        x25519.X25519PrivateKey.from_private_bytes(SECRET).private_bytes(PEM, PKCS8, PLAIN),
        x448.X448PrivateKey.from_private_bytes(bytes(56)).private_bytes(PEM, PKCS8, PLAIN),
        ed448.Ed448PrivateKey.from_private_bytes(bytes(57)).private_bytes(PEM, PKCS8, PLAIN),
        curve.private_bytes(PEM, PKCS8, PLAIN),
        curve.private_bytes(PEM, serialization.PrivateFormat.TraditionalOpenSSL, PLAIN),
        ours.private_bytes(PEM, PKCS8, secret),
        ours.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN),
        ours.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ]
    return [data.decode() for data in found]


def assert_no_node_key(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        NodeKey.parse(text)
    assert_says_nothing_of([SECRET, NODE.seed], "".join(traceback.format_exception_only(refused.value)))


def test_other_kinds_of_keys_are_refused() -> None:
    for text in other_private_keys():
        assert_no_node_key(text)


BODY = NODE.pem.splitlines()[1]
DER = base64.b64decode(BODY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-----",
        "garbage",
        BODY,
        NODE.pem.replace(BODY, BODY[:-1]),
        NODE.pem.replace(BODY, BODY[:-4]),
        NODE.pem.replace(BODY, BODY + "AAAA"),
        NODE.pem.replace(BODY, "!" + BODY[1:]),
        NODE.pem.replace(BODY, BODY[:10] + "!" + BODY[10:]),
        NODE.pem.replace(BODY, "é" + BODY[1:]),
        NODE.pem.replace(BODY, "\ud800" + BODY[1:]),
        NODE.pem.replace(BODY, ""),
        qmesh.pem("PRIVATE KEY", DER + b"\0"),
        qmesh.pem("PRIVATE KEY", DER[:-1]),
        qmesh.pem("PRIVATE KEY", DER[1:]),
        qmesh.pem("PRIVATE KEY", DER[:16]),
        qmesh.pem("PRIVATE KEY", b""),
        qmesh.pem("PRIVATE KEY", NODE.seed),
        qmesh.pem("CERTIFICATE", LEAF) + NODE.pem,
    ],
)
def test_what_is_nearly_a_node_key_is_refused(text: str) -> None:
    assert_no_node_key(text)


def test_a_node_key_that_is_cut_before_its_end_is_refused() -> None:
    for size in range(NODE.pem.index("\n-----END")):
        assert_no_node_key(NODE.pem[:size])


@pytest.mark.parametrize(
    "text",
    [
        NODE.pem[:-3],
        NODE.pem.partition("-----END")[0],
        NODE.pem.replace("PRIVATE KEY", "CERTIFICATE"),
        NODE.pem.replace("END PRIVATE", "END PUBLIC"),
        NODE.pem.replace(BODY, BODY + "="),
        NODE.pem + NodeKey.of_seed(SECRET).pem,
        "x" + NODE.pem,
    ],
)
def test_a_node_key_in_another_frame_is_refused(text: str) -> None:
    assert_no_node_key(text)


@pytest.mark.parametrize("piece", ["-", "-----", "A", "\n", "é", NODE.pem[:60], "-----A-----\n"])
def test_a_huge_text_is_no_node_key(piece: str) -> None:
    assert_no_node_key(piece * (1_000_000 // len(piece)))


@settings(reproducible, max_examples=200)
@given(st.text(max_size=100), st.sampled_from(["{}", "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n"]))
def test_any_other_text_is_refused_with_a_value_error(text: str, frame: str) -> None:
    assert_no_node_key(frame.replace("{}", text))


@settings(reproducible, max_examples=200)
@given(st.integers(0, len(BODY)), st.integers(0, 3), st.text(max_size=3))
def test_a_damaged_node_key_is_refused_with_a_value_error_or_whole(at: int, cut: int, put: str) -> None:
    with contextlib.suppress(ValueError):
        key = NodeKey.parse(NODE.pem.replace(BODY, BODY[:at] + put + BODY[at + cut :]))
        assert key == NodeKey.of_seed(key.seed)


# --- OpenSSL: the judge of all this, in every Python and as a command ---

HANDSHAKES = """
import hashlib, json, ssl, sys
sys.path.insert(0, sys.argv[1])
import qmesh

folder, certified = sys.argv[2], {}

def seed(name):
    return hashlib.sha256(name.encode()).digest()

def side(role, authority, name, trusted, spoil=False):
    key = qmesh.NodeKey.of_seed(seed(name))
    leaf = authority.certify(key.public)
    if spoil:
        leaf = leaf[:-40] + bytes([leaf[-40] ^ 1]) + leaf[-39:]
    path = f"{folder}/{name}.pem"
    with open(path, "w", encoding="ascii") as file:
        file.write(key.pem + qmesh.pem("CERTIFICATE", leaf))
    context = ssl.SSLContext(role)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for each in trusted:
        context.load_verify_locations(cadata=each.certificate)
    context.load_cert_chain(path)
    return context

def shake(server, client):
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                return f"refused by the {'server' if end.server_side else 'client'}: {error.verify_message}"
    assert not waiting
    for end, other in (ends, ends[::-1]):
        end.write(b"hello")
        assert other.read(5) == b"hello"
    return [ends[0].version()] + [str(ours.node_id(end.getpeercert(True))) for end in ends]

ours, old, strange = (qmesh.Authority(seed(name)) for name in ("ours", "old", "strange"))
SERVER, CLIENT = ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT
server, client = side(SERVER, ours, "server", [ours]), side(CLIENT, ours, "client", [ours])
print(json.dumps({
    "openssl": ssl.OPENSSL_VERSION,
    "third party": [name for name in sys.modules if "site-packages" in str(getattr(sys.modules[name], "__file__", ""))],
    "wanted": ["TLSv1.3"] + [str(qmesh.NodeKey.of_seed(seed(name)).node_id) for name in ("server", "client")],
    "accepted": [
        shake(server, client),
        shake(side(SERVER, ours, "server", [old, ours]), side(CLIENT, ours, "client", [ours, old])),
        shake(side(SERVER, ours, "server", [ours, old]), side(CLIENT, ours, "client", [old, ours])),
    ],
    "refused": [
        shake(server, side(CLIENT, strange, "client", [ours])),
        shake(side(SERVER, strange, "server", [ours]), client),
        shake(server, side(CLIENT, ours, "client", [ours], spoil=True)),
        shake(side(SERVER, ours, "server", [ours], spoil=True), client),
    ],
}))
"""


def out_of(*command: str | Path) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def interpreters() -> dict[str, str]:
    """Every Python of this machine that can run qmesh and has OpenSSL, by its version."""
    names = [f"python3.{minor}" for minor in range(11, 20)]
    paths = [Path(folder, name) for folder in os.get_exec_path() for name in names]
    paths = [Path(sys.executable), *paths, *Path.home().glob(".pyenv/versions/*/bin/python")]
    found: dict[str, str] = {}
    for path in paths:
        told = out_of(path, "-I", "-S", "-c", "import platform, ssl, sys; print(platform.python_version())")
        version = (told or "").strip()
        numbers = version.split(".")[:2]
        if len(numbers) == 2 and (int(numbers[0]), int(numbers[1])) >= qmesh.MIN_PYTHON:
            found.setdefault(version, str(path))
    return found


def test_every_python_at_hand_shakes_hands_under_strict_verification(tmp_path: Path) -> None:
    found = interpreters()
    assert found, "not even the one that runs this"
    for version, python in found.items():
        command = [python, "-I", "-S", "-c", HANDSHAKES, str(ROOT), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"Python {version}: {done.stderr}"
        told = json.loads(done.stdout)
        print(f"Python {version}, {told['openssl']}")
        assert told["openssl"]
        assert told["third party"] == []
        assert told["accepted"] == [told["wanted"]] * 3, version
        refused = [str(each).partition(":")[0] for each in told["refused"]]
        assert refused == ["refused by the server", "refused by the client"] * 2, f"{version}: {told['refused']}"


@pytest.fixture(scope="module")
def openssl() -> str:
    command = shutil.which("openssl")
    if command is None or not (out_of(command, "version") or "").startswith("OpenSSL "):
        pytest.skip("no openssl command")
    return command


@pytest.fixture
def written_out(tmp_path: Path) -> Path:
    """A folder with the authority, a leaf and its key in PEM; and a leaf of a stranger."""
    for name, data in (
        ("ca", AUTHORITY.certificate),
        ("leaf", LEAF),
        ("strange", Authority(SEEDS[0]).certify(NODE.public)),
    ):
        (tmp_path / f"{name}.pem").write_text(qmesh.pem("CERTIFICATE", data), "ascii")
    (tmp_path / "key.pem").write_text(NODE.pem, "ascii")
    return tmp_path


@pytest.mark.parametrize("year", [None, 1971, 2026, 2049, 2050, 2200, 9998])
def test_openssl_verifies_strictly_whatever_the_clock_says(openssl: str, written_out: Path, year: int | None) -> None:
    command = [openssl, "verify", "-x509_strict", "-check_ss_sig", "-CAfile", str(written_out / "ca.pem")]
    if year is not None:
        command += ["-attime", str(int(datetime.datetime(year, 1, 1, tzinfo=datetime.UTC).timestamp()))]
    for purpose in ("sslserver", "sslclient"):
        assert out_of(*command, "-purpose", purpose, written_out / "leaf.pem") == f"{written_out / 'leaf.pem'}: OK\n"
        assert out_of(*command, "-purpose", purpose, written_out / "strange.pem") is None
    assert out_of(*command, written_out / "ca.pem") == f"{written_out / 'ca.pem'}: OK\n"


def test_openssl_reads_a_node_key(openssl: str, written_out: Path) -> None:
    key = written_out / "key.pem"
    assert "ED25519 Private-Key" in (out_of(openssl, "pkey", "-in", key, "-noout", "-text") or "")
    public = qmesh.pem("PUBLIC KEY", bytes.fromhex("302a300506032b6570032100") + NODE.public)
    assert out_of(openssl, "pkey", "-in", key, "-pubout") == public


def test_openssl_reads_what_we_meant_to_write(openssl: str, written_out: Path) -> None:
    shown = out_of(openssl, "x509", "-in", written_out / "leaf.pem", "-noout", "-text") or ""
    for text in ("Issuer: CN = QMesh", "CN = QMesh node", "Jan  1 00:00:00 1970 GMT", "Dec 31 23:59:59 9999 GMT"):
        assert text.replace(" ", "") in shown.replace(" ", "")
    assert "Digital Signature" in shown
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in shown
