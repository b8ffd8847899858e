"""Windows by the commands: kept together by groups, and a predecessor's with wrong targets or keys put right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cli.conftest import listing, ok, refused
from fastlvm import Payload, Windows


@pytest.fixture
def old(made, tmp_path):
    """old(targets=, keys=) -> a predecessor's file of all windows of the payload, with others in their place."""
    payload = Payload.open(made.payload)
    windows = Windows.build(payload, split=(1, 0, 0))
    rows, keys = windows.rows("train"), windows.keys("train")

    def write(targets=None, truth_keys=None):
        vectors = payload.take(rows)
        np.savez(
            tmp_path / "old.npz",
            contexts=vectors[:, :-1],
            targets=vectors[:, -1] if targets is None else targets(vectors[:, -1]),
            truth_keys=keys if truth_keys is None else truth_keys(keys),
        )
        return tmp_path / "old.npz"

    return write


def moved(values):
    return np.roll(values, 11, axis=0)


def test_align_replaces_targets(made, old, tmp_path):
    out = tmp_path / "new.npz"
    printed = ok("windows", "align", old(targets=moved), "--payload", made.payload, "--out", out, "--split", "0,0,1")
    assert "coverage  72 of 72 windows (100.0 %), 0 dropped, 72 changed" in printed
    assert "after     target cosine 1.0000, context cosine 1.0000" in printed and "random pairs" in printed
    assert len(Windows.open(out).rows("test")) == 72
    assert "target cosine 1.0000" in ok("windows", "verify", out, "--payload", made.payload)


def test_align_refuses_keys_that_are_not_the_contexts(made, old, tmp_path):
    path = old(truth_keys=moved)
    before = listing(tmp_path)
    message = refused("windows", "align", path, "--payload", made.payload, "--out", tmp_path / "new.npz")
    assert "context cosine" in message and "random pairs" in message and "fastlvm windows remap" in message
    assert listing(tmp_path) == before


def test_remap_finds_the_keys(made, old, tmp_path):
    out = tmp_path / "new.npz"
    printed = ok("windows", "remap", old(truth_keys=moved), "--payload", made.payload, "--out", out)
    assert "coverage  72 of 72 windows (100.0 %), 0 dropped, 72 changed" in printed
    assert "before    target cosine 0." in printed or "before    target cosine -0." in printed
    assert "after     target cosine 1.0000, context cosine 1.0000" in printed
    assert "articles in two splits 0" in ok("windows", "verify", out, "--payload", made.payload)


def test_remap_refuses_windows_that_the_payload_has_not(made, old, tmp_path):
    path = old(targets=moved)
    before = listing(tmp_path)
    message = refused("windows", "remap", path, "--payload", made.payload, "--out", tmp_path / "new.npz")
    assert "0 of 72 windows are runs of its chunks" in message and "random pairs" in message
    assert listing(tmp_path) == before


def test_articles_of_a_column_stay_together(made, tmp_path):
    out, file = tmp_path / "w.npz", tmp_path / "novels.jsonl"
    file.write_text("".join(json.dumps({"article": a, "novel": f"novel {a // 2}"}) + "\n" for a in range(8)))
    printed = ok(
        *("windows", "build", made.payload, "--out", out, "--split", "0.5,0.25,0.25"),
        *("--group-by", "novel", "--groups", file),
    )
    assert "split by novel" in printed and "groups in two splits 0" in printed
    assert [int(line.split()[5]) for line in printed.splitlines()[1:4]] == [2, 1, 1]  # groups of each split
    windows = Windows.open(out)
    for split in windows.splits:
        np.testing.assert_array_equal(windows.groups(split), windows.keys(split)[:, 0] // 2)
    assert "groups in two splits 0" in ok("windows", "verify", out, "--payload", made.payload)
    exported = ok("windows", "export", out, "--payload", made.payload, "--split", "test", "--out", tmp_path / "o.npz")
    assert exported.startswith("18 windows")


def test_articles_of_a_title_stay_together(made, tmp_path):
    out, texts = tmp_path / "w.npz", tmp_path / "t.jsonl"
    texts.write_text("".join(f'{{"text": "x", "title": "novel {a % 4} [{a}]"}}\n' for a in np.load(made.keys)[:, 0]))
    ok(
        *("payload", "build", "--vectors", made.vectors, "--keys", made.keys, "--texts", texts),
        *("--encoder", "walks", "--out", tmp_path / "payload"),
    )
    printed = ok("windows", "build", tmp_path / "payload", "--out", out, "--group-by", "title-prefix")
    assert "split by title-prefix" in printed
    windows = Windows.open(out)
    assert windows.group_by == "title-prefix"
    for split in windows.splits:
        np.testing.assert_array_equal(windows.groups(split), windows.keys(split)[:, 0] % 4)


def test_groups_in_two_splits_are_refused(made, tmp_path):
    rows, keys, split = Windows.open(made.windows).arrays()
    payload_id = Payload.open(made.payload).id
    Windows(payload_id, rows, keys, split, groups=keys[:, 0] * 0, group_by="novel").save(tmp_path / "w.npz")
    message = refused("windows", "verify", tmp_path / "w.npz", "--payload", made.payload)
    assert "1 groups (novel) in more than one split" in message
