"""Whether this host's memory can hold the snapshots, and whose limits are in the way."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from ckptmgr.config import GIB, MIB
from ckptmgr.doctor.disk import existing
from ckptmgr.doctor.load import Load
from ckptmgr.present import size
from ckptmgr.store.finding import Finding, Health
from ckptmgr.store.mounts import mount_of

CONTAINER_SHM_BYTES = 64 * MIB
"""What Docker and Kubernetes give a container as /dev/shm, unless they are told otherwise."""

_UNLIMITED = 1 << 60
_LARGER_SHM = (
    "Enlarge it: docker --shm-size, Kubernetes an emptyDir with medium Memory at /dev/shm, else "
    "mount -o remount,size=...; or set CKPTMGR_RUNTIME_DIR to a larger tmpfs."
)


def shared_memory(runtime: Path, load: Load) -> Finding:
    """Compare the tmpfs of host buffers with what the slots of this host need."""
    place = existing(str(runtime))
    kind = mount_of(place).kind
    found = os.statvfs(place)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    evidence = f"{size(total)} of {kind}, {size(free)} free"
    if kind not in ("tmpfs", "ramfs"):
        return Finding(
            "shared memory",
            Health.FAILURE,
            "the runtime directory is not in memory: every snapshot would be written to a disk",
            evidence,
            "Set CKPTMGR_RUNTIME_DIR to a directory on tmpfs, such as /dev/shm.",
        )
    if load.state_bytes:
        needed = f"; {load.slots} slots of {size(load.state_bytes)}"
        evidence += f"{needed} are {size(load.memory_bytes)}"
    if load.memory_bytes > total:
        return Finding(
            "shared memory",
            Health.FAILURE,
            "too small for the snapshots, which then do not survive the daemon",
            evidence,
            _LARGER_SHM,
        )
    if not load.state_bytes and total <= CONTAINER_SHM_BYTES:
        return Finding(
            "shared memory",
            Health.WARNING,
            "is as small as containers have it, too small for any model",
            evidence,
            _LARGER_SHM,
        )
    if not load.state_bytes:
        what = "nothing is known to compare it with"
        return Finding(
            "shared memory", Health.NOT_CHECKED, what, evidence, "Give --state-gib of this host."
        )
    return Finding("shared memory", Health.OK, "the snapshots of this host fit", evidence)


# ---- huge pages -------------------------------------------------------------

_THERE = ("always", "advise", "within_size")
"""Values of the `huge=` of a tmpfs under which host buffers, which ask for them, get huge pages."""


def huge_pages(runtime: Path, root: Path) -> Finding:
    """Whether the tmpfs of host buffers may have huge pages; `root` is `/`."""
    check = "huge pages"
    ruling = _chosen(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if ruling is None:
        return Finding(check, Health.NOT_CHECKED, "this kernel does not tell of any for tmpfs")
    mount = mount_of(existing(str(runtime)))
    given = mount.options.get("huge", "never")
    evidence = f"{mount.point} is mounted with huge={given}"
    if ruling in ("force", "deny"):
        evidence = f"shmem_enabled is {ruling}"
    if ruling == "force" or (ruling != "deny" and given in _THERE):
        return Finding(check, Health.OK, "host memory is made of huge pages", evidence)
    fix = f"mount -o remount,huge=advise {mount.point}; the size that is there already stays."
    if ruling == "deny":
        fix = "Write `never` to /sys/kernel/mm/transparent_hugepage/shmem_enabled, and " + fix
    what = "none for host memory: it is made and mapped several times slower, 4 KiB at a time"
    return Finding(check, Health.WARNING, what, evidence, fix)


def _chosen(path: Path) -> str | None:
    """Of a setting of the kernel the one in brackets."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), None)


# ---- cgroup -----------------------------------------------------------------


def cgroup_memory(root: Path, load: Load) -> Finding:
    """Compare the limit of the job's cgroup with what the snapshots take; `root` is `/`."""
    limit, used, where = least_limit(root)
    if limit >= _UNLIMITED:
        return Finding("cgroup memory", Health.OK, "no cgroup limits the memory of this job", where)
    evidence = f"{size(used)} of {size(limit)} used in {where}"
    fix = "Raise the limit by the size of the snapshots: host memory is charged to the trainer."
    if load.state_bytes:
        evidence += f"; the snapshots take {size(load.memory_bytes)}"
    if load.memory_bytes > limit:
        what = "the limit of the cgroup is less than the snapshots take: an OOM kill is certain"
        return Finding("cgroup memory", Health.FAILURE, what, evidence, fix)
    if load.memory_bytes > limit - used:
        what = "what is left in the cgroup is less than the snapshots take"
        return Finding("cgroup memory", Health.WARNING, what, evidence, fix)
    if not load.state_bytes:
        return Finding(
            "cgroup memory",
            Health.NOT_CHECKED,
            "nothing is known to compare the limit with",
            evidence,
            "Give --state-gib of this host.",
        )
    return Finding("cgroup memory", Health.OK, "the snapshots fit under the limit", evidence)


def least_limit(root: Path) -> tuple[int, int, str]:
    """The least memory limit of this process's cgroups, what is used of it, and which it is."""
    found = [(_UNLIMITED, 0, "no cgroup")]
    for directory, limit_name, used_name in _memory_cgroups(root):
        limit = _number(directory / limit_name)
        if limit is not None:
            shown = "/" + str(directory.relative_to(root))
            found.append((limit, _number(directory / used_name) or 0, shown))
    return min(found, key=lambda one: one[0])


def _memory_cgroups(root: Path) -> list[tuple[Path, str, str]]:
    """The memory cgroups from this process's own up to the root, of both versions."""
    found = []
    for controllers, path in cgroups_of(root, "self"):
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            base = root / "sys/fs/cgroup/memory"
        elif not controllers:
            names, base = ("memory.max", "memory.current"), root / "sys/fs/cgroup"
        else:
            continue
        found += [(directory, *names) for directory in upwards(base, path)]
    return found


def cgroups_of(root: Path, pid: int | str) -> list[tuple[str, str]]:
    """Controllers and path of each cgroup of a process; '' are the controllers of version 2."""
    try:
        lines = (root / f"proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines]
    return [(one[1], one[2]) for one in parts if len(one) == 3]


def upwards(base: Path, path: str) -> list[Path]:
    """The directories of a cgroup and of all above it. In a container the path may be one that only
    the host knows; its root is then the container's own.
    """
    below = base / path.lstrip("/")
    if ".." in below.parts or not below.is_dir():
        below = base
    found = [below]
    while found[-1] != base and base in found[-1].parents:
        found.append(found[-1].parent)
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


# ---- page-locked ------------------------------------------------------------


def page_locked(load: Load) -> Finding:
    """Compare RLIMIT_MEMLOCK with the snapshots, which RDMA and io_uring lock in memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("memlock", Health.OK, "page-locked memory is not limited", "RLIMIT_MEMLOCK")
    needed = load.memory_bytes or GIB
    evidence = f"RLIMIT_MEMLOCK is {size(limit)}"
    if limit >= needed:
        return Finding("memlock", Health.OK, "the snapshots may be locked in memory", evidence)
    return Finding(
        "memlock",
        Health.WARNING,
        "host memory can not be registered for RDMA; copies are then made",
        evidence,
        "Set LimitMEMLOCK=infinity in the unit, or `* - memlock unlimited` in limits.conf.",
    )
