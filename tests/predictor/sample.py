"""A payload small enough to search by hand, and models whose every weight shows in their predictions."""

from __future__ import annotations

import json

import numpy as np
import torch

import fastlvm
from fastlvm.files import sha256_file, sha256_json

DIM, ARTICLES, CHUNKS, CONTEXT = 32, 30, 12, 5
SMALL = {"vector_dim": DIM, "d_model": 48, "n_layers": 2, "d_state": 13}


def make_vectors(seed=0):
    """float32 [360, 32], neighbours alike; row 40 is also row 100 and 101, row 14 is row 15."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((ARTICLES, CHUNKS, DIM))
    for chunk in range(1, CHUNKS):
        steps[:, chunk] = 0.6 * steps[:, chunk - 1] + 0.8 * steps[:, chunk]
    vectors = (steps + rng.standard_normal(DIM)).reshape(-1, DIM)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[[100, 101]] = vectors[40]
    vectors[15] = vectors[14]
    return vectors.astype(np.float32)


def make_model(seed=0, **overrides):
    """Weights as if trained: none is at its start, the head is not zero, and so every weight shows in a prediction."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fastlvm.models.create("mamba-s", **{**SMALL, **overrides}).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_((0.3 if name.startswith("head") else 0.05) * torch.randn_like(weight))
    return model


def torch_predict(model, context):
    with torch.no_grad():
        return model(torch.from_numpy(context)).numpy()


def reseal(folder):
    """Make hashes and checksum of an artifact fit its files again, as whoever changes one on purpose would."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("checksum")
    config["sha256"] = {name: sha256_file(folder / name) for name in config["sha256"]}
    (folder / "config.json").write_text(json.dumps(config | {"checksum": sha256_json(config)}))


def edit_config(folder, **changes):
    """Change entries of config.json and its checksum with them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    reseal(folder)
