"""The Apple bench without an Apple GPU: its dry run, what it refuses, its oracle, and the workflow that runs it."""

from __future__ import annotations

import functools
import getpass
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import apple  # noqa: E402
import apple_check  # noqa: E402
import apple_rivals  # noqa: E402
import fastlvm  # noqa: E402
from apple_cases import Conv, ConvStep, Nce, Scan, ScanStep, Ssd, leaves  # noqa: E402
from apple_grid import grid, shapes  # noqa: E402
from apple_models import LanguageModel, Training  # noqa: E402
from apple_timing import CPU, LOOP, OURS, TORCH, Contender, Missing, rounds  # noqa: E402
from fastlvm.files import read_json  # noqa: E402
from fastlvm.ops import _metal  # noqa: E402
from metal import calls, emulator  # noqa: E402
from ops import nce_cases, oracle, ssd_cases, steps  # noqa: E402

BENCH = Path(apple.__file__).parent
ROOT = BENCH.parent
WORKFLOW = ROOT / ".github/workflows/apple.yml"
SMALL = [Scan(length=5), Scan(length=40, B=2, C="dn"), Conv(length=9), Ssd(length=17), Nce(batch=33, keys=70, dim=5)]
PACKED = [kind(batch=1, length=8, lengths=(0, 3, 0, 5)) for kind in (Scan, Conv, Ssd)]
SMALL_STEPS = [ScanStep(C=2), ScanStep(batch=4, pool=9), ConvStep(width=2, extra=3), ConvStep(batch=4, pool=9)]


@pytest.fixture(autouse=True)
def on_cpu():
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def dry(tmp_path, *given):
    """Exit code and the file of a dry run in this process."""
    out = tmp_path / "apple.json"
    code = apple.main(["--dry-run", "--here", "--out", str(out), *given])
    return code, read_json(out)


# --- a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a dry run of a few rows of every kind leaves and says."""
    out = tmp_path_factory.mktemp("apple") / "apple.json"
    checked = ("ssm_scan-2-4-5-16-float32", "causal_conv1d-2-4-5-4-float32", "ssd_scan-2-5-4-5-2-16-float32")
    checked += ("ssm_step-3-6-3-float32", "causal_conv1d_step-3-4-4-float32", "info_nce-5-5-3-float32")
    rows = f"check-({'|'.join(checked)})$|bench-(ssm_step|causal_conv1d_step|mlx-lm-decode.*float32)"
    given = ["--dry-run", "--out", out, "--only", "check,step,conv,mlx-lm", "--rows", rows]
    done = subprocess.run(
        [sys.executable, BENCH / "apple.py", *given], capture_output=True, text=True, check=False, cwd=out.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return read_json(out), done.stdout, out


def test_a_dry_run_leaves_what_the_table_shows(whole):
    data, said, _ = whole
    assert data["bench"] == "apple" and data["device"] == "cpu (dry run)" and data["dry_run"]
    assert all(row["dry_run"] for row in data["rows"])
    assert data["counts"] == {"checked": 6, "timed": 3, "failed": 0}
    ops = [row["op"] for row in data["rows"] if row["kind"] == "check"]
    assert sorted(ops) == ["causal_conv1d", "causal_conv1d_step", "info_nce", "ssd_scan", "ssm_scan", "ssm_step"]
    assert {"chip", "system", "memory"} <= data["machine"].keys()
    assert {"python", "mlx", "fastlvm", "torch", "mlx-lm", "numpy"} <= data["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"]) and data["bytes_per_s"] > 0
    assert "A dry run on mlx's CPU device" in said
    assert all("(dry run)" in line for line in said.splitlines() if line.startswith("### "))
    times = said[said.index("### Times") :]
    assert all("(dry run)" in line for line in times.splitlines()[4:] if line.startswith("| "))


def test_times_are_of_everybody_with_errors_and_a_bound(whole):
    row = next(row for row in whole[0]["rows"] if row["id"].startswith("bench-ssm_step"))
    named = {one["name"]: one for one in row["contenders"]}
    assert {OURS, CPU, TORCH} < named.keys()
    for one in named.values():
        assert one["error"] <= one["tolerance"] and one["rounds"] >= 3 and one["median_ms"] > 0
        assert one["p10_ms"] <= one["median_ms"] <= one["p90_ms"]
    assert row["sets"] > 1 and row["bound"]["ms"] > 0 and row["backend"].startswith("mlx")


