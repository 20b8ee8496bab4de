"""Whatever is written in a slot, reading it gives the state or one of our errors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr.errors import HostBufferDamagedError, RecordDamagedError, StateMismatchError
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.staging import values as v
from ckptmgr.types import Layout, Leaf


def saved_of(*leaves: Leaf, tree: bytes = b"\x93\x17\x00\x00", size: int = 4096) -> Saved:
    return Saved(Layout(leaves, (), size, tree), b"\x90", memoryview(bytes(size)))


@pytest.mark.parametrize(
    "leaf",
    [
        Leaf("x", "float32", (3,), 0, 8),
        Leaf("x", "nosuch", (3,), 0, 12),
        Leaf("x", "float32", (-1, -3), 0, 12),
        Leaf("x", "float32", (3,), 2, 12),
        Leaf("x", "Tensor", (3,), 0, 12),
        Leaf("x", "float32", (1 << 40, 1 << 40), 0, 0),
        Leaf("x", "float32", (3,), 4092, 12),
    ],
)
def test_leaves_that_do_not_fit_their_bytes_are_refused(leaf: Leaf) -> None:
    with pytest.raises(HostBufferDamagedError):
        rebuild(saved_of(leaf))


def test_short_data_and_unknown_leaves_are_refused() -> None:
    leaf = Leaf("x", "float32", (3,), 0, 12)
    assert torch.equal(rebuild(saved_of(leaf)), torch.zeros(3))
    with pytest.raises(HostBufferDamagedError):
        rebuild(Saved(saved_of(leaf).layout, b"\x90", memoryview(b"x")))
    with pytest.raises(RecordDamagedError):
        rebuild(saved_of(leaf, tree=b"\x93\x17\x07\x00"))


PARTS = st.recursive(
    st.one_of(st.none(), st.integers(-2, 5), st.integers(-(1 << 70), 1 << 70), st.text(max_size=4),
              st.floats(), st.sampled_from(["float32", "qint8", "cpu", "cuda:0", "<f4", "<U9",
                                            "PCG64", "MT19937", "<M8[ns]", "strided"])),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
KINDS = [
    "torch.dtype", "torch.device", "torch.layout", "torch.memory_format", "torch.Size",
    "torch.Generator", "torch.sparse_coo", "torch.sparse_csr", "torch.sparse_bsc", "torch.sparse_x",
    "torch.per_tensor_affine", "torch.per_channel_affine", "numpy.ndarray", "numpy.Generator",
    "numpy.RandomState", "random.Random", "os.system",
]  # fmt: skip
CHILDREN = ("state", "indices", "values", "compressed", "plain", "int_repr", "scales",
            "zero_points", "elements")  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(KINDS),
    PARTS,
    st.sampled_from(["int64", "uint8", "float32"]),
    st.integers(0, 700),
)
def test_malformed_objects_are_damaged_records(
    kind: str, parts: Any, dtype: str, count: int
) -> None:
    tree = _encoded(kind, parts)
    leaf = Leaf("x", dtype, (count,), 0, getattr(torch, dtype).itemsize * count)
    try:
        rebuild(saved_of(leaf, tree=tree, size=8192))
    except (RecordDamagedError, StateMismatchError):
        return


def _encoded(kind: str, parts: Any) -> bytes:
    former = v.Former(lambda item, trail: None, careful=True)
    named = [part for name in CHILDREN for part in (name, [v.LEAF, 0, 0])]
    form = [v.EXTERNAL, kind, former.form(parts, None), *named]
    return msgspec.msgpack.encode(form)
