"""A 4 GB index in 1 GB of memory: `python bench/mapped.py --index FOLDER`, a folder of kind ivf_rabitq.

Copies of the index's lists make it large: each has centroids of its own, turned away from the first by noise, so that a
query probes lists of all copies. What they hold does not matter here, only where it lies. A child is put into a control
group of its own (Linux, as root), opens the large index with its lists mapped and searches with the index's own window
queries; the table says how long a call takes, what it had to read and what was in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import fastlvm
from fastlvm.data import Payload
from fastlvm.retrieval import record
from fastlvm.retrieval.coding import quantised
from fastlvm.retrieval.rabitq import IvfRabitq
from fastlvm.retrieval.vectors import Vectors, representatives

K = 50
GIB = 1 << 30
NOISE = 0.2  # length of what a copy's centroids are turned by
GROUPS = Path("/sys/fs/cgroup")


def enlarge(source: Path, folder: Path, copies: int) -> None:
    """An index of `copies` times the rows of one that never grew."""
    found = record.read(source)
    meta = replace(found.meta, rows=copies * found.meta.rows, nlist=copies * (found.meta.nlist or 1))
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in IvfRabitq.FILES:
        part = np.load(source / name, mmap_mode="r")
        if name == "sizes.npy":
            np.save(folder / name, np.append(np.tile(part[:-1], copies), 0))
        elif name == "ids.npy":
            np.save(folder / name, np.concatenate([part + i * len(part) for i in range(copies)], dtype=np.int32))
        elif name == "centroids.npy":
            scales = np.load(source / "centroid_scales.npy")
            rows = part * scales[:, None]
            turned = [rows + i * NOISE / part.shape[1] ** 0.5 * noise(rng, rows) for i in range(copies)]
            together = np.concatenate(turned)
            codes, scales = quantised(together / np.linalg.norm(together, axis=1, keepdims=True))
            np.save(folder / name, codes)
            np.save(folder / "centroid_scales.npy", scales)
        elif name in ("blocks.npy", "codes.npy", "scales.npy"):
            to = np.lib.format.open_memmap(folder / name, "w+", part.dtype, (copies * len(part), *part.shape[1:]))
            for i in range(copies):
                to[i * len(part) : (i + 1) * len(part)] = part
            del to
        elif name != "centroid_scales.npy":
            np.save(folder / name, part)
    n = len(np.load(folder / "ids.npy", mmap_mode="r"))
    meta = replace(meta, rows=n)
    np.save(folder / "keys.npy", np.stack(np.divmod(np.arange(n, dtype=np.int32), 100), axis=1))
    np.save(folder / "groups.npy", np.arange(n))
    record.write(folder, meta)


def noise(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    return rng.standard_normal(like.shape, np.float32)


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A control group whose processes have so much memory, the page cache of what they read included."""
    first = (GROUPS / "memory").is_dir()  # version 1
    group = (GROUPS / "memory" if first else GROUPS) / f"fastlvm-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(nbytes))
        yield group / "cgroup.procs"
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def forget(folder: Path) -> None:
    """Nothing of its files stays in the page cache, where it would count as its writer's memory."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and of files."""
    found = {"anonymous": 0, "file": 0}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found["anonymous" if name == "RssAnon" else "file"] = 1024 * int(value.split()[0])
    return found


def search(folder: Path, queries: np.ndarray, calls: int, mapped: bool) -> dict[str, Any]:
    """Run by the child."""
    start = time.perf_counter()
    index = fastlvm.Index.open(folder, mapped=mapped)
    opened = time.perf_counter() - start
    faults, read = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, bytes_read()
    seconds = []
    for i in range(calls):
        query = queries[i % len(queries)]
        start = time.perf_counter()
        index.search(query, K)
        seconds.append(time.perf_counter() - start)
    p50, p95, p99 = (1e3 * np.percentile(seconds, [50, 95, 99])).tolist()
    return {
        "rows": len(index),
        "options": index.options,
        "open_s": opened,
        "calls": calls,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "faults_a_call": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / calls,
        "read_a_call": (bytes_read() - read) / calls,
        **resident(),
    }


def bytes_read() -> int:
    """From disks, by this process."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="folder of an index of kind ivf_rabitq")
    parser.add_argument("--payload", type=Path, required=True, help="folder of its payload, for the queries")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--limit", type=float, default=1.0, help="GiB of memory")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(search(given.index, np.load(given.child), given.calls, mapped=True)))
        return
    payload = Payload.open(given.payload)
    vectors = Vectors(payload, fastlvm.Space.identity(payload.dim), representatives(payload.groups))
    with tempfile.TemporaryDirectory(dir=given.index.parent) as scratch:
        large, queries = Path(scratch) / "large", Path(scratch) / "queries.npy"
        enlarge(given.index, large, given.copies)
        np.save(queries, vectors.windows(given.calls, 2))
        size = sum(file.stat().st_size for file in large.iterdir())
        forget(large)
        with limited(int(given.limit * GIB)) as procs:
            own = [sys.executable, __file__, "--index", str(large), "--payload", str(given.payload)]
            child = subprocess.run(
                [*own, "--child", str(queries), "--calls", str(given.calls)],
                check=True,
                stdout=subprocess.PIPE,
                preexec_fn=lambda: procs.write_text(str(os.getpid())) and None,
            )
    found = json.loads(child.stdout)
    print(json.dumps({"bytes": size, "limit": int(given.limit * GIB), **found}, indent=2))


if __name__ == "__main__":
    main()
