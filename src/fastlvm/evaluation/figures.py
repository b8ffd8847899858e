"""A report's rows, differences and plots' numbers, from what rankers did on every window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlvm.data import Payload
from fastlvm.evaluation.bootstrap import Bootstrap
from fastlvm.evaluation.metrics import METRICS
from fastlvm.evaluation.outcome import Listed, Outcome
from fastlvm.evaluation.ranks import MISS
from fastlvm.evaluation.report import Difference, Row

CURVE = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""k of a recall curve."""

_POINTS = 500  # of the scatter of truth against impostor, evenly over the windows


def row(one: Outcome, payload: Payload, rows: np.ndarray, articles: np.ndarray, bootstrap: Bootstrap) -> Row:
    """What a report says of one ranker. rows int64 [n, L + 1]: the windows; articles int [n]: those of the targets."""
    reranked = one.kind == "reranked"
    return Row(
        name=one.name,
        kind=one.kind,
        keys=one.keys,
        space=one.space,
        note=one.note,
        domain=one.domain,
        excluded=bootstrap.summarise(one.ranks.excluded, one.cosine),
        included=None if reranked else bootstrap.summarise(one.ranks.included, one.cosine),
        macro=bootstrap.macro(one.ranks.excluded, one.cosine, articles),
        within_article=None if reranked else bootstrap.within_article(one.within),
        ann=None if one.listed is None else _ann(one, one.listed, bootstrap),
        curve={
            "k": list(CURVE),
            "excluded": recall_curve(one.ranks.excluded),
            "included": None if reranked else recall_curve(one.ranks.included),
        },
        histogram=_histogram(one.ranks.excluded),
        impostors=None if one.impostors is None else _impostors(one, payload, rows),
        per_article=[float(value) for value in _means_by(articles, one.ranks.excluded <= 5)],
    )


def differences(outcomes: Sequence[Outcome], bootstrap: Bootstrap) -> list[Difference]:
    """Every model less every baseline, on the same windows and the same resamples."""
    found = []
    for model in (one for one in outcomes if one.kind == "model"):
        for other in (one for one in outcomes if one.kind == "baseline"):
            figures = bootstrap.difference(model.ranks.excluded, model.cosine, other.ranks.excluded, other.cosine)
            found.append(Difference(model.name, other.name, figures))
    return found


def article_figures(payload: Payload, rows: np.ndarray, articles: np.ndarray) -> dict[str, list[Any]]:
    """Number, title and windows of every article with a target, in the order of `per_article`."""
    numbers, first, count = np.unique(articles, return_index=True, return_counts=True)
    titles = [payload.title(int(rows[at, -1])) for at in first]
    return {"number": numbers.tolist(), "title": titles, "windows": count.tolist()}


def recall_curve(ranks: np.ndarray) -> list[float]:
    """Shares of windows of rank k or better, for every k of `CURVE`."""
    return [float(np.mean(ranks <= k)) for k in CURVE]


def _means_by(articles: np.ndarray, hit: np.ndarray) -> np.ndarray:
    _, at, count = np.unique(articles, return_inverse=True, return_counts=True)
    return np.bincount(at, weights=hit) / count


def _ann(one: Outcome, listed: Listed, bootstrap: Bootstrap) -> dict[str, Any]:
    """What the index's list came to, the same less exact search, and whether it finds the target's own vector."""
    found = bootstrap.summarise(listed.rank, one.cosine)
    loss = bootstrap.difference(listed.rank, one.cosine, one.ranks.excluded, one.cosine)
    kept = [name for name in METRICS if name not in ("MRR", "median_rank", "cosine") and _within(name, listed.k)]
    return {
        "index": listed.about,
        "k": listed.k,
        "metrics": {name: found[name] for name in kept},
        "loss": {name: loss[name] for name in kept},
        "target_recall": {f"R@{k}": float(np.mean(listed.target <= k)) for k in (1, 5, 10, 50) if k <= listed.k},
    }


def _within(metric: str, k: int) -> bool:
    """Whether a list of k chunks has what a metric asks for."""
    return k >= {"R@1": 1, "R@5": 5, "R@10": 10, "MRR@10": 10, "Contain@20": 20}.get(metric, 50)


def _histogram(ranks: np.ndarray) -> dict[str, Any]:
    """Windows by rank: 1, 2 to 3, 4 to 7 and so on, by the first rank of each; misses apart."""
    known = ranks[ranks != MISS]
    bins = np.frexp(known.astype(np.float64))[1] - 1  # floor of log2, exact
    counts = np.bincount(bins) if len(bins) else np.zeros(0, np.int64)
    return {
        "from": [2**i for i in range(len(counts))],
        "windows": counts.tolist(),
        "misses": int(len(ranks) - len(known)),
    }


def _impostors(one: Outcome, payload: Payload, rows: np.ndarray) -> dict[str, Any]:
    """Cosine to the truth against that to the best other chunk, and whose that chunk is."""
    assert one.impostors is not None
    found = one.impostors
    there = found.row >= 0
    won = there & (found.score > found.truth_score)
    article = np.asarray(payload.keys)[:, 0]
    same = article[np.maximum(found.row, 0)] == article[rows[:, -1]]
    chosen = np.flatnonzero(there)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(_POINTS, len(chosen))).astype(int))]
    return {
        "won": _share(won),
        "same_article": _share(same[won]),
        "context_row_won": _share(found.context_won),
        "margin": float(np.mean(found.truth_score[there] - found.score[there])) if there.any() else None,
        "truth": [round(float(value), 4) for value in found.truth_score[chosen]],
        "impostor": [round(float(value), 4) for value in found.score[chosen]],
        "same": [bool(value) for value in same[chosen]],
    }


def _share(flags: np.ndarray) -> float | None:
    return float(np.mean(flags)) if len(flags) else None
