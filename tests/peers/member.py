"""One rank of a job of several: a process without torch that does what its stdin says.

`python member.py RUNTIME URL RANK WORLD ATTEMPT NONCE`: one order a line, one JSON line as answer.
Every bit of what it restores is checked here; a difference ends the process.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from asking import Came, bring
from ckptmgr.staging.control import (
    Describe,
    Described,
    Done,
    Fetch,
    Fetched,
    Release,
    Restore,
)
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables
from crash.content import content
from driven import PATIENCE_SECONDS, Rank, check_slot


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def save(own: Rank, step: int) -> dict[str, Any]:
    """Seal a step and tell the daemon."""
    own.save(step)
    return {}


def copy_half(own: Rank, step: int) -> dict[str, Any]:
    """Pause amid the copy of a step, to be killed, or to be stopped and continued: then save it."""
    continued: list[int] = []
    signal.signal(signal.SIGCONT, lambda number, _: continued.append(number))
    slot = own.free_slot()
    view = own.buffer.begin(slot).data
    state = content(own.attempt, step, own.nbytes).reshape(-1).view(np.uint8)
    half = own.nbytes // 2
    np.frombuffer(view, np.uint8)[:half] = state[:half]
    view.release()
    say(copied=half)
    while not continued:  # not pause(): another thread may be the one that hears the signal
        time.sleep(0.01)
    own.save(step, slot)
    return {"saved": step}


def wait(own: Rank, step: int) -> dict[str, Any]:
    """What becomes of a step."""
    waited = own.wait(step)
    return {"outcome": int(waited.outcome), "why": waited.why}


def restore(own: Rank, step: int = 0) -> dict[str, Any]:
    """Take the own part back and look at the parts of all others."""
    came, own.k = bring(own.link.ask, Restore(step=step or None), own.k, PATIENCE_SECONDS)
    saved = []
    if came.attempt:
        own.check(came)
        saved = check_all_parts(own, came)
    own.link.ask(Release(), Done)
    return {"id": [came.attempt, came.step], "source": came.source, "saved": saved}


def check_all_parts(own: Rank, came: Came) -> list[int]:
    """Each rank's part is of the one step, bit by bit; returns the ranks that saved it."""
    described = own.link.ask(Describe(), Described, PATIENCE_SECONDS)
    tables = read_tables(Path(described.tables)).ranks
    ends = [decode_layout(table.layout, subject="table").data_bytes for table in tables]
    wanted = tuple((t.rank, ((0, end),)) for t, end in zip(tables, ends, strict=True))
    for part in own.link.ask(Fetch(wanted), Fetched, PATIENCE_SECONDS).parts:
        lent = Came(came.attempt, came.step, part.source, part.path, part.slot, part.generation)
        with HostBuffer.open(Path(part.path)) as buffer:
            snapshot = buffer.snapshot(part.slot)
            assert snapshot is not None
            assert (snapshot.rank, snapshot.generation) == (part.rank, part.generation)
            check_slot(buffer, lent)
    return [table.rank for table in tables]


def train(own: Rank, first: int) -> dict[str, Any]:
    """Save step after step until a newer attempt has taken over, as `Checkpointer.step` does."""
    step = first
    while own.buffer.superseded_by <= own.attempt:
        own.save(step)
        step += 1
    return {"superseded": own.buffer.superseded_by, "reached": step}


ORDERS = {"save": save, "copy": copy_half, "wait": wait, "restore": restore, "train": train}


def main() -> None:
    runtime, url, rank, world, attempt, nonce = sys.argv[1:]
    claimed = int(attempt), nonce
    with Rank(Path(runtime), url, rank=int(rank), world=int(world), claimed=claimed) as own:
        say(attempt=own.attempt, nonce=own.link.nonce)
        for line in sys.stdin:
            order, *numbers = line.split()
            say(**ORDERS[order](own, *map(int, numbers)))


if __name__ == "__main__":
    main()
