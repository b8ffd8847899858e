"""`Predictor.stream`: what it gives, and its state on disk."""

from __future__ import annotations

import numpy as np
import pytest

import fastlvm
from fastlvm.errors import InputError, IntegrityError

from .sample import CONTEXT, DIM, make_model, torch_predict


@pytest.fixture
def vectors(payload):
    return payload.take(np.arange(2 * CONTEXT))


def test_each_prediction_is_the_models_over_the_vectors_so_far(predictor, model, index, vectors):
    stream = predictor.stream()
    for t in range(1, CONTEXT + 1):
        found = stream.push(vectors[t - 1])
        wanted = torch_predict(model, index.space.apply(vectors[None, :t]))[0]
        assert (found.dtype, found.shape, stream.seen) == (np.float32, (DIM,), t)
        assert np.abs(found - wanted).max() <= 1e-5
    np.testing.assert_allclose(found, predictor.predict(vectors[:CONTEXT]), atol=1e-5)


def test_a_long_stream_remembers_more_than_its_context(predictor, vectors):
    stream = predictor.stream()
    last = [stream.push(vector) for vector in vectors][-1]
    assert np.abs(last - predictor.predict(vectors[-CONTEXT:])).max() > 1e-4


def test_a_stream_equals_the_model_beyond_five_vectors(tmp_path, index, vectors):
    model = make_model(5, context=2 * CONTEXT)
    fastlvm.export(model, tmp_path / "a", index=index)
    stream = fastlvm.Predictor.load(tmp_path / "a").stream()
    for t, vector in enumerate(vectors, 1):
        wanted = torch_predict(model, index.space.apply(vectors[None, :t]))[0]
        assert np.abs(stream.push(vector) - wanted).max() <= 1e-5


def test_saved_copied_and_restored_streams_go_on_alike(predictor, artifact, vectors, tmp_path):
    stream = predictor.stream()
    for vector in vectors[:4]:
        stream.push(vector)
    stream.save(tmp_path / "state.npz")
    twin, restored = stream.copy(), fastlvm.Predictor.load(artifact).stream(tmp_path / "state.npz")
    assert restored.seen == twin.seen == 4
    for vector in vectors[4:]:
        wanted = stream.push(vector)
        assert twin.push(vector).tobytes() == restored.push(vector).tobytes() == wanted.tobytes()


def test_two_streams_do_not_meet(predictor, vectors):
    one, other = predictor.stream(), predictor.stream()
    first = [one.push(vector) for vector in vectors[:3]]
    mixed = [(other.push(vector), one.push(-vector))[0] for vector in vectors[:3]]
    np.testing.assert_array_equal(first, mixed)


@pytest.mark.parametrize(
    "vector, says",
    (
        (np.zeros(DIM, np.float32), "vector is all zeros"),
        (np.full(DIM, np.nan, np.float32), "vector holds a value that is not finite"),
        (np.ones((1, DIM), np.float32), r"vector has shape \[1, 32\], and \[32\] is wanted"),
        (np.ones(DIM, np.int64), "vector is int64"),
        ("text", "vector"),
    ),
)
def test_a_wrong_vector_is_refused_and_leaves_the_state(predictor, vectors, vector, says):
    stream, clean = predictor.stream(), predictor.stream()
    with pytest.raises(InputError, match=says):
        stream.push(vector)
    assert stream.seen == 0 and stream.push(vectors[0]).tobytes() == clean.push(vectors[0]).tobytes()


def test_a_state_of_another_model_or_damaged_is_refused(predictor, index, vectors, tmp_path):
    stream = predictor.stream()
    stream.push(vectors[0])
    file = tmp_path / "state.npz"
    stream.save(file)
    fastlvm.export(make_model(8), tmp_path / "other", index=index)
    with pytest.raises(InputError, match="state of another model"):
        fastlvm.Predictor.load(tmp_path / "other").stream(file)
    with pytest.raises(InputError, match="does not exist"):
        predictor.stream(tmp_path / "none.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="truncated or damaged"):
        predictor.stream(file)
    np.savez(file, a=np.zeros(3))
    with pytest.raises(InputError, match="has no array"):
        predictor.stream(file)
    model = predictor.config["sha256"]["model.safetensors"]
    np.savez(file, format="fastlvm-stream", model=model, state=np.zeros(3, np.float32), seen=np.int64(1))
    with pytest.raises(IntegrityError, match="damaged"):
        predictor.stream(file)
