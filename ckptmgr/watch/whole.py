"""Whether a candidate is whole, by what its writer leaves last. Nothing is unpickled: of a file
only its outermost form is read, which shows where it must end.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckptmgr.types import Tags
from ckptmgr.watch.found import (
    METADATA,
    TRAINER_STATE,
    Candidate,
    Entry,
    Kind,
    opened_file,
    opened_root,
)

STATE_BYTES_MAX = 64 << 20
"""Longest trainer_state.json and index that are read; ten thousand logged steps are 2 MiB."""

HEADER_BYTES_MAX = 100 << 20
"""Longest header of a safetensors file, by its own specification."""

TAGS_MAX, TAG_CHARS_MAX = 32, 64
"""What is taken over of the numbers that a Trainer logged."""

_END_OF_ZIP = struct.Struct("<4s4H2LH")
_END_OF_ZIP64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
_ZIP64 = 0xFFFFFFFF
_LAST_OF_RANKS = "rng_state_"
"""Files that other ranks of a Trainer may write after rank 0 has written its state."""


def flaw_of(root: int, candidate: Candidate) -> str:
    """Why a candidate is not whole; nothing where it is.

    Raises:
        OSError: a file of it is gone, or can not be read.
    """
    if candidate.refusal:
        return candidate.refusal
    if not candidate.files:
        return "has no files yet"
    return _of_kind[candidate.kind](root, candidate)


def _of_file(root: int, candidate: Candidate) -> str:
    return _flaw_of_form(root, candidate.files[0], strict=True)


def _of_trainer(root: int, candidate: Candidate) -> str:
    """The Trainer writes trainer_state.json after all else. It may write over a checkpoint of the
    same step, and be killed amid that: then this file is older than others.
    """
    state = _own(candidate, TRAINER_STATE)
    if state is None:
        return f"has no {TRAINER_STATE} yet"
    with opened_file(root, state.path) as descriptor:
        if _read(descriptor, max(state.size - 2, 0), 2) != b"}\n":
            return f"has a {TRAINER_STATE} that is cut short"
    document = _json(root, state)
    if not isinstance(document, dict) or document.get("global_step") != candidate.number:
        return f"has a {TRAINER_STATE} that is of another step"
    others = (one for one in candidate.files if not one.name.startswith(_LAST_OF_RANKS))
    return (
        _later(state, others)
        or _lost(candidate)
        or _of_parts(candidate)
        or _of_indexes(root, candidate)
        or next(filter(None, (_flaw_of_form(root, one) for one in candidate.files)), "")
    )


def _of_dcp(root: int, candidate: Candidate) -> str:
    """DCP renames .metadata into its place after all ranks have written."""
    end = _own(candidate, METADATA)
    if end is None:
        return f"has no {METADATA} yet"
    shards = (one for one in candidate.files if one.name.endswith(".distcp"))
    with opened_file(root, end.path) as descriptor:
        # A pickle ends with a stop; that is all that is read of it.
        if os.pread(descriptor, 1, max(end.size - 1, 0)) != b".":
            return f"has a {METADATA} that is cut short"
    return _later(end, shards) or _lost(candidate) or _of_parts(candidate)


_of_kind: dict[Kind, Callable[[int, Candidate], str]] = {
    Kind.FILE: _of_file,
    Kind.TRAINER: _of_trainer,
    Kind.DCP: _of_dcp,
}


def _own(candidate: Candidate, name: str) -> Entry | None:
    path = f"{candidate.name}/{name}"
    return next((one for one in candidate.files if one.path == path), None)


def _later(end: Entry, others: Iterable[Entry]) -> str:
    """What was written after the file that is written last: it is of a save before this one."""
    for one in others:
        if one.mtime_ns > end.mtime_ns:
            return f"is being written again: {one.path} is newer than {end.name}"
    return ""


def _lost(candidate: Candidate) -> str:
    """A directory whose names changed after its files were written has lost one: it is being
    deleted, or whoever deleted it was killed.
    """
    newest = max(max(one.mtime_ns, one.ctime_ns) for one in candidate.files)
    for directory in candidate.directories:
        if directory.mtime_ns > newest:
            return f"has lost a file: {directory.path} changed after its files were written"
    return ""


def _of_parts(candidate: Candidate) -> str:
    """A directory of DCP inside of another must have its end, too."""
    names = {one.path for one in candidate.files}
    for one in candidate.files:
        parent = one.path.rsplit("/", 1)[0]
        if one.name.endswith(".distcp") and f"{parent}/{METADATA}" not in names:
            return f"has no {parent}/{METADATA} yet"
    return ""


def _of_indexes(root: int, candidate: Candidate) -> str:
    """What an index of shards names must be there."""
    names = {one.path for one in candidate.files}
    for one in candidate.files:
        if not one.name.endswith(".index.json"):
            continue
        document = _json(root, one)
        shards = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(shards, dict):
            return f"has a {one.name} that is cut short"
        parent = one.path.rsplit("/", 1)[0]
        missing = sorted({f"{parent}/{shard}" for shard in shards.values()} - names)
        if missing:
            return f"has no {missing[0]} yet"
    return ""


def _json(root: int, entry: Entry) -> Any:
    """The document in a file; None where it is none, or is cut short."""
    if entry.size > STATE_BYTES_MAX:
        return None
    with opened_file(root, entry.path) as descriptor:
        text = _read(descriptor, 0, entry.size)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read(descriptor: int, offset: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = os.pread(descriptor, length - len(found), offset + len(found))
        if not piece:
            break
        found += piece
    return bytes(found)


# -- forms ----------------------------------------------------------------------------------------


def _flaw_of_form(root: int, entry: Entry, *, strict: bool = False) -> str:
    """Why a file does not end where its own form says; `strict` refuses forms that do not say."""
    if entry.name.endswith(".safetensors"):
        with opened_file(root, entry.path) as descriptor:
            whole = _ends_as_safetensors(descriptor, entry.size)
    elif entry.name.endswith((".pt", ".pth", ".ckpt", ".bin")):
        with opened_file(root, entry.path) as descriptor:
            if _read(descriptor, 0, 2) != b"PK":
                if entry.size and not strict:
                    return ""
                return f"{entry.path} is not a zip as torch.save writes it: its end can not be told"
            whole = _ends_as_zip(descriptor, entry.size)
    else:
        return ""
    return "" if whole else f"{entry.path} is cut short"


def _ends_as_safetensors(descriptor: int, size: int) -> bool:
    length = int.from_bytes(_read(descriptor, 0, 8), "little")
    if size < 8 or length > min(HEADER_BYTES_MAX, size - 8):
        return False
    try:
        header = json.loads(_read(descriptor, 8, length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        return bool(8 + length + max(ends, default=0) == size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False


def _ends_as_zip(descriptor: int, size: int) -> bool:
    """Whether the directory of a zip, which is written last, ends the file and lies in it."""
    end_at = size - _END_OF_ZIP.size
    if end_at < 0:
        return False
    end = _END_OF_ZIP.unpack(_read(descriptor, end_at, _END_OF_ZIP.size))
    if end[0] != b"PK\5\6" or end[7]:
        return False
    length, start = end[5], end[6]
    if _ZIP64 in (length, start):
        end_at -= _LOCATOR_BYTES + _END_OF_ZIP64.size
        if end_at < 0:
            return False
        large = _END_OF_ZIP64.unpack(_read(descriptor, end_at, _END_OF_ZIP64.size))
        if large[0] != b"PK\6\6":
            return False
        length, start = large[8], large[9]
    return bool(start + length == end_at) or _has_zip64(descriptor, start + length, end_at)


def _has_zip64(descriptor: int, directory_ends: int, end_at: int) -> bool:
    """PyTorch writes the long form of the end, too, where the short one would do."""
    extra = end_at - directory_ends
    if extra != _END_OF_ZIP64.size + _LOCATOR_BYTES:
        return False
    return _read(descriptor, directory_ends, 4) == b"PK\6\6"


# -- what a Trainer says of its step --------------------------------------------------------------


def said_of(root: Path, candidate: Candidate) -> Tags:
    """Numbers that a Trainer logged at this step (loss, grad_norm, eval_loss, ...), as tags."""
    entry = _own(candidate, TRAINER_STATE)
    if candidate.kind is not Kind.TRAINER or entry is None:
        return {}
    with opened_root(root) as descriptor:
        document = _json(descriptor, entry)
    history = document.get("log_history") if isinstance(document, dict) else None
    tags: Tags = {}
    for logged in history if isinstance(history, list) else ():
        if isinstance(logged, dict) and logged.get("step") == candidate.number:
            tags |= {name: _plain(value) for name, value in logged.items() if _is_said(name, value)}
    return dict(list(tags.items())[:TAGS_MAX])


def _is_said(name: str, value: Any) -> bool:
    known = type(value) is float or (type(value) is int and abs(value) < 1 << 63)
    return known and name != "step" and name.isprintable() and len(name) <= TAG_CHARS_MAX


def _plain(value: float) -> float | str:
    """As the tags of a training loop: JSON has no nan."""
    return value if math.isfinite(value) else str(value)
