"""Windows with the vectors that a file holds, right or wrong, the predecessor's and ours."""

from __future__ import annotations

import numpy as np
import pytest

from fastlvm.data import Windows
from fastlvm.data.held import HeldWindows
from fastlvm.errors import InputError, IntegrityError


@pytest.fixture
def old(tmp_path, walk_payload, sample_windows):
    """The train windows of `walk_payload` in a predecessor's file."""
    sample_windows.export_predecessor(tmp_path / "old.npz", walk_payload, "train")
    return tmp_path / "old.npz"


@pytest.fixture
def ours(tmp_path, sample_windows):
    Windows(sample_windows.payload_id, *sample_windows.arrays(), source="here").save(tmp_path / "ours.npz")
    return tmp_path / "ours.npz"


def test_a_predecessors_file_is_described(old, walk_payload, sample_windows):
    held = HeldWindows.open(old, walk_payload)
    assert (held.kind, held.path, held.count, held.context, held.dim) == ("predecessor", old, 120, 5, 32)
    np.testing.assert_array_equal(held.keys, sample_windows.keys("train"))
    assert held.keys.dtype == np.int64
    assert held.split is None
    assert held.payload_id.startswith(f"fastlvm-{walk_payload.id}@sha256:")
    assert "test-encoder" in held.source


def test_our_own_file_is_described(ours, walk_payload, sample_windows):
    held = HeldWindows.open(ours, walk_payload)
    assert (held.kind, held.path, held.count, held.context, held.dim) == ("windows", ours, 180, 5, 32)
    rows, keys, split = sample_windows.arrays()
    np.testing.assert_array_equal(held.keys, keys)
    np.testing.assert_array_equal(held.split, split)
    assert (held.keys.dtype, held.split.dtype) == (np.int64, np.uint8)
    assert (held.payload_id, held.source) == (walk_payload.id, "here")
    np.testing.assert_array_equal(held.take(np.arange(180)), walk_payload.vectors[rows])


@pytest.mark.parametrize("size", [1, 7, 120, 2048])
@pytest.mark.parametrize("kind", ["old", "ours"])
def test_blocks_are_all_windows_in_order(kind, size, request, walk_payload, sample_windows):
    held = HeldWindows.open(request.getfixturevalue(kind), walk_payload)
    rows = sample_windows.rows("train") if kind == "old" else sample_windows.arrays()[0]
    parts, pieces = zip(*held.blocks(size), strict=True)
    assert [part.stop - part.start for part in parts] == [len(piece) for piece in pieces]
    assert max(len(piece) for piece in pieces) == min(size, held.count)
    assert all(piece.dtype == np.float32 and piece.shape[1:] == (6, 32) for piece in pieces)
    np.testing.assert_array_equal(
        np.concatenate([np.arange(part.start, part.stop) for part in parts]), range(len(rows))
    )
    np.testing.assert_array_equal(np.concatenate(pieces), walk_payload.vectors[rows])


@pytest.mark.parametrize("kind", ["old", "ours"])
@pytest.mark.parametrize("indices", [[], [0], [119], [0, 0, 3, 50, 50, 118], range(120)])
def test_windows_are_taken_by_their_place(kind, indices, request, walk_payload, sample_windows):
    held = HeldWindows.open(request.getfixturevalue(kind), walk_payload)
    rows = sample_windows.rows("train") if kind == "old" else sample_windows.arrays()[0]
    found = held.take(np.array(indices, dtype=np.int64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, walk_payload.vectors[rows[np.array(indices, dtype=np.int64)]])


def test_taken_windows_come_out_of_every_block(tmp_path, walk_payload):
    vectors = np.arange(5000, dtype=np.float32)[:, None, None] * np.ones((1, 3, 32), np.float32)
    np.savez(tmp_path / "long.npz", contexts=vectors[:, :2], targets=vectors[:, 2])
    held = HeldWindows.open(tmp_path / "long.npz", walk_payload)
    wanted = [0, 2047, 2048, 2048, 4095, 4096, 4999]
    np.testing.assert_array_equal(held.take(wanted)[:, :, 0], np.repeat(wanted, 3).reshape(-1, 3))


@pytest.mark.parametrize("indices", [[1, 0], [-1], [120], [[0]]])
def test_places_that_are_none_are_refused(old, indices, walk_payload):
    with pytest.raises(InputError, match=r"sorted and from 0 to 119"):
        HeldWindows.open(old, walk_payload).take(indices)


@pytest.mark.parametrize("kind", ["old", "ours"])
def test_windows_of_another_payload_are_opened(kind, request, payload_factory):
    held = HeldWindows.open(request.getfixturevalue(kind), payload_factory(articles=12, seed=5))
    assert held.count == len(held.take(np.arange(held.count)))


def test_vectors_are_given_as_stored(tmp_path, walk_payload):
    contexts = np.full((2, 5, 32), 3.0, np.float64)
    contexts[1, 2] = np.nan
    keys = np.array([[2**40, -7], [0, 5]])
    np.savez(
        tmp_path / "odd.npz", sequences=contexts, train_target_vectors=np.zeros((2, 32), np.float16), truth_keys=keys
    )
    held = HeldWindows.open(tmp_path / "odd.npz", walk_payload)
    ((_, vectors),) = held.blocks()
    np.testing.assert_array_equal(vectors[:, :5], contexts)
    np.testing.assert_array_equal(vectors[:, 5], 0)
    np.testing.assert_array_equal(held.keys, keys)
    assert held.payload_id is None


def test_a_file_without_keys_has_none(tmp_path, walk_payload):
    np.savez(tmp_path / "bare.npz", contexts=np.ones((2, 3, 32)), targets=np.ones((2, 32)))
    held = HeldWindows.open(tmp_path / "bare.npz", walk_payload)
    assert held.keys is held.split is held.payload_id is None
    assert held.context == 3


def test_files_of_neither_kind_are_refused(tmp_path, walk_payload):
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    np.savez(tmp_path / "narrow.npz", contexts=np.ones((2, 3, 8)), targets=np.ones((2, 8)))
    (tmp_path / "text.npz").write_text("text")
    for name, match in (
        ("none.npz", "does not exist"),
        ("text.npz", r"not an \.npz"),
        ("x.npz", "has no contexts: it has x"),
        ("narrow.npz", "8 dimensions"),
    ):
        with pytest.raises(InputError, match=match):
            HeldWindows.open(tmp_path / name, walk_payload)


def test_rows_that_the_payload_has_not_are_refused(ours, payload_factory):
    with pytest.raises(IntegrityError, match=r"names row 239, and payload .* has 120 rows"):
        HeldWindows.open(ours, payload_factory())


def test_only_a_file_with_vectors_is_a_predecessors(old, ours, walk_payload):
    assert HeldWindows.predecessor(old, walk_payload).count == 120
    with pytest.raises(InputError, match="is a window file of fastlvm, with rows of a payload in place of contexts"):
        HeldWindows.predecessor(ours, walk_payload)
