"""What was saved goes into live objects wholly or not at all, and nothing keeps the slot alive."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.rank.names import match_names
from ckptmgr.rank.place import check, place, rebuild
from rank.shape import bytes_of, difference, tensors
from rank.slot import snapshot


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(seed: int, wrap: Any = None) -> dict[str, Any]:
    model = net(seed)
    wrapped = model if wrap is None else wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    return {"model": wrapped, "optimizer": optimizer}


def contents(state: Any) -> dict[str, bytes]:
    return {path: bytes_of(tensor) for path, tensor in tensors(state)}


# -- mismatches -------------------------------------------------------------------------------


def mismatch(live: dict[str, Any], saved_from: dict[str, Any], **options: Any) -> str:
    """The message of the refusal; checks that nothing was changed."""
    before, keys = contents(live), list(live)
    with snapshot(saved_from) as saved:
        with pytest.raises(StateMismatchError) as checked:
            check(live, saved, **options)
        with pytest.raises(StateMismatchError) as placed:
            place(live, saved, **options)
    assert str(checked.value) == str(placed.value)
    assert contents(live) == before
    assert list(live) == keys
    return placed.value.message


def test_shapes_dtypes_missing_and_unexpected_leaves_are_all_named() -> None:
    saved = {"model": net(1), "x": torch.ones(3), "y": torch.ones(2), "gone": 1}
    live = {"model": net(2), "x": torch.ones(4), "y": torch.ones(2, dtype=torch.int64), "new": 2}
    live["model"][0] = nn.Linear(3, 5)
    live["model"].append(nn.Linear(2, 2))
    message = mismatch(live, saved)
    for line in (
        "model/0.weight: has shape [5, 3], but [4, 3] was saved",
        "model/3.weight: is in the live state, but was not saved",
        "x: has shape [4], but [3] was saved",
        "y: is torch.int64, but torch.float32 was saved",
        "gone: was saved, but is not in the live state",
        "new: is in the live state, but was not saved",
    ):
        assert line in message


def test_at_most_20_differences_are_listed_and_the_rest_counted() -> None:
    saved = {f"x{at}": torch.ones(2) for at in range(50)}
    message = mismatch({f"x{at}": torch.ones(3) for at in range(50)}, saved)
    assert message.count("was saved") == 20
    assert "and 30 more" in message


def test_partial_leaves_out_what_the_live_state_does_not_have() -> None:
    saved = {"a": torch.ones(2), "b": torch.ones(3), "c": {"d": torch.ones(1)}}
    live: dict[str, Any] = {"a": torch.zeros(2)}
    with snapshot(saved) as found:
        place(live, found, partial=True)
    assert list(live) == ["a"]
    assert torch.equal(live["a"], torch.ones(2))
    assert "zz: is in the live" in mismatch({"zz": 1}, saved, partial=True)


def test_a_module_is_not_an_optimizer() -> None:
    state = trained(1)
    swapped = {"model": state["optimizer"], "optimizer": state["model"]}
    assert "no state_dict of one was saved" in mismatch(swapped, trained(2))


@pytest.mark.parametrize("live", [torch.ones(2), np.ones(2), net(1), random.Random(1)])
def test_a_live_tensor_or_object_for_which_a_number_was_saved_is_a_mismatch(live: Any) -> None:
    assert "x" in mismatch({"x": live, "y": [live]}, {"x": 1, "y": [1]})
    assert "x/k" in mismatch({"x": {"k": live}}, {"x": {}})
    assert "x/0" in mismatch({"x": [live]}, {"x": []})


def test_tied_live_weights_do_not_take_two_different_saved_ones() -> None:
    def tied(seed: int, *, tie: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if tie:
            model[1].weight = model[0].weight
        return {"m": model}

    assert "m/1.weight: is tied to m/0.weight" in mismatch(tied(1, tie=True), tied(2, tie=False))
    untied = tied(1, tie=False)
    untied["m"][1].load_state_dict(untied["m"][0].state_dict())
    live = tied(3, tie=True)
    with snapshot(untied) as saved:
        place(live, saved)
    assert live["m"][1].weight is live["m"][0].weight


def test_a_model_on_the_meta_device_has_no_memory_to_load_into() -> None:
    with torch.device("meta"):
        live = {"m": net(1), "x": torch.empty(2)}
    with (
        snapshot({"m": net(2), "x": torch.ones(2)}) as saved,
        pytest.raises(StateMismatchError) as refused,
    ):
        check(live, saved)
    assert "m/0.weight: is a meta tensor" in refused.value.message
    assert "x: is a meta tensor" in refused.value.message
    with torch.device("meta"):
        empty = {"optimizer": torch.optim.AdamW(net(1).parameters())}
    assert "the parameter is a meta tensor" in mismatch(
        empty, {"optimizer": trained(1)["optimizer"]}
    )


def test_optimizer_groups_and_parameter_order_must_fit() -> None:
    model = net(1)
    one = {"o": torch.optim.SGD(model.parameters(), lr=0.1)}
    two = {"o": torch.optim.SGD([{"params": p} for p in model.parameters()], lr=0.1)}
    assert "param_groups" in mismatch(one, two)
    named = {"o": torch.optim.SGD(model.named_parameters(), lr=0.1)}
    turned = {"o": torch.optim.SGD(reversed(list(model.named_parameters())), lr=0.1)}
    assert "another order" in mismatch(named, turned)
    state = trained(1)
    params = reversed(list(state["model"].parameters()))
    other = {"optimizer": torch.optim.AdamW(params)}
    del state["model"]
    assert "optimizer/state/#0/exp_avg: the parameter has shape" in mismatch(other, state)


def test_a_refusing_object_undoes_those_before_it() -> None:
    class Stateful:
        def __init__(self, value: int, *, refuses: bool = False) -> None:
            self.value, self.refuses = value, refuses

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if self.refuses and state["value"] != self.value:
                raise RuntimeError("no thanks")
            self.value = state["value"]

    live = {"a": Stateful(1), "model": net(1), "b": Stateful(2, refuses=True), "x": torch.zeros(2)}
    before = contents(live)
    with snapshot(
        {"a": Stateful(8), "model": net(9), "b": Stateful(9), "x": torch.ones(2)}
    ) as saved:
        check(live, saved)
        with pytest.raises(StateMismatchError, match="no thanks") as caught:
            place(live, saved)
    assert caught.value.subject == "b"
    assert live["a"].value == 1
    assert contents(live) == before


def test_a_module_with_its_own_code_that_refuses_is_undone() -> None:
    class Picky(nn.Linear):
        def set_extra_state(self, state: Any) -> None:
            if state == "bad":
                raise RuntimeError("bad extra state")

        def get_extra_state(self) -> Any:
            return self.extra

    live, other = Picky(2, 2), Picky(2, 2)
    live.extra, other.extra = "good", "bad"
    before = contents(live)
    with snapshot({"m": other}) as saved, pytest.raises(StateMismatchError):
        place({"m": live}, saved)
    assert contents(live) == before


# -- identity ---------------------------------------------------------------------------------


def _parts(state: dict[str, Any]) -> list[Any]:
    plain = state["plain"]
    inside = [plain["list"], plain["list"][1], plain["queue"], plain["tuple"][0]]
    return [plain, *inside, state["tensor"], state["array"], state["generator"]]


def test_everything_that_exists_is_written_in_place() -> None:
    live = trained(2) | {
        "tensor": torch.zeros(3),
        "array": np.zeros(2),
        "plain": {
            "list": [1, torch.zeros(2)],
            "queue": deque([1], 3),
            "tuple": (torch.zeros(1), 5),
        },
        "generator": torch.Generator().manual_seed(2),
    }
    saved_from = trained(1) | {
        "tensor": torch.ones(3),
        "array": np.ones(2),
        "plain": {"list": [7, torch.ones(2), "more"], "queue": deque([2, 3], 3),
                  "tuple": (torch.ones(1), 6)},
        "generator": torch.Generator().manual_seed(1),
    }  # fmt: skip
    kept = _parts(live)
    state = live["optimizer"].state
    moments = {id(param): items["exp_avg"] for param, items in state.items()}
    params = list(live["model"].parameters())
    with snapshot(saved_from) as saved:
        place(live, saved)
    assert difference(saved_from, live) == ""
    now = _parts(live)
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert all(a is b for a, b in zip(params, live["model"].parameters(), strict=True))
    state = live["optimizer"].state
    assert all(state[param]["exp_avg"] is moments[id(param)] for param in params)


def test_views_of_live_tensors_stay_views() -> None:
    base = torch.zeros(10)
    live = {"a": base[:4], "b": base[4:].view(2, 3)}
    with snapshot({"a": torch.ones(4), "b": torch.full((2, 3), 2.0)}) as saved:
        place(live, saved)
    assert base.tolist() == [1.0] * 4 + [2.0] * 6


def test_expanded_live_tensors_take_only_what_they_can_hold() -> None:
    live = {"x": torch.zeros(3, 1).expand(3, 4)}
    good = {"x": torch.arange(3.0).view(3, 1).expand(3, 4)}
    with snapshot(good) as saved:
        place(live, saved)
    assert torch.equal(live["x"], good["x"])
    assert "is expanded" in mismatch(live, {"x": torch.arange(12.0).view(3, 4)})


def test_optimizer_state_keeps_its_exact_dtype_also_where_none_existed() -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3).bfloat16()
        return {"m": model, "o": torch.optim.Adam(model.parameters(), foreach=False)}

    state, fresh = make(1), make(2)
    state["m"](torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    state["o"].step()
    for items in state["o"].state.values():
        items["exp_avg"] = torch.randn(items["exp_avg"].shape)
    with snapshot(state) as saved:
        place(fresh, saved)
    assert difference(state, fresh) == ""
    (one, *_) = fresh["o"].state.values()
    assert one["exp_avg"].dtype == torch.float32


def test_hooks_of_an_optimizer_are_heard_and_the_dtype_still_is_exact() -> None:
    state, live = trained(1), trained(2)
    for items in state["optimizer"].state.values():
        items["exp_avg"] = items["exp_avg"].double() / 3
    calls = []
    live["optimizer"].register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    live["optimizer"].register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    with snapshot(state) as saved:
        place(live, saved)
    assert calls == ["before", "after"]
    assert difference(state, live) == ""


def test_nothing_refers_to_the_slot_afterwards() -> None:
    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Any = None
            self.register_buffer("b", torch.zeros(2))

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            self.kept = state_dict[prefix + "b"]
            super()._load_from_state_dict(state_dict, prefix, *rest)

    class Loader:
        def __init__(self) -> None:
            self.state: Any = {"t": torch.ones(3), "n": np.ones(2), "s": torch.eye(2).to_sparse()}

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    live: dict[str, Any] = trained(1) | {"k": Keeper(), "l": Loader(), "plain": {}, "s": None}
    other = trained(2) | {"k": Keeper(), "l": Loader(), "plain": {"t": torch.ones(2)}}
    other["s"] = torch.eye(2).to_sparse()
    with snapshot(other) as saved:
        start = torch.frombuffer(saved.data, dtype=torch.uint8).data_ptr()
        end = start + len(saved.data)
        place(live, saved)
        built = rebuild(saved)
        gc.collect()
        found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        inside = [tensor for tensor in found if _is_inside(tensor, start, end)]
        assert found
        assert inside == []
        before = contents([live, built])
        saved.data[:] = b"\xee" * len(saved.data)
        assert contents([live, built]) == before


def _is_inside(tensor: torch.Tensor, start: int, end: int) -> bool:
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return start <= tensor.data_ptr() < end
    return False


# -- names ------------------------------------------------------------------------------------


class Ddp(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module(batch)


WRAPPERS = {
    "none": None,
    "compile": torch.compile,
    "ddp": Ddp,
    "compile of ddp": lambda m: torch.compile(Ddp(m)),
    "ddp of compile": lambda m: Ddp(torch.compile(m)),
}


def _eager(wrap: Any) -> Any:
    """Wrapped, but never compiled: only the names matter here."""

    def made(model: nn.Module) -> Any:
        return model if wrap is None else wrap(model)

    return made


@pytest.mark.parametrize("here", WRAPPERS)
@pytest.mark.parametrize("there", WRAPPERS)
def test_wrappers_may_come_and_go(here: str, there: str) -> None:
    saved_from = {"model": _eager(WRAPPERS[here])(net(1))}
    live = {"model": _eager(WRAPPERS[there])(net(2))}
    with snapshot(saved_from) as saved:
        place(live, saved)
    left = [bytes_of(tensor) for _, tensor in tensors(saved_from)]
    assert left == [bytes_of(tensor) for _, tensor in tensors(live)]


def test_a_real_module_named_module_is_told_from_a_wrapper() -> None:
    names = ["module.w", "w"]
    assert match_names(names, names) == {"module.w": "module.w", "w": "w"}
    assert match_names(["w"], ["module.w", "_orig_mod.w"]) == {}
    assert match_names(["a.w"], ["module.a._orig_mod.w"]) == {"a.w": "module.a._orig_mod.w"}


def test_old_modules_are_upgraded_by_their_saved_version() -> None:
    old = net(1).state_dict()
    del old["1.num_batches_tracked"]
    old._metadata["1"]["version"] = 1  # type: ignore[attr-defined]
    assert "1.num_batches_tracked: is in the live state" in mismatch({"m": net(2)}, {"m": _Of(old)})


class _Of:
    """An object with this state_dict."""

    def __init__(self, state: OrderedDict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


# -- generators -------------------------------------------------------------------------------


def draw() -> list[Any]:
    return [torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()]  # noqa: NPY002


def test_generators_of_the_process_come_back_last() -> None:
    class Noisy:
        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None:
            draw()

    with snapshot({"a": Noisy()}, rng=True) as saved:
        expected = draw()
        place({"a": Noisy()}, saved)
        assert draw() == expected
        place({"a": Noisy()}, saved, rng=False)
        assert draw() != expected


def test_a_live_state_does_not_take_the_generators_for_its_own_name() -> None:
    with snapshot({"x": torch.ones(1)}, rng=True) as saved:
        live = {"x": torch.zeros(1), "rng": {"seed": 1}}
        with pytest.raises(UsageError, match="rng: is reserved"):
            place(live, saved)
        assert live == {"x": torch.zeros(1), "rng": {"seed": 1}}
        own = {"x": torch.zeros(1), "rng": torch.zeros(1)}
        with snapshot({"x": torch.ones(1), "rng": torch.ones(1)}) as other:
            place(own, other, rng=False)
        assert own == {"x": torch.ones(1), "rng": torch.ones(1)}


@pytest.mark.parametrize("batches_before", [0, 1, 5, 13, 14])
def test_a_loader_goes_on_with_the_next_batch_and_the_same_random_numbers(
    batches_before: int,
) -> None:
    torch.manual_seed(7)
    state, live = _loader(), _loader()
    batches = iter(state["loader"])
    seen = [next(batches).tolist() for _ in range(batches_before)]
    with snapshot(state, rng=True) as saved:
        expected = [[batch.tolist() for batch in batches], draw()]
        expected += [[batch.tolist() for batch in state["loader"]], draw()]
        place(live, saved)
        found = [[batch.tolist() for batch in live["loader"]], draw()]
        found += [[batch.tolist() for batch in live["loader"]], draw()]
    assert found == expected
    batches_seen = [*seen, *found[0]]
    assert sorted(at for batch in batches_seen for at in batch) == list(range(40))


def _loader() -> dict[str, Any]:
    loader: Any = StatefulDataLoader(range(40), batch_size=3, shuffle=True)
    return {"loader": loader}


def test_a_snapshot_before_the_first_batch_does_not_shift_the_random_numbers() -> None:
    torch.manual_seed(8)
    state, live = _loader(), _loader()
    with snapshot(state, rng=True) as saved:
        expected = [[batch.tolist() for batch in state["loader"]], draw()]
        place(live, saved)
        assert [[batch.tolist() for batch in live["loader"]], draw()] == expected


def test_damaged_generators_are_found_before_anything_is_changed() -> None:
    class Faked(dict[str, Any]):
        pass

    rng = {"python": (3, (1, 2), None), "numpy": {}, "torch": torch.zeros(3), "cuda": []}
    x = torch.zeros(2)
    with snapshot({"x": torch.ones(2), "rng": rng}) as saved, pytest.raises(StateMismatchError):
        place({"x": x}, saved)
    assert x.tolist() == [0.0, 0.0]
