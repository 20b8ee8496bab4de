"""Names of the objects in a store (docs/format.md section 2)."""

from __future__ import annotations

import re
import secrets

from ckptmgr.types import StepId

FORMAT = "format"

_ATTEMPT_KEY = re.compile(r"attempts/(\d{8})/.+", re.ASCII)
_STEP_KEY = re.compile(r"[a-z]+/(\d{8})/(\d{12})(?:/.+)?", re.ASCII)
_STEP_NAME = re.compile(r"\d{8}/\d{12}", re.ASCII).fullmatch


def _attempt(attempt: int) -> str:
    return f"{attempt:08d}"


def _step(step: StepId) -> str:
    return f"{step.attempt:08d}/{step.step:012d}"


def claim(attempt: int) -> str:
    """Claim of an attempt."""
    return f"attempts/{_attempt(attempt)}/claim"


def active(attempt: int) -> str:
    """Mark of an attempt that has put its first snapshot."""
    return f"attempts/{_attempt(attempt)}/active"


def haves(attempt: int) -> str:
    """Prefix of what the memories of the hosts of an attempt held when they joined it."""
    return f"attempts/{_attempt(attempt)}/have/"


def have(attempt: int, host: str) -> str:
    """What the memory of `host` held when it joined the attempt."""
    return f"{haves(attempt)}{host}"


def resumes(attempt: int) -> str:
    """Prefix of the resume decisions of an attempt."""
    return f"attempts/{_attempt(attempt)}/resume/"


def resume(attempt: int, k: int) -> str:
    """The k-th decision of what the attempt resumes from."""
    return f"{resumes(attempt)}{k:04d}"


def new_pack(step: StepId, rank: int) -> str:
    """A fresh name for a pack; 80 random bits, so that no two writers ever meet."""
    return f"{packs(step, rank)}{secrets.token_hex(10)}.pack"


def packs(step: StepId, rank: int | None = None) -> str:
    """Prefix of the packs of a step (of one rank)."""
    return f"data/{_step(step)}/" + (f"{rank:06d}/" if rank is not None else "")


def manifest(step: StepId, rank: int) -> str:
    """Manifest of one rank."""
    return f"{manifests(step)}{rank:06d}"


def manifests(step: StepId) -> str:
    """Prefix of the manifests of a step."""
    return f"man/{_step(step)}/"


def commit(step: StepId) -> str:
    """The decide-once register of a step."""
    return f"commit/{_step(step)}"


def retired(step: StepId) -> str:
    """Mark of a step given up by retention."""
    return f"retired/{_step(step)}"


def holds(step: StepId) -> str:
    """Prefix of the holds of a step."""
    return f"holds/{_step(step)}/"


def hold(step: StepId, hold_id: str) -> str:
    """One hold of a step."""
    return f"{holds(step)}{hold_id}"


def verified(step: StepId) -> str:
    """Proof that a step was read back."""
    return f"verified/{_step(step)}"


def tags(step: StepId) -> str:
    """Copy of a step's COMMIT, put after it: it shows that the register was there."""
    return f"tags/{_step(step)}"


def parse_step(key: str) -> StepId | None:
    """The step that a key of data/, man/, commit/, retired/, holds/ or verified/ belongs to."""
    match = _STEP_KEY.fullmatch(key)
    return StepId(int(match[1]), int(match[2])) if match else None


def named(prefix: str, found: list[str]) -> set[str]:
    """The names of the steps with their one record right below `prefix`, which sort as the steps
    do; a stray key there names nothing.
    """
    start = len(prefix)
    return {name for name in (key[start:] for key in found) if _STEP_NAME(name)}


def step_named(name: str) -> StepId:
    """The step of a name that `named` gave."""
    return StepId(int(name[:8]), int(name[9:]))


def parse_rank(key: str) -> int | None:
    """The rank whose manifest a key is."""
    match = re.fullmatch(r"man/\d{8}/\d{12}/(\d{6})", key, re.ASCII)
    return int(match[1]) if match else None


def parse_attempt(key: str) -> int | None:
    """The attempt that a key of attempts/ belongs to."""
    match = _ATTEMPT_KEY.fullmatch(key)
    return int(match[1]) if match else None
