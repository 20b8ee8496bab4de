"""What a look at a store or a host found, with the number that says so and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

CLOCK_SECONDS_MAX = 5.0
"""Clocks that differ by more make ages and logs misleading. No promise rests on a clock, and many
file systems keep times in whole seconds."""


class Health(str, Enum):
    """How bad a finding is; only a failure ends `ckptmgr doctor` with status 1."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, how it stands, one line what, one line evidence, and a fix if due."""

    check: str
    health: Health
    what: str
    evidence: str = ""
    fix: str = ""

    def document(self) -> dict[str, str]:
        """As `doctor --json` prints it (docs/cli-json.md)."""
        return {
            "check": self.check,
            "state": self.health.value,
            "what": self.what,
            "evidence": self.evidence,
            "fix": self.fix,
        }


def clock_finding(store_time: float, before: float, after: float) -> Finding:
    """Compare the time that a store gave an object with ours before and after it was put."""
    # The store's time may be cut to a whole second.
    ahead, behind = store_time - after, before - store_time - 1.0
    skew = max(ahead, behind, 0.0)
    direction = "ahead of" if ahead > behind else "behind"
    evidence = f"the store's clock is {skew:.1f} s {direction} ours"
    if skew <= CLOCK_SECONDS_MAX:
        return Finding("clock", Health.OK, "the clocks of store and host agree", evidence)
    return Finding(
        "clock",
        Health.WARNING,
        "the clocks of store and host differ",
        evidence,
        "Run an NTP client on this host and on the store. Ages and logs mislead; nothing else.",
    )
