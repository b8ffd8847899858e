"""Searches of four threads while a fifth adds and removes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from growing import KINDS, LISTS, ROWS, keys_of, payload_of, vectors_of

from fastlvm.data import Payload
from fastlvm.retrieval import Index
from fastlvm.retrieval.locks import SharedLock

STABLE = np.arange(0, ROWS, 3)


@pytest.fixture(scope="module")
def payload(tmp_path_factory) -> Payload:
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1)
    return payload_of(tmp_path_factory.mktemp("payload") / "p", vectors_of(0, ROWS), keys)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_searches_stay_right_while_rows_come_and_go(payload, tmp_path, kind, saved):
    """Rows that stay are found every time, none that was gone before a search began is, and keys are the ids'."""
    index = Index.build(payload, kind, recall=0.9, **LISTS.get(kind, {}))
    if saved:
        index.save(tmp_path / "i")
    every = payload.take(np.arange(ROWS))
    gone = np.zeros(100_000, bool)  # by id; set once the removal is done
    keys = np.full((100_000, 2), -1)
    keys[:ROWS] = payload.keys
    wrong: list[str] = []
    done = threading.Event()
    searches = [0] * 4

    def search(thread: int) -> None:
        rng = np.random.default_rng(thread)
        while not done.is_set():
            rows = rng.choice(STABLE, rng.integers(1, 4))
            exclude = None if thread % 2 else rng.choice(ROWS, 3)
            before = gone.copy()
            found = index.search(every[rows], int(rng.integers(1, 30)), exclude)
            there = found.ids >= 0
            if before[found.ids[there]].any():
                wrong.append(f"a row that was gone: {found.ids[there][before[found.ids[there]]]}")
            if exclude is None and (found.ids[:, 0] != rows).any():
                wrong.append(f"{found.ids[:, 0]} for {rows}")
            if (found.keys[there] != keys[found.ids[there]]).any() or (found.keys[~there] != -1).any():
                wrong.append("a key that is not the id's")
            if (np.diff(found.scores) > 0).any():
                wrong.append("scores that ascend")
            searches[thread] += 1

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + 1.0
        for step in range(10_000):
            if time.monotonic() > until and step >= 20:
                break
            count = 1 + step % 5
            ours = keys_of(1000 + step, count)
            keys[index.total : index.total + count] = ours
            ids = index.add(vectors_of(step + 1, count), ours)
            index.remove(ours[: count - 1])
            gone[ids[: count - 1]] = True
            base = 3 * step + 1
            if base < ROWS:
                index.remove(payload.keys[[base]])
                gone[base] = True
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert min(searches) >= 5 and step >= 20
    assert len(index) == index.total - gone.sum()


def test_neither_searches_nor_changes_wait_for_ever():
    lock, counts, done = SharedLock(), {"share": 0, "alone": 0}, threading.Event()
    inside = {"share": 0, "alone": 0}
    wrong = []

    def share():
        while not done.is_set():
            with lock:
                inside["share"] += 1
                if inside["alone"]:
                    wrong.append("shared while another had it alone")
                counts["share"] += 1

    def alone():
        while not done.is_set():
            with lock.alone():
                inside["alone"] += 1
                if inside["alone"] != 1:
                    wrong.append("two had it alone")
                counts["alone"] += 1
                inside["alone"] -= 1

    threads = [threading.Thread(target=target) for target in (share, share, share, alone, alone)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    done.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not wrong and min(counts.values()) > 20, counts


def test_who_wants_it_alone_waits_for_who_shares_it():
    lock, order = SharedLock(), []
    lock.__enter__()
    changer = threading.Thread(target=lambda: [order.append("alone") for _ in [0] if lock.alone().__enter__() is None])
    changer.start()
    time.sleep(0.05)
    assert order == []
    lock.__exit__()
    changer.join(10)
    assert order == ["alone"]


def test_an_error_inside_gives_it_back():
    lock = SharedLock()
    for block in (lock, lock.alone()):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
    with lock.alone():
        pass
    with lock:
        pass
