"""The objects of a real S3 gateway keep every promise of a store."""

from __future__ import annotations

import pytest

from ckptmgr.store.base import Store
from ckptmgr.testing import MIB, StoreSuite
from ckptmgr_objectstore.clients import open_store
from ckptmgr_objectstore.store import ObjectStore
from scale import RACE_KEYS, RACE_PROCESSES, STORES, scaled
from servers.buckets import Bucket


@pytest.mark.reliability
@pytest.mark.timeout(1800)
@pytest.mark.stores(place="s3:// on Ceph RGW")
class TestPromises(StoreSuite):
    race_processes = RACE_PROCESSES
    race_keys = RACE_KEYS if STORES else scaled(20, RACE_KEYS)

    @pytest.fixture(autouse=True)
    def _place(self, bucket: Bucket) -> None:
        self.shared_url = f"s3://{bucket.name}/some/run"

    def make_store(self) -> Store:
        return open_store(self.shared_url)


class InParts(StoreSuite):
    """Objects of more than 4 MiB go up in parts; the small ones of races do not."""

    big_bytes = 17 * MIB

    def __init__(self, url: str) -> None:
        self._url = url

    def make_store(self) -> Store:
        return ObjectStore(
            self._url,
            open_store(self._url)._client,
            exclusive=None,
            single_put_bytes_max=4 * MIB,
            part_bytes=5 * MIB,
        )


@pytest.mark.stores(place="s3:// on Ceph RGW")
@pytest.mark.parametrize(
    "promise",
    [
        "test_big_page_aligned_object",
        "test_big_odd_object",
        "test_nothing_is_overwritten",
        "test_no_reader_sees_a_part",
        "test_cancelled_put_leaves_all_or_nothing",
    ],
)
def test_objects_in_parts_keep_the_promises_too(promise: str, bucket: Bucket) -> None:
    getattr(InParts(f"s3://{bucket.name}/run"), promise)()
