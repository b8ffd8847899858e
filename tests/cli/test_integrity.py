"""Files that are whole but wrong, damaged, or hostile: refused in one line by every command that reads them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from cli.conftest import TINY, listing, refused
from fastlvm import Payload, Windows

# commands that read windows W and payload P
READERS = {
    "windows verify": "windows verify W --payload P",
    "windows export": "windows export W --payload P --split test --out O/old.npz",
    "train": " ".join(["train --payload P --windows W --out O/run", *TINY]),
    "eval of a run": "eval R --payload P --windows W --out O/report",
    "eval of an artifact": "eval A --payload P --windows W --out O/report",
    "export": "export R --index I --payload P --windows W --out O/artifact",
}


@pytest.fixture
def read(made, tmp_path):
    """read(line, payload=, windows=) -> the one line that command ended with; nothing was written."""

    def run(line, payload=made.payload, windows=made.windows):
        named = {"P": payload, "W": windows, "R": made.run, "A": made.artifact, "I": made.index}
        args = [str(named.get(word, word)).replace("O/", f"{tmp_path}/out/") for word in line.split()]
        before = listing(tmp_path), listing(made.root)
        message = refused(*args)
        assert (listing(tmp_path), listing(made.root)) == before
        return message

    return run


@pytest.fixture
def shifted(made, tmp_path):
    """A well-formed window file whose truth keys are one chunk off."""
    windows = Windows.open(made.windows)
    keys = windows._keys + np.array([0, 1], np.int32)
    wrong = Windows(
        windows.payload_id, windows._rows, keys, windows._split, seed=windows.seed, fractions=windows.fractions
    )
    wrong.save(tmp_path / "shifted.npz")
    return tmp_path / "shifted.npz"


@pytest.mark.parametrize("reader", READERS)
def test_shifted_keys(reader, read, shifted):
    message = read(READERS[reader], windows=shifted)
    assert "window" in message and ("shifted.npz" in message or "cosine" in message or "export" in reader)


@pytest.mark.parametrize("reader", READERS)
def test_windows_of_another_payload(reader, read, other_payload, tmp_path):
    Windows.build(other_payload, split=(0.5, 0.25, 0.25)).save(tmp_path / "theirs.npz")
    assert other_payload.id in read(READERS[reader], windows=tmp_path / "theirs.npz")


def test_old_windows_with_shifted_keys(made, read, tmp_path):
    payload, windows = Payload.open(made.payload), Windows.open(made.windows)
    rows, keys = windows.rows("test"), windows.keys("test")
    vectors = payload.take(rows)
    np.savez(tmp_path / "old.npz", contexts=vectors[:, :-1], targets=vectors[:, -1], truth_keys=keys - [0, 1])
    message = read("windows import W --payload P --out O/w.npz", windows=tmp_path / "old.npz")
    assert "old.npz does not come from payload" in message and "window 0" in message


@pytest.mark.parametrize("line", ["payload info P", "payload verify P", "index build P --out O/i", *READERS.values()])
def test_truncated_vectors(line, read, made, copied):
    payload = copied(made.payload)
    with (payload / "vectors.npy").open("r+b") as file:
        file.truncate(5000)
    message = read(line, payload=payload)
    assert "vectors.npy is truncated: 5000 bytes" in message and "build the payload again" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number(bad, made, read, tmp_path):
    vectors = np.load(made.vectors)
    vectors[37, 3] = bad
    np.save(tmp_path / "v.npy", vectors)
    message = read(f"payload build --vectors {tmp_path}/v.npy --keys {made.keys} --encoder e --out O/payload")
    assert "row 37" in message and "leave it out" in message


class Hostile:
    def __reduce__(self):
        return (open, ("run-by-a-pickle", "w"))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The pickled object array of numpy that would write a file, in the working folder, when loaded."""
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    np.save(file, np.array([Hostile()], dtype=object), allow_pickle=True)
    pickle.loads(pickle.dumps(Hostile())).close()  # noqa: S301 - it does what it says
    (tmp_path / "run-by-a-pickle").unlink()
    return file.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        "payload import X --out O/payload",
        "payload build --vectors X --keys X --encoder e --out O/payload",
        "predict A --context X",
    ],
)
def test_a_malicious_pickle(line, hostile, read, tmp_path):
    (tmp_path / "old.npy").write_bytes(hostile)
    message = read(line.replace("X", str(tmp_path / "old.npy")))
    assert "old.npy" in message


