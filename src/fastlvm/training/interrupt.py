"""Ctrl-C as a request: training stops where its state is whole, not in the middle of an optimizer step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupt:
    """While entered in the main thread, the first SIGINT only sets `requested`.

    A second one raises KeyboardInterrupt at once, except inside `shielded()`, where it is noted and nothing more.
    """

    def __init__(self) -> None:
        self.requested = False
        self._shielded = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self._shielded:
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Let a save come to its end."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
