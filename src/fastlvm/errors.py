"""Errors whose message is one sentence a user can act on, and the exit code each one ends a command with."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 120  # characters of what is not ours in a message
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: Any) -> str:
    """repr of a value that a file holds, as part of one line: cut where it is long or deep."""
    return brief(_REPR.repr(value))


def brief(text: object) -> str:
    """A library's error or a name in a file, as part of one line: no character that does not print, cut where long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


class FastlvmError(Exception):
    """Base of every error fastlvm raises on purpose."""

    exit_code = 2


class InputError(FastlvmError, ValueError):
    """An argument or a file is not what it has to be."""


class IntegrityError(InputError):
    """A file is damaged, or belongs to another payload than the one it is used with."""


class GateError(FastlvmError):
    """A measured figure misses a gate that was asked for."""

    exit_code = 1
