"""Bombs: what declares, nests or unpacks to more than there is memory for is refused in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.config import MIB

CHILD = Path(__file__).with_name("bombs.py")

ROOM_BYTES = 768 * MIB
"""What a bomb may take: a payload of the greatest length, unpacked, and once more as objects."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path_factory.mktemp("bombs")), str(ROOM_BYTES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_every_bomb_is_refused_by_a_typed_error(results: dict[str, str]) -> None:
    assert len(results) > 35
    bad = {name: what for name, what in results.items() if not what.startswith("refused: ")}
    assert not bad


def test_records_and_chunks_are_named_as_damage(results: dict[str, str]) -> None:
    """So that restore falls back to the step before."""
    damage = {"RecordDamagedError", "ChunkDamagedError"}
    for name, what in results.items():
        if "layout" in name or "leaves" in name or "host memory" in name or "a pack of" in name:
            continue  # wrapped by whoever reads the manifest or the buffer
        assert what.removeprefix("refused: ") in damage, f"{name}: {what}"
