"""Typed, safe encoding of Python state: reading never imports or runs anything that it reads.

MessagePack (docs/format.md section 6). nil, bool, integers from -2^63 to 2^64 - 1, float64, str and
bin stand for themselves; maps and extension types are not used. Everything else is an array whose
first item is a tag:

| tag | array after the tag | Python |
|---|---|---|
| 0 | bin: two's complement, little-endian | int outside 64 bits |
| 1 | real, imag | complex |
| 2 | bin | bytearray |
| 3 | bin: UTF-8 with surrogates (surrogatepass) | str with lone surrogates |
| 4 | items... | tuple |
| 5 | items... | list |
| 6 | items... | set |
| 7 | items... | frozenset |
| 8 | maxlen or nil, items... | collections.deque |
| 9 | key, value, ... in order | dict |
| 10 | key, value, ... | OrderedDict |
| 11 | key, value, ... | Counter |
| 12 | factory (name in FACTORIES or nil), key, value, ... | defaultdict |
| 13 | `_metadata`, key, value, ... | OrderedDict with the `_metadata` of Module.state_dict |
| 14 | year, month, day, hour, minute, second, microsecond, fold, offset, zone | datetime |
| 15 | year, month, day | date |
| 16 | hour, minute, second, microsecond, fold, offset, zone | time |
| 17 | days, seconds, microseconds | timedelta |
| 18 | 0 PosixPath, 1 PurePosixPath, 2 PureWindowsPath; str | path |
| 19 | start, stop, step | range |
| 20 | start, stop, step | slice |
| 21 | dtype string (`<f4`), bin | NumPy scalar; `U` with str, `S` with bin: str_, bytes_ |
| 22 | kind, attributes, name, child, ... | object of the rank: ckptmgr/rank/externals.py |
| 23 | index, flags (1 requires grad, 2 is a Parameter) | leaf: a tensor of the layout (tree only) |
| 24 | index | the value with this index in the values (tree only) |

Offset is microseconds from UTC or nil, zone its name or nil. The tree is one such item, the
values are one MessagePack array of such items. A subtree without a tensor is a single value, so
that a list which grows from step to step leaves the tree alone. Nesting is at most 100 deep. A
container that occurs twice is stored twice; a tensor that occurs twice is one leaf.
"""

from __future__ import annotations

import datetime as dt
import pathlib
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.staging.extent import too_much
from ckptmgr.staging.paths import Trail, render, segment

DEPTH_MAX = 100
"""Deepest nesting of containers; far below Python's recursion limit, far above real states."""

(
    BIG_INT,
    COMPLEX,
    BYTEARRAY,
    SURROGATES,
    TUPLE,
    LIST,
    SET,
    FROZENSET,
    DEQUE,
    DICT,
    ORDERED_DICT,
    COUNTER,
    DEFAULT_DICT,
    STATE_DICT,
    DATETIME,
    DATE,
    TIME,
    TIMEDELTA,
    PATH,
    RANGE,
    SLICE,
    NUMPY_SCALAR,
    EXTERNAL,
    LEAF,
    VALUE,
) = range(25)

FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory
    for factory in (list, dict, set, frozenset, tuple, int, float, complex, bool, str, bytes)
} | {"deque": deque, "Counter": Counter, "OrderedDict": OrderedDict}
"""The default_factory of a defaultdict is one of these; any other is refused."""

PATH_TYPES: tuple[type[pathlib.PurePath], ...] = (
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)
MAPPING_TAGS: dict[type, int] = {
    dict: DICT,
    OrderedDict: ORDERED_DICT,
    Counter: COUNTER,
    defaultdict: DEFAULT_DICT,
}
SEQUENCE_TAGS: dict[type, int] = {
    tuple: TUPLE,
    list: LIST,
    set: SET,
    frozenset: FROZENSET,
    deque: DEQUE,
}

_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_EXACT = frozenset({type(None), bool, int, str, bytes})
"""Types of which no two different values are equal."""

_NUMPY_DTYPE = re.compile(r"[<>|][biufcMm][0-9]{1,2}(\[[0-9]*[a-zA-Zμ]{1,2}\])?")
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class External:
    """An object that only the rank knows: a kind, plain attributes, and tensors as children."""

    kind: str
    attributes: Any
    children: Mapping[str, Any]


Externalize = Callable[[Any, Trail], External | None]
"""Takes an object apart, or gives None for what it does not know. It raises
UnsupportedLeafError for what it knows and can not store exactly."""


def numpy_dtype(text: str) -> np.dtype[Any]:
    """The plain NumPy dtype with this name (`<f4`, `<M8[ns]`).

    Raises:
        ValueError: it is a structured or object dtype, or none at all.
    """
    if not _NUMPY_DTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a plain dtype")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise ValueError(str(error)) from error


