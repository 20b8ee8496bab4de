"""From every parallelism into every other, with real processes: always the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ckptmgr
from ckptmgr.rank.place import place
from rank.relayout import numbers, one_process, read, write
from ranks import run_ranks

CHAINS = {
    "two": (2, ["fsdp2", "fsdp1_flat", "ddp", "tp", "fsdp1_orig", "zero", "pipeline", "fsdp2"]),
    "four": (4, ["tp_fsdp2", "hsdp", "fsdp1_hybrid", "fsdp2_four", "ddp"]),
}


def _go(directory: Path, before: str, world: int, layouts: list[str]) -> str:
    (directory / "chain.json").write_text(json.dumps([before, *layouts]))
    place = directory / f"after-{before}"
    place.mkdir()
    assert run_ranks("rank.relayout", "chain", world, place) == [layouts] * world
    return layouts[-1]


@pytest.mark.timeout(600)
def test_one_two_four_two_one(tmp_path: Path) -> None:
    truth = one_process(1, steps=3)
    torch.save(numbers(truth), tmp_path / "truth.pt")
    write(tmp_path, "one", 0, truth)
    _go(tmp_path, "one", 2, CHAINS["two"][1])
    _go(tmp_path, "fsdp2", 4, CHAINS["four"][1])
    _go(tmp_path, "fsdp2_four", 2, ["ddp", "fsdp1_whole", "pipeline"])
    for last in ("pipeline", "hsdp", "tp_fsdp2", "fsdp1_hybrid", "zero", "fsdp1_flat"):
        live = one_process(5)
        place(live, *read(tmp_path, last), rng=False)
        found, expected = numbers(live), numbers(truth)
        assert found.keys() == expected.keys()
        for name, item in found.items():
            assert torch.equal(item, expected[name]), (last, name)
        buffers = dict(truth["model"].named_buffers())
        if last != "pipeline":
            assert all(torch.equal(b, buffers[n]) for n, b in live["model"].named_buffers())


def test_through_the_daemon(runtime: Path, tmp_path: Path) -> None:
    assert run_ranks("rank.relayout", "saved_by_fsdp2", 2, tmp_path) == [True, True]
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    live = one_process(5)
    assert ckptmgr.load(tmp_path / "store", into=live) == 7
    found = numbers(live)
    assert found.keys() == truth.keys()
    assert all(torch.equal(item, truth[name]) for name, item in found.items())
    built = ckptmgr.load(tmp_path / "store")
    assert torch.equal(built["model"]["embed.weight"], truth["embed.weight"])
    moments = built["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, truth["embed.weight/exp_avg"])
    assert run_ranks("rank.relayout", "restored_by_tensor_parallel", 2, tmp_path) == [7, 7]
