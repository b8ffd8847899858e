"""Writes that leave either the old file or the new one, whatever happens in between, and hashes of what was written."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlvm.errors import InputError, IntegrityError, brief, shown

_CHUNK = 1 << 22
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _temporary(target: Path) -> Path:
    """A name beside `target` that tells whose it is, so that a later writer can clear what a killed one left."""
    return target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}-{os.getpid()}"


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear_leftovers(target: Path) -> None:
    """Remove temporaries of `target` whose writer is gone."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            _remove(left)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows has no handle on a folder
        _sync(path)


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; on leaving without an error it is synced and renamed to `target`."""
    target = Path(target)
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "no ordinary file"
        raise InputError(f"{target} is {what}, and a file is to be written there: name another path")
    _make_parent(target)
    _clear_leftovers(target)
    temporary = _temporary(target)
    try:
        with _writing(target, temporary):
            yield temporary
            _sync(temporary)
            temporary.replace(target)
        sync_folder(target.parent)
    finally:
        _remove(temporary)


def _check_above(target: Path) -> None:
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{target} cannot be made, {parent} is a file: name another path")


def check_folder(target: str | os.PathLike[str]) -> None:
    """Raises InputError unless `target` is a folder or can become one."""
    target = Path(target)
    _check_above(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, and a folder is wanted: name another path")


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target.parent} cannot be made ({error.strerror}): name another folder") from error


@contextlib.contextmanager
def _writing(target: Path, temporary: Path) -> Iterator[None]:
    """An error of writing `temporary`, as one that names `target`."""
    try:
        yield
    except InputError as error:
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(target))) from error
    except OSError as error:
        ours = isinstance(error.filename, str | Path) and str(error.filename).startswith(str(temporary))
        if not ours and error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(f"{target} cannot be written ({error.strerror}): make room or name another place") from error
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors raises no OSError, it only tells of one
        if found is None:
            raise
        why = os.strerror(int(found[1]))
        raise InputError(f"{target} cannot be written ({why}): make room or name another place") from error


def check_new_folder(target: str | os.PathLike[str]) -> None:
    """Raises InputError unless `target` can become a folder: it is absent or an empty one, and no file is above it."""
    target = Path(target)
    _check_above(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, and a folder is to be written there: name another path")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} already holds something: remove it or name another folder")


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder; on leaving without an error its files are synced and it becomes `target`.

    An existing non-empty `target` is refused before anything is written.
    """
    target = Path(target)
    check_new_folder(target)
    _make_parent(target)
    _clear_leftovers(target)
    temporary = _temporary(target)
    try:
        with _writing(target, temporary):
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _sync(path)
                else:
                    sync_folder(path)
            sync_folder(temporary)
            try:
                temporary.replace(target)
            except OSError as error:
                if not target.exists():
                    raise
                raise InputError(f"{target} was made by something else meanwhile: name another folder") from error
        sync_folder(target.parent)
    finally:
        if temporary.exists():
            _remove(temporary)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(target) as path:
        path.write_text(json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or malformed one is an InputError that names it."""
    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({brief(error)}): restore it or build it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def parse_json(text: str) -> Any:
    """A JSON text as `write_json` writes it, without NaN and infinity; ValueError for any other."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value)  # what nests too deep to be hashed
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text)} is no finite number")
    return value


Entries = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""By name, what an entry of a JSON file has to be: in words, and as a check."""


def wrong_entry(content: Mapping[str, Any], wanted: Entries) -> str:
    """What the first wrong entry is and should be; "" where all are right."""
    for name, (what, holds) in wanted.items():
        if not holds(content.get(name)):
            return f"{name} is {shown(content.get(name))}, and {what} is wanted"
    return ""


def whole_number(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least} on", lambda value: type(value) is int and value >= least


ID = ("an id", lambda value: isinstance(value, str) and value.isalnum() and len(value) <= 64)


def holds_digests(value: Any) -> bool:
    """Whether it is hashes by the name of their file."""
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def check_files(folder: Path, digests: Mapping[str, str], remedy: str) -> None:
    """Raises IntegrityError unless every file is in the folder and has its SHA-256."""
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise IntegrityError(f"{file} is missing: {remedy}")
        try:
            found = sha256_file(file)
        except OSError as error:
            raise IntegrityError(f"{file} cannot be read ({error.strerror}): {remedy}") from error
        if found != digest:
            raise IntegrityError(f"{file} is damaged (its SHA-256 has changed): {remedy}")


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
