"""Inputs at the ends of what float32 holds: no NaN and no inf that the mathematics does not call for.

Errors are measured by the sizes of the terms of a result (the same op on absolute values, where nothing cancels).
Nothing is asked where float32 cannot hold what the float64 oracle computes on the way: see `Sizes`.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fastlvm

from . import oracle

LARGEST = float(torch.finfo(torch.float32).max)
FORWARD, GRADIENT = 1e-5, 1e-4
# What is lost below float32's smallest normal number, 1e-38, of each of at most 1e5 terms times factors.
SMALLEST, UNDERFLOW = 1e-38, 1e-33
BATCH, CHANNELS, STATE, LENGTH = 2, 12, 5, 20
few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def scan_inputs(seed=0, scale=1.0, state_scale=None, softplus=True, sign=0, options=True):
    """One decade of A a channel, from -1e-8 to -1e4; delta in [-50, 50], of one sign if `sign` is given."""
    rng = np.random.default_rng(seed)

    def normal(*shape, by=scale):
        return torch.from_numpy(by * rng.standard_normal(shape)).float()

    delta = torch.from_numpy(rng.uniform(-50, 50, (BATCH, CHANNELS, LENGTH))).float()
    inputs = {
        "u": normal(BATCH, CHANNELS, LENGTH),
        "delta": sign * delta.abs() if sign else delta,
        "A": -torch.logspace(-8, 4, CHANNELS * STATE, dtype=torch.float64).float().reshape(CHANNELS, STATE),
        "B": normal(BATCH, STATE, LENGTH),
        "C": normal(BATCH, STATE, LENGTH),
        "delta_softplus": softplus,
    }
    if options:
        inputs |= {
            "D": normal(CHANNELS),
            "z": normal(BATCH, CHANNELS, LENGTH),
            "initial_state": normal(BATCH, CHANNELS, STATE, by=scale if state_scale is None else state_scale),
        }
        if softplus:
            inputs["delta_bias"] = normal(CHANNELS, by=1.0)
    return inputs


class Sizes:
    """The scan of absolute values in float64, delta and A as they are, with what it meets on its way.

    `in_range` [B, D, L]: up to this step float32 holds the factor exp(δA), the sizes of the terms of the state, and
    those of the result. `gradients`: sizes of the terms of each gradient. `in_range_back` [B, D]: it also holds the
    products of factor, state and gradient of the state, 1e8 times over, because an A of 1e-8 makes them small again.
    """

    def __init__(self, inputs, cotangents):
        x = {k: v.double().abs() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        # δ as a factor of A and δ as a factor of B are leaves of their own: their gradients have opposite signs.
        x |= {name: inputs[name].double() for name in ("A", "delta", "delta_bias") if name in inputs}
        decay, feed = (dict(zip(("delta", "delta_bias"), self._step_leaves(x), strict=True)) for _ in range(2))
        leaves = {
            k: v.requires_grad_() for k, v in x.items() if isinstance(v, torch.Tensor) and not k.startswith("delta")
        }
        steps = [self._step(leaf, inputs["delta_softplus"]) for leaf in (decay, feed)]
        factor = torch.exp(steps[0][..., None] * leaves["A"][:, None])  # [B, D, L, N]
        terms = (steps[1].abs() * leaves["u"])[..., None] * leaves["B"].transpose(1, 2)[:, None]
        h = start = leaves.get("initial_state", torch.zeros(BATCH, CHANNELS, STATE, dtype=torch.float64))
        states = []
        for t in range(LENGTH):
            h = factor[:, :, t] * h + terms[:, :, t]
            h.retain_grad()
            states.append(h)
        h = torch.stack(states, dim=2)
        y = (h * leaves["C"].transpose(1, 2)[:, None]).sum(-1)
        if "D" in leaves:
            y = y + leaves["D"][:, None] * leaves["u"]
        out = y * torch.nn.functional.silu(leaves["z"]) if "z" in leaves else y
        met = torch.stack([factor.amax(-1), h.amax(-1), y, out]).amax(0).nan_to_num(torch.inf)
        self.in_range = met.cummax(-1).values <= LARGEST
        self.outputs = [out.detach(), h[:, :, -1].detach()]

        everything = {**leaves, **{f"decay {k}": v for k, v in decay.items() if v is not None}}
        everything |= {f"feed {k}": v for k, v in feed.items() if v is not None}
        loss = sum((o * g.double().abs()).sum() for o, g in zip((out, h[:, :, -1]), cotangents, strict=True))
        loss.backward()
        grads = {k: v.grad.abs() for k, v in everything.items()}
        for name in ("delta", "delta_bias"):
            if f"feed {name}" in grads:
                grads[name] = grads.pop(f"decay {name}") + grads.pop(f"feed {name}")
        self.gradients = grads
        back = torch.stack([state.grad for state in states], dim=2).abs()
        product = (
            back
            * (1 + factor.detach())
            * (1 + torch.stack([before.detach() for before in [start, *states[:-1]]], dim=2))
        )
        # Where no factor exceeds one, a factor below the smallest normal number may be zero: what it would have let
        # through to a gradient, times δ or A, is lost.
        decays = bool((factor <= 1).all())
        self.lost_back = 1e4 * SMALLEST * float(product.amax()) if decays and product.numel() else 0.0
        self.in_range_back = self.in_range[..., -1] & (product.amax((-1, -2)).nan_to_num(torch.inf) <= LARGEST / 1e8)

    @staticmethod
    def _step_leaves(x):
        return [x[k].clone().requires_grad_() if k in x else None for k in ("delta", "delta_bias")]

    @staticmethod
    def _step(leaf, softplus):
        raw = leaf["delta"] if leaf["delta_bias"] is None else leaf["delta"] + leaf["delta_bias"][:, None]
        return torch.nn.functional.softplus(raw, threshold=20) if softplus else raw

    def held(self, name):
        """Elements of the gradient of `name` of which something is asked."""
        ok, largest = self.in_range_back, LARGEST / 1e8
        where = {
            "B": ok.all(1)[:, None, None],
            "C": ok.all(1)[:, None, None],
            "A": ok.all(0)[:, None],
            "D": ok.all(0),
            "delta_bias": ok.all(0),
        }.get(name, ok[..., None])
        return where & (self.gradients[name] <= largest)


def expect_close(got, want, sizes, held, tolerance, name, lost=0.0):
    got, held = got.detach().double(), held.expand(got.shape)
    assert bool(got[held].isfinite().all()), f"{name}: {int((~got[held].isfinite()).sum())} not finite"
    allowed = tolerance * sizes.abs() + UNDERFLOW + lost
    wrong = held & ~((got - want).abs() <= allowed)
    worst = ((got - want).abs() / allowed)[held].max() if bool(held.any()) else 0
    assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} wrong, by up to {float(worst):.3g} of what is allowed"


def check_scan(inputs, every_backend, cotangent_scale=1.0, at_least=0.5):
    rng = np.random.default_rng(99)
    shapes = [(BATCH, CHANNELS, LENGTH), (BATCH, CHANNELS, STATE)]
    cotangents = [torch.from_numpy(cotangent_scale * rng.standard_normal(shape)).float() for shape in shapes]
    sizes = Sizes(inputs, cotangents)
    wants, true_grads = oracle.run(oracle.ssm_scan, inputs, cotangents)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    assert float(sizes.in_range.double().mean()) >= at_least, "the test asks for nothing"
    for backend in every_backend():
        outputs = fastlvm.ssm_scan(**{**inputs, **leaves}, return_final_state=True, backend=backend)
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        expect_close(outputs[0], wants[0], sizes.outputs[0], sizes.in_range, FORWARD, "out")
        expect_close(outputs[1], wants[1], sizes.outputs[1], sizes.in_range[..., -1:], FORWARD, "final state")
        for name, grad in zip(leaves, grads, strict=True):
            size, held = sizes.gradients[name], sizes.held(name)
            expect_close(grad, true_grads[name], size, held, GRADIENT, f"d{name}", sizes.lost_back)


@few
@given(seed=st.integers(0, 10**6), softplus=st.booleans(), options=st.booleans(), scale=st.sampled_from([1.0, 1e3]))
@example(seed=1, softplus=True, options=True, scale=1e3)
def test_steps_to_50_and_decays_from_1e_8_to_1e4(seed, softplus, options, scale, every_backend):
    """Without softplus the steps are positive here: the state decays or stays, everything is in range."""
    inputs = scan_inputs(seed, scale, softplus=softplus, options=options, sign=0 if softplus else 1)
    check_scan(inputs, every_backend, cotangent_scale=scale, at_least=1.0)


@few
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]), options=st.booleans())
def test_negative_steps_let_the_state_grow(seed, scale, options, every_backend):
    """exp(δA) > 1: a channel with a large A leaves float32's range, its neighbours and its first steps do not."""
    check_scan(scan_inputs(seed, scale, softplus=False, options=options), every_backend)
    check_scan(scan_inputs(seed, scale, softplus=False, options=options, sign=-1), every_backend, at_least=0.4)


