"""How rankers find the truth among all chunks, what wins where they do not, and whether a model is none."""

from __future__ import annotations

import numpy as np

from fastlvm.errors import InputError
from fastlvm.evaluation.findings import FAULT, OK, Figure, Finding, percent
from fastlvm.evaluation.impostors import rank_with_impostors
from fastlvm.evaluation.ranker import Pools, Ranker, predict_all
from fastlvm.evaluation.ranks import MISS
from fastlvm.evaluation.suspects import model_findings


def check_ranker(ranker: Ranker, pools: Pools, rows: np.ndarray, *, unseen: bool) -> list[Finding]:
    """Findings about one ranker on windows int64 [n, L + 1], n ≥ 1: suspects, ranks of the truth and impostors.

    unseen: see `model_findings`. A ranker that gives no usable vectors is a fault, and nothing else is said of it.
    """
    payload = pools.payload
    try:
        predictions = predict_all(ranker, payload, rows)
    except InputError as error:
        return [Finding("model-bad-output", FAULT, f"{ranker.name} gives no usable predictions: {error}", {})]
    findings = []
    pool = pools.of(ranker.space)
    if ranker.kind == "model":
        last, truth = np.asarray(pool[rows[:, -2]]), np.asarray(pool[rows[:, -1]])
        findings += model_findings(ranker.name, predictions, last, truth, unseen=unseen)
    return [*findings, *_ranks(ranker, pools, rows, predictions)]


def _ranks(ranker: Ranker, pools: Pools, rows: np.ndarray, predictions: np.ndarray) -> list[Finding]:
    payload, pool = pools.payload, pools.of(ranker.space)
    groups = np.asarray(payload.groups)
    ranks, found = rank_with_impostors(predictions, pool, rows[:, -1], rows[:, :-1], groups)
    known = np.sort(ranks.excluded)
    median = int(known[(len(known) - 1) // 2])
    first, five = float((known <= 1).mean()), float((known <= 5).mean())
    figures: dict[str, Figure] = {
        "windows": len(rows),
        "rows": len(payload),
        "r1": first,
        "r5": five,
        "r5_context_included": float((ranks.included <= 5).mean()),
        "median_rank": None if median == MISS else median,
        "unanswerable": float((known == MISS).mean()),
    }
    sentence = (
        f"{ranker.name}: the truth is first in {percent(first)} and in the first five in {percent(five)} of "
        f"{len(rows)} windows, median rank {'none' if median == MISS else median} of {len(payload)} rows "
        "(exact, context left out)"
    )
    there = found.row >= 0
    margin = found.margin[there] / np.linalg.norm(predictions, axis=1)[there]
    own = payload.keys[found.row[there], 0] == payload.keys[rows[there, -1], 0]
    findings = [Finding("ranks", OK, sentence, figures)]
    if there.any():
        findings.append(_impostors(ranker.name, margin, own, float(found.context_won.mean())))
    return findings


def _impostors(name: str, margin: np.ndarray, own: np.ndarray, context_won: float) -> Finding:
    """margin [m] of the truth, per window; own bool [m]: the best impostor is of the truth's article."""
    beaten = margin < 0
    median, behind = float(np.median(margin)), float(beaten.mean())
    same = float(own[beaten].mean()) if beaten.any() else None
    whose = "" if same is None else f", by a chunk of the same article in {percent(same)} of these"
    sentence = (
        f"{name}: margin of the truth over the best impostor {median:+.3f} (median); it is beaten in {percent(behind)} "
        f"of the windows{whose}; a row of the context would win in {percent(context_won)}"
    )
    figures: dict[str, Figure] = {
        "median_margin": median,
        "beaten": behind,
        "same_article": same,
        "context_won": context_won,
    }
    return Finding("impostors", OK, sentence, figures)
