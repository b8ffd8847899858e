from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastlvm.cli import app

DIM = 32
TINY = ["--set", "d_model=32", "--set", "n_layers=1", "--set", "d_state=4", "--batch", "16"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def fastlvm(*args):
    """One command in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"fastlvm {' '.join(map(str, args))} ended in an exception") from result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def ok(*args):
    """One command that has to succeed; its standard output."""
    result = fastlvm(*args)
    assert result.code == 0, result
    return result.out


def refused(*args, code=2):
    """One command that has to end in one line and an exit code; the line."""
    result = fastlvm(*args)
    assert result.code == code, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastlvm: "), result.err
    assert "Traceback" not in result.err
    return lines[0].removeprefix("fastlvm: ")


def listing(folder):
    """Every path below a folder, hidden ones too, with size and time of change."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_mtime_ns, stat.st_size) if path.is_file() else None
    return found


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory, article_walks):
    """What the chain of commands makes of 8 articles x 14 chunks; nobody writes to it."""
    root = tmp_path_factory.mktemp("made")
    m = SimpleNamespace(root=root)
    vectors, keys = article_walks(articles=8, chunks=14, dim=DIM)
    m.vectors, m.keys, m.texts = root / "v.npy", root / "k.npy", root / "t.jsonl"
    np.save(m.vectors, vectors)
    np.save(m.keys, keys)
    m.texts.write_text("".join(f'{{"text": "chunk {c} of {a}", "title": "article {a}"}}\n' for a, c in keys))
    m.payload, m.windows, m.run, m.index, m.artifact = (
        root / name for name in ("payload", "windows.npz", "run", "index", "artifact")
    )
    m.built = ok(
        *("payload", "build", "--vectors", m.vectors, "--keys", m.keys, "--texts", m.texts),
        *("--encoder", "walks", "--source", "seed 0", "--out", m.payload),
    )
    m.cut = ok("windows", "build", m.payload, "--out", m.windows, "--split", "0.5,0.25,0.25")
    m.trained = ok(
        *("train", "--payload", m.payload, "--windows", m.windows, "--out", m.run, "--epochs", 1, *TINY),
    )
    m.indexed = ok("index", "build", m.payload, "--space", m.run, "--out", m.index)
    m.exported = ok("export", m.run, "--index", m.index, "--out", m.artifact)
    m.context = root / "context.npy"
    np.save(m.context, vectors[:5])
    m.batch = root / "batch.npy"
    np.save(m.batch, np.stack([vectors[:5], vectors[20:25]]))
    return m


@pytest.fixture
def other_payload(tmp_path, article_walks):
    """A payload of the same shape with other vectors."""
    from fastlvm import Payload

    vectors, keys = article_walks(articles=8, chunks=14, dim=DIM, seed=7)
    return Payload.build(tmp_path / "other", vectors, keys, encoder="walks")


@pytest.fixture
def copied(tmp_path):
    """copied(path, name=None) -> a copy in the test's own folder, to be damaged."""

    def copy(path, name=None):
        target = tmp_path / (name or path.name)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
        return target

    return copy
