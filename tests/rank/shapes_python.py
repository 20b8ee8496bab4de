"""State shapes: plain Python."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import random
import struct
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import torch

from rank.shape import Shape, State

Point = namedtuple("Point", "x y")  # noqa: PYI024 - what users have


@dataclasses.dataclass
class Record:
    x: int = 1


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Thing:
    pass


def _cycle(_: int) -> State:
    inner: list[Any] = []
    inner.append(inner)
    return {"a": {"b": inner}}


def _deep(_: int) -> State:
    item: Any = 1
    for _level in range(200):
        item = [item]
    return {"a": item}


def _attributes(_: int) -> State:
    found = OrderedDict(a=1)
    found.note = "x"  # type: ignore[attr-defined]
    return {"x": found}


def _dates(seed: int) -> list[Any]:
    zone = dt.timezone(dt.timedelta(hours=-3, seconds=seed), "here")
    return [
        dt.datetime(2024, 2, 29, 23, 59, 59, seed),  # noqa: DTZ001
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=zone, fold=1),
        dt.datetime(1, 1, 1, tzinfo=dt.UTC),
        dt.date(9999, 12, 31),
        dt.time(1, 2, 3, seed, tzinfo=zone),
        dt.timedelta(-1, 5, seed),
    ]


def _odd_keys(seed: int) -> State:
    keys: list[Any] = [1, "1", -1, "-1", None, "None", True and "True", (1, "a/b"), b"x", 1.5,
                       "", "a.b", "a/b", "../x", "a%2Fb", "'q'", "(None)", "\0", "\ud800", "ключ",
                       "k" * 10_000, frozenset({1}), False, 1 << 80]  # fmt: skip
    tensors = {key: torch.full((2,), float(at + seed)) for at, key in enumerate(keys)}
    return {"x": tensors, "y": {key: at + seed for at, key in enumerate(keys)}}


def _floats(seed: int) -> list[float]:
    payload = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0000 + seed))[0]
    return [float("inf"), float("-inf"), -0.0, 0.0, 5e-324, 0.1 * seed, payload]


def _scalar(name: str, make: Any) -> Shape:
    return Shape("python", name, lambda seed: {"x": make(seed), "in": [{"deep": (make(seed),)}]})


def _refused(name: str, item: Any) -> Shape:
    return Shape("python", name, lambda _: {"a": {"k": [0, item]}}, refused="a/k/1")


def _twister(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.MT19937(seed))


SHAPES = [
    _scalar("None", lambda _: None),
    _scalar("bool", lambda s: s % 2 == 0),
    _scalar("int", lambda s: s),
    _scalar("int beyond 64 bits", lambda s: [(1 << 64) + s, -(1 << 63) - s, 10**200 + s, -1 << 71]),
    _scalar("float: inf, -0.0, denormal, NaN payload", _floats),
    _scalar("complex", lambda s: complex(s, -0.0)),
    _scalar("bytes and bytearray", lambda s: [bytes([s, 0]), bytearray([0, s])]),
    _scalar("str: NUL, emoji, lone surrogates", lambda s: [f"a\0{s}", "😀", f"\ud800{s}\udfff"]),
    _scalar("tuple, list", lambda s: [(s,), [s], (), [], ((),)]),
    _scalar("set, frozenset", lambda s: [{s, "a", None}, frozenset({s}), set(), frozenset()]),
    _scalar("deque", lambda s: [deque([s, 1], maxlen=5), deque([s])]),
    _scalar("dict, order kept", lambda s: {"b": s, "a": 1, "c": {}}),
    _scalar("OrderedDict, Counter", lambda s: [OrderedDict(b=s, a=1), Counter({"x": s, "y": -1})]),
    _scalar("defaultdict", lambda s: [
        defaultdict(list, {1: [s]}), defaultdict(int), defaultdict()]),
    _scalar("datetime, date, time, timedelta", _dates),
    _scalar("paths", lambda s: [pathlib.Path(f"/a/{s}"), pathlib.PurePosixPath("b"),
                                pathlib.PureWindowsPath("c:/d")]),
    _scalar("range, slice", lambda s: [range(s, 9, 2), range(10**30), slice(None, s, -1)]),
    _scalar("torch.dtype, device, Size, layout", lambda _: [
        torch.bfloat16, torch.device("cuda:3"), torch.Size([2, 0]), torch.strided,
        torch.channels_last]),
    Shape("python", "keys: int, None, bool, tuple, bytes, '/', '..', 10 kB", _odd_keys),
    Shape("python", "key 'a.b' beside a -> b", lambda s: {
        "x": {"a.b": torch.ones(1) * s, "a": {"b": torch.zeros(1)}}
    }),
    Shape("python", "empty containers", lambda _: {"x": {}, "y": [], "z": [(), {}, [[]]]}),
    Shape("python", "containers of tensors", lambda s: {
        "x": [torch.ones(2) * s, (torch.zeros(s), {"k": deque([torch.ones(1) * s], 3)})],
        "y": defaultdict(list, {"a": [torch.ones(1) * s]}),
        "z": OrderedDict([("b", torch.ones(1) * s), ("a", 1)]),
    } if s == 1 else {
        "x": [torch.ones(2) * s, (torch.zeros(1), {"k": deque([torch.ones(1) * s], 3)})],
        "y": defaultdict(list, {"a": [torch.ones(1) * s]}),
        "z": OrderedDict([("b", torch.ones(1) * s), ("a", 7)]),
    }),
    Shape("python", "empty state", lambda _: {}),
    Shape("rng", "torch.Generator", lambda s: {"x": torch.Generator().manual_seed(s)}),
    Shape("rng", "random.Random", lambda s: {"x": random.Random(s)}),
    Shape("rng", "NumPy Generator (PCG64)", lambda s: {"x": np.random.default_rng(s)}),
    Shape("rng", "NumPy Generator (MT19937)", lambda s: {"x": _twister(s)}),
    Shape("rng", "NumPy Generator (Philox)", lambda s: {
        "x": np.random.Generator(np.random.Philox(s))
    }),
    Shape("rng", "NumPy Generator (SFC64)", lambda s: {
        "x": np.random.Generator(np.random.SFC64(s))
    }),
    Shape("rng", "NumPy RandomState", lambda s: {"x": np.random.RandomState(s)}),
    _refused("lambda", lambda: None),
    _refused("function", print),
    _refused("class", Thing),
    _refused("object", Thing()),
    _refused("module class", torch.nn.Linear),
    _refused("namedtuple", Point(1, 2)),
    _refused("dataclass", Record()),
    _refused("enum", Colour.RED),
    _refused("IntEnum", Level.LOW),
    _refused("subclass of str", Text("x")),
    _refused("Decimal", decimal.Decimal("0.1")),
    _refused("UUID", uuid.UUID(int=1)),
    _refused("memoryview", memoryview(b"x")),
    _refused("generator", (x for x in ())),
    _refused("time zone by name", dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC"))),
    _refused("defaultdict of a lambda", defaultdict(lambda: 0)),
    Shape("python", "OrderedDict with attributes", _attributes, refused="x"),
    Shape("python", "key of an unknown type", lambda _: {"x": {Level.LOW: 1}},
          refused="x/(<Level.LOW: 1>)"),
    Shape("python", "several NaN keys", lambda _: {
        "x": {float("nan"): torch.ones(1), float("nan"): torch.zeros(1)}
    }, refused="x"),
    Shape("python", "cycle", _cycle, refused="/".join(["a", "b", *"0" * 98])),
    Shape("python", "200 levels", _deep, refused="/".join(["a", *"0" * 99])),
]  # fmt: skip
