"""Copies that leave the link to others: piece by piece, no faster than a limit."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from ckptmgr.bucket import Bucket

PIECE_BYTES = 16 << 20
"""0.6 ms of a link of 25 GB/s: what else goes over it waits no longer for one piece."""

Pair = tuple[Tensor, Tensor]
"""Where to, and where from."""


class Waited(Protocol):
    """Knows whether somebody waits for the copy."""

    def rests(self) -> bool:
        """Whether the training thread waits for it."""

    def wait_for_rest(self, timeout_seconds: float) -> None:
        """Wait until it does; may return early."""


def paced(pairs: list[Pair], limit: Bucket, turn: Waited) -> Iterator[list[Pair]]:
    """The pairs in pieces, each when it may begin: at once, as soon as training waits for them."""
    for piece in pieces(pairs):
        begins_at = time.monotonic() + limit.reserve(sum(source.nbytes for _, source in piece))
        while (left := begins_at - time.monotonic()) > 0 and not turn.rests():
            turn.wait_for_rest(left)
        yield piece


def pieces(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The same bytes in lists of at most PIECE_BYTES; larger tensors are cut."""
    piece: list[Pair] = []
    size = 0
    for pair in pairs:
        for part in parts(pair, PIECE_BYTES):
            if piece and size + part[1].nbytes > PIECE_BYTES:
                yield piece
                piece, size = [], 0
            piece.append(part)
            size += part[1].nbytes
    if piece:
        yield piece


def shares(pairs: list[Pair], count: int) -> list[list[Pair]]:
    """The same bytes in at most `count` lists of about as many each; large tensors are cut."""
    cut: list[Pair] = []
    for pair in pairs:
        cut += [pair] if pair[0].nbytes <= PIECE_BYTES else parts(pair, PIECE_BYTES)
    ends = list(accumulate(target.nbytes for target, _ in cut))
    cuts = [bisect_left(ends, ends[-1] * at // count) for at in range(count)] + [len(cut)]
    return [cut[start:stop] for start, stop in pairwise(cuts) if start < stop]


def parts(pair: Pair, nbytes_max: int) -> Iterator[Pair]:
    """The same bytes in pairs of at most so many each."""
    target, source = pair
    if source.nbytes <= nbytes_max:
        yield pair
        return
    dim = max(range(source.dim()), key=lambda at: source.shape[at])
    length = source.shape[dim]
    step = max(1, length * nbytes_max // source.nbytes)
    with torch.no_grad():
        cut = [
            (
                target.narrow(dim, at, min(step, length - at)),
                source.narrow(dim, at, min(step, length - at)),
            )
            for at in range(0, length, step)
        ]
    for part in cut:
        yield from parts(part, nbytes_max)
