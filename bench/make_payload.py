"""A payload of full size, made from real vectors, for benchmarks of latency and recall.

    python bench/make_payload.py             # 584,545 rows in build/payload-584545-<hash>
    python bench/make_payload.py --check     # and beside its sources: what a search of it has to do with

Sources are the corpora in the folder that FASTLVM_DATA names (subfolders with vectors.npy and keys.npy), or else the
sample payload. The payload is made of copies of them, each of all articles in another order, the last of some. A copy
is turned as a whole, so within a copy every cosine is as in the sources: of neighbours, with its spread, of random
pairs, of a query and its nearest. It is turned about the mean, in blocks of directions in which the sources vary alike
(those of their second moment, largest first), so that copies overlap: every row x of a block becomes
cos(ANGLE)·x + sin(ANGLE)·Jx, where J, drawn anew for every copy and block, makes a row a perpendicular one as long. So
each row is displaced by the same angle in all but its part along the mean: its cosine with its copies is 0.67, where a
query's 50th nearest real row has 0.68. At an angle of 0.5 most of the nearest ten are copies, and easier to find than
real rows; beyond ANGLE there are few copies, and what is nearest is less alike.

Interpolating between neighbouring chunks, and adding noise of the residuals' covariance and a displacement of the
article, matches mean cosines but not their spread: cosines of neighbours deviate half as much, and the nearest rows
are 0.05 less alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fastlvm
from fastlvm.data import rows as table
from fastlvm.data.npz import map_array, read_header
from fastlvm.errors import FastlvmError, InputError
from fastlvm.files import check_new_folder, sha256_file, sha256_json

ROWS = 584_545
ANGLE = 0.9
RECIPE = 1  # of the bytes made: counts up when they change
BLOCK = 16_384  # rows
BUILD = Path(__file__).parents[1] / "build"
ROWS_PER_LIST, SHARES, QUERIES, K = 285, (0.02, 0.06, 0.1), 500, 50
HELD_BACK = 6  # the check makes as many rows as are real from one in so many articles
_REMEDY = "restore the file or name another folder in FASTLVM_DATA"


class Sources(NamedTuple):
    """Real vectors float16 or float32 [N, dim], the article of each, int64 [N] from 0 on, their names and hashes."""

    vectors: np.ndarray
    articles: np.ndarray
    names: list[str]
    hashes: list[str]


def sources() -> Sources:
    """The corpora in FASTLVM_DATA, or the sample payload where it is not set. Raises InputError."""
    folder = os.environ.get("FASTLVM_DATA")
    if not folder:
        sample = fastlvm.Payload.sample()
        record = sample.provenance
        digests = [record.vectors_sha256, record.keys_sha256]
        return Sources(sample.vectors.view(np.ndarray), _numbered(sample.keys), ["the sample payload"], digests)
    corpora = sorted(path.parent for path in Path(folder).glob("*/vectors.npy"))
    if not corpora:
        raise InputError(f"FASTLVM_DATA is {folder}, which has no subfolder with a vectors.npy: name one, or unset it")
    vectors: list[np.ndarray] = []
    articles: list[np.ndarray] = []
    hashes: list[str] = []
    for corpus in corpora:
        found, keys = _read(corpus)
        if vectors and found.shape[1] != vectors[0].shape[1]:
            raise InputError(
                f"{corpus / 'vectors.npy'} has {found.shape[1]} dimensions, and {corpora[0].name} has "
                f"{vectors[0].shape[1]}: vectors of one encoder are wanted"
            )
        vectors.append(found)
        articles.append(_numbered(keys) + (articles[-1][-1] + 1 if articles else 0))
        hashes += [sha256_file(corpus / name) for name in ("vectors.npy", "keys.npy")]
    return Sources(np.concatenate(vectors), np.concatenate(articles), [corpus.name for corpus in corpora], hashes)


def _read(corpus: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, dim] and keys [N, 2] of a corpus, checked."""
    path = corpus / "vectors.npy"
    try:
        with path.open("rb") as file:
            shape, _, dtype = read_header(file, str(path), _REMEDY)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from error
    if len(shape) != 2 or 0 in shape or dtype.name not in ("float16", "float32"):
        raise InputError(f"{path} holds {dtype} {list(shape)}, and float16 or float32 [rows, dim] is wanted")
    vectors = map_array(path, dtype.name, shape, _REMEDY).view(np.ndarray)
    keys = np.array(map_array(corpus / "keys.npy", "int32", (shape[0], 2), _REMEDY))
    lengths = table.norms(vectors)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise InputError(f"{path} row {int(np.argmax(bad))} is zero or not finite ({bad.sum()} such rows): {_REMEDY}")
    if (np.diff(table.codes(keys)) <= 0).any():
        raise InputError(f"{corpus / 'keys.npy'} is not sorted by article and chunk: {_REMEDY}")
    return vectors, keys


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Articles of sorted keys [N, 2], counted from 0 on: int64 [N]."""
    return np.cumsum(np.diff(keys[:, 0], prepend=keys[0, 0]) != 0)


def _turn(directions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rotation [dim, dim] by ANGLE in all but the first of `directions` [dim, dim] and one that may be left over."""
    dim = len(directions)
    turn = np.eye(dim)
    first, width = 1, 2.0
    while dim - first >= 2:
        size = min(int(width), dim - first) // 2 * 2
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
        perpendicular = basis[:, 1::2] @ basis[:, ::2].T
        part = slice(first, first + size)
        turn[part, part] = np.cos(ANGLE) * np.eye(size) + np.sin(ANGLE) * (perpendicular - perpendicular.T)
        first, width = first + size, width * 1.5
    return (directions @ turn @ directions.T).astype(np.float32)


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Eigenvectors of the second moment of vectors [N, dim] as columns, largest first; the first is about the mean."""
    moment = np.zeros((vectors.shape[1],) * 2)
    for first in range(0, len(vectors), BLOCK):
        block = vectors[first : first + BLOCK].astype(np.float32)
        moment += block.T @ block
    return np.linalg.eigh(moment)[1][:, ::-1]


def made(vectors: np.ndarray, articles: np.ndarray, rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of made vectors, float16 [n, dim], and the rows of `vectors` [N, dim] that they are turned from, [n]."""
    directions = _directions(vectors)
    for copy, wanted in enumerate(_copies(articles, rows, seed)):
        turn = _turn(directions, np.random.default_rng([seed, copy, 1]))
        for first in range(0, len(wanted), BLOCK):
            origin = wanted[first : first + BLOCK]
            yield table.normalised(vectors[origin].astype(np.float32) @ turn.T).astype(np.float16), origin


