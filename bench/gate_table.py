"""The tables of a run of the gate bench, as Markdown.

python bench/gate_table.py bench/results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gate_cases import K
from gate_results import OURS
from table import figure, section

_SHOWN = {"model": "model", "search": "search", "end_to_end": "end to end"}
_OPTIONS = {"setting": "probed or expanded"}
_TIMES = ("median", "P95", "P99")


def markdown(data: dict[str, Any]) -> str:
    load = "" if data["load"] is None else f" Load average before the run: {data['load']:.2f}."
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    parts = [
        f"{data['machine']}; {data['isa']}; {data['date']}. {versions}.{load}",
        _described(data),
        section("Gates", ("gate", "threads", "figure", "wanted", "measured", ""), _verdicts(data)),
        section("Consecutive calls, milliseconds", ("", "threads", "calls", *_TIMES), _calls(data)),
        section(
            "Rounds in turn, milliseconds",
            ("", "", "threads", "calls", *_TIMES, "median ÷ ours"),
            _paired(data),
        ),
        "In a round everybody in turn makes 20 calls and then 4 that are timed, or only these where one takes 50 ms."
        if data["paired"]
        else "",
        section(
            "Indexes",
            ("", "options", "recall@50", "bytes a row", "built and chosen in, s"),
            _indexes(data),
        ),
        section("Several clients of one predictor", ("clients", "threads", "calls", "a second", *_TIMES), _load(data)),
        section(
            f"A reranker after the search, of {K} candidates to as many, milliseconds",
            ("", "uses keys", "threads", "calls", "inputs, median", *_TIMES, "end to end, median", "P95"),
            _rerankers(data),
        ),
        section("A batch of queries", ("", "threads", "queries", "calls", "queries a second"), _batches(data)),
        section("Not timed", ("", "why"), data["reasons"].items()),
        "### What is timed\n\n"
        + "\n".join(f"- {_SHOWN.get(name, name)}: {how}" for name, how in data["timed"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _described(data: dict[str, Any]) -> str:
    if "rows" not in data:
        return ""
    asked = data["asked"]
    reals = "; ".join(f"{name} {r['first']:.3f} and {r['last']:.3f}" for name, r in data["reals"].items())
    return (
        f"{data['rows']:,} × {data['dim']}, payload {data['payload']}; index of {data['kind']}, {data['options']}. "
        f"A query reads {data['weight_bytes'] / 1e6:.1f} MB of weights and {data['search_bytes'] / 1e6:.2f} MB of the "
        f"index. Settings, ours and the rivals', are the smallest of recall@50 ≥ {asked['recall']} on "
        f"{asked['chosen_on']} predictions; recall is that of {asked['measured_on']:,} others, of other articles. "
        f"The head of the random model is {asked['head']} of the drawn one, so that predictions lie where real ones "
        f"do: mean scores of the nearest and the 50th chunk are, of {reals}."
    )


def _verdicts(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in data["verdicts"]:
        yield row["gate"], str(row["threads"]), row["metric"], row["wanted"], row["measured"], row["verdict"]


def _times(row: dict[str, Any]) -> list[str]:
    return [figure(row[which]) for which in ("p50_ms", "p95_ms", "p99_ms")]


def _calls(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in data["calls"]:
        yield _SHOWN[row["stage"]], str(row["threads"]), str(row["calls"]), *_times(row)


def _paired(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    ours = {(row["stage"], row["threads"]): row["p50_ms"] for row in data["paired"] if row["name"] == OURS}
    for row in data["paired"]:
        own = ours.get((row["stage"], row["threads"]))
        times = "–" if own is None else f"{row['p50_ms'] / own:.2f}"
        yield _SHOWN[row["stage"]], row["name"], str(row["threads"]), str(row["calls"]), *_times(row), times


def _indexes(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, row in data["indexes"].items():
        options = ", ".join(f"{_OPTIONS.get(key, key)} {value}" for key, value in row["options"].items())
        yield name, options, f"{row['recall']:.4f}", f"{row['bytes_per_row']:.0f}", f"{row['build_s']:.0f}"


def _load(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in data["load_rows"]:
        yield str(row["clients"]), str(row["threads"]), str(row["calls"]), f"{row['per_s']:.0f}", *_times(row)


def _rerankers(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in data["rerankers"]:
        stage, whole = row["stage"], row["end_to_end"]
        inputs = figure(row["inputs"]["p50_ms"])
        about = row["name"], "yes" if row["uses_keys"] else "no", str(row["threads"]), str(stage["calls"]), inputs
        yield *about, *_times(stage), figure(whole["p50_ms"]), figure(whole["p95_ms"])


def _batches(data: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in data["batches"]:
        yield row["name"], str(row["threads"]), str(row["queries"]), str(row["calls"]), f"{row['per_s']:.0f}"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
