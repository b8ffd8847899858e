"""What a diagnosis measures; that every fault is named is tested in tests/cli/test_diagnose.py."""

from __future__ import annotations

import numpy as np
import pytest

from fastlvm.data import Payload, Windows
from fastlvm.data.held import HeldWindows
from fastlvm.evaluation import Ranker
from fastlvm.evaluation.diagnose import diagnose
from fastlvm.evaluation.diagnose import drawn as drawing
from fastlvm.evaluation.diagnose.order import backward, direction, order_sensitivity
from fastlvm.evaluation.diagnose.relation import relation
from fastlvm.evaluation.diagnose.vectors import describe_space
from fastlvm.evaluation.ranker import Pools


def saved(windows, tmp_path):
    windows.save(tmp_path / "windows.npz")
    return tmp_path / "windows.npz"


def old_file(path, payload, rows, **changed):
    """A predecessor's file of payload rows [n, L + 1]."""
    arrays = {
        "context_sequences": payload.take(rows[:, :-1]),
        "target_vectors": payload.take(rows[:, -1]),
        "truth_keys": payload.keys[rows[:, -1]],
    } | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def of(found, code):
    return [finding for finding in found.findings if finding.code == code]


def build(folder, vectors, keys, **options):
    return Payload.build(folder, vectors, np.asarray(keys, np.int32), encoder="test-encoder", **options)


@pytest.mark.parametrize("context", [1, 2, 7])
def test_other_lengths_of_context(payload, tmp_path, context):
    windows = Windows.build(payload, context=context)
    rows = windows.rows("train")
    old = old_file(tmp_path / "old.npz", payload, rows)
    shifted = old_file(tmp_path / "bad.npz", payload, rows, truth_keys=payload.keys[rows[:, -1]] - np.array([0, 1]))
    for path in (saved(windows, tmp_path), old):
        assert diagnose(payload, HeldWindows.open(path, payload)).faults == []
    found = diagnose(payload, HeldWindows.open(shifted, payload))
    assert [fault.code for fault in found.faults] == ["keys-shifted"]
    assert "shifted by -1 chunk" in found.verdict


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_handful_of_windows_of_one_article(article_walks, tmp_path, count, keyed):
    vectors, keys = article_walks(articles=1, chunks=count + 5)
    payload = build(tmp_path / "p", vectors, keys)
    rows = np.arange(count)[:, None] + np.arange(6)
    path = old_file(tmp_path / "old.npz", payload, rows, **({} if keyed else {"truth_keys": None}))
    found = diagnose(payload, HeldWindows.open(path, payload), [Ranker("last", lambda context: context[:, -1])])
    assert found.faults == [] and found.verdict.startswith("no fault found")
    assert of(found, "direction-not-measured")


def test_a_payload_without_a_window_is_still_looked_at(article_walks, tmp_path):
    vectors, keys = article_walks(articles=3, chunks=4)
    payload = build(tmp_path / "p", vectors, keys)
    path = old_file(tmp_path / "old.npz", payload, np.arange(6)[None])
    found = diagnose(payload, HeldWindows.open(path, payload))
    assert [fault.code for fault in found.faults] == ["windows-cross-articles"]
    assert of(found, "ranks-not-measured")


def test_gaps_between_chunks(article_walks, tmp_path):
    vectors, keys = article_walks(articles=4, chunks=20)
    payload = build(tmp_path / "p", vectors, keys * np.array([1, 2]))
    rows = np.concatenate([start + np.arange(10)[:, None] + np.arange(6) for start in (0, 20, 40, 60)])
    found = diagnose(payload, HeldWindows.open(old_file(tmp_path / "old.npz", payload, rows), payload))
    assert [fault.code for fault in found.faults] == ["windows-skip-chunks"]


def test_a_few_bad_windows_among_many_are_found(payload, windows, tmp_path):
    rows = windows.rows("train")
    keys = payload.keys[rows[:, -1]].copy()
    keys[7] = keys[-1]
    found = diagnose(payload, HeldWindows.open(old_file(tmp_path / "old.npz", payload, rows, truth_keys=keys), payload))
    assert [fault.code for fault in found.faults] == ["keys-wrong"]
    assert found.faults[0].figures["windows"] == pytest.approx(1 / len(rows))


