"""Windows: what they hold, how they are split, and the gate that tells whose they are."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlvm.data import Payload, Windows
from fastlvm.data.split import article_counts, check_fractions, split_articles
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import sha256_json


def every_window(windows):
    return np.concatenate([windows.rows(split) for split in windows.splits])


@pytest.fixture(scope="session")
def grouped(walk_payload):
    """Windows over `walk_payload` in four groups of three articles each."""
    groups = walk_payload.keys[:, 0] // 3 + 100
    return Windows.build(walk_payload, split=(0.5, 0.25, 0.25), groups=groups, group_by="novel")


def remade(windows, *, rows=None, keys=None, split=None, payload_id=None):
    """The same windows with something exchanged."""
    return Windows(
        windows.payload_id if payload_id is None else payload_id,
        windows._rows if rows is None else rows,
        windows._keys if keys is None else keys,
        windows._split if split is None else split,
        groups=windows._groups,
        group_by=windows.group_by,
    )


def test_windows_are_all_runs_of_one_article(walk_payload, sample_windows):
    rows = every_window(sample_windows)
    assert rows.shape == (12 * 15, 6)
    assert rows.dtype == np.int64
    keys = walk_payload.keys[rows]
    assert (keys[:, :, 0] == keys[:, :1, 0]).all()
    assert (np.diff(keys[:, :, 1], axis=1) == 1).all()
    for split in sample_windows.splits:
        np.testing.assert_array_equal(sample_windows.keys(split), walk_payload.keys[sample_windows.rows(split)[:, -1]])
    assert sample_windows.keys("test").dtype == sample_windows.articles("test").dtype == np.int32


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=40),
    st.integers(1, 5),
)
def test_gaps_are_never_bridged(tmp_path_factory, keys, context):
    keys = np.array(sorted(keys))
    vectors = np.random.default_rng(0).standard_normal((len(keys), 4))
    payload = Payload.build(tmp_path_factory.mktemp("gaps") / "payload", vectors, keys, encoder="e")
    there = {tuple(key) for key in keys.tolist()}
    expected = {(a, c) for a, c in there if all((a, c - back) in there for back in range(context + 1))}
    if not expected:
        with pytest.raises(InputError, match="lower the context"):
            Windows.build(payload, context=context, split=(1, 0, 0))
        return
    windows = Windows.build(payload, context=context, split=(1, 0, 0))
    assert {tuple(key) for key in windows.keys("train").tolist()} == expected
    assert windows.verify(payload, sample=None).windows == len(expected)


def test_articles_are_in_one_split_each(walk_payload, sample_windows):
    articles = [set(sample_windows.articles(split).tolist()) for split in sample_windows.splits]
    assert [len(part) for part in articles] == [8, 2, 2]
    assert set.union(*articles) == set(range(12))
    assert sample_windows.article_overlap() == 0
    np.testing.assert_array_equal(sample_windows.rows("val"), sample_windows.rows("validation"))
    assert sample_windows.splits == ("train", "validation", "test")
    with pytest.raises(InputError, match="split is 'dev'"):
        sample_windows.rows("dev")


def test_articles_of_a_group_are_in_one_split(grouped):
    assert [len(grouped.articles(split)) for split in grouped.splits] == [6, 3, 3]
    for split in grouped.splits:
        articles = grouped.articles(split)
        assert sorted(articles) == sorted(3 * group + i for group in set(articles // 3) for i in range(3))
        np.testing.assert_array_equal(grouped.groups(split), grouped.keys(split)[:, 0] // 3 + 100)
        assert grouped.groups(split).dtype == np.int32
    assert grouped.group_by == "novel"
    assert grouped.group_overlap() == 0


def test_without_groups_there_are_none(sample_windows):
    assert sample_windows.groups("test") is sample_windows.group_by is sample_windows.group_overlap() is None
    with pytest.raises(InputError, match="split is 'dev'"):
        sample_windows.groups("dev")


def test_groups_that_are_no_groups_are_refused(walk_payload):
    n = len(walk_payload)
    for groups, message in (
        (np.zeros(n - 1, int), rf"groups is int64 \[{n - 1}\]"),
        (np.zeros(n), "groups is float64"),
        (np.zeros(n, bool), "groups is bool"),
        (np.arange(n), "groups puts article 0 into more than one group"),
        (walk_payload.keys[:, 0] - 1, "groups go from -1 to 10"),
        (np.full(n, 2**31), f"groups go from {2**31}"),
    ):
        with pytest.raises(InputError, match=message):
            Windows.build(walk_payload, groups=groups)


def test_the_split_is_of_the_seed(walk_payload):
    one, again, other = (Windows.build(walk_payload, seed=seed) for seed in (3, 3, 4))
    assert one.id == again.id != other.id
    np.testing.assert_array_equal(one.articles("test"), again.articles("test"))
    # written down: no library version may change who is in which split
    codes = split_articles(np.arange(12), (0.5, 0.25, 0.25), 0)
    assert codes.tolist() == split_articles(np.arange(12), (0.5, 0.25, 0.25), np.int64(0)).tolist()
    assert codes.tolist() == PINNED


PINNED = [1, 2, 1, 0, 0, 2, 1, 0, 0, 0, 0, 2]


@settings(deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(lambda parts: sum(parts) > 0))
@example(3, [10, 1, 10])
def test_every_split_with_a_fraction_gets_an_article(articles, parts):
    fractions = tuple(part / sum(parts) for part in parts)
    counts = article_counts(articles, fractions)
    assert sum(counts) == articles
    wanted = sum(fraction > 0 for fraction in fractions)
    for count, fraction in zip(counts, fractions, strict=True):
        assert count >= 0
        if fraction == 0:
            assert count == 0
        elif articles >= wanted:
            assert count >= 1
        assert abs(count - fraction * articles) <= 2


@pytest.mark.parametrize(
    "split",
    [
        (0.8, 0.1),
        (0.8, 0.1, 0.2),
        (0.5, 0.1, 0.1),
        (1.2, -0.1, -0.1),
        (np.nan, 0.5, 0.5),
        "train",
        ("a", "b", "c"),
        None,
        1.0,
    ],
)
def test_fractions_that_make_no_sense_are_refused(walk_payload, split):
    with pytest.raises(InputError, match="three fractions"):
        Windows.build(walk_payload, split=split)


def test_fractions_may_miss_one_by_a_little():
    assert sum(check_fractions((0.33, 0.33, 0.33))) == pytest.approx(1)
    assert sum(check_fractions((0.7, 0.2, 0.1))) == pytest.approx(1)


@pytest.mark.parametrize("context", [0, -1, 2.5, True, "5"])
def test_contexts_that_make_no_sense_are_refused(walk_payload, context):
    with pytest.raises(InputError, match="context is"):
        Windows.build(walk_payload, context=context)


def test_a_seed_that_is_no_number_is_refused(walk_payload):
    with pytest.raises(InputError, match="seed is"):
        Windows.build(walk_payload, seed="x")


# The file


def test_saved_windows_come_back(tmp_path, sample_windows):
    path = tmp_path / "windows.npz"
    sample_windows.save(path)
    found = Windows.open(path)
    assert (found.id, found.payload_id, found.context, found.seed) == (
        sample_windows.id, sample_windows.payload_id, 5, 0,
    )  # fmt: skip
    assert found.fractions == pytest.approx(sample_windows.fractions)
    for split in found.splits:
        np.testing.assert_array_equal(found.rows(split), sample_windows.rows(split))
        np.testing.assert_array_equal(found.keys(split), sample_windows.keys(split))
    with np.load(path, allow_pickle=False) as arrays:
        assert json.loads(str(arrays["meta"][0]))["payload_id"] == sample_windows.payload_id


def test_windows_without_groups_keep_their_id(tmp_path, walk_payload, sample_windows):
    """Of files written before there were groups: neither the array nor the record's entry is there."""
    arrays = stored(sample_windows, tmp_path / "w.npz")
    meta = json.loads(str(arrays["meta"][0]))
    assert meta.pop("group_by") is None and "groups" not in arrays
    np.savez(tmp_path / "old.npz", **arrays | {"meta": np.array([json.dumps(meta)])})
    assert Windows.open(tmp_path / "old.npz").id == sample_windows.id
    content = {"payload_id": sample_windows.payload_id, "context": 5}
    for name, kind in (("rows", "<i8"), ("truth_keys", "<i4"), ("split", "u1")):
        called = name.removeprefix("truth_")
        content[called] = hashlib.sha256(arrays[name].astype(kind).tobytes()).hexdigest()
    assert sample_windows.id == sha256_json(content)[:16]


