"""Every layer type on every instruction set, held to PyTorch in float64 with the same weights."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from fastlvm import _C
from fastlvm.errors import InputError
from fastlvm.predictor.blocks import LAYERS
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.layers import SCALE, write_layer
from fastlvm.predictor.pack import PRECISIONS, pack, to_bf16, to_int8

from .natives import (
    GELU,
    L2_NORM,
    LAST,
    PRODUCTS,
    ROUNDING,
    Case,
    attention,
    forward,
    layer_norm,
    linear,
    mamba,
    mamba2,
    pinned,
    random_contexts,
    random_weights,
    recurrent,
    residual,
    rms_norm,
    twin,
    unpacked,
)

WINDOWS = 65  # more rows than one pass holds
# Of the window in the middle, and of the worst: a norm of numbers near zero makes much of a small error.
LEAST_COSINE = {"bf16": (0.99995, 0.996), "int8": (0.9995, 0.98)}


def positions(context, dim=17):
    return {"type": "positions", "prefix": "p", "context": context, "dim": dim}


MLP = residual(layer_norm("n"), linear("up", 17, 40), GELU, linear("down", 40, 17))
ATTENDING = residual(layer_norm("b"), *attention())

# Layers that give a sequence [n, context, 17] for one.
SEQUENCES = {
    "linear": Case([linear("l", 17, 33), linear("k", 33, 17, bias=False)]),
    "rms_norm": Case([rms_norm("n")]),
    "rms_norm, large eps": Case([rms_norm("n", eps=0.5)]),
    "layer_norm": Case([layer_norm("n")]),
    "gelu": Case([linear("l", 17, 17), GELU]),
    "l2_norm": Case([L2_NORM]),
    "positions": Case([positions(5)]),
    "mamba": Case([mamba()]),
    "mamba, one vector": Case([mamba()], context=1),
    "mamba, 8 vectors": Case([mamba()], context=8),
    "mamba, 9 vectors": Case([mamba()], context=9),
    "mamba, 40 vectors": Case([mamba()], context=40),
    "mamba, convolution of 1": Case([mamba(conv=1)]),
    "mamba, convolution of 7": Case([mamba(conv=7)]),
    "mamba, convolution of 7 over 9 vectors": Case([mamba(conv=7)], context=9),
    "mamba, even sizes": Case([mamba(inner=48, state=16, rank=8)]),
    "mamba, least sizes": Case([mamba(inner=1, state=1, rank=1)]),
    "mamba, large state": Case([mamba(inner=33, state=130, rank=3)], context=9),
    "mamba, twice": Case([mamba("m"), mamba("k", inner=20, state=16)]),
    "mamba2": Case([mamba2()]),
    "mamba2, 2 groups": Case([mamba2(groups=2)]),
    "mamba2, one vector": Case([mamba2(groups=2)], context=1),
    "mamba2, 9 vectors": Case([mamba2(groups=2, conv=7)], context=9),
    "mamba2, 140 vectors": Case([mamba2(groups=2)], context=140),
    "mamba2, convolution of 1": Case([mamba2(conv=1)]),
    "mamba2, even sizes": Case([mamba2(heads=2, head_dim=16, state=16)]),
    "mamba2, least sizes": Case([mamba2(heads=1, head_dim=1, state=1)]),
    "mamba2, a group per head": Case([mamba2(heads=3, groups=3, head_dim=17)]),
    "attention": Case(attention()),
    "attention, window of 1": Case(attention(window=1)),
    "attention, window larger than the context": Case(attention(window=1 << 20)),
    "attention, one head": Case(attention(heads=1, head_dim=17, window=2)),
    "attention, heads of 1": Case(attention(heads=7, head_dim=1)),
    "attention, 40 vectors": Case(attention(window=9, head_dim=16), context=40),
    "gru": Case([recurrent("gru")]),
    "gru, other width": Case([recurrent("gru", hidden=33), linear("l", 33, 17)], context=9),
    "gru, second of a module": Case([recurrent("gru"), recurrent("gru", suffix="l1")]),
    "lstm": Case([recurrent("lstm")]),
    "lstm, other width": Case([recurrent("lstm", hidden=5), linear("l", 5, 17)], context=9),
    "lstm, one cell": Case([recurrent("lstm", hidden=1), linear("l", 1, 17)], context=1),
    "residual, gelu": Case([MLP]),
    "residual, attention": Case([ATTENDING]),
    "residual, mamba": Case([residual(mamba())]),
    "residual, narrow": Case([residual(linear("l", 17, 1), linear("k", 1, 17))]),
    "transformer": Case([positions(9), ATTENDING, MLP, rms_norm("r")], context=9),
    "wide": Case([mamba(dim=70, inner=150, rank=9), mamba2("k", dim=70, heads=5, head_dim=33)], dim=70),
}
# Layers that end with one vector in another way than by keeping the newest position of a sequence.
ENDS = {
    "context_attention": Case(
        [{"type": "context_attention", "prefix": "c", "dim": 17, "inner": 9}, linear("l", 34, 17)]
    ),
    "context_attention, one vector": Case(
        [{"type": "context_attention", "prefix": "c", "dim": 17, "inner": 16}, linear("l", 34, 17)], context=1
    ),
    "context_attention, 40 vectors": Case(
        [mamba(), {"type": "context_attention", "prefix": "c", "dim": 17, "inner": 1}, linear("l", 34, 17)], context=40
    ),
    "flatten": Case([{"type": "flatten", "context": 5}, linear("l", 85, 17)]),
    "flatten, one vector": Case([{"type": "flatten", "context": 1}], context=1),
    "flatten after other layers": Case(
        [mamba(), linear("e", 17, 20), {"type": "flatten", "context": 9}, GELU, linear("l", 180, 17)], context=9
    ),
    "mixture": Case([{"type": "mixture", "prefix": "x", "context": 5}]),
    "mixture after other layers": Case(
        [linear("l", 17, 17), {"type": "mixture", "prefix": "x", "context": 9}, L2_NORM], context=9
    ),
    "recency_mixture": Case([LAST, linear("l", 17, 17), {"type": "recency_mixture", "prefix": "x", "context": 5}]),
    "recency_mixture of one": Case([LAST, {"type": "recency_mixture", "prefix": "x", "context": 1}], context=1),
    "recency_mixture after other layers": Case(
        [mamba(), LAST, rms_norm("n"), {"type": "recency_mixture", "prefix": "x", "context": 9}, L2_NORM], context=9
    ),
    "last, then each layer of one vector": Case(
        [linear("e", 17, 40), LAST, rms_norm("r", 40), GELU, layer_norm("k", 40), L2_NORM, linear("h", 40, 17), MLP]
    ),
    "one number": Case([linear("l", 1, 3), linear("k", 3, 1), LAST], dim=1),
}
CASES = {name: Case([*case.entries, LAST], case.context, case.dim) for name, case in SEQUENCES.items()} | ENDS


@pytest.fixture(params=PRODUCTS, ids=str)
def products(request):
    with pinned(request.param) as names:
        yield names


@functools.cache
def wanted(name, precision):
    """Weights of a case, contexts, and what the twin makes of them."""
    case = CASES[name]
    weights, context = random_weights(case.plan), random_contexts(WINDOWS, case)
    found = twin(case.plan.layers, unpacked(case, weights, precision), torch.from_numpy(context).double())
    return weights, context, found.numpy()


@functools.cache
def wanted_sequence(name, n=3):
    """The same for the first contexts, with every position that arrives at the layer `last`."""
    case = CASES[name]
    weights, context, _ = wanted(name, "fp32")
    every = twin(case.plan.layers[:-1], unpacked(case, weights, "fp32"), torch.from_numpy(context[:n]).double())
    return weights, context[:n], every.numpy()


def error(found, right):
    return np.abs(found - right).max() / np.abs(right).max()


def cosines(found, right):
    found = found.astype(np.float64)
    return (found * right).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(right, axis=1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, precision, products):
    weights, context, right = wanted(name, precision)
    run = forward(CASES[name], weights, precision)
    found = run(context)
    assert found.dtype == np.float32 and found.shape == right.shape
    if precision == "int8" or products[precision] in ROUNDING:  # these round the activations as well
        alike = cosines(found, right)
        middle, least = LEAST_COSINE[precision]
        assert np.median(alike) >= middle and alike.min() >= least
    else:
        assert error(found, right) <= 1e-5
    for n in (1, 2):
        assert run(context[:n]).tobytes() == found[:n].tobytes()


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_position_equals_torch(name, products):
    """The mixture brings each position in turn to the end, beside the newest."""
    case = CASES[name]
    weights, context, right = wanted_sequence(name)
    natives = [layer.native(weights) for layer in case.plan.layers[:-1]]
    for at in np.unique(np.linspace(0, case.context - 1, 9).astype(int)):
        mixture = ("recency_mixture", {"logits": np.where(np.arange(case.context) == at, 0, -1e4).astype(np.float32)})
        model = _C.Model(case.context, case.dim, [*natives, ("context", {}), ("last", {}), mixture])
        out = np.empty((len(context), case.dim), np.float32)
        model.run(context, out)
        assert error(out, right[:, at] + right[:, -1]) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_large_and_small_contexts_stay_numbers(name, products):
    weights, context, _ = wanted(name, "fp32")
    for precision in PRECISIONS:
        run = forward(CASES[name], weights, precision)
        for scale in (0, 1e-12, 1e4):
            assert np.isfinite(run(context[:2] * np.float32(scale))).all()


def test_gelu_is_that_of_the_error_function(products):
    x = np.concatenate([np.linspace(-14, 14, 4001), [1e-30, -1e-30, 1e30, -1e30, 3e38, -3e38]]).astype(np.float32)
    out = np.empty((len(x), 1), np.float32)
    _C.Model(1, 1, [("gelu", {}), ("last", {})]).run(x.reshape(-1, 1, 1), out)
    right = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    assert (np.abs(out[:, 0] - right) <= 2.5e-7 * np.maximum(np.abs(x), 1e-7)).all()


def test_windows_of_every_number_of_passes(products):
    case = CASES["transformer"]
    weights, context = random_weights(case.plan), random_contexts(150, case)
    run = forward(case, weights)
    alone = np.concatenate([run(context[i : i + 1]) for i in range(len(context))])
    for n in (0, 3, 34, 35, 36, 70, 71, 150):  # 35 of 9 positions are a pass
        assert run(context[:n]).tobytes() == alone[:n].tobytes()


@pytest.mark.parametrize("name", ("mamba", "mamba2, 2 groups", "gru", "context_attention"))
def test_precision_may_differ_from_matrix_to_matrix(name, products):
    case = CASES[name]
    weights, context, _ = wanted(name, "fp32")
    eights, halves = (pack(case.plan, weights, precision) for precision in ("int8", "bf16"))
    for matrix in case.plan.matrices():
        other = unpacked(case, weights, "bf16") | {matrix: unpacked(case, weights, "int8")[matrix]}
        right = twin(case.plan.layers, other, torch.from_numpy(context).double()).numpy()
        mixed = halves | {part: eights[part] for part in (matrix, matrix + SCALE)}
        assert np.median(cosines(Forward(case.plan, mixed)(context), right)) >= 0.9995


def test_every_layer_type_is_among_the_cases():
    def types(entries):
        return {kind for entry in entries for kind in (entry["type"], *types(entry.get("layers", ())))}

    assert {kind for case in CASES.values() for kind in types(case.entries)} == set(LAYERS)


@pytest.mark.parametrize("name", CASES)
def test_layers_survive_json(name):
    case = CASES[name]
    written = [write_layer(layer) for layer in case.plan.layers]
    again = Plan(json.loads(json.dumps(written)), case.context, case.dim)
    assert again.layers == case.plan.layers and again.tensors() == case.plan.tensors()


CONTEXT_ATTENTION = {"type": "context_attention", "prefix": "c", "dim": 17, "inner": 9}
MIXTURE = {"type": "recency_mixture", "prefix": "x", "context": 5}
ONE_OF_EACH = [
    linear("l", 17, 17, bias=True),
    rms_norm("n"),
    layer_norm("n"),
    mamba(),
    mamba2(),
    attention()[1],
    recurrent("gru", suffix="l0"),
    recurrent("lstm", suffix="l0"),
    GELU,
    positions(5),
    CONTEXT_ATTENTION,
    residual(GELU),
    LAST,
    MIXTURE,
    L2_NORM,
]
WRONG: dict[type, tuple] = {
    int: (0, -1, True, 3.0, "3", None, (1 << 20) + 1, 1 << 70),
    float: (0.0, -1e-5, float("nan"), float("inf"), "1e-5", None),
    str: ("", 7, None, ["m"]),
    bool: (1, 0, "true", None),
    list: ([], {}, None, "last", 1),
}


@pytest.mark.parametrize("entry", ONE_OF_EACH, ids=lambda entry: entry["type"])
def test_wrong_fields_are_refused_by_name(entry):
    kind = entry["type"]
    for name in entry.keys() - {"type"}:
        for value in WRONG[type(entry[name])]:
            with pytest.raises(InputError, match=f"layer 0 \\({kind}\\) has {name} = "):
                Plan([entry | {name: value}, LAST], 5, 17)
    with pytest.raises(InputError, match=f"layer 0 \\({kind}\\) has a field 'width'"):
        Plan([entry | {"width": 3}, LAST], 5, 17)


@pytest.mark.parametrize("entry", ONE_OF_EACH, ids=lambda entry: entry["type"])
def test_missing_fields_are_refused_by_name(entry):
    for name in entry.keys() - {"type", "bias", "suffix"}:
        with pytest.raises(InputError, match=f"layer 0 .*has {name} = None"):
            Plan([{key: value for key, value in entry.items() if key != name}, LAST], 5, 17)


@pytest.mark.parametrize(
    "entries, says",
    (
        ([linear("l", 16, 17), LAST], r"layer 0 \(linear\) takes 16 features, and 17 arrive"),
        ([linear("l", 17, 16), LAST], r"the last layer leaves \[None, 16\], and one vector of 17"),
        ([rms_norm("n", 16), LAST], "takes 16 features, and 17 arrive"),
        ([layer_norm("n", 16), LAST], "takes 16 features, and 17 arrive"),
        ([mamba(dim=16), LAST], r"layer 0 \(mamba_block\) takes 16 features, and 17 arrive"),
        ([mamba2(dim=16), LAST], r"layer 0 \(mamba2_block\) takes 16 features, and 17 arrive"),
        ([mamba2(heads=4, groups=3), LAST], "3 groups, which do not divide its 4 heads"),
        ([mamba2(heads=2, groups=4), LAST], "4 groups, which do not divide its 2 heads"),
        ([attention()[1], LAST], "takes 45 features, and 17 arrive"),
        ([*attention(heads=3)[:1], attention(heads=3)[1] | {"heads": 4}], "4 heads, which do not divide its 15"),
        ([recurrent("gru", dim=16), LAST], "takes 16 features, and 17 arrive"),
        ([recurrent("lstm", dim=16), LAST], "takes 16 features, and 17 arrive"),
        ([recurrent("gru", hidden=16), LAST], "leaves"),
        ([positions(4), LAST], "has 4 positions, and 5 arrive"),
        ([positions(6), LAST], "has 6 positions, and 5 arrive"),
        ([positions(5, dim=16), LAST], "takes 16 features, and 17 arrive"),
        ([CONTEXT_ATTENTION], r"leaves \[None, 34\]"),
        ([CONTEXT_ATTENTION | {"dim": 16}], "takes 16 features, and 17 arrive"),
        *(
            ([LAST, entry, LAST], r"layer 1 .*takes a sequence, and one vector arrives")
            for entry in (mamba(), mamba2(), recurrent("gru"), recurrent("lstm"), positions(5), CONTEXT_ATTENTION, LAST)
        ),
        ([LAST, *attention(), LAST], r"layer 2 \(attention\) takes a sequence"),
        ([MIXTURE, LAST], "adds 5 vectors of 17 to one such vector"),
        ([LAST, MIXTURE | {"context": 4}], "adds 4 vectors of 17 to one such vector"),
        ([LAST, linear("l", 17, 16), MIXTURE], "adds 5 vectors of 17 to one such vector"),
        ([residual(linear("l", 17, 16)), LAST], r"layer 0 \(residual\) adds \[5, 16\] to \[5, 17\]"),
        ([residual(LAST)], r"layer 0 \(residual\) adds \[None, 17\] to \[5, 17\]"),
        ([residual(CONTEXT_ATTENTION, linear("l", 34, 17))], "layer 0 .residual. adds"),
        ([LAST, residual(mamba())], r"layer 1 \(residual\) takes a sequence"),
        ([residual(GELU, residual(GELU)), LAST], r"layer 0.1 is a residual branch within one"),
        ([residual(GELU, {"type": "conv"}), LAST], r"layer 0.1 has type 'conv'"),
        ([residual(GELU, 7), LAST], r"layer 0.1 has type None"),
        ([residual(mamba() | {"d_state": 0}), LAST], r"layer 0.0 \(mamba_block\) has d_state = 0"),
        ([GELU], r"leaves \[5, 17\]"),
    ),
)
def test_layers_that_do_not_fit_are_refused(entries, says):
    with pytest.raises(InputError, match=says) as caught:
        Plan(entries, 5, 17)
    assert "\n" not in str(caught.value)


def test_packed_weights_that_do_not_fit_are_refused():
    case = Case([linear("l", 17, 17), LAST])
    weights = random_weights(case.plan)
    name, scale, bias = "l.weight", "l.weight" + SCALE, "l.bias"
    eights, halves = (pack(case.plan, weights, precision) for precision in ("int8", "bf16"))

    def spoiled(array, value):
        copy = array.copy()
        copy.flat[5] = value
        return copy

    for packed, says in (
        ({part: eights[part] for part in (name, bias)}, "l.weight is int8 without a scale"),
        (weights | {scale: eights[scale]}, "l.weight is float32 with a scale"),
        (halves | {scale: eights[scale]}, "l.weight is uint16 with a scale"),
        (eights | {scale: eights[scale][:16]}, r"l.weight_scale has shape \[16\], and \[17\] is wanted"),
        (eights | {scale: eights[scale].astype(np.float64)}, "l.weight_scale is float64"),
        (eights | {scale: spoiled(eights[scale], np.nan)}, "l.weight_scale holds NaN"),
        (eights | {"l.bias" + SCALE: eights[scale]}, "l.bias_scale belongs to none"),
        (eights | {name: eights[name].astype(np.int16)}, "l.weight is int16"),
        (weights | {name: weights[name].astype(np.float16)}, "l.weight is float16"),
        (weights | {bias: to_bf16(weights[bias])}, "l.bias is uint16, and float32 is wanted"),
        (weights | {name: spoiled(weights[name], -np.inf)}, "l.weight holds NaN or an infinite"),
        *(
            (halves | {name: spoiled(halves[name], bits)}, "l.weight holds NaN")
            for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF)
        ),
    ):
        with pytest.raises(InputError, match=says):
            Forward(case.plan, packed)


def test_bfloat16_is_the_nearest():
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    near = np.concatenate([bits, bits | 0x7FFF, bits | 0x8000, bits | 0x8001, bits | 0xFFFF]).view(np.float32)
    given = near[~np.isnan(near)]
    right = torch.from_numpy(given).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(given), right)


@pytest.mark.parametrize("bits", (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000))
def test_bfloat16_keeps_what_is_no_number(bits):
    halves = to_bf16(np.array([bits], np.uint32).view(np.float32))
    assert (halves & 0x7F80 == 0x7F80).all(), hex(halves[0])


def test_int8_is_the_nearest_step():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((9, 33), np.float32) * np.float32(10) ** np.arange(-32, 36, 8)[:, None].astype(
        np.float32
    )
    weights[4] = 0
    steps, scale = to_int8(weights)
    assert (steps.dtype, scale.dtype) == (np.int8, np.float32)
    assert (np.abs(steps).max(axis=1) == np.where(np.arange(9) == 4, 0, 127)).all() and scale[4] == 0
    wide = scale.astype(np.float64)[:, None]
    assert (np.abs(steps * wide - weights) <= 0.50001 * wide).all()
