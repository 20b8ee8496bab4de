"""What is saved or restored under torch.inference_mode is as if it had been outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.rank.capture import Capture
from ckptmgr.rank.place import place, rebuild
from rank.shape import difference
from rank.slot import snapshot


def make(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "new": None}


def train(state: dict[str, Any]) -> None:
    state["model"](torch.ones(1, 3)).sum().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_save_inside_the_mode_breaks_none_after_it(overlap: bool) -> None:
    state = make(1)
    capture = Capture(state, overlap=overlap)
    memory = bytearray()
    heard: list[BaseException | None] = []
    for is_inside in (True, False, True, False):
        train(state)
        with torch.inference_mode(is_inside):
            prepared = capture.prepare()
            memory = memory or bytearray(prepared.data_bytes)
            copy = capture.copy(prepared, memoryview(memory), heard.append)
        assert copy.wait(60)
    capture.close()
    assert heard == [None] * 4
    leaf = next(leaf for leaf in prepared.layout.leaves if leaf.path == "model/weight")
    found = torch.frombuffer(memory, dtype=torch.float32, count=6, offset=leaf.offset)
    assert torch.equal(found, state["model"].weight.flatten())


def test_training_goes_on_after_a_restore_inside_the_mode() -> None:
    state, live = make(1), make(2)
    train(state)
    state["new"] = {"tensor": torch.ones(2)}
    with snapshot(state) as saved, torch.inference_mode():
        place(live, saved)
        found = rebuild(saved)
    assert not found["model"]["weight"].is_inference()
    assert not live["new"]["tensor"].is_inference()
    for one in (state, live):
        train(one)
    assert difference(state, live) == ""


def test_a_model_made_inside_the_mode_takes_its_state_there() -> None:
    with torch.inference_mode():
        live = {"model": nn.Linear(3, 2)}
        live["model"].register_load_state_dict_post_hook(lambda *_: None)
        with snapshot({"model": make(1)["model"]}) as saved:
            place(live, saved)
        assert difference(live, {"model": make(1)["model"]}) == ""
