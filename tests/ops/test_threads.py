"""The thread team: same bits whatever its size, many callers, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastlvm

from .cases import Conv, Scan, gradients

# Enough work that two threads share it, and sizes that do not divide evenly.
CASES = [
    (fastlvm.ssm_scan, Scan(batch=3, channels=37, state=33, length=50, B=1, C="dn")),
    (fastlvm.ssm_scan, Scan(batch=1, channels=256, state=128, length=5)),
    (fastlvm.causal_conv1d, Conv(batch=3, channels=37, length=301)),
]


def _bits(op, case):
    outputs, grads = gradients(op, case, backend="cpu")
    return [t.numpy().tobytes() for t in (*outputs, *grads.values())]


@pytest.mark.parametrize(("op", "case"), CASES, ids=["groups", "few-steps", "conv"])
def test_same_bits_every_time_and_on_any_number_of_threads(op, case, isa, threads):
    fastlvm.set_num_threads(1)
    want = _bits(op, case)
    assert _bits(op, case) == want
    for count in (2, 3, 2, 1):
        fastlvm.set_num_threads(count)
        assert fastlvm.get_num_threads() == count
        assert all(_bits(op, case) == want for _ in range(5))


def test_torch_may_ask_for_deterministic_algorithms():
    """Nothing is refused, and nothing becomes another."""
    want = [_bits(op, case) for op, case in CASES]
    torch.use_deterministic_algorithms(True)
    try:
        assert [_bits(op, case) for op, case in CASES] == want
        for op, case in CASES:
            gradients(op, case, backend="reference")
    finally:
        torch.use_deterministic_algorithms(False)


def test_concurrent_callers_get_their_own_results(threads):
    fastlvm.set_num_threads(2)
    cases = [Scan(batch=2, channels=8 + i, state=16, length=40) for i in range(4)]
    inputs = [{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()} for case in cases]
    want = [fastlvm.ssm_scan(**x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            got = list(pool.map(lambda x: fastlvm.ssm_scan(**x), inputs))
            assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


def test_threads_can_be_changed_while_others_compute(threads):
    case = Scan(batch=2, channels=16, state=16, length=40)
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    want = fastlvm.ssm_scan(**inputs)
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(fastlvm.ssm_scan, **inputs) for _ in range(60)]
        for i in range(20):
            fastlvm.set_num_threads(1 + i % 3)
        assert all(np.array_equal(w.result(timeout=30), want) for w in work)


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_a_count_below_one_is_refused(wrong, threads):
    with pytest.raises(ValueError, match="set_num_threads: n is"):
        fastlvm.set_num_threads(wrong)
    assert fastlvm.get_num_threads() == threads


@pytest.mark.parametrize("wrong", ["2", 2.0, None])
def test_a_count_that_is_no_integer_is_refused(wrong, threads):
    with pytest.raises(TypeError, match="set_num_threads: n is a"):
        fastlvm.set_num_threads(wrong)
    assert fastlvm.get_num_threads() == threads


def _run(code, **env):
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


SETUP = """
    import os, sys, threading
    import numpy as np, fastlvm
    fastlvm.set_num_threads(2)
    g = np.random.default_rng(0)
    u = g.standard_normal((4, 64, 50), np.float32)
    A = -np.exp(g.standard_normal((64, 16), np.float32))
    B = g.standard_normal((4, 16, 50), np.float32)
    def scan():
        return fastlvm.ssm_scan(u, abs(u), A, B, B)
"""


def test_survives_fork():
    """Workers do not live on in a child: it has to start its own, and a grandchild its own again."""
    _run(
        SETUP
        + """
    want = scan()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            ok = all(np.array_equal(scan(), want) for _ in range(20))
            inner = os.fork()
            if inner == 0:
                os._exit(0 if np.array_equal(scan(), want) else 3)
            ok = ok and os.waitpid(inner, 0)[1] == 0
            os._exit(0 if ok else 3)
        assert np.array_equal(scan(), want)
        assert os.waitpid(child, 0)[1] == 0
    """
    )


def test_survives_fork_while_another_thread_computes():
    _run(
        SETUP
        + """
    want, stop = scan(), threading.Event()
    def work():
        while not stop.is_set():
            scan()
    other = threading.Thread(target=work)
    other.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(scan(), want) else 3)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    other.join()
    """
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="wants Linux")
def test_workers_have_the_cores_that_they_were_given():
    """Waking they may be told where to, see Placement in cores.h; then every core of their own is free to them."""
    _run(
        SETUP
        + """
    import time
    fastlvm.set_num_threads(3)
    cores = os.sched_getaffinity(0)
    before = [int(t) for t in os.listdir("/proc/self/task")]
    scan()
    workers = [int(t) for t in os.listdir("/proc/self/task") if int(t) not in before]
    assert len(workers) == 2
    def come_to_have(wanted):
        end = time.monotonic() + 20
        while {frozenset(os.sched_getaffinity(t)) for t in workers} != {frozenset(wanted)}:
            assert time.monotonic() < end, [os.sched_getaffinity(t) for t in workers]
            time.sleep(0.001)
    for _ in range(10):
        time.sleep(0.005)  # asleep by then, mostly
        scan()
    come_to_have(cores)
    for t in workers:
        os.sched_setaffinity(t, [min(cores)])
    for _ in range(10):
        time.sleep(0.005)
        scan()
    come_to_have([min(cores)])
    """
    )


def test_leaves_quietly():
    """Workers that sleep or compute must not keep the interpreter from ending."""
    _run(SETUP + "    scan()\n")
    _run(SETUP + "    threading.Thread(target=lambda: [scan() for _ in range(50)], daemon=True).start()\n    scan()\n")


def test_default_count_comes_from_the_environment_or_the_cores():
    code = "import fastlvm; print(fastlvm.get_num_threads())"
    assert int(_run(code, FASTLVM_NUM_THREADS="3")) == 3
    if hasattr(os, "sched_setaffinity"):
        pinned = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" + code
        assert int(_run(pinned, FASTLVM_NUM_THREADS="")) == 1
