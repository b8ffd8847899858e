"""`fastlvm diagnose` names what is wrong: every fault is planted alone in a set that is clean without it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cli.conftest import fastlvm, listing, ok, refused
from fastlvm import Index, Payload, Windows, opening
from fastlvm.evaluation import Ranker

ARTICLES, CHUNKS, DIM = 30, 16, 32


@pytest.fixture(scope="module")
def clean(tmp_path_factory, article_walks):
    """A payload and windows without a fault; nobody writes to them."""
    root = tmp_path_factory.mktemp("clean")
    vectors, keys = article_walks(articles=ARTICLES, chunks=CHUNKS, dim=DIM)
    payload = Payload.build(root / "payload", vectors, keys, encoder="walks")
    windows = Windows.build(payload, split=(0.6, 0.2, 0.2))
    windows.save(root / "windows.npz")
    rows = np.concatenate([windows.rows(split) for split in windows.splits])
    rows = rows[np.argsort(rows[:, 0])]
    return SimpleNamespace(vectors=vectors, keys=keys, payload=payload, windows=windows, rows=rows)


@pytest.fixture
def look(clean, tmp_path):
    """look(**arrays) -> (code, first line, diagnose.json) of a predecessor's file of them, or of `windows` saved."""

    def run(*more, payload=None, windows=None, **arrays):
        path = tmp_path / "planted.npz"
        if windows is not None:
            windows.save(path)
        elif arrays:
            np.savez(path, **arrays)
        else:
            path = clean.windows.path
        args = ("--payload", (payload or clean.payload).path, "--windows", path, "--out", tmp_path / "out")
        printed = fastlvm("diagnose", *more, *args)
        found = json.loads((tmp_path / "out" / "diagnose.json").read_text())
        first = printed.out.splitlines()[0]
        assert first == found["verdict"]
        assert (printed.code == 2) == bool(found["faults"])
        return printed.code, first, found

    return run


def held(clean, vectors=None, rows=None, targets=None, keys=None):
    """Arrays of a predecessor's file: clean but for what is given."""
    rows = clean.rows if rows is None else rows
    vectors = clean.vectors if vectors is None else vectors
    return {
        "context_sequences": vectors[rows[:, :-1]],
        "target_vectors": vectors[rows[:, -1]] if targets is None else targets,
        "truth_keys": clean.keys[rows[:, -1]] if keys is None else keys,
    }


