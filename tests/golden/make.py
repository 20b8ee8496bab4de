"""Write the bytes of this format version, once: `PYTHONPATH=.:tests python tests/golden/make.py`.

What a released version wrote must stay readable for ever, so an existing directory is never
written again. `expected.json` holds what was saved, as hashes that share no code with ckptmgr.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from ckptmgr.repository.record import VERSION
from ckptmgr.staging.hostbuffer import Capacity, HostBuffer
from ckptmgr.types import Binding, Outcome
from small_step import (
    arrays_of,
    encode_state,
    fill_slot,
    made_in_memory,
    save_every_kind,
    small_state,
    write_tree,
)

HERE = Path(__file__).parent
BUFFER_URL = "file:///golden/store"
BUFFER_STEPS = (50, 60)


def described(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """Dtype, shape and SHA-256 of the bits of every leaf."""
    return {
        path: [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        for path, array in arrays.items()
    }


def make_buffer(directory: Path) -> None:
    """A host buffer with a committed and an undecided snapshot."""
    first, second = (encode_state(small_state(step)) for step in BUFFER_STEPS)
    directory.mkdir()
    capacity = Capacity(2, 8192, len(first.data))
    binding = Binding(BUFFER_URL, 0, 1, "planes", 2)
    with HostBuffer.create(directory, binding, capacity) as buffer:
        done = fill_slot(buffer, 0, first, attempt=3, nonce="5a" * 16, step=BUFFER_STEPS[0])
        buffer.settle(done.slot, done.generation, Outcome.COMMITTED)
        fill_slot(buffer, 1, second, attempt=3, nonce="5a" * 16, step=BUFFER_STEPS[1])


def main() -> None:
    """Make the directory of this version."""
    target = HERE / f"v{VERSION}"
    if target.exists():
        sys.exit(f"{target} exists; written bytes of a version never change")
    target.mkdir()
    saved, objects = made_in_memory(save_every_kind)
    write_tree(target / "store", objects)
    make_buffer(target / "buffers")
    states = {str(one.id): small_state(one.id.step) for one in saved}
    states |= {f"buffer.{step}": small_state(step) for step in BUFFER_STEPS}
    expected = {
        name: {
            "leaves": described(arrays_of(state)),
            "values": {"step": state["step"], "note": state["note"]},
        }
        for name, state in states.items()
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
