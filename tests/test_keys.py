"""Section 5: what a mesh is called and what its members share."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmesh import DEFAULT_TOPIC, Datagram, DatagramCodec, MeshKeys, WireError

PING = Datagram("ping", b"8 bytes.")


def test_the_same_topic_gives_the_same_keys_everywhere() -> None:
    assert MeshKeys.derive("lab") == MeshKeys.derive("lab")
    assert MeshKeys.derive("lab").name == "lab"


def test_the_open_mesh_keeps_its_keys_from_version_to_version() -> None:
    keys = MeshKeys.derive(DEFAULT_TOPIC)
    assert str(keys.topic) == "37ed93ce593a3e1576bb27ebe808b10eeb5a4c9f7ce42d05c536fb08342e4e59"
    assert keys.udp_key.hex() == "773d6575a11e4a8aa7bd958f8d09c920eb19a8a4b9c79f34aacef524a42c9825"


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, min_size=2, max_size=4))
def test_another_topic_shares_nothing(names: list[str]) -> None:
    meshes = [MeshKeys.derive(name) for name in names]
    secrets = {bytes(keys.topic) for keys in meshes} | {keys.udp_key for keys in meshes}
    assert len(secrets) == 2 * len(names)


def test_a_key_has_256_bits_and_stays_out_of_what_is_printed() -> None:
    keys = MeshKeys.derive("lab")
    assert len(keys.udp_key) == 32
    assert keys.udp_key.hex() not in repr(keys)
    assert repr(keys.udp_key) not in repr(keys)


def test_keys_never_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshKeys.derive("lab").name = "other"  # type: ignore[misc]


def test_members_of_one_mesh_understand_each_other() -> None:
    data = DatagramCodec(MeshKeys.derive("lab").udp_key).encode(PING)
    assert DatagramCodec(MeshKeys.derive("lab").udp_key).decode(data) == PING


def test_another_mesh_does_not_accept_our_datagrams() -> None:
    data = DatagramCodec(MeshKeys.derive("lab").udp_key).encode(PING)
    with pytest.raises(WireError, match="wrong mesh"):
        DatagramCodec(MeshKeys.derive("office").udp_key).decode(data)
