"""What the tests of lists of RaBitQ codes that grow share: a searcher, and numpy in float64 over its rows."""

from __future__ import annotations

import numpy as np
from rabitq_plain import EPS, around, crowds, normal, search

from fastlvm import _C
from fastlvm.retrieval.coding import quantised, rotated

SIZES = (3, 0, 40, 33, 1)  # of the lists to begin with
SMALL = 8  # most rows of a tail
ISAS = tuple(_C.isas())


class Grown:
    """A searcher, and the vectors of the rows that it was given; `gone`: ids of those that were removed."""

    def __init__(self, dim=37, sizes=SIZES):
        rows, centroids = crowds(dim, sizes)
        self.searcher, self.rows, self.gone = around(rows, centroids), rows, set()
        self.searcher.setting = len(sizes)

    def add(self, count, seed=0):
        new = crowds(self.rows.shape[1], SIZES, seed=len(self.rows) + seed)[0][:count]
        assert len(new) == count
        self.searcher.add(new)
        self.rows = np.concatenate([self.rows, new])

    def remove(self, ids):
        self.searcher.remove(np.array(ids, np.int64))
        self.gone |= {int(row) for row in ids}

    @property
    def there(self):
        return np.setdiff1d(np.arange(len(self.rows)), list(self.gone))

    @property
    def sizes(self):
        """Rows that the lists and the tail hold, removed ones among them."""
        state = self.searcher._state
        return int(state.parts["sizes"].sum()), state.filled

    def found(self, queries, threads=1, **options):
        """All of it, of all lists: by id, in the order of ids."""
        k = len(self.rows) + 2
        nprobe = len(self.searcher._parts["sizes"])
        return search(self.searcher, queries, k, nprobe, k, threads=threads, **options)

    def holds(self, isas=ISAS):
        """Every row that is there is found once and no other, scored as float64 would, the best first."""
        queries, there = normal(3, self.rows.shape[1], seed=len(self.rows)), self.there
        signs = self.searcher._parts["signs"]
        codes, scales = quantised(rotated(self.rows, signs))
        moved, decoded = rotated(queries, signs).astype(np.float64), codes * scales.astype(np.float64)[:, None]
        exact = moved @ decoded.T
        bound = (decoded.shape[1] + 2) * EPS * (np.abs(moved) @ np.abs(decoded).T)
        lengths = np.linalg.norm(queries, axis=1)
        for isa in isas:
            _C.set_isa(isa)
            for threads, given in ((1, queries), (3, queries), (3, queries[:1])):
                scores, ids = self.found(given, threads)
                for i in range(len(given)):
                    best = ids[i, : len(there)]
                    np.testing.assert_array_equal(np.sort(best), there)
                    assert (np.abs(scores[i, : len(there)] - exact[i, best]) <= bound[i, best]).all()
                    assert (np.diff(scores[i, : len(there)]) <= 0).all()
                    assert (ids[i, len(there) :] == -1).all() and np.isneginf(scores[i, len(there) :]).all()
                    plain = queries[i].astype(np.float64) @ self.rows[best].T
                    off = np.abs(plain - scores[i, : len(there)]) / lengths[i]
                    assert off.max(initial=0) <= self.searcher.error + 1e-6
