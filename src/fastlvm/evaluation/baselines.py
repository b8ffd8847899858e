"""The cheap rankers a model has to beat, fitted on training articles and ranked on the same queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.evaluation.ranker import Pool, Pools, Ranker, predict_all, rank_windows

DECAYS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Recency decays tried: 1 is the mean, near 0 copy-last."""

PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Ridge penalties tried, in units of the mean eigenvalue of the inputs' covariance."""

_FIT_BLOCK = 4096
# Pool rows up to which a candidate is judged on as many windows as asked for. With a quarter of it the decay changed
# with the sample's seed on 24,815 rows, and the mixture was up to 3 % worse in R@5 than it can be.
_FULL_SAMPLE = 60_000
_LEAST_SAMPLE = 200


def fit_baselines(payload: Payload, windows: Windows, space: Space | None = None, *, seed: int = 0) -> list[Ranker]:
    """Every baseline the windows allow to fit, in the order of a report.

    Without training windows only random, copy-last and mean are left. space: the whitening of the "whitened" ones, its
    tower left out; None fits one on the training articles. `fit_decay` gives the mixtures their decay; the ridge
    penalty is the one of best R@5 on a sample of validation windows (training windows where there are none).
    """
    train = windows.rows("train")
    result = [random_rows(payload, seed=seed)]
    if len(train) == 0:
        return [*result, mixture(0.0, name="copy-last"), mixture(1.0, name="mean")]
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
    ]
    return result


def is_identity(space: Space) -> bool:
    """Whether a space only leaves vectors as they are."""
    return space.id == Space.identity(space.dim).id


def random_rows(payload: Payload, *, seed: int = 0) -> Ranker:
    """A random payload row for every query: what chance gives."""
    rng = np.random.default_rng(seed)
    return Ranker("random", lambda context: payload.take(rng.integers(0, len(payload), len(context))), kind="baseline")


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

    return Ranker(name, predict, space, "baseline", note)


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
    return _best(pools, rows, space, candidates, lambda ranks: -float(np.mean(np.log(ranks)))), len(rows)


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
    best = _best(pools, rows, space, candidates, lambda ranks: float(np.mean(ranks <= 5)))
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

    Blocks are multiplied in float32 and summed in float64.
    """
    dim, length = pool.shape[1], windows.shape[1]
    total = np.zeros((length, dim))
    for start in range(0, len(windows), _FIT_BLOCK):
        total += pool[windows[start : start + _FIT_BLOCK]].sum(axis=0, dtype=np.float64)
    mean = (total / len(windows)).astype(np.float32)
    width = (length - 1) * dim
    xx, xy = np.zeros((width, width)), np.zeros((width, dim))
    for start in range(0, len(windows), _FIT_BLOCK):
        vectors = pool[windows[start : start + _FIT_BLOCK]] - mean  # [b, L + 1, d]
        x = vectors[:, :-1].reshape(len(vectors), width)
        xx += x.T @ x
        xy += x.T @ vectors[:, -1]
    return mean[:-1].reshape(-1), xx, xy


def _sample(rows: np.ndarray, pool_rows: int, seed: int, *, most: int) -> np.ndarray:
    """Up to `most` windows, fewer on a large payload, so that one candidate costs about the same everywhere."""
    count = min(len(rows), max(_LEAST_SAMPLE, min(most, most * _FULL_SAMPLE // pool_rows)))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]


def _best(
    pools: Pools,
    rows: np.ndarray,
    space: Space | None,
    candidates: Mapping[float, Ranker],
    score: Callable[[np.ndarray], float],
) -> float:
    """The value whose ranker's ranks on the windows `rows` have the highest score, the first of equals."""
    predictions = [predict_all(ranker, pools.payload, rows[:, :-1]) for ranker in candidates.values()]
    ranks = rank_windows(predictions, pools.of(space), rows, np.asarray(pools.payload.groups))
    scores = [score(found.excluded) for found in ranks]
    return list(candidates)[int(np.argmax(scores))]
