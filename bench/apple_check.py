"""One case of the grid on mlx's default device, against the float64 oracle.

Tolerances are those that tests/metal holds the kernels' emulation to, and tests/ops the ops without one; a test keeps
them equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import fastlvm
from apple_cases import Case, Conv, Given, Nce, Scan, Ssd, leaves, rounded
from fastlvm.errors import brief

FORWARD, GRADIENT = 1e-5, 1e-4  # float32, norm-wise
HALF = {"float16": (3e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}  # rtol and atol of an element
HALF_NORM = {"float16": 2e-3, "bfloat16": 1e-2}  # gradients
SUMS = (1e-3, 1e-3)  # gradients that are float32 in a call of halves
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


class Tolerance(NamedTuple):
    """At most `most`, norm-wise; or, with a `floor`, for every element relative to it and the truth's size together."""

    most: float
    floor: float | None = None

    def error(self, got: Any, want: Any) -> float:
        """NaN in what came is an infinite error."""
        if got.shape != want.shape:
            return math.inf
        off = abs(got - want)
        if self.floor is not None:
            found = float((off / (self.floor + abs(want))).max(initial=0.0))
        else:
            size = float(np.linalg.norm(want))
            found = float(np.linalg.norm(off)) / (size if size > 0 else 1.0)
        return math.inf if math.isnan(found) else found


def _elements(rtol: float, atol: float) -> Tolerance:
    return Tolerance(rtol, atol / rtol)


def output_tolerance(case: Case, index: int) -> Tolerance:
    if index and not isinstance(case, Conv):  # states after it
        own = "float32" if isinstance(case, Scan | Ssd) else case.weights
    else:
        own = "float32" if isinstance(case, Nce) else case.dtype
    return Tolerance(FORWARD) if own == "float32" else _elements(*HALF[own])


def gradient_tolerance(case: Case, name: str) -> Tolerance:
    if case.dtype == "float32":
        return Tolerance(GRADIENT)
    if isinstance(case, Nce):
        return Tolerance(4 * EPSILON[case.dtype])
    if not isinstance(case, Scan):
        return Tolerance(HALF_NORM[case.dtype])
    rtol, atol = HALF[case.dtype]
    if case.weights == "float32" and name in ("D", "delta_bias", "initial_state"):
        return _elements(*SUMS)
    return _elements(*{"A": (rtol, 5 * atol), "delta": (5 * rtol, 10 * atol)}.get(name, (rtol, atol)))


def check(case: Case) -> dict[str, Any]:
    """What the op gave: "ok", the backend, the worst array with its error, and every failure; it does not raise."""
    row: dict[str, Any] = {"id": f"check-{case.id}", "kind": "check", "op": case.op, "dtype": case.dtype}
    try:
        given = case.given()
        row["backend"] = chosen(case.op, case.to_mlx(given))
        found = _errors(case, given)
    except Exception as error:
        return row | {"ok": False, "reason": scrubbed(error)}
    failures = [one for one in found if not one["error"] <= one["tolerance"]]
    worst = max(found, key=lambda one: one["error"] / one["tolerance"])
    return row | {"ok": not failures, "worst": _finite(worst), "failures": [_finite(one) for one in failures]}


def chosen(op: str, arrays: Given) -> str:
    """The backend that runs a call with these arguments, with what it says of itself."""
    verdict = next(one for one in fastlvm.explain(op, **arrays) if one.ok)
    return f"{verdict.backend}: {verdict.reason}"


def _errors(case: Case, given: Given) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    truths, _ = case.oracle(given)
    cotangents = [rounded(rng.standard_normal(x.shape), _output_dtype(case, i)) for i, x in enumerate(truths)]
    truths, true_grads = case.oracle(given, cotangents) if case.gradient else (truths, {})

    arrays = case.to_mlx(given)
    found = _judged(case, case.call(dict(arrays)), truths, "")
    if not case.gradient:
        return found
    names = leaves(given)

    def function(*changing: Any) -> list[Any]:
        return case.call(arrays | dict(zip(names, changing, strict=True)))

    inputs = [arrays[name] for name in names]
    if case.compiled:
        found += _judged(case, mx.compile(function)(*inputs), truths, " (mx.compile)")
    cots = [mx.array(g).astype(getattr(mx, _output_dtype(case, i))) for i, g in enumerate(cotangents)]
    outputs, grads = mx.vjp(function, inputs, cots)
    found += _judged(case, outputs, truths, " (mx.vjp)")
    for name, grad in zip(names, grads, strict=True):
        found.append(_measured(f"d{name}", grad, true_grads[name], gradient_tolerance(case, name)))
    return found


def _output_dtype(case: Case, index: int) -> str:
    float32 = isinstance(case, Nce) or (index and isinstance(case, Scan | Ssd))
    return "float32" if float32 else case.dtype


def _judged(case: Case, got: Sequence[Any], truths: Sequence[Any], how: str) -> list[dict[str, Any]]:
    named = zip(case.outputs, got, truths, strict=True)
    return [_measured(name + how, x, want, output_tolerance(case, i)) for i, (name, x, want) in enumerate(named)]


def _measured(name: str, got: Any, want: Any, tolerance: Tolerance) -> dict[str, Any]:
    measure = "norm" if tolerance.floor is None else "element"
    error = tolerance.error(wide(got), np.asarray(want))
    return {"array": name, "error": error, "tolerance": tolerance.most, "measure": measure}


def wide(x: Any) -> Any:
    """An array of mlx as float64 of numpy."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _finite(one: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: None for it."""
    return one if math.isfinite(one["error"]) else one | {"error": None}


def scrubbed(error: BaseException) -> str:
    """The error in one line, without the folders of paths, which have a user's name in them."""
    text = f"{type(error).__name__}: {error}".replace(str(Path.home()), "")
    return brief(re.sub(r"(?<!\w)(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":,]+[/\\])+", "", text))
