"""How many times a randomised test repeats: a sample by default, the full count on request."""

from __future__ import annotations

import os

FULL = os.environ.get("CKPTMGR_RELIABILITY") == "1"
STORES = os.environ.get("CKPTMGR_STORES") == "1"


RACE_KEYS = 1000
"""Keys for which 16 processes race under `make stores`: docs/stores.md has what came of it."""


RACE_PROCESSES = 16 if STORES or FULL else 6
"""How many they are in other runs: each is an interpreter that starts."""


def scaled(sample: int, full: int) -> int:
    """Return `full` under `make reliability` (CKPTMGR_RELIABILITY=1), else `sample`."""
    return full if FULL else sample


def soak_seconds() -> float:
    """Return how long a soak test runs; 0 means that it was not asked for."""
    return float(os.environ.get("CKPTMGR_SOAK_SECONDS", "0"))
