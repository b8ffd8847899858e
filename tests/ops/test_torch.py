"""The torch custom ops: opcheck, gradcheck, torch.compile, torch.export, and the corners of autograd."""

from __future__ import annotations

import pytest
import torch

import fastlvm

from .cases import Conv, Scan, custom_ops, gradients
from .oracle import relative_error

SCANS = [
    Scan(state=5),
    Scan(options=()),
    Scan(B=2, C="dn", options=("z", "initial_state")),
    Scan(length=0),
    Scan(batch=0),
]
CONVS = [Conv(), Conv(options=()), Conv(width=1), Conv(length=2), Conv(length=0)]
OPS = [(fastlvm.ssm_scan, case) for case in SCANS] + [(fastlvm.causal_conv1d, case) for case in CONVS]
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "x", "weight", "bias", "initial_state")


def _id(value):
    return str(value) if isinstance(value, (Scan, Conv)) else getattr(value, "__name__", None)


def _leaves(case, dtype=torch.float32, weights=None):
    inputs = case.inputs(dtype, weights or dtype)
    return {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _raw(op, case, dtype=torch.float32):
    """The custom op itself and its positional arguments."""
    inputs = _leaves(case, dtype)
    if op is fastlvm.ssm_scan:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
        inputs.setdefault("delta_softplus", False)
        return *custom_ops("ssm_scan"), [inputs.get(name) for name in names]
    args = [
        inputs["x"],
        inputs["weight"],
        inputs.get("bias"),
        "activation" in inputs,
        inputs.get("initial_state"),
        None,
    ]
    return *custom_ops("causal_conv1d"), args


@pytest.mark.parametrize(("op", "case"), OPS, ids=_id)
def test_opcheck(op, case):
    forward, _, args = _raw(op, case)
    for flags in [(True, True), (False, False)] if op is fastlvm.ssm_scan else [()]:  # final state, checkpoints
        torch.library.opcheck(forward, (*args, *flags))


@pytest.mark.parametrize(("op", "case"), [OPS[0], OPS[2], (fastlvm.causal_conv1d, CONVS[0])], ids=_id)
def test_opcheck_of_the_backward(op, case):
    _, backward, args = _raw(op, case)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    wanted = [a is not None for a in args[:-1] if not isinstance(a, bool)]
    out, state = (g for g in case.cotangents())
    kept = [None] if op is fastlvm.ssm_scan else []  # checkpoints
    torch.library.opcheck(backward, (out, state, *plain, *kept, wanted))
    torch.library.opcheck(backward, (out, None, *plain, *kept, [i == 0 for i in range(len(wanted))]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("state", "kept"), [(5, True), (33, False)])
def test_checkpoints_of_the_forward_change_no_gradient(state, kept, packed, monkeypatch):
    from fastlvm.ops.ssm_scan import autograd

    case = Scan(batch=1 if packed else 2, length=70, state=state)
    offsets = torch.tensor([0, 31, 31, 70], dtype=torch.int32) if packed else None

    def grads():
        inputs = _leaves(case)
        if packed:
            inputs["initial_state"] = torch.zeros(3, *inputs["initial_state"].shape[1:]).requires_grad_()
        out = fastlvm.ssm_scan(**inputs, cu_seqlens=offsets, backend="cpu")
        out.square().sum().backward()
        return [v.grad for v in inputs.values() if isinstance(v, torch.Tensor)]

    inputs = _leaves(case)
    assert autograd._keeps_checkpoints(inputs["u"], inputs["A"], tuple(inputs.values())) == kept
    with_checkpoints = grads()
    monkeypatch.setattr(autograd, "_keeps_checkpoints", lambda *_: False)
    for got, want in zip(with_checkpoints, grads(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("op", "case", "names"), [(fastlvm.ssm_scan, Scan(), ("u", "delta", "z")), (fastlvm.causal_conv1d, Conv(), ("x",))]
)
def test_a_channel_last_input_gives_a_channel_last_gradient(op, case, names, dtype):
    """So that the linear layer before reads it in order; and the values do not depend on the layout."""
    contiguous, inputs = _leaves(case, dtype), _leaves(case, dtype)
    for name in names:
        inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def grads(given):  # not .grad, which takes the layout of its leaf whatever the op returns
        loss = op(**given, backend="cpu").float().square().sum()
        return torch.autograd.grad(loss, [given[name] for name in names])

    for name, grad, want in zip(names, grads(inputs), grads(contiguous), strict=True):
        assert (grad.stride(), grad.dtype) == (inputs[name].stride(), dtype)
        assert torch.equal(grad, want)


def test_opcheck_with_strides():
    forward, _, args = _raw(fastlvm.ssm_scan, Scan())
    args[0] = args[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    args[1] = args[1].detach()[:, :1].expand(-1, 4, -1)
    torch.library.opcheck(forward, (*args, True))


def _flat(op, case):
    """`op` as a function of its float64 tensors alone, and those."""
    inputs = _leaves(case, torch.float64)
    names = [name for name in TENSORS if name in inputs]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def function(*tensors):
        return op(**dict(zip(names, tensors, strict=True)), **rest, return_final_state=True, backend="cpu")

    return function, tuple(inputs[name] for name in names)


@pytest.mark.parametrize(("op", "case"), [p for p in OPS if p[1].length > 0 and p[1].batch > 0], ids=_id)
def test_gradcheck(op, case):
    assert torch.autograd.gradcheck(*_flat(op, case))


SMALL = [
    (fastlvm.ssm_scan, Scan(batch=1, channels=2, state=2, length=3)),
    (fastlvm.ssm_scan, Scan(batch=1, channels=2, state=2, length=3, B=1, C="dn", options=())),
    (fastlvm.causal_conv1d, Conv(batch=1, channels=2, width=3, length=3)),
]


@pytest.mark.parametrize(("op", "case"), SMALL, ids=_id)
def test_double_backward(op, case):
    assert torch.autograd.gradgradcheck(*_flat(op, case))


def test_third_derivative_is_not_lost():
    function, tensors = _flat(fastlvm.ssm_scan, SMALL[1][1])

    def first(*xs):
        return torch.autograd.grad(function(*xs)[0].sum(), xs, create_graph=True)

    def second(*xs):
        return torch.autograd.grad(sum(g.sum() for g in first(*xs)), xs, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors)


def _trained(op, case, compiler=None):
    """Outputs and gradients through `fastlvm.<op>` itself, validation and dispatch included."""

    def step(inputs, weights):
        out, state = op(**inputs, return_final_state=True)
        return (out * weights[0]).sum() + (state * weights[1]).sum(), out, state

    inputs = _leaves(case)
    run = step if compiler is None else torch.compile(step, fullgraph=True, backend=compiler)
    loss, out, state = run(inputs, case.cotangents())
    tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    if not loss.requires_grad:
        return out, state
    return out, state, *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize(("op", "case"), [*OPS[:3], *OPS[5:8]], ids=_id)
def test_compile_traces_the_whole_call(op, case):
    torch._dynamo.reset()
    for eager, compiled in zip(_trained(op, case), _trained(op, case, "aot_eager"), strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    for op, case in [OPS[0], (fastlvm.causal_conv1d, CONVS[0])]:
        for eager, compiled in zip(_trained(op, case), _trained(op, case, "inductor"), strict=True):
            assert relative_error(compiled, eager) <= 1e-6


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(fastlvm.ssm_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in [(2, 6), (3, 9), (5, 17)]:
        inputs = Scan(batch=batch, length=length).inputs()
        assert torch.equal(compiled(**inputs), fastlvm.ssm_scan(**inputs))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile_with_a_pinned_backend(monkeypatch, backend):
    torch._dynamo.reset()
    monkeypatch.setenv("FASTLVM_BACKEND", backend)
    case = Scan(length=3)
    compiled = torch.compile(fastlvm.ssm_scan, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**case.inputs()), fastlvm.ssm_scan(**case.inputs())) <= 1e-6


def test_compile_refuses_bad_input():
    torch._dynamo.reset()
    inputs = Scan().inputs()
    inputs["delta"] = inputs["delta"][:, :, :-1]
    compiled = torch.compile(fastlvm.ssm_scan, backend="aot_eager")
    with pytest.raises(ValueError, match="delta has shape"):
        compiled(**inputs)


class _Block(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, inputs):
        return self.op(**inputs, return_final_state=True)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize(("op", "case"), [OPS[0], OPS[2], (fastlvm.causal_conv1d, CONVS[0])], ids=_id)
def test_export(op, case, strict):
    torch._dynamo.reset()
    inputs = case.inputs()
    program = torch.export.export(_Block(op), (inputs,), strict=strict)
    assert f"fastlvm.{op.__name__}" in str(program.graph)
    for got, want in zip(program.module()(inputs), op(**inputs, return_final_state=True), strict=True):
        assert torch.equal(got, want)


def test_export_with_dynamic_sizes():
    b, length = torch.export.Dim("b", min=1, max=64), torch.export.Dim("length", min=1, max=512)
    inputs = Scan(options=("D", "z")).inputs()
    sizes = {k: {0: b, 2: length} for k in ("u", "delta", "B", "C", "z")} | {"A": None, "D": None}
    program = torch.export.export(_Block(fastlvm.ssm_scan), (inputs,), dynamic_shapes=({k: sizes[k] for k in inputs},))
    other = Scan(batch=3, length=11, options=("D", "z")).inputs()
    assert torch.equal(program.module()(other)[0], fastlvm.ssm_scan(**other))


@pytest.mark.parametrize(("op", "case"), [OPS[0], (fastlvm.causal_conv1d, CONVS[0])], ids=_id)
def test_gradients_of_a_subset(op, case, backend):
    """Each input's gradient alone is the one it has among all; the others stay None."""
    _, full = gradients(op, case, backend=backend)
    for name, want in full.items():
        inputs = case.inputs()
        inputs[name].requires_grad_()
        outputs = op(**inputs, return_final_state=True, backend=backend)
        torch.autograd.backward([o for o in outputs if o.requires_grad], _cotangents(outputs, case))
        assert relative_error(inputs[name].grad, want) <= 1e-6, name
        assert all(v.grad is None for k, v in inputs.items() if k != name and isinstance(v, torch.Tensor))


def _cotangents(outputs, case):
    return [g for o, g in zip(outputs, case.cotangents(), strict=True) if o.requires_grad]


@pytest.mark.parametrize(("op", "case"), [OPS[0], (fastlvm.causal_conv1d, CONVS[0])], ids=_id)
def test_no_graph_where_none_is_wanted(op, case, backend):
    with torch.no_grad():
        assert not op(**_leaves(case), backend=backend).requires_grad
    with torch.inference_mode():
        assert not op(**case.inputs(), backend=backend).requires_grad
    assert not op(**case.inputs(), backend=backend).requires_grad
    assert op(**_leaves(case), backend=backend).requires_grad


def test_gradients_of_strided_inputs(backend):
    """Expanded and transposed inputs: autograd folds the contiguous gradients back."""
    case = Scan(state=16)
    base = case.inputs()
    u = base["u"].transpose(1, 2).contiguous().requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    inputs = {**base, "u": u.transpose(1, 2), "delta_bias": bias.expand(4)}
    fastlvm.ssm_scan(**inputs, backend=backend).square().sum().backward()
    plain = {**base, "u": base["u"].clone().requires_grad_(), "delta_bias": torch.zeros(4, requires_grad=True)}
    fastlvm.ssm_scan(**plain, backend="reference").square().sum().backward()
    assert relative_error(u.grad.transpose(1, 2), plain["u"].grad) <= 1e-5
    assert relative_error(bias.grad, plain["delta_bias"].grad.sum()[None]) <= 1e-5


def test_autocast(backend):
    """A layer in bfloat16 before the op, float32 parameters in it, the state in float32."""
    case = Scan(state=16)
    inputs = _leaves(case)
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = layer(inputs["u"].transpose(1, 2)).transpose(1, 2)
        out, state = fastlvm.ssm_scan(**{**inputs, "u": u}, return_final_state=True, backend=backend)
    assert (u.dtype, out.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    rounded = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    want = fastlvm.ssm_scan(**{**rounded, "u": u.detach().float()}, return_final_state=True, backend=backend)
    assert relative_error(state, want[1]) <= 1e-6
    assert relative_error(out, want[0]) <= 4e-3
    (out.float().sum() + state.sum()).backward()
    assert inputs["A"].grad.dtype == torch.float32
    assert layer.weight.grad is not None


def test_lazily_negated_memory(backend):
    """The imaginary part of a conjugate carries its sign as a flag, not in memory."""
    inputs = Scan().inputs()
    inputs["u"] = torch.complex(inputs["u"], inputs["u"]).conj().imag
    assert inputs["u"].is_neg()
    plain = {**inputs, "u": inputs["u"].resolve_neg()}
    assert torch.equal(fastlvm.ssm_scan(**inputs, backend=backend), fastlvm.ssm_scan(**plain, backend=backend))


def test_checkpointing_recomputes_the_same():
    case = Scan(state=16)
    _, want = gradients(fastlvm.ssm_scan, case)
    inputs = _leaves(case)
    outputs = torch.utils.checkpoint.checkpoint(
        lambda: fastlvm.ssm_scan(**inputs, return_final_state=True), use_reentrant=False
    )
    torch.autograd.backward(outputs, case.cotangents())
    assert all(torch.equal(inputs[name].grad, grad) for name, grad in want.items())


def test_meta_tensors_have_shapes_only():
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in Scan().inputs().items()}
    out, state = fastlvm.ssm_scan(**inputs, return_final_state=True)
    assert (out.device.type, out.shape, state.shape) == ("meta", (2, 4, 6), (2, 4, 5))
