"""Who takes part in the timing of a case: the op, its kernel under every instruction set, the bound and the rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastlvm
import rivals
from bound import Bound, Work
from cases import Scan
from fastlvm import _C
from paired import Contender

ISAS = _C.isas()
BEST = ISAS[-1]
# Relative, over a whole array: the op against float64 and the reference; a rival adds an error of its own.
FORWARD, GRADIENT, RIVAL = 1e-5, 1e-4, 1e-3

OP, NUMPY, KERNEL, COMPUTE, STREAM = "fastlvm", "fastlvm, numpy", "kernel", "bound: compute", "bound: stream"
TIMED = {
    OP: "the op on torch tensors; a final state is not asked for",
    NUMPY: "the same on numpy arrays",
    KERNEL: "the call into the extension that the op makes, with its outputs allocated once",
    COMPUTE: "compute() of bench/bound.cpp: the exp and the multiply-adds of the scan on registers",
    STREAM: "stream() of bench/bound.cpp: the bytes of the arguments read, those of the results written",
    **{rival.name: rival.timed for rival in rivals.RIVALS},
}


class Checked:
    """A case with its arguments and the op's own result, which was found correct."""

    def __init__(self, case: Scan, threads: Sequence[int]) -> None:
        self.case, self.threads = case, threads
        self.tensors = case.tensors()
        self.cotangent = case.cotangent()
        self.lead = Contender(OP, self.call(self._op), threads[-1], BEST, decisive=True)
        self.result = self.lead.trial()
        for error, limit in self._errors():
            assert error <= limit

    def call(self, scan: rivals.ScanCall) -> Callable[[], Any]:
        """The pass of the case by `scan`: a tuple of the output and, backward, the gradients of all arguments."""
        if self.case.gradient:
            return rivals.gradients(scan, self.tensors, self.cotangent)
        return rivals.outputs(scan, self.tensors)

    def difference(self, found: Sequence[Tensor]) -> float:
        """How far a result is from the op's, relative, the worst array of all."""
        return max(relative(got, ours) for got, ours in zip(found, self.result, strict=True))

    @staticmethod
    def _op(*tensors: Tensor) -> Tensor:
        return fastlvm.ssm_scan(*tensors, delta_softplus=True)

    def _errors(self) -> Iterator[tuple[float, float]]:
        """Errors and their limits against the reference in float64, for the first 8 channels, which need no others.

        The gradients of B and C are sums over all channels: they are held to the reference in float32, see `rivals_of`.
        """
        few = slice(0, 8)
        sliced = [
            t if t.ndim == 3 and i in (3, 4) else t[:, few] if t.ndim == 3 else t[few]
            for i, t in enumerate(self.tensors)
        ]
        doubles = [t.detach().double().requires_grad_(self.case.gradient) for t in sliced]
        out = fastlvm.ssm_scan(*doubles, delta_softplus=True, backend="reference")
        yield relative(self.result[0][:, few], out.detach()), FORWARD
        if self.case.gradient:
            exact = torch.autograd.grad(out, doubles, self.cotangent[:, few].double())
            for i, (found, wanted) in enumerate(zip(self.result[1:], exact, strict=True)):
                if i not in (3, 4):  # B and C
                    yield relative(found[:, few] if found.ndim == 3 else found[few], wanted), GRADIENT


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double()))


def own(checked: Checked) -> list[Contender]:
    """The op on fewer threads and on numpy arrays, and the kernel under every instruction set."""
    case, lead = checked.case, checked.lead
    found = [Contender(OP, lead.call, threads, BEST, lead.expected, True) for threads in checked.threads[:-1]]
    if not case.gradient:
        arrays = [t.numpy() for t in checked.tensors]
        on_numpy = lambda: fastlvm.ssm_scan(*arrays, delta_softplus=True)  # noqa: E731
        assert checked.difference([torch.from_numpy(on_numpy())]) <= FORWARD
        found += [Contender(NUMPY, on_numpy, threads, BEST, lead.expected) for threads in checked.threads]
        kernel, result = repeated(on_numpy)
        results = [torch.from_numpy(result)]
    else:
        kernel, results = repeated(lead.call)
    for isa in ISAS:
        one = Contender(KERNEL, kernel, checked.threads[-1], isa, decisive=isa != "scalar")
        for array in results:
            array.zero_()
        one.trial()
        assert checked.difference(results) <= GRADIENT, isa
        found.append(one)
        if isa != "scalar":  # slow, and the same on any number of threads
            found += [Contender(KERNEL, kernel, n, isa, one.expected, True) for n in checked.threads[:-1]]
    return found


def repeated(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The calls into the extension that `call` makes, which write to its result again when repeated; and the result."""
    with _recorded("ssm_scan", "ssm_scan_bwd") as calls:
        result = call()
    assert calls, "the op no longer calls _C.ssm_scan: name what it calls here"

    def again() -> None:
        for function, args, named in calls:
            function(*args, **named)

    return again, result


@contextmanager
def _recorded(*names: str) -> Iterator[list[tuple[Callable[..., Any], tuple, dict]]]:
    calls: list[tuple[Callable[..., Any], tuple, dict]] = []
    before = {name: getattr(_C, name) for name in names}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            calls.append((function, *_plain(args, named)))
            return function(*args, **named)

        return call

    try:
        for name, function in before.items():
            setattr(_C, name, recorder(function))
        yield calls
    finally:
        for name, function in before.items():
            setattr(_C, name, function)


def _plain(args: tuple, named: dict) -> tuple[tuple, dict]:
    """The same memory without an autograd history, which the extension does not take."""

    def plain(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return tuple(map(plain, args)), {name: plain(x) for name, x in named.items()}


def bounds(case: Scan, found: dict[str, Bound], threads: Sequence[int]) -> list[Contender]:
    """The two loops of the bound, the arithmetic for every vector instruction set."""
    work = Work.of(case)
    made = []
    for bound in found.values():
        for n in threads:

            def compute(bound: Bound = bound, n: int = n) -> None:
                bound.set_threads(n)
                bound.compute(work)

            def stream(bound: Bound = bound, n: int = n) -> None:
                bound.set_threads(n)
                bound.stream(work)

            made.append(Contender(COMPUTE, compute, n, bound.isa))
            if bound.isa == BEST:
                made.append(Contender(STREAM, stream, n, bound.isa))
    for one in made:
        one.trial()
    return made


def rivals_of(checked: Checked) -> tuple[list[Contender], dict[str, str]]:
    """The rivals that can run the case and agree with the op, on every number of threads; and why others do not."""
    found: list[Contender] = []
    reasons: dict[str, str] = {}
    for rival in rivals.RIVALS:
        reason = rival.refusal(checked.case)
        scan = None
        if reason is None:
            scan, reason = rivals.load(rival)
        if scan is None:
            reasons[rival.name] = reason or ""
            continue
        made = [Contender(rival.name, checked.call(scan), n, BEST) for n in checked.threads]
        made[-1].decisive = rival.name in (rivals.REFERENCE, rivals.COMPILED)
        error = checked.difference(made[-1].trial())
        if rival.name == rivals.REFERENCE:
            assert error <= (GRADIENT if checked.case.gradient else FORWARD)
        elif error > RIVAL:
            reasons[rival.name] = f"its result is {error:.1g} away from ours, relative"
            continue
        for one in made:
            if rival.name == rivals.COMPILED:
                one.trial()  # compiles for this number of threads
                one.trial()
            else:
                one.expected = made[-1].expected * made[-1].threads / one.threads
        found += made
    return found, reasons
