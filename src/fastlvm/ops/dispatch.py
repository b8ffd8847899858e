"""The only place that knows what runs where, and why not.

A backend is a module with `supports(*args) -> (ok, reason)` and `run(*args)`, both called with an op's validated arrays
and flags in the order of its signature. The order of registration is the order in which "auto" asks. A backend that is
slower than the next ones for some calls has `yields(*args)` too: why "auto" goes on to them, or "" where it stays.

`FASTLVM_BACKEND` takes the place of `backend="auto"`; a backend named in a call wins over it. `FASTLVM_ISA` (scalar,
avx2, avx512, neon) pins the instruction set of the cpu backend and is read once, when the extension is loaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

PIN = "FASTLVM_BACKEND"


class Verdict(NamedTuple):
    """One backend's answer to one call."""

    backend: str
    ok: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.backend:<10} {'yes' if self.ok else 'no':<4} {self.reason}"


class Verdicts(list[Verdict]):
    """Every backend's answer, in the order "auto" asks; prints one line each."""

    def __str__(self) -> str:
        return "\n".join(str(verdict) for verdict in self)


class _Op(NamedTuple):
    function: Callable[..., Any]
    check: Callable[..., None]
    backends: dict[str, ModuleType]


_OPS: dict[str, _Op] = {}


def register(op: str, function: Callable[..., Any], check: Callable[..., None], *backends: ModuleType) -> None:
    """Make `op` known: its public function, the check of its arguments, and its backends, the preferred one first."""
    _OPS[op] = _Op(function, check, {module.__name__.rpartition(".")[2]: module for module in backends})


def known() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_OPS)


def choose(op: str, backend: str, args: tuple[Any, ...]) -> ModuleType:
    """The backend that runs this call.

    Raises:
        ValueError: an unknown backend, a named or pinned one that cannot run, or none that can; the reason is in it.
    """
    backends = _OPS[op].backends
    wanted, origin = backend, f"backend={backend!r}"
    if backend == "auto":
        wanted = os.environ.get(PIN, "auto")
        origin = f"{PIN}={wanted}"
    if wanted != "auto":
        if wanted not in backends:
            raise ValueError(f"{op}: {origin} is unknown; wants auto, {', '.join(backends)}")
        ok, reason = backends[wanted].supports(*args)
        if not ok:
            raise ValueError(f"{op}: {origin} cannot run this call: {reason}")
        return backends[wanted]
    reasons = []
    yielding: list[ModuleType] = []
    for name, module in backends.items():
        ok, reason = module.supports(*args)
        if ok and not _yields(module, args):
            return module
        if ok:
            yielding.append(module)
        reasons.append(f"{name}: {reason}")
    if yielding:
        return yielding[0]
    raise ValueError(f"{op}: no backend can run this call ({'; '.join(reasons)})")


def _yields(module: ModuleType, args: tuple[Any, ...]) -> str:
    return module.yields(*args) if hasattr(module, "yields") else ""


def explain(op: str, *args: Any, **kwargs: Any) -> Verdicts:
    """Which backends can run `fastlvm.<op>(*args, **kwargs)`, and why the others cannot. Nothing is computed but
    what mlx arrays still wait for.

    Returns:
        A list of `(backend, ok, reason)` in the order "auto" asks; it prints as a table.

    Raises:
        ValueError, TypeError: the op is unknown, or the call itself is wrong, as the op would raise.
    """
    if op not in _OPS:
        raise ValueError(f"explain: op {op!r} is unknown; wants one of {', '.join(_OPS)}")
    entry = _OPS[op]
    bound = inspect.signature(entry.function).bind(*args, **kwargs)
    bound.apply_defaults()
    call = {name: value for name, value in bound.arguments.items() if name not in ("backend", "return_final_state")}
    entry.check(**call)
    pin = os.environ.get(PIN, "auto")
    found = Verdicts()
    for name, module in entry.backends.items():
        ok, reason = module.supports(*call.values())
        if ok and pin not in ("auto", name):
            ok, reason = False, f'{PIN}={pin} pins another one; backend="{name}" would run'
        if ok:
            slower = _yields(module, tuple(call.values())) if pin == "auto" else ""
            reason = module.describe() + (f'; "auto" asks the next ones first: {slower}' if slower else "")
        found.append(Verdict(name, ok, reason))
    return found