class LeafInValueError(Exception):
    """A tensor (or an object with tensors) where there can be none; `trail` is its place."""

    def __init__(self, trail: Trail) -> None:
        super().__init__(render(trail))
        self.trail = trail


def refuse(trail: Trail, why: str, hint: str = "") -> UnsupportedLeafError:
    """The error for a place of the state that can not be stored exactly."""
    return UnsupportedLeafError(why, subject=render(trail), hint=hint)


def encode_values(values: Sequence[tuple[Any, Trail]], externalize: Externalize) -> bytes:
    """The values of a snapshot: one MessagePack array of typed items.

    Args:
        values: plain Python objects, each with the place it was found at.
        externalize: takes apart what this module does not know.

    Raises:
        UnsupportedLeafError: an object that has no exact encoding, or more than may be restored.
        LeafInValueError: one of the values holds a tensor.
    """
    try:
        # Nearly all values fit MessagePack as they are; the C encoder finds those that do not.
        quick = Former(externalize, careful=False)
        encoded = _encode([quick.form(value, trail) for value, trail in values])
    except (OverflowError, UnicodeEncodeError):
        exact = Former(externalize, careful=True)
        encoded = _encode([exact.form(value, trail) for value, trail in values])
    return within_bounds(encoded)


def within_bounds(encoded: bytes) -> bytes:
    """The encoding, if it may be decoded again.

    Raises:
        UnsupportedLeafError: it holds more than a reader takes.
    """
    why = too_much(encoded)
    if why:
        raise UnsupportedLeafError(
            why, subject="state", hint="Keep what is large in tensors or NumPy arrays."
        )
    return encoded


class Former:
    """Turns Python objects into what MessagePack can hold.

    With `careful` False, integers and strings are passed on unseen: the encoder then raises
    OverflowError or UnicodeEncodeError for those that need a tag.
    """

    def __init__(self, externalize: Externalize, *, careful: bool) -> None:
        self._externalize = externalize
        self._careful = careful

    def form(self, value: Any, trail: Trail, depth: int = 0) -> Any:
        """The MessagePack form of `value`, found at `trail`."""
        kind = type(value)
        if kind in _PLAIN:
            return self._scalar(value) if self._careful else value
        if depth >= DEPTH_MAX:
            raise refuse(trail, f"is nested more than {DEPTH_MAX} deep, or contains itself")
        if kind in SEQUENCE_TAGS:
            return self._sequence(value, trail, depth)
        if kind in MAPPING_TAGS:
            return self._mapping(value, trail, depth)
        scalar = _SCALAR_FORMS.get(kind)
        if scalar is not None:
            return self._parts(scalar(value, trail))
        if isinstance(value, np.generic):
            return self._parts(_numpy_scalar(value, trail))
        return self._external(value, trail, depth)

    def key(self, key: Hashable, trail: Trail, depth: int) -> Any:
        """The form of a dictionary key; checks that it has a path of its own."""
        if type(key) is not str:
            try:
                segment(key)
            except ValueError as error:
                raise refuse(trail, f"has a key that can not be shown: {error}") from error
        return self.form(key, (trail, key), depth + 1)

    def _scalar(self, value: Any) -> Any:
        if type(value) is int and not -(1 << 63) <= value < 1 << 64:
            return [BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]
        if type(value) is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                return [SURROGATES, value.encode("utf-8", "surrogatepass")]
        return value

    def _parts(self, form: list[Any]) -> list[Any]:
        return [self._scalar(part) for part in form] if self._careful else form

    def _sequence(self, value: Any, trail: Trail, depth: int) -> list[Any]:
        head = self.head(type(value), fixed_attributes(value), trail, depth)
        if not self._careful and _PLAIN.issuperset(map(type, value)):
            return [*head, *value]
        places = enumerate(value)
        return head + [self.form(item, (trail, at), depth + 1) for at, item in places]

    def _mapping(self, value: Any, trail: Trail, depth: int) -> list[Any]:
        head = self.head(type(value), fixed_attributes(value), trail, depth)
        check_keys(value, trail)
        for key, item in value.items():
            head.append(self.key(key, trail, depth))
            head.append(self.form(item, (trail, key), depth + 1))
        return head

    def head(self, kind: type, fixed: Any, trail: Trail, depth: int = 0) -> list[Any]:
        """Tag and fixed attributes of a container; its items follow."""
        if kind is deque:
            return [DEQUE, fixed]
        if kind is defaultdict:
            return [DEFAULT_DICT, _factory_name(fixed, trail)]
        if not fixed:
            return [SEQUENCE_TAGS[kind] if kind in SEQUENCE_TAGS else MAPPING_TAGS[kind]]
        if kind is not OrderedDict or list(fixed) != ["_metadata"]:
            raise refuse(trail, f"has attributes {sorted(fixed)}")
        return [STATE_DICT, self.form(fixed["_metadata"], trail, depth + 1)]

    def _external(self, value: Any, trail: Trail, depth: int) -> list[Any]:
        taken = self._externalize(value, trail)
        if taken is None:
            kind = type(value)
            raise refuse(trail, f"is a {kind.__module__}.{kind.__qualname__}")
        if taken.children:
            raise LeafInValueError(trail)
        return [EXTERNAL, taken.kind, self.form(taken.attributes, trail, depth + 1)]


