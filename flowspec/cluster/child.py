"""What a head asks of the process of a stage, whoever has started it."""

from typing import Protocol


class Child(Protocol):
    """The process of a stage, as far as its head has a say in it; see subprocess.Popen."""

    @property
    def pid(self) -> object:
        """What names it in errors."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
