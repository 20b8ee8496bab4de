"""Which live memory is for which saved bytes: what has one place can hold one value only.

Where memory overlaps otherwise than by being the same (a view and its base, an expanded tensor),
the saved bits are written into a twin of that memory first, and must be found there afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckptmgr.rank.externals import GENERATORS, externalize
from ckptmgr.rank.regions import Regions, SavedLeaf
from ckptmgr.rank.tensors import carried, is_plain
from ckptmgr.staging.boxes import Box
from ckptmgr.staging.values import MAPPING_TAGS, External, fixed_attributes


@dataclass(frozen=True, slots=True)
class Claim:
    """Live memory that is to get the saved bits of `box`; `is_written` if we put them there, and
    not code of its owner. It keeps the memory, so that nothing else comes to its address.
    """

    path: str
    live: Any
    saved: SavedLeaf
    box: Box
    is_written: bool


def memory_of(live: Any) -> Hashable:
    """Equal for tensors, or arrays, that are the same elements in memory; None if there are none.

    Args:
        live: a local tensor or an array.
    """
    if isinstance(live, np.ndarray):
        return (live.ctypes.data, live.shape, live.strides, live.dtype.str) if live.nbytes else None
    if not is_plain(live) or live.is_meta or not live.numel() or not live.data_ptr():
        return None
    seen_as = live.dtype, live.is_conj(), live.is_neg()
    return (live.device, live.data_ptr(), live.shape, live.stride(), *seen_as)


def alike(one: Any, other: Any, pairs: list[tuple[SavedLeaf, SavedLeaf]]) -> bool:
    """Whether two saved items are the same but for the bits of their tensors.

    Args:
        one: a saved item.
        other: another.
        pairs: gets each two tensors that must have the same bits, too.
    """
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is SavedLeaf:
        pairs.append((one, other))
        return True
    if isinstance(one, GENERATORS):
        return alike(externalize(one, None), externalize(other, None), pairs)
    if kind is External:
        here = one.kind, one.attributes, dict(one.children)
        return alike(here, (other.kind, other.attributes, dict(other.children)), pairs)
    if kind in MAPPING_TAGS or kind in (list, tuple, deque):
        if fixed_attributes(one) != fixed_attributes(other) or len(one) != len(other):
            return False
        items = (item.items() if kind in MAPPING_TAGS else item for item in (one, other))
        return all(alike(a, b, pairs) for a, b in zip(*items, strict=True))
    # NaN is the same as itself, and 0.0 not the same as -0.0.
    is_number = isinstance(one, (float, complex, np.generic))
    return bool(repr(one) == repr(other) if is_number else one == other)


# -- memory that overlaps -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the elements of a claim are: strides in bytes, `start` and `stop` around them all."""

    claim: Claim
    device: str
    first: int
    strides: tuple[int, ...]
    item_bytes: int
    start: int
    stop: int

    @property
    def may_overlap_itself(self) -> bool:
        """Whether two of its elements may have bytes in common."""
        span = self.item_bytes
        steps = zip(map(abs, self.strides), self.claim.live.shape, strict=True)
        for stride, size in sorted(step for step in steps if step[1] > 1):
            if stride < span:
                return True
            span += stride * (size - 1)
        return False

    def elements(self, memory: Any, start: int) -> Any:
        """Its elements in other memory, whose first byte stands for the address `start`."""
        unit = gcd(self.item_bytes, 8)
        shape = *self.claim.live.shape, self.item_bytes // unit
        return np.ndarray(
            shape, f"u{unit}", memory, self.first - start, strides=(*self.strides, unit)
        )

    def saved(self, regions: Regions) -> Any:
        """What is to stand in its memory, in the form of `elements`."""
        claim = self.claim
        found = regions.gathered(claim.saved.whole, claim.box)
        if isinstance(claim.live, Tensor):
            found = found.conj().resolve_conj() if claim.live.is_conj() else found
            found = found.neg() if claim.live.is_neg() else found
        unit = gcd(self.item_bytes, 8)
        units = carried(found).flatten().view(torch.uint8).numpy().view(f"u{unit}")
        return units.reshape(*claim.live.shape, self.item_bytes // unit)


def _place_of(claim: Claim) -> _Place:
    live = claim.live
    if isinstance(live, np.ndarray):
        device, first, item_bytes, strides = "cpu", live.ctypes.data, live.itemsize, live.strides
    else:
        device, first, item_bytes = str(live.device), live.data_ptr(), live.itemsize
        strides = tuple(stride * item_bytes for stride in live.stride())
    reach = [stride * (size - 1) for stride, size in zip(strides, live.shape, strict=True)]
    start = first + sum(step for step in reach if step < 0)
    stop = first + sum(step for step in reach if step > 0) + item_bytes
    return _Place(claim, device, first, strides, item_bytes, start, stop)


def _span(claim: Claim) -> tuple[str, int, int, bool]:
    """Device, first byte, and end of what a claim reaches; whether its elements are all apart."""
    live = claim.live
    if isinstance(live, Tensor) and live.is_contiguous():  # as nearly all are
        start = live.data_ptr()
        return "cpu" if live.is_cpu else str(live.device), start, start + live.nbytes, True
    place = _place_of(claim)
    return place.device, place.start, place.stop, not place.may_overlap_itself


def _overlapping(claims: Iterable[Claim]) -> Iterator[list[_Place]]:
    """Places that have bytes in common with others, or with themselves, or may; together."""
    groups: list[list[Claim]] = []
    folded: set[int] = set()
    device, stop = "", 0
    spans = [(*_span(claim), claim) for claim in claims]
    for where, start, end, is_apart, claim in sorted(spans, key=itemgetter(0, 1)):
        if where != device or start >= stop:
            groups.append([])
            device, stop = where, end
        groups[-1].append(claim)
        stop = max(stop, end)
        if not is_apart:
            folded.add(id(claim))
    for group in groups:
        if len(group) > 1 or id(group[0]) in folded:
            yield list(map(_place_of, group))


def spoiled(claims: Iterable[Claim], regions: Regions) -> Iterator[str]:
    """What is wrong where claimed memory overlaps: claims that can not all hold what was saved."""
    for group in _overlapping(claims):
        start, stop = group[0].start, max(place.stop for place in group)
        memory = np.empty(stop - start, np.uint8)
        for place in group:
            place.elements(memory, start)[...] = place.saved(regions)
        for place in group:
            if not np.array_equal(place.elements(memory, start), place.saved(regions)):
                yield f"{place.claim.path}: {_why(place, group)}, but the saved elements differ"


def _why(place: _Place, group: list[_Place]) -> str:
    others = (one for one in group if one is not place)
    for one in others:
        if one.start < place.stop and place.start < one.stop:
            return f"shares memory with {one.claim.path} in the live state"
    return "is expanded"
