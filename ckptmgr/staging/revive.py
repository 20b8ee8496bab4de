"""Python state from the typed encoding of values.py; nothing that is read is imported or run."""

from __future__ import annotations

import datetime as dt
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np

from ckptmgr.errors import RecordDamagedError, StateError
from ckptmgr.staging import values as v
from ckptmgr.staging.extent import too_much

LeafReader = Callable[[int, int], Any]
"""Gives the object for the leaf with this index and these flags."""

ExternalReader = Callable[[v.External], Any]
"""Puts an object together again; it may raise ValueError, TypeError or a StateError."""

_DEPTH_MAX = v.DEPTH_MAX + 4
_decode = msgspec.msgpack.Decoder().decode


def keep_external(external: v.External) -> v.External:
    """Leave an object taken apart, for readers without torch."""
    return external


def decode_values(
    encoded: bytes | memoryview, *, external: ExternalReader = keep_external, subject: str = ""
) -> list[Any]:
    """The values of a snapshot, in their order.

    Raises:
        RecordDamagedError: the bytes are not values; `subject` is shown in front.
    """
    reader = _Reader(subject=subject, external=external)
    items = reader.unpack(encoded)
    if type(items) is not list:
        reader.damaged("values are not an array")
    return [reader.read(item, 0) for item in items]


def decode_tree(
    encoded: bytes | memoryview,
    values: list[Any],
    leaf: LeafReader,
    *,
    external: ExternalReader = keep_external,
    subject: str = "",
) -> Any:
    """The nested state, with `leaf(index, flags)` in the place of each tensor.

    Memory is bounded by extent.py, and by a small multiple of the encoded length.

    Raises:
        RecordDamagedError: the bytes are not a tree that fits `values`.
    """
    reader = _Reader(subject=subject, external=external, values=values, leaf=leaf)
    return reader.read(reader.unpack(encoded), 0)


@dataclass(slots=True)
class _Reader:
    subject: str
    external: ExternalReader
    values: list[Any] = field(default_factory=list)
    leaf: LeafReader | None = None

    def damaged(self, why: str) -> NoReturn:
        raise RecordDamagedError(why, subject=self.subject)

    def unpack(self, encoded: bytes | memoryview) -> Any:
        why = too_much(encoded)
        if why:
            self.damaged(why)
        try:
            return _decode(encoded)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise RecordDamagedError(
                f"is not MessagePack: {error}", subject=self.subject
            ) from error

    def read(self, form: Any, depth: int) -> Any:
        kind = type(form)
        if kind in (type(None), bool, int, float, str, bytes):
            return form
        if kind is not list or not form or type(form[0]) is not int:
            self.damaged(f"holds a {kind.__name__} without a tag")
        if depth > _DEPTH_MAX:
            self.damaged("is nested too deep")
        read = _READERS.get(form[0])
        if read is None:
            self.damaged(f"holds the unknown tag {form[0]}")
        try:
            return read(self, form[1:], depth)
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            AttributeError,
            OverflowError,
            NotImplementedError,
        ) as error:
            raise RecordDamagedError(
                f"holds a malformed item with tag {form[0]}: {error}", subject=self.subject
            ) from error

    def items(self, forms: list[Any], depth: int) -> list[Any]:
        return [self.read(form, depth + 1) for form in forms]

    def pairs(self, forms: list[Any], depth: int) -> dict[Any, Any]:
        if len(forms) % 2:
            self.damaged("holds a key without a value")
        flat = self.items(forms, depth)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def read_external(self, forms: list[Any], depth: int) -> Any:
        kind, attributes, *children = self.items(forms, depth)
        named = dict(zip(children[::2], children[1::2], strict=True))
        if type(kind) is not str or not all(type(name) is str for name in named):
            self.damaged("holds an object without a kind")
        try:
            return self.external(v.External(kind, attributes, named))
        except StateError:
            raise
        except Exception as error:  # torch tells malformed parts by many types
            raise RecordDamagedError(
                f"holds a malformed {kind}: {error}", subject=self.subject
            ) from error

    def read_leaf(self, forms: list[Any], _depth: int) -> Any:
        index, flags = forms
        if self.leaf is None or type(index) is not int or type(flags) is not int or index < 0:
            self.damaged("holds a leaf where there can be none")
        return self.leaf(index, flags)

    def read_value(self, forms: list[Any], _depth: int) -> Any:
        (index,) = forms
        if type(index) is not int or not 0 <= index < len(self.values):
            self.damaged("names a value that does not exist")
        return self.values[index]


_Read = Callable[[_Reader, list[Any], int], Any]


def _big_int(_: _Reader, forms: list[Any], _depth: int) -> int:
    (raw,) = forms
    return int.from_bytes(_exact(raw, bytes), "little", signed=True)


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _surrogates(_: _Reader, forms: list[Any], _depth: int) -> str:
    (raw,) = forms
    return bytes(_exact(raw, bytes)).decode("utf-8", "surrogatepass")


