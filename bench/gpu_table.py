"""The table of a run of the GPU bench, as Markdown.

python bench/gpu_table.py FILE.json [LATER.json …] [--out FOLDER]: rows of a later file of the same device take the
place of those of an earlier one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TOLERANCE = {"bf16": 3e-2, "fp32": 5e-3}  # above it a result is called wrong
OURS = "fastlvm"


def gpu_file_name(data: dict[str, Any]) -> str:
    """Without an ending: after the device."""
    return "-".join(["gpu", *re.findall(r"[a-z0-9]+", data["device"]["name"].lower())])


def markdown(data: dict[str, Any]) -> str:
    device, rows = data.get("device", {"name": "no device"}), data["rows"]
    parts = []
    if data.get("settings", {}).get("rehearsal"):
        parts.append("**A rehearsal on a CPU: no figure here means anything.**")
    parts += [_head(data, device), _section("Targets", ("row", "target", "measured", ""), _targets(rows))]
    heads = (
        "row",
        "contender",
        "median, µs",
        "p10 to p90, µs",
        "÷ fastlvm",
        "error",
        "launches",
        "from Python, µs",
        "extra, MB",
    )
    parts.append(_section("Times", heads, _times(rows)))
    heads = (
        "row",
        "least work",
        "memory, µs",
        "exponentials, µs",
        "products, µs",
        "fastlvm, µs",
        "share of the bound",
        "MHz",
    )
    parts.append(_section("The device's own bound", heads, _bounds(rows)))
    missing = [
        (row["title"], one["name"], one["reason"]) for row in rows for one in row["contenders"] if "reason" in one
    ]
    missing += [(row["title"], "", row["reason"]) for row in rows if row.get("reason")]
    parts.append(_section("Not measured", ("row", "contender", "why"), missing))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(data: dict[str, Any], device: dict[str, Any]) -> str:
    clocks = (
        f"SM up to {device['clocks.max.sm']}, memory {device['clocks.max.mem']}" if "clocks.max.sm" in device else ""
    )
    driver = f"driver {device['driver_version']}" if "driver_version" in device else ""
    versions = ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items())
    limits = data.get("ceilings", {})
    seen = []
    if limits:
        seen = [
            f"copy {limits['bytes_per_s'] / 1e12:.2f} TB/s",
            f"products {limits['flops_bf16'] / 1e12:.0f} TFLOP/s in bf16 and {limits['flops_fp32'] / 1e12:.0f} in fp32",
        ]
    facts = [device["name"], driver, clocks, versions, data.get("date", ""), *seen]
    return (
        "; ".join(fact for fact in facts if fact) + ".\n\nMedians of calls in turn, after warm-up, over sets of inputs "
        "that reach past the L2 cache: by events around every call, or around a graph of one call for each set where "
        "a call takes under 2 ms. “From Python” is the time of such a call without a graph, many in flight."
    )


# --- targets


def verdict(row: dict[str, Any], target: dict[str, Any]) -> tuple[str, str]:
    """What was measured, and "met", "missed" or "not measured"."""
    ours = _one(row, row.get("ours", OURS))
    found = _JUDGES[target["kind"]](row, target, ours)
    if found is None:
        return "", "not measured"
    shown, good = found
    return shown, "met" if good else "missed"


def _faster(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    rival = _one(row, target["rival"])
    found = _ratio(rival.get("median_us"), ours.get("median_us"))
    return None if found is None else (f"{found:.2f} ×", found >= target["limit"])


def _slower(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    found = _ratio(ours.get("median_us"), _one(row, target["rival"]).get("median_us"))
    return None if found is None else (f"{found:.2f} ×", found <= target["limit"])


def _share(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    found = _ratio(row.get("bound", {}).get("us"), ours.get("median_us"))
    return None if found is None else (f"{100 * found:.0f} %", found >= target["limit"])


def _memory(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    rival = _one(row, target["rival"]).get("extra_mb")
    found = _ratio(ours.get("extra_mb"), rival)
    if found is None:
        return None
    return f"{ours['extra_mb']:.0f} MB against {rival:.0f} MB", found <= target["limit"]


def _p95(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    found = ours.get("p95_us")
    return None if found is None else (f"{found / 1e3:.3f} ms", found / 1e3 <= target["limit"])


def _rate(row: dict[str, Any], target: dict[str, Any], ours: dict[str, Any]) -> tuple[str, bool] | None:
    found = ours.get("per_s")
    return None if found is None else (f"{found:,.0f} {row.get('unit', '')}", found >= target["limit"])


_JUDGES = {"faster": _faster, "slower": _slower, "bound": _share, "memory": _memory, "p95": _p95, "rate": _rate}


def _one(row: dict[str, Any], name: str) -> dict[str, Any]:
    return next((one for one in row["contenders"] if one["name"] == name), {})


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# --- tables


def _targets(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        for target in row.get("targets", ()):
            yield (row["title"], target["text"], *verdict(row, target))


def _times(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        ours = _one(row, row.get("ours", OURS)).get("median_us")
        for one in row["contenders"]:
            if "median_us" not in one:
                continue
            factor = _ratio(one["median_us"], ours)
            yield (
                row["title"],
                one["name"],
                f"{one['median_us']:,.1f}",
                f"{one['p10_us']:,.1f} to {one['p90_us']:,.1f}",
                "" if factor is None else f"{factor:.2f}",
                _error(row, one),
                f"{one['launches']}, {one['how']}",
                f"{one['host_us']:,.0f}" if "host_us" in one else "",
                f"{one['extra_mb']:,.0f}" if "extra_mb" in one else "",
            )


def _error(row: dict[str, Any], one: dict[str, Any]) -> str:
    if "recall" in one:
        return f"recall {one['recall']:.3f}"
    if "error" not in one:
        return f"loss {one['loss']:.4f}" if "loss" in one else ""
    if one["error"] is None:
        return "wrong: not finite"
    wrong = one["error"] > TOLERANCE[row["dtype"]]
    return f"{'wrong: ' if wrong else ''}{one['error']:.1e}"


def _bounds(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        bound = row.get("bound")
        if not bound:
            continue
        ours = _one(row, OURS).get("median_us")
        share = _ratio(bound["us"], ours)
        work = f"{bound['megabytes']:,.0f} MB" + (f", {bound['exps'] / 1e6:,.0f}·10⁶ exp" if bound.get("exps") else "")
        parts = (bound.get(f"{name}_us") for name in ("memory", "exponentials", "products"))
        shown = ("" if part is None else f"{part:,.1f}" for part in parts)
        mhz = row.get("clock_mhz")
        yield (
            row["title"],
            work,
            *shown,
            "" if ours is None else f"{ours:,.1f}",
            "" if share is None else f"{100 * share:.0f} %",
            f"{mhz:.0f}" if mhz else "",
        )


def _section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"## {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])


# --- several files


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last run's head, and of every row the last one that was measured."""
    last = runs[-1]
    if any(run["device"]["name"] != last["device"]["name"] for run in runs):
        raise ValueError("the files are of different devices")
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["id"] not in rows or not row.get("reason"):
                rows[row["id"]] = row
    return {**last, "rows": list(rows.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder to keep what the files make together")
    given = parser.parse_args()
    from fastlvm.files import read_json

    data = merged([read_json(path) for path in given.files])
    if given.out is not None:
        from gpu import save

        print(save(given.out, data))
    else:
        print(markdown(data), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
