"""Does the order of chunks matter: to the vectors of a payload, read forward and backward, and to what ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.data.rows import normalised
from fastlvm.errors import InputError
from fastlvm.evaluation.baselines import fitted_mixture, fitted_ridge
from fastlvm.evaluation.bootstrap import Bootstrap
from fastlvm.evaluation.findings import OK, Figure, Finding
from fastlvm.evaluation.ranker import Pools, Ranker, predict_all, rank_windows
from fastlvm.evaluation.ranks import checked_predictions, rank_many

ORDERED = 300
"""Windows that are ranked with their context in other orders, each with L + 2 other ones."""

FITTED = 1000
"""Windows on which the mixture gets its decay, ranked once for each candidate."""

DIRECTED = 1000
"""Windows that are ranked forward and backward."""

_DIRECTION_CONTEXT = 2  # chunks: the ridge's matrix grows with the square, and the last two say most


@dataclass(frozen=True)
class Reference:
    """The payload's own windows, split by article, to fit on: whatever the diagnosed file is, these are right."""

    payload: Payload
    windows: Windows

    @classmethod
    def of(cls, payload: Payload, context: int, seed: int) -> Reference | None:
        """None where no article has as many chunks."""
        try:
            return cls(payload, Windows.build(payload, context=context, seed=seed))
        except InputError:
            return None

    def mixture(self, pools: Pools, seed: int) -> Ranker:
        """The whitened recency mixture, fitted on four fifths of the articles."""
        space = Space.fit_articles(self.payload, self.windows.articles("train"))
        return fitted_mixture(pools, _some(self.windows.rows("train"), FITTED, seed), space, seed=seed)


def backward(payload: Payload) -> Payload:
    """The payload with its rows, and the chunks of every article, in reverse: row r is row N - 1 - r."""
    keys = payload.keys.max(axis=0) - payload.keys
    return Payload(payload.path, cast(np.memmap, payload.vectors[::-1]), keys[::-1], payload.provenance)


def direction(payload: Payload, context: int, seed: int) -> list[Finding]:
    """Is the next chunk easier to find than the one before? A ridge fitted forward, and one on articles read backward.

    Both are ranked on the same windows, so the interval of the difference is a paired one. That a prediction is nearer
    to the last chunk than to the next is no test: every average of a context is.
    """
    context = min(context, _DIRECTION_CONTEXT)
    reference = Reference.of(payload, context, seed)
    if reference is None or not len(reference.windows.rows("test")):
        what = "the payload has too few articles with a window to fit on some and rank on others"
        return [Finding("direction-not-measured", OK, f"direction was not measured: {what}", {})]
    train, validation, test = (reference.windows.rows(split) for split in Windows.splits)
    judged = validation if len(validation) else train
    test = _some(test, DIRECTED, seed)
    ranks = []
    for read, table in ((1, payload), (-1, backward(payload))):
        seen = [rows if read == 1 else len(payload) - 1 - rows[:, ::-1] for rows in (train, judged, test)]
        pools = Pools(table)
        ridge = fitted_ridge(pools, seen[0], seen[1], None, seed=seed)
        predictions = predict_all(ridge, table, seen[2])
        ranks.append(rank_windows([predictions], pools.of(None), seen[2], np.asarray(table.groups))[0].excluded)
    forward, reverse = (float((found <= 5).mean()) for found in ranks)
    articles = payload.keys[test[:, -1], 0]
    none = np.zeros(len(test))
    found = Bootstrap(articles, seed=seed).difference(ranks[0], none, ranks[1], none)["R@5"]
    figures: dict[str, Figure] = {
        "forward_r5": forward,
        "backward_r5": reverse,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "windows": len(test),
        "articles": len(np.unique(articles)),
    }
    if found.low is None or found.high is None:
        said, interval = "of a single article there is no interval", ""
    else:
        interval = f" [{found.low:+.3f}, {found.high:+.3f}]"
        said = "no direction shows"
        if found.low > 0 or found.high < 0:
            said = f"{'forward' if forward > reverse else 'backward'} is easier"
    sentence = (
        f"{said}: a ridge has R@5 {forward:.3f} on articles as they are and {reverse:.3f} on articles read backward, "
        f"difference {forward - reverse:+.3f}{interval} ({len(test)} windows)"
    )
    return [Finding("direction", OK, sentence, figures)]


def order_sensitivity(ranker: Ranker, pools: Pools, rows: np.ndarray, seed: int) -> Finding:
    """R@5 with the context shuffled, reversed, and each position in turn replaced by the mean of the others.

    rows int64 [n, L + 1], n ≥ 1.
    """
    rng = np.random.default_rng(seed)
    rows = _some(rows, ORDERED, seed)
    context = pools.payload.take(rows[:, :-1])  # [n, L, dim]
    n, length, _ = context.shape
    variants = {"as_is": context}
    if length > 1:
        places = np.argsort(rng.random((n, length)), axis=1)
        variants |= {"shuffled": np.take_along_axis(context, places[..., None], axis=1), "reversed": context[:, ::-1]}
        variants |= {f"without_{k - length}": _without(context, k) for k in range(length)}
    groups = np.asarray(pools.payload.groups)
    predictions = [
        checked_predictions(
            ranker.predict(np.ascontiguousarray(variant)), (n, pools.payload.dim), f"prediction of {ranker.name}"
        )
        for variant in variants.values()
    ]
    ranks = rank_many(predictions, pools.of(ranker.space), rows[:, -1], rows[:, :-1], groups)
    r5 = {name: float((found.excluded <= 5).mean()) for name, found in zip(variants, ranks, strict=True)}
    return _sensitivity(ranker.name, r5, n, length)


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def _without(context: np.ndarray, k: int) -> np.ndarray:
    changed = context.copy()
    changed[:, k] = normalised(np.delete(context, k, axis=1).mean(axis=1))
    return changed


def _sensitivity(name: str, r5: dict[str, float], windows: int, length: int) -> Finding:
    figures: dict[str, Figure] = {"windows": windows, **{f"r5_{variant}": value for variant, value in r5.items()}}
    if length == 1:
        return Finding("context-order", OK, f"{name}: a context of one chunk has no order", figures)
    most = max(range(-length, 0), key=lambda k: abs(r5["as_is"] - r5[f"without_{k}"]))
    sentence = (
        f"{name}: R@5 {r5['as_is']:.3f}, with the context shuffled {r5['shuffled']:.3f}, reversed "
        f"{r5['reversed']:.3f}; position {most} matters most, {r5[f'without_{most}']:.3f} without it "
        f"({windows} windows)"
    )
    return Finding("context-order", OK, sentence, figures)
