"""Reading and writing .npz members block by block, without pickles and without trusting a header's sizes."""

from __future__ import annotations

import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from fastlvm.errors import InputError, IntegrityError, brief, shown

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error, NotImplementedError, RuntimeError)
"""What reading a damaged archive raises."""

HEADER_ERRORS = (
    *(ValueError, TypeError, SyntaxError, tokenize.TokenError, EOFError),
    *(OverflowError, RecursionError, MemoryError),
)
"""What numpy raises for a .npy header that makes no sense."""


# The header as numpy writes it, of arrays without fields; read as text, since evaluating it warns and recurses.
_HEADER = re.compile(
    rb"""\{\s*(?:(?:'descr':\s*'(?P<descr>[<>|=]?[?biufcmMOSUV]\d{0,10}(?:\[\w{1,12}\])?)'"""
    rb"""|'fortran_order':\s*(?P<fortran>True|False)"""
    rb"""|'shape':\s*\(\s*(?P<shape>(?:\d{1,18}L?,\s*)*(?:\d{1,18}L?)?)\s*\))\s*(?:,\s*)?){3}\}\s*"""
)
_LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}  # bytes of the header's length, by what goes before
_LONGEST = 10_000  # bytes of a header, which is numpy's own bound
_HEAD = 128  # bytes that numpy gives a header
_AXES = 32


