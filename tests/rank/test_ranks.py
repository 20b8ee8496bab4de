"""Two processes over gloo, one Checkpointer each, and a real daemon."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from training import committed

from nursery import torch_nursery

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "rank" / "ranks_process.py"
SECONDS_MAX = 200.0


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, [TESTS.parent, TESTS, TESTS / "rank"]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def told_in(lines: str) -> list[dict[str, Any]]:
    """What ranks said."""
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def ranks(
    scenario: str, url: str, rendezvous: str = "env", *, world: int = 2, status: int = 0
) -> list[dict[str, Any]]:
    """Run a scenario on all ranks."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = [str(PROGRAM), scenario, url, rendezvous]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = torch_nursery().start(
            program, env=environment(WORLD_SIZE=str(world), **where), stdout=said, stderr=errors
        )
        ended = process.wait(SECONDS_MAX)
        for file in (said, errors):
            file.seek(0)
        assert ended == status, errors.read()
        return sorted(told_in(said.read()), key=lambda one: one["rank"])


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_the_training_thread_talks_to_nobody_between_entry_and_return_of_step(
    runtime: Path, store_url: str, tmp_path: Path, kind: str
) -> None:
    told = ranks("quiet", store_url, "env" if kind == "tcp" else str(tmp_path / "rendezvous"))
    assert [one["calls"] for one in told] == [[], []]
    assert [one["begun"] for one in told] == [0, 0], "no collective"
    assert all(one["counted"] for one in told), "which would have been counted"
    assert [one["store"] for one in told] == [[], []], "no thread of a rank touches the store"
    assert told[0]["taken"] == told[1]["taken"]
    assert len(told[0]["taken"]) > 1
    assert all(step % 5 == 0 for step in told[0]["taken"])
    for one in told:
        assert {"decide" if one["rank"] == 0 else "read", "count"} <= set(one["elsewhere"])
    assert f"1.{told[0]['taken'][-1]}" in committed(store_url)


def test_killed_ranks_resume_from_one_step_bit_for_bit(runtime: Path, tmp_path: Path) -> None:
    truth = ranks("whole", str(tmp_path / "whole"))
    url = str(tmp_path / "killed")
    ranks("first", url, status=-9)
    told = ranks("second", url)
    assert [one["start"] for one in told if "start" in one] == [12, 12]
    assert {one["source"] for one in told if "source" in one} == {"memory"}
    expected = {one["rank"]: one["digest"] for one in truth if "digest" in one}
    assert {one["rank"]: one["digest"] for one in told if "digest" in one} == expected
    assert committed(url)[0] == "2.20"


def test_halves_of_a_tensor_that_have_one_name_are_not_mixed(runtime: Path, store_url: str) -> None:
    told = ranks("cut", store_url, world=4)
    assert [one["start"] for one in told] == [1] * 4
    assert [one["exact"] for one in told] == [[True] * 4] * 4


def test_arguments_that_differ_are_refused_on_all_ranks(runtime: Path, store_url: str) -> None:
    told = ranks("differ", store_url)
    assert [one["error"] for one in told] == ["UsageError", "UsageError"]
    assert all("every=Every(steps=5" in one["message"] for one in told)


def test_a_state_that_one_rank_can_not_store_is_refused_on_all(
    runtime: Path, store_url: str
) -> None:
    told = ranks("refuse", store_url)
    assert [one["error"] for one in told] == ["UnsupportedLeafError", "UnsupportedLeafError"]
    assert all("bad" in one["message"] for one in told)
    assert "rank 1" in told[0]["message"]
