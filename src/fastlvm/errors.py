"""Errors whose message is one sentence a user can act on, and the exit code each one ends a command with."""


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
