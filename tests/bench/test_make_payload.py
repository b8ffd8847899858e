"""The made payload: the same bytes for the same sources and seed, whole articles of unit rows, and real statistics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import fastlvm
from fastlvm.errors import InputError
from fastlvm.retrieval.blas import faiss

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import make_payload

ROWS = 20_000


@pytest.fixture(autouse=True)
def from_the_sample(monkeypatch):
    """The figures below are of rows made from the sample payload, whatever data there is."""
    monkeypatch.delenv("FASTLVM_DATA", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """20,000 rows made from the sample payload."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTLVM_DATA", raising=False)
        return make_payload.payload(ROWS, out=tmp_path_factory.mktemp("made") / "payload")


@pytest.fixture
def corpus(article_walks, tmp_path, monkeypatch):
    """corpus(name, **walks): a corpus folder in FASTLVM_DATA."""
    root = tmp_path / "data"
    monkeypatch.setenv("FASTLVM_DATA", str(root))
    monkeypatch.setattr(make_payload, "BUILD", tmp_path / "build")

    def make(name, **walks):
        vectors, keys = article_walks(dtype=np.float16, **walks)
        (root / name).mkdir(parents=True)
        np.save(root / name / "vectors.npy", vectors)
        np.save(root / name / "keys.npy", keys)
        return root / name

    return make


