"""Evaluate rankers on a split: ranks over the whole payload, one pass of it a space, and what a report says of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.data.alignment import Alignment
from fastlvm.data.provenance import version
from fastlvm.data.split import ALIASES
from fastlvm.errors import InputError
from fastlvm.evaluation import baselines as baseline
from fastlvm.evaluation.bootstrap import Bootstrap
from fastlvm.evaluation.figures import article_figures, differences, row
from fastlvm.evaluation.impostors import rank_with_impostors
from fastlvm.evaluation.outcome import Listed, Outcome, Store
from fastlvm.evaluation.ranker import Listing, Pool, Pools, Ranker, predict_all, queries, rank_windows, space_key
from fastlvm.evaluation.ranks import MISS, Ranks, cosines, ranks_within
from fastlvm.evaluation.report import HEADLINE, Report
from fastlvm.evaluation.suspects import model_findings

_LISTING_BLOCK = 1024

Say = Callable[[str], None]
Step = Callable[[float], None]


def evaluate(
    models: Sequence[Ranker],
    payload: Payload,
    windows: Windows,
    *,
    split: str = "test",
    space: Space | None = None,
    baselines: bool = True,
    name: str | None = None,
    clusters: np.ndarray | None = None,
    limit: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    outcomes: Path | None = None,
    progress: Say | None = None,
    step: Step | None = None,
) -> Report:
    """Rank the target of every window of a split over the whole payload, for the models and the baselines.

    The integrity gate `windows.verify(payload)` runs first. models: see `Ranker`. space: whitening of the whitened
    baselines; None takes the first model's, or fits one on the training articles. name: how the report calls the
    payload; None takes its folder's. clusters int [windows of the split]: what is resampled; None takes the windows'
    own groups where they have some, else articles. limit: rank a seeded sample of this many windows. outcomes: a folder
    that keeps what each model and the baselines came to; what it has already is not done again. progress is called
    with what is about to be done, step with the share of it that is done.

    Raises IntegrityError where the windows are not of this payload, InputError for an empty split or bad predictions.
    """
    say = progress or (lambda _: None)
    _check_asked(models, baselines, seed)
    split = ALIASES.get(split, split)
    alignment = check_windows(payload, windows, split)
    chosen = _chosen(windows, split, clusters, limit, seed)
    space = space or _space_of(models)
    work = _Work(payload, chosen.rows, chosen.units, say, step or (lambda _: None), unseen=split != "train")
    store = Store(outcomes, _about(payload, windows, split, chosen, limit, seed))
    found: list[Outcome] = []
    for model in models:
        found += _kept(store, model.identity and f"{model.name} {model.identity}", functools.partial(work.model, model))
    if baselines:
        base = None if space is None else space.base.id
        found += _kept(store, f"baselines {base}", lambda: work.baselines(windows, space, seed))
    say(f"resampling {chosen.unit}s")
    bootstrap = Bootstrap(chosen.units, resamples=resamples, seed=seed)
    of_windows = {"id": windows.id, "split": split, "context": int(windows.context), "unanswerable": work.unanswerable}
    return _report(payload, name, of_windows, alignment, chosen, bootstrap, found)


def check_windows(payload: Payload, windows: Windows, split: str) -> Alignment:
    """What `windows.verify(payload)` finds. Raises IntegrityError as it does, InputError for an empty split."""
    alignment = windows.verify(payload)
    if len(windows.rows(split)) == 0:
        which = "the windows" if windows.path is None else f"windows {windows.path}"
        raise InputError(f"{which} have none in split {split!r}: build them with a fraction for it")
    return alignment


def _kept(store: Store, identity: str, make: Callable[[], list[Outcome]]) -> list[Outcome]:
    """What a store has for `identity`, or what `make` gives, which it has from then on. "" is never kept."""
    found = store.get(identity) if identity else None
    if found is None:
        found = make()
        if identity:
            store.put(identity, found)
    return found


class _Work:
    """Ranks the targets of windows [n, L + 1] of a payload; units [n] are what is resampled."""

    def __init__(
        self, payload: Payload, rows: np.ndarray, units: np.ndarray, say: Say, step: Step, *, unseen: bool
    ) -> None:
        self._payload, self._rows, self._units, self._say, self._step = payload, rows, units, say, step
        self._unseen = unseen
        self._groups = np.asarray(payload.groups)
        repeats = self._groups[rows[:, :-1]] == self._groups[rows[:, -1:]]
        self.unanswerable = int(np.count_nonzero(repeats.any(axis=1)))
        keys = np.asarray(payload.keys)[:, 0]
        wanted = keys[rows[:, -1]]
        spans = [np.searchsorted(keys, wanted, side=side) for side in ("left", "right")]
        self._spans = np.stack(spans, axis=1)

    def baselines(self, windows: Windows, space: Space | None, seed: int) -> list[Outcome]:
        self._say("fitting the baselines")
        rankers = baseline.fit_baselines(self._payload, windows, space, seed=seed)
        found: dict[str, Outcome] = {}
        pools = Pools(self._payload)
        for key in dict.fromkeys(_space_name(ranker) for ranker in rankers):
            together = [ranker for ranker in rankers if _space_name(ranker) == key]
            predictions = [predict_all(ranker, self._payload, self._rows) for ranker in together]
            found |= {one.name: one for one in self._rank(together, predictions, pools.of(together[0].space))}
        return [found[ranker.name] for ranker in rankers]

    def model(self, ranker: Ranker) -> list[Outcome]:
        """The model, and after it one outcome for every order that its index's list is put in."""
        predictions = predict_all(ranker, self._payload, self._rows)
        directions = predictions / np.linalg.norm(predictions, axis=1)[:, None]  # their scores are cosines
        pool = Pool(self._payload, ranker.space)
        if _space_name(ranker) == "raw":
            pool = Pool(self._payload)
        self._say(f"ranking {ranker.name}")
        ranks, impostors = rank_with_impostors(
            directions, pool, self._rows[:, -1], self._rows[:, :-1], self._groups, self._advance(len(pool))
        )
        truth, last = pool[self._rows[:, -1]], pool[self._rows[:, -2]]
        findings = model_findings(ranker.name, predictions, last, truth, unseen=self._unseen)
        outcome = replace(
            self._outcomes([ranker], [predictions], pool, [ranks])[0],
            impostors=impostors,
            findings=tuple(one.to_dict() for one in findings if one.level != "ok"),
        )
        listed = [(listing, self._list(ranker, listing, predictions, truth)) for listing in ranker.listings]
        reranked = [self._reranked(outcome, *pair) for pair in listed if pair[0].label]
        own = next((found for listing, found in listed if not listing.label), None)
        return [replace(outcome, listed=own), *reranked]

    def _advance(self, rows: int) -> Callable[[int], None]:
        """Counts rows of a pool of so many."""
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            self._step(done / rows)

        return advance

    def _rank(self, rankers: Sequence[Ranker], predictions: list[np.ndarray], pool: Pool) -> list[Outcome]:
        self._say(f"ranking {', '.join(ranker.name for ranker in rankers)}")
        asked = [queries(ranker, p, self._rows) for ranker, p in zip(rankers, predictions, strict=True)]
        ranks = rank_windows(asked, pool, self._rows, self._groups, self._advance(len(pool)))
        return self._outcomes(rankers, predictions, pool, ranks)

    def _outcomes(
        self, rankers: Sequence[Ranker], predictions: list[np.ndarray], pool: Pool, ranks: Sequence[Ranks]
    ) -> list[Outcome]:
        within = ranks_within(predictions, pool, self._rows, self._spans, self._groups)
        return [
            Outcome(
                name=ranker.name,
                kind=ranker.kind,
                keys=ranker.keys,
                space=_space_name(ranker),
                note=ranker.note,
                domain=ranker.domain,
                ranks=own,
                within=inside,
                cosine=cosines(p, pool, self._rows[:, -1]),
                units=self._units,
            )
            for ranker, p, own, inside in zip(rankers, predictions, ranks, within, strict=True)
        ]

    def _list(self, ranker: Ranker, listing: Listing, predictions: np.ndarray, truth: np.ndarray) -> Listed:
        self._say(f"searching for {ranker.name}{f' + {listing.label}' if listing.label else ''}")
        rank, target = (np.full(len(self._rows), MISS, np.int64) for _ in range(2))
        group = self._groups[self._rows[:, -1]]
        for start in range(0, len(self._rows), _LISTING_BLOCK):
            part = slice(start, start + _LISTING_BLOCK)
            context = self._payload.take(self._rows[part, :-1])
            rank[part] = self._place(listing.search(context, predictions[part], self._rows[part, :-1]), group[part])
            target[part] = self._place(listing.target(truth[part]), group[part])
        return Listed(listing.about, listing.k, rank, target)

    def _place(self, ids: np.ndarray, group: np.ndarray) -> np.ndarray:
        """1 + the first place of each group [n] among the rows `ids` [n, k]; `MISS` where it is not there.

        An index may have rows that were added to the payload's: these are of no group.
        """
        known = (ids >= 0) & (ids < len(self._groups))
        hit = known & (self._groups[np.where(known, ids, 0)] == group[:, None])
        return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, MISS)

    @staticmethod
    def _reranked(outcome: Outcome, listing: Listing, listed: Listed) -> Outcome:
        """An outcome of its own: a truth that is not among the k listed is a miss."""
        return replace(
            outcome,
            name=_reranked_name(outcome.name, listing),
            kind="reranked",
            keys=listing.keys,
            note=f"order of the {listing.k} chunks that {listing.about} lists; others are misses",
            ranks=Ranks(listed.rank, listed.rank),
            impostors=None,
            findings=(),
        )


