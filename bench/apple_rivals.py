"""Who is timed in a row of an op: fastlvm on the GPU and on the CPU, plain mlx, and PyTorch where it is installed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apple_cases import Case, Conv, ConvStep, Given, Nce, Scan, ScanStep, Stepped, leaves, rounded
from apple_check import chosen, gradient_tolerance, output_tolerance, wide
from apple_timing import CPU, LOOP, OURS, TORCH, Contender, Missing, memory, reasons, rounds, sets_of, verdict

Forward = Callable[[Given], list[Any]]
Set = tuple[Given, list[Any]]  # arrays, and cotangents where the case has gradients
_HELD = 0.5  # share of the memory that a rival's arrays may take


def measured(case: Case, seconds: float, bytes_per_s: float) -> dict[str, Any]:
    """The row: times of all, errors against the oracle on a part of the result, and the bound of the memory."""
    given = case.given(0)
    size = sum(x.nbytes for x in given.values() if isinstance(x, np.ndarray))
    count = sets_of(size)
    sets = [_set(case, given if seed == 0 else case.given(seed)) for seed in range(count)]
    mx.eval(sets)
    row: dict[str, Any] = {"id": f"bench-{case.id}-{_passes(case)}", "kind": "bench", "title": case.title}
    row |= {"dtype": case.dtype, "sets": count, "backend": chosen(case.op, sets[0][0])}
    truth = _truth(case, given)
    found: list[dict[str, Any]] = []
    ready: list[Contender] = []
    for name, make in _makers(case):
        entry: dict[str, Any] = {"name": name}
        found.append(entry)
        with reasons(entry):
            one, results = make(case, sets)
            start = time.perf_counter()
            with one.around():
                part = results()
            entry["first_s"] = time.perf_counter() - start  # compiling is in it
            entry |= _judged(case, part, truth)
            one.prepare(seconds)
            ready.append(one)
    rounds(ready, found)
    work = case.bytes(given)
    row["bound"] = {"megabytes": work / 1e6, "ms": 1e3 * work / bytes_per_s}
    return row | {"ok": verdict(found[0]), "contenders": found}


def _passes(case: Case) -> str:
    return "fwdbwd" if case.gradient else "fwd"


def _set(case: Case, given: Given) -> Set:
    arrays = case.to_mlx(given)
    return arrays, [mx.array(g).astype(getattr(mx, dtype)) for g, dtype in _cotangents(case, given)]


def _cotangents(case: Case, given: Given) -> list[tuple[Any, str]]:
    """Of the one output that a timed call has, in its dtype."""
    if not case.gradient:
        return []
    if isinstance(case, Nce):
        return [(np.ones((), np.float32), "float32")]
    rng = np.random.default_rng(1)
    return [(rounded(rng.standard_normal(given[case.result].shape, np.float32), case.dtype), case.dtype)]


def passes(case: Case, forward: Forward) -> Callable[[Set], list[Any]]:
    """The forward in mlx, with the gradient of every array where the case has gradients."""

    def both(one: Set) -> list[Any]:
        arrays, cotangents = one
        names = _leaves(arrays)
        inputs = [arrays[name] for name in names]
        outputs, grads = mx.vjp(lambda *xs: forward(arrays | dict(zip(names, xs, strict=True))), inputs, cotangents)
        return [*outputs, *grads]

    return both if case.gradient else lambda one: forward(one[0])


def _leaves(arrays: Given) -> list[str]:
    kinds = (mx.float32, mx.float16, mx.bfloat16)
    return [name for name, x in arrays.items() if isinstance(x, mx.array) and x.dtype in kinds]


# --- what came, against the oracle


Named = dict[str, Any]  # arrays of float64: the output as "out", and gradients by name
Results = Callable[[], Named]  # the same part of what comes of the first set


def _truth(case: Case, given: Given) -> Named:
    """For a part of the batch and the channels, which do not know of the others."""
    part = case.part(given)
    truths, _ = case.oracle(part)
    if not case.gradient:
        return {"out": truths[0]}
    cots = [case.cut(g) if g.ndim else g for g, _ in _cotangents(case, given)]
    zeros = [np.zeros(x.shape, np.float32) for x in truths[1:]]
    truths, grads = case.oracle(part, [*cots, *zeros])
    return {"out": truths[0], **{name: grads[name] for name in case.local if name in grads}}


def _judged(case: Case, found: Mapping[str, Any], truth: Named) -> dict[str, Any]:
    """The worst error of a contender's part and what it is held to."""
    errors = []
    for name, want in truth.items():
        tolerance = output_tolerance(case, 0) if name == "out" else gradient_tolerance(case, name)
        error = tolerance.error(found[name], np.asarray(want))
        errors.append((error / tolerance.most, error, tolerance.most, name))
    _, error, most, name = max(errors)
    about = {"error": error if np.isfinite(error) else None, "tolerance": most, "error_of": name}
    return about | ({} if error <= most else {"wrong": True})


