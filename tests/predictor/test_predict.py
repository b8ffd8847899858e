from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm.errors import InputError

from .sample import CONTEXT, DIM, torch_predict


def test_predicts_what_the_model_predicts(predictor, model, space, contexts):
    raw, _ = contexts
    found = predictor.predict(raw)
    assert found.shape == (len(raw), DIM) and found.dtype == np.float32
    assert np.abs(found - torch_predict(model, space.apply(raw))).max() <= 1e-5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_one_context_alone_is_that_row_of_many(predictor, contexts):
    raw, _ = contexts
    many = predictor.predict(raw)
    assert predictor.predict(raw[3]).shape == (DIM,)
    assert np.abs(predictor.predict(raw[3]) - many[3]).max() <= 1e-6
    assert predictor.predict(raw[:0]).shape == (0, DIM)


def test_a_prediction_depends_on_its_own_context_alone(predictor, contexts):
    raw, _ = contexts
    first = predictor.predict(raw[:4])
    predictor.predict(raw[::-1])
    np.testing.assert_array_equal(predictor.predict(raw[:4]), first)
    assert np.abs(predictor.predict(raw[3::-1])[::-1] - first).max() <= 1e-6


def test_large_batches_are_cut_where_no_one_sees_it(predictor, contexts):
    raw, _ = contexts
    many = np.concatenate([raw] * 20)
    assert len(many) > 2 * 256
    assert np.abs(predictor.predict(many) - np.concatenate([predictor.predict(raw)] * 20)).max() <= 1e-6


def test_the_context_is_left_as_it_was(predictor, contexts):
    raw = contexts[0] * np.float32(3)
    before = raw.copy()
    predictor.search(raw, k=3, exclude="context")
    np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_float_dtypes_and_strides(predictor, contexts, dtype):
    raw, _ = contexts
    given = np.asfortranarray(raw.astype(dtype))
    assert np.abs(predictor.predict(given) - predictor.predict(raw)).max() <= (5e-3 if dtype == np.float16 else 1e-6)


def test_vectors_of_another_length_are_normalised_once(predictor, contexts):
    raw, _ = contexts
    scale = np.random.default_rng(0).uniform(0.01, 100, (*raw.shape[:2], 1)).astype(np.float32)
    assert np.abs(predictor.predict(raw * scale) - predictor.predict(raw)).max() <= 1e-5
    subnormal = raw * np.float32(1e-38)
    assert np.abs(predictor.predict(subnormal) - predictor.predict(raw)).max() <= 1e-2
    assert np.isfinite(predictor.predict(raw * np.float32(3e38))).all()


def test_float16_rounding_of_a_payload_is_not_touched(predictor, model, space, contexts):
    stored = contexts[0].astype(np.float16).astype(np.float32)
    assert np.abs(np.linalg.norm(stored, axis=-1) - 1).max() > 1e-5
    assert np.abs(predictor.predict(stored) - torch_predict(model, space.apply(stored))).max() <= 2e-6


def spoiled(value):
    context = np.random.default_rng(0).standard_normal((2, CONTEXT, DIM)).astype(np.float32)
    context[1, 3, 7] = value
    return context


ZERO = np.ones((2, CONTEXT, DIM), np.float32)
ZERO[1, 2] = 0


@pytest.mark.parametrize(
    "context, says",
    (
        (np.ones((2, 1, CONTEXT, DIM), np.float32), r"shape \[2, 1, 5, 32\]"),
        (np.ones(DIM, np.float32), r"shape \[32\]"),
        (np.ones((4, DIM), np.float32), r"shape \[4, 32\].*\[5, 32\]"),
        (np.ones((2, 6, DIM), np.float32), r"shape \[2, 6, 32\]"),
        (np.ones((2, CONTEXT, DIM + 1), np.float32), r"shape \[2, 5, 33\].*\[n, 5, 32\]"),
        (np.ones((2, CONTEXT, DIM), np.int64), "int64"),
        (np.ones((2, CONTEXT, DIM), complex), "complex128"),
        (np.full((CONTEXT, DIM), "x"), "float array"),
        ([[1.0], [1.0, 2.0]], "list that is no array"),
        (None, "object"),
        (spoiled(np.nan), r"context\[1, 3\].*not finite"),
        (spoiled(np.inf), r"context\[1, 3\].*not finite"),
        (spoiled(-np.inf)[1], r"context\[3\].*not finite"),
        (spoiled(1.0).astype(np.float64) * 1e300, r"context\[0, 0\].*not finite in float32"),
        (ZERO, r"context\[1, 2\] is all zeros"),
        (ZERO[1], r"context\[2\] is all zeros"),
    ),
)
def test_a_wrong_context_is_refused_in_one_sentence(predictor, context, says):
    for call in (predictor.predict, predictor.search):
        with pytest.raises(InputError, match=says) as caught:
            call(context)
        assert "\n" not in str(caught.value)


def test_torch_tensors_are_arrays_too(predictor, contexts):
    raw, _ = contexts
    np.testing.assert_array_equal(predictor.predict(torch.from_numpy(raw)), predictor.predict(raw))


def test_properties(predictor, payload, artifact):
    assert (predictor.context, predictor.dim) == (CONTEXT, DIM)
    assert predictor.payload_id == payload.id == predictor.config["payload_id"]
    assert predictor.path == artifact and len(predictor.index) == len(payload)
    assert "fp32" in repr(predictor)


def test_threads_are_the_predictors_own_and_change_no_bit(artifact, contexts):
    before = fastlvm.get_num_threads()
    one, two, three = (fastlvm.Predictor.load(artifact, threads=threads) for threads in (1, 2, 3))
    first = one.predict(contexts[0])
    for other in (two, three, one, fastlvm.Predictor.load(artifact)):
        assert other.predict(contexts[0]).tobytes() == first.tobytes()
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(InputError, match="threads"):
            fastlvm.Predictor.load(artifact, threads=wrong)
    assert fastlvm.get_num_threads() == before


def test_no_torch_in_the_process(artifact, contexts, tmp_path):
    np.save(tmp_path / "context.npy", contexts[0])
    code = """
import sys
import numpy as np
import fastlvm
predictor = fastlvm.Predictor.load(sys.argv[1])
found = predictor.search(np.load(sys.argv[2]), k=5, exclude="context")
predictor.predict(np.load(sys.argv[2])[0])
assert found.ids.shape[1] == 5
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "mlx", "triton"}, loaded
ours = {name for name in sys.modules if name.startswith(("fastlvm.models", "fastlvm.training"))}
assert not ours, ours
"""
    command = [sys.executable, "-c", code, str(artifact), str(tmp_path / "context.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
