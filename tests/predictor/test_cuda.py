"""The predictor on a GPU: there where there is one, else the same kernels interpreted, without the graph.

What needs the extension (artifacts, and the native predictor to compare with) is skipped where it is not built.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:  # before the first import of a kernel, which decides
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

import fastlvm  # noqa: E402
from fastlvm.data import Space  # noqa: E402
from fastlvm.errors import InputError, IntegrityError  # noqa: E402
from fastlvm.ops._extension import _C  # noqa: E402
from fastlvm.predictor import cuda, cuda_layers, cuda_load, layers  # noqa: E402
from fastlvm.predictor.cuda import CudaPredictor  # noqa: E402
from fastlvm.predictor.cuda_search import Exact, Tune  # noqa: E402

from .sample import CONTEXT, DIM, make_model, make_vectors, torch_predict  # noqa: E402

needs_extension = pytest.mark.skipif(_C is None, reason="the extension is not built: no artifacts, nothing native")

SIZES = {"d_model": 20, "n_layers": 2, "d_state": 5}
KINDS = {
    "mamba-s": {},
    "mamba2": {"layout": "mamba2", "head_dim": 8},
    "attention": {"layout": "attention", "heads": 2, "window": 3, "positions": True},
    "mlp blocks": {"layout": "attention+mlp", "heads": 2, "d_ff": 24},
    "gate": {"layout": "mamba+gate", "n_layers": 1, "hidden": 9},
    "gru": {"layout": "gru"},
    "lstm": {"layout": "lstm", "n_layers": 1},
    "same width": {"layout": "gru", "d_model": DIM, "n_layers": 1},
    "without mixture": {"layout": "lstm", "n_layers": 1, "residual": False},
}
OTHERS = {"mlp": {"d_ff": 24}, "amn": {"d_ff": 24, "hidden": 9}, "mixture": {}}


def small(**overrides):
    return make_model(**{**SIZES, **overrides})


def other(name, **overrides):
    torch.manual_seed(0)
    model = fastlvm.models.create(name, vector_dim=DIM, **overrides).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def made(model, vectors=None, precision="fp32", **options):
    vectors = make_vectors()[:40] if vectors is None else vectors
    return CudaPredictor.from_model(model, vectors, device=DEVICE, precision=precision, **options)


def some_contexts(n=3, seed=7):
    raw = np.random.default_rng(seed).standard_normal((n, CONTEXT, DIM)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def held(vectors):
    """As they lie on the device."""
    return vectors.astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def plain():
    """A mixture of the context, which costs next to nothing, over 360 vectors."""
    return made(other("mixture"), make_vectors(), keys=np.stack(np.divmod(np.arange(360), 12), axis=1).astype(np.int32))


# The forward


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_predicts_what_the_model_predicts(name):
    model = small(**KINDS[name]) if name in KINDS else other(name, **OTHERS[name])
    raw = some_contexts(2)
    found = made(model).predict(raw)
    assert found.shape == (2, DIM) and found.dtype == np.float32
    assert np.abs(found - torch_predict(model, raw)).max() <= 1e-5


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_in_16_bits(precision):
    model, raw = small(), some_contexts(1)
    found, wanted = made(model, precision=precision).predict(raw), torch_predict(model, raw)
    assert (found * wanted).sum() >= (0.9999 if precision == "bf16" else 0.999999)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6


def test_many_rows_go_another_way(monkeypatch):
    """Products by cuBLAS, and the convolution as a launch of its own."""
    model, raw = small(n_layers=1), some_contexts(4)
    monkeypatch.setattr(cuda_layers, "MOST_ROWS", 3)
    for precision, cosine in (("fp32", 1 - 1e-6), ("bf16", 0.9999)):
        found = made(model, precision=precision).predict(raw)
        assert (found * torch_predict(model, raw)).sum(axis=1).min() >= cosine


@pytest.mark.skipif(not ON_GPU, reason="large tiles, which the interpreter takes minutes for")
@pytest.mark.parametrize("n", (1, 3, 13, 50, 200))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_every_size_of_tile(n, precision):
    model, raw = make_model(d_model=768, d_state=128), some_contexts(n)
    found, wanted = made(model, precision=precision).predict(raw), torch_predict(model, raw)
    assert (found * wanted).sum(axis=1).min() >= (1 - 1e-6 if precision == "fp32" else 0.999)


def test_long_contexts():
    model = small(n_layers=1, context=18)
    raw = np.random.default_rng(0).standard_normal((1, 18, DIM)).astype(np.float32)
    raw /= np.linalg.norm(raw, axis=-1, keepdims=True)
    assert np.abs(made(model).predict(raw) - torch_predict(model, raw)).max() <= 1e-5


def test_in_a_space():
    vectors = make_vectors()
    space = Space.fit(vectors, power=0.3)
    model, raw = other("mlp", d_ff=24), some_contexts(2)
    found = made(model, space=space).predict(raw)
    assert np.abs(found - torch_predict(model, space.apply(raw))).max() <= 1e-5


@needs_extension
def test_in_a_space_with_a_tower():
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (9, DIM), "up.bias": (9,), "down.weight": (DIM, 9), "down.bias": (DIM,)}
    tower = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    space = Space.fit(make_vectors(), power=0.3).with_tower(tower)
    model, raw = other("mixture"), some_contexts(2)
    found = made(model, space=space).predict(raw)
    assert np.abs(found - torch_predict(model, space.apply(raw))).max() <= 1e-5


def test_vectors_of_another_length_are_normalised_once(plain):
    raw = some_contexts(3)
    wanted = plain.predict(raw)
    scale = np.random.default_rng(0).uniform(0.01, 100, (3, CONTEXT, 1)).astype(np.float32)
    assert np.abs(plain.predict(raw * scale) - wanted).max() <= 1e-6
    assert np.abs(plain.predict(raw * np.float32(3e38)) - wanted).max() <= 1e-6
    assert np.abs(plain.predict(raw * np.float32(1e-38)) - wanted).max() <= 1e-2
    assert np.abs(plain.predict(raw.astype(np.float64)) - wanted).max() <= 1e-6


def test_a_layer_without_a_form_is_refused(monkeypatch):
    monkeypatch.delitem(cuda_layers._BUILD, layers.Flatten)
    with pytest.raises(InputError, match=r'a flatten layer has no form on a GPU.*device="cpu"'):
        made(other("mlp", d_ff=24))


# The search


def ranked(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("count, dim, k", ((700, 96, 50), (700, 33, 1), (130, 40, 130), (64, 32, 64), (5, 8, 3)))
@pytest.mark.parametrize(
    "tune", (Tune(), Tune(16, chunk=32, ahead=2, counted=False), Tune(64, part=16, chunk=64, ahead=1, warps=4))
)
def test_the_best_rows_exactly(count, dim, k, tune):
    """Whole numbers, so that scores are exact, many are the same, and the lower row has to come first."""
    rng = np.random.default_rng(count + dim)
    vectors = rng.integers(-2, 3, (count, dim)).astype(np.float32) / 4
    queries = rng.integers(-2, 3, (4, dim)).astype(np.float32) / 8
    exact = Exact(torch.from_numpy(vectors).half().to(DEVICE), tune)
    wanted, scores = ranked(queries @ vectors.T, k)
    for n in (1, 4):
        ids = torch.full((n, k), -7, dtype=torch.int32, device=DEVICE)
        found = torch.zeros((n, k), device=DEVICE)
        exact(torch.from_numpy(queries[:n]).to(DEVICE), ids, found)
        np.testing.assert_array_equal(ids.cpu(), wanted[:n])
        np.testing.assert_array_equal(found.cpu(), scores[:n])


def test_scores_in_pieces(monkeypatch):
    from fastlvm.predictor import cuda_search

    monkeypatch.setattr(cuda_search, "SCORES", 3 * 64)
    test_the_best_rows_exactly(700, 33, 20, Tune(tile=16))


def test_signs_and_zeros():
    """Scores of both signs, 0 and -0: the last two are the same."""
    vectors = torch.tensor([[-1.0], [0.0], [-0.0], [2.0], [-0.0], [0.0], [-3.0]]).half()
    for query in (1.0, -1.0):
        queries = torch.full((2, 1), query)
        wanted, _ = ranked((queries @ vectors.float().T).numpy(), 7)
        for n in (1, 2):
            for counted in (True, False):
                ids, scores = torch.empty((n, 7), dtype=torch.int32), torch.empty((n, 7))
                ids, scores = ids.to(DEVICE), scores.to(DEVICE)
                Exact(vectors.to(DEVICE), Tune(tile=16, chunk=16, counted=counted))(queries[:n].to(DEVICE), ids, scores)
                np.testing.assert_array_equal(ids.cpu(), wanted[:n])


def test_many_queries_are_as_exact_as_one():
    """Their float32 goes through products of float16 in two pieces."""
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((400, 768)), rng.standard_normal((3, 768))
    vectors, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (vectors, queries))
    vectors = held(vectors)
    exact = Exact(torch.from_numpy(vectors).half().to(DEVICE))
    ids, scores = torch.empty((3, 9), dtype=torch.int32, device=DEVICE), torch.empty((3, 9), device=DEVICE)
    exact(torch.from_numpy(queries).float().to(DEVICE), ids, scores)
    wanted, right = ranked(queries @ vectors.T, 9)
    np.testing.assert_array_equal(ids.cpu(), wanted)
    assert np.abs(scores.cpu().numpy() - right).max() <= 2e-6


def test_finds_what_the_scores_say(plain):
    raw = some_contexts(3)
    wanted, scores = ranked(plain.predict(raw) @ held(make_vectors()).T, 50)
    found = plain.search(raw)
    assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32 and found.keys.dtype == np.int32
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert (found.ids == wanted).mean() > 0.98  # rows that differ by a rounding may change places
    np.testing.assert_array_equal(found.keys, np.stack(np.divmod(found.ids, 12), axis=-1))
    one = plain.search(raw[1], 7)
    assert one.ids.shape == one.scores.shape == (7,) and one.keys.shape == (7, 2)
    np.testing.assert_array_equal(one.ids, found.ids[1, :7])


@pytest.mark.parametrize("tune", ({"early": False}, {"direct": False}, {"poll": True}, {"counted": False}), ids=str)
def test_every_way_finds_the_same(plain, tune):
    another = made(other("mixture"), make_vectors(), tune=tune)
    for raw in (some_contexts(1)[0], some_contexts(2)):
        np.testing.assert_array_equal(another.search(raw, 7).ids, plain.search(raw, 7).ids)
        np.testing.assert_array_equal(another.predict(raw), plain.predict(raw))


def test_pieces_and_empty_batches(plain, monkeypatch):
    raw = some_contexts(5)
    whole = plain.search(raw, 4)
    monkeypatch.setattr(cuda, "MOST", 2)
    for got, wanted in zip(plain.search(raw, 4), whole, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    empty = plain.search(raw[:0], 4)
    assert empty.ids.shape == (0, 4) and empty.keys.shape == (0, 4, 2) and plain.predict(raw[:0]).shape == (0, DIM)


def test_padding_where_too_few_rows_are(plain):
    found = plain.search(some_contexts(2), 365)
    assert (found.ids[:, 360:] == -1).all() and (found.keys[:, 360:] == -1).all()
    assert np.isneginf(found.scores[:, 360:]).all() and (np.sort(found.ids[:, :360]) == np.arange(360)).all()


@needs_extension  # of which what checks rows is a part
def test_excluding_rows(plain):
    raw = some_contexts(2)
    every = plain.search(raw, 360).ids
    out = every[:, [0, 2, 3]]
    for exclude in (out, np.concatenate([out, np.full((2, 20), -1)], axis=1)):
        found = plain.search(raw, 30, exclude=exclude)
        np.testing.assert_array_equal(found.ids, np.delete(every, [0, 2, 3], axis=1)[:, :30])
    found = plain.search(raw[0], 360, exclude=out[0])
    assert (found.ids[-3:] == -1).all() and np.isneginf(found.scores[-3:]).all() and (found.ids[:-3] >= 0).all()


def test_graphs_are_kept_and_dropped(plain, monkeypatch):
    monkeypatch.setattr(cuda, "GRAPHS", 2)
    raw = some_contexts(1)
    first = plain.search(raw, 3)
    for k in (4, 5, 3, 3):
        np.testing.assert_array_equal(plain.search(raw, k).ids[:, :3], first.ids)
    assert list(plain._calls) == [(1, 5, True), (1, 3, True)]


def test_from_many_threads(plain):
    raw = some_contexts(6)
    wanted, found = plain.search(raw, 5).ids, {}

    def work(i):
        found[i] = [plain.search(raw[i], 5).ids for _ in range(20 if ON_GPU else 2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        for ids in found[i]:
            np.testing.assert_array_equal(ids, wanted[i])


@pytest.mark.skipif(not ON_GPU, reason="wants contexts on a GPU")
def test_contexts_on_the_device(plain):
    raw = some_contexts(3)
    wanted = plain.search(raw, 20)
    there = torch.from_numpy(raw).cuda()
    np.testing.assert_array_equal(plain.search(there, 20).ids, wanted.ids)
    np.testing.assert_array_equal(plain.search(there.double()[1], 5).ids, wanted.ids[1, :5])
    np.testing.assert_array_equal(plain.predict(there.mT.contiguous().mT), plain.predict(raw))
    there[1, 3, 7] = torch.nan
    with pytest.raises(InputError, match=r"context\[1, 3\].*not finite"):
        plain.search(there, 20)
    for wrong in (there[:, :2], there.int(), there[0, 0]):
        with pytest.raises(InputError, match=r"context is .* floats"):
            plain.search(wrong)


# What is refused


def spoiled(value):
    context = some_contexts(2)
    context[1, 3, 7] = value
    return context


ZERO = np.ones((2, CONTEXT, DIM), np.float32)
ZERO[1, 2] = 0


@pytest.mark.parametrize(
    "context, says",
    (
        (np.ones((4, DIM), np.float32), r"shape \[4, 32\].*\[5, 32\]"),
        (np.ones((2, 6, DIM), np.float32), r"shape \[2, 6, 32\]"),
        (np.ones((2, CONTEXT, DIM), np.int64), "int64"),
        ([[1.0], [1.0, 2.0]], "list that is no array"),
        (None, "object"),
        (spoiled(np.nan), r"context\[1, 3\].*not finite"),
        (spoiled(-np.inf)[1], r"context\[3\].*not finite"),
        (spoiled(1.0).astype(np.float64) * 1e300, r"context\[0, 0\].*not finite in float32"),
        (ZERO, r"context\[1, 2\] is all zeros"),
        (ZERO[1], r"context\[2\] is all zeros"),
    ),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which stands for the GPU
def test_a_wrong_context_is_refused_in_one_sentence(plain, context, says):
    for call in (plain.predict, plain.search):
        with pytest.raises(InputError, match=says) as caught:
            call(context)
        assert "\n" not in str(caught.value)


@needs_extension  # of which what checks rows is a part
def test_what_there_is_none_of_here(plain):
    raw = some_contexts(1)
    for call in (lambda: plain.rerank(raw, []), plain.stream, lambda: plain.profile(raw)):
        with pytest.raises(InputError, match='device="cpu"'):
            call()
    for options, says in (
        ({"exclude": "context"}, 'exclude is .context., .*device="cpu"'),
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"exclude": np.zeros((3, 2))}, "exclude is float64"),
        ({"exclude": np.zeros((3, 2), int)}, "exclude has shape"),
        ({"exclude": np.array([10**6])}, "exclude spans"),
    ):
        with pytest.raises(InputError, match=says):
            plain.search(raw, **options)


def test_wrong_arguments():
    model = other("mixture")
    with pytest.raises(InputError, match=r"precision is 'int8'.*fp32, bf16, fp16"):
        made(model, precision="int8")
    with pytest.raises(InputError, match=r"vectors have shape \[4, 7\]"):
        made(model, np.ones((4, 7), np.float32))
    with pytest.raises(InputError, match=r"vectors have shape \[4, 7\]"):
        made(model, torch.ones((4, 7), dtype=torch.float16, device=DEVICE))
    for device, says in (
        ("mps", "cpu, cuda"),
        ("a toaster", "cpu, cuda"),
        (5.0, "cpu, cuda"),
        ("cuda:77", "no such GPU"),
    ):
        with pytest.raises(InputError, match=says):
            CudaPredictor.from_model(model, np.ones((4, DIM), np.float32), device=device)


def test_the_cpu_is_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="device is 'cpu', and"):
        CudaPredictor.from_model(other("mixture"), np.ones((4, DIM), np.float32), device="cpu")


def test_a_payload_larger_than_the_gpu():
    cuda_load._check_room(584_545, 768, 2 << 30)
    with pytest.raises(InputError, match=r"584545 vectors of 768 need 0.9 GB in float16 and 1.1 GB.* 1.0 GB .*free"):
        cuda_load._check_room(584_545, 768, 10**9)


# Artifacts


@pytest.fixture(scope="module")
def exported(tmp_path_factory, index, payload):
    """By precision, an artifact of a small model and the native predictor of it."""
    folders = {}

    def get(precision):
        if precision not in folders:
            folders[precision] = tmp_path_factory.mktemp("cuda") / precision
            fastlvm.export(small(n_layers=1, d_model=16), folders[precision], precision, index)
        return folders[precision], fastlvm.Predictor.load(folders[precision])

    return get


@needs_extension
@pytest.mark.parametrize("precision, own", (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp16")))
def test_an_artifact(exported, contexts, payload, precision, own):
    folder, native = exported(precision)
    loaded = CudaPredictor.load(folder, DEVICE, precision=own)
    raw = contexts[0][:2]
    assert (
        np.abs(loaded.predict(raw) - native.predict(raw)).max() <= {"fp32": 1e-5, "bf16": 4e-3, "int8": 6e-3}[precision]
    )
    pool = held(native.index.space.apply(payload.take(np.arange(len(payload)))))
    pool[payload.groups != np.arange(len(payload))] = -1  # of duplicates the first stands for all
    scores = loaded.predict(raw) @ pool.T
    scores[:, payload.groups != np.arange(len(payload))] = -np.inf
    found = loaded.search(raw, 20)
    np.testing.assert_allclose(found.scores, ranked(scores, 20)[1], atol=2e-6)
    np.testing.assert_array_equal(found.keys, payload.keys[found.ids])
    assert loaded.payload_id == native.payload_id and loaded.config == native.config and loaded.path == native.path
    if precision == "fp32":
        for options in ({}, {"exclude": contexts[1][:2]}, {"exclude": np.array([100, 15])}):
            agree = loaded.search(raw, 30, **options).ids == native.search(raw, 30, **options).ids
            assert agree.mean() >= 0.9  # rounding vectors to float16 changes the places of a few
        assert not np.isin(loaded.search(raw, 360, exclude=np.array([100, 15])).ids, [14, 15, 40, 100, 101]).any()


@needs_extension
def test_the_vectors_of_a_payload(tmp_path, payload, space, contexts):
    from fastlvm.retrieval import Index

    model, raw = other("mixture"), contexts[0][:2]
    index = Index.build(payload, "ivf_sq8", space=space, nlist=4)
    fastlvm.export(model, tmp_path / "a", index=index)
    with pytest.raises(InputError, match="kind ivf_sq8, which holds rounded vectors: hand in payload="):
        CudaPredictor.load(tmp_path / "a", DEVICE)
    fastlvm.export(model, tmp_path / "b", index=Index.build(payload, "flat", space=space))
    wanted = CudaPredictor.load(tmp_path / "b", DEVICE, precision="fp32").search(raw, 30)
    for given in (payload, payload.path):
        found = CudaPredictor.load(tmp_path / "a", DEVICE, precision="fp32", payload=given).search(raw, 30)
        np.testing.assert_array_equal(found.ids, wanted.ids)
    from fastlvm.data import Payload

    keys = np.stack([np.zeros(9), np.arange(9)], axis=1).astype(np.int32)
    another = Payload.build(tmp_path / "p", make_vectors(1)[:9], keys, encoder="test")
    with pytest.raises(IntegrityError, match="payload has id"):
        CudaPredictor.load(tmp_path / "a", DEVICE, payload=another)


@needs_extension
def test_rows_that_were_added_and_removed(tmp_path, payload, contexts):
    from fastlvm.retrieval import Index

    raw = contexts[0][:1]
    fastlvm.export(other("mixture"), tmp_path / "a", index=Index.build(payload, "flat"))
    index = Index.open(tmp_path / "a" / "index")
    first = CudaPredictor.load(tmp_path / "a", DEVICE, precision="fp32").search(raw, 3)
    index.remove(first.keys[0, :1])
    predicted = fastlvm.Predictor.load(tmp_path / "a").predict(raw)
    added = index.add(predicted, np.array([[900, 1]]))
    index.close()
    for options in ({}, {"payload": payload}):
        found = CudaPredictor.load(tmp_path / "a", DEVICE, precision="fp32", **options).search(raw, 3)
        np.testing.assert_array_equal(found.ids[0], [added[0], *first.ids[0, 1:]])
        np.testing.assert_array_equal(found.keys[0, 0], [900, 1])


@needs_extension
def test_through_the_predictor(exported):
    folder, _ = exported("fp32")
    if ON_GPU:
        assert isinstance(fastlvm.Predictor.load(folder, device="cuda"), CudaPredictor)
    else:
        with pytest.raises(InputError, match=r"device is 'cuda', and torch .* finds no such GPU"):
            fastlvm.Predictor.load(folder, device="cuda")
    with pytest.raises(InputError, match="threads is 2, and device 'cuda' has none"):
        fastlvm.Predictor.load(folder, 2, "cuda")
    for options in ({"precision": "bf16"}, {"payload": "p"}):
        with pytest.raises(InputError, match='for device="cuda"'):
            fastlvm.Predictor.load(folder, **options)


@needs_extension
def test_golden_predictions_are_checked(exported, monkeypatch):
    from fastlvm.predictor import artifact

    folder, _ = exported("fp32")
    original = artifact.weights
    monkeypatch.setattr(
        artifact, "weights", lambda parts: {name: 1.1 * array for name, array in original(parts).items()}
    )
    with pytest.raises(IntegrityError, match="predicts its golden windows off by"):
        CudaPredictor.load(folder, DEVICE, precision="fp32")
