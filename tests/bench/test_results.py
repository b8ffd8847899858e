"""What bench/results/ keeps: tables that its JSON files print, in files named after who measured them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import drop_in_table
import forward_table
import gate_table
import gpu_table
import quality
import recipe
import table
from results import file_name

RESULTS = Path(table.__file__).parent / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_print_as_committed_under_the_name_of_their_machine(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    tables = {
        "drop-in": drop_in_table.markdown,
        "forward": forward_table.markdown,
        "gate": gate_table.markdown,
        "gpu": gpu_table.markdown,
        "kernels": table.markdown,
        "quality": quality.markdown,
        "recipe": recipe.markdown,
    }
    kind = next(kind for kind in tables if path.stem.startswith(kind))
    assert tables[kind](data) == path.with_suffix(".md").read_text(encoding="utf-8")
    if kind == "gpu":
        assert path.stem == gpu_table.gpu_file_name(data)
    else:
        assert path.stem == (f"{kind}-{data['corpus']}" if kind in ("quality", "recipe") else file_name(kind, data))


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        ("AMD EPYC, 2 cores, Linux x86_64", "amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor, 2 cores, Linux x86_64", "amd-epyc-7763"),
        ("Intel(R) Xeon(R) Processor, 2 cores, Linux x86_64", "intel-xeon"),
        ("Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz, 2 cores, Linux x86_64", "intel-xeon-platinum-8259cl"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz, 12 cores, Windows AMD64", "intel-core-i7-9750h"),
        ("Apple M1 Pro, 8 cores, Darwin arm64", "apple-m1-pro"),
        (", 1 cores, Linux riscv64", "unknown"),
    ],
)
def test_results_of_another_machine_or_of_fewer_threads_have_a_name_of_their_own(machine, slug):
    data = {"machine": machine, "isa": "avx512", "threads": [1, 2]}
    assert file_name("forward", data) == f"forward-avx512-{slug}-2-threads"
    assert file_name("kernels", data | {"threads": [1]}) == f"kernels-avx512-{slug}-1-threads"


def _only(data, names):
    """A result that holds these runs alone."""
    report = data["report"]
    rankers = [r for r in report["rankers"] if r["kind"] == "baseline" or r["name"] in names]
    differences = [d for d in report["differences"] if d["model"] in names]
    runs = {name: run for name, run in data["runs"].items() if name in names}
    return {**data, "report": {**report, "rankers": rankers, "differences": differences}, "runs": runs}


def test_runs_judged_at_different_times_make_one_table():
    data = json.loads((RESULTS / "quality-sotu.json").read_text(encoding="utf-8"))
    names = list(data["runs"])
    merged = quality.merged(_only(data, names[:5]), _only(data, names[4:]))
    assert quality.markdown(merged) == quality.markdown(data)


def test_a_stored_result_of_other_baselines_is_not_added_to():
    data = json.loads((RESULTS / "quality-sotu.json").read_text(encoding="utf-8"))
    other = json.loads(json.dumps(data))
    (ridge,) = (ranker for ranker in other["report"]["rankers"] if ranker["name"] == "ridge")
    ridge["excluded"]["R@5"]["value"] += 0.01
    with pytest.raises(SystemExit, match="judge every run"):
        quality.merged(data, other)
