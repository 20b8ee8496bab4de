"""Writes of packs onto an emulated 3FS mount: over rings, without, and by a bare ring client.

    python tests/bench/hf3fs_bench.py [--rounds 7] [--mib 64] [--in-flight 2]

The three take turns in every round, so that what else the machine does meets all of them; medians
are told, and two ratios: rings over POSIX writes (aim: above 1), and the store over a ring client
that does nothing but move the bytes into open files (aim: 0.9). Figures are the emulator's, which
is Python: only their ratios say something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckptmgr.config import MIB
from ckptmgr_hf3fs.client import Registered, Transfer
from ckptmgr_hf3fs.own import OwnClient, OwnRing
from ckptmgr_hf3fs.regions import PIECE_BYTES_MAX
from ckptmgr_hf3fs.session import ENTRIES
from ckptmgr_hf3fs.shm import linked_shm
from ckptmgr_hf3fs.store import Hf3fsStore
from hf3fs.mounted import Mounted, mounted

PAGE = 4096


def shared_memory(directory: Path, nbytes: int) -> tuple[memoryview, str]:
    """Noise in a file on tmpfs, mapped, as a host buffer is."""
    path = directory / "memory"
    block = os.urandom(MIB)
    with path.open("w+b") as file:
        for _ in range(nbytes // MIB):
            file.write(block)
        file.flush()
        return memoryview(mmap.mmap(file.fileno(), nbytes)), str(path)


class Bare:
    """A ring and nothing else: files that are open, memory that is registered, one deadline."""

    def __init__(self, mount: Mounted, client: OwnClient, memory: memoryview, path: str) -> None:
        self._ring: OwnRing = client.ring(ENTRIES, for_read=False)
        with linked_shm(path) as name:
            self._registered: Registered = client.register(name, memory)
        self._path = mount.point / f"bare-{secrets.token_hex(4)}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT)
        self._nbytes = len(memory)

    def write(self) -> None:
        os.ftruncate(self._descriptor, 0)
        left = 0
        for at in range(0, self._nbytes, PIECE_BYTES_MAX):
            length = min(PIECE_BYTES_MAX, self._nbytes - at)
            transfer = Transfer(self._registered, at, self._descriptor, at, length, "")
            self._ring.prepare(transfer, left)
            left += 1
        self._ring.submit()
        while left:
            for _, result in self._ring.finished(60.0):
                assert result > 0
                left -= 1
        os.fsync(self._descriptor)


async def measure(
    ways: dict[str, Callable[[int], Awaitable[None]]], rounds: int
) -> dict[str, float]:
    """Median seconds of each way, taken in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.monotonic()
            await way(turn)
            if turn:
                seconds[name].append(time.monotonic() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


async def bench(mount: Mounted, directory: Path, mib: int, in_flight: int, rounds: int) -> None:
    memory, path = shared_memory(directory, mib * MIB)
    stores = {
        "rings": Hf3fsStore(f"{mount.point}/rings", "hf3fs:///rings", OwnClient),
        "posix": Hf3fsStore(f"{mount.point}/posix", "hf3fs:///posix", None),
    }
    stores["rings"].share(memory, path)
    header, threads = memoryview(bytes(PAGE)), ThreadPoolExecutor(in_flight)

    def put(name: str) -> Callable[[int], Awaitable[None]]:
        store = stores[name]

        async def way(turn: int) -> None:
            keys = [f"data/{turn}-{number}" for number in range(in_flight)]
            await asyncio.gather(*(store.put_new(key, [header, memory[PAGE:]]) for key in keys))
            for key in keys:  # not counted twice: all ways overwrite or delete what they wrote
                os.unlink(mount.backing / name / key)

        return way

    await put("rings")(rounds + 1)  # the bare client shares the hold on the mount that this takes
    client = OwnClient(f"{mount.point}/3fs-virt")
    bare = [Bare(mount, client, memory, path) for _ in range(in_flight)]

    async def alone(_turn: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(threads, one.write) for one in bare))

    ways = {"rings": put("rings"), "bare ring": alone, "posix": put("posix")}
    found = await measure(ways, rounds)
    speeds = {name: mib * in_flight / seconds for name, seconds in found.items()}
    print(
        json.dumps(
            {
                **{f"{name} MiB/s": round(speed) for name, speed in speeds.items()},
                "rings / posix": round(speeds["rings"] / speeds["posix"], 2),
                "rings / bare ring": round(speeds["rings"] / speeds["bare ring"], 2),
                "bytes copied per put": stores["rings"].copied_bytes // (in_flight * (rounds + 2)),
            }
        )
    )
    for store in stores.values():
        await store.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=2)
    given = parser.parse_args()
    directory = Path(f"/dev/shm/hf3fs-bench-{os.getpid()}")
    try:
        with mounted(directory) as mount:
            asyncio.run(bench(mount, directory, given.mib, given.in_flight, given.rounds))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
