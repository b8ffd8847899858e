"""Gates as TOML files: which figures have to reach which bounds.

about = "what the gate is for"      wanted
split = "test"                      the report has to be of this split; left out, of any
threads = 2                         time is taken on so many threads; left out, on any number

[[limit]]                           one or more, each of one figure and one bound
metric = "R@5"                      any metric of a report, over the whole payload, the context left out
at_least = 0.4                      or at_most, above, below

[[limit]]
metric = "R@5"
rows = "macro"                      section of the report: excluded, included, macro, within_article or ann (the index)
at_least = 0.4

[[limit]]
metric = "R@5"
over = "whitened mixture"           the difference to this ranker, by the worse end of its interval
above = 0.0

[[limit]]
metric = "cosine"
domain = "out"                      of a second report, from another corpus
at_least = 0.15

[[limit]]
latency = "total"                   milliseconds of model, search, rerank or total, one context a call
percentile = "p95"                  p50, p95 or p99
at_most = 1.45

[[limit]]
search = "recall@50"                share of the 50 nearest by exact search that the index finds
at_least = 0.95
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlvm import gates
from fastlvm.errors import InputError, brief, shown
from fastlvm.evaluation.metrics import METRICS, WITHIN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECALL = "recall@50"
STAGES = ("model", "search", "rerank", "total")
PERCENTILES = ("p50", "p95", "p99")
ROWS = ("excluded", "included", "macro", "within_article", "ann")
SPLITS = ("train", "validation", "test")
DOMAINS = ("in", "out")

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("≥", operator.ge),
    "at_most": ("≤", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}
# What a limit may hold by what it is of, each with what it may be; () is any text.
_ENTRIES: dict[str, dict[str, tuple[str, ...]]] = {
    "metric": {"metric": METRICS, "rows": ROWS, "over": (), "domain": DOMAINS},
    "latency": {"latency": STAGES, "percentile": PERCENTILES},
    "search": {"search": (RECALL,)},
}


@dataclass(frozen=True)
class Limit:
    """One figure and its bound.

    kind       "metric", "latency" or "search".
    figure     a metric's name, a stage's, or "recall@50".
    compare    "at_least", "at_most", "above" or "below" `bound`: milliseconds for latency, fractions for shares.
    """

    kind: str
    figure: str
    compare: str
    bound: float
    percentile: str = ""
    rows: str = "excluded"
    over: str = ""
    domain: str = "in"

    @property
    def name(self) -> str:
        """The figure in a few words, such as "R@5 over whitened mixture" or "total_p95_ms"."""
        if self.kind == "latency":
            return f"{self.figure}_{self.percentile}_ms"
        rows = "" if self.rows == "excluded" else f" ({self.rows})"
        over = f" over {self.over}" if self.over else ""
        return f"{'out-of-domain ' if self.domain == 'out' else ''}{self.figure}{rows}{over}"

    @property
    def wanted(self) -> str:
        return f"{_BOUNDS[self.compare][0]} {self.bound:g}"

    @property
    def upward(self) -> bool:
        """Whether a larger figure is a better one."""
        return self.compare in ("at_least", "above")

    def passed(self, value: float) -> bool:
        return _BOUNDS[self.compare][1](value, self.bound)

    def entry(self) -> dict[str, Any]:
        """The limit as its file has it, with what was left out."""
        told = {key: getattr(self, key) for key in _ENTRIES[self.kind] if key != self.kind}
        return {self.kind: self.figure, **told, self.compare: self.bound}


@dataclass(frozen=True)
class Gate:
    """What has to hold: `split` and `threads` None are any. See the module for its file."""

    name: str
    about: str
    limits: tuple[Limit, ...]
    split: str | None = None
    threads: int | None = None


def load_gate(gate: str | os.PathLike[str]) -> Gate:
    """The gate of a name that comes with fastlvm, or of a TOML file's path.

    Raises InputError for a gate that is not known, and for a file that holds none: it names the entry.
    """
    text = os.fspath(gate)
    if text in gates.names():
        return _read(gates.FOLDER / f"{text}.toml")
    if not text.endswith(".toml"):
        known = ", ".join(gates.names())
        raise InputError(f"gate {text!r} is not known: choose one of {known}, or name a .toml file")
    return _read(Path(text))


def _read(path: Path) -> Gate:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(gates.names())
        raise InputError(f"gate {path} does not exist: name a .toml file that does, or one of {known}") from None
    except OSError as error:
        raise InputError(f"gate {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of UTF-8 or of TOML
        raise InputError(f"gate {path} is not valid TOML ({brief(error)}): correct it") from error
    return parse_gate(raw, path.stem, str(path))


def parse_gate(raw: Mapping[str, Any], name: str, where: str) -> Gate:
    """A gate of the content of its file; `where`: how errors call it. Raises InputError that names the entry."""
    where = f"gate {where}"
    _refuse_unknown(raw, ("about", "split", "threads", "limit"), where)
    about, threads, limits = raw.get("about"), raw.get("threads"), raw.get("limit")
    if not isinstance(about, str) or not about.strip():
        raise InputError(f"{where} has about {shown(about)}, and a sentence that says what it is for is wanted")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"{where} has threads {shown(threads)}, and a whole number from 1 on is wanted")
    split = _chosen(raw, "split", SPLITS, where) if "split" in raw else None
    if not isinstance(limits, list) or not limits:
        raise InputError(f"{where} has limit {shown(limits)}, and one or more tables are wanted: write [[limit]]")
    found = tuple(_limit(entry, f"{where}: limit {number}") for number, entry in enumerate(limits, 1))
    return Gate(name, about, found, split, threads)


def _limit(entry: Any, where: str) -> Limit:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is {shown(entry)}, and a table is wanted: write [[limit]]")
    kind = _only_one(entry, tuple(_ENTRIES), where)
    compare = _only_one(entry, tuple(_BOUNDS), where)
    takes = _ENTRIES[kind]
    _refuse_unknown(entry, (*takes, *_BOUNDS), where)
    given = {key: _chosen(entry, key, known, where) for key, known in takes.items() if key in entry}
    if kind == "latency" and "percentile" not in entry:
        raise InputError(f"{where} has no percentile, and one of {', '.join(PERCENTILES)} is wanted")
    limit = Limit(kind, given.pop(kind), compare, 0.0, **given)
    _check_metric(limit, where)
    low, high, what = _range(limit)
    bound = entry[compare]
    if type(bound) not in (int, float) or not math.isfinite(bound) or not low <= bound <= high:
        raise InputError(f"{where} has {compare} {shown(bound)} for {limit.name}, and {what} is wanted")
    return Limit(kind, limit.figure, compare, float(bound), **given)


def _check_metric(limit: Limit, where: str) -> None:
    """Refuse what no report has."""
    if limit.over and limit.rows != "excluded":
        raise InputError(f"{where} has over and rows {limit.rows!r}, and differences leave the context out: drop rows")
    if limit.rows == "within_article" and limit.figure not in WITHIN:
        raise InputError(f"{where} has metric {limit.figure!r} within_article: choose of {', '.join(WITHIN)}")
    if limit.figure == "median_rank" and limit.over:
        raise InputError(f"{where} has over and metric 'median_rank', of which a report has no difference: drop over")
    lacks = {"macro": ("median_rank",), "ann": ("MRR", "median_rank", "cosine")}.get(limit.rows, ())
    if limit.figure in lacks:
        raise InputError(f"{where} has rows {limit.rows!r}, of which a report has no {limit.figure}: drop rows")


def _range(limit: Limit) -> tuple[float, float, str]:
    """Least and largest sensible bound, and both in words."""
    if limit.kind == "latency":
        return math.ulp(0.0), math.inf, "milliseconds above 0"
    if limit.over:
        return -1.0, 1.0, "a difference from -1 to 1"
    if limit.figure == "cosine":
        return -1.0, 1.0, "a cosine from -1 to 1"
    if limit.figure == "median_rank":
        return 1.0, math.inf, "a rank from 1 on"
    return 0.0, 1.0, "a share from 0 to 1 (40 % is 0.4)"


def _only_one(entry: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    given = [key for key in keys if key in entry]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InputError(f"{where} has {found} of {', '.join(keys)}, and exactly one is wanted")
    return given[0]


def _chosen(entry: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value or (known and value not in known):
        wanted = f"one of {', '.join(known)}" if known else "the name of a ranker"
        raise InputError(f"{where} has {key} {shown(value)}, and {wanted} is wanted")
    return value


def _refuse_unknown(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise InputError(f"{where} has {shown(key)}, which is nothing it takes: choose of {', '.join(known)}")
