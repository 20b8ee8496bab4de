"""The demonstration works, and it would say so if it did not."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from ckptmgr.demo import Run, checks, run_demo, tree_bytes
from ckptmgr.errors import UsageError
from ckptmgr.rank.demo_training import BATCH, TextBatches, digest

DIGESTS = {"parameters": "a", "optimizer": "b", "scheduler": "c", "loader": "d", "random": "e"}


def runs() -> list[Run]:
    """A reference of 9 steps, and three runs that were killed at 4, at 7, and not at all."""
    losses = {step: float(step).hex() for step in range(1, 10)}

    def part(first: int, last: int, source: str) -> Run:
        restored = {"step": first - 1, "source": source}
        return Run({s: losses[s] for s in range(first, last + 1)}, restored=restored)

    reference = Run(dict(losses), digests=dict(DIGESTS))
    final = part(6, 9, "store")
    final.digests = dict(DIGESTS)
    return [reference, part(1, 4, ""), part(3, 7, "memory"), final]


def failed(all_runs: list[Run]) -> list[str]:
    return [check.what for check in checks(*all_runs) if not check.holds]


def test_equal_runs_pass() -> None:
    assert failed(runs()) == []
    assert "4 of them trained again" in checks(*runs())[-1].detail


@pytest.mark.parametrize("part", DIGESTS)
def test_one_other_digest_fails(part: str) -> None:
    changed = runs()
    changed[3].digests[part] = "x"
    assert len(failed(changed)) == 1


def test_missing_digests_fail() -> None:
    changed = runs()
    changed[3].digests = {}
    changed[0].digests = {}
    assert len(failed(changed)) == len(DIGESTS)


@pytest.mark.parametrize(("number", "step"), [(1, 4), (2, 3), (2, 7), (3, 9)])
def test_a_loss_that_differs_in_any_run_fails(number: int, step: int) -> None:
    changed = runs()
    changed[number].losses[step] = (0.1).hex()
    assert failed(changed) == ["loss curve"]


def test_a_step_that_nobody_trained_fails() -> None:
    changed = runs()
    del changed[3].losses[9]
    assert failed(changed) == ["loss curve"]


@pytest.mark.parametrize(
    ("number", "restored"),
    [
        (2, {"step": 2, "source": "store"}),
        (2, {"step": 0, "source": ""}),
        (2, {}),
        (2, {"step": 5, "source": "memory"}),
        (3, {"step": 5, "source": "memory"}),
        (3, {"step": 0, "source": "store"}),
    ],
)
def test_a_wrong_resumption_fails(number: int, restored: dict[str, object]) -> None:
    changed = runs()
    changed[number].restored = restored
    assert len(failed(changed)) == 1


def test_the_digest_sees_every_change() -> None:
    state = {"a": torch.arange(4.0), "b": [1, 2.0, {"c": torch.tensor(1, dtype=torch.int8)}]}
    before = digest(state)
    assert digest(copy.deepcopy(state)) == before
    changes = []
    for index in range(4):
        changed = copy.deepcopy(state)
        changed["a"].view(torch.int32)[index] ^= 1  # the last bit
        changes.append(changed)
    changes += [
        {**state, "a": state["a"].double()},
        {**state, "a": state["a"].view(2, 2)},
        {**state, "b": [1, 2.0000000000000004, state["b"][2]]},
        {**state, "b": [1.0, *state["b"][1:]]},
        dict(reversed(state.items())),
    ]
    digests = [digest(changed) for changed in changes]
    assert before not in digests
    assert len(set(digests)) == len(digests)


def test_batches_go_on_where_their_state_was_taken() -> None:
    text = bytes(range(128)) * 40
    batches = TextBatches(text, seed=1)
    per_epoch = len(batches.inputs) // BATCH
    for _ in range(per_epoch + 2):  # into the second epoch
        batches.next_batch()
    state = copy.deepcopy(batches.state_dict())
    expected = [batches.next_batch() for _ in range(2 * per_epoch)]
    other = TextBatches(text, seed=2)
    other.load_state_dict(state)
    for inputs, targets in expected:
        found = other.next_batch()
        assert torch.equal(found[0], inputs)
        assert torch.equal(found[1], targets)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        run_demo(steps=10, every=10)


def test_the_demonstration_proves_its_point_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    status = run_demo(as_json=True, steps=36, every=4)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"], report
    assert status == 0
    assert [restored["source"] for restored in report["restored"]] == ["memory", "store"]
    assert list(tmp_path.glob("ckptmgr-*")) == []  # torch leaves a cache of its own
    name = Path(report["url"]).parent.name
    assert not os.path.exists(f"/dev/shm/{name}")


def test_tree_bytes_counts_files_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"4567")
    assert tree_bytes(tmp_path) == 7