def test_saved_groups_come_back_and_are_of_the_id(tmp_path, grouped):
    grouped.save(tmp_path / "w.npz")
    found = Windows.open(tmp_path / "w.npz")
    assert (found.id, found.group_by) == (grouped.id, "novel")
    for split in found.splits:
        np.testing.assert_array_equal(found.groups(split), grouped.groups(split))
    plain = Windows(grouped.payload_id, *grouped.arrays())
    other = Windows(grouped.payload_id, *grouped.arrays(), groups=grouped._groups + 1)
    assert len({grouped.id, plain.id, other.id}) == 3
    assert other.group_by == "groups"


@pytest.mark.parametrize(
    ("groups", "by", "match"),
    [
        (lambda a: a[:-1], "novel", r"groups int32 \[179\] by 'novel', and wants int32 \[180\]"),
        (lambda a: a[:, None], "novel", r"groups int32 \[180, 1\]"),
        (lambda a: a.astype(np.int64), "novel", "groups int64"),
        (lambda a: a.astype(float), "novel", "groups float64"),
        (None, "novel", "groups none by 'novel'"),
        (lambda a: a, None, "by None"),
        (lambda a: a, 3, "by 3"),
        (lambda a: a + 1, "novel", "its content gives"),
        (None, None, "its content gives"),
    ],
)
def test_groups_that_do_not_go_with_the_windows_are_refused(tmp_path, grouped, groups, by, match):
    arrays = stored(grouped, tmp_path / "w.npz")
    held = arrays.pop("groups")
    if groups is not None:
        arrays["groups"] = groups(held)
    meta = json.loads(str(arrays["meta"][0])) | {"group_by": by}
    np.savez(tmp_path / "w.npz", **arrays | {"meta": np.array([json.dumps(meta)])})
    with pytest.raises(IntegrityError, match=match):
        Windows.open(tmp_path / "w.npz")


