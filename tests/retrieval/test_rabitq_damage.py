"""Damage to the files of inverted lists of RaBitQ codes, under hashes that fit it: refused, or searched safely."""

from __future__ import annotations

import numpy as np
import pytest
from test_damage import refused, rehashed

from fastlvm.data import Payload
from fastlvm.retrieval import Index
from fastlvm.retrieval.rabitq import IvfRabitq

DIM, ROWS, LISTS = 24, 420, 8
FLOATS = ("centroid_scales", "factors", "scales", "signs", "level")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1).astype(np.int32)
    payload = Payload.build(tmp_path_factory.mktemp("payload") / "p", vectors, keys, encoder="test")
    return Index.build(payload, "ivf_rabitq", nlist=LISTS, nprobe=LISTS)


@pytest.fixture
def folder(index, tmp_path):
    index.save(tmp_path / "index")
    return tmp_path / "index"


def other_dtypes(array):
    yield array.astype(np.float64)
    yield array.astype("U2")
    yield array.astype(object)
    yield array.view(f"V{array.itemsize}")
    if array.itemsize > 1:
        yield array.astype(array.dtype.newbyteorder())


def other_shapes(array):
    yield array[:-1]
    yield array[..., :-1]
    yield array[None]
    yield array.reshape(-1)[0]
    yield array[:0]
    yield np.concatenate([array, array])
    if array.ndim > 1:
        yield array.reshape(-1)


@pytest.mark.parametrize("file", IvfRabitq.FILES)
@pytest.mark.filterwarnings("error")
def test_an_array_that_is_another_is_refused_by_name(folder, file):
    whole = np.load(folder / file)
    for other in (*other_dtypes(whole), *other_shapes(whole)):
        np.save(folder / file, other)
        rehashed(folder)
        refused(folder, file, "holds|claims|truncated|no .npy header")
    if whole.ndim > 1:
        np.save(folder / file, np.asfortranarray(whole))
        rehashed(folder)
        refused(folder, file, "Fortran order")
    np.save(folder / file, whole)
    rehashed(folder)
    Index.open(folder)


@pytest.mark.parametrize("file", IvfRabitq.FILES)
def test_a_file_of_another_length_is_refused_by_name(folder, file):
    whole = (folder / file).read_bytes()
    for length in (0, 1, 9, 127, 128, len(whole) // 2, len(whole) - 1):
        (folder / file).write_bytes(whole[:length])
        rehashed(folder)
        refused(folder, file, "truncated|no .npy header")
    for more in (b"\0", whole):
        (folder / file).write_bytes(whole + more)
        rehashed(folder)
        refused(folder, file, "bytes after its end")
    (folder / file).write_bytes(b"\x93NUMPY\x01\x00" + b"x" * len(whole))
    rehashed(folder)
    refused(folder, file, "no .npy header")


BIG = 2**62


@pytest.mark.parametrize(
    "sizes",
    [
        [-1, ROWS + 1],
        [ROWS, 1],
        [ROWS - 1, 0],
        [BIG, BIG, BIG, BIG, ROWS],
        [BIG, -BIG, ROWS],
        [2**63 - 1, 2**63 - 1, ROWS + 2],
        [-(2**63), -(2**63), ROWS],
        [0],
    ],
)
def test_lists_of_other_rows_are_refused(folder, sizes):
    np.save(folder / "sizes.npy", np.array(sizes + [0] * (LISTS - len(sizes)), np.int64))
    rehashed(folder)
    refused(folder, "sizes.npy", f"lists that do not have {ROWS} rows together")


def test_lists_of_other_blocks_are_refused(folder):
    """As many rows together, and yet other blocks of bits."""
    sizes = np.zeros(LISTS, np.int64)
    sizes[0] = ROWS
    np.save(folder / "sizes.npy", sizes)
    rehashed(folder)
    refused(folder, "bits.npy", "holds uint8|truncated|after its end")


@pytest.mark.parametrize("bad", (-1, ROWS, 2**31 - 1, -(2**31), "twice"))
def test_ids_that_are_not_every_row_once_are_refused(folder, bad):
    ids = np.load(folder / "ids.npy")
    ids[7] = ids[8] if bad == "twice" else bad
    np.save(folder / "ids.npy", ids)
    rehashed(folder)
    refused(folder, "ids.npy", f"not 0 to {ROWS - 1}, each once")


@pytest.mark.parametrize("part", FLOATS)
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_numbers_that_no_index_has_are_refused(folder, part, bad):
    """Else they would be scores, the first of all results."""
    array = np.load(folder / f"{part}.npy")
    array.reshape(-1)[-1] = bad
    np.save(folder / f"{part}.npy", array)
    rehashed(folder)
    refused(folder, f"{part}.npy", f"holds {bad}")


@pytest.mark.parametrize("part", ("centroid_scales", "factors", "scales"))
def test_numbers_below_zero_are_refused(folder, part):
    array = np.load(folder / f"{part}.npy")
    array[3] = -0.5
    np.save(folder / f"{part}.npy", array)
    rehashed(folder)
    refused(folder, f"{part}.npy", "holds -0.5")


def test_signs_are_one_or_minus_one(folder):
    for bad in (0, 2, 1e-45, 3e38):
        np.save(folder / "signs.npy", np.full((4, DIM), bad, np.float32))
        rehashed(folder)
        refused(folder, "signs.npy", "holds ")


def searches(folder, finite=True):
    """Rows of the payload, none of them twice, whatever the codes say."""
    index = Index.open(folder)
    queries = np.random.default_rng(1).standard_normal((70, DIM)).astype(np.float32)
    for k in (5, ROWS):
        for given in (queries, queries[:1]):
            found = index.search(given, k, np.arange(3))
            assert found.ids.min() >= -1 and found.ids.max() < ROWS and not np.isin(found.ids, np.arange(3)).any()
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found.ids)
            if finite:
                assert np.isfinite(found.scores[found.ids >= 0]).all()


@pytest.mark.parametrize("part", ("bits", "codes", "centroids"))
def test_codes_that_are_noise_are_searched_safely(folder, part):
    array = np.load(folder / f"{part}.npy")
    for values in (np.random.default_rng(2).integers(0, 256, array.nbytes), 255, 128, 0):
        noise = np.empty(array.nbytes, np.uint8)
        noise[:] = values
        np.save(folder / f"{part}.npy", noise.view(array.dtype).reshape(array.shape))
        rehashed(folder)
        searches(folder)


@pytest.mark.parametrize("part", ("centroid_scales", "factors", "scales", "level"))
@pytest.mark.parametrize("value", (0, 1e-45, 3e38))
def test_scales_beyond_all_measure_are_searched_safely(folder, part, value):
    array = np.load(folder / f"{part}.npy")
    array[: -(-len(array) // 2)] = value
    np.save(folder / f"{part}.npy", array)
    rehashed(folder)
    searches(folder, finite=value < 1)


def test_lists_that_are_all_but_one_empty_are_searched_safely(folder):
    sizes = np.zeros(LISTS, np.int64)
    sizes[3] = ROWS
    bits = np.load(folder / "bits.npy")
    np.save(folder / "sizes.npy", sizes)
    np.save(folder / "bits.npy", bits[: -(-ROWS // 32)])
    rehashed(folder)
    searches(folder)
