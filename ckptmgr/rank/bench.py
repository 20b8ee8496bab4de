"""`ckptmgr bench`: what a snapshot, a commit and a restore cost, against bare copies and writes.

Every figure is a ratio of two things measured in the same process of the same run. Each phase is
a process of its own, because that is how a restart meets host memory and the store.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from ckptmgr.config import MIB
from ckptmgr.errors import CkptmgrError
from ckptmgr.rank.checkpointer import Checkpointer
from ckptmgr.staging.control import Done, Stop
from ckptmgr.staging.launch import connect

BLOCK_BYTES = 16 * MIB
State = dict[str, torch.Tensor]


def make_state(mib: int, tensors: int) -> State:
    """fp32 tensors of equal size with the spread of weights (standard deviation 0.02)."""
    torch.manual_seed(0)
    count = max(1, mib * MIB // 4 // tensors)
    return {f"t{index}": torch.empty(count).normal_(0, 0.02) for index in range(tensors)}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def settle(for_seconds: float) -> None:
    """Let time pass, as a training loop does before its first snapshot."""
    threading.Event().wait(for_seconds)


def bare_copy(state: State, repeat: int) -> float:
    """Median time to copy the same tensors into warm memory."""
    warm = {name: tensor.clone() for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            warm[name].copy_(tensor)

    return statistics.median(seconds(copy) for _ in range(repeat))


def bare_write(directory: Path, mib: int, repeat: int) -> float:
    """Median time to write the same bytes to one file and fsync it, the faster of two ways."""
    block = os.urandom(BLOCK_BYTES)
    times: dict[int, list[float]] = {0: [], os.O_DIRECT: []}
    path = directory / "bare"
    for flag, found in times.items():
        for _ in range(repeat):
            with suppress(OSError):  # no O_DIRECT here: the buffered way is what there is
                found.append(seconds(partial(_write_once, path, flag, block, mib)))
    path.unlink(missing_ok=True)
    return min(statistics.median(found) for found in times.values() if found)


def _write_once(path: Path, flag: int, block: bytes, mib: int) -> None:
    aligned = mmap.mmap(-1, BLOCK_BYTES)
    aligned[:] = block
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o600)
    try:
        for _ in range(max(1, mib * MIB // BLOCK_BYTES)):
            os.write(fd, aligned)
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cache(directory: Path) -> None:
    """Push the files below `directory` out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def bare_read(directory: Path) -> float:
    """Time to read all packs below `directory` into one warm buffer, cold."""
    into = bytearray(BLOCK_BYTES)
    drop_cache(directory)

    def read() -> None:
        for path in sorted(directory.rglob("*.pack")):
            fd = os.open(path, os.O_RDONLY)
            while os.readv(fd, [into]):
                pass
            os.close(fd)

    return seconds(read)


