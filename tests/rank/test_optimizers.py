"""The state of an optimizer is keyed by names, not positions, and comes back as torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptmgr.rank.capture import Capture
from ckptmgr.rank.names import bare_names, parameter_names
from ckptmgr.rank.objects import find_objects
from ckptmgr.rank.optimizers import NamedState, by_name, by_position
from ckptmgr.rank.place import rebuild
from rank.shape import difference
from rank.slot import snapshot


def _trained(*modules: nn.Module, more: Any = ()) -> torch.optim.Optimizer:
    params = [param for module in modules for param in module.parameters()] + list(more)
    optimizer = torch.optim.AdamW(params)
    sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def _paths(state: dict[str, Any]) -> set[str]:
    leaves = Capture(state, rng=False).prepare().layout.leaves
    return {leaf.path for leaf in leaves}


def test_state_is_keyed_by_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    paths = _paths({"model": model, "optimizer": _trained(model)})
    assert "optimizer/state/1.bias/exp_avg" in paths
    assert len(paths) == 4 + 4 * 3


def test_two_modules_with_the_same_names_are_told_apart() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    state = {"g": one, "nets": {"d": two}, "o": _trained(one, two), "of_d": _trained(two)}
    paths = _paths(state)
    assert {"o/state/g%2Fweight/exp_avg", "o/state/nets%2Fd%2Fweight/exp_avg"} <= paths
    assert "of_d/state/weight/exp_avg" in paths


def test_a_parameter_of_no_module_is_called_by_its_position() -> None:
    model, loose = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    paths = _paths({"model": model, "o": _trained(model, more=[loose])})
    assert {"o/state/bias/step", "o/state/#2/exp_avg"} <= paths


def test_wrappers_change_neither_paths_nor_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    plain = _paths({"model": model, "optimizer": _trained(model)})
    wrapped: Any = torch.compile(nn.ModuleDict({"module": model}))
    assert _paths({"model": wrapped, "optimizer": _trained(wrapped)}) == plain


def test_names_that_wrapping_makes_equal_stay_apart() -> None:
    names = ["a.module.weight", "a.weight", "b.module.weight", "module"]
    assert bare_names(names) == {
        "a.module.weight": "a.module.weight",
        "a.weight": "a.weight",
        "b.module.weight": "b.weight",
        "module": "module",
    }
    a: Any = nn.Module()
    a.module, a.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(2))
    assert _paths({"m": a}) == {"m/module.weight", "m/weight"}


def test_no_two_parameters_have_one_name() -> None:
    places: list[tuple[int, tuple[str, str] | None]] = [
        *((0, ("m", "w")), (1, ("m", "w")), (2, None), (3, ("n", "v")), (4, ("k", "v"))),
    ]
    assert parameter_names(places) == ["#0", "#1", "#2", "n/v", "k/v"]


def test_torch_gets_its_own_form_back() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    first, second = model[0], model[1]
    groups = [{"params": second.parameters(), "lr": 0.5}, {"params": first.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    objects = find_objects({"m": model, "o": optimizer})
    named = objects.state_of(optimizer)
    assert isinstance(named, NamedState)
    assert named.entries["param_groups"][0]["params"] == ["1.weight", "1.bias"]
    assert difference(by_position(named.entries), optimizer.state_dict()) == ""
    with snapshot({"m": model, "o": optimizer}) as saved:
        assert difference(rebuild(saved)["o"], optimizer.state_dict()) == ""


def test_a_state_dict_of_another_form_stays_as_it_is() -> None:
    names = [[("w", None)]]
    odd: list[Any] = [
        {"state": {}},
        {"state": {}, "param_groups": [{"params": [1]}]},
        {"state": {4: {}}, "param_groups": [{"params": [0]}]},
        {"state": {}, "param_groups": [{"params": ["w"]}]},
        {"state": {0: {}, "w": 3}, "param_groups": [{"params": [0]}]},
        {1: 2, "state": {}, "param_groups": []},
        [1],
    ]
    for state_dict in odd:
        assert by_name(state_dict, names) is state_dict
    own = {"state": {"calls": 3, 0: {}}, "param_groups": [{"params": [0]}], "more": 1}
    named = by_name(own, names)
    assert named.entries["state"] == {"calls": 3, "w": {}}
    assert by_position(named.entries) == own


def test_a_group_added_later_is_noticed() -> None:
    model, more = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = _trained(model)
    capture = Capture({"m": model, "more": more, "o": optimizer}, rng=False)
    capture.prepare()
    optimizer.add_param_group({"params": more.parameters()})
    layout = capture.prepare().layout
    assert "o/state/m%2Fweight/exp_avg" in {leaf.path for leaf in layout.leaves}
