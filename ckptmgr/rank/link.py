"""The rank's link to the daemon: attach, keep a daemon alive, ask. Never on the save path."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ckptmgr.config import CONTROL_TIMEOUT_SECONDS, START_SECONDS_MAX, STORE_TIMEOUT_SECONDS
from ckptmgr.errors import (
    CkptmgrError,
    DaemonUnreachableError,
    HostMemoryError,
    UsageError,
)
from ckptmgr.rank.buffers import Pages, open_locked
from ckptmgr.rank.latch import Latch
from ckptmgr.rank.pagelocks import PageLocks
from ckptmgr.rank.turns import Turns
from ckptmgr.staging.control import (
    Attach,
    Attached,
    Client,
    Detach,
    Done,
    Message,
    Stated,
    Status,
)
from ckptmgr.staging.inbox import drop_ticket
from ckptmgr.staging.launch import connect, connect_or_start
from ckptmgr.staging.slots import Sealed
from ckptmgr.telling import tell
from ckptmgr.types import Outcome

ATTACH_SECONDS_MAX = 4 * STORE_TIMEOUT_SECONDS
"""Attaching claims an attempt in the store: a few operations, each with its own deadline."""

STEP_SECONDS_MAX = 5.0
"""How long a step may wait for the daemon, where it must not snapshot without an answer: one that
is well answers in milliseconds, in a second if it has to be started first."""

_RESPAWN_PAUSE_SECONDS = 1.0
_REJOIN_PAUSE_SECONDS = 0.02

R = TypeVar("R", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rank asks for: the fields of `Attach` that do not change, and room for a snapshot."""

    url: str
    rank: int
    world: int
    slots: int
    codec: str
    keep: int | str
    table_bytes: int
    data_bytes: int
    run_id: str = ""
    max_d2h_gbps: float = 0.0


