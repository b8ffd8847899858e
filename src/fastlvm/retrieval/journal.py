"""A journal: changes to a folder, each on disk before it is acknowledged. What they mean is the caller's.

A file, numbers little-endian. Its head: magic, version, 32 bytes of whose it is, and the SHA-256 of these. Then
records: a head (kind, CRC-32 of the rest of the head, first id, rows, bytes of the body), the body, and the SHA-256 of
the one before, head and body, so that a record that is missing shows as one that is damaged does.

What ends early was being written when its process or machine stopped, and nobody was told that it was done: it is left
out, and cut off before the next record. So is a record that is zeros to the end of the file, or from where a sector of
a disk begins: a file system may make a file longer before it writes. Anything else that does not fit is damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import sync_folder

REMEDY = "restore the folder or build the index again"

_MAGIC, _VERSION = b"fastlvmJ", 1
_SHA = 32
_HEAD = struct.Struct(f"<8sI{_SHA}s")
_BEGIN = _HEAD.size + _SHA
_RECORD = struct.Struct("<4sIQQQ")
_CHECKED = 8  # bytes of a record's head before those that its CRC is of, but for its kind
_SECTOR = 512
_BLOCK = 1 << 20

Mark = tuple[int, bytes, int]
"""A place between two records: its offset, the last SHA-256, how many records are before it."""


class Record(NamedTuple):
    """A change: kind, four bytes; what `append` was given; and its number in the journal, from 1."""

    kind: bytes
    first: int
    rows: int
    body: bytes
    number: int


class Journal:
    """The journal of one folder, read up to somewhere. One thread at a time uses it.

    owner: 32 bytes of whose changes these are; a journal of something else is refused. A process that changes it has
    locked it until `close`; the child of a fork has not.
    """

    def __init__(self, file: Path, owner: bytes) -> None:
        self.file = file
        self.unfinished = 0  # bytes after the last whole record, when it was last read
        self._owner = owner
        self._handle: IO[bytes] | None = None
        self._end, self._last, self._number = 0, b"", 0
        _ALL.add(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let others change it; the next change takes it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    @property
    def mark(self) -> Mark:
        return self._end, self._last, self._number

    def wrong(self, number: int, found: str) -> IntegrityError:
        return IntegrityError(f"{self.file} record {number} {found}: {REMEDY}")

    def read(self) -> Iterator[Record]:
        """Records after those that were read or appended. Raises IntegrityError where one is damaged."""
        with contextlib.ExitStack() as stack:
            source = self._handle
            if source is None:
                try:
                    source = stack.enter_context(self.file.open("rb", buffering=0))
                except FileNotFoundError:
                    if self._end:
                        raise IntegrityError(f"{self.file} is missing: {REMEDY}") from None
                    return
                except OSError as error:
                    raise IntegrityError(f"{self.file} cannot be read ({error.strerror}): {REMEDY}") from error
            yield from self._records(source, _size(source))

    @property
    def locked(self) -> bool:
        return self._handle is not None

    def lock(self) -> None:
        """Take it for this process. Raises InputError where another has it, or where it cannot be written."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            handle = os.fdopen(os.open(self.file, flags, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise self._unwritten(error) from error
        try:
            if not _take(handle.fileno()):
                raise InputError(
                    f"{self.file.parent} is being changed by another process or another object of this one: close that "
                    "first"
                )
        except BaseException:
            handle.close()
            raise
        self._handle = handle

    def append(self, kind: bytes, first: int, rows: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write a record, and return when it is on the disk. Raises InputError where it cannot be, and leaves none."""
        assert self._handle is not None
        self._check_place(self._handle)
        head = _RECORD.pack(kind, 0, first, rows, sum(len(part) for part in parts))
        head = head[:4] + struct.pack("<I", _crc(head)) + head[_CHECKED:]
        begin = [] if self._end else self._begin()
        digest = hashlib.sha256(begin[1] if begin else self._last)
        for part in (head, *parts):
            digest.update(part)
        pieces = [*begin, head, *parts, digest.digest()]
        before = self.mark
        try:
            if _size(self._handle) != self._end:  # what an earlier writer left unfinished
                self._handle.truncate(self._end)
            self._handle.seek(self._end)
            for piece in pieces:
                _write(self._handle, piece)
            os.fsync(self._handle.fileno())
            if not self._end:
                sync_folder(self.file.parent)
            self._end, self._last, self._number = self._handle.tell(), digest.digest(), self._number + 1
        except BaseException as error:
            with contextlib.suppress(OSError):  # if this fails too, the next `append` does it
                self.cut(before)
            if isinstance(error, OSError):
                raise self._unwritten(error) from error
            raise

    def cut(self, mark: Mark) -> None:
        """Take back what was appended after a mark. Raises OSError."""
        assert self._handle is not None
        self._end, self._last, self._number = mark
        self._handle.truncate(self._end)
        os.fsync(self._handle.fileno())

    def _check_place(self, handle: IO[bytes]) -> None:
        """Raises InputError where the folder was moved or removed: what is written would be found by nobody."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), self.file.stat()):
                return
        raise InputError(f"{self.file} was moved or removed since it was opened: open the index where it is now")

    def _unwritten(self, error: OSError) -> InputError:
        return InputError(
            f"{self.file} cannot be written ({error.strerror}), and nothing was changed: make room, or save the index "
            "elsewhere"
        )

    def _begin(self) -> list[bytes]:
        """The head of the file and its SHA-256."""
        head = _HEAD.pack(_MAGIC, _VERSION, self._owner)
        return [head, hashlib.sha256(head).digest()]

    def _records(self, source: IO[bytes], size: int) -> Iterator[Record]:
        if size < self._end:
            raise IntegrityError(f"{self.file} has {size} bytes, and {self._end} were read before: {REMEDY}")
        self.unfinished = size - self._end
        if not self._end:
            if size < _BEGIN or not self._has_begin(source, size):
                return
            self.unfinished = size - self._end
        while size - self._end >= _RECORD.size:
            number, at = self._number + 1, self._end
            head = _exactly(source, at, _RECORD.size)
            kind, crc, first, rows, nbytes = _RECORD.unpack(head)
            if crc != _crc(head):
                if _unwritten(source, size, at, at + _RECORD.size):
                    return
                raise self.wrong(number, "has a damaged head")
            end = at + _RECORD.size + nbytes + _SHA
            if end > size:
                return
            body = _exactly(source, at + _RECORD.size, nbytes)
            digest = hashlib.sha256(self._last + head)
            digest.update(body)
            if digest.digest() != _exactly(source, end - _SHA, _SHA):
                if _unwritten(source, size, at, end):
                    return
                raise self.wrong(number, "is damaged, its SHA-256 does not fit")
            self._end, self._last, self._number = end, digest.digest(), number
            self.unfinished = size - end
            yield Record(kind, first, rows, body, number)

    def _has_begin(self, source: IO[bytes], size: int) -> bool:
        """Whether the file's head was written; if so, the end is after it. Raises IntegrityError where it is wrong."""
        head, digest = self._begin()
        found = _exactly(source, 0, _BEGIN)
        if found == head + digest:
            self._end, self._last = _BEGIN, digest
            return True
        if _unwritten(source, size, 0, _BEGIN):
            return False
        if hashlib.sha256(found[: _HEAD.size]).digest() != found[_HEAD.size :]:
            raise IntegrityError(f"{self.file} has a damaged head: {REMEDY}")
        magic, version, _ = _HEAD.unpack(found[: _HEAD.size])
        if (magic, version) != (_MAGIC, _VERSION):
            raise IntegrityError(f"{self.file} has version {version}, and {_VERSION} is wanted: update fastlvm")
        raise IntegrityError(f"{self.file} is the journal of another index: {REMEDY}")


def _crc(head: bytes) -> int:
    return zlib.crc32(head[_CHECKED:], zlib.crc32(head[:4]))


def _size(source: IO[bytes]) -> int:
    return os.fstat(source.fileno()).st_size


def _exactly(source: IO[bytes], at: int, count: int) -> bytes:
    """`count` bytes that were there when the size was asked for."""
    source.seek(at)
    pieces: list[bytes] = []
    while count:
        piece = source.read(min(count, 1 << 30))
        if not piece:
            raise IntegrityError(f"{source.name} was cut short while it was read: open the index again")
        pieces.append(piece)
        count -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write(handle: IO[bytes], data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[handle.write(left[: 1 << 30]) :]


def _unwritten(source: IO[bytes], size: int, at: int, end: int) -> bool:
    """Whether what should go from `at` to `end` was not written whole: zeros to the end of the file say so."""
    last = size
    while last > at:
        first = max(at, last - _BLOCK)
        kept = _exactly(source, first, last - first).rstrip(b"\0")
        last = first + len(kept)
        if kept:
            break
    return last <= at or -(-last // _SECTOR) * _SECTOR < end


def _take(fd: int) -> bool:
    """Lock a file for whoever opened it; False where another has. Raises InputError where none can."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 1 << 40, os.SEEK_SET)  # readers are kept from what is locked, and never read there
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise InputError(
            f"the journal cannot be locked ({error.strerror}): keep the index on a file system that has locks"
        ) from error
    return True


_ALL: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child: what it inherits would keep the lock when its parent has ended."""
    for journal in list(_ALL):
        journal.close()


_register: Any = getattr(os, "register_at_fork", None)
if _register is not None:
    _register(after_in_child=_after_fork)
