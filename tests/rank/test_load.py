from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import Training, run, uninterrupted

import ckptmgr
from ckptmgr.errors import NothingToRestoreError, StateMismatchError


def test_without_into_the_state_comes_back_as_it_was(runtime: Path, store_url: str) -> None:
    run(store_url, 12, keep=10)
    truth = uninterrupted(10)
    found = ckptmgr.load(store_url)
    for name, tensor in truth.model.state_dict().items():
        assert torch.equal(found["model"][name], tensor)
    assert found["model"]["0.weight"] is found["model"]["3.weight"], "tied weights stay tied"
    assert ckptmgr.load(store_url, step=5)["loader"]["position"] == 5
    assert ckptmgr.load(store_url, step="1.5")["loader"]["position"] == 5


def test_into_takes_a_part_and_leaves_the_random_states_alone(
    runtime: Path, store_url: str
) -> None:
    run(store_url, 12)
    truth = uninterrupted(10)
    training = Training()
    before = torch.get_rng_state()
    assert ckptmgr.load(store_url, into={"model": training.model}) == 10
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in truth.model.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], tensor)


def test_what_was_not_saved_is_named(runtime: Path, store_url: str) -> None:
    run(store_url, 6)
    with pytest.raises(StateMismatchError, match="head"):
        ckptmgr.load(store_url, into={"head": torch.nn.Linear(2, 2)})


def test_nothing_is_an_error_and_is_not_created(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingToRestoreError):
        ckptmgr.load(tmp_path / "store")
    assert not (tmp_path / "store" / "attempts").exists()


def test_reading_claims_nothing(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    run(str(root), 6)
    before = sorted(path.name for path in (root / "attempts").iterdir())
    ckptmgr.load(root)
    assert sorted(path.name for path in (root / "attempts").iterdir()) == before
    assert not list(root.glob("holds/**/reader*"))
    assert not list((runtime / "fetched").iterdir()), "lent memory was freed"
