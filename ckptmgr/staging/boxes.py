"""Boxes: which part of a whole tensor somebody holds or wants. Pure, in elements and in bytes."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from ckptmgr.types import Leaf

Ints = tuple[int, ...]


class Box(msgspec.Struct, frozen=True):
    """A rectangular part of a tensor: where it starts and how long it is, in elements.

    A tensor without dimensions is one box with no numbers; a box with a length of 0 is empty.
    """

    offset: Ints
    shape: Ints

    @property
    def count(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)

    def common(self, other: Box) -> Box | None:
        """What lies in both, or None if nothing does."""
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        pairs = [(max(a, b), min(a + n, b + m)) for a, n, b, m in ends]
        if any(start >= end for start, end in pairs):
            return None
        starts = tuple(start for start, _ in pairs)
        return Box(starts, tuple(end - start for start, end in pairs))

    def within(self, outer: Box) -> Box:
        """The same part, counted from the start of `outer`."""
        moved = zip(self.offset, outer.offset, strict=True)
        return Box(tuple(mine - theirs for mine, theirs in moved), self.shape)

    def without(self, other: Box) -> list[Box]:
        """The rest of it, as boxes that do not overlap, once `other` is taken away."""
        taken = self.common(other)
        if taken is None:
            return [self] if self.count else []
        rest: list[Box] = []
        left = self
        for at in range(len(self.shape)):
            start, stop = taken.offset[at], taken.offset[at] + taken.shape[at]
            end = left.offset[at] + left.shape[at]
            if left.offset[at] < start:
                rest.append(left._cut(at, left.offset[at], start))
            if stop < end:
                rest.append(left._cut(at, stop, end))
            left = left._cut(at, start, stop)
        return rest

    def _cut(self, at: int, start: int, stop: int) -> Box:
        offset = (*self.offset[:at], start, *self.offset[at + 1 :])
        return Box(offset, (*self.shape[:at], stop - start, *self.shape[at + 1 :]))


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def box_of(leaf: Leaf) -> Box:
    """The part of its tensor that a leaf holds; a leaf that is no shard holds all of it."""
    if leaf.global_offset is None:
        return whole(leaf.shape)
    return Box(leaf.global_offset, leaf.shape)


def whole_shape(leaf: Leaf) -> Ints:
    """The shape of the tensor that a leaf is a part of."""
    return leaf.shape if leaf.global_shape is None else leaf.global_shape


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements `start` to `stop` of a row-major tensor as boxes, in their order.

    A run of the flattened tensor is at most two boxes per dimension: the end of a row, whole
    rows, the start of a row. Each box is itself contiguous in the flattened tensor.
    """
    if start >= stop:
        return []
    if len(shape) == 0:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        inner = boxes_of_run(shape[1:], start - first * row, stop - first * row)
        return [Box((first, *b.offset), (1, *b.shape)) for b in inner]
    head = -start % row
    tail = stop % row
    found = boxes_of_run(shape, start, start + head)
    rows = (start + head) // row, (stop - tail) // row
    if rows[0] < rows[1]:
        rest = (0,) * (len(shape) - 1)
        found.append(Box((rows[0], *rest), (rows[1] - rows[0], *shape[1:])))
    return found + boxes_of_run(shape, stop - tail, stop)