def _copies(articles: np.ndarray, rows: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of the sources in the order of each copy, `rows` of them together."""
    starts = np.searchsorted(articles, np.arange(articles[-1] + 2))
    for copy in range(-(-rows // len(articles))):
        order = np.random.default_rng([seed, copy, 0]).permutation(len(starts) - 1)
        wanted = np.concatenate([np.arange(starts[article], starts[article + 1]) for article in order])
        yield wanted[: rows - copy * len(articles)]


def _keys(articles: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """int32 [rows, 2]: a new article wherever the source's article or copy changes, its chunks from 0 on."""
    breaks = [np.diff(articles[wanted], prepend=-1) != 0 for wanted in _copies(articles, rows, seed)]
    new = np.concatenate(breaks)
    article = np.cumsum(new) - 1
    return np.column_stack([article, np.arange(rows) - np.flatnonzero(new)[article]]).astype(np.int32)


def payload(rows: int = ROWS, seed: int = 0, out: str | os.PathLike[str] | None = None) -> fastlvm.Payload:
    """The made payload of `rows` rows, from its folder (default: below build/) or written there first.

    The same sources, rows and seed give the same vectors (on one machine: a matrix product rounds as its processor
    does). Raises InputError for bad sources or arguments, and where `out` holds something else; IntegrityError where it
    is damaged.
    """
    for name, value, least in (("rows", rows, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}, and a whole number from {least} on is wanted")
    real = sources()
    digest = sha256_json([RECIPE, rows, seed, real.names, real.hashes])[:12]
    by = f"by bench/make_payload.py, seed {seed}"
    source = f"made from {', '.join(real.names)} ({len(real.articles):,} rows) {by}, recipe {RECIPE}, hash {digest}"
    target = BUILD / f"payload-{rows}-{digest}" if out is None else Path(out)
    if (target / "payload.json").exists():
        found = fastlvm.Payload.open(target)
        if found.provenance.source != source:
            raise InputError(f"{target} holds another payload than the one asked for: remove it or name another --out")
        return found
    check_new_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            path = Path(scratch) / "vectors.npy"
            with path.open("wb") as file:
                shape = (rows, real.vectors.shape[1])
                head = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
                for block, _ in made(real.vectors, real.articles, rows, seed):
                    file.write(block.tobytes())
            vectors = map_array(path, "float16", shape, "make it again")
            keys = _keys(real.articles, rows, seed)
            encoder = f"made from {', '.join(real.names)} {by}"
            return fastlvm.Payload.build(
                target, vectors, keys, encoder=encoder, source=source, tool="bench/make_payload.py"
            )
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): make room or name another --out") from error


def statistics(vectors: np.ndarray, articles: np.ndarray, origins: np.ndarray | None = None) -> dict[str, float]:
    """What a search of `vectors` [N, dim] meets, by name.

    articles: int [N], rising. origins: int [N], the source article of each, for the share of other copies among what
    is found. A query is the mean of 5 neighbours, each weighing twice the one before, which are themselves left out;
    found are its K nearest by exact search. Lists are those of FAISS's IVF-Flat of ROWS_PER_LIST rows a list; a recall
    is the share of the found in so large a share of the lists, nearest first.
    """
    from fastlvm.retrieval.blas import faiss

    if len(vectors) < K + 5 or not (articles[4:] == articles[:-4]).any():
        raise InputError(f"{len(vectors)} rows are too few to check: {K + 5} and an article of 5 chunks are wanted")
    rng = np.random.default_rng(0)
    vectors = vectors.astype(np.float32)
    pairs = rng.choice(np.flatnonzero(articles[1:] == articles[:-1]), 20_000)
    adjacent = np.einsum("nd,nd->n", vectors[pairs], vectors[pairs + 1])
    left, right = rng.integers(len(vectors), size=(2, 20_000))
    apart = articles[left] != articles[right]
    random = np.einsum("nd,nd->n", vectors[left[apart]], vectors[right[apart]])

    firsts = rng.choice(np.flatnonzero(articles[4:] == articles[:-4]), QUERIES)
    context = firsts[:, None] + np.arange(5)  # [Q, 5]
    queries = table.normalised(np.einsum("k,qkd->qd", 2.0 ** np.arange(5), vectors[context]))
    scores, ids = faiss.knn(queries, vectors, K + 5, metric=faiss.METRIC_INNER_PRODUCT)
    left_out = (ids[:, :, None] == context[:, None]).any(axis=2)
    best = np.argsort(left_out, axis=1, kind="stable")[:, :K]
    scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)

    lists = max(1, len(vectors) // ROWS_PER_LIST)
    coarse = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(coarse, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.train(vectors)
    list_of = coarse.search(vectors, 1)[1][:, 0]
    sizes = np.bincount(list_of, minlength=lists)
    rank = np.argsort(coarse.search(queries, lists)[1], axis=1)  # [Q, lists]
    ranks = np.take_along_axis(rank, list_of[ids], 1)
    own = articles[ids] == articles[firsts, None]
    found = {"rows": len(vectors), "lists": lists}
    found |= {"cosine of neighbours": adjacent.mean(), "… their deviation": adjacent.std()}
    found |= {"cosine of random rows": random.mean(), "… and deviation": random.std()}
    found |= {f"score at rank {at}": scores[:, at - 1].mean() for at in (1, 10, K)}
    found |= {"list sizes: variation": sizes.std() / sizes.mean()}
    found |= {"list sizes: imbalance": lists * (sizes.astype(float) ** 2).sum() / len(vectors) ** 2}
    found |= {f"recall@{K}, {share:.0%} of lists": (ranks < max(1, round(share * lists))).mean() for share in SHARES}
    found |= {"found in own article": own.mean()}
    if origins is not None:
        copies = (origins[ids] == origins[firsts, None]) & ~own
        found |= {"found in its copies": copies.mean(), "… of the first": copies[:, 0].mean()}
    return {name: float(value) for name, value in found.items()}


def check(made_payload: fastlvm.Payload, seed: int) -> str:
    """Statistics side by side: the sources, as many rows made from a sixth of their articles, and the made payload.

    The second column is the test of the recipe: had it made real articles, it would be as the first.
    """
    real = sources()
    articles = np.random.default_rng(seed).permutation(real.articles[-1] + 1)[::HELD_BACK]
    some = np.isin(real.articles, articles)
    part, numbers = real.vectors[some], np.unique(real.articles[some], return_inverse=True)[1]
    rows = len(real.articles)
    blocks = list(made(part, numbers, rows, seed))
    columns = [statistics(real.vectors, real.articles)]
    for vectors, source, of, n in (
        (np.concatenate([block for block, _ in blocks]), _keys(numbers, rows, seed)[:, 0], numbers, rows),
        (made_payload.vectors.view(np.ndarray), made_payload.keys[:, 0], real.articles, len(made_payload)),
    ):
        columns.append(statistics(vectors, source, of[np.concatenate(list(_copies(of, n, seed)))]))
    heads = ("real", f"made from 1/{HELD_BACK}", "made")
    lines = [" | ".join([f"{'':24}", *(f"{head:>13}" for head in heads)])]
    for name in columns[-1]:
        values = [column.get(name) for column in columns]
        cells = ["" if x is None else f"{x:,.0f}" if name in ("rows", "lists") else f"{x:.3f}" for x in values]
        lines.append(" | ".join([f"{name:24}", *(f"{cell:>13}" for cell in cells)]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder, or one that this script made (default: below build/)")
    parser.add_argument("--check", action="store_true", help="compare it with its sources (minutes)")
    options = parser.parse_args(arguments)
    try:
        found = payload(options.rows, options.seed, options.out)
        print(f"{found.path}: {len(found):,} x {found.dim}, {found.provenance.source}")
        if options.check:
            print(check(found, options.seed))
    except FastlvmError as error:
        print(f"make_payload.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