class Link:
    """A host buffer, the attempt it is written under, and the connection to the daemon.

    A thread of its own hears the daemon's death at once, starts another daemon and attaches the
    same buffer to it: the snapshots in it are adopted, the trainer notices nothing. `lost` says
    that the daemon does not know our buffer, because somebody removed its file: the next snapshot
    must `grow` into a new one. `rejoined` counts how often a daemon had to be attached to again,
    because the one before died, or because an exception cut a question short: it knows nothing
    then of what was asked before.

    Rank 0 claims the attempt; the others are given `claimed`, its number and nonce.
    """

    def __init__(self, runtime: Path, wanted: Wanted, claimed: tuple[int, str] = (0, "")) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self.attempt, self.nonce = claimed
        self._turns = Turns()
        self._answer_at = math.inf
        self.leaving = False
        self._leave_at = math.inf
        self._ended = threading.Event()
        self._client, attached = self._join()
        try:
            self.attempt, self.nonce = attached.attempt, attached.nonce
            self._daemon = attached.pid
            self.buffer = open_locked(attached)
        except BaseException:
            self._client.close()
            raise
        self.lost = False
        self.rejoined = 0
        self._lasting: Message | None = None
        self._silent = False
        self._restored = Latch()
        self._pages = Pages(self.buffer, self._restored, resumes=self.attempt > 1)
        try:
            self._liveness = connect(runtime)
        except DaemonUnreachableError:
            self._liveness = self._revive()
        self._watch = threading.Thread(target=self._watch_daemon, name="ckptmgr", daemon=True)
        self._watch.start()

    # -- host memory --------------------------------------------------------------------------

    @property
    def locks(self) -> PageLocks:
        """The pages of the buffer that are locked for a GPU."""
        return self._pages.locks

    def populate_all(self) -> None:
        """Say that a restore is over, or that none will come."""
        if not self._restored.is_set:  # every step says so
            self._restored.set()

    def wait_populated(self, slot: int) -> None:
        """Wait until every page of a slot is there, and locked.

        Raises:
            HostMemoryError: there is not enough shared memory.
        """
        self.populate_all()
        self._pages.wait(slot)

    def _release_buffer(self) -> None:
        self._pages.close()
        self.buffer.close()

    def grow(self, table_bytes: int, data_bytes: int, *, soon: bool = False) -> None:
        """Change to a buffer that holds a snapshot of this size; the daemon finishes the old one.

        No view of the old buffer may be in use. If it raises, the old buffer stays. `soon` bounds
        it as `ask_soon`.

        Raises:
            HostMemoryError: not enough shared memory.
            DaemonUnreachableError: no daemon answers.
        """
        wanted = replace(
            self._wanted,
            table_bytes=max(table_bytes, self._wanted.table_bytes),
            data_bytes=max(data_bytes, self._wanted.data_bytes),
        )

        def change() -> None:
            self._change_buffers(wanted)

        if soon:
            self._soon(lambda: self._alone(change, STEP_SECONDS_MAX))
        else:
            self._alone(change)

    def _change_buffers(self, wanted: Wanted) -> None:
        old, self._wanted = self._wanted, wanted
        try:
            attached = self._again(lambda: self._attach(self._client, same_buffer=False))
            buffer = open_locked(attached)
        except BaseException:
            self._wanted = old
            self._client.close()  # the daemon may have changed: attach the old one
            raise
        self._release_buffer()
        self.buffer = buffer
        self.lost = False
        self._pages = Pages(self.buffer, self._restored, resumes=self.attempt > 1)

    @property
    def progress_bytes(self) -> int:
        """Bytes of this buffer that are in the store; any thread may ask while another grows."""
        try:
            return self.buffer.progress_bytes
        except ValueError:  # it is just being closed
            return 0

    def spooled_steps(self) -> list[int]:
        """Steps of this attempt that are in the spool; any thread may ask while another grows."""
        sealed = self.sealed_here()
        return [snapshot.step for snapshot, outcome in sealed if outcome is Outcome.SPOOLED]

    def sealed_here(self) -> Sealed:
        """What this attempt has sealed; any thread may ask while another grows.

        A slot and a generation mean something in one buffer only: they begin anew in the next one.
        Look a snapshot up here by all that it says of itself.
        """
        buffer = self.buffer
        try:
            return [
                (snapshot, buffer.outcome(snapshot))
                for snapshot in buffer.snapshots()
                if snapshot.attempt == self.attempt
            ]
        except (ValueError, HostMemoryError):  # it is just being closed, or a slot is damaged
            return []

    # -- requests -----------------------------------------------------------------------------

    def _attach(
        self,
        client: Client,
        *,
        same_buffer: bool = True,
        claimed: tuple[int, str] | None = None,
    ) -> Attached:
        """Attach under the attempt that we have, or begin to take part in one that is `claimed`."""
        wanted = self._wanted
        known = hasattr(self, "buffer")
        attempt, nonce = claimed or (self.attempt, self.nonce)
        request = Attach(
            url=wanted.url,
            rank=wanted.rank,
            world=wanted.world,
            slots=wanted.slots,
            table_bytes=wanted.table_bytes,
            data_bytes=wanted.data_bytes,
            codec=wanted.codec,
            keep=wanted.keep,
            attempt=attempt,
            nonce=nonce,
            begins=claimed is not None or not known,
            buffer=self.buffer.id if known and same_buffer else "",
            run_id=wanted.run_id,
            max_d2h_gbps=wanted.max_d2h_gbps,
        )
        return client.ask(request, Attached, self._seconds(ATTACH_SECONDS_MAX))

    def begin_attempt(self, claimed: tuple[int, str] = (0, "")) -> None:
        """Claim another attempt, or take part in one that rank 0 has `claimed`. The buffer stays,
        and what the attempt before has sealed in it is decided as ever. If it raises, so does the
        attempt.

        Raises:
            DaemonUnreachableError: no daemon answers.
            CkptmgrError: whatever the daemon answered with.
        """
        self._alone(lambda: self._take_part(claimed))

    def _take_part(self, claimed: tuple[int, str]) -> None:
        try:
            attached = self._again(lambda: self._attach(self._client, claimed=claimed))
            self.attempt, self.nonce = attached.attempt, attached.nonce
        except BaseException:
            self._client.close()  # the daemon may have changed: attach what we are
            raise

    def _join(self) -> tuple[Client, Attached]:
        """Connect and attach; again if the daemon dies over it.

        The socket of a daemon that is being killed goes on taking connections for a moment, so a
        connection proves nothing before its first answer.

        Raises:
            DaemonUnreachableError: no daemon answers for START_SECONDS_MAX.
            CkptmgrError: whatever the daemon answered with.
        """
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            client = connect_or_start(self._runtime, self._seconds(START_SECONDS_MAX))
            try:
                return client, self._attach(client)
            except DaemonUnreachableError:
                client.close()
                if time.monotonic() >= deadline or self._ended.wait(_REJOIN_PAUSE_SECONDS):
                    raise
            except BaseException:
                client.close()
                raise

    def ask(
        self,
        request: Message,
        expect: type[R],
        timeout_seconds: float = CONTROL_TIMEOUT_SECONDS,
        *,
        seconds_max: float = math.inf,
    ) -> R:
        """Ask the daemon; once more, attached again, if it died over the question, or if an
        exception has cut the one before short. All of that, and the questions of other threads
        that come first, is waited for `seconds_max` at most.

        Raises:
            DaemonUnreachableError: no daemon answers, or not in time.
            UsageError: a signal handler asks amid a question of the thread that it interrupts.
            CkptmgrError: whatever the daemon answered with.
        """

        def asked() -> R:
            return self._client.ask(request, expect, self._seconds(timeout_seconds))

        try:
            return self._alone(lambda: self._again(asked), seconds_max)
        except DaemonUnreachableError:
            if self.leaving:
                self._leave_at = -math.inf
            raise

    def ask_soon(self, request: Message, expect: type[R]) -> R:
        """As `ask`, in the thread that trains: it waits for STEP_SECONDS_MAX. If there is no answer
        then the thread that watches the daemon waits for one, and nobody is asked again in this way
        before it came.

        Raises:
            DaemonUnreachableError: no daemon answers in time, or has since it did not.
            CkptmgrError: whatever the daemon answered with.
        """
        return self._soon(lambda: self.ask(request, expect, seconds_max=STEP_SECONDS_MAX))

    def _soon(self, do: Callable[[], T]) -> T:
        if self._silent:
            raise DaemonUnreachableError(
                "has not answered since it was asked in vain", subject="daemon"
            )
        try:
            return do()
        except DaemonUnreachableError:
            self._silent = True
            self._liveness.shutdown()  # only now: who watches looks for the flag before it waits
            raise

    def _again(self, ask: Callable[[], T]) -> T:
        """Ask; once more, attached again, if the connection is no more."""
        try:
            return ask()
        except DaemonUnreachableError:
            self._reconnect()
            return ask()

    def _alone(self, do: Callable[[], T], seconds_max: float = math.inf) -> T:
        """What uses the connection, one thread at a time, and none that is amid using it."""
        end = time.monotonic() + seconds_max

        def in_time() -> T:
            try:
                self._answer_at = end
                self._seconds(math.inf)  # before a question that there is no time for is cut short
                return do()
            finally:
                self._answer_at = math.inf

        if self._turns.is_ours:
            raise UsageError(
                "is asked by a signal handler amid another question",
                subject="daemon",
                hint="Save in the handler; ask what became of it after the handler has ended.",
            )
        try:
            return self._turns.take(in_time, min(seconds_max, self._left_seconds()))
        except TimeoutError:
            raise DaemonUnreachableError(
                "has not answered another thread, which asked before", subject="daemon"
            ) from None

    def leave_within(self, seconds: float) -> None:
        """Leave the job in that time at most: no question takes longer from now on, all of them
        together, and after one that was not answered nobody is asked again.
        """
        self.leaving = True
        self._leave_at = min(self._leave_at, time.monotonic() + seconds)
        if self._turns.is_ours:
            return
        try:  # another thread may be amid a question that has more time than that
            self._turns.take(lambda: None, self._left_seconds())
        except TimeoutError:
            self._leave_at = -math.inf

    def _left_seconds(self) -> float:
        return max(0.0, self._leave_at - time.monotonic())

    def _seconds(self, wanted: float) -> float:
        """As many seconds, or what is left to answer in, or to leave in. Whoever asks has its turn.

        Raises:
            DaemonUnreachableError: nothing is.
        """
        left = self._left_seconds()
        if not left:
            raise DaemonUnreachableError(
                "has not answered, and the block is left", subject="daemon"
            )
        left = min(left, self._answer_at - time.monotonic())
        if left <= 0:
            raise DaemonUnreachableError("has not answered in time", subject="daemon")
        return min(wanted, left)

    @property
    def is_asked(self) -> bool:
        """Whether some thread is amid a question: a signal handler can not ask one then."""
        return self._turns.is_taken

    def ask_later_daemons(self, request: Message) -> None:
        """Ask it, too, of each daemon that has to be attached to instead of this one."""
        self._lasting = request

    def _reconnect(self) -> None:
        """Attach the buffer we have to whichever daemon there is now."""
        self._client.close()
        client, attached = self._join()
        try:
            self.rejoined += 1
            self._daemon = attached.pid
            self.lost = not self.buffer.follow(Path(attached.path))
            if self._lasting is not None:
                client.ask(self._lasting, Done, self._seconds(CONTROL_TIMEOUT_SECONDS))
            if self._ended.is_set():
                raise DaemonUnreachableError("is not needed any more", subject="daemon")
        except BaseException:
            client.close()
            raise
        self._client = client  # only now: whatever cuts this short is met by the next question

    def sealed(self) -> None:
        """Wake the daemon.

        Raises:
            HostMemoryError: the inbox is gone; the daemon does not know of the snapshot.
        """
        try:
            drop_ticket(self._runtime, self.buffer.id)
        except HostMemoryError:
            self.lost = True
            raise

    # -- the daemon's life --------------------------------------------------------------------

    def _watch_daemon(self) -> None:
        """Wait for the end of the connection, or for a question in vain; no more is sent on it."""
        while not self._ended.is_set():
            if not self._silent and self._is_of_our_daemon(self._liveness):
                with contextlib.suppress(DaemonUnreachableError):
                    self._liveness.wait_closed(None)
            if self._ended.is_set():
                return
            self._liveness.close()
            try:
                self._liveness = self._revive()
            except Exception as error:  # noqa: BLE001 - nobody else would start another daemon
                tell(f"no daemon yet: {error!r}")
                self._ended.wait(_RESPAWN_PAUSE_SECONDS)

    def _is_of_our_daemon(self, client: Client) -> bool:
        """Whether it was taken by the daemon that we are attached to, and not kept by systemd's
        socket for the next one: its end would tell of that one only.
        """
        with contextlib.suppress(CkptmgrError):
            return bool(client.ask(Status(), Stated).state["pid"] == self._daemon)
        return False

    def _reach(self) -> None:
        """Attach again, unless the daemon that we are attached to answers: if a question has met
        the death of the one before, the new one would forget what it was asked since.

        Only an answer tells. Connections of a process that is being killed end one after the
        other, and systemd's socket takes new ones without any daemon.
        """
        self._again(
            lambda: self._client.ask(Status(), Stated, self._seconds(CONTROL_TIMEOUT_SECONDS))
        )

    def _revive(self) -> Client:
        while not self._ended.is_set():
            try:
                self._alone(self._reach)
                self._silent = False
                return connect(self._runtime)
            except (CkptmgrError, OSError) as error:
                tell(f"no daemon yet: {error}")
                self._ended.wait(_RESPAWN_PAUSE_SECONDS)
        return self._client

    def close(self, *, clean: bool) -> None:
        """Leave the job; `clean` lets the daemon free the memory once everything is decided.

        It takes CONTROL_TIMEOUT_SECONDS at most, or what is left by `leave_within`.
        """
        self.leave_within(CONTROL_TIMEOUT_SECONDS)
        if clean and not self._client.is_open:
            with contextlib.suppress(CkptmgrError):
                self._alone(self._reconnect)  # a question was cut short: this is still to be told
        self._ended.set()
        self._liveness.shutdown()
        self._watch.join(timeout=self._left_seconds())
        self._liveness.close()
        self._release_buffer()
        with contextlib.suppress(CkptmgrError):
            detach = Detach(clean)
            self._alone(
                lambda: self._client.ask(detach, Done, self._seconds(CONTROL_TIMEOUT_SECONDS))
            )
        self._client.shutdown()
        self._client.close()