@pytest.mark.parametrize("name", ["contexts", "truth_keys", "provenance"])
def test_a_malicious_pickle_among_windows(name, hostile, made, read, tmp_path):
    payload, windows = Payload.open(made.payload), Windows.open(made.windows)
    vectors = payload.take(windows.rows("test"))
    arrays = {"contexts": vectors[:, :-1], "targets": vectors[:, -1], "truth_keys": windows.keys("test")}
    arrays.pop(name, None)
    np.savez(tmp_path / "old.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "old.npz", "a") as archive:
        archive.writestr(f"{name}.npy", hostile)
    message = read("windows import W --payload P --out O/w.npz", windows=tmp_path / "old.npz")
    assert "old.npz" in message


def test_a_malicious_pickle_as_windows_of_ours(hostile, made, read, copied):
    windows = copied(made.windows, "w.npz")
    with zipfile.ZipFile(made.windows) as old, zipfile.ZipFile(windows, "w") as new:
        for name in old.namelist():
            new.writestr(name, hostile if name == "rows.npy" else old.read(name))
    assert "w.npz" in read("windows verify W --payload P", windows=windows)


def test_pickles_in_place_of_weights(hostile, made, copied, read):
    run, artifact = copied(made.run), copied(made.artifact)
    (run / "best.safetensors").write_bytes(hostile)
    (artifact / "model.safetensors").write_bytes(hostile)
    (artifact / "golden.npz").write_bytes(hostile)
    assert "best.safetensors" in read(f"export {run} --index I --out O/artifact")
    assert "model.safetensors" in read(f"predict {artifact} --context {made.context}")


# (which folder, file) -> commands that read it
DAMAGE = {
    ("payload", "payload.json"): ["payload info X", "index build X --out O/index"],
    ("payload", "keys.npy"): ["payload info X", "windows build X --out O/w.npz"],
    ("payload", "texts.parquet"): ["payload verify X"],
    ("run", "config.json"): ["export X --index I --out O/artifact", "eval X --payload P --windows W --out O/report"],
    ("run", "space.safetensors"): ["index build P --space X --out O/index", "export X --index I --out O/artifact"],
    ("run", "best.safetensors"): ["export X --index I --out O/artifact"],
    ("run", "last.safetensors"): [
        " ".join(["train --payload P --windows W --out X --resume --epochs 1", *TINY]),
    ],
    ("index", "index.json"): ["export R --index X --out O/artifact"],
    ("index", "index.faiss"): ["export R --index X --out O/artifact"],
    ("index", "keys.npy"): ["export R --index X --out O/artifact"],
    ("artifact", "config.json"): ["predict X --context C", "eval X --payload P --windows W --out O/report"],
    ("artifact", "model.safetensors"): ["predict X --context C"],
    ("artifact", "golden.npz"): ["predict X --context C"],
    ("artifact", "index/index.faiss"): ["predict X --context C"],
}


def damages(data):
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "zeroed", bytes(len(data))
    yield "flipped", data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x41]) + data[len(data) // 2 + 1 :]
    yield "nested", b"[" * 5000
    yield "gone", None


@pytest.mark.parametrize(("kind", "name"), DAMAGE)
def test_damaged_files(kind, name, made, copied, read):
    for how, data in damages((getattr(made, kind) / name).read_bytes()):
        folder = copied(getattr(made, kind), f"{kind}-{how}")
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        for line in DAMAGE[kind, name]:
            if data is None and "--resume" in line:  # a run that was stopped before its first checkpoint
                continue
            if how == "flipped" and (kind, name) == ("run", "config.json"):  # in what training was asked, not read here
                continue
            message = read(line.replace("X", str(folder), 1).replace(" C", f" {made.context}"))
            assert folder.name in message, (how, message)


def test_a_run_whose_config_names_nonsense(made, copied, read):
    config = json.loads((made.run / "config.json").read_text())
    deeper = {"model": config["model"] | {"n_layers": 2}}
    for number, change in enumerate(
        (deeper, {"model": {"name": []}}, {"model": 3}, {"payload_id": 7}, {"space_id": []})
    ):
        run = copied(made.run, f"run{number}")
        (run / "config.json").write_text(json.dumps(config | change))
        read(f"export {run} --index I --out O/artifact")
        read(f"eval {run} --payload P --windows W --out O/report")
