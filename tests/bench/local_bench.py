"""Save and restore through the daemon's own code against bare writes and reads of the same bytes.

`PYTHONPATH=tests python -m bench.local_bench --directory /on/the/disk` prints one table. Bare is
the faster of one and two streams: O_DIRECT writes of 16 MiB with fsync; reads through the page
cache, which was emptied before. All of it goes out of and into memory that is present. Repetitions
take turns; figures are medians, and CPU seconds are of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.beside.disk import BLOCK_BYTES, write_file
from ckptmgr.config import BUDGET_BYTES, MIB
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.heap import keep_freed_memory
from ckptmgr.rank.bench import drop_cache
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import NO_KEYS, Keyring, keyring_of
from ckptmgr.repository.manifest import Manifest
from ckptmgr.repository.opening import open_manifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.store.local import LocalStore
from small_step import HOST, encode_state, fill_slot, host_buffer


def read_file(path: Path, into: memoryview) -> None:
    """Through the page cache, in big blocks."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for at in range(0, len(into), BLOCK_BYTES):
            os.preadv(fd, [into[at : at + BLOCK_BYTES]], at)
    finally:
        os.close(fd)


def bare(
    work: Callable[[Path, memoryview], None], place: Path, data: memoryview, streams: int
) -> None:
    """The bytes in as many files as streams, one thread each."""
    share = len(data) // streams // 4096 * 4096
    with ThreadPoolExecutor(streams) as threads:
        parts = [
            (place / f"{streams}-{n}", data[n * share : (n + 1) * share]) for n in range(streams)
        ]
        list(threads.map(lambda part: work(*part), parts))


class Bench:
    """Measures everything in turns; `seconds` and `cpu` are by what was measured."""

    def __init__(self, directory: Path, mib: int, codec: str, keyring: Keyring) -> None:
        rng = np.random.default_rng(0)
        weights = (rng.standard_normal(mib * MIB // 4) * 0.02).astype(np.float32)
        self.encoded = encode_state({"weights": weights})
        self.size = len(self.encoded.data)
        self.directory, self.codec, self.keyring = directory, codec, keyring
        self.pipeline = Pipeline(BufferPool(BUDGET_BYTES))
        self.pool = BufferPool(BUDGET_BYTES)
        self.target = memoryview(mmap.mmap(-1, self.size))
        self.target[:] = self.encoded.data  # present from here on
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Measure one call, what it starts in other threads too."""
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.seconds[name].append(time.perf_counter() - start)
        self.cpu[name].append(time.process_time() - cpu)
        return result

    def turn(self, number: int) -> None:
        """Everything once."""
        with tempfile.TemporaryDirectory(dir=self.directory) as place:
            with host_buffer(f"file://{place}", self.size) as buffer:
                of: Any = {"attempt": 1, "nonce": "ab" * 16, "step": number + 1}
                snapshot = fill_slot(buffer, 0, self.encoded, **of)
                with buffer.data(0) as data:
                    for streams in (1, 2):
                        work = (
                            partial(write_file, direct=True),
                            Path(place),
                            data[: self.size],
                            streams,
                        )
                        self.timed(f"bare write, {streams}", lambda work=work: bare(*work))
                store = LocalStore(f"{place}/store")
                source = Source(buffer, snapshot, store, HOST, self.keyring)
                manifest = self.timed("save", lambda: asyncio.run(self.save(source)))
            for streams in (1, 2):
                drop_cache(Path(place))
                work = (read_file, Path(place), self.target, streams)
                self.timed(f"bare read, {streams}", lambda work=work: bare(*work))
            self.target[:MIB] = bytes(MIB)
            drop_cache(Path(place))
            self.timed("restore", lambda: asyncio.run(self.restore(store, manifest)))
            assert self.target == self.encoded.data
            asyncio.run(store.aclose())

    async def save(self, source: Source) -> Manifest:
        """As the daemon does."""
        sealed = await self.pipeline.write(source, self.codec, lambda _raw, _stored: None)
        return open_manifest(sealed, self.keyring).manifest

    async def restore(self, store: LocalStore, manifest: Manifest) -> None:
        """As the daemon does, into memory that is present."""
        await fetch(store, plan_whole(manifest), self.target, self.pool)

    def forget(self) -> None:
        """The first turn is for the page cache, the threads and the rates."""
        self.seconds.clear()
        self.cpu.clear()

    def rows(self) -> list[str]:
        """The table's lines."""
        median = {name: statistics.median(found) for name, found in self.seconds.items()}
        cpu = {name: statistics.median(found) for name, found in self.cpu.items()}
        lines = []
        for name, kind in (("save", "write"), ("restore", "read")):
            streams = min((1, 2), key=lambda n: median[f"bare {kind}, {n}"])
            base = f"bare {kind}, {streams}"
            cells = [name, f"{median[name]:.3f}", f"{median[base]:.3f} ({streams} streams)"]
            cells += [f"{median[base] / median[name]:.2f}", f"{cpu[name]:.2f} / {cpu[base]:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--encrypt", action="store_true", help="with a key")
    args = parser.parse_args()
    keep_freed_memory()  # as the daemon does
    keyring = keyring_of(Key.of(os.urandom(32))) if args.encrypt else NO_KEYS
    bench = Bench(args.directory, args.mib, args.codec, keyring)
    bench.turn(0)
    bench.forget()
    for number in range(1, args.repeat + 1):
        bench.turn(number)
    sealed = ", encrypted" if args.encrypt else ""
    print(f"{args.mib} MiB, codec {args.codec}{sealed}, median of {args.repeat}\n")
    print("| what | s | bare, s | ratio | CPU s, bare |")
    print("|---|---|---|---|---|")
    print("\n".join(bench.rows()))


if __name__ == "__main__":
    main()
