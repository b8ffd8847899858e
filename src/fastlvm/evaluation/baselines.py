"""The cheap rankers a model has to beat, fitted on training articles and ranked on the same queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.evaluation.ranker import Pool, Pools, Ranker, predict_all, rank_windows

DECAYS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Recency decays tried: 1 is the mean, near 0 copy-last."""

PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Ridge penalties tried, in units of the mean eigenvalue of the inputs' covariance."""

NAMES = (
    *("random", "global mean", "copy-last", "mean", "recency mixture", "ridge"),
    *("whitened copy-last", "whitened mixture", "whitened ridge", "target as query", "next by key"),
)
"""Names of all rankers that `fit_baselines` gives."""

_FIT_BLOCK = 16384
# A row that several queries ask for is scored once, so that chance costs little.
_DRAWN = 256
# Pool rows up to which a candidate is judged on as many windows as asked for. With a quarter of it the decay changed
# with the sample's seed on 24,815 rows, and the mixture was up to 3 % worse in R@5 than it can be.
_FULL_SAMPLE = 60_000
# Pool rows above which a candidate is judged among a draw of this many.
_WHOLE = 100_000


def fit_baselines(payload: Payload, windows: Windows, space: Space | None = None, *, seed: int = 0) -> list[Ranker]:
    """Every baseline the windows allow to fit, and the two oracles, in the order of a report.

    Without training windows only random, copy-last, mean and the oracles are left. space: the whitening of the
    "whitened" ones, its tower left out; None fits one on the training articles. `fit_decay` gives the mixtures their
    decay; the ridge penalty is the one of best R@5 on a sample of validation windows (training windows where there are
    none).
    """
    train = windows.rows("train")
    oracles = [target_as_query(payload), next_by_key(payload)]
    result = [random_rows(payload, seed=seed)]
    if len(train) == 0:
        return [*result, mixture(0.0, name="copy-last"), mixture(1.0, name="mean"), *oracles]
    space = None if space is None else space.base
    if space is None or is_identity(space):
        space = Space.fit_articles(payload, windows.articles("train"))
    validation = windows.rows("validation")
    judged = validation if len(validation) else train
    pools = Pools(payload)
    result += [
        global_mean(payload, windows),
        mixture(0.0, name="copy-last"),
        mixture(1.0, name="mean"),
        fitted_mixture(pools, train, None, seed=seed),
        fitted_ridge(pools, train, judged, None, seed=seed),
        mixture(0.0, space, name="whitened copy-last"),
        fitted_mixture(pools, train, space, seed=seed),
        fitted_ridge(pools, train, judged, space, seed=seed),
        *oracles,
    ]
    return result


def is_identity(space: Space) -> bool:
    """Whether a space only leaves vectors as they are."""
    return space.id == Space.identity(space.dim).id


def random_rows(payload: Payload, *, seed: int = 0) -> Ranker:
    """A random payload row for every query, one of `_DRAWN`: what chance gives."""
    drawn = np.random.default_rng(seed).integers(0, len(payload), _DRAWN)
    return _of_rows(payload, "random", lambda rows: drawn[rows[:, -2] % _DRAWN], kind="baseline")


def target_as_query(payload: Payload) -> Ranker:
    """The target's own vector: what a perfect prediction gives."""
    return _of_rows(payload, "target as query", lambda rows: rows[:, -1], kind="oracle")


def next_by_key(payload: Payload) -> Ranker:
    """The chunk whose key follows the last one's, that one itself where there is none: no vectors are looked at."""

    def following(rows: np.ndarray) -> np.ndarray:
        found = payload.rows_of(payload.keys[rows[:, -2]] + np.array([0, 1]))
        return np.where(found >= 0, found, rows[:, -2])

    return _of_rows(payload, "next by key", following, kind="oracle", keys=True)


def _of_rows(payload: Payload, name: str, of: Callable[[np.ndarray], np.ndarray], **options: Any) -> Ranker:
    """Predicts the payload row that `of` gives for each window's rows."""
    one = np.ones(1, np.float32)
    return Ranker(
        name,
        lambda rows: payload.take(of(rows)),
        by_rows=True,
        combine=lambda rows: (of(rows)[:, None], one),
        **options,
    )


