"""Host buffers between processes: races, the writer's lock, and memory that runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptmgr.errors import HostMemoryError, TornSnapshotError
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.types import PAGE_BYTES
from driven import PYTHON_PATH, until
from processes import needs_root
from sealing import BINDING, CAPACITY, LAYOUT, racing_table


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def buffer(runtime: Path) -> Iterator[HostBuffer]:
    found = HostBuffer.create(runtime, BINDING, CAPACITY)
    yield found
    found.close()


# ---- races ------------------------------------------------------------------

RACER = """
import sys
from pathlib import Path
from ckptmgr.staging.hostbuffer import HostBuffer
from sealing import racing_table, seal
with HostBuffer.open(Path(sys.argv[1])) as buffer:
    print("racing", flush=True)
    for step in range(1, 1 << 40):
        values, tags = racing_table(step)
        seal(buffer, step % 2, step, values, tags)
"""


def test_a_reader_that_races_a_writer_never_gets_a_mixed_table(buffer: HostBuffer) -> None:
    """Another process seals as fast as it can; what is read is one step's, or nothing."""
    racer = child(RACER, buffer.path)
    whole = torn = 0
    try:
        assert said(racer) == "racing"
        while whole < 300 or torn < 10:
            for slot in range(2):
                snapshot = buffer.snapshot(slot)
                if snapshot is None:
                    continue
                try:
                    table = buffer.table(snapshot)
                except TornSnapshotError:
                    torn += 1
                    continue
                assert (table.values, table.tags) == racing_table(snapshot.step)
                assert table.layout == LAYOUT
                whole += 1
    finally:
        racer.kill()
        racer.wait()


# ---- the writer's lock ------------------------------------------------------

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from ckptmgr.staging.hostbuffer import HostBuffer
buffer = HostBuffer.open(Path(sys.argv[1]))
print(buffer.lock_for_writing(), flush=True)
if len(sys.argv) > 2:
    if os.fork() == 0:
        signal.pause()
        os._exit(0)
sys.stdin.readline()
"""


def test_only_one_process_writes(buffer: HostBuffer) -> None:
    assert not buffer.has_live_writer()
    with child(HOLDER, buffer.path) as holder:
        assert said(holder) == "True"
        assert buffer.has_live_writer()
        assert not buffer.lock_for_writing()
        with child(HOLDER, buffer.path) as second:
            assert said(second) == "False"
            second.kill()
        holder.kill()
    assert not buffer.has_live_writer()
    assert buffer.lock_for_writing()


def test_a_forked_worker_does_not_keep_the_lock(buffer: HostBuffer) -> None:
    """A data loader's worker outlives the trainer for a while; it must not pass for it."""
    holder = child(HOLDER, buffer.path, "fork")
    assert said(holder) == "True"
    tree = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    workers = until(lambda: tree.read_text().split(), "the worker is forked")
    try:
        holder.kill()
        holder.wait()
        assert not buffer.has_live_writer()
        assert buffer.lock_for_writing()
    finally:
        for pid in workers:
            os.kill(int(pid), signal.SIGKILL)


LOOKER = """
import sys
from pathlib import Path
from ckptmgr.staging.hostbuffer import HostBuffer
buffer = HostBuffer.open(Path(sys.argv[1]))
print("looking", flush=True)
while True:
    buffer.has_live_writer()
"""


def test_looking_for_a_writer_never_keeps_one_out(buffer: HostBuffer) -> None:
    """The daemon looks at any time, also in the moment in which a trainer takes the lock."""
    with child(LOOKER, buffer.path) as looker:
        assert said(looker) == "looking"
        for _ in range(2000):
            with HostBuffer.open(buffer.path) as mine:
                assert mine.lock_for_writing()
        looker.kill()


# ---- full memory ------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    needs_root()
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_buffer_that_does_not_fit_is_not_made(small_tmpfs: Path) -> None:
    with pytest.raises(HostMemoryError, match=r"needs 1\d MiB of shared memory, 8 MiB") as caught:
        HostBuffer.create(small_tmpfs, BINDING, Capacity(2, PAGE_BYTES, 5 << 20))
    assert "--shm-size" in caught.value.hint
    assert not list(small_tmpfs.iterdir())


POPULATOR = """
import sys
from pathlib import Path
from ckptmgr.errors import HostMemoryError
from ckptmgr.staging.hostbuffer import HostBuffer
buffer = HostBuffer.open(Path(sys.argv[1]))
buffer.settle(0, 1, 1)
buffer.add_progress(1)
print("words", flush=True)
try:
    buffer.populate(0)
except HostMemoryError as error:
    print(error.message, flush=True)
"""


def test_a_tmpfs_that_fills_up_is_an_error_and_never_a_signal(small_tmpfs: Path) -> None:
    """Space was there when the buffer was made, and is gone when its pages are needed."""
    buffer = HostBuffer.create(small_tmpfs, BINDING, Capacity(2, PAGE_BYTES, 3 << 20))
    with suppress(OSError), (small_tmpfs / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(PAGE_BYTES))
            filler.flush()
    with child(POPULATOR, buffer.path) as process:
        lines = [said(process) for _ in range(2)]
        assert process.wait() == 0
    assert lines[0] == "words"  # the daemon's page was there from the start
    assert "can not be populated" in lines[1]
    buffer.close()


def test_closing_gives_the_lock_back(buffer: HostBuffer) -> None:
    with child(HOLDER, buffer.path) as holder:
        said(holder)
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.wait()
    assert not buffer.has_live_writer()
