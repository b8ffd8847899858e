"""Inverted lists of RaBitQ codes: what is found by our own scan, against FAISS and numpy in float64."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from rabitq_plain import EPS, FULL, SIZES, Given, Plain, around, built, crowds, normal, plainly, same, search

from fastlvm import _C
from fastlvm.data import Payload
from fastlvm.retrieval import Index
from fastlvm.retrieval.blas import faiss
from fastlvm.retrieval.coding import factors_of, quantised, rotated
from fastlvm.retrieval.rabitq import IvfRabitq

QUERIES = 5


@pytest.fixture(params=_C.isas())
def isa(request):
    _C.set_isa(request.param)
    return request.param


@pytest.mark.parametrize("dim", (16, 37, 100, 768))
def test_the_crowds_are_the_lists(dim):
    """What the tests below rest on."""
    for sizes in (SIZES, FULL):
        assert tuple(built(dim, sizes)._parts["sizes"]) == sizes


@pytest.mark.parametrize("dim", (1, 5, 16, 37, 100, 256, 768))
def test_all_candidates_of_all_lists_are_scored_as_faiss_scores_the_decoded_rows(isa, dim):
    searcher, plain, queries = built(dim), plainly(dim), normal(QUERIES, dim, seed=3)
    exact, bound = plain.scores(queries)
    flat = faiss.IndexFlatIP(dim)
    flat.add(plain.decoded)
    for k in (1, 50, plain.n):
        wanted, _ = flat.search(plain.moved(queries), k)
        for given, threads in ((queries, 1), (queries[:1], 3)):
            scores, ids = search(searcher, given, k, plain.nlist, plain.n, threads=threads)
            for i in range(len(given)):
                assert len(set(ids[i])) == k
                best = np.sort(exact[i])[::-1][:k]
                most = bound[i].max()
                assert (np.abs(scores[i] - exact[i, ids[i]]) <= bound[i, ids[i]]).all()
                assert (np.abs(scores[i] - wanted[i]) <= 2 * most).all() and (np.diff(scores[i]) <= 0).all()
                assert (
                    exact[i, ids[i]] >= best - 2 * most
                ).all()  # the same ids, but where scores are as good as equal


@pytest.mark.parametrize("dim", (5, 16, 37, 100, 768))
@pytest.mark.parametrize("threads", (1, 3))
def test_candidates_are_the_best_by_the_estimate(isa, dim, threads):
    searcher, plain, queries = built(dim), plainly(dim), normal(12, dim, seed=4)
    estimates, table = plain.estimates(queries)
    near, rounding = plain.near(queries)
    for candidates in (1, 7, 60):
        for given in (queries, queries[:1]):
            _, ids = search(searcher, given, candidates, plain.nlist, candidates, threads=threads)
            for i in range(len(given)):
                taken = np.isin(np.arange(plain.n), ids[i])
                assert taken.sum() == candidates
                for within in [
                    plain.list == number for number in range(plain.nlist)
                ]:  # of one list: with the same <q, c>
                    in_, out = taken & within, ~taken & within
                    lower = (estimates[i] + table[i])[in_].min(initial=np.inf)
                    assert lower >= (estimates[i] - table[i])[out].max(initial=-np.inf) - EPS * np.abs(near[i]).max()
                whole = estimates[i] + plain.level * near[i, plain.list]
                off = table[i] + abs(plain.level) * rounding[i, plain.list]
                assert (whole + off)[taken].min() >= (whole - off)[~taken].max()


@pytest.mark.filterwarnings("error")
def test_the_estimate_is_worth_its_candidates(isa):
    """Were it noise, a tenth of the rows would hold a tenth of the best: of one list around zero."""
    dim = 100
    searcher = around(normal(3000, dim), np.zeros((1, dim), np.float32))
    queries = normal(20, dim, seed=5)
    _, wanted = search(searcher, queries, 10, 1, 3000)
    _, found = search(searcher, queries, 10, 1, 300)
    assert wanted.min() >= 0
    assert np.mean([np.isin(found[i], wanted[i]).mean() for i in range(20)]) > 0.95


def scored(nprobe):
    """Centroids that lists to be searched are chosen from."""
    return -(-5 * nprobe // 4)


@pytest.mark.parametrize("sizes", (SIZES, FULL), ids=("empty lists", "no empty list"))
@pytest.mark.parametrize("dim", (16, 100))
@pytest.mark.parametrize("threads", (1, 3))
def test_only_the_nearest_lists_are_searched(isa, dim, sizes, threads):
    """Those of the best scores among a quarter more centroids, of the best estimates."""
    searcher, plain, queries = built(dim, sizes), plainly(dim, sizes), normal(10, dim, seed=6)
    near, rounding = plain.near(queries)
    estimates, off = plain.near_estimates(queries)
    there = np.array(sizes) > 0
    for nprobe in range(1, plain.nlist + 1):
        for i in range(len(queries)):
            _, ids = search(searcher, queries[i : i + 1], plain.n, nprobe, plain.n, threads=threads)
            probed = np.bincount(plain.list[ids[ids >= 0]], minlength=plain.nlist)
            assert ((probed == 0) | (probed == sizes)).all()
            in_, out = np.flatnonzero(probed > 0), np.flatnonzero(there & (probed == 0))
            assert nprobe - (~there).sum() <= len(in_) <= nprobe
            for one in in_:
                assert (estimates[i] - off[i] > (estimates[i] + off[i])[one]).sum() < scored(nprobe)
            worst = (near[i] + rounding[i])[in_].min(initial=np.inf)
            for one in out[(near[i] - rounding[i])[out] > worst]:  # nearer, and yet not scored
                assert (estimates[i] + off[i] >= (estimates[i] - off[i])[one]).sum() - 1 >= scored(nprobe)


def test_centroids_are_ranked_by_their_codes(isa):
    """By several scans of 256 of them. The nearest is nearly always among the best two by one bit a component."""
    dim, nlist = 64, 600
    rows, centroids = crowds(dim, (2,) * nlist, seed=30)
    searcher = around(rows, centroids)
    plain, queries = Plain(searcher), rows[::20]
    nearest = plain.near(queries)[0].argmax(axis=1)
    for threads in (1, 3):
        found = np.stack([search(searcher, row[None], 1, 1, 9, threads=threads)[1][0, 0] for row in queries])
        assert (plain.list[found] == nearest).mean() > 0.95


def test_of_more_lists_than_are_kept_until_the_end_the_nearest_are_searched(isa):
    """There is room for 2^14 centroids before their best are looked for."""
    dim, nlist = 16, 20_000
    rows, centroids = crowds(dim, (1,) * nlist, seed=31)
    searcher = around(rows[:6000], centroids)
    plain, queries = Plain(searcher), normal(3, dim, seed=32)
    (near, rounding), (estimates, off) = plain.near(queries), plain.near_estimates(queries)
    sizes = np.bincount(plain.list, minlength=nlist)
    for nprobe, threads in ((1, 1), (1, 3), (200, 3), (9000, 1), (nlist, 3)):
        for i in range(len(queries)):
            _, ids = search(searcher, queries[i : i + 1], plain.n, nprobe, plain.n, threads=threads)
            probed = np.bincount(plain.list[ids[ids >= 0]], minlength=nlist)
            assert ((probed == 0) | (probed == sizes)).all()
            in_, out = np.flatnonzero(probed), np.flatnonzero((sizes > 0) & (probed == 0))
            assert nprobe - (sizes == 0).sum() <= len(in_) <= nprobe
            above = nlist - np.searchsorted(np.sort(estimates[i] - off[i]), estimates[i] + off[i], side="right")
            assert (above[in_] < scored(nprobe)).all()
            perhaps = nlist - np.searchsorted(np.sort(estimates[i] + off[i]), estimates[i] - off[i]) - 1
            nearer = out[(near[i] - rounding[i])[out] > (near[i] + rounding[i])[in_].min(initial=np.inf)]
            assert (perhaps[nearer] >= scored(nprobe)).all()


@pytest.mark.parametrize("dim", (37, 256))
def test_an_answer_depends_on_its_query_alone(isa, dim):
    """Alone or in a batch, on any number of threads, to the last bit."""
    searcher, queries = built(dim), normal(200, dim, seed=7)
    _C.set_num_threads(1)
    wanted = search(searcher, queries, 10, 5, 20)
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        for n in (2, 63, 64, 65, 200):
            assert same(search(searcher, queries[:n], 10, 5, 20), [part[:n] for part in wanted])
        for i in range(0, 200, 7):
            alone = [part[i : i + 1] for part in wanted]
            assert same(search(searcher, queries[i : i + 1], 10, 5, 20), alone)
            assert same(search(searcher, queries[i : i + 1], 10, 5, 20, threads=3 + i % 3), alone)


def test_several_python_threads_at_once(isa):
    searcher, queries = built(37), normal(70, 37, seed=8)
    wanted = search(searcher, queries, 10, 5, 20)
    _C.set_num_threads(3)
    wrong = []

    def work(seat):
        for turn in range(40):
            first, n = (7 * turn + seat) % 69, (1, 1, 2, 66)[(turn + seat) % 4]
            got = search(searcher, queries[first : first + n], 10, 5, 20, threads=turn % 4)
            if not same(got, [part[first : first + n] for part in wanted]):
                wrong.append((seat, turn))

    threads = [threading.Thread(target=work, args=(seat,)) for seat in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_finds_the_same():
    searcher, queries = built(37), normal(70, 37, seed=8)
    _C.set_num_threads(2)
    wanted = search(searcher, queries, 10, 5, 20)
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = same(search(searcher, queries, 10, 5, 20), wanted)
            good = good and same(search(searcher, queries[:1], 10, 5, 20), [part[:1] for part in wanted])
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", (1, 3))
def test_exclusions_are_what_filtering_would_leave(isa, threads):
    _C.set_num_threads(threads)
    dim, k = 37, 9
    searcher, queries = built(dim), normal(QUERIES, dim, seed=9)
    rng = np.random.default_rng(0)
    for candidates in (60, 2000):
        scores, ids = search(searcher, queries, 40, 6, candidates)
        chosen = np.stack([rng.permutation(row)[:20] for row in ids])
        chosen = np.concatenate([chosen, chosen[:, :5], np.full((QUERIES, 6), -1)], axis=1)
        chosen = np.ascontiguousarray(rng.permuted(chosen, axis=1))
        got_scores, got = search(searcher, queries, k, 6, candidates, chosen)
        for i in range(QUERIES):
            kept = ~np.isin(ids[i], chosen[i])
            np.testing.assert_array_equal(got[i], ids[i][kept][:k])
            np.testing.assert_array_equal(got_scores[i], scores[i][kept][:k])
        for none in (None, np.full((QUERIES, 4), -1), np.empty((QUERIES, 0), np.int64)):
            assert same(search(searcher, queries, k, 6, candidates, none), [scores[:, :k], ids[:, :k]])


def test_as_many_as_are_excluded_are_looked_at_beside_k(isa):
    searcher, query = built(37), normal(1, 37, seed=10)
    _, ids = search(searcher, query, 50, 8, 50)
    _, best = search(searcher, query, 10, 8, 1, ids[:, :40].copy())
    np.testing.assert_array_equal(best, ids[:, 40:])


@pytest.mark.parametrize("threads", (1, 3))
def test_where_too_few_rows_are_found_ids_are_minus_one(isa, threads):
    _C.set_num_threads(threads)
    dim = 37
    searcher, queries = built(dim), normal(QUERIES, dim, seed=11)
    n = plainly(dim).n

    def empty(scores, ids):
        return (ids == -1).all() and np.isneginf(scores).all()

    everything = np.tile(np.arange(n), (QUERIES, 1))
    assert empty(*search(searcher, queries, 5, 8, 40, everything))
    scores, ids = search(searcher, queries, 5, 8, 40, np.ascontiguousarray(everything[:, 2:]))
    assert (np.sort(ids[:, :2]) == [0, 1]).all() and empty(scores[:, 2:], ids[:, 2:])
    for k in (n, n + 7):
        scores, ids = search(searcher, queries, k, 8, 1)  # more than the candidates asked for
        assert (np.sort(ids[:, :n]) == np.arange(n)).all() and empty(scores[:, n:], ids[:, n:])
    scores, ids = search(searcher, queries, n, 1, n)
    for i in range(QUERIES):
        found = (ids[i] >= 0).sum()
        assert found in SIZES and (ids[i, :found] >= 0).all() and empty(scores[i, found:], ids[i, found:])


def test_no_queries_no_results(isa):
    for excluded in (None, np.empty((0, 3), np.int64)):
        scores, ids = search(built(37), np.empty((0, 37), np.float32), 4, 2, 8, excluded)
        assert scores.shape == ids.shape == (0, 4)


@pytest.mark.parametrize("power", (-60, 60))
def test_the_length_of_a_query_scales_the_scores_and_nothing_else(isa, power):
    searcher, queries = built(37), normal(QUERIES, 37, seed=12)
    scores, ids = search(searcher, queries, 10, 3, 20)
    assert same(search(searcher, queries * np.float32(2.0**power), 10, 3, 20), [scores * np.float32(2.0**power), ids])


def test_queries_that_nothing_can_be_said_of_find_rows_all_the_same(isa):
    """All zeros: every row is as near. Not finite, which an Index refuses before: whatever it finds, it is a row."""
    searcher = built(37)
    scores, ids = search(searcher, np.zeros((1, 37), np.float32), 10, 8, 80)
    assert not scores.any() and len(set(ids[0])) == 10 and ids.min() >= 0
    for value in (np.nan, np.inf, 3e38, 1e-45):
        queries = normal(3, 37, seed=13)
        queries[1] = value
        for threads in (1, 3):
            found = search(searcher, queries, 10, 8, 80, threads=threads)
            assert found[1].min() >= -1 and found[1].max() < plainly(37).n
            for i in (0, 2):
                assert same([part[i : i + 1] for part in found], search(searcher, queries[i : i + 1], 10, 8, 80))


def test_recall_is_that_of_float32_lists():
    """On clustered vectors, of the same lists: at most 0.03 of recall@10 go with eight and one bits a component."""
    dim, nlist, k = 64, 32, 10
    rows, _ = crowds(dim, (100,) * 40, seed=20)
    rows += 0.05 * normal(len(rows), dim, seed=21)
    searcher = IvfRabitq.build(Given(rows), nlist, 0)
    plain = Plain(searcher)
    picked = np.random.default_rng(22).permutation(len(rows))[:200]
    queries = rows[picked] + 0.05 * normal(200, dim, seed=23)
    moved, moved_rows = plain.moved(queries), plain.moved(rows)
    flat, centroids = faiss.IndexFlatIP(dim), faiss.IndexFlatIP(dim)
    flat.add(moved_rows)
    centroids.add(plain.centroids.astype(np.float32))
    lists = faiss.IndexIVFFlat(centroids, dim, nlist, faiss.METRIC_INNER_PRODUCT)
    lists.train(moved_rows)
    lists.add(moved_rows)
    _, wanted = flat.search(moved, k)

    def recall(ids):
        return np.mean([np.isin(wanted[i], ids[i]).mean() for i in range(len(queries))])

    for nprobe in (1, 4, 16):
        lists.nprobe = searcher.setting = nprobe
        least = recall(lists.search(moved, k)[1]) - 0.03
        for isa in _C.isas():
            _C.set_isa(isa)
            assert recall(searcher.search(queries, k)[1]) >= least


def hadamard(size):
    """Of 2^k coordinates, lengths kept."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(len(matrix))


