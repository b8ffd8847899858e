"""torch.func and forward-mode AD over the ops: right, or refused in one sentence, never silently zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fastlvm

from . import ssd_cases, steps
from .cases import Conv, Scan
from .steps import copied

WHOLE = {"ssm_scan": Scan(), "causal_conv1d": Conv(), "ssd_scan": ssd_cases.Ssd()}
CASES = WHOLE | {case.name: case for case in steps.BASIC}
TENSORS = [(name, key) for name, case in CASES.items() for key, x in case.inputs().items() if torch.is_tensor(x)]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
whole = pytest.mark.parametrize("name", WHOLE)
step = pytest.mark.parametrize("name", [name for name in CASES if name not in WHOLE])
argument = pytest.mark.parametrize(("name", "key"), TENSORS)
stepped = pytest.mark.parametrize(("name", "key"), [pair for pair in TENSORS if pair[0] not in WHOLE])


def _lead(name):
    return "u" if name == "ssm_scan" else "x"


def _function(name, key, backend):
    """The op as a function of one argument, of both its results; and that argument."""
    inputs = CASES[name].inputs(torch.float64, torch.float64)

    def function(x):
        args = copied(inputs) | {key: x.clone()}
        if name in WHOLE:
            return getattr(fastlvm, name)(**args, return_final_state=True, backend=backend)
        return getattr(fastlvm, name)(**args, backend=backend), args["state"]

    return function, inputs[key]


def _loss(name, key, backend):
    function, x = _function(name, key, backend)
    return lambda x: sum(y.sin().sum() for y in function(x)), x


def _refused(call, name, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "\n" not in message, message
    for part in parts:
        assert part in message, message


def _dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


@argument
def test_forward_mode_is_refused(name, key):
    function, x = _function(name, key, "cpu")
    parts = (f"{key} carries a tangent", 'backend="reference"', *(["reverse mode"] if name in WHOLE else []))
    _refused(lambda: torch.func.jvp(function, (x,), (torch.ones_like(x),)), name, *parts)
    _refused(lambda: torch.func.jacfwd(function)(x), name, *parts)
    _refused(lambda: _dual(function, x), name, *parts)


@argument
def test_forward_mode_of_the_reference_is_right(name, key):
    """Against differences of what the kernels give."""
    function, x = _function(name, key, "cpu")
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    above, below = (function(x + h * tangent) for h in (1e-6, -1e-6))
    _, got = torch.func.jvp(_function(name, key, "reference")[0], (x,), (tangent,))
    want = tuple((a - b) / 2e-6 for a, b in zip(above, below, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@whole
def test_forward_mode_is_refused_beside_reverse_mode(name):
    loss, x = _loss(name, _lead(name), "cpu")
    _refused(lambda: torch.func.hessian(loss)(x), name, "carries a tangent")
    _refused(lambda: torch.func.jvp(torch.func.grad(loss), (x,), (x,)), name, "carries a tangent")
    _refused(lambda: _dual(loss, x.clone().requires_grad_()), name, "carries a tangent")


@pytest.mark.parametrize("name", CASES)
def test_a_tangent_from_further_out_is_refused(name):
    """It belongs to the outer transform; the inner one knows nothing of it."""
    function, x = _function(name, _lead(name), "cpu")

    def inner(x):
        return torch.func.grad(lambda y: (function(x)[0] * y).sum())(torch.ones_like(x))

    _refused(lambda: torch.func.jvp(inner, (x,), (x,)), name, "carries a tangent")


@pytest.mark.parametrize("name", CASES)
def test_a_dual_level_without_tangents_runs(name):
    function, x = _function(name, _lead(name), "cpu")
    with forward_ad.dual_level():
        got = function(x)
    assert all(torch.equal(g, w) for g, w in zip(got, function(x), strict=True))


def _grad(loss, x):
    return torch.func.grad(loss)(x)


def _vjp(loss, x):
    value, pull = torch.func.vjp(loss, x)
    return torch.stack([value, *pull(torch.ones_like(value))[0].flatten()])


def _jacrev(loss, x):
    return torch.func.jacrev(lambda x: torch.stack([loss(x), loss(2 * x)]))(x)


def _second(loss, x):
    return torch.func.grad(lambda x: torch.func.grad(loss)(x).sin().sum())(x)


def _per_sample(loss, x):
    return torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]))


@whole
@pytest.mark.parametrize("transform", [_grad, _vjp, _jacrev, _second, _per_sample])
def test_reverse_mode_of_torch_func(name, transform):
    for key in [key for owner, key in TENSORS if owner == name]:
        got, want = (transform(*_loss(name, key, backend)) for backend in ("cpu", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=key)


@whole
def test_jacrev_of_both_results(name):
    (got, x), (want, _) = (_function(name, _lead(name), b) for b in ("cpu", "reference"))
    torch.testing.assert_close(torch.func.jacrev(got)(x), torch.func.jacrev(want)(x), rtol=1e-9, atol=1e-9)


@whole
def test_vmap_is_the_loop(name):
    for key in [key for owner, key in TENSORS if owner == name]:
        function, x = _function(name, key, "cpu")
        got = torch.func.vmap(function)(torch.stack([x, x / 2]))
        want = [torch.stack(pair) for pair in zip(function(x), function(x / 2), strict=True)]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), key


@whole
def test_vmap_in_vmap_over_every_argument(name):
    """The inner axis last and the outer one first."""
    inputs = WHOLE[name].inputs()
    keys = [key for owner, key in TENSORS if owner == name]

    def function(*xs):
        args = {**inputs, **dict(zip(keys, xs, strict=True))}
        return getattr(fastlvm, name)(**args, return_final_state=True, backend="cpu")

    factors = torch.arange(1.0, 7.0).view(2, 3) / 4
    xs = [torch.stack([torch.stack([inputs[key] * f for f in row], -1) for row in factors]) for key in keys]
    got = torch.func.vmap(torch.func.vmap(function, in_dims=-1))(*xs)
    for i, j in [(i, j) for i in range(2) for j in range(3)]:
        want = function(*(x[i, ..., j] for x in xs))
        assert all(torch.equal(g[i, j], w) for g, w in zip(got, want, strict=True)), (i, j)


@pytest.mark.parametrize("key", ["u", "A", "cu_seqlens"])
def test_vmap_of_packed_sequences(key):
    inputs = Scan(batch=1, options=()).inputs() | {"cu_seqlens": torch.tensor([0, 2, 6])}
    other = torch.tensor([0, 5, 6]) if key == "cu_seqlens" else inputs[key] / 2
    got = torch.func.vmap(lambda x: fastlvm.ssm_scan(**{**inputs, key: x}))(torch.stack([inputs[key], other]))
    assert torch.equal(got[0], fastlvm.ssm_scan(**inputs))
    assert torch.equal(got[1], fastlvm.ssm_scan(**{**inputs, key: other}))


@whole
def test_gradients_of_weights_for_every_sample(name):
    """The loop over samples, by autograd."""
    lead = _lead(name)
    inputs = WHOLE[name].inputs()
    weights = {key: inputs[key] for key in ("A", "D", "weight", "bias") if key in inputs}
    samples = torch.stack([inputs[lead], inputs[lead].flip(0), inputs[lead] / 2])

    def loss(weights, sample):
        return getattr(fastlvm, name)(**{**inputs, **weights, lead: sample}, backend="cpu").square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, samples)
    for i, sample in enumerate(samples):
        leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
        want = torch.autograd.grad(loss(leaves, sample), list(leaves.values()))
        assert all(torch.equal(got[key][i], w) for key, w in zip(leaves, want, strict=True)), i


@stepped
def test_vmap_of_a_step_is_refused(name, key):
    function, x = _function(name, key, "cpu")
    _refused(lambda: torch.func.vmap(function)(torch.stack([x, x])), name, "vmap", "batch axis of every array")


@step
def test_a_step_inside_a_vmap_that_does_not_reach_it(name):
    function, x = _function(name, "x", "cpu")
    want, _ = function(x)
    got = torch.func.vmap(lambda k: k * function(x)[0])(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert torch.equal(got, torch.stack([want, 2 * want]))


@stepped
def test_a_refused_step_leaves_its_state_alone(name, key):
    inputs = CASES[name].inputs()
    before = inputs["state"].clone()
    op = getattr(fastlvm, name)
    _refused(lambda: _dual(lambda x: op(**{**inputs, key: x}, backend="cpu"), inputs[key]), name, "carries a tangent")
    assert torch.equal(inputs["state"], before)


class _Block(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_or_exported_op_does_not_lose_a_tangent(name):
    function, x = _function(name, _lead(name), "cpu")
    torch._dynamo.reset()
    _refused(lambda: _dual(torch.compile(function, backend="aot_eager"), x), name, "carries a tangent")
    exported = torch.export.export(_Block(function), (x,)).module()
    _refused(lambda: _dual(exported, x), name, "carries a tangent")
    _refused(lambda: torch.func.jvp(exported, (x,), (x,)), name, "carries a tangent")


@whole
def test_torch_func_says_that_it_stops_at_exported_code(name):
    loss, x = _loss(name, _lead(name), "cpu")
    exported = torch.export.export(_Block(loss), (x,)).module()
    _refused(lambda: torch.func.grad(exported)(x), name, "torch.func cannot differentiate", "torch.autograd.grad")
    torch.testing.assert_close(
        torch.autograd.grad(exported(x.requires_grad_()), x)[0], torch.func.grad(loss)(x.detach())
    )


@whole
def test_vmap_compiles_and_torch_func_in_compiled_code_says_why_not(name):
    function, x = _function(name, _lead(name), "cpu")
    loss, _ = _loss(name, _lead(name), "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda xs: torch.func.vmap(function)(xs), backend="aot_eager", fullgraph=True)
    xs = torch.stack([x, x / 2])
    assert all(torch.equal(g, w) for g, w in zip(compiled(xs), torch.func.vmap(function)(xs), strict=True))
    sentence = f"{name}: torch.func cannot differentiate what torch.compile or torch.export holds; use torch.autograd"
    with pytest.raises(RuntimeError, match=sentence):
        torch.compile(lambda x: torch.func.grad(loss)(x), backend="aot_eager", fullgraph=True)(x)


@whole
def test_double_backward_holds_no_graph_that_nobody_asked_for(name):
    loss, x = _loss(name, _lead(name), "cpu")
    [first] = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    [second] = torch.autograd.grad(first.sin().sum(), x)
    assert not second.requires_grad
