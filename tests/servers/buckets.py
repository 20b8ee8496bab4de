"""Buckets through a bare client, not through ours: made, looked into, damaged."""

from __future__ import annotations

import urllib.request
from datetime import timedelta

import obstore
from obstore.store import AzureStore, S3Store


class Bucket:
    """A bucket at the endpoint at which it was made, whatever the environment says later."""

    _client: S3Store | AzureStore

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self._client = S3Store(name, endpoint=endpoint)

    def make(self) -> None:
        url = obstore.sign(self._client, "PUT", "", expires_in=timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT", data=b"")):
            pass

    def keys(self, prefix: str = "") -> list[str]:
        pages = obstore.list(self._client, prefix or None)
        return sorted(found["path"] for page in pages for found in page)

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self._client, key).bytes())

    def write(self, key: str, content: bytes) -> None:
        """Overwrite an object, as nobody but a test does."""
        obstore.put(self._client, key, content, use_multipart=False)

    def remove(self, key: str) -> None:
        obstore.delete(self._client, key)


class Container(Bucket):
    """A container of Azure's blobs, which servers/azurite.py makes."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self._client = AzureStore(name, endpoint=endpoint)
