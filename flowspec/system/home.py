"""The user's home folder; a service or a container may have none."""

from pathlib import Path


def home_folder(*, instead: str) -> Path:
    """Return the home folder. Raises ValueError if there is none; it names variable `instead`."""
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError(
            f"this user has no home folder: set HOME, or {instead} to a folder of your own"
        ) from None
