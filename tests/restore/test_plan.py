"""A plan reads exactly what is wanted: random moves against a copy that is done byte by byte."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.repository.chunk import Chunk
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.plan import Move, Plan, plan_moves, plan_whole


def manifest_of(lengths: list[int]) -> Manifest:
    """A manifest with one chunk per length, two chunks in each pack."""
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    chunks = tuple(
        Chunk(at // 2, 4096, length, start, length, 0, b"", b"")
        for at, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )
    packs = tuple((f"pack{at}", 0) for at in range((len(lengths) + 1) // 2))
    return Manifest(1, 1, "", 0, 1, "", b"", b"", packs, chunks, sum(lengths), sum(lengths), 0.0)


def carry_out(plan: Plan, source: bytes) -> bytearray:
    """What a fetch does, without a store: every chunk once, then its moves."""
    target = bytearray(b"?" * plan.target_bytes)
    seen = set()
    for read in plan.reads:
        assert read.chunk.raw_offset not in seen, "a chunk is read twice"
        seen.add(read.chunk.raw_offset)
        raw = source[read.chunk.raw_offset : read.chunk.end]
        assert read.moves
        for move in read.moves:
            assert move.source >= 0
            assert 0 < move.nbytes <= len(raw) - move.source, "a move leaves its chunk"
            target[move.target : move.target + move.nbytes] = raw[move.source :][: move.nbytes]
        assert read.direct == (
            len(read.moves) == 1 and read.moves[0].source == 0 and read.moves[0].nbytes == len(raw)
        )
    return target


lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=10)


@given(lengths=lengths_of, data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_moves_against_a_plain_copy(lengths: list[int], data: st.DataObject) -> None:
    manifest, total = manifest_of(lengths), sum(lengths)
    source = random.Random(total).randbytes(total)
    moves, expected, at = [], bytearray(), 0
    for _ in range(data.draw(st.integers(0, 8))):
        start = data.draw(st.integers(0, total))
        nbytes = data.draw(st.integers(0, total - start))
        gap = data.draw(st.integers(0, 3))
        expected += b"?" * gap + source[start : start + nbytes]
        moves.append(Move(start, at + gap, nbytes))
        at += gap + nbytes
    random.shuffle(moves)
    plan = plan_moves(manifest, moves, at)
    assert carry_out(plan, source) == expected
    wanted = {i for m in moves for i in range(m.source, m.source + m.nbytes)}
    for read in plan.reads:
        assert wanted & set(range(read.chunk.raw_offset, read.chunk.end)), "reads what nobody wants"
    order = [read.chunk.raw_offset for read in plan.reads]
    assert order == sorted(order), "not in the order of the packs"
    for read in plan.reads:
        assert read.key == f"pack{read.chunk.pack}"
    assert plan.stored_bytes == sum(read.chunk.stored_bytes for read in plan.reads)


@given(lengths=st.lists(st.integers(1, 50), max_size=10))
def test_the_whole_is_direct(lengths: list[int]) -> None:
    source = random.Random(1).randbytes(sum(lengths))
    plan = plan_whole(manifest_of(lengths))
    assert carry_out(plan, source) == source
    assert len(plan.reads) == len(lengths)
    assert all(read.direct for read in plan.reads)
