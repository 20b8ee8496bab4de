"""Every tunable and every constant of more than one file, each with its unit and its reason."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ckptmgr.errors import HostMemoryError, UsageError

MIB = 1 << 20
GIB = 1 << 30

CHUNK_BYTES = 4 * MIB
"""Unit of hashing, compression and verification. Large enough that a codec call (0.1 ms) and a
chunk-table entry (about 60 B) vanish, small enough that a pipeline of a few fits the budget."""

PACK_BYTES = 64 * MIB
"""Target size of one stored object: big sequential writes, few objects, cheap to write again."""

DEFAULT_SLOTS = 2
DEFAULT_KEEP = 3

BUDGET_BYTES = 192 * MIB
"""Most memory the pipeline holds in bounce buffers, over all snapshots and restores together.
Two packs, with what compressing into them takes: one is filled while the other is written."""

STORE_TIMEOUT_SECONDS = 60.0
"""Deadline of one store operation; past it the operation counts as failed with unknown outcome."""

STORE_TIMEOUT_SECONDS_MIN = 0.001
"""Least deadline that is taken: with none at all every operation would fail."""

PORT_MAX = 65_535

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 1.0, 30.0
"""Pause after a write or a commit that failed: doubled each time, so that a dead store costs
nothing."""

CONTROL_TIMEOUT_SECONDS = 30.0
"""Deadline of a control request that does no store I/O in the foreground."""

CONTROL_FRAME_BYTES_MAX = 8 * MIB
"""Longest control frame; `status` of 1,000 buffers is about 1 MiB."""

IDLE_SECONDS = 600.0
"""An auto-started daemon ends after this long without trainer, snapshot or request. Long enough
that a job restarted by its scheduler still finds its host memory."""

GBPS_MIN = 0.001
"""Least limit that is taken: at 125 kB/s a pack of 64 MiB takes nine minutes."""

MEMORY_SECONDS = 3600.0
"""Decided snapshots of a dead trainer stay in host memory this long for its next attempt."""

START_SECONDS_MAX = 20.0
"""How long a rank waits for an auto-started daemon to answer (measured start: 0.3 s)."""

RESTORE_SECONDS_MAX = 24 * 3600.0
"""Bound of one restore; every store operation in it has a much shorter deadline of its own."""

DRAIN_SECONDS = 600.0
"""Default of `drain_timeout`: how long leaving the `with` block waits for the last commit."""

STUCK_SECONDS = 120.0
"""A step of which nothing new has come into the store for so long is given up. Twice the deadline
of a store operation, so that a slow store is not taken for a dead rank."""

SPOOL_SECONDS = 5.0
"""With a spool, how long a write to the store may stand still, or last while a newer snapshot
waits, before it is given up and the snapshot goes to the spool. Half of PATIENCE_SECONDS_MIN, so
that a trainer gives nothing up that a local disk can take."""

PATIENCE_SECONDS_MIN = 10.0
"""A stuck undecided snapshot is superseded after max(this, the interval) without progress."""


def _parsed(name: str, default: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number", subject=name) from None


def _env_float(name: str, default: float, least: float = 0.0) -> float:
    return checked_number(_parsed(name, default), name, least)


def checked_number(number: float, subject: str, least: float = 0.0) -> float:
    """`number` if it is finite and not below `least`.

    Raises:
        UsageError: it is not.
    """
    if least <= number < math.inf:
        return number
    hint = f"Give a number of at least {least:g}."
    raise UsageError(f"{number:g} is not allowed", subject=subject, hint=hint)


def checked_port(number: float, subject: str) -> int:
    """`number` if it is a TCP port, 0 for any free one, or negative for none.

    Raises:
        UsageError: it is none of these.
    """
    if -math.inf < number <= PORT_MAX and number == int(number):
        return int(number)
    hint = f"Give a port of at most {PORT_MAX}, 0 for any that is free, or -1 for none."
    raise UsageError(f"{number:g} is not a port", subject=subject, hint=hint)


def store_timeout_seconds() -> float:
    """Deadline of one try of a store operation, by the environment of a daemon or a command."""
    name = "CKPTMGR_STORE_TIMEOUT_SECONDS"
    return _env_float(name, STORE_TIMEOUT_SECONDS, STORE_TIMEOUT_SECONDS_MIN)


def env_limit(name: str) -> float:
    """A limit in gigabits per second from the environment; 0 is none."""
    return checked_limit(_parsed(name, 0.0), name)


def checked_limit(gbps: float, subject: str) -> float:
    """`gbps` if it is a limit in gigabits per second, or 0 for none.

    Raises:
        UsageError: negative, infinite, or below GBPS_MIN.
    """
    if gbps == 0 or GBPS_MIN <= gbps < math.inf:
        return gbps
    raise UsageError(
        f"{gbps} is not a limit in gigabits per second",
        subject=subject,
        hint=f"Give at least {GBPS_MIN:g}, or 0 for no limit; 8 gigabits are 1 gigabyte.",
    )


def _env_directory(name: str) -> Path | None:
    """An absolute path: a daemon that a trainer starts has another working directory."""
    text = os.environ.get(name)
    if text and not text.startswith("/"):
        raise UsageError(f"{text!r} is not an absolute path", subject=name)
    return Path(text) if text else None


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """What the operator of a daemon may set; `from_env` reads CKPTMGR_* variables.

    Units are in the names. `max_store_gbps` is in gigabits (10^9 bits) per second, as networks are
    sold: 8 are 1 GB/s; 0 is no limit. `verify_gbps` is the like, for reading commits back.
    `metrics_port` 0 takes any free port (see `ckptmgr status`), a negative one switches the metrics
    endpoint off. `spool_bytes_max` 0 leaves the spool as much as its file system has.
    `single_decider` leaves all decisions to the daemon of rank 0, on a store whose exclusion is not
    to be trusted, whatever a race shows.
    """

    runtime_dir: Path
    idle_seconds: float = 0.0
    budget_bytes: int = BUDGET_BYTES
    store_timeout_seconds: float = STORE_TIMEOUT_SECONDS
    metrics_port: int = 0
    memory_seconds: float = MEMORY_SECONDS
    stuck_seconds: float = STUCK_SECONDS
    single_decider: bool = False
    max_store_gbps: float = 0.0
    spool_dir: Path | None = None
    spool_bytes_max: int = 0
    spool_seconds: float = SPOOL_SECONDS
    mirror_url: str = ""
    verify_gbps: float = 0.0

    @classmethod
    def from_env(cls, *, auto: bool) -> DaemonSettings:
        """Settings of a daemon started by hand, or (`auto`) by a rank: then it ends when idle.

        Raises:
            UsageError: a variable, which it names, has no value of its kind.
        """
        port = "CKPTMGR_METRICS_PORT"
        return cls(
            runtime_dir=runtime_dir(),
            idle_seconds=_env_float("CKPTMGR_IDLE_SECONDS", IDLE_SECONDS if auto else 0.0),
            budget_bytes=int(_env_float("CKPTMGR_BUDGET_MIB", BUDGET_BYTES / MIB)) * MIB,
            store_timeout_seconds=store_timeout_seconds(),
            metrics_port=checked_port(_parsed(port, 0), port),
            memory_seconds=_env_float("CKPTMGR_MEMORY_SECONDS", MEMORY_SECONDS),
            stuck_seconds=_env_float("CKPTMGR_STUCK_SECONDS", STUCK_SECONDS),
            single_decider=bool(_env_float("CKPTMGR_SINGLE_DECIDER", 0)),
            max_store_gbps=env_limit("CKPTMGR_MAX_STORE_GBPS"),
            spool_dir=_env_directory("CKPTMGR_SPOOL"),
            spool_bytes_max=int(_env_float("CKPTMGR_SPOOL_MAX_GIB", 0.0) * GIB),
            spool_seconds=_env_float("CKPTMGR_SPOOL_SECONDS", SPOOL_SECONDS),
            mirror_url=os.environ.get("CKPTMGR_MIRROR", ""),
            verify_gbps=env_limit("CKPTMGR_VERIFY_GBPS"),
        )


def runtime_dir() -> Path:
    """Directory of host buffers, inbox and control socket: one daemon and one user each.

    It must be on tmpfs. `CKPTMGR_RUNTIME_DIR` overrides the default /dev/shm/ckptmgr-<uid>.
    """
    override = os.environ.get("CKPTMGR_RUNTIME_DIR")
    return Path(override) if override else Path(f"/dev/shm/ckptmgr-{os.getuid()}")


def open_private_dir(path: Path) -> None:
    """Make `path` (mode 0700) or check that it is a real directory of ours with mode 0700.

    Raises:
        HostMemoryError: somebody else made it, it is a link, or others have access to it.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostMemoryError(
            f"can not be made: {error.strerror}",
            subject=str(path),
            hint="Set CKPTMGR_RUNTIME_DIR to a directory on tmpfs that you may write.",
        ) from error
    found = os.lstat(path)
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise HostMemoryError(
            "is not a directory of this user with mode 0700",
            subject=str(path),
            hint="Remove it if it is not yours, or set CKPTMGR_RUNTIME_DIR to another place.",
        )
