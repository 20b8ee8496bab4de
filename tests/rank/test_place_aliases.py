"""One live object under several names takes what was saved under all of them, or refuses it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.place import place
from rank.shape import bytes_of, difference, tensors
from rank.slot import snapshot

State = dict[str, Any]


def refusal(live: State, saved_from: State) -> str:
    """Why a saved state is refused; no tensor was changed."""
    before = [bytes_of(tensor) for _, tensor in tensors(live)]
    with snapshot(saved_from) as saved, pytest.raises(StateMismatchError) as refused:
        place(live, saved)
    assert [bytes_of(tensor) for _, tensor in tensors(live)] == before
    return refused.value.message


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


class Count:
    """An object that keeps a state of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> State:
        return {"count": self.count}

    def load_state_dict(self, state: State) -> None:
        self.count = state["count"]


def test_a_model_does_not_get_the_weights_of_its_best_copy() -> None:
    model = linear(7.0)
    saved_from = {"model": model, "best": copy.deepcopy(linear(1.0).state_dict())}
    live = linear(0.0)
    message = refusal({"model": live, "best": live.state_dict()}, saved_from)
    assert "best/weight: is tied to model/weight in the live state" in message
    message = refusal({"best": live.state_dict(), "model": live}, saved_from)
    assert "model/weight: is tied to best/weight in the live state" in message


class Doubling(nn.Module):
    """Takes its state by code of its own."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = linear(value)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def test_what_the_owner_of_a_tensor_loads_is_not_overwritten_under_another_name() -> None:
    live = Doubling(0.0)
    saved_from = {"model": Doubling(7.0), "best": copy.deepcopy(Doubling(1.0).state_dict())}
    message = refusal({"model": live, "best": live.state_dict()}, saved_from)
    assert "best/layer.weight: is tied to model/layer.weight" in message
    saved_from["best"]["layer.weight"].fill_(7.0)
    saved_from["best"]["layer.bias"] = saved_from["model"].layer.bias
    with snapshot(saved_from) as saved:
        place({"model": live, "best": live.state_dict()}, saved)
    assert torch.equal(live.layer.weight, saved_from["model"].layer.weight)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


KINDS: dict[str, Callable[[int], Any]] = {
    "tensor": lambda seed: torch.full((2,), float(seed)),
    "module": lambda seed: linear(float(seed)),
    "array": lambda seed: np.full(2, float(seed)),
    "array of bytes in another order": lambda seed: np.full(2, seed, ">i8"),
    "torch.Generator": _generator,
    "numpy.random.Generator": np.random.default_rng,
    "dict": lambda seed: {"at": seed},
    "list": lambda seed: [seed, [seed]],
    "deque": lambda seed: deque([seed], maxlen=3),
    "dict of NaN": lambda seed: {"at": [float("nan"), np.float32("nan")], "seed": seed},
    "object": Count,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_one_object_under_two_names_does_not_take_two_states(make: Callable[[int], Any]) -> None:
    one = make(3)
    message = refusal({"a": one, "b": one}, {"a": make(1), "b": make(2)})
    assert "b" in message
    assert "in the live state, but they differ in the saved one" in message
    live, same = make(3), make(1)
    state = {"a": live, "b": live}
    for saved_from in ({"a": same, "b": same}, {"a": make(1), "b": make(1)}):
        with snapshot(saved_from) as saved:
            place(state, saved)
        assert state["a"] is state["b"] is live
        assert difference(_held(live), _held(same)) == ""


def _held(item: Any) -> Any:
    return item.state_dict() if hasattr(item, "state_dict") else item


def test_two_states_of_one_optimizer_differ_in_an_option() -> None:
    layer = linear(0.0)
    one, other, live = (torch.optim.SGD(layer.parameters(), lr=rate) for rate in (0.1, 0.5, 0.0))
    assert "b: is a in" in refusal({"a": live, "b": live}, {"a": one, "b": other})


def test_groups_of_an_optimizer_that_share_a_tensor_get_one_each() -> None:
    """As torch's own load_state_dict does. Shared ones stay shared if they were when saved."""

    def make(*rates: torch.Tensor) -> State:
        layer = linear(0.0)
        groups = [{"params": [p], "lr": r} for p, r in zip(layer.parameters(), rates, strict=True)]
        return {"layer": layer, "optimizer": torch.optim.SGD(groups, lr=0.1)}

    shared = torch.tensor(0.0)
    live = make(shared, shared)
    with snapshot(make(torch.tensor(0.5), torch.tensor(0.25))) as saved:
        place(live, saved)
    assert [float(group["lr"]) for group in live["optimizer"].param_groups] == [0.5, 0.25]
    one = torch.tensor(0.5)
    live = make(shared, shared)
    with snapshot(make(one, one)) as saved:
        place(live, saved)
    assert all(group["lr"] is shared for group in live["optimizer"].param_groups)
    assert float(shared) == 0.5


