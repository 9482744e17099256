"""How many files a process may open; libzmq aborts the process where a socket needs one more."""

import resource

COMFORTABLE = 4096


def check_open_files(needed: int) -> None:
    """Raise the soft limit where the hard one allows it. Raises OSError where that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(needed, COMFORTABLE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise OSError(
            f"this process may have {soft} files open, needed: {needed}; raise the limit in the "
            "shell or service that starts it, for instance: ulimit -n 1024"
        )
