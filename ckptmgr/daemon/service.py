"""The daemon's life: start, adopt, serve requests, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from ckptmgr import __version__
from ckptmgr.bucket import Bucket, bytes_per_second
from ckptmgr.config import DRAIN_SECONDS, DaemonSettings
from ckptmgr.daemon.accounting import Accounts
from ckptmgr.daemon.ahead import Ahead
from ckptmgr.daemon.alone import only_one
from ckptmgr.daemon.counts import counted
from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.gauges import Clock, Gauges
from ckptmgr.daemon.http import WebServer
from ckptmgr.daemon.intake import Held, Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, fault, label_of, warning
from ckptmgr.daemon.notify import Supervisor
from ckptmgr.daemon.pipeline import Pipeline
from ckptmgr.daemon.preempted import Preemptions
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.requests import Requests
from ckptmgr.daemon.spool import Spool, SpoolDirectory
from ckptmgr.daemon.state import job_state
from ckptmgr.daemon.writer import Writer
from ckptmgr.errors import CkptmgrError, StoreError, UsageError
from ckptmgr.metrics import Metrics
from ckptmgr.repository.budget import LEASE_BYTES, BufferPool
from ckptmgr.repository.hold import host_name
from ckptmgr.repository.keyring import load_keyring
from ckptmgr.staging import control
from ckptmgr.staging.inbox import LOCK, SOCKET, InboxWatch, prepare, take_tickets
from ckptmgr.store.mirrored import place_of
from ckptmgr.types import StepId

FETCHED = "fetched"
PREEMPTED = "preempted"
HOST = "host"
_SIGTERM_DRAIN_SECONDS = 60.0

URL_CHARS_MAX = 2048
"""Every job's URL is in the reply to `status`, whose length is bounded."""

LOOK_SECONDS_MAX = 2.0
"""How often the daemon looks for buffers to free and for idleness: nothing waits for it."""