@few
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-45, 1e-42, 1e-39, 1e-20]),
    state_scale=st.sampled_from([1e-42, 1e-38, 1.0]),
    softplus=st.booleans(),
)
def test_subnormal_inputs_and_states(seed, scale, state_scale, softplus, every_backend):
    inputs = scan_inputs(seed, scale, state_scale, softplus=softplus, sign=0 if softplus else 1)
    check_scan(inputs, every_backend, at_least=1.0)


def test_subnormal_steps_keep_the_state(backend):
    """δ = 1e-42 leaves the state as it was, but for what is too small for a normal number: that may become zero."""
    inputs = scan_inputs(softplus=False, state_scale=1e-42) | {"delta": torch.full((BATCH, CHANNELS, LENGTH), 1e-42)}
    inputs["B"] = torch.zeros_like(inputs["B"])
    for scale in (1.0, 0.0):
        inputs["initial_state"] = scale + inputs["initial_state"]
        _, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
        assert (final - inputs["initial_state"]).abs().max() <= 1.2 * SMALLEST
        inputs["initial_state"] = scan_inputs(softplus=False, state_scale=1e-42)["initial_state"]


def test_a_factor_out_of_range_times_a_small_state(isa):
    """exp(δA) = 2e41 is no float32, its product with a state of 1e-30 is one."""
    steps = torch.zeros(1, 20, 3)
    steps[..., 0] = 1
    A = torch.full((20, 5), 95.0)
    args = (torch.zeros_like(steps), steps, A, torch.ones(1, 5, 3), torch.ones(1, 5, 3))
    state = torch.full((1, 20, 5), 1e-30)
    _, final = fastlvm.ssm_scan(*args, initial_state=state, return_final_state=True, backend="cpu")
    assert oracle.relative_error(final, (state.double() * np.exp(95.0))) <= FORWARD


