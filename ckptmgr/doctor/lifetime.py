"""Whether the daemon can outlive the job, so that the last snapshot does: cgroups, logind,
containers.
"""

from __future__ import annotations

import os
import pwd
import re
from configparser import ConfigParser, Error
from contextlib import suppress
from pathlib import Path

from ckptmgr.doctor.memory import cgroups_of, upwards
from ckptmgr.store.finding import Finding, Health

_JOBS = (
    (re.compile(r"/slurm\S*/job_(\d+)|/job_(\d+)/step_"), "Slurm kills all of a job at its end"),
    (re.compile(r"kubepods"), "the kubelet kills all of a pod at its end"),
    (re.compile(r"/(docker|libpod|containerd|lxc)[-/]"), "all ends with the container"),
    (re.compile(r"/htcondor|/pbs|/lsf/"), "the batch system kills all of a job at its end"),
    (re.compile(r"/session-\w+\.scope"), "logind may kill all of a session at logout"),
)

_AS_A_UNIT = (
    "Run the daemon as a service of the host (systemd), or as a sidecar of the pod: "
    "docs/knowing.md."
)

INITIAL_PID_NAMESPACE = 4026531836
"""Inode number of the host's own pid namespace on every Linux (PROC_PID_INIT_INO)."""

_UID_MIN = 1000
"""logind removes IPC of ordinary users only."""


def findings_of(root: Path, pid: int | None) -> list[Finding]:
    """Everything that ends a daemon with its job. `pid` is the daemon's; None for one that would
    be started from here, by a trainer.
    """
    return [
        job_cgroup(root, pid),
        oom_group(root, pid),
        logind(root, pid),
        pid_namespace(root, pid),
    ]


def _who(pid: int | None) -> str:
    return f"daemon {pid}" if pid is not None else "a daemon started from here"


def job_cgroup(root: Path, pid: int | None) -> Finding:
    """Whether the daemon is in the cgroup of a job or a session, which is killed as a whole."""
    paths = sorted({path for _, path in cgroups_of(root, pid or "self")}, key=len)
    for path in reversed(paths):
        for pattern, why in _JOBS:
            if pattern.search(path):
                return Finding(
                    "job cgroup",
                    Health.WARNING,
                    f"the daemon ends with the job: {why}",
                    f"{_who(pid)} is in {path}",
                    _AS_A_UNIT,
                )
    evidence = f"{_who(pid)} is in {paths[-1] if paths else 'no cgroup'}"
    return Finding("job cgroup", Health.OK, "no job or session owns the daemon's cgroup", evidence)


def oom_group(root: Path, pid: int | None) -> Finding:
    """Whether the kernel kills the daemon when the trainer runs out of memory."""
    for controllers, path in cgroups_of(root, pid or "self"):
        if controllers:
            continue
        for directory in upwards(root / "sys/fs/cgroup", path):
            with suppress(OSError):
                if (directory / "memory.oom.group").read_text().strip() == "1":
                    return Finding(
                        "OOM group",
                        Health.WARNING,
                        "one process out of memory, and the kernel kills trainer and daemon alike",
                        f"memory.oom.group is 1 in /{directory.relative_to(root)}",
                        "Write 0 there (Kubernetes: singleProcessOOMKill: true for the kubelet).",
                    )
    return Finding("OOM group", Health.OK, "an OOM kill of the trainer leaves the daemon alone")


def logind(root: Path, pid: int | None, uid: int | None = None) -> Finding:
    """Whether logind deletes host memory, or kills the daemon, when its user logs out."""
    user = os.getuid() if uid is None else uid
    if not (root / "run/systemd/seats").exists():
        return Finding("logind", Health.OK, "there is no logind that could end anything at logout")
    settings = logind_settings(root)
    if user < _UID_MIN or (root / "var/lib/systemd/linger" / _name_of(user)).exists():
        return Finding("logind", Health.OK, "logind leaves this user alone", f"user {user}")
    in_session = any("/session-" in path for _, path in cgroups_of(root, pid or "self"))
    faults = []
    if settings["RemoveIPC"]:
        faults.append("RemoveIPC deletes host memory in /dev/shm")
    if settings["KillUserProcesses"] and in_session:
        faults.append("KillUserProcesses kills the daemon")
    if not faults:
        return Finding("logind", Health.OK, "logind ends nothing at logout", str(settings))
    return Finding(
        "logind",
        Health.WARNING,
        f"at the last logout of this user {' and '.join(faults)}",
        ", ".join(f"{name}={'yes' if on else 'no'}" for name, on in settings.items()),
        "Run `loginctl enable-linger`, or set RemoveIPC=no in /etc/systemd/logind.conf.",
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def logind_settings(root: Path) -> dict[str, bool]:
    """The two settings of logind that matter, over what it has by default."""
    found = {"RemoveIPC": True, "KillUserProcesses": False}
    bases = [root / base / "systemd" for base in ("usr/lib", "run", "etc")]
    files = [base / "logind.conf" for base in bases]
    files += sorted(file for base in bases for file in (base / "logind.conf.d").glob("*.conf"))
    for path in files:
        parser = ConfigParser(interpolation=None, strict=False)
        with suppress(OSError, Error):
            parser.read_string(path.read_text())
        for name, before in tuple(found.items()):
            with suppress(ValueError):
                found[name] = parser.getboolean("Login", name, fallback=before)
    return found


def pid_namespace(root: Path, pid: int | None) -> Finding:
    """Whether the daemon is inside a container, whose end is the end of all in it."""
    try:
        namespace = os.readlink(root / f"proc/{pid or 'self'}/ns/pid")
    except OSError as error:
        what = "it can not be seen in which pid namespace the daemon is"
        return Finding("pid namespace", Health.NOT_CHECKED, what, str(error.strerror))
    number = int(re.sub(r"\D", "", namespace) or 0)
    if number == INITIAL_PID_NAMESPACE:
        return Finding("pid namespace", Health.OK, "the daemon is a process of the host", namespace)
    return Finding(
        "pid namespace",
        Health.WARNING,
        "the daemon ends when the first process of its container does",
        f"{_who(pid)} is in {namespace}, which is not the host's",
        _AS_A_UNIT,
    )
