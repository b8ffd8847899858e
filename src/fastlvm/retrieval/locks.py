"""A lock that many share, or one has alone: searches go on beside each other, and what is searched changes between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class SharedLock:
    """`with lock:` shares it, `with lock.alone():` waits until nobody does. Neither can be taken twice by one thread.

    Whoever wants it alone goes before those who come later; after that, those who waited come first. So neither
    searches nor changes wait for ever, however many of the other kind there are.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._sharing = 0
        self._queued = 0  # to share it
        self._admitted = 0  # of those, how many go before the next one who wants it alone
        self._waiting = 0  # to have it alone
        self._alone = False

    def __enter__(self) -> None:
        with self._mutex:
            if not (self._alone or self._waiting):
                self._sharing += 1
                return
            self._queued += 1
            try:
                while self._alone or (self._waiting and not self._admitted):
                    self._changed.wait()
                self._admitted = max(0, self._admitted - 1)
                self._sharing += 1
            finally:  # an interrupt may end the waiting
                self._queued -= 1
                self._admitted = min(self._admitted, self._queued)

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._sharing -= 1
            if self._waiting and not self._sharing:
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._mutex:
            self._waiting += 1
            try:
                while self._alone or self._sharing or self._admitted:
                    self._changed.wait()
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._mutex:
                self._alone = False
                self._admitted = self._queued
                self._changed.notify_all()
