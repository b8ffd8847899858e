from __future__ import annotations

import struct

import faiss
import numpy as np
import pytest

from fastlvm.errors import IntegrityError
from fastlvm.retrieval import faiss_file

DIM, COUNT, LISTS, PROBES = 6, 50, 8, 3
VECTORS = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
HEADER = 37  # bytes of a flat index before its vectors' number
QUANTIZER = HEADER + 16 + HEADER + 8 + 4 * LISTS * DIM  # where the direct map of ivf_flat begins
INVERTED = QUANTIZER + 9  # and its lists


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


def put(data, at, layout, value):
    wide = struct.calcsize("<" + layout)
    return data[:at] + struct.pack("<" + layout, value) + data[at + wide :]


@pytest.fixture
def check(tmp_path):
    def run(data, lists=None, count=COUNT):
        (tmp_path / "index.faiss").write_bytes(data)
        faiss_file.check(tmp_path / "index.faiss", DIM, count, lists, None if lists is None else PROBES)

    return run


def test_what_faiss_writes_passes(check):
    check(flat())
    check(ivf(), LISTS)
    check(ivf(3), LISTS, 3)  # lists mostly empty, which FAISS writes in another form
    check(ivf(0), LISTS, 0)


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
