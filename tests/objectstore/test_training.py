"""A real training through outages of its object store: it goes on, and what is due is committed
as soon as the store is back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptmgr
from scale import scaled
from servers.buckets import Bucket
from servers.faultproxy import Fault, FaultProxy, Kind

pytestmark = [pytest.mark.reliability, pytest.mark.stores(place="s3:// on Ceph RGW")]

OUTAGES = (
    Fault(Kind.STATUS, status=503),
    Fault(Kind.STALL),
    Fault(Kind.RESET),
    Fault(Kind.LOST),
    Fault(Kind.STATUS, status=403),
)
STEPS = scaled(20, 500)


def test_training_goes_on_through_every_outage(
    runtime: Path, bucket: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    url = f"s3://{bucket.name}/run"
    x = torch.zeros(100_000)
    step, seen = 0, 0
    with ckptmgr.Checkpointer(url, {"x": x}, every=1) as ckpt:
        for fault in OUTAGES:
            proxy.plan(fault)
            last = step + STEPS
            while step < last or proxy.struck.total() == seen:  # the outage was met
                step += 1
                x.fill_(step)
                ckpt.step(step)
            seen = proxy.struck.total()
            proxy.plan()
            step += 1
            x.fill_(step)
            assert ckpt.save(step).committed(120), fault
    found = ckptmgr.load(url)
    assert torch.equal(found["x"], torch.full((100_000,), float(step)))