def _results(case: Case, call: Callable[[Set], list[Any]], one: Set) -> Results:
    def results() -> Named:
        return {name: wide(x) for name, x in _part(case, call(_copied(one)), _leaves(one[0])).items()}

    return results


def _part(case: Case, found: Sequence[Any], names: Sequence[str]) -> Named:
    """What the oracle knows of a call's output and its gradients, which come last."""
    grads = zip(names, found[-len(names) :], strict=True) if case.gradient else ()
    out = case.cut(found[0]) if found[0].ndim else found[0]
    return {"out": out, **{name: case.cut(x) for name, x in grads if name in case.local}}


def _copied(one: Set) -> Set:
    """With a state of its own, which a step may write."""
    arrays, cotangents = one
    return arrays | {name: arrays[name] + 0 for name in ("state",) if name in arrays}, cotangents


# --- contenders


def _makers(case: Case) -> Iterator[tuple[str, Callable[[Any, Sequence[Set]], tuple[Contender, Results]]]]:
    yield OURS, _ours
    yield CPU, _on_cpu
    yield _PLAIN[type(case)]
    yield TORCH, _torch


def _in_mlx(name: str, case: Case, sets: Sequence[Set], forward: Forward) -> tuple[Contender, Results]:
    call = passes(case, forward)
    mine = [_copied(one) for one in sets] if isinstance(case, Stepped) else sets
    return Contender(name, mine, call), _results(case, call, sets[0])