# -- memory that overlaps in part -----------------------------------------------------------------


def _halves(*, overlap: bool) -> State:
    if not overlap:
        return {"a": torch.ones(3), "b": torch.full((3,), 2.0)}
    base = torch.arange(4.0)
    return {"a": base[:3], "b": base[1:]}


def _view_and_base(*, overlap: bool) -> State:
    base = torch.arange(12.0).view(3, 4)
    return {"base": base, "column": base[:, 1] if overlap else torch.full((3,), -1.0)}


def _as_other_dtype(*, overlap: bool) -> State:
    bits = torch.tensor([1.0, float("nan")])
    return {"floats": bits, "ints": (bits if overlap else torch.zeros(2)).view(torch.int32)}


def _conjugate(*, overlap: bool) -> State:
    one = torch.tensor([1 + 2j, complex("nan-infj")])
    other = one if overlap else torch.zeros(2, dtype=torch.complex64)
    return {"one": one, "conjugate": other.conj(), "negated": other.conj().imag}


def _array_and_tensor(*, overlap: bool) -> State:
    array = np.arange(5.0)
    tensor = torch.from_numpy(array if overlap else np.zeros(5))
    return {"array": array, "backwards": array[::-2], "tensor": tensor[1:]}


def _steps_back(*, overlap: bool) -> State:
    elements = torch.arange(4.0)
    return {"x": elements.as_strided((3, 2), (1, 1)) if overlap else torch.arange(6.0).view(3, 2)}


OVERLAPS: list[Callable[..., State]] = [
    _halves,
    _view_and_base,
    _as_other_dtype,
    _conjugate,
    _array_and_tensor,
]


@pytest.mark.parametrize("make", OVERLAPS)
def test_views_of_the_same_memory_take_only_what_fits_together(make: Callable[..., State]) -> None:
    live, saved_from = make(overlap=True), make(overlap=True)
    for item in live.values():
        item[...] = 0
    with snapshot(saved_from) as saved:
        place(live, saved)
    assert difference(live, saved_from) == ""
    message = refusal(live, make(overlap=False))
    assert "shares memory with" in message
    assert "but the saved elements differ" in message


def test_a_tensor_that_overlaps_itself_takes_only_what_it_can_hold() -> None:
    live = _steps_back(overlap=True)
    live["x"].fill_(7.0)
    with snapshot(_steps_back(overlap=True)) as saved:
        place(live, saved)
    assert live["x"].tolist() == [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    assert "x: is expanded, but" in refusal(live, _steps_back(overlap=False))


DTYPES = ["float32", "uint16", "float8_e5m2", "complex32", "bits8", "uint3"]


@pytest.mark.parametrize("name", DTYPES)
def test_an_expanded_tensor_is_compared_by_its_bits(name: str) -> None:
    """NaN is equal to itself, and some dtypes of torch can not compare their values."""

    def expanded(byte: int) -> torch.Tensor:
        dtype = getattr(torch, name)
        return torch.full((dtype.itemsize,), byte, dtype=torch.uint8).view(dtype).expand(3)

    live = {"x": expanded(0)}
    with snapshot({"x": expanded(255)}) as saved:
        place(live, saved)
    assert difference(live, {"x": expanded(255)}) == ""
    assert name != "float32" or bool(torch.isnan(live["x"]).all())


def test_parameters_in_one_flat_buffer_need_no_twin_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is apart is found to be so without a look at the bytes."""
    monkeypatch.setattr("ckptmgr.rank.claims._Place.saved", None)
    flat = torch.zeros(10)
    with snapshot({"a": torch.ones(4), "b": torch.ones(6)}) as saved:
        place({"a": flat[:4], "b": flat[4:]}, saved)
    assert flat.tolist() == [1.0] * 10
