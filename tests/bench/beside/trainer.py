"""The process that trains and saves, and the one that restores.

`python -m bench.beside.trainer JOB` is started by the conductor, for each phase and rank. A step is
many small operators on one core, as many as one undisturbed step of the wanted length takes, so
that it wants the interpreter as often as training does. A snapshot is measured against
undisturbed steps, before it and after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module, metadata
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist

from bench.beside import gauge
from bench.beside.disk import sync
from bench.beside.job import Job
from bench.beside.peer import Peer, State
from bench.beside.state import change, differing, empty_state, fill, spoil

WINDOW_SECONDS = 1.0
"""Length of the steps that a snapshot is compared with, before it and after it."""


class Loop:
    """Training, without the state: its steps are alike on all ranks, which wait for each other."""

    def __init__(self, job: Job) -> None:
        self.operations = job.operations
        self.cpu_seconds = 0.0  # of all steps so far
        self.steps = max(3, round(WINDOW_SECONDS / job.step_seconds))
        self.inputs, self.weights = torch.randn(192, 192), torch.randn(192, 192)
        self.group = dist.new_group() if job.world > 1 else None

    def step(self, *, busy: bool = False) -> bool:
        """Run one step; tells whether any rank is busy."""
        found, began = self.inputs, time.thread_time()
        for _ in range(self.operations):
            found = torch.tanh(found @ self.weights)
        self.cpu_seconds += time.thread_time() - began
        if self.group is None:
            return busy
        asked = torch.tensor([int(busy)])
        dist.all_reduce(asked, group=self.group)
        return bool(asked)

    def meet(self) -> None:
        """Wait for the other ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def undisturbed(self) -> float:
        """Mean seconds of a step while nothing else is asked for."""
        start = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        return (time.perf_counter() - start) / self.steps


def calibrated(step_seconds: float) -> int:
    """How many operations take this long, from the quickest of some tries."""
    job = Job("", "", "", "", "", 1, 1, "float32", 1, step_seconds, operations=40)
    loop, took = Loop(job), []
    for _ in range(12):
        start = time.perf_counter()
        loop.step()
        took.append(time.perf_counter() - start)
    return max(1, round(step_seconds / min(took) * loop.operations))


class Finish(threading.Thread):
    """Waits for the library, then syncs for it if it does not do that itself."""

    def __init__(self, peer: Peer, step: int, start: float) -> None:
        super().__init__(daemon=True)
        self.peer, self.step, self.begun = peer, step, start
        self.complete = self.durable = 0.0
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            if not self.peer.on_trainer:
                self.peer.wait()
            self.complete = time.perf_counter() - self.begun
            if not self.peer.durable:
                sync(self.peer.path(self.step))
            self.durable = time.perf_counter() - self.begun
        except BaseException as failure:
            self.failure = failure


def cpu_of_visit(rank: int) -> float:
    """Processor time of all its processes; rank 0 counts for all."""
    return gauge.cpu_seconds(gauge.members(os.environ[gauge.TOKEN])) if rank == 0 else 0.0


def snapshot(peer: Peer, loop: Loop, step: int) -> dict[str, Any]:
    """One snapshot amid steps, which go on until it is durable; no longer, for what else the
    machine does would be counted with it.
    """
    change(peer.state, step)
    loop.meet()
    undisturbed = loop.undisturbed()
    cpu, in_steps = cpu_of_visit(peer.rank), loop.cpu_seconds
    loop.meet()
    start = time.perf_counter()
    peer.save(step)
    called = time.perf_counter()
    finish = None if peer.on_trainer else Finish(peer, step, start)
    loop.step()
    stepped = time.perf_counter()
    peer.mutable()  # the optimizer's step comes after forward and backward
    stall = called - start + time.perf_counter() - stepped
    spoil(peer.state)
    steps, busy = 1, True
    while busy:
        if finish is None and peer.ready():
            peer.wait()
            finish = Finish(peer, step, start)
        busy = loop.step(busy=finish is None or finish.is_alive())
        steps += 1
    took = time.perf_counter() - start
    cpu = cpu_of_visit(peer.rank) - cpu
    assert finish is not None
    if finish.failure is not None:
        raise finish.failure
    return {
        "stall_s": stall,
        "took_s": took,
        "complete_s": finish.complete,
        "durable_s": finish.durable,
        "cpu_s": cpu,
        "steps_cpu_s": loop.cpu_seconds - in_steps,
        "step_s": undisturbed,
        "steps": steps,
        "stored_bytes": peer.stored(step),
    }


