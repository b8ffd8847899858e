"""What the gate bench times: the model, the contexts it is given, and by what measure its predictions are real ones."""

from __future__ import annotations

import numpy as np
import torch

import fastlvm
import forward_cases
from fastlvm.retrieval.vectors import CONTEXT, DECAY

K = 50
PRECISION = "int8"
# Recall@50 that settings are chosen for, ours and the rivals', on TUNING contexts: as much above the gate's 0.95 as
# two standard errors of a mean over so many, so that what is found for other contexts is not below it by chance.
ASKED, TUNING = 0.955, 512
CONTEXTS, RECALLED = 4096, 2000  # to time with, a different one each call, and those of them that recall is taken on
CLIENTS = (1, 2, 4, 8)
STAGES = ("model", "search", "end_to_end")
# Of the drawn head's size. The drawn one outweighs the mixture of the context and predicts what lies nowhere near any
# chunk; a head so small turns it by about as much as training does.
HEAD = 0.01
REAL = 0.95  # least share of the scores of window queries that predictions have to have
SCORED = 200  # queries that scores are compared on


def model(head: float = HEAD) -> torch.nn.Module:
    """Mamba-S of forward_cases.py, whose mixture weighs the context as the index's window queries do."""
    made = forward_cases.model()
    ages = torch.arange(CONTEXT - 1, -1, -1, dtype=torch.float32)
    with torch.no_grad():
        made.head.weight *= head
        made.mixture.logits.copy_(ages * np.log(DECAY))
    return made


def windows(payload: fastlvm.Payload) -> tuple[np.ndarray, np.ndarray]:
    """Payload rows [n, 5] of windows to choose settings on, and of others, from other articles, to measure with.

    At most TUNING and CONTEXTS, an eighth of the articles being for the former.
    """
    keys = payload.keys.astype(np.int64)
    ends = keys[CONTEXT - 1 :]
    begins = keys[: len(ends)]
    starts = np.flatnonzero((begins[:, 0] == ends[:, 0]) & (ends[:, 1] - begins[:, 1] == CONTEXT - 1))
    rng = np.random.default_rng(7)
    articles = rng.permutation(np.unique(keys[starts, 0]))
    tuning = np.isin(keys[starts, 0], articles[: max(1, len(articles) // 8)])
    chosen = []
    for own, most in ((starts[tuning], TUNING), (starts[~tuning], CONTEXTS)):
        picked = rng.choice(own, min(most, len(own)), replace=False)
        chosen.append(picked[:, None] + np.arange(CONTEXT))
    return chosen[0], chosen[1]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the K nearest that were found; ids [q, K], and truth [q, m] as `measure.nearest` has it."""
    hits = (found[:, :K, None] == truth[:, None, :]) & (found[:, :K, None] >= 0)
    return float(hits.sum() / (min(K, truth.shape[1]) * len(found)))
