"""Who is at the other end of a TCP connection on loopback, as the kernel tells."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_TABLE = Path("/proc/self/net/tcp")
_LOCAL, _REMOTE, _UID, _INODE = 1, 2, 7, 9
"""Columns of the table; addresses are in the byte order of the machine."""

Address = tuple[str, int]


def peer_uid(peer: Address, own: Address) -> int | None:
    """The user whose process has the socket `peer`, connected to `own`; None if nobody's has."""
    return uid_in(_TABLE.read_text(), peer, own)


def uid_in(table: str, peer: Address, own: Address) -> int | None:
    """As `peer_uid`, of the text of the table."""
    wanted = [_shown(peer), _shown(own)]
    for line in table.splitlines()[1:]:
        fields = line.split()
        if [fields[_LOCAL], fields[_REMOTE]] == wanted:
            # One that was closed is shown as root's; it has no inode any more.
            return int(fields[_UID]) if int(fields[_INODE]) else None
    return None


def _shown(address: Address) -> str:
    (word,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{word:08X}:{address[1]:04X}"
