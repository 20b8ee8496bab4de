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


def test_a_refusal_keeps_the_values_of_a_tensor_that_has_its_graph() -> None:
    """An average whose owner has forgotten to detach it is saved; it can be taken back, too."""

    class Average(nn.Module):
        def __init__(self, start: float) -> None:
            super().__init__()
            self.now = torch.full((2,), start, requires_grad=True) * 1

        def get_extra_state(self) -> Any:
            return {"now": [self.now]}

        def set_extra_state(self, state: Any) -> None:
            self.now = state["now"][0]

    class Kept:
        def __init__(self, start: float) -> None:
            self.average = Average(start)

        def state_dict(self) -> Any:
            return {"now": self.average.now}

        def load_state_dict(self, state: Any) -> None:
            self.average.now = state["now"]

    class Refuses(Kept):
        def load_state_dict(self, state: Any) -> None:
            if state["now"].tolist() == [3.0, 3.0]:
                raise ValueError("no")
            super().load_state_dict(state)

    saved_from = {"a": Kept(1.0), "b": Average(2.0), "c": Kept(3.0)}
    live = {"a": Kept(4.0), "b": Average(5.0), "c": Refuses(6.0)}
    with snapshot(saved_from) as saved:
        with pytest.raises(StateMismatchError, match="c: refused its saved state: no"):
            place(live, saved)
        assert (live["a"].average.now.tolist(), live["b"].now.tolist()) == ([4.0] * 2, [5.0] * 2)
        assert live["c"].average.now.tolist() == [6.0, 6.0]
        live["c"] = Kept(6.0)
        place(live, saved)
    assert (live["a"].average.now.tolist(), live["b"].now.tolist()) == ([1.0] * 2, [2.0] * 2)
