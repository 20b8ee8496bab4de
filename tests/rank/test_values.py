"""The typed encoding: everything it takes comes back the same, and no bytes can hurt its reader."""

from __future__ import annotations

import contextlib
import datetime as dt
import pathlib
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr.errors import RecordDamagedError, UnsupportedLeafError
from ckptmgr.staging import values as v
from ckptmgr.staging.paths import render, segment
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.staging.values import External, encode_values
from rank.shape import difference

FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ZONES = st.one_of(
    st.none(),
    st.just(dt.UTC),
    st.builds(
        dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)), st.text()
    ),
)
FLOATS = st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack("<d", raw)[0])
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
HASHABLE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT,
    st.binary(max_size=4),
    st.tuples(st.integers(), TEXT), st.frozensets(st.integers(), max_size=3), st.dates(),
)  # fmt: skip
SCALARS = st.one_of(
    HASHABLE,
    st.integers(-(1 << 200), 1 << 200),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    st.binary(max_size=9).map(bytearray),
    st.datetimes(timezones=ZONES),
    st.times(timezones=ZONES),
    st.timedeltas(),
    TEXT.filter(lambda text: "\0" not in text).map(pathlib.PurePosixPath),
    st.builds(range, st.integers(), st.integers(), st.integers(1)),
    st.builds(slice, st.none() | st.integers(), st.integers(), st.none()),
    st.sampled_from([np.float32(-0.0), np.int64(-1), np.uint8(255), np.bool_(1), np.str_("x\0")]),
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(HASHABLE, inner, max_size=4)
    few = st.lists(inner, max_size=4)
    return st.one_of(
        few,
        few.map(tuple),
        few.map(deque),
        few.map(lambda items: deque(items, maxlen=9)),
        mapping,
        mapping.map(OrderedDict),
        mapping.map(lambda items: defaultdict(list, items)),
        st.dictionaries(HASHABLE, st.integers(), max_size=4).map(Counter),
        st.sets(HASHABLE, max_size=4),
    )


STATES = st.recursive(SCALARS, _containers, max_leaves=12)


def nothing(_item: Any, _trail: Any) -> External | None:
    return None


def encode(*items: Any) -> bytes:
    return encode_values([(item, (None, at)) for at, item in enumerate(items)], nothing)


@FAST
@given(STATES)
def test_every_value_comes_back_the_same(item: Any) -> None:
    (found,) = decode_values(encode(item))
    assert difference([item], [found]) == ""


def test_order_of_a_dict_is_kept() -> None:
    items = {5: 1, "b": 2, None: 3, "a": 4, (1,): 5}
    assert list(decode_values(encode(items))[0]) == list(items)


def test_a_counter_keeps_its_counts() -> None:
    assert decode_values(encode(Counter(a=2, b=-1))) == [Counter(a=2, b=-1)]


@pytest.mark.parametrize("item", [object(), lambda: 0, type, Ellipsis])
def test_what_has_no_encoding_is_refused_with_its_path(item: Any) -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        encode_values([({"a": [1, {None: item}]}, (None, "top"))], nothing)
    assert caught.value.subject == "top/a/1/(None)"


def test_a_cycle_and_deep_nesting_are_refused() -> None:
    cycle: dict[str, Any] = {}
    cycle["x"] = [cycle]
    deep: Any = None
    for _ in range(101):
        deep = [deep]
    for item in (cycle, deep):
        with pytest.raises(UnsupportedLeafError, match="more than 100 deep"):
            encode(item)
    (found,) = decode_values(encode(deep[0]))
    assert found == deep[0]


# -- damage -----------------------------------------------------------------------------------


def read_all(raw: bytes) -> None:
    """Read bytes as values and as a tree; only our errors may come out."""
    for read in (
        lambda: decode_values(raw, subject="x"),
        lambda: decode_tree(raw, [1, [2]], lambda index, flags: (index, flags), subject="x"),
    ):
        with contextlib.suppress(RecordDamagedError):
            read()


@settings(FAST, max_examples=300)
@given(st.binary(max_size=60))
def test_random_bytes_never_hurt(raw: bytes) -> None:
    read_all(raw)


@settings(FAST, max_examples=300)
@given(STATES, st.data())
def test_flipped_and_cut_bytes_never_hurt(item: Any, data: st.DataObject) -> None:
    raw = bytearray(encode(item))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    read_all(bytes(raw[: data.draw(st.integers(1, len(raw)))]))


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 30), st.integers(-(1 << 63), (1 << 64) - 1),
              FLOATS, st.text(max_size=3), st.binary(max_size=9),
              st.sampled_from(["<f4", "|O", "<M8[ns]", "<U3", "deque", "U", "|V3", "<f4" * 9])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=10),
        st.tuples(st.integers(0, 25), st.lists(inner, max_size=10)).map(lambda p: [p[0], *p[1]]),
    ),
    max_leaves=15,
)  # fmt: skip