def stored(sample_windows, path):
    sample_windows.save(path)
    with np.load(path) as arrays:
        return dict(arrays)


def test_every_truncation_is_refused(tmp_path, sample_windows):
    path = tmp_path / "windows.npz"
    sample_windows.save(path)
    content = path.read_bytes()
    for keep in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"windows\.npz"):
            Windows.open(path)


def test_flipped_bytes_never_give_other_windows(tmp_path, sample_windows):
    path = tmp_path / "windows.npz"
    sample_windows.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            assert Windows.open(path).id == sample_windows.id
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": None}, "no array 'rows'"),
        ({"split": None}, "no array 'split'"),
        ({"meta": None}, "is not a window file of fastlvm"),
        ({"meta": np.array(["{}"])}, "no record"),
        ({"meta": np.array(["x"])}, "no record"),
        ({"meta": np.array(3)}, "no record"),
        ({"meta": np.array([{}], dtype=object)}, "Python objects"),
        ({"rows": np.array([[{}]], dtype=object)}, "Python objects"),
        ({"rows": lambda a: a[:-1]}, "do not go together"),
        ({"rows": lambda a: a.astype(float)}, "do not go together"),
        ({"rows": lambda a: a[:, :-1]}, "its record says otherwise"),
        ({"truth_keys": lambda a: a[:-1]}, "do not go together"),
        ({"split": lambda a: a + 3}, "has split"),
        ({"rows": lambda a: a - 1000}, "negative"),
        ({"rows": lambda a: a + 1}, "its content gives"),
        ({"truth_keys": lambda a: a + 1}, "its content gives"),
        ({"split": lambda a: a * 0}, "its content gives"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tmp_path, sample_windows, change, match):
    path = tmp_path / "windows.npz"
    arrays = stored(sample_windows, path)
    for name, value in change.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value(arrays[name]) if callable(value) else value
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=match):
        Windows.open(path)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Windows.open(tmp_path / "none.npz")
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(InputError, match=r"not an \.npz"):
        Windows.open(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", contexts=np.zeros((1, 5, 3)), targets=np.zeros((1, 3)))
    with pytest.raises(InputError, match="fastlvm windows import"):
        Windows.open(tmp_path / "b.npz")


# The gate


def test_the_gate_passes_its_own(walk_payload, sample_windows):
    figures = sample_windows.verify(walk_payload)
    assert figures.windows == 180
    assert figures.context_cosine_min == pytest.approx(1, abs=1e-5)
    assert figures.target_cosine_min == pytest.approx(1, abs=1e-5)
    assert abs(figures.random_pair_cosine) < 0.2
    assert figures.article_overlap == 0
    assert str(figures).count("1.0000") == 4 and "random pairs" in str(figures) and "groups" not in str(figures)
    assert sample_windows.verify(walk_payload, sample=7).windows == 7
    assert sample_windows.verify(walk_payload, sample=None).windows == 180
    with pytest.raises(InputError, match="sample is 0"):
        sample_windows.verify(walk_payload, sample=0)


def gate(windows, payload, match):
    with pytest.raises(IntegrityError, match=match) as caught:
        windows.verify(payload, sample=20)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def figure(message, name):
    return float(message.split(f"{name} ")[1].split(" ")[0].rstrip(",)"))


def test_shifted_keys_are_refused(walk_payload, sample_windows):
    for shift in ([0, 1], [1, 0]):
        said = gate(
            remade(sample_windows, keys=sample_windows._keys + np.array(shift)),
            walk_payload,
            "rebuild them with fastlvm",
        )
        assert figure(said, "target cosine") < 0.9
        assert "random pairs" in said and "wants ≥ 0.999" in said


def test_shifted_rows_are_refused(walk_payload, sample_windows):
    said = gate(
        remade(sample_windows, rows=sample_windows._rows - 1), walk_payload, "180 of 180 windows hold other rows"
    )
    assert figure(said, "target cosine") < 0.9


def test_one_wrong_window_among_all_is_found(walk_payload, sample_windows):
    for column in (0, 5):
        rows = sample_windows._rows.copy()
        rows[171, column] = 3
        said = gate(remade(sample_windows, rows=rows), walk_payload, "1 of 180 windows")
        assert "window 171" in said
        assert figure(said, "target cosine" if column == 5 else "context cosine") < 0.9999


def test_rows_that_are_not_there_are_refused(walk_payload, sample_windows):
    rows = sample_windows._rows.copy()
    rows[0] += 10**6
    gate(remade(sample_windows, rows=rows), walk_payload, "1 of 180 windows")


def test_windows_of_another_payload_are_refused(tmp_path, walk_payload, sample_windows, payload_factory):
    path = tmp_path / "w.npz"
    sample_windows.save(path)
    other = payload_factory(articles=12, seed=9)  # the same keys
    said = gate(Windows.open(path), other, "they carry payload id")
    assert str(path) in said and str(other.path) in said
    # the id alone exchanged: rows and keys agree, and it is refused all the same
    gate(remade(sample_windows, payload_id=other.id), walk_payload, "they carry payload id")
    smaller = payload_factory(articles=2, name="small")
    assert figure(gate(sample_windows, smaller, "they carry payload id"), "target cosine") < 0.999


def test_vectors_that_are_no_numbers_are_refused(payload_factory):
    payload = payload_factory()
    windows = Windows.build(payload)
    vectors = np.load(payload.path / "vectors.npy")
    vectors[50] = np.nan
    np.save(payload.path / "vectors.npy", vectors)
    with pytest.raises(IntegrityError, match="hold other vectors than their keys stand for"):
        windows.verify(Payload.open(payload.path), sample=None)


def test_overlapping_articles_are_refused(walk_payload, sample_windows):
    split = sample_windows._split.copy()
    split[0] = (split[0] + 1) % 3
    windows = remade(sample_windows, split=split)
    assert windows.article_overlap() == 1
    gate(windows, walk_payload, "1 articles in more than one split")


def test_overlapping_groups_are_refused(walk_payload, grouped):
    assert str(grouped.verify(walk_payload)).count("groups in two splits 0") == 1
    windows = remade(grouped, split=grouped._keys[:, 0] % 3)  # no article in two splits, and every group in three
    assert (windows.article_overlap(), windows.group_overlap()) == (0, 4)
    gate(windows, walk_payload, r"4 groups \(novel\) in more than one split")


def test_no_windows_are_refused(walk_payload, sample_windows):
    nothing = remade(sample_windows, rows=np.zeros((0, 6)), keys=np.zeros((0, 2)), split=np.zeros(0))
    with pytest.raises(InputError, match="hold no window"):
        nothing.verify(walk_payload)


def test_real_data(real_data, tmp_path):
    vectors = np.load(real_data / "vectors.npy", mmap_mode="r")
    payload = Payload.build(tmp_path / "payload", vectors, np.load(real_data / "keys.npy"), encoder="all-mpnet-base-v2")
    windows = Windows.build(payload)
    figures = windows.verify(payload)
    assert figures.target_cosine_min >= 0.999
    assert 0.2 < figures.random_pair_cosine < 0.3
    said = gate(remade(windows, keys=windows._keys + np.array([0, 1])), payload, "rebuild them")
    assert 0.4 < figure(said, "target cosine") < 0.7
