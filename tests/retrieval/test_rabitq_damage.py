"""Damage to the files of inverted lists of RaBitQ codes, under hashes that fit it: refused, or searched safely."""

from __future__ import annotations

import numpy as np
import pytest
from test_damage import refused, rehashed

from fastlvm.data import Payload
from fastlvm.retrieval import Index, rabitq
from fastlvm.retrieval.coding import factors_of
from fastlvm.retrieval.rabitq import IvfRabitq

DIM, ROWS, LISTS = 24, 420, 8
TAIL = 7
COUNT = ROWS + TAIL
FLOATS = ("centroid_scales", "factors", "scales", "signs", "level", "tail")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """With some rows that are in no list yet."""
    vectors = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = np.stack(np.divmod(np.arange(COUNT), 10), axis=1).astype(np.int32)
    payload = Payload.build(tmp_path_factory.mktemp("payload") / "p", vectors[:ROWS], keys[:ROWS], encoder="test")
    index = Index.build(payload, "ivf_rabitq", nlist=LISTS, nprobe=LISTS)
    index.add(vectors[ROWS:], keys[ROWS:])
    return index


@pytest.fixture
def folder(index, tmp_path):
    index.save_copy(tmp_path / "index")
    return tmp_path / "index"


def change(folder, part, change):
    """What `change` does to an array, or to the factors that are in the blocks."""
    file = folder / f"{'blocks' if part == 'factors' else part}.npy"
    whole = np.load(file)
    change(factors_of(whole) if part == "factors" else whole)
    np.save(file, whole)
    rehashed(folder)
    return file.name


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
    np.save(folder / "sizes.npy", np.array(sizes + [0] * (LISTS - len(sizes)) + [TAIL], np.int64))
    rehashed(folder)
    refused(folder, "sizes.npy", f"lists that do not have {COUNT} rows together")


@pytest.mark.parametrize("tail", (-1, -(2**63), TAIL - 1, TAIL + 1, COUNT, 2**63 - 1))
def test_a_tail_of_other_rows_is_refused(folder, tail):
    sizes = np.load(folder / "sizes.npy")
    sizes[-1] = tail
    np.save(folder / "sizes.npy", sizes)
    rehashed(folder)
    refused(folder, "sizes.npy", f"lists that do not have {COUNT} rows together")
    sizes[0] += min(max(TAIL - tail, -COUNT), COUNT)  # as many together where that can be
    np.save(folder / "sizes.npy", sizes)
    rehashed(folder)
    refused(folder, "", "lists that do not have|is wanted|is truncated|has bytes after its end")


def test_a_tail_that_no_search_has_room_for_is_refused(folder, monkeypatch):
    monkeypatch.setattr(rabitq, "TAIL", TAIL)
    Index.open(folder)
    monkeypatch.setattr(rabitq, "TAIL", TAIL - 1)
    refused(folder, "sizes.npy", "lists that do not have")


def test_lists_of_other_blocks_are_refused(folder):
    """As many rows together, and yet other blocks."""
    sizes = np.zeros(LISTS + 1, np.int64)
    sizes[[0, -1]] = ROWS, TAIL
    np.save(folder / "sizes.npy", sizes)
    rehashed(folder)
    refused(folder, "blocks.npy", "holds uint8|truncated|after its end")


@pytest.mark.parametrize("bad", (-1, ROWS, 2**31 - 1, -(2**31), "twice"))
def test_ids_that_are_not_every_row_once_are_refused(folder, bad):
    ids = np.load(folder / "ids.npy")
    ids[7] = ids[8] if bad == "twice" else bad
    np.save(folder / "ids.npy", ids)
    rehashed(folder)
    refused(folder, "ids.npy", f"not 0 to {ROWS - 1}, each once")


@pytest.mark.parametrize(
    ("part", "bad"),
    [(part, bad) for part in FLOATS for bad in (np.nan, np.inf, -np.inf) if part != "factors" or bad == bad],
)
def test_numbers_that_no_index_has_are_refused(folder, part, bad):
    """Else they would be scores, the first of all results. A factor that is NaN is that of a row that was removed."""

    def spoil(array):
        array[(-1,) * array.ndim] = bad

    file = change(folder, part, spoil)
    refused(folder, file, "holds a value that is not finite" if part == "tail" else f"holds {bad}")


@pytest.mark.parametrize("part", ("centroid_scales", "factors", "scales"))
def test_numbers_below_zero_are_refused(folder, part):
    def spoil(array):
        array[(3,) * array.ndim] = -0.5

    refused(folder, change(folder, part, spoil), "holds -0.5")