def global_mean(payload: Payload, windows: Windows) -> Ranker:
    """The mean of the training articles' vectors, the same for every query."""
    articles = windows.articles("train")
    total, count = np.zeros(payload.dim), 0
    for start in range(0, len(payload), _FIT_BLOCK):
        rows = np.arange(start, min(start + _FIT_BLOCK, len(payload)))
        rows = rows[np.isin(np.asarray(payload.keys[rows, 0]), articles)]
        total += payload.take(rows).sum(axis=0, dtype=np.float64)
        count += len(rows)
    mean = (total / count).astype(np.float32)
    return Ranker("global mean", lambda context: np.repeat(mean[None], len(context), axis=0), kind="baseline")


def recency_weights(decay: float, length: int) -> np.ndarray:
    """decay**age, oldest first, summing to 1; decay 0 is the last position alone. float32 [length]"""
    weights = np.power(float(decay), np.arange(length - 1, -1, -1))
    return (weights / weights.sum()).astype(np.float32)


def mixture(decay: float, space: Space | None = None, *, name: str, note: str = "") -> Ranker:
    """The context's vectors in the space, weighted by decay**age."""

    def predict(context: np.ndarray) -> np.ndarray:
        weights = recency_weights(decay, context.shape[1])
        if decay == 0.0:
            context = context[:, -1:]
            weights = weights[-1:]
        vectors = context if space is None else space.apply(context)
        return np.einsum("nld,l->nd", vectors, weights)

    def combine(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = rows.shape[1] - 2 if decay == 0.0 else 0
        return rows[:, first:-1], recency_weights(decay, rows.shape[1] - 1)[first:]

    return Ranker(name, predict, space, "baseline", note, combine=combine)


def fit_decay(payload: Payload, train: np.ndarray, space: Space | None = None, *, seed: int = 0) -> float:
    """The decay among `DECAYS` with the lowest mean log rank of the target on a sample of training windows [n, L + 1].

    Ranks are over the whole payload in the space, context excluded. The log rank is judged because it varies less from
    sample to sample than R@5 or the reciprocal rank, whose maximum is flat.
    """
    return _fit_decay(Pools(payload), train, space, seed)[0]


def fitted_mixture(pools: Pools, train: np.ndarray, space: Space | None, *, seed: int) -> Ranker:
    """`mixture` with the decay `fit_decay` finds."""
    decay, count = _fit_decay(pools, train, space, seed)
    name = "recency mixture" if space is None else "whitened mixture"
    return mixture(decay, space, name=name, note=f"decay {decay:g}, chosen on {count} training windows")


def _fit_decay(pools: Pools, train: np.ndarray, space: Space | None, seed: int) -> tuple[float, int]:
    rows = _sample(train, len(pools.payload), seed, most=4000)
    candidates = {decay: mixture(decay, space, name="candidate") for decay in DECAYS}
    return _best(pools, rows, space, candidates, lambda ranks: -float(np.mean(np.log(ranks))), seed), len(rows)


def fitted_ridge(pools: Pools, train: np.ndarray, judged: np.ndarray, space: Space | None, *, seed: int) -> Ranker:
    """Ridge regression from the context [L·d] to the next vector [d], in the space, in closed form.

    W = (XᵀX + λ s I)⁻¹ XᵀY over the training windows, X and Y less their means, s the mean eigenvalue of XᵀX. The
    prediction is the deviation from the mean alone: with the mean added every query leans towards the same hub, and a
    ridge retrieves far worse than it can. λ is the one of best R@5 on a sample of the windows `judged`.
    """
    mean, xx, xy = _moments(pools.of(space), train)
    scale = float(np.trace(xx)) / len(xx)
    rows = _sample(judged, len(pools.payload), seed, most=1000)
    diagonal = np.diag_indices(len(xx))
    maps: dict[float, np.ndarray] = {}
    added = 0.0
    for penalty in PENALTIES:
        xx[diagonal] += penalty * scale - added
        added = penalty * scale
        maps[penalty] = np.linalg.solve(xx.astype(np.float32), xy.astype(np.float32))
    del xx, xy
    candidates = {penalty: _linear(maps[penalty], mean, space, "candidate") for penalty in PENALTIES}
    best = _best(pools, rows, space, candidates, lambda ranks: float(np.mean(ranks <= 5)), seed)
    where = "training" if judged is train else "validation"
    note = f"λ {best:g}, chosen on {len(rows)} {where} windows"
    return _linear(maps[best], mean, space, "ridge" if space is None else "whitened ridge", note)


def _linear(weights: np.ndarray, mean: np.ndarray, space: Space | None, name: str, note: str = "") -> Ranker:
    """The context's vectors in the space, side by side, less mean [L·d], times weights [L·d, d]."""

    def predict(context: np.ndarray) -> np.ndarray:
        vectors = context if space is None else space.apply(context)
        return (vectors.reshape(len(vectors), -1) - mean) @ weights

    return Ranker(name, predict, space, "baseline", note)


def _moments(pool: Pool, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the inputs [L·d], and XᵀX [L·d, L·d] and XᵀY [L·d, d] of the centred windows [n, L + 1].

    A window is a run of rows, so the block of positions (i, j) is Σ m(t - i) v(t) v(t + j - i)ᵀ, with m(s) the windows
    that start at row s, and (i + 1, j + 1) differs from it only where m changes, at the ends of runs of windows: one
    product a lag, and small corrections, instead of one for every two positions. Blocks are multiplied in float32,
    less about the mean, and summed in float64.
    """
    dim, length = pool.shape[1], windows.shape[1]
    starts, count = np.unique(windows[:, 0], return_counts=True)
    centre = pool[starts[:_FIT_BLOCK]].mean(axis=0, dtype=np.float64).astype(np.float32)
    blocks = np.zeros((length, length, dim, dim))
    products, rest = _products(pool, starts, count, length, centre)
    rest /= len(windows)  # means of the positions, less the centre
    for i in range(length):
        if i:
            change = _products(pool, *_change(starts, count, i), length - i, centre)[0]
            products = products[: length - i] + change
        for j in range(i, length):
            blocks[i, j] = products[j - i] - len(windows) * np.outer(rest[i], rest[j])
            blocks[j, i] = blocks[i, j].T
    width = (length - 1) * dim
    xx = blocks[:-1, :-1].transpose(0, 2, 1, 3).reshape(width, width)
    mean = (rest + centre).astype(np.float32)
    return mean[:-1].reshape(-1), xx, blocks[:-1, -1].reshape(width, dim)


def _change(starts: np.ndarray, count: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows t and m(t - i) - m(t - i + 1) where that is not 0."""
    rows, inverse = np.unique(np.concatenate([starts + i, starts + i - 1]), return_inverse=True)
    change = np.bincount(inverse, weights=np.concatenate([count, -count]))
    return rows[change != 0], change[change != 0]


def _products(
    pool: Pool, rows: np.ndarray, weight: np.ndarray, lags: int, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Σ weight v(t) v(t + lag)ᵀ and Σ weight v(t + lag) over `rows` t for every lag below `lags`, vectors less
    `centre`: float64 [lags, d, d] and [lags, d].
    """
    products, sums = np.zeros((lags, len(centre), len(centre))), np.zeros((lags, len(centre)))
    for start in range(0, len(rows), _FIT_BLOCK):
        part = rows[start : start + _FIT_BLOCK]
        by = weight[start : start + _FIT_BLOCK].astype(np.float32)
        read = np.unique(part[:, None] + np.arange(lags))
        vectors = pool[read]
        vectors -= centre
        at = np.searchsorted(read, part)  # t + lag is always read, so it stands `lag` places further
        left = (vectors[at] * by[:, None]).T
        for lag in range(lags):
            right = vectors[at + lag]
            products[lag] += left @ right
            sums[lag] += by @ right
    return products, sums


def _sample(rows: np.ndarray, pool_rows: int, seed: int, *, most: int) -> np.ndarray:
    """Up to `most` windows, fewer on a large payload, so that one candidate costs about the same everywhere."""
    count = min(len(rows), max(most // 5, most * _FULL_SAMPLE // max(_FULL_SAMPLE, pool_rows)))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]


def _best(
    pools: Pools,
    rows: np.ndarray,
    space: Space | None,
    candidates: Mapping[float, Ranker],
    score: Callable[[np.ndarray], float],
    seed: int,
) -> float:
    """The value whose ranker's ranks on the windows `rows` have the highest score, the first of equals.

    On a payload of more than `_WHOLE` rows ranks are among a draw of them, with the windows' own: a candidate's place
    among the others does not depend on how many there are.
    """
    predictions = [predict_all(ranker, pools.payload, rows) for ranker in candidates.values()]
    pool, groups = pools.of(space), np.asarray(pools.payload.groups)
    if len(pool) > _WHOLE:
        drawn = np.random.default_rng(seed).choice(len(pool), _WHOLE, replace=False)
        kept = np.union1d(drawn, rows)
        _, first, group = np.unique(groups[kept], return_index=True, return_inverse=True)
        ranks = rank_windows(predictions, pool[kept], np.searchsorted(kept, rows), first[group].astype(np.int64))
    else:
        ranks = rank_windows(predictions, pool, rows, groups)
    scores = [score(found.excluded) for found in ranks]
    return list(candidates)[int(np.argmax(scores))]
