"""How fast packs go up and come down by our store, beside the bare client in the same run.

`python tests/bench/objectstore_bench.py [--server sink|ceph] [--rounds N]`: the sink takes and
gives bytes and does nothing with them, so that the client is what is measured; ceph is a real
gateway. Rounds of both take turns; what is printed is the median round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import multiprocessing
import os
import re
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import obstore

sys.path.insert(0, str(Path(__file__).parents[1]))

from ckptmgr.config import MIB, PACK_BYTES
from ckptmgr.heap import keep_freed_memory
from ckptmgr.store.base import PutResult, Wanted
from ckptmgr_objectstore.clients import open_store
from ckptmgr_objectstore.store import ObjectStore
from servers.buckets import Bucket
from servers.ceph import Ceph, start_or_skip

PACKS = 4
CHUNK_BYTES = 4 * MIB

Work = Callable[[], Awaitable[None]]
Measured = tuple[float, float]
"""MiB per second, and CPU seconds of the process per GiB."""


def serve_sink(listener: socket.socket) -> None:
    """Answer every PUT with an empty 200 and every ranged GET with that many zeros."""
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    room, zeros = memoryview(bytearray(MIB)), memoryview(bytes(MIB))
    with connection, connection.makefile("rb") as requests:
        while head := b"".join(iter(requests.readline, b"\r\n")).decode("latin-1"):
            found = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            left = int(found[1]) if found else 0
            while left:
                left -= requests.readinto(room[: min(left, MIB)])
            asked = re.search(r"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
            count = int(asked[2]) - int(asked[1]) + 1 if asked else 0
            lines = ["HTTP/1.1 206 Partial Content" if asked else "HTTP/1.1 200 OK", 'ETag: "x"']
            lines += ["Last-Modified: Wed, 25 Nov 2026 12:00:00 GMT", f"Content-Length: {count}"]
            if asked:
                lines += [f"Content-Range: bytes {asked[1]}-{asked[2]}/{PACK_BYTES}"]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            while count:
                count -= connection.send(zeros[: min(count, MIB)])


@contextlib.contextmanager
def sink() -> Iterator[dict[str, str]]:
    """A sink in a process of its own, and what leads to it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    child = os.fork()
    if child == 0:
        serve_sink(listener)
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Ceph(Path()).environment(endpoint)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@contextlib.contextmanager
def gateway() -> Iterator[dict[str, str]]:
    """A Ceph cluster, and what leads to it."""
    with tempfile.TemporaryDirectory() as place, start_or_skip(Path(place)) as ceph:
        yield ceph.environment()


class Bench:
    """The same packs, by our store and by the client that it stands on."""

    def __init__(self, store: ObjectStore) -> None:
        self.store, self.client = store, store._client
        self.pages = mmap.mmap(-1, PACK_BYTES)
        self.pages[:] = secrets.token_bytes(MIB) * (PACK_BYTES // MIB)
        self.room = memoryview(bytearray(PACK_BYTES * PACKS))
        self.turn = 0

    def key(self, number: int) -> str:
        return f"data/{self.turn}/{number}.pack"

    async def put_ours(self) -> None:
        self.turn += 1
        view = memoryview(self.pages)
        buffers = [view[:4096], view[4096:]]
        done = await asyncio.gather(
            *(self.store.put_new(self.key(number), buffers) for number in range(PACKS))
        )
        assert done == [PutResult.OK] * PACKS

    async def put_bare(self) -> None:
        self.turn += 1
        await asyncio.gather(
            *(
                obstore.put_async(self.client, self.key(number), self.pages, use_multipart=False)
                for number in range(PACKS)
            )
        )

    async def get_ours(self) -> None:
        pieces = range(0, PACK_BYTES, CHUNK_BYTES)
        await self.store.get_many(
            [
                Wanted(self.key(n), at, self.room[n * PACK_BYTES + at :][:CHUNK_BYTES])
                for n in range(PACKS)
                for at in pieces
            ]
        )

    async def get_bare(self) -> None:
        """The same ranges with the same parallelism; what comes is thrown away."""
        left = iter([(n, at) for n in range(PACKS) for at in range(0, PACK_BYTES, CHUNK_BYTES)])

        async def lane() -> None:
            for number, at in left:
                await obstore.get_range_async(
                    self.client, self.key(number), start=at, length=CHUNK_BYTES
                )

        await asyncio.gather(*(lane() for _ in range(8)))


async def measure(work: Work) -> Measured:
    """One round."""
    start, before = time.perf_counter(), time.process_time()
    await work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    return PACKS * PACK_BYTES / MIB / seconds, cpu / (PACKS * PACK_BYTES / MIB / 1024)


def serve_rounds(url: str, who: str, orders: Connection) -> None:
    """A process of its own for each, because our processes keep freed memory, as a bare client's
    do not: do what is asked for, again and again.
    """
    if who == "ours":
        keep_freed_memory()

    async def serve() -> None:
        bench = Bench(open_store(url))
        while name := orders.recv():
            orders.send((await measure(getattr(bench, f"{name}_{who}")), bench.turn))

    asyncio.run(serve())


@contextlib.contextmanager
def workers(url: str) -> Iterator[dict[str, Connection]]:
    """The processes that take turns, by who they are."""
    context, found = multiprocessing.get_context("spawn"), {}
    for who in ("bare", "ours"):
        found[who], theirs = context.Pipe()
        context.Process(target=serve_rounds, args=(f"{url}/{who}", who, theirs)).start()
    try:
        yield found
    finally:
        for orders in found.values():
            orders.send("")


def compare(rounds: int, url: str, bucket: Bucket | None) -> None:
    """Print what both do, in turns; the first round of each is not counted."""
    with workers(url) as by_name:
        for name in ("put", "get"):
            found: dict[str, list[Measured]] = {who: [] for who in by_name}
            for _ in range(rounds + 1):
                for who, orders in by_name.items():
                    orders.send(name)
                    measured, turn = orders.recv()
                    found[who].append(measured)
                    if bucket is not None and name == "put":  # a cluster in memory holds little
                        _remove_all_but(bucket, f"run/{who}", f"/{turn}/")
            ratios = [o[0] / b[0] for o, b in zip(found["ours"], found["bare"], strict=True)]
            for who, results in found.items():
                rate, cpu = (statistics.median(column[1:]) for column in zip(*results, strict=True))
                sys.stdout.write(f"{name} {who}: {rate:7.0f} MiB/s {cpu:5.2f} CPU s/GiB\n")
            sys.stdout.write(f"{name} ratio: {statistics.median(ratios[1:]):.2f}\n")


def _remove_all_but(bucket: Bucket, prefix: str, kept: str) -> None:
    for key in bucket.keys(prefix):
        if kept not in key:
            bucket.remove(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=["sink", "ceph"], default="sink")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with sink() if options.server == "sink" else gateway() as environment:
        os.environ.update(environment)
        bucket = None
        if options.server == "ceph":
            bucket = Bucket("bench", environment["AWS_ENDPOINT_URL"])
            bucket.make()
        compare(options.rounds, "s3://bench/run", bucket)


if __name__ == "__main__":
    main()
