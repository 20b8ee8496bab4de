"""`ckptmgr demo`: train a small network, kill it twice, and prove that nothing was lost.

The oracle lives here, outside every process that is killed: the losses and the final digests of a
run that was never interrupted and never saw ckptmgr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ckptmgr.config import open_private_dir
from ckptmgr.errors import CkptmgrError, DaemonUnreachableError, UsageError
from ckptmgr.staging.control import Client, Stated, Status
from ckptmgr.staging.inbox import SOCKET

EVENT_SECONDS_MAX = 120.0
"""Longest silence of the trainer: the first start on a cold disk imports torch for half of it."""

PAUSE_SECONDS_MAX = 0.1
"""The trainer is killed up to this long after a step: in the copy, the seal or the next step."""

END_SECONDS_MAX = 10.0
"""How long a process may take to end after SIGKILL or SIGTERM."""

PARTS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "scheduler": "learning rate schedule",
    "loader": "position in the text",
    "random": "random numbers",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a demonstration keeps its files; all of it is its own."""

    root: Path
    runtime: Path

    @property
    def url(self) -> str:
        """The store."""
        return f"file://{self.root}/store"

    @property
    def log(self) -> Path:
        """What the trainers wrote to stderr."""
        return self.root / "trainer.log"


@dataclass(slots=True)
class Run:
    """What one process of the trainer told before it ended; losses are hexadecimal floats."""

    losses: dict[int, str] = field(default_factory=dict)
    parameters: int = 0
    restored: dict[str, Any] = field(default_factory=dict)
    stall: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    state_bytes: int = 0
    step_seconds: float = 0.0

    @property
    def last(self) -> int:
        """The last step that was trained."""
        return max(self.losses, default=0)

    def note(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        match event.pop("event"):
            case "step":
                self.losses[event["step"]] = event["loss"]
            case "ready":
                self.parameters = event["parameters"]
            case "restored":
                self.restored = event
            case "stall":
                self.stall = event
            case "done":
                self.digests, self.state_bytes = event["digests"], event["state_bytes"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, and whether it does."""

    what: str
    holds: bool
    detail: str


def checks(reference: Run, first: Run, second: Run, third: Run) -> list[Check]:
    """Compare an interrupted run (three processes) with the one that was not."""
    found = [
        resumed("memory", "host memory", first, second),
        resumed("store", "the store", second, third),
        *(
            Check(
                name,
                bool(third.digests) and third.digests.get(part) == reference.digests.get(part),
                "to the last bit",
            )
            for part, name in PARTS.items()
        ),
    ]
    wrong = {
        step
        for run in (first, second, third)
        for step, loss in run.losses.items()
        if loss != reference.losses.get(step)
    }
    missing = set(reference.losses) - {*first.losses, *second.losses, *third.losses}
    trained = sum(len(run.losses) for run in (first, second, third))
    twice = trained - len(reference.losses) + len(missing)
    detail = f"{len(reference.losses)} steps, {twice} of them trained again after a kill"
    if wrong or missing:
        detail = f"{len(wrong)} losses differ, the first at step {min(wrong | missing)}"
    return [*found, Check("loss curve", not wrong and not missing, detail)]


def resumed(source: str, words: str, killed: Run, after: Run) -> Check:
    """Whether the run after a kill resumed from where it should have, and not from scratch."""
    step, found = after.restored.get("step", 0), after.restored.get("source", "nothing")
    holds = found == source and 0 < step <= killed.last
    return Check(
        f"resumed from {words}",
        holds,
        f"at step {step} after a kill at {killed.last}, from {found}",
    )


class TrainingProcess:
    """The trainer as a child, seen only through the lines that it prints."""

    def __init__(self, place: Place, *arguments: str) -> None:
        environment = {
            **os.environ,
            "CKPTMGR_RUNTIME_DIR": str(place.runtime),
            "CKPTMGR_IDLE_SECONDS": "60",  # should the demonstration itself be killed
            "OMP_NUM_THREADS": "1",
        }
        self._log = place.log
        with place.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ckptmgr.rank.demo_training", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()

    def events(self) -> Iterator[dict[str, Any]]:
        """Every whole line until the end of the output.

        Raises:
            CkptmgrError: nothing comes for EVENT_SECONDS_MAX.
        """
        buffered = b""
        while True:
            if not select.select([self._output], [], [], EVENT_SECONDS_MAX)[0]:
                raise self.fault(f"trainer was silent for {EVENT_SECONDS_MAX:.0f} s")
            piece = os.read(self._output, 1 << 16)
            if not piece:
                return
            *lines, buffered = (buffered + piece).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def pause(self, seconds: float) -> None:
        """Let it run on for a moment."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()

    def check_end(self, *, killed: bool) -> None:
        """Raises CkptmgrError unless it ended as it should: killed by us, or well."""
        status = self._process.wait(END_SECONDS_MAX)
        if status != (-signal.SIGKILL if killed else 0):
            raise self.fault(f"trainer ended with status {status}")

    def fault(self, what: str) -> CkptmgrError:
        """An error with the last lines that the trainer wrote."""
        last = self._log.read_text(errors="replace").strip().splitlines()[-8:]
        return CkptmgrError("\n".join([what, *last]), subject="demo")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(END_SECONDS_MAX)
        if self._process.stdout is not None:
            self._process.stdout.close()


def daemon_pid(place: Place) -> int:
    """Process id of the daemon of this demonstration; 0 if none answers."""
    try:
        with Client(place.runtime / SOCKET) as client:
            return int(client.ask(Status(), Stated).state["pid"])
    except DaemonUnreachableError:
        return 0


def end_daemon(place: Place, number: signal.Signals) -> int:
    """Signal the daemon, wait until it is gone, and return its process id (0 if there is none)."""
    pid = daemon_pid(place)
    if not pid:
        return 0
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid
    try:
        signal.pidfd_send_signal(descriptor, number)
        if not select.select([descriptor], [], [], END_SECONDS_MAX)[0]:
            raise CkptmgrError(f"daemon {pid} did not end after {number.name}", subject="demo")
    finally:
        os.close(descriptor)
    return pid


def tree_bytes(root: Path) -> int:
    """Bytes of all files below `root`."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@contextmanager
def temporary_place(*, keep_files: bool) -> Iterator[Place]:
    """Directories of our own, on disk and in host memory; ended and removed afterwards."""
    root = Path(tempfile.mkdtemp(prefix="ckptmgr-demo-"))
    place = Place(root, Path("/dev/shm") / root.name)  # noqa: S108 - our own, mode 0700
    open_private_dir(place.runtime)
    try:
        yield place
        end_daemon(place, signal.SIGTERM if keep_files else signal.SIGKILL)
    except BaseException:
        end_daemon(place, signal.SIGKILL)
        raise
    finally:
        shutil.rmtree(place.runtime, ignore_errors=True)
        if not keep_files:
            shutil.rmtree(root, ignore_errors=True)


class Show:
    """Tells people what happens: bars on a terminal, plain lines elsewhere, nothing with --json."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[[int], None]]:
        """Give a function that is told each step that was trained."""
        columns = (TextColumn("   training"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda step: progress.update(task, completed=step)


@dataclass(slots=True)
class Demonstration:
    """The acts of the play, in one place with one seed."""

    place: Place
    show: Show
    seed: int
    steps: int
    every: int

    def act(self, *arguments: str, kill_at: int = 0) -> Run:
        """Run the trainer once; SIGKILL it at a random instant after step `kill_at`."""
        pause = random.Random(f"{self.seed} {kill_at}").uniform(0, PAUSE_SECONDS_MAX)  # noqa: S311
        given = (f"--steps={self.steps}", f"--seed={self.seed % (1 << 31)}", *arguments)
        run, begin = Run(), 0.0
        with (
            self.show.steps(self.steps) as told,
            TrainingProcess(self.place, *given) as process,
        ):
            for event in process.events():
                begin = begin or time.perf_counter()
                run.note(event)
                told(run.last)
                if kill_at and run.last == kill_at:
                    process.pause(pause)
                    process.kill()
            process.check_end(killed=bool(kill_at))
        run.step_seconds = (time.perf_counter() - begin) / max(1, len(run.losses))
        return run

    def play(self) -> dict[str, Any]:
        """Everything; returns the report."""
        choose = random.Random(self.seed)  # noqa: S311
        third = self.steps // 3
        kills = [choose.randint(third // 2, third), choose.randint(third + third // 2, 2 * third)]
        with_ckptmgr = (f"--url={self.place.url}", f"--every={self.every}")
        show = self.show.line

        show("1. Train without interruption and without ckptmgr: the truth to compare with.")
        reference = self.act()
        show(f"   {self.steps} steps of {reference.parameters:,} parameters")
        show(f"2. Train with ckptmgr, a snapshot every {self.every} steps; SIGKILL at random.")
        first = self.act(*with_ckptmgr, kill_at=kills[0])
        show(f"   killed after step {first.last}")
        show("3. Start again: the daemon still has the last snapshot in host memory.")
        second = self.act(*with_ckptmgr, kill_at=kills[1])
        show(f"   {resumption(second)}; killed again after step {second.last}")
        show("4. Kill the daemon too and wipe host memory, as if the machine were lost.")
        pid = end_daemon(self.place, signal.SIGKILL)
        if not pid:
            raise CkptmgrError("the daemon was gone before it was killed", subject="demo")
        shutil.rmtree(self.place.runtime)
        show(f"   daemon {pid} killed, {self.place.runtime} removed")
        show("5. Start again: only the store is left.")
        final = self.act(*with_ckptmgr)
        show(f"   {resumption(final)}; trained to step {final.last}")
        return self.report(reference, first, second, final)

    def report(self, reference: Run, first: Run, second: Run, third: Run) -> dict[str, Any]:
        """The result, as --json prints it."""
        found = checks(reference, first, second, third)
        return {
            "ok": all(check.holds for check in found),
            "checks": [asdict(check) for check in found],
            "seed": self.seed,
            "steps": self.steps,
            "every": self.every,
            "parameters": reference.parameters,
            "killed_after_steps": [first.last, second.last],
            "restored": [second.restored, third.restored],
            "stall": third.stall,
            "state_bytes": reference.state_bytes,
            "store_bytes": tree_bytes(self.place.root / "store"),
            "step_seconds": reference.step_seconds,
            "url": self.place.url,
        }


def resumption(run: Run) -> str:
    """Where a run went on from, in words."""
    step, source = run.restored.get("step", 0), run.restored.get("source", "")
    words = {"memory": "host memory", "store": "the store"}.get(source, "nothing")
    return f"resumed at step {step} from {words} in {run.restored.get('seconds', 0):.3f} s"


def tell(report: dict[str, Any], show: Show) -> None:
    """The report for people."""
    show.line()
    for check in report["checks"]:
        show.line(
            f"   {'ok    ' if check['holds'] else 'FAILED'} {check['what']}: {check['detail']}"
        )
    stall, mib = report["stall"], 1 << 20
    show.line()
    show.line(
        f"   A snapshot of {report['state_bytes'] / mib:.1f} MiB stopped training for "
        f"{stall.get('mean_seconds', 0) * 1e3:.1f} ms (a step takes "
        f"{report['step_seconds'] * 1e3:.0f} ms)."
    )
    show.line(
        f"   The store holds {report['store_bytes'] / mib:.1f} MiB of the newest steps. "
        f"All of this took {report['seconds']:.0f} s."
    )
    show.line()
    if report["ok"]:
        show.line(
            "Killed twice, host memory lost once: nothing was lost. Parameters, optimizer and"
        )
        show.line(
            "loss curve are the same, to the last bit, as in the run that nobody interrupted."
        )
    else:
        show.line("The interrupted run is NOT the same as the uninterrupted one; see FAILED above.")
        show.line(f"Please report it with: ckptmgr demo --seed {report['seed']}")


def run_demo(
    *,
    as_json: bool = False,
    keep_files: bool = False,
    seed: int | None = None,
    steps: int = 120,
    every: int = 10,
) -> int:
    """Play the demonstration; returns its exit status: 0 if everything held, else 1.

    Raises:
        UsageError: torch is not installed, or too few steps for two kills.
        CkptmgrError: a process ended or hung where it should not.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError("the demo trains with torch", hint="pip install 'ckptmgr[torch]'")
    if every < 1 or steps < 6 * every:
        raise UsageError(f"{steps} steps are too few", hint=f"Take at least {6 * max(every, 1)}.")
    show = Show(quiet=as_json)
    with temporary_place(keep_files=keep_files) as place:
        chosen = secrets.randbelow(1 << 31) if seed is None else seed
        begin = time.perf_counter()
        report = Demonstration(place, show, chosen, steps, every).play()
        report["seconds"] = time.perf_counter() - begin
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            tell(report, show)
            if keep_files:
                show.line(f"Files: {place.root}")
    return 0 if report["ok"] else 1
