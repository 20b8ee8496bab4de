"""Files as what a snapshot is read from: in pieces of one chunk, and all of them twice."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from ckptmgr.errors import TornSnapshotError
from ckptmgr.repository.chunk import Cut, cut, hash_of
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.restore.adopted import CONTENT, DTYPE, KIND, SOURCE, STAT
from ckptmgr.staging.hostbuffer import Table, round_up
from ckptmgr.staging.layout import encode_layout
from ckptmgr.staging.tree import Leaf as TreeLeaf
from ckptmgr.staging.tree import Seams, encode_tree, flatten
from ckptmgr.staging.values import encode_values
from ckptmgr.store.base import Store
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf, Snapshot, StepId, Tags
from ckptmgr.watch.found import Candidate, Entry, opened_file, opened_root, scan_one

_SEAMS = Seams(
    leaf_types=frozenset({TreeLeaf}),
    is_leaf=lambda _: True,
    expands=lambda _: False,
    expand=lambda item: item,
    externalize=lambda _item, _trail: None,
)


def layout_of(files: Iterable[Entry]) -> Layout:
    """One leaf and, where it is not empty, one group for each file, so that no chunk has two."""
    leaves, groups, at = [], [], 0
    for one in files:
        leaves.append(Leaf(one.path, DTYPE, (one.size,), at, one.size))
        nbytes = round_up(one.size, PAGE_BYTES)
        if nbytes:
            groups.append(Group(at, nbytes, 1, is_float=False))
        at += nbytes
    flat = flatten({leaf.path: TreeLeaf() for leaf in leaves} or None, _SEAMS)
    tree = encode_tree(flat, [(index, 0) for index in range(len(leaves))], _SEAMS.externalize)
    return Layout(tuple(leaves), tuple(groups), at, tree)


class Pieces:
    """The bytes of a candidate's files in chunks, never of a file that is not as it was found."""

    def __init__(self, root: Path, candidate: Candidate) -> None:
        self.root, self.candidate = root, candidate
        self.layout = layout_of(candidate.files)
        self._files = [one for one in candidate.files if one.size]
        self._starts = [group.offset for group in self.layout.groups]

    def read(self, one: Cut) -> memoryview:
        """A piece of a file, and zeros behind its end.

        Raises:
            TornSnapshotError: the file is not as it was found.
        """
        index = bisect_right(self._starts, one.offset) - 1
        entry, offset = self._files[index], one.offset - self._starts[index]
        room = memoryview(bytearray(one.nbytes))
        wanted = room[: min(one.nbytes, entry.size - offset)]
        try:
            with opened_root(self.root) as root, opened_file(root, entry.path) as descriptor:
                if Entry.of(entry.path, os.fstat(descriptor)) != entry:
                    raise TornSnapshotError("changed while it was read", subject=entry.path)
                while wanted:
                    count = os.preadv(descriptor, [wanted], offset)
                    if not count:
                        raise TornSnapshotError("was cut while it was read", subject=entry.path)
                    wanted, offset = wanted[count:], offset + count
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TornSnapshotError("vanished while it was read", subject=entry.path) from error
        return room

    def look(self) -> None:
        """Raise TornSnapshotError if anything is not as it was found."""
        if scan_one(self.root, self.candidate.name) != self.candidate:
            raise TornSnapshotError("changed while it was read", subject=self.candidate.name)

    def digest(self, hashes: Mapping[int, bytes]) -> str:
        """Of all paths, lengths and bytes; `hashes` are those of the chunks, by their offsets."""
        state = blake2b(digest_size=16)
        for one in self.candidate.files:
            state.update(f"{one.path}\0{one.size}\0".encode())
        for piece in cut(self.layout.groups):
            state.update(hashes[piece.offset])
        return state.hexdigest()


def content_of(root: Path, candidate: Candidate) -> str:
    """The digest of a candidate's bytes, as it is kept with an adopted step.

    Raises:
        TornSnapshotError: it is not as it was found.
    """
    pieces = Pieces(root, candidate)
    return pieces.digest(
        {one.offset: hash_of(pieces.read(one)) for one in cut(pieces.layout.groups)}
    )


class FilesOrigin:
    """The files of a candidate as what a snapshot is read from: `Origin` of the pipeline.

    Each file is looked at when it is opened; at the end everything is looked at, and read, again.
    """

    in_place = False

    def __init__(
        self,
        pieces: Pieces,
        snapshot: Snapshot,
        store: Store,
        host: str,
        said: Tags,
        keyring: Keyring = NO_KEYS,
    ) -> None:
        self.snapshot, self.store, self.host, self.keyring = snapshot, store, host, keyring
        candidate = pieces.candidate
        self._pieces = pieces
        self._hashes: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._tags: Tags = {
            **said,
            SOURCE: candidate.name,
            KIND: candidate.kind.value,
            STAT: candidate.digest,
        }

    @property
    def subject(self) -> str:
        """As `Origin.subject`."""
        return self._pieces.candidate.name

    def table(self) -> Table:
        """As `Origin.table`."""
        layout = encode_layout(self._pieces.layout)
        return Table(layout, encode_values([], _SEAMS.externalize), self._tags)

    def raw(self, one: Cut) -> memoryview:
        """As `Origin.raw`."""
        read = self._pieces.read(one)
        with self._lock:
            self._hashes[one.offset] = hash_of(read)
        return read

    def check_unchanged(self) -> None:
        """As `Origin.check_unchanged`."""
        self._pieces.look()
        for one in cut(self._pieces.layout.groups):
            if hash_of(self._pieces.read(one)) != self._hashes.get(one.offset):
                raise TornSnapshotError("changed while it was read", subject=self.subject)
        self._pieces.look()
        self._tags[CONTENT] = self._pieces.digest(self._hashes)


def snapshot_of(candidate: Candidate, step: StepId, nonce: str) -> Snapshot:
    """What the pipeline is told of a candidate; it was sealed when its newest file was written."""
    nbytes = sum(round_up(one.size, PAGE_BYTES) for one in candidate.files)
    sealed_at = candidate.newest_ns / 1e9
    return Snapshot(0, 0, step.attempt, nonce, 0, 1, step.step, 0, 0, nbytes, sealed_at, 0.0)