def test_the_packaged_sample_has_no_fault(tmp_path):
    payload = Payload.sample()
    path = saved(Windows.build(payload), tmp_path)
    mean = Ranker("mean", lambda context: context.mean(axis=1))
    found = diagnose(payload, HeldWindows.open(path, payload), [mean], sample=200)
    assert found.faults == [] and found.verdict.startswith("no fault found")
    (ranks,) = of(found, "ranks")
    assert ranks.figures["r5"] > 0.01 and ranks.figures["rows"] == len(payload)
    (order,) = of(found, "context-order")
    assert order.figures["r5_as_is"] == pytest.approx(order.figures["r5_reversed"], abs=0.02)


def test_the_predecessors_mistake_on_real_texts_is_named_in_the_first_line(real_data, tmp_path):
    keys = np.load(real_data / "keys.npy")
    some = keys[:, 0] < 60
    payload = build(tmp_path / "p", np.load(real_data / "vectors.npy", mmap_mode="r")[some], keys[some])
    windows = Windows.build(payload, split=(1, 0, 0))
    rows = windows.rows("train")[:3000]
    place = np.arange(len(rows))
    made_up = np.stack([place // 100, place % 100], axis=1).astype(np.int32)
    by_key = payload.rows_of(made_up)
    target = np.where(by_key >= 0, by_key, rows[:, -1])
    for name, targets, said in (
        ("made_up", rows[:, -1], "targets are"),
        ("pasted", target, "and the targets were pasted in by them"),
    ):
        path = old_file(
            tmp_path / f"{name}.npz", payload, rows, truth_keys=made_up, target_vectors=payload.take(targets)
        )
        last = Ranker("last", lambda context: context[:, -1])
        found = diagnose(payload, HeldWindows.open(path, payload), [last], sample=300)
        assert found.verdict.startswith("the keys are made up (article = i // 100, chunk = i % 100)")
        faults = [fault.code for fault in found.faults]
        assert faults[0] == {"made_up": "keys-invented", "pasted": "targets-pasted"}[name]
        assert said in found.verdict and "random pairs 0." in found.verdict


def test_ranks_and_impostors_are_those_of_the_model(payload, windows, tmp_path):
    held = HeldWindows.open(saved(windows, tmp_path), payload)
    found = diagnose(payload, held, [Ranker("mean", lambda context: context.mean(axis=1))])
    (ranks,), (impostors,) = of(found, "ranks"), of(found, "impostors")
    rows = windows.rows("test")
    predictions = payload.take(rows[:, :-1]).mean(axis=1)
    scores = predictions @ np.asarray(payload.vectors).T
    truth = scores[np.arange(len(rows)), rows[:, -1]]
    np.put_along_axis(scores, rows, -np.inf, axis=1)
    assert ranks.figures["r5"] == pytest.approx(((scores > truth[:, None]).sum(axis=1) < 5).mean())
    best = scores.argmax(axis=1)
    lost = scores.max(axis=1) > truth
    assert impostors.figures["beaten"] == pytest.approx(lost.mean())
    same = payload.keys[best, 0] == payload.keys[rows[:, -1], 0]
    assert impostors.figures["same_article"] == pytest.approx(same[lost].mean())
    margin = (truth - scores.max(axis=1)) / np.linalg.norm(predictions, axis=1)
    assert impostors.figures["median_margin"] == pytest.approx(np.median(margin), abs=1e-5)


def test_order_sensitivity_tells_what_a_model_looks_at(payload, windows):
    rows, pools = windows.rows("train"), Pools(payload)
    mean = order_sensitivity(Ranker("mean", lambda c: c.mean(axis=1)), pools, rows, 0).figures
    assert mean["r5_as_is"] == mean["r5_shuffled"] == mean["r5_reversed"]
    last = order_sensitivity(Ranker("last", lambda c: c[:, -1]), pools, rows, 0).figures
    assert last["r5_as_is"] > last["r5_shuffled"] > last["r5_reversed"]
    assert last["r5_without_-1"] < last["r5_as_is"] == last["r5_without_-2"] == last["r5_without_-5"]
    first = order_sensitivity(Ranker("first", lambda c: c[:, 0]), pools, rows, 0)
    assert "position -5 matters most" in first.sentence


def test_a_payload_read_backward_is_a_payload(payload):
    turned = backward(payload)
    np.testing.assert_array_equal(turned.take(np.arange(len(turned))), payload.take(np.arange(len(payload)))[::-1])
    assert len(Windows.build(turned).rows("train")) == len(Windows.build(payload).rows("train"))
    assert (turned.rows_of(turned.keys) == np.arange(len(turned))).all()


def stationary(articles=60, chunks=15, dim=24, seed=0):
    """Articles in which a chunk is the rotated one before and noise, as it is of the one after when read backward."""
    rng = np.random.default_rng(seed)
    vectors = np.empty((articles, chunks, dim), np.float32)
    for article in range(articles):
        vectors[article, 0] = rng.standard_normal(dim)
        for chunk in range(1, chunks):
            vectors[article, chunk] = 0.8 * np.roll(vectors[article, chunk - 1], 1) + 0.6 * rng.standard_normal(dim)
    keys = np.stack(np.meshgrid(np.arange(articles), np.arange(chunks), indexing="ij"), axis=-1).reshape(-1, 2)
    return vectors.reshape(-1, dim), keys


def test_the_direction_test_is_even_where_time_can_be_reversed(tmp_path):
    vectors, keys = stationary()
    (found,) = direction(build(tmp_path / "p", vectors, keys), 5, 0)
    assert found.code == "direction"
    assert found.figures["forward_r5"] > 0.3 and found.figures["backward_r5"] > 0.3
    assert "no direction shows" in found.sentence and found.figures["low"] <= 0 <= found.figures["high"]


def test_the_direction_test_sees_one_way_streets(tmp_path):
    """The first half of a chunk holds all of the one before; its second half, which is half as long, is new."""
    rng = np.random.default_rng(0)
    articles, chunks, dim = 60, 15, 24
    vectors = rng.standard_normal((articles, chunks, dim)).astype(np.float32)
    half = dim // 2
    for chunk in range(1, chunks):
        before = vectors[:, chunk - 1]
        vectors[:, chunk, :half] = before[:, :half] * 0.2 + 2 * before[:, half:]
    vectors[..., half:] *= 0.5
    keys = np.stack(np.meshgrid(np.arange(articles), np.arange(chunks), indexing="ij"), axis=-1).reshape(-1, 2)
    (found,) = direction(build(tmp_path / "p", vectors.reshape(-1, dim), keys), 5, 0)
    assert found.figures["low"] > 0 or found.figures["high"] < 0
    assert "is easier" in found.sentence


def test_the_space_is_described(tmp_path):
    rng = np.random.default_rng(0)
    vectors = np.zeros((4000, 12), np.float32)
    vectors[:, :4] = rng.standard_normal((4000, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = np.stack([np.arange(4000) // 20, np.arange(4000) % 20], axis=1)
    (found,) = describe_space(build(tmp_path / "p", vectors, keys), 0)
    assert found.figures["effective_dimension"] == pytest.approx(4, rel=0.02)
    assert found.figures["mean_vector_norm"] < 0.05 and abs(found.figures["adjacent_cosine"]) < 0.05


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda v, rng: v @ np.linalg.qr(rng.standard_normal((16, 16)))[0], "rotated"),
        (lambda v, rng: -v, "rotated"),
        (lambda v, rng: np.tanh(v @ rng.standard_normal((16, 16))), "encoder"),
        (lambda v, rng: rng.standard_normal(v.shape), "unrelated"),
        (lambda v, rng: v + 0.05 * rng.standard_normal(v.shape), "inexact"),
    ],
)
@pytest.mark.parametrize("n", [20, 300])
def test_how_vectors_are_related_to_rows(made, kind, n):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, 16)) + 0.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert relation(made(rows, rng).astype(np.float32), rows.astype(np.float32)).kind == kind


def test_too_few_rows_to_compare_are_unrelated():
    rows = np.eye(11, dtype=np.float32)
    assert relation(rows[::-1], rows)[::2] == ("unrelated", None)


def test_nearest_is_exact_in_blocks(payload, monkeypatch):
    monkeypatch.setattr(drawing, "_POOL", 37)
    monkeypatch.setattr(drawing, "_QUERIES", 11)
    vectors = np.asarray(payload.vectors)
    queries = vectors[::7] + 0.3 * np.random.default_rng(0).standard_normal((len(vectors[::7]), 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    some = np.arange(3, len(vectors), 2)
    for rows in (None, some):
        scores = queries @ vectors[slice(None) if rows is None else rows].T
        row, cosine = drawing.nearest(queries, payload, rows)
        best = scores.argmax(axis=1)
        np.testing.assert_array_equal(row, best if rows is None else rows[best])
        np.testing.assert_allclose(cosine, scores.max(axis=1), rtol=1e-5)
