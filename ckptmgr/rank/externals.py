"""Objects that only the rank knows, taken apart and put together again (tag 22 of values.py).

| kind | attributes | children |
|---|---|---|
| torch.dtype, torch.device, torch.layout, torch.memory_format | name | |
| torch.Size | list of int | |
| torch.Generator | device name | state |
| torch.sparse_coo | shape, is coalesced, requires grad | indices, values |
| torch.sparse_csr, _csc, _bsr, _bsc | shape, requires grad | compressed, plain, values |
| torch.per_tensor_affine | scale, zero point, dtype | int_repr |
| torch.per_channel_affine (.._float_qparams) | axis, dtype | int_repr, scales, zero_points |
| numpy.ndarray | dtype string, shape | elements |
| numpy.Generator | class of the bit generator, its state with arrays as lists | |
| numpy.RandomState | its state with arrays as lists | |
| random.Random | getstate() | |
| torch.optim | nil | entries of the state_dict, `state` and `param_groups` keyed by names |
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.optimizers import NamedState, by_position
from ckptmgr.rank.parts import PLAIN_TYPES, leaf_types
from ckptmgr.rank.tensors import dtype_name, dtype_of, is_leaf, why_not
from ckptmgr.staging.paths import Trail
from ckptmgr.staging.values import External, LeafInValueError, numpy_dtype, refuse

OPTIMIZER = "torch.optim"
"""The one kind whose children may be what stands for a tensor; they are not cloned for it."""

_NAMED: dict[type, str] = {
    torch.dtype: "torch.dtype",
    torch.device: "torch.device",
    torch.layout: "torch.layout",
    torch.memory_format: "torch.memory_format",
}
LAYOUTS = {
    name: getattr(torch, name)
    for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
}
_MEMORY_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_ROW_COMPRESSED = {torch.sparse_csr, torch.sparse_bsr}
_COLUMN_COMPRESSED = {torch.sparse_csc, torch.sparse_bsc}
_BIT_GENERATORS: dict[str, Callable[[], Any]] = {
    name: getattr(np.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
}
_PER_TENSOR = {torch.per_tensor_affine, torch.per_tensor_symmetric}
_PER_CHANNEL = {
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
}
_QUANTIZED_INTEGERS = {torch.qint8, torch.quint8, torch.qint32}


def externalize(item: Any, trail: Trail) -> External | None:
    """Take `item` apart, or None if it is not of a kind in the table above.

    Raises:
        UnsupportedLeafError: it is of such a kind and can not be stored exactly.
        LeafInValueError: it is a plain tensor, where there can be none.
    """
    if isinstance(item, Tensor):
        return _tensor(item, trail)
    if isinstance(item, np.ndarray):
        return _array(item, trail)
    if type(item) in _NAMED:
        return External(_NAMED[type(item)], str(item).removeprefix("torch."), {})
    if type(item) is torch.Size:
        return External("torch.Size", list(item), {})
    if type(item) is NamedState:
        return External(OPTIMIZER, None, item.entries)
    if type(item) is torch.Generator:
        return External("torch.Generator", str(item.device), {"state": item.get_state()})
    return _python_generator(item, trail)


def _tensor(item: Tensor, trail: Trail) -> External:
    if type(item) in leaf_types() and is_leaf(item):
        raise LeafInValueError(trail)
    if type(item) not in PLAIN_TYPES or item.is_nested:
        raise refuse(trail, why_not(item))
    if item.is_quantized:
        return _quantized(item, trail)
    if item.layout == torch.sparse_coo:
        indices, values = item._indices(), item._values()
        attributes = [list(item.shape), item.is_coalesced(), item.requires_grad]
        return External(
            "torch.sparse_coo", attributes, {"indices": indices, "values": values.detach()}
        )
    if item.layout in _ROW_COMPRESSED:
        return _compressed(item, item.crow_indices(), item.col_indices())
    if item.layout in _COLUMN_COMPRESSED:
        return _compressed(item, item.ccol_indices(), item.row_indices())
    raise refuse(trail, why_not(item))


def _compressed(item: Tensor, compressed: Tensor, plain: Tensor) -> External:
    kind = str(item.layout)
    children = {"compressed": compressed, "plain": plain, "values": item.values().detach()}
    return External(kind, [list(item.shape), item.requires_grad], children)


def _quantized(item: Tensor, trail: Trail) -> External:
    scheme = item.qscheme()
    if item.dtype not in _QUANTIZED_INTEGERS:
        raise refuse(trail, f"is quantized with packed elements ({item.dtype})")
    name = dtype_name(item.dtype)
    whole = item.int_repr()
    if scheme in _PER_TENSOR:
        attributes = [item.q_scale(), item.q_zero_point(), name]
        return External("torch.per_tensor_affine", attributes, {"int_repr": whole})
    if scheme in _PER_CHANNEL:
        children = {
            "int_repr": whole,
            "scales": item.q_per_channel_scales(),
            "zero_points": item.q_per_channel_zero_points(),
        }
        return External("torch.per_channel_affine", [item.q_per_channel_axis(), name], children)
    raise refuse(trail, f"is quantized by {scheme}")


def _array(item: np.ndarray[Any, Any], trail: Trail) -> External:
    if type(item) not in (np.ndarray, np.memmap):
        raise refuse(trail, f"is a {type(item).__module__}.{type(item).__qualname__}")
    if item.dtype.kind in "OV" or item.dtype.hasobject or item.dtype.metadata:
        raise refuse(trail, f"is a NumPy array of dtype {item.dtype}")
    attributes = [item.dtype.str, list(item.shape)]
    return External("numpy.ndarray", attributes, {"elements": array_bytes(item)})


def array_bytes(item: np.ndarray[Any, Any]) -> Tensor:
    """The elements of an array, row by row, as a tensor that shares its memory if it can."""
    plain = np.asarray(item)
    if not plain.flags.c_contiguous or not plain.flags.writeable:
        plain = plain.copy(order="C")
    try:
        return torch.from_numpy(plain)
    except (TypeError, ValueError):  # a dtype or byte order that torch does not have
        return torch.from_numpy(np.ndarray((plain.nbytes,), np.uint8, plain))


def _python_generator(item: Any, trail: Trail) -> External | None:
    if type(item) is random.Random:
        return External("random.Random", item.getstate(), {})
    if type(item) is np.random.RandomState:
        state = _state_of(item)
        refuse_unknown(state["bit_generator"], trail)
        return External("numpy.RandomState", _listed(state), {})
    if type(item) is np.random.Generator:
        name = type(item.bit_generator).__name__
        refuse_unknown(name, trail)
        return External("numpy.Generator", [name, _listed(item.bit_generator.state)], {})
    return None


def refuse_unknown(name: str, trail: Trail) -> None:
    """Refuse the state of a bit generator that is not one of NumPy's own.

    Raises:
        UnsupportedLeafError: it is not.
    """
    if name not in _BIT_GENERATORS:
        raise refuse(trail, f"has the bit generator {name}")


def _listed(state: Any) -> Any:
    """A NumPy generator's state with its arrays as lists; their dtypes follow from the class."""
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


