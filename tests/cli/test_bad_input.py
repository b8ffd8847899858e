"""One wrong input of every kind for every command: exit code 2, one line that names it, nothing written."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from cli.conftest import DIM, listing, ok, refused

# name of a wrong file or folder -> how it is made in a test's folder
WRONG = {
    "absent": lambda path: None,
    "folder": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "empty.npy": lambda path: path.write_bytes(b""),
    "text.npy": lambda path: path.write_text("no array"),
    "short.npy": lambda path: (np.save(path, np.zeros((112, DIM))), _cut(path, 200)),
    "objects.npy": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "header.npy": lambda path: path.write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'shape': (((((1" + b" " * 86
    ),
    "zip.npy": lambda path: _npz(path, x=np.zeros((5, DIM), np.float32)),
    "ints.npy": lambda path: np.save(path, np.ones((112, DIM), np.int64)),
    "floats.npy": lambda path: np.save(path, np.zeros((112, 2))),
    "rank.npy": lambda path: np.save(path, np.ones((112, DIM, 1, 1), np.float32)),
    "rows.npy": lambda path: np.save(path, np.ones((7, 2), np.int32)),
    "none.npy": lambda path: np.save(path, np.ones((0, DIM), np.float32)),
    "zeros.npy": lambda path: np.save(path, np.zeros((5, DIM), np.float32)),
    "nan.npy": lambda path: np.save(path, np.full((5, DIM), np.nan, np.float32)),
    "dim.npy": lambda path: np.save(path, np.ones((5, DIM + 1), np.float32)),
    "broken.json": lambda path: path.write_text("{"),
    "some.txt": lambda path: path.write_text("text"),
    "bad.jsonl": lambda path: path.write_text("{\n"),
    "few.jsonl": lambda path: path.write_text('{"text": "one"}\n'),
    "bad.jsonl.gz": lambda path: path.write_text("no gzip"),
    "bad.parquet": lambda path: path.write_text("PAR1"),
    "bad.npz": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "other.npz": lambda path: _npz(path, x=np.zeros(3)),
    "bad.safetensors": lambda path: path.write_bytes(b"\xff" * 40),
}


def _npz(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


BUILD = "payload build --vectors V --keys K --encoder e --out O"
SWEEP = "sweep --payload P --windows W --out O"
TRAIN = "train --payload P --windows W --out O"
EVAL = "eval R --payload P --windows W --out O"
PREDICT = "predict A --context C"

# command -> what its line has to hold. V K P W R I A C are whole inputs, O is where nothing is; others are of WRONG
CASES = {
    "payload build --vectors absent --keys K --encoder e --out O": "--vectors: absent does not exist",
    "payload build --vectors folder --keys K --encoder e --out O": "--vectors: folder is no file",
    "payload build --vectors empty.npy --keys K --encoder e --out O": "--vectors: empty.npy",
    "payload build --vectors text.npy --keys K --encoder e --out O": "text.npy is not a whole .npy",
    "payload build --vectors short.npy --keys K --encoder e --out O": "short.npy is not a whole .npy",
    "payload build --vectors objects.npy --keys K --encoder e --out O": "objects.npy is not a whole .npy",
    "payload build --vectors header.npy --keys K --encoder e --out O": "header.npy is not a whole .npy",
    "payload build --vectors zip.npy --keys K --encoder e --out O": "zip.npy is not a whole .npy",
    "payload build --vectors W --keys K --encoder e --out O": "windows.npz is not a whole .npy",
    "payload build --vectors ints.npy --keys K --encoder e --out O": "int64",
    "payload build --vectors rank.npy --keys K --encoder e --out O": "shape",
    "payload build --vectors none.npy --keys K --encoder e --out O": "shape (0, 32)",
    "payload build --vectors zeros.npy --keys K --encoder e --out O": "112 keys for 5 vectors",
    "payload build --vectors V --keys absent --encoder e --out O": "--keys: absent does not exist",
    "payload build --vectors V --keys floats.npy --encoder e --out O": "keys have dtype float64",
    "payload build --vectors V --keys rows.npy --encoder e --out O": "7 keys for 112 vectors",
    "payload build --vectors K --keys V --encoder e --out O": "vectors have dtype int32",
    "payload build --vectors V --keys K --encoder '' --out O": "encoder",
    "payload build --vectors V --keys K --encoder e --out P": "already holds something",
    "payload build --vectors V --keys K --encoder e --out some.txt": "some.txt is a file",
    "payload build --vectors V --keys K --encoder e --out some.txt/below": "some.txt is a file",
    BUILD + " --texts absent": "absent does not exist",
    BUILD + " --texts folder": "folder",
    BUILD + " --texts some.txt": "ending",
    BUILD + " --texts bad.jsonl": "bad.jsonl row 0",
    BUILD + " --texts few.jsonl": "1 texts for 112 vectors",
    BUILD + " --texts bad.jsonl.gz": "bad.jsonl.gz",
    BUILD + " --texts bad.parquet": "bad.parquet is not a parquet file",
    "payload import absent --out O": "absent does not exist",
    "payload import folder --out O": "folder",
    "payload import some.txt --out O": "some.txt is neither .npy nor .npz",
    "payload import V --out O": "payload build",
    "payload import W --out O": "vectors",
    "payload import bad.npz --out O": "bad.npz",
    "payload import other.npz --out O": "other.npz",
    "payload import objects.npy --out O": "objects.npy",
    "payload info absent": "absent does not exist",
    "payload info some.txt": "some.txt is a file",
    "payload info folder": "folder is not a payload",
    "payload info I": "index is not a payload",
    "payload verify absent": "absent does not exist",
    "payload verify R": "run is not a payload",
    "windows build absent --out O": "absent does not exist",
    "windows build W --out O": "windows.npz is a file",
    "windows build P --out folder": "folder is a folder",
    "windows build P --out some.txt/below.npz": "cannot be made",
    "windows build P --out O --context 0": "context",
    "windows build P --out O --context -3": "context",
    "windows build P --out O --context 14": "context",
    "windows build P --out O --context 99999999999999999999": "context",
    "windows build P --out O --split nonsense": "--split: got 'nonsense'",
    "windows build P --out O --split 0.5,0.5": "--split: got '0.5,0.5'",
    "windows build P --out O --split 0.5,0.5,0.5": "split",
    "windows build P --out O --split 1.5,-0.5,0": "split",
    "windows build P --out O --split nan,0,0": "split",
    "windows build P --out O --group-by novel": "group_by is 'novel', and wants title-prefix",
    "windows build P --out O --groups few.jsonl": "--group-by COLUMN",
    "windows build P --out O --group-by novel --groups absent": "absent does not exist",
    "windows build P --out O --group-by novel --groups some.txt": "ending",
    "windows build P --out O --group-by novel --groups few.jsonl": "few.jsonl row 0 has no `novel`",
    "windows build P --out O --group-by text --groups few.jsonl": "few.jsonl has neither article nor row",
    "windows build OTHER --out O --group-by title-prefix": "has no titles",
    "windows align absent --payload P --out O": "absent does not exist",
    "windows align W --payload P --out O": "is a window file of fastlvm",
    "windows align other.npz --payload P --out O": "other.npz has no contexts",
    "windows align OLD --payload OTHER --out O": "fastlvm windows remap",
    "windows align OLD --payload WIDE --out O": "36",
    "windows align OLD --payload P --out OLD": "is the file that is read",
    "windows align OLD --payload P --out O --split nonsense": "--split: got 'nonsense'",
    "windows align OLD --payload P --out O --allow-missing 1": "allow_missing is 1.0",
    "windows remap absent --payload P --out O": "absent does not exist",
    "windows remap W --payload P --out O": "is a window file of fastlvm",
    "windows remap OLD --payload OTHER --out O": "0 of 18 windows",
    "windows remap OLD --payload P --out OLD": "is the file that is read",
    "windows remap OLD --payload P --out O --min-coverage nan": "min_coverage is nan",
    "windows import absent --payload P --out O": "absent does not exist",
    "windows import folder --payload P --out O": "folder",
    "windows import V --payload P --out O": "v.npy is not an .npz",
    "windows import W --payload P --out O": "contexts",
    "windows import bad.npz --payload P --out O": "bad.npz",
    "windows import OLD --payload OTHER --out O": "does not come from payload",
    "windows import OLD --payload absent --out O": "absent does not exist",
    "windows import OLD --payload P --out OLD": "is the file that is read",
    "windows import OLD --payload P --out O --split 2,2,2": "split",
    "windows export absent --payload P --out O": "absent does not exist",
    "windows export OLD --payload P --out O": "fastlvm windows import",
    "windows export W --payload P --split nonsense --out O": "nonsense",
    "windows export W --payload OTHER --out O": "payload",
    "windows export W --payload P --out W": "is the file that is read",
    "windows export W --payload P --out folder": "folder is a folder",
    "windows export P --payload W --out O": "payload does not exist",
    "windows verify absent --payload P": "absent does not exist",
    "windows verify W --payload OTHER": "payload",
    "windows verify W --payload A": "artifact is not a payload",
    "windows verify bad.npz --payload P": "bad.npz",
    "windows verify other.npz --payload P": "other.npz is not a window file",
    "index build absent --out O": "absent does not exist",
    "index build P --out O --kind nonsense": "kind is 'nonsense'",
    "index build P --out O --kind flat --nlist 4": "nlist",
    "index build P --out O --kind hnsw --nlist 4": "nlist and nprobe belong to kind ivf_flat or ivf_sq8",
    "index build P --out O --kind hnsw --recall 0": "recall is 0",
    "index build P --out O --recall 1.5": "recall is 1.5",
    "index build P --out O --recall nan": "recall is nan",
    "index build P --out O --kind ivf_flat --nlist 0": "nlist is 0",
    "index build P --out O --kind ivf_flat --nlist -4": "nlist is -4",
    "index build P --out O --kind ivf_flat --nlist 1000": "nlist is 1000",
    "index build P --out O --kind ivf_flat --nlist 4 --nprobe 5": "nprobe is 5",
    "index build P --out O --kind ivf_flat --seed -1": "seed",
    "index build P --out I": "already holds something",
    "index build P --out some.txt": "some.txt is a file",
    "index build P --out O --space absent": "absent",
    "index build P --out O --space folder": "space.safetensors does not exist",
    "index build P --out O --space bad.safetensors": "bad.safetensors",
    "index build P --out O --space R/best.safetensors": "is not a space",
    "index build WIDE --out O --space R": "32 dimensions",
    "train --payload absent --windows W --out O": "absent does not exist",
    "train --payload P --windows absent --out O": "absent does not exist",
    "train --payload W --windows P --out O": "windows.npz is a file",
    "train --payload OTHER --windows W --out O": "payload",
    "train --payload P --windows W --out folder": "folder already holds something",
    "train --payload P --windows W --out some.txt": "some.txt is a file",
    "train --payload P --windows W --out folder --resume": "folder",
    "train --payload P --windows UNSPLIT --out O": "validation split holds no window",
    TRAIN + " --model nonsense": "model 'nonsense' is not known",
    TRAIN + " --objective nonsense": "objective is 'nonsense'",
    TRAIN + " --space nonsense": "space is 'nonsense'",
    TRAIN + " --epochs 0": "epochs is 0",
    TRAIN + " --epochs -1": "epochs is -1",
    TRAIN + " --batch 0": "batch_size is 0",
    TRAIN + " --lr 0": "lr is 0",
    TRAIN + " --lr -1": "lr is -1",
    TRAIN + " --lr nan": "lr is nan",
    TRAIN + " --lr inf": "lr is inf",
    TRAIN + " --seed -1": "seed is -1",
    TRAIN + " --seed 99999999999999999999": "seed is",
    TRAIN + " --set nonsense": "--set: got 'nonsense'",
    TRAIN + " --set nonsense=1": "'nonsense'",
    TRAIN + " --set d_model=0": "d_model is 0",
    TRAIN + " --set d_model=wide": "d_model is 'wide'",
    TRAIN + " --set d_model=[1]": "d_model is [1]",
    TRAIN + " --set d_model=999999999999": "d_model is",
    TRAIN + " --set d_model=65536": "GiB of memory",
    TRAIN + " --set dropout=1": "dropout is 1",
    TRAIN + " --set dropout=NaN": "dropout is nan",
    TRAIN + " --set vector_dim=7": "vector_dim is 7",
    TRAIN + " --set context=4": "context is 4",
    TRAIN + " --set payload=7": "--set: payload",
    TRAIN + " --set name=x": "--set: name",
    TRAIN + " --epochs 2 --set epochs=3": "--set: epochs",
    TRAIN + " --set patience=x": "patience is 'x'",
    TRAIN + " --set temperature=-1": "temperature is -1",
    "eval absent --payload P --windows W --out O": "absent",
    "eval some.txt --payload P --windows W --out O": "some.txt is no folder",
    "eval folder --payload P --windows W --out O": "folder",
    "eval P --payload P --windows W --out O": "config.json",
    "eval I --payload P --windows W --out O": "config.json",
    "eval R R --payload P --windows W --out O": "run is named twice",
    "eval R --payload OTHER --windows W --out O": "payload",
    "eval R --payload P --windows bad.npz --out O": "bad.npz",
    "eval R --payload P --windows W --out some.txt": "some.txt is a file",
    "eval R --payload P --windows W --out some.txt/below": "some.txt is a file",
    "eval A --payload OTHER --windows W --out O": "payload",
    TRAIN + " --precision fp8": "precision is 'fp8'",
    TRAIN + " --hard-negatives near:3": "hard_negatives is 'near:3'",
    TRAIN + " --gate final": "gates has 'final': name a gate and an epoch",
    TRAIN + " --gate nonsense@1": "gate 'nonsense' is not known",
    TRAIN + " --gate final@99": "the run ends with epoch",
    TRAIN + " --set queue=5": "queue is 5",
    TRAIN + " --set layout=rwkv": "layout has 'rwkv'",
    SWEEP + " --seeds 0,x": "--seeds: got '0,x'",
    SWEEP + " --vary lr": "--vary: got 'lr'",
    SWEEP + " --vary lr=1,2 --set lr=3": "lr is given elsewhere too",
    SWEEP + " --vary seed=1,2": "seed is given elsewhere too",
    SWEEP + " --jobs 0": "jobs is 0",
    SWEEP + " --model rwkv": "'rwkv' is not known",
    "info --model rwkv": "'rwkv' is not known",
    "info --set d_model=3": "--set d_model is a model's, and none is named: add --model",
    "info --model gru --set d_model=0": "d_model is 0",
    EVAL + " --split nonsense": "nonsense",
    EVAL + " --limit 0": "limit is 0",
    EVAL + " --limit -1": "limit is -1",
    EVAL + " --seed -1": "seed",
    EVAL + " --gates nonsense": "gate 'nonsense' is not known",
    "export absent --index I --out O": "absent",
    "bench latency absent": "absent holds no artifact",
    "bench latency A --repeats 0": "repeats 0",
    "bench latency A --threads 0": "threads is 0",
    "bench latency A --gate nonsense": "gate 'nonsense' is not known",
    "bench latency A --context absent.npy": "absent.npy does not exist",
    "bench latency A --rerank mmr:2": "relevance of mmr is 2.0",
    "predict A --context C --rerank mrm": "reranker is 'mrm', and one of mmr, ",
    "predict A --context C --candidates 9": "--candidates is for rerankers, and there is none: add --rerank",
    "predict A --context C --keys k.npy": "--keys is for rerankers",
    "predict A --context C -k 9 --rerank mmr --candidates 8": "k is 9 and candidates 8",
    "predict A --context C --rerank mmr --candidates 0": "candidates is 0",
    "predict A --context C --rerank shard-assist --keys absent.npy": "absent.npy does not exist",
    "export folder --index I --out O": "folder",
    "export P --index I --out O": "config.json",
    "export A --index I --out O": "artifact",
    "export R --out O": "index",
    "export R --index absent --out O": "absent",
    "export R --index P --out O": "payload holds no index",
    "export R --index PLAIN --out O": "space",
    "export R --index FOREIGN --out O": "payload",
    "export R --index I --payload OTHER --out O": "payload",
    "export R --index I --payload P --windows bad.npz --out O": "bad.npz",
    "export R --index I --payload P --windows UNSPLIT --out O": "windows",
    "export R --index I --out A": "already holds something",
    "export R --index I --out some.txt": "some.txt is a file",
    "export R --index I --out O --precision nonsense": "precision is 'nonsense'",
    "predict absent --context C": "absent",
    "predict some.txt --context C": "some.txt",
    "predict folder --context C": "folder holds no artifact",
    "predict R --context C": "not an artifact",
    "predict C --context A": "artifact is no file",
    "predict A --context absent": "--context: absent does not exist",
    "predict A --context folder": "--context: folder is no file",
    "predict A --context empty.npy": "--context: empty.npy",
    "predict A --context zip.npy": "--context: zip.npy",
    "predict A --context ints.npy": "int64",
    "predict A --context rank.npy": "shape",
    "predict A --context dim.npy": "[5, 33]",
    "predict A --context K": "int32",
    "predict A --context V": "[112, 32]",
    "predict A --context zeros.npy": "[0] is all zeros",
    "predict A --context nan.npy": "[0] holds a value that is not finite",
    PREDICT + " -k 0": "k is 0",
    PREDICT + " -k -5": "k is -5",
    PREDICT + " --threads 0": "threads is 0",
    PREDICT + " --threads -2": "threads is -2",
    PREDICT + " --threads 1000000": "threads",
    "demo --out some.txt": "some.txt",
}


@pytest.fixture(scope="session")
def inputs(made, tmp_path_factory, article_walks):
    """The placeholders of CASES and the arguments they stand for."""
    from fastlvm import Index, Payload, Windows

    root = tmp_path_factory.mktemp("inputs")
    found = {"V": made.vectors, "K": made.keys, "P": made.payload, "W": made.windows, "R": made.run, "I": made.index}
    found |= {"A": made.artifact, "C": made.context, "R/best.safetensors": made.run / "best.safetensors"}
    vectors, keys = article_walks(articles=8, chunks=14, dim=DIM, seed=7)
    other = Payload.build(root / "other", vectors, keys, encoder="walks")
    wide, wide_keys = article_walks(articles=3, chunks=8, dim=DIM + 4)
    Payload.build(root / "wide", wide, wide_keys, encoder="walks")
    payload = Payload.open(made.payload)
    Windows.build(payload, split=(1, 0, 0)).save(root / "unsplit.npz")
    Windows.open(made.windows).export_predecessor(root / "old.npz", payload, "test")
    Index.build(payload).save(root / "plain")
    Index.build(other).save(root / "foreign")
    return found | {
        "OTHER": root / "other",
        "WIDE": root / "wide",
        "UNSPLIT": root / "unsplit.npz",
        "OLD": root / "old.npz",
        "PLAIN": root / "plain",
        "FOREIGN": root / "foreign",
    }


@pytest.mark.parametrize("line", CASES)
def test_refused(line, inputs, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.strip("'") for word in line.split()]
    for word in words:
        name = word.partition("/")[0]
        if name in WRONG:
            WRONG[name](tmp_path / name)
    args = [inputs.get(word, word) if word != "O" else "out/new" for word in words]
    before = listing(tmp_path), listing(made.root)
    assert CASES[line] in refused(*args)
    assert (listing(tmp_path), listing(made.root)) == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is reserved on Linux alone")
def test_no_room_for_vectors(made, tmp_path, monkeypatch):
    from fastlvm import Payload

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    args = [
        "payload",
        "build",
        "--vectors",
        made.vectors,
        "--keys",
        made.keys,
        "--encoder",
        "e",
        "--out",
        tmp_path / "p",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert f"{tmp_path / 'p'} cannot be written (No space left on device)" in refused(*args)
        assert listing(tmp_path) == {}

        def unable(*_):
            raise OSError(errno.EOPNOTSUPP, "not on this file system")

        patch.setattr(os, "posix_fallocate", unable)
        ok(*args)
    Payload.open(tmp_path / "p").verify()
