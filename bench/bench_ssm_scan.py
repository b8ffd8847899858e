"""The selective scan against the reference, its rivals and the machine's own bound, forward and backward.

Every result is checked before it is timed, see contenders.py; the figures and their targets are in cases.py.
"""

from __future__ import annotations

import pytest

import contenders
import memory
from bound import Bound
from cases import SCANS, id_of
from paired import measure, pin


@pytest.fixture(scope="module")
def bounds(tmp_path_factory):
    """The bound of every vector instruction set that runs here."""
    folder = tmp_path_factory.mktemp("bound")
    found = {isa: Bound(isa, folder) for isa in contenders.ISAS if isa != "scalar" or isa == contenders.BEST}
    yield found
    for bound in found.values():
        bound.close()


@pytest.fixture(autouse=True)
def unpinned(threads):
    yield
    pin(threads[-1], contenders.BEST)


@pytest.mark.parametrize("case", SCANS, ids=id_of)
@pytest.mark.benchmark(group="ssm_scan")
def test_scan(case, benchmark, threads, plan, rows, bounds):
    checked = contenders.Checked(case, threads)
    others = contenders.own(checked) + contenders.bounds(case, bounds, threads)
    rivals, reasons = contenders.rivals_of(checked)
    checked.result = None  # gigabytes, for some
    measure(benchmark, checked.lead, [*others, *rivals], plan)
    rows.add(case, [checked.lead, *others, *rivals])
    rows.refuse(case, reasons)
    if case.gradient:
        rows.memory(case, memory.measure(case, threads[-1]))
