"""Building, opening and verifying payloads."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastlvm.data import Payload
from fastlvm.data.rows import duplicate_groups
from fastlvm.errors import InputError, IntegrityError


def build(folder, vectors, keys, **options):
    return Payload.build(folder / "payload", vectors, keys, encoder="test-encoder", **options)


def refused(folder, match, vectors, keys, **options):
    """The build says `match` in one line and writes nothing."""
    with pytest.raises(InputError, match=match) as caught:
        build(folder, vectors, keys, **options)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.fixture
def walks(article_walks):
    return article_walks(articles=3, chunks=8, dim=16)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("f2", "float16"), ("f4", "float32"), ("f8", "float32"), (">f4", "float32")]
)
def test_what_goes_in_comes_out(tmp_path, walks, dtype, stored):
    vectors, keys = walks[0].astype(dtype), walks[1].astype(np.int64)
    payload = build(
        tmp_path, vectors, keys, texts=[f"t{i}" for i in range(24)], titles={0: "zero", 1: "one"}, source="here"
    )
    assert payload.vectors.dtype == stored
    assert isinstance(payload.vectors, np.memmap)
    assert not payload.vectors.flags.writeable
    np.testing.assert_array_equal(payload.vectors, vectors.astype(stored))
    np.testing.assert_array_equal(payload.keys, keys)
    assert (len(payload), payload.dim, payload.keys.dtype) == (24, 16, np.int32)
    assert [payload.text(row) for row in (0, 23)] == ["t0", "t23"]
    assert [payload.title(row) for row in (0, 8, 16)] == ["zero", "one", None]
    assert payload.notices == []
    record = payload.provenance
    assert (record.encoder, record.source, record.norm, record.metric) == ("test-encoder", "here", "l2_once", "ip")
    payload.verify()


def test_texts_are_optional(tmp_path, walks):
    payload = build(tmp_path, *walks)
    assert payload.text(3) is payload.title(3) is None
    assert sorted(path.name for path in payload.path.iterdir()) == ["keys.npy", "payload.json", "vectors.npy"]
    with pytest.raises(InputError, match="row 24 is not in the payload"):
        payload.text(24)


def test_rows_are_scaled_once_and_unit_rows_keep_their_bits(tmp_path, walks):
    vectors, keys = walks
    vectors[5] *= 3
    vectors[7] *= 1e-3
    payload = build(tmp_path, vectors, keys)
    others = np.delete(np.arange(24), [5, 7])
    np.testing.assert_array_equal(payload.vectors[others], vectors[others])
    np.testing.assert_allclose(np.linalg.norm(payload.vectors, axis=1), 1, atol=1e-6)
    assert payload.provenance.normalised == 2
    assert payload.notices == ["2 of 24 vectors were scaled to length 1."]
    payload.verify()


@pytest.mark.parametrize(("dtype", "off"), [(np.float16, 7e-4), (np.float32, 7e-6)])
def test_rows_at_length_one_within_rounding_keep_their_bits(tmp_path, article_walks, dtype, off):
    vectors, keys = article_walks(articles=2, chunks=20, dim=768)
    vectors = (vectors * (1 + off)).astype(dtype)  # near enough to 1, and far enough to show a second scaling
    assert not np.array_equal((vectors / (1 + off)).astype(dtype), vectors)
    payload = build(tmp_path, vectors, keys)
    assert payload.provenance.normalised == 0
    np.testing.assert_array_equal(payload.vectors.view(np.uint8), vectors.view(np.uint8))
    payload.verify()


def test_norms_outside_single_precision_survive(tmp_path, walks):
    vectors, keys = walks
    wide = vectors.astype(np.float64)
    wide[3] *= 1e100
    wide[4] *= 1e-100
    np.testing.assert_allclose(build(tmp_path, wide, keys).vectors, vectors, atol=1e-6)


def test_vectors_can_be_left_as_they_are(tmp_path, walks):
    vectors, keys = walks
    payload = build(tmp_path, vectors * 5, keys, normalise=False)
    np.testing.assert_array_equal(payload.vectors, vectors * 5)
    assert payload.provenance.norm == "as_given"
    payload.verify()


def test_rows_out_of_order_are_sorted_with_their_texts(tmp_path, walks):
    vectors, keys = walks
    order = np.random.default_rng(0).permutation(24)
    texts = [f"{article}/{chunk}" for article, chunk in keys]
    titles = [f"article {article}" for article in keys[:, 0]]
    payload = build(
        tmp_path, vectors[order], keys[order], texts=[texts[i] for i in order], titles=[titles[i] for i in order]
    )
    np.testing.assert_array_equal(payload.vectors, vectors)
    np.testing.assert_array_equal(payload.keys, keys)
    assert [payload.text(row) for row in range(24)] == texts
    assert [payload.title(row) for row in range(24)] == titles
    assert len(payload.notices) == 1 and "sorted" in payload.notices[0]


def test_rows_repeated_whole_are_dropped_and_counted(tmp_path, walks):
    vectors, keys = walks
    again = np.r_[np.arange(24), 4, 4, 9]
    texts = [f"t{i}" for i in range(24)] + ["t4", "t4", "other"]
    payload = build(tmp_path, vectors[again], keys[again], texts=texts)
    np.testing.assert_array_equal(payload.vectors, vectors)
    assert payload.provenance.dropped == 3
    assert payload.text(9) == "t9"
    assert payload.text(10) == "t10"
    assert any(notice.startswith("3 rows repeated") for notice in payload.notices)
    assert any(notice.startswith("1 of the dropped rows had another text") for notice in payload.notices)


def test_a_key_with_two_vectors_is_refused(tmp_path, walks):
    vectors, keys = walks
    keys[11] = keys[10]
    refused(tmp_path, r"vectors row 11 has key \(1, 2\), which row 10 has with another vector", vectors, keys)


@pytest.mark.parametrize(
    ("value", "match"),
    [(np.nan, "row 13 holds NaN"), (np.inf, "row 13 holds infinity"), (0.0, "row 13 is a zero vector")],
)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_rows_without_a_direction_are_refused(tmp_path, walks, value, match, dtype):
    vectors = walks[0].astype(dtype)
    if value == 0:
        vectors[13] = value
    else:
        vectors[13, 5] = value
    refused(tmp_path, match, vectors, walks[1])


def test_bad_shapes_and_dtypes_are_refused(tmp_path, walks):
    vectors, keys = walks
    refused(tmp_path, r"shape \(384,\), and want", vectors.reshape(-1), keys)
    refused(tmp_path, "dtype int64", np.ones((24, 16), np.int64), keys)
    refused(tmp_path, "dtype object", vectors.astype(object), keys)
    refused(tmp_path, "nothing to store", vectors[:0], keys[:0])
    refused(tmp_path, "23 keys for 24 vectors", vectors, keys[:23])
    refused(tmp_path, "keys have dtype float64", vectors, keys.astype(float))
    refused(tmp_path, "keys have dtype bool", vectors, keys.astype(bool))
    refused(tmp_path, r"keys have shape \(24, 3\)", vectors, np.zeros((24, 3), int))
    for bad in (-1, 2**31):
        wrong = keys.astype(np.int64)
        wrong[6, 1] = bad
        refused(tmp_path, rf"keys row 6 is \(0, {bad}\)", vectors, wrong)
    with pytest.raises(InputError, match="encoder is ''"):
        Payload.build(tmp_path / "payload", vectors, keys, encoder="")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, walks):
    build(tmp_path, *walks)
    before = (tmp_path / "payload" / "payload.json").read_bytes()
    with pytest.raises(InputError, match="already holds something"):
        build(tmp_path, *walks)
    assert (tmp_path / "payload" / "payload.json").read_bytes() == before


def test_a_memory_map_is_read_in_place(tmp_path, walks):
    np.save(tmp_path / "v.npy", walks[0])
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    np.testing.assert_array_equal(build(tmp_path, mapped, walks[1]).vectors, walks[0])


def test_equal_vectors_under_different_keys_are_one_group(tmp_path, walks):
    vectors, keys = walks
    vectors[[7, 20]] = vectors[2]
    vectors[15] = vectors[14]
    vectors[3, 0], vectors[9], vectors[9, 0] = 0.0, vectors[3], -0.0  # the two zeros are equal
    payload = build(tmp_path, vectors, keys)
    expected = np.arange(24)
    expected[[7, 20, 15, 9]] = [2, 2, 14, 3]
    np.testing.assert_array_equal(payload.groups, expected)
    assert payload.groups.dtype == np.int64
    assert payload.provenance.duplicates == 4
    assert "4 vectors equal that of an earlier key" in payload.notices[-1]
    assert len(payload) == 24


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([0, -0.0, 1, 2])
    )
)
def test_groups_are_those_of_comparing_all_pairs(vectors):
    expected = [
        next(j for j in range(len(vectors)) if np.array_equal(vectors[i], vectors[j])) for i in range(len(vectors))
    ]
    np.testing.assert_array_equal(duplicate_groups(vectors), expected)


def test_rows_of_keys(walk_payload):
    rows = np.random.default_rng(0).permutation(len(walk_payload))
    np.testing.assert_array_equal(walk_payload.rows_of(walk_payload.keys[rows]), rows)
    absent = [[0, 20], [12, 0], [-1, 0], [0, -1], [2**31, 0], [0, 2**32], [11, 2**31 - 1]]
    assert walk_payload.rows_of(np.array(absent)).tolist() == [-1] * len(absent)
    assert walk_payload.rows_of(np.array([[[0, 1], [1, 0]]])).tolist() == [[1, 20]]
    assert walk_payload.rows_of(np.array([0, 1])).tolist() == 1
    assert walk_payload.rows_of(np.zeros((0, 2), int)).shape == (0,)
    with pytest.raises(InputError, match="want integers"):
        walk_payload.rows_of(np.array([[0.0, 1.0]]))


def test_take_reads_and_converts(tmp_path, article_walks):
    vectors, keys = article_walks(dtype=np.float16)
    payload = build(tmp_path, vectors, keys)
    rows = np.array([[3, 3], [0, 119]])
    taken = payload.take(rows)
    assert (taken.shape, taken.dtype) == ((2, 2, 32), np.float32)
    np.testing.assert_array_equal(taken, vectors[rows].astype(np.float32))
    taken[:] = 0  # the caller's own
    np.testing.assert_array_equal(payload.vectors[3], vectors[3])
    assert payload.take(np.zeros((0, 5), int)).shape == (0, 5, 32)
    for bad in ([-1], [120]):
        with pytest.raises(InputError, match="the payload has 0 to 119"):
            payload.take(bad)


def test_the_id_is_of_the_content(tmp_path, walks, payload_factory):
    vectors, keys = walks
    one, two = payload_factory(name="one"), payload_factory(name="two", texts=None, titles=None)
    assert one.id == two.id == Payload.open(one.path).id
    assert len(one.id) == 16 and int(one.id, 16) >= 0
    ids = {one.id, payload_factory(name="three", seed=1).id, payload_factory(name="four", encoder="another").id}
    shifted = Payload.build(tmp_path / "five", vectors, keys + np.array([0, 1]), encoder="test-encoder").id
    ids |= {shifted, build(tmp_path, vectors, keys).id}
    assert len(ids) == 5


# Texts from files


def records(keys):
    return [
        {"row": i, "article": int(a), "chunk": int(c), "title": f"T{a}", "text": f"ü {a}/{c}"}
        for i, (a, c) in enumerate(keys)
    ]


def write_texts(folder, rows, ending):
    path = folder / f"texts{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with (gzip.open if ending.endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


ENDINGS = [".parquet", ".jsonl", ".jsonl.gz"]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fields", [("text",), ("text", "title"), ("row", "article", "chunk", "title", "text")])
def test_text_files(files, out, walks, ending, fields):
    rows = [{name: record[name] for name in fields} for record in records(walks[1])]
    payload = build(out, *walks, texts=write_texts(files, rows, ending))
    assert payload.text(9) == "ü 1/1"
    assert payload.title(9) == ("T1" if "title" in fields else None)
    payload.verify()


@pytest.mark.parametrize("ending", ENDINGS)
def test_text_files_that_do_not_match_are_refused(files, out, walks, ending):
    good = records(walks[1])
    refused(out, "23 texts for 24 vectors", *walks, texts=write_texts(files, good[:-1], ending))
    for name, value in (("row", 3), ("article", 2), ("chunk", 7)):
        wrong = [dict(row) for row in good]
        wrong[5][name] = value
        refused(out, f"row 5 has {name} {value}", *walks, texts=write_texts(files, wrong, ending))
    refused(out, "no column text|no `text`", *walks, texts=write_texts(files, [{"row": 0}] * 24, ending))


def test_text_files_that_cannot_be_read_are_refused(files, out, walks):
    refused(out, "does not exist", *walks, texts=files / "none.jsonl")
    (files / "t.txt").write_text("x")
    refused(out, "ending that is not known", *walks, texts=files / "t.txt")
    for ending in ENDINGS:
        path = write_texts(files, records(walks[1]), ending)
        path.write_bytes(path.read_bytes()[:-30])
        refused(out, r"texts\.", *walks, texts=path)
        path.write_bytes(b"\x00\xff\x00garbage")
        refused(out, r"texts\.", *walks, texts=path)


def test_lists_of_texts_that_do_not_match_are_refused(tmp_path, walks):
    refused(tmp_path, "texts has 3 entries for 24 rows", *walks, texts=["a"] * 3)
    refused(tmp_path, "titles has 3 entries for 24 rows", *walks, titles=["a"] * 3)
    refused(tmp_path, "texts row 2 is int", *walks, texts=["a", "b", 3, *["c"] * 21])
    refused(tmp_path, "texts row 2 holds characters", *walks, texts=["a", "b", "\ud800", *["c"] * 21])
    refused(tmp_path, "want.*one string a row", *walks, texts=iter("a" * 24))


def test_texts_of_many_row_groups(tmp_path):
    keys = np.stack([np.zeros(9000, int), np.arange(9000)], axis=1)
    vectors = np.random.default_rng(0).standard_normal((9000, 4)).astype(np.float32)
    payload = build(tmp_path, vectors, keys, texts=[f"t{i}" for i in range(9000)])
    rows = [0, 4095, 4096, 8191, 8192, 8999, 0]
    assert [payload.text(row) for row in rows] == [f"t{row}" for row in rows]
    payload.verify()


# Damage


@pytest.fixture
def folder(payload_factory):
    return payload_factory(articles=3, chunks=8, dim=16).path


def test_a_folder_that_is_no_payload(tmp_path):
    (tmp_path / "file").write_text("")
    for path, match in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "is not a payload"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            Payload.open(path)
        assert not isinstance(caught.value, IntegrityError)


@pytest.mark.parametrize("name", ["vectors.npy", "keys.npy", "texts.parquet"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        Payload.open(folder)


@pytest.mark.parametrize("name", ["vectors.npy", "keys.npy"])
@pytest.mark.parametrize("keep", [0, 5, 60, 128, 200, -1])
def test_truncated_arrays_are_refused_on_opening(folder, name, keep):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:keep] if keep >= 0 else content[:-1])
    with pytest.raises(IntegrityError, match=rf"{name} is truncated"):
        Payload.open(folder)


def test_arrays_of_another_shape_or_kind_are_refused(folder):
    vectors = np.load(folder / "vectors.npy")
    others = (vectors[:-1], vectors[:, :-1], vectors.astype("f8"), vectors.astype(">f4"), np.asfortranarray(vectors))
    for other in others:
        np.save(folder / "vectors.npy", other)
        with pytest.raises(IntegrityError, match=r"vectors\.npy"):
            Payload.open(folder)
    np.save(folder / "vectors.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match=r"vectors\.npy"):
        Payload.open(folder)
    np.save(folder / "vectors.npy", vectors)
    with (folder / "vectors.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="bytes after its end"):
        Payload.open(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder", "x"), ("dim", 8), ("rows", 7), ("norm", "as_given"), ("metric", "l2"), ("vectors_sha256", "0" * 64),
        ("keys_sha256", "0" * 64), ("id", "0" * 16), ("format", 2), ("dim", "16"), ("dim", True), ("rows", -1),
        ("notices", "x"), ("source", None), ("texts_sha256", 3),
    ],
)  # fmt: skip
def test_an_edited_record_is_refused(folder, field, value):
    path = folder / "payload.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(IntegrityError, match=r"payload\.json"):
        Payload.open(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "{}", '{"format": 1}'])
def test_a_broken_record_is_refused(folder, content):
    (folder / "payload.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"payload\.json"):
        Payload.open(folder)


def test_keys_out_of_order_are_refused_on_opening(folder):
    keys = np.load(folder / "keys.npy")
    keys[[4, 5]] = keys[[5, 4]]
    np.save(folder / "keys.npy", keys)
    with pytest.raises(IntegrityError, match=r"keys\.npy row 5 is not after row 4"):
        Payload.open(folder)


@pytest.mark.parametrize(
    ("value", "match"), [(np.nan, "row 6 has norm nan"), (0.0, "row 6 has norm 0,"), (3.0, "row 6 has norm")]
)
def test_verify_names_the_row(folder, value, match):
    vectors = np.load(folder / "vectors.npy")
    vectors[6] = value
    np.save(folder / "vectors.npy", vectors)
    with pytest.raises(IntegrityError, match=match):
        Payload.open(folder).verify()


@pytest.mark.parametrize("name", ["vectors.npy", "keys.npy", "texts.parquet"])
def test_verify_sees_one_flipped_bit(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if name == "texts.parquet" else -4] ^= 1  # the lowest bit of the last number
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Payload.open(folder).verify()


def test_texts_of_other_rows_are_refused(folder, tmp_path, payload_factory):
    other = payload_factory(name="other", articles=2, chunks=8, dim=16)
    (folder / "texts.parquet").write_bytes((other.path / "texts.parquet").read_bytes())
    with pytest.raises(IntegrityError, match="has 16 rows, and the payload 24"):
        Payload.open(folder).text(0)


def test_the_sample_is_whole():
    payload = Payload.sample()
    payload.verify()
    assert payload.dim == 768
    assert sum(path.stat().st_size for path in payload.path.iterdir()) < 12_000_000


def test_real_data(real_data, tmp_path):
    vectors = np.load(real_data / "vectors.npy", mmap_mode="r")
    keys = np.load(real_data / "keys.npy")
    payload = build(tmp_path, vectors, keys, texts=real_data / "texts.jsonl.gz")
    payload.verify()
    np.testing.assert_array_equal(payload.vectors, vectors)
    assert payload.provenance.normalised == payload.provenance.dropped == 0
    # sotu repeats 13 vectors (refrains); every group was found by a sort of all rows, written down once
    _, count = np.unique(vectors.view(np.uint16), axis=0, return_counts=True)
    assert payload.provenance.duplicates == (count - 1).sum() > 0
    with gzip.open(real_data / "texts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row, line in enumerate(lines):
            if row % 5000 == 0:
                assert payload.text(row) == json.loads(line)["text"]