def test_the_file_names_no_folder_user_or_host(whole):
    data, _, out = whole
    text = json.dumps(data)
    assert not [name for name in (out.parent, ROOT, Path.home(), sys.prefix) if str(name) in text]
    for name in (socket.gethostname(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(name)}\b", text)


def test_an_error_keeps_the_file_and_loses_the_folders():
    error = OSError(f"cannot read {Path.home() / 'a/b/kernel.metal'}, 3/4 of (B, N)")
    assert apple_check.scrubbed(error) == "OSError: cannot read kernel.metal, 3/4 of (B, N)"


# --- what is wrong is found


def off(op, factor, only=None):
    """`op` with its outputs times `factor`, where they are of `only`."""

    def wrong(*args, **kwargs):
        found = op(*args, **kwargs)
        if only is not None and not only(args, kwargs):
            return found
        return tuple(x * factor for x in found) if isinstance(found, tuple) else found * factor

    return wrong


def test_a_wrong_kernel_is_a_failed_case_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastlvm, "ssm_scan", off(fastlvm.ssm_scan, 1.0001))
    code, data = dry(tmp_path, "--only", "check", "--rows", "ssm_scan-2-4-5-16-float32$|causal_conv1d-2-4-5-4-float32$")
    assert code == 1 and data["counts"]["failed"] == 1
    scan, conv = (next(row for row in data["rows"] if row["op"] == op) for op in ("ssm_scan", "causal_conv1d"))
    assert conv["ok"] and not conv["failures"] and not scan["ok"]
    first = scan["failures"][0]
    assert first["array"] == "out" and first["tolerance"] == 1e-5 and first["error"] == pytest.approx(1e-4, rel=0.05)
    assert "FAILED in out" in capsys.readouterr().out


def test_a_wrong_gradient_is_a_failed_case():
    case = Scan(length=5)
    real = fastlvm.ssm_scan

    def wrong(u, delta, A, *args, **kwargs):
        return real(u, delta, A + 0.001 * (A - mx.stop_gradient(A)), *args, **kwargs)  # the value is the same

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fastlvm, "ssm_scan", wrong)
        row = apple_check.check(case)
    assert [one["array"] for one in row["failures"]] == ["dA"]


@pytest.mark.parametrize("kind", [Scan(), Conv(), Ssd(), Nce(), ScanStep(), ConvStep()], ids=lambda case: case.op)
def test_every_op_can_fail(kind, monkeypatch):
    assert apple_check.check(kind)["ok"]
    monkeypatch.setattr(fastlvm, kind.op, off(getattr(fastlvm, kind.op), 1.001))
    assert not apple_check.check(kind)["ok"]


def test_what_is_not_finite_fails_and_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(fastlvm, "causal_conv1d", off(fastlvm.causal_conv1d, float("nan")))
    code, data = dry(tmp_path, "--only", "check", "--rows", "causal_conv1d-2-4-5-4-float32$")
    assert code == 1 and data["rows"][0]["worst"]["error"] is None


def test_an_op_that_raises_is_a_failed_case(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError(f"no such kernel in {ROOT}/kernels")

    monkeypatch.setattr(fastlvm, "ssm_step", broken)
    code, data = dry(tmp_path, "--only", "check", "--rows", "ssm_step-3-6-16-float32")
    assert code == 1 and data["rows"][0]["reason"] == "RuntimeError: no such kernel in kernels"


def test_a_wrong_result_that_is_timed_fails_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastlvm, "causal_conv1d_step", off(fastlvm.causal_conv1d_step, 1.001))
    code, data = dry(tmp_path, "--only", "conv", "--rows", "bench-causal_conv1d_step")
    assert code == 1 and data["rows"][0]["contenders"][0]["wrong"]
    assert "wrong: 1.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize("rivals", [True, False], ids=["with-rivals", "alone"])
def test_a_loss_that_is_not_finite_fails_and_is_written(monkeypatch, tmp_path, capsys, rivals):
    monkeypatch.setattr(fastlvm, "info_nce", off(fastlvm.info_nce, float("nan")))
    if not rivals:
        for name in ("_on_cpu", "_loop", "_torch"):
            monkeypatch.setattr(Training, name, lambda self: raised(Missing("not here")))
    code, data = dry(tmp_path, "--only", "train")
    ours = data["rows"][0]["contenders"][0]
    assert code == 1 and ours["wrong"] and ours["loss"] is None
    failed = next(line for line in capsys.readouterr().out.splitlines() if "loss, from the others'" in line)
    assert [cell.strip() for cell in failed.split("|")[3:5]] == ["not finite", "1.0e-03"]


