"""Object stores for ckptmgr: s3://bucket/path, gs://bucket/path, az://container/path."""

from __future__ import annotations

from ckptmgr_objectstore.clients import open_store

__all__ = ["open_store"]
