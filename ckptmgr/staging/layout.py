"""The encoded layout of a snapshot: what a slot and a manifest say of their leaves."""

from __future__ import annotations

import msgspec

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.types import MALFORMED, PAGE_BYTES, Layout

_encode = msgspec.msgpack.Encoder().encode
_decode_layout = msgspec.msgpack.Decoder(Layout).decode


def encode_layout(layout: Layout) -> bytes:
    """The bytes of a layout in a slot and in a manifest."""
    return _encode(layout)


def decode_layout(encoded: bytes | memoryview, *, subject: str) -> Layout:
    """Read a layout and check that its groups and leaves lie inside its data region.

    Raises:
        HostBufferDamagedError: it is not a layout, or it does not hold together.
    """
    try:
        layout = _decode_layout(encoded)
    except MALFORMED as error:
        raise HostBufferDamagedError(f"layout can not be read: {error}", subject=subject) from error
    end = 0
    for group in layout.groups:
        whole_pages = group.nbytes >= 0 and group.nbytes % PAGE_BYTES == 0
        if group.offset != end or not whole_pages or group.itemsize not in range(1, 17):
            raise HostBufferDamagedError("layout has overlapping groups", subject=subject)
        end += group.nbytes
    if end != layout.data_bytes:
        raise HostBufferDamagedError("layout does not cover its data", subject=subject)
    for leaf in layout.leaves:
        if leaf.offset < 0 or leaf.nbytes < 0 or leaf.offset + leaf.nbytes > end:
            raise HostBufferDamagedError(f"leaf {leaf.path} is out of bounds", subject=subject)
    return layout