def raised(error):
    raise error


def test_a_timed_row_is_not_right_where_nothing_of_ours_came(monkeypatch):
    """Nor is it wrong: the row says why."""
    monkeypatch.setattr(fastlvm, "causal_conv1d_step", lambda **given: raised(RuntimeError("no kernel")))
    row = apple_rivals.measured(ConvStep(batch=2), 0.001, 1e9)
    assert row["ok"] is None and row["contenders"][0]["reason"] == "RuntimeError: no kernel"
    monkeypatch.setattr(Training, "_ours", lambda self, name=OURS: raised(RuntimeError("no kernel")))
    assert Training().small().measured(0.001, 1e9)["ok"] is None
    monkeypatch.setitem(sys.modules, "mlx_lm.models.mamba", None)
    assert LanguageModel(decode=True).small().measured(0.001, 1e9)["ok"] is None


# --- what it refuses, and what it goes without


def test_without_a_gpu_it_refuses_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert apple.main(["--out", str(tmp_path / "apple.json")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mlx finds no Metal GPU here") and said.err.count("\n") == 1 and said.out == ""
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--only", "chek"], "no section chek"),
        (["--rows", "nothing-like-it"], "no row of all sections"),
        (["--rows", "("], "no regular expression"),
        (["--out", "."], "is a folder"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_options_are_refused(given, says, capsys):
    assert apple.main(["--dry-run", "--here", *given]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_rival_that_is_missing_has_its_row_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    row = apple_rivals.measured(ScanStep(batch=2), 0.001, 1e9)
    missing = next(one for one in row["contenders"] if one["name"] == TORCH)
    assert missing["reason"].startswith("not installed") and row["ok"]
    monkeypatch.setitem(sys.modules, "mlx_lm.models.mamba", None)
    row = LanguageModel(decode=True).small().measured(0.001, 1e9)
    assert all(one["reason"].startswith("not installed") for one in row["contenders"])


def test_a_rival_that_would_not_fit_says_how_much(monkeypatch):
    monkeypatch.setattr(apple_rivals, "memory", lambda: 1 << 30)
    with pytest.raises(Missing, match="would keep some 3 GB"):
        apple_rivals._fits(shapes(tiny=False)[3])


class Ends:
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (5,)


class Row:
    section, title = "check", "a row"

    def __init__(self, id):
        self.id = id

    def measured(self, given, bytes_per_s):
        if self.id == "ends":
            os._exit(7)
        return self.unmeasured() | {"ok": True}

    def unmeasured(self):
        return {"id": self.id, "kind": "check", "op": "none", "dtype": "float32", "failures": []}


def test_a_run_goes_on_after_a_row_that_ends_its_process(tmp_path):
    given = apple.arguments(["--dry-run"])
    run = apple.Run(tmp_path / "apple.json", given)
    apple.follow(run, [Row("ends"), Row("fine")], given)
    found = read_json(tmp_path / "apple.json")
    ended, fine = found["rows"]
    assert "status 7" in ended["reason"] and ended["ok"] is False and fine["ok"] is True


def test_a_process_that_ends_before_any_row_ends_the_run(tmp_path):
    """Every further one would end as well, each after it was started."""
    given = apple.arguments(["--dry-run"])
    run = apple.Run(tmp_path / "apple.json", given)
    given.out = Ends()
    apple.follow(run, [Row("a"), Row("b")], given)
    assert len(run.rows) == 2 and all("ended with status" in row["reason"] for row in run.rows)


def test_rows_that_were_not_reached_say_so(tmp_path):
    given = apple.arguments(["--dry-run", "--limit", "0"])
    run = apple.Run(tmp_path / "apple.json", given)
    apple.follow(run, [Row("late")], given)
    assert run.rows[0]["reason"] == "not reached within 0 s"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a group of processes")
def test_an_interrupt_is_one_sentence_and_the_rows_so_far_are_kept(tmp_path):
    """As from a terminal, where every process of the run hears it."""
    out = tmp_path / "apple.json"
    command = [sys.executable, BENCH / "apple.py", "--dry-run", "--only", "check", "--out", out]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout.readline().startswith("check-")
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and said == f"interrupted: {out} has the rows so far\n"
    assert read_json(out)["rows"] and [*tmp_path.iterdir()] == [out]


def test_contenders_take_turns_over_inputs_that_rotate():
    seen = []
    pair = [Contender(name, [0, 1, 2], lambda given, name=name: seen.append((name, given)), id) for name in "ab"]
    for one in pair:
        one.rounds, one.burst = 4, 1
    rounds(pair)
    assert seen == [(name, number % 3) for number in range(4) for name in "ab"]


# --- rows and the oracle


@pytest.mark.parametrize("small", [False, True])
def test_rows_are_told_apart_and_cover_the_sections(small):
    rows = apple.every_row(small)
    assert len({row.id for row in rows}) == len(rows)
    assert {row.section for row in rows} == {*apple.SECTIONS}


def test_the_grid_has_every_kind_of_case():
    cases = grid()
    for op in ("ssm_scan", "ssd_scan", "causal_conv1d", "ssm_step", "causal_conv1d_step", "info_nce"):
        assert {case.dtype for case in cases if case.op == op} == {"float32", "float16", "bfloat16"}
    scans = [case for case in cases if isinstance(case, Scan)]
    assert {16, 64, 128, 256} <= {case.state for case in scans} and max(case.length for case in scans) > 1000
    assert any(case.lengths for case in scans) and any("initial_state" not in case.options for case in scans)


def test_the_shapes_of_the_issue_are_timed():
    timed = {(case.op, case.shape, case.gradient) for case in shapes(tiny=False) if case.dtype == "float32"}
    for shape in ((256, 1536, 5, 128), (8, 1536, 1024, 16), (1, 1536, 16384, 16)):
        assert {("ssm_scan", shape, gradient) for gradient in (False, True)} <= timed
    assert {("ssm_step", (256, 1536, 128), False), ("info_nce", (4096, 4096, 768), True)} <= timed


def test_tolerances_are_those_of_the_emulation():
    assert (apple_check.FORWARD, apple_check.GRADIENT) == (calls.FORWARD, calls.GRADIENT)
    assert {str(dtype).removeprefix("torch."): pair for dtype, pair in calls.HALF.items()} == apple_check.HALF
    for name, tolerance in apple_check.EPSILON.items():
        assert tolerance == torch.finfo(getattr(torch, name)).eps


def _tensors(given):
    def tensor(x):
        return tuple(map(torch.from_numpy, x)) if isinstance(x, tuple) else torch.from_numpy(x)

    return {name: tensor(x) if isinstance(x, np.ndarray | tuple) else x for name, x in given.items()}


@pytest.mark.parametrize("case", [*SMALL, *PACKED[2:]], ids=lambda case: case.id)
def test_the_oracle_is_that_of_the_tests(case):
    given = case.given()
    cotangents = [np.asarray(np.random.default_rng(1).standard_normal(x.shape)) for x in case.oracle(given)[0]]
    outputs, grads = case.oracle(given, cotangents)
    inputs, op = _tensors(given), {"ssm_scan": oracle.ssm_scan, "causal_conv1d": oracle.causal_conv1d}.get(case.op)
    fixed = {name: inputs.pop(name) for name in ("mask", "cu_seqlens") if name in inputs}
    op = op or {"ssd_scan": ssd_cases.ssd_oracle, "info_nce": nce_cases.nce_oracle}[case.op]
    wants, true_grads = oracle.run(functools.partial(op, **fixed), inputs, [*map(torch.from_numpy, cotangents)])
    assert grads.keys() == {*leaves(given)}
    pairs = [*zip(outputs, wants, strict=True), *((grads[name], true_grads[name]) for name in grads)]
    assert all(oracle.relative_error(torch.from_numpy(got), want) < 1e-12 for got, want in pairs)


@pytest.mark.parametrize("case", PACKED[:2], ids=lambda case: case.id)
def test_the_oracle_of_packed_sequences_is_that_of_each_alone(case):
    given = case.given()
    offsets = given.pop("cu_seqlens")
    (out, final), _ = case.oracle(given | {"cu_seqlens": offsets})
    for s, (begin, end) in enumerate(itertools.pairwise(offsets)):
        part = {
            name: x[..., begin:end] if getattr(x, "ndim", 0) > 2 and name != "initial_state" else x
            for name, x in given.items()
        }
        (alone, last), _ = case.oracle(part | {"initial_state": given["initial_state"][s : s + 1]})
        assert np.array_equal(out[..., begin:end], alone) and np.array_equal(final[s : s + 1], last)


@pytest.mark.parametrize("case", SMALL_STEPS, ids=lambda case: case.id)
def test_the_oracle_of_a_step_is_that_of_the_tests(case):
    given = case.given()
    twin = steps.Ssm(batch=case.batch) if isinstance(case, ScanStep) else steps.Conv(batch=case.batch)
    for got, want in zip(case.oracle(given)[0], steps.truth(twin, given), strict=True):
        assert oracle.relative_error(got, want) < 1e-6  # which computes in the dtype of numpy's scalars


def test_a_timed_part_is_that_of_the_whole():
    case = Scan(batch=3, channels=6, length=5, options=shapes(tiny=True)[0].options)
    given = case.given()
    cotangents = apple_rivals._cotangents(case, given)
    outputs, grads = case.oracle(given, [cotangents[0][0], np.zeros((3, 6, 16), np.float32)])
    part = apple_rivals._truth(case, given)
    assert np.allclose(part["out"], case.cut(outputs[0]), rtol=1e-12)
    assert all(np.allclose(part[name], case.cut(grads[name]), rtol=1e-12) for name in ("u", "delta", "z"))


def test_a_training_step_of_all_contenders_has_one_loss():
    row = Training().small().measured(0.001, 1e9)
    losses = {one["name"]: one.get("loss") for one in row["contenders"]}
    assert row["ok"] and losses.keys() == {OURS, CPU, LOOP, TORCH}
    assert max(losses.values()) - min(losses.values()) < 1e-5


# --- the Metal kernels, emulated


@pytest.mark.skipif(emulator.COMPILER is None or sys.platform == "darwin", reason="no g++ for the emulation")
@pytest.mark.parametrize("case", [Scan(length=5), Conv(length=5), ScanStep(), ConvStep()], ids=lambda case: case.op)
def test_with_the_gpu_as_default_device_the_check_is_of_the_metal_kernels(case, monkeypatch):
    recorder = emulator.Recorder()
    monkeypatch.setattr(mx.fast, "metal_kernel", recorder.metal_kernel)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    _metal.kernel.cache_clear()
    try:
        row = apple_check.check(case)
    finally:
        _metal.kernel.cache_clear()
    assert row["ok"], row
    assert "Metal" in row["backend"] and f"fastlvm_{case.op}" in {launch.name for launch in recorder.launches}


# --- the workflow


def test_the_workflow_runs_the_bench_as_it_is():
    text = WORKFLOW.read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^ *\S*python (bench/apple\.py.*)$", text, re.M)]
    assert len(commands) == 2
    real, rehearsed = (apple.arguments(command[1:]) for command in commands)
    assert rehearsed.dry_run and not real.dry_run and real.out == rehearsed.out == Path("apple.json")
    assert re.search(r"path: apple\.json", text)


def test_the_workflow_pins_its_actions_and_may_only_read():
    text = WORKFLOW.read_text(encoding="utf-8")
    assert all(re.search(r"@[0-9a-f]{40} # v\d", line) for line in text.splitlines() if "uses:" in line)
    assert re.search(r"^permissions:\n  contents: read\n", text, re.M) and text.count("permissions:") == 1
    triggers = text[text.index("\non:") : text.index("permissions:")]
    assert all(f"  {name}:" in triggers for name in ("workflow_dispatch", "push", "pull_request"))
    assert all(os in text for os in ("macos-15", "3.10", "3.13"))


def test_what_the_workflow_calls_is_there():
    text = WORKFLOW.read_text(encoding="utf-8")
    for target in re.findall(r"make (?:PYTHON=\S+ )?(\S+)", text):
        assert target == ".venv/.ready" and "READY := $(VENV)/.ready" in (ROOT / "Makefile").read_text(encoding="utf-8")
    for folder in re.findall(r"--ignore=(\S+)", text):
        assert (ROOT / folder).is_dir()


def test_the_page_says_what_was_not_run_and_how_to_run_it():
    text = (ROOT / "docs/apple.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4 and all("not yet run on Apple hardware" in row for row in rows)
    assert all(op in text for op in ("ssm_scan", "ssd_scan", "causal_conv1d_step", "ssm_step", "info_nce"))
    assert ".venv/bin/python bench/apple.py\n" in text
    for sections in re.findall(r"`--only (\S+)`", text):
        assert {*sections.split(",")} <= {*apple.SECTIONS}