@dataclass(frozen=True)
class _Chosen:
    """The windows to rank: rows int64 [n, L + 1], the articles of their targets int [n], what is resampled int [n] and
    its name, and how many windows the split has.
    """

    rows: np.ndarray
    articles: np.ndarray
    units: np.ndarray
    unit: str
    total: int

    def digest(self) -> str:
        """Of which windows are resampled together."""
        return hashlib.sha256(np.unique(self.units, return_inverse=True)[1].tobytes()).hexdigest()


def _chosen(windows: Windows, split: str, clusters: np.ndarray | None, limit: int | None, seed: int) -> _Chosen:
    """All windows of a split, or a seeded sample of `limit`."""
    rows, articles = windows.rows(split), windows.keys(split)[:, 0]
    units, unit = articles, "article"
    if clusters is not None:
        units, unit = np.asarray(clusters), "given clusters"
    elif (own := windows.groups(split)) is not None:
        units, unit = own, "group"
    if len(units) != len(rows):
        raise InputError(f"clusters names {len(units)} windows, and the split has {len(rows)}")
    whole = _Chosen(rows, articles, units, unit, len(rows))
    if limit is None or limit >= len(rows):
        return whole
    if limit < 1:
        raise InputError(f"limit is {limit}, and at least 1 window is wanted")
    some = np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False))
    return replace(whole, rows=rows[some], articles=articles[some], units=units[some])