def read_header(
    file: IO[bytes], name: str, remedy: str = "restore the file"
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype from the head of a .npy stream. Raises IntegrityError naming `name`."""
    try:
        size = int.from_bytes(_exactly(file, _LENGTHS[_exactly(file, 8)]), "little")
        found = _HEADER.fullmatch(_exactly(file, size)) if size <= _LONGEST else None
        if found is None or None in found.groups():
            raise ValueError("no header of an array")
        dtype = np.dtype(found["descr"].decode())
    except (KeyError, *HEADER_ERRORS, *DAMAGE) as error:
        raise IntegrityError(f"{name} has no .npy header that can be read: {remedy}") from error
    shape = tuple(int(side) for side in re.findall(rb"\d+", found["shape"]))
    if len(shape) > _AXES or math.prod(max(side, 1) for side in shape) > 2**48 or dtype.itemsize == 0:
        raise IntegrityError(f"{name} claims {dtype} {shown(list(shape))}: {remedy}")
    return shape, found["fortran"] == b"True", dtype


def map_array(path: Path, dtype: str, shape: tuple[int, ...], remedy: str, mode: Literal["r", "c"] = "r") -> np.memmap:
    """Map a .npy file that has to have this dtype and shape, and no byte more or less. Raises IntegrityError.

    mode: "c" for an array whose changes stay in memory.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: {remedy}")
    wanted = np.dtype(dtype).newbyteorder("<")
    nbytes = math.prod(shape) * wanted.itemsize
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < _HEAD:
                raise _truncated(path, size, _HEAD + nbytes, remedy)
            found, fortran, kind = read_header(file, str(path), remedy)
            start = file.tell()
        if (kind, found) != (wanted, shape):
            holds = f"{kind} {shown(list(found))}"
            raise IntegrityError(f"{path} holds {holds}, and {dtype} {list(shape)} is wanted: {remedy}")
        if fortran and len(shape) > 1:
            raise IntegrityError(f"{path} is in Fortran order, and C order is wanted: {remedy}")
        if size < start + nbytes:
            raise _truncated(path, size, start + nbytes, remedy)
        if size > start + nbytes:
            raise IntegrityError(f"{path} has bytes after its end: {remedy}")
        return np.memmap(path, kind, mode, start, shape)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _truncated(path: Path, size: int, wanted: int, remedy: str) -> IntegrityError:
    return IntegrityError(f"{path} is truncated: {size} bytes, and {wanted} are wanted; {remedy}")


class Archive:
    """An .npz file opened for reading; a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path} does not exist: name an .npz file")
        with self.path.open("rb") as file:
            start = file.read(4)
        if start[:2] != b"PK":
            raise InputError(f"{self.path} is not an .npz file")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (*DAMAGE, ValueError) as error:
            raise self._damaged(error) from error
        self.names = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def _damaged(self, error: BaseException) -> IntegrityError:
        return IntegrityError(f"{self.path} is truncated or damaged ({brief(error)}): restore it")

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a member."""
        with self._open(name) as (_, shape, _, dtype):
            return shape, dtype

    def _open(self, name: str) -> _Member:
        if name not in self.names:
            raise InputError(
                f"{self.path} has no array {name!r}: it has {brief(', '.join(sorted(self.names))) or 'none'}"
            )
        return _Member(self, self._zip, self.names[name], name)

    def array(self, name: str, objects: Callable[[IO[bytes], str, int], np.ndarray] | None = None) -> np.ndarray:
        """A whole member. objects: reads the pickle of an object array, which without it is refused."""
        with self._open(name) as (file, shape, fortran, dtype):
            if dtype.hasobject:
                if objects is None:
                    raise InputError(f"{self.path} array {name!r} holds Python objects, which are not loaded")
                values = objects(file, f"{self.path} array {name!r}", self.names[name].file_size)
                if values.size != math.prod(shape):
                    raise IntegrityError(
                        f"{self.path} array {name!r} has {values.size} entries for shape {list(shape)}"
                    )
                return values.reshape(shape)
            size = math.prod(shape) * dtype.itemsize
            data = _exactly(file, size)
        if size == 0:
            return np.zeros(shape, dtype)
        flat = np.frombuffer(data, dtype=dtype)
        return flat.reshape(shape, order="F" if fortran else "C")

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """A member's first axis in pieces of `rows`, so that it need not fit in memory."""
        with self._open(name) as (file, shape, fortran, dtype):
            if dtype.hasobject:
                raise InputError(f"{self.path} array {name!r} holds Python objects, and numbers are wanted")
            if fortran and len(shape) > 1:
                raise InputError(f"{self.path} array {name!r} is in Fortran order: save it with np.ascontiguousarray")
            one = math.prod(shape[1:])
            for first in range(0, shape[0], rows):
                count = min(rows, shape[0] - first)
                data = _exactly(file, count * one * dtype.itemsize)
                yield np.frombuffer(data, dtype=dtype).reshape(count, *shape[1:])


class _Member:
    """An open member: (stream after the header, shape, Fortran order, dtype); errors name the archive."""

    def __init__(self, archive: Archive, source: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
        self._archive, self._zip, self._info, self._name = archive, source, info, name
        self._file: IO[bytes] | None = None

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]:
        path = self._archive.path
        try:
            if self._info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # those that numpy writes
                raise NotImplementedError(f"compression {self._info.compress_type}")
            self._file = self._zip.open(self._info)
        except (*DAMAGE, ValueError) as error:
            raise self._archive._damaged(error) from error
        try:
            shape, fortran, dtype = read_header(self._file, f"{path} array {self._name!r}")
            room = self._info.file_size
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize > room:
                claimed = shown(list(shape))
                raise IntegrityError(
                    f"{path} array {self._name!r} claims shape {claimed} and holds {room} bytes: restore the file"
                )
        except BaseException:
            self._file.close()
            raise
        return self._file, shape, fortran, dtype

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._file is not None:
            self._file.close()
        if isinstance(error, DAMAGE) and not isinstance(error, RecursionError):
            raise self._archive._damaged(error) from error


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count} bytes wanted, {len(data)} there")
    return data


class Writer:
    """Writes an .npz file member by member; a context manager."""

    def __init__(self, path: Path, compress: bool = False) -> None:
        self._zip = zipfile.ZipFile(
            path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED, allowZip64=True
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def array(self, name: str, values: Any) -> None:
        """Write one array; one of Python objects is an error."""
        with self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.asanyarray(values), allow_pickle=False)

    def blocks(self, name: str, shape: tuple[int, ...], dtype: str, pieces: Iterable[np.ndarray]) -> None:
        """Write an array of `shape` from pieces along its first axis."""
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        with self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, head)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())
