"""From random tilings over ranks come exactly the wanted elements, each once, and few bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.rank import sources
from ckptmgr.rank.regions import Regions
from ckptmgr.rank.sources import Origin, Sources, Table, origins, own_rank, ranges_needed
from ckptmgr.rank.tensors import carried, dtype_of
from ckptmgr.staging.boxes import Box, whole
from ckptmgr.types import Layout, Leaf

Ints = tuple[int, ...]


@st.composite
def parts(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """A tiling of a box: cut somewhere along some dimension, again and again."""
    longest = max(box.shape, default=0)
    if depth == 0 or longest < 2 or not draw(st.booleans()):
        return [box]
    at = draw(st.sampled_from([n for n, size in enumerate(box.shape) if size > 1]))
    cut = draw(st.integers(1, box.shape[at] - 1))
    start = box.offset[at]
    first = Box(box.offset, (*box.shape[:at], cut, *box.shape[at + 1 :]))
    second = Box(
        (*box.offset[:at], start + cut, *box.offset[at + 1 :]),
        (*box.shape[:at], box.shape[at] - cut, *box.shape[at + 1 :]),
    )
    return [*draw(parts(first, depth - 1)), *draw(parts(second, depth - 1))]


@st.composite
def subboxes(draw: st.DrawFn, shape: Ints) -> Box:
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    sides = zip(shape, offset, strict=True)
    return Box(offset, tuple(draw(st.integers(0, size - start)) for size, start in sides))


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def scattered(full: np.ndarray[Any, Any], held: list[list[Box]]) -> dict[int, tuple[Table, bytes]]:
    """Tables and data of ranks that hold these boxes of one tensor."""
    made = {}
    for rank, boxes in enumerate(held):
        leaves, data = [], b""
        for box in boxes:
            raw = np.ascontiguousarray(full[slices(box)]).tobytes()
            leaves.append(
                Leaf("x", "int32", box.shape, len(data), len(raw), full.shape, box.offset)
            )
            data += raw + bytes(-len(raw) % 64)
        empty = Leaf("x", "int32", (0,) * max(1, full.ndim), 0, 0, full.shape, (0,) * full.ndim)
        made[rank] = Table(rank, Layout(tuple(leaves or [empty]), (), len(data), b""), b""), data
    return made


@settings(deadline=None, max_examples=300)
@given(st.data(), st.lists(st.integers(1, 7), max_size=4).map(tuple), st.integers(1, 4))
def test_planned_copies_give_exactly_the_wanted_elements(
    data: Any, shape: Ints, world: int
) -> None:
    full = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    held: list[list[Box]] = [[] for _ in range(world)]
    for box in data.draw(parts(whole(shape), 4)):
        held[data.draw(st.integers(0, world - 1))].append(box)
    for rank in range(world):  # some more that overlap
        if data.draw(st.booleans()):
            held[rank].append(data.draw(subboxes(shape)))
    found = scattered(full, held)
    own = data.draw(st.integers(0, world - 1))
    tables = [table for table, _ in found.values()]
    tensor = Sources(tables, own).whole(found[own][0], 0)
    wanted = data.draw(subboxes(shape))
    taken, missing = origins(tensor, wanted)
    assert missing is None
    count = np.zeros(shape, dtype=int)
    for piece in taken:
        count[slices(piece.box)] += 1
    expected = np.zeros(shape, dtype=int)
    expected[slices(wanted)] = 1
    assert np.array_equal(count, expected), "each wanted element comes from exactly one leaf"
    # Only the needed ranges are there; the others hold rubbish.
    memory = {}
    for rank, ranges in ranges_needed(taken).items():
        raw = found[rank][1]
        lent = bytearray(b"\xee" * len(raw))
        for start, stop in ranges:
            lent[start:stop] = raw[start:stop]
        memory[rank] = memoryview(lent)
    result = Regions(memory).gathered(tensor, wanted)
    assert np.array_equal(result.numpy(), full[slices(wanted)])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_ranges_hold_little_more_than_the_wanted_bytes(data: Any, shape: Ints) -> None:
    """With rows longer than the merge distance, which is 16 elements here."""
    shape = (*shape, data.draw(st.integers(400, 600)))
    leaf = Leaf("x", "int32", shape, 128, 4 * math.prod(shape), shape, (0,) * len(shape))
    table = Table(0, Layout((leaf,), (), 0, b""), b"")
    wanted = data.draw(subboxes(shape))
    length = data.draw(st.integers(1, shape[-1]))
    start = data.draw(st.integers(0, shape[-1] - length))
    wanted = Box((*wanted.offset[:-1], start), (*wanted.shape[:-1], length))
    taken, _ = origins(Sources([table], 0).whole(table, 0), wanted)
    before = sources.MERGE_BYTES_MAX
    try:
        sources.MERGE_BYTES_MAX = 64
        ranges = ranges_needed(taken).get(0, ())
    finally:
        sources.MERGE_BYTES_MAX = before
    inside = np.zeros(128 + leaf.nbytes, dtype=bool)
    numbers = np.arange(math.prod(shape)).reshape(shape)[slices(wanted)].reshape(-1)
    for byte in range(4):
        inside[128 + numbers * 4 + byte] = True
    covered = np.zeros_like(inside)
    for first, stop in ranges:
        assert not covered[first:stop].any(), "ranges do not overlap"
        covered[first:stop] = True
    assert not (inside & ~covered).any(), "every wanted byte is asked for"
    for at in range(len(ranges) - 1):
        assert ranges[at + 1][0] - ranges[at][1] > 64
    between = shape[-1] - length
    if not between or between > 16:
        assert covered.sum() <= inside.sum() * 1.1
    else:
        assert covered.sum() <= inside.sum() + len(numbers) // length * 64


DTYPES = ("float8_e4m3fn", "float16", "bfloat16", "float32", "complex32", "complex64", "complex128")


@settings(deadline=None, max_examples=100)
@given(st.data(), st.lists(st.integers(1, 5), max_size=3).map(tuple), st.sampled_from(DTYPES))
def test_a_leaf_that_is_all_of_its_tensor_reads_as_its_parts_do(
    data: Any, shape: Ints, dtype: str
) -> None:
    """The short way of a whole leaf, and the way over boxes, on the same bytes."""
    size = dtype_of(dtype).itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size)) * math.prod(shape)
    raw = bytes(at * 7 % 251 ^ byte for at, byte in enumerate(raw))
    place = (shape, (0,) * len(shape)) if data.draw(st.booleans()) else (None, None)
    one = Leaf("x", dtype, shape, 3 * size, len(raw), *place)
    tiles = list(data.draw(st.permutations(data.draw(parts(whole(shape), 4)))))
    elements = np.frombuffer(raw, f"V{size}").reshape(shape)
    pieces = [np.ascontiguousarray(elements[slices(tile)]).tobytes() for tile in tiles]
    starts = np.cumsum([0, *map(len, pieces)]).tolist()
    cut = [
        Leaf("x", dtype, tile.shape, start, len(piece), shape, tile.offset)
        for tile, start, piece in zip(tiles, starts, pieces, strict=False)
    ]
    wanted = data.draw(st.one_of(st.just(whole(shape)), subboxes(shape)))
    found = []
    for leaves, region in (([one], bytes(3 * size) + raw), (cut, b"".join(pieces))):
        table = Table(0, Layout(tuple(leaves), (), len(region), b""), b"")
        tensor = Sources([table], 0).whole(table, 0)
        taken, missing = origins(tensor, wanted)
        assert missing is None
        asked = ranges_needed(taken)
        lent = bytearray(b"\xee" * len(region))
        for start, stop in asked.get(0, ()):
            lent[start:stop] = region[start:stop]
        result = Regions({0: memoryview(lent)}).gathered(tensor, wanted)
        assert (result.dtype, tuple(result.shape)) == (dtype_of(dtype), wanted.shape)
        found.append(carried(result).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if leaves == [one] and wanted == whole(shape):
            assert taken == [Origin(0, one, wanted)]
            assert asked == {0: ((one.offset, one.offset + one.nbytes),)}
    assert found[0] == found[1] == elements[slices(wanted)].tobytes()


def test_a_leaf_outside_of_the_region_is_refused() -> None:
    """Its region may be shorter than the layout says, or not there at all."""
    for rank, nbytes in ((0, 4095), (0, 0), (1, 4096)):
        leaf = Leaf("x", "float32", (512,), 2048, 2048)
        regions = Regions({rank: memoryview(bytearray(nbytes))})
        with pytest.raises(HostBufferDamagedError, match="outside of the data of rank 0"):
            regions.view(0, leaf)


def test_what_nobody_holds_is_told() -> None:
    leaf = Leaf("x", "int32", (2, 4), 0, 32, (4, 4), (0, 0))
    table = Table(0, Layout((leaf,), (), 0, b""), b"")
    taken, missing = origins(Sources([table], 0).whole(table, 0), whole((4, 4)))
    assert [piece.box for piece in taken] == [Box((0, 0), (2, 4))]
    assert missing == Box((2, 0), (2, 4))


def test_the_own_rank_stands_first_then_the_lowest() -> None:
    leaf = Leaf("x", "int32", (4,), 0, 16, (4,), (0,))
    tables = [Table(rank, Layout((leaf,), (), 0, b""), b"") for rank in (3, 0, 2)]
    found = Sources(tables, 2)
    assert [table.rank for table in found.tables] == [2, 0, 3]
    taken, _ = origins(found.whole(found.tables[0], 0), whole((4,)))
    assert [piece.rank for piece in taken] == [2]
    assert [own_rank(rank, 3) for rank in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "leaf",
    [
        Leaf("x", "int32", (2,), 0, 8, (4,), (3,)),
        Leaf("x", "int32", (2,), 0, 8, (4,), (-1,)),
        Leaf("x", "int32", (2,), 0, 8, (4, 1), (0, 0)),
        Leaf("x", "int32", (2,), 0, 8, (4,), None),
        Leaf("x", "int32", (2,), 2, 8, (4,), (0,)),
        Leaf("x", "int64", (1,), 0, 8, (4,), (0,)),
        Leaf("x", "int32", (1,), 0, 4, (5,), (0,)),
    ],
)
def test_leaves_that_contradict_the_whole_or_each_other_are_refused(leaf: Leaf) -> None:
    good = Leaf("x", "int32", (2,), 0, 8, (4,), (0,))
    tables = [Table(rank, Layout((one,), (), 0, b""), b"") for rank, one in enumerate((good, leaf))]
    with pytest.raises(HostBufferDamagedError):
        Sources(tables, 0)


def test_an_empty_share_of_a_number_holds_nothing() -> None:
    number = Leaf("x", "float32", (), 0, 4, (), ())
    empty = Leaf("x", "float32", (0,), 0, 0, (), ())
    tables = [
        Table(rank, Layout((one,), (), 0, b""), b"") for rank, one in enumerate((empty, number))
    ]
    found = Sources(tables, 0).whole(tables[0], 0)
    assert found.shape == ()
    taken, missing = origins(found, whole(()))
    assert (missing, [piece.rank for piece in taken]) == (None, [1])
    memory = {1: memoryview(bytearray(np.float32(2.5).tobytes()))}
    assert torch.equal(Regions(memory).gathered(found, whole(())), torch.tensor(2.5))
