"""State shapes: dtypes, sizes, memory layouts, aliases and special tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rank.shape import Shape, State, random_bits

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex32",
    "complex64",
    "complex128",
    "int1",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "uint1",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "bits8",
    "bits16",
    "bits1x8",
    "bits2x4",
    "bits4x2",
]


def _dtype(name: str) -> Shape:
    def make(seed: int) -> State:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ComplexHalf is experimental
            return {"x": random_bits(seed, (5, 7), getattr(torch, name))}

    return Shape("dtype", name, make)


def _f32(seed: int, *shape: int) -> torch.Tensor:
    return random_bits(seed, shape, torch.float32)


def _tiny(seed: int) -> State:
    return {"x": [_f32(seed + at, 3) for at in range(2_000)]}


def _tied(seed: int) -> State:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(_f32(seed, 7, 4))
    model[1].weight = model[0].weight
    return {"model": model}


def _flat_views(seed: int) -> State:
    flat = _f32(seed, 24)
    return {"flat": flat, "a": flat[:12].view(3, 4), "b": flat[12:].view(3, 4)}


def _shared_between(seed: int) -> State:
    one = _f32(seed, 4)
    return {"a": one, "b": {"c": [one, one]}, "d": one.detach()}


def _overlapping(seed: int) -> State:
    base = _f32(seed, 10)
    return {"a": base[:7], "b": base[3:]}


def _quantized(seed: int, dtype: torch.dtype, *, per_channel: bool) -> State:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # will be replaced by torchao
        if per_channel:
            scales, zeros = torch.rand(4).double() + 0.1, torch.arange(4)
            return {"q": torch.quantize_per_channel(values, scales, zeros, 0, dtype)}
        return {"q": torch.quantize_per_tensor(values, 0.1 * seed, 3, dtype)}


def _sparse(seed: int, layout: torch.layout) -> State:
    dense = _f32(seed, 4, 6).nan_to_num() * (torch.arange(24).view(4, 6) % 3 == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta
        block = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
        return {"s": dense.to_sparse(layout=layout, blocksize=block)}


def _uncoalesced(seed: int) -> State:
    indices = torch.tensor([[0, 0, 2], [1, 1, 0]])
    return {"s": torch.sparse_coo_tensor(indices, _f32(seed, 3), (3, 2))}


class _Sub(torch.Tensor):
    pass


def _nested(layout: torch.layout) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototype
        return {
            "n": {"t": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)}
        }


def _fake(_: int) -> State:
    with FakeTensorMode():
        return {"x": torch.ones(2)}


def _packed(_: int) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args: Any = (torch.randn(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint4x2)
        return {"q": torch.quantize_per_channel(*args)}


def _freed(_: int) -> State:
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    return {"x": gone}


def _complex(seed: int) -> torch.Tensor:
    return random_bits(seed, (4, 3), torch.complex64)


SHAPES = [
    *map(_dtype, DTYPES),
    Shape("size", "no dimensions", lambda s: {"x": _f32(s)}),
    Shape("size", "one element", lambda s: {"x": _f32(s, 1)}),
    Shape("size", "empty", lambda s: {"x": _f32(s, 0)}),
    Shape("size", "zero in the middle", lambda s: {"x": _f32(s, 3, 0, 5), "y": _f32(s, 0)}),
    Shape("size", "64 dimensions", lambda s: {"x": _f32(s, *[1] * 62, 2, 3)}),
    Shape("size", "65 dimensions", lambda s: {"x": _f32(s, *[1] * 65)}, refused="x"),
    Shape("size", "2,000 tiny tensors", _tiny),
    Shape("size", "larger than a chunk", lambda s: {"x": _f32(s, 1_500_000)}),
    Shape("memory", "transposed", lambda s: {"x": _f32(s, 4, 6).t()}),
    Shape("memory", "strided slice", lambda s: {"x": _f32(s, 20, 6)[3:17:5, ::2]}),
    Shape("memory", "strided slice of float8", lambda s: {
        "x": random_bits(s, (9, 6), torch.float8_e4m3fn)[::2, 1:5:3]
    }),
    Shape("memory", "conjugate view", lambda s: {"x": _complex(s).conj()}),
    Shape("memory", "conjugate view of complex32", lambda s: {
        "x": random_bits(s, (4, 3), torch.complex32).conj()
    }),
    Shape("memory", "negative view", lambda s: {"x": _complex(s).conj().imag}),
    Shape("memory", "expanded (stride 0)", lambda s: {"x": _f32(s, 3, 1).expand(3, 50)}),
    Shape("memory", "channels last", lambda s: {
        "x": _f32(s, 2, 3, 4, 5).to(memory_format=torch.channels_last)
    }),
    Shape("memory", "channels last 3d", lambda s: {
        "x": _f32(s, 2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d)
    }),
    Shape("memory", "small part of a big base", lambda s: {"x": _f32(s, 300_000)[9:12]}),
    Shape("alias", "tied weights", _tied),
    Shape("alias", "views into one flat buffer", _flat_views),
    Shape("alias", "one tensor under three names", _shared_between),
    Shape("alias", "partial overlap", _overlapping),
    Shape("special", "Parameter", lambda s: {"x": nn.Parameter(_f32(s, 3))}),
    Shape("special", "frozen Parameter", lambda s: {
        "x": nn.Parameter(_f32(s, 3), requires_grad=False)
    }),
    Shape("special", "requires_grad", lambda s: {"x": _f32(s, 3).requires_grad_()}),
    Shape("special", "Buffer", lambda s: {"x": nn.Buffer(_f32(s, 3))}),
    Shape("special", "sparse COO", lambda s: _sparse(s, torch.sparse_coo)),
    Shape("special", "sparse COO, not coalesced", _uncoalesced),
    Shape("special", "sparse CSR", lambda s: _sparse(s, torch.sparse_csr)),
    Shape("special", "sparse CSC", lambda s: _sparse(s, torch.sparse_csc)),
    Shape("special", "sparse BSR", lambda s: _sparse(s, torch.sparse_bsr)),
    Shape("special", "sparse BSC", lambda s: _sparse(s, torch.sparse_bsc)),
    *(
        Shape("special", f"{name}, per {'channel' if by else 'tensor'}",
              lambda s, name=name, by=by: _quantized(s, getattr(torch, name), per_channel=by))
        for name in ("qint8", "quint8", "qint32")
        for by in (False, True)
    ),
    Shape("special", "quantized, packed", _packed, refused="q"),
    Shape("special", "meta", lambda s: {"m": {"x": torch.empty(3, device="meta")}}, refused="m/x"),
    Shape("special", "fake", _fake, refused="x"),
    Shape("special", "uninitialised parameter", lambda s: {"m": nn.LazyLinear(3)},
          refused="m/weight"),
    Shape("special", "nested (jagged)", lambda s: _nested(torch.jagged), refused="n/t"),
    Shape("special", "nested (strided)", lambda s: _nested(torch.strided), refused="n/t"),
    Shape("special", "unknown tensor subclass", lambda s: {"x": [torch.ones(2).as_subclass(_Sub)]},
          refused="x/0"),
    Shape("special", "mkldnn", lambda s: {"x": torch.ones(3).to_mkldnn()}, refused="x"),
    Shape("special", "freed storage", _freed, refused="x"),
    Shape("special", "storage", lambda s: {"x": torch.ones(3).untyped_storage()}, refused="x"),
    Shape("special", "tensor in a set", lambda s: {"x": {torch.ones(3)}}, refused="x/0"),
    *(
        Shape("numpy", f"array of {dtype}",
              lambda s, dtype=dtype: {
                  "x": np.frombuffer(np.random.RandomState(s).bytes(96), dtype).copy()
              })
        for dtype in ("f2", "f4", "f8", "g", "c8", "c16", "i1", "i2", "i4", "i8", "u2", "u4", "u8",
                      ">f4", ">i8", "M8[ns]", "m8[s]", "S4")
    ),
    Shape("numpy", "array of str", lambda s: {"x": np.array(["a", "bcd", str(s)], "U3")}),
    Shape("numpy", "array of bool", lambda s: {"x": np.arange(s, s + 9) % 2 == 0}),
    Shape("numpy", "no dimensions", lambda s: {"x": np.array(0.1 * s)}),
    Shape("numpy", "empty", lambda s: {"x": np.empty((2, 0, 3), "M8[s]")}),
    Shape("numpy", "Fortran order", lambda s: {"x": np.asfortranarray(np.ones((3, 4)) * s)}),
    Shape("numpy", "negative stride", lambda s: {"x": (np.arange(9.0) * s)[::-2]}),
    Shape("numpy", "read-only", lambda s: {"x": np.frombuffer(bytes([s] * 8), "u1")}),
    Shape("numpy", "scalars", lambda s: {
        "x": [np.float32(0.1 * s), np.int8(s), np.bool_(s % 2), np.complex64(1j * s),
              np.datetime64(s, "ns"), np.timedelta64(s, "s"), np.str_("a\0"), np.bytes_(b"b\0")]
    }),
    Shape("numpy", "object array", lambda s: {"x": np.array([None, {}], object)}, refused="x"),
    Shape("numpy", "structured array", lambda s: {"x": np.zeros(3, "i4,f4")}, refused="x"),
    Shape("numpy", "structured scalar", lambda s: {"x": np.zeros(3, "i4,f4")[0]}, refused="x"),
    Shape("numpy", "masked array", lambda s: {"x": np.ma.array([1.0], mask=[True])}, refused="x"),
]  # fmt: skip
