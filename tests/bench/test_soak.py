"""The soak of growth, small; and that it notices what it is there for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlvm.retrieval import Index

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import soak
import soak_kills
from soak_cases import change, made, payload_keys, payload_vectors, queries_of

SETUP = soak.Setup(rows=300, dim=16, seed=3)


def test_searches_while_rows_come_and_go(tmp_path):
    found = soak.searches(SETUP, "flat", 3000, 4, tmp_path)
    assert not found.errors and found.wrong == found.short == 0, found
    assert found.searches >= 3000 and found.changes >= 10 and found.sampled >= 5, found


def test_kills(tmp_path):
    found = soak_kills.kills(SETUP, "flat", 10, tmp_path, longest=0.15)
    assert not found.wrong and found.kills == 10 and found.acknowledged, found


def test_an_answer_that_is_not_right_is_noticed(tmp_path):
    made(SETUP, "flat", tmp_path / "index")
    index = Index.open(shutil.copytree(tmp_path / "index", tmp_path / "a"))
    queries = queries_of(SETUP)
    before = index.search(queries[:2], soak.K)
    for number in range(2):
        change(index, SETUP, number)
    after = index.search(queries[:2], soak.K)
    index.close()
    assert (before.ids != after.ids).any()
    at = np.array([[0, 0], [0, 1], [2, 0], [2, 1]])
    for first, wrong in ((before, False), (after, True)):
        samples = at, np.concatenate([first.ids, after.ids]), np.concatenate([first.scores, after.scores])
        assert (soak.replay(tmp_path / "index", SETUP, samples, 2) > 0) == wrong
        shutil.rmtree(tmp_path / "index")
        made(SETUP, "flat", tmp_path / "index")


def test_a_row_that_is_lost_is_noticed(tmp_path):
    made(SETUP, "flat", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    rows = dict(zip(map(tuple, payload_keys(300).tolist()), payload_vectors(SETUP), strict=True))
    assert soak_kills.differs(index, rows) == ""
    for number in range(12):
        rows = soak_kills.after(rows, SETUP, number)
        kind, vectors, keys = soak_kills.step(SETUP, number)
        if kind == "add":
            assert f"{len(keys)} rows are missing" in soak_kills.differs(index, rows)
            index.add(vectors, keys)
        elif kind == "remove":
            assert "are too many" in soak_kills.differs(index, rows)
            index.remove(keys)
        assert soak_kills.differs(index, rows) == ""
    moved = {key: -vector for key, vector in rows.items()}
    assert "200 rows are not found by their vectors" in soak_kills.differs(index, moved)
    index.close()


@pytest.mark.parametrize(
    "change", [{"wrong": 1}, {"short": 1}, {"errors": ["x"]}, {"sampled": 0}, {"grown": 2_000_000, "needed": 999_000}]
)
def test_what_a_soak_fails_for(change):
    good = soak.Searched(10, 2, 1, 0, 0, [], 1.0, 100_000_000, 2_000_000, 1_500_000)
    assert good.good and not good._replace(**change).good
    assert "1 not equal" in "".join(soak.table("flat", SETUP, good._replace(wrong=1), None))
