"""Which live memory is for which saved bytes: what has one place can hold one value only."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptmgr.rank.externals import GENERATORS, externalize
from ckptmgr.rank.regions import SavedLeaf
from ckptmgr.rank.tensors import is_plain
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