def weighed(peer: Peer, loop: Loop, step: int) -> int:
    """Peak memory of all processes during one more snapshot, which is not timed."""
    environment = dict(os.environ)
    command = [sys.executable, "-m", "bench.beside.gauge", environment.pop(gauge.TOKEN)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as sampler:
        assert sampler.stdout is not None
        sampler.stdout.readline()  # it has begun
        loop.meet()
        peer.save(step)
        peer.mutable()
        while peer.on_trainer and not peer.ready():
            loop.step()
        peer.wait()
        loop.meet()
        return int(sampler.communicate("\n")[0])


def save(job: Job, peer: Peer, loop: Loop) -> dict[str, Any]:
    """Open, save some times, and say what it cost; then this process ends as in a crash."""
    fill(peer.state)
    idle = gauge.pss_bytes(gauge.members(os.environ[gauge.TOKEN]))
    loop.meet()
    start = time.perf_counter()
    peer.open()
    opened = time.perf_counter() - start
    found = []
    for step in range(1, job.snapshots + 1):
        found.append(snapshot(peer, loop, step))
        loop.meet()
        if job.rank == 0 and not peer.keeps and step > 1:
            rmtree(peer.path(step - 1))
    beside = [one["step_s"] for one in found] + [loop.undisturbed()]
    for one, before, after in zip(found, beside[:-1], beside[1:], strict=True):
        one["lost_s"] = one["took_s"] - one["steps"] * (before + after) / 2
    last = job.snapshots + 1
    change(peer.state, last)
    peak = weighed(peer, loop, last)
    if not peer.durable:
        sync(peer.path(last))
    return {
        "opened_s": opened,
        "snapshots": found,
        "peak_bytes": peak,
        "extra_bytes": peak - idle,
        "version": metadata.version(job.distribution) if job.distribution != "ckptmgr" else "",
    }


def restore(job: Job, peer: Peer) -> dict[str, Any]:
    """Open and restore once; the state's memory is present, as that of a built model."""
    start = time.perf_counter()
    peer.open_reader()
    opened = time.perf_counter()
    step = job.snapshots + 1
    peer.restore(step)
    restored = time.perf_counter()
    return {
        "opened_s": opened - start,
        "restore_s": restored - opened,
        "wrong": differing(peer.state, step),
        "source": getattr(peer, "source", "store"),
    }


def make_peer(job: Job, state: State) -> Peer:
    """Import an adapter by its name."""
    module, _, name = job.adapter.partition(":")
    peer: Peer = getattr(import_module(module), name)(
        Path(job.directory), state, job.rank, job.world
    )
    return peer


def run(job: Job) -> dict[str, Any]:
    """One phase."""
    if job.phase == "calibrate":
        return {"operations": calibrated(job.step_seconds)}
    state = empty_state(job.mib, job.tensors, job.dtype, job.rank)
    if job.phase == "limits":
        from bench.beside.floor import limits

        return limits(Path(job.directory), state, job.world, repeat=3)
    peer = make_peer(job, state)
    peer.load()
    if job.world > 1 or (peer.needs_group and job.phase == "save"):
        dist.init_process_group("gloo", rank=job.rank, world_size=job.world)
    return save(job, peer, Loop(job)) if job.phase == "save" else restore(job, peer)


def main() -> None:
    """Do the job and leave without a goodbye: what a library has in memory is lost or kept."""
    torch.set_num_threads(1)
    job = Job.parse(sys.argv[1])
    try:
        job.reply(run(job))
    except BaseException as failure:
        traceback.print_exc()
        job.reply({"failure": f"{type(failure).__name__}: {failure}"})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
