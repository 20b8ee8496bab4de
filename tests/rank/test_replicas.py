"""What is the same on all ranks is shared out, and nothing that may differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import run_ranks

WEIGHT, MOMENTUM = "m/weight", "o/state/weight/momentum_buffer"
ALIKE = ("no hook", "allreduce", "fp16", "bf16", "wrapped")
APART = ("among some", "wrapped, among some", "somebody's hook", "local SGD", "wrapped local SGD")
EXPECTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ALIKE, (WEIGHT, MOMENTUM)),
    **dict.fromkeys(APART, ()),
    "averaged": (),
    "somebody's optimizer": (WEIGHT,),
    "somebody's optimizer, known": (WEIGHT, MOMENTUM),
    "before a hook": (WEIGHT, MOMENTUM),
    "after it": (),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What two ranks share out, by case."""
    one, other = run_ranks("rank.drifting", "two", 2, tmp_path_factory.mktemp("drifting"))
    assert one == other
    return dict(one)


@pytest.mark.parametrize("case", EXPECTED)
def test_only_what_is_known_to_be_alike_is_shared_out(
    found: dict[str, list[str]], case: str
) -> None:
    assert found.keys() == EXPECTED.keys()
    assert tuple(found[case]) == EXPECTED[case]


def test_of_modules_that_some_ranks_share_out_no_two_have_one_path(tmp_path: Path) -> None:
    """As the halves of a tensor that was cut by hand, they may be different tensors."""
    both = ["both/m/weight", "both/o/state/weight/momentum_buffer"]
    for rank, found in enumerate(run_ranks("rank.drifting", "four", 4, tmp_path)):
        stage = f"stage{rank % 2}/weight"
        assert found["before"] == [*both, "o/state/weight/momentum_buffer", "one/weight", stage]
        assert found["after"] == [*both, stage]
        assert found["later"] == found["after"], "of which nobody could be asked"
