"""One token of a Mamba block against float64 written apart from the reference, on every backend and ISA."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastlvm
from fastlvm.ops import dispatch

from .oracle import relative_error
from .steps import as_numpy
from .test_properties import VIEWS, tensor_view

STATES = ("conv_state", "ssm_state")
BIASES = ("in_proj_bias", "conv1d_bias", "dt_bias", "out_proj_bias")
NORMS = ("dt_norm", "B_norm", "C_norm")
OPTIONS = ("D", *BIASES, *NORMS)
PLACES = tuple(how for how in VIEWS if how != "expanded")  # views with a place for each element


@dataclass(frozen=True)
class Block:
    batch: int = 3
    model: int = 6
    channels: int = 8
    state: int = 5
    rank: int = 2
    width: int = 4
    extra: int = 0
    options: tuple[str, ...] = OPTIONS

    def __str__(self):
        size = f"b{self.batch}M{self.model}D{self.channels}N{self.state}R{self.rank}W{self.width}+{self.extra}"
        return f"{size}-{'all' if self.options == OPTIONS else '+'.join(self.options) or 'bare'}"

    def inputs(self, dtype=torch.float32, weights=None, seed=0):
        weights = weights or dtype
        g = torch.Generator().manual_seed(seed)
        b, m, d, n, r, w = self.batch, self.model, self.channels, self.state, self.rank, self.width

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(weights)

        def matrix(rows, columns):
            return normal(rows, columns, scale=max(columns, 1) ** -0.5)

        sizes = {"D": d, "in_proj_bias": 2 * d, "conv1d_bias": d, "dt_bias": d, "out_proj_bias": m}
        sizes |= {"dt_norm": r, "B_norm": n, "C_norm": n}
        return {
            "x": normal(b, m).to(dtype),
            "conv_state": normal(b, d, w - 1 + self.extra),
            "ssm_state": normal(b, d, n),
            "in_proj": matrix(2 * d, m),
            "conv1d": matrix(d, w),
            "x_proj": matrix(r + 2 * n, d),
            "dt_proj": matrix(d, r),
            "A_log": normal(d, n, scale=0.5),
            "out_proj": matrix(m, d),
        } | {name: normal(sizes[name]) for name in self.options}


def truth(inputs, norm_eps=1e-6):
    """Output and both states in float64, row by row and channel by channel."""
    given = {name: np.asarray(x.double() if torch.is_tensor(x) else x, np.float64) for name, x in inputs.items()}
    x, conv_state, ssm_state = given["x"], given["conv_state"].copy(), given["ssm_state"].copy()
    channels, size = given["A_log"].shape
    rank = given["dt_proj"].shape[1]
    skip, outs = given.get("D", np.zeros(channels)), []
    for i, token in enumerate(x):
        xz = given["in_proj"] @ token + given.get("in_proj_bias", 0)
        u = np.zeros(channels)
        for d in range(channels):
            line = [*conv_state[i, d], xz[d]]
            taps = zip(reversed(given["conv1d"][d]), reversed(line), strict=False)
            u[d] = silu(sum(a * b for a, b in taps) + given.get("conv1d_bias", np.zeros(channels))[d])
            conv_state[i, d] = line[1:]
        parts = np.split(given["x_proj"] @ u, [rank, rank + size])
        for k, name in enumerate(NORMS):
            if name in given and parts[k].size:
                parts[k] = parts[k] / np.sqrt(np.mean(parts[k] ** 2) + norm_eps) * given[name]
        delta = np.log1p(np.exp(given["dt_proj"] @ parts[0] + given.get("dt_bias", 0)))
        y = np.zeros(channels)
        for d in range(channels):
            decay = np.exp(-delta[d] * np.exp(given["A_log"][d]))
            ssm_state[i, d] = decay * ssm_state[i, d] + delta[d] * u[d] * parts[1]
            y[d] = (ssm_state[i, d] @ parts[2] + skip[d] * u[d]) * silu(xz[channels + d])
        outs.append(given["out_proj"] @ y + given.get("out_proj_bias", 0))
    return np.array(outs).reshape(x.shape), conv_state, ssm_state


def silu(x):
    return x / (1 + np.exp(-x))


def advance(inputs, **kwargs):
    """Output and both states afterwards; the inputs are left alone."""
    inputs = {name: x.clone() if torch.is_tensor(x) else x.copy() for name, x in inputs.items()}
    out = fastlvm.mamba_step(**inputs, **kwargs)
    return out, inputs["conv_state"], inputs["ssm_state"]


CASES = [Block(), Block(options=()), *(Block(options=(name,)) for name in OPTIONS), Block(extra=2), Block(width=1)]
CASES += [Block(batch=b) for b in (0, 1, 2, 5, 9)] + [Block(state=n) for n in (0, 1, 16, 300)]
CASES += [Block(rank=r) for r in (0, 1, 17)] + [Block(width=w) for w in (2, 3, 7)]
CASES += [Block(model=m, channels=d, rank=8) for m, d in [(0, 3), (3, 0), (1, 1), (17, 70), (300, 130)]]
CASES = list(dict.fromkeys(CASES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, backend):
    inputs = case.inputs()
    got = advance(inputs, backend=backend)
    for found, wanted in zip(got, truth(inputs), strict=True):
        assert relative_error(found, wanted) <= 1e-5
    again = advance(as_numpy(inputs), backend=backend)
    assert all(type(x) is np.ndarray and np.array_equal(x, y.numpy()) for x, y in zip(again, got, strict=True))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_float64_is_exact(case, backend):
    inputs = case.inputs(torch.float64)
    for found, wanted in zip(advance(inputs, backend=backend), truth(inputs), strict=True):
        assert found.dtype == torch.float64
        assert relative_error(found, wanted) <= 1e-13


@pytest.mark.parametrize("states", [torch.float32, None], ids=["float32 states", "16-bit states"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 6])
def test_16_bits_are_rounded_at_the_end_alone(dtype, states, batch, backend):
    """Nothing between the weights, as rounded, and the results, as rounded, is of 16 bits."""
    inputs = Block(batch=batch, model=70, channels=90, state=16).inputs(dtype)
    if states is not None:
        inputs |= {name: inputs[name].to(states) for name in STATES}
    got = advance(inputs, backend=backend)
    one_rounding = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}
    assert got[0].dtype == dtype
    for found, wanted in zip(got, truth(inputs), strict=True):
        error = np.abs(found.double().numpy() - wanted)
        assert (error <= one_rounding[found.dtype] * np.abs(wanted) + 1e-5 * np.abs(wanted).max()).all()


def test_steps_are_the_forward_of_a_sequence(backend):
    """The states carry over: token by token as the convolution and the scan of the whole."""
    case = Block(batch=2, options=("D", "dt_bias", "conv1d_bias"))
    inputs = case.inputs()
    x = torch.randn(7, 2, 6, generator=torch.Generator().manual_seed(1))
    conv_state, ssm_state = inputs["conv_state"].clone(), inputs["ssm_state"].clone()
    rest = {name: v for name, v in inputs.items() if name not in ("x", *STATES)}
    outs = [fastlvm.mamba_step(token, conv_state, ssm_state, **rest, backend=backend) for token in x]
    u, z = F.linear(x, inputs["in_proj"]).permute(1, 2, 0).chunk(2, dim=1)
    u = fastlvm.causal_conv1d(u, inputs["conv1d"], inputs["conv1d_bias"], "silu", inputs["conv_state"])
    dt, B, C = (inputs["x_proj"] @ u).split([2, 5, 5], dim=1)
    y, last = fastlvm.ssm_scan(
        u,
        inputs["dt_proj"] @ dt,
        -inputs["A_log"].exp(),
        B,
        C,
        inputs["D"],
        z,
        inputs["dt_bias"],
        True,
        inputs["ssm_state"],
        return_final_state=True,
    )
    assert relative_error(torch.stack(outs, dim=2), (inputs["out_proj"] @ y).double()) <= 1e-5
    assert relative_error(ssm_state, last.double()) <= 1e-5


@pytest.mark.parametrize("how", PLACES)
def test_any_memory_is_read_and_written_where_it_lies(how, backend):
    inputs = Block(batch=2, extra=1).inputs()
    want = advance(inputs, backend=backend)
    there = {name: tensor_view(x.clone(), how) for name, x in inputs.items()}
    out = fastlvm.mamba_step(**there, backend=backend)
    for found, wanted in zip((out, there["conv_state"], there["ssm_state"]), want, strict=True):
        assert relative_error(found, wanted.double()) <= 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_bit(count, threads):
    inputs = Block(batch=2, model=200, channels=330, state=16, rank=12).inputs()
    fastlvm.set_num_threads(1)
    want = advance(inputs)
    fastlvm.set_num_threads(count)
    assert all(torch.equal(a, b) for a, b in zip(advance(inputs), want, strict=True))


def _operator():
    from fastlvm.ops.mamba_step import custom_op

    return custom_op.mamba_step


def _arguments(inputs):
    names = [name for name in inspect.signature(fastlvm.mamba_step).parameters if name != "backend"]
    return [1e-6 if name == "norm_eps" else inputs.get(name) for name in names]


def test_the_custom_op_names_what_it_writes():
    written = [a.name for a in _operator()._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == list(STATES)
    torch.library.opcheck(_operator(), _arguments(Block().inputs()))
    torch.library.opcheck(_operator(), _arguments(Block(options=()).inputs()))


def test_compiles_without_a_break():
    inputs = Block().inputs()
    want = advance(inputs)
    step = torch.compile(fastlvm.mamba_step, fullgraph=True, backend="eager")
    copies = {name: x.clone() for name, x in inputs.items()}
    out = step(**copies)
    for found, wanted in zip((out, copies["conv_state"], copies["ssm_state"]), want, strict=True):
        assert torch.equal(found, wanted)


ARRAYS = tuple(Block().inputs())


@pytest.fixture
def no_kernel_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr("fastlvm._C.mamba_step", refuse)
    monkeypatch.setattr(dispatch._OPS["mamba_step"].backends["reference"], "step", refuse)


@pytest.mark.usefixtures("no_kernel_runs")
class TestWrongInput:
    def refused(self, error, message, **changes):
        inputs = Block().inputs() | changes
        for backend in ("cpu", "reference"):
            with pytest.raises(error, match=f"^mamba_step: {message}"):
                fastlvm.mamba_step(**inputs, backend=backend)

    @pytest.mark.parametrize("name", ARRAYS)
    def test_a_shape_that_does_not_fit_is_named(self, name):
        x = Block().inputs()[name]
        self.refused(ValueError, rf"{name} has (shape|[0-9]+ dimensions) .*wants", **{name: x[None]})
        if name not in ("x", "A_log", "dt_proj", "conv1d"):  # they say what the others have to be
            self.refused(ValueError, rf"{name} has shape .*wants", **{name: torch.cat([x, x])})

    @pytest.mark.parametrize("name", ARRAYS)
    def test_what_is_no_tensor_or_another_dtype_is_named(self, name):
        self.refused(TypeError, f"{name} is a list", **{name: [1.0]})
        if name != "x":
            self.refused(TypeError, f"{name} is float64 but x is float32", **{name: Block().inputs()[name].double()})
            self.refused(TypeError, f"{name} is a ndarray", **{name: Block().inputs()[name].numpy()})

    @pytest.mark.parametrize("name", STATES)
    def test_a_state_that_cannot_be_written_is_named(self, name):
        state = Block().inputs()[name]
        self.refused(ValueError, f"{name} has stride 0", **{name: state[:1].expand(state.shape)})
        inputs = as_numpy(Block().inputs())
        inputs[name].flags.writeable = False
        with pytest.raises(ValueError, match=f"mamba_step: {name} is read-only"):
            fastlvm.mamba_step(**inputs)

    def test_no_gradient(self):
        self.refused(ValueError, "x requires grad", x=Block().inputs()["x"].requires_grad_())

    def test_numbers(self):
        self.refused(TypeError, "norm_eps is '1'; wants a number", norm_eps="1")
        self.refused(ValueError, "conv1d has shape", conv1d=torch.zeros(8, 0))
        self.refused(ValueError, "conv_state has shape", conv_state=torch.zeros(3, 8, 2))


@pytest.mark.parametrize("name", STATES)
def test_a_state_whose_elements_overlap_is_refused(name, backend):
    inputs = Block().inputs()
    shape = inputs[name].shape
    inputs[name] = torch.zeros(1000).as_strided(shape, (shape[1], 1, 1))
    with pytest.raises(ValueError, match=f"{name}: got memory in which elements may overlap"):
        fastlvm.mamba_step(**inputs, backend=backend)


def test_bfloat16_takes_float32_parameters():
    """As in a model whose A_log and D are kept in float32."""
    inputs = dataclasses.replace(Block(), batch=1).inputs(torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("A_log", "D", *STATES)}
    for found, wanted in zip(advance(inputs), truth(inputs), strict=True):
        assert relative_error(found, wanted) <= 2**-8


def test_autocast_changes_nothing(backend):
    inputs = Block().inputs()
    want = advance(inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = advance(inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mlx_arrays_are_refused_with_what_to_use():
    mx = pytest.importorskip("mlx.core", reason="mlx is missing")
    inputs = {name: mx.array(x) for name, x in as_numpy(Block().inputs()).items()}
    with pytest.raises(ValueError, match=r"mamba_step: no backend can run this call .*use causal_conv1d_step"):
        fastlvm.mamba_step(**inputs)