def _check_asked(models: Sequence[Ranker], baselines: bool, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}, and a whole number of at least 0 is wanted")
    if not models and not baselines:
        raise InputError("there is nothing to evaluate: give a model, or leave the baselines on")
    names = list(baseline.NAMES) if baselines else []
    for model in models:
        names += [model.name, *(_reranked_name(model.name, listing) for listing in model.listings if listing.label)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two rankers are named {name!r}: name each model, and none like a baseline")


def _reranked_name(model: str, listing: Listing) -> str:
    return f"{model} + {listing.label}"


def _space_of(models: Sequence[Ranker]) -> Space | None:
    """The first model's space that is no identity, of models made from this payload where there are some."""
    spaces = [model.space for model in sorted(models, key=lambda model: model.domain != "in")]
    return next((space for space in spaces if space is not None and not baseline.is_identity(space)), None)


def _about(
    payload: Payload, windows: Windows, split: str, chosen: _Chosen, limit: int | None, seed: int
) -> dict[str, Any]:
    """What outcomes are kept by, beside the ranker."""
    which = {"payload": payload.id, "windows": windows.id, "split": split, "limit": limit, "seed": seed}
    return {**which, "units": chosen.digest(), "version": version()}


def _report(
    payload: Payload,
    name: str | None,
    of_windows: dict[str, Any],
    alignment: Alignment,
    chosen: _Chosen,
    bootstrap: Bootstrap,
    found: Sequence[Outcome],
) -> Report:
    """The report of outcomes on the windows that were chosen."""
    return Report(
        payload={
            "name": name or payload.path.name,
            "id": payload.id,
            "rows": len(payload),
            "dim": payload.dim,
            "encoder": str(getattr(payload.provenance, "encoder", "")),
        },
        windows={
            **of_windows,
            "total": chosen.total,
            "evaluated": len(chosen.rows),
            "articles": len(np.unique(chosen.articles)),
            "headline": HEADLINE,
        },
        alignment=_numbers(alignment),
        bootstrap={
            "unit": chosen.unit,
            "units": len(bootstrap.names),
            "resamples": bootstrap.resamples,
            "seed": bootstrap.seed,
            "level": bootstrap.level,
        },
        rows=[row(one, payload, chosen.rows, chosen.articles, bootstrap) for one in found],
        differences=differences(found, bootstrap),
        articles=article_figures(payload, chosen.rows, chosen.articles),
        findings=[dict(finding) for one in found for finding in one.findings],
    )


def _space_name(ranker: Ranker) -> str:
    """The id of the space a ranker works in; an identity is the payload's own space."""
    return "raw" if ranker.space is None or baseline.is_identity(ranker.space) else space_key(ranker.space)


def _numbers(alignment: Alignment) -> dict[str, float | int | None]:
    """The figures of an Alignment as JSON numbers; NaN becomes null."""
    fields = {name: getattr(alignment, name) for name in alignment.__dataclass_fields__}
    result: dict[str, float | int | None] = {}
    for name, value in fields.items():
        if isinstance(value, (int, np.integer)):
            result[name] = int(value)
        elif isinstance(value, (float, np.floating)):
            result[name] = float(value) if np.isfinite(value) else None
    return result
