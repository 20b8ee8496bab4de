"""Preemptions that ranks tell of: counted when they come, and again when nothing can be lost.

Each leaves a note beside the host buffers until it is known what has come of it, so that the next
daemon sees it through if this one is killed, though the trainer may be dead by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ckptmgr.config import open_private_dir
from ckptmgr.daemon.intake import Held, Intake
from ckptmgr.daemon.log import event, label_of, warning
from ckptmgr.metrics import Metrics
from ckptmgr.staging.control import Preempt
from ckptmgr.types import Outcome

LOOK_SECONDS = 0.5
"""How often the death of a preempted trainer is looked for; a commit is heard of at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether nothing that a preempted trainer has sealed is lost; `step` is the last, if any."""

    saved: bool
    step: int | None = None
    why: str = ""


def verdict(
    sealed: Mapping[int, tuple[Outcome, str]], before: int, *, gone: bool
) -> Verdict | None:
    """What has come of a preemption, or None while that is open.

    Args:
        sealed: what became of each step that the trainer has sealed.
        before: the last of them when it told of the preemption.
        gone: it is dead, or has left: it will seal nothing more.
    """
    if not sealed:
        # What it resumed from is the matter of the attempt that has sealed that.
        return Verdict(saved=True) if gone else None
    last = max(sealed)
    outcome, why = sealed[last]
    if outcome is Outcome.COMMITTED and (gone or last > before):
        return Verdict(saved=True, step=last)
    return Verdict(saved=False, step=last, why=why) if gone and outcome.decided else None


class _Note(msgspec.Struct, frozen=True):
    """What the next daemon must know of a trainer that will be ended."""

    buffer: str
    attempt: int
    nonce: str
    before: int


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """A trainer that will be ended, by the nonce of its attempt, since a monotonic time."""

    held: Held
    note: _Note
    path: Path
    at: float

    @property
    def job(self) -> str:
        return label_of(self.held.binding.url)


class Preemptions:
    """The preemptions of this daemon's trainers that are under way."""

    def __init__(self, metrics: Metrics, intake: Intake, directory: Path) -> None:
        self._metrics = metrics
        self._intake = intake
        self._directory = directory
        self._open: dict[_Told, asyncio.Task[None]] = {}
        self._adopted: set[str] = set()

    def adopt(self) -> None:
        """Go on with what a daemon before this one was told of, and has not seen the end of."""
        open_private_dir(self._directory)
        for path in list(self._directory.iterdir()):
            note = _read(path)
            held = self._intake.held.get(note.buffer) if note is not None else None
            if note is None or held is None:
                path.unlink()
            else:
                self._adopted.add(note.nonce)
                self._follow(_Told(held, note, path, time.monotonic()))

    def told(self, held: Held, job: str, attempt: int, nonce: str, request: Preempt) -> None:
        """A rank will be ended: count it, and see to it that what it has sealed is committed."""
        if request.again and nonce in self._adopted:
            return  # its note has told us
        if not request.again:
            self._metrics.preemption_signals.labels(job).inc()
            event(
                "preempted",
                job=job,
                attempt=attempt,
                rank=held.binding.rank,
                source=request.source,
                seconds=request.seconds,
                why=request.why,
            )
        held.wake.set()
        before = max(self._sealed(held, nonce), default=-1)
        note = _Note(held.buffer.id, attempt, nonce, before)
        path = self._directory / secrets.token_hex(8)
        with contextlib.suppress(OSError):  # without room for it no later daemon will know
            path.write_bytes(msgspec.json.encode(note))
        self._follow(_Told(held, note, path, time.monotonic()))

    def _follow(self, told: _Told) -> None:
        watching = asyncio.create_task(self._watch(told), name=f"preemption of {told.job}")
        self._open[told] = watching
        watching.add_done_callback(lambda _: self._open.pop(told))

    async def _watch(self, told: _Told) -> None:
        """Look until it is known what has come of it."""
        while not self._close(told):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS), told.held.decided:
                    await told.held.decided.wait()

    async def aclose(self) -> None:
        """The daemon ends and has drained: a last look, and whatever is open then stays so."""
        for told, watching in list(self._open.items()):
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self._close(told)

    def _close(self, told: _Told) -> bool:
        """Count and tell what has come of a preemption; False while that is open."""
        sealed = self._sealed(told.held, told.note.nonce)
        found = verdict(sealed, told.note.before, gone=self._is_gone(told))
        if found is None:
            return False
        rank = told.held.binding.rank
        step = f"{told.note.attempt}.{found.step}" if found.step is not None else ""
        seconds = round(time.monotonic() - told.at, 3)
        if found.saved:
            self._metrics.preemption_saves.labels(told.job).inc()
            event("preemption_saved", job=told.job, step=step, rank=rank, after_seconds=seconds)
        else:
            warning("preemption_unsaved", job=told.job, step=step, rank=rank, why=found.why)
        told.path.unlink(missing_ok=True)
        return True

    def _buffers(self, held: Held) -> list[Held]:
        """All of this rank: a trainer may change to a larger one, and leave one that is freed."""
        others = self._intake.of_rank(held.binding.url, held.binding.rank)
        return [held, *(one for one in others if one is not held)]

    def _sealed(self, held: Held, nonce: str) -> dict[int, tuple[Outcome, str]]:
        """What became of each step of one trainer; its slots may hold newer ones by now."""
        found: dict[int, tuple[Outcome, str]] = {}
        for one in self._buffers(held):
            own = [(s.step, outcome) for s, outcome in one.snapshots() if s.nonce == nonce]
            found |= {step: (outcome, "") for step, outcome in own}
        for one in self._buffers(held):
            found |= {step: known for (of, step), known in one.results.items() if of == nonce}
        return found

    def _is_gone(self, told: _Told) -> bool:
        return not any(
            held.writer_alive and getattr(held.owner, "nonce", told.note.nonce) == told.note.nonce
            for held in self._buffers(told.held)
        )


def _read(path: Path) -> _Note | None:
    """A note; None for one that a daemon was killed over."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Note)
    except msgspec.DecodeError:
        return None
