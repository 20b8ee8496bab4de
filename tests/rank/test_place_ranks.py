"""What several ranks saved goes into one process, bit by bit, and from there back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.place import Saved, check, place, plan_building, plan_placing, rebuild
from ckptmgr.staging.boxes import whole
from ckptmgr.types import Leaf
from rank.cut import Cut, by_columns, by_rows, cut
from rank.shape import bytes_of, difference, tensors
from rank.slot import snapshot


def trained(seed: int, steps: int = 2) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2 * seed)
    for _ in range(steps):
        net(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
    return {"model": net, "optimizer": optimizer, "epoch": seed}


def sharded(boxes: Cut) -> Cut:
    """Parameters and their moments only: buffers and step counts are each rank's own."""

    def chosen(leaf: Leaf) -> Any:
        words = ("running", "num_batches", "step", "rng/")
        return None if any(word in leaf.path for word in words) else boxes(leaf)

    return chosen


CUTS = {
    "rows of 2": (2, by_rows(2)),
    "rows of 4": (4, by_rows(4)),
    "rows of 9": (9, by_rows(9)),
    "columns of 3": (3, by_columns(3)),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["no state yet", "with state"])
@pytest.mark.parametrize(("world", "boxes"), CUTS.values(), ids=CUTS.keys())
def test_parts_of_many_ranks_become_one_whole(world: int, boxes: Cut, steps: int) -> None:
    truth, live = trained(1), trained(2, steps)
    params = list(live["model"].parameters())
    with snapshot(truth) as saved:
        ranks = cut(saved, world, sharded(boxes))
    place(live, *ranks)
    assert difference(truth, live) == ""
    assert all(a is b for a, b in zip(params, live["model"].parameters(), strict=True))
    assert difference(truth["optimizer"].state_dict(), rebuild(*ranks)["optimizer"]) == ""
    assert difference(dict(truth["model"].state_dict()), dict(rebuild(*ranks)["model"])) == ""


def test_only_the_needed_bytes_are_read() -> None:
    truth, live = trained(1), trained(2)
    with snapshot(truth) as saved:
        ranks = cut(saved, 3, sharded(by_rows(3)))
    plan = plan_placing(live, [one.table for one in ranks])
    lent = {}
    for one in ranks:
        memory = bytearray(b"\xee" * len(one.data))
        for start, stop in plan.needs.get(one.rank, ()):
            memory[start:stop] = one.data[start:stop]
        lent[one.rank] = memoryview(memory)
    before = [bytes_of(tensor) for _, tensor in tensors(live)]
    plan.verify(lent)
    assert [bytes_of(tensor) for _, tensor in tensors(live)] == before, "still unchanged"
    plan.apply()
    assert difference(truth, live) == ""


def test_private_state_is_that_of_the_own_rank() -> None:
    live: dict[str, Any] = {"x": torch.zeros(2), "n": 0}
    ranks = []
    for rank in range(3):
        with snapshot({"x": torch.full((2,), float(rank)), "n": rank}, rng=True) as saved:
            ranks.append(Saved(saved.layout, saved.values, memoryview(bytes(saved.data)), rank))
    tables, data = [one.table for one in ranks], {one.rank: one.data for one in ranks}
    for rank, own in ((0, 0), (2, 2), (4, 1)):
        plan = plan_placing(live, tables, rank=rank, saved_world=3)
        assert set(plan.needs) == {own}
        before = torch.get_rng_state()
        plan.verify(data)
        plan.apply()
        assert (live["x"].tolist(), live["n"]) == ([own, own], own)
        if rank >= 3:
            assert torch.equal(torch.get_rng_state(), before)
            assert "generators" in plan.notes[0]
        else:
            assert plan.notes == []
    assert plan_building(tables, own=2).build(data)["n"] == 2


def test_the_own_table_is_enough_where_it_has_everything() -> None:
    live: dict[str, Any] = {"x": torch.zeros(2)}
    with snapshot({"x": torch.ones(2)}) as saved:
        ranks = cut(saved, 2, lambda _: None)
    plan = plan_placing(live, [ranks[1].table], rank=1, saved_world=2)
    assert plan.complete
    with snapshot({"x": torch.ones(2)}) as saved:
        ranks = cut(saved, 2, by_rows(2))
    with pytest.raises(StateMismatchError, match="nobody saved"):
        plan_placing(live, [ranks[1].table], rank=1, saved_world=2)


