"""Collects bench_*.py, times calls with their percentiles, and says on which machine it ran.

The rows of the kernel, forward and gate benches are printed as tables at the end, and kept where --bench-results says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drop_in_table
import fastlvm
import forward_table
import gate_table
import make_payload
import table
from fastlvm.evaluation.latency import machine
from fastlvm.files import atomic_file, write_json
from forward_results import ForwardResults
from gate_results import GateResults
from paired import Plan
from results import Results, file_name

ROWS = pytest.StashKey[list[dict[str, Any]]]()
LINES = pytest.StashKey[list[str]]()
RESULTS = pytest.StashKey[Results]()
FORWARD = pytest.StashKey[ForwardResults]()
GATE = pytest.StashKey[GateResults]()
DROP_IN = pytest.StashKey[drop_in_table.DropIn]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlvm")
    group.addoption("--bench-rounds", type=int, default=30, help="rounds of a call below a second")
    group.addoption("--bench-patience", type=float, default=6.0, help="seconds for a rival of longer calls")
    group.addoption(
        "--bench-results", type=Path, help="folder to keep the tables of a whole run in, as JSON and Markdown"
    )
    group.addoption("--gate-rows", type=int, default=make_payload.ROWS, help="rows of the payload of the latency gate")
    group.addoption("--gate-kept", action="store_true", help="build no rival of the latency gate, time those there are")
    group.addoption("--gate-hnsw", action="store_true", help="build the latency gate's HNSW rival, which takes long")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    wanted = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if wanted and not parent.session.isinitpath(file_path):  # one named on the command line is collected anyway
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[LINES] = []
    plan = Plan(rounds=config.getoption("--bench-rounds"), patience=config.getoption("--bench-patience"))
    threads = sorted({1, min(2, fastlvm.get_num_threads())})
    config.stash[RESULTS] = Results(plan, threads)
    config.stash[FORWARD] = ForwardResults(plan, threads)
    config.stash[GATE] = GateResults(plan, threads)
    config.stash[DROP_IN] = drop_in_table.DropIn(plan, threads)


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    return request.config.stash[RESULTS].plan


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> list[int]:
    """The numbers of threads the kernels are timed on: 1, and 2 where there are as many."""
    return request.config.stash[RESULTS].threads


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def forward_results(request: pytest.FixtureRequest) -> ForwardResults:
    return request.config.stash[FORWARD]


@pytest.fixture(scope="session")
def gate_results(request: pytest.FixtureRequest) -> GateResults:
    return request.config.stash[GATE]


@pytest.fixture(scope="session")
def drop_in(request: pytest.FixtureRequest) -> drop_in_table.DropIn:
    return request.config.stash[DROP_IN]


@pytest.fixture(scope="session")
def lines(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print at the end."""
    return request.config.stash[LINES]


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`timed(call, **sizes)`: benchmark `call()` and record P50, P95 and P99 beside the sizes and the threads.

    once=True is for calls of seconds: one of them is timed, without a warm-up. Returns the last call's result.
    """

    def run(call: Callable[[], Any], once: bool = False, **sizes: Any) -> Any:
        benchmark.extra_info.update(sizes, threads=fastlvm.get_num_threads(), machine=machine())
        result = benchmark.pedantic(call, rounds=1) if once else benchmark(call)
        if benchmark.stats is not None:
            p50, p95, p99 = np.percentile(benchmark.stats.stats.data, [50, 95, 99]) * 1e3
            figures = {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}
            benchmark.extra_info.update(figures, calls=len(benchmark.stats.stats.data))
            request.config.stash[ROWS].append({"name": request.node.name, **benchmark.extra_info})
        return result

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    folder = config.getoption("--bench-results")
    _keep(terminalreporter, "kernels", config.stash[RESULTS], table.markdown, folder)
    _keep(terminalreporter, "forward", config.stash[FORWARD], forward_table.markdown, folder)
    _keep(terminalreporter, "gate", config.stash[GATE], gate_table.markdown, folder)
    _keep(terminalreporter, "drop-in", config.stash[DROP_IN], drop_in_table.markdown, folder)
    if config.stash[LINES]:
        terminalreporter.section("InfoNCE, milliseconds a call: median (10 % to 90 %), rounds")
    for line in config.stash[LINES]:
        terminalreporter.write_line(line)
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("percentiles, milliseconds a call")
    width = max(len(row["name"]) for row in rows)
    terminalreporter.write_line(f"{'':<{width}}{'P50':>10}{'P95':>10}{'P99':>10}{'calls':>8}")
    for row in rows:
        figures = "".join(f"{row[name]:>10.3f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        terminalreporter.write_line(f"{row['name']:<{width}}{figures}{row['calls']:>8}")
    terminalreporter.write_line(f"{rows[0]['machine']}; kernel threads: {rows[0]['threads']}")


def _keep(
    terminalreporter: Any,
    title: str,
    results: Results | ForwardResults | GateResults | drop_in_table.DropIn,
    markdown: Callable[[dict[str, Any]], str],
    folder: Path | None,
) -> None:
    """Print the tables of a run, and keep those of a whole one."""
    if not results.any:
        return
    data = results.data()
    terminalreporter.section(title)
    terminalreporter.write_line(markdown(data))
    if folder is None:
        return
    if not results.complete():
        terminalreporter.write_line(f"not written to {folder}: some of it has not been timed")
        return
    name = file_name(title, data)
    write_json(folder / f"{name}.json", data)
    with atomic_file(folder / f"{name}.md") as temporary:
        temporary.write_text(markdown(data), encoding="utf-8")
    terminalreporter.write_line(f"written to {folder / name}.json and .md")
