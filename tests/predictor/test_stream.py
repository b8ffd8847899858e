"""_C.Model.step: one vector at a time gives what run() gives for all of them, from a state that can be kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastlvm import _C
from fastlvm.predictor.pack import PRECISIONS

from .natives import (
    GELU,
    L2_NORM,
    LAST,
    PRODUCTS,
    Case,
    attention,
    forward,
    layer_norm,
    linear,
    mamba,
    mamba2,
    pinned,
    random_weights,
    recurrent,
    residual,
    rms_norm,
)

LENGTH, DIM = 23, 17


def positions(prefix="p"):
    return {"type": "positions", "prefix": prefix, "context": LENGTH, "dim": DIM}


def mixture(prefix="x"):
    return {"type": "recency_mixture", "prefix": prefix, "context": LENGTH}


MLP = residual(layer_norm("n"), linear("up", 17, 40), GELU, linear("down", 40, 17))
LAYERS = {
    "linear": [linear("l", 17, 17)],
    "rms_norm": [rms_norm("n")],
    "gelu, l2_norm": [GELU, L2_NORM],
    "mamba": [mamba()],
    "mamba, convolution of 1": [mamba(conv=1)],
    "mamba, convolution of 2": [mamba(conv=2)],
    "mamba, convolution of 7": [mamba(conv=7)],
    "mamba, even sizes": [mamba(inner=48, state=16, rank=8)],
    "mamba, least sizes": [mamba(inner=1, state=1, rank=1)],
    "mamba, twice": [mamba("m"), mamba("k", inner=20, state=16)],
    "mamba2": [mamba2()],
    "mamba2, 2 groups": [mamba2(groups=2)],
    "mamba2, convolution of 1": [mamba2(conv=1)],
    "mamba2, convolution of 7": [mamba2(conv=7, heads=2, head_dim=16, state=16)],
    "attention": attention(window=3),
    "attention, window of 1": attention(window=1),
    "attention, window of 2": attention(window=2),
    "attention, every position": attention(window=LENGTH),
    "attention, window larger than the context": attention(window=100),
    "gru": [recurrent("gru")],
    "gru, other width": [recurrent("gru", hidden=33), linear("l", 33, 17)],
    "lstm": [recurrent("lstm")],
    "lstm, two": [recurrent("lstm", hidden=5), recurrent("lstm", dim=5, prefix="s")],
    "positions": [positions()],
    "residual, attention": [residual(layer_norm("n"), *attention(window=4))],
    "residual, mamba": [residual(mamba())],
    "transformer": [positions(), residual(layer_norm("b"), *attention(window=8)), MLP, rms_norm("r")],
}
ENDS = {
    "recency_mixture": [LAST, mixture()],
    "mamba predictor": [mamba(), mamba("k"), LAST, rms_norm("r"), linear("h", 17, 17), mixture(), L2_NORM],
    "everything": [
        positions(),
        mamba(),
        mamba2("k", groups=2),
        residual(rms_norm("b"), *attention(window=4)),
        recurrent("gru"),
        recurrent("lstm", prefix="s"),
        LAST,
        mixture(),
        MLP,
        mixture("y"),
        L2_NORM,
    ],
}
MODELS = {name: [*entries, LAST] for name, entries in LAYERS.items()} | ENDS
ENDLESS = [name for name, entries in LAYERS.items() if all("context" not in entry for entry in entries)]


@pytest.fixture(params=PRODUCTS, ids=str)
def products(request):
    with pinned(request.param) as names:
        yield names


def shortened(entries, length):
    """The same model for contexts of `length` vectors."""
    return [entry | {"context": length} if "context" in entry else entry for entry in entries]


def weights_for(case, weights):
    """Weights of a longer context's model: positions count from the oldest, the mixture's from the newest."""
    kept = {}
    for name, shape in case.plan.tensors().items():
        array = weights[name]
        kept[name] = array[-shape[0] :] if name.endswith("logits") else array[: shape[0]]
    return kept


def run(name, weights, vectors, precision="fp32"):
    """What the model built for as many positions as there are vectors makes of them."""
    case = Case(shortened(MODELS[name], len(vectors)), len(vectors), DIM)
    return forward(case, weights_for(case, weights), precision)(vectors[None])[0]


class Stream:
    """A model's state, and the vectors that it has seen."""

    def __init__(self, model):
        self.model, self.seen = model, 0
        self.state = np.zeros(model.state_size, np.float32)

    def __call__(self, vector):
        out = np.full(self.model.out_dim, np.nan, np.float32)
        self.model.step(vector, out, self.state, self.seen)
        self.seen += 1
        return out


def model_of(name, precision="fp32"):
    """The model for contexts of LENGTH vectors, and its weights."""
    case = Case(MODELS[name], LENGTH, DIM)
    weights = random_weights(case.plan)
    return forward(case, weights, precision).model, weights


def random_vectors(count=LENGTH, seed=0):
    return np.random.default_rng((seed, count)).standard_normal((count, DIM), np.float32)


