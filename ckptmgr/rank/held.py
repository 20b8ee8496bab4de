"""What of each tensor this rank puts into its slot: all, boxes of it, or its share of those."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptmgr.rank.parallel import Parallel, Ranks
from ckptmgr.rank.parts import LocalPart, Piece
from ckptmgr.rank.shares import share
from ckptmgr.staging.boxes import Box, whole
from ckptmgr.staging.tree import Flat


@dataclass(frozen=True, slots=True)
class Held:
    """One leaf of the layout: a box, read from a mention of a tensor in the state.

    `piece` is where in the local tensor (None: it is all of it); `global_shape` is None if the
    leaf belongs to this rank alone.
    """

    mention: int
    path: str
    box: Box
    piece: Piece | None = None
    global_shape: tuple[int, ...] | None = None


def held_by(
    flat: Flat,
    parts: Sequence[LocalPart],
    order: Sequence[int],
    paths: Sequence[str],
    around: Parallel,
) -> list[Held]:
    """The leaves of a flattened state: those of one mention together, the mentions in `order`."""
    found: list[Held] = []
    replicated: defaultdict[Ranks, list[int]] = defaultdict(list)
    for at in order:
        ranks = around.holders(flat.leaves[at], flat.trails[at], paths[at])
        pieces = _all_held(at, parts[at], paths[at], is_shared=ranks is not None)
        if ranks and len(ranks) > 1:
            places = enumerate(pieces, len(found))
            replicated[ranks] += [place for place, one in places if one.box.shape]
        found += pieces
    for ranks, alike in replicated.items():
        _keep_shares(found, alike, parts, ranks.index(around.rank), len(ranks))
    return found


def _all_held(mention: int, part: LocalPart, path: str, *, is_shared: bool) -> list[Held]:
    """Every box that is in the memory of this rank."""
    local = whole(part.tensor.shape)
    if not part.pieces:
        if part.global_shape is None:
            return [Held(mention, path, local, None, tuple(local.shape) if is_shared else None)]
        return [_nothing(mention, path)]
    shape = part.global_shape if is_shared else None
    return [
        Held(mention, path, piece.box, None if _is_all(piece, local) else piece, shape)
        for piece in part.pieces
    ]


def _nothing(mention: int, path: str) -> Held:
    """No element of a tensor without dimensions: there is no empty box of it, so it is private."""
    none = Box((0,), (0,))
    return Held(mention, path, none, Piece(none, (slice(0, 0),), flat=True))


def _is_all(piece: Piece, local: Box) -> bool:
    return not piece.flat and piece.box.shape == local.shape


def _keep_shares(
    found: list[Held], places: list[int], parts: Sequence[LocalPart], index: int, replicas: int
) -> None:
    """Cut the leaves at `places`, which `replicas` ranks have alike, down to the share of one.

    A tensor without dimensions can not be cut: all replicas save it.
    """
    # All replicas cut the same run of bytes, whatever the order in which each has its state.
    places.sort(key=lambda at: (found[at].path, found[at].box.offset))
    sizes = []
    for at in places:
        rows, *rest = found[at].box.shape
        itemsize = parts[found[at].mention].tensor.dtype.itemsize
        sizes.append((rows, math.prod(rest) * itemsize))
    for at, (start, stop) in zip(places, share(sizes, replicas, index), strict=True):
        one = found[at]
        if (start, stop) != (0, one.box.shape[0]):
            piece = (one.piece or _whole_piece(one.box)).rows(start, stop)
            found[at] = replace(one, box=piece.box, piece=piece)


def _whole_piece(box: Box) -> Piece:
    return Piece(box, tuple(slice(0, length) for length in box.shape))
