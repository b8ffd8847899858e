"""The tables of a run of the Apple bench, as Markdown: `python bench/apple_table.py FILE.json`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import figure, ratio, section

Row = dict[str, Any]
_MARK = " (dry run)"


def markdown(data: dict[str, Any]) -> str:
    rows: list[Row] = data["rows"]
    mark = _MARK if data["dry_run"] else ""
    parts = []
    if mark:
        parts.append("**A dry run on mlx's CPU device, in small sizes: no figure here says anything of a GPU.**")
    heads = ["op", "dtype", "cases", "failed", "worst error ÷ tolerance", "of", "runs on"]
    parts += [_head(data), section(f"Correctness{mark}", heads, _checked(rows))]
    parts.append(section(f"Failed{mark}", ("case", "array", "error", "tolerance", "measure"), _failed(rows)))
    heads = ["row", "contender", "ms", "p10 to p90", "queued, ms", "÷ fastlvm", "share of the bound", "error"]
    parts.append(section(f"Times{mark}", heads, _times(rows, mark)))
    parts.append(section(f"Not measured{mark}", ("row", "contender", "why"), _missing(rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(data: dict[str, Any]) -> str:
    facts = [str(value) for value in data["machine"].values()]
    facts += [f"{name} {version}" for name, version in data["versions"].items()]
    facts += [data["date"], f"commit {data['commit']}" if data["commit"] else ""]
    if data.get("bytes_per_s"):
        facts.append(f"a copy moves {data['bytes_per_s'] / 1e9:.1f} GB/s")
    return (
        f"{data['device']}; {'; '.join(fact for fact in facts if fact)}.\n\n"
        "Medians of paired rounds after warm-up, over inputs that rotate. “ms” is one call that is waited for, “queued”"
        " a call among several that are waited for once. The bound is every input read and every output written once, "
        "at the speed of the copy, against the shorter of the two."
    )


def failed(rows: Iterable[Row]) -> list[Row]:
    """Rows whose result is wrong or, in the check, is not there."""
    return [row for row in rows if row.get("ok") is False]


def _checked(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    checks = [row for row in rows if row["kind"] == "check"]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in checks):
        mine = [row for row in checks if (row["op"], row["dtype"]) == (op, dtype)]
        worst = max((row for row in mine if "worst" in row), key=_share, default=None)
        backends = sorted({row["backend"] for row in mine if "backend" in row})
        yield (
            op,
            dtype,
            str(len(mine)),
            str(len(failed(mine))),
            "" if worst is None else f"{_share(worst):.2g}",
            "" if worst is None else f"{worst['worst']['array']} of {worst['id']}",
            " and ".join(backends),
        )


def _share(row: Row) -> float:
    error = row["worst"]["error"]
    return float("inf") if error is None else error / row["worst"]["tolerance"]


def _failed(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    for row in failed(rows):
        for one in row.get("failures", ()):
            yield row["id"], one["array"], _number(one["error"]), f"{one['tolerance']:.1e}", one["measure"]
        for one in row.get("contenders", ()):
            if one.get("wrong"):
                yield (
                    row["id"],
                    one.get("error_of", "loss"),
                    _number(one.get("error")),
                    _number(one.get("tolerance")),
                    "",
                )
        if "reason" in row:
            yield row["id"], row["reason"], "", "", ""


def _number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.1e}"


def _times(rows: Sequence[Row], mark: str) -> Iterable[Sequence[str]]:
    for row in rows:
        timed = [one for one in row.get("contenders", ()) if "median_ms" in one]
        ours = _best(row["contenders"][0]) if timed else None
        for one in timed:
            times = ratio(_best(one), ours)
            share = ratio(row.get("bound", {}).get("ms"), _best(one))
            yield (
                row["title"],
                one["name"],
                figure(one["median_ms"]) + mark,
                f"{figure(one['p10_ms'])} to {figure(one['p90_ms'])}",
                figure(one["queued_ms"]) if "queued_ms" in one else "",
                "" if times is None else f"{times:.2f}",
                "" if share is None else f"{100 * share:.0f} %",
                _error(one),
            )


def _best(one: Row) -> float | None:
    return min((one[name] for name in ("median_ms", "queued_ms") if name in one), default=None)


def _error(one: Row) -> str:
    if "error" in one:
        return f"{'wrong: ' if one.get('wrong') else ''}{_number(one['error'])}"
    wrong = "wrong: " if one.get("wrong") else ""
    if "loss" not in one:
        return ""
    return f"{wrong}loss {'not finite' if one['loss'] is None else format(one['loss'], '.4f')}"


def _missing(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    for row in rows:
        if row["kind"] == "bench" and "reason" in row:
            yield row["title"], "", row["reason"]
        for one in row.get("contenders", ()):
            if "reason" in one:
                yield row["title"], one["name"], one["reason"]


if __name__ == "__main__":
    from fastlvm.files import read_json

    print(markdown(read_json(Path(sys.argv[1]))), end="")
