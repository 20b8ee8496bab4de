"""From every number of ranks and parallelism into every other: the same bits, and few bytes read.

Two process groups of each size: one saves all its layouts, the other takes all saves into them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_forked
from scale import FULL, scaled

KINDS = ("ddp", "fsdp2", "tp")
ALL = ["one-1", *(f"{kind}-{world}" for world in (2, 3, 4, 8) for kind in KINDS)]
SAMPLE = [one for one in ALL if one[-1] in "12" or one == "fsdp2-3"]
RATIO_MAX = 1.1


@pytest.mark.reliability
@pytest.mark.timeout(scaled(600, 1800))
def test_every_layout_is_read_under_every_other(tmp_path: Path) -> None:
    layouts = ALL if FULL else SAMPLE
    (tmp_path / "layouts.json").write_text(json.dumps(layouts))
    worlds = sorted({int(layout.split("-")[1]) for layout in layouts})
    groups = [(phase, world) for phase in ("save", "restore") for world in worlds]
    told = run_forked("rank.matrix", groups, tmp_path, seconds_max=1700)
    for digests in told[: len(worlds)]:
        assert all(one == digests[0] for one in digests), "the truth is the same on each rank"
    restored = [one for ranks in told[len(worlds) :] for rank in ranks for one in rank]
    pairs = {(one["before"], one["layout"]) for one in restored}
    assert len(pairs) == len(layouts) ** 2
    assert [one for one in restored if one["wrong"]] == []
    counts = {
        "pairs": len(pairs),
        "restores by a rank": len(restored),
        "tensors": sum(one["tensors"] for one in restored),
        "most of a large tensor": max(one["large"] for one in restored),
        "most of all": max(one["asked"] / one["held"] for one in restored),
    }
    print(json.dumps(counts))
    for one in restored:
        assert max(one["large"], one["asked"] / one["held"]) <= RATIO_MAX, one
