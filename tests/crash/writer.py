"""The storm's trainer: real host buffer, real daemon, real copies, no torch; it waits to be killed.

It says what it is about to do on a pipe, one JSON line each, before it does it. It checks what it
restores against the pure function of content.py and reports every difference as an event: the
oracle decides, outside of every process that is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from asking import Came, bring
from ckptmgr.rank.link import Link, Wanted
from ckptmgr.staging.control import Done, Release, Restore, Wait, Waited
from ckptmgr.staging.hostbuffer import (
    TAGS_BYTES_MAX,
    HostBuffer,
    table_bytes_needed,
)
from ckptmgr.staging.slots import free_slot, superseded_slot
from ckptmgr.types import Outcome, StepId
from crash.content import content, fault_in, layout_of, values_of

COPY_PIECES = 64
ASK_SECONDS = 120.0
SUPERSEDES = 0.15
"""How often an undecided snapshot is overwritten, as a trainer does when the store is stuck."""


class Trainer:
    """One incarnation of the job."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.nbytes: int = options.mib << 20
        self.told: set[StepId] = set()

    def tell(self, event: str, **fields: object) -> None:
        line = json.dumps({"event": event, "at": time.monotonic(), **fields})
        os.write(self.options.pipe, line.encode() + b"\n")

    def attach(self) -> None:
        layout, _ = layout_of(self.nbytes)
        table = table_bytes_needed(len(layout), len(values_of(0, 0)) + TAGS_BYTES_MAX)
        options = self.options
        wanted = Wanted(options.url, 0, 1, 2, options.codec, options.keep, table, self.nbytes)
        self.tell("attach")
        self.link = Link(Path(options.runtime), wanted)
        self.tell("attached", attempt=self.link.attempt)

    def restore(self) -> int:
        """Take back what the daemon offers; returns its step."""
        self.tell("restore")
        reply, _ = bring(self.link.ask, Restore(), 0, ASK_SECONDS)
        fault = self.fault_of(reply) if reply.attempt else ""
        self.link.ask(Release(), Done)
        self.tell(
            "restored",
            id=[reply.attempt, reply.step],
            source=reply.source,
            fault=fault,
            skipped=list(reply.skipped),
        )
        return reply.step

    def fault_of(self, reply: Came) -> str:
        own = self.link.buffer
        if Path(reply.path) == own.path:
            return self.fault_in_slot(own, reply)
        with HostBuffer.open(Path(reply.path)) as other:
            return self.fault_in_slot(other, reply)

    def fault_in_slot(self, buffer: HostBuffer, reply: Came) -> str:
        snapshot = buffer.snapshot(reply.slot)
        if snapshot is None or snapshot.generation != reply.generation:
            return f"slot {reply.slot} does not hold generation {reply.generation}"
        if (snapshot.attempt, snapshot.step) != (reply.attempt, reply.step):
            return f"slot holds {snapshot.id}, not {reply.attempt}.{reply.step}"
        table = buffer.table(snapshot)
        view = buffer.data(reply.slot)
        live = np.empty(snapshot.data_bytes, np.uint8)
        live[:] = view[: snapshot.data_bytes]
        view.release()
        if not buffer.unchanged(snapshot):
            return "slot was reused while it was restored"
        if table.values != values_of(*snapshot_id(reply)):
            return f"values are not those of {reply.attempt}.{reply.step}"
        if table.tags != {"attempt": reply.attempt, "step": reply.step}:
            return f"tags are {table.tags}"
        return fault_in(live.data, reply.attempt, reply.step, snapshot.data_bytes)

    def slot(self) -> int:
        """The slot for the next snapshot; waits for the oldest undecided one if it must."""
        buffer = self.link.buffer
        while True:
            sealed = [(s, buffer.outcome(s)) for s in buffer.snapshots()]
            found = free_slot(2, sealed)
            if found is not None:
                return found
            given_up = superseded_slot(sealed)
            if given_up is not None and self.random.random() < SUPERSEDES:
                self.tell("supersede", id=[given_up.attempt, given_up.step])
                return given_up.slot
            oldest = min((s for s, _ in sealed), key=lambda s: s.generation)
            if oldest.attempt == self.link.attempt:
                self.wait(oldest.step)
            else:
                time.sleep(0.002)

    def save(self, step: int) -> None:
        """Compute the state of a step, copy it piece by piece, seal it."""
        link = self.link
        layout, layout_hash = layout_of(self.nbytes)
        live = content(link.attempt, step, self.nbytes).reshape(-1).view(np.uint8)
        values = values_of(link.attempt, step)
        slot = self.slot()
        link.wait_populated(slot)
        self.tell("copy", step=step)
        writer = link.buffer.begin(slot)
        view = writer.data
        target = np.frombuffer(view, np.uint8)
        piece = self.nbytes // COPY_PIECES
        for at in range(0, self.nbytes, piece):
            target[at : at + piece] = live[at : at + piece]
        del target
        view.release()
        self.tell("seal", step=step)
        writer.seal(
            attempt=link.attempt,
            nonce=link.nonce,
            rank=0,
            world=1,
            step=step,
            layout=layout,
            layout_hash=layout_hash,
            values=values,
            tags={"attempt": link.attempt, "step": step},
            data_bytes=self.nbytes,
            stall_seconds=0.0,
        )
        self.tell("sealed", step=step)
        link.sealed()

    def wait(self, step: int) -> None:
        """Wait for a commit, and say so when it is acknowledged."""
        waited = self.link.ask(Wait(step, 30.0), Waited, ASK_SECONDS)
        if waited.outcome == Outcome.COMMITTED:
            self.acknowledge(StepId(self.link.attempt, step))

    def acknowledge(self, step: StepId) -> None:
        if step not in self.told and step.attempt == self.link.attempt:
            self.told.add(step)
            self.tell("acked", id=[step.attempt, step.step])

    def look(self) -> None:
        """Tell of commits that the daemon has written into the host buffer meanwhile."""
        buffer = self.link.buffer
        for snapshot in buffer.snapshots():
            if buffer.outcome(snapshot) is Outcome.COMMITTED:
                self.acknowledge(snapshot.id)

    def train(self) -> None:
        self.attach()
        first = self.restore() + 1
        for step in range(first, first + self.options.steps):
            self.save(step)
            if self.options.linger:
                continue
            if self.random.random() < 0.5:
                self.wait(step)
            else:
                time.sleep(self.random.uniform(0, 0.02))
            self.look()
        if self.options.fork and os.fork() == 0:
            signal.pause()  # as a data loader's worker, with every descriptor of the trainer
        self.tell("finished")
        if self.options.linger:
            signal.pause()
        self.link.close(clean=False)


def snapshot_id(reply: Came) -> tuple[int, int]:
    return reply.attempt, reply.step


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("runtime", "url", "codec"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seed", "mib", "pipe", "keep", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--linger", action="store_true", help="save, then wait to be killed")
    parser.add_argument("--fork", action="store_true", help="leave a child behind")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        Trainer(options_of(sys.argv[1:])).train()