def fixed_attributes(container: Any) -> Any:
    """What a container is besides its items: maxlen, default_factory, or its attributes."""
    kind = type(container)
    if kind is deque:
        return container.maxlen
    if kind is defaultdict:
        return container.default_factory
    return dict(vars(container)) if kind is OrderedDict or kind is Counter else None


def exact_form(key: Hashable) -> Any:
    """Something that is equal for the same key only: 1, True and 1.0 are equal, as are the zeros,
    the tuples of them, and times in different zones.
    """
    kind = type(key)
    if kind in _EXACT:
        return kind, key
    if isinstance(key, (tuple, frozenset)):
        return kind, tuple(map(exact_form, key))
    return kind, repr(key)


def check_keys(value: Mapping[Hashable, Any], trail: Trail) -> None:
    """Refuse a dictionary of which two keys would have one path (several NaN)."""
    if {str, int}.issuperset(map(type, value)):
        return
    shown = Counter(repr(key) for key in value if type(key) not in (str, int))
    twice = [text for text, count in shown.items() if count > 1]
    if twice:
        raise refuse(trail, f"has several keys {twice[0]}")


def _factory_name(factory: Any, trail: Trail) -> str | None:
    if factory is None:
        return None
    name = _FACTORY_NAMES.get(factory) if isinstance(factory, type) else None
    if name is None:
        raise refuse(trail, f"is a defaultdict with default_factory {factory!r}")
    return name


def _zone(zone: dt.tzinfo | None, trail: Trail) -> tuple[int | None, str | None]:
    if zone is None:
        return None, None
    if type(zone) is not dt.timezone:
        raise refuse(trail, f"has a time zone of type {type(zone).__name__}")
    offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
    return offset // dt.timedelta(microseconds=1), (name[0] if name else None)


def _datetime(value: dt.datetime, trail: Trail) -> list[Any]:
    day = [value.year, value.month, value.day]
    return [DATETIME, *day, *_clock(value, trail)]


def _clock(value: dt.datetime | dt.time, trail: Trail) -> list[Any]:
    parts = [value.hour, value.minute, value.second, value.microsecond]
    return [*parts, value.fold, *_zone(value.tzinfo, trail)]


def _numpy_scalar(value: np.generic, trail: Trail) -> list[Any]:
    if type(value) is np.str_:
        return [NUMPY_SCALAR, "U", str.__str__(value)]  # str() drops trailing NULs
    if type(value) is np.bytes_:
        return [NUMPY_SCALAR, "S", bytes.__add__(value, b"")]
    text = value.dtype.str
    if not _NUMPY_DTYPE.fullmatch(text):
        raise refuse(trail, f"is a NumPy scalar of dtype {value.dtype}")
    return [NUMPY_SCALAR, text, value.tobytes()]


_SCALAR_FORMS: dict[type, Callable[[Any, Trail], list[Any]]] = {
    complex: lambda value, _: [COMPLEX, value.real, value.imag],
    bytearray: lambda value, _: [BYTEARRAY, bytes(value)],
    dt.datetime: _datetime,
    dt.date: lambda value, _: [DATE, value.year, value.month, value.day],
    dt.time: lambda value, trail: [TIME, *_clock(value, trail)],
    dt.timedelta: lambda v, _: [TIMEDELTA, v.days, v.seconds, v.microseconds],
    range: lambda value, _: [RANGE, value.start, value.stop, value.step],
    slice: lambda value, trail: [SLICE, *_slice_parts(value, trail)],
} | {
    kind: lambda value, _, number=number: [PATH, number, str(value)]
    for number, kind in enumerate(PATH_TYPES)
}


def _slice_parts(value: slice, trail: Trail) -> Iterable[int | None]:
    parts = (value.start, value.stop, value.step)
    if any(type(part) not in (int, type(None)) for part in parts):
        raise refuse(trail, "is a slice of something other than integers")
    return parts
