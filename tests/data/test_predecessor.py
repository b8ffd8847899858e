"""The predecessor's files: read without running anything, matched to a payload or refused, and written back."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastlvm.data import Payload, Windows, import_ordered, import_payload, pickles
from fastlvm.errors import InputError, IntegrityError


def rows_of(vectors, keys, texts=None):
    return {
        row: (
            f"text {row}" if texts is None else texts[row],
            {"article_index": int(a), "chunk_index": int(c), "cpe_id": f"cpe-{row}"},
            vectors[row],
        )
        for row, (a, c) in enumerate(keys)
    }


@pytest.fixture
def walks(article_walks):
    return article_walks(articles=3, chunks=8, dim=16)


@pytest.fixture
def old(tmp_path, walks):
    np.save(tmp_path / "old.npy", rows_of(*walks))
    return tmp_path / "old.npy"


def nothing_written(folder):
    return not (folder / "new").exists() and not any(path.name.startswith(".new") for path in folder.iterdir())


# Payload .npy


def test_a_pickled_payload_is_imported(tmp_path, old, walks):
    payload = import_payload(old, tmp_path / "new", encoder="gtr-t5-base")
    np.testing.assert_array_equal(payload.vectors, walks[0])
    np.testing.assert_array_equal(payload.keys, walks[1])
    assert payload.text(5) == "text 5"
    assert payload.provenance.encoder == "gtr-t5-base"
    assert payload.provenance.source == "old.npy"
    payload.verify()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_every_spelling_numpy_used_is_read(tmp_path, walks, protocol, core):
    entries = rows_of(*walks)
    entries[3][1]["article_index"] = np.int64(0)  # a numpy scalar
    pickled = pickle.dumps(np.array(entries, dtype=object), protocol)
    for other in (b"numpy._core", b"numpy.core"):
        pickled = _renamed(pickled, other, core)
    path = tmp_path / "old.npy"
    _object_npy(path, pickled)
    np.testing.assert_array_equal(import_payload(path, tmp_path / "new").vectors, walks[0])


def _renamed(pickled, old, new):
    """Global names, in the opcodes that hold them: a line in protocol 3, a short string with its length later."""
    for module in (b".multiarray", b".numeric"):
        a, b = old + module, new + module
        pickled = pickled.replace(b"c" + a + b"\n", b"c" + b + b"\n")
        pickled = pickled.replace(b"\x8c" + bytes([len(a)]) + a, b"\x8c" + bytes([len(b)]) + b)
    return _unframed(pickled)


def _unframed(pickled):
    """Without the length of the first frame, which the change of names made wrong."""
    return pickled[:2] + pickled[11:] if pickled[2:3] == b"\x95" else pickled


def _object_npy(path, pickled):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickled)


class Bomb:
    """Makes a file when a pickle is loaded that lets it."""

    def __init__(self, mark, how):
        self.mark, self.how = str(mark), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        if self.how == "eval":
            return eval, (f"open({self.mark!r}, 'w')",)
        if self.how == "numpy":
            return np.save, (self.mark, np.zeros(1))
        if self.how == "path":
            return Path.touch, (Path(self.mark),)
        return __import__, ("os",)


HOWS = ["system", "eval", "numpy", "path", "import"]


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "it-ran"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("where", ["alone", "text", "record", "vector", "row", "key"])
def test_a_malicious_payload_runs_nothing(tmp_path, walks, mark, how, where):
    bomb = Bomb(mark, how)
    entries = rows_of(*walks)
    text, record, vector = entries[4]
    if where == "text":
        entries[4] = (bomb, record, vector)
    elif where == "record":
        record["cpe_id"] = bomb
    elif where == "vector":
        entries[4] = (text, record, bomb)
    elif where == "row":
        entries[4] = bomb
    elif where == "key":
        entries[bomb] = entries[4]
    np.save(tmp_path / "old.npy", np.array(bomb if where == "alone" else entries, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"old\.npy names .* it was refused and nothing was run") as caught:
        import_payload(tmp_path / "old.npy", tmp_path / "new")
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("it-ran*"))
    assert nothing_written(tmp_path)


def test_the_bombs_would_go_off(tmp_path, mark):
    for how in ("system", "eval", "numpy", "path"):
        pickle.loads(pickle.dumps(Bomb(mark, how)))  # noqa: S301 - our own, to show that it is live
        assert [path.unlink() for path in tmp_path.glob("it-ran*")], how


def opcodes(*parts):
    return b"\x80\x03" + b"".join(parts) + b"."


NDARRAY, RECONSTRUCT, DTYPE = b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\ndtype\n"
SCALAR = b"cnumpy.core.multiarray\nscalar\n"


def short(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def dtype(spec):
    return DTYPE + short(spec) + b"\x85R"  # numpy.dtype(spec)


def state(order, *rest):
    return b"(K\x03" + short(order) + b"".join(rest) + b"tb"


MINUS = b"J\xff\xff\xff\xff"
FORGED = {
    "allocates through ndarray": opcodes(NDARRAY, b"(K\x05tR"),
    "sets an item of a global": opcodes(NDARRAY, short("a"), b"K\x01s"),
    "replaces a global's function": opcodes(DTYPE, b"}", short("_function"), b"Nsb"),
    "sets a slot of a global": opcodes(DTYPE, b"N}", short("_function"), b"Ns\x86b"),
    "reconstructs another type": opcodes(RECONSTRUCT, b"(", DTYPE, b"K\x00\x85C\x01btR"),
    "a bare dtype": opcodes(dtype("f4"), state("<", b"NNN", MINUS, MINUS, b"K\x3f")),
    "a dtype with fields": opcodes(dtype("f4"), state("<", b"(K\x01tNNK\x01K\x01K\x3f")),
    "a pointer as an object": opcodes(SCALAR, b"(", dtype("O"), b"C\x08AAAAAAAAtR"),
    "a structure": opcodes(SCALAR, b"(", dtype("f8,O"), b"C\x08AAAAAAAAtR"),
    "a scalar cut short": opcodes(SCALAR, b"(", dtype("f8"), b"C\x04AAAAtR"),
    "a persistent id": opcodes(short("a"), b"Q"),
    "an extension": opcodes(b"\x82\x01"),
    "an instance": b"(inumpy\nndarray\n.",
    "a call of a number": opcodes(b"K\x01K\x02R"),
    "a list": opcodes(b"]"),
    "a memo entry of 64 GB": opcodes(b"]r\xff\xff\xff\xff"),
    "a byte array of 64 GB": b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b"abc.",
    "bytes of 64 GB": b"\x80\x05\x8e" + (2**36).to_bytes(8, "little") + b"abc.",
    "8 EB of bytes": b"\x80\x05\x8e" + b"\xff" * 8 + b"abc.",
    "a frame of 64 GB": b"\x80\x05\x95" + (2**36).to_bytes(8, "little") + b"abc.",
    "nested too deep": opcodes(b"(" * 100_000 + b"t" * 100_000),
    "nothing": b"",
    "only a head": b"\x80\x04",
    "garbage": b"garbage",
}


@pytest.mark.parametrize("pickled", FORGED.values(), ids=FORGED.keys())
def test_pickles_numpy_would_not_write_are_refused(tmp_path, pickled):
    _object_npy(tmp_path / "old.npy", pickled)
    with pytest.raises(InputError, match=r"old\.npy") as caught:
        import_payload(tmp_path / "old.npy", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert nothing_written(tmp_path)


def test_object_arrays_with_forged_content_are_refused():
    """Bytes where object pointers belong, and shapes that the content does not fill."""

    def array(shape, spec, data):
        found = pickles.Array()
        found.__setstate__((1, shape, pickles._Dtype(spec), False, data))
        return found

    assert array((2,), "O8", ["a", None]).value().tolist() == ["a", None]
    forged = (
        ((1,), "O8", b"A" * 8),
        ((3,), "O8", ["a"]),
        ((2**40,), "f4", b"AAAA"),
        ((-1,), "f4", b""),
        (("1",), "f4", b""),
    )
    for shape, spec, data in (*forged, ((1,), "V8", b"A" * 8), ((1,), "M8[s]", b"A" * 8), ((1,), "T", b"A" * 16)):
        with pytest.raises(pickle.UnpicklingError):
            array(shape, spec, data).value()


def test_the_reader_asks_for_no_more_than_there_is_and_for_no_other_type():
    stream = pickles._Bounded(io.BytesIO(b"abc"), 3)
    with pytest.raises(EOFError):
        stream.read(4)
    assert stream.read(3) == b"abc"
    with pytest.raises(pickle.UnpicklingError, match=r"not numpy\.ndarray"):
        pickles._reconstruct(dict, (0,), b"b")


def test_truncated_payloads_are_refused(tmp_path, old):
    content = old.read_bytes()
    for keep in range(0, len(content) - 1, len(content) // 40):
        old.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"old\.npy"):
            import_payload(old, tmp_path / "new")
    assert nothing_written(tmp_path)


def test_flipped_bytes_never_crash(tmp_path, old):
    content = old.read_bytes()
    rng = np.random.default_rng(1)
    for number, at in enumerate(rng.integers(0, len(content), 150)):
        damaged = bytearray(content)
        damaged[at] = int(rng.integers(256))
        old.write_bytes(damaged)
        try:
            import_payload(old, tmp_path / f"new{number}")
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: e.update({4: ("t", e[4][1])}), r"row 4 is no \(text, record, vector\)"),
        (lambda e: e[4][1].pop("chunk_index"), "row 4 has chunk_index None"),
        (lambda e: e[4][1].update(article_index="3"), "row 4 has article_index '3'"),
        (lambda e: e[4][1].update(article_index=-3), "keys row 4"),
        (lambda e: e.update({4: (7, *e[4][1:])}), "row 4 has a int for its text"),
        (lambda e: e.update({4: (*e[4][:2], e[4][2][:5])}), "row 4 has 5 dimensions, and the first row 16"),
        (lambda e: e.update({4: (*e[4][:2], e[4][2].astype(int))}), "row 4 has int64"),
        (lambda e: e.update({4: (*e[4][:2], [1.0] * 16)}), "row 4 has list"),
        (lambda e: e.update({4: (*e[4][:2], e[4][2] * np.nan)}), "row 4 holds NaN"),
        (lambda e: e.clear(), "a dict of rows that is not empty"),
    ],
)
def test_broken_rows_are_named(tmp_path, walks, change, match):
    entries = rows_of(*walks)
    change(entries)
    np.save(tmp_path / "old.npy", entries)
    with pytest.raises(InputError, match=match):
        import_payload(tmp_path / "old.npy", tmp_path / "new")
    assert nothing_written(tmp_path)


def test_files_of_another_kind_are_named(tmp_path, walks):
    np.save(tmp_path / "plain.npy", walks[0])
    np.save(tmp_path / "list.npy", np.array([{}, {}], dtype=object))
    (tmp_path / "text.npy").write_text("hello")
    np.savez(tmp_path / "windows.npz", contexts=np.zeros((1, 5, 3)), targets=np.zeros((1, 3)))
    for name, match in (
        ("none.npy", "does not exist"), ("plain.npy", "fastlvm payload build"), ("list.npy", "one dict is wanted"),
        ("text.npy", "neither"), ("windows.npz", "fastlvm windows import"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            import_payload(tmp_path / name, tmp_path / "new")


# Ordered .npz


def ordered(walks, **changes):
    vectors, keys = walks
    arrays = {
        "vectors": vectors,
        "cpe_ids": np.array([f"c{i}" for i in range(len(keys))]),
        "concept_texts": np.array([f"text {i}" for i in range(len(keys))], dtype=object),
        "article_indices": keys[:, 0],
        "chunk_indices": keys[:, 1],
        "article_titles": np.array([f"title {a}" for a in keys[:, 0]]),
    } | changes
    return {name: value for name, value in arrays.items() if value is not None}


@pytest.mark.parametrize("reader", [import_payload, import_ordered])
def test_an_ordered_export_is_imported(tmp_path, walks, reader):
    np.savez_compressed(tmp_path / "old.npz", **ordered(walks))
    payload = reader(tmp_path / "old.npz", tmp_path / "new", encoder="e")
    np.testing.assert_array_equal(payload.vectors, walks[0])
    assert (payload.text(9), payload.title(9)) == ("text 9", "title 1")
    payload.verify()


def test_titles_that_are_not_one_a_row_are_left_out(tmp_path, walks):
    np.savez(tmp_path / "old.npz", **ordered(walks, article_titles=np.array(["a", "b", "c"]), concept_texts=None))
    payload = import_payload(tmp_path / "old.npz", tmp_path / "new")
    assert payload.title(0) is payload.text(0) is None
    assert any("3 article_titles for 24 rows" in notice for notice in payload.notices)


def test_ordered_exports_that_do_not_fit_are_refused(tmp_path, walks, mark):
    cases = [
        ({"article_indices": None}, "no array 'article_indices'"),
        ({"article_indices": walks[1][:-1, 0]}, "wants whole numbers"),
        ({"chunk_indices": walks[1][:, 1] * 1.0}, "wants whole numbers"),
        ({"concept_texts": np.array(["a"])}, "1 concept_texts for 24 vectors"),
        ({"concept_texts": np.array([1] * 24)}, "wants strings"),
        ({"concept_texts": np.array([Bomb(mark, "system")] * 24, dtype=object)}, "refused and nothing was run"),
        ({"article_titles": np.array([Bomb(mark, "eval")], dtype=object)}, "refused and nothing was run"),
        ({"vectors": np.array([Bomb(mark, "eval")], dtype=object)}, "Python objects"),
        ({"chunk_indices": np.array([Bomb(mark, "eval")], dtype=object)}, "Python objects"),
    ]
    for changes, match in cases:
        np.savez(tmp_path / "old.npz", **ordered(walks, **changes))
        with pytest.raises(InputError, match=match):
            import_payload(tmp_path / "old.npz", tmp_path / "new")
    assert not list(tmp_path.glob("it-ran*"))
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(("rows", "match"), [(2**36, "claims shape"), (25, "truncated or damaged")])
def test_a_header_that_claims_too_much_is_refused(tmp_path, walks, rows, match):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (rows, 16)})
    np.savez(tmp_path / "old.npz", **ordered(walks, vectors=None))
    with zipfile.ZipFile(tmp_path / "old.npz", "a") as archive:
        archive.writestr("vectors.npy", head.getvalue() + walks[0].tobytes())  # 24 rows
    with pytest.raises(IntegrityError, match=match):
        import_payload(tmp_path / "old.npz", tmp_path / "new")


# Windows .npz


@pytest.fixture(scope="module")
def exported(tmp_path_factory, walk_payload, sample_windows):
    path = tmp_path_factory.mktemp("exported") / "old.npz"
    sample_windows.export_predecessor(path, walk_payload, "train")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_export_has_the_predecessors_layout(exported, walk_payload, sample_windows):
    rows = sample_windows.rows("train")
    assert exported["context_sequences"].dtype == exported["target_vectors"].dtype == np.float32
    np.testing.assert_array_equal(exported["context_sequences"], walk_payload.vectors[rows[:, :5]])
    np.testing.assert_array_equal(exported["target_vectors"], walk_payload.vectors[rows[:, 5]])
    np.testing.assert_array_equal(exported["truth_keys"], sample_windows.keys("train"))
    assert exported["truth_keys"].dtype == np.int32
    assert [int(exported[name]) for name in ("context_length", "num_sequences", "vector_dim")] == [5, len(rows), 32]
    assert exported["provenance"].shape == (1,)
    record = json.loads(exported["provenance"][0])
    assert record["embedder_id"] == "test-encoder"
    assert record["payload_build_id"].endswith(f"@sha256:{walk_payload.provenance.vectors_sha256}")
    assert (record["norm"], record["metric"]) == ("l2_once", "ip")
    assert {"created_at", "creation_tool", "data_source"} <= record.keys()


def imported(folder, arrays, payload, **options):
    np.savez(folder / "old.npz", **arrays)
    return Windows.import_predecessor(folder / "old.npz", payload, **options)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    "names",
    [("context_sequences", "target_vectors"), ("contexts", "targets"), ("sequences", "targets"),
     ("train_context_sequences", "train_target_vectors")],
)  # fmt: skip
def test_export_and_import_give_the_same_windows(tmp_path, exported, walk_payload, sample_windows, keyed, names):
    arrays = {names[0]: exported["context_sequences"], names[1]: exported["target_vectors"]}
    if keyed:
        arrays["truth_keys"] = exported["truth_keys"]
    windows = imported(tmp_path, arrays, walk_payload, split="train")
    np.testing.assert_array_equal(windows.rows("train"), sample_windows.rows("train"))
    np.testing.assert_array_equal(windows.keys("train"), sample_windows.keys("train"))
    assert len(windows.rows("test")) == len(windows.rows("validation")) == 0
    assert windows.payload_id == walk_payload.id
    windows.verify(walk_payload, sample=None)
    windows.save(tmp_path / "w.npz")
    assert Windows.open(tmp_path / "w.npz").id == windows.id


def test_imported_windows_are_split_by_article(tmp_path, exported, walk_payload):
    windows = imported(tmp_path, exported, walk_payload, split=(0.5, 0.25, 0.25), seed=2)
    assert [len(windows.articles(split)) for split in windows.splits] == [4, 2, 2]
    assert windows.verify(walk_payload).article_overlap == 0
    assert "test-encoder" in windows.source
    for bad in ("dev", (0.5, 0.1, 0.1)):
        with pytest.raises(InputError, match="split is"):
            imported(tmp_path, exported, walk_payload, split=bad)


@pytest.mark.parametrize("shift", [(0, 1), (0, -1), (1, 0), (50, 0)])
def test_wrong_truth_keys_are_refused(tmp_path, exported, walk_payload, shift):
    wrong = exported | {"truth_keys": exported["truth_keys"] + np.array(shift)}
    with pytest.raises(IntegrityError, match=r"random pairs .*the keys are wrong") as caught:
        imported(tmp_path, wrong, walk_payload)
    assert float(str(caught.value).split("target cosine ")[1].split(",")[0]) < 0.9


def test_made_up_keys_are_refused(tmp_path, exported, walk_payload):
    number = np.arange(len(exported["truth_keys"]))
    with pytest.raises(IntegrityError, match="the keys are wrong"):
        imported(tmp_path, exported | {"truth_keys": np.stack([number // 100, number % 100], axis=1)}, walk_payload)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("change", ["context", "target", "nan", "zero"])
def test_one_strange_vector_is_refused(tmp_path, exported, walk_payload, change, keyed):
    arrays = {name: value.copy() for name, value in exported.items() if keyed or name != "truth_keys"}
    if change == "context":
        arrays["context_sequences"][7, 2] = arrays["context_sequences"][40, 0]
    else:
        value = {"target": arrays["target_vectors"][40].copy(), "nan": np.nan, "zero": 0}[change]
        arrays["target_vectors"][7] = value
    with pytest.raises(IntegrityError, match=r"1 of \d+ windows.*first: window 7"):
        imported(tmp_path, arrays, walk_payload)


@pytest.mark.parametrize("keyed", [True, False])
def test_windows_of_another_payload_are_refused(tmp_path, exported, payload_factory, keyed):
    arrays = {name: value for name, value in exported.items() if keyed or name != "truth_keys"}
    other = payload_factory(articles=12, seed=5)
    count = len(exported["truth_keys"])
    with pytest.raises(IntegrityError, match=rf"{count} of {count} windows.*random pairs"):
        imported(tmp_path, arrays, other)
    with pytest.raises(InputError, match="32 dimensions"):
        imported(tmp_path, arrays, payload_factory(dim=8, name="narrow"))


def test_repeated_vectors_are_told_apart_by_their_context(tmp_path, walks):
    vectors, keys = walks
    vectors[[7, 15, 23]] = vectors[6]  # a refrain: last chunk of every article, and one before
    payload = Payload.build(tmp_path / "payload", vectors, keys, encoder="e")
    windows = Windows.build(payload, split=(1, 0, 0))
    windows.export_predecessor(tmp_path / "out.npz", payload, "train")
    with np.load(tmp_path / "out.npz") as arrays:
        found = imported(tmp_path, {name: arrays[name] for name in ("context_sequences", "target_vectors")}, payload)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([found.rows(split) for split in found.splits]), axis=0), windows.rows("train")
    )


def test_window_files_that_do_not_fit_are_refused(tmp_path, exported, walk_payload, mark):
    bomb = np.array([Bomb(mark, "system")], dtype=object)
    cases = [
        ({"context_sequences": None}, "has no contexts"),
        ({"target_vectors": None}, "has no targets"),
        ({"target_vectors": exported["target_vectors"][:-1]}, "wants floats"),
        ({"context_sequences": exported["context_sequences"][:, 0]}, "wants floats"),
        ({"context_sequences": exported["context_sequences"].astype(int)}, "wants floats"),
        ({"truth_keys": exported["truth_keys"][:-1]}, "wants whole numbers"),
        ({"truth_keys": exported["truth_keys"] * 1.0}, "wants whole numbers"),
        ({"provenance": bomb}, "refused and nothing was run"),
        ({"context_sequences": bomb}, "wants floats"),
        ({"target_vectors": bomb}, "wants floats"),
        ({"truth_keys": bomb}, "Python objects"),
    ]
    for change, match in cases:
        arrays = {name: value for name, value in (exported | change).items() if value is not None}
        with pytest.raises(InputError, match=match):
            imported(tmp_path, arrays, walk_payload)
    assert not list(tmp_path.glob("it-ran*"))


def test_provenance_may_be_an_object_array_or_no_json(tmp_path, exported, walk_payload):
    said = np.array([json.dumps({"embedder_id": "gtr"})], dtype=object)
    assert "embedder_id gtr" in imported(tmp_path, exported | {"provenance": said}, walk_payload).source
    assert "not readable" in imported(tmp_path, exported | {"provenance": np.array(["x"])}, walk_payload).source


def test_truncated_window_files_are_refused(tmp_path, exported, walk_payload):
    path = tmp_path / "old.npz"
    np.savez(path, **exported)
    content = path.read_bytes()
    for keep in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=r"old\.npz"):
            Windows.import_predecessor(path, walk_payload)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"old\.npz"):
        Windows.import_predecessor(path, walk_payload)


def test_an_export_from_another_payload_is_refused(tmp_path, sample_windows, payload_factory):
    with pytest.raises(IntegrityError, match="do not come from payload"):
        sample_windows.export_predecessor(tmp_path / "out.npz", payload_factory(articles=12, seed=5), "train")
    assert not (tmp_path / "out.npz").exists()


def test_an_empty_split_is_not_exported(tmp_path, walk_payload):
    windows = Windows.build(walk_payload, split=(1, 0, 0))
    with pytest.raises(InputError, match="no windows"):
        windows.export_predecessor(tmp_path / "out.npz", walk_payload, "test")
