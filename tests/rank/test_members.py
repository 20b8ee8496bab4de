"""What is kept from snapshot to snapshot is looked at anew where objects have changed places.

In each test the state of a second Capture, which has kept nothing, is what the first one must find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.rank.capture import Capture
from ckptmgr.rank.members import Members


class _Net(nn.Module):
    """Four layers of one shape, two of them tied, and two buffers of one shape."""

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(4)])
        self.layers[3].weight = self.layers[2].weight
        self.register_buffer("first", torch.rand(3))
        self.register_buffer("second", torch.rand(3))


def _stepped(params: Any) -> torch.optim.Optimizer:
    """An optimizer whose state differs from parameter to parameter."""
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.rand_like(param)
    optimizer.step()
    return optimizer


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    net, other = _Net(), _Net()
    layers = list(net.layers.parameters())
    groups = [{"params": layers[:1]}, {"params": layers[1:], "lr": 0.2}]
    both = [net.layers[0].weight, other.layers[0].weight]
    return {"net": net, "nets": [other], "o": _stepped(groups), "more": [_stepped(both)]}


def _saved(capture: Capture) -> tuple[dict[str, list[float]], bytes, bytes]:
    """Each path with what would be copied under it, and all else that a slot would hold."""
    prepared = capture.prepare()
    paths = [leaf.path for leaf in prepared.layout.leaves]
    contents = [tensor.flatten().tolist() for tensor in prepared.sources.tensors]
    return dict(zip(paths, contents, strict=True)), prepared.layout_bytes, prepared.values


def _swap_layers(state: dict[str, Any]) -> None:
    layers = state["net"].layers
    layers[0], layers[1] = layers[1], layers[0]


def _swap_layers_but_not_their_memory(state: dict[str, Any]) -> None:
    _swap_layers(state)
    one, two = state["net"].layers[0].weight, state["net"].layers[1].weight
    one.data, two.data = two.data, one.data


def _swap_parameters(state: dict[str, Any]) -> None:
    one, two = state["net"].layers[:2]
    one.weight, two.weight = two.weight, one.weight


def _swap_modules_of_the_state(state: dict[str, Any]) -> None:
    state["net"], state["nets"][0] = state["nets"][0], state["net"]


def _swap_optimizers(state: dict[str, Any]) -> None:
    state["o"], state["more"][0] = state["more"][0], state["o"]


def _replace_a_layer(state: dict[str, Any]) -> None:
    state["net"].layers[0] = nn.Linear(3, 3, bias=False)


def _replace_a_parameter_by_a_view_of_it(state: dict[str, Any]) -> None:
    layer = state["net"].layers[0]
    layer.weight = nn.Parameter(layer.weight.data)


def _untie(state: dict[str, Any]) -> None:
    """The optimizer keeps the parameter that has the second of the two names from now on."""
    layer = state["net"].layers[2]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _tie_to_another(state: dict[str, Any]) -> None:
    layers = state["net"].layers
    layers[3].weight = layers[1].weight


def _swap_buffers(state: dict[str, Any]) -> None:
    net = state["net"]
    net.first, net.second = net.second, net.first


def _reverse_a_group(state: dict[str, Any]) -> None:
    state["o"].param_groups[1]["params"].reverse()


def _swap_groups(state: dict[str, Any]) -> None:
    state["o"].param_groups.reverse()


def _move_to_another_group(state: dict[str, Any]) -> None:
    """The parameters of all groups, one after another, are the same as before."""
    one, two = state["o"].param_groups
    one["params"].append(two["params"].pop(0))


def _swap_states(state: dict[str, Any]) -> None:
    optimizer = state["o"]
    one, two = state["net"].layers[0].weight, state["net"].layers[1].weight
    kept = optimizer.state
    kept[one], kept[two] = kept[two], kept[one]


@pytest.mark.parametrize(
    "change",
    [
        _swap_layers,
        _swap_layers_but_not_their_memory,
        _swap_parameters,
        _swap_modules_of_the_state,
        _swap_optimizers,
        _replace_a_layer,
        _replace_a_parameter_by_a_view_of_it,
        _untie,
        _tie_to_another,
        _swap_buffers,
        _reverse_a_group,
        _swap_groups,
        _move_to_another_group,
        _swap_states,
    ],
)
def test_a_snapshot_after_others_is_that_of_a_fresh_capture(
    change: Callable[[dict[str, Any]], None],
) -> None:
    state = _state()
    capture = Capture(state, rng=False)
    for _ in range(2):
        capture.prepare()
    change(state)
    assert _saved(capture) == _saved(Capture(state, rng=False))


def test_names_follow_their_parameters() -> None:
    state = _state()
    layers, optimizer = state["net"].layers, state["o"]
    capture = Capture(state, rng=False)
    before, *_ = _saved(capture)
    _swap_layers(state)
    after, *_ = _saved(capture)
    for at, layer in enumerate(layers[:2]):
        path = f"o/state/layers.{at}.weight/momentum_buffer"
        assert after[path] == optimizer.state[layer.weight]["momentum_buffer"].flatten().tolist()
        assert after[path] != before[path]


def test_members_are_compared_and_not_kept() -> None:
    net = _Net()
    members = Members([net])
    assert members.are_unchanged()
    net.layers[0].weight.data = torch.zeros(3, 3)
    assert members.are_unchanged()
    net.layers[0] = nn.Identity()
    assert not members.are_unchanged()
    alone = Members([nn.Linear(1, 1)])
    assert not alone.are_unchanged()