def _complex(_: _Reader, forms: list[Any], _depth: int) -> complex:
    real, imag = forms
    return complex(_exact(real, float), _exact(imag, float))


def _bytearray(_: _Reader, forms: list[Any], _depth: int) -> bytearray:
    (raw,) = forms
    return bytearray(_exact(raw, bytes))


def _deque(reader: _Reader, forms: list[Any], depth: int) -> deque[Any]:
    return deque(reader.items(forms[1:], depth), maxlen=forms[0])


def _counter(reader: _Reader, forms: list[Any], depth: int) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, reader.pairs(forms, depth))  # Counter.update would add up
    return counter


def _defaultdict(reader: _Reader, forms: list[Any], depth: int) -> defaultdict[Any, Any]:
    name, *rest = forms
    factory = None if name is None else v.FACTORIES[name]
    return defaultdict(factory, reader.pairs(rest, depth))


def _state_dict(reader: _Reader, forms: list[Any], depth: int) -> OrderedDict[Any, Any]:
    found = OrderedDict(reader.pairs(forms[1:], depth))
    found._metadata = reader.read(forms[0], depth + 1)  # type: ignore[attr-defined]
    return found


def _zone(offset: int | None, name: str | None) -> dt.timezone | None:
    if offset is None:
        return None
    delta = dt.timedelta(microseconds=offset)
    return dt.timezone(delta) if name is None else dt.timezone(delta, name)


def _datetime(reader: _Reader, forms: list[Any], depth: int) -> dt.datetime:
    *parts, fold, offset, name = reader.items(forms, depth)
    zone = _zone(offset, name)
    return dt.datetime.combine(dt.date(*parts[:3]), dt.time(*parts[3:]), zone).replace(fold=fold)


def _date(_: _Reader, forms: list[Any], _depth: int) -> dt.date:
    return dt.date(*forms)


def _time(reader: _Reader, forms: list[Any], depth: int) -> dt.time:
    *parts, fold, offset, name = reader.items(forms, depth)
    zone = _zone(offset, name)
    return dt.time(*parts).replace(fold=fold, tzinfo=zone)


def _timedelta(_: _Reader, forms: list[Any], _depth: int) -> dt.timedelta:
    days, seconds, microseconds = (_exact(part, int) for part in forms)
    return dt.timedelta(days, seconds, microseconds)


def _path(reader: _Reader, forms: list[Any], depth: int) -> Any:
    number, text = reader.items(forms, depth)
    if type(number) is not int or number < 0:
        raise TypeError("unknown kind of path")
    return v.PATH_TYPES[number](_exact(text, str))


def _range(reader: _Reader, forms: list[Any], depth: int) -> range:
    start, stop, step = reader.items(forms, depth)
    return range(start, stop, step)


def _slice(reader: _Reader, forms: list[Any], depth: int) -> slice:
    start, stop, step = reader.items(forms, depth)
    return slice(start, stop, step)


def _numpy_scalar(reader: _Reader, forms: list[Any], depth: int) -> np.generic:
    text, raw = reader.items(forms, depth)
    if text == "U":
        return np.str_(_exact(raw, str))
    if text == "S":
        return np.bytes_(_exact(raw, bytes))
    dtype = v.numpy_dtype(_exact(text, str))
    if len(_exact(raw, bytes)) != dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for one {dtype}")
    scalar: np.generic = np.frombuffer(raw, dtype)[0]
    return scalar


_READERS: dict[int, _Read] = {
    v.BIG_INT: _big_int,
    v.COMPLEX: _complex,
    v.BYTEARRAY: _bytearray,
    v.SURROGATES: _surrogates,
    v.TUPLE: lambda reader, forms, depth: tuple(reader.items(forms, depth)),
    v.LIST: _Reader.items,
    v.SET: lambda reader, forms, depth: set(reader.items(forms, depth)),
    v.FROZENSET: lambda reader, forms, depth: frozenset(reader.items(forms, depth)),
    v.DEQUE: _deque,
    v.DICT: _Reader.pairs,
    v.ORDERED_DICT: lambda reader, forms, depth: OrderedDict(reader.pairs(forms, depth)),
    v.COUNTER: _counter,
    v.DEFAULT_DICT: _defaultdict,
    v.STATE_DICT: _state_dict,
    v.DATETIME: _datetime,
    v.DATE: _date,
    v.TIME: _time,
    v.TIMEDELTA: _timedelta,
    v.PATH: _path,
    v.RANGE: _range,
    v.SLICE: _slice,
    v.NUMPY_SCALAR: _numpy_scalar,
    v.EXTERNAL: _Reader.read_external,
    v.LEAF: _Reader.read_leaf,
    v.VALUE: _Reader.read_value,
}