def states(outputs):
    return [out.tobytes() for out in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_every_step_equals_the_run_over_all_vectors_so_far(name, products):
    model, weights = model_of(name)
    stream, vectors = Stream(model), random_vectors()
    for t in range(1, LENGTH + 1):
        found = stream(vectors[t - 1])
        right = run(name, weights, vectors[:t])
        assert np.abs(found - right).max() <= 1e-5 * np.abs(right).max(), t


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_precision_streams(name, precision, products):
    model, weights = model_of(name, precision)
    stream, vectors = Stream(model), random_vectors()
    for t in range(1, LENGTH + 1):
        found = stream(vectors[t - 1]).astype(np.float64)
        if t not in (1, 2, 9, LENGTH):
            continue
        right = run(name, weights, vectors[:t], precision)
        cosine = found @ right / np.linalg.norm(found) / np.linalg.norm(right)
        assert cosine >= 0.999, t


@pytest.mark.parametrize("name", ENDLESS)
def test_a_stream_is_not_bound_by_the_context_of_its_model(name, products):
    entries = MODELS[name]
    weights = random_weights(Case(entries, LENGTH, DIM).plan)
    model = forward(Case(entries, 2, DIM), weights).model
    assert model.most_positions == 0
    stream, vectors = Stream(model), random_vectors(40)
    found = [stream(vector) for vector in vectors]
    right = run(name, weights, vectors)
    assert np.abs(found[-1] - right).max() <= 1e-5 * np.abs(right).max()


def test_beyond_its_context_a_mixture_mixes_the_newest(products):
    model, weights = model_of("recency_mixture")
    stream, vectors = Stream(model), random_vectors(3 * LENGTH + 5)
    for t in range(1, len(vectors) + 1):
        found = stream(vectors[t - 1])
        right = run("recency_mixture", weights, vectors[max(0, t - LENGTH) : t])
        assert np.abs(found - right).max() <= 1e-5, t


def test_a_flat_stream_has_the_newest_vectors_and_zeros_for_those_that_are_missing(products):
    case = Case([linear("e", DIM, 20), {"type": "flatten", "context": 4}, GELU, linear("l", 80, DIM)], 4, DIM)
    run = forward(case, random_weights(case.plan) | {"e.bias": np.zeros(20, np.float32)})
    stream, vectors = Stream(run.model), random_vectors(11)
    for t, vector in enumerate(vectors, 1):
        context = np.zeros((1, 4, DIM), np.float32)
        context[0, max(0, 4 - t) :] = vectors[max(0, t - 4) : t]
        np.testing.assert_allclose(stream(vector), run(context)[0], atol=1e-5)


def test_a_mixture_of_old_vectors_takes_the_newest_while_there_is_no_other(products):
    logits = np.zeros(LENGTH, np.float32)
    logits[-2:] = -200
    case = Case(MODELS["recency_mixture"], LENGTH, DIM)
    stream, vectors = Stream(forward(case, {"x.logits": logits}).model), random_vectors(3)
    np.testing.assert_allclose(stream(vectors[0]), 2 * vectors[0], rtol=1e-6)
    np.testing.assert_allclose(stream(vectors[1]), vectors[1] + (vectors[0] + vectors[1]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream(vectors[2]), vectors[2] + vectors[0], rtol=1e-5, atol=1e-6)


def test_a_mixture_mixes_the_vectors_that_the_context_layer_saw(products):
    mixing = ("recency_mixture", {"logits": np.linspace(-1, 1, 5, dtype=np.float32)})
    model = _C.Model(5, DIM, [("l2_norm", {}), ("context", {}), ("gelu", {}), ("last", {}), mixing])
    stream, vectors = Stream(model), random_vectors(12)
    for t, vector in enumerate(vectors, 1):
        found = stream(vector)
        if t >= 5:
            right = np.empty((1, DIM), np.float32)
            model.run(np.ascontiguousarray(vectors[None, t - 5 : t]), right)
            np.testing.assert_allclose(found, right[0], atol=1e-6)


@pytest.mark.parametrize("name", ("positions", "transformer", "everything"))
def test_a_stream_ends_where_a_model_has_no_more_positions(name):
    model, _ = model_of(name)
    assert model.most_positions == LENGTH
    stream, vectors = Stream(model), random_vectors(LENGTH + 1)
    for vector in vectors[:-1]:
        stream(vector)
    before = stream.state.copy()
    with pytest.raises(ValueError, match=f"seen: got {LENGTH}, and the model takes {LENGTH} vectors at most"):
        stream(vectors[-1])
    assert stream.state.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_copied_state_goes_on_bit_for_bit(name, products):
    model, _ = model_of(name)
    stream, vectors = Stream(model), random_vectors()
    for vector in vectors[:9]:
        stream(vector)
    saved = stream.state.copy()
    want = states(stream(vector) for vector in vectors[9:])
    for other in (model, model_of(name)[0]):
        restored = Stream(other)
        restored.state[:], restored.seen = saved, 9
        assert states(restored(vector) for vector in vectors[9:]) == want
        assert restored.state.tobytes() == stream.state.tobytes()


def test_a_state_goes_on_under_another_instruction_set():
    model, weights = model_of("everything")
    vectors = random_vectors()
    right = run("everything", weights, vectors)
    for first, second in itertools.permutations(PRODUCTS, 2):
        stream = Stream(model)
        with pinned(first):
            for vector in vectors[:9]:
                stream(vector)
        with pinned(second):
            found = [stream(vector) for vector in vectors[9:]]
        assert np.abs(found[-1] - right).max() <= 1e-5


def test_streams_of_one_model_do_not_know_each_other(products):
    model, _ = model_of("everything")
    vectors, others = random_vectors(), random_vectors(seed=1)
    alone = Stream(model)
    want = states(alone(vector) for vector in vectors)
    one, other, found = Stream(model), Stream(model), []
    out = np.empty((4, DIM), np.float32)
    for vector, another in zip(vectors, others, strict=True):
        found.append(one(vector))
        other(another)
        model.run(np.stack([others] * 4), out)
    assert states(found) == want


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bits_of_a_stream_do_not_depend_on_threads(precision, products):
    wide = [
        mamba(dim=300, inner=600, state=64),
        mamba2("k", dim=300, heads=8, head_dim=64, state=64),
        *attention(dim=300),
    ]
    case = Case([*wide, recurrent("gru", dim=300, hidden=300), LAST], 5, 300)
    model = forward(case, random_weights(case.plan), precision).model
    vectors = np.random.default_rng(0).standard_normal((5, 300), np.float32)
    before, found = _C.get_num_threads(), []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        stream = Stream(model)
        found.append([*states(stream(vector) for vector in vectors), stream.state.tobytes()])
    _C.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_zero_state_is_a_new_stream():
    model, _ = model_of("everything")
    stream, vectors = Stream(model), random_vectors()
    want = states(stream(vector) for vector in vectors)
    stream.state[:], stream.seen = 0, 0
    assert states(stream(vector) for vector in vectors) == want


def test_the_vector_is_left_as_it_was():
    model, _ = model_of("everything")
    vectors = random_vectors()
    given = vectors.copy()
    given.flags.writeable = False
    stream = Stream(model)
    for vector in given:
        stream(vector)
    assert given.tobytes() == vectors.tobytes()


def test_a_model_without_memory_has_no_state():
    case = Case([linear("l", 17, 17), LAST], LENGTH, DIM)
    assert forward(case, random_weights(case.plan)).model.state_size == 0
    assert model_of("everything")[0].state_size > 0


def test_a_layer_that_needs_all_vectors_at_once_does_not_stream():
    attending = {"type": "context_attention", "prefix": "c", "dim": 17, "inner": 9}
    case = Case([attending, linear("l", 34, 17)], LENGTH, DIM)
    stream = Stream(forward(case, random_weights(case.plan)).model)
    assert not stream.model.streams and model_of("everything")[0].streams
    with pytest.raises(ValueError, match="takes a whole context at a time"):
        stream(random_vectors()[0])


READ_ONLY = np.zeros(DIM, np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vector", lambda vector: vector[None]),
        ("vector", lambda vector: vector[:16]),
        ("vector", lambda vector: vector.astype(np.float64)),
        ("vector", lambda vector: vector.astype(np.float16)),
        ("vector", lambda vector: np.repeat(vector, 2)[::2]),
        ("vector", lambda vector: vector.tolist()),
        ("vector", lambda vector: None),
        ("out", lambda out: out[:16]),
        ("out", lambda out: out[None]),
        ("out", lambda out: np.repeat(out, 2)[::2]),
        ("out", lambda out: out.astype(np.float64)),
        ("out", lambda out: READ_ONLY),
        ("state", lambda state: state[:-1]),
        ("state", lambda state: np.append(state, np.float32(0))),
        ("state", lambda state: state[None]),
        ("state", lambda state: state.astype(np.float64)),
        ("state", lambda state: np.repeat(state, 2)[::2]),
        ("state", lambda state: np.broadcast_to(np.float32(0), state.shape)),
        ("state", lambda state: None),
        ("seen", lambda seen: -1),
        ("seen", lambda seen: LENGTH),
        ("seen", lambda seen: 1 << 62),
        ("threads", lambda threads: -1),
        ("threads", lambda threads: 1025),
    ],
)
def test_step_names_what_does_not_fit(name, change):
    model, _ = model_of("everything")
    state = np.zeros(model.state_size, np.float32)
    good = {"vector": random_vectors()[0], "out": np.zeros(DIM, np.float32), "state": state, "seen": 0, "threads": 1}
    with pytest.raises(ValueError, match=f"^{name}: "):
        model.step(**{**good, name: change(good[name])})
    assert (state == 0).all()


def test_seen_cannot_be_negative_without_positions_either():
    model, _ = model_of("mamba")
    with pytest.raises(ValueError, match=r"^seen: got -1, (?!.* 0 vectors)"):
        model.step(random_vectors()[0], np.zeros(DIM, np.float32), np.zeros(model.state_size, np.float32), -1)
