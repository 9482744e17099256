"""The limit on open files: libzmq aborts the process when a socket exceeds it."""

import resource

COMFORTABLE = 4096


def check_open_files(needed: int) -> None:
    """Raise the soft limit if it is low. Raises OSError when the hard limit is below `needed`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(needed, COMFORTABLE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise OSError(
            f"this process may open {soft} files, but needs {needed}; raise the limit in the "
            "shell or service that starts it, for instance: ulimit -n 1024"
        )
