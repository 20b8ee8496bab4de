"""Tags: scalars of any type that is one, and errors that name the others."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training import ls

import ckptmgr
from ckptmgr.errors import UsageError
from ckptmgr.rank.arguments import plain_tags
from ckptmgr.staging.hostbuffer import TAGS_BYTES_MAX


class Phase(enum.IntEnum):
    WARM_UP = 3


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class Loss(float):
    pass


def test_tags_are_scalars(runtime: Path, store_url: str) -> None:
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, every=None) as ckpt:
        tags = {"loss": torch.tensor(0.5), "norm": math.nan, "lr": 1e-3, "note": "ok", "n": 3}
        assert ckpt.save(1, tags=tags).committed(30)
        for bad in ({"bad": [1]}, {1: 2}, "tags", {"big": 1 << 70}, {"t": torch.ones(2)}):
            with pytest.raises(UsageError):
                ckpt.save(2, tags=bad)  # type: ignore[arg-type]
    assert ls(store_url)[0]["tags"] == {
        "loss": 0.5,
        "norm": "nan",
        "lr": 1e-3,
        "note": "ok",
        "n": 3,
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (Phase.WARM_UP, 3),
        (Loss(0.5), 0.5),
        (Loss("nan"), "nan"),
        (Name("run"), "run"),
        (True, True),
        ("/data/\udc80", "/data/\\udc80"),
    ],
)
def test_a_scalar_of_a_type_of_its_own_is_a_scalar(
    runtime: Path, store_url: str, given: Any, kept: Any
) -> None:
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, every=1) as ckpt:
        handle = ckpt.step(1, tags={"it": given, Name("name"): 1})
        assert handle is not None
        assert handle.committed(30)
    tags = ls(store_url)[0]["tags"]
    assert tags == {"it": kept, "name": 1}
    assert type(tags["it"]) is type(kept)


def test_their_length_is_that_of_their_bytes() -> None:
    plain_tags({"note": "e" * (TAGS_BYTES_MAX - 100)})
    with pytest.raises(UsageError, match="are longer than"):
        plain_tags({"note": "é" * (TAGS_BYTES_MAX - 100)})
