"""What every model has in common: its start, its steps, its layer list, and that it can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_small import CONTEXT, DIM, NAMES, STACKS, awake, build, contexts
from torch.nn import functional as F

from fastlvm.errors import InputError
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import PRECISIONS, pack

ORDER_BLIND = "amn"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, CONTEXT])
def test_starts_as_the_recency_mixture(name, length):
    model = build(name, decay=0.4).eval()
    decay = 1.0 if name == ORDER_BLIND else 0.4
    weights = torch.tensor([decay ** (length - 1 - i) for i in range(length)])
    x = contexts(length=length)
    expected = F.normalize((x * (weights / weights.sum())[:, None]).sum(1), dim=-1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_forward_of_as_many_vectors(name):
    model = awake(build(name)).eval()
    x = contexts()
    state = model.start(len(x))
    with torch.no_grad():
        for t in range(CONTEXT):
            torch.testing.assert_close(model.step(x[:, t], state), model(x[:, : t + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in STACKS if name != "transformer"])
def test_steps_go_on_beyond_the_context(name):
    """As a longer model's would whose weights are the same, but for the mixture, which sees its own context."""
    short, long = awake(build(name, residual=False)).eval(), build(name, residual=False, context=9).eval()
    long.load_state_dict(short.state_dict())
    x = contexts(length=9)
    state = short.start(len(x))
    with torch.no_grad():
        for t in range(9):
            found = short.step(x[:, t], state)
        torch.testing.assert_close(found, long(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STACKS)
def test_blocks_are_causal(name):
    for block in awake(build(name)).blocks:
        h = torch.randn(2, CONTEXT, 16)
        changed = h.clone()
        changed[:, 3:] += torch.randn(2, 2, 16)
        torch.testing.assert_close(block(h)[:, :3], block(changed)[:, :3], atol=1e-6, rtol=1e-6)
        assert (block(h)[:, 3:] - block(changed)[:, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_order_counts_but_for_the_order_blind(name):
    model, x = awake(build(name)).eval(), contexts()
    apart = (model(x) - model(x.flip(1))).abs().max()
    assert apart < 1e-6 if name == ORDER_BLIND else apart > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_position_reaches_the_output_and_every_weight_learns(name):
    model, x = awake(build(name)), contexts().requires_grad_()
    (model(x) * contexts(seed=5)[:, 0]).sum().backward()
    assert bool((x.grad.abs().sum(dim=(0, 2)) > 0).all())
    for which, weight in model.named_parameters():
        if weight.requires_grad and which != "pool.key.bias":  # it moves all scores alike
            assert weight.grad is not None and float(weight.grad.abs().sum()) > 0, which


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_native_predictor_equals_it(name, precision):
    model = awake(build(name)).eval()
    plan = Plan(model.describe(), CONTEXT, DIM)
    weights = {which: tensor.numpy() for which, tensor in model.state_dict().items()}
    assert plan.tensors() == {which: array.shape for which, array in weights.items()}
    forward = Forward(plan, pack(plan, weights, precision))
    x = contexts(batch=40)
    with torch.no_grad():
        wanted = model(x).numpy()
    found = forward(x.numpy())
    if precision == "fp32":
        assert np.abs(found - wanted).max() <= 1e-5
    assert np.median((found * wanted).sum(-1)) >= {"fp32": 0.999999, "bf16": 0.9999, "int8": 0.999}[precision]


@pytest.mark.parametrize("name", [name for name in NAMES if name != ORDER_BLIND])
def test_the_native_predictor_streams_it(name):
    model = awake(build(name)).eval()
    plan = Plan(model.describe(), CONTEXT, DIM)
    weights = {which: tensor.numpy() for which, tensor in model.state_dict().items()}
    native, x = Forward(plan, pack(plan, weights, "fp32")).model, contexts(batch=1)
    state, own = np.zeros(native.state_size, np.float32), model.start(1)
    out = np.empty(DIM, np.float32)
    for t in range(CONTEXT):
        native.step(x[0, t].numpy(), out, state, t, 1)
        np.testing.assert_allclose(out, model.step(x[:, t], own)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixture"])
def test_it_can_learn_64_windows_by_heart(name):
    """R@1 of 1 over 64 random windows, whose targets have nothing to do with their contexts."""
    model = build(name, d_model=32, d_ff=64, hidden=32)
    x, targets = contexts(batch=64, seed=7), contexts(batch=64, seed=8)[:, 0]
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(400):
        scores = model(x) @ targets.T
        if bool((scores.argmax(1) == torch.arange(64)).all()):
            return
        optimizer.zero_grad()
        F.cross_entropy(scores / 0.05, torch.arange(64)).backward()
        optimizer.step()
    raise AssertionError(f"R@1 is {float((scores.argmax(1) == torch.arange(64)).float().mean()):.3f}")


def test_a_mixture_without_its_mixture_is_refused():
    with pytest.raises(InputError, match="residual is False"):
        build("mixture", residual=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, DIM), (2, 0, DIM), (2, 6, DIM), (2, 5, DIM - 1)])
def test_wrong_contexts_are_refused(name, shape):
    with pytest.raises(InputError, match="the model takes"):
        build(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_touch(name):
    model, x = awake(build(name)).eval(), contexts(batch=4)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-6, rtol=1e-6)