# -- pipeline stages --------------------------------------------------------------------------


def stages(seed: int) -> list[dict[str, Any]]:
    """The same training as `joined`, in two processes with a stage each."""
    made = []
    torch.manual_seed(seed)
    full = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    for name in ("a", "b"):
        stage = nn.ModuleDict({name: full[name]})
        optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
        for param in stage.parameters():
            param.grad = torch.randn(param.shape)
        optimizer.step()
        made.append({"model": stage, "optimizer": optimizer})
    made[1]["head"] = torch.randn(3)
    return made


def saved_of(states: list[dict[str, Any]]) -> list[Saved]:
    made = []
    for rank, state in enumerate(states):
        with snapshot(state) as saved:
            made.append(Saved(saved.layout, saved.values, memoryview(bytes(saved.data)), rank))
    return made


def joined(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    return {"model": model, "optimizer": optimizer, "head": torch.zeros(3)}


def test_pipeline_stages_become_one_model_and_stages_again() -> None:
    truth, live = stages(1), joined(2)
    ranks = saved_of(truth)
    place(live, *ranks)
    for stage in truth:
        for name, param in stage["model"].named_parameters():
            there = live["model"].get_parameter(name)
            assert bytes_of(param) == bytes_of(there)
            for key, item in stage["optimizer"].state[param].items():
                assert bytes_of(item) == bytes_of(live["optimizer"].state[there][key])
    assert torch.equal(live["head"], truth[1]["head"])
    assert live["optimizer"].param_groups[0]["lr"] == 1e-2
    built = rebuild(*ranks)
    assert list(built["model"]) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert sorted(built["optimizer"]["state"]) == [0, 1, 2, 3]
    (whole_saved,) = saved_of([live])
    for rank, stage in enumerate(stages(3)):
        if rank == 0:
            with pytest.raises(StateMismatchError, match=r"b\.weight: was saved"):
                check(stage, whole_saved)
        plan = plan_placing(stage, [whole_saved.table], rank=rank, saved_world=1, alone=False)
        assert any(path.endswith("b.weight" if rank == 0 else "a.weight") for path in plan.surplus)
        plan.verify({0: whole_saved.data})
        plan.apply()
        assert difference(truth[rank], stage) == ""


def test_a_stage_that_lacks_a_parameter_is_told() -> None:
    first, _ = saved_of(stages(1))
    with pytest.raises(StateMismatchError, match=r"b\.weight: is in the live state"):
        check(joined(1), first)


# -- what does not fit ------------------------------------------------------------------------


def test_a_hole_is_named() -> None:
    with snapshot({"x": torch.ones(4, 3)}) as saved:
        first, second = cut(saved, 2, by_rows(2))
    del second
    with pytest.raises(StateMismatchError, match=r"x: nobody saved \[2, 3\] at \[2, 0\]"):
        check({"x": torch.zeros(4, 3)}, first)
    with pytest.raises(StateMismatchError, match="nobody saved"):
        rebuild(first)


def test_an_expanded_or_tied_tensor_is_looked_at_over_all_ranks() -> None:
    with snapshot({"x": torch.tensor([[1.0, 1.0], [1.0, 2.0]])}) as saved:
        ranks = cut(saved, 2, by_rows(2))
    live = {"x": torch.zeros(1).expand(2, 2)}
    with pytest.raises(StateMismatchError, match="expanded"):
        place(live, *ranks)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with snapshot({"m": tied}) as saved:
        ranks = cut(saved, 2, by_rows(2))
    tied["b"].weight = tied["a"].weight
    with pytest.raises(StateMismatchError, match=r"is tied to m/a\.weight"):
        place({"m": tied}, *ranks)


def test_ranks_that_hold_the_same_box_are_read_once() -> None:
    with snapshot({"x": torch.arange(100000.0)}) as saved:
        ranks = cut(saved, 3, lambda leaf: [[whole(leaf.shape)]] * 3)
    plan = plan_placing({"x": torch.zeros(100000)}, [one.table for one in ranks], rank=1)
    assert plan.needs == {1: ((0, 400000),)}