def report(result: dict[str, Any]) -> NoReturn:
    """Print a phase's figures and leave as a crash would: host memory stays with the daemon."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)


def phase_save(args: argparse.Namespace) -> NoReturn:
    """Snapshots one after the other, each committed before the next; leaves without a word."""
    state = make_state(args.mib, args.tensors)
    copy = bare_copy(state, args.repeat)
    write = bare_write(Path(args.store).parent, args.mib, args.repeat)
    stalls, commits = [], []
    checkpointer = Checkpointer(args.store, state, every=None, codec=args.codec, rng=False)
    ckpt = checkpointer.__enter__()
    ckpt.restore()
    settle(args.settle)  # a training loop takes at least this long to its first snapshot
    for step in range(1, args.repeat + 1):
        for tensor in state.values():
            tensor.add_(1e-3)
        start = time.perf_counter()
        handle = ckpt.save(step)
        stalls.append(time.perf_counter() - start)
        handle.committed()
        commits.append(time.perf_counter() - start)
    result = {
        "bare_copy_s": copy,
        "bare_write_s": write,
        "first_stall_s": stalls[0],
        "stall_s": statistics.median(stalls[1:]),
        "first_commit_s": commits[0],
        "commit_s": statistics.median(commits[1:]),
    }
    report(result)


def phase_restore(args: argparse.Namespace) -> NoReturn:
    """Enter and restore once, in a fresh process."""
    state = make_state(args.mib, args.tensors)
    copy = bare_copy(state, args.repeat)
    start = time.perf_counter()
    ckpt = Checkpointer(args.store, state, every=None, rng=False).__enter__()
    entered = time.perf_counter()
    settle(args.settle)
    begun = time.perf_counter()
    step = ckpt.restore(required=True)
    restored = time.perf_counter()
    assert ckpt.restored is not None
    result = {
        "bare_copy_s": copy,
        "enter_s": entered - start,
        "restore_s": restored - begun,
        "step": step,
        "source": ckpt.restored.source,
    }
    report(result)


PHASES: dict[str, Callable[[argparse.Namespace], object]] = {
    "save": phase_save,
    "restore": phase_restore,
}


def run_phase(args: argparse.Namespace, phase: str, runtime: Path, pause: float) -> dict[str, Any]:
    """Run a phase in a process of its own and return what it printed."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ckptmgr.rank.bench", "--phase", phase),
            *("--mib", str(args.mib), "--tensors", str(args.tensors)),
            *("--repeat", str(args.repeat), "--codec", args.codec),
            *("--store", str(args.store), "--settle", str(pause)),
        ],
        env={**os.environ, **args.keyed, "CKPTMGR_RUNTIME_DIR": str(runtime)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def end_daemon(runtime: Path) -> None:
    """Drain and end the daemon of the benchmark, and wipe its host memory."""
    with suppress(CkptmgrError), connect(runtime) as client:
        client.ask(Stop(), Done)
        client.wait_closed()
    shutil.rmtree(runtime, ignore_errors=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One size: save, restore from memory, restore cold."""
    directory = Path(tempfile.mkdtemp(prefix="ckptmgr-bench-", dir=args.directory))
    runtime = Path(tempfile.mkdtemp(prefix="ckptmgr-bench-", dir="/dev/shm"))
    args.store = directory / "store"
    pause = 1.0 + 2.0 * args.mib / 1024
    try:
        saved = run_phase(args, "save", runtime, pause)
        memory = run_phase(args, "restore", runtime, pause)
        end_daemon(runtime)
        newest = max((args.store / "data").glob("*/*"))
        read = bare_read(newest)
        drop_cache(args.store)
        cold = run_phase(args, "restore", runtime, 0.0)
        return ratios(args, saved, memory, cold, read)
    finally:
        end_daemon(runtime)
        shutil.rmtree(directory, ignore_errors=True)


def ratios(
    args: argparse.Namespace,
    saved: dict[str, Any],
    memory: dict[str, Any],
    cold: dict[str, Any],
    read: float,
) -> dict[str, Any]:
    """The figures of one size, each beside what it is compared with."""
    cold_s = cold["restore_s"] + cold["enter_s"]
    return {
        "mib": args.mib,
        "tensors": args.tensors,
        "codec": args.codec,
        "bare_copy_s": saved["bare_copy_s"],
        "stall_s": saved["stall_s"],
        "stall_over_copy": saved["stall_s"] / saved["bare_copy_s"],
        "first_stall_over_copy": saved["first_stall_s"] / saved["bare_copy_s"],
        "bare_write_s": saved["bare_write_s"],
        "commit_s": saved["commit_s"],
        "write_over_commit": saved["bare_write_s"] / saved["commit_s"],
        "memory_restore_s": memory["restore_s"],
        "memory_restore_over_copy": memory["restore_s"] / memory["bare_copy_s"],
        "memory_source": memory["source"],
        "bare_read_s": read,
        "cold_restore_s": cold_s,
        "read_over_cold_restore": read / cold_s,
        "cold_source": cold["source"],
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The figures without encryption, and under `encrypted` those with it and their ratios."""
    clear = measure(args)
    with tempfile.NamedTemporaryFile("w", prefix="ckptmgr-bench-key-") as key:  # mode 0600
        key.write(secrets.token_hex(32))
        key.flush()
        args.keyed = {"CKPTMGR_KEY_FILE": key.name}
        sealed = measure(args)
    times = {f"{name}_over_clear": sealed[name] / clear[name] for name in COMPARED}
    return {**clear, "encrypted": {**sealed, **times}}


COMPARED = ("stall_s", "commit_s", "cold_restore_s")
"""What encryption may make slower; a restore out of host memory has nothing to do with it."""

ROWS = (
    ("stall per snapshot", "stall_s", "bare_copy_s", "stall_over_copy", "x bare copy"),
    ("first stall", "", "bare_copy_s", "first_stall_over_copy", "x bare copy"),
    ("save to committed", "commit_s", "bare_write_s", "write_over_commit", "of bare write+fsync"),
    ("restore, memory", "memory_restore_s", "", "memory_restore_over_copy", "x bare copy"),
    ("restore, cold", "cold_restore_s", "bare_read_s", "read_over_cold_restore", "of bare read"),
)


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{result['mib']} MiB in {result['tensors']} tensors, codec {result['codec']}",
        "",
        "| what | s | bare, s | ratio | |",
        "|---|---|---|---|---|",
    ]
    for what, own, bare, ratio, unit in ROWS:
        own_text = f"{result[own]:.3f}" if own else ""
        bare_text = f"{result[bare]:.3f}" if bare else ""
        lines.append(f"| {what} | {own_text} | {bare_text} | {result[ratio]:.2f} | {unit} |")
    for name in COMPARED if "encrypted" in result else ():
        own, plain = result["encrypted"][name], result[name]
        ratio = result["encrypted"][f"{name}_over_clear"]
        lines.append(
            f"| encrypted: {name[:-2]} | {own:.3f} | {plain:.3f} | {ratio:.2f} | x clear |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The arguments of the benchmark."""
    parser = argparse.ArgumentParser(prog="ckptmgr bench", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--tensors", type=int, default=50, help="in how many tensors")
    parser.add_argument("--repeat", type=int, default=7, help="snapshots")
    parser.add_argument("--codec", default="auto", help="auto, none, zstd or planes")
    parser.add_argument("--directory", default=None, help="where the store is made")
    parser.add_argument("--encrypt", action="store_true", help="once more, with a key")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--settle", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one phase (as a child) or all of them."""
    args = parse()
    if args.phase:
        PHASES[args.phase](args)
        return
    args.keyed = {}
    result = compare(args) if args.encrypt else measure(args)
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if args.json else table(result))


if __name__ == "__main__":
    main()