class Service:
    """One daemon: one runtime directory, one user, any number of jobs."""

    def __init__(self, settings: DaemonSettings, supervisor: Supervisor | None = None) -> None:
        self.settings = settings
        self.supervisor = supervisor or Supervisor()
        self.metrics = Metrics()
        self.keyring = load_keyring(os.environ)
        self.pool = BufferPool(settings.budget_bytes)
        self.intake = Intake(settings.runtime_dir, self.supervisor)
        self.preemptions = Preemptions(self.metrics, self.intake, settings.runtime_dir / PREEMPTED)
        self._gauges = Gauges(self.metrics, self.intake)
        self._clock = Clock()
        self.reader = Reader(self.intake, settings.runtime_dir / FETCHED)
        self.ahead = Ahead(self.reader, self.intake, settings.runtime_dir / FETCHED)
        self.jobs: dict[str, Job] = {}
        self.metrics_port = -1
        self.host = ""
        self.adopted = False
        self.spools: SpoolDirectory | None = None
        self.drainers: dict[str, Drainer] = {}
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._background_pool = BufferPool(LEASE_BYTES)  # of the mirror, and to read back
        self._pipeline = Pipeline(self.pool)
        gbps = settings.max_store_gbps
        self._limit = Bucket(bytes_per_second(gbps)) if gbps else None
        self._accounts = Accounts(self.metrics)
        self._connections: set[asyncio.Task[None]] = set()
        self._serving: set[Requests] = set()
        self._ending = asyncio.Event()
        self._fault: BaseException | None = None
        self._last_activity = time.monotonic()

    # -- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, Stop or idleness; then drain and end.

        Raises:
            DaemonError: another daemon has this runtime directory.
            HostMemoryError: the runtime directory is not ours.
            CkptmgrError: a fault of our own ended it.
        """
        runtime = self.settings.runtime_dir
        prepare(runtime)
        with counted(self.metrics), only_one(runtime / LOCK) as before:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._ending.set)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's warning to the whole job
            self.host = host_identity(runtime)
            shutil.rmtree(runtime / FETCHED, ignore_errors=True)
            (runtime / FETCHED).mkdir(mode=0o700)
            web = self._serve_web()
            watch = InboxWatch(runtime, lambda: loop.call_soon_threadsafe(self._ticket))
            # Before anybody can ask: what is not known to be in the spool is taken for lost.
            await self._open_spools()
            given = self.supervisor.socket(runtime / SOCKET)
            server = await control.listen(runtime / SOCKET, self._connected, given)
            event("started", pid=os.getpid(), runtime=str(runtime), metrics_port=self.metrics_port)
            self.metrics.build.labels(__version__).set(1)
            self.metrics.daemon_restarts.inc(before.count)
            if before.killed:
                warning("killed_before")
            try:
                for held in self.intake.adopt():
                    self._employ(held)
                self.preemptions.adopt()
                self.adopted = True
                async with self.supervisor.told(self._in_words, watch.is_alive):
                    await self._until_ended()
            finally:
                await self._close(server, watch, web)
            if self._fault is not None:
                fault(self._fault)
                raise CkptmgrError("ended over a fault of its own; its log has the traceback")

    def _serve_web(self) -> WebServer | None:
        if self.settings.metrics_port < 0:
            return None
        try:
            server = WebServer(self, self.settings.metrics_port)
        except OSError as error:
            warning("metrics_off", port=self.settings.metrics_port, why=str(error))
            return None
        self.metrics_port = server.port
        return server

    async def _open_spools(self) -> None:
        """Go on draining what a daemon before this one left, whether its trainer lives or not."""
        path = self.settings.spool_dir
        if path is None:
            return
        try:
            self.spools = await SpoolDirectory.open(path, self.settings.spool_bytes_max)
        except (CkptmgrError, OSError) as error:
            # Training must not depend on a disk that is only there for bad days.
            warning("spool_off", path=str(path), why=str(error).partition("\n")[0])
            return
        for spool in self.spools.unfinished():
            event("spool_found", job=label_of(spool.url), parts=len(spool.parts))
            try:
                self.job(spool.url)
            except CkptmgrError as error:
                warning("spool_refused", path=label_of(spool.url), why=str(error))

    async def _until_ended(self) -> None:
        while not self._ending.is_set():
            await self._wait_for_change()
            self._clock.look()
            self._count()
            self._look_after_orphans()
            self.ahead.expire()
            self._accounts.look(self.jobs, self.intake)
            await self._close_unused()
            if self._idle_for() > self.settings.idle_seconds > 0:
                event("idle", seconds=self.settings.idle_seconds)
                return
        event("draining", undecided=self.undecided())
        with self.supervisor.stopping():
            left = await self.drain(_SIGTERM_DRAIN_SECONDS)
        if left:
            warning("drain_incomplete", left=left)
        else:
            event("drained", left=left)

    async def _wait_for_change(self) -> None:
        """Sleep until the daemon ends, or until it is time to look at idle buffers again."""
        idle = self.settings.idle_seconds
        pause = min(max(idle / 10, 0.05), LOOK_SECONDS_MAX) if idle else LOOK_SECONDS_MAX
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), pause)

    def _idle_for(self) -> float:
        if self._connections or self.intake.busy() or self._spooled() or self.ahead.urls:
            self._last_activity = time.monotonic()
        return time.monotonic() - self._last_activity

    def _look_after_orphans(self) -> None:
        """Notice trainers that died without a connection; free what nobody will come back for."""
        for held in list(self.intake.held.values()):
            if held.owner is None and not held.buffer.has_live_writer():
                held.died()
            if held.writer_alive or held.undecided() or held.busy:
                continue
            gone_for = held.orphaned_seconds
            if held.free_when_decided or gone_for > self.settings.memory_seconds:
                self.intake.release(held)

    async def _close_unused(self) -> None:
        """Close the stores of jobs that have neither a buffer nor a connection any more."""
        for url in self.jobs.keys() - self._used():
            # Looked at again: the one before took its time to close.
            if url not in self._used() and not self.jobs[url].collecting:
                # Out of the list first: whoever asks for it meanwhile opens it anew.
                job = self.jobs.pop(url)
                if self.spools is not None:
                    self.spools.forget(url)
                await self._end_drain(url)
                with contextlib.suppress(StoreError):  # what can not be closed is not used again
                    await job.aclose()
                if job.spool is not None:
                    await job.spool.aclose()

    def _used(self) -> set[str]:
        used = {held.binding.url for held in self.intake.held.values()}
        used = used.union(self.ahead.urls, *(requests.urls for requests in self._serving))
        return used | {spool.url for spool in self.spools.unfinished()} if self.spools else used

    async def _close(
        self, server: control.Listener, watch: InboxWatch, web: WebServer | None
    ) -> None:
        server.close()
        workers = [held.worker for held in self.intake.held.values() if held.worker]
        tasks = [*self._connections, *workers, *self._draining.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.ahead.aclose()
        await self.preemptions.aclose()
        await self._accounts.aclose()
        watch.close()
        if web is not None:
            web.close()
        for held in list(self.intake.held.values()):
            if not held.writer_alive and not held.undecided():
                self.intake.release(held)
        for job in self.jobs.values():
            await job.aclose()
        event("ended", undecided=self.undecided())
        if self.spools is not None:
            await self.spools.aclose()

    # -- buffers and jobs ---------------------------------------------------------------------

    def job(self, url: str) -> Job:
        """The job of a store URL, opened when first needed.

        Raises:
            UsageError: the URL names no store, or does not fit into a host buffer's header.
        """
        if len(url) > URL_CHARS_MAX:
            raise UsageError(f"has more than {URL_CHARS_MAX} characters", subject=url[:80] + "...")
        if url not in self.jobs:
            spool = self.spools.of(url) if self.spools is not None else None
            of_all = self.metrics, self.pool, self.settings, self._limit
            job = Job.open(url, *of_all, spool, self.keyring, self._background_pool)
            self.jobs[url] = job
            self._mirror(job)
            if spool is not None:
                self._drain(job, spool)
        return self.jobs[url]

    def _mirror(self, job: Job) -> None:
        """Start the mirror of a job; training must not depend on it."""
        if not self.settings.mirror_url:
            return
        try:
            place = place_of(self.settings.mirror_url, job.url)
            job.follow(place, self._background_pool, self.settings)
        except CkptmgrError as error:
            warning("mirror_off", job=job.label, why=str(error))

    def _drain(self, job: Job, spool: Spool) -> None:
        """Start to drain the spool of a job."""
        self.drainers[job.url] = Drainer(job, spool, self.intake)
        self._run_drainer(job.url)

    def _run_drainer(self, url: str) -> None:
        drainer = self.drainers[url]
        task = asyncio.create_task(drainer.run(), name=f"drain {label_of(url)}")
        task.add_done_callback(partial(self._drain_ended, url, drainer))
        self._draining[url] = task

    def _drain_ended(self, url: str, drainer: Drainer, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        part = drainer.part
        if part is None:
            self._fault = error
            self._ending.set()
            return
        # As with a writer: the other parts, and the other jobs, do not wait for the next daemon.
        fault(error, step=str(part.id))
        if drainer.faulted(part, error):
            self._tell_given_up(part.id, error, drainer.last_failure)
        if self.drainers.get(url) is drainer:
            self._run_drainer(url)

    async def _end_drain(self, url: str) -> None:
        self.drainers.pop(url, None)
        task = self._draining.pop(url, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def employ(self, held: Held) -> None:
        """Start the worker of a buffer that has none."""
        self._employ(held)

    def _employ(self, held: Held) -> None:
        try:
            job = self.job(held.binding.url)
        except CkptmgrError as error:
            warning("buffer_stranded", buffer=held.buffer.id, why=str(error))
            return
        held.spool_into(job.spool)
        writer = Writer(held, job, self._pipeline, self._count)
        task = asyncio.create_task(writer.run(), name=f"writer {held.buffer.id[:8]}")
        task.add_done_callback(partial(self._writer_ended, held, writer))
        held.worker = task
        held.wake.set()

    def _writer_ended(self, held: Held, writer: Writer, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        snapshot = writer.snapshot
        if snapshot is None:
            # A fault of ours: end loudly. The snapshots stay in host memory for the next daemon.
            self._fault = error
            self._ending.set()
            return
        # No reason to end: the next daemon would meet it again, and all other jobs wait meanwhile.
        fault(error, step=str(snapshot.id))
        if held.faulted(snapshot, error):
            self._tell_given_up(snapshot.id, error, held.last_failure)
        self._employ(held)

    def _tell_given_up(self, step: StepId, error: BaseException, why: str) -> None:
        warning("given_up", step=str(step), kind=type(error).__name__, why=why)

    def _count(self) -> None:
        """Bring the gauges up to date: on every ticket, and whenever a worker turns around."""
        self._gauges.update(self.jobs.values(), self.spools)

    def _ticket(self) -> None:
        """Something was sealed. The tickets only say where to look first."""
        self._last_activity = time.monotonic()
        for buffer_id in take_tickets(self.settings.runtime_dir):
            held = self.intake.held.get(buffer_id)
            if held is not None:
                held.wake.set()
        self._count()

    # -- connections --------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        sock: socket.socket = writer.get_extra_info("socket")
        requests = Requests(self)
        self._serving.add(requests)
        try:
            pid = control.check_peer(sock)
            with self._watch_death(pid, task):
                while (request := await control.read_request(reader)) is not None:
                    await control.send_reply(writer, await requests.answer(request))
        except (CkptmgrError, ConnectionError) as error:
            warning("connection_refused", why=str(error))
        except asyncio.CancelledError:
            return  # by us: the process at the other end is dead, or the daemon ends
        finally:
            self._connections.discard(task)
            self._last_activity = time.monotonic()
            await requests.close()
            self._serving.discard(requests)
            writer.close()

    @contextlib.contextmanager
    def _watch_death(self, pid: int, task: asyncio.Task[None]) -> Any:
        """End `task`, which serves a connection, when process `pid` at its other end dies.

        The end of the connection is not enough: data loader workers inherit the socket and may
        outlive the trainer, and nobody reads while a request is carried out. `pid` is 0 when the
        peer is in a pid namespace that we can not see.
        """
        try:
            pidfd = os.pidfd_open(pid) if pid else -1
        except OSError:
            pidfd = -1
        loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(pidfd)  # it stays readable for ever
            task.cancel()

        if pidfd >= 0:
            loop.add_reader(pidfd, died)
        try:
            yield
        finally:
            if pidfd >= 0:
                loop.remove_reader(pidfd)
                os.close(pidfd)

    # -- requests of more than one session ----------------------------------------------------

    async def drain(self, timeout_seconds: float = DRAIN_SECONDS) -> int:
        """Wait until nothing is undecided; returns how many snapshots still are at the end."""
        for held in self.intake.held.values():
            held.wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                for held in list(self.intake.held.values()):
                    await held.wait_decided()
                for spool in self.spools.unfinished() if self.spools else ():
                    await spool.wait_empty()
        return self.undecided()

    def undecided(self) -> int:
        """Snapshots that are not decided yet, in host memory or in the spool."""
        return self.intake.undecided() + self._spooled()

    def _spooled(self) -> int:
        return sum(len(spool.parts) for spool in self.spools.unfinished()) if self.spools else 0

    @property
    def ending(self) -> bool:
        """Whether the daemon was told to end."""
        return self._ending.is_set()

    def end(self) -> None:
        """Drain and end."""
        self._ending.set()

    def _in_words(self) -> str:
        """One line for `systemctl status`."""
        trainers = sum(held.writer_alive for held in self.intake.held.values())
        return f"{len(self.jobs)} jobs, {trainers} trainers, {self.undecided()} snapshots undecided"

    def state(self) -> dict[str, Any]:
        """What `ckptmgr status --json` prints (docs/cli-json.md)."""
        return {
            "pid": os.getpid(),
            "runtime_dir": str(self.settings.runtime_dir),
            "metrics_port": self.metrics_port,
            "undecided": self.undecided(),
            "spool": self.spools.state() if self.spools else None,
            "trainers": sum(held.writer_alive for held in self.intake.held.values()),
            "max_store_gbps": self.settings.max_store_gbps or None,
            "jobs": [
                job_state(
                    job,
                    self.drainers.get(job.url),
                    self.intake.of_job(job.url),
                    self._pipeline.state(job.store.url),
                )
                for job in self.jobs.values()
            ],
        }


def host_identity(runtime: Path) -> str:
    """A name for this host's memory: its host name, and a number that lives as long as the memory.

    Host names are not enough: containers of one image may share theirs.
    """
    path = runtime / HOST
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not path.exists():
        temporary = runtime / f".{HOST}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, flags, 0o600)
        os.write(fd, secrets.token_hex(4).encode())
        os.close(fd)
        temporary.rename(path)  # under the lock of the directory: nobody else makes one
    return f"{host_name()}.{path.read_text()}"
