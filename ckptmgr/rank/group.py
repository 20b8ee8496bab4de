"""The ranks of the job: one broadcast on entering, then agreements over the key-value store.

Nothing here runs between the entry and the return of `step`. Every wait has a deadline, names who
is missing, and can be interrupted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist

from ckptmgr import errors
from ckptmgr.errors import (
    CkptmgrError,
    ControlProtocolError,
    RankFailedError,
    RanksError,
    RanksMissingError,
    RendezvousError,
    UsageError,
)
from ckptmgr.rank.registers import Registers, StoreRegisters
from ckptmgr.types import MALFORMED

T = TypeVar("T")

ANNOUNCEMENT_BYTES = 16 << 10
"""Length of the broadcast: three texts of _TEXT_MAX characters, each escaped to six bytes."""

_TEXT_MAX = 600
_NAMED_MAX = 20
_LOOK_SECONDS = 0.002
_GRACE_SECONDS = 5.0
"""How long after a deadline the key-value store may take to say who is missing."""

AGREE_SECONDS_MAX = 600.0
"""Longest wait for the other ranks to come to the same call; a restore may fetch for longer."""

ASKS_PER_SECOND_MAX = 2000.0
"""Bound of the questions that all waiting ranks together put to the key-value store. One core
answers about 25,000 (37 us each over loopback)."""

ASK_PAUSE_SECONDS_MAX = 0.05
"""Longest pause between two questions of a rank; longer only where there are very many ranks."""


class Claimed(msgspec.Struct, frozen=True):
    """An attempt and its nonce; `terms` are the arguments that all ranks must give alike."""

    attempt: int
    nonce: str
    terms: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What a rank has to say in an agreement: nothing wrong, or an error."""

    rank: int
    error: str = ""
    message: str = ""
    subject: str = ""
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.error

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Verdict:
        """The verdict of a rank that met `error`."""
        if not isinstance(error, CkptmgrError):
            told = f"{type(error).__name__}: {error}"[:_TEXT_MAX]
            return cls(rank, RankFailedError.__name__, told)
        message, subject, hint = (
            text[:_TEXT_MAX] for text in (error.message, error.subject, error.hint)
        )
        return cls(rank, type(error).__name__, message, subject, hint)

    def failure(self) -> CkptmgrError:
        """The error, of its own type, with the rank in its subject."""
        kind: Any = getattr(errors, self.error, RankFailedError)
        if not (isinstance(kind, type) and issubclass(kind, CkptmgrError)):
            kind = RankFailedError
        named = f"rank {self.rank}: {self.subject}" if self.subject else f"rank {self.rank}"
        failure: CkptmgrError = kind(self.message, subject=named, hint=self.hint)
        return failure


class Ranks(Protocol):
    """Who takes part. With one rank nothing is asked of anybody."""

    rank: int
    world: int

    def share(self, claim: Callable[[], Claimed]) -> Claimed:
        """Let rank 0 claim; what it claimed, or its error, on every rank."""

    def agree(self, topic: str, verdict: Verdict, timeout_seconds: float) -> Verdict:
        """Tell all ranks a verdict; ok when every rank's is, else one that is not, alike for all.

        All ranks agree on the same topics in the same order.

        Raises:
            RanksMissingError: ranks that have not said anything within the time.
            RendezvousError: the key-value store does not answer.
        """

    def common(self, topic: str, items: Collection[str], timeout_seconds: float) -> list[str]:
        """Those of this rank's `items` that every rank has named. Waits and errors as `agree`."""

    def count(self, item: str, more: int) -> int:
        """Add to what all ranks have counted of an item since `share`, and give the sum.

        Raises:
            RendezvousError: the key-value store does not answer.
        """

    def registers(self) -> Registers:
        """Registers of the attempt for another thread; only where there are many ranks."""


class Alone:
    """The one rank of a job: no process group, no key-value store."""

    rank = 0
    world = 1

    def share(self, claim: Callable[[], Claimed]) -> Claimed:
        """Claim."""
        return claim()

    def agree(
        self,
        topic: str,  # noqa: ARG002
        verdict: Verdict,
        timeout_seconds: float,  # noqa: ARG002
    ) -> Verdict:
        """One rank always agrees with itself."""
        return verdict

    def common(
        self,
        topic: str,  # noqa: ARG002
        items: Collection[str],
        timeout_seconds: float,  # noqa: ARG002
    ) -> list[str]:
        """All of them."""
        return list(items)

    def count(self, item: str, more: int) -> int:  # noqa: ARG002
        """Nobody else counts."""
        return more

    def registers(self) -> Registers:
        """Nobody to tell anything."""
        raise RendezvousError("one rank has no key-value store", subject="registers")


