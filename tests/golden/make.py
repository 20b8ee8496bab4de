"""Write the bytes of this format version, once: `PYTHONPATH=.:tests python tests/golden/make.py`.

What a released version wrote must stay readable for ever, so an existing directory is never
written again. `expected.json` holds what was saved, as hashes that share no code with ckptmgr.
`encrypted/` is a store with an encrypted and signed step; its keys are for everybody to see.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import keyring_of
from ckptmgr.repository.record import VERSION
from ckptmgr.repository.signature import parse_signer
from ckptmgr.staging.hostbuffer import Capacity, HostBuffer
from ckptmgr.store.base import Store
from ckptmgr.types import Binding, Outcome
from small_step import (
    SavedStep,
    arrays_of,
    encode_state,
    fill_slot,
    made_in_memory,
    save_every_kind,
    save_steps,
    small_state,
    smallest_state,
    write_tree,
)

HERE = Path(__file__).parent
BUFFER_URL = "file:///golden/store"
BUFFER_STEPS = (50, 60)
KEY_SECRET, SIGN_SECRET = bytes(range(32)), bytes(range(32, 64))


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


def make_encrypted(target: Path) -> None:
    """Two steps, encrypted and signed with keys that are in `expected.json`."""
    target.mkdir()
    private = Ed25519PrivateKey.from_private_bytes(SIGN_SECRET)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    signer = parse_signer(pem, subject="golden")
    keyring = replace(keyring_of(Key.of(KEY_SECRET)), signer=signer)

    async def make(store: Store) -> list[SavedStep]:
        return await save_steps(store, state=smallest_state, steps=(10, 30), keyring=keyring)

    saved, objects = made_in_memory(make)
    write_tree(target / "store", objects)
    states = {str(one.id): smallest_state(one.id.step) for one in saved}
    leaves = {name: described(arrays_of(state)) for name, state in states.items()}
    public = private.public_key().public_bytes_raw().hex()
    expected = {"key": KEY_SECRET.hex(), "public": public, "leaves": leaves}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    """Make what is not there yet."""
    target, encrypted = HERE / f"v{VERSION}", HERE / "encrypted"
    if target.exists() and encrypted.exists():
        sys.exit(f"{target} exists; written bytes of a version never change")
    if not encrypted.exists():
        make_encrypted(encrypted)
    if not target.exists():
        make_clear(target)


def make_clear(target: Path) -> None:
    """The directory of this version."""
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
