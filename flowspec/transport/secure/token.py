"""The join token: a short text that lets a device into a cluster; the keys are derived from it.

It has 26 random symbols (130 bits) and 4 of checksum, in groups: `a1b2c3-...`. Case, dashes and
spaces do not matter; `o` reads as 0, `i` and `l` as 1. Keys: HKDF-SHA256 (RFC 5869), X25519 (RFC
7748).
"""

import getpass
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from flowspec.system.files import partial_path
from flowspec.transport.secure.keys import KEY_BYTES, Keys

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
TOKEN_VARIABLE = "FLOWSPEC_TOKEN"
SECRET_SYMBOLS, CHECK_SYMBOLS, GROUP = 26, 4, 6
MAX_FILE_BYTES = 4096
_SALT = b"flowspec cluster keys v1"
_LOOKALIKES = str.maketrans({"o": "0", "i": "1", "l": "1", "-": None, " ": None})


class Token(str):
    """A checked join token. Its repr is hidden; only `str()` gives the text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Token(...)"


def new_token() -> str:
    """Return a new token: 130 random bits of the operating system and a checksum."""
    secret = "".join(secrets.choice(ALPHABET) for _ in range(SECRET_SYMBOLS))
    symbols = secret + _checksum(secret)
    return Token("-".join(symbols[i : i + GROUP] for i in range(0, len(symbols), GROUP)))


def check_token(text: str) -> str:
    """Return the token in its usual form. Raises ValueError that does not repeat the token."""
    symbols = text.strip().lower().translate(_LOOKALIKES)
    needed = SECRET_SYMBOLS + CHECK_SYMBOLS
    if len(symbols) != needed:
        raise ValueError(
            f"the token has {len(symbols)} letters and digits, needed: {needed}; copy all of "
            "it from the line that the head printed"
        )
    if not set(symbols) <= set(ALPHABET):
        raise ValueError(
            "the token has a character that no token has; copy it again from the line that the "
            "head printed"
        )
    if _checksum(symbols[:SECRET_SYMBOLS]) != symbols[SECRET_SYMBOLS:]:
        raise ValueError(
            "the token has a typing mistake (its checksum does not fit); copy it again from the "
            "line that the head printed"
        )
    return Token("-".join(symbols[i : i + GROUP] for i in range(0, needed, GROUP)))


def derive_keys(token: str) -> Keys:
    """Return the cluster's key pairs; the same token gives the same pairs on every device.

    Raises ValueError when `token` is invalid.
    """
    secret = check_token(token).replace("-", "")[:SECRET_SYMBOLS].encode()
    server_secret, server_public = _key_pair(secret, b"server")
    member_secret, member_public = _key_pair(secret, b"member")
    return Keys(
        server_public=server_public,
        server_secret=server_secret,
        member_public=member_public,
        member_secret=member_secret,
    )


def read_token(
    token_file: Path | None = None, env: Mapping[str, str] = os.environ, *, prompt: bool = True
) -> str:
    """Return the token from `token_file`, else from FLOWSPEC_TOKEN, else typed in at a terminal.

    Raises ValueError when there is none, when it has a mistake, or when others may read the file.
    """
    if token_file is not None:
        return check_token(_read_private(token_file))
    if text := env.get(TOKEN_VARIABLE):
        return check_token(text)
    if prompt and sys.stdin is not None and sys.stdin.isatty():
        try:
            return check_token(getpass.getpass("join token: "))
        except EOFError:
            raise ValueError("no join token: the input ended") from None
    raise ValueError(
        f"no join token: give --token-file FILE, set {TOKEN_VARIABLE}, or run in a terminal and "
        "type it in; `flowspec serve` prints it on the head"
    )


def write_token(path: Path, token: str) -> None:
    """Write a token to a file that only this user may read.

    If another process has made the file meanwhile, it stays: read the token from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(str(token) + "\n")
    try:
        os.link(partial, path)  # unlike a rename, this replaces nothing
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_private(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ValueError(f"--token-file {path} cannot be read: {error.strerror}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ValueError(
            f"--token-file {path} may be read by others (mode {mode & 0o777:o}); "
            f"run: chmod 600 {path}"
        )
    return content.decode("ascii", errors="replace")


def _checksum(secret: str) -> str:
    number = int.from_bytes(hashlib.sha256(secret.encode()).digest()[:4], "big")
    return "".join(ALPHABET[number >> 5 * i & 31] for i in range(CHECK_SYMBOLS))


def _key_pair(secret: bytes, role: bytes) -> tuple[bytes, bytes]:
    # imported late: only a cluster over the network needs cryptography
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=_SALT, info=role).derive(secret)
    public = X25519PrivateKey.from_private_bytes(derived).public_key()
    return derived, public.public_bytes_raw()
