"""Real training, killed at random instants and resumed: bit for bit as if nobody had killed it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import uninterrupted

from nursery import Forked, torch_nursery
from processes import end_processes_of
from scale import scaled

STEPS = scaled(60, 400)
"""Twice as many as all kills together let through on average, so that none comes too late."""

SCRIPT = Path(__file__).parent / "trainer_process.py"


def lines_of(process: Forked) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def until_killed(url: str, kill_after: int | None) -> list[dict[str, Any]]:
    """Run the trainer; SIGKILL it that many lines after its start. Returns what it said."""
    program = [str(SCRIPT), url, str(STEPS)]
    heard = []
    with torch_nursery().start(
        program, env=os.environ, stdout=subprocess.PIPE, stderr=2
    ) as process:
        for said in lines_of(process):
            heard.append(said)
            if kill_after is not None and len(heard) > kill_after:
                process.send_signal(signal.SIGKILL)
                break
        else:
            assert process.wait() == 0
    return heard


@pytest.mark.kill
def test_killed_training_ends_as_if_it_had_not_been_killed(runtime: Path, tmp_path: Path) -> None:
    truth = uninterrupted(STEPS)
    chance = random.Random(20260101)
    kills = scaled(3, 20)
    for round_ in range(scaled(1, 10)):
        url = str(tmp_path / f"store{round_}")
        sources = []
        for kill in range(kills):
            heard = until_killed(url, chance.randrange(5, 5 + STEPS // (2 * kills)))
            sources.append(heard[0]["source"])
            for said in heard[1:]:
                assert said["loss"] == truth.losses[said["step"]]
            if kill % 3 == 2:  # now and then the host is lost as well
                end_processes_of(runtime)
                subprocess.run(["rm", "-rf", str(runtime)], check=True)
        heard = until_killed(url, None)
        assert heard[-1]["digest"] == truth.digest()
        assert "memory" in [*sources, heard[0]["source"]], sources
