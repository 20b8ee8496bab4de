"""What the machine allows: one copy into memory that is present, and a process that writes it."""

from __future__ import annotations

import math
import mmap
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from bench.beside.disk import BLOCK_BYTES, evict, write_file
from bench.beside.peer import Peer, State

PAGE_BYTES = 4096


class Floor(Peer):
    """No checks, no commit, no second slot: nothing can be faster and still be on the disk."""

    def open(self) -> None:
        places, total = _places(self.state)
        self.memory = mmap.mmap(-1, total)  # shared with the writer
        flat = torch.frombuffer(self.memory, dtype=torch.uint8)
        flat.zero_()
        self.views = _views(flat, places, self.state)
        direct = self._direct_is_faster()
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        if os.fork() == 0:
            os.close(self.orders)
            _serve(orders, answers, memoryview(self.memory), direct=direct)
        os.close(orders)
        os.close(answers)

    def _direct_is_faster(self) -> bool:
        """Which way this disk likes better is no secret that a library should have to guess."""
        path, took = self.directory / f"probe{self.rank}", {}
        for direct in (True, False):
            write = partial(write_durably, path, memoryview(self.memory), direct=direct)
            took[direct] = _fastest([write], 2, partial(path.unlink, missing_ok=True))
        path.unlink()
        return took[True] < took[False]

    def save(self, step: int) -> None:
        _copy(self.views, self.state)
        os.write(self.orders, os.fsencode(self.of_rank(step, ".bin")))

    def wait(self) -> None:
        if os.read(self.answers, 1) != b"k":
            raise OSError("the writer of the floor has failed")

    def restore(self, step: int) -> None:
        descriptor = os.open(self.of_rank(step, ".bin"), os.O_RDONLY)
        for at, tensor in zip(_places(self.state)[0], self.state.values(), strict=True):
            assert os.preadv(descriptor, [tensor.view(torch.uint8).numpy()], at) == tensor.nbytes
        os.close(descriptor)


def _places(state: State) -> tuple[list[int], int]:
    places, at = [], 0
    for tensor in state.values():
        places.append(at)
        at += -(-tensor.nbytes // PAGE_BYTES) * PAGE_BYTES
    return places, at


def _views(flat: torch.Tensor, places: list[int], state: State) -> list[torch.Tensor]:
    return [
        flat[at : at + tensor.nbytes].view(tensor.dtype)
        for at, tensor in zip(places, state.values(), strict=True)
    ]


def _serve(orders: int, answers: int, memory: memoryview, *, direct: bool) -> None:
    """Write the memory to each path that comes in, until there are no more."""
    try:
        while path := os.read(orders, PAGE_BYTES):
            write_durably(os.fsdecode(path), memory, direct=direct)
            os.write(answers, b"k")
    finally:
        os._exit(0)


def write_durably(path: str | Path, memory: memoryview, *, direct: bool) -> None:
    """Big blocks under another name, fsync, rename, fsync of the folder."""
    write_file(f"{path}.tmp", memory, direct=direct)
    os.rename(f"{path}.tmp", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def limits(directory: Path, state: State, world: int, repeat: int) -> dict[str, float]:
    """Seconds of a bare copy of one rank's state, and of a bare write and a cold read of all
    ranks' bytes; of two ways to write and to read the faster counts.
    """
    places, total = _places(state)
    memory = mmap.mmap(-1, total * world)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    flat.random_(to=256)
    views = _views(flat, places, state)
    path = directory / "bare"
    ways = (True, False)
    write = [partial(write_durably, path, memoryview(memory), direct=way) for way in ways]
    read = [partial(_read, path, memory, way) for way in ways]
    found = {
        "write_s": _fastest(write, repeat, partial(path.unlink, missing_ok=True)),
        "read_s": _fastest(read, repeat, partial(evict, directory)),
        "copy_s": _fastest([partial(_copy, views, state)], 2 * repeat + 1, lambda: None),
    }
    path.unlink()
    return found


def _copy(views: list[torch.Tensor], state: State) -> None:
    for view, tensor in zip(views, state.values(), strict=True):
        view.copy_(tensor)


def _read(path: Path, memory: mmap.mmap, direct: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    view = memoryview(memory)
    for at in range(0, len(view), BLOCK_BYTES):
        os.readv(descriptor, [view[at : at + BLOCK_BYTES]])
    os.close(descriptor)


def _fastest(ways: list[Callable[[], None]], repeat: int, before: Callable[[], None]) -> float:
    medians = []
    for way in ways:
        with suppress(OSError):  # a file system without O_DIRECT: the other way is what there is
            medians.append(statistics.median(_seconds(way, before) for _ in range(repeat)))
    return min(medians, default=math.inf)


def _seconds(way: Callable[[], None], before: Callable[[], None]) -> float:
    before()
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
