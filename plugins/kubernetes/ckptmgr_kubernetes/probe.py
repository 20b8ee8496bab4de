"""`python -m ckptmgr_kubernetes.probe /readyz`: exit status 0 if the daemon here says so.

The daemon listens on loopback only, where the kubelet's own probes do not reach it.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

from ckptmgr_kubernetes import METRICS_PORT

SECONDS_MAX = 5.0

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past the proxies that the environment names: at none of them is 127.0.0.1 this pod."""


def main(path: str, port: int = METRICS_PORT) -> int:
    """Ask; 0 for an answer that is well, 1 for any other and for none."""
    url = f"http://127.0.0.1:{port}{path}"
    try:
        with DIRECT.open(url, timeout=SECONDS_MAX):
            return 0
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
