"""Damage to an index under hashes that fit it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastlvm.data import Payload, Space
from fastlvm.errors import IntegrityError
from fastlvm.files import sha256_file, sha256_json
from fastlvm.retrieval import Index

DIM, ROWS = 24, 420


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """Row 300 is row 5."""
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[300] = vectors[5]
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1).astype(np.int32)
    return Payload.build(tmp_path_factory.mktemp("payload") / "p", vectors, keys, encoder="test")


@pytest.fixture(scope="module")
def indexes(payload):
    space = Space.fit(payload.take(np.arange(200)))
    return {
        "flat": Index.build(payload, "flat"),
        "flat, whitened": Index.build(payload, "flat", space=space),
        "ivf": Index.build(payload, "ivf_flat", space=space, nlist=8, nprobe=8),
        "ivf_sq8": Index.build(payload, "ivf_sq8", space=space, nlist=8, nprobe=8),
        "hnsw": Index.build(payload, "hnsw", space=space),
    }


def rehashed(folder, **changes):
    """index.json whose hashes and id fit the files and entries of the folder."""
    content = json.loads((folder / "index.json").read_text()) | changes
    names = ("payload_id", "space_id", "kind", "rows", "dim", "nlist", "nprobe", "ef_search", "recall_at_50", "seed")
    content["id"] = sha256_json({name: content[name] for name in names})[:16]
    content["sha256"] = {name: sha256_file(folder / name) for name in content["sha256"]}
    write(folder, **content)


def write(folder, **changes):
    """index.json with other entries, under a checksum that fits."""
    content = json.loads((folder / "index.json").read_text()) | changes
    content.pop("checksum")
    (folder / "index.json").write_text(json.dumps(content | {"checksum": sha256_json(content)}))


def refused(folder, file, says):
    with pytest.raises(IntegrityError, match=says) as caught:
        Index.open(folder)
    message = str(caught.value)
    assert str(folder / file) in message and message.isprintable() and len(message) < 500 + len(str(folder))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rows": 420.0}, "rows is 420.0, and a whole number"),
        ({"rows": 421}, r"index.json|keys.npy"),
        ({"rows": True}, "rows is True"),
        ({"dim": "24"}, "dim is '24'"),
        ({"dim": 2**40}, "dim|dimension"),
        ({"kind": "ivf_pq"}, "kind is 'ivf_pq', and one of flat, ivf_flat.* is wanted"),
        ({"kind": "x" * 5000}, "kind is 'x"),
        ({"kind": "flat", "nlist": None, "nprobe": None}, "kind"),
        ({"nlist": None}, "nlist is None"),
        ({"nlist": 7}, "lists"),
        ({"nprobe": 9}, "nprobe 9 of 8 lists"),
        ({"nprobe": 3}, "8 probes, and wants 3"),
        ({"recall_at_50": "all"}, "recall_at_50 is 'all'"),
        ({"seed": -1}, "seed is -1"),
        ({"payload_id": ["a\nb"]}, "payload_id is "),
        ({"space_id": "a\nb" * 1000}, "space_id is "),
    ],
)
def test_an_entry_that_makes_no_sense_is_named(indexes, tmp_path, change, says):
    folder = tmp_path / "index"
    indexes["ivf"].save(folder)
    rehashed(folder)
    Index.open(folder)
    rehashed(folder, **change)
    refused(folder, "", says)


POINT = {"kind": "ivf_flat", "rows": 419, "nlist": 8, "nprobe": 8, "ef_search": None, "recall_at_50": 1.0, "ms": 0.1}


@pytest.mark.parametrize(
    "curve",
    [
        None,
        {},
        [None],
        [[]],
        [POINT | {"kind": "auto"}],
        [POINT | {"kind": ["flat"]}],
        [POINT | {"rows": 0}],
        [POINT | {"nlist": None}],
        [POINT | {"nprobe": 0}],
        [POINT | {"ef_search": 50}],
        [POINT | {"kind": "hnsw"}],
        [POINT | {"recall_at_50": 1.5}],
        [POINT | {"recall_at_50": 1}],
        [POINT | {"ms": -0.1}],
        [POINT | {"ms": True}],
        [POINT | {"more": 1}],
        [{name: value for name, value in POINT.items() if name != "ms"}],
    ],
)
def test_a_curve_that_no_measurement_gives_is_refused(indexes, tmp_path, curve):
    folder = tmp_path / "index"
    indexes["ivf"].save(folder)
    rehashed(folder, curve=[POINT, POINT])
    assert len(Index.open(folder).curve) == 2 and Index.open(folder).id == indexes["ivf"].id
    rehashed(folder, curve=curve)
    refused(folder, "index.json", "curve is .*a list of points of kind, rows, nlist, nprobe, ef_search")


@pytest.mark.parametrize("kind", ["ivf_sq8", "hnsw"])
def test_options_of_another_kind_are_refused(indexes, tmp_path, kind):
    folder = tmp_path / "index"
    indexes[kind].save(folder)
    index = Index.open(folder)
    for name in ("nlist", "nprobe", "ef_search"):
        given = getattr(index, name)
        rehashed(folder, **{name: 3 if given is None else None})
        refused(folder, "index.json", f"{name} is")
        rehashed(folder, **{name: given})
        if given is not None and name != "nlist":
            rehashed(folder, **{name: given - 1})
            refused(folder, "index.faiss", "and wants")
            rehashed(folder, **{name: given})
    Index.open(folder)


@pytest.mark.parametrize("kind", ["ivf_sq8", "hnsw"])
@pytest.mark.parametrize("other", ["flat", "ivf", "ivf_sq8", "hnsw"])
def test_the_file_of_another_kind_is_refused(indexes, tmp_path, kind, other):
    if kind == other:
        return
    indexes[kind].save(tmp_path / "a")
    indexes[other].save(tmp_path / "b")
    (tmp_path / "a" / "index.faiss").write_bytes((tmp_path / "b" / "index.faiss").read_bytes())
    rehashed(tmp_path / "a")
    refused(tmp_path / "a", "index.faiss", "kind")


def test_a_flat_index_under_another_kind_is_refused(indexes, tmp_path):
    indexes["flat"].save(tmp_path / "flat")
    rehashed(tmp_path / "flat", kind="ivf_flat", nlist=8, nprobe=2)
    refused(tmp_path / "flat", "index.faiss", "kind")
    indexes["ivf"].save(tmp_path / "ivf")
    (tmp_path / "ivf" / "index.faiss").write_bytes((tmp_path / "flat" / "index.faiss").read_bytes())
    rehashed(tmp_path / "ivf")
    refused(tmp_path / "ivf", "index.faiss", "kind")


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("keys.npy", lambda keys: keys.astype("U5"), "holds <U5"),
        ("keys.npy", lambda keys: keys[:-1], r"holds int32 \[419, 2\]"),
        ("groups.npy", lambda groups: groups.astype(np.int32), "holds int32"),
        ("groups.npy", lambda groups: np.int64(3), "holds|truncated"),
        ("groups.npy", lambda groups: np.where(np.arange(ROWS) == 9, -1, groups), "row 9 .* -1"),
        ("groups.npy", lambda groups: np.where(np.arange(ROWS) == 9, 10**6, groups), "row 9 .* 1000000"),
        ("groups.npy", lambda groups: np.where(np.arange(ROWS) == 301, 300, groups), "row 301 .* 300"),
        ("groups.npy", lambda groups: np.where(np.arange(ROWS) == 9, 8, groups), "different indexes"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_keys_and_groups_that_make_no_sense_are_refused(indexes, tmp_path, file, change, says):
    folder = tmp_path / "index"
    indexes["ivf"].save(folder)
    np.save(folder / file, change(np.load(folder / file)))
    rehashed(folder)
    refused(folder, "", says)


def test_a_space_of_another_size_is_refused_by_name(indexes, tmp_path):
    folder = tmp_path / "index"
    indexes["flat, whitened"].save(folder)
    other = Space.identity(DIM + 1)
    other.save(folder / "space.safetensors")
    rehashed(folder, space_id=other.id)
    refused(folder, "space.safetensors", "25 dimensions, and .* of 24 is wanted")


def test_names_of_files_that_an_index_has_not_are_refused(payload, tmp_path):
    Index.build(payload, "flat").save(tmp_path / "a")
    digests = json.loads((tmp_path / "a" / "index.json").read_text())["sha256"]
    for name, digest in (("a\nb", "0"), ("x" * 3000, "0"), ("index.faiss", 3)):
        write(tmp_path / "a", sha256=digests | {name: digest})
        refused(tmp_path / "a", "index.json", "lacks what an index records")
