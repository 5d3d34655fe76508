"""What ranks tell people together: that a job is refused, and remarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from k2ssl import distributed
from k2ssl.config import ConfigError


@contextmanager
def refusing() -> Iterator[None]:
    """What is found wrong inside, before training, is told as wrong settings (exit status 2); ranks fail together.

    Raises:
        ConfigError: instead of a `ValueError`.
    """
    try:
        with distributed.failing_together():
            yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def say(*lines: str) -> None:
    """Lines for people, on rank 0."""
    lines = tuple(line for line in lines if line)
    if lines and distributed.is_main():
        print("\n".join(lines), flush=True)
