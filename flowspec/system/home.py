"""The user's home folder, which a service or a container may lack."""

from pathlib import Path


def home_folder(*, instead: str) -> Path:
    """Raises ValueError where it is not known; `instead`: the variable that then helps too."""
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError(
            f"this user has no home folder: set HOME, or {instead} to a folder of your own"
        ) from None
