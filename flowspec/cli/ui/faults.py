"""Errors of the operating system in one sentence: what failed, why, and what to do."""

import errno
import os

USER, OTHER = 2, 3  # exit codes
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def describe(error: OSError) -> tuple[str, int]:
    """Return the sentence and the exit code, which is USER if another path would help."""
    if error.errno is None or not error.strerror:  # it is a sentence already
        is_users = isinstance(error, FileNotFoundError | PermissionError)
        return str(error), USER if is_users else OTHER
    what = f"{_name(error)}{error.strerror}"
    if isinstance(error, FileNotFoundError) and not _has_folder():
        return "the working folder does not exist any more; change to one that does", USER
    if error.errno in _FORBIDDEN:
        return f"{what}; choose a path that this user may use: {_how_to_choose(error)}", USER
    if error.errno in _DISK_FULL:
        return f"{what}; free some of the disk, or choose a path on another one", OTHER
    if error.errno in _TOO_MANY_FILES:
        return f"{what}; raise the limit, for instance: ulimit -n 1024", OTHER
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{what}; move the file that is in the way, or {_how_to_choose(error)}", USER
    if isinstance(error, FileNotFoundError):
        return what, USER
    return what, OTHER


def _name(error: OSError) -> str:
    """Return the path of an error, with the working folder if it is relative."""
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    path = os.fspath(error.filename)
    if not os.path.isabs(path) and _has_folder():
        path = f"{path} in the folder {os.getcwd()}"
    return f"{path}: "


def _how_to_choose(error: OSError) -> str:
    is_relative = error.filename is not None and not os.path.isabs(str(error.filename))
    return "run the command in another folder" if is_relative else "see the command's --help"


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
