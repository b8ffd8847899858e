"""What splits share that they must not: articles, copies of articles; and duplicates in the payload."""

from __future__ import annotations

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.alignment import SAME, cosine, window_keys
from fastlvm.data.held import HeldWindows
from fastlvm.data.split import ALIASES, SPLITS
from fastlvm.evaluation.diagnose.drawn import Drawn, nearest
from fastlvm.evaluation.findings import FAULT, OK, WARNING, Finding, percent

COPY = 0.995
"""Cosine from which two chunks are near-duplicates: the same text with another punctuation, say."""

DUPLICATED = (0.01, 0.1)
"""Shares of the payload's rows that repeat another's vector from which there is a warning and a fault. Refrains make
one in a thousand; the predecessor's payload had 4 % and half of its evaluation was spoiled by them."""

REPEATED = (0.01, 0.05)
"""Shares of windows whose target repeats a row of their own context, likewise: it cannot be retrieved when the context
is left out, and is free when it is not."""

LEAKED = (0.01, 0.05)
"""Shares of targets that have a near-duplicate among training chunks, likewise."""

_LEAST_TARGETS = 3  # of an article, to say that it is a copy of a training article


def check_duplicates(drawn: Drawn, payload: Payload) -> list[Finding]:
    """Duplicate vectors in the payload, and targets that repeat a row of their context."""
    groups = np.asarray(payload.groups)
    share = float((groups != np.arange(len(groups))).mean())
    sentence = f"{percent(share)} of the payload's rows repeat the vector of another"
    level = _level(share, DUPLICATED)
    if level != OK:
        sentence += ": a search lists them once, and a target among them is known from elsewhere"
    code = "duplicates" if level == OK else "payload-duplicated"
    findings = [Finding(code, level, sentence, {"share": share, "rows": len(groups)})]

    vectors = drawn.vectors[drawn.asked & ~drawn.broken]
    repeats = float((cosine(vectors[:, :-1], vectors[:, -1:]) >= SAME).any(axis=1).mean()) if len(vectors) else 0.0
    level = _level(repeats, REPEATED)
    sentence = f"the target repeats a row of its own context in {percent(repeats)} of the windows"
    if level != OK:
        sentence += ": it cannot be retrieved when the context is left out, and is free when it is not"
    findings.append(Finding("target-in-context", level, sentence, {"share": repeats, "windows": len(vectors)}))
    return findings


def check_splits(held: HeldWindows, drawn: Drawn, payload: Payload, split: str) -> list[Finding]:
    """Articles in two splits, and targets of `split` that training has seen as another row."""
    if held.split is None or held.keys is None:
        return [Finding("no-splits", OK, "the file has no splits, so nothing can have leaked between them", {})]
    return [*_overlap(held.keys, held.split), *_leaks(held, drawn, payload, ALIASES.get(split, split))]


def _overlap(keys: np.ndarray, split: np.ndarray) -> list[Finding]:
    pairs = np.unique(np.column_stack([keys[:, 0], split]), axis=0)  # of article and split, by article
    articles, counts = np.unique(pairs[:, 0], return_counts=True)
    both = articles[counts > 1]
    figures = {"articles": len(articles), "in_two_splits": len(both)}
    if not len(both):
        return [Finding("articles-apart", OK, f"0 of {len(articles)} articles are in more than one split", figures)]
    names = [SPLITS[code] for code in np.unique(pairs[np.isin(pairs[:, 0], both), 1])]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    sentence = (
        f"{len(both)} of {len(articles)} articles leak from one split into another ({listed}; first: article "
        f"{both[0]}): what is evaluated was trained on"
    )
    return [Finding("articles-leaked", FAULT, sentence, figures)]


def _leaks(held: HeldWindows, drawn: Drawn, payload: Payload, split: str) -> list[Finding]:
    """Targets of a split whose nearest training chunk is a near-duplicate, by content."""
    assert held.keys is not None and held.split is not None and drawn.keys is not None
    used = drawn.asked & ~drawn.broken
    training = held.keys[held.split == SPLITS.index("train")]
    if split == "train" or not len(training) or not used.any():
        return []
    rows = np.unique(payload.rows_of(window_keys(training, held.context)))
    rows = rows[rows >= 0]
    if not len(rows):
        return []
    row, near = nearest(drawn.vectors[used, -1], payload, rows)
    articles = drawn.keys[used, 0]
    copied = (near >= COPY) & (payload.keys[row, 0] != articles)  # of the same article: said of its number
    share = float(copied.mean())
    _, of, count = np.unique(articles, return_inverse=True, return_counts=True)
    hits = np.bincount(of, weights=copied)
    leaked = int(((count >= _LEAST_TARGETS) & (hits >= count / 2)).sum())
    figures = {"share": share, "targets": len(near), "articles": len(count), "copied_articles": leaked, "cosine": COPY}
    sentence = f"{percent(share)} of {len(near)} {split} targets have a training chunk of cosine {COPY} or more"
    level = FAULT if leaked else _level(share, LEAKED)
    if leaked:
        are = "article is a copy" if leaked == 1 else "articles are copies"
        sentence = (
            f"{split} articles leaked into train under other numbers: {leaked} {are} of training articles; {sentence}"
        )
    return [Finding("near-duplicates" if level == OK else "content-leaked", level, sentence, figures)]


def _level(share: float, limits: tuple[float, float]) -> str:
    warning, fault = limits
    return FAULT if share >= fault else WARNING if share >= warning else OK
