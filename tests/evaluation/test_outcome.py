"""What rankers did is kept in a folder, and an evaluation that was interrupted goes on from it."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from fastlvm.data import Windows, npz
from fastlvm.evaluation import MISS, Ranker, evaluate
from fastlvm.evaluation.impostors import Impostors
from fastlvm.evaluation.outcome import Listed, Outcome, Store, read_all
from fastlvm.evaluation.ranks import Ranks


def outcome(name="m", n=5, **changes):
    rng = np.random.default_rng(len(name))
    rank = rng.integers(1, 100, n)
    rank[0] = MISS
    given = {
        "name": name,
        "kind": "model",
        "keys": False,
        "space": "raw",
        "note": 'a "note" of ünicode',
        "domain": "in",
        "ranks": Ranks(rank, rank + 1),
        "within": rank // 2,
        "cosine": rng.random(n),
        "units": np.arange(n, dtype=np.int32),
        "impostors": Impostors(np.arange(n), rng.random(n).astype("f4"), rng.random(n).astype("f4"), rank > 3),
        "listed": Listed("flat", 50, rank, rank[::-1].copy()),
        "findings": ({"code": "x", "level": "warning", "sentence": "s", "figures": {"a": 0.1, "b": None}},),
    }
    return Outcome(**{**given, **changes})


def assert_same(one, other):
    arrays = ("within", "cosine", "units")
    for name in ("name", "kind", "keys", "space", "note", "domain"):
        assert getattr(one, name) == getattr(other, name)
    for name in arrays:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for mine, yours in ((one.ranks, other.ranks), (one.impostors, other.impostors)):
        assert (mine is None) == (yours is None)
        for a, b in zip(mine or (), yours or (), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (one.listed is None) == (other.listed is None)
    if one.listed is not None:
        assert (one.listed.about, one.listed.k) == (other.listed.about, other.listed.k)
        np.testing.assert_array_equal(one.listed.rank, other.listed.rank)
        np.testing.assert_array_equal(one.listed.target, other.listed.target)
    assert [dict(f) for f in one.findings] == [dict(f) for f in other.findings]


ABOUT = {"payload": "p", "windows": "w", "split": "test", "limit": None, "seed": 0}


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    put = [outcome("one"), outcome("other", impostors=None, listed=None, findings=())]
    Store(tmp_path / "ranks", ABOUT).put("both", put)
    got = Store(tmp_path / "ranks", dict(ABOUT)).get("both")
    for one, other in zip(put, got, strict=True):
        assert_same(one, other)
    assert [path.suffix for path in (tmp_path / "ranks").iterdir()] == [".npz"]


def test_something_else_is_not_taken(tmp_path):
    store = Store(tmp_path, ABOUT)
    store.put("a", [outcome()])
    assert store.get("b") is None
    for name, value in (("seed", 1), ("limit", 5), ("windows", "v"), ("payload", "q"), ("split", "train")):
        assert Store(tmp_path, {**ABOUT, name: value}).get("a") is None


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None, ABOUT)
    store.put("a", [outcome()])
    assert store.get("a") is None and list(tmp_path.iterdir()) == []


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def other_format(path):
    with npz.Writer(path) as writer:
        writer.array("meta", np.array([json.dumps({"format": "fastlvm-ranks-0", "about": ABOUT, "outcomes": []})]))


def without_ranks(path):
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if "excluded" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, data)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte flipped": flipped,
    "text": lambda path: path.write_text("not an archive"),
    "another format": other_format,
    "without ranks": without_ranks,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_as_if_it_were_not_there(tmp_path, damage):
    store = Store(tmp_path, ABOUT)
    store.put("a", [outcome(n=40)])
    DAMAGE[damage](store.path("a"))
    assert store.get("a") is None
    assert read_all(tmp_path, {}) == []
    store.put("a", [outcome("again")])
    assert store.get("a")[0].name == "again"


def test_no_flipped_byte_changes_what_is_read(tmp_path):
    store, put = Store(tmp_path, ABOUT), outcome()
    store.put("a", [put])
    whole = store.path("a").read_bytes()
    names = len(whole) - 1500  # where the archive lists what it holds
    for at in (*range(0, names, 41), *range(names, len(whole), 5)):
        data = bytearray(whole)
        data[at] ^= 0xFF
        store.path("a").write_bytes(data)
        for one in store.get("a") or []:
            assert_same(one, put)


def test_all_of_the_same_evaluation_are_read(tmp_path):
    for seed in (0, 1):
        Store(tmp_path, {**ABOUT, "seed": seed}).put("a", [outcome(f"seed {seed}")])
    Store(tmp_path, ABOUT).put("b", [outcome("b"), outcome("c")])
    assert {one.name for one in read_all(tmp_path, {"seed": 0, "payload": "p"})} == {"seed 0", "b", "c"}
    assert {one.name for one in read_all(tmp_path, {})} == {"seed 0", "seed 1", "b", "c"}
    assert read_all(tmp_path, {"payload": "other"}) == read_all(tmp_path / "absent", {}) == []


class Counted:
    """Rankers that are told apart by an identity, and how often each was asked."""

    def __init__(self):
        self.calls = []

    def ranker(self, name, weight, *, fails=False, identity=None):
        def predict(context):
            self.calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return context[:, -1] + weight * context[:, -2]

        return Ranker(name, predict, identity=f"{name} {weight}" if identity is None else identity)


def test_an_interrupted_evaluation_goes_on_and_comes_to_the_same(payload, windows, tmp_path):
    counted = Counted()
    options = {"resamples": 50, "outcomes": tmp_path / "ranks"}
    first = counted.ranker("first", 0.2)
    with pytest.raises(KeyboardInterrupt):
        evaluate([first, counted.ranker("second", 0.5, fails=True)], payload, windows, **options)
    assert counted.calls == ["first", "second"] and len(list((tmp_path / "ranks").glob("*.npz"))) == 1
    models = [first, counted.ranker("second", 0.5)]
    resumed = evaluate(models, payload, windows, **options)
    assert counted.calls == ["first", "second", "second"]
    again = evaluate(models, payload, windows, **options)
    assert len(counted.calls) == 3
    assert again.to_dict() == resumed.to_dict() == evaluate(models, payload, windows, resamples=50).to_dict()


def test_baselines_are_kept_too(payload, windows, tmp_path, monkeypatch):
    whole = evaluate([], payload, windows, resamples=50, outcomes=tmp_path)
    monkeypatch.setattr("fastlvm.evaluation.baselines.fit_baselines", lambda *_, **__: pytest.fail("fitted again"))
    assert evaluate([], payload, windows, resamples=50, outcomes=tmp_path).to_dict() == whole.to_dict()


@pytest.mark.parametrize("change", ["seed", "limit", "split", "windows", "clusters", "trained"])
def test_another_question_is_not_answered_from_what_was_kept(payload, windows, tmp_path, change):
    counted = Counted()

    def ask(weight=0.2, over=windows, **options):
        model = counted.ranker("m", weight)
        return evaluate([model], payload, over, baselines=False, resamples=50, outcomes=tmp_path, **options)

    ask()
    ask()
    assert len(counted.calls) == 1
    changed = {
        "seed": lambda: ask(seed=1),
        "limit": lambda: ask(limit=20),
        "split": lambda: ask(split="validation"),
        "windows": lambda: ask(over=Windows.build(payload, context=5, split=(0.5, 0.2, 0.3), seed=2)),
        "clusters": lambda: ask(clusters=np.arange(len(windows.rows("test"))) // 5),
        "trained": lambda: ask(weight=0.9),
    }[change]
    report = changed()
    assert len(counted.calls) == 2
    counted.calls.clear()
    assert changed().to_dict() == report.to_dict() and counted.calls == []


def test_a_ranker_without_an_identity_is_not_kept(payload, windows, tmp_path):
    counted = Counted()
    for _ in range(2):
        model = counted.ranker("m", 0.2, identity="")
        evaluate([model], payload, windows, baselines=False, resamples=50, outcomes=tmp_path)
    assert len(counted.calls) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["half", "a byte flipped"])
def test_a_damaged_file_is_done_again(payload, windows, tmp_path, damage):
    counted = Counted()
    options = {"baselines": False, "resamples": 50, "outcomes": tmp_path}
    whole = evaluate([counted.ranker("m", 0.2)], payload, windows, **options)
    (path,) = tmp_path.glob("*.npz")
    DAMAGE[damage](path)
    assert evaluate([counted.ranker("m", 0.2)], payload, windows, **options).to_dict() == whole.to_dict()
    assert len(counted.calls) == 2 and [p.name for p in tmp_path.iterdir()] == [path.name]
    evaluate([counted.ranker("m", 0.2)], payload, windows, **options)
    assert len(counted.calls) == 2
