"""Bootstrap intervals of metrics: the windows of one article share vectors and topic, so *articles* are resampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlvm.errors import InputError
from fastlvm.evaluation.metrics import MEANS, METRICS, WITHIN, outcomes, within_outcomes
from fastlvm.evaluation.ranks import MISS


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval. None: undefined (0/0), unbounded (a median at `MISS`), or fewer than two articles."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, raw: Mapping[str, float | None]) -> Estimate:
        """Raises KeyError and TypeError for what `to_dict` does not give."""
        figures = raw["value"], raw["low"], raw["high"]
        if any(not (figure is None or isinstance(figure, (int, float))) for figure in figures):
            raise TypeError(f"{figures} is no estimate")
        return cls(*figures)


class Bootstrap:
    """Resamples whole clusters (articles) with replacement, the same draws for every ranker: paired by construction.

    clusters int [n] names the article of each window. Percentile intervals; with fewer than about 20 articles they are
    somewhat too narrow, with fewer than two there is none.
    """

    def __init__(self, clusters: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> None:
        clusters = np.asarray(clusters)
        if clusters.ndim != 1 or len(clusters) == 0:
            raise InputError(f"clusters has shape {clusters.shape}, and one article per window [n], n ≥ 1, is wanted")
        if resamples < 1 or not 0 < level < 1:
            raise InputError(f"resamples is {resamples} and level {level}: wanted are resamples ≥ 1 and 0 < level < 1")
        self.names, self.of_window = np.unique(clusters, return_inverse=True)
        count = len(self.names)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)  # [B, A]
        self.resamples, self.seed, self.level = resamples, seed, level

    def summarise(self, ranks: np.ndarray, cosine: np.ndarray) -> dict[str, Estimate]:
        """Every metric of `METRICS` with its interval."""
        result = self._summary(*self._means(outcomes(ranks, cosine)))
        result["median_rank"] = self._median(ranks)
        return {name: result[name] for name in METRICS}

    def macro(self, ranks: np.ndarray, cosine: np.ndarray, articles: np.ndarray) -> dict[str, Estimate]:
        """The mean over articles of each one's own mean, for all metrics but the median rank; articles int [n]."""
        _, article, windows = np.unique(articles, return_inverse=True, return_counts=True)
        return self._summary(*self._means(outcomes(ranks, cosine), 1.0 / windows[article]))

    def within_article(self, ranks: np.ndarray) -> dict[str, Estimate]:
        """Every metric of `WITHIN` with its interval; ranks are those among the chunks of the truth's own article."""
        values, draws = self._means(within_outcomes(ranks))
        return {name: self._estimate(values[i], draws[:, i]) for i, name in enumerate(WITHIN)}

    def _summary(self, values: np.ndarray, draws: np.ndarray) -> dict[str, Estimate]:
        result = {name: self._estimate(values[i], draws[:, i]) for i, name in enumerate(MEANS)}
        result["Eff@5"] = self._estimate(*_efficiency(values, draws))
        return {name: result[name] for name in METRICS if name in result}

    def difference(
        self, ranks: np.ndarray, cosine: np.ndarray, other_ranks: np.ndarray, other_cosine: np.ndarray
    ) -> dict[str, Estimate]:
        """This ranker minus the other, on the same windows and the same draws, for all metrics but the median rank."""
        values, draws = self._means(outcomes(ranks, cosine))
        other_values, other_draws = self._means(outcomes(other_ranks, other_cosine))
        result = {
            name: self._estimate(values[i] - other_values[i], draws[:, i] - other_draws[:, i])
            for i, name in enumerate(MEANS)
        }
        value, draw = _efficiency(values, draws)
        other_value, other_draw = _efficiency(other_values, other_draws)
        result["Eff@5"] = self._estimate(value - other_value, draw - other_draw)
        return {name: result[name] for name in METRICS if name in result}

    def _means(self, outcome: np.ndarray, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Means over windows [m], weighted [n] where weights are given, and the same in every resample [B, m]."""
        if len(outcome) != len(self.of_window):
            raise InputError(f"{len(outcome)} windows were ranked, and the clusters name {len(self.of_window)}")
        weighted = outcome if weight is None else outcome * weight[:, None]
        sums = np.stack([np.bincount(self.of_window, weights=column) for column in weighted.T], axis=1)  # [A, m]
        windows = np.bincount(self.of_window, weights=weight).astype(np.float64)
        return sums.sum(axis=0) / windows.sum(), (self.weights @ sums) / (self.weights @ windows)[:, None]

    def _estimate(self, value: float, draws: np.ndarray) -> Estimate:
        known = draws[np.isfinite(draws)]
        if len(self.names) < 2 or len(known) == 0 or not math.isfinite(value):
            return Estimate(_finite(value))
        tail = (1 - self.level) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return Estimate(float(value), float(low), float(high))

    def _median(self, ranks: np.ndarray) -> Estimate:
        """The smallest rank at or below which half the windows lie, so that `MISS` can be counted among them."""
        ranks = np.asarray(ranks)
        order = np.argsort(ranks, kind="stable")
        ordered, cluster = ranks[order], self.of_window[order]
        value = _rank_or_none(ordered[(len(ordered) - 1) // 2])
        if len(self.names) < 2:
            return Estimate(value)
        draws = np.empty(self.resamples, np.int64)
        step = max(1, 8_000_000 // len(ordered))
        for start in range(0, self.resamples, step):
            total = np.cumsum(self.weights[start : start + step][:, cluster], axis=1)
            draws[start : start + step] = ordered[np.argmax(2 * total >= total[:, -1:], axis=1)]
        draws.sort()
        tail = (1 - self.level) / 2
        last = self.resamples - 1
        low, high = draws[int(tail * last)], draws[math.ceil((1 - tail) * last)]
        return Estimate(value, _rank_or_none(low), _rank_or_none(high))


def _efficiency(values: np.ndarray, draws: np.ndarray) -> tuple[float, np.ndarray]:
    """Eff@5 = R@5 / Contain@50, NaN where nothing is contained."""
    five, contain = MEANS.index("R@5"), MEANS.index("Contain@50")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.divide(values[five], values[contain])), draws[:, five] / draws[:, contain]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rank_or_none(rank: Any) -> float | None:
    return None if int(rank) == MISS else float(rank)
