"""Paced copies are the same bytes, no faster than the limit, and never keep training waiting."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ckptmgr.bucket import Bucket
from ckptmgr.rank import pieces as module
from ckptmgr.rank.capture import Capture
from ckptmgr.rank.pieces import paced, pieces, shares

SHAPES = [(), (1,), (5000,), (7, 911), (911, 7), (3, 5, 70), (1, 1, 4000), (0, 3), (64, 64)]


def some_pairs(seed: int) -> list[tuple[Tensor, Tensor]]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sources = [torch.randn(rng.choice(SHAPES)) for _ in range(12)]
    sources += [torch.randn(40, 60).t(), torch.randn(80, 80)[::2, 1:], torch.ones(1).expand(3000)]
    sources.append(torch.randn(50, 50, requires_grad=True))
    return [(torch.zeros(source.shape), source) for source in sources]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [4, 100, 4096, 1 << 20])
def test_pieces_are_small_and_are_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, seed: int, limit: int
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", limit)
    pairs = some_pairs(seed)
    versions = [source._version for _, source in pairs]
    total = 0
    for piece in pieces(pairs):
        size = sum(source.nbytes for _, source in piece)
        assert size <= limit
        total += size
        with torch.no_grad():
            for target, source in piece:
                target.copy_(source)
    assert total == sum(source.nbytes for _, source in pairs)
    assert all(torch.equal(target, source) for target, source in pairs)
    assert [source._version for _, source in pairs] == versions, "a piece counted as a write"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_alike_and_are_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    pairs = some_pairs(seed)
    total = sum(source.nbytes for _, source in pairs)
    found = shares(pairs, count)
    sizes = [sum(source.nbytes for _, source in share) for share in found]
    assert len(found) <= count
    assert sum(sizes) == total
    assert all(abs(size - total / count) <= 1000 for size in sizes)
    with torch.no_grad():
        for target, source in (pair for share in found for pair in share):
            target.copy_(source)
    assert all(torch.equal(target, source) for target, source in pairs)


class Training:
    """Lets time pass; from `rests_at` on it waits for the copy."""

    def __init__(self, rests_at: float) -> None:
        self.now, self.rests_at = 50.0, rests_at

    def rests(self) -> bool:
        return self.now >= self.rests_at

    def wait_for_rest(self, timeout_seconds: float) -> None:
        self.now = min(self.now + timeout_seconds / 2 + 1e-6, max(self.now, self.rests_at))


def begins(
    monkeypatch: pytest.MonkeyPatch, rate: float, rests_at: float
) -> list[tuple[float, int]]:
    """When each piece begins, and its bytes."""
    training = Training(rests_at)

    def clock() -> float:
        return training.now

    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    found = paced(some_pairs(1), Bucket(rate, clock), training)
    return [(training.now, sum(source.nbytes for _, source in piece)) for piece in found]


def test_no_stretch_of_time_has_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = begins(monkeypatch, 5000.0, 1e9)
    total = sum(nbytes for _, nbytes in found)
    assert found[-1][0] - found[0][0] == pytest.approx((total - found[-1][1]) / 5000.0, rel=0.01)
    for first, (start, _) in enumerate(found):
        moved = 0
        for at, nbytes in found[first:]:
            moved += nbytes
            assert moved <= 5000.0 * (at - start) + 1000 + 1


def test_as_soon_as_training_waits_the_rest_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = begins(monkeypatch, 1.0, rests_at=60.0)
    assert found[-1][0] <= 60.0


def test_a_step_does_not_wait_for_a_limit() -> None:
    """At this limit the copy alone takes longer than a test may."""
    model = torch.nn.Linear(4096, 3072)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capture = Capture(
        {"model": model, "optimizer": optimizer}, rng=False, overlap=True, max_d2h_gbps=0.001
    )
    prepared = capture.prepare()
    before = [param.detach().clone() for param in model.parameters()]
    data = bytearray(prepared.data_bytes)
    heard: list[BaseException | None] = []
    copy = capture.copy(prepared, memoryview(data), heard.append)
    model(torch.randn(2, 4096)).sum().backward()
    optimizer.step()
    assert copy.wait(60)
    assert heard == [None]
    for param in before:
        assert param.numpy().tobytes() in data
    capture.close()