def _ours(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    return _in_mlx(OURS, case, sets, case.alone)


def _on_cpu(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    """The same arrays, which are in memory that CPU and GPU share."""
    one, results = _in_mlx(CPU, case, sets, case.alone)
    one.around = lambda: mx.stream(mx.cpu)
    return one, results


def _fits(case: Case) -> None:
    """Missing where the gradients of a loop over time keep too much."""
    if isinstance(case, Scan) and case.gradient:
        kept = 4 * 4 * case.batch * case.channels * case.length * case.state
        if kept > _HELD * memory():
            raise Missing(f"would keep some {kept / 1e9:.0f} GB for its gradients")


def scan_loop(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, **rest: Any) -> list[Any]:
    """What mlx-lm's Mamba does between its projections: one step after the other, in mlx's own operations."""
    length = u.shape[-1]
    step = _softplus(delta + delta_bias[:, None])
    timed = (step, step * u, D[:, None] * u, B, C)
    h, outs = None, []
    # Split, not indexed: the gradient of an index is as large as what it picks from.
    for dt, into, skip, b, c in zip(*(mx.split(x, length, axis=-1) for x in timed), strict=True):
        new = into * mx.swapaxes(b, 1, 2)  # [B, D, 1] times [B, 1, N]
        h = new if h is None else new + h * mx.exp(dt * A)
        outs.append(h @ c + skip)
    out = mx.concatenate(outs, axis=-1) * (z * mx.sigmoid(z))
    return [out.astype(u.dtype)]


def _softplus(x: Any) -> Any:
    return mx.logaddexp(x, 0)


def _scan_loop(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    _fits(case)
    return _in_mlx(LOOP, case, sets, lambda given: scan_loop(**given))


def _plain_step(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    def forward(given: Given) -> list[Any]:
        state, x, z = given["state"], given["x"], given["z"]
        step = _softplus(given["delta"] + given["delta_bias"])
        h = state * mx.exp(step[..., None] * given["A"]) + (step * x)[..., None] * given["B"][:, None]
        given["state"] = h
        out = (h @ given["C"][..., None]).squeeze(2) + given["D"] * x
        return [out * (z * mx.sigmoid(z)), h]

    return _in_mlx("the formula in mlx", case, sets, forward)


def _plain_conv(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    def forward(given: Given) -> list[Any]:
        rows = mx.swapaxes(given["x"], 1, 2)  # [B, L, D]
        weight = given["weight"][..., None]  # [D, W, 1]
        padded = mx.pad(rows, [(0, 0), (weight.shape[1] - 1, 0), (0, 0)])
        out = mx.conv1d(padded, weight, groups=weight.shape[0]) + given["bias"]
        return [mx.swapaxes(out * mx.sigmoid(out), 1, 2)]

    return _in_mlx("mx.conv1d", case, sets, forward)


def _plain_conv_step(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    def forward(given: Given) -> list[Any]:
        line = mx.concatenate([given["state"], given["x"][..., None]], axis=-1)
        given["state"] = line[..., 1:]
        out = (line * given["weight"]).sum(-1) + given["bias"]
        return [out * mx.sigmoid(out), given["state"]]

    return _in_mlx("the formula in mlx", case, sets, forward)


def _plain_nce(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    def forward(given: Given) -> list[Any]:
        logits = given["queries"] @ given["keys"].T / given["temperature"]
        return [(mx.logsumexp(logits, axis=1) - mx.diag(logits)).mean()]

    return _in_mlx("all logits in mlx", case, sets, forward)


_PLAIN: dict[type[Case], tuple[str, Callable[[Any, Sequence[Set]], tuple[Contender, Results]]]] = {
    Scan: (LOOP, _scan_loop),
    ScanStep: ("the formula in mlx", _plain_step),
    Conv: ("mx.conv1d", _plain_conv),
    ConvStep: ("the formula in mlx", _plain_conv_step),
    Nce: ("all logits in mlx", _plain_nce),
}


# --- PyTorch


def torch_device() -> Any:
    """PyTorch, its device, and what waits for it: MPS beside an Apple GPU, else the CPU."""
    torch = importlib.import_module("torch")
    if mx.default_device() == mx.cpu:
        return torch, "cpu", lambda: None
    if not torch.backends.mps.is_available():
        raise Missing("this PyTorch has no MPS here")
    return torch, "mps", torch.mps.synchronize


def _torch(case: Case, sets: Sequence[Set]) -> tuple[Contender, Results]:
    """fastlvm's reference, plain PyTorch, on MPS."""
    torch, device, synchronize = torch_device()
    _fits(case)

    def array(x: Any, dtype: str) -> Any:
        return torch.from_numpy(np.array(x, order="C")).to(device, getattr(torch, dtype))

    def tensor(name: str, x: Any) -> Any:
        if not (isinstance(x, np.ndarray) and x.dtype == np.float32):
            return torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x
        turned = case.rows and x.ndim > 2 and name not in case.parameters
        found = array(x.swapaxes(-1, -2) if turned else x, case.dtype_of(name))
        return (found.transpose(-1, -2) if turned else found).requires_grad_(case.gradient)

    given = [case.given(seed) for seed in range(len(sets))]
    names = leaves(given[0])
    mine = [
        ({n: tensor(n, x) for n, x in one.items()}, [array(g, dtype) for g, dtype in _cotangents(case, one)])
        for one in given
    ]

    def call(one: Set) -> list[Any]:
        arrays, cotangents = one
        out = case.alone(arrays, "reference")[0]
        if not case.gradient:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, [arrays[n] for n in names], cotangents)]

    def results() -> Named:
        arrays, cotangents = mine[0]
        found = call((arrays | {n: arrays[n].clone() for n in ("state",) if n in arrays}, cotangents))
        return {n: x.detach().cpu().double().numpy() for n, x in _part(case, found, names).items()}

    return Contender(TORCH, mine, call, lambda _: synchronize()), results
