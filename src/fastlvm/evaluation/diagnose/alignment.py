"""Are windows the payload's own chunks, under their own keys, in reading order? If not, what was done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.alignment import SAME, random_pair_cosine
from fastlvm.data.held import HeldWindows
from fastlvm.evaluation.diagnose.drawn import Drawn
from fastlvm.evaluation.diagnose.relation import Relation, relation
from fastlvm.evaluation.diagnose.trace import TRACED, Traced, cosines_to, keyed_rows, trace
from fastlvm.evaluation.findings import FAULT, OK, Figure, Finding, percent

NEAR_RANDOM = 0.05
"""Distance from the random-pair cosine up to which vectors count as unrelated to the rows of their keys."""

MOST = 0.5
"""Share of the wrong keys that have to be wrong in one way for that way to be named. Keys that are wrong at random
agree in none; of keys that are shifted along the windows, those at an article's end are wrong in another way."""

INVENTED = 0.99
"""Share of all keys that count through the file, (i // n, i % n), from which they are made up. Real keys of windows
never start with chunk 0, which is a context's."""


PASTED = "targets-pasted"


class Aligned(NamedTuple):
    """Findings; rows int64 [m, L + 1] of the drawn windows, -1 in those that are not whole runs of the payload."""

    findings: list[Finding]
    rows: np.ndarray


@dataclass(frozen=True)
class _Case:
    """What there is to say about windows that went astray. keyed, by_key: rows and cosines by key [m, L + 1]."""

    payload: Payload
    drawn: Drawn
    keyed: np.ndarray | None
    by_key: np.ndarray
    random: float
    period: int | None
    traced: Traced

    def part(self, mask: np.ndarray) -> np.ndarray:
        """Places among the drawn windows of the traced ones in `mask` [t]."""
        return self.traced.at[mask]

    def share(self, mask: np.ndarray) -> float:
        """Share of all drawn windows: the traced ones stand for those that were not traced."""
        astray = 1.0 if self.keyed is None else float((~_whole(self.by_key)).mean())
        return astray * float(mask.mean())

    def keyed_cosine(self, mask: np.ndarray, columns: slice) -> float:
        """Mean cosine to the rows of the keys, NaN where the payload has none of them."""
        found = self.by_key[self.part(mask)][:, columns]
        return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")

    def compared(self, cosine: float) -> str:
        return f"cosine {cosine:.3f}, random pairs {self.random:.3f}"

    def made_up(self) -> str:
        assert self.period is not None
        return f"the keys are made up (article = i // {self.period}, chunk = i % {self.period})"


def check_alignment(held: HeldWindows, drawn: Drawn, payload: Payload, seed: int) -> Aligned:
    """Findings about keys, contexts and targets, those of most windows first, but pasted targets before all."""
    random = random_pair_cosine(payload, seed)
    keyed = keyed_rows(drawn, payload)
    by_key = np.full(drawn.vectors.shape[:2], np.nan)
    if keyed is not None:
        by_key = cosines_to(drawn.vectors, keyed, payload)
    whole = _whole(by_key)
    rows = np.full(by_key.shape, -1, np.int64)
    if keyed is not None:
        rows[whole] = keyed[whole]
    astray = np.flatnonzero(~whole & ~drawn.broken)
    if len(astray) > TRACED:
        astray = np.sort(np.random.default_rng(seed).choice(astray, TRACED, replace=False))
    findings = _payload_id(held, payload)
    if len(astray):
        traced = trace(drawn, astray, keyed, payload)
        case = _Case(payload, drawn, keyed, by_key, random, _period(held.keys), traced)
        said, found_rows = _explain(case)
        rows[astray] = found_rows
        findings += said
    if not findings and (rows[:, -1] >= 0).any():
        findings.append(_aligned(drawn, by_key[whole], rows, random))
    return Aligned(findings, rows)


def _whole(cosines: np.ndarray) -> np.ndarray:
    return np.asarray((cosines >= SAME).all(axis=1))  # NaN is not


def _payload_id(held: HeldWindows, payload: Payload) -> list[Finding]:
    if held.kind != "windows" or held.payload_id == payload.id:
        return []
    sentence = (
        f"the windows are of another payload: they carry id {held.payload_id}, and {payload.path} is {payload.id}: "
        "name their own, or build them again from this one"
    )
    return [Finding("windows-of-another-payload", FAULT, sentence, {"windows": held.payload_id, "payload": payload.id})]


