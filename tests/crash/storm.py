"""The oracle of the kill storm: starts processes, kills them, judges what is left.

It lives outside every process that is killed. It knows what was acknowledged from the trainer's
pipe, what host memory holds from peek.py, and what the store holds by reading it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ckptmgr.errors import CkptmgrError, DamageError, ObjectNotFoundError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, exists, list_steps
from ckptmgr.repository.keyring import KEY_FILE, NO_KEYS, Keyring, load_keyring
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.store.base import Store
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import StepId
from crash.content import fault_in, values_of
from crash.peek import WRITING, data_of, newest_usable, slots_below
from driven import PYTHON_PATH
from nursery import Forked, nursery
from processes import end, holds

HERE = Path(__file__).parent
EVENT_SECONDS_MAX = 120.0
INSIDE = {"mid-copy", "mid-seal", "mid-restore", "mid-persist", "mid-commit"}
"""Places that are inside a copy or a write."""

Id = tuple[int, int]


class BrokenPromiseError(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Trainer:
    """One incarnation of writer.py and what it has said so far."""

    process: Forked
    pipe: int
    expected: Id | None
    attempt: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    rest: bytes = b""

    @property
    def last(self) -> str:
        return str(self.events[-1]["event"]) if self.events else "start"

    def read(self, timeout_seconds: float) -> bool:
        """Take in what the pipe has; False when there was nothing in time, or it has ended."""
        if not select.select([self.pipe], [], [], timeout_seconds)[0]:
            return False
        piece = os.read(self.pipe, 1 << 16)
        *lines, self.rest = (self.rest + piece).split(b"\n")
        self.events += map(json.loads, lines)
        return bool(piece)

    def close(self) -> None:
        os.close(self.pipe)


@dataclass
class Storm:
    """One chain of kills over one store and one runtime directory; without a URL the store is a
    local one below `root`.
    """

    root: Path
    runtime: Path
    random: random.Random
    codec: str = "auto"
    mib: int = 12
    keep: int = 3
    encrypt: bool = False
    trainer: Trainer | None = None
    daemons: list[Forked] = field(default_factory=list)
    acked: set[Id] = field(default_factory=set)
    latest: Id | None = None
    places: Counter[tuple[str, str]] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    sure: set[Id] = field(default_factory=set)
    url: str = ""

    def __post_init__(self) -> None:
        self.url = self.url or f"file://{self.root}/store"

    # -- processes ----------------------------------------------------------------------------

    @cached_property
    def keyring(self) -> Keyring:
        """The keys of the job, in a file that its daemons are told of."""
        if not self.encrypt:
            return NO_KEYS
        path = self.root / "key"
        path.touch(mode=0o600)
        path.write_text(self.random.randbytes(32).hex())
        return load_keyring({KEY_FILE: str(path)})

    def environment(self) -> dict[str, str]:
        keyed = {KEY_FILE: str(self.root / "key")} if self.keyring.known else {}
        return {
            **os.environ,
            **keyed,
            "PYTHONPATH": PYTHON_PATH,
            "CKPTMGR_RUNTIME_DIR": str(self.runtime),
            "CKPTMGR_IDLE_SECONDS": "120",
        }

    def log_of(self, name: str) -> int:
        return os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def start_trainer(self, expected: Id | None) -> None:
        """Start an incarnation that must resume from `expected`."""
        read, write = os.pipe()
        log = self.log_of("trainer.log")
        arguments = [
            f"--runtime={self.runtime}",
            f"--url={self.url}",
            f"--codec={self.codec}",
            f"--seed={self.random.getrandbits(31)}",
            f"--mib={self.mib}",
            f"--keep={self.keep}",
            f"--pipe={write}",
            "--steps=1000000",
        ]
        program = [str(HERE / "writer.py"), *arguments]
        process = nursery().start(
            program, env=self.environment(), pass_fds=[write], stdout=log, stderr=log
        )
        os.close(write)
        os.close(log)
        self.trainer = Trainer(process, read, expected)

    def start_daemon(self) -> None:
        """Start a daemon by hand; else the trainer starts one itself."""
        log = os.open(self.runtime / "daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        program = ["ckptmgr.cli", "daemon", "--idle-seconds=120"]
        self.daemons.append(
            nursery().start(program, env=self.environment(), stdout=log, stderr=log)
        )
        os.close(log)

    def daemon_events(self) -> list[dict[str, Any]]:
        """What the daemons have logged."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.runtime / "daemon.log").read_bytes().splitlines()
            return [json.loads(line) for line in lines if line.startswith(b"{")]
        return []

    def daemon_pid(self) -> int:
        """The living daemon; 0 if there is none."""
        pids = [e["pid"] for e in self.daemon_events() if e["event"] == "started"]
        # The number of one that has ended may be another test's process by now.
        return pids[-1] if pids and holds(pids[-1], self.runtime) else 0

    def await_event(self, *names: str, count: int = 1) -> None:
        """Read on until the trainer has told `count` more events of these names."""
        trainer = self.running()
        deadline = time.monotonic() + EVENT_SECONDS_MAX
        at, seen = len(trainer.events), 0
        while seen < count:
            alive = trainer.read(deadline - time.monotonic())
            seen += sum(event["event"] in names for event in trainer.events[at:])
            at = len(trainer.events)
            if not alive and seen < count:
                self.judge_events()
                log = (self.root / "trainer.log").read_text().splitlines()[-15:]
                raise BrokenPromiseError(
                    "\n".join([f"no {names} from the trainer", *log, *self.tail()])
                )
        self.judge_events()

    def tail(self) -> list[str]:
        return [json.dumps(event) for event in self.daemon_events()[-12:]]

    def running(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    # -- kills --------------------------------------------------------------------------------

    def kill_trainer(self) -> None:
        """SIGKILL it, hear its last words, and judge them."""
        trainer = self.running()
        trainer.process.kill()
        self.bury_trainer()

    def bury_trainer(self) -> None:
        trainer = self.running()
        status = trainer.process.wait()
        while trainer.read(0):
            pass
        self.judge_events()
        trainer.close()
        self.trainer = None
        if status != -signal.SIGKILL:
            log = (self.root / "trainer.log").read_text().splitlines()[-15:]
            raise BrokenPromiseError(
                "\n".join([f"trainer ended by itself: {status}", *log, *self.tail()])
            )

    def kill_daemon(self) -> bool:
        """SIGKILL the daemon and wait for its end; False if there is none."""
        pid = self.daemon_pid()
        if not pid:
            return False
        self.end(pid)
        return True

    def end(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            end(pid)
        for process in self.daemons:
            process.poll()

    # -- judging ------------------------------------------------------------------------------

    def judge_events(self) -> None:
        """Every restore must be exact and the newest possible; acknowledgements are kept."""
        trainer = self.running()
        for event in trainer.events:
            if event.get("judged"):
                continue
            event["judged"] = True
            if event["event"] == "attached":
                trainer.attempt = event["attempt"]
            elif event["event"] == "acked":
                self.acked.add(tuple(event["id"]))
            elif event["event"] == "restored":
                self.judge_restore(trainer, event)

    def judge_restore(self, trainer: Trainer, event: dict[str, Any]) -> None:
        found = tuple(event["id"])
        if event["fault"]:
            raise BrokenPromiseError(f"torn or mixed state restored: {event}")
        if event["skipped"]:
            raise BrokenPromiseError(f"a step was skipped: {event}")
        expected = trainer.expected or (0, 0)
        if found != expected:
            raise BrokenPromiseError(
                "\n".join([f"resumed from {found}, not from {expected}: {event}", *self.tail()])
            )
        self.facts[f"restored from {event['source'] or 'nothing'}"] += 1

    def audit(self) -> None:
        """Nothing sealed is torn, nothing acknowledged is lost, the latest never goes back."""
        if self.trainer is None:
            self._audit_memory()
        asyncio.run(self._audit())

    def _audit_memory(self) -> None:
        """Read every sealed snapshot, by the format and not by the product."""
        for slot in slots_below(self.runtime):
            if slot.usable:
                fault = fault_in(data_of(slot), *slot.id, self.mib << 20)
                if fault:
                    raise BrokenPromiseError(f"snapshot {slot.id} in host memory is torn: {fault}")
                self.facts["sealed snapshots read"] += 1

    async def _audit(self) -> None:
        store = self.store()
        catalog = Catalog(store, self.keyring)
        try:
            listing = await list_steps(store)
            commits = [one for one in listing.standing() if (await catalog.decision(one)).committed]
            newest = max(((s.attempt, s.step) for s in commits), default=None)
            floor = max([*self.acked, *filter(None, [self.latest])], default=None)
            if floor is not None and (newest is None or newest < floor):
                raise BrokenPromiseError(
                    f"latest went back to {newest}; {floor} was acknowledged or seen"
                )
            self.latest = newest
            for one in sorted(self.acked):
                if StepId(*one) not in listing.retired and StepId(*one) not in commits:
                    raise BrokenPromiseError(f"acknowledged commit {one} is lost")
            for step in commits:
                if (step.attempt, step.step) not in self.sure:
                    await self.check(catalog, step)
        except CkptmgrError as error:
            raise BrokenPromiseError(f"store can not be read: {error}") from error
        finally:
            await store.aclose()

    async def check(self, catalog: Catalog, step: StepId) -> None:
        """Read a commit back, bit by bit, unless a living daemon retires it meanwhile."""
        one = (step.attempt, step.step)
        try:
            damage = await self.fault_in_store(catalog, step)
        except (DamageError, ObjectNotFoundError) as error:
            damage = str(error)
        if damage and step not in (await list_steps(catalog.store)).retired:
            raise BrokenPromiseError(f"commit {step} is damaged: {damage}")
        self.facts["commits read back"] += 1
        self.facts["of them acknowledged"] += one in self.acked
        self.sure.add(one)

    async def fault_in_store(self, catalog: Catalog, step: StepId) -> str:
        """Say how a commit differs from the state of its step; empty if it does not."""
        decision = await catalog.decision(step)
        manifest = (await catalog.manifest(decision, 0)).manifest
        found = memoryview(bytearray(self.mib << 20))
        await fetch(catalog.store, plan_whole(manifest), found, BufferPool(128 << 20))
        if manifest.values != values_of(step.attempt, step.step):
            return "has the values of another step"
        if manifest.tags != {"attempt": step.attempt, "step": step.step}:
            return f"has tags {manifest.tags}"
        return fault_in(found, step.attempt, step.step, self.mib << 20)

    def expected(self) -> Id | None:
        """What the next attempt must resume from."""
        known = [newest_usable(self.runtime), self.store_latest()]
        return max(filter(None, known), default=None)

    def store_latest(self) -> Id | None:
        async def read() -> Id | None:
            store = self.store()
            found = await Catalog(store).latest()
            await store.aclose()
            return (found.attempt, found.step) if found else None

        return asyncio.run(read())

    def store(self) -> Store:
        """The judge's own way to the objects."""
        return RetryingStore(open_store(self.url))

    def is_stored(self, key: str) -> bool:
        async def look() -> bool:
            store = self.store()
            found = await exists(store, key)
            await store.aclose()
            return found

        return asyncio.run(look())

    # -- where a kill landed ------------------------------------------------------------------

    def trainer_place(self, last: str) -> str:
        """Where the trainer was, from its last words and from host memory."""
        writing = any(slot.state == WRITING for slot in slots_below(self.runtime))
        if last == "restore":
            return "mid-restore"
        if last == "copy":
            return "mid-copy" if writing else "before the copy"
        if last == "seal":
            return "mid-seal" if writing else "sealed, untold"
        return {"start": "starting", "attach": "attaching"}.get(last, "training")

    def daemon_place(self, last: str) -> str:
        """Where the daemon was, from its log and from what it left in the store."""
        if last == "restore":
            return "mid-restore"
        undecided = {slot.id for slot in slots_below(self.runtime) if slot.undecided}
        begun = [e for e in self.daemon_events() if e["event"] in ("writing", "started")]
        if not begun or begun[-1]["event"] == "started":
            return "woken" if undecided else "idle"
        attempt, _, step = begun[-1]["step"].partition(".")
        one = (int(attempt), int(step))
        if one not in undecided:
            return "idle"
        key = f"{one[0]:08d}/{one[1]:012d}"
        if self.is_stored(f"commit/{key}"):
            return "committed, untold"
        if self.is_stored(f"man/{key}/000000"):
            return "mid-commit"
        return "mid-persist"

    def note(self, victim: str, *places: str) -> None:
        self.kills += 1
        inside = [place for place in places if place in INSIDE]
        self.places[victim, (inside or list(places))[0]] += 1

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """End what still runs."""
        if self.trainer is not None:
            self.trainer.process.kill()
            self.trainer.process.wait()
            self.trainer.close()
        self.kill_daemon()
        for process in self.daemons:
            process.kill()
            process.wait()

    def wipe_memory(self) -> None:
        """Lose host memory, as a reboot does; nothing of the job runs then: a daemon that the
        trainer started between two kills is ended, too.
        """
        self.kill_daemon()
        shutil.rmtree(self.runtime / "buffers", ignore_errors=True)
