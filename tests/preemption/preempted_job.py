"""One rank of a training that is preempted; it says in a file what it does.

Its state is a tensor that is full of the number of its step. It may hang before a step: in a real
DataLoader whose worker never answers, in a lock of C, or in one that holds the interpreter as well.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import ckptmgr
from ckptmgr.preemption import Signals, Source

TREE = Path(__file__).parents[2]
sys.path[:0] = [str(path) for path in (TREE / "plugins").iterdir()]

EVERY = 25
STEP_SECONDS = 0.002
STEPS = 1_000_000
FLOATS = 1 << 16


class Mouth:
    """Tells the oracle, through a file; a line is there before a kill can land behind it."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, event: str, **what: Any) -> None:
        os.write(self._file, json.dumps({"event": event, **what}).encode() + b"\n")


class Batches(Dataset[int]):
    """Items that come until one does not."""

    def __init__(self, last: int) -> None:
        self._last = last

    def __len__(self) -> int:
        return self._last + 10

    def __getitem__(self, index: int) -> int:
        if index >= self._last:
            threading.Event().wait()
        return index


def hang_in_c(*, with_the_interpreter: bool) -> None:
    """Lock a mutex twice: no signal ever interrupts that."""
    libc = (ctypes.PyDLL if with_the_interpreter else ctypes.CDLL)(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def made(name: str, key: int) -> Source:
    """The source that a user would name."""
    if name == "slurm":
        from ckptmgr_slurm import JobSource

        return JobSource()
    if name == "kubernetes":
        from ckptmgr_kubernetes import PodSource

        return PodSource()
    if name == "hai":
        from ckptmgr_hai import SuspendSource
        from ckptmgr_hai.flag import Flag

        return SuspendSource(Flag(key).is_set)
    return Signals(seconds=30.0)


def hanging(kind: str, at: int, say: Callable[..., None]) -> Iterator[None]:
    """Before each step; from the step `at` on it does not come back."""
    loader = iter(DataLoader(Batches(at), num_workers=1)) if kind == "loader" else iter(())
    for step in range(STEPS):
        if kind and step == at:
            say("hangs", kind=kind)
        if kind == "loader":
            next(loader)
        elif kind and step == at:
            hang_in_c(with_the_interpreter=kind == "interpreter")
        yield


def train(url: str, source: Source, kind: str, at: int, mouth: Mouth) -> None:
    """Resume, and train until told to leave."""
    state = {"x": torch.zeros(FLOATS)}
    with ckptmgr.Checkpointer(
        url, state, every=EVERY, drain_timeout=60.0, preemption=source
    ) as ckpt:
        mouth.say("entered", attempt=ckpt.attempt)
        start = ckpt.restore()
        found = ckpt.restored
        mouth.say(
            "resumed",
            id=[found.attempt, found.step] if found else [0, 0],
            source=found.source if found else "",
            torn=bool((state["x"] != start).any()),
        )
        obstacles = hanging(kind, at, mouth.say)
        for step in range(start + 1, start + STEPS):
            next(obstacles)
            if dist.is_initialized():
                dist.all_reduce(torch.zeros(1))
            time.sleep(STEP_SECONDS)
            state["x"].fill_(step)
            handle = ckpt.step(step)
            if handle is not None and handle.sealed():
                mouth.say("sealed", step=step)
            if ckpt.preempted:
                mouth.say("leaving", step=step)
                break
    mouth.say("left")


def run(asked: dict[str, Any]) -> None:
    """The life of a rank."""
    mouth = Mouth(asked["said"])
    mouth.say("begun", pid=os.getpid())
    torch.set_num_threads(1)
    sys.path.insert(0, asked["site"])
    if asked["world"] > 1:
        store = dist.FileStore(asked["rendezvous"], asked["world"])
        dist.init_process_group(
            "gloo",
            store=store,
            rank=asked["rank"],
            world_size=asked["world"],
            timeout=timedelta(seconds=120),
        )
    train(asked["url"], made(asked["source"], asked["key"]), asked["hang"], asked["at"], mouth)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]) | {"rank": int(os.environ.get("RANK", "0"))})
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo do not always end by themselves