def _aligned(drawn: Drawn, by_key: np.ndarray, rows: np.ndarray, random: float) -> Finding:
    count = int((rows[:, -1] >= 0).sum())
    if drawn.keys is None:
        sentence = f"contexts and targets are runs of the payload's own rows ({count} windows found by their vectors)"
        return Finding("aligned", OK, sentence, {"windows": count, "random_pair_cosine": random})
    context, target = float(np.nanmean(by_key[:, :-1])), float(np.nanmean(by_key[:, -1]))
    sentence = (
        f"contexts and targets are the payload rows they are keyed to (cosine {context:.4f} and {target:.4f}, "
        f"random pairs {random:.4f}, {count} windows)"
    )
    figures = {"context_cosine": context, "target_cosine": target, "random_pair_cosine": random, "windows": count}
    return Finding("aligned", OK, sentence, figures)


def _period(keys: np.ndarray | None) -> int | None:
    """n of keys [count, 2] that are (i // n, i % n), i their place in the file; None where they are not."""
    if keys is None or len(keys) < 2:
        return None
    period = int(keys[:, 1].max()) + 1
    place = np.arange(len(keys))
    counted = (keys[:, 0] == place // period) & (keys[:, 1] == place % period)
    return period if counted.mean() >= INVENTED else None


def _explain(case: _Case) -> tuple[list[Finding], np.ndarray]:
    """Findings about the traced windows, each of them in one, and their rows [t, L + 1], -1 where not whole runs."""
    traced, payload = case.traced, case.payload
    vectors = case.drawn.vectors[traced.at]
    context = vectors.shape[1] - 1
    run = (traced.start >= 0) & ~traced.backward
    rows = np.where(run[:, None], traced.start[:, None] + np.arange(context + 1), -1)
    rows[rows >= len(payload)] = -1
    is_next = cosines_to(vectors[:, -1], rows[:, -1], payload) >= SAME
    keys = payload.keys.astype(np.int64)
    first, last = keys[rows[:, 0]], keys[rows[:, -1]]
    crosses = first[:, 0] != last[:, 0]
    skips = ~crosses & (last[:, 1] - first[:, 1] != context)
    present = traced.near >= SAME
    all_there = np.asarray(present[:, :-1].all(axis=1))
    whole = is_next & ~crosses & ~skips  # [t]

    cases: list[tuple[np.ndarray, Callable[[_Case, np.ndarray], Finding]]] = [
        (whole, _keys_wrong),
        (is_next & crosses, _crossing),
        (is_next & skips, _skipping),
        (run & (case.by_key[traced.at, -1] >= SAME), _pasted),
        (run & present[:, -1], _targets_elsewhere),
        (run, _targets_foreign),
        (traced.backward, _reversed),
        (all_there, _scattered),
        (~all_there, _contexts_foreign),
    ]
    left = ~whole if case.keyed is None else np.ones(len(run), bool)
    found: list[tuple[float, Finding]] = []
    for mask, say in cases:
        here = mask & left
        left &= ~mask
        if here.any():
            found.append((case.share(here), say(case, here)))
    found.sort(key=lambda one: (one[1].code != PASTED, -one[0]))  # pasted targets are lost, the rest can be keyed anew
    return [finding for _, finding in found], np.where(whole[:, None], rows, -1)


def _next_rows(case: _Case, mask: np.ndarray) -> np.ndarray:
    """Rows of the chunk after the context, of windows whose context is a run."""
    return case.traced.start[mask] + case.drawn.vectors.shape[1] - 1


def _keys_wrong(case: _Case, mask: np.ndarray) -> Finding:
    assert case.keyed is not None and case.drawn.keys is not None
    true = case.payload.keys.astype(np.int64)[_next_rows(case, mask)]
    delta = case.drawn.keys[case.part(mask)] - true
    values, counts = np.unique(delta, axis=0, return_counts=True)
    top = int(np.argmax(counts))
    article, shift = (int(value) for value in values[top])
    agreed = float(counts[top] / len(delta))
    target, share = case.keyed_cosine(mask, slice(-1, None)), case.share(mask)
    missing = float((case.keyed[case.part(mask), -1] < 0).mean())
    figures: dict[str, Figure] = {
        "windows": share,
        "target_cosine": _number(target),
        "context_cosine": _number(case.keyed_cosine(mask, slice(None, -1))),
        "random_pair_cosine": case.random,
        "keys_not_in_payload": missing,
    }
    related = "unrelated to" if not abs(target - case.random) > NEAR_RANDOM else "other than"
    off = (
        f"targets are {related} the payload rows they are keyed to ({case.compared(target)})"
        if np.isfinite(target)
        else "the payload has no row of these keys"
    )
    are = f"contexts and targets are whole runs of the payload, under other keys ({percent(share)} of the windows)"
    if case.period is not None:
        figures["period"] = case.period
        return Finding("keys-invented", FAULT, f"{case.made_up()}: {off}; {are}", figures)
    if agreed >= MOST and article == 0 and shift:
        chunks = "chunk" if abs(shift) == 1 else "chunks"
        sentence = (
            f"the keys are shifted by {shift:+d} {chunks} in {percent(agreed * share)} of the windows: {off}, "
            f"and equal the row {abs(shift)} {'before' if shift > 0 else 'after'}"
        )
        return Finding("keys-shifted", FAULT, sentence, {**figures, "shift": shift, "agreed": agreed})
    return Finding("keys-wrong", FAULT, f"{off}: the keys are wrong; {are}", figures)


def _pasted(case: _Case, mask: np.ndarray) -> Finding:
    context, target = case.keyed_cosine(mask, slice(None, -1)), case.keyed_cosine(mask, slice(-1, None))
    share = case.share(mask)
    real = cosines_to(case.drawn.vectors[case.part(mask), -1], _clipped(case, mask), case.payload)
    to_next = float(np.nanmean(real)) if np.isfinite(real).any() else float("nan")
    made_up = "the keys are wrong" if case.period is None else case.made_up()
    by_key = f"cosine {target:.3f}, but contexts {context:.3f}" if np.isfinite(context) else f"cosine {target:.3f}"
    sentence = (
        f"{made_up} and the targets were pasted in by them: targets equal the payload rows they are keyed to "
        f"({by_key}, random pairs {case.random:.3f}), and are not the chunk after their context (cosine {to_next:.3f}) "
        f"in {percent(share)} of the windows"
    )
    figures: dict[str, Figure] = {
        "windows": share,
        "target_cosine": _number(target),
        "context_cosine": _number(context),
        "target_to_next_cosine": _number(to_next),
        "random_pair_cosine": case.random,
        "period": case.period,
    }
    return Finding(PASTED, FAULT, sentence, figures)


def _clipped(case: _Case, mask: np.ndarray) -> np.ndarray:
    rows = _next_rows(case, mask)
    return np.where(rows < len(case.payload), rows, -1)


def _crossing(case: _Case, mask: np.ndarray) -> Finding:
    share = case.share(mask)
    sentence = f"windows cross from one article into the next: {percent(share)} of them hold chunks of two articles"
    return Finding("windows-cross-articles", FAULT, sentence, {"windows": share})


def _skipping(case: _Case, mask: np.ndarray) -> Finding:
    share = case.share(mask)
    sentence = f"windows skip chunks: {percent(share)} of them run over rows of one article whose numbers have gaps"
    return Finding("windows-skip-chunks", FAULT, sentence, {"windows": share})


def _targets_elsewhere(case: _Case, mask: np.ndarray) -> Finding:
    share = case.share(mask)
    offset = case.traced.nearest[mask, -1] - _next_rows(case, mask)
    values, counts = np.unique(offset, return_counts=True)
    top = int(np.argmax(counts))
    shift, agreed = int(values[top]), float(counts[top] / len(offset))
    if agreed >= MOST:
        where = f"they are the row {abs(shift)} {'after' if shift > 0 else 'before'} it in {percent(agreed)} of these"
    else:
        where = "they are rows of other places"
    sentence = f"targets are not the chunk after their context in {percent(share)} of the windows: {where}"
    return Finding("targets-elsewhere", FAULT, sentence, {"windows": share, "shift": shift, "agreed": agreed})


def _reversed(case: _Case, mask: np.ndarray) -> Finding:
    share = case.share(mask)
    end = case.traced.start[mask]
    after, before = end + 1, end - (case.drawn.vectors.shape[1] - 1)
    targets = case.drawn.vectors[case.part(mask), -1]
    to_after, to_before = (
        float((cosines_to(targets, np.where(rows < len(case.payload), rows, -1), case.payload) >= SAME).mean())
        for rows in (after, before)
    )
    what = (
        "whole windows run backward: the target is the chunk before"
        if to_before > to_after
        else "contexts are reversed: they run from the newest chunk to the oldest"
    )
    sentence = f"{what} in {percent(share)} of the windows"
    figures = {"windows": share, "target_follows": to_after, "target_precedes": to_before}
    return Finding("context-reversed", FAULT, sentence, figures)


def _scattered(case: _Case, mask: np.ndarray) -> Finding:
    share = case.share(mask)
    rows = np.sort(case.traced.nearest[mask, :-1], axis=1)
    shuffled = float((np.diff(rows, axis=1) == 1).all(axis=1).mean())
    what = "consecutive chunks in another order" if shuffled >= MOST else "payload rows that are no run of chunks"
    sentence = f"contexts hold {what} in {percent(share)} of the windows"
    return Finding("context-scattered", FAULT, sentence, {"windows": share, "shuffled": shuffled})


def _targets_foreign(case: _Case, mask: np.ndarray) -> Finding:
    rows = _clipped(case, mask)
    there = rows >= 0
    held = case.drawn.vectors[case.part(mask), -1][there]
    near = float(case.traced.near[mask, -1].mean())
    related = relation(held, case.payload.take(rows[there])) if there.any() else None
    return _foreign(case, mask, "targets", "the chunk after their context", related, near)


def _contexts_foreign(case: _Case, mask: np.ndarray) -> Finding:
    at = case.part(mask)
    near = float(case.traced.near[mask, :-1].mean())
    targets_too = float((case.traced.near[mask, -1] < SAME).mean()) >= MOST
    what = "contexts and targets" if targets_too else "contexts"
    related = None
    if case.keyed is not None:
        position = -1 if targets_too else -2
        rows = case.keyed[at, position]
        there = rows >= 0
        if there.any():
            related = relation(case.drawn.vectors[at, position][there], case.payload.take(rows[there]))
    return _foreign(case, mask, what, "the payload rows they are keyed to", related, near)


def _foreign(case: _Case, mask: np.ndarray, what: str, meant: str, related: Relation | None, near: float) -> Finding:
    """About vectors `what` that the payload does not hold; `meant`: the rows they were compared with."""
    share = case.share(mask)
    figures: dict[str, Figure] = {"windows": share, "nearest_cosine": near, "random_pair_cosine": case.random}
    tail = f"({percent(share)} of the windows)"
    prefix = "targets" if what == "targets" else "windows"
    if related is None:
        sentence = f"{what} are not in the payload: the nearest row has cosine {near:.3f} on average {tail}"
        return Finding(f"{prefix}-not-of-payload", FAULT, sentence, figures)
    figures |= {
        "cosine": related.cosine,
        "gram_difference": related.gram_difference,
        "gram_correlation": related.gram_correlation,
    }
    compared = case.compared(related.cosine)
    if related.kind == "inexact":
        sentence = (
            f"{what} are {meant} only nearly (cosine {related.cosine:.4f}, wants {SAME}): rounded or encoded again"
        )
        return Finding(f"{prefix}-inexact", FAULT, f"{sentence} {tail}", figures)
    if related.kind == "rotated":
        sentence = (
            f"{what} are {meant}, rotated by an orthogonal matrix: {compared}, while cosines among themselves are the "
            f"payload's to {related.gram_difference:.4f} {tail}"
        )
        return Finding(f"{prefix}-rotated", FAULT, sentence, figures)
    if related.kind == "encoder":
        sentence = (
            f"{what} come from another encoder: {compared} with {meant}, while cosines among themselves go with the "
            f"payload's (correlation {related.gram_correlation:.2f}) {tail}"
        )
        return Finding(f"{prefix}-other-encoder", FAULT, sentence, figures)
    sentence = (
        f"{what} are unrelated to {meant} ({compared}), and the payload does not hold them (nearest row "
        f"{near:.3f}): they come from another payload {tail}"
    )
    return Finding(f"{prefix}-not-of-payload", FAULT, sentence, figures)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
