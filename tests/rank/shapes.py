"""The table of all state shapes, and docs/state-shapes.md from it: `python -m rank.shapes`."""

from __future__ import annotations

from pathlib import Path

from rank import shapes_python, shapes_tensors, shapes_training
from rank.shape import Shape

SHAPES: list[Shape] = [*shapes_tensors.SHAPES, *shapes_python.SHAPES, *shapes_training.TRAINING]

PAGE = Path(__file__).parents[2] / "docs" / "state-shapes.md"

_HEAD = """# State shapes

What can be in `state`, and what becomes of it. Every row is a test (`tests/rank/test_shapes.py`):
the state goes through a sealed slot of a host buffer, then into a fresh twin as `restore()` does,
and into new objects as `load()` does. "exact" means: the same bytes, dtypes, types, key order and
ties. "refused" means: `UnsupportedLeafError` with the path of the leaf, before anything is saved.
There is no third outcome. This page is generated: `cd tests && python -m rank.shapes`.

{exact} of {total} shapes are exact, {refused} are refused.

Aliases: a tensor that occurs twice (same memory, offset, shape, stride and dtype) is stored once
and is one tensor again after `load()`; `restore()` writes into the live tensors, so their ties stay
as they are. Views that overlap in part are stored apart, and go only into memory that can hold all
of them. A Python container that occurs twice is two containers after `load()`. One live tensor,
array, container, generator or object under two names is a mismatch where different states were
saved under them: `state["best"] = model.state_dict()` has the memory of the model, and takes no
other weights than the model (`tests/rank/test_place_aliases.py`). The order of elements in memory
(Fortran, channels last) is that of the live tensor after `restore()`, and of the parameter in
optimizer state that does not exist yet; it is row-major after `load()`.

Names: an optimizer's state is saved under the names that its parameters have in the modules of
`state`, as they are at that snapshot. Layers, parameters and groups may change places between
snapshots. A parameter that no module in `state` has is called by its position (`#3`).

With `overlap=True` a write that PyTorch does not count is not seen while a copy goes on: through
`.data`, by a CUDA graph, by a fused kernel called by hand, by a kernel outside PyTorch. Use
`overlap=False` with code that makes such writes. By default, on a GPU, only what an optimizer
changes in steps that its hooks see is overlapped, so that graphs are found.

Devices: a layout says nothing of them. What is written in place stays where it is; a new tensor
goes where the one is that it takes the place of, also in what objects are given to load; one that
takes no other's place comes back in host memory.

| area | state | outcome |
|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    refused = sum(shape.refused is not None for shape in SHAPES)
    head = _HEAD.format(exact=len(SHAPES) - refused, total=len(SHAPES), refused=refused)
    return head + "".join(_row(shape) for shape in SHAPES)


def _row(shape: Shape) -> str:
    if shape.refused is None:
        outcome = "exact, and training goes on the same" if shape.advance else "exact"
    else:
        path = shape.refused if len(shape.refused) < 40 else shape.refused[:20] + "..."
        outcome = f"refused at `{path}`".replace("|", "\\|")
    return f"| {shape.area} | {shape.name.replace('|', chr(92) + '|')} | {outcome} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