@pytest.fixture
def one_thread():
    """For FAISS, whose threads wait for one another in steps too short to share a busy machine."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def same_bytes(one, other):
    return all(
        (one.path / name).read_bytes() == (other.path / name).read_bytes() for name in ("vectors.npy", "keys.npy")
    )


def test_rows_are_of_unit_length_in_articles_of_consecutive_chunks(made):
    assert len(made) == ROWS and made.vectors.dtype == np.float16
    made.verify()
    article, chunk = made.keys.T.astype(int)
    new = np.flatnonzero(np.diff(article, prepend=-1))
    assert (article[new] == np.arange(len(new))).all()
    assert (chunk == np.arange(ROWS) - np.repeat(new, np.diff(new, append=ROWS))).all()
    real = fastlvm.Payload.sample()
    sizes = np.unique(real.keys[:, 0], return_counts=True)[1]
    assert set(np.unique(article, return_counts=True)[1][:-1]) <= set(sizes)
    assert made.provenance.tool == "bench/make_payload.py"
    assert made.provenance.encoder == "made from the sample payload by bench/make_payload.py, seed 0"


def test_statistics_are_those_of_the_sources(made, monkeypatch, one_thread):
    """And rows made from a third of the articles are as those of all of them, but no easier to find."""
    monkeypatch.setattr(make_payload, "ROWS_PER_LIST", 100)
    real = make_payload.sources()
    rows = len(real.articles)
    few = real.articles % 3 == 0
    part, numbers = real.vectors[few], real.articles[few] // 3
    third = np.concatenate([block for block, _ in make_payload.made(part, numbers, rows, 0)])
    wanted = make_payload.statistics(real.vectors, real.articles)
    from_third = make_payload.statistics(third, make_payload._keys(numbers, rows, 0)[:, 0])
    monkeypatch.setattr(make_payload, "ROWS_PER_LIST", 320)  # as many lists
    from_all = make_payload.statistics(made.vectors.view(np.ndarray), made.keys[:, 0])
    for found in (from_third, from_all):
        off = {name: found[name] - value for name, value in wanted.items()}
        assert max(abs(off[name]) for name in off if "cosine" in name or "deviation" in name) < 0.03
        assert max(abs(off[name]) for name in off if "score" in name) < 0.04
        assert -0.05 < off["list sizes: imbalance"] < 0.25  # a little less even than real ones
    recalls = [name for name in wanted if "recall" in name]
    assert all(-0.15 < from_third[name] - wanted[name] < 0.01 for name in recalls) and len(recalls) == 3


def test_no_row_is_a_slightly_moved_source_row(made):
    """Nor is one copy of another: their cosines are those of neighbours in an article, not of duplicates."""
    real = make_payload.sources()
    origins = np.concatenate(list(make_payload._copies(real.articles, ROWS, 0)))
    vectors = made.vectors.astype(np.float32)
    assert np.einsum("nd,nd->n", vectors, real.vectors[origins].astype(np.float32)).max() < 0.9
    first, second = (
        vectors[start : start + len(real.articles)][np.argsort(origins[start : start + len(real.articles)])]
        for start in (0, len(real.articles))
    )
    between = np.einsum("nd,nd->n", first, second)
    assert 0.5 < between.mean() < 0.75 and between.max() < 0.95


def test_corpora_of_the_named_folder_are_the_sources_and_what_was_made_is_kept(corpus, tmp_path):
    corpus("walks", articles=5)
    corpus("others", articles=3, seed=1)
    (tmp_path / "data" / "README.md").write_text("two corpora")
    one = make_payload.payload(500, seed=1)
    assert one.dim == 32 and "others, walks (160 rows)" in one.provenance.source
    assert one.path.parent == tmp_path / "build"
    before = (one.path / "vectors.npy").stat().st_mtime_ns
    assert make_payload.payload(500, seed=1).path == one.path
    assert (one.path / "vectors.npy").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "build").iterdir()] == [one.path.name]


def test_bytes_follow_from_sources_and_seed(corpus, tmp_path):
    walks = corpus("walks")
    one = make_payload.payload(300, seed=1)
    assert same_bytes(one, make_payload.payload(300, seed=1, out=tmp_path / "again"))
    other = make_payload.payload(300, seed=2)
    assert other.path != one.path and not same_bytes(one, other)
    vectors = np.load(walks / "vectors.npy")
    np.save(walks / "vectors.npy", vectors[:, ::-1])
    assert make_payload.payload(300, seed=1).path not in (one.path, other.path)


@pytest.mark.parametrize(
    ("articles", "chunks", "dim", "rows"), [(1, 1, 1, 3), (1, 1, 2, 3), (4, 1, 3, 1), (2, 3, 5, 5)]
)
def test_tiny_corpora(corpus, articles, chunks, dim, rows):
    corpus("tiny", articles=articles, chunks=chunks, dim=dim)
    made = make_payload.payload(rows)
    assert len(made) == rows
    made.verify()


def test_bad_arguments_and_folders_are_one_sentence(corpus, tmp_path, capsys):
    with pytest.raises(InputError, match="no subfolder with a vectors"):
        make_payload.payload(10)
    corpus("walks")
    for arguments, words in (((0,), "rows is 0"), ((True,), "rows is True"), ((10, -1), "seed is -1")):
        with pytest.raises(InputError, match=words):
            make_payload.payload(*arguments)
    make_payload.payload(10, out=tmp_path / "out")
    with pytest.raises(InputError, match="holds another payload than the one asked for"):
        make_payload.payload(11, out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make_payload.payload(10, out=tmp_path / "file")
    with pytest.raises(InputError, match="10 rows are too few to check"):
        make_payload.statistics(np.ones((10, 4)), np.zeros(10, int))
    assert make_payload.main(["--rows", "0"]) == 2
    assert capsys.readouterr().err == "make_payload.py: rows is 0, and a whole number from 1 on is wanted\n"


def spoil(name, change):
    def write(folder):
        values = np.load(folder / name)
        np.save(folder / name, change(values))

    return write


def cut(folder):
    path = folder / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-2])


def not_finite(values):
    values[7, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is truncated"),
        (lambda folder: (folder / "vectors.npy").write_bytes(b"none"), "no .npy header"),
        (lambda folder: (folder / "keys.npy").unlink(), "keys.npy is missing"),
        (spoil("vectors.npy", not_finite), "row 7 is zero or not finite"),
        (spoil("vectors.npy", lambda values: values[0]), r"holds float16 \[32\]"),
        (spoil("vectors.npy", lambda values: values.astype(int)), "holds int64"),
        (spoil("vectors.npy", lambda values: values[:, :16]), "16 dimensions"),
        (spoil("keys.npy", lambda values: values[::-1].copy()), "not sorted"),
        (spoil("keys.npy", lambda values: values[:-1]), r"int32 \[119, 2\]"),
    ],
)
def test_damaged_corpora_are_refused(corpus, tmp_path, damage, words):
    corpus("first")
    damage(corpus("second"))
    with pytest.raises(InputError, match=words):
        make_payload.payload(10)
    assert not (tmp_path / "build").exists()


def test_nothing_is_left_where_writing_fails(corpus, tmp_path, monkeypatch):
    corpus("walks")

    def full(*_):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(make_payload, "made", full)
    with pytest.raises(InputError, match="No space left"):
        make_payload.payload(10)
    assert not list((tmp_path / "build").iterdir())
