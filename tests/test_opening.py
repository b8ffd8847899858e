"""Models by their folders: how reports call them, and what they are over another payload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastlvm.data import Space
from fastlvm.errors import InputError
from fastlvm.evaluation import Listing, Ranker
from fastlvm.opening import Opened, describe_index, model_name, open_model
from fastlvm.retrieval import Index


@pytest.mark.parametrize(
    ("path", "among", "name"),
    [
        ("runs/mlp", ["runs/mlp", "runs/gru"], "mlp"),
        ("runs/mlp/", ["runs/mlp/"], "mlp"),
        ("a/run", ["a/run", "b/run"], "a/run"),
        (".", ["."], None),
        ("..", ["..", "."], None),
    ],
)
def test_a_model_is_called_by_its_folder_unless_two_have_the_name(path, among, name, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    wanted = {".": "below", "..": tmp_path.name}.get(path, name)
    assert model_name(Path(path), [Path(other) for other in among]) == wanted


def opened(payload, space):
    listing = Listing("flat", 1, lambda *_: None, lambda _: None)
    ranker = Ranker("m", lambda c: c[:, -1], space, listings=[listing], identity="i")
    return Opened(Path("m"), ranker, payload.id, 5, None, None)


def test_over_its_own_payload_a_model_is_in_its_domain(payload_factory):
    payload = payload_factory()
    ranker = opened(payload, Space.identity(payload.dim)).over(payload)
    assert ranker.domain == "in" and len(ranker.listings) == 1


def test_over_another_payload_it_is_out_of_its_domain_and_in_no_index(payload_factory):
    home, away, wide = payload_factory(), payload_factory(name="away", seed=1), payload_factory(name="w", dim=40)
    model = opened(home, Space.identity(home.dim))
    ranker = model.over(away)
    assert (ranker.domain, list(ranker.listings), ranker.identity) == ("out", [], "i")
    assert model.ranker.domain == "in" and len(model.ranker.listings) == 1
    with pytest.raises(InputError, match=r"m takes vectors of 32 dimensions, and .*w has 40"):
        model.over(wide)


def test_an_index_says_what_it_has_otherwise_than_its_payload(payload_factory):
    payload = payload_factory()
    index = Index.build(payload, kind="ivf_flat", nlist=4, nprobe=2)
    assert describe_index(index) == "ivf_flat nlist 4, nprobe 2"
    flat = Index.build(payload)
    flat.add(np.eye(payload.dim, dtype=np.float32)[:2], np.array([[50, 0], [50, 1]]))
    assert describe_index(flat) == "flat, 2 rows added" and flat.added == 2
    flat.remove(np.array([[0, 3], [50, 1]]))
    assert describe_index(flat) == "flat, 2 rows added, 2 rows removed"


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(InputError, match="is no folder: name a run or an artifact"):
            open_model(tmp_path / name, "m")