@pytest.mark.parametrize("dim", (*range(1, 71), 768))
def test_the_rotation_is_signs_and_hadamard_transforms(isa, dim):
    signs = np.random.default_rng(dim).choice(np.array([-1, 1], np.float32), (_C.ROTATION_ROUNDS, dim))
    rows = normal(6, dim, seed=14)
    size = 1 << (dim.bit_length() - 1)
    plain, matrix = rows.astype(np.float64), hadamard(size)
    for number, sign in enumerate(signs):
        part = slice(dim - size, dim) if number % 2 else slice(0, size)
        plain = plain * sign
        plain[:, part] = plain[:, part] @ matrix
    moved = rotated(rows, signs).astype(np.float64)
    # Every level of a transform rounds a vector by half of eps, and dividing by the root as much as two more.
    off = _C.ROTATION_ROUNDS * (dim.bit_length() + 2) * EPS / 2
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    assert (np.linalg.norm(moved - plain, axis=1) <= off * lengths).all()
    products = rows.astype(np.float64) @ rows.T.astype(np.float64)
    assert (np.abs(moved @ moved.T - products) <= (2 * off + off**2) * np.outer(lengths, lengths)).all()


@pytest.mark.parametrize("dim", (1, 5, 37, 256))
def test_rows_are_coded_by_what_they_differ_from_their_centroid(dim):
    """Its level is the least squares', a row's list the nearest, its bits and factor those of the residual."""
    plain, (rows, _) = plainly(dim), crowds(dim)
    plain.codes(rows)
    moved = plain.moved(rows).astype(np.float64)
    rounding = (dim + 2) * EPS * np.abs(moved).max() * np.abs(plain.centroids).sum(axis=1).max()
    best, square = (moved @ plain.centroids.T).max(axis=1), np.square(plain.centroids).sum(axis=1).mean()
    assert abs(plain.level - best.mean() / square) <= (rounding + 32 * EPS * best.max()) / square
    blocks, sizes = built(dim)._parts["blocks"], built(dim)._parts["sizes"]
    used = np.concatenate([np.arange(-(-n // 32) * 32) < n for n in sizes])
    assert not factors_of(blocks).reshape(-1)[~used].any()  # and nothing where there is no row
    assert not blocks[:, :-4].transpose(0, 2, 1).reshape(len(used), -1)[~used].any()


def test_eight_bits_are_half_a_step_off():
    rows = normal(50, 37, seed=15) * np.float32(10.0) ** np.arange(-10, 40)[:, None].clip(max=30)
    rows[7] = 0
    codes, scales = quantised(rows)
    assert not codes[7].any() and scales[7] == 0 and (np.abs(codes).max(axis=1) == np.where(scales > 0, 127, 0)).all()
    assert (np.abs(rows - codes * scales[:, None]) <= (0.5 + 127 * 2 * EPS) * scales[:, None]).all()


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    rows, _ = crowds(24, (60,) * 8)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    keys = np.stack(np.divmod(np.arange(len(rows)), 10), axis=1).astype(np.int32)
    return Payload.build(tmp_path_factory.mktemp("payload") / "p", rows, keys, encoder="test")


def test_an_index_built_by_any_isa_and_opened_by_any_answers_as_before(isa, payload, tmp_path):
    index = Index.build(payload, "ivf_rabitq", nlist=8, nprobe=3)
    index.save(tmp_path / "index")
    queries, exclude = normal(70, 24, seed=16), np.arange(20)
    for other in _C.isas():
        _C.set_isa(other)
        opened = Index.open(tmp_path / "index", payload)
        for given in (queries, queries[:1]):
            assert same(opened.search(given, 10, exclude), index.search(given, 10, exclude))
        _C.set_isa(isa)
        assert same(opened.search(queries, 10), index.search(queries, 10))


def test_building_twice_gives_the_same_files(payload, tmp_path):
    for name, threads in (("a", 1), ("b", 3)):
        _C.set_num_threads(threads)
        Index.build(payload, "ivf_rabitq", nlist=8, nprobe=3, seed=4).save(tmp_path / name)
    for file in IvfRabitq.FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert Index.open(tmp_path / "a").id == Index.open(tmp_path / "b").id


def test_a_model_and_the_search_in_one_call_find_what_two_calls_find(isa, payload):
    index = Index.build(payload, "ivf_rabitq", nlist=8, nprobe=3)
    weight = normal(24, 24, seed=17)
    model = _C.Model(2, 24, [("last", {}), ("linear", {"weight": (weight, None, None)}), ("l2_norm", {})])
    for n in (0, 1, 70):
        context, predicted = normal(n, 2, 24, seed=18), np.empty((n, 24), np.float32)
        model.run(context, predicted)
        for exclude in (None, np.arange(9), np.random.default_rng(n).integers(-1, 480, (n, 4))):
            wanted = index.search(predicted, 12, exclude)
            for threads in (0, 1, 3):
                assert same(index.predict(model, context, 12, exclude, threads), wanted)
