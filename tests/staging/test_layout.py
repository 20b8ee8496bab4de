"""Layouts that do not hold together are refused before anything is done with them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.staging.layout import decode_layout, encode_layout
from ckptmgr.types import Group, Layout, Leaf

P = 4096
GOOD = Layout(
    (Leaf("a", "float32", (8,), 0, 32), Leaf("b", "int8", (0,), 32, 0)),
    (Group(0, P, 4, True), Group(P, 2 * P, 1, False)),
    3 * P,
    b"\x90",
)


def decode(layout: object) -> Layout:
    return decode_layout(msgspec.msgpack.encode(layout), subject="here")


def changed(**fields: object) -> Layout:
    return msgspec.structs.replace(GOOD, **fields)


def test_a_layout_comes_back() -> None:
    assert decode_layout(encode_layout(GOOD), subject="here") == GOOD
    assert decode(Layout((), (), 0, b"")) == Layout((), (), 0, b"")


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (changed(data_bytes=2 * P), "does not cover"),
        (changed(data_bytes=4 * P), "does not cover"),
        (changed(groups=(Group(0, P, 4, True), Group(0, 2 * P, 1, False))), "overlapping"),
        (changed(groups=(Group(0, P, 4, True), Group(2 * P, P, 1, False))), "overlapping"),
        (changed(groups=(Group(P, 2 * P, 1, False), Group(0, P, 4, True))), "overlapping"),
        (changed(groups=(Group(0, 3 * P - 1, 4, True),)), "overlapping"),
        (changed(groups=(Group(0, 4 * P, 4, True), Group(4 * P, -P, 1, False))), "overlapping"),
        (changed(groups=(Group(0, 3 * P, 0, True),)), "overlapping"),
        (changed(groups=(Group(0, 3 * P, 17, True),)), "overlapping"),
        (changed(leaves=(Leaf("a", "int8", (1,), -1, 1),)), "leaf a is out of bounds"),
        (changed(leaves=(Leaf("a", "int8", (1,), 0, -1),)), "leaf a is out of bounds"),
        (changed(leaves=(Leaf("a", "int8", (1,), 3 * P, 1),)), "leaf a is out of bounds"),
        (changed(leaves=(Leaf("a", "int8", (1,), 0, 3 * P + 1),)), "leaf a is out of bounds"),
    ],
)
def test_a_layout_that_does_not_hold_together_is_refused(layout: Layout, what: str) -> None:
    with pytest.raises(HostBufferDamagedError, match=what) as caught:
        decode(layout)
    assert caught.value.subject == "here"


@pytest.mark.parametrize(
    "encoded", [b"", b"\x90", b"\xc1", b"\x91" * 5000, encode_layout(GOOD)[:-1]]
)
def test_what_is_no_layout_is_refused(encoded: bytes) -> None:
    with pytest.raises(HostBufferDamagedError, match="can not be read"):
        decode_layout(encoded, subject="here")


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_do_anything_else_than_decode_or_be_refused(noise: bytes, at: int) -> None:
    good = encode_layout(GOOD)
    encoded = good[: at % len(good)] + noise + good[at % len(good) + len(noise) :]
    try:
        found = decode_layout(encoded, subject="here")
    except HostBufferDamagedError:
        return
    assert all(0 <= leaf.offset <= found.data_bytes - leaf.nbytes for leaf in found.leaves)
