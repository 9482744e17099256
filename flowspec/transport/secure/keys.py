"""Keys of a cluster: one key pair for listeners, one for callers."""

from dataclasses import dataclass, field

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Two Curve25519 key pairs, 32 bytes each; every member of a cluster has both.

    A listener proves that it knows `server_secret`, a caller `member_secret`. The repr shows
    neither, so that no traceback or log line can.
    """

    server_public: bytes
    server_secret: bytes = field(repr=False)
    member_public: bytes
    member_secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for name in self.__slots__:
            size = len(getattr(self, name))
            assert size == KEY_BYTES, f"{name} has {size} bytes, needed {KEY_BYTES}"
