"""Modules and objects that take part in their state themselves: what they give and take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.place import place
from rank.slot import snapshot


def test_a_state_dict_that_was_put_onto_a_module_may_give_copies() -> None:
    def patched(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(2, 2)
        given = model.state_dict
        model.state_dict = lambda *a, **k: {  # type: ignore[method-assign]
            name: tensor.clone() for name, tensor in given(*a, **k).items()
        }
        return {"m": model}

    state, live = patched(1), patched(2)
    with snapshot(state) as saved:
        place(live, saved)
    assert torch.equal(live["m"].weight, state["m"].weight)


def test_a_module_that_leaves_its_tensors_on_the_meta_device_is_told() -> None:
    """Its own code could have given them memory."""

    def hooked(**options: Any) -> nn.Module:
        layer = nn.Linear(2, 2, **options)
        layer.register_load_state_dict_post_hook(lambda *_: None)
        return layer

    with (
        snapshot({"m": hooked()}) as saved,
        pytest.raises(StateMismatchError, match=r"m: .*left \['weight', 'bias'\] on the meta"),
        pytest.warns(UserWarning, match="no-op"),
    ):
        place({"m": hooked(device="meta")}, saved)