def counted(n, period=100):
    place = np.arange(n)
    return np.stack([place // period, place % period], axis=1).astype(np.int32)


def rotation(seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((DIM, DIM)))[0]


def other_encoder(vectors):
    """The same texts in other coordinates, and not quite the same neighbours."""
    moved = np.tanh(3 * vectors @ np.random.default_rng(1).standard_normal((DIM, DIM)) / np.sqrt(DIM))
    return (moved / np.linalg.norm(moved, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["windows", "predecessor"])
def test_a_clean_set_has_no_fault(clean, look, kind):
    code, first, found = look(**({} if kind == "windows" else held(clean)))
    assert code == 0 and first.startswith("no fault found: contexts and targets are the payload rows")
    assert found["faults"] == [] and "cosine 1.0000" in first and "random pairs" in first
    assert {"alignment", "vectors", "duplicates", "splits", "space", "direction", "models"} == set(found["sections"])
    assert "whitened mixture" in first


def test_a_clean_set_without_keys_has_no_fault(clean, look):
    arrays = held(clean)
    del arrays["truth_keys"]
    code, first, _ = look(**arrays)
    assert code == 0 and "runs of the payload's own rows" in first


def planted(clean):
    """Name of a fault -> the arrays of a file with it, its code and a part of its sentence."""
    rows, vectors, keys = clean.rows, clean.vectors, clean.keys
    truth = keys[rows[:, -1]]
    made_up = counted(len(rows), 10)
    by_key = clean.payload.rows_of(made_up)
    pasted = np.where((by_key >= 0)[:, None], vectors[by_key], vectors[rows[:, -1]])
    crossing = np.arange(len(vectors) - 5)[:, None] + np.arange(6)
    wrong = truth[np.random.default_rng(2).permutation(len(truth))]
    return {
        "keys shifted by one": (
            held(clean, keys=truth + np.array([0, 1])),
            "keys-shifted",
            "keys are shifted by +1 chunk",
        ),
        "keys shifted along the rows": (
            held(clean, keys=keys[np.roll(rows[:, -1], 1)]),
            "keys-shifted",
            "keys are shifted by -1 chunk",
        ),
        "keys made up": (
            held(clean, keys=made_up),
            "keys-invented",
            "keys are made up (article = i // 10, chunk = i % 10)",
        ),
        "keys made up, a hundred an article": (
            held(clean, keys=counted(len(rows))),
            "keys-invented",
            "keys are made up (article = i // 100, chunk = i % 100)",
        ),
        "keys wrong": (
            held(clean, keys=wrong),
            "keys-wrong",
            "targets are unrelated to the payload rows they are keyed to (cosine",
        ),
        "targets pasted in by made up keys": (
            held(clean, keys=made_up, targets=pasted),
            "targets-pasted",
            "keys are made up (article = i // 10, chunk = i % 10) and the targets were pasted in by them",
        ),
        "targets of another encoder": (
            held(clean, targets=other_encoder(vectors)[rows[:, -1]]),
            "targets-other-encoder",
            "targets come from another encoder",
        ),
        "targets rotated": (
            held(clean, targets=(vectors[rows[:, -1]] @ rotation()).astype(np.float32)),
            "targets-rotated",
            "rotated by an orthogonal matrix",
        ),
        "all vectors rotated": (
            held(clean, vectors=(vectors @ rotation()).astype(np.float32)),
            "windows-rotated",
            "contexts and targets are the payload rows they are keyed to, rotated",
        ),
        "targets rounded": (
            held(clean, targets=np.round(vectors[rows[:, -1]] * 8) / 8),
            "targets-inexact",
            "rounded or encoded again",
        ),
        "targets one too late": (
            held(clean, targets=vectors[np.minimum(rows[:, -1] + 1, len(vectors) - 1)]),
            "targets-elsewhere",
            "they are the row 1 after it",
        ),
        "not normalised": (held(clean, vectors=3 * vectors), "not-normalised", "vectors are not normalised: 100 %"),
        "context reversed": (
            held(clean) | {"context_sequences": vectors[rows[:, 4::-1]]},
            "context-reversed",
            "contexts are reversed",
        ),
        "read backward": (
            held(clean, rows=rows[:, ::-1]),
            "context-reversed",
            "whole windows run backward",
        ),
        "context shuffled": (
            held(clean) | {"context_sequences": vectors[rows[:, [2, 0, 1, 4, 3]]]},
            "context-scattered",
            "consecutive chunks in another order",
        ),
        "windows crossing articles": (
            held(clean, rows=crossing),
            "windows-cross-articles",
            "cross from one article into the next: 30.5 %",
        ),
        "not finite": (
            held(clean, vectors=np.where(np.arange(len(vectors))[:, None] == 40, np.nan, vectors)),
            "windows-not-finite",
            "hold NaN",
        ),
    }


NAMES = [
    "keys shifted by one",
    "keys shifted along the rows",
    "keys made up",
    "keys made up, a hundred an article",
    "keys wrong",
    "targets pasted in by made up keys",
    "targets of another encoder",
    "targets rotated",
    "all vectors rotated",
    "targets rounded",
    "targets one too late",
    "not normalised",
    "context reversed",
    "read backward",
    "context shuffled",
    "windows crossing articles",
    "not finite",
]


@pytest.mark.parametrize("fault", NAMES)
def test_a_fault_of_a_file_is_the_first_line(clean, look, fault):
    arrays, named, said = planted(clean)[fault]
    code, first, found = look(**arrays)
    assert code == 2
    assert found["faults"][0] == named, first
    assert said in first


def test_every_planted_fault_is_tested(clean):
    assert set(planted(clean)) == set(NAMES)


@pytest.mark.parametrize(
    "fault", ["context reversed", "targets one too late", "windows crossing articles", "targets rotated"]
)
def test_faults_of_a_file_without_keys(clean, look, fault):
    arrays, named, said = planted(clean)[fault]
    del arrays["truth_keys"]
    code, first, found = look(**arrays)
    assert code == 2 and found["faults"][0] == named and said in first


def test_windows_of_rows_that_nothing_is_known_of(clean, look):
    other = held(clean, vectors=other_encoder(np.random.default_rng(5).standard_normal(clean.vectors.shape)))
    code, first, found = look(**other)
    assert code == 2 and found["faults"][0] == "windows-not-of-payload" and "come from another payload" in first
    del other["truth_keys"]
    code, first, found = look(**other)
    assert code == 2 and found["faults"][0] == "windows-not-of-payload" and "are not in the payload" in first


def test_keys_shifted_in_a_file_of_ours(clean, look):
    w, rows = clean.windows, clean.rows
    split = np.zeros(len(rows), np.uint8)
    split[rows[:, 0] > len(clean.vectors) // 2] = 2
    planted = Windows(w.payload_id, rows, clean.keys[rows[:, -1]] + np.array([0, 1]), split)
    code, first, found = look(windows=planted)
    assert code == 2 and found["faults"][0] == "keys-shifted" and "+1 chunk" in first


def test_windows_that_carry_another_payloads_id(clean, look):
    w = clean.windows
    rows, keys, split = w.arrays()
    code, first, found = look(windows=Windows("0123456789abcdef", rows, keys, split))
    assert code == 2 and found["faults"][0] == "windows-of-another-payload" and w.payload_id in first


def test_half_the_payload_duplicated(clean, look, tmp_path):
    vectors = np.concatenate([clean.vectors, clean.vectors])
    keys = np.concatenate([clean.keys, clean.keys + np.array([ARTICLES, 0])])
    payload = Payload.build(tmp_path / "doubled", vectors, keys, encoder="walks")
    code, first, found = look(payload=payload, windows=Windows.build(payload))
    assert code == 2 and found["faults"][0] == "payload-duplicated" and "50 % of the payload's rows repeat" in first
    assert "content-leaked" in found["faults"]


def test_targets_that_repeat_their_context(clean, look, tmp_path):
    vectors = clean.vectors.copy()
    vectors[5::CHUNKS] = vectors[4::CHUNKS]
    payload = Payload.build(tmp_path / "refrains", vectors, clean.keys, encoder="walks")
    code, first, found = look(payload=payload, windows=Windows.build(payload))
    assert code == 2 and found["faults"] == ["target-in-context"] and "repeats a row of its own context" in first


def test_test_articles_in_train(clean, look):
    rows, keys, split = (array.copy() for array in clean.windows.arrays())
    article = clean.windows.articles("test")[0]
    split[np.flatnonzero(keys[:, 0] == article)[:5]] = 0
    code, first, found = look(windows=Windows(clean.payload.id, rows, keys, split))
    assert code == 2 and found["faults"] == ["articles-leaked"]
    assert f"1 of {ARTICLES} articles leak" in first and "train and test" in first and f"article {article}" in first


def test_a_test_article_in_train_under_another_number(clean, look, tmp_path):
    article = int(clean.windows.articles("test")[0])
    copy = clean.vectors[clean.keys[:, 0] == article] + 0.005 * np.random.default_rng(0).standard_normal((CHUNKS, DIM))
    vectors = np.concatenate([clean.vectors, copy.astype(np.float32)])
    keys = np.concatenate([clean.keys, [(ARTICLES, chunk) for chunk in range(CHUNKS)]])
    payload = Payload.build(tmp_path / "copied", vectors, keys, encoder="walks")
    built = Windows.build(payload, split=(1, 0, 0))
    rows, keys, split = (array.copy() for array in built.arrays())
    split[np.isin(keys[:, 0], clean.windows.articles("test"))] = 2
    code, first, found = look(payload=payload, windows=Windows(payload.id, rows, keys, split))
    assert code == 2 and found["faults"] == ["content-leaked"]
    assert "test articles leaked into train under other numbers: 1 article is a copy" in first


def test_an_index(clean, look, other_index):
    own, named, forged = other_index
    assert look("--index", own)[0] == 0
    for index, said in ((named, "was built from another payload"), (forged, "holds other vectors than the payload")):
        code, first, found = look("--index", index)
        assert code == 2 and found["faults"] == ["index-of-another-payload"] and said in first


@pytest.fixture
def other_index(clean, tmp_path, article_walks):
    """An index of the payload, one of another, and one of another that says it is of this one."""
    vectors, keys = article_walks(articles=ARTICLES, chunks=CHUNKS, dim=DIM, seed=9)
    other = Payload.build(tmp_path / "other", vectors, keys, encoder="walks")
    Index.build(clean.payload).save(tmp_path / "own")
    Index.build(other).save(tmp_path / "named")
    other.id = clean.payload.id
    Index.build(other).save(tmp_path / "forged")
    return tmp_path / "own", tmp_path / "named", tmp_path / "forged"


def knows_the_truth(clean):
    rows = clean.rows
    known = {clean.vectors[row[:-1]].tobytes(): clean.vectors[row[-1]] for row in rows}
    return lambda contexts: np.stack([known[context.tobytes()] for context in contexts])


MODELS = {
    "the truth": (knows_the_truth, "model-returns-truth", "returns the truth: cosine 1.0000 to the target"),
    "the last row": (
        lambda _: lambda contexts: contexts[:, -1],
        "model-copies-last",
        "equals copy-last: cosine 1.0000",
    ),
    "a constant": (
        lambda _: lambda contexts: np.ones((len(contexts), DIM), np.float32),
        "model-constant",
        "gives the same vector for every context",
    ),
    "NaN": (
        lambda _: lambda contexts: np.full((len(contexts), DIM), np.nan, np.float32),
        "model-bad-output",
        "gives no usable predictions: prediction of suspect row 0 holds NaN",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_none(clean, look, monkeypatch, name):
    predict, named, said = MODELS[name]
    ranker = Ranker("suspect", predict(clean))
    if name == "the truth":  # asked in other orders too, it has to know more than it can
        known = ranker.predict
        ranker = Ranker("suspect", lambda contexts: _or_last(known, contexts))
    opened = opening.Opened(clean.payload.path, ranker, clean.payload.id, 5, None, None)
    monkeypatch.setattr(opening, "open_model", lambda path, name: opened)
    code, first, found = look("suspect")
    assert code == 2 and found["faults"] == [named] and first.startswith("suspect ") and said in first


def _or_last(known, contexts):
    try:
        return known(contexts)
    except KeyError:
        return contexts[:, -1]


def test_two_faults_are_both_named(clean, look):
    rows = clean.rows
    arrays = held(clean, vectors=2 * clean.vectors, keys=clean.keys[rows[:, -1]] + np.array([0, 1]))
    code, first, found = look(**arrays)
    assert code == 2 and found["faults"] == ["keys-shifted", "not-normalised"]
    assert first.endswith("(and 1 more fault)")


@pytest.mark.parametrize("model", ["run", "artifact"])
def test_a_real_model_is_looked_at(made, model):
    printed = ok("diagnose", getattr(made, model), "--payload", made.payload, "--windows", made.windows)
    assert f"{model}: the truth is first in" in printed and f"{model}: R@5" in printed


def test_a_model_of_another_payload_or_context_is_refused(made, other_payload, tmp_path):
    def line(payload, context):
        windows = tmp_path / f"{context}.npz"
        Windows.build(payload, context=context, split=(0.5, 0.25, 0.25)).save(windows)
        result = fastlvm("diagnose", made.run, "--payload", payload.path, "--windows", windows)
        assert result.code == 2
        return result.err

    assert "belongs to payload" in line(other_payload, 5)
    assert "takes contexts of 5 chunks" in line(Payload.open(made.payload), 3)


def test_the_diagnosis_is_written(clean, tmp_path):
    out = tmp_path / "report"
    args = ("--payload", clean.payload.path, "--windows", clean.windows.path, "--sample", 20)
    ok("diagnose", *args, "--out", out)
    assert list(listing(out)) == ["diagnose.json"]
    found = json.loads((out / "diagnose.json").read_text())
    assert found["windows"]["drawn"] == 20 and found["verdict"].startswith("no fault found")
    assert json.loads(ok("diagnose", *args, "--json")) == found


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--split", "nonsense"), "split is 'nonsense'"),
        (("--sample", 0), "sample is 0"),
        (("--seed", -1), "--seed: got -1"),
        (("--index", "nowhere"), "nowhere"),
    ],
)
def test_bad_arguments(clean, args, said):
    result = fastlvm("diagnose", "--payload", clean.payload.path, "--windows", clean.windows.path, *args)
    assert result.code == 2 and said in result.err.splitlines()[-1]


def test_a_split_without_windows_is_refused(clean, tmp_path):
    path = tmp_path / "train.npz"
    Windows.build(clean.payload, split=(1, 0, 0)).save(path)
    assert "no window in split 'test'" in refused("diagnose", "--payload", clean.payload.path, "--windows", path)
