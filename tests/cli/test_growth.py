"""`fastlvm index add`, `remove` and `verify`."""

from __future__ import annotations

import numpy as np
import pytest

from cli.conftest import DIM, ok, refused
from fastlvm import Index, Payload


@pytest.fixture
def index(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "v.npy", vectors[30:])
    np.save(tmp_path / "k.npy", np.stack(np.divmod(np.arange(30, 40), 10), axis=1))
    keys = np.stack(np.divmod(np.arange(30), 10), axis=1)
    Index.build(Payload.build(tmp_path / "p", vectors[:30], keys, encoder="test")).save(tmp_path / "index")
    return tmp_path / "index"


def test_rows_come_and_go(index, tmp_path):
    assert "ok: 30 rows (0 added, 0 removed), hashes hold, 0 records" in ok("index", "verify", index)
    given = ["index", "add", index, "--vectors", tmp_path / "v.npy", "--keys", tmp_path / "k.npy"]
    assert ok(*given) == f"10 rows added to {index}, which has 40\n"
    assert refused(*given) == "key (3, 0) is that of row 30: remove it first"
    assert "ok: 40 rows (10 added, 0 removed)" in ok("index", "verify", index)
    np.save(tmp_path / "gone.npy", [[0, 0], [3, 9]])
    assert (
        ok("index", "remove", index, "--keys", tmp_path / "gone.npy") == f"2 rows removed from {index}, which has 38\n"
    )
    assert "key (0, 0) is of no row" in refused("index", "remove", index, "--keys", tmp_path / "gone.npy")
    assert "ok: 38 rows (10 added, 2 removed), hashes hold, 2 records" in ok("index", "verify", index)


def test_what_is_not_whole_is_refused(index, tmp_path):
    np.save(tmp_path / "gone.npy", [[0, 0]])
    ok("index", "remove", index, "--keys", tmp_path / "gone.npy")
    whole = (index / "journal.bin").read_bytes()
    (index / "journal.bin").write_bytes(whole[:-1])
    assert "note: 71 bytes of a change that was broken off" in ok("index", "verify", index)
    (index / "journal.bin").write_bytes(whole[:-1] + b"x")
    assert "journal.bin record 1 is damaged" in refused("index", "verify", index)
    (index / "keys.npy").write_bytes(b"")
    assert "keys.npy is damaged" in refused("index", "verify", index)
    assert "holds no index" in refused("index", "verify", tmp_path)


def test_arrays_of_something_else_are_refused(index, tmp_path):
    np.save(tmp_path / "wrong.npy", np.ones((10, DIM + 1)))
    with_keys = ["--keys", tmp_path / "k.npy"]
    assert "vectors have shape" in refused("index", "add", index, "--vectors", tmp_path / "wrong.npy", *with_keys)
    assert "keys have" in refused("index", "remove", index, "--keys", tmp_path / "v.npy")
    assert "does not exist" in refused("index", "remove", index, "--keys", tmp_path / "none.npy")