@settings(FAST, max_examples=800)
@given(JUNK)
def test_malformed_items_never_hurt(form: Any) -> None:
    read_all(msgspec.msgpack.encode(form))
    read_all(msgspec.msgpack.encode([form]))


@pytest.mark.parametrize(
    "form",
    [
        [v.LIST, [v.BIG_INT, "x"]],
        [v.SET, [v.LIST]],
        [v.DICT, [v.LIST], 1],
        [v.DICT, 1],
        [v.DEFAULT_DICT, "eval"],
        [v.DEFAULT_DICT, "__import__"],
        [v.NUMPY_SCALAR, "|O8", b"12345678"],
        [v.NUMPY_SCALAR, "<f4", b"123"],
        [v.PATH, -1, "x"],
        [v.RANGE, 1, 2, 0],
        [v.DATETIME, 0, 0, 0, 0, 0, 0, 0, 0, None, None],
        [v.TIMEDELTA, 1 << 62, 0, 0],
        [v.DEQUE, -1],
        [v.STATE_DICT],
        [v.LEAF, -1, 0],
        [v.LEAF, 0],
        [v.VALUE, 7],
        [v.EXTERNAL, 1, 2],
        [99],
        [],
        {"a": 1},
        dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    ],
)
def test_each_malformed_item_is_a_damaged_record(form: Any) -> None:
    raw = msgspec.msgpack.encode(form)
    with pytest.raises(RecordDamagedError):
        decode_tree(raw, [], lambda index, flags: (index, flags))


@pytest.mark.parametrize(
    "raw",
    [
        b"\xdd\xff\xff\xff\xff" + b"\x01" * 9,  # an array of 4 billion items
        b"\xc6\xff\xff\xff\xffabc",  # 4 GiB of bytes
        b"\x91" * 50_000,
        b"\x92\x05" * 400 + b"\x01",
        b"\xd4\x01\x00",
        b"",
    ],
)
def test_lying_lengths_and_depths_cost_nothing(raw: bytes) -> None:
    with pytest.raises(RecordDamagedError):
        decode_tree(raw, [], lambda index, flags: (index, flags))


# -- paths ------------------------------------------------------------------------------------


@FAST
@given(HASHABLE, HASHABLE)
def test_two_keys_never_share_a_segment(left: Any, right: Any) -> None:
    if left != right:
        assert segment(left) != segment(right)
    assert "/" not in segment(left)
    assert "\0" not in segment(left)


@FAST
@given(st.lists(HASHABLE, max_size=4), st.lists(HASHABLE, max_size=4))
def test_two_places_never_share_a_path(left: list[Any], right: list[Any]) -> None:
    def path(keys: list[Any]) -> str:
        trail = None
        for key in keys:
            trail = (trail, key)
        return render(trail)

    if left != right:
        assert path(left) != path(right)
    path(left).encode()


def test_common_paths_are_readable() -> None:
    trail: Any = ((((None, "optimizer"), "state"), 0), "exp_avg")
    assert render(trail) == "optimizer/state/0/exp_avg"
    assert render(((None, "model"), "layers.0.weight")) == "model/layers.0.weight"
    assert segment("0") == "'0'"
    assert segment("a/b%") == "a%2Fb%25"
