"""Threads, instruction sets and argument checks of fastlvm._C; results are held to oracles in tests/ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastlvm import _C

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restore():
    isa, threads = _C.isa(), _C.get_num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)


def scan_inputs(batch=2, dim=64, length=40, state=32):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length),
        "A": -np.exp(normal(dim, state)),
        "B": normal(batch, state, length),
        "C": normal(batch, state, length),
        "D": normal(dim),
        "z": normal(batch, dim, length),
        "delta_bias": normal(dim),
        "delta_softplus": True,
        "initial_state": None,
    }


def scan(**changes):
    arguments = {**scan_inputs(), **changes}
    arguments.setdefault("out", np.zeros_like(arguments["u"]))
    arguments.setdefault("final_state", None)
    _C.ssm_scan(**arguments)
    return arguments["out"]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_isa_agrees():
    assert _C.isas()[0] == "scalar"
    assert set(_C.isas()) <= set(_C.compiled_isas())
    _C.set_isa("scalar")
    expected = scan()
    for isa in _C.isas():
        _C.set_isa(isa)
        assert _C.isa() == isa
        out = scan()
        assert np.linalg.norm(out - expected) <= 2e-6 * np.linalg.norm(expected)


def test_the_best_isa_is_the_default():
    done = run_python("from fastlvm import _C; print(_C.isa() == _C.isas()[-1])", FASTLVM_ISA="")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("isa", _C.isas())
def test_environment_pins_the_isa(isa):
    done = run_python("from fastlvm import _C; print(_C.isa())", FASTLVM_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_bad_isa_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"got 'mmx'.*scalar"):
        _C.set_isa("mmx")
    done = run_python("from fastlvm import _C; _C.isa()", FASTLVM_ISA="mmx")
    assert "ValueError: FASTLVM_ISA: got 'mmx', this machine can run scalar" in done.stderr


def test_bad_thread_counts():
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match="wants 1 to 1024"):
            _C.set_num_threads(count)
    done = run_python("from fastlvm import _C; _C.get_num_threads()", FASTLVM_NUM_THREADS="two")
    assert "ValueError: FASTLVM_NUM_THREADS: got 'two'" in done.stderr


def test_default_threads_stay_within_the_affinity_mask():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity masks here")
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from fastlvm import _C; print(_C.get_num_threads())"
    assert run_python(code, FASTLVM_NUM_THREADS="").stdout.strip() == "1"
    assert run_python(code, FASTLVM_NUM_THREADS="3").stdout.strip() == "3"


def test_bits_do_not_depend_on_threads():
    results = []
    for threads in (1, 2, 3, 1):
        _C.set_num_threads(threads)
        results.append(scan().tobytes())
    assert len(set(results)) == 1


def test_several_python_threads_at_once():
    _C.set_num_threads(2)
    expected = scan()
    wrong = []

    def work():
        for _ in range(20):
            if scan().tobytes() != expected.tobytes():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


FORK = """
import os, sys, threading
sys.path.insert(0, {here!r})
import test_native as t
t._C.set_num_threads(2)
expected = t.scan().tobytes()
other = threading.Thread(target=lambda: [t.scan() for _ in range(200)])
other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        threads_before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
        same = t.scan().tobytes() == expected
        started = sys.platform != "linux" or len(os.listdir("/proc/self/task")) > threads_before
        os._exit(0 if same and started else 1)
    assert os.waitpid(child, 0)[1] == 0
other.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_workers_of_its_own():
    done = run_python(FORK.format(here=str(Path(__file__).parent)))
    assert done.returncode == 0, done.stderr


def test_exit_with_workers_spinning_or_asleep():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "import test_native as t, atexit; t._C.set_num_threads(2)\n"
    code += "atexit.register(t.scan); t.scan()"
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": np.zeros((2, 3, 4), np.float32)}, r"B: got shape \(2, 3, 4\), wants \(D, N\), \(B, N, L\) or.*N=32"),
        ({"B": np.zeros((2, 5, 32, 40), np.float32)}, "G a divisor of D"),
        ({"B": np.zeros((2, 0, 32, 40), np.float32)}, "G a divisor of D"),
        ({"u": np.zeros((2, 64), np.float32)}, r"u: got shape \(2, 64\), wants \(B, D, L\)"),
        ({"D": np.zeros(3, np.float32)}, r"D: got shape \(3,\), wants \(D,\) = \(64,\)"),
        ({"D": np.zeros(64)}, "D: got float64, wants float32, float16 or bfloat16"),
        ({"delta": None}, "delta: got None, wants an array"),
        ({"z": np.zeros((2, 64, 40), np.int32)}, "z: got elements of format"),
        ({"z": np.zeros((2, 64, 40), ">f4")}, "z: got elements of format"),
        ({"u": [1.0]}, "u: got list, wants a numpy array"),
        ({"out": np.zeros((2, 64, 40), np.float16)}, "out: got float16, wants float32"),
        ({"out": np.broadcast_to(np.zeros((), np.float32), (2, 64, 40))}, "out: cannot be written to"),
        ({"final_state": np.zeros((2, 32, 64), np.float32).transpose(0, 2, 1)}, "final_state: got strides"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        scan(**changes)


def test_read_only_inputs_are_taken():
    inputs = scan_inputs()
    expected = scan()
    for value in inputs.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    out = np.zeros_like(expected)
    _C.ssm_scan(**inputs, out=out, final_state=None)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="ldd")
def test_the_extension_needs_neither_torch_nor_openmp():
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed and "omp" not in needed


def test_the_thread_team_alone(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "threads"
    common = (ROOT / "csrc/common" / f"{name}.cpp" for name in ("threads", "phases", "cores", "memory"))
    sources = [ROOT / "tests/csrc/threads.cpp", *common]
    flags = ["-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, timeout=60, check=True).stdout == "ok\n"
