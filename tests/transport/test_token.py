"""The join token detects typing mistakes, gives the keys, and is never shown."""

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.cli.argv import hide_token
from flowspec.transport.secure import token as token_module
from flowspec.transport.secure.token import (
    ALPHABET,
    TOKEN_VARIABLE,
    check_token,
    derive_keys,
    new_token,
    read_token,
    write_token,
)

SOME = "0123456789abcdefghjkmnpqrs"  # 26 symbols


def valid(secret: str = SOME) -> str:
    """Return a token of a known secret."""
    return secret + token_module._checksum(secret)


def test_tokens_differ_and_are_short() -> None:
    """They have 130 random bits in a line that can be read out."""
    tokens = {new_token() for _ in range(200)}
    assert len(tokens) == 200
    assert all(len(token) == 34 and check_token(token) == token for token in tokens)


def test_how_it_is_written_does_not_matter() -> None:
    """Case, dashes, spaces, and letters that look like digits make no difference."""
    plain = valid()
    assert check_token(f"  {plain.upper()}\n") == check_token(plain)
    assert check_token(plain.replace("0", "O").replace("1", "l")) == check_token(plain)
    assert check_token(" ".join(plain)) == check_token(plain)


@given(st.integers(0, 29), st.sampled_from(ALPHABET))
def test_one_wrong_symbol_is_told(at: int, symbol: str) -> None:
    """Twenty bits of checksum find a typing mistake before the network is used."""
    token = valid()
    wrong = token[:at] + symbol + token[at + 1 :]
    if wrong != token:
        with pytest.raises(ValueError, match="typing mistake") as caught:
            check_token(wrong)
        assert wrong not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has 0 letters"), (valid()[:-1], "has 29"), (valid()[:-1] + "u", "no token has")],
)
def test_what_is_no_token_is_told(text: str, message: str) -> None:
    """The error never repeats the token."""
    with pytest.raises(ValueError, match=message):
        check_token(text)


def test_keys_are_a_function_of_the_token() -> None:
    """Every device derives the same keys; another token gives others; the two roles differ."""
    keys = derive_keys(valid())
    assert keys == derive_keys(valid().upper())
    other = derive_keys(new_token())
    fields = ("server_public", "server_secret", "member_public", "member_secret")
    both = [getattr(k, name) for k in (keys, other) for name in fields]
    assert len(set(both)) == 8


def test_keys_are_the_ones_of_this_version() -> None:
    """Another derivation would split a cluster whose devices are updated one by one."""
    keys = derive_keys(valid())
    assert keys.server_public.hex() == SERVER_PUBLIC
    assert keys.member_public.hex() == MEMBER_PUBLIC


SERVER_PUBLIC = "4c727b6fa24d40c81ff4255f6fff0e179f0c629b15ea3b3aeb5f8ecf51fc6259"
MEMBER_PUBLIC = "7cf405b0014cdd72ecf4a7c175c44268bb98201863f687375e57afc3e500b65c"


def test_no_traceback_shows_token_or_keys() -> None:
    """This holds even for tools that print the local variables of each frame."""
    token = check_token(valid())
    keys = derive_keys(token)

    def fail(token: str, keys: object) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError) as caught:
        fail(token, keys)
    shown = "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )
    assert "Token(...)" in shown
    assert str(token) not in shown
    for secret in (keys.server_secret, keys.member_secret):
        assert repr(secret) not in shown


def test_a_file_comes_before_the_environment(tmp_path: Path) -> None:
    """The explicit option wins."""
    path = tmp_path / "deep" / "token"
    write_token(path, new_token())
    assert path.stat().st_mode & 0o777 == 0o600
    env = {TOKEN_VARIABLE: valid()}
    assert read_token(path, env) == path.read_text().strip()
    assert read_token(None, env) == check_token(valid())


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """The error has the command that helps."""
    path = tmp_path / "token"
    path.write_text(valid())
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"read by others \(mode 644\); run: chmod 600"):
        read_token(path)


def test_no_token_says_how_to_give_one(tmp_path: Path) -> None:
    """The error lists all three ways."""
    with pytest.raises(ValueError, match=r"--token-file.*FLOWSPEC_TOKEN.*terminal"):
        read_token(None, {}, prompt=False)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_token(tmp_path / "none")


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux lets a process change what ps shows"
)
@pytest.mark.parametrize("form", [["--token", valid()], [f"--token={valid()}"]])
def test_ps_does_not_show_a_token(form: list[str]) -> None:
    """The command line that the kernel shows is overwritten when the commands are imported."""
    code = "import flowspec.cli, sys; sys.stdin.read(); print(sys.argv)"
    command = [sys.executable, "-c", code, "join", "host:1", *form, "--last"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdin is not None
        shown = ""
        for _ in range(200):
            shown = Path(f"/proc/{process.pid}/cmdline").read_text()
            if "***" in shown:
                break
            time.sleep(0.02)
        out, _ = process.communicate("", timeout=20)
    assert valid() not in shown
    assert "*" * len(valid()) in shown
    assert shown.endswith("--last\0")
    assert valid() in out  # the program itself still has it


def test_hiding_does_nothing_without_a_token() -> None:
    """pytest itself has no token on its command line."""
    assert hide_token()