class Group:
    """The ranks of a process group of more than one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._registers: Registers | None = None
        self._agreements = 0

    def share(self, claim: Callable[[], Claimed]) -> Claimed:
        """As promised by Ranks: one broadcast of a fixed length, whatever happened on rank 0."""
        announced = _opened(self._broadcast(b"")) if self.rank else self._announce(claim)
        if isinstance(announced, Verdict):
            raise announced.failure()
        from torch.distributed.distributed_c10d import _get_default_store

        self._registers = StoreRegisters.under(announced.nonce, _get_default_store())
        return announced

    def _announce(self, claim: Callable[[], Claimed]) -> Claimed:
        try:
            claimed = claim()
        except BaseException as error:
            self._broadcast(_closed(Verdict.of(0, error)))
            raise
        self._broadcast(_closed(claimed))
        return claimed

    def _broadcast(self, letter: bytes) -> bytes:
        device = _device_of(self._group)
        padded = torch.frombuffer(bytearray(letter.ljust(ANNOUNCEMENT_BYTES)), dtype=torch.uint8)
        sheet = padded.to(device)
        first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        work: Any = dist.broadcast(sheet, src=first, group=self._group, async_op=True)
        pause = threading.Event()
        # `wait` of a collective can not be interrupted; the timeout of the group bounds this loop.
        while not work.is_completed():
            pause.wait(_LOOK_SECONDS)
        work.wait()
        return bytes(sheet.cpu().numpy())

    def common(self, topic: str, items: Collection[str], timeout_seconds: float) -> list[str]:
        """As promised by Ranks: each item is a count of the ranks that have named it."""
        registers = self._entered()
        base = f"common/{self._agreements + 1}-{topic}"
        keys = {item: f"{base}/{_short(item)}" for item in items}
        verdict = Verdict(self.rank)
        try:
            for key in keys.values():
                registers.count(key, 1)
        except CkptmgrError as error:
            verdict = Verdict.of(self.rank, error)  # told: agreements are counted by all alike
        agreed = self.agree(topic, verdict, timeout_seconds)
        if not agreed.ok:
            raise agreed.failure()
        return [item for item, key in keys.items() if registers.count(key) == self.world]

    def count(self, item: str, more: int) -> int:
        """As promised by Ranks."""
        return self._entered().count(f"count/{_short(item)}", more)

    def registers(self) -> Registers:
        """As promised by Ranks."""
        return self._entered().twin()

    def _entered(self) -> Registers:
        assert self._registers is not None
        return self._registers

    def agree(self, topic: str, verdict: Verdict, timeout_seconds: float) -> Verdict:
        """As promised by Ranks. A thread does the asking, so that Ctrl-C is heard meanwhile."""
        self._agreements += 1
        round_ = _Round(self._entered(), f"agree/{self._agreements}-{topic}", self.world, verdict)
        return round_.result(timeout_seconds)


def _short(item: str) -> str:
    """What stands for an item of any length in a key."""
    return blake2b(item.encode(), digest_size=12).hexdigest()


class _Round:
    """One agreement: a count of those who are content, and the outcome, which is decided once: by
    the first who is not, or by whoever sees that all are.
    """

    def __init__(self, registers: Registers, key: str, world: int, verdict: Verdict) -> None:
        self._registers, self._key, self._world, self._own = registers, key, world, verdict
        self._stop = threading.Event()
        self._interrupted = False
        self._answer: Verdict | CkptmgrError | None = None
        self._thread = threading.Thread(target=self._run, name="ckptmgr agree", daemon=True)

    def result(self, timeout_seconds: float) -> Verdict:
        deadline = time.monotonic() + timeout_seconds
        self._thread.start()
        try:
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._thread.join(0.1)
            self._stop.set()
            self._thread.join(_GRACE_SECONDS)
        except BaseException:
            self._interrupted = True
            self._stop.set()
            self._thread.join(1.0)
            raise
        if self._answer is None:
            raise RendezvousError(f"no answer for {timeout_seconds:.0f} s", subject=self._key)
        if isinstance(self._answer, CkptmgrError):
            raise self._answer
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except CkptmgrError as error:
            self._answer = error

    def _ask(self) -> Verdict:
        if not self._own.ok:
            return self._decide(self._own)
        self._registers.decide(f"{self._key}/{self._own.rank}", "ok")
        self._registers.count(f"{self._key}/ok", 1)
        pause = _LOOK_SECONDS
        while True:
            last_look = self._stop.is_set()
            decided = self._registers.read(f"{self._key}/outcome")
            if decided is not None:
                return _verdict(decided)
            if self._registers.count(f"{self._key}/ok") == self._world:
                return self._decide(self._own)
            if last_look:
                return self._decide(Verdict.of(self._own.rank, self._what_is_wrong()))
            self._stop.wait(pause)
            pause = min(2 * pause, ask_pause_seconds(self._world))

    def _decide(self, verdict: Verdict) -> Verdict:
        record = msgspec.json.encode(verdict).decode()
        return _verdict(self._registers.decide(f"{self._key}/outcome", record))

    def _what_is_wrong(self) -> BaseException:
        if self._interrupted:
            return KeyboardInterrupt("was interrupted")
        silent = [
            rank
            for rank in range(self._world)
            if self._registers.read(f"{self._key}/{rank}") is None
        ]
        named = ", ".join(map(str, silent[:_NAMED_MAX]))
        more = f" and {len(silent) - _NAMED_MAX} more" if len(silent) > _NAMED_MAX else ""
        return RanksMissingError(
            f"did not come to {self._key.partition('-')[2]!r} in time",
            subject=f"ranks {named}{more}",
        )


def together(ranks: Ranks, topic: str, timeout_seconds: float, act: Callable[[], T]) -> T:
    """Do something on every rank; its result, once it was done on all of them.

    Raises:
        CkptmgrError: what went wrong first on any rank, of the same type on all ranks.
        RanksMissingError: ranks that have not come to it within the time.
    """
    try:
        result = act()
    except BaseException as error:
        agreed = Verdict.of(ranks.rank, error)
        with contextlib.suppress(RanksError):
            agreed = ranks.agree(topic, agreed, timeout_seconds)
        if agreed.rank == ranks.rank or not isinstance(error, Exception):
            raise
        raise agreed.failure() from error
    agreed = ranks.agree(topic, Verdict(ranks.rank), timeout_seconds)
    if not agreed.ok:
        raise agreed.failure()
    return result


def ask_pause_seconds(world: int) -> float:
    """How long a waiting rank lets the key-value store alone between two questions."""
    return max(ASK_PAUSE_SECONDS_MAX, world / ASKS_PER_SECOND_MAX)


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Who takes part in `group`, or in the default group; this process alone if there is none.

    Raises:
        UsageError: the launcher started many processes, but there is no process group; or this
            process is not in `group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _refuse_lost_ranks()
        return Alone()
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not a member", subject="group")
    return Group(group) if dist.get_world_size(group) > 1 else Alone()


def _refuse_lost_ranks() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UsageError(
            f"is {world}, but there is no process group to agree over",
            subject="WORLD_SIZE",
            hint="Call torch.distributed.init_process_group before, or unset WORLD_SIZE.",
        )


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor must be for a collective of this group."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _closed(letter: Claimed | Verdict) -> bytes:
    return msgspec.json.encode({type(letter).__name__: letter})


def _opened(sheet: bytes) -> Claimed | Verdict:
    try:
        letter = msgspec.json.decode(sheet, type=dict[str, msgspec.Raw])
        if "Claimed" in letter:
            return msgspec.json.decode(letter["Claimed"], type=Claimed)
        return msgspec.json.decode(letter["Verdict"], type=Verdict)
    except (*MALFORMED, KeyError) as error:
        raise ControlProtocolError(f"malformed: {error}", subject="broadcast of rank 0") from error


def _verdict(record: bytes) -> Verdict:
    try:
        return msgspec.json.decode(record, type=Verdict)
    except MALFORMED as error:
        raise ControlProtocolError(f"malformed verdict: {error}", subject="agreement") from error
