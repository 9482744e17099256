"""What `ps` and `top` call a process of a cluster."""

import os

MAX_NAME = 60  # characters; a device's name is its user's choice

# setproctitle would else write over the environment too, which others read in /proc/PID/environ.
os.environ.setdefault("SPT_NOENV", "1")

from setproctitle import setproctitle  # noqa: E402


def name_process(role: str) -> None:
    """Call this process `flowspec ROLE`, as in `flowspec stage 2`, and not by its command line."""
    shown = "".join(c if c.isprintable() else "?" for c in role)
    setproctitle(f"flowspec {shown[:MAX_NAME]}")
