"""Targets taken from a payload by keys, and keys found in it by vectors: what is kept, said and refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastlvm.data import Payload, Windows, align_windows, remap_windows
from fastlvm.errors import InputError, IntegrityError


@pytest.fixture
def old(tmp_path, walk_payload):
    """old(**changes) -> a predecessor's file of all 180 windows of `walk_payload`.

    changes: by an array's name, what is made of it; None leaves it out.
    """
    windows = Windows.build(walk_payload, split=(1, 0, 0))
    rows = windows.rows("train")
    arrays = {
        "contexts": walk_payload.take(rows[:, :-1]),
        "targets": walk_payload.take(rows[:, -1]),
        "truth_keys": windows.keys("train"),
        "provenance": np.array([json.dumps({"embedder_id": "gtr"})]),
    }

    def write(**changes):
        made = arrays | {name: change and change(arrays[name].copy()) for name, change in changes.items()}
        np.savez(tmp_path / "old.npz", **{name: value for name, value in made.items() if value is not None})
        return tmp_path / "old.npz"

    return write


def moved(values):
    """Every row somewhere else."""
    return np.roll(values, 37, axis=0)


def made_up(keys):
    number = np.arange(len(keys))
    return np.stack([number // 100, number % 100], axis=1)


def lost(payload, folder, keep):
    """The payload without the rows where `keep` [N] is False."""
    return Payload.build(folder / "lost", payload.vectors[keep], payload.keys[keep], encoder="test-encoder")


def the_same(windows, payload):
    """Whether the windows are all that `payload` has, whatever their split."""
    every = Windows.build(payload, split=(1, 0, 0))
    found = np.concatenate([windows.rows(split) for split in windows.splits])
    windows.verify(payload, sample=None)
    return np.array_equal(np.sort(found, axis=0), np.sort(every.rows("train"), axis=0))


# align


def test_other_targets_are_replaced_by_those_of_the_keys(old, walk_payload):
    found = align_windows(old(targets=moved), walk_payload, split=(0.5, 0.25, 0.25), seed=3)
    assert the_same(found.windows, walk_payload)
    assert (found.count, found.coverage, found.changed) == (180, 1.0, 180)
    assert found.before.context == pytest.approx(1, abs=1e-5)
    assert abs(found.before.target) < 0.3
    assert found.after.context == pytest.approx(1, abs=1e-5)
    assert found.after.target == pytest.approx(1, abs=1e-5)
    assert abs(found.random_pair_cosine) < 0.2
    assert found.windows.article_overlap() == 0
    assert [len(found.windows.articles(split)) for split in found.windows.splits] == [6, 3, 3]
    assert (found.windows.seed, found.windows.payload_id) == (3, walk_payload.id)
    assert "gtr" in found.windows.source and "targets replaced" in found.windows.source


def test_targets_that_are_right_are_not_counted_as_replaced(old, walk_payload):
    def three(targets):
        targets[:3] = targets[60:63]
        targets[3] = np.nan
        return targets

    found = align_windows(old(targets=three), walk_payload, split="test")
    assert found.changed == 4
    assert len(found.windows.rows("test")) == 180
    assert found.windows.fractions is None


def test_made_up_keys_are_not_aligned(old, walk_payload):
    with pytest.raises(IntegrityError, match="cannot be aligned to payload") as caught:
        align_windows(old(truth_keys=made_up), walk_payload, allow_missing=0.5)
    said = str(caught.value)
    assert "fastlvm windows remap" in said and "nothing can pass" in said and "random pairs" in said
    assert "--allow-missing" not in said and "\n" not in said
    assert abs(float(said.split("context cosine ")[1].split(" ")[0])) < 0.4


@pytest.mark.parametrize("shift", [[0, 1], [0, -1], [1, 0], [50, 0]])
def test_shifted_keys_are_not_aligned(old, walk_payload, shift):
    with pytest.raises(IntegrityError, match="180 of 180 windows hold other contexts"):
        align_windows(old(truth_keys=lambda keys: keys + shift), walk_payload)


def test_one_context_of_another_place_is_enough_to_refuse(old, walk_payload):
    def one(contexts):
        contexts[7, 2] = contexts[40, 0]
        return contexts

    with pytest.raises(IntegrityError, match=r"1 of 180 windows .*first: window 7; 0 with keys.*--allow-missing"):
        align_windows(old(contexts=one), walk_payload)
    found = align_windows(old(contexts=one), walk_payload, allow_missing=1 / 180)
    assert (len(found.windows), found.count, found.changed) == (179, 180, 0)
    kept = np.concatenate([found.windows.rows(split) for split in found.windows.splits])
    left_out = Windows.build(walk_payload, split=(1, 0, 0)).rows("train")[7]
    assert len(kept) == 179 and left_out[-1] not in kept[:, -1]
    assert found.after.context == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("row", [30, 39])  # in the middle of an article, and its last, which is a target alone
def test_rows_the_payload_lost_may_be_left_out(old, tmp_path, walk_payload, row):
    payload = lost(walk_payload, tmp_path, np.arange(240) != row)
    touched = 6 if row == 30 else 1
    with pytest.raises(
        IntegrityError, match=rf"{touched} of 180 windows .*{touched} with keys that the payload has not"
    ):
        align_windows(old(), payload)
    found = align_windows(old(), payload, allow_missing=0.04)
    assert len(found.windows) == 180 - touched
    assert the_same(found.windows, payload)


def test_a_share_is_met_by_exactly_as_many_windows(old, walk_payload):
    def nine(contexts):
        contexts[:9] = contexts[60:69]
        return contexts

    assert len(align_windows(old(contexts=nine), walk_payload, allow_missing=0.05).windows) == 171
    with pytest.raises(IntegrityError, match="9 of 180 windows"):
        align_windows(old(contexts=nine), walk_payload, allow_missing=0.049)


def test_without_keys_there_is_nothing_to_align_by(old, walk_payload):
    with pytest.raises(InputError, match=r"no truth_keys to align by.*remap"):
        align_windows(old(truth_keys=None), walk_payload)


# remap


@pytest.mark.parametrize("keys", [None, made_up, lambda keys: keys + np.array([0, 1]), moved])
def test_keys_are_found_by_the_vectors(old, walk_payload, keys):
    found = remap_windows(old(truth_keys=keys), walk_payload, split=(0.5, 0.25, 0.25))
    assert the_same(found.windows, walk_payload)
    assert (found.coverage, found.changed) == (1.0, 180)
    assert found.windows.article_overlap() == 0
    assert found.after.context == pytest.approx(1, abs=1e-5)
    assert found.after.target == pytest.approx(1, abs=1e-5)
    if keys is None:
        assert found.before is None and "no keys" in str(found)
    else:
        assert found.before.context < 0.9 and found.before.target < 0.9


def test_keys_that_are_right_are_kept(old, walk_payload):
    found = remap_windows(old(), walk_payload)
    assert (found.changed, found.coverage) == (0, 1.0)
    assert found.before.target == pytest.approx(1, abs=1e-5)


def test_of_two_runs_with_the_same_vectors_a_window_keeps_its_own(tmp_path, article_walks):
    vectors, keys = article_walks(articles=3, chunks=10)
    vectors[10:16] = vectors[:6]  # an article that begins as the first does
    payload = Payload.build(tmp_path / "payload", vectors, keys, encoder="e")
    rows = np.array([[10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5]])
    taken = payload.take(rows)
    np.savez(tmp_path / "old.npz", contexts=taken[:, :5], targets=taken[:, 5], truth_keys=np.array([[1, 5], [2, 5]]))
    found = remap_windows(tmp_path / "old.npz", payload, split="test")
    np.testing.assert_array_equal(found.windows.keys("test"), [[1, 5], [0, 5]])
    assert found.changed == 1


def test_windows_of_which_the_payload_has_no_run_are_dropped(old, tmp_path, walk_payload):
    payload = lost(walk_payload, tmp_path, walk_payload.keys[:, 0] != 4)  # 15 of 180 windows
    found = remap_windows(old(truth_keys=made_up), payload)
    assert (len(found.windows), found.count) == (165, 180)
    assert "165 of 180 windows (91.7 %), 15 dropped, 165 changed" in str(found)
    assert the_same(found.windows, payload)
    with pytest.raises(
        IntegrityError, match=r"165 of 180 windows are runs of its chunks, and a share of 0.95 is wanted"
    ):
        remap_windows(old(truth_keys=made_up), payload, min_coverage=0.95)


def test_a_target_that_does_not_follow_its_context_is_no_run(old, walk_payload):
    match = r"0 of 180 windows .*others 180 have a target that it holds, but not behind .*fastlvm windows align"
    with pytest.raises(IntegrityError, match=match):
        remap_windows(old(targets=moved), walk_payload)


@pytest.mark.parametrize("least", [0.9, 0.0])
def test_another_payload_is_refused_with_the_figures(old, payload_factory, least):
    other = payload_factory(articles=12, seed=5)
    with pytest.raises(IntegrityError, match=r"0 of 180 windows.*others 0 have.*random pairs.*they were made from"):
        remap_windows(old(), other, min_coverage=least)


# both


@pytest.mark.parametrize("change", [align_windows, remap_windows])
def test_a_window_file_of_ours_is_refused(tmp_path, walk_payload, sample_windows, change):
    sample_windows.save(tmp_path / "w.npz")
    with pytest.raises(InputError, match="is a window file of fastlvm"):
        change(tmp_path / "w.npz", walk_payload)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize(("change", "name"), [(align_windows, "allow_missing"), (remap_windows, "min_coverage")])
def test_shares_that_are_none_are_refused(old, walk_payload, change, name, share):
    with pytest.raises(InputError, match=f"{name} is {share}"):
        change(old(), walk_payload, **{name: share})


def test_all_windows_cannot_be_left_out(old, walk_payload):
    with pytest.raises(InputError, match=r"allow_missing is 1\.0"):
        align_windows(old(), walk_payload, allow_missing=1.0)


@pytest.mark.parametrize("change", [align_windows, remap_windows])
@pytest.mark.parametrize("split", ["dev", (0.5, 0.1, 0.1)])
def test_splits_that_are_none_are_refused(old, walk_payload, change, split):
    with pytest.raises(InputError, match="split is"):
        change(old(), walk_payload, split=split)


def test_what_is_said_has_coverage_and_both_cosines_beside_that_of_random_pairs(old, walk_payload):
    said = str(align_windows(old(targets=moved), walk_payload)).splitlines()
    assert said[0] == "coverage  180 of 180 windows (100.0 %), 0 dropped, 180 changed"
    assert said[1].startswith("before    target cosine ") and said[1].endswith("context cosine 1.0000")
    assert said[2] == "after     target cosine 1.0000, context cosine 1.0000"
    assert said[3].startswith("random pairs of chunks have cosine ")


def test_keys_none_of_which_is_in_the_payload_have_no_cosine(old, walk_payload):
    found = remap_windows(old(truth_keys=lambda keys: keys + np.array([1000, 0])), walk_payload)
    assert math.isnan(found.before.target)
    assert "before    target cosine -, context cosine -" in str(found)
