"""What a live state wants of a saved one: collected first, checked, then fetched and written."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.claims import Claim, memory_of, spoiled
from ckptmgr.rank.living import empty_like, like, views
from ckptmgr.rank.overlap import CopyThread
from ckptmgr.rank.regions import Pair, Regions, SavedLeaf
from ckptmgr.rank.saved import leaves_in
from ckptmgr.rank.sources import Origin, Ranges, Whole, origins, ranges_needed
from ckptmgr.rank.tensors import carried
from ckptmgr.rank.upload import upload
from ckptmgr.staging.boxes import Box

PROBLEMS_SHOWN_MAX = 20
"""Differences told in one error; the others are counted."""


class Write(msgspec.Struct, frozen=True, eq=False):
    """A live local tensor, detached, that is to get its saved bits, as `box` of the whole one."""

    path: str
    live: Tensor
    box: Box
    origins: list[Origin]


@dataclass(frozen=True, slots=True)
class Tie:
    """One live tensor for two saved ones, which must then have the same bits."""

    path: str
    first: str
    one: Whole
    other: Whole
    box: Box


@dataclass(slots=True)
class Wants:
    """Everything that a plan wants, and what speaks against it.

    `alone`: no other process takes what this one leaves, so that it is a problem here. Else it is
    collected in `surplus`: paths that the processes must compare. `incomplete`: other saved ranks
    may have more of what is wanted.
    """

    alone: bool = True
    incomplete: bool = False
    problems: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    claims: dict[Hashable, Claim] = field(default_factory=dict)

    def write(self, path: str, live: Any, saved: SavedLeaf) -> None:
        """Want the saved bits of `live`, which has the shape of the whole, in place."""
        for box, local in views(live):
            taken = self.part(path, saved.whole, box)
            if local.is_meta:
                self.problems.append(f"{path}: is a meta tensor: it has no memory to load into")
            elif self.claim(path, local, saved, box):
                self.writes.append(Write(path, local, box, taken))

    def hold(self, path: str, live: Any, saved: SavedLeaf) -> None:
        """Say what the memory of `live`, which its owner writes, is for."""
        for box, local in views(live):
            self.claim(path, local, saved, box, is_written=False)

    def claim(
        self, path: str, live: Any, saved: SavedLeaf, box: Box, *, is_written: bool = True
    ) -> bool:
        """Whether `live`, a local tensor or an array, must be written; not again under the second
        of its names, for which the same must have been saved as for the first.
        """
        memory = memory_of(live)
        if memory is None:
            return True
        claim = Claim(path, live, saved, box, is_written)
        first = self.claims.setdefault(memory, claim)
        if first is claim:
            return True
        self.tie(path, [box], first.path, first.saved, saved)
        if first.is_written or not is_written:
            return False
        self.claims[memory] = claim
        return True

    def is_taken(self, live: Any, saved: SavedLeaf) -> bool:
        """Whether the memory of `live` is for another saved tensor already."""
        claims = (self.claims.get(memory_of(local)) for _, local in views(live))
        return any(claim is not None and claim.saved.whole is not saved.whole for claim in claims)

    def parts_like(self, path: str, pattern: Any, saved: SavedLeaf) -> None:
        """Want of a saved tensor what this process holds of `pattern`."""
        for box, _ in views(pattern):
            self.part(path, saved.whole, box)

    def tie(
        self, path: str, boxes: Iterable[Box], first: str, one: SavedLeaf, other: SavedLeaf
    ) -> None:
        """One live tensor is for two saved ones: want to know that they are alike in its boxes."""
        if one.whole is other.whole:
            return
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            self.problems.append(f"{path}: is tied to {first} in the live state, but not alike")
            return
        for box in boxes:
            self.part(path, one.whole, box)
            self.part(path, other.whole, box)
            self.ties.append(Tie(path, first, one.whole, other.whole, box))

    def part(self, path: str, found: Whole, box: Box) -> list[Origin]:
        """Want a part of a saved tensor."""
        taken, missing = origins(found, box)
        if missing is not None:
            self.problems.append(
                f"{path}: nobody saved {list(missing.shape)} at {list(missing.offset)} "
                f"of {list(found.shape)}"
            )
        self.origins += taken
        return taken

    def all_of(self, saved: Any) -> None:
        """Want every tensor in a saved object, whole."""
        for leaf in leaves_in(saved):
            self.part(leaf.whole.path, leaf.whole, leaf.whole.box)

    def leave(self, paths: Iterable[str]) -> None:
        """Say what was saved and has no place here."""
        if self.alone:
            self.problems += [f"{path}: was saved, but is not in the live state" for path in paths]
        else:
            self.surplus += paths

    def needs(self) -> dict[int, Ranges]:
        """Bytes of the data region of each saved rank that are wanted."""
        return ranges_needed(self.origins)

    def refuse(self) -> None:
        """Raise if anything speaks against it.

        Raises:
            StateMismatchError: the problems, at most 20 of them named.
        """
        if self.problems:
            raise StateMismatchError(shown(self.problems))

    def compare(self, regions: Regions) -> None:
        """Find what only the bytes can tell: more problems."""
        for tie in self.ties:
            if not _same(regions.gathered(tie.one, tie.box), regions.gathered(tie.other, tie.box)):
                self.problems.append(
                    f"{tie.path}: is tied to {tie.first} in the live state, "
                    "but they differ in the saved one"
                )
        self.problems += spoiled(self.claims.values(), regions)


def shown(problems: list[str]) -> str:
    """A message with the first problems; the others are counted."""
    lines = problems[:PROBLEMS_SHOWN_MAX]
    more = len(problems) - len(lines)
    if more:
        lines.append(f"and {more} more")
    return "the saved state does not fit the live one:\n  " + "\n  ".join(lines)


def _same(one: Tensor, other: Tensor) -> bool:
    # Bits, not values: NaN is equal to itself here.
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (carried(item).flatten().view(torch.uint8) for item in (one, other))
    return torch.equal(left, right)


def filled(pattern: Any, local: Tensor, saved: SavedLeaf, regions: Regions) -> Tensor:
    """Put into `local` the saved bits of what this process holds of `pattern`."""
    for box, view in views(pattern, local):
        taken, _ = origins(saved.whole, box)
        for target, source in regions.pairs(view, box, taken):
            carried(target).copy_(carried(source))
    return local


def part_like(pattern: Any, saved: SavedLeaf, regions: Regions) -> Tensor:
    """A new tensor with the saved bits, spread over processes as the DTensor `pattern` is."""
    local = filled(pattern, empty_like(pattern, saved.dtype), saved, regions)
    return like(pattern, local.to(pattern.device))


# -- writing --------------------------------------------------------------------------------------


def write_all(writes: Iterable[Write], regions: Regions) -> None:
    """Write into plain tensors of host memory, and of each GPU, all at once; into others one by
    one. Nothing reads `regions` any more when it returns.
    """
    plain: list[Pair] = []
    there: dict[torch.device, list[Pair]] = {}
    for write in writes:
        for live, view in regions.pairs(write.live, write.box, write.origins):
            if not live.is_contiguous() or _is_special(live) or not (live.is_cpu or live.is_cuda):
                write_one(live, view)
                continue
            pairs = plain if live.is_cpu else there.setdefault(live.device, [])
            pairs.append((carried(live), carried(view)))
    thread = CopyThread()
    try:
        for device, pairs in there.items():
            upload(device, pairs, thread)
        thread.copy([live for live, _ in plain], [view for _, view in plain])
    finally:
        thread.close()


def _is_special(live: Tensor) -> bool:
    return live.is_conj() or live.is_neg() or live.is_inference()


def write_one(live: Tensor, view: Tensor) -> None:
    """Write saved bits into a live tensor of the same shape and dtype.

    Dimensions that were expanded (stride 0) are one element in memory, and written once.
    """
    for dimension, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if size > 1 and stride == 0:
            live = live.narrow(dimension, 0, 1)
            view = view.narrow(dimension, 0, 1)
    with torch.inference_mode() if live.is_inference() else torch.no_grad():
        if live.is_conj() or live.is_neg():
            live.copy_(view)
        else:
            carried(live).copy_(carried(view))
