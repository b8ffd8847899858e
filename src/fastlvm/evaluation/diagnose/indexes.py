"""Is an index one of this payload, and does it find the payload's rows?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastlvm.data import Payload
from fastlvm.evaluation.findings import FAULT, OK, Figure, Finding, percent
from fastlvm.retrieval import Index

FINDS = 0.9
"""Share of rows that an index has to find when asked for them. An approximate one misses some, not a tenth: a row is
nearest to itself, in the list that is probed first."""

_QUERIES = 500
_K = 10  # codes of one byte a component may put near-duplicates first


def check_index(folder: Path, payload: Payload, seed: int) -> list[Finding]:
    """Compare an index's payload with this one, and search it for rows of this one. Errors as `Index.open`."""
    index = Index.open(folder)
    if index.payload_id != payload.id:
        sentence = (
            f"index {folder} was built from another payload: it carries id {index.payload_id}, and {payload.path} is "
            f"{payload.id}"
        )
        ids = {"index": index.payload_id, "payload": payload.id}
        return [Finding("index-of-another-payload", FAULT, sentence, ids)]
    rows = index.rows
    rows = rows[rows < len(payload)]
    if index.dim != payload.dim or not len(rows):
        sentence = f"index {folder} has {len(rows)} rows of {index.dim} dimensions of a payload of {len(payload)} × "
        return [Finding("index-of-another-payload", FAULT, f"{sentence}{payload.dim}", {"rows": len(rows)})]
    asked = np.random.default_rng(seed).choice(rows, min(_QUERIES, len(rows)), replace=False)
    found = index.search(index.space.apply(payload.take(asked)), min(_K, len(rows))).ids
    share = float((found == asked[:, None]).any(axis=1).mean())
    same = float((index.keys[asked] == payload.keys[asked]).all(axis=1).mean())
    figures: dict[str, Figure] = {"found": share, "keys": same, "queries": len(asked), "kind": index.kind}
    if share >= FINDS and same == 1:
        sentence = f"index {folder} finds {percent(share)} of {len(asked)} payload rows when asked for them"
        return [Finding("index", OK, sentence, figures)]
    sentence = (
        f"index {folder} holds other vectors than the payload: it finds {percent(share)} of {len(asked)} rows when "
        f"asked for them and has the keys of {percent(same)}, though its record names this payload: build it again"
    )
    return [Finding("index-of-another-payload", FAULT, sentence, figures)]