def runs(part: Box, outer_shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, count) in elements of each contiguous run of `part` in a row-major tensor.

    `part` is counted from the start of that tensor.
    """
    if not part.count:
        return
    # Trailing dimensions that are taken whole make one run together with the one before them.
    depth = len(outer_shape)
    while depth and part.shape[depth - 1] == outer_shape[depth - 1]:
        depth -= 1
    depth = max(depth - 1, 0)
    strides = [math.prod(outer_shape[at + 1 :]) for at in range(len(outer_shape))]
    count = math.prod(part.shape[depth:])
    base = sum(o * s for o, s in zip(part.offset[depth:], strides[depth:], strict=True))
    for index in _indices(part.offset[:depth], part.shape[:depth]):
        yield base + sum(i * s for i, s in zip(index, strides[:depth], strict=True)), count


def spans(part: Box, outer_shape: Sequence[int], gap_max: int) -> Iterator[tuple[int, int]]:
    """(start, stop) in elements of ascending runs that hold `part`.

    As `runs`, but what lies between two runs is taken along where it is at most `gap_max` long.
    The cost grows with the number of spans, not with that of the rows.
    """
    grown = part
    for at in range(len(outer_shape) - 1, 0, -1):
        skipped = (outer_shape[at] - grown.shape[at]) * math.prod(outer_shape[at + 1 :])
        if skipped > gap_max or (skipped and grown.shape[at - 1] == 1):
            break
        grown = grown._cut(at, 0, outer_shape[at])
    if not part.count:
        return
    first, last = _ends(part, outer_shape)
    found = ((max(a, first), min(a + n, last)) for a, n in runs(grown, outer_shape))
    yield from joined(found, gap_max)


def joined(found: Iterable[tuple[int, int]], gap_max: int) -> Iterator[tuple[int, int]]:
    """Ascending (start, stop) with those made one that are at most `gap_max` apart or overlap."""
    start, stop = -1, -1
    for low, high in found:
        if stop >= 0 and low - stop <= gap_max:
            stop = max(stop, high)
            continue
        if stop >= 0:
            yield start, stop
        start, stop = low, high
    if stop >= 0:
        yield start, stop


def _ends(part: Box, outer_shape: Sequence[int]) -> tuple[int, int]:
    """Where the first element of a part lies, and the place after its last one."""
    strides = [math.prod(outer_shape[at + 1 :]) for at in range(len(outer_shape))]
    first = sum(o * s for o, s in zip(part.offset, strides, strict=True))
    return first, first + sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True)) + 1


def _indices(offset: Sequence[int], shape: Sequence[int]) -> Iterator[Ints]:
    if not shape:
        yield ()
        return
    for at in range(offset[0], offset[0] + shape[0]):
        for rest in _indices(offset[1:], shape[1:]):
            yield (at, *rest)


def gap(shape: Sequence[int], boxes: Iterable[Box]) -> Box | None:
    """A part of a tensor that none of `boxes` holds, or None if they cover it.

    The tensor is cut at the edges of the boxes along one dimension after the other, so the cost
    grows with the number of boxes and not with the number of elements.
    """
    outer = whole(shape)
    held = [box for box in boxes if box.count]
    across = outer.offset[1:], outer.shape[1:]
    if outer.shape and all((box.offset[1:], box.shape[1:]) == across for box in held):
        return _gap_in_rows(outer, held)
    return _gap(outer, [box for box in held if box.common(outer) is not None])


def _gap_in_rows(outer: Box, boxes: list[Box]) -> Box | None:
    """As `gap` where all boxes are whole rows: nearly always, and ten times quicker."""
    held = 0
    for box in sorted(boxes, key=lambda one: one.offset[0]):
        if box.offset[0] > held:
            return outer._cut(0, held, box.offset[0])
        held = max(held, box.offset[0] + box.shape[0])
    return outer._cut(0, held, outer.shape[0]) if outer.count and held < outer.shape[0] else None


def _gap(part: Box, boxes: list[Box]) -> Box | None:
    if not part.count:
        return None
    if not boxes:
        return part
    for at, length in enumerate(part.shape):
        start, stop = part.offset[at], part.offset[at] + length
        edges = {start, stop}
        for box in boxes:
            edges |= {
                e for e in (box.offset[at], box.offset[at] + box.shape[at]) if start < e < stop
            }
        if len(edges) > 2:
            return _gap_along(part, boxes, at, sorted(edges))
    return None  # nobody's edge cuts it, so whoever touches it holds all of it


def _gap_along(part: Box, boxes: list[Box], at: int, edges: list[int]) -> Box | None:
    pieces: list[list[Box]] = [[] for _ in edges[1:]]
    for box in boxes:  # each of which lies in `part`, in all other dimensions too
        first = bisect_left(edges, box.offset[at])
        end = bisect_left(edges, box.offset[at] + box.shape[at])
        for index in range(first, min(end, len(pieces))):
            pieces[index].append(box)
    for (start, stop), inside in zip(itertools.pairwise(edges), pieces, strict=True):
        offset = (*part.offset[:at], start, *part.offset[at + 1 :])
        shape = (*part.shape[:at], stop - start, *part.shape[at + 1 :])
        found = _gap(Box(offset, shape), inside)
        if found is not None:
            return found
    return None