def _unlisted(state: Any, dtype: Any) -> Any:
    if isinstance(state, dict):
        return {key: _unlisted(value, dtype) for key, value in state.items()}
    return np.array(state, dtype) if isinstance(state, list) else state


def assemble(external: External) -> Any:
    """A new object from what `externalize` took apart; its tensors are the children themselves.

    Raises:
        ValueError, TypeError, RuntimeError: the parts do not fit together.
    """
    kind, attributes = external.kind, external.attributes
    if kind in _BUILDERS:
        return _BUILDERS[kind](attributes, external.children)
    if kind.startswith("torch.sparse_"):
        return _assemble_sparse(kind, attributes, external.children)
    raise ValueError(f"unknown kind of object {kind!r}")


def _assemble_sparse(kind: str, attributes: Any, children: Any) -> Tensor:
    layout = LAYOUTS[kind.removeprefix("torch.")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse CSR support is in beta"
        if layout == torch.sparse_coo:
            shape, coalesced, grad = attributes
            found = torch.sparse_coo_tensor(
                children["indices"],
                children["values"],
                shape,
                check_invariants=True,
                is_coalesced=coalesced,
                device="cpu",
            )
        else:
            shape, grad = attributes
            found = torch.sparse_compressed_tensor(
                children["compressed"],
                children["plain"],
                children["values"],
                shape,
                layout=layout,
                check_invariants=True,
                device="cpu",
            )
    return found.requires_grad_(bool(grad))


def _assemble_generator(device: str, children: Any) -> torch.Generator:
    try:
        generator = torch.Generator(device)
    except RuntimeError as error:
        raise StateMismatchError(f"a generator of {device} can not be made here") from error
    generator.set_state(children["state"])
    return generator


def _assemble_per_tensor(attributes: Any, children: Any) -> Tensor:
    scale, zero_point, dtype = attributes
    whole = children["int_repr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will replace them some day
        empty = torch._empty_affine_quantized(
            whole.shape,
            scale=scale,
            zero_point=zero_point,
            dtype=dtype_of(dtype),
            device="cpu",
        )
    return _filled(empty, whole)


def _assemble_per_channel(attributes: Any, children: Any) -> Tensor:
    axis, dtype = attributes
    whole = children["int_repr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch._empty_per_channel_affine_quantized(
            whole.shape,
            scales=children["scales"],
            zero_points=children["zero_points"],
            axis=axis,
            dtype=dtype_of(dtype),
            device="cpu",
        )
    return _filled(empty, whole)


def _filled(empty: Tensor, whole: Tensor) -> Tensor:
    """A quantized tensor with exactly these integers, whatever its dtype."""
    storage = torch.empty(0, dtype=whole.dtype, device="cpu").set_(
        empty.untyped_storage(), 0, whole.shape, whole.stride()
    )
    storage.copy_(whole)
    return empty


def _assemble_array(attributes: Any, children: Any) -> np.ndarray[Any, Any]:
    text, shape = attributes
    dtype = numpy_dtype(text) if text[1:2] not in ("U", "S") else _text_dtype(text)
    elements: np.ndarray[Any, Any] = children["elements"].numpy()
    if elements.dtype == dtype:
        return elements.reshape(shape)
    if elements.size == 0 and math.prod(shape) * dtype.itemsize:
        raise ValueError(f"no elements for shape {shape}")
    return np.ndarray(shape, dtype, elements.data if elements.size else b"")


def _text_dtype(text: str) -> np.dtype[Any]:
    if not text[2:].isdecimal():
        raise ValueError(f"{text!r} is not the name of a plain dtype")
    return np.dtype(text)


def _assemble_random(attributes: Any, _: Any) -> random.Random:
    generator = random.Random()  # noqa: S311 - the user's own generator
    generator.setstate(attributes)
    return generator


def new_bit_generator(name: str) -> Any:
    """One of NumPy's own, by the name of its class.

    Raises:
        KeyError: it is none of them.
    """
    return _BIT_GENERATORS[name]()


def _state_of_bit_generator(name: str, listed: Any) -> Any:
    return _unlisted(listed, np.uint32 if name == "MT19937" else np.uint64)


def _assemble_random_state(attributes: Any, _: Any) -> np.random.RandomState:
    name = attributes["bit_generator"]
    generator = np.random.RandomState(new_bit_generator(name))
    generator.set_state(_state_of_bit_generator(name, attributes))
    return generator


def _assemble_numpy_generator(attributes: Any, _: Any) -> np.random.Generator:
    name, state = attributes
    generator = np.random.Generator(new_bit_generator(name))
    generator.bit_generator.state = _state_of_bit_generator(name, state)
    return generator


GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
"""Types whose live objects take over a saved state instead of being replaced."""


def same_generator(live: Any, saved: Any) -> bool:
    """Whether `saved` is a generator whose state `live` can take over."""
    if type(live) is not type(saved):
        return False
    if isinstance(live, torch.Generator):
        return bool(live.device == saved.device)
    if isinstance(live, np.random.Generator):
        return isinstance(saved.bit_generator, type(live.bit_generator))
    if isinstance(live, np.random.RandomState):
        return bool(_state_of(live)["bit_generator"] == _state_of(saved)["bit_generator"])
    return True


def _state_of(generator: np.random.RandomState) -> Any:
    return generator.get_state(legacy=False)


def take_over(live: Any, saved: Any) -> None:
    """Give a live generator the state of a saved one; see `same_generator`."""
    if isinstance(live, np.random.Generator):
        live.bit_generator.state = saved.bit_generator.state
    elif isinstance(live, random.Random):
        live.setstate(saved.getstate())
    elif isinstance(live, np.random.RandomState):
        live.set_state(_state_of(saved))
    else:
        live.set_state(saved.get_state())


_Build = Callable[[Any, Any], Any]
_BUILDERS: dict[str, _Build] = {
    "torch.dtype": lambda name, _: dtype_of(name),
    "torch.device": lambda name, _: torch.device(name),
    "torch.layout": lambda name, _: LAYOUTS[name],
    "torch.memory_format": lambda name, _: _MEMORY_FORMATS[name],
    "torch.Size": lambda sizes, _: torch.Size(sizes),
    "torch.Generator": _assemble_generator,
    "torch.per_tensor_affine": _assemble_per_tensor,
    "torch.per_channel_affine": _assemble_per_channel,
    "numpy.ndarray": _assemble_array,
    "numpy.Generator": _assemble_numpy_generator,
    "numpy.RandomState": _assemble_random_state,
    "random.Random": _assemble_random,
    OPTIMIZER: lambda _, entries: by_position(entries),
}
