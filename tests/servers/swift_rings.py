"""Child of swift.py: writes the rings of a cluster. Usage: swift_rings.py DIRECTORY PORTS

A process of its own, because importing Swift changes logging and threads of whoever does it. PORTS
is JSON: the name of a ring to one [address, port, device] for each node.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from swift.common.ring import RingBuilder

PART_POWER, REPLICAS = 6, 3


def main(directory: Path, places: dict[str, list[tuple[str, int, str]]]) -> None:
    for name, nodes in places.items():
        builder = RingBuilder(PART_POWER, REPLICAS, 0)
        for zone, (address, port, device) in enumerate(nodes, start=1):
            place = {"ip": address, "port": port, "device": device, "zone": zone, "region": 1}
            builder.add_dev({**place, "weight": 1})
        builder.rebalance(seed="the same for each run")
        builder.get_ring().save(str(directory / f"{name}.ring.gz"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
