"""Failures: an exception in one request's work ends that request, and nothing else.

A core wraps all its work for a request in `failures.of(request)`: templates, detokenizers,
drafters, strategies and caches may raise anything there. The error is stored, the core continues
with the other requests, and at the end of its turn it ends those that failed.
"""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

from flowspec.request import ClusterError, cause_of

T = TypeVar("T")
log = logging.getLogger(__name__)
# Texts of errors after which the device cannot compute in this process. A refused allocation
# ("CUDA out of memory") is not one of them.
_FATAL = ("CUDA error", "cuDNN error", "CUDNN_STATUS", "HIP error", "NCCL error")
_ACCELERATOR_ERROR: type[Exception] | None = getattr(torch, "AcceleratorError", None)


def is_fatal(error: BaseException) -> bool:
    """Whether the process can serve no other request after `error` either.

    A failed kernel breaks the device's context; the loss of a peer is not a request's fault.
    """
    if isinstance(error, ClusterError) or not isinstance(error, Exception):
        return True
    if _ACCELERATOR_ERROR is not None and isinstance(error, _ACCELERATOR_ERROR):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return any(mark in str(error) for mark in _FATAL)


def attempt(work: Callable[[], T]) -> T | Exception:
    """Return the result of `work`, or the exception that it raised unless that is fatal."""
    try:
        return work()
    except Exception as error:
        if is_fatal(error):
            raise
        return error


def settled(result: T | Exception) -> T:
    """Return the result of an `attempt`; raise its exception if it failed."""
    if isinstance(result, Exception):
        raise result
    return result


class Failures:
    """The requests whose work has failed, until the core takes them and ends them."""

    def __init__(self, on_failure: Callable[[int], object] = lambda request: None) -> None:
        self._on_failure = on_failure
        self._found: dict[int, Exception] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, request: object) -> bool:
        return request in self._found

    def of(self, *requests: int) -> "_Block":
        """Return a `with` block that stores its exception as the failure of `requests`."""
        return _Block(self, requests)

    def add(self, error: Exception, *requests: int) -> None:
        """Store that the work for `requests` has failed."""
        for request in requests:
            if request in self._found:
                continue
            self._found[request] = error
            # a ValueError is a sentence for the user; others are logged with their traceback
            trace = None if isinstance(error, ValueError) else error
            log.warning("request %d fails: %s", request, cause_of(error), exc_info=trace)
            self._on_failure(request)

    def pop(self, request: int) -> Exception | None:
        """Remove and return the stored failure of one request."""
        return self._found.pop(request, None)

    def take(self) -> dict[int, Exception]:
        """Remove and return all stored failures, by request."""
        found, self._found = self._found, {}
        return found


class _Block:
    """The `with` block that Failures.of returns."""

    __slots__ = ("_failures", "_requests")

    def __init__(self, failures: Failures, requests: tuple[int, ...]) -> None:
        self._failures, self._requests = failures, requests

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None or not isinstance(error, Exception) or is_fatal(error):
            return False
        self._failures.add(error, *self._requests)
        return True
