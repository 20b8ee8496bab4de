"""The rules of a 3FS mount that a checkpoint rests on, looked at for `ckptmgr doctor`."""

from __future__ import annotations

import os
from contextlib import suppress

from ckptmgr.store.finding import Finding, Health
from ckptmgr_hf3fs.mount import NEGATIVE_SECONDS, virtual_directory

CHECK = "3fs rules"
_YES = {"1", "true", "on"}

_BREAKING = {
    "usr.dryrun_bench_mode": "writes do nothing: every checkpoint would be empty",
    "usr.readonly": "the mount is read-only for this user",
}


def findings_of(descriptor: int) -> list[Finding]:
    """What the mount of an open file says about itself. May wait for the mount's daemon."""
    try:
        virtual = virtual_directory(descriptor)
    except OSError as error:
        return [
            Finding(
                CHECK,
                Health.WARNING,
                "the mount shows no virtual directory, so bytes go through the kernel, not rings",
                f"3fs-virt: {error.strerror}",
                "Mount the whole file system into the container, or its 3fs-virt beside the job's.",
            )
        ]
    settings = {name: _setting(virtual, name) for name in (*_BREAKING, "usr.negative_timeout")}
    found = [
        Finding(
            CHECK,
            Health.FAILURE,
            what,
            f"{name} is {settings[name]}",
            f'Reset it: python3 -c \'import os; os.symlink("0", "{virtual}/set-conf/{name}")\'.',
        )
        for name, what in _BREAKING.items()
        if settings[name].lower() in _YES
    ]
    late = _late(settings["usr.negative_timeout"])
    found += [late] if late is not None else []
    chunk = os.fstat(descriptor).st_blksize
    evidence = f"chunks of {chunk >> 10} KiB, rings by {virtual}"
    return found or [
        Finding(CHECK, Health.OK, "the mount keeps what checkpoints rest on", evidence)
    ]


def _setting(virtual: str, name: str) -> str:
    with suppress(OSError):  # older mounts do not know every setting
        return os.readlink(os.path.join(virtual, "get-conf", name))
    return ""


def _late(text: str) -> Finding | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    if seconds <= NEGATIVE_SECONDS:
        return None
    return Finding(
        CHECK,
        Health.WARNING,
        "names that were looked for too early stay unknown for longer than is reckoned with",
        f"usr.negative_timeout is {seconds:g} s, and {NEGATIVE_SECONDS:g} s are reckoned with",
        "Set usr.negative_timeout to 0 below 3fs-virt/set-conf; it is a setting of this user.",
    )