def test_half_precision_overflows_to_inf_and_never_to_nan(backend):
    inputs = scan_inputs(3, 100.0, softplus=True)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].half()
    out = fastlvm.ssm_scan(**inputs, backend=backend)
    want = oracle.run(oracle.ssm_scan, inputs)[0][0]
    assert not bool(out.isnan().any())
    inside, outside = want.abs() < 65000, want.abs() > 66000
    assert bool(inside.any()) and bool(outside.any())
    assert bool(out[inside].isfinite().all())
    assert torch.equal(out[outside].double(), want[outside].sign() * torch.inf)


@few
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from([1, 2, 4, 9]),
    scales=st.sampled_from(
        [(1e3, 1e3), (1.0, 1e3), (1.0, 1.0), (1e18, 1e18), (1e-42, 1.0), (1e-42, 1e3), (1e-22, 1e-22)]
    ),
    activation=st.sampled_from([None, "silu"]),
)
def test_convolution(seed, width, scales, activation, every_backend):
    rng = np.random.default_rng(seed)

    def normal(*shape, by):
        return torch.from_numpy(by * rng.standard_normal(shape)).float()

    inputs = {
        "x": normal(2, 3, 20, by=scales[0]),
        "weight": normal(3, width, by=scales[1]),
        "bias": normal(3, by=scales[0] * scales[1]),
        "activation": activation,
        "initial_state": normal(2, 3, width - 1, by=scales[0]),
    }
    cotangents = [normal(2, 3, 20, by=1.0), normal(2, 3, width - 1, by=1.0)]
    wants, true_grads = oracle.run(oracle.causal_conv1d, inputs, cotangents)
    absolute = {k: v.abs() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    sizes, grad_sizes = oracle.run(oracle.causal_conv1d, absolute, [g.abs() for g in cotangents])
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    # The slope of silu at the rounded sum of large terms that cancel is another one: then only finite is asked.
    steep = activation is not None and scales[0] * scales[1] > 1
    for backend in every_backend():
        outputs = fastlvm.causal_conv1d(**{**inputs, **leaves}, return_final_state=True, backend=backend)
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        expect_close(outputs[0], wants[0], sizes[0], sizes[0] <= LARGEST, FORWARD, "out")
        assert torch.equal(outputs[1].double(), wants[1])
        for name, grad in zip(leaves, grads, strict=True):
            tolerance = LARGEST if steep else GRADIENT
            expect_close(grad, true_grads[name], grad_sizes[name], grad_sizes[name] <= LARGEST, tolerance, f"d{name}")
