"""What the commands say of a damaged store, on files, with their exit codes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from called import call
from ckptmgr.errors import CkptmgrError, DamageError
from ckptmgr.repository import keys
from ckptmgr.types import PAGE_BYTES
from crash.damaged import KINDS, Rig
from small_step import (
    same_bits,
    write_tree,
)

pytestmark = pytest.mark.reliability


def ckptmgr(*arguments: str) -> tuple[int, Any, str]:
    done = call(*arguments, "--json")
    try:
        document = done.document
    except ValueError:
        document = None
    return done.status, document, done.err


def test_the_commands_say_it_with_their_exit_codes(rig: Rig, tmp_path: Path) -> None:
    """A flipped bit of each kind of object, in files, through the real command line."""
    url = write_tree(tmp_path / "store", rig.objects)
    assert ckptmgr("verify", url, "--all")[0] == 0
    newest, older = str(rig.newest.id), str(rig.saved[0].id)
    for number, kind in enumerate(KINDS):
        key = rig.keys_of(kind)[-1] if kind in ("manifests", "packs") else rig.keys_of(kind)[0]
        key = keys.commit(rig.newest.id) if kind == "registers" else key
        at = PAGE_BYTES + 5 if kind == "packs" else random.randrange(len(rig.objects[key]))
        path = tmp_path / "store" / key
        damaged = bytearray(rig.objects[key])
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)

        status, reports, errors = ckptmgr("verify", url, "--all")
        assert status == 3, f"{key}: {reports} {errors}"
        named = errors if reports is None else json.dumps(reports)
        assert key in named

        to = tmp_path / f"restored{number}"
        status, document, errors = ckptmgr("restore", url, "--to", str(to))
        if kind == "format":
            assert status == 3
            assert "format" in errors
            assert not to.exists()
        elif kind in ("attempts", "marks"):
            assert (status, document["id"]) == (0, newest)
            assert same_bits(to, rig.newest)
        else:
            assert (status, document["id"]) == (7, older), f"{key}: {document} {errors}"
            assert document["skipped"][0]["id"] == newest
            assert same_bits(to, rig.saved[0])
        path.write_bytes(rig.objects[key])


def test_the_other_reading_commands_tell_damage_too(rig: Rig, tmp_path: Path) -> None:
    url = write_tree(tmp_path / "store", rig.objects)
    register = tmp_path / "store" / keys.commit(rig.newest.id)
    register.write_bytes(register.read_bytes()[:-1])

    status, entries, _ = ckptmgr("ls", url)
    assert status == 0, "a damaged step hides the others"
    assert {entry["id"]: bool(entry["damage"]) for entry in entries} == {
        "1.30": True,
        "1.25": False,
        "1.20": False,
        "1.10": False,
    }
    assert ckptmgr("show", url)[0] == ckptmgr("show", url, "1.30")[0] == 3
    assert ckptmgr("show", url, "1.20")[0] == 0
    assert ckptmgr("verify", url)[0] == 3
    assert ckptmgr("verify", url, "1.20")[0] == 0
    out = tmp_path / "out"
    status, _, errors = ckptmgr("restore", url, "1.30", "--to", str(out))
    assert (status, out.exists()) == (3, False)
    assert str(keys.commit(rig.newest.id)) in errors


def test_no_command_leaves_files_when_no_step_holds(rig: Rig, tmp_path: Path) -> None:
    url = write_tree(tmp_path / "store", rig.objects)
    for key in rig.keys_of("manifests"):
        (tmp_path / "store" / key).unlink()
    status, _, errors = ckptmgr("restore", url, "--to", str(tmp_path / "out"))
    assert status == 3
    assert "is gone" in errors
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert isinstance(DamageError("x"), CkptmgrError)
