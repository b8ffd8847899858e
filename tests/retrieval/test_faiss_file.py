from __future__ import annotations

import functools
import struct

import numpy as np
import pytest

from fastlvm.errors import IntegrityError
from fastlvm.retrieval import faiss_file
from fastlvm.retrieval.blas import faiss
from fastlvm.retrieval.searcher import Shape

DIM, COUNT, LISTS, PROBES = 6, 50, 8, 3
VECTORS = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
HEADER = 37  # bytes of a flat index before its vectors' number
QUANTIZER = HEADER + 16 + HEADER + 8 + 4 * LISTS * DIM  # where the direct map of ivf_flat begins
INVERTED = QUANTIZER + 9  # and its lists
NODES, CANDIDATES = 200, 50
MANY = np.random.default_rng(1).standard_normal((NODES, DIM)).astype(np.float32)


def flat(vectors=VECTORS):
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


def ivf(count=COUNT):
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, LISTS, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(VECTORS)
    index.add(VECTORS[:count])
    index.nprobe = PROBES
    return faiss.serialize_index(index).tobytes()


def sq8():
    kind = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(DIM), DIM, LISTS, kind, faiss.METRIC_INNER_PRODUCT, True)
    index.cp.min_points_per_centroid = 1
    index.train(VECTORS)
    index.add(VECTORS)
    index.nprobe = PROBES
    return faiss.serialize_index(index).tobytes()


