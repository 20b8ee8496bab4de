"""Host memory that is not locked goes to a GPU through some that is.

CUDA brings it there with one thread, 6 GiB/s of 50, and to lock it first takes as long. Several
threads that copy it into locked memory, while what is there already goes to the GPU, are four times
faster (docs/performance.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from ckptmgr.rank.frame import LEAF_ALIGN_BYTES
from ckptmgr.rank.overlap import CopyThread, start_copy
from ckptmgr.rank.pagelocks import PageLocks
from ckptmgr.rank.pieces import Pair, parts
from ckptmgr.staging.hostbuffer import round_up

HALF_BYTES = 64 << 20
"""1.3 ms of the link to the GPU, in which the other half is filled."""

PART_BYTES = 4 << 20
"""Sixteen for each half, so that eight threads end at about the same time."""


def upload(device: torch.device, pairs: list[Pair], thread: CopyThread) -> None:
    """Copy to tensors on `device`; everything is in place when it returns.

    Args:
        device: a GPU.
        pairs: contiguous live tensors and views of host memory, in carrier dtypes.
        thread: copies into the locked memory.
    """
    stream = torch.cuda.current_stream(device)
    total = sum(round_up(view.nbytes, LEAF_ALIGN_BYTES) for _, view in pairs)
    half_bytes = min(HALF_BYTES, max(total, 1))
    memory = mmap.mmap(-1, 2 * half_bytes)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    free: list[torch.cuda.Event | None] = [None, None]
    with PageLocks() as locks:
        if total > PART_BYTES:
            locks.lock(memoryview(memory))
        try:
            for number, (placed, batch) in enumerate(_batches(whole, half_bytes, pairs)):
                sent = free[number % 2]
                if sent is not None:
                    sent.synchronize()
                thread.copy(placed, [view for _, view in batch])
                start_copy([live for live, _ in batch], placed)
                sent = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                sent.record(stream)
                free[number % 2] = sent
        finally:
            stream.synchronize()  # nothing reads the memory any more


def _batches(
    whole: Tensor, half_bytes: int, pairs: list[Pair]
) -> Iterator[tuple[list[Tensor], list[Pair]]]:
    """Pairs that fit into one half, and their places in it; in one half and the other by turns."""
    placed: list[Tensor] = []
    batch: list[Pair] = []
    start = at = 0
    for pair in pairs:
        for live, view in parts(_flat(pair), PART_BYTES):
            if at + view.nbytes > start + half_bytes:
                yield placed, batch
                placed, batch = [], []
                start = at = half_bytes - start
            place = whole[at : at + view.nbytes].view(view.dtype).view(view.shape)
            placed.append(place)
            batch.append((live, view))
            at += round_up(view.nbytes, LEAF_ALIGN_BYTES)
    if batch:
        yield placed, batch


def _flat(pair: Pair) -> Pair:
    """In one dimension, so that what is cut stays contiguous."""
    live, view = pair
    return (live.view(-1), view.view(-1)) if view.is_contiguous() else pair
