"""Whether a store takes and gives snapshots as fast as they are taken."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from ckptmgr.config import MIB, PACK_BYTES
from ckptmgr.doctor.load import Load, rate
from ckptmgr.doctor.promises import Scratch
from ckptmgr.present import size
from ckptmgr.store.base import Store
from ckptmgr.store.finding import Finding, Health
from ckptmgr.store.lanes import in_lanes

AT_ONCE = 4
SPARE = 2.0
"""A store that is only just fast enough falls behind at the first hiccup."""


async def bandwidth(store: Store, scratch: Scratch, load: Load, probe_mib: int) -> list[Finding]:
    """Put and get `probe_mib` in packs, as the daemon does, and compare with what the job needs."""
    if probe_mib <= 0:
        what = "nothing was written to measure it"
        return [Finding("bandwidth", Health.NOT_CHECKED, what, fix="Give --probe-mib, say 256.")]
    # Not zeros, which some stores do not store.
    content = memoryview(bytearray(secrets.token_bytes(MIB) * (PACK_BYTES // MIB)))
    sizes = [PACK_BYTES] * (probe_mib * MIB // PACK_BYTES)
    sizes += [probe_mib * MIB % PACK_BYTES] if probe_mib * MIB % PACK_BYTES else []
    packs = [(scratch.key(), content[:nbytes]) for nbytes in sizes]

    async def put(pack: tuple[str, memoryview]) -> None:
        await store.put_new(pack[0], [pack[1]])

    async def get(pack: tuple[str, memoryview]) -> bool:
        return await store.get(pack[0]) == pack[1]

    total = sum(sizes)
    start = time.monotonic()
    await in_lanes(put, packs, AT_ONCE)
    put_rate = total / max(time.monotonic() - start, 1e-6)
    start = time.monotonic()
    same = await in_lanes(get, packs, AT_ONCE)
    get_rate = total / max(time.monotonic() - start, 1e-6)
    found = [judged("bandwidth put", put_rate, load), measured_get(get_rate, load)]
    return [*found, contents(same)]


def contents(same: Sequence[bool]) -> Finding:
    """Whether what was read is what was put."""
    evidence = f"{sum(same)} of {len(same)} objects came back bit for bit"
    if all(same):
        return Finding("contents", Health.OK, "what is read is what was put", evidence)
    return Finding(
        "contents",
        Health.FAILURE,
        "the store gives other bytes than it was given",
        evidence,
        "Do not use it: restores would find damage. Look at its disks and at what is between.",
    )


def judged(check: str, bytes_per_second: float, load: Load) -> Finding:
    """Compare what a store takes with a state every so often."""
    evidence = f"{rate(bytes_per_second)} with {AT_ONCE} packs at once"
    if not load.state_bytes:
        what = "measured, and nothing is known to compare it with"
        fix = "Give --state-gib and --every."
        return Finding(check, Health.NOT_CHECKED, what, evidence, fix)
    needed = load.state_bytes / load.every_seconds
    evidence += f"; {size(load.state_bytes)} every {load.every_seconds:g} s are {rate(needed)}"
    if bytes_per_second < needed:
        every = load.state_bytes / bytes_per_second
        return Finding(
            check,
            Health.FAILURE,
            "the store is slower than snapshots are taken",
            evidence,
            f'Set every="{SPARE * every:.0f}s" or more, or take a faster store.',
        )
    if bytes_per_second < SPARE * needed:
        return Finding(
            check,
            Health.WARNING,
            f"the store has less than {SPARE:g} times the speed that is needed",
            evidence,
            "Snapshot less often, or keep a spool (`ckptmgr daemon --spool`) for its bad days.",
        )
    return Finding(check, Health.OK, "the store takes snapshots faster than they come", evidence)


def measured_get(bytes_per_second: float, load: Load) -> Finding:
    """Say how long a restore from this store takes on this host."""
    evidence = f"{rate(bytes_per_second)} with {AT_ONCE} packs at once"
    if not load.state_bytes:
        return Finding("bandwidth get", Health.OK, "the store gives what it was given", evidence)
    seconds = load.state_bytes / bytes_per_second
    evidence += f"; {size(load.state_bytes)} come back in {seconds:.0f} s"
    if seconds > load.every_seconds:
        return Finding(
            "bandwidth get",
            Health.WARNING,
            "to restore from the store takes longer than the interval between snapshots",
            evidence,
            "Let the daemon outlive the trainer: then a restart resumes from host memory.",
        )
    return Finding("bandwidth get", Health.OK, "a restore costs less than an interval", evidence)