@functools.cache
def hnsw(count=NODES, search=CANDIDATES):
    index = faiss.IndexHNSWFlat(DIM, faiss_file.HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = faiss_file.HNSW_EFFORT
    index.add(MANY[:count])
    index.hnsw.efSearch = search
    return faiss.serialize_index(index).tobytes()


class Graph:
    """Where the parts of an hnsw file begin, each after its length, and what they hold."""

    odds, upto, levels = HEADER + 8, HEADER + 64, HEADER + 100
    begins = levels + 4 * NODES + 8
    places = begins + 8 * (NODES + 1) + 8
    at_levels = np.frombuffer(hnsw(), "<i4", NODES, levels)
    at_begins = np.frombuffer(hnsw(), "<u8", NODES + 1, begins).astype(int)
    entry = places + 4 * int(at_begins[-1])
    vectors = entry + 20  # the vectors' own index
    low = int(np.flatnonzero(at_levels == 1)[0])
    high = int(np.flatnonzero(at_levels == 2)[0])


def put(data, at, layout, value):
    wide = struct.calcsize("<" + layout)
    return data[:at] + struct.pack("<" + layout, value) + data[at + wide :]


@pytest.fixture
def check(tmp_path):
    def run(data, lists=None, count=COUNT, kind=None, setting=PROBES):
        (tmp_path / "index.faiss").write_bytes(data)
        kind = kind or ("flat" if lists is None else "ivf_flat")
        faiss_file.check(tmp_path / "index.faiss", kind, Shape(DIM, count, lists, None if kind == "flat" else setting))

    return run


def test_what_faiss_writes_passes(check):
    check(flat())
    check(ivf(), LISTS)
    check(ivf(3), LISTS, 3)  # lists mostly empty, which FAISS writes in another form
    check(ivf(0), LISTS, 0)
    check(sq8(), LISTS, kind="ivf_sq8")
    for count in (1, 2, NODES):
        check(hnsw(count), count=count, kind="hnsw", setting=CANDIDATES)


@pytest.mark.parametrize(
    "at, layout, value, says",
    [
        (0, "4s", b"IxF2", "b'IxF2' as its kind, and wants b'IxFI'"),
        (0, "4s", b"IxPT", "kind"),
        (4, "i", 7, "7 dimensions, and wants 6"),
        (4, "i", -6, "-6 dimensions"),
        (8, "q", 2**40, "1099511627776 vectors, and wants 50"),
        (8, "q", -1, "-1 vectors"),
        (32, "B", 0, "training"),
        (33, "i", 1, "1 as its metric"),
        (HEADER, "Q", 2**34, "17179869184 floats, and wants 300"),
        (HEADER, "Q", 2**63, "floats"),
    ],
)
def test_a_flat_index_that_lies_is_refused(check, at, layout, value, says):
    with pytest.raises(IntegrityError, match=rf"index\.faiss .*{says}.*build the index again"):
        check(put(flat(), at, layout, value))


@pytest.mark.parametrize(
    "at, layout, value, says",
    [
        (0, "4s", b"IwFI", "kind"),
        (8, "q", 49, "vectors"),
        (HEADER, "Q", 2**31, "2147483648 lists, and wants 8"),
        (HEADER + 8, "Q", 4, "4 probes"),
        (HEADER + 16, "4s", b"IwFl", "kind"),
        (HEADER + 24, "q", 9, "9 vectors, and wants 8"),
        (QUANTIZER, "B", 1, "1 as the kind of its direct map"),
        (QUANTIZER + 1, "Q", 2**40, "direct map"),
        (INVERTED, "4s", b"il00", "b'il00'"),
        (INVERTED + 4, "Q", 2**33, "8589934592 inverted lists"),
        (INVERTED + 12, "Q", 2**33, "8589934592 bytes a vector, and wants 24"),
        (INVERTED + 20, "4s", b"x\n\xffz", "b'x"),
        (INVERTED + 24, "Q", 2**60, "sizes"),
        (INVERTED + 32, "Q", 2**60, "hold"),
        (INVERTED + 32, "Q", 2**64 - 1, "hold"),
        (-8, "q", COUNT, "row 50|numbers"),
        (-8, "q", -1, "numbers"),
        (-8, "q", 0, "numbers"),
    ],
)
def test_inverted_lists_that_lie_are_refused(check, at, layout, value, says):
    data = ivf()
    with pytest.raises(IntegrityError, match=rf"index\.faiss .*{says}.*build the index again") as caught:
        check(put(data, at % len(data), layout, value), LISTS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "at, value, says",
    [
        (INVERTED + 24, 7, "sizes"),
        (INVERTED + 24, 2**62, "sizes"),
        (INVERTED + 32, LISTS, "list"),
        (INVERTED + 32, 2**63, "list"),
        (INVERTED + 48, 2, "list"),  # the number of the list before it
        (INVERTED + 40, 2**63, "hold"),
    ],
)
def test_sparse_lists_that_lie_are_refused(check, at, value, says):
    with pytest.raises(IntegrityError, match=rf"index\.faiss .*{says}.*build the index again"):
        check(put(ivf(3), at, "Q", value), LISTS, 3)


@pytest.mark.parametrize("data, lists", [(flat(), None), (ivf(), LISTS)])
def test_a_file_of_another_length_is_refused(check, data, lists):
    for keep in range(len(data)):
        with pytest.raises(IntegrityError, match=r"index\.faiss .*build the index again"):
            check(data[:keep], lists)
    with pytest.raises(IntegrityError, match="after its end"):
        check(data + b"\0", lists)


def test_one_kind_in_the_place_of_the_other(check):
    with pytest.raises(IntegrityError, match="kind"):
        check(flat(), LISTS)
    with pytest.raises(IntegrityError, match="kind"):
        check(ivf())


RANGES = QUANTIZER + 9  # where the quantizer of ivf_sq8 begins
CODED = RANGES + 36 + 8 * DIM + 9  # and its lists


@pytest.mark.parametrize(
    "at, layout, value, says",
    [
        (0, "4s", b"IwFl", "kind"),
        (8, "q", 49, "vectors"),
        (HEADER, "Q", 2**31, "2147483648 lists, and wants 8"),
        (QUANTIZER + 1, "Q", 2**40, "direct map"),
        (RANGES, "i", 1, "1 as the kind of its quantizer"),
        (RANGES + 12, "Q", 2**33, "8589934592 dimensions in its quantizer"),
        (RANGES + 20, "Q", 2**33, "bytes a vector in its quantizer"),
        (RANGES + 28, "Q", 2**33, "8589934592 numbers in its quantizer, and wants 12"),
        (RANGES + 36, "f", float("nan"), "finite"),
        (RANGES + 36 + 8 * DIM - 4, "f", float("inf"), "finite"),
        (CODED - 9, "Q", 24, "24 bytes a vector, and wants 6"),
        (CODED - 1, "B", 0, "residuals"),
        (CODED, "4s", b"il00", "b'il00'"),
        (CODED + 12, "Q", 24, "24 bytes a vector, and wants 6"),
        (CODED + 32, "Q", 2**60, "hold"),
        (-8, "q", COUNT, "numbers"),
    ],
)
def test_lists_of_bytes_that_lie_are_refused(check, at, layout, value, says):
    data = sq8()
    with pytest.raises(IntegrityError, match=rf"index\.faiss .*{says}.*build the index again"):
        check(put(data, at % len(data), layout, value), LISTS, kind="ivf_sq8")


@pytest.mark.parametrize(
    "at, layout, value, says",
    [
        (0, "4s", b"IHNs", "kind"),
        (8, "q", 2**40, "vectors"),
        (33, "i", 1, "1 as its metric"),
        (Graph.odds - 8, "Q", 2**40, "1099511627776 odds of a level"),
        (Graph.upto - 8, "Q", 8, "8 numbers of places up to a level"),
        (Graph.upto + 4, "i", 2**30, "places up to a level than"),
        (Graph.upto + 8, "i", -1, "places up to a level than"),
        (Graph.levels - 8, "Q", 2**40, "levels"),
        (Graph.levels, "i", 0, "on 0 to"),
        (Graph.levels, "i", 7, "to 7 levels"),
        (Graph.levels, "i", 2**31 - 1, "levels"),
        (Graph.levels + 4 * Graph.low, "i", 2, "follow one another"),
        (Graph.begins - 8, "Q", NODES, "beginnings of places"),
        (Graph.begins, "Q", 1, "follow one another"),
        (Graph.begins + 8 * NODES, "Q", 2**62, "follow one another"),
        (Graph.places - 8, "Q", 2**40, "places, and wants"),
        (Graph.places, "i", NODES, f"to {NODES}, and wants -1 to {NODES - 1}"),
        (Graph.places, "i", -2, "neighbours -2"),
        (Graph.places, "i", 2**31 - 1, "neighbours"),
        (Graph.places + 4 * (Graph.at_begins[Graph.high] + 64), "i", Graph.low, "not on"),
        (Graph.entry, "i", NODES, f"{NODES} as its entry point"),
        (Graph.entry, "i", -1, "-1 as its entry point"),
        (Graph.entry, "i", Graph.low, "entry point"),
        (Graph.entry + 4, "i", 5, "5 as its highest level"),
        (Graph.entry + 4, "i", -1, "-1 as its highest level"),
        (Graph.entry + 8, "i", 2**30, "when it was built"),
        (Graph.entry + 12, "i", 2**30, "1073741824 candidates of a search"),
        (Graph.vectors, "4s", b"IHNf", "kind"),
        (Graph.vectors, "4s", b"IxF2", "kind"),
        (Graph.vectors + 8, "q", NODES - 1, "vectors"),
        (Graph.vectors + HEADER, "Q", 2**34, "17179869184 floats"),
    ],
)
def test_a_graph_that_lies_is_refused(check, at, layout, value, says):
    with pytest.raises(IntegrityError, match=rf"index\.faiss .*{says}.*build the index again") as caught:
        check(put(hnsw(), at, layout, value), count=NODES, kind="hnsw", setting=CANDIDATES)
    assert str(caught.value).isprintable()


def test_a_search_of_more_candidates_than_any_is_saved_with_is_refused(check):
    most = faiss_file.HNSW_MOST
    check(hnsw(search=most), count=NODES, kind="hnsw", setting=most)
    with pytest.raises(IntegrityError, match=f"is to search {most + 1} candidates, and {most} are the most"):
        check(hnsw(search=most + 1), count=NODES, kind="hnsw", setting=most + 1)


@pytest.mark.parametrize("kind, whole, lists", [("ivf_sq8", sq8(), LISTS), ("hnsw", hnsw(3), None)])
def test_a_file_of_the_other_kinds_of_another_length_is_refused(check, kind, whole, lists):
    count, setting = (COUNT, PROBES) if lists else (3, CANDIDATES)
    for keep in range(0, len(whole), 5):
        with pytest.raises(IntegrityError, match=r"index\.faiss .*build the index again"):
            check(whole[:keep], lists, count, kind, setting)
    with pytest.raises(IntegrityError, match="after its end"):
        check(whole + b"\0", lists, count, kind, setting)


def test_whatever_number_of_a_graph_changes_a_search_stays_inside(check):
    """What passes the check is searched: FAISS would crash where a place led out of its arrays."""
    whole, rng = hnsw(), np.random.default_rng(0)
    passed = 0
    for at in rng.integers(Graph.odds, Graph.vectors, 150):
        data = put(whole, int(at) // 4 * 4 + 1, "i", int(rng.integers(-1, NODES)))
        try:
            check(data, count=NODES, kind="hnsw", setting=CANDIDATES)
        except IntegrityError:
            continue
        passed += 1
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        _, found = index.search(MANY[:1], 10)
        assert found.min() >= -1 and found.max() < NODES
    assert passed > 50
