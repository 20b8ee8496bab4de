"""A snapshot of one process, cut by hand into the snapshots that several ranks would have made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ckptmgr.rank.regions import Regions
from ckptmgr.rank.saved import Saved
from ckptmgr.rank.tensors import carried
from ckptmgr.staging.boxes import Box, whole
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf

Cut = Callable[[Leaf], Sequence[Sequence[Box]] | None]
"""The boxes of each rank of a tensor; None for one that every rank has for itself."""


def cut(saved: Saved, world: int, boxes_of: Cut) -> list[Saved]:
    """What each of `world` ranks would have saved; a rank without a box has an empty leaf."""
    source = Regions({0: saved.data})
    made = []
    for rank in range(world):
        first: list[Leaf] = []
        more: list[Leaf] = []
        parts: list[bytes] = []
        for leaf in saved.layout.leaves:
            view = source.view(0, leaf)
            cuts = boxes_of(leaf)
            boxes = [whole(leaf.shape)] if cuts is None else list(cuts[rank])
            empty = Box((0,) * len(leaf.shape), (0, *leaf.shape[1:]))
            for at, box in enumerate(boxes or [empty]):
                piece = view[
                    tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                ]
                raw = carried(piece).contiguous().flatten().view(torch.uint8).numpy().tobytes()
                place = sum(map(len, parts))
                parts += [raw, bytes(-len(raw) % 64)]
                shard = (None, None) if cuts is None else (leaf.shape, box.offset)
                (first if at == 0 else more).append(
                    Leaf(leaf.path, leaf.dtype, box.shape, place, len(raw), *shard)
                )
        data = b"".join(parts)
        data += bytes(-len(data) % PAGE_BYTES)
        groups = (Group(0, len(data), 1, False),) if data else ()
        layout = Layout((*first, *more), groups, len(data), saved.layout.tree)
        made.append(Saved(layout, saved.values, memoryview(bytearray(data)), rank))
    return made


def by_rows(world: int) -> Cut:
    """As FSDP2 does: dimension 0 in equal pieces, the last ones shorter or empty."""

    def boxes(leaf: Leaf) -> list[list[Box]] | None:
        if not leaf.shape or not leaf.nbytes:
            return None
        return [_rows(leaf.shape, 0, rank, world) for rank in range(world)]

    return boxes


def by_columns(world: int) -> Cut:
    """As row-wise tensor parallelism does: the last dimension."""

    def boxes(leaf: Leaf) -> list[list[Box]] | None:
        if not leaf.shape or not leaf.nbytes:
            return None
        last = len(leaf.shape) - 1
        return [_rows(leaf.shape, last, rank, world) for rank in range(world)]

    return boxes


def _rows(shape: tuple[int, ...], at: int, rank: int, world: int) -> list[Box]:
    size = math.ceil(shape[at] / world)
    start, stop = min(rank * size, shape[at]), min((rank + 1) * size, shape[at])
    if start == stop:
        return []
    offset = tuple(start if n == at else 0 for n in range(len(shape)))
    return [Box(offset, tuple(stop - start if n == at else s for n, s in enumerate(shape)))]
