"""What a process of a visit is told, and what it writes: both as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Job:
    """One phase of one visit, for one rank: "calibrate", "limits", "save" or "restore"."""

    phase: str
    adapter: str
    distribution: str
    directory: str
    answer: str
    mib: int
    tensors: int
    dtype: str
    snapshots: int
    step_seconds: float
    operations: int = 1
    rank: int = 0
    world: int = 1

    @property
    def line(self) -> str:
        """For a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        """The other way."""
        return cls(**json.loads(line))

    def reply(self, found: dict[str, Any]) -> None:
        """Leave the answer for whoever started this process."""
        Path(self.answer).write_text(json.dumps(found))
