"""What a saved object will be once its bytes are there: enough to compare it with a live one."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from ckptmgr.errors import RecordDamagedError
from ckptmgr.rank.externals import LAYOUTS
from ckptmgr.rank.parts import FlatRun
from ckptmgr.rank.regions import SavedLeaf
from ckptmgr.rank.tensors import dtype_of
from ckptmgr.staging.values import External


class Outline(msgspec.Struct, frozen=True):
    """Shape, layout and dtype of a whole tensor, over all processes."""

    shape: tuple[int, ...]
    layout: torch.layout
    dtype: torch.dtype

    def difference(self, item: Any) -> str:
        """How a live tensor differs, or an empty string."""
        live = item.tensor if type(item) is FlatRun else item
        if self.shape != item.shape:
            return f"has shape {list(item.shape)}, but {list(self.shape)} was saved"
        if self.layout != live.layout:
            return f"is {live.layout}, but {self.layout} was saved"
        if self.dtype != live.dtype:
            return f"is {live.dtype}, but {self.dtype} was saved"
        return ""


def outline_of_leaf(saved: SavedLeaf) -> Outline:
    """Of a saved tensor that is plain elements."""
    return Outline(saved.shape, torch.strided, saved.dtype)


def outline(saved: Any) -> Outline | None:
    """Of a saved tensor of any layout; None if it is no tensor.

    Raises:
        RecordDamagedError: it is one that does not hold together.
    """
    if type(saved) is SavedLeaf:
        return outline_of_leaf(saved)
    if type(saved) is not External:
        return None
    try:
        return _of_parts(saved)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RecordDamagedError(f"holds a malformed {saved.kind}: {error}") from error


def _of_parts(saved: External) -> Outline | None:
    kind = saved.kind.removeprefix("torch.")
    if kind.startswith("sparse_"):
        return Outline(
            torch.Size(saved.attributes[0]), LAYOUTS[kind], saved.children["values"].dtype
        )
    if kind.endswith("_affine"):
        shape = saved.children["int_repr"].shape
        return Outline(shape, torch.strided, dtype_of(saved.attributes[-1]))
    return None


def array_outline(saved: Any) -> tuple[str, list[int]] | None:
    """Dtype string and shape of a saved NumPy array; None if it is none."""
    if type(saved) is not External or saved.kind != "numpy.ndarray":
        return None
    try:
        dtype, shape = saved.attributes
        return str(dtype), [int(size) for size in shape]
    except (TypeError, ValueError) as error:
        raise RecordDamagedError(f"holds a malformed array: {error}") from error


def kind_of(saved: Any) -> str:
    """What a person calls it."""
    if type(saved) is External:
        return "optimizer" if saved.kind == "torch.optim" else saved.kind.rpartition(".")[2]
    return "tensor" if type(saved) is SavedLeaf else type(saved).__name__
