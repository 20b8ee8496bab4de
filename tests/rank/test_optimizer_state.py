"""State that an optimizer does not have yet is made as the optimizer would have made it."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.rank.into_optimizer import _to_device
from ckptmgr.rank.place import place
from rank.shape import difference
from rank.slot import snapshot

KINDS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "one by one": {"foreach": False},
    "with a hook that loads": {"fused": True},
}


def images(seed: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    layers = layers.to(memory_format=torch.channels_last)
    return {"model": layers, "optimizer": torch.optim.Adam(layers.parameters(), **options)}


def train(state: dict[str, Any], seed: int) -> None:
    batch = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    state["model"](batch).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_a_channels_last_model_trains_on_as_if_it_had_not_been_restarted(kind: str) -> None:
    """Fused kernels go over the memory of a weight and of its momentum, whatever their strides."""
    state, live = images(1, **KINDS[kind]), images(2, **KINDS[kind])
    if "hook" in kind:
        live["optimizer"].register_load_state_dict_pre_hook(lambda *_: None)
    train(state, 1)
    with snapshot(state) as saved:
        place(live, saved)
    for one in (state, live):
        train(one, 2)
    assert difference(state, live) == ""


def test_what_is_nested_in_the_state_goes_where_the_parameter_is() -> None:
    """As torch's own load_state_dict does it; `meta` stands for a GPU."""
    left, right = torch.ones(2), torch.zeros(3)
    nested = {
        "pair": OrderedDict(left=left, deep={"right": [right, 1]}),
        "window": deque([left], maxlen=4),
    }
    found = _to_device(nested, torch.device("meta"))
    assert type(found["pair"]) is OrderedDict
    assert found["window"].maxlen == 4
    there = [found["pair"]["left"], found["pair"]["deep"]["right"][0], found["window"][0]]
    assert [item.device.type for item in there] == ["meta"] * 3
    assert found["pair"]["deep"]["right"][1] == 1
