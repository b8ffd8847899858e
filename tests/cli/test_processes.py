"""Interrupts, kills, full disks and closed pipes, from outside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.conftest import DIM, TINY, ok
from cli.processes import Started
from fastlvm import Index, Payload, Predictor, Windows

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and fork of POSIX")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def train(made, out, *more):
    return ["train", "--payload", made.payload, "--windows", made.windows, "--out", out, *TINY, *more]


def test_interrupted_training_says_how_to_go_on(made, work, tmp_path):
    out = work / "run"
    started = Started(tmp_path, *train(made, out, "--epochs", 2000, "--set", "patience=0"))
    assert started.wait_for(lambda: (out / "history.json").exists())
    started.signal(signal.SIGINT)
    code, printed, err = started.end()
    assert code == 130 and printed == "" and "Traceback" not in err
    assert err.splitlines()[-1] == f"fastlvm: interrupted; the same command with --resume goes on from what {out} holds"
    assert (out / "last.safetensors").exists() and not [name for name in names(out) if name.startswith(".")]


def test_killed_training_goes_on_to_the_same_weights(made, work, tmp_path):
    settings = ["--epochs", 6, "--set", "patience=0", "--set", "lr=0.01"]
    whole = work / "whole"
    ok(*train(made, whole, *settings))
    out = work / "run"
    draw = random.Random(0)
    for _ in range(4):
        started = Started(tmp_path, *train(made, out, *settings, "--resume"))
        changed = draw.randrange(1, 3)  # checkpoints seen before the kill
        seen = set()

        def enough(seen=seen, changed=changed):
            last = out / "last.safetensors"
            if last.exists():
                seen.add(last.stat().st_ino)
            return len(seen) > changed

        started.wait_for(enough)
        started.signal(signal.SIGKILL)
        assert started.end()[0] in (0, -signal.SIGKILL)
    ok(*train(made, out, *settings, "--resume"))
    assert (out / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    assert _history(out) == _history(whole)
    assert names(out) == names(whole)


def _history(run):
    measured = ("time", "windows_per_s", "loading")
    history = json.loads((run / "history.json").read_text())
    return [{name: value for name, value in entry.items() if name not in measured} for entry in history]


@pytest.fixture(scope="session")
def large(tmp_path_factory, article_walks):
    """Arrays that take some ten milliseconds to write."""
    root = tmp_path_factory.mktemp("large")
    vectors, keys = article_walks(articles=300, chunks=40, dim=DIM)
    np.save(root / "v.npy", vectors)
    np.save(root / "k.npy", keys)
    Payload.build(root / "payload", vectors, keys, encoder="walks")
    return root


def writers(made, large):
    """command -> (its arguments but for --out, what opens the result)."""
    payload = Payload.open(large / "payload")
    return {
        "payload build": (
            ["payload", "build", "--vectors", large / "v.npy", "--keys", large / "k.npy", "--encoder", "e"],
            lambda path: Payload.open(path).verify(),
        ),
        "windows build": (["windows", "build", large / "payload"], lambda path: Windows.open(path).verify(payload)),
        "index build": (["index", "build", large / "payload", "--kind", "flat"], Index.open),
        "export": (["export", made.run, "--index", made.index], Predictor.load),
    }


@pytest.mark.parametrize("command", ["payload build", "windows build", "index build", "export"])
def test_a_killed_writer_leaves_all_or_nothing(command, made, large, work, tmp_path):
    args, read = writers(made, large)[command]
    out = work / ("out.npz" if command == "windows build" else "out")
    for step in range(3):  # killed when its first, second, third file appears
        started = Started(tmp_path, *args, "--out", out)
        started.wait_for(lambda step=step: sum(len(files) for *_, files in os.walk(work)) > step)
        started.signal(signal.SIGKILL)
        started.end()
        assert set(names(work)) - {name for name in names(work) if name.startswith(f".{out.name}.tmp-")} <= {out.name}
        if out.exists():
            read(out)
            break
    if out.is_dir():
        assert names(work) == ["out"]
        return
    ok(*args, "--out", out)
    read(out)
    assert names(work) == [out.name]


@pytest.mark.parametrize("command", ["payload build", "windows build", "index build", "export", "train", "report"])
def test_a_full_disk(command, made, large, work, tmp_path):
    out = work / "out"
    if command == "train":
        args = train(made, out)
    elif command == "report":
        args = ["eval", made.run, "--payload", made.payload, "--windows", made.windows, "--out", out]
    else:
        args = [*writers(made, large)[command][0], "--out", out]
    code, _, err = Started(tmp_path, *args, limit=3000).end()
    assert code == 2 and "Traceback" not in err, err
    assert f"{out}" in err.splitlines()[-1] and ".tmp-" not in err
    assert not [path for path in work.rglob("*") if path.name.startswith(".")]


def run(*args, **options):
    environment = {**os.environ, "COLUMNS": "100"}
    environment.pop("PYTHONUNBUFFERED", None)  # what is left in a buffer is what goes wrong on leaving
    return subprocess.run(
        [str(arg) for arg in args], capture_output=True, text=True, timeout=120, check=False, env=environment, **options
    )


def test_the_module_is_the_command(made, tmp_path):
    script = Path(sys.executable).with_name("fastlvm")
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    info = ["payload", "info", str(made.payload)]
    one, other = run(script, *info), run(sys.executable, "-m", "fastlvm", *info)
    assert one.returncode == other.returncode == 0 and one.stdout == other.stdout != ""
    assert one.stderr == other.stderr == ""
    wrong = run(sys.executable, "-m", "fastlvm", "payload", "info", tmp_path / "a\nb\udcff")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


def test_a_closed_pipe_is_quiet(made, tmp_path):
    many = tmp_path / "many.npy"
    np.save(many, np.repeat(np.load(made.batch), 40, axis=0))  # more than a pipe holds
    command = f"'{sys.executable}' -m fastlvm predict '{made.artifact}' --context '{many}' -k 100 | head -1"
    result = run("bash", "-c", f"set -o pipefail; {command}")
    assert (result.returncode, result.stdout, result.stderr) == (0, "context 0\n", "")


def test_a_closed_output_is_quiet(made):
    result = run("bash", "-c", f"'{sys.executable}' -m fastlvm payload info '{made.payload}' >&-")
    assert (result.returncode, result.stderr) == (0, "")


def test_an_output_that_takes_nothing():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    result = run("bash", "-c", f"'{sys.executable}' -m fastlvm info > /dev/full")
    assert result.returncode == 2 and result.stderr == "fastlvm: No space left on device\n"


def test_a_terminal_that_knows_no_unicode(made):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    code = f"import sys; sys.argv[1:] = ['payload', 'info', {str(made.payload)!r}]; import fastlvm.cli as c; "
    code += "c._print_payload = lambda _: c.typer.echo('\\u2026\\udcff'); c.main()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert result.returncode == 0 and result.stdout == "\\u2026\\udcff\n", result.stderr


def test_without_torch(made, tmp_path):
    def command(*args):
        code = f"import sys; sys.modules['torch'] = None; sys.argv = {['fastlvm', *map(str, args)]!r}; "
        return run(sys.executable, "-c", code + "from fastlvm.cli import main; main()")

    found = command("predict", made.artifact, "--context", made.context, "-k", 2)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 3, found.stderr
    refused = command(*train(made, tmp_path / "run"))
    assert (refused.returncode, refused.stderr) == (2, "fastlvm: this needs torch: pip install 'fastlvm[torch]'\n")
    assert not (tmp_path / "run").exists()