@pytest.mark.parametrize("nan", (0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF))
def test_a_factor_that_is_no_number_is_a_row_that_is_not_found(folder, nan):
    """Whatever its other bits say."""

    def remove(factors):
        factors[0, 2] = np.array(nan, np.uint32).view(np.float32)

    change(folder, "factors", remove)
    sizes = np.load(folder / "sizes.npy")
    assert sizes[0] > 2
    searches(folder, gone=[np.load(folder / "ids.npy")[2]])


def test_signs_are_one_or_minus_one(folder):
    for bad in (0, 2, 1e-45, 3e38):
        np.save(folder / "signs.npy", np.full((4, DIM), bad, np.float32))
        rehashed(folder)
        refused(folder, "signs.npy", "holds ")


def searches(folder, finite=True, gone=()):
    """Rows of the index, none of them twice, whatever the codes say."""
    index = Index.open(folder)
    queries = np.random.default_rng(1).standard_normal((70, DIM)).astype(np.float32)
    for k in (5, COUNT):
        for given in (queries, queries[:1]):
            found = index.search(given, k, np.arange(3))
            assert found.ids.min() >= -1 and found.ids.max() < COUNT
            assert not np.isin(found.ids, [*range(3), *gone]).any()
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found.ids)
            if finite:
                assert np.isfinite(found.scores[found.ids >= 0]).all()
                wanted = min(k, COUNT - len({0, 1, 2, *gone}))
                assert ((found.ids >= 0).sum(axis=1) == wanted).all()


@pytest.mark.parametrize("part", ("blocks", "codes", "centroids"))
@pytest.mark.parametrize("values", ("noise", 255, 128, 0))
def test_codes_that_are_noise_are_searched_safely(folder, part, values):
    def spoil(array):
        codes = (array[:, :-4] if part == "blocks" else array).view(np.uint8)
        codes[:] = np.random.default_rng(2).integers(0, 256, codes.shape) if values == "noise" else values

    change(folder, part, spoil)
    searches(folder)


@pytest.mark.parametrize("part", ("centroid_scales", "factors", "scales", "level", "tail"))
@pytest.mark.parametrize("value", (0, 1e-45, 3e38))
def test_scales_beyond_all_measure_are_searched_safely(folder, part, value):
    def spoil(array):
        array[: -(-len(array) // 2)] = value

    change(folder, part, spoil)
    searches(folder, finite=value < 1)


def test_lists_that_are_all_but_one_empty_are_searched_safely(folder):
    sizes = np.zeros(LISTS + 1, np.int64)
    sizes[[3, -1]] = ROWS, TAIL
    blocks = np.load(folder / "blocks.npy")
    np.save(folder / "sizes.npy", sizes)
    np.save(folder / "blocks.npy", blocks[: -(-ROWS // 32)])
    rehashed(folder)
    searches(folder)


@pytest.fixture
def thinned(folder, tmp_path):
    """A folder of the index without all rows of lists and one of the tail, which files have all the same."""
    index = Index.open(folder)
    keys = np.stack(np.divmod(np.arange(ROWS + 1), 10), axis=1)
    index.remove(keys)
    index.save(tmp_path / "thinned")
    return tmp_path / "thinned"


def test_rows_that_were_removed_may_be_missing_and_no_others(thinned):
    assert np.load(thinned / "sizes.npy").tolist()[-1] == TAIL
    for kept in (ROWS, 33, 1, 0):
        sizes = np.zeros(LISTS + 1, np.int64)
        sizes[[4, -1]] = kept, TAIL
        np.save(thinned / "sizes.npy", sizes)
        for part in ("ids", "codes", "scales"):
            np.save(thinned / f"{part}.npy", np.load(thinned / f"{part}.npy")[:kept])
        np.save(thinned / "blocks.npy", np.load(thinned / "blocks.npy")[: -(-kept // 32)])
        rehashed(thinned)
        index = Index.open(thinned)
        found = index.search(np.ones((2, DIM), np.float32), COUNT).ids
        assert (np.sort(found, axis=1)[:, -TAIL:] == [-1, *range(ROWS + 1, COUNT)]).all()
    for tail in (TAIL - 2, 0):
        np.save(thinned / "sizes.npy", np.array([0] * LISTS + [tail]))
        rehashed(thinned)
        refused(thinned, "sizes.npy", f"lists that do not have {TAIL - 1} rows together")
