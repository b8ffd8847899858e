"""What a user waits for, context vectors in and ids of the 50 nearest chunks out: against rivals, and the gates.

Over 584,545 × 768 (or --gate-rows) and one context a call, another one each time. A gate that is missed fails.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forward_rivals
import gate_rivals
import paired
from contenders import BEST
from fastlvm import gates
from fastlvm.evaluation import latency_gate, load_gate
from fastlvm.retrieval.rerank import RERANKERS
from forward_cases import CHECKED, RIVAL_COSINE, TIMED_CALLS, WARM_CALLS
from gate_cases import CLIENTS, REAL, RECALLED, STAGES, K
from gate_results import OURS
from gate_rivals import HNSW, RIVALS, SEEDS, caller
from gate_setup import Setup
from paired import Contender, measure, pin

GATES = {gate.name: gate for gate in map(load_gate, gates.names()) if latency_gate.is_judged(gate)}
CALLS = 70  # consecutive calls for one of --bench-rounds
WARM = 0.05  # of those, made before and not timed
RERANKED = 10  # of each reranker, for one of --bench-rounds
BATCH_ROUNDS = 10  # of --bench-rounds for one of the batches
EAGER, OPENVINO = "PyTorch fp32", "OpenVINO bf16"


class Contest:
    """Ours and the rivals over the same payload; a rival that cannot be had is in the results' `reasons`."""

    def __init__(self, made: Setup, options: Any, folder: Path, results: Any) -> None:
        self.made, self.results, self._folder = made, results, folder
        index = made.predictor.index
        found = made.predictor.search(made.contexts[:RECALLED], K).ids
        results.setting = {
            "rows": len(made.payload),
            "dim": made.payload.dim,
            "payload": made.payload.id,
            "kind": index.kind,
            "options": index.options,
            "weight_bytes": made.predictor.nbytes,
            "search_bytes": index._searcher.reads(made.predicted[:RECALLED]),
            "reals": made.reals,
        }
        self.add_index(OURS, made.own, made.recall(found))
        self.engines: dict[str, Any] = {}
        for name in RIVALS:
            reason = self._load(name, options)
            if reason:
                results.reasons[name] = reason

    def add_index(self, name: str, about: dict[str, Any], recall: float) -> None:
        self.results.indexes[name] = {
            "options": about["options"],
            "recall": recall,
            "recall_chosen": about["recall"],
            "bytes_per_row": about["bytes"] / len(self.made.payload),
            "build_s": about["build_s"],
        }

    def _load(self, name: str, options: Any) -> str:
        """Why the rival is not timed, or ""."""
        made = self.made
        if not gate_rivals.kept(name, made.rivals_folder):
            if options.gate_kept:
                return "it was not built for this run (--gate-kept)"
            if name == HNSW and not options.gate_hnsw:
                return "it takes long to build: --gate-hnsw"
        try:
            engine, about = gate_rivals.load(name, made.rivals_folder, lambda: made.builder)
            made.builder.share(engine)
            found = engine.search(made.predicted[:RECALLED], made.threads)
        except ImportError as error:
            return f"cannot be imported: {error}"
        except Exception as error:  # whatever a rival throws
            return f"cannot be run: {forward_rivals.described(error)}"
        reached = made.recall(np.where(found >= 0, made.vectors.rows[found], -1))
        self.add_index(name, about, reached)
        if name != SEEDS and about["recall"] < gate_rivals.ASKED:
            return f"its recall reaches {about['recall']:.4f} on the queries its setting is chosen on"
        self.engines[name] = engine
        return ""

    def ours(self, stage: str, threads: int) -> Contender:
        made = self.made
        call, given = {
            "model": (made.predictor.predict, made.contexts),
            "search": (lambda query: made.predictor.index.search(query, K), made.predicted),
            "end_to_end": (lambda context: made.predictor.search(context, K), made.contexts),
        }[stage]
        return _tried(Contender(OURS, caller(call, given), threads, BEST, decisive=True))

    def search(self, name: str, threads: int) -> Contender:
        engine = self.engines[name]
        call = caller(lambda query: engine.search(query, threads), self.made.predicted)
        return _tried(Contender(name, call, threads, BEST))

    def forwards(self, threads: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Those of the rivals that load."""
        source = forward_rivals.Source(self.made.module, self.made.contexts[:1], self._folder)
        found = {}
        for rival in forward_rivals.RIVALS:
            if rival.name in (EAGER, OPENVINO):
                pin(threads, BEST)
                call, reason = forward_rivals.load(rival, source, threads)
                if call is not None:
                    reason = self._unlike(call)
                if reason:
                    self.results.reasons[rival.name] = reason
                else:
                    found[rival.name] = call
        return found

    def _unlike(self, forward: Callable[[np.ndarray], np.ndarray]) -> str:
        """Why a forward is not that of our model, or ""."""
        found = np.concatenate([forward(one[None]) for one in self.made.contexts[:CHECKED]])
        least = float(np.einsum("qd,qd->q", found, self.made.predicted[:CHECKED]).min())
        return "" if least >= RIVAL_COSINE else f"its cosine to our predictions falls to {least:.4f}"

    def quickest(self, threads: int) -> str | None:
        """The FAISS index of the quickest single query at the recall."""
        times = {
            name: self.made.builder.milliseconds(engine, threads)
            for name, engine in self.engines.items()
            if isinstance(engine, gate_rivals.Faiss) and name != SEEDS
        }
        return min(times, key=lambda name: times[name]) if times else None

    def chains(self, threads: int) -> tuple[list[Contender], list[Contender]]:
        """The rivals' models by themselves, and with a search after them."""
        models, whole = [], []
        for name, forward in self.forwards(threads).items():
            models.append(_tried(Contender(name, caller(forward, self.made.contexts), threads, BEST)))
            other = SEEDS if name == EAGER else self.quickest(threads)
            if other in self.engines:
                engine = self.engines[other]

                def both(context: np.ndarray, forward: Any = forward, engine: Any = engine) -> np.ndarray:
                    return engine.search(np.ascontiguousarray(forward(context)), threads)

                call = caller(both, self.made.contexts)
                whole.append(_tried(Contender(f"{name} + {other}", call, threads, BEST)))
        return models, whole


def _tried(one: Contender) -> Contender:
    for _ in range(2):
        one.trial()
    return one


@pytest.fixture(scope="module")
def contest(request, threads, gate_results, tmp_path_factory):
    options = request.config.option
    made = Setup(options.gate_rows, threads[-1])
    return Contest(made, options, tmp_path_factory.mktemp("gate"), gate_results)


@pytest.fixture(autouse=True)
def unpinned(threads):
    yield
    pin(threads[-1], BEST)


@pytest.mark.benchmark(group="gate: consecutive calls")
@pytest.mark.parametrize("count", (2, 1))
@pytest.mark.parametrize("stage", STAGES)
def test_calls(benchmark, contest, stage, count, threads, plan, gate_results):
    if count not in threads:
        pytest.skip(f"{count} threads are not to be had here")
    assert contest.made.realism >= REAL, contest.made.reals
    one = contest.ours(stage, count)
    one.pin()
    for _ in range(int(WARM * CALLS * plan.rounds)):
        one.call()
    benchmark.pedantic(one.call, rounds=CALLS * plan.rounds)
    if benchmark.stats is not None:
        gate_results.add_calls(stage, count, benchmark.stats.stats.data)


@pytest.mark.benchmark(group="gate: rounds in turn")
def test_rounds(benchmark, contest, threads, plan, gate_results):
    rounds = paired.Plan(plan.rounds, plan.patience, warm=WARM_CALLS, burst=TIMED_CALLS)
    by_stage: dict[str, list[Contender]] = {stage: [] for stage in STAGES}
    for n in threads:
        models, whole = contest.chains(n)
        searches = [contest.search(name, n) for name in contest.engines]
        for stage, rivals in zip(STAGES, (models, searches, whole), strict=True):
            by_stage[stage] += [contest.ours(stage, n), *rivals]
    together = [one for contenders in by_stage.values() for one in contenders]
    lead = next(one for one in reversed(by_stage["end_to_end"]) if one.name == OURS)
    measure(benchmark, lead, [one for one in together if one is not lead], rounds)
    for stage, contenders in by_stage.items():
        gate_results.add_paired(stage, contenders)


@pytest.mark.benchmark(group="gate: several clients")
@pytest.mark.parametrize("count", (2, 1))
@pytest.mark.parametrize("clients", CLIENTS)
def test_load(benchmark, contest, clients, count, threads, plan, gate_results):
    if count not in threads:
        pytest.skip(f"{count} threads are not to be had here")
    pin(count, BEST)
    calls = max(1, CALLS * plan.rounds // clients)
    seconds, elapsed = benchmark.pedantic(
        lambda: under_load(contest.made.predictor, contest.made.contexts, clients, calls), rounds=1
    )
    gate_results.add_load(clients, count, seconds, elapsed)


def under_load(predictor: Any, contexts: np.ndarray, clients: int, calls: int) -> tuple[list[float], float]:
    """Seconds of each of `calls` searches by each of `clients` threads at once, and of all of them together."""
    barrier = threading.Barrier(clients + 1)
    seconds: list[list[float]] = [[] for _ in range(clients)]
    failed: list[Exception] = []

    def client(number: int) -> None:
        own = contexts[number::clients]
        try:
            for warm in range(20):
                predictor.search(own[warm % len(own)], K)
            barrier.wait()
            for call in range(calls):
                start = time.perf_counter()
                predictor.search(own[call % len(own)], K)
                seconds[number].append(time.perf_counter() - start)
        except Exception as error:  # raised again where the test sees it
            failed.append(error)
            barrier.abort()

    started = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for one in started:
        one.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait()
    start = time.perf_counter()
    for one in started:
        one.join()
    elapsed = time.perf_counter() - start
    if failed:
        raise failed[0]
    return [each for own in seconds for each in own], elapsed


@pytest.mark.benchmark(group="gate: rerankers")
@pytest.mark.parametrize("count", (2, 1))
@pytest.mark.parametrize("name", RERANKERS)
def test_reranker(benchmark, contest, name, count, threads, plan, gate_results):
    if count not in threads:
        pytest.skip(f"{count} threads are not to be had here")
    made, stage = contest.made, RERANKERS[name]()
    costs: list[dict[str, float]] = []

    def rerank(number: int) -> None:
        start = time.perf_counter()
        found = made.predictor.rerank(made.contexts[number], [stage], K, key=made.last_keys[number])
        whole = time.perf_counter() - start
        inputs, own = found.stages
        costs.append({"inputs": inputs.ms / 1e3, "stage": own.ms / 1e3, "end_to_end": whole})

    pin(count, BEST)
    calls = caller(rerank, np.arange(len(made.contexts)))
    benchmark.pedantic(calls, rounds=RERANKED * plan.rounds)
    gate_results.add_reranker(name, stage.uses_keys, count, costs[int(WARM * len(costs)) :])


@pytest.mark.benchmark(group="gate: a batch of queries")
def test_batch(benchmark, contest, threads, plan, gate_results):
    queries, n = contest.made.predicted, threads[-1]
    index = contest.made.predictor.index
    ours = Contender(OURS, lambda: index.search(queries, K), n, BEST)
    others = [
        Contender(name, lambda engine=engine: engine.search(queries, n), n, BEST)
        for name, engine in contest.engines.items()
    ]
    for one in (ours, *others):
        one.trial()
    measure(benchmark, ours, others, paired.Plan(max(1, plan.rounds // BATCH_ROUNDS), plan.patience))
    for one in (ours, *others):
        if one.seconds:
            gate_results.add_batch(one.name, n, len(queries), one.seconds)


@pytest.mark.benchmark(group="gate: verdicts")
@pytest.mark.parametrize("name", GATES)
def test_gate(benchmark, contest, name, threads, gate_results):
    """Judged by the consecutive calls above; what these did not measure fails too."""
    gate = GATES[name]
    count = gate.threads or threads[-1]
    if count not in threads:
        pytest.skip(f"{count} threads are not to be had here")
    benchmark.pedantic(contest.ours("end_to_end", count).call, rounds=1)  # --benchmark-only skips who times nothing
    if benchmark.stats is None:
        pytest.skip("nothing is timed, so nothing can be judged")
    verdicts = [one for one in latency_gate.check(gate, gate_results.figures(count)) if one.judged]
    gate_results.add_verdicts(verdicts, count)
    missed = [str(one) for one in verdicts if one.missed]
    assert not missed, f"gate {name} missed on {count} threads: {'; '.join(missed)}"
